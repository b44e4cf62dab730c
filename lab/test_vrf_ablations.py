"""lab/vrf_ablations.py: its equations by hand, and every ablation once on the digits."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vrf_ablations as ablations

import common
import vrf


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
    found = ablations.mahalanobis(v, *ablations.gaussians(x, y))  # differs by its ridge of 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_one_class_for_all_is_the_background_distance():
    background = ablations.gaussians(torch.randn(200, 3), torch.zeros(200).long())
    v = torch.tensor([[9.0] * 3, [0.0] * 3])
    far, near = ablations.mahalanobis(v, *background)
    assert far > 50 > 1 > near


def test_linear_and_binary_weights_by_hand():
    d = torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0])
    linear = ablations.linear_weight(d, 2.0, 0.8)
    torch.testing.assert_close(linear, torch.tensor([1.0, 0.8, 0.4, 0.0, 0.0]))
    assert ablations.binary_weight(d, 2.0, 0.8).tolist() == [1, 1, 1, 0, 0]


def test_ratio_of_accuracies_by_hand_and_nan_where_zero_shot_is_never_right():
    zs = F.one_hot(torch.tensor([0, 1, 1, 1]), 2).float()
    ft = F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float()
    x = vrf.Samples(None, zs, ft, torch.zeros(4).long())
    rows = ablations.ratio_by_distance({"a": torch.tensor([0.0, 0.0, 1.0, 1.0])}, {"a": x})
    assert rows[0][1:] == (2.0, 0.5, 1.0, 2)
    assert math.isnan(rows[-1][1]) and rows[-1][2:] == (0.0, 0.5, 2)


def test_windows_cover_the_bulk_of_the_distances():
    d = torch.linspace(0, 10, 1001)
    found = ablations.windows(d)
    assert found[0][0] == pytest.approx(0.1) and found[-1][0] == pytest.approx(9.9)
    assert d[found[3][1]].aminmax() == pytest.approx((0.3, 0.5), abs=0.011)
    narrow = ablations.windows(d / 100)  # eight windows even then
    assert len(narrow) == 9 and narrow[1][0] - narrow[0][0] == pytest.approx(0.098 / 8)
    assert ablations.windows(torch.full((5,), math.inf)) == []  # there is no failure set


# on the digits


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ablations"))
    arguments = ["--epochs", "1", "--out", out, "--methods", "E2E-FT,LC", "--ensemble", "E2E-FT"]
    config, data, *models = vrf.prepare(arguments)
    data.train.images, data.train.labels = data.train.images[:400], data.train.labels[:400]
    for s in (data.val, data.test, *data.shifts):
        s.images, s.labels = s.images[:160], s.labels[:160]
    (only,) = ablations.settings(config, data, *models)
    return only


@pytest.mark.parametrize("name", list(ablations.ABLATIONS))
def test_every_ablation_prints_its_table(name, setting, capsys):
    ablations.ABLATIONS[name](setting)
    assert "\n-----" in capsys.readouterr().out


def table_of(capsys, ablation, setting):
    """{first cells of a row: its other cells} of the table that an ablation prints."""
    ablation(setting)
    lines = capsys.readouterr().out.split("-----\n")[-1].splitlines()
    return [line.split() for line in lines if line and not line.startswith("figure")]


def test_a_sweeps_ends_are_zero_shot_and_fine_tuned(setting, capsys):
    lines = [line for line in table_of(capsys, ablations.sweep, setting) if line[0] != "VRF"]
    lines = [[cell for cell in line if cell != "calibrated"] for line in lines]
    assert len(lines) == 55
    ends = {alpha: {tuple(x[2:]) for x in lines if x[1] == alpha} for alpha in ("0.0", "1.0")}
    assert len(ends["0.0"]) == len(ends["1.0"]) == 1 and ends["0.0"] != ends["1.0"]


def test_controls_print_eleven_rows_and_gains_and_an_oracle_is_never_behind(setting, capsys):
    *lines, _, mean, _, gain = table_of(capsys, ablations.controls, setting)
    assert len(lines) == 11 and {line[0] for line in lines} == {"E2E-FT"}
    assert " ".join(gain).startswith("E2E-FT: VRF less OSE calibrated: ")
    assert " ".join(mean).startswith("E2E-FT: VRF, mean of ties less OSE: ")
    own = ablations.percent(setting, setting.outcome.p_vrf)
    assert lines[1][2:-1] == [f"{x:.1f}" for x in own]
    alpha = vrf.ose_row("", 0, setting.raw).choice
    chosen = ablations.percent(setting, vrf.ose_scores(setting.raw, alpha))
    oracle = [float(cell) for cell in lines[-2][3:]]
    assert all(bound >= x - 0.05 for bound, x in zip(oracle, chosen, strict=True))


def test_the_pairs_that_tie_on_id_val_are_averaged_and_the_least_of_them_named(setting):
    found = {}  # (a, b) -> accuracy on ID val, images right on the tests
    for ab in vrf.ab_grid(setting.config):
        mixed = {}
        for split, x in setting.calibrated.items():
            w = vrf.weight(setting.outcome.d[split], *ab)
            mixed[split] = vrf.vrf(x.p_zs, x.p_ft, w).argmax(1) == x.labels
        found[ab] = mixed.pop("val").double().mean(), mixed
    best = max(on_val for on_val, _ in found.values())
    tied = {ab: right for ab, (on_val, right) in found.items() if on_val == best}
    mean, least = ablations.tied_rows(setting)
    assert len(tied) == setting.outcome.ties and least.choice in tied
    for split, share in mean.right.items():
        parts = [right[split].double() for right in tied.values()]
        torch.testing.assert_close(share, torch.stack(parts).mean(0))
    shift = {ab: [r.double().mean() for s, r in x.items() if s != "test"] for ab, x in tied.items()}
    assert sum(shift[least.choice]) == min(map(sum, shift.values()))


def test_an_oracle_is_tuned_on_the_set_itself(setting):
    """ZS is always right on one set and FT on the other: OSE takes alpha 0 and 1, VRF the ends."""
    zs, ft = torch.tensor([[0.9, 0.1]] * 4), torch.tensor([[0.1, 0.9]] * 4)
    labels = {"val": torch.ones(4), "a": torch.zeros(4), "b": torch.ones(4)}
    v = torch.tensor([[0.6, 0.8]] * 4)
    sets = {split: vrf.Samples(v, zs, ft, y.long()) for split, y in labels.items()}
    V = torch.tensor([[1.0, 0.0]])
    s = dataclasses.replace(setting, V=V, predictions=sets, raw=sets, calibrated=sets)
    for row in ablations.oracles(s):
        assert set(row.right) == {"a", "b"} and all(x.all() for x in row.right.values())


def test_the_ensemble_of_logits_is_by_hand(setting):
    zs, ft = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # over T: (2, 0), (0, 2)
    v, labels = torch.ones(1, 1), torch.tensor([1])
    of = {"ZS": common.Prediction(v, zs, labels), "E2E-FT": common.Prediction(v, ft, labels)}
    raw = dict.fromkeys(("val", "test"), vrf.Samples(v, None, None, labels))
    s = dataclasses.replace(setting, raw=raw, predictions={"val": of, "test": of})
    row = vrf.ose_row("", 0, ablations.logits_of(s, 2.0, 0.5))
    assert row.choice == 0.6  # at 0.5 both classes are level, and the first of them is wrong
    assert row.right["test"].all()


def test_the_source_of_eq_3_gives_vrfs_own_row_and_as_many_failures(setting, capsys):
    lines = table_of(capsys, ablations.source, setting)
    own = ablations.vrf_cells(setting, setting.outcome)
    assert lines[0][3:] == [own[0], *(f"{x:.1f}" for x in own[1:])]
    every, V_zs = ablations.zero_shot_errors(setting)
    assert len(every) > len(V_zs) == len(setting.V)
    assert all((every == v).all(1).any() for v in setting.V)


def test_selective_prediction_takes_fine_tuned_where_the_score_is_high(
    setting, monkeypatch, capsys
):
    n, labels = 100, torch.zeros(100).long()
    zs, ft = torch.tensor([[0.0, 1.0]] * n), torch.tensor([[1.0, 0.0]] * n)  # FT right, ZS wrong
    sets, predictions = {}, {}
    for split in ("val", common.ID, "far"):
        v = torch.full((n, 1), float(split == "far"))
        sets[split] = vrf.Samples(v, zs, ft, labels)
        logits = {"ZS": zs, "E2E-FT": ft}
        predictions[split] = {m: common.Prediction(v, x, labels) for m, x in logits.items()}
    outcome = dataclasses.replace(setting.outcome, p_vrf=dict.fromkeys(sets, ft))
    s = dataclasses.replace(setting, raw=sets, predictions=predictions, outcome=outcome)
    monkeypatch.setattr(
        ablations,
        "detector_scores",
        lambda v, *rest: {"score": torch.arange(n) / n - 0.5 * v[:, 0]},
    )
    row = next(x for x in table_of(capsys, ablations.selective, s) if x[0] == "score")
    assert row == ["score", "95.0", "45.0", "45.0"]


def test_detectors_by_hand_and_far_features_score_lower(setting):
    x, y = ablations.train_features(setting, "E2E-FT")
    x = F.normalize(x, dim=1)
    class_wise, background = ablations.gaussians(x, y), ablations.gaussians(x, 0 * y)
    v, logits = setting.raw["val"].v, setting.predictions["val"]["E2E-FT"].logits
    near = ablations.detector_scores(v, logits, x, class_wise, background)
    far = ablations.detector_scores(-v, logits, x, class_wise, background)
    for name in ("Mahalanobis", "kNN"):
        assert near[name].mean() > far[name].mean()
    torch.testing.assert_close(near["MSP"], F.softmax(logits, 1).max(1).values)
    torch.testing.assert_close(near["Energy"], logits.exp().sum(1).log(), atol=1e-4, rtol=0)
    by_all, by_class = (ablations.mahalanobis(v, *g) for g in (background, class_wise))
    torch.testing.assert_close(near["Relative Mahalanobis"], by_all - by_class)


def test_the_figure_of_distance_has_the_ratio_of_all_sets_and_the_weight(setting):
    ablations.ratio(setting)
    with open(f"{setting.config.out}/figures/distance.csv", newline="") as file:
        table = list(csv.DictReader(file))
    bins = ablations.ratio_by_distance(
        setting.outcome.d, {s: setting.raw[s] for s in setting.tests}
    )
    drawn = {"accuracy ratio, FT / ZS": [b[1] for b in bins]}
    drawn["w(x), weight of FT"] = vrf.weight(
        torch.tensor([b[0] for b in bins]), *setting.outcome.ab
    )
    for series, expected in drawn.items():
        found = [float(row["y"]) for row in table if row["series"] == series]
        assert found == pytest.approx([float(y) for y in expected], nan_ok=True)


def test_g_star_is_one_where_only_zero_shot_varies(setting, capsys):
    n, labels = 200, torch.arange(200) % 2
    zs = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    x = vrf.Samples(None, zs, F.one_hot(labels, 2).float(), labels)
    sets = {"val": x, common.ID: x}
    outcome = dataclasses.replace(setting.outcome, d={s: torch.linspace(0, 1, n) for s in sets})
    s = dataclasses.replace(setting, raw=sets, calibrated=sets, predictions=sets, outcome=outcome)
    rows = table_of(capsys, ablations.g_star, s)
    assert len(rows) > 5 and all(r[1] == "1.000" for r in rows)


def test_an_unknown_ablation_gets_the_nearest_name():
    with pytest.raises(common.InputError, match="did you mean 'selective'"):
        ablations.main(["selectiv"])
