"""Reads the tensors of any checkpoint that people have, and runs nothing of what else is in it.

`common.load_clip` calls `read_weights`, `common.load_finetuned` calls `read_classifier`, both then
`load_matching`; the rest serves these. What a file is, its first bytes say, and never its suffix.
"""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from data import pickles
from data.trees import InputError, did_you_mean, listed, reading

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz")
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # Trainer's others
# First parts of the names that an open_clip or OpenAI model has; anything else is somebody's own.
CLIP_PARTS = frozenset(
    """visual text transformer token_embedding positional_embedding ln_final text_projection
    text_decoder logit_scale logit_bias attn_mask input_resolution context_length vocab_size
    cls_emb""".split()
)
# From the names of Hugging Face's CLIPModel to open_clip's, replaced one after the other.
HUGGING_FACE = (
    ("vision_model.", "visual."),
    ("text_model.", ""),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.patch_embedding.", "conv1."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding.", "token_embedding."),
    ("encoder.layers.", "transformer.resblocks."),
    ("self_attn.", "attn."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("pre_layrnorm.", "ln_pre."),  # spelt so there
    ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)


def read_weights(path, trust=False):
    """CLIP's tensors, {open_clip's name: fp32}, and {"quick_gelu": bool} where the file shows it.

    Reads .safetensors, .npz, torch.save's files of any age, OpenAI's TorchScript, and modules
    written whole by pickle.dump or torch.save; names of open_clip, OpenAI or Hugging Face, behind
    any prefix. `trust` lets a TorchScript program run. Raises InputError.
    """
    state, _, metadata = read_parts(path, trust)
    return state, metadata


def read_classifier(path, trust, own):
    """The same of a fine-tuned model, with its trained head as head.weight [C, D], head.bias [C].

    own: state dict of the Classifier that takes it, visual.* and head.*. The head is found by its
    shape, whatever its name. Without one it is left to the file's text tower; a file without a text
    tower gets own's, the zero-shot head. Prints what is used and what is not. Raises InputError
    where tensors are left over that may belong to a head.
    """
    state, rest, metadata = read_parts(path, trust)
    tower = {name for name in own if name.startswith("visual.")}
    if tower <= set(state):  # what else stands in it: a head called visual.head, for example
        rest |= {n: v for n, v in state.items() if n.startswith("visual.") and n not in tower}
    has_text = any(not name.startswith(("visual.", "logit_")) for name in state)
    if found := find_head(path, rest, own["head.weight"].shape):
        state["head.weight"] = rest.pop(found)
        bias = found.removesuffix("weight") + "bias"
        if bias in rest:
            state["head.bias"] = rest.pop(bias)
        head = f"{found}, which sees L2-normalised features"
    elif has_text:
        head = "made by its text tower"
    else:
        state |= {name: own[name] for name in ("head.weight", "head.bias")}
        head = "the zero-shot one, since the file has no head and no text tower"
    unused = f"; not used: {shown(rest)}" if rest else ""
    print(f"{path}: used is its image tower; the head is {head}{unused}")
    return state, metadata


def find_head(path, rest, shape):
    """Name of the trained head [C, D] among the tensors that are not CLIP's; None if none of them
    can belong to a head. Raises InputError where this is not clear.
    """
    weights = {name: value for name, value in rest.items() if not name.endswith("bias")}
    maybe = {n: v for n, v in weights.items() if v.dim() == 2 or shape[1] in v.shape}
    if not maybe:
        return None
    if [value.shape for value in maybe.values()] == [shape]:
        return next(iter(maybe))
    raise InputError(
        f"{path}: no single head of {shape[0]} classes x {shape[1]} features among what is not "
        f"CLIP's: {shown(maybe)}. Only one linear head on the image features can be read; save the "
        "model without the rest, or without a head to have it made by the text tower."
    )


def read_parts(path, trust):
    """CLIP's tensors, the others under their full names (both fp32), and what the file says."""
    path = weights_file(Path(path))
    with reading(path, "it is no readable checkpoint"):
        raw, metadata = read_file(path, trust)
        if isinstance(raw, dict) and "quick_gelu" in raw:  # our own files say it
            metadata["quick_gelu"] = raw["quick_gelu"]
        state = tensors_in(inner(raw, path))
    if any("lora_" in name for name in state):
        cure = "merge them (peft: model.merge_and_unload()) and save the whole model"
        raise InputError(f"{path} holds LoRA adapters: {cure}")
    if any(re.search(r"(^|\.)vision_model\.", name) for name in state):
        state, metadata = from_hugging_face(state), metadata | beside(path)
    towers = {re.match(r"(.*?\.)?(?=visual\.)", name)[0] for name in filter(tower_in, state)}
    if len(towers) != 1:
        raise InputError(
            f"{path} has {len(towers)} image towers among its {len(state)} tensors, and not one, "
            "named visual.* (open_clip, OpenAI) or vision_model.* (transformers): "
            f"{listed(sorted(towers or state))}"
        )
    (prefix,), clip, rest = towers, {}, {}
    for name, value in state.items():
        inside = name.removeprefix(prefix)
        is_clip = name.startswith(prefix) and inside.split(".")[0] in CLIP_PARTS
        if value.is_floating_point():
            (clip if is_clip else rest)[inside if is_clip else name] = value.float()
        elif is_clip and inside == "input_resolution":
            metadata.setdefault("quick_gelu", True)  # only OpenAI's own files have it
    return clip, rest, metadata


