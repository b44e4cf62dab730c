import copy
import math

import compare
import pytest
import torch

import common
import vrf


def test_the_entropy_weight_is_a_share_of_confidence():
    # H_zs = ln 2, H_ft = 0: exp(0) / (exp(-ln 2) + exp(0)) = 1 / 1.5
    even, sure = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert compare.entropy(even).item() == pytest.approx(math.log(2))
    assert compare.entropy(sure).item() == 0
    assert compare.entropy_weight(even, sure).item() == pytest.approx(1 / 1.5)
    assert compare.entropy_weight(sure, even).item() == pytest.approx(0.5 / 1.5)
    assert compare.entropy_weight(even, even).item() == 0.5


def test_weights_fall_into_ten_equal_bins():
    w = torch.tensor([0.0, 0.099, 0.1, 0.95, 1.0])
    assert compare.bin_of(w).tolist() == [0, 0, 1, 9, 9]


def test_a_stirred_model_gets_every_row_and_images_of_a_bin_are_mixed_by_its_centre(tmp_path):
    words = ["--out", str(tmp_path), "--device", "cpu", "--ensemble", "E2E-FT"]
    config, data, clip, zero_shot = vrf.prepare(words)
    data.train = common.hold_out(data.train, 0.1, 0)[1]
    data.shifts = data.shifts[:1]
    model = copy.deepcopy(zero_shot)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std(correction=0) * torch.randn_like(parameter)
    shift = data.shifts[0].name
    w = {s.name: torch.full((len(s.labels),), 0.31) for s in (data.test, data.shifts[0])}
    mixed = compare.mix_weights(config, data, clip, zero_shot, model, w)
    between = copy.deepcopy(zero_shot)
    between.load_state_dict(vrf.wse(zero_shot.state_dict(), model.state_dict(), 0.35))
    expected = compare.er_axes.probabilities(config, data, clip, between)
    assert torch.equal(mixed[shift], expected[shift])
    rows = compare.evaluate(config, data, clip, {"ZS": zero_shot, "E2E-FT": model}, 0)
    forms = "outputs", "calibrated", "weights"
    assert {f"E2E-FT +entropy, {form}" for form in forms} < {row.method for row in rows}
    compare.print_table(rows)
    compare.summary(rows)
