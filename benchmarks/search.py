"""The search against a fixed grid of 60 cells on the starter: size at the floor, and CPU-seconds.

    python benchmarks/search.py --records results/records.jsonl

Grid: bits {3, 4, 5, 6, 8} x layers dropped {0, 1} x MLP width {1, 0.75, 0.5} x group {32, 128}, each cell healed as
the search heals its finalists. Both choose on the search split by the same rule and are judged by the same gate
on the final split. Each has a cache of its own, so that neither profits from the other's work.
"""

import argparse
import itertools
import json
import os
import tempfile
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from shrew import record
from shrew.moves import Source
from shrew.record import Record
from shrew.search import ShrinkSpec
from shrew.search.run import Run

BITS, DROPPED, WIDTHS, GROUPS = (3, 4, 5, 6, 8), (0, 1), (1.0, 0.75, 0.5), (32, 128)


def cells(heal: dict[str, Any] | None) -> list[list[dict[str, Any]]]:
    found = []
    for bits, dropped, width, group in itertools.product(BITS, DROPPED, WIDTHS, GROUPS):
        moves: list[dict[str, Any]] = [{"name": "drop-layers", "count": dropped}] if dropped else []
        moves += [{"name": "narrow", "mlp": width}] if width < 1 else []
        moves += [{"name": "quantize", "bits": bits, "group": group, "embeddings": True}]
        found.append(moves + ([heal] if heal else []))
    return found


class Grid(Run):
    """A run whose candidates are the cells of the grid."""

    def close_in(self, live: Any) -> None:
        moves = cells(self.heal(self.wanted.heal))
        futures = {self.start(item): item for item in moves}
        for future in as_completed(futures):
            self.finish(future, futures[future], None, True)
        self.say(f"{len(moves)} cells done.")

    def families(self) -> list[Any]:
        return []  # a grid needs no profile

    def rank(self, families: Any) -> list[Any]:
        return []


def run(kind: type[Run], args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The chosen model's bytes and bound, and all CPU-seconds, of a search or a grid with a fresh cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SHREW_CACHE"] = cache
        wanted = ShrinkSpec(keep=args.keep, heal=args.heal, minutes=600)
        made = kind(Source(model=args.model), wanted, wanted.goals(), out, "benchmarks/search.py", print)
        records, missed = made.all()
    values = {(item.model, item.metric, item.task.rpartition("/")[2]): item for item in records}
    verdict = next(item for item in records if item.metric == "verdict")
    chosen = values.get(("chosen", "bytes", ""))
    kept = values.get(("chosen", "retention", "final"))
    return {
        "bytes": chosen.value if chosen else None, "missed": missed, "cpu_seconds": verdict.detail["cpu_seconds"],
        "wall_seconds": verdict.detail["wall_seconds"], "lower_bound": kept.detail["lower_bound"] if kept else None,
        "trials": sum(item.metric == "trial" for item in records),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--keep", type=float, default=0.98)
    parser.add_argument("--heal", type=int, default=24)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(kind, args, Path(folder) / name) for name, kind in (("search", Run), ("grid", Grid))}
    search, grid = results["search"], results["grid"]
    share = search["cpu_seconds"] / grid["cpu_seconds"]
    print(json.dumps({**results, "share_of_cpu_seconds": share}, indent=1))
    if args.records:
        common = {"run": "benchmark-search", "seed": 0}
        record.append(args.records, [
            *(Record(**common, model=name, metric="smallest_bytes", value=found["bytes"], unit="bytes", detail=found)
              for name, found in results.items()),
            Record(**common, model="search", metric="share_of_the_grids_cpu_seconds", value=share),
        ])  # fmt: skip


if __name__ == "__main__":
    main()
