"""lab/er_extract.py on small raw tables, and lab/er_modern.py on the shipped extract."""

import contextlib
import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_er_study import PAIR, line_by_hand  # noqa: E402

import common  # noqa: E402
from data import testbeds  # noqa: E402
from lab import er_extract, er_modern  # noqa: E402

WORDS = "in21k in22k in12k jft ig1b yfcc seer swag clip laion openai webli ssld mim_ m30m dino usi"


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def raw(folder, more=(), without=(), top1=None):
    """Raw tables as they are public, of few models, all at 60 %; more, without, top1: of timm's."""
    pairs = er_extract.table(testbeds.FOLDER / "modern_pairs.csv")
    models = [row["fine-tuned"].split("@") for row in pairs]
    models += [("resnet50.a1_in1k", "288"), ("resnet50.a1_in1k", "224")]
    models += [("convnext_tiny.in12k_ft_in1k", "224"), ("hrnet_w18_ssld.paddle_in1k", "224")]
    models += [("hgnet_tiny.paddle_in1k", "224"), *more]
    for n, file, *_ in er_extract.SETS.values():
        text = top1 or f"{100 * round(0.6 * n) / n:.3f}"
        header = [c for c in ("model", "img_size", "top1") if (file, c) not in without]
        rows = [[{"model": m, "img_size": s, "top1": text}[c] for c in header] for m, s in models]
        write(folder / f"timm_results-{file}.csv", header, rows)
    columns = [names[1] for _, *names in er_extract.SETS.values() if names[1]]
    rows = [["ViT-B-32", "laion2b_s34b_b79k", "151.28", *[0.5] * 5]]
    rows += [["ViT-B-32-quickgelu", "openai", "151.28", *[0.5] * 5]]
    write(folder / "openclip_results.csv", ["name", "pretrained", "params (M)", *columns], rows)
    accuracy = {names[2]: 0.5 for n, *names in er_extract.SETS.values() if names[2]}
    accuracy["ImageNetSketch"] = 25_000 / 50_889
    for file, model in (("individual_model", "model_1"), ("uniform_soup", "uniform_soup")):
        line = json.dumps(accuracy | {"model_name": model})
        (folder / f"{file}_results.jsonl").write_text(line + "\n")
    (folder / "greedy_soup_results.jsonl").write_text("")
    settings = {"lr": 1e-5, "wd": 0, "epochs": 4, "aug": "none", "mix": 0, "smoothing": 0}
    (folder / "hparam_info.json").write_text(json.dumps({"model_1": settings}))
    header = "method,who,independent,id,v2,r,a,sketch,source,note".split(",")
    rows = [["FT", "paper", "", *[50] * 5, "", ""], ["FT", "somebody", "yes", *[50] * 5, "x", ""]]
    write(folder / "reproductions.csv", header, [*rows, ["VRF", "none", "", *[""] * 5, "", ""]])
    return folder


def extract(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        return er_extract.main([str(folder), "--out", str(folder / "made")])


# --- the extract ----------------------------------------------------------------------------------


def test_the_baseline_has_each_model_of_imagenet_alone_once_and_at_its_smallest_size(tmp_path):
    rows = extract(raw(tmp_path))
    by_role = {}
    for model, role, _ in rows:
        by_role.setdefault(role, []).append(model)
    assert by_role["testbed"] == ["hgnet_tiny.paddle_in1k@224", "resnet50.a1_in1k@224"]
    assert len(by_role["fine-tuned"]) == 21 and len(by_role["published"]) == 36
    assert by_role["zero-shot"] == ["ViT-B-32 laion2b_s34b_b79k"]
    assert by_role["soup"] == ["model_1", "uniform_soup"]
    assert by_role["reproduced"] == ["FT, somebody"]
    made = testbeds.read(tmp_path / "made/modern.csv")
    row = made.row("resnet50.a1_in1k@224")
    for s, n in made.n.items():
        assert made.k[s][row] == round(0.6 * n)
    assert made.k["imagenet-sketch"][made.row("model_1")] == 25_000
    assert np.isnan(made.k["val-on-imagenet-r-classes"][made.row("model_1")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"more": [("resnet50.new_in1k", "224")]}, "its tag 'new_in1k' is not in modern_tags.csv"),
        ({"more": [("resnet50.a1_in1k", "224")]}, "resnet50.a1_in1k at 224 is there twice"),
        ({"without": [("imagenet-r", "top1")]}, "imagenet-r.csv: no column 'top1'; it has model"),
        ({"top1": 61.501}, "0.61501 is no share of 50000 images"),
        ({"top1": 0.615e4}, "61.5 is no share of 50000 images"),
    ],
)
def test_a_wrong_raw_table_is_refused(options, words, tmp_path):
    with pytest.raises(common.InputError, match=words):
        extract(raw(tmp_path, **options))


