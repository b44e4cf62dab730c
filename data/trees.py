"""Where the public data sets lie on disk, and how their classes map onto the training classes.

`common.open_data` calls `find`, which returns `common.Data`: lists of files and labels, nothing is read yet. The
embedded digits are read here, too. Every error says what was found, what was expected, and the next step.
"""

import codecs
import difflib
import json
import os
import pickle
import re

import numpy as np
import torch

import common

IMAGE_TYPES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WNID = r"n\d{8}"
IMAGENET_ROOTS = ("", "imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
IMAGENET_VAL = ("val_in_folder", "val_dirs", "val")
# In the order of the papers' columns: usual folder names (compared without case and punctuation;
# the first one found is used), what such a folder holds, published number of images.
V2 = ("matched-frequency", "threshold0.7", "top-images")
V2 = [f"imagenetv2-{variant}{tail}" for variant in V2 for tail in ("", "-format-val")]
IMAGENET_SHIFTS = {
    "ImageNet-V2": ([*V2, "imagenetv2"], r"\d{1,3}", 10_000),
    "ImageNet-Sketch": (["imagenet-sketch", "sketch"], WNID, 50_889),
    "ImageNet-A": (["imagenet-a"], WNID, 7_500),
    "ImageNet-R": (["imagenet-r"], WNID, 30_000),
    "ObjectNet": (["objectnet-1.0", "objectnet"], "images", 18_574),
}
OBJECTNET_COUNTS = (18_574, 18_514)  # both are in print for the 113 shared classes; either passes
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
STL10 = "airplane bird automobile cat deer dog horse monkey ship truck".split()  # CIFAR's words


def find(path):
    """Data of what --data names; the folder's kind is recognised from what is in it."""
    if path == "digits":
        return open_digits(str(common.EMBEDDED))
    else:
        root = existing_folder(path.removeprefix("entity30:"))
        batches = [p for p in (os.path.join(root, "cifar-10-batches-py"), root) if has_batches(p)]
        if path.startswith("entity30:"):
            return open_entity30(root, tree_with_train(root))
        elif batches:
            return open_cifar10(batches[0])
        else:
            base = tree_with_train(root)
            names = subfolders(os.path.join(base, "train"))
            # timm and its list of wnids are imported only if the names look like wnids
            known = any(re.fullmatch(WNID, n) for n in names) and set(imagenet_wnids()) & set(names)
            return open_imagenet(root, base) if known else open_folder(base)


def class_folders(name, path, ids, own=False, **options):
    """A Split of the folders in `ids`, {folder: training ids}. `own`: its classes are its folders."""
    from tqdm import tqdm

    if not ids:
        raise common.InputError(
            f"{path} has no folder of a training class: it holds {listing(path)}."
        )
    files, labels = [], []
    for i, folder in enumerate(tqdm(ids, desc=path, delay=2, leave=False)):
        here = os.path.join(path, folder)
        names = [n for n in os.listdir(here) if n.lower().endswith(IMAGE_TYPES) and n[0] != "."]
        if not names:
            raise common.InputError(
                f"{here} has no images: it holds {listing(here)}. Put files ending in one of "
                f"{' '.join(IMAGE_TYPES)} directly into it, or remove the folder."
            )
        files += [os.path.join(here, n) for n in sorted(names)]
        labels += [i if own else ids[folder][0]] * len(names)
    groups = list(ids.values()) if own else None
    return common.Split(name, path, files, torch.tensor(labels), groups, **options)


def open_digits(folder):
    """The embedded digits: `<set>/images` and `<set>/labels` in digits.npz; names in prompts.json."""
    path, sets = os.path.join(folder, "digits.npz"), {}
    prompts = json.loads(read_text(folder, "prompts.json"))
    with np.load(path, allow_pickle=False) as arrays:
        names = [key.split("/")[0] for key in arrays.files if key.endswith("/images")]
        for name in names:  # in file order
            if not name.startswith("pretrain"):
                labels = torch.from_numpy(arrays[f"{name}/labels"].astype(np.int64))
                sets[name] = common.Split(name, f"{path}:{name}", arrays[f"{name}/images"], labels)
    train, val, test = (sets.pop(name) for name in ("train", "val", "test"))
    for shift in sets.values():
        shift.name = "UCI" if shift.name == "uci" else shift.name.replace("_", " ").capitalize()
    names, templates = prompts["class_names"], prompts["templates"]
    return common.Data("digits", names, templates, train, val, test, list(sets.values()), [])


def open_imagenet(root, base):
    """ImageNet and its five shift sets, looked for in the tree `base`, in `root` and beside the tree.

    The training classes are the wnids in train/, in ImageNet's order. Folders of other classes are
    left out of every set, so that a tree with some of the 1000 classes works.
    """
    from open_clip import IMAGENET_CLASSNAMES

    wnids, train_path, val_path = imagenet_wnids(), os.path.join(base, "train"), imagenet_val(base)
    if unknown := sorted(set(subfolders(train_path)) - set(wnids)):
        raise common.InputError(
            f"{train_path}/{unknown[0]} is none of ImageNet's 1000 classes: remove it."
        )
    kept = sorted(map(wnids.index, subfolders(train_path)))
    rank = {wnids[i]: r for r, i in enumerate(kept)}  # wnid -> training class

    def split(name, path, expected, folders=None, **options):  # folders: {folder: its wnids}
        folders = folders or {wnid: [wnid] for wnid in subfolders(path)}
        ids = {f: [rank[w] for w in folders[f] if w in rank] for f in folders}
        expected = expected if len(kept) == 1000 else None
        return class_folders(
            name, path, {f: ids[f] for f in ids if ids[f]}, expected=expected, **options
        )

    train = split("train", train_path, 1_281_167, {wnids[i]: [wnids[i]] for i in kept})
    test = split("test", val_path, 50_000)
    shifts, missing = [], []
    for name, (usual, inside, expected) in IMAGENET_SHIFTS.items():
        path = locate((base, root, os.path.dirname(base)), usual, inside)
        if path is None:
            missing.append(name)
        elif name == "ImageNet-V2":  # folders are class indices: 0, 1, 2, 10 and not 0, 1, 10, 2
            folders = sorted((f for f in subfolders(path) if re.fullmatch(inside, f)), key=int)
            shifts.append(split(name, path, expected, {f: [wnids[int(f)]] for f in folders}))
        elif name == "ObjectNet":
            folders = {f: [wnids[i] for i in ids] for f, ids in objectnet_map(path).items()}
            path = os.path.join(path, "images")
            shifts.append(split(name, path, expected, folders, own=True, border=2))
            if shifts[-1].expected and len(shifts[-1].images) in OBJECTNET_COUNTS:
                shifts[-1].expected = len(shifts[-1].images)
        else:  # -A and -R have 200 classes each, -Sketch has all
            shifts.append(split(name, path, expected, own=name != "ImageNet-Sketch"))
    names = [IMAGENET_CLASSNAMES[i] for i in kept]
    return common.Data("imagenet", names, clip_templates(), train, None, test, shifts, missing)


def objectnet_map(path):
    """{folder: ImageNet ids} of the 113 of ObjectNet's 313 folders that have a class in ImageNet.

    From the data set's own mappings/: folder -> object; object -> "label; label"; the labels by
    line; ImageNet id -> line, from 0.
    """
    below = os.path.join(path, "mappings")
    below = below if os.path.isdir(below) else os.path.join(os.path.dirname(path), "mappings")
    objects = json.loads(read_text(below, "folder_to_objectnet_label.json"))
    shared = json.loads(read_text(below, "objectnet_to_imagenet_1k.json"))
    line = {
        n: int(i)
        for i, n in json.loads(read_text(below, "pytorch_to_imagenet_2012_id.json")).items()
    }
    text = "imagenet_to_label_2012_v2"
    text += ".txt" if os.path.isfile(os.path.join(below, text + ".txt")) else ""
    labels = enumerate(read_text(below, text).splitlines())
    ids = {label.strip(): line[n] for n, label in labels if n in line}
    folders = [f for f in subfolders(os.path.join(path, "images")) if objects.get(f) in shared]
    return {f: [ids[label] for label in shared[objects[f]].split("; ")] for f in folders}


def open_cifar10(batches):
    """CIFAR-10's python batches; STL-10 and CIFAR-10.1 in the same folder or beside it."""
    parts = [read_batch(os.path.join(batches, f"data_batch_{i}")) for i in range(1, 6)]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    train = common.Split("train", batches, images, torch.from_numpy(labels), expected=50_000)
    images, labels = read_batch(os.path.join(batches, "test_batch"))
    test = common.Split("test", batches, images, torch.from_numpy(labels), expected=10_000)
    places, shifts, missing = (batches, os.path.dirname(batches)), [], []
    if path := locate(places, ("stl10", "stl10_binary"), r"airplane|test_X\.bin"):
        shifts.append(open_stl10(path))
    else:
        missing.append("STL-10")
    folders = [
        os.path.join(p, f) for p in places for f in ("", "CIFAR-10.1", "CIFAR-10.1/datasets")
    ]
    for version, expected in (("v6", 2_000), ("v4", 2_021)):  # v6 is the one to use if both exist
        files = [os.path.join(f, f"cifar10.1_{version}_data.npy") for f in folders]
        if file := next(filter(os.path.isfile, files), None):
            images, labels = (
                np.load(f, allow_pickle=False) for f in (file, file.replace("_data.", "_labels."))
            )
            labels = torch.from_numpy(labels.astype(np.int64))
            shifts.append(
                common.Split(f"CIFAR-10.1 {version}", file, images, labels, expected=expected)
            )
            break
    else:
        missing.append("CIFAR-10.1")
    return common.Data("cifar10", CIFAR10, clip_templates(), train, None, test, shifts, missing)


def has_batches(path):
    return os.path.isfile(os.path.join(path, "data_batch_1"))


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
            f"{path} is not a batch of CIFAR-10's python version ({error!r}). Unpack it again from "
            "cifar-10-python.tar.gz."
        ) from error


