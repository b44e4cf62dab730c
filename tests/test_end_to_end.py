"""vrf.main from the command line to the table, on trees made here and on the digits."""

import colorsys
import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_common import foreign_module
from test_data import FOUR, objectnet

import common
import vrf
from data import trees
from data.trees import clip_templates

ROOT = Path(vrf.__file__).parent
CLASSES, PER_CLASS = 10, {"train": 8, "val": 4, "test": 4, "noisy": 3}
TINY = "--model tiny_clip --pretrained random --batch 16 --warmup 3 --device cpu".split()
RECIPE = "--epochs 6 --lr 1e-3 --lr-lpft 5e-4 --lr-lc 0.1 --methods E2E-FT".split()


def picture(rng, hue, size, noise=0.1):
    """A noisy patch of one hue: a random tiny CLIP learns ten of them in a few steps."""
    colour = np.array(colorsys.hsv_to_rgb(hue % 1, 0.9, 0.9))
    pixels = colour * rng.uniform(0.3, 1, (*size, 1)) + rng.normal(0, noise, (*size, 3))
    return Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))


def make_tree(root):
    """Class folders of hues; a shift of noisy ones, and "again": the training images."""
    rng = np.random.default_rng(0)
    for name, n in PER_CLASS.items():
        for c in range(CLASSES):
            folder = root / name / f"hue_{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                hue, size = c / CLASSES + rng.normal(0, 0.03), rng.integers(20, 60, 2)
                noise = 0.4 if name == "noisy" else 0.1
                picture(rng, hue, size, noise).save(folder / f"{i}.jpg", quality=90)
    (root / "again").symlink_to(root / "train")
    (root / "templates.txt").write_text("a photo of {}.\n")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Shared by the runs on `tree`, which train once."""
    return tmp_path_factory.mktemp("out")


def run(*words):
    """The rows of vrf.main, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        rows = vrf.main([str(w) for w in words])
    return rows, printed.getvalue()


def on_tree(tree, out, *words):
    return run("--data", tree, "--out", out, *TINY, *RECIPE, *words)


@pytest.fixture(scope="module")
def plain(tree, out):
    """Rows, text and temperatures of a run with nothing changed."""
    with pytest.MonkeyPatch.context() as patch:
        temperatures = watch(patch, common, "temperature")
        return *on_tree(tree, out), [t for _, t in temperatures]


def row(rows, method):
    (found,) = [r for r in rows if r["method"] == method]
    return found


def right(rows, method):
    """{split: bool [N]} of a method, as lists."""
    return {s: v.tolist() for s, v in row(rows, method)["right"].items()}


def shares(rows, method):
    return {s: v.double().mean().item() for s, v in row(rows, method)["right"].items()}


def values(rows, name=lambda method: method):
    """Rows without their tensors, for comparison."""
    return [
        (name(r["method"]), r["choice"], {s: v.tolist() for s, v in r["right"].items()})
        for r in rows
    ]


def watch(monkeypatch, module, name):
    """The list of (arguments, result) of all calls of module.name from now on."""
    real, calls = getattr(module, name), []

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, watched)
    return calls


def failure_count(text):
    """|V|, N and k as printed."""
    (found,) = re.findall(r"\|V\| = (\d+) of (\d+), k = (\d+)", text)
    return tuple(map(int, found))


# an ImageNet tree, ViT-B/32

WNIDS = [FOUR[i] for i in (0, 1, 3)]
COUNTS = {
    "test": 6,
    "ImageNet-V2": 6,
    "ImageNet-Sketch": 3,
    "ImageNet-A": 4,
    "ImageNet-R": 4,
    "ObjectNet": 4,
}
VIT = "--model ViT-B-32 --pretrained random --epochs 1 --batch 8 --warmup 1 --lr 1e-4".split()


