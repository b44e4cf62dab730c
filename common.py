"""What the four method scripts share; whatever has an equation number stands in its paper's script.

Sections, in the order in which a script uses them:
command line / processes / CLIP / data / train / predict / metrics / results / kernels.

Shapes, in every file: B batch, N samples, C classes, D features, M stored failures, T templates.
`config` is a script's Config: the functions here read only the fields that all scripts have.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
EMBEDDED = HERE / "data"  # the digits, their prompts, the tiny CLIP


class InputError(ValueError):
    """The user gave something wrong: what was found, what was expected, the next step."""


# --- command line ---------------------------------------------------------------------------------


def arg(default, text, choices="", least=0, most=2**62):  # most: torch's seeds
    """One field of a script's `Config`: default, help text, allowed values, range of a number."""
    limits = {"help": text, "choices": choices.split(), "least": least, "most": most}
    return dataclasses.field(default=default, metadata=limits)


def parse(Config, argv, doc):
    """Command line -> Config; types come from the annotations. `.given`: what the user named."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        options = {"help": text, "default": argparse.SUPPRESS, "dest": f.name}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "choices": f.metadata["choices"] or None}
            options["metavar"] = "|".join(f.metadata["choices"]) or f.name.upper()
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    config = Config(**given)
    for f in dataclasses.fields(config):
        value, least, most = getattr(config, f.name), f.metadata["least"], f.metadata["most"]
        if isinstance(value, (int, float)) and not least <= value <= most:
            upto = f" and at most {most}" if most == 1 else ""
            flag = f"--{f.name.replace('_', '-')}"
            raise InputError(f"{flag} {value}: expected at least {least}{upto}")
    if hasattr(config, "out"):
        check_out(config.out)
    config.given = set(given)
    return config


def begin(Config, argv, doc, presets, opened=None):
    """How every main starts: command line -> config and data, the table of sets printed, the preset
    of this kind of data applied. `presets`: {kind: {field: value}}; the digits get their tiny CLIP.
    `opened`: config -> Data, in place of `open_data`. Raises InputError.
    """
    tiny = {"model": "tiny_clip", "weights": str(EMBEDDED / "tiny_clip.npz")}
    presets = presets | {"digits": tiny | presets.get("digits", {})}
    config = parse(Config, argv, doc)
    join(config.device)
    args = config.data, config.val_fraction, config.selection, config.seed
    data = opened(config) if opened else open_data(*args)
    print(describe(data))
    apply_preset(config, data.kind, presets)
    return config, data


def check_out(path):
    """Raises InputError for what cannot be made a folder. One that cannot be written to is found
    when it is written to, which costs the file and not the run: `try_write`.
    """
    try:
        places = [Path(path).absolute(), *Path(path).absolute().parents]
        problem = "" if path and next(filter(Path.exists, places)).is_dir() else "a file is there"
    except (OSError, ValueError) as error:  # too long a name, a loop of links, a NUL
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        raise InputError(f"--out {path[:80]!r}: expected a folder, new or old ({problem})")


def apply_preset(config, kind, presets):
    """Set the preset's values for this kind of data, except what the user gave; say so. A user who
    names another model gets the recipe, and not the model that it was made for.
    """
    skip = set(config.given)
    if skip & {"model", "pretrained", "weights"}:
        skip |= {"model", "weights"}
    preset = {k: v for k, v in presets.get(kind, {}).items() if k not in skip}
    for name, value in preset.items():
        setattr(config, name, value)
    if preset:
        print(f"preset {kind}: " + ", ".join(f"{k} {v}" for k, v in preset.items()))


def choose(text, known, flag):
    """'a,b' -> ['a', 'b'], all of them in `known`, or InputError with the nearest known name."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for w in words:
        if w not in known:
            hint = did_you_mean(w, known)
            raise InputError(f"{flag}: there is no {w!r}{hint}; known are {', '.join(known)}")
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
    """Call a script's main: an InputError becomes its sentence and exit code 2, Ctrl-C 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # of files whose names are not UTF-8
    try:
        main()
        if world() > 1:
            dist.destroy_process_group()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def did_you_mean(word, known):
    """'; did you mean X?' when a known word is near, else ''."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


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
        tensor = torch.zeros(1, device=name)
        tensor.item()  # "meta" has no numbers to give
        return tensor.device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: not usable here ({reason}); try auto") from error


def set_seed(seed):
    """Python, numpy and torch. Data order and augmentation have their own seeds (see `batches`)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if world() > 1 and torch.cuda.is_available():  # dropout differs between GPUs, nothing else
        torch.cuda.manual_seed(seed + rank())


def hash_of(*things):
    """Short stable hash of tensors, arrays, state dicts, numbers, strings (nested): cache keys."""
    digest = hashlib.sha256()  # in hardware; blake2b takes three times as long over a model

    def add(x):
        if isinstance(x, torch.Tensor):
            x = x.detach().cpu().contiguous()
            add([str(x.dtype), list(x.shape)])
            digest.update(x.reshape(-1).view(torch.uint8).numpy() if x.numel() else b"")
        elif isinstance(x, np.ndarray):
            add(torch.from_numpy(np.ascontiguousarray(x)))
        elif isinstance(x, dict):
            for k in sorted(x, key=str):
                add([str(k), x[k]])
        elif isinstance(x, (list, tuple)):
            digest.update(b"[")
            for y in x:
                add(y)
            digest.update(b"]")
        else:
            digest.update(f"{type(x).__name__}:{x}\0".encode(errors="surrogateescape"))

    add(things)
    return digest.hexdigest()[:20]


# --- processes ------------------------------------------------------------------------------------
# Under `torchrun --nproc-per-node N` every process runs the script on its part of every batch.
# Losses are computed from the gathered outputs of the whole batch: those of one process.


def rank():
    return dist.get_rank() if world() > 1 else 0


def world():
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(device):
    """Meet torchrun's other processes, if it started this one. Only rank 0 prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or world() > 1:
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")
    print(f"{world()} processes")


