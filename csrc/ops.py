"""The two ops: what they take is checked here, then addresses go to the compiled functions.

They are registered with PyTorch as `torch.ops.csrc.knn_kth_distance` and `torch.ops.csrc.spd_step`:
fake tensors and torch.compile know their shapes, autograd sees what they change in place, and
`backward` through a distance says that there is no gradient.
"""

import contextlib
import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

loaded = None  # the Kernels of this process, set by build.load


class Kernels:
    """The compiled kernels. A wrong argument raises ValueError: op, argument, what was got.

    devices: ("cpu",) or ("cpu", "cuda"). levels: the instruction sets that this CPU offers to
    k-NN, the best first; `level`, the one in use, may be set to another of them. All of them give
    the same bits.
    """

    def __init__(self, module, cuda=False):
        self.module, self.devices = module, ("cpu", "cuda") if cuda else ("cpu",)
        self.levels = module.knn_kth_distance_levels().split() if module else ["baseline"]
        self.level = self.levels[0]

    def knn_kth_distance(self, queries, reference, k):
        """VRF Eq. (4), exact distance to the k-th nearest row.  [N, D], [M, D] -> [N] fp32

        Any float dtype (converted to fp32 first) and any strides; k any integer from 1 to M; no
        gradient. On the CPU NaN, infinity and rows longer than 5e17 are refused. On a GPU nothing
        is looked for, since the answer would have to wait for the device: there a row with NaN
        counts as farthest.
        """
        op = "knn_kth_distance"
        for name, tensor in (("queries", queries), ("reference", reference)):
            check(isinstance(tensor, Tensor), op, name, "a tensor", type(tensor).__name__)
            check(tensor.is_floating_point(), op, name, "a float tensor", tensor.dtype)
            check(tensor.layout == torch.strided, op, name, "a dense tensor", tensor.layout)
            self.check_device(op, name, tensor, queries.device)
            check(tensor.dim() == 2, op, name, "two dimensions", tuple(tensor.shape))
        d, m, shape = queries.shape[1], len(reference), tuple(reference.shape)
        check(reference.shape[1] == d > 0, op, "reference", f"[M, {d}], D > 0", shape)
        check(m > 0, op, "reference", "one row or more", shape)
        try:
            number = operator.index(k)
        except TypeError:
            number = 0
        check(1 <= number <= m, op, "k", f"an integer from 1 to {m}", k)
        return knn_op(queries, reference, number)

    def spd_step(self, params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps,
                 spd_lambda, conditions=None, sums=None):  # fmt: skip
        """One step of Adam with selective projection (SPD Eqs. 3, 4, 9), in place, on lists.

        All tensors of one call share dtype (fp32; on the CPU also fp64) and device, and each fills
        its memory (contiguous, or channels_last for all five alike). An anchor of None is the zero
        anchor. `step` counts from 1. With D = w - anchor and u the Adam step, S1 = sum g D,
        S2 = sum D^2, S3 = sum u (2 D + u); a tensor is projected where c < 0 and S3 > 0.
        conditions [tensors], fp64: c of Alg. 2, which adds up, c <- c - S1; None: c = -S1 of this
        step alone. sums [tensors, 3], fp64, receives S1, S2, S3.
        """
        op, lists = "spd_step", (params, anchors, grads, exp_avgs, exp_avg_sqs)
        for name, column in zip(LISTS, lists, strict=True):
            check(len(column) == len(params), op, name, f"{len(params)} tensors", len(column))
        check(step >= 1, op, "step", "1 or more", step)
        if not params:
            return
        check(isinstance(params[0], Tensor), op, "params", "tensors", type(params[0]).__name__)
        device, dtype = params[0].device, params[0].dtype
        self.check_device(op, "params", params[0], device)
        known = (torch.float32,) if device.type == "cuda" else (torch.float32, torch.float64)
        check(dtype in known, op, "params", " or ".join(map(str, known)), dtype)
        for i, param in enumerate(params):  # about 1 us a tensor: a ViT has 760 of them
            check_dense(op, i, param, dtype, device)
            shape, stride = param.shape, param.stride()
            for name, column in zip(LISTS[1:], lists[1:], strict=True):
                tensor = column[i]
                if tensor is None and column is anchors:
                    continue
                right = isinstance(tensor, Tensor) and tensor.dtype == dtype
                right = right and tensor.shape == shape and tensor.device == device
                if not (right and tensor.stride() == stride):
                    check_like(op, f"{name}[{i}]", tensor, param)
        for name, tensor, shape in (
            ("conditions", conditions, (len(params),)),
            ("sums", sums, (len(params), 3)),
        ):
            if tensor is not None:
                expected = f"contiguous float64 {shape} on {device}"
                fits = tensor.is_contiguous() and tuple(tensor.shape) == shape
                fits = fits and tensor.dtype == torch.float64 and tensor.device == device
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                check(fits, op, name, expected, got)
        with torch.no_grad():
            spd_op(*lists, step, lr, *betas, eps, spd_lambda, conditions, sums)

    def check_device(self, op, name, tensor, device):
        known = " or ".join(self.devices)
        check(tensor.device.type in self.devices, op, name, f"on {known}", tensor.device)
        check(tensor.device == device, op, name, f"on {device} like the first", tensor.device)


LISTS = ("params", "anchors", "grads", "exp_avgs", "exp_avg_sqs")


