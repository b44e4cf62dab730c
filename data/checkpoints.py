"""Reads the tensors of any checkpoint that people have, without running what else is in the file.

`common.load_clip` and `common.load_finetuned` call `read_weights`; the rest serves it.
"""

import hashlib
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import common


class Opaque:
    """Stands in for a foreign class while a pickle is read: keeps attributes, runs nothing."""

    def __init__(self, *args, **kwargs):
        pass


def read_weights(path, trust=False):
    """{name: tensor} and {key: value} of what else is said, from any checkpoint that people have.

    Reads .safetensors, .npz, state dicts (plain, or under "state_dict" or "model"), OpenAI's
    TorchScript .pt, and modules pickled whole as wise-ft and FLYP do: their tensors are collected
    by torch's restricted unpickler, with `Opaque` for every class that it does not know, so that no
    foreign code is imported or run. What even that refuses is refused here, unless `trust`.
    What stands before "visual." (module., model., image_encoder.model.) is dropped; a head becomes
    head.weight, head.bias. Raises InputError.
    """
    path = Path(path)
    if not path.is_file():
        hint = common.did_you_mean(
            path.name, os.listdir(path.parent) if path.parent.is_dir() else []
        )
        raise common.InputError(
            f"no weights at {path}{hint}; expected .pt, .bin, .safetensors or .npz"
        )
    raw, said = {}, {}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            raw = load_file(path)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                raw = {k: torch.from_numpy(file[k]) for k in file.files}
        else:
            raw, said = read_torch_file(path, trust)
    except common.InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way; the answer is the same
        raise common.InputError(
            f"{path} is no readable checkpoint ({common.first_line(error)})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(raw, dict) and isinstance(raw.get(key), (dict, Opaque, nn.Module)):
            said |= {k: v for k, v in raw.items() if isinstance(v, (str, int, float))}
            raw = raw[key]
    state = tensors_in(raw)
    towers = {k[: k.index("visual.")] for k in state if re.search(r"(^|\.)visual\.", k)}
    if len(towers) != 1:
        found = f"{len(towers)} image towers (visual.*): {', '.join(sorted(towers)[:4])}"
        raise common.InputError(f"{path}: among its {len(state)} tensors are {found}; expected one")
    (prefix,), named = towers, {}
    for k, v in state.items():
        head = re.fullmatch(r"(?:module\.)?(?:classification_)?head\.(weight|bias)", k)
        name = "head." + head[1] if head else k.removeprefix(prefix)
        if head and name in named:
            raise common.InputError(f"{path} holds two classifiers (head.*, classification_head.*)")
        if head or k.startswith(prefix):
            named[name] = v
    if "input_resolution" in named:  # in OpenAI's own files only, whose models use QuickGELU
        said.setdefault("quick_gelu", True)
    return {k: v.float() for k, v in named.items() if v.is_floating_point()}, said


def read_torch_file(path, trust):
    """torch.load without foreign code: what it holds, {"quick_gelu": ...} if the file shows it."""
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    if trust:
        with warnings.catch_warnings():  # of TorchScript, which torch.load hands on by itself
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=False), {}
    if not zipfile.is_zipfile(path):  # torch's form before 1.6
        return torch.load(path, map_location="cpu", weights_only=True), {}
    with zipfile.ZipFile(path) as archive:
        script = any(name.endswith("/constants.pkl") for name in archive.namelist())
    if script:  # a program, whose __setstate__ runs while it is read
        import open_clip

        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        urls = [open_clip.get_pretrained_url(*pair) for pair in open_clip.list_pretrained()]
        if not any(f"/{digest}/" in url for url in urls):  # OpenAI's addresses hold the hash
            cure = "if you trust its author like a program's, pass --trust-checkpoint"
            raise common.InputError(
                f"{path} is TorchScript, and none of OpenAI's files; refused; {cure}"
            )
        with warnings.catch_warnings():  # TorchScript is old, but it is what OpenAI publishes
            warnings.simplefilter("ignore", FutureWarning)
            state = torch.jit.load(path, map_location="cpu").state_dict()
        return dict(state), {}
    common.check_sums(path)
    foreign = get_unsafe_globals_in_checkpoint(path)
    try:
        with safe_globals([(type("Opaque", (Opaque,), {}), name) for name in foreign]):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever it tripped over, it was not plain data
        names = ", ".join(sorted(foreign)[:4]) or common.first_line(error)
        cure = "if you trust its author like a program's, pass --trust-checkpoint"
        raise common.InputError(
            f"{path} must run code to be read ({names}); refused; {cure}"
        ) from error
    quick = any(name.endswith("QuickGELU") for name in foreign)
    return raw, {"quick_gelu": True} if quick else {}


def tensors_in(x, prefix=""):
    """{dotted name: tensor} of a state dict, or of a (stood-in) module's parameters and buffers."""
    if isinstance(x, torch.Tensor):
        return {prefix[:-1]: x.detach()}
    if isinstance(x, nn.Module):
        return dict(x.state_dict())
    if isinstance(x, Opaque):
        parts = [vars(x).get(k) or {} for k in ("_parameters", "_buffers", "_modules")]
        x = {k: v for part in parts for k, v in part.items()}
    if not isinstance(x, dict):
        return {}
    parts = [tensors_in(value, f"{prefix}{key}.") for key, value in x.items()]
    return {k: v for part in parts for k, v in part.items()}
