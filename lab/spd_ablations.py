"""What AdamSPD does inside, and its neighbours: runs and figures beyond spd.py's table.

    python lab/spd_ablations.py all                       # digits, 14 minutes of one core
    python lab/spd_ablations.py rules --data /imagenet    # one of them; takes every flag of spd.py

    demo    the first author's demo: paths on Himmelblau's function, both conditions
    inside  firing by step, gamma_t of one tensor, histogram of r_t; strengths 0, 0.5, 1, 2
    rules   SPD with either condition, L2-SP in the step and in the loss; extensions of ours: SPD
            gated by the update, cautious decay
    heads   the classifier anchored at its start, or free (S2)
    lora    PEFT: LoRA on the image tower, AdamW against SPD with the zero anchor (pip install peft)
    classes ImageNet-A and -R among all 1000 classes, by the models of spd.py (S8)

Each prints its table and leaves PNG and CSV in OUT/figures. Strengths are fixed, not chosen.
"""

import copy
import functools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import spd  # noqa: E402


def accuracies(config, data, clip, start, models):
    """Table rows [name, ID, shifts, mean shift, deviation] of {name: fine-tuned model}."""
    rows = []
    for name, model in models.items():
        row = spd.evaluate(config, data, clip, start, model, name)
        mean = common.accuracies([row], name)
        numbers = [f"{x:.1f}" for x in (*mean.values(), common.mean_shift(mean))]
        rows.append([name, *numbers, f"{row.numbers['deviation']:.2f}"])
    splits = [s.name for s in (data.test, *data.shifts)]
    return ["method", *splits, "avg shift", "deviation"], rows


# --- demo -----------------------------------------------------------------------------------------

START, STRENGTHS = (0.0, -2.0), (0.0, 0.25, 0.5, 0.75, 1.0)


def himmelblau(x, y):
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def path(strength, condition, steps=100):
    """AdamSPD on Himmelblau's function, each coordinate a tensor of its own. The rate, 0.6, was
    inferred from the demo's plot.  -> [steps + 1, 2], the optimiser's report
    """
    params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in START]
    optimiser = spd.AdamSPD(params, lr=0.6, spd_lambda=strength, condition=condition)
    seen = [START]
    for _ in range(steps):
        optimiser.zero_grad()
        himmelblau(*params).backward()
        optimiser.step()
        seen.append([p.item() for p in params])
    return torch.tensor(seen), optimiser.report()


def demo(config, *_):
    """Where five strengths end, by either condition."""
    rows, x = [], torch.linspace(-6, 6, 241)
    height = himmelblau(x[None], x[:, None]).log1p()
    header = ["condition", "strength", "step", "x", "y"]
    with common.figure(f"{config.out}/figures/demo", header, columns=2) as (axes, numbers):
        for axis, condition in zip(axes[0], ("paper", "code"), strict=True):
            axis.contour(x, x, height, 20, colors="0.85", linewidths=0.7, zorder=0)
            for strength in STRENGTHS:
                seen, report = path(strength, condition)
                axis.plot(*seen.T, ".-", ms=3, lw=1, label=f"strength {strength:g}")
                end = f"({seen[-1, 0]:+.2f}, {seen[-1, 1]:+.2f})"
                rows.append([f"{condition} {strength:g}", end, f"{report['fired']:.0%}"])
                points = enumerate(seen.tolist())
                numbers += [(condition, strength, i, *point) for i, point in points]
            axis.plot(*START, "k*", ms=9, label="start and anchor")
            title = {"paper": "Alg. 2: accumulated", "code": "of each step alone"}[condition]
            axis.set(title=f"condition {title}", xlim=(-2, 6), ylim=(-4, 4))
        axes[0, 1].legend(fontsize=7, loc="upper left")
    print("\n" + common.table(["condition", "end", "fired"], rows, "Himmelblau's function"))


# --- inside ---------------------------------------------------------------------------------------


