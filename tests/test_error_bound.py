"""synthetic/error_bound.py: the Gaussians, the terms of the bound by hand, the training, a run."""

import contextlib
import csv
import io
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import common

sys.path.insert(0, str(common.HERE / "synthetic"))
import error_bound  # noqa: E402
import gaussians  # noqa: E402

TINY = "--strengths 2 --repeats 2 --train 60 --test 1100 --epochs 2 --batch 32 --hidden 8"
TINY = [*TINY.split(), "--penultimate", "4"]


def config(*words):
    return common.parse(error_bound.Config, [*TINY, *words], "")


# the Gaussians


@pytest.fixture(scope="module")
def world():
    return gaussians.draw(np.random.default_rng(0), 4000)


def test_fifteen_percent_of_the_labels_are_flipped_and_the_groups_follow_the_class(world):
    x, s, y = world
    assert ((s + 1) // 2 != y).sum() == 600  # 15 % of 4000
    groups = [g.mean().item() for g in (x * s[:, None]).split((400, 400, 200), 1)]
    assert groups == pytest.approx([0.1, 0.2, 0.0], abs=0.003)
    assert x[:, gaussians.X1].std().item() == pytest.approx((1 + 0.01) ** 0.5, abs=0.003)


@pytest.mark.parametrize("reading", error_bound.SHIFTS)
def test_the_shift_keeps_the_rows_of_the_id_test_set_and_moves_the_mean_of_x1(world, reading):
    x, s, _ = world
    before = x.clone()
    moved = gaussians.shifted(x, s, reading)
    assert torch.equal(x, before)
    assert torch.equal(moved[:, 800:], x[:, 800:])  # the same noise
    assert torch.equal(moved[:, gaussians.X2], x[:, gaussians.X2] / 2)
    change = moved[:, gaussians.X1] - x[:, gaussians.X1]
    ends = {"centre": (0, 0), "side": (0.1, 0.1), "alike": (0, 0.2)}[reading]
    for label, end in zip((-1, 1), ends, strict=True):
        moved_by = change[s == label]
        assert (moved_by - (end - 0.1 * label)).abs().max() < 1e-6


def test_x1_no_longer_correlates_with_the_label_and_halved_x2_still_separates(world):
    x, s, y = world
    totals = x[:, gaussians.X1].sum(1)
    assert np.corrcoef(totals, y)[0, 1] > 0.55  # .7 x 2 / sqrt(1 + 4) = .63
    for reading, there in (("centre", False), ("side", False), ("alike", True)):
        moved = gaussians.shifted(x, s, reading)
        found = np.corrcoef(moved[:, gaussians.X1].sum(1), y)[0, 1]
        assert (abs(found) > 0.55) == there and (abs(found) < 0.05) == (not there)
        apart = moved[:, gaussians.X2].sum(1) * s > 0
        assert apart.float().mean() > 0.999  # "perfect" before the flips: 4 standard deviations


# the constraints and the terms of the bound, by hand


def test_both_constraints_by_hand():
    w = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])[None]
    assert gaussians.orthogonality(w).item() == 10  # (4 - 1)^2 + (2 - 1)^2
    assert gaussians.orthogonality(w[:, :, :1]).item() == 9  # of one logit: (|w|^2 - 1)^2
    teacher = torch.zeros(1, 2)  # the probabilities 1/2, 1/2
    student = torch.tensor([[[0.0, 3.0]]]).log1p()  # 1/5, 4/5
    expected = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)
    assert gaussians.distillation(teacher, student).item() == pytest.approx(expected, rel=1e-5)


def test_sigma_min_is_numpys_and_leaves_a_dead_unit_out():
    z = np.random.default_rng(0).standard_normal((50, 3)) @ [[2, 1, 0], [0, 1, 1], [0, 0, 9]] + 7
    expected = np.linalg.svd(np.corrcoef(z.T), compute_uv=False)[-1]
    dead = np.insert(z[:, :2], 1, 0.3, axis=1)
    pair = np.linalg.svd(np.corrcoef(z[:, :2].T), compute_uv=False)[-1]  # 1 - |r|
    found = error_bound.sigma_min(torch.tensor(np.stack([z, dead])))
    assert found.tolist() == pytest.approx([expected, pair])


def test_abscissa_by_hand_raw_and_scaled():
    sigma, ece = np.array([[0.5, 0.25]]), np.array([[0.02, 0.01]])
    assert error_bound.abscissa(sigma, ece)[0].tolist() == pytest.approx([1.01, 2.005])
    assert error_bound.abscissa(sigma, ece, "scaled")[0].tolist() == pytest.approx([0, 0])
    same = error_bound.abscissa(np.array([[0.5, 0.5]]), ece, "scaled")  # of the ECE alone
    assert same[0].tolist() == pytest.approx([0.5, -0.5])


# the correlation


def test_correlations_are_scipys():
    a, b = np.random.default_rng(1).integers(0, 6, (2, 7, 3)).astype(float)  # with ties
    flat = a.ravel(), b.ravel()
    value = error_bound.link(a, b)[0]
    assert value == pytest.approx(stats.pearsonr(*flat).statistic)
    value = error_bound.link(*map(error_bound.ranks, (a, b)))[0]
    assert value == pytest.approx(stats.spearmanr(*flat).statistic)


def test_levels_tell_a_correlation_between_objectives_from_one_inside_them():
    rng = np.random.default_rng(0)
    objective = np.repeat([0.0, 1.0, 2.0, 3.0], [1, 12, 12, 12])[:, None]
    setting, noise = rng.standard_normal((37, 1)), rng.standard_normal((2, 37, 3))
    for shared, strong in ((5 * objective, (1, 0, 0)), (5 * setting, (1, 1, 0))):
        x, y = shared + noise
        for level, expected in zip(error_bound.LEVELS, strong, strict=True):
            value, low, high = error_bound.link(x, y, level)
            assert low < value < high
            assert (value > 0.7 and low > 0.5) if expected else (low < 0 < high), level


