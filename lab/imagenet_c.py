"""ImageNet-C as it lies on disk, for Fig. 4 of CaRot (lab/carot_ablations.py corruptions)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.trees import (  # noqa: E402
    InputError,
    class_folders,
    existing_folder,
    imagenet_wnids,
    listing,
    locate,
    subfolders,
    tree_with_train,
)

CORRUPTIONS = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur
    zoom_blur snow frost fog brightness contrast elastic_transform pixelate jpeg_compression"""
CORRUPTIONS = CORRUPTIONS.split()  # ImageNet-C's 15
EXTRA_CORRUPTIONS = "gaussian_blur saturate spatter speckle_noise".split()  # not in its means


def imagenet_c(root):
    """Yield (corruption, severity, Split) of ImageNet-C, in the tree or beside it: 15 corruptions
    and what there is of the extra four, severities 1 to 5, <corruption>/<severity>/<wnid>/.

    One at a time: a full set has 50,000 names. The downloads' own folders (blur/defocus_blur ...)
    may be between. Raises InputError for a set that is missing.
    """
    root, names = existing_folder(str(root)), [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
    base, wnids = tree_with_train(root), imagenet_wnids()
    rank = {w: r for r, w in enumerate(w for w in wnids if (base / "train" / w).is_dir())}
    inside = "|".join([*names, "noise", "blur", "weather", "digital", "extra"])
    folder = locate((base, root, base.parent), ["imagenet-c"], inside)
    if folder is None:
        raise InputError(f"{base} has no imagenet-c/, there or beside it: add it.")
    expected = 50_000 if len(rank) == 1000 else None
    for name in names:
        place = next(iter([*folder.glob(name), *folder.glob(f"*/{name}")]), None)
        if place is None and name in CORRUPTIONS:
            raise InputError(f"{folder} has no {name}/; it holds {listing(folder)}.")
        for severity in range(1, 6) if place else ():
            path = place / str(severity)
            if not path.is_dir():
                raise InputError(f"{place} has no {severity}/; it holds {listing(place)}.")
            ids = {wnid: [rank[wnid]] for wnid in subfolders(path) if wnid in rank}
            yield name, severity, class_folders(f"{name} {severity}", path, ids, expected=expected)
