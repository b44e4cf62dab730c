"""AdamSPD where others make the groups, the loop and the schedule: timm, Hugging Face; and SPD
around their optimisers.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "lab" / "examples")]

from hold import hold  # noqa: E402
from test_spd import CONDITIONS, copies, distance, equal, network, noisy, train  # noqa: E402

import spd  # noqa: E402
from spd import AdamL2SP, AdamSPD  # noqa: E402


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
        assert all("anchor" in optimiser.state[p] for p in model.parameters())
        made[strength] = train(model, optimiser, 6)
    model = network()
    adamw = factory.create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)
    for a, b in zip(train(model, adamw, 6), made[0.0], strict=True):
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
    """An optimiser that writes to p.grad; a closure, whose first gradient counts; maximize."""
    ours, theirs = network(), network()
    adam = WritingAdam(theirs.parameters(), lr=1e-2, foreach=False)
    hold(adam, spd_lambda=2.0)
    mine = AdamSPD(ours.parameters(), lr=1e-2, spd_lambda=2.0, fused=False)
    assert equal(train(ours, mine, 40), train(theirs, adam, 40))
    ends = []
    for sign in (1, -1):
        param = nn.Parameter(torch.ones(3))
        adam = torch.optim.Adam([param], lr=0.1, maximize=sign < 0)
        hold(adam, spd_lambda=2.0)
        for turn in (1.0, 1.0, -1.0):
            param.grad = sign * turn * torch.arange(3.0)
            adam.step()
        ends.append(param.detach())
    assert torch.equal(*ends)
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


class Prepared:
    """As accelerate wraps an optimiser."""

    def __init__(self, optimizer):
        self.optimizer, self.step = optimizer, optimizer.step


def test_what_accelerate_has_wrapped_is_held():
    ends = []
    for wrap in (Prepared, lambda optimiser: optimiser):
        model = network()
        optimiser = momentum(model.parameters())
        hold(wrap(optimiser), 2.0)
        ends.append(train(model, optimiser, 20))
    assert equal(*ends)


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


# memory layouts, scalers, closures, distributed checkpoints, FSDP


def test_a_flipped_sign_is_another_method_the_model_freezes(monkeypatch):
    def moved():
        model = network()
        start, optimiser = copies(model), AdamSPD(model.parameters(), lr=1e-3)
        x, y = noisy(0, 64)
        for _ in range(50):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
        return distance(model.parameters(), start)

    right, condition = moved(), spd.condition
    monkeypatch.setattr(spd, "condition", lambda *args: -condition(*args))
    assert moved() < 0.2 * right


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_a_weight_of_another_layout_is_stepped_like_a_contiguous_one(layout):
    plain = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    other = plain.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        other = plain.transpose(0, 3).contiguous().transpose(0, 3)
    weights = [nn.Parameter(plain.clone()), nn.Parameter(other)]
    optimisers = [AdamSPD([w], lr=0.1) for w in weights]
    for i in range(6):
        grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(i))
        for weight, optimiser in zip(weights, optimisers, strict=True):
            weight.grad = grad
            optimiser.step()
    torch.testing.assert_close(*weights)
    assert not weights[1].is_contiguous()


def test_a_step_reads_no_number_back_from_the_device():
    """On the meta device, where there is none to read."""
    for kind in (AdamSPD, AdamL2SP):
        model = network().to("meta")
        optimiser = kind(model.parameters(), condition="paper", weight_decay=0.1)
        for state in optimiser.state.values():
            state["step"] = 1  # the first step compares the weights with the anchors
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimiser.step()


def test_a_closure_tied_weights_and_parameters_without_gradient():
    weight, unused = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.a = model.b = weight
    model.unused = unused
    optimiser = AdamSPD(model.parameters())

    def closure():
        optimiser.zero_grad()
        loss = model.a.square().sum() + model.b.sum()
        loss.backward()
        return loss

    assert isinstance(optimiser.step(closure).item(), float)
    assert len(optimiser.param_groups[0]["params"]) == 2
    assert torch.equal(unused, torch.ones(3)) and optimiser.state[unused]["step"] == 0


def test_an_overflow_under_a_scaler_changes_neither_moments_nor_weights():
    model = network()
    optimiser = AdamSPD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ends = []
    for scale in (1.0, float("inf"), 1.0):
        optimiser.zero_grad()
        scaler.scale(F.cross_entropy(model(noisy(0)[0]), noisy(0)[1]) * scale).backward()
        scaler.step(optimiser)
        scaler.update()
        ends.append(copies(model) + [s["exp_avg"].clone() for s in optimiser.state.values()])
    assert equal(ends[0], ends[1]) and not equal(ends[1], ends[2])


def test_the_state_dict_of_torchs_distributed_checkpoints_goes_on():
    dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    whole, model, again = network(), network(), network()
    expected = train(whole, AdamSPD(whole.parameters(), lr=1e-2, condition="paper"), 10)
    optimiser = AdamSPD(model.parameters(), lr=1e-2, condition="paper")
    train(model, optimiser, 5)
    weights, state = copy.deepcopy(dcp.get_state_dict(model, optimiser))
    other = AdamSPD(again.parameters(), lr=1e-2, condition="paper")
    _, skeleton = dcp.get_state_dict(again, other)  # what its loader asks for, before it reads
    assert {n: set(s) for n, s in skeleton["state"].items()} == {
        n: set(s) for n, s in state["state"].items()
    }
    dcp.set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    assert equal(train(again, other, 5, first=5), expected)


def sharded(rank, folder):
    """What two processes find out about FSDP, written to a file."""
    from torch.distributed import fsdp

    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    ends = []
    for rule in CONDITIONS:
        model = network()
        fsdp.fully_shard(model, mesh=mesh)
        optimiser = AdamSPD(model.parameters(), lr=1e-2, condition=rule)
        train(model, optimiser, 40)
        ends.append([p.full_tensor().detach() for p in model.parameters()])
    said = []
    for original in (False, True):
        cpu = torch.device("cpu")
        flat = fsdp.FullyShardedDataParallel(network(), use_orig_params=original, device_id=cpu)
        try:
            AdamSPD(flat.parameters())
        except ValueError as error:
            said.append(str(error))
    torch.save({"ends": ends, "said": said}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_sharded_weights_take_the_decisions_of_whole_ones_and_flat_ones_are_refused(tmp_path):
    torch.multiprocessing.spawn(sharded, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found["said"]) == 2 and "use fully_shard" in found["said"][1]
        for rule, end in zip(CONDITIONS, found["ends"], strict=True):
            model = network()
            expected = train(model, AdamSPD(model.parameters(), lr=1e-2, condition=rule), 40)
            for a, b in zip(end, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