def shown(tensors):
    return listed([f"{name} {list(value.shape)}" for name, value in tensors.items()])


def load_matching(model, state, path):
    """load_state_dict that answers in one sentence when names or shapes differ."""
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        from open_clip.model import convert_to_custom_text_state_dict

        state = convert_to_custom_text_state_dict(state)
    loaded = {}
    for name, value in model.state_dict().items():
        found = state.get(name)
        if found is None and not value.is_floating_point():
            found = value  # BatchNorm's counters
        if found is not None and found.numel() == value.numel() == 1:
            found = found.reshape(value.shape)  # logit_scale is [] or [1]
        if found is None or found.shape != value.shape:
            got = "nothing" if found is None else tuple(found.shape)
            want = f"{name} should be {tuple(value.shape)}, found {got}"
            raise InputError(f"{path} does not fit this model: {want}; check --model")
        if not found.isfinite().all():
            raise InputError(f"{path}: {name} holds inf or nan; the file is of no use")
        loaded[name] = found
    model.load_state_dict(loaded)


# --- files ---


def weights_file(path):
    """The path, or the one file of weights in the folder that it names."""
    if path.is_dir():
        names = sorted(os.listdir(path))
        names = [n for n in names if n.endswith(SUFFIXES) and not n.startswith(NO_WEIGHTS)]
        if len(names) != 1:
            cure = "name one file; save pieces (-of-) as one"
            raise InputError(f"no weights at {path}: the folder holds {listed(names)}; {cure}")
        return path / names[0]
    if not path.is_file():
        near = did_you_mean(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
        raise InputError(f"no weights at {path}{near}")
    return path


def read_file(path, trust):
    """What the file holds, and {"quick_gelu": bool} if it shows that."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return read_torchscript(path, trust), {}
        if all(name.endswith(".npy") for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}, {}
    if start.startswith((b"PK", b"\x80")):
        raw, names = pickles.read(path)
        gelus = [name for name in names if name.endswith("GELU")]
        return raw, {"quick_gelu": any("Quick" in name for name in gelus)} if gelus else {}
    if start[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path), {}
    cure = "take the file itself and no web page, archive or pointer of Git LFS (`git lfs pull`)"
    raise InputError(f"{path} is no readable checkpoint: it begins with {start[:24]!r}; {cure}")


def read_torchscript(path, trust):
    """State dict of a TorchScript file: a program, which runs while it is read. It must be one of
    OpenAI's, whose addresses hold their hash, or trusted. Raises InputError otherwise.
    """
    import open_clip

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    urls = [open_clip.get_pretrained_url(*pair) for pair in open_clip.list_pretrained()]
    if not trust and not any(f"/{digest}/" in url for url in urls):
        cure = "if you trust its author like a program's, pass --trust-checkpoint"
        raise InputError(f"{path} is TorchScript, and none of OpenAI's files; refused; {cure}")
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


# --- names ---


def inner(raw, path):
    """What holds the image tower in a training checkpoint, {"state_dict": ..., "optimizer": ...}.
    Of several models it is "state_dict" or "model", and it says so.
    """
    while isinstance(raw, dict) and not hasattr(raw, "_modules"):
        parts = [key for key in raw if isinstance(raw[key], dict)]
        parts = [key for key in parts if any(map(tower_in, tensors_in(raw[key])))]
        known = [key for key in ("state_dict", "model") if key in parts]
        if not parts or (len(parts) > 1 and not known):
            break  # the tensors themselves; or several models, which the caller refuses
        key = (known or parts)[0]
        if len(parts) > 1:
            print(f"{path}: of the models {listed(parts)} {key!r} is used")
        raw = raw[key]
    return raw


def tower_in(name):
    """Whether a tensor of this name belongs to an image tower."""
    return re.search(r"(^|\.)(visual|vision_model)\.", name)


def tensors_in(x, prefix=""):
    """{dotted name: tensor} of a state dict, or of a stood-in module's parameters and buffers."""
    if isinstance(x, torch.Tensor):
        return {prefix[:-1]: x.detach()}
    if hasattr(x, "_modules"):  # an Opaque
        groups = [vars(x).get(name) or {} for name in ("_parameters", "_buffers", "_modules")]
        x = {key: value for group in groups for key, value in group.items()}
    found = {}
    for key, value in x.items() if isinstance(x, dict) else ():
        found |= tensors_in(value, f"{prefix}{key}.")
    return found


def from_hugging_face(state):
    """Tensors of a transformers CLIPModel, or of its image tower, under open_clip's names."""
    renamed = {}
    for name, value in state.items():
        for old, new in HUGGING_FACE:
            if re.search(rf"(^|\.){re.escape(old)}", name):
                name = name.replace(old, new, 1)
        projection = name.endswith(("visual.proj", "text_projection"))
        renamed[name] = value.T if projection else value
    for name in [n for n in renamed if ".attn.q_proj." in n]:  # open_clip has the three in one
        three = [renamed.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(three)
    return renamed


def beside(path):
    """{"quick_gelu": bool} by the config.json that transformers writes beside its weights."""
    config = path.parent / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    said = said.get("vision_config") or said  # of an image tower alone
    return {"quick_gelu": said["hidden_act"] == "quick_gelu"} if "hidden_act" in said else {}
