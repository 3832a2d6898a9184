"""What ``sluice report`` and ``sluice compare`` do: results as text on standard output, or as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config.exitcodes import FINISHED
from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file
from pipeline.record import clip_benchmark, datacomp
from pipeline.record.board import board
from pipeline.record.choosing import choices_text, choose
from pipeline.record.console import say
from pipeline.record.listing import results_csv, results_json, results_markdown
from pipeline.record.records import slug
from pipeline.record.report import write_report
from pipeline.record.results import Results, located, read_results, read_together, run_names, run_of
from pipeline.record.terminal import results_text


def compare(words: Sequence[str], kind: str, out: str | None) -> int:
    """Compare models with the first that is named.

    Args:
        words: see :func:`pipeline.record.comparing.subjects_of`.
        kind: one of :data:`pipeline.record.compared.FORMATS`.
        out: file to write; None: standard output.
    """
    from pipeline.record.compared import FORMATS
    from pipeline.record.comparing import compare, subjects_of

    _give(FORMATS[kind](compare(subjects_of(words))), out)
    return FINISHED


def chosen(run: str, metric: str, out: str | None) -> int:
    """Show which checkpoint of a run each rule takes, and the metric there; see :mod:`pipeline.record.choosing`."""
    _give(choices_text(choose(_measured(run_of(run)).rows, metric)) + "\n", out)
    return FINISHED


def report(runs: Sequence[str], kind: str | None, out: str | None) -> int:
    """Show the results of runs.

    Args:
        runs: folders of runs or of results.
        kind: "html", "text", "md", "csv", "json", or a format of the field; None: of one run its page, of several a
            table.
        out: file to write, or a folder for formats of many files; None: standard output, or of one run its page.

    Raises:
        ConfigError: a run was not evaluated, a file is needed and not named, or cannot be written.
    """
    runs = [run_of(run) for run in runs]
    kind = kind or ("html" if len(runs) == 1 or out else "text")
    if kind == "html":
        say(_page(runs, out))
    elif kind in FIELD:
        if out is None:
            raise ConfigError(f"{kind} is a folder of files: name it, --out FOLDER")
        results = [(name, _measured(folder)) for folder, name in run_names(runs).items()]
        say("\n".join(FIELD[kind](results, Path(out))))
    else:
        _give(LISTED[kind](_measured(runs[0]) if len(runs) == 1 else read_together(runs)), out)
    return FINISHED


def _measured(folder: str) -> Results:
    """The results of one run.

    Raises:
        ConfigError: it was not evaluated.
    """
    results = located(read_results(folder), folder)
    if not results.rows:
        raise ConfigError(f"{folder} has no results; evaluate it first: sluice eval {folder} SUITE")
    return results


def _clip_benchmark(runs: Sequence[tuple[str, Results]], folder: Path) -> list[str]:
    """Write the files; a sentence of what was written.

    Raises:
        ConfigError: nothing was measured that CLIP_benchmark knows.
    """
    found = dict(clip_benchmark.files(runs))
    if not found:
        raise ConfigError("CLIP_benchmark knows zero_shot, retrieval and linear probes; none was measured")
    for name, text in found.items():
        write(folder / name, text)
    return [f"{len(found)} files in {folder}: clip_benchmark build {folder} --output benchmark.csv"]


def _datacomp(runs: Sequence[tuple[str, Results]], folder: Path) -> list[str]:
    """Write a file for each model, in a folder of its own where there are several; its means, or what lacks for them.

    Raises:
        ConfigError: nothing was measured on a data set of DataComp's.
    """
    found = list(datacomp.scored(runs))
    if not found:
        raise ConfigError("none of DataComp's data sets was measured; the suite's [data.NAME] says what they are")
    said = []
    for one in found:
        own = folder / slug(f"{one.model.run} {one.model.weights}") if len(found) > 1 else folder
        write(own / datacomp.FILE, one.lines)
        means = ", ".join(f"{group} {value:.4f}" for group, value in one.means.items())
        lacking = f"no average over the 38 data sets, {len(one.lacking)} lack: {', '.join(one.lacking)}"
        said.append(f"{own / datacomp.FILE}: {'; '.join(filter(None, [means, lacking if one.lacking else '']))}")
    return said


LISTED: Mapping[str, Callable[[Results], str]] = {
    "text": results_text,
    "md": results_markdown,
    "csv": results_csv,
    "json": results_json,
}
"""Formats of one text."""
FIELD: Mapping[str, Callable[[Sequence[tuple[str, Results]], Path], list[str]]] = {
    "clip_benchmark": _clip_benchmark,
    "datacomp": _datacomp,
}
"""Formats of other programs, a folder of files each."""


def _page(runs: Sequence[str], out: str | None) -> str:
    """Write the page of a run, which has all of it, or of several, which has their results; and say where."""
    if len(runs) == 1:
        return str(write_report(runs[0], None if out is None else Path(out)))
    if out is None:
        raise ConfigError("a page of several runs needs a place: --out FILE.html")
    write(Path(out), board(runs))
    return out


def _give(text: str, out: str | None) -> None:
    """Print a text, or write it and print where.

    Raises:
        ConfigError: the file cannot be written.
    """
    if out is None:
        say(text.rstrip("\n"))
        return
    write(Path(out), text)
    say(out)


def write(path: Path, text: str) -> None:
    """Write a file that was asked for.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); name another by --out") from error
