"""er_study.py against worked numbers, its own definitions, and fits of public testbeds."""

import contextlib
import copy
import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from small import few_digits, use_digits

import common
import er_study
from data import testbeds


def on_a_line(models=12, slope=0.9, intercept=-0.4, n=1000):
    """Testbed of counts so large that its accuracies are on the line to 1e-12."""
    acc = np.linspace(0.3, 0.95, models)
    k = {"home": acc * n, "away": expit(slope * logit(acc) + intercept) * n}
    names = [f"m{i}" for i in range(models)]
    return testbeds.Testbed("line", names, dict.fromkeys(k, n), k, {"away": "home"})


def by_image(models=20, n=400, seed=0):
    """Testbed of random correctness: harder images are wrong in more models, shift harder still."""
    rng = np.random.default_rng(seed)
    skill = np.linspace(-1, 2.5, models)[:, None]
    ease = {"home": rng.normal(0.5, 1, n), "away": rng.normal(-0.5, 1, n + 50)}
    right = {s: skill + e + rng.normal(0, 0.7, (models, len(e))) > 0 for s, e in ease.items()}
    names = [f"m{i}" for i in range(models)]
    return testbeds.known_by_image("bits", names, right, {"away": "home"})


def run(*words):
    """What er_study.main returns, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = er_study.main([str(w) for w in words])
    return result, printed.getvalue()


# --- App. A, Sec. 3: line and effective robustness ------------------------------------------------


def test_models_on_a_line_have_no_effective_robustness_and_a_raised_one_has_its_rise():
    line = er_study.baseline(bed := on_a_line(), "away")
    acc = {s: bed.accuracy(s) for s in ("home", "away")}
    np.testing.assert_allclose(line.er_of(acc["home"], acc["away"]), 0, atol=1e-12)
    np.testing.assert_allclose(line.er_of(acc["home"], acc["away"] + 0.03), 0.03, atol=1e-12)
    assert (line.slope, line.intercept) == pytest.approx((0.9, -0.4), abs=1e-12)
    assert line.r2 == pytest.approx(1) and line.residual < 1e-12


def test_accuracies_of_zero_and_one_leave_the_fit_and_are_counted(capsys):
    bed = on_a_line()
    bed.k["away"][3], bed.k["home"][5] = 0, bed.n["home"]
    line = er_study.baseline(bed, "away")
    assert "2 models with an accuracy of 0 or 1 are not in the fit" in capsys.readouterr().out
    assert line.slope == pytest.approx(0.9) and {"m3", "m5"}.isdisjoint(line.models)


def test_beta_grows_with_accuracy_and_reaches_zero_and_one():
    values = er_study.beta(np.linspace(0, 1, 101), 0.84, -0.47)
    assert (np.diff(values) > 0).all() and (values[0], values[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("acc_id", "acc_ood", "words"),
    [
        ([0.0, 0.5, 0.6], [0.1, 0.2, 0.3], "2 models with finite logits; needs 3"),
        ([50.0, 60.0, 70.0], [0.1, 0.2, 0.3], "not all shares, from 0 to 1: .50"),
        ([0.5, np.nan, 0.7], [0.1, 0.2, 0.3], "not all shares, from 0 to 1: .0.5 nan"),
    ],
)
def test_accuracies_that_give_no_line_are_refused(acc_id, acc_ood, words):
    with pytest.raises(common.InputError, match=words):
        er_study.fit_line(np.array(acc_id), np.array(acc_ood))


V2 = "imagenetv2-matched-frequency"
GOLD = [  # testbed, shift, models, slope, intercept, R2, tolerance
    ("cifar10", "cifar10.1-v6", 30, 0.83933048, -0.47151230, 0.98164890, 1e-6),
    ("cifar10", "cifar10.1-v4", 30, 0.83853531, -0.49660369, 0.98060087, 1e-6),
    ("imagenet", V2, 66, 0.9424, -0.5161, 0.9983, 1e-4),
    ("imagenet", "imagenetv2-threshold-0.7", 66, 1.0318, -0.2015, 0.9981, 1e-4),
    ("imagenet", "imagenetv2-top-images", 66, 1.0458, 0.0716, 0.9961, 1e-4),
    ("imagenet2020", f"{V2}-format-val", 85, 0.923229, -0.497690, 0.99605, 1e-5),
    ("imagenet2020", "objectnet-1.0-beta", 85, 0.980910, -1.928289, 0.95251, 1e-5),
    ("imagenet2020", "imagenet-r", 80, 0.636844, -2.107716, 0.88940, 1e-5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ood", "models", "slope", "intercept", "r2", "tol"), GOLD)
def test_fits_of_public_testbeds(name, ood, models, slope, intercept, r2, tol):
    line = er_study.baseline(bed := testbeds.read(name), ood)
    assert len(line.models) == models and set(line.models).isdisjoint(bed.studied)
    assert (line.slope, line.intercept, line.r2) == pytest.approx((slope, intercept, r2), abs=tol)


def test_clip_is_above_the_line_and_training_from_scratch_is_not():
    bed = testbeds.read("imagenet2020")
    points = er_study.studied_points(er_study.Measurement(bed, draws=200))
    clip = [100 * p.er for (m, _), p in points.items() if m == "vit_b_32_clip_zeroshot"]
    assert clip == pytest.approx([5.63, 18.10, 38.95], abs=0.006)
    scratch = [100 * p.er for (m, _), p in points.items() if m.endswith("_epochs")]
    assert len(scratch) == 3 * 109 and -0.97 < min(scratch) and max(scratch) < 1.87
    bit = [100 * p.er for (m, s), p in points.items() if "format-val" in s and "R50x1" in m]
    assert [round(x, 2) for x in bit] == [-0.62, 0.64]
    assert all(p.er_lo < p.er < p.er_hi for (m, _), p in points.items() if m.startswith("vit"))


def test_no_model_under_study_is_in_a_shipped_baseline_at_any_size():
    for name in testbeds.PUBLISHED:
        bed = testbeds.read(name)
        studied = {model.split("@")[0] for model in bed.studied}
        for ood in bed.id_of:
            models = er_study.baseline(bed, ood).models
            assert studied.isdisjoint(model.split("@")[0] for model in models), (name, ood)


# --- published models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modern(tmp_path_factory):
    """er_study.modern's Measurement and points, and what it printed."""
    out = tmp_path_factory.mktemp("modern")
    return run("--testbed", "modern", "--draws", 50, "--out", out)


