"""Models of open_clip with weights from files: both towers, and the tokens that the text tower was trained with.

open_clip is imported only here, and only when such a model is asked for. It builds the model and fits position tables;
the file is read here, so that nothing is downloaded and nothing unpickled freely.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import Captions, Image
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.registry import suggest
from pipeline.data.clip_vocabulary import CLIP, clip_tokenizer
from pipeline.nn.images import Normalize
from pipeline.nn.open_clip import CLIP_VOCAB
from pipeline.nn.weights import read
from pipeline.suites.foreign import Opened, hold, marked
from pipeline.suites.on_disk import OPEN_CLIP

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Of a folder, as open_clip calls them."""
TOKENIZER = "tokenizer.json"


class ImageTower(nn.Module):
    """uint8[B,C,H,W] to float[B,E]."""

    model: Any

    def __init__(self, normalize: Normalize, model: Any, dim: int) -> None:
        super().__init__()
        self.normalize, self.model, self.dim = normalize, model, dim

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch, not normalised."""
        return self.model.encode_image(self.normalize(image))


class TextTower(nn.Module):
    """int64[B,L] and int64[B] to float[B,E]. open_clip finds the end of a text by itself."""

    model: Any

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.dim = model, dim

    def forward(self, text: Tensor, length: Tensor) -> Tensor:
        """Features of a batch, not normalised."""
        return self.model.encode_text(text)


def open_clip_model(name: str, path: Path) -> Opened:
    """A model of open_clip.

    Args:
        name: as open_clip knows it; "": ``path`` is a folder that holds its configuration.
        path: file of the weights, or such a folder.

    Raises:
        ConfigError: open_clip is not there, or knows no such model.
        CheckpointError: the file is damaged, or of another model.
    """
    factory = _library()
    if name:
        config, file = factory.get_model_config(name), path
        if config is None:
            raise ConfigError(f"open_clip has no model {name!r}; {suggest(name, factory.list_models())[:200]}")
        normal, folder = {}, path.parent
    else:
        whole = _configuration(path / OPEN_CLIP)
        config, normal, folder = whole["model_cfg"], whole.get("preprocess_cfg", {}), path
        file = next((path / n for n in WEIGHTS if (path / n).is_file()), path / WEIGHTS[0])
    if "hf_model_name" in config["text_cfg"]:
        raise ConfigError(f"{name or path}: its text tower is not open_clip's own but is fetched, and nothing is here")
    tensors, _ = read(file)
    model = _built(factory, config, name, path)
    _fill(model, tensors, file, f"open_clip's {name or 'model in ' + str(path)!r}")
    taken = {**_preprocessing(model), **normal}
    dim = int(config["embed_dim"])
    normalize = Normalize(taken["mean"], taken["std"])
    captions, tokenizer = _words(config["text_cfg"], folder)
    encoders: dict[str, nn.Module] = {"image": ImageTower(normalize, model, dim)}
    if tokenizer is not None:
        encoders["text"] = TextTower(model, dim)
    tokens = [captions.model_dump(mode="json"), hashlib.sha256(tokenizer or b"").hexdigest()]
    marked(encoders, "open_clip", name, config, taken["mean"], taken["std"], tokens)
    return Opened(encoders, (), _cropped(model, taken), captions, tokenizer)


def _library() -> Any:
    """open_clip's own module of models."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its imports
            return import_module("open_clip.factory")
    except ImportError as error:
        raise ConfigError(
            f"models of open_clip need the package open_clip_torch, which cannot be imported ({error}); install it"
        ) from error


def _configuration(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found["model_cfg"]["text_cfg"], dict) or "embed_dim" not in found["model_cfg"]:
            raise TypeError("no towers")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is no configuration of open_clip ({error!r})") from error
    return found


def _preprocessing(model: nn.Module) -> dict[str, Any]:
    return import_module("open_clip.model").get_model_preprocess_cfg(model)


def _built(factory: Any, config: dict[str, Any], name: str, path: Path) -> nn.Module:
    """With weights as they are drawn at random, without the library's warning that they are."""
    where = {"model_name": name} if name else {"model_name": f"local-dir:{path}", "load_weights": False}
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return factory.create_model(**where, pretrained_text=False, require_pretrained=False)
    except Exception as error:  # each part of it, and what it builds upon, fails in its own way
        raise ConfigError(f"open_clip cannot build {name or path}: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


def _fill(model: Any, tensors: dict[str, Tensor], file: Path, what: str) -> None:
    """As open_clip's ``load_checkpoint`` does, from tensors that are there."""
    convert, models = import_module("open_clip.convert"), import_module("open_clip.model")
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    try:
        tensors = dict(convert.convert_state_dict(model, tensors))
        if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
            tensors = dict(models.convert_to_custom_text_state_dict(tensors))
        models.resize_pos_embed(tensors, model)
        models.resize_text_pos_embed(tensors, model)
    except (KeyError, AttributeError, RuntimeError, ValueError, AssertionError, IndexError):
        pass  # of another model: what is missing is said below
    for scalar in ("logit_scale", "logit_bias"):
        own = getattr(model, scalar, None)
        if scalar in tensors and own is not None:
            tensors[scalar] = tensors[scalar].reshape(own.shape)
    if getattr(model, "logit_bias", None) is None:  # of the loss; no encoder has it
        tensors.pop("logit_bias", None)
    tensors.pop("text.transformer.embeddings.position_ids", None)
    hold(model, tensors, file, what)


def _words(text: dict[str, Any], folder: Path) -> tuple[Captions, bytes | None]:
    """How texts become tokens; None: with a vocabulary that is not at hand, so that there is no encoder of texts."""
    length = int(text.get("context_length", 77))
    if "hf_tokenizer_name" in text or text.get("vocab_size", CLIP_VOCAB) != CLIP_VOCAB:
        if text.get("hf_tokenizer_name") == TOKENIZER and (folder / TOKENIZER).is_file():  # an export of ours
            return Captions(length=length), (folder / TOKENIZER).read_bytes()
        return Captions(), None
    return Captions(tokenizer=CLIP, pad="!", length=length), clip_tokenizer()


def _cropped(model: Any, taken: dict[str, Any]) -> Image | str:
    """How open_clip crops images for a model; or which way of its is none of ours."""
    height, width = size if isinstance(size := model.visual.image_size, (tuple, list)) else (size, size)
    how: dict[str, Any] = {"size": (height, width) if height != width else height}
    how["interpolation"] = taken.get("interpolation", "bicubic")
    mode = taken.get("resize_mode", "shortest")
    if how["interpolation"] not in ("bicubic", "bilinear") or mode not in ("shortest", "squash"):
        return f"it takes images that are resized by {how['interpolation']!r} of {mode!r}, which is none of our ways"
    return Image(crop="center" if mode == "shortest" else "resize", **how)
