"""Testbeds: how many of the test images, at home (ID) and under shift, each of many models gets
right. Effective robustness is measured against them. data/README.md says what the five in
data/testbeds/ are: of published models counts, so that the effective robustness of real models
needs no image and no download; of 40 networks on the embedded digits every image.
"""

import csv
import dataclasses
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import logit

from data.trees import InputError, reading

FOLDER = Path(__file__).resolve().parent / "testbeds"
PUBLISHED = ("cifar10", "imagenet", "imagenet2020", "modern")
HOME = "imagenet-val"  # ImageNet's 50,000 validation images, all 1000 classes
ID_OF = {  # a shift with part of the classes goes with ID images of the same classes
    "cifar10.1-v4": "cifar10",
    "cifar10.1-v6": "cifar10",
    "imagenetv2-matched-frequency": HOME,
    "imagenetv2-threshold-0.7": HOME,
    "imagenetv2-top-images": HOME,
    "imagenet-sketch": HOME,
    "imagenetv2-matched-frequency-format-val": "val",
    "objectnet-1.0-beta": "val-on-objectnet-classes",
    "imagenet-r": "val-on-imagenet-r-classes",
    "imagenet-a": "val-on-imagenet-a-classes",
}


@dataclass
class Testbed:
    """k[set]: [M], how many of the n[set] images each model gets right, nan where it was not tried.
    right[set]: bool [M, N], which ones, if that is known. studied: {model: its role}, of the models
    that no baseline may contain.
    """

    name: str
    models: list
    n: dict
    k: dict
    id_of: dict  # shift -> its ID set
    right: dict = field(default_factory=dict)
    studied: dict = field(default_factory=dict)

    def accuracy(self, name):
        """[M], nan where not evaluated."""
        return self.k[name] / self.n[name]

    def row(self, model):
        return self.models.index(model)


def known_by_image(name, models, right, id_of, studied=()):
    """Testbed from {set: bool [M, N]}."""
    k = {s: r.sum(1).astype(float) for s, r in right.items()}
    n = {s: r.shape[1] for s, r in right.items()}
    return Testbed(name, list(models), n, k, id_of, right, dict.fromkeys(studied, "studied"))


# --- files ----------------------------------------------------------------------------------------


def read(path):
    """Testbed of data/testbeds by its name, or of a file in the form of `write`. Raises InputError
    by line and column.
    """
    embedded = {name: FOLDER / f"{name}.csv" for name in PUBLISHED}
    embedded["digits"] = FOLDER / "digits.npz"
    path = Path(embedded.get(str(path), path)).expanduser()
    if not path.is_file() or path.suffix not in (".csv", ".npz"):
        known = ", ".join(embedded)
        raise InputError(f"testbed {path}: expected {known}, or a file, .csv or .npz")
    return read_bits(path) if path.suffix == ".npz" else read_counts(path)


def read_counts(path):
    """The form of `write`: model, role, then a column `set:n` of counts for each set."""
    columns, n = {"model": str, "role": str}, {}
    for column in read_table(path)[0]:
        if column not in ("model", "role"):
            name, _, images = column.rpartition(":")
            if not images.isdecimal():
                raise InputError(f"{path}, column {column!r}: expected SET:IMAGES")
            n[name] = int(images)
            columns[column] = up_to(n[name])
    rows = read_table(path, columns, unique="model")
    models = [row["model"] for row in rows]
    k = {s: np.array([row[f"{s}:{n[s]}"] for row in rows]) for s in n}
    studied = {row["model"]: row["role"] for row in rows if row["role"] != "testbed"}
    return Testbed(path.stem, models, n, k, pairs(n), {}, studied)


def read_bits(path):
    """Per-example correctness: `models`, of each set packed bits, and `<set>/n`."""
    with reading(path, "expected models, and bits of each set"):
        with np.load(path, allow_pickle=False) as z:
            names = [str(model) for model in z["models"]]
            studied = [str(model) for model in z["studied"]] if "studied" in z else []
            title = str(z["name"]) if "name" in z else path.stem
            sizes = {s: int(z[f"{s}/n"]) for s in z.files if f"{s}/n" in z.files}
            right = {s: np.unpackbits(z[s], axis=1, count=n) == 1 for s, n in sizes.items()}
    return known_by_image(title, names, right, pairs(right), studied)


