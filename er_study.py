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
    (ours)    published models, before and after   modern

    python er_study.py                   # digits; ER on UCI +54 -> +24
    python er_study.py --quick           # the same in small, 2 minutes
    python er_study.py --testbed modern  # real models, from tables: ER on V2 +5.0 -> +0.4

Where the text known to us leaves something open is marked at its line (grep Differs); what we do
and why stands in docs/differences.md: E1 accuracies of 0 and 1, E2 intervals, E3 extrapolation, E4
when a run is evaluated, E5 a largest ER free of selection, E6 the digits' recipe.
"""

import copy
import functools
import itertools
import sys
import textwrap
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit, logit
from scipy.stats import linregress

import common
from common import arg
from data import testbeds

KINDS = ("zero-shot", "new-head", "head-only", "random")  # what a trajectory starts from


@dataclass
class Config(common.Run):
    testbed: str = arg("", "modern: published models instead of a study")
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


def fit_line(acc_id, acc_ood):
    """App. A: linregress(logit(Acc_ID), logit(Acc_OOD)).  [M], [M] -> slope, intercept, R2, used

    used: bool [M], the pairs with both logits finite (E1). Accuracies are never clipped. Raises
    InputError for percent and NaN, whose logits would be left out without a word.
    """
    for acc in (acc_id, acc_ood):
        if not np.all((acc >= 0) & (acc <= 1)):
            raise common.InputError(f"accuracies are not all shares, from 0 to 1: {acc}")
    x, y = logit(acc_id), logit(acc_ood)
    used = np.isfinite(x) & np.isfinite(y)  # Differs (E1): the text does not say
    if used.sum() < 3:
        raise common.InputError(f"baseline: {used.sum()} models with finite logits; needs 3")
    line = linregress(x[used], y[used])
    return line.slope, line.intercept, line.rvalue**2, used


def beta(acc_id, slope, intercept):
    """Sec. 3: the OOD accuracy that the baseline gives an ID accuracy; 0 at 0, 1 at 1 (E1)."""
    return expit(slope * logit(acc_id) + intercept)


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


@dataclass
class Line:
    """A baseline, and the M models that it is fitted to."""

    id: str  # set
    ood: str  # shift
    slope: float
    intercept: float
    r2: float
    models: list
    acc_id: np.ndarray  # [M]
    acc_ood: np.ndarray

    def __post_init__(self):
        self.er = self.er_of(self.acc_id, self.acc_ood)  # the scale for that of others
        self.residual = self.er.std(ddof=2)
        self.low, self.high = self.acc_id.min(), self.acc_id.max()

    def er_of(self, acc_id, acc_ood):
        return effective_robustness(acc_id, acc_ood, self.slope, self.intercept)

    def extrapolates(self, acc_id):
        return not self.low <= acc_id <= self.high  # Differs (E3): ours


def baseline(testbed, ood):
    """Line of a testbed for one shift. Studied models never enter: they would pull it to them."""
    at_home = testbed.id_of[ood]
    acc_id, acc_ood = testbed.accuracy(at_home), testbed.accuracy(ood)
    others = [m not in testbed.studied for m in testbed.models]
    rows = np.flatnonzero(others & ~np.isnan(acc_id) & ~np.isnan(acc_ood))
    slope, intercept, r2, used = fit_line(acc_id[rows], acc_ood[rows])
    if not used.all():
        print(f"{ood}: {(~used).sum()} models with an accuracy of 0 or 1 are not in the fit (E1)")
    rows = rows[used]
    models = [testbed.models[i] for i in rows]
    return Line(at_home, ood, slope, intercept, r2, models, acc_id[rows], acc_ood[rows])


@dataclass
class Measurement:
    """What ER is measured with."""

    testbed: testbeds.Testbed
    draws: int  # of models and images, for intervals; 0: there are none
    sets: dict | None = None  # name -> (images [N, 3, H, W], labels [N]), to run a model on

    def __post_init__(self):
        self.lines = {ood: baseline(self.testbed, ood) for ood in self.testbed.id_of}
        self.redraws = testbeds.redraw(self.testbed, self.draws) if self.draws else None


def in_memory(data, clip):
    """{name: (images, labels)} of the test set and the shifts, as tensors."""
    transform, sets = common.eval_transform(clip.size, clip.mean, clip.std), {}
    for split in (data.test, *data.shifts):
        images = common.Images(split, transform)
        sets[split.name] = torch.stack([images[i, 0][0] for i in range(len(images))]), split.labels
    return sets


def recipes(config):
    """{run: (what it starts from, learning rate, epochs)} of --kinds."""
    wanted = common.choose(config.kinds, KINDS, "--kinds")
    rates = {"zero-shot": common.numbers(config.lr, "--lr"), "new-head": [config.lr_new]}
    rates |= {"head-only": [config.lr_head], "random": [config.lr_random]}
    found = {}
    for kind in wanted:
        epochs = config.epochs_random if kind == "random" else config.epochs
        found |= {f"{kind}, lr {lr:g}": (kind, lr, epochs) for lr in rates[kind]}
    return dict(sorted(found.items(), key=lambda run: -run[1][2]))  # the longest first


def start_of(config, zero_shot, init):
    """The Classifier from which a run starts: one of KINDS, by config.seed."""
    model = copy.deepcopy(zero_shot)
    if init == "random":
        common.set_seed(config.seed)
        untrained = common.load_clip(replace(config, weights="", pretrained="random"))
        model.visual = untrained.model.visual.to(model.head.weight.device)
    if init != "zero-shot":  # rows of random directions, as long as the old: logits of one scale
        generator = torch.Generator().manual_seed(config.seed)
        rows = torch.randn(model.head.weight.shape, generator=generator)
        length = model.head.weight.detach().cpu().norm(dim=1, keepdim=True)
        with torch.no_grad():
            model.head.weight.copy_(F.normalize(rows, dim=1) * length)
            model.head.bias.zero_()
    return model


def follow(config, data, clip, zero_shot, measurement, run, init):
    """Fine-tune once from `start_of` init, evaluated by the cadence.  -> [Point]"""
    start, splits = start_of(config, zero_shot, init), (data.test, *data.shifts)

    def evaluations(todo, resume):
        used, sets = replace(config, resume=resume), measurement.sets
        model = copy.deepcopy(start)
        args = used, run, model, data.train, clip
        if init == "head-only":
            sets = {s.name: common.frozen_features(used, model, s, clip) for s in splits}
            training = common.probe_training(*args)
        else:
            training = common.image_training(*args)
        for done in common.train_steps(used, training):
            if done in todo:
                yield done, score(model, sets)

    key = [start.state_dict(), common.training_key(config, clip, data.train)]
    key += [common.fingerprint(s) for s in splits]
    steps = cadence(common.steps_of_epoch(len(data.train.labels), config.batch), config.epochs)
    return record(config, measurement, run, init, key, steps, evaluations)


# --- evaluate -------------------------------------------------------------------------------------


@dataclass
class Point:
    """One model on one shift, in shares: an evaluation of a run, which is a row of the run's file,
    or a published model. The shift "mean" is the mean over all shifts, its `nobody` the share of
    all their images, its `id` that of the first one.
    """

    run: str  # or the published model
    shift: str
    id: float
    ood: float
    er: float
    er_lo: float  # 95 % interval, over testbed models and images
    er_hi: float
    extrapolated: int
    init: str = ""
    lr: float = 0.0
    seed: int = 0
    step: int = 0
    nobody: float = 0.0  # right, of the images that no testbed model gets right; 0 where none is
    er_half: float = 0.0  # of selection_half of the images, ID and OOD (E5)
    er_rest: float = 0.0


@torch.inference_mode()
def score(model, sets):
    """{set: right, bool [N]} of a Classifier, of {set: (images [N, 3, H, W], labels [N])}, or with
    raw features [N, D] in place of the images.
    """
    device, right = model.head.weight.device, {}
    model.eval()
    for name, (inputs, labels) in sets.items():
        parts = [x.to(device) for x in inputs.split(256)]
        logits = [model.classify(x) if x.dim() == 2 else model(x)[1] for x in parts]
        right[name] = (torch.cat(logits).argmax(1).cpu() == labels).numpy()
    return right


def measure(config, measurement, run, init, step, right):
    """[Point] of one evaluation, of every shift and their mean, which has its own interval.

    right: {set: bool [N]}, all of the same weights.
    """
    redraws, bits = measurement.redraws, measurement.testbed.right
    of_run = {"run": run, "init": init, "lr": config.lr, "seed": config.seed, "step": step}
    found, drawn, counts = [], [], []
    for ood, line in measurement.lines.items():
        a, b = right[line.id], right[ood]
        half_a, half_b = selection_half(len(a)), selection_half(len(b))
        redrawn = (redraws.accuracy(s, right[s]) for s in (line.id, ood))
        drawn.append(effective_robustness(*redrawn, *redraws.lines[ood]))
        low, high = testbeds.interval(drawn[-1])
        k, n = share_right(b, nobody_right(bits[ood])) if bits else (0, 0)
        counts.append((k, n))
        point = Point(
            **of_run, shift=ood, id=a.mean(), ood=b.mean(), er=line.er_of(a.mean(), b.mean()),
            er_lo=low, er_hi=high, extrapolated=int(line.extrapolates(a.mean())),
            nobody=k / max(n, 1), er_half=line.er_of(a[half_a].mean(), b[half_b].mean()),
            er_rest=line.er_of(a[~half_a].mean(), b[~half_b].mean()),
        )  # fmt: skip
        found.append(point)
    low, high = testbeds.interval(np.mean(drawn, 0))
    k, n = np.sum(counts, 0)
    outside = max(p.extrapolated for p in found)
    own = {"id": found[0].id, "nobody": k / max(n, 1), "extrapolated": outside}
    return [*found, replace(average(found), shift="mean", er_lo=low, er_hi=high, **own)]


def average(points):
    """The first of the points, with the means of all for what was measured."""
    measured = vars(points[0]).keys() - {"run", "shift", "init", "lr", "seed", "step"}
    mean = {name: np.mean([getattr(p, name) for p in points]) for name in measured}
    return replace(points[0], **mean)


def record(config, measurement, run, init, key, steps, evaluations):
    """[Point] of a run at `steps`. They are kept in a CSV file, which is written anew with
    each: an interrupted run loses none, and what the file has is not evaluated again.

    key: what shapes the run. evaluations(todo, resume) yields (step, {set: bool [N]}) for the steps
    in `todo`; resume: whether a training may go on from its checkpoint.
    """
    testbed, columns = measurement.testbed, [f.name for f in fields(Point)]
    key = [key, run, init, config.lr, config.seed, sorted(steps)]
    key += [testbed.models, testbed.k, measurement.draws, columns]
    name = common.slug(f"{run}, seed {config.seed}")
    path = Path(config.out) / "trajectories" / f"{name}-{common.hash_of(key)}.csv"
    found = common.broadcast(read(path) if config.resume and path.is_file() else [])
    todo = set(steps) - {p.step for p in found}
    for resume in (config.resume, False):  # anew where the checkpoint is past lost evaluations
        for step, right in evaluations(todo, resume) if todo else ():
            found += measure(config, measurement, run, init, step, right)
            write(path, found)
            todo.remove(step)
    return found


def write(path, points):
    """The file that `read` reads. These files are the result: raises InputError if it fails."""
    rows = functools.partial(testbeds.write_rows, points)
    if not common.write_file(path, rows) and not common.rank():
        raise common.InputError(f"{path} cannot be written; the same command continues")


def read(path):
    """[Point] of a file that `write` wrote. Raises InputError."""
    return testbeds.read_rows(path, Point)


def by_run(points, shift):
    """{run: {seed: [Point]}} on a shift, by start, rate, seed and step."""
    runs = {}
    for p in sorted(points, key=lambda p: (KINDS.index(p.init), p.lr, p.seed, p.step)):
        if p.shift == shift:
            runs.setdefault(p.run, {}).setdefault(p.seed, []).append(p)
    return runs


def summarise(points):
    """The largest ER of a run on a shift, free of selection (E5); at which ID accuracy it is; the
    rise to it and the fall from it. Shares.
    """
    # Differs (E5): how the paper sums up a curve is not known to us
    by_half = max(points, key=lambda p: p.er_half)
    by_rest = max(points, key=lambda p: p.er_rest)
    largest = (by_half.er_rest + by_rest.er_half) / 2  # chosen on one half, scored on the other
    first, last = ((p.er_half + p.er_rest) / 2 for p in (points[0], points[-1]))
    where = (by_half.id + by_rest.id) / 2
    return {"max": largest, "id": where, "rise": largest - first, "fall": largest - last}


def over_seeds(seeds):
    """The first Point of a run, its last, and `summarise`, mean over {seed: [Point]}; rise and fall
    are text, with their intervals.
    """
    first, last = (average([own[i] for own in seeds.values()]) for i in (0, -1))
    found = [summarise(own) for own in seeds.values()]
    top = {name: np.mean([x[name] for x in found]) for name in ("max", "id")}
    top |= {name: over_runs([x[name] for x in found]) for name in ("rise", "fall")}
    return first, last, top


def best_line(lines):
    """The shift whose line explains most, on which ER means most; from the testbed alone."""
    return max(lines, key=lambda s: lines[s].r2)


def print_lines(measurement):
    """Table of the baselines; the interval is of the slope, over models and images."""
    rows, redraws = [], measurement.redraws
    for ood, line in measurement.lines.items():
        slope = f"{line.slope:.4f}"
        if redraws:
            slope += " [{:.3f}, {:.3f}]".format(*testbeds.interval(redraws.lines[ood][0]))
        numbers = [slope, f"{line.intercept:.4f}", f"{line.r2:.4f}", f"{100 * line.residual:.2f}"]
        numbers += [f"{100 * line.low:.1f}-{100 * line.high:.1f}"]
        rows.append([ood, line.id, len(line.models), *numbers])
    header = ["shift", "ID", "models", "slope [95 %]", "intercept", "R2", "residual SD", "ID range"]
    name = measurement.testbed.name
    title = f"testbed {name}: logit(OOD) = slope logit(ID) + intercept; points"
    print("\n" + common.table(header, rows, title))


def in_points(er, low, high):
    """Shares as text in points."""
    return f"{100 * er:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def over_runs(shares):
    """Their mean in points, of several with its interval."""
    mean, low, high = common.interval(shares)
    return in_points(mean, low, high) if len(shares) > 1 else f"{100 * mean:+.1f}"


def print_tables(measurement, points):
    """The baselines; then ER through fine-tuning, mean over seeds, on the shift whose line explains
    most and over all shifts. Intervals at the start and at the end are those of images and testbed,
    averaged over seeds; all others are over runs.
    """
    print_lines(measurement)
    header = ["ER in points", "start [95 %]", "unbiased", "at ID", "rise", "fall"]
    header += ["last ID", "last ER [95 %]"]
    for shift in (best_line(measurement.lines), "mean"):
        rows = []
        for run, seeds in by_run(points, shift).items():
            first, last, top = over_seeds(seeds)
            star, end = (" *" * bool(p.extrapolated) for p in (first, last))
            cells = [in_points(first.er, first.er_lo, first.er_hi) + star]
            cells += [f"{100 * top['max']:+.1f}", f"{100 * top['id']:.1f}"]
            cells += [top["rise"] + star, top["fall"] + end, f"{100 * last.id:.1f}"]
            rows.append([run, *cells, in_points(last.er, last.er_lo, last.er_hi) + end])
        every = "all shifts, those without a line too" if shift == "mean" else shift
        title = f"effective robustness on {every}; *: extrapolated"
        print("\n" + common.table(header, rows, title))


TICKS = (1, 2, 5, 10, 20, 30, 50, 60, 70, 80, 85, 90, 95, 98, 99)


def logit_axis(axis, which, low, high, label):
    """The x or the y axis shows accuracies on a logit scale, with ticks at round percentages."""
    axis.set(**{f"{which}scale": "logit", f"{which}label": label})
    own = axis.xaxis if which == "x" else axis.yaxis
    own.set_ticks([t / 100 for t in TICKS], labels=TICKS)
    own.set_ticks([], minor=True)
    axis.set(**{f"{which}lim": (low, high)})


def id_axis(axis, line, low=0.08, high=0.985):
    """ID accuracy, shaded where the line is extrapolated."""
    logit_axis(axis, "x", low, high, "ID accuracy, %")
    for ends in ((low, line.low), (line.high, high)):
        if ends[0] < ends[1]:
            axis.axvspan(*ends, color="0.95", lw=0)


def line_panel(axis, line):
    """A testbed's models and line, dotted where extrapolated; y = x dashed.  -> rows of numbers"""
    low, high = 0.08, 0.99
    logit_axis(axis, "x", low, high, "ID accuracy, %")
    logit_axis(axis, "y", low, high, "OOD accuracy, %")
    axis.plot([low, high], [low, high], "--", color="0.7", lw=0.8)
    axis.plot(line.acc_id, line.acc_ood, "o", ms=3, color="0.6")
    for ends, style in (((low, high), ":"), ((line.low, line.high), "-")):
        axis.plot(ends, beta(ends, line.slope, line.intercept), style, color="0.4", lw=1.1)
    fit = f"slope {line.slope:.2f}, intercept {line.intercept:.2f}, R² {line.r2:.3f}"
    axis.set_title(f"{line.ood}\n{fit}", fontsize=8)
    columns = line.models, line.acc_id, line.acc_ood, line.er
    return [(line.ood, model, "", *row) for model, *row in zip(*columns, strict=True)]