def open_stl10(path):
    """STL-10's test images of the 9 classes that CIFAR-10 shares, matched by name: no monkey."""
    if not os.path.isfile(os.path.join(path, "test_X.bin")):
        names = {f: "automobile" if f.lower() == "car" else f.lower() for f in subfolders(path)}
        if unknown := [f for f in names if names[f] not in STL10]:
            raise common.InputError(
                f"{path}/{unknown[0]} is no class of STL-10. Rename or remove it."
            )
        folders = [f for f in names if names[f] in CIFAR10]
        ids = {f: [CIFAR10.index(names[f])] for f in sorted(folders, key=lambda f: names[f])}
        return class_folders("STL-10", path, ids, own=True, expected=7_200)
    images = np.fromfile(os.path.join(path, "test_X.bin"), np.uint8)
    images = images.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # columns come first in the file
    given = np.fromfile(os.path.join(path, "test_y.bin"), np.uint8) - 1
    shared = [name for name in CIFAR10 if name in STL10]
    label = np.array([shared.index(name) if name in shared else -1 for name in STL10])[given]
    groups, keep = [[CIFAR10.index(name)] for name in shared], label >= 0
    labels = torch.from_numpy(label[keep])
    return common.Split("STL-10", path, images[keep], labels, groups, expected=7_200)


