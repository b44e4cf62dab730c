"""studies/carot_ablations.py: each ablation once on a few digits; properties of the corruptions."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import FOUR

import carot
import common
from data import trees

sys.path.insert(0, str(common.HERE / "studies"))
import carot_ablations as ablations  # noqa: E402

DIGITS = common.open_data("digits").test.images[:60:6]


# corruptions


@pytest.mark.parametrize("name", list(ablations.CORRUPTIONS))
def test_corruptions_keep_shape_and_type_and_grow_with_severity(name):
    far = []
    for images in (DIGITS, np.repeat(DIGITS[..., None], 3, -1)):
        for amount in ablations.CORRUPTIONS[name]:
            got = ablations.corrupt(images, name, amount, np.random.default_rng(0))
            again = ablations.corrupt(images, name, amount, np.random.default_rng(0))
            assert got.shape == images.shape and got.dtype == np.uint8
            assert np.array_equal(got, again)
            far.append(np.abs(got.astype(float) - images).mean())
    assert len(far) == 10
    for grey_or_colour in (far[:5], far[5:]):
        assert 0 < grey_or_colour[0] and grey_or_colour == sorted(grey_or_colour)


def test_corruptions_of_a_plain_image_by_hand():
    plain, rng = np.full((1, 32, 32), 100, np.uint8), np.random.default_rng(0)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
        amount = ablations.CORRUPTIONS[name][2]
        assert np.array_equal(ablations.corrupt(plain, name, amount, rng), plain)
    assert (ablations.corrupt(plain, "brightness", 0.2, rng) == 151).all()
    noisy = ablations.corrupt(np.repeat(plain, 40, 0), "gaussian_noise", 0.1, rng) / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.03)
    hit = ablations.corrupt(np.repeat(plain, 40, 0), "impulse_noise", 0.1, rng)
    assert (hit != 100).mean() == pytest.approx(0.1, rel=0.1) and set(np.unique(hit)) == {
        0,
        100,
        255,
    }


def test_corruptions_are_among_imagenet_cs_fifteen():
    assert set(ablations.CORRUPTIONS) < set(trees.CORRUPTIONS)
    assert len(trees.CORRUPTIONS) == 15 and len(trees.EXTRA_CORRUPTIONS) == 4
    left_out = set(trees.CORRUPTIONS) - set(ablations.CORRUPTIONS)
    assert left_out == {"snow", "frost", "fog", "glass_blur"}


# ImageNet-C's tree


def make_imagenet_c(root, names=trees.CORRUPTIONS, between=None):
    """Two training classes; three in the corrupted sets, one image each."""
    wnids = [FOUR[i] for i in (0, 1, 3)]
    for wnid in wnids[:2]:
        (root / "imagenet/train" / wnid).mkdir(parents=True)
    for name in names:
        for severity in range(1, 6):
            for wnid in wnids:
                place = root / "ImageNet-C" / (between or "") / name / str(severity) / wnid
                place.mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(place / "a.JPEG")
    return root / "imagenet"


def test_imagenet_c_has_15_corruptions_of_5_severities_in_the_trees_classes(tmp_path):
    sets = list(trees.imagenet_c(make_imagenet_c(tmp_path)))
    assert len(sets) == 75 and [s[0] for s in sets[::5]] == trees.CORRUPTIONS
    assert [s[1] for s in sets[:6]] == [1, 2, 3, 4, 5, 1]
    for name, severity, split in sets:
        assert split.name == f"{name} {severity}" and split.labels.tolist() == [0, 1]


def test_imagenet_cs_extra_corruptions_and_archive_folders_are_read(tmp_path):
    names = [*trees.CORRUPTIONS, "saturate"]
    sets = list(trees.imagenet_c(make_imagenet_c(tmp_path, names, "blur")))
    assert len(sets) == 80 and sets[-1][0] == "saturate"


def test_a_missing_corruption_or_severity_is_named(tmp_path):
    tree = make_imagenet_c(tmp_path, trees.CORRUPTIONS[1:])
    with pytest.raises(common.InputError, match="has no gaussian_noise/; it holds"):
        list(trees.imagenet_c(tree))
    with pytest.raises(common.InputError, match="has no imagenet-c/, there or beside it"):
        (tmp_path / "ImageNet-C").rename(tmp_path / "else")
        list(trees.imagenet_c(tree))
    (tmp_path / "else").rename(tmp_path / "imagenet-c")
    (tmp_path / "imagenet-c/shot_noise").rename(tmp_path / "imagenet-c/gaussian_noise")
    (tmp_path / "imagenet-c/gaussian_noise/4").rename(tmp_path / "4")
    with pytest.raises(common.InputError, match="gaussian_noise has no 4/"):
        list(trees.imagenet_c(tree))


# the ablations


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ablations"))
    words = ["--epochs", "1", "--batch", "16", "--warmup", "1", "--ema-every", "1", "--out", out]
    s = ablations.Setting(*carot.prepare([*words, "--device", "cpu"]))
    for split in (s.data.train, s.data.val, s.data.test, *s.data.shifts):
        split.images, split.labels = split.images[:32], split.labels[:32]
        split.__dict__.pop("fingerprint", None)
    s.data.shifts = s.data.shifts[:2]
    return s


@pytest.mark.parametrize("name", list(ablations.ABLATIONS))
def test_every_ablation_prints_its_table(name, setting, capsys, monkeypatch):
    some = {k: v for k, v in ablations.CORRUPTIONS.items() if k in ("brightness", "pixelate")}
    monkeypatch.setattr(ablations, "CORRUPTIONS", some)
    ablations.ABLATIONS[name](setting)
    out = capsys.readouterr().out
    assert "\n-----" in out and f"figures/{name}.png" in out


def lines(out, start):
    return [x.split() for x in out.splitlines() if x.split()[:1] == [start]]


def test_table_4s_ends_are_zero_shot_flyp_and_carot_and_are_trained_once(
    setting, capsys, monkeypatch
):
    real, trained = common.fit, []
    monkeypatch.setattr(
        common,
        "fit",
        lambda *a, **k: trained.append(common.Path(k["path"]).is_file()) or real(*a, **k),
    )
    config, data, clip = setting.config, setting.data, setting.clip
    models = ablations.models_of(setting, 0)
    rows = carot.evaluate(config, data, clip, models, 0)
    ablations.components(setting)
    assert trained and all(trained)  # by the tests before; here they are read
    table = [x.split() for x in capsys.readouterr().out.splitlines() if x[:1] in ("x", "-")]
    of = {tuple(x[:3]): x[3:] for x in table if len(x) == 8}
    assert len(of) == 8
    for key, method in (("---", "ZS"), ("x--", "FLYP"), ("xxx", "CaRot")):
        (row,) = [r for r in rows if r["method"] == method]
        found = ablations.cells(
            [
                common.accuracies([row], method)["test"],
                row["measures"]["ECE"]["test"],
                common.mean_shift(common.accuracies([row], method)),
                common.mean_shift(row["measures"]["ECE"]),
                row["spectrum"][-1],
            ]
        )
        assert of[tuple(key)] == found


def test_wise_fts_ends_are_zero_shot_and_the_tuned_model(setting, capsys):
    ablations.wise(setting)
    out = capsys.readouterr().out
    ends = {m: {x[1]: x[2:] for x in lines(out, m)} for m in ("FT", "FLYP", "CaRot")}
    assert ends["FT"]["0"] == ends["FLYP"]["0"] == ends["CaRot"]["0"]
    assert all(e["0"] != e["1"] for e in ends.values())
    mixed = ablations.measure(setting, lambda seed: ablations.models_of(setting, seed)["CaRot"])
    assert ends["CaRot"]["1"] == ablations.cells(mixed)


def test_an_unknown_ablation_gets_the_nearest_name():
    with pytest.raises(common.InputError, match="did you mean 'lambdas'"):
        ablations.main(["lambda"])


def test_corruptions_need_an_array_or_imagenet_c(setting):
    data = dataclasses.replace(setting.data, kind="folder")
    data.test = common.Split("test", "", ["a.png"], torch.tensor([0]))
    with pytest.raises(common.InputError, match="needs ImageNet with imagenet-c/"):
        list(ablations.corrupted_sets(dataclasses.replace(setting, data=data)))
