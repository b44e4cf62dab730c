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
from scipy.stats import binomtest, linregress

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
    """Line of a testbed for one shift. Studied models never enter: they would pull it to them.
    Raises InputError where one of them is among the others under its name, at any "@" of pixels.
    """
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
    twice = {m.split("@")[0] for m in models} & {m.split("@")[0] for m in testbed.studied}
    if twice:
        cure = "take it out of the baseline or out of the models under study"
        raise common.InputError(f"{min(twice)} is in its own baseline on {ood}; {cure}")
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
            self.checkpoints = common.broadcast([c for path in paths for c in read(path)])
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
    rows = functools.partial(testbeds.write_rows, checkpoints)
    if not common.write_file(path, rows) and not common.rank():
        raise common.InputError(f"{path} cannot be written; the same command continues")


def read(path):
    """[Checkpoint] of a file that `write` wrote. Raises InputError by line and column."""
    return testbeds.read_rows(path, Checkpoint, unique=("run", "step", "shift"))


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
    say(sentences)


def say(sentences):
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
    axis.plot([low, high], [low, high], "--", color="0.7", lw=0.8)
    label = f"testbed, {len(line.models)} models"
    axis.plot(acc_id, acc_ood, "o", ms=3, color="0.6", label=label)
    for ends, style in (((low, high), ":"), ((line.low, line.high), "-")):
        axis.plot(ends, beta(ends, line.slope, line.intercept), style, color="0.4", lw=1.1)
    axis.set_title(caption(line), fontsize=8)
    return list(zip(line.models, acc_id, acc_ood, strict=True))


def styled(groups):
    """Yields (group, checkpoints of a run, how it is drawn): a colour and one label per group."""
    for i, (name, runs) in enumerate(groups.items()):
        look = {"color": f"C{i % 10}", "ls": "-" if i < 10 else ":", "marker": "o"}
        for j, checkpoints in enumerate(runs.values()):
            label = {"label": name if j == 0 else None}
            yield name, checkpoints, look | label | {"lw": 0.9, "ms": 2.5}


def shown(shares):
    """Accuracies near 0 and 1 are drawn at the edge of a logit axis."""
    return np.clip(shares, 0.05, 0.995)


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
        axis.plot(shown(c["id"]), 100 * c["er"], **look)
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
            line_axis.plot(shown(c["id"]), shown(c["ood"]), **look)
            step_axis.plot(np.maximum(c["step"], 0.5), 100 * c["er"], **look)
            nobody_axis.plot(shown(c["id"]), 100 * nobody, **look)
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


# Published models, from the counts in data/testbeds; lab/er_modern.py says more of them.


@dataclass(frozen=True)
class Point:
    """A published model beside a testbed, on one shift; shares."""

    model: str
    shift: str
    id: float
    ood: float
    er: float
    low: float  # 95 %: models of the testbed and images redrawn, the model's own as binomials
    high: float
    extrapolated: bool


def studied_points(testbed, lines, redraws):
    """{(model, shift): Point} of the models beside a baseline, where both accuracies are known."""
    points = {}
    for model, (ood, line) in itertools.product(testbed.studied, lines.items()):
        sets, i = (line.id, ood), testbed.row(model)
        k, n = [testbed.k[s][i] for s in sets], [testbed.n[s] for s in sets]
        if not np.isnan(k).any():
            acc = k[0] / n[0], k[1] / n[1]
            er = effective_robustness(*acc, line.slope, line.intercept)
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            spread = testbeds.interval(effective_robustness(*drawn, *redraws.lines[ood]))
            outside = line.extrapolates(acc[0])
            points[model, ood] = Point(model, ood, *acc, er, *spread, outside)
    return points


def beside(config, testbed):
    """Print a testbed's lines.  -> {shift: Line}, the studied_points beside them"""
    redraws = testbeds.redraw(testbed, config.draws)
    lines = {ood: baseline(testbed, ood) for ood in testbed.id_of}
    print_lines(testbed, lines, redraws)
    return lines, studied_points(testbed, lines, redraws)


def print_pairs(pairs, points, own_points):
    """Table of ER before and after; own_points: those whose ID set has the shift's classes only."""
    rows, shifts = [], list(dict.fromkeys(shift for _, shift in points))
    for pair in pairs:
        ends = [[points[pair[end], s] for s in shifts] for end in ("zero-shot", "fine-tuned")]
        cells = [pair["pair"] + " *" * bool(pair["by way of"])]
        cells += [" -> ".join(f"{100 * of_end[0].id:.1f}" for of_end in ends)]
        for a, b in zip(*ends, strict=True):
            after = with_interval(*(100 * x for x in (b.er, b.low, b.high)))
            cells.append(f"{100 * a.er:+.1f} -> {after}" + " e" * b.extrapolated)
        own = [p for (model, _), p in own_points.items() if model == pair["fine-tuned"]]
        rows.append([*cells, *(f"{100 * p.er:+.1f}" for p in own)])
    header = ["pair", "ID", *shifts, *dict.fromkeys(f"{s} *" for _, s in own_points)]
    title = (
        "ER in points, zero-shot -> fine-tuned on ImageNet [95 %]; e: extrapolated (E3); after a"
        " name, *: by way of ImageNet-12k; after a shift, *: ID on its 200 classes, fine-tuned"
    )
    print("\n" + common.table(header, rows, title))


