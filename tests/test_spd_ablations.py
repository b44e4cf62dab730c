"""studies/spd_ablations.py on a small tree. `rules` is left out: 12 trainings, and test_spd.py has
each rule.
"""

import csv
import sys

import pytest
from test_end_to_end import TINY, make_tree

import common

sys.path.insert(0, str(common.HERE / "studies"))
import spd_ablations as ablations  # noqa: E402


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablations")
    tree = make_tree(root / "tree")
    more = "--epochs 2 --lr 1e-3 --mixup 0 --cutmix 0 --drop-path 0".split()
    return ["--data", str(tree), "--out", str(root / "out"), *TINY, *more]


def numbers(text, start):
    """The table's line that begins so, as numbers."""
    (line,) = [x for x in text.splitlines() if x.startswith(start + "  ")]
    return [float(x) for x in line.removeprefix(start).split()]


def test_inside_records_every_step_and_strength_holds_the_weights_nearer(words, capsys):
    ablations.main(["inside", *words])
    text = capsys.readouterr().out
    ends = [numbers(text, f"strength {x}")[-1] for x in ("0", "0.5", "1", "2")]
    assert ends == sorted(ends, reverse=True) and ends[0] > 1.05 * ends[3]
    with open(words[3] + "/figures/inside.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 4 * 2 * 5  # strengths, epochs, steps
    assert [float(gamma) for _, step, gamma in rows if step == "0"] == [0] * 4


def test_heads_has_a_row_for_each_anchor(words, capsys):
    ablations.main(["heads", *words])
    text = capsys.readouterr().out
    assert numbers(text, "head none")[-1] >= numbers(text, "head pretrained")[-1] > 0


def test_lora_needs_peft_or_trains_the_factors(words, capsys):
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(common.InputError, match="pip install peft"):
            ablations.main(["lora", *words])
        return
    ablations.main(["lora", *words])
    text = capsys.readouterr().out
    assert numbers(text, "LoRA SPD 2")[-1] < numbers(text, "LoRA AdamW")[-1]
