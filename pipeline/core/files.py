"""Files that hold the old content or the new, whatever happens while they are written. Nothing heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that at any moment, also after a crash, the name holds the old content or all of the new."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(path: Path) -> str | None:
    """Changes whenever the file is replaced or written to; None: there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return f"{facts.st_ino}:{facts.st_mtime_ns}"


def room(folder: Path) -> str:
    """How full the disk is, in words: its bytes, and the number of files that it has room for when that is what lacks.

    ``folder`` exists.
    """
    facts = os.statvfs(folder)
    mount = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.is_mount())
    free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    text = f"the disk at {mount} has {free / 1e9:.3f} GB free of {total / 1e9:.3f} GB"
    if facts.f_files and not facts.f_favail:
        text += f", and no room for another file: all its {facts.f_files:,} inodes are in use"
    return text
