"""Loader processes: each makes whole micro-batches in shared memory; they are delivered in exact order.

A rank starts one clean python, the nursery, which imports what decoding needs and forks the workers. So nothing is
forked from a process that holds a GPU, threads or network connections, and the import is paid once. Micro-batch k is
made by worker k mod n, which needs no orders but where to start and which of its buffers are free.

Nothing outlives the rank: when it closes its end of the pipe to the nursery, or dies, the nursery kills the workers
and ends. Signals that ranks handle are ignored here. A worker that dies is reported with its signal.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.core.errors import DataError
from pipeline.core.protocols import Batch
from pipeline.data.assemble import Filled, Filler
from pipeline.data.device import Receive, copied
from pipeline.data.field import Arrays, Column

_BUFFERS = 2
_ALIGN = 64
_PATIENCE = 60.0
"""Seconds for the nursery to say how a worker ended; it is at once, but for a machine that is out of breath."""
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _Start(NamedTuple):
    """Rank to worker: begin at micro-batch ``number``; all buffers are free."""

    generation: int
    number: int


class _Free(NamedTuple):
    """Rank to worker: a buffer has been copied out. It is of the last start, since a pipe keeps its order."""

    buffer: int


class _Made(NamedTuple):
    """Worker to rank: a micro-batch lies in a buffer."""

    generation: int
    buffer: int
    filled: Filled


class _Failed(NamedTuple):
    """Worker to rank: ``error`` is the user's to mend, or a bug with its traceback."""

    generation: int
    error: str
    is_bug: bool


class Made(NamedTuple):
    """A micro-batch and how it came to be."""

    batch: Batch
    filled: Filled


