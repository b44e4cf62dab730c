"""SPD from its equations to the table: pure functions, AdamSPD as people use it, spd.py's main.

The compiled kernel of spd_step is compared with spd.spd_step in test_spd_step.py.
"""

import copy
import io
import random
import warnings
from types import SimpleNamespace

import compiled
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import TINY
from torch import nn

import common
import spd

WAYS = {"loop": {"fused": False, "foreach": False}, "foreach": {"foreach": True}}
KERNEL = {"fused": True}
CONDITIONS = ["code", "paper"]


@pytest.fixture(params=[*WAYS, "kernel"])
def way(request):
    """AdamSPD's options for each way of computing."""
    if request.param == "kernel":
        compiled.kernels()  # skips where they cannot be had
    return WAYS.get(request.param, KERNEL)


def network(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))


def noisy(seed, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randint(3, (n,), generator=generator)


def train(model, optimiser, steps=20, first=0):
    """Mini-batches of noise, on which the condition fires now and then.  -> the weights"""
    for i in range(first, first + steps):
        x, y = noisy(i)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return copies(model)


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a, b):
    return sum((x - y).square().sum().item() for x, y in zip(a, b, strict=True)) ** 0.5


# numbers by hand

OUT, BACK = (-1.0, 2.0), (1.0, -0.5)
GOLDEN = {  # theta after these steps: spd.md; "code" by the authors' file, "paper" by Alg. 2
    ("code", 0.0): {5: (0.95116114, -0.72709419), 8: (0.94540527, -0.86563869)},
    ("code", 0.5): {5: (0.91991726, -0.69405439), 8: (0.88126502, -0.79249043)},
    ("code", 1.0): {5: (0.88867338, -0.6610146), 8: (0.81727236, -0.71833561)},
    ("code", 2.0): {5: (0.82618562, -0.594935), 8: (0.69020431, -0.56524423)},
    ("paper", 0.0): {7: (0.966171, -0.831966), 12: (0.757028, -0.913778)},
    ("paper", 1.0): {6: (0.970061, -0.786595), 7: (0.945985, -0.806766), 12: (0.728091, -0.876348)},
}


def trace(gradients, **options):
    """Weights after each gradient, and the report. The kernel takes fp32."""
    dtype = torch.float32 if options.get("fused") else torch.float64
    param = nn.Parameter(torch.tensor([0.5, -0.25], dtype=dtype))
    optimiser, seen = spd.AdamSPD([param], lr=0.1, **options), []
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimiser.step()
        seen.append(param.tolist())
    return seen, optimiser.report()


@pytest.mark.parametrize(("rule", "strength"), GOLDEN)
def test_the_golden_traces_of_both_conditions(rule, strength, way):
    seen, _ = trace([OUT] * 4 + [BACK] * 8, spd_lambda=strength, condition=rule, **way)
    exact = rule == "code" and way != KERNEL  # the source of the other gives fewer digits
    for step, expected in GOLDEN[rule, strength].items():
        assert seen[step - 1] == pytest.approx(expected, rel=0, abs=1e-8 if exact else 1e-6)


def test_the_golden_trace_of_the_zero_anchor(way):
    seen, _ = trace([OUT, OUT, BACK, BACK], anchor="zero", **way)
    assert seen[2] == pytest.approx((0.6788036, -0.48137892))
    assert seen[3] == pytest.approx((0.65494286, -0.51337107))


def test_the_report_of_the_golden_trace_by_hand(way):
    """Of five steps the fifth is projected, from a deviation of .65663174 back to .56568542."""
    _, report = trace([OUT] * 4 + [BACK], spd_lambda=2.0, **way)
    r = 1 - 0.56568542 / 0.65663174
    assert report == pytest.approx({"fired": 1 / 5, "mean_r": r, "decay": 2 * r / 5}, rel=1e-5)


def ratio(before, after, anchor):
    return spd.deviation_ratio(*spd.squared_deviations(before, after, anchor))


def test_condition_and_ratio_by_hand():
    grad, before, anchor = torch.tensor([[1.0, -2], [3, 2], [1, 0]])
    assert spd.condition(grad, before, anchor) == 2  # -(1 * 2 - 2 * 2)
    zero, near, far = torch.zeros(2), torch.tensor([3.0, 0]), torch.tensor([3.0, 4])
    assert ratio(near, far, zero) == 0.4  # (5 - 3) / 5
    assert ratio(far, near, zero) == 0
    assert spd.pull(torch.tensor([3.0, 1]), torch.ones(2), 0.25).tolist() == [2.5, 1]


