"""The Evolution of Out-of-Distribution Robustness Throughout Fine-Tuning.
Andreassen, Bahri, Neyshabur, Roelofs; TMLR 2022; arXiv 2106.15831.

Over many models trained from scratch, accuracy under shift (OOD) is a function of accuracy at home
(ID): a line, once both are moved to logits. What a model has above that line is its effective
robustness (ER). Pre-trained models have it in the middle of fine-tuning and lose it as fine-tuning
converges: this script draws the line, then follows ER through fine-tuning.

    Sec. 3     effective robustness rho        effective_robustness   (beta: beta)
    App. A     logit transform and fits        scipy's logit, fit
    abstract   what no testbed model gets      nobody_right, share_right
    (ours)     intervals, dominance            clopper_pearson, redraw, dominance

    python er_study.py --testbed all  # published models, real ER, no images: 8 seconds

Differs: the paper's text leaves much open to us, so what it does not settle is ours, by these IDs:
E1  accuracies of 0 or 1 leave the fit, and the print says how many; beta(0) = 0, beta(1) = 1.
E2  the interval of ER redraws testbed models and test images; images are shared by all models.
E3  an ER at an ID accuracy that the testbed does not span is marked: the line is extrapolated.
"""

import re
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import beta as beta_distribution
from scipy.stats import linregress

import common
from common import arg

GROUPS = {  # studied models of the 2020 testbed, by name
    "CLIP, zero-shot": "clip_zeroshot",
    "BiT-M, mapped zero-shot": "nonfinetuned",
    "BiT-M, fine-tuned": "ILSVRC2012",
    "checkpoints from scratch": "_epochs",
}


