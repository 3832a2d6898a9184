"""Weights for others: the whole objective as safetensors, its encoder as timm loads it, and what it offers itself."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.exitcodes import FINISHED
from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file
from pipeline.core.protocols import Export
from pipeline.dist.group import process_group
from pipeline.engine.fragments import MODEL
from pipeline.nn import cifar_resnets
from pipeline.nn.encoder import EncoderConfig, ImageEncoder
from pipeline.nn.weights import FACTS, IMAGE_SIZE, export_encoder, save
from pipeline.record.console import say
from pipeline.run.weights import Restored, parse_weights, restore

ENCODER = "encoder.safetensors"
WHOLE = "objective.safetensors"
TOKENIZER = "tokenizer"
"""Key of its metadata that holds the tokenizer's file, where there is one."""


def export(
    run: str,
    checkpoint: str | None,
    out: str,
    image_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
    weights: str = MODEL,
) -> int:
    """Write the files into the folder ``out`` and say how they are loaded.

    Args:
        run: run folder.
        checkpoint: one of its checkpoints; None: the newest whole one.
        out: folder, made if need be.
        image_size: height and width that the encoder is resampled to; None: as it was trained.
        patch_size: likewise, of a patch.
        weights: as on a command line, see :func:`pipeline.run.weights.parse_weights`.

    Raises:
        ConfigError: an encoder that cannot be resampled was to be; no such weights.
        CheckpointError: no such checkpoint, or a damaged one.
    """
    with process_group(timeout_minutes=10) as place:
        trained = restore(Path(run), checkpoint, place, parse_weights(weights))
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}; name another") from error
    _write_encoder(trained, folder, image_size, patch_size)
    objective, config, facts, saved = trained
    made = {"step": str(saved.step), "config": config.model_dump_json(), IMAGE_SIZE: json.dumps(facts.image_size)}
    made[FACTS] = json.dumps(facts.plain())
    if saved.state.get("tokenizer") is not None:
        made[TOKENIZER] = saved.state["tokenizer"]
    save(folder / WHOLE, objective.state_dict(), made)
    say(f"{folder / WHOLE}: all weights of objective {config.objective.name!r}")
    for name, offered in objective.exports().items():
        write(folder / name, offered)
    return FINISHED


def _write_encoder(
    trained: Restored, folder: Path, image_size: tuple[int, int] | None, patch_size: tuple[int, int] | None
) -> None:
    """The image encoder for timm, if the objective has one."""
    encoder, settings = trained.objective.encoders().get("image"), getattr(trained.objective, "config", None)
    inner = next((m for m in encoder.modules() if isinstance(m, ImageEncoder)), None) if encoder is not None else None
    if inner is None or not isinstance(settings, EncoderConfig):
        if image_size or patch_size:
            raise ConfigError(f"objective {trained.config.objective.name!r} has no timm encoder to resample")
        return
    args = export_encoder(
        folder / ENCODER,
        settings,
        inner,
        trained.facts.image_size,
        new_image_size=image_size,
        new_patch_size=patch_size,
    )
    shown = "".join(f", {name}={value!r}" for name, value in args.items())
    first = f"import {cifar_resnets.__name__}; " if settings.encoder in cifar_resnets.SHAPES else ""
    say(f"{first}timm.create_model({settings.encoder!r}, checkpoint_path={str(folder / ENCODER)!r}{shown})")
    say(f"input: RGB / 255, mean {settings.mean}, std {settings.std}")


def write(path: Path, offered: Export) -> None:
    """Write one file that an objective offers, or say why there is none."""
    if offered.content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(offered.content, str):
            replace_file(path, offered.content.encode())
        else:
            save(path, offered.content, offered.metadata)
    say(f"{path}: {offered.note}")