def mine(rows):
    """This process's part of a list, array or tensor: one of `world()` consecutive runs."""
    n, w, r = len(rows), world(), rank()
    return rows[n * r // w : n * (r + 1) // w]


def gather(x, rows=None):
    """The first `rows` rows of x (default all), of every process, in their order; differentiable.

    A loss of the result is the whole batch's on every process. Its gradients are summed over the
    processes here and averaged over them by DistributedDataParallel, which makes them the loss's.
    """
    return x if world() == 1 else Gather.apply(x[:rows].contiguous())


def own(x, rows):
    """Of a gathered x this process's `rows` rows."""
    if world() == 1:
        return x
    first = sum(Gather.sizes(rows, x.device)[: rank()])
    return x[first : first + rows]


class Gather(torch.autograd.Function):
    @staticmethod
    def sizes(n, device):
        out = torch.zeros(world(), dtype=torch.int64, device=meeting_place(device))
        out[rank()] = n
        dist.all_reduce(out)
        return out.tolist()

    @staticmethod
    def forward(ctx, x):
        sizes = Gather.sizes(len(x), x.device)
        ctx.part = slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))
        padded = x.new_zeros(max(sizes), *x.shape[1:], device=meeting_place(x.device))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)]).to(x.device)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.part]


def meeting_place(device):
    """nccl moves GPU memory only."""
    return torch.device("cuda") if dist.get_backend() == "nccl" else device


def everywhere(flag):
    """Whether it is true of all processes."""
    if world() == 1:
        return flag
    least = torch.tensor(int(flag), device=meeting_place(torch.device("cpu")))
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return bool(least)


def from_rank_0(x):
    """Rank 0's x, for everyone."""
    held = [x]
    if world() > 1:
        dist.broadcast_object_list(held)
    return held[0]


def same_random_numbers():
    """Rank 0's state of torch's CPU generator, for everyone: what follows is drawn alike."""
    torch.set_rng_state(from_rank_0(torch.get_rng_state()))


def together(work, jobs, argv, runs):
    """work(argv, run) of all runs, `jobs` at a time, each in a process of its own: threads gain
    little on tensors this small.  -> results, in the order of the runs
    """
    from concurrent.futures import ProcessPoolExecutor

    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        tasks = [pool.submit(silently, work, jobs, argv, run) for run in runs]
        try:
            return [task.result() for task in tasks]
        except BaseException:  # Ctrl-C or an error of one: start no other
            pool.shutdown(cancel_futures=True)
            raise


