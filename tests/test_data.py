"""Data: small trees in the real layout of every data set, read by the code that reads those; the
embedded digits.
"""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch

import common
from data import trees

FOUR = ("n01440764", "n01443537", "n01484850", "n01491361")  # ImageNet 0, 1, 2, 3
TENCH, GOLDFISH, SHARK, TIGER = FOUR
PNG = b"not decoded here"


def put(root, folders, n=1, form="{}.png"):
    """n images in each of the folders under root."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / folder / form.format(i)).write_bytes(PNG)


def imagenet(root, wnids=FOUR):
    put(root / "train", wnids, 4)
    put(root / "val", wnids)
    return str(root)


def folders_of(split):
    return [os.path.basename(os.path.dirname(file)) for file in split.images]


def fails_with(path, *words, **options):
    """Opening fails with a sentence that has all the words."""
    with pytest.raises(common.InputError) as caught:
        common.open_data(str(path), **options)
    for word in words:
        assert str(word) in str(caught.value)


# projection


def test_projection_takes_the_max_over_each_group():
    logits = torch.tensor([[5.0, 1.0, 9.0, 2.0, -3.0], [0.0, 7.0, 1.0, 8.0, 4.0]])
    ours = common.project(logits, [[3], [0, 1], [4, 2, 0]])
    assert ours.tolist() == [[2.0, 5.0, 9.0], [8.0, 7.0, 4.0]]
    assert torch.equal(common.project(logits, [[4], [0]]), logits[:, [4, 0]])
    assert common.project(logits, None) is logits


# ImageNet and its shifts


def test_classes_are_the_folders_of_train_in_the_order_of_imagenet(tmp_path):
    data = common.open_data(imagenet(tmp_path))
    assert data.kind == "imagenet" and data.templates[0] == "a bad photo of a {}."
    assert data.classes == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert data.test.labels.tolist() == [0, 1, 2, 3] and data.test.groups is None


def test_classes_that_share_a_name_keep_separate_indices(tmp_path):
    wnids = trees.imagenet_wnids()
    put(tmp_path / "imagenet-r", [wnids[744], wnids[836]])
    data = common.open_data(imagenet(tmp_path, [wnids[i] for i in (657, 744, 836, 837)]))
    assert data.classes == ["missile", "missile", "sunglasses", "sunglasses"]
    assert data.test.labels.tolist() == [0, 1, 2, 3] and data.shifts[0].groups == [[1], [2]]


@pytest.mark.parametrize(
    ("folder", "inside", "groups", "labels"),
    [
        ("imagenetv2-matched-frequency-format-val", "0 1 2 3 999", None, [0, 1, 2, 3]),
        ("ImageNetV2-matched-frequency", "0 1 2 3", None, [0, 1, 2, 3]),
        ("imagenetv2-threshold0.7", "0 1 2 3", None, [0, 1, 2, 3]),
        ("imagenetv2/imagenetv2-top-images-format-val", "0 1 2 3", None, [0, 1, 2, 3]),
        ("imagenet-sketch", f"{SHARK} {TENCH}", None, [0, 2]),
        ("sketch/sketch", f"{SHARK} {TENCH}", None, [0, 2]),
        ("imagenet-a", f"{TIGER} {GOLDFISH}", [[1], [3]], [0, 1]),
        ("ImageNet_R/imagenet-r", f"{TIGER} {GOLDFISH}", [[1], [3]], [0, 1]),
    ],
)
def test_shift_sets_are_found_by_their_usual_names(folder, inside, groups, labels, tmp_path):
    put(tmp_path / folder, inside.split())
    (shift,) = common.open_data(imagenet(tmp_path)).shifts
    assert shift.path == str(tmp_path / folder)
    assert shift.groups == groups and shift.labels.tolist() == labels


def test_v2_folders_are_numbers_and_matched_frequency_is_preferred(tmp_path):
    wnids = trees.imagenet_wnids()
    imagenet(tmp_path, [wnids[i] for i in (0, 1, 2, 10)])
    for variant in ("top-images", "threshold0.7", "matched-frequency"):
        put(tmp_path / f"imagenetv2-{variant}", ["0", "1", "2", "10"])
    (v2,) = common.open_data(str(tmp_path)).shifts
    assert v2.path == str(tmp_path / "imagenetv2-matched-frequency")
    assert folders_of(v2) == ["0", "1", "2", "10"] and v2.labels.tolist() == [0, 1, 2, 3]


def test_shift_sets_are_found_beside_the_tree_and_in_a_folder_above_it(tmp_path):
    imagenet(tmp_path / "imagenet")
    put(tmp_path / "imagenet-r", [TENCH])
    put(tmp_path / "imagenet" / "imagenet-a", [TENCH])
    for path in (tmp_path, tmp_path / "imagenet"):
        assert [s.name for s in common.open_data(str(path)).shifts] == ["ImageNet-A", "ImageNet-R"]


def objectnet(root, mappings=None, text=""):
    """Tench and tiger shark are ids of one object; the goldfish has its own; a fork has none."""
    put(root / "images", ["fish_big", "aquarium", "fork"], 2)
    mappings = mappings or root / "mappings"
    mappings.mkdir(parents=True)
    files = {
        "folder_to_objectnet_label.json": {"fish_big": "Fish", "aquarium": "Bowl", "fork": "Fork"},
        "objectnet_to_imagenet_1k.json": {"Fish": "tiger; tench, Tinca", "Bowl": "goldfish"},
        # labels stand in their file in another order than ImageNet's classes, as in the real one
        "pytorch_to_imagenet_2012_id.json": {"0": 3, "1": 2, "2": 1, "3": 0},
    }
    for name, content in files.items():
        (mappings / name).write_text(json.dumps(content))
    labels = mappings / f"imagenet_to_label_2012_v2{text}"
    labels.write_text("tiger\nshark\ngoldfish\ntench, Tinca\n")


@pytest.mark.parametrize(
    ("inner", "above", "text"),
    [("", False, ""), ("", False, ".txt"), ("objectnet-1.0", False, ""), ("objectnet", True, "")],
)
def test_objectnet_maps_its_folders_through_the_files_that_come_with_it(
    inner, above, text, tmp_path
):
    root = tmp_path / "objectnet-1.0"
    objectnet(root / inner, root / "mappings" if above else None, text)
    (shift,) = common.open_data(imagenet(tmp_path)).shifts
    assert shift.groups == [[1], [3, 0]]  # in the order of the folders: aquarium, fish_big
    assert shift.labels.tolist() == [0, 0, 1, 1] and shift.border == 2
    assert folders_of(shift) == ["aquarium"] * 2 + ["fish_big"] * 2  # no fork: ImageNet has none


def test_a_training_set_with_some_classes_restricts_the_groups_of_objectnet(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    (shift,) = common.open_data(imagenet(tmp_path, [TENCH, SHARK])).shifts
    assert shift.groups == [[0]] and folders_of(shift) == ["fish_big"] * 2


def test_the_table_has_a_row_per_set_and_names_what_is_missing(tmp_path):
    put(tmp_path / "imagenet-r", [TENCH, SHARK], 3)
    data = common.open_data(imagenet(tmp_path))
    table = common.describe(data)
    (row,) = (line for line in table.splitlines() if line.startswith("ImageNet-R"))
    assert row.split() == ["ImageNet-R", "6", "2", "-", str(tmp_path / "imagenet-r")]
    assert "WARNING" not in table and "4 of ImageNet's 1000 classes" in table
    assert len(data.missing) == 4
    for name in ("ImageNet-V2", "ImageNet-Sketch", "ImageNet-A", "ObjectNet (no objectnet-1.0/"):
        assert f"MISSING, so not evaluated: {name}" in table


def test_a_mapping_of_objectnet_that_is_damaged_or_of_other_files_is_named(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    imagenet(tmp_path)
    mapping = tmp_path / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json"
    mapping.write_text('{"Bowl"')
    fails_with(tmp_path, f"{mapping} cannot be read", "JSON")
    mapping.write_text('{"Bowl": "x"}')
    fails_with(tmp_path, "mappings/", "again")


def test_all_1000_classes_have_counts_and_a_and_r_the_papers_classes(tmp_path, monkeypatch):
    from importlib.resources import files

    lists = files("timm.data._info")
    put(tmp_path / "train", trees.imagenet_wnids())
    put(tmp_path / "val", trees.imagenet_wnids())
    for name in "ar":
        wnids = lists.joinpath(f"imagenet_{name}_synsets.txt").read_text().split()
        put(tmp_path / f"imagenet-{name}", wnids)
    objectnet(tmp_path / "objectnet-1.0")
    data = common.open_data(str(tmp_path), selection="code")
    a, r, _ = data.shifts
    first = [6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70]
    assert len(a.groups) == 200 and [g[0] for g in a.groups[:16]] == first
    first = [1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63]
    assert len(r.groups) == 200 and [g[0] for g in r.groups[:16]] == first
    assert a.labels.tolist() == list(range(200))
    assert [s.expected for s in data.shifts] == [7_500, 30_000, 18_574]
    table = common.describe(data)
    assert "WARNING: test has 1,000 images where 50,000 are expected (49,000 missing)" in table
    assert "val is the test set" in table and "WARNING: ObjectNet" in table
    assert trees.OBJECTNET_COUNTS == (18_574, 18_514)  # both are in print, and either passes
    monkeypatch.setattr(trees, "OBJECTNET_COUNTS", (18_574, 4))
    data = common.open_data(str(tmp_path), selection="code")
    assert "WARNING: ObjectNet" not in common.describe(data)


def test_sorted_folders_beside_a_flat_val_are_preferred(tmp_path):
    put(tmp_path / "train", FOUR, 2)
    put(tmp_path, ["val"], 8)
    put(tmp_path / "val_in_folder", FOUR)
    assert common.open_data(str(tmp_path)).test.path == str(tmp_path / "val_in_folder")


# CIFAR-10


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is how CIFAR-10 was pickled."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch[str] = dispatch[bytes] = save_str


def cifar(root):
    folder = root / "cifar-10-batches-py"
    os.makedirs(folder)
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.zeros((10, 3072), np.uint8)
        rows[:, 0] = np.arange(10) + 10 * b  # red of the top left pixel
        rows[:, 1024 + 32] = 7  # green of the first pixel in the second row
        buffer = io.BytesIO()
        Python2(buffer, 2).dump({b"data": rows, b"labels": list(range(10)), b"batch_label": b"x"})
        data = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(data)
    return root


def test_cifar_batches_are_read_in_order_as_rows_of_pixels(tmp_path):
    data = common.open_data(str(cifar(tmp_path)), selection="code")
    assert data.kind == "cifar10" and data.classes[6] == "frog"
    assert data.train.images.shape == (50, 32, 32, 3)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(50))
    assert (data.train.images[:, 1, 0, 1] == 7).all()
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test.labels.tolist() == list(range(10)) and data.test.expected == 10_000
    assert [name.split(" (")[0] for name in data.missing] == ["STL-10", "CIFAR-10.1"]


STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
WITHOUT_FROG = [[0], [1], [2], [3], [4], [5], [7], [8], [9]]


def test_stl_folders_are_matched_by_name_and_not_by_sort_order(tmp_path):
    put(cifar(tmp_path) / "stl10" / "test", STL)
    (stl,) = common.open_data(str(tmp_path / "cifar-10-batches-py")).shifts
    assert stl.groups == WITHOUT_FROG and stl.labels.tolist() == list(range(9))
    order = ["airplane", "car", "bird", "cat", "deer", "dog", "horse", "ship", "truck"]
    assert folders_of(stl) == order and stl.expected == 7_200


def test_stl_binary_gives_upright_images_of_the_shared_classes(tmp_path):
    os.makedirs(cifar(tmp_path) / "stl10_binary")
    images = np.zeros((10, 3, 96, 96), np.uint8)
    images[:, 0, 5, 2] = 10 * np.arange(10)  # the file runs down the columns: column 5, row 2
    images.tofile(tmp_path / "stl10_binary" / "test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(tmp_path / "stl10_binary" / "test_y.bin")
    (stl,) = common.open_data(str(tmp_path)).shifts
    assert stl.groups == WITHOUT_FROG and stl.images.shape == (9, 96, 96, 3)
    assert stl.images[:, 2, 5, 0].tolist() == [0, 10, 20, 30, 40, 50, 60, 80, 90]  # no monkey
    assert stl.labels.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8]  # bird before car in STL's order


@pytest.mark.parametrize(
    ("folder", "versions", "used"),
    [("", "v4", "v4"), ("CIFAR-10.1", "v6", "v6"), ("CIFAR-10.1/datasets", "v4 v6", "v6")],
)
def test_cifar_10_1_is_found_in_either_version(tmp_path, folder, versions, used):
    os.makedirs(cifar(tmp_path) / folder, exist_ok=True)
    for v in versions.split():
        np.save(tmp_path / folder / f"cifar10.1_{v}_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
        np.save(tmp_path / folder / f"cifar10.1_{v}_labels.npy", np.array([3, 0, 9], np.int32))
    (shift,) = common.open_data(str(tmp_path)).shifts
    assert shift.name == f"CIFAR-10.1 {used}" and shift.labels.tolist() == [3, 0, 9]
    assert shift.labels.dtype == torch.int64 and shift.groups is None
    assert shift.expected == {"v4": 2_021, "v6": 2_000}[used]


HOSTILE = b"cos\nsystem\n(S'touch executed'\ntR."  # runs the command if pickle.load reads it


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cifar-10-batches-py/data_batch_3", b"\x80cut off", "unpack cifar-10-python.tar.gz again"),
        ("cifar-10-batches-py/data_batch_3", HOSTILE, "unpack cifar-10-python.tar.gz again"),
        ("stl10_binary/test_y.bin", bytes(9), "unpack stl10_binary.tar.gz again"),  # of 10 images
        ("stl10_binary/test_y.bin", bytes(10), "unpack stl10_binary.tar.gz again"),  # from 1 on
        ("cifar10.1_v6_data.npy", b"\x93NUMPY cut off", "get it and cifar10.1_v6_labels.npy again"),
    ],
)
def test_a_damaged_file_is_named_with_the_archive_to_unpack(
    name, content, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = cifar(tmp_path) / name
    path.parent.mkdir(exist_ok=True)
    np.zeros((10, 3, 96, 96), np.uint8).tofile(path.parent / "test_X.bin")
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(10))
    path.write_bytes(content)
    fails_with(tmp_path, name.split("/")[0], words)
    assert not os.path.exists("executed")


# Entity-30


def hierarchy(root):
    """Two superclasses at depth 4, one of them by its longest path; n5 is too small."""
    wnids = trees.imagenet_wnids()
    groups = {"n3": wnids[0:9], "n7": wnids[100:110], "n5": wnids[200:207]}
    edges = [("n00001740", "a"), ("a", "b"), ("b", "c"), ("c", "n7"), ("c", "n5"), ("n7", "dummy1")]
    edges += [("b", "n3"), ("c", "n3"), ("c", "barren")]  # n3: depth 3 by b, depth 4 by c
    edges += [("dummy1" if p == "n7" else p, w) for p, ws in groups.items() for w in ws]
    folder = root / "imagenet_class_hierarchy" / "modified"
    os.makedirs(folder)
    (folder / "class_hierarchy.txt").write_text("".join(f"{p} {c}\n" for p, c in edges))
    (folder / "node_names.txt").write_text("n3\tbig fish\nn7\tlittle bird\nn5\tsmall\n")
    info = [[i, w, f"name {i}"] for i, w in enumerate(wnids)]
    (folder / "dataset_class_info.json").write_text(json.dumps(info))
    return groups


def test_entity30_draws_what_the_reference_package_draws_from_an_imagenet_tree(tmp_path):
    """The ids below were printed by robustness 1.2.1 on this hierarchy."""
    groups, index = hierarchy(tmp_path), trees.imagenet_wnids().index
    imagenet(tmp_path / "imagenet", [w for g in groups.values() for w in g])
    data = common.open_data(f"entity30:{tmp_path / 'imagenet'}", selection="code")
    assert data.kind == "entity30" and data.classes == ["big fish", "little bird"]
    (shift,) = data.shifts
    assert [index(w) for w in folders_of(data.test)] == [4, 1, 6, 2, 108, 104, 106, 100]
    assert [index(w) for w in folders_of(shift)] == [3, 0, 5, 7, 109, 105, 103, 107]
    assert data.test.labels.tolist() == shift.labels.tolist() == [0] * 4 + [1] * 4
    assert data.train.labels.tolist() == [0] * 16 + [1] * 16
    assert set(folders_of(data.test)) == set(folders_of(data.train))


def test_entity30_without_its_hierarchy_says_so(tmp_path):
    fails_with(f"entity30:{imagenet(tmp_path)}", "imagenet_class_hierarchy/", "BREEDS-Benchmarks")
    hierarchy(tmp_path)
    (tmp_path / "imagenet_class_hierarchy/modified/class_hierarchy.txt").write_text("n1\n")
    fails_with(f"entity30:{tmp_path}", "class_hierarchy", "BREEDS-Benchmarks repository again")


# DomainNet


def domainnet(root, domains=("clipart", "real", "sketch"), n=10, lists="{}_{}.txt"):
    """Three classes; n images of each, of which 3 are in the test list. Class 1 is "t-shirt"."""
    classes = ("The_Eiffel_Tower", "t-shirt", "axe")
    for domain in domains:
        put(root / domain, classes, n, form=domain + "_{}.png")
        rows = {"train": [], "test": []}
        for c, name in enumerate(classes):
            for i in range(n):
                part = "test" if i < 3 else "train"
                rows[part].append(f"{domain}/{name}/{domain}_{i}.png {c}\n")
        for part, lines in rows.items():
            path = root / lists.format(domain, part)
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(lines))
    return root


@pytest.mark.parametrize("lists", ["{}_{}.txt", "splits/{}_{}.txt"])
def test_every_domain_of_domainnet_can_be_at_home(tmp_path, lists):
    domainnet(tmp_path, lists=lists)
    for home, away in (("real", ["Clipart", "Sketch"]), ("sketch", ["Clipart", "Real"])):
        data = common.open_data(str(tmp_path / home), val_fraction=0.3)
        assert data.kind == "domainnet" and data.classes == ["The Eiffel Tower", "t-shirt", "axe"]
        assert [s.name for s in data.shifts] == away
        sizes = [len(s.images) for s in (data.train, data.val, data.test, *data.shifts)]
        assert sizes == [15, 6, 9, 9, 9] and all(f"/{home}/" in f for f in data.train.images)
        assert data.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
        assert data.test.images[0].endswith(f"{home}_0.png")
    assert [m.split()[0] for m in data.missing] == ["painting", "quickdraw"]
    assert (data.train.expected, data.test.expected) == (None, 21_271)
    assert "9 images where 14,814" in common.describe(data)


def test_domainnet_without_a_domain_or_a_list_or_with_other_classes_says_so(tmp_path):
    domainnet(tmp_path)
    fails_with(tmp_path, "looks like DomainNet", "choose the domain to train on", "/real")
    for line in ("clipart/axe/clipart_0.png 1\n", "clipart/zebra/clipart_0.png 3\n"):
        (tmp_path / "clipart_test.txt").write_text(line)
        fails_with(tmp_path / "sketch", "lists do not all have the same, numbered classes")
    (tmp_path / "clipart_test.txt").unlink()
    fails_with(tmp_path / "sketch", "has no clipart_test.txt beside it")


# any folder


def plant(root, folders, files=None):
    """Images in 'train/a*3' (three) and 'val/a' (one); and other files, {name: bytes or text}."""
    for word in folders.split():
        folder, _, n = word.partition("*")
        put(root, [folder], int(n or 1))
    for name, content in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_other_folders_of_a_tree_are_its_shifts(tmp_path):
    plant(tmp_path, "train/a*4 train/b*4 train/c*4 val/a*4 val/b*4 val/c*4 rain/c*4 rain/a*4")
    put(tmp_path / "fog", "abc", 4)
    data = common.open_data(str(tmp_path), val_fraction=0.25)
    assert data.kind == "folder" and data.classes == ["a", "b", "c"] and data.notes == []
    fog, rain = data.shifts
    assert fog.groups is None and fog.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rain.groups == [[0], [2]] and rain.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.path.endswith("val") and len(data.val.images) == 3


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_a_validation_set_is_one_under_each_of_its_names_and_never_a_shift(name, tmp_path):
    plant(tmp_path, f"train/a*5 train/b*5 {name}/a {name}/b")
    data = common.open_data(str(tmp_path))
    assert data.test.path == str(tmp_path / name) and data.shifts == []
    assert len(data.train.images) == 8  # two are held out
    plant(tmp_path, "test/a test/b")
    data = common.open_data(str(tmp_path))
    assert data.val.path == str(tmp_path / name) and data.shifts == [] and data.notes == []
    assert data.test.path == str(tmp_path / "test") and len(data.train.images) == 10


TWO = "train/cat*2 train/dog*2 val/cat val/dog "
IMAGENET = f"train/{TENCH}*2 val/{TENCH} "


@pytest.mark.parametrize(
    ("folders", "files", "note"),
    [
        ("results/cache results/checkpoints", {}, "left out: results/ (none of its folders is a"),
        ("", {"logs/a.txt": ""}, "left out: logs/ (none of its folders"),
        ("train_backup/cat", {}, "left out: train_backup/ (by its name a part or a copy"),
        ("train2/cat", {}, "left out: train2/ (by its name"),
        ("old_backup/cat", {}, "left out: old_backup/ (by its name"),
        ("valid/cat", {}, "left out: valid/ (by its name"),
        ("train/cat/more*8", {}, "train: 8 images were found in folders below, such as"),
        ("", {"val/cat/b.heic": ""}, "test: 1 files are left out: they are no images (.heic)"),
        ("train/3 val/3", {}, "1 class names have no word in them, such as '3': write"),
    ],
)
def test_what_is_left_out_or_odd_is_named_under_the_table(folders, files, note, tmp_path):
    data = common.open_data(str(plant(tmp_path, TWO + folders, files)))
    assert data.shifts == [] and note in common.describe(data)


def test_images_one_folder_deeper_and_of_other_suffixes_are_taken_in_sorted_order(tmp_path):
    plant(tmp_path, "train/cat/images*11 train/dog*2 val/cat val/dog")
    for name in ("b.JFIF", "c.avif", "d.webp", "e.jp2"):
        (tmp_path / "train/dog" / name).write_bytes(PNG)
    data = common.open_data(str(tmp_path), selection="code")
    assert data.train.labels.tolist() == [0] * 11 + [1] * 6
    assert data.train.images == sorted(data.train.images)


def test_numbered_class_folders_are_sorted_as_numbers(tmp_path):
    numbers = [str(i) for i in range(12)]
    put(tmp_path / "train", numbers, 2)
    put(tmp_path / "val", numbers)
    put(tmp_path / "fog", ["10", "2"])
    (tmp_path / "classnames.txt").write_text("".join(f"name {i}\n" for i in numbers))
    data = common.open_data(str(tmp_path))
    assert data.classes == [f"name {i}" for i in numbers]
    assert folders_of(data.test) == numbers and data.test.labels.tolist() == list(range(12))
    (fog,) = data.shifts
    assert fog.groups == [[2], [10]] and folders_of(fog) == ["2", "10"]
    assert "classnames.txt names the folders in the order 0, 1, 2" in data.notes[0]


def test_class_names_are_folder_names_with_spaces_or_come_from_a_file(tmp_path):
    plant(tmp_path, "train/red_fox*2 train/äpfel*2 val/red_fox val/äpfel")
    data = common.open_data(str(tmp_path), selection="code")
    assert data.classes == ["red fox", "äpfel"] and len(data.templates) == 80
    mark = "\ufeff"  # as Notepad writes it
    plant(tmp_path, "", {"classnames.txt": f"{mark}fox\r\napple\r\n"})
    plant(tmp_path, "", {"templates.txt": "a photo of a {}.\n\na {}\n"})
    data = common.open_data(str(tmp_path), selection="code")
    assert data.classes == ["fox", "apple"] and data.templates == ["a photo of a {}.", "a {}"]


@pytest.mark.parametrize(
    ("folders", "files", "words"),
    [
        (TWO, {"classnames.txt": b"caf\xe9\ndog"}, "classnames.txt cannot be read"),
        ("train/cat vall/cat", {}, "it holds train, vall. Add or rename one"),
        ("train/dog val/cat", {"train/cat/a.txt": ""}, "it holds a.txt"),
        ("train val/cat", {}, "train has no folder of a training class; it holds 0.png"),
        ("val/cat", {"train/n01440764.tar": ""}, "unpack each archive into one of its name"),
        ("train.X1/cat train.X2/dog val.X/cat", {}, "join the parts of a set (train.X1"),
        ("", {"cifar-10-python.tar.gz": ""}, "it holds cifar-10-python.tar.gz. Expected ImageNet"),
        (f"train/{TENCH}", {"val/ILSVRC2012_1.JPEG": ""}, "it holds ILSVRC2012_1.JPEG"),
        (f"train/{TENCH}", {"val/ILSVRC2012_1.JPEG": ""}, "valprep"),
        (IMAGENET + "imagenet-r/cartoon", {}, "imagenet-r holds cartoon. Expected folders like n0"),
        (IMAGENET + "train/n99999999", {}, "n99999999 is none of ImageNet's classes"),
        ("train/a val/a", {}, "one image per class"),
    ],
)
def test_a_tree_that_cannot_be_used_is_refused_with_the_cure(folders, files, words, tmp_path):
    fails_with(plant(tmp_path, folders, files), words, val_fraction=0.1)


def test_hidden_and_other_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    hidden = "train/.cache train/__MACOSX .git/a val/a/.ipynb_checkpoints"
    files = dict.fromkeys(["val/a/.DS_Store", "val/a/._0.png", "val/a/Thumbs.db"], "")
    data = common.open_data(str(plant(tmp_path, "train/a*2 val/a " + hidden, files)))
    assert data.classes == ["a"] and data.shifts == [] and data.notes == []
    assert len(data.test.images) == 1


def test_one_set_of_a_tree_is_refused_and_digits_with_a_slash_are_the_digits(tmp_path):
    imagenet(tmp_path)
    fails_with(tmp_path / "train", "of one set of a tree pass the folder above")
    assert common.open_data("digits/").kind == "digits"


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    plant(tmp_path, TWO + "fog/cat")
    look = os.listdir

    def listdir(path):  # root, as whom tests run in containers, may read everything
        if os.path.basename(path) == "dog":
            raise PermissionError(13, "Permission denied", path)
        return look(path)

    monkeypatch.setattr(os, "listdir", listdir)
    fails_with(tmp_path, "dog cannot be read (Permission denied)")


# held-out validation


def held_out(tmp_path, **options):
    plant(tmp_path, "train/a*40 train/b*40 train/c val/a val/b val/c")
    return common.open_data(str(tmp_path), val_fraction=0.1, **options)


def test_the_held_out_split_is_disjoint_stratified_and_depends_on_the_seed_only(tmp_path):
    data = held_out(tmp_path)
    train, val = set(data.train.images), set(data.val.images)
    assert not train & val and len(train | val) == 81
    assert data.val.labels.tolist() == [0] * 4 + [1] * 4  # the only c stays in train
    for split in (data.train, data.val):
        assert ["abc".index(f) for f in folders_of(split)] == split.labels.tolist()
    again, other = (held_out(tmp_path, seed=seed).val.images for seed in (0, 1))
    assert data.val.images == again and again != other
    data = held_out(tmp_path, selection="code")  # selects on the test set
    assert data.val is data.test and len(data.train.images) == 81


def test_a_held_out_part_does_not_look_like_missing_images(tmp_path):
    images = np.zeros((50_000, 1, 1), np.uint8)
    train = common.Split("train", "", images, torch.arange(50_000) % 10, expected=50_000)
    rest, val = common.hold_out(train, 0.02, 0)
    assert len(val.images) == 1_000 and rest.expected == len(rest.images) == 49_000


# the embedded digits


@pytest.fixture(scope="module")
def arrays():
    with np.load(common.EMBEDDED / "digits.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_no_image_is_in_two_sets(arrays):
    names = [name for name in arrays if name.endswith("/images")]
    rows = {name: {image.tobytes() for image in arrays[name]} for name in names}
    assert len(names) >= 10
    for i, first in enumerate(names):
        assert len(rows[first]) == len(arrays[first]), f"{first} repeats an image"
        for second in names[i + 1 :]:
            assert not rows[first] & rows[second], f"{first} and {second} share an image"


@pytest.mark.parametrize(
    "name", ["train", "val", "test", "scan", "uci", "fonts", "street", "sketch"]
)
def test_classes_are_balanced(name, arrays):
    counts = np.bincount(arrays[f"{name}/labels"], minlength=10)
    assert (counts == counts[0]).all() and len(counts) == 10


def test_the_embedded_files_stay_small():
    assert sum(file.stat().st_size for file in common.EMBEDDED.glob("*.np*")) < 7_000_000


def test_pretraining_fonts_and_evaluation_fonts_are_different_files(arrays):
    assert not set(arrays["pretrain_font_names"]) & set(arrays["eval_font_names"])
