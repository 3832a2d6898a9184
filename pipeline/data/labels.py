"""Labels as they stand in shards. No torch here."""

from __future__ import annotations

from codecs import BOM_UTF8


def decode_label(data: memoryview, classes: int) -> int:
    """A class number written in decimal.

    Raises:
        ValueError: not a number, or not of one of ``classes`` (0: any that int64 holds).
    """
    text = bytes(data).removeprefix(BOM_UTF8).strip()
    if not text.isdigit():
        raise ValueError(f"label {text[:40]!r} is not a number")
    label = int(text)
    if classes and label >= classes:
        raise ValueError(f"label {label} is not one of the {classes} classes")
    if label >= 1 << 63:
        raise ValueError(f"label {label} is too large")
    return label
