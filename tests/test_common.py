"""common.py: command line, CLIP files, training and its resumption, prediction caches, metrics."""

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import vrf
from data import checkpoints

ROOT = Path(common.__file__).parent


def tiny_config(tmp_path, **given):
    values = {"model": "tiny_clip", "pretrained": "random", "batch": 16, "epochs": 2, "warmup": 2}
    return vrf.Config(**values | given | {"out": str(tmp_path), "device": "cpu"})


def random_split(n=40, classes=10, seed=0, name="toy"):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
    labels = torch.from_numpy(rng.integers(0, classes, n))
    return common.Split(name, "memory", images, labels)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return common.load_clip(vrf.Config(model="tiny_clip", pretrained="random"))


@pytest.fixture
def classifier(clip):
    torch.manual_seed(0)
    return common.Classifier(copy.deepcopy(clip.model.visual), torch.randn(10, 64))


# command line


def test_unknown_words_get_the_nearest_known_one():
    with pytest.raises(common.InputError, match="no 'E2E-FTT'; did you mean 'E2E-FT'"):
        common.choose("LC,E2E-FTT", ("LC", "E2E-FT", "LP-FT"), "--methods")


def test_flags_the_user_gave_beat_the_preset():
    @dataclass
    class Config:
        lr: float = common.arg(1.0, "rate")
        batch: int = common.arg(512, "size")

    config = common.parse(Config, ["--lr", "0.5"], "doc")
    common.apply_preset(config, "digits", {"digits": {"lr": 9.0, "batch": 64}})
    assert (config.lr, config.batch) == (0.5, 64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--data /no/such/folder", "/no/such/folder does not exist"),
        ("--model ViT-B-61 --pretrained random", "no 'ViT-B-61'; did you mean 'ViT-B-16'"),
        ("--model ViT-B-16 --weights= --pretrained opanai", "no 'opanai'; did you mean 'openai'"),
        ("--weights /no/such/file.pt", "no weights at /no/such/file.pt"),
        ("--methods E2E", "there is no 'E2E'"),
        ("--device cuda:99", "--device cuda:99: not usable here"),
        ("--val-fraction 2 --data {tree}", "between 0 and 1"),
        ("--ab 0,1", "two positive numbers"),
    ],
)
def test_bad_input_is_named_in_one_sentence(arguments, sentence, tmp_path):
    for folder in ("train/a", "val/a", "train/b", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            (tmp_path / folder / f"{i}.png").write_bytes(b"")
    words = arguments.format(tree=tmp_path).split()
    with pytest.raises(common.InputError) as raised:
        vrf.main(["--out", str(tmp_path), *words])
    assert sentence in str(raised.value)


@pytest.mark.parametrize("arguments", [["--distance", "euclid"], ["--lr", "fast"], ["--lrr", "1"]])
def test_a_wrong_flag_or_value_is_exit_code_two(arguments):
    with pytest.raises(SystemExit) as stopped:
        vrf.main(arguments)
    assert stopped.value.code == 2


def test_a_script_prints_the_sentence_without_traceback_and_exits_with_two():
    command = [sys.executable, "vrf.py", "--data", "/no/such/folder"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("vrf.py: /no/such/folder does not")
    assert "Traceback" not in done.stderr


def test_help_imports_neither_open_clip_nor_torchvision():
    code = (
        "import sys, vrf\n"
        "try: vrf.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'open_clip', 'torchvision', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# hashes


def test_hash_tells_dtype_shape_order_and_value_apart():
    t = torch.arange(4.0)
    things = [t, t.double(), t.reshape(2, 2), t + 1, {"a": t}, {"b": t}, [t, t], "t", 1, "1", 1.0]
    assert len({common.hash_of(x) for x in things}) == len(things)
    assert common.hash_of({"a": 1, "b": t}) == common.hash_of({"b": t.clone(), "a": 1})


# CLIP files


def save_as(kind, model, path):
    state = model.state_dict()
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif kind == "npz":
        np.savez_compressed(path, **{k: v.numpy() for k, v in state.items()})
    elif kind == "open_clip training":
        torch.save({"epoch": 1, "state_dict": {"module." + k: v for k, v in state.items()}}, path)
    elif kind == "half precision":
        torch.save({k: v.half() for k, v in state.items()}, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("state dict", ".pt"),
        ("safetensors", ".safetensors"),
        ("npz", ".npz"),
        ("open_clip training", ".pt"),
        ("half precision", ".bin"),
    ],
)
def test_weights_come_back_from_every_kind_of_file(kind, suffix, clip, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_as(kind, clip.model, path)
    loaded = common.load_clip(vrf.Config(model="tiny_clip", weights=str(path))).model
    tolerance = 1e-3 if kind == "half precision" else 0
    for k, v in clip.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[k], v, atol=tolerance, rtol=tolerance)
        assert loaded.state_dict()[k].dtype == torch.float32


FOREIGN = """
import torch, open_clip

class ImageEncoder(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.train_preprocess = transform

class ClassificationHead(torch.nn.Linear):
    pass

class ImageClassifier(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.image_encoder = ImageEncoder(model)
        self.classification_head = ClassificationHead(64, 10)

class QuickGELU(torch.nn.Module):
    pass

def transform(image):
    return image

open("imported_by_pickle", "w").close()
"""


def foreign_module(clip, folder, monkeypatch):
    """A whole module pickled as wise-ft does, from a package that is gone when the file is read."""
    (folder / "wise_src.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    import wise_src

    module = wise_src.ImageClassifier(copy.deepcopy(clip.model))
    module.image_encoder.model.gelu = wise_src.QuickGELU()
    torch.save(module, folder / "checkpoint_10.pt")
    state = {k: v.clone() for k, v in module.state_dict().items()}
    del sys.modules["wise_src"]
    (folder / "imported_by_pickle").unlink()
    return state


def test_a_pickled_module_is_read_without_importing_its_code(clip, tmp_path, monkeypatch):
    expected = foreign_module(clip, tmp_path, monkeypatch)
    state, said = checkpoints.read_weights(tmp_path / "checkpoint_10.pt")
    assert "wise_src" not in sys.modules and not (tmp_path / "imported_by_pickle").exists()
    assert said["quick_gelu"] is True
    assert torch.equal(state["head.weight"], expected["classification_head.weight"])
    visual = {k for k in clip.model.state_dict() if k.startswith("visual.")}
    for k in visual:
        assert torch.equal(state[k], expected[f"image_encoder.model.{k}"])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.w": torch.zeros(1), "x": Hostile()}, "hostile.pt")
    with pytest.raises(common.InputError, match="must run code to be read .*system.*; refused"):
        checkpoints.read_weights("hostile.pt")
    assert not Path("executed").exists()


def test_trust_checkpoint_reads_what_the_restricted_reader_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"visual.w": torch.zeros(1), "x": Hostile()}, "hostile.pt")
    state, _ = checkpoints.read_weights("hostile.pt", trust=True)
    assert Path("executed").exists() and list(state) == ["visual.w"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_a_program_and_read_only_if_openais_or_trusted(tmp_path):
    class Visual(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = nn.Linear(2, 2)
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.visual(x)

    torch.jit.trace(Visual(), torch.zeros(1, 2)).save(tmp_path / "ViT.pt")
    with pytest.raises(common.InputError, match="none of OpenAI's files; refused"):
        checkpoints.read_weights(tmp_path / "ViT.pt")
    state, said = checkpoints.read_weights(tmp_path / "ViT.pt", trust=True)
    assert set(state) == {"visual.weight", "visual.bias"} and said["quick_gelu"] is True


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named(damage, clip, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(clip.model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:1000], "text": b"<html>", "empty": b""}[damage])
    with pytest.raises(common.InputError, match=r"weights.pt is no readable checkpoint"):
        checkpoints.read_weights(path)


def test_weights_of_another_architecture_are_named_by_tensor_and_shape(clip, tmp_path):
    state = clip.model.state_dict()
    state["visual.proj"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        common.InputError, match=r"visual.proj should be \(128, 64\), found \(3, 3\)"
    ):
        common.load_clip(vrf.Config(model="tiny_clip", weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize(("given", "expected"), [("auto", True), ("yes", True), ("no", False)])
def test_quick_gelu_is_read_from_our_checkpoints_and_can_be_overruled(
    given, expected, clip, tmp_path
):
    path = tmp_path / "w.pt"
    torch.save({"model": clip.model.state_dict(), "quick_gelu": True}, path)
    config = vrf.Config(model="tiny_clip", weights=str(path), quick_gelu=given)
    assert common.load_clip(config).quick_gelu is expected


def test_zero_shot_head_normalises_each_prompt_then_their_mean(clip):
    names, templates = ["zero", "one"], ["a photo of a {}.", "{}", "a sketch of the digit {}."]
    with torch.no_grad():
        rows = []
        for name in names:
            text = clip.tokenizer([t.format(name) for t in templates])
            mean = F.normalize(clip.model.encode_text(text), dim=1).mean(0)
            rows.append(F.normalize(mean, dim=0) * clip.model.logit_scale.exp())
    head = common.zero_shot_head(clip, names, templates)
    torch.testing.assert_close(head, torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_logits_do_not_depend_on_the_scale_of_the_features(classifier):
    features = torch.randn(4, 64)
    once, scaled = classifier.classify(features), classifier.classify(7 * features)
    torch.testing.assert_close(once, scaled)


# training


def test_learning_rate_warms_up_linearly_and_ends_at_zero():
    factor = [common.warmup_cosine(t, 500, 25_030) for t in (0, 499, 500, 25_029)]
    assert factor[:3] == [1 / 500, 1.0, 1.0] and 0 < factor[3] < 1e-8
    assert common.warmup_cosine(500 + 12_265, 500, 25_030) == pytest.approx(0.5)


def test_an_epoch_is_a_permutation_and_the_next_is_another():
    steps = [[i for i, _ in b] for b in common.batches(103, 10, 22, seed=0)]
    first, second = sum(steps[:11], []), sum(steps[11:], [])
    assert sorted(first) == sorted(second) == list(range(103)) and first != second


def test_crops_differ_between_images_and_epochs():
    seeds = [s for b in common.batches(50, 10, 50, seed=0) for _, s in b]
    assert len(set(seeds)) == len(seeds)


def test_training_that_runs_out_of_data_is_an_error():
    model = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(common.InputError, match="the data ended at step 1 of 3"):
        batch = (torch.zeros(1, 2),)
        common.fit(model, lambda b: model(b[0]).sum(), lambda s: [batch], optimiser, steps=3)


def test_a_temperature_beyond_tied_logits_is_said(capsys):
    logits, labels = torch.tensor([[1.0, 1.0]] * 10), torch.tensor([0] * 9 + [1])
    assert common.temperature(logits, labels, "confidence") == 1.0
    assert "none gives a mean confidence of 0.900" in capsys.readouterr().out


def test_a_file_with_two_image_towers_is_refused(tmp_path):
    state = {"momentum.visual.w": torch.zeros(1), "model.visual.w": torch.ones(1)}
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(common.InputError, match="2 image towers"):
        checkpoints.read_weights(tmp_path / "two.pt")


def test_batches_of_a_step_do_not_depend_on_where_one_starts():
    whole = list(common.batches(103, 10, 30, seed=3))
    assert list(common.batches(103, 10, 30, seed=3, first=17)) == whole[17:]
    assert whole != list(common.batches(103, 10, 30, seed=4))


def test_training_moves_the_head_only_in_a_linear_probe(classifier, clip, tmp_path):
    before = copy.deepcopy(classifier.state_dict())
    config = tiny_config(tmp_path)
    common.linear_probe(config, "LC", classifier, random_split(), clip, 0.1, 0)
    moved = {k for k, v in classifier.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.weight", "head.bias"}


def test_gradient_norm_is_clipped():
    model, norms = nn.Linear(3, 1), []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
            return super().step(closure)

    x = torch.full((2, 3), 100.0)
    optimiser = Watched(model.parameters(), lr=1e-3)
    common.fit(
        model,
        lambda b: model(b[0]).square().mean(),
        lambda first: [(x,)] * 3,
        optimiser,
        steps=3,
        clip=1.0,
    )
    assert norms and max(norms) <= 1 + 1e-5


def short_training(path, stop_at=None, precision="fp32", number=signal.SIGINT):
    """Ten steps with dropout, saved every four; in step `stop_at` a signal comes, Ctrl-C."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    at = [0]

    def batches_from(first):
        at[0] = first
        for rows in common.batches(40, 8, 10, 0, first):
            index = torch.tensor([i for i, _ in rows])
            yield x[index], y[index]

    def loss_fn(batch):
        at[0] += 1
        if at[0] == stop_at:
            os.kill(os.getpid(), number)
        return F.cross_entropy(model(batch[0]), batch[1])

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"steps": 10, "warmup": 2, "clip": 1.0, "precision": precision, "path": path}
    options["save_every"] = 4
    common.fit(model, loss_fn, batches_from, optimiser, **options)
    return model.state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_five_steps_ctrl_c_and_five_more_are_bitwise_ten_steps(tmp_path, precision):
    whole = short_training(tmp_path / "whole.pt", precision=precision)
    with pytest.raises(KeyboardInterrupt):
        short_training(tmp_path / "parts.pt", stop_at=5, precision=precision)
    saved = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert saved["step"] == 5
    torch.manual_seed(99)
    parts = short_training(tmp_path / "parts.pt", precision=precision)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_killed_run_continues_from_its_last_checkpoint_bit_for_bit(tmp_path):
    whole, path = short_training(tmp_path / "whole.pt"), tmp_path / "parts.pt"
    code = f"import test_common as t; t.short_training({str(path)!r}, 7, number=t.signal.SIGKILL)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 4
    parts = short_training(path)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_finished_run_is_read_and_not_repeated(classifier, clip, tmp_path, capsys):
    config, split = tiny_config(tmp_path), random_split()
    start = copy.deepcopy(classifier)
    common.fine_tune(config, "run", classifier, split, clip, 1e-3, 0)
    common.fine_tune(config, "run", start, split, clip, 1e-3, 0)
    assert "trained before" in capsys.readouterr().out
    assert common.hash_of(start.state_dict()) == common.hash_of(classifier.state_dict())


@pytest.mark.parametrize(
    "change", [{"lr": 2e-3}, {"seed": 1}, {"epochs": 1}, {"weight_decay": 0.0}]
)
def test_another_recipe_is_another_checkpoint(change, classifier, clip, tmp_path):
    split, start = random_split(16), copy.deepcopy(classifier)
    lr, seed = change.pop("lr", 1e-3), change.pop("seed", 0)
    common.fine_tune(tiny_config(tmp_path), "run", classifier, split, clip, 1e-3, 0)
    common.fine_tune(tiny_config(tmp_path, **change), "run", start, split, clip, lr, seed)
    assert len(list(tmp_path.glob("checkpoints/*.pt"))) == 2


def test_a_loss_that_is_not_finite_stops_with_step_and_name(tmp_path):
    model = nn.Linear(2, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(common.InputError, match="run: the loss is nan at step 0"):
        common.fit(
            model,
            lambda batch: model(batch[0]).sum() * math.nan,
            lambda first: [(torch.zeros(1, 2),)] * 2,
            optimiser,
            steps=2,
            path=tmp_path / "c.pt",
            name="run",
        )
    assert not (tmp_path / "c.pt").exists()


def test_a_truncated_checkpoint_is_named(classifier, clip, tmp_path):
    config, split = tiny_config(tmp_path), random_split()
    start = copy.deepcopy(classifier)
    common.fine_tune(config, "run", classifier, split, clip, 1e-3, 0)
    (path,) = tmp_path.glob("checkpoints/*.pt")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(common.InputError, match="is damaged .*; delete it, run again"):
        common.fine_tune(config, "run", start, split, clip, 1e-3, 0)


def test_crops_do_not_depend_on_the_number_of_workers(clip):
    split, config = random_split(12), vrf.Config()
    transform = common.train_transform(32, clip.mean, clip.std)

    def images(workers):
        config.workers = workers
        order = list(common.batches(12, 5, 5, seed=0))
        return [b[0] for b in common.load_images(split, transform, order, config)]

    for a, b in zip(images(0), images(2), strict=True):
        assert torch.equal(a, b)


def test_batches_are_what_the_transform_gives_one_image_at_a_time(clip, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 60, 45, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{i}.jpg") for i in range(5)]
    for file, pixels in zip(files, noise, strict=True):
        Image.fromarray(pixels).save(file)
    split = common.Split("s", "", files, torch.arange(5))
    transform = common.eval_transform(32, clip.mean, clip.std)
    order = [[(0, 0), (1, 0), (2, 0)], [(3, 0), (4, 0)]]
    ours = torch.cat([b[0] for b in common.load_images(split, transform, order, vrf.Config())])
    theirs = [transform(Image.open(file).convert("RGB")) for file in files]
    assert torch.equal(ours, torch.stack(theirs))


def test_workers_are_not_started_where_the_model_is_what_takes_long():
    split, config = random_split(4), vrf.Config(device="cpu")
    assert common.worker_count(split, config) == 0
    split.images = ["a.jpg"] * 4
    assert common.worker_count(split, config) == 0
    config.workers = 3
    assert common.worker_count(split, config) == 3


# prediction


PASSES = """
import numpy as np, torch, common, vrf
from torch import nn

model = common.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 8)), torch.randn(3, 8))
clip = common.Clip(None, None, "x", False, 96, (0.5,) * 3, (0.5,) * 3)
config, peaks = vrf.Config(batch=50, device="cpu"), []
for n in (400, 4000):
    split = common.Split("s", "", np.zeros((n, 8, 8), np.uint8), torch.zeros(n, dtype=torch.int64))
    for _ in common.forward(config, {"": model}, split, clip):
        pass
    status = open("/proc/self/status").read()
    peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
print(*peaks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_pass_over_ten_times_the_images_needs_no_more_memory():
    """4,000 images as bytes are 105 MiB, as floats 422."""
    command = [sys.executable, "-c", PASSES]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    few, many = map(float, run.stdout.split())
    assert many - few < 16, f"{few} MiB at 400 images, {many} at 4,000"


def test_models_predicted_together_or_alone_agree(classifier, clip, tmp_path):
    other, split = copy.deepcopy(classifier), random_split()
    with torch.no_grad():
        other.head.weight.mul_(-1)
    both = common.predict(tiny_config(tmp_path / "a"), {"a": classifier, "b": other}, split, clip)
    alone = common.predict(tiny_config(tmp_path / "b"), {"b": other}, split, clip)
    assert torch.equal(both["b"].logits, alone["b"].logits)
    assert not torch.equal(both["a"].logits, both["b"].logits)


def test_the_cache_is_used_and_a_changed_weight_or_label_misses_it(
    classifier, clip, tmp_path, monkeypatch
):
    config, split, runs = tiny_config(tmp_path), random_split(), []
    real = common.forward
    monkeypatch.setattr(common, "forward", lambda *a: runs.append(1) or real(*a))
    common.predict(config, {"a": classifier}, split, clip)
    first = common.predict(config, {"a": classifier}, split, clip)["a"]
    assert len(runs) == 1
    with torch.no_grad():
        classifier.head.bias[0] += 1
    assert not torch.equal(
        common.predict(config, {"a": classifier}, split, clip)["a"].logits, first.logits
    )
    common.predict(config, {"a": classifier}, random_split(seed=1), clip)
    assert len(runs) == 3


def test_a_damaged_or_unwritable_cache_costs_time_and_not_the_run(
    classifier, clip, tmp_path, capsys
):
    config, split = tiny_config(tmp_path), random_split()
    first = common.predict(config, {"a": classifier}, split, clip)["a"]
    for path in tmp_path.glob("cache/*"):
        path.write_bytes(b"damaged")
    again = common.predict(config, {"a": classifier}, split, clip)["a"]
    assert torch.equal(first.logits, again.logits)
    assert "computing it anew" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    blocked = tiny_config(tmp_path / "file" / "below")
    assert torch.equal(
        common.predict(blocked, {"a": classifier}, split, clip)["a"].logits, first.logits
    )
    assert "going on without" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["precision", "quick_gelu", "mean", "skip", "name"])
def test_what_changes_features_changes_every_cache(change, classifier, clip, tmp_path):
    split, other, config = random_split(8), copy.copy(clip), tiny_config(tmp_path)
    common.predict(config, {"a": classifier}, split, clip)
    common.frozen_features(config, classifier, split, clip)
    before = len(list(tmp_path.glob("cache/*")))
    if change == "precision":
        config.precision = "bf16"
    elif change == "skip":
        config.skip_bad_images = True
    else:
        setattr(other, change, {"quick_gelu": True, "mean": (0.0,) * 3, "name": "x"}[change])
    common.predict(config, {"a": classifier}, split, other)
    common.frozen_features(config, classifier, split, other)
    assert (before, len(list(tmp_path.glob("cache/*")))) == (2, 4)


def test_caches_that_disagree_about_labels_are_an_error(classifier, clip, tmp_path):
    config, split, other = tiny_config(tmp_path), random_split(), copy.deepcopy(classifier)
    with torch.no_grad():
        other.head.bias[0] += 1
    common.predict(config, {"a": classifier, "b": other}, split, clip)
    path = next(tmp_path.glob("cache/*"))
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"labels": saved["labels"] + 1}, path)
    with pytest.raises(common.InputError, match="saw other labels"):
        common.predict(config, {"a": classifier, "b": other}, split, clip)


# metrics


def test_wilson_interval_by_the_textbook_and_at_the_ends():
    assert common.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert common.wilson(0, 10)[0] == 0 and common.wilson(10, 10)[1] == pytest.approx(1)
    assert all(math.isnan(x) for x in common.wilson(0, 0))


def test_ece_by_hand_with_full_confidence_and_empty_bins():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.45, 0.55], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 1])  # bin 10: confidence 1, right 1/2; bin 6: .55, right 1
    assert common.ece(p, labels) == pytest.approx(0.5 * 0.5 + 0.5 * 0.45)


