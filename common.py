"""What the four method scripts share; whatever has an equation number stands in its paper's script.

The first half is about the papers' experiments, in the order in which a script uses it: CLIP, data,
train, predict, metrics, tables. Below the line in the middle nothing is about the papers: command
line, open_clip's names and errors, processes, files, kernels.

Shapes, in every file: B batch, N samples, C classes, D features, M stored failures, T templates.
`config` is a script's Config, a `Run` with the method's own settings; these functions read only the
fields of `Run`.
"""

import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
import typing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data.checkpoints import load_matching, read_classifier, read_weights
from data.images import Images, load_images, unreadable
from data.trees import Data, InputError, Split, did_you_mean, listed

__all__ = ["Data", "Images", "InputError", "Split", "did_you_mean"]  # scripts say common.Split

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "data"  # the digits, their prompts, the tiny CLIP
ID = "test"  # name of the in-distribution test set in every table; all other sets are shifts


def arg(default, text, choices="", least=0, most=2**62):  # most: torch's seeds
    """One field of a script's `Config`: default, help text, allowed values, range of a number."""
    limits = {"help": text, "choices": choices.split(), "least": least, "most": most}
    return field(default=default, metadata=limits)


@dataclass
class Run:
    """The settings that all scripts share. A script's `Config(common.Run)` adds its method's, and
    gives those of these anew for which its paper says something else.
    """

    data: str = arg("digits", "digits; folder: ImageNet, CIFAR-10, train/ val/; entity30:FOLDER")
    model: str = arg("ViT-B-16", "open_clip architecture")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    epochs: int = arg(10, "of every training", least=1)
    batch: int = arg(512, "images of a step, of all processes together", least=1)
    lr: float = arg(3e-5, "largest learning rate")
    weight_decay: float = arg(0.1, "AdamW, all parameters")
    warmup: int = arg(500, "steps of linear warm-up")
    clip: float = arg(1.0, "largest gradient norm; 0: any")
    selection: str = arg(
        "paper", "paper: on ID val; code: on the reported ID set (A10)", "paper code"
    )
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "number of fine-tuning runs", least=1)
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; no paper states its own", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(-1, "processes that decode; -1: one per core on a GPU, else none", least=-1)
    skip_bad_images: bool = arg(False, "leave unreadable images out instead of stopping")
    resume: bool = arg(True, "continue unfinished training, reuse finished")
    out: str = arg("runs", "folder for checkpoints, caches, results, figures")
    given: frozenset = frozenset()  # names of the settings that the user typed; no option itself


# --- CLIP -----------------------------------------------------------------------------------------


@dataclass
class Clip:
    """A CLIP model (open_clip's class, fp32) with what is needed to feed it."""

    model: nn.Module
    tokenizer: object
    name: str
    quick_gelu: bool
    size: int  # pixels
    mean: tuple
    std: tuple
    augment: object = None  # transform of training images, in place of `train_transform`

    @property
    def key(self):
        """What shapes an image's features besides the weights, for the names of caches."""
        return [self.name, self.quick_gelu, self.size, self.mean, self.std]


class Classifier(nn.Module):
    """Image encoder and linear head: images [B, 3, H, W] -> raw features [B, D], logits [B, C].

    The head sees L2-normalised features, and its rows start as the text embeddings times
    exp(logit_scale): zero-shot and fine-tuned models are one module with different numbers. Logits
    are fp32 under any autocast.
    """

    def __init__(self, visual, weight):
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def classify(self, features):
        with torch.autocast(features.device.type, enabled=False):
            return self.head(F.normalize(features.float(), dim=-1))

    def forward(self, images):
        features = self.visual(images)
        return features, self.classify(features)


def load_clip(config):
    """Clip by config.model, .pretrained (an open_clip tag, or "random"), .weights (a local file
    instead), .quick_gelu, .trust_checkpoint. Raises InputError for unknown names and unfit files.
    """
    import open_clip

    name, tag, path = config.model, config.pretrained, config.weights
    if (EMBEDDED / f"{name}.json").is_file():
        open_clip.add_model_config(EMBEDDED / f"{name}.json")
    check_model_name(config)
    if path:
        state, metadata = read_weights(path, config.trust_checkpoint)
    else:
        state, metadata = None, open_clip.get_pretrained_cfg(name, tag) or {}
    quick_gelu = needs_quick_gelu(config, metadata)
    model, tokenizer = create(name, None if path or tag == "random" else tag, quick_gelu)
    if state is not None:
        load_matching(model, state, path)
    size = model.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size
    count = sum(p.numel() for p in model.visual.parameters()) / 1e6
    activation = "QuickGELU" if quick_gelu else "GELU"
    print(f"CLIP: {name} from {path or tag}; {count:.1f} M image parameters, {activation}, fp32")
    mean, std = tuple(model.visual.image_mean), tuple(model.visual.image_std)
    return Clip(model, tokenizer, name, quick_gelu, size, mean, std)


def load_finetuned(path, trust, data, clip, zero_shot):
    """Classifier of the fine-tuned checkpoint `path`: its own head, or one from its text tower."""
    state, metadata = read_classifier(path, trust, zero_shot.state_dict())
    if metadata.get("quick_gelu", clip.quick_gelu) != clip.quick_gelu:
        raise InputError(f"{path} has another activation; set --quick-gelu")
    if "held-out" in data.val.path:
        print("note: the checkpoint may have been trained on what is now ID val, which favours it")
    model = copy.deepcopy(zero_shot)
    if "head.weight" not in state:
        tuned = copy.deepcopy(clip)
        load_matching(tuned.model, state, path)
        device = model.head.weight.device
        state["head.weight"] = zero_shot_head(tuned, data.classes, data.templates, device)
    state.setdefault("head.bias", torch.zeros(len(state["head.weight"])))
    load_matching(model, state, path)
    return model


def zero_shot(config, data):
    """Clip, and the zero-shot Classifier of the data's classes, on the device that config names."""
    device = pick_device(config.device)
    set_seed(config.seed)  # matters for --pretrained random only
    clip = load_clip(config)
    return clip, classifier(config, data, clip, device)


def classifier(config, data, clip, device):
    """Classifier of a CLIP: its image tower, and the head that its text tower makes (cached)."""
    key = [clip.model.state_dict(), clip.key, data.classes, data.templates]

    def compute():  # ImageNet: 80,000 prompts, an hour and more on a CPU
        return {"head": zero_shot_head(clip, data.classes, data.templates, device).cpu()}

    head = cached(config, "head", key, compute)["head"]
    check_names(clip.tokenizer, data.classes, max(data.templates, key=len), head)
    return Classifier(copy.deepcopy(clip.model.visual), head).to(device)  # 350 MB for ViT-B/16


@torch.no_grad()
def zero_shot_head(clip, classes, templates, device="cpu"):
    """[C, D]: embed templates x names, normalise, mean, normalise, times exp(logit_scale).

    VRF's Sec. 3.1 writes one prompt and no scale; its code is as here. Without the scale, 100 in
    CLIP, every softmax would be nearly uniform.
    """
    import open_clip

    model = clip.model.to(device).eval()
    texts = model, clip.tokenizer, classes, templates
    head = open_clip.build_zero_shot_classifier(*texts, device=device)
    print(f"zero-shot head: {len(classes)} names x {len(templates)} prompts")
    return (head.T * model.logit_scale.exp()).float()


