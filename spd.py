"""SPD: Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models.
Tian, Huang, Kira; NeurIPS 2024; arXiv 2411.01713.

Fine-tuning with Adam drifts far from the pre-trained weights and loses robustness; pulling every
layer back at every step (L2-SP) under-fits. Selective projection decay (SPD) pulls a layer back
only at steps where the gradient says that the layer has gone too far (c_t < 0). How far is set by
how much the step would enlarge the deviation (r_t): with strength 1 the layer is projected back to
the radius that it had before the step.

    Sec. 3    Eq. 1   L2-SP in the loss          l2_sp_gradient
              Eq. 2   L2-SP in the step          pull
              Eq. 3   condition c_t              condition
              Eq. 4   the projection             project
              Eq. 9   deviation ratio r_t        deviation_ratio
              Alg. 1, 2                          AdamSPD
    Sec. 4    image classification               main

    python spd.py                   # embedded digits, 3 minutes; SPD: ID 94, shifts 70
    python spd.py --data /imagenet  # CLIP ViT-B/16; not measured by us
    python spd.py --data /domainnet --id real --fraction 0.1

AdamSPD needs nothing but torch: copy this file into another project and import it there. Beside
common.py it also uses the compiled kernel, which gives the same weights up to rounding. Around any
other optimiser: examples/hold.py.

Differs from the paper (P) or the authors' code (C):
S1  strength is spd_lambda, never weight_decay, as it hides in C: 0.01 to 0.1 there is SPD switched
    off. weight_decay here is AdamW's, 0 unless given.
S2  anchors belong to parameters, not to groups: any iterable and the groups of timm and Hugging
    Face work. New layers: anchored at their start, as C's manual says; "none" leaves them free.
S3  Eq. 9 is computed without a difference of norms, which would lose a small r_t in fp32.
S4  P's form of L2-SP (Eq. 2) is not certain: coupled and decoupled are both here, and labelled.
S5  open_clip's towers have no drop-path; it is put in at their residual branches.
"""

import copy
import ctypes
import functools
import hashlib
import math
import sys
import warnings
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.nn.functional as F

try:
    import common
    from common import arg
except ImportError:  # lifted out: AdamSPD asks for nothing here
    common = None

    def arg(default, *_, **__):
        return default


METHODS = ("AdamW", "L2-SP", "Adam-SPD")
FAMILIES = ("Zero-shot", *METHODS)
PRESETS = {  # as vrf.py's, where the rates come from, with fewer epochs and no mixing of digits
    "digits": {
        "epochs": 5,
        "batch": 64,
        "lr": 2e-4,
        "warmup": 24,  # a tenth of the steps
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
    }
}


