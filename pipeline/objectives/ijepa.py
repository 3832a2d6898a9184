"""I-JEPA: from a large part of an image predict the features of other parts, as a slowly moving encoder makes them.

Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture" (CVPR 2023),
https://arxiv.org/abs/2301.08243. Shape letters: B samples, C channels, H height, W width, N patches, V seen ones at
most, T target blocks, M patches of a block, D width.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Average, Batch, Clock, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.core.random import SampleRandom
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, to_weights
from pipeline.nn.followers import follower, following
from pipeline.nn.images import patchify, principal_colors, tile, unpatchify
from pipeline.nn.masking import encode_visible, make_maskable
from pipeline.nn.predictor import Predictor
from pipeline.nn.start import start_as_ijepa

SHOWN = 8
"""Samples in the showcase."""
Range = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
Part = Annotated[float, Field(gt=0, le=1)]


class Config(EncoderConfig):
    """Settings of I-JEPA; the defaults are the paper's."""

    encoder: str = "vit_huge_patch14_224"
    targets: Annotated[int, Field(ge=1)] = 4
    """T."""
    target_scale: tuple[Part, Part] = (0.15, 0.2)
    """Of the image: area of a target block."""
    target_ratio: Range = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: tuple[Part, Part] = (0.85, 1.0)
    """Area of the square block that the context lies in; what targets cover of it is taken out."""
    predictor_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 384
    predictor_depth: Annotated[int, Field(ge=1)] = 12
    predictor_heads: Annotated[int, Field(ge=1)] | None = None
    """Left out: as many as the encoder's."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """What the target encoder keeps of itself in the first update; it rises to 1 in a straight line."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        for name in ("target_scale", "target_ratio", "context_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} goes from {low} down to {high}; write the smaller one first")
        if self.checkpointing:
            raise ValueError("'checkpointing' is not possible here, since samples see patches of unequal number")
        return self


class Parts(NamedTuple):
    """What is seen and what is to be predicted of each sample."""

    keep: Tensor
    """int64[B,V], numbers of the patches that are seen."""
    valid: Tensor
    """bool[B,V]; the others fill up samples that see fewer than V."""
    wanted: Tensor
    """int64[B,T,M]."""


