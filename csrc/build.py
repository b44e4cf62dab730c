"""Builds the C++ and CUDA kernels at first use and loads them: `load()`.

The folder needs nothing else of this project: copied into another one, `from csrc import build`
works as it does here. Tensors travel as addresses, so no source includes a PyTorch header, and the
build takes seconds.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import time
from pathlib import Path

import torch

from . import ops

CSRC = Path(__file__).resolve().parent
# -ffp-contract=off: the same bits on CPUs with and without fused multiply-add
# -fno-math-errno: lets square roots be vectorised
CPU_FLAGS = "-O3 -std=c++17 -pthread -ffp-contract=off -fno-math-errno -Wno-psabi".split()
CUDA_FLAGS = ["-O3", "-std=c++17"]


@functools.cache
def load():
    """The kernels (ops.Kernels), found or built now; None, and a line with the reason, where they
    cannot be had.

    Those for CUDA come with them where PyTorch sees a GPU (or TORCH_CUDA_ARCH_LIST says for which
    it is to be built) and CUDA_HOME or nvcc is found. KERNELS=off (also 0, no, false) switches all
    off. Raises ValueError for another value.
    """
    wanted = os.environ.get("KERNELS", "on")
    if wanted.lower() in ("off", "0", "no", "false"):
        print(f"kernels: switched off by KERNELS={wanted}, using PyTorch", flush=True)
        return None
    if wanted.lower() not in ("on", "1", "yes", "true", ""):
        raise ValueError(f"KERNELS must be on or off, got {wanted}")
    cuda = with_cuda()
    folder = build_folder(cuda)
    try:
        module, seconds = build(folder, cuda)
    except (OSError, RuntimeError, ImportError) as problem:
        print(f"kernels: not built ({reason(problem)}), using PyTorch", flush=True)
        return None
    kernels = ops.loaded = ops.Kernels(module, cuda)
    done = "found" if seconds is None else f"built in {seconds:.0f} s"
    knn = f"k-NN by {kernels.level or 'PyTorch'}" + (", CUDA" if cuda else "")
    print(f"kernels: {done} in {folder}, {knn}", flush=True)
    return kernels


def with_cuda():
    if not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        return False
    from torch.utils import cpp_extension  # half a second, so only where it is needed

    return bool(torch.version.cuda and cpp_extension.CUDA_HOME)


def build_folder(cuda=False):
    """Where a build of these sources for this PyTorch and kind of machine lies."""
    machine = [torch.__version__, platform.python_version(), platform.machine(), CPU_FLAGS]
    if cuda:
        devices = range(torch.cuda.device_count())
        machine += map(torch.cuda.get_device_capability, devices)
        machine.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    digest = hashlib.sha256(repr(machine).encode())
    for path in sorted(p for p in CSRC.iterdir() if p.suffix in (".cpp", ".cu", ".h")):
        digest.update(path.read_bytes())
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(cache) / f"kernels_{digest.hexdigest()[:16]}"


def build(folder, cuda=False, verbose=False):
    """The extension in `folder`, compiled if it is not there, with the .cu files if `cuda`.

    -> module, seconds of the build (None: it was there). Raises OSError, RuntimeError, ImportError.
    """
    import fcntl  # an ImportError on Windows

    folder.mkdir(parents=True, exist_ok=True)
    library, complete = folder / "kernels_ext.so", folder / "complete"
    with open(folder / "build.lock", "w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)  # freed by the system if this process is killed
        if complete.is_file() and library.is_file():
            spec = importlib.util.spec_from_file_location("kernels_ext", library)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, None
        from torch.utils import cpp_extension

        # in older PyTorch the mere file is a lock: one left by a killed build is waited for forever
        (folder / "lock").unlink(missing_ok=True)
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:  # PyTorch 2.9 stumbles over its own warning
            raise OSError(f"{compiler}: not found")
        start = time.perf_counter()
        module = cpp_extension.load(
            "kernels_ext",
            [str(p) for p in sorted(CSRC.glob("*.c*")) if cuda or p.suffix == ".cpp"],
            extra_cflags=CPU_FLAGS + ["-DWITH_CUDA"] * cuda,
            extra_cuda_cflags=CUDA_FLAGS,
            extra_ldflags=["-pthread"],
            build_directory=str(folder),
            with_cuda=cuda,
            verbose=verbose,
        )
        complete.touch()
        return module, time.perf_counter() - start


def reason(problem):
    """The line of a failed build's output that says why."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    telling = (x for x in lines if re.search(r"error:|not found|No such file|No space", x))
    return next(telling, lines[0]).strip()[:200]
