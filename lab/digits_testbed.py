"""A testbed for the digits: 40 small networks trained from scratch on the ID training images alone.

    python lab/digits_testbed.py                  # all 40: about 6 minutes on two cores
    python lab/digits_testbed.py --out FILE.npz   # elsewhere; default: data/testbeds/digits.npz
    python lab/digits_testbed.py --only logistic-100,1nn-300   # compare some with the shipped bits

Effective robustness is measured against models that never saw anything but the ID data, so these
are many kinds, sizes, lengths of training and amounts of data, to spread over ID accuracy: logistic
regression, k nearest neighbours, random features, MLPs, CNNs and ViTs. All see grey images in
[0, 1]. Each has its own seed and its own subset; none shares a training run with another.

What is shipped are bits: which images each of the 40 gets right (er_study.py reads them). They come
again bit for bit with the same PyTorch on the same kind of CPU. Two threads are part of that: with
one, sums are taken in another order, and of one network 5 answers in 4,805 were others.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from data import testbeds  # noqa: E402

SIDE = 32
ZOO = (  # name, kind, options: n images, e epochs, w width, d depth, a augmented, k neighbours
    ("logistic-100", "linear", dict(n=100, e=100)),
    ("logistic-300", "linear", dict(n=300, e=60)),
    ("logistic-1000", "linear", dict(n=1000, e=40)),
    ("logistic-3000", "linear", dict(n=3000, e=30)),
    ("1nn-300", "knn", dict(n=300, k=1)),
    ("1nn-3000", "knn", dict(n=3000, k=1)),
    ("5nn-1000", "knn", dict(n=1000, k=5)),
    ("5nn-3000", "knn", dict(n=3000, k=5)),
    ("features-128", "features", dict(n=3000, w=128)),
    ("features-512-of-500", "features", dict(n=500, w=512)),
    ("features-512", "features", dict(n=3000, w=512)),
    ("features-2048", "features", dict(n=3000, w=2048)),
    ("mlp-32-3", "mlp", dict(n=3000, e=3, w=32, d=1)),
    ("mlp-32-30", "mlp", dict(n=3000, e=30, w=32, d=1)),
    ("mlp-128-200", "mlp", dict(n=200, e=100, w=128, d=1)),
    ("mlp-128-10", "mlp", dict(n=3000, e=10, w=128, d=1)),
    ("mlp-512-3", "mlp", dict(n=3000, e=3, w=512, d=1)),
    ("mlp-512-20", "mlp", dict(n=3000, e=20, w=512, d=1)),
    ("mlp-256x2-10", "mlp", dict(n=3000, e=10, w=256, d=2)),
    ("mlp-256x2-20-aug", "mlp", dict(n=3000, e=20, w=256, d=2, a=True)),
    ("cnn-8-1", "cnn", dict(n=3000, e=1, w=8)),
    ("cnn-8-3", "cnn", dict(n=3000, e=3, w=8)),
    ("cnn-8-10", "cnn", dict(n=3000, e=10, w=8)),
    ("cnn-16-of-100", "cnn", dict(n=100, e=80, w=16)),
    ("cnn-16-of-300", "cnn", dict(n=300, e=40, w=16)),
    ("cnn-16-of-1000", "cnn", dict(n=1000, e=15, w=16)),
    ("cnn-16-1", "cnn", dict(n=3000, e=1, w=16)),
    ("cnn-16-3", "cnn", dict(n=3000, e=3, w=16)),
    ("cnn-16-8", "cnn", dict(n=3000, e=8, w=16)),
    ("cnn-16-12-aug", "cnn", dict(n=3000, e=12, w=16, a=True)),
    ("cnn-32-2", "cnn", dict(n=3000, e=2, w=32)),
    ("cnn-32-5-aug", "cnn", dict(n=3000, e=5, w=32, a=True)),
    ("vit-32-3", "vit", dict(n=3000, e=3, w=32, d=2)),
    ("vit-32-10", "vit", dict(n=3000, e=10, w=32, d=2)),
    ("vit-32-25", "vit", dict(n=3000, e=25, w=32, d=2)),
    ("vit-32-of-500", "vit", dict(n=500, e=40, w=32, d=2)),
    ("vit-64-5", "vit", dict(n=3000, e=5, w=64, d=2)),
    ("vit-64-10", "vit", dict(n=3000, e=10, w=64, d=2)),
    ("vit-64-15-aug", "vit", dict(n=3000, e=15, w=64, d=2, a=True)),
    ("vit-64x3-10-aug", "vit", dict(n=3000, e=10, w=64, d=3, a=True)),
)


def grey(split):
    """[N, 1, 32, 32] in [0, 1] of a split of the embedded digits."""
    images = torch.from_numpy(np.stack(list(split.images))).float() / 255
    return (images.mean(-1) if images.ndim == 4 else images)[:, None]


class ViT(nn.Module):
    """16 patches of 8 x 8, d blocks of width w, mean of tokens."""

    def __init__(self, w, d):
        super().__init__()
        self.patch = nn.Conv2d(1, w, 8, 8)
        self.place = nn.Parameter(0.02 * torch.randn(16, w))
        block = nn.TransformerEncoderLayer(
            w, w // 16, 4 * w, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        options = {"enable_nested_tensor": False}
        self.blocks = nn.TransformerEncoder(block, d, nn.LayerNorm(w), **options)
        self.head = nn.Linear(w, 10)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(tokens).mean(1))


def network(kind, w=0, d=0):
    """Untrained network: [B, 1, 32, 32] -> [B, 10], and its learning rate."""
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 10)), 1e-2
    if kind == "mlp":
        widths = [SIDE * SIDE, *[w] * d]
        layers = [
            m
            for a, b in zip(widths, widths[1:], strict=False)
            for m in (nn.Linear(a, b), nn.ReLU())
        ]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(w, 10)), 1e-3
    if kind == "cnn":
        layers = []
        for a, b in ((1, w), (w, 2 * w), (2 * w, 2 * w)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * w, 10)), 2e-3
    return ViT(w, d), 2e-3


def fitted(kind, images, labels, seed, options):
    """Train one model on images [n, 1, 32, 32].  -> function of images to scores [B, 10]"""
    torch.manual_seed(seed)
    if kind == "knn":
        return nearest_neighbours(images, labels, options["k"])
    if kind == "features":
        return random_features(images, labels, options["w"])
    model, lr = network(kind, options.get("w", 0), options.get("d", 0))
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    steps = options["e"] * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(2, steps))
    for rows in common.batches(len(images), 64, steps, seed):
        index = torch.tensor([i for i, _ in rows])
        x = images[index]
        if options.get("a"):  # a shift of up to two pixels
            up, left = torch.randint(-2, 3, (2,)).tolist()
            x = x.roll((up, left), (2, 3))
        F.cross_entropy(model(x), labels[index]).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def nearest_neighbours(images, labels, k):
    def vote(x):
        near = torch.cdist(x.flatten(1), images.flatten(1)).topk(k, largest=False).indices
        return F.one_hot(labels[near], 10).sum(1).float()  # of a tie: the smaller class

    return vote


def random_features(images, labels, width):
    """Ridge regression on random ReLU features."""
    project = torch.randn(SIDE * SIDE, width) / SIDE
    shift = torch.randn(width) / 2

    def lift(x):
        return F.relu(x.flatten(1) @ project + shift)

    h, target = lift(images).double(), F.one_hot(labels, 10).double()
    ridge = h.T @ h + 1.0 * torch.eye(width, dtype=torch.float64)
    solution = torch.linalg.solve(ridge, h.T @ target).float()
    return lambda x: lift(x) @ solution


def bits_of(name, data, splits):
    """{set: bool [N]}, which images the model of that name gets right once it is trained."""
    seed = [model for model, _, _ in ZOO].index(name)
    _, kind, options = ZOO[seed]
    images, labels = grey(data.train), data.train.labels
    rows = np.random.default_rng(seed).permutation(len(labels))[: options["n"]]
    model = fitted(kind, images[rows], labels[rows], seed, options)
    with torch.inference_mode():
        scores = {s.name: [model(x) for x in grey(s).split(500)] for s in splits}
    return {s.name: (torch.cat(scores[s.name]).argmax(1) == s.labels).numpy() for s in splits}


def trained(names, progress=print):
    """Testbed of some models of ZOO, trained now, on the digits' test set and shifts."""
    torch.set_num_threads(2)
    data = common.open_data()
    splits, found = [data.test, *data.shifts], []
    for name in names:
        found.append(bits_of(name, data, splits))
        progress(f"{name}: {100 * found[-1][data.test.name].mean():.1f} % on ID")
    right = {s.name: np.stack([bits[s.name] for bits in found]) for s in splits}
    id_of = {s.name: data.test.name for s in data.shifts}
    return testbeds.known_by_image("digits", names, right, id_of)


