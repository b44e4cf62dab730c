"""SPD: Rethinking Weight Decay for Robust Fine-Tuning of Foundation Models.
Tian, Huang, Kira; NeurIPS 2024; arXiv 2411.01713.

Fine-tuning with Adam drifts far from the pre-trained weights and loses robustness; pulling every
layer back at every step (L2-SP) under-fits. Selective projection decay (SPD) pulls a layer back
only at steps where the gradient says that the layer has gone too far (c_t < 0). How far is set by
how much the step would enlarge the deviation (r_t): with strength 1 the layer is projected back to
the radius that it had before the step.

    Sec. 3    Eq. 3   condition c_t              condition
              Eq. 4   the projection             project
              Eq. 9   deviation ratio r_t        deviation_ratio
              Alg. 2  Adam with SPD              spd_step, AdamSPD
              Eq. 1   L2-SP in the loss          lab/spd_ablations.py
              Eq. 2   L2-SP in the step          pull
              Alg. 1  Adam with L2-SP            AdamL2SP
    Sec. 4    image classification               main

    python spd.py                       # embedded digits, 3 minutes; SPD: ID 94, shifts 70
    python spd.py --condition both      # the same, and Alg. 2's condition beside it; 4 minutes
    python spd.py --data /imagenet      # CLIP ViT-B/16; not measured by us
    python spd.py --data /domainnet/real

The first half of this file, down to the double line, is the method and the optimiser. It needs
nothing but torch: copy the file into another project and import AdamSPD there. If csrc/ is copied
with it, large models use the compiled kernel, which gives the same weights up to rounding.

Differs from the paper (P) or the authors' code (C):
S1  The strength is spd_lambda and never weight_decay, as it is called in C: the values that people
    use for AdamW, 0.01 to 0.1, are SPD switched off. weight_decay here is AdamW's, 0 unless given.
S2  Anchors belong to parameters, not to groups: any iterable and the groups of timm and Hugging
    Face work. New layers are anchored at their start, as C's manual says; "none" leaves them free.
S3  Eq. 9 is computed without a difference of norms, which would lose a small r_t in fp32.
S4  In P's Alg. 2 the condition accumulates: c_t = c_{t-1} - g_t . (theta_{t-1} - theta_0). In C,
    and in Eq. 3 as three of its readers quote it, it is that of the step alone. Which of them P's
    tables were run with is not known. condition="code" is the default: it is the one that has been
    released, and it needs no history, so that a late gradient cannot be outvoted by early ones and
    a run continued from weights alone is the same method. "paper" is Alg. 2's.
S5  open_clip's towers have no drop-path. It is put in at their residual branches.
S6  P leaves DomainNet's infograph out, and so does main.
S7  P's recipe for ImageNet is not known; main has that of a run that its group published. Its
    warm-up begins at 1e-6, ours at 0; its rate changes by epoch, ours by step.
S8  ImageNet-A and -R have 200 classes. The group's published numbers choose among all 1000, ours
    among the 200 as in the other scripts; a second table has theirs.
"""

import copy
import difflib
import functools
import math
import random
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent

# --- method ---------------------------------------------------------------------------------------


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


def squared_deviations(before, after, anchor):
    """S2 = gamma_{t-1}^2 and S3 = gamma_t^2 - gamma_{t-1}^2, gamma = ||theta - theta_0||, fp64.

    With D = theta_{t-1} - theta_0 and u = theta~_t - theta_{t-1}, S3 = sum u (2 D + u). Differs
    (S3): the difference of the norms themselves would lose all digits of a small r_t in fp32.
    """
    distance, update = before.double() - anchor.double(), after.double() - before.double()
    terms = distance * distance, update * (2 * distance + update)
    return [whole(x.sum()) for x in terms]


def deviation_ratio(s2, s3):
    """Eq. (9): r_t = max(0, gamma_t - gamma_{t-1}) / gamma_t, of S2 and S3.  2 x [...] -> [...]"""
    previous, current = s2.sqrt(), (s2 + s3).sqrt()
    return torch.where(s3 > 0, s3 / (current * (current + previous)), 0.0)


def adam(before, grad, exp_avg, exp_avg_sq, step, lr, betas, eps):
    """theta~_t: torch.optim.Adam's step without decay; moments updated in place.  -> [...]"""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    return before.addcdiv(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))


