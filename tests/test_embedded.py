"""The embedded data: disjoint, balanced, legible sizes; the tiny CLIP's pre-training repeats."""

import sys

import numpy as np
import pytest
import torch

import common

sys.path.insert(0, str(common.EMBEDDED))
import pretrain  # noqa: E402


@pytest.fixture(scope="module")
def arrays():
    with np.load(common.EMBEDDED / "digits.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def rows(images):
    return {image.tobytes() for image in images}


def test_no_image_is_in_two_sets(arrays):
    names = [name for name in arrays if name.endswith("/images")]
    assert len(names) >= 10
    for i, a in enumerate(names):
        assert len(rows(arrays[a])) == len(arrays[a]), f"{a} repeats an image"
        for b in names[i + 1 :]:
            assert not rows(arrays[a]) & rows(arrays[b]), f"{a} and {b} share an image"


@pytest.mark.parametrize(
    "name", ["train", "val", "test", "scan", "uci", "fonts", "street", "sketch"]
)
def test_classes_are_balanced(name, arrays):
    counts = np.bincount(arrays[f"{name}/labels"], minlength=10)
    assert (counts == counts[0]).all() and len(counts) == 10


def test_the_embedded_files_stay_small():
    size = sum(file.stat().st_size for file in common.EMBEDDED.glob("*.np*"))
    assert size < 7_000_000


def test_pretraining_fonts_and_evaluation_fonts_are_different_files(arrays):
    assert not set(arrays["pretrain_font_names"]) & set(arrays["eval_font_names"])


def test_the_first_steps_of_pretraining_repeat_the_shipped_losses():
    _, losses = pretrain.pretrain(stop=4)
    assert losses == pytest.approx([5.53744, 5.46661, 5.46608, 5.35071], abs=2e-3)


def test_a_corpus_depends_on_its_seed_and_domains_only():
    first, again, other = (pretrain.corpus(3, 64, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    few = {int(i) for i in pretrain.corpus(1, 64, 0)[2]}
    many = {int(i) for i in pretrain.corpus(10, 64, 0)[2]}
    assert len(few) < len(many)


def test_shipped_tokens_that_no_caption_uses_are_zero():
    with np.load(common.EMBEDDED / "tiny_clip.npz", allow_pickle=False) as file:
        table = file["token_embedding.weight"]
    used = set(pretrain.caption_tokens().unique().tolist())
    zero = set(np.flatnonzero((table == 0).all(1)).tolist())
    assert used.isdisjoint(zero) and len(used) + len(zero) == len(table)
