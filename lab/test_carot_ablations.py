"""lab/carot_ablations.py: each ablation on a few digits; its measures, losses and corruptions."""

import copy
import csv
import dataclasses
import math

import carot_ablations as ablations
import image_corruptions
import imagenet_c
import numpy as np
import pytest
import torch
from image_corruptions import CORRUPTIONS, corrupt
from PIL import Image

import carot
import common
import vrf

DIGITS = common.open_data("digits").test.images[:60:6]


# corruptions


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_keep_shape_and_type_and_grow_with_severity(name):
    for images in (DIGITS, np.repeat(DIGITS[..., None], 3, -1)):
        far = []
        for amount in CORRUPTIONS[name]:
            got = corrupt(images, name, amount, np.random.default_rng(0))
            again = corrupt(images, name, amount, np.random.default_rng(0))
            assert got.shape == images.shape and got.dtype == np.uint8
            assert np.array_equal(got, again)
            far.append(np.abs(got.astype(float) - images).mean())
        assert 0 < far[0] and far == sorted(far) and len(far) == 5


def test_corruptions_of_a_plain_image_by_hand():
    plain, rng = np.full((1, 32, 32), 100, np.uint8), np.random.default_rng(0)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
        assert np.array_equal(corrupt(plain, name, CORRUPTIONS[name][2], rng), plain)
    assert (corrupt(plain, "brightness", 0.2, rng) == 151).all()
    noisy = corrupt(np.repeat(plain, 40, 0), "gaussian_noise", 0.1, rng) / 255
    assert noisy.std() == pytest.approx(0.1, rel=0.03)
    hit = corrupt(np.repeat(plain, 40, 0), "impulse_noise", 0.1, rng)
    assert (hit != 100).mean() == pytest.approx(0.1, rel=0.1)
    assert set(np.unique(hit)) == {0, 100, 255}


def test_corruptions_are_among_imagenet_cs_fifteen():
    left_out = set(imagenet_c.CORRUPTIONS) - set(CORRUPTIONS)
    assert set(CORRUPTIONS) < set(imagenet_c.CORRUPTIONS)
    assert left_out == {"snow", "frost", "fog", "glass_blur"}
    assert len(imagenet_c.CORRUPTIONS) == 15 and len(imagenet_c.EXTRA_CORRUPTIONS) == 4


# ImageNet-C's tree

WNIDS = ("n01440764", "n01443537", "n01484850")


def make_imagenet_c(root, names=imagenet_c.CORRUPTIONS, between=""):
    """Two training classes; three in the corrupted sets, one image each."""
    for wnid in WNIDS[:2]:
        (root / "imagenet/train" / wnid).mkdir(parents=True)
    for name in names:
        for severity in range(1, 6):
            for wnid in WNIDS:
                place = root / "ImageNet-C" / between / name / str(severity) / wnid
                place.mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(place / "a.JPEG")
    return root / "imagenet"


def test_imagenet_c_has_15_corruptions_of_5_severities_in_the_trees_classes(tmp_path):
    sets = list(imagenet_c.imagenet_c(make_imagenet_c(tmp_path)))
    assert len(sets) == 75 and [s[0] for s in sets[::5]] == imagenet_c.CORRUPTIONS
    assert [s[1] for s in sets[:6]] == [1, 2, 3, 4, 5, 1]
    for name, severity, split in sets:
        assert split.name == f"{name} {severity}" and split.labels.tolist() == [0, 1]


def test_imagenet_cs_extra_corruptions_and_archive_folders_are_read(tmp_path):
    names = [*imagenet_c.CORRUPTIONS, "saturate"]
    sets = list(imagenet_c.imagenet_c(make_imagenet_c(tmp_path, names, "blur")))
    assert len(sets) == 80 and sets[-1][0] == "saturate"


