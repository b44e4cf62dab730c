"""The numbers under the sliders of the pages, from runs of the scripts; a second from their caches.

    python vrf.py && python er_study.py && python lab/pages_numbers.py

It reads runs/vrf and runs/er_study, or the two folders that are named behind it, and writes
lab/pages/vrf.json and er_study.json. lab/pages.py puts them into the pages.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import er_study  # noqa: E402
import vrf  # noqa: E402
from data import testbeds  # noqa: E402


def when_right(p_zs, p_ft, labels):
    """Between which weights of FT the mix w P_ft + (1 - w) P_zs gets a sample right: its true class
    stays ahead of a rival for w on one side of where the two are level, so that all rivals together
    leave an interval. It is empty, low > high, where no weight will do.
    2 x [N, C], [N] -> low, high [N]
    """
    p_zs, p_ft, true = p_zs.double(), p_ft.double(), labels[:, None]
    lead_zs, lead_ft = p_zs.gather(1, true) - p_zs, p_ft.gather(1, true) - p_ft
    change = lead_ft - lead_zs  # 0 for the true class, which leaves 0 and 1 as the widest ends
    level = -lead_zs / change
    low = torch.where(change > 0, level, 0.0).amax(1)
    high = torch.where(change < 0, level, 1.0).amin(1)
    high[((change == 0) & (lead_zs < 0)).any(1)] = -1
    return low, high


def vrf_numbers(out):
    """Of one run of vrf.py in `out`, of its first fine-tuned model: for each set how many samples
    are right whatever the weight, and of those for which it matters d(x) and the two ends of
    `when_right`, times 10,000. All samples are there; nothing is drawn at random.
    """
    config, data, clip, zero_shot = vrf.prepare(["--out", str(out)])
    models = vrf.train_models(config, data, clip, zero_shot, config.seed)  # from its checkpoints
    _, studies = vrf.evaluate(config, data, clip, models, config.seed)
    name, (_, calibrated, found) = next(iter(studies.items()))
    ose = vrf.ose_row("", config.seed, calibrated)
    sets = {}
    for split, x in calibrated.items():
        low, high = when_right(x.p_zs, x.p_ft, x.labels)
        both = (low == 0) & (high == 1)
        some = ~both & (low <= high)
        d, low, high = (10_000 * v[some] for v in (found.d[split], low, high))
        columns = {"d": d.round(), "low": low.ceil(), "high": high.floor()}
        sets[split] = {"n": len(both), "always": int(both.sum())}
        sets[split] |= {column: v.int().tolist() for column, v in columns.items()}
    return {"alpha": ose.choice, "a": found.ab[0], "b": found.ab[1], "sets": sets}


def er_numbers(out):
    """Of er_study.py's runs in `out`: images right by checkpoint, ID and on the shift that has a
    line; the line and its testbed.
    """
    testbed = testbeds.read(common.EMBEDDED / "testbeds" / "digits.npz")
    lines = {ood: er_study.baseline(testbed, ood) for ood in testbed.id_of}
    shift = er_study.best_line(lines)
    line, runs = lines[shift], {}
    n = [testbed.n[name] for name in (line.id, shift)]
    for path in sorted(Path(out, "trajectories").glob("*seed-0*.csv")):
        for p in er_study.read(path):
            if p.shift == shift:
                run = runs.setdefault(p.run, {"step": [], "k_id": [], "k_ood": []})
                run["step"].append(p.step)
                run["k_id"].append(round(n[0] * p.id))
                run["k_ood"].append(round(n[1] * p.ood))
    accuracies = zip(line.acc_id, line.acc_ood, strict=True)
    points = [[round(n[0] * a), round(n[1] * b)] for a, b in accuracies]
    fit = {"slope": line.slope, "intercept": line.intercept, "low": round(100 * line.low)}
    fit |= {"shift": shift, "n": n, "models": len(points)}
    return fit | {"runs": runs, "testbed": points}


def main(vrf_out="runs/vrf", er_out="runs/er_study"):
    for name, numbers in (("vrf", vrf_numbers(vrf_out)), ("er_study", er_numbers(er_out))):
        path = ROOT / "lab" / "pages" / f"{name}.json"
        path.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
