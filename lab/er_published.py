"""Tables and figures beside er_study.py: testbeds of published models, models known image by image,
and trajectories from their files.

    python lab/er_published.py all       # CIFAR-10, ImageNet, the 2020 testbed: lines, ER, figures
    python lab/er_published.py FILE.npz  # a per-example table: dominance, images nobody gets right
    python lab/er_published.py FILE.csv  # counts, or the public 2020 table (robustness_top1s.csv)
    python lab/er_published.py digits    # the same of the digits, with the runs in runs/er_study
    python lab/er_published.py plot "runs/er_settings/cifar10/trajectories/*.csv"  # a report again

Takes the flags of er_study.py. `digits` reads the trajectories of an `er_study.py` that has run, in
--out, and draws what its own figure leaves out: both accuracies by step; what the runs get of the
images that no testbed model gets right, beside what each testbed model gets of those that no other
gets; and the dominance probability of pairs of models (of different accuracy, the share of images
on which the worse one is right and the better one wrong), alone and with the zero-shot model.
`plot` needs neither model nor images, and refuses files that contradict their testbed, which lies
beside them.
"""

import glob
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402

SCRATCH = "_epochs"  # in the names of the 2020 testbed's checkpoints of trainings from scratch
GROUPS = {  # studied models of the 2020 testbed, by name
    "CLIP, zero-shot": "clip_zeroshot",
    "BiT-M, mapped zero-shot": "nonfinetuned",
    "BiT-M, fine-tuned": "ILSVRC2012",
    "checkpoints from scratch": SCRATCH,
}
BROKEN = "fv_16k"  # 28.3 % on ImageNet val, 2.5 to 3.2 % on every V2 set: left out


# --- files ----------------------------------------------------------------------------------------


def read(name):
    """A testbed by name or file. The public files that the embedded ones came from are read, too:
    the 2020 table, in percent, and per-example tables, whose one broken model is left out.
    """
    if Path(name).suffix == ".csv" and Path(name).is_file():
        if "role" not in testbeds.lines_of(name)[0][1]:
            return read_percent(name)
    testbed = testbeds.read(name)
    if testbed.right and BROKEN in testbed.models:
        print(f"{name}: {BROKEN} is left out: its public ImageNetV2 predictions are not its own")
        kept = [i for i, model in enumerate(testbed.models) if model != BROKEN]
        right, models = {s: r[kept] for s, r in testbed.right.items()}, np.array(testbed.models)
        known = models[kept].tolist(), right, testbed.id_of, testbed.studied
        return testbeds.known_by_image(testbed.name, *known)
    return testbed


def read_percent(path):
    """The 2020 table: percent per setting. Its models and their roles are those of imagenet2020."""
    known = testbeds.read("imagenet2020")
    columns = {"model": str} | dict.fromkeys(known.n, testbeds.up_to(100, testbeds.number))
    rows = {row["model"]: row for _, row in testbeds.read_csv(path, columns, unique=["model"])}
    k = {}
    for s, n in known.n.items():
        found = np.array([rows[m][s] for m in known.models])
        if np.nanmax(found) <= 1:
            raise common.InputError(f"{path}, column {s}: nothing is above 1 %; shares of 1?")
        k[s] = np.round(found * n / 100)
    return replace(known, name=Path(path).stem, k=k)


def saved(pattern):
    """Testbed, lines and checkpoints of trajectory files; the testbed's file lies beside them."""
    found = [Path(p) for p in sorted(glob.glob(os.path.expanduser(pattern)))]
    paths = [p for p in found if p.name != "testbed.csv"]
    beds = [p for p in (path.parent / "testbed.csv" for path in paths) if p.is_file()]
    if not beds:
        raise common.InputError(f"{pattern}: no trajectories, or no testbed.csv by them")
    testbed = testbeds.read(beds[0])
    lines = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
    return testbed, lines, checked(paths, lines)


