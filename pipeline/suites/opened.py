"""The streams of a suite, opened when an evaluation first looks at them, with the fields that all of them need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.schema import EvalData, SuiteConfig
from pipeline.core.cache import VARIABLE
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import is_url
from pipeline.data.evaluation import OrderedStream, Part, open_eval
from pipeline.dist.group import Place, by_first_in_time
from pipeline.suites.indexed import Show, shards_of
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
        show: is told how far shards are that have to be made.
    """

    def __init__(
        self,
        suite: SuiteConfig,
        tasks: Sequence[Task],
        subject: Subject,
        place: Place,
        limit: int | None,
        show: Show = lambda what, done, total: None,
    ) -> None:
        self._show = show
        self._shards: dict[EvalData, EvalData] = {}
        self._suite, self._subject, self._place, self._limit = suite, subject, place, limit
        self._wanted: dict[EvalData, dict[str, None]] = {}
        for task in tasks:
            uses = task.uses
            for name, fields in uses.streams.items():
                also = [field for field in uses.also.get(name, ()) if field in suite.fields]
                self._wanted.setdefault(task.streams[name], {}).update(dict.fromkeys([*fields, *also]))
        self._open: dict[EvalData, tuple[OrderedStream, dict[str, str]]] = {}

    def get(self, task: Task, name: str) -> OrderedStream:
        """The stream that a task calls ``name``.

        Raises:
            ConfigError: the data set has not got a field that the task needs.
            DataError: there is no such data set, or it is damaged.
        """
        data = task.streams[name]
        if data not in self._open:
            self._open[data] = self._opened(data)
        stream, lacking = self._open[data]
        for field in task.uses.streams[name]:
            if field in lacking:
                why = lacking[field].removeprefix("data.fields: ")
                why = why.replace(self.shards(task.streams[name]).path, str(task.streams[name]))  # as it was named
                raise ConfigError(f"{task.name} needs the field {field!r} of stream {name!r}: {why}")
        return stream

    def shards(self, data: EvalData) -> EvalData:
        """The same data set as shards. All ranks call this together; rank 0 makes them where there are none.

        Raises:
            ConfigError: see :func:`shards_of`.
            DataError: see there; or this rank does not see what the first one has made.
        """
        if data not in self._shards:
            folder = by_first_in_time(lambda: shards_of(data, self._show))
            if folder != data.path and not is_url(folder) and not Path(folder).is_dir():
                raise DataError(
                    f"{folder}, which rank 0 has made of {data.path}, is not here; set {VARIABLE} to a folder that all "
                    "nodes share"
                )
            self._shards[data] = data.model_copy(update={"path": folder, "torchvision": None, "split": None})
        return self._shards[data]

    def _opened(self, asked: EvalData) -> tuple[OrderedStream, dict[str, str]]:
        """With as many of the fields as it has; of each other one, why not."""
        wanted, data = list(self._wanted[asked]), self.shards(asked)
        try:
            return self._with(data, wanted), {}
        except ConfigError as error:
            if len(wanted) == 1:
                raise
            first = error
        lacking: dict[str, str] = {}
        for field in wanted:
            try:
                self._with(data, [field]).close()
            except (ConfigError, DataError) as error:
                lacking[field] = str(error)
        if not lacking or len(lacking) == len(wanted):
            raise first
        return self._with(data, [field for field in wanted if field not in lacking]), lacking

    def _with(self, data: EvalData, fields: Sequence[str]) -> OrderedStream:
        suite, subject = self._suite, self._subject
        return open_eval(
            data,
            subject.crop(suite.image),
            fields,
            batch=suite.batch,
            workers=suite.workers,
            part=Part(self._place.rank, self._place.world_size, self._limit),
            captions=subject.captions,
            tokenizer=subject.tokenizer,
            settings=suite.field,
        )

    def close(self) -> None:
        """Stop loader processes and release files."""
        for stream, _ in self._open.values():
            stream.close()
        self._open.clear()
        self._shards.clear()
