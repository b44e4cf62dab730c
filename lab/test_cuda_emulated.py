"""The CUDA kernels, executed on the CPU by lab/emulator. Says nothing about speed or about nvcc's
code; test_cuda_faults.py shows what the emulator finds."""

import emulator
import pytest
import torch
from test_knn_kth_distance import assert_exact, clip_like, normal
from test_spd_step import assert_equals_the_reference, bits, step_options, tensors_of

from csrc import ops

pytestmark = pytest.mark.skipif(
    emulator.compiler() is None, reason="g++ not found: it compiles the CUDA kernels for the CPU"
)


def replace(text, old, new):
    assert text.count(old) == 1, f"{text.count(old)} times in the source: {old}"
    return text.replace(old, new)


def small(text):
    """k-NN with slabs that small data fills."""
    return replace(text, "kFirstSlab = 16 * kTile, kGrowth = 8", "kFirstSlab = kTile, kGrowth = 2")


def small_without_fallback(text):
    """As `small`, and queries that the filter cannot decide stay -1."""
    return small(replace(text, "knn_brute_kernel<<<n, kThreads, 0, queue>>>(b);", ""))


def brute_alone(text):
    """The filter decides nothing."""
    return replace(text, "bool decided = count >= k", "bool decided = count > b.capacity")


@pytest.fixture(scope="module")
def knn():
    return emulator.load("knn_kth_distance")


@pytest.fixture(scope="module")
def brute():
    return emulator.load("knn_kth_distance", brute_alone)


@pytest.fixture(params=["knn", "brute"])
def either(request):
    return request.getfixturevalue(request.param).knn_kth_distance


@pytest.fixture(scope="module")
def small_knn():
    return emulator.load("knn_kth_distance", small)


@pytest.fixture(scope="module")
def filter_alone():
    return emulator.load("knn_kth_distance", small_without_fallback).knn_kth_distance


@pytest.fixture(scope="module")
def spd():
    return emulator.load("spd_step")


# ---- knn_kth_distance


@pytest.mark.parametrize(
    "n, m, d, k",
    [
        (1, 1, 1, 1),
        (3, 7, 3, 7),
        (129, 5, 1, 2),
        (2, 129, 33, 5),
        (1, 127, 768, 64),
        (1, 129, 1024, 1),
        (0, 4, 2, 1),
    ],
)
def test_knn_equals_brute_force_on_odd_sizes(either, n, m, d, k):
    assert_exact(either, normal(n, d, seed=1), normal(m, d, seed=2), k)


def test_knn_gives_the_same_bits_by_brute_force_and_under_every_schedule(small_knn, brute):
    queries, reference = clip_like(3, 24, seed=3), clip_like(300, 24, seed=4)
    results = set()
    for library in (small_knn, brute):
        for library.schedule in emulator.SCHEDULES:
            results.add(tuple(library.knn_kth_distance(queries, reference, 6).tolist()))
    assert len(results) == 1


def test_knn_filter_decides_sorted_features_without_brute_force(filter_alone):
    assert_exact(filter_alone, clip_like(5, 33, seed=5), clip_like(1025, 33, seed=6), 1, 40)


def test_knn_first_slab_of_full_size_is_followed_by_a_bound(knn):
    queries, reference = clip_like(2, 8, seed=5), clip_like(2500, 8, seed=6)
    assert_exact(knn.knn_kth_distance, queries, reference, 3)


def indistinct(queries, rows, seed):
    """Rows around the queries, all nearer to each other than the rounding to fp16 can show."""
    noise = normal(rows, queries.shape[1], seed=seed)
    return queries[torch.arange(rows) % len(queries)] + 2e-5 * noise


def test_knn_is_exact_on_rows_that_fp16_cannot_tell_apart(filter_alone):
    queries = clip_like(4, 64, seed=7)
    assert_exact(filter_alone, queries, indistinct(queries, 200, 8), 1, 7, 30)


def test_knn_handles_ties_and_duplicates_and_zero_vectors(small_knn):
    reference = torch.zeros(140, 5)
    reference[:70, 0] = 1.0
    queries = torch.stack([torch.zeros(5), reference[0]])
    assert_exact(small_knn.knn_kth_distance, queries, reference, 1, 40, 71)


def test_knn_is_exact_for_norms_from_a_thousandth_to_a_thousand(small_knn):
    scale = torch.logspace(-3, 3, 150)[:, None]
    reference = clip_like(150, 20, seed=9) * scale
    queries = clip_like(4, 20, seed=10) * scale[[0, 50, 100, 149]]
    assert_exact(small_knn.knn_kth_distance, queries, reference, 1, 20)


def test_knn_leaves_scores_that_overflow_to_brute_force(small_knn, filter_alone):
    queries, reference = 1e25 * clip_like(2, 5, seed=11), 1e25 * clip_like(40, 5, seed=12)
    assert (filter_alone(queries, reference, 3) == -1).all()
    assert_exact(small_knn.knn_kth_distance, queries, reference, 3)


def test_knn_takes_any_k_and_several_batches_of_queries(small_knn, monkeypatch):
    monkeypatch.setattr(ops, "MOST_QUERIES", 128)
    queries, reference = clip_like(130, 3, seed=13), clip_like(50, 3, seed=14)
    assert_exact(small_knn.knn_kth_distance, queries, reference, 1, 40, 50)


# ---- spd_step


@pytest.mark.parametrize("accumulated", [False, True], ids=["this step's c", "accumulated c"])
@pytest.mark.parametrize(
    "given, options",
    [
        (dict(), dict()),
        (dict(anchored=False), dict(signs="+-")),
        (dict(shift=3), dict(signs="+-", eps=0.0, spd_lambda=2.0)),
    ],
    ids=str,
)
def test_spd_step_equals_the_loop_for_ten_steps_on_ragged_tensors(spd, given, options, accumulated):
    lists = tensors_of([1, 3, 0, 511, 4096, 4097] + [5] * 100, **given)
    for spd.schedule in emulator.SCHEDULES:
        options |= dict(accumulated=accumulated, kernel=spd)
        assert assert_equals_the_reference(lists, 4, **options).any()  # some are projected


def test_spd_step_gives_the_same_bits_under_every_schedule_and_alignment(spd):
    results = []
    for spd.schedule, shift in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 3)):
        lists, sums = tensors_of([5000, 40]), torch.zeros(2, 3, dtype=torch.float64)
        lists[0] = [torch.cat([torch.zeros(shift), p])[shift:] for p in lists[0]]
        lists[2] = [p - a for p, a in zip(*lists[:2], strict=True)]
        lists[3] = [-10 * g for g in lists[2]]  # momentum that still moves outwards
        spd.spd_step(*lists, **step_options(2), sums=sums)
        assert (sums > 0).all()  # both are projected
        results.append(bits(lists))
    assert all(torch.equal(result, results[0]) for result in results)


def test_spd_step_does_not_project_by_a_gradient_that_is_not_a_number(spd):
    lists = tensors_of([10])
    lists[2][0][0] = float("nan")
    spd.spd_step(*lists, **step_options(1))
    assert lists[0][0][1:].isfinite().all()
