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

Where the paper, the authors' code and this script part is marked at its line (grep Differs); the
reasons stand in docs/differences.md: S1 the strength is spd_lambda, S2 anchors belong to
parameters, new layers' too, S3 Eq. 9 without a difference of norms, S4 the condition of each step
alone or, condition="paper", the sum of Alg. 2, S5 drop-path, S6 DomainNet without infograph, S7
ImageNet's recipe, S8 ImageNet-A and -R among their own classes.
"""

import copy
import difflib
import functools
import importlib
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
    return torch.lerp(after, anchor, amount)


def squared_deviations(before, after, anchor):
    """s2 = gamma_{t-1}^2 and s3 = gamma_t^2 - gamma_{t-1}^2, gamma = ||theta - theta_0||, fp64.

    With D = theta_{t-1} - theta_0 and u = theta~_t - theta_{t-1}, s3 = sum u (2 D + u). Differs
    (S3): the difference of the norms themselves would lose all digits of a small r_t in fp32.
    """
    distance, update = before.double() - anchor.double(), after.double() - before.double()
    terms = distance * distance, update * (2 * distance + update)
    return [whole(x.sum()) for x in terms]


def deviation_ratio(s2, s3):
    """Eq. (9): r_t = max(0, gamma_t - gamma_{t-1}) / gamma_t, of s2 and s3.  2 x [...] -> [...]"""
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
    c_t is that of this step alone. Differs (S4). sums: [T, 3] fp64, receives s1 = g . D = -c_t of
    the step alone, and s2 and s3. csrc's kernel has this name and this signature.
    """
    lists = zip(params, anchors, grads, exp_avgs, exp_avg_sqs, strict=True)
    for i, (before, anchor, grad, exp_avg, exp_avg_sq) in enumerate(lists):
        anchor = torch.zeros_like(before) if anchor is None else anchor
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
    if anchors[0] is None:
        anchors = [torch.zeros_like(p) for p in params]
    distances = torch._foreach_sub(params, anchors)
    updates = torch._foreach_sub(after, params)
    s1, s2 = dots(grads, distances), dots(distances, distances)
    s3 = dots(updates, torch._foreach_add(updates, distances, alpha=2))
    if sums is not None:
        sums.copy_(torch.stack([s1, s2, s3], 1))
    c = -s1 if conditions is None else conditions.sub_(s1)
    amount = torch.where(c < 0, spd_lambda * deviation_ratio(s2, s3), 0.0).to(params[0].dtype)
    back = torch._foreach_mul(torch._foreach_sub(after, anchors), list(amount.unbind()))
    torch._foreach_sub_(after, back)
    torch._foreach_copy_(params, after)


def dots(a, b):
    """Sums of the products of two lists of tensors, added in fp64.  -> [T]"""
    return torch.stack([x.sum(dtype=torch.float64) for x in torch._foreach_mul(a, b)])


def whole(sum_of_part):
    """A sum over sharded weights (FSDP), of all parts; any other as it is.  [] -> []"""
    return sum_of_part.full_tensor() if hasattr(sum_of_part, "full_tensor") else sum_of_part


# --- optimiser ------------------------------------------------------------------------------------


