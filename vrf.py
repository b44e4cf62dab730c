"""VRF: Robust Fine-tuning of Zero-shot Models via Variance Reduction.
Zhu, Cui, Zhang; NeurIPS 2024; arXiv 2411.06966.

Fine-tuning CLIP raises accuracy on its own distribution (ID) and lowers it under shift (OOD), and a
constant mix of the zero-shot (ZS) and the fine-tuned (FT) model trades one for the other. VRF gives
every test sample its own weight: FT counts more near the training samples where ZS fails and FT is
right (the zero-shot-failure set V), because there FT's error is small against ZS's, which is what
the mix of least variance asks for. Two forward passes and a k-NN search; nothing is trained for it.

    Sec. 3.1  Eq. 1   output-space ensemble     ose
              Eq. 2   weight-space ensemble     wse
    Sec. 3.2  Eq. 3   zero-shot-failure set     failures
              Eq. 4   k-th neighbour distance   kth_distance   (k: neighbours)
              Eq. 5   sample-wise ensemble      vrf
              Eq. 6   weight of FT              weight
    Sec. 5.3, App. B  ablations, g* (Eq. 15)    studies/vrf_ablations.py

    python vrf.py                   # embedded digits, 1.5 minutes; VRF: ID 95, shifts 72 to 78
    python vrf.py --data /imagenet  # CLIP ViT-B/16; not measured by us; paper: 82.3 ID, 61.8 OOD

Differs from the paper (P) or the authors' code (C); the README has the reasons under the same IDs:
A1  d is the squared distance, as in C; P writes the plain one. --distance paper converts a and b.
A2  features are L2-normalised before the search, as in C; P only remarks that CLIP's are.
A4  k = floor(0.001 |V|), as in P; C has round(1000 |V| / |D|). A5: never below 1 or above |V|.
A6  VRF has one temperature per model, fitted on ID val, as in C; P's text has none. Plain OSE and
    WSE have none in either, so (A7) calibrated OSE and LSE are printed beside them.
A9  (a, b) are searched on ID val, as P says, once for each fine-tuned model (A14: P leaves that
    open); C has fixed numbers, and P prints several.
A10 ID val is a held-out part of train; C selects on the ID set that it reports.
A11 alpha runs over 0, 0.1, ..., 1, as in P. Of equals the first from the zero-shot side is taken,
    as C does for alpha; ours for (a, b), where neither says.
"""

import copy
import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import arg

ALPHAS = [i / 10 for i in range(11)]  # App. C.1
METHODS = ("LC", "E2E-FT", "LP-FT")
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
PRESETS = {  # scaled to 3,000 images, rates by ID val (data/README.md); LC has the paper's
    "digits": {
        "epochs": 8,
        "batch": 64,
        "lr": 2e-4,
        "lr_lpft": 1e-4,
        "warmup": 38,  # a tenth of the steps
    }
}


