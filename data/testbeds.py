"""Testbeds: which images each of many published models gets right, at home (ID) and under shift.

`data/testbeds/*.csv` holds counts (sources and licences: data/README.md), so that effective
robustness of real models needs no image and no download:

    cifar10       30 models of Recht et al. 2018: CIFAR-10, CIFAR-10.1 v4 and v6
    imagenet      66 models of Recht et al. 2019: ImageNet val, three variants of ImageNetV2
    imagenet2020  85 models of Taori et al. 2020 trained on ImageNet alone; beside them, never in a
                  baseline, CLIP zero-shot, BiT and checkpoints of trainings from scratch

`read` also takes the public files these came from: the 2020 table (`robustness_top1s.csv`, percent)
and per-example tables (.npz: `models`, per set packed bits and `<set>/n`).
"""

import csv
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import logit

import common

FOLDER = Path(__file__).resolve().parent / "testbeds"
EMBEDDED = ("cifar10", "imagenet", "imagenet2020")
ID_OF = {  # a shift with part of the classes goes with ID images of the same classes
    "cifar10.1-v4": "cifar10",
    "cifar10.1-v6": "cifar10",
    "imagenetv2-matched-frequency": "imagenet-val",
    "imagenetv2-threshold-0.7": "imagenet-val",
    "imagenetv2-top-images": "imagenet-val",
    "imagenetv2-matched-frequency-format-val": "val",
    "objectnet-1.0-beta": "val-on-objectnet-classes",
    "imagenet-r": "val-on-imagenet-r-classes",
}
BROKEN = {  # 28.3 % on ImageNet val, 2.5 to 3.2 % on every V2 set
    "fv_16k": "its public ImageNetV2 predictions do not fit its ImageNet ones"
}


@dataclass
class Testbed:
    """right[set]: bool [M, N], a row per model, if known by image; else k[set] of n[set] images,
    [M], nan where a model was not evaluated. `studied`: models that no baseline may contain.
    """

    name: str
    models: list
    n: dict
    k: dict
    id_of: dict
    right: dict = field(default_factory=dict)
    studied: tuple = ()

    def accuracy(self, name):
        """[M], nan where not evaluated."""
        return self.k[name] / self.n[name]

    def row(self, model):
        if model not in self.models:
            hint = common.did_you_mean(model, self.models)
            raise common.InputError(f"testbed {self.name} has no model {model!r}{hint}")
        return self.models.index(model)


def known_by_image(name, models, right, id_of, studied=()):
    """Testbed from {set: bool [M, N]}."""
    k = {s: r.sum(1).astype(float) for s, r in right.items()}
    n = {s: r.shape[1] for s, r in right.items()}
    return Testbed(name, list(models), n, k, id_of, right, tuple(studied))


def read(path):
    """Testbed from one of EMBEDDED, or from a public file. Raises InputError."""
    if str(path) in EMBEDDED:
        return read_counts(FOLDER / f"{path}.csv")
    path = Path(path)
    if not path.is_file() or path.suffix not in (".csv", ".npz"):
        known = ", ".join(EMBEDDED)
        raise common.InputError(
            f"--testbed {path}: expected all, {known}, or a file .csv (the 2020 table) or .npz"
        )
    return read_bits(path) if path.suffix == ".npz" else read_table(path)


def read_counts(path):
    """Our own form: model, role, then a column `set:n` of counts for each set."""
    try:
        rows = rows_of(path)
        sets = {column.split(":")[0]: column for column in list(rows[0])[2:]}
        n = {s: int(column.split(":")[1]) for s, column in sets.items()}
        k = {s: np.array([float(r[c] or "nan") for r in rows]) for s, c in sets.items()}
        studied = tuple(r["model"] for r in rows if r["role"] == "studied")
    except (ValueError, LookupError, TypeError) as error:
        reason = common.first_line(error)
        raise common.InputError(f"{path} is no testbed.csv of a run ({reason})") from error
    return Testbed(path.stem, [r["model"] for r in rows], n, k, pairs(n), {}, studied)


