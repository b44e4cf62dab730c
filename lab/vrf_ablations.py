"""The ablations and further figures of VRF (Sec. 5.3, Apps. B, C): sweeps over vrf.py's functions.

    python lab/vrf_ablations.py all                    # digits: all, 1 minute after vrf.py
    python lab/vrf_ablations.py grid --data /imagenet  # one; takes every flag of vrf.py

    ratio        Figs. 1b, 2, 13  why it works       sweep     Tabs. 8, 9, Fig. 5b  one alpha
    controls     Tab. 11, A6, A7  rows and bounds    grid      Tab. 10, Figs. 6, 10 a and b
    reference    Fig. 4           distance to all    source    A3, Eq. 3            what V holds
    k_share      Fig. 5c          share k of V       selective Tabs. 5, 13          ZS or FT
    weights      Tab. 6, Fig. 6c  form of w          g_star    Fig. 9               least variance
    mean_weight  Fig. 5a          by set             images    Fig. 7               near and far

Tab. 4, the linear classifier, is `python vrf.py --methods LC --ensemble LC`.

Each prints its table, and most leave a PNG and a CSV in OUT/figures. Models, predictions and the
failure sets are vrf.py's, from its caches. All but `controls` study the first model of --methods
that has ensembles (E2E-FT), in the run --seed. alpha, a and b are chosen on ID val wherever the
paper's table does not sweep them.
"""

import copy
import dataclasses
import math
import sys
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
    V: torch.Tensor  # [M, D], its failure set
    predictions: dict  # {split: {name: Prediction}}
    T: dict  # {name: temperature}
    raw: dict  # {split: Samples}
    calibrated: dict  # {split: Samples}
    outcome: vrf.Outcome

    @property
    def tests(self):
        """Names of the reported sets."""
        return [split for split in self.predictions if split != "val"]


def settings(config, data, clip, zero_shot):
    """A Setting of each model with ensembles, of run --seed; trains only what vrf.py has not."""
    models = vrf.train_models(config, data, clip, zero_shot, config.seed)
    predictions = vrf.predict_sets(config, data, clip, models)
    T, found = vrf.fit_temperatures(config, predictions["val"]), []
    for name, V in vrf.failure_sets(config, data, clip, models).items():
        raw = vrf.samples_of(predictions, name)
        calibrated = vrf.samples_of(predictions, name, T["ZS"], T[name])
        outcome = vrf.run_algorithm_1(config, V, k_of(config, data, V), calibrated)
        seen = predictions, T, raw, calibrated, outcome
        found.append(Setting(config, data, clip, models, name, V, *seen))
    return found


def k_of(config, data, V):
    return vrf.neighbour_count(len(V), len(data.train.labels), config.k_rule, config.p)


def rerun(s, sets, V):
    """Outcome of Algorithm 1 with other {split: Samples} or another V."""
    return vrf.run_algorithm_1(s.config, V, k_of(s.config, s.data, V), sets)


def mixed(s, split, ab, weight=vrf.weight):
    """P_vrf of a split with this (a, b) and this form of the weight.  -> [N, C]"""
    x = s.calibrated[split]
    return vrf.vrf(x.p_zs, x.p_ft, weight(s.outcome.d[split], *ab))


def mixed_percent(s, ab, weight=vrf.weight):
    return percent(s, {split: mixed(s, split, ab, weight) for split in s.tests})


def percent(s, scores):
    """[accuracy of every reported set, mean under shift] in %, of {split: scores [N, C]}."""
    share = {x: 100 * common.accuracy(scores[x], s.raw[x].labels) for x in s.tests}
    return [*share.values(), common.mean_shift(share)]


def vrf_cells(s, outcome):
    """["a/b", *percent] of Algorithm 1's Outcome."""
    return ["/".join(f"{x:.2g}" for x in outcome.ab), *percent(s, outcome.p_vrf)]


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
    rows, curves = [], {}
    for name in ("all sets", *s.tests):
        sets = {split: s.raw[split] for split in s.tests if name in ("all sets", split)}
        bins = ratio_by_distance(s.outcome.d, sets)
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
    rows = []
    for centre, inside in windows(torch.cat([d[split] for split in sets])):
        n, right_zs, right_ft = len(inside), int(zs[inside].sum()), int(ft[inside].sum())
        ratio = right_ft / right_zs if right_zs else math.nan
        rows.append((centre, ratio, right_zs / max(n, 1), right_ft / max(n, 1), n))
    return rows


