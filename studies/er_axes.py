"""Along which axes effective robustness (ER) moves; takes every flag of er_study.py.

    python studies/er_axes.py strategies   # plain, replay, distillation, weights mixed: E10
    python studies/er_axes.py difficulty   # easiest, random, hardest 100 images of each class: E7
    python studies/er_axes.py pretraining  # images and domains of pre-training: E5, E6
    python studies/er_axes.py methods      # VRF, CaRot and SPD of this repository, as points

All are compared at equal ID accuracy, never at equal epoch alone. E5 to E10: numbers of experiments
in our notes; the text known to us settles neither subset sizes nor the list of strategies, so all
numbers here are ours. Trajectories are those of er_study.py, in its folder, and read back from it.
"""

import contextlib
import copy
import dataclasses
import io
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import er_study  # noqa: E402
from data import scratch, trajectories  # noqa: E402
from studies import er_report  # noqa: E402

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
        right = er_study.score(bench, er_study.on_device(between), bench.images)
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
    """E7: fine-tuning on PER_CLASS images of each class, for as many steps as on all 3,000."""
    x, y = scratch.grey(data.train), data.train.labels
    key = [data.train.fingerprint, 0]
    score = common.cached(config, "difficulty", key, lambda: {"score": held_out_score(x, y)})
    paths, epochs = [], 3 * config.epochs
    for which in ("easiest", "random", "hardest"):
        rows = subset(score["score"], y, which, PER_CLASS, seed)
        images = data.train.images[rows.numpy()]
        train = dataclasses.replace(data.train, images=images, labels=y[rows])
        args = config, dataclasses.replace(data, train=train), clip, zero_shot, bench
        name = f"{which} {len(rows)}"
        paths.append(er_study.follow(*args, "zero-shot", RATE, epochs, seed, name))
    return paths


# --- pre-training ---------------------------------------------------------------------------------


def pretraining(config, data, clip, zero_shot, bench, seed, steps=1500):
    """E5, E6: no pre-training (er_study.py's random start), and CLIPs of `steps` steps on fewer
    images, or as many of fewer domains; each fine-tuned with a new head, so that all start at
    chance. As many steps as the shipped CLIP has: after 300 none of the five is past chance by
    much (zero-shot 15 to 31 % on ID) and there is no ER to compare. 40 CPU minutes.
    """
    from data import pretrain

    none = "random", config.lr_random, config.epochs_random, seed
    paths = [er_study.follow(config, data, clip, zero_shot, bench, *none)]
    for name, (domains, size) in CORPORA.items():
        weights = Path(config.out) / "pretrained" / f"{common.slug(name)}-{steps}-{seed}.npz"
        if not weights.is_file():
            weights.parent.mkdir(parents=True, exist_ok=True)
            print(f"pre-training on {name}, {steps} steps")
            pretrain.save(pretrain.pretrain(steps, domains, size, seed, log=100)[0], weights)
        own = dataclasses.replace(config, weights=str(weights))
        args = own, data, *common.zero_shot(own, data), bench
        paths.append(er_study.follow(*args, "new-head", RATE, config.epochs, seed, name))
    return paths


# --- every method of this repository --------------------------------------------------------------


def tuned(config, seed):
    """vrf.py's config, data, CLIP and {name: fine-tuned Classifier} of vrf.py, carot.py and spd.py:
    their training, their choices (strengths by ID val), read back if trained before.
    """
    import carot
    import spd
    import vrf

    def words(name, *more):
        return [
            "--device",
            config.device,
            "--seed",
            str(seed),
            "--out",
            f"{config.out}/{name}",
            *more,
        ]

    own = vrf.prepare(words("vrf"))
    models = vrf.train_models(*own, seed)
    theirs = carot.prepare(words("carot", "--methods", "FLYP,CaRot"))
    trained = carot.train_models(*theirs, seed)
    models |= {name: trained[name] for name in ("FLYP", "CaRot")}
    recipe, data = common.begin(spd.Config, words("spd"), spd.__doc__, spd.PRESETS)
    best, val = {}, own[1].val
    for name, (family, strength, make) in spd.recipes(recipe).items():
        model = spd.train(recipe, name, data, own[2], own[3], make, seed)
        right = common.predict(recipe, {"": model}, val, own[2])[""].right
        if family not in best or right.sum() > best[family][0]:
            best[family] = right.sum(), model, strength
    models |= {f: model for f, (_, model, _) in best.items()}
    return own[:3], models