class Recorded(spd.AdamSPD):
    """AdamSPD that keeps c_t, r_t and gamma_{t-1} of its T tensors in `seen`: [T, 3] of a step."""

    def update(self, tensors, step, group, conditions, sums):
        super().update(tensors, step, group, conditions, sums)
        s1, s2, s3 = sums.unbind(1)
        c = -s1 if conditions is None else conditions
        self.seen.append(torch.stack([c, spd.deviation_ratio(s2, s3), s2.sqrt()], 1).cpu())


def record(config, data, clip, start, strength):
    """c_t, r_t and gamma_{t-1} of every tensor at every step.  -> [steps, T, 3]"""
    model = copy.deepcopy(start)
    condition = "paper" if config.condition == "paper" else "code"
    options = {"lr": config.lr, "spd_lambda": strength, "condition": condition}
    optimiser, optimiser.seen = Recorded(model.parameters(), **options), []
    config = replace(config, resume=False)  # a continued run would lack the first steps
    name, key = f"SPD {strength:g}, recorded", {"strength": strength}
    training = common.image_training(config, name, model, data.train, clip, None, optimiser, key)

    def compute():
        for _ in common.train_steps(config, training):
            pass
        return {"seen": torch.stack(optimiser.seen)}

    return common.cached(config, "inside", [training.path.name], compute)["seen"]


