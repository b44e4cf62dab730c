"""What er_study.py says of its trajectories: tables, figure, three sentences, from files alone.

    python er_study.py --plot "runs/er_study/trajectories/*.csv"  # seconds

A trajectory file has a row per checkpoint and shift, with counts; testbed.csv beside it has the
testbed's. Nothing here trains or looks at an image.
"""

import glob
import math
import textwrap
from pathlib import Path

import numpy as np
from scipy.special import logit

import common
import er_study
from data import testbeds, trajectories

STORY = {
    "zero-shot, lr 0.0002": "Fine-tuned from the zero-shot model",
    "new-head": "A new head on the pre-trained encoder",
    "random": "From scratch",
}


def curve(rows, shift):
    """Arrays over the checkpoints of one run: step, epoch, id, val, ood, er, lo, hi, a, b, alone.

    a, b: ER on the two halves of the images, ID and OOD (E5). "mean" averages the shifts.
    Everything comes from counts and beta as saved; lo and hi are the saved interval.
    """
    shifts = [s for s in dict.fromkeys(r["shift"] for r in rows) if s != "mean"]
    parts = []
    for s in shifts if shift == "mean" else [shift]:
        own = sorted((r for r in rows if r["shift"] == s), key=lambda r: r["step"])
        counts = [c for c in trajectories.COLUMNS if c.startswith(("k_", "n_"))]
        names = "step", "epoch", "beta", "beta_half", "beta_rest", *counts
        c = {name: np.array([r[name] for r in own]) for name in names}
        rest = (c["k_ood"] - c["k_half"]) / (c["n_ood"] - c["n_half"])
        ood = c["k_ood"] / c["n_ood"]
        part = {
            "id": c["k_id"] / c["n_id"],
            "val": c["k_val"] / np.maximum(c["n_val"], 1),
            "ood": ood,
        }
        part |= {"er": ood - c["beta"], "a": c["k_half"] / c["n_half"] - c["beta_half"]}
        part |= {"b": rest - c["beta_rest"], "step": c["step"], "epoch": c["epoch"]}
        parts.append(part | {"k_nobody": c["k_nobody"], "n_nobody": c["n_nobody"]})
    of_shift = sorted((r for r in rows if r["shift"] == shift), key=lambda r: r["step"])
    out = {name: np.mean([p[name] for p in parts], 0) for name in parts[0]}
    k, n = (np.sum([p[x] for p in parts], 0) for x in ("k_nobody", "n_nobody"))
    out["alone"] = k / np.maximum(n, 1)
    out |= {x: np.array([r[f"er_{x}"] for r in of_shift]) for x in ("lo", "hi")}
    return out | {"outside": np.array([r["extrapolated"] for r in of_shift])}


def at_accuracy(c, accuracy):
    """ER where a run's ID accuracy first passes `accuracy`, interpolated in logit(ID); or nan."""
    x, y = [], []
    for acc, er in zip(c["id"], c["er"], strict=True):
        if 0 < acc < 1 and (not x or logit(acc) > x[-1]):
            x.append(logit(acc))
            y.append(er)
    inside = x and x[0] <= logit(accuracy) <= x[-1]
    return float(np.interp(logit(accuracy), x, y)) if inside else math.nan


def summarise(rows, shift, accuracies=(0.8, 0.9, 0.94)):
    """One run's ER in a few numbers: at the start, the largest (as is; after a median of three
    checkpoints; free of selection, E5), where, at the last and at the best checkpoint on ID val,
    and at fixed ID accuracies. Shares.
    """
    c = curve(rows, shift)
    top, best = int(c["er"].argmax()), int(c["val"].argmax())
    smooth = [np.median(c["er"][max(0, i - 1) : i + 2]) for i in range(len(c["er"]))]
    # Differs (E5): how the paper sums up a curve is not known to us
    picks = [(c["b"], c["a"].argmax()), (c["a"], c["b"].argmax())]  # scored on, chosen on the other
    free = np.mean([er[i] for er, i in picks])
    out = {"start": c["er"][0], "start_lo": c["lo"][0], "start_hi": c["hi"][0]}
    out |= {"max": c["er"][top], "max_median": max(smooth), "max_free": free}
    out |= {"rise": np.mean([er[i] - er[0] for er, i in picks])}
    out |= {"fall": np.mean([er[i] - er[-1] for er, i in picks])}
    out |= {f"free_{k}": np.mean([c[k][i] for _, i in picks]) for k in ("id", "epoch")}
    out |= {"max_id": c["id"][top], "max_epoch": c["epoch"][top]}
    out |= {"last": c["er"][-1], "last_lo": c["lo"][-1], "last_hi": c["hi"][-1]}
    last = max((r for r in rows if r["shift"] == shift), key=lambda r: r["step"])
    low, high = er_study.clopper_pearson(last["k_id"], last["n_id"])
    out |= {"last_id": c["id"][-1], "last_id_lo": low, "last_id_hi": high}
    out |= {"best_val": c["er"][best], "outside": c["outside"][0], "last_outside": c["outside"][-1]}
    return out | {f"at {a:g}": at_accuracy(c, a) for a in accuracies}


