"""A caption: ``text``, int64[B,L], tokens with start, end and padding, and ``text_length``; set in ``[data.captions]``.

Of several captions one is chosen by weight, in each epoch anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable
from pipeline.data.text import EmptyText, TextDecoder


class Config(Strict):
    """Fields, tokenizer and length are those of ``[data.captions]``."""


class Text(Field):
    """One of a sample's captions.

    Raises:
        ConfigError: the data set has not all of the captions, or no tokenizer.
    """

    kinds = ("truncated_texts", "empty_texts")

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        captions = source.data.captions
        self.needs = ()
        self.takes = [source.has(member, "data.captions.fields") for member in captions.fields]
        self.text = self._decoder = TextDecoder(captions, source.tokenizer(), source.seed)
        self._name, self._length = source.name, f"{source.name}_length"
        self.columns = {self._name: Column("int64", (captions.length,)), self._length: Column("int64", ())}

    def draw(self, epoch: Tensor, sample: Tensor) -> Sequence[float]:
        """See :meth:`Field.draw`."""
        return self._decoder.coins(epoch, sample)

    def decode(self, sample: Sample, drawn: float, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        member = self._decoder.choose(tuple(sample.members), drawn)
        try:
            tokens = self._decoder.decode(sample.members[member])
        except ValueError as error:
            self.events["empty_texts"] += isinstance(error, EmptyText)
            raise Unusable(member, str(error)) from error
        arrays[self._name][row], arrays[self._length][row] = tokens.row, tokens.length
        self.events["truncated_texts"] += tokens.is_cut
