"""What is measured: the encoders of a checkpoint, or of the same model untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.config import load
from pipeline.config.schema import RunConfig, Weights
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import load as load_manifest
from pipeline.core.protocols import Batch, Objective
from pipeline.data.facts import facts
from pipeline.data.text import TextDecoder, read_tokenizer
from pipeline.dist.group import Place
from pipeline.engine.fragments import MODEL
from pipeline.nn.weights import no_initial_weights
from pipeline.run.build import build_objective
from pipeline.run.frozen import leave_out
from pipeline.run.weights import restore

RANDOM = "random init"


@dataclass(frozen=True)
class Subject:
    """Encoders, and what is known of their training."""

    name: str
    """As a person calls it: "step 400", "random init"."""
    step: int | None
    """The checkpoint's; None: it is not one of a run's checkpoints."""
    encoders: dict[str, nn.Module]
    """In eval mode, on the device of the rank."""
    classes: tuple[str, ...]
    """Of the training data."""
    config: RunConfig
    tokenizer: bytes | None
    """The file of the tokenizer that it was trained with; None: it was trained without texts."""

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Texts as the encoder "text" takes them."""
        assert self.tokenizer is not None
        return TextDecoder(self.config.data.captions, self.tokenizer, 0).tokens(texts)


def of_checkpoint(run: Path, checkpoint: str | None, weights: Weights, place: Place) -> Subject:
    """A checkpoint of a run; None: the newest whole one.

    Raises:
        ConfigError: there is none.
        CheckpointError: the one that is named is not whole.
    """
    objective, config, known, saved = restore(run, checkpoint, place, weights)
    averaged = "" if weights == MODEL else f", {weights}"
    told = saved.state.get("tokenizer")
    tokenizer = told.encode() if told is not None else _tokenizer(config, saved.state["stream"].get("tokenizer"))
    encoders = _ready(objective, place)
    return Subject(f"step {saved.step}{averaged}", saved.step, encoders, known.classes, config, tokenizer)


def untrained(run: Path, place: Place) -> Subject:
    """The model of a run with weights as they are drawn at random, also where the run began from others' weights."""
    config = load.load_run(run / "config.toml")
    manifest = load_manifest(config.data.train)
    known = facts(config.data, manifest)
    with no_initial_weights():
        objective = build_objective(config, known, str(run))
    leave_out(objective)
    return Subject(RANDOM, None, _ready(objective, place), known.classes, config, _tokenizer(config, None))


def _ready(objective: Objective, place: Place) -> dict[str, nn.Module]:
    objective.to(place.device).eval().requires_grad_(False)
    return objective.encoders()


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