def make_imagenet(root):
    """Three classes, the five shift sets, JPEGs of every mode and shape that the real ones have."""
    rng, made = np.random.default_rng(0), 0

    def put(folder, n):
        nonlocal made
        (root / folder).mkdir(parents=True)
        for i in range(n):
            size = [(300, 200), (50, 400), (224, 224), (37, 23)][made % 4]
            mode = {1: "L", 2: "CMYK"}.get(made % 5, "RGB")
            picture(rng, made / 9, size).convert(mode).save(root / folder / f"{i}.JPEG")
            made += 1

    for wnid in WNIDS:
        put(f"train/{wnid}", 4)
        put(f"val/{wnid}", 2)
        put(f"sketch/{wnid}", 1)
    for number in ("0", "1", "3", "999"):
        put(f"imagenetv2-matched-frequency-format-val/{number}", 2)
    for wnid in (WNIDS[0], WNIDS[2]):
        put(f"imagenet-r/{wnid}", 2)
    for wnid in (WNIDS[1], WNIDS[2]):
        put(f"imagenet-a/{wnid}", 2)
    objectnet(root / "objectnet-1.0")
    return root


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return make_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def imagenet_run(imagenet, tmp_path_factory):
    """out, rows, text; five of the 80 prompts, which would take most of the time."""
    out = tmp_path_factory.mktemp("imagenet-out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "clip_templates", lambda: clip_templates()[:5])
        yield out, *run("--data", imagenet, "--out", out, "--methods", "E2E-FT", *VIT)
    shutil.rmtree(out)  # its checkpoint has 350 MB


def test_an_imagenet_tree_gives_the_table_of_all_its_sets(imagenet_run):
    _, rows, text = imagenet_run
    assert "paper, Table" in text and "MISSING" not in text
    lines = text[: text.index("paper, Table")].splitlines()
    header = next(line for line in lines if line.startswith("method ") and "avg shift" in line)
    names = "method  test  ImageNet-V2  ImageNet-Sketch  ImageNet-A  ImageNet-R  ObjectNet"
    assert header.split() == f"{names}  avg shift  chosen".split()
    for method in ("Zero-shot", "E2E-FT", "E2E-FT +WSE", "E2E-FT +OSE", "E2E-FT +VRF"):
        (line,) = [line for line in lines if re.match(re.escape(method) + r"  +\d", line)]
        printed = [float(x) for x in line.removeprefix(method).split()[: len(COUNTS) + 1]]
        share = [100 * x for x in shares(rows, method).values()]
        assert printed == pytest.approx([*share, sum(share[1:]) / 5], abs=0.051)
    assert failure_count(text)[1] == 9  # 12, and one of each class is held out


def test_result_rows_parse_and_count_every_image(imagenet_run):
    out, rows, _ = imagenet_run
    kept = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in kept] == [r["method"] for r in rows]
    for r, mine in zip(kept, rows, strict=True):
        assert {s: v["n"] for s, v in r["right"].items()} == COUNTS
        assert [v["right"] for v in r["right"].values()] == [
            int(v.sum()) for v in mine["right"].values()
        ]
        for v in r["right"].values():
            low, high = v["wilson95"]
            assert -1e-9 < low <= v["right"] / v["n"] + 1e-9 and v["right"] / v["n"] <= high + 1e-9
        assert r["run"]["config"]["model"] == "ViT-B-32" and r["run"]["versions"]["torch"]


