"""The two ops: what they take is checked here, then addresses go to the compiled functions.

They are registered with PyTorch as `torch.ops.csrc.knn_kth_distance` and `torch.ops.csrc.spd_step`:
fake tensors and torch.compile know their shapes, autograd sees what they change in place, and
`backward` through a distance says that there is no gradient.
"""

import contextlib
import functools
import math
import numbers

import torch
from torch import Tensor

loaded = None  # the Kernels of this process, set by build.load
LISTS = ("params", "anchors", "grads", "exp_avgs", "exp_avg_sqs")
MOST_QUERIES = 8192  # of a batch of k-NN on CUDA


class Kernels:
    """The compiled kernels. A wrong argument raises ValueError: op, argument, what was got.

    devices: ("cpu",) or ("cpu", "cuda"); knn_devices: those of k-NN, which on a CPU without AVX2 is
    left to PyTorch. levels: the instruction sets that this CPU offers to k-NN, the best first;
    `level`, the one in use, may be set to another of them. All of them give the same bits. It is
    the first but avx512bf16 (newer AMD), which has been tested and never timed.
    """

    def __init__(self, module, cuda=False):
        self.module, self.devices = module, ("cpu", "cuda") if cuda else ("cpu",)
        self.levels = module.knn_kth_distance_levels().split() if module else []
        self.level = next((level for level in self.levels if level != "avx512bf16"), None)
        self.knn_devices = self.devices if self.levels else self.devices[1:]

    def knn_kth_distance(self, queries, reference, k):
        """VRF Eq. (4), exact distance to the k-th nearest row.  [N, D], [M, D] -> [N] fp32

        Any float dtype (converted to fp32 first) and any strides; k any integer from 1 to M; no
        gradient. On the CPU NaN, infinity and rows longer than 5e17 are refused. On a GPU nothing
        is looked for, since the answer would have to wait for the device: there a row with NaN
        counts as farthest.
        """
        op, known = "knn_kth_distance", " or ".join(self.knn_devices) or "a GPU: no AVX2 here"
        for name, rows in (("queries", queries), ("reference", reference)):
            floats = isinstance(rows, Tensor) and rows.is_floating_point()
            right = floats and rows.dim() == 2 and rows.layout == torch.strided
            check(right, op, name, "a dense float tensor of two dimensions", rows)
            check(rows.device.type in self.knn_devices, op, name, f"on {known}", rows)
        device = queries.device
        check(reference.device == device, op, "reference", f"on {device} like queries", reference)
        d, (m, width) = queries.shape[1], reference.shape
        right = width == d > 0 and 0 < m < 2**31
        check(right, op, "reference", f"[M, {d}], 0 < M < 2^31, D > 0", reference)
        whole = isinstance(k, numbers.Integral)
        check(whole and 1 <= k <= m, op, "k", f"an integer from 1 to {m}", k)
        check(device.type == "cuda" or self.level in self.levels, op, "level", "known", self.level)
        return knn_op(queries, reference, int(k))

    def spd_step(self, params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps,
                 spd_lambda, conditions=None, sums=None):  # fmt: skip
        """One step of Adam with selective projection (SPD Eqs. 3, 4, 9), in place, on lists.

        All tensors of one call are contiguous, fp32 and on one device. An anchor of None is the
        zero anchor. `step` counts from 1. With D = w - anchor and u the Adam step, s1 = sum g D,
        s2 = sum D^2, s3 = sum u (2 D + u); a tensor is projected where c < 0 and s3 > 0.
        conditions [tensors], fp64: c of Alg. 2, which adds up, c <- c - s1; None: c = -s1 of this
        step alone. sums [tensors, 3], fp64, receives s1, s2, s3.
        """
        op, lists = "spd_step", (params, anchors, grads, exp_avgs, exp_avg_sqs)
        for name, column in zip(LISTS, lists, strict=True):
            check(len(column) == len(params), op, name, f"{len(params)} tensors", len(column))
        check(step >= 1, op, "step", "1 or more", step)
        if not params:
            return
        device = params[0].device
        check(device.type in self.devices, op, "params", f"on {self.devices}", device)
        for name, column in zip(LISTS, lists, strict=True):
            for i, (tensor, param) in enumerate(zip(column, params, strict=True)):
                if tensor is not None or name != "anchors":
                    check_like(name, tensor, torch.float32, device, param.shape, i)
        for name, tensor, width in (("conditions", conditions, ()), ("sums", sums, (3,))):
            if tensor is not None:
                check_like(name, tensor, torch.float64, device, (len(params), *width))
        with torch.no_grad():
            spd_op(*lists, step, lr, *betas, eps, spd_lambda, conditions, sums)