def by_run(rows):
    """{run without its seed: {run: rows}}, by start, then by rate, whatever the files' order."""
    groups = {}
    for r in sorted(rows, key=lambda r: (er_study.KINDS.index(r["init"]), r["lr"], r["seed"])):
        name = r["run"].rpartition(", seed")[0]
        groups.setdefault(name, {}).setdefault(r["run"], []).append(r)
    return groups


def print_lines(testbed, found, redraws=None):
    """Table of the baselines; the interval is of the slope, over models and images."""
    rows = []
    for ood, line in found.items():
        slope = f"{line.slope:.4f}"
        if redraws:
            slope += " [{:.3f}, {:.3f}]".format(*testbeds.interval(redraws.lines[ood][0]))
        numbers = [slope, f"{line.intercept:.4f}", f"{line.r2:.4f}", f"{100 * line.residual:.2f}"]
        numbers += [f"{100 * line.low:.1f}-{100 * line.high:.1f}"]
        rows.append([ood, line.id, len(line.models), *numbers])
    header = ["shift", "ID", "models", "slope [95 %]", "intercept", "R2", "residual SD", "ID range"]
    title = f"testbed {testbed.name}: logit(OOD) = slope logit(ID) + intercept; points"
    print("\n" + common.table(header, rows, title))


def over_runs(shares):
    """'+3.1 [+2.0, +4.2]' in points, '+3.1' of one run, '-' if a run has none."""
    mean, low, high = (100 * x for x in common.interval(shares))
    if math.isnan(mean) or math.isnan(low):
        return signed(mean)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def signed(points):
    return "-" if math.isnan(points) else f"{points:+.1f}"


def print_runs(groups, shift):
    """Table of ER through fine-tuning, mean over seeds. Intervals are those of images and testbed,
    averaged over seeds; of "rise" and "fall", from start to the largest ER and on to the end, both
    free of selection, those over runs. *: at the start, or the end, the line is extrapolated (E3).
    """
    lines = []
    for name, runs in groups.items():
        s = [summarise(rows, shift) for rows in runs.values()]
        mean = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
        spread = f" sd {100 * np.std([x['last'] for x in s], ddof=1):.1f}" if len(s) > 1 else ""
        say = "{:+.1f} [{:+.1f}, {:+.1f}]".format
        star, end = (" *" * bool(mean[k]) for k in ("outside", "last_outside"))
        cells = [say(*(mean[k] for k in ("start", "start_lo", "start_hi"))) + star]
        cells += [signed(mean[k]) for k in ("max", "max_median", "max_free")]
        cells += [f"{mean['free_id']:.1f} / {mean['free_epoch'] / 100:.2g}"]
        cells += [over_runs([x[k] for x in s]) + m for k, m in (("rise", star), ("fall", end))]
        cells += [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(mean[f"last_id{x}"] for x in ("", "_lo", "_hi")))
        ]
        cells += [say(*(mean[k] for k in ("last", "last_lo", "last_hi"))) + end + spread]
        cells += [signed(mean[k]) for k in ("best_val", *(k for k in mean if k.startswith("at ")))]
        lines.append([name, *cells])
    header = ["ER in points", "start [95 %]", "max", "of medians", "unbiased", "at ID / epoch"]
    header += ["rise", "fall"]
    header += ["last ID [95 %]", "last ER [95 %]", "best val", "at ID 80", "90", "94"]
    every = "all shifts, those without a line too" if shift == "mean" else shift
    title = f"effective robustness on {every}; -: that ID accuracy is not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))


