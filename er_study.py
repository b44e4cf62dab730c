"""The Evolution of Out-of-Distribution Robustness Throughout Fine-Tuning.
Andreassen, Bahri, Neyshabur, Roelofs; TMLR 2022; arXiv 2106.15831.

Over many models trained from scratch, accuracy under shift (OOD) is a function of accuracy at home
(ID): a line, once both are moved to logits. What a model has above that line is its effective
robustness (ER). Pre-trained models have it in the middle of fine-tuning and lose it as fine-tuning
converges: this script draws the line, then follows ER through fine-tuning.

    Sec. 3    effective robustness rho             effective_robustness   (beta: beta)
    App. A    logit transform and fits             scipy's logit, fit_line
    Sec. 4    testbed, trajectories, when          baseline, follow, cadence
    abstract  images that no testbed model gets    nobody_right, share_right
    (ours)    what is said of a trajectory         summarise

    python er_study.py                # digits; ER on UCI +54 -> +24
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
    lab/er_settings.py has the paper's own settings.
"""

import copy
import csv
import dataclasses
import functools
import glob
import math
import os
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from scipy.stats import binomtest, linregress

import common
from common import arg
from data import testbeds

KINDS = ("zero-shot", "new-head", "head-only", "random")  # what a trajectory starts from


@dataclass
class Config(common.Run):
    testbed: str = arg("", "published models instead of a study: all, one of them, .csv, .npz")
    plot: str = arg("", "draw saved trajectories (a pattern in quotes) instead of training")
    quick: bool = arg(False, "the testbed's cheap models, one rate, two epochs")
    data: str = arg("digits", "the study needs the embedded digits and their testbed")
    kinds: str = arg("zero-shot,new-head,head-only,random", "trajectories, comma-separated")
    lr: str = arg("5e-5,2e-4,5e-4", "from the zero-shot head; App. B.1 has three rates, too")
    lr_new: float = arg(2e-4, "from a new head on the pre-trained encoder; ours")
    lr_head: float = arg(1e-1, "a new head alone; ours, by ID val (data/README.md)")
    lr_random: float = arg(1e-3, "from random initialisation; ours")
    # Differs (E6): App. B.1 has SGD with momentum 0.9, weight decay 1e-4, 100 or 250 epochs
    epochs: int = arg(8, "of pre-trained models; App. B.1: 100", least=1)
    epochs_random: int = arg(12, "from random initialisation; App. B.1: 250", least=1)
    batch: int = arg(64, "App. B.1", least=1)
    warmup: int = arg(38, "steps of linear warm-up; ours")
    draws: int = arg(1000, "of the bootstrap; ours", least=1)
    seeds: int = arg(1, "runs of each trajectory; App. B.1: 5", least=1)
    jobs: int = arg(2, "trajectories at a time, each in a process of its own; 1 on a GPU", least=1)
    out: str = arg("runs/er_study", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def check_shares(x):
    """Raises InputError for percent and NaN, whose logits would be left out without a word."""
    x = np.asarray(x, float)
    if not np.all((x >= 0) & (x <= 1)):
        raise common.InputError(f"accuracies are not all shares, from 0 to 1: {x}")
    return x


def fit_line(acc_id, acc_ood):
    """App. A: linregress(logit(Acc_ID), logit(Acc_OOD)).  [M], [M] -> slope, intercept, R2, used

    used: bool [M], the pairs with both logits finite (E1). Accuracies are never clipped.
    """
    x, y = logit(check_shares(acc_id)), logit(check_shares(acc_ood))
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


def nobody_right(right):
    """Images that no testbed model gets right.  bool [M, N] -> bool [N]"""
    return ~right.any(0)


def share_right(right, nobody):
    """How many of them a model gets right, of how many.  bool [N], bool [N] -> k, n"""
    return int((right & nobody).sum()), int(nobody.sum())


def cadence(per_epoch, epochs):
    """Steps at which a run is evaluated (E4)."""
    # Differs (E4): the text known to us has no cadence; a bump may be over within one epoch
    first = {round(per_epoch ** (i / 9)) for i in range(10)}
    whole = {e for e in range(1, epochs + 1) if e <= 10 or e % 5 == 0 or e == epochs}
    return sorted({0} | first | {e * per_epoch for e in whole})


@functools.cache
def selection_half(n):
    """A random half of n images, the same in every run (E5).  -> bool [n]"""
    return np.random.default_rng(0).permutation(n) < n // 2


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

    def extrapolates(self, acc_id):
        return not self.low <= acc_id <= self.high  # Differs (E3): ours


def baseline(testbed, ood):
    """Line of a testbed for one shift. Studied models never enter: they would pull it to them."""
    at_home = testbed.id_of[ood]
    acc_id, acc_ood = testbed.accuracy(at_home), testbed.accuracy(ood)
    kept = (
        [m not in testbed.studied for m in testbed.models] & ~np.isnan(acc_id) & ~np.isnan(acc_ood)
    )
    slope, intercept, r2, used = fit_line(acc_id[kept], acc_ood[kept])
    if not used.all():
        print(f"{ood}: {(~used).sum()} models with an accuracy of 0 or 1 are not in the fit (E1)")
    rows = np.flatnonzero(kept)[used]
    own = effective_robustness(acc_id[rows], acc_ood[rows], slope, intercept)
    models, sizes = tuple(testbed.models[i] for i in rows), (testbed.n[at_home], testbed.n[ood])
    spread = float(own.std(ddof=2)), float(acc_id[rows].min()), float(acc_id[rows].max())
    return Line(at_home, ood, sizes, models, slope, intercept, r2, *spread)


@dataclass
class Measurement:
    """What ER is measured with: a testbed, its lines and redraws, and the test images in memory."""

    testbed: object
    lines: dict  # shift -> Line
    redraws: object  # testbeds.Redraws
    splits: dict  # name -> Split; "val", ID, shifts
    images: dict  # name -> [N, 3, H, W]
    nobody: dict  # shift -> bool [N], images that no testbed model gets right, if known by image


@dataclass
class Checkpoint:
    """One evaluation of a run on one shift, a row of its trajectory file. It has counts, so that a
    report needs neither model nor images. The shift "mean" has the mean ER of all shifts, the ID
    counts of the first one, and no OOD counts.
    """

    run: str
    model: str
    init: str  # one of KINDS
    lr: float  # of logistic regression: lambda
    seed: int
    step: int
    epoch: float
    shift: str
    k_id: int  # images right, of n_id
    n_id: int
    k_val: int
    n_val: int
    k_ood: int | None
    n_ood: int | None
    k_nobody: int  # of the images that no testbed model gets right
    n_nobody: int
    beta: float  # what the line gives the ID accuracy
    er: float
    er_half: float  # of selection_half of the images, ID and OOD (E5)
    er_rest: float
    er_lo: float  # 95 % interval, over testbed models and images
    er_hi: float
    extrapolated: int
    ece_id: float | None = None  # where it was measured
    ece_ood: float | None = None


def new_measurement(config, testbed, splits=None, images=None):
    lines = {ood: baseline(testbed, ood) for ood in testbed.id_of}
    nobody = {ood: nobody_right(testbed.right[ood]) for ood in lines if testbed.right}
    redraws = testbeds.redraw(testbed, config.draws)
    return Measurement(testbed, lines, redraws, splits, images, nobody)


def in_memory(data, clip):
    """The splits that a run is evaluated on, by name, and their images as tensors."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    transform, images = common.eval_transform(clip.size, clip.mean, clip.std), {}
    for name, split in splits.items():
        read = common.Images(split, transform)
        images[name] = torch.stack([read[i, 0][0] for i in range(len(read))])
    return splits, images


@torch.inference_mode()
def score(measurement, model, features=None):
    """{set: right, bool [N]} of a Classifier; `features` {set: [N, D]} in place of the images."""
    device, right = model.head.weight.device, {}
    model.eval()
    for name, inputs in (features or measurement.images).items():
        parts = [x.to(device) for x in inputs.split(256)]
        logits = [model.classify(x) if features else model(x)[1] for x in parts]
        predicted = torch.cat(logits).argmax(1).cpu()
        right[name] = (predicted == measurement.splits[name].labels).numpy()
    return right


def measure(measurement, run, step, epoch, right):
    """Checkpoints of one evaluation, of every shift and their mean, which has its own interval.

    run: {column: value} of what all evaluations of a run share; right: {set: bool [N]} of the same
    weights, "val" among them where there is one.
    """
    found, drawn, val = [], [], right.get("val", np.zeros(0, bool))
    for ood, line in measurement.lines.items():
        a, b, sets = right[line.id], right[ood], (line.id, ood)
        redrawn = [measurement.redraws.accuracy(s, right[s]) for s in sets]
        drawn.append(effective_robustness(*redrawn, *measurement.redraws.lines[ood]))
        low, high = testbeds.interval(drawn[-1])
        in_a, in_b, fit = *map(selection_half, (len(a), len(b))), (line.slope, line.intercept)
        k_nobody, n_nobody = share_right(b, measurement.nobody.get(ood, np.zeros(len(b), bool)))
        checkpoint = Checkpoint(
            **run, step=step, epoch=epoch, shift=ood,
            k_id=int(a.sum()), n_id=len(a), k_val=int(val.sum()), n_val=len(val),
            k_ood=int(b.sum()), n_ood=len(b), k_nobody=k_nobody, n_nobody=n_nobody,
            beta=float(beta(a.mean(), *fit)), er_lo=low, er_hi=high,
            er=float(effective_robustness(a.mean(), b.mean(), *fit)),
            er_half=float(effective_robustness(a[in_a].mean(), b[in_b].mean(), *fit)),
            er_rest=float(effective_robustness(a[~in_a].mean(), b[~in_b].mean(), *fit)),
            extrapolated=int(line.extrapolates(a.mean())),
        )  # fmt: skip
        found.append(checkpoint)
    return [*found, mean_of(found, testbeds.interval(np.mean(drawn, 0)))]


def mean_of(checkpoints, interval):
    """The Checkpoint "mean" of those of one evaluation."""
    columns = {f: [getattr(c, f) for c in checkpoints] for f in vars(checkpoints[0])}
    new = {f: float(np.mean(columns[f])) for f in ("beta", "er", "er_half", "er_rest")}
    new |= {f: sum(columns[f]) for f in ("k_nobody", "n_nobody")}
    new |= {"k_ood": None, "n_ood": None, "extrapolated": max(columns["extrapolated"])}
    return replace(checkpoints[0], shift="mean", er_lo=interval[0], er_hi=interval[1], **new)


class Trajectory:
    """The file of one run. An evaluation is on disk when `add` returns, and the file is never in
    parts: it is written anew beside the old one, which it replaces.
    """

    def __init__(self, config, measurement, path, run, steps, per_epoch):
        self.config, self.measurement, self.path = config, measurement, Path(path)
        self.run, self.steps, self.per_epoch = run, steps, per_epoch
        self.checkpoints = []

    def lacks(self, step):
        return step in self.steps and all(c.step != step for c in self.checkpoints)

    def attempts(self):
        """Yields whether the training may go on from its checkpoint, until every step is evaluated.
        Where evaluations before the checkpoint are lost, the second attempt starts anew.
        """
        for resume in (self.config.resume, False):
            paths = [self.path] if resume and self.path.is_file() else []
            self.checkpoints = common.broadcast(read(paths, self.measurement.lines))
            if any(map(self.lacks, self.steps)):
                yield resume
            if not any(map(self.lacks, self.steps)):
                return

    def add(self, step, right):
        """Measure and write; right: {set: bool [N]}."""
        epoch = step / self.per_epoch
        self.checkpoints += measure(self.measurement, self.run, step, epoch, right)
        write(self.path, self.checkpoints)


def write(path, checkpoints):
    """The file that `read` reads. These files are the result: raises InputError if it fails."""

    def rows_to(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(f.name for f in dataclasses.fields(Checkpoint))
            out.writerows(dataclasses.astuple(c) for c in checkpoints)

    if not common.write_file(path, rows_to) and not common.rank():
        raise common.InputError(f"{path} cannot be written; the same command continues")


@dataclass(frozen=True)
class Setting:
    """What fine-tuning is followed: one run."""

    kind: str  # one of KINDS
    lr: float
    epochs: int
    seed: int
    name: str = ""  # of the run, if not by kind and rate

    @property
    def title(self):
        return self.name or f"{self.kind}, lr {self.lr:g}"


def plan(config):
    """[Setting] of --kinds, of the first seed."""
    wanted = common.choose(config.kinds, KINDS, "--kinds")
    rates = {"zero-shot": common.numbers(config.lr, "--lr"), "new-head": [config.lr_new]}
    rates |= {"head-only": [config.lr_head], "random": [config.lr_random]}
    epochs = dict.fromkeys(KINDS, config.epochs) | {"random": config.epochs_random}
    kinds = [kind for kind in KINDS if kind in wanted]
    return [Setting(kind, lr, epochs[kind], config.seed) for kind in kinds for lr in rates[kind]]


def new_head(model, seed):
    """A head of random directions, as long as the zero-shot head's rows (logits of one scale)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(model.head.weight.shape, generator=generator)
    length = model.head.weight.detach().cpu().norm(dim=1, keepdim=True)
    with torch.no_grad():
        model.head.weight.copy_(F.normalize(rows, dim=1) * length)
        model.head.bias.zero_()
    return model


def start_of(config, zero_shot, kind):
    """The Classifier from which a trajectory starts: zero-shot, or a twin of config.seed."""
    if kind == "random":
        other = replace(config, weights="", pretrained="random")
        common.set_seed(config.seed)
        visual = common.load_clip(other).model.visual
        model = common.Classifier(visual, zero_shot.head.weight.detach().cpu())
        return new_head(model.to(zero_shot.head.weight.device), config.seed)
    model = copy.deepcopy(zero_shot)
    return model if kind == "zero-shot" else new_head(model, config.seed)


def follow(config, data, clip, zero_shot, measurement, setting, loss=None):
    """Fine-tune once, evaluated by the cadence; what is in the trajectory's file is not run again.
    -> [Checkpoint]

    loss(model) -> loss_fn for common.fine_tune; the setting's name must say which.
    """
    config = replace(config, lr=setting.lr, epochs=setting.epochs, seed=setting.seed)
    start = start_of(config, zero_shot, setting.kind)
    trajectory = new_trajectory(config, data, clip, measurement, setting, start)
    for resume in trajectory.attempts():
        used, features = replace(config, resume=resume), None
        model = copy.deepcopy(start)
        args = used, setting.title, model, data.train, clip
        if setting.kind == "head-only":
            splits = measurement.splits.items()
            features = {s: common.frozen_features(used, model, x, clip)[0] for s, x in splits}
            training = common.probe_training(*args)
        elif loss:
            training = common.image_training(*args, loss(model), key={"loss": setting.title})
        else:
            training = common.image_training(*args)
        for done in common.train_steps(used, training):
            if trajectory.lacks(done):
                trajectory.add(done, score(measurement, model, features))
    return trajectory.checkpoints


def new_trajectory(config, data, clip, measurement, setting, start):
    """Trajectory of a run from `start`; its file is named by a hash of all that shapes it."""
    run = {"run": f"{setting.title}, seed {setting.seed}", "model": config.model}
    run |= {"init": setting.kind, "lr": setting.lr, "seed": setting.seed}
    recipe = [getattr(config, f) for f in ("epochs", "batch", "weight_decay", "warmup", "clip")]
    key = [start.state_dict(), clip.key, run, recipe, config.precision, measurement.testbed.models]
    key += [measurement.testbed.k, config.draws, [f.name for f in dataclasses.fields(Checkpoint)]]
    key += [common.fingerprint(s) for s in (data.train, *measurement.splits.values())]
    file = f"{common.slug(run['run'])}-{common.hash_of(key)}.csv"
    per_epoch = math.ceil(len(data.train.labels) / config.batch)
    path, steps = Path(config.out) / "trajectories" / file, cadence(per_epoch, config.epochs)
    return Trajectory(config, measurement, path, run, steps, per_epoch)


# --- evaluate -------------------------------------------------------------------------------------


PARSERS = {  # of a cell's text, by the type of its column
    str: str,
    int: testbeds.whole,
    float: testbeds.number,
    int | None: lambda cell: testbeds.whole(cell) if cell else None,
    float | None: lambda cell: testbeds.number(cell) if cell else None,
}


def read(paths, lines):
    """[Checkpoint] of trajectory files that were measured with `lines` {shift: Line}. Raises
    InputError where a row contradicts the lines, and where an evaluation is there twice.
    """
    found, columns = {}, {f.name: PARSERS[f.type] for f in dataclasses.fields(Checkpoint)}
    for path in paths:
        for number, row in testbeds.read_csv(path, columns, ("run", "step", "shift")):
            c = Checkpoint(**row)
            problem = contradiction(c, lines)
            if (c.run, c.step, c.shift) in found:
                problem = f"step {c.step} of {c.run} is in another file, too"
            if problem:
                raise common.InputError(f"{path}, line {number}: {problem}")
            found[c.run, c.step, c.shift] = c
    return list(found.values())


def contradiction(c, lines):
    """What is wrong with the numbers of a Checkpoint, in words; "" if nothing is."""
    if c.init not in KINDS:
        return f"init {c.init!r}; expected {', '.join(KINDS)}"
    if c.shift not in (*lines, "mean"):
        return f"the testbed has no shift {c.shift!r}; it has {', '.join(lines)}"
    for part in ("id", "val", "ood", "nobody"):
        k, n = getattr(c, f"k_{part}") or 0, getattr(c, f"n_{part}") or 0
        if k > n:
            return f"k_{part} {k} of n_{part} {n}"
    if c.shift == "mean":
        return ""
    expected = beta(c.k_id / c.n_id, lines[c.shift].slope, lines[c.shift].intercept)
    er = c.k_ood / c.n_ood - expected
    if abs(expected - c.beta) < 1e-6 and abs(er - c.er) < 1e-6:
        return ""
    return (
        f"beta {c.beta} and er {c.er}, but the testbed's line gives {expected:.6f} and {er:.6f}:"
        " it was measured with another testbed"
    )


def curve(checkpoints, shift):
    """{name: [S]} of one run's checkpoints on a shift, in the order of their steps; shares."""
    own = sorted((c for c in checkpoints if c.shift == shift), key=lambda c: c.step)
    names = "step", "epoch", "beta", "er", "er_half", "er_rest", "er_lo", "er_hi", "extrapolated"
    out = {name: np.array([getattr(c, name) for c in own]) for name in names}
    for part in ("id", "val", "nobody"):
        k, n = (np.array([getattr(c, f"{x}_{part}") for c in own]) for x in "kn")
        out[part] = k / np.maximum(n, 1)
    return out | {"ood": out["beta"] + out["er"]}


def at_accuracy(c, accuracy):
    """ER where a run's ID accuracy first passes `accuracy`, interpolated in logit(ID); or nan."""
    x, y = [], []
    for acc, er in zip(c["id"], c["er"], strict=True):
        if 0 < acc < 1 and (not x or logit(acc) > x[-1]):
            x.append(logit(acc))
            y.append(er)
    inside = x and x[0] <= logit(accuracy) <= x[-1]
    return float(np.interp(logit(accuracy), x, y)) if inside else math.nan


def summarise(checkpoints, shift):
    """One run's ER in a few numbers: at the start, the largest (as is; after a median of three
    checkpoints; free of selection, E5), where, at the last and at the best checkpoint on ID val,
    and at fixed ID accuracies. Shares.
    """
    c = curve(checkpoints, shift)
    steps = len(c["er"])
    smooth = [np.median(c["er"][max(0, i - 1) : i + 2]) for i in range(steps)]
    # Differs (E5): how the paper sums up a curve is not known to us
    half, rest = c["er_half"], c["er_rest"]
    picks = [(rest, half.argmax()), (half, rest.argmax())]  # scored on, chosen on the other
    out = {"start": c["er"][0], "start_lo": c["er_lo"][0], "start_hi": c["er_hi"][0]}
    out |= {"max": c["er"].max(), "max_median": max(smooth)}
    out |= {"max_free": np.mean([er[i] for er, i in picks])}
    out |= {"free_id": np.mean([c["id"][i] for _, i in picks])}
    out |= {"free_epoch": np.mean([c["epoch"][i] for _, i in picks])}
    out |= {"rise": np.mean([er[i] - er[0] for er, i in picks])}
    out |= {"fall": np.mean([er[i] - er[-1] for er, i in picks])}
    out |= {"last": c["er"][-1], "last_lo": c["er_lo"][-1], "last_hi": c["er_hi"][-1]}
    last = max((r for r in checkpoints if r.shift == shift), key=lambda r: r.step)
    exact = binomtest(last.k_id, last.n_id).proportion_ci()  # Clopper-Pearson, 95 %
    out |= {"last_id": c["id"][-1], "last_id_lo": exact.low, "last_id_hi": exact.high}
    out |= {"outside": c["extrapolated"][0], "last_outside": c["extrapolated"][-1]}
    out |= {"best_val": c["er"][c["val"].argmax()]}
    return out | {f"at {a:g}": at_accuracy(c, a) for a in (0.8, 0.9, 0.94)}


def by_run(checkpoints):
    """{run without its seed: {run: its checkpoints}}, by start, then rate, then seed."""
    groups = {}
    for c in sorted(checkpoints, key=lambda c: (KINDS.index(c.init), c.lr, c.seed)):
        name = c.run.removesuffix(f", seed {c.seed}")
        groups.setdefault(name, {}).setdefault(c.run, []).append(c)
    return groups


def best_line(lines):
    """The shift whose line explains most, on which ER means most; from the testbed alone."""
    return max(lines, key=lambda s: lines[s].r2)


def print_lines(testbed, lines, redraws=None):
    """Table of the baselines; the interval is of the slope, over models and images."""
    rows = []
    for ood, line in lines.items():
        slope = f"{line.slope:.4f}"
        if redraws:
            slope += " [{:.3f}, {:.3f}]".format(*testbeds.interval(redraws.lines[ood][0]))
        numbers = [slope, f"{line.intercept:.4f}", f"{line.r2:.4f}", f"{100 * line.residual:.2f}"]
        numbers += [f"{100 * line.low:.1f}-{100 * line.high:.1f}"]
        rows.append([ood, line.id, len(line.models), *numbers])
    header = ["shift", "ID", "models", "slope [95 %]", "intercept", "R2", "residual SD", "ID range"]
    title = f"testbed {testbed.name}: logit(OOD) = slope logit(ID) + intercept; points"
    print("\n" + common.table(header, rows, title))


def signed(points):
    return "-" if math.isnan(points) else f"{points:+.1f}"


def with_interval(mean, low, high):
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def over_runs(shares):
    """'+3.1 [+2.0, +4.2]' in points, '+3.1' of one run, '-' if a run has none."""
    mean, low, high = (100 * x for x in common.interval(shares))
    if math.isnan(mean) or math.isnan(low):
        return signed(mean)
    return with_interval(mean, low, high)


def print_runs(groups, shift):
    """Table of ER through fine-tuning, mean over seeds. Intervals are those of images and testbed,
    averaged over seeds; of "rise" and "fall", from start to the largest ER and on to the end, both
    free of selection, those over runs. *: at the start, or the end, the line is extrapolated (E3).
    """
    lines = []
    for name, runs in groups.items():
        s = [summarise(checkpoints, shift) for checkpoints in runs.values()]
        mean = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
        star, end = (" *" * bool(mean[k]) for k in ("outside", "last_outside"))
        spread = f" sd {100 * np.std([x['last'] for x in s], ddof=1):.1f}" if len(s) > 1 else ""
        cells = [with_interval(mean["start"], mean["start_lo"], mean["start_hi"]) + star]
        cells += [signed(mean[k]) for k in ("max", "max_median", "max_free")]
        cells += [f"{mean['free_id']:.1f} / {mean['free_epoch'] / 100:.2g}"]
        cells += [over_runs([x["rise"] for x in s]) + star, over_runs([x["fall"] for x in s]) + end]
        cells += [f"{mean['last_id']:.1f} [{mean['last_id_lo']:.1f}, {mean['last_id_hi']:.1f}]"]
        cells += [with_interval(mean["last"], mean["last_lo"], mean["last_hi"]) + end + spread]
        cells += [signed(mean[k]) for k in ("best_val", "at 0.8", "at 0.9", "at 0.94")]
        lines.append([name, *cells])
    header = ["ER in points", "start [95 %]", "max", "of medians", "unbiased", "at ID / epoch"]
    header += ["rise", "fall", "last ID [95 %]", "last ER [95 %]", "best val", "at ID 80"]
    header += ["90", "94"]
    every = "all shifts, those without a line too" if shift == "mean" else shift
    title = f"effective robustness on {every}; -: that ID accuracy is not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))


def summary(groups, lines, shift):
    """Sentences on the tables, computed from them."""
    weak = [f"{s} ({line.r2:.2f})" for s, line in lines.items() if line.r2 < 0.5]
    first = f"{shift} has the line that explains most, with R2 {lines[shift].r2:.2f}."
    if weak:
        first += f" R2 is below 1/2, so that ER is hardly defined, on {', '.join(weak)}."
    stories = {
        "zero-shot, lr 0.0002": "Fine-tuned from the zero-shot model",
        "new-head": "A new head on the pre-trained encoder",
        "random": "From scratch",
    }
    sentences = [first]
    for start, text in stories.items():
        for name, runs in groups.items():
            if name.startswith(start):
                sentences.append(f"{text} ({name}): {describe_runs(list(runs.values()), shift)}")
    print()
    for number, text in enumerate(sentences, 1):
        print(textwrap.fill(f"{number}. {text}", 100, subsequent_indent="   "))


def describe_runs(runs, shift):
    """Is there a bump, how high, where, and is ER gone at the end?"""
    s = [summarise(checkpoints, shift) for checkpoints in runs]
    m = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
    gone = "includes" if m["last_lo"] <= 0 <= m["last_hi"] else "excludes"
    rise, fall = (over_runs([x[k] for x in s]) for k in ("rise", "fall"))
    many = f"; intervals of rise and fall over {len(s)} runs" if len(s) > 1 else ""
    return (
        f"ER on {shift} is {m['start']:+.1f} points at the start, at most {m['max_free']:+.1f}"
        f" (rise {rise}, free of selection, at ID {m['free_id']:.0f} %), then lower by {fall}:"
        f" at the end {with_interval(m['last'], m['last_lo'], m['last_hi'])} (models and"
        f" images), which {gone} 0{many}."
    )


TICKS = (1, 2, 5, 10, 20, 30, 50, 70, 80, 85, 90, 95, 98, 99)
LOW, HIGH = 0.05, 0.995  # a run's accuracies beyond are drawn here


def logit_axis(axis, which, low, high, label):
    """The x or the y axis shows accuracies in logits, with ticks at round percentages."""
    ticks = [t for t in TICKS if low <= t / 100 <= high]
    axis.set(**{
        f"{which}ticks": logit(np.array(ticks) / 100),
        f"{which}ticklabels": ticks,
        f"{which}lim": logit(np.array([low, high])),
        f"{which}label": label,
    })  # fmt: skip


def id_axis(axis, line, low=0.08, high=0.985):
    """ID accuracy in logits, shaded where the line is extrapolated."""
    logit_axis(axis, "x", low, high, "ID accuracy, %")
    for ends in ((low, line.low), (line.high, high)):
        if ends[0] < ends[1]:
            axis.axvspan(*logit(np.array(ends)), color="0.95", lw=0)


def caption(line):
    return (
        f"{line.ood}\nn {len(line.models)}, slope {line.slope:.2f}, intercept"
        f" {line.intercept:.2f}, R² {line.r2:.3f}"
    )


def accuracies(testbed, line):
    """ID and OOD accuracies of a baseline's models.  -> [M], [M]"""
    rows = [testbed.row(m) for m in line.models]
    return testbed.accuracy(line.id)[rows], testbed.accuracy(line.ood)[rows]


def line_panel(axis, line, acc_id, acc_ood, low, high):
    """A testbed's points and line, dotted where extrapolated; y = x dashed.  -> rows of numbers"""
    logit_axis(axis, "x", low, high, "ID accuracy, %")
    logit_axis(axis, "y", low, high, "OOD accuracy, %")
    ends, inside = logit(np.array([low, high])), logit(np.array([line.low, line.high]))
    axis.plot(ends, ends, "--", color="0.7", lw=0.8)
    x, y = (logit(np.clip(a, 1e-3, 1 - 1e-3)) for a in (acc_id, acc_ood))
    axis.plot(x, y, "o", ms=3, color="0.6", label=f"testbed, {len(line.models)} models")
    axis.plot(ends, line.slope * ends + line.intercept, ":", color="0.4", lw=1)
    axis.plot(inside, line.slope * inside + line.intercept, color="0.4", lw=1.2)
    axis.set_title(caption(line), fontsize=8)
    return list(zip(line.models, acc_id, acc_ood, strict=True))


def styled(groups):
    """Yields (group, checkpoints of a run, how it is drawn): a colour and one label per group."""
    for i, (name, runs) in enumerate(groups.items()):
        look = {"color": f"C{i % 10}", "ls": "-" if i < 10 else ":", "marker": "o"}
        for j, checkpoints in enumerate(runs.values()):
            label = {"label": name if j == 0 else None}
            yield name, checkpoints, look | label | {"lw": 0.9, "ms": 2.5}


def on_logit_axis(shares):
    return logit(np.clip(shares, LOW, HIGH))


def er_panel(axis, testbed, lines, groups, shift):
    """ER against ID accuracy, a colour per group; dark: the testbed's own range.  -> rows"""
    line, numbers = lines[shift if shift in lines else best_line(lines)], []
    curves = [(name, curve(own, shift), look) for name, own, look in styled(groups)]
    least = min(c["id"].min() for _, c, _ in curves)
    id_axis(axis, line, max(0.08, 0.95 * least))
    if shift in lines:  # what ER is worth here: that of the baseline's own models
        acc_id, acc_ood = accuracies(testbed, line)
        own = 100 * effective_robustness(acc_id, acc_ood, line.slope, line.intercept)
        axis.axhspan(own.min(), own.max(), color="0.88", lw=0)
    axis.axhline(0, color="0.4", lw=0.8)
    for name, c, look in curves:
        axis.plot(on_logit_axis(c["id"]), 100 * c["er"], **look)
        columns = [c[k] for k in ("step", "id", "ood", "er", "er_lo", "er_hi")]
        numbers += [(shift, name, *row) for row in zip(*columns, strict=True)]
    axis.set(ylabel="ER, points")
    text = caption(line) if shift in lines else f"mean of {len(lines)} shifts"
    axis.set_title(f"ER on {text}", fontsize=8)
    return numbers


def figure(config, testbed, lines, groups, shift):
    """Accuracies on logit axes; ER against ID accuracy, and against steps; what the runs get of the
    images that no testbed model gets right.
    """
    header, line = ["series", "model", "step", "id", "ood", "er", "lo", "hi"], lines[shift]
    path = f"{config.out}/figures/er_study"
    with common.figure(path, header, columns=2, rows=2) as (axes, numbers):
        (line_axis, er_axis), (step_axis, nobody_axis) = axes
        points = line_panel(line_axis, line, *accuracies(testbed, line), 0.08, 0.99)
        numbers += [("testbed", model, "", *acc) for model, *acc in points]
        of_runs = er_panel(er_axis, testbed, lines, groups, shift)
        numbers += [(name, "", *row) for _, name, *row in of_runs]
        for _, checkpoints, look in styled(groups):
            c, nobody = curve(checkpoints, shift), curve(checkpoints, "mean")["nobody"]
            line_axis.plot(on_logit_axis(c["id"]), on_logit_axis(c["ood"]), **look)
            step_axis.plot(np.maximum(c["step"], 0.5), 100 * c["er"], **look)
            nobody_axis.plot(on_logit_axis(c["id"]), 100 * nobody, **look)
        step_axis.set(xscale="log", xlabel="step (0 drawn at 1/2)", ylabel="ER, points")
        step_axis.set_title(f"ER on {shift} by step", fontsize=8)
        id_axis(nobody_axis, line)
        nobody_axis.set(ylabel="right, %")
        title = "of the images that no testbed model gets right, all shifts"
        nobody_axis.set_title(title, fontsize=8)
        step_axis.legend(fontsize=6)


def report(config, testbed, lines, checkpoints, redraws=None):
    """Tables, figures and sentences, from the testbed and trajectories alone."""
    groups, shift = by_run(checkpoints), best_line(lines)
    print_lines(testbed, lines, redraws)
    for s in (shift, "mean"):
        print_runs(groups, s)
    figure(config, testbed, lines, groups, shift)
    summary(groups, lines, shift)
    return groups


def saved(pattern):
    """Testbed, lines and checkpoints of --plot; the testbed's file lies beside the trajectories."""
    found = [Path(p) for p in sorted(glob.glob(os.path.expanduser(pattern)))]
    paths = [p for p in found if p.name != "testbed.csv"]
    beds = [p for p in (path.parent / "testbed.csv" for path in paths) if p.is_file()]
    if not beds:
        raise common.InputError(f"--plot {pattern}: no trajectories, or no testbed.csv by them")
    testbed = testbeds.read_counts(beds[0])
    lines = {ood: baseline(testbed, ood) for ood in testbed.id_of}
    return testbed, lines, read(paths, lines)


# Published models: real ER, from the counts of data/testbeds; lab/er_published.py draws them.

FROM_SCRATCH = "_epochs"  # in the names of the 2020 testbed's checkpoints of trainings from scratch


def studied_points(testbed, lines, redraws):
    """[(model, shift, ID, OOD, ER, low, high, extrapolated)] of the models beside a baseline."""
    points = []
    for model in testbed.studied:
        i = testbed.row(model)
        for ood, line in lines.items():
            sets = line.id, ood
            k, n = [testbed.k[s][i] for s in sets], [testbed.n[s] for s in sets]
            if np.isnan(k).any():
                continue
            acc = k[0] / n[0], k[1] / n[1]
            er = effective_robustness(*acc, line.slope, line.intercept)
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            low, high = testbeds.interval(effective_robustness(*drawn, *redraws.lines[ood]))
            points.append((model, ood, *acc, er, low, high, line.extrapolates(acc[0])))
    return points


def print_studied(points, shifts):
    """ER of each studied model; checkpoints from scratch, which are many, as a range."""
    rows = {}
    for model, _, acc_id, _, er, low, high, outside in points:
        if FROM_SCRATCH not in model:
            cells = rows.setdefault(model, [model, f"{100 * acc_id:.1f}"])
            spread = f"[{100 * low:+.2f}, {100 * high:+.2f}]"
            cells.append(f"{100 * er:+.2f} {spread}{' *' * outside}")
    title = "effective robustness in points [95 %]; * ID accuracy outside the testbed's range (E3)"
    print("\n" + common.table(["model", "ID", *shifts], rows.values(), title))
    for s in shifts:
        er = [100 * p[4] for p in points if p[1] == s and FROM_SCRATCH in p[0]]
        if er:
            spread = f"{min(er):+.2f} to {max(er):+.2f}, mean {np.mean(er):+.2f}"
            print(f"{s}: {len(er)} checkpoints of trainings from scratch: ER {spread}")


def published(config):
    """--testbed: lines of published models, and the ER of those beside them.  -> studied_points"""
    points = []
    for name in testbeds.PUBLISHED if config.testbed == "all" else [config.testbed]:
        testbed = testbeds.read(name)
        draws = min(config.draws, 200) if testbed.right else config.draws
        redraws = testbeds.redraw(testbed, draws)
        lines = {ood: baseline(testbed, ood) for ood in testbed.id_of}
        print_lines(testbed, lines, redraws)
        if own := studied_points(testbed, lines, redraws):
            print_studied(own, list(lines))
        points += own
    return points


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier, Measurement."""
    config, data = common.setup(Config, argv, __doc__, {})
    for name, value in {"lr": "2e-4", "epochs": 2, "epochs_random": 1}.items():
        if config.quick and name not in config.given:
            setattr(config, name, value)
    clip, zero_shot = common.zero_shot(config, data)
    bits = "digits-quick.npz" if config.quick else "digits.npz"  # 24 or 40 models
    testbed = testbeds.read(common.EMBEDDED / "testbeds" / bits)
    measurement = new_measurement(config, testbed, *in_memory(data, clip))
    path, counts = Path(config.out) / "trajectories/testbed.csv", replace(testbed, right={})
    common.write_file(path, functools.partial(testbeds.write, counts))
    return config, data, clip, zero_shot, measurement


prepared = functools.cache(prepare)  # of one process


def work(argv, setting):
    """One trajectory, perhaps in a process of its own."""
    return follow(*prepared(argv), setting)


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    if config.testbed:
        return published(config)
    if config.plot:
        return report(config, *saved(config.plot))
    if config.data != "digits":
        raise common.InputError(
            f"--data {config.data}: a study needs a testbed on the same data, which is here for the"
            " digits; for CIFAR-10 and ImageNet trees see lab/er_settings.py"
        )
    plan(config)  # refuses what it does not know, before any work
    words = tuple(sys.argv[1:] if argv is None else argv)
    prepared.cache_clear()
    config, *_, measurement = prepared(words)
    seeds = range(config.seed, config.seed + config.seeds)
    settings = [replace(s, seed=seed) for seed in seeds for s in plan(config)]
    settings.sort(key=lambda s: -s.epochs)  # longest first: none runs alone at the end
    runs = common.in_processes(work, words, settings, config.jobs, config.device)
    checkpoints = [c for of_run in runs for c in of_run]
    bed, lines, redraws = measurement.testbed, measurement.lines, measurement.redraws
    return report(config, bed, lines, checkpoints, redraws)


if __name__ == "__main__":
    common.run(main)
