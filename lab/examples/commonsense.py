"""AdamSPD drops in: commonsense reasoning, a causal LM with LoRA (the paper's Sec. 4).

    python lab/examples/commonsense.py                               # tiny random LLaMA: 1 minute
    python lab/examples/commonsense.py --model LLAMA --data FOLDER   # not measured by us

FOLDER: commonsense_170k.json, and test.json of the eight sets in boolq/, piqa/, social_i_qa/,
hellaswag/, winogrande/, ARC-Easy/, ARC-Challenge/, openbookqa/: lists of {"instruction", "input",
"output", "answer"}, as published. LLAMA: a folder, or a name for transformers to download.

LoRA starts as no change at all, so the anchor is zero: nothing is stored, and "deviation" is the
norm of the factors. The first word that could be an answer counts, as the sets are used elsewhere;
the loss is of the output alone. The paper's ranks, rates and prompt are not known to us. Random
weights hold nothing to forget: the default run shows that it runs, and nothing about SPD.
"""

import json
import re
from pathlib import Path

import torch
import train
from generate import commonsense_items, word_tokenizer
from train import common

CHOICES = {
    "boolq": "true|false",
    "piqa": "solution[12]",
    "social_i_qa": "answer[1-5]",
    "hellaswag": "ending[1-4]",
    "winogrande": "option[12]",
    "ARC-Easy": "answer[1-5]",
    "ARC-Challenge": "answer[1-5]",
    "openbookqa": "answer[1-5]",
}
LAYERS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PRESETS = {"generated": {"lr": 5e-3, "batch": 32, "epochs": 8, "length": 64, "warmup": 20}}
Config = train.settings(
    data=("generated", "generated, or a folder with the published files"),
    model=("random", "random: a tiny LLaMA; else what transformers takes"),
    rank=(16, "of LoRA, alpha twice that; ours"),
    length=(512, "tokens of a prompt; the front of longer ones is cut off; ours"),
    lr=(3e-4, "ours"),
    out=("runs/commonsense", "folder for the generated items"),
)


def answer_of(text, dataset):
    """The first word of `text` that can be an answer of this set, or ""."""
    found = re.search(rf"\b({CHOICES[dataset]})\b", text.lower())
    return found[1] if found else ""


def read_items(path):
    """A published file's list of items. Raises InputError."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        if items and all({"instruction", "output", "answer"} <= set(item) for item in items):
            return items
        problem = "not every item has instruction, output and answer"
    except (OSError, ValueError, TypeError) as error:
        problem = common.first_line(error)
    raise common.InputError(f"{path} cannot be read as Commonsense-170K's JSON: {problem}")


def prompt_of(item):
    question = "\n".join(filter(None, (item["instruction"], item.get("input"))))
    return f"{question}\n\n### Response:\n"


def pad(rows, value, left=False):
    """Lists of token ids -> [B, longest]."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for f, r in zip(fill, rows, strict=True)])


def load_model(config, items):
    """Tokenizer and causal LM. Raises InputError."""
    import transformers as t

    if config.model == "random":
        tokenizer = word_tokenizer([prompt_of(i) + i["output"] for i in items])
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        size |= {"num_attention_heads": 4, "initializer_range": 0.2}  # smaller is unsure of words
        model = t.LlamaForCausalLM(t.LlamaConfig(**size, vocab_size=len(tokenizer)))
    else:
        tokenizer, model = train.pretrained(config, t.AutoTokenizer, t.AutoModelForCausalLM)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, model


def encode(tokenizer, items, length):
    """Each item's prompt as token ids, the last `length` of them."""
    return [tokenizer(prompt_of(item)).input_ids[-length:] for item in items]


def training_batch(tokenizer, items, length):
    """Prompts and outputs: ids, mask and labels, [B, longest]; where a label is -100 is no loss."""
    prompts = encode(tokenizer, items, length)
    outputs = [tokenizer(item["output"], add_special_tokens=False) for item in items]
    outputs = [out.input_ids + [tokenizer.eos_token_id] for out in outputs]
    both = [p + o for p, o in zip(prompts, outputs, strict=True)]
    labels = [[-100] * len(p) + o for p, o in zip(prompts, outputs, strict=True)]
    known = pad([[1] * len(ids) for ids in both], 0)
    return pad(both, tokenizer.pad_token_id), known, pad(labels, -100)


def respond(model, tokenizer, items, length):
    """The text with which the model goes on after each prompt, 32 tokens at most."""
    rows, end = encode(tokenizer, items, length), tokenizer.pad_token_id
    ids = pad(rows, end, left=True).to(model.device)
    known = pad([[1] * len(row) for row in rows], 0, left=True).to(model.device)
    options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": end}
    out = model.generate(input_ids=ids, attention_mask=known, **options)
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def evaluate(model, tokenizer, tests, config):
    """{set: percent of right answers}, and the average of the sets."""
    columns = {}
    for name, test in tests.items():
        right = 0
        for i in range(0, len(test), config.batch):
            part = test[i : i + config.batch]
            texts = respond(model, tokenizer, part, config.length)
            pairs = zip(texts, part, strict=True)
            right += sum(answer_of(text, name) == item["answer"] for text, item in pairs)
        columns[name] = 100 * right / len(test)
    return columns | {"average": sum(columns.values()) / len(columns)}


def main(argv=None):
    config = common.parse(Config, argv, __doc__)
    train.need("transformers", "peft")
    folder = Path(config.data)
    if config.data == "generated":
        common.apply_preset(config, "generated", PRESETS)
        folder = commonsense_items(Path(config.out), config.items, config.seed)
    items = read_items(folder / "commonsense_170k.json")
    tests = {name: read_items(folder / name / "test.json") for name in CHOICES}
    common.set_seed(config.seed)
    tokenizer, model = load_model(config, items)
    model = train.adapted(config, model, 2 * config.rank, LAYERS)

    def batch_of(rows):
        return training_batch(tokenizer, [items[i] for i, _ in rows], config.length)

    def loss_fn(batch):
        return model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss

    def score(model):
        return evaluate(model, tokenizer, tests, config)

    rows = train.compare(config, model, len(items), batch_of, loss_fn, score, anchor="zero")
    train.print_rows(rows, common.steps_of(config, len(items)), about=("average",))
    return rows


if __name__ == "__main__":
    common.run(main)
