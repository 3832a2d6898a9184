import functools
import shutil

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.images import patchify
from pipeline.nn.weights import export_encoder, save
from pipeline.objectives.mae import MAE, Config
from pipeline.objectives.supervised import Config as SupervisedConfig
from pipeline.objectives.supervised import Supervised
from tests.parity import plain_mae
from tests.perf.mae_gpu import forward_flops

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))


def build(size=(32, 32), patch=8, **settings):
    args = {"patch_size": patch, "embed_dim": 32, "depth": 2, "num_heads": 2} | settings.pop("encoder_args", {})
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    torch.manual_seed(0)
    return MAE(Config(encoder="vit_tiny_patch16_224", encoder_args=args, **decoder | settings), DataFacts(size, ()))


def batch(size=(32, 32), samples=4, channels=3):
    image = torch.randint(0, 256, (samples, channels, *size), dtype=torch.uint8, generator=torch.manual_seed(5))
    return {"image": image, "id": torch.arange(samples), "epoch": torch.zeros(samples, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("size", "patch", "width", "depth", "heads", "ratio", "norm_pix"),
    [
        ((32, 32), 8, 32, 2, (2, 2), 0.75, True),
        ((64, 64), 16, 48, 3, (3, 4), 0.5, True),
        ((24, 48), 8, 64, 1, (4, 1), 0.9, False),
    ],
)
def test_loss_and_gradient_equal_the_plain_transcription(size, patch, width, depth, heads, ratio, norm_pix):
    args = {"embed_dim": width, "depth": depth, "num_heads": heads[0]}
    model = build(
        size, patch, encoder_args=args, decoder_depth=depth, decoder_heads=heads[1], mask_ratio=ratio, norm_pix=norm_pix
    )
    with torch.no_grad():  # nothing at its initial zero or one
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    data = batch(size)
    keep, hidden = model.masks(data, CTX)
    noise = torch.empty(4, keep.shape[1] + hidden.shape[1])
    noise.scatter_(1, torch.cat([keep, hidden], dim=1), torch.arange(noise.shape[1]).float().expand_as(noise))
    assert keep.shape[1] == int(noise.shape[1] * (1 - ratio))

    loss = model(data, CTX).loss
    loss.backward()
    weights = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.config.mean, model.config.std))
    expected = plain_mae.loss(
        weights,
        (data["image"] / 255 - mean) / std,
        noise,
        patch=patch,
        keep=keep.shape[1],
        heads=heads,
        norm_pix=norm_pix,
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-3, atol=2e-6, msg=name)


def test_targets_have_no_mean_and_unit_variance_in_each_patch_even_with_bf16_weights():
    model = build().to(torch.bfloat16)
    target = model.targets(batch())
    assert target.dtype == torch.float32 and target.shape == (4, 16, 192)
    numpy = patchify(model.normalize(batch()["image"]), (8, 8)).double().numpy()
    expected = (numpy - numpy.mean(-1, keepdims=True)) / np.sqrt(numpy.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(target.numpy(), expected, atol=1e-5)


def test_a_flat_patch_is_no_reason_for_nan():
    model = build()
    data = batch()
    data["image"].fill_(200)
    loss = model(data, CTX).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_masks_follow_the_sample_and_not_its_place_in_the_batch():
    model, data = build(), batch()
    keep, _ = model.masks(data, CTX)
    backwards = {name: value.flip(0) for name, value in data.items()}
    assert torch.equal(model.masks(backwards, CTX)[0].flip(0), keep)
    later = data | {"epoch": data["epoch"] + 1}
    assert not torch.equal(model.masks(later, CTX)[0], keep)


def test_initial_weights_are_those_of_the_paper():
    model = build(encoder_args={"embed_dim": 64})
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "embed.weight", "predict.weight")):
            matrix = parameter.detach().flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert matrix.abs().max() <= bound and abs(matrix.std() - bound / 3**0.5) < 0.06 * bound, name
        elif name.endswith("bias") and "norm" not in name and "patch_embed" not in name:
            assert not parameter.any(), name
    assert 0.01 < weights["encoder.cls_token"].std() < 0.03 and 0.01 < weights["decoder.mask_token"].std() < 0.03
    assert not weights["encoder.pos_embed"].requires_grad and not weights["encoder.pos_embed"][:, 0].any()
    assert model.no_weight_decay() == set() and weights["encoder.cls_token"].ndim > 1  # decayed, as in the paper


