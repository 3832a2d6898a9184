"""What is measured: encoders, and what is known of their training. Here ours are opened, in ``foreign.py`` others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from pipeline.config import load
from pipeline.config.schema import Captions, Image, RunConfig
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.manifest import load as load_manifest
from pipeline.core.protocols import Batch, DataFacts, Objective
from pipeline.data.facts import facts
from pipeline.data.text import TextDecoder, read_tokenizer
from pipeline.dist.group import Place, by_all
from pipeline.nn.weights import FACTS, no_initial_weights, read
from pipeline.run.build import build_objective
from pipeline.run.export import TOKENIZER
from pipeline.run.frozen import leave_out
from pipeline.run.weights import Restored, restore
from pipeline.suites import foreign, foreign_clip
from pipeline.suites.foreign import Opened, hold, table
from pipeline.suites.subjects import Spec

_ATTEMPTS = 3
"""How often the newest checkpoint of a run that goes on is looked for, before it is given up."""


@dataclass(frozen=True)
class Subject:
    """Encoders, and what is known of their training."""

    name: str
    """What it is called among those of its source: "step 400", "random init"."""
    source: str
    """What it comes from: the name of a run, a file, a model."""
    step: int | None
    """The checkpoint's; None: it is not one of a run's checkpoints."""
    encoders: dict[str, nn.Module]
    """In eval mode, on the device of the rank."""
    classes: tuple[str, ...]
    """Of the training data."""
    image: Image | str
    """How images are cropped for it, where a suite does not say otherwise; or why that cannot be said."""
    captions: Captions
    """How texts become tokens."""
    tokenizer: bytes | None
    """The file of the tokenizer that it was trained with; None: it was trained without texts."""

    @property
    def title(self) -> str:
        """What it is called among all."""
        return self.source if self.name == self.source else f"{self.source}: {self.name}"

    def crop(self, asked: Image | None) -> Image:
        """How images are cropped: as is asked for, or else as it takes them.

        Raises:
            ConfigError: that cannot be said.
        """
        if asked is None and isinstance(self.image, str):
            raise ConfigError(f"{self.title}: {self.image}; say in the suite's [image] how they are to be cropped")
        return asked or cast("Image", self.image)

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Texts as the encoder "text" takes them."""
        assert self.tokenizer is not None
        return TextDecoder(self.captions, self.tokenizer, 0).tokens(texts)

    def words(self, text: Batch) -> list[str]:
        """What the encoder "text" takes, as a person reads it."""
        assert self.tokenizer is not None
        return TextDecoder(self.captions, self.tokenizer, 0).words(text)


def open_subject(spec: Spec, place: Place) -> Subject:
    """Build what a spec names and fill it with its weights. All ranks call this together.

    Raises:
        ConfigError: there is no such model, or no weights of it.
        CheckpointError: a file that is damaged, of another model, or gone by now.
    """
    openers: dict[str, Callable[[], Opened]] = {
        "untrained": lambda: _untrained(_path(spec)),
        "objective": lambda: _exported(_path(spec)),
        "encoder": lambda: foreign.encoder(_path(spec)),
        "timm": lambda: foreign.timm_model(spec.model, _path(spec)),
        "random": lambda: foreign.timm_model(spec.model, None),
        "open_clip": lambda: foreign_clip.open_clip_model(spec.model, _path(spec)),
    }
    found, step = _checkpoint(spec, place) if spec.kind == "checkpoint" else (by_all(openers[spec.kind]), None)
    return _subject(spec, found, step, place)


def of_training(
    spec: Spec, objective: Objective, known: DataFacts, config: RunConfig, tokenizer: bytes | None, place: Place
) -> Subject:
    """The same of a model that has the weights of a run which is going on.

    Args:
        spec: the checkpoint that would hold them.
        objective: the model, which is nobody else's.
        known: of the run's data.
        config: of the run.
        tokenizer: the file that its texts are read with; None: it has none.
        place: of this rank.
    """
    return _subject(spec, _ours(objective, known, config, tokenizer), spec.step, place)


