"""Makes the modern testbed that data/testbeds ships, from the public tables that it is a part of.

    python lab/er_extract.py FOLDER               # writes data/testbeds/modern*.csv
    python lab/er_extract.py FOLDER --out OTHER   # elsewhere, to compare

FOLDER holds the raw tables under the names in data/testbeds/README.md, which has their sources and
licences. Four files are written:

    modern.csv           counts of images right, a row per model
    modern_soups.csv     settings of the 72 fine-tunings of one CLIP ViT-B/32
    modern_zeroshot.csv  parameters and pre-training data of the zero-shot models
    modern_reproductions.csv  who reproduced which row, and whether independently

Two files are read that are written by hand: modern_tags.csv says of every tag of timm whether its
models saw ImageNet-1k alone, and modern_pairs.csv pairs zero-shot with fine-tuned models. A tag
that is not in the first is refused, so that no model gets into the baseline unread. The published
rows come from data/*_paper.json.

timm's and model-soups' accuracies are exact: each must be a count of its set's images to the digits
printed, which is checked. open_clip's are rounded to 4 digits, the papers' to 3 or 4.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from data import testbeds  # noqa: E402

HOME, SIZE = "imagenet-val", "img_size"
SETS = {  # a set of images: how many; timm's file; open_clip's, model-soups', the papers' column
    HOME: (50_000, "imagenet", "ImageNet 1k", "ImageNet", "ID"),
    "imagenetv2-matched-frequency": (
        *(10_000, "imagenetv2-matched-frequency"),
        *("ImageNet v2", "ImageNetV2", "ImageNet-V2"),
    ),
    "imagenet-sketch": (50_889, "sketch", "ImageNet Sketch", "ImageNetSketch", "ImageNet-Sketch"),
    "imagenet-r": (30_000, "imagenet-r", "ImageNet-R", "ImageNetR", "ImageNet-R"),
    "imagenet-a": (7_500, "imagenet-a", "ImageNet-A", "ImageNetA", "ImageNet-A"),
    "val-on-imagenet-r-classes": (10_000, "imagenet-r-clean", None, None, None),
    "val-on-imagenet-a-classes": (10_000, "imagenet-a-clean", None, None, None),
}
PAPERS = {"VRF": "vrf_paper.json", "CaRot": "carot_paper.json"}
ALIASES = [f"{m}-quickgelu openai" for m in ("ViT-B-32", "RN50", "RN101")]  # rows there twice
FAILED = ["coca_ViT-B-32 mscoco_finetuned_laion2b_s13b_b90k"]  # 0.8 %: near chance everywhere
SETTINGS = ("lr", "wd", "epochs", "aug", "mix", "smoothing")


def table(path, *columns):
    """[{column: text}] of a CSV file. Raises InputError where it, or a column, is missing."""
    return testbeds.read_table(path, dict.fromkeys(columns, str))


def count(path, share, images, half_digit):
    """Images right. Raises InputError where a share is none of that many images."""
    k = round(share * images)
    if not (0 <= k <= images and abs(k / images - share) <= half_digit + 1e-9):
        raise common.InputError(f"{path}: {share} is no share of {images} images")
    return k


# --- timm: the baseline, and the fine-tuned models of the pairs -----------------------------------


def verdicts():
    """{(tag, architecture or ""): whether its models saw ImageNet-1k alone} of modern_tags.csv."""
    path, found = testbeds.FOLDER / "modern_tags.csv", {}
    for row in table(path, "tag", "architecture", "verdict"):
        if row["verdict"] not in ("in", "out"):
            raise common.InputError(f"{path}: verdict {row['verdict']!r}; expected in or out")
        found[row["tag"], row["architecture"]] = row["verdict"] == "in"
    return found


def trained_on_imagenet_alone(model, known):
    """By timm's name, ARCHITECTURE.TAG. Raises InputError for a tag that nobody has read."""
    architecture, _, tag = model.partition(".")
    if (tag, "") not in known:
        raise common.InputError(f"{model}: its tag {tag!r} is not in modern_tags.csv; read and add")
    return known.get((tag, architecture), known[tag, ""])


def timm(folder):
    """{(model, pixels): {set: images right}}; a model is there once per size it was tested at."""
    found = {}
    for name, (images, file, *_) in SETS.items():
        path = Path(folder) / f"timm_results-{file}.csv"
        for row in table(path, "model", SIZE, "top1"):
            counts = found.setdefault((row["model"], int(row[SIZE])), {})
            if name in counts:
                raise common.InputError(f"{path}: {row['model']} at {row[SIZE]} is there twice")
            counts[name] = count(path, float(row["top1"]) / 100, images, 6e-6)
    return {key: counts for key, counts in found.items() if HOME in counts}


def baseline_rows(results):
    """One row per model: at the smallest size tested, which for nearly all is that of training.
    Several sizes of one model are not several models.
    """
    known, least = verdicts(), {}
    for model, size in results:
        least[model] = min(size, least.get(model, size))
    kept = [(m, s) for m, s in least.items() if trained_on_imagenet_alone(m, known)]
    return [(f"{m}@{s}", "testbed", results[m, s]) for m, s in sorted(kept)]


