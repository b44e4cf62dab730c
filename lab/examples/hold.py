"""Selective projection decay around any torch optimiser; the paper has it around Adam's step.

    from hold import hold

    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    hold(optimiser, spd_lambda=1.0)

An extension, not measured on any task: SPD needs the weights before and after a step and the
gradient, and nothing of how the step is made. AdamSPD (spd.py) is faster and keeps its anchors.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import spd  # noqa: E402


def parameters(optimiser):
    """Every parameter, and whether its group maximises. Raises ValueError for complex ones."""
    for group in optimiser.param_groups:
        for p in group["params"]:
            if p.is_complex():
                raise ValueError("hold: complex parameters are not supported")
            yield p, group.get("maximize", False)


@torch.no_grad()
def gradients(optimiser):
    """{parameter: copy of its gradient, as for minimising}; some optimisers write to p.grad."""
    return {
        p: -p.grad if maximize else p.grad.clone()
        for p, maximize in parameters(optimiser)
        if p.grad is not None
    }


@torch.no_grad()
def pull_back(before, anchors, grads, spd_lambda):
    """Eqs. (3), (4), (9) for each parameter that has a gradient."""
    for p, grad in grads.items():
        c = spd.condition(grad, before[p], anchors[p])
        r = spd.deviation_ratio(*spd.squared_deviations(before[p], p, anchors[p]))
        p.copy_(spd.project(p, anchors[p], c, r, spd_lambda))


def hold(optimiser, spd_lambda=1.0, anchor="pretrained"):
    """Eqs. (3), (4), (9) around each step of any torch optimiser. Returns a function that ends it.

    Call it while the weights are the pre-trained ones, also when a run is resumed or an optimiser
    copied: the anchors are neither in its state dict nor in its copies. anchor "zero" as AdamSPD's.
    With a closure g_t is the gradient of its first call. Raises ValueError.
    """
    if anchor not in ("pretrained", "zero"):
        raise ValueError(f"hold: anchor must be 'pretrained' or 'zero', got {anchor!r}")
    if not 0 <= spd_lambda < math.inf:
        raise ValueError(f"hold: spd_lambda must be 0 or more and finite, got {spd_lambda}")
    optimiser = getattr(optimiser, "optimizer", optimiser)  # accelerate wraps it
    anchors, before, grads = {}, {}, {}

    def add_anchors():
        for p, _ in parameters(optimiser):
            if p not in anchors:
                anchors[p] = p.detach().clone() if anchor == "pretrained" else torch.zeros_like(p)

    def before_step(_, args, kwargs):
        add_anchors()  # of groups that are new
        before.update((p, p.detach().clone()) for p in anchors)
        grads.clear()
        closure = kwargs.pop("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            grads.update(gradients(optimiser))
            return None  # the arguments stay

        def first():
            loss = closure()
            if not grads:
                grads.update(gradients(optimiser))
            return loss

        return (args[0], first, *args[2:]), kwargs

    def after_step(*_):
        pull_back(before, anchors, grads, spd_lambda)
        before.clear()
        grads.clear()

    add_anchors()
    hooks = [optimiser.register_step_pre_hook(before_step)]
    hooks.append(optimiser.register_step_post_hook(after_step))
    return lambda: [hook.remove() for hook in hooks]
