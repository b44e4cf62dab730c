"""What users really type, in one table: a script says what is wrong in one sentence, exit code 2.

A line is: command | words that the sentence has; {names} stand for paths that `bad` makes.
"""

import importlib
import math
import os
import sys

import pytest
import torch
from small import image_files

import common

COMMANDS = """
vrf --lrr 1                               | unrecognized arguments: --lrr
vrf --batch two                           | argument --batch: invalid int value
vrf --epochs 0                            | --epochs 0: expected a number, at least 1
carot --weight-decay nan                  | --weight-decay nan: expected a number, at least 0
vrf --p 2                                 | --p 2.0: expected a number, at most 1
vrf --seed 99999999999999999999999        | --seed
carot --precision fp8                     | argument --precision: invalid choice: 'fp8'
spd --device gpu                          | --device gpu: not usable here
er_study --device cuda:99                 | --device cuda:99: not usable here
carot --out {file}/below                  | expected a folder, new or old
spd --out {long}                          | File name too long
vrf --model ViT-B-61                      | no 'ViT-B-61'; did you mean 'ViT-B-16'
vrf --model RN50 --pretrained opanai      | did you mean 'openai'
vrf --data digitss                        | did you mean 'digits'
vrf --data entity30:{empty}               | has no train/
spd --data {tree} --val-fraction 2        | between 0 and 1
vrf --weights {none}/clip.pt              | no weights at
vrf --weights {file}                      | {file}
vrf --weights {cut}                       | {cut}
vrf --model RN50 --weights {tiny}         | does not fit this model
vrf --finetuned {none}/ft.pt              | no weights at
vrf --methods E2E-FTT                     | did you mean 'E2E-FT'
vrf --ensemble LPFT                       | did you mean 'LP-FT'
vrf --ab 1,0                              | --ab
vrf --ab 1.5,0.6,abc                      | --ab
carot --methods FLIP                      | did you mean 'FLYP'
spd --methods Adam-SDP                    | did you mean 'Adam-SPD'
spd --spd-lambda 1,nan                    | --spd-lambda 1,nan: expected positive numbers
spd --data {tree} --id reel               | {tree}/reel does not exist
er_study --data {tree}                    | testbed
er_study --kinds zeroshot                 | did you mean 'zero-shot'
er_study --testbed cifar11                | cifar10
er_study --testbed {file}                 | {file}
er_study --plot {none}/*.csv              | no trajectories
"""
LINES = [line.rpartition(" | ") for line in COMMANDS.strip().splitlines()]
CASES = [(command.strip(), words.strip()) for command, _, words in LINES]


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """{name: path} of what the table mentions."""
    root = tmp_path_factory.mktemp("bad")
    at = {name: root / name for name in ("none", "file", "empty", "tree", "cut")}
    at["file"].write_text("words")
    at["empty"].mkdir()
    image_files(at["tree"])
    (at["tree"] / "test").symlink_to(at["tree"] / "train")
    torch.save({"visual.proj": torch.zeros(9999)}, at["cut"])
    at["cut"].write_bytes(at["cut"].read_bytes()[:5000])
    return at | {"tiny": common.EMBEDDED / "tiny_clip.npz", "long": "x" * 5000}


@pytest.mark.parametrize(("command", "words"), CASES, ids=[command for command, _ in CASES])
def test_a_bad_command_ends_in_one_sentence_and_exit_code_two(
    command, words, bad, tmp_path, monkeypatch, capsys
):
    script, *given = command.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *(word.format(**bad) for word in given)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stopped:
        common.run(importlib.import_module(script).main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words.format(**bad) in said
    sentence = said.splitlines()[-1]
    assert sentence.startswith(f"{script}.py: ") and 20 < len(sentence) < 5900
    assert not list(tmp_path.rglob("checkpoints/*"))  # refused before the first training


P, LABELS = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
CALLS = [
    (lambda: common.accuracy(P * math.nan, LABELS), "scores hold inf or nan"),
    (lambda: common.ece(P, LABELS[:1]), "integer labels [N], got (2, 2) and torch.int64 (1,)"),
    (lambda: common.nll(9 * P, LABELS), "are they logits?"),
    (lambda: common.temperature(P, LABELS, "paper"), "criterion 'paper'"),
    (lambda: common.choose(",", ["FT", "LC"], "--m"), "expected some of FT, LC"),
    (lambda: common.pick_device("meta"), "--device meta: not usable"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words for _, words in CALLS])
def test_functions_refuse_what_would_give_a_wrong_number(call, words):
    with pytest.raises(common.InputError) as raised:
        call()
    assert words in str(raised.value)


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
