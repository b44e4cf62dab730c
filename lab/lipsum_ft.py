"""Lipsum-FT: Robust Fine-Tuning of Zero-Shot Models Using Random Text Guidance.
Nam, Heo, Lee; ICLR 2024. A rival in CaRot's Tabs. 2 and 3, and a fifth method in one file.

How similar an image is to a text, s f.g, is called its energy here. Fine-tuning on one distribution
changes the energies of all images with all texts, and with them what CLIP knows of other
distributions. Beside the cross-entropy Lipsum-FT therefore holds the energies of the batch's images
with random texts, meaningless strings of tokens, close to those of zero-shot CLIP.

    python lab/lipsum_ft.py            # digits: carot.py's table and this row; 5 minutes of a core
    python lab/lipsum_ft.py --seeds 3  # the README's table and figure; 20 minutes
    python lab/lipsum_ft.py wise       # lab/carot_ablations.py wise, temperature ... with this row

Every option of carot.py works, and what carot.py has trained under the same --out is read and not
trained again. Differs (T20, docs/differences.md): epochs, batch, warm-up and crops are those of the
other methods, so that the rows of the table differ in the method.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import carot_ablations  # noqa: E402

import carot  # noqa: E402
import common  # noqa: E402

NAME = "Lipsum-FT"
LIPSUM = {"texts": 80, "length": 8}  # random texts of a step and their tokens; its authors' code


def energy_gap(f, f_zs, g, s):
    """1/B sum_i 1/2K sum_k (s f_i.g_k - s f~_i.g_k)^2; f~: zero-shot CLIP's features of the same
    images, g: its features of the K random texts.  2 x [B, D], [K, D], [] -> []
    """
    return (carot.similarity(f, g, s) - carot.similarity(f_zs, g, s)).square().mean() / 2


def random_texts(clip, texts, length):
    """So many strings of random tokens, drawn from torch's generator.  -> [texts, context]"""
    start, end, *rest = clip.tokenizer([""])[0].tolist()
    known = clip.model.token_embedding.weight.any(1)  # the tiny CLIP has seen 39 tokens
    known[[start, end]] = False
    known = known.nonzero()[:, 0].cpu()
    tokens = torch.zeros(texts, 2 + len(rest), dtype=torch.int64)
    tokens[:, 0], tokens[:, 1 + length] = start, end
    tokens[:, 1 : 1 + length] = known[torch.randint(len(known), (texts, length))]
    return tokens


def lipsum_loss(clip, model):
    """images, labels -> loss of Lipsum-FT: the cross-entropy of `model` and its energy gap."""
    zero_shot = clip.model.to(model.head.weight.device)

    def loss_fn(images, labels):
        f, logits = model(images)
        with torch.no_grad():
            f_zs, s = zero_shot.encode_image(images), zero_shot.logit_scale.exp()
            g = zero_shot.encode_text(random_texts(clip, **LIPSUM).to(images.device))
        f, f_zs, logits, labels = (common.gather(x) for x in (f, f_zs, logits, labels))
        with torch.autocast(images.device.type, enabled=False):
            return F.cross_entropy(logits, labels) + energy_gap(f, f_zs, g, s)

    return loss_fn


def train(config, data, clip, zero_shot, seed):
    """Classifier fine-tuned from zero-shot with the loss above, in place of cross-entropy."""
    recipe = dataclasses.replace(config, seed=seed, clip=0.0, weight_decay=0.0)  # its authors' code
    model = copy.deepcopy(zero_shot)
    loss_fn = lipsum_loss(clip, model)
    common.fine_tune(recipe, NAME, model, data.train, clip, loss_fn, key=LIPSUM)
    return model


def train_models(config, data, clip, zero_shot, seed):
    """{name: Classifier} of carot.py's methods and Lipsum-FT."""
    models = carot.train_models(config, data, clip, zero_shot, seed)
    return models | {NAME: train(config, data, clip, zero_shot, seed)}


def print_intervals(rows):
    """What every other method is ahead of Lipsum-FT, with 95 % intervals."""
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        if method != NAME:
            points = common.gain(rows, method, NAME)
            eces = common.gain(rows, method, NAME, carot.ece_share)
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain) for gain in points]
            cells += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain) for gain in eces]
            lines.append([f"{method} less {NAME}", *cells])
    header = ["", "ID accuracy", "shift accuracy", "ID ECE", "shift ECE"]
    print("\n" + common.table(header, lines, f"95 % intervals over {common.sampled(rows)}"))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in carot_ablations.ABLATIONS:
        return carot_ablations.main(argv, train_models)
    config, data, clip, zero_shot = carot.prepare(argv, __doc__)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        models = train_models(config, data, clip, zero_shot, seed)
        rows += carot.evaluate(config, data, clip, models, seed)
    common.write_results(config, zero_shot.head.weight.device, rows)
    carot.print_tables(config, data, rows)
    print_intervals(rows)
    if data.shifts:
        carot.figure(config, rows)
        carot.summary(rows)
    return rows


if __name__ == "__main__":
    common.run(main)
