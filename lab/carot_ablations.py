"""The ablations and further figures of CaRot (Sec. 5, App.): sweeps over carot.py's functions.

    python lab/carot_ablations.py components              # one, on the digits
    python lab/carot_ablations.py corruptions --data /imagenet   # every flag of carot.py works
    python lab/carot_ablations.py all                     # digits: all, 40 minutes of one core

    components   Tab. 4    all of L_MCL, L_OC, L_SD on and off   5 trainings
    lambdas      Tab. 5    lambda_OC at lambda_SD 1.5, and back  8 trainings
    svd          Tab. A    rivals of L_OC at its coefficient     4 trainings
    period       -         steps between the teacher's updates   4 trainings
    teacher      -         the teacher beside its student
    measures     -         ECE of four kinds, NLL, Brier score
    temperature  Tab. D    by least NLL and by least ECE
    reliability  Fig. B    accuracy by confidence, all shifts together
    spectrum     Fig. 6    last singular values, ID and shifts
    corruptions  Figs. 4, 5  ImageNet-C, or the digits' test set corrupted here
    wise         -         WiSE-FT: each model mixed with zero-shot

Each prints its table and leaves PNG and CSV in OUT/figures. What carot.py has trained under the
same OUT is read and not trained again; --seeds N averages over N runs. A training on the digits
takes about a minute of one core. The grids are ours: those of the paper's sweeps are not known to
us. ImageNet-C: the 15 corruptions and the extra four at 5 severities, as imagenet-c/ in the tree or
beside it.

The rows of Tab. 4 without L_MCL have the other terms alone. The paper's have the cross-entropy in
its place, and are not built yet.
"""

import copy
import dataclasses
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import image_corruptions  # noqa: E402
import imagenet_c  # noqa: E402

import carot  # noqa: E402
import common  # noqa: E402
import vrf  # noqa: E402


@dataclasses.dataclass
class Setting:
    """What the study starts from, as carot.prepare gives it."""

    config: carot.Config
    data: common.Data
    clip: common.Clip
    zero_shot: common.Classifier

    @property
    def seeds(self):
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def splits(self):
        return [self.data.test, *self.data.shifts]


def settings_of(s, seed, **changes):
    """CaRot's settings for one training, some of them changed."""
    return dataclasses.replace(carot.recipe(s.config, "CaRot", seed), **changes)


def tuned(s, seed, name="", loss=carot.loss_of, **changes):
    """Classifier fine-tuned as CaRot with changed settings or another loss(settings, f, logits,
    W_v, W_l, taught). Without a name it has FLYP's or CaRot's, so that carot.py's checkpoints are
    found.
    """
    settings = settings_of(s, seed, **changes)
    constrained = settings.oc or settings.sd or settings.cross_fnorm
    name = name or ("CaRot" if constrained else "FLYP")
    module = carot.fine_tune(settings, name, s.clip, s.data, loss)
    return carot.as_classifier(s.config, s.data, s.clip, module.student)


HEADER = ["ID acc", "ID ECE", "shift acc", "shift ECE", "sigma_min"]


def measure(s, model_of):
    """HEADER's numbers, means over seeds, of model_of(seed) -> Classifier."""
    rows = []
    for seed in s.seeds:
        rows.append(carot.evaluate(s.config, s.data, s.clip, {"": model_of(seed)}, seed)[0])
    accuracy, ece = common.accuracies(rows, ""), carot.measured(rows, "")
    sigma = float(carot.spectrum_of(rows, "")[-1])
    on_id = [accuracy[common.ID], ece[common.ID]]
    return [*on_id, common.mean_shift(accuracy), common.mean_shift(ece), sigma]


def cells(numbers):
    """HEADER's numbers as text."""
    return [f"{x:.{digits}f}" for x, digits in zip(numbers, (1, 3, 1, 3, 4), strict=True)]


def show(s, title, header, rows):
    """Print a table."""
    runs = f"mean of {len(s.seeds)} run{'s' * (len(s.seeds) > 1)}"
    print("\n" + common.table(header, rows, f"{title}; {runs}"))


def figure(s, name, header, columns=1, rows=1):
    return common.figure(f"{s.config.out}/figures/{name}", header, columns, rows)


