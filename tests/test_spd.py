"""AdamSPD as people use it, its baselines, and spd.py from the command line to the table.

The equations by hand, the golden traces and the kernel are in test_spd_step.py.
"""

import copy
import io
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_data import domainnet
from test_end_to_end import TINY as MODEL
from test_end_to_end import make_tree
from torch import nn

import common
import spd

TINY = [*MODEL, "--jobs", "1"]


def network(seed=0, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))


def noisy(seed, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.randint(3, (n,), generator=generator)


def train(model, optimiser, steps=20, first=0):
    """Mini-batches of noise, on which the condition fires now and then."""
    for i in range(first, first + steps):
        x, y = noisy(i)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# the equations, as properties of random draws


def draw(seed):
    """before, after, anchor, grad of one tensor, fp64, with c < 0 and r > 0."""
    g = torch.Generator().manual_seed(seed)
    anchor = torch.randn(7, generator=g, dtype=torch.float64)
    before = anchor + torch.randn(7, generator=g, dtype=torch.float64)
    after = before + 0.3 * (before - anchor) + 0.1 * torch.randn(7, generator=g).double()
    return before, after, anchor, before - anchor + 0.1 * torch.randn(7, generator=g).double()


@pytest.mark.parametrize("seed", range(20))
def test_radius_falls_with_strength_and_is_the_old_one_at_one(seed):
    before, after, anchor, grad = draw(seed)
    c, r = spd.condition(grad, before, anchor), spd.deviation_ratio(before, after, anchor)
    assert c < 0 < r
    radii = [
        (spd.project(after, anchor, c, r, x) - anchor).norm().item() for x in (0, 0.25, 0.5, 1, 2)
    ]
    assert radii == sorted(radii, reverse=True) and radii[0] == (after - anchor).norm()
    assert radii[3] == pytest.approx((before - anchor).norm().item(), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_moving_everything_or_scaling_the_gradient_changes_no_decision(seed):
    before, after, anchor, grad = draw(seed)
    c, r = spd.condition(grad, before, anchor), spd.deviation_ratio(before, after, anchor)
    moved = before + 3, after + 3, anchor + 3
    assert spd.condition(1e-6 * grad, moved[0], moved[2]).item() == pytest.approx(1e-6 * c.item())
    assert spd.deviation_ratio(*moved).item() == pytest.approx(r.item(), rel=1e-9)
    torch.testing.assert_close(
        spd.project(*moved[1:], c, r, 1.0), spd.project(after, anchor, c, r, 1.0) + 3
    )


def test_a_small_ratio_keeps_its_digits_in_fp32():
    g = torch.Generator().manual_seed(0)
    anchor = torch.randn(10_000, generator=g)
    before = anchor + torch.randn(10_000, generator=g)
    after = before + 1e-6 * (before - anchor)
    exact = (after.double() - anchor.double()).norm() - (before.double() - anchor.double()).norm()
    exact = exact / (after.double() - anchor.double()).norm()
    assert spd.deviation_ratio(before, after, anchor).item() == pytest.approx(
        exact.item(), rel=1e-6
    )


def test_the_sign_is_the_papers_descent_back_to_the_anchor_fires():
    anchor, before = torch.zeros(2), torch.tensor([1.0, 0.0])
    back, on = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])  # -g points back, onwards
    assert spd.condition(back, before, anchor) < 0 < spd.condition(on, before, anchor)


def test_a_smooth_full_batch_run_never_fires():
    model, (x, y) = network(), noisy(0, 64)
    optimiser, plain = (
        spd.AdamSPD(model.parameters(), lr=1e-4, spd_lambda=2.0, stats=True),
        network(),
    )
    adam = torch.optim.Adam(plain.parameters(), lr=1e-4)
    for _ in range(60):
        for m, o in ((model, optimiser), (plain, adam)):
            o.zero_grad()
            F.cross_entropy(m(x), y).backward()
            o.step()
        fired = [s["spd"][0] < 0 and s["spd"][1] > 0 for s in optimiser.state.values()]
        assert not any(fired)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_a_projection_never_leads_further_out_than_the_step(amount):
    for seed in range(5):
        before, after, anchor, grad = draw(seed)
        c, r = spd.condition(grad, before, anchor), spd.deviation_ratio(before, after, anchor)
        projected = spd.project(after, anchor, c, r, amount / r)
        assert (projected - anchor).norm() <= (1 + 1e-12) * (after - anchor).norm()


