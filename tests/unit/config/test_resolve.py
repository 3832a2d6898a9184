import math

import pytest

from pipeline.config.mistakes import Mistakes
from pipeline.config.resolve import learning_rate, resolve
from pipeline.config.schema import Component, Data, EngineConfig, Optimizer, Run, RunConfig


def config(*, length="10ep", batch=64, micro=8, tail="drop", lr=0.1, schedule=None, **optimizer):
    return RunConfig(
        run=Run(folder="runs/x", length=length, global_batch=batch),
        data=Data(train="shards", tail=tail),
        objective=Component(name="mae"),
        optimizer=Optimizer(lr=lr, **optimizer),
        schedule=Component(**{"name": "cosine"} | (schedule or {})),
        engine=EngineConfig(name="deepspeed", micro_batch=micro),
    )


def test_plan_in_numbers():
    plan = resolve(config(schedule={"warmup": "10%"}), samples=1000, world_size=2)
    assert (plan.global_batch, plan.micro_batch, plan.world_size, plan.accumulation) == (64, 8, 2, 4)
    assert plan.steps_per_epoch == 15
    assert (plan.total_steps, plan.total_samples) == (150, 9600)
    assert (plan.warmup_steps, plan.cooldown_steps) == (15, 0)
    assert (plan.log_every, plan.checkpoint_every, plan.showcase_every) == (10, 1000, 38)


def test_endless_tail_counts_every_sample():
    plan = resolve(config(tail="endless"), samples=1000, world_size=1)
    assert plan.steps_per_epoch == 15.625
    assert plan.total_steps == 156


@pytest.mark.parametrize(("scaling", "peak"), [("none", 0.1), ("linear", 0.1 * 64 / 16), ("sqrt", 0.1 * 2)])
def test_scaled_learning_rate(scaling, peak):
    plan = resolve(config(lr_scaling=scaling, lr_batch=16), samples=1000, world_size=1)
    assert plan.peak_lr == pytest.approx(peak, rel=1e-15)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "remedies"),
    [
        (100, 8, 4, ["run.global_batch = 96", "run.global_batch = 128", "engine.micro_batch = 5"]),
        (64, 8, 3, ["run.global_batch = 48", "run.global_batch = 72", "2 ranks"]),
        (4, 8, 1, ["run.global_batch = 8", "engine.micro_batch = 4"]),
        (10, 4, 3, ["run.global_batch = 12"]),
    ],
)
def test_batch_that_cannot_be_shared_out(batch, micro, world, remedies):
    with pytest.raises(Mistakes) as caught:
        resolve(config(batch=batch, micro=micro), samples=1000, world_size=world)
    (problem,) = caught.value.problems
    assert problem.endswith("near by that would be " + ", or ".join(remedies))
    for remedy in remedies:  # and each is one
        changed = {"batch": batch, "micro": micro, "world": world}
        key = "batch" if "global" in remedy else "micro" if "micro" in remedy else "world"
        changed[key] = int("".join(c for c in remedy if c.isdigit()))
        assert changed["batch"] % (changed["micro"] * changed["world"]) == 0


def test_all_that_does_not_fit_is_said_at_once():
    with pytest.raises(Mistakes) as caught:
        resolve(config(batch=100), samples=50, world_size=4)
    assert len(caught.value.problems) == 2
    assert resolve(config(batch=100, micro=25, tail="endless"), samples=50, world_size=4).total_steps == 5
    with pytest.raises(Mistakes, match="there are no samples"):
        resolve(config(), samples=0, world_size=1)


def test_schedule_longer_than_the_run():
    for schedule in ({"warmup": "200ba"}, {"name": "constant", "warmup": "80%", "cooldown": "50%"}):
        with pytest.raises(Mistakes, match="150"):
            resolve(config(schedule=schedule), samples=1000, world_size=1)


def curve(name, lr=0.1, **schedule):
    """Learning rates of all updates of a run of 1000 updates of 64 samples."""
    plan = resolve(config(length="1000ba", lr=lr, schedule={"name": name, **schedule}), samples=1000, world_size=1)
    return [learning_rate(plan, 64 * step) for step in range(1000)]


def test_warmup_is_linear_from_zero():
    for name in ("cosine", "constant", "inverse_sqrt"):
        rates = curve(name, warmup="100ba")
        assert rates[:100] == pytest.approx([0.1 * (step + 0.5) / 100 for step in range(100)], rel=1e-12)
        assert max(rates) <= 0.1


def test_cosine():
    rates = curve("cosine", warmup="200ba", final=0.25)
    middle = [step + 0.5 for step in range(200, 1000)]
    expected = [0.025 + 0.075 * 0.5 * (1 + math.cos(math.pi * (m - 200) / 800)) for m in middle]
    assert rates[200:] == pytest.approx(expected, rel=1e-12)
    assert 0 < curve("cosine", warmup="0ba")[-1] < 1e-6  # the last update is not one by nothing


