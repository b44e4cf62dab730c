"""What the demonstrations share: one start, the same batches, AdamW and AdamSPD, one table.

They show that AdamSPD drops into training code of other tasks. Nothing here is resumed or cached.
"""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path

import torch

LAB = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(LAB.parent), str(LAB)]

import pretrain_clip  # noqa: E402

import common  # noqa: E402
import spd  # noqa: E402
from data.images import read_rgb  # noqa: E402

__all__ = ["common", "pretrain_clip", "read_rgb", "spd"]


def settings(**own):
    """Config for common.parse: {field: (default, help)} of a script, and what all share."""
    shared = {
        "data": ("", ""),
        "model": ("", ""),
        "spd_lambda": ("0.5,1,2", "strengths of Adam-SPD"),
        "epochs": (3, "ours"),
        "batch": (16, "ours"),
        "micro": (0, "items at a time on the device; 0: the whole batch"),
        "lr": (1e-4, "ours"),
        "lr_end": (0.0, "share of the rate where the warm-up begins and the cosine ends"),
        "weight_decay": (0.01, "of AdamW alone; ours"),
        "warmup": (500, "steps of linear warm-up, a tenth of all at most; ours"),
        "clip": (1.0, "largest gradient norm; ours"),
        "seed": (0, "of all draws"),
        "precision": ("fp32", "autocast", "fp32 bf16 fp16"),
        "device": ("auto", "auto: cuda, mps, cpu"),
        "items": (1000, "training items, where they are generated"),
        "out": ("runs/examples", "folder for generated data"),
    }
    whole = ("epochs", "batch", "items", "rank", "length", "size")  # 1 or more of these
    pairs = (shared | own).items()
    fields = [(k, type(v[0]), common.arg(*v, least=int(k in whole))) for k, v in pairs]
    fields.append(("given", frozenset, dataclasses.field(default=frozenset())))
    return dataclasses.make_dataclass("Config", fields)


def need(*packages):
    """Raises InputError if an optional package is not installed."""
    if absent := [p for p in packages if importlib.util.find_spec(p) is None]:
        raise common.InputError(
            f"this example needs {' and '.join(absent)}: pip install -r requirements-llm.txt"
        )


def adapted(config, model, alpha, layers, dropout=0.0):
    """The model on config's device with LoRA factors of config.rank, drawn by config.seed."""
    import peft

    common.set_seed(config.seed)
    options = {"lora_alpha": alpha, "lora_dropout": dropout, "target_modules": layers}
    model = peft.get_peft_model(model, peft.LoraConfig(r=config.rank, **options))
    return model.to(common.pick_device(config.device))


def pretrained(config, *classes):
    """Each class's from_pretrained(config.model), models in fp32, or bf16. Raises InputError."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:
        return [c.from_pretrained(config.model, dtype=dtype) for c in classes]
    except (OSError, ValueError) as error:
        raise common.InputError(f"--model {config.model}: {common.first_line(error)}") from error


def fit(config, name, model, n, batch_of, loss_fn, optimiser):
    """Train over seeded epochs of n items. Raises InputError when the loss is not finite."""
    steps = common.steps_of(config, n)
    device, warmup = next(model.parameters()).device, min(config.warmup, steps // 10)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    common.set_seed(config.seed)
    model.train()
    with common.progress_bar(name, steps) as bar:
        for step, rows in enumerate(common.batches(n, config.batch, steps, config.seed)):
            for group in optimiser.param_groups:
                base = group.setdefault("initial_lr", group["lr"])
                factor = common.warmup_cosine(step, warmup, steps)
                group["lr"] = base * (config.lr_end + (1 - config.lr_end) * factor)
            parts = (x.to(device).split(config.micro or len(rows)) for x in batch_of(rows))
            *first, last = zip(*parts, strict=True)

            def weighted(part, rows=rows):
                return loss_fn(part) * (len(part[0]) / len(rows))

            for part in first:  # their gradients add up
                with common.autocast(device, config.precision):
                    loss = weighted(part)
                scaler.scale(loss).backward()
            loss = common.train_step(config, optimiser, scaler, weighted, last)
            if step % 10 == 0 and not loss.isfinite():
                raise common.InputError(f"{name}: the loss is {loss} at step {step}; lower --lr")
            bar.update()
    model.eval()


def compare(config, model, n, batch_of, loss_fn, score, anchor="pretrained", special=None):
    """Train the trainable parameters with AdamW and with AdamSPD at each strength, from the same
    weights over the same batches.  -> rows {"method", columns of score, "deviation"}

    batch_of([(index, augmentation seed), ...]) -> tuple of tensors; loss_fn(batch) -> scalar;
    score(model) -> {column: percent}. anchor, special: AdamSPD's and param_groups'. Kept is the
    last epoch; the paper keeps the best.
    """
    own = {k: p for k, p in model.named_parameters() if p.requires_grad}
    start = {k: v.detach().clone() for k, v in (own | dict(model.named_buffers())).items()}
    free = tuple(k for k, group in (special or {}).items() if group.get("anchor") == "none")

    def deviation():
        pairs = [(p, 0 if anchor == "zero" else start[k]) for k, p in own.items()
                 if not k.startswith(free)]  # fmt: skip
        return math.sqrt(sum((p - a).double().square().sum().item() for p, a in pairs))

    def optimiser_of(strength):
        if strength is None:
            return torch.optim.AdamW(own.values(), lr=config.lr, weight_decay=config.weight_decay)
        groups = spd.param_groups(model, special)
        return spd.AdamSPD(groups, lr=config.lr, spd_lambda=strength, anchor=anchor)

    strengths = common.numbers(config.spd_lambda, "--spd-lambda")
    model.eval()
    rows = [{"method": "start", **score(model), "deviation": deviation()}]
    for strength in (None, *strengths):
        name = "AdamW" if strength is None else f"Adam-SPD {strength:g}"
        with torch.no_grad():
            for k, v in (own | dict(model.named_buffers())).items():
                v.copy_(start[k])
        fit(config, name, model, n, batch_of, loss_fn, optimiser_of(strength))
        rows.append({"method": name, **score(model), "deviation": deviation()})
    return rows


def print_rows(rows, steps, about=()):
    """compare's table, then each strength less AdamW in the columns `about`, by default the first
    and the last.
    """
    header = list(rows[0])
    lines = [[r["method"], *(f"{r[c]:.1f}" for c in header[1:-1]), f"{r['deviation']:.3g}"]
             for r in rows]  # fmt: skip
    print("\n" + common.table(header, lines, f"percent, one run of {steps} steps each"))
    about, base = about or (header[1], header[-2]), rows[1]
    for r in rows[2:]:
        gains = ", ".join(f"{c} {r[c] - base[c]:+.1f}" for c in about)
        print(f"{r['method']} less AdamW: {gains}; deviation {r['deviation']:.3g} against "
              f"{base['deviation']:.3g}")  # fmt: skip
