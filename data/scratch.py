"""A testbed for the digits: 40 small models trained from scratch on the ID training images alone.

Effective robustness is measured against models that never saw anything but the ID data, so these
are many kinds, sizes, lengths of training and amounts of data, to spread over ID accuracy: logistic
regression, k nearest neighbours, random features, MLPs, CNNs and ViTs. All see grey images in
[0, 1]. Each has its own seed and its own subset; none shares a training run with another.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
from data import testbeds

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


def fitted(kind, x, y, seed, e=0, w=0, d=0, a=False, k=0):
    """Train one model on images x [n, 1, 32, 32], labels y; returns images -> scores [B, 10]."""
    torch.manual_seed(seed)
    if kind == "knn":

        def vote(z):
            near = torch.cdist(z.flatten(1), x.flatten(1)).topk(k, largest=False).indices
            return F.one_hot(y[near], 10).sum(1).float()  # of a tie: the smaller class

        return vote
    if kind == "features":  # ridge regression on random ReLU features
        project = torch.randn(SIDE * SIDE, w) / SIDE
        shift = torch.randn(w) / 2

        def lift(z):
            return F.relu(z.flatten(1) @ project + shift)

        h, target = lift(x).double(), F.one_hot(y, 10).double()
        ridge = h.T @ h + 1.0 * torch.eye(w, dtype=torch.float64)
        solution = torch.linalg.solve(ridge, h.T @ target).float()
        return lambda z: lift(z) @ solution
    model, lr = network(kind, w, d)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    steps = e * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=max(2, steps))
    for rows in common.batches(len(x), 64, steps, seed):
        index = torch.tensor([i for i, _ in rows])
        images = x[index]
        if a:  # a shift of up to two pixels
            up, left = torch.randint(-2, 3, (2,)).tolist()
            images = images.roll((up, left), (2, 3))
        F.cross_entropy(model(images), y[index]).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def cheap(kind, options):
    """Whether a model trains in a second or two."""
    return kind not in ("cnn", "vit") or options["n"] * options["e"] <= 8000


def testbed(config, data, quick=False):
    """Testbed of ZOO, or with `quick` of its cheap models, on data.test and the shifts; cached."""
    zoo = [z for z in ZOO if not quick or cheap(*z[1:])]
    splits = [data.test, *data.shifts]

    def compute():
        from tqdm import tqdm

        x, y = grey(data.train), data.train.labels
        images, right = {s.name: grey(s) for s in splits}, {s.name: [] for s in splits}
        for name, kind, options in tqdm(zoo, "testbed", leave=False):
            seed, options = [z[0] for z in ZOO].index(name), dict(options)
            rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
            rows = rows[: options.pop("n")]
            model = fitted(kind, x[rows], y[rows], seed, **options)
            with torch.inference_mode():
                for s in splits:
                    scores = torch.cat([model(z) for z in images[s.name].split(500)])
                    right[s.name].append(scores.argmax(1) == s.labels)
        return {s: torch.stack(r) for s, r in right.items()}

    key = [[s.fingerprint for s in (data.train, *splits)], [[n, k, str(o)] for n, k, o in zoo]]
    right = {s: r.numpy() for s, r in common.cached(config, "testbed", key, compute).items()}
    id_of = {s.name: data.test.name for s in data.shifts}
    return testbeds.known_by_image("digits", [z[0] for z in zoo], right, id_of)
