"""The ablations and further figures of VRF (Sec. 5.3, Apps. B, C): sweeps over vrf.py's functions.

    python lab/vrf_ablations.py all                    # digits: all, 1 minute after vrf.py
    python lab/vrf_ablations.py grid --data /imagenet  # one; takes every flag of vrf.py

    controls     Tab. 11, A6, A7      rows that the paper's tables lack, and the oracles; --seeds
    sweep        Tabs. 8, 9, Fig. 5b  one alpha; VRF of logits  grid    Tab. 10       a and b
    reference    Fig. 4               distance to V or all      linear  Tab. 4        on the LC
    k_share      Fig. 5c              k as a share of V         source  A3, Eq. 3     what V holds
    weights      Tab. 6, Fig. 6c      form of the weight        ratio   Figs. 1b, 13  ratio by set
    selective    Tabs. 5, 13          one model or the other    images  Fig. 7        near and far
    mean_weight  Fig. 5a              by set                    timing  Fig. 8        search by k
    g_star       Fig. 9               least variance (Eq. 15)   calibration  A6       temperatures

Each prints its table, and most leave a PNG and a CSV in OUT/figures. Models, predictions and the
scan of the training set are vrf.py's, from its caches. All but `controls` and `linear` study the
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
    scan: vrf.Scan
    predictions: dict  # {split: {name: Prediction}}
    T: dict  # {name: temperature}
    raw: dict  # {split: Samples}
    calibrated: dict  # {split: Samples}
    grid: list  # [(a, b)]
    found: vrf.Outcome

    @property
    def tests(self):
        """Names of the reported sets."""
        return [split for split in self.predictions if split != "val"]

    def logits(self, split, calibrated):
        """(ZS's, FT's) [N, C], over their temperatures or not."""
        of, name = self.predictions[split], self.name
        T = self.T if calibrated else {"ZS": 1.0, name: 1.0}
        return of["ZS"].logits / T["ZS"], of[name].logits / T[name]


def set_up(config, data, clip, zero_shot):
    """Setting of the first model with ensembles; trains only what vrf.py has not."""
    models = vrf.train_models(config, data, clip, zero_shot, config.seed)
    scans, predictions = (f(config, data, clip, models) for f in (vrf.scan, vrf.predict_sets))
    if not scans:
        raise common.InputError("--methods, --ensemble: no model in both, so there is no ensemble")
    name, scan = next(iter(scans.items()))
    T, grid = vrf.fit_temperatures(config, predictions["val"]), vrf.ab_candidates(config, data.kind)
    raw, calibrated = vrf.samples(predictions, name), vrf.samples(predictions, name, T)
    found = vrf.run_algorithm_1(config, scan, calibrated, grid)
    a, b = found.ab
    sizes = f"|V| = {len(found.V)}, k = {found.k}"
    print(f"{name}, seed {config.seed}: {sizes}, a = {a:.3g}, b = {b:.3g}")
    return Setting(
        config, data, clip, models, name, scan, predictions, T, raw, calibrated, grid, found
    )


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
    ab = choose_ab(s.calibrated, d, grid or s.grid, weight)
    return [name, "/".join(f"{x:.2g}" for x in ab), *vrf_percent(s, ab, d, weight)]


def vrf_percent(s, ab, d=None, weight=vrf.weight):
    """`percent` of VRF with this (a, b)."""
    d, mixed = d or s.found.d, {}
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


# --- A6, A7, Tab. 11: rows that the paper's tables lack -------------------------------------------


def controls(s):
    """For every model with ensembles, mean over --seeds: OSE and LSE (Sec. 5.3) of the calibrated
    models, VRF of the others, and the bounds of tuning on the test sets.
    """
    rows = []
    for seed in range(s.config.seed, s.config.seed + s.config.seeds):
        models = vrf.train_models(s.config, s.data, s.clip, s.models["ZS"], seed)
        found, studies = vrf.evaluate(s.config, s.data, s.clip, models, seed)
        scans = vrf.scan(s.config, s.data, s.clip, models)
        predictions = vrf.predict_sets(s.config, s.data, s.clip, models)
        T = vrf.fit_temperatures(s.config, predictions["val"])
        for name, (raw, calibrated, outcome) in studies.items():
            rows += oracles(s.grid, name, seed, raw, calibrated, outcome.d)
            rows += [r for r in found if r.ours and r.method.startswith(f"{name} +")]
            rows.append(lse_row(predictions, name, seed, T))
            no_T = vrf.run_algorithm_1(s.config, scans[name], raw, s.grid)
            right = vrf.right(no_T.p, raw)
            rows.append(common.Row(f"{name} +VRF raw", seed, right, no_T.ab, ours=True))
    title = "not in the paper's tables (A7); oracle: tuned on each test set itself (Tab. 11)"
    print("\n" + common.accuracy_table(rows, title))


def oracles(grid, name, seed, raw, calibrated, d):
    """Rows of OSE and VRF tuned on each test set itself: bounds, and no results."""
    ose, mixed = {}, {}
    for split in raw:
        if split == "val":
            continue
        tuned = {"val": raw[split], split: raw[split]}  # as if the test set were ID val
        ose[split] = vrf.ose_row("", seed, tuned).right[split]
        x = calibrated[split]
        ab = choose_ab({"val": x}, {"val": d[split]}, grid)
        mixed[split] = vrf.vrf(x.p_zs, x.p_ft, vrf.weight(d[split], *ab))
    ose = common.Row(f"{name} +OSE oracle", seed, ose, ours=True)
    return [ose, common.Row(f"{name} +VRF oracle", seed, vrf.right(mixed, raw), ours=True)]


def lse_row(predictions, name, seed, T):
    """Sec. 5.3: the ensemble of logits instead of probabilities, its alpha by ID val."""

    def right(split, alpha):
        zs, ft = predictions[split]["ZS"], predictions[split][name]
        return vrf.ose(zs.logits / T["ZS"], ft.logits / T[name], alpha).argmax(1) == ft.labels

    alpha = max(vrf.ALPHAS, key=lambda alpha: right("val", alpha).double().mean())
    reported = {split: right(split, alpha) for split in predictions if split != "val"}
    return common.Row(f"{name} +LSE calibrated", seed, reported, alpha, ours=True)


def calibration(s):
    """A6: VRF without temperatures, with those that make confidence accuracy (the code's), and with
    those of least negative log-likelihood.
    """
    rows = []
    for criterion in ("off", "confidence", "nll"):
        T = {}
        for name in ("ZS", s.name):
            on_val = s.predictions["val"][name]
            T[name] = common.temperature(on_val.logits, on_val.labels, criterion)
        sets = vrf.samples(s.predictions, s.name, T)
        row = vrf_row(dataclasses.replace(s, calibrated=sets), criterion, s.found.d)
        rows.append([criterion, f"{T['ZS']:.2f}", f"{T[s.name]:.2f}", *row[1:]])
    print_table("temperatures (A6)", columns(s, "criterion", "T, ZS", "T, FT", "a/b"), rows)


# --- Sec. 5.2, App. C: sweeps ---------------------------------------------------------------------


def sweep(s):
    """Tabs. 8, 9, Figs. 5b, 10: every ensemble with one alpha, as in the tables and (A7) with VRF's
    temperatures; VRF with its own (a, b), mixing probabilities and, for Fig. 5b, logits.
    """
    rows, header = [], columns(s, "ensemble", "alpha, a/b")
    for name in ("OSE", "OSE calibrated", "LSE", "LSE calibrated", "WSE"):
        for alpha in vrf.ALPHAS:
            rows.append([name, f"{alpha:.1f}", *constant_percent(s, name, alpha)])
    names = list(dict.fromkeys(row[0] for row in rows))
    rows.append(vrf_row(s, "VRF", s.found.d))
    rows.append(vrf_row(of_logits(s), "VRF of logits", s.found.d))
    with figure(s, "sweep", header) as (axes, numbers):
        numbers += rows
        axis = axes[0, 0]
        for name in names:
            own = [r for r in rows if r[0] == name]
            dash = ":" if "calibrated" in name else "-"
            axis.plot([r[2] for r in own], [r[-1] for r in own], dash, marker="o", ms=3, label=name)
        for row in rows[-2:]:
            axis.plot(row[2], row[-1], "D", label=row[0])
        axis.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %", title=s.name)
        axis.legend(fontsize=7)
    print_table("Tabs. 8, 9", header, rows)


def constant_percent(s, ensemble, alpha):
    """`percent` of an ensemble with one alpha for all samples."""
    if ensemble == "WSE":
        zs, ft = s.models["ZS"], s.models[s.name]
        mixed, scores = copy.deepcopy(zs), {}
        mixed.load_state_dict(vrf.wse(zs.state_dict(), ft.state_dict(), alpha))
        for x in (s.data.test, *s.data.shifts):
            scores[x.name] = common.predict(s.config, {"": mixed}, x, s.clip)[""].logits
        return percent(s, scores)
    calibrated = "calibrated" in ensemble
    if ensemble.startswith("OSE"):
        return ose_percent(s, s.calibrated if calibrated else s.raw, alpha)
    return percent(s, {x: vrf.ose(*s.logits(x, calibrated), alpha) for x in s.tests})


def of_logits(s):
    """The Setting with calibrated logits in the place of probabilities."""
    sets = {}
    for split, x in s.calibrated.items():
        zs, ft = s.logits(split, calibrated=True)
        sets[split] = dataclasses.replace(x, p_zs=zs, p_ft=ft)
    return dataclasses.replace(s, calibrated=sets)


def grid(s):
    """Tab. 10, Figs. 6, 10: ID and shifts over a, around the chosen one, and b."""
    as_table_10 = s.data.kind == "imagenet" and s.config.distance == "code"
    around = [s.found.ab[0] * x for x in (0.5, 0.75, 1, 1.25, 1.5)]
    a_values = (1.4, 1.5, 1.6) if as_table_10 else around
    b_values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 5.0, 10.0, 20.0]
    rows, header = [], columns(s, "a", "b")
    for a in a_values:
        for b in b_values:
            rows.append([f"{a:.3g}", b, *vrf_percent(s, (a, b))])
    curve = [ose_percent(s, s.raw, alpha) for alpha in vrf.ALPHAS]
    with figure(s, "grid", header, columns=3) as (axes, numbers):
        numbers += rows
        left, middle, right = axes[0]
        for a in dict.fromkeys(r[0] for r in rows):
            own = [r for r in rows if r[0] == a]
            left.semilogx([r[1] for r in own], [r[2] for r in own], "o-", ms=3, label=f"a = {a}")
            middle.semilogx([r[1] for r in own], [r[-1] for r in own], "o-", ms=3)
            right.plot([r[2] for r in own], [r[-1] for r in own], "o", ms=3)
        right.plot([c[0] for c in curve], [c[-1] for c in curve], color="tab:pink", label="OSE")
        left.set(xlabel="b", ylabel="ID accuracy, %")
        middle.set(xlabel="b", ylabel="mean accuracy under shift, %")
        right.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        left.legend()
        right.legend()
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


def k_share(s):
    """Fig. 5c: k as a share of |V|; the paper's shares and 1 %."""
    rows, header = [], columns(s, "p, %", "k", "a/b")
    for p in (0.000001, 0.0001, 0.0005, 0.001, 0.01, 0.1, 0.5):
        k = vrf.neighbours(len(s.found.V), "paper", p)
        d = distances(s.config, s.calibrated, s.found.V, k)
        rows.append([f"{100 * p:.4g}", k, *vrf_row(s, "", d)[1:]])
    with figure(s, "k", header) as (axes, numbers):
        numbers += rows
        shares = [float(r[0]) for r in rows]
        axes[0, 0].semilogx(shares, [r[3] for r in rows], "o-", label="ID")
        axes[0, 0].semilogx(shares, [r[-1] for r in rows], "o-", label="mean under shift")
        axes[0, 0].set(xlabel="k, % of |V|", ylabel="accuracy, %")
        axes[0, 0].legend()
    print_table(f"Fig. 5c, |V| = {len(s.found.V)}", header, rows)


def reference(s):
    """Fig. 4: distance to V against distance to all of train; k is the same share of each."""
    everything, _ = train_features(s)
    k = vrf.neighbours(len(everything), s.config.k_rule, s.config.p, len(everything))
    tests, rows = {split: s.raw[split] for split in s.tests}, []
    header = ["reference", "d", "ratio", "acc_zs", "acc_ft", "n"]
    with figure(s, "reference", header) as (axes, numbers):
        for name, V, count in (("V", s.found.V, s.found.k), ("all of train", everything, k)):
            d = distances(s.config, s.calibrated, V, count)
            rows.append(vrf_row(s, name, d))
            bins = vrf.ratio_by_distance(d, tests)
            axes[0, 0].plot([b[0] for b in bins], [b[1] for b in bins], "o-", ms=3, label=name)
            numbers += [(name, *b) for b in bins]
        axes[0, 0].set(xlabel="distance", ylabel="Acc$_{ft}$ / Acc$_{zs}$")
        axes[0, 0].legend()
    print_table("Fig. 4", columns(s, "to", "a/b"), rows)


def source(s):
    """What V holds. A3: features of the fine-tuned encoder, as in paper and code, or of the
    zero-shot one. Eq. (3): the errors that FT mends, or all of ZS's, as the abstract's wording is.
    """
    every = F.normalize(s.scan.features, dim=1)
    d = distances(s.config, s.calibrated, every, neighbours_of(s, every))
    rows = [vrf_row(s, "FT's, Eq. (3)", s.found.d), vrf_row(s, "FT's, all errors", d)]
    V, sets = zero_shot_failures(s), {}
    for split, x in s.calibrated.items():
        v = F.normalize(s.predictions[split]["ZS"].features, dim=1)
        sets[split] = dataclasses.replace(x, v=v)
    d = distances(s.config, sets, V, neighbours_of(s, V))
    rows.append(vrf_row(s, "ZS's, Eq. (3)", d))
    print_table("features in V (A3, Eq. 3)", columns(s, "features", "a/b"), rows)


def zero_shot_failures(s):
    """V of Eq. (3) with the zero-shot encoder's features.  [M, D]"""
    mended = vrf.failures(s.scan.predicted_zs, s.scan.predicted_ft, s.scan.labels)
    index, train = s.scan.index[mended].numpy(), s.data.train
    in_memory = isinstance(train.images, np.ndarray)
    images = train.images[index] if in_memory else [train.images[i] for i in index]
    part = dataclasses.replace(train, images=images, labels=train.labels[index])
    predicted = common.predict(s.config, {"ZS": s.models["ZS"]}, part, s.clip)["ZS"]
    return F.normalize(predicted.features, dim=1)


def neighbours_of(s, V):
    return vrf.neighbours(len(V), s.config.k_rule, s.config.p, s.scan.images)


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
        ("sigmoid", vrf.weight, s.grid),
    ]
    d, rows = torch.linspace(0, 2, 201), []
    with figure(s, "weights", ["w", "d", "w(d)"]) as (axes, numbers):
        for name, weight, points in forms:
            rows.append(vrf_row(s, name, s.found.d, points, weight))
            a, b = choose_ab(s.calibrated, s.found.d, points, weight)
            w = weight(d, a, b)
            axes[0, 0].plot(d, w, label=f"{name}, a = {a:.2g}, b = {b:.2g}")
            numbers += [(name, *xy) for xy in zip(d.tolist(), w.tolist(), strict=True)]
        axes[0, 0].set(xlabel="d(x)", ylabel="w(x)")
        axes[0, 0].legend()
    print_table("Tab. 6", columns(s, "w", "a/b"), rows)


