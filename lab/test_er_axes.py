"""lab/er_axes.py, er_published.py and digits_testbed.py on a few digits."""

import csv
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small import few_digits, use_digits  # noqa: E402
from test_er_study import make_world, simulated  # noqa: E402

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402
from lab import digits_testbed, er_axes, er_published  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def first(split, n):
    return dataclasses.replace(split, images=split.images[:n], labels=split.labels[:n])


@pytest.fixture
def shared():
    """Folder of the public per-example tables; they are not part of the repository."""
    folder = os.environ.get("ER_TESTBED", "")
    if not folder:
        pytest.skip("ER_TESTBED names no folder with the public per-example tables")
    return Path(folder)


# --- the digits' testbed --------------------------------------------------------------------------


def test_the_shipped_bits_are_those_of_its_models_trained_again():
    names = ["logistic-100", "1nn-300", "features-128"]
    again, shipped = digits_testbed.trained(names), testbeds.read("digits")
    rows = [shipped.row(name) for name in names]
    differing = sum((again.right[s] != shipped.right[s][rows]).sum() for s in shipped.n)
    assert differing <= 0.001 * len(names) * sum(shipped.n.values())  # 0 on the machine they are of


def test_every_kind_of_model_learns():
    data = common.open_data()
    x, y = digits_testbed.grey(data.train)[:300], data.train.labels[:300]
    few = first(data.test, 200)
    kinds = {"linear": dict(e=10), "knn": dict(k=3), "features": dict(w=128)}
    kinds |= {"mlp": dict(e=10, w=32, d=1, a=True)}
    kinds |= {"cnn": dict(e=25, w=8), "vit": dict(e=25, w=32, d=1)}
    for kind, options in kinds.items():
        model = digits_testbed.fitted(kind, x, y, 0, options)
        with torch.inference_mode():
            scores = model(digits_testbed.grey(few))
        assert common.accuracy(scores, few.labels) > 0.3, kind


def test_the_shipped_testbeds_have_the_zoos_forty_models_and_its_cheap_ones():
    every = [name for name, _, _ in digits_testbed.ZOO]
    assert testbeds.read("digits").models == every and len(set(every)) == 40
    quick = testbeds.read(testbeds.FOLDER / "digits-quick.npz").models
    assert quick == [name for name in every if digits_testbed.cheap(name)]


# --- by image -------------------------------------------------------------------------------------


def test_dominance_of_three_models_by_hand():
    right = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], bool)  # 3, 2, 2 of 4: one tie
    gap, p = er_published.dominance(right)
    assert gap.tolist() == [0.25, 0.25] and sorted(p.tolist()) == [0, 0.25]
    gap, p = er_published.dominance_with(right, np.array([0, 0, 0, 1], bool))
    assert gap.tolist() == [0.5, 0.25, 0.25] and p.tolist() == [0.25, 0, 0.25]


def test_what_a_model_gets_of_the_images_that_no_other_gets():
    right = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]], bool)
    assert [er_published.left_out(right, i) for i in range(3)] == [(2, 3), (0, 1), (0, 1)]


def test_counts_by_image_of_the_public_cifar_testbed(shared):
    bed = testbeds.read(shared / "cifar10_testbed.npz")
    counts = [
        (int(er_study.nobody_right(r).sum()), int(r.all(0).sum())) for r in bed.right.values()
    ]
    assert counts == [(28, 6507), (21, 872), (22, 883)]
    found = [er_published.dominance(r)[1] for r in bed.right.values()]
    assert [len(p) for p in found] == [435, 434, 434]
    assert [round(p.mean(), 4) for p in found] == [0.0168, 0.0337, 0.0330]
    assert [round(p.max(), 4) for p in found] == [0.0729, 0.1178, 0.1155]
    embedded = testbeds.read("cifar10")
    for model in bed.models:
        pairs = [(bed.k[s][bed.row(model)], embedded.k[s][embedded.row(model)]) for s in bed.n]
        assert all(a == b for a, b in pairs)


