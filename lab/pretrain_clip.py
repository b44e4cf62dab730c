"""Pre-train the tiny CLIP of this repository on captioned digits of many domains, never on MNIST.

    python lab/pretrain_clip.py                        # the shipped weights, 6 to 10 minutes
    python lab/pretrain_clip.py --stop 8 --out x.npz   # its first losses again, seconds

Ten domains are drawn on the fly from data/digits.npz (glyph atlas, photos, UCI digits that no
evaluation uses). A caption is one of the neutral templates or the domain's own one, filled with the
class name. The loss is CLIP's: symmetric cross-entropy over the batch's image-text similarities,
with one care: a small world repeats captions, so an image's target is spread evenly over the
columns that hold its very caption. All runs on one thread from one seed, so the losses repeat.

`corpus` and `pretrain` are importable: pre-training size and number of domains are arguments.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

DATA = Path(__file__).resolve().parents[1] / "data"
SIDE = 32
# OpenAI CLIP's channel statistics, so that the tiny model is fed exactly as its big relatives are.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Each domain with its own caption. A smaller world has the first few of them.
DOMAINS = {
    "glyph": "a printed {}.",
    "inverted": "a dark {} on light paper.",
    "uci": "a handwritten {}.",
    "outline": "an outline drawing of a {}.",
    "photo": "a {} painted on a photo.",
    "wobbly": "a wobbly {}.",
    "colour": "a coloured {}.",
    "texture": "a textured {}.",
    "noise": "a noisy image of a {}.",
    "pixel": "a pixelated {}.",
}
WEIGHT = {"uci": 1.0, "photo": 2.0}  # relative frequency, 1 where not named
BATCH, LR = 128, 1e-3
NEUTRAL = 4  # the first four templates of prompts.json name no domain


def prompts():
    return json.loads((DATA / "prompts.json").read_text())


# --- drawing: batches of tensors in, batches of tensors out ---


def uniform(n, low, high, g):
    """[n, 1, 1]"""
    return low + (high - low) * torch.rand(n, 1, 1, generator=g)


def smooth(n, cells, g):
    """Smooth standard-normal fields, `cells` knots a side: [n, 32, 32]"""
    knots = torch.randn(n, 1, cells, cells, generator=g)
    return F.interpolate(knots, (SIDE, SIDE), mode="bicubic", align_corners=True)[:, 0]


def blur(x, times=1):
    """3 x 3 binomial blur, repeated: [n, 32, 32]"""
    k = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    for _ in range(times):
        x = F.conv2d(x[:, None], k, padding=1)[:, 0]
    return x


def warp(x, g, zoom=(0.65, 1.0), degrees=12, shear=0.2, shift=2.5, wobble=0.0):
    """Random affine map and an optional smooth displacement of `wobble` pixels: [n, 32, 32]"""
    n = len(x)
    angle = uniform(n, -degrees, degrees, g) * math.pi / 180
    zx = uniform(n, *zoom, g)
    zy = zx * uniform(n, 0.85, 1.15, g)
    sh = uniform(n, -shear, shear, g)
    line = torch.linspace(-1, 1, SIDE)
    y, x_ = torch.meshgrid(line, line, indexing="ij")
    y = y - uniform(n, -shift, shift, g) / 16
    x_ = x_ - uniform(n, -shift, shift, g) / 16
    u = (torch.cos(angle) * x_ + torch.sin(angle) * y + sh * y) / zx
    v = (-torch.sin(angle) * x_ + torch.cos(angle) * y) / zy
    if wobble:
        u = u + wobble / 16 * smooth(n, 4, g)
        v = v + wobble / 16 * smooth(n, 4, g)
    grid = torch.stack([u.expand(n, SIDE, SIDE), v.expand(n, SIDE, SIDE)], -1)
    return F.grid_sample(x[:, None], grid, align_corners=True)[:, 0]


def restroke(ink, g, low=0.2, high=0.6):
    """Thicker or thinner strokes: a soft threshold of the blurred mask."""
    return torch.sigmoid((blur(ink) - uniform(len(ink), low, high, g)) * 12)


def colours(n, g, least=0.25):
    """Two colours whose brightness differs by `least` or more: 2 x [n, 3, 1, 1]"""
    a, b = torch.rand(2, n, 3, generator=g)
    w = torch.tensor([0.299, 0.587, 0.114])
    gap = (b - a) @ w
    push = (least - gap.abs()).clamp(min=0) * torch.where(gap < 0, -1.0, 1.0)
    b = (b + push[:, None]).clamp(0, 1)
    a = (a - push[:, None]).clamp(0, 1)
    return a[..., None, None], b[..., None, None]


def paint(ink, back, front):
    """Alpha blending, [n, 32, 32] over [n, 3, 32, 32] -> [n, 3, 32, 32]"""
    return back * (1 - ink[:, None]) + front * ink[:, None]


def grey(x):
    return x[:, None].expand(-1, 3, -1, -1)


def levels(ink, g):
    """Light strokes on a dark ground with random ends: [n, 32, 32]"""
    low, high = uniform(len(ink), 0, 0.25, g), uniform(len(ink), 0.65, 1, g)
    return low + (high - low) * ink


def outline(glyph, g):
    """The contour of a bent glyph, on light or dark, with grain: [n, 3, 32, 32]"""
    n = len(glyph)
    ink = restroke(warp(glyph, g, (0.75, 1.05), wobble=1.0), g, 0.15, 0.35)
    line = 4 * ink * (1 - ink) + (ink - blur(ink, 2)).abs()
    line = (line * uniform(n, 0.8, 1.3, g)).clamp(0, 1)
    dark = torch.rand(n, 1, 1, generator=g) < 0.2
    image = uniform(n, 0.75, 1, g) - uniform(n, 0.5, 0.75, g) * line
    image = torch.where(dark, 1 - image, image)
    return grey(image + 0.04 * torch.randn(n, SIDE, SIDE, generator=g)).clamp(0, 1)


def on_photo(glyph, back, g):
    """Of two colours the one that stands out from the photo: [n, 3, 32, 32]"""
    n = len(glyph)
    a, b = colours(n, g, 0.3)
    bright = (back.mean((2, 3)) @ torch.tensor([0.299, 0.587, 0.114])) > 0.5
    dark_first = a.mean((1, 2, 3)) < b.mean((1, 2, 3))
    front = torch.where((bright == dark_first)[:, None, None, None], a, b)
    image = paint(restroke(warp(glyph, g, (0.65, 1.0), wobble=0.4), g), back, front)
    return (image + 0.03 * torch.randn(n, 3, SIDE, SIDE, generator=g)).clamp(0, 1)


def textured(ink, back, front, g):
    """Fine noise in both colours, smooth noise in the ground's: [n, 3, 32, 32]"""
    n = len(ink)
    fine = torch.randn(2, n, SIDE, SIDE, generator=g)
    fine = torch.stack([blur(f, 1) for f in fine]) * uniform(n, 0.1, 0.5, g)
    coarse = smooth(n, 6, g) * uniform(n, 0, 0.12, g)
    back, front = back + (fine[0] + coarse)[:, None], front + fine[1][:, None]
    return paint(ink, back, front).clamp(0, 1)