def open_entity30(root, base):
    """BREEDS Entity-30: ID = source subclasses, shift = target subclasses of the same superclasses."""
    places = (base, root, os.path.dirname(base))
    info = locate(places, ["imagenet_class_hierarchy"], r"class_hierarchy\.txt")
    if info is None:
        raise common.InputError(
            f"{base}/imagenet_class_hierarchy/modified/ is missing, there and beside the tree. It "
            "comes with the BREEDS-Benchmarks repository: copy it from there."
        )
    names, source, target = entity30_classes(info)

    def split(name, path, subclasses, expected=None):
        ids = {wnid: [i] for i, wnids in enumerate(subclasses) for wnid in wnids}
        if absent := sorted(set(ids) - set(subfolders(path))):
            raise common.InputError(
                f"{path} has no folder {absent[0]}, which Entity-30 needs: add it."
            )
        return class_folders(name, path, ids, expected=expected)

    val, n = imagenet_val(base), 50 * 4 * len(names)  # ImageNet's val has 50 images a class
    train, test = split("train", os.path.join(base, "train"), source), split("test", val, source, n)
    shifts = [split("Entity-30 target", val, target, n)]
    return common.Data("entity30", names, clip_templates(), train, None, test, shifts, [])


def entity30_classes(folder):
    """Names of the superclasses, and the four source and four target wnids of each.

    BREEDS, split "rand": nodes at depth 4 (longest path from the root) with at least 8 ImageNet
    classes below them, in order of their ids; one RandomState(2) draws 8 classes of each, the first
    four for the source. The draws equal the reference package's (robustness 1.2.1) on random trees.
    """
    classes = {row[1] for row in json.loads(read_text(folder, "dataset_class_info.json"))}
    titles = dict(row.split("\t")[:2] for row in read_text(folder, "node_names.txt").splitlines())
    children = {}
    for row in read_text(folder, "class_hierarchy.txt").splitlines():
        parent, child = row.split()
        children.setdefault(parent, []).append(child)

    def leaves(node):  # the ImageNet classes at or below a node
        below = (leaves(child) for child in children.get(node, ()))
        return ({node} & classes).union(*below)

    depth, level = {}, {"n00001740"}  # WordNet's root
    for d in range(len(children)):  # the last visit of a node came by its longest path
        depth.update(dict.fromkeys(level, d))
        level = {c for node in level for c in children.get(node, ()) if leaves(c)}
    nodes = sorted(node for node in depth if depth[node] == 4 and len(leaves(node)) >= 8)
    rng = np.random.RandomState(2)
    drawn = [rng.choice(sorted(leaves(node)), 8, replace=False).tolist() for node in nodes]
    return [titles.get(n, n) for n in nodes], [d[:4] for d in drawn], [d[4:] for d in drawn]


