"""The streams of a suite, opened when an evaluation first looks at them, with the fields that all of them need."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import SuiteConfig
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.evaluation import OrderedStream, Part, open_eval
from pipeline.dist.group import Place
from pipeline.suites.subject import Subject
from pipeline.suites.tasks import Task


class Streams:
    """Of one subject. A stream that an evaluation of the suite cannot read keeps no other one from its data.

    Args:
        suite: which data, how cropped, how read.
        tasks: all that may look at them.
        subject: texts are read as it was taught to read.
        place: of this rank.
        limit: samples of each stream that are looked at; None: all.
    """

    def __init__(
        self, suite: SuiteConfig, tasks: Sequence[Task], subject: Subject, place: Place, limit: int | None
    ) -> None:
        self._suite, self._subject, self._place, self._limit = suite, subject, place, limit
        self._wanted: dict[str, dict[str, None]] = {}
        for task in tasks:
            for name, fields in task.uses.streams.items():
                self._wanted.setdefault(task.streams[name], {}).update(dict.fromkeys(fields))
        self._open: dict[str, tuple[OrderedStream, dict[str, str]]] = {}

    def get(self, task: Task, name: str) -> OrderedStream:
        """The stream that a task calls ``name``.

        Raises:
            ConfigError: the data set has not got a field that the task needs.
            DataError: there is no such data set, or it is damaged.
        """
        folder = task.streams[name]
        if folder not in self._open:
            self._open[folder] = self._opened(folder)
        stream, lacking = self._open[folder]
        for field in task.uses.streams[name]:
            if field in lacking:
                raise ConfigError(f"{task.name} needs the field {field!r} of stream {name!r}: {lacking[field]}")
        return stream

    def _opened(self, folder: str) -> tuple[OrderedStream, dict[str, str]]:
        """With as many of the fields as it has; of each other one, why not."""
        wanted = list(self._wanted[folder])
        try:
            return self._with(folder, wanted), {}
        except ConfigError as error:
            if len(wanted) == 1:
                raise
            first = error
        lacking: dict[str, str] = {}
        for field in wanted:
            try:
                self._with(folder, [field]).close()
            except (ConfigError, DataError) as error:
                lacking[field] = str(error)
        if not lacking or len(lacking) == len(wanted):
            raise first
        return self._with(folder, [field for field in wanted if field not in lacking]), lacking

    def _with(self, folder: str, fields: Sequence[str]) -> OrderedStream:
        suite, subject = self._suite, self._subject
        return open_eval(
            folder,
            subject.crop(suite.image),
            fields,
            batch=suite.batch,
            workers=suite.workers,
            part=Part(self._place.rank, self._place.world_size, self._limit),
            captions=subject.captions,
            tokenizer=subject.tokenizer,
        )

    def close(self) -> None:
        """Stop loader processes and release files."""
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()
