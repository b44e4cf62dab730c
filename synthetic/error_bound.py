"""The error bound of CaRot: Towards Calibrated Robust Fine-Tuning of Vision-Language Models.
Oh, Lim, Kim, Han, Yun, Choo, Hauptmann, Cheng, Song; NeurIPS 2024; arXiv 2311.01723. Sec. 5.1.

The paper bounds the calibration error and the squared error under shift (OOD) by terms that need
the training distribution (ID) only: the ID calibration error, and one over the smallest singular
value of the covariance of the ID representations. Its study on Gaussians trains small networks with
a constraint for each term, orthogonality (OC) and self-distillation (SD), in many strengths, and
finds that networks with larger terms have larger OOD errors. So does this script look.

    Ineq. (1), (2)  sigma_min(Sigma~)                    sigma_min
    Eq. (4), (5)    the two constraints                  gaussians.py: orthogonality, distillation
    Sec. 5.1        four objectives, 111 models          settings, train_all
    Fig. A          data and shift                       gaussians.py: draw, shifted; figure_3
    Fig. 3          abscissa: average of the two terms   abscissa
                    Pearson correlation                  link
    Table 1         best of each objective               print_table_1

    python synthetic/error_bound.py                # 2 x 111 networks: 2 to 4 minutes
    python synthetic/error_bound.py --strengths 3  # a first look, 2 x 30 networks: 1 minute

Much of the experiment is not stated. Four things that data can tell apart are called readings here:
which mean x1 is shifted to, one logit or two, which representation sigma_min is of, and what an
average of two quantities of different size is. All are computed, and one table shows them together;
the options choose which one Fig. 3 and Table 1 show. The rest are constants and defaults of ours,
each marked. No number of Table 1 or Fig. 3 is known to us.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gaussians  # noqa: E402

import common  # noqa: E402
from common import arg  # noqa: E402

OBJECTIVES = ("none", "OC", "SD", "OC+SD")  # stated
COLOURS = dict(zip(OBJECTIVES, ("black", "tab:blue", "tab:orange", "tab:green"), strict=True))
SHIFTS = ("centre", "side", "alike")
# (representation, average); with the input's sigma_min, one for all models, the ECE alone decides
ABSCISSAS = {1: [("input", "raw"), ("penultimate", "raw"), ("penultimate", "scaled")]}
ABSCISSAS[2] = [*ABSCISSAS[1], ("output", "raw"), ("output", "scaled")]
LEVELS = ("pooled", "objective", "setting")
ERRORS = ("MSE", "ECE")  # of OOD: Ineq. (2), Ineq. (1)
# Not stated: from strengths without a visible effect to ones at which the constraint is met
WEAKEST, STRONGEST = 0.01, 100.0
STRONG = 0.7  # what "strong correlation" means in our sentences


@dataclass
class Config:
    # The readings that Fig. 3 and Table 1 show; none is stated
    shift: str = arg("centre", "x1's mean moves to: see gaussians.shifted", "centre side alike")
    logits: int = arg(2, "columns of the last weight matrix", least=1, most=2)
    measured: str = arg("penultimate", "sigma_min is of", "input penultimate output")
    average: str = arg("raw", "of 1/sigma_min and ECE: plain, or of z-scores", "raw scaled")
    # Stated: 111 models. 3 + 3 x 12 x 3 = 111 is our guess at how they come about
    strengths: int = arg(12, "of each constrained objective; OC+SD raises both together", least=2)
    repeats: int = arg(3, "of everything, each with training data of its own; Table 1", least=2)
    # Not stated; ours, and not tuned: they are those of the pilot that this repository began with
    train: int = arg(4000, "training samples, 4 per dimension", least=2)
    test: int = arg(5000, "ID test samples; more than dimensions", least=1001)
    hidden: int = arg(64, "width of the first layer", least=1)
    penultimate: int = arg(16, "width of the second layer", least=2)
    epochs: int = arg(15, "of Adam; networks then fit their flipped labels, too", least=1)
    batch: int = arg(128, "samples a step", least=1)
    lr: float = arg(1e-3, "Adam's own default")
    seed: int = arg(0, "of everything")
    out: str = arg("runs/error_bound", "folder for caches, results, figures")
    given: frozenset = frozenset()  # names of the settings that the user typed; no option itself


# --- method: the terms of the bound, and the correlation ------------------------------------------


def sigma_min(z):
    """Ineq. (1), (2): smallest singular value of Sigma~ = E[z~ z~^T], z~ the standardised features:
    of a correlation matrix. Constant features (dead ReLUs) are left out.  [G, N, D] -> [G]
    """
    z = z.double()
    deviation = z.std(1, correction=0, keepdim=True)
    alive = deviation > 1e-9 * z.abs().amax(1, keepdim=True)
    z = torch.where(alive, (z - z.mean(1, keepdim=True)) / deviation, 0)
    values = torch.linalg.eigvalsh(z.mT @ z / z.shape[1])  # ascending, a zero for each dead feature
    dead = (~alive).sum(2).clamp_max(z.shape[2] - 1)
    return values.gather(1, dead)[:, 0]


def abscissa(sigma, ece, average="raw"):
    """Fig. 3: (1 / sigma_min + ID ECE) / 2; scaled: of the two's z-scores.  any shape twice"""
    terms = [1 / sigma, ece]
    if average == "scaled":
        terms = [(v - v.mean()) / (v.std() or 1.0) for v in terms]
    return sum(terms) / 2