def logit_axes(axis, low=0.01, high=0.99):
    """Both axes in logits, ticks at round percentages; y = x dashed."""
    ticks = [t for t in (1, 2, 5, 10, 20, 30, 50, 70, 80, 90, 95, 98, 99) if low <= t / 100 <= high]
    at, ends = logit(np.array(ticks) / 100), logit(np.array([low, high]))
    axis.set(xticks=at, xticklabels=ticks, yticks=at, yticklabels=ticks, xlim=ends, ylim=ends)
    axis.plot(ends, ends, "--", color="0.7", lw=0.8)
    axis.set(xlabel="ID accuracy, %", ylabel="OOD accuracy, %")


def caption(line):
    return (
        f"{line.ood}\nn {len(line.models)}, slope {line.slope:.2f}, intercept"
        f" {line.intercept:.2f}, R² {line.r2:.3f}"
    )


def draw_line(axis, line, acc_id, acc_ood):
    """A testbed's points and line; dotted where extrapolated. Accuracies 0, 1 are drawn inside."""
    x, y = (logit(np.clip(a, 1e-3, 1 - 1e-3)) for a in (acc_id, acc_ood))
    axis.plot(x, y, "o", ms=3, color="0.6", label=f"testbed, {len(line.models)} models")
    inside, ends = logit(np.array([line.low, line.high])), np.array(axis.get_xlim())
    axis.plot(ends, line.slope * ends + line.intercept, ":", color="0.4", lw=1)
    axis.plot(inside, line.slope * inside + line.intercept, color="0.4", lw=1.2)
    axis.set_title(caption(line), fontsize=8)


LOW, HIGH = 0.05, 0.995  # accuracies beyond are drawn here
TICKS = (10, 20, 30, 50, 70, 80, 85, 90, 95, 98)


def id_axis(axis, line, low=0.08, high=0.985):
    """ID accuracy in logits, where the line is extrapolated shaded."""
    ticks = [t for t in TICKS if low <= t / 100 <= high]
    axis.set(xticks=logit(np.array(ticks) / 100), xticklabels=ticks, xlim=logit([low, high]))
    for ends in ((low, line.low), (line.high, high)):
        if ends[0] < ends[1]:
            axis.axvspan(*logit(np.array(ends)), color="0.95", lw=0)
    axis.set(xlabel="ID accuracy, %")


def accuracies(testbed, line):
    rows = [testbed.row(m) for m in line.models]
    return testbed.accuracy(line.id)[rows], testbed.accuracy(line.ood)[rows]


def own_er(testbed, line):
    """ER of the baseline's own models: what ER is worth on this shift.  [M]"""
    return er_study.effective_robustness(*accuracies(testbed, line), line.slope, line.intercept)


def er_panel(axis, testbed, found, groups, shift):
    """ER against ID accuracy, a colour per group; dark: the testbed's own range.  -> rows"""
    line, numbers = found[shift if shift in found else best_line(found)], []
    curves = {n: [curve(rows, shift) for rows in runs.values()] for n, runs in groups.items()}
    least = min(c["id"].min() for of_run in curves.values() for c in of_run)
    id_axis(axis, line, max(0.08, 0.95 * least))
    if shift in found:
        own = 100 * own_er(testbed, line)
        axis.axhspan(own.min(), own.max(), color="0.88", lw=0)
    axis.axhline(0, color="0.4", lw=0.8)
    for i, (name, of_run) in enumerate(curves.items()):
        for j, c in enumerate(of_run):
            look = {"color": f"C{i % 10}", "ls": "-" if i < 10 else ":", "lw": 0.9, "ms": 2.5}
            x = logit(np.clip(c["id"], LOW, HIGH))
            axis.plot(x, 100 * c["er"], marker="o", label=name if j == 0 else None, **look)
            columns = [c[k] for k in ("step", "id", "ood", "er", "lo", "hi")]
            numbers += [(shift, name, *row) for row in zip(*columns, strict=True)]
    axis.set(ylabel="ER, points")
    text = caption(line) if shift in found else f"mean of {len(found)} shifts"
    axis.set_title(f"ER on {text}", fontsize=8)
    return numbers


