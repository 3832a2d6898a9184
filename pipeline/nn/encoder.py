"""Image encoders: any timm backbone by name, between uint8 images and one feature vector per image.

Weights are drawn from torch's global generator when a backbone is built. Whoever builds an objective seeds that
generator first, with the same seed on every rank; nothing here depends on the rank.
"""

from typing import Annotated, Any, Literal, TypeAlias, cast

import timm
from pydantic import Field, model_validator
from timm.layers import PatchEmbed
from timm.models._manipulate import group_with_matcher
from timm.models.naflexvit import NaFlexEmbeds
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.registry import suggest
from pipeline.nn import cifar_resnets  # noqa: F401  timm learns of them
from pipeline.nn.convolution import PatchProjection
from pipeline.nn.images import IMAGENET_MEAN, IMAGENET_STD, Normalize

Backbone: TypeAlias = Any
"""A timm model: a module with further attributes (num_features, blocks, ...) that no type checker can see."""
Pool = Literal["cls", "mean", "native"]


class EncoderConfig(Strict):
    """The settings that every objective on a timm backbone shares."""

    encoder: str = "vit_base_patch16_224"
    """Name of a timm model; its size follows the data's image size."""
    encoder_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``timm.create_model``: depth, embed_dim, num_heads, drop_path_rate, ..."""
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = IMAGENET_MEAN
    """Of each channel, for values from 0 to 1; their number is the number of channels."""
    std: Annotated[tuple[float, ...], Field(min_length=1)] = IMAGENET_STD
    weights: str | None = None
    """Checkpoint that the encoder starts from: safetensors, or a file of tensors alone, in timm's or MAE's layout."""
    antialias: bool = True
    """Positions of ``weights`` for another size of image are resampled with antialiasing; false: without, as in the
    published code of MAE's fine-tuning."""
    checkpointing: bool = False
    """Compute activations of the blocks anew in the backward pass: far less memory, about a third more time."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""

    @model_validator(mode="after")
    def _channels(self) -> "EncoderConfig":
        if len(self.mean) != len(self.std):
            raise ValueError(f"'mean' has {len(self.mean)} channels and 'std' {len(self.std)}; give one of each")
        if min(self.std) <= 0:
            raise ValueError("'std' must be positive")
        return self


def create_backbone(config: EncoderConfig, image_size: tuple[int, int], **fixed: Any) -> Backbone:
    """A timm model without classifier, for images of ``image_size`` (height, width), with fresh weights.

    Args:
        config: name, arguments and channels.
        image_size: height and width.
        fixed: arguments of ``timm.create_model`` that the objective decides, so that the user may not.

    Raises:
        ConfigError: no such model, it does not take the arguments, or it would not see all of such an image.
    """
    name, args = config.encoder, dict(config.encoder_args)
    fixed = {"num_classes": 0, "in_chans": len(config.mean)} | fixed
    base = name.split(".", 1)[0]
    if not timm.is_model(base):
        raise ConfigError(f"encoder: timm has no model {name!r}; {suggest(base, timm.list_models())[:200]}")
    if takes_image_size(name):
        fixed["img_size"] = image_size
    if clash := sorted(args.keys() & fixed.keys()):
        raise ConfigError(f"encoder_args: {', '.join(clash)} cannot be set here; it follows from data and objective")
    try:
        backbone: Backbone = timm.create_model(name, pretrained=False, **args, **fixed)
        backbone.set_grad_checkpointing(config.checkpointing)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"timm cannot build {name!r} for {image_size[0]}x{image_size[1]} images with encoder_args {args}: "
            f"{error or repr(error)}"
        ) from error
    _refuse_unseen_edges(backbone, image_size)
    if type(getattr(backbone, "patch_embed", None)) is PatchEmbed:
        backbone.patch_embed.proj = PatchProjection.of(backbone.patch_embed.proj)
    if config.compile:
        compile_blocks(backbone)
    return backbone


def _refuse_unseen_edges(backbone: Backbone, image_size: tuple[int, int]) -> None:
    """Refuse images whose last rows or columns the first convolution never reaches, as where patches do not fit."""
    stem: Any = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d | NaFlexEmbeds)), None)
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    if isinstance(stem, NaFlexEmbeds):
        kernel = stride = cast(Any, stem).patch_size
        padding = (0, 0)
    elif type(stem) is nn.Conv2d and not _pads(backbone, stem):
        kernel, stride, padding = cast(Any, (stem.kernel_size, stem.stride, stem.padding))
    else:  # it pads as the image needs it
        return
    seen = [
        min(size, (size + 2 * p - k) // s * s + k - p)
        for size, k, s, p in zip(image_size, kernel, stride, padding, strict=True)
    ]
    if tuple(seen) == image_size:
        return
    larger = [end if end == size else end + s for end, size, s in zip(seen, image_size, stride, strict=True)]
    fitting = " or ".join(f"{height}x{width}" for height, width in (seen, larger) if height and width)
    raise ConfigError(
        f"data.image.size: {image_size[0]}x{image_size[1]} does not fit the encoder's patches of {kernel[0]}x"
        f"{kernel[1]}; the last {image_size[0] - seen[0]} rows and {image_size[1] - seen[1]} columns would never be "
        f"seen. Sizes that fit: {fitting}"
    )


def _pads(backbone: Backbone, stem: nn.Conv2d) -> bool:
    return isinstance(stem.padding, str) or getattr(getattr(backbone, "patch_embed", None), "dynamic_img_pad", False)


def compile_blocks(module: Backbone) -> None:
    """Compile the members of ``module.blocks`` in place, or the whole module if it has none.

    Block by block, since equal blocks share what is compiled, and the code between them may stay as it is.
    """
    for block in getattr(module, "blocks", [module]):
        block.compile()


def takes_image_size(name: str) -> bool:
    """Whether a timm model is built for one size of image."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return config is not None and config.fixed_input_size


