"""Masking of patch tokens at timm's own patch-drop hook, so that no forward is written a second time.

In every timm vision transformer that has the hook, it stands between the position embedding and the blocks: exactly
where MAE hides patches. :func:`make_maskable` puts a module there that keeps the tokens it is told to.

Shape letters: B samples, N patches, P prefix tokens (class, registers), V visible patches, D width.
"""

from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom


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


def make_maskable(encoder: nn.Module, image_size: tuple[int, int]) -> Geometry:
    """Put the hook into a timm encoder, in place, and tell how it cuts images of ``image_size`` (height, width).

    Raises:
        ConfigError: the encoder cannot be masked, with the reason.
    """
    name = type(encoder).__name__
    if not isinstance(encoder, VisionTransformer | Eva | NaFlexVit):
        raise ConfigError(
            f"encoder: {name} has no place at which patches can be hidden; take a plain, EVA or NaFlex vision "
            "transformer, e.g. 'vit_base_patch16_224'"
        )
    if isinstance(encoder, NaFlexVit):
        patch = encoder.embeds.patch_size
    elif type(encoder.patch_embed) is PatchEmbed:
        patch = encoder.patch_embed.patch_size
    else:
        raise ConfigError(f"encoder: {name} has a stem that mixes neighbouring patches, so hidden ones would leak")
    height, width = image_size
    if height % patch[0] or width % patch[1]:
        raise ConfigError(f"data.image.size: {height}x{width} is not a multiple of the patch {patch[0]}x{patch[1]}")
    hook = KeepTokens if isinstance(encoder, VisionTransformer) else KeepTokensWithIndices
    encoder.patch_drop = hook(encoder.num_prefix_tokens)
    return Geometry(tuple(patch), (height // patch[0], width // patch[1]))


def encode_visible(encoder: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    """Tokens of the visible patches alone.

    Args:
        encoder: a timm model that :func:`make_maskable` prepared, built without pooling.
        x: float[B,C,H,W].
        keep: int64[B,V], numbers of the visible patches.

    Returns:
        float[B,P+V,D].
    """
    hook, training = encoder.patch_drop, encoder.training
    hook.keep = keep
    # NaFlexVit only drops patches in training mode. This sets the flag of the outermost module alone: dropout and
    # drop path, which have their own, stay as they are.
    encoder.training = True
    try:
        return encoder(x)
    finally:
        hook.keep, encoder.training = None, training


def random_masks(random: SampleRandom, patches: int, visible: int) -> tuple[Tensor, Tensor]:
    """Independent uniform masks: which patches are seen and which are hidden.

    Args:
        random: numbers of the samples.
        patches: N.
        visible: V.

    Returns:
        int64[B,V] and int64[B,N-V]: together a permutation of all patches for each sample.
    """
    order = random.permutation(patches)
    return order[:, :visible], order[:, visible:]
