"""Every mistake of a configuration at once: where it is, what was expected, what was found, and "did you mean"."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal, TypeVar, Union, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config.durations import FORM, Duration
from pipeline.core.errors import ConfigError
from pipeline.core.registry import suggest

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]
"""Keys and places in lists, from the top of the file to a value."""
Origin = Callable[[Path], str | None]
"""Names the file that a path was written in, where that is not the one that is read."""

_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a table",
    Duration: f"a duration like {FORM}",
}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
}


class Mistakes(ConfigError):
    """All that is wrong with one configuration, one line each."""

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.title = title
        self.problems = tuple(problems)
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n  ".join([f"{title}: {count}", *problems]))


def nowhere(path: Path) -> None:
    """The origin of values that lie in one file."""
    return None


def validate(
    model: type[M],
    values: Mapping[str, Any],
    title: str,
    prefix: Path = (),
    origin: Origin = nowhere,
) -> M:
    """An instance of ``model`` from a file's values, without silent conversions ("3" is not 3, 1.0 is not 1).

    Args:
        model: what the values must be.
        values: tables, lists, text and numbers, as TOML gives them.
        title: what the configuration is called in the message.
        prefix: where ``values`` lie in that configuration.
        origin: names the file that a path was written in, where that is not ``title``.

    Raises:
        Mistakes: with all of them.
    """
    try:
        # As JSON, since only there does pydantic's strict mode take a list for a tuple.
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        told = error.errors(include_url=False)
        found = [_explain(model, values, details) for details in told if not _of_another_kind(model, values, details)]
        lines: dict[str, None] = {}
        for path, text, general in found:
            if general and any(p[: len(path)] == path and (len(p) > len(path) or not g) for p, _, g in found):
                continue
            source = origin(prefix + path)
            lines[path_text(prefix + path) + text + (f" (in {source})" if source else "")] = None
        raise Mistakes(title, list(lines)) from None


def path_text(path: Path) -> str:
    """``evals[0].k: ``, to begin a line with; nothing at the top."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".") + ": " if text else ""


def _explain(model: type[BaseModel], values: Mapping[str, Any], details: ErrorDetails) -> tuple[Path, str, bool]:
    """Where a mistake is, what it is, and whether it only follows from others (which say it more precisely)."""
    path, annotation, in_union = _walk(model, values, details)
    kind = details["type"]
    context: dict[str, Any] = details.get("ctx", {})
    if kind.startswith("union_tag"):
        return _explain_tag(values, path, context["discriminator"].strip("'"), annotation)
    if kind == "missing":
        return path, f"missing; expected {_describe(annotation)}", False
    if kind == "extra_forbidden":
        return path, f"unknown key ({suggest(str(path[-1]), _keys_beside(model, values, path))})", False
    if kind == "value_error":
        return path, str(context["error"]), False
    value: Any = reduce(lambda inside, key: inside[key], path, cast("Any", values))
    follows = in_union and kind.endswith("_type")
    text = f"expected {_describe(annotation)}, found {_show(value)}" if follows else _explain_value(value, details)
    # pydantic counts only those items that are sound.
    short = kind == "too_short" and len(value) >= context["min_length"]
    return path, text, follows or short


