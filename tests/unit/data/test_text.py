"""Captions to tokens: explicit start, end, padding and lengths; choice by weight; the tokenizer's identity."""

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipeline.config.schema import Captions, Data, Source
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.manifest import load, save
from pipeline.data.clip_vocabulary import clip_tokenizer
from pipeline.data.stream import open_stream
from pipeline.data.text import TextDecoder, read_tokenizer
from tests.unit.data.shards import write_data

WORDS = ["<pad>", "<start_of_text>", "<end_of_text>", "[UNK]", "a", "red", "cat", "on", "mat"]
FIELDS = {"caption": ("txt",), "long": ("long.txt",)}


def tokenizer(words=WORDS) -> bytes:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([w for w in words if w.startswith("<")])
    return made.to_str().encode()


def decode(text: str, **settings):
    tokens = TextDecoder(Captions(length=7, **settings), tokenizer(), 0).decode(memoryview(text.encode()))
    return tokens.row.tolist(), tokens.length


def test_tokens_are_read_back_as_words():
    # Padding that is a word, as CLIP's is, is none of the text.
    decoder = TextDecoder(Captions(length=6, pad="mat"), tokenizer(), 0)
    rows = [decoder.decode(memoryview(text.encode())) for text in ("a red cat", "on a mat on a mat")]
    batch = {
        "text": torch.from_numpy(np.stack([r.row for r in rows])),
        "text_length": torch.tensor([r.length for r in rows]),
    }
    assert decoder.words(batch) == ["a red cat", "on a mat on"]


