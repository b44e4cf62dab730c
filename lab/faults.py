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


class Run:
    """One run of a script in a process group of its own; `said`: what it printed."""

    def __init__(self, script, out, *words):
        self.log = common.EMBEDDED.parent / f"{next(NUMBERS)}.log"
        module, own = COMMANDS[script]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                file = os.open(self.log, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
                torch.manual_seed(random.randrange(2**31))  # a new process has other numbers
                forkserver._forkserver.__init__()  # and a server of its own for its loaders
                sys.argv = [f"{script}.py"]
                common.run(lambda: module.main([*own, "--out", str(out), *map(str, words)]))
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code or 0)

    def cpu(self):
        """Seconds of CPU time so far; None once it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return None if fields[0] == "Z" else ticks

    def until(self, condition, limit=600):
        """Wait for condition() -> bool; whether it came true before the run ended."""
        end = time.monotonic() + limit
        while time.monotonic() < end and self.cpu() is not None:
            if condition():
                return True
            time.sleep(0.002)
        return False

    def stop(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, limit=600):
        """Exit code; negative: the signal that ended it. None: still running after `limit`."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.stop(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None

    @property
    def said(self):
        return self.log.read_text(errors="replace") or "nothing was printed"


def complete(script, out, *words):
    run = Run(script, out, *words)
    return run.wait(), run.said


def numbers_of(out, rows):
    """All that a run found: its rows of results.jsonl, its CSVs, its checkpoints' tensors."""
    found = {}
    results = out / "results.jsonl"
    if results.is_file():
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if k != "run"} for line in lines]
        found["results.jsonl"] = json.dumps(lines[-rows:] if rows else lines)
    for path in sorted([*out.glob("figures/*.csv"), *out.glob("trajectories/*.csv")]):
        found[path.name] = path.read_bytes()
    for path in sorted(out.glob("checkpoints/*.pt")):
        saved = torch.load(path, weights_only=True)
        found[path.name] = common.hash_of(saved["model"], saved["step"])
    return found


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
    run.stop(signal.SIGKILL)
    ended = run.wait()
    done, open_ = finished(out)
    code, said = complete(script, out)
    if code != 0:
        return False, f"exit code {code}: {said.strip().splitlines()[-1][:90]}"
    if lost := [p.name for p in done if p.stat().st_mtime_ns != done[p]]:
        return False, f"{lost[0]} was computed again"
    if lost := [p for p, step in open_.items() if f"continues {p} at step {step} of" not in said]:
        return False, f"{lost[0].name} was not continued"
    found = numbers_of(out, whole["rows"])
    if found != whole["numbers"]:
        name = next(k for k in whole["numbers"] if found.get(k) != whole["numbers"][k])
        return False, f"{name} differs"
    if "Traceback" in said or "damaged" in said:
        return False, "a traceback, or a damaged file"
    return True, "ended before" if ended == 0 else ("continued" if open_ else "repeated")


def kills(script, folder, n):
    """The rows of the table of kills."""
    run, used = Run(script, folder / "whole"), [0.0]
    run.until(lambda: used.append(run.cpu() or 0) or False)
    if code := run.wait():
        raise SystemExit(f"{script}: the undisturbed run ended with {code}:\n{run.said}")
    whole = {"rows": 0, "numbers": numbers_of(folder / "whole", 0)}
    whole["rows"] = len(json.loads(whole["numbers"].get("results.jsonl", "[]")))
    rng, right, kinds, wrong = random.Random(0), 0, [], []
    for i in range(n):
        share = (i + rng.random()) / n
        ok, what = kill(script, folder / f"kill{i}", share * max(used), whole)
        right += ok
        kinds.append(what) if ok else wrong.append(f"at {share:.0%}: {what}")
        shutil.rmtree(folder / f"kill{i}")
    continued = kinds.count("continued")
    row = [script, f"{max(used):.1f} s", n, right, continued, "; ".join(wrong) or "-"]
    print(f"{script}: {right} of {n} kills, {continued} continued a checkpoint", flush=True)
    return row


# --- one fault at a time ---


@contextlib.contextmanager
def mounted(path, *options):
    """A file system at `path`; yields whether it could be mounted, which needs root."""
    path.mkdir(parents=True, exist_ok=True)
    done = (
        shutil.which("mount")
        and not subprocess.run(["mount", *options, str(path)], capture_output=True).returncode
    )
    if done and "ro,bind" in options:  # a bind mount becomes read-only in a second step
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
    try:
        yield bool(done)
    finally:
        if done:
            subprocess.run(["umount", "-l", str(path)], check=True)


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
    same = numbers_of(out, len(json.loads(whole.get("results.jsonl", "[]")))) == whole
    return code == 0 and same, "exit code 130; the same command continues, bit-equal"


def full_disk(script, folder, whole):
    out = folder / "full"
    with mounted(out, "-t", "tmpfs", "-o", "size=96k", "tmpfs") as done:
        if not done:
            return None, "skipped: mounting a small file system needs root"
        code, said = complete(script, out / "out")
    return unwritten(script, code, said)


def unwritten(script, code, said):
    """A script goes on without its files; er_study.py stops without its trajectories, which are
    its result.
    """
    stops = script == "er_study" and "trajectories" in sentence(said)
    ok = code == (2 if stops else 0) and "Traceback" not in said
    lines = [x for x in said.splitlines() if "cannot be written" in x or "could not write" in x]
    words = "stops in one sentence" if code == 2 else f"{len(lines)} files named, table complete"
    return ok and bool(lines), words if ok else f"exit code {code}: {sentence(said)[:90]}"


def read_only(script, folder, whole):
    out = folder / "readonly"
    (folder / "source").mkdir(exist_ok=True)
    with mounted(out, "-o", "ro,bind", str(folder / "source")) as done:
        if not done:
            return None, "skipped: a read-only mount needs root"
        code, said = complete(script, out / "out")
    return unwritten(script, code, said)


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
        same = numbers_of(out, len(json.loads(whole.get("results.jsonl", "[]")))) == whole
        ok = named and code == 0 and same
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
    first = Run(script, out)
    second = Run(script, Path(str(out)))
    codes = first.wait(), second.wait()
    rows = len(json.loads(whole.get("results.jsonl", "[]")))
    same = numbers_of(out, rows) == whole
    whole_lines = True
    if rows:
        whole_lines = len((out / "results.jsonl").read_text().splitlines()) == 2 * rows
    ok = codes == (0, 0) and same and whole_lines
    return ok, "both end, bit-equal" if ok else f"exit codes {codes}, equal {same}"


def dead_worker(script, folder, whole):
    """The loader processes are killed as they come."""
    out = folder / "worker"
    run = Run(script, out, "--workers", "2")

    def loaders():
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                if os.getpgid(int(path.name)) == run.pid and int(path.name) != run.pid:
                    title = (path / "cmdline").read_bytes()
                    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                    if b"forkserver" in title and int(parent) != run.pid:
                        found.append(int(path.name))
        return found

    def kill_them():  # one that has done its work is not missed: all, until the run ends
        for pid in loaders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    run.until(kill_them, 300)
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
    "output folder read-only": read_only,
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
        rows.append(kills(script, folder / script, options.kills))
        whole = numbers_of(folder / script / "whole", 0)
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
