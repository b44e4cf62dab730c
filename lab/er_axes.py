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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import er_study  # noqa: E402
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


def mixed(config, data, clip, zero_shot, bench, seed):
    """Trajectory over alpha (as step / 10): zero-shot and fine-tuned weights, interpolated."""
    import vrf

    tuned, between = copy.deepcopy(zero_shot), copy.deepcopy(zero_shot)
    used = dataclasses.replace(config, lr=RATE, seed=seed)
    common.fine_tune(used, f"zero-shot, lr {RATE:g}", tuned, data.train, clip)  # or read

    def evaluations(todo, resume):
        for step in sorted(todo):
            weights = vrf.wse(zero_shot.state_dict(), tuned.state_dict(), step / 10)
            between.load_state_dict(weights)
            yield step, er_study.score(bench, between)

    setting = er_study.Setting("weights mixed", "zero-shot", RATE, seed, config.epochs)
    key = [zero_shot.state_dict(), tuned.state_dict(), *fingerprints(data)]
    return er_study.record(config, bench, setting, key, range(11), evaluations)


def fingerprints(data):
    """Fingerprints of the sets of a study."""
    return [common.fingerprint(s) for s in (data.train, data.test, *data.shifts)]


def strategies(config, data, clip, zero_shot, bench, seed):
    """E10: points of the trajectories."""
    from lab import pretrain_clip

    images, labels, _ = pretrain_clip.corpus(size=2048, seed=seed + 100)
    buffer = replayed(pretrain_clip.normalise(images), labels)
    args = config, data, clip, zero_shot, bench
    kinds = {f"zero-shot, lr {RATE:g}": None}
    kinds |= {"distillation": distilled(zero_shot), "replay": buffer}
    found = []
    for name, loss in kinds.items():
        setting = er_study.Setting(name, "zero-shot", RATE, seed, config.epochs)
        found += er_study.follow(*args, setting, loss)
    name, rate = f"head-only, lr {config.lr_head:g}", config.lr_head
    head = er_study.Setting(name, "head-only", rate, seed, config.epochs)
    return [*found, *er_study.follow(*args, head), *mixed(*args, seed)]


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
    found = []
    for which in ("easiest", "random", "hardest"):
        rows = subset(score["score"], y, which, PER_CLASS, seed)
        images = data.train.images[rows.numpy()]
        train = dataclasses.replace(data.train, images=images, labels=y[rows])
        args = config, dataclasses.replace(data, train=train), clip, zero_shot, bench
        name, epochs = f"{which} {len(rows)}", 3 * config.epochs
        found += er_study.follow(*args, er_study.Setting(name, "zero-shot", RATE, seed, epochs))
    return found


# --- pre-training ---------------------------------------------------------------------------------


def pretraining(config, data, clip, zero_shot, bench, seed, steps=1500):
    """E5, E6: no pre-training (er_study.py's random start), and CLIPs of `steps` steps on fewer
    images, or as many of fewer domains; each fine-tuned with a new head, so that all start at
    chance. As many steps as the shipped CLIP has: after 300 none of the five is past chance by
    much (zero-shot 15 to 31 % on ID) and there is no ER to compare. 40 CPU minutes.
    """
    from lab import pretrain_clip

    name, rate = f"random, lr {config.lr_random:g}", config.lr_random
    none = er_study.Setting(name, "random", rate, seed, config.epochs_random)
    found = er_study.follow(config, data, clip, zero_shot, bench, none)
    for name, (domains, size) in CORPORA.items():
        weights = Path(config.out) / "pretrained" / f"{common.slug(name)}-{steps}-{seed}.npz"
        if not weights.is_file():
            weights.parent.mkdir(parents=True, exist_ok=True)
            print(f"pre-training on {name}, {steps} steps")
            pretrain_clip.save(
                pretrain_clip.pretrain(steps, domains, size, seed, log=100)[0], weights
            )
        own = dataclasses.replace(config, weights=str(weights))
        args = own, data, *common.zero_shot(own, data), bench
        setting = er_study.Setting(name, "new-head", RATE, seed, config.epochs)
        found += er_study.follow(*args, setting)
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


