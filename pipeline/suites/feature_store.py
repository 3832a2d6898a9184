"""Features of one subject: what was extracted once is found again, in memory and on disk.

A column is a reading of an encoder, or a field of the samples; each is kept by itself, so that evaluations that ask for
other readings or fields share what they have in common. Rank 0 looks on disk and decides; all ranks extract.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.schema import Precision
from pipeline.core.evaluation import EvalStream, Features, Reading
from pipeline.dist.gather import CHUNK_BYTES
from pipeline.dist.group import by_all, by_first, gather_objects
from pipeline.suites.content import Unknown, code_mark, encoder_mark
from pipeline.suites.feature_cache import Entry, FeatureCache, Kept, Part, opened, unwritable, write_rows
from pipeline.suites.features import Form, InMemory, Rows, Wanted, check_labels, extract

NOT_OF_IMAGES = ("fields", "field", "captions", "tokenizer")
"""Facts of a stream that decide nothing of its images."""


@dataclass(frozen=True)
class Source:
    """A stream, by the name that it has in the suite."""

    name: str
    stream: EvalStream
    facts: Mapping[str, Any] | None
    """All that decides its batches, as plain values; None: not known, so nothing of it is kept on disk."""


@dataclass
class FeatureStore:
    """Columns of one subject's encoders, which must not change meanwhile."""

    precision: Precision = "fp32"
    cache: FeatureCache | None = None
    """On disk; the same on all ranks. None: in memory alone."""
    _known: dict[tuple[str, str, Wanted], Tensor] = field(default_factory=dict)
    """By names: of the encoder (empty for fields), of the stream, and the column."""
    _marks: list[tuple[nn.Module, str | None]] = field(default_factory=list)

    def get(
        self, name: str, encoder: nn.Module, source: Source, readings: Sequence[Reading], fields: Sequence[str]
    ) -> dict[Reading, Features]:
        """All ranks together: readings of a stream, with fields of its samples.

        Args:
            name: of the encoder.
            encoder: maps "image" of a batch.
            source: of the images.
            readings: what to keep of each.
            fields: see :func:`pipeline.suites.features.extract`.

        Raises:
            ConfigError: the encoder has no such blocks or tokens.
            DataError: a field is not there, or the ranks' shares do not make up the stream.
        """
        wanted: list[Wanted] = list(dict.fromkeys([*readings, *fields]))
        missing = [w for w in wanted if self._key(name, source, w) not in self._known]
        if missing:
            # Labels cost nothing, and whoever asks for them next would have to read all images for them.
            has_labels = source.facts is not None and "label" in source.facts["fields"]
            if has_labels and "label" not in missing and self._key("", source, "label") not in self._known:
                missing.append("label")
            for w, column in self._made(encoder, source, missing).items():
                self._known[self._key(name, source, w)] = column.float() if isinstance(w, Reading) else column
        values = {w: self._known[self._key(name, source, w)] for w in wanted}
        own = {name: values[name] for name in fields}
        if "label" in own:
            check_labels(own["label"], source.stream.classes)
        return {r: Features(values[r], own, source.stream.classes) for r in readings}

    def _key(self, name: str, source: Source, w: Wanted) -> tuple[str, str, Wanted]:
        return name if isinstance(w, Reading) else "", source.name, w

    def _made(self, encoder: nn.Module, source: Source, wanted: Sequence[Wanted]) -> dict[Wanted, Tensor]:
        """Columns from disk, and the rest from one pass."""
        entries = by_first(lambda: self._entries(encoder, source, wanted))
        cache, samples = self.cache if entries else None, source.stream.samples
        found: dict[Wanted, tuple[Kept, Tensor]] = {}

        def look() -> list[tuple[Wanted, Kept]]:
            for w in (w for w in entries if w not in found):
                if cache is not None and (column := cache.find(entries[w], samples)) is not None:
                    found[w] = column
            return [(w, kept) for w, (kept, _) in found.items()]

        with ExitStack() as claims:

            def plan() -> list[tuple[Wanted, Kept]]:
                look()
                lacking = [entries[w] for w in entries if w not in found and isinstance(w, Reading)]
                if cache is not None and lacking:
                    claims.enter_context(cache.claimed(lacking))
                return look()

            planned = by_first(plan)
            known = {w: kept.form.rows(_seen_by_all(kept, found.get(w))) for w, kept in planned}
            readings = [w for w in wanted if isinstance(w, Reading) and w not in known]
            fields = [w for w in wanted if isinstance(w, str) and w not in known]
            if readings or fields:
                rows = partial(_rows, cache, entries, samples)
                module = encoder if readings else None
                known |= extract(module, source.stream, readings, fields, self.precision, rows)
        return known

    def _entries(self, encoder: nn.Module, source: Source, wanted: Sequence[Wanted]) -> dict[Wanted, Entry]:
        """What columns are known by on disk; empty where nothing is kept."""
        if self.cache is None or source.facts is None:
            return {}
        images = {key: value for key, value in source.facts.items() if key not in NOT_OF_IMAGES}
        entries: dict[Wanted, Entry] = {}
        for w in wanted:
            about: dict[str, Any] = {"code": code_mark(), "column": w}
            if isinstance(w, str):
                about |= {"stream": source.facts}
            elif (mark := self._mark(encoder)) is None:
                continue
            else:
                device = next(encoder.parameters()).device.type
                about |= {"stream": images, "encoder": mark, "precision": self.precision, "device": device}
            entries[w] = Entry(json.dumps(about, sort_keys=True))
        return entries

    def _mark(self, encoder: nn.Module) -> str | None:
        """Of an encoder; None: it has none. It is hashed once, and held, so that no other takes its place in memory."""
        for known, mark in self._marks:
            if known is encoder:
                return mark
        try:
            mark = encoder_mark(encoder)
        except Unknown:
            mark = None
        self._marks.append((encoder, mark))
        return mark


