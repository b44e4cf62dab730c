"""AdamSPD drops in: visual question answering, PaliGemma with LoRA (the paper's Sec. 4).

    python lab/examples/vqa.py                            # tiny random model: 1 minute
    python lab/examples/vqa.py --model PALIGEMMA --data VQAV2 --ood OOD   # not measured by us

VQAV2: v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations
.json and the images, anywhere below it or below --images. OOD: a folder for each set, with what was
published: a file of questions and one of annotations (VQA-Rephrasings, VQA-CP, AdVQA, OK-VQA), one
file of both (TextVQA, VizWiz), or a list of question ids of VQAv2's val (VQA-CE). IV-VQA and CV-VQA
are read where they are in one of these forms, which we have not seen. PALIGEMMA: a folder or name.

LoRA starts as no change, so the anchor is zero: nothing is stored, "deviation" is the factors'
norm. The recipe (bf16, rank 8, alpha 16, dropout 0.05 on q, k, v, o; 10 epochs, 16 items x 2 steps
x 8 GPUs; rate and strengths) is that of code which the group wrote in the weeks of the review; the
paper's own is not known to us. Of its Table 6 the rows linear probe, LP-FT and WiSE-FT are not
here; L2-SP has none, since with the zero anchor it is AdamW. Random weights hold nothing to forget:
the default run shows that it runs, and nothing about SPD.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch
import train
from generate import tiny_paligemma, vqa_items
from train import common, read_rgb

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "labels")
LAYERS = r".*language_model.*\.[qkvo]_proj"
SMALL = {"lr": 5e-3, "lr_end": 0.0, "batch": 32, "epochs": 4, "warmup": 20, "precision": "fp32"}
PRESETS = {"generated": SMALL | {"spd_lambda": "0.5,1,2"}}
Config = train.settings(
    data=("generated", "generated, or a folder with VQAv2's files"),
    model=("random", "random: a tiny PaliGemma; else what transformers takes"),
    ood=("", "folder with a folder for each further set"),
    images=("", "folder of the images; default: the one of --data, and each set's own"),
    rank=(8, "of LoRA, alpha twice that"),
    spd_lambda=("0.5,1,1.5,2", "strengths of Adam-SPD; the group's code has 0.5"),
    epochs=(10, "the group's"),
    batch=(256, "the group's, of all GPUs and accumulated steps"),
    micro=(16, "items at a time on the device, the group's; 0: the whole batch"),
    lr=(1e-3, "the group's"),
    lr_end=(0.1, "share of the rate where the warm-up begins and the cosine ends, the group's"),
    warmup=(1000, "steps of linear warm-up, a tenth of all at most; the group's"),
    weight_decay=(1e-4, "of AdamW alone; of a later configuration of the group"),
    precision=("bf16", "of the weights and of autocast", "fp32 bf16 fp16"),
    out=("runs/vqa", "folder for the generated items"),
)
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}
NOT = "ai are ca could did does do had has have is might must need should was were wo would".split()
WHOLE = (
    "i'm i've you're you've they're they've we've he's she's that's there's what's where's who's"
)
CONTRACTIONS = {f"{w}nt": f"{w}n't" for w in NOT} | {w.replace("'", ""): w for w in WHOLE.split()}


def normalise(answer):
    """VQA's rules: lower case, no articles, digits for number words, apostrophes of contractions,
    punctuation to spaces but for ' and :, no period or comma except a decimal point.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower().strip())
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = [CONTRACTIONS.get(w, NUMBERS.get(w, w)) for w in text.split()]
    return " ".join(w for w in words if w not in ("a", "an", "the"))


def accuracy(answer, people):
    """VQA accuracy: min(people who say so / 3, 1), averaged over leaving each of them out."""
    same = [normalise(answer) == normalise(p) for p in people]
    if len(same) < 2:
        return float(sum(same))
    return sum(min((sum(same) - own) / 3, 1) for own in same) / len(same)