def methods(config, data, clip, zero_shot, bench, seed):
    """Every fine-tuned model of this repository, with and without ensembles, as points with their
    ECE. One file, a row of the table as a run of one checkpoint; nothing tuned on the test sets.
    """
    args, models = tuned(config, seed)
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
            setting = er_study.Setting(row, "zero-shot", 0.0, seed, 0)
            points += with_ece(er_study.measure(bench, setting, 0, right), ece)
    er_study.write(f"{config.out}/trajectories/methods-seed-{seed}.csv", points)
    return points + courses(config, data, clip, zero_shot, bench, seed)


def with_ece(points, ece):
    """Points of `measure`, and the ECE of the same model: {set: share}."""
    ece = ece | {"mean": common.mean_shift(ece)}
    return [dataclasses.replace(p, ece_id=ece[common.ID], ece_ood=ece[p.shift]) for p in points]


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
                    yield done, er_study.score(bench, model)

        setting = er_study.Setting(name + COURSE, "zero-shot", used.lr, seed, used.epochs)
        recipe = used.batch, used.warmup, used.weight_decay
        key = [zero_shot.state_dict(), recipe, *fingerprints(data)]
        per_epoch = common.steps_of_epoch(len(data.train.labels), used.batch)
        steps = er_study.cadence(per_epoch, used.epochs)
        found += er_study.record(config, bench, setting, key, steps, evaluations)
    return found


# --- tables ---------------------------------------------------------------------------------------


def print_at(groups, shift):
    """ER at equal ID accuracies and at the end: of one run with its saved interval (models and
    images), of several the mean with the interval of the mean over runs.
    """
    lines = []
    for name, runs in groups.items():
        curves = [er_study.curve(points, shift) for points in runs.values()]
        cells = [er_study.over_runs([er_study.at_accuracy(c, a) for c in curves]) for a in AT]
        last = er_study.over_runs([c["er"][-1] for c in curves])
        if len(curves) == 1:
            low, high = (100 * curves[0][x][-1] for x in ("er_lo", "er_hi"))
            last += f" [{low:+.1f}, {high:+.1f}]"
        last += " *" * any(c["extrapolated"][-1] for c in curves)
        at_home = 100 * np.mean([c["id"][-1] for c in curves])
        lines.append([name, *cells, f"{at_home:.1f}", last])
    header = ["run", *(f"ID {100 * a:g}" for a in AT), "last ID", "last ER [95 %]"]
    title = f"ER on {shift} in points at equal ID accuracy; -: not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))
    differences(groups, shift)


def differences(groups, shift):
    """The same less the first row's: runs of one seed in pairs, interval of the mean over pairs."""
    (first, base), *others = groups.items()
    lines, at, curve = [], er_study.at_accuracy, er_study.curve
    for name, own in others:
        seeds = [seed for seed in own if seed in base]
        pairs = [(curve(own[seed], shift), curve(base[seed], shift)) for seed in seeds]
        if pairs:
            gaps = [[at(x, a) - at(y, a) for x, y in pairs] for a in AT]
            gaps.append([x["er"][-1] - y["er"][-1] for x, y in pairs])
            lines.append([name, *map(er_study.over_runs, gaps)])
    if not lines:
        return
    header = [f"less {first}", *(f"ID {100 * a:g}" for a in AT), "last"]
    title = f"differences in ER on {shift}, runs of one seed in pairs [95 % over runs]"
    print("\n" + common.table(header, lines, title))


def print_points(groups, shift):
    """Points of `methods`: accuracy, ECE and ER with its interval; mean over seeds."""
    lines = []
    for name, runs in groups.items():
        home, away = (first_of(runs, s) for s in (shift, "mean"))
        cells = [f"{100 * home['id']:.1f}", ece_cell(home["ece_id"])]
        for p in (home, away):
            er = er_study.with_interval(*(100 * p[k] for k in ("er", "er_lo", "er_hi")))
            cells += [f"{100 * p['ood']:.1f}", ece_cell(p["ece_ood"]), er]
        lines.append([name, *cells])
    header = ["method", "ID", "ECE", shift, "ECE", "ER [95 %]", "mean shift", "ECE", "ER [95 %]"]
    print("\n" + common.table(header, lines, "accuracy in %, ECE as a share, ER in points"))


def first_of(runs, shift):
    """{name of a number: its mean over seeds} of the first checkpoints; shares."""
    curves = [er_study.curve(points, shift) for points in runs.values()]
    names = ("id", "ood", "er", "er_lo", "er_hi", "ece_id", "ece_ood")
    return {name: np.mean([c[name][0] for c in curves]) for name in names}