def pairs(sets):
    """{shift: its ID set} of the sets at hand; if none is known, the first is ID for all others."""
    known = {ood: at_home for ood, at_home in ID_OF.items() if ood in sets and at_home in sets}
    first, *others = sets
    return known or dict.fromkeys(others, first)


def write(testbed, path):
    """The file that `read` reads: of bits where the testbed is known by image, else of counts."""
    if testbed.right:
        packed = {s: np.packbits(right, axis=1) for s, right in testbed.right.items()}
        sizes = {f"{s}/n": n for s, n in testbed.n.items()}
        with open(path, "wb") as file:
            names = {"models": testbed.models, "studied": np.array([*testbed.studied], str)}
            np.savez_compressed(file, name=testbed.name, **names, **packed, **sizes)
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["model", "role", *(f"{s}:{n}" for s, n in testbed.n.items())])
        for i, model in enumerate(testbed.models):
            counts = ("" if np.isnan(k[i]) else int(k[i]) for k in testbed.k.values())
            out.writerow([model, testbed.studied.get(model, "testbed"), *counts])


# --- CSV: a wrong number is refused where it stands, instead of computed with ---------------------


def read_table(path, columns=None, unique=None):
    """[{column: value}] of a CSV file. Raises InputError by line and column.

    columns: {name: function from a cell's text to its value, which raises ValueError}, of the
    columns that must be there; None: all there are, as text. unique: a column in which no value
    may stand twice.
    """
    with reading(path, "expected a CSV file in UTF-8"):
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            reader = csv.reader(file)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    if len(lines) < 2:
        raise InputError(f"{path} has no lines below its header")
    header = lines[0][1]
    columns = columns or dict.fromkeys(header, str)
    for name in columns:
        if header.count(name) != 1:
            found = f"no column {name!r}" if name not in header else f"two columns {name!r}"
            raise InputError(f"{path}: {found}; it has {', '.join(header)[:200]}")
    rows, line_of = [], {}
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}, line {line}: {len(cells)} cells under {len(header)} columns")
        text, row = dict(zip(header, cells, strict=True)), {}
        for name, parse in columns.items():
            try:
                row[name] = parse(text[name])
            except ValueError as error:
                problem = f"{path}, line {line}, column {name}: {text[name]!r}, {error}"
                raise InputError(problem) from None
        if unique and line_of.setdefault(row[unique], line) != line:
            first = line_of[row[unique]]
            raise InputError(f"{path}, line {line}: {row[unique]!r} is in line {first}, too")
        rows.append(row)
    return rows


def up_to(most):
    """Function that reads a whole number from 0 to `most`; nan where the cell is empty."""

    def parse(cell):
        if cell and not (cell.isdecimal() and int(cell) <= most):
            raise ValueError(f"expected a whole number from 0 to {most}")
        return float(cell or "nan")

    return parse


def read_rows(path, kind):
    """[instance of the dataclass `kind`] of a file of `write_rows`."""
    columns = {f.name: f.type for f in dataclasses.fields(kind)}  # str, int and float read text
    return [kind(**row) for row in read_table(path, columns)]


def write_rows(rows, path):
    """Instances of one dataclass, a column per field."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(f.name for f in dataclasses.fields(rows[0]))
        out.writerows(dataclasses.astuple(row) for row in rows)


# --- redrawing models and images: intervals (ours) ------------------------------------------------


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
    drawn_models = np.arange(draws)[:, None], rng.integers(len(rows), size=(draws, len(rows)))
    accuracies, weights = {}, {}
    for name, n in testbed.n.items():
        if testbed.right:
            w = rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float32)
            found = w @ testbed.right[name][rows].T.astype(np.float32) / n
            weights[name] = w
        else:
            k = testbed.k[name][rows]
            found = rng.binomial(n, np.nan_to_num(k) / n, (draws, len(rows))) / n
            found = np.where(np.isnan(k), np.nan, found)
        accuracies[name] = found[drawn_models]
    sets = {ood: (accuracies[at_home], accuracies[ood]) for ood, at_home in testbed.id_of.items()}
    return Redraws({s: slopes(logit(a), logit(b)) for s, (a, b) in sets.items()}, weights)


def interval(draws):
    """95 %, from draws [R]."""
    return tuple(float(x) for x in np.nanquantile(draws, [0.025, 0.975]))