def test_ece_counts_a_confidence_on_an_edge_in_the_lower_bin():
    p = torch.tensor([[0.4, 0.6], [0.35, 0.65]], dtype=torch.double)
    assert common.ece(p, torch.tensor([1, 0])) == pytest.approx((0.4 + 0.65) / 2)


def test_nll_by_hand_and_finite_at_zero():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert common.nll(torch.tensor([[0.0, 1.0]]), torch.tensor([0])) == pytest.approx(87.3, abs=0.1)
    assert common.nll(p, torch.tensor([0, 1])) == pytest.approx(
        -(math.log(0.5) + math.log(0.75)) / 2
    )


def calibrated_logits(n=4000, classes=10):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_nll_temperature_recovers_the_scale_that_was_put_in(scale):
    logits, labels = calibrated_logits()
    assert common.temperature(scale * logits, labels, "nll") == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_confidence_temperature_makes_confidence_equal_accuracy(scale):
    logits, labels = calibrated_logits()
    t = common.temperature(scale * logits, labels, "confidence")
    p = (scale * logits / t).softmax(1)
    assert p.amax(1).mean().item() == pytest.approx(common.accuracy(p, labels), abs=1e-4)


@pytest.mark.parametrize("labels", [torch.arange(4), torch.arange(4).roll(1)])
def test_a_temperature_that_does_not_exist_is_said(labels, capsys):
    assert common.temperature(torch.eye(4), labels, "confidence") == 1.0
    assert "none gives a mean confidence" in capsys.readouterr().out