@dataclass
class Config:
    data: str = arg("digits", "digits; folder: ImageNet, CIFAR-10, train/ val/; entity30:FOLDER")
    model: str = arg("ViT-B-16", "open_clip architecture; paper: ViT-B-16 and ViT-B-32")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    finetuned: str = arg("", "fine-tuned checkpoint to put VRF on, instead of training (Tab. 12)")
    methods: str = arg("LC,E2E-FT,LP-FT", "what to train, comma-separated")
    ensemble: str = arg("E2E-FT,LP-FT", "which of them get ensemble rows; Tab. 4 has LC, too")
    epochs: int = arg(10, "of LC, E2E-FT and LP-FT; Sec. 5.1", least=1)
    batch: int = arg(512, "Sec. 5.1 (LP-FT on ViT-B/16: 384, App. C.1)", least=1)
    lr: float = arg(3e-5, "E2E-FT; Sec. 5.1")
    lr_lpft: float = arg(1e-5, "second stage of LP-FT; App. C.1")
    lr_lc: float = arg(0.1, "linear classifier; App. C.1")
    weight_decay: float = arg(0.1, "AdamW, all parameters; Sec. 5.1")
    warmup: int = arg(500, "steps of linear warm-up; Sec. 5.1")
    clip: float = arg(1.0, "largest gradient norm; Sec. 5.1")
    zsf_rule: str = arg("paper", "Eq. 3, or the abstract's wording: ZS wrong", "paper zs-wrong")
    features: str = arg("ft", "encoder whose features are searched (A3)", "ft zs")
    distance: str = arg("code", "code: squared; paper: plain (A1)", "paper code")
    # Differs (A4): the authors' code takes k from |D|, which is 20 times more on CIFAR-10
    k_rule: str = arg("paper", "paper: floor(p |V|); code: round(1000 |V| / |D|)", "paper code")
    p: float = arg(0.001, "k as a share of |V|; Sec. 5.1", most=1)
    temperature: str = arg(
        "code", "paper: none; code: confidence = accuracy (A6)", "paper code nll"
    )
    weight: str = arg("sigmoid", "form of the weight; Eq. 6, Tab. 6", "sigmoid linear binary")
    ab: str = arg("search", "search on ID val; paper: Tab. 7; code: 1.5,0.6; or A,B (A9)")
    selection: str = arg(
        "paper", "paper: on ID val; code: on the reported ID set (A10)", "paper code"
    )
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "number of fine-tuning runs", least=1)
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; the paper does not state its own", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(-1, "processes that decode; -1: one per core on a GPU, else none", least=-1)
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
    """k of Eq. (4). paper: floor(p |V|); code: round(1000 |V| / |D|); from 1 to |V| (A4, A5)"""
    k = math.floor(p * stored + 1e-9) if rule == "paper" else round(1000 * stored / train)
    return min(max(k, 1), max(stored, 1))  # 1e-9 above: in binary 0.001 * 3000 may fall short of 3


def kth_distance(v, V, k, squared=False):
    """Eq. (4): d(x; V, k) = ||v - v_(k)||_2, v_(k) the k-th nearest in V.  [N, D], [M, D] -> [N]

    Exact search; |u|^2 - 2 v.u ranks, the chosen distance is recomputed by differences. Holds at
    most 64 M scores at a time. No V: infinity, so that Eq. (6) gives zero-shot all the weight.
    Raises InputError if k > M or the widths differ.
    """
    if v.dim() != 2 or V.dim() != 2 or not v.is_floating_point():
        shapes = f"{v.dtype} {tuple(v.shape)} and {V.dtype} {tuple(V.shape)}"
        raise common.InputError(f"distance: expected float [N, D] and [M, D], got {shapes}")
    if v.shape[1] != V.shape[1]:
        widths = f"{v.shape[1]} and {V.shape[1]}"
        raise common.InputError(f"distance: features have width {widths}; use one encoder for both")
    if len(V) == 0:
        return v.new_full((len(v),), math.inf)
    if not 1 <= k <= len(V):
        raise common.InputError(f"distance: k = {k} of {len(V)} stored; expected 1 to {len(V)}")
    norms, d = V.square().sum(1), [v.new_empty(0)]
    if not (norms.isfinite().all() and v.square().sum(1).isfinite().all()):  # NaN sorts as farthest
        raise common.InputError("distance: features hold inf or nan")
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
    wanted, models = common.choose(config.methods, METHODS, "--methods"), {"ZS": zero_shot}
    recipes = {
        "LC": ("ZS", common.linear_probe, config.lr_lc),
        "E2E-FT": ("ZS", common.fine_tune, config.lr),
        "LP-FT": ("LC", common.fine_tune, config.lr_lpft),
    }
    for name, (start, train, lr) in recipes.items():
        if name in wanted or (name == "LC" and "LP-FT" in wanted):
            models[name] = copy.deepcopy(models[start])
            train(config, f"{name}, seed {seed}", models[name], data.train, clip, lr, seed)
    return {name: models[name] for name in ["ZS", *wanted]}


