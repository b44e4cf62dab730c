"""Real models beside the modern testbed: all that `er_study.py --testbed modern` leaves out.

    python lab/er_modern.py    # 15 seconds

After er_study.py's own report, on the same lines:

    figure      docs/er_modern.png: ER against ID accuracy, a panel per shift
    classes     lines and ER where ID has a shift's own classes, as in the 2020 testbed
    testbeds    the line of 957 models against that of the 2020 testbed, on the same axes; the line
                of models trained with nothing but labels; how the ER of the pairs moves
    settings    72 fine-tunings of one CLIP ViT-B/32: ER against learning rate, epochs, ID accuracy
    soups       averages of their weights beside them
    12k         ER of fine-tuning by way of ImageNet-12k against fine-tuning at once
    zero-shot   ER of zero-shot models by size and by pre-training data
    published   rows of VRF's and CaRot's tables, and others' reproductions: published, not ours
    equal ID    the published rows of a ViT-B/32 against the 72 fine-tunings of equal ID accuracy

Intervals of ER are er_study.py's. Those of a rank correlation redraw the models. A difference of
two rows of one table has none: they share their images, and the tables have no counts by image.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402

SHORT = {  # of a shift, for headers
    "imagenetv2-matched-frequency": "V2",
    "imagenet-sketch": "Sketch",
    "imagenet-r": "R",
    "imagenet-a": "A",
}
SOUPS = ("model_0", "uniform_soup", "greedy_soup")
MARKS = (  # figure: label, mark, how the names of its models end
    ("plain fine-tuning (published, not ours)", "kx", (": FT", ": E2E-FT")),
    ("VRF (published, not ours)", "C1^", " +VRF"),
    ("CaRot (published, not ours)", "C4v", ": CaRot"),
)
PLAIN = {"VRF": "E2E-FT", "CaRot": "FT"}  # a paper's name of plain fine-tuning
NEAR = 0.005  # of ID accuracy, which counts as equal: half a point


def of_role(testbed, role):
    return [model for model, own in testbed.studied.items() if own == role]


def about(file, model="model"):
    """{model: {column: text}} of a file beside modern.csv."""
    return {row[model]: row for row in testbeds.read_table(testbeds.FOLDER / file)}


def cells(points, model, shifts):
    """ER with its interval on every shift, in points; -: not known."""
    found = [points.get((model, s)) for s in shifts]
    return [er_study.in_points(p.er, p.er_lo, p.er_hi) if p else "-" for p in found]


def header(shifts, *first):
    return [*first, *(f"ER on {SHORT[s]}" for s in shifts)]


# --- figure ---------------------------------------------------------------------------------------


def series_of(testbed, direct):
    """[(label, mark, models)] of the figure."""
    soups = [m for m in of_role(testbed, "soup") if m.startswith("model_")]
    found = [("72 fine-tunings of one CLIP ViT-B/32", "C2.", soups)]
    for label, mark, ends in MARKS:
        own = [m for m in of_role(testbed, "published") if m.endswith(ends)]
        found.append((label, mark, own))
    found.append(("CLIP and its like, zero-shot", "C0o", [zero_shot for zero_shot, _ in direct]))
    tuned = [fine_tuned for _, fine_tuned in direct]
    return [*found, ("the same, fine-tuned on ImageNet", "C3o", tuned)]


def figure(config, measurement, points):
    """ER against ID accuracy, a panel per shift: baseline, pairs, fine-tunings, published rows."""
    header = ["shift", "series", "model", "id", "ood", "er", "lo", "hi"]
    pairs = about("modern_pairs.csv", "fine-tuned").values()
    direct = [(row["zero-shot"], row["fine-tuned"]) for row in pairs if not row["by way of"]]
    series = series_of(measurement.testbed, direct)
    with common.figure(f"{config.out}/figures/er_modern", header, 2, 2) as (axes, numbers):
        for axis, (shift, line) in zip(axes.flat, measurement.lines.items(), strict=True):
            er_study.logit_axis(axis, "x", 0.57, 0.905, "accuracy on ImageNet, %")
            label = f"{len(line.er)} models trained on ImageNet-1k alone"
            axis.plot(line.acc_id, 100 * line.er, ".", ms=2, color="0.7", label=label)
            axis.axhline(0, color="0.4", lw=0.8)
            columns = line.models, line.acc_id, line.acc_ood, line.er
            numbers += [(shift, label, *row) for row in zip(*columns, strict=True)]
            for pair in direct:
                a, b = (points[model, shift] for model in pair)
                axis.plot([a.id, b.id], [100 * a.er, 100 * b.er], color="0.8", lw=0.7, zorder=1)
            for label, mark, models in series:
                own = [points[model, shift] for model in models]
                axis.plot([p.id for p in own], [100 * p.er for p in own], mark, ms=3.5, label=label)
                rows = [(p.run, p.id, p.ood, p.er, p.er_lo, p.er_hi) for p in own]
                numbers += [(shift, label, *row) for row in rows]
            axis.set(ylabel="ER, points")
            axis.set_title(f"{shift}: R² of the line {line.r2:.3f}", fontsize=8)
        handles = axes[0, 0].get_legend_handles_labels()
        axes[0, 0].figure.legend(*handles, loc="outside lower center", ncols=3, fontsize=7)


# --- testbeds -------------------------------------------------------------------------------------


def print_own_classes(config):
    """Lines, and ER of the fine-tuned models, where ID has a shift's own classes. Zero-shot models
    are known on all classes only.
    """
    testbed = testbeds.read("modern")
    own = {s: at_home for s, at_home in testbed.id_of.items() if at_home != testbeds.HOME}
    testbed = dataclasses.replace(testbed, name="modern, ID on the same classes", id_of=own)
    measurement = er_study.Measurement(testbed, config.draws)
    er_study.print_lines(measurement)
    points, rows = er_study.studied_points(measurement), []
    for model, row in about("modern_pairs.csv", "fine-tuned").items():
        name = row["pair"] + " *" * bool(row["by way of"])
        rows.append([name, *(f"{100 * points[model, s].er:+.1f}" for s in own)])
    title = "ER in points after fine-tuning, ID on the shift's classes; *: by way of ImageNet-12k"
    print("\n" + common.table(["pair", *own], rows, title))


def with_labels_alone(testbed):
    """The testbed's models whose tag has no remark: not distilled, no self-supervision, no
    adversarial images. Where a remark is on one architecture, it is not in the testbed anyway.
    """
    tags = about("modern_tags.csv", "tag")
    rows = [
        i
        for i, model in enumerate(testbed.models)
        if model in testbed.studied or not tags[model.split("@")[0].partition(".")[2]]["reason"]
    ]
    k = {s: counts[rows] for s, counts in testbed.k.items()}
    return dataclasses.replace(testbed, models=[testbed.models[i] for i in rows], k=k)


def older(shift, testbed):
    """(the 2020 testbed's Line for a shift on the full ID set, its name); None if it has none."""
    names = {"imagenetv2-matched-frequency": "imagenetv2-matched-frequency-format-val"}
    name = names.get(shift, shift)
    if name not in testbed.id_of:
        return None
    return er_study.baseline(dataclasses.replace(testbed, id_of={name: "val"}), name)


def print_testbeds(testbed, lines, points):
    """The same shift's line in three testbeds, and how far the ER of the studied models moves."""
    strict, old, rows = with_labels_alone(testbed), testbeds.read("imagenet2020"), []
    for shift, line in lines.items():
        studied = [p for (_, s), p in points.items() if s == shift and p.id > 0.55]
        own = [("modern", line), ("labels alone", er_study.baseline(strict, shift))]
        own += [("2020", older(shift, old))]
        for name, other in own:
            if other is None:
                continue
            er = [other.er_of(p.id, p.ood) - p.er for p in studied]
            numbers = [f"{x:.4f}" for x in (other.slope, other.intercept, other.r2)]
            moved = [f"{100 * np.mean(er):+.2f}", f"{100 * min(er):+.2f} to {100 * max(er):+.2f}"]
            spread = f"{100 * other.residual:.2f}"
            rows.append([SHORT[shift], name, len(other.models), *numbers, spread, *moved])
    first = ["shift", "testbed", "models", "slope", "intercept", "R2", "residual SD"]
    title = "one shift, three testbeds, ID on all classes; moved: ER there less ER here, in points"
    table = common.table([*first, "moved, mean", "range, ID > 55"], rows, title)
    print("\n" + table)


def print_by_way(points, shifts):
    """Of pairs that have both: fine-tuned by way of ImageNet-12k, less fine-tuned at once."""
    pairs, gaps = about("modern_pairs.csv", "fine-tuned"), []
    once = {row["pair"]: model for model, row in pairs.items() if not row["by way of"]}
    for model, row in pairs.items():
        if row["by way of"] and row["pair"] in once:
            both = [(points[model, s], points[once[row["pair"]], s]) for s in shifts]
            at_home = both[0][0].id - both[0][1].id
            gaps.append([at_home, *(a.er - b.er for a, b in both)])
    columns = [[100 * x for x in column] for column in zip(*gaps, strict=True)]
    rows = [[f"{np.mean(x):+.1f} ({min(x):+.1f} to {max(x):+.1f})" for x in columns]]
    title = f"by way of ImageNet-12k less at once, {len(gaps)} models: mean (range), points"
    print("\n" + common.table(header(shifts, "ID"), rows, title))


# --- 72 fine-tunings ------------------------------------------------------------------------------


def rank_correlation(x, y, draws=2000, seed=0):
    """Spearman's, with the 95 % interval of a bootstrap over pairs.  [N], [N] -> 3 numbers"""
    x, y = np.asarray(x, float), np.asarray(y, float)
    drawn = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    rows = np.concatenate([np.arange(len(x))[None], drawn])  # first the models as they are
    a, b = (rankdata(of[rows], axis=1) for of in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a draw of equal values has no correlation
        found = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return float(found[0]), *testbeds.interval(found[1:])


def settings_of(row):
    """{name: number} of one of the 72 fine-tunings; RandAugment as its magnitude, 0 without."""
    aug = row["aug"]
    magnitude = float(aug.split("-")[1].removeprefix("m")) if aug.startswith("rand-m") else 0.0
    plain = {name: float(row[name]) for name in ("lr", "epochs", "wd", "mix", "smoothing")}
    return plain | {"aug": magnitude}


def print_settings(points, shifts):
    """Rank correlations of ER and ID accuracy with each setting, over the members of the soups."""
    known = {m: settings_of(row) for m, row in about("modern_soups.csv").items() if row["lr"]}
    at_home = [points[m, shifts[0]].id for m in known]
    columns = {name: [own[name] for own in known.values()] for name in next(iter(known.values()))}
    rows = []
    for name, x in (columns | {"ID accuracy": at_home}).items():
        of_er = [rank_correlation(x, [points[m, s].er for m in known]) for s in shifts]
        of_id = "" if name == "ID accuracy" else "{:+.2f} [{:+.2f}, {:+.2f}]"
        of_id = of_id and of_id.format(*rank_correlation(x, at_home))
        rows.append([name, of_id, *("{:+.2f} [{:+.2f}, {:+.2f}]".format(*r) for r in of_er)])
    title = f"Spearman's rank correlation, {len(known)} fine-tunings of one CLIP ViT-B/32 [95 %]"
    print("\n" + common.table(header(shifts, "setting", "ID accuracy"), rows, title))
    order = sorted(known, key=lambda m: known[m]["lr"])
    parts = np.array_split(order, 4)
    rows = []
    for part in parts:
        ends = f"{known[part[0]]['lr']:.1e} to {known[part[-1]]['lr']:.1e}"
        er = [100 * np.mean([points[m, s].er for m in part]) for s in shifts]
        mean = 100 * np.mean([points[m, shifts[0]].id for m in part])
        rows.append([ends, len(part), f"{mean:.1f}", *(f"{x:+.1f}" for x in er)])
    print("\n" + common.table(header(shifts, "lr, quarters", "models", "ID"), rows, "means"))


def print_soups(points, shifts):
    rows = []
    members = [m for (m, s) in points if s == shifts[0] and m.startswith("model_")]
    best = max(members, key=lambda m: points[m, shifts[0]].id)
    for name in ("ViT-B-32 openai", *SOUPS, best):
        text = {"model_0": "model_0, the linear probe", best: f"{best}, largest ID"}.get(name, name)
        rows.append([text, f"{100 * points[name, shifts[0]].id:.1f}", *cells(points, name, shifts)])
    ids, er = ([[getattr(points[m, s], x) for m in members] for s in shifts] for x in ("id", "er"))
    spread = [f"{100 * min(x):+.1f} to {100 * max(x):+.1f}" for x in er]
    rows.append(["members", f"{100 * min(ids[0]):.1f} to {100 * max(ids[0]):.1f}", *spread])
    title = "the 72, and averages of their weights [95 %]"
    print("\n" + common.table(header(shifts, "model", "ID"), rows, title))


# --- zero-shot models -----------------------------------------------------------------------------


def print_zero_shot(points, shifts):
    """ER by pre-training data, and its rank correlation with size within one kind of data."""
    groups, rows = {}, []
    for model, row in about("modern_zeroshot.csv").items():
        if not points[model, shifts[0]].extrapolated:
            kind = row["data"].removeprefix("frozen_").split("_")[0]
            groups.setdefault(kind, []).append((model, float(row["parameters"])))
    for kind, models in sorted(groups.items(), key=lambda g: -len(g[1])):
        own = [[100 * points[m, s].er for m, _ in models] for s in shifts]
        ids = [100 * points[m, shifts[0]].id for m, _ in models]
        line = [kind, len(models), f"{min(ids):.0f}-{max(ids):.0f}"]
        line += [f"{np.mean(er):+.1f} ({min(er):+.1f} to {max(er):+.1f})" for er in own]
        if len(models) >= 8:
            size = [n for _, n in models]
            line += ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*rank_correlation(size, own[2]))]
        rows.append(line + [""] * (4 + len(shifts) - len(line)))
    total = sum(map(len, groups.values()))
    title = (
        f"{total} zero-shot models with an ID accuracy that the line's models have: mean (range)"
    )
    first = header(shifts, "data", "models", "ID")
    print("\n" + common.table([*first, "size and ER on R, Spearman"], rows, title))


