"""lab/lipsum_ft.py: its penalty by hand, its texts, its training, its row beside carot.py's."""

import copy
import dataclasses

import lipsum_ft
import pytest
import small
import torch

import carot
import common

WORDS = "--batch 16 --warmup 1 --device cpu".split()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """carot.py's config, data, CLIP and zero-shot Classifier, of a few digits."""
    small.use_digits(monkeypatch, small.few_digits(tmp_path / "digits"))
    return carot.prepare([*WORDS, "--epochs", "2", "--out", str(tmp_path)])


def test_the_energy_gap_of_two_images_and_two_texts_by_hand():
    f, f_zs = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    g = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    # energies: 10, 6 and 0, 8 of the fine-tuned model, 0, 8 and 0, 8 of the frozen one
    expected = ((10**2 + 2**2) / (2 * 2) + 0) / 2
    assert lipsum_ft.energy_gap(f, f_zs, g, 10.0).item() == pytest.approx(expected)


def test_random_texts_are_eight_known_tokens_between_start_and_end(start):
    clip = start[2]
    torch.manual_seed(0)
    texts, others = (lipsum_ft.random_texts(clip, **lipsum_ft.LIPSUM) for _ in range(2))
    start, end = clip.tokenizer([""])[0, :2]
    assert texts.shape == (80, 16) and not torch.equal(texts, others)
    assert (texts[:, 0] == start).all() and (texts[:, 9] == end).all() and not texts[:, 10:].any()
    inside = texts[:, 1:9].unique()
    assert clip.model.token_embedding.weight[inside].any(1).all() and len(inside) > 20
    assert start not in inside and end not in inside


def test_it_is_ft_as_long_as_the_image_tower_stays_and_goes_less_far_after(start):
    config, data, clip, zero_shot = start
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    loss = lipsum_ft.lipsum_loss(clip, zero_shot)(images, labels)
    plain = torch.nn.functional.cross_entropy(zero_shot(images)[1], labels)
    torch.testing.assert_close(loss, plain)
    ft, lipsum = copy.deepcopy(zero_shot), lipsum_ft.train(*start, seed=0)
    same = dataclasses.replace(config, weight_decay=0.0, clip=0.0)
    common.fine_tune(same, "FT", ft, data.train, clip)
    f, f_ft, f_lipsum = (m(images)[0] for m in (zero_shot, ft, lipsum))
    assert 0 < (f_lipsum - f).norm() < 0.9 * (f_ft - f).norm()


def test_its_row_stands_beside_carots_whose_trainings_are_read(start, tmp_path, capsys):
    words = [*WORDS, "--epochs", "1", "--methods", "FT,CaRot", "--out", str(tmp_path)]
    before = carot.main(words)
    capsys.readouterr()
    rows = lipsum_ft.main(words)
    text = capsys.readouterr().out
    assert text.count("trained before, read from") == 2
    assert [r.method for r in rows] == ["ZS", "FT", "CaRot", "Lipsum-FT"]
    for row, old in zip(rows, before, strict=False):
        assert all(torch.equal(row.right[split], old.right[split]) for split in old.right)
    assert "CaRot less Lipsum-FT" in text and "\n3. Under shift" in text
    assert "Lipsum-FT" in (tmp_path / "figures/carot.csv").read_text()
    lipsum_ft.main(["temperature", *words])
    assert "Lipsum-FT" in capsys.readouterr().out
