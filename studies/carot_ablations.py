"""The ablations and further figures of CaRot (Sec. 5, App.): sweeps over carot.py's functions.

    python studies/carot_ablations.py components              # one, on the digits
    python studies/carot_ablations.py corruptions --data /imagenet   # every flag of carot.py works
    python studies/carot_ablations.py all                     # digits: all, 40 minutes of one core

    components   Tab. 4    all of L_MCL, L_OC, L_SD on and off   5 trainings
    lambdas      Tab. 5    lambda_OC at lambda_SD 1.5, and back  8 trainings
    svd          Tab. A    SVD regulariser against L_OC, forms   3 trainings
    period       -         steps between the teacher's updates   4 trainings
    spectrum     Fig. 6    last singular values, ID and shifts
    corruptions  Figs. 4, 5  ImageNet-C, or the digits' test set corrupted here
    wise         -         WiSE-FT: each model mixed with zero-shot

Each prints its table and leaves PNG and CSV in OUT/figures. What carot.py has trained under the
same OUT is read and not trained again; --seeds N averages over N runs. A training on the digits
takes about a minute of one core. The grids are ours: Table 5's is not known to us. ImageNet-C: the
15 corruptions and the extra four at 5 severities, as imagenet-c/ in the tree or beside it.
"""

import copy
import dataclasses
import io
import itertools
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import carot  # noqa: E402
import common  # noqa: E402
import vrf  # noqa: E402
from data import trees  # noqa: E402


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


def tuned(s, seed, config=None, **coefficients):
    """Classifier fine-tuned with these coefficients of Eq. (6); under FLYP's or CaRot's name, so
    that carot.py's checkpoints are found."""
    config = config or s.config
    plain = not any(v for k, v in coefficients.items() if k != "mcl")
    name = f"{'FLYP' if plain else 'CaRot'}, seed {seed}"
    module = carot.fine_tune(config, name, s.clip, s.data, seed, **coefficients)
    return as_classifier(s, module.student)


def as_classifier(s, model):
    clip = dataclasses.replace(s.clip, model=model.eval())
    return common.classifier(s.config, s.data, clip, s.zero_shot.head.weight.device)


HEADER = ["ID acc", "ID ECE", "shift acc", "shift ECE", "sigma_min"]


def measure(s, model_of):
    """HEADER's numbers, means over seeds, of model_of(seed) -> Classifier."""
    rows = []
    for seed in s.seeds:
        rows.append(carot.evaluate(s.config, s.data, s.clip, {"": model_of(seed)}, seed)[0])
    acc, ece = common.accuracies(rows, ""), carot.measured(rows, "")
    sigma = float(np.mean([r["spectrum"][-1] for r in rows]))
    id_ = next(iter(acc))
    return [acc[id_], ece[id_], common.mean_shift(acc), common.mean_shift(ece), sigma]


def cells(numbers):
    return [f"{x:.{d}f}" for x, d in zip(numbers, (1, 3, 1, 3, 4), strict=True)]


def show(s, name, title, header, rows, figure=None, numbers=None):
    """Print the table, save the figure with its numbers."""
    runs = f"mean of {len(s.seeds)} run{'s' * (len(s.seeds) > 1)}"
    print("\n" + common.table(header, rows, f"{title}; {runs}"))
    if figure is not None:
        common.save_figure(figure, f"{s.config.out}/figures/{name}", header, numbers or rows)


def scatter(points, title):
    """Figure: shift accuracy over negative shift ECE of {name: numbers of HEADER}."""
    figure, ((axis,),) = common.new_figure()
    for name, x in points.items():
        axis.plot(-x[3], x[2], "o")
        axis.annotate(name, (-x[3], x[2]), (4, 3), textcoords="offset points", fontsize=7)
    axis.set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
    axis.set_title(title)
    axis.margins(0.15)
    return figure


# --- Tables 4, 5, A -------------------------------------------------------------------------------


def components(s):
    """Tab. 4: L_MCL, L_OC (with the code's cross term), L_SD, each on and off; none: zero-shot."""
    rows, points, c = [], {}, s.config
    for mcl, oc, sd in itertools.product((0, 1), repeat=3):
        given = {"mcl": float(mcl), "oc": c.oc * oc, "cross": c.cross_fnorm * oc, "sd": c.sd * sd}
        trains = mcl or oc or sd
        x = measure(s, lambda seed, g=given: tuned(s, seed, **g) if trains else s.zero_shot)  # noqa: B023
        rows.append([*("x" if on else "-" for on in (mcl, oc, sd)), *cells(x)])
        on = zip(("MCL", "OC", "SD"), (mcl, oc, sd), strict=True)
        points["+".join(n for n, y in on if y) or "zero-shot"] = x
    header = ["L_MCL", "L_OC", "L_SD", *HEADER]
    show(s, "components", "Tab. 4", header, rows, scatter(points, "Tab. 4"))