def scan_training_set(config, data, clip, models, method):
    """Algorithm 1, offline: one pass over train for all `models`, kept for each of them.

    {"labels", "zs", "ft": argmax [N], "features/zs", "features/ft": [M', D] of the samples that ZS
    gets wrong, of which V is a part}. Never logits: 1.28 M x 1000 of them are 5 GB a model.
    """
    fields = [data.train.fingerprint, clip.key, config.precision, config.skip_bad_images]
    weights = {m: model.state_dict() for m, model in models.items()}
    todo = {m: [weights["ZS"], weights[m], fields] for m in models if m != "ZS"}

    def compute():
        kept = {}
        for _, labels, out in common.forward(config, models, data.train, clip):
            zs = out["ZS"][1].argmax(1)
            wrong = zs != labels
            for m in todo:
                rows = {"labels": labels, "zs": zs, "ft": out[m][1].argmax(1)}
                rows |= {"features/zs": out["ZS"][0][wrong], "features/ft": out[m][0][wrong]}
                for name, value in rows.items():
                    kept.setdefault(m, {}).setdefault(name, []).append(value)
        return {m: {k: torch.cat(x) for k, x in rows.items()} for m, rows in kept.items()}

    return common.cached_together(config, "scan", todo, compute)[method]


def failure_features(config, scan, method):
    """V as L2-normalised features [M, D] (A2), and k."""
    labels, zs = scan["labels"], scan["zs"]
    kept = failures(zs, scan["ft"], labels, config.zsf_rule)[zs != labels]
    V = scan[f"features/{config.features}"][kept]
    if len(V) == 0:
        print(f"{method}: ZS fails on no training sample that FT gets right; VRF is zero-shot then")
    # Differs (A2): Eq. (3) stores raw features; the authors' code normalises before the search
    return F.normalize(V, dim=1), neighbours(len(V), config.k_rule, config.p, len(labels))


# --- evaluate -------------------------------------------------------------------------------------


@dataclass
class Study:
    """One seed: models, {split: {model: Prediction}}, {model: temperature}."""

    models: dict
    predictions: dict
    T: dict


