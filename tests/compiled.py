"""The compiled kernels as the tests use them: one cold build a session, in a folder of its own.

A fresh process builds them, over the lock of a killed build, in a project of another author: spd.py
is there twice, alone and in a package beside csrc/. Where nvcc is found and PyTorch is a CUDA
build, the CUDA kernels are built as well, for every GPU generation from Turing to Blackwell,
warnings and register spills as errors.
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

from csrc import build

FOREIGN = {  # what else that project has
    "common.py": "raise SystemExit('the other project ran')\n",
    "vrf.py": "",
    "numpy.py": "raise ModuleNotFoundError('numpy')\n",
    "csrc/main.c": "",
}
FIRST_RUN = """
import functools, torch
import spd
model = torch.nn.Linear(1200, 1000)
optimiser = spd.AdamSPD(spd.param_groups(model), lr=1e-2)
for _ in range(3):
    optimiser.zero_grad(); model(torch.randn(4, 1200)).square().mean().backward()
    optimiser.step()
print("spd.py alone trained; kernels:", spd.compiled())
try:
    spd.common.run(spd.main)
except SystemExit as sentence:
    print(sentence)
from own.optim import spd
from own.optim.csrc import build
folders = [build.build_folder(cuda) for cuda in (False, True)]
print("imported, built nothing:", not any(folder.exists() for folder in folders))
for folder in folders:
    folder.mkdir(parents=True)
    (folder / "lock").touch()  # with this in place, the load() of older PyTorch waits for ever
build.build = functools.partial(build.build, verbose=True)
kernels = spd.compiled()
distance = kernels.knn_kth_distance(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 1)
weight, anchor, grad, m, v = ([torch.full((2,), x)] for x in (1.0, 1.0, 1.0, 0.0, 0.0))
kernels.spd_step(weight, anchor, grad, m, v, 1, 0.5, (0.9, 0.999), 1e-8, 1.0)
print("distance", distance.item(), "weight", weight[0].round(decimals=4).tolist())
"""
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;9.0;10.0;12.0+PTX")
NVCC_FLAGS = "-Xcompiler=-Wall -Werror=all-warnings -Xptxas=-v,-warn-spills"
HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
TOOLKIT = torch.version.cuda and (HOME / "bin" / "nvcc").exists()


@functools.cache
def said():
    """What the first run printed; `build.load()` of this process finds its build."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())  # one for all worker processes
    folder = Path(tempfile.gettempdir()) / f"kernels-{run}"
    folder.mkdir(exist_ok=True)
    users = open(folder / "users.lock", "w")
    fcntl.flock(users, fcntl.LOCK_SH)
    atexit.register(last_one_out, folder, users)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    if TOOLKIT:
        os.environ |= {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES, "CUDA_HOME": str(HOME)}
    with open(folder / "said.txt", "a+") as text:
        fcntl.flock(text, fcntl.LOCK_EX)  # the other worker process waits, then reads
        text.seek(0)
        if not text.read():
            project = folder / "project"
            shutil.copytree(build.CSRC, project / "own/optim/csrc")
            (project / "csrc").mkdir()
            for name, content in FOREIGN.items():
                (project / name).write_text(content)
            for place in (project, project / "own/optim"):
                shutil.copy(build.CSRC.parent / "spd.py", place)
            environment = {**os.environ, "PYTHONPATH": "", "NVCC_APPEND_FLAGS": NVCC_FLAGS}
            options = {"cwd": project, "env": environment, "capture_output": True, "text": True}
            done = subprocess.run([sys.executable, "-c", FIRST_RUN], timeout=900, **options)
            text.write(done.stdout + done.stderr)
        text.seek(0)
        return text.read()


def last_one_out(folder, users):
    with contextlib.suppress(BlockingIOError):  # another worker process still uses the build
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


def kernels():
    """The kernels; a skipped test where there is no compiler."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler: kernels not built")
    said()
    kernels = build.load()
    assert kernels, said()
    return kernels


def under_each_default(call):
    """[call() with each of torch's default types and devices that a user may have set]"""
    found = []
    for default in (torch.float64, torch.bfloat16, "meta"):
        by_name = torch.set_default_device if default == "meta" else torch.set_default_dtype
        try:
            by_name(default)
            found.append(call())
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
    return found