def test_a_missing_corruption_or_severity_is_named(tmp_path):
    tree = make_imagenet_c(tmp_path, imagenet_c.CORRUPTIONS[1:])
    with pytest.raises(common.InputError, match="has no gaussian_noise/; it holds"):
        list(imagenet_c.imagenet_c(tree))
    with pytest.raises(common.InputError, match="has no imagenet-c/, there or beside it"):
        (tmp_path / "ImageNet-C").rename(tmp_path / "else")
        list(imagenet_c.imagenet_c(tree))
    (tmp_path / "else").rename(tmp_path / "imagenet-c")
    (tmp_path / "imagenet-c/shot_noise").rename(tmp_path / "imagenet-c/gaussian_noise")
    (tmp_path / "imagenet-c/gaussian_noise/4").rename(tmp_path / "4")
    with pytest.raises(common.InputError, match="gaussian_noise has no 4/"):
        list(imagenet_c.imagenet_c(tree))


# measures and losses


def test_both_temperatures_undo_overconfidence_and_the_papers_has_the_least_ece_of_its_grid():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    logits = logits * 3
    T = ablations.least_ece_temperature(logits, labels)
    assert T == pytest.approx(3, rel=0.15)
    assert common.temperature(logits, labels, "nll") == pytest.approx(3, rel=0.15)
    eces = [common.ece((logits / t).softmax(1), labels) for t in (T, 1, 2, 2.9, 3.1, 4)]
    assert min(eces) == eces[0] < 0.02 < 0.15 < eces[1]


def test_reliability_has_every_image_once_and_gives_the_pooled_ece():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.3 * torch.rand(2, 600, generator=generator).double()
    right = torch.rand(2, 600, generator=generator) < confidence - 0.1
    rows = []
    for c, r in zip(confidence, right, strict=True):
        tensors = {"confidence": {common.ID: c[:9], "far": c}}
        rows.append(common.Row("A", 0, {common.ID: r[:9], "far": r}, tensors=tensors))
    bins = ablations.bins_of(rows)
    assert sum(n for *_, n in bins) == 1200 and bins[0][2] == 0 and math.isnan(bins[0][0])
    inside = (confidence > 0.7) & (confidence <= 0.8)
    expected = confidence[inside].mean().item(), right[inside].double().mean().item()
    assert bins[7] == pytest.approx((*expected, int(inside.sum())))
    p = torch.stack([confidence.flatten(), 1 - confidence.flatten()], 1)
    assert ablations.pooled_ece(bins) == pytest.approx(common.ece(p, (~right.flatten()).long()))


def test_the_rival_of_the_constraint_by_hand():
    f = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, -1.0]])  # variances 2 and 1/2
    assert ablations.minus_sigma_min(f).item() == pytest.approx(-0.5)


def test_label_smoothing_moves_a_tenth_of_every_target_to_the_whole_batch():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 0.0, 0.0]])
    target = 0.9 * torch.eye(3) + 0.1 / 3
    rows, columns = (-(target * z.log_softmax(1)).sum(1).mean() for z in (logits, logits.T))
    loss = carot.contrastive(logits) + ablations.label_smoothing(None, logits)
    torch.testing.assert_close(loss, (rows + columns) / 2)


# the ablations


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("ablations"))
    words = ["--epochs", "1", "--batch", "16", "--warmup", "1", "--ema-every", "1", "--out", out]
    s = ablations.Setting(*carot.prepare([*words, "--device", "cpu"]))
    for split in (s.data.train, s.data.val, *s.splits):
        split.images, split.labels = split.images[:32], split.labels[:32]
    s.data.shifts = s.data.shifts[:2]
    return s


@pytest.mark.parametrize("name", list(ablations.ABLATIONS))
def test_every_ablation_prints_its_table(name, setting, capsys, monkeypatch):
    some = {k: v for k, v in CORRUPTIONS.items() if k in ("brightness", "pixelate")}
    monkeypatch.setattr(image_corruptions, "CORRUPTIONS", some)
    ablations.ABLATIONS[name](setting)
    out = capsys.readouterr().out
    assert "\n-----" in out
    assert (f"figures/{name}.png" in out) == (name != "temperature")


