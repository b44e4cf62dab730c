"""Bad input in tables: command lines, calls, files. Each is one sentence that names what is wrong:
exit code 2 or InputError from a script, InputError or ValueError of our own from a function. None
may fail inside a library, none may give a number, none may run code of a file or change one.

A line is: what is done | words that the sentence has.
"""

import contextlib
import importlib
import io
import json
import os
import pickle
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import carot
import common
import er_study
import spd
import vrf
from csrc import build
from data import checkpoints, testbeds, trajectories, trees
from studies import er_axes

sys.path[:0] = [str(common.HERE / "examples"), str(common.HERE / "synthetic")]
import commonsense  # noqa: E402
import vqa  # noqa: E402

WITH_DATA = {  # script -> the words in front of its flags
    "vrf": "",
    "carot": "",
    "spd": "",
    "er_study": "",
    "studies.vrf_ablations": "grid",
    "studies.carot_ablations": "components",
    "studies.spd_ablations": "rules",
    "studies.er_axes": "strategies",
}
FOR_ALL = """
--lrr 1                      | unrecognized arguments: --lrr
--epochs 0                   | --epochs 0: expected at least 1
--batch two                  | argument --batch: invalid int value
--batch -5                   | --batch -5: expected at least 1
--weight-decay nan           | --weight-decay nan: expected at least 0
--seed -1                    | --seed -1: expected at least 0
--workers -2                 | --workers -2: expected at least -1
--precision fp8              | argument --precision: invalid choice: 'fp8'
--out {file}                 | expected a folder, new or old (a file is there)
--out {file}/below           | expected a folder, new or old
--out {long}                 | File name too long
--out=                       | --out '': expected a folder
--device gpu                 | --device gpu: not usable here
--model ViT-B-61             | no 'ViT-B-61'; did you mean 'ViT-B-16'
--weights {none}/clip.pt     | no weights at
"""
COMMANDS = """
vrf --data {none}/x                       | does not exist
vrf --data digitss                        | did you mean 'digits'
vrf --data {file}                         | is a file, but --data takes a folder
vrf --data {empty}                        | has no train/; it holds nothing
vrf --data {long}                         | File name too long
vrf --data entity30:{empty}               | has no train/
vrf --data {flat}                         | has no images; it holds
vrf --data {unmatched}                    | did you mean 'cat'
vrf --data {noval}                        | Rename 'vall' if that is it
vrf --data {tree} --val-fraction 0        | between 0 and 1
vrf --data {tree} --val-fraction 1.5      | between 0 and 1
vrf --data {badnames}                     | has 1 names for 2 class folders
vrf --data {badtemplates}                 | lacks {{}} for the name
vrf --methods E2E-FTT                     | did you mean 'E2E-FT'
vrf --ensemble LPFT                       | did you mean 'LP-FT'
vrf --ab 1.5                              | two positive numbers
vrf --ab 1.5,0.6,abc                      | two positive numbers
vrf --ab 1,0                              | two positive numbers
vrf --ab 1,-0.6                           | two positive numbers
vrf --ab nan,1                            | two positive numbers
vrf --ab 1,inf                            | two positive numbers
vrf --ab paper                            | Table 7 lacks tiny_clip on digits
vrf --p 2                                 | --p 2.0: expected at least 0 and at most 1
vrf --p nan                               | --p nan: expected
vrf --temperature cold                    | invalid choice: 'cold'
vrf --weight cubic                        | invalid choice: 'cubic'
vrf --distance euclid                     | invalid choice
vrf --k-rule both                         | invalid choice
vrf --zsf-rule none                       | invalid choice
vrf --features raw                        | invalid choice
vrf --seeds 0                             | --seeds 0: expected at least 1
vrf --seed 99999999999999999999999        | --seed
vrf --quick-gelu maybe                    | invalid choice: 'maybe'
vrf --weights {file}                      | is no readable checkpoint
vrf --weights {empty}                     | no weights at
vrf --weights {hostile}                   | must run code to be read
vrf --weights {cut}                       | is no readable checkpoint
vrf --weights {other}                     | check --model
vrf --weights {nanweights} --model tiny_clip | holds inf or nan
vrf --finetuned {none}/ft.pt              | no weights at
vrf --finetuned {hostile}                 | must run code to be read
vrf --finetuned {nohead}                  | found
vrf --model RN50 --pretrained opanai      | did you mean 'openai'
carot --methods FLIP                      | did you mean 'FLYP'
carot --oc -1                             | --oc -1.0: expected at least 0
carot --sd nan                            | --sd nan: expected at least 0
carot --oc-form cubic                     | invalid choice
carot --ema-every 0                       | --ema-every 0: expected at least 1
carot --micro-batch -1                    | --micro-batch -1
carot --temperature warm                  | invalid choice
carot --cross-fnorm inf                   | --cross-fnorm inf
spd --methods Adam-SDP                    | did you mean 'Adam-SPD'
spd --spd-lambda 0                        | --spd-lambda 0: expected positive numbers
spd --spd-lambda 1,nan                    | --spd-lambda 1,nan: expected positive numbers
spd --spd-lambda inf                      | --spd-lambda inf: expected positive numbers
spd --spd-lambda=-1                       | --spd-lambda -1: expected positive numbers
spd --l2sp ten                            | --l2sp ten: expected positive numbers
spd --fraction 0                          | --fraction 0.0
spd --fraction 1.5                        | --fraction 1.5
spd --smoothing 2                         | --smoothing 2.0: expected at least 0 and at most 1
spd --drop-path 1.5                       | --drop-path 1.5: expected at least 0 and at most 1
spd --mixup -1                            | --mixup -1
spd --head anchored                       | invalid choice
spd --id reel                             | does not exist
er_study --data {tree}                    | needs a testbed on the same data
er_study --kinds zeroshot                 | did you mean 'zero-shot'
er_study --kinds ,                        | expected some of
er_study --lr fast                        | --lr fast: expected positive numbers
er_study --lr 1e-4,-1                     | --lr 1e-4,-1: expected positive numbers
er_study --lr 1e-4,                       | expected positive numbers
er_study --lr nan                         | expected positive numbers
er_study --draws 0                        | --draws 0: expected at least 1
er_study --jobs 0                         | --jobs 0: expected at least 1
er_study --epochs-random 0                | --epochs-random 0: expected at least 1
er_study --testbed cifar11                | expected all, cifar10
er_study --testbed {file}                 | expected all, cifar10
er_study --testbed {csv}                  | no column
er_study --testbed {csvwords}             | no number
er_study --testbed {npz}                  | is no per-example testbed
er_study --testbed {hostilenpz}           | is no per-example testbed
er_study --testbed {binary}.csv           | cannot be read
er_study --plot {none}/*.csv              | no trajectories
er_study --plot {plot}/t.csv              | has no column 'model', as of an older version
er_study --plot {plot}/u.csv              | no whole evaluation
er_study --plot {plotbad}/t.csv           | testbed.csv
studies.vrf_ablations grids               | did you mean 'grid'
studies.carot_ablations lambda            | did you mean 'lambdas'
studies.spd_ablations rule                | did you mean 'rules'
studies.er_axes strategy                  | did you mean 'strategies'
studies.er_settings cifarr                | did you mean 'cifar'
studies.er_settings cifar                 | --data: expected a CIFAR-10 or ImageNet tree
studies.er_settings cifar --data {none}/x | does not exist
studies.er_settings cifar --data {tree}   | is folder; cifar needs cifar10
studies.er_settings clip --init random    | needs features
studies.er_settings cifar --draws 0       | --draws 0
studies.er_settings cifar --max-iter 0    | --max-iter 0
studies.er_settings cifar --subset middle | invalid choice
studies.er_settings cifar --head ones     | invalid choice
error_bound --models 2          | --models 2: expected at least 3
error_bound --runs 1            | --runs 1: expected at least 2
error_bound --runs 500          | there are 100 models to split
error_bound --delta 0           | --delta must lie between 0 and 1
error_bound --delta 2           | --delta 2.0: expected at least 0 and at most 1
error_bound --scale 0           | --scale above 0
error_bound --test 5            | --test 5: expected at least
error_bound --bins 0            | --bins 0: expected at least 1
error_bound --at-once 0         | --at-once 0: expected at least 1
error_bound --lr nan            | --lr nan
error_bound --oc squared        | invalid choice
error_bound --out {file}        | expected a folder
error_bound --epochs 0          | --epochs 0
segment --data {none}/VOC                 | is missing or empty
segment --data {empty}                    | is missing or empty
segment --items 0                         | --items 0: expected at least 1
segment --out {file}                      | expected a folder
segment --device gpu --data {empty}       | --device gpu: not usable here
commonsense --rank 0                      | --rank 0: expected at least 1
commonsense --length 0                    | --length 0: expected at least 1
commonsense --out {file}                  | expected a folder
vqa --rank 0                              | --rank 0: expected at least 1
vqa --lr inf                              | --lr inf
"""


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def table(text):
    lines = (line.rpartition(" | ") for line in text.strip().splitlines())
    return [(what.strip(), words.strip()) for what, _, words in lines]


