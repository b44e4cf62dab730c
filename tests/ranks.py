"""What every process of test_ranks.py computes; `compute` alone is what one process gives."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import carot
import common
import spd
import vrf

TINY = "--model tiny_clip --pretrained random --batch 8 --warmup 2 --device cpu --epochs 1".split()
COMMANDS = {
    "vrf": (vrf, "--methods LC,E2E-FT --ensemble E2E-FT".split()),
    "carot": (carot, "--methods CaRot --micro-batch 3".split()),
    "spd": (spd, "--jobs 1 --methods Adam-SPD --spd-lambda 1 --drop-path 0".split()),
}


def gradients(n):
    """Of a contrastive loss over n pairs, in fp64; of one pair rank 0 has no part. Two layers see
    the rows of a process, the third those of all.
    """
    torch.manual_seed(0)
    of_images, of_texts, of_all = (nn.Linear(i, 4).double() for i in (5, 6, 4))
    x, y = torch.randn(n, 5).double(), torch.randn(n, 6).double()
    f, g = common.gather(of_images(common.shard(x))), common.gather(of_texts(common.shard(y)))
    f, g = F.normalize(f), F.normalize(of_all(g))
    (F.cross_entropy(9 * f @ g.T, torch.arange(n)) + (f + g).square().mean()).backward()
    parameters = [*of_images.parameters(), *of_texts.parameters(), *of_all.parameters()]
    found = [parameter.grad for parameter in parameters]
    common.average_gradients(found)
    return found


def sharded(anchor):
    """Weights after twenty steps of AdamSPD, of which each process holds a part (FSDP2); of the
    last layer's single row rank 1 has none.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    batches = torch.randn(20, 4, 6).double()
    if common.world() > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (common.world(),)))
    optimiser = spd.AdamSPD(model.parameters(), lr=0.05, anchor=anchor)
    for batch in batches:
        (model(batch)[:, 0] - torch.arange(4) % 3).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return [weights.detach() for weights in whole]


def statistics(out):
    """BatchNorm's mean after every step of a training, in which each process sees its own part."""
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(16, 3)
    config = common.Run(batch=8, epochs=2, warmup=1, device="cpu", out=str(out))

    def batches_from(first):
        for rows in common.batches(16, 8, 4, 0, first):
            yield (x[[i for i, _ in common.shard(rows)]],)

    def loss_fn(batch):
        return common.gather(module(batch[0])).square().mean()

    optimiser, key = torch.optim.SGD(module.parameters(), 0.1), {"images": 16}
    training = common.new_training(
        config, "statistics", module, optimiser, loss_fn, batches_from, key
    )
    return [module[0].running_mean.clone() for _ in common.train_steps(config, training)]


def arguments(tree, out, *own):
    return ["--data", str(tree), *TINY, "--skip-bad-images", "--out", str(out), *own]


def compute(tree, out):
    found = {"gradients": [gradients(n) for n in (1, 2, 5)]}
    found["sharded"] = sharded("pretrained") + sharded("zero")
    found["statistics"] = statistics(out)
    for name, (module, own) in COMMANDS.items():
        found[name] = module.main(arguments(tree, f"{out}/{name}", *own))
    return found


LONG = "--methods", "E2E-FT", "--epochs", "400"


def train_until_killed(tree, out):
    """A training whose last process is killed once there is a checkpoint."""

    def kill():
        while not list(Path(out).glob("checkpoints/*.pt")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    if common.rank() == 1:
        threading.Thread(target=kill, daemon=True).start()
    vrf.main(arguments(tree, out, *LONG))


if __name__ == "__main__":
    tree, out = sys.argv[1:]
    common.init_distributed("cpu")
    torch.save(compute(tree, out), f"{out}/rank-{common.rank()}.pt")
    dist.barrier()
    train_until_killed(tree, f"{out}/killed")
