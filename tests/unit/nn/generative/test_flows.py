"""Invertible networks: log-determinants against autograd's Jacobian, inverses, densities that integrate to one."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.nn.generative.coupling import Coupling, CouplingConfig, CouplingFlow, EdgeConv, Leaving
from pipeline.nn.generative.invertible import ActNorm, Coded, InvertibleConv, squeeze, unsqueeze
from pipeline.nn.generative.transformer_flow import TransformerConfig, TransformerFlow

COUPLING = CouplingConfig(levels=2, steps=2, width=8)
TRANSFORMER = TransformerConfig(name="transformer", patch=2, dim=8, blocks=3, layers=2, head_dim=4)


def build(config, shape=(3, 4, 4), seed=0, size=0.1):
    """A flow that is far from the identity: every parameter is moved, but not so far that scales run away."""
    torch.manual_seed(seed)
    network = (CouplingFlow if isinstance(config, CouplingConfig) else TransformerFlow)(config, shape)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(size * torch.randn_like(parameter))
        for layer in network.modules():
            if isinstance(layer, ActNorm):
                layer.start_shift.normal_(std=size)
                layer.start_log_scale.normal_(std=size)
    return network


def images(count, shape=(3, 4, 4), dtype=torch.float64):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


@pytest.mark.parametrize("config", [COUPLING, TRANSFORMER], ids=["coupling", "transformer"])
def test_log_determinants_are_those_of_autograds_jacobian(config):
    network = build(config).double()
    x = images(2)
    with torch.no_grad():
        found = network(x)
    for number in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda one: network(one[None]).noise[0], x[number])
        expected = torch.linalg.slogdet(jacobian.view(48, 48))[1]
        assert float(found.log_det[number]) == pytest.approx(float(expected), abs=1e-9)
    assert float((found.log_det[0] - found.log_det[1]).abs()) > 1e-3  # it depends on the image
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(found.noise).sum(dim=1) + found.log_det
    torch.testing.assert_close(found.log_density, expected)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 12)])
@pytest.mark.parametrize("config", [COUPLING, TRANSFORMER], ids=["coupling", "transformer"])
def test_the_inverse_is_exact_both_ways(config, shape):
    network = build(config, shape, size=0.06)
    x = images(3, shape, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(network.inverse(network(x).noise), x, rtol=0, atol=1e-5)
        noise = torch.randn(3, math.prod(shape), generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(network(network.inverse(noise)).noise, noise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", [COUPLING, TRANSFORMER], ids=["coupling", "transformer"])
def test_a_fresh_flow_has_the_density_of_the_authors(config):
    """Couplings begin with scale sigmoid(2) and no shift; blocks of transformers with what their bias was drawn as."""
    torch.manual_seed(0)
    network = (CouplingFlow if isinstance(config, CouplingConfig) else TransformerFlow)(config, (3, 4, 4))
    log_det = network(images(1, dtype=torch.float32)).log_det.detach()
    if isinstance(config, CouplingConfig):
        changed = 2 * 24 + 2 * 12  # of 48 numbers on the first level, of 24 on the second, twice the half
        assert float(log_det) == pytest.approx(changed * math.log(1 / (1 + math.exp(-2))), rel=1e-4)
    else:
        biases = [-float(block.out.bias[:12].detach().sum()) for block in network.blocks]
        assert float(log_det) == pytest.approx(3 * sum(biases), rel=1e-5)  # of three patches of four


def test_a_density_of_two_pixels_integrates_to_one():
    """Over the plane, by sums over a fine grid; two patches of one pixel."""
    config = TransformerConfig(name="transformer", patch=1, dim=8, blocks=2, layers=1, head_dim=4)
    network = build(config, (1, 1, 2)).double()
    line = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    with torch.no_grad():
        density = torch.cat([network(part).log_density for part in grid.split(10_000)]).exp()
    assert float(density.sum()) * 0.05**2 == pytest.approx(1, abs=2e-3)
    assert float(density.max()) < 50  # no spike that the grid would miss


def test_a_density_of_couplings_integrates_to_one():
    """Over four numbers: of samples of the flow, the mean of q / p is the integral of any density q, which is one."""
    network = build(CouplingConfig(levels=1, steps=2, width=4), (1, 2, 2)).double()
    noise = torch.randn(40_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        x = network.inverse(noise)
        law = torch.distributions.Normal(x.flatten(1).median(dim=0).values, 1.2)
        weights = (law.log_prob(x.flatten(1)).sum(dim=1) - network(x).log_density).exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert error < 0.015 and abs(float(weights.mean()) - 1) < 4 * error


def test_layers_without_a_network_are_a_gaussian_in_closed_form():
    """Actnorm and a 1x1 convolution: x = A^-1 z - b, whose density is that of a multivariate normal distribution."""
    torch.manual_seed(4)
    norm, mix = ActNorm(4), InvertibleConv(4)
    with torch.no_grad():
        for parameter in (*norm.parameters(), *mix.parameters()):
            parameter.add_(0.4 * torch.randn_like(parameter))
        norm.start_shift.normal_()
        norm.start_log_scale.normal_(std=0.3)
    norm, mix = norm.double(), mix.double()
    x = images(5, (4, 1, 1))
    y, first = norm(x)
    y, second = mix(y)
    found = Coded(y.flatten(1), (first + second).expand(5), y).log_density
    scale = torch.diag((norm.start_log_scale + 3 * norm.log_scale).exp())
    inverse = torch.linalg.inv(mix.matrix() @ scale)
    law = MultivariateNormal(-(norm.start_shift + norm.shift), inverse @ inverse.T)
    torch.testing.assert_close(found, law.log_prob(x.flatten(1)))
    torch.testing.assert_close(norm.inverse(mix.inverse(y)), x)


def test_a_1x1_convolution_begins_as_a_rotation():
    torch.manual_seed(5)
    matrix = InvertibleConv(12).matrix().detach()
    torch.manual_seed(5)
    drawn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0].float()
    torch.testing.assert_close(matrix, drawn, rtol=0, atol=1e-5)  # rows that the decomposition has moved are back
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12), rtol=0, atol=1e-5)
    assert float((matrix - torch.eye(12)).abs().max()) > 0.3
    other = InvertibleConv(12).matrix().detach()
    assert not torch.allclose(matrix, other)


def test_actnorm_begins_with_channels_of_mean_zero_and_variance_one(lone_group):
    torch.manual_seed(6)
    norm = ActNorm(3)
    with torch.no_grad():
        norm.shift.fill_(0.2)  # whatever has been learned, the start is what the images say
        norm.log_scale.fill_(0.1)
    norm.starting = True
    x = torch.randn(20, 3, 4, 5) * torch.tensor([0.01, 1.0, 30.0]).view(-1, 1, 1) + 7
    y, log_det = norm(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.var(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0)
    expected = -20 * x.std(dim=(0, 2, 3), correction=0).log().sum()
    torch.testing.assert_close(log_det.detach(), expected, rtol=1e-3, atol=0)
    assert not norm.starting
    before = norm.start_shift.clone()
    norm(x + 1)
    assert torch.equal(norm.start_shift, before)


def numpy_conv(x, weight, bias=0.0):
    """Of [C,H,W] with [O,3,3,C + 1], the last channel being 1 outside the image."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    edge = np.pad(np.zeros(x.shape[1:]), 1, constant_values=1.0)
    padded = np.concatenate([padded, edge[None]])
    out = np.zeros((len(weight), *x.shape[1:]))
    for o, i, j in np.ndindex(*out.shape):
        out[o, i, j] = (padded[:, i : i + 3, j : j + 3].transpose(1, 2, 0) * weight[o]).sum()
    return out + np.reshape(bias, (-1, 1, 1))


