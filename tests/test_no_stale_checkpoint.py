"""A finished training is read again only if nothing that shapes it has changed."""

import functools
import importlib.util
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from small import CLIP, image_files, linear_model, random_split, settings

import common

METHOD = """
import torch
import torch.nn.functional as F

import common

ALPHA = 0.5
CRITERION = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
SHARES = {"logits": torch.tensor(0.1)}

class Smooth:
    def __init__(self, strength):
        self.strength = strength

    def __call__(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=self.strength)

HARD = Smooth(0.0)

def penalty(logits):
    "Large logits cost."
    return SHARES["logits"] * logits.square().mean()

class Base(torch.optim.SGD):
    power = 1.0

class Descent(Base):
    def __init__(self, parameters, speed):
        super().__init__(parameters, lr=0.01)
        self.speed = speed

def train(config, model, split, clip):
    weight, smooth = 2.0, Smooth(0.1)

    def loss_fn(images, labels):
        logits = model(images)[1]
        loss = weight * smooth(logits, labels) + HARD(logits, labels)
        return loss + ALPHA * penalty(logits) + CRITERION(logits, labels)

    optimiser = Descent(model.parameters(), speed=0.5)
    common.fine_tune(config, "run", model, split, clip, loss_fn, optimiser, key={})
"""


def train(folder, old="", new="", data=None):
    """Run METHOD's `train` from a file in `folder`, after an edit.  -> number of checkpoints"""
    folder.mkdir()
    (folder / "method.py").write_text(METHOD.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("method", folder / "method.py")
    method = importlib.util.module_from_spec(spec)
    sys.modules["method"] = method  # as an import does
    spec.loader.exec_module(method)
    out = folder.parent / "out"
    method.train(settings(out, epochs=1), linear_model(), data or random_split(16), CLIP)
    return len(list(out.glob("checkpoints/*.pt")))


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("a number that the loss closes over", "smooth = 2.0", "smooth = 3.0"),
        ("the loss", "weight * smooth", "weight + smooth"),
        ("a function that it calls", "square()", "abs()"),
        ("a number of its file", "ALPHA = 0.5", "ALPHA = 0.6"),
        ("an object of another file", "label_smoothing=0.1", "label_smoothing=0.2"),
        ("a tensor in a table of its file", "tensor(0.1)", "tensor(0.2)"),
        ("an object of its file", "Smooth(0.0)", "Smooth(0.3)"),
        ("an option of an object that it calls", "Smooth(0.1)", "Smooth(0.2)"),
        ("that object's code", "return F.cross", "return 3 * F.cross"),
        ("an optimiser's option that no group holds", "speed=0.5", "speed=0.6"),
        ("the code of its base class", "power = 1.0", "power = 2.0"),
        ("the base class", "torch.optim.SGD", "torch.optim.Adam"),
    ],
)
def test_an_edited_loss_or_optimiser_is_trained_anew(what, old, new, tmp_path):
    assert METHOD.count(old) == 1
    assert train(tmp_path / "a") == 1
    assert train(tmp_path / "b", old, new) == 2, what


def test_another_path_comments_and_docstrings_are_the_same_training(tmp_path, capsys):
    assert train(tmp_path / "a") == train(tmp_path / "b") == 1
    assert train(tmp_path / "c", "    weight, smooth", "    # a comment\n\n    weight, smooth") == 1
    assert train(tmp_path / "d", "Large logits cost.", "Nothing is free.") == 1
    assert capsys.readouterr().out.count("trained before") == 3


def test_another_recipe_is_another_checkpoint_and_the_same_is_read(tmp_path, capsys):
    changes = {"lr": 2e-3, "seed": 1, "epochs": 3, "weight_decay": 0.0, "batch": 8, "warmup": 1}
    changes |= {"clip": 2.0, "precision": "bf16"}
    calls = [{}, {}] + [{name: value} for name, value in changes.items()]
    for number, change in enumerate(calls):
        config = settings(tmp_path, **change)
        common.fine_tune(config, "run", linear_model(), random_split(16), CLIP)
        assert len(list(tmp_path.glob("checkpoints/*.pt"))) == max(1, number), change
    assert capsys.readouterr().out.count("trained before") == 1


