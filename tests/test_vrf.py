"""vrf.py against worked numbers, its equations' properties, and the paper's printed tables."""

import copy
import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import vrf


def config(**given):
    return vrf.Config(**{"device": "cpu"} | given)


def test_vrf_of_two_samples_by_hand():
    zs, ft = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.2, 0.8], [0.2, 0.8]])
    mixed = vrf.vrf(zs, ft, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(mixed, torch.tensor([[0.725, 0.275], [0.375, 0.625]]))


def test_wse_averages_floats_and_takes_counters_from_ft():
    zs = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(3)}
    ft = {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(5)}
    mixed = vrf.wse(zs, ft, 0.25)
    assert mixed["w"].tolist() == [1.0, 2.0] and mixed["n"] == 5


def test_only_ft_right_and_zs_wrong_is_a_zero_shot_failure():
    zs, ft = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    V = vrf.failures(7 * torch.eye(4), zs, ft, torch.zeros(4, dtype=torch.long))
    assert V.tolist() == [[0.0, 0.0, 1.0, 0.0]]  # the third sample, of length 1


def test_k_is_the_papers_floor_or_the_codes_share_of_train_and_from_one_to_all():
    by_failures = {999: 1, 1000: 1, 2999: 2, 3000: 3, 330_000: 330, 5: 1, 0: 1}
    assert {n: vrf.neighbour_count(n, 50_000, "paper", 0.001) for n in by_failures} == by_failures
    assert vrf.neighbour_count(330_000, 1_280_000, "code") == 258
    assert vrf.neighbour_count(3, 9, "paper", 5.0) == 3
    assert vrf.neighbour_count(100, 900, "paper", 0.29) == 29 > 0.29 * 100


def test_kth_distance_of_three_points_by_hand():
    v, V = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    assert [vrf.knn_kth_distance(v, V, k).item() for k in (1, 2, 3)] == [1.0, 2.0, 5.0]


def test_kth_distance_equals_a_brute_force_sort_in_fp64():
    """Of near duplicates, too, where |u|^2 - 2 v.u has no digits left."""
    torch.manual_seed(0)
    far, V, step = (F.normalize(torch.randn(n, 512), dim=1) for n in (33, 1025, 20))
    for v, k, tolerance in ((far, 10, 1e-6), (V[:20] + 1e-3 * step, 1, 1e-7)):
        expected = (v.double()[:, None] - V.double()).norm(dim=2).sort(1).values[:, k - 1]
        found = vrf.knn_kth_distance(v, V, k).double()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_an_empty_failure_set_gives_zero_shot_all_the_weight_and_no_query_no_distance():
    d = vrf.knn_kth_distance(torch.randn(3, 4), torch.empty(0, 4), 1)
    assert torch.equal(vrf.weight(d.square(), 1.5, 0.6), torch.zeros(3))
    assert vrf.knn_kth_distance(torch.empty(0, 4), torch.randn(5, 4), 1).shape == (0,)


def test_features_that_are_no_numbers_are_refused_and_not_called_far():
    bad = torch.tensor([[1.0, math.nan]])
    for queries, reference in ((bad, torch.ones(2, 2)), (torch.ones(2, 2), bad)):
        with pytest.raises(common.InputError, match="hold inf or nan"):
            vrf.knn_kth_distance(queries, reference, 1)


@pytest.mark.parametrize(("devices", "expected"), [(("cpu", "cuda"), 7.0), (("cuda",), 0.0)])
def test_the_kernel_is_used_on_the_devices_that_it_has(devices, expected, monkeypatch):
    def kernel(queries, reference, k):
        return queries.new_full((len(queries),), 7.0)

    found = types.SimpleNamespace(knn_devices=devices, knn_kth_distance=kernel)
    monkeypatch.setattr(common, "kernels", lambda work: found)
    d = vrf.fast_knn(torch.device("cpu"), torch.ones(3, 2), torch.ones(4, 2), 1)
    assert d.tolist() == [expected] * 3


