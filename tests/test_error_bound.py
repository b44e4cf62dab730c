"""synthetic/error_bound.py: the terms of the bound by hand, the Gaussians, the training, a run."""

import contextlib
import csv
import io
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common

sys.path.insert(0, str(common.HERE / "synthetic"))
import error_bound  # noqa: E402
import gaussians  # noqa: E402

TINY = "--models 4 --runs 2 --train 60 --test 200 --epochs 2 --batch 32 --hidden 8 --projection 3"


def config(*words):
    return common.parse(error_bound.Config, [*TINY.split(), "--at-once", "2", *words], "")


def rows(*values):
    return torch.tensor(values, dtype=torch.double)


def test_the_left_sides_of_four_samples_by_hand():
    h, y = rows([0.2, 0.2, 0.9, 0.9]), torch.tensor([0, 1, 1, 1])
    c = error_bound.conditional_mean(h, y)
    assert c.tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert error_bound.calibration_error(h, c).item() == pytest.approx((0.09 + 0.01) / 2)
    assert error_bound.calibration_error(h, y).item() == pytest.approx((0.04 + 0.64 + 0.02) / 4)
    assert error_bound.left_2(h, y, c).item() == pytest.approx(0.175 + 0.625 - 1)
    outer = error_bound.conditional_mean(rows([0.0, 0.05, 1.0, 0.95]), torch.tensor([0, 1, 1, 0]))
    assert outer.tolist() == [[0.5] * 4]


def test_a_calibrated_predictor_has_no_calibration_error_and_models_do_not_mix():
    y = torch.tensor([0, 1, 0, 1, 1, 1, 1, 0])
    h = rows([0.5] * 4 + [0.75] * 4, [0.5] * 4 + [0.15] * 4)
    found = error_bound.calibration_error(h, error_bound.conditional_mean(h, y))
    assert found.tolist() == pytest.approx([0.0, 0.5 * 0.6**2])


def test_spectrum_of_two_features_is_one_less_and_one_plus_their_correlation_at_any_scale():
    z = rows([1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0])  # uncorrelated, standardised
    mixed = torch.stack([z[:, 0], 0.6 * z[:, 0] + 0.8 * z[:, 1]], 1)[None]
    moved = mixed * torch.tensor([9.0, 1e-3]) + torch.tensor([7.0, -4.0])
    assert error_bound.spectrum(moved)[0].tolist() == pytest.approx([0.4, 1.6])
    for other in (-2 * z[:, 0], 0 * z[:, 0] + 0.1):  # a copied and a constant feature
        both = torch.stack([z[:, 0], other], 1)[None]
        assert error_bound.spectrum(both)[0, 0].item() == pytest.approx(0, abs=1e-12)


def test_right_side_by_hand_is_the_sum_of_its_four_terms():
    expected = math.sqrt((10 * math.log(100) + math.log(20)) / 1000)
    assert error_bound.sampling_term(1000, 10, 0.05) == pytest.approx(expected)
    d_over_sigma = error_bound.discrepancy(16, rows([0.5, 1.0])[0])
    found = error_bound.right(rows([0.1, 0.2])[0], d_over_sigma, 0.03, 0.2)
    assert found.tolist() == pytest.approx([32.33, 16.43])


def test_proxy_by_hand_raw_and_standardised():
    sigma, ece = np.array([0.5, 0.25]), np.array([0.02, 0.01])
    assert error_bound.proxy(sigma, ece).tolist() == pytest.approx([1.01, 2.005])
    assert error_bound.proxy(sigma, ece, "standardised").tolist() == pytest.approx([0.0, 0.0])


def test_rank_correlation_is_scipys_and_its_interval_names_the_verdict():
    from scipy import stats

    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 40)), rng.standard_normal((2, 40))
    (a,), (b,) = rng.integers(0, 6, (2, 1, 30)).astype(float)  # with ties
    (found,) = error_bound.rank_correlation(a[None], b[None])
    assert found == pytest.approx(stats.spearmanr(a, b).statistic)
    value, low, high = error_bound.association(x, x + noise)
    assert 0 < low < value < high < 1 and error_bound.verdict(low, high) == "holds"
    assert "rev" in error_bound.verdict(*error_bound.association(x, -x - noise)[1:])
    assert "undecided" in error_bound.verdict(*error_bound.association(x, noise)[1:])
    twice = error_bound.association(np.repeat(x[:1], 4, 0), np.repeat(noise[:1], 4, 0))
    once = error_bound.association(x[:1], noise[:1])
    assert twice == pytest.approx(once, abs=0.01)  # copies with the same data are no new evidence


# the Gaussians

WORLD = 0.05, 0.08, 0.05, 0.3  # both signals, shift, scale


def test_moments_of_every_group_are_those_of_the_description():
    x, y = gaussians.draw(np.random.default_rng(0), 2000, *WORLD)
    groups = np.split(x[y == 1], [400, 800], axis=1)
    assert x.shape == (2000, 1000) and gaussians.GROUPS == (400, 400, 200)
    assert [g.mean() for g in groups] == pytest.approx([0.1, 0.024, 0.0], abs=0.005)
    assert [g.std() for g in groups] == pytest.approx([1, 1, 1], abs=0.01)


