"""Convolutions that compute what torch's do in less time.

Shape letters: B samples, C channels, O channels that come out, H height, W width, K kernel size, P and Q height and
width of a patch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """Like ``torch.nn.Conv2d`` with a square kernel and padding of half its size, and its initial weights.

    The weights lie in memory as channels-last images need them. torch keeps weights with the channels before the
    places, and with channels-last images converts them, and their gradient back, in every forward and backward: for a
    network whose weights outweigh its images, a tenth of a training step on a CPU.

    Args:
        channels: C.
        out: O.
        kernel: K, odd.
        stride: of the kernel's places.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.weight = nn.Parameter(torch.empty(out, kernel, kernel, channels))
        """[O,K,K,C]."""
        self.bias = nn.Parameter(torch.empty(out))
        for values in (self.weight, self.bias):
            nn.init.uniform_(values, -1 / math.sqrt(channels * kernel**2), 1 / math.sqrt(channels * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,O,H/stride,W/stride]."""
        weight = self.weight  # once: where it is parametrised, it is computed
        if weight.shape[1] == 1 and self.stride == 1:
            return functional.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return functional.conv2d(x, weight.permute(0, 3, 1, 2), self.bias, self.stride, self.padding)


class PatchProjection(nn.Conv2d):
    """A convolution whose kernels tile the image, as one matrix product of its patches.

    Convolution kernels are made for many channels and overlapping places: with three channels in bf16 the product takes
    a third of the time on a CPU. Parameters, their names and their shapes are those of the convolution.
    """

    @classmethod
    def of(cls, plain: nn.Conv2d) -> PatchProjection:
        """With the parameters of ``plain``, whose stride is its kernel size, without padding."""
        size: Any = plain.kernel_size
        own = cls(plain.in_channels, plain.out_channels, size, size, bias=plain.bias is not None, device="meta")
        own.weight, own.bias = plain.weight, plain.bias
        return own.train(plain.training)

    def forward(self, input: Tensor) -> Tensor:
        """[B,C,H,W] to [B,O,H/P,W/Q]; what is left over at the lower and right edge is not seen."""
        (p, q), channels = self.kernel_size, input.shape[1]
        rows, columns = input.shape[2] // p, input.shape[3] // q
        patches = input[:, :, : rows * p, : columns * q].reshape(-1, channels, rows, p, columns, q)
        flat = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels * p * q)
        return functional.linear(flat, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