def test_the_weight_has_the_papers_values_and_is_finite_with_a_tiny_b():
    papers = {(1.5, 0.6): {0.6: 0.818, 1.5: 0.5, 1.6: 0.458}, (0.3, 0.3): {0.2: 0.583, 0.4: 0.417}}
    for (a, b), of_distance in papers.items():
        d = torch.tensor(list(of_distance))
        assert vrf.weight(d, a, b).tolist() == pytest.approx(list(of_distance.values()), abs=5e-4)
    assert vrf.weight(torch.tensor([0.0, 1.5, 4.0]), 1.5, 1e-6).tolist() == [1.0, 0.5, 0.0]


# Algorithm 1


def tiny_failures():
    """Of five errors of ZS, FT mends two, which lie at (1, 0) and (0, 1)."""
    features = torch.tensor([[8.0, 0.0], [-1.0, 0.0], [0.0, 0.1], [0.0, -1.0], [-1.0, -1.0]])
    ft, labels = torch.tensor([1, 2, 1, 2, 2]), torch.ones(5).long()
    return vrf.failures(features, 0 * labels, ft, labels)


def tiny_samples(labels):
    """ZS says class 0, FT class 1, both with probability 0.8; at distance 0 of V and at sqrt 2."""
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    return vrf.Samples(v, torch.tensor([[0.8, 0.2]] * 2), torch.tensor([[0.2, 0.8]] * 2), labels)


def test_algorithm_1_by_hand():
    val, test = tiny_samples(torch.tensor([1, 0])), tiny_samples(torch.tensor([0, 0]))
    V, grid = tiny_failures(), [(4.0, 0.5), (1.0, 0.5), (1.1, 0.5)]
    assert V.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    found = vrf.algorithm_1(V, 1, val, {"test": test}, grid)
    torch.testing.assert_close(found.d["test"], torch.tensor([0.0, 2.0]))  # squared
    assert found.ab == (1.0, 0.5)  # at a = 4 FT outweighs ZS everywhere; (1.1, 0.5) only equals it
    assert found.ties == 2
    w = torch.sigmoid(torch.tensor([2.0, -2.0]))
    torch.testing.assert_close(found.p_vrf["test"][:, 1], 0.8 * w + 0.2 * (1 - w))


def test_algorithm_1_takes_the_plain_distance_and_another_k_when_asked():
    val = tiny_samples(torch.tensor([1, 0]))
    found = vrf.algorithm_1(tiny_failures(), 2, val, {}, [(1.0, 0.5)], power=1)
    torch.testing.assert_close(found.d["val"], torch.tensor([2.0, 4.0]).sqrt())


def test_no_label_of_a_test_set_has_a_part_in_the_answers():
    val, tests = tiny_samples(torch.tensor([1, 0])), {"test": tiny_samples(torch.tensor([0, 1]))}
    first = vrf.algorithm_1(tiny_failures(), 1, val, tests, vrf.AB_GRID)
    tests["test"].labels = None
    second = vrf.algorithm_1(tiny_failures(), 1, val, tests, vrf.AB_GRID)
    assert first.ab == second.ab and torch.equal(first.p_vrf["test"], second.p_vrf["test"])


def test_ose_takes_the_alpha_of_id_val_and_of_equals_the_first():
    zs, ft = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]])
    val = vrf.Samples(None, zs, ft, torch.tensor([1]))  # right where 0.1 + 0.7 alpha > 1/2
    test = vrf.Samples(None, zs, ft, torch.tensor([0]))
    row = vrf.ose_row("OSE", 0, {"val": val, common.ID: test})
    assert row.choice == 0.6 and not row.right[common.ID].any()


def test_temperatures_are_each_models_own():
    logits = {"ZS": torch.tensor([[2.0, 0.0]]), "FT": torch.tensor([[0.0, 3.0]])}
    of = {m: common.Prediction(torch.tensor([[3.0, 4.0]]), x, None) for m, x in logits.items()}
    found = vrf.samples_of({"val": of}, "FT", 2.0, 0.5)["val"]
    torch.testing.assert_close(found.p_zs, F.softmax(logits["ZS"] / 2, 1))
    torch.testing.assert_close(found.p_ft, F.softmax(logits["FT"] / 0.5, 1))
    torch.testing.assert_close(found.v, torch.tensor([[0.6, 0.8]]))


