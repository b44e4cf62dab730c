"""What the processes of test_ranks.py compute: {name: result}. `compute` alone is what one process
gives; `torchrun --nproc-per-node 2 tests/ranks.py TREE OUT` writes OUT/rank-0.pt, OUT/rank-1.pt.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import test_er_study

import carot
import common
import spd
import vrf
from data import trajectories

TINY = "--model tiny_clip --pretrained random --batch 8 --warmup 2 --device cpu --epochs 1".split()
CAROT = "--methods CaRot --micro-batch 3".split()
SPD = "--jobs 1 --methods Adam-SPD --spd-lambda 1 --drop-path 0".split()  # masks are random
STEPS = 20


@dataclass
class Config:
    batch: int = 3
    precision: str = "fp32"
    skip_bad_images: bool = False
    workers: int = 0
    device: str = "cpu"
    out: str = ""


def towers(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"f": nn.Linear(5, 4), "g": nn.Linear(6, 4), "s": Scale()}).double()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(1.0))


class Gain(nn.Module):
    """Of one row, as a class token's: two processes cannot both have a part."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 6))

    def forward(self, x):
        return x * self.weight


def gradients(loss_of, sizes):
    """{rows of the batch: loss and gradients}; 1 row: the first of two processes has none."""
    found = {}
    for n in sizes:
        model, generator = towers(), torch.Generator().manual_seed(n)
        x = torch.randn(n, 5, generator=generator).double()
        y = torch.randn(n, 6, generator=generator).double()
        part = [common.mine(z) if len(common.mine(z)) else z[:1] for z in (x, y)]
        rows = len(common.mine(x))
        trained = list(model.parameters())
        both = common.in_parallel(model, lambda batch, m=model: loss_of(m, *batch))
        loss = both((*part, rows))
        loss.backward()
        found[n] = [loss.detach(), *(p.grad for p in trained)]
    return found


def contrastive(model, x, y, rows):
    f, g = common.gather(model["f"](x), rows), common.gather(model["g"](y), rows)
    logits = carot.similarity(f, g, model["s"].log.exp())
    W = model["f"].weight.T, model["g"].weight.T
    return carot.total(logits, *W, logits.detach() / 2, cross=0.05)


def cross_entropy(model, x, y, rows):
    f = common.gather(model["f"](x) + model["g"](y), rows)
    return F.cross_entropy(model["s"].log * f, torch.arange(len(f)) % 4)


def trained(folder, name, stop=STEPS):
    """AdamSPD on the contrastive loss through common.fit: state of model and optimiser."""
    model, data = (
        towers(1),
        torch.randn(23, 11, generator=torch.Generator().manual_seed(0)).double(),
    )
    optimiser = spd.AdamSPD(model.parameters(), lr=0.02)

    def batches_from(first):
        for step, rows in enumerate(common.batches(23, 5, stop, 0, first), first):
            if step == stop:
                return
            index = torch.tensor([i for i, _ in common.mine(rows)], dtype=torch.int64)
            batch = data[index] if len(index) else data[:1]
            yield batch[:, :5], batch[:, 5:], index

    def loss_fn(batch):
        return contrastive(model, batch[0], batch[1], len(batch[2]))

    path = Path(folder) / f"{name}.pt"
    options = dict(steps=STEPS, save_every=5, warmup=3, clip=1.0, path=path, name=name)
    try:
        common.fit(model, loss_fn, batches_from, optimiser, **options)
    except common.InputError as error:  # "the data ended": the job was cut off
        if stop == STEPS:
            raise error
    moments = [s["exp_avg"] for s in optimiser.state.values() if "exp_avg" in s]
    return [*model.state_dict().values(), *moments]


def distances():
    v, V = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)).split([4, 2], 2)[0]
    return common.gather(vrf.kth_distance(common.mine(v), V, 2))


def tables(tree, out):
    """Result rows of three scripts' mains."""
    words = ["--data", str(tree), *TINY, "--skip-bad-images"]
    return {
        "vrf": vrf.main([*words, "--methods", "LC,E2E-FT", "--out", f"{out}/vrf"]),
        "carot": carot.main([*words, *CAROT, "--out", f"{out}/carot"]),
        "spd": spd.main([*words, *SPD, "--out", f"{out}/spd"]),
    }


def sharded(anchor):
    """Weights after AdamSPD's steps on a model of which each process holds a part (FSDP)."""
    torch.manual_seed(0)
    model = nn.Sequential(Gain(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    if common.world() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (common.world(),)))
    optimiser = spd.AdamSPD(model.parameters(), lr=0.05, anchor=anchor, stats=True)
    x = torch.randn(STEPS, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    fired = 0
    for batch in x:
        F.cross_entropy(5 * model(batch), torch.arange(4) % 3).backward()
        optimiser.step()
        optimiser.zero_grad()
        fired += sum(int(whole(s["spd"])[0] < 0) for s in optimiser.state.values())
    optimiser.save_anchors = False  # hashes of the whole anchors
    kept = [x.get("anchor", 0) for x in optimiser.state_dict()["state"].values()]
    found = [torch.tensor(fired), *(whole(p.detach()) for p in model.parameters())]
    found.append(torch.tensor(kept))
    if common.world() > 1:  # the kernel would take a part for the whole
        model(x[0]).sum().backward()
        optimiser.fused = True
        with pytest.raises(ValueError, match="whole ones"):
            optimiser.step()
    return found


def trajectory(out):
    """Rows of a fine-tuning followed by er_study.py."""
    return trajectories.read(test_er_study.follow(test_er_study.make_world(out / "er")), 2)


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compute(tree, out):
    return {
        "contrastive": gradients(contrastive, (1, 2, 5, 8)),
        "cross-entropy": gradients(cross_entropy, (1, 2, 5, 8)),
        "trained": trained(out, "whole"),
        "distances": distances(),
        "sharded": sharded("pretrained") + sharded("zero"),
        "tables": tables(tree, out),
        "trajectory": trajectory(Path(out)),
    }


if __name__ == "__main__":
    common.join("cpu")
    folder = Path(sys.argv[2])
    found = compute(sys.argv[1], folder)
    trained(folder, "cut", stop=12)  # its last checkpoint is of step 10
    torch.save(found, folder / f"rank-{common.rank()}.pt")
    dist.destroy_process_group()
