"""lab/er_published.py: trajectories from their files."""

import contextlib
import dataclasses
import io
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_er_study import edited, follow, make_world, put  # noqa: E402

import common  # noqa: E402
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
def points(world):
    return follow(world)


@pytest.fixture(scope="module")
def path(world, points):
    (found,) = Path(world[0].out).glob("trajectories/zero-shot-*.csv")
    return found


def test_replay_of_the_files_says_what_the_live_run_said(world, path, points):
    config, *_, measurement = world
    bed = dataclasses.replace(measurement.testbed, name="testbed")
    live_one = dataclasses.replace(measurement, testbed=bed, draws=0)
    with contextlib.redirect_stdout(io.StringIO()) as live:
        er_published.report(config, live_one, points)
    figure = Path(config.out) / "figures/er_study.csv"
    drawn = figure.read_text()
    assert drawn.count("\n") == 1 + 24 + len(points) // 3
    _, text = run("plot", path, "--out", config.out)
    assert text == live.getvalue() and figure.read_text() == drawn
    assert "effective robustness on" in text
    assert figure.with_suffix(".png").stat().st_size > 10_000


FAULTS = [  # an edit of a trajectory, the words of the refusal
    (put(3, "ood", ""), "line 3, column ood: '', could not convert"),
    (put(2, "step", "first"), "line 2, column step: 'first', invalid literal"),
    (lambda rows: [row[1:] for row in rows], "no column 'run'; it has shift, id"),
    (put(3, "er", "61.2"), "line 3: step 0 of .*, on UCI has er 61.2, .* with another testbed"),
    (put(3, "ood", "61.2"), "line 3: .* has er .* it was measured with another testbed"),
    (put(2, "shift", "Foo"), "line 2: .* on Foo has no line; the testbed has Scan, UCI"),
    (put(2, "init", "frozen"), "line 2: .* has init 'frozen'; expected zero-shot"),
    (lambda rows: rows + rows[1:], "step 0 of zero-shot, lr 0.001, seed 0, on Scan is there twice"),
    (lambda rows: [*rows, rows[1][:9]], "9 cells under 15 columns"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), FAULTS)
def test_a_wrong_trajectory_is_refused_by_line_and_column(path, edit, words, tmp_path):
    shutil.copy(path.parent / "testbed.csv", tmp_path)
    edited(path, tmp_path / "x.csv", edit)
    with pytest.raises(common.InputError, match=words):
        er_published.saved(f"{tmp_path}/*.csv")


def test_a_copied_trajectory_and_another_testbeds_are_refused(world, path, tmp_path):
    for file in (path, path.parent / "testbed.csv"):
        shutil.copy(file, tmp_path)
    shutil.copy(path, tmp_path / "copy.csv")
    with pytest.raises(common.InputError, match="step 0 of .* on Scan is there twice"):
        er_published.saved(f"{tmp_path}/*.csv")
    bed = world[4].testbed
    bed = dataclasses.replace(bed, n=bed.n | {"UCI": 120}, right={})
    testbeds.write(bed, tmp_path / "testbed.csv")
    with pytest.raises(common.InputError, match="was measured with another testbed"):
        run("plot", f"{tmp_path}/{path.name}", "--out", tmp_path)


def test_no_trajectories_are_said_in_one_sentence(tmp_path):
    with pytest.raises(common.InputError, match="no trajectories, or no testbed.csv by them"):
        run("plot", tmp_path / "*.csv", "--out", tmp_path)


def test_a_model_in_its_own_baseline_is_refused_at_any_size(tmp_path):
    def edit(rows):
        rows.append(["MODEL@999", "studied", *rows[1][2:]])
        rows[1][0] = "MODEL@224"

    edited(testbeds.FOLDER / "cifar10.csv", tmp_path / "own.csv", edit)
    with pytest.raises(common.InputError, match="MODEL is in its own baseline on .*; take it out"):
        run(tmp_path / "own.csv", "--draws", 20, "--out", tmp_path)
