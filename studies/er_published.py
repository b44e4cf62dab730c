"""Effective robustness of published models: baselines, models beside them, tables by image. Needs
no image: `python er_study.py --testbed all` (or one testbed, or a public file) ends here.
"""

import csv
import re

import numpy as np
from scipy.special import logit

import common
import er_study
from data import testbeds
from studies import er_report

GROUPS = {  # studied models of the 2020 testbed, by name
    "CLIP, zero-shot": "clip_zeroshot",
    "BiT-M, mapped zero-shot": "nonfinetuned",
    "BiT-M, fine-tuned": "ILSVRC2012",
    "checkpoints from scratch": "_epochs",
}


def dominance(right):
    """P[the worse model is right and the better one wrong], for every pair of models of different
    accuracy on these images.  bool [M, N] -> accuracy gap [P], probability [P]
    """
    right = right[np.argsort(right.sum(1), kind="stable")].astype(np.float32)
    hits = right.sum(1, dtype=np.float64)
    only_low = hits[:, None] - (right @ right.T).astype(np.float64)  # row right, column wrong
    low, high = np.nonzero(hits[:, None] < hits)
    return (hits[high] - hits[low]) / right.shape[1], only_low[low, high] / right.shape[1]


def write_by_image(testbed, zero_shot, path):
    """What the figures need of a testbed known by image. "pair": gap (x) and dominance (y) of each
    pair of its models and of each with zero_shot() -> {set: bool [N]}, on ID and every shift.
    "alone": how many (y) of the n images of a shift that no other model gets right each model does,
    beside its ID accuracy (x). Written once.
    """
    if path.is_file():
        return
    right_of = zero_shot()
    rows = []
    for name in {**dict.fromkeys(testbed.id_of.values()), **testbed.id_of}:
        right = testbed.right[name]
        pairs = [("testbed", x, y) for x, y in zip(*dominance(right), strict=True)]
        for row in right:
            both = dominance(np.stack([row, right_of[name]]))
            pairs += [("zero-shot", x, y) for x, y in zip(*both, strict=True)]
        rows += [("pair", name, kind, "", f"{x:.6f}", f"{y:.6f}", "") for kind, x, y in pairs]
    for ood, at_home in testbed.id_of.items():
        right = testbed.right[ood]
        for i, model in enumerate(testbed.models):
            rest = er_study.nobody_right(np.delete(right, i, 0))
            k, n = er_study.share_right(right[i], rest)
            rows.append(("alone", ood, "", model, f"{testbed.accuracy(at_home)[i]:.6f}", k, n))

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            header = ["what", "set", "kind", "model", "x", "y", "n"]
            csv.writer(file, lineterminator="\n").writerows([header, *rows])

    common.try_write(path, write)


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
            er, outside = er_study.above(line, model, *sets, n, *acc)
            drawn = [redraws.accuracy(s, k=a, n=b) for s, a, b in zip(sets, k, n, strict=True)]
            spread = testbeds.interval(er_study.effective_robustness(*drawn, *redraws.lines[ood]))
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
        nobody, (_, p) = er_study.nobody_right(right), dominance(right)
        alone = []
        for i in range(len(right)):
            k, n = er_study.share_right(right[i], er_study.nobody_right(np.delete(right, i, 0)))
            alone.append(100 * k / max(n, 1))
        counts = [f"{right.shape[1]:,}", f"{nobody.sum():,}", f"{right.all(0).sum():,}"]
        shares = [f"{p.mean():.4f}", f"{p.max():.4f}", len(p), f"{np.median(alone):.2f}"]
        rows.append([name, *counts, *shares, f"{max(alone):.2f}"])
    header = ["set", "images", "nobody right", "all right", "dominance, mean", "max", "pairs"]
    header += ["left out: median %", "max %"]
    title = "by image; left out: what a model gets right of the images that no other gets right"
    print("\n" + common.table(header, rows, title))


def figure_published(config, testbed, found, points):
    """A panel per shift: testbed, line, studied models by group."""
    fig, (axes,) = common.new_figure(columns=len(found))
    numbers = []
    for axis, (ood, line) in zip(axes, found.items(), strict=True):
        own = [p for p in points if p[1] == ood]
        i = [testbed.row(m) for m in line.models]
        acc = testbed.accuracy(line.id)[i], testbed.accuracy(ood)[i]
        shown = np.concatenate([*acc, *([p[2:4] for p in own] or [[]])], axis=None)
        er_report.logit_axes(axis, max(0.9 * shown.min(), 1e-3), 1 - 0.5 * (1 - shown.max()))
        er_report.draw_line(axis, line, *acc)
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
    names, points = testbeds.EMBEDDED if config.testbed == "all" else [config.testbed], []
    for testbed in map(testbeds.read, names):
        redraws = testbeds.redraw(
            testbed, min(config.draws, 200) if testbed.right else config.draws
        )
        found = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
        er_report.print_lines(testbed, found, redraws)
        own = studied_points(testbed, found, redraws)
        if own:
            print_studied(own, list(found))
        if testbed.right:
            by_image(testbed)
        figure_published(config, testbed, found, own)
        points += own
    return points
