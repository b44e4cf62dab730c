"""Along which axes effective robustness (ER) moves; takes every flag of er_study.py.

    python studies/er_axes.py strategies   # plain, replay, distillation, weights mixed: E10
    python studies/er_axes.py difficulty   # easiest, random, hardest 100 images of each class: E7
    python studies/er_axes.py pretraining  # images and domains of pre-training: E5, E6
    python studies/er_axes.py methods      # VRF, CaRot and SPD of this repository, as points

All are compared at equal ID accuracy, never at equal epoch alone. E5 to E10: numbers of experiments
in our notes; the text known to us settles neither subset sizes nor the list of strategies, so all
numbers here are ours. Trajectories are those of er_study.py, in its folder, and read back from it.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import er_study  # noqa: E402
from data import scratch, trajectories  # noqa: E402
from studies import er_report  # noqa: E402

AT = (0.8, 0.85, 0.9, 0.92, 0.94)  # ID accuracies of every comparison
RATE = 2e-4  # of every run here: er_study.py's middle one


# --- strategies: what might keep ER at high ID accuracy -------------------------------------------


def distilled(zero_shot, weight=1.0):
    """Cross-entropy + weight KL(zero-shot || model) on the same images."""

    def loss(model):
        def loss_of(images, labels):
            logits = model(images)[1]
            with torch.no_grad():
                target = zero_shot.eval()(images)[1].softmax(1)
            drift = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
            return F.cross_entropy(logits, labels) + weight * drift

        return loss_of

    return loss


def replayed(images, labels, size=32):
    """Cross-entropy on the batch + on `size` pre-training images of a fixed buffer."""

    def loss(model):
        def loss_of(x, y):
            rows = torch.randint(len(labels), (size,))  # torch's own generator, which fit restores
            old = images[rows].to(x.device), labels[rows].to(x.device)
            logits = model(torch.cat([x, old[0]]))[1]
            n = len(x)
            return F.cross_entropy(logits[:n], y) + F.cross_entropy(logits[n:], old[1])

        return loss_of

    return loss


def mixed(config, data, clip, zero_shot, bench, seed):
    """Trajectory over alpha (as step / 10): zero-shot and fine-tuned weights, interpolated."""
    import vrf

    model = copy.deepcopy(zero_shot)
    name = f"zero-shot, lr {RATE:g}, seed {seed}"
    common.fine_tune(config, name, model, data.train, clip, RATE, seed)  # read, if trained before
    key = [zero_shot.state_dict(), model.state_dict(), bench.testbed.k, config.draws]
    key += [s.fingerprint for s in bench.splits.values()]
    name = f"weights mixed, seed {seed}"
    file = f"{common.slug(name)}-{common.hash_of(key)}.csv"
    path = Path(config.out) / "trajectories" / file
    done = {r["step"] for r in trajectories.read(path, len(bench.lines))}
    between, run = copy.deepcopy(zero_shot), {"run": name, "model": config.model}
    for step in set(range(11)) - done:
        weights = vrf.wse(zero_shot.state_dict(), model.state_dict(), step / 10)
        between.load_state_dict(weights)
        right = er_study.score(bench, lambda x: between.eval()(x)[1], bench.images)
        at = {"init": "zero-shot", "lr": RATE, "seed": seed, "step": step, "epoch": step / 10}
        trajectories.append(path, er_study.measure(bench, run | at, right))
    return path


def strategies(config, data, clip, zero_shot, bench, seed):
    """E10: paths of the trajectories."""
    from data import pretrain

    images, labels, _ = pretrain.corpus(size=2048, seed=seed + 100)
    buffer = replayed(pretrain.normalise(images), labels)
    args = config, data, clip, zero_shot, bench
    kinds = {"": None, "distillation": distilled(zero_shot), "replay": buffer}
    paths = [
        er_study.follow(*args, "zero-shot", RATE, config.epochs, seed, name, loss)
        for name, loss in kinds.items()
    ]
    paths.append(er_study.follow(*args, "head-only", config.lr_head, config.epochs, seed))
    return [*paths, mixed(*args, seed)]


# --- difficulty -----------------------------------------------------------------------------------


def held_out_score(images, labels, seed=0, folds=5):
    """[N], higher is easier: probability of the true class under models that did not see the image,
    mean over three kinds of model. Folds are seeded.
    """
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)) % folds)
    score = torch.zeros(len(labels))
    kinds = {"linear": dict(e=15), "mlp": dict(e=15, w=128, d=1), "cnn": dict(e=4, w=8)}
    for f in range(folds):
        inside, outside = fold != f, fold == f
        for kind, options in kinds.items():
            model = scratch.fitted(kind, images[inside], labels[inside], seed + f, **options)
            with torch.inference_mode():
                p = model(images[outside]).softmax(1)
            score[outside] += p.gather(1, labels[outside, None])[:, 0] / len(kinds)
    return score


def subset(score, labels, which, per_class, seed=0):
    """Indices of the `per_class` easiest, hardest or random images of every class, ascending."""
    rng, kept = np.random.default_rng(seed), []
    for c in labels.unique().tolist():
        own = torch.nonzero(labels == c)[:, 0]
        if len(own) < per_class:
            raise common.InputError(f"class {c} has {len(own)} images, fewer than {per_class}")
        order = own[score[own].argsort(stable=True)]
        picks = {"hardest": order[:per_class], "easiest": order[len(own) - per_class :]}
        picks["random"] = own[rng.permutation(len(own))[:per_class]]
        kept.append(picks[which])
    return torch.cat(kept).sort().values


def difficulty(config, data, clip, zero_shot, bench, seed):
    """E7: fine-tuning on 100 images of each class, for as many steps as on all."""
    x, y = scratch.grey(data.train), data.train.labels
    key = [data.train.fingerprint, 0]
    score = common.cached(config, "difficulty", key, lambda: {"score": held_out_score(x, y)})
    paths, epochs = [], 3 * config.epochs
    for which in ("easiest", "random", "hardest"):
        rows = subset(score["score"], y, which, 100, seed)
        images = data.train.images[rows.numpy()]
        train = dataclasses.replace(data.train, images=images, labels=y[rows])
        args = config, dataclasses.replace(data, train=train), clip, zero_shot, bench
        name = f"{which} 1000"
        paths.append(er_study.follow(*args, "zero-shot", RATE, epochs, seed, name))
    return paths


# --- pre-training ---------------------------------------------------------------------------------


def pretraining(config, data, clip, zero_shot, bench, seed, steps=300):
    """E5, E6: no pre-training (er_study.py's random start), and CLIPs of `steps` steps on fewer
    images, or as many of fewer domains; each fine-tuned with a new head, so that all start at
    chance.
    """
    from data import pretrain

    settings = {"128 images": (None, 128), "1024 images": (None, 1024), "8192 images": (None, 8192)}
    settings |= {"2 domains": (2, 8192), "5 domains": (5, 8192)}
    none = "random", config.lr_random, config.epochs_random, seed
    paths = [er_study.follow(config, data, clip, zero_shot, bench, *none)]
    for name, (domains, size) in settings.items():
        weights = Path(config.out) / "pretrained" / f"{common.slug(name)}-{steps}-{seed}.npz"
        if not weights.is_file():
            weights.parent.mkdir(parents=True, exist_ok=True)
            print(f"pre-training on {name}, {steps} steps")
            pretrain.save(pretrain.pretrain(steps, domains, size, seed)[0], weights)
        own = dataclasses.replace(config, weights=str(weights))
        args = own, data, *common.zero_shot(own, data), bench
        paths.append(er_study.follow(*args, "new-head", RATE, config.epochs, seed, name))
    return paths


# --- every method of this repository --------------------------------------------------------------


def methods(config, data, clip, zero_shot, bench, seed):
    """The tables' rows of vrf.py, carot.py and spd.py as points: their training, their choices, our
    ER. One file, a row of theirs as a run of one checkpoint; no rows tuned on the test sets.
    """
    import carot
    import spd
    import vrf

    words = ["--device", config.device, "--seed", str(seed), "--out"]
    scripts = {"vrf": vrf, "carot": carot, "spd": spd}
    rows = [r for name, x in scripts.items() for r in x.main([*words, f"{config.out}/{name}"])]
    path = Path(config.out) / "trajectories" / f"methods-seed-{seed}.csv"
    path.unlink(missing_ok=True)
    seen = {"ZS", "FT"}  # carot.py's names of what vrf.py has; a temperature (TS) moves no argmax
    for row in rows:
        if row["method"] in seen or any(x in row["method"] for x in ("oracle", "+TS")):
            continue
        seen.add(row["method"])
        run = {"run": f"{row['method']}, seed {seed}", "model": config.model, "init": "zero-shot"}
        right = {s: r.numpy() for s, r in row["right"].items()}
        at = {"lr": 0, "seed": seed, "step": 0, "epoch": 0}
        trajectories.append(path, er_study.measure(bench, run | at, right))
    return [path]


# --- tables ---------------------------------------------------------------------------------------


def print_at(groups, shift):
    """ER at equal ID accuracies, mean over seeds and their range."""
    lines = []
    for name, runs in groups.items():
        curves = [er_report.curve(rows, shift) for rows in runs.values()]
        cells = []
        for accuracy in AT:
            er = [100 * er_report.at_accuracy(c, accuracy) for c in curves]
            spread = f" [{min(er):+.1f}, {max(er):+.1f}]" if len(er) > 1 else ""
            cells.append(er_report.signed(np.mean(er)) + spread)
        ends = (
            100 * np.mean([c["id"][-1] for c in curves]),
            100 * np.mean([c["er"][-1] for c in curves]),
        )
        lines.append([name, *cells, f"{ends[0]:.1f}", f"{ends[1]:+.1f}"])
    header = ["run", *(f"ID {100 * a:g}" for a in AT), "last ID", "last ER"]
    title = f"ER on {shift} in points at equal ID accuracy, mean [range over seeds]; -: not passed"
    print("\n" + common.table(header, lines, title))


def print_points(groups, shift):
    """Points of `methods`: ID, OOD mean, ER with intervals."""
    lines = []
    for name, runs in groups.items():
        cells = []
        for s in (shift, "mean"):
            curves = [er_report.curve(rows, s) for rows in runs.values()]
            ood, er, lo, hi = (
                100 * np.mean([c[x][0] for c in curves]) for x in ("ood", "er", "lo", "hi")
            )
            cells += [f"{ood:.1f}", f"{er:+.1f} [{lo:+.1f}, {hi:+.1f}]"]
        lines.append([name, f"{100 * np.mean([c['id'][0] for c in curves]):.1f}", *cells])
    header = ["method", "ID", shift, "ER [95 %]", "mean shift", "ER [95 %]"]
    print("\n" + common.table(header, lines, "accuracy in %, ER in points"))


NAMED = (
    "Zero-shot,LC,E2E-FT,E2E-FT +OSE,E2E-FT +VRF,LP-FT,LP-FT +VRF,FLYP,CaRot,AdamW"
    ";L2-SP, by ID val;Adam-SPD, by ID val"
)


def figure_points(config, groups, shift):
    """ER of every method against its ID accuracy, on one shift and in the mean."""
    fig, (axes,) = common.new_figure(columns=2)
    first, *others = NAMED.split(";")
    named, numbers = [*first.split(","), *others], []
    for axis, s in zip(axes, (shift, "mean"), strict=True):
        for name, runs in groups.items():
            c = [er_report.curve(rows, s) for rows in runs.values()]
            x, y, low, high = (
                100 * np.mean([x[k][0] for x in c]) for k in ("id", "er", "lo", "hi")
            )
            numbers.append((s, name, x, y, low, high))
            if name in named:
                i = named.index(name)
                look = {
                    "fmt": "osD^"[i % 4],
                    "ms": 4,
                    "lw": 0.8,
                    "label": name,
                    "color": f"C{i % 10}",
                }
                axis.errorbar(x, y, [[y - low], [high - y]], **look)
            else:
                axis.plot(x, y, ".", color="0.75")
        axis.set(xlabel="ID accuracy, %", ylabel="ER, points [95 %]")
        axis.set_title(f"effective robustness, {s if s != 'mean' else 'mean of all shifts'}")
    axes[0].legend(fontsize=6)
    header = ["shift", "method", "id", "er", "lo", "hi"]
    common.save_figure(fig, f"{config.out}/figures/er_methods", header, numbers)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {"strategies": strategies, "difficulty": difficulty}
    known |= {"pretraining": pretraining, "methods": methods}
    axis = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    (axis,) = common.choose(axis, known, "the first word") or ["strategies"]
    config, *world, bench = er_study.prepare(argv)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        for path in known[axis](config, *world, bench, seed):
            rows += trajectories.read(path, None if axis == "methods" else len(bench.lines))
    groups, shift = er_report.by_run(rows), er_report.best_line(bench.lines)
    er_report.print_lines(bench.testbed, bench.lines, bench.redraws)
    for s in (shift, "mean"):
        if axis == "methods":
            print_points(groups, shift)
            figure_points(config, groups, shift)
            break
        print_at(groups, s)
    return groups


if __name__ == "__main__":
    common.run(main)