def draw_runs(axis, runs, x, y, scale=1, **look):
    """Curves of y over x: a colour for each run, one label for all its seeds."""
    look = {"marker": "o", "lw": 0.9, "ms": 2.5} | look
    for i, (run, seeds) in enumerate(runs.items()):
        for j, own in enumerate(seeds.values()):
            columns = [getattr(p, x) for p in own], [scale * getattr(p, y) for p in own]
            axis.plot(*columns, color=f"C{i}", label=None if j else run, **look)


def er_panel(axis, line, runs):
    """ER against ID accuracy, a colour per run; dark: of the testbed's own models.  -> rows"""
    points = [p for seeds in runs.values() for own in seeds.values() for p in own]
    id_axis(axis, line, max(0.08, 0.95 * min(p.id for p in points)))
    shift = points[0].shift
    if shift == line.ood:
        axis.axhspan(100 * line.er.min(), 100 * line.er.max(), color="0.88", lw=0)
    axis.axhline(0, color="0.4", lw=0.8)
    draw_runs(axis, runs, "id", "er", 100)
    axis.set(ylabel="ER, points")
    axis.set_title(f"ER on {'all shifts' if shift == 'mean' else shift}", fontsize=8)
    return [(shift, p.run, p.step, p.id, p.ood, p.er, p.er_lo, p.er_hi) for p in points]