def ratio(s):
    """Figs. 1b, 13: accuracy ratio by distance, one curve a set; gaps where ZS is never right."""
    rows, header = [], ["set", "d", "ratio", "ZS, %", "FT, %", "n"]
    with figure(s, "ratio", header) as (axes, numbers):
        for split in s.tests:
            bins = vrf.ratio_by_distance(s.found.d, {split: s.raw[split]})
            axes[0, 0].plot([b[0] for b in bins], [b[1] for b in bins], "o-", ms=3, label=split)
            for d, r, zs, ft, n in bins:
                rows.append([split, f"{d:.2f}", f"{r:.2f}", 100 * zs, 100 * ft, n])
        numbers += rows
        axes[0, 0].set(xlabel="d(x)", ylabel="Acc$_{ft}$ / Acc$_{zs}$")
        axes[0, 0].legend(fontsize=6)
    print_table("Fig. 13", header, rows)


def mean_weight(s):
    """Fig. 5a: mean weight of the fine-tuned model by set; it should be highest on ID."""
    rows, header = [], ["set", "n", "mean w"]
    for split in s.tests:
        d = s.found.d[split]
        rows.append([split, len(d), f"{vrf.weight(d, *s.found.ab).mean():.3f}"])
    with figure(s, "mean", header) as (axes, numbers):
        numbers += rows
        axes[0, 0].bar([r[0] for r in rows], [float(r[2]) for r in rows], color="tab:green")
        axes[0, 0].set(ylabel="mean w(x)")
        axes[0, 0].tick_params(axis="x", rotation=30)
    print_table("Fig. 5a", header, rows)