def fine_tuned_rows(results):
    rows = {}
    for pair in table(testbeds.FOLDER / "modern_pairs.csv", "fine-tuned"):
        model, _, size = pair["fine-tuned"].partition("@")
        if (model, int(size)) not in results:
            raise common.InputError(f"modern_pairs.csv: timm has no {pair['fine-tuned']}")
        rows[pair["fine-tuned"]] = results[model, int(size)]
    return [(name, "fine-tuned", counts) for name, counts in rows.items()]


# --- open_clip, model-soups, the papers -----------------------------------------------------------


def counts_by(path, row, which, percent=1, half_digit=5e-5):
    """{set: images right} of a row with accuracies; which: of the names in SETS."""
    sets = {s: (n, names[which]) for s, (n, *names) in SETS.items() if names[which]}
    shares = {s: (n, float(row[column]) / percent) for s, (n, column) in sets.items()}
    return {s: count(path, share, n, half_digit) for s, (n, share) in shares.items()}


def zero_shot_rows(folder):
    """Rows of counts, and of [model, parameters in millions, pre-training data]."""
    path, rows, about = Path(folder) / "openclip_results.csv", [], []
    columns = [names[1] for _, *names in SETS.values() if names[1]]
    for row in table(path, "name", "pretrained", "params (M)", *columns):
        model = f"{row['name']} {row['pretrained']}"
        if model not in ALIASES + FAILED:
            rows.append((model, "zero-shot", counts_by(path, row, 1)))
            about.append((model, row["params (M)"], data_of(row["pretrained"])))
    return rows, about


def data_of(tag):
    """open_clip's tag up to what is no data: laion2b_s34b_b79k -> laion2b; v1 is NLLB-CLIP's."""
    if tag == "v1":
        return "nllb"
    words = tag.split("_")
    stops = [i for i, w in enumerate(words) if w[:1] in "sbe" and w[1:2].isdigit()]
    return "_".join(words[: min(stops, default=len(words))]).removeprefix("mscoco_finetuned_")


def soup_rows(folder):
    """Rows of counts of 72 fine-tunings and two soups, and of [model, *SETTINGS]."""
    rows, about = [], []
    settings = json.loads((Path(folder) / "hparam_info.json").read_text())
    for file in ("individual_model", "uniform_soup", "greedy_soup"):
        path = Path(folder) / f"{file}_results.jsonl"
        for line in path.read_text().splitlines():
            row = json.loads(line)
            model = row["model_name"]
            rows.append((model, "soup", counts_by(path, row, 2, half_digit=1e-9)))
            if model in settings:
                about.append((model, *(settings[model].get(s, "") for s in SETTINGS)))
    return rows, about


def published_rows():
    """The papers' ImageNet rows: 'VRF Table 2, ViT-B-16: E2E-FT +VRF'."""
    rows = []
    for paper, file in PAPERS.items():
        for part in json.loads((common.EMBEDDED / file).read_text())["tables"]:
            if "ImageNet-V2" not in part["columns"] or part.get("metric") == "ece":
                continue
            where = f"{paper} {part['table'].partition(',')[0]}, {part['model']}"
            for cells in part["rows"]:
                row = dict(zip(part["columns"], cells, strict=True))
                if "-" not in cells:
                    counts = counts_by(file, row, 3, percent=100, half_digit=5e-4)
                    rows.append((f"{where}: {row['method']}", "published", counts))
    return rows


def reproduced_rows(folder):
    """Rows of counts of reproductions.csv where all five accuracies are printed, and of [model,
    independent, source, note] of these.
    """
    path, rows, about = Path(folder) / "reproductions.csv", [], []
    short = {HOME: "id", **{s: s.rpartition("-")[2] for s in SETS if not s.startswith("val")}}
    short |= {HOME: "id", "imagenetv2-matched-frequency": "v2"}
    words = "method", "who", "independent", "source", "note"
    for row in table(path, *words, *short.values()):
        if row["who"] != "paper" and all(row[column] for column in short.values()):
            shares = {s: float(row[column]) / 100 for s, column in short.items()}
            counts = {s: count(path, x, SETS[s][0], 1e-4) for s, x in shares.items()}
            model = f"{row['method']}, {row['who']}"
            rows.append((model, "reproduced", counts))
            about.append((model, row["independent"], row["source"], row["note"]))
    return rows, about


# --- main -----------------------------------------------------------------------------------------


def write(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows(rows)
    print(f"{path}: {len(rows)} rows, {Path(path).stat().st_size:,} bytes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="with the raw tables")
    parser.add_argument("--out", default=testbeds.FOLDER, help="folder to write to")
    options = parser.parse_args(argv)
    results, out = timm(options.folder), Path(options.out)
    zero_shot, about = zero_shot_rows(options.folder)
    soups, settings = soup_rows(options.folder)
    again, verdict = reproduced_rows(options.folder)
    rows = baseline_rows(results) + fine_tuned_rows(results) + zero_shot + soups
    rows += published_rows() + again
    counts = [(model, role, *(k.get(s, "") for s in SETS)) for model, role, k in rows]
    header = ["model", "role", *(f"{s}:{n}" for s, (n, *_) in SETS.items())]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "modern.csv", header, counts)
    write(out / "modern_soups.csv", ["model", *SETTINGS], settings)
    write(out / "modern_zeroshot.csv", ["model", "parameters", "data"], about)
    header = ["model", "independent", "source", "note"]
    write(out / "modern_reproductions.csv", header, verdict)
    return rows


if __name__ == "__main__":
    common.run(main)
