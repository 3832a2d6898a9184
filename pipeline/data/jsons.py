"""Tables in .json members, and values in them."""

from __future__ import annotations

import json
from typing import Any

_NOTHING = object()


def read_table(data: memoryview) -> dict[str, Any]:
    """The table in a .json member.

    Raises:
        ValueError: not JSON in UTF-8, or no table.
    """
    try:
        table = json.loads(bytes(data).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"not a table, but {str(table)[:40]!r}")
    return table


def value_at(table: dict[str, Any], key: str, default: Any = _NOTHING) -> Any:
    """The value of a key; one with dots that is no key itself goes into tables: "size.width".

    Raises:
        ValueError: there is none, and no ``default``.
    """
    if key in table:
        return table[key]
    first, dot, rest = key.partition(".")
    inner = table.get(first)
    if dot and isinstance(inner, dict):
        return value_at(inner, rest, default)
    if default is _NOTHING:
        raise ValueError(f"no key {key!r}, only {', '.join(map(repr, list(table)[:8])) or 'none'}")
    return default