def test_the_shipped_extract_is_what_the_raw_tables_give(tmp_path):
    folder = os.environ.get("ER_TESTBED", "")
    if not folder:
        pytest.skip("ER_TESTBED names no folder with the public tables, in its folder modern")
    with contextlib.redirect_stdout(io.StringIO()):
        er_extract.main([f"{folder}/modern", "--out", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (testbeds.FOLDER / path.name).read_bytes(), path.name


def test_no_model_of_the_baseline_has_a_name_that_tells_of_more_data():
    bed, known = testbeds.read("modern"), er_extract.verdicts()
    baseline = [m.split("@")[0] for m in bed.models if m not in bed.studied]
    assert len(baseline) == len(set(baseline)) == 957
    for model in baseline:
        assert er_extract.trained_on_imagenet_alone(model, known), model
        assert not any(word in model for word in WORDS.split()), model
    for row in er_modern.about("modern_tags.csv", "tag").values():
        tag, reason = row["tag"], row["reason"]
        assert known[tag, ""] or reason, f"{tag} is out without a reason"


def test_published_rows_are_the_papers_and_zero_shot_models_agree_between_sources():
    bed = testbeds.read("modern")
    paper = json.loads((common.EMBEDDED / "vrf_paper.json").read_text())["tables"][1]
    row = dict(zip(paper["columns"], paper["rows"][5], strict=True))
    i = bed.row("VRF Table 2, ViT-B-16: E2E-FT +VRF")
    for s, (n, *names) in er_extract.SETS.items():
        if names[3]:
            assert 100 * bed.k[s][i] / n == pytest.approx(row[names[3]], abs=0.01)
    here, there = bed.row("ViT-B-16 openai"), bed.row("CaRot Table 2, ViT-B-16: ZS")
    for s, n in bed.n.items():
        if not np.isnan(bed.k[s][there]):
            assert abs(bed.k[s][here] - bed.k[s][there]) / n < 6e-4, s


def test_the_extracts_are_small():
    sizes = [path.stat().st_size for path in testbeds.FOLDER.glob("modern*")]
    assert len(sizes) == 6 and sum(sizes) < 150_000


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """er_modern's Measurement and points; what it printed; its folder."""
    out, printed = tmp_path_factory.mktemp("modern"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = er_modern.main(["--draws", "50", "--out", str(out)])
    return found, printed.getvalue(), out


def test_rank_correlations_with_the_learning_rate_are_scipys(report):
    (measurement, points), text, _ = report
    lines = measurement.lines
    with open(testbeds.FOLDER / "modern_soups.csv", newline="") as file:
        rates = {row["model"]: float(row["lr"]) for row in csv.DictReader(file) if row["lr"]}
    assert len(rates) == 71
    gold = [spearmanr(list(rates.values()), [points[m, s].er for m in rates])[0] for s in lines]
    (row,) = [x for x in text.splitlines() if x.startswith("lr ")]
    found = [float(part.split(" [")[0]) for part in row[2:].split("]")[:5]]
    assert found[1:] == [round(x, 2) for x in gold] == [-0.57, -0.87, -0.88, -0.64]


def test_a_bootstrap_covers_the_rank_correlation_and_a_perfect_one_has_no_width():
    x = np.arange(40.0)
    assert er_modern.rank_correlation(x, x**3) == pytest.approx((1, 1, 1))
    middle, low, high = er_modern.rank_correlation(x, np.random.default_rng(0).normal(size=40))
    assert low < middle < high and low < 0 < high and 0.4 < high - low < 0.8


def test_differences_from_plain_fine_tuning_and_at_equal_accuracy_are_by_hand(report):
    (measurement, points), text, _ = report
    lines = measurement.lines
    table = "VRF Table 1, ViT-B-32"
    gaps = [
        100 * (points[f"{table}: E2E-FT +VRF", s].er - points[f"{table}: E2E-FT", s].er)
        for s in lines
    ]
    (row,) = [x for x in text.splitlines() if x.startswith(table) and "E2E-FT +VRF" in x]
    assert row.endswith(" ".join(f"{x:+.1f}" for x in gaps))
    own = points[f"{table}: E2E-FT +VRF", "imagenet-r"]
    near = [
        p for (m, s), p in points.items()
        if s == "imagenet-r" and m.startswith("model_") and abs(p.id - own.id) <= 0.005
    ]  # fmt: skip
    gap = 100 * (own.er - np.mean([p.er for p in near]))
    best = 100 * (own.er - max(p.er for p in near))
    (row,) = [x for x in text.splitlines() if x.startswith("E2E-FT +VRF ")]
    assert f"{gap:+.1f} ({best:+.1f})" in row and f"  {len(near)}  " in row


@pytest.mark.parametrize(("shift", "models"), [("imagenet-r", "957"), ("imagenet-a", "956")])
def test_the_line_of_a_shifts_own_classes_stands_beside_it(report, shift, models):
    text, own = report[1], f"val-on-{shift}-classes"
    a, b, r2, er = line_by_hand(shift, own)
    (row,) = [x.split() for x in text.splitlines() if x.startswith(shift) and own in x]
    assert row[2:4] == [models, f"{a:.4f}"] and row[-4:-2] == [f"{b:.4f}", f"{r2:.4f}"]
    row = [x.split() for x in text.splitlines() if x.startswith("ViT-B/32 OpenAI ")][-1]
    assert row[-2 if shift == "imagenet-r" else -1] == f"{100 * er(PAIR[1]):+.1f}"


def test_the_2020_line_is_beside_ours_and_the_same_models_move_little(report):
    rows = [x.split() for x in report[1].splitlines() if x.startswith("V2 ")]
    assert [row[-9] for row in rows] == ["957", "576", "85"]  # modern, labels alone, 2020
    assert rows[2][-8:-5] == ["0.9232", "-0.4977", "0.9960"]
    assert abs(float(rows[2][-4])) < 0.2


def test_the_figure_has_every_model_and_says_what_is_not_ours(report):
    drawn = (report[2] / "figures/er_modern.csv").read_text()
    for label in ("plain fine-tuning", "VRF", "CaRot"):
        assert f"{label} (published, not ours)" in drawn
    for label, models in (("CLIP and its like", 13), ("the same, fine-tuned", 13)):
        assert drawn.count(label) == 4 * models
    assert drawn.count("ImageNet-1k alone") == 3 * 957 + 956
    assert drawn.count("72 fine-tunings") == 4 * 72
    assert (report[2] / "figures/er_modern.png").stat().st_size > 100_000