def rows_of(right_a, right_b):
    return [
        {"method": m, "seed": 0, "right": {"ID": torch.tensor(r), "shift": torch.tensor(r)}}
        for m, r in (("a", right_a), ("b", right_b))
    ]


def test_gain_of_a_row_over_itself_is_zero_with_no_width():
    right = [True, False, True, True]
    assert common.gain(rows_of(right, right), "a", "b") == ((0, 0, 0), (0, 0, 0))


def test_gain_interval_matches_the_normal_one_for_paired_answers():
    n = 2000
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(n, generator=generator) < 0.7
    flips = torch.rand(n, generator=generator)
    better = (base | (flips < 0.10)) & ~(base & (flips > 0.97))
    difference = better.double() - base.double()
    identity, _ = common.gain(rows_of(better.tolist(), base.tolist()), "a", "b")
    mean, half = 100 * difference.mean().item(), 196 * difference.std().item() / math.sqrt(n)
    assert identity == pytest.approx((mean, mean - half, mean + half), abs=0.12)


def test_gain_averages_seeds_and_keeps_id_and_shifts_apart():
    rows = []
    for seed, shift in ((0, [True, True]), (1, [True, False])):
        own = {"ID": torch.tensor([True, False]), "shift": torch.tensor(shift)}
        base = {"ID": torch.tensor([True, True]), "shift": torch.tensor([False, False])}
        rows += [{"method": "a", "seed": seed, "right": own}]
        rows += [{"method": "b", "seed": seed, "right": base}]
    identity, shift = common.gain(rows, "a", "b")
    assert identity[0] == -50 and shift[0] == 75
    # by hand, ID: both runs gain 0 and -100 on the two images; shift: 100, 100 and 100, 0
    images, runs = (0.5 * 100**2) / 2, (0.5 * 50**2) / 2
    assert (identity[2] - identity[1]) / 2 == pytest.approx(1.959964 * images**0.5)
    of_shift = (0.5 * 50**2) / 2
    freedom = ((runs + of_shift) / runs) ** 2
    half = scipy.stats.t.ppf(0.975, freedom) * (runs + of_shift) ** 0.5
    assert shift[1:] == pytest.approx((75 - half, 75 + half))


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_the_interval_covers_the_truth_of_other_runs_and_images_19_times_of_20(runs, share):
    """A share of the variance is the images', which all runs share, the rest the runs' own."""
    rng, inside, n = np.random.default_rng(0), 0, 4000
    for _ in range(n):
        own = rng.normal(0, (1 - share) ** 0.5, runs) + rng.normal(0, (share / runs) ** 0.5)
        _, low, high = common.interval(own, share / runs)
        inside += low <= 0 <= high
    assert 0.92 <= inside / n <= 0.985


