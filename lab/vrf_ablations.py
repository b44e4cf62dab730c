"""The ablations and further figures of VRF (Sec. 5.3, Apps. B, C): sweeps over vrf.py's functions.

    python lab/vrf_ablations.py all                    # digits: all, 1 minute after vrf.py
    python lab/vrf_ablations.py grid --data /imagenet  # one; takes every flag of vrf.py

    ratio        Figs. 1b, 2, 13      why it works        sweep    Tabs. 8, 9, Fig. 5b  one alpha
    controls     Tab. 11, A6, A7      rows and bounds     grid     Tab. 10, Figs. 6, 10   a and b
    reference    Fig. 4               distance to V, all  linear   Tab. 4                  the LC
    k_share      Fig. 5c              k as a share of V   source   A3, Eq. 3          what V holds
    weights      Tab. 6, Fig. 6c      form of the weight  images   Fig. 7             near and far
    selective    Tabs. 5, 13          a model per sample  timing   Fig. 8              search by k
    mean_weight  Fig. 5a              by set              g_star   Fig. 9           least variance
    calibration  A6                   temperatures

Each prints its table, and most leave a PNG and a CSV in OUT/figures. Models, predictions and the
zero-shot errors on train are vrf.py's, from its caches. All but `controls` and `linear` study the
first model of --methods that has ensembles (E2E-FT), in the run --seed. alpha, a and b are chosen
on ID val wherever the paper's table does not sweep them.
"""

import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import vrf  # noqa: E402
from data.images import read_rgb  # noqa: E402


@dataclass
class Setting:
    """One seed and one fine-tuned model, as vrf.py's functions see it."""

    config: vrf.Config
    data: common.Data
    clip: common.Clip
    models: dict  # {name: Classifier}
    name: str  # of the fine-tuned model
    errors: vrf.ZeroShotErrors
    predictions: dict  # {split: {name: Prediction}}
    T: dict  # {name: temperature}
    raw: dict  # {split: Samples}
    calibrated: dict  # {split: Samples}
    outcome: vrf.Outcome

    @property
    def tests(self):
        """Names of the reported sets."""
        return [split for split in self.predictions if split != "val"]


def set_up(config, data, clip, zero_shot):
    """Setting of the first model with ensembles; trains only what vrf.py has not."""
    models = vrf.train_models(config, data, clip, zero_shot, config.seed)
    errors = vrf.zero_shot_errors(config, data, clip, models)
    if not errors:
        raise common.InputError("--methods, --ensemble: no model in both, so there is no ensemble")
    name, predictions = next(iter(errors)), vrf.predict_sets(config, data, clip, models)
    T = vrf.fit_temperatures(config, predictions["val"])
    raw = vrf.samples_of(predictions, name)
    calibrated = vrf.samples_of(predictions, name, T["ZS"], T[name])
    outcome = vrf.run_algorithm_1(config, errors[name], calibrated)
    sizes, (a, b) = f"|V| = {len(outcome.V)}, k = {outcome.k}", outcome.ab
    print(f"{name}, seed {config.seed}: {sizes}, a = {a:.3g}, b = {b:.3g}")
    seen = errors[name], predictions, T, raw, calibrated, outcome
    return Setting(config, data, clip, models, name, *seen)


def distances(config, sets, V, k):
    """{split: d [N]} of {split: Samples} to another V, or to another neighbour."""
    device, power = common.pick_device(config.device), 2 if config.distance == "code" else 1
    return {s: vrf.fast_knn(device, x.v, V, k) ** power for s, x in sets.items()}


def choose_ab(sets, d, grid, weight=vrf.weight):
    """The (a, b) that is best on ID val; of equals the first."""
    x = sets["val"]

    def accuracy(ab):
        return common.accuracy(vrf.vrf(x.p_zs, x.p_ft, weight(d["val"], *ab)), x.labels)

    return max(grid, key=accuracy)