def test_a_flipped_sign_is_another_method_the_model_freezes(monkeypatch):
    """The trap that a port fell into: it undoes nearly every outward step."""

    def moved():
        model, (x, y) = network(), noisy(0, 64)
        start = [p.detach().clone() for p in model.parameters()]
        optimiser = spd.AdamSPD(model.parameters(), lr=1e-3)
        for _ in range(50):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        ends = zip(model.parameters(), start, strict=True)
        return sum((p - s).square().sum().item() for p, s in ends) ** 0.5

    right, condition = moved(), spd.condition
    monkeypatch.setattr(spd, "condition", lambda *args: -condition(*args))
    assert moved() < 0.2 * right


def test_bf16_weights_have_the_ratio_of_their_values_in_fp64():
    g = torch.Generator().manual_seed(0)
    anchor = torch.randn(10_000, generator=g).bfloat16()
    before = (anchor + 0.1 * torch.randn(10_000, generator=g)).bfloat16()
    after = (before + 0.01 * torch.randn(10_000, generator=g)).bfloat16()
    low, high = (x.double() - anchor.double() for x in (before, after))
    exact = (high.norm() - low.norm()) / high.norm()
    ratio = spd.deviation_ratio(before, after, anchor).item()
    assert ratio == pytest.approx(exact.item(), rel=1e-9) and ratio > 1e-4
    naive = ((after - anchor).norm() - (before - anchor).norm()) / (after - anchor).norm()
    assert abs(naive.item() - ratio) > 0.2 * ratio  # what reductions in bf16 would give


def test_noise_fires_it_and_holds_the_weights_nearer():
    radius = {}
    for strength in (0.0, 1.0, 2.0):
        model = network()
        start = [p.detach().clone() for p in model.parameters()]
        end = train(model, spd.AdamSPD(model.parameters(), lr=1e-2, spd_lambda=strength), 40)
        radius[strength] = sum(((a - b) ** 2).sum() for a, b in zip(end, start, strict=True)).item()
    assert radius[2.0] < radius[1.0] < 0.95 * radius[0.0]


# options, each against torch or against a plain loop


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"amsgrad": True},
        {"maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"lr": torch.tensor(1e-3)},
    ],
)
def test_without_projection_every_option_is_torchs_adamw(options):
    options = {"lr": 1e-3, "weight_decay": 0.0} | options
    ours, theirs = network(), network()
    mine = spd.AdamSPD(ours.parameters(), spd_lambda=0.0, **options)
    other = torch.optim.AdamW(theirs.parameters(), foreach=False, **options)
    for a, b in zip(train(ours, mine), train(theirs, other), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def test_maximize_is_the_negated_loss_in_moments_and_condition():
    results = []
    for sign in (1, -1):
        model = network()
        optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, maximize=sign < 0)
        for i in range(20):
            x, y = noisy(i)
            optimiser.zero_grad()
            (sign * F.cross_entropy(model(x), y)).backward()
            optimiser.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert equal(*results)


def test_step_counts_on_the_device_give_the_same_weights():
    models = [network(), network()]
    a, b = (
        train(m, spd.AdamSPD(m.parameters(), lr=1e-2, capturable=c))
        for m, c in zip(models, (False, True), strict=True)
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_decoupled_l2_sp_by_hand_and_its_limit_is_the_anchor():
    after, anchor = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])
    assert spd.pull(after, anchor, 0.25).tolist() == [2.5, 1.0]
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    held = spd.AdamSPD(model.parameters(), lr=0.1, spd_lambda=10.0, rule="l2-sp decoupled")
    assert equal(train(model, held, 5), start)  # lr times strength = 1


