import argparse
import json
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.nn.construct import construct_encoder
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.weights import export_encoder, load_encoder, read, save

ARGS = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}


def encoder(size=(32, 48), pool="cls", name="vit_tiny_patch16_224", channels=3, **args):
    colours = {"mean": (0.5,) * channels, "std": (0.2,) * channels}
    config = EncoderConfig(encoder=name, encoder_args=ARGS | args, **colours)
    fixed = {} if pool == "native" else {"global_pool": ""}
    torch.manual_seed(0)
    backbone = create_backbone(config, size, **fixed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return config, ImageEncoder(Normalize(config.mean, config.std), backbone, pool).eval()


def image(size=(32, 48)):
    return torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.manual_seed(1))


@pytest.mark.parametrize(("pool", "channels"), [("cls", 3), ("mean", 3), ("native", 3), ("cls", 1), ("mean", 5)])
def test_timm_loads_an_export_strictly_and_gives_the_same_features(tmp_path, pool, channels):
    config, mine = encoder(pool=pool, channels=channels)
    args = export_encoder(tmp_path / "e.safetensors", config, mine, (32, 48))
    theirs = timm.create_model(config.encoder, checkpoint_path=str(tmp_path / "e.safetensors"), **args).eval()
    seen = image()[:, [0] * channels]
    torch.testing.assert_close(theirs(mine.normalize(seen)), mine(seen))
    _, metadata = read(tmp_path / "e.safetensors")
    assert json.loads(metadata["timm"])["architecture"] == config.encoder
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_an_export_at_the_same_size_is_the_same_table(tmp_path):
    config, mine = encoder()
    export_encoder(tmp_path / "a", config, mine, (32, 48))
    export_encoder(tmp_path / "b", config, mine, (32, 48), new_image_size=(32, 48), new_patch_size=(8, 8))
    assert (tmp_path / "a").read_bytes()[-5000:] == (tmp_path / "b").read_bytes()[-5000:]