@dataclass
class Config:
    data: str = arg("digits", "digits; folder: ImageNet, CIFAR-10, DomainNet, train/ val/")
    id: str = arg("", "DomainNet: the domain to train on, such as real")
    fraction: float = arg(1.0, "share of the training images of every class", most=1)
    model: str = arg("ViT-B-16", "open_clip architecture; the paper says CLIP ViT-Base")
    pretrained: str = arg("openai", "open_clip's tag of the zero-shot weights, or random")
    weights: str = arg("", "local file with the zero-shot weights instead")
    quick_gelu: str = arg("auto", "activation: from the source, or overruled", "auto yes no")
    trust_checkpoint: bool = arg(False, "let weight files that need it run code")
    methods: str = arg("AdamW,L2-SP,Adam-SPD", "what to train, comma-separated")
    spd_lambda: str = arg("0.25,0.5,1,2", "strengths of Adam-SPD; Tab. 1 has 1")
    l2sp: str = arg("10,30,100", "strengths of L2-SP; ours")
    l2sp_form: str = arg("decoupled", "in the step or in the loss (S4)", "decoupled coupled")
    head: str = arg("pretrained", "anchor of the classifier (S2)", "pretrained none")
    epochs: int = arg(30, "paper: 30 or 60 on DomainNet", least=1)
    batch: int = arg(512, "ours; the paper's is not known to us", least=1)
    lr: float = arg(2e-5, "DomainNet")
    weight_decay: float = arg(0.1, "of AdamW alone; listed for all runs")
    warmup: int = arg(500, "steps of linear warm-up; ours")
    clip: float = arg(1.0, "largest gradient norm; ours")
    smoothing: float = arg(0.1, "label smoothing, all runs", most=1)
    mixup: float = arg(0.8, "all runs; needs an even batch")
    cutmix: float = arg(1.0, "all runs")
    drop_path: float = arg(0.2, "all runs (S5)", most=1)
    selection: str = arg("paper", "paper: on ID val; code: on the reported ID set", "paper code")
    val_fraction: float = arg(0.02, "of train held out as ID val, where the data bring none; ours")
    seeds: int = arg(1, "number of fine-tuning runs", least=1)
    seed: int = arg(0, "seed of the first run")
    precision: str = arg("fp32", "autocast; the paper does not state its own", "fp32 bf16 fp16")
    device: str = arg("auto", "auto: cuda, mps, cpu")
    workers: int = arg(-1, "processes that decode; -1: one per core on a GPU, else none", least=-1)
    skip_bad_images: bool = arg(False, "leave unreadable images out instead of stopping")
    jobs: int = arg(2, "runs at a time, each in a process of its own; 1 on a GPU", least=1)
    resume: bool = arg(True, "continue unfinished training, reuse finished")
    out: str = arg("runs/spd", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def l2_sp_gradient(grad, before, anchor, strength):
    """Eq. (1): gradient of L + strength / 2 ||theta - theta_0||^2.  [...] -> [...]"""
    return grad + strength * (before - anchor)


def pull(after, anchor, amount):
    """Eq. (2), decoupled L2-SP: theta_t = theta~_t - amount (theta~_t - theta_0), amount = lr
    lambda. Unconditional, and the same for every layer.  [...] -> [...]
    """
    return torch.lerp(after, anchor.expand_as(after), amount)


def condition(grad, before, anchor):
    """Eq. (3): c_t = -g_t . (theta_{t-1} - theta_0), per tensor, fp64.  3 x [...] -> []

    g_t is the raw gradient, not Adam's momentum. c_t < 0: descent points back to the anchor.
    """
    return -whole((grad.double() * (before.double() - anchor.double())).sum())


def project(after, anchor, c, r, spd_lambda):
    """Eq. (4): theta_t = theta~_t - lambda r_t (theta~_t - theta_0) if c_t < 0.  [...] -> [...]

    The choice is made on the device: nothing waits for it, and weight 0 returns theta~_t exactly.
    """
    amount = torch.where(c < 0, spd_lambda * r, 0.0).to(after.dtype)
    return torch.lerp(after, anchor.expand_as(after), amount)


def deviation_ratio(before, after, anchor):
    """Eq. (9): r_t = max(0, gamma_t - gamma_{t-1}) / gamma_t, gamma = ||theta - theta_0||.  -> []

    With D = theta_{t-1} - theta_0 and u = theta~_t - theta_{t-1}, gamma_t^2 - gamma_{t-1}^2 = S3 =
    sum u (2 D + u), so r_t = S3 / (gamma_t (gamma_t + gamma_{t-1})). Differs (S3): the difference
    of the norms themselves would lose all digits of a small r_t in fp32.
    """
    distance, update = before.double() - anchor.double(), after.double() - before.double()
    growth = whole((update * (2 * distance + update)).sum())
    previous, current = whole(distance.norm()), whole((distance + update).norm())
    return torch.where(growth > 0, growth / (current * (current + previous)), 0.0)


def cautious(before, after, anchor, amount):
    """Not the paper's: decay towards theta_0 of the elements whose step already goes there, as
    cautious weight decay (ICLR 2026) does towards 0.  [...] -> [...]
    """
    distance = before - anchor
    return after - amount * distance * ((before - after) * distance >= 0)


def adam(start, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, max_sq=None):
    """theta~_t: torch.optim.Adam's step without decay; moments updated in place.  -> [...]

    step and lr are numbers, or tensors on the device (then nothing is read back).
    """
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    if max_sq is not None:  # AMSGrad
        torch.maximum(max_sq, exp_avg_sq, out=max_sq)
    second = exp_avg_sq if max_sq is None else max_sq
    denominator = (second.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    size = lr / (1 - betas[0] ** step)
    if isinstance(size, torch.Tensor):  # half precision would round it
        wide = torch.promote_types(start.dtype, torch.float32)
        update = size.to(wide) * (exp_avg / denominator).to(wide)
        return (start.to(wide) - update).to(start.dtype)
    return start.addcdiv(exp_avg, denominator, value=-size)


def whole(sum_of_part):
    """A sum over sharded weights (FSDP), of all parts; any other as it is.  [] -> []

    Older PyTorch compares and divides what is still each process's own part.
    """
    if not hasattr(sum_of_part, "placements"):
        return sum_of_part
    from torch.distributed.tensor import Replicate

    return sum_of_part.redistribute(placements=[Replicate()] * sum_of_part.device_mesh.ndim)


ANCHORS = ("pretrained", "zero", "none")
RULES = ("spd", "l2-sp decoupled", "l2-sp coupled", "cautious")


class AdamSPD(torch.optim.Optimizer):
    """Alg. 2: Adam with selective projection decay, per parameter tensor. Options of every group:

    spd_lambda lambda of Eq. (4). It is no weight decay: 1 is the value to try first, 0.1 does next
               to nothing.
    anchor     theta_0: "pretrained" (the weights when the group is added, kept in the state),
               "zero" (PEFT: the origin, stores nothing) or "none" (plain Adam).
    rule       "spd", or what it is compared with: "l2-sp decoupled", "l2-sp coupled" (Alg. 1),
               "cautious"; spd_lambda is the strength of each.
    weight_decay, amsgrad, maximize  as torch.optim.AdamW's.

    And of the whole optimiser:
    fused        None: the compiled kernel where it can be had and the tensors of a step are a
                 million elements or more, since for less its build would not pay; True: insist;
                 False: never.
    foreach      torch's operations on whole lists: fewer launches for 20 more bytes a parameter.
                 None: on a GPU without the kernel; True: insist; False: never.
    capturable   step counts live on the device, so that a CUDA graph can hold the step.
    master       fp16 and bf16 weights have an fp32 copy, which is what the steps change: whoever
                 sets such weights from outside makes a new optimiser.
    anchor_dtype storage of "pretrained" anchors, such as torch.bfloat16; None: the weights'. The
                 loop widens one at a time, the kernel and foreach all at once.
    save_anchors False leaves them out of the state dict; loading then checks, by hash, that the
                 optimiser was made of the same pre-trained weights.
    stats        keep c_t, r_t and gamma_{t-1} of the last step in state[p]["spd"], [3] fp64.
    """

    OWN = ("fused", "foreach", "capturable", "master", "anchor_dtype", "save_anchors", "stats",
           "_anchors")  # fmt: skip

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0,
                 anchor="pretrained", rule="spd", weight_decay=0.0, amsgrad=False, maximize=False,
                 fused=None, foreach=None, capturable=False, master=False, anchor_dtype=None,
                 save_anchors=True, stats=False):  # fmt: skip
        if fused and foreach:
            raise ValueError("AdamSPD: fused and foreach exclude each other")
        if anchor_dtype is not None and not anchor_dtype.is_floating_point:
            raise ValueError(f"AdamSPD: anchor_dtype must be a floating type, got {anchor_dtype}")
        self.fused, self.foreach, self.capturable, self.master = fused, foreach, capturable, master
        self.anchor_dtype, self.save_anchors, self.stats = anchor_dtype, save_anchors, stats
        self._anchors = {}  # of parameters that no step has changed yet; then in their state
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, spd_lambda=spd_lambda, anchor=anchor)
        defaults |= dict(rule=rule, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults)

    def add_param_group(self, group):
        self._check({**self.defaults, **group})
        super().add_param_group(group)
        group = self.param_groups[-1]
        if any(p.is_complex() for p in group["params"]):
            self.param_groups.pop()
            raise ValueError("AdamSPD: complex parameters are not supported")
        for param in group["params"]:
            if group["anchor"] == "pretrained" and param.requires_grad:
                self._capture(param)

    def _check(self, options):
        for name, known in (("anchor", ANCHORS), ("rule", RULES)):
            if options[name] not in known:
                known = ", ".join(map(repr, known))
                raise ValueError(f"AdamSPD: {name} must be one of {known}, got {options[name]!r}")
        if isinstance(options["lr"], torch.Tensor) and options["lr"].dim():
            raise ValueError(f"AdamSPD: a tensor lr has no dimension, got {options['lr'].shape}")
        for name in ("lr", "eps", "spd_lambda", "weight_decay"):
            value = options[name]
            if not 0 <= value < math.inf:
                raise ValueError(f"AdamSPD: {name} must be 0 or more and finite, got {value}")
        betas = options["betas"]
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"AdamSPD: betas must be two from 0 to below 1, got {betas}")
        if options["rule"] == "spd" and 0 < options["spd_lambda"] <= 0.1:  # Differs (S1)
            message = f"spd_lambda {options['spd_lambda']} is next to none; it is no weight decay"
            warnings.warn(f"AdamSPD: {message}: try 1", stacklevel=5)

    def _capture(self, param):
        dtype = self.anchor_dtype or param.dtype
        self._anchors[param] = param.detach().to(dtype, copy=True)

    def anchor_of(self, param):
        """theta_0 of a parameter, as stored; None for the zero anchor and "none"."""
        return self.state.get(param, {}).get("anchor", self._anchors.get(param))

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if any(grad is not None and grad.is_sparse for grad in grads):
            raise ValueError("AdamSPD: sparse gradients are not supported, use dense ones")
        for group in self.param_groups:
            batches = {}  # tensors that one call can take together
            for param in group["params"]:
                if param.grad is None or param.numel() == 0:
                    continue
                state = self._ready(param, group)
                state["step"] += 1
                key = param.device, param.dtype, id(state) if self.capturable else state["step"]
                batches.setdefault(key, []).append(param)
            for params in batches.values():
                self._step(params, group)
        return loss

    def _ready(self, param, group):
        """State of a parameter that has a gradient: made at its first step, on its device."""
        state, pretrained = self.state[param], group["anchor"] == "pretrained"
        if "step" not in state and pretrained and "anchor" not in state:
            if param not in self._anchors:
                self._capture(param)  # frozen until now
            state["anchor"] = self._anchors.pop(param)
        if pretrained and "anchor" not in state:
            raise ValueError(
                "AdamSPD: anchor 'pretrained' of a parameter that was stepped without one: its"
                " pre-trained weights are gone; make the optimiser of the pre-trained weights"
            )
        if pretrained and state["anchor"].device != param.device:  # the model was moved
            state["anchor"] = state["anchor"].to(param.device)
        if self._dtype(param) != param.dtype and "master" not in state:
            state["master"] = param.detach().to(self._dtype(param))
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + group["amsgrad"]]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(state.get("master", param))
        if "step" not in state:
            state["step"] = torch.zeros((), device=param.device) if self.capturable else 0
        return state

    def _dtype(self, param):
        """Of the weights that the steps change, and of the moments."""
        half = param.dtype in (torch.float16, torch.bfloat16)
        return torch.float32 if self.master and half else param.dtype

    def _step(self, params, group):
        """One step of parameters of one device, type and step count, in one of three ways."""
        states = [self.state[p] for p in params]
        weights = [s.get("master", p) for s, p in zip(states, params, strict=True)]
        grads, anchors = [p.grad for p in params], [s.get("anchor") for s in states]
        kernels = self._kernels(states, weights, grads, group)
        lists = not kernels and self._lists(weights, group)
        if kernels or lists:
            dtype = weights[0].dtype
            grads = [grad.to(dtype).resolve_neg() for grad in grads]
            anchors = [anchor if anchor is None else anchor.to(dtype) for anchor in anchors]
        if kernels:
            self._fused_step(kernels, states, weights, grads, anchors, group)
        elif lists:
            self._foreach_step(states, weights, grads, anchors, group)
        else:
            self._loop_step(states, weights, grads, anchors, group)
        for param, weight in zip(params, weights, strict=True):
            if weight is not param:
                param.copy_(weight)

    def _loop_step(self, states, weights, grads, anchors, group):
        rule, strength, lr = group["rule"], group["spd_lambda"], group["lr"]
        free = group["anchor"] == "none"
        for state, before, raw, anchor in zip(states, weights, grads, anchors, strict=True):
            raw = grad = (-raw if group["maximize"] else raw).to(before.dtype)
            if anchor is None:  # sharded weights need their own layout
                sharded = hasattr(before, "placements")
                anchor = torch.zeros_like(before) if sharded else before.new_zeros(())
            anchor = anchor.to(before.dtype)
            if rule == "l2-sp coupled" and not free:
                grad = l2_sp_gradient(grad, before, anchor, strength)
            start = before * (1 - lr * group["weight_decay"]) if group["weight_decay"] else before
            args = grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr, group["betas"]
            after = adam(start, *args, group["eps"], state.get("max_exp_avg_sq"))
            if rule == "spd" and not free:
                c, r = condition(raw, before, anchor), deviation_ratio(before, after, anchor)
                after = project(after, anchor, c, r, strength)
                if self.stats:
                    gamma = whole((before.double() - anchor.double()).norm())
                    state["spd"] = torch.stack([c, r, gamma])
            elif rule == "l2-sp decoupled" and not free:
                after = pull(after, anchor, lr * strength)
            elif rule == "cautious" and not free:
                after = cautious(before, after, anchor, lr * strength)
            before.copy_(after)

    def _lists(self, weights, group):
        """Whether `_foreach_step` takes these tensors and this group."""
        if self.foreach is False or self.foreach is None and weights[0].device.type != "cuda":
            return False
        fits = group["rule"] == "spd" and not self.capturable
        fits &= not isinstance(group["lr"], torch.Tensor)
        fits &= weights[0].dtype in (torch.float32, torch.float64)
        fits &= not any(hasattr(w, "placements") for w in weights)  # sharded, as in _kernels
        if self.foreach and not fits:
            raise ValueError(
                "AdamSPD: foreach=True needs rule 'spd' with no capturable or tensor lr, and whole "
                f"float32 or float64 tensors, got {weights[0].dtype}; use foreach=None"
            )
        return fits

    def _foreach_step(self, states, weights, grads, anchors, group):
        """The loop's arithmetic on whole lists. Of the three sums the terms are in the weights'
        type and added in fp64: c_t's sign can differ from the loop's below 1e-6 ||g|| ||D||.
        """
        step, lr, (beta1, beta2) = states[0]["step"], group["lr"], group["betas"]
        grads = torch._foreach_neg(grads) if group["maximize"] else grads
        exp_avg, second = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        if group["amsgrad"]:
            largest = [s["max_exp_avg_sq"] for s in states]
            torch._foreach_maximum_(largest, second)
            second = largest
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        after = torch._foreach_mul(weights, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(after, exp_avg, denominator, -lr / (1 - beta1**step))
        del denominator
        if group["anchor"] != "none":
            zero = group["anchor"] == "zero"
            distance = weights if zero else torch._foreach_sub(weights, anchors)
            update = torch._foreach_sub(after, weights)
            s1, s2 = dots(grads, distance), dots(distance, distance)
            s3 = dots(update, torch._foreach_add(update, distance, alpha=2))
            amount = group["spd_lambda"] * self._ratio(states, s1, s2, s3)
            amount = torch.where(s1 > 0, amount, 0.0).to(weights[0].dtype)
            back = after if zero else torch._foreach_sub(after, anchors)
            torch._foreach_sub_(after, torch._foreach_mul(back, list(amount.unbind())))
        torch._foreach_copy_(weights, after)

    def _ratio(self, states, s1, s2, s3):
        """r_t of each tensor from the three sums, as in `deviation_ratio`; kept if asked.  [T]"""
        before, after = s2.sqrt(), (s2 + s3).clamp_min(0).sqrt()
        ratio = torch.where(s3 > 0, s3 / (after * (after + before)), 0.0)
        if self.stats:
            kept = torch.stack([-s1, ratio, before], 1)
            for state, row in zip(states, kept, strict=True):
                state["spd"] = row
        return ratio

    def _kernels(self, states, weights, grads, group):
        """The compiled kernels if they take these tensors and this group, else None."""
        if self.fused is False or self.foreach:
            return None
        device, dtype = weights[0].device.type, weights[0].dtype
        plain = not (group["weight_decay"] or group["amsgrad"] or group["maximize"])
        fits = plain and group["rule"] == "spd" and not self.capturable
        fits &= not isinstance(group["lr"], torch.Tensor)
        fits &= (dtype == torch.float32 and device in ("cpu", "cuda")) or (
            dtype == torch.float64 and device == "cpu"
        )
        names = ("anchor", "exp_avg", "exp_avg_sq")
        tensors = [*weights, *grads, *(s[n] for s in states for n in names if n in s)]
        fits &= all(t.is_contiguous() for t in tensors)
        # sharded: its sums are of all processes' parts
        fits &= not any(hasattr(w, "placements") for w in weights)
        worth = self.fused or sum(w.numel() for w in weights) >= 1_000_000
        kernels = compiled() if fits and worth else None
        if kernels and device not in kernels.devices:
            kernels = None
        if self.fused and kernels is None:
            raise ValueError(
                "AdamSPD: fused=True needs the compiled kernels of this project, rule 'spd' with "
                "no weight_decay, amsgrad, maximize, capturable or tensor lr, and contiguous "
                f"float32 tensors, whole ones (CPU: also float64), got {dtype} on {device}; use "
                "fused=None"
            )
        return kernels

    def _fused_step(self, kernels, states, weights, grads, anchors, group):
        sums, options = None, [group[name] for name in ("lr", "betas", "eps")]
        strength = 0.0 if group["anchor"] == "none" else group["spd_lambda"]
        if self.stats and group["anchor"] != "none":
            shape, device = (len(states), 3), weights[0].device
            sums = torch.zeros(shape, dtype=torch.float64, device=device)
        moments = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        tensors = weights, anchors, grads, *moments
        kernels.spd_step(*tensors, states[0]["step"], *options, strength, sums)
        if sums is not None:
            self._ratio(states, *sums.unbind(1))

    def state_dict(self):
        """torch's, with the anchors, or with their hashes if save_anchors is False."""
        saved = super().state_dict()
        if not self.save_anchors:
            for i, state in saved["state"].items():
                if "anchor" in state:
                    saved["state"][i] = {**state, "anchor": fingerprint(state["anchor"])}
        return saved

    def load_state_dict(self, state_dict):
        """torch's; anchors come from the file, or stay where the file has their hashes only.

        Raises ValueError if a hash is of other weights, or if the file has no anchors (torch's
        Adam): make the optimiser of the pre-trained model first, then load the fine-tuned one.
        """
        theirs = state_dict["param_groups"]
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        groups = [mine | g for mine, g in zip(own, theirs, strict=False)]  # what the file lacks
        groups += theirs[len(groups) :]
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [(i, group) for group in groups for i in group["params"]]
        kept, states = {p: self.anchor_of(p) for p in params}, dict(state_dict["state"])
        for p, (i, group) in zip(params, ids, strict=False):  # of other sizes torch says so
            states[i] = state = dict(states.get(i, {}))
            if isinstance(state.get("anchor"), int):
                if kept[p] is None or fingerprint(kept[p]) != state["anchor"]:
                    raise ValueError(
                        "AdamSPD: the state dict is of other anchors (or anchor_dtype); make the "
                        "optimiser of the pre-trained weights, then load the state dict and the "
                        "fine-tuned weights"
                    )
                state["anchor"] = kept[p]
            elif group.get("anchor") == "pretrained" and "step" in state and "anchor" not in state:
                raise ValueError(
                    "AdamSPD: the state dict has no anchors, as of torch's Adam; load one of "
                    "AdamSPD, or begin anew from the pre-trained weights"
                )
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})
        for p, (i, _) in zip(params, ids, strict=True):
            self._restore(p, states[i])
            if "anchor" not in self.state[p] and kept[p] is not None:
                self._anchors[p] = kept[p]
            else:
                self._anchors.pop(p, None)

    def _restore(self, param, saved):
        """State of a parameter in its own types: torch gives every tensor the parameter's."""
        state, wide = self.state[param], self._dtype(param)
        types = {"anchor": self.anchor_dtype or param.dtype, "spd": torch.float64}
        for name, value in saved.items():
            if name == "step":
                state["step"] = int(value)
                if self.capturable:
                    state["step"] = torch.full((), float(value), device=param.device)
            elif torch.is_tensor(value) and types.get(name, wide) != param.dtype:
                state[name] = value.to(param.device, types.get(name, wide))
        if wide == param.dtype:
            state.pop("master", None)  # of a run that had one

    def __getstate__(self):  # of copy and pickle
        return super().__getstate__() | {name: getattr(self, name) for name in self.OWN}

    def __setstate__(self, state):
        super().__setstate__(state)
        for name in self.OWN:  # of a pickle from before these options
            given = {"_anchors": {}, "save_anchors": True}.get(name)
            self.__dict__.setdefault(name, given)
        for group in self.param_groups:  # of a file from before these options
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def dots(a, b):
    """Sums of the products of two lists of tensors, added in fp64.  -> [T]"""
    return torch.stack([x.sum(dtype=torch.float64) for x in torch._foreach_mul(a, b)])


