"""The one seam between the search and the machines it runs on: `submit(function, *arguments) -> Future`.

Arguments and results are plain JSON values, and results are cached by hash in a folder that all workers see, so an
engine for a cluster needs no more than this class offers.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import psutil

from shrew import machine


class LocalExecutor:
    """Worker processes of this machine, each with its own share of the threads."""

    def __init__(self, jobs: int, threads: int) -> None:
        self._pool = ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), initializer=_start, initargs=(threads, os.getpid())
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(function, *arguments)

    def cpu_seconds(self) -> float:
        """What the workers have used so far."""
        total = 0.0
        for number in self._pool._processes or {}:
            with suppress(psutil.Error):  # a worker that has just ended
                used = psutil.Process(number).cpu_times()
                total += used.user + used.system
        return total

    def close(self, wait: bool = True) -> None:
        """Stop the workers: after their work, or at once."""
        workers = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=wait, cancel_futures=True)
        if not wait:
            for worker in workers:
                worker.terminate()


def _start(threads: int, parent: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends the workers
    machine.choose_threads(threads)

    def watch() -> None:
        # A parent that was killed cannot end its workers: they notice and go.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