def inside(config, data, clip, start):
    """c_t, r_t and gamma_{t-1} of every tensor at every step, for four strengths."""
    names = [name for name, _ in start.named_parameters()]
    sizes = [p.numel() for p in start.parameters()]
    largest, rows = sizes.index(max(sizes)), []
    header = ["strength", "step", f"gamma of {names[largest]}"]
    with common.figure(f"{config.out}/figures/inside", header, columns=3) as (axes, numbers):
        left, middle, right = axes[0]
        for strength in (0.0, 0.5, 1.0, 2.0):
            c, r, gamma = record(config, data, clip, start, strength).unbind(-1)
            fired, label = (c < 0) & (r > 0), f"strength {strength:g}"
            window = max(1, len(c) // 20)
            smooth = fired.double().mean(1).unfold(0, window, window).mean(1)
            left.plot([window * i for i in range(len(smooth))], smooth, label=label)
            middle.plot(gamma[:, largest], label=label)
            if strength == 1:
                logarithm = r[fired].clamp_min(1e-8).log10().numpy()
                right.hist(logarithm, bins=40, color="tab:orange")
            shares = [100 * x.double().mean().item() for x in (c < 0, r > 0, fired)]
            total = gamma[-1].square().sum().sqrt().item()
            rows.append([label, *(f"{x:.0f}" for x in shares), f"{r[fired].median():.1e}",
                         f"{total:.2f}"])  # fmt: skip
            numbers += [(strength, i, x) for i, x in enumerate(gamma[:, largest].tolist())]
        left.set(xlabel="step", ylabel="share of tensors with c < 0 < r")
        middle.set(xlabel="step", ylabel="gamma", title=names[largest])
        right.set(xlabel="log10 of r where projected, strength 1", ylabel="tensors and steps")
        left.legend()
    header = ["SPD", "c < 0, %", "r > 0, %", "both, %", "median r", "last gamma"]
    print("\n" + common.table(header, rows, "shares of tensors and steps"))


# --- rules ----------------------------------------------------------------------------------------


class CoupledL2SP(spd.AdamSPD):
    """L2-SP in the loss, Eq. (1): its gradient passes through Adam's moments. The paper's Alg. 1 is
    another one and pulls after the step.
    """

    def update(self, tensors, step, group, conditions, sums):
        params, anchors, grads, *moments = tensors
        lists = zip(grads, params, anchors, strict=True)
        grads = [g + group["spd_lambda"] * (p - a) for g, p, a in lists]
        options = group["lr"], group["betas"], group["eps"]
        spd.spd_step(params, anchors, grads, *moments, step, *options, spd_lambda=0.0)


class CautiousDecay(spd.AdamSPD):
    """Not the paper's: decay towards theta_0 as cautious weight decay (ICLR 2026) has it to 0."""

    def update(self, tensors, step, group, conditions, sums):
        amount = group["lr"] * group["spd_lambda"]
        for before, anchor, *rest in zip(*tensors, strict=True):
            after = spd.adam(before, *rest, step, group["lr"], group["betas"], group["eps"])
            before.copy_(cautious(before, after, anchor, amount))


def cautious(before, after, anchor, amount):
    """Decay towards theta_0 of the elements whose step already goes there.  [...] -> [...]"""
    distance = before - anchor
    return after - amount * distance * ((before - after) * distance >= 0)


class UpdateGated(spd.AdamSPD):
    """Not the paper's: SPD whose gate is the update and not the gradient, and the element and not
    the tensor, as that of cautious weight decay. Where a tensor moves outwards (r_t > 0), those of
    its elements that Adam's step moves towards theta_0 are pulled by lambda r_t. For whole tensors
    the gate would hardly ever open: r_t = 0 where a tensor moves towards theta_0.
    """

    def update(self, tensors, step, group, conditions, sums):
        for before, anchor, *rest in zip(*tensors, strict=True):
            after = spd.adam(before, *rest, step, group["lr"], group["betas"], group["eps"])
            r = spd.deviation_ratio(*spd.squared_deviations(before, after, anchor))
            before.copy_(gated_by_update(before, after, anchor, group["spd_lambda"] * r))


def gated_by_update(before, after, anchor, amount):
    """theta~ - amount (theta~ - theta_0) for elements whose step goes back.  [...] -> [...]"""
    back = (after - before) * (before - anchor) < 0
    return torch.where(back, torch.lerp(after, anchor, amount.to(after.dtype)), after)


RULES = {  # the optimiser, its options, three strengths
    "spd": (spd.AdamSPD, {"condition": "code"}, (0.5, 1, 2)),
    "spd accumulated": (spd.AdamSPD, {"condition": "paper"}, (0.5, 1, 2)),
    "l2-sp": (spd.AdamL2SP, {}, (10, 30, 100)),
    "l2-sp coupled": (CoupledL2SP, {}, (1e-4, 1e-3, 1e-2)),
    "spd by update": (UpdateGated, {}, (0.5, 1, 2)),
    "cautious": (CautiousDecay, {}, (10, 30, 100)),
}


def rules(config, data, clip, start):
    """One recipe, six regularisers, at three strengths each."""
    models = {"zero-shot": start}
    for rule, (optimiser, options, strengths) in RULES.items():
        for strength in strengths:
            name = f"{rule} {strength:g}"

            def make(model, optimiser=optimiser, options=options, strength=strength):
                given = {"lr": config.lr, "spd_lambda": strength, **options}
                return optimiser(model.parameters(), **given)

            key = {"rule": rule, "strength": strength}
            models[name], _ = spd.train(config, name, data, clip, start, make, key)
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, "accuracy in %, by regulariser and strength"))
    with common.figure(f"{config.out}/figures/rules", header, columns=2) as (axes, numbers):
        left, right = axes[0]
        for rule, (_, _, strengths) in RULES.items():
            own = [r for r in rows if r[0] in [f"{rule} {x:g}" for x in strengths]]
            id_accuracy, shift = [float(r[1]) for r in own], [float(r[-2]) for r in own]
            left.plot(id_accuracy, shift, "o-", ms=4, label=rule)
            name = f"{rule} {strengths[1 % len(strengths)]:g}"
            right.plot(deviations(models[name], start), "o-", ms=3, label=name)
        left.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
        right.set(xlabel="weight tensor, in network order", ylabel="deviation")
        left.legend(fontsize=7)
        right.legend(fontsize=7)
        numbers += rows


def deviations(model, start):
    """||theta_T - theta_0|| of every weight tensor, in network order."""
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    return [(p - q).norm().item() for (name, p), q in pairs if name.endswith("weight")]


