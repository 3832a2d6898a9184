"""Fixed sine-cosine position tables in two dimensions, as MAE uses them (He et al. 2021; Vaswani et al. 2017)."""

import torch
from torch import Tensor


def sincos_1d(dim: int, position: Tensor) -> Tensor:
    """Sines, then cosines, of ``position`` at dim/2 geometric frequencies from 1 down to nearly 1/10000.

    Args:
        dim: width, even.
        position: float64[N].

    Returns:
        float64[N,dim].
    """
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = position[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """One row per cell of ``grid`` (rows, columns), row by row: half of it the column, half the row.

    The column comes first, as in MAE's code, whose checkpoints store the table.

    Args:
        dim: width, a multiple of 4.
        grid: rows and columns.

    Returns:
        float32[rows*columns,dim].
    """
    assert dim % 4 == 0, dim
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    table = torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1)
    return table.float()
