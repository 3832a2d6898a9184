"""A convolution whose weights lie in memory as channels-last images need them.

torch keeps weights with the channels before the places, and with channels-last images converts them, and their gradient
back, in every forward and backward: for a network whose weights outweigh its images, a tenth of a training step on a
CPU. Shape letters: B samples, C channels, O channels that come out, H height, W width, K kernel size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """Like ``torch.nn.Conv2d`` with a square kernel and padding of half its size, and its initial weights.

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
        if self.weight.shape[1] == 1 and self.stride == 1:
            return functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return functional.conv2d(x, self.weight.permute(0, 3, 1, 2), self.bias, self.stride, self.padding)
