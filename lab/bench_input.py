"""Times the input path against torchvision's. Not a test: python lab/bench_input.py [--help]

Both read the same JPEGs, generated here: 500 x 375, quality 90, about 110 kB, a spectrum like a photo's (amplitude
1 / frequency^1.1), and give CLIP's test transform as fp32 batches on the CPU; that they are equal bit for bit is checked.
Method: the two in turn (A B A B ...), medians of the rounds after one warm-up, ratios of them. "wall" is images per
second; "CPU" images per CPU second of all processes, the fairer one on a shared machine. 2,000 images: 6 minutes.
"""

# ruff: noqa: E501  (table rows are wide)
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
from data.images import read_rgb  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def field(rng, height, width, power):
    """Periodic noise with an amplitude of 1 / frequency^power, mean 0, variance 1.  [H, W]"""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    wave = rng.standard_normal((*frequency.shape, 2)) @ [1, 1j] * frequency**-power
    noise = np.fft.irfft2(wave, (height, width))
    return noise / noise.std()


def make_tree(folder, images, classes=10):
    """Class folders of JPEGs: 20 photos' worth of noise, each time shifted; every fifth upright."""
    rng = np.random.default_rng(0)
    photos = []
    for _ in range(min(20, images)):
        grey = 60 * field(rng, 375, 500, 1.1)
        colours = [grey + 12 * field(rng, 375, 500, 1.4) + 115 for _ in range(3)]
        photos.append(np.stack(colours, -1).clip(0, 255).astype(np.uint8))
    for i in range(images):
        pixels = np.roll(photos[i % len(photos)], rng.integers(0, 375, 2), (0, 1))
        if i % 5 == 4:
            pixels = np.ascontiguousarray(pixels.transpose(1, 0, 2))
        path = Path(folder) / f"class {i % classes}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def torchvision_loader(folder, batch, workers):
    from torchvision.datasets import ImageFolder

    transform = common.eval_transform(224, MEAN, STD)
    return torch.utils.data.DataLoader(ImageFolder(folder, transform), batch, num_workers=workers)


def our_loader(folder, batch, workers):
    files = sorted(str(path) for path in Path(folder).glob("*/*.jpg"))
    n, config = len(files), common.Run(workers=workers, device="cpu")
    order = [[(j, 0) for j in range(i, min(i + batch, n))] for i in range(0, n, batch)]
    split = common.Split("photos", folder, files, torch.zeros(n, dtype=torch.int64))
    transform, device = common.eval_transform(224, MEAN, STD), torch.device("cpu")
    return common.load_images(split, transform, order, config, device)


LOADERS = {"torchvision": torchvision_loader, "ours": our_loader}