def line_by_hand(shift, column):
    """Least squares in logits, straight from the file's cells.  -> slope, intercept, R2, function
    from a model's name to its ER
    """
    with open(testbeds.FOLDER / "modern.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (x_name,), (y_name,) = ([c for c in rows[0] if c.startswith(f"{s}:")] for s in (column, shift))
    acc = {}
    for row in rows:
        if row[x_name] and row[y_name]:
            acc[row["model"]] = [int(row[c]) / int(c.split(":")[1]) for c in (x_name, y_name)]
    used = [acc[row["model"]] for row in rows if row["role"] == "testbed" and row["model"] in acc]
    x, y = np.log(np.array(used) / (1 - np.array(used))).T
    a, b = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)[0]
    r2 = 1 - ((y - a * x - b) ** 2).sum() / ((y - y.mean()) ** 2).sum()

    def er(model):
        at_home, away = acc[model]
        odds = (at_home / (1 - at_home)) ** a * np.exp(b)
        return away - odds / (1 + odds)

    return a, b, r2, er


MODERN = [  # shift, slope, R2, and ER of ViT-B/32 OpenAI before and after, in points
    ("imagenetv2-matched-frequency", 0.9076, 0.9946, 5.4, -0.3),
    ("imagenet-sketch", 1.1281, 0.9151, 28.0, 11.9),
    ("imagenet-r", 0.9791, 0.8980, 44.8, 10.2),
    ("imagenet-a", 3.2543, 0.7713, 30.4, 1.4),
]
PAIR = ("ViT-B-32 openai", "vit_base_patch32_clip_224.openai_ft_in1k@224")


@pytest.mark.parametrize(("shift", "slope", "r2", "before", "after"), MODERN)
def test_lines_and_er_of_real_models_are_those_of_another_computation(
    modern, shift, slope, r2, before, after
):
    (measurement, points), text = modern
    a, b, by_hand, er = line_by_hand(shift, "imagenet-val")
    line = measurement.lines[shift]
    assert (line.slope, line.intercept, line.r2) == pytest.approx((a, b, by_hand), abs=1e-9)
    assert (line.slope, line.r2) == pytest.approx((slope, r2), abs=1e-4)
    for model, gold in zip(PAIR, (before, after), strict=True):
        point = points[model, shift]
        assert point.er == pytest.approx(er(model), abs=1e-12)
        assert 100 * point.er == pytest.approx(gold, abs=0.05)
        assert point.er_lo < point.er < point.er_hi
    assert f"{before:+.1f} -> {after:+.1f} [" in text


