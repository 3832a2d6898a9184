"""Features that collapse are said, once, in the notes of the run."""

from types import SimpleNamespace
from typing import Any, cast

from pipeline.core.protocols import Clock
from pipeline.run.collapse import SIGNS, CollapseWatch
from pipeline.run.rivalry import RivalryWatch
from pipeline.run.train import Job
from tests.contracts.components import CONTEXT, build_objective, make_batch


def test_a_collapse_is_noted_once_and_again_after_a_recovery(lone_group):
    """Through the log of a run, with stand-ins for all that it has beside."""
    courses = [(0.5, 9.0), (0.001, 9.0), (0.001, 9.0), (0.5, 9.0), (0.5, 1.1)]
    lines = iter(
        {"step": n, "features_std": std, "features_rank": rank, "critic/real": 0.0, "critic/fake": 4e3 * (n == 3)}
        for n, (std, rank) in enumerate(courses)
    )
    said: list[str] = []
    job = SimpleNamespace(
        meter=SimpleNamespace(keep=lambda: None, line=lambda clock: next(lines)),
        plan=SimpleNamespace(steps_per_epoch=2),
        stream=SimpleNamespace(events=lambda: {"read": 1}, ledger=lambda: []),
        surveyor=SimpleNamespace(ledger=lambda: []),
        place=SimpleNamespace(device="cpu"),
        recorder=SimpleNamespace(log=lambda step, line: None, note=said.append),
        collapse=CollapseWatch(),
        rivalry=RivalryWatch(),
    )
    for step in range(len(courses)):
        Job.log(cast(Any, job), Clock(step, 0, 0))
    assert [note.split(":")[0] for note in said] == ["step 1", "step 3", "step 4"]
    assert "features_std 0.001" in said[0] and "critic diverges" in said[1] and "features_rank 1.1" in said[2]


def test_methods_without_features_are_passed_over():
    CollapseWatch().look(Clock(1, 8, 8), {"loss": 1.0}, say=lambda text: 1 / 0)


def test_posteriors_and_codes_that_collapse_are_noted_once_the_run_has_begun():
    course = [  # samples of 100, channels in use, dead codes
        (5, 0.0, 1.0),  # so does every run begin
        (20, 0.5, 0.2),
        (30, 0.05, 0.2),
        (40, 0.0, 0.6),
        (50, 0.2, 0.9),
        (60, 0.05, 0.1),
    ]
    said: list[str] = []
    watch = CollapseWatch()
    for samples, active, dead in course:
        watch.look(Clock(samples, samples, 100), {"active": active, "autoencoder/dead": dead}, said.append)
    assert [note.split(":")[0] for note in said] == ["step 30", "step 40", "step 60"]
    assert "the posterior has collapsed: 5% of the code's channels" in said[0] and "free_bits" in said[0]
    assert "the codebook has collapsed: 60% of the codes" in said[1] and "objective.revive" in said[1]


def test_the_objectives_that_have_codes_tell_what_is_judged(lone_group):
    told = {}
    for name in ("vae", "vq_vae"):
        objective = build_objective(name).train()
        told |= objective(make_batch(objective, name), CONTEXT).metrics
    assert {sign.metric for sign in SIGNS} <= set(told)