def test_coupled_l2_sp_is_adam_on_eq_1():
    ours, theirs, strength = network(), network(), 0.3
    anchors = [p.detach().clone() for p in theirs.parameters()]
    mine = spd.AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=strength, rule="l2-sp coupled")
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i in range(20):
        x, y = noisy(i)
        adam.zero_grad()
        pairs = zip(theirs.parameters(), anchors, strict=True)
        penalty = sum(((p - a) ** 2).sum() for p, a in pairs)
        (F.cross_entropy(theirs(x), y) + strength / 2 * penalty).backward()
        adam.step()
    for a, b in zip(train(ours, mine), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


def test_cautious_decay_moves_only_elements_that_already_go_back():
    anchor, before = torch.zeros(2), torch.tensor([1.0, 1.0])
    after = torch.tensor([0.9, 1.1])  # the first goes back, the second on
    torch.testing.assert_close(spd.cautious(before, after, anchor, 0.5), torch.tensor([0.4, 1.1]))


@pytest.mark.parametrize("rule", spd.RULES)
def test_without_an_anchor_every_rule_is_adam(rule):
    ours, theirs = network(), network()
    mine = spd.AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=5.0, rule=rule, anchor="none")
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, foreach=False)
    for a, b in zip(train(ours, mine), train(theirs, adam), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not any("anchor" in s for s in mine.state.values())


def test_strengths_and_anchors_go_by_name():
    model = network()
    special = {"3.": {"anchor": "none", "lr": 0.0}, "0.weight": {"spd_lambda": 2.0}}
    groups = spd.param_groups(model, special)
    optimiser = spd.AdamSPD(groups, lr=1e-2)
    found = {n: optimiser.anchor_of(p) for n, p in model.named_parameters()}
    assert [n for n, anchor in found.items() if anchor is None] == ["3.weight", "3.bias"]
    assert sorted(g["spd_lambda"] for g in optimiser.param_groups) == [1.0, 1.0, 2.0]
    head = model[3].weight.detach().clone()
    train(model, optimiser, 3)
    assert torch.equal(model[3].weight, head)
    with pytest.raises(ValueError, match="no trainable parameter begins with 'haed'"):
        spd.param_groups(model, {"haed": {}})


def test_frozen_parameters_are_left_out_of_named_groups():
    model = network()
    model[0].requires_grad_(False)
    (group,) = spd.param_groups(model)
    assert len(group["params"]) == 4


def test_groups_of_other_libraries_and_plain_iterables_work():
    model = network()
    decay = {"params": [model[0].weight], "weight_decay": 0.01, "lr_scale": 0.5}  # timm's keys
    rest = {"params": [p for p in model.parameters() if p is not model[0].weight]}
    train(model, spd.AdamSPD([decay, rest | {"weight_decay": 0.0}], lr=1e-3), 3)
    train(network(), spd.AdamSPD(network().parameters()), 1)
    late = spd.AdamSPD([model[0].weight])
    late.add_param_group({"params": [model[0].bias], "anchor": "zero"})
    assert torch.equal(late.anchor_of(model[0].weight), model[0].weight)
    assert late.anchor_of(model[0].bias) is None


def test_a_group_that_is_refused_is_not_added():
    optimiser = spd.AdamSPD(network().parameters())
    for wrong in ({"anchor": "zeros"}, {"lr": -1.0}, {"lr": torch.ones(1)}):
        with pytest.raises(ValueError, match="must be|no dimension"):
            optimiser.add_param_group({"params": network(1).parameters(), **wrong})
    with pytest.raises(ValueError, match="complex"):
        late = nn.Parameter(torch.zeros(2, dtype=torch.cfloat))
        optimiser.add_param_group({"params": [late]})
    assert len(optimiser.param_groups) == 1


def test_amsgrad_may_be_switched_on_later():
    for foreach in (False, True):
        model = network()
        optimiser = spd.AdamSPD(model.parameters(), foreach=foreach)
        train(model, optimiser, 2)
        optimiser.param_groups[0]["amsgrad"] = True
        train(model, optimiser, 2)


def test_rates_as_tensors_are_not_rounded_to_half_precision():
    g = torch.Generator().manual_seed(0)
    grad = torch.rand(100_000, generator=g).bfloat16()
    lr, start = 1.0 + 2**-8.01, torch.zeros(len(grad))  # bf16 has 1 and 1 + 2 ** -7
    after = {}
    for rate, dtype in ((lr, torch.float32), (torch.tensor(lr), torch.bfloat16)):
        moments = torch.zeros_like(start, dtype=dtype), torch.zeros_like(start, dtype=dtype)
        args = grad.to(dtype), *moments, 1, rate, (0.0, 0.0), 1.0
        after[dtype] = spd.adam(start.to(dtype), *args).double().sum()
    assert after[torch.bfloat16].item() == pytest.approx(after[torch.float32].item(), rel=2e-3)


def test_a_strength_like_a_weight_decay_warns_and_a_real_one_does_not():
    with pytest.warns(UserWarning, match="spd_lambda 0.1 is next to none"):
        spd.AdamSPD(network().parameters(), spd_lambda=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spd.AdamSPD(network().parameters(), spd_lambda=0.0)
        spd.AdamSPD(network().parameters(), spd_lambda=0.1, rule="l2-sp decoupled")


def test_what_cannot_be_stepped_is_refused_by_name():
    with pytest.raises(ValueError, match="complex"):
        spd.AdamSPD([nn.Parameter(torch.zeros(2, dtype=torch.cfloat))])
    with pytest.raises(ValueError, match="rule must be one of 'spd'.*got 'sdp'"):
        spd.AdamSPD(network().parameters(), rule="sdp")
    embedding = nn.Embedding(4, 2, sparse=True)
    optimiser = spd.AdamSPD(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimiser.step()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4, 5)])
def test_every_shape_of_parameter_is_stepped(shape):
    param = nn.Parameter(torch.ones(shape))
    optimiser = spd.AdamSPD([param], lr=0.1)
    for sign in (-1.0, -1.0, 1.0, 1.0):
        param.grad = torch.full(shape, sign)
        optimiser.step()
    assert param.isfinite().all() and (param.numel() == 0 or (param > 1).all())