def check(right, op, argument, expected, got):
    if right:
        return
    if isinstance(got, Tensor):
        strides = "" if got.is_contiguous() else f" strides {got.stride()}"
        got = f"{got.dtype} {tuple(got.shape)}{strides} on {got.device}"
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_like(name, tensor, dtype, device, shape, index=None):
    """Under 1 us; a ViT has 760 tensors, so that the argument's name is put together at need."""
    if isinstance(tensor, Tensor) and tensor.is_contiguous():
        if tensor.dtype == dtype and tensor.device == device and tensor.shape == shape:
            return
    expected = f"a contiguous tensor, {dtype} {tuple(shape)} on {device}"
    argument = name if index is None else f"{name}[{index}]"
    check(False, "spd_step", argument, expected, tensor)


# --- PyTorch's side -------------------------------------------------------------------------------


@torch.library.custom_op("csrc::knn_kth_distance", mutates_args=())
def knn_op(queries: Tensor, reference: Tensor, k: int) -> Tensor:
    queries, reference = padded(queries), padded(reference)
    if queries.is_cuda:
        return knn_kth_distance_cuda(loaded.module, queries, reference, k)
    (n, d), m = queries.shape, len(reference)
    out = torch.empty(n, dtype=torch.float32, device="cpu")
    sizes = queries.data_ptr(), n, reference.data_ptr(), m, d, k
    threads = torch.get_num_threads()
    if loaded.module.knn_kth_distance_cpu(*sizes, loaded.level, threads, out.data_ptr()):
        return out
    for name, rows in (("queries", queries), ("reference", reference)):
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        for row in (~(lengths < 4.9e17)).nonzero().flatten().tolist():
            name, expected = f"{name} row {row}", "finite and shorter than 5e17"
            check(False, "knn_kth_distance", name, expected, f"length {lengths[row]:.2g}")


knn_op.register_fake(lambda rows, reference, k: rows.new_empty(len(rows), dtype=torch.float32))


def padded(rows):
    """In fp32, contiguous, with columns of zeros up to a multiple of 32."""
    rows = rows.float().contiguous()
    missing = -rows.shape[1] % 32
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


@torch.library.custom_op(
    "csrc::spd_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "conditions", "sums")
)
def spd_op(params: list[Tensor], anchors: list[Tensor | None], grads: list[Tensor],
           exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], step: int, lr: float, beta1: float,
           beta2: float, eps: float, spd_lambda: float, conditions: Tensor | None,
           sums: Tensor | None) -> None:  # fmt: skip
    tensors, device = table_of((params, anchors, grads, exp_avgs, exp_avg_sqs)), params[0].device
    scalars = step, lr, beta1, beta2, eps, spd_lambda
    if device.type == "cuda":
        return spd_step_cuda(loaded.module, tensors, device, scalars, conditions, sums)
    table = torch.tensor(tensors, dtype=torch.int64, device="cpu")
    outputs = torch.get_num_threads(), address(conditions), address(sums)
    loaded.module.spd_step_cpu(table.data_ptr(), len(tensors), *scalars, *outputs)


spd_op.register_fake(lambda *arguments: None)


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def table_of(lists):
    """Five lists of tensors -> a row per tensor, as SpdTensor of kernels.h: five addresses (0: no
    anchor), elements, 0.
    """
    rows = zip(*lists, strict=True)
    return tuple((*map(address, row), row[0].numel(), 0) for row in rows)


# --- CUDA -----------------------------------------------------------------------------------------
# `module` is the extension, or in the tests the emulator's stand-in. Nothing here waits for the
# device.