def ece_cell(share):
    return f"{share:.3f}".lstrip("0")


COLUMNS = ("id", "er", "er_lo", "er_hi")
COURSE = " in training"  # ends the names of `courses`
FAMILIES = "Zero-shot,Linear classifier,E2E-FT,LP-FT,FLYP,CaRot,AdamW,L2-SP,Adam-SPD".split(",")
MARKS = {"": "o", " +WSE": "s", " +OSE": "D", " +VRF": "^"}


def figure_points(config, lines, groups, in_training, shift):
    """ER of every method against its ID accuracy, on one shift and in the mean: colour by training,
    mark by ensemble, intervals where there is none; thin lines: the course of a training.
    """
    header, path = ["shift", "method", "id", "er", "lo", "hi"], f"{config.out}/figures/er_methods"
    with common.figure(path, header, columns=2) as ((axes,), numbers):
        for axis, s in zip(axes, (shift, "mean"), strict=True):
            er_study.id_axis(axis, lines[s if s in lines else shift], 0.76, 0.965)
            for name, runs in groups.items():
                numbers.append((s, name, *draw_point(axis, name, runs, s)))
            for name, runs in in_training.items():
                numbers += [(s, name, *x) for x in draw_course(axis, name, runs, s)]
            axis.set(ylabel="ER, points [95 %]")
            axis.set_title(f"ER on {s if s in lines else 'all shifts'}", fontsize=8)
        for ensemble, mark in MARKS.items():
            if ensemble:
                axes[0].plot([], [], mark, color="0.4", ms=4, label=f"the same{ensemble}")
        axes[0].legend(fontsize=6, loc="lower left", ncols=2)


def draw_point(axis, name, runs, shift):
    """A row of `methods`, mean over seeds.  -> ID accuracy, ER, its interval; percent, points"""
    family, _, ensemble = name.partition(" +")
    p = first_of(runs, shift)
    x, y, low, high = (100 * p[k] for k in COLUMNS)
    mark, colour = MARKS[f" +{ensemble}" if ensemble else ""], f"C{FAMILIES.index(family)}"
    spread, label = (None, None) if ensemble else ([[y - low], [high - y]], name)
    look = {"fmt": mark, "color": colour, "ms": 4, "lw": 0.8, "label": label}
    axis.errorbar(x / 100, y, spread, **look)
    return x, y, low, high


def draw_course(axis, name, runs, shift):
    """The trajectories of a method's trainings.  -> rows of percent and points"""
    colour, rows = f"C{FAMILIES.index(name.removesuffix(COURSE))}", []
    for points in runs.values():
        c = er_study.curve(points, shift)
        axis.plot(c["id"], 100 * c["er"], color=colour, lw=0.6, alpha=0.6, zorder=1)
        rows += zip(*(100 * c[k] for k in COLUMNS), strict=True)
    return rows


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {"strategies": strategies, "difficulty": difficulty}
    known |= {"pretraining": pretraining, "methods": methods}
    axis = argv.pop(0) if argv and not argv[0].startswith("-") else "strategies"
    (axis,) = common.choose(axis, known, "the first word")
    config = common.parse(Config, argv, __doc__)
    if config.plot:
        bench, points = er_published.saved(config.plot)
    else:
        config, *world, bench = er_study.prepare(argv)
        points = []
        for seed in range(config.seed, config.seed + config.seeds):
            points += known[axis](config, *world, bench, seed)
    groups, lines, shift = er_study.by_run(points), bench.lines, er_study.best_line(bench.lines)
    er_study.print_lines(bench)
    if axis == "methods":
        in_training = {f + COURSE: groups[f + COURSE] for f in FAMILIES if f + COURSE in groups}
        rows = {n: runs for n, runs in groups.items() if n.partition(" +")[0] in FAMILIES}
        print_points(rows, shift)
        figure_points(config, lines, rows, in_training, shift)
        groups = in_training
    for s in (shift, "mean"):
        if groups:
            print_at(groups, s)
    if axis != "methods":
        er_published.figure_shifts(config, lines, groups, (shift, "mean"), f"er_{axis}")
    return groups


if __name__ == "__main__":
    common.run(main)
