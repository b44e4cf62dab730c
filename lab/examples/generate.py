"""Data made for the demonstrations, in the published sets' own layouts, so that one reader serves
both: digits on photos (VOC), eight small question sets (commonsense), coloured digits (VQA).
"""

import json
import math
import random
import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from train import common, pretrain_clip

CORRUPTIONS = ("fog", "defocus", "noise", "brightness")


def digits_on_photos(root, kind, counts, seed):
    """A folder in VOC's layout from the embedded digits: class 1 is the digit, 0 the rest.

    kind: "printed", on plain colours and two photos, or "handwritten" (MNIST), on two others.
    """
    world, arrays = pretrain_clip.World(), np.load(common.EMBEDDED / "digits.npz")
    world.photos = world.photos[:2] if kind == "printed" else world.photos[2:]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for part, n in counts.items():
        rng = torch.Generator().manual_seed(seed + len(part))
        digits, labels = (torch.from_numpy(arrays[f"{'train' if part == 'train' else 'test'}/{x}"])
                          for x in ("images", "labels"))  # fmt: skip
        pick = torch.randperm(len(labels), generator=rng)[:n]
        labels, ink = labels[pick].long(), digits[pick].float() / 255
        back, (plain, front) = world.photo(n, rng), pretrain_clip.colours(n, rng, 0.4)
        if kind == "printed":
            ink = pretrain_clip.restroke(world.glyph(labels, rng), rng)
            keep = torch.rand(n, 1, 1, 1, generator=rng) < 0.5
            back = torch.where(keep, back, plain.expand_as(back))
        ink = pretrain_clip.warp(ink, rng, zoom=(0.8, 1.1), shift=3)
        light = back.mean((1, 2, 3), keepdim=True) > 0.5  # paint the brighter or darker colour
        brighter = (front.mean(1, True) > plain.mean(1, True)) == light
        images = pretrain_clip.paint(ink, back, torch.where(brighter, plain, front))
        masks = (ink > 0.5).byte()
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(root / f"JPEGImages/{part}_{i}.jpg", quality=95)
            mask = Image.fromarray(mask.numpy())
            mask.save(root / f"SegmentationClass/{part}_{i}.png")
        names = "\n".join(f"{part}_{i}" for i in range(n))
        (root / f"ImageSets/Segmentation/{part}.txt").write_text(names)
    return root


def corrupt(x, name, rng):
    """[B, 3, S, S] in 0..1 -> the same, at ImageNet-C's third severity; sizes as for 224 pixels."""
    if name == "noise":
        x = x + 0.18 * torch.randn(x.shape, generator=rng)
    elif name == "brightness":
        x = x + 0.3
    elif name == "defocus":
        radius = 6 * x.shape[-1] / 224
        n = math.ceil(radius)
        line = torch.arange(-n, n + 1.0)
        disk = (radius + 0.5 - torch.hypot(line[:, None], line)).clamp(0, 1)  # of a soft edge
        disk = (disk / disk.sum()).expand(3, 1, -1, -1)
        x = F.conv2d(F.pad(x, (n, n, n, n), mode="replicate"), disk, groups=3)
    elif name == "fog":  # added octaves of smooth noise, then the range is restored
        size, fog = x.shape[-2:], 0
        for i in range(1, 6):
            cells = torch.rand(len(x), 1, 2**i + 1, 2**i + 1, generator=rng)
            fog = fog + F.interpolate(cells, size, mode="bicubic", align_corners=True) / 1.7**i
        low, high = fog.amin((1, 2, 3), True), fog.amax((1, 2, 3), True)
        top = x.amax((1, 2, 3), True)
        x = (x + 2.5 * (fog - low) / (high - low)) * top / (top + 2.5)
    return x.clamp(0, 1)


KINDS = {
    "animal": "horse cow goat duck fox wolf bear frog".split(),
    "tool": "hammer saw drill wrench file chisel plane shovel".split(),
    "food": "bread cheese soup rice cake apple plum bean".split(),
}


