"""A step of distillation against its parts, live and with stored outputs; and what reading these costs a loader.

python -m tests.perf.distillation [--batch 64] [--rounds 15]
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from data_prep.sidecar import SidecarWriter
from data_prep.sources.glyphs import GlyphsSource
from pipeline.config.schema import Component, Data, Image, Sidecar
from pipeline.core.manifest import Manifest, load
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.data.chance import sample_keys
from pipeline.data.dataset import open_data
from pipeline.data.outputs import MADE, MEMBER, plain
from pipeline.data.stream import open_stream
from pipeline.dist.group import process_group
from pipeline.objectives.distill import Config, Distill

CLASSES = tuple(f"class {i}" for i in range(100))
STUDENT = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3},
}
TEACHER = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 384, "depth": 6, "num_heads": 6},
}
LOSSES = {"labels": {"kind": "labels", "weight": 0.5}, "soft": {"kind": "kl", "weight": 0.5}, "hint": {"kind": "hint"}}
AUGMENTATIONS = 4
IMAGE = Image(size=64)


def build(losses: dict, stored: bool) -> Distill:
    """A student with its teacher, or with the teacher's outputs in the batch."""
    torch.manual_seed(0)
    teacher = {"weights": "none", **TEACHER} | ({"stored": "big"} if stored else {})
    config = Config(**STUDENT, teachers={"big": teacher}, losses=losses)
    told = config.teachers["big"].described((64, 64)) | {"path": "none", "sha256": ""}
    facts = {"big": {"teacher": told, "outputs": {"features": 384, "logits": len(CLASSES)}}}
    return Distill(config, DataFacts((64, 64), CLASSES, stored=facts)).train()


def step(model: Distill, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    ctx = StepContext(seed=0, clock=Clock(0, 0, 100))

    def once() -> None:
        optimizer.zero_grad()
        model(batch, ctx).loss.backward()
        optimizer.step()

    return once


def bare(model: Distill, batch: Batch, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """The student's own step: cross-entropy of its classifier."""

    def once() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model.head(model.encoder(batch["image"])), batch["label"]).backward()
        optimizer.step()

    return once


def times(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
    """CPU seconds of each, by round; one of each in turn, so that all see the same machine."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 2):
        for name, work in works.items():
            begun = time.process_time()
            work()
            if number >= 2:
                found[name].append(time.process_time() - begun)
    return {name: np.array(values) for name, values in found.items()}


def shown(values: np.ndarray, digits: int) -> str:
    """The median over rounds, and their range."""
    return f"{np.median(values):.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def steps(batch: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(batch)
    data = {
        "image": torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "label": ids % len(CLASSES),
        "id": ids,
        "epoch": torch.zeros_like(ids),
    }
    live, stored = build(LOSSES, False), build(LOSSES, True)
    outputs = {f"big_{name}": rows for name, rows in live.taught(data)["big"].items()}
    teacher, pixels = live.teachers.named("big"), data["image"].float() / 255

    def optimizer(model: Distill) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    found = times(
        {
            "teacher": lambda: teacher(pixels, blocks=()),
            "student": bare(live, data, optimizer(live)),
            "live": step(live, data, optimizer(live)),
            "stored": step(stored, data | outputs, optimizer(stored)),
        },
        rounds,
    )
    parts = found["teacher"] + found["student"]
    print(f"live step: {shown(found['live'], 3)} s; over teacher and student alone {shown(found['live'] / parts, 3)}")
    student = found["stored"] / found["student"]
    print(f"stored step: {shown(found['stored'], 3)} s; over student alone {shown(student, 3)}")


def write_outputs(main: Manifest, folder: Path) -> None:
    """Random ones, of the size of the teacher's."""
    width = 384 + len(CLASSES)
    facts = {
        "augmentations": AUGMENTATIONS,
        "augmentation_seed": 0,
        "image": plain(IMAGE),
        "captions": None,
        "top": None,
    }
    facts |= {"teacher": {}, "outputs": {"features": 384, "logits": len(CLASSES)}}
    keys = [key.decode() for key in sample_keys(main).tolist()]
    random = np.random.default_rng(0)
    with closing(SidecarWriter(str(folder), {MADE: facts}, -(-len(keys) // 1000))) as writer:
        writer.begin()
        for number in range(0, len(keys), 1000):
            own = keys[number : number + 1000]
            members = []
            for _ in own:
                file = io.BytesIO()
                np.save(file, random.standard_normal((AUGMENTATIONS, width)).astype(np.float16))
                members.append([(MEMBER, file.getvalue())])
            writer.write(number // 1000, own, members)
        writer.finish()


def loader(batch: int, rounds: int) -> None:
    """Batches of a loader with and without stored outputs, in this process."""
    from data_prep.build import build as build_shards
    from data_prep.options import Options

    with tempfile.TemporaryDirectory() as place:
        build_shards(GlyphsSource(characters=60, samples=1, size=128), place, Options({}))
        main = load(f"{place}/train")
        write_outputs(main, Path(place, "big"))
        data = Data(train=main.root, fields=("image", "label"), image=IMAGE, augmentations=AUGMENTATIONS, workers=0)
        own = {"fields": (*data.fields, "big"), "field": {"big": Component(name="stored")}}
        joined = data.model_copy(update=own | {"sidecar": {"big": Sidecar(path=f"{place}/big")}})
        walks: dict[str, Iterator[list[Batch]]] = {}
        for name, one in (("images", data), ("both", joined)):
            stream = open_stream(one, open_data(one), seed=0, global_batch=batch, micro_batch=batch, rank=0, world=1)
            walks[name] = stream.batches(0)

        def some(walk: Iterator[list[Batch]]) -> Callable[[], None]:
            return lambda: [None for _ in itertools.islice(walk, 4)] and None

        found = times({name: some(walk) for name, walk in walks.items()}, rounds)
    rates = {name: 4 * batch / seconds for name, seconds in found.items()}
    print(
        f"loader: {shown(rates['both'], 0)} images/s with stored outputs; over images alone "
        f"{shown(rates['both'] / rates['images'], 3)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with process_group(1.0):
        steps(asked.batch, asked.rounds)
    loader(asked.batch, asked.rounds)


if __name__ == "__main__":
    main()
