"""Numbers and times as people read them."""

from __future__ import annotations

import math

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float, digits: int = 4) -> str:
    """A few significant digits: "12.8M", "0.4312", "1.5e-4", "inf"."""
    if not math.isfinite(value):
        return str(value)
    value = float(f"{value:.{digits}g}")
    for factor, suffix in _SI:
        if abs(value) >= max(factor, 10**digits):
            return f"{value / factor:.{digits}g}{suffix}"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """The largest unit and what is left in the next: "3 d 4 h", "12 m 5 s", "7 m"."""
    left = max(0, round(seconds))
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if parts and not count:
            break
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def far_apart(values: list[float], errors: list[float]) -> bool:
    """Whether one number of decimals would hide some of the values, and no error says what is worth printing."""
    sizes = [abs(v) for v in values if math.isfinite(v) and v != 0]
    return not errors and bool(sizes) and max(sizes) > 100 * min(sizes)


def with_error(value: float, stderr: float | None, decimals: int) -> str:
    """ "0.812 +- 0.004", both to the same place after the point."""
    return f"{value:.{decimals}f}" + (f" +- {stderr:.{decimals}f}" if stderr is not None else "")


def decimals(values: list[float], errors: list[float]) -> int:
    """Places after the point at which a row of measurements is worth printing.

    Two digits of the smallest standard error above zero; without one, four digits of the largest value.
    """
    errors = [e for e in errors if math.isfinite(e) and e > 0]
    values = [abs(v) for v in values if math.isfinite(v) and v != 0]
    if errors:
        places = 1 - math.floor(math.log10(min(errors)))
    elif values:
        places = 3 - math.floor(math.log10(max(values)))
    else:
        places = 0
    return min(max(places, 0), 8)