def test_a_coupling_and_what_leaves_are_those_of_the_authors_code():
    """openai/glow, model.py `revnet2d_step` and `split2d_prior`, tfops.py `conv2d`, `actnorm`, `conv2d_zeros`."""
    torch.manual_seed(7)
    layer, leaving = Coupling(4, 5), Leaving(2, 2)
    with torch.no_grad():
        for parameter in (*layer.parameters(), *leaving.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    layer, leaving = layer.double(), leaving.double()
    x = images(1, (4, 3, 3))
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    first = numpy_conv(x[0, :2].numpy(), np.concatenate([p["conv1.weight"], p["conv1.edge"]], axis=-1))

    def normed(h, name):
        shift, scale = p[f"{name}.shift"].reshape(-1, 1, 1), np.exp(3 * p[f"{name}.log_scale"]).reshape(-1, 1, 1)
        return np.maximum((h + shift) * scale, 0)

    hidden = np.einsum("oc,chw->ohw", p["conv2.weight"][:, 0, 0], normed(first, "norm1"))
    hidden = normed(hidden, "norm2")
    out = numpy_conv(hidden, np.concatenate([p["out.conv.weight"], p["out.conv.edge"]], axis=-1), p["out.bias"])
    out = out * np.exp(3 * p["out.log_scale"]).reshape(-1, 1, 1)
    scale = 1 / (1 + np.exp(-(out[2:] + 2)))
    y, log_det, _ = layer(x)
    np.testing.assert_allclose(y[0, 2:].detach(), (x[0, 2:].numpy() + out[:2]) * scale, rtol=1e-9)
    np.testing.assert_allclose(float(log_det.detach()), np.log(scale).sum(), rtol=1e-9)
    assert torch.equal(y[:, :2], x[:, :2])

    q = {name: value.detach().numpy() for name, value in leaving.named_parameters()}
    weight = np.concatenate([q["prior.conv.weight"], q["prior.conv.edge"]], axis=-1)
    out = numpy_conv(x[0, :2].numpy(), weight, q["prior.bias"])
    mean, log_std = np.split(out * np.exp(3 * q["prior.log_scale"]).reshape(-1, 1, 1), 2)
    noise, log_det = leaving(x[:, 2:], x[:, :2])
    density = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(log_std))).log_prob(x[0, 2:])
    own = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum() + log_det
    assert float(own.detach()) == pytest.approx(float(density.sum()), rel=1e-9)


