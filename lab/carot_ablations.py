"""The ablations and further figures of CaRot (Sec. 5, App.): sweeps over carot.py's functions.

    python lab/carot_ablations.py components              # one, on the digits
    python lab/carot_ablations.py corruptions --data /imagenet   # every flag of carot.py works
    python lab/carot_ablations.py all                     # digits: all, 40 minutes of one core

    components   Tab. 4         L_OC and L_SD, beside cross-entropy and beside L_MCL   6 trainings
    lambdas      Tabs. 5, F, G  lambda_OC at lambda_SD 1.5, and back                   8 trainings
    svd          Tab. A         the rival of L_OC at its coefficient                   3 trainings
    smoothing    Tab. E         label smoothing in L_SD's place                        1 training
    period       -              steps between the teacher's updates                    4 trainings
    wise         Tabs. B, C     WiSE-FT: each model mixed with zero-shot
    temperature  Tab. D         by least ECE, and by least NLL
    reliability  Fig. B         accuracy by confidence, all shifts together
    corruptions  Figs. 4, 5     ImageNet-C, or the digits' test set corrupted here

Each prints its table and leaves PNG and CSV in OUT/figures. What carot.py has trained under the
same OUT is read and not trained again; --seeds N averages over N runs. A training on the digits
takes about a minute of one core. The grids and the smoothing are ours: those of the paper are not
known to us. What is chosen (alpha of WiSE-FT, temperatures) is chosen on ID val (A10). ImageNet-C:
the 15 corruptions and the extra four at 5 severities, as imagenet-c/ in the tree or beside it.
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
    """What the study starts from, as carot.prepare gives it, and what trains `models_of`."""

    config: carot.Config
    data: common.Data
    clip: common.Clip
    zero_shot: common.Classifier
    train_models: object = carot.train_models

    @property
    def seeds(self):
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def splits(self):
        return [self.data.test, *self.data.shifts]


def tuned(s, seed, name="", extra=None, **changes):
    """Classifier fine-tuned as CaRot with changed settings or an `extra` term of the loss. Without
    a name it has FLYP's or CaRot's, so that carot.py's checkpoints are found.
    """
    settings = dataclasses.replace(carot.recipe(s.config, "CaRot", seed), **changes)
    constrained = settings.oc or settings.sd or settings.cross_fnorm
    name = name or ("CaRot" if constrained else "FLYP")
    module = carot.train_on_pairs(settings, name, s.clip, s.data, extra)
    return carot.as_classifier(s.config, s.data, s.clip, module.student)


HEADER = ["ID acc", "ID ECE", "shift acc", "shift ECE", "sigma_min"]


def means_of(rows):
    """HEADER's numbers, means over the Rows of one method."""
    method = rows[0].method
    accuracy, ece = common.accuracies(rows, method), carot.measured(rows, method)
    sigma = float(carot.spectrum_of(rows, method)[-1])
    on_id = [accuracy[common.ID], ece[common.ID]]
    return [*on_id, common.mean_shift(accuracy), common.mean_shift(ece), sigma]


def measure(s, model_of):
    """HEADER's numbers, means over seeds, of model_of(seed) -> Classifier."""
    rows = []
    for seed in s.seeds:
        rows += carot.evaluate(s.config, s.data, s.clip, {"": model_of(seed)}, seed)
    return means_of(rows)


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


# --- Tables 4, 5, A, E ----------------------------------------------------------------------------


class Taught(carot.Distilled):
    """A Classifier in training and its teacher, as `common.image_training` takes them."""

    @property
    def head(self):
        return self.student.head


def naive(s, seed, oc, sd):
    """Classifier fine-tuned as FT, by cross-entropy + oc L_OC + sd L_SD. The soft labels are the
    teacher's of the classes, which is how we read Tab. 4: there are no captions.
    """
    settings = dataclasses.replace(carot.recipe(s.config, "FT", seed), oc=oc, sd=sd)
    module = Taught(s.zero_shot, teacher=sd > 0)
    W_v = carot.projection_at(module.student, "visual.proj") if oc else None

    def loss_fn(images, labels):
        logits = common.gather(module.student(images)[1])
        loss = F.cross_entropy(logits, common.gather(labels))
        if oc:
            loss = loss + oc * carot.orthogonality(W_v, settings.oc_form)
        if module.updates:
            with torch.no_grad():
                taught = common.gather(module.teacher(images)[1]).softmax(1)
            loss = loss + sd * F.cross_entropy(logits, taught)
        return loss

    key = {"oc": oc, "oc_form": settings.oc_form, "sd": sd, "ema_every": settings.ema_every}
    parts = settings, "cross-entropy", module, s.data.train, s.clip, loss_fn
    steps = common.steps_of(settings, len(s.data.train.labels))
    for done in common.train_steps(settings, common.image_training(*parts, key=key)):
        carot.update_teacher(settings, module, done, steps)
    return module.student