def pearson(x, y):
    """Over the last axis; nan if x or y is constant.  [..., n], [..., n] -> [...]"""
    x, y = (v - v.mean(-1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def ranks(v):
    """Spearman's correlation is Pearson's of these.  any shape"""
    from scipy.stats import rankdata

    return rankdata(v).reshape(v.shape)


def centred(v, level):
    """v [S, R], less the mean of its objective or of its setting: what is left is inside them."""
    if level == "pooled":
        return v
    if level == "setting":
        return v - v.mean(1, keepdims=True)
    return np.concatenate([block - block.mean() for block in blocks(v)])


def blocks(v):
    """One array per objective: the first setting of `settings`, and three equal parts."""
    return [v[:1], *np.split(v[1:], 3)]


def link(x, y, level="pooled", draws=1000):
    """Pearson's correlation of x and y [S settings, R repeats] after `centred`, and its 95 %
    interval from a bootstrap that draws strengths inside their objective, and repeats, both with
    replacement: all models of a repeat share their data, all of a setting their constraint.
    """
    x, y = centred(x, level), centred(y, level)
    rng = np.random.default_rng(0)
    rows = [rng.choice(block, (draws, len(block))) for block in blocks(np.arange(len(x)))]
    rows = np.concatenate(rows, 1)[:, :, None]
    columns = rng.integers(x.shape[1], size=(draws, 1, x.shape[1]))
    drawn = pearson(*(v[rows, columns].reshape(draws, -1) for v in (x, y)))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(pearson(x.ravel(), y.ravel())), float(low), float(high)


# --- train ----------------------------------------------------------------------------------------


def settings(config):
    """[(objective, lambda_OC, lambda_SD)]: none, then the strengths of each other objective."""
    found = [("none", 0.0, 0.0)]
    for objective in OBJECTIVES[1:]:
        for strength in np.geomspace(WEAKEST, STRONGEST, config.strengths):
            terms = objective.split("+")
            found.append((objective, strength * ("OC" in terms), strength * ("SD" in terms)))
    return found


def generator(config, use, *numbers):
    uses = ("test", "train", "order", "start")
    return np.random.default_rng([config.seed, uses.index(use), *numbers])


def test_sets(config):
    """{"ID" and the three readings of OOD: x [N, 1000]}, labels [N]; of all models."""
    x, s, y = gaussians.draw(generator(config, "test"), config.test)
    return {"ID": x, **{k: gaussians.shifted(x, s, k) for k in SHIFTS}}, y


def train_all(config, sets, y):
    """{logits: {column: [S, R]}}. Each repeat is kept in two parts, networks without and with a
    teacher, so that an interrupted run goes on from the last part.
    """
    found, half = {}, config.strengths + 1  # none and OC come first and have no teacher
    for logits in ABSCISSAS:
        repeats = []
        for repeat in range(config.repeats):
            plain = part(config, sets, y, logits, repeat, range(half))
            students = range(half, len(settings(config)))
            # Born-Again: the teacher is the trained network without constraints, of the same data.
            # Not stated: that of OC+SD could have been trained with OC.
            taught = part(config, sets, y, logits, repeat, students, plain["teacher"])
            repeats.append({k: torch.cat([plain[k], taught[k]]) for k in plain if k != "teacher"})
        found[logits] = {k: torch.stack([r[k] for r in repeats], 1).numpy() for k in repeats[0]}
    return found


def part(config, sets, y, logits, repeat, which, teacher=None):
    """What `measure` finds of the networks of some settings in one repeat: from the cache, or new.
    All of a repeat see the same data in the same order, and each begins with weights of its own.
    """

    def compute():
        x, _, labels = gaussians.draw(generator(config, "train", repeat), config.train)
        rngs = [generator(config, "start", repeat, number) for number in which]
        begin = gaussians.start(config, logits, rngs)
        _, *lambdas = zip(*(settings(config)[number] for number in which), strict=True)
        lambdas = (torch.tensor(v, dtype=torch.float32) for v in lambdas)
        order = generator(config, "order", repeat)
        parameters = gaussians.fit(config, begin, x, labels, *lambdas, order, teacher)
        first = gaussians.forward(parameters, x)[1][0]  # of `which`; number 0 has no constraint
        return {"teacher": first} | measure(parameters, sets, y)

    names = "strengths train test hidden penultimate epochs batch lr seed".split()
    key = [{k: getattr(config, k) for k in names}, logits, repeat, list(which)]
    code = (gaussians.draw, gaussians.shifted, gaussians.start, gaussians.fit, settings, measure)
    key += [common.code_of(function) for function in code]
    began = time.time()
    found = common.cached(config, f"{logits} logits", key, compute)
    who = "with a teacher" if teacher is not None else "without a teacher"
    words = f"logits {logits}, repeat {repeat + 1} of {config.repeats}: {len(which)} networks {who}"
    print(f"{words}, {time.time() - began:.0f} s", flush=True)
    return found


def measure(parameters, sets, y):
    """{column: [G]} in fp64: sigma_min of two representations, errors on every test set."""
    found = {}
    for name, x in sets.items():
        penultimate, logits = gaussians.forward(parameters, x)
        probabilities = logits.double().softmax(2)
        if name == "ID":
            found["sigma penultimate"] = sigma_min(penultimate)
            found["sigma output"] = sigma_min(logits)  # of one logit: 1
        found[f"{name} MSE"] = (probabilities[:, :, 1] - y).square().mean(1)
        for metric, of in (("ECE", common.ece), ("accuracy", common.accuracy)):
            values = [of(p, y) for p in probabilities]
            found[f"{name} {metric}"] = torch.tensor(values, dtype=torch.double)
    return found


# --- evaluate -------------------------------------------------------------------------------------


def abscissa_of(found, measured, average):
    return abscissa(found[f"sigma {measured}"], found["ID ECE"], average)


def all_links(trained):
    """{(logits, representation, average, shift): {(error, level): (value, low, high)}}"""
    links = {}
    for logits, abscissas in ABSCISSAS.items():
        found = trained[logits]
        for measured, average in abscissas:
            x = abscissa_of(found, measured, average)
            for shift in SHIFTS:
                links[logits, measured, average, shift] = {
                    (error, level): link(x, found[f"{shift} {error}"], level)
                    for error in ERRORS
                    for level in LEVELS
                }
    return links


def shown(value, low, high):
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]".replace("0.", ".")


def print_readings(links):
    """The table of readings: where does the paper's correlation appear, and at which level?"""
    head = ["logits", "sigma_min of", "average", "shift"]
    head += [f"{error}: {level}" for error in ERRORS for level in LEVELS]
    rows = [[*names, *(shown(*v) for v in of.values())] for names, of in links.items()]
    print("\n" + common.table(head, rows, "Pearson correlation with the OOD error by reading"))
    print("pooled: over all models; objective, setting: after subtracting the mean of each. The")
    print("input's sigma_min is the same for all models: the correlation is then that of ID ECE.")


def print_table_1(config, found):
    """Table 1: for each objective the strength of least OOD MSE, mean of the repeats."""
    sigma = f"sigma {config.measured}"
    columns = [sigma, "ID ECE", f"{config.shift} MSE", f"{config.shift} ECE"]
    columns += ["ID accuracy", f"{config.shift} accuracy"]
    rows = []
    for block in blocks(np.arange(len(found["ID ECE"]))):
        best = block[found[f"{config.shift} MSE"][block].mean(1).argmin()]
        objective, *lambdas = settings(config)[best]
        row = [objective, *(f"{value:.2g}" for value in lambdas)]
        for column in columns:
            mean, low, high = common.interval(found[column][best])
            row.append(f"{mean:.4f} +- {(high - low) / 2:.4f}")
        rows.append(row)
    title = f"Table 1: strength of least OOD MSE, mean of {config.repeats}, 95 % interval (t)"
    print("\n" + common.table(["", "lambda_OC", "lambda_SD", *columns], rows, title))
    print("none has one strength, the others the best of several: a small head start")


def figure_3(config, found, sets, y):
    """Fig. A and Fig. 3: the data, and the OOD errors against the average of the bound's terms."""
    x = abscissa_of(found, config.measured, config.average)
    header = ["objective", "lambda_OC", "lambda_SD", "repeat", "abscissa", *found]
    with common.figure(f"{config.out}/figures/fig_3", header, columns=3) as (axes, numbers):
        for name, marker in (("ID", "o"), (config.shift, "x")):
            for label, colour in ((0, "tab:red"), (1, "tab:purple")):
                rows = sets[name][:600][y[:600] == label]
                sums = [rows[:, part].sum(1) / 20 for part in (gaussians.X1, gaussians.X2)]
                text = f"{'ID' if name == 'ID' else 'OOD'}, y = {label}"
                axes[0, 0].plot(*sums, marker, ms=2.5, color=colour, alpha=0.5, label=text)
        axes[0, 0].set(xlabel="sum of x1 / 20", ylabel="sum of x2 / 20", title="the data (Fig. A)")
        axes[0, 0].legend(markerscale=2, fontsize=7)
        for axis, error in zip(axes[0, 1:], ERRORS, strict=True):
            of = found[f"{config.shift} {error}"]
            parts = zip(COLOURS.items(), blocks(x), blocks(of), strict=True)
            for (objective, colour), some_x, some_y in parts:
                r = f": r = {pearson(some_x.ravel(), some_y.ravel()):+.2f}"
                text = objective + (r if len(some_x) > 1 else "")  # none: too few models
                axis.plot(some_x.ravel(), some_y.ravel(), "o", ms=3, color=colour, label=text)
            axis.set(xlabel=f"{config.average} average of 1/sigma_min and ID ECE")
            axis.set(ylabel=f"OOD {error}", title=f"all: r = {shown(*link(x, of))}")
            axis.legend(fontsize=7)
        for setting, of in enumerate(settings(config)):
            for r in range(config.repeats):
                numbers.append((*of, r, x[setting, r], *(v[setting, r] for v in found.values())))


def strong(links, level):
    """In how many readings is r at least STRONG, with an interval above 0, for both errors?"""
    names = []
    for (_, measured, *_), of in links.items():
        found = [of[error, level] for error in ERRORS]
        if all(value >= STRONG and low > 0 for value, low, _ in found):
            names.append(measured)
    words = [f"{names.count(name)} of {name}" for name in dict.fromkeys(names)]
    return f"{len(names)} of {len(links)}" + (f" ({', '.join(words)})" if words else "")


def summary(config, links, found):
    """Three sentences, computed from the numbers."""
    own = links[config.logits, config.measured, config.average, config.shift]
    sigma, ece = found[f"sigma {config.measured}"], found["ID ECE"]
    x = abscissa(sigma, ece, config.average)
    print("\n1. In the reading of Fig. 3, over all models, the correlations are")
    for error in ERRORS:
        y = found[f"{config.shift} {error}"]
        pearsons, spearmans = own[error, "pooled"], link(ranks(x), ranks(y))
        print(f"   OOD {error}: Pearson {shown(*pearsons)}, Spearman {shown(*spearmans)};")
        print(f"   with 1/sigma_min alone {link(1 / sigma, y)[0]:+.2f},", end=" ")
        print(f"with ID ECE alone {link(ece, y)[0]:+.2f}.")
    print(f"2. Readings in which both errors have a strong one (r >= {STRONG}, interval above 0),")
    print(f"   by what sigma_min is of: over all models {strong(links, 'pooled')},")
    print(f"   inside the objectives {strong(links, 'objective')}.")
    print(
        "3. The same among networks trained alike, with one constraint in one strength, that differ"
    )
    print(f"   in their training data and first weights: {strong(links, 'setting')}.")


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    if (config.measured, config.average) not in ABSCISSAS[config.logits]:
        problem = f"--measured {config.measured} --average {config.average}: all models have one"
        advice = "measure another representation, or --average raw with input"
        raise common.InputError(f"{problem} sigma_min with --logits {config.logits}; {advice}")
    sets, y = test_sets(config)
    trained = train_all(config, sets, y)
    of_input = sigma_min(sets["ID"][None]).item()
    for found in trained.values():
        found["sigma input"] = np.full_like(found["ID ECE"], of_input)
    links = all_links(trained)
    found = trained[config.logits]
    print_readings(links)
    print_table_1(config, found)
    figure_3(config, found, sets, y)
    summary(config, links, found)
    return trained, links


if __name__ == "__main__":
    common.run(main)
