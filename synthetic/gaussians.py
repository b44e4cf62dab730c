"""The world of error_bound.py: Gaussians in 1000 dimensions, their shift, and small networks with
the two constraints of CaRot, trained G at a time (Oh et al., NeurIPS 2024, Sec. 5.1).

    Fig. A    the data and the shift         draw, posterior, shift_size, figure_a
    Eq. (4)   orthogonality constraint       orthogonality
    Eq. (5)   self-distillation              distillation

Three layers, and a teacher that is trained before its student, are the paper's.
The shift moves a mean of the inputs and P(y|x) with it. The theorem's assumptions, equal marginals
and a shift of the inputs only, do not hold here; nor do they in the paper's description.
"""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import common

GROUPS = (400, 400, 200)  # two that follow the label, noise; Sec. 5.1


# --- method: the data, Fig. A -------------------------------------------------------------------


def draw(rng, n, signal1, signal2, shift=0.0, scale=1.0, scaled="signal"):
    """Sec. 5.1: s = +-1; x1 ~ N(signal1 s + shift, 1), x2 ~ N(signal2 s, 1) with its mean or all of
    it times `scale`, x3 ~ N(0, 1); y = (s + 1) / 2.  -> float32 [n, 1000], int64 [n]
    """
    y = rng.integers(0, 2, n)
    s, x = (2 * y - 1)[:, None], rng.standard_normal((n, sum(GROUPS)), dtype=np.float32)
    one, two = slice(0, GROUPS[0]), slice(GROUPS[0], GROUPS[0] + GROUPS[1])
    x[:, one] += signal1 * s + shift
    x[:, two] += signal2 * s * (scale if scaled == "signal" else 1)
    x[:, two] *= scale if scaled == "whole" else 1
    return x, y


def second_group(signal2, scale, scaled):
    """Mean (for s = 1) and variance of a dimension of x2."""
    return scale * signal2, scale**2 if scaled == "whole" else 1.0


def group_sums(x):
    """Sums of x1 and of x2, all that x tells of y.  [n, 1000] -> [n], [n]"""
    return tuple(group.sum(1) for group in x.split(GROUPS, 1)[:2])


def posterior(x, signal1, signal2, shift=0.0, scale=1.0, scaled="signal"):
    """P(y = 1 | x) of `draw`, sigmoid(2 sum_i mean_i x_i / var_i).  [n, 1000] -> [n]"""
    mean, variance = second_group(signal2, scale, scaled)
    one, two = group_sums(x.double())
    return torch.sigmoid(2 * (signal1 * (one - GROUPS[0] * shift) + mean / variance * two))


def shift_size(signal1, signal2, shift, scale, scaled="signal"):
    """Largest possible accuracy on ID and on OOD, Phi(|mean / sd|), and KL(OOD || ID) of a class in
    nats: sum over dimensions of (var + (mean - mean_ID)^2 - 1 - ln var) / 2.
    """
    mean, variance = second_group(signal2, scale, scaled)
    two = (variance + (mean - signal2) ** 2 - 1 - math.log(variance)) / 2
    norms = [GROUPS[0] * signal1**2 + GROUPS[1] * m for m in (signal2**2, mean**2 / variance)]
    best = [(1 + math.erf(math.sqrt(norm / 2))) / 2 for norm in norms]
    return *best, GROUPS[0] * shift**2 / 2 + GROUPS[1] * two


# --- method: the network and its two constraints; G models at once ------------------------------


def forward(parameters, x):
    """Three layers: x [G, B, 1000] -> hidden [G, B, H] after ReLU, projection [G, B, D] before it,
    logits [G, B, 2]. The models do not see each other.
    """
    w1, b1, w2, b2, w3, b3 = parameters
    hidden = torch.baddbmm(b1, x, w1).relu()
    projection = torch.baddbmm(b2, hidden, w2)
    return hidden, projection, torch.baddbmm(b3, projection.relu(), w3)


def orthogonality(w, form="paper"):
    """Eq. (4): L_OC = |W^T W - I|_F^2, zero for orthonormal columns; code: no square.
    [G, in, out] -> [G]
    """
    excess = w.mT @ w - torch.eye(w.shape[2], dtype=w.dtype, device=w.device)
    return excess.square().sum((1, 2)) if form == "paper" else torch.linalg.norm(excess, dim=(1, 2))


def distillation(teacher, logits):
    """Eq. (5) for two classes: L_SD = mean_B KL(teacher || student).  [G, B, 2] twice -> [G]"""
    student = logits.log_softmax(2)
    return F.kl_div(student, teacher.softmax(2), reduction="none").sum(2).mean(1)


