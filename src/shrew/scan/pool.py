"""Files analysed beside each other, by worker processes: what they hold comes back as if it had been found here.

A worker is a fresh interpreter that imports from where this one does, reads tasks from its standard input and writes
facts to its standard output, and ends when its input does: none outlives the scan, however that ends. (multiprocessing
would run the caller's script again, and looks for its own modules in the current folder first, which may be the one
that is scanned.) A file that kills its worker costs that file, not the scan.
"""

import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from shrew.errors import DataError, FolderError
from shrew.scan.cache import Facts
from shrew.scan.judge import Judge
from shrew.scan.pipeline import Task, analysed
from shrew.scan.rules import load_rules

__all__ = ["Pool", "possible", "work"]

PATIENCE = 2.0  # seconds until a worker that has closed its output is gone
_LENGTH = 8  # bytes of the length before each message


class _Setup(msgspec.Struct, array_like=True, frozen=True):
    rules: list[str]  # files of rules beside those that ship
    folder: str | None  # of the judge


class _Reply(msgspec.Struct, array_like=True, frozen=True):
    """Facts; or why there are none, and whether that ends the scan."""

    facts: Facts | None
    why: str = ""
    fatal: bool = False


def possible() -> bool:
    """Whether there is an interpreter to start. (A program that was frozen into one file would start itself.)"""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class Pool:
    """`jobs` workers, each started when there is work for it. Close it, whatever happens."""

    def __init__(self, jobs: int, rules: Sequence[str], folder: Path | None) -> None:
        setup = _Setup(list(rules), None if folder is None else str(folder))
        self._workers = [_Worker(setup) for _ in range(jobs)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(jobs)

    def submit(self, task: Task) -> "Future[Facts | None]":
        """The facts of a file, in time; None where no worker can be started, or one failed and did not crash. The
        result raises DataError for a file that is not scanned, FolderError for a judge that is damaged."""
        return self._threads.submit(self._ask, task)

    def _ask(self, task: Task) -> Facts | None:
        worker = self._idle.get()
        try:
            return worker.ask(task)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all work, also that which has begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()  # so that the thread that waits for it goes on
        self._threads.shutdown()
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, for one thread at a time."""

    def __init__(self, setup: _Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._fails = False

    def ask(self, task: Task) -> Facts | None:
        process = self._process or self._start()
        if process is None:
            return None
        raw = _answer(process, task)
        if raw is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            code = self.end()
            if code >= 0:
                return None  # no crash but an error: it shows again where the file is done once more
            how = signal.Signals(-code).name if -code in {*signal.Signals} else f"code {code}"
            raise DataError(f"the process that looked at it ended ({how})")
        reply = msgspec.msgpack.decode(raw, type=_Reply)
        if reply.facts is None:
            raise FolderError(reply.why) if reply.fatal else DataError(reply.why)
        return reply.facts

    def _start(self) -> "subprocess.Popen[bytes] | None":
        """A process that is ready; None where there can be none, and then no more is tried."""
        if self._fails:
            return None
        boot = f"import sys; sys.path[:] = {sys.path!r}; from shrew.scan.pool import work; work()"
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is for the scan, which ends its workers
            )  # fmt: skip
        except OSError:
            self._fails = True
            return None
        if _answer(process, self._setup) is None:
            self._fails = True
            self.end()
            return None
        return process

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> int:
        """End the process, if there is one, and give its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was not sent is lost
                    stream.close()
        return process.wait()


def _answer(process: "subprocess.Popen[bytes]", message: Task | _Setup) -> bytes | None:
    """What a worker says to a message; None if it ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        _write(process.stdin, message)
        return _read(process.stdout)
    except (OSError, ValueError):
        return None


def _write(stream: IO[bytes], message: Any) -> None:
    raw = msgspec.msgpack.encode(message)
    stream.write(len(raw).to_bytes(_LENGTH, "little"))
    stream.write(raw)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    head = stream.read(_LENGTH)
    length = int.from_bytes(head, "little")
    raw = stream.read(length) if len(head) == _LENGTH else b""
    return raw if len(head) == _LENGTH and len(raw) == length else None


def work() -> None:
    """What a worker does: answer tasks until there are no more."""
    given, told = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what is told are answers, nothing else
    raw = _read(given)
    if raw is None:
        return
    setup = msgspec.msgpack.decode(raw, type=_Setup)
    rules, judge = load_rules(setup.rules), Judge(None if setup.folder is None else Path(setup.folder), 1)
    _write(told, _Reply(None))
    while (raw := _read(given)) is not None:
        task = msgspec.msgpack.decode(raw, type=Task)
        try:
            reply = _Reply(analysed(task, rules, judge))
        except DataError as error:
            reply = _Reply(None, str(error))
        except FolderError as error:
            reply = _Reply(None, str(error), fatal=True)
        _write(told, reply)
