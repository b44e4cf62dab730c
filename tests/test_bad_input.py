"""What users really do, in tables: the situation, and the words that must appear.

COMMANDS end in one sentence and exit code 2, before the first training. SETUPS run, and say what is
odd in their first lines. ERRORS are what a script may run into later. CALLS are functions that
somebody uses in a script of their own.
"""

import importlib
import json
import math
import os
import sys

import numpy as np
import open_clip
import pytest
import torch
from small import image_files

import common

COMMANDS = """
vrf --lrr 1                               | there is no option --lrr; did you mean '--lr'?
vrf --batch two                           | argument --batch: invalid int value
vrf --epochs 0                            | --epochs 0: expected a number, at least 1
carot --weight-decay nan                  | --weight-decay nan: expected a number, at least 0
vrf --lr 1e38                             | --lr 1e+38: expected a number, at most
vrf --p 2                                 | --p 2.0: expected a number, at most 1
vrf --seed 99999999999999999999999        | --seed
carot --precision fp8                     | argument --precision: invalid choice: 'fp8'
spd --device gpu                          | --device gpu: not usable here
er_study --device cuda:99                 | --device cuda:99: not usable here
carot --out {file}/below                  | {file}/below: Not a directory
spd --out {long}                          | File name too long
vrf --model ViT-B-61                      | no 'ViT-B-61'; did you mean 'ViT-B-16'
vrf --model RN50 --pretrained opanai      | did you mean 'openai'
vrf --pretrained {tiny} --model RN50      | a local file goes to --weights
vrf --data digitss                        | did you mean 'digits'
vrf --data entity30:{empty}               | has no train/
spd --data {tree} --val-fraction 2        | between 0 and 1
spd --data {tree}/reel                    | {tree}/reel does not exist
vrf --data {bare} --skip-bad-images       | bare/train/1: no image of this class can be read
vrf --data {bare} {random}                | cannot be read as an image
vrf --weights {none}/clip.pt              | no weights at
vrf --weights {file}                      | {file}
vrf --weights {cut}                       | {cut}
vrf --weights {lfs}                       | git lfs pull
vrf --model RN50 --weights {tiny}         | does not fit this model
vrf {random} --model tiny_hf              | install what it asks for (SigLIP's needs transformers)
vrf {random} --model tiny_coca            | its image tower (CoCa) gives tokens, too
vrf --finetuned {none}/ft.pt              | no weights at
vrf --finetuned {empty}                   | the folder holds
vrf --methods E2E-FTT                     | did you mean 'E2E-FT'
vrf --ensemble LPFT                       | did you mean 'LP-FT'
vrf --ab 1,0                              | --ab
vrf --ab 1.5,0.6,abc                      | --ab
carot --methods FLIP                      | did you mean 'FLYP'
spd --methods Adam-SDP                    | did you mean 'Adam-SPD'
spd --spd-lambda 1,nan                    | --spd-lambda 1,nan: expected positive numbers
er_study --data {tree}                    | testbed
er_study --kinds zeroshot                 | did you mean 'zero-shot'
er_study --testbed cifar11                | cifar10
er_study --testbed {file}                 | {file}
"""
SETUPS = """
                                          | training: 80 images, 10 epochs, 10 steps of 512 images
                                          | warm-up of 1 steps, cut from 500 to a tenth of all
                                          | note: --batch 512 is more than all training images
                                          | note: ID val has 40 images: what is chosen on it is left
--batch 8                                 | 100 steps of 8 images, warm-up of 10 steps, cut
--batch 1 --epochs 40                     | 3,200 steps of 1 images, warm-up of 500 steps
--warmup 500                              | note: --warmup 500 is no shorter than the training
--val-fraction 0.1                        | --val-fraction has no effect where ID val is not held
--weights w.pt --pretrained openai        | --pretrained has no effect beside --weights
"""


