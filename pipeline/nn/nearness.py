"""Regularised transfer: penalties that keep a fine-tuned encoder near the weights or the features that it starts from.

L2-SP: Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (ICML 2018, arXiv
1802.01483): alpha / 2 |w - w0|^2 for what was pretrained, beta / 2 |w|^2 for the new head. Feature maps: the
behavioural regulariser of Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention" (ICLR 2019), with
all channels alike in place of their attention, and the mean over samples.
Shape letters: B samples, C channels, H, W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.strict import Strict, Text
from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import ImageEncoder
from pipeline.nn.reading import block_names, outputs_of

Strength = Annotated[float, Field(ge=0)]


class L2SP(Strict):
    """Weights stay near those of the file ``weights``. It takes the place of decay: set optimizer.weight_decay = 0."""

    kind: Literal["l2_sp"]
    alpha: Strength = 0.1
    """Of the encoder's distance from its start: half of its square over all parameters."""
    beta: Strength = 0.01
    """Of the head's weights and biases: half of their squares' sum."""


class FeatureMaps(Strict):
    """What blocks give for an image stays near what they gave at the start."""

    kind: Literal["feature_maps"]
    alpha: Strength = 0.01
    """Of half the squared distance of feature maps: mean over places, sum over channels and blocks."""
    beta: Strength = 0.01
    """As of "l2_sp"."""
    blocks: tuple[Text, ...] = ()
    """Names of the blocks; left out: all."""


Regularise = Annotated[L2SP | FeatureMaps, Field(discriminator="kind")]


def starting_point(config: L2SP | FeatureMaps, encoder: ImageEncoder) -> ImageEncoder:
    """A copy in eval mode. Weights that are looked at while it does not run are buffers: ZeRO 3 cuts up parameters."""
    start = copy.deepcopy(encoder).requires_grad_(False)
    if isinstance(config, L2SP):
        for module in start.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
    return start.eval()


class Nearness:
    """Measures how far an encoder and a head have gone, while they run.

    Parameters are looked at in the forward of the module that owns them: under ZeRO 3 they are whole there alone.

    Args:
        config: which penalty.
        encoder: that is trained.
        start: what :func:`starting_point` made of it.
        head: on the encoder.

    Raises:
        ConfigError: there is no such block.
    """

    def __init__(self, config: L2SP | FeatureMaps, encoder: ImageEncoder, start: ImageEncoder, head: nn.Module) -> None:
        self._config, self._encoder, self._start = config, encoder, start
        known = block_names(encoder.backbone)
        self._blocks = tuple(config.blocks) or tuple(known) if isinstance(config, FeatureMaps) else ()
        if strange := sorted(set(self._blocks) - {name for name, _ in encoder.backbone.named_modules()}):
            raise ConfigError(f"regularise.blocks: the encoder has no block {strange[0]!r}; there are {known}")
        self._found: dict[str, Tensor] | None = None
        self._watched: set[str] = set()
        if isinstance(config, L2SP):
            self._watch("encoder", encoder, start, config.alpha)
        self._watch("head", head, None, config.beta)

    def _watch(self, name: str, part: nn.Module, start: nn.Module | None, strength: float) -> None:
        """Let each module of a part that owns trained parameters say how far these are from ``start``, or from zero."""
        for path, module in part.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
            if own:
                origin = None if start is None else start.get_submodule(path)
                self._watched.add(f"{name}.{path}")
                module.register_forward_hook(partial(self._measure, f"{name}.{path}", own, origin, strength))

    def _measure(
        self, path: str, own: list[str], origin: nn.Module | None, strength: float, module: nn.Module, *_: Any
    ) -> None:
        if self._found is None:
            return
        gone = [getattr(module, n).float() - (0 if origin is None else getattr(origin, n).float()) for n in own]
        self._found[path] = strength / 2 * torch.stack([difference.square().sum() for difference in gone]).sum()

    @contextmanager
    def measured(self, x: Tensor) -> Iterator[list[Tensor]]:
        """Measure while encoder and head run on normalised images, float32[B,C,H,W].

        Afterwards the list holds the penalty of each sample, float32[B]; that of weights is the same for all.

        Raises:
            ConfigError: some of the parameters are used outside the modules that own them.
        """
        penalties: list[Tensor] = []
        self._found = {}
        with outputs_of(self._encoder.backbone, self._blocks) as maps:
            yield penalties
        found, self._found = self._found, None
        if lacking := sorted(self._watched - found.keys()):
            raise ConfigError(f"regularise: the encoder never calls {lacking[0]}, so its weights cannot be watched")
        penalty = torch.stack(list(found.values())).sum().expand(len(x))
        if self._blocks:
            with torch.no_grad(), outputs_of(self._start.backbone, self._blocks) as before:
                self._start.features(x)
            for name in self._blocks:
                distance = (maps[name].float() - before[name].float()).square().mean(dim=(2, 3)).sum(dim=1)
                penalty = penalty + self._config.alpha / 2 * distance
        penalties.append(penalty)