def mixtures(config, data, clip, zero_shot, name, model, seed):
    """{row: {split: probabilities [N, C]}} of a fine-tuned model: alone, and with zero-shot by WSE,
    OSE and VRF as vrf.py has them, alpha and (a, b) by ID val.
    """
    import vrf

    models = {"ZS": zero_shot, "Fine-tuned": model}
    rows, pairs = vrf.evaluate(config, data, clip, models, seed)
    chosen = {r["method"].removeprefix("Fine-tuned "): r["choice"] for r in rows}
    pairs = {s: e for s, e in pairs["Fine-tuned"].items() if s != "val"}
    known = vrf.ensembles(config, vrf.ab_candidates(config, data.kind))
    out = {name: {s: e.raw[1] for s, e in pairs.items()}}
    between = copy.deepcopy(zero_shot)
    weights = vrf.wse(zero_shot.state_dict(), model.state_dict(), chosen["+WSE"])
    between.load_state_dict(weights)
    out[f"{name} +WSE"] = {
        s.name: common.predict(config, {"": between}, s, clip)[""].logits.softmax(1)
        for s in (data.test, *data.shifts)
    }
    for row in ("+OSE", "+VRF"):
        f = known[row][1]
        out[f"{name} {row}"] = {s: f(e, chosen[row]) for s, e in pairs.items()}
    return out


def methods(config, data, clip, zero_shot, bench, seed):
    """Every fine-tuned model of this repository, with and without ensembles, as points with their
    ECE. One file, a row of the table as a run of one checkpoint; nothing tuned on the test sets.
    """
    args, models = tuned(config, seed)
    path = Path(config.out) / "trajectories" / f"methods-seed-{seed}.csv"
    path.unlink(missing_ok=True)
    labels = {s.name: s.labels for s in (data.test, *data.shifts)}
    for name, model in models.items():
        if name in ("ZS", "LC"):
            name = {"ZS": "Zero-shot", "LC": "Linear classifier"}[name]
            parts = {
                s.name: common.predict(args[0], {"": model}, s, clip)[""]
                for s in (data.test, *data.shifts)
            }
            found = {name: {s: x.logits.softmax(1) for s, x in parts.items()}}
        else:
            found = mixtures(*args, models["ZS"], name, model, seed)
        for row, p in found.items():
            right = {s: (x.argmax(1) == labels[s]).numpy() for s, x in p.items()}
            ece = {s: common.ece(x, labels[s]) for s, x in p.items()}
            run = {"run": f"{row}, seed {seed}", "model": config.model, "init": "zero-shot"}
            run |= {"lr": 0, "seed": seed, "step": 0, "epoch": 0}
            trajectories.append(path, with_ece(er_study.measure(bench, run, right), ece, bench))
    return [path]


def trainings(config, data, clip, zero_shot, seed):
    """[(method, its config, rate, train)], as the scripts train them, Adam-SPD with strength 1.
    train(config, at) calls at(n, model_of) when n steps are done; model_of() -> Classifier.
    """
    import carot
    import spd
    import vrf

    def words(name, *more):
        return ["--device", config.device, "--out", f"{config.out}/{name}", *more]

    args = vrf.prepare(words("vrf", "--methods", "LC"))
    starts = vrf.train_models(*args, seed)
    contrastive = carot.prepare(words("carot", "--methods", "FLYP,CaRot"))[0]
    terms = {"oc": contrastive.oc, "sd": contrastive.sd, "cross": contrastive.cross_fnorm}
    held = common.begin(spd.Config, words("spd"), spd.__doc__, spd.PRESETS)[0]  # nothing mixed

    def plain(name, start, lr, used, at):
        model = copy.deepcopy(starts[start])
        given = used, f"{name}, seed {seed}", model, data.train, clip, lr, seed
        common.fine_tune(*given, probe=lambda done: at(done, lambda: model))

    def pairs(name, lambdas, used, at):
        def head_of(student):
            tuned = dataclasses.replace(clip, model=student.eval())
            with contextlib.redirect_stdout(io.StringIO()):  # what it says has been said
                return common.classifier(used, data, tuned, zero_shot.head.weight.device)

        def watch(done, module):
            at(done, partial(head_of, module.student))

        carot.fine_tune(used, f"{name}, seed {seed}", clip, data, seed, **lambdas, watch=watch)

    def projected(used, at):
        model = copy.deepcopy(zero_shot)
        loss = partial(F.cross_entropy, label_smoothing=used.smoothing)
        optimiser = spd.AdamSPD(model.parameters(), lr=used.lr, spd_lambda=1.0)
        given = used, f"Adam-SPD 1, seed {seed}", model, data.train, clip, used.lr, seed, optimiser
        common.fine_tune(
            *given,
            lambda images, labels: loss(model(images)[1], labels),
            lambda done: at(done, lambda: model),
            {"smoothing": used.smoothing},
        )

    ft = args[0]
    return [
        ("E2E-FT", ft, ft.lr, partial(plain, "E2E-FT", "ZS", ft.lr)),
        ("LP-FT", ft, ft.lr_lpft, partial(plain, "LP-FT", "LC", ft.lr_lpft)),
        ("FLYP", contrastive, contrastive.lr, partial(pairs, "FLYP", {})),
        ("CaRot", contrastive, contrastive.lr, partial(pairs, "CaRot", terms)),
        ("Adam-SPD", held, held.lr, projected),
    ]