def read_json(path):
    """The list in a file: itself, or under "questions", "annotations" or "data"."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            found = next(found[k] for k in ("questions", "annotations", "data") if k in found)
        if not isinstance(found, list):
            raise ValueError("no list in it")
        return found
    except (OSError, ValueError, StopIteration) as error:
        raise common.InputError(f"{path} is none of the published files: {error!r}") from error


def read_set(folder, images, part="", val=()):
    """[{"question", "image", "answers"}] of one set; `val` resolves bare question ids."""
    files = [p for p in sorted(folder.glob("*.json")) if part in p.name]
    parts = {kind: [p for p in files if kind in p.name] for kind in ("questions", "annotations")}
    if not files or any(len(p) > 1 for p in parts.values()):
        raise common.InputError(f"{folder}: expected one JSON, or questions and annotations {part}")
    if all(parts.values()):
        answers = {a["question_id"]: a for a in read_json(parts["annotations"][0])}
        records = [{**q, **answers[q["question_id"]]} for q in read_json(parts["questions"][0])
                   if q["question_id"] in answers]  # fmt: skip
    else:
        records = read_json(files[0])
    if records and not isinstance(records[0], dict):
        chosen = set(records)
        return [item for item in val if item["id"] in chosen]
    found, items = images | {p.name: p for p in folder.rglob("*.*")}, []
    for r in records:
        if lacking := [k for k in ("question", "answers") if k not in r]:
            raise common.InputError(f"{folder}: an item lacks {lacking[0]!r}: {str(r)[:80]}")
        i = r.get("image", r.get("image_id"))
        names = [str(i), f"{i}.jpg"]
        if isinstance(i, int):
            names = [f"{form}{i:012d}.jpg" for form in ("COCO_train2014_", "COCO_val2014_", "")]
        path = next((found[n] for n in names if n in found), None)
        if path is None:
            raise common.InputError(
                f"{folder}: no image {' or '.join(names)}, there or in --images"
            )
        people = [a["answer"] if isinstance(a, dict) else a for a in r["answers"]]
        item = {"id": r.get("question_id"), "question": r["question"], "image": path}
        items.append(item | {"answers": people})
    return items


def read_sets(folder, ood, images):
    """Items of VQAv2's train, and {set: items} of its val and of every folder in `ood`, if given.

    images: a folder, or "" for the one of the data. Raises InputError.
    """
    if ood and not Path(ood).is_dir():
        raise common.InputError(f"--ood {ood}: expected a folder with a folder for each set")
    images = {p.name: p for p in Path(images or folder).rglob("*.*")}
    items = read_set(folder, images, "train2014")
    tests = {"VQAv2": read_set(folder, images, "val2014")}
    for place in sorted(p for p in Path(ood).iterdir() if p.is_dir()) if ood else ():
        tests[place.name] = read_set(place, images, val=tests["VQAv2"])
    return items, tests


def load_model(config, items):
    """Processor and PaliGemma. Raises InputError."""
    if config.model == "random":
        return tiny_paligemma([w for i in items for w in (i["question"], *i["answers"])])
    import transformers as t

    return train.pretrained(config, t.AutoProcessor, t.PaliGemmaForConditionalGeneration)


def encode(processor, items, side, **suffix):
    """What the model takes for questions and images, padded on the "left" or "right" side."""
    pictures = [read_rgb(item["image"]) for item in items]
    text = [f"<image>answer en {item['question']}" for item in items]
    options = {"return_tensors": "pt", "padding": True, "padding_side": side}
    return processor(images=pictures, text=text, **options, **suffix)


def training_batch(processor, items):
    """The model's INPUTS, with the answer that most people gave as the label."""
    answers = [Counter(item["answers"]).most_common(1)[0][0] for item in items]
    inputs = encode(processor, items, "right", suffix=answers)
    return tuple(inputs[k] for k in INPUTS)


def respond(model, processor, items):
    """The model's answers as text, 10 tokens at most."""
    inputs = encode(processor, items, "left").to(model.device)
    inputs.pop("labels", None)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    out = out[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(out, skip_special_tokens=True)


@torch.inference_mode()
def evaluate(model, processor, tests, config):
    """{set: VQA accuracy in percent}, and the mean of the sets after the first, if any."""
    columns = {}
    for name, test in tests.items():
        points = 0.0
        for i in range(0, len(test), config.batch):
            part = test[i : i + config.batch]
            pairs = zip(respond(model, processor, part), part, strict=True)
            points += sum(accuracy(text, item["answers"]) for text, item in pairs)
        columns[name] = 100 * points / len(test)
    shifts = list(columns.values())[1:]
    return columns | ({"mean OOD": sum(shifts) / len(shifts)} if shifts else {})


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    train.need("transformers", "peft")
    folder, ood = Path(config.data), config.ood
    if config.data == "generated":
        common.apply_preset(config, "generated", PRESETS)
        folder, ood = vqa_items(Path(config.out), config.items, config.seed)
    items, tests = read_sets(folder, ood, config.images)
    common.set_seed(config.seed)
    processor, model = load_model(config, items)
    model = train.adapted(config, model, 2 * config.rank, LAYERS, dropout=0.05)

    def batch_of(rows):
        return training_batch(processor, [items[i] for i, _ in rows])

    def loss_fn(batch):
        return model(**dict(zip(INPUTS, batch, strict=True))).loss

    def score(model):
        return evaluate(model, processor, tests, config)

    rows = train.compare(config, model, len(items), batch_of, loss_fn, score, anchor="zero")
    train.print_rows(rows, common.steps_of(config, len(items)))
    return rows


if __name__ == "__main__":
    common.run(main)
