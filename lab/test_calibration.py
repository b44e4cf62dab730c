import calibration
import numpy as np
import pytest
import torch


def write(path, confidence, right, header="label,predicted_class,confidence"):
    rows = [f"{0 if r else 1},0,{c:.6f}" for c, r in zip(confidence, right, strict=True)]
    path.write_text("\n".join([header, *rows]))
    return str(path)


def test_an_overconfident_model_is_measured_and_the_floor_is_that_of_chance(tmp_path, capsys):
    # 1,024 images at confidence .75 of which exactly half are right: ECE .25, over all and in each
    # batch of 512. Of a calibrated model the ECE is |mean of 512 Bernoulli(.75) - .75|, whose
    # expectation is sqrt(2 / pi) times its standard deviation, .0191: .0153 per 512, .0108 whole.
    path = write(tmp_path / "p.csv", [0.75] * 1024, [True, False] * 512)
    rows = calibration.main([path, "--draws", "400"])
    _, name, own, floor, _ = rows[1]
    assert name == "ECE per 512" and own == pytest.approx(0.25)
    assert floor == pytest.approx(0.0153, abs=0.002)
    assert rows[0][2] == pytest.approx(0.25) and rows[0][3] == pytest.approx(0.0108, abs=0.002)
    assert "adds +0.0000 to this model's ECE" in capsys.readouterr().out


def test_an_images_order_moves_the_batches_ece_and_not_the_sets():
    # the first 512 all right, the second all wrong: each batch is off by .5, the whole by nothing
    right = torch.arange(1024) < 512
    rows = calibration.measure(torch.full((1024,), 0.5).double(), right, draws=2)
    found = {row[:2]: row[2] for row in rows}
    assert found["as in the file", "ECE per 512"] == pytest.approx(0.5)
    assert found["as in the file", "ECE, whole set"] == pytest.approx(0, abs=1e-12)
    assert found["at random", "ECE per 512"] < 0.1


def test_batches_of_512_add_less_to_the_ece_the_more_overconfident_a_model_is():
    generator, added = torch.Generator().manual_seed(0), []
    confidence = 0.55 + 0.45 * torch.rand(50_000, generator=generator)
    p = torch.stack([confidence, 1 - confidence], 1)
    for off in (0.0, 0.02, 0.05, 0.1, 0.18):  # docs/differences.md, T7
        wrong = (torch.rand(50_000, generator=generator) > confidence - off).long()
        whole, batches = (ece(p, wrong) for ece in calibration.MEASURES.values())
        added.append(batches - whole)
    assert 0.02 < added[0] < 0.045 and added == sorted(added, reverse=True) and added[-1] < 0.003


@pytest.mark.parametrize(
    "header, confidence, words",
    [
        ("label,predicted_class,confidence", 75.0, "shares from 0 to 1"),
        ("label,predicted,confidence", 0.75, "expected a CSV with the columns"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_a_sentence(tmp_path, header, confidence, words):
    path = write(tmp_path / "p.csv", np.full(4, confidence), [True] * 4, header)
    with pytest.raises(calibration.common.InputError, match=words):
        calibration.read(path)