def _subject(spec: Spec, found: Opened, step: int | None, place: Place) -> Subject:
    encoders: dict[str, nn.Module] = {}
    for name, encoder in found.encoders.items():
        encoders[name] = encoder.to(place.device).eval().requires_grad_(False)
    return Subject(spec.called(step), spec.source, step, encoders, *found[1:])


def _path(spec: Spec) -> Path:
    assert spec.path is not None, spec
    return spec.path


def _checkpoint(spec: Spec, place: Place) -> tuple[Opened, int]:
    """A checkpoint of any engine and world size, with its step. The newest one of a run may have gone by now."""
    path, attempts = _path(spec), _ATTEMPTS if spec.newest else 1
    run, named = spec.run or path, str(path)
    for attempt in range(attempts):
        # What was the newest is looked for once more if it is damaged, or removed while it is read.
        chosen = None if attempt else named
        try:
            if chosen is None:
                return _of_run(restore(run, None, place, spec.weights))
            return by_all(lambda: _of_run(restore(run, named, place, spec.weights)))
        except CheckpointError as error:
            if path.exists():
                named_there = str(path) in str(error)
                problem = CheckpointError(str(error) if named_there else f"{path}: {error}")
            else:
                problem = CheckpointError(
                    f"{path} is gone: a run removes its older checkpoints while it goes on (run.keep)"
                )
            if attempt + 1 == attempts:
                raise problem from error
    raise AssertionError


def _of_run(restored: Restored) -> tuple[Opened, int]:
    objective, config, known, saved = restored
    told = saved.state.get("tokenizer")
    tokenizer = told.encode() if told is not None else _tokenizer(config, saved.state["stream"].get("tokenizer"))
    return _ours(objective, known, config, tokenizer), saved.step


def _ours(objective: Objective, known: DataFacts, config: RunConfig, tokenizer: bytes | None) -> Opened:
    image = Image(size=config.data.image.size, crop="center")
    objective.eval().requires_grad_(False)
    return Opened(objective.encoders(), known.classes, image, config.data.captions, tokenizer)


def _untrained(run: Path) -> Opened:
    """The model of a run with weights as they are drawn at random, also where the run began from others' weights."""
    config = load.load_run(run / "config.toml")
    known = facts(config.data, load_manifest(config.data.train))
    return _ours(built(config, known, run), known, config, _tokenizer(config, None))


def _exported(file: Path) -> Opened:
    """All weights of an objective, as ``sluice export`` writes them."""
    tensors, metadata = read(file)
    config = RunConfig.model_validate_json(metadata["config"])
    if FACTS not in metadata:
        raise CheckpointError(
            f"{file} was exported by an earlier version, which did not write all that is needed here; export it again, "
            "or evaluate the checkpoint itself"
        )
    known = DataFacts.of(table(file, FACTS, metadata[FACTS]))
    objective = built(config, known, file)
    hold(objective, tensors, file, f"the objective {config.objective.name!r}")
    told = metadata.get(TOKENIZER)
    return _ours(objective, known, config, told.encode() if told is not None else None)


def built(config: RunConfig, known: DataFacts, where: Path) -> Objective:
    """The objective of a run, on the CPU, without its frozen parts and with weights that are to be filled in."""
    with no_initial_weights():
        objective = build_objective(config, known, str(where))
    leave_out(objective)
    return objective


def _tokenizer(config: RunConfig, trained: str | None) -> bytes | None:
    """The tokenizer that the configuration names, for checkpoints that do not hold theirs.

    Args:
        config: of the run.
        trained: hash of the tokenizer that the checkpoint was trained with, if it is known.

    Raises:
        ConfigError: it is another one, or not there.
    """
    if "text" not in config.data.fields:
        return None
    content = read_tokenizer(load_manifest(config.data.train), config.data.captions)
    found = TextDecoder(config.data.captions, content, 0).sha256
    if trained not in (None, found):
        raise ConfigError(
            f"the tokenizer of {config.data.train} is another ({found[:12]}) than the one that the checkpoint was "
            f"trained with ({trained[:12]}); put that one back, or name it in the run's data.captions.tokenizer"
        )
    return content