def figure(config, lines, points):
    """Accuracies on logit axes; ER against ID accuracy, and against steps; what the runs get of the
    images that no testbed model gets right.
    """
    shift = best_line(lines)
    line, runs = lines[shift], by_run(points, shift)
    header = ["shift", "series", "step", "id", "ood", "er", "lo", "hi"]
    path = f"{config.out}/figures/er_study"
    with common.figure(path, header, columns=2, rows=2) as (axes, numbers):
        (line_axis, er_axis), (step_axis, nobody_axis) = axes
        numbers += line_panel(line_axis, line)
        draw_runs(line_axis, runs, "id", "ood")
        numbers += er_panel(er_axis, line, runs)
        draw_runs(step_axis, runs, "step", "er", 100)
        step_axis.set(xscale="symlog", xlim=(0, None), xlabel="step", ylabel="ER, points")
        step_axis.set_title(f"ER on {shift} by step", fontsize=8)
        step_axis.legend(fontsize=6)
        id_axis(nobody_axis, line)
        draw_runs(nobody_axis, by_run(points, "mean"), "id", "nobody", 100)
        nobody_axis.set(ylabel="right, %")
        title = "of the images that no testbed model gets right, all shifts"
        nobody_axis.set_title(title, fontsize=8)


STORIES = {  # how the name of a run begins: what it is
    "zero-shot, lr 0.0002": "Fine-tuned from the zero-shot model",
    "new-head": "A new head on the pre-trained encoder",
    "random": "From scratch",
}