def test_a_convolution_sees_where_the_image_ends():
    torch.manual_seed(8)
    layer = EdgeConv(2, 3, 3, 0.05)
    out = layer(torch.zeros(1, 2, 5, 5))[0]
    assert float(out[:, 1:-1, 1:-1].detach().abs().max()) == 0 and float(out[:, 0].detach().abs().min()) > 0
    drawn = EdgeConv(64, 64, 3, 0.05).weight
    assert float(drawn.detach().std()) == pytest.approx(0.05, rel=0.02)


def test_patches_see_what_is_before_them_alone():
    """By gradients, in each block's order; without this the log-determinant would not be a sum."""
    network = build(TRANSFORMER).double()
    for block in network.blocks:
        x = torch.randn(1, 4, 12, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda one, block=block: block(one)[0], x)[0, :, :, 0]
        seen = jacobian.abs().amax(dim=(1, 3)) > 0
        order = torch.arange(4).flip(0) if block.backwards else torch.arange(4)
        assert torch.equal(seen[order][:, order], torch.ones(4, 4, dtype=torch.bool).tril())
    assert [block.backwards for block in network.blocks] == [False, True, False]


def test_sampling_with_kept_keys_is_sampling_without():
    """Patch by patch, the whole transformer over all that was made so far, again for each."""
    network = build(TRANSFORMER, (3, 8, 8))
    noise = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        for block in network.blocks:
            z = block.ordered(noise)
            x = z.clone()
            for number in range(1, 16):
                log_scale, shift, _ = block.affine(x)
                x[:, number] = z[:, number] * log_scale[:, number - 1].exp() + shift[:, number - 1]
            torch.testing.assert_close(block.inverse(noise), block.ordered(x), rtol=1e-5, atol=1e-5)


def test_squares_of_pixels_become_channels():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert squeeze(x)[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(unsqueeze(squeeze(x)), x)


def test_half_precision_around_a_flow_leaves_what_is_transformed_in_float32():
    for config in (COUPLING, TRANSFORMER):
        network = build(config, size=0.1)
        x = images(2, dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = network(x)
            assert found.noise.dtype == found.log_det.dtype == torch.float32
            # what comes back is exact even so, since the networks see the same
            torch.testing.assert_close(network.inverse(found.noise), x, rtol=0, atol=2e-2)
        assert functional.mse_loss(found.noise, network(x).noise) < 1e-2


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiples of 4 pixels; they are 6x8"):
        CouplingFlow(COUPLING, (3, 6, 8))
    with pytest.raises(ConfigError, match="cannot be cut into patches of 2"):
        TransformerFlow(TRANSFORMER, (3, 5, 8))
    with pytest.raises(ConfigError, match="leaves one patch"):
        TransformerFlow(TransformerConfig(name="transformer", patch=4, dim=8, head_dim=4), (3, 4, 4))
    with pytest.raises(ValueError, match="head_dim = 5 does not divide dim = 8"):
        TransformerConfig(name="transformer", dim=8, head_dim=5)