def courses(config, data, clip, zero_shot, bench, seed):
    """Trajectories of the methods' own trainings. Paths."""
    paths, folder = [], Path(config.out) / "trajectories"
    for name, used, lr, train in trainings(config, data, clip, zero_shot, seed):
        per_epoch = math.ceil(len(data.train.labels) / used.batch)
        run = {"run": f"{name}{COURSE}, seed {seed}", "model": config.model, "init": "zero-shot"}
        run |= {"lr": lr, "seed": seed}
        recipe = {f: getattr(used, f) for f in ("epochs", "batch", "warmup", "weight_decay")}
        key = [zero_shot.state_dict(), run, recipe, bench.testbed.k, config.draws]
        key += [s.fingerprint for s in (data.train, *bench.splits.values())]
        file = f"{common.slug(run['run'])}-{common.hash_of(key)}.csv"

        def attempt(probe, resume, used=used, train=train):
            def at(done, model_of):
                probe(done, lambda: score_of(bench, model_of()))

            train(dataclasses.replace(used, resume=resume), at)

        path, steps = folder / file, er_study.cadence(per_epoch, used.epochs)
        args = config, bench, path, run, steps, per_epoch, attempt
        paths.append(er_study.recorded(*args))
    return paths


def score_of(bench, model):
    return er_study.score(bench, er_study.on_device(model), bench.images)


def with_ece(rows, ece, bench):
    """Rows of `measure`, and the ECE of the same model: {set: share}."""
    shifts = list(bench.lines)
    ece = ece | {"mean": float(np.mean([ece[s] for s in shifts]))}
    at_home = ece[bench.lines[shifts[0]].id]
    return [r | {"ece_id": at_home, "ece_ood": ece[r["shift"]]} for r in rows]


# --- tables ---------------------------------------------------------------------------------------


def print_at(groups, shift):
    """ER at equal ID accuracies and at the end: of one run with its saved interval (models and
    images), of several the mean with the interval of the mean over runs.
    """
    lines = []
    for name, runs in groups.items():
        curves = [er_report.curve(rows, shift) for rows in runs.values()]
        cells = [er_report.over_runs([er_report.at_accuracy(c, a) for c in curves]) for a in AT]
        last = er_report.over_runs([c["er"][-1] for c in curves])
        if len(curves) == 1:
            last += " [{:+.1f}, {:+.1f}]".format(*(100 * curves[0][x][-1] for x in ("lo", "hi")))
        last += " *" * any(c["outside"][-1] for c in curves)
        at_home = 100 * np.mean([c["id"][-1] for c in curves])
        lines.append([name, *cells, f"{at_home:.1f}", last])
    header = ["run", *(f"ID {100 * a:g}" for a in AT), "last ID", "last ER [95 %]"]
    title = f"ER on {shift} in points at equal ID accuracy; -: not passed; *: extrapolated"
    print("\n" + common.table(header, lines, title))
    differences(groups, shift)


def differences(groups, shift):
    """The same less the first row's: runs of one seed in pairs, interval of the mean over pairs."""
    by_seed = {
        name: {rows[0]["seed"]: er_report.curve(rows, shift) for rows in runs.values()}
        for name, runs in groups.items()
    }
    (first, base), *others = by_seed.items()
    lines = []
    for name, own in others:
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        if pairs:
            at = er_report.at_accuracy
            gaps = [[at(x, a) - at(y, a) for x, y in pairs] for a in AT]
            gaps.append([x["er"][-1] - y["er"][-1] for x, y in pairs])
            lines.append([name, *map(er_report.over_runs, gaps)])
    if not lines:
        return
    header = [f"less {first}", *(f"ID {100 * a:g}" for a in AT), "last"]
    title = f"differences in ER on {shift}, runs of one seed in pairs [95 % over runs]"
    print("\n" + common.table(header, lines, title))


