"""That an evaluation leaves the model as it was: numbers of one that does not are worth nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from pipeline.core.errors import SluiceError


class TouchedError(SluiceError):
    """An evaluation has changed what it measures."""


def whole_hash(modules: Mapping[str, nn.Module]) -> str:
    """Hash of all parameters and buffers, those included that no checkpoint holds."""
    found = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            for key, tensor in tensors:
                found.update(f"{kind} {name}/{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def check_untouched(modules: Mapping[str, nn.Module], before: str) -> None:
    """Refuse what was measured if the model is not as it was.

    Args:
        modules: of the model.
        before: their :func:`whole_hash` before the evaluation.

    Raises:
        TouchedError: weights or statistics have changed, or a module was left in training mode.
    """
    training = [
        f"{name}.{key}".rstrip(".") for name, m in modules.items() for key, part in m.named_modules() if part.training
    ]
    if whole_hash(modules) != before:
        raise TouchedError(
            "it has changed the weights or the statistics of the model, so its numbers are refused; an evaluation that "
            "trains works on a copy of the encoder, and reads it in eval mode"
        )
    if training:
        more = f" and {len(training) - 1} more" if training[1:] else ""
        raise TouchedError(f"it has left {training[0]}{more} in training mode, so its numbers are refused")