def test_the_figure_has_its_numbers_beside_it(imagenet_run):
    out, rows, _ = imagenet_run
    with Image.open(out / "figures/vrf.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 20
    with open(out / "figures/vrf.csv", newline="") as file:
        table = list(csv.DictReader(file))
    mean = [100 * x for x in shares(rows, "E2E-FT +VRF").values()]
    (point,) = [(float(r["x"]), float(r["y"])) for r in table if r["series"] == "VRF"]
    assert point == pytest.approx((mean[0], sum(mean[1:]) / 5))
    assert sum(r["series"] == "OSE raw" for r in table) == 11


def test_a_second_run_reads_the_caches_and_gives_the_same_rows(imagenet, tmp_path, monkeypatch):
    out, words = tmp_path, ["--data", imagenet, "--out", tmp_path, *TINY, "--epochs", "2"]
    forward, steps = watch(monkeypatch, common, "forward"), watch(monkeypatch, common, "autocast")
    rows, text = run(*words)
    assert forward and steps and {"LC", "E2E-FT +VRF", "LP-FT +VRF"} < {r["method"] for r in rows}
    del forward[:], steps[:]
    kept = {p: p.stat().st_mtime_ns for p in out.glob("c*/*")}
    again, said = run(*words)
    assert not forward and not steps and "trained before" in said
    assert values(again) == values(rows)
    assert {p: p.stat().st_mtime_ns for p in out.glob("c*/*")} == kept != {}
    tables = [t[t.index("accuracy in %") : t.index("results:")] for t in (text, said)]
    assert tables[0] == tables[1]


# VRF on a checkpoint


def test_the_failure_set_is_counted_on_the_training_images(tree, out, plain):
    rows, text, _ = plain
    zs, ft = (row(rows, m)["right"]["again"] for m in ("Zero-shot", "E2E-FT"))
    stored, n, k = failure_count(text)
    assert (stored, n, k) == (int((ft & ~zs).sum()), 80, 1) and stored > 20


def test_our_own_checkpoint_as_finetuned_repeats_its_rows(tree, out, plain):
    (checkpoint,) = out.glob("checkpoints/e2e-ft-*.pt")
    rows, text = on_tree(tree, out, "--finetuned", checkpoint)
    assert values(rows) == values(plain[0], lambda m: m.replace("E2E-FT", "Fine-tuned"))
    assert "Fine-tuned +VRF" in text and "1. Fine-tuned moves" in text


def test_a_whole_clip_as_finetuned_gets_its_head_from_its_own_text_tower(tree, out, tmp_path):
    torch.manual_seed(7)
    clip = common.load_clip(vrf.Config(model="tiny_clip", pretrained="random"))
    torch.save({"state_dict": clip.model.state_dict()}, tmp_path / "whole.pt")
    tuned, _ = on_tree(tree, out, "--finetuned", tmp_path / "whole.pt")
    alone, _ = on_tree(tree, out, "--methods", "", "--weights", tmp_path / "whole.pt")
    assert right(tuned, "Fine-tuned") == right(alone, "Zero-shot")
    assert right(tuned, "Zero-shot") != right(alone, "Zero-shot")


def test_a_pickled_image_classifier_as_finetuned_equals_its_tensors(
    tree, out, tmp_path, monkeypatch
):
    torch.manual_seed(7)
    clip = common.load_clip(vrf.Config(model="tiny_clip", pretrained="random"))
    state = foreign_module(clip, tmp_path, monkeypatch)
    same = {k.removeprefix("image_encoder.model."): v for k, v in state.items() if "visual." in k}
    same |= {f"head.{k}": state[f"classification_head.{k}"] for k in ("weight", "bias")}
    torch.save(same, tmp_path / "plain.pt")
    words = ["--quick-gelu", "yes", "--finetuned"]
    pickled, _ = on_tree(tree, out, *words, tmp_path / "checkpoint_10.pt")
    tensors, _ = on_tree(tree, out, *words, tmp_path / "plain.pt")
    assert values(pickled) == values(tensors)
    with pytest.raises(common.InputError, match="checkpoint_10.pt has another activation; set"):
        on_tree(tree, out, "--finetuned", tmp_path / "checkpoint_10.pt")


# selection


def test_wrong_labels_in_a_shift_set_change_no_choice(tree, plain, tmp_path, monkeypatch):
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tree, poisoned, symlinks=True)
    (poisoned / "again").unlink()
    shutil.copytree(tree / "again", poisoned / "again")
    for name in ("again", "noisy"):
        (poisoned / name / "hue_0").rename(poisoned / "kept")
        for c in range(1, CLASSES):
            (poisoned / name / f"hue_{c}").rename(poisoned / name / f"hue_{c - 1}")
        (poisoned / "kept").rename(poisoned / name / f"hue_{CLASSES - 1}")
    temperatures = watch(monkeypatch, common, "temperature")
    rows, text = on_tree(poisoned, tmp_path / "out")
    assert [t for _, t in temperatures] == plain[2] and failure_count(text) == failure_count(
        plain[1]
    )
    assert [r["choice"] for r in rows] == [r["choice"] for r in plain[0]]
    chosen = {r["method"]: r["choice"] for r in rows if r["choice"] is not None}
    assert len(chosen) == 7 and isinstance(chosen["E2E-FT +VRF"], tuple)
    for method in chosen:
        assert right(rows, method)["test"] == right(plain[0], method)["test"]
    assert shares(rows, "E2E-FT")["again"] < 0.3 < shares(plain[0], "E2E-FT")["again"]


