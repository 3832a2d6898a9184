"""Fixtures for all tests. World size is a marker: ``@pytest.mark.world_size(2)`` runs the test body in two gloo ranks.

Fixtures are made once, in pytest's own process, and handed to every rank; they must be picklable.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from pipeline.core.cache import VARIABLE
from tests.faults import matrix
from tests.ranks import start_ranks

gc.disable()  # until all tests are imported

# Speed is never asserted by a clock in a test, and a busy machine would break hypothesis' deadline.
settings.register_profile("sluice", deadline=None)
settings.load_profile("sluice")


def run_ranks(world: int, body: Callable[..., None], **kwargs: Any) -> None:
    """Run ``body(**kwargs)`` in ``world`` ranks; fail with all their tracebacks."""
    ended = start_ranks(world, body, **kwargs)
    problems = [f"--- rank {rank} of {world} ---\n{e.problem}" for rank, e in enumerate(ended) if e.problem]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a test marked with a world size in that many ranks."""
    mark = pyfuncitem.get_closest_marker("world_size")
    if mark is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    run_ranks(mark.args[0], pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is kept for other processes, the ranks of tests among them, lies in a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv(VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="module", autouse=True)
def admitted() -> Iterator[None]:
    """Evaluations of the tests' own that a module's tests admit into this process go with it."""
    yield
    known = sys.modules.get("pipeline.evals")
    if known is not None:
        own = str(Path(__file__).parent / "toy_evals")
        known.__path__[:] = [folder for folder in known.__path__ if folder != own]


@pytest.fixture
def lone_group() -> Iterator[None]:
    """A process group of one rank in pytest's own process, for code that takes a group for granted."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` writes the goldens anew; review the difference before committing it."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew from this run")
    parser.addoption("--faults", type=Path, help="append a line per fault (see tests/faults/matrix.py) to this file")


FIRST = ("slurm", "faults", "integration", "contracts")
"""Folders whose tests take longest: they begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first."""

    def place(item: pytest.Item) -> int:
        return min((FIRST.index(part) for part in item.path.parts if part in FIRST), default=len(FIRST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: collections need not look through it again and again."""
    gc.freeze()
    gc.enable()


class SideBySide(LoadFileScheduling):
    """Files side by side, as `make test` runs them; the tests on SLURM stay together, since they share one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SideBySide:
    """In place of ``--dist``."""
    return SideBySide(config, log)


ROW = pytest.StashKey[matrix.Row]()


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> matrix.Row:
    """The row of the fault matrix that this test fills in: case, outcome, seconds."""
    row = matrix.mark_of(request.node)
    assert row is not None, "mark the test with its row: @pytest.mark.fault(1, 'SIGKILL a rank mid-step')"
    request.node.stash[ROW] = row
    return row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep how a test of the fault matrix ended."""
    report = yield
    path = item.config.getoption("--faults")
    row = item.stash.get(ROW, None) or matrix.mark_of(item)
    if path is not None and row is not None and (report.when == "call" or not report.passed):
        row.result, why = matrix.outcome(report)
        row.outcome = row.outcome or why
        matrix.append(path, row)
    return report


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``golden("parameters/mae.txt", text, rel=0)``: compare with the file of that name under tests/golden.

    Text must be equal word for word; words that are numbers may differ by the relative ``rel``.
    """

    def compare(name: str, text: str, rel: float = 0.0) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden {name}; write it with `pytest --update-golden` and review it"
        for number, (found, kept) in enumerate(
            zip_longest(text.splitlines(), path.read_text().splitlines(), fillvalue=""), start=1
        ):
            pairs = zip_longest(found.split(), kept.split(), fillvalue="")
            assert all(a == b or _close(a, b, rel) for a, b in pairs), (
                f"{name}, line {number}\n  found:  {found}\n  golden: {kept}\n"
                "If the change is wanted, write the goldens anew with `pytest --update-golden`."
            )

    return compare


def _close(a: str, b: str, rel: float) -> bool:
    try:
        return rel > 0 and float(a) == pytest.approx(float(b), rel=rel)
    except ValueError:
        return False


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of glyphs, with "train" and "val": 8 characters, several shards."""
    from data_prep.build import build
    from data_prep.options import Options
    from data_prep.sources.glyphs import GlyphsSource

    folder = tmp_path_factory.mktemp("glyphs")
    build(GlyphsSource(characters=8, samples=1, size=32), folder, Options(shard_samples=20))
    return folder