def print_points(groups, shift):
    """Points of `methods`: accuracy, ECE and ER with its interval; mean over seeds."""
    lines = []
    for name, runs in groups.items():
        cells = []
        for s in (shift, "mean"):
            curves = [er_report.curve(rows, s) for rows in runs.values()]
            own = [r for rows in runs.values() for r in rows if r["shift"] == s]
            ood, er, lo, hi = (
                100 * np.mean([c[x][0] for c in curves]) for x in ("ood", "er", "lo", "hi")
            )
            ece = [np.mean([r[f"ece_{x}"] for r in own]) for x in ("id", "ood")]
            cells += [
                f"{ood:.1f}",
                f"{ece[1]:.3f}".lstrip("0"),
                f"{er:+.1f} [{lo:+.1f}, {hi:+.1f}]",
            ]
        at_home = f"{100 * np.mean([c['id'][0] for c in curves]):.1f}"
        lines.append([name, at_home, f"{ece[0]:.3f}".lstrip("0"), *cells])
    header = ["method", "ID", "ECE", shift, "ECE", "ER [95 %]", "mean shift", "ECE", "ER [95 %]"]
    print("\n" + common.table(header, lines, "accuracy in %, ECE as a share, ER in points"))


COURSE = " in training"  # ends the names of `courses`
FAMILIES = "Zero-shot,Linear classifier,E2E-FT,LP-FT,FLYP,CaRot,AdamW,L2-SP,Adam-SPD".split(",")
MARKS = {"": "o", " +WSE": "s", " +OSE": "D", " +VRF": "^"}


def figure_points(config, found, groups, in_training, shift):
    """ER of every method against its ID accuracy, on one shift and in the mean: colour by training,
    mark by ensemble, intervals where there is none; thin lines: the course of a training.
    """
    fig, (axes,) = common.new_figure(columns=2)
    numbers = []
    for axis, s in zip(axes, (shift, "mean"), strict=True):
        line = found[s if s in found else shift]
        er_report.id_axis(axis, line, 0.76, 0.965)
        for name, runs in groups.items():
            family, _, ensemble = name.partition(" +")
            c = [er_report.curve(rows, s) for rows in runs.values()]
            x, y, low, high = (
                100 * np.mean([x[k][0] for x in c]) for k in ("id", "er", "lo", "hi")
            )
            numbers.append((s, name, x, y, low, high))
            i = FAMILIES.index(family)
            look = {"fmt": MARKS[f" +{ensemble}" if ensemble else ""], "color": f"C{i}", "ms": 4}
            spread = None if ensemble else [[y - low], [high - y]]
            axis.errorbar(
                logit(x / 100), y, spread, lw=0.8, label=None if ensemble else name, **look
            )
        for name, runs in in_training.items():
            colour = f"C{FAMILIES.index(name.removesuffix(COURSE))}"
            for c in (er_report.curve(rows, s) for rows in runs.values()):
                axis.plot(logit(c["id"]), 100 * c["er"], color=colour, lw=0.6, alpha=0.6, zorder=1)
                shown = zip(*(100 * c[k] for k in ("id", "er", "lo", "hi")), strict=True)
                numbers += [(s, name, *x) for x in shown]
        axis.set(ylabel="ER, points [95 %]")
        text = er_report.caption(found[s]) if s in found else f"mean of {len(found)} shifts"
        axis.set_title(f"ER on {text}", fontsize=8)
    for ensemble, mark in MARKS.items():
        if ensemble:
            axes[0].plot([], [], mark, color="0.4", ms=4, label=f"the same{ensemble}")
    axes[0].legend(fontsize=6, loc="lower left", ncols=2)
    header = ["shift", "method", "id", "er", "lo", "hi"]
    common.save_figure(fig, f"{config.out}/figures/er_methods", header, numbers)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = {"strategies": strategies, "difficulty": difficulty}
    known |= {"pretraining": pretraining, "methods": methods}
    axis = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    (axis,) = common.choose(axis, known, "the first word") or ["strategies"]
    config = common.parse(er_study.Config, argv, __doc__)
    if config.plot:
        testbed, found, rows = er_report.saved(config, whole=axis != "methods")
    else:
        config, *world, bench = er_study.prepare(argv)
        testbed, found, rows = bench.testbed, bench.lines, []
        shifts = None if axis == "methods" else len(found)
        for seed in range(config.seed, config.seed + config.seeds):
            paths = known[axis](config, *world, bench, seed)
            paths += courses(config, *world, bench, seed) if axis == "methods" else []
            for path in paths:
                rows += trajectories.read(path, shifts)
    groups, shift = er_report.by_run(rows), er_report.best_line(found)
    er_report.print_lines(testbed, found)
    if axis == "methods":
        in_training = {f + COURSE: groups[f + COURSE] for f in FAMILIES if f + COURSE in groups}
        points = {n: runs for n, runs in groups.items() if n.partition(" +")[0] in FAMILIES}
        print_points(points, shift)
        figure_points(config, found, points, in_training, shift)
        groups = in_training
    for s in (shift, "mean"):
        if groups:
            print_at(groups, s)
    if axis != "methods":
        er_report.figure_er(config, testbed, found, groups, (shift, "mean"), f"er_{axis}")
    return groups


if __name__ == "__main__":
    common.run(main)