# --- data -----------------------------------------------------------------------------------------
# `Split`, one set of images, and `Data`, the sets of a study, stand in data/trees.py, with where
# the public data sets lie on disk and how their classes map onto the training classes.
# data/images.py decodes files and makes batches of them.


def open_data(path="digits", val_fraction=0.02, selection="paper", seed=0):
    """What --data names: `digits`, a folder, or `entity30:FOLDER` with an ImageNet tree in FOLDER.

    Differs (A10): the paper does not define its validation set and its code selects on the images
    that it reports. Here data without a validation set beside the reported one (ImageNet's val/ is
    the reported one) give up a stratified, seeded share of their training images; selection="code"
    does as the code does.
    """
    from data import trees

    data = trees.find(str(path))
    if selection == "code":
        data.val = data.test
    elif data.val is None:
        data.train, data.val = hold_out(data.train, val_fraction, seed)
    return data


def hold_out(train, fraction, seed):
    """(rest, held out): a seeded share of every class, at least one image of a class with two."""
    if not 0 < fraction < 1:
        raise InputError(f"The validation share is {fraction}, but must lie between 0 and 1.")
    labels, rng = train.labels.numpy(), np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == c))
        wanted = max(1, round(fraction * len(of_class)))
        held[of_class[: min(wanted, len(of_class) - 1)]] = True
    if not held.any():
        cure = "add images, or a validation set of its own (val/ beside test/)"
        raise InputError(f"{train.path} has one image per class, none to hold out; {cure}")

    def take(mask, **changes):
        kept = np.flatnonzero(mask)
        images = train.images
        images = images[kept] if isinstance(images, np.ndarray) else [images[i] for i in kept]
        return dataclasses.replace(train, images=images, labels=train.labels[kept], **changes)

    expected = train.expected and train.expected - int(held.sum())
    where = f"{train.path} (held-out {fraction:.0%})"
    return take(~held, expected=expected), take(held, name="val", path=where, expected=None)


def describe(data):
    """The table printed before any work: what was found where, what is missing, what is wrong."""
    rows, notes = [], []
    for s in (data.train, data.val, data.test, *data.shifts):
        n, classes = len(s.images), len(data.classes if s.groups is None else s.groups)
        published = f"{s.expected:,}" if s.expected else "-"
        rows.append((s.name, f"{n:,}", classes, published, s.path))
        if s.expected and n != s.expected:
            gap = f"{abs(n - s.expected):,} {'missing' if n < s.expected else 'too many'}"
            notes.append(
                f"WARNING: {s.name} has {n:,} images where {published} are expected ({gap}). Do "
                "not compare its numbers with published ones; unpack the archive again."
            )
    if data.val is data.test:
        notes.append("val is the test set: whatever is chosen on it sees the reported images.")
    if data.kind == "imagenet" and len(data.classes) < 1000:
        notes.append(
            f"train/ has {len(data.classes)} of ImageNet's 1000 classes: all sets are cut down to "
            "them, and published image counts do not apply."
        )
    notes += data.notes + [f"MISSING, so not evaluated: {name}" for name in data.missing]
    found = table(["set", "images", "classes", "expected", "path"], rows, f"data: {data.kind}")
    return "\n".join([found, *notes])


def project(logits, groups):
    """Logits of a set's own classes, the max over each group of ids.  [B, C] -> [B, len(groups)]

    Before the softmax: classes that cannot occur must not take probability.
    """
    if groups is None:
        return logits
    width = max(map(len, groups))
    padded = [ids + ids[:1] * (width - len(ids)) for ids in groups]  # a repeat keeps the max
    return logits[:, torch.tensor(padded, device=logits.device)].amax(dim=-1)


def train_transform(size, mean, std):
    """The recipe's only augmentation: a random crop of 90 to 100 % of the area, no flip."""
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([crop, t.ToTensor(), t.Normalize(mean, std, inplace=True)])


def eval_transform(size, mean, std):
    """CLIP's: short side to `size`, bicubic, centre crop. A size x size image keeps its pixels."""
    from torchvision import transforms as t

    resize = t.Resize(size, interpolation=t.InterpolationMode.BICUBIC)
    normalise = t.Normalize(mean, std, inplace=True)
    return t.Compose([resize, t.CenterCrop(size), t.ToTensor(), normalise])


# --- train ----------------------------------------------------------------------------------------
# `shard` and `gather` are for torchrun: each process takes its part of a batch, and the loss is of
# the whole batch. In one process both return their argument.


@dataclass
class Training:
    """One training, ready to start; `train_steps` goes through it."""

    name: str  # printed
    module: nn.Module  # what the checkpoint holds
    optimiser: torch.optim.Optimizer
    loss_fn: object  # batch, a tuple of tensors on the device -> scalar
    batches_from: object  # step -> iterator over the batches from that step on
    per_epoch: int  # steps
    path: Path  # of the checkpoint, named after everything that shapes the result
    metadata: dict  # numbers and strings, kept in the checkpoint for whoever reads it
    schedule: object = None  # (step, warm-up, steps) -> factor on the rate; None: warmup_cosine


def fine_tune(config, name, model, split, clip, loss_fn=None, optimiser=None, key=None):
    """Train a Classifier in place on augmented images, by config's epochs, batch, lr, weight_decay,
    warmup, clip, precision and seed. A finished training is read from its checkpoint.

    loss_fn(images, labels) -> scalar, instead of cross-entropy; `optimiser`, instead of AdamW. Both
    need a `key`: {name: number or string} of what shapes them, part of the checkpoint's name.
    """
    training = image_training(config, name, model, split, clip, loss_fn, optimiser, key)
    for _ in train_steps(config, training):
        pass


def image_training(config, name, model, split, clip, loss_fn=None, optimiser=None, key=None):
    """The Training of `fine_tune`, for a loop over `train_steps` of one's own."""
    transform = clip.augment or train_transform(clip.size, clip.mean, clip.std)
    n, device = len(split.labels), model.head.weight.device

    def batches_from(first):
        order = batches(n, config.batch, steps_of(config, n), config.seed, first)
        yield from load_images(split, transform, map(shard, order), config, device)

    def cross_entropy(images, labels):
        return F.cross_entropy(gather(model(images)[1]), gather(labels))

    loss = loss_fn or cross_entropy
    key = training_key(config, clip, split, key, loss_fn, optimiser)
    optimiser = optimiser or adamw(config, model)
    known = set(map(id, model.parameters()))
    if not all(id(p) in known for group in optimiser.param_groups for p in group["params"]):
        raise ValueError(f"{name}: the optimiser was made of another model's parameters")
    return new_training(
        config, name, model, optimiser, lambda batch: loss(*batch), batches_from, key
    )


def linear_probe(config, name, model, split, clip):
    """Train the head of a Classifier alone, in place, on cached features of the test transform."""
    for _ in train_steps(config, probe_training(config, name, model, split, clip)):
        pass


