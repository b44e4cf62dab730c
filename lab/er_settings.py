"""The paper's own settings of effective robustness (ER), on CIFAR-10 and ImageNet trees.

    python lab/er_settings.py cifar --data FOLDER --arch resnet18 --init pretrained  # E2
    python lab/er_settings.py cifar --data FOLDER --arch resnet18 --init random
    python lab/er_settings.py cifar --data FOLDER --subset hardest --cscores FILE    # E7
    python lab/er_settings.py bit --data FOLDER                                      # E3, E5
    python lab/er_settings.py bit --data FOLDER --init random
    python lab/er_settings.py clip --data FOLDER                                     # E4
    python lab/er_published.py plot "runs/er_settings/cifar10/trajectories/*.csv"    # all at once

cifar: one of six torchvision networks with a new head, all weights trained, every learning rate a
run of its own. bit: a linear head on frozen features of a timm network; from a random start, all
weights. clip: zero-shot, then logistic regression over ten lambdas. Baselines are the published
testbeds: CIFAR-10.1 for CIFAR-10 trees, ImageNet-V2, ObjectNet and ImageNet-R for ImageNet trees.
ER of digits needs none of this: er_study.py. E2 to E7: numbers of experiments in our notes.

Not measured by us: there are neither weights nor images here, and a run of `cifar` is 2.5 to 12.5
million images of 224 pixels a rate and seed (hours of a GPU); `bit` and `clip` pass each image
through the network once. What is tested is that all of it starts, ends and resumes on small trees
in the real layouts: --weights random --incomplete.

What the text known to us confirms is in PAPER, what it leaves open and is ours in OURS; both are
printed. E5 and E6 (what "size" and "diversity" are) are BiT-S against BiT-M here: timm has M, and
S comes as --weights BiT-S-R50x1.npz.

Differs, where the text known to us is silent:
E7  learning rates are constant; images are resized bilinearly, then cropped; new heads start by
    torch's default, BiT's at zeros; logistic regression as in scikit-learn, C = 1 / lambda, on raw
    features; ID val is held out of train; BiT on ImageNet trees is evaluated by the cadence (E4).
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from common import arg  # noqa: E402
from data import testbeds, trees  # noqa: E402
from lab import er_axes, er_published, networks  # noqa: E402

WHOLE = {"batch": 64, "momentum": 0.9, "weight_decay": 1e-4, "size": 224, "seeds": 5}  # App. B.1
WHOLE |= {"per_class": 500}
PAPER = {
    "cifar pretrained": WHOLE | {"lr": "0.01,0.001,0.0001", "epochs": 100},
    "cifar random": WHOLE | {"lr": "0.1,0.01", "epochs": 250},
    "bit pretrained": {"batch": 32768, "momentum": 0.9, "weight_decay": 0.0, "seeds": 5}
    | {"lr": "0.001", "epochs": 100},
    "bit random": {"momentum": 0.9, "seeds": 5},  # trains all weights; the rest is as for the six
    "clip pretrained": {"model": "ViT-B-32", "pretrained": "openai"}
    | {"lambdas": ",".join(f"{x:.6g}" for x in np.logspace(-6, 7, 10))},
}
OURS = {
    "cifar pretrained": {"val_fraction": 0.02},
    "cifar random": {"val_fraction": 0.02},
    "bit pretrained": {
        "val_fraction": 0.02,
        "head": "zeros",
        "arch": "resnetv2_50x1_bit.goog_in21k",
    },
    "bit random": {"val_fraction": 0.02, "arch": "resnetv2_50x1_bit", "lr": "0.1,0.01"}
    | {"epochs": 250, "batch": 64, "weight_decay": 1e-4, "size": 224},
    "clip pretrained": {"val_fraction": 0.02, "max_iter": 1000, "batch": 256, "seeds": 1},
}
LINES = {  # split of a tree -> the testbed's name of it
    "CIFAR-10.1 v6": "cifar10.1-v6",
    "CIFAR-10.1 v4": "cifar10.1-v4",
    "ImageNet-V2": "imagenetv2-",
    "ObjectNet": "objectnet-1.0-beta",
    "ImageNet-R": "imagenet-r",
}


@dataclass
class Config(common.Run):
    data: str = arg("", "folder with a CIFAR-10 or an ImageNet tree (README, Your data)")
    arch: str = arg(
        "resnet18", f"cifar: {', '.join(networks.SIX)}; bit: one of timm's resnetv2_*_bit"
    )
    init: str = arg("pretrained", "where training starts", "pretrained random")
    weights: str = arg("", "file with the pre-trained weights; random: none, to try a command")
    model: str = arg("ViT-B-32", "clip: open_clip architecture")
    lr: str = arg("0.01,0.001,0.0001", "rates, comma-separated; each is a run of its own")
    epochs: int = arg(100, "of training", least=1)
    batch: int = arg(64, "images a step", least=1)
    momentum: float = arg(0.9, "of SGD, without Nesterov")
    weight_decay: float = arg(1e-4, "of SGD")
    warmup: int = arg(0, "none: the rate is constant (E7)", most=0)
    clip: float = arg(0.0, "largest gradient norm; 0: any")
    size: int = arg(0, "pixels; 0: of the paper's recipe, or of BiT's rule (ours)")
    head: str = arg("zeros", "bit: start of the head", "zeros torch")
    lambdas: str = arg("1", "clip: L2 strengths of the sum of losses, tried on ID val")
    max_iter: int = arg(1000, "clip: iterations of L-BFGS", least=1)
    subset: str = arg("", "cifar: train on part of each class", "easiest random hardest")
    cscores: str = arg("", "file with labels and scores (C-scores) of the 50,000, for --subset")
    per_class: int = arg(500, "images of each class in the subset")
    testbed: str = arg("", "CIFAR-10: per-image table (.npz), for images that no model gets right")
    incomplete: bool = arg(False, "go on with trees that lack images; ER means nothing then")
    draws: int = arg(1000, "of the bootstrap", least=1)
    seeds: int = arg(5, "runs of each", least=1)
    out: str = arg("runs/er_settings", "folder; results go into its subfolder of the kind of data")


# --- method: logistic regression ------------------------------------------------------------------


def objective(W, x, y, lam, chunk=65_536):
    """Sum of cross-entropies + lam / 2 ||weights||^2, over N, and its gradient: scikit-learn's
    problem with C = 1 / lam, intercept not penalised.  [C, D + 1], [N, D], [N] -> (), [C, D + 1]
    """
    loss, gradient = 0.0, torch.zeros_like(W)
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        a = a.to(W.dtype)
        logp = (a @ W[:, :-1].T + W[:, -1]).log_softmax(1)
        loss -= logp.gather(1, b[:, None]).sum().item()
        residual = logp.exp()
        residual[torch.arange(len(b), device=b.device), b] -= 1
        gradient[:, :-1] += residual.T @ a
        gradient[:, -1] += residual.sum(0)
    loss += 0.5 * lam * W[:, :-1].square().sum().item()
    gradient[:, :-1] += lam * W[:, :-1]
    return loss / len(y), gradient / len(y)


def logistic(x, y, classes, lam, max_iter):
    """L-BFGS from zeros: weights at log-spaced iterations and the last.  -> [S], [S, C, D + 1]"""
    from scipy.optimize import minimize

    shape, kept = (classes, x.shape[1] + 1), {0: np.zeros((classes, x.shape[1] + 1))}
    wanted, done = {round(i) for i in np.geomspace(1, max_iter, 30)}, [0]

    def f(flat):
        W = torch.from_numpy(flat.reshape(shape)).to(x.device)
        loss, gradient = objective(W, x, y, lam)
        return loss, gradient.cpu().numpy().ravel()

    def callback(flat):
        done[0] += 1
        if done[0] in wanted:
            kept[done[0]] = flat.reshape(shape).copy()

    # Differs (E7): neither tolerance nor start is said, nor whether features are normalised
    options = {"maxiter": max_iter, "maxfun": 10 * max_iter, "ftol": 1e-14, "gtol": 1e-7}
    start = np.zeros(shape).ravel()
    found = minimize(f, start, jac=True, method="L-BFGS-B", callback=callback, options=options)
    kept[done[0]] = found.x.reshape(shape)
    return torch.tensor(list(kept)), torch.from_numpy(np.stack(list(kept.values()))).float()


# --- data -----------------------------------------------------------------------------------------


@dataclass
class World:
    """Splits that a model is run on, and the testbed's sets as views of their logits."""

    data: common.Data
    splits: dict  # name -> Split: test, and the shifts with a published line
    views: list  # (testbed's set, split, rows or None, labels, groups)
    bench: er_study.Measurement