def backbone_layers(backbone: Backbone, prefix: str) -> tuple[tuple[str, ...], ...]:
    """Full parameter names of a timm model, layer by layer from the input, without what belongs to a classifier.

    Args:
        backbone: a timm model without classifier.
        prefix: what stands before the backbone's names in the objective's.
    """
    head = "~head"  # matches no pattern, so it falls into the last group, together with a norm after pooling
    names = [(name, None) for name, _ in backbone.named_parameters()] + [(head, None)]
    layers = group_with_matcher(iter(names), backbone.group_matcher(coarse=False))
    return tuple(tuple(prefix + name for name in layers[key]) for key in sorted(layers) if head not in layers[key])


class ImageEncoder(nn.Module):
    """uint8[B,C,H,W] to float[B,D]: normalise, backbone, pool. Shares the modules it is given.

    Args:
        normalize: from uint8 to what the backbone is trained on.
        backbone: a timm model without classifier.
        pool: "cls" takes the class token and "mean" the mean over patch tokens, both of token outputs [B,T,D], or over
            the places of a map;
            "native" takes what the backbone pools itself.
    """

    backbone: Backbone

    def __init__(self, normalize: Normalize, backbone: Backbone, pool: Pool) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = backbone
        self.pool = pool

    def no_weight_decay(self, prefix: str) -> set[str]:
        """Full names, ``prefix`` before them, of what timm spares from decay: positions, class token and the like."""
        spared = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        return {f"{prefix}backbone.{name}" for name, _ in self.backbone.named_parameters() if name in spared}

    def layers(self, prefix: str) -> tuple[tuple[str, ...], ...]:
        """Full names, ``prefix`` before them, of its parameters, layer by layer from the input."""
        return backbone_layers(self.backbone, f"{prefix}backbone.")

    @property
    def dim(self) -> int:
        """D, the size of a feature vector."""
        return self.backbone.head_hidden_size if self.pool == "native" else self.backbone.num_features

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch, in the precision of the backbone's output."""
        return self.features(self.normalize(image))

    def features(self, x: Tensor) -> Tensor:
        """The same of what is normalised already, float32[B,C,H,W]."""
        x = self.backbone(to_weights(x, self.backbone))
        if self.pool == "native":
            return x
        if x.ndim == 4:  # a map without tokens
            return x.mean(dim=(1, 2) if getattr(self.backbone, "output_fmt", "NCHW") == "NHWC" else (2, 3))
        return x[:, 0] if self.pool == "cls" else x[:, self.backbone.num_prefix_tokens :].mean(dim=1)


class ImageClassifier(nn.Module):
    """uint8[B,C,H,W] to the logits of a linear classifier, float32[B,K]. Shares the modules it is given."""

    def __init__(self, encoder: ImageEncoder, norm: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.norm, self.head = encoder, norm, head

    @property
    def dim(self) -> int:
        """K, the number of classes."""
        return self.head.out_features

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.head(self.norm(self.encoder(image))).float()


def to_weights(x: Tensor, module: nn.Module) -> Tensor:
    """``x`` in the precision of the module's weights, which some engines hold in bf16; autocast may still lower it."""
    return x.to(next(module.parameters()).dtype)
