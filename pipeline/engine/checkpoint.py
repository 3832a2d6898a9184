"""Checkpoints: a folder that is either whole or not there.

Saving, on all ranks together:

1. every rank writes its fragments to ``step-N.tmp/rank-R.safetensors``, and hashes and fsyncs it;
2. the ranks tell each other how it went; if any failed, all raise and the old checkpoints are untouched;
3. rank 0 writes ``checkpoint.json`` (files, hashes, tensors, clock, stream), fsyncs, renames the folder to ``step-N``
   and fsyncs the parent;
4. rank 0 replaces ``latest`` (for people; reading goes by the folders), and removes what is more than ``keep`` old;
5. the ranks meet again, so that nobody runs ahead of a checkpoint that is not there yet.

Reading takes the newest folder whose hashes hold, says which it passed over and why, and never starts from nothing
while there is a checkpoint. It works at any world size and from any engine (see :mod:`pipeline.engine.fragments`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import save_file
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.dist.group import Place, from_first, gather_objects
from pipeline.engine.fragments import Fragment, Spec
from pipeline.engine.pieces import fill

R = TypeVar("R")

FORMAT = "sluice-checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
LATEST = "latest"
PREFIX = "step-"


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
        """Updates done when it was made."""
        return int(self.folder.name.removeprefix(PREFIX))

    def fill(self, fragments: Iterable[Fragment], rank: int) -> None:
        """Copy the checkpoint's values into live fragments."""
        names = sorted(self.files)
        first = rank % len(names)  # at the world size of the save, all that a rank needs is in its own file
        fill(list(fragments), [self.folder / n for n in names[first:] + names[:first]])


def sync_folder(folder: Path) -> None:
    """Make names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file, durably and at once."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> dict[str, Spec]:
    """Write one rank's fragments, durably. Returns the tensors that they are parts of."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, Spec] = {}
    for f in fragments:
        data = f.data.detach().cpu()
        # counts of steps may share one tensor among many parameters, which safetensors refuses
        tensors[f"{f.name}@{f.start}"] = data.clone() if f.shape == () else data
        specs[f.name] = Spec(f.shape, str(f.data.dtype)[6:])
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return specs


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, place: Place, keep: int, say: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.place = place
        self.keep = keep
        self.say = say

    def steps(self) -> list[int]:
        """Steps of the checkpoint folders, oldest first."""
        names = [p.name.removeprefix(PREFIX) for p in self.folder.glob(PREFIX + "*") if p.is_dir()]
        return sorted(int(n) for n in names if n.isdigit())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint made after ``step`` updates."""
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Write a checkpoint, on all ranks together.

        Raises:
            CheckpointError: on every rank, if any could not write; older checkpoints are untouched.
        """
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        self._together("prepare", lambda: self._clear(temporary), first_only=True)
        name = f"rank-{self.place.rank:05d}.safetensors"

        def write() -> tuple[str, dict[str, Any], dict[str, Spec]]:
            specs = write_fragments(temporary / name, fragments)
            path = temporary / name
            return name, {"bytes": path.stat().st_size, "sha256": sha256_of(path)}, specs

        written = self._together("write", write)

        def publish() -> None:
            body = {
                "format": FORMAT,
                "version": VERSION,
                "files": {n: facts for n, facts, _ in written},
                "tensors": {n: [list(s.shape), s.dtype] for *_, specs in written for n, s in specs.items()},
                "state": state,
            }
            write_text(temporary / MANIFEST, json.dumps(body))
            if final.exists():  # of an earlier attempt, passed over as damaged
                shutil.rmtree(final)
            os.rename(temporary, final)
            sync_folder(self.folder)
            write_text(self.folder / LATEST, final.name + "\n")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))

        self._together("publish", publish, first_only=True)

    def _clear(self, temporary: Path) -> None:
        for left_over in self.folder.glob(PREFIX + "*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _together(self, what: str, work: Callable[[], R], first_only: bool = False) -> list[R]:
        """Do ``work`` on all ranks (or rank 0); raise on all if any failed. Returns every rank's result."""
        result, problem, cause = None, None, None
        if self.place.first or not first_only:
            try:
                result = work()
            except Exception as error:  # whatever it is, the other ranks must not wait for us
                problem, cause = f"rank {self.place.rank}: {error}", error
        outcomes = gather_objects((result, problem))
        problems = [p for _, p in outcomes if p is not None]
        if problems:
            raise CheckpointError(
                f"could not {what} the checkpoint in {self.folder}: {'; '.join(problems)}. "
                "Older checkpoints are untouched; make room or mend the folder and start again to resume."
            ) from cause
        return [cast("R", r) for r, _ in outcomes]

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, the same on every rank; None when there is none at all.

        Raises:
            CheckpointError: there are checkpoints but none is whole.
        """
        steps = from_first(self.steps())
        passed_over: list[str] = []
        for step in reversed(steps):
            saved, problem = self._read(self.path(step))
            problems = [p for p in gather_objects(problem) if p is not None]
            if not problems:
                assert saved is not None
                for line in passed_over:
                    self.say(line)
                return saved
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
        body = json.loads(path.read_text(encoding="utf-8"))
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
