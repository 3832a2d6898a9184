"""What decides the features of an encoder: weights, structure, and the code that reads images and encodes them."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache, partial
from itertools import chain
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pipeline
from pipeline.config.provenance import versions

_CODE = ("core/image.py", "core/random.py", "data", "nn", "objectives", "suites/features.py")
"""What stands between shards and features, in the folder of the package."""
_LIBRARIES = ("torch", "torchvision", "timm", "numpy")
"""Their versions are part of every mark, so their files need not be."""
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.Size, np.generic)
_OWN = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has; parameters, buffers, parts and hooks are looked at by themselves."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Unknown(Exception):
    """A module holds something of which nothing is known, so that it cannot be told from another."""


def encoder_mark(encoder: nn.Module) -> str:
    """Hash of an encoder: all parameters and buffers with their names, what its parts are, and with which settings.

    Raises:
        Unknown: it holds something that has no description.
    """
    found = hashlib.sha256()
    for name, tensor in chain(encoder.named_parameters(), encoder.named_buffers()):
        _add_tensor(found, name, tensor)
    for name, module in encoder.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _OWN}
        own |= {key: list(vars(module)[key].values()) for key in _HOOKS if vars(module)[key]}
        found.update(f"{name}: {_name(type(module))} {_described(own, [])}\n".encode())
    for file in sorted(_files(encoder)):
        found.update(Path(file).read_bytes())
    return found.hexdigest()[:32]


@cache
def code_mark() -> str:
    """Hash of the code of this package between shards and features, and of the versions of what it stands on."""
    root = Path(pipeline.__file__).parent
    files = chain.from_iterable(
        [root / part] if part.endswith(".py") else (root / part).rglob("*.py") for part in _CODE
    )
    found = hashlib.sha256(repr(sorted(versions().items())).encode())
    for file in sorted(files):
        found.update(f"\n{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:32]


def _add_tensor(found: Any, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _files(encoder: nn.Module) -> set[str]:
    """Of the classes of its parts that are neither of this package nor of a library whose version is known."""
    modules = {type(module).__module__ for module in encoder.modules()}
    foreign = {m for m in modules if m.partition(".")[0] not in (*_LIBRARIES, pipeline.__name__)}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in foreign}
    if None in files:
        raise Unknown(f"the code of {', '.join(sorted(foreign))}")
    return {file for file in files if file is not None}


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _described(value: Any, around: list[Any]) -> str:
    """In words that are the same in every process; ``around``: what it is a part of.

    Raises:
        Unknown: there are none.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, nn.Module):
        return f"a {_name(type(value))}"  # its own parts are described where they stand
    if isinstance(value, Tensor | np.ndarray):
        found, tensor = hashlib.sha256(), torch.as_tensor(value)
        _add_tensor(found, "", tensor)
        return found.hexdigest()
    if any(value is outer for outer in around):
        return "itself"
    parts = _parts(value)
    return f"{_name(type(value))}({', '.join(_described(part, [*around, value]) for part in parts)})"


def _parts(value: Any) -> Iterable[Any]:
    """What something that is neither plain nor a module consists of."""
    for kind, parts in _PARTS:
        if isinstance(value, kind):
            return parts(value)
    if hasattr(value, "__dict__") and not inspect.ismodule(value):
        return [vars(value)]
    raise Unknown(_name(type(value)))


def _of_function(value: FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    return [_name(value), value.__defaults__, value.__kwdefaults__, *cells]


_PARTS: Sequence[tuple[Any, Callable[[Any], Iterable[Any]]]] = (
    (type, lambda value: [_name(value)]),
    (FunctionType, _of_function),
    (MethodType, lambda value: [_name(value.__func__), value.__self__]),
    (BuiltinFunctionType, lambda value: [value.__module__, value.__name__]),
    (partial, lambda value: [value.func, value.args, value.keywords]),
    (Mapping, lambda value: list(value.items())),
    (Set, lambda value: sorted(value, key=repr)),
    (Sequence, list),
    (torch.device, lambda value: []),  # where the weights lie is said elsewhere
)
"""How things of a kind are taken apart."""
