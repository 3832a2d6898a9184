import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.nn.images import Normalize, patchify, tile, unpatchify

MEAN, STD = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)


def test_normalize_is_the_formula_in_each_channel():
    image = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(torch.uint8)
    out = Normalize(MEAN, STD)(image)
    expected = np.stack([(image[:, c].numpy() / 255.0 - MEAN[c]) / STD[c] for c in range(3)], axis=1)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    assert out.dtype == torch.float32
    torch.testing.assert_close(Normalize(MEAN, STD)(image / 255), out)


def test_normalize_stays_in_fp32_when_the_model_goes_to_bf16_and_has_no_state():
    normalize = Normalize(MEAN, STD)
    image = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    exact = normalize(image)
    assert torch.equal(torch.nn.Sequential(normalize).to(torch.bfloat16)(image), exact)
    assert normalize.mean.dtype == torch.float32 and not normalize.state_dict()


def test_invert_gives_every_uint8_back_and_clips():
    normalize = Normalize((0.485,), (0.229,))
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(normalize.invert(normalize(image)), image)
    assert normalize.invert(torch.tensor([[[[-99.0, 99.0]]]])).flatten().tolist() == [0, 255]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_patchify_against_loops_and_back(b, c, rows, columns, p, q):
    x = torch.arange(b * c * rows * p * columns * q).reshape(b, c, rows * p, columns * q)
    patches = patchify(x, (p, q))
    for n in range(rows * columns):
        top, left = n // columns * p, n % columns * q
        window = x[:, :, top : top + p, left : left + q]
        assert torch.equal(patches[:, n], window.permute(0, 2, 3, 1).reshape(b, -1))
    assert torch.equal(unpatchify(patches, (p, q), (rows, columns)), x)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_tile_puts_images_in_their_places(channels):
    rows = [torch.full((4, channels, 5, 6), 10 * (r + 1), dtype=torch.uint8) for r in range(2)]
    rows[1][2] = 99
    picture = tile(rows, gap=1)
    assert picture.shape == (2 * 5 + 1, 4 * 6 + 3, 3) and picture.dtype == np.uint8
    assert (picture[6:11, 14:20] == 99).all() and (picture[6:11, :6] == 20).all()
    assert (picture[5] == 255).all() and (picture[:, 6] == 255).all()
    assert tile(rows, gap=0).shape == (10, 24, 3)