def windows(d):
    """(centre, indices inside) over the bulk of d [N]: 0.2 wide (App. C.7) every 0.1, or finer."""
    d = d.numpy()
    finite = d[np.isfinite(d)]  # without a failure set d is infinite
    if len(finite) == 0:
        return []
    low, high = np.quantile(finite, [0.01, 0.99])
    step = min(0.1, max(high - low, 1e-3) / 8)
    centres = np.arange(low, high + step / 2, step)
    return [(c, np.flatnonzero((d >= c - step) & (d <= c + step))) for c in centres]


# --- A6, A7, Tab. 11: rows that the paper's tables lack -------------------------------------------


def controls(s):
    """For every model with ensembles, mean over --seeds: what of VRF's gain is its temperatures'
    (A7) and its choice among ties (A11), and the bounds of tuning on the test sets.
    """
    rows = []
    for seed in range(s.config.seed, s.config.seed + s.config.seeds):
        config = dataclasses.replace(s.config, seed=seed)
        for of_model in settings(config, s.data, s.clip, s.models["ZS"]):
            rows += control_rows(of_model) + oracles(of_model)
    title = "not in the paper's tables (A7); oracle: tuned on each test set itself (Tab. 11)"
    print("\n" + common.accuracy_table(rows, title))
    say = "{:+.2f} [{:+.2f}, {:+.2f}]".format
    for name in dict.fromkeys(row.method.split(" +")[0] for row in rows):
        pairs = [(vrf_row, "OSE") for vrf_row in ("VRF", "VRF, mean of ties", "VRF, least of ties")]
        for method, base in (*pairs, ("VRF", "OSE calibrated")):
            on_id, shift = common.gain(rows, f"{name} +{method}", f"{name} +{base}")
            print(f"{name}: {method} less {base}: {say(*on_id)} on ID, {say(*shift)} under shift")


def control_rows(s):
    """OSE; VRF, also by the other (a, b) that tie on ID val; OSE and LSE (Sec. 5.3) of the same
    calibrated models; VRF of models without temperatures and of those whose temperatures have the
    least negative log-likelihood (A6).
    """
    name, seed, rows = s.name, s.config.seed, []
    rows.append(vrf.ose_row(f"{name} +OSE", seed, s.raw))
    rows.append(vrf.row_of(f"{name} +VRF", seed, s.outcome.p_vrf, s.raw, s.outcome.ab))
    rows += tied_rows(s)
    rows.append(vrf.ose_row(f"{name} +OSE calibrated", seed, s.calibrated))
    half = vrf.ose_scores(s.calibrated, 0.5)
    rows.append(vrf.row_of(f"{name} +OSE calibrated, alpha 1/2", seed, half, s.raw, 0.5))
    logits = logits_of(s, s.T["ZS"], s.T[name])
    rows.append(vrf.ose_row(f"{name} +LSE calibrated", seed, logits))
    on_val = [s.predictions["val"][model] for model in ("ZS", name)]
    T_nll = [common.temperature(x.logits, x.labels, "nll") for x in on_val]
    by_nll = vrf.samples_of(s.predictions, name, *T_nll)
    for title, sets in (("VRF raw", s.raw), ("VRF, T by NLL", by_nll)):
        outcome = rerun(s, sets, s.V)
        rows.append(vrf.row_of(f"{name} +{title}", seed, outcome.p_vrf, s.raw, outcome.ab))
    return rows


