"""carot.py against worked numbers, its losses' properties, its training, and the paper's tables."""

import copy
import csv
import dataclasses
import json
import math
import re

import faults
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_end_to_end import make_imagenet

import carot
import common
import vrf


def random_logits(n=8, seed=0, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, n, generator=generator, dtype=torch.double).to(dtype)


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# Eq. (3): contrastive loss


def test_contrastive_loss_of_two_pairs_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [math.log(2), math.log(4)]])
    rows = -math.log(3 / 4) - math.log(4 / 6)
    columns = -math.log(3 / 5) - math.log(4 / 5)
    assert carot.contrastive(logits).item() == pytest.approx((rows + columns) / 4)


def test_contrastive_loss_is_the_mean_of_two_cross_entropies():
    logits, i = random_logits(), torch.arange(8)
    expected = (F.cross_entropy(logits, i) + F.cross_entropy(logits.T, i)) / 2
    torch.testing.assert_close(carot.contrastive(logits), expected)


def test_pairs_of_one_class_are_negatives_of_each_other():
    f = F.normalize(torch.ones(6, 4), dim=1)  # six times the same image and caption
    assert carot.contrastive(carot.similarity(f, f, 10.0)).item() == pytest.approx(math.log(6))


def test_similarity_is_the_scaled_cosine_with_images_in_rows():
    f, g = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8], [1.0, 0.0]]) * 10
    torch.testing.assert_close(carot.similarity(f, g, 10.0), expected)


# Eq. (4): orthogonality


def test_orthogonality_of_a_two_by_two_by_hand():
    W = torch.tensor([[1.0, 1.0], [0.0, 2.0]])  # W^T W - I = [[0, 1], [1, 4]]
    assert carot.orthogonality(W, "paper").item() == pytest.approx(18.0)
    assert carot.orthogonality(W, "code").item() == pytest.approx(math.sqrt(18))


def test_the_codes_form_is_the_root_of_the_papers():
    W = random_matrix(7, 4)
    root, square = carot.orthogonality(W, "code"), carot.orthogonality(W, "paper")
    torch.testing.assert_close(root**2, square)


@pytest.mark.parametrize("form", ["paper", "code", "svd"])
def test_orthonormal_columns_cost_nothing_and_have_a_finite_gradient(form):
    W = torch.linalg.qr(random_matrix(9, 5))[0].requires_grad_()
    loss = carot.orthogonality(W, form)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and W.grad.isfinite().all()


def test_the_codes_gradient_is_finite_at_exactly_zero():
    W = torch.eye(3, requires_grad=True)
    carot.orthogonality(W).backward()
    assert torch.equal(W.grad, torch.zeros(3, 3))


def test_the_svd_rival_pulls_every_singular_value_to_one():
    W = torch.diag(torch.tensor([3.0, 0.5]))
    assert carot.orthogonality(W, "svd").item() == pytest.approx(4 + 0.25)


def test_cross_fnorm_is_the_norm_of_the_product():
    W_v, W_t = random_matrix(7, 4), random_matrix(5, 4, seed=1)
    torch.testing.assert_close(carot.cross_fnorm(W_v, W_t), (W_v @ W_t.T).norm())
    assert carot.cross_fnorm(torch.eye(2), torch.eye(2)).item() == pytest.approx(math.sqrt(2))


# Eq. (5): self-distillation


def test_self_distillation_of_two_pairs_by_hand():
    student = torch.zeros(2, 2)  # every row and column: 1/2, 1/2
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])  # 3/4, 1/4 either way
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert carot.self_distillation(student, teacher, "paper").item() == pytest.approx(2 * kl)
    assert carot.self_distillation(student, teacher).item() == pytest.approx(2 * math.log(2))


def test_the_directions_are_images_over_texts_and_texts_over_images():
    student, teacher = random_logits(5), random_logits(5, seed=1)
    by_image = F.cross_entropy(student, teacher.softmax(1))
    by_text = F.cross_entropy(student.T, teacher.T.softmax(1))
    torch.testing.assert_close(carot.self_distillation(student, teacher), by_image + by_text)


def test_both_forms_have_one_gradient_and_differ_by_the_teachers_entropy():
    student, teacher = random_logits().requires_grad_(), random_logits(seed=1)
    kl, ce = (carot.self_distillation(student, teacher, form) for form in ("paper", "code"))
    (by_kl,), (by_ce,) = (torch.autograd.grad(loss, student) for loss in (kl, ce))
    torch.testing.assert_close(by_kl, by_ce)
    entropy = sum(-(q * q.log()).sum(1).mean() for q in (teacher.softmax(1), teacher.T.softmax(1)))
    torch.testing.assert_close(ce - kl, entropy)


def test_a_teacher_equal_to_the_student_gives_no_gradient_so_step_0_loses_nothing():
    student = random_logits().requires_grad_()
    carot.self_distillation(student, student.detach()).backward()
    assert student.grad.abs().max() < 1e-15


# Eq. (6)


def test_total_is_the_sum_of_its_terms_with_their_coefficients():
    logits, teacher = random_logits(), random_logits(seed=1)
    W_v, W_t = random_matrix(9, 5), random_matrix(6, 5, seed=1)
    got = carot.total(logits, W_v, W_t, teacher, oc=0.2, sd=1.5, cross=0.05)
    expected = (
        carot.contrastive(logits)
        + 0.2 * carot.orthogonality(W_v)
        + 1.5 * carot.self_distillation(logits, teacher)
        + 0.05 * (W_v @ W_t.T).norm()
    )
    torch.testing.assert_close(got, expected)


