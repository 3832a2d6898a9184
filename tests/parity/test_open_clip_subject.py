"""open_clip's models as subjects: features, tokens and crops are open_clip's own."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file

from pipeline.config.schema import Image
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.data.decode import Geometry, ImageDecoder
from pipeline.data.text import TextDecoder
from pipeline.suites.foreign_clip import open_clip_model

pytest.importorskip("open_clip", reason="needs the extra 'parity'")
pytestmark = pytest.mark.filterwarnings("ignore")  # open_clip's imports
TEXTS = ["a photo of a cat", "A Bold  SERIF!", "it's 2024, isn't it?"]
VISION = {"image_size": 64, "layers": 2, "width": 48, "head_width": 24, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TOWERS = {
    "own": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "quick": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "custom text": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "custom_text": True},
    "timm": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """open_clip with small models of ours among its own."""
    import open_clip
    from open_clip import factory

    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS, **TOWERS})
    return open_clip


def stirred(library, name: str) -> torch.nn.Module:
    """None of its weights is zero or one."""
    torch.manual_seed(0)
    model = library.create_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("form", ["safetensors", "training checkpoint"])
@pytest.mark.parametrize("name", TOWERS)
def test_both_towers_and_the_tokens_are_open_clips(name, form, library, tmp_path):
    theirs = stirred(library, name)
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "epoch_1.pt")
    if form == "safetensors":
        save_file({k: v.clone() for k, v in theirs.state_dict().items()}, file)
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, file)
    found = open_clip_model(name, file)

    assert isinstance(found.image, Image) and found.tokenizer is not None
    size = theirs.visual.preprocess_cfg["size"]
    side = size if isinstance(size, int) else size[0]
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 40, 3), dtype=np.uint8)
    shown = PillowImage.fromarray(pixels)
    file = io.BytesIO()
    shown.save(file, "PNG")
    image = ImageDecoder(found.image, 0).decode(memoryview(file.getvalue()), [Geometry([], False)])[0][None]
    _, _, seen = library.create_model_and_transforms(name)
    tokens = library.get_tokenizer(name)(TEXTS)
    own = TextDecoder(found.captions, found.tokenizer, 0).tokens(TEXTS)
    assert torch.equal(own["text"], tokens)
    with torch.no_grad():
        pairs = [
            (found.encoders["image"].eval()(image), theirs.encode_image(seen(shown)[None])),
            (found.encoders["text"].eval()(own["text"], own["text_length"]), theirs.encode_text(tokens)),
        ]
    for mine, expected in pairs:
        assert expected.std() > 1e-2
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_another_model_is_named_with_what_differs(library, tmp_path):
    save_file({k: v.clone() for k, v in stirred(library, "own").state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"of open_clip's 'timm': \d+ missing \(visual.*not expected \(visual"):
        open_clip_model("timm", tmp_path / "w.safetensors")


def test_an_unknown_model_has_a_neighbour(tmp_path):
    with pytest.raises(ConfigError, match=r"no model 'ViT-B-33'.*ViT-B-32"):
        open_clip_model("ViT-B-33", tmp_path / "w.safetensors")


def test_a_tower_that_would_be_fetched_is_refused(library, tmp_path, monkeypatch):
    monkeypatch.setitem(TOWERS["own"]["text_cfg"], "hf_model_name", "roberta-base")
    with pytest.raises(ConfigError, match="text tower is not open_clip's own"):
        open_clip_model("own", tmp_path / "w.safetensors")


def test_a_vocabulary_that_is_not_at_hand_leaves_images_alone(library, tmp_path):
    """As of a folder whose tokenizer.json was not put there; with it, texts are read."""
    config = TOWERS["own"] | {"text_cfg": TEXT | {"vocab_size": 60, "hf_tokenizer_name": "tokenizer.json"}}
    library.factory._MODEL_CONFIGS["other words"] = config
    theirs = library.create_model("other words")
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    assert list(open_clip_model("", tmp_path).encoders) == ["image"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert list(open_clip_model("", tmp_path).encoders) == ["image", "text"]


@pytest.mark.parametrize("text", ["{", "{}", '{"model_cfg": {"embed_dim": 3, "text_cfg": 1}}'])
def test_a_damaged_configuration_is_named(text, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"open_clip_config.json is no configuration of open_clip"):
        open_clip_model("", tmp_path)
