"""The CUDA kernels, executed on the CPU by lab/emulator, against fp64. Says nothing about
speed or about nvcc's code; test_cuda_faults.py shows what the emulator finds."""

import cuda_cases
import emulator
import pytest
import torch

from csrc import ops

pytestmark = pytest.mark.skipif(
    emulator.compiler() is None, reason="g++ not found: it compiles the CUDA kernels for the CPU"
)
ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}


def replace(text, old, new):
    assert text.count(old) == 1, f"{text.count(old)} times in the source: {old}"
    return text.replace(old, new)


def small(text):
    """k-NN with slabs that small data fills."""
    return replace(text, "kFirstSlab = 16 * kTile, kGrowth = 8", "kFirstSlab = kTile, kGrowth = 2")


def small_without_fallback(text):
    """As `small`, and queries that the filter cannot decide stay NaN."""
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
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def small_knn():
    return emulator.load("knn_kth_distance", small)


@pytest.fixture(scope="module")
def filter_alone():
    return emulator.load("knn_kth_distance", small_without_fallback)


@pytest.fixture(scope="module")
def spd():
    return emulator.load("spd_step")


def assert_exact(found, queries, reference, k, tolerance=1e-7):
    wanted = cuda_cases.kth_distance(queries, reference, k)
    error = (found.double() - wanted).abs()
    assert torch.all(error <= tolerance * wanted.clamp(min=1.0)), f"error {error.max():.2g}"


# ---- knn_kth_distance


def test_knn_of_three_points_worked_by_hand(either):
    reference = torch.tensor([[0.0, 0.0], [6.0, 8.0], [3.0, 4.0]])
    for k, distance in ((1, 0.0), (2, 5.0), (3, 10.0)):
        assert either.knn_kth_distance(torch.zeros(1, 2), reference, k).tolist() == [distance]


@pytest.mark.parametrize(
    "n, m, d, k",
    [
        (1, 1, 1, 1),
        (3, 7, 3, 7),
        (129, 5, 1, 2),
        (2, 129, 33, 5),
        (1, 127, 768, 64),
        (1, 129, 1024, 1),
    ],
)
def test_knn_equals_brute_force_on_odd_sizes(either, n, m, d, k):
    queries, reference = cuda_cases.features(n, d, 1), cuda_cases.features(m, d, 2)
    assert_exact(either.knn_kth_distance(queries, reference, k), queries, reference, k)


def test_knn_gives_the_same_bits_by_brute_force_and_under_every_schedule(small_knn, brute):
    queries, reference = cuda_cases.features(3, 24, 3), cuda_cases.features(300, 24, 4)
    results = {
        tuple(library.knn_kth_distance(queries, reference, 6, schedule).tolist())
        for library in (small_knn, brute)
        for schedule in emulator.SCHEDULES
    }
    assert len(results) == 1


@pytest.mark.parametrize("k", [1, 40])
def test_knn_filter_decides_sorted_features_without_brute_force(filter_alone, k):
    queries, reference = cuda_cases.features(5, 33, 5), cuda_cases.features(1025, 33, 6)
    assert_exact(filter_alone.knn_kth_distance(queries, reference, k), queries, reference, k)


def test_knn_first_slab_of_full_size_is_followed_by_a_bound(knn):
    queries, reference = cuda_cases.features(2, 8, 5), cuda_cases.features(2500, 8, 6)
    assert_exact(knn.knn_kth_distance(queries, reference, 3), queries, reference, 3)


@pytest.mark.parametrize("k", [1, 7, 30])
def test_knn_is_exact_on_rows_that_fp16_cannot_tell_apart(filter_alone, k):
    queries = cuda_cases.features(4, 64, 7)
    reference = cuda_cases.indistinct(queries, 200, 8)
    assert_exact(filter_alone.knn_kth_distance(queries, reference, k), queries, reference, k)


def test_knn_handles_ties_and_duplicates_and_zero_vectors(small_knn):
    reference = torch.zeros(140, 5)
    reference[:70, 0] = 1.0
    queries = torch.stack([torch.zeros(5), reference[0]])
    for k, distances in ((1, [0.0, 0.0]), (40, [0.0, 0.0])):
        assert small_knn.knn_kth_distance(queries, reference, k).tolist() == distances
    assert small_knn.knn_kth_distance(queries, reference, 71).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("k", [1, 20])