def test_selection_code_takes_what_is_best_on_the_reported_set(tree, out, plain):
    rows, text = on_tree(tree, out, "--selection", "code")
    assert "selection sees the reported images" in text
    for name in ("+OSE", "+VRF"):
        top = shares(rows, f"E2E-FT {name} oracle")["test"]
        assert shares(rows, f"E2E-FT {name}")["test"] == top
    for name in ("+OSE", "+VRF"):  # an oracle is tuned on the set itself, the row on ID val
        oracle, own = (shares(plain[0], f"E2E-FT {name}{x}") for x in (" oracle", ""))
        assert all(oracle[s] >= own[s] for s in own)
    choices = [[r["choice"] for r in x] for x in (rows, plain[0])]
    assert choices[0] != choices[1]
    assert right(rows, "E2E-FT") == right(plain[0], "E2E-FT")  # the same training


# options


def distances(monkeypatch, tree, out, *words):
    """Rows, and per call of kth_distance (val, test, shifts) its (arguments, result)."""
    with monkeypatch.context() as patch:
        calls = watch(patch, vrf, "kth_distance")
        return on_tree(tree, out, *words)[0], calls


def test_distance_paper_is_the_root_and_converts_a_and_b(tree, out, monkeypatch):
    squared = distances(monkeypatch, tree, out, "--ab", "0.25,0.2")
    roots = distances(monkeypatch, tree, out, "--ab", "0.25,0.2", "--distance", "paper")
    assert row(squared[0], "E2E-FT +VRF")["choice"] == (0.25, 0.2)
    assert row(roots[0], "E2E-FT +VRF")["choice"] == pytest.approx((0.5, 0.2))
    assert len(squared[1]) == len(roots[1]) == 4
    for (_, d2), (_, d) in zip(squared[1], roots[1], strict=True):
        torch.testing.assert_close(d.square(), d2)


def test_k_rule_code_is_relative_to_the_training_set(tree, out, plain):
    stored, n, k = failure_count(on_tree(tree, out, "--k-rule", "code")[1])
    assert k == min(round(1000 * stored / n), stored) > 1
    assert failure_count(on_tree(tree, out, "--p", "0.1")[1])[2] == int(0.1 * stored)
    assert failure_count(plain[1])[2] == 1


def test_features_zs_searches_in_the_zero_shot_encoder(tree, out, monkeypatch):
    words = ["--methods", "LC,E2E-FT", "--ensemble", "LC,E2E-FT", "--epochs", "6"]
    for features, expected in (("zs", True), ("ft", False)):
        _, calls = distances(monkeypatch, tree, out, *words, "--features", features)
        lc, ft = calls[:4], calls[4:]  # LC's encoder is ZS's
        assert [torch.equal(a[0], b[0]) for (a, _), (b, _) in zip(lc, ft, strict=True)] == (
            [expected] * 4
        )
        v, V = calls[6][0][:2]  # E2E-FT on the training images: V is a part of them
        assert len(calls) == 8 and torch.cdist(V, v).amin(1).max() < 1e-3


def test_binary_weight_is_ft_when_near_and_zs_when_far(tree, out, monkeypatch):
    d = torch.cat([d for _, d in distances(monkeypatch, tree, out)[1][1:]])  # without val
    a = round(d.median().item(), 4)
    rows, _ = on_tree(tree, out, "--weight", "binary", "--ab", f"{a},0.1")
    near = d < a
    zs, ft, mixed = (
        torch.cat(list(row(rows, m)["right"].values()))
        for m in ("Zero-shot", "E2E-FT", "E2E-FT +VRF")
    )
    assert torch.equal(mixed, torch.where(near, ft, zs)) and not torch.equal(mixed, ft)


