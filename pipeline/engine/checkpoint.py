"""Checkpoints: a folder that is either whole or not there, how it is laid out, and how it is read.

``step-N/rank-R.safetensors`` holds fragments (:mod:`pipeline.engine.fragments`), ``step-N/checkpoint.json`` the files'
hashes, the tensors, the clock, the stream and its own hash; ``latest`` names the newest one for people. How it is
written, and why it is whole: :mod:`pipeline.engine.saving`.

Reading takes the newest folder whose hashes hold, says which it passed over and why, and never starts from nothing
while there is a checkpoint. It works at any world size and from any engine. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckpointError
from pipeline.dist.group import Place, from_first, gather_objects
from pipeline.engine.fragments import Fragment, Spec
from pipeline.engine.pieces import fill

FORMAT = "sluice-checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
LATEST = "latest"
PREFIX = "step-"
THIN = "thin"
"""In the state: the optimizer's is gone, so that nothing can go on from it."""
CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk."""

    folder: Path
    files: dict[str, dict[str, Any]]
    """File name to bytes and sha256."""
    tensors: dict[str, Spec]
    state: dict[str, Any]
    """Clock, stream and the like: plain JSON values."""

    @property
    def step(self) -> int:
        """Updates done when it was made, whatever its folder is called by now."""
        return int(self.state["step"])

    def fill(self, fragments: Iterable[Fragment], rank: int) -> None:
        """Copy the checkpoint's values into live fragments."""
        names = sorted(self.files, key=lambda name: (name.partition("rank-")[2], name))
        # At the world size of the save, all that a rank needs is in its own files.
        first = next((i for i, name in enumerate(names) if name.endswith(file_of(rank))), 0)
        fill(list(fragments), [self.folder / n for n in names[first:] + names[:first]])


def file_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(text: bytes) -> bytes:
    """The end of a manifest: the hash of its text without this end."""
    return f', "sha256": "{hashlib.sha256(text).hexdigest()}"}}'.encode()


def manifest_text(facts: Mapping[str, Any]) -> bytes:
    """A checkpoint's manifest. ``facts``: files, tensors and state, plain JSON values."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **facts}).encode().removesuffix(b"}")
    return text + _seal(text)


class CheckpointStore:
    """The checkpoints of one run, for reading.

    Args:
        folder: that holds them.
        place: of this rank.
        say: is told which checkpoints are passed over.
    """

    def __init__(self, folder: Path, place: Place, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.place = place
        self.say = say
        self.damaged: set[int] = set()
        """Steps of the checkpoints that were passed over."""

    def steps(self) -> list[int]:
        """Steps of the checkpoint folders, oldest first."""
        names = [p.name.removeprefix(PREFIX) for p in self.folder.glob(PREFIX + "*") if p.is_dir()]
        return sorted(int(n) for n in names if n.isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint made after ``step`` updates."""
        return self.folder / f"{PREFIX}{step:08d}"

    def newest(self, *, to_go_on: bool = False, before: int | None = None) -> Saved | None:
        """The newest whole checkpoint, the same on every rank; None when there is none at all.

        Args:
            to_go_on: pass over those whose optimizer's state is gone.
            before: a step; only older ones count.

        Raises:
            CheckpointError: there are checkpoints but none is whole.
        """
        steps = [step for step in from_first(self.steps()) if before is None or step < before]
        passed_over: list[str] = []
        for step in reversed(steps):
            saved, problem = self._read(self.path(step))
            if to_go_on and saved is not None and saved.state.get(THIN):
                saved, problem = None, "it is kept for evaluation and holds no optimizer's state to go on with"
            problems = [p for p in gather_objects(problem) if p is not None]
            if not problems:
                assert saved is not None
                for line in passed_over:
                    self.say(line)
                return saved
            self.damaged.add(step)
            passed_over.append(f"passed over checkpoint {self.path(step)}: {problems[0]}")
        if passed_over:
            raise CheckpointError(
                "no whole checkpoint is left; not starting from step 0. "
                + "; ".join(passed_over)
                + f". To start anew, move {self.folder} away."
            )
        return None

    def _read(self, folder: Path) -> tuple[Saved | None, str | None]:
        """Read a checkpoint's manifest and verify this rank's share of its files; or say what is wrong."""
        try:
            saved = read_manifest(folder)
            for index, (name, facts) in enumerate(sorted(saved.files.items())):
                if index % self.place.world_size == self.place.rank:
                    verify_file(folder / name, facts)
        except CheckpointError as error:
            return None, str(error)
        return saved, None


def read_manifest(folder: Path) -> Saved:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        body = json.loads(text)
        whole = text[: -len(_seal(b""))]
        if "sha256" in body and text != whole + _seal(whole):  # the first ones had none
            raise CheckpointError(f"{path} is changed: its sha256 does not fit")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CheckpointError(f"{path} is of version {body['version']}, this program reads {VERSION}")
        tensors = {n: Spec(tuple(shape), dtype) for n, (shape, dtype) in body["tensors"].items()}
        return Saved(folder, body["files"], tensors, body["state"])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def verify_file(path: Path, facts: dict[str, Any]) -> None:
    """Hold a file against its bytes and hash in the manifest.

    Raises:
        CheckpointError: missing, of another size, or changed.
    """
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise CheckpointError(f"{path.name} has {size} bytes of {facts['bytes']}")
        if sha256_of(path) != facts["sha256"]:
            raise CheckpointError(f"{path.name} is changed: its sha256 does not fit")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