# --- train ----------------------------------------------------------------------------------------
# config: that of error_bound.py


def world(config, split):
    """The distribution of "ID" or "OOD": the arguments of `draw` and `posterior`."""
    signals = config.signal1, config.signal2
    return signals if split == "ID" else (*signals, config.shift, config.scale, config.scaled)


def generator(config, use, number=0):
    uses = ("ID", "OOD", "train", "start", "order", "student's start", "student's order")
    return np.random.default_rng([config.seed, uses.index(use), number])


def test_sets(config):
    """{"ID", "OOD": (x [N, 1000], y [N])}, the same for every model."""
    sets = {k: draw(generator(config, k), config.test, *world(config, k)) for k in ("ID", "OOD")}
    return {k: tuple(map(torch.from_numpy, pair)) for k, pair in sets.items()}


def training_sets(config, numbers):
    """x [G, N, 1000], y [G, N] of the models with these numbers."""
    numbers = numbers if config.vary == "all" else [0] * len(numbers)
    draws = (generator(config, "train", g) for g in numbers)
    sets = [draw(rng, config.train, *world(config, "ID")) for rng in draws]
    device = common.pick_device(config.device)
    return tuple(torch.from_numpy(np.stack(v)).to(device) for v in zip(*sets, strict=True))


def start(config, rng):
    """Weights [in, out] and biases [1, out] of one model: nn.Linear's uniform, or He's normal."""
    parameters = []
    for inputs, outputs in pairwise((sum(GROUPS), config.hidden, config.projection, 2)):
        if config.start == "he":
            weight = rng.normal(0, math.sqrt(2 / inputs), (inputs, outputs))
            parameters += [weight, np.zeros((1, outputs))]
        else:
            bound = 1 / math.sqrt(inputs)
            parameters += [rng.uniform(-bound, bound, (n, outputs)) for n in (inputs, 1)]
    return parameters


def fit(config, layer, x, y, numbers, teacher=None):
    """Parameters of G models after Adam on cross-entropy + lambda_OC Eq. (4) + lambda_SD Eq. (5).

    One backward pass of the sum of G losses; Adam is elementwise, so each model trains as alone.
    """
    who = "" if teacher is None else "student's "
    starts = [start(config, generator(config, who + "start", g)) for g in numbers]
    p = [
        torch.tensor(np.stack(v), dtype=x.dtype, device=x.device, requires_grad=True)
        for v in zip(*starts, strict=True)
    ]
    optimiser = torch.optim.Adam(p, lr=config.lr, fused=True)
    orders = [generator(config, who + "order", g) for g in numbers]
    rows = torch.arange(len(numbers), device=x.device)[:, None]
    constrained = {"": None, "projection": p[2], "head": p[4]}[layer]
    for _ in range(config.epochs):
        order = torch.tensor(np.stack([rng.permutation(x.shape[1]) for rng in orders])).to(x.device)
        for index in order.split(config.batch, 1):
            logits = forward(p, x[rows, index])[2]
            loss = F.cross_entropy(logits.mT, y[rows, index], reduction="none").mean(1)
            if constrained is not None:
                loss = loss + config.lambda_oc * orthogonality(constrained, config.oc)
            if teacher is not None:
                loss = loss + config.lambda_sd * distillation(teacher[rows, index], logits)
            loss.sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    if not loss.isfinite().all():
        raise common.InputError(f"training diverged: the loss is {loss.max()}; lower --lr")
    return [v.detach() for v in p]


# --- evaluate ---------------------------------------------------------------------------------


def figure_a(config, tests):
    """Fig. A: the data in two dimensions; x1 and x2 are each the sum of its group over 20."""
    path, header = f"{config.out}/figures/fig_a", ["set", "y", "x1", "x2"]
    with common.figure(path, header, columns=2) as (axes, numbers):
        for axis, (split, (x, y)) in zip(axes[0], tests.items(), strict=True):
            one, two = (total / 20 for total in group_sums(x[:1000]))
            for label, colour in ((0, "tab:red"), (1, "tab:blue")):
                points = torch.stack([one, two], 1)[y[:1000] == label]
                axis.plot(*points.T, ".", ms=3, color=colour, label=f"y = {label}")
                numbers += [(split, label, *point) for point in points.tolist()]
            axis.set(xlabel="x1: sum of group 1 / 20", ylabel="x2: sum of group 2 / 20")
            axis.set(xlim=(-6, 6), ylim=(-6, 6), title=split)
        axes[0, 0].legend()