def probe_training(config, name, model, split, clip):
    """The Training of `linear_probe`."""
    features, labels = frozen_features(config, model, split, clip)
    n = len(labels)

    def batches_from(first):
        for rows in batches(n, config.batch, steps_of(config, n), config.seed, first):
            index = [i for i, _ in shard(rows)]
            yield features[index], labels[index]

    def loss_fn(batch):
        return F.cross_entropy(gather(model.classify(batch[0])), gather(batch[1]))

    key = training_key(config, clip, split, {"part": "head"})
    return new_training(config, name, model, adamw(config, model.head), loss_fn, batches_from, key)


def adamw(config, module):
    return torch.optim.AdamW(module.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def train_steps(config, training):
    """The training loop: yields how many steps are done, after each step, and 0 before the first.

    What the caller does between two steps belongs to the training: the checkpoint (after every
    epoch, on Ctrl-C, at the end) is written when it comes back. An unfinished checkpoint is
    continued bit for bit; of a finished one nothing is yielded. Raises InputError when the loss is
    not finite, KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    module, optimiser, per_epoch = training.module, training.optimiser, training.per_epoch
    steps, device = config.epochs * per_epoch, next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    schedule = training.schedule or warmup_cosine
    set_seed(config.seed)
    first = restore(config, training, scaler)
    if first == 0:
        yield 0
    batches = training.batches_from(first) if first < steps else ()
    with interrupts() as interrupted, progress_bar(training.name, steps, first) as bar:
        for step, batch in enumerate(batches, first):
            module.train()  # the caller may have evaluated it
            for group in optimiser.param_groups:
                base = group.setdefault("initial_lr", group["lr"])
                group["lr"] = base * schedule(step, config.warmup, steps)
            batch = tuple(x.to(device, non_blocking=True) for x in batch)
            loss = train_step(config, optimiser, scaler, training.loss_fn, batch)
            done, ends_epoch = step + 1, (step + 1) % per_epoch == 0
            if step % 10 == 0 or ends_epoch:  # reading the loss waits for the GPU
                check_finite(training, loss, step)
            if world() > 1:
                for buffer in module.buffers():  # BatchNorm's statistics are rank 0's, everywhere
                    dist.broadcast(buffer, 0)
            yield done
            stop = not all_true(not interrupted())
            if ends_epoch or stop:
                save(config, training, scaler, done)
            bar.update()
            if ends_epoch and rank() == 0:
                epoch = f"epoch {done // per_epoch} of {config.epochs}, last loss {loss.item():.3f}"
                bar.write(f"{training.name}: {epoch}, rate {group['lr']:.1e}", file=sys.stderr)
            if stop:
                raise KeyboardInterrupt
    module.eval()


def train_step(config, optimiser, scaler, loss_fn, batch):
    """Forward, backward, clip the gradient, step.  -> loss, still on the device"""
    with autocast(batch[0].device, config.precision):
        loss = loss_fn(batch)
    scaler.scale(loss).backward()
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    gradients = [p.grad for p in trained if p.grad is not None]
    average_gradients(gradients)  # first, since unscale_ looks for inf, which all must find
    # Differs (T11): CaRot's code clips before, where the norm is still up to 65,536 times as large
    scaler.unscale_(optimiser)
    if config.clip:  # a norm, no CLIP
        nn.utils.clip_grad_norm_(trained, config.clip)
    scaler.step(optimiser)
    scaler.update()
    optimiser.zero_grad(set_to_none=True)
    return loss.detach()


def warmup_cosine(step, warmup, total, end=0.0):
    """Factor on the learning rate at `step`, from 0: a line to 1, then a cosine to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    return end + (1 - end) * (0.5 * (1 + cosine))


def batches(n, batch, steps, seed, first=0):
    """Yield [(index, augmentation seed), ...] for every step from `first`.

    Step t depends on (n, batch, seed, t) alone, so that a resumed run, with any number of workers,
    sees the same crops of the same images. An epoch is a permutation; its last batch may be short.
    """
    per_epoch, order, order_of = steps_of_epoch(n, batch), None, -1
    for step in range(first, steps):
        epoch, i = divmod(step, per_epoch)
        if epoch != order_of:
            order, order_of = np.random.default_rng([seed, epoch]).permutation(n), epoch
        indices = order[i * batch : (i + 1) * batch].tolist()
        crops = np.random.default_rng([seed, step, n]).integers(2**32, size=len(indices)).tolist()
        yield list(zip(indices, crops, strict=True))


def steps_of_epoch(n, batch):
    """A last, short batch counts, but with several processes only if each has a part of it."""
    return n // batch + (n % batch >= world())


def steps_of(config, n):
    """Steps of a training on n images."""
    return config.epochs * steps_of_epoch(n, config.batch)


def autocast(device, precision):
    """fp32: off; bf16, fp16: torch's autocast over fp32 weights."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


# --- predict --------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """One model on one split: features [N, D], logits of the split's classes [N, C], labels [N]."""

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def right(self):
        return self.logits.argmax(1) == self.labels


@torch.inference_mode()
def forward(config, models, split, clip):
    """One pass over the images for all models: every file is decoded once.

    Yields, in their order and on the CPU in fp32, (labels [B], {name: (raw features [B, D], logits
    of the split's classes [B, C])}).
    """
    device = next(next(iter(models.values())).parameters()).device
    n, size = len(split.labels), config.batch * world()
    starts = [i for i in range(0, n, size) if n - i >= world()]  # each process has a part of each
    order = [[(j, 0) for j in range(*ends)] for ends in itertools.pairwise([*starts, n])]
    transform = eval_transform(clip.size, clip.mean, clip.std)
    for model in models.values():
        model.eval()
    for images, labels in load_images(split, transform, map(shard, order), config, device):
        out = {}
        with autocast(device, config.precision):
            for name, model in models.items():
                features, logits = model(images)
                columns = features.float(), project(logits, split.groups)
                out[name] = tuple(gather(x).cpu() for x in columns)
        yield gather(labels.to(device)).cpu(), out


def predict(config, models, split, clip):
    """{name: Prediction}; what the cache has from the same weights and images is not run again."""
    key = [fingerprint(split), clip.key, config.precision]
    paths = {}
    for name, model in models.items():
        paths[name] = cache_path(config, split.name, [model.state_dict(), key])
    found = {name: read_cache(path) for name, path in paths.items()}
    todo = {name: model for name, model in models.items() if found[name] is None}
    if todo:
        for name, columns in forward_all(config, todo, split, clip).items():
            found[name] = columns
            write_file(paths[name], functools.partial(torch.save, columns))
    return {n: Prediction(c["features"], c["logits"], c["labels"]) for n, c in found.items()}


def right_images(config, model, data, clip):
    """{split: bool [N]}, which images of the test set and the shifts a Classifier gets right."""
    sets = (data.test, *data.shifts)
    return {s.name: predict(config, {"": model}, s, clip)[""].right for s in sets}


def forward_all(config, models, split, clip):
    """`forward` over a whole split.  -> {name: {"features", "logits", "labels": tensor}}"""
    labels, features, logits = [], {m: [] for m in models}, {m: [] for m in models}
    for labels_of_batch, out in forward(config, models, split, clip):
        labels.append(labels_of_batch)
        for m in models:
            features[m].append(out[m][0])
            logits[m].append(out[m][1])
    labels = torch.cat(labels)
    return {
        m: {"features": torch.cat(features[m]), "logits": torch.cat(logits[m]), "labels": labels}
        for m in models
    }


def frozen_features(config, model, split, clip):
    """Raw features [N, D] and labels [N] of a split, cached (1.28 M x 512 in fp32: 2.6 GB)."""

    def compute():
        columns = forward_all(config, {"": model}, split, clip)[""]
        return {"features": columns["features"], "labels": columns["labels"]}

    key = [model.visual.state_dict(), fingerprint(split), clip.key, config.precision]
    kept = cached(config, "frozen", key, compute)
    return kept["features"], kept["labels"]


# --- metrics --------------------------------------------------------------------------------------


def accuracy(scores, labels):
    """Share of rows of [N, C] whose largest score is at the label [N]; nan for no rows."""
    scores, labels = checked(scores, labels)
    return (scores.argmax(1) == labels).double().mean().item()


def ece(probabilities, labels, bins=10):
    """Expected calibration error, a share: sum_b n_b / N |accuracy_b - confidence_b|, top-1
    confidence, `bins` of equal width, (low, high].  [N, C], [N]
    """
    probabilities, labels = checked(probabilities, labels)
    confidence, predicted = probabilities.double().max(1)
    if (probabilities < -1e-3).any() or (probabilities > 1.001).any():
        raise InputError("ece: probabilities are not in 0 to 1; are they logits?")
    gap = (predicted == labels).double() - confidence
    index = bin_of(confidence, bins)
    return gap.new_zeros(bins).index_add_(0, index, gap).abs().sum().div(len(labels)).item()


def bin_of(confidence, bins):
    """Index of the bin of equal width, (low, high], of each confidence.  any shape"""
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def checked(scores, labels):
    """Scores [N, C] and labels [N], tensors or arrays, as tensors. Raises InputError for what would
    give a wrong number: other shapes, labels of no class, inf, and nan, which argmax takes first.
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or labels.is_floating_point():
        shapes = f"{tuple(scores.shape)} and {labels.dtype} {tuple(labels.shape)}"
        raise InputError(f"expected scores [N, C] and integer labels [N], got {shapes}")
    labels = labels.long()
    if ((labels < 0) | (labels >= scores.shape[1])).any():
        raise InputError(f"labels must lie in 0 to {scores.shape[1] - 1}; leave others out")
    if not scores.isfinite().all():
        raise InputError("scores hold inf or nan")
    return scores, labels


def temperature(logits, labels, criterion):
    """T of softmax(logits / T), from ID data [N, C], [N]. off: 1. nll: least NLL. confidence: the T
    whose mean top-1 probability equals the accuracy. Where no T from 1/1000 to 1000 does it (as for
    an accuracy of 1), it says so and gives 1.
    """
    if criterion not in ("off", "nll", "confidence"):
        raise InputError(f"temperature: criterion {criterion!r}; expected off, nll or confidence")
    if criterion == "off":
        return 1.0
    from scipy.optimize import brentq, minimize_scalar

    logits, labels = checked(logits, labels)
    logits, target = logits.double(), accuracy(logits, labels)
    low, high = -7.0, 7.0  # of log T: T from 1/1000 to 1000

    def nll(log_t):
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    def overconfidence(log_t):  # falls with T
        return (logits / math.exp(log_t)).softmax(1).amax(1).mean().item() - target

    log_t = high
    if criterion == "nll" and target < 1:
        log_t = minimize_scalar(nll, bounds=(low, high), method="bounded").x
    elif overconfidence(low) > 0 > overconfidence(high):
        log_t = brentq(overconfidence, low, high)
    if log_t > high - 0.01:
        print(f"temperature: none fits by {criterion}, at an accuracy of {target:.3f}; 1 is used")
        return 1.0
    return math.exp(log_t)


@dataclass
class Row:
    """One line of a results table in one run."""

    method: str
    seed: int
    right: dict  # {split: bool [N]}, which images it gets right; one of the splits is ID
    choice: object = None  # what was chosen on ID val: a number or several
    numbers: dict = field(default_factory=dict)  # what else is written to results.jsonl
    tensors: dict = field(default_factory=dict)  # what else is kept in memory


def accuracies(rows, method):
    """{split: percent} of a method, mean over seeds."""
    of_method = [r.right for r in rows if r.method == method]
    shares = {s: [r[s].double().mean() for r in of_method] for s in of_method[0]}
    return {s: 100 * float(np.mean(share)) for s, share in shares.items()}


def mean_shift(by_split):
    """Unweighted mean over all splits but ID; nan if there is no other."""
    shifts = [value for split, value in by_split.items() if split != ID]
    return sum(shifts) / len(shifts) if shifts else math.nan


def interval(runs, image_variance=None):
    """Mean over runs, with its 95 % interval for other runs and other images: the variances of the
    two are added, and Student's t has Satterthwaite's degrees of freedom. Without an image variance
    it is over runs alone, with one run over images alone, with neither nan.  [R], [] -> 3 numbers
    """
    from scipy.stats import t

    runs = np.asarray(runs, float)
    n, mean = len(runs), float(runs.mean())
    if n < 2 and image_variance is None:
        return mean, math.nan, math.nan
    of_runs = float(runs.var(ddof=1)) / n if n > 1 else 0.0
    variance = of_runs + (image_variance or 0.0)
    freedom = (n - 1) * (variance / of_runs) ** 2 if of_runs else math.inf
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return mean, mean - half, mean + half


def points(row, split):
    """What each image adds to the accuracy in percent.  -> [N]"""
    return 100.0 * row.right[split].numpy()


def gain(rows, method, base, share=points):
    """Points by which `method` beats `base` on ID and in the mean over shifts, each with its 95 %
    interval over runs and, within each split, images; the splits are fixed. Runs are paired by
    their seeds. share(row, split) -> [N]: of another measure what each image adds to it.
    """
    ours, theirs = ({r.seed: r for r in rows if r.method == m} for m in (method, base))
    if not ours or not ours.keys() <= theirs.keys():
        raise ValueError(f"{method}, {base}: no rows, or not of the same seeds; runs are paired")
    if len(ours) + len(theirs) < sum(r.method in (method, base) for r in rows):
        raise ValueError(f"{method}, {base}: two rows of one method and seed; runs are paired")
    of_runs, image_variance = {}, {}  # by split: [R]; of the mean over images
    for split in rows[0].right:
        gaps = np.stack([share(ours[s], split) - share(theirs[s], split) for s in ours])
        of_runs[split], n = gaps.mean(1), gaps.shape[1]
        image_variance[split] = gaps.mean(0).var(ddof=1) / n if n > 1 else 0.0

    def mean_over(splits):
        if not splits:
            return math.nan, math.nan, math.nan
        variance = sum(image_variance[s] for s in splits) / len(splits) ** 2
        return interval(np.mean([of_runs[s] for s in splits], 0), variance)

    return mean_over([ID]), mean_over([s for s in of_runs if s != ID])


def sampled(rows):
    """What the intervals of result rows are over, in words."""
    return "runs and images" if len({r.seed for r in rows}) > 1 else "images of one run"


# --- tables ---------------------------------------------------------------------------------------


def table(header, rows, title):
    """Aligned text; numbers come formatted."""
    cells = [[str(c) for c in row] for row in (header, *rows)]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for first, *rest in cells:
        aligned = [c.rjust(w) for c, w in zip(rest, width[1:], strict=True)]
        lines.append("  ".join([first.ljust(width[0]), *aligned]))
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def accuracy_table(rows, title):
    """Table of result rows: a line per method, a column per split."""
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        mean = accuracies(rows, method)
        numbers = [f"{x:.1f}" for x in (*mean.values(), mean_shift(mean))]
        choices = [r.choice for r in rows if r.method == method and r.choice is not None]
        words = ["/".join(f"{x:.2g}" for x in np.atleast_1d(choice)) for choice in choices]
        lines.append([method, *numbers, " ".join(dict.fromkeys(words))])
    return table(["method", *rows[0].right, "avg shift", "chosen"], lines, title)


@contextlib.contextmanager
def figure(path, header, columns=1, rows=1):
    """Yields the axes [rows, columns] of a new figure, and a list for the numbers that are drawn.
    After the `with` block it is PATH.png, and the list, under `header`, is PATH.csv. The caller's
    matplotlib stays as it is: no window, no backend, no style is set.
    """
    import matplotlib
    from matplotlib.figure import Figure

    def write_rows(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *numbers])

    style = {"axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
    with matplotlib.rc_context(style | {"legend.frameon": False}):
        drawing = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
        numbers = []
        yield drawing.subplots(rows, columns, squeeze=False), numbers
        write_file(f"{path}.csv", write_rows)
        png = f"{path}.png"
        if write_file(png, lambda file: drawing.savefig(file, format="png", dpi=150)):
            print(f"figure: {png}")


# ==================================================================================================
# Below this line nothing is about the papers.
# ==================================================================================================

# --- command line ---------------------------------------------------------------------------------


def setup(Config, argv, doc, presets):
    """How every main starts: command line -> config and data, the table of sets printed, the preset
    of this kind of data applied, and what a training will be printed. `presets`: {kind: {field:
    value}}; the digits get their tiny CLIP. Raises InputError.
    """
    tiny = {"model": "tiny_clip", "weights": str(EMBEDDED / "tiny_clip.npz")}
    presets = presets | {"digits": tiny | presets.get("digits", {})}
    config = parse(Config, argv, doc)
    init_distributed(config.device)
    data = open_data(config.data, config.val_fraction, config.selection, config.seed)
    print(describe(data))
    if config.skip_bad_images:
        leave_out_unreadable(config, data)
    apply_preset(config, data.kind, presets)
    plan_training(config, data)
    return config, data


def plan_training(config, data):
    """Print what a training is, and what is odd about it: the defaults are for 1.28 M images. A
    warm-up of more than a fifth of the steps that the user did not ask for is cut to a tenth; else
    the learning rate might never get to --lr.
    """
    n, n_val, cut = len(data.train.labels), len(data.val.labels), ""
    steps = steps_of(config, n)
    if "warmup" not in config.given and config.warmup > steps / 5:
        cut = f", cut from {config.warmup} to a tenth of all"
        config.warmup = math.ceil(steps / 10)
    size = f"{n:,} images, {config.epochs} epochs, {steps:,} steps of {config.batch} images"
    if not getattr(config, "finetuned", ""):  # vrf.py's, instead of a training
        print(f"training: {size}, warm-up of {config.warmup} steps{cut}")
    own_val = "held-out" not in data.val.path
    note_idle(config, pretrained=config.weights and "beside --weights")
    note_idle(config, val_fraction=own_val and "where ID val is not held out of the training set")
    sets = data.train, data.val, data.test, *data.shifts
    least = min(config.batch, *(len(split.labels) for split in sets))
    if least < world():
        raise InputError(f"{world()} processes for a batch or set of {least} images; start fewer")
    if config.warmup >= steps and not cut:
        print(f"note: --warmup {config.warmup} is no shorter than the training")
    if config.batch > n:
        print(f"note: --batch {config.batch} is more than all training images")
    if n_val < 100:
        print(f"note: ID val has {n_val} images: what is chosen on it is left to chance")


def note_idle(config, **idle):
    """Say which typed options do nothing. idle: {name: when, or a false value}"""
    for name, when in idle.items():
        if when and name in config.given:
            print(f"note: {option(name)} has no effect {when}")


def leave_out_unreadable(config, data):
    """Take the images that cannot be decoded out of every set, and name them. All are decoded for
    it once, then the cache knows, and only those that failed are tried again. Raises InputError if
    nothing is left of a set or of a training class.
    """
    for split in {id(s): s for s in (data.train, data.val, data.test, *data.shifts)}.values():
        images, labels = split.images, split.labels
        if isinstance(images, np.ndarray):
            continue

        def compute(images=images):
            return {"bad": torch.tensor(unreadable(images), dtype=torch.int64)}

        bad = cached(config, "unreadable", fingerprint(split), compute)["bad"].tolist()
        if bad := [bad[i] for i in unreadable([images[i] for i in bad])]:
            n, files = f"{len(bad):,} of {len(images):,}", listed([images[i] for i in bad])
            print(f"{split.name}: {n} images are unreadable and were left out: {files}")
            kept = np.setdiff1d(np.arange(len(images)), bad)
            split.images, split.labels, split.hash = [images[i] for i in kept], labels[kept], None
        if not len(split.images):
            raise InputError(f"{split.name}: none of its {len(images)} images can be read")
        lost = set(labels.tolist()) - set(split.labels.tolist())
        if lost and split is data.train:
            folder = os.path.dirname(images[labels.tolist().index(min(lost))])
            raise InputError(f"{folder}: no image of this class can be read; restore them")


def parse(Config, argv, doc):
    """Command line -> Config; types come from the annotations. `.given`: what the user named."""
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=doc, exit_on_error=False, **look)
    shared = parser.add_argument_group("settings that all scripts share")
    method = parser.add_argument_group("settings of this script")
    types_of = typing.get_type_hints(Config)
    fields = [f for f in dataclasses.fields(Config) if "help" in f.metadata]
    for f in fields:
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        options = {"help": text, "default": argparse.SUPPRESS}
        if types_of[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": types_of[f.name], "choices": f.metadata["choices"] or None}
        group = shared if f.name in Run.__dataclass_fields__ else method
        group.add_argument(option(f.name), **options)
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:  # else argparse prints all options first
        raise InputError(str(error)) from error
    if unknown:
        name, known = unknown[0].split("=")[0], [option(f.name) for f in fields]
        raise InputError(f"there is no option {name}{did_you_mean(name, known)}; see --help")
    given = vars(given)
    config = Config(**given, given=frozenset(given))
    for f in fields:
        value, least, most = getattr(config, f.name), f.metadata["least"], f.metadata["most"]
        if isinstance(value, (int, float)) and not least <= value <= most:
            limit = f"at most {most:g}" if value > most else f"at least {least:g}"
            raise InputError(f"{option(f.name)} {value}: expected a number, {limit}")
    for name in ("out", "weights", "finetuned"):
        if path := getattr(config, name, ""):
            setattr(config, name, os.path.expanduser(path))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    return config


def option(name):
    """The option of a setting: lr_end -> --lr-end."""
    return "--" + name.replace("_", "-")


def apply_preset(config, kind, presets):
    """Set the preset's values for this kind of data, except what the user gave; say so. A user who
    names another model gets the recipe, and not the model that it was made for.
    """
    skip = set(config.given)
    if skip & {"model", "pretrained", "weights"}:
        skip |= {"model", "weights"}
    preset = {k: v for k, v in presets.get(kind, {}).items() if k not in skip}
    if unknown := preset.keys() - vars(config).keys():
        raise ValueError(f"preset {kind}: Config has no {sorted(unknown)[0]!r}")
    for name, value in preset.items():
        setattr(config, name, value)
    if preset:
        print(f"preset {kind}: " + ", ".join(f"{k} {v}" for k, v in preset.items()))


def choose(text, known, flag):
    """'a,b' -> ['a', 'b'], all in `known`. Raises InputError with the nearest known name."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for w in words:
        if w not in known:
            hint = did_you_mean(w, known)
            raise InputError(f"{flag}: there is no {w!r}{hint}; known are {', '.join(known)}")
    if not words:
        raise InputError(f"{flag} {text!r}: expected some of {', '.join(known)}")
    return words


def numbers(text, flag):
    """'0.5,1' -> [0.5, 1.0], all positive and finite. Raises InputError."""
    try:
        found = [float(x) for x in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 < x < math.inf for x in found):
        raise InputError(f"{flag} {text}: expected positive numbers such as 0.5,1")
    return found


def run(main):
    """Call a script's main: what a user can mend becomes a sentence and exit code 2, Ctrl-C 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # of files whose names are not UTF-8
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # preemption is Ctrl-C
        main()
        if world() > 1:
            dist.destroy_process_group()
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, InputError):
            sentence = str(error)
        elif isinstance(error, OSError) and error.filename:
            cure = "check the path and its permissions, or name another"
            sentence = f"{error.filename}: {error.strerror}; {cure}"
        elif isinstance(error, MemoryError) or re.search("(of|allocate) memory", str(error)):
            cure = "a smaller --batch, carot.py's --micro-batch or, on a GPU, --precision bf16"
            sentence = f"out of memory ({first_line(error)}); {cure} needs less"
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def pick_device(name="auto"):
    """'auto' -> cuda > mps > cpu, asked only now; anything else is handed to torch."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise InputError(f"--device {name}: not usable here ({reason}); try auto") from error


def set_seed(seed):
    """Python, numpy and torch. Data order and augmentation have their own seeds (see `batches`)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if world() > 1 and torch.cuda.is_available():  # dropout differs between GPUs, nothing else
        torch.cuda.manual_seed(seed + rank())


def progress_bar(name, total, initial=0):
    """tqdm's bar in a terminal; nothing in a log file, where a line per epoch is enough."""
    from tqdm import tqdm

    shown = rank() == 0 and sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc=name, leave=False, disable=not shown)


