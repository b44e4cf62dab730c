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

    a, b: ER on the two halves of the OOD images (E5). "mean" averages the shifts. Everything comes
    from counts and beta as saved; lo and hi are the saved interval.
    """
    shifts = [s for s in dict.fromkeys(r["shift"] for r in rows) if s != "mean"]
    parts = []
    for s in shifts if shift == "mean" else [shift]:
        own = sorted((r for r in rows if r["shift"] == s), key=lambda r: r["step"])
        counts = [c for c in trajectories.COLUMNS if c.startswith(("k_", "n_"))]
        names = "step", "epoch", "beta", *counts
        c = {name: np.array([r[name] for r in own]) for name in names}
        rest = (c["k_ood"] - c["k_half"]) / (c["n_ood"] - c["n_half"])
        ood = c["k_ood"] / c["n_ood"]
        part = {
            "id": c["k_id"] / c["n_id"],
            "val": c["k_val"] / np.maximum(c["n_val"], 1),
            "ood": ood,
        }
        part |= {"er": ood - c["beta"], "a": c["k_half"] / c["n_half"] - c["beta"]}
        part |= {"b": rest - c["beta"], "step": c["step"], "epoch": c["epoch"]}
        parts.append(part | {"k_nobody": c["k_nobody"], "n_nobody": c["n_nobody"]})
    of_shift = sorted((r for r in rows if r["shift"] == shift), key=lambda r: r["step"])
    out = {name: np.mean([p[name] for p in parts], 0) for name in parts[0]}
    k, n = (np.sum([p[x] for p in parts], 0) for x in ("k_nobody", "n_nobody"))
    out["alone"] = k / np.maximum(n, 1)
    return out | {x: np.array([r[f"er_{x}"] for r in of_shift]) for x in ("lo", "hi")}


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
    free = (c["b"][c["a"].argmax()] + c["a"][c["b"].argmax()]) / 2
    out = {"start": c["er"][0], "start_lo": c["lo"][0], "start_hi": c["hi"][0]}
    out |= {"max": c["er"][top], "max_median": max(smooth), "max_free": free}
    out |= {"max_id": c["id"][top], "max_epoch": c["epoch"][top]}
    out |= {"last": c["er"][-1], "last_lo": c["lo"][-1], "last_hi": c["hi"][-1]}
    last = max(rows, key=lambda r: r["step"])
    low, high = er_study.clopper_pearson(last["k_id"], last["n_id"])
    out |= {"last_id": c["id"][-1], "last_id_lo": low, "last_id_hi": high}
    out["best_val"] = c["er"][best]
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


def signed(points):
    return "-" if math.isnan(points) else f"{points:+.1f}"


def print_runs(groups, shift):
    """Table of ER through fine-tuning, mean over seeds; intervals are those of the images and the
    testbed, averaged over seeds, the SD is that over seeds.
    """
    lines = []
    for name, runs in groups.items():
        s = [summarise(rows, shift) for rows in runs.values()]
        mean = {k: 100 * np.mean([x[k] for x in s]) for k in s[0]}
        spread = f" sd {100 * np.std([x['last'] for x in s], ddof=1):.1f}" if len(s) > 1 else ""
        say = "{:+.1f} [{:+.1f}, {:+.1f}]".format
        cells = [say(*(mean[k] for k in ("start", "start_lo", "start_hi")))]
        cells += [signed(mean[k]) for k in ("max", "max_median", "max_free")]
        cells += [f"{mean['max_id']:.1f} / {mean['max_epoch'] / 100:.2g}"]
        cells += [
            "{:.1f} [{:.1f}, {:.1f}]".format(*(mean[f"last_id{x}"] for x in ("", "_lo", "_hi")))
        ]
        cells += [say(*(mean[k] for k in ("last", "last_lo", "last_hi"))) + spread]
        cells += [signed(mean[k]) for k in ("best_val", *(k for k in mean if k.startswith("at ")))]
        lines.append([name, *cells])
    header = ["ER in points", "start [95 %]", "max", "of medians", "unbiased", "at ID / epoch"]
    header += ["last ID [95 %]", "last ER [95 %]", "best val", "at ID 80", "90", "94"]
    every = "all shifts, those without a line too" if shift == "mean" else shift
    title = f"effective robustness on {every}; -: that ID accuracy is not passed"
    print("\n" + common.table(header, lines, title))


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


def figure(config, testbed, found, groups, shift):
    """Accuracies on logit axes, ER against ID accuracy and against steps, and what the runs get of
    the images that no testbed model gets right. From files alone.
    """
    fig, ((line_axis, er_axis), (step_axis, nobody_axis)) = common.new_figure(columns=2, rows=2)
    line = found[shift]
    rows = [testbed.row(m) for m in line.models]
    acc = testbed.accuracy(line.id)[rows], testbed.accuracy(shift)[rows]
    logit_axes(line_axis, 0.08, 0.99)
    draw_line(line_axis, line, *acc)
    own = er_study.effective_robustness(*acc, line.slope, line.intercept)
    er_axis.axhspan(100 * own.min(), 100 * own.max(), color="0.88")
    ticks = (10, 20, 30, 50, 70, 80, 90, 95, 98)
    er_axis.set(xticks=logit(np.array(ticks) / 100), xticklabels=ticks)
    er_axis.axvspan(logit(0.08), logit(line.low), color="0.96", lw=0)
    er_axis.set(xlim=logit([0.08, 0.985]), xlabel="ID accuracy, %", ylabel="ER, points")
    er_axis.set_title(
        f"ER on {shift}; dark: the testbed's own range, light: extrapolated", fontsize=8
    )
    numbers = [("testbed", m, "", *xy) for m, *xy in zip(line.models, *acc, strict=True)]
    for i, (name, runs) in enumerate(groups.items()):
        for j, of_run in enumerate(runs.values()):
            c = curve(of_run, shift)
            look = {"color": f"C{i}", "lw": 1, "ms": 2.5, "label": name if j == 0 else None}
            shown = np.clip(c["id"], 0.05, 0.995)
            line_axis.plot(logit(shown), logit(np.clip(c["ood"], 0.05, 0.995)), "o-", **look)
            er_axis.plot(logit(shown), 100 * c["er"], "o-", **look)
            step_axis.plot(np.maximum(c["step"], 0.5), 100 * c["er"], "o-", **look)
            nobody_axis.plot(logit(shown), 100 * curve(of_run, "mean")["alone"], "o-", **look)
            columns = [c[x] for x in ("step", "id", "ood", "er", "lo", "hi")]
            numbers += [(name, "", *row) for row in zip(*columns, strict=True)]
    for axis in (er_axis, step_axis):
        axis.axhline(0, color="0.4", lw=0.8)
    step_axis.set(xscale="log", xlabel="step (0 drawn at 1/2)", ylabel="ER, points")
    step_axis.set_title("the same, by step", fontsize=8)
    nobody_axis.set(xticks=er_axis.get_xticks(), xticklabels=ticks, xlim=er_axis.get_xlim())
    nobody_axis.set(xlabel="ID accuracy, %", ylabel="right, %")
    nobody_axis.set_title("of the images that no testbed model gets right, all shifts", fontsize=8)
    nobody_axis.legend(fontsize=7)
    header = ["series", "model", "step", "id", "ood", "er", "lo", "hi"]
    common.save_figure(fig, f"{config.out}/figures/er_study", header, numbers)


def best_line(found):
    """The shift whose line explains most, on which ER means most; from the testbed alone."""
    return max(found, key=lambda s: found[s].r2)


def report(config, testbed, found, rows, redraws=None):
    """Tables, figure and three sentences, from the testbed's counts and trajectory rows alone."""
    groups, shift = by_run(rows), best_line(found)
    print_lines(testbed, found, redraws)
    for s in (shift, "mean"):
        print_runs(groups, s)
    figure(config, testbed, found, groups, shift)
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
            if not name.startswith(init):
                continue
            found_in = [summarise(rows, shift) for rows in runs.values()]
            m = {k: 100 * np.mean([f[k] for f in found_in]) for k in found_in[0]}
            gone = "includes" if m["last_lo"] <= 0 <= m["last_hi"] else "excludes"
            sentences.append(
                f"{text} ({name}): ER on {shift} is {m['start']:+.1f} points at the start, at most"
                f" {m['max_free']:+.1f} (free of selection; it is at ID {m['max_id']:.0f} %),"
                f" and {m['last']:+.1f} [{m['last_lo']:+.1f}, {m['last_hi']:+.1f}] at the end,"
                f" which {gone} 0."
            )
    print()
    for number, text in enumerate(sentences, 1):
        print(textwrap.fill(f"{number}. {text}", 100, subsequent_indent="   "))


def replay(config):
    """--plot: the report of saved trajectories; the testbed's counts lie beside them."""
    paths = [Path(p) for p in sorted(glob.glob(config.plot))]
    beds = [p for p in paths if p.name == "testbed.csv"] or [
        p.parent / "testbed.csv" for p in paths
    ]
    if not beds or not beds[0].is_file():
        raise common.InputError(f"--plot {config.plot}: no trajectories, or no testbed.csv by them")
    testbed = testbeds.read_counts(beds[0])
    found = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
    rows = [r for p in paths if p.name != "testbed.csv" for r in trajectories.read(p, len(found))]
    return report(config, testbed, found, rows)
