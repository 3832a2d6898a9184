"""What the contract tests share: components built from their smoke configs, batches made from what they need."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.schema import RunConfig
from pipeline.core import registry
from pipeline.core.evaluation import Evaluation, Number
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, SetFacts, StepContext
from pipeline.dist.group import Place
from pipeline.nn.encoder import EncoderConfig, create_backbone
from pipeline.nn.weights import save
from pipeline.suites.context import Context
from tests import toys

SMOKE = Path(__file__).parents[2] / "configs" / "smoke"
OBJECTIVES = "pipeline.objectives"
TOYS = "tests.toys"
"""Objectives of the tests' own, for what no method in the product uses yet."""
CLASSES = tuple(f"class {i}" for i in range(7))
REQUIRED = {"drift": {"domains": ("other",)}, "ood": {"unknown": ("other",)}}
"""Settings of evaluations that have no default."""
SAMPLES = 1000
"""Of that data set."""
FIRST = 100
"""Id of the first sample of a batch."""
FOLDERLESS = Path(os.devnull) / "folder"
"""Where nobody can write: a test of an evaluation that does gives it a folder."""
CONTEXT = StepContext(seed=3, clock=Clock(step=2, samples=16, total_samples=64))

RESNET: dict[str, Any] = {
    "encoder": "resnet18",
    "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False},
}
"""An encoder with batch norm."""
DISTILLED: dict[str, dict[str, Any]] = {
    "sample by sample": {
        "labels": {"kind": "labels"},
        "kl": {"kind": "kl", "temperature": 2.0},
        "dkd": {"kind": "dkd", "beta": 2.0, "temperature": 2.0},
        "attention": {"kind": "attention", "block": "blocks.0", "teacher_block": "blocks.1", "weight": 100.0},
        "tokens": {"kind": "tokens", "block": "blocks.1"},
        "self_similarity": {"kind": "self_similarity", "block": "blocks.1", "temperature": 0.5},
    },
    "by relations": {
        "hint": {"kind": "hint"},
        "dist": {"kind": "dist", "weight": 0.1},
        "angles": {"kind": "angles", "weight": 10.0},
        "similarities": {"kind": "similarities", "weight": 100.0},
        "neighbours": {"kind": "neighbours", "weight": 1000.0, "block": "blocks.1"},
        "queue": {"kind": "queue", "size": 24},
    },
}
"""Losses of a distillation that its smoke config has not got."""
SMALL_RESNET = RESNET | {"small_stem": True}
ALIGNED: dict[str, Any] = RESNET | {"layers": ["features", "logits"], "bottleneck": 16}
"""Batch norm in the encoder and behind it."""
STARTED: dict[str, Any] = {"weights": "START"}
"""Weights that an encoder starts from, in a file that is made; it is moved away from them a little."""
FROZEN: dict[str, Any] = {
    "weights": "nowhere.safetensors",
    "network": {"channels": 4, "multipliers": [1, 2], "blocks": 1, "groups": 2, "latent": 4},
}
"""An autoencoder that was trained before; its weights are random until a run fills them."""
ALIGN: dict[str, Any] = {
    "weights": "nowhere.safetensors",
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "block": "block_0",
    "hidden": 8,
}
"""An encoder that a denoiser is drawn to."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adapt_coral with batch norm by domain": ("adapt_coral", ALIGNED | {"batch_norm": "domain"}),
    "adapt_dan with batch norm": ("adapt_dan", ALIGNED),
    "adapt_dan, linear": ("adapt_dan", {"estimator": "linear", "layers": ["features"]}),
    "adapt_dann with batch norm": ("adapt_dann", RESNET | {"critic": {"hidden": [16], "norm": True}}),
    "adapt_drcn with batch norm": ("adapt_drcn", RESNET),
    "adapt_neighbours with batch norm": ("adapt_neighbours", RESNET | {"bottleneck": 8}),
    "adapt_shot with batch norm": ("adapt_shot", RESNET | {"bottleneck": 8}),
    "adapt_wdan with batch norm": ("adapt_wdan", RESNET),
    "autoregressive, of codes": (
        "autoregressive",
        {
            "network": {"name": "transformer", "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2},
            "autoencoder": FROZEN | {"kind": "vq_vae", "codes": 12},
        },
    ),
    "clip with batch norm": ("clip", RESNET | {"keep_patches": 1.0}),
    "coral_sources with batch norm": ("coral_sources", RESNET | {"bottleneck": 16}),
    "ddpm of latents": (
        "ddpm",
        {"latent": FROZEN | {"kind": "vae"}, "variance": "large", "schedule": "linear", "target": "noise"}
        | {"network": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4]}},
    ),
    "ddpm drawn to an encoder": (
        "ddpm",
        {"network": {"name": "dit", "patch": 4, "dim": 16, "depth": 2, "heads": 2}, "feature_block": "block_1"}
        | {"variance": "large", "align": ALIGN},
    ),
    "ddpm by flow matching": ("ddpm", {"schedule": "flow", "target": "flow", "variance": "large"}),
    "flow of transformers": (
        "flow",
        {"network": {"name": "transformer", "patch": 4, "dim": 16, "blocks": 2, "layers": 1, "head_dim": 8}},
    ),
    "autoencoder, sparse and contractive": ("autoencoder", {"sparsity": "kl", "contraction": 0.1}),
    "autoencoder with batch norm": ("autoencoder", RESNET | {"sparsity": "kl", "contraction": 0.1}),
    "colorization with batch norm": ("colorization", RESNET | {"split_brain": True}),
    "dino with masked tokens": ("dino", {"masked": {"ratio": (0.2, 0.5), "views": 0.8}}),
    "dino with batch norm": ("dino", RESNET | {"small_stem": True}),
    "deep_cluster with batch norm": ("deep_cluster", RESNET),
    "distill sample by sample": ("distill", {"losses": DISTILLED["sample by sample"]}),
    "distill by relations, balanced": ("distill", {"losses": DISTILLED["by relations"], "balance": True}),
    "distill with batch norm": (
        "distill",
        RESNET
        | {
            "losses": {
                "dist": {"kind": "dist"},
                "hint": {"kind": "hint", "block": "layer3", "teacher_block": "blocks.0"},
            }
        },
    ),
    "exemplar with batch norm": ("exemplar", RESNET),
    "jigsaw with batch norm": ("jigsaw", SMALL_RESNET | {"head_norm": True}),
    "gan of convolutions, Wasserstein": (
        "gan",
        {
            "critic": {"name": "dcgan", "widths": [8, 8, 16], "spectral": False},
            "generator": {"name": "dcgan", "latent": 8, "widths": [16, 8, 8], "norm": "group"},
            "loss": "wasserstein",
            "penalty": {"kind": "gradient"},
            "condition": "none",
            "parts": 2,
        },
    ),
    "group_dro with batch norm": ("group_dro", RESNET),
    "distill_clip with batch norm": ("distill_clip", RESNET),
    "moco 2 with batch norm": ("moco", RESNET | {"small_stem": True, "norm_batch": 2}),
    "moco 3 with batch norm": ("moco", RESNET | {"small_stem": True, "version": 3}),
    "fixmatch with batch norm": ("fixmatch", RESNET),
    "mean_teacher with batch norm": ("mean_teacher", RESNET),
    "pseudo_label with batch norm": ("pseudo_label", RESNET | {"bottleneck": 8}),
    "relative_patch with batch norm": ("relative_patch", SMALL_RESNET | {"head_norm": True}),
    "rotation with batch norm": ("rotation", RESNET),
    "supervised near its weights": (
        "supervised",
        STARTED | {"regularise": {"kind": "l2_sp", "alpha": 3.0, "beta": 2.0}},
    ),
    "supervised near its features": (
        "supervised",
        STARTED | {"blocks": 1, "regularise": {"kind": "feature_maps", "alpha": 1.0}},
    ),
    "swav with batch norm": ("swav", RESNET | {"small_stem": True}),
    "supervised with batch norm": ("supervised", RESNET),
    "vq_vae with a critic": (
        "vq_vae",
        {
            # Where a gradient is nothing but rounding, AdamW makes it large: attention's keys have a bias without one,
            # and an untrained hinge's gradients of data and samples are each other's opposite.
            "network": {
                "channels": 8,
                "multipliers": [1, 2],
                "blocks": 1,
                "groups": 4,
                "latent": 4,
                "attention": False,
            },
            "critic": {
                "network": {"name": "patch", "channels": 4, "layers": 1, "norm": False},
                "loss": "non_saturating",
            },
        },
    ),
}
"""Objectives in other settings than those of their smoke configs: objective and settings."""


def names() -> list[str]:
    """Every objective, the tests' own included."""
    return [*registry.names(OBJECTIVES), *registry.names(TOYS)]