def test_total_without_coefficients_or_teacher_is_flyps_loss():
    logits, W = random_logits(), random_matrix(9, 5)
    flyp = carot.contrastive(logits)
    assert torch.equal(carot.total(logits, W, W, random_logits(seed=1), oc=0, sd=0), flyp)
    assert torch.equal(carot.total(logits, W, W, None, oc=0), flyp)  # step 0


def test_gradients_of_every_loss_are_right_in_fp64():
    f, g, W_v, W_t = (random_matrix(4, 3, seed=i).requires_grad_() for i in range(4))
    teacher = random_logits(4, seed=5)
    for oc_form in ("paper", "code", "svd"):
        for sd_form in ("paper", "code"):

            def loss(f, g, W_v, W_t, s, forms=(oc_form, sd_form)):
                logits = carot.similarity(f, g, s.exp())
                return carot.total(logits, W_v, W_t, teacher, 1, 0.2, 1.5, 0.05, *forms)

            s = torch.tensor(1.0, dtype=torch.double, requires_grad=True)
            assert torch.autograd.gradcheck(loss, (f, g, W_v, W_t, s))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)])
def test_half_precision_inputs_give_the_loss_of_their_values(dtype, digits):
    """Logits of 100 times a cosine: in fp16 most of a softmax is 0, and its log -inf (T9)."""
    f, g = (F.normalize(random_matrix(64, 32, seed=i), dim=1).to(dtype) for i in (0, 1))
    W = random_matrix(256, 32).to(dtype)
    logits, exact = carot.similarity(f, g, 100.0), carot.similarity(f.double(), g.double(), 100.0)
    teacher = exact.flip(0)
    got = carot.total(logits.to(dtype), W, W, teacher.to(dtype), cross=0.05)
    expected = carot.total(exact, W.double(), W.double(), teacher, cross=0.05)
    assert got.dtype == torch.float32 and got.isfinite()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4)  # no rounding to half
    alone = [carot.contrastive(logits.to(dtype)), carot.orthogonality(W), carot.cross_fnorm(W, W)]
    alone.append(carot.self_distillation(logits.to(dtype), teacher.to(dtype)))
    assert {x.dtype for x in alone} == {torch.float32}
    torch.testing.assert_close(got.double(), expected, rtol=digits, atol=0)


# the teacher

STEPS = 10 * math.ceil(1_281_167 / 512)  # ImageNet, batch 512, 10 epochs


def test_momentum_has_its_eleven_worked_values_and_then_0_9():
    worked = [0.05, 0.1349, 0.2198, 0.3047, 0.3896, 0.4745, 0.5594, 0.6443, 0.7292, 0.8141, 0.8990]
    got = [carot.momentum(t, STEPS) for t in range(0, 5001, 500)]
    assert STEPS == 25_030 and got == pytest.approx(worked, abs=1e-4)
    assert [carot.momentum(t, STEPS) for t in (5006, 5500, 25_000)] == [0.9] * 3


def test_ema_mixes_floats_and_copies_counters():
    psi = {"w": torch.tensor([1.0, 2.0]), "running_var": torch.tensor(4.0), "n": torch.tensor(3)}
    theta = {"w": torch.tensor([3.0, 0.0]), "running_var": torch.tensor(0.0), "n": torch.tensor(8)}
    carot.ema(psi, theta, 0.25)
    assert psi["w"].tolist() == [2.5, 0.5]
    assert psi["running_var"].item() == 1.0 and psi["n"].item() == 8


def test_ema_with_momentum_one_keeps_the_teacher_and_zero_takes_the_student():
    psi, theta = {"w": torch.tensor([0.1, 7.0])}, {"w": torch.tensor([0.3, 5.0])}
    carot.ema(psi, theta, 1.0)
    assert torch.equal(psi["w"], torch.tensor([0.1, 7.0]))
    carot.ema(psi, theta, 0.0)
    assert torch.equal(psi["w"], theta["w"])


# the bound's singular values


def test_independent_dimensions_have_singular_values_one_at_any_scale():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    features = signs * torch.tensor([100.0, 0.01]) + 5
    torch.testing.assert_close(carot.singular_values(features), torch.ones(2).double())


def test_singular_values_of_a_correlation_by_hand():
    x = random_matrix(50_000, 2)
    correlated = torch.stack([x[:, 0], 0.6 * x[:, 0] + 0.8 * x[:, 1]], 1)
    largest, smallest = carot.singular_values(correlated).tolist()
    assert (largest, smallest) == pytest.approx((1.6, 0.4), abs=0.01)


def test_a_repeated_or_constant_dimension_has_sigma_min_zero():
    x = random_matrix(100, 2)
    assert carot.singular_values(torch.stack([x[:, 0], x[:, 0]], 1))[-1] < 1e-12
    assert carot.singular_values(torch.cat([x, torch.ones(100, 1)], 1))[-1] == 0


# which matrices


def random_clip(name):
    return common.load_clip(carot.Config(model=name, pretrained="random"))


