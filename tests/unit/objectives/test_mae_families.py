"""MAE on every vision transformer that timm lists: trained for a step and exported, or refused with a reason."""

from __future__ import annotations

import collections

import pytest
import timm
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.weights import export_encoder, load_encoder
from pipeline.objectives.mae import MAE, Config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
MODULES = ["vision_transformer", "eva", "naflexvit", "deit", "beit", "hiera", "swin_transformer", "swin_transformer_v2"]
MODULES += ["vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"]
NAMES = {m: timm.list_models(module=m) for m in MODULES}
WORKS = {"vision_transformer": 163, "eva": 65, "naflexvit": 14, "deit": 12}
"""At least so many names of a module work: more in later versions of timm, and in older ones all but the distilled."""


def build(name: str) -> MAE:
    """One block of width 48, patches of the model's own size, a rectangular image of 2 x 3 patches."""
    args = {"embed_dim": 48, "depth": 1, "num_heads": 2}
    if "sapiens2" in name:
        args["num_kv_heads"] = 2
    default = timm.get_pretrained_cfg(name)
    patch = next((p for p in (8, 14, 16, 28, 32) if f"patch{p}_" in name or f"_p{p}_" in name), 16)
    assert default is not None
    torch.manual_seed(0)
    config = Config(encoder=name, encoder_args=args, mask_ratio=0.5, decoder_dim=8, decoder_depth=1, decoder_heads=1)
    return MAE(config, DataFacts((2 * patch, 3 * patch), ()))


def step_and_export(model: MAE, folder) -> None:
    height, width = (g * p for g, p in zip(model.geometry.grid, model.geometry.patch, strict=True))
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.manual_seed(0))
    data = {"image": image, "id": torch.arange(2), "epoch": torch.zeros(2, dtype=torch.int64)}
    for training in (True, False):
        loss = model.train(training)(data, CTX).loss
        assert loss.isfinite()
    loss.backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    encoder = model.encoders()["image"]
    path = folder / "encoder.safetensors"
    args = export_encoder(path, model.config, encoder, (height, width))
    theirs = timm.create_model(model.config.encoder, checkpoint_path=str(path), **args).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(model.normalize(image)), encoder(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for module in WORKS for name in NAMES[module][5::40]])
def test_families_are_resampled_to_another_size_and_read_again(name, tmp_path):
    model = build(name).eval()
    patch, image, path = model.geometry.patch, model.encoders()["image"], tmp_path / "e.safetensors"
    size = (2 * patch[0], 3 * patch[1])
    export_encoder(path, model.config, image, size)
    for other in (size, (4 * patch[0], 2 * patch[1])):
        again = MAE(model.config, DataFacts(other, ()))
        load_encoder(again.encoder, path)
        if other == size:
            state = again.encoder.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())
    if not hasattr(model.encoder, "set_input_size"):  # NaFlex, which takes any size as it is
        with pytest.raises(ConfigError, match="cannot change image or patch size"):
            export_encoder(path, model.config, image, size, new_image_size=other)
        return
    changes = {"new_image_size": other, "new_patch_size": (patch[0] // 2, patch[1] // 2)}
    args = export_encoder(path, model.config, image, size, **changes)
    theirs = timm.create_model(name, checkpoint_path=str(path), **args).eval()
    assert theirs.patch_embed.grid_size == (8, 4) and theirs(torch.rand(1, 3, *other)).isfinite().all()


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("module", MODULES)
def test_every_name_works_or_is_refused_with_a_reason(module, every, tmp_path):
    refused: dict[str, list[str]] = collections.defaultdict(list)
    worked = 0
    names = NAMES[module][::every] if module in WORKS else NAMES[module][:1] + NAMES[module][-1:]
    for name in names:
        try:
            if module in WORKS:
                model = build(name)
            else:  # at their full size, but nothing is allocated
                with torch.device("meta"):
                    model = MAE(Config(encoder=name), DataFacts((224, 224), ()))
        except ConfigError as error:
            refused[str(error)].append(name)
            continue
        step_and_export(model, tmp_path)
        worked += 1
    known = sum("distilled" not in name for name in names)  # a distilled one has a second class token
    assert worked >= min(WORKS.get(module, 0) // every, known), refused
    if module not in WORKS:
        assert worked == 0
    for reason in refused:
        assert any(text in reason for text in ("no place at which", "a stem that mixes", "timm cannot build")), refused