def package_of(name: str) -> str:
    """Where an objective is found."""
    return TOYS if name in registry.names(TOYS) else OBJECTIVES


def has_phases(name: str) -> bool:
    """Of an objective or a variant, as it is set."""
    own = VARIANTS.get(name, (name, {}))[0]
    declared = registry.component(package_of(own), own, Objective).phases is not Objective.phases
    return declared and bool(build_objective(name).phases())


def contexts(objective: Objective, seed: int = CONTEXT.seed) -> list[StepContext]:
    """One per phase."""
    return [replace(CONTEXT, seed=seed, phase=phase) for phase in objective.phases() or [""]]


def smoke_config(name: str) -> RunConfig:
    """The smoke config of an objective."""
    if name not in registry.names(OBJECTIVES):
        return toys.smoke_config(name)
    return RunConfig.model_validate(tomllib.loads((SMOKE / f"{name}.toml").read_text()))


def facts(config: RunConfig) -> DataFacts:
    """Of data sets that would fit the config; each has as many samples."""
    beside = {name: SetFacts(SAMPLES, CLASSES, (), SAMPLES * (1 + i)) for i, name in enumerate(config.data.beside)}
    views = tuple(view.shape for view in config.data.image.each)
    several = not isinstance(config.data.train, str)  # the batches below hold samples of both
    domains, sources = (("one", "two"), ((0, 0), (FIRST + 3, 1))) if several else (("one",), ((0, 0),))
    return DataFacts(config.data.image.shape, CLASSES, SAMPLES, domains, beside, views, sources)


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective of a smoke config, or a variant, with weights that depend on nothing but the config."""
    name, variant = VARIANTS.get(name, (name, {}))
    config = smoke_config(name)
    package = package_of(name)
    module = registry.module(package, name)
    cls = registry.component(package, name, Objective)
    asked = config.objective.settings | variant | settings
    started = asked.get("weights") == STARTED["weights"]
    if started:
        asked["weights"] = start_of(module.Config(**asked), config.data.image.shape)
    torch.manual_seed(0)
    objective = cls(module.Config(**asked), facts(config))
    if started:
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape))
    return objective


@cache
def folder() -> Path:
    """Where files are made that components start from; it is gone when the process ends."""
    made = Path(tempfile.mkdtemp(prefix="contracts-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def start_of(config: EncoderConfig, shape: tuple[int, int]) -> str:
    """A file of random weights of the encoder."""
    path = folder() / "start.safetensors"
    torch.manual_seed(1)
    save(path, create_backbone(config, shape).state_dict(), {})
    return str(path)


def stir(objective: Objective) -> Objective:
    """Move matrices that begin at zero (last layers of blocks), so that they hide no gradient; returns the same."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad and parameter.ndim > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return objective


