"""A contest of architectures at equal training FLOPs and, from the same runs, at equal CPU time.

    python benchmarks/contest.py RUNS --text FOLDER --records RECORDS.jsonl --plot docs/contest.svg

FOLDER holds train/ and valid/, the latter of authors that the former does not have. An arm is the [model] table of a
recipe, with changes: `--arm NAME RECIPE [KEY=VALUE ...]`, the first being the one that the others are compared with.
Everything else is the same for all: tokenizer, data and their order, batch, length, optimizer, schedule, one thread.

1. The learning rate of each arm is the best of the same list at the smallest budget, seed 0, on excerpts of the
   held-out books that are not used again. If an arm's best is at an end of the list, it grows there by one, for all.
2. One trunk (warm-up, then a level rate) an arm and seed; at four fifths of each budget a copy of it decays to zero.
3. Every end of a branch is scored in bits per byte on other excerpts of the held-out books, as it was saved (bf16).
4. The same scores are read again at equal CPU time: between an arm's budgets, on log-log axes, never beyond them.

It can be killed at any time; the same command goes on, with `--kept FILE` also in an empty folder, without the branches
whose results that small file has. `--plan` says what there is to do, and does nothing.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import statistics as middle
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import panels
from branches import beyond, branch, excerpt, level_of, newest, steps_of, work_of
from fits import Noise, at, mean
from transformers import AutoTokenizer

from shrew import data, files, folder, record, spec, tasks
from shrew.blocks.model import ModelSpec, build
from shrew.data.tokenizer import train_tokenizer
from shrew.measure import Interval, cost, interval, paired_bootstrap
from shrew.record import Record
from shrew.tasks import Scores
from shrew.train import flops_per_token

ARMS = (["dense", "recipes/contest/dense-1m.toml"], ["moe", "recipes/contest/moe-1m.toml"],
        ["hybrid", "recipes/contest/hybrid-1m.toml"],
        ["conv-hybrid", "recipes/contest/conv-hybrid-1m.toml"],
        ["dense+ngrams", "recipes/contest/dense-1m.toml", "ngrams.rows=8192"])  # fmt: skip
SHARED: dict[str, Any] = {"weight_decay": 0.1, "validation": 0.0, "precision": "fp32", "threads": 1,
                          "checkpoint_every": 100}  # fmt: skip
GROWTH = 2  # by how many rates the list may grow
RATE = 30e9  # training FLOPs a CPU-second, to plan with where an arm was not timed yet
COUNTED = ("three times the forward pass: matrix products and attention of every token, head included; not look-ups of "
           "embeddings, norms, activations, nor the optimizer (Muon multiplies too: CPU time has it)")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A model table, its training FLOPs a token, its parameters and those that a token uses."""

    name: str
    model: dict[str, Any]
    flops: int
    parameters: int
    active: int


def read_arm(words: Sequence[str], length: int, vocabulary: int) -> Arm:
    """The arm that NAME RECIPE [KEY=VALUE ...] says: a value is TOML, a key is a dotted path into [model]."""
    name, path, *changes = words
    model = spec.read_toml(Path(path)).get("model", {})
    for change in changes:
        key, _, value = change.partition("=")
        table, *rest = key.split(".")[::-1]
        inner = model
        for part in reversed(rest):
            inner = inner.setdefault(part, {})
        inner[table] = tomllib.loads(f"value = {value}")["value"]
    model |= {"context": length, "vocabulary": vocabulary}
    made = build(spec.parse(ModelSpec, model, f"{name}: [model]"))
    idle = sum(layer.ffn.idle() for layer in made.model.layers)
    total = sum(p.numel() for p in made.parameters())
    return Arm(name, model, flops_per_token(made, length), total, total - idle)


class Stopped(Exception):
    """The contest was told to end."""


