"""CLIP's vocabulary (Radford et al. 2021) as a tokenizer.json, from the merges that open_clip_torch brings along."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

from pipeline.core.errors import ConfigError

CLIP = "clip"
"""What a configuration calls it."""
MERGES = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49408
SPECIAL = ("<start_of_text>", "<end_of_text>")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clip_tokenizer() -> bytes:
    """The file of HF tokenizers: open_clip's tokens, but that neither HTML entities nor broken characters are mended.

    Raises:
        ConfigError: open_clip_torch is not installed.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    spec = find_spec("open_clip")  # not imported: its imports take seconds
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"data.captions.tokenizer = {CLIP!r}: CLIP's vocabulary comes with open_clip_torch, which is not there; "
            "install it, or train a tokenizer with `sluice prep tokenizer`"
        )
    lines = gzip.decompress((Path(spec.submodule_search_locations[0]) / MERGES).read_bytes()).decode().split("\n")
    letters = _bytes_as_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    pairs = [line.partition(" ") for line in lines[1 : SIZE - len(words) - len(SPECIAL) + 1]]
    merges = [(first, second) for first, _, second in pairs]
    words += [first + second for first, second in merges] + list(SPECIAL)
    model = models.BPE({word: number for number, word in enumerate(words)}, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer.to_str().encode()


def _bytes_as_letters() -> list[str]:
    """The 256 bytes as characters that can be seen, in the order of CLIP's ids: those that can, then the others."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in seen] + [chr(256 + number) for number in range(256 - len(seen))]