def scatter(s, name, header, rows, points):
    """Figure: shift accuracy over negative shift ECE of {name: numbers of HEADER}."""
    with figure(s, name, header) as (axes, numbers):
        axis = axes[0, 0]
        for label, x in points.items():
            axis.plot(-x[3], x[2], "o")
            axis.annotate(label, (-x[3], x[2]), (4, 3), textcoords="offset points", fontsize=7)
        axis.set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
        axis.margins(0.15)
        numbers += rows


# --- Tables 4, 5, A -------------------------------------------------------------------------------


def without_mcl(settings, f, logits, W_v, W_l, taught):
    """L_OC, with the cross term, and L_SD alone. The weights that they do not reach still decay."""
    loss = 0 * carot.contrastive(logits)
    if settings.oc:
        loss = loss + settings.oc * carot.orthogonality(W_v, settings.oc_form)
    if settings.cross_fnorm:
        loss = loss + settings.cross_fnorm * carot.cross_term(W_v, W_l, settings.cross_form)
    if settings.sd and taught is not None:
        loss = loss + settings.sd * carot.self_distillation(logits, taught, settings.sd_form)
    return loss


def components(s):
    """Tab. 4: L_MCL, L_OC (with the cross term), L_SD, each on and off; none: zero-shot."""
    rows, points, c = [], {}, s.config
    for mcl, oc, sd in itertools.product((0, 1), repeat=3):
        weights = {"oc": c.oc * oc, "cross_fnorm": c.cross_fnorm * oc, "sd": c.sd * sd}

        def model_of(seed, weights=weights, mcl=mcl):
            if not mcl and not any(weights.values()):
                return s.zero_shot
            if not mcl:
                return tuned(s, seed, "without L_MCL", without_mcl, **weights)
            return tuned(s, seed, **weights)

        x = measure(s, model_of)
        terms = {"MCL": mcl, "OC": oc, "SD": sd}
        rows.append([*("x" if on else "-" for on in terms.values()), *cells(x)])
        points["+".join(name for name, on in terms.items() if on) or "zero-shot"] = x
    header = ["L_MCL", "L_OC", "L_SD", *HEADER]
    show(s, "Tab. 4", header, rows)
    scatter(s, "components", header, rows, points)


def lambdas(s):
    """Tab. 5: one lambda varies, the other is the paper's; grid ours."""
    grids = {"oc": (0.0, 0.05, 0.2, 0.5, 1.0), "sd": (0.0, 0.5, 1.5, 3.0, 5.0)}
    rows, header = [], ["varied", "value", *HEADER]
    with figure(s, "lambdas", header, columns=2, rows=2) as (axes, numbers):
        for (varied, grid), column in zip(grids.items(), axes.T, strict=True):
            found = []
            for value in grid:
                changes = {varied: value}
                x = measure(s, lambda seed, changes=changes: tuned(s, seed, **changes))
                rows.append([f"lambda_{varied.upper()}", f"{value:g}", *cells(x)])
                found.append(x)
            label = f"lambda_{varied.upper()}"
            column[0].plot(grid, [x[2] for x in found], "o-", ms=3)
            column[0].set(xlabel=label, ylabel="mean accuracy under shift, %")
            column[1].plot(grid, [x[3] for x in found], "o-", ms=3)
            column[1].set(xlabel=label, ylabel="its ECE")
        numbers += rows
    show(s, "Tab. 5", header, rows)


def singular_values_to_one(W_v):
    """sum_i (sigma_i - 1)^2 over the singular values of W_v; ours.  [in, D] -> []"""
    return (torch.linalg.svdvals(W_v) - 1).square().sum()


def minus_sigma_min(f):
    """Tab. A's rival: minus the smallest singular value of the batch's features' covariance.
    [B, D] -> []

    Here of their second moments, I^T I / B: centred, a batch of B <= D features has rank B - 1, and
    the smallest is 0 whatever the weights.
    """
    return -torch.linalg.eigvalsh(f.T @ f / len(f))[0]


def with_singular_values(settings, f, logits, W_v, W_l, taught):
    rest = rest_of_carot(settings, logits, W_v, W_l, taught)
    return rest + settings.oc * singular_values_to_one(W_v)