def noisy(ink, g):
    """Light on dark or dark on light, with noise in each pixel: [n, 3, 32, 32]"""
    n, image = len(ink), levels(ink, g)
    image = torch.where(torch.rand(n, 1, 1, generator=g) < 0.5, image, 1 - image)
    image = image + uniform(n, 0.1, 0.35, g) * torch.randn(n, SIDE, SIDE, generator=g)
    return grey(image.clamp(0, 1))


class World:
    """The material of data/digits.npz from which the domains are drawn."""

    def __init__(self, path=DATA / "digits.npz"):
        with np.load(path, allow_pickle=False) as z:
            self.glyphs = torch.from_numpy(z["pretrain_glyphs"])
            self.uci = torch.from_numpy(z["pretrain_uci/images"])
            uci_labels = torch.from_numpy(z["pretrain_uci/labels"])
            self.photos = torch.from_numpy(z["pretrain_photos"]).permute(0, 3, 1, 2)
        self.uci_of = torch.stack([torch.nonzero(uci_labels == c)[:, 0] for c in range(10)])

    def glyph(self, labels, g):
        which = torch.randint(len(self.glyphs), (len(labels),), generator=g)
        return self.glyphs[which, labels].float() / 255

    def real(self, labels, g):
        which = torch.randint(self.uci_of.shape[1], (len(labels),), generator=g)
        return self.uci[self.uci_of[labels, which]].float() / 255

    def photo(self, n, g):
        """Random crops at random scale: [n, 3, 32, 32]"""
        which = torch.randint(len(self.photos), (n,), generator=g)
        height, width = self.photos.shape[-2:]
        half = uniform(n, 10, 34, g)
        cy = half + (height - 1 - 2 * half) * uniform(n, 0, 1, g)
        cx = half + (width - 1 - 2 * half) * uniform(n, 0, 1, g)
        line = torch.linspace(-1, 1, SIDE)
        y, x = torch.meshgrid(line, line, indexing="ij")
        rows, columns = (cy + half * y).round().long(), (cx + half * x).round().long()
        back = self.photos[which[:, None, None], :, rows, columns].permute(0, 3, 1, 2).float() / 255
        contrast, mean = uniform(n, 0.4, 1, g)[..., None], uniform(n, 0.25, 0.75, g)[..., None]
        return ((back - back.mean((1, 2, 3), keepdim=True)) * contrast + mean).clamp(0, 1)

    def draw(self, domain, labels, g):
        """Images of one domain: labels [n] -> float [n, 3, 32, 32] in [0, 1]."""
        n = len(labels)
        if domain == "uci":
            ink = warp(self.real(labels, g), g, (0.85, 1.3), 12, 0.25, 2.5, wobble=0.5)
            return grey(ink * uniform(n, 0.8, 1.1, g)).clamp(0, 1)
        glyph = self.glyph(labels, g)
        if domain == "glyph":
            return grey(levels(restroke(warp(glyph, g), g), g))
        if domain == "inverted":
            return grey(1 - levels(restroke(warp(glyph, g), g), g))
        if domain == "wobbly":
            ink = warp(glyph, g, (0.6, 0.95), 20, 0.35, 2.5, wobble=1.6)
            return grey(restroke(ink, g, 0.15, 0.5) * uniform(n, 0.8, 1, g))
        if domain == "outline":
            return outline(glyph, g)
        a, b = colours(n, g)  # drawn for all that follow: the shipped weights hang on the order
        if domain == "photo":
            return on_photo(glyph, self.photo(n, g), g)
        ink = restroke(warp(glyph, g), g)
        if domain == "colour":
            return paint(ink, a, b).clamp(0, 1)
        if domain == "texture":
            return textured(ink, a, b, g)
        if domain == "noise":
            return noisy(ink, g)
        if domain == "pixel":
            small = F.interpolate(levels(ink, g)[:, None], (11, 11), mode="area")
            return grey(F.interpolate(small, (SIDE, SIDE), mode="nearest")[:, 0])