def class_images(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (90, 20 * i, 9)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """{name: path} of what the tables mention."""
    root = tmp_path_factory.mktemp("bad")
    at = {"none": root / "none", "long": "x" * 5000, "file": root / "file", "empty": root / "empty"}
    at["file"].write_text("words")
    at["empty"].mkdir()
    parts = [f"{part}/{name}" for part in ("train", "val") for name in ("cat", "dog")]
    for name in ("tree", "badnames", "badtemplates"):
        at[name] = class_images(root / name, *parts)
    (at["badnames"] / "classnames.txt").write_text("only one\n")
    (at["badtemplates"] / "templates.txt").write_text("a photo\n")
    at["flat"] = class_images(root / "flat", "val/cat")
    (at["flat"] / "train/cat").mkdir(parents=True)
    at["unmatched"] = class_images(root / "unmatched", *parts, "shift/catt")
    at["noval"] = class_images(root / "noval", "train/cat", "vall/cat")
    with np.load(common.EMBEDDED / "tiny_clip.npz") as file:
        tiny = {k: torch.from_numpy(file[k]) for k in file.files}
    name = next(k for k in tiny if k.startswith("visual.") and tiny[k].dim() == 2)
    torch.save({"visual.w": torch.zeros(1), "x": Hostile()}, root / "hostile.pt")
    torch.save({"visual.other": torch.zeros(3)}, root / "other.pt")
    torch.save(tiny | {name: tiny[name] * torch.nan}, root / "nanweights.pt")
    torch.save({k: v for k, v in tiny.items() if k.startswith("visual.")}, root / "nohead.pt")
    (root / "cut.pt").write_bytes((root / "nohead.pt").read_bytes()[:5000])
    at |= {n: root / f"{n}.pt" for n in "hostile other nanweights nohead cut".split()}
    at["csv"] = root / "table.csv"
    at["csv"].write_text("model,accuracy\na,1\n")
    known = testbeds.read("imagenet2020")
    header = ["model", *known.n]
    lines = [",".join([m, *["many"] * len(known.n)]) for m in known.models]
    at["csvwords"] = root / "words.csv"
    at["csvwords"].write_text("\n".join([",".join(header), *lines]))
    at["npz"] = root / "bits.npz"
    np.savez(at["npz"], models=np.array(["a"]), set=np.zeros((1, 2), np.uint8))
    at["hostilenpz"] = root / "hostile.npz"
    np.savez(at["hostilenpz"], models=np.array([Hostile()], object))
    at["binary"] = root / "binary"
    (root / "binary.csv").write_bytes(b"\xff\xfe\x00\x80" * 9)
    for name, content in (("plot", counts_csv()), ("plotbad", "model,role,a:x\n1")):
        at[name] = root / name
        at[name].mkdir()
        (at[name] / "t.csv").write_text("run,step\n1,2\n")
        row = "x," * (len(trajectories.COLUMNS) - 1)
        (at[name] / "u.csv").write_text(f"{','.join(trajectories.COLUMNS)}\n{row}\n")
        (at[name] / "testbed.csv").write_text(content)
    return at


def counts_csv():
    rows = "\n".join(f"m{i},testbed,{50 + 9 * i},{40 + 8 * i}" for i in range(5))
    return f"model,role,test:100,shift:100\n{rows}\n"


def sentence_of(call):
    """(what a call said when it refused, what is wrong with how it did)."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = call()
    except SystemExit as stop:
        return errors.getvalue(), "" if stop.code == 2 else f"exit code {stop.code}"
    except (common.InputError, ValueError) as error:
        if isinstance(error, common.InputError):
            return str(error), ""
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        return str(error), "" if where.startswith(str(common.HERE)) else f"from {where}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
        return str(error), kind
    return "", f"accepted: {str(result)[:80]}"


def failures_of(cases):
    """Lines about the cases [(what, call, words)] that are not refused as they should be."""
    found = []
    for what, call, words in cases:
        said, wrong = sentence_of(call)
        if not wrong and words not in said:
            wrong = f"does not say {words!r}"
        if not wrong and not 10 < len(said.splitlines()[0]) < 900:
            wrong = "no sentence"
        if wrong:
            found.append(f"{what}: {wrong}: {said[:200]}")
    print(f"{len(cases)} bad inputs, {len(found)} not refused in one sentence")
    print("\n".join(found))
    return "\n".join(found)


def commands(at):
    lines = [
        (f"{script} {first} {line}".replace("  ", " "), words)
        for script, first in WITH_DATA.items()
        for line, words in table(FOR_ALL)
    ]
    cases = []
    for line, words in lines + table(COMMANDS):
        script, *flags = line.split()
        flags = [f.format(**at) if "{" in f else f for f in flags]

        def call(script=script, flags=flags):
            return importlib.import_module(script).main(flags)

        cases.append((line, call, words.replace("{{}}", "{}")))
    return cases


def test_bad_command_lines_end_in_one_sentence_and_exit_code_two(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = bad["file"].parent
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    cases = commands(bad)
    assert failures_of(cases) == ""
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert not list(tmp_path.rglob("executed")) and len(cases) >= 200


# functions


def t(*rows):
    return torch.tensor(rows)


GOOD, LABELS = t([0.9, 0.1], [0.2, 0.8]), t(0, 1)
NAN, INF = float("nan"), float("inf")


def near(v, V, k):
    return lambda: vrf.kth_distance(v, V, k)


def adam(**options):
    return lambda: spd.AdamSPD([torch.zeros(2, requires_grad=True)], **options)


def scored(function, *args):
    """A metric on scores and labels that do not fit, and what each says."""
    return [
        (f"{function.__name__} {what}", lambda x=x, y=y: function(x, y, *args), words)
        for what, x, y, words in (
            ("NaN", t([NAN, 0.1], [0.2, 0.8]), LABELS, "scores hold inf or nan"),
            ("inf", t([INF, 0.1], [0.2, 0.8]), LABELS, "scores hold inf or nan"),
            ("one dimension", GOOD[0], LABELS, "expected scores [N, C] and integer labels [N]"),
            ("too few labels", GOOD, LABELS[:1], "got (2, 2) and (1,)"),
            ("one-hot labels", GOOD, t([1, 0], [0, 1]), "got (2, 2) and (2, 2)"),
            ("float labels", GOOD, t(0.0, 1.0), "integer labels"),
            ("label 2", GOOD, t(0, 2), "labels are 0 to 2, but there are 2 classes"),
            ("label -1", GOOD, t(-1, 1), "labels are -1 to 1"),
        )
    ]


def functions():
    kernels, zeros = build.Kernels(None, "portable"), torch.zeros
    shares, p = np.array([0.5, 0.6, 0.7]), [zeros(2)]
    split, tower = common.Split("x", "x", [], t(0, 1, 2)), torch.nn.Module()
    tower.visual = torch.nn.Identity()
    step = (1, 1e-3, (0.9, 0.99), 1e-8, 1.0)

    def knn(*args):
        return lambda: kernels.knn_kth_distance(*args)

    def spd_step(*lists):
        return lambda: kernels.spd_step(*lists, *step)

    def bars(*args):
        return lambda: er_study.clopper_pearson(*args)

    yield from scored(common.accuracy)
    yield from scored(common.ece)
    yield from scored(common.nll)
    yield from scored(common.temperature, "nll")
    yield from [
        ("ece of logits", lambda: common.ece(9 * GOOD, LABELS), "are they logits?"),
        ("nll of logits", lambda: common.nll(-GOOD, LABELS), "are they logits?"),
        ("ece, 0 bins", lambda: common.ece(GOOD, LABELS, 0), "0 bins"),
        ("ece, -3 bins", lambda: common.ece(GOOD, LABELS, -3), "-3 bins"),
        ("ece of nothing", lambda: common.ece(GOOD[:0], LABELS[:0]), "of 0 samples"),
        ("criterion", lambda: common.temperature(GOOD, LABELS, "paper"), "criterion 'paper'"),
        ("wilson k > n", lambda: common.wilson(5, 4), "k = 5 of n = 4"),
        ("wilson k < 0", lambda: common.wilson(-1, 4), "k = -1 of n = 4"),
        ("hold out 0", lambda: common.hold_out(split, 0, 0), "between 0 and 1"),
        ("hold out NaN", lambda: common.hold_out(split, NAN, 0), "between 0 and 1"),
        ("hold out of one each", lambda: common.hold_out(split, 0.5, 0), "one image per class"),
        ("choose", lambda: common.choose("FTT", ["FT", "LC"], "--m"), "did you mean 'FT'"),
        ("numbers", lambda: common.numbers("", "--lr"), "--lr : expected positive numbers"),
        ("numbers 1e999", lambda: common.numbers("1e999", "--lr"), "expected positive numbers"),
        ("device", lambda: common.pick_device("gpu"), "--device gpu: not usable here"),
        ("device meta", lambda: common.pick_device("meta"), "--device meta: not usable"),
        ("kth k = 0", near(zeros(2, 3), zeros(4, 3), 0), "k = 0 of 4 stored"),
        ("kth k = 5", near(zeros(2, 3), zeros(4, 3), 5), "k = 5 of 4 stored"),
        ("kth k = -1", near(zeros(2, 3), zeros(4, 3), -1), "k = -1 of 4 stored"),
        ("kth widths", near(zeros(2, 3), zeros(4, 2), 1), "width 3 and 2"),
        ("kth NaN in v", near(zeros(2, 3) * NAN, zeros(4, 3), 1), "hold inf or nan"),
        ("kth NaN in V", near(zeros(2, 3), zeros(4, 3) * NAN, 1), "hold inf or nan"),
        ("kth inf in V", near(zeros(2, 3), zeros(4, 3) + INF, 1), "hold inf or nan"),
        ("kth one dimension", near(zeros(3), zeros(4, 3), 1), "expected float [N, D] and [M, D]"),
        ("kth integers", near(zeros(2, 3).long(), zeros(4, 3), 1), "expected float [N, D]"),
        ("failures", lambda: vrf.failures(LABELS, LABELS, LABELS[:1]), "2 FT predictions, 1 label"),
        ("wse", lambda: vrf.wse({"a": zeros(1)}, {"b": zeros(1)}, 0.5), "one architecture"),
        ("wse shapes", lambda: vrf.wse({"a": zeros(1)}, {"a": zeros(2)}, 0.5), "one architecture"),
        ("fit of two", lambda: er_study.fit(shares[:2], shares[:2]), "2 models with finite logits"),
        ("fit lengths", lambda: er_study.fit(shares, shares[:2]), "(3,) ID, (2,) OOD accuracies"),
        ("fit percent", lambda: er_study.fit(100 * shares, shares), "an accuracy is 50.0"),
        ("fit negative", lambda: er_study.fit(shares, -shares), "an accuracy is -0.5"),
        ("fit NaN", lambda: er_study.fit(shares * NAN, shares), "an accuracy is nan"),
        ("fit ends", lambda: er_study.fit(shares * 0, shares), "0 models with finite logits"),
        ("beta percent", lambda: er_study.beta(68.3, 1, 0), "an accuracy is 68.3"),
        ("beta NaN", lambda: er_study.beta(NAN, 1, 0), "an accuracy is nan"),
        ("ER percent", lambda: er_study.effective_robustness(68, 60, 1, 0), "an accuracy is 68"),
        ("interval k > n", bars(5, 4), "k = 5 of n = 4"),
        ("interval k < 0", bars(-1, 4), "k = -1 of n = 4"),
        ("interval NaN", bars(NAN, 4), "k = nan of n = 4"),
        ("AdamSPD lr", adam(lr=-1), "lr must be 0 or more and finite, got -1"),
        ("AdamSPD lr NaN", adam(lr=NAN), "lr must be 0 or more and finite, got nan"),
        ("AdamSPD lr inf", adam(lr=INF), "lr must be 0 or more and finite, got inf"),
        ("AdamSPD lambda", adam(spd_lambda=-0.5), "spd_lambda must be 0 or more and finite"),
        ("AdamSPD eps", adam(eps=-1e-8), "eps must be 0 or more and finite"),
        ("AdamSPD decay", adam(weight_decay=NAN), "weight_decay must be 0 or more and finite"),
        ("AdamSPD beta 1", adam(betas=(0.9, 1.0)), "betas must be two from 0 to below 1"),
        ("AdamSPD one beta", adam(betas=(0.9,)), "betas must be two"),
        ("AdamSPD beta < 0", adam(betas=(-0.1, 0.9)), "betas must be two"),
        ("AdamSPD rule", adam(rule="spdd"), "rule must be one of 'spd'"),
        ("AdamSPD anchor", adam(anchor="start"), "anchor must be one of 'pretrained'"),
        (
            "AdamSPD complex",
            lambda: spd.AdamSPD([zeros(1, dtype=torch.cfloat)]),
            "complex parameters",
        ),
        (
            "param_groups",
            lambda: spd.param_groups(torch.nn.Linear(1, 1), {"haed.": {}}),
            "no trainable parameter begins with 'haed.'",
        ),
        ("numbers", lambda: common.numbers("1,nan", "--x"), "--x 1,nan: expected positive"),
        ("knn k", knn(zeros(2, 3), zeros(4, 3), 5), "k must be an integer from 1 to 4, got 5"),
        ("knn k 1.5", knn(zeros(2, 3), zeros(4, 3), 1.5), "k must be an integer"),
        ("knn list", knn([[1.0]], zeros(4, 1), 1), "queries must be a tensor, got list"),
        ("knn integers", knn(zeros(2, 3).long(), zeros(4, 3), 1), "queries must be a float tensor"),
        ("knn width", knn(zeros(2, 3), zeros(4, 2), 1), "reference must be [M, 3]"),
        ("knn 3-D", knn(zeros(2, 3), zeros(4, 3, 1), 1), "reference must be two dimensions"),
        ("knn no width", knn(zeros(2, 0), zeros(4, 0), 1), "D > 0"),
        ("step dtype", spd_step(*[[zeros(2).half()]] * 5), "params must be torch.float32"),
        ("step shapes", spd_step(p, p, [zeros(3)], p, p), "grads[0] must be"),
        ("step lengths", spd_step(p, p, [], p, p), "grads must be 1 tensors, got 0"),
        ("step stride", spd_step(*[[zeros(2, 3).T]] * 5), "params[0] must be contiguous memory"),
        (
            "easiest of too few",
            lambda: er_axes.subset(t(1.0, 2.0), t(0, 1), "easiest", 5),
            "class 0 has 1 images, fewer than 5",
        ),
        ("projections", lambda: carot.projections(tower), "no linear projection"),
    ]


def test_functions_refuse_what_would_give_a_wrong_number():
    cases = list(functions())
    assert failures_of(cases) == "" and len(cases) >= 80


# files


def pickled(path, images, labels, **rest):
    path.write_bytes(pickle.dumps({b"data": images, b"labels": labels, **rest}))
    return path


def cifar_1(root, images, labels):
    """A CIFAR-10 tree whose CIFAR-10.1 has these arrays."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pickled(folder / name, np.zeros((10, 3072), np.uint8), list(range(10)))
    np.save(root / "cifar10.1_v6_data.npy", images)
    np.save(root / "cifar10.1_v6_labels.npy", labels)
    return root


def readers(root):
    def batch(name, *content, **rest):
        path = pickled(root / name, *content, **rest)
        return lambda: trees.read_batch(path)

    def v6(name, images, labels):
        path = cifar_1(root / name, images, labels)
        return lambda: trees.find(str(path))

    def file(name, content, read):
        path = root / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return lambda: read(path)

    pixels, ten = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    rows = np.zeros((2, 3072), np.uint8)
    question = json.dumps([{"instruction": "x", "output": "y"}])
    for name, rest in (("vqa", ', "answers": []'), ("vqa2", "")):
        (root / name).mkdir(exist_ok=True)
        (root / name / "a.json").write_text(f'[{{"image_id": 1, "question": "?"{rest}}}]')
    with zipfile.ZipFile(root / "odd.npz", "w") as odd:
        odd.writestr("models.npy", b"not an array")

    def vqa_json(text):
        return file(f"vqa{abs(hash(text))}.json", text, vqa.read_json)

    return [
        ("batch hostile", batch("b1", rows, [1, 2], extra=Hostile()), "it asks for"),
        ("batch shape", batch("b2", rows[:, :9], [1, 2]), "is no batch of CIFAR-10"),
        ("batch without labels", file("b3", pickle.dumps({b"data": rows}), trees.read_batch), "b3"),
        ("batch cut", file("b4", pickle.dumps({b"data": rows})[:99], trees.read_batch), "b4"),
        ("batch empty", file("b5", b"", trees.read_batch), "is no batch of CIFAR-10"),
        ("CIFAR-10.1 floats", v6("c1", pixels / 255, ten), "expected images as uint8"),
        ("CIFAR-10.1 flat", v6("c2", pixels.reshape(10, -1), ten), "got uint8 (10, 3072)"),
        ("CIFAR-10.1 channels", v6("c3", pixels.transpose(0, 3, 1, 2), ten), "[N, H, W, 3]"),
        ("CIFAR-10.1 few labels", v6("c4", pixels, ten[:9]), "expected 10 labels"),
        (
            "CIFAR-10.1 label 10",
            v6("c5", pixels, ten + 1),
            "labels from 0 to 9, got int64 (10,), 1",
        ),
        ("CIFAR-10.1 label -1", v6("c6", pixels, ten - 1), "labels from 0 to 9"),
        ("CIFAR-10.1 float labels", v6("c7", pixels, ten / 2), "labels from 0 to 9, got float64"),
        ("JSON cut", file("j1", '{"a": ', trees.read_json), "is damaged"),
        ("JSON binary", file("j2", b"\xff\xfe", trees.read_json), "cannot be read"),
        ("JSON absent", lambda: trees.read_json(root / "none.json"), "cannot be read"),
        ("arrays hostile", file("a1.npy", pickle.dumps(Hostile()), trees.read_arrays), "a1.npy"),
        ("arrays words", file("a2.npy", "words", trees.read_arrays), "cannot be read"),
        ("weights empty", file("w1.pt", "", checkpoints.read_weights), "w1.pt"),
        ("weights words", file("w2.safetensors", "words", checkpoints.read_weights), "w2"),
        ("weights npz", lambda: checkpoints.read_weights(root / "odd.npz"), "odd.npz"),
        ("weights folder", lambda: checkpoints.read_weights(root), "no weights at"),
        ("cache words", file("k1.pt", "words", common.load_tensors), "k1.pt is damaged"),
        ("table binary", file("t1.csv", b"\xff\x00", testbeds.read), "t1.csv"),
        ("testbed cut", file("t2.npz", b"PK\x03\x04", testbeds.read), "t2.npz"),
        ("items object", file("i1.json", '{"a": 1}', commonsense.read_items), "i1.json"),
        ("items keys", file("i2.json", question, commonsense.read_items), "not every item has"),
        ("items numbers", file("i3.json", "[1, 2]", commonsense.read_items), "i3.json"),
        ("items empty", file("i4.json", "[]", commonsense.read_items), "i4.json"),
        ("items cut", file("i5.json", "[{", commonsense.read_items), "i5.json"),
        ("vqa number", vqa_json("3"), "none of the published files"),
        ("vqa other keys", vqa_json('{"a": []}'), "none of the published files"),
        ("vqa no list", vqa_json('{"data": 7}'), "none of the published files"),
        ("vqa cut", vqa_json('{"data": ['), "none of the published files"),
        ("vqa no folder", lambda: vqa.read_set(root / "none", {}), "expected one JSON"),
        ("vqa no image", lambda: vqa.read_set(root / "vqa", {}), "no image COCO_train2014_"),
        (
            "vqa no answers",
            lambda: vqa.read_set(root / "vqa2", {"000000000001.jpg": root}),
            "lacks 'answers'",
        ),
        (
            "trajectory words",
            file("r1.csv", ",".join(trajectories.COLUMNS) + "\n" + HALF_ROW, plotted),
            "r1.csv",
        ),
    ]


HALF_ROW = "x," * trajectories.COLUMNS.index("extrapolated") + "1,,"


def plotted(path):
    return trajectories.read(path)


def test_damaged_files_are_named_and_their_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = readers(tmp_path)
    assert failures_of(cases) == "" and len(cases) >= 35
    assert not (tmp_path / "executed").exists()


# images, which anyone may have made


def png(width, height):
    """A PNG of a hundred bytes that says it has this size."""
    parts = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        checked = kind + content
        parts += struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
    return parts


def images_of(root):
    data = trees.find(str(root))
    return common.Images(data.train, lambda image: image.size)


@pytest.mark.parametrize("side", [9_500, 12_000, 14_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_named_and_not_decoded(side, tmp_path):
    root = class_images(tmp_path, "train/cat", "val/cat")
    (root / "train/cat/0.png").write_bytes(png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(common.InputError, match="cat/0.png cannot be .* exceeds limit of"):
            images_of(root)[0, 0]
    images = images_of(root)
    images.skip_bad = True
    assert images[0, 0] is None and images[1, 0][0] == (8, 8)


def test_what_only_looks_like_an_image_is_named(tmp_path):
    root = class_images(tmp_path, "train/cat", "val/cat")
    (root / "train/cat/folder.png").mkdir()
    (root / "train/cat/loop.png").symlink_to("loop.png")
    (root / "train/cat/nowhere.png").symlink_to("absent.png")
    (root / "train/cat/zero.png").touch()
    images = images_of(root)
    assert len(images) == 6
    reasons = ("Is a directory", "Too many levels", "No such file", "the file is empty")
    for i, reason in enumerate(reasons, 2):
        with pytest.raises(common.InputError, match=f"cannot be read as an image: .*{reason}"):
            images[i, 0]


def test_links_that_lead_in_circles_end(tmp_path):
    root = class_images(tmp_path, "train/cat", "val/cat")
    (root / "train/cat/up").symlink_to(root)
    (root / "again").symlink_to(root / "train")
    (root / "loop").symlink_to("loop")
    data = trees.find(str(root))
    assert [s.name for s in data.shifts] == ["again"] and len(data.train.images) == 2


def test_names_with_spaces_and_of_any_script_are_read(tmp_path):
    odd = "drei  Äpfel \N{GREEK SMALL LETTER ALPHA} 林檎 {0} %s 'n"
    root = class_images(tmp_path / odd, f"train/{odd}", f"val/{odd}", f"a shift/{odd}")
    (root / "train" / odd / "0.png").rename(root / "train" / odd / f" {odd}.PNG")
    images = images_of(root)
    assert sorted(images[i, 0][0] for i in range(2)) == [(8, 8)] * 2
    assert [s.name for s in trees.find(str(root)).shifts] == ["a shift"]


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    root = class_images(tmp_path, "train/cat", "val/cat")
    os.mkdir(os.fsencode(root) + b"/sh\xffft")
    with pytest.raises(common.InputError, match=r"sh\\xffft.*rename"):
        trees.find(str(root))
