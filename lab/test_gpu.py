"""lab/gpu.py runs as far as a CPU goes, so that it works on the day when there is a GPU."""

import gpu
import pytest
from compiled import kernels


def test_knn_and_spd_give_a_row_for_each_way_of_computing(capsys):
    kernels()
    rows = gpu.main(["knn", "spd"])
    assert not [row for row in rows if row[2] in ("failed", "OTHER BITS")]
    ways = {row[1] for row in rows}
    assert ways >= {"ours", "vrf.knn_kth_distance", "ours, twice", "fused AdamW", "foreach", "loop"}
    assert "| what | how | result | |" in capsys.readouterr().out


def test_training_steps_give_their_time():
    kernels()
    rows = gpu.main(["vit"])
    assert [row[1] for row in rows if row[2].endswith(" ms")] == [
        "SPD, images",
        "contrastive, pairs",
        "contrastive, --micro-batch",
    ]


def test_a_part_that_fails_leaves_the_others_their_turn(monkeypatch):
    kernels()
    monkeypatch.setitem(gpu.PARTS, "knn", lambda *_: 1 / 0)
    rows = gpu.main(["knn", "scripts"])
    assert rows[0][2:] == ("failed", "ZeroDivisionError: division by zero")
    assert [row[2] for row in rows[1:]] == ["not run"] * 3


def test_no_part_begins_when_the_time_is_over():
    kernels()
    assert [row[2] for row in gpu.main(["knn", "spd", "--minutes", "-1"])] == ["not run"] * 2


def test_an_unknown_part_is_refused():
    with pytest.raises(SystemExit):
        gpu.main(["knm"])
