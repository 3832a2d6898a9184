"""Building a data set: records in, splits of verified shards out; atomic, resumable, the same bytes every time.

In the output folder: one data set per split (``train/``, ``val/``: tars, indexes, manifest.json, sizes.json),
``rejects.jsonl`` with every input that was not written, ``duplicates.jsonl`` where duplicates are reported,
``prints/`` where they are looked for, and ``build.json``, which says what was built and is written last. ``.build/``
holds the notes of an unfinished build.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep.dataset import DONE
from data_prep.duplicates import Seen, prints_name, unpack
from data_prep.fetch import Failed, fetched
from data_prep.keys import Keys
from data_prep.labels import check_kept
from data_prep.options import Options, differences
from data_prep.prepare import Sample, Task, prepared
from data_prep.record import Record, Source, split_of
from data_prep.shards import WORK, Note, SplitWriter, fields_of, finished, read_note
from data_prep.statistics import Statistics
from data_prep.store import Store, open_store
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE, SIZES, Manifest, Shard, ShardIndex, index_name, parse, parse_index, sizes_json

LOCK = f"{WORK}/lock"
REJECTS = "rejects.jsonl"
DUPLICATES = "duplicates.jsonl"


@dataclass
class Counts:
    """How far a build is. ``inputs = samples + rejects`` at all times."""

    inputs: int = 0
    samples: int = 0
    rejects: int = 0
    bytes: int = 0
    """Of the samples written since the start of this process."""
    resumed: int = 0
    """Inputs that finished shards covered already."""


@dataclass(frozen=True)
class Built:
    """The result of a build."""

    manifests: dict[str, Manifest]
    """Split name to data set."""
    counts: Counts


def build(
    source: Source,
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    append: bool = False,
    progress: Callable[[Counts], None] | None = None,
) -> Built:
    """Build ``out``, or go on where an interrupted build stopped; a build that is complete is only checked.

    Args:
        source: What to read.
        out: Folder or fsspec URL.
        options: What to do; the default keeps images as they are and puts 5 % into "val".
        append: Add the source's samples to a complete data set, as new shards.
        progress: Called after each input.

    Raises:
        ConfigError: ``out`` holds something else, or was made with other options.
        DataError: the input changed, cannot be read, or the output cannot be written.
    """
    store = open_store(out)
    try:
        return _Build(source, store, options or Options(), append, progress or (lambda counts: None)).run()
    except OSError as error:
        raise DataError(
            f"building {store.where} stopped: {error}. Finished shards are kept; "
            "mend the cause and give the same command to go on"
        ) from error
    finally:
        store.close()


class _Build:
    def __init__(
        self, source: Source, store: Store, options: Options, append: bool, progress: Callable[[Counts], None]
    ) -> None:
        self.source = source
        self.store = store
        self.options = options
        self.append = append
        self.progress = progress
        self.counts = Counts()
        self.seen = Seen(options.duplicates)
        self.writers: dict[str, SplitWriter] = {}
        self.parts: list[dict[str, Any]] = []
        self.bases: dict[str, Manifest] = {}
        self.begins = False
        """Nothing of this part was there yet."""

    def run(self) -> Built:
        names = self.source.classes
        classes = f"{len(names)} names, sha256 {hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:12]}"
        plan = {"source": self.source.describe(), "classes": classes, "options": self.options.facts()}
        plan = json.loads(json.dumps(plan))
        if self._complete(plan):
            return Built(self._manifests(), self.counts)
        self._resume(plan)
        try:
            self._write()
            return self._finish(plan)
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise

    # -- where to begin

    def _complete(self, plan: dict[str, Any]) -> bool:
        """Whether there is nothing to do; reads what is there already."""
        try:
            self.parts = json.loads(self.store.read(DONE))["parts"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.store.where}/{DONE} is not of a build ({error!r}); use a new folder") from error
        except FileNotFoundError:
            if self.append:
                raise ConfigError(f"nothing to append to: {self.store.where} holds no complete build") from None
            return False
        last = self.parts[-1]
        if not self.append or last["plan"] == plan | {"append": True}:
            self._compare(last["plan"], plan | ({"append": True} if self.append else {}))
            if self._inputs() == last["inputs"]:
                self.store.remove(WORK)
                self.counts = Counts(**last["counts"])
                return True
            if not self.append:
                raise DataError(
                    f"{self.store.where} is complete, but the input has changed since; build into a new folder, "
                    "or append what is new"
                )
        return False

    def _compare(self, there: dict[str, Any], plan: dict[str, Any]) -> None:
        changes = list(differences(there, plan))
        if changes:
            raise ConfigError(
                f"{self.store.where} was begun with other settings ({'; '.join(changes)}); "
                "give the same ones, or build into a new folder"
            )

    def _inputs(self) -> dict[str, str]:
        """Digest of the source's records for each split, without reading any image."""
        writers: dict[str, SplitWriter] = {}
        for record in self.source:
            split = self._split(record)
            writer = writers.setdefault(split, SplitWriter(self.store, split, self.options, 0, []))
            writer.resume_at = 1
            writer.covers(0, record)
        return {split: writers[split].inputs for split in sorted(writers)}

    def _resume(self, plan: dict[str, Any]) -> None:
        plan = plan | ({"append": True} if self.append else {}) | {"part": len(self.parts)}
        try:
            there = json.loads(self.store.read(f"{WORK}/plan.json"))
            if there["part"] < len(self.parts):  # a kill at the very end of that part: it is finished
                self.store.remove(WORK)
                there = None
        except FileNotFoundError:
            there = None
            self.begins = True
            if self.parts:  # without their plan, notes are those of a finished part, half removed
                self.store.remove(WORK)
            self._check_empty("train")
        self.store.lock(LOCK)
        if there is not None and finished(self.store):
            self._compare(there, plan)
        elif there != plan:
            self.store.write(f"{WORK}/plan.json", json.dumps(plan).encode())
        self.bases = self._read_bases()
        for split, base in self.bases.items():
            check_kept(base.classes, self.source.classes, f"{self.store.where}/{split}")
        for base in self.bases.values():
            for shard in base.shards:
                self._remember(shard.name, before=True)
        notes: dict[str, list[Note]] = {}
        for split, number in finished(self.store):
            note = read_note(self.store, split, number)
            self._recall(note)
            notes.setdefault(split, []).append(note.light())
        self.writers = {split: self._writer(split, done) for split, done in notes.items()}

    def _check_empty(self, split: str) -> None:
        """Refuse to begin where there are files already that nothing here says anything about."""
        if not self.begins or self.parts:
            return
        strange = [name for name in self.store.names("") if name in (REJECTS, DUPLICATES)]
        strange += [f"{split}/{name}" for name in self.store.names(split) if not name.startswith(".")]
        if strange:
            raise ConfigError(f"{self.store.where} holds files of another origin, {strange[0]}; use a new folder")

    def _read_bases(self) -> dict[str, Manifest]:
        """The manifests that this part adds to, as they were before it began."""
        name = f"{WORK}/base.json"
        if not self.parts:
            return {}
        try:
            texts = json.loads(self.store.read(name))
        except FileNotFoundError:
            texts = {split: manifest.as_json() for split, manifest in self._manifests().items()}
            self.store.write(name, json.dumps(texts).encode())
        return {split: parse(text, f"{self.store.where}/{split}", name) for split, text in texts.items()}

    def _recall(self, note: Note) -> None:
        self._remember(note.shard["name"])
        self.counts.samples += note.shard["samples"]
        self.counts.rejects += len(note.rejects)
        self.counts.resumed = self.counts.inputs = self.counts.samples + self.counts.rejects

    def _remember(self, shard: str, before: bool = False) -> None:
        """Look for duplicates of a shard's samples; those of a shard ``before`` this part come before all others."""
        if self.options.duplicates.action == "off":
            return
        try:
            prints = unpack(self.store.read(prints_name(shard)))
        except FileNotFoundError:
            prints = []
        if not prints or len(prints[0].digests) < 2 + (self.options.duplicates.distance >= 0):
            what = "look-alikes" if prints else "duplicates"
            raise ConfigError(
                f"{self.store.where}: {shard} was written without looking for {what}, so what is added cannot be "
                "compared with it; append with the same --duplicates and --distance as before"
            )
        for place, key, digests in prints:
            self.seen.add(digests, -1 if before else place, key)

    def _writer(self, split: str, notes: list[Note]) -> SplitWriter:
        base = self.bases.get(split)
        again = f"remove {self.store.where}/{WORK}, to begin the addition again" if self.parts else "remove this one"
        return SplitWriter(self.store, split, self.options, len(base.shards) if base else 0, notes, again)

    # -- reading and writing

    def _split(self, record: Record) -> str:
        return record.split or split_of(record.identity, self.options.splits, self.options.seed)

    def _todo(self) -> Iterator[Task]:
        """Records that no finished shard covers, with their place in the input and their split."""
        self.places = 0
        taken = self._taken_keys()
        for place, record in enumerate(self.source):
            self.places = place + 1
            split = self._split(record)
            if self.source.positional and self.parts:
                record = replace(record, key=f"{len(self.parts)}-{record.key}")
            elif record.key in taken:
                record = replace(record, image=Failed("in the data set already: a sample of this key"))
            if record.label is not None and not 0 <= record.label < len(self.source.classes):
                record = replace(
                    record, image=Failed(f"label {record.label} is not one of {len(self.source.classes)} classes")
                )
            if split not in self.writers:
                self._check_empty(split)
                self.writers[split] = self._writer(split, [])
            if not self.writers[split].covers(place, record):
                yield place, split, record
        for writer in self.writers.values():
            if writer.resume_at > self.places:
                writer.resume_at = self.places
            writer.check_inputs()

    def _taken_keys(self) -> Keys:
        """Keys of the data set that is added to; places need no looking up."""
        keys = Keys()
        for split, base in self.bases.items() if not self.source.positional else ():
            for shard in base.shards:
                keys.add(self._index(split, base, shard).keys)
        keys.sort()
        return keys

    def _index(self, split: str, manifest: Manifest, shard: Shard) -> ShardIndex:
        name = f"{split}/{index_name(shard.name)}"
        return parse_index(self.store.read(name), shard, manifest.fields, f"{self.store.where}/{name}")

    def _write(self) -> None:
        tasks = self._todo()
        if self.options.fetch is not None:
            tasks = fetched(tasks, self.options.fetch)
        for (place, split, record), outcome in prepared(tasks, self.options):
            writer = self.writers[split]
            like = None
            if isinstance(outcome, Sample) and outcome.prints:
                like = self.seen.like(outcome.prints, place)
                if like is not None and self.options.duplicates.action == "drop":
                    outcome = like
            if isinstance(outcome, Sample):
                self._keep(writer, place, record, outcome, like)
            else:
                writer.reject(place, record, outcome)
                self.counts.rejects += 1
            self.counts.inputs += 1
            self.progress(self.counts)

    def _keep(self, writer: SplitWriter, place: int, record: Record, sample: Sample, like: str | None) -> None:
        """Write a sample. That it is a duplicate is noted after that: adding it may end the shard before it."""
        writer.add(place, record, sample)
        if like is not None:
            writer.report(place, record, like)
        if sample.prints:
            self.seen.add(sample.prints, place, record.key)
        self.counts.samples += 1
        self.counts.bytes += len(sample.members[0][1])

    # -- the end

    def _finish(self, plan: dict[str, Any]) -> Built:
        for writer in self.writers.values():
            writer.close_shard(self.places)
        assert self.counts.inputs == self.counts.samples + self.counts.rejects == self.places, self.counts
        self._write_lines(REJECTS, "rejects")
        if self.counts.samples == 0:
            first = next((line["reason"] for w in self.writers.values() for line in w.rejects), "the source is empty")
            raise DataError(f"no sample came out of {self.places} inputs, see {REJECTS}; the first reason: {first}")
        if self.options.duplicates.action == "report":
            self._write_lines(DUPLICATES, "duplicates")
        part = {
            "plan": plan | ({"append": True} if self.append else {}),
            "inputs": {split: self.writers[split].inputs for split in sorted(self.writers)},
            "counts": {"inputs": self.places, "samples": self.counts.samples, "rejects": self.counts.rejects},
        }
        manifests = dict(self.bases)
        for split, writer in sorted(self.writers.items()):
            if writer.notes:
                manifests[split] = self._manifest(split, writer.notes, part)
                self.store.write(f"{split}/{SIZES}", sizes_json(manifests[split]).encode())
                self.store.write(f"{split}/{FILE}", manifests[split].as_json().encode())
        done = {"splits": sorted(manifests), "parts": [*self.parts, part]}
        self.store.write(DONE, (json.dumps(done, indent=1) + "\n").encode())
        self.store.remove(WORK)
        return Built(manifests, self.counts)

    def _write_lines(self, name: str, kind: str) -> None:
        """Write ``rejects.jsonl`` or ``duplicates.jsonl``: what earlier parts wrote, then this part in input order."""
        staged = self.store.staging(name)
        with open(staged, "w", encoding="utf-8") as f:
            for line in self._earlier_lines(name):
                if json.loads(line)["part"] < len(self.parts):
                    f.write(line + "\n")
            for line in heapq.merge(*(self._lines(w, kind) for w in self.writers.values()), key=lambda x: x["input"]):
                f.write(json.dumps({"part": len(self.parts), **line}, ensure_ascii=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.store.publish(staged, name)

    def _earlier_lines(self, name: str) -> list[str]:
        try:
            return self.store.read(name).decode().split("\n")[:-1] if self.parts else []
        except FileNotFoundError:
            return []

    def _lines(self, writer: SplitWriter, kind: str) -> Iterator[dict[str, Any]]:
        for number in range(len(writer.notes)):
            yield from getattr(read_note(self.store, writer.split, number), kind)
        yield from getattr(writer, kind)

    def _manifest(self, split: str, notes: list[Note], part: dict[str, Any]) -> Manifest:
        base = self.bases.get(split)
        statistics = Statistics.from_json(base.statistics) if base else Statistics()
        extensions = {e for known in base.fields.values() for e in known} if base else set()
        for note in notes:
            statistics.merge(Statistics.from_json(note.statistics))
            extensions.update(note.extensions)
        made = {"parts": [*(base.made["parts"] if base else ()), part["plan"] | {"inputs": part["inputs"].get(split)}]}
        return Manifest(
            root=f"{self.store.where}/{split}",
            shards=(*(base.shards if base else ()), *(Shard(**note.shard) for note in notes)),
            fields=fields_of(sorted(extensions)),
            classes=tuple(self.source.classes),
            statistics=statistics.as_json(),
            made=made,
            tokenizer=base.tokenizer if base else {},
            domain=self.options.domain,
        )

    def _manifests(self) -> dict[str, Manifest]:
        found = {}
        for split in json.loads(self.store.read(DONE))["splits"]:
            where = f"{self.store.where}/{split}"
            found[split] = parse(self.store.read(f"{split}/{FILE}").decode(), where, f"{where}/{FILE}")
        return found