def vrf_row(s, name, d, grid=None, weight=vrf.weight):
    """Table row of VRF with distances d {split: [N]}: (a, b) by ID val, then the accuracies."""
    ab = choose_ab(s.calibrated, d, grid or vrf.ab_grid(s.config), weight)
    return [name, "/".join(f"{x:.2g}" for x in ab), *vrf_percent(s, ab, d, weight)]


def vrf_percent(s, ab, d=None, weight=vrf.weight):
    """`percent` of VRF with this (a, b)."""
    d, mixed = d or s.outcome.d, {}
    for split in s.tests:
        x = s.calibrated[split]
        mixed[split] = vrf.vrf(x.p_zs, x.p_ft, weight(d[split], *ab))
    return percent(s, mixed)


def ose_percent(s, sets, alpha):
    """`percent` of OSE on {split: Samples}."""
    return percent(s, {x: vrf.ose(sets[x].p_zs, sets[x].p_ft, alpha) for x in s.tests})


def percent(s, scores):
    """[accuracy of every reported set, mean under shift] in %, of {split: scores [N, C]}."""
    share = {x: 100 * common.accuracy(scores[x], s.raw[x].labels) for x in s.tests}
    return [*share.values(), common.mean_shift(share)]


def print_table(title, header, rows):
    text = [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    print("\n" + common.table(header, text, title))


def columns(s, *first):
    return [*first, *s.tests, "avg shift"]


def figure(s, name, header, columns=1, rows=1):
    return common.figure(f"{s.config.out}/figures/{name}", header, columns, rows)


def draw(s, name, xlabel, ylabel, curves, line="o-", **settings):
    """A figure of one panel, and its CSV.  curves: {label: (xs, ys)}"""
    with figure(s, name, ["series", "x", "y"]) as (axes, numbers):
        for label, (xs, ys) in curves.items():
            axes[0, 0].plot(xs, ys, line, ms=3 if len(xs) > 1 else 7, label=label)
            numbers += [(label, x, y) for x, y in zip(xs, ys, strict=True)]
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, **settings)
        axes[0, 0].legend(fontsize=7)


# --- Figs. 1b, 2, 13: why it works ----------------------------------------------------------------


def ratio(s):
    """Figs. 1b, 2: Acc_ft / Acc_zs by distance, over all sets, and the weight; Fig. 13: by set."""
    rows, curves, d = [], {}, s.outcome.d
    for name in ("all sets", *s.tests):
        sets = {split: s.raw[split] for split in s.tests if name in ("all sets", split)}
        bins = ratio_by_distance(d, sets)
        curves[name] = [b[0] for b in bins], [b[1] for b in bins]
        for centre, r, zs, ft, n in bins:
            rows.append([name, f"{centre:.2f}", f"{r:.2f}", 100 * zs, 100 * ft, n])
    centres, ratios = curves.pop("all sets")
    w = vrf.weight(torch.tensor(centres), *s.outcome.ab).tolist()
    together = {"accuracy ratio, FT / ZS": (centres, ratios), "w(x), weight of FT": (centres, w)}
    title, xlabel = f"{s.name} against zero-shot", "d(x), distance to the zero-shot failures"
    draw(s, "distance", xlabel, "accuracy ratio; weight", together, title=title, ylim=(0, None))
    draw(s, "ratio", xlabel, "accuracy ratio, FT / ZS", curves, title=title, ylim=(0, None))
    print_table("Figs. 2, 13", ["set", "d", "ratio", "ZS, %", "FT, %", "n"], rows)


def ratio_by_distance(d, sets):
    """Fig. 2: the given sets are put together, and each window of d gives a row (centre, Acc_ft /
    Acc_zs, Acc_zs, Acc_ft, N). Where ZS is never right the ratio is nan: a gap in the curve.
    """
    zs = torch.cat([x.p_zs.argmax(1) == x.labels for x in sets.values()])
    ft = torch.cat([x.p_ft.argmax(1) == x.labels for x in sets.values()])
    d, rows = torch.cat([d[split] for split in sets]), []
    for low, centre, high in windows(d):
        inside = (d >= low) & (d <= high)
        n, right_zs, right_ft = int(inside.sum()), int(zs[inside].sum()), int(ft[inside].sum())
        ratio = right_ft / right_zs if right_zs else math.nan
        rows.append((centre, ratio, right_zs / max(n, 1), right_ft / max(n, 1), n))
    return rows


