"""A digest of a set of samples that does not depend on their order, so that any two runs can be compared."""

import torch
from torch import Tensor

from pipeline.core.protocols import Batch


def _signed(value: int) -> int:
    """A 64-bit pattern as int64."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def data_digest(ids: Tensor) -> Tensor:
    """Sum over the ids of a 64-bit mix of each, modulo 2**64: an int64 scalar on the ids' device.

    The mix is splitmix64 (Steele, Lea and Flood, OOPSLA 2014). Digests of parts add up to the digest of the whole, so
    ranks need one summing collective; a sample that is missing, repeated or exchanged changes the digest.
    """
    assert ids.dtype == torch.int64, ids.dtype
    z = ids.flatten() + _GAMMA
    for shift, factor in _MIX:
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (z ^ ((z >> 31) & ((1 << 33) - 1))).sum()


def batch_digest(batch: Batch) -> Tensor:
    """The digest of all samples of a batch: those of ``"id"``, and of ``"NAME_id"`` for data sets beside it."""
    ids = [value for name, value in batch.items() if name == "id" or name.endswith("_id")]
    return data_digest(torch.cat([value.flatten() for value in ids]))
