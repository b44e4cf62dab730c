"""AdamSPD where others make the groups, the loop and the schedule: timm, Hugging Face; and SPD
around their optimisers.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_spd import equal, network, noisy, train
from torch import nn

import common
from spd import AdamSPD

sys.path.insert(0, str(common.HERE / "examples"))
from hold import hold  # noqa: E402


def steps(model, optimiser, n=6):
    for i in range(n):
        x, y = noisy(i)
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


def test_timm_makes_it_by_name_and_its_weight_decay_is_not_the_strength():
    factory = pytest.importorskip("timm.optim._optim_factory")
    info = factory.OptimInfo("adamspd", AdamSPD, has_betas=True)
    factory.default_registry.register(info)
    made = {}
    for strength in (0.0, 2.0):
        model = network()
        options = {"lr": 1e-2, "weight_decay": 0.1, "spd_lambda": strength}
        optimiser = factory.create_optimizer_v2(model, "adamspd", **options)
        assert [g["weight_decay"] for g in optimiser.param_groups] == [0.0, 0.1]
        assert {g["spd_lambda"] for g in optimiser.param_groups} == {strength}
        assert all(optimiser.anchor_of(p) is not None for p in model.parameters())
        made[strength] = steps(model, optimiser)
    model = network()
    adamw = factory.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)
    for a, b in zip(steps(model, adamw), made[0.0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert not all(torch.equal(a, b) for a, b in zip(made[0.0], made[2.0], strict=True))


def test_timms_groups_by_layer_keep_their_rates():
    timm = pytest.importorskip("timm")
    scheduler = pytest.importorskip("timm.scheduler")
    model = timm.create_model("test_vit", num_classes=3)
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    optimiser = AdamSPD(groups, lr=1e-3)
    scales = {g["lr_scale"] for g in optimiser.param_groups}
    assert len(scales) > 3 and max(scales) == 1
    schedule = scheduler.CosineLRScheduler(optimiser, t_initial=10, lr_min=0)
    schedule.step(5)
    for group in optimiser.param_groups:
        assert group["lr"] == pytest.approx(5e-4 * group["lr_scale"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(2, 3, *model.patch_embed.img_size)).square().sum().backward()
    optimiser.step()
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    assert moved["head.weight"] > 2 * moved["patch_embed.proj.weight"] > 0


class WithLoss(torch.nn.Module):
    """What Hugging Face's Trainer wants of a model: the loss, first."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x, labels):
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("way", ["instance", "class"])
def test_the_trainer_of_transformers_steps_it(way, tmp_path):
    transformers = pytest.importorskip("transformers", reason="optional: requirements-llm.txt")
    pytest.importorskip("accelerate", reason="optional: requirements-llm.txt")
    x, y = noisy(0)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=len(data), learning_rate=3e-2,
        lr_scheduler_type="constant", max_grad_norm=0, weight_decay=0, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model, options = WithLoss(), {"lr": 3e-2, "spd_lambda": 2.0}
    if way == "instance":
        optimiser = AdamSPD(model.parameters(), **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0)
        given = {"optimizers": (optimiser, schedule)}
    else:
        given = {"optimizer_cls_and_kwargs": (AdamSPD, options)}
    transformers.Trainer(model, arguments, train_dataset=data, **given).train()
    by_hand = {}
    for strength in (0.0, 2.0):
        plain = WithLoss()
        loop = AdamSPD(plain.parameters(), lr=3e-2, spd_lambda=strength)
        for _ in range(8):  # one batch is the whole set
            loop.zero_grad()
            plain(x, y)["loss"].backward()
            loop.step()
        by_hand[strength] = torch.cat([p.detach().flatten() for p in plain.parameters()])
    ours = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, by_hand[2.0], rtol=1e-3, atol=1e-5)
    assert (ours - by_hand[0.0]).abs().max() > 1e-3  # it was projected


# SPD around other optimisers


def test_held_adam_is_adam_spd():
    ours, theirs = network(), network()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, foreach=False)
    hold(adam, spd_lambda=2.0)
    mine = AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=2.0, fused=False)
    assert equal(train(ours, mine, 40), train(theirs, adam, 40))
    free = network()
    assert not equal(
        train(free, torch.optim.Adam(free.parameters(), lr=1e-2), 40), theirs.parameters()
    )


def momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def lion(params):
    return pytest.importorskip("timm.optim").Lion(list(params), lr=3e-3)


