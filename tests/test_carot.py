"""carot.py against worked numbers, its losses' properties, its training, and the paper's tables."""

import copy
import csv
import dataclasses
import json
import math

import numpy as np
import open_clip
import pytest
import small
import torch
from PIL import Image

import carot
import common
import vrf


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_contrastive_loss_of_two_pairs_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [math.log(2), math.log(4)]])
    rows = -math.log(3 / 4) - math.log(4 / 6)
    columns = -math.log(3 / 5) - math.log(4 / 5)
    assert carot.contrastive(logits).item() == pytest.approx((rows + columns) / 4)


def test_similarity_is_the_scaled_cosine_in_fp32_and_pairs_of_one_class_are_negatives():
    f, g = torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    expected = torch.tensor([[0.6, 0.8], [1.0, 0.0]]) * 10  # images in rows
    torch.testing.assert_close(carot.similarity(f, g, 10.0), expected)
    torch.testing.assert_close(carot.similarity(f.half(), g.half(), 10.0), expected)
    same = torch.ones(6, 4)  # six times the same image and caption
    alike = carot.similarity(same, same, 10.0)
    assert carot.contrastive(alike).item() == pytest.approx(math.log(6))


def test_the_cross_term_is_the_norm_of_the_product_or_half_its_square():
    W_v, W_l = random_matrix(7, 4), random_matrix(5, 4, seed=1)
    norm = (W_v @ W_l.T).norm()
    torch.testing.assert_close(carot.cross_term(W_v, W_l), norm)
    torch.testing.assert_close(carot.cross_term(W_v, W_l, "paper"), norm**2 / 2)
    assert carot.cross_term(torch.eye(2), torch.eye(2)).item() == pytest.approx(math.sqrt(2))


def test_orthogonality_of_a_two_by_two_by_hand_and_no_gradient_at_zero():
    W = torch.tensor([[1.0, 1.0], [0.0, 2.0]])  # W^T W - I = [[0, 1], [1, 4]]
    assert carot.orthogonality(W, "paper").item() == pytest.approx(18.0)
    assert carot.orthogonality(W, "code").item() == pytest.approx(math.sqrt(18))
    for form in ("paper", "code"):
        W = torch.eye(3, requires_grad=True)
        assert torch.equal(torch.autograd.grad(carot.orthogonality(W, form), W)[0], 0 * W)


def test_self_distillation_of_two_pairs_by_hand():
    student = torch.zeros(2, 2)  # every row and column: 1/2, 1/2
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])  # 3/4, 1/4 either way
    assert carot.self_distillation(student, teacher).item() == pytest.approx(2 * math.log(2))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert carot.self_distillation(teacher, teacher).item() == pytest.approx(2 * entropy)


def test_self_distillation_has_the_gradient_of_eq_5_which_is_zero_where_teacher_is_student():
    student, teacher = random_matrix(8, 8).requires_grad_(), random_matrix(8, 8, seed=1)
    for target in (teacher, student.detach()):
        (got,) = torch.autograd.grad(carot.self_distillation(student, target), student)
        q, p = (z.log_softmax(1) for z in (student, target))
        q_t, p_t = (z.log_softmax(0) for z in (student, target))
        kl = (p.exp() * (p - q)).sum() / 8 + (p_t.exp() * (p_t - q_t)).sum() / 8
        torch.testing.assert_close(got, torch.autograd.grad(kl, student)[0])
    assert got.abs().max() < 1e-15


@pytest.mark.parametrize("form", ["paper", "code"])
def test_the_loss_is_the_sum_of_its_terms_with_their_coefficients(form):
    logits, teacher = random_matrix(8, 8), random_matrix(8, 8, seed=1)
    W_v, W_l = random_matrix(9, 5), random_matrix(6, 5, seed=1)
    forms = dict.fromkeys(carot.FORMS, form)
    oc, cross = carot.orthogonality(W_v, form), carot.cross_term(W_v, W_l, form)
    sd = carot.self_distillation(logits, teacher)
    expected = carot.contrastive(logits) + 0.2 * oc + 1.5 * sd + 0.05 * cross
    got = carot.carot_loss(logits, W_v, W_l, teacher, forms=forms)
    torch.testing.assert_close(got, expected)


