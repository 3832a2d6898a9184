"""CLIP: losses by hand, temperature, frozen towers, dropped patches, and what cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.contract import check_batch
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.engine import optimizers
from pipeline.engine.accumulate import accumulate
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.nn.clip_pictures import finds
from pipeline.nn.pictures import RIGHT
from pipeline.objectives.clip import CLIP, Config
from tests.contracts.test_gradients import ENGINES, Plan, descent
from tests.ranks import start_ranks

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
END = 2
SMALL = {"dim": 6, "vocab": 30, "length": 7, "text_width": 8, "text_depth": 2, "text_heads": 2}


def build(**settings: Any) -> CLIP:
    torch.manual_seed(0)
    tower = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT}
    return CLIP(Config(**tower | SMALL | settings), DataFacts((32, 32), ())).train()


def batch(samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.arange(samples)
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text, length = torch.randint(0, 30, (samples, 7), generator=generator), torch.arange(samples) % 7 + 1
    text.scatter_(1, length[:, None] - 1, END)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": image, "text": text, "text_length": length}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_the_towers_features_by_hand(loss, lone_group):
    model = build(loss=loss).double()
    data = batch()
    image = functional.normalize(model.encoders()["image"](data["image"]), dim=1)
    text = functional.normalize(model.encoders()["text"](data["text"], data["text_length"]), dim=1)
    if loss == "softmax":
        logits = image @ text.T / 0.07
        here = torch.arange(4)
        expected = (functional.cross_entropy(logits, here) + functional.cross_entropy(logits.T, here)) / 2
    else:
        z = 2 * torch.eye(4) - 1
        expected = torch.nn.functional.softplus(-z * (10 * image @ text.T - 10)).sum() / 4
    out = model(data, CTX)
    torch.testing.assert_close(out.loss, expected.to(out.loss.dtype), rtol=1e-5, atol=1e-6)
    assert float(out.metrics["agreement"]) == pytest.approx(float((image * text).detach().sum(1).mean()), abs=1e-6)
    assert float(out.metrics["scale"]) == pytest.approx(10 if loss == "sigmoid" else 1 / 0.07)


def push_scale() -> dict[str, list[float]]:
    """Large steps that drive the temperature over its limit and back, under every engine, on one rank."""
    optimizers.build = descent
    found = {}
    with process_group(2.0) as place:
        plan = Plan(place.world_size, 2)
        for name, stage in ENGINES:
            zero = {"zero": stage} if name == "deepspeed" else {}
            config = EngineConfig(name=name, precision="fp32", micro_batch=plan.micro_batch, **zero)
            if name == "deepspeed":
                from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
            else:
                from pipeline.engine.accelerate import AccelerateEngine as Engine
            model = build()
            with torch.no_grad():
                model.log_scale.fill_(math.log(100) - 1e-3)
            engine = Engine(model, config, OptimizerConfig(lr=1.0), plan, place)
            seen = []
            for sign in (1.0, 1.0, -1.0):  # the loss of random pairs falls with the scale, so -1 drives it up
                data = {n: v.chunk(place.world_size)[place.rank] for n, v in batch(8).items()}
                parts = [
                    dict(zip(data, p, strict=True)) for p in zip(*(v.chunk(2) for v in data.values()), strict=True)
                ]
                list(accumulate(engine, parts, CTX))
                engine.update(-0.05 * sign)
                engine.after_step(CTX.clock)
                master = [f.data for f in engine.held() if f.name == "model/log_scale" and f.data.numel()]
                with engine.whole_parameters():
                    seen.append(float(engine.objective.log_scale.detach()))
                assert all(float(m) == seen[-1] for m in master), "the master weight is another"
            found[f"{name} {stage}"] = seen
    return found


def test_the_temperature_is_bounded_on_the_master_weight_and_comes_back():
    ended = start_ranks(2, push_scale)
    assert [e.problem for e in ended] == [None, None]
    top = float(np.float32(math.log(100)))
    for end in ended:
        for engine, (first, second, back) in end.value.items():
            assert first == second == pytest.approx(top), engine
            assert back < top - 1e-3, engine


def trained(model: CLIP, tower: str) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad and n.startswith(tower)}


def test_frozen_towers_and_their_last_layers():
    lit = build(image_layers=0, encoder="resnet18", encoder_args={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]})
    assert trained(lit, "image.") == {"image.projection.weight"}
    norms = [m for m in lit.image.modules() if isinstance(m, GlobalBatchNorm)]
    assert norms and lit.training and not any(m.training for m in norms)
    last = trained(build(image_layers=1), "image.encoder.")
    assert {n.split(".")[4] for n in last if ".blocks." in n} == {"1"} and not any("patch_embed" in n for n in last)
    text = trained(build(text_layers=2), "text.")
    assert {n.split(".")[1] for n in text} == {"blocks", "norm", "projection"}
    assert {n.split(".")[2] for n in text if "blocks" in n} == {"1"}
    assert trained(build(text_layers=0), "text.") == set()
    with pytest.raises(ConfigError, match=r"text_layers: 9 layers.*there are 4"):
        build(text_layers=9)


def test_patches_are_dropped_in_training_alone_and_per_sample(lone_group):
    model = build(keep_patches=0.5)
    seen = []
    model.image.encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    data = batch()
    rows = model.embed(data, CTX)["image"]
    model.eval()
    model.embed(data, CTX)
    assert seen == [8 + 1, 16 + 1]
    model.train()
    part = {n: v[1:3] for n, v in data.items()}
    torch.testing.assert_close(model.embed(part, CTX)["image"], rows[1:3], rtol=1e-5, atol=1e-5)


def test_tokens_outside_the_vocabulary_are_named():
    data = batch()
    data["text"][1, 0] = 31
    with pytest.raises(ConfigError, match=r"vocab is 30.*token 31"):
        build()(data, CTX)


def test_texts_must_end_where_the_model_looks():
    with pytest.raises(ConfigError, match=r"objective\.end is 7, but texts of the batch end with token 2"):
        build(end=7)(batch(), CTX)
    data = batch()
    data["text"][3, data["text_length"][3] - 1] = 9
    with pytest.raises(ConfigError, match=r"end is 2.*end with token 9"):
        build()(data, CTX)
    assert build(end=7, text_pool="mean").embed(batch(), CTX)["text"].isfinite().all()


def test_the_showcase_tells_what_finds_what_in_words(lone_group):
    model, data = build().eval(), batch()
    ctx = StepContext(1, CTX.clock, training=False, words=lambda b: [f"text {t}" for t in b["text_length"].tolist()])
    with torch.no_grad():
        rows = model.embed(data, ctx)
        shown = model.showcase(data, ctx)
    cosines = rows["image"] @ rows["text"].T
    for name, matrix in (("captions", cosines), ("images", cosines.T)):
        right = int((matrix.argmax(1) == torch.arange(4)).sum())
        assert f"for {right} of them" in shown[name].caption and shown[name].image.dtype == np.uint8
    captions = finds(cosines, 2, ["p", "q", "r", "s"])
    for own, (first, second) in enumerate(captions):
        best, next_best = cosines[own].argsort(descending=True)[:2].tolist()
        assert first.text == f"{cosines[own, best]:.2f}  {'pqrs'[best]}" and second.text.endswith("pqrs"[next_best])
        assert (first.colour == RIGHT) == (best == own) and (second.colour == RIGHT) == (next_best == own)


def test_texts_of_another_length_do_not_fit():
    data = batch()
    data["text"] = functional.pad(data["text"], (0, 2))
    with pytest.raises(ConfigError, match=r"'text' must be int64\[B,7\], the stream gives int64\[4,9\]"):
        check_batch(build().needs, data, "clip")


def test_heads_must_divide_and_attention_dropout_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        build(text_heads=3)
    with pytest.raises(ConfigError, match="attn_drop_rate"):
        build(encoder_args=VIT | {"attn_drop_rate": 0.1})
