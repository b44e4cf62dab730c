"""Builds the C++ and CUDA kernels at first use, checks what they are given, picks CPU or GPU.

The door is `common.kernels()`. Tensors travel as addresses, so no source here includes a PyTorch
header: the whole CPU build takes seconds. csrc/kernels.h and kernels_cuda.h list what is called.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import torch

import common

CSRC = Path(__file__).resolve().parent
SPD_CHUNK = 4096  # elements, as in kernels_cuda.h
# -ffp-contract=off: the same bits on CPUs with and without fused multiply-add
# -fno-math-errno: lets square roots be vectorised
CPU_FLAGS = "-O3 -fopenmp -ffp-contract=off -fno-math-errno -Wno-psabi".split()


# --- build ----------------------------------------------------------------------------------------


@functools.cache
def load():
    """Kernels, found or built now; None, and a line with the reason, where they cannot be had.

    The CUDA kernels come with them where PyTorch is a CUDA build, sees a GPU, and nvcc is found;
    where that build fails, it is tried without them. Variables: KERNELS=off switches all off;
    KERNELS=cuda builds those for CUDA without a GPU in sight; KERNELS_VERBOSE=1 shows what the
    compiler says; KERNELS_ISA=amx|avx512bf16|avx512|avx2|portable forces a CPU path. Raises
    InputError for one that this CPU does not offer.
    """
    wanted = os.environ.get("KERNELS", "on")
    if wanted == "off":
        print("kernels: switched off by KERNELS=off, using PyTorch", flush=True)
        return None
    gpu = torch.version.cuda and (wanted == "cuda" or torch.cuda.is_available())
    for toolkit in dict.fromkeys((cuda_toolkit() if gpu else None, None)):
        folder = build_folder(toolkit)
        try:
            module, seconds = build(folder, toolkit)
        except (OSError, RuntimeError, ImportError) as problem:
            instead = "trying without CUDA" if toolkit else "using PyTorch"
            print(f"kernels: not built ({reason(problem)}), {instead}", flush=True)
            continue
        isa = os.environ.get("KERNELS_ISA") or module.best_instruction_set()
        if not module.has_instruction_set(isa):
            raise common.InputError(
                f"KERNELS_ISA={isa} is not offered by this CPU; "
                f"unset it to get {module.best_instruction_set()}"
            )
        done = "found" if seconds is None else f"built in {seconds:.0f} s"
        paths = f"CPU path {isa}" + (", CUDA" if toolkit else "")
        print(f"kernels: {done} in {folder}, {paths}", flush=True)
        return Kernels(module, isa, cuda=toolkit is not None)
    return None


def cuda_toolkit():
    """Root folder of the CUDA toolkit whose nvcc is found, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return None
    # what is found may be a script or a link elsewhere; nvcc itself knows its root
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    return str(Path(top[1]).resolve()) if top else None


