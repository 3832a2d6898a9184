"""Real descriptors: each test runs a process of its own, whose console is a pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.record.logs import HEADER, _Alarms, last_error, log_path, log_ranks

ROOT = Path(__file__).parents[3]


def command(folder, number, body):
    """The program of one rank, in a checkout's environment."""
    code = (
        "import ctypes, os, signal, sys, time, warnings\n"
        "from pathlib import Path\n"
        "from pipeline.record.logs import console, rank_log\n"
        f"with rank_log(Path(sys.argv[1]), {number}):\n    {body}\n"
        "print('after')"
    )
    return [sys.executable, "-c", code, str(folder)]


# Unbuffered, Python would leave C without a buffer too, and nothing could be left in it.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


def rank(folder, number, body, **more):
    """Run it: what it shows on its console, and its exit code."""
    what = command(folder, number, body)
    return subprocess.run(what, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, **more)


def logged(folder, number):
    """The lines of a log, without headers."""
    lines = log_path(folder, number).read_text().splitlines()
    return [line for line in lines if not line.startswith(HEADER)]


PRINTS = (
    "print('python'); os.write(1, b'descriptor\\n'); ctypes.CDLL(None).puts(b'from C');"
    " os.system('echo a child; echo its trouble >&2'); print('to stderr', file=sys.stderr)"
)


def test_all_of_the_first_rank_is_on_the_console_and_in_its_log(tmp_path):
    done = rank(tmp_path, 0, PRINTS)
    # what C holds in its own buffer comes when that is emptied: at the end, or when it likes
    assert sorted(logged(tmp_path, 0)) == sorted(
        ["python", "descriptor", "from C", "a child", "its trouble", "to stderr"]
    )
    assert done.stderr.splitlines() == logged(tmp_path, 0)
    assert done.stdout == "after\n"


ALARMS = (
    "print('an ordinary line'); print('mean error 0.3');"
    " warnings.warn('look at this'); warnings.warn_explicit('look at this', UserWarning, '<string>', 7);"
    " print('[WARNING] again'); print('[WARNING] again');"
    " exec('def f(): 1/0\\ntry: f()\\nexcept ZeroDivisionError:\\n import traceback; traceback.print_exc()');"
    " print('quiet'); print('sluice: make room', file=sys.stderr)"
)


def test_of_other_ranks_the_console_shows_what_alarms_with_its_rank(tmp_path):
    done = rank(tmp_path, 3, ALARMS)
    lines = done.stderr.splitlines()
    assert all(line.startswith("rank 3 | ") for line in lines)
    shown = [line.removeprefix("rank 3 | ") for line in lines]
    assert [s for s in shown if "look at this" in s]
    assert shown.count("[WARNING] again") == 1
    begin = shown.index("Traceback (most recent call last):")
    assert [line[:6] for line in shown[begin + 1 : begin + 3]] == ["  File"] * 2
    assert shown[begin + 3] == "ZeroDivisionError: division by zero"
    assert "sluice: make room" in shown
    assert not {"an ordinary line", "mean error 0.3", "quiet"} & set(shown)
    assert {"an ordinary line", "quiet"} <= set(logged(tmp_path, 3))


def test_what_is_not_ended_by_a_newline_waits_for_its_end(tmp_path):
    body = "sys.stderr.write('Runtime'); sys.stderr.flush(); time.sleep(0.6); sys.stderr.write('Error: x\\n')"
    assert rank(tmp_path, 1, body).stderr == "rank 1 | RuntimeError: x\n"


def test_the_last_words_of_a_rank_that_is_killed_are_kept(tmp_path):
    done = rank(tmp_path, 1, "os.write(2, b'terminate called after throwing\\n'); os.kill(os.getpid(), 9)")
    assert done.returncode == -9
    assert logged(tmp_path, 1) == ["terminate called after throwing"]
    assert last_error(tmp_path, 1) == "terminate called after throwing"


