import math

import torch

from pipeline.nn.conditioning import Conditions, Embedding, Text, TextConfig, TextReader, Told


def test_sinusoids_are_those_of_the_paper_and_stay_fp32_in_bf16():
    embedding = Embedding("sinusoidal", 8, 8, 0)
    with torch.no_grad():
        embedding.time1.weight.copy_(torch.eye(8))
        embedding.time2.weight.copy_(torch.eye(8))
        embedding.time1.bias.fill_(30.0)  # SiLU is the identity there
        embedding.time2.bias.zero_()
    time = torch.tensor([0.0, 1.0, 500.0, 999.0])
    expected = [
        [math.cos(t / 10000 ** (i / 4)) for i in range(4)] + [math.sin(t / 10000 ** (i / 4)) for i in range(4)]
        for t in time.tolist()
    ]
    found = embedding(Conditions(time)) - 30
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    rough = embedding.to(torch.bfloat16)
    with torch.no_grad():
        rough.time1.bias.zero_()
        one, other = (rough(Conditions(torch.tensor([t]))) for t in (998.0, 999.0))
    assert (one - other).abs().max() > 0.3  # bf16 cannot tell 998 from 999


def test_no_class_is_one_more_row():
    embedding = Embedding("sinusoidal", 8, 8, classes=3)
    assert embedding.label is not None and embedding.label.weight.shape == (4, 8)
    same = Conditions(torch.zeros(2), Told(torch.tensor([0, 3])))
    gap = embedding(same).diff(dim=0)[0]
    torch.testing.assert_close(gap, embedding.label.weight[3] - embedding.label.weight[0])


def test_fourier_bands_are_kept_and_sinusoidal_ones_are_not():
    assert "bands" in Embedding("fourier", 8, 8, 0).state_dict()
    assert "bands" not in Embedding("sinusoidal", 8, 8, 0).state_dict()


def test_texts_are_read_without_their_padding_and_none_is_one_token():
    torch.manual_seed(0)
    reader = TextReader(TextConfig(vocab=20, length=6, width=8, depth=2, heads=2)).eval()
    token, length = torch.randint(0, 20, (3, 6)), torch.tensor([6, 3, 0])
    tokens, inside = reader(Text(token, length))[1:]
    assert tokens.shape == (3, 7, 8)
    assert inside.sum(dim=1).tolist() == [7, 4, 1] and inside[:, 0].all()
    other = token.clone()
    other[1, 3:] += 1
    again = reader(Text(other % 20, length))
    torch.testing.assert_close(again.tokens[1, :4], tokens[1, :4])
    torch.testing.assert_close(again.tokens[2, :1], reader.none[0])
    beside = again.beside_none(0)
    assert torch.equal(beside.inside[:3], inside) and beside.inside[3:].sum() == 3 and beside.inside[3:, 0].all()