def collect(config, data, clip, models):
    """Study of `models` on ID val (as "val"), ID and shifts; temperatures from ID val (A6)."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    predictions = {name: common.predict(config, models, s, clip) for name, s in splits.items()}
    val = {m: (p.logits, p.labels) for m, p in predictions["val"].items()}
    # Differs (A6): the paper's text has no temperature, the authors' code has one for VRF
    criterion = {"paper": "off", "code": "confidence", "nll": "nll"}[config.temperature]
    T = {m: common.temperature(*val[m], criterion) for m in models}
    return Study(models, predictions, T)


@dataclass
class Pair:
    """ZS and one FT model on one split: logits [N, C], temperatures, distances d and labels [N]."""

    zs: torch.Tensor
    ft: torch.Tensor
    T: tuple
    d: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def raw(self):
        return self.zs.softmax(1), self.ft.softmax(1)

    @cached_property
    def calibrated(self):
        return (self.zs / self.T[0]).softmax(1), (self.ft / self.T[1]).softmax(1)


def make_pairs(config, study, method, V, k):
    """{split: Pair} for ZS and `method`, with distances to the rows of V."""
    pairs, T = {}, (study.T["ZS"], study.T[method])
    device, squared = common.pick_device(config.device), config.distance == "code"
    n = sum(len(of[method].labels) for of in study.predictions.values())
    kernels = common.kernels(n * V.numel()) if device.type == "cpu" else None
    for split, of in study.predictions.items():
        v = F.normalize(of["ZS" if config.features == "zs" else method].features, dim=1)
        # Differs (A1): the paper writes the plain distance, but its a and b fit the squared one
        if kernels:  # kth_distance, faster
            d = kernels.knn_kth_distance(common.mine(v), V, k) ** (2 if squared else 1)
        else:
            d = kth_distance(common.mine(v).to(device), V.to(device), k, squared).cpu()
        d = common.gather(d)
        pairs[split] = Pair(of["ZS"].logits, of[method].logits, T, d, of[method].labels)
    return pairs


def ab_candidates(config, kind):
    """(a, b) to try on ID val, smallest first. They are given for squared d; for plain d (A1) they
    become sqrt(a), b / (2 sqrt(a)), to first order at d = a; the linear weight's b is 1 / width.
    """
    # Differs (A9): the paper searches on a grid that it does not state, the code has one fixed pair
    known = {"search": AB_GRID, "code": [AB_CODE], "paper": [AB_PAPER.get((config.model, kind))]}
    grid = known.get(config.ab)
    if grid == [None]:
        raise common.InputError(f"--ab paper: Table 7 lacks {config.model} on {kind}; use search")
    if grid is None:
        expected = "search, paper, code or two positive numbers such as 1.5,0.6"
        try:
            numbers = common.numbers(config.ab, "--ab")
        except common.InputError:
            numbers = []
        if len(numbers) != 2:
            raise common.InputError(f"--ab {config.ab}: expected {expected}")
        grid = [tuple(numbers)]
    if config.distance == "paper":
        power = 1 if config.weight == "linear" else -1
        grid = [(math.sqrt(a), b * (2 * math.sqrt(a)) ** power) for a, b in grid]
    return grid


def ensembles(config, candidates):
    """{row: (grid to search on ID val, scores(Pair, point) -> [N, C])}; from the third on ours."""

    def lse(e, alpha):  # Sec. 5.3: logits instead of probabilities
        return ose(e.zs / e.T[0], e.ft / e.T[1], alpha)

    return {
        "+OSE": (ALPHAS, lambda e, alpha: ose(*e.raw, alpha)),
        "+VRF": (candidates, lambda e, ab: vrf(*e.calibrated, weight(e.d, *ab, config.weight))),
        "+OSE calibrated": (ALPHAS, lambda e, alpha: ose(*e.calibrated, alpha)),
        "+OSE calibrated, alpha 1/2": ([0.5], lambda e, alpha: ose(*e.calibrated, alpha)),
        "+LSE calibrated": (ALPHAS, lse),
        "+VRF raw": (candidates, lambda e, ab: vrf(*e.raw, weight(e.d, *ab, config.weight))),
    }


def best(grid, scores, pair):
    """The grid point of highest accuracy, and that accuracy; of equals the first (A11)."""
    found = [common.accuracy(scores(pair, point), pair.labels) for point in grid]
    first = found.index(max(found))  # Differs (A11): the paper has no rule, the code's is for alpha
    return grid[first], found[first]


def weight_space(config, data, clip, study, method):
    """+WSE: alpha by ID val, {split: right [N]}. The grid's ends are ZS and FT themselves."""
    zs, ft = study.models["ZS"], study.models[method]
    # one pass over ID val, at the price of nine models on the device: ViT-B/16 3 GB, ViT-L/14 11
    mixed = {alpha: copy.deepcopy(zs) for alpha in ALPHAS[1:-1]}
    for alpha, model in mixed.items():
        model.load_state_dict(wse(zs.state_dict(), ft.state_dict(), alpha))
    between = common.predict(config, mixed, data.val, clip)
    val = {0.0: study.predictions["val"]["ZS"], **between, 1.0: study.predictions["val"][method]}
    alpha = max(val, key=lambda x: val[x].right.double().mean())
    chosen = {alpha: {0.0: zs, **mixed, 1.0: ft}[alpha]}
    splits = (data.test, *data.shifts)
    return alpha, {s.name: common.predict(config, chosen, s, clip)[alpha].right for s in splits}


def evaluate(config, data, clip, models, seed):
    """Rows {"method", "seed", "choice", "right": {split: bool [N]}}, and {FT: {split: Pair}}."""
    mixed = common.choose(config.ensemble, METHODS, "--ensemble")
    mixed = [m for m in models if m in mixed or m == "Fine-tuned"]
    study = collect(config, data, clip, models)
    reported = [s for s in study.predictions if s != "val"]
    rows, pairs = [], {}

    def add(method, right, choice=None, ours=False):
        row = {"method": method, "seed": seed, "choice": choice, "ours": ours, "right": right}
        rows.append(row)

    for m in models:
        add("Zero-shot" if m == "ZS" else m, {s: study.predictions[s][m].right for s in reported})
        if m not in mixed:
            continue
        alpha, right = weight_space(config, data, clip, study, m)
        add(f"{m} +WSE", right, alpha)
        scanned = {x: models[x] for x in ("ZS", *mixed)}
        scan = scan_training_set(config, data, clip, scanned, m)
        V, k = failure_features(config, scan, m)
        print(f"{m}, seed {seed}: |V| = {len(V)} of {len(scan['labels'])}, k = {k},", end=" ")
        print(f"temperatures: ZS {study.T['ZS']:.2f}, {m} {study.T[m]:.2f}")
        e = pairs[m] = make_pairs(config, study, m, V, k)
        for name, (grid, f) in ensembles(config, ab_candidates(config, data.kind)).items():
            point, _ = best(grid, f, e["val"])
            paper = name in ("+OSE", "+VRF")
            add(f"{m} {name}", {s: right_of(f, e[s], point) for s in reported}, point, not paper)
            if paper:  # Tab. 11: tuned on each test set, a bound and no result
                right = {s: right_of(f, e[s], best(grid, f, e[s])[0]) for s in reported}
                add(f"{m} {name} oracle", right, ours=True)
    return rows, pairs


