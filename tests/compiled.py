"""The compiled kernels as the tests use them: one cold build a session, in a folder of its own.

A fresh process builds them, as a user's first run would, over the lock that a killed build has left
behind; `SAID` is what it printed. Where nvcc is found and PyTorch is a CUDA build, the CUDA kernels
are compiled and linked as well, for every GPU generation from Turing to Blackwell, warnings and
register spills as errors: it takes a GPU to run them, not to build.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

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
ARCHITECTURES = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
NVCC_FLAGS = "-Xcompiler=-Wall -Werror=all-warnings -Xptxas=-v,-warn-spills"

TOOLKIT = build.cuda_toolkit() if torch.version.cuda else None
CACHE = tempfile.mkdtemp(prefix="kernels-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["TORCH_EXTENSIONS_DIR"] = CACHE
os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
os.environ.setdefault("KERNELS", "cuda" if TOOLKIT else "on")
done = subprocess.run(
    [sys.executable, "-c", FIRST_RUN.format(toolkit=TOOLKIT)],
    cwd=common.HERE,
    env={**os.environ, "KERNELS_VERBOSE": "1", "NVCC_APPEND_FLAGS": NVCC_FLAGS},
    capture_output=True,
    text=True,
    timeout=300,
)
SAID = done.stdout + done.stderr
KERNELS = common.kernels()  # the same files, found