def silently(work, jobs, *args):
    """work(*args) on its share of the cores; the first process has said what there is to say."""
    torch.set_num_threads(max(1, os.cpu_count() // jobs))
    with contextlib.redirect_stdout(io.StringIO()):
        return work(*args)


def apart(config):
    """Whether `together` is for this run: --jobs of more than one, on a CPU, without torchrun."""
    return config.jobs > 1 and world() == 1 and pick_device(config.device).type == "cpu"


class Loss(nn.Module):
    """A loss as the forward pass of a module, as DistributedDataParallel wants it."""

    def __init__(self, module, loss_fn):
        super().__init__()
        self.module, self.loss_fn = module, loss_fn

    def forward(self, batch):
        return self.loss_fn(batch)


def in_parallel(module, loss_fn):
    """loss_fn, with gradients averaged over the processes."""
    if world() == 1:
        return loss_fn
    # unused: the encoder of a linear probe, a logit_bias that the loss leaves out
    wrap = nn.parallel.DistributedDataParallel
    return wrap(Loss(module, loss_fn), find_unused_parameters=True)


def same_statistics(module):
    """Rank 0's BatchNorm statistics, for everyone."""
    norms = nn.modules.batchnorm._BatchNorm
    if world() > 1 and any(isinstance(m, norms) for m in module.modules()):
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


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

    @property
    def key(self):
        """What shapes an image's features besides the weights, for cache keys."""
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
    instead), .quick_gelu ("auto": by the tag's entry, by our checkpoint's record, or yes for files
    in OpenAI's form), .trust_checkpoint. Raises InputError for unknown names and unfit files.
    """
    import open_clip

    from data import checkpoints

    name, tag, path = config.model, config.pretrained, config.weights
    if (EMBEDDED / f"{name}.json").is_file():
        open_clip.add_model_config(EMBEDDED / f"{name}.json")
    if name not in open_clip.list_models():
        hint = did_you_mean(name, open_clip.list_models())
        raise InputError(
            f"--model: open_clip has no {name!r}{hint}; open_clip.list_models() has all"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not path and tag not in ("random", *tags):
        hint = did_you_mean(tag, tags)
        raise InputError(f"--pretrained: {name} has no {tag!r}{hint}; it has {', '.join(tags)}")
    state, said = checkpoints.read_weights(path, config.trust_checkpoint) if path else (None, {})
    said = said if path else open_clip.get_pretrained_cfg(name, tag) or {}
    said = {k: v for k, v in open_clip.get_model_config(name).items() if k == "quick_gelu"} | said
    source = bool(said.get("quick_gelu"))
    gelu = {"auto": source, "yes": True, "no": False}[config.quick_gelu]
    if not gelu and "quickgelu" in name:
        raise InputError(f"--quick-gelu no: {name} has QuickGELU; use {name.split('-quick')[0]}")
    if config.quick_gelu == "auto" and path and "quick_gelu" not in said:
        print(f"{path} does not say which activation it needs; --quick-gelu overrules the guess")
    download = None if path or tag == "random" else tag
    options = {"force_quick_gelu": gelu, "pretrained_text": False}
    logging.disable(logging.WARNING)  # it says "initialized randomly" though weights follow below
    try:
        model = open_clip.create_model(name, pretrained=download, **options).float().eval()
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        cure = "without a network, get the file elsewhere and pass --weights PATH"
        raise InputError(f"could not get {name} / {tag} ({reason}); {cure}") from error
    finally:
        logging.disable(logging.NOTSET)
    if state is not None:
        load_matching(model, state, path)
    size = model.visual.image_size
    size = size[0] if isinstance(size, (tuple, list)) else size
    count = sum(p.numel() for p in model.visual.parameters()) / 1e6
    activation = "QuickGELU" if gelu else "GELU"
    print(f"CLIP: {name} from {path or tag}; {count:.1f} M image parameters, {activation}, fp32")
    mean, std = tuple(model.visual.image_mean), tuple(model.visual.image_std)
    return Clip(model, open_clip.get_tokenizer(name), name, gelu, size, mean, std)


def load_matching(model, state, path):
    """load_state_dict that answers in one sentence when names or shapes differ."""
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    own = model.state_dict()
    counters = {k: v for k, v in own.items() if not v.is_floating_point()}  # of BatchNorm
    state = counters | state
    missing = [k for k in own if k not in state]
    scalars = [k for k in own if k in state and state[k].numel() == own[k].numel() == 1]
    state = state | {k: state[k].reshape(own[k].shape) for k in scalars}
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    if wrong or missing:
        k = (wrong or missing)[0]
        found = f"{tuple(state[k].shape)}" if wrong else "nothing"
        raise InputError(
            f"{path} does not fit this model: {len(missing)} of {len(own)} tensors are missing,"
            f" {len(wrong)} have another shape; {k} should be {tuple(own[k].shape)}, found {found};"
            " check --model"
        )
    if bad := [k for k in own if not state[k].isfinite().all()]:
        raise InputError(f"{path}: {bad[0]} holds inf or nan; the file is of no use")
    model.load_state_dict({k: state[k] for k in own})


def load_finetuned(config, data, clip, zero_shot):
    """Classifier of the checkpoint config.finetuned: its own head, or one from its text tower."""
    from data import checkpoints

    state, said = checkpoints.read_weights(config.finetuned, config.trust_checkpoint)
    if said.get("quick_gelu", clip.quick_gelu) != clip.quick_gelu:
        raise InputError(f"{config.finetuned} has another activation; set --quick-gelu")
    if "held-out" in data.val.path:
        print("note: the checkpoint may have been trained on what is now ID val, which favours it")
    model = copy.deepcopy(zero_shot)
    if "head.weight" not in state:
        tuned = copy.deepcopy(clip)
        load_matching(tuned.model, state, config.finetuned)
        device = model.head.weight.device
        state["head.weight"] = zero_shot_head(tuned, data.classes, data.templates, device)
    state.setdefault("head.bias", torch.zeros(len(state["head.weight"])))
    load_matching(model, state, config.finetuned)
    return model


def zero_shot(config, data):
    """Clip, and the zero-shot Classifier of the data's classes, on the device that config names."""
    device = pick_device(config.device)
    set_seed(config.seed)  # matters for --pretrained random only
    clip = load_clip(config)
    return clip, classifier(config, data, clip, device)


def classifier(config, data, clip, device):
    """Classifier of a CLIP: its image tower, and the head that its text tower makes (cached)."""
    args = clip, data.classes, data.templates, device
    key = [clip.model.state_dict(), clip.key, *args[1:3]]  # 80,000 prompts: hours on a CPU
    kept = cached(config, "head", key, lambda: {"head": zero_shot_head(*args).cpu()})
    return Classifier(clip.model.visual, kept["head"]).to(device)


@torch.no_grad()
def zero_shot_head(clip, classes, templates, device="cpu"):
    """[C, D]: embed templates x names, normalise, mean, normalise, times exp(logit_scale)."""
    import open_clip

    model = clip.model.to(device).eval()
    args = model, clip.tokenizer, classes, templates
    head = open_clip.build_zero_shot_classifier(*args, device=device)
    print(f"zero-shot head: {len(classes)} names x {len(templates)} prompts")
    return (head.T * model.logit_scale.exp()).float()


# --- data -----------------------------------------------------------------------------------------
# Where the public data sets lie on disk, and their class maps: data/trees.py.


@dataclass
class Split:
    """One set of images: files in class folders, or one embedded array."""

    name: str  # "ImageNet-R", "val", "STL-10" ...
    path: str  # where it was found, for the table and the errors
    images: list | np.ndarray  # file paths, or uint8 [N, H, W] / [N, H, W, 3]
    labels: torch.Tensor  # [N] int64, index into the set's own classes (after `project`)
    groups: list[list[int]] | None = None  # set class -> training class ids; None: all classes
    border: int = 0  # pixels cut off each side first (ObjectNet: 2)
    expected: int | None = None  # published number of images

    @functools.cached_property
    def fingerprint(self):
        """Hash of file names (or pixels, of arrays), labels and class map, for cache keys."""
        return hash_of(self.images, self.labels, self.groups, self.border)


@dataclass
class Data:
    """The sets of one study. A class *is* its index: two of ImageNet's are named "missile"."""

    kind: str  # "digits", "imagenet", "cifar10", "entity30", "domainnet" or "folder"
    classes: list[str]  # prompt names, in the order of the training labels
    templates: list[str]  # format strings with {}
    train: Split
    val: Split  # in-distribution, for selection
    test: Split  # in-distribution, for reporting
    shifts: list[Split]
    missing: list[str]  # usual shift sets that were not found


def project(logits, groups):
    """Logits of a set's own classes, the max over each group of ids.  [B, C] -> [B, len(groups)]

    Before the softmax: classes that cannot occur must not take probability.
    """
    if groups is None:
        return logits
    if all(len(ids) == 1 for ids in groups):
        return logits[:, [ids[0] for ids in groups]]
    width = max(map(len, groups))
    padded = [ids + ids[:1] * (width - len(ids)) for ids in groups]  # a repeat keeps the max
    return logits[:, torch.tensor(padded, device=logits.device)].amax(dim=-1)


class Images(torch.utils.data.Dataset):
    """(image, label, index) of a Split. An unreadable file is an InputError, or None if skipped.

    An item is (index, seed): the transform draws from torch's generator under that seed, so that a
    random crop depends neither on the number of workers nor on what was drawn before.
    """

    def __init__(self, split, transform, skip_bad=False):
        self.split, self.transform, self.skip_bad = split, transform, skip_bad

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, item):
        index, seed = item
        source, border = self.split.images[index], self.split.border
        try:
            image = read_rgb(source)
        except Exception as error:  # PIL has a dozen types for damaged files
            if self.skip_bad:
                return None
            empty = os.path.isfile(source) and not os.path.getsize(source)
            raise InputError(
                f"{source} cannot be read as an image: {'the file is empty' if empty else error}. "
                "Restore the file, or leave such files out with --skip-bad-images."
            ) from error
        if border:
            image = image.crop((border, border, image.width - border, image.height - border))
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds GPUs: 0.3 ms
        image = self.transform(image)
        torch.set_rng_state(state)
        return image, int(self.split.labels[index]), index


def read_rgb(source):
    """A file or uint8 array as PIL RGB. Alpha is dropped and EXIF ignored, as CLIP's code does."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    with warnings.catch_warnings():  # up to twice its limit of 89 M pixels PIL only warns
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(source)
    with image:
        if image.mode.startswith("I"):  # 16-bit grey: PIL's conversion would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        elif "transparency" in image.info:
            image = image.convert("RGBA")
        image.load()  # the file is closed below
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy: 0.2 ms


def collate(batch):
    """Stacks what Images gave, without the skipped; None if nothing is left."""
    batch = [item for item in batch if item is not None]
    if not batch:
        return None
    images, labels, index = zip(*batch, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(index)


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


def open_data(path="digits", val_fraction=0.02, selection="paper", seed=0):
    """What --data names: `digits`, a folder, or `entity30:FOLDER` with an ImageNet tree in FOLDER.

    Differs (A10): the paper does not define its validation set and its code selects on the images
    that it reports. Here a set without val/ of its own gives up a stratified, seeded share of its
    training images; selection="code" does as the code does.
    """
    from data import trees

    data = trees.find(str(path))
    if selection == "code":
        data.val = data.test
    elif data.val is None:
        data.train, data.val = hold_out(data.train, val_fraction, seed)
    return data


def describe(data):
    """The table printed before any work: what was found where, what is missing, what is wrong."""
    rows, notes = [("set", "path", "images", "classes", "expected")], []
    for s in (data.train, data.val, data.test, *data.shifts):
        n, classes = len(s.images), len(data.classes if s.groups is None else s.groups)
        published = f"{s.expected:,}" if s.expected else "-"
        rows.append((s.name, s.path, f"{n:,}", str(classes), published))
        if s.expected and n != s.expected:
            gap = f"{abs(n - s.expected):,} {'missing' if n < s.expected else 'too many'}"
            notes.append(
                f"WARNING: {s.name} has {n:,} images where {published} are expected ({gap}). Do "
                "not compare its numbers with published ones; unpack the archive again."
            )
    if data.val is data.test:
        notes.append("val is the test set: selection sees the reported images.")
    if data.kind == "imagenet" and len(data.classes) < 1000:
        notes.append(
            f"train/ has {len(data.classes)} of ImageNet's 1000 classes: all sets are cut down to "
            "them, and published image counts do not apply."
        )
    notes += [f"MISSING, so not evaluated: {name}" for name in data.missing]
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    layout = "{:<{}}  {:<{}}  {:>{}}  {:>{}}  {:>{}}"
    lines = [layout.format(*sum(zip(row, width, strict=True), ())) for row in rows]
    return "\n".join(lines + notes)


def hold_out(train, fraction, seed):
    """(rest, held out): a seeded share of every class, at least one image of a class with two."""
    if not 0 < fraction < 1:
        raise InputError(f"The validation share is {fraction}, but must lie between 0 and 1.")
    labels, rng = train.labels.numpy(), np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == c))
        held[own[: min(max(1, round(fraction * len(own))), len(own) - 1)]] = True
    if not held.any():
        raise InputError(f"{train.path} has one image per class, none to hold out. Add a val/.")

    def take(mask, **changes):
        kept = np.flatnonzero(mask)
        images = train.images
        images = images[kept] if isinstance(images, np.ndarray) else [images[i] for i in kept]
        return dataclasses.replace(train, images=images, labels=train.labels[kept], **changes)

    expected = train.expected and train.expected - int(held.sum())
    where = f"{train.path} (held-out {fraction:.0%})"
    return take(~held, expected=expected), take(held, name="val", path=where, expected=None)


# --- train ----------------------------------------------------------------------------------------


def warmup_cosine(step, warmup, total):
    """Factor on the learning rate at `step`, from 0: (step + 1) / warmup, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def batches(n, batch, steps, seed, first=0):
    """Yield [(index, augmentation seed), ...] for every step from `first`.

    Step t depends on (n, batch, seed, t) alone, so that a resumed run, with any number of workers,
    sees the same crops of the same images. An epoch is a permutation; its last batch may be short.
    """
    per_epoch, order, order_of = math.ceil(n / batch), None, -1
    for step in range(first, steps):
        epoch, i = divmod(step, per_epoch)
        if epoch != order_of:
            order, order_of = np.random.default_rng([seed, epoch]).permutation(n), epoch
        indices = order[i * batch : (i + 1) * batch].tolist()
        crops = np.random.default_rng([seed, step, n]).integers(2**32, size=len(indices)).tolist()
        yield list(zip(indices, crops, strict=True))


def load_images(split, transform, order, config):
    """Yield (images [B, 3, H, W], labels [B], index [B]) for every list of (index, seed).

    None where no image of a list could be read; with several processes, which must keep step, one
    black image and no labels. `transform` ends in ToTensor and Normalize: these run here, on the
    device and for the batch, with the same result; until then pixels are bytes, a quarter of fp32.
    """
    from PIL import Image
    from torchvision import transforms as t

    *shape, _, normalise = transform.transforms
    as_bytes = t.Compose([*shape, t.PILToTensor()])
    device, workers = pick_device(config.device), worker_count(split, config)
    context = torch.multiprocessing.get_context("forkserver")  # fork and threads hang
    context.set_forkserver_preload(["torchvision.transforms"])  # imported once, not by each worker
    batches = torch.utils.data.DataLoader(
        Images(split, as_bytes, config.skip_bad_images),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from the generator that dropout uses
        multiprocessing_context=context if workers else None,
    )
    try:
        for batch in batches:
            if batch is None and world() > 1:
                none = torch.empty(0, dtype=torch.int64)
                batch = as_bytes(Image.new("RGB", (8, 8)))[None], none, none
            if batch is not None:
                pixels = batch[0].to(device, non_blocking=True).float()
                batch = normalise(pixels.div_(255)), *batch[1:]
            yield batch
    except InputError as error:  # a worker process wraps the sentence in its traceback
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        cure = "out of memory? The same command continues; fewer --workers need less"
        said = f"a worker process died ({first_line(error)})"
        raise InputError(f"{split.name}: {said}; {cure}") from error


def worker_count(split, config):
    """--workers; -1: this process's share of the cores where a GPU waits for files, else 0, since
    on a CPU the model, a hundred times slower than decoding, wants the cores itself.
    """
    if config.workers >= 0:
        return config.workers
    if isinstance(split.images, np.ndarray) or pick_device(config.device).type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def to_device(batch, device):
    return tuple(x.to(device, non_blocking=True) for x in batch)


def autocast(device, precision):
    """fp32: off; bf16, fp16: torch's autocast over fp32 weights."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


@contextlib.contextmanager
def ctrl_c():
    """Yields a list whose item Ctrl-C sets to True, so that the step is finished; twice stops."""
    asked = [False]
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number, frame):
        asked[0] = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def fit(
    module,
    loss_fn,
    batches_from,
    optimiser,
    *,
    steps,
    save_every=0,
    warmup=0,
    clip=0.0,
    precision="fp32",
    path=None,
    said=None,
    resume=True,
    name="fit",
    probe=None,
    schedule=warmup_cosine,
):
    """Train `module` in place: learning rates times `schedule`, gradient clip, autocast.

    loss_fn(batch) -> scalar. batches_from(step) -> iterator of tuples of tensors from that step on.
    path: checkpoint, written every `save_every` steps, on Ctrl-C and at the end; with `resume` an
    unfinished one is continued bit for bit, a finished one read and not trained again. `said`: what
    else to keep in it (numbers, strings). probe(n) is called when n steps are done, 0 included.
    Raises InputError when the loss is not finite.
    """
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    first = restore(path, module, optimiser, scaler, steps, name) if path and resume else 0
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    loss_of, stop = in_parallel(module, loss_fn), False
    module.train()
    with ctrl_c() as asked, progress(total=steps, initial=first, desc=name) as bar:
        for step, batch in enumerate(batches_from(first) if first < steps else (), first):
            if probe and step == first:
                probe(first)
                module.train()
            for group in optimiser.param_groups:
                base = group.setdefault("initial_lr", group["lr"])
                group["lr"] = base * schedule(step, warmup, steps)
            if batch is not None and world() > 1 and everywhere(not len(batch[-1])):
                batch = None
            if batch is not None:  # None: not one image of the batch was readable
                with autocast(device, precision):
                    loss = loss_of(to_device(batch, device))
                scaler.scale(loss).backward()
                scaler.unscale_(optimiser)
                if clip:
                    nn.utils.clip_grad_norm_(trained, clip)
                scaler.step(optimiser)
                scaler.update()
                optimiser.zero_grad(set_to_none=True)
            bar.update()
            same_statistics(module)
            done = step + 1
            if step % 10 == 0 or world() == 1:
                stop = not everywhere(not asked[0])
            save = done == steps or stop or (save_every and done % save_every == 0)
            if probe:
                probe(done)
                module.train()
            if batch is not None and (save or step % 10 == 0):  # reading the loss waits for the GPU
                value = loss.item()
                if not math.isfinite(value):
                    raise diverged(name, f"the loss is {value} at step {step}", path)
                rate = world() * len(batch[0]) * (bar.format_dict["rate"] or 0)
                bar.set_postfix_str(f"loss {value:.3f}, lr {group['lr']:.1e}, {rate:.0f} images/s")
            if save and path:
                if not all(p.isfinite().all() for p in trained):  # else it would replace a good one
                    raise diverged(name, f"weights are inf or nan after step {step}", path)
                kept = {"model": module.state_dict(), "step": done, "steps": steps, **(said or {})}
                if done < steps:
                    kept |= {"optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()}
                    kept |= {"rng": torch.get_rng_state(), "rng_device": device_rng(device)}
                try_write(path, functools.partial(torch.save, kept))
            if stop and done < steps:
                raise KeyboardInterrupt
    if first < steps and done < steps:
        raise InputError(f"{name}: the data ended at step {done} of {steps}; are images missing?")
    same_statistics(module)
    module.eval()


def diverged(name, what, path):
    kept = f"; {path} is from before" if path and Path(path).is_file() else ""
    cure = "lower the learning rate, or use --precision fp32"
    return InputError(f"{name}: {what}; {cure}{kept}")


def progress(*args, **options):
    """tqdm's bar, of rank 0 only."""
    from tqdm import tqdm

    return tqdm(*args, leave=False, disable=rank() > 0, **options)


def device_rng(device):
    cuda = device.type == "cuda"
    return torch.cuda.get_rng_state(device) if cuda else torch.empty(0, dtype=torch.uint8)


def restore(path, module, optimiser, scaler, steps, name):
    """Read a checkpoint of `fit`, if there is one; returns the number of finished steps."""
    if not everywhere(Path(path).is_file()):
        return 0
    saved = load_tensors(path)
    if saved.get("steps") != steps:
        raise InputError(f"{path} is of {saved.get('steps')} steps, not {steps}; use another --out")
    load_matching(module, saved["model"], path)
    if saved["step"] == steps:
        print(f"{name}: trained before, read from {path}")
        return steps
    optimiser.load_state_dict(saved["optimiser"])
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"])
    if len(saved["rng_device"]) and world() == 1:
        torch.cuda.set_rng_state(saved["rng_device"])
    elif len(saved["rng_device"]):  # rank 0's; others' dropout goes on to differ
        torch.cuda.manual_seed(torch.initial_seed() + saved["step"] + rank())
    print(f"{name}: continues {path} at step {saved['step']} of {steps}")
    return saved["step"]


def fine_tune(
    config, name, model, split, clip, lr, seed, optimiser=None, loss_of=None, probe=None, also=None
):
    """Train a Classifier on augmented images, by the fields of a Config.

    AdamW or `optimiser`; loss_of(images, labels) or cross-entropy; `probe`: see `fit`. `also`:
    {field: value} of what shapes the run besides the fields that all scripts have.
    """
    transform, n = train_transform(clip.size, clip.mean, clip.std), len(split.labels)

    def batches_from(first):
        order = batches(n, config.batch, steps_of(config, n), seed, first)
        return load_images(split, transform, map(mine, order), config)

    def loss_fn(batch):
        images, labels = batch[:2]
        if loss_of:
            return loss_of(images, labels)
        rows = len(labels)
        return F.cross_entropy(gather(model(images)[1], rows), gather(labels))

    args = config, name, model, model, loss_fn, batches_from, n, split, clip, lr, seed
    train_by(*args, optimiser, probe, also)


def linear_probe(config, name, model, split, clip, lr, seed, probe=None):
    """The same for the head alone, on cached features of the test transform."""
    features, labels = frozen_features(config, model, split, clip)
    n = len(labels)

    def batches_from(first):
        for rows in batches(n, config.batch, steps_of(config, n), seed, first):
            index = torch.tensor([i for i, _ in mine(rows)], dtype=torch.int64)
            kept = index if len(index) else torch.tensor([0])  # DDP wants a pass of every process
            yield features[kept], labels[index]

    def loss_fn(batch):
        return F.cross_entropy(gather(model.classify(batch[0]), len(batch[1])), gather(batch[1]))

    args = config, name, model, model.head, loss_fn, batches_from, n, split, clip, lr, seed
    train_by(*args, probe=probe)


def steps_of(config, n):
    return config.epochs * math.ceil(n / config.batch)


def train_by(
    config,
    name,
    model,
    part,
    loss_fn,
    batches_from,
    n,
    split,
    clip,
    lr,
    seed,
    optimiser=None,
    probe=None,
    also=None,
):
    """`fit` with AdamW; the checkpoint's name is a hash of start, data and every number used.

    also: further numbers and strings that shape the result.
    """
    fields = ("epochs", "batch", "weight_decay", "warmup", "clip", "precision")
    said = {k: getattr(config, k) for k in fields} | {"name": name, "lr": lr, "seed": seed}
    said |= {"architecture": clip.name, "quick_gelu": clip.quick_gelu, "images": n, **(also or {})}
    if optimiser is None:
        optimiser = torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=config.weight_decay)
    else:
        groups = [g | {"params": len(g["params"])} for g in optimiser.param_groups]
        said["optimiser"] = f"{type(optimiser).__name__} {groups}"
    key = hash_of(model.state_dict(), split.fingerprint, clip.key, said)
    set_seed(seed)
    fit(
        model,
        loss_fn,
        batches_from,
        optimiser,
        steps=steps_of(config, n),
        save_every=math.ceil(n / config.batch),
        warmup=config.warmup,
        clip=config.clip,
        precision=config.precision,
        path=Path(config.out) / "checkpoints" / f"{slug(name)}-{key}.pt",
        said=said,
        resume=config.resume,
        name=name,
        probe=probe,
    )


