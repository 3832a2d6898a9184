"""Tensors in a file, as safetensors."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors into a file that others may read and write as any other file of this process.

    By itself safetensors makes one for its owner alone, whatever the umask says.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    if path.stat().st_mode != mode:
        path.chmod(stat.S_IMODE(mode))