# --- published rows -------------------------------------------------------------------------------


def print_published(testbed, points, shifts):
    """All rows with their ER, and less the ER of plain fine-tuning in the same table."""
    rows = []
    for model in of_role(testbed, "published"):
        where, _, method = model.partition(": ")
        plain = f"{where}: {PLAIN[where.split()[0]]}"
        gap = [100 * (points[model, s].er - points[plain, s].er) for s in shifts]
        less = " ".join(f"{x:+.1f}" for x in gap)
        at_home = f"{100 * points[model, shifts[0]].id:.1f}"
        rows.append([where, method, at_home, *cells(points, model, shifts), less])
    title = "published, not ours: ER of the rows that the papers print [95 %]"
    first = header(shifts, "table", "method", "ID")
    print("\n" + common.table([*first, "less plain fine-tuning"], rows, title))
    known = about("modern_reproductions.csv")
    rows = [
        [model, known[model]["independent"] or "the paper's"]
        + [f"{100 * points[model, shifts[0]].id:.1f}", *cells(points, model, shifts)]
        for model in of_role(testbed, "reproduced")
    ]
    title = "published, not ours: CLIP ViT-B/16 as others reproduced it [95 %]"
    print("\n" + common.table(header(shifts, "row", "independent", "ID"), rows, title))