def components(s):
    """Tab. 4: L_OC and L_SD on and off, beside cross-entropy and beside L_MCL (there L_OC has the
    cross term with it).
    """
    rows, points, c = [], {}, s.config
    for mcl, oc, sd in itertools.product((0, 1), repeat=3):

        def model_of(seed, mcl=mcl, oc=oc * c.oc, sd=sd * c.sd):
            if not mcl:
                return naive(s, seed, oc, sd)
            return tuned(s, seed, oc=oc, sd=sd, cross_fnorm=c.cross_fnorm if oc else 0.0)

        x = measure(s, model_of)
        loss = "L_MCL" if mcl else "cross-entropy"
        rows.append([loss, "x" if oc else "-", "x" if sd else "-", *cells(x)])
        points["+".join([loss, *["OC"] * oc, *["SD"] * sd])] = x
    header = ["loss", "L_OC", "L_SD", *HEADER]
    show(s, "Tab. 4", header, rows)
    scatter(s, "components", header, rows, points)


def lambdas(s):
    """Tabs. 5, F, G: one lambda varies, the other is the paper's; grid ours."""
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
    show(s, "Tabs. 5, F, G", header, rows)


def minus_sigma_min(f):
    """Tab. A's rival: minus the smallest singular value of the batch's features' covariance.
    [B, D] -> []

    Here of their second moments, I^T I / B: centred, a batch of B <= D features has rank B - 1, and
    the smallest is 0 whatever the weights.
    """
    return -torch.linalg.eigvalsh(f.T @ f / len(f))[0]


def rival(oc):
    """The rival as an extra term of the loss, at the coefficient of L_OC."""

    def term(f, logits):
        return oc * minus_sigma_min(f)

    return term


def svd(s):
    """Tab. A: what can stand in L_OC's place, at L_OC's coefficient, with its price per step."""
    c, rows, points = s.config, [], {}
    W_v = carot.projections(s.clip.model)[0]
    f = torch.randn(c.batch, W_v.shape[1], device=W_v.device)

    def squared(W):
        return carot.orthogonality(W, "paper")

    forms = {  # name: (function and tensor that are timed, what `tuned` is told)
        "none": (None, None, {"oc": 0.0}),
        "norm (code)": (carot.orthogonality, W_v, {"oc_form": "code"}),
        "squared (paper)": (squared, W_v, {"oc_form": "paper"}),
        "-sigma_min": (minus_sigma_min, f, {"name": "sigma_min", "oc": 0.0, "extra": rival(c.oc)}),
    }
    for form, (term, tensor, told) in forms.items():
        x = points[form] = measure(s, lambda seed, told=told: tuned(s, seed, **told))
        price = f"{milliseconds(term, tensor):.2f}" if term else "-"
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


SMOOTHING = 0.1


def label_smoothing(f, logits):
    """What L_MCL gains when SMOOTHING of each pair's target is spread over the batch."""
    i = torch.arange(len(logits), device=logits.device)
    both = (F.cross_entropy(z, i, label_smoothing=SMOOTHING) for z in (logits, logits.T))
    return sum(both) / 2 - carot.contrastive(logits)


def smoothing(s):
    """Tab. E: on L_MCL-con, nothing, label smoothing, and self-distillation, which is CaRot."""
    smoothed = {"sd": 0.0, "name": "smoothed", "extra": label_smoothing}
    forms = {
        "none": {"sd": 0.0},
        f"label smoothing {SMOOTHING:g}": smoothed,
        "self-distillation": {},
    }
    points = {
        form: measure(s, lambda seed, told=told: tuned(s, seed, **told))
        for form, told in forms.items()
    }
    rows, header = [[form, *cells(x)] for form, x in points.items()], ["L_MCL-con and", *HEADER]
    show(s, "Tab. E", header, rows)
    scatter(s, "smoothing", header, rows, points)


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


