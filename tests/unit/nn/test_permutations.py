"""Permutations of maximal Hamming distance, against brute force."""

from itertools import permutations

import numpy as np
import pytest

from pipeline.nn.permutations import distant_permutations


@pytest.mark.parametrize("count", [2, 5, 24])
def test_each_is_the_farthest_of_all_that_are_left(count):
    """Of four tiles, with all distances counted out."""
    left, chosen = list(permutations(range(4))), []
    for found in distant_permutations(count, tiles=4).tolist():
        distances = [sum(sum(a != b for a, b in zip(one, other, strict=True)) for other in chosen) for one in left]
        assert tuple(found) == left[distances.index(max(distances))]
        chosen.append(tuple(found))
        left.remove(tuple(found))


def test_of_nine_tiles_the_mean_distance_to_those_before_is_the_largest_there_is():
    everyone = np.array(list(permutations(range(9))), dtype=np.uint8)
    found = distant_permutations(12).numpy()
    assert len({tuple(row) for row in found}) == 12 and np.array_equal(found[0], np.arange(9))
    for step in (1, 8, 9, 11):
        mean = np.mean([(everyone != row).sum(axis=1) for row in found[:step]], axis=0)
        taken = (everyone[:, None] == found[:step]).all(axis=2).any(axis=1)
        assert np.mean([(found[step] != row).sum() for row in found[:step]]) == mean[~taken].max()


def test_the_first_nine_differ_in_every_place():
    found = distant_permutations(9).numpy()
    assert all((found[i] != found[j]).all() for i in range(9) for j in range(i))