def summary(lines, points):
    """Sentences on the tables, computed from them."""
    shift = best_line(lines)
    weak = [f"{s} ({line.r2:.2f})" for s, line in lines.items() if line.r2 < 0.5]
    first = f"{shift} has the line that explains most, with R2 {lines[shift].r2:.2f}."
    if weak:
        first += f" R2 is below 1/2, so that ER is hardly defined, on {', '.join(weak)}."
    sentences = [first]
    for run, seeds in by_run(points, shift).items():
        for start, text in STORIES.items():
            if run.startswith(start):
                sentences.append(f"{text} ({run}): {describe(seeds, shift)}")
    say(sentences)


def describe(seeds, shift):
    """Is there a bump, how high, where, and is ER gone at the end?"""
    first, last, top = over_seeds(seeds)
    gone = "includes" if last.er_lo <= 0 <= last.er_hi else "excludes"
    many = f"; intervals of rise and fall over {len(seeds)} runs" if len(seeds) > 1 else ""
    return (
        f"ER on {shift} is {100 * first.er:+.1f} points at the start, at most"
        f" {100 * top['max']:+.1f} (rise {top['rise']}, free of selection, at ID"
        f" {100 * top['id']:.0f} %), then lower by {top['fall']}: at the end"
        f" {in_points(last.er, last.er_lo, last.er_hi)} (models and images), which {gone} 0{many}."
    )