def test_a_pair_of_the_user_takes_the_place_of_the_grid():
    assert vrf.ab_grid(config()) == vrf.AB_GRID
    assert vrf.ab_grid(config(ab="1.2,0.4")) == [(1.2, 0.4)]
    (plain,) = vrf.ab_grid(config(ab="1.5,0.6", distance="paper"))  # converted
    assert plain == pytest.approx((1.225, 0.245), abs=6e-4)
    for wrong in ("1.2", "0,1", "serch", "1,-2", "1,2,3"):
        with pytest.raises(common.InputError, match="expected search, or two positive numbers"):
            vrf.ab_grid(config(ab=wrong))


def test_the_grids_start_at_the_zero_shot_side_and_hold_the_papers_values():
    assert vrf.AB_GRID == sorted(vrf.AB_GRID) and vrf.AB_GRID[0] == (0.1, 0.1)
    assert vrf.ALPHAS == sorted(vrf.ALPHAS) and len(vrf.ALPHAS) == 11
    assert {(1.5, 0.6), (0.3, 0.3), (1.1, 0.6), (1.5, 0.5)} <= set(vrf.AB_GRID)  # Table 7


def test_defaults_are_the_papers():
    c = config()
    assert (c.model, c.pretrained, c.epochs, c.batch) == ("ViT-B-16", "openai", 10, 512)
    assert (c.lr, c.lr_lpft, c.lr_lc, c.weight_decay) == (3e-5, 1e-5, 0.1, 0.1)
    assert (c.warmup, c.clip, c.p, c.ab) == (500, 1.0, 0.001, "search")


def test_objectnets_border_is_cut_or_kept_as_the_code_keeps_it(tmp_path, monkeypatch):
    open_data = common.open_data

    def with_border(*words):
        data = open_data(*words)
        data.shifts[0].border = 2  # as of ObjectNet
        return data

    monkeypatch.setattr(common, "open_data", with_border)
    hashes, words = set(), ["--out", str(tmp_path), "--device", "cpu", "--objectnet-border"]
    for choice, border in (("cut", 2), ("kept", 0)):
        _, data, _, _ = vrf.prepare([*words, choice])
        assert data.shifts[0].border == border
        hashes.add(common.fingerprint(data.shifts[0]))
    assert len(hashes) == 2  # so no cache of the one answers for the other


def test_recipes_start_where_the_paper_says_with_their_own_rates(monkeypatch):
    calls = []

    def train(config, name, model, split, clip):
        calls.append((name, model.bias.item(), config.lr, config.seed))
        torch.nn.init.ones_(model.bias)

    monkeypatch.setattr(common, "linear_probe", train)
    monkeypatch.setattr(common, "fine_tune", train)
    start = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(start.bias)
    data = common.Data("digits", [], [], None, None, None, [], [])
    models = vrf.train_models(config(methods="E2E-FT,LP-FT"), data, None, start, 7)
    assert calls == [("LC", 0.0, 0.1, 7), ("E2E-FT", 0.0, 3e-5, 7), ("LP-FT", 1.0, 1e-5, 7)]
    assert list(models) == ["ZS", "E2E-FT", "LP-FT"] and start.bias.item() == 0


# two toy models on 200 images


