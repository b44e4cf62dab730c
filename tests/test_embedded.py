"""The embedded data: disjoint and balanced sets, small files."""

import numpy as np
import pytest

import common


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