def fingerprint(tensor):
    """60-bit hash of a tensor's bytes, an int: torch's loader would take a string apart."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    data = tensor.detach().cpu().contiguous()
    data = ctypes.string_at(data.data_ptr(), data.nbytes) if data.numel() else b""
    return int(hashlib.sha256(data).hexdigest()[:15], 16)


def param_groups(model, special=None):
    """Groups of a model's trainable parameters: {prefix of names: options}, the first that fits.

    AdamSPD(param_groups(model, {"head.": {"anchor": "none"}, "visual.": {"spd_lambda": 0.5}}))
    """
    special, groups = special or {}, {}
    for name, param in model.named_parameters():
        prefix = next((p for p in special if name.startswith(p)), "")
        if param.requires_grad:
            groups.setdefault(prefix, {**special.get(prefix, {}), "params": []})
            groups[prefix]["params"].append(param)
    if unused := set(special) - set(groups):
        raise ValueError(f"param_groups: no trainable parameter begins with {sorted(unused)[0]!r}")
    return list(groups.values())


def compiled():
    """The kernels of this project; None where they cannot be built, or common.py is not here. Asks
    no other process, whose steps may be of other tensors.
    """
    return common.kernels(agree=False) if common else None


# --- train / prepare ------------------------------------------------------------------------------


def open_data(config):
    """common's; --id takes a domain of DomainNet, --fraction thins the training images (Sec. 4)."""
    path = f"{config.data}/{config.id}" if config.id else config.data
    data = common.open_data(path, config.val_fraction, config.selection, config.seed)
    if not 0 < config.fraction <= 1:
        raise common.InputError(f"--fraction {config.fraction}: expected a share of 1, such as 0.1")
    if config.fraction < 1:
        kept = common.hold_out(data.train, config.fraction, config.seed)[1]
        path = f"{data.train.path} ({config.fraction:.0%})"
        data.train = replace(kept, name="train", path=path)
    return data