def test_knn_is_exact_for_norms_from_a_thousandth_to_a_thousand(small_knn, k):
    scale = torch.logspace(-3, 3, 150)[:, None]
    reference = cuda_cases.features(150, 20, 9) * scale
    queries = cuda_cases.features(4, 20, 10) * scale[[0, 50, 100, 149]]
    assert_exact(small_knn.knn_kth_distance(queries, reference, k), queries, reference, k)


def test_knn_leaves_scores_that_overflow_to_brute_force(small_knn, filter_alone):
    queries, reference = 1e25 * cuda_cases.features(2, 5, 11), 1e25 * cuda_cases.features(40, 5, 12)
    assert filter_alone.knn_kth_distance(queries, reference, 3).isnan().all()
    assert_exact(small_knn.knn_kth_distance(queries, reference, 3), queries, reference, 3)


def test_knn_takes_any_k_and_several_batches_of_queries(small_knn, monkeypatch):
    monkeypatch.setattr(ops, "MOST_QUERIES", 128)
    queries, reference = cuda_cases.features(130, 3, 13), cuda_cases.features(50, 3, 14)
    for k in (1, 40, 50):
        assert_exact(small_knn.knn_kth_distance(queries, reference, k), queries, reference, k)


def test_knn_of_no_queries_is_empty(knn):
    rows = torch.zeros(4, 2)
    assert knn.knn_kth_distance(rows[:0], rows, 1).shape == (0,)


# ---- spd_step


@pytest.mark.parametrize("spd_lambda", cuda_cases.GOLDEN)
def test_spd_step_follows_the_golden_trace(spd, spd_lambda):
    anchor = [torch.tensor(cuda_cases.GOLDEN_ANCHOR)]
    param, m, v = [anchor[0].clone()], [torch.zeros(2)], [torch.zeros(2)]
    trace = []
    for step, gradient in enumerate(cuda_cases.GOLDEN_GRADIENTS, 1):
        spd.spd_step(
            param, anchor, [torch.tensor(gradient)], m, v, step, 0.1, (0.9, 0.999), 1e-8, spd_lambda
        )
        trace.append(param[0].tolist())
    for step, wanted in zip((5, 6, 8), cuda_cases.GOLDEN[spd_lambda], strict=True):
        assert trace[step - 1] == pytest.approx(wanted, abs=5e-7)


def test_spd_step_follows_the_golden_trace_of_the_zero_anchor(spd):
    param, m, v = [torch.tensor(cuda_cases.GOLDEN_ANCHOR)], [torch.zeros(2)], [torch.zeros(2)]
    for step, gradient in enumerate(cuda_cases.GOLDEN_ZERO_GRADIENTS, 1):
        spd.spd_step(
            param, None, [torch.tensor(gradient)], m, v, step, 0.1, (0.9, 0.999), 1e-8, 1.0
        )
        if step in cuda_cases.GOLDEN_ZERO:
            assert param[0].tolist() == pytest.approx(cuda_cases.GOLDEN_ZERO[step], abs=5e-7)


