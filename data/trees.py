"""Where the public data sets lie on disk, and how their classes map onto the training classes.

`common.open_data` calls `find`, which returns `common.Data`: arrays, or lists of files that nobody
has opened yet. Every error says what was found, what was expected, and the next step.
"""

import codecs
import difflib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch

import common

IMAGE_TYPES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WNID = r"n\d{8}"
NUMBER = r"\d{1,3}"
IMAGENET_ROOTS = ("", "imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
IMAGENET_VAL = ("val_in_folder", "val_dirs", "val")
# In the order of the papers' columns: usual folder names (compared without case and punctuation, of
# several the first is used), what such a folder holds, published number of images.
IMAGENET_SHIFTS = {
    "ImageNet-V2": (
        [
            f"imagenetv2-{variant}{suffix}"
            for variant in ("matched-frequency", "threshold0.7", "top-images")
            for suffix in ("", "-format-val")
        ]
        + ["imagenetv2"],
        NUMBER,
        10_000,
    ),
    "ImageNet-Sketch": (["imagenet-sketch", "sketch"], WNID, 50_889),
    "ImageNet-A": (["imagenet-a"], WNID, 7_500),
    "ImageNet-R": (["imagenet-r"], WNID, 30_000),
    "ObjectNet": (["objectnet-1.0", "objectnet"], "images", 18_574),
}
OBJECTNET_COUNTS = (18_574, 18_514)  # both are in print for the 113 shared classes; either passes
CORRUPTIONS = """gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur
    zoom_blur snow frost fog brightness contrast elastic_transform pixelate jpeg_compression"""
CORRUPTIONS = CORRUPTIONS.split()  # ImageNet-C's 15
EXTRA_CORRUPTIONS = "gaussian_blur saturate spatter speckle_noise".split()  # not in its means
# DomainNet's test images: as first published, and without the duplicates removed in 2019
DOMAINNET = {
    "clipart": (14_814, 14_604),
    "infograph": (16_114, 15_582),
    "painting": (22_892, 21_850),
    "quickdraw": (51_750, 51_750),
    "real": (52_764, 52_041),
    "sketch": (21_271, 20_916),
}
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL10 = "airplane bird automobile cat deer dog horse monkey ship truck".split()  # "car" there


def find(path):
    """The Data of what --data names; val is None if it has to be held out of train."""
    if path == "digits":
        return open_digits(common.EMBEDDED)
    root = existing_folder(path.removeprefix("entity30:"))
    if path.startswith("entity30:"):
        return open_entity30(root)
    for batches in (root / "cifar-10-batches-py", root):
        if (batches / "data_batch_1").is_file():
            return open_cifar10(batches)
    if split_file(root, "train") or len(set(subfolders(root)) & set(DOMAINNET)) > 1:
        return open_domainnet(root)
    names = subfolders(tree_with_train(root) / "train")
    # timm, which has the list of wnids, takes seconds to import: only for names that look like them
    if any(re.fullmatch(WNID, n) for n in names) and not set(imagenet_wnids()).isdisjoint(names):
        return open_imagenet(root)
    return open_folder(root)


def open_digits(folder):
    """The embedded digits: `<set>/images`, `<set>/labels` in digits.npz; names in prompts.json."""
    path, sets = folder / "digits.npz", {}
    if not path.is_file():
        raise common.InputError(f"{path} is missing; it belongs to the repository: restore it.")
    with np.load(path, allow_pickle=False) as arrays:
        for name in (key.removesuffix("/images") for key in arrays if key.endswith("/images")):
            if not name.startswith("pretrain"):
                labels = torch.from_numpy(arrays[f"{name}/labels"].astype(np.int64))
                sets[name] = common.Split(
                    name, f"data/{path.name}:{name}", arrays[f"{name}/images"], labels
                )
    train, val, test = (sets.pop(name) for name in ("train", "val", "test"))
    for shift in sets.values():
        shift.name = "UCI" if shift.name == "uci" else shift.name.replace("_", " ").capitalize()
    prompts = read_json(folder / "prompts.json")
    classes, templates = prompts["class_names"], prompts["templates"]
    return common.Data("digits", classes, templates, train, val, test, list(sets.values()), [])


def open_imagenet(root):
    """ImageNet and its five shift sets, looked for in the tree, in `root` and beside the tree.

    The training classes are the wnids in train/, in ImageNet's order. Folders of other classes are
    left out of every set, so that a tree with some of the 1000 classes works.
    """
    from open_clip import IMAGENET_CLASSNAMES

    base, wnids = tree_with_train(root), imagenet_wnids()
    present = subfolders(base / "train")
    if unknown := sorted(set(present) - set(wnids)):
        raise common.InputError(
            f"{base / 'train' / unknown[0]} is none of ImageNet's 1000 classes; there are "
            f"{len(unknown)} such folders. Move them out of the tree."
        )
    kept = sorted(map(wnids.index, present))
    rank = {wnids[i]: r for r, i in enumerate(kept)}  # wnid -> training class

    def split(name, path, expected, folders=None, **options):  # folders: {folder: its wnids}
        folders = folders or {wnid: [wnid] for wnid in subfolders(path)}
        ids = {f: [rank[w] for w in folders[f] if w in rank] for f in folders}
        ids = {f: ids[f] for f in ids if ids[f]}
        expected = expected if len(kept) == 1000 else None
        return class_folders(name, path, ids, expected=expected, **options)

    train = split("train", base / "train", 1_281_167, {wnid: [wnid] for wnid in rank})
    test = split("test", imagenet_val(base), 50_000)
    shifts, missing = [], []
    for name, (usual, inside, expected) in IMAGENET_SHIFTS.items():
        path = locate((base, root, base.parent), usual, inside)
        if path is None:
            missing.append(f"{name} (no {usual[0]}/ in {base} or beside it)")
        elif name == "ImageNet-V2":  # folders are class indices: 0, 1, 2, 10 and not 0, 1, 10, 2
            folders = sorted((f for f in subfolders(path) if re.fullmatch(inside, f)), key=int)
            shifts.append(split(name, path, expected, {f: [wnids[int(f)]] for f in folders}))
        elif name == "ObjectNet":
            folders = {f: [wnids[i] for i in ids] for f, ids in objectnet_map(path).items()}
            shift = split(name, path / "images", expected, folders, own=True, border=2)
            if shift.expected and len(shift.images) in OBJECTNET_COUNTS:
                shift.expected = len(shift.images)
            shifts.append(shift)
        else:  # -A and -R have 200 classes each, -Sketch has all
            shifts.append(split(name, path, expected, own=name != "ImageNet-Sketch"))
    names = [IMAGENET_CLASSNAMES[i] for i in kept]
    return common.Data("imagenet", names, clip_templates(), train, None, test, shifts, missing)


def objectnet_map(path):
    """{folder: ImageNet ids} of the 113 of ObjectNet's 313 folders that have a class in ImageNet.

    By the data set's own mappings/: folder -> object; object -> "label; label"; all labels, one a
    line; ImageNet id -> line, counted from 0.
    """
    folder = path / "mappings" if (path / "mappings").is_dir() else path.parent / "mappings"
    objects = read_json(folder / "folder_to_objectnet_label.json")
    shared = read_json(folder / "objectnet_to_imagenet_1k.json")
    line_to_id = {
        n: int(i) for i, n in read_json(folder / "pytorch_to_imagenet_2012_id.json").items()
    }
    labels = folder / "imagenet_to_label_2012_v2"
    labels = read_text(labels if labels.is_file() else labels.with_suffix(".txt")).splitlines()
    ids = {label.strip(): line_to_id[n] for n, label in enumerate(labels) if n in line_to_id}
    overlap = [f for f in subfolders(path / "images") if objects.get(f) in shared]
    try:
        return {f: [ids[label] for label in shared[objects[f]].split("; ")] for f in overlap}
    except KeyError as error:
        raise common.InputError(
            f"The files in {folder} do not belong together: no line for the label {error}. Take "
            "all four from one objectnet-1.0.zip."
        ) from None


def imagenet_c(root):
    """Yield (corruption, severity, Split) of ImageNet-C, in the tree or beside it: 15 corruptions
    and what there is of the extra four, severities 1 to 5, <corruption>/<severity>/<wnid>/.

    One at a time: a full set has 50,000 names. The downloads' own folders (blur/defocus_blur ...)
    may be between. Raises InputError for a set that is missing.
    """
    root, names = existing_folder(str(root)), [*CORRUPTIONS, *EXTRA_CORRUPTIONS]
    base, wnids = tree_with_train(root), imagenet_wnids()
    rank = {w: r for r, w in enumerate(w for w in wnids if (base / "train" / w).is_dir())}
    kinds = ("noise", "blur", "weather", "digital", "extra")
    folder = locate((base, root, base.parent), ["imagenet-c"], "|".join([*names, *kinds]))
    if folder is None:
        raise common.InputError(f"{base} has no imagenet-c/, there or beside it: add it.")
    for name in names:
        places = [folder / name, *(folder / kind / name for kind in kinds)]
        place = next(filter(Path.is_dir, places), None)
        if place is None:
            if name in CORRUPTIONS:
                raise common.InputError(f"{folder} has no {name}/; it holds {listing(folder)}.")
            continue
        for severity in range(1, 6):
            path = place / str(severity)
            if not path.is_dir():
                raise common.InputError(f"{place} has no {severity}/; it holds {listing(place)}.")
            ids = {wnid: [rank[wnid]] for wnid in subfolders(path) if wnid in rank}
            expected = 50_000 if len(rank) == 1000 else None
            split = class_folders(f"{name} {severity}", path, ids, expected=expected)
            yield name, severity, split


def open_cifar10(batches):
    """CIFAR-10's python batches; STL-10 and CIFAR-10.1 in the same folder or beside it."""
    parts = [read_batch(batches / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    train = array_split("train", batches, images, labels, 50_000)
    test = array_split("test", batches, *read_batch(batches / "test_batch"), 10_000)
    places, shifts, missing = (batches, batches.parent), [], []
    if path := locate(places, ["stl10", "stl10_binary"], r"airplane|test_X\.bin"):
        shifts.append(open_stl10(path))
    else:
        missing.append(f"STL-10 (no stl10/ or stl10_binary/ in {batches.parent})")
    folders = [p / f for p in places for f in ("", "CIFAR-10.1", "CIFAR-10.1/datasets")]
    for version, expected in (("v6", 2_000), ("v4", 2_021)):  # v6 is the one to use if both exist
        files = [folder / f"cifar10.1_{version}_data.npy" for folder in folders]
        if file := next(filter(Path.is_file, files), None):
            arrays = read_arrays(file, file.with_name(f"cifar10.1_{version}_labels.npy"))
            shifts.append(array_split(f"CIFAR-10.1 {version}", file, *arrays, expected))
            break
    else:
        missing.append(f"CIFAR-10.1 (no cifar10.1_v6_data.npy in {batches.parent} or CIFAR-10.1/)")
    return common.Data("cifar10", CIFAR10, clip_templates(), train, None, test, shifts, missing)


def read_batch(path):
    """One pickled batch as uint8 [N, 32, 32, 3] and int64 [N]; runs no code from the file."""
    rebuild = np.empty(0).__reduce__()[0]  # NumPy's constructor; its module depends on the version
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    allowed |= {(f"numpy.{core}.multiarray", "_reconstruct"): rebuild for core in ("core", "_core")}
    allowed["_codecs", "encode"] = codecs.encode  # bytes, as Python 3 writes them for Python 2

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return allowed[module, name]

    try:
        with open(path, "rb") as file:
            batch = Unpickler(file, encoding="bytes").load()
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.array(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can fail in any way
        raise common.InputError(
            f"{path} is no batch of CIFAR-10's python version ({type(error).__name__}: {error}). "
            "Unpack cifar-10-python.tar.gz again."
        ) from error


def open_stl10(path):
    """STL-10's test images of the 9 classes that CIFAR-10 shares, matched by name: no monkey."""
    if not (path / "test_X.bin").is_file():
        names = {f: "automobile" if f.lower() == "car" else f.lower() for f in subfolders(path)}
        if unknown := [f for f in names if names[f] not in STL10]:
            raise common.InputError(
                f"{path / unknown[0]} is no class of STL-10. Rename or remove it."
            )
        shared = sorted((f for f in names if names[f] in CIFAR10), key=names.get)  # CIFAR's order
        ids = {f: [CIFAR10.index(names[f])] for f in shared}
        return class_folders("STL-10", path, ids, own=True, expected=7_200)
    pixels, given = read_arrays(path / "test_X.bin", path / "test_y.bin")
    if pixels.size != given.size * 3 * 96 * 96:
        raise common.InputError(f"{path}/test_X.bin and test_y.bin differ in length: unpack again.")
    shared = [name for name in CIFAR10 if name in STL10]
    rank = np.array([shared.index(name) if name in shared else -1 for name in STL10])
    labels = rank[given - 1]
    images = pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # the file runs down the columns
    images, labels = images[labels >= 0], labels[labels >= 0]
    groups = [[CIFAR10.index(name)] for name in shared]
    return array_split("STL-10", path, images, labels, 7_200, groups)


def open_entity30(root):
    """BREEDS Entity-30: ID has the source subclasses, the shift the target ones, of 30 classes."""
    base = tree_with_train(root)
    info = locate((base, root, base.parent), ["imagenet_class_hierarchy"], r"class_hierarchy\.txt")
    if info is None:
        raise common.InputError(
            f"{base} has no imagenet_class_hierarchy/modified/, there or beside it. The folder "
            "comes with the BREEDS-Benchmarks repository: copy it from there."
        )
    names, source, target = entity30_classes(info)

    def split(name, path, subclasses, expected=None):
        ids = {wnid: [i] for i, wnids in enumerate(subclasses) for wnid in wnids}
        if absent := sorted(set(ids) - set(subfolders(path))):
            raise common.InputError(f"{path} has no {absent[0]}/, which Entity-30 needs: add it.")
        return class_folders(name, path, ids, expected=expected)

    val, n = imagenet_val(base), 50 * 4 * len(names)  # ImageNet's val has 50 images a class
    train, test = split("train", base / "train", source), split("test", val, source, n)
    shifts = [split("Entity-30 target", val, target, n)]
    return common.Data("entity30", names, clip_templates(), train, None, test, shifts, [])


def entity30_classes(folder):
    """Names of the superclasses, four source wnids of each, four target wnids of each.

    BREEDS, split "rand": nodes at depth 4 (longest path from the root) with at least 8 ImageNet
    classes below them, in order of their ids; one RandomState(2) draws 8 classes of each, the first
    four for the source. Verified: the reference package (robustness 1.2.1) draws the same on 300
    random hierarchies. Not verified on the published files, which are not ours to ship.
    """
    classes = {row[1] for row in read_json(folder / "dataset_class_info.json")}
    lines = read_text(folder / "node_names.txt").splitlines()
    titles = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    children = {}
    for line in read_text(folder / "class_hierarchy.txt").splitlines():
        parent, child = line.split()
        children.setdefault(parent, set()).add(child)

    def leaves(node):  # the ImageNet classes at or below a node
        return ({node} & classes).union(*map(leaves, children.get(node, ())))

    def pool(node):  # one entry per child that leads to a class, as the reference package has it
        below = [c for c in children[node] if leaves(c)]
        return pool(below[0]) if len(below) == 1 else sorted(w for c in below for w in leaves(c))

    depth, level = {}, {"n00001740"}  # WordNet's root
    for d in range(len(children)):  # the last visit of a node came by its longest path
        depth.update(dict.fromkeys(level, d))
        level = {c for node in level for c in children.get(node, ()) if leaves(c)}
    nodes = sorted(node for node in depth if depth[node] == 4 and len(leaves(node)) >= 8)
    rng = np.random.RandomState(2)
    drawn = [rng.choice(pool(node), 8, replace=False).tolist() for node in nodes]
    return [titles.get(n, n) for n in nodes], [d[:4] for d in drawn], [d[4:] for d in drawn]


def open_domainnet(root):
    """DomainNet with the domain of folder `root` as ID; shifts are the test lists of the others.

    Classes are those of the domain's own lists, by their numbers.
    """
    if root.name not in DOMAINNET or not split_file(root, "train"):
        raise common.InputError(
            f"{root} looks like DomainNet. Choose the domain to train on: {root}/real (or another "
            "one), with real_train.txt and real_test.txt beside the folder."
        )
    names, shifts, missing = {}, [], []

    def split(name, domain, part):
        path = split_file(domain, part)
        if path is None:
            raise common.InputError(f"{domain} has no {domain.name}_{part}.txt beside it: add it.")
        files, labels, held = [], [], {}
        for line in filter(str.strip, read_text(path).splitlines()):
            file, _, label = line.strip().rpartition(" ")
            folder, _, image = file.rpartition("/")
            if not label.isdecimal() or not folder:
                raise common.InputError(
                    f"{path}: expected lines 'real/axe/1.jpg 9', found {line!r}"
                )
            if folder not in held:
                here, title = domain.parent / folder, folder.rpartition("/")[2]
                held[folder] = set(os.listdir(here)) if here.is_dir() else set()
                if names.setdefault(int(label), title) != title:
                    raise common.InputError(
                        f"{path}: class {label} is {title}, but {names[int(label)]} in the list "
                        "read before; take all lists from one version of DomainNet."
                    )
            if image not in held[folder]:
                raise common.InputError(f"{domain.parent / file} is missing, but {path} has it.")
            files.append(os.path.join(domain.parent, file))
            labels.append(int(label))
        if not files:
            raise common.InputError(f"{path} is empty; take it from DomainNet again.")
        counts = DOMAINNET[domain.name] if part == "test" else (None,)
        expected = next((n for n in counts if n == len(files)), counts[0])
        return common.Split(name, str(domain), files, torch.tensor(labels), expected=expected)

    train, test = split("train", root, "train"), split("test", root, "test")
    if sorted(names) != list(range(len(names))):
        raise common.InputError(f"{split_file(root, 'train')} skips a class number; take it again.")
    known = len(names)
    for domain in (root.parent / name for name in DOMAINNET if name != root.name):
        if domain.is_dir():
            shifts.append(split(domain.name.capitalize(), domain, "test"))
        else:
            missing.append(f"{domain.name} (no {domain})")
    if len(names) > known:
        new = names[max(names)]
        raise common.InputError(f"{root.parent}: the lists of {root.name} have no class {new}.")
    classes = [names[i].replace("_", " ") for i in range(known)]
    args = classes, clip_templates(), train, None, test, shifts, missing
    return common.Data("domainnet", *args)


def split_file(domain, part):
    """DomainNet's list of a domain's train or test images, beside the domain's folder, or None."""
    name = f"{domain.name}_{part}.txt"
    places = (domain.parent / folder / name for folder in ("", "splits", "text"))
    return next(filter(Path.is_file, places), None)


def open_folder(root):
    """Any tree of class folders with train/ and val/ or test/; every other folder is a shift."""
    base = tree_with_train(root)
    parts, classes = subfolders(base), subfolders(base / "train")
    test_name = "test" if "test" in parts else "val"
    if test_name not in parts:
        raise common.InputError(f"{base} has train/ but no val/ or test/. {advice('val', parts)}")

    def split(name, own=False):
        folders = subfolders(base / name)
        if unknown := [f for f in folders if f not in classes]:
            raise common.InputError(
                f"{base / name / unknown[0]}: train/ has no such class folder"
                f"{common.did_you_mean(unknown[0], classes) or '.'} Rename or remove it."
            )
        ids = {f: [classes.index(f)] for f in folders}
        return class_folders(name, base / name, ids, own=own and folders != classes)

    def lines(name):
        text = read_text(base / name) if (base / name).is_file() else ""
        return [line.strip() for line in text.splitlines() if line.strip()]

    names = lines("classnames.txt") or [c.replace("_", " ") for c in classes]
    templates = lines("templates.txt") or clip_templates()
    if len(names) != len(classes):
        raise common.InputError(
            f"{base / 'classnames.txt'} has {len(names)} names for {len(classes)} class folders. "
            "Write one name a line, in the sorted order of the folders in train/."
        )
    if bad := [t for t in templates if t.count("{}") * t.count("{") * t.count("}") != 1]:
        raise common.InputError(
            f"{base / 'templates.txt'}: {bad[0]!r} lacks {{}} for the name, or has more braces."
        )
    val = split("val") if test_name == "test" and "val" in parts else None
    shifts = [split(name, own=True) for name in parts if name not in ("train", "val", "test")]
    train, test = split("train"), split(test_name)
    test.name = "test"
    return common.Data("folder", names, templates, train, val, test, shifts, [])


# --- what they share ---


def class_folders(name, path, ids, own=False, **options):
    """The Split of the folders in `ids`, {folder: training ids}; `own`: they are its classes."""
    from tqdm import tqdm

    if not ids:
        raise common.InputError(f"{path} has no training class's folder; it holds {listing(path)}.")
    files, labels = [], []
    for i, folder in enumerate(tqdm(ids, desc=str(path), delay=2, leave=False)):
        here = os.path.join(path, folder)  # strings: a Path for each of 1.28M images is slow
        names = [n for n in os.listdir(here) if n.lower().endswith(IMAGE_TYPES) and n[0] != "."]
        if not names:
            raise common.InputError(
                f"{here} has no images; it holds {listing(here)}. Put images directly into it "
                f"({' '.join(IMAGE_TYPES)}) or remove the folder."
            )
        files += [here + os.sep + n for n in sorted(names)]
        labels += [i if own else ids[folder][0]] * len(names)
    groups = list(ids.values()) if own else None
    return common.Split(name, str(path), files, torch.tensor(labels), groups, **options)


def array_split(name, path, images, labels, expected, groups=None):
    """Split of uint8 [N, H, W, 3] and labels [N]. Raises InputError for anything else."""
    classes = len(groups or CIFAR10)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        got = f"{images.dtype} {images.shape}"
        raise common.InputError(f"{path}: expected images as uint8 [N, H, W, 3], got {got}")
    whole = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not whole or not np.all((labels >= 0) & (labels < classes)):
        got = f"{labels.dtype} {labels.shape}" + f", {labels.min()} to {labels.max()}" * whole
        raise common.InputError(
            f"{path}: expected {len(images)} labels from 0 to {classes - 1}, got {got}"
        )
    labels = torch.from_numpy(labels.astype(np.int64))
    return common.Split(name, str(path), images, labels, groups, expected=expected)


def imagenet_wnids():
    """The 1000 WordNet ids, in the order of ImageNet's class index."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


def clip_templates():
    """OpenAI's 80 ImageNet prompts, as format strings."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def imagenet_val(base):
    """The folder of ImageNet's validation images in class folders."""
    paths = [base / name for name in IMAGENET_VAL if (base / name).is_dir()]
    if not paths:
        raise common.InputError(f"{base} has train/ but no val/. {advice('val', subfolders(base))}")
    for path in paths:
        if subfolders(path):
            return path
    raise common.InputError(
        f"{paths[0]} is flat: {len(os.listdir(paths[0])):,} files and no class folders. Expected "
        "val/<wnid>/*.JPEG, as in train/. ImageNet's own archive is flat; sort it once, by one of\n"
        "  Kaggle's list, in val/:  tail -n +2 LOC_val_solution.csv | "
        "while IFS=', ' read f w _; do mkdir -p $w && mv $f.JPEG $w/; done\n"
        "  torchvision, where ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz are:  "
        "python -c \"import torchvision; torchvision.datasets.ImageNet('.', 'val')\"\n"
        "  the well-known script valprep.sh, in val/"
    )


def existing_folder(path):
    path = Path(path).expanduser().absolute()
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a NUL
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            reason = getattr(error, "strerror", None) or error
            raise common.InputError(
                f"--data {str(path)[:80]}: {reason}; expected a folder"
            ) from error
        found = None
    if path.is_dir():
        return path
    if found:
        raise common.InputError(f"{path} is a file, but --data takes a folder: unpack archives.")
    parent, child = path.parent, path.name
    while not parent.is_dir():
        parent, child = parent.parent, parent.name
    near = common.did_you_mean(child, ["digits", *os.listdir(parent)])
    near = near or f"; it holds {listing(parent)}."
    raise common.InputError(f"{path} does not exist: {parent} has no {child!r}{near}")


def tree_with_train(root):
    """`root`, or the usual subfolder of it, that has train/."""
    for inner in IMAGENET_ROOTS:
        if (root / inner / "train").is_dir():
            return root / inner
    names = subfolders(root)
    if root.name == "train" or any(re.fullmatch(WNID, name) for name in names):
        hint = f"It looks like one set of a tree: pass the folder above, {root.parent}."
    elif (root / "cifar-10-python.tar.gz").is_file():
        hint = "Unpack CIFAR-10 first: tar -xzf cifar-10-python.tar.gz"
    else:
        hint = advice("train", names, "Without --data the embedded digits are used.")
    raise common.InputError(
        f"{root} has no train/; it holds {listing(root)}. Expected ImageNet (train/<wnid>/, "
        "val/<wnid>/), CIFAR-10 (cifar-10-batches-py/), or train/ and val/ with one folder per "
        f"class. {hint}"
    )


def locate(places, usual, inside):
    """The first folder of a usual name that has an entry like `inside`, itself or one level down.

    One level down: the authors' READMEs make X/X, and V2 and ObjectNet are often kept in a parent.
    """
    named = [
        place / name
        for want in usual
        for place in dict.fromkeys(places)
        if os.access(place, os.R_OK)
        for name in subfolders(place)
        if plain(name) == plain(want)
    ]
    for folder in named:
        for path in (folder, *(folder / name for name in subfolders(folder))):
            if any(re.fullmatch(inside, entry) for entry in os.listdir(path)):
                return path
    if named:
        example = {WNID: "folders like n01440764", NUMBER: "folders 0 to 999"}.get(inside, inside)
        raise common.InputError(
            f"{named[0]} holds {listing(named[0])}. Expected {example}, there or one level down: "
            "unpack the archive again, or rename the folder if it is another data set."
        )
    return None


def subfolders(path):
    """Sorted names of the folders in `path`, without hidden ones and macOS's leftovers."""
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.name[0] != "." and e.name != "__MACOSX"]
    if odd := [n for n in names if any("\ud800" <= c <= "\udfff" for c in n)]:
        shown = os.fsencode(odd[0]).decode(errors="backslashreplace")
        raise common.InputError(f"{path} holds {shown}, whose name is not UTF-8: rename it.")
    return sorted(name for name in names if os.path.isdir(os.path.join(path, name)))


def plain(name):
    return "".join(c for c in name.lower() if c.isalnum())


def listing(path):
    names = sorted(os.listdir(path))
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "nothing"


def advice(wanted, names, otherwise="Add it."):
    near = difflib.get_close_matches(wanted, set(names) - {"train"}, 1, 0.45)
    return f"Rename {near[0]!r} if that is it." if near else otherwise


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise common.InputError(
            f"{path} belongs to the data set but cannot be read ({error}). Restore it."
        ) from None


def read_json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise common.InputError(f"{path} is damaged ({error}). Restore it.") from None


def read_arrays(*paths):
    """.npy files, or raw bytes (.bin)."""
    try:
        return [
            np.load(p, allow_pickle=False) if p.suffix == ".npy" else np.fromfile(p, np.uint8)
            for p in paths
        ]
    except (OSError, ValueError) as error:
        raise common.InputError(f"{paths[0]} or its labels cannot be read ({error}).") from None
