"""Reading weights: every form of file that people have, and sentences for what is no weights."""

import collections
import copy
import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
from data import checkpoints, pickles

HEAD = {"weight": torch.arange(640.0).reshape(10, 64), "bias": torch.arange(10.0)}


@pytest.fixture(scope="module")
def clip():
    weights = str(common.EMBEDDED / "tiny_clip.npz")
    model = common.load_clip(common.Run(model="tiny_clip", weights=weights)).model
    model.token_embedding = nn.Embedding(100, 64)  # 0.03 MB of file instead of 12
    return model


@pytest.fixture
def state(clip):
    return dict(clip.state_dict())


def named(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def tower(state):
    return {name: value for name, value in state.items() if name.startswith("visual.")}


def read(path, state):
    """read_classifier for a classifier of ten classes whose zero-shot head is all ones."""
    zero_shot = {"head.weight": torch.ones(10, 64), "head.bias": torch.zeros(10)}
    return checkpoints.read_classifier(path, False, tower(state) | zero_shot)


def assert_same(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == torch.float32


# forms of files


def contents(state, clip):
    """{kind: what torch.save or pickle.dump writes}"""
    wrapped = named("module.", state)
    log = collections.defaultdict(list, loss=[np.float64(1.0)])
    others = {"log": log, "history": np.zeros(3), "args": Namespace(path=Path("/data"))}
    momentum = {"state": {0: {"exp_avg": torch.ones(10, 64)}}}
    return {
        "state dict": state,
        "open_clip training": {"epoch": 1, "state_dict": wrapped},
        "training in a key of its own": {"model_state_dict": wrapped, "optimizer": momentum},
        "with other people's objects": {"state_dict": state, "seen": {1, 2}, **others},
        "whole module": clip,
        "whole parallel module": nn.DataParallel(clip),
    }


@pytest.mark.parametrize("how", ["torch.save", "torch before 1.6", "pickle.dump"])
@pytest.mark.parametrize("kind", contents({}, nn.Identity()))
def test_weights_come_back_from_every_kind_of_pickle(kind, how, clip, state, tmp_path):
    content = contents(state, clip)[kind]
    path = tmp_path / "w.safetensors"  # the suffix says nothing
    if how == "pickle.dump":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    found, metadata = checkpoints.read_weights(path)
    assert_same(found, state)
    assert metadata == ({"quick_gelu": False} if "module" in kind else {})


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_safetensors_and_npz_are_known_by_content_and_halves_become_floats(suffix, state, tmp_path):
    from safetensors.torch import save_file

    half = {name: value.half().contiguous() for name, value in state.items()}
    save_file(half, tmp_path / f"s{suffix}")
    with open(tmp_path / f"n{suffix}", "wb") as file:
        np.savez_compressed(file, **{name: value.numpy() for name, value in half.items()})
    for name in "sn":
        found, _ = checkpoints.read_weights(tmp_path / f"{name}{suffix}")
        assert_same(found, {name: value.float() for name, value in half.items()})


FOREIGN = """
import torch

class ImageClassifier(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.image_encoder = torch.nn.Module()
        self.image_encoder.model = model
        self.image_encoder.train_preprocess = transform
        self.classification_head = ClassificationHead(64, 10)

class ClassificationHead(torch.nn.Linear):
    pass

class QuickGELU(torch.nn.Module):
    pass

def transform(image):
    return image

open("imported", "w").close()
"""


@pytest.mark.parametrize("how", ["pickle.dump", "torch.save"])
def test_a_module_written_whole_is_read_without_its_code(how, clip, state, tmp_path, monkeypatch):
    """As wise-ft, FLYP, CaRot and VRF write them; the package is gone when the file is read."""
    (tmp_path / "wise_src.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import wise_src

    module = wise_src.ImageClassifier(copy.deepcopy(clip))
    module.image_encoder.model.gelu = wise_src.QuickGELU()
    with open("checkpoint_10.pt", "wb") as file:
        (pickle.dump if how == "pickle.dump" else torch.save)(module, file)
    Path("imported").unlink()
    del sys.modules["wise_src"]
    found, metadata = read("checkpoint_10.pt", state)
    assert "wise_src" not in sys.modules and not Path("imported").exists()
    assert metadata["quick_gelu"] is True
    assert_same(found, tower(state) | named("head.", module.classification_head.state_dict()))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("write", [torch.save, lambda x, f: Path(f).write_bytes(pickle.dumps(x))])
def test_a_hostile_pickle_is_not_run(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"visual.w": torch.zeros(1), "x": Hostile()}, "hostile.pt")
    checkpoints.read_weights("hostile.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("attribute", [b"evil!", b"__code__"])
def test_a_pickle_sets_no_attribute_of_what_it_may_call(attribute, tmp_path):
    key = b"X" + len(attribute).to_bytes(4, "little") + attribute
    state = b"N}" + key + b"cos\nsystem\ns\x86"  # what setattr would get
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor\n" + state + b"b."
    (tmp_path / "w.pt").write_bytes(program)
    called = pickles.rebuild_tensor
    before = called.__code__
    with pytest.raises(common.InputError, match="is no readable checkpoint"):
        checkpoints.read_weights(tmp_path / "w.pt")
    assert called.__code__ is before and not hasattr(called, "evil!")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_a_program_and_read_only_if_openais_or_trusted(tmp_path):
    class Visual(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Linear(2, 2)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.visual(x)

    torch.jit.trace(Visual(), torch.zeros(1, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(common.InputError, match="none of OpenAI's files; refused"):
        checkpoints.read_weights(tmp_path / "ViT.pt")
    found, metadata = checkpoints.read_weights(tmp_path / "ViT.pt", trust=True)
    assert set(found) == {"visual.weight", "visual.bias"} and metadata["quick_gelu"] is True


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_gives_the_same_embeddings(tmp_path):
    from open_clip.model import CLIP

    transformers = pytest.importorskip("transformers")
    ours = CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    ).eval()
    both = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu"}
    image = {**both, "hidden_size": 32, "intermediate_size": 128, "projection_dim": 24}
    image |= {"image_size": 16, "patch_size": 8}
    text = {**both, "hidden_size": 16, "intermediate_size": 64, "max_position_embeddings": 8}
    text |= {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49}
    settings = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=24)
    whole = transformers.CLIPModel(settings).eval()
    tower = transformers.CLIPVisionModelWithProjection(settings.vision_config).eval()
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[48, 5, 7, 49, 0, 0, 0, 0]])
    wanted = whole(input_ids=tokens, pixel_values=pixels)
    for theirs, embedded in (
        (tower, tower(pixel_values=pixels).image_embeds),
        (whole, whole.visual_projection(whole.vision_model(pixels).pooler_output)),
    ):
        theirs.save_pretrained(tmp_path / "clip")
        found, metadata = checkpoints.read_weights(tmp_path / "clip")  # the folder that they wrote
        assert metadata == {"quick_gelu": False}
        checkpoints.load_matching(ours, ours.state_dict() | found, "clip")
        torch.testing.assert_close(ours.encode_image(pixels), embedded)
    torch.testing.assert_close(ours.encode_text(tokens, normalize=True), wanted.text_embeds)


# heads


PLACES = """head model.head classification_head fc classifier linear ff_head net.head
    model.classification_head image_encoder.head classification_head.0 clip.visual.head""".split()


@pytest.mark.parametrize("place", PLACES)
def test_a_trained_head_is_found_whatever_it_is_called(place, state, tmp_path, capsys):
    tensors = named("clip.", state) | named(place + ".", HEAD)
    torch.save({"state_dict": tensors}, tmp_path / "w.pt")
    found, _ = read(tmp_path / "w.pt", state)
    assert_same(found, tower(state) | named("head.", HEAD))
    said = place.removeprefix("clip.")  # in the image tower, whose prefix is dropped
    assert f"the head is {said}.weight, which" in capsys.readouterr().out


ONES = torch.ones(10, 64)


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"fc.weight": torch.ones(20, 64)}, "single head of 10 classes x 64 .* fc.weight [20, 64]"),
        ({"fc.weight": torch.ones(10, 128)}, "no single head .* [10, 128]"),
        ({"a.weight": ONES, "b.weight": ONES}, "no single head .* a.weight [10, 64], b.weight"),
        ({"head.0.weight": torch.ones(64, 64), "head.2.weight": ONES}, "no single head"),
        ({"norm.weight": torch.ones(64), "fc.weight": ONES}, "no single head .* norm.weight [64]"),
        ({"momentum.visual.proj": torch.ones(2)}, "2 image towers .* momentum."),
        ({"visual.proj.lora_A.weight": torch.ones(2)}, "LoRA adapters.*merge_and_unload"),
    ],
)
def test_a_head_that_cannot_be_used_is_refused(rest, words, state, tmp_path):
    torch.save(state | rest, tmp_path / "w.pt")
    with pytest.raises(common.InputError, match=words.replace("[", r"\[").replace("]", r"\]")):
        read(tmp_path / "w.pt", state)