def test_a_perfect_decoder_is_shown_as_the_original():
    model, data = build(), batch()
    model.reconstruct = lambda x, keep: model.targets(data)
    picture = model.showcase(data, CTX)["reconstruction"].image
    original, seen, rebuilt, pasted = (picture[r * 34 : r * 34 + 32, :32] for r in range(4))
    grey = np.round(np.array(model.config.mean) * 255)
    hidden = abs(seen.astype(int) - grey).max(-1) < 1
    assert abs(rebuilt.astype(int) - original)[hidden].max() <= 1 and abs(pasted.astype(int) - original).max() <= 1
    assert (abs(rebuilt - grey)[~hidden] < 1).all()  # never trained, so not shown
    assert 0.6 < (abs(seen[:, :32] - grey).max(-1) < 1).mean() < 0.9


@pytest.mark.parametrize(("ratio", "visible"), [(0.99, 0), (1e-18, 16)])
def test_a_mask_that_leaves_nothing_to_see_or_to_predict_is_refused(ratio, visible):
    with pytest.raises(ConfigError, match=f"leaves {visible} visible"):
        build(mask_ratio=ratio)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="does not divide"):
        Config(decoder_dim=16, decoder_heads=3)
    with pytest.raises(ConfigError, match="global_pool cannot be set"):
        build(encoder_args={"global_pool": "avg"})


def test_an_encoder_without_class_token_is_pooled_over_patches():
    with_cls, without = build(), build(encoder_args={"class_token": False})
    assert with_cls.encoders()["image"].pool == "cls" and without.encoders()["image"].pool == "mean"
    assert without(batch(), CTX).loss.isfinite()


def test_any_number_of_channels():
    model = build(mean=(0.5,) * 4, std=(0.25,) * 4)
    data = batch(channels=4)
    assert model.needs == {"image": "uint8[B,4,H,W]"}
    assert model(data, CTX).loss.isfinite() and model.showcase(data, CTX)["reconstruction"].image.shape[2] == 3


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_loss_on_all_patches_is_the_mean_over_hidden_and_visible(ratio):
    model, data = build(mask_ratio=ratio, loss_on="all"), batch()
    out = model(data, CTX)
    keep, hidden = model.masks(data, CTX)
    error = (model.reconstruct(model.normalize(data["image"]), keep) - model.targets(data)).square()
    torch.testing.assert_close(out.loss, error.mean())
    assert hidden.shape[1] == 16 * ratio
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_input_is_damaged_and_the_target_is_not():
    clean, damaged = build(), build(corruption={"noise": 0.5, "holes": 2})
    data = batch()
    assert torch.equal(clean.targets(data), damaged.targets(data))
    view = damaged.view(data, CTX)
    assert not torch.equal(view, clean.view(data, CTX)) and torch.equal(view, damaged.view(data, CTX))
    assert damaged(data, CTX).loss != clean(data, CTX).loss
    original, seen = (damaged.showcase(data, CTX)["reconstruction"].image[r * 34 : r * 34 + 32] for r in range(2))
    assert (original[:, :32] == data["image"][0].permute(1, 2, 0).numpy()).all() and not (seen == original).all()


TEACHER = {
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def test_a_frozen_teacher_gives_normalised_features_and_never_changes():
    model, data = build(teacher=TEACHER | {"mean": (0.5,) * 3, "std": (0.5,) * 3}).train(), batch()
    assert not model.teacher.training and not any(p.requires_grad for p in model.teacher.parameters())
    target = model.targets(data)
    tokens = model.teacher.encoder((data["image"] / 255 - 0.5) / 0.5)[:, 1:]
    centred = tokens - tokens.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    model(data, CTX).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert model.showcase(data, CTX)["reconstruction"].image.shape == (4 * 34 - 2, 4 * 34 - 2, 3)


def test_a_teacher_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="2x2 patches, the encoder into 4x4"):
        build(teacher=TEACHER | {"encoder_args": TEACHER["encoder_args"] | {"patch_size": 16}})
    with pytest.raises(ValidationError, match="as many channels"):
        build(teacher=TEACHER | {"mean": (0.5,), "std": (0.5,)})


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"mask_ratio": 0.0}, ValidationError),
        ({"mask": "grid", "mask_ratio": 0.6}, ValidationError),
        ({"mask": "grid", "mask_ratio": 0.8889}, ConfigError),
    ],
)
def test_masks_that_cannot_be_are_refused(settings, error):
    with pytest.raises(error, match=r"hides nothing|one patch of each|4x4 patches cannot be cut into 3x3"):
        build(**settings)