# --- Sec. 5.3, Eqs. (12), (13): selective prediction ----------------------------------------------


def selective(s):
    """Tabs. 5, 13. Eq. (12): f_ft(x) if G(x) = ID, else f_zs(x). Eq. (13): G(x) = ID iff S(x) >= l.

    l lets 95 % of ID val through. Ours, since the paper states none: energy at T = 1, one
    shared covariance with ridge 1e-6 of its mean variance, k = 50 neighbours, normalised features.
    """
    x, y = train_features(s)
    class_wise, background = gaussians(x, y), gaussians(x, torch.zeros_like(y))
    scores, rows = {}, []
    for split in s.predictions:
        logits = s.predictions[split][s.name].logits
        scores[split] = detector_scores(s.raw[split].v, logits, x, class_wise, background)
    for name in scores["val"]:
        threshold, chosen = torch.quantile(scores["val"][name].double(), 0.05), {}
        for split in s.tests:
            zs, ft = s.logits(split, calibrated=False)
            chosen[split] = torch.where((scores[split][name] >= threshold)[:, None], ft, zs)
        rows.append([name, *percent(s, chosen)])
    rows.append(["VRF", *vrf_percent(s, s.found.ab)])
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
    d = torch.cat([s.found.d[split] for split in s.tests]).numpy()
    (eta_zs, wrong_zs), (eta_ft, wrong_ft) = pooled(s, "p_zs"), pooled(s, "p_ft")
    rows, header = [], ["d", "g* (15)", "(11), 1 - acc", "w (6)", "n"]
    for low, centre, high in vrf.windows(d):
        inside = (d >= low) & (d <= high)
        if inside.sum() < 2:
            continue
        cov = np.cov(eta_zs[inside], eta_ft[inside])
        star = best_weight(cov[0, 0], cov[1, 1], cov[0, 1])
        errors = wrong_zs[inside].mean(), wrong_ft[inside].mean()
        plug_in = best_weight(*errors) if sum(errors) else math.nan
        w = vrf.weight(torch.tensor(centre), *s.found.ab).item()
        rows.append([f"{centre:.2f}", *(f"{v:.3f}" for v in (star, plug_in, w)), int(inside.sum())])
    with figure(s, "g", header) as (axes, numbers):
        numbers += rows
        for i, name in ((1, "g*, Eq. 15"), (2, "Eq. 11 with 1 - accuracy"), (3, "w(d), Eq. 6")):
            values = [float(r[i]) for r in rows]
            axes[0, 0].plot([float(r[0]) for r in rows], values, "o-", ms=3, label=name)
        axes[0, 0].set(xlabel="d(x)", ylabel="weight of the fine-tuned model")
        axes[0, 0].legend()
    print_table("Fig. 9", header, rows)