def right_of(scores, pair, point):
    return scores(pair, point).argmax(1) == pair.labels


def print_tables(config, data, rows):
    """The table in the paper's form, the rows that the paper lacks, and the paper's numbers."""
    runs = f"mean of {config.seeds} fine-tuning run{'s' * (config.seeds > 1)}"
    own = [r for r in rows if r["ours"]]
    where = "the reported ID set (A10)" if config.selection == "code" else "ID val"
    title = f"accuracy in %, {runs}; alpha, a/b chosen on {where}"
    print("\n" + common.accuracy_table([r for r in rows if not r["ours"]], title))
    if own:
        title = "not in the paper's tables (A7); oracle: tuned on each test set itself (Tab. 11)"
        print("\n" + common.accuracy_table(own, title))
    for block in json.loads((common.EMBEDDED / "vrf_paper.json").read_text())["tables"]:
        if (config.model, data.kind) == (block["model"], block["kind"]):
            print("\n" + common.table(block["columns"], block["rows"], f"paper, {block['table']}"))
            print("\n".join(block["notes"]))


def windows(d):
    """(low, centre, high) over the bulk of d: 0.2 wide every 0.1, as in Fig. 2, or finer."""
    d = np.asarray(d)
    d = d[np.isfinite(d)]  # infinite if there are no failures
    if len(d) == 0:
        return []
    low, high = (float(np.quantile(d, q)) for q in (0.01, 0.99))
    step = min(0.1, max(high - low, 1e-3) / 8)
    return [(c - step, c, c + step) for c in np.arange(low, high + step / 2, step)]


def ratio_by_distance(pairs):
    """Fig. 2: [(centre, Acc_ft / Acc_zs, Acc_zs, Acc_ft, N)] in windows of d; x/0 is nan."""
    d = torch.cat([e.d for e in pairs]).numpy()
    zs = torch.cat([e.zs.argmax(1) == e.labels for e in pairs]).numpy()
    ft = torch.cat([e.ft.argmax(1) == e.labels for e in pairs]).numpy()
    rows = []
    for low, centre, high in windows(d):
        inside = (d >= low) & (d <= high)
        n, a, b = max(int(inside.sum()), 1), zs[inside].sum(), ft[inside].sum()
        rows.append((centre, b / a if a else math.nan, a / n, b / n, int(inside.sum())))
    return rows