@contextlib.contextmanager
def interrupts():
    """Yields a function: was Ctrl-C pressed, or SIGTERM sent, since? So the step that is at work is
    finished and saved. A second Ctrl-C stops at once.
    """
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# --- open_clip ------------------------------------------------------------------------------------


def check_model_name(config):
    """Raises InputError unless open_clip has --model, and --pretrained for it."""
    import open_clip

    name, tag = config.model, config.pretrained
    if name not in open_clip.list_models():
        hint = did_you_mean(name, ["tiny_clip", *open_clip.list_models()])
        raise InputError(f"--model: open_clip has no {name!r}{hint}")
    tags = ["random", *open_clip.list_pretrained_tags_by_model(name)]
    if not config.weights and tag not in tags:
        known = f"{name} has no {tag!r}{did_you_mean(tag, tags)}; it has {listed(tags)}"
        raise InputError(f"--pretrained: {known}; a local file goes to --weights")


def needs_quick_gelu(config, metadata):
    """Whether the weights were trained with QuickGELU: --quick-gelu, or what their source says."""
    import open_clip

    if config.quick_gelu != "auto":
        return config.quick_gelu == "yes"
    known = open_clip.get_model_config(config.model) | metadata
    if config.weights and "quick_gelu" not in known:
        print(f"{config.weights} does not say which activation it needs; --quick-gelu overrules")
    return bool(known.get("quick_gelu"))


