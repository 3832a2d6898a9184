"""Networks that see the past alone: probabilities of all images sum to one, and what is kept changes no sample."""

import itertools

import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.nn.generative.causal_transformer import CausalTransformer, TransformerConfig
from pipeline.nn.generative.pixelcnn import PixelCNN, PixelCNNConfig


def pixelcnn(shape, classes=0, levels=256, **settings):
    torch.manual_seed(0)
    small = {"filters": 4, "blocks": 1, "sizes": 2, "components": 2, "dropout": 0.0}
    return stirred(PixelCNN(PixelCNNConfig(**small | settings), shape, classes, levels)).eval()


def transformer(codes, length, classes=0, **settings):
    torch.manual_seed(0)
    small = {"name": "transformer", "dim": 8, "depth": 2, "heads": 2, "dropout": 0.0}
    return stirred(CausalTransformer(TransformerConfig(**small | settings), codes, length, classes)).eval()


def stirred(model):
    """So that every place matters to those after it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 3), ((3, 1, 2), 2)])
@torch.no_grad()
def test_pixels_probabilities_sum_to_one_over_all_images(shape, levels):
    model = pixelcnn(shape, levels=levels, sizes=1).double()
    places = shape[0] * shape[1] * shape[2]
    images = torch.tensor(list(itertools.product(range(levels), repeat=places)), dtype=torch.uint8).view(-1, *shape)
    said, _ = model(images)
    log = model.log_likelihood(images, said)
    assert len(images) == levels**places and float(log.std()) > 0.5
    assert float(log.exp().sum()) == pytest.approx(1, abs=1e-9)


@torch.no_grad()
def test_codes_probabilities_sum_to_one_over_all_maps():
    model = transformer(3, 4, classes=2).double()
    codes = torch.tensor(list(itertools.product(range(3), repeat=4)))
    for label in (torch.zeros(81, dtype=torch.int64), torch.ones(81, dtype=torch.int64), None):
        log = model(codes, label)[0].log_softmax(dim=2).gather(2, codes[..., None]).sum(dim=(1, 2))
        assert float(log.std()) > 0.5
        assert float(log.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_what_is_said_of_a_pixel_depends_on_all_before_it_and_on_no_other():
    model = pixelcnn((3, 4, 4)).double()
    held = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    model.mixture.scaled = lambda value, like: value  # the image as numbers that have a gradient
    said, _ = model(held)
    for row, column in itertools.product(range(4), range(4)):
        (gradient,) = torch.autograd.grad(said[0, :, row, column].square().sum(), held, retain_graph=True)
        seen = gradient[0].abs().amax(dim=0).flatten() > 0
        assert seen.tolist() == [place < row * 4 + column for place in range(16)], (row, column)


def test_what_is_said_of_a_code_depends_on_all_before_it_and_on_no_other():
    model = transformer(5, 6).double()
    code = torch.randint(0, 5, (1, 6))
    embedded = []
    model.embed.register_forward_hook(lambda m, i, out: embedded.append(out.detach().requires_grad_()) or embedded[-1])
    logits, _ = model(code)
    for place in range(6):
        (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embedded[0], retain_graph=True)
        assert (gradient[0].abs().amax(dim=1) > 0).tolist() == [k < place for k in range(5)]


@pytest.mark.parametrize(("shape", "sizes", "classes"), [((3, 4, 8), 3, 0), ((1, 8, 4), 2, 3), ((2, 5, 3), 1, 0)])
def test_pixels_are_the_same_whether_maps_are_kept_or_not(shape, sizes, classes):
    model = pixelcnn(shape, classes, sizes=sizes).double()
    uniform = torch.rand(3, shape[1] * shape[2], 1 + shape[0])
    label = torch.arange(3) if classes else None
    made = model.sample(uniform, label)
    assert torch.equal(made, model.sample_naively(uniform, label))
    assert made.float().std() > 10 and not torch.equal(made[0], made[1])
    assert torch.equal(model.sample(uniform[1:2], None if label is None else label[1:2]), made[1:2])
    assert all(module._held is None for module in model.modules() if hasattr(module, "_held"))


@pytest.mark.parametrize("classes", [0, 3])
def test_codes_are_the_same_whether_keys_are_kept_or_not(classes):
    model = transformer(7, 12, classes).double()
    uniform = torch.rand(3, 12)
    label = torch.arange(3) if classes else None
    made = model.sample(uniform, label, 0.7)
    assert torch.equal(made, model.sample_naively(uniform, label, 0.7))
    assert len(made.unique()) > 3
    assert not torch.equal(made, model.sample(uniform, label, 3.0))


@torch.no_grad()
def test_codes_are_drawn_as_likely_as_the_model_says():
    """Of maps of two places, all nine are counted; and at half the temperature probabilities are squared."""
    model = transformer(3, 2).double()
    maps = torch.tensor(list(itertools.product(range(3), repeat=2)))
    uniform = torch.rand(20_000, 2)
    for temperature in (1.0, 0.5):
        log = (model(maps)[0] / temperature).log_softmax(dim=2).gather(2, maps[..., None]).sum(dim=(1, 2))
        made = model.sample(uniform, None, temperature)
        share = torch.bincount(made[:, 0] * 3 + made[:, 1], minlength=9).double() / len(made)
        torch.testing.assert_close(share, log.exp(), rtol=0, atol=0.015)


def test_the_norm_of_weights_is_their_gain():
    model = pixelcnn((3, 4, 4))
    conv = model.layers[0].convs[0]
    torch.testing.assert_close(conv.weight().flatten(1).norm(dim=1), conv.gain.abs(), rtol=1e-5, atol=1e-6)


def test_images_that_cannot_be_halved_are_named():
    with pytest.raises(ConfigError, match="multiples of 4 pixels; they are 8x6"):
        pixelcnn((3, 8, 6), sizes=3)