@pytest.mark.parametrize(
    ("name", "v", "t"), [("RN50", (2048, 1024), (512, 1024)), ("ViT-B-32", (768, 512), (512, 512))]
)
def test_projections_map_to_the_shared_dimensions_in_resnets_and_transformers(name, v, t):
    model = random_clip(name).model
    W_v, W_t = carot.projections(model)
    assert (tuple(W_v.shape), tuple(W_t.shape)) == (v, t)
    with torch.no_grad():  # the matrix that the features come through: they follow it
        x = torch.randn(1, 3, 224, 224)
        before = model.encode_image(x)
        W_v.mul_(2)
        after = model.encode_image(x)
    bias = model.visual.attnpool.c_proj.bias.detach() if name == "RN50" else 0
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-3, atol=1e-5)
    gram = (W_v.T @ W_v).shape  # RN50: rank 1024, so that the constraint can be met (T3)
    assert gram == (v[1], v[1]) and carot.cross_fnorm(W_v, W_t).isfinite()


def small_resnet():
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


def test_a_tower_without_a_linear_projection_is_refused_with_a_cure():
    model = small_resnet()
    del model.text_projection
    with pytest.raises(common.InputError, match="no linear projection at text_projection.*--oc 0"):
        carot.projections(model)


# training


@pytest.fixture(scope="module")
def clip():
    return common.load_clip(carot.Config(**carot.PRESETS["digits"]))