@pytest.mark.parametrize(
    ("size", "patch", "grid"),
    [((64, 32), None, (8, 4)), (None, (4, 4), (8, 12)), ((36, 60), (12, 4), (3, 15)), ((8, 8), None, (1, 1))],
)
def test_an_export_at_another_size_is_resampled(tmp_path, size, patch, grid):
    config, mine = encoder()
    path = tmp_path / "e.safetensors"
    args = export_encoder(path, config, mine, (32, 48), new_image_size=size, new_patch_size=patch)
    theirs = timm.create_model(config.encoder, checkpoint_path=str(path), **args).eval()
    assert theirs.patch_embed.grid_size == grid and theirs(torch.rand(1, 3, *(size or (32, 48)))).shape == (1, 16)
    old = mine.backbone.pos_embed.detach()
    table = old[:, 1:].reshape(1, 4, 6, 16).permute(0, 3, 1, 2)
    expected = functional.interpolate(table, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(theirs.pos_embed, torch.cat([old[:, :1], expected], dim=1))
    assert mine.backbone.pos_embed.shape == (1, 25, 16)  # the export changed a copy


def test_a_model_that_cannot_be_resampled_is_refused(tmp_path):
    config = EncoderConfig(encoder="resnet10t")
    mine = ImageEncoder(Normalize(config.mean, config.std), create_backbone(config, (32, 32)), "native")
    export_encoder(tmp_path / "e", config, mine, (32, 32))
    with pytest.raises(ConfigError, match="cannot change image or patch size"):
        export_encoder(tmp_path / "e", config, mine, (32, 32), new_image_size=(64, 64))


def original_layout(size=(32, 32)):
    """A checkpoint as the MAE repository writes it: encoder, decoder and mask token side by side."""
    _, mine = encoder(size)
    state = OrderedDict(mine.backbone.state_dict())
    state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    state |= {"decoder_embed.weight": torch.zeros(8, 16), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return mine, state


@pytest.mark.parametrize("kind", ["original", "training", "bare", "safetensors", "autoencoder", "fine-tuned"])
def test_every_layout_is_read(tmp_path, kind):
    mine, state = original_layout()
    path = tmp_path / "weights.pth"
    if kind == "original":
        torch.save({"model": state, "epoch": 3}, path)
    elif kind == "training":  # as its main_pretrain.py saves them, locally or under SLURM
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=1e-3)
        weight.sum().backward()
        optimizer.step()
        args = argparse.Namespace(batch_size=64, blr=1.5e-4, norm_pix_loss=True, resume="", output_dir=tmp_path)
        scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
        saved = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": scaler, "args": args}
        torch.save(saved, path)
    elif kind == "bare":
        torch.save(state, path)
    elif kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(dict(state), path)
    elif kind == "autoencoder":
        path = tmp_path / "weights.safetensors"
        save(
            path, {f"encoder.{k}": v for k, v in mine.backbone.state_dict().items()} | {"decoder.x": torch.ones(1)}, {}
        )
    else:
        torch.save({"model": state | {"head.weight": torch.ones(5, 16), "head.bias": torch.ones(5)}}, path)
    _, fresh = encoder((32, 32))
    with torch.no_grad():
        fresh.backbone.pos_embed.zero_()
    load_encoder(fresh.backbone, path)
    assert all(torch.equal(v, fresh.backbone.state_dict()[k]) for k, v in mine.backbone.state_dict().items())


def test_a_rectangular_table_finds_its_way_to_another_rectangle(tmp_path):
    config, mine = encoder((32, 48))
    export_encoder(tmp_path / "e.safetensors", config, mine, (32, 48))
    for size in ((32, 48), (48, 32), (64, 64)):  # the second has as many patches
        _, other = encoder(size)
        load_encoder(other.backbone, tmp_path / "e.safetensors")
        grid = (size[0] // 8, size[1] // 8)
        table = mine.backbone.pos_embed[:, 1:].reshape(1, 4, 6, 16).permute(0, 3, 1, 2)
        expected = functional.interpolate(table, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        if size == (32, 48):
            expected = mine.backbone.pos_embed[:, 1:]
        torch.testing.assert_close(other.backbone.pos_embed[:, 1:], expected)


@pytest.mark.parametrize("patches", [2, 6])
def test_positions_are_resampled_without_antialiasing_where_it_is_asked_for(tmp_path, patches):
    """As ``interpolate_pos_embed`` of the MAE repository, for smaller grids and larger ones."""
    config, mine = encoder((32, 32))
    export_encoder(tmp_path / "e.safetensors", config, mine, (32, 32))
    size, old = (8 * patches, 8 * patches), mine.backbone.pos_embed.detach()
    table = old[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    for smooth in (False, True):
        chosen = config.model_copy(update={"weights": str(tmp_path / "e.safetensors"), "antialias": smooth})
        found = construct_encoder(chosen, size, "test", start=None).backbone.pos_embed.detach()
        expected = functional.interpolate(
            table, size=(patches, patches), mode="bicubic", align_corners=False, antialias=smooth
        )
        torch.testing.assert_close(found, torch.cat([old[:, :1], expected.flatten(2).transpose(1, 2)], dim=1))


@pytest.mark.parametrize("args", [{"no_embed_class": True}, {"class_token": False}, {"reg_tokens": 2}])
def test_tables_with_and_without_prefix_are_resampled(tmp_path, args):
    config, mine = encoder((32, 32), "mean", **args)
    export_encoder(tmp_path / "e.safetensors", config, mine, (32, 32))
    _, other = encoder((48, 32), "mean", **args)
    load_encoder(other.backbone, tmp_path / "e.safetensors")
    prefix = 3 if "reg_tokens" in args else 0
    old, new = mine.backbone.pos_embed, other.backbone.pos_embed
    table = old[:, prefix:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = functional.interpolate(table, size=(6, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(new, torch.cat([old[:, :prefix], expected], dim=1))


def test_a_pooled_encoder_for_fine_tuning_takes_all_but_the_norm(tmp_path):
    mine, state = original_layout()
    torch.save({"model": state}, tmp_path / "w.pth")
    _, pooled = encoder((32, 32), "native", global_pool="avg")
    before = pooled.backbone.fc_norm.weight.clone()
    load_encoder(pooled.backbone, tmp_path / "w.pth")
    assert torch.equal(pooled.backbone.fc_norm.weight, before)
    assert torch.equal(pooled.backbone.blocks[1].mlp.fc1.weight, mine.backbone.blocks[1].mlp.fc1.weight)


def test_a_smaller_patch_is_resampled(tmp_path):
    _, state = original_layout()
    torch.save(state, tmp_path / "w.pth")
    _, finer = encoder((32, 32), patch_size=4)
    load_encoder(finer.backbone, tmp_path / "w.pth")
    assert finer.backbone.patch_embed.proj.weight.shape == (16, 3, 4, 4)


class Surprise:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda p: None, "cannot read weights"),
        (lambda p: p.write_bytes(b"not a checkpoint"), "damaged or holds more"),
        (lambda p: p.write_bytes(pickle.dumps({"model": Surprise()}, 2)), "damaged or holds more"),
        (lambda p: torch.save({"model": Surprise()}, p), "damaged or holds more"),
        (lambda p: torch.save({"epoch": 3}, p), "holds no weights"),
        (lambda p: torch.save({"x": torch.ones(1)}, p), "missing"),
        (lambda p: torch.save(original_layout()[1] | {"blocks.7.norm1.weight": torch.ones(16)}, p), r"blocks\.7"),
        (lambda p: torch.save(encoder((32, 32), embed_dim=32)[1].backbone.state_dict(), p), "of another size"),
        (lambda p: torch.save(encoder((32, 48))[1].backbone.state_dict(), p), "24 patches, which are not 4x4"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_run(tmp_path, capsys, content, message):
    path = tmp_path / "w.pth"
    content(path)
    with pytest.raises(CheckpointError, match=message):
        load_encoder(encoder((32, 32))[1].backbone, path)
    assert "unpickled" not in capsys.readouterr().out


def test_a_truncated_safetensors_is_refused(tmp_path):
    config, mine = encoder()
    path = tmp_path / "e.safetensors"
    export_encoder(path, config, mine, (32, 48))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read weights"):
        load_encoder(mine.backbone, path)