def test_clips_vocabulary_without_open_clip_is_a_mistake(monkeypatch):
    monkeypatch.setattr("pipeline.data.clip_vocabulary.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="open_clip_torch, which is not there"):
        clip_tokenizer()


def test_start_end_padding_and_length():
    assert decode("a red cat") == ([1, 4, 5, 6, 2, 0, 0], 5)
    assert decode("a dog") == ([1, 4, 3, 2, 0, 0, 0], 4)
    assert decode("a red cat", start="") == ([4, 5, 6, 2, 0, 0, 0], 4)
    assert decode("a cat", pad="<end_of_text>") == ([1, 4, 6, 2, 2, 2, 2], 4)


def test_what_the_tokenizers_file_wants_beside_its_words_does_not_count():
    """Cutting, padding and special tokens are the settings of the data."""
    made = Tokenizer.from_str(tokenizer().decode())
    made.enable_truncation(2)
    made.enable_padding(length=20, pad_token="<pad>")
    special = [("<start_of_text>", 1), ("<end_of_text>", 2)]
    made.post_processor = processors.TemplateProcessing("<start_of_text> $A <end_of_text>", None, special)
    found = TextDecoder(Captions(length=7), made.to_str().encode(), 0).decode(memoryview(b"a red cat"))
    assert (found.row.tolist(), found.length, found.is_cut) == ([1, 4, 5, 6, 2, 0, 0], 5, False)


def test_long_texts_are_cut_before_their_end():
    assert decode("a red cat on a mat on a mat") == ([1, 4, 5, 6, 7, 4, 2], 7)


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_texts_are_bad(text):
    with pytest.raises(ValueError, match="an empty text"):
        decode(text)


def test_texts_in_other_encodings_are_bad():
    with pytest.raises(ValueError, match="not UTF-8"):
        TextDecoder(Captions(), tokenizer(), 0).decode(memoryview(b"caf\xe9"))


def test_unknown_special_token_names_those_there_are():
    with pytest.raises(ConfigError, match=r"data\.captions\.end: the tokenizer has no token '</s>'.*'<end_of_text>'"):
        TextDecoder(Captions(end="</s>"), tokenizer(), 0)
    with pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        TextDecoder(Captions(), b"{}", 0)


def test_captions_are_chosen_by_weight_among_those_present():
    decoder = TextDecoder(Captions(fields={"caption": 1, "long": 3}), tokenizer(), 0)
    ids = torch.arange(2000)
    coins = decoder.coins(torch.zeros_like(ids), ids)
    chosen = [decoder.choose(("caption", "long"), coin) for coin in coins]
    assert 0.70 < chosen.count("long") / 2000 < 0.80
    assert {decoder.choose(("caption",), coin) for coin in coins} == {"caption"}
    assert coins != TextDecoder(Captions(), tokenizer(), 1).coins(torch.zeros_like(ids), ids)
    # The weight of a field that a sample lacks counts for nothing.
    third = TextDecoder(Captions(fields={"caption": 1, "long": 1, "title": 98}), tokenizer(), 0)
    assert 900 < [third.choose(("caption", "long"), coin) for coin in coins].count("long") < 1100
    with pytest.raises(ValueError, match="none of the caption fields caption, long"):
        decoder.choose((), 0.5)


@pytest.fixture
def folder(tmp_path):
    def make(number):
        return {"txt": b"a cat" if number != 5 else b" "} | ({"long.txt": b"a red cat on a mat"} if number % 2 else {})

    manifest = write_data(tmp_path, [6, 6], make, FIELDS)
    (tmp_path / "words.json").write_bytes(tokenizer())
    print_of = hashlib.sha256(tokenizer()).hexdigest()
    save(replace(manifest, tokenizer={"file": "words.json", "sha256": print_of}), tmp_path)
    return tmp_path


def open_text(folder, workers=0, **settings):
    captions = Captions(**({"length": 8, "fields": {"caption": 1, "long": 1}} | settings))
    data = Data(train=str(folder), fields=("text",), captions=captions, workers=workers, tail="endless", max_bad=1)
    return open_stream(data, load(folder), seed=1, global_batch=12, micro_batch=6, rank=0, world=1)


def test_stream_of_texts(folder):
    plain, processes = open_text(folder), open_text(folder, workers=2)
    seen = {i: set() for i in range(12)}
    for here, there in itertools.islice(zip(plain.batches(0), processes.batches(0), strict=True), 6):
        for a, b in zip(here, there, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
            assert a["text"].shape == (6, 8) and a["text"].dtype == a["text_length"].dtype == torch.int64
            for i, row, length in zip(a["id"].tolist(), a["text"], a["text_length"].tolist(), strict=True):
                seen[i].add(length)
                assert row[length - 1] == 2 and (row[length:] == 0).all() and row[0] == 1
    processes.close()
    assert all(lengths == ({4, 8} if i % 2 else {4}) for i, lengths in seen.items() if i not in (5, 0, 1, 2, 3, 4))
    lines = plain.ledger()
    assert {line["id"] for line in lines} == {5} and "field 'caption': an empty text" in lines[0]["reason"]
    # Sample 5 has its own empty caption or its good long one; six passes over twelve samples, none of them too long.
    assert plain.events() == {"replaced_samples": len(lines), "truncated_texts": 0, "empty_texts": len(lines)}
    assert plain.events() == {"replaced_samples": 0, "truncated_texts": 0, "empty_texts": 0}


@pytest.mark.parametrize("length", [6, 7, 8])
def test_truncated_texts_are_counted(folder, length):
    """Two passes over twelve samples: six long texts of six words in each, which fill eight places."""
    stream = open_text(folder, length=length, fields={"long": 1, "caption": 1e-9})
    list(itertools.islice(stream.batches(0), 2))
    assert stream.events() == {"replaced_samples": 0, "truncated_texts": 12 if length < 8 else 0, "empty_texts": 0}


def test_tokenizer_is_part_of_the_state(folder):
    state = open_text(folder).state(1)
    other = folder / "other.json"
    other.write_bytes(tokenizer([*WORDS, "dog"]))
    with pytest.raises(CheckpointError, match="tokenizer: checkpoint"):
        open_text(folder, tokenizer=str(other)).check(state)


def test_the_tokenizer_of_several_sources_is_the_first_ones(folder, tmp_path):
    other = tmp_path / "other"
    manifest = write_data(other, [4], lambda n: {"txt": b"a cat"}, FIELDS)
    content = tokenizer([*WORDS, "dog"])
    (other / "words.json").write_bytes(content)
    save(replace(manifest, tokenizer={"file": "words.json", "sha256": hashlib.sha256(content).hexdigest()}), other)
    for paths, expected in (((folder, other), tokenizer()), ((other, folder), content)):
        both = load(tuple(Source(path=str(path)) for path in paths))
        assert read_tokenizer(both, Captions()) == expected


def test_missing_and_changed_tokenizers(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.captions\.tokenizer: cannot read .*nowhere"):
        open_text(folder, tokenizer=str(tmp_path / "nowhere"))
    (folder / "words.json").write_bytes(tokenizer([*WORDS, "dog"]))
    with pytest.raises(DataError, match=r"words\.json .* is not the one in its manifest"):
        open_text(folder)
    (folder / "words.json").unlink()
    with pytest.raises(DataError, match=r"cannot read the tokenizer words\.json"):
        open_text(folder)
    save(replace(load(folder), tokenizer={}), folder)
    with pytest.raises(ConfigError, match="train one with `sluice prep tokenizer`"):
        open_text(folder)


def test_row_is_int64():
    assert TextDecoder(Captions(), tokenizer(), 0).decode(memoryview(b"a")).row.dtype == np.int64
