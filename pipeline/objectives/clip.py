"""CLIP: images and their captions find each other among those of the batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), and with the
sigmoid loss SigLIP: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023). Frozen towers: LiT, Zhai
et al. (CVPR 2022). Dropped patches: FLIP, Li et al. (CVPR 2023). Shape letters: B samples, L tokens, E common width.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    Export,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.nn.clip import LARGEST_SCALE, ImageTower, TowersConfig
from pipeline.nn.clip_pictures import SHOWN, nearest_pictures
from pipeline.nn.construct import construct_encoder
from pipeline.nn.contrastive import info_nce, sigmoid_loss
from pipeline.nn.dropout import dropping_for
from pipeline.nn.masking import make_maskable
from pipeline.nn.open_clip import open_clip_files
from pipeline.nn.start import start_as_big_vision, start_as_clip, start_text_as_big_vision


class Config(TowersConfig):
    """Settings of CLIP."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    image_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only so many of the image encoder's last layers; 0: none, as LiT; left out: all. Its projection is trained
    in any case."""
    text_layers: Annotated[int, Field(ge=0)] | None = None
    """The same for the text encoder, whose projection is the last layer's."""
    keep_patches: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the patches that is encoded in training (FLIP)."""
    share: Literal["gathered", "blocks"] = "gathered"
    """Features of all ranks at once, or (slower, for the largest batches) one rank's after the other's."""


class CLIP(PairwiseObjective):
    """Two towers and a temperature."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = config.needs
        self.config, self.image_size = config, facts.image_size
        softmax = config.loss == "softmax"
        start = start_as_clip if softmax else start_as_big_vision
        encoder = construct_encoder(config, facts.image_size, "clip", start=start)
        self.patches = make_maskable(encoder.backbone, facts.image_size).patches if config.keep_patches < 1 else 0
        self.image = ImageTower(encoder, config.dim)
        self.text = config.text_encoder()
        if not softmax:
            start_text_as_big_vision(self.text)
        # One dimension: not decayed, and some engines cannot send a number without any.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07 if softmax else 10.0)]))
        self.bias = None if softmax else nn.Parameter(torch.tensor([-10.0]))
        self._freeze("image.encoder.", encoder.layers("image.encoder."), config.image_layers, "image_layers")
        self._freeze("text.", self.text.layers("text."), config.text_layers, "text_layers")
        self._tokens_checked = False

    def _freeze(self, tower: str, layers: Iterable[Iterable[str]], trained: int | None, setting: str) -> None:
        """Freeze all parameters of a tower before its last ``trained`` layers; None freezes none."""
        groups = [tuple(prefixes) for prefixes in layers]
        if trained is None:
            return
        if trained > len(groups):
            raise ConfigError(f"objective.{setting}: {trained} layers are to be trained, but there are {len(groups)}")
        frozen = tuple(prefix for group in groups[: len(groups) - trained] for prefix in group)
        for name, parameter in self.named_parameters():
            if name.startswith(tower) and (trained == 0 or name.startswith(frozen)):
                parameter.requires_grad_(False)

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Unit vectors float32[B,E] of images and texts."""
        if not self._tokens_checked:  # once: it waits for the device
            self.config.check_tokens(batch["text"], batch["text_length"])
            self._tokens_checked = True
        keep = None
        if self.patches and self.training:
            visible = max(1, int(self.patches * self.config.keep_patches))
            keep = ctx.random(batch, "clip.keep").permutation(self.patches)[:, :visible]
        with dropping_for(batch, ctx):
            image, text = self.image(batch["image"], keep), self.text(batch["text"], batch["text_length"])
        return {name: functional.normalize(x.float(), dim=1) for name, x in (("image", image), ("text", text))}

    def shared(self) -> dict[str, Tensor]:
        """Inverse temperature, and the sigmoid's bias."""
        scale = {"scale": self.log_scale.float().exp()}
        return scale if self.bias is None else scale | {"bias": self.bias.float()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """InfoNCE or sigmoid loss; "scale" is the inverse temperature, "agreement" the mean cosine of true pairs."""
        image, text = embeddings.rows["image"], embeddings.rows["text"]
        scale = embeddings.shared["scale"]
        metrics = {
            "scale": scale.detach().squeeze(0),
            "agreement": (image * text).detach().sum(dim=1).mean(),
        }
        if self.bias is None:
            losses = info_nce(image, text, scale, share=self.config.share, reduction="none")
        else:
            bias = embeddings.shared["bias"]
            losses = sigmoid_loss(image, text, scale, bias, share=self.config.share, reduction="none")
            metrics["bias"] = bias.detach().squeeze(0)
        return StepOutput(losses.mean(), metrics, losses.detach(), image.detach())

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """The inverse temperature stays between 1 and 100, as in the paper."""
        return {"log_scale": (0.0, math.log(LARGEST_SCALE))}

    def no_weight_decay(self) -> set[str]:
        """The class token and registers, which have one dimension in open_clip; positions are decayed there."""
        ends = ("cls_token", "reg_token")
        return {f"image.encoder.{name}" for name, _ in self.image.encoder.named_parameters() if name.endswith(ends)}

    def encoders(self) -> dict[str, nn.Module]:
        """Both towers: "text" maps int64[B,L] and int64[B] to float[B,E]."""
        return {"image": self.image, "text": self.text}

    def exports(self) -> dict[str, Export]:
        """The model for open_clip, which reads a folder of weights and configuration."""
        bias = None if self.bias is None else self.bias.squeeze(0)
        return open_clip_files(self.config, self.image, self.text, self.image_size, self.log_scale.squeeze(0), bias)

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """The captions nearest to each image, and the images nearest to each caption, among those shown."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        rows = self.embed(batch, ctx)
        return nearest_pictures(batch, rows["image"] @ rows["text"].T, ctx)
