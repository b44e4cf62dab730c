"""Tables and figures beside er_study.py: testbeds of published models, models known image by image,
and trajectories from their files.

    python lab/er_published.py all       # CIFAR-10, ImageNet, the 2020 testbed: lines and ER
    python lab/er_published.py FILE      # the same of a testbed in a file (data/testbeds.py)
    python lab/er_published.py digits    # figures of the digits, with the runs in runs/er_study
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402

SCRATCH = "_epochs"  # in the names of the 2020 testbed's checkpoints of trainings from scratch


# --- trajectories from their files ----------------------------------------------------------------


def saved(pattern, read=er_study.read):
    """Measurement and [er_study.Point] of trajectory files; the testbed's file lies beside them.
    Raises InputError where a row contradicts the testbed's lines, or is there twice.
    """
    found = [Path(p) for p in sorted(glob.glob(os.path.expanduser(pattern)))]
    paths = [p for p in found if p.name != "testbed.csv"]
    beds = [p for p in (path.parent / "testbed.csv" for path in paths) if p.is_file()]
    if not beds:
        raise common.InputError(f"{pattern}: no trajectories, or no testbed.csv by them")
    measurement, points = er_study.Measurement(testbeds.read(beds[0]), draws=0), {}
    for path in paths:
        for number, p in enumerate(read(path), 2):
            key, problem = (p.run, p.seed, p.step, p.shift), contradiction(p, measurement.lines)
            if key in points:
                problem = "is there twice"
            if problem:
                where = f"{path}, line {number}: step {p.step} of {p.run}, seed {p.seed}"
                raise common.InputError(f"{where}, on {p.shift} {problem}")
            points[key] = p
    return measurement, list(points.values())


def contradiction(p, lines):
    """What is wrong with a Point beside the lines {shift: Line}, in words; "" if nothing is."""
    if p.init not in er_study.KINDS:
        return f"has init {p.init!r}; expected {', '.join(er_study.KINDS)}"
    if p.shift == "mean":
        return ""
    if p.shift not in lines:
        return f"has no line; the testbed has {', '.join(lines)}"
    er = lines[p.shift].er_of(p.id, p.ood)
    if abs(er - p.er) < 1e-6:
        return ""
    return f"has er {p.er}, but the line gives {er:.6f}: it was measured with another testbed"


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


def figure_shifts(config, lines, points, shifts, name):
    """ER against ID accuracy, a panel per shift."""
    columns = min(3, len(shifts))
    header = ["shift", "run", "step", "id", "ood", "er", "lo", "hi"]
    path, rows = f"{config.out}/figures/{name}", -(-len(shifts) // columns)
    with common.figure(path, header, columns, rows) as (axes, numbers):
        for axis, shift in zip(axes.flat, shifts, strict=False):
            line = lines.get(shift, lines[er_study.best_line(lines)])
            numbers += er_study.er_panel(axis, line, er_study.by_run(points, shift))
        for axis in axes.flat[len(shifts) :]:
            axis.set_visible(False)
        axes.flat[0].legend(fontsize=6)


def figure_by_image(config, testbed, line, points, zero_shot):
    """Both accuracies by step; images that no testbed model gets right; dominance on ID.

    zero_shot: {set: bool [N]}, which images the zero-shot model gets right.
    """
    header, path = ["panel", "series", "x", "y"], f"{config.out}/figures/er_by_image"
    with common.figure(path, header, columns=3) as ((axes,), numbers):
        both_axis, nobody_axis, pair_axis = axes
        runs = er_study.by_run(points, line.ood)
        er_study.draw_runs(both_axis, runs, "step", "id", 100, marker="")
        both_axis.legend(fontsize=6)  # before the dashed lines, which are the same runs
        er_study.draw_runs(both_axis, runs, "step", "ood", 100, marker="", ls="--")
        er_study.draw_runs(nobody_axis, er_study.by_run(points, "mean"), "id", "nobody", 100)
        numbers += [("nobody", p.run, p.id, p.nobody) for p in points if p.shift == "mean"]
        title = f"ID (solid) and {line.ood} (dashed) by step"
        both_axis.set(xscale="symlog", xlim=(0, None), xlabel="step", ylabel="accuracy, %")
        both_axis.set_title(title, fontsize=8)
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
        axis.plot(acc_id, 100 * k / max(n, 1), "o", ms=3, color="0.6")
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
    """Table and figures of the digits' testbed and of the trajectories in --out."""
    config, _, _, zero_shot, measurement = er_study.prepare(tuple(argv))
    testbed, lines = measurement.testbed, measurement.lines
    print_by_image(testbed)
    points = saved(f"{config.out}/trajectories/*.csv")[1]
    right = er_study.score(zero_shot, measurement.sets)
    figure_by_image(config, testbed, lines[er_study.best_line(lines)], points, right)
    figure_shifts(config, lines, points, list(lines), "er_shifts")
    return points


def print_studied(points, shifts):
    """ER of each studied model; checkpoints from scratch, which are many, as a range."""
    rows = {}
    for p in points:
        if SCRATCH not in p.run:
            cells = rows.setdefault(p.run, [p.run, f"{100 * p.id:.1f}"])
            spread = f"[{100 * p.er_lo:+.2f}, {100 * p.er_hi:+.2f}]"
            cells.append(f"{100 * p.er:+.2f} {spread}{' *' * p.extrapolated}")
    title = "effective robustness in points [95 %]; * ID accuracy outside the testbed's range (E3)"
    print("\n" + common.table(["model", "ID", *shifts], rows.values(), title))
    for s in shifts:
        er = [100 * p.er for p in points if p.shift == s and SCRATCH in p.run]
        if er:
            spread = f"{min(er):+.2f} to {max(er):+.2f}, mean {np.mean(er):+.2f}"
            print(f"{s}: {len(er)} checkpoints of trainings from scratch: ER {spread}")


def published(config, name):
    """A testbed's lines, and the ER of the models beside it.  -> [er_study.Point]

    Raises InputError where one of them is in its own baseline, at another size ("@224").
    """
    testbed = testbeds.read(name)
    draws = min(config.draws, 200) if testbed.right else config.draws
    measurement = er_study.Measurement(testbed, draws)
    studied = {model.split("@")[0] for model in testbed.studied}
    for line in measurement.lines.values():
        if twice := studied & {model.split("@")[0] for model in line.models}:
            cure = "take it out of the baseline or out of the models under study"
            raise common.InputError(f"{min(twice)} is in its own baseline on {line.ood}; {cure}")
    er_study.print_lines(measurement)
    points = list(er_study.studied_points(measurement).values())
    if points:
        print_studied(points, list(measurement.lines))
    if testbed.right:
        print_by_image(testbed)
    return points


def report(config, measurement, points):
    """What er_study.py says of its trajectories, of any.  -> the points"""
    er_study.print_tables(measurement, points)
    er_study.figure(config, measurement.lines, points)
    er_study.summary(measurement.lines, points)
    return points


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "all"
    if name == "digits":
        return digits(argv)
    if name == "plot":
        pattern = argv.pop(0) if argv else ""
        return report(common.parse(er_study.Config, argv, __doc__), *saved(pattern))
    config = common.parse(er_study.Config, argv, __doc__)
    every = ("cifar10", "imagenet", "imagenet2020")
    return [p for each in (every if name == "all" else [name]) for p in published(config, each)]


if __name__ == "__main__":
    common.run(main)