def _explain_value(value: Any, details: ErrorDetails) -> str:
    """What is expected in place of a value, and what it is."""
    form, context = _EXPECTED.get(details["type"]), details.get("ctx", {})
    if form is None:
        return f"{details['msg'][0].lower()}{details['msg'][1:]}, found {_show(value)}"
    hint = ""
    if details["type"] == "literal_error" and isinstance(value, str):
        close = difflib.get_close_matches(value, re.findall("'([^']*)'", context["expected"]), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"expected {form.format(**context)}, found {_show(value)}{hint}"


def _explain_tag(values: Mapping[str, Any], path: Path, key: str, annotation: Any) -> tuple[Path, str, bool]:
    """What ``key`` must be, which says which of several tables this one is."""
    table: Any = reduce(lambda inside, name: inside[name], path, cast("Any", values))
    fields = (model.model_fields.get(key) for model in _models_in(annotation))
    tags = [tag for field in fields if field is not None for tag in typing.get_args(field.annotation)]
    expected = " or ".join(map(repr, tags))
    if key not in table:
        return (*path, key), f"missing; expected {expected}", False
    close = difflib.get_close_matches(table[key], tags, n=1) if isinstance(table[key], str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (*path, key), f"expected {expected}, found {_show(table[key])}{hint}", False


def _walk(model: type[BaseModel], values: Mapping[str, Any], details: ErrorDetails) -> tuple[Path, Any, bool]:
    """The path to the value, what is allowed there, and whether the mistake is that of one branch of a union.

    Between the keys of the file pydantic names the branch that it tried ("int", "tuple[int, int]"); those are left out.
    """
    path: list[str | int] = []
    annotation: Any = model
    value: Any = values
    last = len(details["loc"]) - 1
    for place, key in enumerate(details["loc"]):
        here = holds(value, key)
        annotation = _meant(annotation, value)
        if here or (place == last and details["type"] == "missing"):
            path.append(key)
            annotation = _child(annotation, key)
            value = value[key] if here else None
        elif place == last:
            return tuple(path), annotation, True
    return tuple(path), annotation, False


def _of_another_kind(model: type[BaseModel], values: Mapping[str, Any], details: ErrorDetails) -> bool:
    """Whether a mistake is that of a kind of a union which the table does not say it is."""
    annotation: Any = model
    value: Any = values
    for key in details["loc"]:
        meant = _meant(annotation, value)
        if holds(value, key):
            annotation, value = _child(meant, key), value[key]
        elif meant is not annotation and isinstance(meant, type) and not _names(key, meant):
            return True
        else:
            annotation = meant
    return False


def _names(key: str | int, kind: type[BaseModel]) -> bool:
    """Whether pydantic means this kind by a key of its own: by a word that tells kinds apart, or by the class."""
    words = {word for tag in _tags(kind).values() for word in tag}
    return key in words or re.search(rf"\b{kind.__name__}\b", str(key)) is not None


def holds(value: Any, key: str | int) -> bool:
    """Whether ``value[key]`` exists, for a table or a list."""
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(cast("list[Any]", value))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes inside ``Image | None``, ``tuple[Component, ...]`` or a union of kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _meant(annotation: Any, value: Any) -> Any:
    """Of a union of kinds, which a word in each table tells apart, the one that a table says it is."""
    kind = typing.get_origin(annotation)
    if kind is Annotated:
        return _meant(typing.get_args(annotation)[0], value)
    if kind not in (Union, types.UnionType) or not isinstance(value, dict):
        return annotation
    models, table = _models_in(annotation), cast("dict[str, Any]", value)
    fitting = [model for model in models if _tagged(model, table)]
    return fitting[0] if len(fitting) == 1 < len(models) else annotation


def _tags(model: type[BaseModel]) -> dict[str, tuple[Any, ...]]:
    """Settings that are one of some words, with these."""
    fields = model.model_fields.items()
    return {name: typing.get_args(f.annotation) for name, f in fields if typing.get_origin(f.annotation) is Literal}


def _tagged(model: type[BaseModel], table: Mapping[str, Any]) -> bool:
    """Whether the words by which a kind is known stand in a table, or are what it takes where they are left out."""
    tags, required = _tags(model), {name for name, field in model.model_fields.items() if field.is_required()}
    return bool(tags) and all(table[n] in words if n in table else n not in required for n, words in tags.items())


def _child(annotation: Any, key: str | int) -> Any:
    """What is allowed under ``key``, also inside ``str | tuple[Source, ...]``; ``Any`` where the model does not say."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is tuple:
        return parts[0] if isinstance(key, int) else Any
    if kind is dict:
        return parts[1]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        return fields[key].annotation if key in fields else Any
    return next((child for part in parts if (child := _child(part, key)) is not Any), Any)


def _keys_beside(model: type[BaseModel], values: Mapping[str, Any], path: Path) -> list[str]:
    """The keys that are allowed where ``path`` has an unknown one."""
    annotation: Any = model
    value: Any = values
    for key in path[:-1]:
        annotation, value = _child(_meant(annotation, value), key), value[key]
    inner = _models_in(_meant(annotation, value))
    return list(inner[0].model_fields) if inner else []


def _describe(annotation: Any) -> str:
    """What a person may write for this type."""
    kind, parts = typing.get_origin(annotation), typing.get_args(annotation)
    text = "a value"
    if kind is Literal:
        text = " or ".join(repr(p) for p in parts)
    elif kind is Annotated:
        text = _describe(parts[0])
    elif kind in (Union, types.UnionType):
        text = " or ".join(dict.fromkeys(_describe(p) for p in parts if p is not type(None)))
    elif kind is tuple:
        text = "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}"
    elif annotation in _NAMES or kind in _NAMES:
        text = _NAMES[kind or annotation]
    elif _models_in(annotation):
        text = "a table"
    return text


def _show(value: Any) -> str:
    """A value as it stands in the file, cut when long."""
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