@torch.no_grad()
def spd_step(params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, spd_lambda,
             conditions=None, sums=None):  # fmt: skip
    """Alg. 2: one step of Adam with SPD on lists of T tensors, in place. An anchor of None is 0.

    step is 1 at the first. conditions: [T] fp64, the c_{t-1} of Alg. 2, which become c_t; with None
    c_t is that of this step alone. Differs (S4). sums: [T, 3] fp64, receives S1 = g . D = -c_t of
    the step alone, and S2 and S3. csrc's kernel has this name and this signature.
    """
    lists = zip(params, anchors, grads, exp_avgs, exp_avg_sqs, strict=True)
    for i, (before, anchor, grad, exp_avg, exp_avg_sq) in enumerate(lists):
        anchor = origin(before) if anchor is None else anchor
        after = adam(before, grad, exp_avg, exp_avg_sq, step, lr, betas, eps)
        c = condition(grad, before, anchor)
        s2, s3 = squared_deviations(before, after, anchor)
        if sums is not None:
            sums[i] = torch.stack([-c, s2, s3])
        if conditions is not None:
            c = conditions[i].add_(c)
        before.copy_(project(after, anchor, c, deviation_ratio(s2, s3), spd_lambda))


@torch.no_grad()
def spd_step_foreach(params, anchors, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps,
                     spd_lambda, conditions=None, sums=None):  # fmt: skip
    """`spd_step` by operations on whole lists: fewer launches, for 20 more bytes a parameter.

    Anchors are all given or all None. The terms of the three sums are in the weights' type and
    added in fp64, so the sign of c_t can differ from the loop's below 1e-6 ||g|| ||D||.
    """
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - betas[1] ** step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    size = lr / (1 - betas[0] ** step)
    after = torch._foreach_addcdiv(params, exp_avgs, denominators, -size)
    del denominators
    zero = anchors[0] is None
    distances = params if zero else torch._foreach_sub(params, anchors)
    updates = torch._foreach_sub(after, params)
    s1, s2 = dots(grads, distances), dots(distances, distances)
    s3 = dots(updates, torch._foreach_add(updates, distances, alpha=2))
    if sums is not None:
        sums.copy_(torch.stack([s1, s2, s3], 1))
    c = -s1 if conditions is None else conditions.sub_(s1)
    amount = torch.where(c < 0, spd_lambda * deviation_ratio(s2, s3), 0.0).to(params[0].dtype)
    back = after if zero else torch._foreach_sub(after, anchors)
    torch._foreach_sub_(after, torch._foreach_mul(back, list(amount.unbind())))
    torch._foreach_copy_(params, after)


def dots(a, b):
    """Sums of the products of two lists of tensors, added in fp64.  -> [T]"""
    return torch.stack([x.sum(dtype=torch.float64) for x in torch._foreach_mul(a, b)])


def origin(weight):
    """The zero anchor of a weight: one number, but for sharded weights, which need their layout."""
    return torch.zeros_like(weight) if hasattr(weight, "placements") else weight.new_zeros(())


def whole(sum_of_part):
    """A sum over sharded weights (FSDP), of all parts; any other as it is.  [] -> []"""
    return sum_of_part.full_tensor() if hasattr(sum_of_part, "full_tensor") else sum_of_part


# --- optimiser ------------------------------------------------------------------------------------


