"""Breaks the four scripts on purpose and prints what is left: docs/faults.md.

    python lab/faults.py                          # 20 kills a script, then each fault: 10 minutes
    python lab/faults.py --kills 3 --script vrf --faults none

The runs are small: a few hundred of the embedded digits, two epochs, one run at a time. Each is a
process that is forked from this one, which has imported everything: a start costs a tenth of a
second. `kill -9` goes to its whole process group once it has used a given share of the CPU time of
an undisturbed run, so that the moments spread over the run on a busy machine, too. The same command
follows, in the same folder, and must end with the same files, bit for bit.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small import few_digits  # noqa: E402

import carot  # noqa: E402
import common  # noqa: E402
import er_study  # noqa: E402
import spd  # noqa: E402
import vrf  # noqa: E402
from data import trees  # noqa: E402

BRIEF = "--epochs 2 --batch 32 --warmup 2 --device cpu".split()
COMMANDS = {
    "vrf": (vrf, [*BRIEF, "--epochs", "5", "--methods", "E2E-FT", "--ensemble", "E2E-FT"]),
    "carot": (carot, [*BRIEF, "--methods", "FT,CaRot", "--ema-every", "3"]),
    "spd": (spd, [*BRIEF, "--jobs", "1", "--methods", "AdamW,Adam-SPD", "--spd-lambda", "1"]),
    "er_study": (
        er_study,
        [*BRIEF, "--quick", "--jobs", "1", "--draws", "50", "--kinds", "zero-shot,head-only"],
    ),
}
NUMBERS = itertools.count()  # of the runs' logs


class Run(multiprocessing.get_context("fork").Process):
    """One run of a script in a process group of its own, from now on."""

    def __init__(self, script, out, *words):
        super().__init__()
        self.script, self.words = script, ["--out", str(out), *map(str, words)]
        self.log = common.EMBEDDED.parent / f"{next(NUMBERS)}.log"
        self.start()

    def run(self):  # in the new process
        os.setsid()
        file = open(self.log, "w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # not pytest's
        torch.manual_seed(random.randrange(2**31))  # a new process has other numbers
        forkserver._forkserver.__init__()  # and a server of its own for its loaders
        sys.argv = [f"{self.script}.py"]
        module, own = COMMANDS[self.script]
        common.run(lambda: module.main([*own, *self.words]))

    def cpu(self):
        """Seconds of CPU time so far; None once it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return None if fields[0] == "Z" else ticks

    def until(self, condition, limit=600):
        """Wait until condition() is true, or the run has ended."""
        end = time.monotonic() + limit
        while time.monotonic() < end and self.cpu() is not None and not condition():
            time.sleep(0.002)

    def stop(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, limit=600):
        """Exit code; negative: the signal that ended it. It is killed after `limit` seconds."""
        self.join(limit)
        self.stop()
        self.join()
        return self.exitcode

    @property
    def said(self):
        return self.log.read_text(errors="replace") or "nothing was printed"


def complete(script, out, *words):
    run = Run(script, out, *words)
    return run.wait(), run.said


def numbers_of(out, rows=0):
    """All that a run found: its rows of results.jsonl (of several runs the last), its CSVs, its
    checkpoints' tensors.
    """
    found = {}
    results = out / "results.jsonl"
    if results.is_file():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        found["results.jsonl"] = [line | {"run": None} for line in lines[-rows:]]
    for path in sorted([*out.glob("figures/*.csv"), *out.glob("trajectories/*.csv")]):
        found[path.name] = path.read_bytes()
    for path in sorted(out.glob("checkpoints/*.pt")):
        saved = torch.load(path, weights_only=True)
        found[path.name] = common.hash_of(saved["model"], saved["step"])
    return found


def difference(out, whole):
    """The first thing that is not as `whole`, the numbers of an undisturbed run; None: all is."""
    found = numbers_of(out, len(whole.get("results.jsonl", [])))
    return next((name for name in whole | found if found.get(name) != whole.get(name)), None)


def finished(out):
    """{file: time of its last change} of the caches and the finished checkpoints, and {file: step}
    of the unfinished ones.
    """
    done, open_ = {}, {}
    for path in [*out.glob("cache/*.pt"), *out.glob("checkpoints/*.pt")]:
        saved = torch.load(path, weights_only=True)
        if "steps" in saved and saved["step"] < saved["steps"]:
            open_[path] = saved["step"]
        elif not path.name.startswith("best-"):  # SPD's best so far, which a later epoch may beat
            done[path] = path.stat().st_mtime_ns
    return done, open_


