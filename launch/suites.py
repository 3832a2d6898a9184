"""Suites and evaluations by name: where they are, and what there is, told from their files without running any."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, cast

import pipeline
from launch.home import HOME
from pipeline.core.errors import ConfigError

EVALS = "pipeline.evals."
_EVALS = Path(pipeline.__file__).parent / "evals"


def folders(include: Sequence[Path]) -> list[Path]:
    """Where suites are looked for: the first that has one of a name decides.

    Raises:
        ConfigError: a folder that is to be included is not there.
    """
    for folder in include:
        if not folder.is_dir():
            raise ConfigError(f"--include {folder}: there is no such folder")
    own = [folder for folder in (Path("configs/eval"), HOME / "configs" / "eval") if folder.is_dir()]
    found = {folder.resolve(): folder for folder in reversed([*include, *own])}
    return list(reversed(found.values()))


def find_suite(name: str, include: Sequence[Path]) -> Path:
    """The file of a suite, by its path or its name.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file() or path.is_fifo():
        return path
    known = dict(_suites(include))
    if name in known:
        return known[name]
    from pipeline.core.registry import suggest

    raise ConfigError(f"there is no suite {name!r}, nor a file of that name; {suggest(name, sorted(known))}")


def suite_meant(word: str, subjects: Sequence[str], include: Sequence[Path]) -> Path | None:
    """The suite that is to be submitted; None: the file is of something else, a run or shards.

    Raises:
        ConfigError: the word means nothing or two things, or what it names evaluates nothing.
    """
    from pipeline.config.load import read_layers

    path, known = Path(word), dict(_suites(include))
    if path.suffix != ".toml" and word in known:
        if path.exists():
            raise ConfigError(f"{word} is a suite's name ({known[word]}) and something here; write the suite's file")
        return known[word]
    if path.is_dir() or not (path.suffix == ".toml" or path.exists()):
        from pipeline.core.registry import suggest

        if subjects and (subjects[-1] in known or subjects[-1].endswith(".toml")):
            raise ConfigError(f"{word} is no suite; the suite comes first: sluice submit {subjects[-1]} {word} ...")
        raise ConfigError(f"{word} is neither a file (TOML) nor the name of a suite; {suggest(word, sorted(known))}")
    if any("evals" in layer.values for layer in read_layers(path)):
        return path
    if subjects:
        raise ConfigError(f"{path} is no suite, it has no [[evals]]: it takes no {subjects[0]}")
    return None


def _suites(include: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Names and files; of one name the last is the one that is meant."""
    for folder in reversed(folders(include)):
        for path in sorted(folder.glob("*.toml")):
            yield path.stem, path


def listing(include: Sequence[Path]) -> str:
    """What suites and evaluations there are, with their settings."""
    lines = ["suites:"]
    for name, path in sorted(dict(_suites(include)).items()):
        lines += [f"  {name}  ({path})", *(f"    {line}" for line in _of_suite(path))]
    lines.append("\nevaluations:")
    for path in sorted(_EVALS.glob("*.py")):
        if not path.stem.startswith("_"):
            lines += [f"  {path.stem}: {_read(path).purpose}", *(f"    {line}" for line in _settings(path))]
    return "\n".join(lines)


def _of_suite(path: Path) -> Iterator[str]:
    """What its first comment says, and what it measures on what."""
    text = path.read_text(encoding="utf-8")
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))
    if comment:
        yield re.split(r"(?<=[.?!])\s", comment)[0]
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        yield f"cannot be read: {error}"
        return
    evals: Any = table.get("evals")
    for entry in cast("list[Any]", evals) if isinstance(evals, list) else []:
        if not isinstance(entry, dict):
            continue
        task = cast("dict[str, Any]", entry)
        own = {key: value for key, value in task.items() if key not in ("name", "on")}
        told = ", ".join(f"{key} = {_as_toml(value)}" for key, value in own.items())
        on = f" on {', '.join(map(str, task['on']))}" if isinstance(task.get("on"), list) else ""
        yield f"{task.get('name', '?')}{on}{f' ({told})' if told else ''}"
    if table.get("groups"):
        yield f"averages: {', '.join(table['groups'])}"


class _Evaluation(NamedTuple):
    """What is told of a file of evaluations."""

    purpose: str
    """Its first sentence."""
    classes: Mapping[str, ast.ClassDef]
    """Its own, with their fields alone."""
    foreign: Mapping[str, tuple[Path, str]]
    """Names that it has from other files: which, and what it is called there."""


@cache
def _read(path: Path) -> _Evaluation:
    """A file, parsed once: parsing takes most of the time of a listing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    own = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in own.values():
        node.body = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    foreign = {
        alias.asname or alias.name: (_EVALS / f"{node.module.removeprefix(EVALS)}.py", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(EVALS)
        for alias in node.names
    }
    return _Evaluation(" ".join(text.partition("\n\n")[0].split()), own, foreign)


def _settings(path: Path) -> Iterator[str]:
    """The fields of a file's ``Config``, with their defaults; those that it has from others come first."""
    found: dict[str, str] = {}
    for node in _classes(path, "Config"):
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                found[line.target.id] = line.target.id + _default(line.value)
    if found:
        yield ", ".join(found.values())


def _default(value: ast.expr | None) -> str:
    """What stands behind a setting's name, as in a suite; nothing where the default cannot be written there."""
    match value:
        case None | ast.Constant(value=EllipsisType()):
            return " (required)"
        case ast.Call(func=ast.Name(id="Field"), args=[ast.expr() as first, *_]):
            return _default(first)
        case ast.Call(func=ast.Name(id="Duration"), args=[ast.Constant(value=number), ast.Constant(value=unit)]):
            return f" = {_as_toml(f'{number}{unit}')}"
        case ast.BinOp(left=ast.Constant(value=float(base)), op=ast.Pow(), right=ast.Constant(value=int(power))):
            return f" = {_as_toml(base**power)}"
        case _:
            try:
                plain = ast.literal_eval(value)
            except ValueError:
                return ""
            return "" if plain is None else f" = {_as_toml(plain)}"


def _as_toml(value: Any) -> str:
    """A value as it is written in a suite."""
    if isinstance(value, dict):
        inner = ", ".join(f"{key} = {_as_toml(one)}" for key, one in cast("dict[str, Any]", value).items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_toml, cast('list[Any]', value)))}]"
    return json.dumps(value, default=str, ensure_ascii=False)


def _classes(path: Path, name: str) -> Iterator[ast.ClassDef]:
    """A class of a file after those that it is made of, as far as they are classes of evaluations."""
    _, own, foreign = _read(path)
    node = own.get(name)
    for base in node.bases if node is not None else []:
        called = base.id if isinstance(base, ast.Name) else ""
        if called in own and called != name:
            yield from _classes(path, called)
        elif called in foreign:
            yield from _classes(*foreign[called])
    if node is not None:
        yield node