def test_sentences_say_where_er_vanishes_as_the_readme_does(modern):
    said = " ".join(modern[1].split())
    for shift, before, after, gone in (
        ("imagenetv2-matched-frequency", "+5.0", "+0.4", "within"),
        ("imagenet-sketch", "+36.9", "+18.2", "beyond"),
        ("imagenet-r", "+49.7", "+22.4", "beyond"),
        ("imagenet-a", "+45.1", "+9.8", "within"),
    ):
        words = f"{before} before fine-tuning and {after} after, which is {gone} two standard"
        assert f"{shift}: ER over 13 pairs is {words}" in said


def test_an_accuracy_outside_the_testbeds_range_is_marked_extrapolated():
    line = er_study.baseline(testbeds.read("cifar10"), "cifar10.1-v6")
    at = [line.extrapolates(a) for a in (0.80, 0.83, 0.97, 0.975)]
    assert at == [True, False, False, True]


# --- intervals ------------------------------------------------------------------------------------


def test_images_are_redrawn_together_for_all_models():
    bed = by_image()
    draws = testbeds.redraw(bed, 300)
    accuracy = draws.accuracy("home", bed.right["home"][7])
    assert accuracy.mean() == pytest.approx(bed.accuracy("home")[7], abs=0.005)
    near = draws.accuracy("home", bed.right["home"][8])
    p = bed.accuracy("home")[[7, 8]]
    independent = (p * (1 - p)).sum() / bed.n["home"]
    assert (accuracy - near).var() < 0.8 * independent


def test_the_slopes_interval_over_models_alone_is_that_of_the_public_cifar_testbed():
    bed = testbeds.read("cifar10")
    many = 10_000  # so many times the images, so that redrawing them adds nothing
    k = {s: many * counts for s, counts in bed.k.items()}
    bed = dataclasses.replace(bed, n={s: many * n for s, n in bed.n.items()}, k=k)
    draws = testbeds.redraw(bed, 2000).lines["cifar10.1-v6"]
    assert testbeds.interval(draws[0]) == pytest.approx((0.791, 0.876), abs=0.006)
    assert testbeds.interval(draws[1]) == pytest.approx((-0.561, -0.344), abs=0.015)


def test_counts_are_drawn_alike_whatever_was_drawn_before():
    bed = testbeds.read("imagenet2020")
    a, b = (testbeds.redraw(bed, 50) for _ in range(2))
    one = a.accuracy("val", k=30_000, n=50_000)
    b.accuracy("imagenet-r", k=300, n=30_000)
    assert np.array_equal(one, b.accuracy("val", k=30_000, n=50_000))
    assert not np.array_equal(one, a.accuracy("val", k=30_001, n=50_000))
    assert one.std() == pytest.approx((0.6 * 0.4 / 50_000) ** 0.5, rel=0.3)


def test_nobody_right_and_what_a_new_model_gets_of_it():
    testbed = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
    nobody = er_study.nobody_right(testbed)
    assert nobody.tolist() == [False, False, True, True]
    assert er_study.share_right(np.array([0, 1, 1, 0], bool), nobody) == (1, 2)


# --- trajectories ---------------------------------------------------------------------------------


def make_world(out):
    """er_study.prepare of a few digits with two shifts."""
    words = "--quick --epochs 2 --batch 16 --warmup 2 --draws 50 --device cpu --out".split()
    sets = {"train": 48, "val": 48, "test": 48, "scan": 60, "uci": 60}
    with pytest.MonkeyPatch.context() as patch:
        use_digits(patch, few_digits(out / "digits", sets))
        return er_study.prepare((*words, str(out)))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def follow(world, init="zero-shot", lr=1e-3, out=None, data=None):
    """Points of a run that is followed; data: in place of the world's own."""
    config, given, clip, zero_shot, measurement = world
    config = dataclasses.replace(config, lr=lr, out=str(out or config.out))
    if data:
        measurement = dataclasses.replace(measurement, sets=er_study.in_memory(data, clip))
    world = config, data or given, clip, zero_shot, measurement
    return er_study.follow(*world, f"{init}, lr {lr:g}", init)