@pytest.mark.parametrize("make", [momentum, lion])
@pytest.mark.parametrize("anchor", ["pretrained", "zero"])
def test_other_optimisers_are_held_nearer_to_the_anchor(make, anchor):
    radius = {}
    for strength in (0.0, 1.0, 2.0):
        model = network()
        start = [p.detach().clone() * (anchor == "pretrained") for p in model.parameters()]
        optimiser = make(model.parameters())
        hold(optimiser, strength, anchor)
        end = train(model, optimiser, 40)
        radius[strength] = sum(((a - b) ** 2).sum() for a, b in zip(end, start, strict=True)).item()
    assert radius[2.0] < radius[1.0] < radius[0.0]


class WritingAdam(torch.optim.Adam):
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            torch._foreach_neg_([p.grad for p in group["params"]])


def test_held_adam_is_adam_spd_where_the_gradient_changes_hands():
    """maximize; an optimiser that writes to p.grad; a closure, whose first gradient counts."""
    for make, options in ((torch.optim.Adam, {"maximize": True}), (WritingAdam, {})):
        ours, theirs = network(), network()
        adam = make(theirs.parameters(), lr=1e-2, foreach=False, **options)
        hold(adam, spd_lambda=2.0)
        mine = AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=2.0, fused=False, **options)
        assert equal(train(ours, mine, 40), train(theirs, adam, 40))
    ours, theirs = network(), network()
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, foreach=False)
    hold(adam, spd_lambda=2.0)
    mine = AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=2.0, fused=False)
    for i in range(20):
        for model, optimiser, keyword in ((ours, mine, False), (theirs, adam, True)):

            def closure(model=model, optimiser=optimiser, i=i):
                optimiser.zero_grad()
                x, y = noisy(i)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimiser.step(closure=closure) if keyword else optimiser.step(closure)
    assert equal(ours.parameters(), theirs.parameters())


class LooksTwice(torch.optim.Optimizer):
    """Gradient descent that calls its closure once more after the gradient it uses."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        params = self.param_groups[0]["params"]
        closure()
        grads = [p.grad.clone() for p in params]
        closure()
        for p, grad in zip(params, grads, strict=True):
            p.sub_(grad, alpha=self.param_groups[0]["lr"])


def test_of_several_calls_of_a_closure_the_first_gradient_decides():
    ends = []
    for make, calls in ((LooksTwice, True), (torch.optim.SGD, False)):
        for strength in (0.0, 1.0):
            param = nn.Parameter(torch.ones(2))
            optimiser, n = make([param], lr=1.0), 0
            hold(optimiser, strength)
            for back in ([-1.0, 0.0], [-1.0, 0.5], [1.0, 3.0], [-1.0, 0.5]):
                grad = torch.tensor(back)

                def closure(grad=grad, param=param):
                    nonlocal n
                    param.grad = -grad if n % 2 else grad.clone()
                    n += 1

                if calls:
                    optimiser.step(closure)
                else:
                    param.grad = grad
                    optimiser.step()
            ends.append(param.detach().clone())
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[3])
    assert not torch.equal(ends[0], ends[1])


def test_groups_added_later_are_held_too():
    model, radius = network(), {}
    for strength in (0.0, 2.0):
        model = network()
        start = model[3].weight.detach().clone()
        optimiser = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
        hold(optimiser, strength)
        optimiser.add_param_group({"params": model[3].parameters()})
        train(model, optimiser, 40)
        radius[strength] = (model[3].weight - start).norm().item()
    assert radius[2.0] < radius[0.0]


def test_a_released_optimiser_goes_on_alone():
    held, free = network(), network()
    optimisers = [momentum(m.parameters()) for m in (held, free)]
    hold(optimisers[0], 2.0)()  # held and released at once
    assert equal(*(train(m, o) for m, o in zip((held, free), optimisers, strict=True)))


def test_holding_takes_closures_and_refuses_other_anchors():
    model, (x, y) = network(), noisy(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold(optimiser)

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimiser.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="anchor must be 'pretrained' or 'zero', got 'none'"):
        hold(optimiser, anchor="none")
    with pytest.raises(ValueError, match="spd_lambda must be 0 or more and finite, got -1"):
        hold(optimiser, -1)
    with pytest.raises(ValueError, match="complex"):
        hold(torch.optim.SGD([nn.Parameter(torch.zeros(2, dtype=torch.cfloat))]))
