"""Convolutions that look up and to the left alone, on whole maps or at the one place that is being made.

Van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (NeurIPS 2016, arXiv 1606.05328), section
2.2: two streams, of which one sees the rows above, and one what lies to the left in its own row; with the layers of
Salimans et al., "PixelCNN++" (ICLR 2017, 1701.05517), section 2: gated residual blocks on (elu(x), elu(-x)), weights
with norm and direction apart (Salimans and Kingma 2016, 1602.07868, without the start by data). What is known of
places that were made before is kept, as in Ramachandran et al. 2017 (1704.06001).
Shape letters: B samples, C channels, O channels that come out, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.nn.dropout import SampleDropout

ABOVE, ASIDE = 2, 1
"""Rows and columns of zeros around a map that is made place by place."""


class Reach(NamedTuple):
    """Where a convolution looks from a place: a window whose first place lies so far above and to the left."""

    height: int
    width: int
    above: int
    left: int
    stride: int = 1

    def halving(self) -> Reach:
        """The same at every second place."""
        return self._replace(stride=2)


ROWS_ABOVE = Reach(2, 3, above=2, left=1)
"""The first layer of the stream that sees the rows above: without the own row."""
ROWS = Reach(2, 3, above=1, left=1)
"""Its other layers."""
ROW_ABOVE, LEFT = Reach(1, 3, above=1, left=1), Reach(2, 1, above=1, left=1)
"""The first layer of the other stream: without the place itself."""
PLACES = Reach(2, 2, above=1, left=1)
"""Its other layers."""
HERE = Reach(1, 1, above=0, left=0)


class View(Protocol):
    """A map as a layer sees it."""

    def here(self) -> Tensor:
        """The places that are computed: [B,C,h,w]."""
        ...

    def window(self, reach: Reach) -> Tensor:
        """What a convolution without padding needs for them."""
        ...

    def twice(self, weight: Tensor) -> Tensor:
        """What a transposed convolution with stride 2 makes of it at them; weight [C,O,2,2] or [C,O,2,3]."""
        ...


class Whole(NamedTuple):
    """All places at once."""

    x: Tensor
    """[B,C,H,W]."""

    def here(self) -> Tensor:
        """All."""
        return self.x

    def window(self, reach: Reach) -> Tensor:
        """With zeros around it; rows and columns that nothing may see are cut off."""
        height, width, above, left, _ = reach
        return functional.pad(self.x, (left, width - 1 - left, above, height - 1 - above))

    def twice(self, weight: Tensor) -> Tensor:
        """[B,O,2H,2W]."""
        return _widened(self.x, weight)


class Part(NamedTuple):
    """A row, or one place, of a map of which all is known that may be seen from there."""

    kept: Tensor
    """[B,C,ABOVE+H,W+2 ASIDE], with zeros above and on both sides."""
    row: int
    """Of the map that is computed, which may be larger or smaller."""
    column: int | None
    """None: the whole row."""

    def here(self) -> Tensor:
        """[B,C,1,W] or [B,C,1,1]."""
        return self.window(HERE)

    def window(self, reach: Reach) -> Tensor:
        """The part of the map."""
        height, width, above, left, stride = reach
        top = self.row * stride - above + ABOVE
        rows = self.kept[:, :, top : top + height]
        if self.column is None:
            return rows[..., ASIDE - left : rows.shape[-1] - 2 * ASIDE + ASIDE - left + width - 1]
        first = self.column * stride - left + ASIDE
        return rows[..., first : first + width]

    def twice(self, weight: Tensor) -> Tensor:
        """[B,O,1,2W] or [B,O,1,1]."""
        low = self._replace(row=self.row // 2, column=None if self.column is None else self.column // 2)
        made = _widened(low.here(), weight)[:, :, self.row % 2 : self.row % 2 + 1]
        return made if self.column is None else made[..., self.column % 2 : self.column % 2 + 1]


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    made = functional.conv_transpose2d(x, weight.to(x.dtype), stride=2)
    left = (weight.shape[-1] - 1) // 2
    return made[..., left : left + 2 * x.shape[-1]]


class Normed(nn.Module):
    """Weights of which norm and direction are apart: of each channel that comes out, ``gain`` is the norm.

    Args:
        shape: of the weights.
        out: which of its dimensions are the channels that come out.
        gain: at first, of all.
    """

    def __init__(self, shape: tuple[int, ...], out: int, gain: float) -> None:
        super().__init__()
        self.out = out
        self.direction = nn.Parameter(0.05 * torch.randn(shape))
        self.gain = nn.Parameter(torch.full((shape[out],), gain))
        self.bias = nn.Parameter(torch.zeros(shape[out]))
        self._held: Tensor | None = None

    def weight(self) -> Tensor:
        """As it is used, in fp32 whatever the parameters are; what is held in sampling is not computed anew."""
        if self._held is not None:
            return self._held
        wide = self.direction.to(torch.promote_types(self.direction.dtype, torch.float32))
        over = [d for d in range(wide.ndim) if d != self.out]
        norm = torch.linalg.vector_norm(wide, dim=over, keepdim=True)
        shape = [-1 if d == self.out else 1 for d in range(wide.ndim)]
        return (wide * (self.gain.to(wide.dtype).view(shape) / norm)).to(self.direction.dtype)


class Convolution(Normed):
    """With a causal reach.

    Args:
        channels: C.
        out: O.
        reach: what it sees.
        gain: norm of the weights of each channel that comes out, at first.
    """

    def __init__(self, channels: int, out: int, reach: Reach, gain: float = 1.0) -> None:
        super().__init__((out, channels, reach.height, reach.width), 0, gain)
        self.reach = reach

    def forward(self, window: Tensor) -> Tensor:
        """What :meth:`View.window` gives, to [B,O,h,w]."""
        weight, window = self.weight(), window.to(self.direction.dtype)
        if window.shape[-2:] == weight.shape[-2:]:  # one place
            return functional.linear(window.flatten(1), weight.flatten(1), self.bias)[..., None, None]
        return functional.conv2d(window, weight, self.bias, self.reach.stride)


class Twice(Normed):
    """From a map to one of twice its height and width.

    Args:
        channels: C, also of what comes out.
        width: of the kernel, 2 or 3; it is 2 high.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__((channels, channels, 2, width), 1, 1.0)

    def forward(self, views: Sequence[View], label: Tensor | None) -> Tensor:
        """[B,C,H,W] to [B,C,2H,2W]."""
        return views[0].twice(self.weight()) + self.bias[:, None, None]


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Inside, weights are computed once; without gradient."""
    normed = [m for m in module.modules() if isinstance(m, Normed)]
    with torch.no_grad():
        for m in normed:
            m._held = m.weight()
    try:
        yield
    finally:
        for m in normed:
            m._held = None


def both(x: Tensor) -> Tensor:
    """elu(x) and elu(-x), side by side; zeros stay zeros."""
    return functional.elu(torch.cat([x, -x], dim=1))


class Plain(nn.Module):
    """The sum of convolutions of one map."""

    def __init__(self, channels: int, out: int, *reaches: Reach) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Convolution(channels, out, reach) for reach in reaches)

    def forward(self, views: Sequence[View], label: Tensor | None) -> Tensor:
        """[B,C,H,W] to [B,O,h,w]."""
        first, *others = (conv(views[0].window(conv.reach)) for conv in self.convs)  # pyright: ignore
        for other in others:
            first = first + other
        return first


class Hidden(nn.Module):
    """The inner half of a residual block: a convolution, and a product with what other maps have at the place.

    Args:
        channels: C, also of the others.
        reach: of the convolution.
        others: how many there are.
    """

    def __init__(self, channels: int, reach: Reach, others: int) -> None:
        super().__init__()
        self.conv = Convolution(2 * channels, channels, reach)
        self.aside = Convolution(2 * channels * others, channels, HERE) if others else None

    def forward(self, views: Sequence[View], label: Tensor | None) -> Tensor:
        """[B,C,H,W] of all to the same."""
        own, *others = views
        h = self.conv(both(own.window(self.conv.reach)))
        if self.aside is not None:
            h = h + self.aside(both(torch.cat([view.here() for view in others], dim=1)))
        return h


class Gated(nn.Module):
    """The outer half: what is known, and a convolution of the inner half behind a gate.

    Args:
        channels: C.
        reach: of the convolution.
        dropout: of what the convolution sees.
        classes: that it may be told; 0: none.
        name: of the dropout.
    """

    def __init__(self, channels: int, reach: Reach, dropout: float, classes: int, name: str) -> None:
        super().__init__()
        self.conv = Convolution(2 * channels, 2 * channels, reach, gain=0.1)
        self.dropout = SampleDropout(dropout, name)
        self.label = nn.Embedding(classes, 2 * channels) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, views: Sequence[View], label: Tensor | None) -> Tensor:
        """Of x and the inner half, [B,C,H,W] each, to the same."""
        x, inner = views
        h = self.conv(self.dropout(both(inner.window(self.conv.reach))))
        if self.label is not None:
            told = self.label.weight.mean(dim=0, keepdim=True) if label is None else self.label(label)
            h = h + told[..., None, None]
        value, gate = h.chunk(2, dim=1)
        return x.here() + value * torch.sigmoid(gate)
