"""The Evolution of Out-of-Distribution Robustness Throughout Fine-Tuning.
Andreassen, Bahri, Neyshabur, Roelofs; TMLR 2022; arXiv 2106.15831.

Over many models trained from scratch, accuracy under shift (OOD) is a function of accuracy at home
(ID): a line, once both are moved to logits. What a model has above that line is its effective
robustness (ER). Pre-trained models have it in the middle of fine-tuning and lose it as fine-tuning
converges: this script draws the line, then follows ER through fine-tuning.

    Sec. 3    effective robustness rho             effective_robustness   (beta: beta)
    App. A    logit transform and fits             scipy's logit, fit
    Sec. 4    testbed, trajectories, when          baseline, follow, cadence
    abstract  images that no testbed model gets    nobody_right, share_right
    (ours)    what is said of a trajectory         studies/er_report.py: summarise

    python er_study.py                # digits, 6.3 minutes on two cores; ER on UCI +54 -> +24
    python er_study.py --quick        # the same in small, 2 minutes
    python er_study.py --testbed all  # published models, real ER, no images: 8 seconds
    python er_study.py --plot "runs/er_study/trajectories/*.csv"  # report of saved trajectories

Differs: what the text known to us leaves open is ours, by these IDs:
E1  accuracies of 0 or 1 leave the fit, and the print says how many; beta(0) = 0, beta(1) = 1.
E2  the interval of ER redraws testbed models and test images; images are shared by all models.
E3  an ER at an ID accuracy that the testbed does not span is marked: the line is extrapolated.
E4  evaluated at step 0, at ten log-spaced steps of epoch 1, each epoch to 10, every 5, the last.
E5  the largest ER of a run is also given without its selection bias: the checkpoint is chosen on
    one half of the images, ID and OOD, and scored on the other, both ways. Comparisons are at equal
    ID accuracy. Nothing else is ever chosen on OOD images.
E6  the digits' recipe is this repository's (AdamW, cosine), not App. B.1's (SGD, momentum 0.9);
    studies/er_settings.py has the paper's own settings.
"""

import copy
import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from scipy.stats import beta as beta_distribution
from scipy.stats import linregress

import common
from common import arg
from data import testbeds, trajectories

KINDS = ("zero-shot", "new-head", "head-only", "random")  # what a trajectory starts from
# Differs (E6): App. B.1 has SGD with momentum 0.9, weight decay 1e-4, 100 or 250 epochs
PRESETS = {"digits": {"epochs": 8, "batch": 64, "warmup": 38}}  # as vrf.py's


