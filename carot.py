"""CaRot: Towards Calibrated Robust Fine-Tuning of Vision-Language Models.
Oh, Lim, Kim, Han, Yun, Choo, Hauptmann, Cheng, Song; NeurIPS 2024; arXiv 2311.01723 (v7).

Fine-tuned CLIP is more accurate under shift (OOD) than zero-shot CLIP and worse calibrated. OOD
error and OOD calibration error have one upper bound, made of two things that in-distribution (ID)
data can lower: the ID calibration error, and the inverse of the smallest singular value of the ID
representations' covariance. CaRot trains both towers contrastively (FLYP), keeps the image
projection near orthonormal for the second, and learns from a slow average of itself for the first.

    Sec. 3  Ineqs. 1, 2  sigma_min of the bound        singular_values
    Sec. 4  Eq. 3        contrastive loss (FLYP's)     contrastive
            Eq. 4        orthogonality constraint      orthogonality, cross_fnorm (T4)
            Eq. 5        self-distillation             self_distillation
            Eq. 6        all of it                     total
            EMA teacher                                momentum, ema
    Sec. 5  Tabs. 2, 3, Figs. 1, 6, B                  evaluate, figure
            Tabs. 4, 5, A, Figs. 4, 5                  studies/carot_ablations.py

    python carot.py                   # embedded digits, 3 minutes; CaRot: ID 93, shifts 75
    python carot.py --data /imagenet  # CLIP ViT-B/16; not measured by us; paper: shifts 62.55

Differs from the paper (P) or the authors' code (C); the README has reasons under the same IDs:
T2  L_OC is the norm, as in C; P squares it. --oc-form paper.
T4  C adds 0.05 ||W_v W_t^T||_F, which P has not; so do we. --cross-fnorm 0 leaves it out.
T5  L_SD is C's cross-entropy; P has KL: same gradient, smaller value. --sd-form paper.
T3  RN50: W_v is the layer's weight transposed, so that I is 1024 x 1024; C's line cannot run.
T7  ECE is over the whole set; C averages it over batches of 512, which adds .03 to .04: P's numbers
    must be compared with the rows "per 512".
T10 the teacher's BatchNorm statistics are averaged with its weights; C leaves them pre-trained.
T11 gradients of FLYP and CaRot are not clipped, those of FT are, after unscaling; C: before.
T12 --micro-batch has the gradient of the whole batch; accumulation, as in C's forks, has not.
T18 sigma_min is of the ID test set's features behind the projection; P does not say which.
TS  temperatures have the least NLL, P least ECE: --temperature paper. A10: ID val is part of train.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
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
PRESETS = {  # scaled to 3,000 images; rates by ID val (data/README.md), lambdas the paper's
    "digits": {
        "model": "tiny_clip",
        "weights": str(common.EMBEDDED / "tiny_clip.npz"),
        "epochs": 8,
        "batch": 64,
        "lr": 2e-4,
        "lr_ft": 2e-4,
        "lr_lpft": 1e-4,
        "warmup": 38,  # a tenth of the steps
        "ema_every": 8,  # of 376 steps: 47 updates; the paper's 500 of 25,030: 51
    }
}


@dataclass
class Config:
    data: str = arg("digits", "digits; folder: ImageNet, CIFAR-10, train/ val/; entity30:FOLDER")
    model: str = arg("ViT-B-16", "open_clip architecture; paper: ViT-B-16, RN50, ViT-L-14")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    methods: str = arg("FT,LP-FT,FLYP,CaRot", "what to train, comma-separated")
    oc: float = arg(0.2, "lambda_OC; Tab. 5")
    sd: float = arg(1.5, "lambda_SD; Tab. 5")
    oc_form: str = arg(
        "code", "L_OC. code: norm, paper: squared (T2), svd: Tab. A", "paper code svd"
    )
    cross_fnorm: float = arg(0.05, "its coefficient; authors' commands. Eq. 4 has none: 0 (T4)")
    sd_form: str = arg("code", "L_SD. code: cross-entropy, paper: KL (T5)", "paper code")
    ema_every: int = arg(500, "steps between updates of the teacher; Sec. 5", least=1)
    teacher: bool = arg(False, "a row for CaRot's teacher, too; the authors evaluate the student")
    epochs: int = arg(10, "Sec. 5", least=1)
    batch: int = arg(512, "Sec. 5; also how many texts an image is compared with", least=1)
    micro_batch: int = arg(0, "FLYP, CaRot: pairs held in memory at once, same gradient; 0: all")
    lr: float = arg(1e-5, "FLYP and CaRot; authors' code")
    lr_ft: float = arg(3e-5, "FT; authors' code")
    lr_lpft: float = arg(1e-5, "second stage of LP-FT; ours, from VRF's App. C.1")
    lr_lp: float = arg(0.1, "its linear probe; ours, from VRF's App. C.1")
    weight_decay: float = arg(0.1, "AdamW, all parameters; authors' code")
    warmup: int = arg(500, "steps of linear warm-up; authors' code")
    clip: float = arg(1.0, "largest gradient norm of FT, LP-FT; authors' code (T11)")
    temperature: str = arg(
        "nll", "of rows +TS, on ID val: least NLL; paper: least ECE", "nll paper"
    )
    selection: str = arg(
        "paper", "paper: on ID val; code: on the reported ID set (A10)", "paper code"
    )
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "number of fine-tuning runs", least=1)
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; authors' code: fp16", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(-1, "processes that decode; -1: one per core on a GPU, else none", least=-1)
    skip_bad_images: bool = arg(False, "leave unreadable images out instead of stopping")
    resume: bool = arg(True, "continue unfinished training, reuse finished")
    out: str = arg("runs/carot", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def wide(x):
    """fp16 and bf16 as fp32, the rest as it is: in half precision a softmax loses its tail (T9)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def similarity(f, g, s):
    """s f_i.g_j of L2-normalised features; row i: image i, column j: text j.  2 x [B, D] -> [B, B]

    s = exp(logit_scale), which is trained and not clamped.
    """
    f, g = F.normalize(wide(f), dim=1), F.normalize(wide(g), dim=1)
    return s * f @ g.T


