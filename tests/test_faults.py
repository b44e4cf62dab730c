"""Two kills and each single fault of tests/faults.py, on VRF; what only a function can show."""

import argparse
import os
import time

import faults
import pytest
import torch
from torch import nn

import common


def test_a_killed_or_damaged_run_loses_its_last_interval_at_most():
    chosen = ["Ctrl-C", "one bit of a checkpoint", "one bit of a cache", "two runs, one folder"]
    chosen += ["a loader process killed"]  # the rest: in other tests
    options = argparse.Namespace(kills=2, script=["vrf"], faults=chosen)
    with faults.small_digits() as folder:
        rows, found = faults.tables(options, folder)
    (row,) = rows
    assert row[2:4] == [2, 2], row
    assert [line for line in found if line[2] == "WRONG"] == [] and len(found) == len(chosen)


def test_weights_that_are_not_finite_do_not_replace_a_good_checkpoint(tmp_path):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 4.0)
    path, optimiser = tmp_path / "c.pt", torch.optim.SGD(module.parameters(), lr=4.0)

    def loss_fn(batch):  # at 0, where the second step is made, its slope is infinite
        return module.weight.sqrt().sum() * 4

    steps = iter([(torch.zeros(1),)] * 3)
    with pytest.raises(common.InputError) as raised:
        common.fit(
            module, loss_fn, lambda first: steps, optimiser, steps=3, save_every=1, path=path,
            schedule=lambda *_: 1.0,
        )  # fmt: skip
    said = str(raised.value)
    assert "weights are inf or nan after step 1" in said and f"{path} is from before" in said
    assert common.load_tensors(path)["step"] == 1


def test_what_a_killed_run_left_half_written_goes_with_a_later_write(tmp_path):
    path, old, new = (tmp_path / x for x in ("a.pt", ".a.pt.1", ".a.pt.2"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    assert common.try_write(path, lambda file: file.write_text("x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.pt.2", "a.pt"]


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    common.append(path, "one\n")
    with open(path, "a") as file:
        file.write("tw")
    common.append(path, "three\n")
    common.append(path, "four\n")
    assert path.read_text() == "one\ntw\nthree\nfour\n"


def test_every_single_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"model": {"w": torch.arange(32.0)}, "step": 1}, path)
    whole = path.read_bytes()
    kept = common.load_tensors(path)
    missed = []
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        try:
            found = common.load_tensors(path)
        except common.InputError as error:
            assert str(path) in str(error)
        else:  # padding, or a second copy of a name
            same = found["step"] == 1 and torch.equal(found["model"]["w"], kept["model"]["w"])
            missed += [] if same else [i]
    assert missed == []
