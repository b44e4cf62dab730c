"""AdamSPD drops in: semantic segmentation, clean and corrupted (the paper's Sec. 4, PASCAL).

    python lab/examples/segment.py                               # generated digits: 2 minutes
    python lab/examples/segment.py --data VOCdevkit/VOC2010      # Swin-Tiny; not measured by us

--data: a folder in VOC's layout: JPEGImages/, then SegmentationClassContext/ and ImageSets/
SegmentationContext/ (PASCAL-Context, 60 classes with background) or, where these are not,
SegmentationClass/ and ImageSets/Segmentation/ (VOC, 21); both with train.txt and val.txt, masks as
PNG, 255 = void. Two such folders are generated from the embedded digits: a small network learns
printed digits on plain colours and two photos (its pre-training), then handwritten ones on two
other photos; two classes, digit or not. Reported is mIoU, background included, for the corruptions
that the paper names.

The paper's rates, epochs and severities are not known to us. A decoder that is new has no anchor.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import train
from generate import CORRUPTIONS, corrupt, digits_on_photos
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.v2.functional import normalize
from train import common

PRESETS = {"digits": {"model": "test_convnext", "size": 64, "lr": 5e-4, "batch": 32, "epochs": 3}}


Config = train.settings(
    data=("digits", "digits, or a folder in VOC's layout"),
    model=("swin_tiny_patch4_window7_224", "timm model with features_only"),
    pretrained=(True, "the backbone with timm's weights (a download)"),
    size=(512, "pixels a side that the network sees; ours"),
    epochs=(40, "ours"),
    batch=(16, "ours"),
    lr=(6e-5, "ours"),
    weight_decay=(0.01, "of AdamW alone; ours"),
    out=("runs/segment", "folder for the generated images"),
)


class Segmenter(nn.Module):
    """timm backbone; its levels to 64 channels, enlarged, added, one 3 x 3 convolution, classes.

    Images [B, 3, S, S] in 0..1 -> logits [B, C, s, s], s the backbone's finest level.
    """

    def __init__(self, name, classes, pretrained, size, width=64):
        super().__init__()
        options = {"img_size": size} if name.startswith("swin") else {}
        try:
            self.backbone = timm.create_model(name, pretrained, features_only=True, **options)
        except (RuntimeError, OSError, ValueError) as error:
            reason, cure = common.first_line(error), "offline, --no-pretrained starts at random"
            raise common.InputError(f"--model {name}: {reason}; {cure}") from error
        channels = self.backbone.feature_info.channels()
        self.levels = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        mix = [nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        mix += [nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, classes, 1)]
        self.mix = nn.Sequential(*mix)

    def forward(self, images):
        levels = self.backbone(normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        if levels[0].shape[1] != self.levels[0].in_channels:  # Swin's are [B, H, W, D]
            levels = [x.permute(0, 3, 1, 2) for x in levels]
        levels = [conv(x) for conv, x in zip(self.levels, levels, strict=True)]
        size = levels[0].shape[-2:]
        return self.mix(sum(F.interpolate(x, size, mode="bilinear") for x in levels))


def read_voc(root, part):
    """[(image file, mask file)] of train or val, and the number of classes. Raises InputError."""
    context = (root / "SegmentationClassContext").is_dir()
    kind, masks = "SegmentationContext" if context else "Segmentation", "SegmentationClass"
    names = root / "ImageSets" / kind / f"{part}.txt"
    if not names.is_file() or not names.read_text().split():
        raise common.InputError(f"{names} is missing or empty; --data takes VOC's layout")
    masks = root / (masks + "Context" * context)
    files = [(root / f"JPEGImages/{n}.jpg", masks / f"{n}.png") for n in names.read_text().split()]
    if absent := next((p for pair in files for p in pair if not p.is_file()), None):
        raise common.InputError(f"{absent} is missing, though {names} has it")
    return files, 60 if context else 21


def load(pair, size, seed=None, flip=False):
    """Image [3, S, S] and mask, the whole of both; or a random crop of half to all of the area."""
    with Image.open(pair[0]) as image, Image.open(pair[1]) as mask:
        box = (0, 0, *image.size)
        image, mask = image.convert("RGB"), mask.copy()
    if seed is not None:
        rng = np.random.default_rng(seed)
        w, h = (s * math.sqrt(rng.uniform(0.5, 1)) for s in image.size)
        left, top = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
        box = (left, top, left + w, top + h)
        mask = mask.resize((size, size), Image.Resampling.NEAREST, box)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    x, y = torch.tensor(pixels).permute(2, 0, 1) / 255, torch.tensor(np.asarray(mask)).long()
    return (x.flip(-1), y.flip(-1)) if flip and seed and seed % 2 else (x, y)


def mean_iou(confusion):
    """Mean over classes that occur, true or predicted, of |both| / |either|.  [C, C] -> percent"""
    both = confusion.diag()
    either = confusion.sum(0) + confusion.sum(1) - both
    return 100 * (both[either > 0] / either[either > 0]).mean().item()


@torch.inference_mode()
def evaluate(model, pairs, classes, config, pool):
    """{"clean" and each corruption: mIoU}, and the mean of the corrupted; masks keep their size."""
    device, columns = next(model.parameters()).device, {}
    for name in ("clean", *CORRUPTIONS):
        confusion, rng = torch.zeros(classes * classes), torch.Generator().manual_seed(0)
        for i in range(0, len(pairs), config.batch):
            items = list(pool.map(lambda p: load(p, config.size), pairs[i : i + config.batch]))
            x = corrupt(torch.stack([x for x, _ in items]), name, rng)
            with common.autocast(device, config.precision):
                logits = model(x.to(device)).float().cpu()
            for out, (_, mask) in zip(logits, items, strict=True):
                out = F.interpolate(out[None], mask.shape, mode="bilinear")[0].argmax(0)
                known = mask < classes
                index = mask[known] * classes + out[known]
                confusion += index.bincount(minlength=classes * classes)
        columns[name] = mean_iou(confusion.view(classes, classes))
    return columns | {"corrupted": sum(columns[c] for c in CORRUPTIONS) / len(CORRUPTIONS)}


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    root, device, embedded = Path(config.data), common.pick_device(config.device), False
    if config.data == "digits":
        common.apply_preset(config, "digits", PRESETS)
        embedded, counts = True, {"train": config.items, "val": max(1, config.items // 3)}
        kinds, out = ("printed", "handwritten"), Path(config.out)
        printed, root = (digits_on_photos(out / k, k, counts, config.seed) for k in kinds)
    (pairs, classes), (val, _) = read_voc(root, "train"), read_voc(root, "val")
    common.set_seed(config.seed)
    pretrained = config.pretrained and not embedded
    model = Segmenter(config.model, classes, pretrained, config.size).to(device)

    def loss_fn(batch):
        logits = F.interpolate(model(batch[0]), batch[1].shape[-2:], mode="bilinear")
        return F.cross_entropy(logits, batch[1], ignore_index=255)

    def batch_of(pairs, rows):  # no flip of digits: a mirrored 2 is no 2
        items = pool.map(lambda r: load(pairs[r[0]], config.size, r[1], not embedded), rows)
        return tuple(map(torch.stack, zip(*items, strict=True)))

    with ThreadPoolExecutor() as pool:
        special = {"levels.": {"anchor": "none"}, "mix.": {"anchor": "none"}}
        if embedded:  # nothing is new after the pre-training
            special, given = None, read_voc(printed, "train")[0]
            adamw = torch.optim.AdamW(model.parameters(), lr=4 * config.lr)
            args = len(given), partial(batch_of, given), loss_fn, adamw
            train.fit(config, "pre-training", model, *args)
        score = partial(evaluate, pairs=val, classes=classes, config=config, pool=pool)
        args = len(pairs), partial(batch_of, pairs), loss_fn, score
        rows = train.compare(config, model, *args, special=special)
    train.print_rows(rows, common.steps_of(config, len(pairs)))
    return rows


if __name__ == "__main__":
    common.run(main)
