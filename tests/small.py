"""Small data sets and models that several test files use."""

import colorsys

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import common
from data import testbeds, trees

TINY = "--model tiny_clip --pretrained random --batch 16 --warmup 3 --device cpu".split()
FEW = {"train": 192, "val": 48, "test": 64, "uci": 48, "fonts": 48}  # images of each set
# What common needs to know of a CLIP whose image tower is that of `linear_model`.
CLIP = common.Clip(None, None, "linear", False, 32, (0.5,) * 3, (0.5,) * 3)


def few_digits(folder, sets=FEW):
    """A copy of common.EMBEDDED with the first digits of some sets, and their part of the testbed.
    A test uses it by `use_digits`.
    """
    (folder / "testbeds").mkdir(parents=True)
    for path in common.EMBEDDED.iterdir():
        if path.name not in ("digits.npz", "testbeds"):
            (folder / path.name).symlink_to(path)
    with np.load(common.EMBEDDED / "digits.npz") as digits:
        parts = [(f"{name}/{part}", n) for name, n in sets.items() for part in ("images", "labels")]
        np.savez(folder / "digits.npz", **{key: digits[key][:n] for key, n in parts})
    for name in ("digits", "digits-quick"):
        testbed = testbeds.read(common.EMBEDDED / "testbeds" / f"{name}.npz")
        n_of = {split: sets.get(split.lower().replace(" ", "_")) for split in testbed.right}
        right = {split: testbed.right[split][:, :n] for split, n in n_of.items() if n}
        pairs = {shift: at_home for shift, at_home in testbed.id_of.items() if shift in right}
        few = testbeds.known_by_image("digits", testbed.models, right, pairs)
        testbeds.write(few, folder / "testbeds" / f"{name}.npz")
    return folder


def use_digits(monkeypatch, folder):
    """Let `--data digits` mean those of `few_digits`, until the test ends."""
    monkeypatch.setattr(common, "EMBEDDED", folder)
    monkeypatch.setattr(trees, "FOLDER", folder)


def picture(rng, hue, size, noise=0.1):
    """A noisy patch of one hue: a random tiny CLIP learns ten of them in a few steps."""
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, 0.9, 0.9))
    pixels = colour * rng.uniform(0.3, 1, (*size, 1)) + rng.normal(0, noise, (*size, 3))
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def make_tree(root):
    """Ten class folders of hues; a shift of noisy ones, and "again": the training images."""
    rng = np.random.default_rng(0)
    for name, n in {"train": 8, "val": 4, "test": 4, "noisy": 3}.items():
        for c in range(10):
            folder = root / name / f"hue_{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                hue, size = c / 10 + rng.normal(0, 0.03), rng.integers(20, 60, 2)
                noise = 0.4 if name == "noisy" else 0.1
                picture(rng, hue, size, noise).save(folder / f"{i}.jpg", quality=90)
    (root / "again").symlink_to(root / "train")
    (root / "templates.txt").write_text("a photo of {}.\n")
    return root


def random_split(n=40, seed=0):
    """A Split of noise, 32 x 32 pixels, in ten classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
    return common.Split("toy", "memory", images, torch.from_numpy(rng.integers(0, 10, n)))


def image_files(root, height=32):
    """A Split of eight files of noise in the folders root/train/0 and 1."""
    files = [root / "train" / f"{i % 2}" / f"{i}.png" for i in range(8)]
    for path, pixels in zip(files, random_split(8).images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[:height]).save(path)
    return common.Split("train", str(root), list(map(str, files)), torch.arange(8) % 2)


def linear_model(seed=0):
    """A Classifier of ten classes whose image tower is one linear layer."""
    torch.manual_seed(seed)
    visual = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16))
    return common.Classifier(visual, torch.randn(10, 16))


def settings(out, **given):
    """A common.Run for a training of seconds."""
    values = {"batch": 16, "epochs": 2, "warmup": 2, "lr": 1e-3, "device": "cpu"}
    return common.Run(**values | given | {"out": str(out)})


def short_training(out, at=None, stop=None, precision="fp32", epochs=5, evaluate=True):
    """Epochs of four steps with dropout; before step `at` (from 1) `stop` is called.  -> weights,
    the numbers that train_steps yielded
    """
    config, done = settings(out, batch=8, precision=precision, epochs=epochs), []
    torch.manual_seed(1)
    images, labels = torch.randn(30, 6), torch.arange(30) % 3
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 3))
    average = nn.Linear(6, 32)  # of the weights, moved by the loop below
    module, optimiser = nn.ModuleList([model, average]), torch.optim.AdamW(model.parameters(), 1e-2)

    def batches_from(first):
        for step, rows in enumerate(common.batches(30, 8, 4 * epochs, 0, first), first + 1):
            if step == at:
                stop()
            index = [i for i, _ in rows]
            yield images[index], labels[index]

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    key = {"images": 30}
    training = common.new_training(config, "short", module, optimiser, loss_fn, batches_from, key)
    for step in common.train_steps(config, training):
        done.append(step)
        average.weight.data.lerp_(model[0].weight.data, 0.5)
        if evaluate:
            module.eval()
    return module.state_dict(), done
