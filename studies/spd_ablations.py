"""What AdamSPD does inside, and its neighbours: runs and figures beyond spd.py's table.

    python studies/spd_ablations.py all                   # digits, 12 minutes of one core
    python studies/spd_ablations.py rules --data /imagenet  # one; takes every flag of spd.py

    inside  firing by step, gamma_t of one tensor, histogram of r_t; strengths 0, 0.5, 1, 2
    rules   SPD, both forms of L2-SP, cautious decay: ID, shifts, deviation
    heads   the classifier anchored at its start, or free (S2)
    lora    PEFT: LoRA on the image tower, AdamW against SPD with the zero anchor (pip install peft)

Each prints its table and leaves PNG and CSV in OUT/figures. Strengths are fixed, not chosen.
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import spd  # noqa: E402


def setting(argv):
    config, data = common.begin(spd.Config, argv, __doc__, spd.PRESETS, spd.open_data)
    return config, data, *common.zero_shot(config, data)


def accuracies(config, data, clip, start, models):
    """Table rows [name, ID, shifts, mean shift, deviation] of {name: fine-tuned model}."""
    rows = []
    for name, model in models.items():
        row = spd.evaluate(config, data, clip, start, model, {"method": name, "seed": config.seed})
        mean = common.accuracies([row], name)
        numbers = [f"{x:.1f}" for x in (*mean.values(), common.mean_shift(mean))]
        rows.append([name, *numbers, f"{spd.total(row):.2f}"])
    splits = [s.name for s in (data.test, *data.shifts)]
    return ["method", *splits, "avg shift", "deviation"], rows


def inside(config, data, clip, start):
    """c_t, r_t and gamma_{t-1} of every tensor at every step, for four strengths."""
    strengths, kept = (0.0, 0.5, 1.0, 2.0), {}
    for strength in strengths:
        model = copy.deepcopy(start)
        optimiser, found = (
            spd.AdamSPD(
                model.parameters(), lr=config.lr, spd_lambda=strength, stats=True, fused=False
            ),
            [],
        )

        def probe(done, optimiser=optimiser, found=found):
            if done:
                found.append(torch.stack([optimiser.state[p]["spd"] for p in optimiser.state]))

        def compute(model=model, optimiser=optimiser, found=found, probe=probe, strength=strength):
            name, lr = f"SPD {strength:g}, recorded", config.lr
            given = {"optimiser": optimiser, "probe": probe}
            fresh = copy.copy(config)
            fresh.resume = False  # a continued run would lack the first steps' records
            common.fine_tune(fresh, name, model, data.train, clip, lr, config.seed, **given)
            return {"stats": torch.stack(found)}  # [steps, tensors, 3]

        key = [start.state_dict(), data.train.fingerprint, clip.key, strength, config.seed]
        key += [config.epochs, config.batch, config.lr, config.warmup, config.clip]
        kept[strength] = common.cached(config, "inside", key, compute)["stats"]
    names = [n for n, _ in start.named_parameters()]
    largest = max(range(len(names)), key=lambda i: list(start.parameters())[i].numel())
    figure, ((left, middle, right),) = common.new_figure(columns=3)
    rows, numbers = [], []
    for strength, x in kept.items():
        c, r, gamma = x.unbind(-1)
        fired = ((c < 0) & (r > 0)).double()
        label = f"strength {strength:g}"
        window = max(1, len(x) // 20)
        smooth = fired.mean(1).unfold(0, window, window).mean(1)
        left.plot(np.arange(len(smooth)) * window, smooth, label=label)
        middle.plot(gamma[:, largest], label=label)
        share = (c < 0).double().mean().item(), (r > 0).double().mean().item()
        median = r[(c < 0) & (r > 0)].median().item()
        total = gamma[-1].square().sum().sqrt().item()
        rows.append([label, *(f"{100 * s:.0f}" for s in share), f"{100 * fired.mean():.0f}",
                     f"{median:.1e}", f"{total:.2f}"])  # fmt: skip
        numbers += [
            (strength, i, *y) for i, y in enumerate(gamma[:, largest : largest + 1].tolist())
        ]
    c, r, _ = kept[1.0].unbind(-1)
    right.hist(r[(c < 0) & (r > 0)].clamp_min(1e-8).log10().numpy(), bins=40, color="tab:orange")
    left.set(xlabel="step", ylabel="share of tensors with c < 0 < r")
    middle.set(xlabel="step", ylabel="gamma", title=names[largest])
    right.set(xlabel="log10 of r where projected, strength 1", ylabel="tensors and steps")
    left.legend()
    header = ["SPD", "c < 0, %", "r > 0, %", "both, %", "median r", "last gamma"]
    print("\n" + common.table(header, rows, "shares of tensors and steps"))
    top = ["strength", "step", f"gamma of {names[largest]}"]
    common.save_figure(figure, f"{config.out}/figures/inside", top, numbers)


def rules(config, data, clip, start):
    """One optimiser, four regularisers (Algs. 1, 2 and cautious decay), at three strengths each."""
    grid = {
        "spd": (0.5, 1, 2),
        "l2-sp decoupled": (10, 30, 100),
        "l2-sp coupled": (1e-4, 1e-3, 1e-2),
    }
    grid["cautious"] = (10, 30, 100)
    models = {"Zero-shot": start}
    for rule, strengths in grid.items():
        for x in strengths:
            make = functools.partial(optimiser_of, config, rule, x)
            models[f"{rule} {x:g}"] = spd.train(
                config, f"{rule} {x:g}", data, clip, start, make, config.seed
            )
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, "accuracy in %, by regulariser and strength"))
    figure, ((axis,),) = common.new_figure()
    for rule in grid:
        own = [r for r in rows if r[0].startswith(rule + " ")]
        axis.plot([float(r[1]) for r in own], [float(r[-2]) for r in own], "o-", ms=4, label=rule)
    axis.set(xlabel="ID accuracy, %", ylabel="mean accuracy under shift, %")
    axis.legend()
    common.save_figure(figure, f"{config.out}/figures/rules", header, rows)


def optimiser_of(config, rule, strength, model):
    return spd.AdamSPD(model.parameters(), lr=config.lr, spd_lambda=strength, rule=rule)


def heads(config, data, clip, start):
    """S2: the head's anchor."""
    models = {}
    for anchor in ("pretrained", "none"):
        given = copy.copy(config)
        given.head, given.methods, given.spd_lambda = anchor, "Adam-SPD", "1"
        (make,) = (row[2] for row in spd.recipes(given).values())
        name = f"head {anchor}"
        models[name] = spd.train(given, name, data, clip, start, make, config.seed)
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, "accuracy in %, strength 1, by the head's anchor"))