def create(name, tag, quick_gelu):
    """(open_clip's model, tokenizer); `tag`: of the weights to download. Raises InputError."""
    import open_clip

    options = {"force_quick_gelu": quick_gelu, "pretrained_text": False}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it says "initialized randomly" though weights may follow
    try:
        model = open_clip.create_model(name, pretrained=tag, **options).float().eval()
        tokenizer = open_clip.get_tokenizer(name)
    except (ImportError, OSError, RuntimeError) as error:
        cure = "install what it asks for (SigLIP's needs transformers), or, without a network, get"
        cure += " the file elsewhere and pass --weights PATH"
        raise InputError(f"could not get {name} / {tag} ({first_line(error)}); {cure}") from error
    finally:
        logging.disable(before)
    if getattr(model.visual, "output_tokens", False):
        cure = "expected one vector, as of CLIP and SigLIP"
        raise InputError(f"--model {name}: its image tower (CoCa) gives tokens, too; {cure}")
    return model, tokenizer


def check_names(tokenizer, classes, template, head):
    """Say which class names do not fit the text tower, and whose rows of the head are the same."""
    tokens, padding = tokenizer([template.format(name) for name in classes]), tokenizer([""])[0, -1]
    if cut := [classes[i][:60] for i in (tokens[:, -1] != padding).nonzero()]:
        rest = f"{tokens.shape[1]} tokens, so that the rest may be cut off: {listed(cut)}"
        print(f"note: {len(cut)} class names fill all {rest}")
    rows = (F.normalize(head.cpu(), dim=1) * 1e4).round()
    _, kind, count = rows.unique(dim=0, return_inverse=True, return_counts=True)
    if same := [classes[i][:60] for i in (count[kind] > 1).nonzero()]:
        print(f"note: zero-shot cannot tell these class names apart: {listed(same)}")


