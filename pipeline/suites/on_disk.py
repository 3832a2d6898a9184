"""What folders and files hold that might be evaluated, as far as their names and first bytes tell. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckpointError

CONFIG, CHECKPOINT = "config.toml", "checkpoint.json"
"""By which a run and a checkpoint are known."""
CHECKPOINTS, PREFIX = "checkpoints", "step-"
OBJECTIVE, ENCODER, OPEN_CLIP = "objective.safetensors", "encoder.safetensors", "open_clip_config.json"
"""By which an export is known, the fullest first."""
_LONGEST = 100 * 1024**2
"""Bytes of a header of safetensors, the format's own limit."""


def steps_of(run: Path) -> dict[int, Path]:
    """The checkpoints of a run, oldest first. They may vanish at any time."""
    folders = (run / CHECKPOINTS).glob(f"{PREFIX}*")
    found = {f.name.removeprefix(PREFIX): f for f in folders if (f / CHECKPOINT).is_file()}
    return dict(sorted((int(name), folder) for name, folder in found.items() if name.isdecimal()))


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint lies in; itself, when it was taken out of its run."""
    return next((folder for folder in checkpoint.absolute().parents if (folder / CONFIG).is_file()), checkpoint)


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint, whatever its folder is called; None: its manifest cannot be read."""
    state = _manifest(checkpoint).get("state")
    step: Any = state.get("step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def averages_of(checkpoint: Path) -> list[str] | None:
    """Names of the averages of the weights that a checkpoint holds; None: its manifest cannot be read."""
    tensors = _manifest(checkpoint).get("tensors")
    if not isinstance(tensors, dict):
        return None
    return sorted({kind for name in tensors if (kind := str(name).partition("/")[0]).startswith("ema")})


def _manifest(checkpoint: Path) -> dict[str, Any]:
    """Not verified: that is done when it is opened."""
    try:
        body = json.loads((checkpoint / CHECKPOINT).read_bytes())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def exported(folder: Path) -> Path | None:
    """The file that says most of what was exported into a folder; None: nothing was."""
    return next((folder / n for n in (OBJECTIVE, ENCODER, OPEN_CLIP) if (folder / n).is_file()), None)


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size)) if size <= _LONGEST else None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is damaged or no safetensors file")
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}