class AdamSPD(torch.optim.Optimizer):
    """Alg. 2: Adam with selective projection decay, per parameter tensor. Options, of every group:

    spd_lambda   lambda of Eq. (4). It is no weight decay: 1 is the value to try first, and 0.1 does
                 next to nothing. On a smooth loss without noise SPD is Adam whatever the strength,
                 by design; `report` says what it did.
    anchor       theta_0. "pretrained": the weights at the moment when the group is added; the state
                 keeps them (4 bytes a parameter). "zero": the origin, for PEFT. "none": plain Adam.
    condition    "code": of each step alone, as the authors' code; "paper": accumulated (S4).
    weight_decay AdamW's, towards 0, taken off before the step. 0 is SPD as published.
    master       fp16 and bf16 weights have a copy in fp32, and the steps change that one: otherwise
                 they lose every change that is smaller than their grid.
    fused        the compiled kernel. None: where csrc/ is there and the tensors of a step have a
                 million elements or more, since for less its build would not pay. True: insist.
    foreach      `spd_step_foreach`, not for sharded or half weights. None: on a GPU without kernel.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, spd_lambda=1.0,
                 anchor="pretrained", condition="code", weight_decay=0.0, master=False,
                 fused=None, foreach=None):  # fmt: skip
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, spd_lambda=spd_lambda, anchor=anchor)
        defaults |= dict(condition=condition, weight_decay=weight_decay, master=master)
        super().__init__(params, defaults | dict(fused=fused, foreach=foreach))

    def add_param_group(self, group):
        check_options(self, group)
        super().add_param_group(group)
        group = self.param_groups[-1]
        if any(hasattr(param, "_fsdp_flattened") for param in group["params"]):
            raise ValueError("AdamSPD: FSDP1's flat parameters mix layers; use fully_shard")
        for param in group["params"]:  # a frozen one begins when it is trained
            begun = param.requires_grad
            self.state[param] = self._begin(param, group) if begun else {"frozen": True}

    def _begin(self, param, group):
        """The state of a parameter whose pre-trained weights are those that it has now."""
        state, numbers = {"step": 0}, {"dtype": torch.float64, "device": param.device}
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["fired"] = torch.zeros(2, **numbers)  # number of projections, sum of their r_t
        if group["anchor"] == "pretrained":
            state["anchor"] = param.detach().clone()
        if group["condition"] == "paper":
            state["condition"] = torch.zeros((), **numbers)
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            together = {}  # tensors that one call can take
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    state = self._ready(param, group)
                    key = param.device, param.dtype, "master" in state, state["step"]
                    together.setdefault(key, []).append(param)
            for params in together.values():
                self._step(params, group)
        return loss

    def _ready(self, param, group):
        """The state of a parameter that has a gradient, on its device and in its type."""
        if "frozen" in self.state[param]:
            self.state[param] = self._begin(param, group)
        state = self.state[param]
        if "step" not in state or (group["anchor"] == "pretrained" and "anchor" not in state):
            raise ValueError("AdamSPD: the state was reset, and with it the anchors are lost")
        if "anchor" in state and state["anchor"]._version:  # PyTorch counts what writes to it
            raise ValueError("AdamSPD: something wrote to the anchors in the state, perhaps zeros")
        if group["master"] and param.dtype in (torch.float16, torch.bfloat16):
            state.setdefault("master", param.detach().float())
        wide = state.get("master", param).dtype
        for name in set(state) - {"step"}:  # the model may have moved
            dtype = torch.float64 if name in ("condition", "fired") else wide
            state[name] = state[name].to(param.device, dtype)
        return state

    def _step(self, params, group):
        """One step of parameters of one device, type and step count."""
        states = [self.state[p] for p in params]
        anchors, step = [s.get("anchor") for s in states], states[0]["step"] + 1
        weights = [s.get("master", p) for s, p in zip(states, params, strict=True)]
        grads = [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True)]
        if step == 1 and group["anchor"] == "pretrained":  # this waits for the device
            if any(whole((w != a).sum()) for w, a in zip(weights, anchors, strict=True)):
                problem = "the weights are no longer those it was made of, which are the anchors"
                warnings.warn(f"AdamSPD: {problem}; load weights first", stacklevel=5)
        if group["weight_decay"]:
            for weight in weights:
                weight.mul_(1 - float(group["lr"]) * group["weight_decay"])
        if group["anchor"] == "none":
            group = group | {"spd_lambda": 0.0}
        kept, conditions = [s["condition"] for s in states if "condition" in s], None
        if group["condition"] == "paper":
            conditions = torch.stack(kept)
        sums = torch.zeros(len(params), 3, dtype=torch.float64, device=weights[0].device)
        moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.update((weights, anchors, grads, *moments), step, group, conditions, sums)
        if conditions is not None:
            torch._foreach_copy_(kept, list(conditions.unbind()))
        counts = projections(-sums[:, 0] if conditions is None else conditions, sums)
        torch._foreach_add_([s["fired"] for s in states], list(counts.unbind()))
        for state, param in zip(states, params, strict=True):
            state["step"] = step
            if "master" in state:
                param.copy_(state["master"])

    def update(self, tensors, step, group, conditions, sums):
        """`spd_step` of the five lists `tensors`. A subclass has another rule here."""
        options = float(group["lr"]), group["betas"], group["eps"], group["spd_lambda"]
        fastest(tensors, group)(*tensors, step, *options, conditions, sums)

    def report(self):
        """What the strength did until now, over all tensors with an anchor and all their steps:
        {"fired": share that was projected (c_t < 0 < r_t), "mean_r": mean r_t of those, "decay":
        mean of lambda r_t over all}. fired 0: it was Adam. {} before the first step.

        Counting costs a step no wait for the device; this call waits.
        """
        steps = fired = ratios = decay = 0.0
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if self.state[p].get("step")]
            for state in states if group["anchor"] != "none" else ():
                count, ratio = state["fired"].tolist()
                steps, fired, ratios = steps + state["step"], fired + count, ratios + ratio
                decay += group["spd_lambda"] * ratio
        if not steps:
            return {}
        return {"fired": fired / steps, "mean_r": ratios / max(fired, 1), "decay": decay / steps}

    def load_state_dict(self, state_dict):
        """torch's. The anchors are the file's: a resumed run is never anchored anew."""
        if not all("anchor" in group for group in state_dict["param_groups"]):
            raise ValueError("AdamSPD: this is another optimiser's state, which has no anchors")
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for param, i in zip(params, ids, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if torch.is_tensor(value):  # in its own type: torch has given it the parameter's
                    self.state[param][name] = value.to(param.device).data

    def __setstate__(self, state):
        """torch's, which loads and copies. `.data`: the count of writes to it begins anew."""
        super().__setstate__(state)
        for kept in self.state.values():
            if "anchor" in kept:
                kept["anchor"] = kept["anchor"].data