@pytest.mark.parametrize("scaled", ["signal", "whole"])
def test_divergence_best_accuracy_and_posterior_are_those_of_the_textbook(scaled):
    mean = torch.cat([torch.full((400,), 0.1), torch.full((400,), 0.3 * 0.08), torch.zeros(200)])
    home = torch.cat([torch.full((400,), 0.05), torch.full((400,), 0.08), torch.zeros(200)])
    deviation = torch.ones(1000)
    if scaled == "whole":
        deviation[400:800] = 0.3
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, deviation), normal(home, 1.0)).sum()
    best_id, best_ood, found = gaussians.shift_size(*WORLD, scaled)
    assert found == pytest.approx(kl.item(), rel=1e-4)
    for accuracy, given in ((best_id, WORLD[:2]), (best_ood, (*WORLD, scaled))):
        x, y = map(torch.from_numpy, gaussians.draw(np.random.default_rng(0), 8000, *given))
        posterior = gaussians.posterior(x, *given)
        right = (posterior > 0.5) == y
        assert right.double().mean().item() == pytest.approx(accuracy, abs=0.01)
        c = error_bound.conditional_mean(posterior[None], y)
        assert error_bound.calibration_error(posterior[None], c).item() < 0.002


def test_orthogonality_by_hand_in_both_forms():
    w = rows([2.0, 0.0], [0.0, 1.0], [0.0, 0.0])[None]
    assert gaussians.orthogonality(w).item() == 9  # (4 - 1)^2
    assert gaussians.orthogonality(w, "code").item() == 3


def test_models_trained_together_equal_the_same_models_trained_alone():
    given = config()
    x, y = gaussians.training_sets(given, range(3))
    x, teacher = x.double(), torch.randn(3, 60, 2).double()
    together = gaussians.fit(given, "projection", x, y, range(3), teacher)
    for g in range(3):
        own = slice(g, g + 1)
        alone = gaussians.fit(given, "projection", x[own], y[own], [g], teacher[own])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[g], b[0])
    assert not torch.equal(together[0][0], together[0][1])


def test_ten_steps_of_a_student_are_those_of_a_plain_loop():
    given = config("--train", "50", "--batch", "10", "--lambda-oc", "0.3", "--lambda-sd", "2")
    x, y = gaussians.training_sets(given, [7])
    teacher = 3 * torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0))
    found = gaussians.fit(given, "projection", x, y, [7], teacher)
    p = gaussians.start(given, gaussians.generator(given, "student's start", 7))
    p = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in p]
    optimiser = torch.optim.Adam(p, lr=1e-3)
    rng = gaussians.generator(given, "student's order", 7)
    for _ in range(2):
        for index in np.split(rng.permutation(50), 5):
            hidden = (x[0, index] @ p[0] + p[1]).relu()
            logits = (hidden @ p[2] + p[3]).relu() @ p[4] + p[5]
            excess = p[2].T @ p[2] - torch.eye(3)
            loss = F.cross_entropy(logits, y[0, index]) + 0.3 * (excess**2).sum()
            # cross-entropy to soft labels has the gradient of the KL divergence
            loss = loss + 2 * F.cross_entropy(logits, teacher[0, index].softmax(1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for a, b in zip(found, p, strict=True):
        torch.testing.assert_close(a[0], b.detach(), atol=1e-5, rtol=1e-4)


# the script


def run(*words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = error_bound.main([*TINY.split(), *map(str, words)])
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    out = tmp_path_factory.mktemp("bound")
    return out, *run("--at-once", 3, "--out", out)


def test_a_run_prints_its_tables_and_leaves_both_figures_with_their_numbers(first):
    out, (found, links), printed = first
    for words in ("Table 1, means of 4", "best in each of 2", "both sides", "rank correlation"):
        assert words in printed
    assert list(found) == ["none", "OC", "SD", "OC+SD", "OC on head"]
    assert all(f"\n{i}. " in printed for i in (1, 2, 3)) and len(links) == 10
    assert (out / "figures/fig_3.png").is_file() and (out / "figures/fig_a.png").is_file()
    with open(out / "figures/fig_3.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 20 and len({r["configuration"] for r in kept}) == 5
    assert float(kept[0]["OOD MSE"]) == found["none"]["OOD MSE"][0]
    for m in found.values():  # the bound as such holds for every model
        assert (m["d / sigma_min"] >= 3).all()
        assert (m["right"] > m["OOD eps"]).all() and (m["right"] > m["OOD left (2)"]).all()


def test_a_second_run_and_another_measure_train_nothing(first, monkeypatch):
    out, (found, _), printed = first
    monkeypatch.setattr(gaussians, "fit", None)
    again = run("--at-once", 3, "--out", out)[1]
    assert again.partition("Table 1")[2] == printed.partition("Table 1")[2] != ""
    words = "--matrix data --proxy standardised --desired posterior"
    other = run("--at-once", 3, "--out", out, *words.split())[0][0]
    np.testing.assert_allclose(other["OC"]["ID sigma_min"] ** 2, found["OC"]["ID sigma_min"])
    assert (other["OC"]["OOD eps"] != found["OC"]["OOD eps"]).all()


def test_numbers_that_make_no_study_are_a_sentence(tmp_path):
    for words, match in (
        ("--models 2", "--models 2: expected at least 3"),
        ("--runs 9", "there are 4 models"),
        ("--delta 1", "between 0 and 1"),
        ("--lr 1e10 --epochs 5", "lower --lr"),
    ):
        with pytest.raises(common.InputError, match=match):
            run("--out", tmp_path, *words.split())