def windows(d):
    """(low, centre, high) over the bulk of d: 0.2 wide (App. C.7) every 0.1, or finer."""
    d = np.asarray(d)
    d = d[np.isfinite(d)]  # without a failure set d is infinite
    if len(d) == 0:
        return []
    low, high = np.quantile(d, 0.01), np.quantile(d, 0.99)
    step = min(0.1, max(high - low, 1e-3) / 8)
    return [(c - step, c, c + step) for c in np.arange(low, high + step / 2, step)]


# --- A6, A7, Tab. 11: rows that the paper's tables lack -------------------------------------------


def controls(s):
    """For every model with ensembles, mean over --seeds: OSE and LSE (Sec. 5.3) of the calibrated
    models, VRF of the others, and the bounds of tuning on the test sets.
    """
    rows = []
    for seed in range(s.config.seed, s.config.seed + s.config.seeds):
        models = vrf.train_models(s.config, s.data, s.clip, s.models["ZS"], seed)
        own_rows, studies = vrf.evaluate(s.config, s.data, s.clip, models, seed)
        errors = vrf.zero_shot_errors(s.config, s.data, s.clip, models)
        predictions = vrf.predict_sets(s.config, s.data, s.clip, models)
        T = vrf.fit_temperatures(s.config, predictions["val"])
        for name, (raw, calibrated, outcome) in studies.items():
            rows += oracles(vrf.ab_grid(s.config), name, seed, raw, calibrated, outcome.d)
            rows += [r for r in own_rows if r.ours and r.method.startswith(f"{name} +")]
            logits = logits_of(predictions, name, T["ZS"], T[name])
            rows.append(vrf.ose_row(f"{name} +LSE calibrated", seed, logits, ours=True))
            no_T = vrf.run_algorithm_1(s.config, errors[name], raw)
            right = vrf.right_images(no_T.p_vrf, raw)
            rows.append(common.Row(f"{name} +VRF raw", seed, right, no_T.ab, ours=True))
    title = "not in the paper's tables (A7); oracle: tuned on each test set itself (Tab. 11)"
    print("\n" + common.accuracy_table(rows, title))


def oracles(grid, name, seed, raw, calibrated, d):
    """Rows of OSE and VRF tuned on each test set itself: bounds, and no results."""
    right_ose, p_vrf = {}, {}
    for split in raw:
        if split == "val":
            continue
        tuned = {"val": raw[split], split: raw[split]}  # as if the test set were ID val
        right_ose[split] = vrf.ose_row("", seed, tuned).right[split]
        x = calibrated[split]
        ab = choose_ab({"val": x}, {"val": d[split]}, grid)
        p_vrf[split] = vrf.vrf(x.p_zs, x.p_ft, vrf.weight(d[split], *ab))
    right_vrf = vrf.right_images(p_vrf, calibrated)
    ose = common.Row(f"{name} +OSE oracle", seed, right_ose, ours=True)
    return [ose, common.Row(f"{name} +VRF oracle", seed, right_vrf, ours=True)]


def calibration(s):
    """A6: VRF without temperatures, with those that make confidence accuracy, exactly or as near as
    the authors' code does, and with those of least negative log-likelihood.
    """
    rows = []
    for criterion in ("off", "confidence", "code", "nll"):
        T = []
        for name in ("ZS", s.name):
            on_val = s.predictions["val"][name]
            if criterion == "code":
                T.append(code_temperature(on_val.logits, on_val.labels))
            else:
                T.append(common.temperature(on_val.logits, on_val.labels, criterion))
        sets = vrf.samples_of(s.predictions, s.name, *T)
        row = vrf_row(dataclasses.replace(s, calibrated=sets), criterion, s.outcome.d)
        rows.append([criterion, f"{T[0]:.2f}", f"{T[1]:.2f}", *row[1:]])
    print_table("temperatures (A6)", columns(s, "criterion", "T, ZS", "T, FT", "a/b"), rows)