def say(sentences):
    print()
    for number, text in enumerate(sentences, 1):
        print(textwrap.fill(f"{number}. {text}", 100, subsequent_indent="   "))


# --- published models -----------------------------------------------------------------------------
# From the counts in data/testbeds alone; lab/er_modern.py says more of them.


def studied_points(measurement):
    """{(model, shift): Point} of the models beside a baseline, where both accuracies are known. The
    images are redrawn as binomials of their counts.
    """
    testbed, redraws, points = measurement.testbed, measurement.redraws, {}
    for model, (ood, line) in itertools.product(testbed.studied, measurement.lines.items()):
        sets, i = (line.id, ood), testbed.row(model)
        k, n = [testbed.k[s][i] for s in sets], [testbed.n[s] for s in sets]
        if not np.isnan(k).any():
            acc = k[0] / n[0], k[1] / n[1]
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            ends = testbeds.interval(effective_robustness(*drawn, *redraws.lines[ood]))
            points[model, ood] = Point(
                model, ood, *acc, line.er_of(*acc), *ends, line.extrapolates(acc[0])
            )
    return points


def print_pairs(pairs, points):
    """Table of ER before and after."""
    rows, shifts = [], list(dict.fromkeys(shift for _, shift in points))
    for pair in pairs:
        ends = [[points[pair[end], s] for s in shifts] for end in ("zero-shot", "fine-tuned")]
        cells = [pair["pair"] + " *" * bool(pair["by way of"])]
        cells += [" -> ".join(f"{100 * of_end[0].id:.1f}" for of_end in ends)]
        for a, b in zip(*ends, strict=True):
            after = in_points(b.er, b.er_lo, b.er_hi) + " e" * b.extrapolated
            cells.append(f"{100 * a.er:+.1f} -> {after}")
        rows.append(cells)
    title = (
        "ER in points, zero-shot -> fine-tuned on ImageNet [95 %]; e: extrapolated (E3);"
        " *: by way of ImageNet-12k"
    )
    print("\n" + common.table(["pair", "ID", *shifts], rows, title))


