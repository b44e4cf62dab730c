"""Reads the tensors, arrays and dicts of any pickle, and runs nothing of what else is in it.

Checkpoints are pickles (`checkpoints.py`), and so are CIFAR-10's batches (`trees.py`). A pickle is
a program: it names functions and classes and calls them. Here it gets those of `ALLOWED`, and for
every other name a class that keeps what it is given and does nothing.
"""

import codecs
import collections
import functools
import io
import pickle
import types
import warnings

import numpy as np
import torch

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a file of torch before 1.6


class Opaque(dict):
    """Stands in for every foreign class and function: keeps items and attributes."""

    dump_patches = False  # old torch.load asks a module's class for it
    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else (state,):
            vars(self).update(part if isinstance(part, dict) else {})

    def append(self, item):
        pass


def rebuild_tensor(storage, offset, size, stride, *rest):
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def storage_from_bytes(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *rest: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, args, state: rebuild(*args),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,  # bytes, as Python 3 writes them for Python 2
}
for core in "core", "_core":  # depends on NumPy's version
    ALLOWED[f"numpy.{core}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]


def read(path, encoding="ASCII"):
    """(what pickle.dump or torch.save of any age wrote, names of all classes and functions in it);
    `encoding`: of the strings of Python 2.
    """
    seen = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            seen.add(name)
            found = ALLOWED.get((module, name)) or type(name, (Opaque,), {})
            # a pickle may set attributes of what it named: of a copy, then
            return found if isinstance(found, type) else functools.partial(found)

    def load(file, **options):
        return Reader(file, **options).load()

    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that classes' source cannot be compared
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        raw = TORCH_MAGIC if is_zip else load(file, encoding=encoding)
        if isinstance(raw, int) and raw == TORCH_MAGIC:
            file.seek(0)
            reader = types.SimpleNamespace(__name__="restricted", Unpickler=Reader, load=load)
            raw = torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
    return raw, seen