def check(right, op, argument, expected, got):
    if not right:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_dense(op, i, param, dtype, device):
    if type(param) in (Tensor, torch.nn.Parameter) and param.is_contiguous():  # nearly always
        if param.dtype == dtype and param.device == device:
            return
    argument = f"params[{i}]"
    check(isinstance(param, Tensor), op, argument, "a tensor", type(param).__name__)
    right = param.dtype == dtype and param.device == device
    got = f"{param.dtype} on {param.device}"
    check(right, op, argument, f"{dtype} on {device} like the first", got)
    dense = param.is_contiguous() or param.is_contiguous(memory_format=torch.channels_last)
    check(dense, op, argument, "contiguous memory", f"strides {param.stride()}")


def check_like(op, argument, tensor, param):
    """`tensor` has dtype and device of `param` and lies in memory as it does."""
    check(isinstance(tensor, Tensor), op, argument, "a tensor", type(tensor).__name__)
    right = tensor.dtype == param.dtype and tensor.device == param.device
    right = right and tensor.shape == param.shape and strides(tensor) == strides(param)
    says = "{} {} with strides {} on {}".format
    expected, got = (says(x.dtype, tuple(x.shape), x.stride(), x.device) for x in (param, tensor))
    check(right, op, argument, expected, got)


def strides(tensor):
    """Those of dimensions larger than 1: the others say nothing."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


# --- PyTorch's side -------------------------------------------------------------------------------


@torch.library.custom_op("csrc::knn_kth_distance", mutates_args=())
def knn_op(queries: Tensor, reference: Tensor, k: int) -> Tensor:
    queries, reference = queries.float().contiguous(), reference.float().contiguous()
    if queries.is_cuda:
        return knn_kth_distance_cuda(loaded.module, queries, reference, k)
    (n, d), m = queries.shape, len(reference)
    out = torch.empty(n, dtype=torch.float32, device="cpu")
    sizes = queries.data_ptr(), n, reference.data_ptr(), m, d, k
    threads = torch.get_num_threads()
    stop(loaded.module.knn_kth_distance_cpu(*sizes, loaded.level, threads, out.data_ptr()))
    return out


@knn_op.register_fake
def knn_fake(queries, reference, k):
    return queries.new_empty(len(queries), dtype=torch.float32)


@torch.library.custom_op(
    "csrc::spd_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "conditions", "sums")
)
def spd_op(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    spd_lambda: float,
    conditions: Tensor | None,
    sums: Tensor | None,
) -> None:
    tensors, device = table_of((params, anchors, grads, exp_avgs, exp_avg_sqs)), params[0].device
    scalars = step, lr, beta1, beta2, eps, spd_lambda
    if device.type == "cuda":
        report = spd_step_cuda(loaded.module, tensors, device, *scalars, conditions)
        if sums is not None:
            sums.copy_(report[:, :3])
        return
    table = torch.tensor(tensors, dtype=torch.int64, device="cpu")
    outputs = (0 if x is None else x.data_ptr() for x in (conditions, sums))
    size, threads = params[0].element_size(), torch.get_num_threads()
    loaded.module.spd_step_cpu(table.data_ptr(), len(tensors), size, *scalars, threads, *outputs)


@spd_op.register_fake
def spd_fake(*arguments):
    pass


def stop(problem):
    """What a launcher returned: None, or a sentence."""
    if problem:
        raise ValueError(problem)


def table_of(lists):
    """Five lists of tensors -> a row per tensor, as SpdTensor of kernels.h: five addresses (0: no
    anchor), elements, 0.
    """
    rows = zip(*lists, strict=True)
    return tuple((*(0 if t is None else t.data_ptr() for t in r), r[0].numel(), 0) for r in rows)


# --- CUDA -----------------------------------------------------------------------------------------
# `module` is the extension, or in the tests the emulator's stand-in. Nothing here waits for the
# device.


def launch(launcher, device, *arguments):
    """Calls a launcher on the current stream of the tensors' device; the emulator has none."""
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        stop(launcher(*arguments, stream))


def knn_kth_distance_cuda(module, queries, reference, k):
    """Both arguments fp32 and contiguous.  [N, D], [M, D] -> [N]"""
    (n, d), m, device = queries.shape, len(reference), queries.device
    out = torch.empty(n, dtype=torch.float32, device=device)
    centre = reference[:: -(-m // 256)].mean(0)  # of at most 256 rows: makes the band narrow
    size = module.knn_kth_distance_cuda_scratch(n, m, d, k)
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    sizes = queries.data_ptr(), n, reference.data_ptr(), m, d, k
    pointers = (x.data_ptr() for x in (centre, out, scratch))
    launch(module.knn_kth_distance_cuda, device, *sizes, *pointers)
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


def spd_step_cuda(module, tensors, device, step, lr, beta1, beta2, eps, spd_lambda, conditions):
    """tensors: see `table_of`. -> [tensors, 4], fp64, on the device: S1, S2, S3 and the factor f"""
    table, owner = spd_tables(tensors, device, module.SPD_CHUNK)
    report = torch.empty(len(table), 4, dtype=torch.float64, device=device)
    partial = torch.empty(len(owner), 3, dtype=torch.float64, device=device)
    sizes = table.data_ptr(), len(table), owner.data_ptr(), len(owner)
    scalars = step, lr, beta1, beta2, eps, spd_lambda
    given = 0 if conditions is None else conditions.data_ptr()
    outputs = partial.data_ptr(), given, report.data_ptr()
    launch(module.spd_step_cuda, device, *sizes, *scalars, *outputs)
    return report
