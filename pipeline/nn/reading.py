"""What can be read off an image encoder beside its own output: tokens of its last blocks, all in one pass.

Blocks are caught while the encoder runs as it always does, so that nothing of its own output can change.
Shape letters: B images, T tokens, D width, H, W height and width of the grid of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import OWN, Reading
from pipeline.nn.encoder import Backbone, ImageEncoder


def read(encoder: nn.Module, image: Tensor, readings: Sequence[Reading]) -> dict[Reading, Tensor]:
    """Read images in several ways, in one pass.

    As DINOv2's linear probe does (``create_linear_input`` of its code): the class tokens of the last blocks side by
    side, the last block at the end, each after the backbone's last norm; and the mean of the last block's patches.
    Convolutional encoders have no class token; their blocks are stages.

    Args:
        encoder: maps uint8[B,C,H,W] to float[B,D].
        image: of a batch, on the encoder's device.
        readings: what is wanted.

    Returns:
        float[B,D'] each.

    Raises:
        ConfigError: the encoder has no such blocks or tokens.
    """
    with caught(encoder, max((r.blocks for r in readings), default=0)) as blocks:
        own = encoder(image)
    found = {}
    for reading in readings:
        found[reading] = own if reading == OWN else _pooled(trunk(encoder).backbone, blocks, reading)
    return found


def patches(encoder: nn.Module, image: Tensor) -> Tensor:
    """The last block's patches, after the backbone's last norm, in their places: float[B,D,H,W].

    Raises:
        ConfigError: the encoder has no blocks that could be read.
    """
    with caught(encoder, 1) as blocks:
        encoder(image)
    backbone, (last,) = trunk(encoder).backbone, blocks
    if last.ndim == 4:
        return last
    tokens = last[:, backbone.num_prefix_tokens :]
    height, width = (-(-side // size) for side, size in zip(image.shape[-2:], _patch_size(backbone), strict=True))
    if height * width != tokens.shape[1]:
        raise ConfigError(f"the encoder has {tokens.shape[1]} patches, which are no grid of {height}x{width}")
    return tokens.transpose(1, 2).reshape(len(image), -1, height, width)


def trunk(encoder: nn.Module) -> ImageEncoder:
    """The encoder around a timm backbone, inside of whatever ``encoder`` is.

    Raises:
        ConfigError: there is none.
    """
    for module in encoder.modules():
        if isinstance(module, ImageEncoder):
            return module
    raise ConfigError("this encoder has no blocks that can be read; it is no backbone of timm")


class Offered(NamedTuple):
    """What can be read off an encoder."""

    blocks: int
    """0: none can be read, only what the encoder itself gives."""
    class_token: bool


def offered(encoder: nn.Module) -> Offered:
    """What can be read off ``encoder``."""
    if not any(isinstance(module, ImageEncoder) for module in encoder.modules()):
        return Offered(0, False)
    backbone = trunk(encoder).backbone
    return Offered(len(_blocks(backbone)), _has_class_token(backbone))


@contextmanager
def caught(encoder: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """Catch the outputs of the last ``count`` blocks while the encoder runs: [B,T,D] after the last norm, or [B,D,H,W].

    Raises:
        ConfigError: it has fewer.
    """
    found: list[Tensor] = []
    if not count:
        yield found
        return
    backbone = trunk(encoder).backbone
    blocks = _blocks(backbone)
    if count > len(blocks):
        raise ConfigError(f"{count} blocks are to be read, and the encoder has {len(blocks)}")
    raw: list[Tensor] = []

    def catch(_block: nn.Module, _inputs: Any, output: Any) -> None:
        raw.append(output)

    hooks = [block.register_forward_hook(catch) for block in blocks[-count:]]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    found += [cast("Tensor", backbone.norm(x)) if x.ndim == 3 else x for x in raw]


def block_names(backbone: Backbone) -> list[str]:
    """Names of the blocks of a timm model, from the input on, as :func:`outputs_of` takes them."""
    of_blocks = {id(block) for block in _blocks(backbone)}
    return [name for name, module in backbone.named_modules() if id(module) in of_blocks]


@contextmanager
def outputs_of(backbone: Backbone, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Catch what modules of a timm model give while it runs, as maps: [B,D,H,W] by name.

    Tokens before the patches are left out.

    Args:
        backbone: a timm model.
        names: of its blocks, or of any other modules.

    Raises:
        ConfigError: it has no such module, or one gives no map.
    """
    found: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = dict(backbone.named_modules())
    if strange := sorted(set(names) - modules.keys()):
        raise ConfigError(f"{type(backbone).__name__} has no block {strange[0]!r}; there are {block_names(backbone)}")

    def catching(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found[name] = as_map(backbone, output, name)

        return catch

    hooks = [modules[name].register_forward_hook(catching(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def as_map(backbone: Backbone, x: Any, name: str = "the whole") -> Tensor:
    """[B,D,H,W] of tokens [B,T,D], or of a map; ``name`` is of the module that gave them.

    Raises:
        ConfigError: they are no map.
    """
    if isinstance(x, Tensor) and x.ndim == 4:
        return x.permute(0, 3, 1, 2) if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else x
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if isinstance(x, Tensor) and x.ndim == 3 and grid is not None:
        patches = x[:, backbone.num_prefix_tokens :]
        if patches.shape[1] == grid[0] * grid[1]:
            return patches.transpose(1, 2).unflatten(2, grid)
    shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise ConfigError(
        f"what {name!r} of {type(backbone).__name__} gives ({shape}) is no map of places; take one of its blocks: "
        f"{block_names(backbone)}"
    )


def _blocks(backbone: Backbone) -> list[nn.Module]:
    """Transformer blocks, or stages of a convolutional network, from the input on."""
    if hasattr(backbone, "blocks") and hasattr(backbone, "num_prefix_tokens"):
        return list(backbone.blocks)
    named: Any = dict(backbone.named_modules())
    return [named[stage["module"]] for stage in getattr(backbone, "feature_info", []) if stage["module"] in named]


def _has_class_token(backbone: Backbone) -> bool:
    return getattr(backbone, "has_class_token", getattr(backbone, "num_prefix_tokens", 0) > 0)


def _pooled(backbone: Backbone, blocks: Sequence[Tensor], reading: Reading) -> Tensor:
    """What ``reading`` says of the outputs of the last blocks."""
    wanted, last = blocks[len(blocks) - reading.blocks :], blocks[-1]
    parts: list[Tensor] = []
    if "cls" in reading.pool:
        if last.ndim != 3 or not _has_class_token(backbone):
            raise ConfigError(f'the encoder has no class token; read it with pool = "mean", not {reading.pool!r}')
        parts += [x[:, 0] for x in wanted]
    if "mean" in reading.pool:
        parts.append(last.mean(dim=(2, 3)) if last.ndim == 4 else last[:, backbone.num_prefix_tokens :].mean(dim=1))
    return torch.cat(parts, dim=1)


def _patch_size(backbone: Backbone) -> tuple[int, int]:
    size = getattr(backbone, "embeds", None) or backbone.patch_embed
    return cast("Any", size).patch_size
