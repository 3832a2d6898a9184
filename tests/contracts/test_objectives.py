"""What every objective must do, for all that are found in the folder."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.schema import Strict
from pipeline.core import registry
from pipeline.core.protocols import Batch, Objective, PairwiseObjective, StepOutput
from pipeline.engine.phases import alone, members
from tests.contracts.components import (
    CONTEXT,
    OBJECTIVES,
    SMOKE,
    build_objective,
    contexts,
    make_batch,
    names,
    package_of,
    stir,
)

NAMES = [*names(), "autoregressive, of codes", "ddpm of latents", "ddpm drawn to an encoder"]
"""All, and variants that are models of another kind."""
WITHOUT_FEATURES = {"ddpm", "energy"}
"""Methods that are no encoders of images while they are trained."""


def part(batch: Batch, rows: slice) -> Batch:
    return {field: value[rows] for field, value in batch.items()}


def parts_of(objective: Objective) -> list[list[torch.nn.Parameter]]:
    """The trained parameters of each phase."""
    if objective.phases():
        return list(members(objective).values())
    return [[p for p in objective.parameters() if p.requires_grad]]


def total(objective: Objective, batch: Batch, seed: int = CONTEXT.seed) -> StepOutput:
    """Loss and metrics, those of all phases together."""
    outputs = [objective(batch, ctx) for ctx in contexts(objective, seed)]
    metrics = {f"{i}/{key}": value for i, output in enumerate(outputs) for key, value in output.metrics.items()}
    return StepOutput(torch.stack([output.loss for output in outputs]).sum(), metrics)


def test_each_objective_has_a_smoke_config_and_no_smoke_config_is_left_over():
    assert sorted(p.stem for p in SMOKE.glob("*.toml")) == registry.names(OBJECTIVES)


@pytest.mark.parametrize("name", names())
def test_its_config_is_strict_and_says_who_it_follows(name):
    module = registry.module(package_of(name), name)
    assert issubclass(module.Config, Strict)
    assert module.__doc__ is not None and len(module.__doc__.split("\n")) > 1


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_every_trainable_parameter_gets_a_gradient(name):
    objective = stir(build_objective(name)).train()
    trainable = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    assert trainable
    for ctx, mine in zip(contexts(objective), parts_of(objective), strict=True):
        with alone(mine, trainable.values()):
            loss = objective(make_batch(objective, name), ctx).loss
            assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite()
            loss.backward()
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in trainable.items() if not p.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_context_gives_the_same_loss_and_another_seed_or_step_does_not_change_the_batch(name):
    objective = build_objective(name).train()
    batch = make_batch(objective, name)
    before = copy.deepcopy(batch)
    torch.manual_seed(1)
    first = total(objective, batch).loss
    torch.manual_seed(2)
    assert torch.equal(first, total(objective, batch).loss)
    assert all(torch.equal(batch[field], before[field]) for field in before)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_parts_of_a_batch_is_the_loss_of_the_batch(name):
    objective = build_objective(name).train().double()
    if isinstance(objective, PairwiseObjective):
        pytest.skip("compares samples of different parts with each other; see the test of two passes")
    batch = make_batch(objective, name)
    whole = total(objective, batch)
    parts = [total(objective, part(batch, rows)) for rows in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close((parts[0].loss + parts[1].loss) / 2, whole.loss, rtol=1e-5, atol=1e-6)
    for key, value in whole.metrics.items():
        torch.testing.assert_close((parts[0].metrics[key] + parts[1].metrics[key]) / 2, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_of_its_samples_parts(name):
    """And the part of a sample is its own: in a batch of its own it is the same, unless samples are compared."""
    objective = build_objective(name).train()
    if not isinstance(objective, PairwiseObjective):
        objective = objective.double()
    batch = make_batch(objective, name)
    for ctx in contexts(objective):
        output = objective(batch, ctx)
        if output.losses is None:
            compares = isinstance(objective, PairwiseObjective) and objective.compares
            assert compares or package_of(name) != OBJECTIVES, "a mean over samples tells its parts"
            continue
        assert output.losses.shape == (8,) and not output.losses.requires_grad
        torch.testing.assert_close(output.losses.double().mean(), output.loss.detach().double(), rtol=1e-6, atol=0)
        if not isinstance(objective, PairwiseObjective):
            rows = slice(2, 5)
            few = objective(part(batch, rows), ctx).losses
            torch.testing.assert_close(few, output.losses[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_told_so_that_a_collapse_is_seen(name):
    objective = build_objective(name).train()
    features = objective(make_batch(objective, name), contexts(objective)[0]).features
    if features is None:
        known = name.partition(" ")[0] in WITHOUT_FEATURES
        assert known or package_of(name) != OBJECTIVES, "StepOutput.features: what the encoder gave"
        return
    assert features.ndim == 2 and len(features) == 8 and not features.requires_grad
    widths = {encoder.dim for kind, encoder in objective.encoders().items() if kind.startswith("image")}
    assert features.shape[1] in widths, "of an encoder, and not of its head"


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_detached_scalars_under_the_same_keys(name):
    objective = build_objective(name).train()
    batch = make_batch(objective, name)
    first = total(objective, batch).metrics
    later = total(objective, part(batch, slice(0, 2)), seed=9).metrics
    assert list(first) == list(later)
    for value in first.values():
        assert value.shape == () and not value.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_encoders_of_images_give_one_vector_each(name):
    objective = build_objective(name).eval()
    batch = make_batch(objective, name)
    channels, height, width = batch["image"].shape[1:]
    own = set(objective.state_dict())
    for encoder in (e for kind, e in objective.encoders().items() if kind.startswith("image")):
        image = torch.randint(0, 256, (3, channels, height, width), dtype=torch.uint8)
        with torch.no_grad():
            features = encoder(image)
            again = encoder(image[1:])
        assert features.shape == (3, encoder.dim) and features.is_floating_point()
        torch.testing.assert_close(features[1:], again, rtol=1e-5, atol=1e-5)
        assert {id(p) for p in encoder.parameters()} <= {id(p) for p in objective.parameters()}
    assert set(objective.state_dict()) == own


@pytest.mark.parametrize("name", NAMES)
def test_showcase_gives_pictures_and_leaves_the_objective_as_it_was(name):
    objective = build_objective(name).train()
    batch = make_batch(objective, name)
    before = copy.deepcopy(objective.state_dict())
    with torch.no_grad():
        pictures = objective.showcase(batch, CONTEXT)
    assert pictures
    for picture in pictures.values():
        assert picture.image.dtype == np.uint8 and picture.image.ndim == 3 and picture.image.shape[2] == 3
        assert picture.image.std() > 0 and picture.caption
    assert objective.training
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip(name):
    objective = build_objective(name).train()
    batch = make_batch(objective, name)
    expected = total(objective, batch).loss
    state = copy.deepcopy(objective.state_dict())
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(expected, total(objective, batch).loss)
    objective.load_state_dict(state)
    assert torch.equal(expected, total(objective, batch).loss)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16 weights"])
def test_bf16_is_finite_and_close(name, weights):
    objective = build_objective(name).train()
    batch = make_batch(objective, name)
    exact = total(objective, batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        loss = total(objective.to(weights), batch).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_facts_name_parameters_that_exist(name):
    objective = build_objective(name)
    names = {n for n, _ in objective.named_parameters()}
    assert objective.no_weight_decay() <= names
    for prefix in (p for layer in objective.layers() for p in layer):
        assert any(n == prefix or n.startswith(prefix + ".") for n in names), prefix


@pytest.mark.parametrize("name", NAMES)
def test_what_it_offers_other_libraries_says_how_it_is_loaded_and_stays_in_the_folder(name):
    for path, offered in build_objective(name).exports().items():
        assert offered.note and not Path(path).is_absolute() and ".." not in Path(path).parts
        if not isinstance(offered.content, str) and offered.content is not None:
            assert path.endswith(".safetensors") and all(isinstance(v, torch.Tensor) for v in offered.content.values())


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_are_not_trained_stay_in_eval_mode_and_serve_no_encoder(name):
    objective = build_objective(name).train()
    for part, origin in objective.frozen().items():
        module = objective.get_submodule(part)
        tensors = {id(t) for t in (*module.parameters(), *module.buffers())}
        assert tensors and not any(p.requires_grad for p in module.parameters())
        assert not any(m.training for m in module.modules())
        for encoder in objective.encoders().values():
            used = tensors & {id(t) for t in (*encoder.parameters(), *encoder.buffers())}
            assert origin.kept or not used
        assert not tensors & {id(average.target) for average in objective.averages(CONTEXT.clock)}
