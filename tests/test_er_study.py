"""er_study.py against worked numbers, its own definitions, and fits of public testbeds."""

import contextlib
import copy
import csv
import dataclasses
import io
import os
import re
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from scipy.special import expit, logit

import common
import er_study
from data import scratch, testbeds, trajectories
from studies import er_axes, er_published, er_report


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
    return testbeds.known_by_image(
        "bits", [f"m{i}" for i in range(models)], right, {"away": "home"}
    )


def er_of(line, acc_id, acc_ood):
    return er_study.effective_robustness(acc_id, acc_ood, line.slope, line.intercept)


def run(*words):
    """What er_study.main returns, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = er_study.main([str(w) for w in words])
    return result, printed.getvalue()


@pytest.fixture
def shared():
    """Folder of the public per-example tables; they are not part of the repository."""
    folder = os.environ.get("ER_TESTBED", "")
    if not folder:
        pytest.skip("ER_TESTBED names no folder with the public per-example tables")
    return Path(folder)


# App. A, Sec. 3: line and effective robustness


def test_logit_and_its_inverse_are_exact_and_reach_zero_and_one():
    p = np.linspace(1e-6, 1 - 1e-6, 999)
    np.testing.assert_allclose(expit(logit(p)), p, rtol=1e-12)
    assert logit(0.5) == 0 and logit(0.8) == pytest.approx(np.log(4))
    assert er_study.beta(np.array([0.0, 1.0]), 0.9, -0.4).tolist() == [0, 1]


def test_models_on_a_line_have_no_effective_robustness_and_a_raised_one_has_its_rise():
    line = er_study.baseline(bed := on_a_line(), "away")
    acc = {s: bed.accuracy(s) for s in ("home", "away")}
    np.testing.assert_allclose(er_of(line, acc["home"], acc["away"]), 0, atol=1e-12)
    np.testing.assert_allclose(er_of(line, acc["home"], acc["away"] + 0.03), 0.03, atol=1e-12)
    assert (line.slope, line.intercept) == pytest.approx((0.9, -0.4), abs=1e-12)
    assert line.r2 == pytest.approx(1) and line.residual < 1e-12


def test_the_fit_is_of_ood_on_id_and_not_the_other_way_round():
    x, y = np.array([0.5, 0.6, 0.8, 0.9]), np.array([0.3, 0.5, 0.55, 0.8])
    slope, intercept, _, used = er_study.fit(x, y)
    np.testing.assert_allclose([slope, intercept], np.polyfit(logit(x), logit(y), 1))
    assert used.all()


def test_accuracies_of_zero_and_one_leave_the_fit_and_are_counted(capsys):
    bed = on_a_line()
    bed.k["away"][3], bed.k["home"][5] = 0, bed.n["home"]
    line = er_study.baseline(bed, "away")
    assert "2 models with an accuracy of 0 or 1 are not in the fit" in capsys.readouterr().out
    assert line.slope == pytest.approx(0.9) and {"m3", "m5"}.isdisjoint(line.models)
    with pytest.raises(common.InputError, match="needs 3"):
        er_study.fit(np.array([0.0, 0.5, 0.6]), np.array([0.1, 0.2, 0.3]))


def test_beta_grows_with_accuracy_and_is_an_accuracy():
    values = er_study.beta(np.linspace(0, 1, 101), 0.83933048, -0.47151230)
    assert (np.diff(values) > 0).all() and values[0] == 0 and values[-1] == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v6", {(0.80, 0.70): 0.033578, (0.90, 0.85): 0.052186, (0.50, 0.45): 0.065742}),
        ("v4", {(0.80, 0.70): 0.039426, (0.90, 0.85): 0.056550, (0.50, 0.45): 0.071661}),
    ],
)
def test_effective_robustness_on_cifar(version, expected):
    line = er_study.baseline(testbeds.read("cifar10"), f"cifar10.1-{version}")
    for accuracies, rho in expected.items():
        assert er_of(line, *accuracies) == pytest.approx(rho, abs=1e-6)


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
    line = er_study.baseline(testbeds.read(name), ood)
    assert len(line.models) == models
    assert (line.slope, line.intercept, line.r2) == pytest.approx((slope, intercept, r2), abs=tol)


def test_clip_is_above_the_line_and_training_from_scratch_is_not(tmp_path):
    points, text = run("--testbed", "imagenet2020", "--draws", 200, "--out", tmp_path)
    clip = [100 * p[4] for p in points if p[0] == "vit_b_32_clip_zeroshot"]
    assert clip == pytest.approx([5.63, 18.10, 38.95], abs=0.006)
    scratch = [100 * p[4] for p in points if p[0].endswith("_epochs")]
    assert len(scratch) == 3 * 109 and -0.97 < min(scratch) and max(scratch) < 1.87
    bit = {p[0]: 100 * p[4] for p in points if "format-val" in p[1] and "R50x1" in p[0]}
    assert [round(x, 2) for x in bit.values()] == [-0.62, 0.64]
    assert all(p[5] < p[4] < p[6] for p in points if p[0].startswith("vit"))
    assert "109 checkpoints of trainings from scratch: ER -0.78 to +1.18" in text
    with open(tmp_path / "figures/er_imagenet2020.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 85 + 85 + 80 + 3 * 121
    assert (tmp_path / "figures/er_imagenet2020.png").stat().st_size > 10_000


# what a baseline may hold


def test_a_model_in_its_own_baseline_is_refused_since_it_would_shrink_its_robustness():
    bed = on_a_line()
    bed.k["away"][4] += 50
    own, without = er_study.baseline(bed, "away"), er_study.baseline(bed, "away", ["m4"])
    acc = [bed.accuracy(s)[4] for s in ("home", "away")]
    args = "home", "away", (1000, 1000), *acc
    assert er_of(own, *acc) < er_of(without, *acc) == pytest.approx(0.05)
    assert er_study.above(without, "m4", *args) == (pytest.approx(0.05), False)
    with pytest.raises(common.InputError, match="m4 is in its own baseline"):
        er_study.above(own, "m4", *args)


def test_studied_models_never_enter_a_baseline():
    bed = testbeds.read("imagenet2020")
    line = er_study.baseline(bed, "imagenet-r")
    assert len(bed.studied) == 121 and set(line.models).isdisjoint(bed.studied)


def test_another_version_variant_or_class_subset_is_refused():
    line = er_study.baseline(testbeds.read("cifar10"), "cifar10.1-v6")
    er_study.above(line, "mine", "cifar10", "cifar10.1-v6", (10_000, 2000), 0.9, 0.8)
    for sets in (
        ("cifar10", "cifar10.1-v4", (10_000, 2000)),
        ("cifar10", "cifar10.1-v6", (10_000, 2021)),
        ("val", "cifar10.1-v6", (10_000, 2000)),
    ):
        with pytest.raises(common.InputError, match="one version and class subset for both"):
            er_study.above(line, "mine", *sets, 0.9, 0.8)


def test_an_accuracy_outside_the_testbeds_range_is_marked_extrapolated():
    line = er_study.baseline(testbeds.read("cifar10"), "cifar10.1-v6")
    sets = "cifar10", "cifar10.1-v6", (10_000, 2000)
    marks = [er_study.above(line, "mine", *sets, a, 0.5)[1] for a in (0.80, 0.83, 0.97, 0.975)]
    assert marks == [True, False, False, True]


def test_a_broken_public_model_is_left_out_with_a_sentence(tmp_path, capsys):
    bits = np.packbits(np.eye(3, 16, dtype=bool), axis=1)
    names = ["a", "fv_16k", "b"]
    np.savez(tmp_path / "x.npz", models=names, val=bits, **{"val/n": 16})
    bed = testbeds.read(tmp_path / "x.npz")
    assert bed.models == ["a", "b"] and bed.right["val"].shape == (2, 16)
    assert "fv_16k is left out: its public ImageNetV2 predictions" in capsys.readouterr().out
    assert "fv_16k" not in testbeds.read("imagenet").models


def test_what_is_no_testbed_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "a.csv").write_text("model,val\nx,1\n")
    (tmp_path / "a.npz").write_bytes(b"no")
    for path, words in (
        (tmp_path / "a.csv", "expected the 2020 table"),
        (tmp_path / "a.npz", "is no per-example testbed"),
        ("cifar", "expected all, cifar10, imagenet, imagenet2020, or a file"),
    ):
        with pytest.raises(common.InputError, match=words):
            testbeds.read(path)
    with pytest.raises(common.InputError, match="did you mean 'nas'"):
        testbeds.read("cifar10").row("nass")


# intervals


def test_clopper_pearson_of_known_counts():
    assert er_study.clopper_pearson(1800, 2000) == pytest.approx((0.8860, 0.9128), abs=5e-5)
    assert er_study.clopper_pearson(1000, 2000) == pytest.approx((0.4779, 0.5221), abs=5e-5)
    low, high = er_study.clopper_pearson(np.array([0, 20]), 20)
    assert low[0] == 0 and high[1] == 1
    assert high[0] == pytest.approx(1 - 0.025 ** (1 / 20)) and low[1] == pytest.approx(1 - high[0])


def test_the_line_of_each_draw_is_that_of_fit():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 0.9, (2, 5, 9))
    b[2, 3] = 0
    slope, intercept = testbeds.slopes(logit(a), logit(b))
    for i in range(5):
        assert (slope[i], intercept[i]) == pytest.approx(er_study.fit(a[i], b[i])[:2])


def test_images_are_redrawn_together_for_all_models():
    bed = by_image()
    draws = testbeds.redraw(bed, 300)
    accuracy = draws.accuracy("home", bed.right["home"][7])
    assert accuracy.mean() == pytest.approx(bed.accuracy("home")[7], abs=0.005)
    near = draws.accuracy("home", bed.right["home"][8])
    p = bed.accuracy("home")[[7, 8]]
    independent = (p * (1 - p)).sum() / bed.n["home"]
    assert (accuracy - near).var() < 0.8 * independent


def test_the_interval_of_a_model_by_image_is_narrower_than_by_counts():
    bed = by_image()
    counts = testbeds.Testbed("counts", bed.models, bed.n, bed.k, bed.id_of)
    widths = []
    for testbed in (bed, counts):
        draws = testbeds.redraw(testbed, 500)
        acc = [
            draws.accuracy(s, bed.right[s][9] if testbed.right else None, bed.k[s][9], bed.n[s])
            for s in ("home", "away")
        ]
        low, high = testbeds.interval(er_study.effective_robustness(*acc, *draws.lines["away"]))
        widths.append(high - low)
    assert 0 < widths[0] < widths[1]


def test_the_slopes_interval_over_models_alone_is_that_of_the_public_cifar_testbed():
    bed = testbeds.read("cifar10")
    many = 10_000  # so many times the images, so that redrawing them adds nothing
    k = {s: many * counts for s, counts in bed.k.items()}
    bed = dataclasses.replace(bed, n={s: many * n for s, n in bed.n.items()}, k=k)
    draws = testbeds.redraw(bed, 2000).lines["cifar10.1-v6"]
    assert testbeds.interval(draws[0]) == pytest.approx((0.791, 0.876), abs=0.006)
    assert testbeds.interval(draws[1]) == pytest.approx((-0.561, -0.344), abs=0.015)


def test_a_public_table_in_percent_becomes_counts_and_its_blanks_nan(tmp_path):
    known = testbeds.read("imagenet2020")
    columns = ["model", *known.n, "another setting"]
    with open(tmp_path / "table.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        for i, m in enumerate(known.models):
            percent = [100 * known.k[s][i] / n for s, n in known.n.items()]
            out.writerow([m, *("" if np.isnan(p) else f"{p:.4f}" for p in percent), "7"])
    bed = testbeds.read(tmp_path / "table.csv")
    assert bed.studied == known.studied and np.isnan(bed.k["imagenet-r"]).any()
    for s in known.n:
        np.testing.assert_array_equal(bed.k[s], known.k[s])


# by image


def test_dominance_of_three_models_by_hand():
    right = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], bool)  # 3, 2, 2 of 4: one tie
    gap, p = er_published.dominance(right)
    assert gap.tolist() == [0.25, 0.25] and sorted(p.tolist()) == [0, 0.25]


def test_nobody_right_and_what_a_new_model_gets_of_it():
    testbed = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
    nobody = er_study.nobody_right(testbed)
    assert nobody.tolist() == [False, False, True, True]
    assert er_study.share_right(np.array([0, 1, 1, 0], bool), nobody) == (1, 2)


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


def test_counts_by_image_of_the_public_imagenet_testbed(shared, capsys):
    bed = testbeds.read(shared / "imagenet_testbed.npz")
    assert "fv_16k is left out" in capsys.readouterr().out
    nobody = [int(er_study.nobody_right(r).sum()) for r in bed.right.values()]
    assert nobody == [2397, 942, 503, 322]
    v2 = {s: r for s, r in bed.right.items() if s != "imagenet-val"}
    assert [round(er_published.dominance(r)[1].mean(), 4) for r in v2.values()] == [
        0.0505,
        0.0475,
        0.0431,
    ]
    embedded = testbeds.read("imagenet")
    row = embedded.row("resnet50")
    assert [embedded.k[s][row] for s in bed.n] == [bed.k[s][bed.row("resnet50")] for s in bed.n]


def test_the_public_2020_table_gives_the_embedded_counts(shared):
    table, embedded = testbeds.read(shared / "robustness_top1s.csv"), testbeds.read("imagenet2020")
    for s in embedded.n:
        np.testing.assert_array_equal(table.k[s], embedded.k[s])


# trajectories


def small(split, n):
    rows = np.random.default_rng(0).permutation(len(split.labels))[:n]
    return dataclasses.replace(split, images=split.images[rows], labels=split.labels[rows])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def make_world(out):
    """A few digits with two shifts, the tiny CLIP, and a testbed of eight on them."""
    words = "--epochs 2 --batch 16 --warmup 2 --draws 50 --device cpu --out".split() + [str(out)]
    config, data = common.begin(er_study.Config, words, "", er_study.PRESETS)
    data.train, data.val, data.test = (small(s, 48) for s in (data.train, data.val, data.test))
    data.shifts = [small(s, 60) for s in data.shifts[:2]]
    clip, zero_shot = common.zero_shot(config, data)
    x, y, right = scratch.grey(data.train), data.train.labels, {}
    sizes = (6, 10, 14, 18, 24, 32, 40, 48)
    models = [scratch.fitted("knn", x[:n], y[:n], 0, k=1) for n in sizes]
    for s in (data.test, *data.shifts):
        guessed = [m(scratch.grey(s)).argmax(1) for m in models]
        right[s.name] = (torch.stack(guessed) == s.labels).numpy()
    pairs = {s.name: "test" for s in data.shifts}
    bed = testbeds.known_by_image("testbed", [f"1nn-{n}" for n in sizes], right, pairs)
    testbeds.write_counts(bed, Path(config.out) / "trajectories/testbed.csv")
    return config, data, clip, zero_shot, bed


def follow(world, kind="zero-shot", lr=1e-3, seed=0, out=None, data=None, **more):
    config, given, clip, zero_shot, bed = world
    config = dataclasses.replace(config, out=str(out or config.out))
    bench = er_study.make_bench(config, bed, *er_study.in_memory(data or given, clip))
    args = config, data or given, clip, zero_shot, bench, kind, lr, config.epochs, seed
    return er_study.follow(*args, **more)


@pytest.fixture(scope="module")
def path(world):
    return follow(world)


def test_a_run_is_evaluated_at_the_start_log_spaced_in_epoch_one_and_then_by_epoch():
    steps = er_study.cadence(47, 22)
    assert steps[:10] == [0, 1, 2, 4, 6, 8, 13, 20, 31, 47]
    assert [s // 47 for s in steps[10:]] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 22]
    assert er_study.cadence(1, 3) == [0, 1, 2, 3]
    assert len(er_study.cadence(600, 1)) == 11  # 0 and ten


def bed_line(world, shift):
    return er_study.baseline(world[4], shift)


def test_a_trajectory_has_counts_of_every_shift_at_every_step(world, path):
    rows = trajectories.read(path, 2)
    assert list(rows[0]) == trajectories.COLUMNS
    assert [r["shift"] for r in rows[:3]] == ["Scan", "UCI", "mean"]
    assert sorted({r["step"] for r in rows}) == er_study.cadence(3, 2)
    for r in rows:
        assert r["n_id"] == r["n_val"] == 48 and r["er_lo"] <= r["er"] <= r["er_hi"]
        if r["shift"] != "mean":
            assert r["er"] == pytest.approx(r["k_ood"] / r["n_ood"] - r["beta"])
            assert r["n_half"] == 30 and r["k_half"] <= r["k_ood"] and r["k_nobody"] <= r["k_ood"]
            assert r["n_id_half"] == 24 and r["k_id_half"] <= min(24, r["k_id"])
            line = bed_line(world, r["shift"])
            for name, k in (("half", r["k_id_half"]), ("rest", r["k_id"] - r["k_id_half"])):
                expected = er_study.beta(k / 24, line.slope, line.intercept)
                assert r[f"beta_{name}"] == pytest.approx(float(expected))
        else:
            assert r["extrapolated"] == max(
                x["extrapolated"] for x in rows if x["step"] == r["step"]
            )
    first = [r["er"] for r in rows[:3]]
    assert first[2] == pytest.approx((first[0] + first[1]) / 2)


def test_step_zero_is_the_zero_shot_model_and_id_and_ood_are_of_the_same_weights(world, path):
    config, data, clip, zero_shot, _ = world
    row = trajectories.read(path, 2)[1]
    for split, k in ((data.test, "k_id"), (data.val, "k_val"), (data.shifts[1], "k_ood")):
        assert common.predict(config, {"": zero_shot}, split, clip)[""].right.sum() == row[k]


def test_replay_of_the_files_says_what_the_live_run_said(world, path):
    config, _, _, _, bed = world
    found = {s: er_study.baseline(bed, s) for s in bed.id_of}
    live = io.StringIO()
    with contextlib.redirect_stdout(live):
        er_report.report(config, bed, found, trajectories.read(path, 2))
    pattern = path.parent / "zero-shot-lr-0-001-seed-0-*.csv"
    _, text = run("--plot", pattern, "--out", config.out)
    assert text == live.getvalue() and "2. " not in text  # none of the runs that it tells of
    assert (
        "effective robustness on" in text
        and (Path(config.out) / "figures/er_study.png").is_file()
        and (Path(config.out) / "figures/er_shifts.png").is_file()
    )


def test_poisoned_labels_of_the_shifts_change_no_training_and_no_choice(world, path, tmp_path):
    data = copy.deepcopy(world[1])
    for s in data.shifts:
        s.labels = (s.labels + 1) % 10
    poisoned = trajectories.read(follow(world, out=tmp_path, data=data), 2)
    plain = trajectories.read(path, 2)
    for name in ("step", "k_id", "k_val", "beta", "extrapolated"):
        assert [r[name] for r in poisoned] == [r[name] for r in plain]
    assert [r["k_ood"] for r in poisoned] != [r["k_ood"] for r in plain]
    choices = [int(er_report.curve(rows, "UCI")["val"].argmax()) for rows in (poisoned, plain)]
    assert choices[0] == choices[1]
    a, b = (
        torch.load(next(Path(o).glob("checkpoints/zero-shot*.pt")), weights_only=True)["model"]
        for o in (tmp_path, world[0].out)
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_crash_loses_one_evaluation_and_the_same_command_goes_on(
    world, path, tmp_path, monkeypatch
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
    assert len(trajectories.read(part, 2)) == 9
    text = part.read_text()
    part.write_text(text + text.splitlines()[1][:30])  # cut short while writing
    assert follow(world, out=tmp_path) == part
    assert part.read_text() == path.read_text()


def test_a_finished_trajectory_is_not_trained_again_and_a_lost_one_is(world, path, monkeypatch):
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(common, "fit", None)
        assert follow(world) == path
    path.unlink()  # its checkpoint is there and finished
    assert follow(world) == path and path.read_text() == before


def test_the_head_alone_is_followed_on_frozen_features_as_the_whole_model_would_be(world):
    config, data, clip, zero_shot, bed = world
    rows = trajectories.read(follow(world, "head-only", 0.1), 2)
    model = er_study.start_of(config, data, clip, zero_shot, "head-only", 0)
    right = common.predict(config, {"": model}, data.shifts[0], clip)[""].right
    assert rows[0]["k_ood"] == right.sum()
    assert rows[-1]["k_id"] > rows[0]["k_id"]


def test_a_new_head_is_random_of_the_old_length_and_a_random_start_shares_nothing(world):
    config, data, clip, zero_shot, _ = world
    kinds = {k: er_study.start_of(config, data, clip, zero_shot, k, 3) for k in er_study.KINDS}
    again = er_study.start_of(config, data, clip, zero_shot, "random", 3).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in kinds["random"].state_dict().items())
    new, old = kinds["new-head"], zero_shot
    torch.testing.assert_close(new.head.weight.norm(dim=1), old.head.weight.norm(dim=1))
    assert not torch.allclose(new.head.weight, old.head.weight)
    weight = "conv1.weight"
    assert torch.equal(new.visual.state_dict()[weight], old.visual.state_dict()[weight])
    assert not torch.equal(
        kinds["random"].visual.state_dict()[weight], old.visual.state_dict()[weight]
    )
    assert torch.equal(kinds["zero-shot"].head.weight, old.head.weight)


def test_runs_in_processes_come_back_in_order_and_an_error_of_one_is_raised():
    runs = [("a", 1), ("b", 3), ("c", 2)]
    assert common.together("{0} {1[0]}".format, 2, "x", runs) == ["x a", "x b", "x c"]
    with pytest.raises(IndexError):
        common.together("{1[3]}".format, 1, "x", runs)


@pytest.mark.skipif("ER_QUICK" not in os.environ, reason="ER_QUICK=1 runs the two-minute study")
def test_the_quick_study_runs_from_end_to_end(tmp_path):
    groups, text = run("--quick", "--out", tmp_path)
    assert len(groups) == 4 and "effective robustness on UCI" in text
    _, again = run("--plot", f"{tmp_path}/trajectories/*.csv", "--out", tmp_path)
    assert again.endswith(text[text.index("effective robustness on") :])
    assert (tmp_path / "figures/er_study.png").stat().st_size > 50_000


# by image, beside the trajectories


def test_pairs_and_left_out_shares_in_the_file_are_those_of_hand(tmp_path):
    right = {"home": np.eye(3, 4, dtype=bool) | [1, 0, 0, 0], "away": np.zeros((3, 4), bool)}
    right["away"][0, :3] = right["away"][1, 1] = right["away"][2, 1] = True
    bed = testbeds.known_by_image("x", ["m0", "m1", "m2"], right, {"away": "home"})
    other = np.array([0, 1, 0, 1], bool)
    er_published.write_by_image(
        bed, lambda: {"away": other, "home": other}, tmp_path / "by_image.csv"
    )
    rows = trajectories.read_plain(tmp_path)
    pairs = [
        (r["kind"], float(r["x"]), float(r["y"]))
        for r in rows
        if (r["what"], r["set"]) == ("pair", "away")
    ]
    assert pairs[:2] == [("testbed", 0.5, 0.0)] * 2  # m1, m2 tie
    assert sorted(pairs[2:]) == [("zero-shot", 0.25, 0.0)] * 2 + [("zero-shot", 0.25, 0.25)]
    alone = {r["model"]: (int(r["y"]), int(r["n"])) for r in rows if r["what"] == "alone"}
    assert alone == {"m0": (2, 3), "m1": (0, 1), "m2": (0, 1)}
    before = (tmp_path / "by_image.csv").stat().st_mtime_ns
    er_published.write_by_image(bed, None, tmp_path / "by_image.csv")  # once is enough
    assert (tmp_path / "by_image.csv").stat().st_mtime_ns == before
    assert trajectories.read_plain(tmp_path / "nowhere") == []


# what is said of a trajectory


def simulated(er, n=400, steps=12, seed=0, n_id=1_000_000):
    """Rows of a run whose true ER is `er` [steps] over a line of slope 1, intercept -1; n and n_id
    images, drawn.
    """
    rng, rows = np.random.default_rng(seed), []
    acc = np.linspace(0.4, 0.9, steps)
    for i, (a, e) in enumerate(zip(acc, np.broadcast_to(er, steps), strict=True)):
        base = er_study.beta(a, 1, -1)
        halves, home = rng.binomial(n // 2, base + e, 2), rng.binomial(n_id // 2, a, 2)
        line = [er_study.beta(k / (n_id // 2), 1, -1) for k in (home.mean(), *home)]
        row = {
            "run": "x, seed 0",
            "init": "random",
            "lr": 0,
            "seed": 0,
            "shift": "away",
            "step": i,
            "epoch": i / 2,
        }
        row |= {"k_id": home.sum(), "n_id": n_id, "k_val": i, "n_val": 100, "extrapolated": 0}
        row |= {"k_id_half": home[0], "n_id_half": n_id // 2}
        row |= dict(zip(("beta", "beta_half", "beta_rest"), line, strict=True))
        row |= {"k_ood": halves.sum(), "n_ood": n, "k_half": halves[0], "n_half": n // 2}
        row |= {"k_nobody": 0, "n_nobody": 0, "er": 0, "er_lo": -1, "er_hi": 1}
        rows.append(row)
    return rows


@pytest.mark.parametrize("n_id", [1_000_000, 400])
def test_the_largest_er_of_a_run_on_the_line_is_positive_and_the_unbiased_one_is_not(n_id):
    found = [er_report.summarise(simulated(0, seed=i, n_id=n_id), "away") for i in range(300)]
    mean = {k: np.mean([f[k] for f in found]) for k in ("max", "max_median", "max_free", "last")}
    assert mean["max"] > 0.03 and 0.01 < mean["max_median"] < mean["max"]
    assert abs(mean["max_free"]) < 0.006 and abs(mean["last"]) < 0.006
    rise, fall = (np.mean([f[k] for f in found]) for k in ("rise", "fall"))
    assert abs(rise) < 0.006 and abs(fall) < 0.006


def test_a_bump_is_found_where_it_is():
    bump = 0.2 * np.exp(-((np.arange(12) - 6) ** 2) / 4)
    s = er_report.summarise(simulated(bump, n=40_000), "away")
    assert s["max_free"] == pytest.approx(0.2, abs=0.01) and s["max_epoch"] == 3
    assert abs(s["start"]) < 0.01 and abs(s["last"]) < 0.01
    assert s["max_id"] == s["free_id"] == pytest.approx(0.4 + 0.5 * 6 / 11, abs=2e-3)
    assert (s["rise"], s["fall"]) == pytest.approx((0.2, 0.2), abs=0.01)


def test_the_interval_over_runs_is_students_and_one_run_has_none():
    mean, low, high = common.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == pytest.approx((2, 4.302653 / 3**0.5)) and low + high == 4
    assert np.isnan(common.interval([1.0])[1:]).all()
    assert er_report.over_runs([0.01, 0.02, 0.03]) == "+2.0 [-0.5, +4.5]"
    assert er_report.over_runs([0.01]) == "+1.0" and er_report.over_runs([np.nan, 0.1]) == "-"


def test_er_at_an_accuracy_is_interpolated_in_logits_between_new_highs():
    c = {"id": np.array([0.5, 0.8, 0.7, 0.95]), "er": np.array([0.0, 0.1, 9.0, 0.3])}
    assert er_report.at_accuracy(c, 0.8) == pytest.approx(0.1)
    half = expit((logit(0.8) + logit(0.95)) / 2)
    assert er_report.at_accuracy(c, half) == pytest.approx(0.2)
    assert np.isnan(er_report.at_accuracy(c, 0.96)) and np.isnan(er_report.at_accuracy(c, 0.4))


def test_an_extrapolated_start_and_end_have_a_star(capsys):
    rows = simulated(0.1)
    er_report.print_runs({"x": {"x, seed 0": rows}}, "away")
    plain = capsys.readouterr().out
    rows[0]["extrapolated"] = 1
    er_report.print_runs({"x": {"x, seed 0": rows}}, "away")
    starred = capsys.readouterr().out
    assert starred.count(" *") - plain.count(" *") == 2  # start, and the rise from it
    rows[-1]["extrapolated"] = 1
    er_axes.print_at({"x": {"x, seed 0": rows}}, "away")
    assert capsys.readouterr().out.count("] *") == 1


def test_differences_are_of_runs_of_one_seed_in_pairs(capsys):
    """Whatever a seed does to both runs is not in their difference."""

    def runs(name, more):
        made = {}
        for i in range(3):
            rows = simulated(0.04 * i + more, n=100_000, seed=i)
            made[f"{name}, seed {i}"] = [r | {"seed": i} for r in rows]
        return made

    er_axes.differences({"x": runs("x", 0), "y": runs("y", 0.05)}, "away")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("y ")]
    cells = re.findall(r"([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\]", line)
    assert len(cells) == 3  # ID 80, 85 and the end; not all pass 90
    for mean, low, high in (map(float, c) for c in cells):
        assert mean == pytest.approx(5, abs=0.6) and high - low < 3
    er_axes.differences({"x": runs("x", 0)}, "away")  # nothing to compare with
    assert "less x" not in capsys.readouterr().out


def test_two_runs_in_one_folder_write_each_evaluation_once(tmp_path):
    path, rows = tmp_path / "x.csv", simulated(0.1)
    for part in (rows[:3], rows[:4], rows[2:], rows):
        trajectories.append(path, part)
    assert [r["step"] for r in trajectories.read(path)] == [r["step"] for r in rows]
    assert path.read_text().count("run,model") == 1


def test_quick_leaves_what_the_user_gave(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "zero_shot", lambda config, data: seen.append(config) or 1 / 0)
    for words in ([], ["--lr", "0.5", "--epochs", "7"]):
        with pytest.raises(ZeroDivisionError):
            er_study.prepare(["--quick", *words, "--out", str(tmp_path)])
    assert [(c.lr, c.epochs, c.epochs_random) for c in seen] == [("2e-4", 2, 1), ("0.5", 7, 1)]


def test_a_file_of_an_older_version_is_named_and_trained_again(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("run,step,shift,extrapolated\nx,0,away,0\n")
    with pytest.raises(common.InputError, match="x.csv has no column 'model', as of an older"):
        trajectories.read(path)


def test_counts_are_drawn_alike_whatever_was_drawn_before():
    bed = testbeds.read("imagenet2020")
    a, b = (testbeds.redraw(bed, 50) for _ in range(2))
    one = a.accuracy("val", k=30_000, n=50_000)
    b.accuracy("imagenet-r", k=300, n=30_000)
    assert np.array_equal(one, b.accuracy("val", k=30_000, n=50_000))
    assert not np.array_equal(one, a.accuracy("val", k=30_001, n=50_000))
    assert one.std() == pytest.approx((0.6 * 0.4 / 50_000) ** 0.5, rel=0.3)


def test_runs_are_averaged_as_accuracies_with_the_interval_of_their_mean(capsys):
    groups = {"x": {f"x, seed {i}": simulated(0.1, n=400, seed=i) for i in range(3)}}
    ends = [er_report.curve(rows, "away")["er"][-1] for rows in groups["x"].values()]
    er_axes.print_at(groups, "away")
    assert er_report.over_runs(ends) in capsys.readouterr().out
    assert common.interval(ends)[0] == pytest.approx(np.mean(ends))


def test_axes_of_id_accuracy_are_logits_of_round_percent_shaded_where_extrapolated():
    fig, ((axis,),) = common.new_figure()
    line = er_study.baseline(testbeds.read("cifar10"), "cifar10.1-v6")
    er_report.id_axis(axis, line, 0.5, 0.99)
    np.testing.assert_allclose(axis.get_xlim(), logit([0.5, 0.99]))
    ticks = [t.get_text() for t in axis.get_xticklabels()]
    assert ticks == ["50", "70", "80", "85", "90", "95", "98"]
    np.testing.assert_allclose(expit(axis.get_xticks()), np.array(ticks, float) / 100)
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in axis.patches]
    np.testing.assert_allclose(spans, logit([[0.5, line.low], [line.high, 0.99]]))
    assert "n 30, slope 0.84, intercept -0.47, R² 0.982" in er_report.caption(line)


# the digits' testbed, options


def test_every_kind_of_scratch_model_learns():
    data = common.open_data()
    x, y = scratch.grey(data.train)[:300], data.train.labels[:300]
    z, labels = scratch.grey(small(data.test, 200)), small(data.test, 200).labels
    kinds = {"linear": dict(e=10), "knn": dict(k=3), "features": dict(w=128)}
    kinds |= {
        "mlp": dict(e=10, w=32, d=1, a=True),
        "cnn": dict(e=25, w=8),
        "vit": dict(e=25, w=32, d=1),
    }
    for kind, options in kinds.items():
        model = scratch.fitted(kind, x, y, 0, **options)
        with torch.inference_mode():
            assert common.accuracy(model(z), labels) > 0.3, kind


def test_the_zoo_has_forty_models_of_six_kinds_with_names_of_their_own():
    assert len({name for name, *_ in scratch.ZOO}) == len(scratch.ZOO) == 40
    assert len({kind for _, kind, _ in scratch.ZOO}) == 6
    assert 20 < sum(scratch.cheap(*z[1:]) for z in scratch.ZOO) < 30


def test_counts_written_are_counts_read(tmp_path):
    bed = by_image()
    testbeds.write_counts(bed, tmp_path / "testbed.csv")
    again = testbeds.read_counts(tmp_path / "testbed.csv")
    assert again.models == bed.models and again.id_of == bed.id_of and again.n == bed.n
    assert all((again.k[s] == bed.k[s]).all() for s in bed.k)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "/imagenet"], "--data /imagenet: a study needs a testbed on the same data"),
        (["--plot", "nowhere/*.csv"], "no trajectories, or no testbed.csv by them"),
        (["--kinds", "random,zeroshot"], "there is no 'zeroshot'; did you mean 'zero-shot'"),
        (["--lr", "fast"], "--lr fast: expected positive numbers"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(words, sentence):
    with pytest.raises(common.InputError, match=sentence.replace("*", ".")):
        run(*words)


# axes


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
    data = common.open_data()
    train = small(data.train, 400)
    y = train.labels.clone()
    y[:40] = (y[:40] + 3) % 10
    score = er_axes.held_out_score(scratch.grey(train), y, folds=2)
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
    assert er_axes.distilled(teacher)(model)(x, y) > plain
    p, q = teacher(x)[1].softmax(1), model(x)[1].softmax(1)
    drift = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(er_axes.distilled(teacher, 2.0)(model)(x, y), plain + 2 * drift)
    old = torch.randn(1, 5)  # a buffer of one image
    both = er_axes.replayed(old, torch.tensor([1]), 4)(model)(x, y)
    again = torch.nn.functional.cross_entropy(model(old)[1], torch.tensor([1]))
    torch.testing.assert_close(both, plain + again)


def test_strategies_are_compared_at_equal_id_accuracy(world, path, monkeypatch, capsys):
    config, data, clip, zero_shot, bed = world
    bench = er_study.make_bench(config, bed, *er_study.in_memory(data, clip))
    monkeypatch.setattr(er_axes, "RATE", 1e-3)  # that of `path`, which is not trained again
    (mixed,) = [er_axes.mixed(config, data, clip, zero_shot, bench, 0)]
    rows, trained = trajectories.read(mixed, 2), trajectories.read(path, 2)
    c, plain = er_report.curve(rows, "UCI"), er_report.curve(trained, "UCI")
    assert c["epoch"].tolist() == [i / 10 for i in range(11)]
    for name in ("id", "ood"):  # the ends are the zero-shot and the fine-tuned model
        assert c[name][0] == plain[name][0] and c[name][-1] == plain[name][-1]
    er_axes.print_at(er_report.by_run(rows + trained), "UCI")
    text = capsys.readouterr().out
    assert "at equal ID accuracy" in text and "weights mixed" in text


def bench_of(world):
    config, data, clip, _, bed = world
    return er_study.make_bench(config, bed, *er_study.in_memory(data, clip))


def test_difficulty_runs_from_scores_to_a_table_and_a_figure(world, monkeypatch, capsys):
    config, data, clip, zero_shot, bed = world
    monkeypatch.setattr(er_axes, "PER_CLASS", 1)
    args = dataclasses.replace(config, epochs=1), data, clip, zero_shot, bench_of(world), 0
    paths = er_axes.difficulty(*args)
    names = ["easiest 10", "random 10", "hardest 10"]
    assert [trajectories.read(p, 2)[0]["run"] for p in paths] == [f"{n}, seed 0" for n in names]
    firsts = [trajectories.read(p, 2)[1]["k_ood"] for p in paths]
    assert len(set(firsts)) == 1  # all start from the zero-shot model
    assert max(r["step"] for r in trajectories.read(paths[0])) == 3  # 3 epochs of one batch
    with monkeypatch.context() as patch:
        patch.setattr(common, "fit", None)
        assert er_axes.difficulty(*args) == paths
    pattern = f"{paths[0].parent}/*-10-seed-0-*.csv"
    groups = er_axes.main(["difficulty", "--plot", pattern, "--out", config.out])
    assert sorted(groups) == sorted(names) and "last ER" in capsys.readouterr().out
    with open(Path(config.out) / "figures/er_difficulty.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 2 * sum(
            len(trajectories.read(p)) // 3 for p in paths
        )


def test_pretraining_runs_from_no_images_to_corpora_of_sizes_and_domains(world, monkeypatch):
    config, data, clip, zero_shot, _ = world
    monkeypatch.setattr(er_axes, "CORPORA", {"16 images": (None, 16), "2 domains": (2, 32)})
    config = dataclasses.replace(config, epochs=1, epochs_random=1)
    paths = er_axes.pretraining(config, data, clip, zero_shot, bench_of(world), 0, steps=2)
    runs = [trajectories.read(p, 2)[0] for p in paths]
    assert [r["run"] for r in runs] == [
        "random, lr 0.001, seed 0",
        "16 images, seed 0",
        "2 domains, seed 0",
    ]
    assert [r["init"] for r in runs] == ["random", "new-head", "new-head"]
    kept = sorted(p.name for p in Path(config.out).glob("pretrained/*.npz"))
    assert kept == ["16-images-2-0.npz", "2-domains-2-0.npz"]
    a, b = (np.load(Path(config.out) / "pretrained" / name) for name in kept)
    assert any((a[k] != b[k]).any() for k in a.files)


def test_methods_have_ensembles_of_each_model_with_their_ece(world, path, tmp_path, capsys):
    import vrf

    config, data, clip, zero_shot, bed = world
    words = f"--ab 1,1 --batch 16 --device cpu --out {tmp_path}".split()
    own, model = common.parse(vrf.Config, words, ""), er_study.new_head(copy.deepcopy(zero_shot), 0)
    found = er_axes.mixtures(own, data, clip, zero_shot, "E2E-FT", model, 0)
    assert list(found) == ["E2E-FT", "E2E-FT +WSE", "E2E-FT +OSE", "E2E-FT +VRF"]
    alone = common.predict(own, {"": model}, data.test, clip)[""].logits.softmax(1)
    torch.testing.assert_close(found["E2E-FT"]["test"], alone)
    for p in found.values():
        assert list(p) == ["test", *bed.id_of]
        torch.testing.assert_close(p["test"].sum(1), torch.ones(48))
    labels, rows = {s.name: s.labels for s in (data.test, *data.shifts)}, []
    p = found["E2E-FT +OSE"]
    ece = {s: common.ece(x, labels[s]) for s, x in p.items()}
    right = {s: (x.argmax(1) == labels[s]).numpy() for s, x in p.items()}
    run = {
        "run": "E2E-FT +OSE, seed 0",
        "init": "zero-shot",
        "lr": 0,
        "seed": 0,
        "step": 0,
        "epoch": 0,
    }
    bench = bench_of(world)
    rows = er_axes.with_ece(er_study.measure(bench, run, right), ece, bench)
    assert [r["ece_id"] for r in rows] == [ece["test"]] * 3
    assert [r["ece_ood"] for r in rows] == [ece["Scan"], ece["UCI"], (ece["Scan"] + ece["UCI"]) / 2]
    trajectories.append(tmp_path / "trajectories/methods-seed-0.csv", rows)
    testbeds.write_counts(bed, tmp_path / "trajectories/testbed.csv")
    er_axes.main(["methods", "--plot", f"{tmp_path}/trajectories/*.csv", "--out", str(tmp_path)])
    assert f"{ece['UCI']:.3f}".lstrip("0") in capsys.readouterr().out
    assert (tmp_path / "figures/er_methods.png").stat().st_size > 10_000


def test_the_courses_of_all_methods_start_at_zero_shot_and_are_drawn(world, tmp_path, monkeypatch):
    sets = {"train": 48, "val": 48, "test": 48, "uci": 60, "fonts": 60}
    monkeypatch.setattr(common, "EMBEDDED", faults.few_digits(tmp_path / "digits", sets))
    config, data, clip, zero_shot, bed = world
    config = dataclasses.replace(config, out=str(tmp_path))
    paths = er_axes.courses(config, data, clip, zero_shot, bench_of(world), 0)
    runs = [trajectories.read(p, 2) for p in paths]
    names = ["E2E-FT", "LP-FT", "FLYP", "CaRot", "Adam-SPD"]
    assert [r[0]["run"] for r in runs] == [f"{n} in training, seed 0" for n in names]
    right = common.predict(config, {"": zero_shot}, data.test, clip)[""].right.sum()
    for name, rows in zip(names, runs, strict=True):
        assert sorted({r["step"] for r in rows}) == er_study.cadence(
            1, 5 if name == "Adam-SPD" else 8
        )
        assert (rows[0]["k_id"] == right) == (name != "LP-FT"), name
        assert len(list(tmp_path.glob(f"*/checkpoints/{common.slug(name)}-*.pt"))) == 1
    before = [p.stat().st_mtime_ns for p in paths]
    assert er_axes.courses(config, data, clip, zero_shot, bench_of(world), 0) == paths
    assert [p.stat().st_mtime_ns for p in paths] == before
    testbeds.write_counts(bed, tmp_path / "trajectories/testbed.csv")
    er_axes.main(["methods", "--plot", f"{tmp_path}/trajectories/*.csv", "--out", str(tmp_path)])
    drawn = (tmp_path / "figures/er_methods.csv").read_text()
    assert all(f"{n} in training" in drawn for n in names)


def test_every_family_and_ensemble_of_methods_has_a_colour_and_a_mark():
    assert len(er_axes.FAMILIES) == len(set(er_axes.FAMILIES)) <= 10
    assert len(set(er_axes.MARKS.values())) == 4
