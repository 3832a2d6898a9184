"""Features that collapse are said, once, in the notes of the run."""

from types import SimpleNamespace
from typing import Any, cast

from pipeline.core.protocols import Clock
from pipeline.run.collapse import CollapseWatch
from pipeline.run.rivalry import RivalryWatch
from pipeline.run.train import Job


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
    CollapseWatch().look(1, {"loss": 1.0}, say=lambda text: 1 / 0)
