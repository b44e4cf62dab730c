"""The CUDA kernels on a real GPU, against fp64, at sizes too large for the emulator (lab/); and in
a CUDA graph, which proves that a launcher neither allocates nor waits for the device.
"""

import pytest
import torch
from compiled import kernels, under_each_default
from test_knn_kth_distance import assert_exact, clip_like
from test_spd_step import step_options, tensors_of

import spd

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: not run on one")


def on_gpu(lists):
    return [[t.cuda() for t in column] for column in lists]


@pytest.mark.parametrize(
    "n, m, d, k",
    [(1, 1, 1, 1), (7, 127, 3, 127), (129, 1025, 512, 10), (300, 30000, 768, 30),
     (65, 20000, 1024, 16384), (3, 20000, 64, 17000)],
)  # fmt: skip
def test_knn_equals_brute_force_and_repeats_its_bits(n, m, d, k):
    queries, reference = clip_like(n, d, seed=1).cuda(), clip_like(m, d).cuda()
    assert_exact(kernels().knn_kth_distance, queries, reference, k)
    found = kernels().knn_kth_distance(queries, reference, k)
    assert torch.equal(found, kernels().knn_kth_distance(queries, reference, k))
    on_cpu = kernels().knn_kth_distance(queries.cpu(), reference.cpu(), k)
    assert torch.allclose(found.cpu(), on_cpu, rtol=1e-7, atol=0)


def test_default_dtype_and_device_do_not_matter_on_the_gpu():
    given = clip_like(40, 64, seed=1).cuda(), clip_like(900, 64).cuda(), 5
    for found in under_each_default(lambda: kernels().knn_kth_distance(*given)):
        assert torch.equal(found, kernels().knn_kth_distance(*given))


@pytest.mark.parametrize("accumulated", [False, True], ids=["this step's c", "accumulated c"])
def test_spd_step_equals_the_loop_in_fp64_for_ten_steps(accumulated):
    lists = on_gpu(tensors_of([1, 3, 0, 511, 65535, 65537, 1 << 20] + [17] * 300))
    exact = [[t.double() for t in column] for column in lists]
    count = len(lists[0])
    ours, theirs = (torch.zeros(count, dtype=torch.float64, device="cuda") for _ in range(2))
    for step in range(1, 11):
        for grad, double in zip(lists[2], exact[2], strict=True):
            double.copy_(grad.normal_())
        given = (ours, theirs) if accumulated else (None, None)
        kernels().spd_step(*lists, **step_options(step), conditions=given[0])
        spd.spd_step(*exact, **step_options(step), conditions=given[1])
    pairs = list(zip(lists[0], exact[0], strict=True))
    close = [torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5) for a, b in pairs]
    assert sum(close) >= count - 3  # the sign of a c that is nearly 0 hangs on rounding


def test_the_launchers_can_be_captured_and_replayed():
    queries, reference = clip_like(200, 64, seed=6).cuda(), clip_like(3000, 64).cuda()
    lists = on_gpu(tensors_of([5000, 7]))
    kernels().spd_step(*lists, **step_options(1))  # leaves its table on the device
    expected, before = kernels().knn_kth_distance(queries, reference, 5), lists[0][0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels().knn_kth_distance(queries, reference, 5)
        kernels().spd_step(*lists, **step_options(2))
    assert torch.equal(lists[0][0], before)  # captured, not run
    graph.replay()
    assert torch.equal(found, expected) and not torch.equal(lists[0][0], before)
