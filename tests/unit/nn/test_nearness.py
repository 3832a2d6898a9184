"""Penalties that keep an encoder near its start, against sums written out here."""

import copy

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.encoder import EncoderConfig, create_backbone
from pipeline.nn.weights import save
from pipeline.objectives.supervised import Config, Supervised

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
ENCODERS = {"vit": ("vit_base_patch16_224", VIT), "resnet": ("resnet18", RESNET)}


@pytest.fixture
def build(tmp_path):
    """A model that has gone a little away from the file that it starts from."""

    def made(kind="vit", moved=0.1, **settings):
        encoder, args = ENCODERS[kind]
        torch.manual_seed(3)
        file = tmp_path / f"{kind}.safetensors"
        save(file, create_backbone(EncoderConfig(encoder=encoder, encoder_args=args), (32, 32)).state_dict(), {})
        config = Config(encoder=encoder, encoder_args=args, weights=str(file), **settings)
        model = Supervised(config, DataFacts((32, 32), ("a", "b", "c")))
        with torch.no_grad():
            for parameter in [*model.encoder.parameters(), *model.head.parameters()]:
                parameter.add_(moved * torch.randn(parameter.shape))
        return model

    return made


def batch(samples=4):
    ids = torch.arange(samples)
    image = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return {"image": image, "label": ids % 3, "id": ids, "epoch": torch.zeros_like(ids)}


def without(model):
    """The same weights without the penalty."""
    plain = copy.deepcopy(model)
    plain._nearness = None
    return plain


@pytest.mark.parametrize("kind", ENCODERS)
def test_l2_sp_is_half_the_squared_distance_of_all_weights_and_its_gradient_points_back(build, kind):
    model = build(kind, regularise={"kind": "l2_sp", "alpha": 0.3, "beta": 0.2})
    start = build(kind, moved=0.0)
    own = without(model)
    given, plain = model(batch(), CTX), own(batch(), CTX)
    first, now = ({n: p.detach() for n, p in m.named_parameters()} for m in (start, model))
    gone = sum(float((now[n] - first[n]).double().square().sum()) for n in now if n.startswith("encoder."))
    head = sum(float(now[n].double().square().sum()) for n in ("head.weight", "head.bias"))
    expected = 0.5 * 0.3 * gone + 0.5 * 0.2 * head
    assert gone > 1 and head > 0.1
    assert float(given.metrics["regularisation"]) == pytest.approx(expected, rel=1e-5)
    assert float((given.loss - plain.loss).detach()) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(given.losses.mean(), given.loss.detach())
    given.loss.backward()
    plain.loss.backward()
    plain_gradient = {n: p.grad for n, p in own.named_parameters()}
    for name, parameter in model.named_parameters():
        pull = 0.3 * (now[name] - first[name]) if name.startswith("encoder.") else 0.2 * now[name]
        torch.testing.assert_close(parameter.grad - plain_gradient[name], pull, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "blocks"), [("vit", ("blocks.0", "blocks.2")), ("resnet", ()), ("vit", ())])
def test_feature_maps_are_held_to_those_of_the_start(build, kind, blocks):
    settings = {"kind": "feature_maps", "alpha": 0.5, "beta": 0.0, "blocks": blocks}
    model = build(kind, regularise=settings).eval()
    start = build(kind, moved=0.0, regularise=settings).eval()
    if blocks or kind == "resnet":
        names = blocks or ["act1", "layer1", "layer2", "layer3", "layer4"]
    else:
        names = [f"blocks.{i}" for i in range(3)]
    maps = []
    for each in (start, model):
        found, backbone = {}, each.encoder.backbone
        hooks = [
            backbone.get_submodule(n).register_forward_hook(lambda m, i, o, n=n, f=found: f.update({n: o}))
            for n in names
        ]
        with torch.no_grad():
            each.encoder(batch()["image"])
        for hook in hooks:
            hook.remove()
        maps.append(found)
    expected = torch.zeros(4, dtype=torch.float64)
    for name in names:
        difference = (maps[1][name] - maps[0][name]).double()
        for sample in range(4):
            if kind == "vit":  # [T,D], the class token left out
                places = difference[sample, 1:]
                expected[sample] += 0.25 * sum(float(place.square().sum()) for place in places) / len(places)
            else:  # [C,H,W]
                expected[sample] += 0.25 * sum(float(channel.square().mean()) for channel in difference[sample])
    given, plain = model(batch(), CTX), without(model)(batch(), CTX)
    assert (expected > 0.01).all()
    torch.testing.assert_close((given.losses - plain.losses).double(), expected, rtol=1e-3, atol=1e-4)