def line_of(split):
    """The testbed's name of a shift, None if no testbed has it."""
    name = LINES.get(split.name)
    if name == "imagenetv2-":  # the folder says which of three, whose lines are far apart
        variants = ("matched-frequency", "threshold-0.7", "top-images")
        found = [v for v in variants if trees.plain(v) in trees.plain(split.path)]
        if len(found) != 1:
            raise common.InputError(
                f"{split.path} does not say which ImageNetV2 it is, and each has a line of its own;"
                " rename it to imagenetv2-matched-frequency, -threshold0.7 or -top-images"
            )
        name += found[0]
    return name


def published(config, data):
    """{testbed's name: Split} of the tree's shifts, and the testbed cut down to them."""
    shifts = {line_of(s): s for s in data.shifts}
    without = ", ".join(s.name for s in data.shifts if line_of(s) is None)
    shifts.pop(None, None)
    if without:
        print(f"not used, since no published testbed here has a line for it: {without}")
    if not shifts:
        known = "cifar10.1_v6_data.npy" if data.kind == "cifar10" else "ImageNet-V2, ObjectNet, -R"
        raise common.InputError(f"{config.data} has no shift with a published line; add {known}")
    if config.testbed and config.incomplete:
        raise common.InputError("--testbed knows every image of the sets: not with --incomplete")
    if data.kind == "cifar10":
        testbed = testbeds.read(config.testbed or "cifar10")
    elif config.testbed:
        raise common.InputError("--testbed is for CIFAR-10; ImageNet's tables have another order")
    else:
        testbed = joined(testbeds.read("imagenet"), testbeds.read("imagenet2020"))
    if lacking := [s for s in shifts if s not in testbed.id_of]:
        raise common.InputError(f"--testbed {config.testbed} has no {lacking[0]}")
    return shifts, restricted(testbed, shifts)