def figure_er(config, testbed, found, groups, shifts, name):
    """ER against ID accuracy, a panel per shift."""
    columns = min(3, len(shifts))
    fig, axes = common.new_figure(columns, math.ceil(len(shifts) / columns))
    numbers = []
    for axis, shift in zip(axes.flat, shifts, strict=False):
        numbers += er_panel(axis, testbed, found, groups, shift)
    for axis in axes.flat[len(shifts) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=6)
    header = ["shift", "run", "step", "id", "ood", "er", "lo", "hi"]
    common.save_figure(fig, f"{config.out}/figures/{name}", header, numbers)


def figure(config, testbed, found, groups, shift, by_image):
    """Accuracies on logit axes; ER against ID accuracy and against steps; both accuracies against
    steps; what needs the testbed by image: what the runs get of the images that no testbed model
    gets right, and dominance of pairs. From files alone.
    """
    fig, ((line_axis, er_axis, step_axis), bottom) = common.new_figure(columns=3, rows=2)
    both_axis, nobody_axis, pair_axis = bottom
    line = found[shift]
    acc = accuracies(testbed, line)
    logit_axes(line_axis, 0.08, 0.99)
    draw_line(line_axis, line, *acc)
    numbers = [("testbed", m, "", *xy) for m, *xy in zip(line.models, *acc, strict=True)]
    numbers += [(r[1], "", *r[2:]) for r in er_panel(er_axis, testbed, found, groups, shift)]
    for i, (name, runs) in enumerate(groups.items()):
        for j, of_run in enumerate(runs.values()):
            c = curve(of_run, shift)
            look = {"color": f"C{i % 10}", "lw": 0.9, "label": name if j == 0 else None}
            dots = look | {"marker": "o", "ms": 2.5}
            x, y = (logit(np.clip(c[k], LOW, HIGH)) for k in ("id", "ood"))
            line_axis.plot(x, y, **dots)
            steps = np.maximum(c["step"], 0.5)
            step_axis.plot(steps, 100 * c["er"], **dots)
            both_axis.plot(steps, 100 * c["id"], **look)
            both_axis.plot(steps, 100 * c["ood"], **(look | {"ls": "--", "label": None}))
            nobody_axis.plot(x, 100 * curve(of_run, "mean")["alone"], **dots)
    step_axis.axhline(0, color="0.4", lw=0.8)
    for axis, y, title in (
        (step_axis, "ER, points", f"ER on {shift} by step"),
        (both_axis, "accuracy, %", f"ID (solid) and {shift} (dashed) by step"),
    ):
        axis.set(xscale="log", xlabel="step (0 drawn at 1/2)", ylabel=y)
        axis.set_title(title, fontsize=8)
    nobody_panel(nobody_axis, line, by_image)
    pair_panel(pair_axis, line.id, by_image)
    step_axis.legend(fontsize=6)
    header = ["series", "model", "step", "id", "ood", "er", "lo", "hi"]
    common.save_figure(fig, f"{config.out}/figures/er_study", header, numbers)


def nobody_panel(axis, line, by_image):
    """Titles, and for scale what each testbed model gets right of the images that no other gets."""
    id_axis(axis, line)
    alone = [r for r in by_image if r["what"] == "alone"]
    for model in dict.fromkeys(r["model"] for r in alone):
        own = [r for r in alone if r["model"] == model]
        k, n = (sum(float(r[x]) for r in own) for x in ("y", "n"))
        x = logit(np.clip(float(own[0]["x"]), LOW, HIGH))
        axis.plot(x, 100 * k / max(n, 1), "o", ms=3, color="0.6")
    axis.set(ylabel="right, %")
    said = "grey: testbed models, of what no other gets" if alone else "testbed known by counts"
    axis.set_title(
        f"of the images that no testbed model gets right, all shifts\n{said}", fontsize=8
    )