def test_logits_more_than_104_apart_do_not_make_the_loss_infinite():
    """exp(-104) is 0 in fp32, so that log(softmax) would be -inf and 0 times it nan (T9)."""
    student, teacher = torch.tensor([[0.0, 200], [200, 0]]), torch.tensor([[200.0, 0], [0, 200]])
    assert student.softmax(1).log().isinf().any()
    assert carot.self_distillation(student, teacher).item() == pytest.approx(400)


# the teacher

STEPS = 10 * math.ceil(1_281_167 / 512)  # ImageNet, batch 512, 10 epochs


def test_momentum_has_its_eleven_worked_values_and_then_0_9():
    worked = [0.05, 0.1349, 0.2198, 0.3047, 0.3896, 0.4745, 0.5594, 0.6443, 0.7292, 0.8141, 0.8990]
    got = [carot.momentum(t, STEPS) for t in range(0, 5001, 500)]
    assert STEPS == 25_030 and got == pytest.approx(worked, abs=1e-4)
    assert [carot.momentum(t, STEPS) for t in (5006, 5500, 25_000)] == [0.9] * 3


def test_ema_mixes_floats_and_copies_counters():
    psi = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    carot.ema(psi, {"w": torch.tensor([3.0, 0.0]), "n": torch.tensor(8)}, 0.25)
    assert psi["w"].tolist() == [2.5, 0.5] and psi["n"].item() == 8


def test_there_are_51_updates_at_the_published_size_after_the_steps_0_500_1000():
    module, updated = carot.Distilled(torch.nn.Linear(1, 1), teacher=True), []
    for done in range(STEPS + 1):
        carot.update_teacher(carot.Config(), module, done, STEPS)
        if module.updates > len(updated):
            updated.append(done - 1)
    assert updated == list(range(0, 25_001, 500)) and len(updated) == 51


def test_singular_values_of_independent_correlated_repeated_and_constant_dimensions():
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    features = signs * torch.tensor([100.0, 0.01]) + 5  # at any scale and offset
    torch.testing.assert_close(carot.singular_values(features), torch.ones(2).double())
    correlated = torch.stack([signs[:, 0], 0.6 * signs[:, 0] + 0.8 * signs[:, 1]], 1)
    assert carot.singular_values(correlated).tolist() == pytest.approx([1.6, 0.4])
    for other in (2 * signs[:, 0], torch.ones(4)):
        assert carot.singular_values(torch.stack([signs[:, 0], other], 1))[-1] < 1e-12


@pytest.mark.parametrize("name", ["RN50", "tiny_clip"])
def test_projections_are_the_matrices_that_the_features_come_through(name):
    clip = common.load_clip(carot.Config(model=name, pretrained="random"))
    model, x = clip.model, torch.randn(1, 3, clip.size, clip.size)
    W_v, W_l = carot.projections(model)
    if name == "RN50":  # I is 1024 x 1024, so that the constraint can be met (T3)
        assert (tuple(W_v.shape), tuple(W_l.shape)) == ((2048, 1024), (512, 1024))
    with torch.no_grad():
        before = model.encode_image(x)
        W_v.mul_(2)
        after = model.encode_image(x)
    bias = model.visual.attnpool.c_proj.bias.detach() if name == "RN50" else 0
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-3, atol=1e-5)
    assert carot.cross_term(W_v, W_l).isfinite()


def small_resnet():
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


def test_a_method_that_cannot_be_trained_is_refused_before_the_first_training(clip, monkeypatch):
    model = small_resnet()
    clip = dataclasses.replace(clip, model=model, name="small-resnet")
    monkeypatch.setattr(common, "zero_shot", lambda config, data: (clip, None))
    with pytest.raises(common.InputError, match="small-resnet: BatchNorm sees a piece at a time"):
        carot.prepare(["--micro-batch", "4"])
    del model.text_projection
    with pytest.raises(common.InputError, match="no linear projection at text_projection.*--oc 0"):
        carot.prepare([])
    carot.prepare(["--methods", "FT,FLYP"])


def test_a_short_training_has_about_50_updates_of_the_teacher_too(clip, monkeypatch):
    monkeypatch.setattr(common, "zero_shot", lambda config, data: (clip, None))
    for words, every in (([], 8), (["--epochs", "1"], 1), (["--ema-every", "99"], 99)):
        assert carot.prepare(words)[0].ema_every == every
    monkeypatch.setitem(carot.PRESETS["digits"], "ema_every", 500)  # as for other data
    assert carot.prepare([])[0].ema_every == 376 // 50


# training