def print_at_equal_id(testbed, points, shifts):
    """Published rows of a ViT-B/32 less the mean of the 72 whose ID accuracy is equal (NEAR)."""
    rows, members = [], [m for (m, s) in points if s == shifts[0] and m.startswith("model_")]
    for model in of_role(testbed, "published"):
        where, _, method = model.partition(": ")
        own = points[model, shifts[0]].id
        near = [m for m in members if abs(points[m, shifts[0]].id - own) <= NEAR]
        if "ViT-B-32" in where and near:
            gap = [
                100 * (points[model, s].er - np.mean([points[m, s].er for m in near]))
                for s in shifts
            ]
            least = [
                100 * (points[model, s].er - max(points[m, s].er for m in near)) for s in shifts
            ]
            text = [f"{a:+.1f} ({b:+.1f})" for a, b in zip(gap, least, strict=True)]
            rows.append([method, f"{100 * own:.1f}", len(near), *text])
    title = (
        "VRF's Table 1, ViT-B/32, less fine-tunings of equal ID accuracy: their mean (their best)"
    )
    print("\n" + common.table(header(shifts, "method", "ID", "fine-tunings"), rows, title))


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    config = common.parse(er_study.Config, sys.argv[1:] if argv is None else argv, __doc__)
    measurement, points = er_study.modern(config)
    testbed, lines = measurement.testbed, measurement.lines
    shifts = list(lines)
    figure(config, measurement, points)
    print_own_classes(config)
    print_testbeds(testbed, lines, points)
    print_by_way(points, shifts)
    print_settings(points, shifts)
    print_soups(points, shifts)
    print_zero_shot(points, shifts)
    print_published(testbed, points, shifts)
    print_at_equal_id(testbed, points, shifts)
    return measurement, points


if __name__ == "__main__":
    common.run(main)
