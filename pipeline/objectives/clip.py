"""CLIP: images and their captions find each other among those of the batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), and with the
sigmoid loss SigLIP: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023). Frozen towers: LiT, Zhai
et al. (CVPR 2022). Dropped patches: FLIP, Li et al. (CVPR 2023). Shape letters: B samples, L tokens, E common width.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
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
from pipeline.nn.construct import construct_encoder
from pipeline.nn.contrastive import info_nce, sigmoid_loss
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, to_weights
from pipeline.nn.masking import encode_visible, make_maskable
from pipeline.nn.open_clip import image_tower, text_tower
from pipeline.nn.pictures import Line, beneath, beside, verdict
from pipeline.nn.start import start_as_big_vision, start_as_clip, start_text_as_big_vision
from pipeline.nn.text import TextEncoder, TextPool

SHOWN = 8
"""Samples in the showcase."""
NEAREST = 3
"""Of them, what is shown as nearest to each."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_SCALE = 100.0
OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
Count = Annotated[int, Field(ge=1)]


class Config(EncoderConfig):
    """Settings of CLIP; the defaults are ViT-B/32's."""

    encoder: str = "vit_base_patch32_clip_224"
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = CLIP_MEAN
    std: Annotated[tuple[float, ...], Field(min_length=1)] = CLIP_STD
    loss: Literal["softmax", "sigmoid"] = "softmax"
    dim: Count = 512
    """E."""
    vocab: Count = 49408
    """Tokens that the tokenizer has."""
    length: Count = 77
    """L, tokens of a text: data.captions.length."""
    text_width: Count = 512
    text_depth: Count = 12
    text_heads: Count = 8
    text_pool: TextPool = "end"
    """"end": read from the left, what stands at the end of the text; "mean": read both ways, the mean."""
    end: Annotated[int, Field(ge=0)] = 2
    """The token at which texts end: 2 in a vocabulary of ``sluice prep tokenizer``, 49407 in CLIP's."""
    image_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only so many of the image encoder's last layers; 0: none, as LiT; left out: all. Its projection is trained
    in any case."""
    text_layers: Annotated[int, Field(ge=0)] | None = None
    """The same for the text encoder, whose projection is the last layer's."""
    keep_patches: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the patches that is encoded in training (FLIP)."""
    share: Literal["gathered", "blocks"] = "gathered"
    """Features of all ranks at once, or (slower, for the largest batches) one rank's after the other's."""

    @model_validator(mode="after")
    def _heads(self) -> "Config":
        if self.text_width % self.text_heads:
            raise ValueError(f"text_heads = {self.text_heads} does not divide text_width = {self.text_width}")
        return self


class ImageTower(nn.Module):
    """uint8[B,C,H,W] to float[B,E]."""

    def __init__(self, encoder: ImageEncoder, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim = dim
        self.projection = nn.Linear(encoder.dim, dim, bias=False)
        nn.init.normal_(self.projection.weight, std=encoder.dim**-0.5)

    def forward(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """Features of a batch; ``keep``, int64[B,V]: of these patches alone."""
        if keep is None:
            return self.projection(self.encoder(image))
        x = to_weights(self.encoder.normalize(image), self.encoder.backbone)
        return self.projection(encode_visible(self.encoder.backbone, x, keep))

    def train(self, mode: bool = True) -> "ImageTower":
        """An encoder that is frozen as a whole stays in evaluation mode, batch norm and dropout included."""
        super().train(mode)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.eval()
        return self


class CLIP(PairwiseObjective):
    """Two towers and a temperature."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {
            "image": f"uint8[B,{len(config.mean)},H,W]",
            "text": f"int64[B,{config.length}]",
            "text_length": "int64[B]",
        }
        self.config, self.image_size = config, facts.image_size
        softmax = config.loss == "softmax"
        start = start_as_clip if softmax else start_as_big_vision
        encoder = construct_encoder(config, facts.image_size, "clip", start=start)
        self.patches = make_maskable(encoder.backbone, facts.image_size).patches if config.keep_patches < 1 else 0
        self.image = ImageTower(encoder, config.dim)
        self.text = TextEncoder(
            vocab=config.vocab,
            length=config.length,
            width=config.text_width,
            depth=config.text_depth,
            heads=config.text_heads,
            dim=config.dim,
            pool=config.text_pool,
        )
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
            self._check_tokens(batch["text"], batch["text_length"])
        keep = None
        if self.patches and self.training:
            visible = max(1, int(self.patches * self.config.keep_patches))
            keep = ctx.random(batch, "clip.keep").permutation(self.patches)[:, :visible]
        with dropping_for(batch, ctx):
            image, text = self.image(batch["image"], keep), self.text(batch["text"], batch["text_length"])
        return {name: functional.normalize(x.float(), dim=1) for name, x in (("image", image), ("text", text))}

    def _check_tokens(self, text: Tensor, length: Tensor) -> None:
        if int(text.max()) >= self.config.vocab:
            raise ConfigError(
                f"objective.vocab is {self.config.vocab}, but the batch holds token {int(text.max())}; set it to the "
                "number of tokens that the tokenizer has"
            )
        ends = text.gather(1, length[:, None] - 1)
        if self.config.text_pool == "end" and bool((ends != self.config.end).any()):
            raise ConfigError(
                f"objective.end is {self.config.end}, but texts of the batch end with token "
                f"{int(ends[ends != self.config.end][0])}; set it to the tokenizer's token for data.captions.end"
            )
        self._tokens_checked = True

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
        folder = "open_clip"
        try:
            vision, weights = image_tower(
                self.config, self.image.encoder.backbone, self.image.projection, self.image_size
            )
            text, text_weights = text_tower(self.text, self.config.end)
        except ConfigError as error:
            return {f"{folder}/{OPEN_CLIP_WEIGHTS}": Export(None, f"not written: {error}")}
        model = {"embed_dim": self.config.dim, "vision_cfg": vision, "text_cfg": text}
        weights |= text_weights | {"logit_scale": self.log_scale.squeeze(0)}
        if self.bias is not None:
            model["init_logit_bias"] = float(self.bias)
            weights["logit_bias"] = self.bias.squeeze(0)
        settings = {"model_cfg": model, "preprocess_cfg": {"mean": self.config.mean, "std": self.config.std}}
        return {
            f"{folder}/{OPEN_CLIP_WEIGHTS}": Export(weights, "open_clip.create_model('local-dir:FOLDER')"),
            f"{folder}/{OPEN_CLIP_CONFIG}": Export(
                json.dumps(settings, indent=2),
                "its configuration; for open_clip.get_tokenizer, put tokenizer.json there",
            ),
        }

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """The captions nearest to each image, and the images nearest to each caption, among those shown."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        rows = self.embed(batch, ctx)
        cosines = (rows["image"] @ rows["text"].T).float().cpu()
        words = ctx.words(batch) if ctx.words else [f"caption {number}" for number in range(len(cosines))]
        nearest = min(NEAREST, len(words))
        captions = _finds(cosines, nearest, words)
        images = _finds(cosines.T, nearest, [""] * len(words))
        found = cosines.T.topk(nearest, dim=1).indices
        hits = [sum(line[0].colour == verdict(True) for line in lines) for lines in (captions, images)]
        said = f"among {len(words)} shown; green: its own. First of all it is for"
        return {
            "captions": Picture(
                beside(batch["image"], captions), f"The captions nearest to each image {said} {hits[0]} of them."
            ),
            "images": Picture(
                beneath(words, [batch["image"][row.to(batch["image"].device)] for row in found], images),
                f"The images nearest to each caption {said} {hits[1]} of them.",
            ),
        }


def _finds(cosines: Tensor, count: int, names: list[str]) -> list[list[Line]]:
    """The ``count`` largest of each row, with their names: cosine and name, green on the diagonal."""
    best = cosines.topk(count, dim=1)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        [Line(f"{c:.2f}  {names[i]}".rstrip(), verdict(i == own)) for c, i in zip(values, indices, strict=True)]
        for own, (values, indices) in enumerate(pairs)
    ]