@pytest.mark.parametrize("given", ["loss_fn", "optimiser"])
def test_a_loss_or_an_optimiser_without_a_key_is_an_error(given, tmp_path):
    model = linear_model()
    own = {"loss_fn": len, "optimiser": torch.optim.SGD(model.parameters(), lr=1.0)}
    with pytest.raises(ValueError, match="needs a key that names its settings"):
        config, split = settings(tmp_path), random_split()
        common.fine_tune(config, "run", model, split, CLIP, **{given: own[given]})


def test_data_that_moved_keep_their_checkpoints_and_other_images_do_not(tmp_path):
    data = image_files(tmp_path / "here")
    assert train(tmp_path / "a", data=data) == 1
    shutil.move(tmp_path / "here", tmp_path / "moved")
    moved = [path.replace("/here/", "/moved/") for path in data.images]
    data = common.Split("train", "elsewhere", moved, data.labels)
    assert train(tmp_path / "b", data=data) == 1
    assert train(tmp_path / "c", data=image_files(tmp_path / "other", height=31)) == 2


def scaled(logits, labels, by):
    return by * F.cross_entropy(logits, labels)


def test_settings_that_a_loss_reads_or_is_given_are_part_of_the_name(tmp_path):
    def run(config, loss, by):
        model = linear_model()
        loss = functools.partial(loss, by=by)

        def loss_fn(images, labels):
            return config.val_fraction * F.cross_entropy(model(images)[1], labels)

        args = config, "run", model, random_split(16), CLIP
        common.fine_tune(*args, loss_fn, key={"code": common.hash_of(common.code_of(loss))})
        return len(list(tmp_path.glob("checkpoints/*.pt")))

    for share, by, count in ((0.1, 1, 1), (0.2, 1, 2), (0.2, 2, 3), (0.1, 1, 3)):  # a name each
        assert run(settings(tmp_path, val_fraction=share), scaled, by) == count


def test_a_key_that_hides_a_shared_setting_and_an_optimiser_of_another_model_are_refused(tmp_path):
    model, args = linear_model(), (random_split(16), CLIP)
    ours = {"optimiser": torch.optim.SGD(model.parameters(), lr=1.0), "key": {"lr": 1.0}}
    for name in ("lr", "loss_fn"):
        ours["key"] = {name: 1.0}
        with pytest.raises(ValueError, match=f"key: '{name}' is in every key already"):
            common.fine_tune(settings(tmp_path), "run", model, *args, **ours)
    with pytest.raises(ValueError, match="optimiser was made of another model's parameters"):
        common.fine_tune(settings(tmp_path), "run", linear_model(), *args, **ours | {"key": {}})


def test_a_training_whose_short_batch_is_left_out_has_another_name(tmp_path, monkeypatch):
    def name(n):  # batches of 8
        args = settings(tmp_path, batch=8), "run", linear_model(), random_split(n), CLIP
        return common.image_training(*args).path.name

    alone = name(66), name(68)
    monkeypatch.setattr(common, "world", lambda: 4)
    assert name(66) != alone[0] and name(68) == alone[1]  # 2 images for 4 processes; 4


def smooth(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.9)


SAME = lambda logits, labels: smooth(logits, labels)  # noqa: E731


class Scaled:
    def __init__(self, by):
        self.by = by

    def loss(self, logits, labels):
        return self.by * F.cross_entropy(logits, labels)


def test_functions_that_a_loss_is_given_are_part_of_the_name():
    def name_of(given):
        def loss_fn(images, labels):
            return given(images, labels)

        return common.hash_of(common.code_of(loss_fn))

    given = F.cross_entropy, smooth, lambda x, y: x[y].sum(), lambda x, y: 2 * x[y].sum()
    given += functools.partial(smooth, by=1), functools.partial(smooth, by=2), SAME
    given += Scaled(1).loss, Scaled(2).loss, lambda x, y, by=3: by, lambda x, y, by=4: by
    assert len({name_of(loss) for loss in given}) == len(given)
    for loss in (smooth, SAME, Scaled(1).loss):
        assert name_of(loss) == name_of(loss)


def test_two_losses_in_one_function_and_two_that_call_each_other_have_names():
    def first(x):
        return second(x)

    def second(x):
        return first(x)

    assert common.hash_of(common.code_of(first)) != common.hash_of(common.code_of(second))
