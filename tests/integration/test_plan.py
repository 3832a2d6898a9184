"""What `sluice plan` says of memory and checkpoints, against what a small run on two ranks really holds and saves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.protocols import Clock
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.deepspeed import DeepSpeedEngine
from pipeline.run import cost
from pipeline.run import train as training
from tests.integration.runs import SMOKE, codes, overrides, run

ENGINES = {f"ZeRO {stage}": ("engine.name=deepspeed", f"engine.zero={stage}") for stage in range(4)}
ENGINES |= {"Accelerate": ("engine.name=accelerate",)}


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Of their storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for t in tensors if t is not None for s in [t.untyped_storage()]}.values())


def held(engine: Any) -> dict[str, int]:
    """Bytes on this rank between two steps, found by going through the engine's own tensors."""
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    parameters = list(engine.objective.parameters())
    weights = [*(p.data for p in parameters), *engine.objective.buffers()]
    master: list[Tensor] = []
    if getattr(engine, "stage", 0) in (1, 2):
        master = zero.single_partition_of_fp32_groups
    elif getattr(engine, "stage", 0) == 3:
        master = zero.fp32_partitioned_groups_flat
        weights += [p.ds_tensor for p in parameters]
    state = [value for facts in engine.optimizer.state.values() for value in facts.values()]
    return {
        "weights": bytes_of(weights),
        "master": bytes_of(master),
        "optimizer": bytes_of(value for value in state if isinstance(value, Tensor) and value.numel() > 1),
        "ema": bytes_of(part for parts in engine.ema.averages.values() for part in parts),
    }


def gradients(engine: Any) -> int:
    """Bytes on this rank right before the update."""
    zero = getattr(getattr(engine, "engine", None), "optimizer", None)
    parts = getattr(zero, "averaged_gradients", None) or {}
    whole = [p.grad for p in engine.objective.parameters()]
    return bytes_of([*whole, *(part for group in parts.values() if group is not None for part in group)])


def measure(folder: Path) -> None:
    """In a rank: write down what it holds in its second step."""
    found: dict[str, int] = {}
    log = training.Job.log

    def then_measure(job: Any, clock: Clock) -> None:
        log(job, clock)
        if clock.step == 2:
            text = json.dumps(found | held(job.engine))
            (folder / f"held-{job.place.rank}.json").write_text(text)

    def spied(update: Any) -> Any:
        def look_and_update(engine: Any, lr: float) -> Tensor:
            found["gradients"] = gradients(engine)
            return update(engine, lr)

        return look_and_update

    training.Job.log = then_measure  # type: ignore[method-assign]
    for kind in (AccelerateEngine, DeepSpeedEngine):
        kind.update = spied(kind.update)  # type: ignore[method-assign]


def tensor_bytes(file: Path) -> int:
    """Of a safetensors file without its header, whose length its first eight bytes say."""
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    "kind", [kind if kind in ("ZeRO 1", "ZeRO 3") else pytest.param(kind, marks=pytest.mark.slow) for kind in ENGINES]
)
def test_memory_and_checkpoints_are_as_planned(kind, glyphs, tmp_path, capsys):
    more = (*ENGINES[kind], "engine.precision=fp32", "ema.decay=0.9", "run.length=3ba")
    settings = overrides(tmp_path / "run", glyphs / "train", *more)
    assert cost.cost(str(SMOKE / "mae.toml"), settings, world_size=2) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert codes(run(2, "mae", settings, hurt=partial(measure, tmp_path))) == [0, 0]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"held-{rank}.json").read_text())
        for part in ("master", "optimizer", "ema"):
            assert found[part] == planned[part], part
        assert found["weights"] == pytest.approx(planned["weights"], rel=0.01)  # buffers that are not saved
        # A parameter on the border between two ranks' parts has its gradient whole on both.
        assert planned["gradients"] <= found["gradients"] <= planned["gradients"] + largest(tmp_path / "run")
    parts = (tmp_path / "run" / "checkpoints" / "step-00000003").glob("*.safetensors")
    assert sum(map(tensor_bytes, parts)) == pytest.approx(planned["checkpoint"], rel=1e-3)  # Adam's counters of steps


def largest(folder: Path) -> int:
    """Bytes of the run's largest parameter."""
    manifest = json.loads((folder / "checkpoints" / "step-00000003" / "checkpoint.json").read_text())
    return max(4 * torch.Size(shape).numel() for shape, _ in manifest["tensors"].values())