def recipes(config):
    """{row: (method, strength, function of a model -> optimiser)}, in the table's order."""
    wanted = common.choose(config.methods, METHODS, "--methods")
    free = {"head.": {"anchor": "none"}} if config.head == "none" else {}

    def spd(rule, strength):
        def make(model):
            groups, fused = param_groups(model, free), None
            if common.world() > 1 and sum(p.numel() for p in model.parameters()) >= 1_000_000:
                fused = None if common.kernels() else False  # the same way in all processes
            return AdamSPD(groups, lr=config.lr, spd_lambda=strength, rule=rule, fused=fused)

        return make

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    rows = {"AdamW": ("AdamW", None, adamw)}
    for x in common.numbers(config.l2sp, "--l2sp"):
        rows[f"L2-SP {x:g}"] = "L2-SP", x, spd(f"l2-sp {config.l2sp_form}", x)
    for x in common.numbers(config.spd_lambda, "--spd-lambda"):
        rows[f"Adam-SPD {x:g}"] = "Adam-SPD", x, spd("spd", x)
    return {name: row for name, row in rows.items() if row[0] in wanted}


def train(config, name, data, clip, start, make, seed):
    """The fine-tuned copy of Classifier `start`, as it was after the epoch of highest accuracy on
    ID val (Sec. 4). Checkpoints and the best model so far are kept, so that a run can continue.
    """
    model, per_epoch = copy.deepcopy(start), math.ceil(len(data.train.labels) / config.batch)
    add_drop_path(model.visual, config.drop_path)
    optimiser, best = make(model), {"accuracy": -1.0}
    fields = ("epochs", "batch", "lr", "weight_decay", "warmup", "clip", "precision", "head")
    fields += ("smoothing", "mixup", "cutmix", "drop_path", "l2sp_form")
    key = [start.state_dict(), data.train.fingerprint, data.val.fingerprint, name]
    recipe = {f: getattr(config, f) for f in fields}
    key += [clip.key, seed, recipe]
    path = common.cache_path(config, f"best {name}", key)
    if config.resume:
        best |= common.read_cache(path) or {}

    def probe(done):
        if done == 0 or done % per_epoch:
            return
        right = [
            (out[""][1].argmax(1) == y).double()
            for _, y, out in common.forward(config, {"": model}, data.val, clip)
        ]
        accuracy = torch.cat(right).mean().item()
        if accuracy > best["accuracy"]:  # of equals the earlier
            state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best.update(accuracy=accuracy, epoch=done // per_epoch, model=state)
            common.try_write(path, lambda file: torch.save(best, file))

    mix = mixing(config, len(data.classes))

    def loss_of(images, labels):
        rows = len(labels)
        whole, targets = mix(common.gather(images, rows), common.gather(labels))
        part = common.own(whole, rows)
        images = part if rows else images  # none: a black image
        logits = common.gather(model(images)[1], rows)
        return F.cross_entropy(logits, targets, label_smoothing=config.smoothing)

    said = f"{name}, seed {seed}"
    options = {"optimiser": optimiser, "loss_of": loss_of, "probe": probe, "also": recipe}
    common.fine_tune(config, said, model, data.train, clip, config.lr, seed, **options)
    if "model" not in best:
        raise common.InputError(f"{said}: trained, but {path} is gone; run again with --no-resume")
    model.load_state_dict(best["model"])
    share = f"{100 * best['accuracy']:.1f} % on ID val"
    print(f"{said}: {share} after epoch {best['epoch']} of {config.epochs}")
    return model.eval()


def mixing(config, classes):
    """(images, labels) -> mixed images, targets: Mixup or CutMix, whichever a coin says."""
    from torchvision.transforms import v2

    given = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in given if alpha]
    choose = v2.RandomChoice(mixes) if mixes else None

    def mix(images, labels):
        if choose is None:
            return images, labels
        common.same_random_numbers()
        return choose(images, labels)

    return mix