def contrastive(logits):
    """Eq. (3): L_MCL = 1/2B sum_i -log softmax(logits_i.)_i + -log softmax(logits_.i)_i.  [B, B]

    The other pairs of a batch are negatives, also those of the same class.
    """
    logits, i = wide(logits), torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, i) + F.cross_entropy(logits.T, i)) / 2


def orthogonality(W_v, form="code"):
    """Eq. (4): L_OC = ||W_v^T W_v - I||_F^2 (paper) or ||W_v^T W_v - I||_F (code).  [in, D] -> []

    W_v maps the image tower's width to the D shared dimensions, so I is D x D (T3). svd: the rival
    of App. Tab. A, whose formula we do not know; here sum_i (sigma_i - 1)^2.
    """
    W_v = wide(W_v)
    if form == "svd":
        return (torch.linalg.svdvals(W_v) - 1).square().sum()
    gap = W_v.T @ W_v - torch.eye(W_v.shape[1], dtype=W_v.dtype, device=W_v.device)
    # Differs (T2): Eq. (4) squares the norm, the authors' code does not, and its 0.2 goes with that
    return gap.square().sum() if form == "paper" else torch.linalg.matrix_norm(gap)


def cross_fnorm(W_v, W_t):
    """||W_v W_t^T||_F, in none of the equations (T4).  [in, D], [in_text, D] -> []

    By the trace of the Gram matrices' product, which are D x D and not in x in_text.
    """
    W_v, W_t = wide(W_v), wide(W_t)
    return (W_v.T @ W_v * (W_t.T @ W_t)).sum().clamp_min(torch.finfo(W_v.dtype).tiny).sqrt()