def rows_of(path):
    """Rows of a CSV file as dicts of text. Raises InputError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise common.InputError(f"{path} cannot be read ({common.first_line(error)})") from error


def read_table(path):
    """The 2020 table: percent per setting. Its models and their roles are those of imagenet2020."""
    known = read("imagenet2020")
    rows = {r.get("model"): r for r in rows_of(path)}
    columns = set().union(*rows.values()) if rows else set()
    if lacking := [c for c in ("model", *known.n) if c not in columns]:
        raise common.InputError(f"{path}: no column {lacking[0]!r}; expected the 2020 table")
    if lacking := [m for m in known.models if m not in rows]:
        raise common.InputError(f"{path}: no model {lacking[0]!r}; expected the 2020 table")
    percent = {s: [number(rows[m][s], f"{path}, {m}") for m in known.models] for s in known.n}
    k = {s: np.round(np.array(p) * known.n[s] / 100) for s, p in percent.items()}
    return Testbed(path.stem, known.models, known.n, k, known.id_of, {}, known.studied)


def number(text, where):
    """Percent as a number; nan for an empty cell."""
    try:
        value = float(text or "nan")
        if text and not 0 <= value <= 100:
            raise ValueError
    except ValueError as error:
        raise common.InputError(f"{where}: {text!r} is no number from 0 to 100") from error
    return value


def read_bits(path):
    """Per-example correctness. Models known to be broken are left out, with a sentence."""
    try:
        with np.load(path, allow_pickle=False) as z:
            names = [str(m) for m in z["models"]]
            sets = [s for s in z.files if s + "/n" in z.files]
            right = {s: np.unpackbits(z[s], axis=1)[:, : int(z[s + "/n"])] == 1 for s in sets}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = common.first_line(error)
        raise common.InputError(f"{path} is no per-example testbed ({reason})") from error
    for name in set(names) & set(BROKEN):
        print(f"{path}: {name} is left out: {BROKEN[name]}")
    kept = [i for i, name in enumerate(names) if name not in BROKEN]
    if not right or any(len(r) != len(names) for r in right.values()):
        raise common.InputError(f"{path} is no per-example testbed (no set of all its models)")
    right = {s: r[kept] for s, r in right.items()}
    return known_by_image(path.stem, [names[i] for i in kept], right, pairs(right))


def pairs(sets):
    """{shift: its ID set} of the sets at hand; if none is known, the first is ID for all others."""
    known = {ood: at_home for ood, at_home in ID_OF.items() if ood in sets and at_home in sets}
    first, *others = sets
    return known or dict.fromkeys(others, first)


def restricted(testbed, shifts):
    """The part of a testbed that some of its shifts need."""
    id_of = {ood: testbed.id_of[ood] for ood in shifts}
    sets = [s for s in testbed.n if s in {*id_of, *id_of.values()}]
    n, k = ({s: part[s] for s in sets} for part in (testbed.n, testbed.k))
    right = {s: testbed.right[s] for s in sets if testbed.right}
    return Testbed(testbed.name, testbed.models, n, k, id_of, right, testbed.studied)


def joined(a, b):
    """Two testbeds known by counts as one, models by name; nan where one has not the model."""
    models = list(dict.fromkeys([*a.models, *b.models]))
    k = {}
    for part in (a, b):
        rows = [models.index(m) for m in part.models]
        for s, counts in part.k.items():
            k[s] = np.full(len(models), np.nan)
            k[s][rows] = counts
    studied = tuple(dict.fromkeys([*a.studied, *b.studied]))
    name = f"{a.name} and {b.name}"
    return Testbed(name, models, a.n | b.n, k, a.id_of | b.id_of, {}, studied)


def write_counts(testbed, path):
    """The form that `read_counts` reads."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["model", "role", *(f"{s}:{n}" for s, n in testbed.n.items())])
            for i, m in enumerate(testbed.models):
                role = "studied" if m in testbed.studied else "testbed"
                counts = (k[i] for k in testbed.k.values())
                out.writerow([m, role, *("" if np.isnan(k) else int(k) for k in counts)])

    common.try_write(path, write)


# --- redrawing models and images: intervals (ours) ---


def slopes(x, y):
    """Least-squares line of each row, non-finite pairs left out; nan if its points are one.
    [R, M], [R, M] -> slope [R], intercept [R]
    """
    used = np.isfinite(x) & np.isfinite(y)
    x, y, n = np.where(used, x, 0), np.where(used, y, 0), used.sum(1)
    mean_x, mean_y = x.sum(1) / n, y.sum(1) / n
    dx = np.where(used, x - mean_x[:, None], 0)
    spread = (dx * dx).sum(1)
    slope = (dx * y).sum(1) / np.where(spread > 0, spread, np.nan)
    return slope, mean_y - slope * mean_x


@dataclass
class Redraws:
    """R draws of testbed models and test images: lines, and how often each image was drawn."""

    lines: dict  # shift -> slope [R], intercept [R]
    weights: dict  # set -> [R, N]; empty if only counts are known

    def accuracy(self, name, right=None, k=None, n=None):
        """[R], of a model that is known by image (drawn with the testbed's), or by counts: then the
        same counts of the same set are drawn alike, whatever was drawn before.
        """
        if right is not None and not self.weights:
            k, n = right.sum(), len(right)
        if right is None or not self.weights:
            rng = np.random.default_rng([zlib.crc32(name.encode()), int(k), int(n)])
            return rng.binomial(n, k / n, len(next(iter(self.lines.values()))[0])) / n
        return self.weights[name] @ right.astype(np.float32) / len(right)


def redraw(testbed, draws, seed=0):
    """Redraws of a testbed. Known by counts only: images as independent binomials."""
    # Differs (E2): how the paper's error bars are drawn is not known to us
    rng = np.random.default_rng(seed)
    rows = [i for i, m in enumerate(testbed.models) if m not in testbed.studied]
    who = np.arange(draws)[:, None], rng.integers(len(rows), size=(draws, len(rows)))
    accuracies, weights = {}, {}
    for name, n in testbed.n.items():
        if testbed.right:
            w = rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float32)
            accuracies[name] = (w @ testbed.right[name][rows].T.astype(np.float32) / n)[who]
            weights[name] = w
        else:
            k = testbed.k[name][rows]
            drawn = rng.binomial(n, np.nan_to_num(k) / n, (draws, len(rows))) / n
            accuracies[name] = np.where(np.isnan(k), np.nan, drawn)[who]
    pairs = {ood: (accuracies[i], accuracies[ood]) for ood, i in testbed.id_of.items()}
    return Redraws({s: slopes(logit(a), logit(b)) for s, (a, b) in pairs.items()}, weights)


def interval(draws):
    return tuple(float(x) for x in np.nanquantile(draws, [0.025, 0.975]))
