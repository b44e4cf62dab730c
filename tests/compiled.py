"""The compiled kernels as the tests use them: one cold build a session, in a folder of its own.

A fresh process builds them, as a user's first run would, over the lock that a killed build has left
behind. Where nvcc is found and PyTorch is a CUDA build, the CUDA kernels are compiled and linked as
well, for every GPU generation from Turing to Blackwell, warnings and register spills as errors: it
takes a GPU to run them, not to build. About 40 CPU seconds, half of them nvcc's.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import common
from csrc import build

FIRST_RUN = """
import torch, common, spd, vrf
from csrc import build
folder = build.build_folder({toolkit!r})
print("imported, built nothing:", not folder.exists())
folder.mkdir(parents=True)
(folder / "lock").touch()  # with this in place, the load() of older PyTorch waits for ever
kernels = common.kernels()
queries, reference = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
print("distance", kernels and kernels.knn_kth_distance(queries, reference, 1).item())
"""
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;9.0;10.0;12.0+PTX")
NVCC_FLAGS = "-Xcompiler=-Wall -Werror=all-warnings -Xptxas=-v,-warn-spills"

TOOLKIT = build.cuda_toolkit() if torch.version.cuda else None


@functools.cache
def said():
    """What the first run printed; `common.kernels()` of this process finds its build."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())  # one for all worker processes
    folder = Path(tempfile.gettempdir()) / f"kernels-{run}"
    folder.mkdir(exist_ok=True)
    users = open(folder / "users.lock", "w")
    fcntl.flock(users, fcntl.LOCK_SH)
    atexit.register(last_one_out, folder, users)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    os.environ.setdefault("KERNELS", "cuda" if TOOLKIT else "on")
    with open(folder / "said.txt", "a+") as text:
        fcntl.flock(text, fcntl.LOCK_EX)  # the other worker process waits, then reads
        text.seek(0)
        if not text.read():
            done = subprocess.run(
                [sys.executable, "-c", FIRST_RUN.format(toolkit=TOOLKIT)],
                cwd=common.HERE,
                env={**os.environ, "KERNELS_VERBOSE": "1", "NVCC_APPEND_FLAGS": NVCC_FLAGS},
                capture_output=True,
                text=True,
                timeout=600,
            )
            text.write(done.stdout + done.stderr)
        text.seek(0)
        return text.read()


def last_one_out(folder, users):
    with contextlib.suppress(BlockingIOError):  # another worker process still uses the build
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def kernels(isa=None):
    """The kernels; a skipped test where there is no compiler, or no such CPU path."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler: kernels not built")
    said()
    kernels = common.kernels()
    assert kernels, said()
    if isa and not kernels.module.has_instruction_set(isa):
        pytest.skip(f"{isa} is not offered by this CPU")
    return kernels