def checked(paths, lines):
    """[Checkpoint] of trajectory files that were measured with `lines` {shift: Line}. Raises
    InputError where a row contradicts the lines, and where an evaluation is there twice.
    """
    found = {}
    for path in paths:
        for number, c in enumerate(er_study.read(path), 2):
            problem = contradiction(c, lines)
            if (c.run, c.step, c.shift) in found:
                problem = f"step {c.step} of {c.run} is in another file, too"
            if problem:
                raise common.InputError(f"{path}, line {number}: {problem}")
            found[c.run, c.step, c.shift] = c
    return list(found.values())


def contradiction(c, lines):
    """What is wrong with the numbers of a Checkpoint, in words; "" if nothing is."""
    if c.init not in er_study.KINDS:
        return f"init {c.init!r}; expected {', '.join(er_study.KINDS)}"
    if c.shift not in (*lines, "mean"):
        return f"the testbed has no shift {c.shift!r}; it has {', '.join(lines)}"
    for part in ("id", "val", "ood", "nobody"):
        k, n = getattr(c, f"k_{part}") or 0, getattr(c, f"n_{part}") or 0
        if k > n:
            return f"k_{part} {k} of n_{part} {n}"
    if c.shift == "mean":
        return ""
    expected = er_study.beta(c.k_id / c.n_id, lines[c.shift].slope, lines[c.shift].intercept)
    er = c.k_ood / c.n_ood - expected
    if abs(expected - c.beta) < 1e-6 and abs(er - c.er) < 1e-6:
        return ""
    return (
        f"beta {c.beta} and er {c.er}, but the testbed's line gives {expected:.6f} and {er:.6f}:"
        " it was measured with another testbed"
    )


# --- by image -------------------------------------------------------------------------------------


def dominance(right):
    """P[the worse model is right and the better one wrong], for every pair of models of different
    accuracy on these images.  bool [M, N] -> accuracy gap [P], probability [P]
    """
    right = right[np.argsort(right.sum(1), kind="stable")].astype(np.float32)
    hits = right.sum(1, dtype=np.float64)
    only_low = hits[:, None] - (right @ right.T).astype(np.float64)  # row right, column wrong
    low, high = np.nonzero(hits[:, None] < hits)
    return (hits[high] - hits[low]) / right.shape[1], only_low[low, high] / right.shape[1]


def dominance_with(right, other):
    """The same of pairs of one of the models and another one.  bool [M, N], bool [N]"""
    pairs = [dominance(np.stack([row, other])) for row in right]
    return np.concatenate([gap for gap, _ in pairs]), np.concatenate([p for _, p in pairs])


def left_out(right, i):
    """How many a testbed model gets right of the images that no other does, and how many these are.
    bool [M, N] -> k, n
    """
    return er_study.share_right(right[i], er_study.nobody_right(np.delete(right, i, 0)))


def print_by_image(testbed):
    """Table: nobody right, everybody right, dominance, and what each model gets right of the images
    that no other does, which is the scale for any such share.
    """
    rows = []
    for name, right in testbed.right.items():
        nobody, (_, p) = er_study.nobody_right(right), dominance(right)
        counts = [left_out(right, i) for i in range(len(right))]
        alone = [100 * k / max(n, 1) for k, n in counts]
        cells = [f"{right.shape[1]:,}", f"{nobody.sum():,}", f"{right.all(0).sum():,}"]
        cells += [f"{p.mean():.4f}", f"{p.max():.4f}", len(p), f"{np.median(alone):.2f}"]
        rows.append([name, *cells, f"{max(alone):.2f}"])
    header = ["set", "images", "nobody right", "all right", "dominance, mean", "max", "pairs"]
    header += ["left out: median %", "max %"]
    title = "by image; left out: what a model gets right of the images that no other gets right"
    print("\n" + common.table(header, rows, title))


# --- figures --------------------------------------------------------------------------------------