def restricted(testbed, shifts):
    """The part of a testbed that some of its shifts need."""
    id_of = {ood: testbed.id_of[ood] for ood in shifts}
    sets = [s for s in testbed.n if s in {*id_of, *id_of.values()}]
    n, k = ({s: part[s] for s in sets} for part in (testbed.n, testbed.k))
    right = {s: testbed.right[s] for s in sets if testbed.right}
    return testbeds.Testbed(testbed.name, testbed.models, n, k, id_of, right, testbed.studied)


def joined(a, b):
    """Two testbeds known by counts as one, models by name; nan where one has not the model."""
    models = list(dict.fromkeys([*a.models, *b.models]))
    k = {}
    for part in (a, b):
        rows = [models.index(m) for m in part.models]
        for s, counts in part.k.items():
            k[s] = np.full(len(models), np.nan)
            k[s][rows] = counts
    studied = a.studied | b.studied
    name = f"{a.name} and {b.name}"
    return testbeds.Testbed(name, models, a.n | b.n, k, a.id_of | b.id_of, {}, studied)


def views_of(data, shifts, testbed):
    """World.views: shifts as they are; ID sets as test, or as its images of the shift's classes."""
    views = []
    for ood, split in shifts.items():
        views.append((ood, split.name, None, split.labels, split.groups))
        at_home = testbed.id_of[ood]
        if at_home in [v[0] for v in views]:
            continue
        if split.groups is None:
            views.append((at_home, "test", None, data.test.labels, None))
            continue
        rank = {c: i for i, ids in enumerate(split.groups) for c in ids}
        rows = [i for i, c in enumerate(data.test.labels.tolist()) if c in rank]
        labels = torch.tensor([rank[c] for c in data.test.labels[rows].tolist()])
        views.append((at_home, "test", torch.tensor(rows), labels, split.groups))
    return views


