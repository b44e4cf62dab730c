"""Eleven of ImageNet-C's fifteen corruptions, for images of 32 x 32 pixels; amounts are ours.

Left out are snow, frost and fog, textures of weather that are too fine for so few pixels, and
glass_blur, whose swaps of neighbouring pixels are elastic_transform at this size.
"""

import io

import numpy as np

CORRUPTIONS = {  # amounts at severities 1 to 5
    "gaussian_noise": (0.06, 0.12, 0.18, 0.26, 0.36),  # standard deviation
    "shot_noise": (60, 25, 12, 6, 3),  # photons of a white pixel
    "impulse_noise": (0.02, 0.05, 0.1, 0.17, 0.27),  # share of pixels set to 0 or 1
    "defocus_blur": (0.6, 0.9, 1.2, 1.6, 2.1),  # radius of the disk, pixels
    "motion_blur": (2, 3, 4, 5, 7),  # length of the line, pixels
    "zoom_blur": (1.06, 1.12, 1.18, 1.26, 1.35),  # largest zoom
    "brightness": (0.1, 0.2, 0.3, 0.45, 0.6),  # added
    "contrast": (0.75, 0.55, 0.4, 0.25, 0.15),  # factor about the image's mean
    "elastic_transform": (0.5, 0.8, 1.1, 1.5, 2.0),  # standard deviation of the shift, pixels
    "pixelate": (24, 19, 15, 12, 9),  # pixels a side
    "jpeg_compression": (40, 25, 15, 9, 5),  # quality
}


def corrupt(images, name, amount, rng):
    """One of CORRUPTIONS at that amount.  uint8 [N, H, W] or [N, H, W, 3] -> the same"""
    if name == "pixelate":
        return np.stack([pixelated(image, amount) for image in images])
    if name == "jpeg_compression":
        return np.stack([as_jpeg(image, amount) for image in images])
    x = images / 255.0
    if name == "gaussian_noise":
        x = x + amount * rng.standard_normal(x.shape)
    elif name == "shot_noise":
        x = rng.poisson(x * amount) / amount
    elif name == "impulse_noise":
        hit = rng.random(x.shape) < amount
        x = np.where(hit, rng.integers(2, size=x.shape), x)
    elif name == "brightness":
        x = x + amount
    elif name == "contrast":
        mean = x.mean((1, 2), keepdims=True)
        x = mean + amount * (x - mean)
    elif name == "defocus_blur":
        x = convolved(x, disk(amount))
    elif name == "motion_blur":
        x = convolved(x, np.eye(amount) / amount)
    elif name == "zoom_blur":
        x = np.mean([zoomed(x, factor) for factor in np.linspace(1, amount, 6)], 0)
    elif name == "elastic_transform":
        x = np.stack([bent(image, amount, rng) for image in x])
    return (255 * x.clip(0, 1)).round().astype(np.uint8)


def pixelated(image, side):
    from PIL import Image

    image = Image.fromarray(image)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST))


def as_jpeg(image, quality):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def convolved(x, kernel):
    """Every channel of [N, H, W, ...] with a kernel [h, w]; the border is repeated."""
    from scipy import ndimage

    channels = (1,) * (x.ndim - 3)
    return ndimage.convolve(x, kernel.reshape(1, *kernel.shape, *channels), mode="nearest")


def disk(radius):
    """A filled circle with soft edge as kernel that sums to 1."""
    n = int(np.ceil(radius))
    y, x = np.mgrid[-n : n + 1, -n : n + 1]
    kernel = (radius + 0.5 - np.hypot(x, y)).clip(0, 1)
    return kernel / kernel.sum()


def zoomed(x, factor):
    """[N, H, W, ...] magnified about the centre, same size."""
    from scipy import ndimage

    scale, offset = np.ones(x.ndim), np.zeros(x.ndim)
    scale[1:3] = 1 / factor
    offset[1:3] = [(n - 1) / 2 * (1 - 1 / factor) for n in x.shape[1:3]]
    return ndimage.affine_transform(x, scale, offset, order=1, mode="nearest")


def bent(image, amount, rng):
    """[H, W, ...] with its pixels moved by a smooth random field of that standard deviation."""
    from scipy import ndimage

    height, width = image.shape[:2]
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij")).astype(float)
    shift = ndimage.gaussian_filter(rng.standard_normal((2, height, width)), (0, 2, 2))
    where = grid + amount * shift / shift.std()
    channels = np.moveaxis(image.reshape(height, width, -1), -1, 0)
    moved = [ndimage.map_coordinates(c, where, order=1, mode="nearest") for c in channels]
    return np.stack(moved, -1).reshape(image.shape)