def add_drop_path(visual, rate):
    """Stochastic depth on the residual branches, from 0 at the first block to `rate` at the last.

    Differs (S5): it takes the place of open_clip's layer scale, which CLIP's own towers do not use.
    """
    if not rate:
        return
    from timm.layers import DropPath

    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    for i, block in enumerate(blocks):
        for name in ("ls_1", "ls_2"):
            if isinstance(getattr(block, name), torch.nn.Identity):
                path = DropPath(rate * i / max(1, len(blocks) - 1)).train(block.training)
                setattr(block, name, path)
    if not blocks:
        print("drop-path: this image tower has no residual attention blocks; trained without")


# --- evaluate -------------------------------------------------------------------------------------


def deviation(model, start):
    """{parameter: ||theta_T - theta_0||}, in network order."""
    start = dict(start.named_parameters())
    return {
        n: (p - start[n].to(p.device)).double().norm().item() for n, p in model.named_parameters()
    }


def evaluate(config, data, clip, start, model, row):
    """Fill row with {"right": {split: bool [N]}}, "val" (accuracy) and "deviation" of a model."""
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    right = {n: common.predict(config, {"": model}, s, clip)[""].right for n, s in splits.items()}
    val = right.pop("val").double().mean().item()
    layers = deviation(model, start)
    return row | {"right": right, "val": val, "layers": layers, "ours": True}