def describe_pairs(pairs, line, points):
    """On one shift: does ER vanish?"""
    direct, shift, own = [p for p in pairs if not p["by way of"]], line.ood, 100 * line.er
    ends = ("zero-shot", "fine-tuned")
    before, after = ([points[pair[end], shift] for pair in direct] for end in ends)
    first, last = (100 * np.mean([p.er for p in group]) for group in (before, after))
    gone = "which is within" if abs(last) < 200 * line.residual else "which is beyond"
    zero = sum(p.er_lo <= 0 <= p.er_hi for p in after)
    above = sum(100 * p.er > own.max() for p in after)
    return (
        f"{shift}: ER over {len(direct)} pairs is {first:+.1f} before fine-tuning and {last:+.1f}"
        f" after, {gone} two standard deviations ({200 * line.residual:.1f}) of the line's own"
        f" models. After fine-tuning {zero} of the {len(direct)} intervals include 0, {above} of"
        f" the ER are larger than that of any of the {len(own)} models ({own.max():+.1f}), and"
        f" {sum(p.extrapolated for p in after)} are extrapolated. The line's R2 is {line.r2:.3f}."
    )


def modern(config):
    """Real models before and after fine-tuning, on all of ImageNet's validation set, where the
    zero-shot ones are known.  -> Measurement, studied_points
    """
    pairs, bed = testbeds.read_table(testbeds.FOLDER / "modern_pairs.csv"), testbeds.read("modern")
    bed = replace(bed, id_of=dict.fromkeys(bed.id_of, testbeds.HOME))
    measurement = Measurement(bed, config.draws)
    points = studied_points(measurement)
    print_lines(measurement)
    print_pairs(pairs, points)
    say([describe_pairs(pairs, line, points) for line in measurement.lines.values()])
    return measurement, points