def test_without_a_head_it_is_the_text_towers_or_stays_zero_shot(state, tmp_path, capsys):
    torch.save(state | {"temperature": torch.ones(3)}, tmp_path / "clip.pt")
    torch.save(tower(state), tmp_path / "tower.pt")
    assert "head.weight" not in read(tmp_path / "clip.pt", state)[0]
    said = capsys.readouterr().out
    assert "the head is made by its text tower; not used: temperature [3]" in said
    found, _ = read(tmp_path / "tower.pt", state)
    assert found["head.weight"].eq(1).all()
    assert "the head is the zero-shot one" in capsys.readouterr().out


def test_of_a_model_and_its_average_the_model_is_used_and_that_is_said(state, tmp_path, capsys):
    average = {name: value + 1 for name, value in state.items()}
    torch.save({"model": state, "model_ema": average}, tmp_path / "w.pt")
    assert_same(checkpoints.read_weights(tmp_path / "w.pt")[0], state)
    assert "of the models model, model_ema 'model' is used" in capsys.readouterr().out


# what is no weights


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with b''"),
        (b"\n<!DOCTYPE html><html></html>", "DOCTYPE.* no web page"),
        (b"PK\x03\x04 cut off", "zip"),
        (b"\x80\x04cut off", r"\("),
        (pickle.dumps({"conv1.weight": 3}), "0 image towers .*, named visual"),
    ],
)
def test_a_file_that_is_no_weights_is_named(content, words, tmp_path):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(common.InputError, match=rf"w\.pt.*{words}"):
        checkpoints.read_weights(tmp_path / "w.pt")


def test_a_folder_is_its_one_file_of_weights_or_refused(state, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    torch.save({}, tmp_path / "optimizer.pt")
    assert_same(checkpoints.read_weights(tmp_path)[0], state)
    torch.save(state, tmp_path / "second.pt")
    with pytest.raises(common.InputError, match="holds model.pt, second.pt; name one file"):
        checkpoints.read_weights(tmp_path)
    with pytest.raises(common.InputError, match="no weights at .*did you mean 'model.pt'"):
        checkpoints.read_weights(tmp_path / "modle.pt")


def test_weights_of_another_architecture_are_named_by_tensor_and_shape(clip, state):
    state["visual.proj"] = torch.zeros(3, 3)
    words = r"visual.proj should be \(128, 64\), found \(3, 3\); check --model"
    with pytest.raises(common.InputError, match=words):
        checkpoints.load_matching(clip, state, "w.pt")
