"""``sluice look``: a page of what a model will see, from the first batch of a run that has not begun."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from contextlib import closing
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.core.contract import check_batch
from pipeline.core.errors import LaunchError
from pipeline.core.files import replace_file
from pipeline.core.protocols import Batch, Clock, StepContext
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from pipeline.data.stream import open_stream
from pipeline.data.text import TextDecoder
from pipeline.dist.group import process_group
from pipeline.nn.images import tile
from pipeline.nn.weights import no_initial_weights
from pipeline.record.console import say
from pipeline.record.page import folded, page, tiles
from pipeline.record.pictures import png
from pipeline.run.build import build_objective, tokenizer_of

LEAST = 128
"""Pixels of the side that small images are enlarged to, by whole factors."""
_STYLE = """
.seen { display: flex; flex-wrap: wrap; gap: 1rem; }
.seen article { padding: 0.5rem 0.9rem 0.8rem; border: 1px solid var(--rule); border-radius: 10px; }
.seen article { background: var(--card); }
.seen article > div { display: flex; flex-wrap: wrap; gap: 0.6rem; }
.seen figure { margin: 0; } .seen figcaption { text-align: center; } .seen p { max-width: 34rem; }
.seen code { padding: 0 0.25em; border: 1px solid var(--rule); border-radius: 4px; }
"""


def look(path: str, overrides: Sequence[str], samples: int, out: str) -> int:
    """Write the page.

    Args:
        path: the configuration.
        overrides: of it.
        samples: how many of the first batch are shown.
        out: the file.

    Raises:
        ConfigError: a mistake in the configuration.
        DataError: the data cannot be read.
    """
    config = load.load_run(path, overrides)
    with process_group(timeout_minutes=10):
        manifest = open_data(config.data)
        plan = resolve(config, manifest.samples, 1, path)
        # With the first batch's own order: how it is shared out over ranks changes nothing that is seen.
        data = config.data.model_copy(update={"workers": 0, "decode": "loader"})
        batch = plan.global_batch
        with closing(
            open_stream(data, manifest, seed=config.run.seed, global_batch=batch, micro_batch=batch, rank=0, world=1)
        ) as stream:
            first = next(stream.batches(0))[0]
        few = {name: value[:samples] for name, value in first.items()}
        known = facts(config.data, manifest)
        with no_initial_weights():
            objective = build_objective(config, known, path).train()
        check_batch(objective.needs, few, config.objective.name)
        ctx = StepContext(config.run.seed, Clock(0, 0, plan.total_samples))
        with torch.no_grad():
            seen = objective.inputs(few, ctx)
        tokenizer = tokenizer_of(config, manifest)
        decoder = None if tokenizer is None else TextDecoder(config.data.captions, tokenizer, config.run.seed)
        body = _head(config, path, plan.total_steps, batch, manifest.samples)
        body += _cards(few, seen, known.classes, decoder)
        body += "<h2>Configuration</h2>" + folded("All settings", f"<pre>{escape(load.dump(config))}</pre>")
    try:
        replace_file(Path(out), page(f"What {Path(path).stem} will see", body, wide=True).encode())
    except OSError as error:
        raise LaunchError(f"cannot write {out}: {error.strerror}; name another file: --out FILE") from error
    say(out)
    return FINISHED


def _head(config: RunConfig, path: str, steps: int, batch: int, samples: int) -> str:
    known: dict[str, str | None] = {
        "Method": config.objective.name,
        "Samples": f"{samples:,}",
        "Global batch": f"{batch:,}",
        "Steps": f"{steps:,}",
        "Image": "{}x{}".format(*config.data.image.shape),
    }
    about = "The beginning of the first batch, as the first step will see it: same crops, same chance."
    return f'<p class="brand">What will be seen</p><h1>{escape(path)}</h1><p class="about">{about}</p>{tiles(known)}'


def _cards(batch: Batch, seen: dict[str, Tensor], classes: Sequence[str], decoder: TextDecoder | None) -> str:
    """A card for each sample: its images, and its text as it is cut into tokens."""
    labels = batch["label"].tolist() if "label" in batch else []
    words, pieces = (decoder.words(batch), decoder.pieces(batch)) if decoder is not None else ([], [])
    cards: list[str] = []
    for row, number in enumerate(batch["id"].tolist()):
        label = f" <b>{escape(_class(labels[row], classes))}</b>" if labels else ""
        images = "".join(_image(value[row], name) for name, value in seen.items())
        text = ""
        if words:
            tokens = " ".join(f"<code>{escape(piece)}</code>" for piece in pieces[row])
            text = f"<p>{escape(words[row])}</p><p class=soft>{len(pieces[row])} tokens: {tokens}</p>"
        cards.append(f"<article><p class=soft>sample {number:,}{label}</p><div>{images}</div>{text}</article>")
    fields = ", ".join(f"{name} {_shape(value)}" for name, value in batch.items())
    return (
        f'<style>{_STYLE}</style><h2>The first samples</h2><div class="seen">{"".join(cards)}</div>'
        f"<p class=soft>Fields of the batch: {escape(fields)}</p>"
    )


def _class(label: int, classes: Sequence[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else f"label {label}, which has no name"


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype)[6:]}[{','.join(map(str, ('B', *value.shape[1:])))}]"


def _image(image: Tensor, name: str) -> str:
    data = base64.b64encode(png(tile([image[None]], gap=0))).decode()
    height, width = image.shape[1:]
    scale = max(1, LEAST // max(height, width))
    size = f'width="{width * scale}" height="{height * scale}"'
    picture = f'<img class="small" src="data:image/png;base64,{data}" alt="{escape(name)}" {size}>'
    return f"<figure>{picture}<figcaption>{escape(name)}</figcaption></figure>"