def by_val(rows, method, name):
    """Rows named `name`: of every run of `method`, the strength that is best on ID val; of equals
    the first, as strengths grow.
    """
    chosen = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        own = [r for r in rows if r["family"] == method and r["seed"] == seed]
        best = max(own, key=lambda r: r["val"])
        chosen.append({**best, "method": name, "choice": best["strength"]})
    return chosen


def total(row):
    return math.sqrt(sum(x * x for x in row["layers"].values()))


def print_table(config, rows, chosen):
    """Accuracies of all runs, then of the strengths that ID val chose; and the deviation."""
    splits, lines = list(rows[0]["right"]), []
    for method in dict.fromkeys(r["method"] for r in (*rows, *chosen)):
        own = [r for r in (*rows, *chosen) if r["method"] == method]
        mean = common.accuracies(own, method)
        numbers = [f"{x:.1f}" for x in (*mean.values(), common.mean_shift(mean))]
        picked = " ".join(dict.fromkeys(f"{r['choice']:g}" for r in own if r["choice"]))
        lines.append([method, *numbers, f"{fmean([total(r) for r in own]):.2f}", picked])
    runs = f"mean of {config.seeds} run{'s' * (config.seeds > 1)}"
    title = f"accuracy in %, {runs}; deviation ||theta_T - theta_0||; strength chosen on ID val"
    header = ["method", *splits, "avg shift", "deviation", "chosen"]
    print("\n" + common.table(header, lines, title))
    if config.model.startswith("ViT-B"):
        print("The paper's own tables are not available to us, but for its best ImageNet accuracy.")


