"""What the CUDA kernels have to do, in fp64, and the data that their tests share."""

import torch


def kth_distance(queries, reference, k):
    """Eq. (4) of VRF by brute force in fp64.  [N, D], [M, D] -> [N]"""
    pairs = zip(queries.double().split(1), strict=False)
    rows = [(reference.double() - query).norm(dim=1).kthvalue(k).values for (query,) in pairs]
    return torch.stack(rows) if rows else queries.new_empty(0, dtype=torch.float64)


def features(rows, width, seed, spread=1.0):
    """Rows of length 1 with a common direction and three sorted classes, as CLIP's are."""
    generator = torch.Generator().manual_seed(seed)
    common, centres = (
        torch.randn(width, generator=generator),
        torch.randn(3, width, generator=generator),
    )
    classes = torch.arange(rows) * 3 // max(rows, 1)
    noise = torch.randn(rows, width, generator=generator)
    return torch.nn.functional.normalize(common + 0.5 * centres[classes] + spread * noise, dim=1)


def indistinct(queries, rows, seed):
    """Rows around the queries, all nearer to each other than the rounding to fp16 can show."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, queries.shape[1], generator=generator)
    return queries[torch.arange(rows) % len(queries)] + 2e-5 * noise


def spd_reference(state, grads, step, lr, betas, eps, spd_lambda, conditions=None):
    """The step of SPD (Eqs. 3, 4, 9) in fp64, in place on state = (params, anchors or None, m, v).

    conditions [tensors]: c after this step; None: -S1. Returns the report [tensors, 4]: S1, S2, S3
    and f, which is 1 where nothing is projected.
    """
    params, anchors, exp_avgs, exp_avg_sqs = state
    report = []
    anchors = anchors if anchors is not None else [torch.zeros_like(p) for p in params]
    lists = zip(params, anchors, grads, exp_avgs, exp_avg_sqs, strict=True)
    for i, (w, w0, g, m, v) in enumerate(lists):
        g = g.double()
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
        new = w - lr / (1 - betas[0] ** step) * m / denominator
        s1, before, after = (g * (w - w0)).sum(), (w - w0).norm(), (new - w0).norm()
        c = -s1 if conditions is None else conditions[i]
        f = torch.tensor(1.0)
        if c < 0 and after > before:
            f = 1 - spd_lambda * (after - before) / after
        report.append([s1, before**2, after**2 - before**2, f])
        w.copy_(w0 + f * (new - w0) if f != 1 else new)
    return torch.tensor(report, dtype=torch.float64)


def spd_tensors(sizes, seed, deviation=0.1):
    """params, anchors, exp_avgs, exp_avg_sqs in fp32, as lists."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(size, generator=generator) for size in sizes]
    anchors = [p + deviation * torch.randn(p.shape, generator=generator) for p in params]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return params, anchors, *zeros


def doubles(lists):
    return tuple(None if each is None else [t.double() for t in each] for each in lists)


# Golden trace of one 2-vector that starts at its anchor; lr 0.1, defaults of Adam.
GOLDEN_ANCHOR = (0.5, -0.25)
GOLDEN_GRADIENTS = [(-1.0, 2.0)] * 4 + [(1.0, -0.5)] * 4
GOLDEN = {  # lambda: theta_5, theta_6, theta_8
    0.0: ((0.95116114, -0.72709419), (0.97006143, -0.7865946), (0.94540527, -0.86563869)),
    0.5: ((0.91991726, -0.69405439), (0.92016916, -0.73215528), (0.88126502, -0.79249043)),
    1.0: ((0.88867338, -0.6610146), (0.87037774, -0.67757493), (0.81727236, -0.71833561)),
    2.0: ((0.82618562, -0.594935), (0.77120531, -0.56784847), (0.69020431, -0.56524423)),
}
# Zero anchor, same start, lambda 1, gradient (-1, 2) twice, then (1, -0.5) twice.
GOLDEN_ZERO_GRADIENTS = [(-1.0, 2.0)] * 2 + [(1.0, -0.5)] * 2
GOLDEN_ZERO = {3: (0.6788036, -0.48137892), 4: (0.65494286, -0.51337107)}