def test_one_runs_interval_is_over_images_and_the_words_say_so():
    assert common.interval([2.0], 4.0) == pytest.approx((2, 2 - 3.919928, 2 + 3.919928))
    assert common.interval([2.0, 2.0], 0.0) == (2, 2, 2)
    assert common.sampled([{"seed": 0}, {"seed": 0}]) == "images of one run"
    assert common.sampled([{"seed": 0}, {"seed": 1}]) == "runs and images"


def test_seeds_that_disagree_widen_the_interval():
    def rows(rights):
        zero = torch.zeros(400, dtype=torch.bool)
        return [
            {"method": m, "seed": i, "right": {"ID": r, "s": r}}
            for i, right in enumerate(rights)
            for m, r in (("a", right), ("b", zero))
        ]

    half = torch.arange(400) % 2 == 0
    same, _ = common.gain(rows([half, half]), "a", "b")
    apart, _ = common.gain(rows([torch.ones(400).bool(), torch.zeros(400).bool()]), "a", "b")
    assert same[0] == apart[0] == 50 and apart[2] - apart[1] > 4 * (same[2] - same[1])


def test_average_shift_leaves_out_the_first_split():
    assert common.mean_shift({"ID": 90.0, "a": 10.0, "b": 30.0}) == 20.0


# files


