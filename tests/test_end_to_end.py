"""The scripts from the command line to the table, on trees made here and on the digits."""

import csv
import importlib
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from small import TINY, few_digits, picture, use_digits

import common
import vrf
from data import trees

RECIPE = "--epochs 6 --lr 1e-3 --methods E2E-FT --ensemble E2E-FT".split()


def run(module, *words):
    """A script's rows."""
    return module.main([str(word) for word in words])


def right(rows, method):
    """{split: list of bool} of a method."""
    (row,) = [row for row in rows if row.method == method]
    return {split: right.tolist() for split, right in row.right.items()}


def share(rows, method, split):
    return np.mean(right(rows, method)[split])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Shared by the runs on `tree`, which train once."""
    return tmp_path_factory.mktemp("out")


def on_tree(tree, out, *words):
    return run(vrf, "--data", tree, "--out", out, *TINY, *RECIPE, *words)


@pytest.fixture(scope="module")
def plain(tree, out):
    return on_tree(tree, out)


# --- four scripts, twice ---

DIGITS = "--epochs 2 --batch 32 --warmup 2 --device cpu".split()
SCRIPTS = {
    "vrf": "--methods LC,E2E-FT --ensemble E2E-FT",
    "carot": "--methods FT,CaRot --ema-every 3",
    "spd": "--jobs 1 --methods AdamW,Adam-SPD --spd-lambda 1",
    "er_study": "--jobs 1 --quick --draws 50 --kinds zero-shot,head-only",
}


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_a_second_run_trains_nothing_and_prints_the_same(script, tmp_path, monkeypatch, capsys):
    use_digits(monkeypatch, few_digits(tmp_path / "digits"))
    module, out = importlib.import_module(script), tmp_path / "out"
    words = [*DIGITS, *SCRIPTS[script].split(), "--out", out]
    run(module, *words)
    first = capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in out.glob("c*/*")}
    assert "epoch 2 of 2" in first.err
    run(module, *words)
    second = capsys.readouterr()
    assert "epoch" not in second.err
    assert files == {path: path.stat().st_mtime_ns for path in out.glob("c*/*")}
    said = [[line for line in text.splitlines() if re.search(r"\d\.\d.*\d\.\d", line)]
            for text in (first.out, second.out)]  # fmt: skip
    assert len(said[0]) > 3 and said[0] == said[1]  # the lines of tables


def test_help_is_quick_it_imports_neither_open_clip_nor_torchvision():
    code = (
        "import sys, vrf, carot, spd, er_study\n"
        "try: vrf.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'open_clip', 'torchvision', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=common.HERE, check=True, capture_output=True)


def test_every_command_of_the_readme_names_a_script_and_options_that_exist():
    text = (common.HERE / "README.md").read_text()
    commands = re.findall(r"^\s+(?:\$ )?(python \S+\.py[^#\n]*)", text, re.MULTILINE)
    assert len(commands) > 10
    for command in commands:
        _, script, *words = shlex.split(command)
        assert (common.HERE / script).is_file(), command
        if script.removesuffix(".py") in SCRIPTS:
            fields = importlib.import_module(script.removesuffix(".py")).Config.__dataclass_fields__
            for word in (word for word in words if word.startswith("--")):
                name = word[2:].partition("=")[0].removeprefix("no-").replace("-", "_")
                assert name in fields, command


# --- an ImageNet tree ---


def test_an_imagenet_tree_gives_table_figure_and_counts(tmp_path, monkeypatch, capsys):
    templates = trees.clip_templates()[:5]  # of 80, which would take most of the time
    monkeypatch.setattr(trees, "clip_templates", lambda: templates)
    rng, data, out = np.random.default_rng(0), tmp_path / "imagenet", tmp_path / "out"
    for part, n in (("train", 4), ("val", 2), ("sketch", 1), ("imagenet-r", 3)):
        for wnid in ("n01440764", "n01443537", "n01491361"):
            (data / part / wnid).mkdir(parents=True)
            for i in range(n):
                picture(rng, rng.random(), (60, 40)).save(data / part / wnid / f"{i}.JPEG")
    counts = {"test": 6, "ImageNet-Sketch": 3, "ImageNet-R": 9}
    rows = run(vrf, "--data", data, "--out", out, *TINY, *RECIPE, "--epochs", "1")
    text = capsys.readouterr().out
    assert "MISSING, so not evaluated: ObjectNet" in text
    vrf.print_tables(vrf.Config(model="ViT-B-32"), common.open_data(str(data)), rows)
    assert "paper, Table" in capsys.readouterr().out
    shares = {r.method: [100 * share(rows, r.method, split) for split in counts] for r in rows}
    for method, found in shares.items():
        line = re.search(rf"^{re.escape(method)}  +(\d.*)", text, re.MULTILINE)[1]
        printed = [float(x) for x in line.split()[: len(counts) + 1]]
        assert printed == pytest.approx([*found, sum(found[1:]) / 2], abs=0.051)
    kept = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in kept] == list(shares)
    for r in kept:
        assert {split: found["n"] for split, found in r["right"].items()} == counts
    with open(out / "figures/vrf.csv", newline="") as file:
        (point,) = [r for r in csv.DictReader(file) if r["series"] == "VRF"]
    found = shares["E2E-FT +VRF"]
    assert (float(point["x"]), float(point["y"])) == pytest.approx((found[0], sum(found[1:]) / 2))


# --- VRF on a checkpoint; selection ---


def test_our_own_checkpoint_as_finetuned_repeats_its_rows(tree, out, plain):
    (checkpoint,) = out.glob("checkpoints/e2e-ft-*.pt")
    rows = on_tree(tree, out, "--finetuned", checkpoint)
    assert [r.choice for r in rows] == [r.choice for r in plain]
    for r in plain:
        assert right(rows, r.method.replace("E2E-FT", "Fine-tuned")) == right(plain, r.method)


def test_a_whole_clip_as_finetuned_gets_its_head_from_its_own_text_tower(tree, out, tmp_path):
    torch.manual_seed(7)
    clip = common.load_clip(vrf.Config(model="tiny_clip", pretrained="random"))
    torch.save({"state_dict": clip.model.state_dict()}, tmp_path / "whole.pt")
    tuned = on_tree(tree, out, "--finetuned", tmp_path / "whole.pt")
    alone = on_tree(tree, out, "--methods", "LC", "--weights", tmp_path / "whole.pt")
    assert right(tuned, "Fine-tuned") == right(alone, "Zero-shot") != right(tuned, "Zero-shot")


def test_wrong_labels_in_a_shift_set_change_no_choice(tree, out, plain, monkeypatch):
    open_data = common.open_data

    def poisoned(*words):
        data = open_data(*words)
        for split in data.shifts:
            split.labels = (split.labels + 1) % 10
        return data

    monkeypatch.setattr(common, "open_data", poisoned)
    rows = on_tree(tree, out)
    assert [r.choice for r in rows] == [r.choice for r in plain]
    for r in plain:
        assert right(rows, r.method)["test"] == right(plain, r.method)["test"]
    assert share(rows, "E2E-FT", "again") < 0.3 < share(plain, "E2E-FT", "again")


def test_selection_code_takes_what_is_best_on_the_reported_set(tree, out, plain, capsys):
    rows = on_tree(tree, out, "--selection", "code")
    assert "whatever is chosen on it sees the reported images" in capsys.readouterr().out
    assert right(rows, "E2E-FT") == right(plain, "E2E-FT")  # the same training
    for method in ("E2E-FT +WSE", "E2E-FT +OSE", "E2E-FT +VRF"):
        assert share(rows, method, "test") >= share(plain, method, "test")
    assert [r.choice for r in rows] != [r.choice for r in plain]


def test_without_a_failure_set_vrf_is_zero_shot_and_the_run_finishes(tree, out, capsys):
    rows = on_tree(tree, out, "--lr", "0", "--epochs", "1")
    assert "VRF is zero-shot" in capsys.readouterr().out
    assert right(rows, "E2E-FT +VRF") == right(rows, "Zero-shot")


def test_an_epoch_of_digits_tell_the_story(tmp_path, monkeypatch, capsys):
    sets = {"train": 1500, "val": 150, "test": 600, "uci": 150, "fonts": 150, "sketch": 150}
    use_digits(monkeypatch, few_digits(tmp_path / "digits", sets))
    words = "--epochs 1 --methods E2E-FT --ensemble E2E-FT --device cpu --out".split()
    rows = run(vrf, *words, tmp_path)
    zs, ft, mixed = (common.accuracies(rows, m) for m in ("Zero-shot", "E2E-FT", "E2E-FT +VRF"))
    assert zs["test"] == pytest.approx(77.9, abs=3)  # data/README.md
    assert ft["test"] > zs["test"] + 5
    assert common.mean_shift(ft) < common.mean_shift(zs)
    assert common.mean_shift(ft) < common.mean_shift(mixed)
    text = capsys.readouterr().out
    sentences = re.findall(r"^(\d)\. ", text[text.index("results:") :], re.MULTILINE)
    assert sentences == ["1", "2", "3"]
