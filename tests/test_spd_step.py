"""spd_step and AdamSPD: golden traces, kernel = reference, edge cases."""

import functools
import itertools

import pytest
import torch
from compiled import kernels

import common
import spd
from spd import AdamSPD

ISAS = ["avx512", "avx2", "portable"]
START, PULL, PUSH = (0.5, -0.25), (-1.0, 2.0), (1.0, -0.5)
# spd.md section 3: theta after steps 5, 6 and 8, made with the authors' code in fp64
GOLDEN = {
    0.0: [(0.95116114, -0.72709419), (0.97006143, -0.7865946), (0.94540527, -0.86563869)],
    0.5: [(0.91991726, -0.69405439), (0.92016916, -0.73215528), (0.88126502, -0.79249043)],
    1.0: [(0.88867338, -0.6610146), (0.87037774, -0.67757493), (0.81727236, -0.71833561)],
    2.0: [(0.82618562, -0.594935), (0.77120531, -0.56784847), (0.69020431, -0.56524423)],
}


LOOP, LISTS, KERNEL = (
    {"fused": f, "foreach": e} for f, e in ((False, False), (False, True), (True, False))
)


@pytest.fixture(params=[*ISAS, "loop", "foreach"])
def path(request, monkeypatch):
    """AdamSPD's options for each way of computing, with the kernel's instruction set forced."""
    if request.param in ISAS:
        monkeypatch.setattr(kernels(request.param), "isa", request.param)
    return {"loop": LOOP, "foreach": LISTS}.get(request.param, KERNEL)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors and a busy machine: waiting for a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trace(gradients, dtype=torch.float64, **options):
    """theta after each of the given gradients."""
    param = torch.nn.Parameter(torch.tensor(START, dtype=dtype))
    optimizer = AdamSPD([param], lr=0.1, **options)
    seen = []
    for gradient in gradients:
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        seen.append(param.detach().clone())
    return seen


def close(actual, expected, tolerance=1e-8):
    return bool(((actual - torch.tensor(expected, dtype=actual.dtype)).abs() <= tolerance).all())


@pytest.mark.parametrize("spd_lambda", GOLDEN)
def test_golden_trace_of_the_authors_code_is_met_to_1e_8(path, spd_lambda):
    seen = trace([PULL] * 4 + [PUSH] * 4, spd_lambda=spd_lambda, **path)
    for step, expected in zip((5, 6, 8), GOLDEN[spd_lambda], strict=True):
        assert close(seen[step - 1], expected)
    for step, expected in enumerate([(0.6, -0.35), (0.7, -0.45), (0.8, -0.55), (0.9, -0.65)]):
        assert close(seen[step], expected, 2e-8)


def test_golden_trace_of_the_zero_anchor(path):
    seen = trace([PULL, PULL, PUSH, PUSH], spd_lambda=1.0, anchor="zero", **path)
    assert close(seen[2], (0.6788036, -0.48137892))
    assert close(seen[3], (0.65494286, -0.51337107))


def test_condition_by_hand():
    grad, before, anchor = (
        torch.tensor([1.0, -2.0]),
        torch.tensor([3.0, 1.0]),
        torch.tensor([1.0, 0.0]),
    )
    assert spd.condition(grad, before, anchor) == 0  # -(1*2 - 2*1)


def test_deviation_ratio_by_hand():
    zero = torch.zeros(2)
    assert (
        spd.deviation_ratio(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]), zero) == 0.4
    )  # (5 - 3) / 5
    assert spd.deviation_ratio(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]), zero) == 0


def test_c_and_r_of_the_golden_trace(path):
    param = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = AdamSPD([param], lr=0.1, stats=True, **path)
    for gradient, expected in zip([PULL] * 4 + [PUSH], (0, 0.3, 0.6, 0.9, -0.6), strict=True):
        param.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert abs(optimizer.state[param]["spd"][0].item() - expected) < 1e-6


def test_strength_one_keeps_the_previous_radius(path):
    seen = trace([PULL] * 4 + [PUSH], spd_lambda=1.0, **path)
    anchor = torch.tensor(START, dtype=torch.float64)
    assert abs((seen[4] - anchor).norm() / (seen[3] - anchor).norm() - 1) < 1e-12


def test_step_one_never_projects_towards_pretrained_weights(path):
    one = trace([PUSH], spd_lambda=5.0, **path)[0]
    assert torch.equal(one, trace([PUSH], spd_lambda=0.0, **path)[0])


