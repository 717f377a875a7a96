"""`shrew measure A B C`: what models can do and what they cost, as records, always against the first of them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from shrew import folder, machine, record, spec, tasks
from shrew.errors import DataError, UsageError
from shrew.folder import Loaded
from shrew.measure import cost, kv
from shrew.measure.detection import detection_records
from shrew.measure.forgotten import bias_records, forgotten_records, tail_records
from shrew.measure.statistics import (
    Interval,
    difference,
    exact_test,
    highest_keep,
    interval,
    lower_bound,
    paired_bootstrap,
    ratio_interval,
    retention,
    smallest_difference,
)
from shrew.record import Record
from shrew.report import forgotten
from shrew.report.view import STRUCTURE, View
from shrew.tasks import Scores, Task

__all__ = ["Interval", "cost_records", "difference", "exact_test", "forgotten_records", "highest_keep", "interval",
           "lower_bound", "main", "paired_bootstrap", "quality_records", "ratio_interval", "retention",
           "smallest_difference", "speed_records", "tail_records"]  # fmt: skip


def quality_records(
    run: str,
    model: str,
    scores: Scores,
    original: Scores | None = None,
    against: str = "original",
    alpha: float = 0.05,
    seed: int = 0,
) -> list[Record]:
    """Everything that the scores say as a whole: the metric, KL and agreement and, given the `original`'s scores,
    retention with its interval, lower bound and exact test, and the smallest difference that would show. What was lost
    where is told by `forgotten_records`. Pairs for bias are no quality: they have shares and flips and no retention."""
    unit = "bits/byte" if scores.metric == "bits_per_byte" else ""
    common: dict[str, Any] = {"run": run, "model": model, "task": f"{scores.task}/{scores.split}", "seed": seed}
    if scores.metric == "stereotype_share":
        return bias_records(scores, original, against, common)
    units = {"bits_per_byte": "documents", "auc": "pairs"}.get(scores.metric, "examples")
    detail: dict[str, Any] = {"units": units}
    if scores.higher_is_better:
        detail["chance"] = scores.chance
    if original is not None:
        name, p = exact_test(original, scores)
        gap = paired_bootstrap(original, scores, "difference", seed=seed)
        detail |= {"against": against, "difference": gap.value, "difference_low": _finite(gap.low),
                   "difference_high": _finite(gap.high), "test": name, "p": p,
                   "smallest_difference": _finite(smallest_difference(original, scores))}  # fmt: skip
    found = [_with(interval(scores, seed=seed), metric=scores.metric, unit=unit, detail=detail, **common)]
    if "truth" in scores.columns:
        as_accuracy = scores.accuracy()
        detail = {"units": units, "chance": as_accuracy.chance}
        found.append(_with(interval(as_accuracy, seed=seed), metric="accuracy", detail=detail, **common))
    if scores.metric == "auc":
        found += detection_records(scores, common)
    if original is not None:
        found.append(_retention(original, scores, against, alpha, units, common))
    if "kl_bits" in scores.columns:
        kl, same = (ratio_interval(scores, top, "tokens", seed=seed) for top in ("kl_bits", "agree"))
        found.append(_with(kl, metric="kl", unit="bits/token", detail={"units": units, "against": against}, **common))
        found.append(_with(same, metric="top1_agreement", detail={"units": units, "against": against}, **common))
    return found


def _retention(
    original: Scores, scores: Scores, against: str, alpha: float, units: str, common: dict[str, Any]
) -> Record:
    detail: dict[str, Any] = {"units": units, "against": against}
    try:
        kept = paired_bootstrap(original, scores, seed=common["seed"])
        bound = _finite(lower_bound(original, scores, alpha, seed=common["seed"]))
        provable = highest_keep(original, scores, alpha)
    except DataError as error:  # the original is no better than chance: said, and no number given
        return Record(metric="retention", value=None, detail=detail | {"reason": str(error)}, **common)
    detail |= {"lower_bound": bound, "alpha": alpha, "highest_keep": provable}
    return _with(kept, metric="retention", detail=detail, **common)


def cost_records(
    run: str, model: str, loaded: Loaded, memory: bool = True, peaks: tuple[int, int] | None = None
) -> list[Record]:
    """Bytes on disk, parameters, energy of prefill and (in a fresh process) peak memory of a loaded folder; `peaks`,
    where that was measured already."""
    found = []
    if loaded.path is not None:
        size = cost.disk_size(loaded.path)
        found.append(Record(run=run, model=model, metric="bytes", value=size.weights, unit="bytes"))
        found.append(Record(run=run, model=model, metric="folder_bytes", value=size.folder, unit="bytes"))
    total, active = cost.parameters(loaded.model)
    found.append(Record(run=run, model=model, metric="parameters", value=total))
    found.append(Record(run=run, model=model, metric="active_parameters", value=active))
    spent = cost.prefill_energy(loaded)
    unit = f"{spent.unit} per 1,000 tokens"
    found.append(Record(run=run, model=model, metric="energy", value=spent.value, unit=unit,
                        detail={"source": spent.source, "what": "prefill"}))  # fmt: skip
    if memory and loaded.path is not None:
        peak, before = peaks or cost.peak_memory(loaded.path)
        found.append(Record(run=run, model=model, metric="peak_memory", value=peak, unit="bytes",
                            detail={"before_loading": before}))  # fmt: skip
    return found


def speed_records(run: str, labels: Sequence[str], models: Sequence[Loaded], rounds: int = 7) -> list[Record]:
    """Prefill and decode speed of models alternated in one run, as ratios to the first (above 1 is faster)."""
    found = []
    for name, items in cost.speeds(models, rounds).items():
        for label, speed in zip(labels, items, strict=True):
            wall = speed.wall_ratio
            detail = {"units": "paired rounds", "against": labels[0], "wall_seconds": speed.wall,
                      "cpu_seconds": speed.cpu, "cpu_ratio": speed.cpu_ratio.value,
                      "cpu_ratio_low": _finite(speed.cpu_ratio.low),
                      "cpu_ratio_high": _finite(speed.cpu_ratio.high)}  # fmt: skip
            found.append(_with(wall, run=run, model=label, metric=f"{name}_ratio", detail=detail))
    return found


def _with(found: Interval, **fields: Any) -> Record:
    return Record(value=found.value, low=_finite(found.low), high=_finite(found.high), n=found.n, **fields)


def _finite(value: float) -> float | None:
    """JSON has no infinity: an unbounded side is left out."""
    return value if abs(value) != float("inf") and value == value else None


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    talk = Console(stderr=True, highlight=False)
    jobs: list[Task] = []
    if args.task:
        jobs += [tasks.read(path) for path in args.task]
    if args.text:
        jobs.append(tasks.read_text_task(args.text))
    cache = spec.from_flags(kv.CacheSpec, args)
    if cache.kv and not jobs:
        raise UsageError("--kv compares predictions; give --text SOURCE or --task FILE.")
    if not jobs and args.no_cost:
        raise UsageError("there is nothing to measure: give --task FILE or --text SOURCE, or leave out --no-cost.")
    for task in jobs:
        task.examples(args.split)
        talk.print(task.describe(), soft_wrap=True, markup=False)
    talk.print(machine.choose_threads().reason)
    labels = _labels(args.models)
    models = [folder.load(name) for name in args.models]
    run = f"measure {record.now()}"
    found: list[Record] = []
    shown: list[tuple[str, Loaded, str]] = []  # label, model, and the label of what it is compared with
    for label, loaded in zip(labels, models, strict=True):
        shown.append((label, loaded, "" if loaded is models[0] else labels[0]))
        if cache.kv:
            shown.append((f"{label}, {cache.label}", kv.with_rounded_cache(loaded, cache), label))
            found += kv.cache_records(run, label, shown[-1][1])
    for task in jobs:
        scored: dict[str, tuple[Scores, Loaded]] = {}
        for label, loaded, base in shown:
            talk.print(f"measuring {label} on {task.label}/{args.split}", soft_wrap=True, markup=False)
            original, before = scored.get(base, (None, None))
            scores = task.score(loaded, args.split, before)
            found += quality_records(run, label, scores, original, base, seed=args.seed)
            found += forgotten_records(run, label, task, scores, original, base, args.seed)
            if original is not None and before is not None:
                found += tail_records(run, label, task, scores, original, loaded, before, base)
            scored[label] = scores, loaded
    if not args.no_cost:
        talk.print("measuring bytes, memory and speed")
        for label, loaded in zip(labels, models, strict=True):
            found += cost_records(run, label, loaded)
        if len({loaded.is_classifier for loaded in models}) == 1:
            found += speed_records(run, labels, models)
    if args.records:
        record.append(args.records, found)
    if args.json:
        for item in found:
            print(msgspec.json.encode(item).decode())
    else:
        show(found, [label for label, _, _ in shown])
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = spec.Parser("shrew measure", description="Compare models; the first one is the baseline.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model folder, a hub name, or 'starter'")
    parser.add_argument("--task", action="append", metavar="FILE", help="a task in JSONL (may be given again)")
    parser.add_argument("--text", action="append", metavar="SOURCE",
                        help="a text file, folder or glob: bits per byte (may be given again)")  # fmt: skip
    parser.add_argument("--split", default="final", choices=[*tasks.SHARES, "all"],
                        help="the part of each task that is measured (default final)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the records, one JSON line each, and no table")
    parser.add_argument("--no-cost", action="store_true", help="quality only: no bytes, speed, memory or energy")
    parser.add_argument("--records", type=Path, metavar="FILE", help="append the records to this file")
    parser.add_argument("--seed", type=spec.seed, default=0, help="seed of the resampling (default 0)")
    spec.add_flags(parser, kv.CacheSpec)
    return parser.parse_args(argv)


def _labels(names: Sequence[str]) -> list[str]:
    """A short name for each model; names that repeat get a number."""
    short = [Path(name).name or name for name in names]
    if len(set(short)) < len(short):
        short = [name.rstrip("/") for name in names]
    return [name if short.index(name) == at else f"{name} ({at + 1})" for at, name in enumerate(short)]


def show(records: Sequence[Record], labels: Sequence[str], file: Any = None) -> None:
    """Print the table, a row for each metric and task and a column for each model, and then what was forgotten."""
    table = Table(title_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(label, justify="right", overflow="fold")
    rows = dict.fromkeys((item.task, item.metric, item.unit) for item in records if item.metric not in STRUCTURE)
    last = ""
    for key in rows:
        task, metric, unit = key
        if task != last:
            table.add_section()
            last = task
        cells = []
        for label in labels:
            found = [item for item in records if item.model == label and (item.task, item.metric, item.unit) == key]
            cells.append(_cell(found[0]) if found else "–")
        where = f"\n[dim]{' · '.join(filter(None, [task, unit if unit != 'bytes' else '']))}[/dim]"
        table.add_row(metric.replace("_", " ") + (where if where != "\n[dim][/dim]" else ""), *cells)
    console = Console(file=file or sys.stdout, highlight=False)
    console.print(table)
    if (lost := forgotten.printed(View(records))) is not None:
        console.print(lost)


def _cell(item: Record) -> str:
    if item.value is None:
        return "no quality to keep"
    if item.unit == "bytes":
        return _size(float(item.value))
    value = float(item.value)
    if item.metric in ("parameters", "active_parameters"):
        return f"{value:,.0f}"
    lines = [f"{value:.4g}"]
    if item.low is not None and item.high is not None:
        lines.append(f"[dim]{item.low:.4g} to {item.high:.4g}[/dim]")
    if item.detail.get("lower_bound") is not None:
        lines.append(f"[dim]at least {item.detail['lower_bound']:.4g} ({1 - item.detail['alpha']:.0%})[/dim]")
    if "p" in item.detail:
        if "to_stereotype" in item.detail:
            to, back = item.detail["to_stereotype"], item.detail["from_stereotype"]
            lines.append(f"[dim]{to} pairs flipped to the stereotype, {back} away[/dim]")
        lines.append(f"[dim]{item.detail['test']} test p = {item.detail['p']:.2g}[/dim]")
        if item.detail.get("smallest_difference") is not None:
            lines.append(f"[dim]could show {item.detail['smallest_difference']:.2g}[/dim]")
    return "\n".join(lines)


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
