"""Text that others wrote: UTF-8, or UTF-16 and UTF-32 that say so with a byte-order mark; nothing is guessed.

Text in any other encoding reads as something else in silence where bytes are replaced, so it is refused.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any, cast

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
ADVICE = "convert it: iconv -f latin1 -t utf-8"


def encoding_of(beginning: bytes) -> str:
    """The encoding that a byte-order mark says; UTF-8 without one."""
    return next((name for mark, name in _MARKS if beginning.startswith(mark)), "utf-8")


def decoded(data: bytes) -> str:
    """The text, without a byte-order mark, lines ending in one character.

    Raises:
        ValueError: it is in another encoding; the message says where it shows.
    """
    try:
        return data.decode(encoding_of(data)).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 1].hex()
        raise ValueError(f"not {error.encoding.upper()} (byte 0x{found} at {error.start}); {ADVICE}") from error


def json_table(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """Metadata from its text; or None, and what is wrong."""
    try:
        value = json.loads(decoded(data))
    except (ValueError, RecursionError) as error:
        return None, f"metadata is not JSON: {error}"
    return (value, "") if isinstance(value, dict) else (None, "metadata is no table")


def strict_json(value: Any) -> str:
    """JSON as all readers take it: what is no number (NaN, infinity) becomes null.

    Raises:
        ValueError: nested too deeply.
    """
    try:
        try:
            return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str, allow_nan=False)
        except ValueError:
            return json.dumps(_finite(value), ensure_ascii=False, sort_keys=True, default=str, allow_nan=False)
    except RecursionError as error:
        raise ValueError("metadata is nested too deeply") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return {str(k) if isinstance(k, float) else k: _finite(v) for k, v in table.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