def figure(config, rows, pairs, method):
    """Figs. 1a and 2: OSE's curve and VRF's point; accuracy ratio and weight against distance."""
    fig, ((left, right),) = common.new_figure(columns=2)
    reported = {s: e for s, e in pairs.items() if s != "val"}

    def point(scores):
        mean = {s: 100 * common.accuracy(scores(e), e.labels) for s, e in reported.items()}
        return next(iter(mean.values())), common.mean_shift(mean)

    numbers = []
    for name, colour in (("raw", "tab:pink"), ("calibrated", "0.7")):
        p = [point(lambda e, x=x, n=name: ose(*getattr(e, n), x)) for x in ALPHAS]
        left.plot(*zip(*p, strict=True), "o-", ms=3, color=colour, label=f"OSE, {name}")
        numbers += [("a", f"OSE {name}", *xy) for xy in p]
    for end, text, where in ((p[0], "zero-shot", "left"), (p[-1], "fine-tuned", "right")):
        left.annotate(text, end, (0, -11), textcoords="offset points", ha=where, fontsize=8)
    ab = [r["choice"] for r in rows if r["method"] == f"{method} +VRF"][-1]
    xy = point(lambda e: vrf(*e.calibrated, weight(e.d, *ab, config.weight)))
    left.plot(*xy, "D", color="tab:orange", label="VRF")
    left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    left.set_title(f"zero-shot and {method}, mixed")
    left.legend(loc="center left")
    left.margins(y=0.12)
    bins = ratio_by_distance(list(reported.values()))
    d = torch.tensor([b[0] for b in bins])
    w = weight(d, *ab, config.weight)
    right.plot(d, [b[1] for b in bins], "o-", ms=3, color="tab:blue")
    right.axhline(1, color="0.6", lw=0.8)
    right.set(xlabel="d(x), distance to the zero-shot failures")
    right.set_title("fine-tuned against zero-shot, by distance")
    right.set_ylabel("Acc$_{ft}$ / Acc$_{zs}$", color="tab:blue")
    twin = right.twinx()
    twin.plot(d, w, color="tab:green")
    twin.set_ylabel("w(x), weight of the fine-tuned model", color="tab:green")
    twin.grid(False)
    numbers += [("a", "VRF", *xy), *(("b", "ratio", b[0], b[1]) for b in bins)]
    numbers += [("b", "weight", *p) for p in zip(d.tolist(), w.tolist(), strict=True)]
    common.save_figure(fig, f"{config.out}/figures/vrf", ["panel", "series", "x", "y"], numbers)


def summary(rows, method):
    """Three sentences on the table, computed from it."""
    zs, ft = (list(common.accuracies(rows, m).values()) for m in ("Zero-shot", method))
    up, down = ft[0] - zs[0], float(np.mean(ft[1:]) - np.mean(zs[1:]))
    print(
        f"\n1. {method} moves ID accuracy by {up:+.1f} points, the mean under shift by {down:+.1f}."
    )
    say = "{:+.2f} [{:+.2f}, {:+.2f}]".format
    own, shift = common.gain(rows, f"{method} +VRF", f"{method} +OSE")
    print(f"2. VRF less OSE, both chosen as above: {say(*own)} points on ID, {say(*shift)} in the")
    print(f"   mean under shift (95 % intervals over {common.sampled(rows)}).")
    _, calibrated = common.gain(rows, f"{method} +VRF", f"{method} +OSE calibrated")
    _, weights = common.gain(rows, f"{method} +VRF", f"{method} +WSE")
    print(f"3. Under shift, VRF less OSE of the same calibrated models is {say(*calibrated)}:")
    print(f"   what the sample-wise weight does beyond temperature. VRF less WSE: {say(*weights)}.")


# --- main -----------------------------------------------------------------------------------------


def prepare(argv=None):
    """Command line -> config, data, CLIP, zero-shot Classifier; the ablations start here, too."""
    config, data = common.begin(Config, argv, __doc__, PRESETS)
    common.choose(config.methods, METHODS, "--methods")  # now, not after hours of training
    common.choose(config.ensemble, METHODS, "--ensemble")
    ab_candidates(config, data.kind)
    return config, data, *common.zero_shot(config, data)


def main(argv=None):
    config, data, clip, zero_shot = prepare(argv)
    config.seeds = 1 if config.finetuned else config.seeds  # nothing is random then
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        if config.finetuned:
            tuned = common.load_finetuned(config, data, clip, zero_shot)
            models = {"ZS": zero_shot, "Fine-tuned": tuned}
        else:
            models = train_models(config, data, clip, zero_shot, seed)
        new, pairs = evaluate(config, data, clip, models, seed)
        rows += new
    common.write_results(config, zero_shot.head.weight.device, rows)
    print_tables(config, data, rows)
    if pairs and data.shifts:
        method = next(iter(pairs))
        figure(config, rows, pairs[method], method)
        summary(rows, method)
    return rows


if __name__ == "__main__":
    common.run(main)