def launch(launcher, device, *arguments):
    """Calls a launcher on the current stream of the tensors' device; the emulator has none."""
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        if problem := launcher(*arguments, stream):
            raise RuntimeError(problem)


def narrow(rows, centre):
    """Rows less the centre in fp16, and, in fp64, |x|, |x'|, |x - x'|: as they are, of the fp16
    rows, of what the rounding cut off.  [R, D], [D] -> [R, D], three of [R]
    """
    norm = functools.partial(torch.linalg.vector_norm, dim=1, dtype=torch.float64)
    rows = rows - centre
    rounded, full = rows.half(), norm(rows)
    return rounded, full, norm(rounded), norm(rows - rounded) + 2**-23 * full  # x - c is rounded


def knn_kth_distance_cuda(module, queries, reference, k):
    """The batches and the step `pack` of knn_kth_distance.cu.  [N, D], [M, D], padded -> [N]"""
    (n, d), m, device = queries.shape, len(reference), queries.device
    stride = int(m * 0.6180339887) + 1  # golden section: spreads first parts evenly
    while math.gcd(stride, m) != 1:
        stride += 1
    order = torch.arange(m, dtype=torch.int64, device=device) * stride % m
    centre = reference[:: -(-m // 256)].mean(0)  # of at most 256 rows: makes the band narrow
    rounded, y, y_rounded, y_lost = narrow(reference, centre)
    rounded, half_square = rounded[order], (y * y / 2).float()[order]
    out = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return out
    capacity = module.knn_kth_distance_cuda_capacity(m, k)
    size = max(1, min(MOST_QUERIES, 2**28 // (8 * capacity)))
    for part, result in zip(queries.split(size), out.split(size), strict=True):
        x16, x, x_rounded, x_lost = narrow(part, centre)
        largest = x_rounded * y_rounded.max() + (y * y).max() / 2
        band = x * y_lost.max() + x_lost * y_rounded.max() + (d + 16) * 2**-22 * largest
        band = (1.000001 * band).float()  # E(x)
        bound = torch.full_like(band, -math.inf)
        counts = torch.zeros(len(part), dtype=torch.int32, device=device)
        survivors = torch.empty(len(part), capacity, dtype=torch.int64, device=device)
        arrays = part, reference, x16, rounded, half_square, band, bound, counts, survivors, result
        pointers = [array.data_ptr() for array in arrays]
        batch = torch.tensor([*pointers, len(part), m, d, k, stride, capacity], device="cpu")
        launch(module.knn_kth_distance_cuda, device, batch.data_ptr())
    return out


@functools.lru_cache(maxsize=16)
def spd_tables(tensors, device, chunk):
    """Table [tensors, 7] and owner of each chunk [chunks], on the device.

    Kept: a step copies nothing to the device unless a tensor has moved since, as gradients may
    after zero_grad(set_to_none=True). A step that is captured in a graph must be in here already.
    """
    rows = torch.tensor(tensors, dtype=torch.int64, device="cpu")
    chunks = (rows[:, 5] + chunk - 1) // chunk
    rows[:, 6] = chunks.cumsum(0) - chunks  # where each begins
    owner = torch.arange(len(rows), dtype=torch.int32, device="cpu").repeat_interleave(chunks)
    if device.type == "cuda":  # pinned: the copy does not wait for the device
        rows, owner = (x.pin_memory().to(device, non_blocking=True) for x in (rows, owner))
    return rows, owner


def spd_step_cuda(module, tensors, device, scalars, conditions, sums):
    """tensors: see `table_of`; scalars: step, ..., spd_lambda."""
    table, owner = spd_tables(tensors, device, module.SPD_CHUNK)
    report = torch.empty(len(table), 4, dtype=torch.float64, device=device)
    partial = torch.empty(len(owner), 3, dtype=torch.float64, device=device)
    sizes = table.data_ptr(), len(table), owner.data_ptr(), len(owner)
    outputs = partial.data_ptr(), address(conditions), report.data_ptr()
    launch(module.spd_step_cuda, device, *sizes, *scalars, *outputs)
    if sums is not None:
        sums.copy_(report[:, :3])
