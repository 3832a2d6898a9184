"""A byte-level BPE tokenizer trained from a data set's captions: the same captions give the same file.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (byte-level BPE). As in CLIP, text is
lower-cased. Ids 0, 1 and 2 are padding, start and end of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from data_prep.dataset import digest, items, read_manifest
from data_prep.store import Store, open_store
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE, Manifest

NAME = "tokenizer.json"
SPECIAL = ("<pad>", "<start_of_text>", "<end_of_text>")
LEAST = len(SPECIAL) + 256


def train_tokenizer(
    folder: str,
    vocabulary: int = 8192,
    fields: Sequence[str] = ("caption",),
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Train a tokenizer, write it beside the manifest and name it there.

    Args:
        folder: Folder or fsspec URL of one split.
        vocabulary: Most entries, the three special ones and the 256 bytes among them.
        fields: Fields that hold text.
        progress: Called with the number of samples read.

    Raises:
        ConfigError: a vocabulary that does not hold all bytes.
        DataError: no captions.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if vocabulary < LEAST:
        raise ConfigError(f"a byte-level vocabulary has at least {LEAST} entries, not {vocabulary}")
    store = open_store(folder)
    try:
        manifest = read_manifest(store)
        _check_ours(store, manifest)
        if not set(fields) & set(manifest.fields):
            raise DataError(f"{folder} has no field {' or '.join(fields)}, only {', '.join(manifest.fields)}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_texts(store, manifest, fields, progress), trainer)
        data = tokenizer.to_str(pretty=True).encode()
        store.write(NAME, data)
        manifest = replace(manifest, tokenizer={"file": NAME, "sha256": digest(data)})
        store.write(FILE, manifest.as_json().encode())
        return manifest
    finally:
        store.close()


def _check_ours(store: Store, manifest: Manifest) -> None:
    """Raise ConfigError for a tokenizer that the manifest does not know."""
    try:
        there = digest(store.read(NAME))
    except FileNotFoundError:
        return
    if there != manifest.tokenizer.get("sha256"):
        raise ConfigError(f"{store.where}/{NAME} is not the manifest's and would be replaced; move it away")


def _texts(
    store: Store, manifest: Manifest, fields: Sequence[str], progress: Callable[[int], None] | None
) -> Iterator[str]:
    for done, item in enumerate(items(store, manifest, fields), 1):
        if progress is not None:
            progress(done)
        for data in item.fields.values():
            with suppress(UnicodeDecodeError):  # such a sample is never trained on either
                yield data.decode("utf-8-sig")
