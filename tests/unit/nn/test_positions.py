import math

import pytest
import torch

from pipeline.nn.positions import sincos_2d


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (1, 4)])
def test_table_against_the_formula_written_out(grid):
    dim, quarter = 12, 3
    table = sincos_2d(dim, grid)
    assert table.shape == (grid[0] * grid[1], dim) and table.dtype == torch.float32
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * grid[1] + column], torch.tensor(expected))
