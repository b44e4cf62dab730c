"""VRF: Robust Fine-tuning of Zero-shot Models via Variance Reduction.
Zhu, Cui, Zhang; NeurIPS 2024; arXiv 2411.06966.

Fine-tuning CLIP raises accuracy on its own distribution (ID) and lowers it under shift (OOD), and a
constant mix of the zero-shot (ZS) and the fine-tuned (FT) model trades one for the other. VRF gives
every test sample its own weight: FT counts more near the training samples where ZS fails and FT does
not (the zero-shot-failure set V), because there FT's error is small against ZS's, which is what the
mix of least variance asks for. Two forward passes and a k-NN search; nothing is trained for it.

    Sec. 3.1  Eq. 1   output-space ensemble     ose
              Eq. 2   weight-space ensemble     wse
    Sec. 3.2  Eq. 3   zero-shot-failure set     failures
              Eq. 4   k-th neighbour distance   kth_distance   (k: neighbours)
              Eq. 5   sample-wise ensemble      vrf
              Eq. 6   weight of FT              weight
    Sec. 5.3, App. B  ablations, g* (Eq. 15)    studies/vrf_ablations.py

    python vrf.py                   # embedded digits, 2 CPU cores: @MINUTES@
    python vrf.py --data /imagenet  # CLIP ViT-B/16; not measured by us; paper: 82.3 ID, 61.8 OOD

Differs from the paper (P) or the authors' code (C); the README has the reasons under the same IDs:
A1  d is the squared distance, as in C; P writes the plain one. --distance paper converts a and b.
A2  features are L2-normalised before the search, as in C; P only remarks that CLIP's are.
A4  k = floor(0.001 |V|), as in P; C has round(1000 |V| / |D|). A5: never below 1 or above |V|.
A6  VRF has one temperature per model, fitted on ID val, as in C; P's text has none. Plain OSE and
    WSE have none in either, so (A7) calibrated OSE and LSE are printed beside them.
A9  (a, b) are searched on ID val, as P says; C has fixed numbers, and P prints several.
A10 ID val is a held-out part of train; C selects on the ID set that it reports.
A11 alpha runs over 0, 0.1, ..., 1, as in P. Of equals the first from the zero-shot side is taken,
    as C does for alpha; ours for (a, b), where neither says.
"""

import copy
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import arg

ALPHAS = [i / 10 for i in range(11)]  # App. C.1
AB_GRID = [(a / 10, b / 10) for a in range(1, 21) for b in range(1, 11)]  # ours; has all of P's
AB_CODE = (1.5, 0.6)
AB_PAPER = {  # Table 7
    ("ViT-B-32", "imagenet"): (1.5, 0.6),
    ("ViT-B-32", "cifar10"): (0.3, 0.3),
    ("ViT-B-32", "entity30"): (1.1, 0.6),
    ("ViT-B-16", "imagenet"): (1.5, 0.5),
    ("ViT-B-16", "cifar10"): (0.3, 0.3),
    ("ViT-B-16", "entity30"): (1.1, 0.6),
}
PRESETS = {  # what the embedded data need instead of ImageNet's recipe; chosen on ID val
    "digits": {
        "model": "tiny_clip",
        "weights": str(common.EMBEDDED / "tiny_clip.npz"),
        "epochs": 6,
        "batch": 64,
        "lr": 1e-3,
        "lr_lpft": 5e-4,
        "lr_lc": 1e-2,
        "warmup": 28,
    }
}