def make_world(config, data):
    shifts, testbed = published(config, data)
    views = views_of(data, shifts, testbed)
    bench = er_study.Measurement(testbed, config.draws)
    n = {name: len(labels) for name, _, _, labels, _ in views}
    for ood, line in bench.lines.items():
        found, known = ([sizes[s] for s in (line.id, ood)] for sizes in (n, testbed.n))
        objects = trees.OBJECTNET_COUNTS  # of two versions, nearly equal
        close = found[0] == known[0] and {found[1], known[1]} == set(objects)
        if found != known and not (close or config.incomplete):
            raise common.InputError(
                f"{ood} has {found[1]:,} images and its ID set {found[0]:,}, where the published"
                f" line is of {known[1]:,} and {known[0]:,}: ER would compare different sets."
                " Complete the tree; --incomplete goes on, to try the command"
            )
        if found != known:
            print(f"WARNING: {ood} and {line.id} are not the published sets: {found} images")
    splits = {"test": data.test} | {s.name: s for s in shifts.values()}
    return World(data, splits, views, bench)


def right_of(world, logits):
    """{set of the testbed: bool [N]}, from {split's name: [N, C]}."""
    right = {}
    for name, split, rows, labels, groups in world.views:
        own = logits[split] if rows is None else logits[split][rows]
        right[name] = (common.project(own, groups).argmax(1) == labels).numpy()
    return right


def subset(config, data):
    """E7: data whose train is part of every class, and whose ID val is held out of the rest."""
    full = trees.find(config.data).train
    with trees.reading(f"--cscores {config.cscores!r}", "expected labels and scores, an .npz file"):
        with np.load(config.cscores, allow_pickle=False) as z:
            labels, scores = torch.from_numpy(z["labels"]), torch.from_numpy(z["scores"])
    if not torch.equal(labels, full.labels):
        raise common.InputError(
            f"{config.cscores}: its labels are not those of the training images in their order, so"
            " its scores would go to other images; take the file in the original order"
        )
    rows = er_axes.subset(scores, labels, config.subset, config.per_class, config.seed)
    others = np.setdiff1d(np.arange(len(labels)), rows.numpy())
    parts = [
        dataclasses.replace(full, images=full.images[i], labels=full.labels[i], expected=None)
        for i in (rows.numpy(), others)
    ]
    val = data.val
    if config.selection == "paper":
        val = common.hold_out(parts[1], config.val_fraction, config.seed)[1]
    return dataclasses.replace(data, train=parts[0], val=val)


# --- train / evaluate -----------------------------------------------------------------------------


def constant(step, warmup, total):
    """Factor on the learning rate."""
    return 1.0  # Differs (E7): no schedule is mentioned in the text known to us


@torch.inference_mode()
def outputs(config, model, split, transform):
    """[N, ...] of a network on all images of a split, in order."""
    device, n = next(model.parameters()).device, len(split.labels)
    size = min(config.batch, 256)
    order = [[(j, 0) for j in range(i, min(i + size, n))] for i in range(0, n, size)]
    parts = []
    for images, _ in common.load_images(split, transform, order, config, device):
        with common.autocast(device, config.precision):
            parts.append(model(images).float().cpu())
    return torch.cat(parts)


def record(config, world, name, init, key, steps, evaluations):
    """Points of one run of config.lr and config.seed; `key`: what else shapes it."""
    sets = (world.data.train, *world.splits.values())
    key = [key, config.epochs, config.precision, *(common.fingerprint(s) for s in sets)]
    return er_study.record(config, world.bench, name, init, key, steps, evaluations)


def recipe_of(config):
    """{name: value} of the settings that shape a training."""
    names = "lr epochs batch momentum weight_decay size clip precision head".split()
    return {name: getattr(config, name) for name in names} | {"schedule": "constant"}


