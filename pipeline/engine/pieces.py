"""Reading fragments back from any set of files, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from pipeline.core.errors import CheckpointError
from pipeline.engine.fragments import Fragment


def fill(fragments: list[Fragment], files: list[Path]) -> None:
    """Copy values into ``fragments`` from safetensors files whose keys are ``NAME@START``.

    Files are opened in the order given, until every element is there.

    Raises:
        CheckpointError: the files do not hold every element.
    """
    missing = {(f.name, f.start): f.data.numel() for f in fragments}
    wanted: dict[str, list[Fragment]] = {}
    for fragment in fragments:
        wanted.setdefault(fragment.name, []).append(fragment)
    for path in files:
        if not any(missing.values()):
            return
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                name, _, start = key.rpartition("@")
                for fragment in wanted.get(name, ()):
                    if missing[fragment.name, fragment.start]:
                        copied = _copy(fragment, file.get_slice(key), int(start))
                        missing[fragment.name, fragment.start] -= copied
    lacking = sorted({name for (name, _), count in missing.items() if count})
    if lacking:
        raise CheckpointError(f"the checkpoint lacks parts of {', '.join(lacking[:5])} ({len(lacking)} tensors)")


def _copy(fragment: Fragment, stored: object, start: int) -> int:
    """Copy the overlap of a stored piece that begins at element ``start``; returns the number of elements."""
    count = stored.get_shape()[0]  # type: ignore[attr-defined]
    first = max(fragment.start, start)
    end = min(fragment.start + fragment.data.numel(), start + count)
    if first >= end:
        return 0
    values = stored[first - start : end - start]  # type: ignore[index]
    fragment.data[first - fragment.start : end - fragment.start].copy_(values)
    return end - first