class Contest:
    """The runs under one folder: RUNS/ARM-DIGEST/RATE-SEED/ has a trunk, its branches, and one BUDGET.json each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.runs = args, args.runs.resolve()
        self.budgets, self.rates = sorted(args.budgets), sorted(args.rates)
        self.table = SHARED | {name: getattr(args, name) for name in ("length", "optimizer", "warmup")}
        self.table |= {"batch_tokens": args.batch_tokens, "tokenizer": str(self.runs / "tokenizer")}
        self.table["data"] = [str((args.text if args.valid else args.text / "train").resolve())]
        self.arms = [read_arm(words, args.length, args.vocabulary) for words in args.arm or ARMS]
        if len({arm.name for arm in self.arms}) < len(self.arms):
            raise SystemExit("two arms have the same name")
        for arm in self.arms:
            if level_of(steps_of(self.budgets[0], arm.flops, args.batch_tokens)) < args.warmup:
                raise SystemExit(f"{arm.name}: {self.budgets[0]:g} FLOPs end before the warm-up does.")
        self.lock, self.children, self.stopped = threading.Lock(), set[Any](), False
        self.began, self.spent = time.monotonic(), 0.0

    # --- places and plans --------------------------------------------------------------------------------------------

    def place(self, arm: Arm, rate: float, seed: int) -> Path:
        shared = {key: value for key, value in self.table.items() if key not in ("tokenizer", "data")}
        mark = spec.digest([arm.model, shared])[:8]
        return self.runs / f"{arm.name}-{mark}" / f"{rate:g}-{seed}"

    def result(self, arm: Arm, rate: float, seed: int, budget: float) -> dict[str, Any]:
        """What a branch gave; empty while it has not."""
        path = self.place(arm, rate, seed) / f"{budget:g}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def have(self, arm: Arm, rate: float, seed: int) -> list[float]:
        return [budget for budget in self.budgets if self.result(arm, rate, seed, budget)]

    def lines(self, best: dict[str, float] | None = None) -> list[tuple[Arm, float, int, list[float]]]:
        """Every trunk that is wanted: arm, rate, seed and budgets. Arms alternate, so that what else the machine does
        meanwhile befalls all of them."""
        if best is None:
            return [(arm, rate, 0, self.budgets[:1]) for rate in self.rates for arm in self.arms]
        return [(arm, best[arm.name], seed, self.budgets) for seed in range(self.args.seeds) for arm in self.arms]

    def remaining(self) -> float:
        """FLOPs still to do, as far as is known."""
        best = {arm.name: self.best(arm) or self.rates[0] for arm in self.arms}
        wanted = {(arm.name, rate, seed): work_of(budgets, self.have(arm, rate, seed))
                  for arm, rate, seed, budgets in [*self.lines(), *self.lines(best)]}  # fmt: skip
        return sum(wanted.values())

    def step_seconds(self, arm: Arm) -> float:
        """Typical CPU-seconds of a step: the median of the medians of the arm's runs; a busy hour moves it little."""
        found = [json.loads(path.read_text()).get("step_seconds")
                 for path in self.place(arm, 0, 0).parent.glob("*/*.json")]  # fmt: skip
        return middle.median([each for each in found if each] or [arm.flops * self.args.batch_tokens / RATE])

    def plan(self) -> str:
        """A table of what will be run and what it costs, with what is known of the arms' speed by now."""
        rows = ["| arm | parameters | active | FLOPs a token | steps | FLOPs | CPU-hours |", "|---|" + "---|" * 6]
        total = 0.0
        for arm in self.arms:
            tuning = work_of(self.budgets[:1])
            work = len(self.rates) * tuning + self.args.seeds * work_of(self.budgets) - tuning
            hours = work / (arm.flops * self.args.batch_tokens) * self.step_seconds(arm) / 3600
            total += hours
            steps = " / ".join(str(steps_of(budget, arm.flops, self.args.batch_tokens)) for budget in self.budgets)
            rows.append(f"| {arm.name} | {arm.parameters:,} | {arm.active:,} | {arm.flops:,} | {steps} | {work:.3g} | "
                        f"{hours:.2f} |")  # fmt: skip
        return "\n".join(rows) + (
            f"\n{total:.1f} CPU-hours in all, {total / self.args.jobs:.1f} hours with {self.args.jobs} jobs, "
            f"without scoring (about a minute a branch); {self.remaining():.3g} FLOPs of it are still to do. A rate "
            f"more for all arms: {len(self.arms) * work_of(self.budgets[:1]):.3g} FLOPs."
        )

    # --- doing -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The tokenizer, the held-out excerpts, and the token stream that all runs read."""
        self.runs.mkdir(parents=True, exist_ok=True)
        documents = data.documents(self.table["data"])
        place = Path(self.table["tokenizer"])
        if not (place / "tokenizer.json").exists():
            with files.new_folder(place, "tokenizer.json") as temporary:
                train_tokenizer(documents, self.args.vocabulary, 0).save_pretrained(temporary)
        held = data.documents([str(self.args.valid or self.args.text / "valid")])
        if len(held) < 2:
            raise SystemExit("an interval needs at least two held-out documents")
        count = self.args.characters // len(held)
        parts = {"search": [excerpt(item, 0.1, count // 2) for item in held],
                 "final": [excerpt(item, 0.5, count) for item in held]}  # fmt: skip
        plain = {split: [[item.id, item.text] for item in part] for split, part in parts.items()}
        facts = {"held": plain, "train": spec.digest([item.text for item in documents])}
        if (self.runs / "held.json").exists() and json.loads((self.runs / "held.json").read_text()) != facts:
            raise SystemExit(f"{self.runs} was begun with other text or excerpts; give another folder")
        files.write_text(self.runs / "held.json", json.dumps(facts))
        if self.args.kept:
            self.restore()
        stream = data.tokenize(documents, AutoTokenizer.from_pretrained(place), files.cache_folder())
        scored = sum(len(text) for _, text in plain["final"])
        say(f"{len(stream.tokens):,} tokens, {stream.text_bytes / len(stream.tokens):.2f} bytes each; "
            f"{len(held)} books held out, {scored:,} characters of them scored.")  # fmt: skip

    def mark(self) -> str:
        """What text the results are of."""
        return spec.digest(json.loads((self.runs / "held.json").read_text()))

    def restore(self) -> None:
        """Take up the results of branches that were kept, and keep those that are here."""
        kept, mark = self.args.kept, self.mark()
        for line in kept.read_text().splitlines() if kept.exists() else ():
            item = json.loads(line)
            if item["mark"] != mark:
                raise SystemExit(f"{kept} is of other text or excerpts; give another file")
            path = self.runs / item["place"]
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_text(path, json.dumps(item["result"]))
        self.keep()

    def keep(self) -> None:
        mark, found = self.mark(), sorted(self.runs.glob("*/*/[0-9]*.json"))
        items = [{"mark": mark, "place": str(path.relative_to(self.runs)), "result": json.loads(path.read_text())}
                 for path in found]  # fmt: skip
        files.write_text(self.args.kept, "".join(f"{json.dumps(item)}\n" for item in items))

    def call(self, command: Sequence[str], place: Path, lock: int) -> tuple[int, str]:
        """Run a program with one thread; its exit code and last words. The lock is passed on, so that a program which
        outlives this one still holds it."""
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        log = place / "log.txt"
        with log.open("a") as told:
            with self.lock:
                if self.stopped:
                    raise Stopped
                child = subprocess.Popen(command, cwd=place, stdout=told, stderr=told, pass_fds=[lock],
                                         env={**os.environ, **threads})  # fmt: skip
                self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if self.stopped:
            raise Stopped
        return code, log.read_text().rstrip().rpartition("\n")[2]

    def line(self, arm: Arm, rate: float, seed: int, budgets: Sequence[float]) -> None:
        """One trunk as far as the largest of these budgets needs it, and the branches that are not done."""
        place = self.place(arm, rate, seed)
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for budget in budgets:
                done = self.have(arm, rate, seed)
                if budget not in done:
                    result = self.branch(arm, rate, seed, budget, lock.fileno())
                    files.write_text(place / f"{budget:g}.json", json.dumps(result))
                    if run := newest(place, f"{budget:g}"):
                        shutil.rmtree(run / "checkpoint")  # the trunk's is what goes on
                    if self.args.kept:
                        with self.lock:
                            self.keep()
                    work = work_of([budget], [each for each in done if each < budget])
                    self.tell(arm, rate, seed, budget, result, work)

    def branch(self, arm: Arm, rate: float, seed: int, budget: float, lock: int) -> dict[str, Any]:
        """Train to one budget off the trunk, and score what comes out."""
        place, name = self.place(arm, rate, seed), f"{budget:g}"
        steps = steps_of(budget, arm.flops, self.args.batch_tokens)
        recipe = {"train": self.table | {"lr": rate, "seed": seed}, "model": arm.model}

        def train(out: str) -> str:
            command = [sys.executable, "-m", "shrew", "train", f"{out}.toml"]
            code, words = self.call(command, place, lock)
            if code and "the loss is" in words:
                return words
            if code:
                raise SystemExit(f"{place / 'log.txt'}: exit code {code}: {words}")
            return ""

        if words := branch(place, recipe, name, steps, train):
            return {"diverged": words}
        this, held = str(Path(__file__).resolve()), str(self.runs / "held.json")
        code, words = self.call([sys.executable, this, "score", name, held, "scores.json"], place, lock)
        if code:
            raise SystemExit(f"{place / 'log.txt'}: exit code {code}: {words}")
        log = (newest(place, name) / "log.jsonl").read_text()
        seconds = [json.loads(line)["cpu_seconds"] for line in log.splitlines()]
        each = middle.median(np.diff(seconds).tolist() or seconds)
        tokens = steps * self.args.batch_tokens
        return {"steps": steps, "tokens": tokens, "flops": tokens * arm.flops, "cpu_seconds": seconds[-1],
                "step_seconds": each, **json.loads((place / "scores.json").read_text())}  # fmt: skip

    def tell(self, arm: Arm, rate: float, seed: int, budget: float, result: dict[str, Any], work: float) -> None:
        with self.lock:
            self.spent += work
            left = (time.monotonic() - self.began) / self.spent * self.remaining()
            quality = result.get("diverged") or f"{Scores.parse(result['scores']['final']).value():.4f} bits per byte"
            say(f"{arm.name}, rate {rate:g}, seed {seed}, {budget:g} FLOPs: {quality}; "
                f"{int(left // 3600)}:{int(left % 3600 // 60):02} hours left")  # fmt: skip

    def run(self, lines: Iterable[tuple[Arm, float, int, list[float]]]) -> None:
        """These trunks, `--jobs` at a time."""
        pool = ThreadPoolExecutor(self.args.jobs)
        futures: list[Future[None]] = [pool.submit(self.line, *each) for each in lines]
        try:
            for future in futures:
                future.result()
        except BaseException:
            with self.lock:
                self.stopped = True
                for child in self.children:
                    child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def tried(self, arm: Arm) -> dict[float, float]:
        """Bits per byte on the excerpts for tuning, by rate; infinite where the loss was."""
        results = {rate: self.result(arm, rate, 0, self.budgets[0]) for rate in self.rates}
        return {rate: Scores.parse(found["scores"]["search"]).value() if "scores" in found else math.inf
                for rate, found in results.items() if found}  # fmt: skip

    def best(self, arm: Arm) -> float | None:
        """The best rate so far, the smaller of two that are equal."""
        tried = self.tried(arm)
        return min(tried, key=lambda rate: (tried[rate], rate), default=None)

    def tune(self) -> dict[str, float]:
        """The best rate of each arm; the list of rates is the same for all, also when it grows."""
        for growth in range(GROWTH + 1):
            self.run(self.lines())
            best = {arm.name: self.best(arm) or 0.0 for arm in self.arms}
            more = beyond(self.rates, best.values())
            if growth == GROWTH or not more:
                break
            say(f"The best rate is at an end of the list for some: {more} for all arms too.")
            self.rates = sorted(self.rates + more)
        return best

    # --- what came out -----------------------------------------------------------------------------------------------

    def facts(self, best: dict[str, float]) -> list[Record]:
        """Every record, from the results alone."""
        common: dict[str, Any] = {"run": "contest", "task": f"text@{tasks.Text.version}/final", "unit": "bits/byte"}
        found, scores, speeds = [], dict[tuple[str, float], list[Scores]](), {}
        for arm in self.arms:
            tried = {f"{rate:g}": None if math.isinf(value) else value for rate, value in self.tried(arm).items()}
            rate = best[arm.name]
            found.append(Record(run="contest", model=arm.name, metric="learning_rate", value=rate, seed=0,
                                detail={"bits_per_byte": tried, "split": "search", "budget": self.budgets[0],
                                        "at_an_end": rate in (self.rates[0], self.rates[-1])}))  # fmt: skip
            speeds[arm.name] = self.step_seconds(arm)
            for budget in self.budgets:
                for seed in range(self.args.seeds):
                    result = self.result(arm, rate, seed, budget)
                    detail = {key: value for key, value in result.items() if key != "scores"}
                    detail |= {"budget": budget, "rate": rate, "parameters": arm.parameters, "active": arm.active,
                               "flops_per_token": arm.flops, "counted": COUNTED,
                               "typical_cpu_seconds": result.get("steps", 0) * speeds[arm.name]}  # fmt: skip
                    one = Scores.parse(result["scores"]["final"]) if "scores" in result else None
                    if one is not None:
                        scores.setdefault((arm.name, budget), []).append(one)
                    spread = interval(one) if one is not None else None
                    found.append(_record(spread, common, arm.name, "bits_per_byte", detail, seed))
        last = [[one.value() for one in scores.get((arm.name, self.budgets[-1]), [])] for arm in self.arms]
        noise = Noise.pooled(last)
        return found + self._at_budgets(scores, noise, common) + self._at_times(scores, speeds, noise, common)

    def _at_budgets(self, scores: dict[tuple[str, float], list[Scores]], noise: Noise,
                    common: dict[str, Any]) -> list[Record]:  # fmt: skip
        found = []
        for budget in self.budgets:
            here = {arm.name: scores[arm.name, budget] for arm in self.arms if (arm.name, budget) in scores}
            found += _compare({name: (mean(items), len(items)) for name, items in here.items()}, noise, common,
                              "flops", {"budget": budget})  # fmt: skip
        return found

    def _at_times(self, scores: dict[tuple[str, float], list[Scores]], speeds: dict[str, float], noise: Noise,
                  common: dict[str, Any]) -> list[Record]:  # fmt: skip
        curves: dict[str, list[tuple[float, Scores]]] = {}
        for arm in self.arms:
            for budget in self.budgets:
                if (arm.name, budget) in scores:
                    steps = steps_of(budget, arm.flops, self.args.batch_tokens)
                    curves.setdefault(arm.name, []).append((steps * speeds[arm.name], mean(scores[arm.name, budget])))
        low = max((curve[0][0] for curve in curves.values()), default=0.0)
        high = min((curve[-1][0] for curve in curves.values()), default=0.0)
        if not 0 < low < high:
            say("There is no CPU time that all arms were trained for.")
            return []
        seeds = {name: min(len(scores[name, budget]) for budget in self.budgets if (name, budget) in scores)
                 for name in curves}  # fmt: skip
        found = []
        for seconds in np.geomspace(low, high, len(self.budgets)).clip(low, high).tolist():
            here = {name: (at(curve, seconds), seeds[name]) for name, curve in curves.items()}
            found += _compare(here, noise, common, "cpu_time", {"cpu_seconds": seconds})
        return found


def _compare(here: dict[str, tuple[Scores, int]], noise: Noise, common: dict[str, Any], axis: str,
             where: dict[str, Any]) -> list[Record]:  # fmt: skip
    """Mean of each arm over its seeds, and each pair's difference (the later minus the earlier), with intervals over
    documents and seeds."""
    told = {**where, "axis": axis, "interval": "documents and seeds", "seed_sd": noise.sd,
            "seed_freedom": noise.freedom}  # fmt: skip
    found = []
    for name, (one, seeds) in here.items():
        spread = noise.around(interval(one), seeds)
        found.append(_record(spread, common, name, "mean_bits_per_byte", told | {"seeds": seeds}))
    for (first, (old, few)), (second, (new, many)) in combinations(here.items(), 2):
        spread = noise.around(paired_bootstrap(old, new, "difference"), few, many)
        better = int((new.columns["bits"] < old.columns["bits"]).sum())
        detail = told | {"against": first, "seeds": [few, many], "documents_better": better}
        found.append(_record(spread, common, second, "difference", detail))
    return found


def _record(found: Interval | None, common: dict[str, Any], model: str, metric: str, detail: dict[str, Any],
            seed: int | None = None) -> Record:  # fmt: skip
    values = {"value": None} if found is None else vars(found)
    return Record(model=model, metric=metric, seed=seed, detail=detail, **common, **values)


def tables(records: Sequence[Record]) -> str:
    """Markdown: bits per byte at each budget and at each CPU time, and the difference from the first arm."""
    parts = []
    for axis, key, unit in (("flops", "budget", "FLOPs"), ("cpu_time", "cpu_seconds", "CPU-seconds")):
        items = [item for item in records if item.detail.get("axis") == axis]
        places = list(dict.fromkeys(item.detail[key] for item in items))
        names = list(dict.fromkeys(item.model for item in items))
        if not items:
            continue
        head = " | ".join(f"{place:.3g} {unit}" for place in places)
        parts.append(f"| arm | {head} |\n|---|{'---|' * len(places)}")
        for name in names:
            cells = []
            for place in places:
                mine = {(item.metric, item.detail.get("against")): item for item in items
                        if item.model == name and item.detail[key] == place}  # fmt: skip
                one, gap = mine.get(("mean_bits_per_byte", None)), mine.get(("difference", names[0]))
                cells.append(_cell(one, gap))
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(one: Record | None, gap: Record | None) -> str:
    if one is None:
        return "diverged"
    told = "" if gap is None else f", {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    return f"{one.value:.3f}{told}"


def picture(records: Sequence[Record]) -> str:
    """Bits per byte against FLOPs, CPU-seconds and bytes on disk, from records."""
    runs = [item for item in records if item.metric == "bits_per_byte" and item.value is not None]
    means = {(item.model, item.detail["budget"]): item for item in records
             if item.metric == "mean_bits_per_byte" and item.detail["axis"] == "flops"}  # fmt: skip
    found = []
    for key, label in (("flops", "training FLOPs"), ("typical_cpu_seconds", "CPU-seconds, one thread"),
                       ("bytes", "bytes of the saved model (bf16)")):  # fmt: skip
        series: dict[str, list[panels.Point]] = {}
        for (name, budget), item in means.items():
            x = next(run.detail[key] for run in runs if run.model == name and run.detail["budget"] == budget)
            series.setdefault(name, []).append(panels.Point(x, float(item.value or 0), item.low, item.high))
        found.append(panels.Panel(label, series))
    return panels.draw(found, "bits per byte, held-out authors")


def score(model: Path, held: Path, out: Path) -> None:
    """Score a saved model on both sets of excerpts, and weigh it."""
    facts = json.loads(held.read_text())["held"]
    splits = {split: [data.Document(*item) for item in part] for split, part in facts.items()}
    loaded = folder.load(model)
    task = tasks.Text(splits=splits, window=loaded.model.config.max_position_embeddings)
    told = {split: task.score(loaded, split).dump() for split in splits}
    for item in told.values():
        item["columns"] = {name: item["columns"][name] for name in ("bits", "bytes")}
    files.write_text(out, json.dumps({"scores": told, "bytes": cost.disk_size(model).weights}))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs; what is there already is used")
    parser.add_argument("--text", type=Path, required=True, help="folder with train/ and valid/")
    parser.add_argument("--valid", type=Path, help="held-out text, if --text is the training text itself")
    parser.add_argument("--arm", action="append", nargs="+", metavar=("NAME RECIPE", "KEY=VALUE"), help="see above")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1e13, 3e13, 1e14], help="training FLOPs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2], help="learning rates")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens of the BPE that all arms share")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=30, help="steps")
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--characters", type=int, default=500_000, help="of held-out text that is scored")
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    parser.add_argument("--kept", type=Path, help="JSONL file of the branches' results, read first and then written")
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and end")
    return parser.parse_args(words)


def main() -> None:
    if sys.argv[1:2] == ["score"]:
        score(*map(Path, sys.argv[2:]))
        return
    args = parse()
    contest = Contest(args)
    say(contest.plan())
    if args.plan:
        return
    signal.signal(signal.SIGTERM, stop)
    contest.prepare()
    best = contest.tune()
    contest.run(contest.lines(best))
    found = contest.facts(best)
    record.write(contest.runs / "records.jsonl", found)
    if args.records:
        record.append(args.records, found)
    if args.plot:
        files.write_text(args.plot, picture(found))
    print(tables(found))


if __name__ == "__main__":
    main()
