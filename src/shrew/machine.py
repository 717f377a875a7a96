"""What this machine is best at, found by trying: threads, precision, matrix-multiply rate; and one seed for everything.

The right number of threads cannot be looked up: on a shared machine two threads have run forty times slower than one,
and a processor with bf16 instructions but no matrix unit is faster in fp32. So both are measured once and kept a day.
"""

import ctypes
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrew import files
from shrew.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

DAY = 24 * 3600
ROUNDS = 3
ROUND_SECONDS = 0.1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
MOST_THREADS = 1024
RAPL = Path("/sys/class/powercap")
MADV_COLLAPSE, LARGE_PAGE = 25, 2 << 20  # of Linux


@dataclass(frozen=True)
class Threads:
    """How many threads torch uses, and why."""

    count: int
    reason: str


@dataclass(frozen=True)
class Precision:
    """The name of the arithmetic for matrix products in training, 'fp32' or 'bf16' (autocast), and why."""

    name: str
    reason: str


def choose_threads(requested: int | None = None) -> Threads:
    """Set torch's thread count: as requested, as OMP_NUM_THREADS says, or the faster of one and all cores.

    Raises UsageError when `requested` is below 1.
    """
    import torch

    if requested is not None:
        if not 1 <= requested <= MOST_THREADS:
            raise UsageError(f"{requested} threads cannot work; ask for 1 to {MOST_THREADS}.")
        chosen = Threads(requested, f"{_threads(requested)}, as asked")
    elif os.environ.get("OMP_NUM_THREADS"):
        count = torch.get_num_threads()
        chosen = Threads(count, f"{_threads(count)}, as OMP_NUM_THREADS says")
    elif (cores := usable_cores()) == 1:
        chosen = Threads(1, "1 thread: one core is all there is")
    else:
        one, many = _remember(f"threads {cores}", lambda: _step_times([1, cores]))
        count, ratio = (cores, one / many) if many < one else (1, many / one)
        other = 1 if count == cores else cores
        chosen = Threads(count, f"{_threads(count)}: {ratio:.1f} times as fast as {other}")
    torch.set_num_threads(chosen.count)
    return chosen


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def usable_cores() -> int:
    """Physical cores that this process may use: the least of what the machine, the affinity and the container allow."""
    limits = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    with suppress(ImportError):
        import psutil

        limits.append(psutil.cpu_count(logical=False) or limits[0])
    with suppress(OSError, ValueError):  # a container's share of the processor; "max" is no number
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limits.append(max(1, int(quota) // int(period)))
    return min(limits)


def free_memory() -> float:
    """Bytes that this machine could still give, at most what this container may have; infinite where nobody says."""
    found = [float("inf")]
    with suppress(ImportError):
        import psutil

        found.append(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # "max" is no number
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


def _step_times(counts: list[int]) -> list[float]:
    """Seconds per step of a small training-like workload at each thread count, the best of interleaved rounds.

    A round is averaged over its steps, so that threads that keep waiting for each other show; the best round is taken,
    so that one burst of someone else's work does not decide.
    """
    import torch
    from torch.nn.functional import cross_entropy, gelu, layer_norm

    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(256, 256, generator=draw)
    targets = torch.randint(256, (256,), generator=draw)
    shapes = [(256, 1024), (1024, 256)]
    wide, back = (torch.randn(shape, generator=draw).mul_(0.02).requires_grad_() for shape in shapes)

    def step() -> None:
        hidden = layer_norm(tokens, (256,))
        for _ in range(4):
            hidden = layer_norm(hidden + gelu(hidden @ wide) @ back, (256,))
        cross_entropy(hidden, targets).backward()
        wide.grad = back.grad = None

    before = torch.get_num_threads()
    best = dict.fromkeys(counts, float("inf"))
    try:
        for _ in range(ROUNDS):
            for count in counts:
                torch.set_num_threads(count)
                step()
                best[count] = min(best[count], _seconds_each(step))
    finally:
        torch.set_num_threads(before)
    return [best[count] for count in counts]


def _seconds_each(work: Callable[[], Any]) -> float:
    """Mean seconds of one call, over calls for about ROUND_SECONDS."""
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < ROUND_SECONDS:
        work()
        calls += 1
    return spent / calls


def matmul_rate(dtype: "torch.dtype", size: int = 1024) -> float:
    """FLOP/s of a square matrix product on this processor at torch's present thread count, the best of three rounds."""
    import torch

    left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    torch.mm(left, right)
    return 2 * size**3 / min(_seconds_each(lambda: torch.mm(left, right)) for _ in range(ROUNDS))


def choose_precision(requested: str = "auto") -> Precision:
    """'fp32' or 'bf16' as requested; 'auto' takes the one whose matrix products are faster here (bf16 on a GPU).

    Raises UsageError for any other word.
    """
    import torch

    known = ("auto", "fp32", "bf16")
    if requested not in known:
        raise UsageError(f"unknown precision '{requested}'; {nearest(requested, known)}")
    if requested != "auto":
        return Precision(requested, f"{requested}, as asked")
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return Precision("bf16", "bf16: the GPU has it")
        return Precision("fp32", "fp32: this GPU has no bf16")
    rates = _remember(
        f"matmul {torch.get_num_threads()}", lambda: [matmul_rate(torch.float32), matmul_rate(torch.bfloat16)]
    )
    name, other = ("bf16", "fp32") if rates[1] > rates[0] else ("fp32", "bf16")
    return Precision(name, f"{name}: {max(rates) / 1e9:.0f} GFLOP/s against {min(rates) / 1e9:.0f} in {other}")


def _remember(what: str, measure: Callable[[], list[float]]) -> list[float]:
    import torch

    return remember(f"{what}, torch {torch.__version__}", measure)


def remember(what: str, measure: Callable[[], list[float]]) -> list[float]:
    """A measurement of this machine that is at most a day old, else a new one."""
    key = f"{what}, {platform.node()}, {processor()}"
    path = files.cache_folder() / "machine.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        read = json.loads(path.read_text("utf-8"))
        known = {name: item for name, item in read.items() if 0 <= time.time() - item["time"] < DAY}
    if key not in known:
        known[key] = {"time": time.time(), "values": measure()}
        with suppress(OSError):  # without a cache it is only measured again
            files.write_text(path, json.dumps(known, indent=1))
    values: list[float] = known[key]["values"]
    return values


@cache
def processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Joules:
    """What the processor packages use, by their own counters (RAPL): everything that runs on the machine counts."""

    def __init__(self, root: Path = RAPL) -> None:
        self.limits: dict[Path, int] = {}  # readable package counters, not their parts: where each wraps, microjoules
        for folder in sorted(root.glob("*-rapl:*")) if root.is_dir() else []:
            if folder.name.count(":") == 1:
                with suppress(OSError, ValueError):
                    int((folder / "energy_uj").read_text())
                    self.limits[folder / "energy_uj"] = int((folder / "max_energy_range_uj").read_text())
        self._before = self._read()

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path in self.limits]

    def spent(self) -> float | None:
        """Joules since this was last asked, or since the start; None where no counter can be read."""
        if not self.limits:
            return None
        try:
            before, self._before = self._before, self._read()
        except (OSError, ValueError):  # it may be taken away meanwhile
            return None
        parts = zip(before, self._before, self.limits.values(), strict=True)
        return sum((now - then) % (limit + 1) for then, now, limit in parts) / 1e6


def keep_memory() -> None:
    """Let this process reuse the memory of large tensors instead of giving it back to the system each time.

    glibc maps every block above 32 MB anew, and the system fills its pages with zeros at first touch: a sixth of the
    time of a training step on 32,768 tokens. Peak memory rises by up to a fifth. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - an AttributeError where it is not glibc
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give the system back what is free between blocks in use, which glibc keeps: where small things that stay are made
    among large ones that go, that grows to a multiple of what stays. Does nothing with another C library."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def large_pages() -> Iterator[None]:
    """Memory that is mapped inside the block and still there at its end then stands in large pages, where Linux (6.1 or
    later) has some to give; where not, nothing happens. For what is read over and over and fits no cache: the weights
    of a small model were read 7 to 10 % faster."""
    before = _mapped()
    yield
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for start, end in _mapped() - before:
            start, end = start + -start % LARGE_PAGE, end - end % LARGE_PAGE
            if start < end:
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE)


def _mapped() -> set[tuple[int, int]]:
    """Start and end of what this process has mapped to write to, files aside; empty where nobody says."""
    found = set()
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            place, rights, _, _, _, *name = line.split(maxsplit=5)
            if rights == "rw-p" and (not name or name[0] == "[heap]"):
                start, _, end = place.partition("-")
                found.add((int(start, 16), int(end, 16)))
    return found


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
