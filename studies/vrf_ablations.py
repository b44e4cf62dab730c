"""The ablations and further figures of VRF (Sec. 5.3, Apps. B, C): sweeps over vrf.py's functions.

    python studies/vrf_ablations.py all                    # digits: all, 1 minute after vrf.py
    python studies/vrf_ablations.py grid --data /imagenet  # one; takes every flag of vrf.py

    sweep        Tabs. 8, 9, Fig. 5b  one alpha; VRF of logits  grid    Tab. 10       a and b
    reference    Fig. 4               distance to V or all      linear  Tab. 4        on the LC
    k_share      Fig. 5c              k as a share of V         source  A3            which encoder
    weights      Tab. 6, Fig. 6c      form of the weight        ratio   Figs. 1b, 13  ratio by set
    selective    Tabs. 5, 13          one model or the other    images  Fig. 7        near and far
    mean_weight  Fig. 5a              by set                    timing  Fig. 8        search by k
    g_star       Fig. 9               least variance (Eq. 15)

Each prints its table and leaves PNG and CSV in OUT/figures. Models and predictions are vrf.py's,
from its caches. alpha, a, b are chosen on ID val wherever the paper's table does not sweep them.
"""

import copy
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import vrf  # noqa: E402


@dataclasses.dataclass
class Setting:
    """One seed: vrf.py's study, one FT model, its V and k, {split: Pair}, chosen (a, b)."""

    config: vrf.Config
    data: common.Data
    clip: common.Clip
    study: vrf.Study
    method: str
    scan: dict
    V: torch.Tensor
    k: int
    pairs: dict
    grid: list
    ab: tuple


def set_up(config, data, clip, zero_shot, methods):
    """Setting for the first of `methods`; trains only what vrf.py has not."""
    config.methods = ",".join(methods)
    if config.finetuned:
        tuned = common.load_finetuned(config, data, clip, zero_shot)
        models = {"ZS": zero_shot, "Fine-tuned": tuned}
    else:
        models = vrf.train_models(config, data, clip, zero_shot, config.seed)
    study, method = vrf.collect(config, data, clip, models), list(models)[1]
    scan = vrf.scan_training_set(config, data, clip, models, method)
    V, k = vrf.failure_features(config, scan, method)
    pairs = vrf.make_pairs(config, study, method, V, k)
    grid = vrf.ab_candidates(config, data.kind)
    ab, _ = vrf.best(grid, sample_wise(config.weight), pairs["val"])
    print(
        f"{method}, seed {config.seed}: |V| = {len(V)}, k = {k}, a = {ab[0]:.3g}, b = {ab[1]:.3g}"
    )
    return Setting(config, data, clip, study, method, scan, V, k, pairs, grid, ab)


def sample_wise(form):
    """scores(Pair, (a, b)) of VRF with this form of the weight."""
    return lambda e, ab: vrf.vrf(*e.calibrated, vrf.weight(e.d, *ab, form))


def percent(pairs, scores):
    """[accuracy of every reported split, mean shift] in %, of scores(Pair) -> [N, C]."""
    split = {s: 100 * common.accuracy(scores(e), e.labels) for s, e in pairs.items() if s != "val"}
    return [*split.values(), common.mean_shift(split)]


