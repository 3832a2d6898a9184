"""The page of what will be seen: the images of the first batch as the first step has them, and nothing is trained."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.manifest import load
from pipeline.data.text import TextDecoder
from pipeline.dist.group import process_group
from pipeline.run.build import build_stream, tokenizer_of
from tests.integration.runs import SMOKE, codes
from tests.ranks import start_ranks
from tests.unit.data.test_text import WORDS, tokenizer


def page(objective: str, settings: list[str], out: Path) -> str:
    arguments = ["look", "--config", str(SMOKE / f"{objective}.toml"), "--samples", "5", "--out", str(out)]
    for setting in settings:
        arguments += ["--set", setting]
    ended = start_ranks(1, _main, arguments=arguments)
    assert codes(ended) == [0]
    return out.read_text()


def _main(arguments: list[str]) -> int:
    from pipeline.run.__main__ import main

    return main(arguments)


def images(html: str) -> list[tuple[str, np.ndarray]]:
    found = re.findall(r'<img class="small" src="data:image/png;base64,([^"]+)" alt="([^"]+)"', html)
    return [(name, np.array(Image.open(io.BytesIO(base64.b64decode(data))))) for data, name in found]


def trained_on(objective: str, settings: list[str], rank: int = 0, world: int = 1):
    """The first batch of a training run, and its configuration."""
    config = load_run(SMOKE / f"{objective}.toml", settings)
    manifest = load(config.data.train)
    with process_group(timeout_minutes=1) as place:
        stream = build_stream(config, manifest, resolve(config, manifest.samples, 1, ""), place)
        batch = next(stream.batches(0))
        stream.close()
    return {name: np.concatenate([part[name].numpy() for part in batch]) for name in batch[0]}, config, manifest


@pytest.fixture
def settings(glyphs, tmp_path):
    return [f"data.train='{glyphs / 'train'}'", f"run.folder='{tmp_path / 'run'}'", "run.global_batch=8"]


def test_images_and_labels_are_those_of_the_first_step(settings, tmp_path):
    html = page("simclr", settings, tmp_path / "look.html")
    batch, _, _ = trained_on("simclr", settings)
    assert [int(n) for n in re.findall(r"sample (\d+)", html)] == batch["id"][:5].tolist()
    shown = images(html)
    assert [name for name, _ in shown] == ["image", "view", "image2", "view2"] * 5
    for row in range(5):
        for column, name in ((0, "image"), (2, "image2")):
            np.testing.assert_array_equal(shown[4 * row + column][1], batch[name][row].transpose(1, 2, 0))
    changed = [(shown[4 * row + 1][1] != shown[4 * row][1]).any() for row in range(5)]
    assert sum(changed) >= 2, "views are crops, most of them in other colours"
    assert not (tmp_path / "run").exists() and "://" not in html


def test_a_mask_hides_as_many_patches_as_it_is_told(settings, tmp_path):
    html = page("mae", settings, tmp_path / "look.html")
    batch, _, _ = trained_on("mae", settings)
    patch, ratio = 8, 0.75  # as the smoke configuration leaves it
    shown = images(html)
    assert [name for name, _ in shown] == ["image", "seen"] * 5
    for row in range(5):
        whole = batch["image"][row].transpose(1, 2, 0).astype(int)
        seen = shown[2 * row + 1][1].astype(int)
        cells = [
            np.abs(whole[y : y + patch, x : x + patch] - seen[y : y + patch, x : x + patch]).max() <= 1
            for y in range(0, 32, patch)
            for x in range(0, 32, patch)
        ]
        assert sum(cells) == round(16 * (1 - ratio))


def test_texts_are_shown_as_tokens(settings, glyphs, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer(WORDS))
    settings.append(f"data.captions.tokenizer='{path}'")
    html = page("clip", settings, tmp_path / "look.html")
    batch, config, manifest = trained_on("clip", settings)
    content = tokenizer_of(config, manifest)
    assert content is not None
    lengths = [int(n) for n in re.findall(r"(\d+) tokens:", html)]
    assert lengths == batch["text_length"][:5].tolist()
    assert len(re.findall(r"<code>&lt;end_of_text&gt;</code>", html)) == 5
    assert TextDecoder(config.data.captions, content, 0).sha256


def test_a_mistake_is_one_message(settings, tmp_path):
    arguments = [
        "look",
        "--config",
        str(SMOKE / "mae.toml"),
        "--samples",
        "5",
        "--out",
        str(tmp_path / "no" / "x.html"),
    ]
    for setting in settings:
        arguments += ["--set", setting]
    assert codes(start_ranks(1, _main, arguments=arguments)) == [2]