def toy_models():
    """CLIP, and a ZS and an FT Classifier of five classes that agree on little."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    clip = common.Clip(None, None, "toy", False, 2, (0.5,) * 3, (0.25,) * 3)
    models = {m: common.Classifier(copy.deepcopy(encoder), torch.randn(5, 8)) for m in ("ZS", "FT")}
    return clip, {"ZS": models["ZS"], "E2E-FT": models["FT"]}


def toy_split(given, clip, models, name, whose):
    """A Split on which the model `whose` is always right."""
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)
    split = common.Split(name, "memory", images, torch.zeros(200).long())
    labels = common.predict(given, models, split, clip)[whose].logits.argmax(1)
    return dataclasses.replace(split, labels=labels)


def test_failures_are_found_on_the_training_images_of_test_form_and_kept(tmp_path, monkeypatch):
    (clip, models), given = toy_models(), config(out=str(tmp_path))
    train = toy_split(given, clip, models, "train", "E2E-FT")
    zs, ft = common.predict(given, models, train, clip).values()
    expected = vrf.failures(ft.features, zs.logits.argmax(1), train.labels, train.labels)
    data = common.Data("folder", list("abcde"), ["{}"], train, None, None, [], [])
    for _ in range(2):  # the second time without a model
        ((name, V),) = vrf.failure_sets(given, data, clip, models).items()
        assert name == "E2E-FT" and 0 < len(V) < 200 and torch.equal(V, expected)
        monkeypatch.setattr(common, "forward", None)


def test_weight_space_takes_the_alpha_of_id_val_and_mixes_that_way_round(tmp_path):
    (clip, models), given = toy_models(), config(out=str(tmp_path))
    val = toy_split(given, clip, models, "val", "E2E-FT")
    test = toy_split(given, clip, models, common.ID, "ZS")
    data = common.Data("folder", list("abcde"), ["{}"], None, val, test, [], [])
    row = vrf.wse_row(given, data, clip, models, "E2E-FT", 0)
    assert row.choice > 0.5
    mixed, (zs, ft) = copy.deepcopy(models["ZS"]), models.values()
    mixed.load_state_dict(vrf.wse(zs.state_dict(), ft.state_dict(), row.choice))
    expected = common.predict(given, {"": mixed}, test, clip)[""].right
    assert torch.equal(row.right[common.ID], expected) and 0.2 < expected.double().mean() < 1


def test_every_row_mixes_what_its_name_says(tmp_path):
    (clip, models), given = toy_models(), config(out=str(tmp_path), ab="1.5,0.6")
    sets = [toy_split(given, clip, models, s, "E2E-FT") for s in ("train", "val", common.ID)]
    zs, ft = (p.logits.softmax(1) for p in common.predict(given, models, sets[1], clip).values())
    labels = vrf.ose(zs, ft, 0.5).argmax(1)  # so that neither model alone is best
    sets[1:] = [dataclasses.replace(x, labels=labels) for x in sets[1:]]
    data = common.Data("folder", list("abcde"), ["{}"], *sets, [], [])
    rows, studies = vrf.evaluate(given, data, clip, models, 0)
    raw, calibrated, found = studies["E2E-FT"]
    of = {r.method.removeprefix("E2E-FT "): r for r in rows}
    mixes = {
        "Zero-shot": (raw, 0.0),
        "E2E-FT": (raw, 1.0),
        "+OSE": (raw, 0.5),
        "+VRF": (calibrated, vrf.weight(found.d[common.ID], 1.5, 0.6)[:, None]),
    }
    for name, (x, w) in mixes.items():
        mixed = w * x[common.ID].p_ft + (1 - w) * x[common.ID].p_zs
        assert torch.equal(of[name].right[common.ID], mixed.argmax(1) == sets[2].labels), name
    assert set(of) == {*mixes, "+WSE"} and of["+OSE"].choice == 0.5
    assert not torch.equal(raw["val"].p_ft, calibrated["val"].p_ft)


# the paper's tables


def test_printed_averages_are_the_means_of_their_rows_but_for_the_noted_slips():
    tables = json.loads((common.EMBEDDED / "vrf_paper.json").read_text())["tables"]
    slips = set()
    for block in tables:
        for method, _, *shifts, printed in block["rows"] if block["kind"] == "imagenet" else []:
            if abs(sum(shifts) / len(shifts) - printed) > 0.0501 + 1e-9:
                slips.add((block["table"], method))
    second = {("Table 2", "E2E-FT +VRF"), ("Table 2", "LP-FT +VRF")}
    assert slips == second | {("Table 1", "LP-FT +VRF")}
    noted = {(b["table"], n.split(":")[0]) for b in tables for n in b["notes"]}
    assert slips <= noted


def test_options_without_effect_are_named(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--device", "cpu", "--k-rule", "code", "--p", "0.1"]
    vrf.prepare([*words, "--finetuned", "x.pt", "--lr", "1", "--seeds", "2"])
    said = capsys.readouterr().out
    assert "note: --lr has no effect with --finetuned" in said
    assert "note: --seeds has no effect" in said and "note: --p has no effect" in said
    assert "--epochs has no effect" not in said
