"""What can be evaluated, as it is spelled: found without torch and without reading weights.

* a run folder: its newest checkpoint; ``RUN@STEP``, ``RUN@all``, or the folder of a checkpoint
* what ``sluice export`` wrote: its folder, or one of the files in it
* ``timm:NAME=FILE``, ``open_clip:NAME=FILE``: weights of others, as safetensors or a file of tensors alone
* ``random:NAME`` of timm, ``random:RUN``: the same untrained
* a pattern (``*``, ``?``, ``[...]``) wherever a path stands
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.config.schema import Weights
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.suites.on_disk import (
    CHECKPOINT,
    CONFIG,
    OPEN_CLIP,
    averages_of,
    exported,
    metadata_of,
    run_of,
    step_of,
    steps_of,
)

Kind = Literal["checkpoint", "untrained", "objective", "encoder", "timm", "open_clip", "random"]
MODEL: Weights = "model"
RANDOM = "random init"
_FOREIGN = re.compile(r"(timm|open_clip):(.*)", re.DOTALL)
_AT = re.compile(r"(.+)@([^@/]*)", re.DOTALL)
_SHOWN = 8
"""Steps in a message."""


@dataclass(frozen=True)
class Spec:
    """One thing to evaluate, with one kind of its weights."""

    spelled: str
    """As it was asked for."""
    kind: Kind
    """"objective" and "encoder" are files of an export, "untrained" is the model of a run and "random" one of timm."""
    path: Path | None = None
    """Folder of the checkpoint, or of the run that is "untrained"; file of weights; folder of an open_clip model."""
    model: str = ""
    """Name of a model of timm or open_clip."""
    weights: Weights = MODEL
    """Of a checkpoint."""
    step: int | None = None
    newest: bool = False
    """The run was named: should its newest checkpoint be damaged or vanish, the newest one of that moment is meant."""
    source: str = ""
    """What it comes from, for people: the name of the run, the file or the model, another for each in a call."""

    @property
    def run(self) -> Path | None:
        """The folder of the run that it comes from."""
        if self.path is None or self.kind not in ("checkpoint", "untrained"):
            return None
        return run_of(self.path) if self.kind == "checkpoint" else self.path

    def called(self, step: int | None = None) -> str:
        """What it is called among those of the same source; ``step``: which checkpoint it came to be."""
        if self.kind == "checkpoint":
            averaged = "" if self.weights == MODEL else f", {self.weights}"
            return f"step {self.step if step is None else step}{averaged}"
        return RANDOM if self.kind == "untrained" else self.source

    @property
    def name(self) -> str:
        """What it is called among those of a call."""
        return f"{self.source}: {self.called()}" if self.run else self.source


def find(
    specs: Sequence[str],
    weights: Sequence[Weights] = (MODEL,),
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    *,
    fleeting: bool = False,
) -> list[Spec]:
    """What is to be evaluated, each thing once, with names of their own.

    Args:
        specs: see the top of the file.
        weights: of every checkpoint; what is no checkpoint has one kind of weights.
        say: is told what a pattern matches and what is passed over.
        fleeting: what is not there is passed over, and there may be nothing.

    Raises:
        ConfigError: one of them is nothing that could be evaluated.
    """
    found: dict[tuple[object, ...], Spec] = {}
    for spelled in specs:
        for spec in _there(spelled, say) if fleeting else _spelled(spelled, say):
            for own in weights if spec.kind == "checkpoint" else (MODEL,):
                _check_average(spec, own)
                where = spec.path.resolve() if spec.path is not None else None
                key = (spec.kind, where, spec.model, own)
                if key not in found or found[key].newest:
                    found[key] = replace(spec, weights=own)
    if not found and not fleeting:
        raise ConfigError("nothing to evaluate: name a run, a checkpoint, an export or other weights")
    return _named(list(found.values()))


def _there(spelled: str, say: Callable[[str], None]) -> list[Spec]:
    try:
        return list(_spelled(spelled, say))
    except ConfigError as error:
        say(f"passed over {error}")
        return []


def _spelled(spelled: str, say: Callable[[str], None]) -> Iterator[Spec]:
    """What one word stands for."""
    if spelled.startswith("random:"):
        yield from _random(spelled, spelled.removeprefix("random:"), say)
    elif match := _FOREIGN.fullmatch(spelled):
        yield from _foreign(spelled, match[1], match[2])
    else:
        path, asked = _at(spelled)
        paths = _matching(path, spelled)
        several = paths != [Path(path)]
        specs = [(p, _of_path(spelled, p, asked)) for p in paths]
        for p, (reason, made) in specs:
            if not several and reason:
                raise ConfigError(f"{spelled}: {reason}")
            if reason:
                say(f"passed over {p}: {reason}")
            yield from made
        if several and not any(made for _, (_, made) in specs):
            raise ConfigError(
                f"{spelled}: of {len(paths)} that match none can be evaluated; {paths[0]}: {specs[0][1][0]}"
            )


def _at(spelled: str) -> tuple[str, str]:
    """Path, and what stands after the last "@", "" where nothing does. A path that is there is one as a whole."""
    match = _AT.fullmatch(spelled)
    if match is None or Path(spelled).exists():
        return spelled, ""
    if match[2] != "all" and not match[2].isdecimal():
        raise ConfigError(f"{spelled}: after @ stands a step, or 'all', not {match[2]!r}")
    return match[1], match[2]


def _matching(path: str, spelled: str) -> list[Path]:
    """The paths that a pattern stands for, by the numbers in them; a path that is there is no pattern."""
    if Path(path).exists() or not glob.has_magic(path):
        return [Path(path)]
    found = [Path(name) for name in glob.glob(path, recursive=True)]
    if not found:
        raise ConfigError(f"{spelled}: nothing matches {path}")

    def by_number(p: Path) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", str(p))
        return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(found, key=by_number)


def _of_path(spelled: str, path: Path, asked: str) -> tuple[str, list[Spec]]:
    """Why a path cannot be evaluated, or "", and what it stands for."""
    is_checkpoint = (path / CHECKPOINT).is_file()
    if (path / CONFIG).is_file() and not is_checkpoint:
        return _of_run(spelled, path, asked)
    if asked:
        return f"only of a run can a checkpoint be chosen by @, and there is no {CONFIG} in {path}", []
    if is_checkpoint:
        return "", [Spec(spelled, "checkpoint", path, step=step_of(path))]
    if path.is_dir():
        return _of_folder(spelled, path)
    if path.is_file():
        return _of_file(spelled, path)
    return f"there is no {path}; name a run, a checkpoint, an export, timm:NAME=FILE or open_clip:NAME=FILE", []


def _of_run(spelled: str, run: Path, asked: str) -> tuple[str, list[Spec]]:
    steps = steps_of(run)
    if not steps:
        return f"{run} holds no checkpoint yet; train it first (random:{run} needs none)", []
    wanted = list(steps) if asked == "all" else [int(asked)] if asked else [max(steps)]
    if missing := [step for step in wanted if step not in steps]:
        return f"{run} has no checkpoint of step {missing[0]}, only of {_listed(steps)}", []
    return "", [Spec(spelled, "checkpoint", steps[s], step=s, newest=not asked) for s in wanted]


def _listed(steps: Iterable[int]) -> str:
    shown = sorted(steps)
    few = ", ".join(map(str, shown[-_SHOWN:]))
    return f"{len(shown)} steps, the last {few}" if len(shown) > _SHOWN else few


def _of_folder(spelled: str, folder: Path) -> tuple[str, list[Spec]]:
    file = exported(folder)
    if file is not None:
        kind: Kind = "open_clip" if file.name == OPEN_CLIP else "objective"
        return ("", [Spec(spelled, kind, folder)]) if kind == "open_clip" else _of_file(spelled, file)
    below = sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if below:
        more = f" and {len(below) - 1} more" if below[1:] else ""
        return f"{folder} is no run, but holds {below[0]}{more}; write {folder}/* for all", []
    if steps_of(folder.parent):
        return f"{folder} is a part of a run; write {folder.parent}@all for all of its checkpoints", []
    return f"{folder} is neither a run ({CONFIG}) nor a checkpoint ({CHECKPOINT}) nor an export", []


def _of_file(spelled: str, file: Path) -> tuple[str, list[Spec]]:
    if file.suffix == ".safetensors":
        try:
            known = metadata_of(file)
        except CheckpointError as error:
            return str(error), []
        if "config" in known:
            return "", [Spec(spelled, "objective", file)]
        if "timm" in known:
            return "", [Spec(spelled, "encoder", file)]
    return f"{file} does not say of which model it is; write timm:NAME={file} or open_clip:NAME={file}", []


def _foreign(spelled: str, library: str, rest: str) -> Iterator[Spec]:
    """Weights of others."""
    name, equals, place = rest.partition("=")
    if library == "open_clip" and not equals and exported(Path(rest)) is not None:
        yield Spec(spelled, "open_clip", Path(rest))
        return
    if not (name and equals and place):
        raise ConfigError(f"{spelled}: write {library}:NAME=FILE, a model of {library} and the file of its weights")
    for path in _matching(place, spelled):
        if not path.is_file():
            what = "is a folder, not a file of weights" if path.is_dir() else "is not there"
            raise ConfigError(f"{spelled}: {path} {what}")
        yield Spec(spelled, "timm" if library == "timm" else "open_clip", path, name)


def _random(spelled: str, rest: str, say: Callable[[str], None]) -> Iterator[Spec]:
    """What is not trained."""
    if not rest:
        raise ConfigError(f"{spelled}: write random:RUN, or random:NAME with a model of timm")
    paths = _matching(rest, spelled)
    runs = [path for path in paths if (path / CONFIG).is_file()]
    for path in paths if runs else ():
        if path not in runs:
            say(f"passed over {path}: it is no run, it has no {CONFIG}")
    yield from (Spec(spelled, "untrained", run) for run in runs)
    if not runs and ("/" in rest or Path(rest).exists()):
        raise ConfigError(f"{spelled}: {rest} is no run, it has no {CONFIG}")
    if not runs:
        yield Spec(spelled, "random", model=rest)


def _check_average(spec: Spec, weights: Weights) -> None:
    """Refuse an average that a checkpoint does not hold."""
    if weights == MODEL or spec.path is None:
        return
    held = averages_of(spec.path)
    wanted = "ema" if weights == "ema" else "power-function"
    if held is not None and not any(name == "ema" if weights == "ema" else name != "ema" for name in held):
        there = f"only model and {', '.join(held)}" if held else "only those as trained"
        raise ConfigError(f"{spec.spelled}: {spec.path} holds no {wanted} average of the weights, {there}; see [ema]")


def _named(specs: list[Spec]) -> list[Spec]:
    """With a source for each, as short as they can be told apart by."""
    origins = {spec: _origin(spec) for spec in specs}
    parts = {origin: Path(origin[1]).parts for origin in origins.values()}
    length = dict.fromkeys(parts, 1)
    while True:
        names = {origin: _shortened(origin, parts[origin], length[origin]) for origin in parts}
        same = [o for o in parts if list(names.values()).count(names[o]) > 1 and length[o] < len(parts[o])]
        if not same:
            return [replace(spec, source=names[origins[spec]]) for spec in specs]
        for origin in same:
            length[origin] += 1


def _origin(spec: Spec) -> tuple[str, str]:
    """What stands before the path, and the path that names are made of."""
    path = spec.run or spec.path
    if path is None:
        return f"random:{spec.model}", ""
    before = f"{spec.kind}:{spec.model}" if spec.model else ""
    return before, str(path.resolve())


def _shortened(origin: tuple[str, str], parts: tuple[str, ...], length: int) -> str:
    end = "/".join(parts[-length:])
    return "=".join(filter(None, (origin[0], end)))