@pytest.fixture(scope="module")
def points(world):
    return follow(world)


@pytest.fixture(scope="module")
def path(world, points):
    (found,) = Path(world[0].out).glob("trajectories/zero-shot-*.csv")
    return found


def test_a_run_is_evaluated_at_the_start_log_spaced_in_epoch_one_and_then_by_epoch():
    steps = er_study.cadence(47, 22)
    assert steps[:10] == [0, 1, 2, 4, 6, 8, 13, 20, 31, 47]
    assert [s // 47 for s in steps[10:]] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 22]
    assert er_study.cadence(1, 3) == [0, 1, 2, 3]
    assert len(er_study.cadence(600, 1)) == 11  # 0 and ten


def test_a_trajectory_has_every_shift_and_their_mean_at_every_step(world, path, points):
    assert er_study.read(path) == points
    assert sorted({p.step for p in points}) == er_study.cadence(3, 2)
    for p in points:
        assert p.er_lo <= p.er <= p.er_hi and 48 * p.id == pytest.approx(round(48 * p.id))
        if p.shift != "mean":
            assert p.er == pytest.approx(world[4].lines[p.shift].er_of(p.id, p.ood))
    scan, uci, mean = points[:3]
    assert (scan.shift, uci.shift, mean.shift) == ("Scan", "UCI", "mean")
    assert mean.er == pytest.approx((scan.er + uci.er) / 2)
    assert mean.extrapolated == max(scan.extrapolated, uci.extrapolated)


def test_er_of_the_halves_and_what_nobody_gets_right_are_of_their_images(world):
    config, *_, measurement = world
    rng = np.random.default_rng(0)
    right = {s: rng.random(len(labels)) < 0.7 for s, (_, labels) in measurement.sets.items()}
    p, *_, mean = er_study.measure(config, measurement, "x", "random", 0, right)
    for half, er in ((True, p.er_half), (False, p.er_rest)):
        a = right["test"][er_study.selection_half(48) == half]
        b = right["Scan"][er_study.selection_half(60) == half]
        assert len(a) == 24 and len(b) == 30
        assert er == pytest.approx(measurement.lines["Scan"].er_of(a.mean(), b.mean()))
    known = measurement.testbed.right
    of_shift = {s: right[s][~known[s].any(0)] for s in ("Scan", "UCI")}
    assert p.nobody == of_shift["Scan"].mean()
    assert mean.nobody == np.concatenate([*of_shift.values()]).mean()


def test_step_zero_is_the_zero_shot_model_and_id_and_ood_are_of_the_same_weights(world, points):
    config, data, clip, zero_shot, _ = world
    for split, share in ((data.test, points[1].id), (data.shifts[1], points[1].ood)):
        right = common.predict(config, {"": zero_shot}, split, clip)[""].right
        assert right.numpy().mean() == share


def test_poisoned_labels_of_the_shifts_change_no_training(world, points, tmp_path):
    data = copy.deepcopy(world[1])
    data.shifts = [dataclasses.replace(s, labels=(s.labels + 1) % 10) for s in data.shifts]
    poisoned = follow(world, out=tmp_path, data=data)
    for name in ("step", "id", "extrapolated"):
        assert [getattr(p, name) for p in poisoned] == [getattr(p, name) for p in points]
    assert [p.ood for p in poisoned] != [p.ood for p in points]
    a, b = (
        torch.load(next(Path(o).glob("checkpoints/zero-shot*.pt")), weights_only=True)["model"]
        for o in (tmp_path, world[0].out)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_crash_loses_one_evaluation_and_the_same_command_goes_on(
    world, path, points, tmp_path, monkeypatch
):
    measure, calls = er_study.measure, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(er_study, "measure", dies)
        follow(world, out=tmp_path)
    (part,) = tmp_path.glob("trajectories/*.csv")
    assert er_study.read(part) == points[:9]
    assert follow(world, out=tmp_path) == points
    assert part.read_text() == path.read_text()


def test_a_finished_trajectory_is_not_trained_again_and_a_lost_one_is(
    world, path, points, monkeypatch
):
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_steps", None)
        assert follow(world) == points
    path.unlink()  # its checkpoint is there and finished
    assert follow(world) == points and path.read_text() == before


def test_another_recipe_or_training_set_is_another_trajectory(world, monkeypatch):
    names, (config, data, *rest) = [], world

    def record(config, measurement, run, init, key, *others):
        names.append(common.hash_of(key))

    monkeypatch.setattr(er_study, "record", record)
    for change in ({}, {}, {"batch": 8}, {"weight_decay": 0.2}, {"warmup": 3}):
        follow((dataclasses.replace(config, **change), data, *rest))
    follow((config, dataclasses.replace(data, train=data.test), *rest))
    assert names[0] == names[1] and len(set(names)) == len(names) - 1


def test_a_trajectory_that_cannot_be_written_stops_the_run(world, tmp_path):
    (tmp_path / "trajectories").write_text("a file")
    with pytest.raises(common.InputError, match="cannot be written; the same command continues"):
        follow(world, out=tmp_path)


def test_the_head_alone_is_followed_on_frozen_features_as_the_whole_model_would_be(world):
    config, data, clip, zero_shot, _ = world
    found = [p for p in follow(world, "head-only", 0.1) if p.shift == "Scan"]
    model = er_study.start_of(config, zero_shot, "head-only")
    (kept,) = Path(config.out).glob("checkpoints/head-only-*.pt")
    trained = torch.load(kept, weights_only=True)["model"]
    for p, weights in ((found[0], model.state_dict()), (found[-1], trained)):
        model.load_state_dict(weights)
        right = common.predict(config, {"": model}, data.shifts[0], clip)[""].right
        assert p.ood == right.numpy().mean()
    assert found[-1].id > found[0].id


def test_a_new_head_is_random_of_the_old_length_and_a_random_start_shares_nothing(world):
    config, _, _, old, _ = world
    config = dataclasses.replace(config, seed=3)
    kinds = {k: er_study.start_of(config, old, k) for k in er_study.KINDS}
    again = er_study.start_of(config, old, "random").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in kinds["random"].state_dict().items())
    new = kinds["new-head"]
    torch.testing.assert_close(new.head.weight.norm(dim=1), old.head.weight.norm(dim=1))
    assert not torch.allclose(new.head.weight, old.head.weight)
    conv = {k: m.visual.state_dict()["conv1.weight"] for k, m in kinds.items()}
    assert torch.equal(conv["new-head"], old.visual.state_dict()["conv1.weight"])
    assert not torch.equal(conv["random"], conv["new-head"])
    assert torch.equal(kinds["zero-shot"].head.weight, old.head.weight)


# --- what is said of a trajectory -----------------------------------------------------------------


def simulated(er, n=400, steps=12, seed=0, n_id=1_000_000):
    """Points of a run whose true ER is `er` [steps] over a line of slope 1, intercept -1, with n
    and n_id images drawn.
    """
    rng, found = np.random.default_rng(seed), []
    acc = np.linspace(0.4, 0.9, steps)
    for i, (a, e) in enumerate(zip(acc, np.broadcast_to(er, steps), strict=True)):
        away = rng.binomial(n // 2, er_study.beta(a, 1, -1) + e, 2) / (n // 2)
        home = rng.binomial(n_id // 2, a, 2) / (n_id // 2)
        half, rest = er_study.effective_robustness(home, away, 1, -1)
        a, b = home.mean(), away.mean()
        whole = er_study.effective_robustness(a, b, 1, -1)
        fixed = {"init": "random", "step": i, "er_half": half, "er_rest": rest}
        found.append(er_study.Point("x", "away", a, b, whole, -1.0, 1.0, 0, **fixed))
    return found


def test_the_largest_er_of_a_run_on_the_line_is_positive_and_the_unbiased_one_is_not():
    runs = [simulated(0, seed=i, n_id=400) for i in range(300)]
    assert np.mean([max(p.er for p in points) for points in runs]) > 0.03
    found = [er_study.summarise(points) for points in runs]
    mean = {k: np.mean([f[k] for f in found]) for k in ("max", "rise", "fall")}
    assert max(map(abs, mean.values())) < 0.006


def test_a_bump_is_found_where_it_is():
    bump = 0.2 * np.exp(-((np.arange(12) - 6) ** 2) / 4)
    s = er_study.summarise(simulated(bump, n=40_000))
    assert s["max"] == pytest.approx(0.2, abs=0.01)
    assert s["id"] == pytest.approx(0.4 + 0.5 * 6 / 11, abs=2e-3)
    assert (s["rise"], s["fall"]) == pytest.approx((0.2, 0.2), abs=0.01)


def test_the_interval_over_runs_is_students_and_one_run_has_none():
    assert er_study.over_runs([0.01, 0.02, 0.03]) == "+2.0 [-0.5, +4.5]"
    assert er_study.over_runs([0.01]) == "+1.0"


def test_an_extrapolated_start_and_end_have_a_star(capsys):
    own, stars, measurement = simulated(0.1), [], er_study.Measurement(on_a_line(), draws=0)
    for changes in ({}, {0: 1}, {0: 1, -1: 1}):
        for i, outside in changes.items():
            own[i] = dataclasses.replace(own[i], extrapolated=outside)
        er_study.print_tables(measurement, own)
        (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("x ")]
        stars.append(row.count(" *"))
    assert np.diff(stars).tolist() == [2, 2]  # start, and the rise from it; fall, and the end


# --- files: a wrong number is refused where it stands ---------------------------------------------


def edited(path, new, edit):
    """A copy of a CSV file whose rows, lists of text, went through `edit`."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    with open(new, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(edit(rows) or rows)


def put(line, column, value):
    """An edit: `value` in a cell of a line of the file, counted from 1."""

    def edit(rows):
        rows[line - 1][rows[0].index(column)] = value

    return edit


def test_a_testbed_that_is_written_is_read_with_or_without_a_byte_order_mark(tmp_path):
    bed = by_image()
    bed.studied = {"m3": "studied"}
    for kept, name in ((bed, "x.npz"), (dataclasses.replace(bed, right={}), "x.csv")):
        testbeds.write(kept, tmp_path / name)
        if name == "x.csv":
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        again = testbeds.read(tmp_path / name)
        assert again.models == bed.models and again.id_of == bed.id_of and again.n == bed.n
        assert all((again.k[s] == bed.k[s]).all() for s in bed.k) and again.studied == bed.studied


TESTBED_FAULTS = [  # an edit of cifar10.csv, the words of the refusal
    (put(3, "cifar10:10000", "10001"), "line 3, column cifar10:10000: '10001', expected .*10000"),
    (put(3, "cifar10:10000", "-5"), "line 3, column cifar10:10000: '-5', expected a whole number"),
    (put(3, "cifar10:10000", "0.5"), "line 3, column cifar10:10000: '0.5', expected a whole"),
    (lambda rows: rows + rows[1:2], "line 32: 'shake_shake_26_2x64d_SSI_cutout16' is in line 2"),
    (lambda rows: [[*row, row[-1]] for row in rows], "two columns 'cifar10.1-v6:2000'"),
    (lambda rows: [row[:1] + row[2:] for row in rows], "no column 'role'; it has model"),
    (put(1, "cifar10.1-v6:2000", "v6"), "column 'v6': expected SET:IMAGES"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), TESTBED_FAULTS)
def test_a_wrong_testbed_is_refused_by_line_and_column(edit, words, tmp_path):
    edited(testbeds.FOLDER / "cifar10.csv", tmp_path / "testbed.csv", edit)
    with pytest.raises(common.InputError, match=words):
        testbeds.read(tmp_path / "testbed.csv")


def test_quick_leaves_what_the_user_gave(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "zero_shot", lambda config, data: seen.append(config) or 1 / 0)
    for words in ([], ["--lr", "0.5", "--epochs", "7"]):
        with pytest.raises(ZeroDivisionError):
            er_study.prepare(("--quick", *words, "--out", str(tmp_path)))
    assert [(c.lr, c.epochs, c.epochs_random) for c in seen] == [("2e-4", 2, 1), ("0.5", 7, 1)]


def test_the_shipped_testbed_is_of_forty_models_on_the_embedded_digits():
    data, bed = common.open_data(), testbeds.read("digits")
    assert len(bed.models) == 40 and bed.n == {
        s.name: len(s.labels) for s in (data.test, *data.shifts)
    }
    quick = testbeds.read(testbeds.FOLDER / "digits-quick.npz")
    rows = [bed.row(name) for name in quick.models]
    assert len(rows) == 24 and all((quick.right[s] == bed.right[s][rows]).all() for s in bed.n)