# properties of the equations


@pytest.mark.parametrize("seed", range(5))
def test_radius_falls_with_strength_and_is_the_old_one_at_one(seed):
    g = torch.Generator().manual_seed(seed)
    anchor, way, noise, slope = torch.randn(4, 7, generator=g, dtype=torch.float64)
    before, after, grad = anchor + way, anchor + 1.3 * way + 0.1 * noise, way + 0.1 * slope
    c, r = spd.condition(grad, before, anchor), ratio(before, after, anchor)
    ends = [spd.project(after, anchor, c, r, strength) for strength in (0, 0.25, 0.5, 1, 2)]
    radii = [(end - anchor).norm().item() for end in ends]
    assert c < 0 < r and torch.equal(ends[0], after)
    assert radii == sorted(radii, reverse=True)
    assert radii[3] == pytest.approx((before - anchor).norm().item(), rel=1e-12)
    assert torch.equal(spd.project(after, anchor, -c, r, 1.0), after)


def test_a_small_ratio_keeps_its_digits_in_fp32_and_in_bf16():
    g = torch.Generator().manual_seed(0)
    for dtype, size in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        anchor = torch.randn(10_000, generator=g).to(dtype)
        before = anchor + 0.1 * torch.randn(10_000, generator=g).to(dtype)
        after = before + (size * (before - anchor)).to(dtype)
        far, near = (x.double().sub(anchor.double()).norm().item() for x in (after, before))
        found = ratio(before, after, anchor).item()
        assert found == pytest.approx((far - near) / far, rel=1e-6)


@pytest.mark.parametrize("smooth", [True, False])
def test_on_a_smooth_loss_spd_is_adam_and_on_noise_it_holds_the_weights(smooth, way):
    """Users take the first for a wrong sign. It is the method: nothing turns back."""
    ends, shares = [], []
    for strength in (0.0, 2.0):
        model, lr = network(), 1e-4 if smooth else 1e-2
        optimiser = spd.AdamSPD(model.parameters(), lr, spd_lambda=strength, **way)
        for i in range(50):
            train(model, optimiser, 1, first=0 if smooth else i)
        ends.append(copies(model))
        shares.append(optimiser.report()["fired"])
    adam, held = ends
    start = copies(network())
    if smooth:
        assert equal(adam, held) and shares == [0, 0]
    else:
        assert distance(held, start) < 0.95 * distance(adam, start) and shares[1] > 0.2


# AdamSPD and its options


@pytest.mark.parametrize(
    ("options", "of_spd"),
    [
        ({}, {"spd_lambda": 0.0}),
        ({"betas": (0.5, 0.9), "eps": 1e-3}, {"spd_lambda": 0.0}),
        ({}, {"spd_lambda": 5.0, "anchor": "none"}),
    ],
    ids=str,
)
def test_without_projection_it_is_torchs_adam_bit_for_bit(options, of_spd):
    options = {"lr": 1e-3} | options
    ours, theirs = network(), network()
    mine = spd.AdamSPD(ours.parameters(), **options, **of_spd)
    adam = torch.optim.Adam(theirs.parameters(), foreach=False, **options)
    assert equal(train(ours, mine, 50), train(theirs, adam, 50))


def test_weight_decay_is_adamws_and_leaves_the_condition_to_the_undecayed_weights(way):
    options, ours, theirs = {"lr": 1e-3, "weight_decay": 0.1}, network(), network()
    mine = spd.AdamSPD(ours.parameters(), spd_lambda=0.0, **options, **way)
    adamw = torch.optim.AdamW(theirs.parameters(), foreach=False, **options)
    for a, b in zip(train(ours, mine, 50), train(theirs, adamw, 50), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    weights = nn.Parameter(torch.ones(2))  # by hand: no deviation, so nothing fires in step 1
    optimiser = spd.AdamSPD([weights], lr=1e-3, weight_decay=0.01, spd_lambda=1.0, **way)
    weights.grad = torch.full((2,), -1.0)
    optimiser.step()
    torch.testing.assert_close(weights.data, torch.full((2,), 1 + 1e-3 - 1e-5))
    assert optimiser.report()["fired"] == 0


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"condition": "paper"}, {"anchor": "zero"}], ids=str
)
def test_every_way_is_the_loop_for_twenty_steps(options, way):
    ends = []
    for ways in (way, WAYS["loop"]):
        model = network()
        ends.append(train(model, spd.AdamSPD(model.parameters(), lr=1e-2, **options, **ways)))
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_taken_by_itself_for_a_million_weights_and_not_for_fewer(monkeypatch):
    asked = []
    monkeypatch.setattr(spd, "compiled", lambda: asked.append(1))
    for width, expected in ((10, 0), (1000, 1)):
        param = nn.Parameter(torch.ones(1000, width))
        param.grad = torch.ones_like(param)
        spd.AdamSPD([param]).step()
        assert len(asked) == expected


