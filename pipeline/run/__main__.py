"""``python -m pipeline.run train --config FILE``: one rank. `sluice train` starts as many as are asked for."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from pipeline.config import load
from pipeline.config.exitcodes import CRASH
from pipeline.core.errors import SluiceError
from pipeline.engine.environment import set_aside
from pipeline.record.logs import outlive_readers, rank_log
from pipeline.run.ending import ending


def main(argv: Sequence[str]) -> int:
    """Every outcome is an exit code; what the user can mend is one message without a traceback."""
    args = _parser().parse_args(argv)
    for line in set_aside(os.environ):
        if os.environ.get("RANK", "0") == "0":
            print(f"sluice: {line}", file=sys.stderr, flush=True)
    if args.command == "train":
        return guarded(partial(_train, args.config, args.overrides))
    code = guarded(partial(_COMMANDS[args.command], args))
    if getattr(args, "outcome", None) is not None and os.environ.get("RANK", "0") == "0":
        args.outcome.write_text(str(code), encoding="utf-8")  # DeepSpeed's launcher gives 0 when a signal killed a rank
    return code


def _eval(args: argparse.Namespace) -> int:
    from pipeline.suites.evaluate import evaluate

    named = [args.checkpoint] if args.checkpoint else args.runs
    specs = [f"random:{name}" for name in named] if args.random_init else named
    names = ("weights", "out", "again", "limit", "source", "fleeting")
    return evaluate(specs, args.suite, args.overrides, **{name: getattr(args, name) for name in names})


def _export(args: argparse.Namespace) -> int:
    from pipeline.run.export import export

    sizes = (args.image_size and tuple(args.image_size), args.patch_size and tuple(args.patch_size))
    return export(args.run, args.checkpoint, args.out, *sizes, args.weights)


def _look(args: argparse.Namespace) -> int:
    from pipeline.run.look import look

    return look(args.config, args.overrides, args.samples, args.out)


def _embed(args: argparse.Namespace) -> int:
    from pipeline.run.embed import Asked, embed

    return embed(args.config, args.overrides, Asked(args.top, args.precision))


def _replay(args: argparse.Namespace) -> int:
    from pipeline.run.replay import replay

    return replay(args.run, args.step)


def _rewind(args: argparse.Namespace) -> int:
    from pipeline.run.rewind import rewind

    return rewind(args.run, args.step)


def _plan(args: argparse.Namespace) -> int:
    from pipeline.run.cost import cost

    return cost(args.config, args.overrides, args.ranks)


def _compare(args: argparse.Namespace) -> int:
    from pipeline.run.reporting import compare

    return compare(args.subjects, args.format, args.out)


def _report(args: argparse.Namespace) -> int:
    from pipeline.run.reporting import report

    return report(args.runs, args.format, args.out)


def _choose(args: argparse.Namespace) -> int:
    from pipeline.run.reporting import chosen

    return chosen(args.run, args.metric, args.out)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "eval": _eval,
    "export": _export,
    "look": _look,
    "embed": _embed,
    "replay": _replay,
    "rewind": _rewind,
    "plan": _plan,
    "choose": _choose,
    "compare": _compare,
    "report": _report,
}
"""What each command needs is imported when it runs."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    configured = {name: commands.add_parser(name) for name in ("train", "plan", "look", "embed")}
    for command in configured.values():
        command.add_argument("--config", required=True)
        command.add_argument("--set", action="append", default=[], dest="overrides")
    configured["plan"].add_argument("--ranks", type=int, required=True)
    configured["look"].add_argument("--samples", type=int, required=True)
    configured["look"].add_argument("--out", required=True)
    configured["embed"].add_argument("--top", type=int)
    configured["embed"].add_argument("--precision", choices=("float16", "float32"), default="float16")
    configured["embed"].add_argument("--outcome", type=Path)
    evaluate = commands.add_parser("eval")
    evaluate.add_argument("--run", required=True, action="append", dest="runs")
    evaluate.add_argument("--suite", required=True)
    evaluate.add_argument("--checkpoint")
    evaluate.add_argument("--random-init", action="store_true")
    evaluate.add_argument("--weights", action="append", default=[], type=_weights)
    evaluate.add_argument("--out")
    evaluate.add_argument("--again", action="store_true")
    evaluate.add_argument("--limit", type=int)
    evaluate.add_argument("--source")
    evaluate.add_argument("--fleeting", action="store_true")
    evaluate.add_argument("--outcome", type=Path)
    evaluate.add_argument("--set", action="append", default=[], dest="overrides")
    export = commands.add_parser("export")
    export.add_argument("--run", required=True)
    export.add_argument("--checkpoint")
    export.add_argument("--out", required=True)
    export.add_argument("--image-size", type=int, nargs=2)
    export.add_argument("--patch-size", type=int, nargs=2)
    export.add_argument("--weights", default="model")
    for name in ("replay", "rewind"):
        past = commands.add_parser(name)
        past.add_argument("--run", required=True)
        past.add_argument("--step", type=int, required=True)
    compare = commands.add_parser("compare")
    compare.add_argument("subjects", nargs="+")
    compare.add_argument("--format", default="text")
    compare.add_argument("--out")
    choose = commands.add_parser("choose")
    choose.add_argument("run")
    choose.add_argument("metric")
    choose.add_argument("--out")
    report = commands.add_parser("report")
    report.add_argument("--run", required=True, action="append", dest="runs")
    report.add_argument("--format")
    report.add_argument("--out")
    return parser


def _weights(text: str) -> float | str:
    """ "model", "ema" or a relative width."""
    return text if text in ("model", "ema") else float(text)


def guarded(work: Callable[[], int]) -> int:
    """Do the work; on an error, print it once and give its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        return work()
    except Exception as error:
        code, text = ending(error, rank)
        if code == CRASH:
            traceback.print_exc()
        elif rank == 0 or not (isinstance(error, SluiceError) and error.everywhere):
            print(f"sluice: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr, flush=True)
        return code


def _train(config: str, overrides: Sequence[str]) -> int:
    """Train with this rank's output in its log, from the imports on."""
    folder = _run_folder(config, overrides)

    def work() -> int:
        from pipeline.run.train import train

        return train(config, overrides)

    with rank_log(folder, int(os.environ.get("RANK", "0"))) if folder else nullcontext():
        return guarded(work)


def _run_folder(config: str, overrides: Sequence[str]) -> Path | None:
    """The folder of the run, if its configuration can be read at all."""
    try:
        return Path(load.load_run(config, overrides).run.folder)
    except SluiceError:
        return None


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main(sys.argv[1:]))
