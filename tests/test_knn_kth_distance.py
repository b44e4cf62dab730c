"""knn_kth_distance: exact whatever the rounding, row order, threads and instruction set."""

import itertools
import math
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compiled import kernels, under_each_default

from csrc import ops

LEVELS = ["amx", "avx512bf16", "avx512", "avx2"]


@pytest.fixture(params=LEVELS)
def knn(request, monkeypatch):
    """The kernel with one instruction set, where this CPU has it."""
    if request.param not in kernels().levels:
        pytest.skip(f"this CPU does not offer {request.param}")
    monkeypatch.setattr(kernels(), "level", request.param)
    return kernels().knn_kth_distance


@pytest.fixture
def any_knn():
    if not kernels().levels:
        pytest.skip("k-NN on a CPU without AVX2 is left to PyTorch")
    return kernels().knn_kth_distance


def brute(queries, reference):
    """fp64 differences, sorted: the truth for every k.  -> [N, M] fp64"""
    rows = [(reference.double() - q).norm(dim=1).sort().values for q in queries.double()]
    return torch.stack(rows) if rows else torch.empty(0, len(reference), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip_like(rows, width, seed=0):
    """[rows, width], unit length: a common direction and 50 class centres, sorted by class."""
    common_part, centres = normal(width, seed=99), normal(50, width, seed=98)
    label = torch.arange(rows) * 50 // max(rows, 1)
    features = common_part + 0.6 * centres[label] + 0.6 * normal(rows, width, seed=seed)
    return torch.nn.functional.normalize(features, dim=1)


def assert_exact(knn, queries, reference, *ks, tolerance=1e-7):
    truth = brute(queries, reference)
    for k in ks:
        found, wanted = knn(queries, reference, k), truth[:, k - 1]
        assert found.dtype == torch.float32 and found.shape == wanted.shape
        error = (found.double() - wanted).abs()
        assert (error <= tolerance * wanted).all(), (k, error.max())


def test_three_points_by_hand(knn):
    queries = torch.tensor([[0.0, 0.0]])
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]])
    assert [knn(queries, reference, k).item() for k in (1, 2, 3)] == [1, 2, 5]


