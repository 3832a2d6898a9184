"""Captions to token ids, with a tokenizer.json of the HF tokenizers library."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.schema import Captions
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import read_file, reason
from pipeline.core.manifest import Joined, Manifest
from pipeline.core.protocols import Batch
from pipeline.core.random import SampleRandom
from pipeline.data.clip_vocabulary import CLIP, clip_tokenizer


def read_tokenizer(manifest: Manifest, captions: Captions) -> bytes:
    """The tokenizer of a data set (of several, the first one's) or of the configuration, as its file.

    Raises:
        ConfigError: none is named, or what is named is not there.
        DataError: it is not the one that was trained with the shards.
    """
    if isinstance(manifest, Joined):
        manifest = manifest.parts[0]
    if captions.tokenizer == CLIP:
        return clip_tokenizer()
    if captions.tokenizer is not None:
        try:
            return Path(captions.tokenizer).read_bytes()
        except OSError as error:
            raise ConfigError(f"data.captions.tokenizer: cannot read {captions.tokenizer} ({reason(error)})") from error
    if not manifest.tokenizer:
        raise ConfigError(
            f"{manifest.root} has no tokenizer; train one with `sluice prep tokenizer`, or name a tokenizer.json in "
            "data.captions.tokenizer"
        )
    name, promised = manifest.tokenizer["file"], manifest.tokenizer["sha256"]
    try:
        content = read_file(manifest.root, name)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {name} of {manifest.root} ({reason(error)})") from error
    if hashlib.sha256(content).hexdigest() != promised:
        raise DataError(f"the tokenizer {name} of {manifest.root} is not the one in its manifest; put that one back")
    return content


class EmptyText(ValueError):
    """A text of nothing but white space."""


class Tokens(NamedTuple):
    """A text as the field "text"."""

    row: np.ndarray
    """int64[length]."""
    length: int
    """Tokens before the padding."""
    is_cut: bool
    """The text was longer."""


class TextDecoder:
    """Texts of a batch: start, tokens, end, padding.

    Args:
        captions: fields, weights, length and special tokens.
        content: the tokenizer's file.
        seed: seed of the run.

    Raises:
        ConfigError: the tokenizer cannot be read or lacks a special token.
    """

    def __init__(self, captions: Captions, content: bytes, seed: int) -> None:
        self._captions = captions
        self._content = content
        self._seed = seed
        self._tokenizer: Any = None
        self.sha256 = hashlib.sha256(content).hexdigest()
        start = [self._special("start", captions.start)] if captions.start else []
        self._start, self.end = start, self._special("end", captions.end)
        self.pad = self._special("pad", captions.pad)

    def __getstate__(self) -> dict[str, Any]:
        """The library's object stays behind; each process makes its own."""
        return vars(self) | {"_tokenizer": None}

    def coins(self, epoch: torch.Tensor, sample: torch.Tensor) -> list[float]:
        """A uniform number for each of B samples, which chooses its caption."""
        return SampleRandom(self._seed, "data.caption", epoch, sample).uniform().tolist()

    def choose(self, present: Sequence[str], coin: float) -> str:
        """One of the caption fields that a sample has, by weight.

        Raises:
            ValueError: it has none.
        """
        weights = {name: weight for name, weight in self._captions.fields.items() if name in present}
        if not weights:
            raise ValueError(f"it has none of the caption fields {', '.join(self._captions.fields)}")
        at = coin * sum(weights.values())
        for name, weight in weights.items():
            at -= weight
            if at < 0:
                return name
        return next(reversed(weights))

    def decode(self, data: memoryview) -> Tokens:
        """A text to tokens.

        Raises:
            EmptyText: nothing but white space.
            ValueError: not UTF-8.
        """
        try:
            text = bytes(data).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
        if not text.strip():
            raise EmptyText("an empty text")
        room = self._captions.length - len(self._start) - 1
        words = self._library().encode(text, add_special_tokens=False).ids
        tokens = [*self._start, *words[:room], self.end]
        row = np.full(self._captions.length, self.pad, np.int64)
        row[: len(tokens)] = tokens
        return Tokens(row, len(tokens), len(words) > room)

    @property
    def words_known(self) -> int:
        """Number of token ids, counting from zero to the largest: special tokens may stand beyond a gap."""
        return 1 + max(self._library().get_vocab().values())

    def tokens(self, texts: Sequence[str]) -> Batch:
        """Any texts as fields: "text", int64[N,L], and "text_length", int64[N].

        Raises:
            EmptyText: one is nothing but white space.
        """
        rows = [self.decode(memoryview(text.encode())) for text in texts]
        length = torch.tensor([tokens.length for tokens in rows])
        return {"text": torch.from_numpy(np.stack([tokens.row for tokens in rows])), "text_length": length}

    def words(self, batch: Batch) -> list[str]:
        """The texts of a batch, "text" and "text_length", as far as their tokens tell; without special tokens."""
        rows = zip(batch["text"].tolist(), batch["text_length"].tolist(), strict=True)
        return [self._library().decode(row[:length]).strip() for row, length in rows]

    def pieces(self, batch: Batch) -> list[list[str]]:
        """The tokens of a batch's texts as the tokenizer writes them, special ones included."""
        rows = zip(batch["text"].tolist(), batch["text_length"].tolist(), strict=True)
        return [[self._library().id_to_token(token) or f"#{token}" for token in row[:length]] for row, length in rows]

    def _library(self) -> Any:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_buffer(self._content)
            except Exception as error:  # the library raises plain Exception
                raise ConfigError(f"the tokenizer cannot be read ({error})") from error
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return self._tokenizer

    def _special(self, role: str, token: str) -> int:
        number = self._library().token_to_id(token)
        if number is None:
            known: Mapping[int, Any] = self._library().get_added_tokens_decoder()
            raise ConfigError(
                f"data.captions.{role}: the tokenizer has no token {token!r}; its special tokens are "
                + (", ".join(repr(t.content) for t in known.values()) or "none")
            )
        return number