def cpu_seconds():
    """Of this process, its children and theirs that have ended (worker processes). Linux only."""
    ticks, own = 0, str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if fields[1] == own or stat.parent.name == own:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def rates(folder, workers, options):
    """{loader: (images per second, images per CPU second)}, medians, interleaved."""
    found = {name: [] for name in LOADERS}
    for turn in range(options.rounds + 1):
        for name, loader in LOADERS.items():
            wall, cpu, n = time.perf_counter(), cpu_seconds(), 0
            for batch in loader(folder, options.batch, workers):
                n += len(batch[0])
            del batch
            if turn:
                found[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    return {x: tuple(n / statistics.median(c) for c in zip(*v, strict=True)) for x, v in found.items()}  # fmt: skip


def parts(folder, images=400):
    """CPU ms per image of each part of torchvision's loader and of ours, in one process."""
    transform = common.eval_transform(224, MEAN, STD)
    resize, crop, to_tensor, normalise = transform.transforms
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms import PILToTensor

    files = sorted(Path(folder).glob("*/*.jpg"))[:images]
    as_bytes = PILToTensor()

    def in_bulk(batch):
        return normalise(torch.stack(batch).float().div_(255))

    paths = {
        "torchvision": (pil_loader, lambda x: crop(resize(x)), lambda x: normalise(to_tensor(x))),
        "ours": (read_rgb, lambda x: crop(resize(x)), as_bytes),
    }
    last = {"torchvision": torch.stack, "ours": in_bulk}
    ms = {name: np.zeros(4) for name in paths}
    for first in range(0, len(files), 20):
        for name, steps in paths.items():
            batch = files[first : first + 20]
            for i, step in enumerate((*steps, None)):
                start = time.process_time()
                batch = [step(x) for x in batch] if step else last[name](batch)
                ms[name][i] += 1e3 * (time.process_time() - start) / len(files)
    return {name: sums.tolist() for name, sums in ms.items()}


def other_resizes(folder, images=100):
    """What is faster than Pillow's resize and crop, and how its bytes differ.  {name: ms, ...}"""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as v2

    resize, crop = common.eval_transform(224, MEAN, STD).transforms[:2]
    photos = [read_rgb(p) for p in sorted(Path(folder).glob("*/*.jpg"))[:images]]
    pixels = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in photos]

    def box(photo):
        """Only the crop is computed; Pillow takes its edges as fp32."""
        (w, h), scale = photo.size, 224 / min(photo.size)
        wide, high = max(224, int(w * scale)), max(224, int(h * scale))
        left, top = round((wide - 224) / 2), round((high - 224) / 2)
        edges = left * w / wide, top * h / high, (left + 224) * w / wide, (top + 224) * h / high
        return v2.pil_to_tensor(photo.resize((224, 224), Image.Resampling.BICUBIC, edges))

    def vectorised(x):
        x = v2.resize(x, [224], InterpolationMode.BICUBIC, antialias=True)
        return v2.center_crop(x, [224, 224])

    exact, found = None, {}
    for name, call, given in (
        ("Resize, CenterCrop", lambda x: v2.pil_to_tensor(crop(resize(x))), photos),
        ("Pillow, resize(box=...)", box, photos),
        ("torchvision on bytes", vectorised, pixels),
    ):
        start = time.process_time()
        out = torch.stack([call(x) for x in given])
        ms = 1e3 * (time.process_time() - start) / len(given)
        exact = out if exact is None else exact
        gap = (out.int() - exact.int()).abs()
        found[name] = ms, gap.max().item(), (gap > 0).double().mean().item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", default="bench_input.json", help="where the numbers are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_tree(folder, options.images)
        size = statistics.mean(path.stat().st_size for path in Path(folder).glob("*/*.jpg")) / 1e3
        both = (loader(folder, 64, 0) for loader in LOADERS.values())
        equal = all(torch.equal(a[0], b[0]) for a, b in zip(*both, strict=True))
        print(f"{options.images} JPEGs of {size:.0f} kB; equal bit for bit: {equal}")
        ms = parts(folder)
        result = {"kB": size, "equal": equal, "ms": ms, "options": vars(options), "images/s": {}}
        header = ("CPU ms an image", "read, decode", "resize, crop", "to tensor", "batch", "sum")
        rows = [[x, *(f"{y:.2f} ({y / sum(v):.0%})" for y in v), f"{sum(v):.2f}"] for x, v in ms.items()]  # fmt: skip
        print(common.table(header, rows, ""))
        result["resizes"] = other_resizes(folder)
        rows = [[x, f"{v[0]:.2f}", str(v[1]), f"{v[2]:.1e}"] for x, v in result["resizes"].items()]
        header = (
            "resize and crop",
            "CPU ms an image",
            "largest difference, of 255",
            "share of bytes",
        )
        print(common.table(header, rows, ""), flush=True)
        rows = []
        for workers in options.workers:
            of = result["images/s"][workers] = rates(folder, workers, options)
            ratio = [a / b for a, b in zip(of["ours"], of["torchvision"], strict=True)]
            cells = [f"{of[x][i]:.0f}" for i in (0, 1) for x in LOADERS]
            rows.append([str(workers), *cells[:2], f"{ratio[0]:.2f}", *cells[2:], f"{ratio[1]:.2f}"])  # fmt: skip
    if rows:
        header = ("torchvision, wall", "ours", "ratio", "torchvision, CPU", "ours", "ratio")
        print(common.table(("workers", *header), rows, ""))
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