def code_temperature(logits, labels):
    """A6: T as the authors' code searches it. Of a bracket, [0.1, 10] at first, it tries the point
    that divides it like the gaps |confidence - accuracy| of its ends, until this point's own gap is
    at most .001. The end with the larger gap moves there; a bracket beside the root is widened.
    """
    target, low, high = common.accuracy(logits, labels), 0.1, 10.0

    def confidence(T):
        return (logits / T).softmax(1).amax(1).mean().item()

    for _ in range(100):  # the code has no bound
        gap_low, gap_high = confidence(low) - target, target - confidence(high)
        share = abs(gap_low) / (abs(gap_low) + abs(gap_high))
        T = low + share * (high - low)
        if abs(confidence(T) - target) <= 0.001:
            return T
        if gap_high < 0:  # too sure even at the upper end
            high *= 1.1
        elif gap_low < 0:
            low /= 1.1
        elif gap_low < gap_high:
            high = T
        else:
            low = T
    return 1.0  # as common.temperature does where no T is right


# --- Sec. 5.2, App. C: sweeps ---------------------------------------------------------------------


def logits_of(predictions, name, T_zs=1.0, T_ft=1.0):
    """{split: Samples} with logits in the place of probabilities, so that OSE of them is LSE."""
    sets = vrf.samples_of(predictions, name)
    for split, of in predictions.items():
        sets[split].p_zs, sets[split].p_ft = of["ZS"].logits / T_zs, of[name].logits / T_ft
    return sets


def sweep(s):
    """Tabs. 8, 9, Figs. 5b, 10: every ensemble with one alpha, as in the tables and (A7) with VRF's
    temperatures; VRF with its own (a, b), mixing probabilities and, for Fig. 5b, logits.
    """
    logits = logits_of(s.predictions, s.name)
    calibrated_logits = logits_of(s.predictions, s.name, s.T["ZS"], s.T[s.name])
    ensembles = {"OSE": s.raw, "OSE calibrated": s.calibrated, "LSE": logits}
    ensembles |= {"LSE calibrated": calibrated_logits, "WSE": None}
    rows, curves = [], {}
    for name, sets in ensembles.items():
        for alpha in vrf.ALPHAS:
            found = wse_percent(s, alpha) if name == "WSE" else ose_percent(s, sets, alpha)
            rows.append([name, f"{alpha:.1f}", *found])
        curves[name] = [r[2] for r in rows if r[0] == name], [r[-1] for r in rows if r[0] == name]
    of_logits = dataclasses.replace(s, calibrated=calibrated_logits)
    for name, setting in (("VRF", s), ("VRF of logits", of_logits)):
        rows.append(vrf_row(setting, name, s.outcome.d))
        curves[name] = [rows[-1][2]], [rows[-1][-1]]
    draw(s, "sweep", "ID accuracy, %", "mean accuracy under shift, %", curves, title=s.name)
    print_table("Tabs. 8, 9", columns(s, "ensemble", "alpha, a/b"), rows)


def wse_percent(s, alpha):
    """`percent` of WSE."""
    mixed, scores = copy.deepcopy(s.models["ZS"]), {}
    zs, ft = s.models["ZS"].state_dict(), s.models[s.name].state_dict()
    mixed.load_state_dict(vrf.wse(zs, ft, alpha))
    for split in (s.data.test, *s.data.shifts):
        scores[split.name] = common.predict(s.config, {"": mixed}, split, s.clip)[""].logits
    return percent(s, scores)