# --- main -----------------------------------------------------------------------------------------


@functools.cache  # once in every process of common.in_processes
def prepare(argv):
    """Command line, a tuple -> config, data, CLIP, zero-shot Classifier, Measurement."""
    config, data = common.setup(Config, argv, __doc__, {})
    if config.quick:
        for name, value in {"lr": "2e-4", "epochs": 2, "epochs_random": 1}.items():
            if name not in config.given:
                setattr(config, name, value)
        print(f"quick: {config.epochs} epochs, {config.epochs_random} from random initialisation")
    clip, zero_shot = common.zero_shot(config, data)
    bits = "digits-quick.npz" if config.quick else "digits.npz"  # 24 or 40 models
    testbed = testbeds.read(common.EMBEDDED / "testbeds" / bits)
    measurement = Measurement(testbed, config.draws, in_memory(data, clip))
    path, counts = Path(config.out) / "trajectories/testbed.csv", replace(testbed, right={})
    common.write_file(path, functools.partial(testbeds.write, counts))
    return config, data, clip, zero_shot, measurement


def one_run(argv, run):
    """[Point] of a run and a seed, perhaps in a process of its own."""
    (name, seed), (config, *world) = run, prepare(argv)
    init, lr, epochs = recipes(config)[name]
    config = replace(config, lr=lr, epochs=epochs, seed=seed)
    return follow(config, *world, name, init)


def main(argv=None):
    argv = tuple(sys.argv[1:] if argv is None else argv)
    config = common.parse(Config, argv, __doc__)
    if config.testbed == "modern":
        return modern(config)
    if config.testbed:
        others = "of cifar10, imagenet, imagenet2020 and files, see lab/er_published.py"
        raise common.InputError(f"--testbed {config.testbed}: expected modern; {others}")
    if config.data != "digits":
        raise common.InputError(
            f"--data {config.data}: a study needs a testbed on the same data, which is here for the"
            " digits; for CIFAR-10 and ImageNet trees see lab/er_settings.py"
        )
    recipes(config)  # refuses what it does not know, before any work
    prepare.cache_clear()  # the data may be others by now
    config, *_, measurement = prepare(argv)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [(name, seed) for name in recipes(config) for seed in seeds]
    found = common.in_processes(one_run, argv, runs, config.jobs, config.device)
    points = [p for of_run in found for p in of_run]
    print_tables(measurement, points)
    figure(config, measurement.lines, points)
    summary(measurement.lines, points)
    return points


if __name__ == "__main__":
    common.run(main)