def commonsense_items(root, n, seed):
    """n training items and 8 test sets of n / 20 each, in Commonsense-170K's files under `root`."""
    rng, things = random.Random(seed), [x for words in KINDS.values() for x in words]
    forms = {"piqa": ("solution", 2), "winogrande": ("option", 2), "hellaswag": ("ending", 4)}
    forms |= dict.fromkeys(
        ("social_i_qa", "ARC-Easy", "ARC-Challenge", "openbookqa"), ("answer", 3)
    )

    def item(name):
        kind = rng.choice(list(KINDS))
        if name == "boolq":
            thing = rng.choice(KINDS[kind] if rng.random() < 0.5 else things)
            answer = str(thing in KINDS[kind]).lower()
            question = f"Is a {thing} a {kind} ? true or false"
        else:
            word, count = forms[name]
            others = rng.sample([x for x in things if x not in KINDS[kind]], count - 1)
            right = rng.randrange(count)
            others.insert(right, rng.choice(KINDS[kind]))
            listed = " ".join(f"{word}{i} : {x}" for i, x in enumerate(others, 1))
            answer, question = f"{word}{right + 1}", f"Which is a {kind} ? {listed}"
        output = f"the correct answer is {answer}"
        return {"instruction": question, "input": "", "output": output, "answer": answer}

    names = ["boolq", *forms]
    sets = {"commonsense_170k.json": [item(names[i % 8]) for i in range(n)]}
    sets |= {f"{name}/test.json": [item(name) for _ in range(max(2, n // 20))] for name in names}
    for name, items in sets.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(items))
    return root


def word_tokenizer(texts):
    """A tokenizer for transformers of the words and marks of these texts; the rest is unknown."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({w for text in texts for w in re.findall(r"\w+|[^\w\s]+", text)})
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]"}
    special["eos_token"] = "[EOS]"
    vocabulary = {w: i for i, w in enumerate([*special.values(), *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tiny_paligemma(texts):
    """PaliGemmaProcessor and a random PaliGemma of a few 100,000 parameters for 32 x 32 images."""
    import transformers as t

    tokenizer = word_tokenizer([*texts, "answer en"])
    pixels = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    pixels.image_seq_length = 16
    processor = t.PaliGemmaProcessor(image_processor=pixels, tokenizer=tokenizer)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "initializer_range": 0.2}  # else it cannot be sure of a word
    vision = t.SiglipVisionConfig(**size, image_size=32, patch_size=8, projection_dim=64)
    given = {"vocab_size": len(tokenizer), "num_key_value_heads": 4, "head_dim": 16}
    given |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = t.GemmaConfig(**size, **given, pad_token_id=tokenizer.pad_token_id)
    image = {"image_token_index": processor.image_token_id, "projection_dim": 64}
    config = t.PaliGemmaConfig(vision_config=vision, text_config=text, **image)
    return processor, t.PaliGemmaForConditionalGeneration(config)


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
COLOURS |= {"yellow": (230, 210, 40), "white": (240, 240, 240)}


QUESTIONS = {  # each, and the same rephrased
    "colour": ("what color is the digit ?", "which color has the number ?"),
    "digit": ("what digit is this ?", "which number is in the picture ?"),
    "red": ("is the digit red ?", "does the number look red ?"),
}


def ask(rng, images, labels, path, rephrased=False):
    """Save a coloured digit at `path`.  -> a question and ten answers, of which nine are right."""
    i, colour = rng.randrange(len(labels)), rng.choice(list(COLOURS))
    pixels = (np.array(COLOURS[colour]) * (images[i] / 255)[..., None]).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    red = "yes" if colour == "red" else "no"
    true = {"colour": colour, "digit": str(labels[i]), "red": red}
    kind = rng.choice(list(QUESTIONS))
    people = [true[kind]] * 9 + [rng.choice(("yes", "no", "maybe"))]
    return QUESTIONS[kind][rephrased], rng.sample(people, 10)


def as_dicts(people):
    """Answers as VQAv2 and VizWiz write them."""
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i}
            for i, a in enumerate(people, 1)]  # fmt: skip


def two_files(folder, year, count, asked, names):
    """Images of train2014 or val2014, and VQAv2's two files, `names`: questions and annotations.

    asked(path) -> a question on the image that it saves there, and the answers.
    """
    first = 1 if year == "train2014" else 500_001  # no id is in two years, as in COCO
    questions, annotations = [], []
    for i in range(first, first + count):
        text, people = asked(folder / year / f"COCO_{year}_{i:012d}.jpg")
        questions.append({"image_id": i, "question": text, "question_id": 10 * i})
        annotations.append({"image_id": i, "question_id": 10 * i, "answers": as_dicts(people)})
    (folder / names[0]).write_text(json.dumps({"questions": questions}))
    (folder / names[1]).write_text(json.dumps({"annotations": annotations}))


def vqa_items(root, n, seed):
    """Coloured digits: n questions in VQAv2's train files, n / 10 in val and in three OOD sets, one
    in the files of VQA-Rephrasings, one of TextVQA, one of VizWiz.  -> (VQAv2's folder, OOD's)
    """
    rng, arrays = random.Random(seed), np.load(common.EMBEDDED / "digits.npz")
    train, test, fonts, sketch = (
        partial(ask, rng, arrays[f"{name}/images"], arrays[f"{name}/labels"])
        for name in ("train", "test", "fonts", "sketch")
    )
    folder, ood, few = root / "VQAv2", root / "OOD", max(2, n // 10)
    for year, count, asked in (("train2014", n, train), ("val2014", few, test)):
        questions = f"v2_OpenEnded_mscoco_{year}_questions.json"
        two_files(folder, year, count, asked, (questions, f"v2_mscoco_{year}_annotations.json"))
    form = "v2_OpenEnded_mscoco_valrep2014_humans_og_{}.json"
    names = form.format("questions"), form.format("annotations")
    two_files(ood / "VQA-Rephrasings", "val2014", few, partial(test, rephrased=True), names)
    text_vqa, viz_wiz = [], []
    for i in range(few):
        name = f"{i:016x}"
        text, people = fonts(ood / f"TextVQA/train_images/{name}.jpg")
        text_vqa.append({"image_id": name, "question": text, "answers": people})
        name = f"VizWiz_val_{i:08d}.jpg"
        text, people = sketch(ood / f"VizWiz/val/{name}")
        viz_wiz.append({"image": name, "question": text, "answers": as_dicts(people)})
    (ood / "TextVQA/TextVQA_0.5.1_val.json").write_text(json.dumps({"data": text_vqa}))
    (ood / "VizWiz/val.json").write_text(json.dumps(viz_wiz))
    return folder, ood