@pytest.fixture(scope="module")
def clip():
    tiny = {"model": "tiny_clip", "weights": str(common.EMBEDDED / "tiny_clip.npz")}
    return common.load_clip(carot.Config(**tiny))


def digits(n=20, classes=4):
    """The first n training digits of some classes, as all sets of a small study."""
    data = common.open_data("digits")
    for s in (data.train, data.val, data.test, *data.shifts):
        kept = torch.cat([(s.labels == c).nonzero()[: n // classes, 0] for c in range(classes)])
        s.images, s.labels = s.images[kept.numpy()], s.labels[kept]
    data.classes, data.templates = data.classes[:classes], data.templates[:3]
    data.shifts = data.shifts[:2]
    return data


def small_config(out, **changes):
    """CaRot's settings: 20 images in eights for 2 epochs are 6 steps."""
    given = {**carot.PRESETS["digits"], "epochs": 2, "batch": 8, "warmup": 2, "ema_every": 2}
    given |= {"clip": 0.0, "device": "cpu", "out": str(out)}
    return carot.Config(**given | changes)


def tuned(out, clip, data, **changes):
    return carot.train_on_pairs(small_config(out, **changes), "CaRot", clip, data)


def trained(config, clip, seed=0):
    data = digits()
    zero_shot = common.classifier(config, data, clip, torch.device("cpu"))
    return carot.train_models(config, data, clip, zero_shot, seed)


def test_flyp_is_carot_with_all_coefficients_zero_to_the_last_bit(clip, tmp_path):
    config = small_config(tmp_path, oc=0.0, sd=0.0, cross_fnorm=0.0, methods="FLYP,CaRot")
    start, flyp, same = (m.state_dict() for m in trained(config, clip).values())
    assert all(torch.equal(flyp[k], same[k]) for k in flyp)
    assert not torch.equal(flyp["visual.proj"], start["visual.proj"])
    assert not torch.equal(flyp["head.weight"], start["head.weight"])  # from its own text tower


def test_the_teacher_is_not_asked_in_step_0_and_gets_no_gradient(clip, tmp_path, monkeypatch):
    real, asked = carot.encode, []

    def watched(model, *args, **options):
        asked.append((model, torch.is_grad_enabled()))
        return real(model, *args, **options)

    monkeypatch.setattr(carot, "encode", watched)
    module = tuned(tmp_path, clip, digits())
    student, teacher = (module.student, True), (module.teacher, False)
    assert asked == [student] + [student, teacher] * 5 and module.updates == 3
    assert all(p.grad is None for p in module.teacher.parameters())
    assert module.student.logit_scale != module.teacher.logit_scale != clip.model.logit_scale


def test_the_teacher_moves_after_the_optimisers_step(clip, tmp_path):
    module = tuned(tmp_path, clip, digits(), epochs=1, batch=20, ema_every=500)
    start, theta = clip.model.visual.proj, module.student.visual.proj
    torch.testing.assert_close(module.teacher.visual.proj, 0.05 * start + 0.95 * theta)
    assert not torch.equal(theta, start)


def test_recipes_have_their_own_rates_epochs_and_clipping(clip, tmp_path):
    config = small_config(tmp_path, epochs=5, clip=1.0, lr=1e-6, lr_ft=2e-6, lr_lp=0.4)
    of = {m: carot.recipe(config, m, 7) for m in ("LP", *carot.METHODS)}
    assert [c.lr for c in of.values()] == [0.4, 2e-6, 2e-6, 1e-6, 1e-6]
    assert [c.epochs for c in of.values()] == [2, 5, 3, 5, 5]
    assert [c.clip for c in of.values()] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert (of["FLYP"].oc, of["FLYP"].sd, of["FLYP"].cross_fnorm) == (0, 0, 0)


def test_lp_ft_starts_from_a_random_head_and_the_others_from_zero_shot(clip, tmp_path):
    config = small_config(tmp_path, epochs=1, batch=20, lr=1e-6, lr_ft=1e-6, lr_lp=1e-3)
    models = trained(dataclasses.replace(config, methods=",".join(carot.METHODS)), clip)
    assert list(models) == ["ZS", *carot.METHODS]
    head = {name: model.head.weight for name, model in models.items()}
    assert head["LP-FT"].abs().max() < 0.2 < head["ZS"].abs().max()
    assert all((head[m] - head["ZS"]).abs().max() < 0.1 for m in ("FT", "CaRot"))
    other = dataclasses.replace(config, methods="LP-FT", out=str(tmp_path / "other"))
    again, another = (trained(other, clip, seed)["LP-FT"].head.weight for seed in (0, 1))
    assert torch.equal(again, head["LP-FT"]) and (another - again).abs().max() > 0.1


def test_an_interrupted_run_continues_bit_for_bit_with_its_teacher(clip, tmp_path):
    data, parts = digits(), small_config(tmp_path / "parts")
    whole = tuned(tmp_path / "whole", clip, data).state_dict()
    module, training = carot.pair_training(parts, "CaRot", clip, data)
    for done in common.train_steps(parts, training):
        carot.update_teacher(parts, module, done, 6)
        if done == 5:  # the checkpoint is from step 3
            break
    torch.manual_seed(99)
    again = carot.train_on_pairs(parts, "CaRot", clip, data).state_dict()
    assert whole.keys() == again.keys() and any(k.startswith("teacher.") for k in whole)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_another_loss_teacher_or_caption_is_another_checkpoint(clip, tmp_path):
    def path(**changes):
        return carot.pair_training(small_config(tmp_path, **changes), "CaRot", clip, data)[1].path

    data, forms = digits(), dict.fromkeys(("oc_form", "cross_form"), "paper")
    changes = forms | {"ema_every": 3, "oc": 0.1, "sd": 0.1, "cross_fnorm": 0.1}
    paths = {path(), *(path(**{name: value}) for name, value in changes.items())}
    assert path(micro_batch=4) == path()  # the same gradient
    data.templates = data.templates[:2]
    assert len(paths | {path()}) == 1 + len(changes) + 1


def test_batchnorms_statistics_reach_the_teacher_of_a_resnet(clip, tmp_path):
    torch.manual_seed(0)
    resnet = dataclasses.replace(clip, model=small_resnet().eval(), name="small-resnet")
    module = tuned(tmp_path, resnet, digits(), batch=20, epochs=2, ema_every=500)
    student, teacher = (m.visual.bn1 for m in (module.student, module.teacher))
    counts = student.num_batches_tracked, teacher.num_batches_tracked
    assert counts == (2, 1)  # asked in step 1, the teacher did not learn from it
    assert not torch.equal(teacher.running_mean, resnet.model.visual.bn1.running_mean)


def gradients(model, images, texts, micro):
    logits = carot.logits_of(model, images, texts, micro)
    carot.carot_loss(logits, *carot.projections(model), logits.detach().flip(0)).backward()
    return [p.grad for p in model.parameters()]


def pairs_in_fp64(clip, n=10):
    images = random_matrix(n, 3, 32, 32)
    return copy.deepcopy(clip.model).double(), images, clip.tokenizer(["one", "two"] * (n // 2))


def test_the_loss_encodes_as_many_pairs_at_a_time_as_micro_batch_says(clip, tmp_path, monkeypatch):
    sizes, of_pair = [], carot.checkpoint

    def watched(encode_piece, images, texts, **options):
        sizes.append(len(images))
        return of_pair(encode_piece, images, texts, **options)

    monkeypatch.setattr(carot, "checkpoint", watched)
    config = small_config(tmp_path, batch=10, micro_batch=4)
    _, training = carot.pair_training(config, "CaRot", clip, digits())
    training.loss_fn(next(training.batches_from(0)))
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("micro", [3, 9])
def test_the_gradient_in_pieces_is_that_of_the_whole_batch(micro, clip):
    whole, pieces = (gradients(*pairs_in_fp64(clip), m) for m in (0, micro))
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_pieces_are_computed_without_a_graph_first_and_one_at_a_time(clip):
    """The memory promise: activations of all pieces never exist together."""
    model, images, texts = pairs_in_fp64(clip)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, id):
        carot.encode(model, images, texts, 4)
    assert sum(held) < 3 * images.numel()  # of the whole graph: about 100 times that


def drawn(config, split, clip, data, first=0):
    """[(digest of the image's pixels, class, template), ...] of every step."""
    tokens, steps, device = carot.captions(clip, data), [], torch.device("cpu")
    for images, texts in carot.pairs_from(config, split, clip, tokens, device, first):
        rows = [(tokens == t).all(-1).nonzero()[0].tolist() for t in texts]
        steps.append([(common.hash_of(i), *r) for i, r in zip(images, rows, strict=True)])
    return steps


def test_every_image_meets_every_template_once_in_as_many_epochs_as_templates(clip, monkeypatch):
    monkeypatch.setattr(common, "train_transform", common.eval_transform)
    data, config = digits(), small_config("", epochs=3, batch=10)  # 3 epochs of 2 steps
    steps = drawn(config, data.train, clip, data)
    pairs = [pair for step in steps for pair in step]
    assert len(steps) == 6 and len(set(pairs)) == 60
    images = [image for image, *_ in pairs]
    assert len(set(images)) == 20 and all(images.count(image) == 3 for image in images)
    assert len(set(images[:20])) < 20  # unlike an epoch of FT
    assert drawn(config, data.train, clip, data, first=4) == steps[4:]  # as a resumed run does


def test_ece_per_batch_has_the_authors_bins_and_weights_the_last_batch_by_its_size():
    p = torch.tensor([[0.9, 0.1]] * 5)
    labels = torch.tensor([0, 0, 0, 0, 1])
    assert carot.ece_per_batch(p, labels, size=4) == pytest.approx((4 * 0.1 + 1 * 0.9) / 5)
    p = torch.tensor([[1.0, 0], [1, 0], [0.95, 0.05], [0.95, 0.05]])
    labels = torch.tensor([0, 1, 0, 0])  # 1 is a bin of its own, half right; .95 is right
    assert carot.ece_per_batch(p, labels) == pytest.approx((2 * 0.5 + 2 * 0.05) / 4)
    low = torch.tensor([[0.5, 0.5], [0.55, 0.45]])  # [.5, .6) holds both
    assert carot.ece_per_batch(low, torch.tensor([0, 1])) == pytest.approx(abs(1 - 1.05) / 2)


def made_rows(*shifts_of_confidence):
    """Result rows of methods A, B ...: equally right, confidence off by the given amounts."""
    rows = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        base = 0.5 + 0.3 * torch.rand(600, generator=generator)
        labels = (torch.rand(600, generator=generator) > base).long()
        for name, off in zip("ABC", shifts_of_confidence, strict=False):
            p = torch.stack([base + off, 1 - base - off], 1)
            found = common.Prediction(torch.randn(600, 3, generator=generator), p.log(), labels)
            rows.append(carot.row_of(name, seed, {common.ID: found, "far": found}))
    return rows


def test_what_the_images_add_to_the_ece_has_it_as_its_mean():
    for row in made_rows(0.0, 0.15):
        for split, ece in row.numbers["measures"]["ECE"].items():
            assert carot.ece_share(row, split).mean() == pytest.approx(ece)


def test_the_interval_of_one_run_is_a_bootstraps():
    rows = [r for r in made_rows(0.05, 0.15) if r.seed == 0]
    _, (_, low, high) = common.gain(rows, "B", "A", carot.ece_share)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(400):
        index, eces = torch.from_numpy(rng.integers(600, size=600)), []
        for row in rows:  # A, B
            confidence, right = row.tensors["confidence"]["far"][index], row.right["far"][index]
            p = torch.stack([confidence, 1 - confidence], 1)
            eces.append(common.ece(p, (~right).long()))
        drawn.append(eces[1] - eces[0])
    assert high - low == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.25)


def test_the_summary_names_the_side_on_which_the_intervals_lie(capsys):
    rows = made_rows(0.0, 0.15, 0.05)
    names = {"A": "CaRot", "B": "FLYP", "C": "ZS"}
    rows = [dataclasses.replace(r, method=names[r.method]) for r in rows]
    carot.summary(rows)
    text = " ".join(capsys.readouterr().out.split())
    assert "more under shift than each of them, stays open" in text
    assert "less than each of them, holds here" in text
    other = {"CaRot": "FLYP", "FLYP": "CaRot", "ZS": "ZS"}
    carot.summary([dataclasses.replace(r, method=other[r.method]) for r in rows])
    assert "is contradicted here" in capsys.readouterr().out


def test_printed_averages_are_the_means_of_their_rows_but_for_the_noted_slips():
    slips, noted = set(), set()
    for block in json.loads((common.EMBEDDED / "carot_paper.json").read_text())["tables"]:
        table, tolerance = block["table"][:7], 5e-3 if block["metric"] == "accuracy" else 5e-5
        noted |= {(table, note.split(":")[0]) for note in block["notes"]}
        for method, _, *cells in block["rows"]:
            if "-" not in cells:  # one ECE of the RN50 is left out
                *shifts, printed = map(float, cells)
                if abs(sum(shifts) / 5 - printed) > tolerance + 1e-9:
                    slips.add((table, method))
    assert slips == {("Table 2", "ZS"), ("Table 3", "FLYP")} and slips <= noted


def test_defaults_are_the_papers_and_its_commands():
    c = carot.Config()
    assert (c.model, c.pretrained, c.epochs, c.batch) == ("ViT-B-16", "openai", 10, 512)
    assert (c.oc, c.sd, c.ema_every, c.warmup) == (0.2, 1.5, 500, 500)
    assert (c.lr, c.lr_ft, c.lr_lp) == (1e-5, 3e-5, 1e-2)
    assert (c.weight_decay, c.cross_fnorm) == (0.1, 0.05)
    assert (c.oc_form, c.cross_form) == ("code", "code")  # T2, T4


# end to end


def test_an_epoch_prints_every_table_and_vrf_takes_the_model(tmp_path, capsys, monkeypatch):
    sets = {"train": 1200, "val": 100, "test": 400, "uci": 100, "fonts": 100}
    small.use_digits(monkeypatch, small.few_digits(tmp_path / "digits", sets))
    words = "--epochs 1 --batch 60 --warmup 4 --device cpu --out".split() + [str(tmp_path)]
    rows = carot.main([*words, "--methods", "FLYP,CaRot"])
    text = capsys.readouterr().out
    for title in ("accuracy in %", "ECE over each whole set", "sigma_min", "\n3. Under"):
        assert title in text
    by = {r.method: r for r in rows}
    assert list(by) == ["ZS", "FLYP", "CaRot"]
    acc = {m: common.accuracies(rows, m) for m in ("ZS", "FLYP", "CaRot")}
    assert acc["FLYP"]["test"] > acc["ZS"]["test"] + 1 < acc["CaRot"]["test"]
    assert list(by["CaRot"].right) == ["test", "UCI", "Fonts"]  # no val
    assert len(by["CaRot"].numbers["spectrum"]) == 64
    with open(tmp_path / "figures/carot.csv", newline="") as file:
        table = list(csv.DictReader(file))
    (point,) = [r for r in table if r["figure"] == "1 left" and r["series"] == "CaRot"]
    expected = acc["CaRot"]["test"], common.mean_shift(acc["CaRot"])
    assert (float(point["x"]), float(point["y"])) == pytest.approx(expected)
    model = str(tmp_path / "models/carot-0.pt")
    config, data, clip, zero_shot = vrf.prepare(["--finetuned", model, "--out", str(tmp_path)])
    models = {"": common.load_finetuned(model, False, data, clip, zero_shot)}
    found = common.predict(config, models, data.shifts[0], clip)[""]
    assert torch.equal(found.right, by["CaRot"].right["UCI"])
    assert not torch.equal(found.right, by["ZS"].right["UCI"])


def test_an_imagenet_run_has_the_papers_tables_beside_its_own(capsys):
    rows, data = made_rows(0.0, 0.1), digits()
    data.kind = "imagenet"
    for model, names in (("ViT-B-16", "Table 2|Table 3"), ("RN50", "7 and H"), ("x", "")):
        carot.print_tables(carot.Config(model=model), data, rows)
        text = capsys.readouterr().out
        assert "ECE, mean over batches of 512 (T7)" in text
        assert text.count("\npaper, ") == 2 * bool(names)
        assert all(n in text for n in names.split("|"))


def test_an_imagenet_tree_is_trained_on_with_its_80_templates(tmp_path, capsys):
    for folder in ("train", "val", "sketch"):
        for i, wnid in enumerate(("n01440764", "n01443537")):  # the first two of the 1000
            place = tmp_path / "tree" / folder / wnid
            place.mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (40, 40), (80 * i, 60 * k, 9)).save(place / f"{k}.JPEG")
    words = "--model tiny_clip --pretrained random --epochs 1 --batch 4 --micro-batch 3 --warmup 1"
    words += " --methods CaRot --ema-every 1 --device cpu --precision bf16"
    carot.main(["--data", f"{tmp_path}/tree", "--out", f"{tmp_path}/out", *words.split()])
    text = capsys.readouterr().out
    assert "zero-shot head: 2 names x 80 prompts" in text and "mean over batches of 512" in text
    assert "ImageNet-Sketch" in text