def test_l2_sp_at_rate_times_strength_one_stays_at_the_anchor():
    model = network()
    start = copies(model)
    held = spd.AdamL2SP(model.parameters(), lr=0.1, spd_lambda=10.0)
    assert equal(train(model, held, 5), start)


def test_strengths_and_anchors_go_by_name_and_a_wrapped_model_is_shown():
    model = network()
    special = {"3.": {"anchor": "none", "lr": 0.0}, "0.weight": {"spd_lambda": 2.0}}
    optimiser = spd.AdamSPD(spd.param_groups(model, special), lr=1e-2)
    free = [n for n, p in model.named_parameters() if "anchor" not in optimiser.state[p]]
    assert free == ["3.weight", "3.bias"]
    assert sorted(g["spd_lambda"] for g in optimiser.param_groups) == [1.0, 1.0, 2.0]
    head = model[3].weight.detach().clone()
    train(model, optimiser, 3)
    assert torch.equal(model[3].weight, head)
    model[0].requires_grad_(False)
    assert sum(len(group["params"]) for group in spd.param_groups(model)) == 4
    for wrapped in (nn.DataParallel(network()), torch.compile(network())):
        sizes = [len(g["params"]) for g in spd.param_groups(wrapped, special)]
        assert sizes == [1, 3, 2]
        with pytest.raises(ValueError, match=r"begins with '7.'; the names are as '.*0.weight'"):
            spd.param_groups(wrapped, {"7.": {}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anchor": "zeros"}, "anchor must be one of .*, got 'zeros'"),
        ({"condition": "book"}, "condition must be one of .*, got 'book'"),
        ({"lr": -1.0}, "lr must be 0 or more and finite, got -1"),
        ({"spd_lambda": float("inf")}, "spd_lambda must be"),
        ({"betas": (0.9, 1.0)}, "betas must be 0 or more and below 1"),
        ({"anchr": "none"}, "no option 'anchr'; the options are .*anchor"),
        ({"lambda": 2.0}, "no option 'lambda'; the options are .*spd_lambda"),
        ({"pre": [torch.zeros(2)]}, "no option 'pre'"),  # the authors' name of the anchors
        ({"maximize": True}, "no option 'maximize'"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused_and_not_added(options, words):
    optimiser = spd.AdamSPD(network().parameters())
    with pytest.raises(ValueError, match=words):
        optimiser.add_param_group({"params": network(1).parameters(), **options})
    assert len(optimiser.param_groups) == 1
    hosts = {"lr_scale": 0.5, "amsgrad": False}  # timm's; Adam's default
    optimiser.add_param_group({"params": network(1).parameters(), **hosts})


def test_a_transposed_weight_goes_apart_and_does_not_keep_the_others_from_the_kernel():
    class Watched(spd.AdamSPD):
        def update(self, tensors, *rest):
            calls.append([weight.is_contiguous() for weight in tensors[0]])
            super().update(tensors, *rest)

    calls, weights = [], [torch.ones(3, 4), torch.ones(4, 3).T, torch.ones(2)]
    optimiser = Watched([weight.requires_grad_() for weight in weights])
    sum(weight.sum() for weight in weights).backward()
    optimiser.step()
    assert calls == [[True, True], [False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kernel_that_cannot_be_had_is_refused(dtype, monkeypatch):
    """For want of a build, and for a type that it does not take."""
    built = None if dtype == torch.float32 else SimpleNamespace(devices=["cpu"])
    monkeypatch.setattr(spd, "compiled", lambda: built)
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="fused=True needs csrc/, a compiler, contiguous fp32"):
        spd.AdamSPD([param], fused=True).step()


def test_l2_sp_has_new_layers_and_zero_anchors_too():
    head, zero = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups = [{"params": [head], "anchor": "none"}, {"params": [zero], "anchor": "zero"}]
    optimiser = spd.AdamL2SP(groups, lr=0.1, spd_lambda=1.0)
    head.grad, zero.grad = torch.ones(3), torch.ones(3)
    optimiser.step()  # Adam: 1 - 0.1; then a tenth of the way to 0
    torch.testing.assert_close(head.data, torch.full((3,), 0.9))
    torch.testing.assert_close(zero.data, torch.full((3,), 0.81))


def test_an_anchor_that_is_changed_to_the_origin_is_the_origin():
    ends = []
    for late in (False, True):
        param = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        optimiser = spd.AdamSPD([param], lr=0.1, anchor="pretrained" if late else "zero")
        optimiser.param_groups[0]["anchor"] = "zero"
        for sign in (-1.0, -1.0, 1.0):
            param.grad = torch.full((3,), sign)
            optimiser.step()
        ends.append(param.data)
    assert torch.equal(*ends)


def test_nothing_is_projected_and_counted_as_such_with_strength_0(way):
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, spd_lambda=0.0, **way)
    train(model, optimiser, 20)
    assert optimiser.report() == {"fired": 0.0, "mean_r": 0.0, "decay": 0.0}


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        spd.AdamSPD(table.parameters()).step()


def test_strengths_like_weight_decays_warn_and_usual_values_do_not():
    with pytest.warns(UserWarning, match="spd_lambda, is 0.1; .* does next to nothing"):
        spd.AdamSPD(network().parameters(), spd_lambda=0.1)
    with pytest.warns(UserWarning, match="weight_decay is 1.0; it pulls to 0"):
        spd.AdamSPD(network().parameters(), weight_decay=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spd.AdamL2SP(network().parameters(), spd_lambda=0.1)
        model = network()
        train(model, spd.AdamSPD(model.parameters(), weight_decay=0.1), 2)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4, 5)])
def test_every_shape_of_parameter_is_stepped(shape, way):
    param = nn.Parameter(torch.ones(shape))
    optimiser = spd.AdamSPD([param], lr=0.1, **way)
    for sign in (-1.0, -1.0, 1.0, 1.0):
        param.grad = torch.full(shape, sign)
        optimiser.step()
    assert param.isfinite().all() and (param.numel() == 0 or (param > 1).all())


def test_a_nan_gradient_projects_nothing_and_spreads_no_further(way):
    first, second = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
    optimiser = spd.AdamSPD([first, second], **way)
    for value in (1.0, float("nan")):
        first.grad, second.grad = torch.full((9,), value), torch.ones(9)
        optimiser.step()
    assert first.isnan().all() and second.isfinite().all()


# state


def saved_and_loaded(optimiser):
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rule", CONDITIONS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(rule):
    options = {"lr": 1e-2, "condition": rule}
    whole, model, again = network(), network(), network()
    unbroken = spd.AdamSPD(whole.parameters(), **options)
    expected = train(whole, unbroken, 20)
    optimiser = spd.AdamSPD(model.parameters(), **options)
    train(model, optimiser, 10)
    again.load_state_dict(model.state_dict())
    resumed = spd.AdamSPD(again.parameters(), **options)  # made of fine-tuned weights
    resumed.load_state_dict(saved_and_loaded(optimiser))
    assert equal([resumed.state[p]["anchor"] for p in again.parameters()], copies(network()))
    assert equal(train(again, resumed, 10, first=10), expected)
    assert resumed.report() == unbroken.report()


def cleared(optimiser):
    optimiser.state.clear()


def zeroed(optimiser):  # as some helpers do, to begin anew
    for state in optimiser.state.values():
        for value in filter(torch.is_tensor, state.values()):
            value.zero_()


def flattened(optimiser):  # as ZeRO does
    flat = nn.Parameter(torch.ones(5))
    flat.grad = torch.ones(5)
    optimiser.param_groups[0]["params"] = [flat]


@pytest.mark.parametrize("spoil", [cleared, zeroed, flattened])
def test_a_state_that_lost_its_anchors_is_refused_and_copies_go_on(spoil):
    model = network()
    optimiser = spd.AdamSPD(model.parameters())
    train(model, optimiser, 3)
    train(*copy.deepcopy([model, optimiser]), 3)
    loaded = spd.AdamSPD(model.parameters())
    loaded.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(model, loaded, 3)
    spoil(loaded)
    with pytest.raises(ValueError, match="reset or overwritten; the anchors are lost"):
        loaded.step()


def test_another_optimisers_state_is_refused():
    adam = torch.optim.Adam(network().parameters())
    with pytest.raises(ValueError, match="another optimiser's state, which has no anchors"):
        spd.AdamSPD(network().parameters()).load_state_dict(adam.state_dict())


def test_weights_loaded_after_the_optimiser_was_made_warn_once():
    model = network(1)
    optimiser = spd.AdamSPD(model.parameters())
    model.load_state_dict(network().state_dict())
    with pytest.warns(UserWarning, match="no longer those it was made of") as caught:
        train(model, optimiser, 3)
    assert len(caught) == 1


def test_frozen_weights_have_no_anchor_until_they_are_trained():
    model = network()
    model[0].requires_grad_(False)
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 3)
    assert optimiser.state[model[0].weight] == {"frozen": True}
    start = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    again = spd.AdamSPD(model.parameters(), lr=1e-2)
    again.load_state_dict(saved_and_loaded(optimiser))
    train(model, again, 3)
    assert torch.equal(again.state[model[0].weight]["anchor"], start)