def lines(out, start):
    return [x.split() for x in out.splitlines() if x.split()[:1] == [start]]


def test_table_4s_ends_are_ft_flyp_and_carot(setting, capsys):
    config, data, clip = setting.config, setting.data, setting.clip
    rows = carot.evaluate(config, data, clip, ablations.models_of(setting, 0), 0)
    capsys.readouterr()
    ablations.components(setting)  # by the tests before; here all checkpoints are read
    out = capsys.readouterr().out
    assert out.count("trained before, read from") == 8
    of = {tuple(x[:3]): x[3:] for m in ("cross-entropy", "L_MCL") for x in lines(out, m)}
    assert len(of) == 8
    ends = {"FT": ("cross-entropy", "-", "-"), "FLYP": ("L_MCL", "-", "-")}
    for method, key in (ends | {"CaRot": ("L_MCL", "x", "x")}).items():
        row = [r for r in rows if r.method == method]
        assert of[key] == ablations.cells(ablations.means_of(row))


def test_another_term_is_another_training_and_one_that_is_zero_gives_carot(setting):
    def nothing(f, logits):
        return 0 * f.sum()

    same = ablations.tuned(setting, 0, "same", nothing).state_dict()
    carots = ablations.tuned(setting, 0).state_dict()
    other = ablations.tuned(setting, 0, "same", ablations.rival(0.2)).state_dict()
    assert all(torch.equal(same[k], carots[k]) for k in same)
    assert not torch.equal(other["head.weight"], same["head.weight"])


def test_naive_fine_tuning_without_terms_is_ft_and_each_term_changes_it(setting):
    ft = ablations.models_of(setting, 0)["FT"].state_dict()
    plain, oc, sd = (ablations.naive(setting, 0, *x) for x in ((0, 0), (0.2, 0), (0, 1.5)))
    assert all(torch.equal(x, ft[k]) for k, x in plain.state_dict().items())
    assert not any(torch.equal(m.head.weight, ft["head.weight"]) for m in (oc, sd))


def test_wise_fts_ends_are_zero_shot_and_the_tuned_model(setting):
    ablations.wise(setting)
    models = ablations.models_of(setting, 0)
    with open(setting.config.out + "/figures/wise.csv", newline="") as file:
        curves = {(x["method"], x["alpha"]): list(x.values())[2:] for x in csv.DictReader(file)}
    assert len(curves) == 4 * 11
    for m in ("FT", "CaRot"):
        ends = {"0.0": "ZS", "1.0": m}
        for alpha, name in ends.items():
            model = models[name]
            numbers = ablations.measure(setting, lambda seed, model=model: model)
            assert curves[m, alpha] == ablations.cells(numbers)


def test_wise_ft_takes_the_alpha_of_least_ece_on_id_val(setting, capsys):
    ablations.wise(setting)
    (_, chosen) = lines(capsys.readouterr().out, "CaRot")
    models, eces = ablations.models_of(setting, 0), {}
    for alpha in [i / 10 for i in range(11)]:
        mixed = copy.deepcopy(models["CaRot"])
        mixed.load_state_dict(
            vrf.wse(models["ZS"].state_dict(), models["CaRot"].state_dict(), alpha)
        )
        val = common.predict(setting.config, {"": mixed}, setting.data.val, setting.clip)[""]
        eces[alpha] = common.ece(val.logits.softmax(1), val.labels)
    assert float(chosen[1]) == min(eces, key=eces.get)


def test_an_unknown_ablation_gets_the_nearest_name():
    with pytest.raises(common.InputError, match="did you mean 'lambdas'"):
        ablations.main(["lambda"])


def test_corruptions_need_an_array_or_imagenet_c(setting):
    data = dataclasses.replace(setting.data, kind="folder")
    data.test = common.Split("test", "", ["a.png"], torch.tensor([0]))
    with pytest.raises(common.InputError, match="needs ImageNet with imagenet-c/"):
        list(ablations.corrupted_sets(dataclasses.replace(setting, data=data)))