# --- WiSE-FT, calibration -------------------------------------------------------------------------


def models_of(s, seed):
    return s.train_models(s.config, s.data, s.clip, s.zero_shot, seed)


def wise(s):
    """Tabs. B, C: theta = alpha theta_ft + (1 - alpha) theta_zs, head included, for every method,
    with the alpha of least ECE on ID val. The figure and its CSV have all of them.
    """
    alphas, curves, chosen = [i / 10 for i in range(11)], {}, {}
    for seed in s.seeds:
        models = models_of(s, seed)
        zs = models.pop("ZS").state_dict()
        for m, model in models.items():
            mixed = {alpha: copy.deepcopy(model) for alpha in alphas}
            for alpha, mix in mixed.items():
                mix.load_state_dict(vrf.wse(zs, model.state_dict(), alpha))
            val = common.predict(s.config, mixed, s.data.val, s.clip)
            eces = {a: common.ece(x.logits.softmax(1), x.labels) for a, x in val.items()}
            best = min(eces, key=eces.get)
            for row in carot.evaluate(s.config, s.data, s.clip, mixed, seed):
                curves.setdefault((m, row.method), []).append(row)
                if row.method == best:
                    row = dataclasses.replace(row, method=m, choice=best)
                    chosen.setdefault(m, []).append(row)
    found = {key: means_of(rows) for key, rows in curves.items()}
    table = []
    for m, rows in chosen.items():
        alpha = "/".join(f"{row.choice:g}" for row in rows)
        table += [[m, "1", *cells(found[m, 1.0])], [m, alpha, *cells(means_of(rows))]]
    header = ["method", "alpha", *HEADER]
    show(s, "Tabs. B, C: alone, and mixed with zero-shot by the least ECE on ID val", header, table)
    with figure(s, "wise", header, columns=2) as (axes, numbers):
        left, right = axes[0]
        for m in chosen:
            of_method = [found[m, alpha] for alpha in alphas]
            shift = [y[2] for y in of_method]
            left.plot([y[0] for y in of_method], shift, "o-", ms=3, label=m)
            right.plot([-y[3] for y in of_method], shift, "o-", ms=3)
        left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        right.set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
        left.legend()
        numbers += [(*key, *cells(x)) for key, x in found.items()]


def least_ece_temperature(logits, labels):
    """The paper's T (Tab. D): least ECE on ID val; on a grid from 0.1 to 10."""
    grid = [10 ** (i / 100) for i in range(-100, 101)]
    return min(grid, key=lambda T: common.ece((logits / T).softmax(1), labels))


def temperature(s):
    """Tab. D: no temperature, the paper's, of least ECE, and that of least NLL; both on ID val."""
    # Differs (TS): the ECE of a small val set is a jagged function of T, its NLL a smooth one
    found, header = {}, ["method", "T by", "T", "ID ECE", "shift ECE"]
    for seed in s.seeds:
        models = models_of(s, seed)
        val = common.predict(s.config, models, s.data.val, s.clip)
        of = {split.name: common.predict(s.config, models, split, s.clip) for split in s.splits}
        for m in models:
            logits, labels = val[m].logits, val[m].labels
            by_nll = common.temperature(logits, labels, "nll")
            criteria = {"-": 1.0, "ECE": least_ece_temperature(logits, labels), "NLL": by_nll}
            for criterion, T in criteria.items():
                eces = {}
                for split, x in ((split, predictions[m]) for split, predictions in of.items()):
                    eces[split] = common.ece((x.logits / T).softmax(1), x.labels)
                values = [T, eces[common.ID], common.mean_shift(eces)]
                found.setdefault((m, criterion), []).append(values)
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
    methods = dict.fromkeys(r.method for r in rows)
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


# --- Figs. 4, 5 -----------------------------------------------------------------------------------


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


# --- main -----------------------------------------------------------------------------------------

ABLATIONS = {
    "components": components,
    "lambdas": lambdas,
    "svd": svd,
    "smoothing": smoothing,
    "period": period,
    "wise": wise,
    "temperature": temperature,
    "reliability": reliability,
    "corruptions": corruptions,
}


def main(argv=None, train_models=carot.train_models):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    s = Setting(*carot.prepare(argv[1:]), train_models)
    for name in names:
        ABLATIONS[name](s)


if __name__ == "__main__":
    common.run(main)