# --- processes ------------------------------------------------------------------------------------
# Under `torchrun --nproc-per-node N` every process runs the script on its part of every batch.
# Losses are computed from the gathered outputs of the whole batch: those of one process.


def rank():
    return dist.get_rank() if world() > 1 else 0


def world():
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def init_distributed(device):
    """Meet torchrun's other processes, if it started this one. Only rank 0 prints and writes."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or world() > 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            cure = "start several processes with torchrun, or unset WORLD_SIZE"
            raise InputError(f"WORLD_SIZE is set, but {name} is not set; {cure}")
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    print(f"{world()} processes")


def shard(rows):
    """This process's part of a list, array or tensor: one of `world()` consecutive runs."""
    n = len(rows)
    return rows[n * rank() // world() : n * (rank() + 1) // world()]


def gather(x):
    """The rows of x of every process, in their order; differentiable.

    A loss of the result is the whole batch's on every process. `average_gradients` makes its
    gradients those of the whole batch, too.
    """
    return x if world() == 1 else Gather.apply(x)


class Gather(torch.autograd.Function):  # torch.distributed.nn has one, deprecated since 2.14
    @staticmethod
    def forward(ctx, x):
        rows = torch.zeros(world(), dtype=torch.int64, device=x.device)
        rows[rank()] = len(x)
        dist.all_reduce(rows)
        first = int(rows[: rank()].sum())
        ctx.mine = slice(first, first + len(x))
        whole = x.new_zeros(int(rows.sum()), *x.shape[1:])  # all_gather would want equal parts
        whole[ctx.mine] = x
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, grad):  # the same on every process, since all have the same loss
        return world() * grad[ctx.mine]


