"""How much of a published ECE is the way it was measured (T7), from real confidences.

CaRot's code measures the ECE of each batch of 512 images and takes the mean over batches. A batch's
ECE has a positive bias, since in every bin the accuracy of a few images misses their confidence by
chance. This command takes the confidences of a real model, and compares both measures with those of
a perfectly calibrated model that has the same confidences: there each answer is right with exactly
its confidence as probability, so that all that is measured is the floor.

    python lab/calibration.py FILE        # 20 s for 50,000 images

FILE: a CSV (or .csv.gz) with the columns label, predicted_class and confidence, a row an image, in
the order in which the images were read. One such file is facebookresearch/imagenetx's of a ViT-B/16
(CC BY-NC 4.0, which is why it is not here).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import carot  # noqa: E402
import common  # noqa: E402

MEASURES = {"ECE, whole set": common.ece, "ECE per 512": carot.ece_per_batch}


def read(path):
    """(confidence [N], right bool [N]), torch, in the file's order."""
    try:
        table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8-sig")
        predicted, labels = table["predicted_class"], table["label"]
        confidence = torch.from_numpy(table["confidence"].astype(np.float64))
    except (OSError, ValueError, IndexError, TypeError) as error:
        columns = "expected a CSV with the columns label, predicted_class and confidence"
        raise common.InputError(f"{path}: {columns} ({common.first_line(error)})") from error
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise common.InputError(f"{path}: confidences must be shares from 0 to 1")
    return confidence, torch.from_numpy(predicted == labels)


def two_columns(confidence, right):
    """Scores and labels whose top-1 confidence and correctness are these.  2 x [N] -> [N, 2], [N]

    Both measures look at nothing else, so that the other classes need not be known. The second
    column, 0, is never the largest.
    """
    return torch.stack([confidence, torch.zeros_like(confidence)], 1), (~right).long()


def measure(confidence, right, draws=50, seed=0):
    """Rows (images' order, measure, the model's, mean and standard deviation of the calibrated
    model's over `draws` sets of answers, difference). Orders: the file's, and one at random.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    shuffled = torch.randperm(len(right), generator=generator)
    orders = {"as in the file": torch.arange(len(right)), "at random": shuffled}
    uniform = torch.rand(draws, len(right), generator=generator, dtype=torch.float64)
    for order, index in orders.items():
        for name, ece in MEASURES.items():
            own = ece(*two_columns(confidence[index], right[index]))
            floor = []
            for u in uniform:
                answers = u < confidence
                floor.append(ece(*two_columns(confidence[index], answers[index])))
            rows.append((order, name, own, np.mean(floor), np.std(floor, ddof=1)))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--draws", type=int, default=50, help="sets of answers drawn")
    options = parser.parse_args(argv)
    confidence, right = read(options.file)
    rows = measure(confidence, right, options.draws)
    accuracy, mean = right.double().mean(), confidence.mean()
    print(f"{len(right):,} images, accuracy {accuracy:.4f}, mean confidence {mean:.4f}")
    columns = ["images", "measure", "the model", "calibrated: mean", "sd"]
    cells = [(order, name, f"{a:.4f}", f"{b:.4f}", f"{c:.4f}") for order, name, a, b, c in rows]
    print(common.table(columns, cells, "expected calibration error, 10 bins"))
    whole, batches = rows[0][2:], rows[1][2:]
    print(f"1. The mean over batches of 512 adds {batches[0] - whole[0]:+.4f} to this model's ECE.")
    print(f"2. A perfectly calibrated model with its confidences has {batches[1]:.4f} per 512 and")
    print(f"   {whole[1]:.4f} over the whole set: the first is the floor of numbers per 512.")
    return rows


if __name__ == "__main__":
    common.run(main)
