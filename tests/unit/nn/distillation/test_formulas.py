"""Each loss against its paper's formula, written out with loops over samples and pairs in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from pipeline.nn.distillation import contrast, feature, relation, response

B, K, D, E = 5, 6, 4, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def kl(wanted: list[float], given: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(wanted, given, strict=True) if p)


def rows(x: Tensor, temperature: float = 1.0) -> list[list[float]]:
    return (x / temperature).tolist()


LABEL = [2, 0, 5, 3, 2]


def hinton(s: Tensor, t: Tensor, temperature: float) -> float:
    pairs = zip(rows(s, temperature), rows(t, temperature), strict=True)
    return temperature**2 * sum(kl(softmax(b), softmax(a)) for a, b in pairs) / len(s)


def decoupled(s: Tensor, t: Tensor, alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for a, b, label in zip(rows(s, temperature), rows(t, temperature), LABEL, strict=True):
        q, p = softmax(a), softmax(b)
        target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = [i for i in range(K) if i != label]
        rest = kl([p[i] / (1 - p[label]) for i in others], [q[i] / (1 - q[label]) for i in others])
        total += temperature**2 * (alpha * target + beta * rest)
    return total / len(s)


def pearson(a: list[float], b: list[float]) -> float:
    am, bm = sum(a) / len(a), sum(b) / len(b)
    cov = sum((x - am) * (y - bm) for x, y in zip(a, b, strict=True))
    return cov / math.sqrt(sum((x - am) ** 2 for x in a) * sum((y - bm) ** 2 for y in b))


def stronger(s: Tensor, t: Tensor, beta: float, gamma: float, temperature: float) -> float:
    q, p = ([softmax(row) for row in rows(x, temperature)] for x in (s, t))
    between = 1 - sum(pearson(a, b) for a, b in zip(q, p, strict=True)) / len(s)
    columns = zip(zip(*q, strict=True), zip(*p, strict=True), strict=True)
    within = 1 - sum(pearson(list(a), list(b)) for a, b in columns) / K
    return temperature**2 * (beta * between + gamma * within)


def distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def rkd_distances(s: Tensor, t: Tensor) -> float:
    n, found = len(s), []
    for x in (rows(s), rows(t)):
        d = {(i, j): distance(x[i], x[j]) for i, j in product(range(n), repeat=2)}
        apart = [v for v in d.values() if v > 0]
        found.append({pair: v / (sum(apart) / len(apart)) for pair, v in d.items()})
    return sum(huber(found[0][pair] - found[1][pair]) for pair in found[0]) / n**2


def cosine(x: list[list[float]], i: int, j: int, k: int) -> float:
    """Of the directions from sample j to i and to k."""
    a, b = ([p - q for p, q in zip(x[other], x[j], strict=True)] for other in (i, k))
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(p * q for p, q in zip(a, b, strict=True)) / lengths if lengths else 0.0


def rkd_angles(s: Tensor, t: Tensor) -> float:
    n, (x, y) = len(s), (rows(s), rows(t))
    return sum(huber(cosine(x, *ijk) - cosine(y, *ijk)) for ijk in product(range(n), repeat=3)) / n**3


def similarity(s: Tensor, t: Tensor) -> float:
    n, found = len(s), []
    for x in (rows(s), rows(t)):
        gram = [[sum(p * q for p, q in zip(a, b, strict=True)) for b in x] for a in x]
        found.append([[v / math.hypot(*row) for v in row] for row in gram])
    return sum((found[0][i][j] - found[1][i][j]) ** 2 for i, j in product(range(n), repeat=2)) / n**2


def pkt(s: Tensor, t: Tensor, eps: float = 1e-7) -> float:
    n, found = len(s), []
    for x in (rows(s), rows(t)):
        gram = [
            [sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)) for b in x] for a in x
        ]
        odds = [[(v + 1) / 2 for v in row] for row in gram]
        found.append([[v / sum(row) for v in row] for row in odds])
    q, p = found
    pairs = product(range(n), repeat=2)
    return sum(p[i][j] * math.log((p[i][j] + eps) / (q[i][j] + eps)) for i, j in pairs) / n**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_responses(temperature):
    s, t = draw(B, K), draw(B, K, seed=1)
    label = torch.tensor(LABEL)
    assert response.soft_targets(s, t, temperature).mean().item() == pytest.approx(hinton(s, t, temperature), rel=1e-12)
    found = response.decoupled(s, t, label, 0.7, 3.0, temperature)
    assert found.mean().item() == pytest.approx(decoupled(s, t, 0.7, 3.0, temperature), rel=1e-12)
    found = response.correlation(s, t, 0.7, 3.0, temperature)
    assert found.mean().item() == pytest.approx(stronger(s, t, 0.7, 3.0, temperature), rel=1e-12)
    assert found.shape == (B,)


def test_the_divergence_is_summed_over_classes_and_its_gradient_keeps_its_size_at_any_temperature():
    """At high temperature the gradient is (s - t) / K, of centred logits: Hinton et al., eq. 4, times T^2."""
    s, t = (x - x.mean(1, keepdim=True) for x in (draw(B, K), draw(B, K, seed=1)))
    s.requires_grad_()
    response.soft_targets(s, t, 1e5).sum().backward()
    torch.testing.assert_close(s.grad, (s.detach() - t) / K, rtol=1e-4, atol=1e-6)


def test_hard_decisions_of_the_teacher():
    s, t = draw(B, K), draw(B, K, seed=1)
    best = [max(range(K), key=row.__getitem__) for row in rows(t)]
    expected = [-math.log(softmax(row)[c]) for row, c in zip(rows(s), best, strict=True)]
    torch.testing.assert_close(response.hard(s, t), torch.tensor(expected, dtype=torch.float64))


def test_labels_and_parts_of_labels():
    s, label = draw(B, K), torch.tensor(LABEL)
    p = [softmax(row) for row in rows(s)]
    expected = [-math.log(p[i][c]) for i, c in enumerate(LABEL)]
    torch.testing.assert_close(response.labels(s, label), torch.tensor(expected, dtype=torch.float64))
    smooth = [-0.9 * math.log(p[i][c]) - 0.1 * sum(map(math.log, p[i])) / K for i, c in enumerate(LABEL)]
    torch.testing.assert_close(response.labels(s, label, 0.1), torch.tensor(smooth, dtype=torch.float64))
    soft = 0.3 * torch.eye(K)[label] + 0.7 * torch.eye(K)[label.flip(0)]
    mixed = 0.3 * response.labels(s, label) + 0.7 * response.labels(s, label.flip(0))
    torch.testing.assert_close(response.labels(s, soft), mixed, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (relation.distances, rkd_distances),
        (relation.angles, rkd_angles),
        (relation.similarities, similarity),
        (relation.neighbours, pkt),
    ],
)
def test_relations(loss, formula):
    s, t = draw(B, D), 3 * draw(B, E, seed=1)
    found = loss(s, t)
    assert found.shape == (B,)
    assert found.mean().item() == pytest.approx(formula(s, t), rel=1e-12)


def test_relations_of_coincident_samples_are_left_out_of_the_mean_distance():
    s, t = draw(B, D), draw(B, E, seed=1)
    s[3] = s[1]
    assert relation.distances(s, t).mean().item() == pytest.approx(rkd_distances(s, t), rel=1e-12)
    assert relation.angles(s, t).mean().item() == pytest.approx(rkd_angles(s, t), rel=1e-12)


def test_hint():
    s, t = draw(B, D, 4, 4), draw(B, D, 2, 2, seed=1)
    expected = 0.0
    for b, d, y, x in product(range(B), range(D), range(2), range(2)):
        coarse = sum(s[b, d, 2 * y + i, 2 * x + j].item() for i, j in product(range(2), repeat=2)) / 4
        expected += (coarse - t[b, d, y, x].item()) ** 2 / (B * D * 4)
    assert feature.hint(s, t).mean().item() == pytest.approx(expected, rel=1e-12)
    a, b = draw(B, D), draw(B, D, seed=1)
    expected = sum((a[i, j].item() - b[i, j].item()) ** 2 for i, j in product(range(B), range(D))) / (B * D)
    assert feature.hint(a, b).mean().item() == pytest.approx(expected, rel=1e-12)


def test_attention():
    s, t = draw(B, D, 2, 3), draw(B, E, 2, 3, seed=1)
    expected = 0.0
    for b in range(B):
        maps = []
        for x in (s[b], t[b]):
            flat = [sum(v * v for v in x[:, y, z].tolist()) for y, z in product(range(2), range(3))]
            maps.append([v / math.hypot(*flat) for v in flat])
        expected += sum((p - q) ** 2 for p, q in zip(*maps, strict=True)) / 6 / B
    assert feature.attention(s, t).mean().item() == pytest.approx(expected, rel=1e-12)


def test_tokens_and_self_similarity():
    s, t, temperature = draw(B, D, 2, 3), draw(B, D, 2, 3, seed=1), 0.5
    places = list(product(range(2), range(3)))
    tokens = sum(
        temperature**2 * kl(softmax(rows(t[b, :, y, x], temperature)), softmax(rows(s[b, :, y, x], temperature)))
        for b in range(B)
        for y, x in places
    )
    assert feature.tokens(s, t, temperature).mean().item() == pytest.approx(tokens / (B * 6), rel=1e-12)
    t, alike = draw(B, E, 2, 3, seed=1), 0.0
    for b, place in product(range(B), places):
        odds = []
        for x in (t[b], s[b]):
            vectors = {p: x[:, p[0], p[1]].tolist() for p in places}
            own = vectors[place]
            cosines = [
                sum(p * q for p, q in zip(own, v, strict=True)) / (math.hypot(*own) * math.hypot(*v))
                for v in vectors.values()
            ]
            odds.append(softmax([c / temperature for c in cosines]))
        alike += kl(*odds) / (B * 6)
    assert feature.self_similarity(s, t, temperature).mean().item() == pytest.approx(alike, rel=1e-12)


def test_contrast_and_queue():
    s, t, queue, temperature = draw(B, D), draw(B, D, seed=1), draw(7, D, seed=2), 0.2
    unit = [[[v / math.hypot(*row) for v in row] for row in rows(x)] for x in (s, t, queue)]

    def logits(row, others):
        return [sum(p * q for p, q in zip(row, other, strict=True)) / temperature for other in others]

    both = 0.0
    for i in range(B):
        both -= math.log(softmax(logits(unit[0][i], unit[1]))[i]) / (2 * B)
        both -= math.log(softmax(logits(unit[1][i], unit[0]))[i]) / (2 * B)
    assert contrast.contrast(s, t, temperature).mean().item() == pytest.approx(both, rel=1e-12)
    expected = 0.0
    for i in range(B):
        places = [unit[1][i], *unit[2]]
        expected += kl(softmax(logits(unit[1][i], places)), softmax(logits(unit[0][i], places))) / B
    found = contrast.against_queue(s, t, torch.tensor(unit[2], dtype=torch.float64), temperature)
    assert found.mean().item() == pytest.approx(expected, rel=1e-12)


LOSSES = {
    "labels": lambda s, t: response.labels(s, torch.tensor(LABEL)),
    "hard": response.hard,
    "soft targets": lambda s, t: response.soft_targets(s, t, 4.0),
    "decoupled": lambda s, t: response.decoupled(s, t, torch.tensor(LABEL), 1.0, 8.0, 4.0),
    "correlation": lambda s, t: response.correlation(s, t, 1.0, 1.0, 1.0),
    "hint": feature.hint,
    "distances": relation.distances,
    "angles": relation.angles,
    "similarities": relation.similarities,
    "neighbours": relation.neighbours,
    "contrast": lambda s, t: contrast.contrast(s, t, 0.07),
    "queue": lambda s, t: contrast.against_queue(s, t, draw(7, K, seed=2).bfloat16().to(s), 0.07),
}
MAPS = {
    "attention": feature.attention,
    "tokens": lambda s, t: feature.tokens(s, t, 1.0),
    "self_similarity": lambda s, t: feature.self_similarity(s, t, 0.07),
}
ALL = [*LOSSES, *MAPS]


def inputs(name: str) -> tuple[Tensor, Tensor]:
    shape = (B, K) if name in LOSSES else (B, K, 2, 2)
    return 3 * draw(*shape), 3 * draw(*shape, seed=1)


@pytest.mark.parametrize("name", ALL)
def test_only_the_student_learns_and_the_gradient_is_that_of_the_formula(name):
    loss, (s, t) = (LOSSES | MAPS)[name], inputs(name)
    s.requires_grad_()
    t.requires_grad_()
    losses = loss(s, t)
    assert losses.shape == (B,)
    losses.mean().backward()
    assert s.grad.any()
    if name == "contrast":
        assert t.grad.any()  # its layer is trained
    else:
        assert t.grad is None or not t.grad.any()
    place = torch.zeros_like(s)
    place.flatten()[7] = 1e-5
    with torch.no_grad():
        slope = (loss(s + place, t).mean() - loss(s - place, t).mean()) / 2e-5
    assert s.grad.flatten()[7].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
@pytest.mark.parametrize("name", ALL)
def test_losses_are_computed_in_fp32(name, how):
    loss, (s, t) = (LOSSES | MAPS)[name], inputs(name)
    kind = torch.bfloat16 if how == "bf16" else torch.float32
    s, t = s.to(kind), t.to(kind)
    exact = loss(s.double(), t.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        found = loss(s, t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite_where_samples_coincide(name):
    loss, (s, t) = (LOSSES | MAPS)[name], inputs(name)
    s, t = s.to(torch.bfloat16), t.to(torch.bfloat16)
    alike, nought = s[:1].expand_as(s).clone(), torch.zeros_like(s)
    for case in (s.index_copy(0, torch.tensor([3]), s[1:2]), alike, nought, t.clone()):
        case = case.detach().requires_grad_()
        losses = loss(case, t)
        losses.mean().backward()
        assert losses.isfinite().all() and case.grad.isfinite().all()
        assert case.grad.abs().max() < 1e3


def test_the_rest_of_a_sure_answer_is_still_compared():
    """A target so sure that the mass of the others is nought in fp32: the logarithm of the sum would be -inf."""
    s = torch.tensor([[400.0, 1.0, 2.0]], requires_grad=True)
    t = torch.tensor([[300.0, 2.0, 1.0]])
    losses = response.decoupled(s, t, torch.tensor([0]), 1.0, 1.0, 1.0)
    losses.sum().backward()
    p = softmax([2.0, 1.0])
    assert losses.item() == pytest.approx(kl(p, p[::-1]), rel=1e-5)
    assert s.grad.isfinite().all() and s.grad[0, 1:].abs().min() > 0.1