# --- heads, lora ----------------------------------------------------------------------------------


def heads(config, data, clip, start):
    """S2: the head's anchor."""
    models = {}
    for anchor in ("pretrained", "none"):

        def make(model, anchor=anchor):
            groups = spd.param_groups(model, {"head.": {"anchor": anchor}})
            return spd.AdamSPD(groups, lr=config.lr, spd_lambda=1.0)

        name, key = f"head {anchor}", {"strength": 1.0, "head": anchor}
        models[name], _ = spd.train(config, name, data, clip, start, make, key)
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, "accuracy in %, strength 1, by the head's anchor"))


def lora(config, data, clip, start, rank=8):
    """PEFT: rank-8 factors on the MLPs of the image tower and the head trained as it is."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise common.InputError("lora needs the package peft: pip install peft") from error
    models = {"zero-shot": start}
    config = replace(config, lr=10 * config.lr)  # the factors need more than what they replace
    for name, strength in {"AdamW": None, "SPD 0.5": 0.5, "SPD 1": 1.0, "SPD 2": 2.0}.items():
        model = copy.deepcopy(start)
        torch.manual_seed(config.seed)  # the factors' start
        layers = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_fc", "c_proj"])
        model.visual = peft.get_peft_model(model.visual, layers)
        factors = [p for p in model.visual.parameters() if p.requires_grad]
        if strength is None:
            own = [*factors, *model.head.parameters()]
            optimiser = torch.optim.AdamW(own, lr=config.lr, weight_decay=config.weight_decay)
        else:
            groups = [{"params": factors, "anchor": "zero"}, {"params": model.head.parameters()}]
            optimiser = spd.AdamSPD(groups, lr=config.lr, spd_lambda=strength)
        key = {"rank": rank, "strength": strength or 0}
        given = {"optimiser": optimiser, "key": key}
        common.fine_tune(config, f"LoRA {name}", model, data.train, clip, **given)
        model.visual = model.visual.merge_and_unload()
        models[f"LoRA {name}"] = model
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, f"accuracy in %, LoRA of rank {rank}, last epoch"))


# --- classes --------------------------------------------------------------------------------------


def classes(config, data, clip, start):
    """S8: the models of spd.py, read where its --out is given, by the rule of the group's published
    numbers: ImageNet-A and -R, which have 200 classes, are classified among all 1000.
    """
    if not any(split.groups for split in data.shifts):
        raise common.InputError("classes: no set of these data has classes of its own")
    models, rows = {"Zero-shot": start}, []
    for name, recipe in spd.recipes(config).items():
        make, key = functools.partial(spd.optimiser_of, config, *recipe), {"method": name}
        models[name], _ = spd.train(config, name, data, clip, start, make, key)
    for name, model in models.items():
        right = {}
        for split in (data.test, *data.shifts):
            found = common.predict(config, {"": model}, replace(split, groups=None), clip)[""]
            right[split.name] = among_all(found.logits, found.labels, split.groups)
        rows.append(common.Row(name, config.seed, right))
    print("\n" + common.accuracy_table(rows, "accuracy in %, among all classes of the data"))


def among_all(logits, labels, groups):
    """Whether the largest of all logits is of the label's group.  [N, C], [N] -> bool [N]"""
    groups = groups or [[i] for i in range(logits.shape[1])]
    pairs = zip(logits.argmax(1).tolist(), labels.tolist(), strict=True)
    return torch.tensor([chosen in groups[label] for chosen, label in pairs])


ABLATIONS = {f.__name__: f for f in (demo, inside, rules, heads, lora, classes)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    config, data = common.setup(spd.Config, argv[1:], __doc__, spd.PRESETS)
    clip, start = common.zero_shot(config, data)
    for name in names:
        try:
            ABLATIONS[name](config, data, clip, start)
        except common.InputError as error:
            if len(names) == 1:
                raise
            print(f"\n{name}: left out, {error}")


if __name__ == "__main__":
    common.run(main)