def lora(config, data, clip, start, rank=8):
    """PEFT: rank-8 factors on the MLPs of the image tower and the head trained as it is."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise common.InputError("lora needs the package peft: pip install peft") from error
    models = {"Zero-shot": start}
    for name in ("AdamW", "SPD 0.5", "SPD 1", "SPD 2"):
        model = copy.deepcopy(start)
        torch.manual_seed(config.seed)  # the factors' start
        layers = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_fc", "c_proj"])
        model.visual = peft.get_peft_model(model.visual, layers)
        own = [p for p in model.parameters() if p.requires_grad]
        lr = 10 * config.lr  # the factors need more than the weights they replace
        if name == "AdamW":
            optimiser = torch.optim.AdamW(own, lr=lr, weight_decay=config.weight_decay)
        else:
            factors = [p for p in model.visual.parameters() if p.requires_grad]
            groups = [{"params": factors, "anchor": "zero"}, {"params": model.head.parameters()}]
            optimiser = spd.AdamSPD(groups, lr=lr, spd_lambda=float(name.split()[1]))
        said = f"LoRA {name}, seed {config.seed}"
        common.fine_tune(config, said, model, data.train, clip, lr, config.seed, optimiser)
        model.visual = model.visual.merge_and_unload()
        models[f"LoRA {name}"] = model
    header, rows = accuracies(config, data, clip, start, models)
    print("\n" + common.table(header, rows, f"accuracy in %, LoRA of rank {rank}, last epoch"))


ABLATIONS = {f.__name__: f for f in (inside, rules, heads, lora)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    names = list(ABLATIONS) if argv[0] == "all" else common.choose(argv[0], ABLATIONS, "ablation")
    args = setting(argv[1:])
    for name in names:
        try:
            ABLATIONS[name](*args)
        except common.InputError as error:
            if len(names) == 1:
                raise
            print(f"\n{name}: left out, {error}")


if __name__ == "__main__":
    common.run(main)