def with_sigma_min(settings, f, logits, W_v, W_l, taught):
    return rest_of_carot(settings, logits, W_v, W_l, taught) + settings.oc * minus_sigma_min(f)


def rest_of_carot(settings, logits, W_v, W_l, taught):
    """CaRot's loss without L_OC."""
    forms = {"cross": settings.cross_form, "sd": settings.sd_form}
    return carot.carot_loss(logits, W_v, W_l, taught, 0.0, settings.sd, settings.cross_fnorm, forms)


def svd(s):
    """Tab. A: what can stand in L_OC's place, at L_OC's coefficient, with its price per step."""
    c, rows, points = s.config, [], {}
    W_v = carot.projections(s.clip.model)[0]
    f = torch.randn(c.batch, W_v.shape[1], device=W_v.device)
    forms = {  # name: (Classifier of a seed, function and tensor that are timed)
        "none": (lambda seed: tuned(s, seed, oc=0.0), None, None),
        "norm (code)": (lambda seed: tuned(s, seed, oc_form="code"), carot.orthogonality, W_v),
        "squared (paper)": (
            lambda seed: tuned(s, seed, oc_form="paper"),
            lambda W: carot.orthogonality(W, "paper"),
            W_v,
        ),
        "sum (sigma_i - 1)^2": (
            lambda seed: tuned(s, seed, "singular values", with_singular_values),
            singular_values_to_one,
            W_v,
        ),
        "-sigma_min (rival)": (
            lambda seed: tuned(s, seed, "sigma_min", with_sigma_min),
            minus_sigma_min,
            f,
        ),
    }
    for form, (model_of, term, tensor) in forms.items():
        x = points[form] = measure(s, model_of)
        price = "-" if term is None else f"{milliseconds(term, tensor):.2f}"
        rows.append([form, *cells(x), price])
    header = ["L_OC", *HEADER, "ms a step"]
    show(s, f"Tab. A, lambda_OC {c.oc:g}", header, rows)
    scatter(s, "svd", header, rows, points)


def milliseconds(term, tensor):
    """Median time of a term of the loss and of its gradient."""
    tensor, times = tensor.detach().clone().requires_grad_(), []
    for _ in range(20):
        start = time.perf_counter()
        term(tensor).backward()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


# --- the teacher ----------------------------------------------------------------------------------


