"""Models of timm as subjects: the same features as timm itself gives through its own transform."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from pipeline.config.schema import Image
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.data.decode import Geometry, ImageDecoder
from pipeline.nn.weights import as_timm
from pipeline.suites import foreign
from pipeline.suites.foreign import cropped, timm_model
from pipeline.suites.identity import weights_hash

CLASSES = 1000


def stirred(name: str, **arguments) -> nn.Module:
    """A model of timm none of whose weights or statistics is zero or one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            value.abs_() if value.min() >= 0 else None
            value += 0.02 * torch.rand_like(value)
    return model


def picture(height: int, width: int) -> PillowImage.Image:
    """Smooth, as photographs are."""
    coarse = np.random.default_rng(height).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PillowImage.fromarray(coarse).resize((width, height), PillowImage.Resampling.BICUBIC)


def decoded(image: Image, shown: PillowImage.Image) -> torch.Tensor:
    """uint8[1,3,H,W], as the loader makes it."""
    file = io.BytesIO()
    shown.save(file, "PNG")
    return ImageDecoder(image, 0).decode(memoryview(file.getvalue()), [Geometry([], False)])[0][None]


@pytest.mark.parametrize(
    ("name", "resized"),
    [("test_vit", (168, 200)), ("test_resnet", (230, 168)), ("resnet10t", (200, 200))],
)
def test_features_and_logits_are_timms_through_its_own_transform(name, resized, tmp_path):
    """Of images whose short side is what timm resizes to, so that pixels are the same to the last bit."""
    theirs = stirred(name)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    found = timm_model(name, tmp_path / "w.safetensors")
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    shown = picture(*resized)
    if name == "resnet10t":  # 176 of 0.875: 201 pixels
        shown = picture(208, 300).crop((0, 0, 260, 201))
    assert isinstance(found.image, Image)
    own, seen = decoded(found.image, shown), transform(shown)[None]
    with torch.no_grad():
        features = theirs.forward_head(theirs.forward_features(seen), pre_logits=True)
        for encoder, expected in (("image", features), ("logits", theirs(seen))):
            assert expected.std() > 1e-3
            torch.testing.assert_close(found.encoders[encoder].eval()(own), expected, rtol=1e-5, atol=1e-5)
    assert len(found.classes) == CLASSES and found.classes[0] == "n01440764"


@pytest.mark.parametrize("name", ["test_vit", "resnet18.tv_in1k", "vit_tiny_patch16_224", "convnext_atto"])
@pytest.mark.parametrize("size", [(96, 130), (301, 260), (520, 333)])
def test_images_are_cropped_as_timm_crops_them(name, size):
    """But for a level of 255 here and there, where torch and Pillow round otherwise."""
    taken = resolve_model_data_config(timm.create_model(name))
    image = cropped(taken)
    assert isinstance(image, Image) and image.interpolation == taken["interpolation"]
    shown = picture(*size)
    expected = create_transform(**taken, normalize=False, is_training=False)(shown).float()
    found = decoded(image, shown)[0].float()
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.2 and (found - expected).abs().max() <= 3


def test_the_other_interpolation_is_another(tmp_path):
    shown = picture(301, 260)
    bicubic, bilinear = (
        decoded(Image(size=64, crop="center", interpolation=i), shown) for i in ("bicubic", "bilinear")
    )
    assert (bicubic.int() - bilinear.int()).abs().float().mean() > 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [({"interpolation": "lanczos"}, "lanczos"), ({"crop_mode": "border"}, "border"), ({"crop_mode": "squash"}, "0.9")],
)
def test_what_is_none_of_our_ways_is_said(change, says):
    taken = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.9}
    assert says in str(cropped(taken | change))


def test_squashed_images_are_resized_on_both_sides():
    taken = {"input_size": (3, 64, 96), "interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 1.0}
    assert cropped(taken) == Image(size=(64, 96), crop="resize", interpolation="bilinear")


def test_without_a_head_or_with_one_of_unknown_classes_there_are_features_alone(tmp_path):
    for count in (0, 7):
        model = stirred("test_vit", num_classes=count)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        found = timm_model("test_vit", tmp_path / "w.safetensors")
        assert list(found.encoders) == ["image"] and found.classes == ()


def test_weights_as_their_authors_published_them_are_translated_as_timm_does(tmp_path):
    """DINOv2's: a token for masked patches, and other names for registers and scales."""
    theirs = stirred("vit_tiny_patch16_224", num_classes=0, reg_tokens=2, no_embed_class=True, depth=1)
    state = dict(theirs.state_dict())
    place = torch.rand(1, 1, 192)
    published = {k: v for k, v in state.items() if k != "reg_token"}
    published |= {"mask_token": torch.zeros(1, 192), "register_tokens": state["reg_token"]}
    published["cls_token"] = state["cls_token"] - place
    published["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    found = as_timm(theirs, published)
    foreign.hold(theirs, found, tmp_path, "it")
    for name, value in state.items():
        torch.testing.assert_close(found[name], value)


def test_a_file_of_another_architecture_says_what_is_missing_and_what_is_too_much(tmp_path):
    save_file(stirred("test_resnet").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(
        CheckpointError, match=r"not of timm's 'test_vit': \d+ missing \(blocks.*\d+ not expected \("
    ) as e:
        timm_model("test_vit", tmp_path / "w.safetensors")
    assert "w.safetensors" in str(e.value)


def test_a_file_of_another_size_says_which_tensor(tmp_path):
    save_file(stirred("vit_tiny_patch16_224", depth=12).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"another shape, first .* with .* instead of"):
        timm_model("vit_small_patch16_224", tmp_path / "w.safetensors")


def test_an_unknown_model_has_a_neighbour():
    with pytest.raises(ConfigError, match=r"no model 'resnet19'.*resnet1"):
        timm_model("resnet19", None)


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(1), "trap": Trap()}, "w.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        timm_model("test_vit", Path("w.pth"))
    assert not Path("sprung").exists()


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (timm_model("test_vit", None).encoders for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_hash(first) == weights_hash(second)


def test_the_same_weights_in_another_architecture_or_normalisation_have_another_hash(tmp_path):
    save_file(stirred("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    names = ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", "deit_tiny_patch16_224")
    hashes = [weights_hash(timm_model(name, tmp_path / "w.safetensors").encoders) for name in names]
    assert len({*hashes}) == 3