@dataclass
class Config:
    testbed: str = arg("", "published models instead of a study: all, one of them, .csv, .npz")
    draws: int = arg(1000, "of the bootstrap; ours")
    seed: int = arg(0, "of the bootstrap")
    out: str = arg("runs/er_study", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def fit(acc_id, acc_ood):
    """App. A: linregress(logit(Acc_ID), logit(Acc_OOD)).  [M], [M] -> slope, intercept, R2, used

    used: bool [M], the pairs with both logits finite (E1). Accuracies are never clipped.
    """
    x, y = logit(acc_id), logit(acc_ood)
    used = np.isfinite(x) & np.isfinite(y)
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


def clopper_pearson(k, n, level=0.95):
    """Exact interval of a share of k in n.  [...] -> [...], [...]"""
    k, tail = np.asarray(k, float), (1 - level) / 2
    low = np.where(k > 0, beta_distribution.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(k < n, beta_distribution.ppf(1 - tail, k + 1, np.maximum(n - k, 1)), 1.0)
    return low, high


def dominance(right):
    """P[the worse model is right and the better one wrong], for every pair of models of different
    accuracy on these images.  bool [M, N] -> accuracy gap [P], probability [P]
    """
    right = right[np.argsort(right.sum(1), kind="stable")].astype(np.float32)
    hits = right.sum(1, dtype=np.float64)
    only_low = hits[:, None] - (right @ right.T).astype(np.float64)  # row right, column wrong
    low, high = np.nonzero(hits[:, None] < hits)
    return (hits[high] - hits[low]) / right.shape[1], only_low[low, high] / right.shape[1]


def nobody_right(right):
    """Images that no testbed model gets right.  bool [M, N] -> bool [N]"""
    return ~right.any(0)


def share_right(right, nobody):
    """How many of them a model gets right, of how many.  bool [N], bool [N] -> k, n"""
    return int((right & nobody).sum()), int(nobody.sum())


def lines(x, y):
    """Slope and intercept of `fit` for each row, non-finite pairs left out.  [R, M] -> [R], [R]"""
    used = np.isfinite(x) & np.isfinite(y)
    x, y, n = np.where(used, x, 0), np.where(used, y, 0), used.sum(1)
    mean_x, mean_y = x.sum(1) / n, y.sum(1) / n
    dx = np.where(used, x - mean_x[:, None], 0)
    slope = (dx * y).sum(1) / (dx * dx).sum(1)
    return slope, mean_y - slope * mean_x


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
    return float(er), not line.low <= acc_id <= line.high


@dataclass
class Redraws:
    """R draws of testbed models and test images: lines, and how often each image was drawn."""

    lines: dict  # shift -> slope [R], intercept [R]
    weights: dict  # set -> [R, N]; empty if only counts are known
    rng: np.random.Generator

    def accuracy(self, name, right=None, k=None, n=None):
        """[R], of a model that is known by image (drawn with the testbed's), or by counts."""
        if right is None:
            return self.rng.binomial(n, k / n, len(next(iter(self.lines.values()))[0])) / n
        return self.weights[name] @ right.astype(np.float32) / len(right)


def redraw(testbed, draws, seed=0):
    """Redraws of a testbed (E2). Known by counts only: images as independent binomials."""
    rng = np.random.default_rng(seed)
    rows = [i for i, m in enumerate(testbed.models) if m not in testbed.studied]
    who = np.arange(draws)[:, None], rng.integers(len(rows), size=(draws, len(rows)))
    accuracies, weights = {}, {}
    for name, n in testbed.n.items():
        if testbed.right:
            w = rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float32)
            accuracies[name] = (w @ testbed.right[name][rows].T.astype(np.float32) / n)[who]
            weights[name] = w
        else:
            k = testbed.k[name][rows]
            drawn = rng.binomial(n, np.nan_to_num(k) / n, (draws, len(rows))) / n
            accuracies[name] = np.where(np.isnan(k), np.nan, drawn)[who]
    pairs = {ood: (accuracies[i], accuracies[ood]) for ood, i in testbed.id_of.items()}
    return Redraws({s: lines(logit(a), logit(b)) for s, (a, b) in pairs.items()}, weights, rng)


def interval(draws):
    return tuple(float(x) for x in np.quantile(draws, [0.025, 0.975]))


# --- evaluate -------------------------------------------------------------------------------------


def print_lines(testbed, found, redraws):
    """Table of the baselines; the interval is of the slope, over models and images."""
    rows = []
    for ood, line in found.items():
        low, high = interval(redraws.lines[ood][0])
        numbers = [f"{line.slope:.4f} [{low:.3f}, {high:.3f}]", f"{line.intercept:.4f}"]
        numbers += [f"{line.r2:.4f}", f"{100 * line.residual:.2f}"]
        numbers += [f"{100 * line.low:.1f}-{100 * line.high:.1f}"]
        rows.append([ood, line.id, len(line.models), *numbers])
    header = ["shift", "ID", "models", "slope [95 %]", "intercept", "R2", "residual SD", "ID range"]
    title = f"testbed {testbed.name}: logit(OOD) = slope logit(ID) + intercept; points"
    print("\n" + common.table(header, rows, title))


def studied_points(testbed, found, redraws):
    """[(model, shift, ID, OOD, ER, low, high, extrapolated)] of the models beside a baseline."""
    points = []
    for model in testbed.studied:
        i = testbed.row(model)
        for ood, line in found.items():
            sets = line.id, ood
            k, n = [testbed.k[s][i] for s in sets], [testbed.n[s] for s in sets]
            if np.isnan(k).any():
                continue
            acc = k[0] / n[0], k[1] / n[1]
            er, outside = above(line, model, *sets, n, *acc)
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            spread = interval(effective_robustness(*drawn, *redraws.lines[ood]))
            points.append((model, ood, *acc, er, *spread, outside))
    return points


def print_studied(points, shifts):
    """ER of each studied model; checkpoints from scratch, which are many, as a range."""
    rows, many = [], GROUPS["checkpoints from scratch"]
    say = "{:+.2f} [{:+.2f}, {:+.2f}]{}".format
    for model in dict.fromkeys(p[0] for p in points if many not in p[0]):
        own = {p[1]: p for p in points if p[0] == model}
        cells = [say(*(100 * x for x in own[s][4:7]), " *" * own[s][7]) for s in shifts if s in own]
        rows.append([model, f"{100 * next(iter(own.values()))[2]:.1f}", *cells])
    title = "effective robustness in points [95 %]; * ID accuracy outside the testbed's range (E3)"
    print("\n" + common.table(["model", "ID", *shifts], rows, title))
    for s in shifts:
        er = [100 * p[4] for p in points if p[1] == s and many in p[0]]
        if er:
            spread = f"{min(er):+.2f} to {max(er):+.2f}, mean {np.mean(er):+.2f}"
            print(f"{s}: {len(er)} checkpoints of trainings from scratch: ER {spread}")


def by_image(testbed):
    """Tables that need per-example correctness: nobody right, everybody right, dominance, and what
    each model gets right of the images that no other does (the scale for any such share).
    """
    rows = []
    for name, right in testbed.right.items():
        nobody, (_, p) = nobody_right(right), dominance(right)
        alone = []
        for i in range(len(right)):
            k, n = share_right(right[i], nobody_right(np.delete(right, i, 0)))
            alone.append(100 * k / max(n, 1))
        counts = [f"{right.shape[1]:,}", f"{nobody.sum():,}", f"{right.all(0).sum():,}"]
        shares = [f"{p.mean():.4f}", f"{p.max():.4f}", len(p), f"{np.median(alone):.2f}"]
        rows.append([name, *counts, *shares, f"{max(alone):.2f}"])
    header = ["set", "images", "nobody right", "all right", "dominance, mean", "max", "pairs"]
    header += ["left out: median %", "max %"]
    title = "by image; left out: what a model gets right of the images that no other gets right"
    print("\n" + common.table(header, rows, title))


def logit_axes(axis, low=0.01, high=0.99):
    """Both axes in logits, ticks at round percentages; y = x dashed."""
    ticks = [t for t in (1, 2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99) if low <= t / 100 <= high]
    at, ends = logit(np.array(ticks) / 100), logit(np.array([low, high]))
    axis.set(xticks=at, xticklabels=ticks, yticks=at, yticklabels=ticks, xlim=ends, ylim=ends)
    axis.plot(ends, ends, "--", color="0.7", lw=0.8)
    axis.set(xlabel="ID accuracy, %", ylabel="OOD accuracy, %")


def draw_line(axis, line, acc_id, acc_ood):
    """A testbed's points and line; dotted where extrapolated. Accuracies 0, 1 are drawn inside."""
    x, y = (logit(np.clip(a, 1e-3, 1 - 1e-3)) for a in (acc_id, acc_ood))
    axis.plot(x, y, "o", ms=3, color="0.6", label=f"testbed, {len(line.models)} models")
    inside, ends = logit(np.array([line.low, line.high])), np.array(axis.get_xlim())
    axis.plot(ends, line.slope * ends + line.intercept, ":", color="0.4", lw=1)
    axis.plot(inside, line.slope * inside + line.intercept, color="0.4", lw=1.2)
    axis.set_title(
        f"{line.ood}\nslope {line.slope:.2f}, intercept {line.intercept:.2f}, R² {line.r2:.3f}",
        fontsize=8,
    )


def figure_published(config, testbed, found, points):
    """A panel per shift: testbed, line, studied models by group."""
    fig, (axes,) = common.new_figure(columns=len(found))
    numbers = []
    for axis, (ood, line) in zip(axes, found.items(), strict=True):
        own = [p for p in points if p[1] == ood]
        i = [testbed.row(m) for m in line.models]
        acc = testbed.accuracy(line.id)[i], testbed.accuracy(ood)[i]
        shown = np.concatenate([*acc, *([p[2:4] for p in own] or [[]])], axis=None)
        logit_axes(axis, max(0.9 * shown.min(), 1e-3), 1 - 0.5 * (1 - shown.max()))
        draw_line(axis, line, *acc)
        numbers += [(ood, "testbed", *row) for row in zip(line.models, *acc, strict=True)]
        for name, pattern in GROUPS.items():
            group = [p for p in own if pattern in p[0]]
            if group:
                xy = logit(np.array([p[2:4] for p in group]).T)
                axis.plot(*xy, "." if pattern == "_epochs" else "D", ms=4, label=name)
            numbers += [(ood, name, p[0], *p[2:4]) for p in group]
    axes[0].legend(fontsize=7)
    path = f"{config.out}/figures/er_{re.sub('[^a-z0-9]+', '_', testbed.name.lower())}"
    common.save_figure(fig, path, ["shift", "series", "model", "id", "ood"], numbers)


def published(config):
    """Real models, no images: baselines, ER of the studied models, tables by image. -> points"""
    from data import testbeds

    names, points = testbeds.EMBEDDED if config.testbed == "all" else [config.testbed], []
    for testbed in map(testbeds.read, names):
        redraws = redraw(testbed, min(config.draws, 200) if testbed.right else config.draws)
        found = {ood: baseline(testbed, ood) for ood in testbed.id_of}
        print_lines(testbed, found, redraws)
        own = studied_points(testbed, found, redraws)
        if own:
            print_studied(own, list(found))
        if testbed.right:
            by_image(testbed)
        figure_published(config, testbed, found, own)
        points += own
    return points


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    config.testbed = config.testbed or "all"
    return published(config)


if __name__ == "__main__":
    common.run(main)