@pytest.mark.parametrize("width", [1, 3, 512, 1024])
def test_equals_brute_force_on_odd_sizes_and_any_number_of_queries(knn, width):
    for rows in (1, 7, 127, 129, 1025):
        queries, reference = normal(5, width, seed=1), normal(rows, width)
        assert_exact(knn, queries, reference, *sorted({1, (rows + 1) // 2, rows}))
    for count in (0, 1, 31, 33, 70):
        assert_exact(knn, normal(count, width, seed=1), normal(300, width), 3)


def test_near_duplicates_keep_their_digits(knn):
    reference = clip_like(2000, 512)
    step = torch.nn.functional.normalize(normal(20, 512, seed=2), dim=1)
    queries = reference[:20] + 1e-3 * step
    assert_exact(knn, queries, reference, 1)


def test_duplicates_and_ties_are_counted_one_by_one(knn):
    reference = clip_like(40, 64).repeat(10, 1)  # each row ten times
    queries = clip_like(33, 64, seed=3)
    assert_exact(knn, queries, reference, 1, 10, 11, 57, 400)
    assert bool((knn(reference[:40], reference, 10) == 0).all())


def test_rows_that_bf16_rounding_cannot_tell_apart_or_reorders(knn):
    # all rows round to the same bf16 vector up to a pattern that pushes the rounded scores the
    # other way
    queries = torch.ones(3, 256) * torch.tensor([1.0, -1.0, 0.5])[:, None]
    offset = torch.linspace(-0.9, 0.9, 3000)[:, None] * 2**-9
    sign = torch.where(normal(3000, 256) > 0, 1.0, -1.0)
    reference = 1 + offset + 2**-9 * sign
    far = normal(3000, 256, seed=5)  # something to find the mean and the bound with
    reference = torch.cat([reference, far])
    assert_exact(knn, queries, reference, 1, 50, 1500, 3000, 3001, 5999)


def test_order_that_the_querys_rounding_alone_turns_round(knn):
    # rows a s are bf16 numbers with mean zero; x = 1.5 + d s loses d s, and with it s.x: by the
    # rounded scores a = 0 is the nearest, in truth a = d
    sign, d = torch.tensor([1.0, -1.0]).repeat(128), 2**-8 - 2**-16
    queries = torch.stack([1.5 + d * sign, 1.5 - d * sign, 3 + 2 * d * sign])
    reference = torch.arange(-128, 129)[:, None] * 2**-14 * sign
    assert_exact(knn, queries, reference, 1, 2, 5, 100, 257)


def test_order_that_the_references_rounding_alone_makes(knn):
    # all rows round to 1.5 or -1.5 and have one length: only what is lost tells them apart
    sign, d = torch.tensor([1.0, -1.0]).repeat(128), 2**-8 - 2**-16
    agree = torch.arange(0, 257, 4)[:, None] > torch.arange(256)
    rows = 1.5 + d * torch.where(agree, sign, -sign)
    reference, queries = torch.cat([rows, -rows]), torch.stack([sign, 0.25 * sign])
    assert_exact(knn, queries, reference, 1, 2, 30, 65, 66, 130)


def test_rounding_midpoints_on_both_sides(knn):
    # values half-way between two bf16 numbers: every element has the largest possible residual
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(128, 256, (2000, 96), generator=generator).float() / 128
    reference, queries = grid + 2**-8, grid[:40] + 2**-8 + 2**-16
    assert_exact(knn, queries, reference, 1, 7, 200)


def test_zero_vectors(knn):
    reference = torch.cat([torch.zeros(500, 32), normal(500, 32)])
    queries = torch.cat([torch.zeros(2, 32), normal(2, 32, seed=1)])
    assert_exact(knn, queries, reference, 1, 500, 501, 1000)


def test_norms_from_a_thousandth_to_a_thousand(knn):
    scale = 10 ** torch.linspace(-3, 3, 3000)[:, None]
    reference = clip_like(3000, 200) * scale
    queries = clip_like(37, 200, seed=1) * 10 ** torch.linspace(-3, 3, 37)[:, None]
    assert_exact(knn, queries, reference, 1, 30, 2999)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e17])
def test_scales_at_which_products_underflow_or_grow_large(knn, scale):
    queries, reference = scale * clip_like(5, 48, seed=1), scale * clip_like(700, 48)
    assert_exact(knn, queries, reference, 9)


def test_so_many_equal_rows_that_brute_force_takes_over(knn):
    reference = torch.cat([torch.ones(50_000, 2), torch.zeros(1, 2)])
    queries = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]])
    assert_exact(knn, queries, reference, 1, 2, 50_001)


def first_packed(rows, share):
    """Which rows of the reference the kernel packs first: a `share` of them is its first sample."""
    stride = int(rows * 0.6180339887) + 1
    while math.gcd(stride, rows) != 1:
        stride += 1
    return torch.arange(int(rows * share)) * stride % rows


def test_a_bound_guessed_from_a_misleading_sample_is_found_out(knn):
    # the sample that the first guesses are made from holds the near rows, the other rows are far
    reference = 30 * clip_like(8192, 512)
    reference[first_packed(8192, 1 / 8)] /= 30
    queries = clip_like(5, 512, seed=1)
    assert_exact(knn, queries, reference, 100, 500, 1024, 1500)


def test_a_misleading_sample_whose_rows_lie_within_each_others_error(any_knn):
    # as above, but the near rows' scores differ by about their error bounds: enough rows survive a
    # guess that was too high, only not the right ones
    reference = torch.cat([torch.zeros(4096, 1), normal(4096, 511)], 1)
    reference = 30 * torch.nn.functional.normalize(reference, dim=1)
    near = first_packed(4096, 1 / 4)
    reference[near] /= 30
    reference[near, 0] = torch.linspace(-6e-3, 6e-3, 1024)[torch.randperm(1024)]
    queries = torch.zeros(2, 512)
    queries[0, 0], queries[1, 0] = 1, 2
    assert_exact(any_knn, queries, reference, *range(500, 1024, 7))


def test_same_bits_for_any_number_of_threads_and_any_instruction_set(any_knn, monkeypatch):
    queries, reference = clip_like(70, 300, seed=1), clip_like(9000, 300)  # worth 5 threads
    results, threads = [], torch.get_num_threads()
    for level, count in itertools.product(kernels().levels, (1, 2, 5)):
        monkeypatch.setattr(kernels(), "level", level)
        torch.set_num_threads(count)
        results.append(any_knn(queries, reference, 50))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def extension(levels):
    """What ops.Kernels asks of the compiled module."""
    return SimpleNamespace(knn_kth_distance_levels=lambda: levels)