class IJEPA(Objective):
    """Context encoder, predictor, and the target encoder, which follows the first.

    As in the authors' code all blocks of a step have the same size. There, all contexts of a rank's batch are cut to
    the smallest of them, so that rows at the bottom are seen seldom; here each sample's is whole, and attention leaves
    out what fills up the shorter ones. So a sample's loss does not depend on its company.
    """

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.encoder = construct_encoder(
            config, facts.image_size, "ijepa", start=start_as_ijepa, pool="mean", class_token=False, global_pool=""
        )
        backbone = self.encoder.backbone
        self.geometry = make_maskable(backbone, facts.image_size)
        if not isinstance(backbone, VisionTransformer):
            raise ConfigError(
                f"objective 'ijepa': {type(backbone).__name__} cannot leave single patches out of its attention; "
                "take a plain vision transformer, e.g. 'vit_base_patch16_224'"
            )
        _refuse_covered(config, self.geometry.grid)
        self.target = follower(self.encoder)
        first: Any = backbone.blocks[0]
        heads: int = config.predictor_heads or first.attn.num_heads
        if config.predictor_dim % heads:
            raise ConfigError(
                f"objective.predictor_dim: {heads} heads do not divide {config.predictor_dim}; set predictor_heads"
            )
        self.predictor = Predictor(
            backbone.embed_dim,
            self.geometry.grid,
            dim=config.predictor_dim,
            depth=config.predictor_depth,
            heads=heads,
        )

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Smooth L1 distance; "context" is the part of the image that is seen."""
        parts = self.parts(batch, ctx)
        predicted, wanted, features = self.compare(batch, ctx, parts)
        losses = functional.smooth_l1_loss(predicted, wanted, reduction="none").flatten(1).mean(dim=1)
        context = parts.valid.float().sum(dim=1).mean() / self.geometry.patches
        return StepOutput(losses.mean(), {"context": context}, losses.detach(), features)

    def compare(self, batch: Batch, ctx: StepContext, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions and targets, float32[B,T,M,D] each, and what evaluations see of the images, [B,D]."""
        x = self.encoder.normalize(batch["image"])
        with torch.no_grad():
            tokens = self.target.backbone(to_weights(x, self.target.backbone))
            known = functional.layer_norm(tokens.float(), tokens.shape[-1:])
            rows = torch.arange(len(known), device=known.device)[:, None, None]
            wanted = known[rows, parts.wanted]
        backbone = self.encoder.backbone
        with dropping_for(batch, ctx):
            seen = encode_visible(backbone, to_weights(x, backbone), parts.keep, parts.valid)
            predicted = self.predictor(seen, parts.keep, parts.valid, parts.wanted)
        return predicted.float(), wanted, tokens.mean(dim=1)

    def parts(self, batch: Batch, ctx: StepContext) -> Parts:
        """Blocks whose sizes belong to the step, and whose places belong to the sample."""
        first = torch.zeros(1, dtype=torch.int64)
        draw = SampleRandom(ctx.seed, "ijepa.sizes", first, first + ctx.clock.step).uniform(2)[0].tolist()
        grid, config = self.geometry.grid, self.config
        target = block_size(draw[0], config.target_scale, config.target_ratio, grid)
        context = block_size(draw[1], config.context_scale, (1.0, 1.0), grid)
        wanted = _place(ctx.random(batch, "ijepa.targets"), config.targets, target, grid)
        inside = _place(ctx.random(batch, "ijepa.context"), 1, context, grid)[:, 0]
        seen = torch.zeros(len(wanted), self.geometry.patches, dtype=torch.bool, device=wanted.device)
        seen.scatter_(1, inside, True).scatter_(1, wanted.flatten(1), False)
        order = seen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        keep = order[:, : int(seen.sum(dim=1).max())]
        return Parts(keep, seen.gather(1, keep), wanted)

    def averages(self, clock: Clock) -> Iterable[Average]:
        """The target encoder."""
        keep = self.config.momentum + (1 - self.config.momentum) * clock.progress
        yield from following(self.target, self.encoder, keep)

    def encoders(self) -> dict[str, nn.Module]:
        """The target encoder, which the paper evaluates: the mean of its patches."""
        return {"image": self.target}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, what the context encoder sees of it, and what is to be predicted."""
        context, targets = self._shown(batch, self.parts(batch, ctx))
        return {"image": batch["image"], "context": context, "targets": targets}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Rows: image, context, targets, and the features of these, as they are and as they are predicted."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        parts = self.parts(batch, ctx)
        predicted, wanted, _ = self.compare(batch, ctx, parts)
        context, targets = self._shown(batch, parts)
        size = (batch["image"].shape[2], batch["image"].shape[3])
        index = parts.wanted.flatten(1)
        covered = torch.zeros(*index.shape[:1], self.geometry.patches, 1, device=index.device).scatter(
            1, index[..., None], 1
        )
        maps = []
        for values in (wanted, predicted):
            flat = values.flatten(1, 2)
            whole = flat.new_zeros(len(flat), self.geometry.patches, flat.shape[-1])
            maps.append(whole.scatter(1, index[..., None].expand_as(flat), flat))
        colours = principal_colors(maps, self.geometry.grid, size)
        shown = nn.functional.interpolate(covered.unflatten(1, self.geometry.grid).permute(0, 3, 1, 2), size=size)
        rows = [batch["image"], context, targets, *((c * shown).to(torch.uint8) for c in colours)]
        caption = (
            "Image; what is seen; the blocks to be predicted; their features by the target encoder; the prediction "
            "(first three principal components as colours)"
        )
        return {"prediction": Picture(tile(rows), caption)}

    def _shown(self, batch: Batch, parts: Parts) -> tuple[Tensor, Tensor]:
        """The context and the targets alone, uint8[B,C,H,W] each."""
        patches = patchify(batch["image"].float(), self.geometry.patch)
        masks = []
        for index, valid in ((parts.keep, parts.valid), (parts.wanted.flatten(1), None)):
            one = torch.ones_like(index, dtype=patches.dtype) if valid is None else valid.to(patches)
            masks.append(torch.zeros_like(patches[..., 0]).scatter(1, index, one))
        seen, asked = (unpatchify(patches * mask[..., None], *self.geometry).to(torch.uint8) for mask in masks)
        return seen, asked


def block_size(
    u: float, scale: tuple[float, float], ratio: tuple[float, float], grid: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of a block, from a number in [0, 1) that decides both area and form, as in the authors' code."""
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    form = ratio[0] + u * (ratio[1] - ratio[0])
    rows, columns = round(math.sqrt(area * form)), round(math.sqrt(area / form))
    return max(1, min(rows, grid[0])), max(1, min(columns, grid[1]))


def _place(random: SampleRandom, count: int, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Numbers of the patches of blocks at random places, every place as likely as another: int64[B,count,M]."""
    top = random.integers(0, grid[0] - size[0] + 1, count)
    left = random.integers(0, grid[1] - size[1] + 1, count)
    rows, columns = (torch.arange(n, device=top.device) for n in size)
    inside = (rows[:, None] * grid[1] + columns).flatten()
    return (top * grid[1] + left)[..., None] + inside


def _refuse_covered(config: Config, grid: tuple[int, int]) -> None:
    """Refuse blocks that could hide all of the context, or that are no patch.

    Raises:
        ConfigError: with the largest and smallest blocks.
    """
    draws = [n / 1000 for n in range(1000)]
    targets = max(math.prod(block_size(u, config.target_scale, config.target_ratio, grid)) for u in draws)
    context = min(math.prod(block_size(u, config.context_scale, (1.0, 1.0), grid)) for u in draws)
    if config.targets * targets >= context:
        raise ConfigError(
            f"objective.targets: {config.targets} blocks of up to {targets} patches can cover the whole context, which "
            f"may have no more than {context} of {grid[0]}x{grid[1]} patches; take fewer or smaller "
            "targets, or smaller patches"
        )
