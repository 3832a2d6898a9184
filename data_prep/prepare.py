"""What is done to one record: read, check, filter, store. Runs in worker processes, in the order of the records."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from data_prep import images
from data_prep.ahead import processes
from data_prep.duplicates import perceptual_hash
from data_prep.options import Filters, Options
from data_prep.record import Inline, Record, Rejected
from data_prep.statistics import Facts, channel_sums
from data_prep.text import strict_json
from pipeline.core.errors import DataError

BATCH = 16
"""Records that go to a worker together."""
BATCH_BYTES = 4 * 1024**2
"""Or fewer, when they carry more bytes than this."""
AHEAD = 3
"""Batches in flight per worker."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as it will be written."""

    members: tuple[tuple[str, bytes], ...]
    """Extension and content of each file."""
    facts: Facts
    prints: tuple[bytes, ...]
    """Digests by which duplicates are found: of the bytes, of the pixels, and the perceptual hash; empty when off."""


def prepare(record: Record, options: Options) -> Sample | str:
    """The sample, or why it was rejected."""
    try:
        return _prepare(record, options)
    except Rejected as reason:
        return str(reason)


def _prepare(record: Record, options: Options) -> Sample:
    _check_caption(record.caption or "", options.filters)
    data = record.image.read()
    stored = images.store(data, options.image, functools.partial(_check_size, options.filters))
    if stored.extension in record.more:
        raise Rejected(f"two files .{stored.extension}: the image, and another one of the sample")
    members = [(stored.extension, stored.data)]
    if record.label is not None:
        members.append(("cls", str(record.label).encode()))
    if record.caption is not None:
        members.append(("txt", record.caption.encode("utf-8", "replace")))
    members += record.more.items()
    if record.metadata is not None:
        members.append(("json", _metadata(record.metadata)))
    caption_length = None if record.caption is None else len(record.caption)
    sums = channel_sums(stored.pixels)
    facts = Facts(*stored.pixels.size, len(stored.data), caption_length, record.label, sums)
    prints: tuple[bytes, ...] = ()
    if options.duplicates.action != "off":
        pixels = stored.pixels
        head = f"{pixels.mode} {pixels.size}".encode()
        prints = (hashlib.sha256(data).digest()[:16], hashlib.sha256(head + pixels.tobytes()).digest()[:16])
        if options.duplicates.distance >= 0:
            prints += (perceptual_hash(pixels),)
    return Sample(tuple(members), facts, prints)


def _metadata(table: Mapping[str, Any]) -> bytes:
    try:
        return strict_json(table).encode("utf-8", "replace")
    except ValueError as error:
        raise Rejected(str(error)) from error


def _check_caption(caption: str, f: Filters) -> None:
    if len(caption) < f.min_caption:
        raise Rejected(f"caption of {len(caption)} characters, least is {f.min_caption}")
    if f.max_caption and len(caption) > f.max_caption:
        raise Rejected(f"caption of {len(caption)} characters, most is {f.max_caption}")
    if f.caption and not re.search(f.caption, caption):
        raise Rejected(f"caption does not match {f.caption!r}")


def _check_size(f: Filters, size: tuple[int, int]) -> None:
    short, long = sorted(size)
    if short < f.min_side:
        raise Rejected(f"side of {short} pixels, least is {f.min_side}")
    if f.max_aspect and long > f.max_aspect * short:
        raise Rejected(f"aspect ratio {long / short:.2f}, most is {f.max_aspect}")
    if short * long < f.min_area or (f.max_area and short * long > f.max_area):
        raise Rejected(f"area of {short * long} pixels, allowed is {f.min_area} to {f.max_area or 'any'}")


Task = tuple[int, str, Record]
"""A record with its place in the input and its split."""


def _prepare_batch(records: list[Record], options: Options) -> list[Sample | str]:
    return [prepare(record, options) for record in records]


def prepared(tasks: Iterable[Task], options: Options) -> Iterator[tuple[Task, Sample | str]]:
    """Prepare records in order, in ``options.workers`` processes or right here.

    Raises:
        DataError: a worker died.
    """
    if options.workers == 0:
        for task in tasks:
            yield task, prepare(task[2], options)
        return
    pool = processes(options.workers, __name__)
    flying: deque[Flight] = deque()
    try:
        for batch in _batches(tasks):
            flying.append((batch, pool.submit(_prepare_batch, [record for _, _, record in batch], options)))
            if len(flying) > AHEAD * options.workers:
                yield from _landed(flying.popleft())
        while flying:
            yield from _landed(flying.popleft())
    except BrokenProcessPool as error:
        raise DataError(f"a worker died ({error}); was it killed for its memory? Run again to go on") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


Flight = tuple[list[Task], "Future[list[Sample | str]]"]


def _landed(flight: Flight) -> Iterator[tuple[Task, Sample | str]]:
    batch, future = flight
    yield from zip(batch, future.result(), strict=True)


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    batch: list[Task] = []
    size = 0
    for task in tasks:
        batch.append(task)
        size += len(task[2].image.data) if isinstance(task[2].image, Inline) else 0
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
