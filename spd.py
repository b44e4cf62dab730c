"""SPD: Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models.
Tian, Huang, Kira; NeurIPS 2024; arXiv 2411.01713.

Only the optimiser is here; the paper's experiments are still to come.

Fine-tuning with Adam drifts far from the pre-trained weights and loses robustness; pulling every
layer back at every step (L2-SP) under-fits. Selective projection decay (SPD) pulls a layer back
only at steps where the gradient says that the layer has gone too far (c_t < 0). How far is set by
how much the step would enlarge the deviation (r_t): with strength 1 the layer is projected back to
the radius that it had before the step.

    Sec. 3    Eq. 3   condition c_t              condition
              Eq. 4   the projection             project
              Eq. 9   deviation ratio r_t        deviation_ratio
              Alg. 2  Adam with the three        AdamSPD

AdamSPD needs nothing but torch, so this file may be lifted into another project. Beside common.py
it also uses the compiled kernel, which gives the same weights up to rounding.
"""

import torch

# --- method ---------------------------------------------------------------------------------------


def condition(grad, before, anchor):
    """Eq. (3): c_t = -g_t . (theta_{t-1} - theta_0), per tensor, fp64.  3 x [...] -> []

    g_t is the raw gradient, not Adam's momentum. c_t < 0: descent points back to the anchor.
    """
    return -(grad.double() * (before.double() - anchor.double())).sum()


def project(after, anchor, c, r, spd_lambda):
    """Eq. (4): theta_t = theta~_t - lambda r_t (theta~_t - theta_0) if c_t < 0.  [...] -> [...]"""
    if not (c < 0 and r > 0):
        return after
    return anchor + (1 - spd_lambda * float(r)) * (after - anchor)


def deviation_ratio(before, after, anchor):
    """Eq. (9): r_t = max(0, gamma_t - gamma_{t-1}) / gamma_t, gamma = ||theta - theta_0||.  -> []

    With D = theta_{t-1} - theta_0 and u = theta~_t - theta_{t-1}, gamma_t^2 - gamma_{t-1}^2 = S3 =
    sum u (2 D + u), so r_t = S3 / (gamma_t (gamma_t + gamma_{t-1})). The difference of the norms
    themselves would lose all digits of a small r_t in fp32.
    """
    distance, update = before.double() - anchor.double(), after.double() - before.double()
    growth = (update * (2 * distance + update)).sum()
    previous, current = distance.norm(), (distance + update).norm()
    return torch.where(growth > 0, growth / (current * (current + previous)), 0.0)


def adam(param, grad, exp_avg, exp_avg_sq, step, lr, betas, eps):
    """theta~_t: torch.optim.Adam's step without decay; moments updated in place.  -> [...]"""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    return param.addcdiv(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))


class AdamSPD(torch.optim.Optimizer):
    """Alg. 2: Adam with selective projection decay, per parameter tensor.

    anchor     theta_0 of a group: "pretrained" (the weights when the group is added, kept in the
               state), "zero" (PEFT: the origin, stores nothing) or "none" (plain Adam).
    spd_lambda lambda of Eq. (4). It is no weight decay: 1 is the value to try first, 0.01 does next
               to nothing.
    fused      None: the compiled kernel where it can be had and the tensors of a step are a million
               elements or more, since for less its build would not pay; True: insist; False: never.
    stats      keep c_t, r_t and gamma_{t-1} of the last step in state[p]["spd"], [3] fp64.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0,
                 anchor="pretrained", fused=None, stats=False):  # fmt: skip
        self.fused, self.stats = fused, stats
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, spd_lambda=spd_lambda, anchor=anchor)
        super().__init__(params, defaults)

    def add_param_group(self, group):
        super().add_param_group(group)
        group = self.param_groups[-1]
        if group["anchor"] not in ("pretrained", "zero", "none"):
            known = "'pretrained', 'zero' or 'none'"
            raise ValueError(f"AdamSPD: anchor must be {known}, got {group['anchor']!r}")
        for name in ("lr", "eps", "spd_lambda"):
            if not group[name] >= 0:
                raise ValueError(f"AdamSPD: {name} must not be negative, got {group[name]}")
        if group["anchor"] == "pretrained":
            for param in group["params"]:
                self.state[param]["anchor"] = param.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches = {}  # tensors that one kernel call can take together
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise ValueError("AdamSPD: sparse gradients are not supported, use dense ones")
                state = self.state[param]
                if "step" not in state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                batches.setdefault((param.device, param.dtype, state["step"]), []).append(param)
            for (_, _, step), params in batches.items():
                if kernels := self._kernels(params):
                    self._fused_step(kernels, params, step, group)
                else:
                    self._loop_step(params, step, group)
        return loss

    def _kernels(self, params):
        """The compiled kernels if they take these tensors, else None."""
        if self.fused is False:
            return None
        device, dtype = params[0].device.type, params[0].dtype
        fits = dtype == torch.float32 and device in ("cpu", "cuda")
        fits |= dtype == torch.float64 and device == "cpu"
        for p in params:
            fits &= p.is_contiguous() and p.grad.is_contiguous() and p.grad.dtype == dtype
        worth = self.fused or sum(p.numel() for p in params) >= 1_000_000
        kernels = compiled() if fits and worth else None
        if kernels and device not in kernels.devices:
            kernels = None
        if self.fused and kernels is None:
            raise ValueError(
                "AdamSPD: fused=True needs the compiled kernels of this project and contiguous "
                f"float32 tensors, on the CPU also float64, got {dtype} on {device}; use fused=None"
            )
        return kernels

    def _fused_step(self, kernels, params, step, group):
        states, sums = [self.state[p] for p in params], None
        if self.stats:
            device = params[0].device
            sums = torch.zeros(len(params), 3, dtype=torch.float64, device=device)
        kernels.spd_step(
            params,
            [s["anchor"] if group["anchor"] == "pretrained" else None for s in states],
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            step,
            group["lr"],
            group["betas"],
            group["eps"],
            0.0 if group["anchor"] == "none" else group["spd_lambda"],
            sums,
        )
        if self.stats:
            for state, (s1, s2, s3) in zip(states, sums.unbind(), strict=True):
                before, after = s2.sqrt(), (s2 + s3).clamp_min(0).sqrt()
                ratio = torch.where(s3 > 0, s3 / (after * (after + before)), 0.0)
                state["spd"] = torch.stack([-s1, ratio, before])

    def _loop_step(self, params, step, group):
        for param in params:
            state = self.state[param]
            args = param.grad, state["exp_avg"], state["exp_avg_sq"], step, group["lr"]
            after = adam(param, *args, group["betas"], group["eps"])
            if group["anchor"] != "none":
                zero = torch.zeros((), dtype=param.dtype, device=param.device)
                anchor = state["anchor"] if group["anchor"] == "pretrained" else zero
                c, r = condition(param.grad, param, anchor), deviation_ratio(param, after, anchor)
                if self.stats:
                    state["spd"] = torch.stack([c, r, (param.double() - anchor.double()).norm()])
                after = project(after, anchor, c, r, group["spd_lambda"])
            param.copy_(after)


def compiled():
    """The kernels of this project; None where they cannot be built, or common.py is not here."""
    try:
        import common
    except ImportError:
        return None
    return common.kernels()
