"""Masked autoencoding: hide most patches, encode the rest, predict what was hidden.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), https://arxiv.org/abs/2111.06377. Options
around it: block and grid masks (its figure 6), a frozen teacher's features as targets (Wei et al., "Masked Feature
Prediction", CVPR 2022), and, with the same machinery, denoising and inpainting (see :mod:`pipeline.nn.corruption`).
Shape letters: B samples, C channels, H height, W width, N patches, P prefix tokens, V visible patches, D width,
T numbers per target (height * width * channels of a patch, or the teacher's width).
"""

from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.construct import construct_encoder
from pipeline.nn.corruption import Corruption, corrupt
from pipeline.nn.decoder import Decoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import Backbone, EncoderConfig, ImageEncoder, compile_blocks, to_weights
from pipeline.nn.images import patchify, principal_colors, tile, unpatchify
from pipeline.nn.masking import Geometry, draw_masks, encode_visible, grid_cell, make_maskable
from pipeline.nn.start import Start, start_as_mae

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of MAE; the defaults are the paper's ViT-B/16."""

    mask: Literal["random", "block", "grid"] = "random"
    """Patches drawn one by one; a few rectangles; or all but one patch of each cell, at the same place in all cells."""
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Part of the patches that is hidden; what is kept is rounded down."""
    loss_on: Literal["hidden", "all"] = "hidden"
    """Patches whose prediction counts."""
    norm_pix: bool = True
    """Predict patches normalised each by its own mean and variance, instead of plain pixels."""
    teacher: EncoderConfig | None = None
    """Predict this frozen encoder's normalised patch features instead of pixels; it must cut images likewise."""
    corruption: Corruption = Corruption()
    """Damage done to the encoder's input, but not to the targets."""
    decoder_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    decoder_depth: Annotated[int, Field(ge=1)] = 8
    decoder_heads: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _fit(self) -> "Config":
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads = {self.decoder_heads} does not divide decoder_dim = {self.decoder_dim}")
        if self.mask_ratio == 0 and self.loss_on == "hidden":
            raise ValueError('mask_ratio = 0 hides nothing to predict; set loss_on = "all"')
        if self.mask == "grid" and not grid_cell(1 - self.mask_ratio):
            raise ValueError(
                'mask = "grid" shows one patch of each 2x2, 3x3, ...: mask_ratio must be 0.75, 0.8889, ...'
            )
        if self.teacher is not None and len(self.teacher.mean) != len(self.mean):
            raise ValueError("'teacher' must have as many channels in 'mean' and 'std' as the encoder")
        return self


class MAE(Objective):
    """The autoencoder. Class, register and mask tokens are decayed, as in the paper."""

    encoder: Backbone
    teacher: "Teacher | None"

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        encoder, self.geometry = _maskable(config, facts, "mae", start_as_mae)
        self.normalize, self.encoder = encoder.normalize, encoder.backbone
        self.visible = _visible(config, self.geometry)
        self.teacher = Teacher(config.teacher, facts, self.geometry) if config.teacher is not None else None
        height, width = self.geometry.patch
        self.decoder = Decoder(
            self.encoder.num_features,
            height * width * len(config.mean) if self.teacher is None else self.teacher.dim,
            self.encoder.num_prefix_tokens,
            self.geometry.grid,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            checkpointing=config.checkpointing,
        )
        if config.compile:
            compile_blocks(self.decoder)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Mean squared error over the hidden patches, or all; "loss_visible" is the same over the visible ones."""
        keep, hidden = self.masks(batch, ctx)
        with dropping_for(batch, ctx):
            tokens = self.encode(self.view(batch, ctx), keep)
            predicted = self.decoder(tokens, keep).float()
        error = (predicted - self.targets(batch)).square().mean(dim=-1)
        losses = (error if self.config.loss_on == "all" else error.gather(1, hidden)).mean(dim=1)
        seen = tokens.detach()[:, self.encoder.num_prefix_tokens :].mean(dim=1)
        metrics = {"loss_visible": error.detach().gather(1, keep).mean()}
        return StepOutput(losses.mean(), metrics, losses.detach(), seen)

    def masks(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Visible and hidden patches of each sample: int64[B,V], int64[B,N-V]."""
        return draw_masks(self.config.mask, ctx.random(batch, "mae.mask"), self.geometry.grid, self.visible)

    def view(self, batch: Batch, ctx: StepContext) -> Tensor:
        """What the encoder is given, before masking: float32[B,C,H,W]."""
        x = self.normalize(batch["image"])
        if not self.config.corruption.active:
            return x
        return corrupt(x, ctx.random(batch, "mae.corruption"), self.config.corruption)

    def reconstruct(self, x: Tensor, keep: Tensor) -> Tensor:
        """What the encoder is given, and the patches that it sees, to a prediction for every patch: float32[B,N,T]."""
        return self.decoder(self.encode(x, keep), keep).float()

    def encode(self, x: Tensor, keep: Tensor) -> Tensor:
        """Tokens of the patches that are seen, float[B,P+V,D]."""
        return encode_visible(self.encoder, to_weights(x, self.encoder), keep)

    def targets(self, batch: Batch) -> Tensor:
        """What is to be predicted, float32[B,N,T]."""
        if self.teacher is not None:
            return self.teacher(batch["image"])
        patches = patchify(self.normalize(batch["image"]), self.geometry.patch)
        if not self.config.norm_pix:
            return patches
        mean, std = _patch_statistics(patches)
        return (patches - mean) / std

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder on whole images: its class token, or the mean of its patches where it has none."""
        owner = getattr(self.encoder, "embeds", self.encoder)
        pool = "cls" if getattr(owner, "cls_token", None) is not None else "mean"
        return {"image": ImageEncoder(self.normalize, self.encoder, pool)}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and what the encoder is given of it."""
        keep, _ = self.masks(batch, ctx)
        given = patchify(self.view(batch, ctx), self.geometry.patch)
        seen = torch.zeros_like(given[..., :1]).scatter(1, keep[..., None], 1.0).bool()
        return {"image": batch["image"], "seen": self._picture(given.where(seen, 0.0))}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Rows: original, what the encoder sees, prediction, and the prediction pasted into what it sees."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        keep, hidden = self.masks(batch, ctx)
        view, patch = self.view(batch, ctx), self.geometry.patch
        with dropping_for(batch, ctx):
            predicted, given = self.reconstruct(view, keep), patchify(view, patch)
        seen = torch.zeros_like(given[..., :1]).scatter(1, keep[..., None], 1.0).bool()
        original = patchify(self.normalize(batch["image"]), patch)
        rows = [self._picture(original), self._picture(given.where(seen, 0.0))]
        caption = f"Original; what is seen ({len(hidden[0]) / self.geometry.patches:.0%} hidden)"
        if self.teacher is not None:
            height, width = batch["image"].shape[2:]
            rows += principal_colors([self.targets(batch), predicted], self.geometry.grid, (height, width))
            caption += "; the teacher's features and their prediction, first three principal components as colours"
            return {"reconstruction": Picture(tile(rows), caption)}
        if self.config.norm_pix:
            mean, std = _patch_statistics(original)
            predicted = predicted * std + mean
        # What is predicted for a patch that the loss leaves out was never trained, and would only puzzle.
        trained = predicted if self.config.loss_on == "all" else predicted.where(~seen, 0.0)
        rows += [self._picture(trained), self._picture(original.where(seen, predicted))]
        caption += "; what is predicted; the prediction of hidden patches pasted into the original"
        if self.config.norm_pix:
            caption += ". Each patch is predicted up to its own mean and contrast, which are taken from the original."
        return {"reconstruction": Picture(tile(rows), caption)}

    def _picture(self, patches: Tensor) -> Tensor:
        """Normalised patches to uint8[B,C,H,W]."""
        return self.normalize.invert(unpatchify(patches, *self.geometry))


