"""Which rows of a table, or samples of a data set, are taken: ``vendor in ("a", "b") and score > 0.5``.

Columns stand by their names (in backticks where these are no plain words), texts in quotes. There are ``== != < <= > >=
in`` and ``not in`` (among several values, or of a part in a text), ``and``, ``or``, ``not``, and ``None`` for an empty
cell, which is smaller or larger than nothing. Cells of text tables are compared with numbers as numbers.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from pipeline.core.errors import ConfigError

_QUOTED = re.compile(r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|`([^`]+)`")
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_TRUTH = {"true": True, "false": False}


class _Unfit(Exception):
    """Values that cannot be compared."""


class Where:
    """A condition on rows.

    Args:
        text: as it is written.
        title: what it is called in messages.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, text: str, title: str = "--where") -> None:
        self._title = title
        self._names: dict[str, str] = {}
        try:
            self._tree = ast.parse(_QUOTED.sub(self._plain, text).strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(
                f"{title} {text}: {error.msg if isinstance(error, SyntaxError) else error}; it is written like "
                'vendor in ("a", "b") and score > 0.5'
            ) from error
        self.columns: tuple[str, ...] = tuple(
            dict.fromkeys(self._names.get(n.id, n.id) for n in ast.walk(self._tree) if isinstance(n, ast.Name))
        )
        """Those that are looked at."""
        if not self.columns:
            raise ConfigError(f"{title} {text} looks at no column: texts stand in quotes, columns do not")

    def _plain(self, match: re.Match[str]) -> str:
        """Quoted texts as they are, a column in backticks as a word that Python can read."""
        if match[1] is not None:
            return match[1]
        word = f"_column_{len(self._names)}_"
        self._names[word] = match[2]
        return word

    def _check(self, node: ast.expr) -> None:
        """Raise ValueError for what is no condition."""
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self._check(part)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Compare):
            for op, side in zip(node.ops, node.comparators, strict=True):
                if not isinstance(op, (*_COMPARE, ast.In, ast.NotIn)):
                    raise ValueError("compare with ==, !=, <, <=, >, >=, in or not in")
                if isinstance(op, (ast.In, ast.NotIn)) and isinstance(side, ast.Constant):
                    raise ValueError(f"several values stand in brackets, with commas: ({ast.unparse(side)},)")
            for value in (node.left, *node.comparators):
                if not isinstance(value, ast.Name):
                    ast.literal_eval(value)
        else:
            raise ValueError(f"{ast.unparse(node)} compares nothing")

    def keeps(self, row: Mapping[str, Any]) -> bool | str:
        """Whether a row is taken; or why that cannot be said."""
        if any(name.startswith("\0") for name in row):  # it could not be read, and is rejected for that
            return True
        try:
            return self._holds(self._tree, row)
        except _Unfit as error:
            return f"{self._title}: {error}"

    def _holds(self, node: ast.expr, row: Mapping[str, Any]) -> bool:
        if isinstance(node, ast.BoolOp):
            join = all if isinstance(node.op, ast.And) else any
            return join(self._holds(part, row) for part in node.values)
        if isinstance(node, ast.UnaryOp):
            return not self._holds(node.operand, row)
        assert isinstance(node, ast.Compare)
        sides = [self._value(side, row) for side in (node.left, *node.comparators)]
        return all(_compare(op, a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))

    def _value(self, node: ast.expr, row: Mapping[str, Any]) -> Any:
        if not isinstance(node, ast.Name):
            return ast.literal_eval(node)
        value = row.get(self._names.get(node.id, node.id))
        return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(op, (ast.In, ast.NotIn)):
        return _among(left, right) != isinstance(op, ast.NotIn)
    if isinstance(op, (ast.Eq, ast.NotEq)) and (left is None or right is None):
        return (left is right) == isinstance(op, ast.Eq)
    if left is None or right is None:
        return False
    left, right = _alike(left, right), _alike(right, left)
    try:
        return bool(_COMPARE[type(op)](left, right))
    except TypeError as error:
        raise _Unfit(f"{left!r:.80} and {right!r:.80} cannot be compared") from error


def _among(left: Any, right: Any) -> bool:
    """Whether a value is one of several, or a text part of another."""
    if left is None and not isinstance(right, (list, tuple, set)):
        return False
    if right is None:
        return False
    if isinstance(right, str):
        return str(left) in right
    if not isinstance(right, (list, tuple, set)):
        raise _Unfit(f"{right!r:.80} does not hold several values")
    return any(_compare(ast.Eq(), left, value) for value in cast("list[Any]", right))


def _alike(value: Any, other: Any) -> Any:
    """A cell of a text table as what it is compared with: a number, or yes or no."""
    if isinstance(value, str) and isinstance(other, bool):
        if value.lower() not in _TRUTH:
            raise _Unfit(f"{value!r:.80} is neither true nor false")
        return _TRUTH[value.lower()]
    if isinstance(value, str) and isinstance(other, (int, float)):
        try:
            return float(value)
        except ValueError:
            raise _Unfit(f"{value!r:.80} is no number") from None
    return value