def tied_rows(s):
    """VRF by the pairs (a, b) that are all best on ID val (A11): the mean over them, and the one
    that is least accurate under shift, which is a bound and no result.
    """
    method, rows = f"{s.name} +VRF, least of ties", []
    for ab in vrf.ab_grid(s.config):
        p = {}
        for split, x in s.calibrated.items():
            p[split] = vrf.vrf(x.p_zs, x.p_ft, vrf.weight(s.outcome.d[split], *ab))
        on_val = common.accuracy(p.pop("val"), s.calibrated["val"].labels)
        rows.append((on_val, vrf.row_of(method, s.config.seed, p, s.raw, ab)))
    best = max(on_val for on_val, _ in rows)
    tied = [row for on_val, row in rows if on_val == best]
    share = {x: torch.stack([r.right[x].double() for r in tied]).mean(0) for x in tied[0].right}
    mean = common.Row(f"{s.name} +VRF, mean of ties", s.config.seed, share)

    def under_shift(row):
        return common.mean_shift(common.accuracies([row], method))

    return [mean, min(tied, key=under_shift)]


def oracles(s):
    """Rows of OSE and VRF tuned on each test set itself: bounds, and no results."""
    right_ose, p_vrf = {}, {}
    for split in s.tests:
        raw, calibrated = s.raw[split], s.calibrated[split]  # as if the test set were ID val
        right_ose[split] = vrf.ose_row("", 0, {"val": raw, split: raw}).right[split]
        p_vrf[split] = rerun(s, {"val": calibrated, split: calibrated}, s.V).p_vrf[split]
    ose = common.Row(f"{s.name} +OSE oracle", s.config.seed, right_ose)
    return [ose, vrf.row_of(f"{s.name} +VRF oracle", s.config.seed, p_vrf, s.raw)]


# --- Sec. 5.2, App. C: sweeps ---------------------------------------------------------------------


def logits_of(s, T_zs=1.0, T_ft=1.0):
    """{split: Samples} with logits in the place of probabilities, so that OSE of them is LSE."""
    sets = {}
    for split, of in s.predictions.items():
        logits = {"p_zs": of["ZS"].logits / T_zs, "p_ft": of[s.name].logits / T_ft}
        sets[split] = dataclasses.replace(s.raw[split], **logits)
    return sets


def sweep(s):
    """Tabs. 8, 9, Figs. 5b, 10: every ensemble with one alpha, as in the tables and (A7) with VRF's
    temperatures; VRF with its own (a, b), mixing probabilities and, for Fig. 5b, logits.
    """
    calibrated_logits = logits_of(s, s.T["ZS"], s.T[s.name])
    ensembles = {"OSE": s.raw, "OSE calibrated": s.calibrated, "LSE": logits_of(s)}
    ensembles |= {"LSE calibrated": calibrated_logits, "WSE": None}
    rows, curves = [], {}
    for name, sets in ensembles.items():
        for alpha in vrf.ALPHAS:
            scores = wse_scores(s, alpha) if name == "WSE" else vrf.ose_scores(sets, alpha)
            rows.append([name, f"{alpha:.1f}", *percent(s, scores)])
        curves[name] = [r[2] for r in rows if r[0] == name], [r[-1] for r in rows if r[0] == name]
    of_logits = rerun(s, calibrated_logits, s.V)
    for name, outcome in (("VRF", s.outcome), ("VRF of logits", of_logits)):
        rows.append([name, *vrf_cells(s, outcome)])
        curves[name] = [rows[-1][2]], [rows[-1][-1]]
    draw(s, "sweep", "ID accuracy, %", "mean accuracy under shift, %", curves, title=s.name)
    print_table("Tabs. 8, 9", columns(s, "ensemble", "alpha, a/b"), rows)


def wse_scores(s, alpha):
    """{test set: logits [N, C]} of WSE."""
    model, scores = copy.deepcopy(s.models["ZS"]), {}
    zs, ft = s.models["ZS"].state_dict(), s.models[s.name].state_dict()
    model.load_state_dict(vrf.wse(zs, ft, alpha))
    for split in (s.data.test, *s.data.shifts):
        scores[split.name] = common.predict(s.config, {"": model}, split, s.clip)[""].logits
    return scores


