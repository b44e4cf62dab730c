"""common.py: training and its resumption, predictions and caches, metrics, intervals, files."""

import copy
import dataclasses
import json
import math
import signal
import sys
import threading

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image
from small import CLIP, linear_model, random_split, settings, short_training
from torch import nn

import common


def equal(a, b):
    """Whether two state dicts are the same, bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


# --- CLIP and the command line ---


def test_zero_shot_head_normalises_each_prompt_then_their_mean():
    tiny, rows = common.load_clip(common.Run(model="tiny_clip", pretrained="random")), []
    names, templates = ["zero", "one"], ["a photo of a {}.", "{}", "a sketch of {}."]
    with torch.no_grad():
        for name in names:
            text = tiny.tokenizer([t.format(name) for t in templates])
            mean = F.normalize(tiny.model.encode_text(text), dim=1).mean(0)
            rows.append(F.normalize(mean, dim=0) * tiny.model.logit_scale.exp())
    head = common.zero_shot_head(tiny, names, templates)
    torch.testing.assert_close(head, torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_class_names_that_are_cut_off_or_alike_are_named(capsys):
    tiny = common.load_clip(common.Run(model="tiny_clip", pretrained="random"))
    names = ["dog", "cat", "very " * 20 + "long", "cat"]
    head = common.zero_shot_head(tiny, names, ["{}", "a {}"])
    common.check_names(tiny.tokenizer, names, "a {}", head)
    said = capsys.readouterr().out
    assert "note: 1 class names fill all 16 tokens, so that the rest may be cut off: very" in said
    assert "note: zero-shot cannot tell these class names apart: cat, cat\n" in said


def test_logits_do_not_depend_on_the_scale_of_the_features():
    model, features = linear_model(), torch.randn(4, 16)
    torch.testing.assert_close(model.classify(features), model.classify(7 * features))


def test_the_model_a_user_names_gets_the_digits_recipe_and_not_their_weights(tmp_path, capsys):
    presets = {"digits": {"epochs": 8, "lr": 9.0}}
    for words, model, weights in (([], "tiny_clip", True), (["--model", "RN50"], "RN50", False)):
        words = [*words, "--lr", "0.5", "--out", str(tmp_path)]
        config, data = common.setup(common.Run, words, None, presets)
        assert (config.model, bool(config.weights)) == (model, weights)
        assert (config.epochs, config.lr) == (8, 0.5) and data.kind == "digits"
        assert "preset digits:" in capsys.readouterr().out


# --- training ---


def test_the_learning_rate_warms_up_linearly_and_ends_at_zero_or_its_share():
    factor = [common.warmup_cosine(step, 500, 25_030) for step in (0, 499, 500, 25_029)]
    assert factor[:3] == [1 / 500, 1.0, 1.0] and 0 < factor[3] < 1e-8
    assert common.warmup_cosine(500 + 12_265, 500, 25_030) == pytest.approx(0.5)
    assert common.warmup_cosine(60, 10, 110, end=0.5) == pytest.approx(0.75)
    assert common.warmup_cosine(110, 10, 110, end=0.5) == pytest.approx(0.5)


def test_an_epoch_is_a_permutation_with_its_own_crops_and_does_not_depend_on_the_first_step():
    whole = list(common.batches(103, 10, 22, seed=3))
    first, second = ([i for batch in part for i, _ in batch] for part in (whole[:11], whole[11:]))
    assert sorted(first) == sorted(second) == list(range(103)) and first != second
    assert len({crop for batch in whole for _, crop in batch}) == 206
    assert list(common.batches(103, 10, 22, seed=3, first=17)) == whole[17:]
    assert list(common.batches(103, 10, 22, seed=4)) != whole


def test_a_last_batch_in_which_a_process_would_have_no_part_is_left_out(monkeypatch):
    for processes, steps in ((1, 11), (3, 11), (4, 10)):
        monkeypatch.setattr(common, "world", lambda processes=processes: processes)
        assert common.steps_of(common.Run(epochs=2, batch=10), 103) == 2 * steps
        batches = list(common.batches(103, 10, 2 * steps, seed=3))
        assert min(map(len, batches)) >= processes and len(batches[steps]) == 10


def test_fine_tuning_sees_crops_and_a_linear_probe_moves_the_head_alone(tmp_path):
    split, model, seen = random_split(16), linear_model(), []

    def loss_fn(images, labels):
        seen.append(images.clone())
        return F.cross_entropy(model(images)[1], labels)

    common.fine_tune(settings(tmp_path), "FT", model, split, CLIP, loss_fn, key={})
    plain = common.eval_transform(32, CLIP.mean, CLIP.std)
    plain = torch.stack([plain(Image.fromarray(image).convert("RGB")) for image in split.images])
    distance = torch.cdist(torch.cat(seen).flatten(1), plain.flatten(1))
    assert len(distance) == 32 and (distance.amin(1) > 0.1).sum() > 24
    start, config = copy.deepcopy(model.state_dict()), settings(tmp_path, lr=0.1)
    common.linear_probe(config, "LC", model, split, CLIP)
    moved = {k for k, value in model.state_dict().items() if not torch.equal(value, start[k])}
    assert moved == {"head.weight", "head.bias"}


def test_every_number_of_the_recipe_reaches_the_optimiser(tmp_path):
    def moved(**given):
        model, values = linear_model(), {"epochs": 1, "warmup": 1, "weight_decay": 0.0, "lr": 0.1}
        start = model.head.weight.detach().clone()
        config = settings(tmp_path, **values | given)
        common.linear_probe(config, "LC", model, random_split(16), CLIP)
        return (model.head.weight - start).abs().max(), model.head.weight.norm()

    assert moved()[0] > 1e-2
    assert moved(clip=1e-13)[0] < 1e-3 and moved(warmup=10**9)[0] < 1e-3 and moved(lr=0.0)[0] == 0
    assert moved(weight_decay=5.0)[1] < 0.7 * moved()[1]


@pytest.mark.parametrize(
    ("precision", "number", "at"),
    [("fp32", signal.SIGINT, 6), ("bf16", signal.SIGTERM, 6), ("fp16", signal.SIGINT, 20)],
)
def test_ctrl_c_and_the_same_command_again_are_one_training(precision, number, at, tmp_path):
    whole, done = short_training(tmp_path / "whole", precision=precision)
    assert done == list(range(21))
    with pytest.raises(KeyboardInterrupt):
        short_training(tmp_path / "parts", at, lambda: signal.raise_signal(number), precision)
    torch.manual_seed(99)
    parts, done = short_training(tmp_path / "parts", precision=precision)
    assert equal(whole, parts) and done == list(range(at + 1, 21))


def test_a_training_that_dies_continues_from_its_last_epoch_bit_for_bit(tmp_path):
    def die():
        raise MemoryError

    with pytest.raises(MemoryError):
        short_training(tmp_path / "parts", 7, die)
    parts, done = short_training(tmp_path / "parts")
    assert done == list(range(5, 21)) and equal(parts, short_training(tmp_path / "whole")[0])
    (path,) = (tmp_path / "parts").glob("checkpoints/*.pt")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(common.InputError, match="is damaged .*; delete it, run again"):
        short_training(tmp_path / "parts")


def test_evaluating_between_two_steps_changes_nothing_and_other_threads_may_train(tmp_path):
    whole, _ = short_training(tmp_path / "a")
    assert equal(whole, short_training(tmp_path / "b", evaluate=False)[0])
    found = []
    thread = threading.Thread(target=lambda: found.append(short_training(tmp_path / "c")[0]))
    thread.start()
    thread.join()
    assert equal(whole, found[0])


def test_in_a_log_file_a_training_prints_one_line_per_epoch_and_no_bar(tmp_path, capsys):
    common.fine_tune(settings(tmp_path), "FT", linear_model(), random_split(), CLIP)
    lines = [line.split(", last loss")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["FT, seed 0: epoch 1 of 2", "FT, seed 0: epoch 2 of 2"]


def test_numbers_that_are_not_finite_stop_and_do_not_replace_a_checkpoint(tmp_path):
    model, split, steps = linear_model(), random_split(16), []

    def loss_fn(images, labels):  # in the second step its value is finite, its gradient is not
        steps.append(1)
        loss = model(images)[1].square().mean()
        return loss + (loss - loss.detach()).sqrt() if len(steps) == 2 else loss

    with pytest.raises(common.InputError, match="are inf or nan after step 2; .* is from before"):
        common.fine_tune(settings(tmp_path), "FT", model, split, CLIP, loss_fn, key={})
    (path,) = tmp_path.glob("checkpoints/*.pt")
    assert common.load_tensors(path)["step"] == 1
    config, model = settings(tmp_path, seed=1), linear_model()
    model.head.weight.data.fill_(math.nan)
    with pytest.raises(common.InputError, match="FT, seed 1: .*; lower the learning rate") as said:
        common.fine_tune(config, "FT", model, split, CLIP)
    assert "from before" not in str(said.value) and len(list(path.parent.iterdir())) == 1


# --- predictions and their caches ---


def test_models_predicted_together_or_alone_agree(tmp_path):
    models, split = {"a": linear_model(), "b": linear_model(1)}, random_split()
    both = common.predict(settings(tmp_path / "both"), models, split, CLIP)
    alone = common.predict(settings(tmp_path / "alone"), {"b": models["b"]}, split, CLIP)
    assert torch.equal(both["b"].logits, alone["b"].logits)
    assert not torch.equal(both["a"].logits, both["b"].logits)


def test_a_cache_is_read_until_a_weight_an_image_or_a_setting_changes(tmp_path, monkeypatch):
    passes, forward = [], common.forward
    monkeypatch.setattr(common, "forward", lambda *words: passes.append(1) or forward(*words))
    config, model, split = settings(tmp_path), linear_model(), random_split(8)
    calls = [(config, model, split, CLIP)] * 2
    calls += [(config, linear_model(1), split, CLIP)]
    calls += [(config, model, random_split(8, seed=1), CLIP)]
    calls += [(dataclasses.replace(config, precision="bf16"), model, split, CLIP)]
    for change in ({"quick_gelu": True}, {"mean": (0.0,) * 3}, {"name": "x"}):
        calls += [(config, model, split, dataclasses.replace(CLIP, **change))]
    for number, (config, model, split, clip) in enumerate(calls):
        common.predict(config, {"a": model}, split, clip)
        common.frozen_features(config, model, split, clip)
        assert len(passes) == 2 * max(1, number)


def test_a_damaged_or_unwritable_cache_costs_time_and_not_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    logits = []
    for out in (tmp_path, tmp_path, tmp_path / "file" / "below"):
        model = {"a": linear_model()}
        logits.append(common.predict(settings(out), model, random_split(), CLIP)["a"].logits)
        for path in tmp_path.glob("cache/*"):
            path.write_bytes(b"damaged")
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    said = capsys.readouterr().err
    assert "computing it anew" in said and "going on without" in said


def test_heads_are_cached_by_weights_names_and_prompts(tmp_path):
    split, heads = random_split(8), []
    config = settings(tmp_path, model="tiny_clip", pretrained="random")
    for seed, names, prompt in ((0, "one two", "a {}"), (1, "one two", "a {}"),
                                (0, "one six", "a {}"), (0, "one two", "no {}")):  # fmt: skip
        given = dataclasses.replace(config, seed=seed)  # random weights: a seed is a model
        data = common.Data("folder", names.split(), [prompt], split, split, split, [], [])
        heads.append(common.zero_shot(given, data)[1].head.weight.detach())
    assert len({common.hash_of(head) for head in heads}) == 4
    assert torch.equal(common.zero_shot(given, data)[1].head.weight, heads[-1])
    assert len(list(tmp_path.glob("cache/*"))) == 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_pass_over_ten_times_the_images_needs_no_more_memory():
    """2,000 images as bytes are 53 MiB, as floats 211."""
    visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 8))
    model, clip = common.Classifier(visual, torch.randn(3, 8)), dataclasses.replace(CLIP, size=96)

    def most_memory(n):
        """MiB, at the end of a batch."""
        split, most = common.Split("s", "", np.zeros((n, 8, 8), np.uint8), torch.zeros(n).long()), 0
        for _ in common.forward(settings("", batch=50), {"": model}, split, clip):
            with open("/proc/self/statm") as file:  # in pages of 4 KiB
                most = max(most, int(file.read().split()[1]) / 256)
        return most

    assert most_memory(2000) - most_memory(200) < 16


# --- metrics ---


def test_ece_by_hand_with_full_confidence_empty_bins_and_an_edge():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.45, 0.55], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 1])  # bin 10: confidence 1, right 1/2; bin 6: .55, right 1
    assert common.ece(p, labels) == pytest.approx(0.5 * 0.5 + 0.5 * 0.45)
    p = torch.tensor([[0.4, 0.6], [0.35, 0.65]], dtype=torch.double)  # .6 belongs to (.5, .6]
    assert common.ece(p, torch.tensor([1, 0])) == pytest.approx((0.4 + 0.65) / 2)
    assert math.isnan(common.ece(torch.zeros(0, 2), torch.zeros(0).long()))


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_temperatures_recover_the_scale_that_was_put_in(scale):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert common.temperature(scale * logits, labels, "nll") == pytest.approx(scale, rel=0.05)
    t = common.temperature(scale * logits, labels, "confidence")
    p = (scale * logits / t).softmax(1)
    assert p.amax(1).mean().item() == pytest.approx(common.accuracy(p, labels), abs=1e-4)
    assert common.temperature(scale * logits, labels, "off") == 1


ALL_RIGHT = torch.arange(4)


@pytest.mark.parametrize("criterion", ["confidence", "nll"])
@pytest.mark.parametrize("labels", [ALL_RIGHT, ALL_RIGHT.roll(1), ALL_RIGHT[:0]])
def test_a_temperature_that_does_not_exist_is_said(labels, criterion, capsys):
    assert common.temperature(torch.eye(4)[: len(labels)], labels, criterion) == 1
    assert f"temperature: none fits by {criterion}, at an accuracy of" in capsys.readouterr().out


# --- rows and intervals ---


def rows_of(seed, ours, theirs):
    """A row of the method a and one of b: {split: which images each gets right}."""
    given = (("a", ours), ("b", theirs))
    return [common.Row(m, seed, {s: torch.as_tensor(r) for s, r in x.items()}) for m, x in given]


def test_tables_average_seeds_and_all_shifts_but_id():
    right = {"near": torch.tensor([True, False]), "test": torch.tensor([True, True])}
    rows = [common.Row("a", 0, right | {"far": torch.tensor([False, False])}, choice=(0.5, 2))]
    rows += [common.Row("a", 1, right | {"far": torch.tensor([True, True])}, choice=1.0)]
    mean = common.accuracies(rows, "a")
    assert mean == {"near": 50, "test": 100, "far": 50} and common.mean_shift(mean) == 50
    last = common.accuracy_table(rows, "title").splitlines()[-1].split()
    assert last == ["a", "50.0", "100.0", "50.0", "50.0", "0.5/2", "1"]


def test_gain_pairs_runs_by_seed_and_keeps_id_and_shifts_apart():
    base = {"test": [True, True], "shift": [False, False]}
    rows = rows_of(0, {"test": [True, False], "shift": [True, True]}, base)
    other = {"test": [True, True], "shift": [True, True]}
    rows += rows_of(1, {"test": [True, False], "shift": [True, False]}, base)[::-1]
    identity, shift = common.gain(rows, "a", "b")
    assert identity[0] == -50 and shift[0] == 75
    # by hand, ID: both runs gain 0 and -100 on the two images; shift: 100, 100 and 100, 0
    images, runs, of_shift = (0.5 * 100**2) / 2, (0.5 * 50**2) / 2, (0.5 * 50**2) / 2
    assert (identity[2] - identity[1]) / 2 == pytest.approx(1.959964 * images**0.5)
    freedom = ((runs + of_shift) / runs) ** 2
    half = scipy.stats.t.ppf(0.975, freedom) * (runs + of_shift) ** 0.5
    assert shift[1:] == pytest.approx((75 - half, 75 + half))
    rows = rows_of(0, other, other) + rows_of(1, base, base)[::-1]  # alike in both runs
    assert common.gain(rows, "a", "b") == ((0, 0, 0), (0, 0, 0))
    with pytest.raises(ValueError, match="a, b: two rows of one method and seed"):
        common.gain([*rows, rows[0]], "a", "b")


@pytest.mark.parametrize(("runs", "share"), [(2, 0.0), (3, 0.5), (5, 0.95)])
def test_the_interval_covers_the_truth_of_other_runs_and_images_19_times_of_20(runs, share):
    """A share of the variance is the images', which all runs share, the rest the runs' own."""
    rng, inside, n = np.random.default_rng(0), 0, 1000
    for _ in range(n):
        own = rng.normal(0, (1 - share) ** 0.5, runs) + rng.normal(0, (share / runs) ** 0.5)
        _, low, high = common.interval(own, share / runs)
        inside += low <= 0 <= high
    assert 0.92 <= inside / n <= 0.985


def test_one_runs_interval_is_over_images_and_runs_without_images_over_runs():
    assert common.interval([2.0], 4.0) == pytest.approx((2, 2 - 3.919928, 2 + 3.919928))
    assert common.interval([1.0, 3.0]) == pytest.approx((2, 2 - 12.7062, 2 + 12.7062))
    assert all(map(math.isnan, common.interval([2.0])[1:]))


# --- files ---


def test_result_rows_are_written_with_counts_and_the_run_s_record(tmp_path):
    right = {"test": torch.tensor([True] * 50 + [False] * 50)}
    for seed in (3, 4):
        row = common.Row("a", seed, right, numbers={"T": 2.0})
        common.write_results(settings(tmp_path, lr=0.25), torch.device("cpu"), [row])
    first, second = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (first["method"], first["seed"], second["seed"], first["T"]) == ("a", 3, 4, 2.0)
    assert (first["right"]["test"]["right"], first["right"]["test"]["n"]) == (50, 100)
    assert second["run"]["config"]["lr"] == 0.25 and second["run"]["versions"]["torch"]


def test_a_reader_sees_the_old_file_or_the_new_one_and_no_leftovers(tmp_path, capsys):
    path = tmp_path / "x"
    assert common.write_file(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    assert not common.write_file(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert "No space left" in capsys.readouterr().err


def test_a_figure_is_written_with_its_numbers_and_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib

    def state():
        return dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)

    before = state()
    with common.figure(tmp_path / "figures/f", ["x", "y"], columns=2) as (axes, numbers):
        numbers += [[0, 1], [1, 3]]
        axes[0, 1].plot(*zip(*numbers, strict=True))
    assert state() == before
    assert (tmp_path / "figures/f.csv").read_text() == "x,y\n0,1\n1,3\n"
    with Image.open(tmp_path / "figures/f.png") as image:
        assert min(image.size) > 300 and len(image.convert("L").getcolors()) > 20


def test_a_hash_tells_dtype_shape_order_and_value_apart():
    t = torch.arange(4.0)
    things = [t, t.double(), t.reshape(2, 2), t + 1, {"a": t}, {"b": t}, [t, t], "t", 1, "1", 1.0]
    assert len({common.hash_of(x) for x in things}) == len(things)
    assert common.hash_of({"a": 1, "b": t}) == common.hash_of({"b": t.clone(), "a": 1})


def test_an_inf_in_another_process_skips_the_step_in_this_one(tmp_path, monkeypatch):
    def average(gradients):  # what all_reduce makes of another process's inf
        for gradient in gradients:
            gradient.fill_(torch.inf)

    monkeypatch.setattr(common, "average_gradients", average)
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    config = settings(tmp_path, precision="fp16")
    common.train_step(config, optimiser, scaler, lambda batch: (weight * batch[0]).sum(), [weight])
    assert weight.tolist() == [1, 1, 1] and scaler.get_scale() < 2**16


def test_more_processes_than_images_of_a_batch_are_refused(monkeypatch):
    split = random_split(16)
    data = common.Data("folder", ["a", "b"], ["{}"], split, split, split, [], [])
    monkeypatch.setattr(common, "world", lambda: 9)
    with pytest.raises(common.InputError, match="9 processes for a batch or set of 8 images"):
        common.plan_training(common.Run(batch=8), data)


def test_types_of_settings_may_be_written_as_text(tmp_path):  # from __future__ import annotations
    fields = [
        ("number", "int", common.arg(1, "of something")),
        ("on", "bool", common.arg(True, "")),
    ]
    Config = dataclasses.make_dataclass("Config", fields, bases=(common.Run,))
    words = ["--number", "3", "--no-on", "--out", str(tmp_path)]
    config = common.parse(Config, words, "")
    assert (config.number, config.on) == (3, False)


def test_a_preset_for_a_setting_that_is_none_and_a_gain_of_no_rows_are_errors():
    with pytest.raises(ValueError, match="preset digits: Config has no 'epoch'"):
        common.apply_preset(common.Run(), "digits", {"digits": {"epoch": 3}})
    rows = [common.Row("FT", seed, {"test": torch.ones(3) > 0}) for seed in (0, 1)]
    with pytest.raises(ValueError, match="Smoth, FT: no rows, or not of the same seeds"):
        common.gain(rows, "Smoth", "FT")
    with pytest.raises(ValueError, match="not of the same seeds"):
        common.gain([*rows, common.Row("X", 2, rows[0].right)], "X", "FT")
