"""Models of timm with weights from files. Nothing is downloaded, and nothing unpickled freely.

Images are cropped and normalised as timm's own configuration of the model says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from pipeline.config.schema import Captions, Image
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.registry import suggest
from pipeline.nn.encoder import Backbone, ImageEncoder
from pipeline.nn.images import Normalize
from pipeline.nn.weights import IMAGE_SIZE, NORMAL, TIMM, as_timm, heads_of, read

_SHOWN = 4
"""Names in a message."""


class Opened(NamedTuple):
    """A model that was built and filled, on the CPU; see :class:`pipeline.suites.subject.Subject`."""

    encoders: Mapping[str, nn.Module]
    classes: tuple[str, ...]
    image: Image | str
    """How images are cropped for it; or why that cannot be said."""
    captions: Captions = Captions()
    tokenizer: bytes | None = None


class Classifier(nn.Module):
    """uint8[B,C,H,W] to the logits of a timm model, float32[B,K]."""

    def __init__(self, normalize: Normalize, backbone: Backbone) -> None:
        super().__init__()
        self.normalize, self.backbone = normalize, backbone

    @property
    def dim(self) -> int:
        """K, the number of classes."""
        return self.backbone.num_classes

    def forward(self, image: Tensor) -> Tensor:
        """Logits of a batch."""
        return self.backbone(self.normalize(image)).float()


def hold(model: nn.Module, tensors: Mapping[str, Tensor], file: Path, what: str) -> None:
    """Fill a model; every weight must be there, and no other.

    Args:
        model: to be filled.
        tensors: by the model's names.
        file: that they come from.
        what: the model is, for the message.

    Raises:
        CheckpointError: they are of another model.
    """
    wanted = model.state_dict()
    missing, strange = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or strange:
        raise CheckpointError(f"{file} is not of {what}: {_some('missing', missing)}, {_some('not expected', strange)}")
    different = [name for name, value in wanted.items() if value.shape != tensors[name].shape]
    if different:
        name = different[0]
        raise CheckpointError(
            f"{file} is not of {what}: {len(different)} tensors are of another shape, first {name} with "
            f"{tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        )
    model.load_state_dict(dict(tensors))


def marked(encoders: dict[str, nn.Module], *facts: Any) -> dict[str, nn.Module]:
    """The encoders, with what decides their outputs beside their weights as a buffer, so that hashes know of it.

    ``facts`` are plain values: architecture, normalisation, tokens.
    """
    text = json.dumps(facts, sort_keys=True).encode()
    for module in encoders.values():
        module.register_buffer("facts", torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return encoders


def _some(what: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what}" + (f" ({', '.join(names[:_SHOWN])}{more})" if names else "")


def table(file: Path, key: str, text: str) -> Any:
    """What a file's metadata say in JSON.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: its metadata {key!r} are damaged") from error


def encoder(file: Path) -> Opened:
    """The encoder that ``sluice export`` wrote for timm.

    Raises:
        CheckpointError: damaged, of another model, or without its normalisation.
    """
    tensors, metadata = read(file)
    if NORMAL not in metadata or IMAGE_SIZE not in metadata:
        raise CheckpointError(
            f"{file} was exported by an earlier version and does not say how images are normalised; export it again, "
            "or evaluate the checkpoint itself"
        )
    made, normal = table(file, TIMM, metadata[TIMM]), table(file, NORMAL, metadata[NORMAL])
    backbone = _create(made["architecture"], **made["args"])
    hold(backbone, tensors, file, f"timm's {made['architecture']!r} with {made['args']}")
    height, width = table(file, IMAGE_SIZE, metadata[IMAGE_SIZE])
    image = Image(size=(height, width) if height != width else height, crop="center")
    own = ImageEncoder(Normalize(normal["mean"], normal["std"]), backbone, "native")
    return Opened(marked({"image": own}, made, normal), (), image)


def timm_model(name: str, file: Path | None) -> Opened:
    """A model of timm, features before its classifier as "image"; one that knows ImageNet's classes as "logits", too.

    Args:
        name: as timm knows it.
        file: of its weights; None: as they are drawn at random.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the file is damaged, or of another model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = _create(name, num_classes=0)
    taken = resolve_data_config({}, model=backbone)
    normalize = Normalize(taken["mean"], taken["std"])
    image, facts = cropped(taken), ("timm", name, taken["mean"], taken["std"])
    encoders: dict[str, nn.Module] = {"image": ImageEncoder(normalize, backbone, "native")}
    if file is None:
        return Opened(marked(encoders, *facts), (), image)
    tensors = as_timm(backbone, dict(read(file)[0]))
    heads = heads_of(backbone)
    trunk = {key: value for key, value in tensors.items() if not key.startswith(heads)}
    hold(backbone, trunk, file, f"timm's {name!r}")
    classes = _classes(heads, tensors)
    if classes:
        whole = _create(name, num_classes=len(classes))
        hold(whole, tensors, file, f"timm's {name!r} with {len(classes)} classes")
        encoders["logits"] = Classifier(normalize, whole)
    return Opened(marked(encoders, *facts), classes, image)


def _create(name: str, **arguments: Any) -> Backbone:
    base = name.split(".", 1)[0]
    if not timm.is_model(base):
        raise ConfigError(f"timm has no model {name!r}; {suggest(base, timm.list_models())[:200]}")
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"timm cannot build {name!r} with {arguments}: {error or repr(error)}") from error


def _classes(heads: tuple[str, ...], tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes of a classifier that knows one of ImageNet's sets: their WordNet ids, as its folders are called."""
    found = [tensors[f"{head}weight"] for head in heads if f"{head}weight" in tensors]
    if len(heads) != 1 or not found:
        return ()
    subset = infer_imagenet_subset({"num_classes": len(found[0])})
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def cropped(taken: Mapping[str, Any]) -> Image | str:
    """How timm crops images for a model in evaluation; or which way of its is none of ours."""
    height, width = taken["input_size"][1:]
    size = (height, width) if height != width else height
    how: dict[str, Any] = {"size": size, "interpolation": taken["interpolation"]}
    if taken["interpolation"] not in ("bicubic", "bilinear"):
        return f"it takes images that are resized by {taken['interpolation']!r}, and ours are by bicubic or bilinear"
    if taken["crop_mode"] == "center":
        # timm resizes to the whole pixels below the size over this part.
        return Image(crop="center", crop_fraction=height / int(height / taken["crop_pct"]), **how)
    if taken["crop_mode"] == "squash" and taken["crop_pct"] == 1:
        return Image(crop="resize", **how)
    return (
        f"it takes images that are cropped by {taken['crop_mode']!r} of {taken['crop_pct']}, which is none of our ways"
    )
