"""All captions of an image: ``texts``, int64[B,K,L], ``texts_length``, int64[B,K], and ``texts_mask``, bool[B,K].

Captions come in the order in which they are stored; after the last one rows are padding alone, of length 0, and the
mask is false. Tokenizer and length are those of ``[data.captions]``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field as Limits

from pipeline.config.schema import Strict
from pipeline.config.schema import Text as Word
from pipeline.core.errors import ConfigError
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable
from pipeline.data.jsons import read_table, value_at
from pipeline.data.text import EmptyText, TextDecoder

_MOST = 1000


class Config(Strict):
    """Where captions are found, and how many are taken."""

    count: Annotated[int, Limits(ge=1, le=_MOST)] = 5
    """K. Of a sample with more, the first are taken, and the others counted as "left_out_texts"."""
    members: tuple[Word, ...] = ()
    """Left out: those of ``data.captions.fields``, and "1.txt", "2.txt", ..., where ``sluice prep build`` puts more."""
    key: Word | None = None
    """In the .json member "metadata": the captions are its value there, a text or a list of texts."""
    lines: bool = False
    """Each line of a member is a caption of its own."""


class Texts(Field):
    """Several captions of a sample, at least one.

    Raises:
        ConfigError: the data set has none of the members, or no tokenizer.
    """

    kinds = ("truncated_texts", "empty_texts", "left_out_texts")

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        if config.key and (config.members or config.lines):
            raise ConfigError(
                f"{source.where}: with a key captions are values, without members and lines; remove those"
            )
        self._config = config
        captions = source.data.captions
        self.needs, self.takes = (), self._members(config, source)
        if config.key:
            self.needs, self.takes = (source.has("metadata", source.where),), ()
        self.text = self._decoder = TextDecoder(captions, source.tokenizer(), source.seed)
        self._columns = [source.name, f"{source.name}_length", f"{source.name}_mask"]
        shapes = [Column("int64", (config.count, captions.length)), Column("int64", (config.count,))]
        self.columns = dict(zip(self._columns, [*shapes, Column("bool", (config.count,))], strict=True))

    def _members(self, config: Config, source: FieldSource) -> list[str]:
        """Members of captions, in their order."""
        if config.members:
            return [source.has(member, f"{source.where}.members") for member in config.members]
        if config.key:
            return []
        first = [source.has(member, "data.captions.fields") for member in source.data.captions.fields]
        more = (f"{number}.txt" for number in range(1, _MOST))
        return [*first, *(member for member in more if member in source.manifest.fields and member not in first)]

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        name, length, mask = self._columns
        arrays[name][row], arrays[length][row], arrays[mask][row] = self._decoder.pad, 0, False
        at = 0
        for member, data in self._captions(sample):
            if at == self._config.count:
                self.events["left_out_texts"] += 1
                continue
            try:
                tokens = self._decoder.decode(data)
            except EmptyText:
                continue
            except ValueError as error:
                raise Unusable(member, str(error)) from error
            arrays[name][row, at], arrays[length][row, at], arrays[mask][row, at] = tokens.row, tokens.length, True
            self.events["truncated_texts"] += tokens.is_cut
            at += 1
        if not at:
            self.events["empty_texts"] += 1
            raise EmptyText("no caption that is not empty")

    def _captions(self, sample: Sample) -> list[tuple[str, memoryview]]:
        """Members and texts, as bytes, of all captions, blank ones left out."""
        if self._config.key:
            value = value_at(read_table(sample.members["metadata"]), self._config.key)
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                raise Unusable("metadata", f"{self._config.key!r} is neither a text nor a list of texts")
            found = [("metadata", text.encode("utf-8", "surrogatepass")) for text in texts]
        else:
            found = [(member, bytes(sample.members[member])) for member in self.takes if member in sample.members]
        if self._config.lines:
            found = [(member, line) for member, text in found for line in text.split(b"\n")]
        return [(member, memoryview(text)) for member, text in found if text.strip()]
