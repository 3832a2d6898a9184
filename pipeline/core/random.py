"""Random numbers that belong to a sample, not to a worker: a function of (seed, purpose, epoch, sample id) alone.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensor operations. The
key is a hash of seed and purpose; the counter holds the block, the sample's id and the epoch. So the numbers do not
depend on how samples are spread over batches, ranks or workers, and resuming needs no generator state.

Bits are the same on CPU and GPU: everything is integer arithmetic and, for normals, the correctly rounded float64
operations + - * / sqrt, each in a kernel of its own so that nothing is contracted to a fused multiply-add. Library
log, sin and cos differ between devices and between the body and the tail of a vectorised loop, hence the polynomials.

Shape letters: B samples, K blocks of four 32-bit words per sample, N numbers per sample.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import torch
from torch import Tensor

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD
_EXPONENT: Final = 52
_ATANH: Final = tuple(2.0 / k for k in range(1, 16, 2))
_SIN: Final = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7))
_COS: Final = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter.

    Args:
        counter: four words, each in an int64 tensor; they may broadcast against each other.
        key: two words.

    Returns:
        Four int64 tensors of the broadcast shape, with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit products wrap around into the sign bit; shift and mask give the right halves all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_MASK) ^ (c1 ^ k0)
        c2 = (p0 >> 32).bitwise_and_(_MASK) ^ (c3 ^ k1)
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule in separate multiplications and additions, lowest coefficient first."""
    y = x * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        y.add_(c).mul_(x)
    return y.add_(coefficients[0])


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float64, to about 1e-13, from + - * / alone.

    x = m * 2**e with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 atanh((m - 1) / (m + 1)).
    """
    bits = x.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _EXPONENT
    m = (bits - (exponent << _EXPONENT)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    return _polynomial(s * s, _ATANH).mul_(s).add_(exponent.to(torch.float64).mul_(math.log(2.0)))


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi word / 2**32, float64, to about 1e-12. The quadrant is split off in exact integers."""
    quadrant = (word + (1 << 29)) >> 30
    t = (word - (quadrant << 30)).to(torch.float64).mul_(2.0 * math.pi / 2**32)
    tt = t * t
    cos, sin = _polynomial(tt, _COS), _polynomial(tt, _SIN).mul_(t)
    odd = (quadrant & 1).bool()
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    half_turn = (1 - (quadrant & 2)).to(torch.float64)
    return cos.mul_(half_turn), sin.mul_(half_turn)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, from two uniform words (Box and Muller, 1958)."""
    u = radius_word.to(torch.float64).add_(0.5).mul_(2.0**-32)
    radius = _log(u).mul_(-2.0).sqrt_()
    cos, sin = _cos_sin(angle_word)
    return cos.mul_(radius).to(torch.float32), sin.mul_(radius).to(torch.float32)


class SampleRandom:
    """Random numbers for the B samples of a batch.

    Each call goes on where the last one on the same object ended, so calls never share numbers. Two objects with the
    same arguments give the same numbers: give each use its own purpose. Epochs count modulo 2**32.

    Args:
        seed: seed of the run, 0 <= seed < 2**63.
        purpose: what the numbers are for, e.g. "mae.mask".
        epoch: int64[B].
        sample_id: int64[B]; its device is the device of all results.
    """

    def __init__(self, seed: int, purpose: str, epoch: Tensor, sample_id: Tensor) -> None:
        assert epoch.shape == sample_id.shape and sample_id.ndim == 1, (epoch.shape, sample_id.shape)
        assert epoch.dtype == sample_id.dtype == torch.int64, (epoch.dtype, sample_id.dtype)
        digest = hashlib.blake2b(purpose.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        self._low = (sample_id & _MASK).unsqueeze(1)
        self._high = ((sample_id >> 32) & _MASK).unsqueeze(1)
        self._epoch = (epoch & _MASK).unsqueeze(1)
        self._next = 0

    def _words(self, blocks: int) -> tuple[Tensor, ...]:
        """The next ``blocks`` blocks: four int64[B,K]."""
        assert self._next + blocks <= 2**32, "more than 2**34 words for one sample and purpose"
        block = torch.arange(self._next, self._next + blocks, device=self._low.device).unsqueeze(0)
        self._next += blocks
        return philox4x32((block, self._low, self._high, self._epoch), self._key)

    def _shaped(self, parts: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        """Interleave the parts of each block to [B,N], cut the rest of the last block off, and shape."""
        flat = torch.stack(parts, dim=-1).flatten(1)
        return flat[:, : math.prod(shape)].reshape(len(flat), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """float32[B,*shape] in [0, 1): multiples of 2**-24."""
        words = self._words(-(-math.prod(shape) // 4))
        return self._shaped(tuple((w >> 8).to(torch.float32).mul_(2.0**-24) for w in words), shape)

    def normal(self, *shape: int) -> Tensor:
        """float32[B,*shape], standard normal; at most 6.8 away from zero."""
        w0, w1, w2, w3 = self._words(-(-math.prod(shape) // 4))
        return self._shaped((*_box_muller(w0, w1), *_box_muller(w2, w3)), shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64[B,*shape] in [low, high), at most 2**31 values; each is as likely as the next to within 2**-33."""
        values = high - low
        assert 1 <= values <= 2**31, f"integers from {low} to {high}"
        w0, w1, w2, w3 = self._words(-(-math.prod(shape) // 2))
        # floor(64-bit word * values / 2**64), in halves (Lemire, "Fast random integer generation in an interval").
        return self._shaped(
            tuple(((h * values + ((lo * values) >> 32)) >> 32) + low for h, lo in ((w0, w1), (w2, w3))), shape
        )

    def permutation(self, n: int) -> Tensor:
        """int64[B,n]: for each sample the numbers 0 to n-1 in random order."""
        w0, w1, w2, w3 = self._words(-(-n // 2))
        keys = self._shaped(((w0 << 31) | (w1 >> 1), (w2 << 31) | (w3 >> 1)), (n,))
        return torch.argsort(keys, dim=1, stable=True)