def test_counts_by_image_of_the_public_imagenet_testbed(shared):
    bed, embedded = testbeds.read(shared / "imagenet_testbed.npz"), testbeds.read("imagenet")
    kept = [i for i, model in enumerate(bed.models) if model != "fv_16k"]  # broken: data/README.md
    assert len(kept) == len(bed.models) - 1
    right = {s: bits[kept] for s, bits in bed.right.items()}
    assert [int(er_study.nobody_right(r).sum()) for r in right.values()] == [2397, 942, 503, 322]
    v2 = [bits for s, bits in right.items() if s != "imagenet-val"]
    found = [round(er_published.dominance(bits)[1].mean(), 4) for bits in v2]
    assert found == [0.0505, 0.0475, 0.0431]
    row, own = bed.row("resnet50"), embedded.row("resnet50")
    assert [embedded.k[s][own] for s in bed.n] == [bed.k[s][row] for s in bed.n]


def test_the_public_2020_table_gives_the_embedded_counts(shared):
    known = testbeds.read("imagenet2020")
    with open(shared / "robustness_top1s.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for s, n in known.n.items():
        percent = np.array([float(rows[model][s] or "nan") for model in known.models])
        np.testing.assert_array_equal(np.round(percent * n / 100), known.k[s])


def test_published_testbeds_are_printed_with_the_models_beside_them(tmp_path, capsys):
    points = er_published.main(["imagenet2020", "--draws", "20", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("109 checkpoints of trainings from scratch: ER ") == 3
    assert er_published.SCRATCH not in text
    (clip,) = (p for p in points if p.run == "vit_b_32_clip_zeroshot" and p.shift == "imagenet-r")
    (row,) = (x for x in text.splitlines() if x.startswith(clip.run))
    assert f"{100 * clip.er:+.2f} [{100 * clip.er_lo:+.2f}, {100 * clip.er_hi:+.2f}]" in row


def test_the_digits_have_their_tables_and_figures_by_image(tmp_path, monkeypatch, capsys):
    use_digits(monkeypatch, few_digits(tmp_path / "digits"))
    words = "--quick --draws 20 --epochs 1 --batch 64 --jobs 1 --device cpu --out".split()
    er_study.main([*words, str(tmp_path), "--kinds", "zero-shot"])
    er_published.main(["digits", *words, str(tmp_path)])
    assert "left out: median %" in capsys.readouterr().out
    drawn = (tmp_path / "figures/er_by_image.csv").read_text()
    assert "pair,zero-shot" in drawn and "nobody,logistic-100" in drawn
    assert (tmp_path / "figures/er_shifts.png").stat().st_size > 10_000


# --- tables of the axes ---------------------------------------------------------------------------


def test_er_at_an_accuracy_is_interpolated_in_logits_between_new_highs():
    pairs = (0.5, 0.0), (0.8, 0.1), (0.7, 9.0), (0.95, 0.3)
    own = [er_study.Point("x", "away", acc_id, 0.5, er, 0.0, 0.0, 0) for acc_id, er in pairs]
    assert er_axes.at_accuracy(own, 0.8) == pytest.approx(0.1)
    half = expit((logit(0.8) + logit(0.95)) / 2)
    assert er_axes.at_accuracy(own, half) == pytest.approx(0.2)
    assert np.isnan(er_axes.at_accuracy(own, 0.96)) and np.isnan(er_axes.at_accuracy(own, 0.4))
    assert er_axes.cell([np.nan, 0.1]) == "-" and er_axes.cell([0.01]) == "+1.0"


def test_an_extrapolated_end_has_a_star(capsys):
    own = simulated(0.1)
    own[-1] = dataclasses.replace(own[-1], extrapolated=1)
    er_axes.print_at({"x": {0: own}}, "away")
    assert capsys.readouterr().out.count("] *") == 1


def test_differences_are_of_runs_of_one_seed_in_pairs(capsys):
    """Whatever a seed does to both runs is not in their difference."""

    def runs(more):
        return {i: simulated(0.04 * i + more, n=100_000, seed=i) for i in range(3)}

    er_axes.differences({"x": runs(0), "y": runs(0.05)}, "away")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("y ")]
    cells = re.findall(r"([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\]", line)
    assert len(cells) == 3  # ID 80, 85 and the end; not all pass 90
    for mean, low, high in (map(float, c) for c in cells):
        assert mean == pytest.approx(5, abs=0.6) and high - low < 3
    er_axes.differences({"x": runs(0)}, "away")  # nothing to compare with
    assert "less x" not in capsys.readouterr().out


def test_runs_are_averaged_as_accuracies_with_the_interval_of_their_mean(capsys):
    groups = {"x": {i: simulated(0.1, n=400, seed=i) for i in range(3)}}
    ends = [own[-1].er for own in groups["x"].values()]
    er_axes.print_at(groups, "away")
    assert er_study.over_runs(ends) in capsys.readouterr().out


# --- the axes -------------------------------------------------------------------------------------


def scored(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator), torch.randint(4, (n,), generator=generator)


def test_difficulty_subsets_are_balanced_seeded_and_ordered_within_each_class():
    score, labels = scored()
    easy, hard = (er_axes.subset(score, labels, w, 20) for w in ("easiest", "hardest"))
    for rows in (easy, hard, er_axes.subset(score, labels, "random", 20, 1)):
        assert labels[rows].bincount().tolist() == [20] * 4 and (rows.diff() > 0).all()
    for c in range(4):
        own = score[labels == c]
        assert score[easy][labels[easy] == c].min() >= own.sort().values[-20]
        assert score[hard][labels[hard] == c].max() <= own.sort().values[19]
    again, other = (er_axes.subset(score, labels, "random", 20, seed) for seed in (1, 2))
    assert torch.equal(again, er_axes.subset(score, labels, "random", 20, 1))
    assert not torch.equal(again, other)
    with pytest.raises(common.InputError, match="fewer than 200"):
        er_axes.subset(score, labels, "random", 200)


def test_subsets_of_the_public_c_scores(shared):
    with np.load(shared / "cifar10_cscores.npz") as z:
        labels, score = torch.from_numpy(z["labels"]), torch.from_numpy(z["scores"])
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    hard, easy = (er_axes.subset(score, labels, w, 500) for w in ("hardest", "easiest"))
    assert hard[:8].tolist() == [19, 21, 39, 50, 92, 111, 140, 151]
    assert easy[:8].tolist() == [1, 3, 7, 10, 12, 26, 32, 41]
    assert (hard.sum().item(), easy.sum().item()) == (124_423_101, 125_075_721)
    assert score[hard].mean().item() == pytest.approx(0.3250, abs=5e-5)
    assert score[easy].mean().item() == pytest.approx(0.8842, abs=5e-5)


def test_wrongly_labelled_images_are_hard_for_models_that_did_not_see_them():
    train = first(common.open_data().train, 400)
    y = train.labels.clone()
    y[:40] = (y[:40] + 3) % 10
    score = er_axes.held_out_score(digits_testbed.grey(train), y, folds=2)
    assert score[:40].mean() < 0.5 * score[40:].mean()


class Linear(torch.nn.Module):
    """A model as common.Classifier is to a loss: images [B, D] -> (features, logits)."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(5, 3)

    def forward(self, x):
        return x, self.head(x)


def test_distillation_and_replay_add_what_they_say():
    torch.manual_seed(0)
    model, teacher, x, y = Linear(), Linear(), torch.randn(8, 5), torch.arange(8) % 3
    plain = torch.nn.functional.cross_entropy(model(x)[1], y)
    own = er_axes.distilled(model)(model)(x, y)
    torch.testing.assert_close(own, plain)  # no drift from itself
    p, q = teacher(x)[1].softmax(1), model(x)[1].softmax(1)
    drift = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(er_axes.distilled(teacher, 2.0)(model)(x, y), plain + 2 * drift)
    old = torch.randn(1, 5)  # a buffer of one image
    both = er_axes.replayed(old, torch.tensor([1]), 4)(model)(x, y)
    again = torch.nn.functional.cross_entropy(model(old)[1], torch.tensor([1]))
    torch.testing.assert_close(both, plain + again)


def test_a_loss_of_ones_own_is_followed_as_plain_fine_tuning_is(world):
    config, *others = world
    config = dataclasses.replace(config, lr=1e-3)
    plain = er_study.follow(config, *others, "plain", "zero-shot")
    courses = []
    for weight in (0.0, 10.0):
        loss = er_axes.distilled(others[2], weight)
        found = er_axes.with_loss(config, *others, "distillation", loss)
        courses.append([dataclasses.replace(p, run="plain") for p in found])
    assert courses[0] == plain and courses[1] != plain


def test_the_ends_of_the_mixed_weights_are_the_zero_shot_and_the_fine_tuned_model(
    world, monkeypatch, capsys
):
    config, data, clip, zero_shot, bench = world
    monkeypatch.setattr(er_axes, "RATE", 1e-3)
    world = dataclasses.replace(config, lr=1e-3), data, clip, zero_shot, bench
    trained = er_study.follow(*world, "zero-shot, lr 0.001", "zero-shot")
    mixed = er_axes.mixed(*world)
    assert len(list(Path(config.out).glob("checkpoints/zero-shot-*.pt"))) == 1  # read, not trained
    c, plain = ([p for p in own if p.shift == "UCI"] for own in (mixed, trained))
    assert [p.step for p in c] == list(range(11))
    for i in (0, -1):
        assert (c[i].id, c[i].ood) == (plain[i].id, plain[i].ood)
    er_axes.print_at(er_study.by_run(mixed + trained, "UCI"), "UCI")
    text = capsys.readouterr().out
    assert "at equal ID accuracy" in text and "weights mixed" in text


def test_difficulty_runs_from_scores_to_a_table_and_a_figure(world, monkeypatch, capsys):
    config, *others = world
    monkeypatch.setattr(er_axes, "PER_CLASS", 1)
    config = dataclasses.replace(config, epochs=1)
    args = config, *others, 0
    found = er_axes.difficulty(*args)
    groups = er_study.by_run(found, "UCI")
    assert list(groups) == (names := ["easiest 10", "random 10", "hardest 10"])
    starts = [own[0].ood for runs in groups.values() for own in runs.values()]
    assert len(set(starts)) == 1  # all start from the zero-shot model
    assert max(c.step for c in found) == 3  # 3 epochs of one batch
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_steps", None)
        assert er_axes.difficulty(*args) == found
    pattern = f"{config.out}/trajectories/*-10-seed-0-*.csv"
    replayed = er_axes.main(["difficulty", "--plot", pattern, "--out", config.out])
    assert {p.run for p in replayed} == set(names) and "last ER" in capsys.readouterr().out
    with open(Path(config.out) / "figures/er_difficulty.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 2 * len(found) // 3


def test_pretraining_runs_from_no_images_to_corpora_of_sizes_and_domains(world, monkeypatch):
    config, data, clip, zero_shot, bench = world
    monkeypatch.setattr(er_axes, "CORPORA", {"16 images": (None, 16), "2 domains": (2, 32)})
    config = dataclasses.replace(config, epochs=1, epochs_random=1)
    found = er_axes.pretraining(config, data, clip, zero_shot, bench, 0, steps=2)
    starts = {c.run: c.init for c in found}
    assert starts == {
        "random, lr 0.001": "random",
        "16 images": "new-head",
        "2 domains": "new-head",
    }
    kept = sorted(p.name for p in Path(config.out).glob("pretrained/*.npz"))
    assert kept == ["16-images-2-0.npz", "2-domains-2-0.npz"]
    a, b = (np.load(Path(config.out) / "pretrained" / name) for name in kept)
    assert any((a[k] != b[k]).any() for k in a.files)


def test_methods_have_ensembles_of_each_model_with_their_ece(world, tmp_path, capsys):
    import vrf

    config, data, clip, zero_shot, bench = world
    words = f"--ab 1,1 --batch 16 --device cpu --out {tmp_path}".split()
    own = common.parse(vrf.Config, words, "")
    model = er_study.start_of(config, zero_shot, "new-head")
    found = er_axes.mixtures(own, data, clip, zero_shot, "E2E-FT", model, 0)
    assert list(found) == ["E2E-FT", "E2E-FT +WSE", "E2E-FT +OSE", "E2E-FT +VRF"]
    alone = common.predict(own, {"": model}, data.test, clip)[""].logits.softmax(1)
    torch.testing.assert_close(found["E2E-FT"]["test"], alone)
    for p in found.values():
        assert list(p) == ["test", *bench.lines]
        torch.testing.assert_close(p["test"].sum(1), torch.ones(48))
    labels, p = {s.name: s.labels for s in (data.test, *data.shifts)}, found["E2E-FT +OSE"]
    ece = {s: common.ece(x, labels[s]) for s, x in p.items()}
    right = {s: (x.argmax(1) == labels[s]).numpy() for s, x in p.items()}
    point = er_study.measure(config, bench, "E2E-FT +OSE", "zero-shot", 0, right)
    point = er_axes.with_ece(point, ece)
    assert [c.ece_id for c in point] == [ece["test"]] * 3
    assert [c.ece_ood for c in point] == [ece["Scan"], ece["UCI"], (ece["Scan"] + ece["UCI"]) / 2]
    er_study.write(tmp_path / "trajectories/methods-seed-0.csv", point)
    shutil.copy(Path(config.out) / "trajectories/testbed.csv", tmp_path / "trajectories")
    er_axes.main(["methods", "--plot", f"{tmp_path}/trajectories/*.csv", "--out", str(tmp_path)])
    assert f"{ece['UCI']:.3f}".lstrip("0") in capsys.readouterr().out
    assert (tmp_path / "figures/er_methods.png").stat().st_size > 10_000


def test_the_courses_of_all_methods_start_at_zero_shot_and_are_drawn(world, tmp_path, monkeypatch):
    sets = {"train": 48, "val": 48, "test": 48, "uci": 60, "fonts": 60}
    use_digits(monkeypatch, few_digits(tmp_path / "digits", sets))
    config, data, clip, zero_shot, bench = world
    config = dataclasses.replace(config, out=str(tmp_path))
    found = er_axes.courses(config, data, clip, zero_shot, bench, 0)
    names = ["E2E-FT", "LP-FT", "FLYP", "CaRot", "Adam-SPD"]
    by_method = {n: [c for c in found if c.run == f"{n} in training"] for n in names}
    right = common.predict(config, {"": zero_shot}, data.test, clip)[""].right.numpy().mean()
    for name, own in by_method.items():
        epochs = 5 if name == "Adam-SPD" else 8
        assert sorted({c.step for c in own}) == er_study.cadence(1, epochs)
        assert (own[0].id == right) == (name != "LP-FT"), name
        assert len(list(tmp_path.glob(f"*/checkpoints/{common.slug(name)}-*.pt"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(er_axes, "steps_of", None)
        assert er_axes.courses(config, data, clip, zero_shot, bench, 0) == found
    shutil.copy(Path(world[0].out) / "trajectories/testbed.csv", tmp_path / "trajectories")
    er_axes.main(["methods", "--plot", f"{tmp_path}/trajectories/*.csv", "--out", str(tmp_path)])
    drawn = (tmp_path / "figures/er_methods.csv").read_text()
    assert all(f"{n} in training" in drawn for n in names)


def test_every_family_and_ensemble_of_methods_has_a_colour_and_a_mark():
    assert len(er_axes.FAMILIES) == len(set(er_axes.FAMILIES)) <= 10
    assert len(set(er_axes.MARKS.values())) == 4