def test_a_reader_sees_the_old_file_or_the_new_one_and_no_leftovers(tmp_path, capsys):
    path = tmp_path / "x"
    common.try_write(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    common.try_write(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]
    assert "No space left" in capsys.readouterr().err


def test_fit_works_outside_the_main_thread(tmp_path):
    result = []
    worker = threading.Thread(target=lambda: result.append(short_training(tmp_path / "t.pt")))
    worker.start()
    worker.join()
    assert len(result) == 1


def linear_clip():
    return common.Clip(None, None, "linear", False, 32, (0.5,) * 3, (0.5,) * 3)


def linear_model(seed=0):
    torch.manual_seed(seed)
    visual = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16))
    return common.Classifier(visual, torch.randn(10, 16))


def test_fine_tuning_sees_crops_and_not_the_test_transform(tmp_path):
    config, split, clip, seen = tiny_config(tmp_path), random_split(16), linear_clip(), []
    model = linear_model()

    def loss_of(images, labels):
        seen.append(images.clone())
        return F.cross_entropy(model(images)[1], labels)

    common.fine_tune(config, "run", model, split, clip, 1e-3, 0, loss_of=loss_of)
    plain = common.eval_transform(32, clip.mean, clip.std)
    plain = torch.stack([plain(common.read_rgb(image)) for image in split.images])
    distance = torch.cdist(torch.cat(seen).flatten(1), plain.flatten(1))
    assert len(distance) == 32 and (distance.amin(1) > 0.1).sum() > 24


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({}, True),
        ({"clip": 1e-13}, False),
        ({"warmup": 10**9}, False),
        ({"weight_decay": 0.0}, True),
    ],
)
def test_recipes_numbers_reach_the_optimiser(tmp_path, changed, moves):
    values = {"weight_decay": 0.0, "clip": 1.0, "warmup": 1} | changed
    config, model = tiny_config(tmp_path, epochs=1, **values), linear_model()
    start = model.head.weight.detach().clone()
    common.linear_probe(config, "LC", model, random_split(16), linear_clip(), 0.1, 0)
    assert ((model.head.weight - start).abs().max() > 1e-3) == moves