def grid(s):
    """Tab. 10, Figs. 6, 10: ID and shifts over a, around the chosen one, and b."""
    as_table_10 = s.data.kind == "imagenet" and s.config.distance == "code"
    around = [s.outcome.ab[0] * x for x in (0.5, 0.75, 1, 1.25, 1.5)]
    b_values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 5.0, 10.0, 20.0]
    rows, header = [], columns(s, "a", "b")
    ose = [ose_percent(s, s.raw, alpha) for alpha in vrf.ALPHAS]
    with figure(s, "grid", header, columns=3) as (axes, numbers):
        left, middle, right = axes[0]
        for a in (1.4, 1.5, 1.6) if as_table_10 else around:
            of_a = [[f"{a:.3g}", b, *vrf_percent(s, (a, b))] for b in b_values]
            on_id, shift = [row[2] for row in of_a], [row[-1] for row in of_a]
            left.semilogx(b_values, on_id, "o-", ms=3, label=f"a = {a:.3g}")
            middle.semilogx(b_values, shift, "o-", ms=3)
            right.plot(on_id, shift, "o", ms=3)
            rows += of_a
        right.plot([x[0] for x in ose], [x[-1] for x in ose], color="tab:pink", label="OSE")
        left.set(xlabel="b", ylabel="ID accuracy, %")
        middle.set(xlabel="b", ylabel="mean accuracy under shift, %")
        right.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        left.legend()
        right.legend()
        numbers += rows
    print_table("Tab. 10", header, rows)


def linear(s):
    """Tab. 4: the linear classifier. There WSE is OSE of logits, not of probabilities (A12)."""
    if "LC" not in s.models:
        print("\nlinear: left out, it needs LC among --methods")
        return
    config = dataclasses.replace(s.config, ensemble="LC")
    models = {name: s.models[name] for name in ("ZS", "LC")}
    rows, _ = vrf.evaluate(config, s.data, s.clip, models, config.seed)
    print("\n" + common.accuracy_table(rows, "Tab. 4: linear classifier"))


# --- Sec. 5.3: what the distance is ---------------------------------------------------------------


def train_features(s):
    """[N, D] normalised FT features of all of train, [N] labels; from the cache."""
    model = s.models[s.name]
    features, labels = common.frozen_features(s.config, model, s.data.train, s.clip)
    return F.normalize(features, dim=1), labels


def neighbours_of(s, V):
    return vrf.neighbours(len(V), s.errors.n_train, s.config.k_rule, s.config.p)


def k_share(s):
    """Fig. 5c: k as a share of |V|; the paper's shares and 1 %."""
    rows, shares, size = [], (0.000001, 0.0001, 0.0005, 0.001, 0.01, 0.1, 0.5), len(s.outcome.V)
    for p in shares:
        k = vrf.neighbours(size, s.errors.n_train, "paper", p)
        d = distances(s.config, s.calibrated, s.outcome.V, k)
        rows.append([f"{100 * p:.4g}", k, *vrf_row(s, "", d)[1:]])
    percents = [100 * p for p in shares]
    curves = {"ID": (percents, [r[3] for r in rows])}
    curves["mean under shift"] = percents, [r[-1] for r in rows]
    draw(s, "k", "k, % of |V|", "accuracy, %", curves, xscale="log")
    print_table(f"Fig. 5c, |V| = {size}", columns(s, "p, %", "k", "a/b"), rows)


def reference(s):
    """Fig. 4: distance to V against distance to all of train; k is the same share of each."""
    everything, _ = train_features(s)
    tests, rows, curves = {split: s.raw[split] for split in s.tests}, [], {}
    for name, V in (("V", s.outcome.V), ("all of train", everything)):
        d = distances(s.config, s.calibrated, V, neighbours_of(s, V))
        rows.append(vrf_row(s, name, d))
        bins = ratio_by_distance(d, tests)
        curves[name] = [b[0] for b in bins], [b[1] for b in bins]
    draw(s, "reference", "distance", "Acc$_{ft}$ / Acc$_{zs}$", curves)
    print_table("Fig. 4", columns(s, "to", "a/b"), rows)


