"""``sluice prep embed``: what a run's teachers make of every sample and augmentation, computed once and stored.

For each field of the kind "stored" the data set of its sidecar is written. Shards are shared out to the ranks, and
batches are cut within a shard, so that the same bytes come out at any number of ranks; what is finished stays when this
is killed. Shape letters: B samples, A augmentations.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from data_prep.progress import Progress
from data_prep.sidecar import SidecarWriter
from pipeline.config.exitcodes import FINISHED
from pipeline.config.load import load_run
from pipeline.config.schema import Data, RunConfig
from pipeline.core import registry
from pipeline.core.components import OBJECTIVES, check_component
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Joined, Manifest, load
from pipeline.core.protocols import DataFacts, Objective
from pipeline.data import outputs
from pipeline.data.assemble import Assembler, Bad
from pipeline.data.chance import sample_keys
from pipeline.data.dataset import keys_of, open_data
from pipeline.data.facts import facts
from pipeline.data.outputs import KIND, LOGITS, Layout
from pipeline.data.reading import AugmentedReading
from pipeline.data.stream import assemble_here
from pipeline.data.workers import Workers
from pipeline.dist.group import Place, by_all, by_first, gather_objects, process_group
from pipeline.nn.teacher import StoresOutputs
from pipeline.nn.weights import no_initial_weights
from pipeline.record.console import say
from pipeline.run import frozen

SHARD = 1000
"""Samples of a shard."""


@dataclass(frozen=True)
class Asked:
    """What is asked for on the command line."""

    top: int | None = None
    """Logits that are stored; None: all."""
    precision: str = "float16"
    """Of what is stored: or "float32"."""


def embed(path: str, overrides: Sequence[str], asked: Asked) -> int:
    """Store the outputs of all teachers for which the configuration names a field.

    Raises:
        ConfigError: no teacher's outputs are to be stored, or they cannot be.
        DataError: the data cannot be read.
    """
    config = load_run(path, overrides)
    with process_group(config.engine.timeout_minutes) as place, ExitStack() as stack:
        settings = check_component(OBJECTIVES, config.objective, path, ("objective",))
        if not isinstance(settings, StoresOutputs) or not (wanted := settings.stored()):
            raise ConfigError(
                f"{path}: no teacher has 'stored', the name of the field that its outputs are read from; set it, add "
                'that to data.fields, and write [data.field.NAME] name = "stored" and [data.sidecar.NAME]'
            )
        places = _places(config, wanted)
        data = _without(config.data, set(wanted.values()))
        manifest = by_first(lambda: open_data(data))
        if isinstance(manifest, Joined):
            raise ConfigError("data.train: outputs are joined to one data set, and there are several; embed each alone")
        known = facts(data, manifest)
        objective, origins = _teachers(config, settings, known)
        objective.to(place.device)
        work = _Work(config, data, manifest, objective, place)
        widths = work.widths()
        for teacher, field in wanted.items():
            made = {
                outputs.MADE: _made(config, data, asked, widths[teacher], _told(settings, teacher, known, origins)),
                "of": {"samples": manifest.samples, "fingerprint": manifest.fingerprint},
            }
            shards = -(-manifest.samples // SHARD)
            writer = stack.enter_context(closing(SidecarWriter(places[field], made, shards)))
            if by_first(partial(_serves, places[field], made[outputs.MADE], manifest)) or by_first(writer.begin):
                _say(place, f"{places[field]}: complete already")
                continue
            bad = work.write(teacher, writer, Layout(widths[teacher], _top(asked, widths[teacher])), asked.precision)
            gathered = [one for own in gather_objects(bad) for one in own]
            done = by_first(writer.finish)
            _say(
                place, f"{places[field]}: {done.samples:,} samples x {work.augmentations}, {', '.join(widths[teacher])}"
            )
            if gathered:
                first = gathered[0]
                _say(
                    place,
                    f"{len(gathered)} samples cannot be read and have no outputs; first {first.key!r}: {first.reason}. "
                    f'Set data.sidecar.{field}.missing = "allow", and training replaces them as it does bad ones',
                )
    return FINISHED


def _serves(path: str, made: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether outputs that are stored already, perhaps of a larger part of the data set, have all of its samples."""
    try:
        there = load(path)
    except DataError:
        return False  # nothing, or not finished
    return there.made.get(outputs.MADE) == made and bool(np.isin(sample_keys(manifest), keys_of(there)).all())


def _say(place: Place, text: str) -> None:
    if place.first:
        say(text)


def _places(config: RunConfig, wanted: dict[str, str]) -> dict[str, str]:
    """Where the outputs of each field are written."""
    found: dict[str, str] = {}
    for teacher, field in wanted.items():
        component = config.data.field.get(field)
        if field not in config.data.fields or component is None or component.name != KIND:
            raise ConfigError(
                f"objective.teachers.{teacher}: stored = {field!r} is no field of stored outputs; add {field!r} to "
                f'data.fields, and [data.field.{field}] name = "stored"'
            )
        sidecar = component.settings.get("sidecar", field)
        if sidecar not in config.data.sidecar:
            raise ConfigError(f"data.field.{field}: add [data.sidecar.{sidecar}], with the path to write to")
        found[field] = config.data.sidecar[sidecar].path
    return found


def _without(data: Data, stored: set[str]) -> Data:
    """The data as it is before the outputs are there."""
    fields = tuple(name for name in data.fields if name not in stored)
    sides = {data.field[name].settings.get("sidecar", name) for name in stored}
    return data.model_copy(
        update={
            "fields": tuple(name for name in fields if name in ("image", "text")),
            "field": {},
            "sidecar": {name: side for name, side in data.sidecar.items() if name not in sides},
            "beside": {},
            "decode": "loader",
        }
    )


