"""Along which axes effective robustness (ER) moves; takes every flag of er_study.py.

    python lab/er_axes.py strategies   # plain, replay, distillation, weights mixed: E10
    python lab/er_axes.py difficulty   # easiest, random, hardest 100 images of each class: E7
    python lab/er_axes.py pretraining  # images and domains of pre-training: E5, E6
    python lab/er_axes.py methods      # VRF, CaRot and SPD of this repository, as points

All are compared at equal ID accuracy, never at equal epoch alone. E5 to E10: numbers of experiments
in our notes; the text known to us settles neither subset sizes nor the list of strategies, so all
numbers here are ours. Trajectories are those of er_study.py, in its folder, and read back from it.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
from data import testbeds  # noqa: E402
from lab import digits_testbed, er_published  # noqa: E402


@dataclasses.dataclass
class Config(er_study.Config):
    plot: str = common.arg("", "draw saved trajectories (a pattern in quotes) instead of training")


AT = (0.8, 0.85, 0.9, 0.92, 0.94)  # ID accuracies of every comparison
RATE = 2e-4  # of every run here: er_study.py's middle one
PER_CLASS = 100  # images in a subset of `difficulty`
CORPORA = {  # of `pretraining`: domains (None: all ten), images
    "128 images": (None, 128),
    "1024 images": (None, 1024),
    "8192 images": (None, 8192),
    "2 domains": (2, 8192),
    "5 domains": (5, 8192),
}


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


def with_loss(config, data, clip, zero_shot, bench, run, loss):
    """er_study.follow from zero-shot, with a loss of its own: loss(model) -> loss_fn."""
    named = {"loss": run}

    def evaluations(todo, resume):
        used, model = dataclasses.replace(config, resume=resume), copy.deepcopy(zero_shot)
        args = used, run, model, data.train, clip, loss(model)
        for done in common.train_steps(used, common.image_training(*args, key=named)):
            if done in todo:
                yield done, er_study.score(model, bench.sets)

    key = [common.training_key(config, clip, data.train, named, loss), *fingerprints(data)]
    per_epoch = common.steps_of_epoch(len(data.train.labels), config.batch)
    steps, key = er_study.cadence(per_epoch, config.epochs), [zero_shot.state_dict(), key]
    return er_study.record(config, bench, run, "zero-shot", key, steps, evaluations)


def mixed(config, data, clip, zero_shot, bench):
    """Trajectory over alpha (as step / 10): zero-shot and fine-tuned weights, interpolated."""
    import vrf

    tuned, between = copy.deepcopy(zero_shot), copy.deepcopy(zero_shot)
    common.fine_tune(config, f"zero-shot, lr {RATE:g}", tuned, data.train, clip)  # or read

    def evaluations(todo, resume):
        for step in sorted(todo):
            weights = vrf.wse(zero_shot.state_dict(), tuned.state_dict(), step / 10)
            between.load_state_dict(weights)
            yield step, er_study.score(between, bench.sets)

    key = [zero_shot.state_dict(), tuned.state_dict(), *fingerprints(data)]
    run = config, bench, "weights mixed", "zero-shot"
    return er_study.record(*run, key, range(11), evaluations)


def fingerprints(data):
    """Fingerprints of the sets of a study."""
    return [common.fingerprint(s) for s in (data.train, data.test, *data.shifts)]


def strategies(config, data, clip, zero_shot, bench, seed):
    """E10: points of the trajectories."""
    from lab import pretrain_clip

    images, labels, _ = pretrain_clip.corpus(size=2048, seed=seed + 100)
    buffer = replayed(pretrain_clip.normalise(images), labels)
    config = dataclasses.replace(config, lr=RATE, seed=seed)
    world = data, clip, zero_shot, bench
    found = er_study.follow(config, *world, f"zero-shot, lr {RATE:g}", "zero-shot")
    found += with_loss(config, *world, "distillation", distilled(zero_shot))
    found += with_loss(config, *world, "replay", buffer)
    head = dataclasses.replace(config, lr=config.lr_head)
    found += er_study.follow(head, *world, f"head-only, lr {head.lr:g}", "head-only")
    return found + mixed(config, *world)


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
            model = digits_testbed.fitted(kind, images[inside], labels[inside], seed + f, options)
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
    """E7: fine-tuning on PER_CLASS images of each class, for as many steps as on all 3,000."""
    x, y = digits_testbed.grey(data.train), data.train.labels
    key = [common.fingerprint(data.train), 0]
    score = common.cached(config, "difficulty", key, lambda: {"score": held_out_score(x, y)})
    config = dataclasses.replace(config, lr=RATE, seed=seed, epochs=3 * config.epochs)
    found = []
    for which in ("easiest", "random", "hardest"):
        rows = subset(score["score"], y, which, PER_CLASS, seed)
        images = data.train.images[rows.numpy()]
        train = dataclasses.replace(data.train, images=images, labels=y[rows])
        world = dataclasses.replace(data, train=train), clip, zero_shot, bench
        found += er_study.follow(config, *world, f"{which} {len(rows)}", "zero-shot")
    return found


# --- pre-training ---------------------------------------------------------------------------------


def pretraining(config, data, clip, zero_shot, bench, seed, steps=1500):
    """E5, E6: no pre-training (er_study.py's random start), and CLIPs of `steps` steps on fewer
    images, or as many of fewer domains; each fine-tuned with a new head, so that all start at
    chance. As many steps as the shipped CLIP has: after 300 none of the five is past chance by
    much (zero-shot 15 to 31 % on ID) and there is no ER to compare. 40 CPU minutes.
    """
    from lab import pretrain_clip

    none = {"lr": config.lr_random, "epochs": config.epochs_random}
    world = dataclasses.replace(config, seed=seed, **none), data, clip, zero_shot, bench
    found = er_study.follow(*world, f"random, lr {config.lr_random:g}", "random")
    for name, (domains, size) in CORPORA.items():
        weights = Path(config.out) / "pretrained" / f"{common.slug(name)}-{steps}-{seed}.npz"
        if not weights.is_file():
            weights.parent.mkdir(parents=True, exist_ok=True)
            print(f"pre-training on {name}, {steps} steps")
            pretrain_clip.save(
                pretrain_clip.pretrain(steps, domains, size, seed, log=100)[0], weights
            )
        own = dataclasses.replace(config, weights=str(weights), lr=RATE, seed=seed)
        world = own, data, *common.zero_shot(own, data), bench
        found += er_study.follow(*world, name, "new-head")
    return found


# --- every method of this repository --------------------------------------------------------------


def tuned(config, seed):
    """vrf.py's config, data, CLIP and {name: fine-tuned Classifier} of vrf.py, carot.py and spd.py:
    their training, their choices (strengths by ID val), read back if trained before.
    """
    import carot
    import spd
    import vrf

    def words(name, *more):
        out = f"{config.out}/{name}"
        return ["--device", config.device, "--seed", str(seed), "--out", out, *more]

    own = vrf.prepare(words("vrf"))
    models = vrf.train_models(*own, seed)
    theirs = carot.prepare(words("carot", "--methods", "FLYP,CaRot"))
    trained = carot.train_models(*theirs, seed)
    models |= {name: trained[name] for name in ("FLYP", "CaRot")}
    recipe, data = common.setup(spd.Config, words("spd"), spd.__doc__, spd.PRESETS)
    best, val = {}, own[1].val
    for name, (family, strength) in spd.recipes(recipe).items():
        make = functools.partial(spd.optimiser_of, recipe, family, strength)
        key = {"strength": strength or 0, "condition": recipe.condition}
        model, _ = spd.train(recipe, name, data, own[2], own[3], make, key)
        right = common.predict(recipe, {"": model}, val, own[2])[""].right
        if family not in best or right.sum() > best[family][0]:
            best[family] = right.sum(), model
    models |= {family: model for family, (_, model) in best.items()}
    return own[:3], models


def mixtures(config, data, clip, zero_shot, name, model, seed):
    """{row: {split: probabilities [N, C]}} of a fine-tuned model: alone, and with zero-shot by WSE,
    OSE and VRF as vrf.py has them, alpha and (a, b) by ID val.
    """
    import vrf

    models = {"ZS": zero_shot, "Fine-tuned": model}
    rows, studies = vrf.evaluate(config, data, clip, models, seed)
    alpha = {r.method.removeprefix("Fine-tuned "): r.choice for r in rows}
    raw, _, found = studies["Fine-tuned"]
    sets = {s: x for s, x in raw.items() if s != "val"}
    between = copy.deepcopy(zero_shot)
    weights = vrf.wse(zero_shot.state_dict(), model.state_dict(), alpha["+WSE"])
    between.load_state_dict(weights)
    return {
        name: {s: x.p_ft for s, x in sets.items()},
        f"{name} +WSE": probabilities(config, data, clip, between),
        f"{name} +OSE": {s: vrf.ose(x.p_zs, x.p_ft, alpha["+OSE"]) for s, x in sets.items()},
        f"{name} +VRF": found.p_vrf,
    }


def probabilities(config, data, clip, model):
    """{split: [N, C]} of a Classifier on the test set and the shifts."""
    found = {}
    for split in (data.test, *data.shifts):
        found[split.name] = common.predict(config, {"": model}, split, clip)[""].logits.softmax(1)
    return found


@dataclasses.dataclass
class MethodPoint(er_study.Point):
    """A Point of `methods`, which has the ECE of its model, too; shares."""

    ece_id: float = 0.0
    ece_ood: float = 0.0


def read(path):
    """The points of a file: MethodPoint of what `methods` wrote, else er_study.Point."""
    kind = MethodPoint if Path(path).name.startswith("methods-") else er_study.Point
    return testbeds.read_rows(path, kind)


def methods(config, data, clip, zero_shot, bench, seed):
    """Every fine-tuned model of this repository, with and without ensembles, as points with their
    ECE. One file, a row of the table as a run of one checkpoint; nothing tuned on the test sets.
    """
    args, models = tuned(config, seed)
    own = dataclasses.replace(config, lr=0.0, seed=seed)
    labels, points = {s.name: s.labels for s in (data.test, *data.shifts)}, []
    plain = {"ZS": "Zero-shot", "LC": "Linear classifier"}
    for name, model in models.items():
        if name in plain:
            found = {plain[name]: probabilities(*args, model)}
        else:
            found = mixtures(*args, models["ZS"], name, model, seed)
        for row, p in found.items():
            right = {s: (x.argmax(1) == labels[s]).numpy() for s, x in p.items()}
            ece = {s: common.ece(x, labels[s]) for s, x in p.items()}
            points += with_ece(er_study.measure(own, bench, row, "zero-shot", 0, right), ece)
    er_study.write(f"{config.out}/trajectories/methods-seed-{seed}.csv", points)
    return points + courses(config, data, clip, zero_shot, bench, seed)


def with_ece(points, ece):
    """MethodPoints from those of `measure` and the ECE of the same model: {set: share}."""
    ece = ece | {"mean": common.mean_shift(ece)}
    return [MethodPoint(**vars(p), ece_id=ece[common.ID], ece_ood=ece[p.shift]) for p in points]


def trainings(config, clip, data, zero_shot, seed):
    """{method: (its config, its start)}, as the scripts train them, Adam-SPD with strength 1."""
    import carot
    import spd
    import vrf

    def words(name, *more):
        return ["--device", config.device, "--out", f"{config.out}/{name}", *more]

    own, *world = vrf.prepare(words("vrf", "--methods", "LC"))
    starts = vrf.train_models(own, *world, seed)
    pairs = carot.prepare(words("carot", "--methods", "FLYP,CaRot"))[0]
    held = common.setup(spd.Config, words("spd"), spd.__doc__, spd.PRESETS)[0]  # nothing mixed
    own, held = (dataclasses.replace(used, seed=seed) for used in (own, held))
    return {
        "E2E-FT": (own, zero_shot),
        "LP-FT": (dataclasses.replace(own, lr=own.lr_lpft), starts["LC"]),
        "FLYP": (carot.recipe(pairs, "FLYP", seed), clip),
        "CaRot": (carot.recipe(pairs, "CaRot", seed), clip),
        "Adam-SPD": (held, zero_shot),
    }


def steps_of(name, config, data, clip, start):
    """Trains; yields (steps done, the model so far), a Classifier or, of FLYP and CaRot, a CLIP."""
    import carot
    import spd

    if name in ("FLYP", "CaRot"):
        module, training = carot.pair_training(config, name, clip, data)
        steps = common.steps_of(config, len(data.train.labels))
        for done in common.train_steps(config, training):
            carot.update_teacher(config, module, done, steps)
            yield done, module.student
        return
    model, args = copy.deepcopy(start), ()
    if name == "Adam-SPD":

        def loss_fn(images, labels):
            return F.cross_entropy(model(images)[1], labels, label_smoothing=config.smoothing)

        optimiser = spd.AdamSPD(model.parameters(), lr=config.lr, spd_lambda=1.0)
        args = loss_fn, optimiser, {"smoothing": config.smoothing}
    training = common.image_training(config, name, model, data.train, clip, *args)
    for done in common.train_steps(config, training):
        yield done, model


def courses(config, data, clip, zero_shot, bench, seed):
    """Points of the methods' own trainings."""
    import carot

    found = []
    for name, (used, start) in trainings(config, clip, data, zero_shot, seed).items():

        def evaluations(todo, resume, name=name, used=used, start=start):
            again = dataclasses.replace(used, resume=resume)
            for done, model in steps_of(name, again, data, clip, start):
                if done in todo:
                    if name in ("FLYP", "CaRot"):
                        with contextlib.redirect_stdout(io.StringIO()):  # it has been said
                            model = carot.as_classifier(used, data, clip, model)
                    yield done, er_study.score(model, bench.sets)

        recipe = used.batch, used.warmup, used.weight_decay, used.epochs
        key = [zero_shot.state_dict(), recipe, *fingerprints(data)]
        own = dataclasses.replace(config, lr=used.lr, seed=seed)
        per_epoch = common.steps_of_epoch(len(data.train.labels), used.batch)
        steps = er_study.cadence(per_epoch, used.epochs)
        run = own, bench, name + COURSE, "zero-shot"
        found += er_study.record(*run, key, steps, evaluations)
    return found


# --- tables ---------------------------------------------------------------------------------------


def at_accuracy(points, accuracy):
    """ER where a run's ID accuracy first passes `accuracy`, interpolated in logit(ID); or nan."""
    acc_id, er = (np.array([getattr(p, name) for p in points]) for name in ("id", "er"))
    before = np.maximum.accumulate([0, *acc_id])[:-1]
    high = (acc_id > before) & (acc_id < 1)  # its new highs
    if not high.any():
        return np.nan
    ends = {"left": np.nan, "right": np.nan}
    return float(np.interp(logit(accuracy), logit(acc_id[high]), er[high], **ends))


def cell(shares):
    """er_study.over_runs; '-' if a run has none."""
    return "-" if np.isnan(shares).any() else er_study.over_runs(shares)


def print_at(runs, shift):
    """ER at equal ID accuracies and at the end: of one run with its saved interval (models and
    images), of several the mean with the interval of the mean over runs.
    """
    lines = []
    for name, seeds in runs.items():
        cells = [cell([at_accuracy(own, a) for own in seeds.values()]) for a in AT]
        ends = [own[-1] for own in seeds.values()]
        last = er_study.over_runs([p.er for p in ends])
        if len(ends) == 1:
            last = er_study.in_points(ends[0].er, ends[0].er_lo, ends[0].er_hi)
        last += " *" * any(p.extrapolated for p in ends)
        lines.append([name, *cells, f"{100 * np.mean([p.id for p in ends]):.1f}", last])
    header = ["run", *(f"ID {100 * a:g}" for a in AT), "last ID", "last ER [95 %]"]
    title = f"ER on {shift} in points at equal ID accuracy; -: not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))
    differences(runs, shift)


def differences(runs, shift):
    """The same less the first row's: runs of one seed in pairs, interval of the mean over pairs."""
    (first, base), *others = runs.items()
    lines = []
    for name, own in others:
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        if pairs:
            gaps = [[at_accuracy(x, a) - at_accuracy(y, a) for x, y in pairs] for a in AT]
            gaps.append([x[-1].er - y[-1].er for x, y in pairs])
            lines.append([name, *map(cell, gaps)])
    if not lines:
        return
    header = [f"less {first}", *(f"ID {100 * a:g}" for a in AT), "last"]
    title = f"differences in ER on {shift}, runs of one seed in pairs [95 % over runs]"
    print("\n" + common.table(header, lines, title))


def print_points(points, shift):
    """Points of `methods`: accuracy, ECE and ER with its interval; mean over seeds."""
    lines = []
    of_shift, of_mean = (er_study.by_run(points, s) for s in (shift, "mean"))
    for name, seeds in of_shift.items():
        home, away = mean_of(seeds), mean_of(of_mean[name])
        cells = [f"{100 * home.id:.1f}", ece_cell(home.ece_id)]
        for p in (home, away):
            er = er_study.in_points(p.er, p.er_lo, p.er_hi)
            cells += [f"{100 * p.ood:.1f}", ece_cell(p.ece_ood), er]
        lines.append([name, *cells])
    header = ["method", "ID", "ECE", shift, "ECE", "ER [95 %]", "mean shift", "ECE", "ER [95 %]"]
    print("\n" + common.table(header, lines, "accuracy in %, ECE as a share, ER in points"))


def mean_of(seeds):
    """MethodPoint of a row of `methods`, mean over {seed: its one point}."""
    return er_study.average([own[0] for own in seeds.values()])


def ece_cell(share):
    return f"{share:.3f}".lstrip("0")


COURSE = " in training"  # ends the names of `courses`
FAMILIES = "Zero-shot,Linear classifier,E2E-FT,LP-FT,FLYP,CaRot,AdamW,L2-SP,Adam-SPD".split(",")
MARKS = {"": "o", " +WSE": "s", " +OSE": "D", " +VRF": "^"}


def figure_points(config, lines, points, in_training, shift):
    """ER of every method against its ID accuracy, on one shift and in the mean: colour by training,
    mark by ensemble, intervals where there is none; thin lines: the course of a training.
    """
    header, path = ["shift", "method", "id", "er", "lo", "hi"], f"{config.out}/figures/er_methods"
    with common.figure(path, header, columns=2) as ((axes,), numbers):
        for axis, s in zip(axes, (shift, "mean"), strict=True):
            er_study.id_axis(axis, lines[s if s in lines else shift], 0.76, 0.965)
            for name, seeds in er_study.by_run(points, s).items():
                numbers.append((s, name, *draw_point(axis, name, seeds)))
            for name, seeds in courses_of(in_training, s).items():
                numbers += [(s, name, *x) for x in draw_course(axis, name, seeds)]
            axis.set(ylabel="ER, points [95 %]")
            axis.set_title(f"ER on {s if s in lines else 'all shifts'}", fontsize=8)
        for ensemble, mark in MARKS.items():
            if ensemble:
                axes[0].plot([], [], mark, color="0.4", ms=4, label=f"the same{ensemble}")
        axes[0].legend(fontsize=6, loc="lower left", ncols=2)


def in_percent(p):
    """ID accuracy, ER and its interval, in percent and points."""
    return [100 * x for x in (p.id, p.er, p.er_lo, p.er_hi)]


def draw_point(axis, name, seeds):
    """A row of `methods`, mean over seeds.  -> `in_percent`"""
    family, _, ensemble = name.partition(" +")
    x, y, low, high = in_percent(mean_of(seeds))
    mark, colour = MARKS[f" +{ensemble}" if ensemble else ""], f"C{FAMILIES.index(family)}"
    spread, label = (None, None) if ensemble else ([[y - low], [high - y]], name)
    look = {"fmt": mark, "color": colour, "ms": 4, "lw": 0.8, "label": label}
    axis.errorbar(x / 100, y, spread, **look)
    return x, y, low, high


def draw_course(axis, name, seeds):
    """The trajectories of a method's trainings.  -> rows of `in_percent`"""
    colour, rows = f"C{FAMILIES.index(name.removesuffix(COURSE))}", []
    for own in seeds.values():
        look = {"color": colour, "lw": 0.6, "alpha": 0.6, "zorder": 1}
        axis.plot([p.id for p in own], [100 * p.er for p in own], **look)
        rows += map(in_percent, own)
    return rows


def courses_of(points, shift):
    """er_study.by_run of the points of `courses`, in the order of FAMILIES."""
    runs = er_study.by_run(points, shift)
    return {f + COURSE: runs[f + COURSE] for f in FAMILIES if f + COURSE in runs}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {"strategies": strategies, "difficulty": difficulty}
    known |= {"pretraining": pretraining, "methods": methods}
    axis = argv.pop(0) if argv and not argv[0].startswith("-") else "strategies"
    (axis,) = common.choose(axis, known, "the first word")
    config = common.parse(Config, argv, __doc__)
    if config.plot:
        bench, points = er_published.saved(config.plot, read)
    else:
        config, *world, bench = er_study.prepare(tuple(argv))
        points = []
        for seed in range(config.seed, config.seed + config.seeds):
            points += known[axis](config, *world, bench, seed)
    lines, shift = bench.lines, er_study.best_line(bench.lines)
    er_study.print_lines(bench)
    if axis == "methods":
        rows = [p for p in points if p.run.partition(" +")[0] in FAMILIES]
        points = [p for p in points if p.run.endswith(COURSE)]
        print_points(rows, shift)
        figure_points(config, lines, rows, points, shift)
    for s in (shift, "mean"):
        runs = courses_of(points, s) if axis == "methods" else er_study.by_run(points, s)
        if runs:
            print_at(runs, s)
    if axis != "methods":
        er_published.figure_shifts(config, lines, points, (shift, "mean"), f"er_{axis}")
    return points


if __name__ == "__main__":
    common.run(main)