class AdamSPD(torch.optim.Optimizer):
    """Alg. 2: Adam with selective projection decay, per parameter tensor. Options, of every group:

    spd_lambda   lambda of Eq. (4). It is no weight decay: 1 is the value to try first, and 0.1 does
                 next to nothing. On a smooth loss, with steps too small to overshoot, SPD is Adam
                 whatever the strength, by design; `report` says what it did.
    anchor       theta_0. "pretrained": the weights at the moment when the group is added, of a
                 frozen layer those before its first step; the state keeps them (4 bytes a parameter
                 in fp32). "zero": the origin, for PEFT. "none": plain Adam.
                 Differs (S2): the anchors are kept by parameter, so that any groups will do.
    condition    "code": of each step alone, as the authors' code; "paper": accumulated (S4).
    weight_decay AdamW's, towards 0, taken off last, since c_t is of the weights where the gradient
                 was taken (a copy of the weights during the step). 0 is SPD as published.
    master       fp16 and bf16 weights have a copy in fp32, and the steps change that one: otherwise
                 they lose every change that is smaller than their grid. The copy is the truth then.
    fused        the compiled kernel. None: where csrc/ is there and a group's contiguous tensors,
                 fp32 or with master, have a million elements or more, since for less its build
                 would not pay. True: insist.
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
        if any(param.is_complex() for param in group["params"]):
            raise ValueError("AdamSPD: complex weights are not supported")
        if any(hasattr(param, "_fsdp_flattened") for param in group["params"]):
            raise ValueError("AdamSPD: FSDP1's flat parameters mix layers; use fully_shard")
        for param in group["params"]:  # a frozen one begins when it is trained
            begun = param.requires_grad
            self.state[param] = self._begin(param, group) if begun else {"frozen": True}

    def _begin(self, param, group):
        """The state of a parameter whose pre-trained weights are those that it has now."""
        state = {"step": 0}
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        # c_t, in how many steps the parameter was projected, the sum of their r_t
        state["history"] = torch.zeros(3, dtype=torch.float64, device=param.device)
        if group["anchor"] == "pretrained":
            state["anchor"] = param.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss."""
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            alike = {}  # parameters that one call can take
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    if param.grad.is_sparse:
                        raise ValueError("AdamSPD: sparse gradients are not supported")
                    state = self._ready(param, group)
                    key = param.device, param.dtype, param.is_contiguous(), state["step"]
                    alike.setdefault(key, []).append(param)
            for params in alike.values():
                self._step(params, group)
        return loss

    def _ready(self, param, group):
        """The state of a parameter that has a gradient, on its device and in its type."""
        if "frozen" in self.state[param]:
            self.state[param] = self._begin(param, group)
        state = self.state[param]
        # PyTorch counts the writes to a tensor, such as those of a helper that zeroes a whole state
        anchored = "anchor" in state and not state["anchor"]._version
        if "step" not in state or (group["anchor"] == "pretrained" and not anchored):
            raise ValueError("AdamSPD: the state was reset or overwritten; the anchors are lost")
        half = param.dtype in (torch.float16, torch.bfloat16)
        if half and group["master"] and "master" not in state:
            state["master"] = param.detach().float()
        dtype = state.get("master", param).dtype
        for name in set(state) - {"step", "history"}:  # the model may have moved
            state[name] = state[name].to(param.device, dtype)
        state["history"] = state["history"].to(param.device)
        return state

    def _step(self, params, group):
        """One step of parameters that are alike in device, type, layout and step count."""
        states = [self.state[p] for p in params]
        anchored, step = group["anchor"] == "pretrained", states[0]["step"] + 1
        anchors = [s["anchor"] if anchored else None for s in states]
        weights = [s.get("master", p) for s, p in zip(states, params, strict=True)]
        grads = [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True)]
        if step == 1 and anchored:  # this waits for the device
            if any(whole((w != a).sum()) for w, a in zip(weights, anchors, strict=True)):
                problem = "the weights are no longer those it was made of, which are the anchors"
                cure = "load weights first, unless the run is to start away from its anchors"
                warnings.warn(f"AdamSPD: {problem}; {cure}", stacklevel=5)
        decay = float(group["lr"]) * group["weight_decay"]
        decays = [decay * w for w in weights] if decay else []
        if group["anchor"] == "none":
            group = group | {"spd_lambda": 0.0}
        history = [s["history"] for s in states]
        c, count, ratios = torch.stack(history).unbind(1)
        conditions = c.contiguous() if group["condition"] == "paper" else None
        sums = torch.zeros(len(params), 3, dtype=torch.float64, device=weights[0].device)
        moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        self.update((weights, anchors, grads, *moments), step, group, conditions, sums)
        for weight, part in zip(weights, decays, strict=False):
            weight.sub_(part)
        c = -sums[:, 0] if conditions is None else conditions
        r = deviation_ratio(sums[:, 1], sums[:, 2])
        fired = (c < 0) & (group["spd_lambda"] * r > 0)
        now = torch.stack([c, count + fired, ratios + torch.where(fired, r, 0.0)], 1)
        torch._foreach_copy_(history, list(now.unbind()))
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
        {"fired": share that was projected (c_t < 0 < lambda r_t), "mean_r": mean r_t of those,
        "decay": mean of lambda r_t over all, with the lambda of now}. fired 0: it was Adam.

        Counting costs a step no wait for the device; this call waits.
        """
        steps = fired = ratios = decay = 0.0
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"]):
                if group["anchor"] != "none" and state.get("step"):
                    _, count, ratio = state["history"].tolist()
                    steps, fired, ratios = steps + state["step"], fired + count, ratios + ratio
                    decay += group["spd_lambda"] * ratio
        steps = max(steps, 1)
        return {"fired": fired / steps, "mean_r": ratios / max(fired, 1), "decay": decay / steps}

    def load_state_dict(self, state_dict):
        """torch's. Anchors and options are the file's: a resumed run is never anchored anew."""
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


def check_options(optimiser, group):
    """Raises ValueError for options of a group that cannot be meant, and warns of unlikely ones."""
    options = {**optimiser.defaults, **group}
    for name in set(group) - set(optimiser.defaults):  # timm and others add their own
        near = difflib.get_close_matches(name, optimiser.defaults, cutoff=0.85)
        foreign = name in ("pre", "amsgrad", "maximize") and group[name]  # of other optimisers
        if "lambda" in name or near or foreign:
            known = ", ".join(optimiser.defaults)
            raise ValueError(f"AdamSPD: there is no option {name!r}; the options are {known}")
    choices = {"anchor": ("pretrained", "zero", "none"), "condition": ("code", "paper")}
    for name, known in choices.items():
        if options[name] not in known:
            raise ValueError(f"AdamSPD: {name} must be one of {known}, got {options[name]!r}")
    for name in ("lr", "eps", "spd_lambda", "weight_decay"):
        if not 0 <= options[name] < math.inf:
            value = options[name]
            raise ValueError(f"AdamSPD: {name} must be 0 or more and finite, got {value}")
    if not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"AdamSPD: betas must be 0 or more and below 1, got {options['betas']}")
    strength, decay = options["spd_lambda"], options["weight_decay"]
    if type(optimiser) is AdamSPD and 0 < strength <= 0.1:  # Differs (S1)
        cure = "it is no weight decay; try 1, since 0.1 does next to nothing"
        warnings.warn(f"AdamSPD: SPD's strength, spd_lambda, is {strength}; {cure}", stacklevel=5)
    if decay >= 0.5:
        cure = "it pulls to 0, not to the anchor; SPD's strength is spd_lambda"
        warnings.warn(f"AdamSPD: weight_decay is {decay}; {cure}", stacklevel=5)


def fastest(tensors, group):
    """What makes the step of these lists: the kernel, `spd_step_foreach` or `spd_step`."""
    fused, foreach, weights = group["fused"], group["foreach"], tensors[0]
    device, dtype = weights[0].device.type, weights[0].dtype
    plain = not any(hasattr(weight, "placements") for weight in weights)  # not sharded
    if plain and dtype == torch.float32 and fused is not False and not foreach:
        contiguous = all(t.is_contiguous() for column in tensors for t in column if t is not None)
        large = fused or sum(w.numel() for w in weights) >= 1_000_000
        kernels = compiled() if contiguous and large else None
        if kernels and device in kernels.devices:
            return kernels.spd_step
    if fused:
        needs = "csrc/, a compiler, contiguous fp32 weights, and foreach not set"
        raise ValueError(f"AdamSPD: fused=True needs {needs}")
    if foreach or (foreach is None and device == "cuda"):
        if plain and dtype in (torch.float32, torch.float64):
            return spd_step_foreach
    return spd_step


def compiled():
    """The kernels of csrc/, where that folder lies beside this file and can be built; else None."""
    if not (HERE / "csrc" / "spd_step.cpp").is_file():
        return None
    package = f"{__package__}." if __package__ else ""  # this file may lie in a package
    return importlib.import_module(f"{package}csrc.build").load()


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
        problem = f"no trainable parameter is left that begins with {sorted(unused)[0]!r}"
        raise ValueError(f"param_groups: {problem}; the names are as {first!r}")
    return list(groups.values())


# ==================================================================================================
# Here AdamSPD ends, and the experiment begins.
# ==================================================================================================

if (HERE / "er_study.py").is_file():
    import common
else:  # a copy in another project, whose common.py is none of ours: only AdamSPD is of use there

    def refuse(main):
        print("a copy of spd.py has AdamSPD alone; import it from here", file=sys.stderr)
        sys.exit(2)

    common = SimpleNamespace(Run=object, arg=lambda default, *_, **__: default, run=refuse)

# --- L2-SP, to compare with -----------------------------------------------------------------------


def pull(after, anchor, amount):
    """Eq. (2), decoupled L2-SP: theta_t = theta~_t - amount (theta~_t - theta_0), amount = lr
    lambda. Unconditional, and the same for every layer.  [...] -> [...]
    """
    return torch.lerp(after, anchor, amount)


class AdamL2SP(AdamSPD):
    """Alg. 1: Adam with L2-SP. Its strength is called spd_lambda, too."""

    def update(self, tensors, step, group, conditions, sums):
        lr, adam_options = float(group["lr"]), (group["betas"], group["eps"])
        for before, anchor, *rest in zip(*tensors, strict=True):
            after = adam(before, *rest, step, lr, *adam_options)
            anchor = torch.zeros_like(before) if anchor is None else anchor
            before.copy_(pull(after, anchor, lr * group["spd_lambda"]))

    def report(self):
        return {}  # it always pulls


# --- settings -------------------------------------------------------------------------------------

METHODS = ("AdamW", "L2-SP", "Adam-SPD")
CONDITIONS = {"Adam-SPD": "code", "Adam-SPD (sum)": "paper"}  # of the rows that begin so (S4)
PRESETS = {
    # as vrf.py's, where the rates come from, with fewer epochs and no mixing of digits
    "digits": dict(epochs=5, batch=64, lr=2e-4, warmup=24, mixup=0.0, cutmix=0.0, drop_path=0.0),
    # Differs (S7): the group's vanilla run; 5 epochs of warm-up, to a rate of 1e-5, nothing clipped
    "imagenet": dict(warmup=12_260, lr_end=0.5, clip=0.0, augment="deit"),
}


# Defaults of common.Run: ViT-B-16 (the paper says CLIP ViT-Base), batches of 512 (the group's on
# ImageNet, 2 x 256), weight decay 0.1 (listed for all runs; here of AdamW alone), and, ours, 500
# steps of warm-up and gradients of norm 1 at most.
@dataclass
class Config(common.Run):
    methods: str = common.arg("AdamW,L2-SP,Adam-SPD", "what to train, comma-separated")
    spd_lambda: str = common.arg("0.25,0.5,1,2", "strengths of Adam-SPD; Tab. 1 has 1")
    l2sp: str = common.arg("10,30,100", "strengths of L2-SP; ours")
    condition: str = common.arg("code", "paper: summed over the steps (S4)", "code paper both")
    epochs: int = common.arg(30, "DomainNet, Tab. 2, and ImageNet; 60 in Tab. 1", least=1)
    lr: float = common.arg(2e-5, "DomainNet and ImageNet")
    lr_end: float = common.arg(0.0, "share of the rate that the cosine ends at", most=1)
    smoothing: float = common.arg(0.1, "label smoothing, all runs", most=1)
    mixup: float = common.arg(0.8, "all runs")
    cutmix: float = common.arg(1.0, "all runs")
    drop_path: float = common.arg(0.2, "all runs (S5)", most=1)
    augment: str = common.arg("crop", "deit: RandAugment, too (S7)", "crop deit")
    jobs: int = common.arg(2, "runs at a time, each in a process of its own; 1 on a GPU", least=1)
    out: str = common.arg("runs/spd", "folder for checkpoints, caches, results, figures")


# --- train / prepare ------------------------------------------------------------------------------


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
    options = {"lr": config.lr, "spd_lambda": strength}
    if method == "L2-SP":
        return AdamL2SP(model.parameters(), **options)
    return AdamSPD(model.parameters(), condition=CONDITIONS[method], **options)


def train(config, name, data, clip, start, make_optimiser, key):
    """The fine-tuned copy of Classifier `start`, as it was after the epoch of highest accuracy on
    ID val (Sec. 4), of equals the first; {"val": that accuracy, and `AdamSPD.report` of the whole
    training}. make_optimiser: model -> optimiser; key: what else shapes the run. The best model so
    far is kept beside the checkpoint, so that a run can continue.
    """
    model = copy.deepcopy(start)
    add_drop_path(model.visual, config.drop_path)
    optimiser = make_optimiser(model)
    training = training_of(config, name, model, data, clip, optimiser, key)
    key = [training.path.name, common.fingerprint(data.val)]
    path = common.cache_path(config, f"best {name}", key)
    best = (common.read_cache(path) if config.resume else None) or {"val": -1.0}
    for done in common.train_steps(config, training):
        if done == 0 or done % training.per_epoch:
            continue
        found = common.forward_all(config, {"": model}, data.val, clip)[""]
        accuracy = common.accuracy(found["logits"], found["labels"])
        if accuracy > best["val"]:
            state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            best = {"val": accuracy, "epoch": done // training.per_epoch, "model": state}
        best["report"] = getattr(optimiser, "report", dict)()  # AdamW has none
        common.write_file(path, functools.partial(torch.save, best))
    if "model" not in best:
        raise common.InputError(f"{path} is gone; run again with --no-resume")
    model.load_state_dict(best["model"])
    share = f"{100 * best['val']:.1f} % on ID val"
    print(f"{training.name}: {share} after epoch {best['epoch']} of {config.epochs}")
    return model.eval(), {"val": best["val"], **best["report"]}


def training_of(config, name, model, data, clip, optimiser, key):
    """The common.Training of an optimiser by the paper's recipe, which is DeiT's (Sec. 4)."""
    mix = mixing(config, len(data.classes))

    def loss_fn(images, labels):
        mixed, targets = common.gather(images), common.gather(labels)
        if mix:
            torch.set_rng_state(common.broadcast(torch.get_rng_state()))  # one draw for all ranks
            mixed, targets = mix(mixed, targets)
        logits = common.gather(model(common.shard(mixed))[1])
        return F.cross_entropy(logits, targets, label_smoothing=config.smoothing)

    fields = "smoothing", "mixup", "cutmix", "drop_path", "augment", "lr_end"
    key = key | {field: getattr(config, field) for field in fields}
    if config.augment == "deit":
        clip = replace(clip, augment=augmentation(clip))
    training = common.image_training(config, name, model, data.train, clip, loss_fn, optimiser, key)
    training.schedule = functools.partial(common.warmup_cosine, end=config.lr_end)
    return training


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
    """The Row of a model; to its numbers comes its deviation ||theta_T - theta_0||.

    Differs (S8): ImageNet-A and -R are classified among their own 200 classes, as everywhere here.
    """
    right = common.right_images(config, model, data, clip)
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    squares = [(p - q.to(p.device)).double().square().sum().item() for p, q in pairs]
    numbers["deviation"] = math.sqrt(sum(squares))
    return common.Row(name, config.seed, right, numbers=numbers)


def by_val(rows):
    """For every method and run the row whose strength is best on ID val, of equals the first."""
    runs = {}
    for row in rows:
        if row.numbers["strength"]:
            runs.setdefault((row.numbers["family"], row.seed), []).append(row)
    chosen = []
    for (family, _), own in runs.items():
        best = max(own, key=lambda r: r.numbers["val"])
        choice = best.numbers["strength"]
        chosen.append(replace(best, method=f"{family}, by ID val", choice=choice))
    return chosen


def print_tables(config, rows):
    """Accuracies of all runs, then of the strengths that ID val chose; the deviation; and what
    AdamSPD reports.
    """
    forms = {"deviation": "{:.2f}", "fired": "{:.0%}", "mean_r": "{:.4f}", "decay": "{:.4f}"}
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        own = [r for r in rows if r.method == method]
        mean = common.accuracies(own, method)
        line = [f"{x:.1f}" for x in (*mean.values(), common.mean_shift(mean))]
        for name, form in forms.items():
            found = [r.numbers[name] for r in own if name in r.numbers]
            line.append(form.format(fmean(found)) if found else "")
        line.append(" ".join(dict.fromkeys(f"{r.choice:g}" for r in own if r.choice)))
        lines.append([method, *line])
    runs = f"mean of {config.seeds} run{'s' * (config.seeds > 1)}"
    title = f"accuracy in % (test: ID), {runs}; deviation ||theta_T - theta_0||; strength by ID val"
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


def summary(rows):
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
def prepare(argv):
    """Command line -> config, data, Clip, zero-shot Classifier."""
    config, data = common.setup(Config, argv, __doc__, PRESETS)
    recipes(config)  # refuses what it does not know, before any work
    return config, data, *common.zero_shot(config, data)


def one_run(argv, run):
    """Row of a method in one run: trained, unless it is zero-shot, and evaluated."""
    (name, seed), (config, data, clip, zero_shot) = run, prepare(argv)
    config, model, found = replace(config, seed=seed), zero_shot, {}
    method, strength = recipes(config).get(name, ("Zero-shot", None))
    if method != "Zero-shot":
        make = functools.partial(optimiser_of, config, method, strength)
        model, found = train(config, name, data, clip, zero_shot, make, {"method": name})
    numbers = {"family": method, "strength": strength, **found}
    return evaluate(config, data, clip, zero_shot, model, name, **numbers)


def main(argv=None):
    argv = tuple(sys.argv[1:] if argv is None else argv)
    prepare.cache_clear()  # the data may be others by now
    config, data, _, zero_shot = prepare(argv)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = [(name, seed) for seed in seeds for name in ("Zero-shot", *recipes(config))]
    rows = common.in_processes(one_run, argv, runs, config.jobs, config.device)
    rows += by_val(rows)
    common.write_results(config, zero_shot.head.weight.device, rows)
    print_tables(config, rows)
    if data.shifts:
        figure(config, [r for r in rows if r.choice is None])
        summary(rows)
    return rows


if __name__ == "__main__":
    common.run(main)
