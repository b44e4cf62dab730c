"""lab/spd_ablations.py on a small tree."""

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "lab")]

import spd_ablations as ablations  # noqa: E402
from small import TINY, make_tree  # noqa: E402
from test_spd import network, noisy, train  # noqa: E402

import common  # noqa: E402
import spd  # noqa: E402


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablations")
    tree = make_tree(root / "tree")
    for i in range(3):  # a shift that has three of the ten classes
        few = tree / "few" / f"hue_{i}"
        few.parent.mkdir(exist_ok=True)
        few.symlink_to(tree / "noisy" / f"hue_{i}")
    more = "--epochs 2 --lr 1e-3 --mixup 0 --cutmix 0 --drop-path 0".split()
    return ["--data", str(tree), "--out", str(root / "out"), *TINY, *more]


def numbers(text, start):
    """The table's line that begins so, as numbers."""
    (line,) = [x for x in text.splitlines() if x.startswith(start + "  ")]
    return [float(x) for x in line.removeprefix(start).split()]


def test_the_demo_ends_in_the_minimum_that_the_condition_says(words):
    """At strength 0.25 the accumulated condition holds the path near the start, that of each step
    alone does not; the first author's plot shows the former.
    """
    near, far = torch.tensor([3.584, -1.848]), torch.tensor([3.0, 2.0])
    ends = {c: ablations.path(0.25, c)[0][-1].float() for c in ("paper", "code")}
    assert (ends["paper"] - near).norm() < 0.1 and (ends["code"] - far).norm() < 0.1
    free, report = ablations.path(0.0, "code")
    assert (free[-1].float() - far).norm() < 0.1 and report["fired"] == report["decay"] == 0
    ablations.main(["demo", *words])
    assert Path(words[3], "figures", "demo.png").is_file()


def test_inside_records_every_step_and_strength_holds_the_weights_nearer(words, capsys):
    ablations.main(["inside", *words])
    text = capsys.readouterr().out
    ends = [numbers(text, f"strength {x}")[-1] for x in ("0", "0.5", "1", "2")]
    assert ends == sorted(ends, reverse=True) and ends[0] > 1.05 * ends[3]
    with open(words[3] + "/figures/inside.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 4 * 2 * 5  # strengths, epochs, steps
    assert [float(gamma) for _, step, gamma in rows if step == "0"] == [0] * 4


def test_coupled_l2_sp_is_adam_on_eq_1():
    ours, theirs, strength = network(), network(), 0.3
    anchors = [p.detach().clone() for p in theirs.parameters()]
    mine = ablations.CoupledL2SP(ours.parameters(), lr=1e-2, spd_lambda=strength)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i in range(20):
        x, y = noisy(i)
        adam.zero_grad()
        pairs = zip(theirs.parameters(), anchors, strict=True)
        penalty = sum(((p - a) ** 2).sum() for p, a in pairs)
        loss = torch.nn.functional.cross_entropy(theirs(x), y) + strength / 2 * penalty
        loss.backward()
        adam.step()
    for a, b in zip(train(ours, mine), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


def test_cautious_decay_moves_only_elements_that_already_go_back():
    anchor, before = torch.zeros(2), torch.tensor([1.0, 1.0])
    after = torch.tensor([0.9, 1.1])  # the first goes back, the second on
    found = ablations.cautious(before, after, anchor, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.4, 1.1]))


def test_the_gate_by_the_update_pulls_only_elements_that_go_back():
    anchor, before = torch.zeros(3), torch.ones(3)
    after = torch.tensor([0.9, 1.4, -0.1])  # back, on, back beyond the anchor
    found = ablations.gated_by_update(before, after, anchor, torch.tensor(0.5))
    torch.testing.assert_close(found, torch.tensor([0.45, 1.4, -0.05]))


def test_rules_has_a_row_for_each_rule_and_strength(words, capsys, monkeypatch):
    short = {name: (*rule[:2], rule[2][-1:]) for name, rule in ablations.RULES.items()}
    monkeypatch.setattr(ablations, "RULES", short)
    ablations.main(["rules", *words])
    text = capsys.readouterr().out
    ends = [numbers(text, f"{name} {rule[2][0]:g}")[-1] for name, rule in short.items()]
    assert len(set(ends)) == 6 and min(ends) > 0


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


def test_one_of_a_sets_own_classes_may_be_right_where_another_of_all_is_larger():
    logits = torch.tensor([[0.0, 1, 2, 5], [0, 5, 2, 1], [3, 1, 2, 1]])
    labels, groups = torch.tensor([0, 1, 0]), [[0, 3], [2]]
    assert common.project(logits, groups).argmax(1).eq(labels).all()
    assert ablations.among_all(logits, labels, groups).tolist() == [True, False, True]
    assert ablations.among_all(logits, labels, None).tolist() == [False, True, True]


def test_classes_reads_what_spd_has_trained_and_sets_with_all_classes_stay_the_same(
    words, tmp_path, capsys
):
    words = *words, "--out", str(tmp_path), "--methods", "Adam-SPD", "--spd-lambda", "1"
    own = common.accuracies(spd.main([*words, "--jobs", "1"]), "Adam-SPD 1")
    capsys.readouterr()
    ablations.main(["classes", *words])
    text = capsys.readouterr().out
    *found, _ = numbers(text, "Adam-SPD 1")  # the last is the average
    few = list(own).index("few")
    assert "trained before" in text and found.pop(few) <= list(own.values())[few] + 0.06
    del own["few"]
    assert found == pytest.approx(list(own.values()), abs=0.06)
