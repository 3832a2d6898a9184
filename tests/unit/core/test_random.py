"""The generator against published vectors, closed forms and plain python; its independence and its invariances."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.core import random as module
from pipeline.core.protocols import Clock, StepContext
from pipeline.core.random import SampleRandom, philox4x32

DRAWS = {
    "uniform": lambda r: r.uniform(3, 5),
    "normal": lambda r: r.normal(3, 5),
    "integers": lambda r: r.integers(-7, 1000, 3, 5),
    "permutation": lambda r: r.permutation(11),
}


def make(ids, *, seed=1, purpose="test", epoch=0, device="cpu"):
    ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    return SampleRandom(seed, purpose, torch.full_like(ids, epoch), ids)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors in kat_vectors of Random123, the authors' own library."""
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert " ".join(f"{w.item():08x}" for w in words) == expected


def plain_philox(counter, key):
    """Transcription of the paper's round in python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        hi0, lo0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        hi1, lo1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return c


def test_layout_of_counter_and_transforms():
    """Block, id and epoch enter the counter as documented; every draw equals its formula in plain python."""
    random = make([2**40 + 5, 7], epoch=3)
    key = random._key
    uniform, normal, integers = random.uniform(6), random.normal(4), random.integers(10, 20, 2)
    for row, sample in enumerate([2**40 + 5, 7]):
        words = [w for b in range(4) for w in plain_philox((b, sample % 2**32, sample >> 32, 3), key)]
        assert uniform[row].tolist() == [(w >> 8) / 2**24 for w in words[:6]]
        radii = [math.sqrt(-2 * math.log((w + 0.5) / 2**32)) for w in words[8:12:2]]
        angles = [2 * math.pi * w / 2**32 for w in words[9:12:2]]
        expected = [r * f(a) for r, a in zip(radii, angles, strict=True) for f in (math.cos, math.sin)]
        np.testing.assert_array_equal(normal[row].numpy(), np.array(expected, np.float32))
        pairs = zip(words[12:16:2], words[13:16:2], strict=True)
        assert integers[row].tolist() == [10 + (((h << 32) | lo) * 10 >> 64) for h, lo in pairs]


def test_log_and_sincos_accuracy():
    words = torch.cat([torch.arange(0, 2**32, 65537), torch.arange(64), 2**32 - 1 - torch.arange(64)])
    u = (words.double() + 0.5) * 2**-32
    torch.testing.assert_close(module._log(u), u.log(), rtol=1e-11, atol=1e-16)
    cos, sin = module._cos_sin(words)
    angle = words.double() * (2 * math.pi / 2**32)
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("split", [1, 2, 7])
def test_batch_split_does_not_matter(draw, split):
    ids = torch.arange(23) * 1_000_003
    whole = DRAWS[draw](make(ids))
    parts = torch.cat([DRAWS[draw](make(part)) for part in ids.split(split)])
    assert torch.equal(whole, parts)


def test_order_in_batch_does_not_matter():
    ids = torch.arange(50)
    shuffled = ids[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(make(ids).normal(9)[shuffled], make(shuffled).normal(9))


def test_first_numbers_do_not_depend_on_how_many_are_drawn():
    assert torch.equal(make([1, 2]).normal(101)[:, :30], make([1, 2]).normal(30))


def test_same_arguments_same_numbers_and_calls_advance():
    a, b = make([1, 2]), make([1, 2])
    first, second = a.uniform(8), a.uniform(8)
    assert torch.equal(first, b.uniform(8)) and torch.equal(second, b.uniform(8))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second], 1), make([1, 2]).uniform(16))


@pytest.mark.parametrize("change", [{"seed": 2}, {"purpose": "tesu"}, {"epoch": 1}, {"ids": [4001, 4002]}])
def test_independent_of_every_part_of_the_key(change):
    n = 4096
    arguments = {"ids": [1, 2]} | change
    a, b = make([1, 2]).normal(n), make(arguments.pop("ids"), **arguments).normal(n)
    correlation = (a.double() * b.double()).mean(1)
    assert (correlation.abs() < 5 / math.sqrt(n)).all()
    assert not (a == b).any(1).all()


def test_neighbouring_samples_and_positions_are_uncorrelated():
    x = make(range(512)).normal(512).double()
    for a, b in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:]), (x[:, :-4], x[:, 4:]), (x[:-1, 1:], x[1:, :-1])):
        assert abs((a * b).mean()) < 5 / 512


def test_distributions():
    uniform = make(range(64)).uniform(1000).flatten().double().numpy()
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    normal = make(range(64)).normal(1000).flatten().double().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    n = len(normal)
    for power, moment, spread in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((normal**power).mean() - moment) < 5 * spread / math.sqrt(n)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 4), (0, 1000), (5, 5 + 2**31)])
def test_integers(low, high):
    values = make(range(200)).integers(low, high, 100).flatten()
    assert low <= values.min() and values.max() < high
    bins = min(high - low, 64)
    counts = torch.bincount((values - low) * bins // (high - low), minlength=bins)
    if bins > 1:
        # 1000 values in 64 bins are 15 or 16 to a bin.
        edges = [-(-b * (high - low) // bins) for b in range(bins + 1)]
        expected = np.diff(edges) * (len(values) / (high - low))
        assert stats.chisquare(counts.numpy(), expected).pvalue > 1e-3


def test_permutation_is_uniform_over_all_orders():
    orders = make(range(6000)).permutation(4)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(6000, 4))
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_shapes_and_empty_batches():
    assert make([1, 2]).uniform().shape == (2,)
    assert make([]).normal(3, 2).shape == (0, 3, 2)
    assert make([1]).integers(0, 5, 0).shape == (1, 0)
    assert make([1]).permutation(1).tolist() == [[0]]
    assert make([1]).normal(1).dtype == make([1]).uniform(1).dtype == torch.float32


GOLDEN_INTEGERS = [[164180859, 2082319414], [508739246, 1470429212]]
GOLDEN_NORMALS = [[0.283061146736145, -0.724666953086853], [0.4285544455051422, -0.313142329454422]]


def test_golden():
    """The numbers are part of a run's identity: they may not change between versions."""
    random = make([0, 12345678901], seed=42, purpose="golden", epoch=7)
    assert random.integers(0, 2**31, 2).tolist() == GOLDEN_INTEGERS
    assert random.normal(2).double().tolist() == GOLDEN_NORMALS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("draw", DRAWS)
def test_same_bits_on_the_accelerator(draw):
    ids = torch.arange(1000)
    assert torch.equal(DRAWS[draw](make(ids)), DRAWS[draw](make(ids, device="cuda")).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_many_normals_same_bits_on_the_accelerator():
    ids = torch.arange(64)
    assert torch.equal(make(ids).normal(65536), make(ids, device="cuda").normal(65536).cpu())


def test_a_step_draws_for_each_sample_by_its_id_and_epoch():
    ctx = StepContext(seed=3, clock=Clock(2, 16, 64))
    batch = {"id": torch.tensor([7, 8, 7]), "epoch": torch.tensor([0, 0, 1])}
    drawn = ctx.random(batch, "mask").uniform(4)
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    alone = ctx.random({name: value[1:2] for name, value in batch.items()}, "mask").uniform(4)
    assert torch.equal(alone[0], drawn[1])
    assert not torch.equal(ctx.random(batch, "colour").uniform(4), drawn)