def source(s):
    """What V holds. A3: features of the fine-tuned encoder, as in paper and code, or of the
    zero-shot one. Eq. (3): the errors that FT mends, or all of ZS's, as the abstract's wording is.
    """
    every = F.normalize(s.errors.features, dim=1)
    d = distances(s.config, s.calibrated, every, neighbours_of(s, every))
    rows = [vrf_row(s, "FT's, Eq. (3)", s.outcome.d), vrf_row(s, "FT's, all errors", d)]
    V, sets = zero_shot_failures(s), {}
    for split, x in s.calibrated.items():
        v = F.normalize(s.predictions[split]["ZS"].features, dim=1)
        sets[split] = dataclasses.replace(x, v=v)
    d = distances(s.config, sets, V, neighbours_of(s, V))
    rows.append(vrf_row(s, "ZS's, Eq. (3)", d))
    print_table("features in V (A3, Eq. 3)", columns(s, "features", "a/b"), rows)


def zero_shot_failures(s):
    """V of Eq. (3) with the zero-shot encoder's features.  [M, D]"""
    mended = vrf.failures(s.errors.predicted_zs, s.errors.predicted_ft, s.errors.labels)
    index, train = s.errors.index[mended].numpy(), s.data.train
    in_memory = isinstance(train.images, np.ndarray)
    images = train.images[index] if in_memory else [train.images[i] for i in index]
    part = dataclasses.replace(train, images=images, labels=train.labels[index])
    predicted = common.predict(s.config, {"ZS": s.models["ZS"]}, part, s.clip)["ZS"]
    return F.normalize(predicted.features, dim=1)


def binary_weight(d, a, b):
    """Sec. 5.3: w = 1[d < a]; b has no part in it.  [N] -> [N]"""
    return (d < a).to(d.dtype)


def linear_weight(d, a, b):
    """Sec. 5.3: w = -b (d - a), clamped to [0, 1].  [N] -> [N]"""
    return (-b * (d - a)).clamp(0, 1)


def weights(s):
    """Tab. 6, Fig. 6c: the form of the weight, each with (a, b) of its own by ID val."""
    a_values = [i / 20 for i in range(1, 61)]
    slopes = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
    forms = [
        ("binary", binary_weight, [(a, 1.0) for a in a_values]),
        ("linear", linear_weight, [(a, b) for a in a_values for b in slopes]),
        ("sigmoid", vrf.weight, vrf.ab_grid(s.config)),
    ]
    d, rows, curves = torch.linspace(0, 2, 201), [], {}
    for name, weight, points in forms:
        rows.append(vrf_row(s, name, s.outcome.d, points, weight))
        a, b = choose_ab(s.calibrated, s.outcome.d, points, weight)
        curves[f"{name}, a = {a:.2g}, b = {b:.2g}"] = d.tolist(), weight(d, a, b).tolist()
    draw(s, "weights", "d(x)", "w(x)", curves, line="-")
    print_table("Tab. 6", columns(s, "w", "a/b"), rows)


def mean_weight(s):
    """Fig. 5a: mean weight of the fine-tuned model by set; it should be highest on ID."""
    rows = []
    for split in s.tests:
        d = s.outcome.d[split]
        rows.append([split, len(d), f"{vrf.weight(d, *s.outcome.ab).mean():.3f}"])
    print_table("Fig. 5a", ["set", "n", "mean w"], rows)


# --- Sec. 5.3, Eqs. (12), (13): selective prediction ----------------------------------------------