def test_repeats_that_are_copies_are_no_new_evidence():
    x, y = np.random.default_rng(2).standard_normal((2, 37, 1))
    one = error_bound.link(x, y)
    copies = error_bound.link(np.repeat(x, 3, 1), np.repeat(y, 3, 1))
    assert copies == pytest.approx(one, abs=0.02)


# the training


def rngs(given, *numbers):
    return [error_bound.generator(given, "start", 0, number) for number in numbers]


@pytest.mark.parametrize("logits", [1, 2])
def test_a_student_among_others_is_that_of_a_plain_loop(logits):
    given = config("--train", "50", "--batch", "10", "--lr", "1e-2")
    x, _, y = gaussians.draw(np.random.default_rng(3), 50)
    teacher = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    lambda_oc, lambda_sd = torch.tensor([[9.0, 0.3], [0.0, 2.0]])
    begin = gaussians.start(given, logits, rngs(given, 4, 7))
    order = np.random.default_rng(5)
    found = gaussians.fit(given, begin, x, y, lambda_oc, lambda_sd, order, teacher)
    p = gaussians.start(given, logits, rngs(given, 7))
    p = [v.squeeze(1 if i == 0 else 0).requires_grad_() for i, v in enumerate(p)]
    optimiser = torch.optim.Adam(p, lr=1e-2)
    rng = np.random.default_rng(5)
    for _ in range(2):
        for rows in np.split(rng.permutation(50), 5):
            hidden = ((x[rows] @ p[0] + p[1]).relu() @ p[2] + p[3]).relu()
            z = hidden @ p[4] + p[5]
            scores = torch.cat([torch.zeros(10, 1), z], 1) if logits == 1 else z
            loss = F.cross_entropy(scores, y[rows])
            loss = loss + 0.3 * (p[4].T @ p[4] - torch.eye(logits)).square().sum()
            # cross-entropy to soft labels has the gradient of the KL divergence
            loss = loss + 2 * F.cross_entropy(scores, teacher[rows].softmax(1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for i, (a, b) in enumerate(zip(found, p, strict=True)):
        of_student = a.select(1 if i == 0 else 0, 1)
        torch.testing.assert_close(of_student, b.detach(), atol=1e-4, rtol=1e-3)


def test_the_teacher_has_no_constraints_and_errors_are_those_of_its_outputs(tmp_path):
    given = config("--out", str(tmp_path))
    sets, labels = error_bound.test_sets(given)
    kept = error_bound.part(given, sets, labels, 2, 0, range(3))
    x, _, y = gaussians.draw(error_bound.generator(given, "train", 0), 60)
    begin, none = gaussians.start(given, 2, rngs(given, 0)), torch.zeros(1)
    order = error_bound.generator(given, "order", 0)
    alone = gaussians.fit(given, begin, x, y, none, none, order)
    teacher = gaussians.forward(alone, x)[1][0]
    torch.testing.assert_close(kept["teacher"], teacher, atol=1e-4, rtol=1e-3)
    h = gaussians.forward(alone, sets["side"])[1][0].double().softmax(1)
    mse = ((h[:, 1] - labels) ** 2).mean().item()
    assert kept["side ECE"][0].item() == pytest.approx(common.ece(h, labels), abs=1e-4)
    assert kept["side MSE"][0].item() == pytest.approx(mse, rel=1e-4)


def test_settings_are_111_models_in_four_objectives_and_both_terms_rise_together():
    found = error_bound.settings(common.parse(error_bound.Config, [], ""))
    assert 3 * len(found) == 111
    assert found[0] == ("none", 0, 0) and found[1] == ("OC", pytest.approx(0.01), 0)
    assert found[13] == ("SD", 0, pytest.approx(0.01))
    assert found[36] == ("OC+SD", pytest.approx(100), pytest.approx(100))


# the script


def run(*words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = error_bound.main([*TINY, *map(str, words)])
    return result, printed.getvalue()


def test_a_run_prints_its_tables_and_a_second_one_goes_on_from_what_is_kept(tmp_path):
    (trained, links), printed = run("--out", tmp_path)
    assert "by reading" in printed and "Table 1" in printed
    assert all(f"\n{i}. " in printed for i in (1, 2, 3)) and len(links) == 24
    assert trained[2]["side MSE"].shape == (7, 2)  # 1 + 3 x 2 settings, 2 repeats
    with open(tmp_path / "figures/fig_3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 and float(rows[1]["side MSE"]) == trained[2]["side MSE"][0, 1]
    x, y = (trained[2][k] for k in ("ID ECE", "alike ECE"))  # Sigma~ of the input is one for all
    found = links[2, "input", "raw", "alike"]["ECE", "pooled"][0]
    assert found == pytest.approx(stats.pearsonr(x.ravel(), y.ravel()).statistic)
    lost = next((tmp_path / "cache").glob("1-logits-*"))
    lost.unlink()
    again = run("--out", tmp_path)[1]
    assert again.partition("Pearson")[2] == printed.partition("Pearson")[2] != ""
    assert lost.is_file()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    run("--out", tmp_path, "--shift", "side", "--logits", "1", "--average", "scaled")
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_readings_and_numbers_that_make_no_study_are_a_sentence(tmp_path):
    refused = {"--logits 1 --measured output": "all models have one sigma_min"}
    refused |= {"--test 1000": "at least 1001", "--lr 1e10 --epochs 9": "lower --lr"}
    for words, match in refused.items():
        with pytest.raises(common.InputError, match=match):
            run("--out", tmp_path, *words.split())