def all_true(flag):
    """Whether it is true in all processes."""
    gpu = world() > 1 and dist.get_backend() == "nccl"
    return bool(gather(torch.tensor([int(flag)], device="cuda" if gpu else "cpu")).all())


def broadcast(x):
    """Rank 0's x, any object, for everyone."""
    held = [x]
    if world() > 1:
        dist.broadcast_object_list(held)
    return held[0]


def average_gradients(gradients):
    """Of gradients of the whole batch's loss the mean over processes, in place: that of a parameter
    used before `gather` is, on each, of its own rows and times the number of processes.
    """
    for gradient in gradients if world() > 1 else ():
        dist.all_reduce(gradient)
        gradient /= world()


def in_processes(work, argv, runs, jobs, device):
    """[work(argv, run) for run in runs]; on a CPU `jobs` of them at a time, each in a process of
    its own with its share of the cores: threads gain little on tensors as small as the digits'.
    """
    if jobs == 1 or world() > 1 or pick_device(device).type != "cpu":
        return [work(argv, run) for run in runs]
    threads = max(1, os.cpu_count() // jobs)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        workers = []
        try:
            tasks = [pool.submit(in_worker, threads, work, argv, run) for run in runs]
            workers += multiprocessing.active_children()
            for task in as_completed(tasks):
                task.result()  # raises the first error as it comes
            return [task.result() for task in tasks]
        except BaseException as error:  # Ctrl-C, or an error of one: no other goes on
            for worker in workers:
                worker.terminate()  # SIGTERM: its step is finished and saved
            pool.shutdown(cancel_futures=True)
            if not isinstance(error, BrokenProcessPool):
                raise
            if all(worker.exitcode == 130 for worker in workers):
                raise KeyboardInterrupt from error  # Ctrl-C ended them before it came here
            raise InputError(
                "a process of --jobs was killed; the same command continues. In a script of your"
                " own, call main under `if __name__ == '__main__':`"
            ) from error


def in_worker(threads, work, argv, run):
    """work(argv, run) in a process of `in_processes`: silent, and gone when its parent is, or when
    it is interrupted, so that it begins no other run.
    """

    def follow():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)  # a step at work is finished and saved

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            return work(argv, run)
    except KeyboardInterrupt:
        os._exit(130)


# --- files ----------------------------------------------------------------------------------------


def training_key(config, clip, split, key=None, loss_fn=None, optimiser=None):
    """{name: value} of all that shapes a training besides the starting weights. An edited loss or
    optimiser is another training: the functions' own code is in here. Raises ValueError if one is
    given without a `key`, which would be the way to get an old model back.
    """
    if key is None and (loss_fn or optimiser):
        raise ValueError("a loss_fn or optimiser of your own needs a key that names its settings")
    fields = "epochs", "batch", "lr", "weight_decay", "warmup", "clip", "precision", "seed"
    found = {name: getattr(config, name) for name in fields}
    found |= {"data": fingerprint(split), "images": len(split.labels)}
    found |= {"architecture": hash_of(clip.key)}
    reserved = {*found, "loss_fn", "optimiser", "quick_gelu"}
    if twice := sorted(reserved & (key or {}).keys()):
        raise ValueError(f"key: {twice[0]!r} is in every key already; give yours another name")
    found |= key or {}
    if loss_fn:
        found["loss_fn"] = hash_of(code_of(loss_fn))
    if optimiser:
        groups = [{**g, "params": len(g["params"])} for g in optimiser.param_groups]
        options = {k: v for k, v in vars(optimiser).items() if plain(v)}
        classes = [c for c in type(optimiser).__mro__[:-1] if not c.__module__.startswith("torch")]
        names = [c.__name__ for c in type(optimiser).__mro__]
        found["optimiser"] = hash_of(names, groups, options, [code_of(c) for c in classes])
    return found | {"quick_gelu": clip.quick_gelu}


def new_training(config, name, module, optimiser, loss_fn, batches_from, key):
    """Training whose checkpoint is named by a hash of the starting weights and `key`, which must
    have "images", their number. Hashing 350 MB of weights takes 0.4 s.
    """
    n, weights = key["images"], module.state_dict()
    title, per_epoch = f"{name}, seed {config.seed}", steps_of_epoch(n, config.batch)
    left_out = ["the short batch is left out"] * (per_epoch < math.ceil(n / config.batch))
    file = f"{slug(name)}-seed-{config.seed}-{hash_of(weights, key, *left_out)}.pt"
    path = Path(config.out) / "checkpoints" / file
    return Training(title, module, optimiser, loss_fn, batches_from, per_epoch, path, key)