@pytest.mark.parametrize("kind", ["block", "grid"])
def test_other_masks_train_as_well(kind):
    model = build(mask=kind)
    model(batch(), CTX).loss.backward()
    assert model.visible == 4


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_gives_the_same_loss_and_gradient(drop_path):
    args = {"drop_path_rate": drop_path}
    plain, thrifty = build(encoder_args=args), build(encoder_args=args, checkpointing=True)
    data, losses, calls = batch(), [], []
    for model in (plain, thrifty):
        for block in (model.encoder.blocks[0], model.decoder.blocks[0]):
            block.register_forward_pre_hook(lambda block, _: calls.append(block))
        loss = model.train()(data, CTX).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    assert [calls.count(m.blocks[0]) for m in (plain.encoder, plain.decoder)] == [1, 1]
    assert [calls.count(m.blocks[0]) for m in (thrifty.encoder, thrifty.decoder)] == [2, 2]  # once more in the backward
    for one, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # the whole way but the code generator
        pytest.param(
            "inductor",  # minutes, for a few kernels
            marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")],
        ),
    ],
)
def test_compiled_blocks_give_the_same_loss_and_gradient_and_the_same_names(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    args = {"drop_path_rate": 0.5}
    plain, compiled = build(encoder_args=args), build(encoder_args=args, compile=True)
    data, seen = batch(), torch._dynamo.utils.counters["stats"]
    before = seen["unique_graphs"]
    losses = []
    for model in (plain, compiled):
        loss = model.train()(data, CTX).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert seen["unique_graphs"] > before and list(plain.state_dict()) == list(compiled.state_dict())
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).norm() <= 1e-5 * one.grad.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize(("size", "ratio"), [((32, 32), 0.75), ((24, 48), 0.5)])
def test_the_operations_that_benchmarks_count_are_those_of_the_formula(size, ratio):
    config = build(size, mask_ratio=ratio, encoder_args={"depth": 3}, decoder_depth=2).config
    d, e, prefix, target = 32, 16, 1, 8 * 8 * 3
    n = size[0] * size[1] // 64
    visible = int(n * (1 - ratio)) + prefix

    def blocks(depth, width, tokens):  # four projections of width, two of 4 * width, scores and their use
        return depth * 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)

    embeddings = 2 * (n * target * d + visible * d * e + n * e * target)
    expected = embeddings + blocks(3, d, visible) + blocks(2, e, n + prefix)
    assert forward_flops(config, size) == expected


@pytest.mark.parametrize(
    "corruption", [{"noise": 0.5}, {"holes": 2, "hole_area": (0.1, 0.2)}, {"pixels": 0.5}, {"channels": 0.5}]
)
def test_denoising_and_inpainting_learn_without_a_mask(corruption):
    model, data = build(mask_ratio=0.0, loss_on="all", norm_pix=False, corruption=corruption).train(), batch()
    data["image"] = data["image"][..., :1, :1].expand_as(data["image"]).clone()  # one colour each
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(60):
        data["epoch"].fill_(step)  # other damage in each
        optimizer.zero_grad()
        loss = model(data, CTX).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_a_patch_need_not_be_square(tmp_path):
    model = build((32, 24), patch=[8, 4], mask_ratio=0.5)
    assert model.geometry == ((8, 4), (4, 6)) and model.targets(batch((32, 24))).shape == (4, 24, 8 * 4 * 3)
    data = batch((32, 24))
    model(data, CTX).loss.backward()
    assert model.showcase(data, CTX)["reconstruction"].image.shape == (4 * 34 - 2, 4 * 26 - 2, 3)
    path = tmp_path / "e.safetensors"
    args = export_encoder(path, model.config, model.encoders()["image"], (32, 24))
    theirs = timm.create_model(model.config.encoder, checkpoint_path=str(path), **args).eval()
    x = model.normalize(data["image"])
    torch.testing.assert_close(theirs(x), model.eval().encoders()["image"](data["image"]))


def test_weights_of_a_pretrained_encoder_are_where_training_starts(tmp_path):
    source = build()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    save(tmp_path / "mae.safetensors", source.state_dict(), {})
    started = build(weights=str(tmp_path / "mae.safetensors"))
    state = source.encoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in started.encoder.state_dict().items())
    tuned = Supervised(
        SupervisedConfig(
            encoder="vit_tiny_patch16_224",
            encoder_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            weights=str(tmp_path / "mae.safetensors"),
        ),
        DataFacts((32, 32), ("a", "b")),
    )
    image = batch()["image"]
    torch.testing.assert_close(tuned.eval().encoder(image), source.eval().encoders()["image"](image))
