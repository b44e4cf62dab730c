"""CaRot: Towards Calibrated Robust Fine-Tuning of Vision-Language Models.
Oh, Lim, Kim, Han, Yun, Choo, Hauptmann, Cheng, Song; NeurIPS 2024; arXiv 2311.01723 (v7).

Robust fine-tuning (LP-FT, FLYP) of CLIP on ImageNet gives a model that is more accurate under shift
(OOD) than zero-shot CLIP, and worse calibrated: its confidences promise more than it keeps. The
paper bounds the OOD error and the OOD calibration error by one expression, and two of its terms can
be lowered with in-distribution (ID) data: the ID calibration error, and the inverse of the smallest
singular value of the covariance of the ID representations. CaRot fine-tunes both towers with the
contrastive loss (as FLYP does). For the singular value it keeps the image projection close to
orthonormal; for the calibration it learns from a slow average of itself.

    Sec. 3  Ineqs. 1, 2  smallest singular value         singular_values
    Sec. 4  Eq. 3        contrastive loss and R          contrastive, cross_term (T4)
            Eq. 4        orthogonality constraint        orthogonality (T2)
            Eq. 5        self-distillation               self_distillation (T5)
            no number    the sum of all                  carot_loss
            EMA teacher  average of the weights          momentum, ema (T6)
    Sec. 5  Tabs. 2, 3, Figs. 1, 6                       evaluate, figure
            Lipsum-FT, a rival in Tabs. 2, 3             lab/lipsum_ft.py (T20)
            Tabs. 4, 5, A-G, Figs. 4, 5, B               lab/carot_ablations.py

    python carot.py                   # embedded digits, 4 minutes; CaRot: ID 93, shifts 75
    python carot.py --data /imagenet  # CLIP ViT-B/16; not measured by us; paper: shifts 62.55

Where the paper, the authors' code and this script part is marked at its line (grep Differs, also in
common.py); the reasons stand in docs/differences.md: A10 ID val a held-out part of train, T2, T4
forms of the losses (--oc-form paper and --cross-form paper are the paper's), T3 W_v of ResNets, T5
cross-entropy for KL, T6 ramp of the momentum, T7 ECE over whole sets, T10 BatchNorm, T11 clipping,
T12 pieces, T18 features of sigma_min.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import json
import operator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from common import arg

METHODS = ("FT", "LP-FT", "FLYP", "CaRot")
# Scaled to 3,000 images: rates by ID val (data/README.md), lambdas the paper's; warm-up a tenth of
# the 376 steps, 47 updates of the teacher (the paper's 25,030 steps have 51).
PRESETS = {"digits": {"epochs": 8, "batch": 64, "lr": 2e-4, "lr_ft": 2e-4, "lr_lp": 1e-1}}
PRESETS["digits"] |= {"warmup": 38, "ema_every": 8}


# Defaults of common.Run: ViT-B-16 (and RN50, ViT-L-14), 10 epochs (App. A.3); weight decay 0.1, 500
# steps of warm-up, gradients clipped to norm 1 (FT, LP-FT), of the authors' code, which has fp16 in
# autocast. Differs (A10): 2 % of ImageNet's training images are held out here, too, though nothing
# is chosen on them, so that vrf.py --finetuned and the lab can; --selection code trains on all.
@dataclass
class Config(common.Run):
    methods: str = arg("FT,LP-FT,FLYP,CaRot", "what to train, comma-separated")
    oc: float = arg(0.2, "lambda_OC; App. A.3")
    sd: float = arg(1.5, "lambda_SD; App. A.3")
    oc_form: str = arg("code", "L_OC. code: norm, paper: its square (T2)", "paper code")
    cross_fnorm: float = arg(0.05, "coefficient of R; authors' commands for CaRot (T4)")
    cross_form: str = arg("code", "R. code: norm, paper: half its square (T4)", "paper code")
    ema_every: int = arg(500, "steps between updates of the teacher; App. A.3", least=1)
    batch: int = arg(512, "App. A.3; also how many texts an image is compared with", least=1)
    micro_batch: int = arg(0, "FLYP, CaRot: pairs held in memory at once, same gradient; 0: all")
    lr: float = arg(1e-5, "FLYP, CaRot; App. A.3")
    lr_ft: float = arg(3e-5, "FT, second half of LP-FT; App. A.3")
    lr_lp: float = arg(1e-2, "first half of LP-FT, on a random head; App. A.3")
    out: str = arg("runs/carot", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def similarity(f, g, s):
    """s f_i.g_j of L2-normalised features; row i: image i, column j: text j.  2 x [B, D] -> [B, B]

    s = exp(logit_scale), which is trained and not clamped.
    """
    if f.dtype in (torch.float16, torch.bfloat16):  # under autocast
        f, g = f.float(), g.float()
    return s * F.normalize(f, dim=1) @ F.normalize(g, dim=1).T


def contrastive(logits):
    """Eq. (3): L_MCL = 1/2B sum_i -log softmax(logits_i.)_i + -log softmax(logits_.i)_i.
    [B, B] -> []

    The other pairs of a batch are negatives, also those of the same class. The equation's further
    term, R, is `cross_term`.
    """
    i = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, i) + F.cross_entropy(logits.T, i)) / 2


def cross_term(W_v, W_l, form="code"):
    """Eq. (3), R by Sec. 4.1: ||W_v W_l^T||_F^2 / 2, to be multiplied by rho (paper), or
    ||W_v W_l^T||_F (code). It keeps the two towers' features diverse.  [in, D], [in_text, D] -> []

    By the trace of the product of two Gram matrices, which are D x D and not in x in_text.
    """
    square = (W_v.T @ W_v * (W_l.T @ W_l)).sum()
    # Differs (T4): the paper squares the norm and gives no rho; the authors' code takes 0.05 of it
    if form == "paper":
        return square / 2
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def orthogonality(W_v, form="code"):
    """Eq. (4): L_OC = ||W_v^T W_v - I||_F^2 (paper) or ||W_v^T W_v - I||_F (code).  [in, D] -> []

    W_v maps the image tower's width to the D shared dimensions, so I is D x D (T3).
    """
    gap = W_v.T @ W_v - torch.eye(W_v.shape[1], dtype=W_v.dtype, device=W_v.device)
    # Differs (T2): Eq. (4) squares the norm; App. B.2 and the authors' code, with this 0.2, do not
    return gap.square().sum() if form == "paper" else torch.linalg.matrix_norm(gap)


def self_distillation(logits, teacher_logits):
    """Eq. (5): L_SD = 1/B sum_i [KL(q~_i. || q_i.) + KL(q~_.i || q_.i)], here plus the entropies of
    all q~, which have no gradient (T5).  2 x [B, B] -> []

    q is a softmax: q_i. over the texts of the batch for image i, q_.i over its images for text i;
    q~ is the teacher's, with its own s. There is no further temperature, and the two directions are
    summed, where Eq. (3) halves.
    """
    loss = 0
    for z, z_teacher in ((logits, teacher_logits), (logits.T, teacher_logits.T)):
        # softmax(z).log() would be -inf for a logit that lies 104 below the largest (T9)
        log_q, log_p = F.log_softmax(z, 1), F.log_softmax(z_teacher, 1)
        # Differs (T5): Eq. (5) would have log_p - log_q; this is the authors' cross-entropy
        loss = loss + (log_p.exp() * -log_q).sum(1).mean()
    return loss


FORMS = {"oc": "code", "cross": "code"}  # or "paper" (T2, T4)


def carot_loss(logits, W_v, W_l, teacher_logits=None, oc=0.2, sd=1.5, cross=0.05, forms=FORMS):
    """Sec. 4, without a number: L = L_MCL + lambda_OC L_OC + lambda_SD L_SD, and the cross term.
    2 x [B, B], [in, D], [in_text, D] -> []

    oc, sd: the two lambdas. With both and cross 0 it is FLYP's loss, and W_v, W_l may be None.
    Without teacher_logits, as in step 0, there is no L_SD.
    """
    loss = contrastive(logits)
    if oc:
        loss = loss + oc * orthogonality(W_v, forms["oc"])
    if cross:
        loss = loss + cross * cross_term(W_v, W_l, forms["cross"])
    if sd and teacher_logits is not None:
        loss = loss + sd * self_distillation(logits, teacher_logits)
    return loss


def momentum(step, steps, start=0.05, target=0.9, ramp=0.2):
    """EMA teacher: m(t) = start + (target - start) t / (ramp T) while t < ramp T, then target."""
    # Differs (T6): "raised by 0.05" in App. A.3; in the authors' code 0.05 is where it starts
    return start + (target - start) * step / (ramp * steps) if step < ramp * steps else target


@torch.no_grad()
def ema(psi, theta, m):
    """EMA teacher: psi <- m psi + (1 - m) theta, in place.  2 state dicts, number"""
    for name, p in psi.items():
        # Differs (T10): the authors' code leaves BatchNorm's statistics at their pre-trained values
        p.lerp_(theta[name], 1 - m) if p.is_floating_point() else p.copy_(theta[name])


def singular_values(features):
    """Ineqs. (1), (2), Fig. 6: those of X^T X / N, X the features with mean 0 and variance 1 in
    each dimension; largest first, the last is sigma_min.  [N, D] -> [D]

    Independent dimensions have all 1.
    """
    x = features.double() - features.double().mean(0)
    x = x / x.square().mean(0).sqrt().clamp_min(1e-12)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0).clamp_min(0)


# --- train / prepare ------------------------------------------------------------------------------


class Distilled(nn.Module):
    """A CLIP in training and, on demand, its teacher: one module, so that checkpoints have both."""

    def __init__(self, model, teacher, micro=0):
        super().__init__()
        self.micro = micro  # see `encode`; it changes no gradient, and no name of a checkpoint
        self.student = copy.deepcopy(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False) if teacher else None
        self.register_buffer("updates", torch.tensor(0))  # of the teacher


def projections(model):
    """W_v [in, D] and W_l [in_text, D] of an open_clip model, so that features are x @ W (T3)."""
    image = projection_at(model, "visual.proj", "visual.attnpool.c_proj", "visual.head.proj")
    return image, projection_at(model, "text_projection", "text.text_projection")


def projection_at(model, *places):
    """The first of these attributes that is a matrix or a linear layer. Raises InputError."""
    for place in places:
        with contextlib.suppress(AttributeError):
            found = operator.attrgetter(place)(model)
            if isinstance(found, nn.Parameter):
                return found
            if isinstance(found, nn.Linear):
                return found.weight.T  # Differs (T3): the authors' code multiplies by the module
    cure = "use --oc 0 --cross-fnorm 0, or an architecture of OpenAI's"
    raise common.InputError(f"no linear projection at {', '.join(places)}; {cure}")


def encode(model, images, texts, micro=0):
    """f [B, D], g [B, D] of the pairs of all processes. With `micro` they are encoded that many at
    a time without a graph, and again when the gradient has reached them: exact, for one further
    forward pass, in the memory of one piece.
    """

    def encode_piece(images, texts):
        return model.encode_image(images), model.encode_text(texts)

    if not 0 < micro < len(images):
        pieces = [encode_piece(images, texts)]
    else:  # Differs (T12): the authors have two GPUs. Adding up small batches' gradients, as many
        # do, would be another loss
        parts = zip(images.split(micro), texts.split(micro), strict=True)
        pieces = [checkpoint(encode_piece, *part, use_reentrant=False) for part in parts]
    return [common.gather(torch.cat(features)) for features in zip(*pieces, strict=True)]


def logits_of(model, images, texts, micro=0):
    """Similarities of the pairs of all processes, in fp32 under any autocast."""
    f, g = encode(model, images, texts, micro)
    with torch.autocast(f.device.type, enabled=False):
        return similarity(f, g, model.logit_scale.exp())


def captions(clip, data):
    """Tokens of every class name in every template, [C, T, length]."""
    texts = [template.format(name) for name in data.classes for template in data.templates]
    return clip.tokenizer(texts).reshape(len(data.classes), len(data.templates), -1)


def pairs_from(config, split, clip, tokens, device, first):
    """Yield (images, captions) of every step from `first`: pairs (image, template) are drawn
    without replacement from all N T of them, so that an epoch of N pairs has some images twice and
    others not at all. On ImageNet the order of the 102.5 M pairs takes 0.8 GB.
    """
    n, T = len(split.labels), tokens.shape[1]
    templates = collections.deque()  # of the batches that the loader has asked for in advance
    drawn = common.batches(n * T, config.batch, common.steps_of(config, n), config.seed, first)

    def images_drawn():
        for pairs in map(common.shard, drawn):
            templates.append([pair % T for pair, _ in pairs])
            yield [(pair // T, crop) for pair, crop in pairs]

    transform = common.train_transform(clip.size, clip.mean, clip.std)
    for images, labels in common.load_images(split, transform, images_drawn(), config, device):
        yield images, tokens[labels, templates.popleft()]


def pair_training(config, name, clip, data, extra=None):
    """(Distilled, Training): a copy of the CLIP, to be trained on image-caption pairs with
    `carot_loss`. extra(f, logits) -> [], of image features [B, D], is added to it (the ablations').
    """
    device = common.pick_device(config.device)
    module = Distilled(clip.model, config.sd > 0, config.micro_batch).to(device)
    student, teacher = module.student, module.teacher
    coefficients = config.oc, config.sd, config.cross_fnorm
    forms = {"oc": config.oc_form, "cross": config.cross_form}

    def loss_fn(batch):
        f, g = encode(student, *batch, module.micro)
        taught = None
        if config.sd and module.updates:  # not in step 0, where the teacher is the student
            teacher.eval()  # for BatchNorm
            with torch.no_grad():
                taught = logits_of(teacher, *batch, module.micro)
        W = projections(student) if config.oc or config.cross_fnorm else (None, None)
        with torch.autocast(device.type, enabled=False):
            logits = similarity(f, g, student.logit_scale.exp())
            loss = carot_loss(logits, *W, taught, *coefficients, forms)
            return loss + extra(f, logits) if extra else loss

    tokens = captions(clip, data)
    key = {"ema_every": config.ema_every, "forms": str(forms), "coefficients": str(coefficients)}
    key["captions"] = common.hash_of(tokens)
    key["teacher"] = common.hash_of(common.code_of(update_teacher))  # edited, it trains anew
    key = common.training_key(config, clip, data.train, key, loss_fn)
    batches_from = functools.partial(pairs_from, config, data.train, clip, tokens, device)
    optimiser = common.adamw(config, student)
    return module, common.new_training(config, name, module, optimiser, loss_fn, batches_from, key)


def update_teacher(config, module, done, steps):
    """The teacher moves after the optimiser's steps 0, K, 2 K, ...; K is --ema-every."""
    step = done - 1  # of `steps`; -1 before the first
    if config.sd and step >= 0 and step % config.ema_every == 0:
        m = momentum(step, steps)
        ema(module.teacher.state_dict(), module.student.state_dict(), m)
        module.updates += 1


def train_on_pairs(config, name, clip, data, extra=None):
    """Train a copy of the CLIP as `pair_training` says, by `recipe`'s settings.  -> Distilled"""
    module, training = pair_training(config, name, clip, data, extra)
    steps = common.steps_of(config, len(data.train.labels))
    for done in common.train_steps(config, training):
        update_teacher(config, module, done, steps)
    return module


def recipe(config, method, seed):
    """The settings of one training: what the methods do not have in common."""
    # The contrastive methods' gradients are not clipped, neither here nor in the authors' code.
    # LP-FT is not vrf.py's: its head starts at random, and each stage has half the epochs.
    first_half = max(1, config.epochs // 2)
    changes = {
        "FT": {"lr": config.lr_ft},
        "LP": {"lr": config.lr_lp, "epochs": first_half},
        "LP-FT": {"lr": config.lr_ft, "epochs": max(1, config.epochs - first_half)},
        "FLYP": {"clip": 0.0, "oc": 0.0, "sd": 0.0, "cross_fnorm": 0.0},
        "CaRot": {"clip": 0.0},
    }
    return dataclasses.replace(config, seed=seed, **changes[method])


def as_classifier(config, data, clip, model):
    """Classifier of a fine-tuned CLIP: its image tower, and a head from its own text tower."""
    tuned = dataclasses.replace(clip, model=model.eval())
    return common.classifier(config, data, tuned, next(model.parameters()).device)


def train_models(config, data, clip, zero_shot, seed):
    """{name: Classifier} of ZS and --methods. FLYP's and CaRot's are also written to OUT/models, as
    vrf.py --finetuned takes them.
    """
    models = {"ZS": zero_shot}
    for method in common.choose(config.methods, METHODS, "--methods"):
        settings = recipe(config, method, seed)
        if method in ("FLYP", "CaRot"):
            tuned = train_on_pairs(settings, method, clip, data).student
            models[method] = as_classifier(config, data, clip, tuned)
            kept = {"model": models[method].state_dict(), "quick_gelu": clip.quick_gelu}
            path = f"{config.out}/models/{common.slug(method)}-{seed}.pt"
            common.write_file(path, functools.partial(torch.save, kept))
            continue
        models[method] = model = copy.deepcopy(zero_shot)
        if method == "LP-FT":
            torch.manual_seed(seed)
            random = nn.Linear(model.head.in_features, model.head.out_features)  # on the CPU
            model.head.load_state_dict(random.state_dict())
            common.linear_probe(recipe(config, "LP", seed), "LP", model, data.train, clip)
        common.fine_tune(settings, method, model, data.train, clip)
    return models


# --- evaluate -------------------------------------------------------------------------------------


def ece_per_batch(p, labels, size=512, bins=10):
    """ECE as the authors' code has it (T7): the mean over batches, by their sizes, of each batch's
    ECE, with bins [low, high) and one more for a confidence of exactly 1.  [N, C], [N] -> a share
    """
    edges, error = torch.linspace(0, 1, bins + 1), 0.0
    for q, y in zip(p.split(size), labels.split(size), strict=True):
        confidence, predicted = q.max(1)
        gap = (predicted == y).double() - confidence.double()
        index = torch.bucketize(confidence, edges, right=True) - 1
        error += gap.new_zeros(bins + 1).index_add_(0, index, gap).abs().sum().item()
    return error / len(labels)


def evaluate(config, data, clip, models, seed):
    """A Row of each model."""
    sets = (data.test, *data.shifts)
    found = {split.name: common.predict(config, models, split, clip) for split in sets}
    return [row_of(m, seed, {split: of[m] for split, of in found.items()}) for m in models]


def row_of(method, seed, found):
    """Row from {split: Prediction}. Its numbers: "measures", {measure: {split: value}}, and
    "spectrum", singular values of ID's features. Tensors: "confidence", {split: [N]}.
    """
    p = {split: x.logits.softmax(1) for split, x in found.items()}
    # Differs (T7): the published ECEs are, very likely, those per batch of 512
    measures = {}
    for name, measure in (("ECE", common.ece), ("ECE per 512", ece_per_batch)):
        measures[name] = {split: measure(p[split], x.labels) for split, x in found.items()}
    # Differs (T18): the paper does not say of which features; these are the head's input
    spectrum = singular_values(found[common.ID].features).tolist()
    numbers = {"measures": measures, "spectrum": spectrum}
    tensors = {"confidence": {split: x.amax(1).double() for split, x in p.items()}}
    right = {split: x.right for split, x in found.items()}
    return common.Row(method, seed, right, numbers=numbers, tensors=tensors)


def measured(rows, method, name="ECE"):
    """{split: value}, mean over seeds, of one measure of one method."""
    of_method = [r.numbers["measures"][name] for r in rows if r.method == method]
    return {s: float(np.mean([values[s] for values in of_method])) for s in of_method[0]}


def spectrum_of(rows, method):
    """Singular values of ID's features, largest first, mean over seeds.  -> [D]"""
    return np.mean([r.numbers["spectrum"] for r in rows if r.method == method], 0)


def ece_share(row, split, bins=10):
    """What each image adds to the ECE, which is their mean: its correctness less its confidence,
    with the sign of the sum over its bin.  -> [N]

    For `common.gain`, whose intervals hold that sign fixed: within .002 of a bootstrap's here.
    """
    confidence = row.tensors["confidence"][split]
    gap, index = row.right[split].double() - confidence, common.bin_of(confidence, bins)
    return (gap * gap.new_zeros(bins).index_add_(0, index, gap).sign()[index]).numpy()


def calibration_table(rows, name, title):
    """Table of one measure and of sigma_min on ID: a line per method, a column per split."""
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        value = measured(rows, method, name)
        cells = [f"{x:.3f}" for x in (*value.values(), common.mean_shift(value))]
        lines.append([method, *cells, f"{spectrum_of(rows, method)[-1]:.4f}"])
    return common.table(["method", *rows[0].right, "avg shift", "sigma_min"], lines, title)


def print_tables(config, data, rows):
    """Tabs. 2 and 3 in their form, sigma_min, and for ImageNet the paper's numbers."""
    runs = f"mean of {config.seeds} run{'s' * (config.seeds > 1)}"
    print("\n" + common.accuracy_table(rows, f"accuracy in % (test: ID), {runs}"))
    print("\n" + calibration_table(rows, "ECE", f"ECE over each whole set, 10 bins, {runs}"))
    if data.kind == "imagenet":  # to compare with the paper's Table 3
        title = f"ECE, mean over batches of 512 (T7), {runs}"
        print("\n" + calibration_table(rows, "ECE per 512", title))
    for block in json.loads((common.EMBEDDED / "carot_paper.json").read_text())["tables"]:
        if (config.model, data.kind) == (block["model"], "imagenet"):
            print("\n" + common.table(block["columns"], block["rows"], f"paper, {block['table']}"))
            print("\n".join(block["notes"]))


def figure(config, rows):
    """Fig. 1: accuracy under shift over ID accuracy and over negative ECE. Fig. 6: the spectrum."""
    header = ["figure", "series", "x", "y"]
    with common.figure(f"{config.out}/figures/carot", header, columns=3) as (axes, numbers):
        left, middle, right = axes[0]
        for method in dict.fromkeys(r.method for r in rows):
            accuracy = common.accuracies(rows, method)
            x, y = accuracy[common.ID], common.mean_shift(accuracy)
            ece = common.mean_shift(measured(rows, method))
            spectrum = spectrum_of(rows, method)[-20:]
            left.plot(x, y, "o", label=method)
            middle.plot(-ece, y, "o")
            right.plot(range(1, len(spectrum) + 1), spectrum, ".-")
            numbers += [("1 left", method, x, y), ("1 right", method, -ece, y)]
            numbers += [("6", method, k, float(v)) for k, v in enumerate(spectrum, 1)]
        left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        middle.set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
        right.set(xlabel="the last 20 singular values of ID's features", ylabel="singular value")
        right.set_xticks([1, 5, 10, 15, 20])
        left.legend(loc="lower left")


def verdict(low, high):
    """What a 95 % interval says of the claim that it is above 0."""
    return "holds here" if low > 0 else "is contradicted here" if high < 0 else "stays open"


def summary(rows):
    """Three sentences on the paper's claims, computed from the table."""
    methods = list(dict.fromkeys(r.method for r in rows))
    others = [m for m in methods if m not in ("ZS", "CaRot")]
    if "CaRot" not in methods or not others:
        return
    points, shares = "{:+.2f} [{:+.2f}, {:+.2f}]", "{:+.3f} [{:+.3f}, {:+.3f}]"
    accuracies = {m: common.mean_shift(common.accuracies(rows, m)) for m in others}
    best = max(accuracies, key=accuracies.get)
    own, shift = common.gain(rows, "CaRot", best)
    print(f"\n1. CaRot less {best}, the most accurate under shift of {', '.join(others)}:")
    print(f"   {points.format(*own)} points on ID, {points.format(*shift)} under shift.")
    print(f"   The paper's claim, more under shift than each of them, {verdict(*shift[1:])}.")
    eces = {m: common.mean_shift(measured(rows, m)) for m in others}
    best = min(eces, key=eces.get)
    _, (less, low, high) = common.gain(rows, "CaRot", best, ece_share)
    print(f"2. ECE under shift, CaRot less {best}, the best calibrated of them:")
    gap, claim = shares.format(less, low, high), verdict(-high, -low)
    print(f"   {gap}. The claim, less than each of them, {claim}.")
    _, shift = common.gain(rows, "CaRot", "ZS")
    _, ece = common.gain(rows, "CaRot", "ZS", ece_share)
    gaps = f"{points.format(*shift)} points, ECE {shares.format(*ece)}"
    print(f"3. Under shift, CaRot less zero-shot: {gaps}. In")
    print("   the paper (ViT-B/16) CaRot is the more accurate, zero-shot the better calibrated.")
    print(f"(95 % intervals over {common.sampled(rows)}, the sets fixed.)")


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None, doc=__doc__):
    """Command line -> config, data, CLIP, zero-shot Classifier; the lab starts here, too."""
    config, data = common.setup(Config, argv, doc, PRESETS)
    methods = common.choose(config.methods, METHODS, "--methods")
    common.note_idle(
        config,
        ema_every=not config.sd and "with --sd 0",
        oc_form=not config.oc and "with --oc 0",
        cross_form=not config.cross_fnorm and "with --cross-fnorm 0",
    )
    steps = common.steps_of(config, len(data.train.labels))
    if config.sd and config.ema_every > steps / 10 and "ema_every" not in config.given:
        config.ema_every = max(1, steps // 50)  # the paper's 25,030 steps have 51 updates
        print(f"teacher: updated every {config.ema_every} of the {steps} steps")
    clip, zero_shot = common.zero_shot(config, data)
    # What cannot be trained is refused now, and not after the hours of the methods before it.
    if "CaRot" in methods and (config.oc or config.cross_fnorm):
        projections(clip.model)
    if config.micro_batch and any(isinstance(m, nn.BatchNorm2d) for m in clip.model.modules()):
        reason = "BatchNorm sees a piece at a time; it would not be the whole batch's gradient"
        raise common.InputError(f"--micro-batch with {clip.name}: {reason}")
    return config, data, clip, zero_shot


def main(argv=None):
    config, data, clip, zero_shot = prepare(argv)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        models = train_models(config, data, clip, zero_shot, seed)
        rows += evaluate(config, data, clip, models, seed)
    common.write_results(config, zero_shot.head.weight.device, rows)
    print_tables(config, data, rows)
    if data.shifts:
        figure(config, rows)
        summary(rows)
    return rows


if __name__ == "__main__":
    common.run(main)