def build_folder(toolkit=None):
    """Where a build of these sources for this PyTorch and machine lies: no two share a folder."""
    machine = [torch.__version__, platform.python_version(), cpu_model(), toolkit]
    if toolkit:
        machine += [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        machine.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    digest = hashlib.sha256(repr((machine, CPU_FLAGS)).encode())
    for path in sorted(p for p in CSRC.iterdir() if p.suffix in (".cpp", ".cu", ".h")):
        digest.update(path.read_bytes())
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(cache) / f"kernels_{digest.hexdigest()[:16]}"


def cpu_model():
    """The CPU's name, part of the folder's: machines that share a disk share no build."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def build(folder, toolkit=None):
    """The extension in `folder`, compiled if it is not there, with the .cu files if `toolkit` is.

    -> module, seconds of the build (None: it was there). Raises OSError, RuntimeError, ImportError.
    """
    import fcntl

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
        start = time.perf_counter()
        sources = sorted(CSRC.glob("*.cpp"))
        if toolkit:
            if not (os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
                raise RuntimeError("KERNELS=cuda and no GPU: set TORCH_CUDA_ARCH_LIST, as to 9.0")
            sources += sorted(CSRC.glob("*.cu"))
            cpp_extension.CUDA_HOME = toolkit
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:  # PyTorch 2.9 stumbles over its own warning
            raise OSError(f"{compiler}: not found")
        module = cpp_extension.load(
            "kernels_ext",
            [str(path) for path in sources],
            extra_cflags=CPU_FLAGS + ["-DWITH_CUDA"] * bool(toolkit),
            extra_cuda_cflags=["-O3"],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            with_cuda=bool(toolkit),
            verbose=bool(os.environ.get("KERNELS_VERBOSE")),
        )
        complete.touch()
        return module, time.perf_counter() - start


def reason(problem):
    """The line of a failed build's output that says why."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    telling = (x for x in lines if re.search(r"error:|not found|No such file|No space", x))
    return next(telling, lines[0]).strip()[:200]


# --- checked calls --------------------------------------------------------------------------------


class Kernels:
    """The compiled kernels. A wrong argument raises InputError: op, argument, what was got."""

    def __init__(self, module, isa, cuda=False):
        self.module, self.isa = module, isa
        self.devices = ("cpu", "cuda") if cuda else ("cpu",)

    def knn_kth_distance(self, queries, reference, k):
        """VRF Eq. (4), exact distance to the k-th nearest row.  [N, D], [M, D] -> [N] fp32

        Any float dtype (converted to fp32 first) and any strides; no gradient. On the CPU NaN,
        infinity and rows longer than 5e17 are refused. On a GPU nothing is looked for, since the
        answer would have to wait for the device: there a row with NaN counts as farthest.
        """
        op = "knn_kth_distance"
        for name, tensor in (("queries", queries), ("reference", reference)):
            check(isinstance(tensor, torch.Tensor), op, name, "a tensor", type(tensor).__name__)
            check(tensor.is_floating_point(), op, name, "a float tensor", tensor.dtype)
            self.check_device(op, name, tensor, queries.device)
            check(tensor.dim() == 2, op, name, "two dimensions", tuple(tensor.shape))
        (n, d), m, shape = queries.shape, len(reference), tuple(reference.shape)
        check(reference.shape[1] == d > 0, op, "reference", f"[M, {d}], D > 0", shape)
        check(isinstance(k, int) and 1 <= k <= m, op, "k", f"an integer from 1 to {m}", k)
        queries = queries.detach().float().contiguous()
        reference = reference.detach().float().contiguous()
        if queries.is_cuda:
            return knn_kth_distance_cuda(self.module, queries, reference, k)
        out = torch.empty(n)
        sizes = queries.data_ptr(), n, reference.data_ptr(), m, d, k
        threads = torch.get_num_threads()
        stop(self.module.knn_kth_distance_cpu(*sizes, self.isa, threads, out.data_ptr()))
        return out

    def spd_step(self, params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps,
                 spd_lambda, sums=None):  # fmt: skip
        """One step of Adam with selective projection (SPD Eqs. 3, 4, 9), in place, on lists.

        All tensors of one call share dtype (fp32; on the CPU also fp64) and device, and each fills
        its memory (contiguous, or channels_last for all five alike). An anchor of None is the zero
        anchor. `step` counts from 1. `sums` [tensors, 3], fp64, receives S1 = sum g D,
        S2 = sum D^2, S3 = sum u (2 D + u).
        """
        op, lists = "spd_step", (params, anchors, grads, exp_avgs, exp_avg_sqs)
        names = ("params", "anchors", "grads", "exp_avgs", "exp_avg_sqs")
        for name, column in zip(names, lists, strict=True):
            check(len(column) == len(params), op, name, f"{len(params)} tensors", len(column))
        check(step >= 1, op, "step", "1 or more", step)
        if not params:
            return
        dtype, device = params[0].dtype, params[0].device
        self.check_device(op, "params", params[0], device)
        known = (torch.float32,) if device.type == "cuda" else (torch.float32, torch.float64)
        check(dtype in known, op, "params", " or ".join(map(str, known)), dtype)
        for i, row in enumerate(zip(*lists, strict=True)):
            dense = [
                row[0].is_contiguous(),
                row[0].is_contiguous(memory_format=torch.channels_last),
            ]
            check(any(dense), op, f"params[{i}]", "contiguous memory", f"strides {row[0].stride()}")
            for name, tensor in zip(names, row, strict=True):
                if tensor is not None or name != "anchors":
                    check_like(op, f"{name}[{i}]", tensor, row[0], dtype, device)
        if sums is not None:
            expected = f"contiguous float64 {(len(params), 3)} on {device}"
            got = f"{sums.dtype} {tuple(sums.shape)} on {sums.device}"
            right = (torch.float64, (len(params), 3), device)
            fits = (sums.dtype, tuple(sums.shape), sums.device) == right and sums.is_contiguous()
            check(fits, op, "sums", expected, got)
        tensors, scalars = table_of(lists), (*betas, eps, spd_lambda)
        for changed in (params, exp_avgs, exp_avg_sqs):  # so that autograd notices, as for x.add_()
            torch.autograd.graph.increment_version(changed)
        if device.type == "cuda":
            step, lr = (torch.full((), x, dtype=torch.float32, device=device) for x in (step, lr))
            report = spd_step_cuda(self.module, tensors, device, step, lr, *scalars)
            if sums is not None:
                sums.copy_(report[:, :3])
            return
        table, threads = torch.tensor(tensors, dtype=torch.int64), torch.get_num_threads()
        scalars = (dtype.itemsize, step, lr, *scalars, self.isa, threads)
        out = 0 if sums is None else sums.data_ptr()
        stop(self.module.spd_step_cpu(table.data_ptr(), len(tensors), *scalars, out))

    def check_device(self, op, name, tensor, device):
        known = " or ".join(self.devices)
        check(tensor.device.type in self.devices, op, name, f"on {known}", tensor.device)
        check(tensor.device == device, op, name, f"on {device} like the first", tensor.device)


def check(right, op, argument, expected, got):
    if not right:
        raise common.InputError(f"{op}: {argument} must be {expected}, got {got}")


def check_like(op, argument, tensor, param, dtype, device):
    """`tensor` lies in memory as `param` does."""

    def form(x):  # strides of dimensions of size 1 say nothing
        strides = tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1)
        return x.dtype, tuple(x.shape), strides, x.device

    expected = dtype, *form(param)[1:3], device
    says = "{} {} with strides {} on {}".format
    check(form(tensor) == expected, op, argument, says(*expected), says(*form(tensor)))