def test_state_follows_a_model_to_another_type():
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, condition="paper")
    train(model, optimiser, 3)
    model.double()
    F.cross_entropy(model(noisy(0)[0].double()), noisy(0)[1]).backward()
    optimiser.step()
    assert {s["anchor"].dtype for s in optimiser.state.values()} == {torch.float64}


# the script


def test_mixing_gives_soft_targets_and_drop_path_trains_only():
    config = spd.Config(mixup=0.8, cutmix=1.0)
    torch.manual_seed(0)
    images, targets = spd.mixing(config, 10)(torch.rand(8, 3, 32, 32), torch.arange(8))
    assert targets.shape == (8, 10) and torch.allclose(targets.sum(1), torch.ones(8))
    clip = common.load_clip(spd.Config(model="tiny_clip", pretrained="random"))
    visual, x = clip.model.visual, torch.randn(16, 3, 32, 32)
    before, names = visual.eval()(x), set(visual.state_dict())
    spd.add_drop_path(visual, 0.9)
    assert torch.equal(visual.eval()(x), before) and set(visual.state_dict()) == names
    visual.train()
    assert not torch.equal(visual(x), visual(x))


def test_deits_crops_and_randaugment_depend_on_the_seed_of_the_image_alone():
    clip = common.Clip(None, None, "", False, 32, (0.5,) * 3, (0.5,) * 3)
    image = Image.fromarray(torch.randint(256, (48, 40, 3), dtype=torch.uint8).numpy())
    transform, found = spd.augmentation(clip), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(transform(image))
        random.random()
    assert torch.equal(*found[:2]) and not torch.equal(*found[1:])
    words = " ".join(str(t) for t in transform.transforms)
    assert "RandAugment" in words and "RandomHorizontalFlip" in words and "ColorJitter" not in words