def self_distillation(logits, teacher_logits, form="code"):
    """Eq. (5): L_SD = 1/B sum_i KL(q~_i. || q_i.) + KL(q~_.i || q_.i), q softmax.  2 x [B, B] -> []

    q: over the texts of the batch for each image, over its images for each text; q~: the teacher's,
    with its own s. No further temperature; summed over both, where Eq. (3) halves. code:
    cross-entropies -sum q~ log q, which have the same gradient and are larger by q~'s entropy (T5).
    """
    logits, teacher_logits = wide(logits), wide(teacher_logits)
    loss = 0
    for z, z_teacher in ((logits, teacher_logits), (logits.T, teacher_logits.T)):
        log_q, log_p = F.log_softmax(z, 1), F.log_softmax(z_teacher, 1)
        # Differs (T5): Eq. (5) is a KL divergence, the authors' code leaves the entropy of q~ in
        gap = log_p - log_q if form == "paper" else -log_q
        loss = loss + (log_p.exp() * gap).sum(1).mean()
    return loss


def total(
    logits,
    W_v,
    W_t,
    teacher_logits=None,
    mcl=1.0,
    oc=0.2,
    sd=1.5,
    cross=0.0,
    oc_form="code",
    sd_form="code",
):
    """Eq. (6): L = L_MCL + lambda_OC L_OC + lambda_SD L_SD (+ cross ||W_v W_t^T||_F, T4).  -> []

    oc, sd: the two lambdas. Both and cross 0: FLYP. No teacher_logits, as in step 0: no L_SD.
    mcl: 1 but in Table 4's rows without L_MCL.
    """
    loss = mcl * contrastive(logits)
    if oc:
        loss = loss + oc * orthogonality(W_v, oc_form)
    if cross:  # Differs (T4): Eq. (4) does not have it, every published command does
        loss = loss + cross * cross_fnorm(W_v, W_t)
    if sd and teacher_logits is not None:
        loss = loss + sd * self_distillation(logits, teacher_logits, sd_form)
    return loss


def momentum(step, steps, start=0.05, target=0.9, ramp=0.2):
    """m(t) = start + (target - start) t / (ramp T) while t < ramp T, then target (T6)."""
    return start + (target - start) * step / (ramp * steps) if step < ramp * steps else target


@torch.no_grad()
def ema(psi, theta, m):
    """psi <- m psi + (1 - m) theta, in place.  teacher's and student's state dict, number"""
    for name, p in psi.items():
        # Differs (T10): the authors' code leaves BatchNorm's statistics at their pre-trained values
        p.lerp_(theta[name], 1 - m) if p.is_floating_point() else p.copy_(theta[name])


def singular_values(features):
    """Ineq. (1), Fig. 6: those of I^T I / N, I the features with mean 0 and variance 1 in each
    dimension; largest first, the last is sigma_min. Independent dimensions: all 1.  [N, D] -> [D]
    """
    x = features.double() - features.double().mean(0)
    x = x / x.square().mean(0).sqrt().clamp_min(1e-12)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0).clamp_min(0)


# --- train / prepare ------------------------------------------------------------------------------


