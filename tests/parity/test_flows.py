"""The same noise and log-determinants as normflows' Glow blocks, with the same weights."""

from __future__ import annotations

import pytest
import torch

from pipeline.nn.generative.coupling import Step
from pipeline.nn.generative.invertible import RATE

normflows = pytest.importorskip("normflows", reason="make parity installs it")

CHANNELS, WIDTH = 12, 8


def peer_of(step):
    """Their block of the same weights, but for what tells where images end, which they have not."""
    peer = normflows.flows.GlowBlock(CHANNELS, WIDTH, split_mode="channel", init_zeros=False)
    couple, mix, norm = peer.flows
    norm.t.data = -(step.norm.shift + step.norm.start_shift).view(1, -1, 1, 1)
    norm.s.data = -(RATE * step.norm.log_scale + step.norm.start_log_scale).view(1, -1, 1, 1)
    norm.data_dep_init_done = torch.tensor(1.0)
    mix.P, mix.sign_S = torch.eye(CHANNELS)[step.mix.order], step.mix.sign
    mix.L.data, mix.U.data, mix.log_S.data = step.mix.lower, step.mix.upper, step.mix.log_diagonal
    own, turn = step.couple, torch.arange(CHANNELS).view(2, -1).T.flatten()  # theirs: shift, scale, shift, ...
    sign = torch.tensor([-1.0, 1.0]).repeat(CHANNELS // 2)  # and minus the shift
    layers = [layer for layer in couple.flows[1].param_map.modules() if isinstance(layer, torch.nn.Conv2d)]
    for layer, conv, shift, log_scale in (
        (layers[0], own.conv1, own.norm1.shift, own.norm1.log_scale),
        (layers[1], own.conv2, own.norm2.shift, own.norm2.log_scale),
        (layers[2], own.out.conv, own.out.bias, own.out.log_scale),
    ):
        scale = torch.exp(RATE * log_scale)
        weight, bias = conv.weight.permute(0, 3, 1, 2) * scale.view(-1, 1, 1, 1), shift * scale
        if layer is layers[2]:
            weight, bias = weight[turn] * sign.view(-1, 1, 1, 1), bias[turn] * sign
        layer.weight.data, layer.bias.data = weight, bias
    return peer


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@torch.no_grad()
def test_steps_of_glow():
    torch.manual_seed(0)
    steps = [Step(CHANNELS, WIDTH) for _ in range(3)]
    for step in steps:
        for name, parameter in step.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("edge"):
                parameter.zero_()
        step.norm.start_shift.normal_()
        step.norm.start_log_scale.normal_(std=0.2)
    x = torch.randn(2, CHANNELS, 6, 5)
    own = theirs = x
    total = other = torch.zeros(2)
    for step in steps:
        peer = peer_of(step)
        own, log_det, _ = step(own)
        theirs, found = peer.inverse(theirs)
        total, other = total + log_det, other + found
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, other, rtol=1e-4, atol=1e-3)
    assert float((own - x).abs().mean()) > 0.1 and float((total[0] - total[1]).abs()) > 0.1