def lambdas(s):
    """Tab. 5: one lambda varies, the other is the paper's; grid ours."""
    c, rows = s.config, []
    grids = {"oc": (0.0, 0.05, 0.2, 0.5, 1.0), "sd": (0.0, 0.5, 1.5, 3.0, 5.0)}
    figure, axes = common.new_figure(columns=2, rows=2)
    for column, (varied, grid) in enumerate(grids.items()):
        found = []
        for value in grid:
            given = {"oc": c.oc, "sd": c.sd, "cross": c.cross_fnorm} | {varied: value}
            x = measure(s, lambda seed, g=given: tuned(s, seed, **g))
            rows.append([f"lambda_{varied.upper()}", f"{value:g}", *cells(x)])
            found.append(x)
        for line, (i, label) in enumerate(((2, "mean accuracy under shift, %"), (3, "its ECE"))):
            axes[line, column].plot(grid, [x[i] for x in found], "o-", ms=3)
            axes[line, column].set(xlabel=f"lambda_{varied.upper()}", ylabel=label)
    show(s, "lambdas", "Tab. 5", ["varied", "value", *HEADER], rows, figure)


def svd(s):
    """Tab. A: the constraint's forms at one coefficient; none, code, paper, SVD; their price."""
    c, rows, points = s.config, [], {}
    W_v, _ = carot.projections(s.clip.model)
    for form in ("none", "code", "paper", "svd"):
        config = dataclasses.replace(c, oc_form="code" if form == "none" else form)
        given = {"oc": 0.0 if form == "none" else c.oc, "sd": c.sd, "cross": c.cross_fnorm}
        x = points[form] = measure(s, lambda seed, g=given, k=config: tuned(s, seed, k, **g))
        price = "-" if form == "none" else f"{milliseconds(carot.orthogonality, W_v, form):.2f}"
        rows.append([form, *cells(x), price])
    header = ["L_OC", *HEADER, "ms a step"]
    show(s, "svd", f"Tab. A, lambda_OC {c.oc:g}", header, rows, scatter(points, "forms of L_OC"))