def digits(n=20, classes=4):
    """The first n training digits of some classes, as all sets of a small study."""
    data = common.open_data("digits")
    for s in (data.train, data.val, data.test, *data.shifts):
        kept = torch.cat([(s.labels == c).nonzero()[: n // classes, 0] for c in range(classes)])
        s.images, s.labels = s.images[kept.numpy()], s.labels[kept]
        s.__dict__.pop("fingerprint", None)
    data.classes, data.templates = data.classes[:classes], data.templates[:3]
    data.shifts = data.shifts[:2]
    return data


def small_config(out, **changes):
    given = {**carot.PRESETS["digits"], "epochs": 2, "batch": 8, "warmup": 2, "ema_every": 2}
    return carot.Config(**given | {"device": "cpu", "out": str(out)} | changes)


CAROT = {"oc": 0.2, "sd": 1.5, "cross": 0.05}  # 20 images in eights for 2 epochs: 6 steps


def watched_ema(monkeypatch):
    """The list of momenta of all updates from now on."""
    real, calls = carot.ema, []
    monkeypatch.setattr(carot, "ema", lambda *a: calls.append(a[2]) or real(*a))
    return calls


def test_flyp_is_carot_with_all_coefficients_zero_to_the_last_bit(clip, tmp_path):
    data = digits()
    config = small_config(tmp_path, oc=0.0, sd=0.0, cross_fnorm=0.0, methods="FLYP,CaRot")
    zero_shot = common.classifier(config, data, clip, torch.device("cpu"))
    models = carot.train_models(config, data, clip, zero_shot, 0)
    flyp, same, start = (models[m].state_dict() for m in ("FLYP", "CaRot", "ZS"))
    assert all(torch.equal(flyp[k], same[k]) for k in flyp)
    assert not torch.equal(flyp["visual.proj"], start["visual.proj"])
    assert not torch.equal(flyp["head.weight"], start["head.weight"])  # from its own text tower


def test_the_teacher_is_not_asked_in_step_0_and_gets_no_gradient(clip, tmp_path, monkeypatch):
    real, asked = carot.encode, []

    def watched(model, *args):
        asked.append((model, torch.is_grad_enabled()))
        return real(model, *args)

    monkeypatch.setattr(carot, "encode", watched)
    product, scales = carot.similarity, []
    monkeypatch.setattr(carot, "similarity", lambda f, g, s: scales.append(+s) or product(f, g, s))
    module = carot.fine_tune(small_config(tmp_path), "CaRot", clip, digits(), 0, **CAROT)
    s, t = (module.student, True), (module.teacher, False)
    assert asked == [s] + [s, t] * 5
    assert scales[-1].item() != scales[-2].item()  # each its own
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    scales = {float(x.logit_scale.detach()) for x in (module.student, module.teacher, clip.model)}
    assert len(scales) == 3 and not module.teacher.training


def test_the_teacher_is_updated_after_the_optimisers_steps_0_2_4(clip, tmp_path, monkeypatch):
    momenta, data = watched_ema(monkeypatch), digits()
    module = carot.fine_tune(small_config(tmp_path), "CaRot", clip, data, 0, **CAROT)
    expected = [carot.momentum(t, 6) for t in (0, 2, 4)]
    assert momenta == expected == [0.05, 0.9, 0.9] and module.updates == 3
    once = small_config(tmp_path / "b", epochs=1, batch=20, ema_every=500)
    module = carot.fine_tune(once, "CaRot", clip, data, 0, **CAROT)
    start, theta = clip.model.visual.proj, module.student.visual.proj
    torch.testing.assert_close(module.teacher.visual.proj, 0.05 * start + 0.95 * theta)
    assert not torch.equal(theta, start)


def test_recipes_start_where_they_should_with_their_own_rates_and_clipping(
    clip, tmp_path, monkeypatch
):
    calls, real = [], common.train_by

    def record(config, name, model, part, loss_fn, batches, n, split, clip, lr, *rest, **options):
        calls.append((name, config.clip, lr))
        return real(
            config, name, model, part, loss_fn, batches, n, split, clip, lr, *rest, **options
        )

    monkeypatch.setattr(common, "train_by", record)
    rates = {"lr": 1e-6, "lr_ft": 2e-6, "lr_lpft": 3e-6, "lr_lp": 0.4}
    config, data = small_config(tmp_path, epochs=1, batch=20, **rates), digits()
    zero_shot = common.classifier(config, data, clip, torch.device("cpu"))
    models = carot.train_models(config, data, clip, zero_shot, 7)
    assert calls == [
        ("LP, seed 7", 1.0, 0.4),
        ("FT, seed 7", 1.0, 2e-6),
        ("LP-FT, seed 7", 1.0, 3e-6),
        ("FLYP, seed 7", 0.0, 1e-6),
        ("CaRot, seed 7", 0.0, 1e-6),
    ]
    assert list(models) == ["ZS", "FT", "LP-FT", "FLYP", "CaRot"]
    gap = {m: (models[m].head.weight - zero_shot.head.weight).abs().max() for m in models}
    assert gap["LP-FT"] > 0.1 > gap["FT"]  # LP-FT starts from the probe's head


def test_there_are_51_updates_at_the_published_size(clip, tmp_path, monkeypatch):
    at = []

    def no_training(*args, probe, **options):
        for done in range(STEPS + 1):
            before = len(momenta)
            probe(done)
            probe(done)  # as after a resumption
            at.extend([done - 1] * (len(momenta) - before))

    momenta = []
    monkeypatch.setattr(carot, "ema", lambda psi, theta, m: momenta.append(m))
    monkeypatch.setattr(common, "train_by", no_training)
    data = digits()
    data.train.labels = torch.zeros(1_281_167, dtype=torch.long)
    config = small_config(tmp_path, epochs=10, batch=512, ema_every=500)
    module = carot.fine_tune(config, "CaRot", clip, data, 0, **CAROT)
    assert at == list(range(0, 25_001, 500)) and len(at) == 51 == module.updates
    assert momenta[:11] == pytest.approx([carot.momentum(t, STEPS) for t in at[:11]])


def test_learning_rate_has_the_published_schedule():
    lr = [1e-5 * common.warmup_cosine(t, 500, STEPS) for t in (0, 499, 500, STEPS - 1)]
    assert lr == pytest.approx([2e-8, 1e-5, 1e-5, 0], abs=1e-12)


def test_an_interrupted_run_continues_bit_for_bit_with_its_teacher(clip, tmp_path, monkeypatch):
    data = digits()
    whole = carot.fine_tune(small_config(tmp_path / "whole"), "CaRot", clip, data, 0, **CAROT)
    real, calls = carot.total, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 5:  # step 4; the checkpoint is from step 3
            raise ZeroDivisionError
        return real(*args)

    parts = small_config(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(carot, "total", stops)
        carot.fine_tune(parts, "CaRot", clip, data, 0, **CAROT)
    torch.manual_seed(99)
    again = carot.fine_tune(parts, "CaRot", clip, data, 0, **CAROT).state_dict()
    whole = whole.state_dict()
    assert whole.keys() == again.keys() and any(k.startswith("teacher.") for k in whole)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    "change",
    [{"ema_every": 3}, {"oc_form": "paper"}, {"sd_form": "paper"}, {"templates": 2}, {"oc": 0.1}],
)
def test_another_loss_teacher_or_caption_is_another_checkpoint(change, clip, tmp_path):
    """Forms with one gradient, too: the check is of the name, and no step is made twice."""
    data, coefficients = digits(), dict(CAROT)
    options = {"epochs": 1, "batch": 20}
    carot.fine_tune(small_config(tmp_path, **options), "CaRot", clip, data, 0, **coefficients)
    data.templates = data.templates[: change.pop("templates", 3)]
    coefficients["oc"] = change.pop("oc", 0.2)
    config = small_config(tmp_path, **options, **change)
    carot.fine_tune(config, "CaRot", clip, data, 0, **coefficients)
    assert len(list(tmp_path.glob("checkpoints/*.pt"))) == 2


def test_batchnorms_statistics_reach_the_teacher_of_a_resnet(clip, tmp_path):
    torch.manual_seed(0)
    resnet = dataclasses.replace(clip, model=small_resnet().eval(), name="small-resnet")
    config, data = small_config(tmp_path, batch=20, epochs=1), digits()
    module = carot.fine_tune(config, "CaRot", resnet, data, 0, **CAROT)
    start, student, teacher = (m.visual.bn1 for m in (resnet.model, module.student, module.teacher))
    assert student.num_batches_tracked == teacher.num_batches_tracked == 1
    expected = 0.05 * start.running_mean + 0.95 * student.running_mean
    torch.testing.assert_close(teacher.running_mean, expected)
    assert not torch.equal(start.running_mean, expected)
    two = small_config(tmp_path, batch=20, epochs=2, ema_every=500)
    module = carot.fine_tune(two, "CaRot", resnet, data, 0, **CAROT)
    student, teacher = (m.visual.bn1.num_batches_tracked for m in (module.student, module.teacher))
    assert (student, teacher) == (2, 1)  # asked in step 1, the teacher did not learn from it
    with pytest.raises(common.InputError, match="small-resnet: BatchNorm sees a piece at a time"):
        small = small_config(tmp_path, micro_batch=4)
        carot.fine_tune(small, "CaRot", resnet, data, 0, **CAROT)


# large batches on small memory (T12)


def gradients(model, images, texts, micro):
    model.zero_grad()
    f, g = carot.encode(model, images, texts, micro)
    logits = carot.similarity(f, g, model.logit_scale.exp())
    W = carot.projections(model)
    carot.total(logits, *W, logits.detach().flip(0), cross=0.05).backward()
    return [p.grad.clone() for p in model.parameters()]


def pairs_in_fp64(clip, n=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.double)
    return copy.deepcopy(clip.model).double(), images, clip.tokenizer(["one", "two"] * (n // 2))


@pytest.mark.parametrize("micro", [1, 3, 9])
def test_the_gradient_in_pieces_is_that_of_the_whole_batch(micro, clip):
    model, images, texts = pairs_in_fp64(clip)
    whole, pieces = (gradients(model, images, texts, m) for m in (0, micro))
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_accumulation_over_small_batches_is_another_gradient(clip):
    model, images, texts = pairs_in_fp64(clip)
    whole = gradients(model, images, texts, 0)
    halves = [gradients(model, images[i : i + 5], texts[i : i + 5], 0) for i in (0, 5)]
    accumulated = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    gaps = [(a - b).norm() / a.norm() for a, b in zip(whole, accumulated, strict=True)]
    assert max(gaps) > 0.1


def test_pieces_are_computed_without_a_graph_first_and_one_at_a_time(clip, monkeypatch):
    """The memory promise: activations of all pieces never exist together."""
    model, images, texts = pairs_in_fp64(clip)
    sizes, real = [], model.encode_image
    model.encode_image = lambda x: sizes.append((len(x), torch.is_grad_enabled())) or real(x)
    f, g = carot.encode(model, images, texts, 4)
    assert [n for n, _ in sizes] == [4, 4, 2]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.numel()) or t, lambda t: t
    ):
        carot.encode(model, images, texts, 4)
    (f.sum() + g.sum()).backward()
    assert [n for n, _ in sizes[3:6]] == [4, 4, 2] and [n for n, _ in sizes[6:]] == [2, 4, 4]
    assert sum(held) < 3 * images.numel()  # of the whole graph: about 100 times that


def test_training_in_pieces_gives_the_same_model(clip, tmp_path):
    data, one = digits(), {"epochs": 1, "batch": 20, "warmup": 0}
    whole = carot.fine_tune(small_config(tmp_path / "a", **one), "CaRot", clip, data, 0, **CAROT)
    pieces = small_config(tmp_path / "b", micro_batch=6, **one)
    pieces = carot.fine_tune(pieces, "CaRot", clip, data, 0, **CAROT)
    for a, b in zip(*map(carot.projections, (whole.student, pieces.student)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # a step moves them by 2e-4
    assert not torch.equal(whole.student.visual.proj, clip.model.visual.proj)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_training_in_pieces_follows_fp32(precision, clip, tmp_path):
    moved = []
    for name, options in (("fp32", {}), (precision, {"micro_batch": 6})):
        config = small_config(tmp_path / name, epochs=1, batch=20, precision=name, **options)
        module = carot.fine_tune(config, "CaRot", clip, digits(), 0, **CAROT)
        moved.append(module.student.visual.proj.detach() - clip.model.visual.proj.detach())
    assert F.cosine_similarity(*map(torch.flatten, moved), dim=0) > 0.95  # Adam's step: its sign


# the sampler


def drawn(config, split, clip, tokens, first=0):
    """[(digest of the image's pixels, class, template)] of every step."""
    steps = []
    for images, texts, _ in carot.pairs_from(config, split, clip, tokens, 0, first):
        rows = [(tokens == t).all(-1).nonzero()[0].tolist() for t in texts]
        steps.append([(common.hash_of(i), *r) for i, r in zip(images, rows, strict=True)])
    return steps


def test_every_image_meets_every_template_once_in_as_many_epochs_as_templates(clip, monkeypatch):
    monkeypatch.setattr(common, "train_transform", common.eval_transform)
    data = digits()
    tokens = carot.captions(clip, data)
    assert tokens.shape == (4, 3, 16)
    config = small_config("", epochs=3, batch=10)  # 3 epochs of 2 steps
    steps = drawn(config, data.train, clip, tokens)
    pairs = [pair for step in steps for pair in step]
    assert len(steps) == common.steps_of(config, 20) == 6 and len(set(pairs)) == 60
    images = {image for image, *_ in pairs}
    assert len(images) == 20
    assert all(sum(p[0] == image for p in pairs) == 3 for image in images)
    in_first_epoch = [image for step in steps[:2] for image, *_ in step]
    assert len(set(in_first_epoch)) < 20  # unlike an epoch of FT


def test_a_step_depends_on_its_number_alone(clip):
    data = digits()
    config, tokens = small_config("", epochs=4), carot.captions(clip, data)
    steps = drawn(config, data.train, clip, tokens)
    assert drawn(config, data.train, clip, tokens, first=5) == steps[5:]
    assert steps[0] != steps[1] and common.steps_of(carot.Config(epochs=1), 1_281_167) == 2503


def test_captions_stay_with_their_images_when_unreadable_ones_are_left_out(
    clip, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "train_transform", common.eval_transform)
    data, files = digits(), []
    for i, image in enumerate(data.train.images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    (tmp_path / "3.png").write_bytes(b"")
    whole = {common.hash_of(x[0]): y for x, y in zip(*own_images(data.train, clip), strict=True)}
    split = common.Split("train", "", files, data.train.labels)
    config = small_config("", epochs=3, batch=10, skip_bad_images=True)
    steps = drawn(config, split, clip, carot.captions(clip, data))
    pairs = [pair for step in steps for pair in step]
    assert len(pairs) == 57 == len(set(pairs))
    assert all(whole[image] == c for image, c, _ in pairs)


def own_images(split, clip):
    transform = common.eval_transform(clip.size, clip.mean, clip.std)
    order = [[(i, 0)] for i in range(len(split.labels))]
    batches = list(common.load_images(split, transform, order, small_config("")))
    return [images for images, *_ in batches], split.labels.tolist()


# the head and what is evaluated


def test_the_head_is_the_tuned_text_towers_mean_over_templates(clip, tmp_path):
    data, config = digits(), small_config(tmp_path, methods="CaRot", teacher=True)
    zero_shot = common.classifier(config, data, clip, torch.device("cpu"))
    models = carot.train_models(config, data, clip, zero_shot, 0)
    assert list(models) == ["ZS", "CaRot", "CaRot teacher"]
    module = carot.fine_tune(config, "CaRot, seed 0", clip, data, 0, **CAROT)
    for row, tuned in (("CaRot", module.student), ("CaRot teacher", module.teacher)):
        with torch.no_grad():
            each = [[t.format(c) for t in data.templates] for c in data.classes]
            each = [F.normalize(tuned.encode_text(clip.tokenizer(c)), dim=1) for c in each]
            mean = torch.stack([F.normalize(e.mean(0), dim=0) for e in each])
            expected = mean * tuned.logit_scale.exp()
        torch.testing.assert_close(models[row].head.weight, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(models[row].visual.proj, tuned.visual.proj)
    saved = torch.load(tmp_path / "models/carot-0.pt", weights_only=True)["model"]
    assert torch.equal(saved["visual.proj"], module.student.visual.proj)


# measures


def test_ece_measures_of_four_images_by_hand():
    p = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.35, 0.65], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])  # right, wrong, right, wrong
    assert common.ece(p, labels) == pytest.approx((0 + 0.75 + 0.35 + 0.55) / 4)
    in_two = carot.adaptive_ece(p, labels, bins=2)  # {.55 wrong, .65 right}, {.75 wrong, 1 right}
    assert in_two == pytest.approx((abs(1 - 1.2) + abs(1 - 1.75)) / 4)
    of_class_0 = 0 + 0.75 + 0.35 + 0.55  # every p_0 is alone in its bin; p_1 = 1 - p_0 mirrors it
    assert carot.classwise_ece(p, labels) == pytest.approx(of_class_0 / 4)
    squares = 0 + 2 * 0.75**2 + 2 * 0.35**2 + 2 * 0.55**2
    assert carot.brier(p, labels) == pytest.approx(squares / 4)


def test_adaptive_ece_of_one_bin_is_the_gap_of_the_means_and_empty_bins_cost_nothing():
    p, labels = torch.tensor([[0.9, 0.1]] * 10), torch.tensor([0] * 7 + [1] * 3)
    for f in (common.ece, carot.adaptive_ece, carot.classwise_ece):
        assert f(p, labels, bins=1) == pytest.approx(0.2, abs=1e-6)
    for f in (common.ece, carot.classwise_ece):
        assert f(p, labels, bins=10) == pytest.approx(0.2, abs=1e-6)


def test_ece_per_batch_weights_the_last_batch_by_its_size():
    p, labels = torch.tensor([[0.9, 0.1]] * 5), torch.tensor([0, 0, 0, 0, 1])
    got = carot.ece_per_batch(p, labels, size=4)
    assert got == pytest.approx((4 * 0.1 + 1 * 0.9) / 5)


def test_batches_of_512_give_a_perfectly_calibrated_model_an_ece_of_3_to_4_percent():
    generator = torch.Generator().manual_seed(0)
    n, shape = 50_000, torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    for confidence in (0.5 + 0.5 * shape, 0.5 + 0.5 * shape.sqrt(), 1 - 0.5 * shape**2):
        p = torch.stack([confidence, 1 - confidence], 1)
        labels = (torch.rand(n, generator=generator) > confidence).long()
        assert common.ece(p, labels) < 0.008
        assert 0.02 < carot.ece_per_batch(p, labels) < 0.045


def overconfident(n=4000, T=3.0, seed=0):
    """Logits whose softmax at temperature T are the labels' probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * T, labels


@pytest.mark.parametrize("criterion", ["nll", "paper"])
def test_temperatures_undo_overconfidence_and_move_no_argmax(criterion):
    logits, labels = overconfident()
    T = carot.temperature(logits, labels, criterion)
    assert T == pytest.approx(3, rel=0.15)
    before, after = (logits.softmax(1), (logits / T).softmax(1))
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert common.ece(after, labels) < 0.02 < 0.15 < common.ece(before, labels)


def test_the_ece_criterion_is_the_least_ece_of_its_grid():
    logits, labels = overconfident(300)
    T = carot.temperature(logits, labels, "paper")
    least = common.ece((logits / T).softmax(1), labels)
    others = [common.ece((logits / t).softmax(1), labels) for t in (0.5, 1, 2, 2.9, 3.1, 4, 8)]
    assert least <= min(others)


def made_rows(*shifts_of_confidence, n=600, seeds=2):
    """Result rows of methods A, B ...: equally right, confidence off by the given amounts."""
    rows = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        base = 0.5 + 0.3 * torch.rand(n, generator=generator)
        labels = (torch.rand(n, generator=generator) > base).long()
        for name, off in zip("ABCD", shifts_of_confidence, strict=False):
            p = torch.stack([base + off, 1 - base - off], 1)
            found = common.Prediction(torch.randn(n, 3, generator=generator), p.log(), labels)
            rows.append(carot.row_of(name, seed, {"ID": found, "far": found}))
    return rows


def test_ece_gain_is_the_difference_of_the_table_with_an_interval_around_it():
    rows = made_rows(0.0, 0.15)
    own, shift = carot.ece_gain(rows, "B", "A", draws=200)
    table = [carot.measured(rows, m)["ID"] for m in "BA"]
    assert own[0] == pytest.approx(table[0] - table[1]) and own[0] == pytest.approx(shift[0])
    assert 0 < own[1] < own[0] < own[2] < 0.25
    same, _ = carot.ece_gain(rows, "A", "A", draws=100)
    assert same == (0, 0, 0)


def test_reliability_has_every_image_once_and_gives_the_pooled_ece():
    rows = made_rows(0.1)
    bins = carot.reliability(rows, "A")
    assert sum(n for *_, n in bins) == 1200 and bins[0][2] == 0 and math.isnan(bins[0][0])
    confidence = torch.cat([r["confidence"]["far"] for r in rows])
    right = torch.cat([r["right"]["far"] for r in rows])
    inside = (confidence > 0.7) & (confidence <= 0.8)
    expected = confidence[inside].mean().item(), right[inside].double().mean().item()
    assert bins[7] == pytest.approx((*expected, int(inside.sum())))
    p = torch.stack([confidence, 1 - confidence], 1)
    assert carot.pooled_ece(bins) == pytest.approx(common.ece(p, (~right).long()))


def test_temperature_rows_keep_every_prediction(clip, tmp_path):
    data, config = digits(), small_config(tmp_path)
    zero_shot = common.classifier(config, data, clip, torch.device("cpu"))
    plain, scaled = carot.evaluate(config, data, clip, {"ZS": zero_shot}, 0)
    assert (plain["method"], scaled["method"]) == ("ZS", "ZS +TS")
    assert plain["choice"] is None and scaled["choice"] > 0
    for s in plain["right"]:
        assert torch.equal(plain["right"][s], scaled["right"][s])
        assert not torch.equal(plain["confidence"][s], scaled["confidence"][s])
    assert set(plain["right"]) == {"test", *(s.name for s in data.shifts)}  # no val
    assert len(plain["spectrum"]) == 64


def test_the_summary_names_the_side_on_which_the_intervals_lie(capsys):
    rows = made_rows(0.0, 0.15, 0.05)
    for old, new in (("A", "CaRot"), ("B", "FLYP"), ("C", "ZS")):
        for r in rows:
            r["method"] = new if r["method"] == old else r["method"]
    carot.summary(rows)
    text = " ".join(capsys.readouterr().out.split())
    assert "more under shift, stays open" in text and "than each of them, holds here" in text
    for r in rows:
        r["method"] = {"CaRot": "FLYP", "FLYP": "CaRot"}.get(r["method"], r["method"])
    carot.summary(rows)
    assert "the opposite holds here" in capsys.readouterr().out


# the paper's numbers and defaults


def test_printed_averages_are_the_means_of_their_rows_but_for_the_noted_slips():
    tables = json.loads((common.EMBEDDED / "carot_paper.json").read_text())["tables"]
    slips, rows = set(), 0
    for block in tables:
        tolerance = 0.005 if block["metric"] == "accuracy" else 0.00005
        for method, *cells in block["rows"]:
            rows += 1
            *shifts, printed = cells[1:]
            if None in cells:
                assert (method, block["model"], block["metric"]) == ("CaRot", "RN50", "ece")
            elif abs(sum(shifts) / 5 - printed) > tolerance + 1e-9:
                slips.add((block["table"][:7], method))
    assert rows == 6 + 5 + 4 * 5 and slips == {("Table 2", "ZS"), ("Table 3", "FLYP")}
    noted = {(b["table"][:7], n.split(":")[0]) for b in tables for n in b["notes"]}
    assert slips <= noted


def test_the_papers_headline_is_in_its_tables():
    blocks = json.loads((common.EMBEDDED / "carot_paper.json").read_text())["tables"]
    of = {(b["model"], b["metric"]): {m: cells[-1] for m, *cells in b["rows"]} for b in blocks}
    accuracy, ece = of["ViT-B-16", "accuracy"], of["ViT-B-16", "ece"]
    assert (accuracy["CaRot"], accuracy["FLYP"]) == (62.55, 59.46)
    assert (ece["CaRot"], ece["FLYP"]) == (0.0791, 0.1836)
    assert ece["ZS"] < ece["CaRot"] == min(x for m, x in ece.items() if m != "ZS")
    assert accuracy["CaRot"] == max(accuracy.values())


def test_defaults_are_the_papers_and_its_commands():
    c = carot.Config()
    assert (c.model, c.pretrained, c.epochs, c.batch, c.warmup) == (
        "ViT-B-16",
        "openai",
        10,
        512,
        500,
    )
    assert (c.oc, c.sd, c.ema_every, c.lr, c.lr_ft, c.weight_decay) == (
        0.2,
        1.5,
        500,
        1e-5,
        3e-5,
        0.1,
    )
    assert (c.oc_form, c.sd_form, c.cross_fnorm) == ("code", "code", 0.05)  # T2, T5, T4
    paper = common.parse(
        carot.Config, ["--oc-form", "paper", "--sd-form", "paper", "--cross-fnorm", "0"], ""
    )
    assert (paper.oc_form, paper.sd_form, paper.cross_fnorm) == ("paper", "paper", 0.0)


# end to end


def test_an_epoch_of_digits_prints_every_table_and_vrf_takes_the_model(
    tmp_path, capsys, monkeypatch
):
    sets = {"train": 3000, "val": 400, "test": 2000, "uci": 300, "fonts": 300}
    monkeypatch.setattr(common, "EMBEDDED", faults.few_digits(tmp_path / "digits", sets))
    words = "--epochs 1 --batch 128 --warmup 4 --device cpu --out".split() + [str(tmp_path)]
    rows = carot.main([*words, "--methods", "FLYP,CaRot"])
    text = capsys.readouterr().out
    for title in ("accuracy in %", "ECE over each whole set", "every measure on ID"):
        assert title in text
    assert re.findall(r"^(\d)\. ", text[text.index("results:") :], re.MULTILINE) == ["1", "2", "3"]
    by = {r["method"]: r for r in rows}
    assert list(by) == [m + t for m in ("ZS", "FLYP", "CaRot") for t in ("", " +TS")]
    acc = {m: common.accuracies(rows, m) for m in ("ZS", "FLYP", "CaRot")}
    assert acc["ZS"]["test"] == pytest.approx(77.9, abs=1)  # data/README.md
    assert acc["FLYP"]["test"] > acc["ZS"]["test"] + 5 < acc["CaRot"]["test"]
    (kept, *_) = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kept["measures"]["ECE"]["test"] == by["ZS"]["measures"]["ECE"]["test"]
    with open(tmp_path / "figures/carot.csv", newline="") as file:
        table = list(csv.DictReader(file))
    (point,) = [r for r in table if r["figure"] == "1 left" and r["series"] == "CaRot"]
    assert float(point["x"]) == pytest.approx(acc["CaRot"]["test"])
    assert float(point["y"]) == pytest.approx(common.mean_shift(acc["CaRot"]))
    assert Image.open(tmp_path / "figures/carot.png").width > 1000
    model = str(tmp_path / "models/carot-0.pt")
    config, data, clip, zero_shot = vrf.prepare(["--finetuned", model, "--out", str(tmp_path)])
    tuned = common.load_finetuned(config, data, clip, zero_shot)
    found = common.predict(config, {"": tuned}, data.shifts[0], clip)[""]
    assert torch.equal(found.right, by["CaRot"]["right"][data.shifts[0].name])
    assert not torch.equal(found.right, by["ZS"]["right"][data.shifts[0].name])


def test_an_imagenet_run_has_the_papers_tables_beside_its_own(capsys):
    rows, data = made_rows(0.0, 0.1), digits()
    data.kind = "imagenet"
    for model, names in (("ViT-B-16", "Table 2|Table 3"), ("RN50", "7 and H"), ("x", "")):
        carot.print_tables(carot.Config(model=model), data, rows)
        text = capsys.readouterr().out
        assert "ECE, mean over batches of 512 (T7)" in text
        assert len(re.findall(r"^paper, .*(accuracy|ECE)", text, re.MULTILINE)) == 2 * bool(names)
        assert all(n in text for n in names.split("|"))
        assert ("62.55" in text and "0.0791" in text) == (model == "ViT-B-16")


def test_an_imagenet_tree_is_trained_on_with_its_80_templates(tmp_path, capsys):
    tree, out = make_imagenet(tmp_path / "tree"), str(tmp_path / "out")
    words = "--model tiny_clip --pretrained random --epochs 1 --batch 4 --micro-batch 3 --warmup 1"
    words = [*words.split(), "--methods", "CaRot", "--teacher", "--ema-every", "1", "--out", out]
    rows = carot.main(["--data", str(tree), *words, "--device", "cpu"])
    text = capsys.readouterr().out
    assert "zero-shot head: 3 names x 80 prompts" in text and "CaRot teacher" in text
    sets = ["test", "ImageNet-V2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R", "ObjectNet"]
    assert list(rows[0]["right"]) == sets and "mean over batches of 512" in text


def test_a_zero_period_of_the_teacher_and_an_unknown_method_are_refused():
    with pytest.raises(common.InputError, match="--ema-every 0: expected at least 1"):
        carot.prepare(["--ema-every", "0"])
    with pytest.raises(common.InputError, match="there is no 'CAROT'"):
        carot.prepare(["--methods", "CAROT"])
