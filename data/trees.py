"""Where the public data sets lie on disk, and how their classes map onto the training classes.

`common.open_data` calls `find`, which returns `Data`: arrays, or lists of files that nobody has
opened yet. Every error says what was found, what was expected, and the next step.
"""

import contextlib
import difflib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data import pickles

FOLDER = Path(__file__).resolve().parent

IMAGE_TYPES = tuple(  # what Pillow reads by itself and people keep images in
    """.jpeg .jpg .jpe .jfif .png .webp .avif .jp2 .bmp .gif .tif .tiff .tga .ppm .pgm .pbm .pnm
    """.split()
)
LEFT_BEHIND = ("__MACOSX", "Thumbs.db", "desktop.ini", "lost+found")  # by operating systems
WNID = r"n\d{8}"
NUMBER = r"\d{1,3}"
IMAGENET_ROOTS = ("", "imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
VAL = ("val_in_folder", "val_dirs", "val", "valid", "validation", "dev")  # usual names
# Parts and copies of the training and validation sets are no shift, though their classes fit.
NO_SHIFT = r"(train|training|val|valid|validation|dev)\d*([ _.-].*)?|.*[ _.-](backup|copy|old|orig)"
# In the order of the papers' columns: usual folder names (compared without case and punctuation, of
# several the first is used), what such a folder holds, published number of images.
IMAGENET_SHIFTS = {
    "ImageNet-V2": (
        """imagenetv2-matched-frequency imagenetv2-threshold0.7 imagenetv2-top-images imagenetv2
        """.split(),
        NUMBER,
        10_000,
    ),
    "ImageNet-Sketch": (["imagenet-sketch", "sketch"], WNID, 50_889),
    "ImageNet-A": (["imagenet-a"], WNID, 7_500),
    "ImageNet-R": (["imagenet-r"], WNID, 30_000),
    "ObjectNet": (["objectnet-1.0", "objectnet"], "images", 18_574),
}
OBJECTNET_COUNTS = (18_574, 18_514)  # both are in print for the 113 shared classes; either passes
# DomainNet's test images: as first published, and without the duplicates removed in 2019.
# Differs (S6): the sixth domain, infograph, is left out, as in the SPD paper.
DOMAINNET = {
    "clipart": (14_814, 14_604),
    "painting": (22_892, 21_850),
    "quickdraw": (51_750, 51_750),
    "real": (52_764, 52_041),
    "sketch": (21_271, 20_916),
}
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL10 = "airplane bird automobile cat deer dog horse monkey ship truck".split()  # "car" there


class InputError(ValueError):
    """The user gave something wrong: what was found, what was expected, the next step."""


@dataclass
class Split:
    """One set of images: files in class folders, or one embedded array."""

    name: str  # "ImageNet-R", "val", "STL-10" ...
    path: str  # where it was found, for the table and the errors
    images: list | np.ndarray  # file paths, or uint8 [N, H, W] / [N, H, W, 3]
    labels: torch.Tensor  # [N] int64, index into the set's own classes (after `project`)
    groups: list[list[int]] | None = None  # set class -> training class ids; None: all classes
    border: int = 0  # pixels cut off each side first (ObjectNet: 2)
    expected: int | None = None  # published number of images
    notes: list[str] = field(default_factory=list)  # what was left out of it, a line each
    hash: str | None = field(default=None, init=False, repr=False)  # by common.fingerprint


@dataclass
class Data:
    """The sets of one study. A class *is* its index: two of ImageNet's are named "missile"."""

    kind: str  # "digits", "imagenet", "cifar10", "entity30", "domainnet" or "folder"
    classes: list[str]  # prompt names, in the order of the training labels
    templates: list[str]  # format strings with {}
    train: Split
    val: Split  # in-distribution, for selection
    test: Split  # in-distribution, for reporting; its name is "test"
    shifts: list[Split]
    missing: list[str]  # usual shift sets that were not found
    notes: list[str] = field(default_factory=list)  # what else the user should know, a line each


def did_you_mean(word, known):
    """'; did you mean X?' when a known word is near, else ''."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def find(path):
    """The Data of what --data names; val is None if it has to be held out of train."""
    if path.rstrip("/") == "digits":  # ./digits is a folder
        return open_digits(FOLDER)
    data = open_tree(path)
    splits = (data.train, data.val, data.test, *data.shifts)
    data.notes += [f"{s.name}: {note}" for s in splits if s is not None for note in s.notes]
    return data


def open_tree(path):
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
    prompts, sets = read_json(folder / "prompts.json"), {}
    with np.load(folder / "digits.npz", allow_pickle=False) as arrays:
        for key in arrays:
            name, _, part = key.partition("/")
            if part == "images" and not name.startswith("pretrain"):
                labels = torch.from_numpy(arrays[f"{name}/labels"].astype(np.int64))
                sets[name] = Split(name, f"data/digits.npz:{name}", arrays[key], labels)
    train, val, test = (sets.pop(name) for name in ("train", "val", "test"))
    for shift in sets.values():
        shift.name = "UCI" if shift.name == "uci" else shift.name.replace("_", " ").capitalize()
    classes, templates = prompts["class_names"], prompts["templates"]
    return Data("digits", classes, templates, train, val, test, list(sets.values()), [])


def open_imagenet(root):
    """ImageNet and its five shift sets, looked for in the tree, in `root` and beside the tree.

    The training classes are the wnids in train/, in ImageNet's order. Folders of other classes are
    left out of every set, so that a tree with some of the 1000 classes works.
    """
    from open_clip import IMAGENET_CLASSNAMES

    base, wnids = tree_with_train(root), imagenet_wnids()
    present = subfolders(base / "train")
    if unknown := sorted(set(present) - set(wnids)):
        cure = "move such folders out of the tree"
        raise InputError(f"{base / 'train' / unknown[0]} is none of ImageNet's classes; {cure}.")
    kept = sorted(map(wnids.index, present))
    rank = {i: r for r, i in enumerate(kept)}  # ImageNet's index -> training class
    by_wnid = {wnids[i]: [r] for i, r in rank.items()}

    def split(name, path, expected, ids=by_wnid, **options):
        held = subfolders(path)
        ids = {f: ids[f] for f in ids if ids[f] and f in held}
        expected = expected if len(kept) == 1000 else None
        return class_folders(name, path, ids, expected=expected, **options)

    train = split("train", base / "train", 1_281_167)
    test = split("test", set_folder(base, VAL), 50_000)
    shifts, missing = [], []
    for name, (usual, inside, expected) in IMAGENET_SHIFTS.items():
        path = locate((base, root, base.parent), usual, inside)
        if path is None:
            missing.append(f"{name} (no {usual[0]}/ in {base} or beside it)")
        elif name == "ImageNet-V2":  # folders are class indices: 0, 1, 2, 10 and not 0, 1, 10, 2
            shifts.append(split(name, path, expected, {str(i): [r] for i, r in rank.items()}))
        elif name == "ObjectNet":
            with reading(path, "get ObjectNet's mappings/ again"):
                mapped = objectnet_map(path)
            ids = {f: [rank[i] for i in mapped[f] if i in rank] for f in mapped}
            shifts.append(split(name, path / "images", expected, ids, own=True, border=2))
            if shifts[-1].expected and len(shifts[-1].images) in OBJECTNET_COUNTS:
                shifts[-1].expected = len(shifts[-1].images)
        else:  # -A and -R have 200 classes each, -Sketch has all
            shifts.append(split(name, path, expected, own=name != "ImageNet-Sketch"))
    names = [IMAGENET_CLASSNAMES[i] for i in kept]
    return Data("imagenet", names, clip_templates(), train, None, test, shifts, missing)


def objectnet_map(path):
    """{folder: ImageNet ids} of the 113 of ObjectNet's 313 folders that have a class in ImageNet.

    By the data set's own mappings/: folder -> object; object -> "label; label"; all labels, one a
    line; ImageNet id -> line, counted from 0.
    """
    folder = path / "mappings" if (path / "mappings").is_dir() else path.parent / "mappings"
    objects = read_json(folder / "folder_to_objectnet_label.json")
    shared = read_json(folder / "objectnet_to_imagenet_1k.json")
    line_of = read_json(folder / "pytorch_to_imagenet_2012_id.json")
    labels = folder / "imagenet_to_label_2012_v2"
    labels = read_text(labels if labels.is_file() else labels.with_suffix(".txt")).splitlines()
    ids = {labels[line].strip(): int(i) for i, line in line_of.items()}
    overlap = [f for f in subfolders(path / "images") if objects.get(f) in shared]
    return {f: [ids[label] for label in shared[objects[f]].split("; ")] for f in overlap}


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
            name = f"CIFAR-10.1 {version}"
            with reading(file, f"get it and cifar10.1_{version}_labels.npy again"):
                labels = np.load(file.with_name(f"cifar10.1_{version}_labels.npy"))
                shifts.append(array_split(name, file, np.load(file), labels, expected))
            break
    else:
        missing.append(f"CIFAR-10.1 (no cifar10.1_v6_data.npy in {batches.parent} or CIFAR-10.1/)")
    return Data("cifar10", CIFAR10, clip_templates(), train, None, test, shifts, missing)


def read_batch(path):
    """One pickled batch as uint8 [N, 32, 32, 3] and int64 [N]; runs no code from the file."""
    with reading(path, "unpack cifar-10-python.tar.gz again"):
        batch = pickles.read(path, "bytes")[0]
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), np.array(batch[b"labels"], dtype=np.int64)


def open_stl10(path):
    """STL-10's test images of the 9 classes that CIFAR-10 shares, matched by name: no monkey."""
    if not (path / "test_X.bin").is_file():
        names = {f: "automobile" if f.lower() == "car" else f.lower() for f in subfolders(path)}
        shared = sorted((f for f in names if names[f] in CIFAR10), key=names.get)  # CIFAR's order
        ids = {f: [CIFAR10.index(names[f])] for f in shared}
        return class_folders("STL-10", path, ids, own=True, expected=7_200)
    shared = [name for name in CIFAR10 if name in STL10]
    rank = np.array([shared.index(name) if name in shared else -1 for name in STL10])
    with reading(path, "unpack stl10_binary.tar.gz again"):
        images = np.fromfile(path / "test_X.bin", np.uint8).reshape(-1, 3, 96, 96)
        labels = rank[np.fromfile(path / "test_y.bin", np.uint8) - 1]
        images = images[labels >= 0].transpose(0, 3, 2, 1)  # the file runs down the columns
    groups = [[CIFAR10.index(name)] for name in shared]
    return array_split("STL-10", path, images, labels[labels >= 0], 7_200, groups)


def open_entity30(root):
    """BREEDS Entity-30: ID has the source subclasses, the shift the target ones, of 30 classes."""
    base = tree_with_train(root)
    info = locate((base, root, base.parent), ["imagenet_class_hierarchy"], r"class_hierarchy\.txt")
    if info is None:
        cure = "copy it from the BREEDS-Benchmarks repository"
        raise InputError(f"{base} has no imagenet_class_hierarchy/, there or beside it: {cure}.")
    with reading(info, "copy it from the BREEDS-Benchmarks repository again"):
        names, source, target = entity30_classes(info)

    def split(name, path, subclasses, expected=None):
        ids = {wnid: [i] for i, wnids in enumerate(subclasses) for wnid in wnids}
        return class_folders(name, path, ids, expected=expected)

    val, n = set_folder(base, VAL), 50 * 4 * len(names)  # ImageNet's val has 50 images a class
    train, test = split("train", base / "train", source), split("test", val, source, n)
    shifts = [split("Entity-30 target", val, target, n)]
    return Data("entity30", names, clip_templates(), train, None, test, shifts, [])


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
        cure = f"choose the domain to train on, such as {root}/real with real_train.txt beside it"
        raise InputError(f"{root} looks like DomainNet: {cure}.")
    names, shifts, missing = set(), [], []
    train = domainnet_split("train", root, "train", names)
    test = domainnet_split("test", root, "test", names)
    classes = [name.replace("_", " ") for _, name in sorted(names)]
    for domain in (root.parent / name for name in DOMAINNET if name != root.name):
        if domain.is_dir():
            shifts.append(domainnet_split(domain.name.capitalize(), domain, "test", names))
        else:
            missing.append(f"{domain.name} (no {domain})")
    if sorted(number for number, _ in names) != list(range(len(classes))):
        raise InputError(f"{root.parent}: the lists do not all have the same, numbered classes.")
    return Data("domainnet", classes, clip_templates(), train, None, test, shifts, missing)


def domainnet_split(name, domain, part, names):
    """The Split of a domain's list, lines 'real/axe/1.jpg 9'; adds (9, "axe") to `names`."""
    path = split_file(domain, part)
    if path is None:
        raise InputError(f"{domain} has no {domain.name}_{part}.txt beside it: add it.")
    with reading(path, "expected lines 'real/axe/1.jpg 9'"):
        lines = [line.rsplit(maxsplit=1) for line in read_text(path).splitlines() if line.strip()]
        labels = [int(label) for _, label in lines]
        names.update((int(label), file.split("/")[-2]) for file, label in lines)
    files = [os.path.join(domain.parent, file) for file, _ in lines]
    counts = DOMAINNET[domain.name] if part == "test" else (None,)
    expected = len(files) if len(files) in counts else counts[0]
    return Split(name, str(domain), files, torch.tensor(labels), expected=expected)


def split_file(domain, part):
    """DomainNet's list of a domain's train or test images, beside the domain's folder, or None."""
    name = f"{domain.name}_{part}.txt"
    places = (domain.parent / folder / name for folder in ("", "splits", "text"))
    return next(filter(Path.is_file, places), None)


def open_folder(root):
    """Any tree of class folders with train/ and val/ or test/; other folders that have classes of
    train/ are shifts, and what else there is is named in the notes.
    """
    base = tree_with_train(root)
    parts, classes = subfolders(base), sorted(subfolders(base / "train"), key=by_number)
    test_path = set_folder(base, ("test", *VAL))

    def split(name, path, own=False):
        held = subfolders(path)
        if unknown := [f for f in held if f not in classes]:
            near = did_you_mean(unknown[0], classes)
            raise InputError(f"{path / unknown[0]}: train/ has no such class folder{near}")
        ids = {f: [i] for i, f in enumerate(classes) if f in held}
        return class_folders(name, path, ids, own=own and len(ids) < len(classes))

    train, test, val = split("train", base / "train"), split("test", test_path), None
    if test_path.name == "test" and not set(VAL).isdisjoint(parts):
        val = split("val", set_folder(base, VAL))
    names, templates, notes = names_and_templates(base, classes)
    shifts = []
    for part in parts:
        path = base / part
        if str(path) in (train.path, test.path, val and val.path):
            continue
        if re.fullmatch(NO_SHIFT, part.lower()):
            notes.append(f"left out: {part}/ (by its name a part or a copy of another set)")
        elif set(subfolders(path)).isdisjoint(classes):
            notes.append(f"left out: {part}/ (none of its folders is a class of train/)")
        else:
            shifts.append(split(part, path, own=True))
    return Data("folder", names, templates, train, val, test, shifts, [], notes)


def names_and_templates(base, classes):
    """Prompt names, templates, and notes about names that a text tower cannot know."""

    def lines(name):
        text = read_text(base / name) if (base / name).is_file() else ""
        return [line.strip() for line in text.splitlines() if line.strip()]

    given, notes = lines("classnames.txt"), []
    names = given or [c.replace("_", " ") for c in classes]
    templates = lines("templates.txt") or clip_templates()
    if len(names) != len(classes):
        raise InputError(
            f"{base / 'classnames.txt'} has {len(names)} names for {len(classes)} class folders. "
            f"Write one name a line, in the order of the folders: {listed(classes)}."
        )
    if bad := [template for template in templates if "{}" not in template]:
        raise InputError(f"{base / 'templates.txt'}: {bad[0]!r} lacks {{}} for the name.")
    if given:
        notes.append(f"classnames.txt names the folders in the order {listed(classes)}")
    if wordless := [name for name in names if re.fullmatch(r"[\W\d_]*|n\d{8}", name)]:
        notes.append(
            f"{len(wordless)} class names have no word in them, such as {wordless[0]!r}: write "
            f"{base / 'classnames.txt'}, one name a line, in the order {listed(classes)}"
        )
    return names, templates, notes


# --- what they share ---


def class_folders(name, path, ids, own=False, **options):
    """The Split of the folders in `ids`, {folder: training ids}; `own`: they are its classes.

    Images lie in a class's folder, at any depth. Notes say what was left out.
    """
    from tqdm import tqdm

    if not ids:
        raise InputError(
            f"{path} has no folder of a training class; it holds {listing(path)}. Expected a "
            "folder per class: unpack each archive into one of its name, or sort the images by the "
            "list of labels that came with them (ImageNet's val/ by the script valprep.sh)."
        )
    files, labels, deeper, others = [], [], [], []
    for i, folder in enumerate(tqdm(ids, desc=str(path), delay=2, leave=False)):
        here = os.path.join(path, folder)  # strings: a Path for each of 1.28M images is slow
        found, rest = images_in(here)
        if not found:
            kinds = " ".join(IMAGE_TYPES)
            raise InputError(f"{here} has no images ({kinds}); it holds {listing(here)}.")
        files += found
        labels += [i if own else ids[folder][0]] * len(found)
        deeper += [file for file in found if os.sep in file[len(here) + 1 :]]
        others += [os.path.splitext(file)[1].lower() or file for file in rest]
    groups, notes = list(ids.values()) if own else None, []
    if deeper:
        notes.append(f"{len(deeper):,} images were found in folders below, such as {deeper[0]}")
    if others:
        kinds = listed(sorted(set(others)))
        notes.append(f"{len(others):,} files are left out: they are no images ({kinds})")
    return Split(name, str(path), files, torch.tensor(labels), groups, notes=notes, **options)


def images_in(folder):
    """Paths of the images in a folder and below it, and of all other files there, in order."""
    images, others = [], []
    for name in sorted(names_in(folder)):
        path = folder + os.sep + name
        if name.lower().endswith(IMAGE_TYPES):
            images.append(path)
        elif os.path.isdir(path) and not os.path.islink(path):  # a link may lead in a circle
            below = images_in(path)
            images, others = images + below[0], others + below[1]
        else:
            others.append(path)
    return images, others


def array_split(name, path, images, labels, expected, groups=None):
    """The Split of images, uint8 [N, H, W, 3], and labels [N]."""
    labels = torch.from_numpy(labels.astype(np.int64))
    if len(images) != len(labels):
        raise InputError(f"{path} has {len(images)} images and {len(labels)} labels; get it again.")
    return Split(name, str(path), images, labels, groups, expected=expected)


def imagenet_wnids():
    """The 1000 WordNet ids, in the order of ImageNet's class index."""
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()


def clip_templates():
    """OpenAI's 80 ImageNet prompts, as format strings."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def set_folder(base, names):
    """The first folder of these names that has class folders, or else the first that there is."""
    paths = [base / name for name in names if (base / name).is_dir()]
    if not paths:
        wanted = " or ".join(names)
        raise InputError(f"{base} has no {wanted}; it holds {listing(base)}. Add or rename one.")
    return next(filter(subfolders, paths), paths[0])


def existing_folder(path):
    path = Path(path).expanduser().absolute()
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise InputError(f"{path} is a file, but --data takes a folder: unpack archives.")
    parent = next(filter(os.path.isdir, path.parents))
    near = did_you_mean(path.relative_to(parent).parts[0], ["digits", *names_in(parent)])
    raise InputError(f"{path} does not exist: {parent} holds {listing(parent)}{near}")


def tree_with_train(root):
    """`root`, or the usual subfolder of it, that has train/."""
    for inner in IMAGENET_ROOTS:
        if (root / inner / "train").is_dir():
            return root / inner
    raise InputError(
        f"{root} has no train/; it holds {listing(root)}. Expected ImageNet (train/<wnid>/, "
        "val/<wnid>/), CIFAR-10 (cifar-10-batches-py/), or train/ and val/ with one folder per "
        "class. Unpack archives, join the parts of a set (train.X1, train.X2 ...), rename what is "
        "called otherwise, and of one set of a tree pass the folder above."
    )


def by_number(name):
    """Sort key: 'a2' before 'a10'."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


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
        if plain(name).removesuffix("formatval") == plain(want)  # as V2's archives unpack
    ]
    for folder in named:
        for path in (folder, *(folder / name for name in subfolders(folder))):
            if any(re.fullmatch(inside, entry) for entry in names_in(path)):
                return path
    if named:
        example = {WNID: "folders like n01440764", NUMBER: "folders 0 to 999"}.get(inside, inside)
        found = f"{named[0]} holds {listing(named[0])}"
        raise InputError(f"{found}. Expected {example}, there or one level down; unpack it again.")
    return None


def names_in(path):
    """What a folder holds, without hidden names and what operating systems leave behind."""
    try:
        names = os.listdir(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    return [name for name in names if name[0] != "." and name not in LEFT_BEHIND]


def subfolders(path):
    """Sorted names of the folders in a folder."""
    return sorted(name for name in names_in(path) if os.path.isdir(os.path.join(path, name)))


def plain(name):
    return "".join(c for c in name.lower() if c.isalnum())


def listing(path):
    return listed(sorted(names_in(path))) or "nothing"


def listed(names):
    """'a, b, c, d, e and 3 more'"""
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@contextlib.contextmanager
def reading(path, cure):
    """Whatever goes wrong in the block, a damaged or missing file, is said in one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read ({reason[:120]}): {cure}.") from error


def read_text(path):
    with reading(path, "expected text in UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")  # Notepad begins with a mark


def read_json(path):
    with reading(path, "expected the JSON file that comes with the data set"):
        return json.loads(read_text(path))
