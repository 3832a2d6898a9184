"""Encoders as files: export that timm loads strictly, import from timm's and the MAE repository's layout.

Nothing is unpickled freely: files are safetensors, or what ``torch.load(weights_only=True)`` accepts.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PosixPath
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.tensors import write_tensors
from pipeline.nn.encoder import Backbone, EncoderConfig, ImageEncoder, takes_image_size

TIMM = "timm"
"""Key of a file's metadata that says, in JSON, what ``timm.create_model`` is to be given."""
IMAGE_SIZE = "image_size"
"""Key of a file's metadata that holds height and width, in JSON."""
FACTS = "facts"
"""Key of a file's metadata that holds what the objective was told of the data, in JSON."""
NORMAL = "normalisation"
"""Key of a file's metadata that holds "mean" and "std" of each channel, for values from 0 to 1, in JSON."""


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.part")
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_tensors(temporary, whole, {"format": "pt", **metadata})
    os.replace(temporary, path)


def export_encoder(
    path: str | os.PathLike[str],
    config: EncoderConfig,
    encoder: ImageEncoder,
    image_size: tuple[int, int],
    *,
    new_image_size: tuple[int, int] | None = None,
    new_patch_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write an encoder for timm; ``timm.create_model(NAME, checkpoint_path=path, **args)`` gives the same features.

    Args:
        path: of the safetensors file.
        config: what the encoder was built from.
        encoder: backbone and pooling.
        image_size: height and width that it was built for.
        new_image_size: resample position tables to this size of image.
        new_patch_size: resample patch embedding and position tables to this size of patch.

    Returns:
        ``args``, which the file's metadata also hold.

    Raises:
        ConfigError: the model cannot be resampled so.
    """
    backbone = encoder.backbone
    args: dict[str, Any] = dict(config.encoder_args) | {"num_classes": 0}
    if len(config.mean) != 3:
        args["in_chans"] = len(config.mean)
    if encoder.pool != "native":
        args["global_pool"] = "token" if encoder.pool == "cls" else "avg"
        args[_no_norm_after_pooling(backbone)] = False
        if getattr(backbone, "pool_include_prefix", False):
            args["pool_include_prefix"] = False
    if takes_image_size(config.encoder):
        args["img_size"] = new_image_size or image_size
    if new_image_size or new_patch_size:
        backbone = _resampled(backbone, config.encoder, new_image_size, new_patch_size)
        if new_patch_size:
            args["patch_size"] = new_patch_size if new_patch_size[0] != new_patch_size[1] else new_patch_size[0]
    state = backbone.state_dict()
    with torch.device("meta"):
        rebuilt = timm.create_model(config.encoder, **args).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}, args
    size = new_image_size or image_size
    made = {
        TIMM: json.dumps({"architecture": config.encoder, "args": args}),
        IMAGE_SIZE: json.dumps(size),
        NORMAL: json.dumps({"mean": config.mean, "std": config.std}),
    }
    save(path, state, made)
    return args


def _no_norm_after_pooling(backbone: nn.Module) -> str:
    """Name of the argument that keeps the norm before the pooling, where it was in training."""
    return "use_fc_norm" if type(backbone).__module__.endswith(".eva") else "fc_norm"


def _resampled(backbone: Backbone, name: str, image: tuple[int, int] | None, patch: tuple[int, int] | None) -> Backbone:
    if not hasattr(backbone, "set_input_size"):
        raise ConfigError(f"timm cannot change image or patch size of {name!r}; export it at the size it has")
    backbone = copy.deepcopy(backbone)
    backbone.set_input_size(img_size=image, patch_size=patch)
    return backbone


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint, without the wrappers "model", "state_dict" or "teacher", and its metadata.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one that holds more than tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        # Training checkpoints of the MAE repository hold its command line beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, which are all that is loaded: {error}"
        ) from error
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no weights by name")
    return content, {}


def weights_hash(modules: Mapping[str, nn.Module]) -> str:
    """Hash of all parameters and buffers with their names; modules that share some are hashed as often."""
    found = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in sorted(module.state_dict().items()):
            found.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


_wanted: ContextVar[bool] = ContextVar("wanted", default=True)


@contextmanager
def no_initial_weights() -> Iterator[None]:
    """Inside, :func:`load_encoder` does nothing: a checkpoint is to fill the model, and its origins may be gone."""
    token = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(token)


def load_encoder(backbone: Backbone, path: str | os.PathLike[str], *, antialias: bool = True) -> None:
    """Fill a timm backbone from a checkpoint, in place; all of its weights but a norm after pooling must be there.

    Reads encoders in timm's layout (which is also that of the MAE repository, decoder and classifier left out) and
    whole autoencoders of this project. Position tables and patch embeddings are resampled to the backbone's size.

    Args:
        backbone: a timm model without classifier.
        path: of the checkpoint.
        antialias: position tables are resampled bicubically with antialiasing, or without (facebookresearch/mae,
            ``interpolate_pos_embed``). The two differ on larger grids, too: their cubics have a = -0.5 and -0.75.

    Raises:
        CheckpointError: unreadable, or of another model.
    """
    if _wanted.get():
        fill_encoder(backbone, *read(path), path, antialias=antialias)


def fill_encoder(
    backbone: Backbone,
    state: dict[str, Tensor],
    metadata: dict[str, str],
    path: str | os.PathLike[str],
    *,
    antialias: bool = True,
) -> None:
    """Fill a timm backbone with what :func:`read` gave of ``path``; see :func:`load_encoder`."""
    state, wanted = _encoder_part(state), backbone.state_dict()
    # MAE fine-tunes a pooled encoder with a fresh norm after the pooling instead of the one before it.
    missing = {name for name in wanted.keys() - state.keys() if not name.startswith("fc_norm.")}
    surplus = {name for name in state.keys() - wanted.keys() if not name.startswith(("head.", "fc_norm."))}
    if any(name.startswith("fc_norm.") for name in wanted):
        surplus -= {"norm.weight", "norm.bias"}
    if missing or surplus:
        raise CheckpointError(
            f"{path} is not of a {type(backbone).__name__} like this one: {_list('missing', missing)}, "
            f"{_list('not expected', surplus)}; set encoder and encoder_args as it was trained"
        )
    if "pos_embed" in state:
        state["pos_embed"] = _resample_positions(state, metadata, backbone, path, antialias)
    if "patch_embed.proj.weight" in state:
        size = wanted["patch_embed.proj.weight"].shape[2:]
        state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], list(size))
    fitting = {name: value for name, value in state.items() if name in wanted}
    if different := [name for name, value in fitting.items() if value.shape != wanted[name].shape]:
        name = different[0]
        raise CheckpointError(
            f"{path} is of another size: {len(different)} tensors differ, first {name} with {tuple(state[name].shape)} "
            f"instead of {tuple(wanted[name].shape)}; set encoder and encoder_args as it was trained"
        )
    backbone.load_state_dict(fitting, strict=False)


def heads_of(backbone: Backbone) -> tuple[str, ...]:
    """Beginnings of the names of a model's classifiers."""
    named = backbone.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def as_timm(backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by timm's names: as they are, or as timm translates those that a model's authors published."""
    if backbone.state_dict().keys() == {key for key in tensors if not key.startswith(heads_of(backbone))}:
        return tensors
    translate: Any = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return tensors
    try:
        return translate(dict(tensors), backbone)
    except (KeyError, IndexError, RuntimeError, ValueError, AttributeError, TypeError):
        return tensors  # of another model: what is missing is said where they are held against it


def _list(what: str, names: set[str]) -> str:
    shown = sorted(names)
    return f"{len(shown)} {what}" + (f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if shown else "")


def _encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the encoder, under timm's names."""
    for prefix in ("encoder.backbone.", "encoder."):
        if any(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {n: v for n, v in state.items() if n != "mask_token" and not n.startswith("decoder_")}


def _resample_positions(
    state: dict[str, Tensor],
    metadata: dict[str, str],
    backbone: Backbone,
    path: str | os.PathLike[str],
    antialias: bool,
) -> Tensor:
    """The file's position table on the backbone's grid of patches; without metadata the file's grid was square."""
    table, new = state["pos_embed"], tuple(backbone.patch_embed.grid_size)
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    patches = table.shape[1] - prefix
    if IMAGE_SIZE in metadata:
        patch = state["patch_embed.proj.weight"].shape[2:]
        old = tuple(pixels // side for pixels, side in zip(json.loads(metadata[IMAGE_SIZE]), patch, strict=True))
    else:
        old = (math.isqrt(patches),) * 2
    if old[0] * old[1] != patches:
        raise CheckpointError(f"{path}: the position table holds {patches} patches, which are not {old[0]}x{old[1]}")
    if old == new:
        return table
    size = {"new_size": list(new), "old_size": list(old)}
    return resample_abs_pos_embed(table, **size, num_prefix_tokens=prefix, antialias=antialias)
