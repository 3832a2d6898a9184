"""Many runs side by side, from small files of their folders: settings, how far they are, what was measured, notes.

Nothing is opened that was not asked for: a list of a thousand runs opens a few files of each, and a configuration is
read only where a condition, an order or a column names one of its settings.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.changes import ABSENT, flat
from pipeline.config.provenance import CONFIG_FILE
from pipeline.core.errors import DataError


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's settings by their whole names, "optimizer.lr"; none where it has not got so far.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        return flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); mend it") from error


def config_differences(folders: Sequence[str | os.PathLike[str]]) -> dict[str, tuple[Any, ...]]:
    """The settings in which runs differ, by name; their folders are no difference.

    Args:
        folders: of the runs.

    Returns:
        Of each such setting its values, in the order of ``folders``; :data:`pipeline.config.changes.ABSENT` where a
        run has not got it.

    Raises:
        DataError: a configuration is damaged.
    """
    configs = [read_config(folder) for folder in folders]
    names = sorted({name for config in configs for name in config} - {"run.folder"})
    values = {name: tuple(config.get(name, ABSENT) for config in configs) for name in names}
    # As texts too: 1 is not 1.0, nor is it true.
    return {name: found for name, found in values.items() if len({(type(v), repr(v)) for v in found}) > 1}