def build_evaluation(name: str, **settings: Any) -> Evaluation:
    """An evaluation with its defaults, but for ``settings`` and for what has no default."""
    module = registry.module("pipeline.evals", name)
    return registry.component("pipeline.evals", name, Evaluation)(module.Config(**REQUIRED.get(name, {}) | settings))


def make_batch(objective: Objective, name: str, samples: int = 8) -> Batch:
    """A random batch that has what the objective needs."""
    generator = torch.Generator().manual_seed(1)
    config = smoke_config(VARIANTS.get(name, (name, {}))[0])
    height, width = config.data.image.shape
    batch = {"id": torch.arange(FIRST, FIRST + samples), "epoch": torch.full((samples,), 2)}
    ratios = {f"{beside}_": how.ratio for beside, how in config.data.beside.items() if how.ratio > 1}
    for number, (beside, how) in enumerate(config.data.beside.items()):
        first = SAMPLES * (1 + number) + 200
        ids = torch.arange(first, first + samples * how.ratio)
        batch[f"{beside}_id"] = ids.view(samples, -1) if how.ratio > 1 else ids
        batch[f"{beside}_epoch"] = torch.full_like(batch[f"{beside}_id"], 1)
    for field, spec in objective.needs.items():
        dtype, letters = spec.removesuffix("]").split("[")
        sizes = {"B": samples, "H": height, "W": width}
        shape = [sizes[s] if s in sizes else int(s) for s in letters.split(",")]
        shape[1:1] = [ratio for prefix, ratio in ratios.items() if field.startswith(prefix)]
        high = 256 if dtype == "uint8" else len(CLASSES)
        low = int(field.endswith("_length"))  # no text is without a token
        batch[field] = torch.randint(low, high, shape, generator=generator, dtype=getattr(torch, dtype))
    if "text" in batch:  # every text ends with the token that ends texts
        batch["text"].scatter_(1, batch["text_length"][:, None] - 1, 2)
    return batch


