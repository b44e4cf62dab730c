"""Several processes under torchrun give what one process gives: losses, gradients, tables."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import ranks
import torch
from test_end_to_end import ROOT, make_tree

CLOSE = dict(rtol=1e-12, atol=1e-12)


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "2", *map(str, words)], env=environment, cwd=ROOT, text=True, **options
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(one process's results, [of rank 0, of rank 1], folder of the two).

    81 images in batches of 8: rank 0 has no part of the last. One more, in training and under
    shift, cannot be read and is skipped.
    """
    tree, out = make_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("two")
    shutil.copy(tree / "train/hue_0/0.jpg", tree / "train/hue_0/more.jpg")
    for name in ("train/hue_1", "noisy/hue_1"):
        (tree / name / "bad.jpg").write_bytes((tree / name / "0.jpg").read_bytes()[:200])
    log = open(out / "log", "w")
    job = torchrun("tests/ranks.py", tree, out, stdout=log, stderr=subprocess.STDOUT)
    alone = tmp_path_factory.mktemp("one")
    one = ranks.compute(tree, alone) | {"folder": alone}
    assert job.wait() == 0, (out / "log").read_text()
    two = [torch.load(out / f"rank-{r}.pt", weights_only=False) for r in (0, 1)]
    return one, two, out


@pytest.mark.parametrize("loss", ["contrastive", "cross-entropy"])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_loss_and_gradients_of_the_global_batch_are_those_of_one_process(runs, loss, rows):
    one, two, _ = runs
    for of in two:
        for a, b in zip(of[loss][rows], one[loss][rows], strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_training_leaves_the_same_bits_on_all_ranks_and_the_single_process_s_numbers(runs):
    one, two, _ = runs
    for a, b, c in zip(two[0]["trained"], two[1]["trained"], one["trained"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_one_process_continues_what_two_began(runs):
    one, _, out = runs
    assert torch.load(out / "cut.pt", weights_only=True)["step"] == 10
    for a, b in zip(ranks.trained(out, "cut"), one["trained"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_sharded_queries_have_the_same_distances(runs):
    one, two, _ = runs
    torch.testing.assert_close(two[0]["distances"], one["distances"])
    assert torch.equal(two[0]["distances"], two[1]["distances"])


def test_spd_of_sharded_weights_is_spd_of_whole_ones_and_fires(runs):
    one, two, _ = runs
    fired = [x for x in one["sharded"] if x.ndim == 0]
    assert len(fired) == 2 and min(fired) > 0  # of both anchors
    for of in two:
        for a, b in zip(of["sharded"], one["sharded"], strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("script", ["vrf", "carot", "spd"])
def test_every_image_counts_once_and_the_tables_agree(runs, script):
    one, two, _ = runs
    for row, other, third in zip(
        one["tables"][script], *(of["tables"][script] for of in two), strict=True
    ):
        for split, right in row["right"].items():
            assert len(other["right"][split]) == len(right)
            assert torch.equal(other["right"][split], third["right"][split])
            # a random network's near-ties may fall the other way after rounding
            assert (other["right"][split] != right).sum() <= 1, (script, row["method"], split)


@pytest.mark.parametrize("script", ["vrf", "carot", "spd"])
def test_two_processes_train_the_weights_that_one_trains(runs, script):
    one, _, out = runs
    checkpoints = sorted((one["folder"] / script / "checkpoints").glob("*.pt"))
    assert checkpoints
    for path in checkpoints:  # the same name: a hash of start, data and recipe
        a = torch.load(path, weights_only=True)
        b = torch.load(out / script / "checkpoints" / path.name, weights_only=True)
        gaps = [(a["model"][k] - b["model"][k]).abs().flatten() for k in a["model"]]
        # Adam's steps are about lr long; a local mean instead of the batch's differs by a tenth
        assert torch.cat(gaps).double().mean() < 0.01 * a["lr"] * a["steps"], path.name


def test_a_trajectory_is_followed_alike_and_written_once(runs):
    one, two, _ = runs
    assert two[0]["trajectory"] == two[1]["trajectory"] and len(one["trajectory"]) > 6
    for a, b in zip(one["trajectory"], two[0]["trajectory"], strict=True):
        assert [a[k] for k in ("run", "step", "shift")] == [b[k] for k in ("run", "step", "shift")]
        if a["shift"] != "mean":  # near-ties may fall the other way after rounding
            assert all(abs(a[k] - b[k]) <= 1 for k in ("k_id", "k_val", "k_ood"))


def test_rank_0_alone_prints_and_writes(runs):
    _, _, out = runs
    log = (out / "log").read_text()
    assert log.count("2 processes") == 1 and log.count("results: ") == 3
    assert "noisy: 1 of 31 images are unreadable" in log
    for script in ("vrf", "carot", "spd"):
        lines = (out / script / "results.jsonl").read_text().splitlines()
        assert len(lines) == len(runs[0]["tables"][script])


def test_a_dead_process_ends_the_job_and_leaves_a_checkpoint_to_go_on_from(tmp_path):
    tree, started = make_tree(tmp_path / "tree"), time.monotonic()
    words = ["vrf.py", "--data", tree, *ranks.TINY, "--epochs", 400, "--methods", "E2E-FT"]
    words += ["--out", tmp_path / "out"]
    with open(tmp_path / "log", "w") as log:
        job = torchrun(*words, stdout=log, stderr=subprocess.STDOUT)
        checkpoints = tmp_path / "out" / "checkpoints"
        while not (checkpoints.is_dir() and list(checkpoints.glob("*.pt"))):
            assert job.poll() is None and time.monotonic() - started < 120
            time.sleep(0.2)
        children = f"/proc/{job.pid}/task/{job.pid}/children"
        os.kill(int(open(children).read().split()[-1]), signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait(timeout=60) != 0 and time.monotonic() - killed < 60
    assert "SIGKILL" in (tmp_path / "log").read_text() or "-9" in (tmp_path / "log").read_text()
    saved = torch.load(next(checkpoints.glob("*.pt")), weights_only=True)
    assert 0 < saved["step"] < saved["steps"]