class Distilled(nn.Module):
    """A CLIP in training and, on demand, its teacher: one module, so that checkpoints have both."""

    def __init__(self, model, teacher):
        super().__init__()
        self.student = copy.deepcopy(model)
        self.teacher = copy.deepcopy(model).requires_grad_(False) if teacher else None
        self.register_buffer("updates", torch.tensor(0))  # of the teacher

    def train(self, mode=True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def projections(model):
    """W_v [in, D] and W_t [in_text, D] of an open_clip model, so that features are x @ W (T3)."""

    def find(module, *places):
        for place in places:
            try:
                found = operator.attrgetter(place)(module)
            except AttributeError:
                continue
            if isinstance(found, (nn.Linear, nn.Parameter)):
                # Differs (T3): for ResNets the authors' code multiplies by the module itself
                return found.weight.T if isinstance(found, nn.Linear) else found
        where = f"{', '.join(places)} of {type(module).__name__}"
        cure = "use --oc 0 --cross-fnorm 0, or an architecture of OpenAI's"
        raise common.InputError(f"no linear projection at {where}; {cure}")

    visual = find(model.visual, "proj", "attnpool.c_proj", "head.proj")
    return visual, find(model, "text_projection", "text.text_projection")


def encode(model, images, texts, micro=0):
    """f [B, D], g [B, D]. micro: in pieces, each computed without a graph and once more when the
    gradient has reached it: exact, for one further forward pass and the memory of a piece (T12).
    """

    def piece(images, texts):
        return model.encode_image(images), model.encode_text(texts)

    if not 0 < micro < len(images):
        return piece(images, texts)
    # Differs (T12): adding up gradients of small batches, as users of the code do, is another loss
    parts = zip(images.split(micro), texts.split(micro), strict=True)
    parts = [checkpoint(piece, *part, use_reentrant=False) for part in parts]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def captions(clip, data):
    """Tokens of every class name in every template, [C, T, length]."""
    texts = [template.format(name) for name in data.classes for template in data.templates]
    return clip.tokenizer(texts).reshape(len(data.classes), len(data.templates), -1)


def pairs_from(config, split, clip, tokens, seed, first):
    """Yield (images, captions, index) from step `first`: (image, template) drawn without
    replacement from all T N of them, so that an epoch of N pairs has some images twice and others
    not at all.

    On ImageNet the order of the 102.5 M pairs takes 0.8 GB.
    """
    n, T = len(split.labels), tokens.shape[1]
    order = common.batches(n * T, config.batch, common.steps_of(config, n), seed, first)
    order = map(common.mine, order)
    drawn, order = itertools.tee(order)
    order = ([(pair // T, crop) for pair, crop in rows] for rows in order)
    transform = common.train_transform(clip.size, clip.mean, clip.std)
    for rows, batch in zip(drawn, common.load_images(split, transform, order, config), strict=True):
        if batch is None:
            yield None
            continue
        images, labels, index = batch
        read = set(index.tolist())  # --skip-bad-images leaves some out
        template = [pair % T for pair, _ in rows if pair // T in read]
        texts = tokens[labels, torch.tensor(template, dtype=torch.int64)]
        yield images, texts if len(texts) else tokens[0, :1], index


def fine_tune(config, name, clip, data, seed, mcl=1.0, oc=0.0, sd=0.0, cross=0.0, watch=None):
    """Train a copy of the CLIP with Eq. (6) on image-caption pairs; FLYP: oc, sd and cross 0.
    watch(n, module) is called when n steps are done, 0 included.

    Returns the Distilled module. Raises InputError for --micro-batch with BatchNorm.
    """
    # Differs (T11): FT is clipped after unscaling, by common.fit; the authors' code clips before
    config = dataclasses.replace(config, clip=0.0)
    device, n = common.pick_device(config.device), len(data.train.labels)
    tokens, steps = captions(clip, data), common.steps_of(config, n)
    module = Distilled(clip.model, teacher=sd > 0).to(device)
    if config.micro_batch and any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        reason = "BatchNorm sees a piece at a time; it would not be the whole batch's gradient"
        raise common.InputError(f"--micro-batch with {clip.name}: {reason}")

    def logits_of(model, batch):
        images, texts, index = batch
        f, g = encode(model, images, texts, config.micro_batch)
        f, g = (common.gather(x, len(index)) for x in (f, g))
        with torch.autocast(device.type, enabled=False):
            return similarity(f, g, model.logit_scale.exp())

    def loss_fn(batch):
        logits, taught = logits_of(module.student, batch), None
        if sd and module.updates:  # not in step 0: the teacher is the student then
            with torch.no_grad():
                taught = logits_of(module.teacher, batch)
        W = projections(module.student) if oc or cross else (None, None)
        with torch.autocast(device.type, enabled=False):
            return total(logits, *W, taught, mcl, oc, sd, cross, *forms)

    def probe(done):
        """The teacher's update after steps 0, K, 2 K ...; a resumed run asks again: not twice."""
        step = done - 1
        due = sd and step % config.ema_every == 0
        if due and module.updates == step // config.ema_every:
            m = momentum(step, steps)
            ema(module.teacher.state_dict(), module.student.state_dict(), m)
            module.updates += 1
        if watch:
            watch(done, module)

    forms = config.oc_form, config.sd_form
    said = {"mcl": mcl, "oc": oc, "sd": sd, "cross": cross, "captions": common.hash_of(tokens)}
    said |= {"forms": " ".join(forms), "ema_every": config.ema_every}
    common.train_by(
        config,
        name,
        module,
        module.student,
        loss_fn,
        lambda first: pairs_from(config, data.train, clip, tokens, seed, first),
        n,
        data.train,
        clip,
        config.lr,
        seed,
        probe=probe if sd or watch else None,
        also=said,
    )
    return module


def train_models(config, data, clip, zero_shot, seed):
    """{name: Classifier} of ZS and --methods. FLYP's and CaRot's heads come from their text towers;
    each is also written to OUT/models as vrf.py --finetuned takes it.
    """
    wanted, models = common.choose(config.methods, METHODS, "--methods"), {"ZS": zero_shot}
    device = zero_shot.head.weight.device
    probe = "LP-FT" in wanted
    recipes = {
        "LP": (probe, "ZS", common.linear_probe, config.lr_lp),
        "FT": ("FT" in wanted, "ZS", common.fine_tune, config.lr_ft),
        "LP-FT": (probe, "LP", common.fine_tune, config.lr_lpft),
    }
    for name, (asked, start, train, lr) in recipes.items():
        if asked:
            models[name] = copy.deepcopy(models[start])
            train(config, f"{name}, seed {seed}", models[name], data.train, clip, lr, seed)
    lambdas = {"FLYP": {}, "CaRot": {"oc": config.oc, "sd": config.sd, "cross": config.cross_fnorm}}
    for name, given in lambdas.items():
        if name in wanted:
            module = fine_tune(config, f"{name}, seed {seed}", clip, data, seed, **given)
            towers = {name: module.student}
            if config.teacher and module.teacher is not None:
                towers[f"{name} teacher"] = module.teacher
            for row, model in towers.items():
                tuned = dataclasses.replace(clip, model=model.eval())
                models[row] = common.classifier(config, data, tuned, device)
                kept = {"model": models[row].state_dict(), "quick_gelu": clip.quick_gelu}
                path = f"{config.out}/models/{common.slug(row)}-{seed}.pt"
                common.try_write(path, functools.partial(torch.save, kept))
    rows = ["ZS", *(row for w in wanted for row in (w, f"{w} teacher") if row in models)]
    return {name: models[name] for name in rows}


# --- evaluate -------------------------------------------------------------------------------------
# Measures of a table's cell: probabilities [N, C], labels [N] -> a share, or nats.


def bin_of(p, bins):
    """Index of the bin of equal width, (low, high], as in common.ece.  any shape"""
    return (p * bins).ceil().long().clamp(1, bins) - 1


def ece_per_batch(p, labels, size=512):
    """The authors' code: mean over batches, by their sizes, of each batch's ECE (T7)."""
    parts = zip(p.split(size), labels.split(size), strict=True)
    return sum(common.ece(q, y) * len(y) for q, y in parts) / len(labels)


def adaptive_ece(p, labels, bins=10):
    """ECE over bins of equal count; equal confidences may be parted, in the order of the images."""
    confidence, predicted = p.double().max(1)
    order = confidence.argsort(stable=True)
    gap = ((predicted == labels).double() - confidence)[order]
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(labels)


def classwise_ece(p, labels, bins=10):
    """Mean over classes c of the ECE of p_c as the probability of "the label is c"."""
    error = 0.0
    for c, p_c in enumerate(p.double().unbind(1)):
        gap = (labels == c).double() - p_c
        summed = gap.new_zeros(bins).index_add_(0, bin_of(p_c, bins), gap)
        error += summed.abs().sum().item() / len(labels) / p.shape[1]
    return error


def brier(p, labels):
    """Mean of sum_c (p_c - [c = label])^2, from 0 to 2."""
    return (p.double() - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item()


MEASURES = {
    "ECE": common.ece,  # Differs (T7): the published numbers are the next row's, very likely
    "ECE per 512": ece_per_batch,
    "adaptive ECE": adaptive_ece,
    "class-wise ECE": classwise_ece,
    "NLL": common.nll,
    "Brier": brier,
}


def temperature(logits, labels, criterion):
    """T of softmax(logits / T) on ID val: least NLL, or least ECE, from 0.1 to 10."""
    if criterion == "nll":  # Differs (TS): the ECE of a small val set is a jagged function of T
        return common.temperature(logits, labels, "nll")
    grid = [10 ** (i / 100) for i in range(-100, 101)]
    return min(grid, key=lambda T: common.ece((logits / T).softmax(1), labels))


def evaluate(config, data, clip, models, seed):
    """Result rows, see `row_of`: each model, and the same with its temperature as "NAME +TS"."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    of = {name: common.predict(config, models, split, clip) for name, split in splits.items()}
    val, rows = of.pop("val"), []
    for m in models:
        found = {s: of[s][m] for s in of}
        rows.append(row_of(m, seed, found))
        T = temperature(val[m].logits, val[m].labels, config.temperature)
        rows.append(row_of(f"{m} +TS", seed, found, T))
    return rows


def row_of(method, seed, found, T=None):
    """{split: Prediction} -> {"method", "seed", "choice": T, "right", "confidence": {split: [N]},
    "measures": {measure: {split: value}}, "spectrum": singular values of ID's features}.
    """
    p = {s: (x.logits / (T or 1)).softmax(1) for s, x in found.items()}
    measures = {
        name: {s: f(p[s], x.labels) for s, x in found.items()} for name, f in MEASURES.items()
    }
    # Differs (T18): the paper does not say which representation; here the head's input on ID test
    return {
        "method": method,
        "seed": seed,
        "choice": T,
        "right": {s: x.right for s, x in found.items()},
        "confidence": {s: q.amax(1).double() for s, q in p.items()},
        "measures": measures,
        "spectrum": singular_values(next(iter(found.values())).features).tolist(),
    }


def measured(rows, method, name="ECE"):
    """{split: value}, mean over seeds, of one measure of one method."""
    own = [r["measures"][name] for r in rows if r["method"] == method]
    return {s: float(np.mean([r[s] for r in own])) for s in own[0]}


def by_bin(row, split, bins=10):
    """[N, bins]: right - confidence of each image in the column of its bin, as in common.ece."""
    confidence = row["confidence"][split]
    index = bin_of(confidence, bins)
    gap = row["right"][split].double() - confidence
    return (F.one_hot(index, bins) * gap[:, None]).numpy()


def ece_gain(rows, method, base, draws=1000):
    """ECE of `method` less that of `base` on ID and in the mean over shifts, each with its 95 %
    interval over runs and images (common.interval); the images' variance is a bootstrap's.
    """
    pairs = [[r for r in rows if r["method"] == m] for m in (method, base)]
    pairs, rng = list(zip(*pairs, strict=True)), np.random.default_rng(0)
    means, variance = {}, {}
    for s in rows[0]["right"]:
        n, drawn = len(rows[0]["right"][s]), []
        tables = [[by_bin(r, s) for r in pair] for pair in pairs]

        def differences(weights, tables=tables, n=n):  # [draws, N] -> [draws, runs]
            e = [[np.abs(weights @ t).sum(1) / n for t in pair] for pair in tables]
            return np.stack([a - b for a, b in e], 1)

        means[s] = differences(np.ones((1, n)))[0]
        for _ in range(0, draws, 100):  # 50,000 images: 40 MB
            drawn.append(differences(rng.multinomial(n, np.full(n, 1 / n), size=100)).mean(1))
        variance[s] = np.concatenate(drawn).var()
    first, *shifts = means

    def over(splits):
        if not splits:
            return math.nan, math.nan, math.nan
        of_images = sum(variance[s] for s in splits) / len(splits) ** 2
        return common.interval(np.mean([means[s] for s in splits], 0), of_images)

    return over([first]), over(shifts)


def measure_table(rows, name, title):
    """Table of one measure: a line per method, a column per split."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        value = measured(rows, method, name)
        lines.append([method, *(f"{x:.3f}" for x in (*value.values(), common.mean_shift(value)))])
    return common.table(["method", *rows[0]["right"], "avg shift"], lines, title)


def print_tables(config, data, rows):
    """Tabs. 2 and 3 in their form, every measure in short, and the paper's numbers."""
    runs = f"mean of {config.seeds} run{'s' * (config.seeds > 1)}"
    plain = [r for r in rows if r["choice"] is None]
    print("\n" + common.accuracy_table(plain, f"accuracy in %, {runs}"))
    print("\n" + measure_table(rows, "ECE", f"ECE over each whole set, 10 bins, {runs}"))
    if data.kind == "imagenet":  # to compare with the paper's Table 3
        print(
            "\n" + measure_table(rows, "ECE per 512", f"ECE, mean over batches of 512 (T7), {runs}")
        )
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        values = [measured(rows, method, name) for name in MEASURES]
        cells = [f"{next(iter(v.values())):.3f} {common.mean_shift(v):.3f}" for v in values]
        sigma = "" if own[0]["choice"] else f"{np.mean([r['spectrum'][-1] for r in own]):.4f}"
        T = "" if own[0]["choice"] is None else f"{np.mean([r['choice'] for r in own]):.2f}"
        lines.append([method, *cells, sigma, T])
    title = f"every measure on ID and in the mean over shifts; sigma_min on ID, {runs}"
    print("\n" + common.table(["method", *MEASURES, "sigma_min", "T"], lines, title))
    for block in json.loads((common.EMBEDDED / "carot_paper.json").read_text())["tables"]:
        if (config.model, data.kind) == (block["model"], "imagenet"):
            form = "{:.2f}" if block["metric"] == "accuracy" else "{:.4f}"
            lines = [
                [m, *("-" if x is None else form.format(x) for x in cells)]
                for m, *cells in block["rows"]
            ]
            print("\n" + common.table(block["columns"], lines, f"paper, {block['table']}"))
            print("\n".join(block["notes"]))


def reliability(rows, method, bins=10):
    """Fig. B: (confidence, accuracy, N) of each bin, all shifts and seeds together; empty: nan."""
    own = [r for r in rows if r["method"] == method]
    shifts = list(own[0]["right"])[1:] or list(own[0]["right"])
    confidence = torch.cat([r["confidence"][s] for r in own for s in shifts])
    right = torch.cat([r["right"][s] for r in own for s in shifts]).double()
    index = bin_of(confidence, bins)
    n = torch.bincount(index, minlength=bins)
    means = [torch.bincount(index, x, minlength=bins) / n for x in (confidence, right)]
    return list(zip(*(m.tolist() for m in means), n.tolist(), strict=True))


def figure(config, rows):
    """Figs. 1 and 6 above, reliability under shift (Fig. B) of three fine-tunings below."""
    fig, axes = common.new_figure(columns=3, rows=2)
    methods = list(dict.fromkeys(r["method"] for r in rows if r["choice"] is None))
    numbers = []
    for i, m in enumerate(methods):
        acc, ece, colour = common.accuracies(rows, m), measured(rows, m), f"C{i}"
        x, y, e = next(iter(acc.values())), common.mean_shift(acc), common.mean_shift(ece)
        axes[0, 0].plot(x, y, "o", color=colour, label=m)
        axes[0, 1].plot(-e, y, "o", color=colour)
        spectrum = np.mean([r["spectrum"] for r in rows if r["method"] == m], 0)[-20:]
        axes[0, 2].plot(range(1, len(spectrum) + 1), spectrum, ".-", color=colour)
        numbers += [("1 left", m, x, y), ("1 right", m, -e, y)]
        numbers += [("6", m, i + 1, float(v)) for i, v in enumerate(spectrum)]
    axes[0, 0].set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    axes[0, 1].set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
    axes[0, 2].set_xticks([1, 5, 10, 15, 20])
    axes[0, 2].set(xlabel="the last 20 singular values of ID's features", ylabel="singular value")
    axes[0, 0].legend()
    shown = [m for m in ("FT", "FLYP", "CaRot", *methods) if m in methods]
    for axis, m in zip(axes[1], dict.fromkeys(shown), strict=False):
        bins = reliability(rows, m)
        centres = [(i + 0.5) / len(bins) for i in range(len(bins))]
        axis.bar(centres, [a for _, a, _ in bins], width=0.09, color=f"C{methods.index(m)}")
        axis.plot([c for c, *_ in bins], [c for c, *_ in bins], "k_", ms=12, label="confidence")
        axis.plot([0, 1], [0, 1], "--", color="0.6", lw=0.8)
        axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axis.set_title(f"{m}, all shifts: ECE {pooled_ece(bins):.3f}")
        for x, (c, a, n) in zip(centres, bins, strict=True):
            numbers.append(("B", f"{m}, confidence {c:.3f}, n {n}", x, a))
    common.save_figure(fig, f"{config.out}/figures/carot", ["figure", "series", "x", "y"], numbers)


def pooled_ece(bins):
    images = sum(n for *_, n in bins)
    return sum(n / images * abs(c - a) for c, a, n in bins if n)


def summary(rows):
    """Three sentences on the paper's claims, computed from the table."""
    methods = [r["method"] for r in rows]
    tuned = [m for m in ("FT", "LP-FT", "FLYP") if m in methods]
    if "CaRot" not in methods or not tuned:
        return
    base = "FLYP" if "FLYP" in tuned else tuned[-1]
    say, fine = "{:+.2f} [{:+.2f}, {:+.2f}]".format, "{:+.3f} [{:+.3f}, {:+.3f}]".format

    def verdict(low, high, up):
        """Whether the interval is on the claimed side of 0."""
        low, high = (low, high) if up else (-high, -low)
        return "holds here" if low > 0 else "the opposite holds here" if high < 0 else "stays open"

    own, shift = common.gain(rows, "CaRot", base)
    print(f"\n1. Accuracy, CaRot less {base}: {say(*own)} points on ID, {say(*shift)} in the mean")
    print(f"   under shift. The paper's claim, more under shift, {verdict(*shift[1:], True)}.")
    ece = {m: common.mean_shift(measured(rows, m)) for m in tuned}
    least = min(ece, key=ece.get)
    _, e = ece_gain(rows, "CaRot", least)
    print(f"2. ECE under shift, CaRot less {least}, the best calibrated of {', '.join(tuned)}:")
    print(f"   {fine(*e)}. The claim, less than each of them, {verdict(*e[1:], False)}.")
    (_, a), (_, e) = common.gain(rows, "CaRot", "ZS"), ece_gain(rows, "CaRot", "ZS")
    print(f"3. Under shift, CaRot less zero-shot: {say(*a)} points, ECE {fine(*e)}. In")
    print("   the paper (ViT-B/16) CaRot is the more accurate, zero-shot the better calibrated.")
    print(f"(95 % intervals over {common.sampled(rows)}, the sets fixed.)")


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier; the ablations start here, too."""
    config, data = common.begin(Config, argv, __doc__, PRESETS)
    common.choose(config.methods, METHODS, "--methods")  # now, not after hours of training
    return config, data, *common.zero_shot(config, data)


def main(argv=None):
    config, data, clip, zero_shot = prepare(argv)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        models = train_models(config, data, clip, zero_shot, seed)
        rows += evaluate(config, data, clip, models, seed)
    kept = [{k: v for k, v in row.items() if k != "confidence"} for row in rows]
    common.write_results(config, zero_shot.head.weight.device, kept)
    print_tables(config, data, rows)
    if data.shifts:
        figure(config, [r for r in rows if r["choice"] is None])
        summary([r for r in rows if r["choice"] is None])
    return rows


if __name__ == "__main__":
    common.run(main)
