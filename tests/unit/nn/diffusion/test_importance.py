import numpy as np
import torch

from pipeline.nn.diffusion.importance import REMEMBERED, UNIFORM, Importance

T = 6


def taught(losses, rounds=REMEMBERED):
    """Every level has shown its loss often enough."""
    found = Importance(T)
    index = torch.arange(T).repeat(rounds)
    found.learn(torch.arange(len(index)), index, torch.tensor(losses).repeat(rounds))
    return found


def test_until_all_levels_are_known_all_are_as_likely():
    found = taught([1.0, 2.0, 3.0, 4.0, 5.0, 60.0], rounds=REMEMBERED - 1)
    torch.testing.assert_close(found.probabilities(), torch.full((T,), 1 / T, dtype=torch.float64))
    quantile, factor = found.draw(torch.tensor([0.0, 0.51, 0.999]))
    assert (quantile * T).long().tolist() == [0, 3, 5]
    torch.testing.assert_close(factor, torch.ones(3).double())


def test_probabilities_are_those_of_the_paper_and_the_expectation_stays():
    losses = [1.0, 2.0, 0.0, 4.0, 5.0, 8.0]
    found = taught(losses)
    expected = (1 - UNIFORM) * np.array(losses) / 20 + UNIFORM / T
    np.testing.assert_allclose(found.probabilities().numpy(), expected, rtol=1e-12)
    quantile, factor = found.draw((torch.arange(100_000) + 0.5) / 100_000)
    index = (quantile * T).long()
    share = torch.bincount(index, minlength=T).double() / 100_000
    np.testing.assert_allclose(share.numpy(), expected, atol=2e-5)
    drawn = torch.tensor(losses)[index].double() * factor
    assert abs(float(drawn.mean()) - np.mean(losses)) < 1e-3
    assert drawn.std() < 0.1 * np.std(losses)  # proportional to the loss, the estimate is nearly without noise


def test_only_the_last_losses_count_in_the_order_of_the_samples():
    found = taught([1.0] * T)
    found.learn(torch.arange(14), torch.zeros(14, dtype=torch.int64), torch.arange(14.0))
    assert sorted(found.history[0].tolist()) == list(range(4, 14))
    assert found.seen.tolist() == [24, *[10] * (T - 1)]


def test_it_does_not_matter_which_rank_had_which_sample():
    generator = torch.Generator().manual_seed(0)
    one, other = taught([1.0] * T), taught([1.0] * T)
    for step in range(5):
        order, index = torch.arange(40) + 40 * step, torch.randint(0, T, (40,), generator=generator)
        loss, mixed = torch.rand(40, generator=generator), torch.randperm(40, generator=generator)
        one.learn(order, index, loss)
        other.learn(order[mixed], index[mixed], loss[mixed])
    assert torch.equal(one.history, other.history) and torch.equal(one.seen, other.seen)
