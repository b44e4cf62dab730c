"""The CUDA kernels on a real GPU, against fp64, at sizes too large for the emulator; and in a CUDA
graph, which proves that a launcher neither allocates nor waits for the device."""

import ctypes
import shutil
import subprocess

import cuda_cases
import emulator
import pytest
import torch

from csrc import build

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: not run on a GPU"),
    pytest.mark.skipif(
        shutil.which("nvcc") is None, reason="nvcc not found: cannot compile the kernels"
    ),
]
ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}


class GpuLibrary(emulator.Library):
    """The same calls as of the emulated library, on the current stream and with nothing checked."""

    def _run(self, launcher, memory, arguments):
        function = getattr(self.c, launcher)
        function.restype = ctypes.c_char_p
        kinds = {int: emulator.SIZE, float: emulator.NUMBER}
        error = function(*(kinds[type(a)](a) for a in arguments))
        if error is not None:
            raise emulator.KernelError(error.decode())

    def _spd_memory(self, *_):
        return []  # the table cannot be read from here


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    major, minor = torch.cuda.get_device_capability()
    print(f"\n{torch.cuda.get_device_name()}, sm_{major}{minor}")
    target = tmp_path_factory.mktemp("cuda") / "kernels.so"
    sources = [emulator.CSRC / "knn_kth_distance.cu", emulator.CSRC / "spd_step.cu"]
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        f"-arch=sm_{major}{minor}",
        "-Xcompiler=-fPIC",
        "-shared",
    ]
    subprocess.run([*command, *sources, "-o", target], check=True)
    return GpuLibrary(target)


def on_gpu(tensors):
    return None if tensors is None else [t.cuda() for t in tensors]


@pytest.mark.parametrize(
    "n, m, d, k",
    [
        (1, 1, 1, 1),
        (7, 127, 3, 127),
        (129, 1025, 512, 10),
        (300, 30000, 768, 30),
        (65, 20000, 1024, 16384),
    ],
)
def test_knn_on_the_gpu_equals_brute_force_in_both_forms(gpu, n, m, d, k):
    queries, reference = cuda_cases.features(n, d, 1).cuda(), cuda_cases.features(m, d, 2).cuda()
    fast = gpu.knn_kth_distance(queries, reference, k)
    wanted = cuda_cases.kth_distance(queries, reference, k)
    assert (fast.double() - wanted).abs().max() <= 1e-7
    assert torch.equal(fast, gpu.knn_kth_distance(queries, reference, k, "naive"))
    assert torch.equal(fast, gpu.knn_kth_distance(queries, reference, k))


def test_knn_on_the_gpu_is_exact_on_rows_that_bf16_cannot_tell_apart(gpu):
    queries = cuda_cases.features(20, 512, 3)
    reference = cuda_cases.indistinct(queries, 9000, 4).cuda()
    queries = queries.cuda()
    for k in (1, 400):
        found = gpu.knn_kth_distance(queries, reference, k)
        assert (found.double() - cuda_cases.kth_distance(queries, reference, k)).abs().max() <= 1e-7


@pytest.mark.parametrize("form", ["naive", "fast"])
@pytest.mark.parametrize("anchored", [True, False], ids=["anchors", "zero anchor"])
def test_spd_step_on_the_gpu_equals_the_loop_for_ten_steps(gpu, form, anchored):
    sizes = [1, 3, 0, 511, 65535, 65537, 1 << 20] + [17] * 300
    params, anchors, m, v = map(on_gpu, cuda_cases.spd_tensors(sizes, 5))
    anchors = anchors if anchored else None
    state = cuda_cases.doubles((params, anchors, m, v))
    for step in range(1, 11):
        grads = [torch.randn_like(p) for p in params]
        report = gpu.spd_step(params, anchors, grads, m, v, step, *ADAM.values(), 1.0, form)
        wanted = cuda_cases.spd_reference(state, grads, step, *ADAM.values(), 1.0).to(report)
        clear = wanted[:, 0].abs() > 1e-4  # where the sign of c does not hang on rounding
        assert torch.equal((report[:, 3] != 1)[clear], (wanted[:, 3] != 1)[clear])
    for found, wanted in zip(params, state[0], strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_launchers_can_be_captured_and_replayed(gpu):
    queries = cuda_cases.features(200, 64, 6).cuda()
    reference = cuda_cases.features(3000, 64, 7).cuda()
    params, anchors, m, v = map(on_gpu, cuda_cases.spd_tensors([5000, 7], 8))
    grads = [p - a for p, a in zip(params, anchors, strict=True)]
    tensors = build.table_of((params, anchors, grads, m, v))
    build.spd_tables(tensors, params[0].device)  # as the step before has left them there
    step, lr = torch.ones((), device="cuda"), torch.full((), 1e-3, device="cuda")
    expected = gpu.knn_kth_distance(queries, reference, 5)
    before = params[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = build.knn_kth_distance_cuda(gpu, queries, reference, 5)
        build.spd_step_cuda(gpu, tensors, step.device, step, lr, 0.9, 0.999, 1e-8, 1.0)
    assert torch.equal(params[0], before)  # captured, not run
    graph.replay()
    assert torch.equal(found, expected)
    assert not torch.equal(params[0], before)