@pytest.mark.parametrize("anchored", [True, False], ids=["anchors", "zero anchor"])
def test_spd_step_equals_the_loop_for_ten_steps_on_ragged_tensors(spd, anchored):
    params, anchors, m, v = cuda_cases.spd_tensors([1, 3, 0, 511, 4096, 4097], 20)
    anchors = anchors if anchored else None
    state = cuda_cases.doubles((params, anchors, m, v))
    generator = torch.Generator().manual_seed(21)
    projected = []
    for step in range(1, 11):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        report = spd.spd_step(params, anchors, grads, m, v, step, *ADAM.values(), 1.0, step % 3)
        wanted = cuda_cases.spd_reference(state, grads, step, *ADAM.values(), 1.0)
        assert torch.allclose(report, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(report[:, 3] != 1, wanted[:, 3] != 1)
        projected.append(int((wanted[:, 3] != 1).sum()))
    assert 0 < sum(projected) < 50  # some were projected, some not
    for found, wanted in zip(params, state[0], strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("push, projected", [(1.0, 3), (-1.0, 0)], ids=["all", "none"])
def test_spd_step_projects_all_or_none(spd, push, projected):
    params, anchors, m, v = cuda_cases.spd_tensors([5, 700, 4100], 22)
    grads = [push * (p - a) for p, a in zip(params, anchors, strict=True)]
    m = [-10.0 * push * g for g in grads]  # momentum that still moves outwards
    state = cuda_cases.doubles((params, anchors, m, v))
    before = [(p - a).norm() for p, a in zip(params, anchors, strict=True)]
    v = [torch.full_like(p, 1.0) for p in params]
    state = (*state[:3], [x.double() for x in v])
    report = spd.spd_step(params, anchors, grads, m, v, 3, *ADAM.values(), 1.0)
    wanted = cuda_cases.spd_reference(state, grads, 3, *ADAM.values(), 1.0)
    assert torch.allclose(report, wanted, rtol=1e-5, atol=1e-6)
    assert int((report[:, 3] != 1).sum()) == projected
    for found, wanted, anchor, radius in zip(params, state[0], anchors, before, strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)
        if projected:  # lambda = 1: back onto the sphere of the radius before the step
            assert (found - anchor).norm().item() == pytest.approx(radius.item(), rel=1e-5)


def test_spd_step_gives_the_same_bits_under_every_schedule_and_alignment(spd):
    results = set()
    for schedule, shift in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 3)):
        params, anchors, m, v = cuda_cases.spd_tensors([5000, 40], 23)
        if shift:  # a view that starts in the middle of a 16-byte word
            params = [torch.cat([torch.zeros(shift), p])[shift:] for p in params]
        grads = [0.5 * (p - a) for p, a in zip(params, anchors, strict=True)]
        m = [-g for g in grads]
        v = [g * g for g in grads]
        report = spd.spd_step(params, anchors, grads, m, v, 2, *ADAM.values(), 1.0, schedule)
        assert torch.all(report[:, 3] != 1)
        results.add(tuple(torch.cat([*params, *m, *v]).tolist()))
    assert len(results) == 1


def test_spd_step_with_lambda_0_is_adam(spd):
    params, anchors, m, v = cuda_cases.spd_tensors([2500], 24)
    ours = torch.nn.Parameter(params[0].clone())
    adam = torch.optim.Adam([ours], lr=ADAM["lr"], foreach=False)
    generator = torch.Generator().manual_seed(25)
    for step in range(1, 6):
        ours.grad = torch.randn(2500, generator=generator)
        adam.step()
        spd.spd_step(params, anchors, [ours.grad], m, v, step, *ADAM.values(), 0.0)
    assert torch.allclose(params[0], ours, rtol=3e-7, atol=3e-7)


def test_spd_step_takes_a_hundred_tensors_at_once(spd):
    params, anchors, m, v = cuda_cases.spd_tensors([1 + i % 7 for i in range(100)], 26)
    state = cuda_cases.doubles((params, anchors, m, v))
    grads = [p - a for p, a in zip(params, anchors, strict=True)]
    spd.spd_step(params, anchors, grads, m, v, 1, *ADAM.values(), 1.0)
    cuda_cases.spd_reference(state, grads, 1, *ADAM.values(), 1.0)
    for found, wanted in zip(params, state[0], strict=True):
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_spd_step_does_not_project_by_a_gradient_that_is_not_a_number(spd):
    params, anchors, m, v = cuda_cases.spd_tensors([10, 10], 27)
    grads = [params[0] - anchors[0], torch.full((10,), float("nan"))]
    report = spd.spd_step(params, anchors, grads, m, v, 1, *ADAM.values(), 1.0)
    assert report[1, 3] == 1 and params[0].isfinite().all()


def test_spd_step_adds_the_conditions_up(spd):
    params, anchors, m, v = cuda_cases.spd_tensors([5000, 3], 28)
    conditions = torch.tensor([1e6, -1e6], dtype=torch.float64)
    wanted = conditions.clone()
    for step, schedule in enumerate(emulator.SCHEDULES, 1):
        grads = [a - p for p, a in zip(params, anchors, strict=True)]  # outwards
        options = 1e-3, (0.9, 0.999), 1e-8, 1.0
        report = spd.spd_step(
            params, anchors, grads, m, v, step, *options, schedule, conditions=conditions
        )
        wanted -= report[:, 0]
        assert report[0, 3] == 1 and report[1, 3] < 1  # by the sum, not by this step's condition
    assert torch.equal(conditions, wanted)
