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
import dataclasses
import functools
import itertools
import math
import sys
import textwrap
from dataclasses import dataclass, replace
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

    id: str
    ood: str
    slope: float
    intercept: float
    r2: float
    models: list
    acc_id: np.ndarray  # [M]
    acc_ood: np.ndarray
    er: np.ndarray  # of these models themselves: the scale for that of others
    low: float  # range of their ID accuracy
    high: float
    residual: float  # standard deviation of their ER

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
    models, acc_id, acc_ood = [testbed.models[i] for i in rows], acc_id[rows], acc_ood[rows]
    er = effective_robustness(acc_id, acc_ood, slope, intercept)
    low, high, residual = acc_id.min(), acc_id.max(), er.std(ddof=2)
    of_models = models, acc_id, acc_ood, er, low, high, residual
    return Line(at_home, ood, slope, intercept, r2, *of_models)


@dataclass
class Measurement:
    """What ER is measured with."""

    testbed: testbeds.Testbed
    lines: dict  # shift -> Line
    redraws: testbeds.Redraws | None  # for intervals; None: there are none
    sets: dict  # name -> (images [N, 3, H, W], labels [N]) of the test set and the shifts


def new_measurement(config, testbed, sets=None):
    lines = {ood: baseline(testbed, ood) for ood in testbed.id_of}
    return Measurement(testbed, lines, testbeds.redraw(testbed, config.draws), sets)


def in_memory(data, clip):
    """{name: (images, labels)} of the test set and the shifts, as tensors."""
    transform, sets = common.eval_transform(clip.size, clip.mean, clip.std), {}
    for split in (data.test, *data.shifts):
        images = common.Images(split, transform)
        sets[split.name] = torch.stack([images[i, 0][0] for i in range(len(images))]), split.labels
    return sets


@dataclass(frozen=True)
class Setting:
    """What fine-tuning is followed: one run."""

    run: str  # its name, whatever the seed
    init: str  # one of KINDS
    lr: float  # of logistic regression (lab/er_settings.py): lambda
    seed: int
    epochs: int


def plan(config):
    """[Setting] of --kinds and --seeds, the longest first: none runs alone at the end."""
    wanted = common.choose(config.kinds, KINDS, "--kinds")
    rates = {"zero-shot": common.numbers(config.lr, "--lr"), "new-head": [config.lr_new]}
    rates |= {"head-only": [config.lr_head], "random": [config.lr_random]}
    epochs = dict.fromkeys(KINDS, config.epochs) | {"random": config.epochs_random}
    settings = [
        Setting(f"{kind}, lr {lr:g}", kind, lr, config.seed + i, epochs[kind])
        for i in range(config.seeds)
        for kind in dict.fromkeys(wanted)
        for lr in rates[kind]
    ]
    return sorted(settings, key=lambda s: -s.epochs)