def pair_panel(axis, at_home, by_image):
    """Dominance probability against the gap in accuracy: pairs of testbed models, pairs with the
    zero-shot model.
    """
    for kind, colour in (("testbed", "0.6"), ("zero-shot", "C3")):
        own = [r for r in by_image if (r["what"], r["set"], r["kind"]) == ("pair", at_home, kind)]
        if not by_image:
            axis.text(0.5, 0.5, "testbed known by counts", ha="center", transform=axis.transAxes)
            break
        if own:
            x, y = (np.array([float(r[k]) for r in own]) for k in ("x", "y"))
            label = f"{kind}: {len(own)} pairs, mean {y.mean():.3f}"
            axis.plot(100 * x, y, "o", ms=2.5, color=colour, label=label)
            axis.legend(fontsize=6)
    axis.set(xlabel="gap in accuracy, points", ylabel="P[lower right, higher wrong]")
    axis.set_title(f"dominance probability on ID ({at_home})", fontsize=8)


def best_line(found):
    """The shift whose line explains most, on which ER means most; from the testbed alone."""
    return max(found, key=lambda s: found[s].r2)


def report(config, testbed, found, rows, redraws=None, by_image=()):
    """Tables, figure and three sentences, from the testbed's counts and trajectory rows alone."""
    groups, shift = by_run(rows), best_line(found)
    print_lines(testbed, found, redraws)
    for s in (shift, "mean"):
        print_runs(groups, s)
    figure(config, testbed, found, groups, shift, by_image)
    if len(found) > 1:
        figure_er(config, testbed, found, groups, list(found), "er_shifts")
    summary(groups, found, shift)
    return groups


def summary(groups, found, shift):
    """Sentences on the tables, computed from them."""
    weak = [f"{s} ({line.r2:.2f})" for s, line in found.items() if line.r2 < 0.5]
    said = f"{shift} has the line that explains most, with R2 {found[shift].r2:.2f}."
    if weak:
        said += f" R2 is below 1/2, so that ER is hardly defined, on {', '.join(weak)}."
    sentences = [said]
    for init, text in STORY.items():
        for name, runs in groups.items():
            if name.startswith(init):
                sentences.append(f"{text} ({name}): {told(list(runs.values()), shift)}")
    print()
    for number, text in enumerate(sentences, 1):
        print(textwrap.fill(f"{number}. {text}", 100, subsequent_indent="   "))


def told(runs, shift):
    """Is there a bump, how high, where, and is ER gone at the end?"""
    s = [summarise(rows, shift) for rows in runs]
    m = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
    gone = "includes" if m["last_lo"] <= 0 <= m["last_hi"] else "excludes"
    rise, fall = (over_runs([x[k] for x in s]) for k in ("rise", "fall"))
    many = f"; intervals of rise and fall over {len(s)} runs" if len(s) > 1 else ""
    return (
        f"ER on {shift} is {m['start']:+.1f} points at the start, at most {m['max_free']:+.1f}"
        f" (rise {rise}, free of selection, at ID {m['free_id']:.0f} %), then lower by {fall}:"
        f" at the end {m['last']:+.1f} [{m['last_lo']:+.1f}, {m['last_hi']:+.1f}] (models and"
        f" images), which {gone} 0{many}."
    )


def saved(config, whole=True):
    """Testbed, lines and rows of --plot. `whole`: each file is one run, of whole evaluations."""
    paths = [Path(p) for p in sorted(glob.glob(config.plot))]
    beds = [p for p in paths if p.name == "testbed.csv"]
    beds = beds or [p.parent / "testbed.csv" for p in paths]
    if not beds or not beds[0].is_file():
        raise common.InputError(f"--plot {config.plot}: no trajectories, or no testbed.csv by them")
    testbed = testbeds.read_counts(beds[0])
    found = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
    paths = [p for p in paths if p.name not in ("testbed.csv", "by_image.csv")]
    rows = [r for p in paths for r in trajectories.read(p, len(found) if whole else None)]
    if not rows:
        raise common.InputError(f"--plot {config.plot}: no whole evaluation in {len(paths)} files")
    return testbed, found, rows


def replay(config):
    """--plot: the report of saved trajectories; the testbed's tables lie beside them."""
    testbed, found, rows = saved(config)
    folder = Path(sorted(glob.glob(config.plot))[0]).parent
    return report(config, testbed, found, rows, by_image=trajectories.read_plain(folder))