def selective(s):
    """Tabs. 5, 13. Eq. (12): f_ft(x) if G(x) = ID, else f_zs(x). Eq. (13): G(x) = ID iff S(x) >= l.

    l lets 95 % of ID val through. Ours, since the paper states none: energy at T = 1, one
    shared covariance with ridge 1e-6 of its mean variance, k = 50 neighbours, normalised features.
    """
    x, y = train_features(s)
    class_wise, background = gaussians(x, y), gaussians(x, torch.zeros_like(y))
    logits, scores, rows = logits_of(s.predictions, s.name), {}, []
    for split, of in logits.items():
        scores[split] = detector_scores(of.v, of.p_ft, x, class_wise, background)
    for name in scores["val"]:
        threshold, chosen = torch.quantile(scores["val"][name].double(), 0.05), {}
        for split in s.tests:
            is_id, of = scores[split][name] >= threshold, logits[split]
            chosen[split] = torch.where(is_id[:, None], of.p_ft, of.p_zs)
        rows.append([name, *percent(s, chosen)])
    rows.append(["VRF", *vrf_percent(s, s.outcome.ab)])
    print_table("Tabs. 5, 13", columns(s, "detector"), rows)


def detector_scores(v, logits, x, class_wise, background):
    """{detector: S [N]}, higher is more ID. v [N, D], logits [N, C], x [M, D] are the FT model's,
    x of train; the last two: `gaussians` of its classes and of all of it.
    """
    by_class, by_all = mahalanobis(v, *class_wise), mahalanobis(v, *background)
    return {
        "MSP": logits.softmax(1).amax(1),
        "Energy": logits.logsumexp(1),
        "Mahalanobis": -by_class,
        "kNN": -vrf.knn_kth_distance(v, x, min(50, len(x))),
        "Relative Mahalanobis": by_all - by_class,
    }


def gaussians(x, y):
    """Class means of (x, y) and a root R of their shared precision, |R^T z|^2 = z^T cov^-1 z.
    [M, D], [M] -> fp64 [C, D], [D, D]
    """
    x, classes = x.double(), y.unique()
    means = torch.stack([x[y == c].mean(0) for c in classes])
    centred = x - means[torch.searchsorted(classes, y)]
    cov = centred.T @ centred / len(x)
    cov += 1e-6 * cov.diagonal().mean() * torch.eye(len(cov), dtype=torch.double)
    return means, torch.linalg.cholesky(torch.linalg.inv(cov))


def mahalanobis(v, means, root):
    """Least squared Mahalanobis distance of v to a class mean.  [N, D] -> [N], fp64"""
    return torch.cdist(v.double() @ root, means @ root).square().amin(1)


# --- App. B, Eqs. (11), (14), (15) ----------------------------------------------------------------


def best_weight(var_zs, var_ft, cov=0.0):
    """Eq. (15): g_ft = (V_zs - Cov) / (V_zs + V_ft - 2 Cov); Eq. (11) is Cov = 0.  any shape"""
    return (var_zs - cov) / (var_zs + var_ft - 2 * cov)


def mixed_variance(g_ft, var_zs, var_ft, cov):
    """Eq. (14): V[eta_vrf] = g_zs^2 V_zs + g_ft^2 V_ft + 2 g_zs g_ft Cov, g_zs = 1 - g_ft."""
    return (1 - g_ft) ** 2 * var_zs + g_ft**2 * var_ft + 2 * (1 - g_ft) * g_ft * cov


def pooled(s, field):
    """At the true classes of all reported images: probability less 1, and whether the model errs.
    field: "p_zs" or "p_ft".  -> fp64 [N], bool [N]
    """
    eta, wrong = [], []
    for split in s.tests:
        labels = s.raw[split].labels
        calibrated, raw = getattr(s.calibrated[split], field), getattr(s.raw[split], field)
        eta.append(calibrated.gather(1, labels[:, None])[:, 0] - 1)
        wrong.append(raw.argmax(1) != labels)
    return torch.cat(eta).double().numpy(), torch.cat(wrong).numpy()