def stop(problem):
    """What a launcher returned: None, or a sentence."""
    if problem:
        raise common.InputError(problem)


def table_of(lists):
    """Five lists of tensors -> a row per tensor: five addresses (0: no anchor), elements."""
    rows = zip(*lists, strict=True)
    return tuple((*(0 if t is None else t.data_ptr() for t in r), r[0].numel()) for r in rows)


# --- CUDA -----------------------------------------------------------------------------------------
# `module` is the extension, or in the tests the emulator's stand-in. Nothing here waits for the
# device.


def launch(launcher, device, *arguments):
    """Calls a launcher on the current stream of the tensors' device; the emulator has none."""
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        stop(launcher(*arguments, stream))


def knn_kth_distance_cuda(module, queries, reference, k, form="fast"):
    """Both arguments fp32 and contiguous.  [N, D], [M, D] -> [N]"""
    (n, d), m, device = queries.shape, len(reference), queries.device
    out = torch.empty(n, device=device)
    sizes = queries.data_ptr(), n, reference.data_ptr(), m, d, k, out.data_ptr()
    if form == "naive":
        launch(module.knn_kth_distance_naive_cuda, device, *sizes)
    else:
        needed = module.knn_kth_distance_cuda_scratch(n, m, d, k)
        scratch = torch.empty(needed, dtype=torch.uint8, device=device)
        launch(module.knn_kth_distance_cuda, device, *sizes, scratch.data_ptr())
    return out


@functools.lru_cache(maxsize=16)
def spd_tables(tensors, device):
    """Descriptor table [tensors, 7] and owner of each chunk [chunks], on the device.

    Kept: a step copies nothing to the device unless a tensor has moved since, as gradients may
    after zero_grad(set_to_none=True). A step that is captured in a graph must be in here already.
    """
    rows = torch.tensor(tensors, dtype=torch.int64)
    chunks = (rows[:, 5] + SPD_CHUNK - 1) // SPD_CHUNK
    first = chunks.cumsum(0) - chunks
    owner = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(chunks)
    both = torch.cat([rows, first[:, None]], 1), owner
    if device.type == "cuda":  # pinned: the copy does not wait for the device
        both = (x.pin_memory().to(device, non_blocking=True) for x in both)
    return tuple(both)


def spd_step_cuda(module, tensors, device, step, lr, beta1, beta2, eps, spd_lambda, form="fast"):
    """tensors: see `table_of`. step (from 1) and lr: fp32 scalars on the device.

    Returns [tensors, 4], fp64, on the device: S1, S2, S3 and the factor f.
    """
    table, owner = spd_tables(tensors, device)
    report = torch.empty(len(table), 4, dtype=torch.float64, device=device)
    scalars = step.data_ptr(), lr.data_ptr(), beta1, beta2, eps, spd_lambda
    head = table.data_ptr(), len(table)
    if form == "naive":
        launch(module.spd_step_naive_cuda, device, *head, *scalars, report.data_ptr())
    else:
        partial = torch.empty(len(owner), 3, dtype=torch.float64, device=device)
        head, tail = (*head, owner.data_ptr(), len(owner)), (partial.data_ptr(), report.data_ptr())
        launch(module.spd_step_cuda, device, *head, *scalars, *tail)
    return report
