"""Colorization: the loss by hand, colours counted once per update, and split brains."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.nn.lab import colour_bins, to_lab
from pipeline.objectives.colorization import Colorization, Config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(size: tuple[int, int] = (32, 32), **settings: Any) -> Colorization:
    torch.manual_seed(0)
    config = Config(**{"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "hidden": 8} | settings)
    return Colorization(config, DataFacts(size, ()))


def batch(samples: int = 3, size: tuple[int, int] = (32, 32)) -> Batch:
    image = torch.randint(0, 256, (samples, 3, *size), dtype=torch.uint8, generator=torch.manual_seed(5))
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def shares(ab: np.ndarray) -> tuple[np.ndarray, int]:
    """The target of one place, float64[Q], and its nearest bin: five nearest, Gaussian of 5."""
    distance = ((colour_bins().double().numpy() - ab) ** 2).sum(axis=1)
    near = np.argsort(distance)[:5]
    target = np.zeros(len(distance))
    target[near] = np.exp(-distance[near] / 50)
    return target / target.sum(), int(near[0])


def by_hand(model: Colorization, data: Batch, seen: np.ndarray, part: float) -> tuple[list[float], np.ndarray]:
    """Losses of samples, and how often each bin was wanted."""
    lab = to_lab(data["image"])
    logits = model.to_colour(_map(model, lab)).detach().double().numpy()
    rows, columns = logits.shape[2:]
    p = (seen + 1) / (seen + 1).sum()
    weight = 1 / ((1 - part) * p + part / len(p))
    weight /= (p * weight).sum()
    losses, counts = [], np.zeros(len(p))
    for sample in range(len(lab)):
        total = 0.0
        for row in range(rows):
            for column in range(columns):
                y, x = int((row + 0.5) * lab.shape[2] / rows), int((column + 0.5) * lab.shape[3] / columns)
                target, nearest = shares(lab[sample, 1:, y, x].double().numpy())
                own = logits[sample, :, row, column]
                log_p = own - own.max() - np.log(np.exp(own - own.max()).sum())
                total -= weight[nearest] * (target * log_p).sum()
                counts += target
        losses.append(total / rows / columns)
    return losses, counts


def _map(model: Colorization, lab: torch.Tensor) -> torch.Tensor:
    """The last map of the encoder of lightness, from its tokens."""
    tokens = model.light.backbone((lab[:, :1] / 100 - 0.5) / 0.25)
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side)


def test_the_loss_and_the_counts_place_by_place():
    model, data = build(uniform_part=0.3).train(), batch()
    for step in range(2):  # the second counts rare colours more
        losses, counts = by_hand(model, data, model.seen.double().numpy(), 0.3)
        out, before = model(data, CTX), model.seen.clone()
        assert out.losses is not None and out.losses.tolist() == pytest.approx(losses, rel=1e-4)
        model.after_step(CTX.clock)
        found = (model.seen - before).double().numpy() / 2**16
        np.testing.assert_allclose(found, counts, atol=0.01)
        assert counts.sum() == pytest.approx(3 * 64) and step in (0, 1)


def test_colours_are_counted_once_per_update_however_the_batch_is_cut():
    whole, parts, data = build().train(), build().train(), batch(4)
    whole(data, CTX)
    before = parts(data, CTX).loss
    parts._fresh.clear()
    for rows in (slice(0, 1), slice(1, 4)):
        parts({name: value[rows] for name, value in data.items()}, CTX)
        assert not parts.seen.any(), "weights stay the same within an update"
    for model in (whole, parts):
        model.after_step(CTX.clock)
    assert torch.equal(whole.seen, parts.seen) and whole.seen.any()
    assert not torch.equal(parts(data, CTX).loss, before), "and count afterwards"
    parts._fresh.clear()
    parts.eval()(data, CTX)
    parts.after_step(CTX.clock)
    assert torch.equal(whole.seen, parts.seen), "what is only looked at is not counted"


def test_the_encoder_sees_no_colour():
    model, data = build().eval(), batch()
    encoder = model.encoders()["image"]
    lab = to_lab(data["image"])
    torch.testing.assert_close(encoder(data["image"]), _map(model, lab).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    out = model(data, CTX)
    torch.testing.assert_close(out.features, encoder(data["image"]).detach(), rtol=1e-4, atol=1e-5)


def test_split_brains_predict_each_half_from_the_other():
    model, data = build(split_brain=True).eval(), batch()
    assert model.light.normalize.mean.numel() == 1 and model.colour is not None and model.to_light is not None
    assert model.colour.normalize.mean.numel() == 2
    lab = to_lab(data["image"])
    losses, _ = by_hand(model, data, model.seen.double().numpy(), 0.5)
    tokens = model.colour.backbone((lab[:, 1:] / 220 + 0.5 - 0.5) / 0.1)[:, 1:]
    logits = model.to_light(tokens.transpose(1, 2).reshape(3, -1, 4, 4)).detach().double()
    light = lab[:, 0, 2::4, 2::4].floor().long()
    other = (logits.logsumexp(dim=1) - logits.gather(1, light[:, None]).squeeze(1)).mean(dim=(1, 2))
    out = model(data, CTX)
    assert out.losses is not None
    np.testing.assert_allclose(out.losses.numpy(), np.array(losses) + other.numpy(), rtol=1e-4)
    encoder = model.encoders()["image"]
    assert encoder.dim == 32 and encoder(data["image"]).shape == (3, 32)
    grey = data["image"].float().mean(dim=1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
    dyed = grey.clone()
    dyed[:, 0] = dyed[:, 0] // 2
    assert not torch.equal(encoder(grey)[:, 16:], encoder(dyed)[:, 16:]), "the second half sees colours"


def test_the_map_is_about_a_quarter_of_the_image_and_its_places_are_spread_evenly():
    assert build().grid == (8, 8) and build((32, 64)).grid == (8, 16)
    resnet = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    assert build((64, 64), encoder="resnet18", encoder_args=resnet).grid == (16, 16)
    large = build(encoder="resnet18", encoder_args=resnet, small_stem=True)
    assert large.grid == (8, 8) and large(batch(), CTX).loss.isfinite()


def test_channels_of_its_own_are_refused():
    with pytest.raises(ValidationError, match="leave out 'mean' and 'std'"):
        Config(mean=(0.5,), std=(0.5,))


def test_a_perfect_prediction_is_shown_in_the_colours_that_were_wanted():
    model, data = build().eval(), batch()
    wanted = model.wanted(to_lab(data["image"]))
    sure = 1e4 * torch.nn.functional.one_hot(wanted.index[:, 0], 261).permute(0, 3, 1, 2).float()
    model._predict = lambda *parts: (torch.zeros(3, 16), sure)  # type: ignore[method-assign]
    shown = model.showcase(data, CTX)["colours"]
    assert "100% of the places" in shown.caption
    grey, asked, made = (shown.image[34 * row : 34 * row + 32] for row in (1, 2, 3))
    np.testing.assert_array_equal(asked, made)
    inside = grey[:, :32].astype(int)
    assert (np.ptp(inside, axis=2) <= 1).all() and np.ptp(made[:, :32].astype(int), axis=2).max() > 20