def period(s):
    """Steps between updates of the teacher: with 1 it is the student of a moment ago."""
    every, points = s.config.ema_every, {}
    for steps in sorted({1, max(1, every // 4), every, 4 * every, 16 * every}):
        points[steps] = measure(s, lambda seed, steps=steps: tuned(s, seed, ema_every=steps))
    rows, header = [[steps, *cells(x)] for steps, x in points.items()], ["every", *HEADER]
    total = common.steps_of(s.config, len(s.data.train.labels))
    show(s, f"teacher's period, of {total} steps", header, rows)
    with figure(s, "period", header, columns=2) as (axes, numbers):
        left, right = axes[0]
        left.semilogx(list(points), [x[2] for x in points.values()], "o-", ms=3)
        left.set(xlabel="steps between updates", ylabel="accuracy under shift, %")
        right.semilogx(list(points), [x[3] for x in points.values()], "o-", ms=3)
        right.set(xlabel="steps between updates", ylabel="its ECE")
        numbers += rows


def teacher(s):
    """CaRot's teacher beside the student; the authors evaluate the student."""

    def tower(seed, name):
        module = carot.fine_tune(settings_of(s, seed), "CaRot", s.clip, s.data)
        return carot.as_classifier(s.config, s.data, s.clip, getattr(module, name))

    points = {
        name: measure(s, lambda seed, name=name: tower(seed, name))
        for name in ("student", "teacher")
    }
    rows, header = [[name, *cells(x)] for name, x in points.items()], ["CaRot's", *HEADER]
    show(s, "the teacher", header, rows)
    scatter(s, "teacher", header, rows, points)


# --- calibration ----------------------------------------------------------------------------------


def models_of(s, seed):
    return carot.train_models(s.config, s.data, s.clip, s.zero_shot, seed)


def adaptive_ece(p, labels, bins=10):
    """ECE over bins of equal count; equal confidences may be parted, in the order of the images."""
    confidence, predicted = p.double().max(1)
    order = confidence.argsort(stable=True)
    gap = ((predicted == labels).double() - confidence)[order]
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(labels)


def classwise_ece(p, labels, bins=10):
    """Mean over classes c of the ECE of p_c as the probability of "the label is c"."""
    error = 0.0
    for c, p_c in enumerate(p.double().unbind(1)):
        gap = (labels == c).double() - p_c
        summed = gap.new_zeros(bins).index_add_(0, common.bin_of(p_c, bins), gap)
        error += summed.abs().sum().item() / len(labels) / p.shape[1]
    return error


def brier(p, labels):
    """Mean of sum_c (p_c - [c = label])^2, from 0 to 2."""
    return (p.double() - F.one_hot(labels, p.shape[1])).square().sum(1).mean().item()


MEASURES = {
    "ECE": common.ece,
    "ECE per 512": carot.ece_per_batch,
    "adaptive ECE": adaptive_ece,
    "class-wise ECE": classwise_ece,
    "NLL": common.nll,
    "Brier": brier,
}


def least_ece_temperature(logits, labels):
    """The paper's T (Tab. D): least ECE on ID val; on a grid from 0.1 to 10."""
    grid = [10 ** (i / 100) for i in range(-100, 101)]
    return min(grid, key=lambda T: common.ece((logits / T).softmax(1), labels))


def calibrated(s):
    """Yield (method, criterion, T, {split: Prediction}) of every seed and method. The criterion is
    "" with T 1, or "NLL" or "ECE", of which T has the least on ID val.
    """
    for seed in s.seeds:
        models = models_of(s, seed)
        val = common.predict(s.config, models, s.data.val, s.clip)
        of = {split.name: common.predict(s.config, models, split, s.clip) for split in s.splits}
        for method in models:
            logits, labels = val[method].logits, val[method].labels
            found = {split: predictions[method] for split, predictions in of.items()}
            yield method, "", 1.0, found
            yield method, "NLL", common.temperature(logits, labels, "nll"), found
            yield method, "ECE", least_ece_temperature(logits, labels), found


def of_each_split(f, T, found):
    """[f on ID, mean of f over the shifts], of probabilities at temperature T."""
    values = {split: f((x.logits / T).softmax(1), x.labels) for split, x in found.items()}
    return [values[common.ID], common.mean_shift(values)]


def measures(s):
    """Every measure of calibration, on ID and in the mean over shifts; +TS: T by least NLL."""
    found, header = {}, ["method", *MEASURES]
    for method, criterion, T, predictions in calibrated(s):
        if criterion != "ECE":
            values = [of_each_split(f, T, predictions) for f in MEASURES.values()]
            found.setdefault(f"{method} +TS" if criterion else method, []).append(values)
    means = {name: np.mean(values, 0) for name, values in found.items()}
    rows = [[name, *(f"{a:.3f} {b:.3f}" for a, b in values)] for name, values in means.items()]
    show(s, "every measure on ID and in the mean over shifts", header, rows)


def temperature(s):
    """Tab. D: no temperature, that of least NLL, and the paper's, of least ECE; both on ID val."""
    found, header = {}, ["method", "T by", "T", "ID ECE", "shift ECE"]
    for method, criterion, T, predictions in calibrated(s):
        values = [T, *of_each_split(common.ece, T, predictions)]
        found.setdefault((method, criterion or "-"), []).append(values)
    means = {key: np.mean(values, 0) for key, values in found.items()}
    rows = [[*key, f"{T:.2f}", f"{a:.3f}", f"{b:.3f}"] for key, (T, a, b) in means.items()]
    show(s, "Tab. D, temperatures", header, rows)


def bins_of(rows, bins=10):
    """Fig. B: (confidence, accuracy, N) of each bin, all shifts and seeds of one method's Rows
    together; nan where a bin is empty.
    """
    shifts = [split for split in rows[0].right if split != common.ID]
    confidence = torch.cat([r.tensors["confidence"][split] for r in rows for split in shifts])
    right = torch.cat([r.right[split] for r in rows for split in shifts]).double()
    index = common.bin_of(confidence, bins)
    n = torch.bincount(index, minlength=bins)
    confidences = torch.bincount(index, confidence, minlength=bins) / n
    accuracies = torch.bincount(index, right, minlength=bins) / n
    return list(zip(confidences.tolist(), accuracies.tolist(), n.tolist(), strict=True))


def pooled_ece(bins):
    """ECE of all images of `bins_of` together."""
    images = sum(n for *_, n in bins)
    return sum(n / images * abs(c - a) for c, a, n in bins if n)


def reliability(s):
    """Fig. B: bars are accuracies by bin of confidence, dashes the mean confidence in the bin."""
    rows = []
    for seed in s.seeds:
        rows += carot.evaluate(s.config, s.data, s.clip, models_of(s, seed), seed)
    methods = dict.fromkeys(r.method for r in rows if r.choice is None)
    header = ["method", "confidence", "accuracy", "images"]
    table = []
    with figure(s, "reliability", header, columns=len(methods)) as (axes, numbers):
        for i, (axis, method) in enumerate(zip(axes[0], methods, strict=True)):
            bins = bins_of([r for r in rows if r.method == method])
            centres = [(k + 0.5) / len(bins) for k in range(len(bins))]
            confidences = [confidence for confidence, *_ in bins]
            axis.bar(centres, [accuracy for _, accuracy, _ in bins], width=0.09, color=f"C{i}")
            axis.plot(confidences, confidences, "k_", ms=12)
            axis.plot([0, 1], [0, 1], "--", color="0.6", lw=0.8)
            axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
            axis.set_title(f"{method}, all shifts: ECE {pooled_ece(bins):.3f}")
            numbers += [(method, *values) for values in bins]
            table.append([method, f"{pooled_ece(bins):.3f}"])
    show(s, "Fig. B: ECE of all shifts together", ["method", "ECE"], table)


# --- Figs. 4, 5, 6 --------------------------------------------------------------------------------


def spectrum(s):
    """Fig. 6 on ID and on the shifts: the last 20 singular values, and how far sigma_min is."""
    found = {}
    for seed in s.seeds:
        models = models_of(s, seed)
        for split in s.splits:
            for method, x in common.predict(s.config, models, split, s.clip).items():
                values = carot.singular_values(x.features).numpy()
                found.setdefault((method, split.name), []).append(values)
    found = {key: np.mean(values, 0) for key, values in found.items()}
    names, methods = [split.name for split in s.splits], list(models)
    rows = [[m, *(f"{found[m, name][-1]:.4f}" for name in names)] for m in methods]
    show(s, "Fig. 6: sigma_min by set", ["method", *names], rows)
    header = ["method", "set", "from the smallest", "singular value"]
    with figure(s, "spectrum", header, columns=2) as (axes, numbers):
        for axis, name in zip(axes[0], names, strict=False):
            for m in methods:
                axis.plot(range(-19, 1), found[m, name][-20:], ".-", label=m)
            axis.set(title=name, xlabel="the last 20, from the smallest", ylabel="singular value")
        axes[0, 0].legend()
        for (m, name), values in found.items():
            numbers += [(m, name, i - 19, float(v)) for i, v in enumerate(values[-20:])]


def corruptions(s):
    """Figs. 4, 5: means over severities 1 to 5 by corruption; boxes of two of them."""
    found = {}  # (method, corruption): [(severity, accuracy, ECE) of each severity and seed]
    for seed in s.seeds:
        models = models_of(s, seed)
        for name, severity, split in corrupted_sets(s):
            for m, x in common.predict(s.config, models, split, s.clip).items():
                accuracy = 100 * x.right.double().mean().item()
                values = severity, accuracy, common.ece(x.logits.softmax(1), x.labels)
                found.setdefault((m, name), []).append(values)
    methods, names = list(models), list(dict.fromkeys(name for _, name in found))
    means = {key: np.mean([values[1:] for values in x], 0) for key, x in found.items()}
    fifteen = [name for name in names if name not in imagenet_c.EXTRA_CORRUPTIONS]  # Fig. 4's
    for m in methods:
        means[m, "mean"] = np.mean([means[m, name] for name in fifteen], 0)
    rows = []
    for name in [*names, "mean"]:
        accuracies = [f"{means[m, name][0]:.1f}" for m in methods]
        rows.append([name, *accuracies, *(f"{means[m, name][1]:.3f}" for m in methods)])
    header = ["corruption", *(f"{m} acc" for m in methods), *(f"{m} ECE" for m in methods)]
    show(s, "Fig. 4: mean over five severities", header, rows)
    header = ["method", "corruption", "severity", "accuracy", "ece"]
    with figure(s, "corruptions", header, columns=3, rows=2) as (axes, numbers):
        draw_corruptions(axes, found, means, methods, names)
        for (m, name), x in found.items():
            numbers += [(m, name, *values) for values in x]


def draw_corruptions(axes, found, means, methods, names):
    """Left, Fig. 4: accuracy and ECE of each corruption. Right, Fig. 5: boxes over severities."""
    grid, width = axes[0, 0].get_gridspec(), 0.8 / len(methods)
    for line, label in enumerate(("accuracy, %", "ECE")):
        drawing = axes[line, 0].figure
        for narrow in axes[line, :2]:
            narrow.remove()
        axis = drawing.add_subplot(grid[line, :2])
        for i, m in enumerate(methods):
            x = np.arange(len(names)) + i * width - 0.32
            axis.bar(x, [means[m, name][line] for name in names], width, label=m)
        axis.set(ylabel=label)
        labels = names if line else [""] * len(names)
        axis.set_xticks(range(len(names)), labels, rotation=30, ha="right")
        if not line:
            axis.legend(ncols=len(methods), fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
    for axis, name in zip(axes[:, 2], ("brightness", "elastic_transform"), strict=True):
        if name in names:
            axis.boxplot([[x[1] for x in found[m, name]] for m in methods])
            axis.set_xticks(range(1, len(methods) + 1), methods)
        axis.set(title=name, ylabel="accuracy, %, by severity")


def corrupted_sets(s):
    """Yield (corruption, severity, Split): ImageNet-C's tree, or ID's embedded images corrupted."""
    if s.data.kind == "imagenet":
        yield from imagenet_c.imagenet_c(s.config.data)
        return
    test = s.data.test
    if not isinstance(test.images, np.ndarray):
        needs = "corruptions: needs ImageNet with imagenet-c/, or images of an array"
        raise common.InputError(needs)
    for i, (name, amounts) in enumerate(image_corruptions.CORRUPTIONS.items()):
        for severity, amount in enumerate(amounts, 1):
            rng = np.random.default_rng([i, severity])
            images = image_corruptions.corrupt(test.images, name, amount, rng)
            named = f"{name} {severity}"
            yield name, severity, dataclasses.replace(test, name=named, images=images)


# --- further --------------------------------------------------------------------------------------


def wise(s):
    """WiSE-FT: theta = alpha theta_ft + (1 - alpha) theta_zs, head included, for every method."""
    alphas, found = (0.0, 0.25, 0.5, 0.75, 1.0), {}
    for seed in s.seeds:
        models = models_of(s, seed)
        zs = models.pop("ZS").state_dict()
        for m, model in models.items():
            for alpha in alphas:
                mixed = copy.deepcopy(model)
                mixed.load_state_dict(vrf.wse(zs, model.state_dict(), alpha))
                found.setdefault((m, alpha), {})[seed] = mixed
    x = {key: measure(s, of_seed.__getitem__) for key, of_seed in found.items()}
    rows = [[m, f"{alpha:g}", *cells(y)] for (m, alpha), y in x.items()]
    header = ["method", "alpha", *HEADER]
    show(s, "mixed with zero-shot", header, rows)
    with figure(s, "wise", header, columns=2) as (axes, numbers):
        left, right = axes[0]
        for m in models:
            of_method = [x[m, alpha] for alpha in alphas]
            shift = [y[2] for y in of_method]
            left.plot([y[0] for y in of_method], shift, "o-", ms=3, label=m)
            right.plot([-y[3] for y in of_method], shift, "o-", ms=3)
        left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        right.set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
        left.legend()
        numbers += rows


ABLATIONS = {
    "components": components,
    "lambdas": lambdas,
    "svd": svd,
    "period": period,
    "teacher": teacher,
    "measures": measures,
    "temperature": temperature,
    "reliability": reliability,
    "spectrum": spectrum,
    "corruptions": corruptions,
    "wise": wise,
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    s = Setting(*carot.prepare(argv[1:]))
    for name in names:
        ABLATIONS[name](s)


if __name__ == "__main__":
    common.run(main)
