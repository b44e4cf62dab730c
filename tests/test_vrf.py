"""vrf.py against worked numbers, its equations' properties, and the paper's printed tables."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import vrf


def random_probabilities(n=50, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator).softmax(1)


# Eq. (1), (5): mixing


def test_ose_is_ft_at_one_and_zs_at_zero_exactly():
    zs, ft = random_probabilities(seed=1), random_probabilities(seed=2)
    assert torch.equal(vrf.ose(zs, ft, 0.0), zs)
    assert torch.equal(vrf.ose(zs, ft, 1.0), ft)


def test_vrf_rows_sum_to_one_and_use_each_samples_own_weight():
    zs, ft = random_probabilities(seed=1), random_probabilities(seed=2)
    w = torch.linspace(0, 1, len(zs))
    mixed = vrf.vrf(zs, ft, w)
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(zs)))
    assert torch.equal(mixed[0], zs[0]) and torch.equal(mixed[-1], ft[-1])


def test_vrf_of_two_samples_by_hand():
    zs, ft = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.2, 0.8], [0.2, 0.8]])
    mixed = vrf.vrf(zs, ft, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mixed, torch.tensor([[0.725, 0.275], [0.375, 0.625]]))


def test_a_far_sample_is_zero_shot_and_a_near_one_fine_tuned():
    zs, ft = torch.tensor([[0.9, 0.1]] * 2), torch.tensor([[0.1, 0.9]] * 2)
    w = vrf.weight(torch.tensor([0.0, 4.0]), a=1.5, b=0.05)
    assert vrf.vrf(zs, ft, w).argmax(1).tolist() == [1, 0]


def test_large_b_is_ose_with_alpha_one_half():
    zs, ft = random_probabilities(seed=1), random_probabilities(seed=2)
    w = vrf.weight(torch.linspace(0, 4, len(zs)), a=1.5, b=1e9)
    torch.testing.assert_close(vrf.vrf(zs, ft, w), vrf.ose(zs, ft, 0.5), atol=1e-6, rtol=0)


# Eq. (2): weight space


def test_wse_keeps_the_ends_and_averages_the_middle():
    zs = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    ft = {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(5)}
    assert torch.equal(vrf.wse(zs, ft, 0.0)["w"], zs["w"])
    assert torch.equal(vrf.wse(zs, ft, 1.0)["w"], ft["w"])
    assert vrf.wse(zs, ft, 0.25)["w"].tolist() == [1.0, 2.0]
    assert vrf.wse(zs, ft, 0.25)["n"] == 5


def test_wse_refuses_models_of_different_shape():
    with pytest.raises(common.InputError, match="one architecture"):
        vrf.wse({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, 0.5)


# Eq. (3): the failure set


def test_only_ft_right_and_zs_wrong_is_a_zero_shot_failure():
    labels = torch.zeros(4, dtype=torch.long)
    zs, ft = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    assert vrf.failures(zs, ft, labels).tolist() == [False, False, True, False]
    assert vrf.failures(zs, ft, labels, "zs-wrong").tolist() == [False, False, True, True]


def test_failures_of_passes_of_different_length_are_refused():
    with pytest.raises(common.InputError, match="3 ZS and 2 FT predictions, 3 labels"):
        vrf.failures(torch.zeros(3), torch.zeros(2), torch.zeros(3))


# k


@pytest.mark.parametrize(
    ("stored", "k"), [(999, 1), (1000, 1), (2999, 2), (3000, 3), (330_000, 330), (5, 1), (0, 1)]
)
def test_papers_k_is_the_floor_of_a_thousandth_and_at_least_one(stored, k):
    assert vrf.neighbours(stored, "paper", 0.001) == k


def test_codes_k_is_rounded_and_relative_to_the_training_set():
    assert vrf.neighbours(330_000, "code", train=1_280_000) == 258


def test_k_never_exceeds_the_stored_samples():
    assert vrf.neighbours(3, "paper", 5.0) == 3


# Eq. (4): distance


def test_kth_distance_of_three_points_by_hand():
    v, V = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    assert [vrf.kth_distance(v, V, k).item() for k in (1, 2, 3)] == [1.0, 2.0, 5.0]
    assert vrf.kth_distance(v, V, 3, squared=True).item() == 25.0


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(1, 1, 1, 1), (7, 129, 3, 129), (33, 1025, 512, 10)]
)
def test_kth_distance_equals_a_brute_force_sort_in_fp64(n, m, d, k):
    generator = torch.Generator().manual_seed(n * m)
    v = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    V = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    expected = (v.double()[:, None] - V.double()[None]).norm(dim=2).sort(1).values[:, k - 1]
    torch.testing.assert_close(vrf.kth_distance(v, V, k).double(), expected, atol=1e-6, rtol=0)


def test_squared_distance_of_unit_vectors_is_two_minus_two_cosines():
    v, V = F.normalize(torch.randn(5, 16), dim=1), F.normalize(torch.randn(9, 16), dim=1)
    expected = (2 - 2 * v @ V.T).min(1).values
    torch.testing.assert_close(vrf.kth_distance(v, V, 1, squared=True), expected, atol=1e-6, rtol=0)


def test_distance_of_a_batch_is_that_of_its_rows():
    v, V = torch.randn(100, 8), torch.randn(50, 8)
    whole = vrf.kth_distance(v, V, 3)
    pieces = torch.cat([vrf.kth_distance(row[None], V, 3) for row in v])
    torch.testing.assert_close(whole, pieces)


def test_near_duplicates_keep_their_distance():
    V = F.normalize(torch.randn(20, 512), dim=1)
    step = F.normalize(torch.randn(20, 512), dim=1) * 1e-3
    d = vrf.kth_distance(V + step, V, 1)
    torch.testing.assert_close(d, (V + step - V).norm(dim=1), atol=1e-7, rtol=0)


def test_an_empty_failure_set_gives_zero_shot_all_the_weight():
    d = vrf.kth_distance(torch.randn(3, 4), torch.empty(0, 4), 1)
    assert torch.equal(vrf.weight(d, 1.5, 0.6), torch.zeros(3))


def test_no_queries_give_no_distances():
    assert vrf.kth_distance(torch.empty(0, 4), torch.randn(5, 4), 1).shape == (0,)


def test_distance_refuses_a_k_beyond_the_set_and_another_width():
    with pytest.raises(common.InputError, match="k = 6 of 5 stored"):
        vrf.kth_distance(torch.randn(3, 4), torch.randn(5, 4), 6)
    with pytest.raises(common.InputError, match="width 4 and 3"):
        vrf.kth_distance(torch.randn(3, 4), torch.randn(5, 3), 1)


# Eq. (6): weight


@pytest.mark.parametrize(
    ("a", "b", "d", "w"),
    [
        (1.5, 0.6, 0.6, 0.818),
        (1.5, 0.6, 0.8, 0.763),
        (1.5, 0.6, 1.0, 0.697),
        (1.5, 0.6, 1.2, 0.622),
        (1.5, 0.6, 1.4, 0.542),
        (1.5, 0.6, 1.5, 0.500),
        (1.5, 0.6, 1.6, 0.458),
        (0.3, 0.3, 0.2, 0.583),
        (0.3, 0.3, 0.4, 0.417),
        (1.1, 0.6, 0.6, 0.697),
        (1.1, 0.6, 1.0, 0.542),
    ],
)
def test_sigmoid_weight_has_the_papers_values(a, b, d, w):
    got = vrf.weight(torch.tensor([d], dtype=torch.double), a, b).item()
    assert got == pytest.approx(w, abs=5e-4)


@pytest.mark.parametrize("form", ["sigmoid", "linear", "binary"])
def test_weights_fall_with_distance_and_stay_in_the_unit_interval(form):
    w = vrf.weight(torch.linspace(0, 4, 200), 1.5, 0.6, form)
    assert (w.diff() <= 0).all() and w.min() >= 0 and w.max() <= 1 and w[0] > w[-1]


def test_linear_weight_by_hand():
    w = vrf.weight(torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0]), 2.0, 0.8, "linear")
    torch.testing.assert_close(w, torch.tensor([1.0, 0.8, 0.4, 0.0, 0.0]))


def test_a_tiny_b_stays_finite():
    w = vrf.weight(torch.tensor([0.0, 1.5, 4.0]), 1.5, 1e-6)
    assert w.tolist() == [1.0, 0.5, 0.0]


# selection


def config(**given):
    return vrf.Config(**given)


def test_of_equal_grid_points_the_first_is_taken():
    pair = vrf.Pair(torch.eye(3), torch.eye(3), (1, 1), torch.zeros(3), torch.arange(3))
    point, top = vrf.best(vrf.ALPHAS, lambda e, alpha: vrf.ose(*e.raw, alpha), pair)
    assert (point, top) == (0.0, 1.0)


def test_ab_choices_of_the_paper_the_code_and_the_user():
    assert vrf.ab_candidates(config(ab="paper"), "imagenet") == [(1.5, 0.5)]
    assert vrf.ab_candidates(config(ab="code"), "imagenet") == [(1.5, 0.6)]
    assert vrf.ab_candidates(config(ab="1.2,0.4"), "digits") == [(1.2, 0.4)]
    assert set(vrf.AB_PAPER.values()) | {vrf.AB_CODE} <= set(vrf.AB_GRID)
    for wrong in ("1.2", "0,1", "a,b", "1,-2"):
        with pytest.raises(common.InputError, match="expected search, paper, code or two"):
            vrf.ab_candidates(config(ab=wrong), "digits")
    with pytest.raises(common.InputError, match="Table 7 lacks ViT-B-16 on digits"):
        vrf.ab_candidates(config(ab="paper"), "digits")


@pytest.mark.parametrize(
    ("squared", "plain"),
    [((1.5, 0.6), (1.225, 0.245)), ((0.3, 0.3), (0.548, 0.274)), ((1.1, 0.6), (1.049, 0.286))],
)
def test_a_and_b_are_converted_to_the_plain_distance(squared, plain):
    (got,) = vrf.ab_candidates(config(ab="{},{}".format(*squared), distance="paper"), "digits")
    assert got == pytest.approx(plain, abs=6e-4)


# figures' numbers


def test_ratio_of_accuracies_by_hand_and_nan_where_zero_shot_is_never_right():
    labels = torch.zeros(4, dtype=torch.long)
    zs, ft = (
        F.one_hot(torch.tensor([0, 1, 1, 1]), 2).float(),
        F.one_hot(torch.tensor([0, 0, 0, 1]), 2).float(),
    )
    pair = vrf.Pair(zs, ft, (1, 1), torch.tensor([0.0, 0.0, 1.0, 1.0]), labels)
    rows = vrf.ratio_by_distance([pair])
    assert rows[0][1:] == (2.0, 0.5, 1.0, 2)
    assert math.isnan(rows[-1][1]) and rows[-1][2:] == (0.0, 0.5, 2)


# the paper's tables


def test_printed_averages_are_the_means_of_their_rows_but_for_the_noted_slips():
    tables = json.loads((common.EMBEDDED / "vrf_paper.json").read_text())["tables"]
    slips = set()
    for block in tables:
        for method, *numbers in block["rows"] if block["kind"] == "imagenet" else []:
            by_split = dict(zip(block["columns"][1:-1], numbers[:-1], strict=True))
            if abs(common.mean_shift(by_split) - numbers[-1]) > 0.0501 + 1e-9:
                slips.add((block["table"], method))
    assert slips == {
        ("Table 1", "LP-FT +VRF"),
        ("Table 2", "E2E-FT +VRF"),
        ("Table 2", "LP-FT +VRF"),
    }
    noted = {(b["table"], n.split(":")[0]) for b in tables for n in b["notes"]}
    assert slips <= noted


# rows of the table


def hand_made_pair():
    """Two samples, two classes, temperatures 2 and 1/2, distances 0 and 9."""
    zs, ft = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    return vrf.Pair(zs, ft, (2.0, 0.5), torch.tensor([0.0, 9.0]), torch.tensor([0, 1]))


def test_every_ensemble_row_mixes_what_its_name_says():
    e, rows = hand_made_pair(), vrf.ensembles(config(), [(1.5, 0.6)])
    zs, ft = F.softmax(e.zs, 1), F.softmax(e.ft, 1)
    zs_cal, ft_cal = F.softmax(e.zs / 2, 1), F.softmax(e.ft * 2, 1)
    w = torch.sigmoid(-(e.d - 1.5) / 0.6)[:, None]
    expected = {
        "+OSE": (0.3, 0.3 * ft + 0.7 * zs),
        "+VRF": ((1.5, 0.6), w * ft_cal + (1 - w) * zs_cal),
        "+OSE calibrated": (0.3, 0.3 * ft_cal + 0.7 * zs_cal),
        "+OSE calibrated, alpha 1/2": (0.5, 0.5 * ft_cal + 0.5 * zs_cal),
        "+LSE calibrated": (0.3, 0.3 * e.ft * 2 + 0.7 * e.zs / 2),
        "+VRF raw": ((1.5, 0.6), w * ft + (1 - w) * zs),
    }
    assert rows.keys() == expected.keys()
    for name, (point, scores) in expected.items():
        torch.testing.assert_close(rows[name][1](e, point), scores)
    assert rows["+OSE"][0] == [i / 10 for i in range(11)] and rows["+VRF"][0] == [(1.5, 0.6)]


def test_temperatures_are_each_models_own_and_distances_of_the_asked_encoder():
    logits = {"ZS": torch.tensor([[2.0, 0.0]]), "FT": torch.tensor([[0.0, 3.0]])}
    features = {"ZS": torch.tensor([[0.0, 5.0]]), "FT": torch.tensor([[7.0, 0.0]])}
    of = {m: common.Prediction(features[m], logits[m], torch.tensor([0])) for m in logits}
    study = vrf.Study({}, {"val": of}, {"ZS": 2.0, "FT": 0.5})
    V = torch.tensor([[1.0, 0.0]])
    pair = vrf.make_pairs(config(), study, "FT", V, 1)["val"]
    torch.testing.assert_close(pair.calibrated[0], F.softmax(logits["ZS"] / 2, 1))
    torch.testing.assert_close(pair.calibrated[1], F.softmax(logits["FT"] / 0.5, 1))
    assert pair.d.item() == 0.0
    zs = vrf.make_pairs(config(features="zs"), study, "FT", V, 1)["val"]
    plain = vrf.make_pairs(config(features="zs", distance="paper"), study, "FT", V, 1)["val"]
    assert zs.d.item() == pytest.approx(2.0) and plain.d.item() == pytest.approx(math.sqrt(2))


def test_the_grid_starts_at_the_zero_shot_side():
    assert vrf.AB_GRID == sorted(vrf.AB_GRID) and vrf.AB_GRID[0] == (0.1, 0.1)
    assert vrf.ALPHAS == sorted(vrf.ALPHAS)


def test_the_linear_weight_keeps_its_values_to_first_order_on_the_plain_distance():
    given = config(ab="2.0,0.8", weight="linear", distance="paper")
    ((a, b),) = vrf.ab_candidates(given, "digits")
    squared, plain = torch.tensor([1.95, 2.0, 2.05]), torch.tensor([1.95, 2.0, 2.05]).sqrt()
    expected = vrf.weight(squared, 2.0, 0.8, "linear")
    torch.testing.assert_close(vrf.weight(plain, a, b, "linear"), expected, atol=1e-3, rtol=0)


def test_defaults_are_the_papers():
    c = config()
    assert (c.model, c.pretrained, c.epochs, c.batch) == ("ViT-B-16", "openai", 10, 512)
    assert (c.lr, c.lr_lpft, c.lr_lc, c.weight_decay) == (3e-5, 1e-5, 0.1, 0.1)
    assert (c.warmup, c.clip, c.p, c.ab) == (500, 1.0, 0.001, "search")
    table_7 = {(1.5, 0.6), (0.3, 0.3), (1.1, 0.6), (1.5, 0.5)}
    assert set(vrf.AB_PAPER.values()) == table_7 and vrf.AB_CODE == (1.5, 0.6)
    assert vrf.AB_PAPER["ViT-B-32", "imagenet"] == (1.5, 0.6)


def test_recipes_start_where_the_paper_says_with_their_own_rates(monkeypatch):
    calls = []

    def train(kind):
        def record(config, name, model, split, clip, lr, seed):
            calls.append((kind, name, model.bias.item(), lr, seed))
            with torch.no_grad():
                model.bias += 1

        return record

    monkeypatch.setattr(common, "linear_probe", train("probe"))
    monkeypatch.setattr(common, "fine_tune", train("fine-tune"))
    start = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(start.bias)
    data = common.Data("digits", [], [], None, None, None, [], [])
    models = vrf.train_models(config(methods="E2E-FT,LP-FT"), data, None, start, 7)
    assert calls == [
        ("probe", "LC, seed 7", 0.0, 0.1, 7),
        ("fine-tune", "E2E-FT, seed 7", 0.0, 3e-5, 7),
        ("fine-tune", "LP-FT, seed 7", 1.0, 1e-5, 7),
    ]
    assert list(models) == ["ZS", "E2E-FT", "LP-FT"] and start.bias.item() == 0


def test_no_distance_is_finite_and_no_window_without_failures():
    assert vrf.windows(torch.full((5,), math.inf)) == []
    narrow, wide = vrf.windows(torch.linspace(0, 0.08, 99)), vrf.windows(torch.linspace(0, 3, 99))
    assert wide[0][2] - wide[0][0] == pytest.approx(0.2) and len(narrow) >= 8


def test_windows_cover_the_bulk_of_the_distances():
    d = np.linspace(0, 10, 1001)
    found = vrf.windows(d)
    assert found[0] == pytest.approx((0.0, 0.1, 0.2)) and found[-1][1] == pytest.approx(9.9)
    narrow = vrf.windows(d / 100)  # eight windows even then
    assert len(narrow) == 9 and narrow[1][1] - narrow[0][1] == pytest.approx(0.098 / 8)


def test_the_scale_of_stored_features_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    zs, ft, labels = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1]), torch.tensor([1, 1, 0])
    x = torch.randn(2, 5, generator=rng)  # of the samples that ZS gets wrong: the first, the last
    scan = {"labels": labels, "zs": zs, "ft": ft, "features/ft": x, "features/zs": -x}
    V, k = vrf.failure_features(config(), scan, "FT")
    torch.testing.assert_close(V, F.normalize(x[:1], dim=1))
    scaled, _ = vrf.failure_features(config(), scan | {"features/ft": 8 * x}, "FT")
    assert k == 1 and torch.equal(V, scaled)
    torch.testing.assert_close(vrf.failure_features(config(features="zs"), scan, "FT")[0], -V)


def test_weight_space_takes_the_alpha_of_id_val_and_mixes_that_way_round(tmp_path):
    torch.manual_seed(0)
    toy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    clip = common.Clip(None, None, "toy", False, 2, (0.5,) * 3, (0.25,) * 3)
    models = {m: common.Classifier(copy.deepcopy(toy), torch.randn(5, 8)) for m in ("ZS", "FT")}
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)
    given, splits = config(out=str(tmp_path), device="cpu"), []
    for name, whose in (("val", "FT"), ("test", "ZS")):  # whose answers are called right
        split = common.Split(name, "memory", images, torch.zeros(200).long())
        split.labels = common.predict(given, models, split, clip)[whose].logits.argmax(1)
        splits.append(dataclasses.replace(split))
    val, test = splits
    data = common.Data("folder", list("abcde"), ["{}"], None, val, test, [], [])
    study = vrf.collect(given, data, clip, models)
    alpha, right = vrf.weight_space(given, data, clip, study, "FT")
    assert alpha > 0.5
    mixed = copy.deepcopy(models["ZS"])
    mixed.load_state_dict(vrf.wse(*(models[m].state_dict() for m in ("ZS", "FT")), alpha))
    assert torch.equal(right["test"], common.predict(given, {"": mixed}, test, clip)[""].right)
    assert 0.2 < right["test"].double().mean() < 1


def test_an_oracle_is_tuned_on_the_set_itself_and_the_row_on_id_val(tmp_path):
    """On val FT is always right, on test ZS: the two must choose opposite ends."""
    torch.manual_seed(1)
    toy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    clip = common.Clip(None, None, "toy", False, 2, (0.5,) * 3, (0.25,) * 3)
    zs, ft = (common.Classifier(copy.deepcopy(toy), 5 * torch.randn(5, 8)) for _ in range(2))
    models, given = {"ZS": zs, "E2E-FT": ft}, config(out=str(tmp_path), device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)

    def split(name, whose):
        found = common.Split(name, "memory", images, torch.zeros(200).long())
        found.labels = common.predict(given, models, found, clip)[whose].logits.argmax(1)
        return dataclasses.replace(found)

    sets = split("train", "E2E-FT"), split("val", "E2E-FT"), split("test", "ZS")
    data = common.Data("folder", list("abcde"), ["{}"], *sets, [], [])
    rows, _ = vrf.evaluate(given, data, clip, models, 0)
    share = {r["method"]: r["right"]["test"].double().mean().item() for r in rows}
    assert share["E2E-FT +OSE oracle"] == 1.0 > share["E2E-FT +OSE"] + 0.2
    assert share["E2E-FT +VRF oracle"] > share["E2E-FT +VRF"]