def kill(script, out, seconds, whole):
    """One kill -9 after so much CPU time and the same command again: (ok, what went wrong)."""
    run = Run(script, out)
    run.until(lambda: (run.cpu() or 0) >= seconds)
    run.stop()
    ended = run.wait()
    done, open_ = finished(out)
    code, said = complete(script, out)
    if code != 0:
        return False, f"exit code {code}: {said.strip().splitlines()[-1][:90]}"
    if lost := [p.name for p in done if p.stat().st_mtime_ns != done[p]]:
        return False, f"{lost[0]} was computed again"
    if lost := [p for p, step in open_.items() if f"continues {p} at step {step} of" not in said]:
        return False, f"{lost[0].name} was not continued"
    if name := difference(out, whole):
        return False, f"{name} differs"
    if "Traceback" in said or "damaged" in said:
        return False, "a traceback, or a damaged file"
    return True, "ended before" if ended == 0 else ("continued" if open_ else "repeated")


def kills(script, folder, n):
    """(the script's row in the table of kills, numbers of the undisturbed run)"""
    run, used = Run(script, folder / "whole"), [0.0]
    run.until(lambda: used.append(run.cpu() or 0) or False)
    if code := run.wait():
        raise SystemExit(f"{script}: the undisturbed run ended with {code}:\n{run.said}")
    whole = numbers_of(folder / "whole")
    rng, right, wrong = random.Random(0), [], []
    for i in range(n):
        share = (i + rng.random()) / n
        ok, what = kill(script, folder / f"kill{i}", share * max(used), whole)
        if ok:
            right.append(what)
        else:
            wrong.append(f"at {share:.0%}: {what}")
        shutil.rmtree(folder / f"kill{i}")
    continued = right.count("continued")
    print(f"{script}: {len(right)} of {n} kills, {continued} continued a checkpoint", flush=True)
    row = [script, f"{max(used):.1f} s", n, len(right), continued, "; ".join(wrong) or "-"]
    return row, whole


# --- one fault at a time ---


def sentence(said):
    """The last line, which is what a user reads."""
    return said.strip().splitlines()[-1]


def ctrl_c(script, folder, whole):
    out = folder / "ctrl-c"
    run = Run(script, out)
    run.until(lambda: any(out.glob("checkpoints/*.pt")))
    os.kill(run.pid, signal.SIGINT)
    code, said = run.wait(), run.said
    if code != 130 or "Traceback" in said or not sentence(said).startswith("interrupted; the same"):
        return False, f"exit code {code}: {sentence(said)}"
    code, _ = complete(script, out)
    same = not difference(out, whole)
    return code == 0 and same, "exit code 130; the same command continues, bit-equal"


def full_disk(script, folder, whole):
    """er_study.py stops without its trajectories, which are its result; the others go on."""
    disk = folder / "full"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        return None, "skipped: mounting a small file system needs root"
    try:
        code, said = complete(script, disk / "out")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    stops = script == "er_study" and "trajectories" in sentence(said)
    n = sum("cannot be written" in line or "could not write" in line for line in said.splitlines())
    if code != (2 if stops else 0) or "Traceback" in said or not n:
        return False, f"exit code {code}: {sentence(said)[:90]}"
    return True, "stops in one sentence" if stops else f"{n} files named, table complete"