RAGGED = [(1,), (3,), (511,), (65_535,), (65_537,), (), (0,), (7, 11), (4, 3, 2, 5)] + [(5,)] * 11


def ragged(dtype=torch.float32, shift=0, more=0):
    """20 + more tensors; with shift, views that start `shift` elements into their storage (no
    alignment).
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in RAGGED + [(5,)] * more:
        size = torch.Size(shape).numel()
        flat = torch.randn(size + shift, generator=generator, dtype=torch.float64).to(dtype)
        made.append(flat[shift:].view(shape))
    return made


@functools.cache
def by_the_loop(**options):
    return run(LOOP, **options)


def run(path, steps=10, dtype=torch.float32, shift=0, more=0, make=AdamSPD, signs="+", **options):
    params = [p.requires_grad_() for p in ragged(dtype, shift, more)]
    optimizer = make(params, lr=1e-2, **options, **path)
    generator = torch.Generator().manual_seed(1)
    base = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in params
    ]
    for step in range(steps):
        for p, g in zip(params, base, strict=True):
            sign = int(signs[step % len(signs)] + "1")
            p.grad = sign * (1 + 0.1 * step) * g
        optimizer.step()
    return [p.detach() for p in params], optimizer


@pytest.mark.parametrize("path", [*ISAS, "foreach"], indirect=True)  # not the reference itself
@pytest.mark.parametrize(
    "options",
    [
        dict(signs="+++-"),
        dict(signs="+-", spd_lambda=2.0),
        dict(signs="+", spd_lambda=1.0),
        dict(anchor="zero", signs="+-"),
        dict(anchor="none"),
        dict(shift=1, signs="++-"),
        dict(shift=3, anchor="zero"),
        dict(eps=0.0, signs="++-"),  # 0 / 0 in what fills a tail up would stop the projection
        dict(dtype=torch.float64, signs="++-"),
    ],
    ids=str,
)
def test_ten_steps_equal_the_reference_on_ragged_tensors(path, options):
    assert_equals_the_loop(path, **options)


def test_three_hundred_tensors_at_once():
    kernels()
    assert_equals_the_loop(KERNEL, signs="+-", steps=3, more=280)


def assert_equals_the_loop(path, **options):
    ours, fast = run(path, **options)
    reference, loop = by_the_loop(**options)
    double = options.get("dtype") == torch.float64
    for a, b in zip(ours, reference, strict=True):
        assert torch.allclose(a, b, rtol=1e-12 if double else 1e-5, atol=1e-13 if double else 1e-6)
    for a, b in zip(fast.state.values(), loop.state.values(), strict=True):
        assert torch.allclose(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-7)
        assert torch.allclose(a["exp_avg_sq"], b["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_the_ragged_runs_project_when_the_gradient_turns_and_not_before(path):
    shares = []
    for steps in (3, 4, 6):
        _, optimizer = run(path, steps=steps, signs="+++-++", stats=True)
        fired = [bool(s["spd"][0] < 0 and s["spd"][1] > 0) for s in optimizer.state.values()]
        shares.append(sum(fired) / len(fired))
    assert shares[0] == 0 and shares[1] == 1 and len(fired) == len(RAGGED) - 1  # all but the empty


def test_lambda_zero_is_torch_adam(path):
    ours, _ = run(path, steps=25, spd_lambda=0.0)
    theirs, _ = run({}, steps=25, make=torch.optim.Adam, foreach=False)
    for a, b in zip(ours, theirs, strict=True):
        # 2 ulp of the size the values pass through; the step itself is what is compared
        assert torch.allclose(a, b, rtol=4e-7, atol=4e-7)


def test_a_gradient_across_the_way_travelled_projects_nothing(path):
    along, across = (1.0, 0.0), (0.0, 1.0)  # c_2 = 0, and the strict < of Eq. (3) is not met
    seen = trace([along, across], spd_lambda=5.0, **path)
    free = trace([along, across], spd_lambda=0.0, **path)
    assert torch.equal(seen[1], free[1])
    start = torch.tensor(START, dtype=torch.float64)
    assert (free[1] - start).norm() > (free[0] - start).norm()  # though it went further out


def test_without_strength_the_loop_is_torch_adam_bit_for_bit():
    ours, _ = run(LOOP, steps=100, spd_lambda=0.0, signs="++-")
    theirs, _ = run({}, steps=100, make=torch.optim.Adam, signs="++-", foreach=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_strength_one_keeps_the_radius_in_fp32_to_one_in_a_million(path):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(10_000, generator=generator))
    anchor, grad = param.detach().clone(), torch.randn(10_000, generator=generator)
    optimizer, radii = AdamSPD([param], lr=1e-2, spd_lambda=1.0, stats=True, **path), []
    for sign in (1, 1, 1, -1):
        param.grad = sign * grad
        optimizer.step()
        radii.append((param.detach().double() - anchor.double()).norm().item())
    c, r, _ = optimizer.state[param]["spd"]
    assert c < 0 < r and radii[3] == pytest.approx(radii[2], rel=1e-6)


def test_kernel_and_loop_fire_for_the_same_tensors_and_keep_statistics_on_demand(path):
    signs, stats = "+++-", []
    for way in (path, LOOP):
        _, optimizer = run(way, steps=4, signs=signs, stats=True)
        stats.append(torch.stack([s["spd"] for s in optimizer.state.values()]))
    assert torch.allclose(*stats, rtol=1e-4, atol=1e-6)
    a, b = ((s[:, 0] < 0) & (s[:, 1] > 0) for s in stats)
    assert torch.equal(a, b)
    _, optimizer = run(path, steps=1)
    assert not any("spd" in s for s in optimizer.state.values())


def bits(tensors):
    return [t.detach().view(-1).view(torch.int32).tolist() for t in tensors]


def test_same_bits_for_any_number_of_threads_and_any_instruction_set(monkeypatch):
    results = []
    for isa, count in itertools.product(ISAS, (1, 3)):
        if kernels().module.has_instruction_set(isa):
            monkeypatch.setattr(kernels(), "isa", isa)
            torch.set_num_threads(count)
            results.append(bits(run(KERNEL, steps=3, signs="++-")[0]))
    assert all(result == results[0] for result in results)


def test_the_three_sums_are_those_of_fp64_up_to_the_rounding_of_their_terms():
    generator = torch.Generator().manual_seed(0)
    anchor, grad = torch.randn(2, 100_003, generator=generator) * 0.02
    before = anchor + 1e-3 * torch.randn(100_003, generator=generator)
    after, zeros = before.clone(), torch.zeros(2, 100_003)
    sums = torch.zeros(1, 3, dtype=torch.float64)
    options = dict(step=1, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, spd_lambda=0.0, sums=sums)
    kernels().spd_step([after], [anchor], [grad], [zeros[0]], [zeros[1]], **options)
    w, w0, new, g = (x.double() for x in (before, anchor, after, grad))
    terms = torch.stack([g * (w - w0), (w - w0) ** 2, (new - w) * (2 * (w - w0) + new - w)])
    error = (sums[0] - terms.sum(1)).abs() / terms.abs().sum(1)
    assert (error <= 2**-20).all() and (terms.sum(1) != 0).all()


def test_a_tensor_larger_than_the_cache_group_is_projected_whole():
    kernels()
    size, params = 1_600_003, []
    for fused in (True, False):
        param = torch.nn.Parameter(torch.linspace(-1, 1, size))
        optimizer = AdamSPD([param], lr=1e-2, fused=fused)
        for sign in (1, 1, -1):
            param.grad = sign * torch.linspace(1, 2, size)
            optimizer.step()
        params.append(param.detach())
    assert torch.allclose(params[0], params[1], rtol=1e-5, atol=1e-7)


def test_a_nan_gradient_projects_nothing_and_spreads_no_further(path):
    first, second = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    optimizer = AdamSPD([first, second], **path)
    for value in (1.0, float("nan")):
        first.grad, second.grad = torch.full((9,), value), torch.ones(9)
        optimizer.step()
    assert first.isnan().all() and second.isfinite().all()


def test_a_step_asks_no_other_process_for_the_kernels(monkeypatch):
    native = kernels()
    monkeypatch.setattr(common, "everywhere", lambda flag: 1 / 0)
    assert spd.compiled() is native
    with pytest.raises(ZeroDivisionError):
        common.kernels()


def test_a_lazily_negated_gradient_is_the_negated_one(path):
    ends = []
    for lazy in (True, False):
        param = torch.nn.Parameter(torch.zeros(4))
        grad = torch.ones(4)
        param.grad = torch._neg_view(grad) if lazy else -grad
        AdamSPD([param], lr=0.1, **path).step()
        ends.append(param.detach())
    assert torch.equal(*ends) and (ends[0] > 0).all()


def test_a_model_of_another_memory_format_takes_its_old_state():
    kernels()
    conv = torch.nn.Conv2d(64, 2048, 3).to(memory_format=torch.channels_last)
    optimizer = AdamSPD(conv.parameters(), lr=1e-2)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        conv.to(memory_format=memory_format)
        for p in conv.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(p.isfinite().all() for p in conv.parameters())


def test_a_parameter_without_gradient_stays_and_counts_no_step(path):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamSPD([first, second], **path)
    first.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(second, torch.ones(3)) and "step" not in optimizer.state.get(second, {})


def test_state_dict_round_trip_continues_bit_for_bit_and_keeps_the_anchor(path):
    def grads(param, step):
        param.grad = torch.linspace(-1, 1, 33) * (-1) ** step

    whole = torch.nn.Parameter(torch.ones(33))
    straight = AdamSPD([whole], lr=0.1, **path)
    for step in range(6):
        grads(whole, step)
        straight.step()
    param = torch.nn.Parameter(torch.ones(33))
    first = AdamSPD([param], lr=0.1, **path)
    for step in range(3):
        grads(param, step)
        first.step()
    second = AdamSPD([param], lr=0.1, **path)  # would anchor at the tuned weights ...
    second.load_state_dict(first.state_dict())  # ... but takes the checkpoint's anchor
    for step in range(3, 6):
        grads(param, step)
        second.step()
    assert torch.equal(param, whole)


def test_bf16_parameters_take_the_pytorch_path():
    param = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = AdamSPD([param], lr=0.1)
    param.grad = torch.ones(5, dtype=torch.bfloat16)
    optimizer.step()
    assert param.dtype == torch.bfloat16 and (param < 1).all()


def call(native, **change):
    tensors = {
        name: [torch.ones(4, 3)]
        for name in ("params", "anchors", "grads", "exp_avgs", "exp_avg_sqs")
    }
    tensors.update(change)
    native.spd_step(**tensors, step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(params=[torch.ones(3, 4).T]), "params[0] must be contiguous"),
        (dict(grads=[torch.ones(3, 4).T]), "grads[0] must be"),
        (dict(grads=[torch.ones(4, 2)]), "grads[0] must be"),
        (dict(exp_avgs=[torch.ones(4, 3).double()]), "exp_avgs[0] must be"),
        (dict(anchors=[]), "anchors must be 1 tensors, got 0"),
        (dict(grads=[torch.ones(4, 3, device="meta")]), "on meta"),
        (
            dict(params=[torch.ones(4, 3).half()]),
            "params must be torch.float32 or torch.float64, got torch.float16",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments_are_refused_by_name(change, words):
    with pytest.raises(common.InputError) as problem:
        call(kernels(), **change)
    assert words in str(problem.value) and "spd_step" in str(problem.value)


def test_strides_of_dimensions_of_size_one_say_nothing():
    grads = [torch.ones(3, 5, 4)[:1, :1]]  # as of a class token: strides (20, 4, 1)
    names = ("params", "anchors", "exp_avgs", "exp_avg_sqs")
    rest = {name: [torch.ones(1, 1, 4)] for name in names}
    call(kernels(), grads=grads, **rest)
    assert not torch.equal(rest["params"][0], torch.ones(1, 1, 4))


def test_autograd_refuses_a_graph_whose_weights_were_stepped_since(path):
    param = torch.nn.Parameter(torch.ones(9))
    optimizer, loss = AdamSPD([param], **path), (param * param).sum()
    param.grad = torch.ones(9)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tensors_is_legal():
    call(kernels(), params=[], anchors=[], grads=[], exp_avgs=[], exp_avg_sqs=[])


def test_channels_last_weights_are_stepped_where_they_lie():
    native = kernels()

    def make():
        return torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)

    param = make()
    native.spd_step([param], [None], [make()], [make()], [make()], 1, 0.1, (0.9, 0.999), 1e-8, 0.0)
    plain = [torch.arange(24.0).view(1, 2, 3, 4) for _ in range(4)]
    native.spd_step(
        plain[:1], [None], plain[1:2], plain[2:3], plain[3:], 1, 0.1, (0.9, 0.999), 1e-8, 0.0
    )
    assert torch.equal(param, plain[0])


def test_an_unknown_anchor_is_refused():
    with pytest.raises(ValueError, match="anchor must be"):
        AdamSPD([torch.nn.Parameter(torch.ones(2))], anchor="origin")