def open_folder(base):
    """Any tree of class folders with train/ and val/ or test/; every other folder is a shift."""
    parts, classes = subfolders(base), subfolders(os.path.join(base, "train"))
    test_name = "test" if "test" in parts else "val"
    if test_name not in parts:
        raise common.InputError(
            f"{base} has train/, but neither val/ nor test/. {rename('val', parts)}"
        )

    def split(name, own=False):
        path = os.path.join(base, name)
        folders = subfolders(path)
        if unknown := [f for f in folders if f not in classes]:
            hint = rename(unknown[0], classes, "the class")
            raise common.InputError(f"{path}/{unknown[0]}: train/ has no such class folder. {hint}")
        ids = {f: [classes.index(f)] for f in folders}
        return class_folders(name, path, ids, own=own and folders != classes)

    def lines(name, default):
        exists = os.path.isfile(os.path.join(base, name))
        return (
            [s.strip() for s in read_text(base, name).splitlines() if s.strip()]
            if exists
            else default
        )

    names = lines("classnames.txt", [c.replace("_", " ") for c in classes])
    templates = lines("templates.txt", None) or clip_templates()
    if len(names) != len(classes):
        raise common.InputError(
            f"{base}/classnames.txt has {len(names)} lines for {len(classes)} class folders. Write "
            "one name per line, in the sorted order of train/'s folders."
        )
    if bad := [t for t in templates if "{}" not in t]:
        raise common.InputError(
            f"{base}/templates.txt: {bad[0]!r} lacks the {{}} for the class name."
        )
    val = split("val") if test_name == "test" and "val" in parts else None
    shifts = [split(name, own=True) for name in parts if name not in ("train", "val", "test")]
    return common.Data(
        "folder", names, templates, split("train"), val, split(test_name), shifts, []
    )


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
    paths = [os.path.join(base, name) for name in IMAGENET_VAL]
    paths = [path for path in paths if os.path.isdir(path)]
    if not paths:
        raise common.InputError(
            f"{base} has train/, but no val/. {rename('val', subfolders(base))}"
        )
    if sorted_into_classes := [path for path in paths if subfolders(path)]:
        return sorted_into_classes[0]
    raise common.InputError(
        f"{paths[0]} is flat: {len(os.listdir(paths[0])):,} files and no class folders. Expected "
        "val/<wnid>/*.JPEG, as in train/. ImageNet's own archive is flat; sort it once, with either\n"
        "  Kaggle's list, in val/:  tail -n +2 LOC_val_solution.csv | while IFS=', ' read f w _; do "
        "mkdir -p $w && mv $f.JPEG $w/; done\n"
        "  or torchvision, in a folder with ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz:"
        "  python -c \"import torchvision; torchvision.datasets.ImageNet('.', 'val')\"\n"
        "  or the well-known valprep.sh, in val/"
    )