@dataclass
class Config:
    testbed: str = arg("", "published models instead of a study: all, one of them, .csv, .npz")
    plot: str = arg("", "draw saved trajectories (a pattern in quotes) instead of training")
    quick: bool = arg(False, "the testbed's cheap models, one rate, two epochs")
    data: str = arg("digits", "the study needs the embedded digits and their testbed")
    model: str = arg("ViT-B-16", "open_clip architecture")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    kinds: str = arg("zero-shot,new-head,head-only,random", "trajectories, comma-separated")
    lr: str = arg("5e-5,2e-4,5e-4", "from the zero-shot head; App. B.1 has three rates, too")
    lr_new: float = arg(2e-4, "from a new head on the pre-trained encoder; ours")
    lr_head: float = arg(1e-1, "a new head alone; ours, by ID val (data/README.md)")
    lr_random: float = arg(1e-3, "from random initialisation; ours")
    epochs: int = arg(8, "of pre-trained models; App. B.1: 100", least=1)
    epochs_random: int = arg(12, "from random initialisation; App. B.1: 250", least=1)
    batch: int = arg(64, "App. B.1", least=1)
    weight_decay: float = arg(0.1, "AdamW (E6)")
    warmup: int = arg(38, "steps of linear warm-up; ours")
    clip: float = arg(1.0, "largest gradient norm; ours")
    draws: int = arg(1000, "of the bootstrap; ours", least=1)
    selection: str = arg("paper", "paper: on ID val; code: on the reported ID set", "paper code")
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "runs of each trajectory; App. B.1: 5", least=1)
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; the paper does not state its own", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(-1, "processes that decode; -1: one per core on a GPU, else none", least=-1)
    jobs: int = arg(2, "trajectories at a time, each in a process of its own; 1 on a GPU", least=1)
    skip_bad_images: bool = arg(False, "leave unreadable images out instead of stopping")
    resume: bool = arg(True, "continue unfinished training, reuse finished")
    out: str = arg("runs/er_study", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def check_shares(x):
    """Raises InputError for percent and NaN, whose logits would be left out without a word."""
    x = np.asarray(x, float)
    if not np.all((x >= 0) & (x <= 1)):
        wrong = x[~((x >= 0) & (x <= 1))].ravel()[0]
        raise common.InputError(f"an accuracy is {wrong}; expected shares, from 0 to 1")
    return x


def fit(acc_id, acc_ood):
    """App. A: linregress(logit(Acc_ID), logit(Acc_OOD)).  [M], [M] -> slope, intercept, R2, used

    used: bool [M], the pairs with both logits finite (E1). Accuracies are never clipped.
    """
    acc_id, acc_ood = check_shares(acc_id), check_shares(acc_ood)
    if acc_id.shape != acc_ood.shape or acc_id.ndim != 1:
        raise common.InputError(f"baseline: {acc_id.shape} ID, {acc_ood.shape} OOD accuracies")
    x, y = logit(acc_id), logit(acc_ood)
    used = np.isfinite(x) & np.isfinite(y)  # Differs (E1): the text does not say
    if used.sum() < 3:
        raise common.InputError(f"baseline: {used.sum()} models with finite logits; needs 3")
    line = linregress(x[used], y[used])
    return line.slope, line.intercept, line.rvalue**2, used


def beta(acc_id, slope, intercept):
    """Sec. 3: the OOD accuracy that the baseline gives an ID accuracy; 0 at 0, 1 at 1 (E1)."""
    return expit(slope * logit(check_shares(acc_id)) + intercept)


def effective_robustness(acc_id, acc_ood, slope, intercept):
    """Sec. 3: rho = Acc_OOD - beta(Acc_ID), a difference of accuracies (shares), not of logits."""
    return acc_ood - beta(acc_id, slope, intercept)


def clopper_pearson(k, n, level=0.95):
    """Exact interval of a share of k in n.  [...] -> [...], [...]"""
    if not np.all((np.asarray(k) >= 0) & (np.asarray(k) <= n)):
        raise common.InputError(f"interval: k = {k} of n = {n}; expected 0 <= k <= n")
    k, tail = np.asarray(k, float), (1 - level) / 2
    low = np.where(k > 0, beta_distribution.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(k < n, beta_distribution.ppf(1 - tail, k + 1, np.maximum(n - k, 1)), 1.0)
    return low, high


def nobody_right(right):
    """Images that no testbed model gets right.  bool [M, N] -> bool [N]"""
    return ~right.any(0)


def share_right(right, nobody):
    """How many of them a model gets right, of how many.  bool [N], bool [N] -> k, n"""
    return int((right & nobody).sum()), int(nobody.sum())


# --- train / prepare ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A baseline, and of which models and sets it is."""

    id: str
    ood: str
    sizes: tuple  # images of the two sets
    models: tuple
    slope: float
    intercept: float
    r2: float
    residual: float  # standard deviation of the models' own ER, a share
    low: float
    high: float  # range of ID accuracy


def baseline(testbed, ood, without=()):
    """Line of a testbed for one shift. `without`: models to leave out; studied ones never enter."""
    at_home = testbed.id_of[ood]
    out = {*testbed.studied, *without}
    a, b = testbed.accuracy(at_home), testbed.accuracy(ood)
    rows = [
        i
        for i, m in enumerate(testbed.models)
        if m not in out and not np.isnan(a[i]) and not np.isnan(b[i])
    ]
    slope, intercept, r2, used = fit(a[rows], b[rows])
    if not used.all():
        print(f"{ood}: {(~used).sum()} models with an accuracy of 0 or 1 are not in the fit (E1)")
    rows = np.array(rows)[used]
    own = effective_robustness(a[rows], b[rows], slope, intercept)
    models, sizes = tuple(testbed.models[i] for i in rows), (testbed.n[at_home], testbed.n[ood])
    spread = float(own.std(ddof=2)), float(a[rows].min()), float(a[rows].max())
    return Line(at_home, ood, sizes, models, slope, intercept, r2, *spread)


def above(line, model, at_home, ood, sizes, acc_id, acc_ood):
    """(ER, extrapolated) of one model; refuses a model of the baseline, and other sets than its."""
    if model in line.models:
        raise common.InputError(
            f"{model} is in its own baseline, which would pull the line to it; fit without it"
        )
    if (at_home, ood, *sizes) != (line.id, line.ood, *line.sizes):
        raise common.InputError(
            f"the baseline is of {line.id} -> {line.ood} with {line.sizes} images, the model of"
            f" {at_home} -> {ood} with {tuple(sizes)}; one version and class subset for both"
        )
    er = effective_robustness(acc_id, acc_ood, line.slope, line.intercept)
    return float(er), not line.low <= acc_id <= line.high  # Differs (E3): ours


@dataclass
class Bench:
    """What ER is measured with: a testbed, its lines and redraws, and the test images in memory."""

    testbed: object
    lines: dict  # shift -> Line
    redraws: object  # testbeds.Redraws
    splits: dict  # name -> Split; "val", ID, shifts
    images: dict  # name -> [N, 3, H, W]
    nobody: dict  # shift -> bool [N], images that no testbed model gets right


def make_bench(config, testbed, splits, images=None):
    nobody, found = {}, {}
    for ood in testbed.id_of:
        right = testbed.right.get(ood)  # None: the testbed is known by counts alone
        none = np.zeros(len(splits[ood].labels), bool)
        nobody[ood] = none if right is None else nobody_right(right)
        found[ood] = baseline(testbed, ood)
    redraws = testbeds.redraw(testbed, config.draws)
    return Bench(testbed, found, redraws, splits, images, nobody)


@functools.cache
def half(n):
    """A random half of n images, the same in every run (E5).  -> bool [n]"""
    return np.random.default_rng(0).permutation(n) < n // 2


def in_memory(data, clip):
    """The splits that a run is evaluated on, by name, and their images as tensors."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    transform, images = common.eval_transform(clip.size, clip.mean, clip.std), {}
    for name, split in splits.items():
        read = common.Images(split, transform)
        images[name] = torch.stack([read[i, 0][0] for i in range(len(read))])
    return splits, images


def on_device(model, head_only=False):
    """Function of images, or of features, on the CPU to logits."""
    device = model.head.weight.device
    if head_only:
        return lambda features: model.classify(features.to(device))
    return lambda images: model.eval()(images.to(device))[1]


@torch.inference_mode()
def score(bench, classify, inputs):
    """{set: right, bool [N]} of a model given as inputs [B, ...] -> logits [B, C]."""
    right = {}
    for name, x in inputs.items():
        logits = torch.cat([classify(b).cpu() for b in x.split(256)])
        right[name] = (logits.argmax(1) == bench.splits[name].labels).numpy()
    return right


def measure(bench, run, right):
    """Rows of one checkpoint, as in data/trajectories.py: its ER on every shift, and their mean,
    which has an interval of its own. ID and OOD accuracies are of the same weights.
    """
    rows, drawn = [], []
    for ood, line in bench.lines.items():
        a, b = right[line.id], right[ood]
        sizes = len(a), len(b)
        er, outside = above(line, run["run"], line.id, ood, sizes, a.mean(), b.mean())
        acc = [bench.redraws.accuracy(s, right[s]) for s in (line.id, ood)]
        drawn.append(effective_robustness(*acc, *bench.redraws.lines[ood]))
        low, high = testbeds.interval(drawn[-1])
        val = right.get("val", np.zeros(0, bool))
        row = {"k_id": a.sum(), "n_id": len(a), "k_val": val.sum()}
        row |= {"n_val": len(val), "k_ood": b.sum(), "n_ood": len(b)}
        row |= {"k_half": (b & half(len(b))).sum(), "n_half": len(b) // 2}
        home = half(len(a))
        row |= {"k_id_half": a[home].sum(), "n_id_half": home.sum()}
        row |= dict(zip(("k_nobody", "n_nobody"), share_right(b, bench.nobody[ood]), strict=True))
        for name, part in {"beta": a, "beta_half": a[home], "beta_rest": a[~home]}.items():
            acc = part.mean() if len(part) else a.mean()  # of one image there is no half
            row[name] = float(beta(acc, line.slope, line.intercept))
        row["er"] = er
        rows.append({**run, "shift": ood, **row, "er_lo": low, "er_hi": high})
        rows[-1]["extrapolated"] = int(outside)
    low, high = testbeds.interval(np.mean(drawn, 0))
    mean = {"shift": "mean", "er": np.mean([r["er"] for r in rows]), "er_lo": low, "er_hi": high}
    same = {c: rows[0][c] for c in ("k_id", "n_id", "k_val", "n_val")}
    mean["extrapolated"] = max(r["extrapolated"] for r in rows)
    return [*rows, {**run, **same, **mean}]


def cadence(per_epoch, epochs):
    """Steps at which a run is evaluated (E4)."""
    # Differs (E4): the text known to us has no cadence; a bump may be over within one epoch
    first = {round(per_epoch ** (i / 9)) for i in range(10)}
    whole = {e for e in range(1, epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}
    return sorted({0} | first | {e * per_epoch for e in whole})


def new_head(model, seed):
    """A head of random directions, as long as the zero-shot head's rows (logits of one scale)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(model.head.weight.shape, generator=generator)
    length = model.head.weight.detach().cpu().norm(dim=1, keepdim=True)
    with torch.no_grad():
        model.head.weight.copy_(F.normalize(rows, dim=1) * length)
        model.head.bias.zero_()
    return model


def start_of(config, data, clip, zero_shot, kind, seed):
    """Clip (or its random twin) and the Classifier from which a trajectory starts."""
    if kind == "random":
        other = dataclasses.replace(config, weights="", pretrained="random", seed=seed)
        common.set_seed(seed)
        visual = common.load_clip(other).model.visual
        model = common.Classifier(visual, zero_shot.head.weight.detach().cpu())
        return new_head(model.to(zero_shot.head.weight.device), seed)
    model = copy.deepcopy(zero_shot)
    return model if kind == "zero-shot" else new_head(model, seed)


def plan(config):
    """[(kind, learning rate, epochs)] of --kinds."""
    wanted = common.choose(config.kinds, KINDS, "--kinds")
    rates = common.numbers(config.lr, "--lr")
    runs = [("zero-shot", lr, config.epochs) for lr in rates]
    runs += [
        ("new-head", config.lr_new, config.epochs),
        ("head-only", config.lr_head, config.epochs),
    ]
    runs += [("random", config.lr_random, config.epochs_random)]
    if not wanted:
        raise common.InputError(f"--kinds {config.kinds!r}: expected some of {', '.join(KINDS)}")
    return [r for r in runs if r[0] in wanted]


def follow(config, data, clip, zero_shot, bench, kind, lr, epochs, seed, name="", loss=None):
    """Fine-tune once and write its trajectory as training goes; a finished one is not run again.
    -> path of the file. `name`: of the run, if not by kind and rate. loss(model) -> a `loss_of`
    for common.fine_tune, to which the name must belong.
    """
    config = dataclasses.replace(config, epochs=epochs)
    per_epoch = math.ceil(len(data.train.labels) / config.batch)
    name = f"{name or f'{kind}, lr {lr:g}'}, seed {seed}"
    run = {"run": name, "model": config.model, "init": kind, "lr": lr, "seed": seed}
    start = start_of(config, data, clip, zero_shot, kind, seed)
    key = [start.state_dict(), [s.fingerprint for s in (data.train, *bench.splits.values())]]
    key += [bench.testbed.models, bench.testbed.k, config.draws, run, clip.key]
    key += [[getattr(config, f) for f in ("epochs", "batch", "weight_decay", "warmup", "clip")]]
    file = f"{common.slug(name)}-{common.hash_of(key)}.csv"
    path = Path(config.out) / "trajectories" / file

    def attempt(probe, resume):
        again, model = dataclasses.replace(config, resume=resume), copy.deepcopy(start)
        inputs, classify = bench.images, on_device(model)
        if kind == "head-only":
            split = bench.splits.items()
            inputs = {s: common.frozen_features(config, model, x, clip)[0] for s, x in split}
            classify = on_device(model, head_only=True)

        def at(done):
            probe(done, lambda: score(bench, classify, inputs))

        args = again, name, model, data.train, clip, lr, seed
        if kind == "head-only":
            return common.linear_probe(*args, probe=at)
        also = {"loss": name} if loss else None
        common.fine_tune(*args, probe=at, also=also, loss_of=loss(model) if loss else None)

    return recorded(config, bench, path, run, cadence(per_epoch, epochs), per_epoch, attempt)


def recorded(config, bench, path, run, steps, per_epoch, attempt):
    """trajectories.record with the rows of `measure`."""

    def rows_at(done, right):
        return measure(bench, run | {"step": int(done), "epoch": done / per_epoch}, right)

    return trajectories.record(path, steps, len(bench.lines), rows_at, attempt, config.resume)


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier, Bench; studies/er_axes.py, too."""
    from data import scratch
    from studies import er_published

    config, data = common.begin(Config, argv, __doc__, PRESETS)
    if config.quick:
        for name, value in {"lr": "2e-4", "epochs": 2, "epochs_random": 1}.items():
            if name not in config.given:
                setattr(config, name, value)
    clip, zero_shot = common.zero_shot(config, data)
    testbed = scratch.testbed(config, data, config.quick)
    bench = make_bench(config, testbed, *in_memory(data, clip))
    folder = Path(config.out) / "trajectories"
    testbeds.write_counts(bench.testbed, folder / "testbed.csv")
    scored = functools.partial(score, bench, on_device(zero_shot), bench.images)
    er_published.write_by_image(bench.testbed, scored, folder / "by_image.csv")
    return config, data, clip, zero_shot, bench


def work(argv, run):
    """One trajectory, in a process of its own."""
    config, *world, bench = prepare(argv)
    return follow(config, *world, bench, *run)


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    if config.testbed:
        from studies import er_published

        return er_published.published(config)
    from studies import er_report

    if config.plot:
        return er_report.replay(config)
    if config.data != "digits":
        raise common.InputError(
            f"--data {config.data}: a study needs a testbed on the same data, which is here for the"
            " digits; for CIFAR-10 and ImageNet trees see studies/er_settings.py"
        )
    plan(config)  # refuses what it does not know, before any work
    config, *world, bench = prepare(argv)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [(*run, seed) for seed in seeds for run in plan(config)]
    if common.apart(config):
        words = sys.argv[1:] if argv is None else argv
        longest = sorted(runs, key=lambda run: -run[2])  # first: none runs alone at the end
        paths = common.together(work, config.jobs, words, longest)
    else:
        paths = [follow(config, *world, bench, *run) for run in runs]
    rows = [r for path in paths for r in trajectories.read(path, len(bench.lines))]
    by_image = trajectories.read_plain(Path(config.out) / "trajectories")
    return er_report.report(config, bench.testbed, bench.lines, rows, bench.redraws, by_image)


if __name__ == "__main__":
    common.run(main)