def figure(config, rows):
    """ID and shift accuracy over the strengths (Tab. 2 as a curve); deviation by layer."""
    fig, ((left, right),) = common.new_figure(columns=2)
    numbers = []
    for family, colour in zip(FAMILIES, ("0.4", "tab:blue", "tab:pink", "tab:orange"), strict=True):
        names = dict.fromkeys(r["method"] for r in rows if r["family"] == family)
        points = []
        for name in names:
            mean = common.accuracies(rows, name)
            points.append((next(iter(mean.values())), common.mean_shift(mean)))
            strength = next(r["strength"] for r in rows if r["method"] == name)
            numbers.append(("a", name, *points[-1]))
            if strength is not None:
                where = {"textcoords": "offset points", "fontsize": 7, "color": colour}
                left.annotate(f"{strength:g}", points[-1], (4, 3), **where)
        if family == "Zero-shot":  # so far left of the others that only its height is drawn
            label = f"Zero-shot, at ID {points[0][0]:.1f}"
            left.axhline(points[0][1], ls=":", color=colour, label=label)
        elif points:
            left.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=family)
        one = [r["layers"] for r in rows if r["method"] in (family, f"{family} 1", f"{family} 10")]
        if one and family != "Zero-shot":
            layers = {n: fmean([x[n] for x in one]) for n in one[0] if n.endswith("weight")}
            name = next(n for n in (f"{family} 10", f"{family} 1", family) if n in names)
            right.plot(list(layers.values()), "o-", ms=3, color=colour, label=name)
            numbers += [("b", f"{name}: {n}", i, x) for i, (n, x) in enumerate(layers.items())]
    left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    left.set_title("by strength")
    right.set(xlabel="weight tensor, in network order", ylabel="deviation")
    right.set_title("how far each tensor went")
    left.legend()
    right.legend()
    common.save_figure(fig, f"{config.out}/figures/spd", ["panel", "series", "x", "y"], numbers)


