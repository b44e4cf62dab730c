"""AdamSPD where others make the groups, the loop and the schedule: timm, Hugging Face."""

import pytest
import torch
import torch.nn.functional as F
from test_spd import network, noisy

from spd import AdamSPD


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
