"""Two processes under torchrun give what one process gives: gradients, weights, tables."""

import subprocess
import sys

import pytest
import ranks
import torch
from small import make_tree

import common
import vrf


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(one process's results, [of rank 0, of rank 1], folder of the one, of the two, what was said)

    43 images in batches of 8: of the last rank 0 has one. 17 test images in twos of 8: the last is
    joined to those before. Two images are unreadable. At the end rank 1 is killed in a training.
    """
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    tree = make_tree(one / "tree")
    (tree / "again").unlink()
    for left_out in ("train/*/[4-7]", "val/*/[23]", "test/*/[23]", "test/hue_[012]/1"):
        for path in tree.glob(f"{left_out}.jpg"):
            path.unlink()
    for name in ("a", "b", "c"):
        (tree / f"train/hue_2/{name}.jpg").write_bytes((tree / "train/hue_2/0.jpg").read_bytes())
    for name in ("train/hue_1", "noisy/hue_1"):
        (tree / name / "bad.jpg").write_bytes((tree / name / "0.jpg").read_bytes()[:200])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tests/ranks.py", str(tree), str(two)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, cwd=common.HERE, **options)
    alone = ranks.compute(tree, one)
    said, _ = job.communicate(timeout=300)
    assert job.returncode != 0 and (two / "rank-1.pt").exists(), said
    of_ranks = [torch.load(two / f"rank-{r}.pt", weights_only=False) for r in (0, 1)]
    return alone, of_ranks, one, two, said


def test_gradients_of_the_whole_batch_and_spd_of_sharded_weights_are_those_of_one_process(runs):
    one, two, *_ = runs
    for rank in two:
        for name in ("gradients", "sharded"):
            torch.testing.assert_close(rank[name], one[name], rtol=1e-12, atol=1e-12)


def test_the_statistics_of_batch_norm_are_rank_0s_after_every_step(runs):
    _, (first, second), *_ = runs
    assert all(map(torch.equal, first["statistics"], second["statistics"]))
    assert not torch.equal(first["statistics"][0], first["statistics"][-1])


@pytest.mark.parametrize("script", list(ranks.COMMANDS))
def test_two_processes_train_the_weights_and_fill_the_table_of_one(runs, script):
    one, two, at_one, at_two, _ = runs
    for row, other, third in zip(one[script], two[0][script], two[1][script], strict=True):
        for split, right in row.right.items():
            assert torch.equal(other.right[split], third.right[split])
            # a random network's near-ties may fall the other way after rounding
            assert (other.right[split] != right).sum() <= 1, (row.method, split)
    checkpoints = sorted((at_one / script / "checkpoints").glob("*.pt"))
    assert checkpoints
    for path in checkpoints:  # the same name: a hash of start, data and recipe
        a = common.load_tensors(path)
        b = common.load_tensors(at_two / script / "checkpoints" / path.name)
        gaps = [(a["model"][k] - b["model"][k]).abs().flatten() for k in a["model"]]
        # Adam's steps are about lr long; a local mean instead of the batch's differs by a tenth
        assert torch.cat(gaps).double().mean() < 0.01 * a["lr"] * a["steps"], path.name


def test_rank_0_alone_prints_and_writes(runs):
    one, _, _, two, said = runs
    assert said.count("2 processes") == 1 and said.count("results: ") == 3
    assert "noisy: 1 of 31 images" in said
    for script in ranks.COMMANDS:
        lines = (two / script / "results.jsonl").read_text().splitlines()
        assert len(lines) == len(one[script])


def test_a_dead_process_ends_the_job_and_one_process_goes_on(runs, monkeypatch, capsys):
    *_, one, two, _ = runs

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        vrf.main(ranks.arguments(one / "tree", two / "killed", *ranks.LONG))
    (path,) = two.glob("killed/checkpoints/*.pt")
    step = common.load_tensors(path)["step"]
    assert f"continues {path} at step {step} of 2400" in capsys.readouterr().out and step > 0