def test_constant_with_cooldown():
    rates = curve("constant", warmup="100ba", cooldown="25%")
    assert rates[100:750] == pytest.approx([0.1] * 650)
    assert rates[750:] == pytest.approx([0.1 * (1000 - step - 0.5) / 250 for step in range(750, 1000)], rel=1e-12)


def test_inverse_square_root_with_cooldown():
    rates = curve("inverse_sqrt", warmup="100ba", cooldown="100ba")
    assert rates[100:900] == pytest.approx([0.1 * math.sqrt(100 / (s + 0.5)) for s in range(100, 900)], rel=1e-12)
    tail = [0.1 * math.sqrt(100 / (s + 0.5)) * (1000 - s - 0.5) / 100 for s in range(900, 1000)]
    assert rates[900:] == pytest.approx(tail, rel=1e-12)


def test_the_power_law_is_that_of_domain_adaptation():
    """mu_p = mu_0 / (1 + a p)^b with a = 10, b = 0.75 (Ganin et al. 2016, section 5.2.2)."""
    halves = [(step + 0.5) / 1000 for step in range(1000)]
    assert curve("power") == pytest.approx([0.1 / (1 + 10 * p) ** 0.75 for p in halves], rel=1e-12)
    other = curve("power", a=3.0, b=2.0, warmup="200ba", cooldown="100ba")
    assert other[:200] == pytest.approx([0.1 * (step + 0.5) / 200 for step in range(200)])
    middle = [0.1 / (1 + 3 * (step + 0.5 - 200) / 800) ** 2 for step in range(200, 1000)]
    assert other[200:900] == pytest.approx(middle[:700], rel=1e-12)
    assert other[-1] == pytest.approx(middle[-1] * 0.5 / 100)


def test_steps_are_those_of_a_multi_step_scheduler():
    """torch's, which counts epochs: 240 of them with milestones 150, 180 and 210 are CIFAR-100's."""
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [625, 750, 875])
    expected = []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert curve("step", milestones=[0.625, 0.75, 0.875]) == pytest.approx(expected, rel=1e-12)
    warm = curve("step", milestones=[0.5], factor=0.5, warmup="100ba", cooldown="100ba")
    assert warm[:100] == pytest.approx([0.1 * (step + 0.5) / 100 for step in range(100)])
    assert warm[499:501] == pytest.approx([0.1, 0.05]) and warm[950] == pytest.approx(0.05 * 49.5 / 100)


@pytest.mark.parametrize(
    ("milestones", "said"),
    [
        ([0.6, 0.3], "each milestone comes after the one before"),
        ([0.3, 0.3], "each milestone comes after the one before"),
        ([30, 60], r"milestones\[0\]: expected a number < 1.0, found 30"),
        ([], "milestones: expected a list of at least 1"),
    ],
)
def test_milestones_are_rising_parts_of_the_run(milestones, said):
    with pytest.raises(Mistakes, match=said):
        curve("step", milestones=milestones)


def test_nothing_is_warmed_up_that_nobody_asked_to():
    plan = resolve(config(), samples=1000, world_size=1)
    assert (plan.warmup_steps, plan.cooldown_steps) == (0, 0)
    for name in ("cosine", "constant", "power"):
        assert curve(name)[0] == max(curve(name)) > 0.099


def test_groups_are_frozen_for_steps():
    groups = [
        {"prefix": "a", "frozen_until": "2ep"},
        {"prefix": "b", "frozen_from": "50%"},
        {"prefix": "c", "frozen_from": "6.4ksa", "frozen_until": "140ba"},
        {"prefix": "d", "frozen": True, "lr": 0.5},
        {"prefix": "e", "frozen_until": "0ba"},
    ]
    plan = resolve(config(groups=groups), samples=1000, world_size=1)
    assert plan.frozen == {"a": (0, 30), "b": (75, 150), "c": (100, 140), "e": (0, 0)}
    backwards = [{"prefix": "a", "frozen_from": "3ep", "frozen_until": "2ep"}]
    with pytest.raises(Mistakes, match=r"optimizer\.groups\[0\]: frozen_from = 3ep \(step 45\) comes after"):
        resolve(config(groups=backwards), samples=1000, world_size=1)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([{"prefix": "a", "frozen": True, "frozen_until": "1ep"}], "'frozen' is for the whole run"),
        ([{"prefix": "a", "lr": 2.0}, {"prefix": "a", "weight_decay": 0.0}], "'a' stands twice"),
        ([{"prefix": "a", "lr": 0.0}], "greater than 0"),
    ],
)
def test_groups_that_mean_nothing(groups, said):
    with pytest.raises(ValueError, match=said):
        config(groups=groups)


def test_curve_is_a_function_of_samples_and_not_of_the_batch():
    small = resolve(config(length="64ksa", batch=64, schedule={"warmup": "10%"}), samples=1000, world_size=1)
    large = resolve(config(length="64ksa", batch=640, schedule={"warmup": "10%"}), samples=1000, world_size=1)
    for step in range(100):
        mean = sum(learning_rate(small, 640 * step + 64 * i) for i in range(10)) / 10
        assert learning_rate(large, 640 * step) == pytest.approx(mean, abs=2e-5)