def test_imagenet_has_the_groups_recipe_and_what_the_user_typed_stays():
    config = spd.Config(warmup=7, given=frozenset(["warmup"]))
    common.apply_preset(config, "imagenet", spd.PRESETS)
    assert (config.warmup, config.lr_end, config.augment, config.epochs) == (7, 0.5, "deit", 30)


def test_the_strength_is_chosen_by_id_val_for_each_run_and_of_equals_the_first():
    rows = []
    for seed, strength, val in ((0, 1.0, 0.9), (0, 2.0, 0.9), (1, 1.0, 0.8), (1, 2.0, 0.9)):
        numbers = {"family": "L2-SP", "strength": strength, "val": val}
        rows.append(common.Row(f"L2-SP {strength:g}", seed, {}, numbers=numbers))
    rows.append(common.Row("AdamW", 1, {}, numbers={"family": "AdamW", "strength": None}))
    chosen = [(r.method, r.seed, r.choice) for r in spd.by_val(rows)]
    assert chosen == [("L2-SP, by ID val", 0, 1), ("L2-SP, by ID val", 1, 2)]


def words(tree, out, text):
    return ["--data", str(tree), "--out", str(out), *TINY, "--jobs", "1", *text.split()]


def test_the_script_trains_and_chooses(tree, tmp_path, capsys):
    text = "--methods AdamW,Adam-SPD --spd-lambda 2 --epochs 3 --lr 1e-3 --mixup 0"
    rows = spd.main(words(tree, tmp_path, text))
    printed = capsys.readouterr().out
    methods = ["Zero-shot", "AdamW", "Adam-SPD 2", "Adam-SPD, by ID val"]
    assert [r.method for r in rows] == methods and "2. Adam-SPD, by ID val less AdamW" in printed
    start, adamw, ours, _ = rows
    far = [row.numbers["deviation"] for row in (start, ours, adamw)]
    assert far[0] == 0 and far == sorted(far)
    gained = adamw.right["test"].double().mean() - start.right["test"].double().mean()
    assert gained > 0.1
    fired, r, decay = (ours.numbers[name] for name in ("fired", "mean_r", "decay"))
    assert 0.1 < fired < 1 and decay == pytest.approx(2 * fired * r)
    assert f"{fired:.0%}  {r:.4f}" in printed and "fired" not in adamw.numbers