def projections(c, sums):
    """For `report`: whether a tensor was projected, 0 or 1, and its r_t if it was.  -> [T, 2]"""
    r = deviation_ratio(sums[:, 1], sums[:, 2])
    fired = (c < 0) & (r > 0)
    return torch.stack([fired.double(), torch.where(fired, r, 0.0)], 1)


def check_options(optimiser, group):
    """Raises ValueError for options of a group that cannot be meant, and warns of unlikely ones."""
    options, problem = {**optimiser.defaults, **group}, ""
    for name in set(group) - set(optimiser.defaults):  # timm and others add their own
        near = difflib.get_close_matches(name, optimiser.defaults, 1, cutoff=0.85)
        if near := ["spd_lambda"] if "lambda" in name else near:
            problem = f"there is no option {name!r}; did you mean {near[0]!r}?"
    choices = {"anchor": ("pretrained", "zero", "none"), "condition": ("code", "paper")}
    for name, known in choices.items():
        if options[name] not in known:
            problem = f"{name} must be one of {known}, got {options[name]!r}"
    for name in ("lr", "eps", "spd_lambda", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            problem = f"{name} must be 0 or more and finite, got {options[name]}"
    if problem:
        raise ValueError(f"AdamSPD: {problem}")
    if type(optimiser) is AdamSPD and 0 < options["spd_lambda"] <= 0.1:  # Differs (S1)
        problem = f"spd_lambda {options['spd_lambda']} does next to nothing; it is no weight decay"
    elif options["weight_decay"] >= 0.5:
        problem = f"weight_decay {options['weight_decay']} pulls towards 0; SPD's is spd_lambda"
    if problem:
        warnings.warn(f"AdamSPD: {problem}: try spd_lambda 1", stacklevel=5)


def fastest(tensors, group):
    """What makes the step of these lists: the kernel, `spd_step_foreach` or `spd_step`."""
    fused, foreach, weights = group["fused"], group["foreach"], tensors[0]
    device, dtype = weights[0].device.type, weights[0].dtype
    sharded = any(hasattr(weight, "placements") for weight in weights)
    plain = dtype in (torch.float32, torch.float64) and not sharded
    if plain and fused is not False and not foreach:
        contiguous = all(t.is_contiguous() for column in tensors for t in column if t is not None)
        large = fused or sum(w.numel() for w in weights) >= 1_000_000
        kernels = compiled() if contiguous and large else None
        if kernels and device in kernels.devices and (device == "cpu" or dtype == torch.float32):
            return kernels.spd_step
    if fused:
        raise ValueError("AdamSPD: fused=True needs csrc/, a compiler and contiguous fp32 weights")
    if plain and (foreach or (foreach is None and device == "cuda")):
        return spd_step_foreach
    return spd_step


def compiled():
    """The kernels of csrc/, where that folder lies beside this file and can be built; else None."""
    if not (HERE / "csrc" / "spd_step.cpp").is_file():
        return None
    from csrc import build

    return build.load()


def param_groups(model, special=None):
    """Groups of a model's trainable parameters: {prefix of names: options}, the first that fits.

    AdamSPD(param_groups(model, {"head.": {"anchor": "none"}, "visual.": {"spd_lambda": 0.5}}))
    What torch.compile and DataParallel put before the names may be left out of a prefix.
    """
    special, groups = special or {}, {}
    for name, param in model.named_parameters():
        bare = name.replace("_orig_mod.", "").removeprefix("module.")
        fits = (p for p in special if name.startswith(p) or bare.startswith(p))
        if param.requires_grad:
            prefix = next(fits, "")
            groups.setdefault(prefix, {**special.get(prefix, {}), "params": []})
            groups[prefix]["params"].append(param)
    if unused := set(special) - set(groups):
        first = next(iter(dict(model.named_parameters())))
        problem = f"no trainable parameter begins with {sorted(unused)[0]!r}"
        raise ValueError(f"param_groups: {problem}; the names are as {first!r}")
    return list(groups.values())


# ==================================================================================================
# Here AdamSPD ends, and the experiment begins.
# ==================================================================================================

if (HERE / "vrf.py").is_file():
    import common
else:  # a copy in another project, whose common.py is none of ours: only AdamSPD is of use there
    common = SimpleNamespace(Run=object, arg=lambda default, *_, **__: default)

# --- L2-SP, to compare with -----------------------------------------------------------------------


def pull(after, anchor, amount):
    """Eq. (2), decoupled L2-SP: theta_t = theta~_t - amount (theta~_t - theta_0), amount = lr
    lambda. Unconditional, and the same for every layer.  [...] -> [...]
    """
    return torch.lerp(after, anchor.expand_as(after), amount)


class AdamL2SP(AdamSPD):
    """Alg. 1: Adam with L2-SP. Its strength is called spd_lambda, too."""

    def update(self, tensors, step, group, conditions, sums):
        lr, adam_options = float(group["lr"]), (group["betas"], group["eps"])
        for before, anchor, *rest in zip(*tensors, strict=True):
            anchor = origin(before) if anchor is None else anchor
            after = adam(before, *rest, step, lr, *adam_options)
            before.copy_(pull(after, anchor, lr * group["spd_lambda"]))

    def report(self):
        return {}  # it always pulls


# --- settings -------------------------------------------------------------------------------------

METHODS = ("AdamW", "L2-SP", "Adam-SPD")
CONDITIONS = {"Adam-SPD": "code", "Adam-SPD (sum)": "paper"}  # of the rows that begin so (S4)
PRESETS = {
    # as vrf.py's, where the rates come from, with fewer epochs and no mixing of digits
    "digits": dict(epochs=5, batch=64, lr=2e-4, warmup=24, mixup=0.0, cutmix=0.0, drop_path=0.0),
    # the group's vanilla run (S7): 5 epochs of warm-up, the rate ends at 1e-5, nothing is clipped
    "imagenet": dict(warmup=12_260, lr_end=0.5, clip=0.0, augment="deit"),
}


@dataclass
class Config(common.Run):
    data: str = common.arg("digits", "digits; folder: ImageNet, CIFAR-10, DomainNet, train/ val/")
    model: str = common.arg("ViT-B-16", "open_clip architecture; the paper says CLIP ViT-Base")
    methods: str = common.arg("AdamW,L2-SP,Adam-SPD", "what to train, comma-separated")
    spd_lambda: str = common.arg("0.25,0.5,1,2", "strengths of Adam-SPD; Tab. 1 has 1")
    l2sp: str = common.arg("10,30,100", "strengths of L2-SP; ours")
    condition: str = common.arg(
        "code", "code: of each step alone; paper: their sum (S4)", "code paper both"
    )
    head: str = common.arg("pretrained", "anchor of the classifier (S2)", "pretrained none")
    epochs: int = common.arg(30, "DomainNet, Tab. 2, and ImageNet; 60 in Tab. 1", least=1)
    batch: int = common.arg(512, "the group's on ImageNet, 2 x 256", least=1)
    lr: float = common.arg(2e-5, "DomainNet and ImageNet")
    lr_end: float = common.arg(0.0, "share of the rate that the cosine ends at", most=1)
    weight_decay: float = common.arg(0.1, "of AdamW alone; listed for all runs")
    warmup: int = common.arg(500, "steps of linear warm-up; ours, of ImageNet the group's")
    clip: float = common.arg(1.0, "largest gradient norm; ours")
    smoothing: float = common.arg(0.1, "label smoothing, all runs", most=1)
    mixup: float = common.arg(0.8, "all runs; needs an even batch")
    cutmix: float = common.arg(1.0, "all runs")
    drop_path: float = common.arg(0.2, "all runs (S5)", most=1)
    augment: str = common.arg("crop", "deit: RandAugment, too (S7)", "crop deit")
    jobs: int = common.arg(2, "runs at a time, each in a process of its own; 1 on a GPU", least=1)
    out: str = common.arg("runs/spd", "folder for checkpoints, caches, results, figures")


# --- train / prepare ------------------------------------------------------------------------------


def open_data(config):
    """common's, without DomainNet's infograph, which the paper leaves out. Differs (S6)."""
    data = common.open_data(config.data, config.val_fraction, config.selection, config.seed)
    data.shifts = [s for s in data.shifts if (data.kind, s.name) != ("domainnet", "Infograph")]
    data.missing = [name for name in data.missing if not name.startswith("infograph")]
    return data


def recipes(config):
    """{row: (method, strength)} of what is to be trained, in the table's order."""
    wanted = common.choose(config.methods, METHODS, "--methods")
    rows = {"AdamW": ("AdamW", None)}
    for strength in common.numbers(config.l2sp, "--l2sp"):
        rows[f"L2-SP {strength:g}"] = "L2-SP", strength
    for method, condition in CONDITIONS.items():
        if config.condition in (condition, "both"):
            for strength in common.numbers(config.spd_lambda, "--spd-lambda"):
                rows[f"{method} {strength:g}"] = method, strength
    return {name: row for name, row in rows.items() if row[0].split(" ")[0] in wanted}


def optimiser_of(config, method, strength, model):
    """The optimiser of a recipe for a Classifier."""
    if method == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    groups = param_groups(model, {"head.": {"anchor": "none"}} if config.head == "none" else {})
    if method == "L2-SP":
        return AdamL2SP(groups, lr=config.lr, spd_lambda=strength)
    return AdamSPD(groups, lr=config.lr, spd_lambda=strength, condition=CONDITIONS[method])


def train(config, name, data, clip, start, make_optimiser, key):
    """The fine-tuned copy of Classifier `start`, as it was after the epoch of highest accuracy on
    ID val (Sec. 4), of equals the first. make_optimiser: model -> optimiser; key: what else shapes
    the run. The best model so far is kept beside the checkpoint, so that a run can continue.
    """
    return train_and_report(config, name, data, clip, start, make_optimiser, key)[0]


def train_and_report(config, name, data, clip, start, make_optimiser, key):
    """`train`'s model, and what its AdamSPD did in the whole training (`AdamSPD.report`)."""
    model = copy.deepcopy(start)
    add_drop_path(model.visual, config.drop_path)
    optimiser = make_optimiser(model)
    training = training_of(config, name, model, data, clip, optimiser, key)
    key = [training.path.name, common.fingerprint(data.val)]
    path = common.cache_path(config, f"best {name}", key)
    best = (common.read_cache(path) if config.resume else None) or {"accuracy": -1.0}
    for done in common.train_steps(config, training):
        if done == 0 or done % training.per_epoch:
            continue
        found = common.forward_all(config, {"": model}, data.val, clip)[""]
        accuracy = common.accuracy(found["logits"], found["labels"])
        if accuracy > best["accuracy"]:
            state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best = {"accuracy": accuracy, "epoch": done // training.per_epoch, "model": state}
        best["report"] = getattr(optimiser, "report", dict)()  # AdamW has none
        common.write_file(path, functools.partial(torch.save, best))
    if "model" not in best:
        raise common.InputError(f"{path} is gone; run again with --no-resume")
    model.load_state_dict(best["model"])
    share = f"{100 * best['accuracy']:.1f} % on ID val"
    print(f"{training.name}: {share} after epoch {best['epoch']} of {config.epochs}")
    return model.eval(), best["report"]


def training_of(config, name, model, data, clip, optimiser, key):
    """The common.Training of an optimiser by the paper's recipe, which is DeiT's (Sec. 4)."""
    mix = mixing(config, len(data.classes))

    def loss_fn(images, labels):
        mixed, targets = common.gather(images), common.gather(labels)
        if mix:
            torch.set_rng_state(common.broadcast(torch.get_rng_state()))  # one draw for all ranks
            mixed, targets = mix(mixed, targets)
        logits = common.gather(model(common.local_rows(mixed, images))[1])
        return F.cross_entropy(logits, targets, label_smoothing=config.smoothing)

    fields = "smoothing", "mixup", "cutmix", "drop_path", "augment", "lr_end"
    key = key | {field: getattr(config, field) for field in fields}
    if config.augment == "deit":
        clip = replace(clip, augment=augmentation(clip))
    training = common.image_training(config, name, model, data.train, clip, loss_fn, optimiser, key)
    if config.lr_end:
        training.schedule = functools.partial(schedule, config.lr_end)
    return training


def schedule(end, step, warmup, steps):
    """common's factor on the rate, but that the cosine ends at `end`. Differs (S7)."""
    factor = common.warmup_cosine(step, warmup, steps)
    return factor if step < warmup else end + (1 - end) * factor


def mixing(config, classes):
    """(images, labels) -> mixed images, targets: Mixup or CutMix, whichever a coin says."""
    from torchvision.transforms import v2

    pairs = (v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)
    mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in pairs if alpha]
    return v2.RandomChoice(mixes) if mixes else None


def augmentation(clip):
    """DeiT's transform by timm: crops of 8 to 100 % of the area, flips, RandAugment. In presence of
    the last timm leaves the colour jitter out, which the group's arguments list, too.
    """
    from timm.data import create_transform

    options = dict(is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
    transform = create_transform(clip.size, mean=clip.mean, std=clip.std, **options)
    transform.transforms.insert(0, seed_other_generators)
    return transform


def seed_other_generators(image):
    """timm draws from Python's and NumPy's, and data/images.py seeds PyTorch's for each image."""
    import numpy as np

    seed = int(torch.randint(2**31, ()))
    random.seed(seed)
    np.random.seed(seed)
    return image


def add_drop_path(visual, rate):
    """Stochastic depth on the residual branches, from 0 at the first block to `rate` at the last.

    Differs (S5): it takes the place of open_clip's layer scale, which CLIP's own towers do not use.
    """
    if not rate:
        return
    from timm.layers import DropPath

    blocks = getattr(getattr(visual, "transformer", None), "resblocks", [])
    if not blocks:
        print("drop-path: this image tower has no residual attention blocks; trained without")
    for i, block in enumerate(blocks):
        for name in ("ls_1", "ls_2"):
            if isinstance(getattr(block, name), torch.nn.Identity):
                setattr(block, name, DropPath(rate * i / max(1, len(blocks) - 1)))


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(config, data, clip, start, model, name, **numbers):
    """The Row of a model, with its accuracy on ID val and its deviation ||theta_T - theta_0||.

    `right` is among a set's own classes, as ImageNet-A and -R have 200; tensors["all classes"] has
    the same among all that the model knows, as the group's published numbers. Differs (S8).
    """
    right, among_all = {}, {}
    splits = {"val": data.val} | {s.name: s for s in (data.test, *data.shifts)}
    for split_name, split in splits.items():
        whole = replace(split, groups=None) if split.groups else split
        found = common.predict(config, {"": model}, whole, clip)[""]
        own = common.project(found.logits, split.groups).argmax(1)
        right[split_name] = own == found.labels
        among_all[split_name] = right_among_all(found.logits, found.labels, split.groups)
    numbers["val"] = right.pop("val").double().mean().item()
    del among_all["val"]
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    squares = [(p - q.to(p.device)).double().square().sum().item() for p, q in pairs]
    numbers["deviation"] = math.sqrt(sum(squares))
    tensors = {"all classes": among_all}
    return common.Row(name, config.seed, right, ours=True, numbers=numbers, tensors=tensors)


def right_among_all(logits, labels, groups):
    """Whether the largest of all logits is of the label's group.  [N, C], [N] -> bool [N]"""
    own = torch.arange(logits.shape[1]) if groups is None else torch.full((logits.shape[1],), -1)
    for i, ids in enumerate(groups or ()):
        own[ids] = i
    return own[logits.argmax(1)] == labels


def by_val(rows):
    """For every method and run the row whose strength is best on ID val, of equals the first."""
    chosen = []
    for method in ("L2-SP", *CONDITIONS):
        for seed in dict.fromkeys(r.seed for r in rows):
            own = [r for r in rows if r.numbers["family"] == method and r.seed == seed]
            if own:
                best = max(own, key=lambda r: r.numbers["val"])
                choice = best.numbers["strength"]
                chosen.append(replace(best, method=f"{method}, by ID val", choice=choice))
    return chosen


def print_table(config, rows, among=""):
    """Accuracies of all runs, then of the strengths that ID val chose; the deviation; and what
    AdamSPD reports.
    """
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        own = [r for r in rows if r.method == method]
        mean = common.accuracies(own, method)
        line = [f"{x:.1f}" for x in (*mean.values(), common.mean_shift(mean))]
        line.append(f"{fmean(r.numbers['deviation'] for r in own):.2f}")
        for name, form in {"fired": "{:.0%}", "mean_r": "{:.4f}", "decay": "{:.4f}"}.items():
            found = [r.numbers[name] for r in own if name in r.numbers]
            line.append(form.format(fmean(found)) if found else "")
        line.append(" ".join(dict.fromkeys(f"{r.choice:g}" for r in own if r.choice)))
        lines.append([method, *line])
    runs = f"mean of {config.seeds} run{'s' * (config.seeds > 1)}"
    title = f"accuracy in %{among}, {runs}; deviation ||theta_T - theta_0||; strength by ID val"
    header = ["method", *rows[0].right, "avg shift", "deviation", "fired", "mean r", "decay"]
    print("\n" + common.table([*header, "chosen"], lines, title))


def figure(config, rows):
    """ID and shift accuracy over the strengths: Tab. 2 as a curve for each method."""
    header = ["method", "ID", "shift"]
    with common.figure(f"{config.out}/figures/spd", header) as (axes, numbers):
        axis = axes[0, 0]
        axis.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        for family in dict.fromkeys(r.numbers["family"] for r in rows):
            own = [r for r in rows if r.numbers["family"] == family]
            names = list(dict.fromkeys(r.method for r in own))
            means = [common.accuracies(own, name) for name in names]
            x, y = [m[common.ID] for m in means], [common.mean_shift(m) for m in means]
            numbers += zip(names, x, y, strict=True)
            if family == "Zero-shot":  # so far left of the others that only its height is drawn
                axis.axhline(y[0], ls=":", color="0.4", label=f"Zero-shot, at ID {x[0]:.1f}")
                continue
            axis.plot(x, y, "o-", label=family)
            for name, *point in zip(names, x, y, strict=True):
                strength = name.removeprefix(family)
                axis.annotate(strength, point, (4, 3), textcoords="offset points", fontsize=7)
        axis.legend()


def print_gains(rows):
    """Sentences on the table, computed from it."""
    say = "{:+.2f} [{:+.2f}, {:+.2f}]".format
    ours, theirs, summed = (f"{m}, by ID val" for m in ("Adam-SPD", "L2-SP", "Adam-SPD (sum)"))
    pairs = ("AdamW", "Zero-shot"), (ours, "AdamW"), (ours, theirs), (summed, "AdamW")
    print(f"\nIn points, with 95 % intervals over {common.sampled(rows)}:")
    for i, (method, base) in enumerate((*pairs, (summed, ours)), 1):
        if {method, base} <= {r.method for r in rows}:
            own, shift = common.gain(rows, method, base)
            print(f"{i}. {method} less {base}: {say(*own)} on ID, {say(*shift)} under shift.")


# --- main -----------------------------------------------------------------------------------------


@functools.cache  # once in every process of common.in_processes
def prepared(argv):
    """Command line -> config, data, Clip, zero-shot Classifier."""
    config, data = common.setup(Config, argv, __doc__, PRESETS, open_data)
    recipes(config)  # refuses what it does not know, before any work
    return config, data, *common.zero_shot(config, data)


def one_run(argv, run):
    """Row of a method in one run: trained, unless it is zero-shot, and evaluated."""
    (name, seed), (config, data, clip, zero_shot) = run, prepared(argv)
    config, model, report = replace(config, seed=seed), zero_shot, {}
    method, strength = recipes(config).get(name, ("Zero-shot", None))
    if method != "Zero-shot":
        make, key = functools.partial(optimiser_of, config, method, strength), {"method": name}
        model, report = train_and_report(config, name, data, clip, zero_shot, make, key)
    numbers = {"family": method, "strength": strength, **report}
    return evaluate(config, data, clip, zero_shot, model, name, **numbers)


def main(argv=None):
    argv = tuple(sys.argv[1:] if argv is None else argv)
    prepared.cache_clear()  # the data may be others by now
    config, data, _, zero_shot = prepared(argv)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [(name, seed) for seed in seeds for name in ("Zero-shot", *recipes(config))]
    rows = common.in_processes(one_run, argv, runs, config.jobs, config.device)
    rows += by_val(rows)
    common.write_results(config, zero_shot.head.weight.device, rows)
    print_table(config, rows)
    if any(s.groups for s in data.shifts):
        among_all = [replace(r, right=r.tensors["all classes"]) for r in rows]
        print_table(config, among_all, " among all classes (S8)")
    if data.shifts:
        figure(config, [r for r in rows if r.choice is None])
        print_gains(rows)
    return rows


if __name__ == "__main__":
    common.run(main)