# --- Figs. 7, 8 -----------------------------------------------------------------------------------


def images(s):
    """Fig. 7: eight random of the 100 smallest d, and of the 100 largest, over all sets."""
    splits = {x.name: x for x in (s.data.test, *s.data.shifts)}
    where = [(name, i) for name, x in splits.items() for i in range(len(x.labels))]
    d = torch.cat([s.found.d[name] for name in splits])
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
    v, V = s.raw[common.ID].v[:1000].to(device), s.found.V.to(device)
    rows, header = [], ["k", "ms/image"]
    for k in (2**exponent for exponent in range(10)):
        seconds = []
        if k > len(V):
            break
        for _ in range(6):
            start = time.perf_counter()
            vrf.knn_kth_distance(v, V, k).cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        rows.append([k, f"{1000 * np.median(seconds[1:]) / len(v):.4f}"])
    where = f"{torch.get_num_threads()} threads of the CPU"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    with figure(s, "timing", header) as (axes, numbers):
        numbers += rows
        axes[0, 0].semilogx([r[0] for r in rows], [float(r[1]) for r in rows], "o-", base=2)
        axes[0, 0].set(xlabel="k", ylabel="ms per image", ylim=(0, None))
    print_table(f"Fig. 8: {where}, {len(v)} queries, V {len(V)} x {v.shape[1]}", header, rows)


ABLATIONS = [controls, calibration, sweep, grid, linear, reference, k_share, source, weights]
ABLATIONS += [ratio, selective, mean_weight, g_star, images, timing]
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
