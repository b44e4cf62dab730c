"""common.in_processes, stopped as users stop it.

As a script, `test_jobs.py OUT EPOCHS` trains four models in OUT, two at a time.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from small import short_training  # noqa: E402

import common  # noqa: E402


def work(argv, run):
    out = Path(argv[0]) / str(run)
    out.mkdir(parents=True)
    short_training(out, epochs=int(argv[1]))


def kill_workers(pid, number):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    for worker in found.split():
        os.kill(int(worker), number)


def slow_but_for_run_1(argv, run):
    if run == 1:
        raise common.InputError("run 1 has nothing to do")
    time.sleep(60)


def test_the_error_of_a_later_run_ends_the_earlier_ones_at_once():
    start = time.monotonic()
    with pytest.raises(common.InputError, match="run 1 has nothing to do"):
        common.in_processes(slow_but_for_run_1, (), range(3), 2, "cpu")
    assert time.monotonic() - start < 50 and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("number", "whom", "code"),
    [
        (signal.SIGINT, os.killpg, 130),  # Ctrl-C in a terminal
        (signal.SIGINT, kill_workers, 130),  # the same, where the workers are the first to end
        (signal.SIGTERM, os.kill, 130),  # a cluster that wants its node back
        (signal.SIGKILL, os.kill, -9),  # out of memory
    ],
)
def test_one_signal_stops_all_processes_and_starts_no_other_run(number, whom, code, tmp_path):
    words, end = [sys.executable, __file__, str(tmp_path), "100000"], time.monotonic() + 180
    job = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, start_new_session=True)
    while len(list(tmp_path.glob("*/checkpoints/*.pt"))) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    whom(job.pid, number)
    # the children hold the pipe, too: it ends when the last of them does
    _, errors = job.communicate(timeout=80)
    assert job.returncode == code and "Traceback" not in errors, errors[-2000:]
    assert code != 130 or "interrupted; the same command continues" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    steps = [common.load_tensors(path)["step"] for path in tmp_path.glob("*/checkpoints/*.pt")]
    assert len(steps) == 2 and min(steps) > 0


if __name__ == "__main__":
    common.run(lambda: common.in_processes(work, tuple(sys.argv[1:]), range(4), 2, "cpu"))