def test_weight_decay_shrinks_the_head(tmp_path):
    norms = []
    for decay in (0.0, 5.0):
        config, model = (
            tiny_config(tmp_path, epochs=1, weight_decay=decay, warmup=1),
            linear_model(),
        )
        common.linear_probe(config, "LC", model, random_split(16), linear_clip(), 0.1, 0)
        norms.append(model.head.weight.norm())
    assert norms[1] < 0.7 * norms[0]


def test_frozen_features_and_heads_are_cached_by_weights_images_and_names(tmp_path):
    config, clip = tiny_config(tmp_path), linear_clip()
    first, second = (linear_model(seed) for seed in (0, 1))
    one, two = random_split(8), random_split(8, seed=1)
    x = common.frozen_features(config, first, one, clip)[0]
    assert torch.equal(x, common.frozen_features(config, first, one, clip)[0])
    assert not torch.equal(x, common.frozen_features(config, second, one, clip)[0])
    assert not torch.equal(x, common.frozen_features(config, first, two, clip)[0])
    heads = []
    for seed, names, prompt in ((0, "one two", "a {}"), (1, "one two", "a {}"),
                                (0, "one six", "a {}"), (0, "one two", "no {}")):  # fmt: skip
        given = dataclasses.replace(config, seed=seed)  # random weights: a seed is a model
        data = common.Data("folder", names.split(), [prompt], one, one, one, [], [])
        heads.append(common.zero_shot(given, data)[1].head.weight)
    assert len({common.hash_of(h.detach()) for h in heads}) == 4
    again = common.zero_shot(config, dataclasses.replace(data, templates=["no {}"]))[1].head.weight
    assert torch.equal(again, heads[-1])


def test_the_model_a_user_names_gets_the_digits_recipe_and_not_their_weights():
    for words, model, weights in (([], "tiny_clip", True), (["--model", "RN50"], "RN50", False)):
        config, data = common.begin(vrf.Config, words, None, vrf.PRESETS)
        assert (config.model, bool(config.weights)) == (model, weights)
        assert config.epochs == 8 and data.kind == "digits"