def show(s, name, title, header, rows, figure=None, plotted=None):
    """Print a table; save the figure with its numbers (the table's, unless others were plotted)."""
    text = [[f"{x:.1f}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    print("\n" + common.table(header, text, title))
    if figure is not None:
        top, numbers = plotted or (header, rows)
        common.save_figure(figure, f"{s.config.out}/figures/{name}", top, numbers)


def columns(s, *first):
    return [*first, *[n for n in s.pairs if n != "val"], "avg shift"]


def chosen_row(s, name, grid, scores, pairs):
    """Table row of a rule: (a, b) by ID val, then the accuracies."""
    ab, _ = vrf.best(grid, scores, pairs["val"])
    return [name, "/".join(f"{x:.2g}" for x in ab), *percent(pairs, lambda e: scores(e, ab))]


# --- Sec. 5.2, App. C: sweeps ---------------------------------------------------------------------


def sweep(s):
    """Tabs. 8, 9, Figs. 5b, 10: every ensemble with one alpha, as in the tables and (A7) with VRF's
    temperatures; VRF with its own (a, b), mixing probabilities and, for Fig. 5b, logits.
    """
    zs, ft = s.study.models["ZS"], s.study.models[s.method]
    constant = {
        "OSE": lambda e, alpha: vrf.ose(*e.raw, alpha),
        "OSE calibrated": lambda e, alpha: vrf.ose(*e.calibrated, alpha),
        "LSE": lambda e, alpha: vrf.ose(e.zs, e.ft, alpha),
        "LSE calibrated": lambda e, alpha: vrf.ose(e.zs / e.T[0], e.ft / e.T[1], alpha),
        "WSE": None,
    }
    rows, (figure, ((axis,),)) = [], common.new_figure()
    for name, scores in constant.items():
        for alpha in vrf.ALPHAS:
            if scores is None:
                mixed = copy.deepcopy(zs)
                mixed.load_state_dict(vrf.wse(zs.state_dict(), ft.state_dict(), alpha))
                shares = weight_space_percent(s, mixed)
            else:
                shares = percent(s.pairs, lambda e, f=scores, alpha=alpha: f(e, alpha))
            rows.append([name, f"{alpha:.1f}", *shares])
        own = [r for r in rows if r[0] == name]
        dash = ":" if "calibrated" in name else "-"
        axis.plot([r[2] for r in own], [r[-1] for r in own], dash, marker="o", ms=3, label=name)

    def logits(e, ab):
        return vrf.vrf(e.zs / e.T[0], e.ft / e.T[1], vrf.weight(e.d, *ab, s.config.weight))

    for name, scores in (("VRF", sample_wise(s.config.weight)), ("VRF of logits", logits)):
        rows.append(chosen_row(s, name, s.grid, scores, s.pairs))
        axis.plot(rows[-1][2], rows[-1][-1], "D", label=name)
    axis.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %", title=s.method)
    axis.legend(fontsize=7)
    show(s, "sweep", "Tabs. 8, 9", columns(s, "ensemble", "alpha, a/b"), rows, figure)


def weight_space_percent(s, model):
    splits = (s.data.test, *s.data.shifts)
    right = {
        x.name: common.predict(s.config, {"": model}, x, s.clip)[""].right.double().mean().item()
        * 100
        for x in splits
    }
    return [*right.values(), common.mean_shift(right)]


def grid(s):
    """Tab. 10, Figs. 6, 10: ID and shifts over a, around the chosen one, and b."""
    a0, f = s.ab[0], sample_wise(s.config.weight)
    as_table_10 = s.data.kind == "imagenet" and s.config.distance == "code"
    a_values = (1.4, 1.5, 1.6) if as_table_10 else [a0 * x for x in (0.5, 0.75, 1, 1.25, 1.5)]
    b_values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 5.0, 10.0, 20.0]
    rows = [
        [f"{a:.3g}", b, *percent(s.pairs, lambda e, ab=(a, b): f(e, ab))]
        for a in a_values
        for b in b_values
    ]
    figure, ((left, middle, right),) = common.new_figure(columns=3)
    for a in dict.fromkeys(r[0] for r in rows):
        own = [r for r in rows if r[0] == a]
        left.semilogx([r[1] for r in own], [r[2] for r in own], "o-", ms=3, label=f"a = {a}")
        middle.semilogx([r[1] for r in own], [r[-1] for r in own], "o-", ms=3)
        right.plot([r[2] for r in own], [r[-1] for r in own], "o", ms=3)
    curve = [percent(s.pairs, lambda e, x=x: vrf.ose(*e.raw, x)) for x in vrf.ALPHAS]
    right.plot([c[0] for c in curve], [c[-1] for c in curve], color="tab:pink", label="OSE")
    left.set(xlabel="b", ylabel="ID accuracy, %")
    middle.set(xlabel="b", ylabel="mean accuracy under shift, %")
    right.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    left.legend()
    right.legend()
    show(s, "grid", "Tab. 10", columns(s, "a", "b"), rows, figure)


def linear(s):
    """Tab. 4: the linear classifier. There WSE is OSE of logits, not of probabilities (A12)."""
    config = dataclasses.replace(s.config, ensemble="LC")
    models = {m: s.study.models[m] for m in ("ZS", "LC")}
    rows, _ = vrf.evaluate(config, s.data, s.clip, models, config.seed)
    print("\n" + common.accuracy_table(rows, "Tab. 4: linear classifier"))


# --- Sec. 5.3: what the distance is ---------------------------------------------------------------


def train_features(s):
    """[N, D] normalised FT features of all of train, [N] labels; from the cache."""
    model = s.study.models[s.method]
    features, labels = common.frozen_features(s.config, model, s.data.train, s.clip)
    return F.normalize(features, dim=1), labels


def k_share(s):
    """Fig. 5c: k as a share of |V|; the paper's shares and 1 %."""
    rows, scores = [], sample_wise(s.config.weight)
    for p in (0.000001, 0.0001, 0.0005, 0.001, 0.01, 0.1, 0.5):
        count = vrf.neighbours(len(s.V), "paper", p)
        pairs = vrf.make_pairs(s.config, s.study, s.method, s.V, count)
        rows.append([f"{100 * p:.4g}", count, *chosen_row(s, "", s.grid, scores, pairs)[1:]])
    figure, ((axis,),) = common.new_figure()
    x = [float(r[0]) for r in rows]
    axis.semilogx(x, [r[3] for r in rows], "o-", label="ID")
    axis.semilogx(x, [r[-1] for r in rows], "o-", label="mean under shift")
    axis.set(xlabel="k, % of |V|", ylabel="accuracy, %")
    axis.legend()
    show(s, "k", f"Fig. 5c, |V| = {len(s.V)}", columns(s, "p, %", "k", "a/b"), rows, figure)


def reference(s):
    """Fig. 4: distance to V against distance to all of train; k is the same share of each."""
    everything, _ = train_features(s)
    count = vrf.neighbours(len(everything), s.config.k_rule, s.config.p, len(everything))
    scores, plotted = sample_wise(s.config.weight), []
    figure, ((axis,),) = common.new_figure()
    rows = []
    for name, V, n in (("V", s.V, s.k), ("all of train", everything, count)):
        pairs = vrf.make_pairs(s.config, s.study, s.method, V, n)
        rows.append(chosen_row(s, name, s.grid, scores, pairs))
        bins = vrf.ratio_by_distance([e for split, e in pairs.items() if split != "val"])
        axis.plot([b[0] for b in bins], [b[1] for b in bins], "o-", ms=3, label=name)
        plotted += [(name, *b) for b in bins]
    axis.set(xlabel="distance", ylabel="Acc$_{ft}$ / Acc$_{zs}$")
    axis.legend()
    top = ["reference", "d", "ratio", "acc_zs", "acc_ft", "n"]
    show(s, "reference", "Fig. 4", columns(s, "to", "a/b"), rows, figure, (top, plotted))


def source(s):
    """A3: features of the fine-tuned encoder, as in paper and code, or of the zero-shot one."""
    rows = []
    for name in ("ft", "zs"):
        config = dataclasses.replace(s.config, features=name)
        V, count = vrf.failure_features(config, s.scan, s.method)
        pairs = vrf.make_pairs(config, s.study, s.method, V, count)
        rows.append(chosen_row(s, name, s.grid, sample_wise(config.weight), pairs))
    show(s, "source", "features searched (A3)", columns(s, "encoder", "a/b"), rows)


def weights(s):
    """Tab. 6, Fig. 6c: the form of the weight, each with (a, b) of its own by ID val."""
    steps = [i / 20 for i in range(1, 61)]
    grids = {
        "binary": [(a, 1.0) for a in steps],
        "linear": [(a, b) for a in steps for b in (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)],
        "sigmoid": s.grid,
    }
    figure, ((axis,),) = common.new_figure()
    d, rows, plotted = torch.linspace(0, 2, 201), [], []
    for form, points in grids.items():
        rows.append(chosen_row(s, form, points, sample_wise(form), s.pairs))
        ab, _ = vrf.best(points, sample_wise(form), s.pairs["val"])
        w = vrf.weight(d, *ab, form)
        axis.plot(d, w, label=f"{form}, a = {ab[0]:.2g}, b = {ab[1]:.2g}")
        plotted += [(form, *xy) for xy in zip(d.tolist(), w.tolist(), strict=True)]
    axis.set(xlabel="d(x)", ylabel="w(x)")
    axis.legend()
    show(
        s, "weights", "Tab. 6", columns(s, "w", "a/b"), rows, figure, (["w", "d", "w(d)"], plotted)
    )


def ratio(s):
    """Figs. 1b, 13: accuracy ratio by distance, one curve a set; gaps where ZS is never right."""
    figure, ((axis,),) = common.new_figure()
    rows = []
    for split, e in s.pairs.items():
        if split != "val":
            bins = vrf.ratio_by_distance([e])
            axis.plot([b[0] for b in bins], [b[1] for b in bins], "o-", ms=3, label=split)
            rows += [
                [split, f"{d:.2f}", f"{r:.2f}", 100 * zs, 100 * ft, n] for d, r, zs, ft, n in bins
            ]
    axis.set(xlabel="d(x)", ylabel="Acc$_{ft}$ / Acc$_{zs}$")
    axis.legend(fontsize=6)
    show(s, "ratio", "Fig. 13", ["set", "d", "ratio", "ZS, %", "FT, %", "n"], rows, figure)


def mean_weight(s):
    """Fig. 5a: mean weight of the fine-tuned model by set; it should be highest on ID."""
    rows = [
        [split, len(e.d), f"{vrf.weight(e.d, *s.ab, s.config.weight).mean():.3f}"]
        for split, e in s.pairs.items()
        if split != "val"
    ]
    figure, ((axis,),) = common.new_figure()
    axis.bar([r[0] for r in rows], [float(r[2]) for r in rows], color="tab:green")
    axis.set(ylabel="mean w(x)")
    axis.tick_params(axis="x", rotation=30)
    show(s, "mean", "Fig. 5a", ["set", "n", "mean w"], rows, figure)


# --- Sec. 5.3, Eqs. (12), (13): selective prediction ----------------------------------------------


def selective(s):
    """Tabs. 5, 13. Eq. (12): f_ft(x) if G(x) = ID, else f_zs(x). Eq. (13): G(x) = ID iff S(x) >= l.

    l lets 95 % of ID val through. Ours, since the paper states none: energy at T = 1, one
    shared covariance with ridge 1e-6 of its mean variance, k = 50 neighbours, normalised features.
    """
    rows = []
    for name, score in detectors(s).items():
        threshold = torch.quantile(score("val").double(), 0.05)

        def predict(split, score=score, threshold=threshold):
            e = s.pairs[split]
            return torch.where((score(split) >= threshold)[:, None], e.ft, e.zs)

        split = {
            x: 100 * common.accuracy(predict(x), e.labels) for x, e in s.pairs.items() if x != "val"
        }
        rows.append([name, *split.values(), common.mean_shift(split)])
    f = sample_wise(s.config.weight)
    rows.append(["VRF", *percent(s.pairs, lambda e: f(e, s.ab))])
    show(s, "selective", "Tabs. 5, 13", columns(s, "detector"), rows)


def detectors(s):
    """{name: S(split) -> [N]}, higher is more ID; all on the fine-tuned model."""
    x, y = train_features(s)

    def features(split):
        return F.normalize(s.study.predictions[split][s.method].features, dim=1)

    class_wise, background = mahalanobis(x, y), mahalanobis(x, torch.zeros_like(y))
    return {
        "MSP": lambda split: s.pairs[split].ft.softmax(1).amax(1),
        "Energy": lambda split: s.pairs[split].ft.logsumexp(1),
        "Mahalanobis": lambda split: -class_wise(features(split)),
        "kNN": lambda split: -vrf.kth_distance(features(split), x, min(50, len(x))),
        "Relative Mahalanobis": lambda split: (
            background(features(split)) - class_wise(features(split))
        ),
    }


def mahalanobis(x, y):
    """features [N, D] -> least squared Mahalanobis distance to a class mean of (x, y), [N]"""
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    centred = x - means[torch.searchsorted(y.unique(), y)]
    cov = centred.T @ centred / len(x)
    cov += 1e-6 * cov.diagonal().mean() * torch.eye(len(cov), dtype=torch.double)
    root = torch.linalg.cholesky(torch.linalg.inv(cov))  # |root^T z|^2 = z^T cov^-1 z
    return lambda v: torch.cdist(v.double() @ root, means @ root).square().amin(1)


# --- App. B, Eqs. (11), (14), (15) ----------------------------------------------------------------


def best_weight(var_zs, var_ft, cov=0.0):
    """Eq. (15): g_ft = (V_zs - Cov) / (V_zs + V_ft - 2 Cov); Eq. (11) is Cov = 0.  any shape"""
    return (var_zs - cov) / (var_zs + var_ft - 2 * cov)


def mixed_variance(g_ft, var_zs, var_ft, cov):
    """Eq. (14): V[eta_vrf] = g_zs^2 V_zs + g_ft^2 V_ft + 2 g_zs g_ft Cov, g_zs = 1 - g_ft."""
    return (1 - g_ft) ** 2 * var_zs + g_ft**2 * var_ft + 2 * (1 - g_ft) * g_ft * cov


def g_star(s):
    """Fig. 9: g* by distance, pooled over ID and shifts, from calibrated probabilities.

    eta = P(y|x) - 1 at the true class y, its variance over the samples of a window: the paper does
    not say over what (A13). Beside it the plug-in of Eq. (11) with 1 - accuracy for E.
    """
    e = [pair for split, pair in s.pairs.items() if split != "val"]
    d = torch.cat([x.d for x in e]).numpy()
    at_label = [
        torch.cat([x.calibrated[i].gather(1, x.labels[:, None])[:, 0] - 1 for x in e])
        .double()
        .numpy()
        for i in (0, 1)
    ]
    wrong = [
        torch.cat([m(x).argmax(1) != x.labels for x in e]).numpy()
        for m in (lambda x: x.zs, lambda x: x.ft)
    ]
    rows = []
    for low, centre, high in vrf.windows(d):
        inside = (d >= low) & (d <= high)
        if inside.sum() < 2:
            continue
        cov = np.cov(at_label[0][inside], at_label[1][inside])
        error = [w[inside].mean() for w in wrong]
        w = vrf.weight(torch.tensor(centre), *s.ab, s.config.weight).item()
        plug_in = best_weight(*error) if sum(error) else math.nan
        star = best_weight(cov[0, 0], cov[1, 1], cov[0, 1])
        rows.append([f"{centre:.2f}", *(f"{v:.3f}" for v in (star, plug_in, w)), int(inside.sum())])
    figure, ((axis,),) = common.new_figure()
    for i, name in ((1, "g*, Eq. 15"), (2, "Eq. 11 with 1 - accuracy"), (3, "w(d), Eq. 6")):
        axis.plot([float(r[0]) for r in rows], [float(r[i]) for r in rows], "o-", ms=3, label=name)
    axis.set(xlabel="d(x)", ylabel="weight of the fine-tuned model")
    axis.legend()
    show(s, "g", "Fig. 9", ["d", "g* (15)", "(11), 1 - acc", "w (6)", "n"], rows, figure)


# --- Figs. 7, 8 -----------------------------------------------------------------------------------


def images(s):
    """Fig. 7: eight random of the 100 smallest d, and of the 100 largest, over all sets."""
    splits = {x.name: x for x in (s.data.test, *s.data.shifts)}
    where = [(name, i) for name, x in splits.items() for i in range(len(x.labels))]
    d = torch.cat([s.pairs[name].d for name in splits])
    order, rng = d.argsort(), np.random.default_rng(s.config.seed)
    figure, axes = common.new_figure(columns=8, rows=2)
    figure.set_size_inches(12, 3.4)
    rows = []
    for line, (name, pool) in enumerate((("nearest", order[:100]), ("farthest", order[-100:]))):
        chosen = rng.choice(pool.numpy(), min(8, len(pool)), replace=False)
        for axis, i in zip(axes[line], chosen, strict=False):
            split, index = where[i]
            axis.imshow(common.read_rgb(splits[split].images[index]))
            axis.set_title(f"{split}, d = {d[i]:.2f}", fontsize=7)
            axis.axis("off")
            rows.append([name, split, index, f"{d[i]:.3f}"])
    show(s, "images", "Fig. 7", ["pool", "set", "index", "d"], rows, figure)


def timing(s):
    """Fig. 8: ms per image of the exact search in PyTorch, k = 1, 2, 4 ... 512; median of 5."""
    device = common.pick_device(s.config.device)
    v = F.normalize(s.study.predictions[s.data.test.name][s.method].features, dim=1)[:1000]
    v, V = v.to(device), s.V.to(device)
    rows = []
    for exponent in range(10):
        count, seconds = 2**exponent, []
        if count > len(s.V):
            break
        for _ in range(6):
            start = time.perf_counter()
            vrf.kth_distance(v, V, count).cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        rows.append([count, f"{1000 * np.median(seconds[1:]) / len(v):.4f}"])
    shape = f"{len(v)} queries, V {len(s.V)} x {v.shape[1]}"
    name = f"{torch.get_num_threads()} threads of the CPU"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    title = f"Fig. 8: {name}, {shape}"
    figure, ((axis,),) = common.new_figure()
    axis.semilogx([r[0] for r in rows], [float(r[1]) for r in rows], "o-", base=2)
    axis.set(xlabel="k", ylabel="ms per image", ylim=(0, None))
    show(s, "timing", title, ["k", "ms/image"], rows, figure)


ABLATIONS = [sweep, grid, linear, reference, k_share, source, weights, ratio, selective]
ABLATIONS = {f.__name__: f for f in [*ABLATIONS, mean_weight, g_star, images, timing]}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    config, data, clip, zero_shot = vrf.prepare(argv[1:])
    methods = ["E2E-FT", "LC"] if "linear" in names and not config.finetuned else ["E2E-FT"]
    if "methods" in config.given:
        methods = common.choose(config.methods, vrf.METHODS, "--methods")
    s = set_up(config, data, clip, zero_shot, methods)
    for name in names:
        if name == "linear" and "LC" not in s.study.models:
            print("\nlinear: left out, it needs LC among --methods")
            continue
        ABLATIONS[name](s)


if __name__ == "__main__":
    common.run(main)