def test_at_the_start_nothing_is_pulled_and_the_start_is_in_no_checkpoint(build):
    from pipeline.engine.fragments import named_tensors

    model = build(moved=0.0, regularise={"kind": "l2_sp", "alpha": 5.0, "beta": 0.0})
    assert float(model(batch(), CTX).metrics["regularisation"]) == 0
    assert not [name for name in named_tensors(model) if name.startswith("start.")]
    assert not [n for n, p in model.named_parameters() if n.startswith("start.") and p.requires_grad]
    for encoder in model.encoders().values():
        assert not any(module is model.start for module in encoder.modules())


def test_the_start_is_filled_from_its_file_wherever_the_encoder_has_got_to(build):
    """As in a resumed run."""
    model = build(regularise={"kind": "l2_sp"})
    wanted = copy.deepcopy(model.start.state_dict())
    with torch.no_grad():
        for buffer in model.start.buffers():
            buffer.add_(1)
    origin = model.frozen()["start"]
    origin.fill(origin.path)
    for name, value in model.start.backbone.state_dict().items():
        torch.testing.assert_close(value, wanted[f"backbone.{name}"])


def test_only_what_is_trained_is_pulled(build):
    model = build(blocks=1, regularise={"kind": "l2_sp", "alpha": 1.0, "beta": 0.0}).train()
    start = build(moved=0.0)
    gone = sum(
        float((p - dict(start.named_parameters())[n]).detach().square().sum())
        for n, p in model.named_parameters()
        if n.startswith(("encoder.backbone.blocks.2.", "encoder.backbone.norm."))
    )
    assert float(model(batch(), CTX).metrics["regularisation"]) == pytest.approx(0.5 * gone, rel=1e-5)


def test_what_is_refused(build):
    for settings, message in {
        ("regularise",): "its start, which is 'weights'",
        ("regularise", "weights", "compile"): "cannot see blocks under",
        ("regularise", "weights", "checkpointing"): "cannot see blocks under",
        ("regularise", "weights", "freeze"): "'freeze' trains the classifier alone",
        ("blocks", "weights", "freeze"): "'freeze' trains the classifier alone",
    }.items():
        values = {"regularise": {"kind": "l2_sp"}, "weights": "x", "blocks": 1}
        with pytest.raises(ValidationError, match=message):
            Config(**{name: values.get(name, True) for name in settings})
    with pytest.raises(ConfigError, match=r"regularise\.blocks: the encoder has no block 'blocks.7'; there are \['blo"):
        build(regularise={"kind": "feature_maps", "blocks": ["blocks.7"]})
    with pytest.raises(ConfigError, match="9 layers are to be trained, and the encoder has 4"):
        build(blocks=9)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_last_blocks_are_trained_and_the_others_rest(build, kind):
    model = build(kind, blocks=1).train()
    last = {"vit": "blocks.2.", "resnet": "layer4."}[kind]
    expected = {
        n for n, _ in model.named_parameters() if f"backbone.{last}" in n or "backbone.norm" in n or "head" in n
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected and len(expected) > 6
    model(batch(), CTX).loss.backward()
    assert all((p.grad is not None) == (n in expected) for n, p in model.named_parameters())
    resting = {n for n, m in model.named_modules() if not m.training and list(m.parameters())}
    assert "encoder.backbone.patch_embed" in resting or "encoder.backbone.conv1" in resting
    assert not any(last.rstrip(".") in name for name in resting)