def whole(config, world, build, transforms, init, lr, seed):
    """E2, and BiT from a random start: all weights, SGD, one rate.  -> points"""
    config = dataclasses.replace(config, lr=lr, seed=seed)
    data, device, (train, test) = world.data, common.pick_device(config.device), transforms
    n, classes = len(data.train.labels), len(data.classes)
    part = f", {config.subset} {n}" if config.subset else ""
    name = f"{init}, {config.arch}{part}, lr {lr:g}"
    key = recipe_of(config) | {"images": n, "data": common.fingerprint(data.train)}

    def batches_from(first):
        order = common.batches(n, config.batch, common.steps_of(config, n), seed, first)
        yield from common.load_images(data.train, train, order, config, device)

    def evaluations(todo, resume):
        model = build(config, classes, seed).to(device)
        for done in sgd_steps(config, name, model, batches_from, key, resume):
            if done in todo:
                model.eval()
                sets = world.splits.items()
                logits = {s: outputs(config, model, split, test) for s, split in sets}
                yield done, right_of(world, logits)

    start = build(config, classes, seed).state_dict()
    steps = er_study.cadence(common.steps_of_epoch(n, config.batch), config.epochs)
    return record(config, world, name, init, [start, key], steps, evaluations)


def sgd_steps(config, name, model, batches_from, key, resume):
    """common.train_steps with SGD at a constant rate."""
    decay = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    optimiser = torch.optim.SGD(model.parameters(), config.lr, **decay)

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    training = common.new_training(config, name, model, optimiser, loss_fn, batches_from, key)
    training.schedule = constant
    return common.train_steps(dataclasses.replace(config, resume=resume), training)


def frozen(config, world, transform):
    """{split, and train: features [N, D]} of the network without its head, cached."""
    body = networks.bit(config, 0, config.seed).to(common.pick_device(config.device)).eval()
    out = {}
    for name, split in {"train": world.data.train, **world.splits}.items():
        key = [body.state_dict(), common.fingerprint(split), config.size, config.precision]

        def compute(split=split):
            return {"features": outputs(config, body, split, transform)}

        out[name] = common.cached(config, "bit", [*key, config.arch], compute)["features"]
    return out


def head_only(config, world, features, lr, seed):
    """E3: a linear head on frozen features; evaluated at every step, for the steps are few.
    -> points
    """
    config = dataclasses.replace(config, lr=lr, seed=seed)
    y, device = world.data.train.labels, common.pick_device(config.device)
    n, classes = len(y), len(world.data.classes)
    total = common.steps_of(config, n)  # the last batch is the rest of an epoch
    name = f"head-only, {config.arch}, lr {lr:g}"
    key = recipe_of(config) | {"images": n, "data": common.hash_of(features["train"], y)}

    def batches_from(first):
        for rows in common.batches(n, config.batch, total, seed, first):
            index = torch.tensor([i for i, _ in rows])
            yield features["train"][index], y[index]

    def evaluations(todo, resume):
        common.set_seed(seed)
        head = torch.nn.Linear(features["train"].shape[1], classes)
        if config.head == "zeros":  # Differs (E7): how the head starts is not said
            torch.nn.init.zeros_(head.weight)
            torch.nn.init.zeros_(head.bias)
        head.to(device)
        for done in sgd_steps(config, name, head, batches_from, key, resume):
            if done in todo:
                logits = {s: classified(head, features[s], device) for s in world.splits}
                yield done, right_of(world, logits)

    steps = er_study.cadence(common.steps_of_epoch(n, config.batch), config.epochs)
    if total <= 1000:
        steps = range(total + 1)
    return record(config, world, name, "head-only", key, steps, evaluations)


@torch.inference_mode()
def classified(head, features, device):
    """Logits [N, C] on the CPU, of features [N, D] and a head on the device."""
    return torch.cat([head(x.to(device)).cpu() for x in features.split(65_536)])


