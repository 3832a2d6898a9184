"""Masked autoencoding: hide most patches, encode the rest, predict the pixels of the hidden ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), https://arxiv.org/abs/2111.06377.
Shape letters: B samples, C channels, H height, W width, N patches, P prefix tokens, V visible patches, D width,
T numbers per patch (height * width * channels of a patch).
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.decoder import Decoder, init_xavier
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone, to_weights
from pipeline.nn.images import Normalize, patchify, tile, unpatchify
from pipeline.nn.masking import encode_visible, make_maskable, random_masks
from pipeline.nn.positions import sincos_2d

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of MAE; the defaults are the paper's ViT-B/16."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Part of the patches that is hidden; what is kept is rounded down."""
    decoder_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    decoder_depth: Annotated[int, Field(ge=1)] = 8
    decoder_heads: Annotated[int, Field(ge=1)] = 16
    norm_pix: bool = True
    """Predict patches normalised each by its own mean and variance, instead of plain pixels."""

    @model_validator(mode="after")
    def _heads(self) -> "Config":
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads = {self.decoder_heads} does not divide decoder_dim = {self.decoder_dim}")
        return self


class MAE(Objective):
    """The autoencoder. Gradient reaches every visible token; cls and mask tokens are decayed, as in the paper."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.normalize = Normalize(config.mean, config.std)
        self.encoder = create_backbone(config, facts.image_size, global_pool="")
        self.geometry = make_maskable(self.encoder, facts.image_size)
        self.visible = int(self.geometry.patches * (1 - config.mask_ratio))
        if not 0 < self.visible < self.geometry.patches:
            raise ConfigError(
                f"objective.mask_ratio: {config.mask_ratio} of {self.geometry.patches} patches leaves "
                f"{self.visible} visible; at least one must be visible and one hidden"
            )
        height, width = self.geometry.patch
        self.decoder = Decoder(
            self.encoder.num_features,
            height * width * len(config.mean),
            self.encoder.num_prefix_tokens,
            self.geometry.grid,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
        )
        _init_encoder(self.encoder, self.geometry.grid)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Mean squared error over the hidden patches; "loss_visible" is the same over the visible ones."""
        x = self.normalize(batch["image"])
        keep, hidden = self.masks(batch, ctx)
        error = (self.reconstruct(x, keep, hidden) - self.targets(x)).square().mean(dim=-1)
        loss = error.gather(1, hidden).mean()
        return StepOutput(loss, {"loss_visible": error.detach().gather(1, keep).mean()})

    def masks(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Visible and hidden patches of each sample: int64[B,V], int64[B,N-V]."""
        return random_masks(ctx.random(batch, "mae.mask"), self.geometry.patches, self.visible)

    def reconstruct(self, x: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """Normalised float[B,C,H,W] to the prediction of every patch, float32[B,N,T]."""
        tokens = encode_visible(self.encoder, to_weights(x, self.encoder), keep)
        return self.decoder(tokens, keep, hidden).float()

    def targets(self, x: Tensor) -> Tensor:
        """What is to be predicted, float32[B,N,T]."""
        patches = patchify(x, self.geometry.patch)
        if not self.config.norm_pix:
            return patches
        mean, std = _patch_statistics(patches)
        return (patches - mean) / std

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder on whole images: its class token, or the mean of its patches where it has none."""
        pool = "cls" if getattr(self.encoder, "cls_token", None) is not None else "mean"
        return {"image": ImageEncoder(self.normalize, self.encoder, pool)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Rows: original, what the encoder sees, prediction, prediction pasted into what it sees."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        x = self.normalize(batch["image"])
        keep, hidden = self.masks(batch, ctx)
        patches = patchify(x, self.geometry.patch)
        predicted = self.reconstruct(x, keep, hidden)
        if self.config.norm_pix:
            mean, std = _patch_statistics(patches)
            predicted = predicted * std + mean
        seen = torch.zeros_like(patches[..., :1]).scatter(1, keep[..., None], 1.0).bool()
        rows = [patches, patches.where(seen, 0.0), predicted, patches.where(seen, predicted)]
        images = [self.normalize.invert(unpatchify(row, *self.geometry)) for row in rows]
        part = 1 - self.visible / self.geometry.patches
        caption = (
            f"Original; visible part ({part:.0%} hidden); reconstruction; reconstruction of the hidden part pasted"
        )
        if self.config.norm_pix:
            caption += ". Each patch is predicted up to its own mean and contrast, which are taken from the original."
        return {"reconstruction": Picture(tile(images), caption)}


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, float32[B,N,1] each; unbiased variance, 1e-6 inside the root."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def _init_encoder(encoder: nn.Module, grid: tuple[int, int]) -> None:
    """MAE's initial weights: Xavier for linear layers and the patch embedding, 0.02 for tokens, fixed positions."""
    encoder.apply(init_xavier)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("cls_token", "reg_token")):
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith(("patch_embed.proj.weight", "embeds.proj.weight")):
            nn.init.xavier_uniform_(parameter.data.view(len(parameter), -1))
        elif name == "pos_embed":
            prefix = parameter.shape[1] - grid[0] * grid[1]
            table = sincos_2d(parameter.shape[-1], grid)
            parameter.data = torch.cat([torch.zeros(prefix, parameter.shape[-1]), table])[None]
            parameter.requires_grad_(False)
        elif name == "embeds.pos_embed":
            rows, columns, dim = parameter.shape[1:]
            parameter.data = sincos_2d(dim, (rows, columns)).view(1, rows, columns, dim)
            parameter.requires_grad_(False)