@dataclass
class Config:
    data: str = arg(
        "digits", "digits; a folder: ImageNet, CIFAR-10, train/ val/; or entity30:FOLDER"
    )
    model: str = arg("ViT-B-16", "open_clip architecture; paper: ViT-B-16 and ViT-B-32")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    finetuned: str = arg("", "fine-tuned checkpoint to put VRF on, instead of training (Tab. 12)")
    methods: str = arg("LC,E2E-FT,LP-FT", "what to train, comma-separated")
    ensemble: str = arg("E2E-FT,LP-FT", "which of them get ensemble rows; Tab. 4 has LC, too")
    epochs: int = arg(10, "of LC, E2E-FT and LP-FT; Sec. 5.1")
    batch: int = arg(512, "Sec. 5.1 (LP-FT on ViT-B/16: 384, App. C.1)")
    lr: float = arg(3e-5, "E2E-FT; Sec. 5.1")
    lr_lpft: float = arg(1e-5, "second stage of LP-FT; App. C.1")
    lr_lc: float = arg(0.1, "linear classifier; App. C.1")
    weight_decay: float = arg(0.1, "AdamW, all parameters; Sec. 5.1")
    warmup: int = arg(500, "steps of linear warm-up; Sec. 5.1")
    clip: float = arg(1.0, "largest gradient norm; Sec. 5.1")
    zsf_rule: str = arg("paper", "Eq. 3, or the abstract's wording: ZS wrong", "paper zs-wrong")
    features: str = arg("ft", "encoder whose features are searched (A3)", "ft zs")
    distance: str = arg("code", "code: squared; paper: plain (A1)", "paper code")
    k_rule: str = arg("paper", "paper: floor(p |V|); code: round(1000 |V| / |D|)", "paper code")
    p: float = arg(0.001, "k as a share of |V|; Sec. 5.1")
    temperature: str = arg("code", "code: confidence = accuracy on ID val (A6)", "off code nll")
    weight: str = arg("sigmoid", "form of the weight; Eq. 6, Tab. 6", "sigmoid linear binary")
    ab: str = arg("search", "search on ID val; paper: Tab. 7; code: 1.5,0.6; or A,B (A9)")
    select_on_test: bool = arg(False, "select on the reported ID set, as the authors' code (A10)")
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "number of fine-tuning runs")
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; the paper does not state its own", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(0, "processes that decode images")
    skip_bad_images: bool = arg(False, "leave unreadable images out instead of stopping")
    resume: bool = arg(True, "continue unfinished training, reuse finished")
    out: str = arg("runs/vrf", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def ose(p_zs, p_ft, alpha):
    """Eq. (1): P_ose = alpha P_ft + (1 - alpha) P_zs.  [N, C], [N, C], number -> [N, C]"""
    return alpha * p_ft + (1 - alpha) * p_zs


def wse(theta_zs, theta_ft, alpha):
    """Eq. (2): theta_wse = alpha theta_ft + (1 - alpha) theta_zs.  state dicts, head included

    Integer buffers are FT's. Raises InputError if names or shapes differ.
    """
    if {k: v.shape for k, v in theta_zs.items()} != {k: v.shape for k, v in theta_ft.items()}:
        raise common.InputError("WSE: the models differ in tensors; they must be one architecture")
    mix = {k: ose(theta_zs[k], v, alpha) for k, v in theta_ft.items() if v.is_floating_point()}
    return {**theta_ft, **mix}


def failures(predicted_zs, predicted_ft, labels, rule="paper"):
    """Eq. (3): V = {i : y_i = pred_ft(x_i), y_i != pred_zs(x_i)} of train.  3 x [N] -> bool [N]

    rule "zs-wrong" drops the first condition, as the abstract's wording does.
    """
    if not len(predicted_zs) == len(predicted_ft) == len(labels):
        found = (
            f"{len(predicted_zs)} ZS and {len(predicted_ft)} FT predictions, {len(labels)} labels"
        )
        raise common.InputError(f"failure set: {found}; all three must come from one pass")
    wrong = predicted_zs != labels
    return wrong if rule == "zs-wrong" else wrong & (predicted_ft == labels)


def neighbours(stored, rule="paper", p=0.001, train=None):
    """k of Eq. (4). paper: floor(p |V|); code: round(1000 |V| / |D|); then 1 <= k <= |V| (A4, A5)"""
    k = math.floor(p * stored + 1e-9) if rule == "paper" else round(1000 * stored / train)
    return min(max(k, 1), max(stored, 1))  # 1e-9 above: in binary 0.001 * 3000 may fall short of 3


def kth_distance(v, V, k, squared=False):
    """Eq. (4): d(x; V, k) = ||v - v_(k)||_2, v_(k) the k-th nearest in V.  [N, D], [M, D] -> [N]

    Exact search; |u|^2 - 2 v.u ranks, the chosen distance is recomputed by differences. Holds at
    most 64 M scores at a time. No V: infinity, so that Eq. (6) gives zero-shot all the weight.
    Raises InputError if k > M or the widths differ.
    """
    if v.shape[1] != V.shape[1]:
        widths = f"{v.shape[1]} and {V.shape[1]}"
        raise common.InputError(f"distance: features have width {widths}; use one encoder for both")
    if len(V) == 0:
        return torch.full((len(v),), math.inf)
    if not 1 <= k <= len(V):
        raise common.InputError(f"distance: k = {k} of {len(V)} stored; expected 1 to {len(V)}")
    norms, d = V.square().sum(1), [v.new_empty(0)]
    for q in v.split(max(1, 2**26 // len(V))):
        nearest = torch.addmm(norms, q, V.T, alpha=-2).topk(k, largest=False).indices
        d.append((q - V[nearest[:, -1]]).square().sum(1))
    return torch.cat(d) if squared else torch.cat(d).sqrt()


def vrf(p_zs, p_ft, w):
    """Eq. (5): P_vrf = w(x) P_ft + (1 - w(x)) P_zs.  [N, C], [N, C], [N] -> [N, C]"""
    return ose(p_zs, p_ft, w[:, None])


def weight(d, a, b, form="sigmoid"):
    """Eq. (6): w = sigmoid(-(d - a) / b), 1/2 at d = a.  [N] -> [N]

    Sec. 5.3 also tries binary, 1[d < a], and linear, -b (d - a) clamped to [0, 1].
    """
    if form == "binary":
        return (d < a).to(d.dtype)
    if form == "linear":
        return (-b * (d - a)).clamp(0, 1)
    return torch.sigmoid(-(d - a) / b)


# --- train / prepare ------------------------------------------------------------------------------


def train_models(config, data, clip, zero_shot, seed):
    """{name: Classifier} of ZS and --methods. Heads start from ZS's; LP-FT starts from LC."""
    wanted = common.choose(config.methods, ("LC", "E2E-FT", "LP-FT"), "--methods")
    models = {"ZS": zero_shot}
    if {"LC", "LP-FT"} & set(wanted):
        models["LC"] = copy.deepcopy(zero_shot)
        args = models["LC"], data.train, clip, config.lr_lc, seed
        common.linear_probe(config, f"LC, seed {seed}", *args)
    for name, start, lr in (("E2E-FT", "ZS", config.lr), ("LP-FT", "LC", config.lr_lpft)):
        if name in wanted:
            models[name] = copy.deepcopy(models[start])
            args = models[name], data.train, clip, lr, seed
            common.fine_tune(config, f"{name}, seed {seed}", *args)
    return {name: models[name] for name in ["ZS", *wanted]}


def load_finetuned(config, data, clip, zero_shot):
    """{name: Classifier} of ZS and a checkpoint, with its own head or one from its text tower."""
    state, meta = common.read_weights(config.finetuned, config.trust_checkpoint)
    if meta.get("quick_gelu", clip.quick_gelu) != clip.quick_gelu:
        raise common.InputError(f"{config.finetuned} has another activation; set --quick-gelu")
    model = copy.deepcopy(zero_shot)
    if "head.weight" not in state:
        tuned = copy.deepcopy(clip)
        common.load_matching(tuned.model, state, config.finetuned)
        device = model.head.weight.device
        state["head.weight"] = common.zero_shot_head(tuned, data.classes, data.templates, device)
    state.setdefault("head.bias", torch.zeros(len(state["head.weight"])))
    common.load_matching(model, state, config.finetuned)
    return {"ZS": zero_shot, "Fine-tuned": model}


def scan_training_set(config, data, clip, models):
    """Algorithm 1, offline: one pass over train for all models. Keeps labels [N], every model's
    argmax [N] and its features [M', D] of the samples that ZS gets wrong, of which V is a part;
    never logits, which at 1.28 M x 1000 are 5 GB a model.
    """

    def compute():
        kept = {}
        for _, labels, out in common.forward(config, models, data.train, clip):
            wrong = out["ZS"][1].argmax(1) != labels
            rows = {"labels": labels}
            for m, (features, logits) in out.items():
                rows |= {f"argmax/{m}": logits.argmax(1), f"features/{m}": features[wrong]}
            for name, value in rows.items():
                kept.setdefault(name, []).append(value)
        return {name: torch.cat(parts) for name, parts in kept.items()}

    weights = {m: model.state_dict() for m, model in models.items()}
    key = [weights, data.train.fingerprint, clip.image_key, config.precision]
    return common.cached(config, "scan", key, compute)


def failure_features(config, scan, method):
    """V as L2-normalised features [M, D] (A2), and k."""
    labels, zs = scan["labels"], scan["argmax/ZS"]
    kept = failures(zs, scan[f"argmax/{method}"], labels, config.zsf_rule)[zs != labels]
    V = scan[f"features/{'ZS' if config.features == 'zs' else method}"][kept]
    if len(V) == 0:
        print(
            f"{method}: no training sample that ZS fails and FT gets right; VRF is zero-shot then"
        )
    return F.normalize(V, dim=1), neighbours(len(V), config.k_rule, config.p, len(labels))


# --- evaluate -------------------------------------------------------------------------------------


@dataclass
class Pair:
    """ZS and one FT model on one split: probabilities and logits over temperature [N, C]; d [N]."""

    p_zs: torch.Tensor
    p_ft: torch.Tensor
    zs_logits: torch.Tensor
    ft_logits: torch.Tensor
    d: torch.Tensor
    labels: torch.Tensor

    @property
    def calibrated(self):
        return self.zs_logits.softmax(1), self.ft_logits.softmax(1)


def make_pair(config, of, method, V, k, T):
    """Pair of one split from `of`, {model: Prediction}, the failure set and {model: temperature}."""
    v = F.normalize(of["ZS" if config.features == "zs" else method].features, dim=1)
    d = kth_distance(v, V, k, squared=config.distance == "code")
    zs, ft = of["ZS"].logits, of[method].logits
    return Pair(zs.softmax(1), ft.softmax(1), zs / T["ZS"], ft / T[method], d, of[method].labels)


def ab_candidates(config, kind):
    """(a, b) to try on ID val, smallest first. Given for squared d; for plain d (A1), to first order
    at d = a, they become sqrt(a), b / (2 sqrt(a)).
    """
    known = {"search": AB_GRID, "code": [AB_CODE], "paper": [AB_PAPER.get((config.model, kind))]}
    grid = known.get(config.ab)
    if grid == [None]:
        raise common.InputError(f"--ab paper: Table 7 lacks {config.model} on {kind}; use search")
    if grid is None:
        numbers = [float(x) for x in config.ab.split(",") if x.replace(".", "", 1).isdigit()]
        if len(numbers) != 2 or min(numbers) <= 0:
            expected = "search, paper, code or two positive numbers such as 1.5,0.6"
            raise common.InputError(f"--ab {config.ab}: expected {expected}")
        grid = [tuple(numbers)]
    if config.distance == "paper":
        grid = [(math.sqrt(a), b / (2 * math.sqrt(a))) for a, b in grid]
    return grid


def ensembles(config, candidates):
    """{row: (grid to search on ID val, scores(Pair, point) -> [N, C])}; from the third on ours."""
    return {
        "+OSE": (ALPHAS, lambda e, alpha: ose(e.p_zs, e.p_ft, alpha)),
        "+VRF": (candidates, lambda e, ab: vrf(*e.calibrated, weight(e.d, *ab, config.weight))),
        "+OSE calibrated": (ALPHAS, lambda e, alpha: ose(*e.calibrated, alpha)),
        "+OSE calibrated, alpha 1/2": ([0.5], lambda e, alpha: ose(*e.calibrated, alpha)),
        "+LSE calibrated": (ALPHAS, lambda e, alpha: ose(e.zs_logits, e.ft_logits, alpha)),
        "+VRF uncalibrated": (
            candidates,
            lambda e, ab: vrf(e.p_zs, e.p_ft, weight(e.d, *ab, config.weight)),
        ),
    }


def best(grid, scores, pair):
    """The grid point of highest accuracy, and its accuracy; of equals the first (A11)."""
    points = [
        (common.accuracy(scores(pair, point), pair.labels), -i) for i, point in enumerate(grid)
    ]
    top, index = max(points)
    return grid[-index], top


def weight_space(config, data, clip, models, method, of):
    """+WSE: alpha by ID val, {split: right [N]}. The grid's ends are ZS and FT themselves."""
    mixed = {alpha: copy.deepcopy(models["ZS"]) for alpha in ALPHAS[1:-1]}
    for alpha, model in mixed.items():
        model.load_state_dict(wse(models["ZS"].state_dict(), models[method].state_dict(), alpha))
    val = {0.0: of["val"]["ZS"], **common.predict(config, mixed, data.val, clip)}
    val[1.0] = of["val"][method]
    alpha = max(val, key=lambda x: val[x].right.double().mean())
    ends = {0.0: models["ZS"], 1.0: models[method], **mixed}
    chosen = {alpha: ends[alpha]}
    reported = {s.name: s for s in (data.test, *data.shifts)}
    right = {n: common.predict(config, chosen, s, clip)[alpha].right for n, s in reported.items()}
    return alpha, right


def evaluate(config, data, clip, models, seed):
    """Rows {"method", "seed", "choice", "right": {split: bool [N]}}, and {FT: {split: Pair}}."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    reported = list(splits)[1:]
    of = {name: common.predict(config, models, split, clip) for name, split in splits.items()}
    T = {
        m: common.temperature(of["val"][m].logits, of["val"][m].labels, config.temperature)
        for m in models
    }
    print("temperatures: " + ", ".join(f"{m} {t:.2f}" for m, t in T.items()))
    scan = scan_training_set(config, data, clip, models)
    rows, pairs = [], {}

    def add(method, right, choice=None):
        rows.append({"method": method, "seed": seed, "choice": choice, "right": right})

    add("Zero-shot", {s: of[s]["ZS"].right for s in reported})
    for m in list(models)[1:]:
        add(m, {s: of[s][m].right for s in reported})
        if m not in config.ensemble.split(",") and not config.finetuned:
            continue
        alpha, right = weight_space(config, data, clip, models, m, of)
        add(f"{m} +WSE", right, alpha)
        V, k = failure_features(config, scan, m)
        e = pairs[m] = {s: make_pair(config, of[s], m, V, k, T) for s in splits}
        print(f"{m}: |V| = {len(V)} of {len(scan['labels'])}, k = {k}, T fitted on ID val")
        for name, (grid, f) in ensembles(config, ab_candidates(config, data.kind)).items():
            point, _ = best(grid, f, e["val"])
            add(
                f"{m} {name}", {s: f(e[s], point).argmax(1) == e[s].labels for s in reported}, point
            )
            if name in ("+OSE", "+VRF"):  # Tab. 11: tuned on each test set, a bound and no result
                points = {s: best(grid, f, e[s])[0] for s in reported}
                right = {s: f(e[s], points[s]).argmax(1) == e[s].labels for s in reported}
                add(f"{m} {name} oracle", right)
    return rows, pairs


def print_tables(config, data, rows):
    """The table in the paper's form, the rows that the paper lacks, and the paper's numbers."""
    splits = [s.name for s in (data.test, *data.shifts)]

    def line(method):
        mean = common.accuracies(rows, method)
        choices = [r["choice"] for r in rows if r["method"] == method and r["choice"] is not None]
        text = " ".join("/".join(f"{x:.2g}" for x in np.atleast_1d(c)) for c in choices[:5])
        return [method, *(f"{mean[s]:.1f}" for s in splits), f"{common.mean_shift(mean):.1f}", text]

    methods = list(dict.fromkeys(r["method"] for r in rows))
    ours = [m for m in methods if "calibrated" in m or "oracle" in m]
    header = ["method", *splits, "avg shift", "alpha or a/b"]
    runs = f"{config.seeds} fine-tuning run{'s' * (config.seeds > 1)}"
    title = f"accuracy in %, mean of {runs}; alpha, a, b by ID val"
    print("\n" + common.table(header, [line(m) for m in methods if m not in ours], title))
    title = "not in the paper's tables (A7); oracle: tuned on each test set"
    print("\n" + common.table(header, [line(m) for m in ours], title))
    for block in json.loads((common.EMBEDDED / "vrf_paper.json").read_text())["tables"]:
        if (config.model, data.kind) == (block["model"], block["kind"]):
            print("\n" + common.table(block["columns"], block["rows"], f"paper, {block['table']}"))
            print("\n".join(block["notes"]))


def windows(d):
    """(low, centre, high) over the bulk of d: 0.2 wide every 0.1 as in Fig. 2, finer if d is narrow."""
    low, high = (float(np.quantile(d, q)) for q in (0.01, 0.99))
    step = min(0.1, max(high - low, 1e-3) / 8)
    return [(c - step, c, c + step) for c in np.arange(low, high + step / 2, step)]


def ratio_by_distance(pairs):
    """Fig. 2: [(centre, Acc_ft / Acc_zs, Acc_zs, Acc_ft, N)] in windows of d; x/0 is nan."""
    d = torch.cat([e.d for e in pairs]).numpy()
    zs = torch.cat([e.p_zs.argmax(1) == e.labels for e in pairs]).numpy()
    ft = torch.cat([e.p_ft.argmax(1) == e.labels for e in pairs]).numpy()
    rows = []
    for low, centre, high in windows(d):
        inside = (d >= low) & (d <= high)
        n, a, b = (max(int(x), 0) for x in (inside.sum(), zs[inside].sum(), ft[inside].sum()))
        rows.append((centre, b / a if a else math.nan, a / max(n, 1), b / max(n, 1), n))
    return rows


def figure(config, data, rows, pairs, method):
    """Figs. 1a and 2: OSE's curve and VRF's point; accuracy ratio and weight against distance."""
    fig, ((left, right),) = common.new_figure(columns=2)
    splits = [s.name for s in (data.test, *data.shifts)]

    def point(scores):
        mean = {s: 100 * common.accuracy(scores(pairs[s]), pairs[s].labels) for s in splits}
        return mean[data.test.name], common.mean_shift(mean)

    numbers = []
    for name, calibrated, colour in (("OSE", False, "tab:pink"), ("OSE calibrated", True, "0.7")):
        p = [
            point(lambda e, x=x, c=calibrated: ose(*(e.calibrated if c else (e.p_zs, e.p_ft)), x))
            for x in ALPHAS
        ]
        left.plot(*zip(*p, strict=True), "o-", ms=3, color=colour, label=name)
        numbers += [("a", name, *xy) for xy in p]
    seed = rows[-1]["seed"]
    named = (r["choice"] for r in rows if (r["method"], r["seed"]) == (f"{method} +VRF", seed))
    ab = next(named)
    xy = point(lambda e: vrf(*e.calibrated, weight(e.d, *ab, config.weight)))
    left.plot(*xy, "D", color="tab:orange", label="VRF")
    left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    left.set_title("one weight for all, or one for each sample")
    left.legend()
    bins = ratio_by_distance([pairs[s] for s in splits])
    d = np.array([b[0] for b in bins])
    w = weight(torch.tensor(d), *ab, config.weight).numpy()
    right.plot(d, [b[1] for b in bins], "o-", ms=3, color="tab:blue")
    right.axhline(1, color="0.6", lw=0.8)
    right.set(xlabel="d(x), distance to the zero-shot failures")
    right.set_title("near them the fine-tuned model is the better one")
    right.set_ylabel("Acc$_{ft}$ / Acc$_{zs}$", color="tab:blue")
    twin = right.twinx()
    twin.plot(d, w, color="tab:green")
    twin.set_ylabel("w(x), weight of the fine-tuned model", color="tab:green")
    twin.grid(False)
    numbers += [("a", "VRF", *xy), *(("b", "ratio", b[0], b[1]) for b in bins)]
    numbers += [("b", "weight", *p) for p in zip(d, w, strict=True)]
    common.save_figure(fig, f"{config.out}/figures/vrf", ["panel", "series", "x", "y"], numbers)


def summary(rows, method):
    """Three sentences on the table, computed from it."""
    zs, ft = common.accuracies(rows, "Zero-shot"), common.accuracies(rows, method)
    id_name = next(iter(zs))
    print(
        f"\n1. {method} moves ID accuracy by {ft[id_name] - zs[id_name]:+.1f} points and the mean"
        f" under shift by {common.mean_shift(ft) - common.mean_shift(zs):+.1f} against zero-shot."
    )
    vrf_row, say = f"{method} +VRF", "{:+.2f} [{:+.2f}, {:+.2f}]".format
    own, shift = common.gain(rows, vrf_row, f"{method} +OSE")
    print(
        f"2. VRF against OSE, both chosen on ID val: ID {say(*own)}, mean under shift {say(*shift)}"
        " points (95 % interval; seeds and images resampled)."
    )
    _, calibrated = common.gain(rows, vrf_row, f"{method} +OSE calibrated")
    _, wse_gain = common.gain(rows, vrf_row, f"{method} +WSE")
    print(
        f"3. Under shift, VRF against OSE of the same calibrated models: {say(*calibrated)} (what is"
        f" due to the sample-wise weight and not to temperature); against WSE: {say(*wse_gain)}."
    )


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier; the ablations start here, too."""
    config = common.parse(Config, argv, __doc__)
    data = common.open_data(config.data, config.val_fraction, config.select_on_test, config.seed)
    print(common.describe(data))
    common.apply_preset(config, data.kind, PRESETS)
    device = common.pick_device(config.device)
    clip = common.load_clip(config)
    head = common.zero_shot_head(clip, data.classes, data.templates, device)
    return config, data, clip, common.Classifier(clip.model.visual, head).to(device)


def main(argv=None):
    config, data, clip, zero_shot = prepare(argv)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        if config.finetuned:
            models = load_finetuned(config, data, clip, zero_shot)
        else:
            models = train_models(config, data, clip, zero_shot, seed)
        new, pairs = evaluate(config, data, clip, models, seed)
        rows += new
    print_tables(config, data, rows)
    common.write_results(config, zero_shot.head.weight.device, rows)
    if pairs and data.shifts:
        method = next(iter(pairs))
        figure(config, data, rows, pairs[method], method)
        summary(rows, method)
    return rows


if __name__ == "__main__":
    common.run(main)
