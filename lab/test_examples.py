"""lab/examples: metrics and readers by hand and on published layouts; each demonstration once."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab" / "examples")]

import commonsense  # noqa: E402
import generate  # noqa: E402
import segment  # noqa: E402
import train  # noqa: E402
import vqa  # noqa: E402

import common  # noqa: E402

SMALL = ["--spd-lambda", "1", "--epochs", "1", "--batch", "8", "--device", "cpu"]


def fails_with(words, call, *args):
    with pytest.raises(common.InputError) as caught:
        call(*args)
    assert words in str(caught.value)


# the shared loop


def settings(*words):
    return common.parse(train.settings(), [*SMALL, *words], "")


def line(inputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def compared(config, model, **options):
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))

    def batch_of(rows):
        return (x[[i for i, _ in rows]],)

    def score(m):
        with torch.no_grad():
            return {"home": m(x).mean().item(), "away": m(-x).mean().item()}

    def loss_fn(batch):
        return (model(batch[0]) - 1).square().mean()

    rows = train.compare(config, model, len(x), batch_of, loss_fn, score, **options)
    train.print_rows(rows, steps=3)
    return rows


def test_every_row_starts_at_the_same_weights_statistics_and_batches(capsys):
    again = compared(settings("--lr", "0.01", "--spd-lambda", "1e6,1e6"), line())
    assert [r["method"] for r in again] == ["start", "AdamW", "Adam-SPD 1e+06", "Adam-SPD 1e+06"]
    assert again[2] == again[3] and again[1] != again[0]
    still = compared(settings("--lr", "0"), line())
    assert [r["deviation"] for r in still] == [0, 0, 0]
    assert "Adam-SPD 1 less AdamW: home +0.0, away +0.0" in capsys.readouterr().out


def test_a_free_layer_is_no_part_of_the_deviation_and_the_zero_anchor_measures_from_zero():
    model = line()
    norm = sum(p.square().sum() for p in model.parameters()).sqrt().item()
    rows = compared(settings("--lr", "0"), model, anchor="zero")
    assert rows[0]["deviation"] == pytest.approx(norm)
    free = {"0.": {"anchor": "none"}, "1.": {"anchor": "none"}, "2.": {"anchor": "none"}}
    rows = compared(settings("--lr", "0.1"), line(), special=free)
    assert {r["deviation"] for r in rows} == {0.0} and rows[1]["home"] != rows[0]["home"]


def test_a_missing_package_is_a_sentence():
    fails_with("no_such_thing: pip install -r requirements-llm.txt", train.need, "no_such_thing")
    fails_with("expected positive numbers", compared, settings("--spd-lambda", "x"), line())


def test_a_batch_in_pieces_is_the_batch_and_the_rate_ends_at_its_share():
    ends = []
    for words in ("", "--micro 3"):
        model = line()
        del model[1]  # statistics of a piece are not those of the batch
        rows = compared(settings("--lr", "0.01", "--lr-end", "0.5", *words.split()), model)
        ends.append([rows[-1]["home"], model[0].weight.detach().clone()])
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    torch.testing.assert_close(ends[0][1], ends[1][1])
    still = line()
    compared(settings("--lr", "0.01", "--lr-end", "1", "--warmup", "1000"), still)
    assert (still[0].weight - line()[0].weight).abs().max() > 0.025


# segmentation


def voc(root, context=False):
    """Two images whose red channel is the mask; the second mask has void pixels."""
    masks = "SegmentationClassContext" if context else "SegmentationClass"
    lists = root / "ImageSets" / ("SegmentationContext" if context else "Segmentation")
    for folder in (root / "JPEGImages", root / masks, lists):
        folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("2007_000032", "2008_000008")):
        mask = np.kron(np.arange(20).reshape(4, 5), np.ones((10, 10))).astype(np.uint8)
        mask[:2] = 255 if i else mask[:2]
        picture = np.stack([mask] * 3, -1)
        Image.fromarray(picture).save(root / f"JPEGImages/{name}.jpg", quality=100, subsampling=0)
        picture = Image.fromarray(mask, "P")
        picture.putpalette(list(range(256)) * 3)
        picture.save(root / masks / f"{name}.png")
    (lists / "train.txt").write_text("2007_000032\n2008_000008\n")
    (lists / "val.txt").write_text("2008_000008\n")
    return root


def test_voc_and_pascal_context_are_read_by_their_lists(tmp_path):
    pairs, classes = segment.read_voc(voc(tmp_path), "train")
    assert [p[1].stem for p in pairs] == ["2007_000032", "2008_000008"] and classes == 21
    pairs, classes = segment.read_voc(voc(tmp_path, context=True), "val")
    assert pairs[0][1].parent.name == "SegmentationClassContext" and (len(pairs), classes) == (
        1,
        60,
    )
    (tmp_path / "JPEGImages/2008_000008.jpg").unlink()
    fails_with("2008_000008.jpg is missing, though", segment.read_voc, tmp_path, "val")
    fails_with("test.txt is missing or empty; --data takes", segment.read_voc, tmp_path, "test")


def test_a_crop_is_the_same_of_image_and_mask_and_the_whole_mask_keeps_its_size(tmp_path):
    pair = segment.read_voc(voc(tmp_path), "train")[0][0]
    image, mask = segment.load(pair, 32)
    assert image.shape == (3, 32, 32) and mask.shape == (40, 50) and mask.max() == 19
    seen = set()
    for seed in range(6):
        image, mask = segment.load(pair, 64, seed, flip=True)
        off = (255 * image[0] - mask).abs()
        assert off.median() < 2 and image.shape[1:] == mask.shape == (64, 64)
        seen.add(len(mask.unique()))
    assert len(seen) > 1


class Says(nn.Module):
    """One class everywhere, at a quarter of the size."""

    def __init__(self, known):
        super().__init__()
        self.logits = nn.Parameter(F.one_hot(torch.tensor(known), 21)[:, None, None].float())

    def forward(self, x):
        return self.logits.expand(len(x), -1, x.shape[-2] // 4, x.shape[-1] // 4)


def test_void_pixels_count_nowhere_and_every_corruption_is_scored(tmp_path):
    (picture, path), _ = pair = segment.read_voc(voc(tmp_path), "train")[0]
    mask = np.full((40, 50), 7, np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(path)
    config = common.parse(segment.Config, ["--size", "16", "--batch", "2"], "")
    with segment.ThreadPoolExecutor() as pool:
        right = segment.evaluate(Says(7), [(picture, path)], 21, config, pool)
        wrong = segment.evaluate(Says(3), [(picture, path)], 21, config, pool)
        both = segment.evaluate(Says(7), list(pair), 21, config, pool)
    assert set(right.values()) == {100} and set(wrong.values()) == {0}
    assert list(right) == ["clean", *generate.CORRUPTIONS, "corrupted"]
    assert both["clean"] == pytest.approx(100 * (1000 + 100) / (1000 + 1900) / 20)


def test_mean_iou_by_hand_leaves_out_classes_that_never_occur():
    confusion = torch.tensor([[3.0, 1, 0], [0, 2, 0], [0, 0, 0]])  # true x predicted
    assert segment.mean_iou(confusion) == pytest.approx(100 * (3 / 4 + 2 / 3) / 2)


def test_corruptions_stay_in_range_change_the_image_and_repeat():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in generate.CORRUPTIONS:
        a, b = (generate.corrupt(x, name, torch.Generator().manual_seed(0)) for _ in range(2))
        assert torch.equal(a, b) and a.shape == x.shape and 0 <= a.min() and a.max() <= 1
        assert (a - x).abs().mean() > 0.05
    plain = torch.full((1, 3, 32, 32), 0.4)
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(generate.corrupt(plain, "defocus", rng), plain)
    torch.testing.assert_close(generate.corrupt(plain, "brightness", rng), plain + 0.3)
    assert generate.corrupt(plain, "fog", rng).std() > 0.05


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "test_convnext"])
def test_logits_have_the_backbones_finest_level(name):
    with torch.device("meta"):
        model = segment.Segmenter(name, 5, False, 64)
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5, 16, 16)


def test_segmentation_runs_from_pre_training_to_the_table(tmp_path, capsys):
    rows = segment.main([*SMALL, "--items", "16", "--out", str(tmp_path)])
    assert [r["method"] for r in rows] == ["start", "AdamW", "Adam-SPD 1"]
    assert rows[0]["deviation"] == 0 < rows[2]["deviation"]
    assert "corrupted" in capsys.readouterr().out
    masks = [np.asarray(Image.open(p)) for p in (tmp_path / "handwritten").rglob("*.png")]
    assert set(np.unique(masks)) == {0, 1}


def test_a_voc_folder_trains_and_only_its_new_decoder_has_no_anchor(tmp_path, monkeypatch):
    made, real = [], train.spd.AdamSPD

    def recorded(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(train.spd, "AdamSPD", recorded)
    words = "--model test_convnext --no-pretrained --size 64".split()
    rows = segment.main([*SMALL, *words, "--data", str(voc(tmp_path / "voc"))])
    assert rows[2]["deviation"] > 0 and len(made) == 1
    free = {g["anchor"]: sum(p.numel() for p in g["params"]) for g in made[0].param_groups}
    model = segment.Segmenter("test_convnext", 21, False, 64)
    assert free["pretrained"] == sum(p.numel() for p in model.backbone.parameters())
    with pytest.raises(common.InputError, match="offline, --no-pretrained"):
        segment.Segmenter("no_such_model", 21, False, 64)


# commonsense


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolq", "the correct answer is True.", "true"),
        ("boolq", "untrue or falsehood", ""),
        ("piqa", "solution2 and not solution1", "solution2"),
        ("piqa", "solution3", ""),
        ("social_i_qa", "answer4? answer3", "answer4"),
        ("hellaswag", "ending5 ending4", "ending4"),
        ("winogrande", "it is option1", "option1"),
        ("ARC-Challenge", "answer5", "answer5"),
        ("ARC-Easy", "answer6", ""),
        ("openbookqa", "", ""),
    ],
)
def test_the_first_word_that_can_be_an_answer_counts(name, text, answer):
    assert commonsense.answer_of(text, name) == answer


def test_generated_items_have_the_published_form_and_a_right_answer(tmp_path):
    generate.commonsense_items(tmp_path, 160, 0)
    for name in commonsense.CHOICES:
        for item in commonsense.read_items(tmp_path / name / "test.json"):
            assert commonsense.answer_of(item["output"], name) == item["answer"]
            if name != "boolq":
                kind = item["instruction"].split()[3]
                chosen = item["instruction"].split(item["answer"] + " : ")[1].split()[0]
                assert chosen in generate.KINDS[kind]
    (tmp_path / "x.json").write_text('[{"question": 1}]')
    fails_with("not every item has instruction", commonsense.read_items, tmp_path / "x.json")
    fails_with("cannot be read as", commonsense.read_items, tmp_path / "none.json")


def test_a_tiny_llama_learns_by_lora_with_the_zero_anchor(tmp_path):
    pytest.importorskip("transformers", reason="optional: requirements-llm.txt")
    pytest.importorskip("peft", reason="optional: requirements-llm.txt")
    words = [*SMALL, "--epochs", "4", "--items", "64", "--out", str(tmp_path)]
    rows = commonsense.main(words)
    assert rows[0]["deviation"] > 0  # from the origin
    assert rows[1]["average"] > rows[0]["average"] and rows[2]["average"] > rows[0]["average"]
    fails_with("--model", commonsense.main, ["--model", str(tmp_path), *words])


# visual questions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Dog.", "dog"),
        ("a two-story building!", "2 story building"),
        ("3.5 and 1,000", "3.5 and 1000"),
        ("U.S.A", "usa"),
        ("dont know; isnt", "don't know isn't"),
        ("girl's, 2:50 pm", "girl's 2:50 pm"),
        ("none", "0"),
        ("  An   apple ", "apple"),
        ("anthem", "anthem"),
    ],
)
def test_answers_are_normalised_as_published(given, expected):
    assert vqa.normalise(given) == expected


@pytest.mark.parametrize(
    ("same", "points"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_averages_over_leaving_one_of_ten_out(same, points):
    assert vqa.accuracy("Two", ["2"] * same + ["no"] * (10 - same)) == pytest.approx(points)


def test_vqa_accuracy_of_one_answer_is_equality():
    assert vqa.accuracy("the cat", ["cat"]) == 1 and vqa.accuracy("dog", ["cat"]) == 0


def test_published_files_of_every_form_are_read(tmp_path):
    folder, ood = generate.vqa_items(tmp_path, 30, 0)
    images = {p.name: p for p in folder.rglob("*.jpg")}
    val = vqa.read_set(folder, images, "val2014")
    assert len(val) == 3 and len(val[0]["answers"]) == 10
    assert val[0]["image"].name == "COCO_val2014_000000500001.jpg"
    for name in ("VQA-Rephrasings", "TextVQA", "VizWiz"):
        items = vqa.read_set(ood / name, {})
        assert len(items) == 3 and all(isinstance(a, str) for i in items for a in i["answers"])
    few = tmp_path / "VQA-CE"
    few.mkdir()
    (few / "counterexamples.json").write_text(json.dumps([val[2]["id"]]))
    assert vqa.read_set(few, images, val=val) == [val[2]]
    changing = tmp_path / "VQA-CP"  # bare lists, images of train and val, with their split
    changing.mkdir()
    question = {"question_id": 5, "image_id": 7, "coco_split": "train2014", "question": "is it ?"}
    answers = {"question_id": 5, "image_id": 7, "answers": [{"answer": "yes"}] * 10}
    (changing / "vqacp_v2_test_questions.json").write_text(json.dumps([question]))
    (changing / "vqacp_v2_test_annotations.json").write_text(json.dumps([answers]))
    (item,) = vqa.read_set(changing, images)
    assert item["image"].name == "COCO_train2014_000000000007.jpg" and item["answers"][0] == "yes"
    fails_with("no image COCO_train2014_000000000007.jpg or", vqa.read_set, changing, {})
    fails_with("expected one JSON, or questions and", vqa.read_set, folder, images)
    (few / "counterexamples.json").write_text("{}")
    fails_with("none of the published files", vqa.read_set, few, images)


def test_a_tiny_paligemma_learns_by_lora_with_the_zero_anchor(tmp_path):
    pytest.importorskip("transformers", reason="optional: requirements-llm.txt")
    pytest.importorskip("peft", reason="optional: requirements-llm.txt")
    rows = vqa.main([*SMALL, "--epochs", "2", "--items", "80", "--out", str(tmp_path)])
    columns = ["method", "VQAv2", "TextVQA", "VQA-Rephrasings", "VizWiz", "mean OOD", "deviation"]
    assert list(rows[0]) == columns
    assert rows[1]["VQAv2"] > rows[0]["VQAv2"] and rows[2]["deviation"] < rows[1]["deviation"]