def test_a_cpu_without_avx2_is_left_to_pytorch():
    found = ops.Kernels(extension(levels="")), ops.Kernels(extension(levels=""), cuda=True)
    assert [x.knn_devices for x in found] == [(), ("cuda",)] and found[1].devices[0] == "cpu"
    with pytest.raises(ValueError, match="queries must be on a GPU: no AVX2 here, got .* on cpu"):
        found[0].knn_kth_distance(ONES, ONES, 1)


def test_a_level_that_nobody_has_timed_is_not_taken_by_itself():
    assert ops.Kernels(extension(levels="avx512bf16 avx512 avx2 ")).level == "avx512"


def test_the_order_of_the_reference_does_not_change_a_bit(any_knn):
    queries, reference = clip_like(20, 128, seed=1), clip_like(4000, 128)
    shuffled = reference[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(any_knn(queries, reference, 40), any_knn(queries, shuffled, 40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_strided_inputs_and_any_type_of_integer(any_knn, dtype):
    queries, reference = normal(30, 8, seed=1).T.to(dtype), normal(30, 200).T[::2].to(dtype)
    expected = any_knn(queries.float().contiguous(), reference.float().contiguous(), 5)
    for k in (5, np.int64(5), np.uint8(5)):
        assert torch.equal(any_knn(queries, reference, k), expected)


def test_autograd_says_that_there_is_no_gradient(any_knn):
    queries = normal(3, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        any_knn(queries, normal(20, 8, seed=1), 2).sum().backward()


def test_default_dtype_and_device_do_not_matter(any_knn):
    given = normal(40, 24), normal(300, 24, seed=1), 5
    for found in under_each_default(lambda: any_knn(*given)):
        assert torch.equal(found, any_knn(*given))


def sum_of_distances(results, queries, reference):
    torch.set_num_threads(2)
    results.put(kernels().knn_kth_distance(queries, reference, 5).sum().item())


def test_a_forked_child_may_call_it_after_its_parent(any_knn):
    queries, reference = normal(300, 64), normal(5000, 64, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = any_knn(queries, reference, 5).sum().item()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=sum_of_distances, args=(results, queries, reference))
    child.start()
    assert results.get(timeout=60) == pytest.approx(expected)
    child.join()
    torch.set_num_threads(threads)


def test_pytorch_knows_the_op(any_knn):
    arguments = normal(6, 8), normal(20, 8, seed=1), 3
    torch.library.opcheck(torch.ops.csrc.knn_kth_distance.default, arguments)
    traced = torch.compile(any_knn, backend="eager", fullgraph=True)
    assert torch.equal(traced(*arguments), any_knn(*arguments))


@pytest.mark.parametrize("argument", ["queries", "reference"])
def test_values_that_are_not_finite_or_too_large_are_refused_with_the_row(knn, argument):
    tensors = dict(queries=normal(40, 33, seed=1), reference=normal(3000, 33))
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        tensors[argument][37, 32] = value
        with pytest.raises(ValueError, match=f"knn_kth_distance: {argument} row 37 "):
            knn(**tensors, k=2)


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    "queries, reference, k, words",
    [
        (ONES, ONES, 0, "k must be an integer from 1 to 4, got 0"),
        (ONES, ONES, 5, "k must be an integer from 1 to 4, got 5"),
        (ONES, ONES, 1.0, "k must be an integer"),
        (ONES, ONES[:0], 1, "0 < M < 2^31, D > 0, got torch.float32 (0, 3)"),
        (ONES, ONES[:, :2], 1, "reference must be [M, 3], 0 < M < 2^31, D > 0"),
        (ONES[0], ONES, 1, "queries must be a dense float tensor of two dimensions, got"),
        (ONES.long(), ONES, 1, "of two dimensions, got torch.int64 (4, 3) on cpu"),
        (ONES, ONES.to("meta"), 1, "reference must be on cpu"),
        ([[1.0]], ONES, 1, "of two dimensions, got [[1.0]]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_are_refused_by_name(any_knn, queries, reference, k, words):
    with pytest.raises(ValueError) as problem:
        any_knn(queries, reference, k)
    assert words in str(problem.value) and "knn_kth_distance" in str(problem.value)