def milliseconds(loss, W, form):
    """Median time of loss and gradient."""
    W, times = W.detach().clone().requires_grad_(), []
    for _ in range(20):
        start = time.perf_counter()
        loss(W, form).backward()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def period(s):
    """Steps between updates of the teacher: with 1 it is the student of a moment ago."""
    c, points = s.config, {}
    given = {"oc": c.oc, "sd": c.sd, "cross": c.cross_fnorm}
    periods = sorted({1, max(1, c.ema_every // 4), c.ema_every, 4 * c.ema_every, 16 * c.ema_every})
    for every in periods:
        config = dataclasses.replace(c, ema_every=every)
        points[str(every)] = measure(s, lambda seed, k=config: tuned(s, seed, k, **given))
    figure, axes = common.new_figure(columns=2)
    for axis, i, label in ((axes[0, 0], 2, "accuracy under shift, %"), (axes[0, 1], 3, "its ECE")):
        axis.semilogx(periods, [x[i] for x in points.values()], "o-", ms=3)
        axis.set(xlabel="steps between updates", ylabel=label)
    rows = [[every, *cells(x)] for every, x in points.items()]
    steps = common.steps_of(c, len(s.data.train.labels))
    show(s, "period", f"teacher's period, of {steps} steps", ["every", *HEADER], rows, figure)


# --- Figs. 4, 5, 6 --------------------------------------------------------------------------------


def models_of(s, seed):
    return carot.train_models(s.config, s.data, s.clip, s.zero_shot, seed)


def spectrum(s):
    """Fig. 6 on ID and on the shifts: the last 20 singular values, and how far sigma_min is."""
    found = {}
    for seed in s.seeds:
        models = models_of(s, seed)
        for split in (s.data.test, *s.data.shifts):
            of = common.predict(s.config, models, split, s.clip)
            for m, x in of.items():
                values = carot.singular_values(x.features)
                found.setdefault((m, split.name), []).append(values.numpy())
    found = {k: np.mean(v, 0) for k, v in found.items()}
    names, methods = (list(dict.fromkeys(k[i] for k in found)) for i in (1, 0))
    rows = [[m, *(f"{found[m, n][-1]:.4f}" for n in names)] for m in methods]
    figure, axes = common.new_figure(columns=2)
    numbers = [
        [m, n, i - 19, float(v)] for (m, n), x in found.items() for i, v in enumerate(x[-20:])
    ]
    for axis, n in zip(axes[0], names, strict=False):
        for m in methods:
            axis.plot(range(-19, 1), found[m, n][-20:], ".-", label=m)
        axis.set(title=n, xlabel="the last 20, from the smallest", ylabel="singular value")
    axes[0, 0].legend()
    show(s, "spectrum", "Fig. 6: sigma_min by set", ["method", *names], rows)
    top = ["method", "set", "from the smallest", "singular value"]
    common.save_figure(figure, f"{s.config.out}/figures/spectrum", top, numbers)


def corruptions(s):
    """Figs. 4, 5: means over severities 1 to 5 by corruption; boxes of two of them."""
    found = {}  # (method, corruption): [(accuracy, ECE) of each severity and seed]
    for seed in s.seeds:
        models = models_of(s, seed)
        for name, severity, split in corrupted_sets(s):
            for m, x in common.predict(s.config, models, split, s.clip).items():
                p = x.logits.softmax(1)
                pair = 100 * x.right.double().mean().item(), common.ece(p, x.labels)
                found.setdefault((m, name), []).append((severity, *pair))
    methods, names = (list(dict.fromkeys(k[i] for k in found)) for i in (0, 1))
    mean = {k: np.mean([x[1:] for x in v], 0) for k, v in found.items()}
    counted = [n for n in names if n not in trees.EXTRA_CORRUPTIONS]  # Fig. 4 has the 15
    rows = []
    for n in [*names, "mean"]:
        of = [
            mean[m, n] if n != "mean" else np.mean([mean[m, c] for c in counted], 0)
            for m in methods
        ]
        rows.append([n, *(f"{a:.1f}" for a, _ in of), *(f"{e:.3f}" for _, e in of)])
    figure, axes = common.new_figure(columns=3, rows=2)
    grid = axes[0, 0].get_gridspec()
    for line, label in enumerate(("accuracy, %", "ECE")):
        for axis in axes[line, :2]:
            axis.remove()
        axis = figure.add_subplot(grid[line, :2])
        for i, m in enumerate(methods):
            x = np.arange(len(names)) + 0.8 * (i / len(methods) - 0.4)
            axis.bar(x, [mean[m, n][line] for n in names], 0.8 / len(methods), label=m)
        axis.set(ylabel=label)
        labels = names if line else [""] * len(names)
        axis.set_xticks(range(len(names)), labels, rotation=30, ha="right")
        if not line:
            axis.legend(ncols=len(methods), fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
    for axis, n in zip(axes[:, 2], ("brightness", "elastic_transform"), strict=True):
        if n in names:
            axis.boxplot([[x[1] for x in found[m, n]] for m in methods])
            axis.set_xticks(range(1, len(methods) + 1), methods)
        axis.set(title=n, ylabel="accuracy, %, by severity")
    header = ["corruption", *(f"{m} acc" for m in methods), *(f"{m} ECE" for m in methods)]
    show(s, "corruptions", "Fig. 4: mean over five severities", header, rows)
    numbers = [(m, n, k, a, e) for (m, n), v in found.items() for k, a, e in v]
    top = ["method", "corruption", "severity", "accuracy", "ece"]
    common.save_figure(figure, f"{s.config.out}/figures/corruptions", top, numbers)


def corrupted_sets(s):
    """Yield (corruption, severity, Split): ImageNet-C's tree, or ID's embedded images corrupted."""
    if s.data.kind == "imagenet":
        yield from trees.imagenet_c(s.config.data)
        return
    test = s.data.test
    if not isinstance(test.images, np.ndarray):
        raise common.InputError(
            "corruptions: needs ImageNet with imagenet-c/, or images of an array"
        )
    for i, (name, severities) in enumerate(CORRUPTIONS.items()):
        for severity, amount in enumerate(severities, 1):
            rng = np.random.default_rng([i, severity])
            images = corrupt(test.images, name, amount, rng)
            split = dataclasses.replace(test, name=f"{name} {severity}", images=images)
            yield name, severity, split


# Eleven of ImageNet-C's fifteen, with amounts of ours for 32 x 32 pixels, severities 1 to 5. Left
# out: snow, frost, fog (textures of weather, too fine for so few pixels) and glass_blur (its swaps
# of pixels are elastic_transform here).
CORRUPTIONS = {
    "gaussian_noise": (0.06, 0.12, 0.18, 0.26, 0.36),  # standard deviation
    "shot_noise": (60, 25, 12, 6, 3),  # photons of a white pixel
    "impulse_noise": (0.02, 0.05, 0.1, 0.17, 0.27),  # share of pixels set to 0 or 1
    "defocus_blur": (0.6, 0.9, 1.2, 1.6, 2.1),  # radius of the disk, pixels
    "motion_blur": (2, 3, 4, 5, 7),  # length of the line, pixels
    "zoom_blur": (1.06, 1.12, 1.18, 1.26, 1.35),  # largest zoom
    "brightness": (0.1, 0.2, 0.3, 0.45, 0.6),  # added
    "contrast": (0.75, 0.55, 0.4, 0.25, 0.15),  # factor about the image's mean
    "elastic_transform": (0.5, 0.8, 1.1, 1.5, 2.0),  # standard deviation of the shift, pixels
    "pixelate": (24, 19, 15, 12, 9),  # pixels a side
    "jpeg_compression": (40, 25, 15, 9, 5),  # quality
}


def corrupt(images, name, amount, rng):
    """uint8 [N, H, W] or [N, H, W, 3] -> the same, one of CORRUPTIONS at that amount."""
    from PIL import Image
    from scipy import ndimage

    if name in ("pixelate", "jpeg_compression"):
        out = []
        for image in map(Image.fromarray, images):
            if name == "pixelate":
                small = image.resize((amount, amount), Image.Resampling.BOX)
                image = small.resize(image.size, Image.Resampling.NEAREST)
            else:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=amount)
                image = Image.open(file)
            out.append(np.asarray(image))
        return np.stack(out)
    x = images / 255.0
    flat = (0,) * (x.ndim - 3)  # no filter runs over channels
    if name == "gaussian_noise":
        x = x + amount * rng.standard_normal(x.shape)
    elif name == "shot_noise":
        x = rng.poisson(x * amount) / amount
    elif name == "impulse_noise":
        hit = rng.random(x.shape) < amount
        x = np.where(hit, rng.integers(2, size=x.shape), x)
    elif name == "brightness":
        x = x + amount
    elif name == "contrast":
        mean = x.mean((1, 2), keepdims=True)
        x = mean + amount * (x - mean)
    elif name in ("defocus_blur", "motion_blur"):
        kernel = disk(amount) if name == "defocus_blur" else np.eye(amount) / amount
        x = ndimage.convolve(
            x, kernel.reshape(1, *kernel.shape, *(1 for _ in flat)), mode="nearest"
        )
    elif name == "zoom_blur":
        x = np.mean([zoomed(x, z) for z in np.linspace(1, amount, 6)], 0)
    elif name == "elastic_transform":
        size = x.shape[1:3]
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij")).astype(float)
        for i, image in enumerate(x):
            shift = ndimage.gaussian_filter(rng.standard_normal((2, *size)), (0, 2, 2))
            where = grid + amount * shift / shift.std()
            layers = image.reshape(*size, -1)
            bent = [
                ndimage.map_coordinates(layers[..., c], where, order=1, mode="nearest")
                for c in range(layers.shape[-1])
            ]
            x[i] = np.stack(bent, -1).reshape(image.shape)
    return (255 * x.clip(0, 1)).round().astype(np.uint8)


def disk(radius):
    """A filled circle with soft edge as kernel that sums to 1."""
    n = int(np.ceil(radius))
    y, x = np.mgrid[-n : n + 1, -n : n + 1]
    kernel = (radius + 0.5 - np.hypot(x, y)).clip(0, 1)
    return kernel / kernel.sum()


def zoomed(x, factor):
    """[N, H, W, ...] magnified about the centre, same size."""
    from scipy import ndimage

    scale = np.ones(x.ndim)
    scale[1:3] = 1 / factor
    offset = np.zeros(x.ndim)
    offset[1:3] = [(n - 1) / 2 * (1 - 1 / factor) for n in x.shape[1:3]]
    return ndimage.affine_transform(x, scale, offset, order=1, mode="nearest")


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
    x = {k: measure(s, v.__getitem__) for k, v in found.items()}
    figure, axes = common.new_figure(columns=2)
    for m in dict.fromkeys(k[0] for k in x):
        own = [x[m, alpha] for alpha in alphas]
        axes[0, 0].plot([y[0] for y in own], [y[2] for y in own], "o-", ms=3, label=m)
        axes[0, 1].plot([-y[3] for y in own], [y[2] for y in own], "o-", ms=3)
    axes[0, 0].set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    axes[0, 1].set(xlabel="negative mean ECE under shift", ylabel="mean accuracy under shift, %")
    axes[0, 0].legend()
    rows = [[m, f"{alpha:g}", *cells(y)] for (m, alpha), y in x.items()]
    show(s, "wise", "mixed with zero-shot", ["method", "alpha", *HEADER], rows, figure)


ABLATIONS = [components, lambdas, svd, period, spectrum, corruptions, wise]
ABLATIONS = {f.__name__: f for f in ABLATIONS}


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
