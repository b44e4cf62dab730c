"""lab/er_settings.py: the paper's recipes as published, and runs on trees of its layouts."""

import contextlib
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_data import FOUR, objectnet, put  # noqa: E402

import common  # noqa: E402
import er_study  # noqa: E402
from data import images, testbeds, trees  # noqa: E402
from lab import er_axes, er_published, er_settings, networks  # noqa: E402

TINY = ["--model", "tiny_clip", "--weights", str(common.EMBEDDED / "tiny_clip.npz")]


def cifar(root, n=10, seed=0):
    """CIFAR-10's and CIFAR-10.1's layout: n images a batch, whose brightness is their class."""
    rng = np.random.default_rng(seed)

    def images(n):
        y = np.arange(n) % 10
        x = 20 * y[:, None, None, None] + rng.integers(40, size=(n, 32, 32, 3))
        return x.astype(np.uint8), y

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        x, y = images(n)
        batch = {b"data": x.transpose(0, 3, 1, 2).reshape(n, -1), b"labels": y.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    x, y = images(20)
    np.save(root / "cifar10.1_v6_data.npy", x)
    np.save(root / "cifar10.1_v6_labels.npy", y.astype(np.int32))
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return cifar(tmp_path_factory.mktemp("cifar"))


def run(*words, script=er_settings):
    """What main returns, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        result = script.main([str(w) for w in words])
    return result, printed.getvalue()


def replayed(out):
    return run("plot", f"{out}/trajectories/*.csv", "--out", out, script=er_published)[1]


def small(tree, out, *words):
    return ["--data", tree, "--out", out, "--incomplete", "--draws", 20, "--device", "cpu", *words]


SMALL = ["--weights", "random", "--size", 32, "--epochs", 2, "--lr", "0.01", "--seeds", 1]


def rows_of(out):
    """{file: its points}"""
    er_published.saved(f"{out}/trajectories/*.csv")  # nothing contradicts the lines
    paths = sorted(p for p in Path(out).glob("trajectories/*.csv") if p.stem != "testbed")
    return {p.name: er_study.read(p) for p in paths}


# recipes


def test_what_is_printed_as_the_papers_is_what_is_confirmed_of_it():
    paper = er_settings.PAPER
    for init, epochs, lr in (("pretrained", 100, "0.01,0.001,0.0001"), ("random", 250, "0.1,0.01")):
        said = paper[f"cifar {init}"]
        assert (said["epochs"], said["lr"], said["batch"], said["seeds"]) == (epochs, lr, 64, 5)
        assert (said["momentum"], said["weight_decay"], said["size"]) == (0.9, 1e-4, 224)
    bit = {"batch": 32768, "lr": "0.001", "epochs": 100, "weight_decay": 0.0, "momentum": 0.9}
    assert bit.items() <= paper["bit pretrained"].items()
    lambdas = [float(x) for x in paper["clip pretrained"]["lambdas"].split(",")]
    np.testing.assert_allclose(np.log10(lambdas), np.linspace(-6, 7, 10), atol=1e-5)
    assert networks.SIX == "alexnet resnet18 resnet50 resnet152 vgg11_bn wide_resnet50_2".split()


def test_every_number_of_a_recipe_is_marked_once_and_is_a_flag():
    flags = vars(er_settings.Config())
    for recipe, paper in er_settings.PAPER.items():
        ours = er_settings.OURS[recipe]
        assert paper.keys().isdisjoint(ours) and {*paper, *ours} <= flags.keys()
        shape = {"lr", "epochs", "batch", "momentum", "weight_decay", "seeds"}
        assert "clip" in recipe or shape <= {*paper, *ours}, recipe


def test_cifar_is_cropped_with_28_pixels_of_padding_at_224_and_imagenet_at_random():
    train, test = networks.transforms("cifar10", 224)
    assert "padding=28" in str(train) and "RandomHorizontalFlip" in str(train)
    assert "Random" not in str(test)
    train, test = networks.transforms("imagenet", 224)
    assert "RandomResizedCrop(size=(224, 224)" in str(train)
    assert "Resize(size=256" in str(test) and "CenterCrop(size=(224, 224))" in str(test)
    x = test(images.read_rgb(np.full((300, 400, 3), 128, np.uint8)))
    grey = (torch.tensor([128 / 255]) - 0.485) / 0.229
    assert x.shape == (3, 224, 224) and x[0, 0, 0] == pytest.approx(grey.item())


def test_bits_images_follow_its_rule_by_size_and_lie_in_minus_one_to_one():
    small_image = networks.bit_transform("cifar10", 0)(
        images.read_rgb(np.zeros((32, 32, 3), np.uint8))
    )
    assert small_image.shape == (3, 128, 128) and small_image.unique().tolist() == [-1]
    text = str(networks.bit_transform("imagenet", 0))
    assert "Resize(size=512" in text and "CenterCrop(size=(480, 480))" in text
    assert "Resize(size=80" in str(networks.bit_transform("cifar10", 64))


def test_only_the_last_layer_is_new_with_ten_rows_that_depend_on_the_seed(tmp_path):
    from torchvision import models

    torch.manual_seed(5)
    whole = models.resnet18().state_dict()
    torch.save(whole, tmp_path / "x.pth")
    config = er_settings.Config(weights=str(tmp_path / "x.pth"))
    new = [networks.six(config, 10, seed).state_dict() for seed in (0, 1)]
    changed = {k for k in whole if not torch.equal(whole[k], new[0][k])}
    assert changed == {"fc.weight", "fc.bias"} and new[0]["fc.weight"].shape == (10, 512)
    assert not torch.equal(new[0]["fc.weight"], new[1]["fc.weight"])
    alexnet = networks.six(er_settings.Config(arch="alexnet", weights="random"), 10, 0)
    assert alexnet.classifier[-1].weight.shape == (10, 4096)


def test_torchvisions_weights_are_the_first_ones_and_not_todays_default(tmp_path, monkeypatch):
    from torchvision import models

    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(5)
    state = models.resnet50().state_dict()
    torch.save(state, folder / "resnet50-0676ba61.pth")  # the file of IMAGENET1K_V1
    config = er_settings.Config(arch="resnet50")
    assert torch.equal(networks.six(config, 10, 0).conv1.weight, state["conv1.weight"])


def test_a_random_start_ignores_weights_and_depends_on_the_seed():
    config = er_settings.Config(arch="resnet18", init="random", weights="no/such/file")
    a, b, again = (networks.six(config, 10, seed).conv1.weight for seed in (0, 1, 0))
    assert torch.equal(a, again) and not torch.equal(a, b)


# logistic regression


def test_logistic_regression_has_the_gradient_of_its_loss():
    torch.manual_seed(0)
    x, y = torch.randn(40, 3).double(), torch.arange(40) % 4
    W = torch.randn(4, 4).double().requires_grad_()
    logits = x @ W[:, :-1].T + W[:, -1]
    own = torch.nn.functional.cross_entropy(logits, y) + 0.7 / 2 / 40 * W[:, :-1].square().sum()
    own.backward()
    loss, gradient = er_settings.objective(W.detach(), x, y, 0.7, chunk=16)
    assert loss == pytest.approx(own.item())
    torch.testing.assert_close(gradient, W.grad)


def test_logistic_regression_ends_where_the_gradient_vanishes_and_a_large_lambda_leaves_the_prior():
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
    steps, W = er_settings.logistic(x, y, 3, 1.0, 200)
    assert steps[:3].tolist() == [0, 1, 2] and W[0].abs().sum() == 0
    assert er_settings.objective(W[-1].double(), x, y, 1.0)[1].abs().max() < 1e-5
    _, W = er_settings.logistic(x, y, 3, 1e7, 200)
    assert W[-1][:, :-1].abs().max() < 1e-4
    torch.testing.assert_close(W[-1][:, -1].softmax(0), torch.tensor([1 / 6, 1 / 3, 1 / 2]))


# runs on small trees


@pytest.fixture(scope="module")
def cifar_run(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run("cifar", *small(tree, out), *SMALL)[1]


def test_a_networks_recipe_runs_on_a_small_cifar_tree_and_its_files_say_the_same(cifar_run):
    out, text = cifar_run
    assert "paper: " in text and "ours: val_fraction 0.02" in text
    assert "WARNING: cifar10.1-v6 and cifar10 are not the published sets" in text
    ((name, rows),) = rows_of(out).items()
    assert name.startswith("new-head-resnet18-lr-0-01-seed-0")
    assert sorted({r.step for r in rows}) == er_study.cadence(1, 2) == [0, 1, 2]
    first = rows[0]
    assert 10 * first.id == pytest.approx(round(10 * first.id))
    line = er_study.baseline(testbeds.read("cifar10"), "cifar10.1-v6")
    beta = er_study.beta(first.id, line.slope, line.intercept)
    assert first.er == pytest.approx(first.ood - beta)
    said = text[text.index("effective robustness on") :]
    assert replayed(out).endswith(said)


def test_a_finished_run_of_a_network_is_read_and_an_unfinished_one_goes_on(
    tree, cifar_run, tmp_path, monkeypatch
):
    words = ["cifar", *small(tree, tmp_path), *SMALL]
    measure, calls = er_study.measure, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:  # after the checkpoint of epoch 1
            raise MemoryError
        return measure(*args)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(er_study, "measure", dies)
        run(*words)
    (part,) = rows_of(tmp_path).values()
    assert {r.step for r in part} == {0, 1}
    run(*words)
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_steps", None)
        run(*words)
    (rows,), (straight,) = rows_of(tmp_path).values(), rows_of(cifar_run[0]).values()
    assert rows == straight


@pytest.fixture(scope="module")
def bit_run(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("bit")
    words = ["--weights", "random", "--size", 32, "--epochs", 3, "--lr", "0.1", "--seeds", 1]
    return out, run("bit", *small(tree, out), *words)[1]


def test_bits_head_is_followed_at_every_step_of_one_batch_and_its_features_stay(bit_run, tree):
    out, text = bit_run
    assert "batch 32768" in text and "weight_decay 0.0" in text
    ((name, rows),) = rows_of(out).items()
    assert name.startswith("head-only-resnetv2-50x1-bit")
    assert sorted({r.step for r in rows}) == [0, 1, 2, 3]  # 40 images: one step an epoch
    (kept,) = out.glob("checkpoints/*.pt")
    state = torch.load(kept, weights_only=True)["model"]
    assert {k: tuple(v.shape) for k, v in state.items()} == {"weight": (10, 2048), "bias": (10,)}
    assert rows[0].id == 0.1  # a head of zeros says one class


def test_bits_head_takes_plain_steps_of_sgd_at_a_constant_rate(bit_run, tree):
    out, _ = bit_run
    caches = [torch.load(p, weights_only=True)["features"] for p in out.glob("cache/bit-*.pt")]
    (x,) = (c for c in caches if len(c) == 40)
    y, head = common.open_data(str(tree)).train.labels, torch.nn.Linear(2048, 10)
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    sgd = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(head(x), y).backward()
        sgd.step()
    (kept,) = out.glob("checkpoints/*.pt")
    torch.testing.assert_close(torch.load(kept, weights_only=True)["model"], head.state_dict())


def test_bit_from_a_random_start_trains_every_weight(tree, tmp_path):
    words = ["--init", "random", "--size", 32, "--epochs", 1, "--lr", "0.1", "--seeds", 1]
    _, text = run("bit", *small(tree, tmp_path), *words)
    assert "testbed cifar10" in text and "random, resnetv2_50x1_bit, lr 0.1" in text
    (kept,) = tmp_path.glob("checkpoints/*.pt")
    trained = torch.load(kept, weights_only=True)["model"]
    config = er_settings.Config(arch="resnetv2_50x1_bit", init="random")
    start = dict(networks.bit(config, 10, 0).named_parameters())
    assert len(start) > 100 and not any(torch.equal(v, trained[k]) for k, v in start.items())


def test_lambda_is_chosen_on_held_out_images_and_poisoned_shifts_change_nothing(tree, tmp_path):
    words = [*TINY, "--lambdas", "1e-3,1,1e3", "--max-iter", 20]
    points, text = run("clip", *small(tree, tmp_path / "a"), *words)
    assert {p.run for p in points} == {
        f"head-only, tiny_clip, lambda {x}" for x in ("0.001", "1", "1e+03")
    } | {"zero-shot, tiny_clip"}
    poisoned = cifar(tmp_path / "tree")
    labels = np.load(poisoned / "cifar10.1_v6_labels.npy")
    np.save(poisoned / "cifar10.1_v6_labels.npy", (labels + 1) % 10)
    _, again = run("clip", *small(poisoned, tmp_path / "b"), *words)
    chosen = [next(x for x in t.splitlines() if x.startswith("lambda ")) for t in (text, again)]
    assert chosen[0] == chosen[1] and "by ID val" in chosen[0]
    shares = []
    for out in ("a", "b"):
        found = [r for rows in rows_of(tmp_path / out).values() for r in rows]
        found.sort(key=lambda r: (r.run, r.step, r.shift))
        shares.append([[getattr(r, c) for r in found] for c in ("step", "id", "ood")])
    assert shares[0][:2] == shares[1][:2] and shares[0][2] != shares[1][2]


def test_poisoned_shifts_change_no_weight_of_a_network(cifar_run, tmp_path):
    poisoned = cifar(tmp_path / "tree")
    x = np.load(poisoned / "cifar10.1_v6_data.npy")
    np.save(poisoned / "cifar10.1_v6_data.npy", 255 - x)
    run("cifar", *small(poisoned, tmp_path), *SMALL)
    plain, other = (
        torch.load(next(out.glob("checkpoints/*.pt")), weights_only=True)["model"]
        for out in (cifar_run[0], tmp_path)
    )
    assert all(torch.equal(plain[k], other[k]) for k in plain)


def with_shifts(root):
    """ImageNet's layout: four classes, V2, ObjectNet (two objects of three of them), R (two)."""
    put(root / "train", FOUR, 6)
    put(root / "val", FOUR, 3)
    put(root / "imagenetv2-matched-frequency", "0123", 2)
    put(root / "imagenet-r", [FOUR[1], FOUR[3]], 2)
    objectnet(root / "objectnet-1.0")
    for path in root.rglob("*.png"):  # put does not write images
        red = 60 * FOUR.index(path.parent.name) if path.parent.name in FOUR else 200
        Image.new("RGB", (8, 8), (red, 30, 60)).save(path)
    return root


def test_imagenet_runs_against_v2_objectnet_and_r_with_id_sets_of_their_classes(tmp_path):
    root = with_shifts(tmp_path / "tree")
    words = ["--lambdas", "1", "--max-iter", 5, *TINY]
    _, text = run("clip", *small(root, tmp_path / "o"), *words)
    n = {"imagenetv2-matched-frequency": (12, 8), "imagenet-r": (6, 4)}
    n["objectnet-1.0-beta"] = (9, 4)  # tench, goldfish, tiger shark; two objects of two images
    for shift, (at_home, away) in n.items():
        (line,) = [x for x in text.splitlines() if x.startswith(f"WARNING: {shift} and ")]
        assert line.endswith(f"are not the published sets: [{at_home}, {away}] images")
    assert len(rows_of(tmp_path / "o")) == 2
    assert "testbed imagenet and imagenet2020" in text
    assert " 66 " in text and " 85 " in text and " 80 " in text
    assert replayed(tmp_path / "o").endswith(text[text.index("effective robustness on") :])


def test_the_id_set_of_objectnet_merges_the_ids_of_an_object(tmp_path):
    data = common.open_data(str(with_shifts(tmp_path)))
    (shift,) = (s for s in data.shifts if s.name == "ObjectNet")
    testbed = testbeds.read("imagenet2020")
    views = er_settings.views_of(data, {"objectnet-1.0-beta": shift}, testbed)
    (at_home,) = (v for v in views if v[0] == "val-on-objectnet-classes")
    _, split, rows, labels, groups = at_home
    classes = data.test.labels[rows]
    assert split == "test" and sorted(classes.unique().tolist()) == [0, 1, 3]
    assert all(c in groups[label] for c, label in zip(classes.tolist(), labels, strict=True))
    logits = torch.eye(4)[[3]]  # tiger shark, of the object that tench is of, too
    assert common.project(logits, groups).argmax(1) == labels[classes == 0][0]


def test_a_tree_that_lacks_images_is_refused_unless_the_user_says_so(tree, tmp_path):
    with pytest.raises(common.InputError, match="ER would compare different sets"):
        run("cifar", "--data", tree, "--out", tmp_path, "--device", "cpu", *SMALL)


def test_trees_of_the_published_sizes_pass_and_another_version_of_the_shift_does_not(tree):
    config = common.parse(er_settings.Config, ["--data", str(tree), "--draws", "20"], "")

    def world(n_id, n_ood):
        data = common.open_data(str(tree))
        for split, n in ((data.test, n_id), (data.shifts[0], n_ood)):
            split.images, split.labels = np.zeros((n, 1, 1, 3), np.uint8), torch.zeros(n).long()
        return er_settings.make_world(config, data)

    assert "cifar10.1-v6" in world(10_000, 2000).bench.lines
    with pytest.raises(common.InputError, match="has 2,021 images and its ID set 10,000"):
        world(10_000, 2021)


def test_a_folder_of_v2_that_does_not_say_which_variant_is_refused(tmp_path):
    root = with_shifts(tmp_path)
    (root / "imagenetv2-matched-frequency").rename(root / "imagenetv2")
    with pytest.raises(common.InputError, match="does not say which ImageNetV2 it is"):
        run("clip", *small(root, tmp_path / "o"), *TINY)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cifa"], "there is no 'cifa'; did you mean 'cifar'"),
        (["cifar"], "--data: expected a CIFAR-10 or ImageNet tree"),
        (["clip", "--init", "random"], "clip has no --init random"),
        (["cifar", "--arch", "resnet19", "TREE"], "--arch resnet19: expected one of alexnet"),
        (["bit", "--arch", "bit", "TREE"], "--arch bit: expected one of resnetv2"),
        (["bit", "--weights", "no.npz", "TREE"], "--weights no.npz: no such file"),
        (
            ["cifar", "--weights", "no.pth", "TREE"],
            "--weights no.pth cannot be read .*: expected a state dict",
        ),
        (["cifar", "--lr", "fast", "TREE"], "--lr fast: expected positive numbers"),
        (
            ["cifar", "--subset", "hardest", "TREE"],
            "--cscores .* cannot be read .*: expected labels and scores",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(words, sentence, tree, tmp_path):
    more = small(tree, tmp_path) if "TREE" in words else ["--out", tmp_path]
    with pytest.raises(common.InputError, match=sentence):
        run(*(w for w in words if w != "TREE"), *more)


def test_without_a_network_missing_weights_are_a_sentence(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(common.InputError, match="could not get torchvision's resnet18 .*--weights"):
        run("cifar", *small(tree, tmp_path))


# subsets by C-score


def scores(path, labels, seed=0):
    rng = np.random.default_rng(seed)
    np.savez(path, labels=labels, scores=rng.random(len(labels)))
    return path


def test_c_scores_whose_labels_are_in_another_order_are_refused(tree, tmp_path):
    labels = trees.find(str(tree)).train.labels.numpy()
    other = scores(tmp_path / "x.npz", np.sort(labels))
    words = ["--subset", "hardest", "--per-class", 3, "--cscores", other]
    with pytest.raises(common.InputError, match="not those of the training images in their order"):
        run("cifar", *small(tree, tmp_path), *words)


def test_a_subset_trains_on_what_the_scores_say_and_holds_val_out_of_the_rest(tree, tmp_path):
    train = trees.find(str(tree)).train
    path = scores(tmp_path / "x.npz", train.labels.numpy())
    words = ["--data", str(tree), "--subset", "hardest", "--per-class", "3", "--cscores", str(path)]
    config = common.parse(er_settings.Config, words, "")
    data = er_settings.subset(config, common.open_data(str(tree)))
    rows = er_axes.subset(torch.from_numpy(np.load(path)["scores"]), train.labels, "hardest", 3)
    assert len(rows) == 30 and (data.train.images == train.images[rows.numpy()]).all()
    seen = {x.tobytes() for x in data.train.images}
    assert len(data.val.labels) == 10 and not any(x.tobytes() in seen for x in data.val.images)