def _rows(cache: FeatureCache | None, entries: Mapping[Wanted, Entry], samples: int, w: Wanted, form: Form) -> Rows:
    """Where a column goes: into a file if it is kept and all ranks see that, else into memory and then to disk."""
    entry = entries.get(w)
    if cache is None or entry is None:
        return InMemory(samples, form)
    own: list[Part] = []

    def begin() -> Part | None:
        part = cache.begin(entry, form, samples)
        own.extend([part] if part is not None else [])
        return part

    part = by_first(begin)
    if part is None:
        return InMemory(samples, form)
    is_shared = all(gather_objects(_sees(part)))
    return Filed(cache, part, own, None if is_shared else InMemory(samples, form))


def _sees(part: Part) -> bool:
    try:
        with open(part.kept.path, "r+b") as file:
            return file.read(len(part.token)) == part.token
    except OSError:
        return False


class Filed:
    """Rows in a file: each rank writes its own and all read the whole. Where a rank does not see it, rank 0 alone does.

    Args:
        cache: of the file.
        part: the file.
        own: the same on rank 0, which has it open; empty on the others.
        memory: of ranks of which one does not see the file.
    """

    def __init__(self, cache: FeatureCache, part: Part, own: list[Part], memory: InMemory | None) -> None:
        self._cache, self._kept, self._own, self._memory = cache, part.kept, own, memory

    def put(self, ids: Tensor, raw: Tensor) -> None:
        """See :class:`Rows`.

        Raises:
            DataError: the disk takes no more.
        """
        if self._memory is not None:
            self._memory.put(ids, raw)
        else:
            self._write(ids, raw)

    def whole(self, ids: Tensor) -> Tensor:
        """See :class:`Rows`."""
        rows = self._memory.whole(ids) if self._memory is not None else None
        if rows is None:
            by_all(self._sync)
        made: list[tuple[Kept, Tensor]] = []

        def seal() -> Kept:
            if rows is not None:
                self._write(torch.arange(self._kept.samples), rows)
            made.append(self._cache.seal(self._own.pop()))
            return made[0][0]

        kept = by_first(seal)
        return rows if rows is not None else _seen_by_all(kept, made[0] if made else None)

    def discard(self) -> None:
        """See :class:`Rows`."""
        while self._own:
            self._cache.give_up(self._own.pop())

    def _write(self, ids: Tensor, raw: Tensor) -> None:
        try:
            write_rows(self._kept, ids, raw)
        except OSError as error:
            raise unwritable(self._kept.path, error) from error

    def _sync(self) -> None:
        try:
            file = os.open(self._kept.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise unwritable(self._kept.path, error) from error


def _seen_by_all(kept: Kept, own: tuple[Kept, Tensor] | None) -> Tensor:
    """Rows of a file that rank 0 has opened: the others open it too, or are sent them."""
    rows = own[1] if own is not None else opened(kept)
    if all(gather_objects(rows is not None)):
        assert rows is not None
        return rows
    if own is None:
        rows = torch.empty(kept.samples, kept.form.bytes, dtype=torch.uint8)
    assert rows is not None
    step = max(1, CHUNK_BYTES // kept.form.bytes)
    for first in range(0, kept.samples, step):
        dist.broadcast(rows[first : first + step], src=0)
    return rows