def summary(rows):
    """Three sentences on the table, computed from it."""
    say = "{:+.2f} [{:+.2f}, {:+.2f}]".format
    methods = dict.fromkeys(r["method"] for r in rows)
    ours = "Adam-SPD, by ID val"
    if ours not in methods or "AdamW" not in methods:
        return
    own, shift = common.gain(rows, "AdamW", "Zero-shot")
    print(f"\n1. AdamW less zero-shot: {say(*own)} points on ID, {say(*shift)} in the mean under")
    print(f"   shift (95 % intervals over {common.sampled(rows)}).")
    own, shift = common.gain(rows, ours, "AdamW")
    print(f"2. Adam-SPD, its strength chosen on ID val, less AdamW: {say(*own)} on ID,")
    print(f"   {say(*shift)} under shift.")
    if "L2-SP, by ID val" in methods:
        own, shift = common.gain(rows, ours, "L2-SP, by ID val")
        print(f"3. Less L2-SP, chosen the same way: {say(*own)} on ID, {say(*shift)} under shift.")


# --- main -----------------------------------------------------------------------------------------


def prepare(argv):
    """Command line -> config, data, Clip, zero-shot Classifier."""
    config, data = common.begin(Config, argv, __doc__, PRESETS, open_data)
    recipes(config)  # refuses what it does not know, before any work
    return config, data, *common.zero_shot(config, data)


prepared = functools.cache(prepare)  # once in every process of `together`


def one_run(config, data, clip, zero_shot, name, seed):
    """Result row of a method: trained, unless it is zero-shot, and evaluated."""
    plan = {"Zero-shot": ("Zero-shot", None, None)} | recipes(config)
    family, strength, make = plan[name]
    model = train(config, name, data, clip, zero_shot, make, seed) if make else zero_shot
    row = {"method": name, "family": family, "strength": strength, "choice": None, "seed": seed}
    return evaluate(config, data, clip, zero_shot, model, row)


def work(argv, run):
    """`one_run` in a process of its own."""
    return one_run(*prepared(argv), *run)


def main(argv=None):
    argv = tuple(sys.argv[1:] if argv is None else argv)
    config, data, clip, zero_shot = prepare(argv)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [(name, seed) for seed in seeds for name in ("Zero-shot", *recipes(config))]
    if common.apart(config):
        rows = common.together(work, config.jobs, argv, runs)
    else:
        rows = [one_run(config, data, clip, zero_shot, *run) for run in runs]
    chosen = []
    for family in ("L2-SP", "Adam-SPD"):
        if any(r["family"] == family for r in rows):
            chosen += by_val(rows, family, f"{family}, by ID val")
    common.write_results(config, zero_shot.head.weight.device, rows + chosen)
    print_table(config, rows, chosen)
    if data.shifts:
        figure(config, rows)
        summary(rows + chosen)
    return rows + chosen


if __name__ == "__main__":
    common.run(main)
