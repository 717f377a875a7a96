"""Many clients at once against `shrew serve`: waiting times, fairness, memory, errors, and a server that is killed.

    python benchmarks/server_load.py starter --minutes 10 --clients 64 --records results/records.jsonl

Every client asks again as soon as it has its answer: prompts of 8 to 512 tokens and answers of 4 to 128, both
log-uniform, at most what the context holds; four in five streamed. One in twenty goes away without a word before its
answer is complete. Then the server is killed while eight clients wait, and started again at the same port. Exit code 1
when a client got anything but an answer, or when memory kept growing after the first fifth of the time.
"""

import argparse
import asyncio
import json
import math
import random
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from serving import Connection, RefusedError, Server, text_of

from shrew import record
from shrew.record import Record

PROMPT, ANSWER = (8, 512), (4, 128)  # tokens
STREAMED = 0.8
PATH = "/v1/completions"
SAMPLE = 1.0  # seconds between two looks at the memory
GROWTH = 0.02  # of the memory after warm-up, above which it counts as growing
BROKEN = (OSError, asyncio.IncompleteReadError)


@dataclass
class Seen:
    """What one client saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first token of streamed answers
    whole: list[float] = field(default_factory=list)  # seconds to the end
    each: list[float] = field(default_factory=list)  # seconds a token, of whole answers
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)


def drawn(low: int, high: int, draw: random.Random) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


class Load:
    def __init__(self, server: Server, text: list[int], seed: int, drop: float) -> None:
        self.server, self.text, self.seed, self.drop = server, text, seed, drop
        self.context = server.context()

    def body(self, draw: random.Random) -> dict[str, Any]:
        answer = min(drawn(*ANSWER, draw), self.context // 4)
        size = min(drawn(*PROMPT, draw), self.context - answer)
        at = draw.randrange(len(self.text) - size)
        return {"prompt": self.text[at : at + size], "max_tokens": answer, "temperature": 1.0, "ignore_eos": True,
                "seed": draw.randrange(2**32), "stream": draw.random() < STREAMED}  # fmt: skip

    async def ask(self, connection: Connection, draw: random.Random, seen: Seen, drops: bool) -> None:
        """One request; a client that drops goes after a random part of the answer."""
        body = self.body(draw)
        leave = draw.random() * 0.9
        start, count = time.monotonic(), 0
        async with aclosing(connection.post(PATH, body)) as lines:  # type: ignore[type-var]
            line = b""
            if drops and not body["stream"]:  # unless the answer is faster
                line = await asyncio.wait_for(anext(lines), timeout=leave)
            async for line in lines:
                count += 1
                if count == 1 and body["stream"]:
                    seen.first.append(time.monotonic() - start)
                if line.startswith(b'data: {"error"'):
                    raise RefusedError(200, line)
                if drops and count >= leave * body["max_tokens"]:
                    raise TimeoutError
            seen.whole.append(time.monotonic() - start)
            seen.each.append(seen.whole[-1] / body["max_tokens"])
            seen.tokens += body["max_tokens"]
            if not (line == b"data: [DONE]" if body["stream"] else b'"finish_reason":"length"' in line):
                raise RefusedError(200, b"the answer is not whole: " + line)

    async def client(self, number: int, until: float, seen: Seen) -> None:
        draw = random.Random(f"{self.seed} {number}")
        connection = Connection(self.server.port)
        while time.monotonic() < until:
            drops = draw.random() < self.drop
            try:
                await self.ask(connection, draw, seen, drops)
                seen.outcomes["answered"] += 1
            except TimeoutError:
                seen.outcomes["left"] += 1
                await connection.close()
            except RefusedError as error:
                seen.outcomes[f"refused {error}"[:200]] += 1
                await connection.close()
            except BROKEN as error:
                seen.outcomes[f"broken: {type(error).__name__}"] += 1
                await connection.close()
                await asyncio.sleep(0.1)
        await connection.close()

    async def run(self, clients: int, seconds: float) -> tuple[list[Seen], list[tuple[float, float]]]:
        """What the clients saw, and (seconds, bytes) of the server's memory."""
        begin = time.monotonic()
        seen = [Seen() for _ in range(clients)]
        jobs = [asyncio.create_task(self.client(i, begin + seconds, one)) for i, one in enumerate(seen)]
        memory = []
        while time.monotonic() < begin + seconds:
            used = await asyncio.to_thread(self.server.gauge, "process_resident_memory_bytes")
            memory.append((time.monotonic() - begin, used))
            await asyncio.sleep(SAMPLE)
        await asyncio.gather(*jobs)
        return seen, memory

    async def killed(self, flags: list[str]) -> dict[str, Any]:
        """Kill -9 while clients wait, start again at the same port: what they got, and how long it took."""
        seen = [Seen() for _ in range(8)]
        jobs = [asyncio.create_task(self.client(100 + i, math.inf, one)) for i, one in enumerate(seen)]
        await asyncio.sleep(2)
        before = sum((one.outcomes for one in seen), Counter())
        self.server.end(signal.SIGKILL)
        start = time.monotonic()
        self.server = await asyncio.to_thread(Server, sys.argv[1], *flags, port=self.server.port)
        ready = time.monotonic() - start
        for one in seen:
            one.whole.clear()
        while not all(one.whole for one in seen) and time.monotonic() < start + 60:
            await asyncio.sleep(0.01)
        again = time.monotonic() - start
        for job in jobs:
            job.cancel()
        ended = await asyncio.gather(*jobs, return_exceptions=True)
        outcomes = sum((one.outcomes for one in seen), Counter())
        outcomes.update(f"ended: {error!r}" for error in ended if not isinstance(error, asyncio.CancelledError))
        return {"served_again": sum(bool(one.whole) for one in seen), "clients": len(seen), "restart_seconds": ready,
                "all_answered_seconds": again, "before": dict(before), "outcomes": dict(outcomes)}  # fmt: skip