def _views(memory: memoryview, columns: dict[str, Column], rows: int) -> tuple[Arrays, int]:
    """Arrays of [rows, *shape] laid out in ``memory``, and the bytes that they take."""
    arrays, at = {}, 0
    for name, column in columns.items():
        shape = (rows, *column.shape)
        size = int(np.prod(shape)) * np.dtype(column.dtype).itemsize
        if len(memory):
            arrays[name] = np.frombuffer(memory[at : at + size], column.dtype).reshape(shape)
        at += -(-size // _ALIGN) * _ALIGN
    return arrays, at


def _buffers(memory: mmap.mmap, columns: dict[str, Column], rows: int, workers: int) -> list[list[Arrays]]:
    """Each worker's buffers."""
    size = _views(memoryview(b""), columns, rows)[1]
    whole = memoryview(memory)
    parts = [whole[i * size : (i + 1) * size] for i in range(workers * _BUFFERS)]
    return [[_views(p, columns, rows)[0] for p in parts[w * _BUFFERS : (w + 1) * _BUFFERS]] for w in range(workers)]


def _work(worker: int, workers: int, assembler: Filler, rank: Connection, buffers: list[Arrays]) -> None:
    """The life of one loader process."""
    count = assembler.reading.count
    generation, number, free = -1, None, []
    while True:
        while number is None or not free or rank.poll():
            try:
                message = rank.recv()
            except (EOFError, OSError):
                return
            if isinstance(message, _Start):
                generation, number = message.generation, message.number + (worker - message.number) % workers
                free = list(range(_BUFFERS))
            else:
                free.append(message.buffer)
            if number is not None and count is not None and number >= count:
                number = None
        buffer = free.pop(0)
        try:
            assembler.expect(number + workers)
            filled = assembler.fill(number, buffers[buffer])
        except DataError as error:
            answer = _Failed(generation, str(error), is_bug=False)
        except Exception:
            answer = _Failed(generation, traceback.format_exc(), is_bug=True)
        else:
            answer = _Made(generation, buffer, filled)
        number = number + workers if isinstance(answer, _Made) else None
        if number is not None and count is not None and number >= count:
            number = None
        try:
            rank.send(answer)
        except OSError:
            return


def nursery(control: int, memory: int, pipes: Sequence[int], rows: int) -> None:
    """Main of the nursery: fork the workers, report those that die, kill all when the rank is gone."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    rank = Connection(control)
    try:
        assembler: Filler = rank.recv()
    except EOFError:
        return
    torch.set_num_threads(1)
    # What imports have made is no garbage; looking through it again and again would take two hundredths of the time.
    gc.freeze()
    context, connections = get_context("fork"), [Connection(p) for p in pipes]
    buffers = _buffers(mmap.mmap(memory, 0), assembler.columns, assembler.reading.size, len(pipes))

    def worker_main(worker: int) -> None:
        rank.close()
        for other, connection in enumerate(connections):
            if other != worker:
                connection.close()
        _work(worker, len(pipes), assembler, connections[worker], buffers[worker])

    workers = [context.Process(target=worker_main, args=(w,), daemon=True) for w in range(len(pipes))]
    for process in workers:
        process.start()
    for connection in connections:
        connection.close()
    _watch(rank, workers)
    for process in workers:
        process.kill()
    for process in workers:
        process.join()


def _watch(rank: Connection, workers: Sequence[BaseProcess]) -> None:
    """Report workers that die, until the rank is gone."""
    alive = {process.sentinel: w for w, process in enumerate(workers)}
    while True:
        ready = wait([rank, *alive])
        if rank in ready:
            return
        for sentinel in [s for s in alive if s in ready]:
            worker = alive.pop(sentinel)
            workers[worker].join()
            rank.send((worker, workers[worker].exitcode))


def _describe(exitcode: int | None) -> str:
    """How a process ended, in words."""
    if exitcode is not None and exitcode < 0:
        hint = "; the machine may be out of memory" if -exitcode == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-exitcode).name}{hint}"
    return f"ended with exit code {exitcode}"


def _shut(process: subprocess.Popen[bytes], pipes: list[Connection]) -> None:
    """Close all pipes, upon which the nursery ends its workers and itself."""
    for pipe in pipes:
        pipe.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Workers:
    """The rank's side: starts loader processes and takes their micro-batches in order.

    Args:
        assembler: what they run; sent to them by pickling.
        workers: how many, at least 1.
        receive: makes a batch of what they write.
    """

    def __init__(self, assembler: Filler, workers: int, receive: Receive = copied) -> None:
        self._reading = assembler.reading
        self._receive = receive
        self._generation = 0
        size = _views(memoryview(b""), assembler.columns, self._reading.size)[1]
        descriptor = os.memfd_create("sluice-loader")
        os.ftruncate(descriptor, size * workers * _BUFFERS)
        memory = mmap.mmap(descriptor, 0)
        self._buffers = _buffers(memory, assembler.columns, self._reading.size, workers)
        self._control, control = Pipe()
        self._pipes, theirs = map(list, zip(*(Pipe() for _ in range(workers)), strict=True))
        passed = [control.fileno(), descriptor, *(p.fileno() for p in theirs)]
        root = str(Path(__file__).parents[2])
        main = f"nursery({passed[0]}, {passed[1]}, {passed[2:]}, {self._reading.size})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); from {__name__} import nursery; {main}"],
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=subprocess.DEVNULL,
            pass_fds=passed,
        )
        os.close(descriptor)
        for pipe in (control, *theirs):
            pipe.close()
        self.close = weakref.finalize(self, _shut, self._process, [self._control, *self._pipes])
        self._control.send(assembler)

    def batches(self, first: int) -> Iterator[Made]:
        """Micro-batches from number ``first`` on. A new call ends the one before."""
        self._generation += 1
        generation, number = self._generation, first
        for worker in range(len(self._pipes)):
            self._send(worker, _Start(generation, first))
        while self._reading.count is None or number < self._reading.count:
            assert generation == self._generation, "another call of batches() has taken the workers over"
            worker = number % len(self._pipes)
            made = self._answer(worker)
            arrays = self._buffers[worker][made.buffer]
            batch = self._receive({name: array[: made.filled.samples] for name, array in arrays.items()})
            self._send(worker, _Free(made.buffer))
            yield Made(batch, made.filled)
            number += 1

    def _send(self, worker: int, message: _Start | _Free) -> None:
        try:
            self._pipes[worker].send(message)
        except OSError as error:
            raise self._death(worker) from error

    def _answer(self, worker: int) -> _Made:
        """The worker's next micro-batch of this generation."""
        while True:
            try:
                message = self._pipes[worker].recv()
            except (EOFError, OSError) as error:
                raise self._death(worker) from error
            if message.generation != self._generation:
                continue
            if isinstance(message, _Made):
                return message
            if message.is_bug:
                raise RuntimeError(f"loader process {worker} failed:\n{message.error}")
            raise DataError(message.error)

    def _death(self, worker: int) -> DataError:
        """Why a worker's pipe has closed."""
        try:
            if self._control.poll(_PATIENCE):
                dead, exitcode = self._control.recv()
                return DataError(f"loader process {dead} {_describe(exitcode)}")
        except (EOFError, OSError):
            return DataError(f"the parent of the loader processes {_describe(self._process.wait(_PATIENCE))}")
        return DataError(f"loader process {worker} does not answer")