class ListStream:
    """An EvalStream over tensors in memory, shared out over ranks in turn; batches of uneven size.

    A sample's text is the number of its class, in one token, before padding.
    """

    fingerprint = "in memory"

    def __init__(self, image: Tensor, label: Tensor, rank: int = 0, world: int = 1, batch: int = 5) -> None:
        self.image, self.label, self.samples = image, label, len(image)
        self.classes = tuple(f"class {i}" for i in range(int(label.max()) + 1))
        self.mine = torch.arange(len(image))[rank::world].split(batch)

    def __iter__(self) -> Iterator[Batch]:
        for ids in self.mine:
            yield {
                "image": self.image[ids],
                "label": self.label[ids],
                "text": torch.stack([self.label[ids], torch.full_like(ids, 99)], dim=1),
                "text_length": torch.ones_like(ids),
                "id": ids,
                "epoch": torch.zeros_like(ids),
            }


def tokens(texts: Sequence[str]) -> Batch:
    """The number at the end of each text, in one token."""
    rows = [[int(text.removesuffix(".").rpartition(" ")[2]), 99] for text in texts]
    return {"text": torch.tensor(rows), "text_length": torch.ones(len(rows), dtype=torch.int64)}


def spell(text: Batch) -> list[str]:
    """The other way round."""
    return [f"text {row[0]}" for row in text["text"].tolist()]


def context(
    encoders: Mapping[str, nn.Module], streams: Mapping[str, Any], classes: tuple[str, ...] | None = None, **more: Any
) -> Context:
    """What an evaluation is given by the rank that calls; ``classes``: trained on; else those of a stream."""
    place = Place(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), timedelta(minutes=1))
    known = next((s.classes for s in streams.values()), ()) if classes is None else classes
    folder = more.pop("folder", FOLDERLESS)
    return Context(
        encoders, dict.fromkeys(encoders, known), streams, place, folder, tokenize=tokens, spell=spell, **more
    )


def numbers(evaluation: Evaluation, ctx: Context) -> dict[str, Number]:
    """The numbers that an evaluation yields, by their names; its own check comes first, as in a suite."""
    with torch.no_grad():
        evaluation.check(ctx)
        return {output.name: output for output in evaluation.run(ctx) if isinstance(output, Number)}


def plain(number: Number) -> tuple[Any, ...]:
    """A number as tuples compare it and JSON takes it."""
    return tuple((str(v.dtype), v.tolist()) if isinstance(v, np.ndarray) else v for v in number)