def rows(table):
    """[(command, words)], one a line."""
    lines = [line.rpartition(" | ") for line in table.strip("\n").splitlines()]
    return [(command.strip(), words.strip()) for command, _, words in lines]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """{name: path} of what the tables mention."""
    root = tmp_path_factory.mktemp("bad")
    at = {name: root / name for name in ("none", "file", "lfs", "empty", "tree", "bare", "cut")}
    at["file"].write_text("words")
    at["lfs"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 6\n")
    at["empty"].mkdir()
    for name in ("tree", "bare"):
        image_files(at[name])
        (at[name] / "test").symlink_to(at[name] / "train")
    for path in at["bare"].glob("train/1/*"):
        path.write_bytes(b"")
    torch.save({"visual.proj": torch.zeros(9999)}, at["cut"])
    at["cut"].write_bytes(at["cut"].read_bytes()[:5000])
    tiny = json.loads((common.EMBEDDED / "tiny_clip.json").read_text())
    coca = {"custom_text": True, "vision_cfg": tiny["vision_cfg"] | {"output_tokens": True}}
    coca["multimodal_cfg"] = {"context_length": 16, "width": 64, "heads": 1, "layers": 1}
    hf = {"text_cfg": tiny["text_cfg"] | {"hf_tokenizer_name": "nobody/nothing"}}
    for name, part in {"tiny_hf": hf, "tiny_coca": coca}.items():
        (root / f"{name}.json").write_text(json.dumps(tiny | part))
        open_clip.add_model_config(root / f"{name}.json")
    at |= {"tiny": common.EMBEDDED / "tiny_clip.npz", "long": "x" * 5000}
    return at | {"random": "--pretrained random --model tiny_clip"}


@pytest.mark.parametrize(("command", "words"), rows(COMMANDS))
def test_a_bad_command_ends_in_one_sentence_and_exit_code_two(
    command, words, bad, tmp_path, monkeypatch, capsys
):
    script, *given = command.format(**bad).split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *given])
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stopped:
        common.run(importlib.import_module(script).main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words.format(**bad) in said and "usage:" not in said
    sentence = said.splitlines()[-1]
    assert sentence.startswith(f"{script}.py: ") and 20 < len(sentence) < 5900
    assert not list(tmp_path.rglob("checkpoints/*"))  # refused before the first training


@pytest.mark.parametrize(("given", "words"), rows(SETUPS))
def test_a_run_says_first_what_it_trains_and_what_is_odd(given, words, tree, tmp_path, capsys):
    common.setup(common.Run, ["--data", str(tree), "--out", str(tmp_path), *given.split()], "", {})
    assert words in capsys.readouterr().out


ERRORS = [
    (MemoryError(), "out of memory (MemoryError); a smaller --batch"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "--micro-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--precision bf16"),
    (PermissionError(13, "Permission denied", "/data/x"), "/data/x: Permission denied"),
    (common.InputError("a worker died; out of memory?"), ": a worker died; out of memory?\n"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_what_a_machine_has_not_or_forbids_is_one_sentence(error, words, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stopped:
        common.run(main)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        common.run(main)


P, LABELS = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
CALLS = [
    (lambda: common.accuracy(P * math.nan, LABELS), "scores hold inf or nan"),
    (lambda: common.ece(P, LABELS[:1]), "integer labels [N], got (2, 2) and torch.int64 (1,)"),
    (lambda: common.ece(9 * P, LABELS), "are they logits?"),
    (lambda: common.accuracy(P, LABELS - 1), "labels must lie in 0 to 1"),
    (lambda: common.temperature(P, LABELS, "paper"), "criterion 'paper'"),
    (lambda: common.choose(",", ["FT", "LC"], "--m"), "expected some of FT, LC"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words for _, words in CALLS])
def test_functions_refuse_what_would_give_a_wrong_number(call, words):
    with pytest.raises(common.InputError) as raised:
        call()
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, bool])
def test_metrics_take_labels_of_every_integer_type_arrays_and_lists(kind):
    p, labels = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]), np.array([0, 1, 0]).astype(kind)
    for given in ((p, labels), (p.tolist(), labels.tolist())):
        assert common.accuracy(*given) == pytest.approx(2 / 3)
        assert common.ece(*given) == pytest.approx((0.1 + 0.2 + 0.6) / 3)
        assert common.temperature(*given, "nll") == pytest.approx(1.1, abs=1)


def test_what_a_cluster_left_in_the_environment_is_said(monkeypatch):
    for name in [name for name in os.environ if name.endswith("RANK") or name == "MASTER_ADDR"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "")
    common.init_distributed("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.InputError, match="RANK is not set"):
        common.init_distributed("cpu")


def test_a_home_folder_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = common.parse(common.Run, ["--out", "~/runs", "--weights", "~/w.npz"], "")
    assert (config.out, config.weights) == (f"{tmp_path}/runs", f"{tmp_path}/w.npz")
    assert (tmp_path / "runs").is_dir()