def new_head(model, seed):
    """A head of random directions, as long as the zero-shot head's rows (logits of one scale)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(model.head.weight.shape, generator=generator)
    length = model.head.weight.detach().cpu().norm(dim=1, keepdim=True)
    with torch.no_grad():
        model.head.weight.copy_(F.normalize(rows, dim=1) * length)
        model.head.bias.zero_()
    return model


def start_of(config, zero_shot, init):
    """The Classifier from which a trajectory starts: zero-shot, or a twin of config.seed."""
    if init == "random":
        other = replace(config, weights="", pretrained="random")
        common.set_seed(config.seed)
        visual = common.load_clip(other).model.visual
        model = common.Classifier(visual, zero_shot.head.weight.detach().cpu())
        return new_head(model.to(zero_shot.head.weight.device), config.seed)
    model = copy.deepcopy(zero_shot)
    return model if init == "zero-shot" else new_head(model, config.seed)


def follow(config, data, clip, zero_shot, measurement, setting, loss=None):
    """Fine-tune once, evaluated by the cadence.  -> [Point]

    loss(model) -> loss_fn for common.fine_tune; the setting's name must say which.
    """
    config = replace(config, lr=setting.lr, epochs=setting.epochs, seed=setting.seed)
    start, splits = start_of(config, zero_shot, setting.init), (data.test, *data.shifts)

    def evaluations(todo, resume):
        used, features = replace(config, resume=resume), None
        model = copy.deepcopy(start)
        args = used, setting.run, model, data.train, clip
        if setting.init == "head-only":
            features = {s.name: common.frozen_features(used, model, s, clip)[0] for s in splits}
            training = common.probe_training(*args)
        elif loss:
            training = common.image_training(*args, loss(model), key={"loss": setting.run})
        else:
            training = common.image_training(*args)
        for done in common.train_steps(used, training):
            if done in todo:
                yield done, score(measurement, model, features)

    recipe = [getattr(config, f) for f in ("batch", "weight_decay", "warmup", "clip", "precision")]
    key = [start.state_dict(), clip.key, recipe]
    key += [common.fingerprint(s) for s in (data.train, *splits)]
    key.append(common.hash_of(loss and common.code_of(loss)))
    steps = cadence(common.steps_of_epoch(len(data.train.labels), config.batch), setting.epochs)
    return record(config, measurement, setting, key, steps, evaluations)


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
    ece_id: float | None = None  # where it was measured (lab/er_axes.py)
    ece_ood: float | None = None


@torch.inference_mode()
def score(measurement, model, features=None):
    """{set: right, bool [N]} of a Classifier; `features` {set: [N, D]} in place of the images."""
    device, right = model.head.weight.device, {}
    model.eval()
    for name, (images, labels) in measurement.sets.items():
        inputs = (features[name] if features else images).split(256)
        parts = [x.to(device) for x in inputs]
        logits = [model.classify(x) if features else model(x)[1] for x in parts]
        right[name] = (torch.cat(logits).argmax(1).cpu() == labels).numpy()
    return right


def measure(measurement, setting, step, right):
    """[Point] of one evaluation, of every shift and their mean, which has its own interval.

    right: {set: bool [N]}, all of the same weights.
    """
    redraws, bits = measurement.redraws, measurement.testbed.right
    run = {name: getattr(setting, name) for name in ("run", "init", "lr", "seed")}
    found, drawn, counts = [], [], []
    for ood, line in measurement.lines.items():
        a, b, fit = right[line.id], right[ood], (line.slope, line.intercept)
        redrawn = (redraws.accuracy(s, right[s]) for s in (line.id, ood))
        drawn.append(effective_robustness(*redrawn, *redraws.lines[ood]))
        low, high = testbeds.interval(drawn[-1])
        k, n = share_right(b, nobody_right(bits[ood])) if bits else (0, 0)
        counts.append((k, n))
        half_a, half_b = selection_half(len(a)), selection_half(len(b))
        point = Point(
            **run, step=step, shift=ood, id=float(a.mean()), ood=float(b.mean()),
            er=float(effective_robustness(a.mean(), b.mean(), *fit)), er_lo=low, er_hi=high,
            er_half=float(effective_robustness(a[half_a].mean(), b[half_b].mean(), *fit)),
            er_rest=float(effective_robustness(a[~half_a].mean(), b[~half_b].mean(), *fit)),
            nobody=k / max(n, 1), extrapolated=int(line.extrapolates(a.mean())),
        )  # fmt: skip
        found.append(point)
    low, high = testbeds.interval(np.mean(drawn, 0))
    k, n = np.sum(counts, 0)
    mean = {"shift": "mean", "er_lo": low, "er_hi": high, "nobody": float(k / max(n, 1))}
    for name in ("ood", "er", "er_half", "er_rest"):
        mean[name] = float(np.mean([getattr(p, name) for p in found]))
    mean["extrapolated"] = max(p.extrapolated for p in found)
    return [*found, replace(found[0], **mean)]


def record(config, measurement, setting, key, steps, evaluations):
    """[Point] of a run at `steps`. They are kept in a CSV file, which is written anew with
    each: an interrupted run loses none, and what the file has is not evaluated again.

    key: what shapes the run beside its setting. evaluations(todo, resume) yields (step, {set: bool
    [N]}) for the steps in `todo`; resume: whether a training may go on from its checkpoint.
    """
    bed, columns = measurement.testbed, [f.name for f in dataclasses.fields(Point)]
    key = [
        key,
        dataclasses.asdict(setting),
        sorted(steps),
        bed.models,
        bed.k,
        config.draws,
        columns,
    ]
    name = common.slug(f"{setting.run}, seed {setting.seed}")
    path = Path(config.out) / "trajectories" / f"{name}-{common.hash_of(key)}.csv"
    saved = read(path) if config.resume and path.is_file() else []
    found = common.broadcast(saved)
    todo = set(steps) - {c.step for c in found}
    for resume in (config.resume, False):  # anew where the checkpoint is past lost evaluations
        for step, right in evaluations(todo, resume) if todo else ():
            found += measure(measurement, setting, step, right)
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


def curve(points, shift):
    """{name of a Point's field: [S]} of one run on a shift, in the order of its steps."""
    own = sorted((c for c in points if c.shift == shift), key=lambda c: c.step)
    return {name: np.array([getattr(c, name) for c in own]) for name in vars(own[0])}


def at_accuracy(c, accuracy):
    """ER where a run's ID accuracy first passes `accuracy`, interpolated in logit(ID); or nan."""
    before = np.maximum.accumulate([0, *c["id"]])[:-1]
    high = (c["id"] > before) & (c["id"] < 1)  # its new highs
    if not high.any():
        return math.nan
    x, er = logit(c["id"][high]), c["er"][high]
    return float(np.interp(logit(accuracy), x, er, left=math.nan, right=math.nan))


def summarise(points, shift):
    """One run's ER in a few numbers: at the start; the largest, as is and free of selection (E5),
    and where; the rise to it and the fall from it; at the last checkpoint; at fixed ID accuracies.
    Shares.
    """
    c = curve(points, shift)
    # Differs (E5): how the paper sums up a curve is not known to us
    half, rest = c["er_half"], c["er_rest"]
    picks = [(rest, half.argmax()), (half, rest.argmax())]  # scored on, chosen on the other
    out = {"max": c["er"].max(), "last_id": c["id"][-1]}
    out |= {"max_free": np.mean([er[i] for er, i in picks])}
    out |= {"free_id": np.mean([c["id"][i] for _, i in picks])}
    out |= {"rise": np.mean([er[i] - er[0] for er, i in picks])}
    out |= {"fall": np.mean([er[i] - er[-1] for er, i in picks])}
    for name, i in (("start", 0), ("last", -1)):
        out |= {name: c["er"][i], f"{name}_lo": c["er_lo"][i], f"{name}_hi": c["er_hi"][i]}
        out |= {f"{name}_outside": c["extrapolated"][i]}
    return out | {"at 80": at_accuracy(c, 0.8), "at 90": at_accuracy(c, 0.9)}


def by_run(points):
    """{run: {seed: its points}}, by start, then rate, then seed."""
    groups = {}
    for c in sorted(points, key=lambda c: (KINDS.index(c.init), c.lr, c.seed)):
        groups.setdefault(c.run, {}).setdefault(c.seed, []).append(c)
    return groups


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


def with_interval(mean, low, high):
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def over_runs(shares):
    """'+3.1 [+2.0, +4.2]' in points, '+3.1' of one run, '-' if a run has none."""
    mean, low, high = (100 * x for x in common.interval(shares))
    if math.isnan(mean):
        return "-"
    return f"{mean:+.1f}" if math.isnan(low) else with_interval(mean, low, high)


def print_runs(groups, shift):
    """Table of ER through fine-tuning, mean over seeds. Intervals at the start and at the end are
    those of images and testbed, averaged over seeds; all others are over runs.
    """
    lines = []
    for name, runs in groups.items():
        s = [summarise(points, shift) for points in runs.values()]
        mean = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
        start = with_interval(mean["start"], mean["start_lo"], mean["start_hi"])
        last = with_interval(mean["last"], mean["last_lo"], mean["last_hi"])
        rise, fall, *at = (over_runs([x[k] for x in s]) for k in ("rise", "fall", "at 80", "at 90"))
        star, end = (" *" * bool(mean[k]) for k in ("start_outside", "last_outside"))
        cells = [start + star, f"{mean['max']:+.1f}", f"{mean['max_free']:+.1f}"]
        cells += [f"{mean['free_id']:.1f}", rise + star, fall + end]
        cells += [f"{mean['last_id']:.1f}", last + end, *at]
        lines.append([name, *cells])
    header = ["ER in points", "start [95 %]", "max", "unbiased", "at ID", "rise", "fall"]
    header += ["last ID", "last ER [95 %]", "at ID 80", "at ID 90"]
    every = "all shifts, those without a line too" if shift == "mean" else shift
    title = f"effective robustness on {every}; -: that ID accuracy is not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))


STORIES = {  # how the name of a run begins: what it is
    "zero-shot, lr 0.0002": "Fine-tuned from the zero-shot model",
    "new-head": "A new head on the pre-trained encoder",
    "random": "From scratch",
}


def summary(groups, lines, shift):
    """Sentences on the tables, computed from them."""
    weak = [f"{s} ({line.r2:.2f})" for s, line in lines.items() if line.r2 < 0.5]
    first = f"{shift} has the line that explains most, with R2 {lines[shift].r2:.2f}."
    if weak:
        first += f" R2 is below 1/2, so that ER is hardly defined, on {', '.join(weak)}."
    sentences = [first]
    for start, text in STORIES.items():
        for name in groups:
            if name.startswith(start):
                said = describe_runs(groups[name].values(), shift)
                sentences.append(f"{text} ({name}): {said}")
    say(sentences)


def say(sentences):
    print()
    for number, text in enumerate(sentences, 1):
        print(textwrap.fill(f"{number}. {text}", 100, subsequent_indent="   "))


def describe_runs(runs, shift):
    """Is there a bump, how high, where, and is ER gone at the end?"""
    s = [summarise(points, shift) for points in runs]
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


TICKS = (1, 2, 5, 10, 20, 30, 50, 60, 70, 80, 85, 90, 95, 98, 99)


def logit_axis(axis, which, low, high, label):
    """The x or the y axis shows accuracies on a logit scale, with ticks at round percentages."""
    ticks = [t / 100 for t in TICKS if low <= t / 100 <= high]
    axis.set(**{f"{which}scale": "logit", f"{which}lim": (low, high), f"{which}label": label})
    own = axis.xaxis if which == "x" else axis.yaxis
    own.set_ticks(ticks, labels=[f"{100 * t:.0f}" for t in ticks])
    own.set_ticks([], minor=True)


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
    label = f"testbed, {len(line.models)} models"
    axis.plot(line.acc_id, line.acc_ood, "o", ms=3, color="0.6", label=label)
    for ends, style in (((low, high), ":"), ((line.low, line.high), "-")):
        axis.plot(ends, beta(ends, line.slope, line.intercept), style, color="0.4", lw=1.1)
    fit = f"slope {line.slope:.2f}, intercept {line.intercept:.2f}, R² {line.r2:.3f}"
    axis.set_title(f"{line.ood}\n{fit}", fontsize=8)
    columns = line.models, line.acc_id, line.acc_ood, line.er
    return [(line.ood, model, "", *row) for model, *row in zip(*columns, strict=True)]


def styled(groups, shift):
    """Yields (run, its curve, how it is drawn): a colour and one label for all seeds."""
    for i, (name, runs) in enumerate(groups.items()):
        for j, points in enumerate(runs.values()):
            look = {"color": f"C{i}", "marker": "o", "lw": 0.9, "ms": 2.5}
            yield name, curve(points, shift), look | {"label": None if j else name}


def er_panel(axis, lines, groups, shift):
    """ER against ID accuracy, a colour per run; dark: of the testbed's own models.  -> rows"""
    line, curves = lines.get(shift, lines[best_line(lines)]), list(styled(groups, shift))
    least = min(c["id"].min() for _, c, _ in curves)
    id_axis(axis, line, max(0.08, 0.95 * least))
    if shift in lines:
        axis.axhspan(100 * line.er.min(), 100 * line.er.max(), color="0.88", lw=0)
    axis.axhline(0, color="0.4", lw=0.8)
    numbers = []
    for name, c, look in curves:
        axis.plot(c["id"], 100 * c["er"], **look)
        columns = [c[k] for k in ("step", "id", "ood", "er", "er_lo", "er_hi")]
        numbers += [(shift, name, *row) for row in zip(*columns, strict=True)]
    axis.set(ylabel="ER, points")
    axis.set_title(f"ER on {shift if shift in lines else 'all shifts'}", fontsize=8)
    return numbers


def figure(config, lines, groups, shift):
    """Accuracies on logit axes; ER against ID accuracy, and against steps; what the runs get of the
    images that no testbed model gets right.
    """
    header, line = ["shift", "series", "step", "id", "ood", "er", "lo", "hi"], lines[shift]
    path = f"{config.out}/figures/er_study"
    with common.figure(path, header, columns=2, rows=2) as (axes, numbers):
        (line_axis, er_axis), (step_axis, nobody_axis) = axes
        numbers += line_panel(line_axis, line)
        numbers += er_panel(er_axis, lines, groups, shift)
        for _, c, look in styled(groups, shift):
            line_axis.plot(c["id"], c["ood"], **look)
            step_axis.plot(c["step"], 100 * c["er"], **look)
        for _, c, look in styled(groups, "mean"):
            nobody_axis.plot(c["id"], 100 * c["nobody"], **look)
        step_axis.set(xscale="symlog", xlim=(0, None), xlabel="step", ylabel="ER, points")
        step_axis.set_title(f"ER on {shift} by step", fontsize=8)
        step_axis.legend(fontsize=6)
        id_axis(nobody_axis, line)
        nobody_axis.set(ylabel="right, %")
        title = "of the images that no testbed model gets right, all shifts"
        nobody_axis.set_title(title, fontsize=8)


def report(config, measurement, points):
    """Tables, figure and sentences, from the testbed and trajectories alone."""
    groups, lines = by_run(points), measurement.lines
    shift = best_line(lines)
    print_lines(measurement)
    for s in (shift, "mean"):
        print_runs(groups, s)
    figure(config, lines, groups, shift)
    summary(groups, lines, shift)
    return groups


# Published models, from the counts in data/testbeds; lab/er_modern.py says more of them.


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
            er = effective_robustness(*acc, line.slope, line.intercept)
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            ends = testbeds.interval(effective_robustness(*drawn, *redraws.lines[ood]))
            points[model, ood] = Point(model, ood, *acc, er, *ends, line.extrapolates(acc[0]))
    return points


def print_pairs(pairs, points):
    """Table of ER before and after."""
    rows, shifts = [], list(dict.fromkeys(shift for _, shift in points))
    for pair in pairs:
        ends = [[points[pair[end], s] for s in shifts] for end in ("zero-shot", "fine-tuned")]
        cells = [pair["pair"] + " *" * bool(pair["by way of"])]
        cells += [" -> ".join(f"{100 * of_end[0].id:.1f}" for of_end in ends)]
        for a, b in zip(*ends, strict=True):
            after = with_interval(*(100 * x for x in (b.er, b.er_lo, b.er_hi)))
            cells.append(f"{100 * a.er:+.1f} -> {after}" + " e" * b.extrapolated)
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
    measurement = new_measurement(config, bed)
    points = studied_points(measurement)
    print_lines(measurement)
    print_pairs(pairs, points)
    say([describe_pairs(pairs, line, points) for line in measurement.lines.values()])
    return measurement, points


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier, Measurement."""
    config, data = common.setup(Config, argv, __doc__, {})
    if config.quick:
        for name, value in {"lr": "2e-4", "epochs": 2, "epochs_random": 1}.items():
            if name not in config.given:
                setattr(config, name, value)
        print(f"quick: {config.epochs} epochs, {config.epochs_random} from random initialisation")
    clip, zero_shot = common.zero_shot(config, data)
    bits = "digits-quick.npz" if config.quick else "digits.npz"  # 24 or 40 models
    testbed = testbeds.read(common.EMBEDDED / "testbeds" / bits)
    measurement = new_measurement(config, testbed, in_memory(data, clip))
    path, counts = Path(config.out) / "trajectories/testbed.csv", replace(testbed, right={})
    common.write_file(path, functools.partial(testbeds.write, counts))
    return config, data, clip, zero_shot, measurement


prepared = functools.cache(prepare)  # of one process


def work(argv, setting):
    """One trajectory, perhaps in a process of its own."""
    return follow(*prepared(argv), setting)


def main(argv=None):
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
    plan(config)  # refuses what it does not know, before any work
    words = tuple(sys.argv[1:] if argv is None else argv)
    prepared.cache_clear()
    config, *_, measurement = prepared(words)
    runs = common.in_processes(work, words, plan(config), config.jobs, config.device)
    return report(config, measurement, [c for of_run in runs for c in of_run])


if __name__ == "__main__":
    common.run(main)
