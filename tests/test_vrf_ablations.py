"""studies/vrf_ablations.py: its equations by hand, and every ablation once on the digits."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import vrf

sys.path.insert(0, str(common.HERE / "studies"))
import vrf_ablations as ablations  # noqa: E402


@pytest.mark.parametrize(
    ("zs", "ft", "cov"), [(1.0, 3.0, 0.0), (2.0, 0.5, 0.0), (1.0, 2.0, 0.4), (1.5, 1.0, -0.3)]
)
def test_eq_15_minimises_eq_14_and_is_eq_11_without_covariance(zs, ft, cov):
    g = np.linspace(-1, 2, 30_001)
    least = g[np.argmin(ablations.mixed_variance(g, zs, ft, cov))]
    assert ablations.best_weight(zs, ft, cov) == pytest.approx(least, abs=1e-4)
    assert ablations.best_weight(zs, ft) == pytest.approx(zs / (zs + ft))


def test_eq_14_is_the_variance_of_the_mix():
    rng = np.random.default_rng(0)
    zs, ft = rng.multivariate_normal([0, 0], [[1.0, 0.3], [0.3, 2.0]], 200_000).T
    expected = ablations.mixed_variance(0.3, 1.0, 2.0, 0.3)
    assert np.var(0.7 * zs + 0.3 * ft) == pytest.approx(expected, rel=0.02)


def test_mahalanobis_distance_equals_the_textbook_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    y = torch.arange(300) % 3
    v = torch.randn(5, 4, generator=generator)
    means = torch.stack([x[y == c].mean(0) for c in range(3)]).double()
    centred = x.double() - means[y]
    precision = torch.linalg.inv(centred.T @ centred / 300)
    z = v.double()[:, None] - means[None]
    expected = torch.einsum("ncd,de,nce->nc", z, precision, z).amin(1)
    found = ablations.mahalanobis(x, y)(v)  # differs by its ridge of 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_one_class_for_all_is_the_background_distance():
    x = torch.randn(200, 3)
    far, near = ablations.mahalanobis(x, torch.zeros(200).long())(
        torch.tensor([[9.0] * 3, [0.0] * 3])
    )
    assert far > 50 > 1 > near


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ablations"))
    arguments = ["--epochs", "1", "--out", out, "--methods", "E2E-FT,LC"]
    config, data, *models = vrf.prepare(arguments)
    data.train.images, data.train.labels = data.train.images[:400], data.train.labels[:400]
    for s in (data.val, data.test, *data.shifts):
        s.images, s.labels = s.images[:160], s.labels[:160]
    return ablations.set_up(config, data, *models, ["E2E-FT", "LC"])


def test_selective_prediction_takes_fine_tuned_where_the_score_is_high(monkeypatch, capsys):
    n = 100
    labels = torch.zeros(n).long()
    zs, ft = torch.tensor([[0.0, 1.0]] * n), torch.tensor([[1.0, 0.0]] * n)  # FT right, ZS wrong
    pair = vrf.Pair(zs, ft, (1.0, 1.0), torch.ones(n), labels)
    score = {
        "val": torch.arange(n) / n,
        "ID": torch.arange(n) / n,
        "far": torch.arange(n) / n - 0.5,
    }
    monkeypatch.setattr(ablations, "detectors", lambda s: {"score": score.__getitem__})
    pairs = {"val": pair, "ID": pair, "far": pair}
    given = vrf.Config()
    s = ablations.Setting(given, None, None, None, "FT", {}, None, 1, pairs, [], (1.5, 0.6))
    ablations.selective(s)
    row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("score"))
    assert row.split() == ["score", "95.0", "45.0", "45.0"]


def test_far_features_score_lower_with_every_distance_detector(setting):
    near = setting.study.predictions["val"]["E2E-FT"].features
    real = setting.study.predictions
    try:
        setting.study.predictions = {"near": {"E2E-FT": common.Prediction(near, None, None)}}
        setting.study.predictions["far"] = {"E2E-FT": common.Prediction(-near, None, None)}
        found = ablations.detectors(setting)
        for name in ("Mahalanobis", "kNN"):
            assert found[name]("near").mean() > found[name]("far").mean()
    finally:
        setting.study.predictions = real


def test_msp_and_energy_by_hand(setting):
    logits = setting.pairs["val"].ft
    found = ablations.detectors(setting)
    torch.testing.assert_close(found["MSP"]("val"), F.softmax(logits, 1).max(1).values)
    torch.testing.assert_close(found["Energy"]("val"), logits.exp().sum(1).log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", list(ablations.ABLATIONS))
def test_every_ablation_prints_its_table(name, setting, capsys):
    ablations.ABLATIONS[name](setting)
    assert "\n-----" in capsys.readouterr().out


def test_a_sweeps_ends_are_zero_shot_and_fine_tuned(setting, capsys):
    ablations.sweep(setting)
    lines = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line[:3] in ("OSE", "WSE", "LSE")
    ]
    lines = [[x for x in line if x != "calibrated"] for line in lines]
    assert len(lines) == 55
    ends = {alpha: {tuple(x[2:]) for x in lines if x[1] == alpha} for alpha in ("0.0", "1.0")}
    assert len(ends["0.0"]) == len(ends["1.0"]) == 1 and ends["0.0"] != ends["1.0"]


def test_an_unknown_ablation_gets_the_nearest_name():
    with pytest.raises(common.InputError, match="did you mean 'selective'"):
        ablations.main(["selectiv"])


def test_g_star_is_one_where_only_zero_shot_varies(setting, capsys):
    n, labels = 200, torch.arange(200) % 2
    zs = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    ft = 50.0 * F.one_hot(labels, 2)
    pair = vrf.Pair(zs, ft, (1.0, 1.0), torch.linspace(0, 1, n), labels)
    s = copy.copy(setting)
    s.pairs = {"val": pair, "test": pair}
    ablations.g_star(s)
    rows = [x.split() for x in capsys.readouterr().out.splitlines() if x[:2] == "0."]
    assert rows and all(r[1] == "1.000" for r in rows)


def test_relative_mahalanobis_is_class_distance_against_background(setting):
    x, y = ablations.train_features(setting)
    v = F.normalize(setting.study.predictions["val"]["E2E-FT"].features, dim=1)
    expected = ablations.mahalanobis(x, 0 * y)(v) - ablations.mahalanobis(x, y)(v)
    torch.testing.assert_close(
        ablations.detectors(setting)["Relative Mahalanobis"]("val"), expected
    )
