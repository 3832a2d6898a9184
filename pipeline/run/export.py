"""Weights for others: the encoder as timm loads it, and the whole objective, as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.exitcodes import FINISHED
from pipeline.config.schema import Weights
from pipeline.core.errors import ConfigError
from pipeline.dist.group import process_group
from pipeline.engine.fragments import MODEL
from pipeline.nn.encoder import EncoderConfig, ImageEncoder
from pipeline.nn.weights import IMAGE_SIZE, export_encoder, save
from pipeline.run.evaluate import find_checkpoint
from pipeline.run.weights import restore

ENCODER = "encoder.safetensors"
WHOLE = "objective.safetensors"


def export(
    run: str,
    checkpoint: str | None,
    out: str,
    image_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
    weights: Weights = MODEL,
) -> int:
    """Write both files into the folder ``out`` and say how the encoder is loaded.

    Args:
        run: run folder.
        checkpoint: one of its checkpoints; None: the newest whole one.
        out: folder, made if need be.
        image_size: height and width that the encoder is resampled to; None: as it was trained.
        patch_size: likewise, of a patch.
        weights: as trained ("model") or averaged, see :func:`pipeline.run.weights.load_weights`.

    Raises:
        ConfigError: the objective has no timm encoder, or one that cannot be resampled.
        CheckpointError: no such checkpoint, or a damaged one.
    """
    with process_group(timeout_minutes=10) as place:
        saved = find_checkpoint(Path(run), checkpoint, place)
        config, facts, objective = restore(saved, place.rank, weights)
    encoder, settings = objective.encoders().get("image"), getattr(objective, "config", None)
    if not isinstance(encoder, ImageEncoder) or not isinstance(settings, EncoderConfig):
        raise ConfigError(f"objective {config.objective.name!r} has no timm encoder to export")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    args = export_encoder(
        folder / ENCODER,
        settings,
        encoder,
        facts.image_size,
        new_image_size=image_size,
        new_patch_size=patch_size,
    )
    made = {"step": str(saved.step), "config": config.model_dump_json(), IMAGE_SIZE: json.dumps(facts.image_size)}
    save(folder / WHOLE, objective.state_dict(), made)
    shown = "".join(f", {name}={value!r}" for name, value in args.items())
    print(f"timm.create_model({settings.encoder!r}, checkpoint_path={str(folder / ENCODER)!r}{shown})")
    print(f"input: RGB / 255, mean {settings.mean}, std {settings.std}")
    return FINISHED
