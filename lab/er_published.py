"""Tables and figures beside er_study.py: of published models, and of models known image by image.

    python lab/er_published.py all       # er_study.py --testbed all, and a figure of each testbed
    python lab/er_published.py FILE.npz  # a per-example table: dominance, images nobody gets right
    python lab/er_published.py digits    # the same of the digits, with the runs in runs/er_study

Takes the flags of er_study.py. `digits` reads the trajectories of an `er_study.py` that has run, in
--out, and draws what its own figure leaves out: both accuracies by step; what the runs get of the
images that no testbed model gets right, beside what each testbed model gets of those that no other
gets; and the dominance probability of pairs of models (of different accuracy, the share of images
on which the worse one is right and the better one wrong), alone and with the zero-shot model.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402

GROUPS = {  # studied models of the 2020 testbed, by name
    "CLIP, zero-shot": "clip_zeroshot",
    "BiT-M, mapped zero-shot": "nonfinetuned",
    "BiT-M, fine-tuned": "ILSVRC2012",
    "checkpoints from scratch": er_study.FROM_SCRATCH,
}


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
    """A panel per shift: testbed, line, studied models by group."""
    path = f"{config.out}/figures/er_{common.slug(testbed.name).replace('-', '_')}"
    header = ["shift", "series", "model", "id", "ood"]
    with common.figure(path, header, columns=len(lines)) as ((axes,), numbers):
        for axis, (ood, line) in zip(axes, lines.items(), strict=True):
            acc = er_study.accuracies(testbed, line)
            own = [p for p in points if p[1] == ood]
            shown = np.concatenate([*acc, *(p[2:4] for p in own)])
            low, high = max(0.9 * shown.min(), 1e-3), 1 - 0.5 * (1 - shown.max())
            drawn = er_study.line_panel(axis, line, *acc, low, high)
            numbers += [(ood, "testbed", *row) for row in drawn]
            for name, pattern in GROUPS.items():
                group = [(p[0], *p[2:4]) for p in own if pattern in p[0]]
                if group:
                    x, y = logit(np.array([row[1:] for row in group]).T)
                    mark = "." if pattern == er_study.FROM_SCRATCH else "D"
                    axis.plot(x, y, mark, ms=4, label=name)
                numbers += [(ood, name, *row) for row in group]
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
            nobody_axis.plot(er_study.on_logit_axis(c["id"]), 100 * nobody, **look)
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
        axis.plot(er_study.on_logit_axis(acc_id), 100 * k / max(n, 1), "o", ms=3, color="0.6")
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
    _, _, checkpoints = er_study.saved(f"{config.out}/trajectories/*.csv")
    groups, shift = er_study.by_run(checkpoints), er_study.best_line(lines)
    right = er_study.score(measurement, zero_shot)
    figure_by_image(config, testbed, lines[shift], groups, right)
    figure_shifts(config, testbed, lines, groups, list(lines), "er_shifts")
    return groups


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "all"
    if name == "digits":
        return digits(argv)
    config = common.parse(er_study.Config, ["--testbed", name, *argv], __doc__)
    points = er_study.published(config)
    for each in testbeds.PUBLISHED if name == "all" else [name]:
        testbed = testbeds.read(each)
        if testbed.right:
            print_by_image(testbed)
        lines = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
        figure_published(config, testbed, lines, [p for p in points if p[1] in lines])
    return points


if __name__ == "__main__":
    common.run(main)