def cheap(name):
    """Whether a model trains in a second or two: those of `er_study.py --quick`."""
    kind, options = next((kind, options) for model, kind, options in ZOO if model == name)
    return kind not in ("cnn", "vit") or options["n"] * options["e"] <= 8000


def write(testbed, path):
    """PATH.npz, and PATH-quick.npz of the cheap models."""
    rows = [i for i, name in enumerate(testbed.models) if cheap(name)]
    right = {s: bits[rows] for s, bits in testbed.right.items()}
    names = [testbed.models[i] for i in rows]
    quick = testbeds.known_by_image("digits", names, right, testbed.id_of)
    testbeds.write(testbed, path)
    testbeds.write(quick, path.with_stem(f"{path.stem}-quick"))
    print(f"wrote {path} and, of {len(rows)} models, {path.stem}-quick.npz beside it")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=testbeds.FOLDER / "digits.npz", help="file to write")
    parser.add_argument("--only", default="", help="compare these, write nothing")
    options = parser.parse_args(argv)
    every = [name for name, _, _ in ZOO]
    if not options.only:
        testbed = trained(every)
        write(testbed, Path(options.out))
        return
    names, shipped = common.choose(options.only, every, "--only"), testbeds.read("digits")
    again = trained(names)
    for i, name in enumerate(names):
        row = shipped.row(name)
        changed = sum((again.right[s][i] != shipped.right[s][row]).sum() for s in shipped.right)
        print(
            f"{name}: {changed} of {sum(shipped.n.values())} answers differ from the shipped ones"
        )


if __name__ == "__main__":
    main()
