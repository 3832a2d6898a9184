"""``[start]``: weights that a run begins with, from a run, a file or timm's cache, and what became of each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.config.schema import RunConfig, Start
from pipeline.core.errors import ConfigError, SluiceError
from pipeline.core.protocols import Clock, Objective
from pipeline.data.text import TextDecoder
from pipeline.dist.group import Place, gather_objects
from pipeline.engine.checkpoint import MANIFEST, sha256_of
from pipeline.engine.fragments import named_tensors
from pipeline.nn.matching import Match, backbones, match, pair
from pipeline.nn.weights import IMAGE_SIZE, read
from pipeline.run.weights import restore

TIMM_NAME = "timm:"


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of them."""

    name: str
    tensors: Mapping[str, Tensor]
    sha256: str
    classes: tuple[str, ...] = ()
    tokenizer: bytes | None = None
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    """Mean and standard deviation of what they were trained on."""
    image_size: tuple[int, int] | None = None
    evaluated: tuple[str, ...] = ()
    """What names of the backbones begin with that evaluations use; of several alike these are meant."""


def begin(
    objective: Objective, config: RunConfig, classes: Sequence[str], tokenizer: bytes | None, place: Place
) -> dict[str, Any]:
    """Fill an objective, in place, on every rank.

    Args:
        objective: as it was drawn, on the CPU.
        config: of the run, whose ``start`` is set.
        classes: of its data.
        tokenizer: the file of its tokenizer.
        place: of this rank.

    Returns:
        For the provenance: the source, its hash, how many tensors went where, and the names of those that did not.

    Raises:
        ConfigError: on every rank: nothing fits, or a part is of something else.
    """
    assert config.start is not None
    report: dict[str, Any] = {}
    problem = None
    try:
        source = _open(config.start, place)
        report = _fill(objective, config, config.start, source, classes, tokenizer)
    except SluiceError as error:
        problem = str(error)
    told = gather_objects((report.get("sha256"), problem))
    for rank, (_, said) in enumerate(told):
        if said is not None:
            raise ConfigError(said if told[0][1] == said else f"rank {rank}: {said}")
    if len({found for found, _ in told}) > 1:
        raise ConfigError(f"start.from: {config.start.source} is not the same on all nodes; copy it to all of them")
    return report


def lines(report: Mapping[str, Any]) -> list[str]:
    """What a person is told of it."""
    counts = ", ".join(f"{count} {kind}" for kind, count in report["counts"].items() if count or kind == "matched")
    said = [f"starts from {report['source']} ({report['sha256'][:12]}): tensors {counts}"]
    for kind, names in report["names"].items():
        shown = ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
        said += [f"  {kind}: {shown}"] * bool(names)
    return said + [f"  {remark}" for remark in report["remarks"]]


def _fill(
    objective: Objective,
    config: RunConfig,
    start: Start,
    source: Source,
    classes: Sequence[str],
    tokenizer: bytes | None,
) -> dict[str, Any]:
    wanted = named_tensors(objective)
    known = objective.encoders()
    prefixes = backbones(objective, known.values())
    for prefix in (*start.parts, *start.skip):
        if not any(name.startswith(prefix) for name in wanted):
            tops = sorted({name.partition(".")[0] for name in wanted})
            raise ConfigError(f"start: the model has nothing that begins with {prefix!r}; it has {', '.join(tops)}")
    parts = start.parts or pair(prefixes, source.tensors, source.evaluated)
    found = match(wanted, source.tensors, parts, start.skip, prefixes, _grid(source), source.name)
    _check_classes(found, objective, known, source, classes)
    _check_words(found, known, source, config, tokenizer)
    followed = _follow(objective, found, wanted)
    with torch.no_grad():
        for name, value in found.values.items():
            wanted[name].copy_(value)
    names = {"resized": found.resized, "kept as computed": found.own, "missing": found.missing}
    return {
        "source": source.name,
        "sha256": source.sha256,
        "counts": found.counts | {"followed": followed},
        "names": names | {"skipped": found.skipped, "unexpected": found.unexpected},
        "remarks": _remarks(objective, source),
    }


def _follow(objective: Objective, found: Match, wanted: Mapping[str, Tensor]) -> int:
    """What follows a parameter, as MoCo's keys do, begins where that begins; returns how many did.

    And what is followed begins where its follower does, if it is that which evaluations use, as DINO's teacher.
    """
    names = {id(tensor): name for name, tensor in wanted.items()}
    count = 0
    for average in objective.averages(Clock(0, 0, 1)):
        pair_of = names.get(id(average.target)), names.get(id(average.source))
        for one, other in (pair_of, pair_of[::-1]):
            if one in found.missing and other in found.values:
                found.missing.remove(one)
                found.values[one] = found.values[other]
                count += 1
    return count


def _grid(source: Source) -> tuple[int, int] | None:
    """Rows and columns of the source's patches, where its size of image is known."""
    weight = next((v for n, v in source.tensors.items() if n.endswith("patch_embed.proj.weight") and v.ndim == 4), None)
    if source.image_size is None or weight is None:
        return None
    height, width = (math.ceil(side / patch) for side, patch in zip(source.image_size, weight.shape[2:], strict=True))
    return height, width


