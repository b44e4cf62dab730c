"""spd_step, the kernel: equal to spd.spd_step on ragged tensors, same bits for any threads."""

import ctypes
import subprocess

import pytest
import torch
from compiled import kernels, under_each_default

import spd
from csrc import build, ops

RAGGED = [1, 3, 511, 65_535, 65_537, (), 0, (7, 11), (4, 3, 2, 5)] + [5] * 11
NAMES = ("params", "anchors", "grads", "exp_avgs", "exp_avg_sqs")


def tensors_of(shapes, shift=0, anchored=True):
    """params, anchors, grads and zero moments; with shift, views that begin `shift` elements into
    their storage (no alignment).
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape, scale=1.0):
        size = torch.Size([shape] if isinstance(shape, int) else shape)
        return scale * torch.randn(size.numel() + shift, generator=generator)[shift:].view(size)

    params = [draw(shape) for shape in shapes]
    anchors = [p + draw(p.shape, 0.1) for p in params] if anchored else [None] * len(params)
    moments = [[draw(p.shape, 0.0) for p in params] for _ in range(2)]
    return [params, anchors, [draw(p.shape) for p in params], *moments]


def step_options(step, lr=1e-2, eps=1e-8, spd_lambda=1.0):
    return dict(step=step, lr=lr, betas=(0.9, 0.999), eps=eps, spd_lambda=spd_lambda)


def clones(lists):
    return [[None if t is None else t.clone() for t in column] for column in lists]


def assert_equals_the_reference(
    lists, steps=10, signs="++-", accumulated=False, kernel=None, **options
):
    """The kernel and spd.spd_step on the same gradients.  -> what was projected [steps, T]"""
    kernel, reference, count = kernel or kernels(), clones(lists), len(lists[0])
    c = torch.zeros(2, count, dtype=torch.float64) if accumulated else (None, None)
    sums, projected = torch.full((2, count, 3), 7.0, dtype=torch.float64), []
    for step in range(1, steps + 1):
        sign = int(signs[step % len(signs)] + "1")
        for mine, theirs in zip(lists[2], reference[2], strict=True):
            theirs.copy_(mine.mul_(sign).mul_(1 + 0.1 * step))
        kernel.spd_step(*lists, **step_options(step, **options), conditions=c[0], sums=sums[0])
        spd.spd_step(*reference, **step_options(step, **options), conditions=c[1], sums=sums[1])
        assert torch.allclose(*sums, rtol=1e-4, atol=1e-4)
        condition = c[0].clone() if accumulated else -sums[0, :, 0]
        projected.append((condition < 0) & (sums[0, :, 2] > 0))
    if accumulated:
        assert torch.allclose(*c, rtol=1e-4, atol=1e-4)
    for i, (found, wanted) in enumerate(zip(lists, reference, strict=True)):
        for a, b in zip(found, wanted, strict=True):
            assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6 if i == 0 else 1e-7)
    return torch.stack(projected)


@pytest.mark.parametrize("accumulated", [False, True], ids=["this step's c", "accumulated c"])
@pytest.mark.parametrize(
    "given, options",
    [
        (dict(), dict(signs="+++-")),
        (dict(), dict(signs="+-", spd_lambda=2.0)),
        (dict(), dict(signs="+-", spd_lambda=0.0)),  # Adam: spd.spd_step is torch's bit for bit
        (dict(anchored=False), dict(signs="+-")),
        (dict(shift=3, anchored=False), dict()),
        (dict(), dict(eps=0.0)),  # 0 / 0 in what fills a tail up would stop the projection
    ],
    ids=str,
)
def test_ten_steps_equal_the_reference_on_ragged_tensors(given, options, accumulated):
    lists = tensors_of(RAGGED, **given)
    projected = assert_equals_the_reference(lists, accumulated=accumulated, **options)
    full = torch.tensor([p.numel() > 0 for p in lists[0]])
    assert not projected[:, ~full].any() and projected.any() and not projected[:, full].all()


def test_a_tensor_of_many_chunks_is_projected_whole():
    lists = tensors_of([1_600_003])
    lists[2] = [lists[1][0] - lists[0][0]]  # two steps outwards, then one back
    projected = assert_equals_the_reference(lists, steps=3, signs="+++-", lr=1e-3)
    assert projected.flatten().tolist() == [False, False, True]


def test_the_three_sums_are_those_of_fp64_up_to_the_rounding_of_their_terms():
    lists = tensors_of([100_003])
    before, sums = lists[0][0].clone(), torch.zeros(1, 3, dtype=torch.float64)
    kernels().spd_step(*lists, **step_options(1, lr=1e-4, spd_lambda=0.0), sums=sums)
    new, w0, g, w = (x.double() for x in (*(column[0] for column in lists[:3]), before))
    terms = torch.stack([g * (w - w0), (w - w0) ** 2, (new - w) * (2 * (w - w0) + new - w)])
    error = (sums[0] - terms.sum(1)).abs() / terms.abs().sum(1)
    assert (error <= 2**-20).all() and (terms.sum(1) != 0).all()


def bits(lists):
    return torch.cat([t.view(torch.int32).flatten() for column in lists for t in column])


def plain_steps(tmp_path, lists, steps):
    """As `kernels().spd_step`, by the source compiled for the lowest instruction set alone."""
    library = tmp_path / "plain.so"
    command = ["c++", *build.CPU_FLAGS, "-DCLONES=", "-fPIC", "-shared", "-o", library]
    subprocess.run([*command, build.CSRC / "spd_step.cpp"], check=True)
    table = torch.tensor(ops.table_of(lists))
    number, size = ctypes.c_double, ctypes.c_int64
    for step in range(1, steps + 1):
        scalars = [number(x) for x in (1e-2, 0.9, 0.999, 1e-8, 1.0)]
        head = ctypes.c_void_p(table.data_ptr()), size(len(table)), size(step)
        ctypes.CDLL(library).spd_step_cpu(*head, *scalars, 1, None, None)


def test_same_bits_for_any_number_of_threads_and_any_instruction_set(tmp_path):
    results, threads = [], torch.get_num_threads()
    for count in (1, 3, 0):
        lists = tensors_of(RAGGED + [300_000])
        if count:
            torch.set_num_threads(count)
            for step in range(1, 4):
                kernels().spd_step(*lists, **step_options(step))
        else:
            plain_steps(tmp_path, lists, 3)
        results.append(bits(lists))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_default_dtype_and_device_do_not_matter():
    lists = tensors_of(RAGGED)

    def stepped():
        copies = clones(lists)
        kernels().spd_step(*copies, **step_options(1))
        return copies

    expected = bits(stepped())
    assert all(torch.equal(bits(found), expected) for found in under_each_default(stepped))


def test_a_lazily_negated_gradient_is_stepped_as_it_is_meant():
    plain = tensors_of([(4, 3, 2, 5)])
    lazy = clones(plain)
    lazy[2] = [torch._neg_view(-lazy[2][0])]
    for lists in (plain, lazy):
        kernels().spd_step(*lists, **step_options(1))
    assert torch.equal(plain[0][0], lazy[0][0])


def test_strides_of_dimensions_of_size_one_say_nothing():
    lists = tensors_of([(1, 1, 4)])
    before = lists[0][0].clone()
    lists[2] = [torch.ones(3, 5, 4)[:1, :1]]  # as of a class token: strides (20, 4, 1)
    kernels().spd_step(*lists, **step_options(1))
    assert not torch.equal(lists[0][0], before)


def test_pytorch_knows_the_op():
    c, sums = (torch.zeros(shape, dtype=torch.float64) for shape in ((2,), (2, 3)))
    arguments = *tensors_of([5, 7]), 1, 0.1, 0.9, 0.999, 1e-8, 1.0, c, sums
    kernels()
    torch.library.opcheck(torch.ops.csrc.spd_step.default, arguments)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(params=[torch.ones(3, 4).T]), "params[0] must be a contiguous tensor"),
        (dict(grads=[torch.ones(4, 2)]), "grads[0] must be"),
        (dict(grads=[None]), "(4, 3) on cpu, got None"),
        (dict(exp_avgs=[torch.ones(4, 3).double()]), "exp_avgs[0] must be"),
        (dict(anchors=[]), "anchors must be 1 tensors, got 0"),
        (dict(grads=[torch.ones(4, 3, device="meta")]), "on meta"),
        (dict(params=[torch.ones(4, 3).half()]), "float32 (4, 3) on cpu, got torch.float16 (4, 3)"),
        (dict(step=0), "step must be 1 or more, got 0"),
        (dict(sums=torch.zeros(1, 3)), "sums must be a contiguous tensor, torch.float64 (1, 3) on"),
        (dict(conditions=torch.zeros(2).double()), "tensor, torch.float64 (1,)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_are_refused_by_name(change, words):
    tensors = {name: [torch.ones(4, 3)] for name in NAMES}
    with pytest.raises(ValueError) as problem:
        kernels().spd_step(**{**tensors, **step_options(1), **change})
    assert words in str(problem.value) and "spd_step" in str(problem.value)