def g_star(s):
    """Fig. 9: g* by distance, pooled over ID and shifts, from calibrated probabilities.

    eta = P(y|x) - 1 at the true class y, its variance over the samples of a window: the paper does
    not say over what (A13). Beside it the plug-in of Eq. (11) with 1 - accuracy for E.
    """
    d = torch.cat([s.outcome.d[split] for split in s.tests]).numpy()
    (eta_zs, wrong_zs), (eta_ft, wrong_ft) = pooled(s, "p_zs"), pooled(s, "p_ft")
    values, rows = [], []
    for low, centre, high in windows(d):
        inside = (d >= low) & (d <= high)
        if inside.sum() < 2:
            continue
        cov = np.cov(eta_zs[inside], eta_ft[inside])
        star = best_weight(cov[0, 0], cov[1, 1], cov[0, 1])
        errors = wrong_zs[inside].mean(), wrong_ft[inside].mean()
        plug_in = best_weight(*errors) if sum(errors) else math.nan
        w = vrf.weight(torch.tensor(centre), *s.outcome.ab).item()
        values.append((centre, star, plug_in, w))
        weights = (f"{v:.3f}" for v in values[-1][1:])
        rows.append([f"{centre:.2f}", *weights, int(inside.sum())])
    curves = {}
    for i, name in enumerate(("g*, Eq. 15", "Eq. 11 with 1 - accuracy", "w(d), Eq. 6"), 1):
        curves[name] = [v[0] for v in values], [v[i] for v in values]
    draw(s, "g", "d(x)", "weight of the fine-tuned model", curves)
    print_table("Fig. 9", ["d", "g* (15)", "(11), 1 - acc", "w (6)", "n"], rows)


# --- Figs. 7, 8 -----------------------------------------------------------------------------------


def images(s):
    """Fig. 7: eight random of the 100 smallest d, and of the 100 largest, over all sets."""
    splits = {x.name: x for x in (s.data.test, *s.data.shifts)}
    where = [(name, i) for name, x in splits.items() for i in range(len(x.labels))]
    d = torch.cat([s.outcome.d[name] for name in splits])
    order, rng = d.argsort(), np.random.default_rng(s.config.seed)
    rows, header = [], ["pool", "set", "index", "d"]
    with figure(s, "images", header, columns=8, rows=2) as (axes, numbers):
        axes[0, 0].figure.set_size_inches(12, 3.4)
        for line, (name, pool) in enumerate((("nearest", order[:100]), ("farthest", order[-100:]))):
            chosen = rng.choice(pool.numpy(), min(8, len(pool)), replace=False)
            for axis, i in zip(axes[line], chosen, strict=False):
                split, index = where[i]
                axis.imshow(read_rgb(splits[split].images[index]))
                axis.set_title(f"{split}, d = {d[i]:.2f}", fontsize=7)
                axis.axis("off")
                rows.append([name, split, index, f"{d[i]:.3f}"])
        numbers += rows
    print_table("Fig. 7", header, rows)


def timing(s):
    """Fig. 8: ms per image of the exact search in PyTorch, k = 1, 2, 4 ... 512; median of 5."""
    device = common.pick_device(s.config.device)
    v, V = s.raw[common.ID].v[:1000].to(device), s.outcome.V.to(device)
    ks, ms = [k for k in (2**exponent for exponent in range(10)) if k <= len(V)], []
    for k in ks:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            vrf.knn_kth_distance(v, V, k).cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        ms.append(1000 * np.median(seconds[1:]) / len(v))
    where = f"{torch.get_num_threads()} threads of the CPU"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    draw(s, "timing", "k", "ms per image", {where: (ks, ms)}, xscale="log", ylim=(0, None))
    rows = [[k, f"{x:.4f}"] for k, x in zip(ks, ms, strict=True)]
    size = f"{len(v)} queries, V {len(V)} x {v.shape[1]}"
    print_table(f"Fig. 8: {where}, {size}", ["k", "ms/image"], rows)


ABLATIONS = [ratio, controls, calibration, sweep, grid, linear, reference, k_share, source, weights]
ABLATIONS += [selective, mean_weight, g_star, images, timing]
ABLATIONS = {ablation.__name__: ablation for ablation in ABLATIONS}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    setting = set_up(*vrf.prepare(argv[1:]))
    for name in names:
        ABLATIONS[name](setting)


if __name__ == "__main__":
    common.run(main)