def regressions(config, world):
    """E4: zero-shot CLIP, and along L-BFGS for every lambda; lambda by ID val, never by a shift.
    -> points
    """
    if config.weights == "random":
        config.weights, config.pretrained = "", "random"
    clip, zero_shot = common.zero_shot(config, world.data)
    device = zero_shot.head.weight.device
    every = {"train": world.data.train, "val": world.data.val, **world.splits}
    found = {s: common.frozen_features(config, zero_shot, x, clip)[0] for s, x in every.items()}
    x, y = found["train"].to(device), world.data.train.labels.to(device)
    key = [found["train"], y, zero_shot.head.weight]

    def at_zero(todo, resume):
        logits = {s: classified(zero_shot.classify, found[s], device) for s in world.splits}
        yield 0, right_of(world, logits)

    plain, name = dataclasses.replace(config, lr=0.0), f"zero-shot, {config.model}"
    points, scores = record(plain, world, name, "zero-shot", key, [0], at_zero), []
    lambdas = common.numbers(config.lambdas, "--lambdas")
    for lam in lambdas:
        own = [*key, lam, config.max_iter]

        def compute(lam=lam):
            steps, W = logistic(x, y, len(world.data.classes), lam, config.max_iter)
            return {"steps": steps, "W": W}

        kept = common.cached(config, "lbfgs", own, compute)
        weights = dict(zip(kept["steps"].tolist(), kept["W"], strict=True))

        def along(todo, resume, weights=weights):
            for step in sorted(todo):
                logits = {s: linear(found[s], weights[step]) for s in world.splits}
                yield step, right_of(world, logits)

        used = dataclasses.replace(config, lr=lam)
        name = f"head-only, {config.model}, lambda {lam:.3g}"
        points += record(used, world, name, "head-only", own, weights, along)
        last = linear(found["val"], kept["W"][-1])
        scores.append(common.accuracy(last, world.data.val.labels))
    best = scores.index(max(scores))
    print(f"lambda {lambdas[best]:.3g} of {len(lambdas)}, by ID val ({100 * scores[best]:.1f} %)")
    return points


def linear(features, W):
    """Logits of `logistic`'s weights.  [N, D], [C, D + 1] -> [N, C]"""
    return features @ W[:, :-1].T + W[:, -1]


# --- main -----------------------------------------------------------------------------------------


def prepare(argv):
    """First word and flags -> experiment, config with its recipe, World."""
    argv = list(argv)
    word = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    known = ("cifar", "bit", "clip")
    (experiment,) = common.choose(word or "cifar", known, "the first word")
    config = common.parse(Config, argv, __doc__)
    recipe = f"{experiment} {config.init}"
    if recipe not in PAPER:
        raise common.InputError("clip has no --init random: its logistic regression needs features")
    if config.data in ("", "digits"):
        raise common.InputError("--data: expected a CIFAR-10 or ImageNet tree; digits: er_study.py")
    for said, values in (("paper", PAPER[recipe]), ("ours", OURS[recipe])):
        given = config.given
        print(f"{said}: " + ", ".join(f"{k} {v}" for k, v in values.items() if k not in given))
    config, data = common.setup(Config, argv, __doc__, {})
    for name, value in (OURS[recipe] | PAPER[recipe]).items():
        if name not in config.given:
            setattr(config, name, value)
    allowed = ("cifar10",) if experiment == "cifar" else ("cifar10", "imagenet")
    if data.kind not in allowed:
        raise common.InputError(f"{config.data} is {data.kind}; {experiment} needs {allowed[0]}")
    if config.subset:
        data = subset(config, data)
    if "out" not in config.given:
        config.out = f"{config.out}/{data.kind}"
    return experiment, config, make_world(config, data)


def main(argv=None):
    experiment, config, world = prepare(sys.argv[1:] if argv is None else argv)
    bench, kind = world.bench, world.data.kind
    counts = dataclasses.replace(bench.testbed, right={})
    path = Path(config.out) / "trajectories" / "testbed.csv"
    common.write_file(path, functools.partial(testbeds.write, counts))
    rates = common.numbers(config.lr, "--lr")
    runs = [(lr, config.seed + i) for i in range(config.seeds) for lr in rates]
    if experiment == "clip":
        points = regressions(config, world)
    elif experiment == "bit" and config.init == "pretrained":
        features = frozen(config, world, networks.bit_transform(kind, config.size))
        points = [p for run in runs for p in head_only(config, world, features, *run)]
    else:
        build = networks.six if experiment == "cifar" else networks.bit
        init = "random" if config.init == "random" else "new-head"
        how = build, networks.transforms(kind, config.size), init
        points = [p for run in runs for p in whole(config, world, *how, *run)]
    return er_published.report(config, bench, points)


if __name__ == "__main__":
    common.run(main)