def cut_in_half(where):
    """A fault that cuts the largest file of OUT/where in half and runs again."""

    def fault(script, folder, whole):
        out = folder / f"cut {where}"
        shutil.copytree(folder / "whole", out)
        victims = sorted(out.glob(f"{where}/*.pt"), key=lambda p: p.stat().st_size)
        if not victims:
            return None, "has none"
        shutil.rmtree(out / "figures", ignore_errors=True)
        for path in out.glob("trajectories/*.csv"):  # a whole one would not be trained again
            path.unlink()
        content = victims[-1].read_bytes()
        victims[-1].write_bytes(content[: len(content) // 2])
        code, said = complete(script, out)
        named = victims[-1].name in said and "damaged" in said
        if where == "checkpoints" or victims[-1].name.startswith("best-"):  # SPD's chosen model
            return named and code == 2, "named, exit code 2" if named else "NOT NOTICED"
        ok = named and code == 0 and not difference(out, whole)
        return ok, "named, computed anew, bit-equal" if ok else f"code {code}, named {named}"

    return fault


def damaged_weights(script, folder, whole):
    """The file of --weights: one bit, and half of it."""
    for how in ("bit", "half"):
        path = folder / f"{how}.npz"
        content = bytearray((common.EMBEDDED / "tiny_clip.npz").read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content[: len(content) // 2] if how == "half" else content)
        words = "--model", "tiny_clip", "--weights", path
        code, said = complete(script, folder / "weights", *words)
        if code != 2 or path.name not in sentence(said):
            return False, f"exit code {code}: {sentence(said)[:90]}"
    return True, "named, exit code 2"


def two_at_once(script, folder, whole):
    out = folder / "two"
    runs = Run(script, out), Run(script, out)
    codes = [run.wait() for run in runs]
    rows = [len(x.get("results.jsonl", [])) for x in (whole, numbers_of(out))]
    ok = codes == [0, 0] and not difference(out, whole) and rows[1] == 2 * rows[0]
    return ok, "both end, bit-equal" if ok else f"exit codes {codes}, {difference(out, whole)}"


def dead_worker(script, folder, whole):
    """The loader processes are killed as they come."""
    out = folder / "worker"
    run = Run(script, out, "--workers", "2")

    def kill_loaders():  # all, until the run ends: one that has done its work is not missed
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(path.name)
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if os.getpgid(pid) == run.pid and run.pid not in (pid, parent):
                    os.kill(pid, signal.SIGKILL)

    run.until(kill_loaders, 300)
    code = run.wait(300)
    ok = code == 2 and "worker" in sentence(run.said) and "Traceback" not in run.said
    return ok, "one sentence, exit code 2" if ok else f"exit code {code}: {sentence(run.said)[:90]}"


def not_finite(script, folder, whole):
    """A learning rate that no network survives."""
    rate = {"carot": "--lr-ft"}.get(script, "--lr")
    words = [rate, "1e18", "--clip", "0"]
    code, said = complete(script, folder / "nan", *words)
    ok = code == 2 and "after step" in sentence(said) and "Traceback" not in said
    return ok, "stops with the step" if ok else f"exit code {code}: {sentence(said)[:90]}"


FAULTS = {
    "Ctrl-C": ctrl_c,
    "disk full (96 KB)": full_disk,
    "checkpoint cut in half": cut_in_half("checkpoints"),
    "cache cut in half": cut_in_half("cache"),
    "weights damaged": damaged_weights,
    "two runs, one folder": two_at_once,
    "a loader process killed": dead_worker,
    "loss not finite": not_finite,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), help="some, or none")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with small_digits() as folder:
        tables(options, folder)


@contextlib.contextmanager
def small_digits():
    """A folder for runs, while `--data digits` means the few digits in it and their testbed."""
    before = common.EMBEDDED
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        common.EMBEDDED = trees.FOLDER = few_digits(folder / "data")
        try:
            yield folder
        finally:
            common.EMBEDDED = trees.FOLDER = before


def tables(options, folder):
    rows, found = [], []
    start = time.monotonic()
    for script in options.script:
        warm(script, folder / script / "warm")
        row, whole = kills(script, folder / script, options.kills)
        rows.append(row)
        for name in (f for f in options.faults if f in FAULTS):
            ok, what = FAULTS[name](script, folder / script, whole)
            verdict = {True: "ok", False: "WRONG", None: "-"}[ok]
            found.append([name, script, verdict, what])
            print(f"{script}: {name}: {verdict}, {what}", flush=True)
        shutil.rmtree(folder / script)
    header = ["script", "CPU time of a run", "kills", "bit-equal after", "continued", "wrong"]
    print("\n" + common.table(header, rows, "kill -9 of the process group, then the same command"))
    if found:
        print("\n" + common.table(["fault", "script", "", "what happens"], found, "one each"))
    print(f"\n{time.monotonic() - start:.0f} s")
    return rows, found


def warm(script, out):
    """One run here, so that the forked ones find every library imported."""
    module, words = COMMANDS[script]
    with open(os.devnull, "w") as null:
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            module.main([*words, "--out", str(out)])


if __name__ == "__main__":
    main()
