"""lab/er_published.py: public files, and trajectories from their files."""

import contextlib
import csv
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_er_study import edited, follow, lines_of, make_world, put  # noqa: E402

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402
from lab import er_published  # noqa: E402


def run(*words):
    """What er_published.main returns, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = er_published.main([str(w) for w in words])
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkpoints(world):
    return follow(world)


@pytest.fixture(scope="module")
def path(world, checkpoints):
    (found,) = Path(world[0].out).glob("trajectories/zero-shot-*.csv")
    return found


# --- trajectories from their files ----------------------------------------------------------------


def test_replay_of_the_files_says_what_the_live_run_said(world, path, checkpoints):
    config, _, _, _, bed = world
    live = io.StringIO()
    with contextlib.redirect_stdout(live):
        er_study.report(config, bed, lines_of(world), checkpoints)
    _, text = run("plot", path, "--out", config.out)
    assert text == live.getvalue()
    assert "effective robustness on" in text
    assert (Path(config.out) / "figures/er_study.png").stat().st_size > 10_000
    with open(Path(config.out) / "figures/er_study.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 8 + len(checkpoints) // 3


TRAJECTORY_FAULTS = [  # an edit of a trajectory, the words of the refusal
    (put(3, "k_ood", "99"), "line 3: k_ood 99 of n_ood 60"),
    (put(3, "k_val", ""), "line 3, column k_val: '', expected a whole number"),
    (put(3, "beta", "61.2"), "line 3: beta 61.2 and er .* measured with another testbed"),
    (put(3, "n_ood", "600"), "line 3: beta .* but the testbed's line gives"),
    (put(2, "init", "frozen"), "line 2: init 'frozen'; expected zero-shot"),
    (put(2, "shift", "Foo"), "line 2: the testbed has no shift 'Foo'"),
    (put(2, "lr", "fast"), "line 2, column lr: 'fast', expected a number"),
    (lambda rows: rows + rows[1:], "line .*: .'zero-shot, lr 0.001, seed 0', 0, 'Scan'. is in"),
    (lambda rows: [*rows, rows[1][:9]], "9 cells under 25 columns"),
    (lambda rows: [row[1:] for row in rows], "no column 'run'; it has model, init"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), TRAJECTORY_FAULTS)
def test_a_wrong_trajectory_is_refused_by_line_and_column(world, path, edit, words, tmp_path):
    edited(path, tmp_path / "x.csv", edit)
    with pytest.raises(common.InputError, match=words):
        er_published.checked([tmp_path / "x.csv"], lines_of(world))


def test_a_copied_trajectory_and_another_testbeds_are_refused(world, path, tmp_path):
    copied = tmp_path / "copy.csv"
    copied.write_text(path.read_text())
    with pytest.raises(common.InputError, match="copy.csv, line 2: step 0 of .* in another file"):
        er_published.checked([path, copied], lines_of(world))
    bed = dataclasses.replace(world[4], n=world[4].n | {"UCI": 120})
    testbeds.write(dataclasses.replace(bed, right={}), tmp_path / "testbed.csv")
    with pytest.raises(common.InputError, match="it was measured with another testbed"):
        run("plot", f"{tmp_path}/*.csv", "--out", tmp_path)


def test_no_trajectories_are_said_in_one_sentence(tmp_path):
    with pytest.raises(common.InputError, match="no trajectories, or no testbed.csv by them"):
        run("plot", tmp_path / "*.csv", "--out", tmp_path)


# --- public files ---------------------------------------------------------------------------------


def write_percent(path, scale=100, rows=None):
    """imagenet2020 in the form of the public table."""
    known = testbeds.read("imagenet2020")
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["model", *known.n, "another setting"])
        for i, m in enumerate(known.models):
            share = [known.k[s][i] / n for s, n in known.n.items()]
            out.writerow([m, *("" if np.isnan(x) else f"{scale * x:.5f}" for x in share), "7"])
        out.writerows(rows or [])
    return known


def test_a_public_table_in_percent_becomes_counts_and_its_blanks_nan(tmp_path):
    known = write_percent(tmp_path / "table.csv")
    bed = er_published.read(tmp_path / "table.csv")
    assert bed.studied == known.studied and np.isnan(bed.k["imagenet-r"]).any()
    for s in known.n:
        np.testing.assert_array_equal(bed.k[s], known.k[s])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1}, "column val: nothing is above 1 %; shares of 1?"),
        ({"rows": [["FixPNASNet", *"1111117"]]}, "line 208: .'FixPNASNet',. is in line 5, too"),
        ({"rows": [["x", "101", *"111117"]]}, "column val: '101', expected a number from 0 to 100"),
        ({"rows": [["x", "n/a", *"111117"]]}, "line 208, column val: 'n/a', expected a number"),
    ],
)
def test_a_wrong_public_table_is_refused_by_line_and_column(options, words, tmp_path):
    write_percent(tmp_path / "table.csv", **options)
    with pytest.raises(common.InputError, match=words):
        er_published.read(tmp_path / "table.csv")


def test_a_broken_public_model_is_left_out_with_a_sentence(tmp_path, capsys):
    bits = np.packbits(np.eye(3, 16, dtype=bool), axis=1)
    np.savez(tmp_path / "x.npz", models=["a", "fv_16k", "b"], val=bits, **{"val/n": 16})
    bed = er_published.read(tmp_path / "x.npz")
    assert bed.models == ["a", "b"] and bed.right["val"].shape == (2, 16)
    assert "fv_16k is left out: its public ImageNetV2 predictions" in capsys.readouterr().out
