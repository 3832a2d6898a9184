"""A suite of evaluations on one subject after the other."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED, INCOMPLETE
from pipeline.config.schema import Weights
from pipeline.core.errors import ConfigError
from pipeline.dist.group import Place, by_first, process_group
from pipeline.dist.meeting import Failure, Meeting
from pipeline.record.console import say
from pipeline.record.failed import Ended, keep_failures
from pipeline.record.report import write_report
from pipeline.record.results import Results, read_results, ready
from pipeline.record.terminal import found_text, table_text
from pipeline.suites.groups import keep_averages
from pipeline.suites.progress import Progress
from pipeline.suites.running import Asked, Done, Runner
from pipeline.suites.subject import Subject, open_subject
from pipeline.suites.subjects import Spec, find
from pipeline.suites.tasks import tasks_of


def evaluate(
    specs: Sequence[str],
    suite: str,
    overrides: Sequence[str] = (),
    *,
    weights: Sequence[Weights] = (),
    out: str | None = None,
    again: bool = False,
    limit: int | None = None,
    source: str | None = None,
    fleeting: bool = False,
) -> int:
    """Run of a suite what is not there yet, record it, renew the reports and print the tables.

    Args:
        specs: what is evaluated, see :mod:`pipeline.suites.subjects`.
        suite: file of the suite.
        overrides: of the suite, ``key.path=value``.
        weights: of checkpoints; none: as the suite has it.
        out: folder for results and report; None: each run's.
        again: run also what is there.
        limit: look at so many samples of each stream, for a quick trial; None: at all.
        source: what the subject comes from, where others of the same name have results in ``out``; None: its own name.
        fleeting: pass over checkpoints that are gone by now, with a word.

    Returns:
        FINISHED, or INCOMPLETE when something could not be evaluated.

    Raises:
        ConfigError: something is wrong with the suite itself, or with what is to be evaluated.
    """
    plan = load.load_suite(suite, overrides)
    asked = Asked(Path(suite).stem, plan, tasks_of(plan, suite), again, limit)
    done: list[Done] = []
    with ExitStack() as stack:
        place = stack.enter_context(process_group(timeout_minutes=60))
        kinds = list(weights) or [plan.weights]
        subjects = by_first(lambda: _wanted(find(specs, kinds, fleeting=fleeting), out, source))
        folders = list(dict.fromkeys(wanted.folder for wanted in subjects))
        for folder in folders:
            by_first(partial(ready, folder))
        total = len(subjects) * len(asked.tasks)
        progress = stack.enter_context(closing(Progress(sys.stderr, total, quiet=not place.first)))
        meeting = Meeting(place)
        for wanted in subjects:
            own = _on_subject(wanted, asked, place, meeting, progress, fleeting)
            if not own:
                continue
            done += own + by_first(partial(keep_averages, asked, wanted.spec.spelled, wanted.folder, own))
        progress.close()
        by_first(
            partial(_finish, folders if done else [], done)
        )  # and the others wait, since the first to leave ends a launcher's job
    return INCOMPLETE if any(one.failure is not None for one in done) else FINISHED


@dataclass(frozen=True)
class Wanted:
    """A subject that is to be evaluated."""

    spec: Spec
    name: str
    """What it is called, before it is opened."""
    folder: Path
    """For its results."""
    apart: bool
    """The folder is not that of its run, so that its name tells where it comes from."""

    def passed_over(self) -> bool:
        """Whether there is no such checkpoint any more, which is said."""
        if self.spec.path is None or self.spec.path.exists():
            return False
        say(f"passed over {self.name}: the run has removed it (run.keep)")
        return True

    def told(self, name: str) -> str:
        """What it is called where other runs are told of too."""
        return name if self.apart or name == self.spec.source else f"{self.spec.source}: {name}"

    def open(self, place: Place) -> Subject:
        """See :func:`open_subject`."""
        subject = open_subject(self.spec, place)
        return replace(subject, name=subject.title) if self.apart else subject


def _wanted(specs: Sequence[Spec], out: str | None, source: str | None) -> list[Wanted]:
    """What is to be evaluated, and where its results go.

    Raises:
        ConfigError: that is not known.
    """
    wanted: list[Wanted] = []
    spelled: dict[Path, Path] = {}  # one folder, however its run was spelled
    for found in specs:
        spec = found if source is None else replace(found, source=source)
        folder = spec.run if out is None else Path(out)
        if folder is None:
            raise ConfigError(f"{spec.spelled} is not of a run: say where its results go, --out FOLDER")
        folder = spelled.setdefault(folder.resolve(), folder)
        wanted.append(Wanted(spec, spec.name if out is not None else spec.called(), folder, out is not None))
    return wanted


def _on_subject(
    wanted: Wanted, asked: Asked, place: Place, meeting: Meeting, progress: Progress, fleeting: bool
) -> list[Done]:
    """All tasks on a subject; where it cannot be opened, all of them have failed, or none if it is passed over."""
    done: list[Done] = []
    left = Counter(task.data_name for task in asked.tasks)
    runner: Runner | None = None
    for task in asked.tasks:
        if runner is None:
            made = meeting.hold(lambda: _runner(wanted, asked, place, meeting, progress))
            if made.value is None:
                progress.skip(len(asked.tasks) - len(done))
                if fleeting and not done and by_first(wanted.passed_over):
                    return []
                rest = asked.tasks[len(done) :]
                told = wanted.told(wanted.name)
                return done + [Done(task.title, wanted.name, told, wanted.folder, made.failure) for task in rest]
            runner = made.value
        progress.begin(f"{task.title}, {runner.told}")
        done.append(runner.run(task))
        progress.end(worked=not done[-1].before)
        left[task.data_name] -= 1
        if not left[task.data_name]:
            runner.forget(task.data_name)
        if runner.touched:  # what comes next is measured on the subject as it was
            runner.close()
            runner = None
    if runner is not None:
        runner.close()
    return done


def _runner(wanted: Wanted, asked: Asked, place: Place, meeting: Meeting, progress: Progress) -> Runner:
    judge = None
    if asked.plan.judge is not None:
        specs = by_first(partial(find, [asked.plan.judge]))
        if len(specs) > 1:
            raise ConfigError(f"judge: {asked.plan.judge} are {len(specs)}, and one is wanted: {specs[0].name}")
        judge = open_subject(specs[0], place)
    subject = wanted.open(place)
    told = wanted.told(subject.name)
    return Runner(asked, wanted.spec.spelled, subject, told, judge, wanted.folder, place, meeting, progress)


def _finish(folders: Sequence[Path], done: Sequence[Done]) -> None:
    for folder in folders:
        _show(folder, done)
    _tell(done)


def _show(folder: Path, done: Sequence[Done]) -> None:
    """All results of a folder, in a table and in its report; the tables and figures of this suite."""
    own = [one for one in done if one.folder == folder]
    ended = [Ended(one.title, one.subject, one.failure.text if one.failure else None) for one in own]
    keep_failures(folder, ended)
    results = read_results(folder)
    for sentence in results.damaged:
        print(f"sluice: {sentence}", file=sys.stderr, flush=True)
    page = write_report(folder)
    say(table_text(results.rows))
    new = Results([], [], [])
    for one in own:
        if one.results is not None and not one.before:
            new = new.and_of(one.results)
    if more := found_text(folder, new):
        say(f"{more}\nshown in {page}")


def _tell(done: Sequence[Done]) -> None:
    """What was there before, and what has failed and why."""
    if before := sum(one.before for one in done):
        say(f"{before} of {len(done)} were there already, and are not done again without --again")
    failed = [one for one in done if one.failure is not None]
    if not failed:
        return
    lines = [f"{len(failed)} of {len(done)} evaluations have failed; what the others have measured is kept"]
    titles: dict[tuple[str, Failure], list[str]] = {}
    for one in failed:
        assert one.failure is not None
        titles.setdefault((one.told, one.failure), []).append(one.title)
    for (told, failure), own in titles.items():  # of a subject that cannot be opened one line, not one for each task
        lines.append(f"{', '.join(own)}, {told}: {failure.text}")
        if failure.trace:
            lines.append(failure.trace.rstrip())
    print("sluice: " + "\n  ".join(lines), file=sys.stderr, flush=True)
