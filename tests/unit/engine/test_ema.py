import pytest
import torch

from pipeline.config.schema import EmaConfig
from pipeline.core.protocols import Clock
from pipeline.engine.ema import Ema
from pipeline.engine.fragments import Slot
from pipeline.nn.ema import decay


def build(config, dtype=torch.float32):
    flat = torch.zeros(6, dtype=dtype)
    return Ema(config, [Slot("a", (2, 2), 0, 4, flat, 0), Slot("b", (5,), 3, 2, flat, 4)]), flat


def test_it_begins_as_the_parameters_are_and_keeps_none_of_them_alive():
    flat = torch.arange(6.0)
    ema = Ema(EmaConfig(decay=0.5, power=(0.1,)), [Slot("a", (2, 2), 0, 4, flat, 0)])
    flat.fill_(10.0)
    for average in ema.averages.values():
        assert torch.equal(average[0], torch.arange(4.0))
    ema.update(Clock(1, 8, 100))
    torch.testing.assert_close(ema.averages["ema"][0], 10 + (torch.arange(4.0) - 10) * 2 / 11)
    assert torch.equal(ema.averages["ema-0.1"][0], torch.full((4,), 10.0))  # forgets the first weights at once


def test_it_does_not_stall():
    """Towards 1 with 0.9999 per update: bf16 would end near 0.03, fp32 must not."""
    ema, flat = build(EmaConfig(decay=0.9999))
    flat.fill_(1.0)
    start, left = 100_000, 1.0
    for step in range(start, start + 5000):  # past the warm-up
        ema.update(Clock(step, step, 10**6))
        left *= decay(0.9999, step)
    found = ema.averages["ema"][0]
    assert float(found[0]) == pytest.approx(1 - left, abs=1e-4) and left < 0.61


def test_only_fp32_masters_are_averaged():
    with pytest.raises(AssertionError, match="fp32 masters"):
        build(EmaConfig(), torch.bfloat16)


def test_applied_is_undone_even_when_something_fails():
    ema, flat = build(EmaConfig())
    flat.copy_(torch.arange(6.0))
    published = []
    with pytest.raises(ValueError, match="inside"), ema.applied(lambda: published.append(flat.clone())):
        assert not flat.any()
        raise ValueError("inside")
    assert torch.equal(flat, torch.arange(6.0))
    assert not published[0].any() and torch.equal(published[1], flat)


def test_fragments_say_where_they_lie():
    ema, _ = build(EmaConfig(power=(0.1,)))
    found = {f.name: (f.start, f.data.numel(), f.shape) for f in ema.fragments()}
    assert found == {
        f"{kind}/{name}": place
        for kind in ("ema", "ema-0.1")
        for name, place in (("a", (0, 4, (2, 2))), ("b", (3, 2, (5,))))
    }
