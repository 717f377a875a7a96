"""Counters, gauges and histograms in Prometheus' text format (0.0.4), without its client."""

import os
import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HELP = {
    "shrew_requests_total": ("counter", "Requests answered, by path and status."),
    "shrew_request_seconds": ("histogram", "Seconds from a request's head to the end of its answer."),
    "shrew_first_token_seconds": ("histogram", "Seconds from a request to its first token."),
    "shrew_prompt_tokens_total": ("counter", "Tokens of prompts."),
    "shrew_cached_tokens_total": ("counter", "Tokens of prompts that an earlier request had computed."),
    "shrew_completion_tokens_total": ("counter", "Tokens written."),
    "shrew_cpu_seconds_total": ("counter", "Processor seconds of answers."),
    "shrew_requests_running": ("gauge", "Requests being answered or waiting."),
    "process_cpu_seconds_total": ("counter", "Processor seconds of the process."),
    "process_resident_memory_bytes": ("gauge", "Memory of the process."),
    "process_open_fds": ("gauge", "Open files and sockets of the process."),
    "process_start_time_seconds": ("gauge", "When the process began to serve, in Unix time."),
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Written and read by the event loop only."""

    def __init__(self) -> None:
        self.started = time.time()
        self.values: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self.buckets: dict[str, dict[Labels, list[int]]] = defaultdict(dict)

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        self.values[name][tuple(labels.items())] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = tuple(labels.items())
        buckets = self.buckets[name].setdefault(key, [0] * (len(SECONDS) + 1))
        buckets[bisect_left(SECONDS, value)] += 1
        self.values[name][key] += value

    def text(self, gauges: Iterable[tuple[str, Mapping[str, str], float]]) -> str:
        """Everything counted, and what is only known now: (name, labels, value)."""
        lines: dict[str, list[str]] = defaultdict(list)
        for name, found in self.values.items():
            for key, value in found.items():
                if name in self.buckets:
                    lines[name] += _histogram(name, key, self.buckets[name][key], value)
                else:
                    lines[name].append(f"{name}{_labels(key)} {value:.10g}")
        for name, labels, value in [*gauges, *_process(self.started)]:
            lines[name].append(f"{name}{_labels(tuple(labels.items()))} {value:.10g}")
        out = []
        for name, found_lines in lines.items():
            kind, words = HELP.get(name, ("counter" if name.endswith("_total") else "gauge", ""))
            out += [f"# HELP {name} {words}"] if words else []
            out += [f"# TYPE {name} {kind}", *found_lines]
        return "\n".join(out) + "\n"


def metric_name(words: str) -> str:
    """A name that Prometheus takes."""
    return re.sub(r"[^a-zA-Z0-9_:]", "_", words)


def _labels(key: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{name}="{quoted(value)}"' for name, value in key) + "}" if key else ""


def _histogram(name: str, key: Labels, counts: list[int], total: float) -> list[str]:
    lines, seen = [], 0
    for edge, count in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
        seen += count
        lines.append(f"{name}_bucket{_labels((*key, ('le', edge)))} {seen}")
    return [*lines, f"{name}_sum{_labels(key)} {total:.10g}", f"{name}_count{_labels(key)} {seen}"]


def _process(started: float) -> Iterable[tuple[str, Mapping[str, str], float]]:
    times = os.times()
    yield "process_cpu_seconds_total", {}, times.user + times.system
    yield "process_start_time_seconds", {}, started
    with suppress(OSError, ValueError, IndexError):  # only Linux has these
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield "process_resident_memory_bytes", {}, pages * os.sysconf("SC_PAGE_SIZE")
        yield "process_open_fds", {}, len(os.listdir("/proc/self/fd"))  # noqa: PTH208