def test_the_best_epoch_on_id_val_is_kept_and_not_the_last(tree, tmp_path):
    """A rate that ruins the model after its first epoch."""
    text = "--epochs 4 --lr 0.01 --warmup 20 --mixup 0 --cutmix 0"
    config, data, clip, zero_shot = spd.prepare(tuple(words(tree, tmp_path, text)))

    def make(model):
        return spd.optimiser_of(config, "AdamW", None, model)

    best, found = spd.train(config, "AdamW", data, clip, zero_shot, make, {})
    (path,) = tmp_path.glob("checkpoints/*.pt")
    last = copy.deepcopy(zero_shot)
    last.load_state_dict(torch.load(path, weights_only=True)["model"])
    both = common.predict(config, {"best": best, "last": last}, data.val, clip)
    share = {name: p.right.double().mean().item() for name, p in both.items()}
    assert share["best"] >= share["last"] and not equal(best.parameters(), last.parameters())
    assert found == {"val": share["best"]}


def test_another_condition_loss_or_rate_is_another_checkpoint(tree, tmp_path):
    def trainings(change):
        """{method: name of its checkpoint}"""
        text = f"--methods Adam-SPD --spd-lambda 1 --mixup 0 --cutmix 0 {change}"
        config, data, clip, start = spd.prepare(tuple(words(tree, tmp_path, text)))
        found = {}
        for name, recipe in spd.recipes(config).items():
            optimiser = spd.optimiser_of(config, *recipe, start)
            found[name] = spd.training_of(config, name, start, data, clip, optimiser, {}).path
        return found

    (plain,) = trainings("").values()
    changed = [trainings(x) for x in ("--smoothing 0", "--lr-end 0.5", "--augment deit")]
    assert len({plain, *(path for (path,) in map(dict.values, changed))}) == 4
    both = trainings("--condition both")
    assert list(both) == ["Adam-SPD 1", "Adam-SPD (sum) 1"] and both["Adam-SPD 1"] == plain
    optimiser = spd.optimiser_of(spd.Config(), "Adam-SPD (sum)", 1.0, network())
    assert optimiser.defaults["condition"] == "paper"


def test_the_readmes_example_trains():
    text = (common.HERE / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "from spd import AdamSPD" in block]
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    found = {"model": model}
    exec(code, found)
    model["head"](model["body"](torch.ones(3, 4))).sum().backward()
    found["optimiser"].step()
    anchored = [p for p in model.parameters() if "anchor" in found["optimiser"].state[p]]
    assert len(anchored) == 2  # the body's


def test_a_master_copy_keeps_what_bf16_would_round_away():
    weights = {}
    for master in (False, True):
        param = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimiser = spd.AdamSPD([param], lr=1e-4, anchor="none", master=master)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimiser.step()
        weights[master] = param.detach().float()
    assert (weights[False] == 1).all()
    assert torch.allclose(weights[True], torch.tensor(0.99), atol=4e-3)
    again = spd.AdamSPD([param], lr=1e-4, anchor="none", master=True)
    again.load_state_dict(optimiser.state_dict())
    assert again.state[param]["master"].dtype == torch.float32
    assert torch.equal(again.state[param]["master"], optimiser.state[param]["master"])