def growth(memory: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(bytes after warm-up, bytes at the end, share by which a straight line through the rest rises)."""
    last = memory[-1][0]
    times, used = np.array([item for item in memory if item[0] >= 0.2 * last]).T
    slope = np.polyfit(times, used, 1)[0] if len(times) > 2 else 0.0
    tenth = max(1, len(used) // 10)
    return float(used[:tenth].mean()), float(used[-tenth:].mean()), float(slope * (times[-1] - times[0]) / used.mean())


def facts(
    run: str, model: str, seen: list[Seen], memory: list[tuple[float, float]], detail: dict[str, Any]
) -> list[Record]:
    outcomes = sum((one.outcomes for one in seen), Counter())
    asked = sum(outcomes.values())
    found: list[tuple[str, float, str, dict[str, Any]]] = []
    for name, values in (("first_token", [value for one in seen for value in one.first]),
                         ("whole_answer", [value for one in seen for value in one.whole]),
                         ("token", [value for one in seen for value in one.each])):  # fmt: skip
        found += [(f"{name}_p{q}", float(np.percentile(values, q)), "s", {"count": len(values)}) for q in (50, 95, 99)]
    shares = [one.tokens for one in seen]
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    warm, end, rise = growth(memory)
    found += [
        ("fairness_jain", jain, "", {"least": min(shares), "median": statistics.median(shares), "most": max(shares)}),
        ("tokens_per_second", sum(shares) / detail["seconds"], "token/s", {}),
        ("requests", asked, "", {"outcomes": dict(outcomes)}),
        ("errors", asked - outcomes["answered"] - outcomes["left"], "", {}),
        ("memory_growth", rise, "", {"warm": warm, "end": end, "peak": max(used for _, used in memory),
                                     "curve": [list(map(round, point)) for point in memory[:: len(memory) // 40 + 1]]}),
    ]
    return [Record(run=run, model=model, metric=name, value=value, unit=unit, task="server load", n=len(seen),
                   detail={**detail, **more}) for name, value, unit, more in found]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `shrew serve` takes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--drop", type=float, default=0.05, help="share of requests whose client goes away")
    parser.add_argument("--text", default="", help="folder of text to take prompts from (default: Python's modules)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args()
    flags = ["--slots", str(args.slots), "--queue", str(2 * args.clients)]
    with Server(args.model, *flags) as server:
        load = Load(server, server.tokens(text_of(args.text)[:2_000_000]), args.seed, args.drop)
        seen, memory = asyncio.run(load.run(args.clients, args.minutes * 60))
        left = {name: server.gauge(f"shrew_engine_{name}") for name in ("running", "waiting")}
        killed = asyncio.run(load.killed(flags))
        code = load.server.end(signal.SIGTERM)
    detail = {"clients": args.clients, "slots": args.slots, "seconds": args.minutes * 60, "drop": args.drop}
    found = facts("server-load", server.name, seen, memory, detail)
    found.append(Record(run="server-load", model=server.name, metric="killed_and_back", unit="s", task="server load",
                        value=killed["restart_seconds"], detail=killed))  # fmt: skip
    table = Table("metric", "value", "unit", "more")
    for one in found:
        more = {key: value for key, value in one.detail.items() if key not in detail}
        table.add_row(one.metric, f"{one.value:,.4g}", one.unit, json.dumps(more))
    Console(width=200).print(table)
    if args.records:
        record.append(args.records, found)
    values = {one.metric: float(one.value or 0) for one in found}
    faults = [name for name, is_bad in (
        ("a client got an error", values["errors"] > 0),
        ("memory grew", values["memory_growth"] > GROWTH),
        ("sequences were left in the engine", any(left.values())),
        ("not everyone was served after the restart", killed["served_again"] < killed["clients"]),
        ("a signal did not end it well", code != 0),
    ) if is_bad]  # fmt: skip
    print("; ".join(faults) or "no fault found", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