def _teachers(config: RunConfig, settings: StoresOutputs, known: DataFacts) -> tuple[Objective, frozen.Origins]:
    """The objective with its teachers filled, to compute."""
    with no_initial_weights():
        objective = cast("Any", registry.component(OBJECTIVES, config.objective.name, Objective))(
            settings.live(), known
        )
    return objective.eval(), frozen.fill(objective)


def _told(settings: StoresOutputs, teacher: str, known: DataFacts, origins: frozen.Origins) -> dict[str, Any]:
    """What decides a teacher's outputs, by its own words and its file's hash."""
    config = settings.teachers[teacher]
    return config.described(known.image_size) | origins[f"teachers.{teacher}"]


def _top(asked: Asked, widths: dict[str, int]) -> int | None:
    """How many logits are stored; None: all, since there are no more."""
    return asked.top if asked.top is not None and asked.top + 1 < widths.get(LOGITS, 0) else None


def _made(config: RunConfig, data: Data, asked: Asked, widths: dict[str, int], told: dict[str, Any]) -> dict[str, Any]:
    """What the stored outputs will say of themselves."""
    captions = data.captions.model_dump(mode="json", exclude={"tokenizer"}) if "text" in data.fields else None
    return {
        "teacher": told,
        "outputs": widths,
        "top": _top(asked, widths),
        "stored_as": asked.precision,
        "computed_in": config.engine.precision,
        "augmentations": data.augmentations or 1,
        "augmentation_seed": data.augmentation_seed,
        "image": outputs.plain(data.image),
        "captions": captions,
    }


class _Row(NamedTuple):
    """What is stored of a sample."""

    number: int
    """In the data set."""
    members: list[tuple[str, bytes]]


class _Work:
    """What all teachers of a run have in common, on one rank."""

    def __init__(self, config: RunConfig, data: Data, manifest: Manifest, objective: Objective, place: Place) -> None:
        if data.augmentations is None and (data.image.crop == "random_resized" or "text" in data.fields):
            raise ConfigError(
                "data.augmentations: without it samples are cropped anew in every epoch, and outputs cannot be stored; "
                "set how many augmentations of a sample there are to be"
            )
        self.config, self.data, self.manifest, self.objective, self.place = config, data, manifest, objective, place
        self.augmentations = data.augmentations or 1
        self.batch = max(1, config.engine.micro_batch // self.augmentations)

    def widths(self) -> dict[str, dict[str, int]]:
        """Of each output of each teacher, seen on one sample."""
        reading = self._reading([0], limit=1)
        assembler = Assembler(self.manifest, self.data, self.config.run.seed, reading)
        with closing(assembler):
            batch = next(assemble_here(assembler, 0)).batch
        return {
            teacher: {name: rows.shape[1] for name, rows in found.items()}
            for teacher, found in self._taught(batch).items()
        }

    def _reading(self, shards: Sequence[int], limit: int | None = None) -> AugmentedReading:
        """Batches of some shards, none of which reaches into another."""
        bounds: list[tuple[int, int]] = []
        for shard in shards:
            end = min((shard + 1) * SHARD, self.manifest.samples)
            bounds += [(first, min(first + self.batch, end)) for first in range(shard * SHARD, end, self.batch)]
        if limit is not None:
            bounds = [(0, limit)]
        return AugmentedReading(
            np.array(bounds, np.int64).reshape(-1, 2),
            self.augmentations,
            self.batch * self.augmentations,
            self.manifest.samples,
        )

    @torch.no_grad()
    def _taught(self, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        moved = {name: value.to(self.place.device) for name, value in batch.items()}
        half = self.config.engine.precision == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=half):
            return self.objective.taught(moved)

    def write(self, teacher: str, writer: SidecarWriter, layout: Layout, precision: str) -> list[Bad]:
        """This rank's part of the shards that are left.

        Returns:
            Samples that cannot be read, each once.
        """
        left = by_first(writer.left)[self.place.rank :: self.place.world_size]
        bad: dict[int, Bad] = {}

        def work() -> None:
            keys = sample_keys(self.manifest)
            with Progress("embedding", len(left), "shards") if self.place.first else nullcontext() as progress:
                rows = self._rows(left, teacher, layout, precision, bad)
                for done, (shard, group) in enumerate(groupby(rows, lambda row: row.number // SHARD), 1):
                    own = [row for row in group if row.number not in bad]
                    writer.write(shard, [keys[row.number].decode() for row in own], [row.members for row in own])
                    if progress is not None:
                        progress.update(done)

        by_all(work)
        return list(bad.values())

    def _rows(
        self, shards: Sequence[int], teacher: str, layout: Layout, precision: str, bad: dict[int, Bad]
    ) -> Iterator[_Row]:
        """Every sample of some shards, also those that turn out to be bad."""
        reading = self._reading(shards)
        assembler = Assembler(self.manifest, self.data, self.config.run.seed, reading)
        workers = Workers(assembler, self.data.workers) if self.data.workers and shards else None
        with closing(workers) if workers else nullcontext(), closing(assembler):
            made = workers.batches(0) if workers else assemble_here(assembler, 0)
            for number, one in enumerate(made):
                bad |= {line.id: line for line in one.filled.bad}
                found = {name: x.float().cpu().numpy() for name, x in self._taught(one.batch)[teacher].items()}
                rows, classes = layout.pack(found, precision)
                for first, sample in enumerate(range(*reading.bounds[number].tolist())):
                    own = slice(first * self.augmentations, (first + 1) * self.augmentations)
                    top = [] if classes is None else [(outputs.CLASSES, _npy(classes[own]))]
                    yield _Row(sample, [(outputs.MEMBER, _npy(rows[own])), *top])


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