def batch(world, domains, size, g, captions):
    """One mixed batch: images uint8 [size, 3, 32, 32], labels [size], caption ids [size].

    Caption id = template * 10 + class, templates as in prompts.json.
    """
    weight = torch.tensor([WEIGHT.get(d, 1.0) for d in domains])
    domain = torch.multinomial(weight, size, replacement=True, generator=g)
    labels = torch.randint(10, (size,), generator=g)
    own = torch.tensor([captions.index(DOMAINS[d]) for d in domains])[domain]
    template = torch.where(
        torch.rand(size, generator=g) < 0.5, torch.randint(NEUTRAL, (size,), generator=g), own
    )
    images = torch.empty(size, 3, SIDE, SIDE, dtype=torch.uint8)
    for i, name in enumerate(domains):
        at = torch.nonzero(domain == i)[:, 0]
        if len(at):
            images[at] = (world.draw(name, labels[at], g) * 255).round().to(torch.uint8)
    return images, labels, template * 10 + labels


def corpus(domains=None, size=8192, seed=0):
    """A fixed set of the first `domains`: images uint8 [size, 3, 32, 32], labels and caption ids
    [size]. None: all ten.
    """
    world, names, templates = World(), list(DOMAINS)[:domains], prompts()["templates"]
    g = torch.Generator().manual_seed(seed)
    parts = [batch(world, names, min(1024, size - at), g, templates) for at in range(0, size, 1024)]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


