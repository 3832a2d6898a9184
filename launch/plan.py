"""``sluice plan``: what a run of a given shape would need, or what it would read of a data set."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from launch.check import plan_table
from launch.local import child_environment, run_command
from pipeline.config.load import load_run
from pipeline.config.resolve import Plan, resolve
from pipeline.config.schema import RunConfig
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Manifest, load
from pipeline.data.dataset import open_data
from pipeline.data.forecast import Forecast, forecast
from pipeline.data.order import Order, default_lanes
from pipeline.record.formats import duration

STATE = {
    "weights": "weights",
    "master": "master weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "averages",
    "activations": "activations",
    "gathered": "gathered",
}
"""Parts of the memory, as :class:`pipeline.run.cost.Cost` and as a person calls them."""


def plan_run(path: Path, overrides: Sequence[str], *, nodes: int, procs: int, images_per_second: float) -> str:
    """What a run needs, as text.

    Args:
        path: its configuration.
        overrides: ``key.path=value``.
        nodes: of the run.
        procs: ranks, one per GPU, of a node.
        images_per_second: that all ranks together are to take.

    Raises:
        ConfigError: a mistake in the configuration, or a batch that does not divide.
        DataError: no manifest.
        typer.Exit: the model cannot be built; its message is on stderr.
    """
    config, world = load_run(path, overrides), nodes * procs
    manifest = open_data(config.data)
    plan = resolve(config, manifest.samples, world, str(path))
    arguments = ["plan", "--config", str(path), "--ranks", str(world)]
    for override in overrides:
        arguments += ["--set", override]
    done = subprocess.run(run_command(arguments), env=child_environment(1), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise typer.Exit(done.returncode)
    # The answer is the last line: gloo, as torch 2.8 has it, writes on stdout when a group begins.
    rows = cost_rows(json.loads(done.stdout.splitlines()[-1]), config, world)
    seconds = plan.total_samples / images_per_second
    rows["wall time"] = f"{duration(seconds)} at {images_per_second:,.0f} images/s, without evaluations"
    rows |= _reading(config, plan, manifest, nodes, images_per_second)
    return "\n".join([plan_table(config, plan), *(f"{name:17} {value}" for name, value in rows.items())])


def cost_rows(cost: Mapping[str, Any], config: RunConfig, world: int) -> dict[str, str]:
    """Parameters, memory, wire and checkpoints, as a person reads them."""
    frozen = f", {cost['frozen']:,} frozen" if cost["frozen"] else ""
    rows = {"parameters": f"{cost['trained']:,} trained{frozen}"}
    parts: dict[str, int] = {label: cost[name] for name, label in STATE.items() if cost[name]}
    rows["memory per GPU"] = f"{size(sum(parts.values()))}, and what kernels need meanwhile"
    for label, number in parts.items():
        note = {
            "activations": f" (estimate, micro-batch of {config.engine.micro_batch})",
            "gathered": " (at most: parameters that are whole while they are used)",
        }.get(label, "")
        rows[f"  {label}"] = f"{size(number)}{note}"
    wire = "not estimated under ZeRO 3" if cost["sent"] is None else f"{size(cost['sent'])} sent by each rank per step"
    rows["wire"] = f"{wire}, for gradients and parameters, {world} ranks"
    series = f", and one every {config.run.keep_every}" if config.run.keep_every.value else ""
    rows["checkpoint"] = f"{size(cost['checkpoint'])}, {config.run.keep} are kept{series}"
    return rows


def size(number: float) -> str:
    """ "1.5 GB", of 10^9 bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"


def _reading(config: RunConfig, plan: Plan, manifest: Manifest, nodes: int, images_per_second: float) -> dict[str, str]:
    if not isinstance(config.data.train, str):
        return {"reading": "a mixture of data sets; `sluice plan` each of them for its shards"}
    lanes = config.data.lanes or default_lanes(plan.global_batch, len(manifest.shards), manifest.samples)
    starts = np.array(manifest.starts, np.int64)
    order = Order(starts, config.run.seed, plan.global_batch, lanes, config.data.window, config.data.tail)
    found = forecast(manifest, order, nodes=nodes, world=plan.world_size, micro_batch=plan.micro_batch)
    return reading_rows(found, manifest, nodes, images_per_second)


def reading_rows(found: Forecast, manifest: Manifest, nodes: int, images_per_second: float) -> dict[str, str]:
    """What is read, as a person reads it."""
    shards = len(manifest.shards)
    rate = images_per_second * found.bytes_per_sample / nodes / 1e6
    return {
        "lanes": f"{found.lanes:,}, {shards / found.lanes:.1f} shards each",
        "shards per node": f"{found.shards_per_node[0]:,} to {found.shards_per_node[1]:,} in an epoch,"
        f" {found.gigabytes_per_node:,.1f} GB",
        "open shards": f"at most {found.open_per_rank} per rank, {found.open_per_node} per node",
        "mixing": f"{found.shards_in_batch:.0f} different shards in a micro-batch",
        "reading": f"{rate:,.1f} MB/s per node at {images_per_second:,.0f} images/s",
    }


def plan_data(
    data: str,
    *,
    nodes: int,
    procs: int,
    global_batch: int,
    micro_batch: int | None,
    lanes: int | None,
    window: int,
    images_per_second: float,
) -> str:
    """What a run would read of a data set, as text.

    Args:
        data: folder or URL of the data set.
        nodes: of the run.
        procs: ranks per node.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward; None: no accumulation.
        lanes: None: chosen as a run does.
        window: shards shuffled together.
        images_per_second: that all ranks together are to take.

    Raises:
        ConfigError: the batch does not divide or exceeds the data.
        DataError: no manifest.
    """
    manifest, world = load(data), nodes * procs
    micro = micro_batch or global_batch // world
    if not micro or global_batch % (world * micro):
        raise ConfigError(f"a global batch of {global_batch} is not a multiple of {world} ranks x {micro or 1} samples")
    if global_batch > manifest.samples:
        raise ConfigError(f"a global batch of {global_batch} is more than the {manifest.samples} samples of {data}")
    chosen = lanes or default_lanes(global_batch, len(manifest.shards), manifest.samples)
    if global_batch % chosen:
        raise ConfigError(f"{chosen} lanes do not divide a global batch of {global_batch}")
    order = Order(np.array(manifest.starts, np.int64), 0, global_batch, chosen, window, "drop")
    found = forecast(manifest, order, nodes=nodes, world=world, micro_batch=micro)
    ends = ", ".join(f"{found.steps_per_epoch * e:,.6g}" for e in (1, 2, 3))
    epoch = f"{found.steps_per_epoch:,.6g} steps, {found.left_over:,} samples left over"
    shards = len(manifest.shards)
    rows = {
        "data": f"{manifest.samples:,} samples in {shards:,} shards, {found.bytes_per_sample:,.0f} bytes each",
        "ranks": f"{world:,} = {nodes} nodes x {procs}",
        "global batch": f"{global_batch:,} = {world} ranks x {micro} samples x {global_batch // world // micro}",
        "epoch": f"{epoch}; ends at steps {ends}, ...",
        "micro-batches": f"{found.batches_per_rank:,} per rank and epoch, the same for all",
        **reading_rows(found, manifest, nodes, images_per_second),
    }
    return "\n".join(f"{name:16} {value}" for name, value in rows.items())