def existing_folder(path):
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise common.InputError(
            f"{path} is a file, --data takes a folder. Unpack it if it is an archive."
        )
    parent, child = os.path.split(path)
    while not os.path.isdir(parent):
        parent, child = os.path.split(parent)
    near = difflib.get_close_matches(child, ["digits", *os.listdir(parent)], 1)
    hint = f"Did you mean {near[0]}?" if near else f"It holds {listing(parent)}."
    raise common.InputError(f"{path} does not exist: there is no {child!r} in {parent}. {hint}")


def tree_with_train(root):
    """`root`, or the usual subfolder of it, that has train/."""
    for inner in IMAGENET_ROOTS:
        if os.path.isdir(os.path.join(root, inner, "train")):
            return os.path.normpath(os.path.join(root, inner))
    names = subfolders(root)
    if os.path.basename(root) == "train" or any(re.fullmatch(WNID, name) for name in names):
        hint = f"It looks like one set of a tree: pass the folder above, {os.path.dirname(root)}."
    elif os.path.isfile(os.path.join(root, "cifar-10-python.tar.gz")):
        hint = "Unpack CIFAR-10 first: tar -xzf cifar-10-python.tar.gz"
    else:
        hint = rename("train", names)
    raise common.InputError(
        f"{root} has no train/: it holds {listing(root)}. Expected ImageNet (train/<wnid>/, "
        "val/<wnid>/), CIFAR-10 (cifar-10-batches-py/), or train/ and val/ with one folder per "
        f"class. {hint}"
    )


def locate(places, usual, inside):
    """The first folder of a usual name that has an entry like `inside`, itself or one level down.

    One level down: the authors' READMEs make X/X, and ObjectNet and V2 are often kept in a parent.
    """
    near = None
    for want in map(plain, usual):
        for place in places:
            for name in (n for n in subfolders(place) if plain(n) == want):
                near = os.path.join(place, name)
                for path in (near, *(os.path.join(near, below) for below in subfolders(near))):
                    if any(re.fullmatch(inside, entry) for entry in os.listdir(path)):
                        return path
    if near:
        raise common.InputError(
            f"{near} holds {listing(near)}. Expected entries like {inside!r}, there or one level "
            "down: unpack the archive again, or rename the folder if it is another data set."
        )
    return None


def subfolders(path):
    """Sorted names of the folders in `path`, without hidden ones and `__MACOSX`."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.name[0] not in "._" and os.path.isdir(e.path))


def plain(name):
    return "".join(c for c in name.lower() if c.isalnum())


def listing(path):
    names = sorted(os.listdir(path))
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more or "nothing"


def rename(wanted, names, what="it"):
    near = difflib.get_close_matches(wanted, set(names) - {"train"}, 1, 0.45)
    return f"If {near[0]!r} is {what}, rename it." if near else "Add it."


def read_text(folder, name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise common.InputError(
            f"{folder} has no {name}, which belongs to the data set: restore it."
        ) from None
