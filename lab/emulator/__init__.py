"""Compiles the unchanged CUDA kernels for the CPU, with the headers of this folder, and runs them.

A `Library` stands in for the compiled extension: its `*_cuda` methods take addresses as the real
ones do, register the memory that csrc/kernels.h lets the launcher touch, run it under the
chosen schedule of threads and raise `KernelError` with the checker's report, code offsets turned
into file:line. So the Python wrappers of the GPU path are tested as well.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from csrc import ops

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parent.parent / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"emulated-kernels-{os.getuid()}"
SCHEDULES = (0, 1, 2)  # threads and blocks ascending, descending, shuffled
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-Wall", "-Werror"]
# The kernels' loads and stores become calls of the checker; the engine's own do not.
KERNEL_FLAGS = ["-fsanitize=thread,bounds,alignment", "--param=tsan-instrument-func-entry-exit=0"]
KERNEL_FLAGS += ["-Wno-unknown-pragmas", "-Wno-unused-function"]
WRITABLE, INITIALISED = 1, 2  # flags of emu_tensor
ADDRESS, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class KernelError(AssertionError):
    """What the launcher returned: the checker's report, or the launcher's own complaint."""


def compiler():
    return shutil.which("g++")


def translate(cuda, name):
    """The one thing g++ cannot parse is the launch, kernel<<<grid, block, 0, stream>>>(...)."""
    launch = r"(\w+)<<<(.*?)>>>\("
    return f'#line 1 "{name}"\n' + re.sub(launch, r"emu::launch({\2}, \1, ", cuda, flags=re.DOTALL)


@functools.cache
def engine():
    """Hash of what all libraries share, its objects, and the flags to compile a kernel with it."""
    CACHE.mkdir(exist_ok=True)
    files = sorted(EMULATOR.glob("*.[ch]*")) + [CSRC / "kernels.h"]
    shared = hashlib.sha256(b"".join(f.read_bytes() for f in files))
    shared.update(repr((FLAGS, KERNEL_FLAGS)).encode())
    mark = shared.hexdigest()[:16]
    objects = [
        _compile(CACHE / f"{part}-{mark}.o", "-c", "-O2", EMULATOR / f"{part}.cpp")
        for part in ("fibers", "racecheck")
    ]
    include = [f"-I{EMULATOR}", f"-I{CSRC}", *KERNEL_FLAGS]
    headers = CACHE / f"{mark}.h"  # compiled once: a third of what a kernel's compilation takes
    headers.write_text('#include "mma.h"\n')
    _compile(CACHE / f"{mark}.h.gch", "-x", "c++-header", *include, headers)
    return shared, objects, ["-include", headers, *include]


def _compile(target, *arguments, text=None):
    """g++, of `text` where it reads that; kept under `target`, whose name carries a hash of all."""
    with open(target.with_suffix(".lock"), "w") as lock:  # two worker processes need the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler(), *FLAGS, *arguments, "-o", partial]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode:
            command = " ".join(map(str, command))
            raise RuntimeError(f"the emulated build failed:\n{command}\n{done.stderr}")
        partial.rename(target)
    return target


def compile_kernel(name, edit=lambda text: text):
    """Path of the library of csrc/<name>.cu, its text edited."""
    shared, engine_objects, include = engine()
    text = translate(edit((CSRC / f"{name}.cu").read_text()), f"{name}.cu")
    kernel = shared.copy()
    kernel.update(text.encode())
    stem = CACHE / f"{name}-{kernel.hexdigest()[:16]}"
    own = _compile(stem.with_suffix(".o"), "-c", *include, "-x", "c++", "-", text=text)
    # without the sanitizer's runtime: racecheck.cpp has its symbols
    link = "-shared", "-Wl,-Bsymbolic", *engine_objects, own
    return _compile(stem.with_suffix(".so"), *link)


class Library:
    """`schedule`, one of SCHEDULES, may be set between two calls."""

    def __init__(self, path):
        self.path, self.c, self.schedule = path, ctypes.CDLL(str(path)), 0

    def _run(self, launcher, memory, arguments):
        """memory: (address, bytes, flags, bytes per element) of all that the launcher may touch."""
        self.c.emu_begin(self.schedule)
        for address, size, flags, grain in memory:
            if address and not flags & INITIALISED:
                ctypes.memset(address, 0xFF, size)  # NaN, for a kernel that forgets to write
            self.c.emu_tensor(ADDRESS(address or None), ctypes.c_size_t(size), flags, grain)
        function = getattr(self.c, launcher)
        function.restype = ctypes.c_char_p
        kinds = {int: SIZE, float: NUMBER}
        error = function(*(a if a is None else kinds[type(a)](a) for a in arguments))
        if error is not None:
            raise KernelError(self.locate(error.decode()))

    def locate(self, report):
        """[+0x1234] -> knn_kth_distance.cu:56, the innermost line that is in a .cu file."""

        def line(match):
            command = ["addr2line", "-i", "-e", str(self.path), match[1]]
            frames = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
            frames = [f.replace("<stdin>", f"{self.path.stem[:-17]}.cu") for f in frames]
            kernel = [f for f in frames if ".cu:" in f] or frames
            return re.sub(r" \(.*", "", kernel[0].rsplit("/", 1)[-1])

        return re.sub(r"\[\+(0x[0-9a-f]+)\]", line, report)

    # The interface of the extension

    SPD_CHUNK = 4096

    def knn_kth_distance_cuda_capacity(self, m, k):
        self.c.knn_kth_distance_cuda_capacity.restype = SIZE
        return self.c.knn_kth_distance_cuda_capacity(SIZE(m), SIZE(k))

    def knn_kth_distance_cuda(self, batch, stream):
        """batch: address of a KnnBatch of csrc/kernels.h"""
        *pointers, n, m, d, _, _, capacity = (SIZE * 16).from_address(batch)
        sizes = 4 * n * d, 4 * m * d, 2 * n * d, 2 * m * d, 4 * m, 4 * n
        memory = [(*x, INITIALISED, 4) for x in zip(pointers[:6], sizes, strict=True)]
        memory[2:4] = [(*x[:3], 2) for x in memory[2:4]]
        memory += [(x, 4 * n, INITIALISED | WRITABLE, 4) for x in pointers[6:8]]
        memory += [(pointers[8], 8 * n * capacity, WRITABLE, 4), (pointers[9], 4 * n, WRITABLE, 4)]
        self._run("knn_kth_distance_cuda", memory, (batch, stream))

    def spd_step_cuda(self, *arguments):
        table, count, chunk_tensor, chunks, *_, partial, conditions, report, _ = arguments
        both = INITIALISED | WRITABLE
        memory = [(table, 56 * count, INITIALISED, 8), (chunk_tensor, 4 * chunks, INITIALISED, 4)]
        memory += [(partial, 24 * chunks, WRITABLE, 8), (report, 32 * count, WRITABLE, 8)]
        memory += [(conditions, 8 * count, both, 8)] if conditions else []
        rows = (SIZE * (7 * count)).from_address(table)
        for i in range(0, 7 * count, 7):
            param, anchor, grad, exp_avg, exp_avg_sq, size, _ = rows[i : i + 7]
            memory += [(a, 4 * size, INITIALISED, 4) for a in (anchor, grad) if a]
            memory += [(a, 4 * size, both, 4) for a in (param, exp_avg, exp_avg_sq)]
        self._run("spd_step_cuda", memory, arguments)

    # What the tests call, as of ops.Kernels: torch tensors, through the wrappers of the GPU path

    def knn_kth_distance(self, queries, reference, k):
        return ops.knn_kth_distance_cuda(self, ops.padded(queries), ops.padded(reference), k)

    def spd_step(self, params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps,
                 spd_lambda, conditions=None, sums=None):  # fmt: skip
        tensors = ops.table_of((params, anchors, grads, exp_avgs, exp_avg_sqs))
        scalars = step, lr, *betas, eps, spd_lambda
        ops.spd_step_cuda(self, tensors, params[0].device, scalars, conditions, sums)


def load(name, edit=lambda text: text):
    return Library(compile_kernel(name, edit))
