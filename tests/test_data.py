"""Data: small trees in the real layout of every data set, read by the code that reads those."""

import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
from data import trees

FOUR = ("n01440764", "n01443537", "n01484850", "n01491361")  # ImageNet 0, 1, 2, 3
TENCH, GOLDFISH, SHARK, TIGER = FOUR


def png(size=(8, 8), colour=(200, 30, 60)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def put(root, folders, n=1, data=PNG, form="{}.png"):
    """n images in each of the folders under root."""
    for folder in folders:
        os.makedirs(os.path.join(root, folder), exist_ok=True)
        for i in range(n):
            with open(os.path.join(root, folder, form.format(i)), "wb") as file:
                file.write(data)


def imagenet(root, wnids=FOUR, n=4):
    put(os.path.join(root, "train"), wnids, n)
    put(os.path.join(root, "val"), wnids)
    return str(root)


def folders_of(split):
    return [os.path.basename(os.path.dirname(file)) for file in split.images]


def pixels(source, transform=None):
    image = common.read_rgb(source)
    return np.asarray(transform(image) if transform else image)


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


def test_projection_on_single_ids_is_a_slice_and_on_none_the_identity():
    logits = torch.randn(3, 5)
    assert torch.equal(common.project(logits, [[4], [0]]), logits[:, [4, 0]])
    assert common.project(logits, None) is logits


def test_padding_a_group_does_not_change_its_gradient():
    logits = torch.tensor([[1.0, 4.0, 2.0]], requires_grad=True)
    common.project(logits, [[1], [0, 2]]).sum().backward()
    assert logits.grad.tolist() == [[0.0, 1.0, 1.0]]


# ImageNet and its shifts


def test_classes_are_the_folders_of_train_in_the_order_of_imagenet(tmp_path):
    data = common.open_data(imagenet(tmp_path))
    assert data.kind == "imagenet" and len(data.templates) == 80
    assert data.classes == ["tench", "goldfish", "great white shark", "tiger shark"]
    assert data.test.labels.tolist() == [0, 1, 2, 3] and data.test.groups is None


def test_classes_that_share_a_name_keep_separate_indices(tmp_path):
    import timm.data

    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    put(tmp_path / "imagenet-r", [wnids[744], wnids[836]])
    data = common.open_data(imagenet(tmp_path, [wnids[i] for i in (657, 744, 836, 837)]))
    assert data.classes == ["missile", "missile", "sunglasses", "sunglasses"]
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.shifts[0].groups == [[1], [2]]


def test_templates_are_format_strings(tmp_path):
    assert trees.clip_templates()[0].format("tench") == "a bad photo of a tench."


def test_v2_folders_are_sorted_as_integers(tmp_path):
    wnids = trees.imagenet_wnids()
    imagenet(tmp_path, [wnids[i] for i in (0, 1, 2, 10)])
    put(tmp_path / "imagenetv2-matched-frequency-format-val", ["0", "1", "2", "10", "999"])
    v2 = common.open_data(str(tmp_path)).shifts[0]
    assert folders_of(v2) == ["0", "1", "2", "10"]  # 999 is no class of this train/
    assert v2.labels.tolist() == [0, 1, 2, 3] and v2.groups is None


@pytest.mark.parametrize(
    "folder",
    [
        "ImageNetV2-matched-frequency",
        "imagenetv2-matched-frequency-format-val",
        "imagenetv2-threshold0.7",
        "imagenetv2-top-images-format-val",
        "imagenetv2/imagenetv2-top-images-format-val",
        "ImageNetV2-matched-frequency/ImageNetV2-matched-frequency",
    ],
)
def test_each_variant_of_v2_is_found(tmp_path, folder):
    put(tmp_path / folder, "0123")
    data = common.open_data(imagenet(tmp_path))
    assert [s.path for s in data.shifts] == [str(tmp_path / folder)]


def test_matched_frequency_is_preferred_among_the_variants_of_v2(tmp_path):
    for variant in ("top-images", "threshold0.7", "matched-frequency"):
        put(tmp_path / f"imagenetv2-{variant}", "0123")
    data = common.open_data(imagenet(tmp_path))
    assert [s.path for s in data.shifts] == [str(tmp_path / "imagenetv2-matched-frequency")]


@pytest.mark.parametrize(
    "folder", ["sketch", "imagenet-sketch", "ImageNet_Sketch", "sketch/sketch"]
)
def test_sketch_is_found_and_keeps_all_classes(tmp_path, folder):
    put(tmp_path / folder, [SHARK, TENCH])
    (sketch,) = common.open_data(imagenet(tmp_path)).shifts
    assert sketch.name == "ImageNet-Sketch" and sketch.groups is None
    assert sketch.labels.tolist() == [0, 2]


@pytest.mark.parametrize("folder", ["imagenet-a", "imagenet-r", "ImageNet-A/imagenet-a"])
def test_a_and_r_are_restricted_to_their_own_classes(tmp_path, folder):
    put(tmp_path / folder, [TIGER, GOLDFISH], 2)
    (shift,) = common.open_data(imagenet(tmp_path)).shifts
    assert shift.groups == [[1], [3]] and shift.labels.tolist() == [0, 0, 1, 1]


def test_shift_sets_are_found_beside_the_tree_and_in_a_folder_above_it(tmp_path):
    imagenet(tmp_path / "imagenet")
    put(tmp_path / "imagenet-r", [TENCH])
    put(tmp_path / "imagenet" / "imagenet-a", [TENCH])
    for path in (tmp_path, tmp_path / "imagenet"):
        assert [s.name for s in common.open_data(str(path)).shifts] == ["ImageNet-A", "ImageNet-R"]


def test_the_200_classes_of_a_and_r_have_the_ids_of_the_papers(tmp_path):
    from importlib.resources import files

    lists = files("timm.data._info")
    put(tmp_path / "train", trees.imagenet_wnids(), 2)
    put(tmp_path / "val", trees.imagenet_wnids())
    for name in "ar":
        wnids = lists.joinpath(f"imagenet_{name}_synsets.txt").read_text().split()
        put(tmp_path / f"imagenet-{name}", wnids)
    a, r = common.open_data(str(tmp_path), selection="code").shifts
    first = [6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70]
    assert len(a.groups) == 200 and [g[0] for g in a.groups[:16]] == first
    first = [1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63]
    assert len(r.groups) == 200 and [g[0] for g in r.groups[:16]] == first
    assert a.labels.tolist() == list(range(200)) and (a.expected, r.expected) == (7_500, 30_000)


def objectnet(root, mappings=None, text=""):
    """Tench and tiger shark are ids of one object; the goldfish has its own; a fork has none."""
    put(root / "images", ["fish_big", "aquarium", "fork"], 2)
    put(mappings or root / "mappings", [""], 0)
    # the labels stand in the file in another order than ImageNet's classes, as in the real one
    index = {str(i): 999 - i for i in range(1000)}
    labels = [f"label {999 - line}, other name" for line in range(1000)]
    labels[999 - 1] = "goldfish, Carassius auratus"
    files = {
        "folder_to_objectnet_label.json": {
            "fish_big": "Fish/Big",
            "aquarium": "Bowl",
            "fork": "Fork",
        },
        "objectnet_to_imagenet_1k.json": {
            "Fish/Big": "label 3, other name; label 0, other name",
            "Bowl": "goldfish, Carassius auratus",
        },
        "pytorch_to_imagenet_2012_id.json": index,
    }
    for name, content in files.items():
        with open(os.path.join(mappings or root / "mappings", name), "w") as file:
            json.dump(content, file)
    with open(
        os.path.join(mappings or root / "mappings", "imagenet_to_label_2012_v2" + text), "w"
    ) as f:
        f.write("\n".join(labels) + "\n")


@pytest.mark.parametrize("text", ["", ".txt"])
def test_objectnet_maps_its_folders_through_the_files_that_come_with_it(tmp_path, text):
    objectnet(tmp_path / "objectnet-1.0", text=text)
    (shift,) = common.open_data(imagenet(tmp_path)).shifts
    assert shift.groups == [[1], [3, 0]]  # in the order of the folders: aquarium, fish_big
    assert shift.labels.tolist() == [0, 0, 1, 1] and shift.border == 2
    assert folders_of(shift) == ["aquarium"] * 2 + ["fish_big"] * 2  # no fork: ImageNet has none


@pytest.mark.parametrize("inner", ["objectnet-1.0", "objectnet-1.0_1"])
@pytest.mark.parametrize("above", [True, False])
def test_objectnet_is_found_one_level_down_with_its_mappings_there_or_above(tmp_path, inner, above):
    root = tmp_path / "objectnet-1.0"
    objectnet(root / inner, root / "mappings" if above else None)
    (shift,) = common.open_data(imagenet(tmp_path)).shifts
    assert shift.groups == [[1], [3, 0]]


def test_objectnet_without_its_mapping_files_says_which(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    os.remove(tmp_path / "objectnet-1.0/mappings/objectnet_to_imagenet_1k.json")
    fails_with(imagenet(tmp_path), "objectnet_to_imagenet_1k.json", "mappings")


def test_a_training_set_with_some_classes_restricts_the_groups_of_objectnet(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    (shift,) = common.open_data(imagenet(tmp_path, [TENCH, SHARK])).shifts
    assert shift.groups == [[0]] and folders_of(shift) == ["fish_big"] * 2


def test_mapping_files_of_different_origin_are_refused(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    (tmp_path / "objectnet-1.0/mappings/imagenet_to_label_2012_v2").write_text("one label\n")
    fails_with(imagenet(tmp_path), "do not belong together", "goldfish")


def test_a_damaged_mapping_file_is_named(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    (tmp_path / "objectnet-1.0/mappings/pytorch_to_imagenet_2012_id.json").write_text("{")
    fails_with(imagenet(tmp_path), "pytorch_to_imagenet_2012_id.json is damaged")


def test_the_border_of_objectnet_is_cut_off_before_the_transform(tmp_path):
    image = np.zeros((12, 10, 3), np.uint8)
    image[2:-2, 2:-2] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    split = common.Split("o", "", [str(tmp_path / "a.png")], torch.tensor([0]), border=2)
    cut = common.Images(split, np.asarray)[0, 0][0]
    assert cut.shape == (8, 6, 3) and (cut == 255).all()


def test_missing_shift_sets_are_named_in_the_table(tmp_path):
    put(tmp_path / "imagenet-r", [TENCH])
    data = common.open_data(imagenet(tmp_path))
    assert len(data.missing) == 4
    for name in ("ImageNet-V2", "ImageNet-Sketch", "ImageNet-A", "ObjectNet (no objectnet-1.0/"):
        assert f"MISSING, so not evaluated: {name}" in common.describe(data)


def test_a_shift_set_with_the_wrong_content_is_not_silently_missing(tmp_path):
    put(tmp_path / "imagenet-r", ["cartoon"])
    fails_with(imagenet(tmp_path), "imagenet-r holds cartoon. Expected folders like n0144")


def test_a_count_that_differs_from_the_published_one_is_said_loudly(tmp_path):
    put(tmp_path / "train", trees.imagenet_wnids(), 1)
    put(tmp_path / "val", trees.imagenet_wnids())
    table = common.describe(common.open_data(str(tmp_path), selection="code"))
    assert "WARNING: test has 1,000 images where 50,000 are expected (49,000 missing)" in table
    assert "val is the test set" in table


def test_either_printed_count_of_objectnet_passes(tmp_path):
    objectnet(tmp_path / "objectnet-1.0")
    put(tmp_path / "train", trees.imagenet_wnids())
    put(tmp_path / "val", trees.imagenet_wnids())
    put(tmp_path / "objectnet-1.0" / "images", ["aquarium"], 18_514 - 3, b"")  # and 2 big fish
    for warned in (True, False):
        table = common.describe(common.open_data(str(tmp_path), selection="code"))
        assert ("WARNING: ObjectNet" in table) == warned
        put(tmp_path / "objectnet-1.0" / "images", ["fish_big"], 3)


def test_a_subset_of_imagenet_has_no_published_counts(tmp_path):
    table = common.describe(common.open_data(imagenet(tmp_path)))
    assert "WARNING" not in table and "4 of ImageNet's 1000 classes" in table


def test_the_table_has_a_row_per_set_with_path_images_and_classes(tmp_path):
    put(tmp_path / "imagenet-r", [TENCH, SHARK], 3)
    rows = common.describe(common.open_data(imagenet(tmp_path))).splitlines()
    assert rows[0].split() == ["set", "path", "images", "classes", "expected"]
    assert rows[4].split() == ["ImageNet-R", str(tmp_path / "imagenet-r"), "6", "2", "-"]


@pytest.mark.parametrize("name", ["val_in_folder", "val_dirs"])
def test_sorted_validation_folders_are_preferred_to_a_flat_val(tmp_path, name):
    put(tmp_path / "train", FOUR, 2)
    put(tmp_path, ["val"], 3)
    put(tmp_path / name, FOUR)
    assert common.open_data(str(tmp_path)).test.path == str(tmp_path / name)


def test_a_flat_val_is_named_and_its_cure_works(tmp_path):
    put(tmp_path / "train", FOUR, 2)
    put(tmp_path, ["val"], 8, form="ILSVRC2012_val_{:08d}.JPEG")
    with pytest.raises(
        common.InputError, match="val is flat: 8 files and no class folders"
    ) as error:
        common.open_data(str(tmp_path))
    with open(tmp_path / "val" / "LOC_val_solution.csv", "w") as file:
        file.write("ImageId,PredictionString\n")
        for i in range(8):
            file.write(f"ILSVRC2012_val_{i:08d},{FOUR[i % 4]} 85 1 499 272 {FOUR[i % 4]} 1 2 3 4\n")
    (line,) = (s for s in str(error.value).splitlines() if "LOC_val_solution" in s)
    command = line[line.index("tail") :]
    subprocess.run(["bash", "-ec", command], cwd=tmp_path / "val", check=True)
    assert common.open_data(str(tmp_path)).test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_training_folder_that_is_no_class_of_imagenet_is_named(tmp_path):
    imagenet(tmp_path, [*FOUR, "n99999999"])
    fails_with(tmp_path, "n99999999")


# CIFAR-10


class Python2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is how CIFAR-10 was pickled."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + len(data).to_bytes(4, "little") + data)

    dispatch[str] = dispatch[bytes] = save_str


def cifar(root, pickler=Python2):
    folder = root / "cifar-10-batches-py"
    os.makedirs(folder)
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.zeros((10, 3072), np.uint8)
        rows[:, 0] = np.arange(10) + 10 * b  # red of the top left pixel
        rows[:, 1024 + 32] = 7  # green of the first pixel in the second row
        buffer = io.BytesIO()
        pickler(buffer, 2).dump({b"data": rows, b"labels": list(range(10)), b"batch_label": b"x"})
        data = buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(data)
    return root


@pytest.mark.parametrize("pickler", [Python2, pickle.Pickler])
def test_cifar_batches_are_read_in_order_as_rows_of_pixels(tmp_path, pickler):
    data = common.open_data(str(cifar(tmp_path, pickler)), selection="code")
    assert data.kind == "cifar10" and data.classes[6] == "frog"
    assert data.train.images.shape == (50, 32, 32, 3)
    assert data.train.images[:, 0, 0, 0].tolist() == list(range(50))
    assert (data.train.images[:, 1, 0, 1] == 7).all()
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert data.test.labels.tolist() == list(range(10)) and data.test.expected == 10_000
    assert [name.split(" (")[0] for name in data.missing] == ["STL-10", "CIFAR-10.1"]


def test_the_batch_folder_itself_is_accepted(tmp_path):
    put(tmp_path / "stl10" / "test", ["cat"])
    put(tmp_path / "stl10" / "test", ["airplane"])
    data = common.open_data(str(cifar(tmp_path) / "cifar-10-batches-py"))
    assert [s.name for s in data.shifts] == ["STL-10"]


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_hostile_batch_does_not_run_its_code(tmp_path):
    trace = tmp_path / "trace"
    bad = cifar(tmp_path) / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(pickle.dumps({b"data": Hostile(f"touch {trace}"), b"labels": []}))
    fails_with(tmp_path, bad, "system")
    assert not trace.exists()
    pickle.loads(bad.read_bytes())  # the file is dangerous to a reader without our care
    assert trace.exists()


def test_a_truncated_batch_names_its_file(tmp_path):
    bad = cifar(tmp_path) / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(bad.read_bytes()[:2000])
    fails_with(tmp_path, bad, "cifar-10-python.tar.gz")


STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
WITHOUT_FROG = [[0], [1], [2], [3], [4], [5], [7], [8], [9]]


def test_stl_folders_are_matched_by_name_and_not_by_sort_order(tmp_path):
    put(cifar(tmp_path) / "stl10" / "test", STL)
    (stl,) = common.open_data(str(tmp_path)).shifts
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


def test_an_unknown_class_in_stl_is_named(tmp_path):
    put(cifar(tmp_path) / "stl10" / "test", [*STL, "zebra"])
    fails_with(tmp_path, "zebra")


def test_binary_files_of_stl_that_do_not_fit_are_refused(tmp_path):
    os.makedirs(cifar(tmp_path) / "stl10_binary")
    np.zeros(100, np.uint8).tofile(tmp_path / "stl10_binary" / "test_X.bin")
    fails_with(tmp_path, "test_X.bin or its labels cannot be read")
    np.ones(10, np.uint8).tofile(tmp_path / "stl10_binary" / "test_y.bin")
    fails_with(tmp_path, "differ in length")


@pytest.mark.parametrize("folder", ["", "CIFAR-10.1", "CIFAR-10.1/datasets"])
@pytest.mark.parametrize("versions, used", [(["v4"], "v4"), (["v6"], "v6"), (["v4", "v6"], "v6")])
def test_cifar_10_1_is_found_in_either_version(tmp_path, folder, versions, used):
    os.makedirs(cifar(tmp_path) / folder, exist_ok=True)
    for v in versions:
        np.save(tmp_path / folder / f"cifar10.1_{v}_data.npy", np.zeros((3, 32, 32, 3), np.uint8))
        np.save(tmp_path / folder / f"cifar10.1_{v}_labels.npy", np.array([3, 0, 9], np.int32))
    (shift,) = common.open_data(str(tmp_path)).shifts
    assert shift.name == f"CIFAR-10.1 {used}" and shift.labels.tolist() == [3, 0, 9]
    assert shift.labels.dtype == torch.int64 and shift.groups is None
    assert shift.expected == {"v4": 2_021, "v6": 2_000}[used]


def test_a_hostile_array_does_not_run_its_code(tmp_path):
    trace = tmp_path / "trace"
    file = cifar(tmp_path) / "cifar10.1_v6_data.npy"
    np.save(file, np.array([Hostile(f"touch {trace}")], dtype=object))
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.zeros(1))
    fails_with(tmp_path, file)
    assert not trace.exists()


def test_an_archive_that_was_not_unpacked_is_recognised(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    fails_with(tmp_path, "tar -xzf cifar-10-python.tar.gz")


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


def test_entity30_draws_four_source_and_four_target_classes_of_each_superclass(tmp_path):
    groups = hierarchy(tmp_path)
    folder = tmp_path / "imagenet_class_hierarchy" / "modified"
    names, source, target = trees.entity30_classes(folder)
    assert names == ["big fish", "little bird"]  # n5 has 7 classes only
    for wnids, s, t in zip([groups["n3"], groups["n7"]], source, target, strict=True):
        assert len(set(s)) == len(set(t)) == 4 and not set(s) & set(t)
        assert set(s) | set(t) <= set(wnids)


def test_entity30_draws_what_the_reference_package_draws(tmp_path):
    """The ids below were printed by robustness 1.2.1 on this hierarchy."""
    hierarchy(tmp_path)
    folder = tmp_path / "imagenet_class_hierarchy" / "modified"
    _, source, target = trees.entity30_classes(folder)
    index = trees.imagenet_wnids().index
    assert [[index(w) for w in g] for g in source] == [[4, 1, 6, 2], [108, 104, 106, 100]]
    assert [[index(w) for w in g] for g in target] == [[3, 0, 5, 7], [109, 105, 103, 107]]


def test_entity30_reads_superclasses_from_an_imagenet_tree(tmp_path):
    groups = hierarchy(tmp_path)
    imagenet(tmp_path / "imagenet", [w for g in groups.values() for w in g], 2)
    data = common.open_data(f"entity30:{tmp_path / 'imagenet'}", selection="code")
    assert data.kind == "entity30" and data.classes == ["big fish", "little bird"]
    (shift,) = data.shifts
    assert data.train.labels.tolist() == [0] * 8 + [1] * 8
    assert data.test.labels.tolist() == shift.labels.tolist() == [0] * 4 + [1] * 4
    assert not set(folders_of(data.test)) & set(folders_of(shift))
    assert set(folders_of(data.test)) == set(folders_of(data.train))


def test_entity30_without_its_hierarchy_names_the_files_and_their_source(tmp_path):
    fails_with(f"entity30:{imagenet(tmp_path)}", "imagenet_class_hierarchy", "BREEDS-Benchmarks")


def test_entity30_without_a_needed_class_names_it(tmp_path):
    groups = hierarchy(tmp_path)
    imagenet(tmp_path, groups["n3"])
    fails_with(f"entity30:{tmp_path}", str(tmp_path / "train"), "Entity-30 needs")


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
        assert {os.path.basename(f) for f in data.test.images} == {
            f"{home}_{i}.png" for i in range(3)
        }
    assert [m.split()[0] for m in data.missing] == ["infograph", "painting", "quickdraw"]


def test_published_counts_of_domainnet_are_those_of_the_test_lists(tmp_path):
    data = common.open_data(str(domainnet(tmp_path) / "real"))
    assert (data.train.expected, data.test.expected) == (None, 52_764)
    assert "21,271" in common.describe(data) and "9 images where 14,814" in common.describe(data)


def test_domainnet_without_a_domain_or_a_list_or_an_image_says_so(tmp_path):
    domainnet(tmp_path)
    fails_with(tmp_path, "looks like DomainNet", "Choose the domain to train on", "/real")
    os.remove(tmp_path / "real/axe/real_5.png")
    fails_with(tmp_path / "real", "real_5.png is missing, but", "real_train.txt has it")
    (tmp_path / "clipart_test.txt").write_text("clipart/axe/clipart_0.png 1\n")
    fails_with(tmp_path / "sketch", "class 1 is axe, but t-shirt in the list read before")
    (tmp_path / "clipart_test.txt").write_text("clipart/axe/clipart_0.png\n")
    fails_with(tmp_path / "sketch", "expected lines 'real/axe/1.jpg 9', found")
    (tmp_path / "clipart_test.txt").write_text("\n")
    fails_with(tmp_path / "sketch", "clipart_test.txt is empty")
    (tmp_path / "clipart_test.txt").unlink()
    fails_with(tmp_path / "sketch", "has no clipart_test.txt beside it")


def test_domains_with_another_class_are_refused(tmp_path):
    domainnet(tmp_path)
    put(tmp_path / "clipart", ["zebra"], form="clipart_{}.png")
    with open(tmp_path / "clipart_test.txt", "a") as file:
        file.write("clipart/zebra/clipart_0.png 3\n")
    fails_with(tmp_path / "real", "the lists of real have no class zebra")
    for part in ("train", "test"):
        lines = (tmp_path / f"sketch_{part}.txt").read_text().replace(" 1\n", " 7\n")
        (tmp_path / f"sketch_{part}.txt").write_text(lines)
    fails_with(tmp_path / "sketch", "sketch_train.txt skips a class number")


# any folder


def test_other_folders_of_a_tree_are_its_shifts(tmp_path):
    for part, classes in {"train": "abc", "val": "abc", "fog": "abc", "rain": "ca"}.items():
        put(tmp_path / part, classes, 4)
    data = common.open_data(str(tmp_path), val_fraction=0.25)
    assert data.kind == "folder" and data.classes == ["a", "b", "c"]
    fog, rain = data.shifts
    assert fog.groups is None and fog.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert rain.groups == [[0], [2]] and rain.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.path.endswith("val") and len(data.val.images) == 3


def test_a_tree_with_test_and_val_uses_both(tmp_path):
    for part in ("train", "val", "test"):
        put(tmp_path / part, "ab")
    data = common.open_data(str(tmp_path))
    assert (data.val.path, data.test.path) == (str(tmp_path / "val"), str(tmp_path / "test"))
    assert len(data.train.images) == 2 and data.shifts == []


def test_a_tree_with_test_but_without_val_holds_out_training_images(tmp_path):
    put(tmp_path / "train", "ab", 5)
    put(tmp_path / "test", "ab")
    data = common.open_data(str(tmp_path))
    assert len(data.val.images) == 2 and data.test.path == str(tmp_path / "test")


def test_a_shift_class_that_train_lacks_is_named_with_the_nearest(tmp_path):
    for part, classes in {"train": ["horse", "cat"], "val": ["cat"], "fog": ["horses"]}.items():
        put(tmp_path / part, classes)
    fails_with(tmp_path, tmp_path / "fog" / "horses", "'horse'")


def test_class_names_are_folder_names_with_spaces_or_come_from_a_file(tmp_path):
    put(tmp_path / "train", ["red_fox", "äpfel"])
    put(tmp_path / "val", ["red_fox", "äpfel"])
    data = common.open_data(str(tmp_path), selection="code")
    assert data.classes == ["red fox", "äpfel"] and len(data.templates) == 80
    (tmp_path / "classnames.txt").write_text("fox\napple\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na {}\n", encoding="utf-8")
    data = common.open_data(str(tmp_path), selection="code")
    assert data.classes == ["fox", "apple"] and data.templates == ["a photo of a {}.", "a {}"]


def test_wrong_class_names_or_templates_are_refused(tmp_path):
    put(tmp_path / "train", "ab", 2)
    put(tmp_path / "val", "ab")
    (tmp_path / "classnames.txt").write_text("one\n")
    fails_with(tmp_path, "1 names for 2 class folders")
    os.remove(tmp_path / "classnames.txt")
    (tmp_path / "templates.txt").write_text("a photo\n")
    fails_with(tmp_path, "'a photo'", "{}")


def test_a_tree_without_val_and_test_suggests_the_nearest_name(tmp_path):
    put(tmp_path / "train", "ab")
    put(tmp_path / "validation", "ab")
    fails_with(tmp_path, "no val/ or test/", "'validation'")


def test_a_class_folder_without_images_is_named_with_what_it_holds(tmp_path):
    imagenet(tmp_path)
    put(tmp_path / "train" / GOLDFISH, ["images"])
    for i in range(4):
        os.remove(tmp_path / "train" / GOLDFISH / f"{i}.png")
    fails_with(tmp_path, tmp_path / "train" / GOLDFISH, "has no images; it holds images")


def test_hidden_and_other_files_are_not_images(tmp_path):
    imagenet(tmp_path)
    for name in (".DS_Store", "._0.png", "notes.txt"):
        (tmp_path / "val" / TENCH / name).write_bytes(b"")
    os.makedirs(tmp_path / "val" / ".ipynb_checkpoints")
    assert len(common.open_data(str(tmp_path)).test.images) == 4


def test_hidden_folders_are_neither_classes_nor_shifts(tmp_path):
    put(tmp_path, ["train/a", "train/.cache", "train/__MACOSX", "val/a", ".git/a"], 2)
    data = common.open_data(str(tmp_path))
    assert data.classes == ["a"] and data.shifts == []


def test_files_come_in_the_same_order_on_every_machine(tmp_path):
    imagenet(tmp_path)
    put(tmp_path / "val", [TENCH], 11)
    names = [os.path.basename(f) for f in common.open_data(str(tmp_path)).test.images[:11]]
    assert names == sorted(names) and names[2] == "10.png"


def test_a_symlink_loop_does_not_hang(tmp_path):
    imagenet(tmp_path)
    os.symlink(tmp_path, tmp_path / "val" / TENCH / "loop")
    os.symlink("self", tmp_path / "self")
    assert len(common.open_data(str(tmp_path)).test.images) == 4


def test_wrong_paths_are_errors_with_the_next_step(tmp_path):
    imagenet(tmp_path / "imagenet")
    (tmp_path / "x.tar").write_bytes(b"")
    fails_with(tmp_path / "imagnet", "does not exist", "did you mean 'imagenet'?")
    fails_with(tmp_path / "x.tar", "is a file", "unpack")
    fails_with(tmp_path / "imagenet" / "train", f"pass the folder above, {tmp_path / 'imagenet'}")
    fails_with(tmp_path / "imagenet" / "val", "pass the folder above")
    os.makedirs(tmp_path / "empty" / "Training")
    fails_with(tmp_path / "empty", "has no train/; it holds Training", "'Training'", "CIFAR-10")


# held-out validation


def held_out(tmp_path, **options):
    put(tmp_path / "train", "ab", 40)
    put(tmp_path / "train", "c", 1)
    put(tmp_path / "val", "abc")
    return common.open_data(str(tmp_path), val_fraction=0.1, **options)


def test_the_held_out_split_is_disjoint_stratified_and_complete(tmp_path):
    data = held_out(tmp_path)
    train, val = set(data.train.images), set(data.val.images)
    assert not train & val and len(train | val) == 81
    assert data.val.labels.tolist() == [0] * 4 + [1] * 4  # the only c stays in train
    for split in (data.train, data.val):
        assert ["abc".index(f) for f in folders_of(split)] == split.labels.tolist()


def test_the_held_out_split_depends_on_the_seed_only(tmp_path):
    first, again, other = (held_out(tmp_path, seed=seed).val.images for seed in (0, 0, 1))
    assert first == again and first != other


def test_a_held_out_part_does_not_look_like_missing_images(tmp_path):
    images = np.zeros((50_000, 1, 1), np.uint8)
    train = common.Split("train", "", images, torch.arange(50_000) % 10, expected=50_000)
    rest, val = common.hold_out(train, 0.02, 0)
    assert len(val.images) == 1_000 and rest.expected == len(rest.images) == 49_000


def test_selecting_on_the_test_set_keeps_all_training_images(tmp_path):
    data = held_out(tmp_path, selection="code")
    assert data.val is data.test and len(data.train.images) == 81


def test_an_impossible_validation_share_is_refused(tmp_path):
    fails_with(imagenet(tmp_path), "validation share is 1.5", val_fraction=1.5)
    fails_with(imagenet(tmp_path / "one", n=1), "one image per class", val_fraction=0.1)


# images


def photo(tmp_path, name="photo.jpg", mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = str(tmp_path / name)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def reading(images, **options):
    items = [[(0, 0), (1, 0)]]
    options |= {"batch_sampler": items, "collate_fn": common.collate}
    return torch.utils.data.DataLoader(images, **options)


def test_a_truncated_jpeg_names_its_file_and_is_skipped_on_demand(tmp_path):
    good, bad = photo(tmp_path), str(tmp_path / "bad.jpg")
    with open(good, "rb") as file, open(bad, "wb") as cut:
        cut.write(file.read()[:1500])
    split = common.Split("val", "", [bad, good], torch.tensor([1, 0]))
    transform = common.eval_transform(16, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(common.InputError, match=r"bad\.jpg cannot be read.*--skip-bad-images"):
        common.Images(split, transform)[0, 0]
    with pytest.raises(common.InputError, match=r"bad\.jpg"):
        list(reading(common.Images(split, transform), num_workers=1))
    skipping = common.Images(split, transform, skip_bad=True)
    ((images, labels, index),) = reading(skipping)
    assert images.shape == (1, 3, 16, 16) and labels.tolist() == [0] and index.tolist() == [1]
    assert common.collate([None, None]) is None


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_no_file_can_have_is_a_sentence(name):
    with pytest.raises(common.InputError, match="--data .*; expected a folder"):
        common.open_data(name)


def test_an_empty_or_vanished_file_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    files = [str(tmp_path / "empty.png"), str(tmp_path / "gone.png")]
    images = common.Images(common.Split("val", "", files, torch.tensor([0, 0])), np.asarray)
    with pytest.raises(common.InputError, match=r"empty\.png .*the file is empty"):
        images[0, 0]
    with pytest.raises(common.InputError, match=r"gone\.png .*No such file"):
        images[1, 0]


def test_a_bug_in_the_transform_is_not_blamed_on_the_file(tmp_path):
    def broken(image):
        raise ZeroDivisionError

    split = common.Split("val", "", [photo(tmp_path)], torch.tensor([0]))
    with pytest.raises(ZeroDivisionError):
        common.Images(split, broken, skip_bad=True)[0, 0]


@pytest.mark.parametrize(
    "name, mode", [("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "LA"), ("a.png", "P")]
)
def test_other_colour_modes_become_rgb(tmp_path, name, mode):
    path = photo(tmp_path, name, mode)
    assert Image.open(path).mode == mode
    want = np.asarray(Image.open(path).convert("RGB"))
    assert want.shape == (48, 64, 3) and np.array_equal(pixels(path), want)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_alpha_keeps_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert pixels(str(tmp_path / "p.png")).tolist() == [[[10, 20, 30], [200, 100, 0]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert pixels(str(tmp_path / "deep.png"))[0, :, 1].tolist() == [0, 100, 255]


def test_embedded_arrays_are_read_like_files():
    grey = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    split = common.Split("s", "", grey, torch.tensor([3]))
    image, label, index = common.Images(split, np.asarray)[0, 0]
    assert np.array_equal(image[:, :, 1], grey[0]) and (label, index) == (3, 0)


def test_eval_transform_keeps_the_pixels_of_an_image_of_the_right_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = common.eval_transform(32, (0.0,) * 3, (1.0,) * 3)(Image.fromarray(noise))
    assert torch.equal(ours, torch.from_numpy(noise).permute(2, 0, 1) / 255)


def test_eval_transform_is_the_one_of_open_clip(tmp_path):
    from open_clip.transform import image_transform

    image, mean, std = Image.open(photo(tmp_path)), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    theirs = image_transform(40, is_train=False, mean=mean, std=std)(image)
    assert torch.equal(common.eval_transform(40, mean, std)(image), theirs)


def test_train_transform_crops_little_and_never_mirrors():
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    transform = common.train_transform(32, (0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(0)
    for _ in range(50):
        crop = transform(Image.fromarray(ramp))
        assert crop.shape == (3, 32, 32)
        assert crop[0, 0, -1] - crop[0, 0, 0] > 0.75  # a mirrored one would fall


def test_a_random_crop_depends_on_the_seed_of_its_item_only(tmp_path):
    split = common.Split("train", "", [photo(tmp_path)], torch.tensor([0]))
    images = common.Images(split, common.train_transform(16, (0.0,) * 3, (1.0,) * 3))
    torch.manual_seed(0)
    first, state = images[0, 5][0], torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(images[0, 5][0], first)
    assert not torch.equal(images[0, 6][0], first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the outer generator


# embedded digits


def digits(folder):
    """A small copy of the form of data/: two sets besides the three splits, one of pre-training."""
    arrays = {}
    for n, name in enumerate(
        ["train", "val", "test", "pretrain_uci", "uci", "natural_adversarial"]
    ):
        arrays[f"{name}/images"] = np.full((n + 1, 8, 8), n, np.uint8)
        arrays[f"{name}/labels"] = np.arange(n + 1, dtype=np.uint8)
    np.savez_compressed(folder / "digits.npz", **arrays)
    (folder / "prompts.json").write_text(
        json.dumps({"class_names": ["zero"], "templates": ["a {}"]})
    )


def test_embedded_sets_come_in_file_order_without_those_of_pretraining(tmp_path):
    digits(tmp_path)
    data = trees.open_digits(tmp_path)
    assert [s.name for s in data.shifts] == ["UCI", "Natural adversarial"]
    assert [len(s.images) for s in (data.train, data.val, data.test)] == [1, 2, 3]
    assert data.shifts[0].labels.dtype == torch.int64 and data.missing == []


def test_the_embedded_digits_open_by_their_name():
    folder = os.path.join(os.path.dirname(os.path.abspath(common.__file__)), "data")
    if not os.path.isfile(os.path.join(folder, "digits.npz")):
        pytest.skip("data/digits.npz is not there")
    data = common.open_data("digits")
    assert data.kind == "digits" and len(data.classes) == 10 and len(data.shifts) >= 5
    for split in (data.train, data.val, data.test, *data.shifts):
        assert len(split.images) == len(split.labels) > 0 and split.images.dtype == np.uint8
    assert data.shifts[0].name in common.describe(data)


def test_importing_the_module_loads_no_image_library():
    code = (
        "import sys, common; from data import trees\n"
        "print([m for m in ('PIL', 'torchvision', 'timm', 'open_clip') if m in sys.modules])"
    )
    folder = os.path.dirname(os.path.abspath(common.__file__))
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