def test_linear_weight_runs_from_zs_at_slope_zero_to_ft_at_a_steep_one(tree, out):
    flat, _ = on_tree(tree, out, "--weight", "linear", "--ab", "5,0.0000001")
    steep, _ = on_tree(tree, out, "--weight", "linear", "--ab", "5,100")
    assert right(flat, "E2E-FT +VRF") == right(flat, "Zero-shot")
    assert right(steep, "E2E-FT +VRF") == right(steep, "E2E-FT") != right(flat, "Zero-shot")


def test_temperature_paper_makes_calibrated_rows_plain(tree, out, plain):
    rows, text = on_tree(tree, out, "--temperature", "paper")
    assert "ZS 1.00, E2E-FT 1.00" in text
    for a, b in (("+OSE calibrated", "+OSE"), ("+VRF raw", "+VRF")):
        a, b = row(rows, f"E2E-FT {a}"), row(rows, f"E2E-FT {b}")
        assert a["choice"] == b["choice"]
        assert all(torch.equal(a["right"][s], b["right"][s]) for s in a["right"])
    assert right(plain[0], "E2E-FT +VRF raw") != right(plain[0], "E2E-FT +VRF")


def test_temperature_code_matches_confidence_and_nll_has_the_least_nll(
    tree, out, plain, monkeypatch
):
    T = watch(monkeypatch, common, "temperature")
    code, nll = (on_tree(tree, out, "--temperature", x)[1] for x in ("code", "nll"))
    assert code != nll and len(T) == 4
    (logits, labels, _), t = T[1]
    confidence = (logits.double() / t).softmax(1).amax(1).mean().item()
    assert confidence == pytest.approx(common.accuracy(logits, labels), abs=1e-3)
    (logits, labels, _), best = T[3]
    losses = [F.cross_entropy(logits.double() / t, labels) for t in (0.9 * best, best, 1.1 * best)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_zsf_rule_zs_wrong_keeps_all_zero_shot_failures(tree, out, plain):
    stored, n, _ = failure_count(on_tree(tree, out, "--zsf-rule", "zs-wrong")[1])
    wrong = int((~row(plain[0], "Zero-shot")["right"]["again"]).sum())
    assert stored == wrong > failure_count(plain[1])[0] and n == 80


def test_a_random_start_depends_on_the_seed_alone(tree, out, plain, tmp_path):
    torch.manual_seed(99)
    words = ["--methods", "LC", "--ensemble", "", "--out", tmp_path]
    again, _ = on_tree(tree, out, *words)
    assert right(again, "Zero-shot") == right(plain[0], "Zero-shot")
    other, _ = on_tree(tree, out, *words, "--seed", "1")
    assert right(other, "Zero-shot") != right(again, "Zero-shot")


def test_methods_without_ensembles_give_their_rows(tree, out):
    rows, text = on_tree(tree, out, "--methods", "LC")
    assert [r["method"] for r in rows] == ["Zero-shot", "LC"] and "oracle" not in text
    spaced, _ = on_tree(tree, out, "--methods", "LC", "--ensemble", "E2E-FT, LC")
    assert "LC +VRF" in [r["method"] for r in spaced]


def test_without_a_failure_set_vrf_is_zero_shot_and_the_run_finishes(tree, tmp_path):
    rows, text = on_tree(tree, tmp_path, "--lr", "0")
    assert failure_count(text) == (0, 80, 1) and "VRF is zero-shot then" in text
    assert right(rows, "E2E-FT +VRF") == right(rows, "Zero-shot")
    assert "3. Under shift" in text and (tmp_path / "figures/vrf.png").is_file()


@pytest.mark.parametrize(
    "words",
    ["--batch 0", "--epochs 0", "--seeds 0", "--seed -1", "--lr -1", "--lr nan", "--p -1"]
    + ["--warmup -1", "--clip -1", "--weight-decay -1", "--workers -2", "--lr-lc inf"],
)
def test_a_number_that_makes_no_sense_is_refused_before_any_work(words):
    with pytest.raises(
        common.InputError, match=f"^{words}.*: expected at least (-1|0|1)( and at most 1)?$"
    ):
        run(*words.replace(" -", "=-").split())


# damaged images, full disks


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The tree with a truncated JPEG in train and one in a shift set."""
    root = make_tree(tmp_path_factory.mktemp("damaged"))
    (root / "again").unlink()
    for name in ("train/hue_3/5.jpg", "noisy/hue_1/0.jpg"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])
    return root


def test_skipped_images_are_counted_and_the_run_finishes(damaged, tmp_path):
    rows, text = on_tree(
        damaged, tmp_path, "--skip-bad-images", "--methods", "LC,E2E-FT", "--batch", 79
    )
    for split, n, bad in (("train", 80, "hue_3/5.jpg"), ("noisy", 30, "hue_1/0.jpg")):
        path = damaged / split / bad
        assert f"{split}: 1 of {n} images are unreadable, left out: {path}\n" in text
    assert failure_count(text)[1] == 79
    assert {s: len(v) for s, v in rows[0]["right"].items()} == {"test": 40, "noisy": 29}
    for path in tmp_path.glob("checkpoints/*.pt"):
        saved = torch.load(path, weights_only=True)
        assert saved["step"] == saved["steps"]
    with pytest.raises(common.InputError, match="noisy/hue_1/0.jpg cannot be read"):
        on_tree(damaged, tmp_path, "--methods", "")  # not from the caches of the run that skipped


def test_a_set_without_one_readable_image_is_named(tree, out, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken, ignore=lambda *_: ["again"])
    for path in (broken / "noisy").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(common.InputError, match="noisy: none of its 30 images can be read"):
        on_tree(broken, tmp_path / "out", "--skip-bad-images", "--methods", "")


@pytest.mark.parametrize(
    ("bad", "workers"),
    [("train/hue_3/5.jpg", 0), ("train/hue_3/5.jpg", 1), ("noisy/hue_1/0.jpg", 0)],
)
def test_an_unreadable_image_is_named_and_stops(bad, workers, damaged, tmp_path):
    words = ["--methods", "E2E-FT" if bad.startswith("train") else "", "--workers", workers]
    with pytest.raises(common.InputError) as raised:
        on_tree(damaged, tmp_path, *words)
    sentence = str(raised.value)
    assert sentence.startswith(str(damaged / bad)) and "--skip-bad-images" in sentence
    assert "Traceback" not in sentence and "\n" not in sentence


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of 64 KB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a 64 KB file system needs root")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_costs_the_files_and_not_the_table(full_disk, tree, plain):
    rows, text = on_tree(tree, full_disk)
    assert values(rows) == values(plain[0])
    assert "No space left" in text or "going on without" in text
    assert "1. E2E-FT moves" in text


# the digits


def test_two_minutes_of_digits_tell_the_story(tmp_path, monkeypatch):
    sets = {"train": 3000, "val": 400, "test": 2000, "uci": 300, "fonts": 300, "sketch": 300}
    monkeypatch.setattr(common, "EMBEDDED", faults.few_digits(tmp_path / "digits", sets))
    rows, text = run("--epochs", "1", "--methods", "E2E-FT", "--out", tmp_path, "--device", "cpu")
    zs, ft, mixed = (shares(rows, m) for m in ("Zero-shot", "E2E-FT", "E2E-FT +VRF"))
    assert zs["test"] == pytest.approx(0.779, abs=0.01)  # data/README.md
    assert ft["test"] > zs["test"] + 0.05
    assert common.mean_shift(ft) < common.mean_shift(zs)
    assert common.mean_shift(ft) < common.mean_shift(mixed)
    assert failure_count(text)[0] > 100
    assert re.findall(r"^(\d)\. ", text[text.index("results:") :], re.MULTILINE) == ["1", "2", "3"]