def _check_classes(
    found: Match, objective: Objective, known: Mapping[str, nn.Module], source: Source, classes: Sequence[str]
) -> None:
    """A classifier is taken over only for the same classes in the same order."""
    if "logits" not in known or tuple(source.classes) == tuple(classes):
        return
    trunk = {id(p) for name, e in known.items() if name != "logits" for p in e.parameters()}
    named = dict(objective.named_parameters())
    head = {id(p) for p in known["logits"].parameters()} - trunk
    taken = [name for name in found.values if name in named and id(named[name]) in head]
    if taken:
        there = f"{len(source.classes)} others there" if source.classes else "unknown there"
        raise ConfigError(
            f"start.from: {source.name} has a classifier ({taken[0]}), and its classes are {there}, {len(classes)} "
            f'here; leave the classifier as it is drawn: start.skip = ["{taken[0].partition(".")[0]}."]'
        )


def _check_words(
    found: Match, known: Mapping[str, nn.Module], source: Source, config: RunConfig, tokenizer: bytes | None
) -> None:
    """Embeddings of words are taken over only for the same words."""
    if "text" not in known or tokenizer is None or source.tokenizer is None:
        return
    if not any(name.startswith("text.") for name in found.values):
        return
    theirs, ours = (TextDecoder(config.data.captions, file, 0).sha256 for file in (source.tokenizer, tokenizer))
    if theirs != ours:
        raise ConfigError(
            f"start.from: {source.name} was trained with another tokenizer ({theirs[:12]}) than this run's "
            f'({ours[:12]}); name it in data.captions.tokenizer, or leave the text tower out: start.skip = ["text."]'
        )


def _remarks(objective: Objective, source: Source) -> list[str]:
    """What is no mistake, and yet often one."""
    settings: Any = getattr(objective, "config", None)
    if source.normalisation is None or not hasattr(settings, "mean"):
        return []
    own = (tuple(settings.mean), tuple(settings.std))
    theirs = tuple(tuple(values) for values in source.normalisation)
    if own == theirs:
        return []
    return [
        f"its images were normalised by mean {theirs[0]} and std {theirs[1]}, this run's are by {own[0]} and {own[1]}; "
        "see objective.mean and objective.std"
    ]


def _open(start: Start, place: Place) -> Source:
    name = start.source
    if name.startswith(TIMM_NAME):
        return _of_timm(name.removeprefix(TIMM_NAME))
    path = Path(name)
    if path.is_dir():
        return _of_run(path, start, place)
    if not path.exists():
        raise ConfigError(
            f"start.from: {name} is not there; name a run, one of its checkpoints, a file of weights, or timm:NAME"
        )
    if start.weights != "model":
        raise ConfigError(f'start.weights = "{start.weights}" is of checkpoints, and {name} is a file')
    return _of_file(path)


def _of_run(folder: Path, start: Start, place: Place) -> Source:
    """A run's newest whole checkpoint, or the one that is named."""
    named = (folder / MANIFEST).exists()
    run = folder.parent.parent if named else folder
    objective, _, facts, saved = restore(run, str(folder) if named else None, place, start.weights)
    told = saved.state.get("tokenizer")
    settings: Any = getattr(objective, "config", None)
    return Source(
        f"{saved.folder}" + ("" if start.weights == "model" else f", {start.weights}"),
        {name: tensor.detach() for name, tensor in named_tensors(objective).items()},
        sha256_of(saved.folder / MANIFEST),
        facts.classes,
        told.encode() if told is not None else None,
        (settings.mean, settings.std) if hasattr(settings, "mean") else None,
        facts.image_size,
        tuple(backbones(objective, objective.encoders().values())),
    )


def _of_file(path: Path) -> Source:
    tensors, metadata = read(path)
    size = json.loads(metadata[IMAGE_SIZE]) if IMAGE_SIZE in metadata else None
    own = json.loads(metadata["config"])["objective"] if "config" in metadata else {}
    normalisation = (own["mean"], own["std"]) if "mean" in own and "std" in own else None
    return Source(str(path), tensors, sha256_of(path), (), None, normalisation, size and (size[0], size[1]))


def _of_timm(spelled: str) -> Source:
    """``NAME=FILE``, or ``NAME`` with weights that timm has stored on this machine before; nothing is downloaded."""
    name, _, file = spelled.partition("=")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        raise ConfigError(f"start.from: timm has no model {name!r}")
    path = Path(file) if file else _stored(name, config.hf_hub_id)
    if not path.is_file():
        raise ConfigError(f"start.from: {path} is not there; it is to hold the weights of timm's {name}")
    source = _of_file(path)
    height, width = config.input_size[1:]
    known = source.image_size or (height, width)
    return Source(f"timm's {name}, {path}", source.tensors, source.sha256, (), None, (config.mean, config.std), known)


def _stored(name: str, repository: str | None) -> Path:
    """The file that huggingface_hub has stored for timm."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors", "pytorch_model.bin") if repository else ():
        if isinstance(found := try_to_load_from_cache(str(repository), file), str):
            return Path(found)
    raise ConfigError(
        f"start.from: the weights of timm's {name} are not stored on this machine, and nothing is downloaded while "
        f"training; name their file: timm:{name}=FILE"
    )