# --- model and loss ---


def normalise(images):
    """uint8 [n, 3, 32, 32] -> what the vision tower takes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def create(seed=0):
    """The tiny CLIP at random initialisation; token rows that no caption uses are zero."""
    import open_clip

    open_clip.factory.add_model_config(DATA / "tiny_clip.json")
    torch.manual_seed(seed)
    model = open_clip.create_model("tiny_clip", precision="fp32")
    tokens = caption_tokens()
    unused = torch.ones(model.token_embedding.num_embeddings, dtype=torch.bool)
    unused[tokens.unique()] = False
    with torch.no_grad():
        model.token_embedding.weight[unused] = 0
    return model, tokens


def caption_tokens():
    """Token ids of every caption, template-major: [T * 10, context]"""
    import open_clip

    open_clip.factory.add_model_config(DATA / "tiny_clip.json")
    p = prompts()
    captions = [t.format(c) for t in p["templates"] for c in p["class_names"]]
    return open_clip.get_tokenizer("tiny_clip")(captions)


def contrastive(image, text, scale, ids):
    """CLIP's loss with equal captions counted as equally right: [B, D], [B, D], (), [B] -> ()"""
    target = (ids[:, None] == ids[None]).float()
    target = target / target.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def adamw(model):
    """Weight decay on the matrices, except the token table."""
    table = model.token_embedding.weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not table]
    rest = [p for p in model.parameters() if p.ndim < 2 or p is table]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def pretrain(steps=1500, domains=None, size=None, seed=0, log=None, stop=None):
    """Returns (model, list of losses). domains: the first so many, None all. size: images of a
    fixed corpus, None draws new ones at every step.

    `stop` ends after that many steps of the schedule for `steps`: a check of a run's beginning.
    """
    torch.set_num_threads(1)
    world, names, templates = World(), list(DOMAINS)[:domains], prompts()["templates"]
    model, tokens = create(seed)
    g = torch.Generator().manual_seed(seed + 1)
    fixed = None if size is None else corpus(domains, size, seed + 2)
    optimiser, losses, started = adamw(model), [], time.time()
    for step in range(steps if stop is None else stop):
        warm = min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = LR * warm * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
        if fixed is None:
            images, _, ids = batch(world, names, BATCH, g, templates)
        else:
            at = torch.randint(size, (BATCH,), generator=g)
            images, ids = fixed[0][at], fixed[2][at]
        unique, place = ids.unique(return_inverse=True)
        text = model.encode_text(tokens[unique], normalize=True)[place]
        image = model.encode_image(normalise(images), normalize=True)
        loss = contrastive(image, text, model.logit_scale.exp(), ids)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if log and (step % log == 0 or step + 1 == (stop or steps)):
            rate = (step + 1) / (time.time() - started)
            print(f"step {step:5d}  loss {losses[-1]:.4f}  {rate:.1f} steps/s", flush=True)
    return model.eval(), losses


def save(model, path):
    """The state dict as a compressed npz in fp16 (zero token rows cost almost nothing).

    Every number of the README was measured with the rounded weights; the logit scale stays fp32.
    A loader casts everything to fp32.
    """
    arrays = {
        k: v.detach().numpy().astype(np.float32 if v.ndim == 0 else np.float16)
        for k, v in model.state_dict().items()
    }
    np.savez_compressed(path, **arrays)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stop", type=int, default=None, help="end after so many of the steps")
    parser.add_argument("--out", type=Path, default=DATA / "tiny_clip.npz")
    args = parser.parse_args(argv)
    model, losses = pretrain(log=50, stop=args.stop)
    print("losses", " ".join(f"{x:.5f}" for x in losses[:20]))
    save(model, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
