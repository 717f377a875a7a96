"""Seconds and peak memory of each method of compression, ours and the peers', in turns.

    python benchmarks/costs.py --venvs .venv/peers --records results/records.jsonl

Each round has every method compress the same bf16 model with the same calibration rows, in a process of its own, the
next round in the other order. Seconds are from the loaded model to the files (llama.cpp's importance matrix included,
which is collected anew in each round); memory is the peak of the whole process, and what it held when the model was
loaded. Rounds that are done stay in WORK. Three rounds take about 25 minutes of one core;
beside ours over each peer's stand the least and the most of them, from six rounds on a 95 % interval.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from compression import Reference, common, digest, interpreter, prepare, run, weigh
from curves import tell
from peers.table import ARMS, COSTS, OURS, Arm
from runtime import ratio

from shrew import files
from shrew.record import Record

OWN = "Shrew int4 g64"  # held against each peer


def once(reference: Reference, arm: Arm, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one round of one method took, or {"cannot"}; from WORK if it is there."""
    kept = reference.place / "costs" / f"{digest(reference, arm)}-{number}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        return found
    python = interpreter(arm.peer, args.venvs)
    if not python.exists():
        return {"cannot": f"there is no {python}; compression.py --install makes it"}
    if arm.peer == "llama.cpp":
        (reference.place / "importance.json").unlink(missing_ok=True)
        weigh(reference)
    place = kept.with_suffix("")
    shutil.rmtree(place, ignore_errors=True)
    found = run(reference, arm.peer, arm.settings, place, python, args) | {"load": os.getloadavg()[0]}
    shutil.rmtree(place)
    files.write_text(kept, json.dumps(found))
    return found


def facts(reference: Reference, arms: list[Arm], rounds: dict[str, list[dict[str, Any]]]) -> list[Record]:
    """Medians of each method, and ours over each peer's by rounds."""
    records, made = [], {}
    for arm in arms:
        seen = rounds[arm.name]
        base: dict[str, Any] = {"run": "compression-costs", "model": f"{reference.name}, {arm.name}", "seed": 0}
        if failed := [item["cannot"] for item in seen if "cannot" in item]:
            records.append(Record(**base, metric="cannot", value=failed[0], detail={"peer": arm.peer}))
            continue
        made[arm.name] = [item["cpu_seconds"] for item in seen]
        detail = {"peer": arm.peer, "settings": arm.settings, "rounds": seen} | {
            name: statistics.median(item[name] for item in seen)
            for name in ("seconds", "cpu_seconds", "peak_bytes", "loaded_bytes")}  # fmt: skip
        records.append(Record(**base, metric="cpu_seconds", value=detail["cpu_seconds"], unit="s", n=len(seen),
                              detail=detail))  # fmt: skip
    for arm in arms:
        if arm.peer != OURS and arm.name in made and OWN in made:
            value, low, high, ends = ratio(made[OWN], made[arm.name])
            records.append(Record(run="compression-costs", model=f"{reference.name}, {OWN}", metric="cpu_over_peer",
                                  value=value, low=low, high=high, n=len(made[OWN]), seed=0,
                                  detail={"peer": arm.name} | ends))  # fmt: skip
    return records


def table(records: list[Record]) -> str:
    """Markdown, the quickest method first."""
    over = {item.detail["peer"]: f"{item.value:.2f} ({item.low:.2f} to {item.high:.2f})" for item in records
            if item.metric == "cpu_over_peer"}  # fmt: skip
    lines = [f"| method | CPU-seconds | seconds | peak MiB | of which before | {OWN}'s CPU-seconds over it |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    timed = [item for item in records if item.metric == "cpu_seconds"]
    for item in sorted(timed, key=lambda item: float(item.value or 0)):
        seen, name = item.detail, item.model.partition(", ")[2]
        lines.append(f"| {name} | {item.value:.1f} | {seen['seconds']:.1f} | {seen['peak_bytes'] / 2**20:.0f} | "
                     f"{seen['loaded_bytes'] / 2**20:.0f} | {over.get(name, '')} |")  # fmt: skip
    lines += [f"| {item.model.partition(', ')[2]} | {str(item.value).replace('|', '/')} | | | | |" for item in records
              if item.metric == "cannot"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods whose name holds this alone")
    parser.add_argument("--show", type=Path, help="make nothing: print the table of these records")
    args = parser.parse_args()
    return tell(args, "compression-costs", table, lambda: timed(args))


def timed(args: argparse.Namespace) -> list[Record]:
    """Every method in turns."""
    torch.set_num_threads(args.threads)
    reference = prepare(args.model, args)
    known = {arm.name: arm for arm in ARMS}
    arms = [known[name] for name in COSTS if args.only in name]
    rounds: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    done, total, expected = 0, args.rounds * len(arms), sum(arm.seconds for arm in arms) * args.rounds
    for number in range(args.rounds):
        for arm in arms if number % 2 else arms[::-1]:
            rounds[arm.name].append(found := once(reference, arm, number, args))
            done, expected = done + 1, expected - arm.seconds
            told = found.get("cannot") or f"{found['cpu_seconds']:.1f} CPU-s, {found['peak_bytes'] / 2**20:.0f} MiB"
            print(f"{done} of {total}: {arm.name}: {told}; about {expected / 60:.0f} minutes left", file=sys.stderr,
                  flush=True)  # fmt: skip
    return facts(reference, arms, rounds)


if __name__ == "__main__":
    sys.exit(main())