class Teacher(nn.Module):
    """A frozen encoder's patch features, normalised each to zero mean and unit variance: float32[B,N,T]."""

    encoder: Backbone

    def __init__(self, config: EncoderConfig, facts: DataFacts, geometry: Geometry) -> None:
        super().__init__()
        encoder, own = _maskable(config, facts, "mae.teacher", None)
        self.normalize, self.encoder = encoder.normalize, encoder.backbone
        if own.grid != geometry.grid:
            raise ConfigError(
                f"objective.teacher: it cuts the image into {own.grid[0]}x{own.grid[1]} patches, the encoder into "
                f"{geometry.grid[0]}x{geometry.grid[1]}; take a teacher of the same patch size"
            )
        self.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """T."""
        return self.encoder.num_features

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode, whatever becomes of the objective around it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to targets."""
        x = to_weights(self.normalize(image), self.encoder)
        tokens = self.encoder(x)[:, self.encoder.num_prefix_tokens :].float()
        return functional.layer_norm(tokens, tokens.shape[-1:])


def _maskable(config: EncoderConfig, facts: DataFacts, name: str, start: Start | None) -> tuple[ImageEncoder, Geometry]:
    """A token encoder with its norm before any pooling, and how it cuts images."""
    fixed: dict[str, Any] = {"global_pool": ""}
    if timm.models.is_model_in_modules(config.encoder.split(".")[0], ["naflexvit"]):
        fixed["fc_norm"] = False  # it keeps the norm of its default pooling, whatever pooling it is given
    encoder = construct_encoder(config, facts.image_size, name, start=start, **fixed)
    return encoder, make_maskable(encoder.backbone, facts.image_size)


def _visible(config: Config, geometry: Geometry) -> int:
    """V, the number of patches that are seen."""
    visible = int(geometry.patches * (1 - config.mask_ratio))
    if config.mask == "grid":
        k = grid_cell(1 - config.mask_ratio)
        if geometry.grid[0] % k or geometry.grid[1] % k:
            raise ConfigError(
                f"objective.mask: {geometry.grid[0]}x{geometry.grid[1]} patches cannot be cut into {k}x{k} cells; "
                "change the image size or the mask"
            )
        visible = geometry.patches // k**2
    if visible == 0 or (visible == geometry.patches and config.loss_on == "hidden"):
        raise ConfigError(
            f"objective.mask_ratio: {config.mask_ratio} of {geometry.patches} patches leaves {visible} visible; "
            "at least one must be visible and one hidden"
        )
    return visible


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, float32[B,N,1] each; unbiased variance, 1e-6 inside the root."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