def figure_published(config, testbed, lines, points):
    """A panel per shift: testbed, line, studied models by group. points: [er_study.Point]"""
    path = f"{config.out}/figures/er_{common.slug(testbed.name).replace('-', '_')}"
    header = ["shift", "series", "model", "id", "ood"]
    with common.figure(path, header, columns=len(lines)) as ((axes,), numbers):
        for axis, (ood, line) in zip(axes, lines.items(), strict=True):
            acc = er_study.accuracies(testbed, line)
            own = [p for p in points if p.shift == ood]
            shown = np.concatenate([*acc, *((p.id, p.ood) for p in own)])
            low, high = max(0.9 * shown.min(), 1e-3), 1 - 0.5 * (1 - shown.max())
            drawn = er_study.line_panel(axis, line, *acc, low, high)
            numbers += [(ood, "testbed", *row) for row in drawn]
            for name, pattern in GROUPS.items():
                group = [p for p in own if pattern in p.model]
                if group:
                    mark = "." if pattern == SCRATCH else "D"
                    axis.plot([p.id for p in group], [p.ood for p in group], mark, ms=4, label=name)
                numbers += [(ood, name, p.model, p.id, p.ood) for p in group]
        axes[0].legend(fontsize=7)


def figure_shifts(config, testbed, lines, groups, shifts, name):
    """ER against ID accuracy, a panel per shift."""
    columns = min(3, len(shifts))
    header = ["shift", "run", "step", "id", "ood", "er", "lo", "hi"]
    path, rows = f"{config.out}/figures/{name}", -(-len(shifts) // columns)
    with common.figure(path, header, columns, rows) as (axes, numbers):
        for axis, shift in zip(axes.flat, shifts, strict=False):
            numbers += er_study.er_panel(axis, testbed, lines, groups, shift)
        for axis in axes.flat[len(shifts) :]:
            axis.set_visible(False)
        axes.flat[0].legend(fontsize=6)


def figure_by_image(config, testbed, line, groups, zero_shot):
    """Both accuracies by step; images that no testbed model gets right; dominance on ID.

    zero_shot: {set: bool [N]}, which images the zero-shot model gets right.
    """
    header, path = ["panel", "series", "x", "y"], f"{config.out}/figures/er_by_image"
    with common.figure(path, header, columns=3) as ((axes,), numbers):
        both_axis, nobody_axis, pair_axis = axes
        for name, checkpoints, look in er_study.styled(groups):
            c = er_study.curve(checkpoints, line.ood)
            nobody = er_study.curve(checkpoints, "mean")["nobody"]
            steps = np.maximum(c["step"], 0.5)
            plain = look | {"marker": ""}
            both_axis.plot(steps, 100 * c["id"], **plain)
            both_axis.plot(steps, 100 * c["ood"], **(plain | {"ls": "--", "label": None}))
            nobody_axis.plot(er_study.shown(c["id"]), 100 * nobody, **look)
            numbers += [("nobody", name, *xy) for xy in zip(c["id"], nobody, strict=True)]
        title = f"ID (solid) and {line.ood} (dashed) by step"
        both_axis.set(xscale="log", xlabel="step (0 drawn at 1/2)", ylabel="accuracy, %")
        both_axis.set_title(title, fontsize=8)
        both_axis.legend(fontsize=6)
        numbers += nobody_panel(nobody_axis, testbed, line)
        numbers += pair_panel(pair_axis, testbed.right[line.id], zero_shot[line.id])
        pair_axis.set_title(f"dominance probability on ID ({line.id})", fontsize=8)


def nobody_panel(axis, testbed, line):
    """For scale, what each testbed model gets right of the images that no other gets.  -> rows"""
    er_study.id_axis(axis, line)
    numbers = []
    for i, acc_id in enumerate(testbed.accuracy(line.id)):
        found = [left_out(testbed.right[ood], i) for ood in testbed.id_of]
        k, n = sum(k for k, _ in found), sum(n for _, n in found)
        numbers.append(("nobody", testbed.models[i], acc_id, k / max(n, 1)))
        axis.plot(er_study.shown(acc_id), 100 * k / max(n, 1), "o", ms=3, color="0.6")
    axis.set(ylabel="right, %")
    text = "grey: testbed models, of what no other gets"
    axis.set_title(
        f"of the images that no testbed model gets right, all shifts\n{text}", fontsize=8
    )
    return numbers


def pair_panel(axis, right, zero_shot):
    """Dominance against the gap in accuracy, of testbed pairs and pairs with zero-shot.  -> rows"""
    numbers = []
    both = {"testbed": dominance(right), "zero-shot": dominance_with(right, zero_shot)}
    for (name, (gap, p)), colour in zip(both.items(), ("0.6", "C3"), strict=True):
        label = f"{name}: {len(p)} pairs, mean {p.mean():.3f}"
        axis.plot(100 * gap, p, "o", ms=2.5, color=colour, label=label)
        numbers += [("pair", name, *xy) for xy in zip(gap, p, strict=True)]
    axis.set(xlabel="gap in accuracy, points", ylabel="P[lower right, higher wrong]")
    axis.legend(fontsize=6)
    return numbers


# --- main -----------------------------------------------------------------------------------------


def digits(argv):
    """Tables and figures of the digits' testbed and of the trajectories in --out."""
    config, _, _, zero_shot, measurement = er_study.prepare(argv)
    testbed, lines = measurement.testbed, measurement.lines
    print_by_image(testbed)
    _, _, checkpoints = saved(f"{config.out}/trajectories/*.csv")
    groups, shift = er_study.by_run(checkpoints), er_study.best_line(lines)
    right = er_study.score(measurement, zero_shot)
    figure_by_image(config, testbed, lines[shift], groups, right)
    figure_shifts(config, testbed, lines, groups, list(lines), "er_shifts")
    return groups


def print_studied(points, shifts):
    """ER of each studied model; checkpoints from scratch, which are many, as a range."""
    rows = {}
    for p in points:
        if SCRATCH not in p.model:
            cells = rows.setdefault(p.model, [p.model, f"{100 * p.id:.1f}"])
            spread = f"[{100 * p.low:+.2f}, {100 * p.high:+.2f}]"
            cells.append(f"{100 * p.er:+.2f} {spread}{' *' * p.extrapolated}")
    title = "effective robustness in points [95 %]; * ID accuracy outside the testbed's range (E3)"
    print("\n" + common.table(["model", "ID", *shifts], rows.values(), title))
    for s in shifts:
        er = [100 * p.er for p in points if p.shift == s and SCRATCH in p.model]
        if er:
            spread = f"{min(er):+.2f} to {max(er):+.2f}, mean {np.mean(er):+.2f}"
            print(f"{s}: {len(er)} checkpoints of trainings from scratch: ER {spread}")


def published(config, name):
    """A testbed's lines, the ER of the models beside it, a figure.  -> [er_study.Point]"""
    testbed = read(name)
    draws = min(config.draws, 200) if testbed.right else config.draws
    lines, points = er_study.beside(replace(config, draws=draws), testbed)
    points = list(points.values())
    if points:
        print_studied(points, list(lines))
    if testbed.right:
        print_by_image(testbed)
    figure_published(config, testbed, lines, points)
    return points


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "all"
    if name == "digits":
        return digits(argv)
    if name == "plot":
        pattern = argv.pop(0) if argv else ""
        return er_study.report(common.parse(er_study.Config, argv, __doc__), *saved(pattern))
    config = common.parse(er_study.Config, argv, __doc__)
    every = ("cifar10", "imagenet", "imagenet2020")
    return [p for each in (every if name == "all" else [name]) for p in published(config, each)]


if __name__ == "__main__":
    common.run(main)
