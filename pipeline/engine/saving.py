"""Saving: a copy at the step, the rest while training goes on.

1. At the step, on all ranks together: what was being written before is finished, rank 0 clears what a crash may have
   left, and every rank copies its fragments to host memory (pinned where there is a GPU). Training goes on.
2. A thread of every rank writes the copy to ``step-N.tmp/rank-R.safetensors``, fsyncs and hashes it.
3. With every update the ranks tell each other how far they are (:mod:`pipeline.engine.watch`). When all have written,
   they gather what they wrote; if any failed, all raise in the same step and the old checkpoints are untouched.
4. A thread of rank 0 writes ``checkpoint.json`` (files, hashes, tensors, clock, stream), fsyncs, renames the folder to
   ``step-N``, fsyncs the parent, replaces ``latest``, and removes what is older than the ``keep`` newest whole ones.
   Checkpoints of a series stay; of those, when they are so old, only the optimizer's state goes (see :class:`Series`).
5. With a later update all ranks know that it is there.

A crash at any moment leaves the checkpoints before it, or the new one, whole. One save is in flight at a time; a run
that ends or stops waits for its last one. No thread takes part in a collective.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import CheckpointError
from pipeline.core.files import replace_file, room, sync_folder
from pipeline.core.tensors import write_tensors
from pipeline.dist.group import gather_objects
from pipeline.engine.checkpoint import (
    LATEST,
    MANIFEST,
    PREFIX,
    THIN,
    CheckpointStore,
    file_of,
    manifest_text,
    read_manifest,
    sha256_of,
)
from pipeline.engine.fragments import OPTIMIZER, Fragment, Spec

FAILED = -1


class Written(NamedTuple):
    """One rank's part of a checkpoint, durable on disk."""

    name: str
    bytes: int
    sha256: str
    tensors: dict[str, Spec]
    """That the fragments are parts of."""


def write_fragments(path: Path, fragments: Iterable[Fragment]) -> dict[str, Spec]:
    """Write fragments in host memory, durably. Returns the tensors that they are parts of."""
    tensors = {f"{f.name}@{f.start}": f.data for f in fragments}
    specs = {f.name: Spec(f.shape, str(f.data.dtype)[6:]) for f in fragments}
    write_tensors(path, tensors)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return specs