def test_the_console_hears_while_the_rank_still_works(tmp_path):
    body = "print('a line'); exec('while not os.path.exists(sys.argv[1] + \"/heard\"): time.sleep(0.02)')"
    what = command(tmp_path, 0, body)
    with subprocess.Popen(what, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "a line\n"  # hangs if the console hears only at the end
        assert process.poll() is None
        (tmp_path / "heard").touch()
    assert process.returncode == 0


def test_attempts_follow_each_other_and_only_the_last_one_counts(tmp_path):
    rank(tmp_path, 0, "print('RuntimeError: first')")
    assert last_error(tmp_path, 0) == "RuntimeError: first"
    done = rank(tmp_path, 0, "print('well')")
    assert logged(tmp_path, 0) == ["RuntimeError: first", "well"]
    assert log_path(tmp_path, 0).read_text().count(HEADER) == 2
    assert "first" not in done.stderr
    assert last_error(tmp_path, 0) is None
    assert last_error(tmp_path, 5) is None
    assert log_ranks(tmp_path) == [0]


def test_the_stack_that_cpp_adds_to_an_error_is_not_taken_for_it(tmp_path):
    said = [
        "RuntimeError: Connection closed by peer",
        "Exception raised from throwSocketError at TCPStore.cpp:1 (most recent call first):",
        "frame #2: c10::DistNetworkError::DistNetworkError(c10::SourceLocation) + 0x72 (0x7f in libc10.so)",
    ]
    path = log_path(tmp_path, 1)
    path.parent.mkdir()
    path.write_text("\n".join(["=== rank 1", *said, ""]))
    assert last_error(tmp_path, 1) == said[0]
    assert _Alarms(1)("\n".join([*said, ""]).encode()) == f"rank 1 | {said[0]}\n".encode()


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: x",
        "Exception: x",
        "[ERROR] x",
        "FATAL x",
        "CRITICAL x",
        "srun: error: x",
        "fatal: x",
        "terminate called after x",
        "Segmentation fault (core dumped)",
        "sluice: make room",
    ],
)
def test_each_kind_of_error_is_found_among_ordinary_lines(tmp_path, line):
    path = log_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text("=== rank 0\n" + "mean error 0.3\n" * 50 + f"{line}\n" + "bye\n" * 50)
    assert last_error(tmp_path, 0) == line


def test_the_umask_of_the_user_holds(tmp_path):
    rank(tmp_path / "run", 0, "pass", preexec_fn=lambda: os.umask(0o027))
    assert log_path(tmp_path / "run", 0).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "run" / "logs").stat().st_mode & 0o777 == 0o750


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").touch()
    done = rank(tmp_path, 0, "pass")
    assert done.returncode == 1 and "LaunchError: cannot write" in done.stderr and "run.folder" in done.stderr


def test_a_message_that_the_log_has_no_room_for_comes_to_the_console(tmp_path):
    body = "os.dup2(os.open('/dev/full', os.O_WRONLY), 2); print('disk is full', file=sys.stderr)"
    done = rank(tmp_path, 0, body)
    assert done.returncode == 0 and "disk is full" in done.stderr


def test_a_console_that_is_gone_does_not_stop_the_rank(tmp_path):
    read, write = os.pipe()
    what = command(tmp_path, 0, "print('one'); time.sleep(0.5); print('two')")
    process = subprocess.Popen(what, env=ENVIRONMENT, stderr=write)
    os.close(write)
    os.close(read)
    assert process.wait(timeout=60) == 0
    assert logged(tmp_path, 0) == ["one", "two"]


def test_a_terminal_is_handed_on(tmp_path):
    main, terminal = os.openpty()
    body = "sys.exit(console().isatty() and not sys.stderr.isatty())"
    process = subprocess.Popen(command(tmp_path, 0, body), env=ENVIRONMENT, stderr=terminal)
    os.close(terminal)
    assert process.wait(timeout=60) == 1
    os.close(main)


def test_program_whose_log_cannot_be_written_says_so(tmp_path):
    (tmp_path / "logs").touch()
    config = ROOT / "configs" / "smoke" / "mae.toml"
    words = ["train", "--config", str(config), "--set", f"run.folder='{tmp_path}'"]
    what = [sys.executable, "-m", "pipeline.run", *words]
    done = subprocess.run(what, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("sluice: cannot write") and "Traceback" not in done.stderr


def test_work_outlives_those_who_read_of_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from pipeline.record.logs import outlive_readers\n"
        "outlive_readers()\n"
        "print('first', flush=True); sys.stdin.read()\n"
        "for _ in range(3): print('more', flush=True); print('said', file=sys.stderr)\n"
        "Path(sys.argv[1]).touch()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "whole")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdout is not None and process.stdout.readline() == b"first\n"
    process.stdout.close()
    assert process.stdin is not None and process.stderr is not None
    process.stdin.close()
    with process.stderr as said:
        assert said.read() == b"said\n" * 3
    assert process.wait(60) == 0 and (tmp_path / "whole").exists()