def describe_pairs(pairs, testbed, line, points):
    """On one shift: does ER vanish?"""
    direct, shift = [p for p in pairs if not p["by way of"]], line.ood
    own = 100 * effective_robustness(*accuracies(testbed, line), line.slope, line.intercept)
    ends = ("zero-shot", "fine-tuned")
    before, after = ([points[pair[end], shift] for pair in direct] for end in ends)
    first, last = (100 * np.mean([p.er for p in group]) for group in (before, after))
    gone = "which is within" if abs(last) < 200 * line.residual else "which is beyond"
    zero = sum(p.low <= 0 <= p.high for p in after)
    above = sum(100 * p.er > own.max() for p in after)
    return (
        f"{shift}: ER over {len(direct)} pairs is {first:+.1f} before fine-tuning and {last:+.1f}"
        f" after, {gone} two standard deviations ({200 * line.residual:.1f}) of the line's own"
        f" models. After fine-tuning {zero} of the {len(direct)} intervals include 0, {above} of"
        f" the ER are larger than that of any of the {len(own)} models ({own.max():+.1f}), and"
        f" {sum(p.extrapolated for p in after)} are extrapolated. The line's R2 is {line.r2:.3f}."
    )


def figure_modern(config, testbed, lines, points, pairs, series=()):
    """ER against ID accuracy, a panel per shift: baseline, pairs, and what else `series` has.

    series: [(label, mark, models)]
    """
    header = ["shift", "series", "model", "id", "ood", "er", "lo", "hi"]
    direct = [pair for pair in pairs if not pair["by way of"]]
    series = [*series, ("CLIP and its like, zero-shot", "C0o", [p["zero-shot"] for p in direct])]
    series += [("the same, fine-tuned on ImageNet", "C3o", [p["fine-tuned"] for p in direct])]
    with common.figure(f"{config.out}/figures/er_modern", header, 2, 2) as (axes, numbers):
        for axis, (shift, line) in zip(axes.flat, lines.items(), strict=True):
            logit_axis(axis, "x", 0.57, 0.905, "accuracy on ImageNet, %")
            acc_id, acc_ood = accuracies(testbed, line)
            er = effective_robustness(acc_id, acc_ood, line.slope, line.intercept)
            label = f"{len(er)} models trained on ImageNet-1k alone"
            axis.plot(acc_id, 100 * er, ".", ms=2, color="0.7", label=label)
            axis.axhline(0, color="0.4", lw=0.8)
            rows = zip(line.models, acc_id, acc_ood, er, strict=True)
            numbers += [(shift, label, *row) for row in rows]
            for pair in direct:
                a, b = points[pair["zero-shot"], shift], points[pair["fine-tuned"], shift]
                axis.plot([a.id, b.id], [100 * a.er, 100 * b.er], color="0.8", lw=0.7, zorder=1)
            for label, mark, models in series:
                own = [points[model, shift] for model in models]
                axis.plot([p.id for p in own], [100 * p.er for p in own], mark, ms=3.5, label=label)
                rows = [(p.model, p.id, p.ood, p.er, p.low, p.high) for p in own]
                numbers += [(shift, label, *row) for row in rows]
            axis.set(ylabel="ER, points")
            axis.set_title(f"{shift}: R² of the line {line.r2:.3f}", fontsize=8)
        handles = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7)


def modern(config, series=()):
    """Real models before and after fine-tuning.  -> Testbed, {shift: Line}, studied_points

    Zero-shot models are known on all of ImageNet's validation set; there every line stands. For
    fine-tuned models the line of a shift's own classes, as in the 2020 testbed, is beside it.
    """
    columns = dict.fromkeys(("pair", "zero-shot", "fine-tuned", "by way of", "match"), str)
    path = testbeds.FOLDER / "modern_pairs.csv"
    pairs = [row for _, row in testbeds.read_csv(path, columns, unique=["fine-tuned"])]
    bed = testbeds.read("modern")
    own = {ood: at_home for ood, at_home in bed.id_of.items() if at_home != testbeds.HOME}
    _, own_points = beside(config, replace(bed, name="modern, ID on the same classes", id_of=own))
    bed = replace(bed, id_of=dict.fromkeys(bed.id_of, testbeds.HOME))
    lines, points = beside(config, bed)
    print_pairs(pairs, points, own_points)
    figure_modern(config, bed, lines, points, pairs, series)
    say([describe_pairs(pairs, bed, line, points) for line in lines.values()])
    return bed, lines, points


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
    seeds = range(config.seed, config.seed + config.seeds)
    settings = [replace(s, seed=seed) for seed in seeds for s in plan(config)]
    settings.sort(key=lambda s: -s.epochs)  # longest first: none runs alone at the end
    runs = common.in_processes(work, words, settings, config.jobs, config.device)
    checkpoints = [c for of_run in runs for c in of_run]
    bed, lines, redraws = measurement.testbed, measurement.lines, measurement.redraws
    return report(config, bed, lines, checkpoints, redraws)


if __name__ == "__main__":
    common.run(main)