def test_tied_and_transposed_weights_are_one_parameter_each():
    weight = nn.Parameter(torch.randn(4, 6).t())
    model = nn.Module()
    model.a = model.b = weight
    optimiser = spd.AdamSPD(model.parameters())
    assert not weight.is_contiguous() and len(optimiser.param_groups[0]["params"]) == 1
    copied = nn.Parameter(weight.detach().contiguous())
    other = spd.AdamSPD([copied])
    for i in range(5):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
        weight.grad = copied.grad = grad
        optimiser.step()
        other.step()
    torch.testing.assert_close(weight, copied)


def test_a_step_reads_no_number_back_from_the_device():
    """On the meta device, where there is none to read."""
    for options in ({}, {"capturable": True}, {"amsgrad": True, "weight_decay": 0.1}):
        for rule in spd.RULES:
            model = network().to("meta")
            optimiser = spd.AdamSPD(model.parameters(), rule=rule, stats=True, **options)
            for _ in range(2):
                for p in model.parameters():
                    p.grad = torch.ones_like(p)
                optimiser.step()


def test_rates_and_betas_are_each_groups_own():
    one, two = network(), network(1)
    own = {"lr": 1e-2, "betas": (0.5, 0.9), "spd_lambda": 2.0}
    alone = network(1)
    both = spd.AdamSPD([{"params": one.parameters()}, {"params": two.parameters(), **own}])
    single = spd.AdamSPD(alone.parameters(), **own)
    for i in range(10):
        x, y = noisy(i)
        for model in (one, two, alone):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        both.step()
        single.step()
    assert equal(two.parameters(), alone.parameters())


def test_a_channels_last_weight_is_stepped_like_a_contiguous_one():
    weights = [nn.Parameter(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)))]
    weights.append(nn.Parameter(weights[0].detach().to(memory_format=torch.channels_last)))
    optimisers = [spd.AdamSPD([w], lr=0.1) for w in weights]
    for i in range(6):
        grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        for w, o in zip(weights, optimisers, strict=True):
            w.grad = grad
            o.step()
    torch.testing.assert_close(*weights)
    assert weights[1].is_contiguous(memory_format=torch.channels_last)


def test_the_closures_loss_comes_back():
    model = network()
    optimiser = spd.AdamSPD(model.parameters())

    def closure():
        optimiser.zero_grad()
        loss = model(torch.ones(2, 8)).sum()
        loss.backward()
        return loss

    assert isinstance(optimiser.step(closure).item(), float)


def test_an_overflow_under_a_scaler_changes_neither_moments_nor_weights():
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(loss_scale):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(noisy(0)[0]), noisy(0)[1]) * loss_scale
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()

    step(1.0)
    kept = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimiser.state.values()]
    step(float("inf"))
    assert equal(model.parameters(), kept)
    assert equal([s["exp_avg"] for s in optimiser.state.values()], moments)
    step(1.0)
    assert not equal(model.parameters(), kept)


def test_gradients_of_two_halves_are_one_decision():
    whole, halves = network(), network()
    a, b = (spd.AdamSPD(m.parameters(), lr=1e-2) for m in (whole, halves))
    for i in range(10):
        x, y = noisy(i)
        a.zero_grad()
        b.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        for half in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(halves(x[half]), y[half]) / 2).backward()
        a.step()
        b.step()
    assert {s["step"] for s in b.state.values()} == {10}
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


# lists of tensors, half precision