def save(config, training, scaler, step):
    """Write a training's checkpoint; one that is not finished has what continuing it needs."""
    module, optimiser = training.module, training.optimiser
    for parameter in module.parameters():  # a bad checkpoint would replace a good one
        check_finite(training, parameter, step)
    steps = config.epochs * training.per_epoch
    kept = {**training.metadata, "model": module.state_dict(), "step": step, "steps": steps}
    if step < steps:
        kept |= {"optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()}
        kept["rng"] = torch.get_rng_state()
        kept["rng_cuda"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    write_file(training.path, lambda file: torch.save(kept, file))


def restore(config, training, scaler):
    """Read a training's checkpoint, if there is one; returns the number of finished steps."""
    if not config.resume or not all_true(training.path.is_file()):
        return 0
    saved = load_tensors(training.path)
    load_matching(training.module, saved["model"], training.path)
    if saved["step"] == saved["steps"]:
        print(f"{training.name}: trained before, read from {training.path}")
        return saved["steps"]
    training.optimiser.load_state_dict(saved["optimiser"])
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    if saved["rng_cuda"] is not None and world() == 1:  # of several it is rank 0's alone
        torch.cuda.set_rng_state(saved["rng_cuda"])
    print(f"{training.name}: continues {training.path} at step {saved['step']} of {saved['steps']}")
    return saved["step"]


def check_finite(training, values, step):
    """Raises InputError for inf and nan, so that no checkpoint is written of them."""
    if not values.isfinite().all():
        kept = f"; {training.path} is from before" if training.path.is_file() else ""
        cure = "lower the learning rate, or use --precision fp32"
        problem = f"loss or weights are inf or nan after step {step}"
        raise InputError(f"{training.name}: {problem}; {cure}{kept}")


def fingerprint(split):
    """Hash of a split for the names of caches and checkpoints: its name, labels and class map; of
    files their folder and name, which survive a move, and the sizes of about 1,000 of them; of
    arrays the pixels. Costs 2 s for 1.28 M files, once.
    """
    if split.hash is None:
        images = split.images
        if not isinstance(images, np.ndarray):
            sample = images[:: max(1, len(images) // 1000)]
            sizes = [os.path.getsize(path) if os.path.isfile(path) else -1 for path in sample]
            images = [["/".join(path.rsplit(os.sep, 2)[-2:]) for path in images], sizes]
        split.hash = hash_of(split.name, images, split.labels, split.groups, split.border)
    return split.hash


def hash_of(*things):
    """Short stable hash of tensors, arrays, state dicts, numbers, strings (nested): cache keys."""
    digest = hashlib.sha256()  # in hardware; blake2b takes three times as long over a model

    def add(x):
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(np.ascontiguousarray(x))
        if isinstance(x, torch.Tensor):
            add([str(x.dtype), list(x.shape)])
            x = x.detach().cpu().contiguous().reshape(-1)
            digest.update(x.view(torch.uint8).numpy() if x.numel() else b"")
        elif isinstance(x, dict):
            add([[str(k), x[k]] for k in sorted(x, key=str)])
        elif isinstance(x, (list, tuple)):
            digest.update(b"[")
            for y in x:
                add(y)
            digest.update(b"]")
        else:
            digest.update(f"{type(x).__name__}:{x}\0".encode(errors="surrogateescape"))

    add(things)
    return digest.hexdigest()[:20]


FUNCTIONS = types.FunctionType, types.MethodType, functools.partial


def code_of(thing, seen=()):
    """The program behind a function, class or object, for `hash_of`: its own definition, those of
    all that it names in its file, of what these name, and so on; that of the functions, and the
    numbers and strings, that it closes over or reads of a config that it closes over. Comments,
    docstrings and line breaks change nothing. Not seen is what it calls in other files, and an
    object that it closes over.
    """
    bound = ()
    if isinstance(thing, functools.partial):
        bound = [*thing.args, *map(str, thing.keywords), *thing.keywords.values()]
        thing = thing.func
    if not hasattr(thing, "__qualname__"):  # an object: its class, and the numbers that it holds
        return [code_of(type(thing)), [f"{k}={v}" for k, v in vars(thing).items() if plain(v)]]
    cells = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    cells += getattr(thing, "__defaults__", None) or ()
    cells += (getattr(thing, "__kwdefaults__", None) or {}).values()
    if inspect.ismethod(thing):
        cells += getattr(thing.__self__, "__dict__", {}).values()
    configs = [x for x in cells if dataclasses.is_dataclass(x)]
    names = names_in(thing.__code__) if configs else ()  # attributes among them
    held, seen = [*bound, *cells], (*seen, thing)
    values = [*held, *(getattr(x, name, None) for x in configs for name in names)]
    values = [str(x) for x in values if plain(x)]
    values += [code_of(x, seen) for x in held if isinstance(x, FUNCTIONS) and x not in seen]
    defined, found, todo = definitions(thing), {}, [thing.__qualname__.split(".")[0]]
    # A lambda has no name of its own; what was typed into a console or a notebook has no file.
    if "<lambda>" in thing.__qualname__ or todo[0] not in defined:
        functions = [f for f in (thing, *vars(thing).values()) if hasattr(f, "__code__")]
        values += [(f.__code__.co_code.hex(), names_in(f.__code__)) for f in functions]
        todo += [name for f in functions for name in names_in(f.__code__)]
    while todo:
        name = todo.pop()
        if name in defined and name not in found:
            for node in ast.walk(defined[name]):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value.value = ""  # a docstring
                if isinstance(node, ast.Name):
                    todo.append(node.id)
            found[name] = ast.dump(defined[name])
    return [thing.__qualname__, found, values]


def definitions(thing):
    """{name: syntax tree} of what the file of a function or class defines; {} without a file."""
    try:
        tree = ast.parse(Path(inspect.getsourcefile(thing)).read_text(encoding="utf-8"))
    except (OSError, TypeError):
        return {}
    defined = {}
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
            defined |= {n.id: node for n in targets if isinstance(n, ast.Name)}
        elif hasattr(node, "name"):
            defined[node.name] = node
    return defined


def names_in(code):
    """The names and constants of compiled code, and of functions within it."""
    inner = [names_in(x) if inspect.iscode(x) else [repr(x)] for x in code.co_consts]
    return [*code.co_names, *(name for names in inner for name in names)]


def plain(x):
    """Whether its text says all of it."""
    return isinstance(x, (bool, int, float, str)) or isinstance(x, tuple) and all(map(plain, x))


def cached(config, name, key, compute):
    """compute() -> dict of tensors and numbers, kept in the cache under the hash of `key`."""
    path = cache_path(config, name, key)
    value = read_cache(path)
    if value is None:
        value = compute()
        write_file(path, functools.partial(torch.save, value))
    return value


def cache_path(config, name, key):
    return Path(config.out) / "cache" / f"{slug(name)}-{hash_of(key)}.pt"


def read_cache(path):
    """The cached dict, or None: a missing or damaged cache costs time, not the run."""
    value = None
    try:
        value = load_tensors(path) if path.is_file() else None
    except InputError as error:
        print(f"cache: {error}; computing it anew", file=sys.stderr)
    return value if all_true(value is not None) else None  # else some would wait for the others


def load_tensors(path):
    """One of our own files: tensors, numbers and strings only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated or foreign: torch raises many types
        problem = f"{path} is damaged ({first_line(error)}); delete it, run again"
        raise InputError(problem) from error


def write_file(path, write):
    """Call write(temporary name), then rename: readers see the old file or the new, never a part.

    A full disk or a read-only folder costs the file and not the run, and is said.  -> written?
    """
    if rank():
        return False
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            return True
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        print(f"could not write {path} ({first_line(error)}); going on without", file=sys.stderr)
        return False


def write_results(config, device, rows):
    """Append a line per row to results.jsonl: counts, and what they are worthless without, which is
    settings, commit, versions, device.
    """
    run = {"config": {k: v for k, v in dataclasses.asdict(config).items() if k != "given"}}
    run["versions"] = {m: sys.modules[m].__version__ for m in ("torch", "numpy", "open_clip")}
    run["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    run["time"], run["commit"] = time.strftime("%Y-%m-%dT%H:%M:%S%z"), commit()
    lines = []
    for row in rows:
        counts = {s: {"right": int(right.sum()), "n": len(right)} for s, right in row.right.items()}
        said = {"method": row.method, "seed": row.seed, "choice": row.choice}
        lines.append(json.dumps({**said, **row.numbers, "right": counts, "run": run}))
    path = Path(config.out) / "results.jsonl"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if write_file(path, lambda file: file.write_text(before + "\n".join(lines) + "\n")):
        print(f"\nresults: {path}")


def commit():
    """Of this repository; empty without git."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- kernels --------------------------------------------------------------------------------------


def kernels(work=math.inf):
    """The compiled kernels of csrc/, built at first use; None where they cannot be had, which is
    printed. KERNELS=off switches them off.

    `work`: the multiply-adds that they would do. Below 1e11, a few seconds of PyTorch on two cores,
    a first run would wait longer for the build than it gains: None, nothing built.
    """
    if work < 1e11:
        return None
    from csrc import build

    try:
        return build.load()
    except ValueError as error:
        raise InputError(str(error)) from error
