"""Every method of this repository in one table, and a sample-wise ensemble without a training set.

    python lab/compare.py              # 1 run: 8 minutes of one core
    python lab/compare.py --seeds 5    # the table of docs/compare.md: 45 minutes of one core

E2E-FT with WSE, OSE and VRF, FLYP, CaRot, L2-SP and Adam-SPD are as vrf.py, carot.py and spd.py
train and choose them, each by its own recipe; everything that is chosen is chosen on ID val.

The rows "+entropy" are an extension, after DaWin (Oh et al., arXiv 2410.03782): the weight of FT is
its share of confidence, exp(-H_ft) / (exp(-H_zs) + exp(-H_ft)), H the entropy of a model's
prediction for the image. Nothing is stored and nothing is searched. Three forms are shown: of the
outputs, of the outputs with VRF's temperatures, and of the weights. DaWin mixes weights for groups
of similar images, found by a mixture of beta distributions; ours are ten equal bins of the weight.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # noqa: E402
import vrf  # noqa: E402
from lab import er_axes  # noqa: E402

BASE = "E2E-FT"  # of every difference in the table
BINS = 10


@dataclass
class Config(common.Run):
    data: str = common.arg("digits", "the recipes of all scripts are those of the digits")
    out: str = common.arg("runs/compare", "folder for checkpoints, caches, results, figures")


# --- method ---------------------------------------------------------------------------------------


def entropy(p):
    """H of each row, in nats.  [N, C] -> [N]"""
    return -torch.special.xlogy(p, p).sum(1)


def entropy_weight(p_zs, p_ft):
    """Weight of FT: exp(-H_ft) / (exp(-H_zs) + exp(-H_ft)).  2 x [N, C] -> [N], from 0 to 1"""
    return torch.sigmoid(entropy(p_zs) - entropy(p_ft))


def bin_of(w):
    """Which of the BINS equal bins of [0, 1] a weight is in.  [N] -> [N]"""
    return (w * BINS).long().clamp(max=BINS - 1)


# --- evaluate -------------------------------------------------------------------------------------


def mix_weights(config, data, clip, zero_shot, model, w):
    """{split: P [N, C]} of theta_zs and theta_ft mixed for each image's bin, by the bin's centre.
    w: {split: [N]}. A pass over all sets for every bin.
    """
    found = {}
    for b in range(BINS):
        between = copy.deepcopy(zero_shot)
        theta = vrf.wse(zero_shot.state_dict(), model.state_dict(), (b + 0.5) / BINS)
        between.load_state_dict(theta)
        for split, p in er_axes.probabilities(config, data, clip, between).items():
            whole = found.setdefault(split, torch.empty_like(p))
            inside = bin_of(w[split]) == b
            whole[inside] = p[inside]
    return found


def ensembles(config, data, clip, models, seed):
    """{row: {split: P [N, C]}} of E2E-FT mixed with zero-shot; alpha and (a, b) by ID val."""
    both = {"ZS": models["ZS"], BASE: models[BASE]}
    rows, studies = vrf.evaluate(config, data, clip, both, seed)
    alpha = {row.method.removeprefix(f"{BASE} "): row.choice for row in rows}
    raw, calibrated, found = studies[BASE]
    alpha["+OSE calibrated"] = vrf.ose_row("", seed, calibrated).choice
    tests = [split for split in raw if split != "val"]
    w = {s: entropy_weight(raw[s].p_zs, raw[s].p_ft) for s in tests}
    weights = vrf.wse(models["ZS"].state_dict(), models[BASE].state_dict(), alpha["+WSE"])
    between = copy.deepcopy(models["ZS"])
    between.load_state_dict(weights)

    def by_entropy(sets):
        mixed = {}
        for split in tests:
            p_zs, p_ft = sets[split].p_zs, sets[split].p_ft
            mixed[split] = vrf.vrf(p_zs, p_ft, entropy_weight(p_zs, p_ft))
        return mixed

    return {
        "+WSE": er_axes.probabilities(config, data, clip, between),
        "+OSE": vrf.ose_scores(raw, alpha["+OSE"]),
        "+OSE calibrated": vrf.ose_scores(calibrated, alpha["+OSE calibrated"]),
        "+VRF": found.p_vrf,
        "+entropy, outputs": by_entropy(raw),
        "+entropy, calibrated": by_entropy(calibrated),
        "+entropy, weights": mix_weights(config, data, clip, models["ZS"], models[BASE], w),
    }


def evaluate(own, data, clip, models, seed):
    """Rows of one run from {name: Classifier}; ECE of each split in `numbers`. own: vrf.Config."""
    found = {}
    for name, model in models.items():
        found["Zero-shot" if name == "ZS" else name] = er_axes.probabilities(own, data, clip, model)
        if name == BASE:
            mixed = ensembles(own, data, clip, models, seed)
            found |= {f"{BASE} {row}": p for row, p in mixed.items()}
    labels, rows = {s.name: s.labels for s in (data.test, *data.shifts)}, []
    for name, p in found.items():
        right = {s: x.argmax(1) == labels[s] for s, x in p.items()}
        ece = {s: common.ece(x, labels[s]) for s, x in p.items()}
        rows.append(common.Row(name, seed, right, numbers={"ece": ece}))
    return rows


def mean_ece(rows, method):
    """ECE on ID and in the mean over shifts, mean over runs."""
    found = [row.numbers["ece"] for row in rows if row.method == method]
    mean = {split: sum(ece[split] for ece in found) / len(found) for split in found[0]}
    return mean[common.ID], common.mean_shift(mean)


def print_table(rows):
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        accuracy = common.accuracies(rows, method)
        cells = [f"{accuracy[common.ID]:.1f}", f"{common.mean_shift(accuracy):.1f}"]
        cells += [f"{x:.3f}".lstrip("0") for x in mean_ece(rows, method)]
        if method == BASE:
            lines.append([method, *cells, "", ""])
            continue
        gains = common.gain(rows, method, BASE)
        lines.append([method, *cells, *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*x) for x in gains)])
    header = ["method", "ID", "shift", "ECE, ID", "shift", f"less {BASE}: ID", "shift"]
    runs = f"{len({row.seed for row in rows})} run(s)"
    title = f"accuracy in %, ECE, differences in points with 95 % intervals over {runs} and images"
    print("\n" + common.table(header, lines, title))


def summary(rows):
    """Three sentences on the table, computed from it."""
    say = "{:+.2f} [{:+.2f}, {:+.2f}]".format
    for number, form in enumerate(("outputs", "weights"), 1):
        at_home, away = common.gain(rows, f"{BASE} +VRF", f"{BASE} +entropy, {form}")
        print(f"{number}. VRF less the entropy weight of {form}: {say(*at_home)} points on ID,")
        print(f"   {say(*away)} in the mean under shift.")
    by_shift = {m: common.mean_shift(common.accuracies(rows, m)) for m in {r.method for r in rows}}
    fits = {m for m in by_shift if common.accuracies(rows, m)[common.ID] > 90}
    best = max(fits, key=by_shift.get, default=BASE)
    print(
        f"3. Of the rows above 90 % on ID, {best} is the highest under shift: {by_shift[best]:.1f};"
    )
    print(f"   zero-shot has {by_shift['Zero-shot']:.1f}.")


# --- main -----------------------------------------------------------------------------------------


def main(argv=None):
    config = common.setup(Config, argv, __doc__, {})[0]
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        world, models = er_axes.tuned(config, seed)
        rows += evaluate(*world, models, seed)
    common.write_results(config, common.pick_device(config.device), rows)
    print_table(rows)
    summary(rows)
    return rows


if __name__ == "__main__":
    common.run(main)