@pytest.mark.parametrize(
    "options",
    [
        {"amsgrad": True},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"anchor": "none"},
        {"stats": True},
    ],
    ids=str,
)
def test_foreach_is_the_loop_under_every_option(options):
    models = [network(), network()]
    made = [
        spd.AdamSPD(m.parameters(), lr=1e-2, fused=False, foreach=f, **options)
        for m, f in zip(models, (True, False), strict=True)
    ]
    for x, y in zip(*(train(m, o) for m, o in zip(models, made, strict=True)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    for s, t in zip(*(o.state.values() for o in made), strict=True):
        assert s.keys() == t.keys() and ("spd" in s) == ("stats" in options)
        if "spd" in s:
            torch.testing.assert_close(s["spd"], t["spd"], rtol=1e-2, atol=1e-4)


def test_foreach_that_cannot_be_had_is_refused_and_left_to_torchs_rule_is_for_gpus():
    model, other = network(), network()
    with pytest.raises(ValueError, match="fused and foreach exclude each other"):
        spd.AdamSPD(model.parameters(), fused=True, foreach=True)
    with pytest.raises(ValueError, match="foreach=True needs rule 'spd'"):
        train(model, spd.AdamSPD(model.parameters(), foreach=True, rule="cautious"), 1)
    plain = train(network(), spd.AdamSPD(other.parameters()), 0)
    assert equal(plain, other.parameters())
    loop, left = network(), network()
    ends = [
        train(m, spd.AdamSPD(m.parameters(), lr=1e-2, fused=False, foreach=f), 5)
        for m, f in ((loop, False), (left, None))
    ]
    assert equal(*ends)


def half_run(dtype, steps=200, size=2_000, resume_at=None, **options):
    """Weights, and the optimiser, after small steps of given gradients, some of them back."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=g).bfloat16().to(dtype)
    param = nn.Parameter(start.clone())
    optimiser = spd.AdamSPD([param], lr=1e-4, **options)
    for i in range(steps):
        if i == resume_at:
            saved, weights = saved_and_loaded(optimiser)[0], param.detach().clone()
            param = nn.Parameter(start.clone())
            optimiser = spd.AdamSPD([param], lr=1e-4, **options)
            optimiser.load_state_dict(saved)
            param.data.copy_(weights)
        slope = torch.linspace(-1, 1, size) + 0.1 * torch.randn(size, generator=g)
        param.grad = (slope * (-1 if i % 5 == 4 else 1)).bfloat16().to(dtype)
        optimiser.step()
    return param.detach(), optimiser


@pytest.mark.parametrize("way", [{"fused": False}, {"fused": True}, {"foreach": True}], ids=str)
def test_bf16_weights_with_a_master_follow_the_run_in_fp32(way):
    if way.get("fused") and spd.compiled() is None:
        pytest.skip("no compiled kernels here")
    expected, _ = half_run(torch.float32, fused=False)
    half, optimiser = half_run(torch.bfloat16, master=True, **way)
    (state,) = optimiser.state.values()
    assert {state[n].dtype for n in ("master", "exp_avg", "exp_avg_sq")} == {torch.float32}
    torch.testing.assert_close(state["master"], expected, rtol=1e-5, atol=1e-6)
    assert half.dtype == torch.bfloat16 and torch.equal(half, state["master"].bfloat16())
    without, _ = half_run(torch.bfloat16, fused=False)  # steps smaller than bf16's grid are lost
    error = [(x.float() - expected).abs().mean() for x in (half, without)]
    assert error[0] < 0.3 * error[1]


def test_fp32_weights_have_no_master():
    _, optimiser = half_run(torch.float32, 2, master=True)
    assert "master" not in optimiser.state[optimiser.param_groups[0]["params"][0]]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"master": True}),
        (torch.bfloat16, {"master": True, "amsgrad": True, "save_anchors": False}),
        (torch.float32, {"anchor_dtype": torch.bfloat16}),
        (torch.bfloat16, {"anchor_dtype": torch.float32}),
    ],
    ids=str,
)
def test_masters_and_anchors_of_another_type_resume_bitwise(dtype, options):
    """torch's loader gives every tensor of the state the weights' own type."""
    whole, straight = half_run(dtype, **options)
    parts, resumed = half_run(dtype, resume_at=17, **options)
    assert torch.equal(whole, parts)
    (a,), (b,) = straight.state.values(), resumed.state.values()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if k != "step")
    assert {k: v.dtype for k, v in a.items() if k != "step"} == {
        k: v.dtype for k, v in b.items() if k != "step"
    }


def test_a_state_dict_goes_between_runs_with_and_without_a_master():
    for first, second in ((True, False), (False, True)):
        _, optimiser = half_run(torch.bfloat16, 3, master=first)
        param = nn.Parameter(torch.randn(2_000).bfloat16())
        other = spd.AdamSPD([param], lr=1e-4, master=second)
        other.load_state_dict(saved_and_loaded(optimiser)[0])
        param.grad = torch.ones_like(param)
        other.step()
        assert ("master" in other.state[param]) == second


def test_anchors_may_take_half_the_memory_and_are_the_rounded_weights():
    size, saved = 4_000, {}
    for dtype in (None, torch.bfloat16):
        param = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))
        optimiser = spd.AdamSPD([param], lr=1e-2, anchor_dtype=dtype, foreach=True)
        param.grad = torch.ones(size)
        optimiser.step()
        saved[dtype] = saved_and_loaded(optimiser)[1] / size
        expected = torch.randn(size, generator=torch.Generator().manual_seed(0))
        anchor = optimiser.state[param]["anchor"]
        assert torch.equal(anchor, expected.to(dtype or torch.float32))
    assert saved[None] - saved[torch.bfloat16] == pytest.approx(2, abs=0.1)
    with pytest.raises(ValueError, match="anchor_dtype must be a floating type, got torch.int8"):
        spd.AdamSPD([param], anchor_dtype=torch.int8)


# state


def saved_and_loaded(optimiser):
    file = io.BytesIO()
    torch.save(optimiser.state_dict(), file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"save_anchors": False}])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(options):
    whole = network()
    expected = train(whole, spd.AdamSPD(whole.parameters(), lr=1e-2, **options), 20)
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, **options)
    train(model, optimiser, 10)
    saved, _ = saved_and_loaded(optimiser)
    weights = copy.deepcopy(model.state_dict())
    again = network()  # the pre-trained weights
    resumed = spd.AdamSPD(again.parameters(), lr=1e-2, **options)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert equal(train(again, resumed, 10, first=10), expected)


def test_loading_never_anchors_at_fine_tuned_weights():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 5)
    late = spd.AdamSPD(model.parameters(), lr=1e-2)  # made too late, of fine-tuned weights
    late.load_state_dict(saved_and_loaded(optimiser)[0])
    assert equal([late.state[p]["anchor"] for p in model.parameters()], start)
    other = network()
    lean = spd.AdamSPD(other.parameters(), save_anchors=False)
    train(other, lean, 1)
    with pytest.raises(ValueError, match="of other anchors .*; make the optimiser of the pre-trai"):
        spd.AdamSPD(model.parameters()).load_state_dict(saved_and_loaded(lean)[0])


def test_left_out_anchors_save_four_bytes_a_parameter_and_the_zero_anchor_stores_none():
    sizes = {}
    kinds = {"with": {}, "without": {"save_anchors": False}, "zero": {"anchor": "zero"}}
    for name, options in kinds.items():
        model = network(width=2000)
        optimiser = spd.AdamSPD(model.parameters(), **options)
        train(model, optimiser, 1)
        sizes[name] = saved_and_loaded(optimiser)[1] / sum(p.numel() for p in model.parameters())
    assert sizes["with"] - sizes["without"] == pytest.approx(4, abs=0.1)
    assert sizes["without"] == pytest.approx(8, abs=0.3) == sizes["zero"]


def test_loaded_anchors_take_the_dtype_of_their_weights():
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 5)
    double = network().double()
    other = spd.AdamSPD(double.parameters(), lr=1e-2)
    double.load_state_dict(model.state_dict())
    other.load_state_dict(saved_and_loaded(optimiser)[0])
    assert {other.state[p]["anchor"].dtype for p in double.parameters()} == {torch.float64}
    x, y = noisy(0)
    F.cross_entropy(double(x.double()), y).backward()
    other.step()


def test_an_anchor_is_a_copy_without_gradient():
    model = network()
    optimiser = spd.AdamSPD(model.parameters())
    anchor = optimiser.anchor_of(model[0].weight)
    with torch.no_grad():
        model[0].weight.add_(1)
    assert not anchor.requires_grad and (model[0].weight - anchor).abs().min() > 0.9


def test_a_copied_or_pickled_optimiser_goes_on():
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 3)
    model2, optimiser2 = copy.deepcopy((model, optimiser))
    assert equal(train(model, optimiser, 3, 3), train(model2, optimiser2, 3, 3))


def test_a_state_dict_without_anchors_is_refused_and_leaves_the_optimiser_as_it_was():
    ours, theirs = network(), network()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    train(theirs, adam, 3)
    optimiser = spd.AdamSPD(ours.parameters(), lr=1e-2)
    train(ours, optimiser, 3)
    expected = copy.deepcopy((ours, optimiser))
    with pytest.raises(ValueError, match="the state dict has no anchors, as of torch's Adam"):
        optimiser.load_state_dict(adam.state_dict())
    other = network(1)
    lean = spd.AdamSPD(other.parameters(), save_anchors=False)
    train(other, lean, 1)
    with pytest.raises(ValueError, match="is of other anchors"):
        optimiser.load_state_dict(lean.state_dict())
    assert equal(train(ours, optimiser, 3, 3), train(*expected, 3, 3))
    free = spd.AdamSPD(theirs.parameters(), anchor="zero", lr=1e-2)
    free.load_state_dict(adam.state_dict())  # nothing to lack
    assert {s["step"] for s in free.state.values()} == {3}
    assert free.param_groups[0]["anchor"] == "zero" and free.param_groups[0]["spd_lambda"] == 1


def test_an_early_state_dict_does_not_make_a_late_optimiser_anchor_anew():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    early = copy.deepcopy(optimiser.state_dict())
    train(model, optimiser, 5)
    optimiser.load_state_dict(early)
    train(model, optimiser, 1)
    assert equal([optimiser.anchor_of(p) for p in model.parameters()], start)
    with pytest.raises(ValueError, match="that was stepped without one"):
        late = spd.AdamSPD(model.parameters(), anchor="none")
        train(model, late, 1)
        late.param_groups[0]["anchor"] = "pretrained"
        train(model, late, 1)


def test_frozen_weights_have_no_anchor_until_they_are_trained():
    model = network()
    model[0].requires_grad_(False)
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 3)
    assert optimiser.anchor_of(model[0].weight) is None
    start = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    train(model, optimiser, 3)
    assert torch.equal(optimiser.anchor_of(model[0].weight), start)


def test_step_counts_take_the_loading_optimisers_form():
    for first, second in ((True, False), (False, True)):
        model = network()
        optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, capturable=first)
        train(model, optimiser, 3)
        other = spd.AdamSPD(model.parameters(), lr=1e-2, capturable=second)
        other.load_state_dict(saved_and_loaded(optimiser)[0])
        train(model, other, 1)
        assert {torch.is_tensor(s["step"]) for s in other.state.values()} == {second}
        assert {int(s["step"]) for s in other.state.values()} == {4}


def test_statistics_survive_a_state_dict_in_fp64():
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2, stats=True)
    train(model, optimiser, 3)
    other = spd.AdamSPD(network().parameters(), lr=1e-2, stats=True)
    other.load_state_dict(saved_and_loaded(optimiser)[0])
    for a, b in zip(optimiser.state.values(), other.state.values(), strict=True):
        assert b["spd"].dtype == torch.float64 and torch.equal(a["spd"], b["spd"])


def test_the_state_dict_of_torchs_distributed_checkpoints_goes_on(tmp_path):
    """It steps a new optimiser once, with gradients of 0, to learn what its state looks like."""
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    whole = network()
    expected = train(whole, spd.AdamSPD(whole.parameters(), lr=1e-2), 10)
    model = network()
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    train(model, optimiser, 5)
    saved = copy.deepcopy(dcp.get_state_dict(model, optimiser))
    again = network()
    other = spd.AdamSPD(again.parameters(), lr=1e-2)
    dcp.get_state_dict(again, other)  # as its loader does before it reads
    weights, state = saved
    dcp.set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    assert {s["step"] for s in other.state.values()} == {5}
    assert equal(train(again, other, 5, first=5), expected)


# lifted out


def test_the_file_alone_in_an_empty_folder_trains(tmp_path):
    (tmp_path / "spd.py").write_text((common.HERE / "spd.py").read_text())
    (tmp_path / "common.py").write_text("mine = 1\n")  # somebody else's
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('numpy')\n")
    code = (
        "import torch; from spd import AdamSPD\n"
        "model = torch.nn.Linear(3, 2)\n"
        "optimiser = AdamSPD(model.parameters(), lr=1e-2, spd_lambda=1.0)\n"
        "for _ in range(5):\n"
        "    optimiser.zero_grad(); model(torch.randn(4, 3)).square().mean().backward()\n"
        "    optimiser.step()\n"
        "print('trained')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "trained\n", done.stderr


# two processes


def worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = nn.parallel.DistributedDataParallel(network())
    optimiser = spd.AdamSPD(model.parameters(), lr=1e-2)
    for i in range(200):
        x, y = noisy(2 * i + rank)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_same_decisions_for_two_hundred_steps(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(a, b) and not equal(a, network().parameters())


# the script


def test_mixing_gives_soft_targets_and_drop_path_trains_only():
    config = spd.Config(mixup=0.8, cutmix=1.0)
    torch.manual_seed(0)
    images, targets = spd.mixing(config, 10)(torch.rand(8, 3, 32, 32), torch.arange(8))
    assert targets.shape == (8, 10) and torch.allclose(targets.sum(1), torch.ones(8))
    clip = common.load_clip(spd.Config(model="tiny_clip", pretrained="random"))
    visual, x = clip.model.visual, torch.randn(16, 3, 32, 32)
    before = visual.eval()(x)
    names = set(visual.state_dict())
    spd.add_drop_path(visual, 0.9)
    assert torch.equal(visual(x), before) and set(visual.state_dict()) == names
    visual.train()
    assert not torch.equal(visual(x), visual(x))


def test_id_is_a_domain_of_domainnet_and_fraction_thins_every_class(tmp_path, capsys):
    root = domainnet(tmp_path / "domainnet", n=13)
    words = ["--data", root, "--id", "sketch", "--out", tmp_path / "out", *TINY]
    words += "--methods Adam-SPD --spd-lambda 1 --epochs 1 --val-fraction 0.2".split()
    rows = spd.main([str(w) for w in (*words, "--fraction", "0.5")])
    assert list(rows[0]["right"]) == ["test", "Clipart", "Real"]
    assert "sketch (50%)" in capsys.readouterr().out
    config = spd.Config(data=str(root), id="real", fraction=0.5, val_fraction=0.2)
    thin = spd.open_data(config).train
    full = spd.open_data(replace(config, fraction=1.0)).train
    assert (thin.labels.bincount().tolist(), full.labels.bincount().tolist()) == ([4] * 3, [8] * 3)
    assert set(thin.images) < set(full.images) and thin.name == "train"
    with pytest.raises(common.InputError, match="--fraction 0.0: expected a share of 1"):
        spd.open_data(replace(config, fraction=0.0))


def row(method, family, seed, val, strength):
    return {"method": method, "family": family, "seed": seed, "val": val, "strength": strength}


def test_the_strength_is_chosen_by_id_val_for_each_run_and_of_equals_the_first():
    rows = [row("S 1", "S", 0, 0.9, 1.0), row("S 2", "S", 0, 0.9, 2.0)]
    rows += [
        row("S 1", "S", 1, 0.8, 1.0),
        row("S 2", "S", 1, 0.9, 2.0),
        row("A", "A", 1, 1.0, None),
    ]
    assert [(r["seed"], r["choice"]) for r in spd.by_val(rows, "S", "S, by ID val")] == [
        (0, 1),
        (1, 2),
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--spd-lambda 0.5,x", "--spd-lambda 0.5,x: expected positive numbers"),
        ("--l2sp -1", "--l2sp -1: expected positive"),
        ("--methods AdamSPD", "did you mean 'Adam-SPD'"),
    ],
)
def test_bad_input_is_a_sentence(words, sentence):
    with pytest.raises(common.InputError, match=sentence):
        spd.main(words.split())


def test_the_script_keeps_the_best_epoch_resumes_and_repeats(tmp_path, capsys):
    words = ["--data", make_tree(tmp_path / "tree"), "--out", tmp_path / "out", *TINY]
    words += "--methods AdamW,Adam-SPD --spd-lambda 2 --epochs 3 --lr 1e-3 --mixup 0".split()
    rows = spd.main([str(w) for w in (*words, "--jobs", 2)])
    text = capsys.readouterr().out
    methods = ["Zero-shot", "AdamW", "Adam-SPD 2", "Adam-SPD, by ID val"]
    assert [r["method"] for r in rows] == methods and "2. Adam-SPD, its strength" in text
    zs, adamw, ours, _ = rows
    assert spd.total(zs) == 0 < spd.total(ours) < spd.total(adamw)
    assert adamw["right"]["test"].double().mean() > zs["right"]["test"].double().mean() + 0.1
    again = spd.main([str(w) for w in words])
    assert "trained before" in capsys.readouterr().out
    for a, b in zip(rows, again, strict=True):
        assert a["layers"] == b["layers"] and a["right"].keys() == b["right"].keys()
        assert all(torch.equal(a["right"][s], b["right"][s]) for s in a["right"])


def test_the_best_epoch_on_id_val_is_kept_and_not_the_last(tmp_path):
    """A rate that ruins the model after its first epoch."""
    config, data = common.begin(
        spd.Config,
        [*map(str, ["--data", make_tree(tmp_path / "tree"), "--out", tmp_path / "out"]), *TINY,
         *"--epochs 4 --lr 0.01 --warmup 20 --mixup 0 --cutmix 0".split()], None, {},
    )  # fmt: skip
    clip, zero_shot = common.zero_shot(config, data)
    (make,) = (r[2] for r in spd.recipes(config).values() if r[0] == "AdamW")
    best = spd.train(config, "AdamW", data, clip, zero_shot, make, 0)
    (path,) = (tmp_path / "out").glob("checkpoints/*.pt")
    last = copy.deepcopy(zero_shot)
    last.load_state_dict(torch.load(path, weights_only=True)["model"])
    models = {"best": best, "last": last}
    found = common.predict(config, models, data.val, clip)
    share = {m: p.right.double().mean().item() for m, p in found.items()}
    assert share["best"] >= share["last"] and not equal(best.parameters(), last.parameters())


def test_another_head_or_loss_is_another_checkpoint(tmp_path):
    words = ["--data", make_tree(tmp_path / "tree"), "--out", tmp_path / "out", *TINY]
    words += "--methods Adam-SPD --spd-lambda 1 --epochs 1 --mixup 0 --cutmix 0".split()
    for i, extra in enumerate(([], ["--head", "none"], ["--smoothing", "0"]), 1):
        spd.main([str(w) for w in (*words, *extra)])
        assert len(list((tmp_path / "out").glob("checkpoints/adam-spd-1-*.pt"))) == i


def test_the_readmes_example_trains():
    text = (common.HERE / "README.md").read_text()
    code = text[text.index("```python") + 9 :].split("```")[0]
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    found = {"model": model}
    exec(code, found)
    model["head"](model["body"](torch.ones(3, 4))).sum().backward()
    found["optimiser"].step()
    kept = [p for p in model.parameters() if found["optimiser"].anchor_of(p) is not None]
    assert len(kept) == 2  # the body's
