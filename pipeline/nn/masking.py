"""Masking of patch tokens at timm's own patch-drop hook, so that no forward is written a second time.

In every timm vision transformer that has the hook, it stands between the position embedding and the blocks: exactly
where MAE hides patches. :func:`make_maskable` puts a module there that keeps the tokens it is told to.

Shape letters: B samples, N patches, P prefix tokens (class, registers), V visible patches, D width.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.encoder import Backbone


class KeepTokens(nn.Module):
    """Stands in for timm's patch dropout: keeps the prefix and the patches named by ``keep``, int64[B,V].

    With ``keep`` None all tokens stay, and the model is the plain timm model.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B,P+N,D] to [B,P+V,D]."""
        if self.keep is None:
            return x
        patches = x[:, self.prefix :].gather(1, self.keep[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat([x[:, : self.prefix], patches], dim=1)


class KeepTokensWithIndices(KeepTokens):
    """The same for models with rotary positions, which want to know what was kept."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B,P+N,D] to [B,P+V,D] and the kept patches, int64[B,V]."""
        keep = self.keep
        if keep is None:
            keep = torch.arange(x.shape[1] - self.prefix, device=x.device).expand(len(x), -1)
        return super().forward(x), keep


class Geometry(NamedTuple):
    """How an encoder cuts an image."""

    patch: tuple[int, int]
    """Height and width of a patch in pixels."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


def make_maskable(encoder: Backbone, image_size: tuple[int, int]) -> Geometry:
    """Put the hook into a timm encoder, in place, and tell how it cuts images of ``image_size`` (height, width).

    Raises:
        ConfigError: the encoder cannot be masked, with the reason.
    """
    kind, name = type(encoder), type(encoder).__name__
    if not issubclass(kind, VisionTransformer | Eva | NaFlexVit):
        raise ConfigError(
            f"encoder: {name} has no place at which patches can be hidden; take a plain, EVA or NaFlex vision "
            "transformer, e.g. 'vit_base_patch16_224'"
        )
    if issubclass(kind, NaFlexVit):
        embed: Any = encoder.embeds
    elif type(encoder.patch_embed) is PatchEmbed:
        embed = encoder.patch_embed
    else:
        raise ConfigError(f"encoder: {name} has a stem that mixes neighbouring patches, so hidden ones would leak")
    patch = embed.patch_size
    hook = KeepTokens if issubclass(kind, VisionTransformer) else KeepTokensWithIndices
    encoder.patch_drop = hook(encoder.num_prefix_tokens)
    return Geometry((patch[0], patch[1]), (image_size[0] // patch[0], image_size[1] // patch[1]))


def encode_visible(encoder: Backbone, x: Tensor, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    """Tokens of the visible patches alone.

    Args:
        encoder: a timm model that :func:`make_maskable` prepared, built without pooling.
        x: float[B,C,H,W].
        keep: int64[B,V], numbers of the visible patches.
        valid: bool[B,V], of a plain vision transformer without prefix tokens: the others fill up samples that see fewer
            patches, and no token attends to them; left out: all are.

    Returns:
        float[B,P+V,D].
    """
    hook, training = encoder.patch_drop, encoder.training
    hook.keep = keep
    # NaFlexVit only drops patches in training mode. This sets the flag of the outermost module alone: dropout and
    # drop path, which have their own, stay as they are.
    encoder.training = True
    try:
        return encoder(x) if valid is None else encoder(x, attn_mask=valid[:, None, None])
    finally:
        hook.keep, encoder.training = None, training


def draw_masks(
    kind: Literal["random", "block", "grid"], random: SampleRandom, grid: tuple[int, int], visible: int
) -> tuple[Tensor, Tensor]:
    """Which patches are seen and which are hidden; every sample has as many of each.

    Args:
        kind: "random", "block" or "grid", see the functions below.
        random: numbers of the samples.
        grid: rows and columns of patches, N together.
        visible: V.

    Returns:
        int64[B,V] and int64[B,N-V]: together a permutation of all patches for each sample.
    """
    patches = grid[0] * grid[1]
    if kind == "random":
        order = random.permutation(patches)
    elif kind == "block":
        order = block_order(random, grid, patches - visible)
    else:
        order = grid_order(random, grid, grid_cell(visible / patches))
    return order[:, :visible], order[:, visible:]


BLOCKS = 32
"""Blocks drawn per sample; the few samples that they do not fill are filled at random."""
SMALLEST_BLOCK = 16 / 196
"""Least area of a block as a part of the grid: BEiT's 16 of 14 x 14 patches."""
ASPECT = math.log(1 / 0.3)
"""Largest logarithm of a block's height over width."""


def block_order(random: SampleRandom, grid: tuple[int, int], hidden: int | Tensor) -> Tensor:
    """Patches in an order such that the last ``hidden``, int64[B] or all as many, are those of a few random rectangles.

    Bao et al., "BEiT" (ICLR 2022), algorithm 1: rectangles of at least 16/196 of the image and at most what is still
    to be hidden, with a log-uniform aspect, until enough is hidden. Here the last one is cut row by row, so that every
    sample hides the same number.

    Returns:
        int64[B,N].
    """
    rows, columns = grid
    area_u, aspect_u, top_u, left_u = random.uniform(4, BLOCKS).unbind(1)
    device, n = area_u.device, rows * columns
    row = torch.arange(rows, device=device)[None, :, None]
    column = torch.arange(columns, device=device)[None, None, :]
    raster = torch.arange(n, device=device)
    hidden = torch.as_tensor(hidden, device=device)
    least = hidden.float().clamp_max(max(1.0, SMALLEST_BLOCK * n))
    # when each patch was hidden: by which block, then row by row; what no block reaches comes last, in random order
    time = BLOCKS * n + random.permutation(n)
    for i in range(BLOCKS):
        left_over = torch.maximum(hidden - (time < BLOCKS * n).sum(dim=1), least)
        area = least + area_u[:, i] * (left_over - least)
        ratio = torch.exp((2 * aspect_u[:, i] - 1) * ASPECT)
        height = (area * ratio).sqrt().round().clamp(1, rows)
        width = (area / ratio).sqrt().round().clamp(1, columns)
        top = (top_u[:, i] * (rows - height + 1)).floor()[:, None, None]
        left = (left_u[:, i] * (columns - width + 1)).floor()[:, None, None]
        inside_rows = (row >= top) & (row < top + height[:, None, None])
        inside = (inside_rows & (column >= left) & (column < left + width[:, None, None])).flatten(1)
        time = torch.where(inside & (time >= BLOCKS * n), i * n + raster, time)
    return time.argsort(dim=1, descending=True)


def grid_cell(visible_part: float) -> int:
    """Side k of the cells of a grid mask, of which one patch in k x k is seen; 0 if there is no such k."""
    k = round(visible_part**-0.5)
    return k if k > 1 and abs(k * k * visible_part - 1) < 1e-3 else 0


def grid_order(random: SampleRandom, grid: tuple[int, int], k: int) -> Tensor:
    """Patches in an order such that the first N/k^2 are one of each cell of k x k, at the same place in all cells.

    He et al. 2021, figure 6 ("grid"); the place is drawn per sample. Rows and columns must be multiples of k.

    Returns:
        int64[B,N].
    """
    place = random.integers(0, k * k, 1)
    index = torch.arange(grid[0] * grid[1], device=place.device)
    row, column = index // grid[1], index % grid[1]
    seen = (row % k == place // k) & (column % k == place % k)
    return (~seen).to(torch.int8).argsort(dim=1, stable=True)
