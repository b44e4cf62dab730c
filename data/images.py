"""From image files to batches on the device. `common` says which images, in which order.

Decoding gives the same pixels as CLIP's own code (Pillow, RGB, EXIF ignored), and a random crop
depends on the seed of its (index, seed) pair alone, whatever the number of worker processes.
"""

import os
import tempfile

import numpy as np
import torch

from data.trees import InputError


class Images(torch.utils.data.Dataset):
    """(image, label) of a Split. Raises InputError for a file that cannot be read.

    An item is (index, seed): the transform draws from torch's generator under that seed.
    """

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, item):
        index, seed = item
        image = self.read(index)
        if border := self.split.border:
            image = image.crop((border, border, image.width - border, image.height - border))
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds GPUs: 0.3 ms
        image = self.transform(image)
        torch.set_rng_state(state)
        return image, int(self.split.labels[index])

    def read(self, index):
        """The image as PIL RGB. Raises InputError."""
        source = self.split.images[index]
        try:
            return read_rgb(source)
        except Exception as error:  # PIL has a dozen types for damaged files
            cure = "Restore the file, or leave such files out with --skip-bad-images."
            raise InputError(f"{source} cannot be read as an image: {error}. {cure}") from error


def unreadable(paths):
    """Indices of the files that cannot be decoded, by decoding all on all cores."""
    from multiprocessing.pool import ThreadPool  # PIL decodes without the interpreter's lock

    from tqdm import tqdm

    def fails(path):
        try:
            read_rgb(path)
        except Exception:  # PIL has a dozen types for damaged files
            return True
        return False

    with ThreadPool() as pool:
        found = pool.imap(fails, paths, chunksize=64)
        bar = tqdm(found, "reading all images", len(paths), delay=2, leave=False)
        return [i for i, bad in enumerate(bar) if bad]


def read_rgb(source):
    """A file or uint8 array as PIL RGB. Alpha is dropped and EXIF ignored, as CLIP's code does."""
    from PIL import Image

    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    with Image.open(source) as image:
        if image.mode.startswith("I"):  # 16-bit grey: PIL's conversion would clip, not scale
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image.load()  # the file is closed below
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy: 0.2 ms


def load_images(split, transform, order, config, device):
    """Yield (images [B, 3, H, W] on the device, labels [B]) for every list of (index, seed) in
    `order`.

    `transform` ends in ToTensor and Normalize: these run here, on the device and for the batch,
    with the same result; until then pixels are bytes, a quarter of fp32. Raises InputError.
    """
    from torchvision import transforms as t

    *shape, _, normalise = transform.transforms
    workers = worker_count(split, device) if config.workers < 0 else config.workers
    batches = torch.utils.data.DataLoader(
        Images(split, t.Compose([*shape, t.PILToTensor()])),
        batch_sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the generator that dropout uses
        multiprocessing_context=worker_context() if workers else None,
    )
    try:
        for pixels, labels in batches:
            pixels = pixels.to(device, non_blocking=True).float()
            yield normalise(pixels.div_(255)), labels
    except InputError as error:  # a worker process wraps the sentence in its traceback
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        cure = "out of memory? The same command continues; fewer --workers need less"
        cure += ". A script of your own must call main under `if __name__ == '__main__':`"
        raise InputError(f"a worker process died ({str(error)[:120]}); {cure}") from error


def worker_count(split, device):
    """This process's share of the cores where a GPU waits for files, else 0: on a CPU the model, a
    hundred times slower than decoding, wants the cores itself.
    """
    if isinstance(split.images, np.ndarray) or device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def worker_context():
    """forkserver where there is one: fork and threads hang, and spawn imports torch anew each time.
    Raises InputError where its sockets would have too long a name.
    """
    kinds = torch.multiprocessing.get_all_start_methods()
    if "forkserver" not in kinds:
        return torch.multiprocessing.get_context("spawn")
    folder = os.fsencode(tempfile.gettempdir())
    if len(folder) > 71:  # of 104 bytes on macOS and 108 on Linux Python's own part takes 32
        cure = "set TMPDIR=/tmp, or pass --workers 0"
        raise InputError(f"TMPDIR is too long for worker processes ({len(folder)} bytes); {cure}")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms"])  # once, not by each worker
    return context