@dataclass(frozen=True)
class Series:
    """Checkpoints that stay: for curves over training, and for averages that are made afterwards."""

    every: Fraction
    """Updates from one to the next."""
    optimizer: bool
    """Whether they keep the optimizer's state, and with it the possibility to go on from them."""

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of a step is one of them; as an action of this period is due."""
        return bool(self.every) and math.ceil(step // self.every * self.every) == step


class Task(threading.Thread):
    """Work in the background, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(name="saving", daemon=True)
        self._work = work
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Do the work; an error is raised later, by all ranks together."""
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error


@dataclass
class _Flight:
    """The save that is under way."""

    step: int
    state: dict[str, Any]
    task: Task
    written: bool = False
    """All ranks have written, and rank 0 publishes."""


class Saver:
    """Saves checkpoints in the background. All ranks call its methods in the same order and at the same steps.

    Args:
        store: where they go.
        keep: newest whole checkpoints that are kept.
        saved: called on every rank with the step of a checkpoint that is there.
        series: which of the older ones are kept; None: none.
    """

    def __init__(
        self, store: CheckpointStore, keep: int, saved: Callable[[int], None], series: Series | None = None
    ) -> None:
        self.store = store
        self.place = store.place
        self.keep = keep
        self.saved = saved
        self.series = series
        self.pinned: set[int] = set()
        """Steps whose checkpoints stay whole, the best one's: the same on every rank."""
        self.last: int | None = None
        """The step that was saved last, since the run was started."""
        self._host: dict[str, Tensor] = {}
        """Memory for copies, kept from save to save."""
        self._flight: _Flight | None = None
        self._stages = 0
        """Stages (written, published) that all ranks have finished, since the run was started."""

    @property
    def progress(self) -> int:
        """Stages that this rank has finished, or FAILED: what it tells the others with every update."""
        if self._flight is None or self._flight.task.is_alive():
            return self._stages
        return FAILED if self._flight.task.error else self._stages + 1

    def told(self, progress: Sequence[int]) -> None:
        """Go on, when all ranks have finished a stage. ``progress`` is every rank's, the same on all.

        Raises:
            CheckpointError: on every rank, if one could not write.
        """
        if self._flight is not None and (FAILED in progress or min(progress) > self._stages):
            self._advance(self._flight)

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Copy the fragments, and begin to write them.

        Args:
            step: updates done.
            fragments: what this rank writes; over all ranks, every element once.
            state: clock, stream and the like: plain JSON values.

        Raises:
            CheckpointError: on every rank, if one could not write this or the checkpoint before.
        """
        self.finish()
        temporary = self._temporary(step)
        problem = None
        if self.place.first:
            try:
                for left_over in self.store.folder.glob(PREFIX + "*.tmp"):
                    shutil.rmtree(left_over)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = error
        self._agree(step, None, problem)
        copies = self._copy(fragments)
        self.last = step
        self._flight = _Flight(step, state, Task(lambda: self._write(temporary, step, copies)))

    def finish(self) -> None:
        """Wait until what is being written is there.

        Raises:
            CheckpointError: on every rank, if one could not write.
        """
        while self._flight is not None:
            self._advance(self._flight)

    def _temporary(self, step: int) -> Path:
        final = self.store.path(step)
        return final.with_name(final.name + ".tmp")

    def _copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        copies: list[Fragment] = []
        for f in fragments:
            key = f"{f.name}@{f.start}"
            host = self._host.get(key)
            if host is None or (host.shape, host.dtype) != (f.data.shape, f.data.dtype):
                host = torch.empty(f.data.shape, dtype=f.data.dtype, pin_memory=f.data.is_cuda)
                self._host[key] = host
            copies.append(f._replace(data=host.copy_(f.data.detach(), non_blocking=True)))
        if self.place.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, temporary: Path, step: int, copies: Sequence[Fragment]) -> list[Written]:
        """Write a rank's file; or two, where the optimizer's state is to go before the rest."""
        own = file_of(self.place.rank)
        parts = {own: copies}
        if self.series is not None and self.series.holds(step) and not self.series.optimizer:
            of_optimizer = [f.name.startswith(f"{OPTIMIZER}/") for f in copies]
            parts = {
                own: [f for f, it_is in zip(copies, of_optimizer, strict=True) if not it_is],
                f"{OPTIMIZER}-{own}": [f for f, it_is in zip(copies, of_optimizer, strict=True) if it_is],
            }
        written: list[Written] = []
        for name, fragments in parts.items():
            specs = write_fragments(temporary / name, fragments)
            written.append(Written(name, (temporary / name).stat().st_size, sha256_of(temporary / name), specs))
        return written

    def _advance(self, flight: _Flight) -> None:
        """End a stage: all ranks hear how it went for each, and the next one begins."""
        flight.task.join()
        results = self._agree(flight.step, flight.task.result, flight.task.error)
        self._stages += 1
        if not flight.written:
            flight.written = True
            parts: list[Written] = [part for of_rank in results for part in of_rank]
            flight.task = Task(lambda: self._publish(flight, parts) if self.place.first else None)
        else:
            self._flight = None
            self.saved(flight.step)

    def _publish(self, flight: _Flight, parts: Sequence[Written]) -> None:
        temporary, final = self._temporary(flight.step), self.store.path(flight.step)
        facts = {
            "files": {p.name: {"bytes": p.bytes, "sha256": p.sha256} for p in parts},
            "tensors": {n: [list(s.shape), s.dtype] for p in parts for n, s in p.tensors.items()},
            "state": flight.state,
        }
        replace_file(temporary / MANIFEST, manifest_text(facts))
        if final.exists():  # of an earlier attempt, passed over as damaged
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(self.store.folder)
        replace_file(self.store.folder / LATEST, f"{final.name}\n".encode())
        self.store.damaged.discard(flight.step)
        steps = self.store.steps()
        kept = [step for step in steps if step not in self.store.damaged][-self.keep :]
        for old in (step for step in steps if step < kept[0]):
            # What cannot go now, as when somebody reads it over NFS, goes another time: the new one is there.
            if old in self.pinned:
                continue
            if self.series is None or not self.series.holds(old):
                shutil.rmtree(self.store.path(old), ignore_errors=True)
            elif not self.series.optimizer:
                with suppress(OSError, CheckpointError):
                    thin(self.store.path(old))

    def _agree(self, step: int, result: Any, error: Exception | None) -> list[Any]:
        """Every rank's result; if one had an error, all raise, after the half checkpoint is out of the way."""
        problem = None if error is None else f"rank {self.place.rank}: {error}"
        outcomes = gather_objects((result, problem))
        problems = [p for _, p in outcomes if p is not None]
        if not problems:
            return [r for r, _ in outcomes]
        self._flight = None
        full = room(self.store.folder.parent)
        if self.place.first:  # what cannot be removed now is removed by the next save
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} in {self.store.folder}: {'; '.join(problems)} ({full}). "
            "Older checkpoints are untouched; make room or mend the folder and start again to resume"
        ) from error


def thin(folder: Path) -> None:
    """Take the optimizer's state out of a checkpoint whose ranks have written it into files of their own.

    The manifest goes first, so that a crash leaves files that belong to nothing, which the next call removes.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    saved = read_manifest(folder)
    files = {name: facts for name, facts in saved.files.items() if not name.startswith(f"{OPTIMIZER}-")}
    if files != saved.files:
        facts = {
            "files": files,
            "tensors": {
                n: [list(s.shape), s.dtype] for n, s in saved.tensors.items() if not n.startswith(f"{OPTIMIZER}/")
            },
            "state": saved.state | {THIN: True},
        }
        replace_file(folder / MANIFEST, manifest_text(facts))
    for left_over in folder.glob(f"{OPTIMIZER}-*"):
        left_over.unlink()