def grid(s):
    """Tab. 10, Figs. 6, 10: ID and shifts over a, around the chosen one, and b."""
    around = [s.outcome.ab[0] * x for x in (0.5, 0.75, 1, 1.25, 1.5)]
    a_values = [1.4, 1.5, 1.6] if s.data.kind == "imagenet" else around
    b_values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 5.0, 10.0, 20.0]
    rows, header = [], columns(s, "a", "b")
    ose = [percent(s, vrf.ose_scores(s.raw, alpha)) for alpha in vrf.ALPHAS]
    with figure(s, "grid", header, columns=3) as (axes, numbers):
        left, middle, right = axes[0]
        for a in a_values:
            of_a = [[f"{a:.3g}", b, *mixed_percent(s, (a, b))] for b in b_values]
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


# --- Sec. 5.3: what the distance is ---------------------------------------------------------------


def k_share(s):
    """Fig. 5c: k as a share of |V|; the paper's shares and 1 %."""
    rows, shares, size = [], (0.000001, 0.0001, 0.0005, 0.001, 0.01, 0.1, 0.5), len(s.V)
    for p in shares:
        k = vrf.neighbour_count(size, len(s.data.train.labels), "paper", p)
        outcome = vrf.run_algorithm_1(s.config, s.V, k, s.calibrated)
        rows.append([f"{100 * p:.4g}", k, *vrf_cells(s, outcome)])
    percents = [100 * p for p in shares]
    curves = {"ID": (percents, [r[3] for r in rows])}
    curves["mean under shift"] = percents, [r[-1] for r in rows]
    draw(s, "k", "k, % of |V|", "accuracy, %", curves, xscale="log")
    print_table(f"Fig. 5c, |V| = {size}", columns(s, "p, %", "k", "a/b"), rows)


def train_features(s, name):
    """Raw features [N, D] and labels [N] of all of train, as the model `name` sees it."""
    return common.frozen_features(s.config, s.models[name], s.data.train, s.clip)


def reference(s):
    """Fig. 4: distance to V against distance to all of train; k is the same share of each."""
    everything = F.normalize(train_features(s, s.name)[0], dim=1)
    tests, rows, curves = {split: s.raw[split] for split in s.tests}, [], {}
    for name, V in (("V", s.V), ("all of train", everything)):
        outcome = rerun(s, s.calibrated, V)
        rows.append([name, *vrf_cells(s, outcome)])
        bins = ratio_by_distance(outcome.d, tests)
        curves[name] = [b[0] for b in bins], [b[1] for b in bins]
    draw(s, "reference", "distance", "Acc$_{ft}$ / Acc$_{zs}$", curves)
    print_table("Fig. 4", columns(s, "to", "a/b"), rows)


def source(s):
    """What V holds. A3: features of the fine-tuned encoder, as in paper and code, or of the
    zero-shot one. Eq. (3): the errors that FT mends, or all of ZS's, as the abstract's wording is.
    """
    every, V_zs = zero_shot_errors(s)
    sets = {}
    for split, x in s.calibrated.items():
        v = F.normalize(s.predictions[split]["ZS"].features, dim=1)
        sets[split] = dataclasses.replace(x, v=v)
    outcomes = {"FT's, Eq. (3)": s.outcome, "FT's, all errors": rerun(s, s.calibrated, every)}
    outcomes["ZS's, Eq. (3)"] = rerun(s, sets, V_zs)
    rows = [[name, *vrf_cells(s, outcome)] for name, outcome in outcomes.items()]
    print_table("features in V (A3, Eq. 3)", columns(s, "features", "a/b"), rows)