def try_write(path, write):
    """Call write(temporary name), fsync, rename: readers see the old file or the new, never a part.

    A full disk or a read-only folder costs the file and not the run, and is said.  -> written?
    """
    if rank():
        return False
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*"):  # by a run that was killed
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
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


def load_tensors(path):
    """One of our own files: tensors, numbers and strings only."""
    try:
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated or foreign: torch raises many types
        raise InputError(
            f"{path} is damaged ({first_line(error)}); delete it, run again"
        ) from error


def check_sums(path):
    """torch.save keeps a CRC-32 of every record, which torch.load does not look at: a flipped bit
    of a weight would pass. Costs 1 s per 2 GB. Raises ValueError.
    """
    with zipfile.ZipFile(path) as archive:
        if bad := archive.testzip():
            raise ValueError(f"the checksum of {bad} is wrong")


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

    Yields, in index order and on the CPU in fp32, (index [B], labels [B], {name: (raw features
    [B, D], logits of the split's classes [B, C])}).
    """
    device = next(next(iter(models.values())).parameters()).device
    n, b = len(split.labels), config.batch * world()
    order = [[(j, 0) for j in range(i, min(i + b, n))] for i in range(0, n, b)]
    transform, unread = eval_transform(clip.size, clip.mean, clip.std), set(range(n))
    for model in models.values():
        model.eval()
    images_of = load_images(split, transform, map(mine, order), config)
    for batch in progress(images_of, split.name, len(order), unit="batch", delay=2):
        if batch is None:
            continue
        images, labels, index = to_device(batch, device)
        out, rows = {}, len(labels)
        with autocast(device, config.precision):
            for name, model in models.items():
                features, logits = model(images)
                parts = features.float(), project(logits, split.groups)
                out[name] = tuple(gather(x, rows).cpu() for x in parts)
        labels, index = gather(labels), gather(index)
        if not len(index):
            continue
        unread -= set(index.tolist())
        yield index.cpu(), labels.cpu(), out
    if unread:
        files = ", ".join(str(split.images[i]) for i in sorted(unread)[:10])
        more = ", ..." * (len(unread) > 10)
        print(f"{split.name}: {len(unread)} of {n} images are unreadable, left out: {files}{more}")


def predict(config, models, split, clip):
    """{name: Prediction}; what the cache has from the same weights and images is not run again.

    Raises InputError if models disagree about the images: a file changed under the cache.
    """
    key = [split.fingerprint, clip.key, config.precision, config.skip_bad_images]
    cache = Path(config.out) / "cache"
    path = {
        n: cache / f"{slug(split.name)}-{hash_of(m.state_dict(), key)}.pt"
        for n, m in models.items()
    }
    found = {n: read_cache(p) for n, p in path.items()}
    if todo := {n: m for n, m in models.items() if found[n] is None}:
        parts = {n: [] for n in todo}
        for index, labels, out in forward(config, todo, split, clip):
            for n in todo:
                parts[n].append((*out[n], labels, index))
        if not any(parts.values()):
            raise InputError(f"{split.name}: none of its {len(split.labels)} images can be read")
        for n in todo:
            columns = map(torch.cat, zip(*parts[n], strict=True))
            found[n] = dict(zip(("features", "logits", "labels", "index"), columns, strict=True))
            try_write(path[n], functools.partial(torch.save, found[n]))
    one = next(iter(found.values()))
    for n, f in found.items():
        if not (torch.equal(f["index"], one["index"]) and torch.equal(f["labels"], one["labels"])):
            raise InputError(f"{split.name}: {n} saw other labels than the rest; delete {cache}")
    return {n: Prediction(f["features"], f["logits"], f["labels"]) for n, f in found.items()}


def frozen_features(config, model, split, clip):
    """Raw features [N, D] and labels [N] of a split, cached (1.28 M x 512 in fp32: 2.6 GB)."""

    def compute():
        rows = [(out[""][0], y) for _, y, out in forward(config, {"": model}, split, clip)]
        if not rows:
            raise InputError(f"{split.name}: none of its {len(split.labels)} images can be read")
        return dict(
            zip(("features", "labels"), map(torch.cat, zip(*rows, strict=True)), strict=True)
        )

    key = [model.visual.state_dict(), split.fingerprint, clip.key, config.precision]
    key.append(config.skip_bad_images)
    kept = cached(config, "frozen", key, compute)
    return kept["features"], kept["labels"]


def cached_together(config, name, keys, compute):
    """`cached` for {item: key} whose values one pass computes: compute() -> {item: dict}."""
    found = {x: read_cache(cache_path(config, name, key)) for x, key in keys.items()}
    if any(value is None for value in found.values()):
        found = compute()
        for x, value in found.items():
            save = functools.partial(torch.save, value)
            try_write(cache_path(config, name, keys[x]), save)
    return found


def cached(config, name, key, compute):
    """compute() -> dict of tensors and numbers, kept in the cache under the hash of `key`."""
    path = cache_path(config, name, key)
    value = read_cache(path)
    if value is None:
        value = compute()
        try_write(path, functools.partial(torch.save, value))
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
    return value if everywhere(value is not None) else None  # else some would wait for the others


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- metrics --------------------------------------------------------------------------------------


def accuracy(scores, labels):
    """Share of rows of [N, C] whose largest score is at the label [N]; nan for no rows."""
    check_scores("accuracy", scores, labels)
    return (scores.argmax(1) == labels).double().mean().item()


def check_scores(op, scores, labels):
    """Raises InputError unless scores [N, C] are finite and labels [N] from 0 to C - 1. Without it
    NaN counts as the largest score, and a label that no score can be at only as a wrong answer.
    """
    shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise InputError(f"{op}: expected scores [N, C] and integer labels [N], got {shapes}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        found = f"{labels.min()} to {labels.max()}"
        raise InputError(f"{op}: labels are {found}, but there are {scores.shape[1]} classes")
    if len(labels) and not scores.sum().isfinite() and not scores.isfinite().all():
        raise InputError(f"{op}: scores hold inf or nan")


def wilson(k, n, z=1.959964):
    """95 % Wilson interval of a share of k in n; nan for n = 0."""
    if not 0 <= k <= n:
        raise InputError(f"wilson: k = {k} of n = {n}; expected 0 <= k <= n")
    if n == 0:
        return math.nan, math.nan
    p, scale = k / n, 1 / (1 + z * z / n)
    half = z * scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle = scale * (p + z * z / (2 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def ece(probabilities, labels, bins=10):
    """Expected calibration error, a share: sum_b n_b / N |accuracy_b - confidence_b|, top-1
    confidence, `bins` of equal width, (low, high].  [N, C], [N]
    """
    check_probabilities("ece", probabilities, labels)
    if bins < 1 or not len(labels):
        raise InputError(f"ece: {bins} bins of {len(labels)} samples; expected 1 or more of both")
    confidence, predicted = probabilities.double().max(1)
    gap = (predicted == labels).double() - confidence
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return gap.new_zeros(bins).index_add_(0, index, gap).abs().sum().item() / len(labels)


def check_probabilities(op, probabilities, labels):
    check_scores(op, probabilities, labels)
    if len(labels) and not -1e-3 <= probabilities.min() <= probabilities.max() <= 1.001:
        raise InputError(f"{op}: probabilities are not in 0 to 1; are they logits?")


def nll(probabilities, labels):
    """Mean negative log-likelihood in nats; zeros count as the smallest fp32 number."""
    check_probabilities("nll", probabilities, labels)
    picked = probabilities.gather(1, labels[:, None]).double()
    return -picked.clamp_min(torch.finfo(torch.float32).tiny).log().mean().item()


def temperature(logits, labels, criterion):
    """T of softmax(logits / T), from ID data [N, C], [N]. off: 1. nll: least NLL. confidence: its
    mean = accuracy, by bisection, since confidence falls with T; where no T does it (accuracy 1, or
    at most 1/C) it says so and gives 1.
    """
    if criterion not in ("off", "nll", "confidence"):
        raise InputError(f"temperature: criterion {criterion!r}; expected off, nll or confidence")
    check_scores("temperature", logits, labels)
    if criterion == "off":
        return 1.0
    logits = logits.double()
    if criterion == "nll":
        from scipy.optimize import minimize_scalar

        def loss(t):
            return F.cross_entropy(logits / math.exp(t), labels).item()

        return math.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x)
    target, low, high = accuracy(logits, labels), -7.0, 7.0
    if not 1 / logits.shape[1] < target < 1:
        print(f"temperature: none gives a mean confidence of {target:.3f}; 1 is used")
        return 1.0
    for _ in range(60):
        t = (low + high) / 2
        confidence = (logits / math.exp(t)).softmax(1).amax(1).mean()
        low, high = (t, high) if confidence > target else (low, t)
    if abs(confidence - target) > 1e-3:  # ties: the confidence jumps past it
        print(f"temperature: none gives a mean confidence of {target:.3f}; 1 is used")
        return 1.0
    return math.exp(t)


def accuracies(rows, method):
    """{split: percent}, mean over seeds, of result rows {"method", "right": {split: bool [N]}}."""
    own = [r["right"] for r in rows if r["method"] == method]
    return {s: 100 * float(np.mean([r[s].double().mean() for r in own])) for s in own[0]}


def mean_shift(by_split):
    """Unweighted mean over all splits but the first, which is ID; nan if there is no other."""
    shifts = list(by_split.values())[1:]
    return sum(shifts) / len(shifts) if shifts else math.nan


def interval(runs, image_variance=None):
    """Mean over runs, with its 95 % interval for other runs and other images: the variances of the
    two are added, and Student's t has Satterthwaite's degrees of freedom. Without an image variance
    over runs alone, of one run over images alone, of neither nan.  [R], [] -> 3 numbers
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


def sampled(rows):
    """What the intervals of result rows are over, in words."""
    return "runs and images" if len({r["seed"] for r in rows}) > 1 else "images of one run"


def gain(rows, method, base):
    """Points by which `method` beats `base` on ID and in the mean over shifts, each with its 95 %
    interval over runs and, within each split, images; the sets are fixed. See `interval`.
    """
    pairs = [[r["right"] for r in rows if r["method"] == m] for m in (method, base)]
    pairs = list(zip(*pairs, strict=True))
    means, variance = {}, {}
    for split in pairs[0][0]:
        gaps = np.stack([100.0 * a[split].numpy() - 100.0 * b[split].numpy() for a, b in pairs])
        means[split], n = gaps.mean(1), gaps.shape[1]
        variance[split] = gaps.mean(0).var(ddof=1) / n if n > 1 else 0.0
    first, *shifts = means

    def over(splits):
        if not splits:
            return math.nan, math.nan, math.nan
        runs = np.mean([means[s] for s in splits], 0)
        return interval(runs, sum(variance[s] for s in splits) / len(splits) ** 2)

    return over([first]), over(shifts)


# --- results --------------------------------------------------------------------------------------


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
    """Table of result rows (see `accuracies`): a line per method, a column per split."""
    splits, lines = list(rows[0]["right"]), []
    for method in dict.fromkeys(r["method"] for r in rows):
        mean = accuracies(rows, method)
        chosen = [np.atleast_1d(r["choice"]) for r in rows if r["method"] == method]
        chosen = ["/".join(f"{x:.2g}" for x in c) for c in chosen if c[0] is not None]
        numbers = [f"{x:.1f}" for x in (*mean.values(), mean_shift(mean))]
        lines.append([method, *numbers, " ".join(dict.fromkeys(chosen))])
    return table(["method", *splits, "avg shift", "chosen"], lines, title)


def write_results(config, device, rows):
    """Append a line per row to results.jsonl: counts, Wilson intervals, and the run's record."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    run = {
        "config": dataclasses.asdict(config),
        "commit": commit or "not a git checkout",
        "versions": {m: sys.modules[m].__version__ for m in ("torch", "numpy", "open_clip")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    lines = []
    for row in rows:
        counts = {s: (int(v.sum()), len(v)) for s, v in row["right"].items()}
        splits = {s: {"right": k, "n": n, "wilson95": wilson(k, n)} for s, (k, n) in counts.items()}
        lines.append(json.dumps({**row, "right": splits, "run": run}))
    path = Path(config.out) / "results.jsonl"
    if rank():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, "".join(line + "\n" for line in lines))
        print(f"\nresults: {path}")
    except OSError as error:
        print(f"\ncould not write {path} ({error}); going on without", file=sys.stderr)


def append(path, text):
    """Text to the end of a file, in one write: two runs do not mix their lines, and a line that a
    crash or a full disk cut short does not swallow the next. Raises OSError.
    """
    with open(path, "a+b", buffering=0) as file:
        content = text.encode()
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        if file.write(content) < len(content):
            raise OSError("No space left on device")
        os.fsync(file.fileno())


def new_figure(columns=1, rows=1):
    """matplotlib figure without a window, and its axes [rows, columns]."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
    plt.rcParams.update(style | {"savefig.dpi": 150, "legend.frameon": False})
    size = (4.6 * columns, 3.4 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save_figure(figure, path, header, rows):
    """PATH.png, and the numbers in it as PATH.csv."""
    import csv

    import matplotlib.pyplot as plt

    def write_rows(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])

    path = Path(path)
    wrote = try_write(path.with_suffix(".csv"), write_rows)
    if (
        try_write(path.with_suffix(".png"), lambda file: figure.savefig(file, format="png"))
        and wrote
    ):
        print(f"figure: {path.with_suffix('.png')}")
    plt.close(figure)


# --- kernels --------------------------------------------------------------------------------------
# The C++ and CUDA sources, their build and the checks of their arguments: csrc/.


def kernels(work=math.inf, agree=True):
    """The compiled kernels, built at first use; None where they cannot be had, which is printed.
    Of several processes all have them or none, else they would round apart; agree=False asks none.

    `work`: the multiply-adds that they would do. Below 1e11, a few seconds of PyTorch on two cores,
    a first run would wait longer for the build (about 15 s) than it gains: None, nothing built.
    KERNELS=off switches them off. Raises InputError if KERNELS_ISA names no path of this CPU.
    """
    if work < 1e11:
        return None
    from csrc import build

    found = build.load()
    return found if not agree or everywhere(found is not None) else None
