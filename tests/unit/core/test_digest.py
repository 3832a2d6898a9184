"""The digest against splitmix64 in plain python."""

import torch

from pipeline.core.digest import data_digest

MASK = (1 << 64) - 1


def splitmix(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_published_value():
    """First output of splitmix64 seeded with 1234567 (the value used by Rosetta Code and the Java tests)."""
    assert data_digest(torch.tensor([1234567])).item() == 6457827717110365317
    assert splitmix(1234567) == 6457827717110365317


def test_sum_of_mixes():
    ids = [0, 1, 5, 2**31, 2**40 + 3, 2**62]
    expected = sum(map(splitmix, ids)) & MASK
    assert data_digest(torch.tensor(ids)).item() & MASK == expected


def test_order_and_split_do_not_matter_but_content_does():
    ids = torch.arange(1000)
    whole = data_digest(ids)
    assert torch.equal(whole, data_digest(ids.flip(0).view(10, 100)))
    assert torch.equal(whole, data_digest(ids[:300]) + data_digest(ids[300:]))
    repeated = ids.clone()
    repeated[7] = 8
    assert not torch.equal(whole, data_digest(repeated))
    assert not torch.equal(whole, data_digest(ids[:-1]))