@torch.inference_mode()
def zero_shot_errors(s):
    """Features, of length 1, of training samples that ZS gets wrong: FT's of all of them [W, D],
    and ZS's of those that FT gets right [M, D].
    """
    features, predicted = {}, {}
    for name in ("ZS", s.name):
        features[name], labels = train_features(s, name)
        parts = features[name].to(s.models[name].head.weight.device).split(4096)
        logits = s.models[name].classify
        predicted[name] = torch.cat([logits(x).argmax(1) for x in parts]).cpu()
    every = F.normalize(features[s.name][predicted["ZS"] != labels], dim=1)
    return every, vrf.failures(features["ZS"], predicted["ZS"], predicted[s.name], labels)


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

        def accuracy_on_val(ab, weight=weight):
            return common.accuracy(mixed(s, "val", ab, weight), s.raw["val"].labels)

        a, b = max(points, key=accuracy_on_val)
        rows.append([name, f"{a:.2g}/{b:.2g}", *mixed_percent(s, (a, b), weight)])
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
    x, y = train_features(s, s.name)
    x = F.normalize(x, dim=1)
    class_wise, background = gaussians(x, y), gaussians(x, torch.zeros_like(y))
    logits, scores, rows = logits_of(s), {}, []
    for split, of in logits.items():
        scores[split] = detector_scores(of.v, of.p_ft, x, class_wise, background)
    for name in scores["val"]:
        threshold, chosen = torch.quantile(scores["val"][name].double(), 0.05), {}
        for split in s.tests:
            is_id, of = scores[split][name] >= threshold, logits[split]
            chosen[split] = torch.where(is_id[:, None], of.p_ft, of.p_zs)
        rows.append([name, *percent(s, chosen)])
    rows.append(["VRF", *percent(s, s.outcome.p_vrf)])
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


def at_true_class(s, field):
    """Of all reported images, with field "p_zs" or "p_ft" of the calibrated models: probability of
    the true class less 1, and whether the model errs.  -> fp64 [N], bool [N]
    """
    eta, wrong = [], []
    for split in s.tests:
        labels, p = s.calibrated[split].labels, getattr(s.calibrated[split], field)
        eta.append(p.gather(1, labels[:, None])[:, 0] - 1)
        wrong.append(p.argmax(1) != labels)
    return torch.cat(eta).double().numpy(), torch.cat(wrong).numpy()


def g_star(s):
    """Fig. 9: g* by distance, pooled over ID and shifts, from calibrated probabilities.

    eta = P(y|x) - 1 at the true class y, its variance over the samples of a window: the paper does
    not say over what (A13). Beside it the plug-in of Eq. (11) with 1 - accuracy for E.
    """
    (eta_zs, wrong_zs), (eta_ft, wrong_ft) = at_true_class(s, "p_zs"), at_true_class(s, "p_ft")
    values, rows = [], []
    for centre, inside in windows(torch.cat([s.outcome.d[split] for split in s.tests])):
        if len(inside) < 2:
            continue
        cov = np.cov(eta_zs[inside], eta_ft[inside])
        star = best_weight(cov[0, 0], cov[1, 1], cov[0, 1])
        errors = wrong_zs[inside].mean(), wrong_ft[inside].mean()
        plug_in = best_weight(*errors) if sum(errors) else math.nan
        w = vrf.weight(torch.tensor(centre), *s.outcome.ab).item()
        values.append((centre, star, plug_in, w))
        weights = (f"{v:.3f}" for v in values[-1][1:])
        rows.append([f"{centre:.2f}", *weights, len(inside)])
    curves = {}
    for i, name in enumerate(("g*, Eq. 15", "Eq. 11 with 1 - accuracy", "w(d), Eq. 6"), 1):
        curves[name] = [v[0] for v in values], [v[i] for v in values]
    draw(s, "g", "d(x)", "weight of the fine-tuned model", curves)
    print_table("Fig. 9", ["d", "g* (15)", "(11), 1 - acc", "w (6)", "n"], rows)


# --- Fig. 7 ---------------------------------------------------------------------------------------


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


ABLATIONS = [ratio, controls, sweep, grid, k_share, reference, source, weights, selective]
ABLATIONS += [mean_weight, g_star, images]
ABLATIONS = {ablation.__name__: ablation for ablation in ABLATIONS}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    found = settings(*vrf.prepare(argv[1:]))
    if not found:
        raise common.InputError("--methods, --ensemble: no model in both, so there is no ensemble")
    s = found[0]
    a, b = s.outcome.ab
    print(f"{s.name}, seed {s.config.seed}: |V| = {len(s.V)}, a = {a:.3g}, b = {b:.3g}")
    for name in names:
        ABLATIONS[name](s)


if __name__ == "__main__":
    common.run(main)
