"""The tiny CLIP's pre-training repeats: its first losses, its images, its shipped token table."""

import numpy as np
import pretrain_clip
import pytest
import torch


def test_the_first_steps_of_pretraining_repeat_the_shipped_losses():
    _, losses = pretrain_clip.pretrain(stop=4)
    assert losses == pytest.approx([5.53744, 5.46661, 5.46608, 5.35071], abs=2e-3)


def test_a_corpus_depends_on_its_seed_and_domains_only():
    first, again, other = (pretrain_clip.corpus(3, 64, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    few = {int(i) for i in pretrain_clip.corpus(1, 64, 0)[2]}
    many = {int(i) for i in pretrain_clip.corpus(10, 64, 0)[2]}
    assert len(few) < len(many)


def test_shipped_tokens_that_no_caption_uses_are_zero():
    with np.load(pretrain_clip.DATA / "tiny_clip.npz", allow_pickle=False) as file:
        table = file["token_embedding.weight"]
    used = set(pretrain_clip.caption_tokens().unique().tolist())
    zero = set(np.flatnonzero((table == 0).all(1)).tolist())
    assert used.isdisjoint(zero) and len(used) + len(zero) == len(table)
