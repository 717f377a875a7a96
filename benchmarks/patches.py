"""Do patches scale better than tokens? Bits per byte against training FLOPs and CPU time, and what else is said.

    python benchmarks/patches.py scaling WORK --text FOLDER --records RECORDS.jsonl --plot docs/patches.svg
    python benchmarks/patches.py patch-size WORK --text FOLDER --records RECORDS.jsonl --plot docs/patch-size.svg
    python benchmarks/patches.py noise WORK --records RECORDS.jsonl      # of what `scaling` left in WORK
    python benchmarks/patches.py dynamic WORK --plot docs/dynamic.svg    # likewise
    python benchmarks/patches.py speed --text FOLDER --records RECORDS.jsonl    # against transformers' class

FOLDER holds train/ and valid/, the latter of authors that the former does not have. `scaling`, for each arm:

1. At the smallest budget, seed 0, by bits per byte on excerpts of the held-out books that are not used again: the
   vocabulary (of BPE), the size, the learning rate, one after the other; each list is climbed until its best has a
   worse one on both sides. Larger budgets get a size whose FLOPs a byte grow as the square root of the budget.
2. Several seeds at each budget, scored on other excerpts as saved (bf16). A run of one size goes on from the one of a
   smaller budget: a level rate, and for the last fifth of each budget a copy that decays to zero.
3. A power law is fitted to those budgets, what it says of the largest is written down, and that one is run once.

All rows are of as many bytes. The FLOPs and seconds of the arms with entropies have those of training the model of
entropies in them, and of asking it. Budgets are paid with the mean patch that is aimed at; what is fitted and drawn has
the mean that came out. It can be killed at any time; the same command goes on. `--plan` says what there is to do.
"""

import argparse
import contextlib
import itertools
import json
import math
import shutil
import statistics as middle
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blt
import contest
import ladder
import numpy as np
import panels
import robust
import torch
from branches import PARTS, branch, excerpt, level_of, newest, steps_of
from fits import Law, Noise, crossing, laws, mean, spread
from ladder import Cell, cell
from patch_tables import AXES, picture, report

from shrew import data, files, folder, record, spec, tasks
from shrew.blocks.patches.boundaries import SpaceSpec, boundaries, mean_size
from shrew.data.tokenizer import read_tokenizer, train_tokenizer
from shrew.errors import ShrewError
from shrew.measure import interval, paired_bootstrap
from shrew.record import Record
from shrew.tasks import Scores
from shrew.train import Recipe, train

SHARED: dict[str, Any] = {"weight_decay": 0.1, "validation": 0.0, "precision": "fp32", "threads": 1,
                          "optimizer": "muon", "checkpoint_every": 500}  # fmt: skip
RATES = tuple(5e-4 * 2**power for power in range(8))
MIDDLE = 3  # of RATES: where the climb begins
RATE = 10e9  # FLOPs a CPU-second, to plan with until something was timed
TOKENS_A_PARAMETER = 20  # where the climb over sizes begins


def climb(start: int, count: int, score: Callable[[int], float]) -> int:
    """The best of places 0 to count - 1 with a worse one on both sides, from `start` on; the smaller of two equal."""
    tried: dict[int, float] = {}

    def ask(place: int) -> None:
        if 0 <= place < count and place not in tried:
            tried[place] = score(place)

    ask(min(max(start, 0), count - 1))
    while True:
        best = min(tried, key=lambda place: (tried[place], place))
        known = len(tried)
        ask(best - 1)
        ask(best + 1)
        if len(tried) == known:
            return best


class Study:
    """The runs under one folder: WORK/ARM-DIGEST/RATE-SEED/ has trunks, branches, and one BUDGET.json each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work.resolve()
        self.budgets = sorted(args.budgets)
        self.begun, self.done = time.process_time(), 0.0
        self.spaces, self.sizes = 0.0, dict[int, float]()

    # --- what is read ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """The text, the held-out excerpts, the tokenizers and the model of entropies."""
        args, text = self.args, self.work / "text"
        facts = {name: getattr(args, name) for name in ("length", "rows", "warmup", "megabytes", "characters")}
        facts["text"] = self._text(text)
        facts["held"] = self._held()
        said = self.work / "held.json"
        if said.exists() and json.loads(said.read_text()) != json.loads(json.dumps(facts)):
            raise SystemExit(f"{self.work} was begun with other text or settings; give another folder")
        files.write_text(said, json.dumps(facts))
        documents = data.documents([str(text)])
        for size in args.vocabularies:
            place = self.work / f"bpe-{size}"
            if not (place / "tokenizer.json").exists():
                with files.new_folder(place, "tokenizer.json") as temporary:
                    train_tokenizer(documents, size, 0).save_pretrained(temporary)
            stream = data.tokenize(documents, read_tokenizer(place), files.cache_folder())
            self.sizes[size] = stream.text_bytes / len(stream.tokens)
        some = [list(item.text.encode()[:4096]) for item in documents]
        rows = torch.zeros(len(some), 4096, dtype=torch.long)
        for row, found in enumerate(some):
            rows[row, : len(found)] = torch.tensor(found)
        lengths = torch.tensor([len(found) for found in some])
        self.spaces = round(mean_size(boundaries(rows, lengths, SpaceSpec()), lengths), 2)

    def _text(self, place: Path) -> str:
        """The books to train on, in the folder `place`, each as much of it as its share of --megabytes."""
        books = data.documents([str(self.args.text / "train")])
        most = int(self.args.megabytes * 1e6) // len(books) if self.args.megabytes else None
        if not (place / "books.json").exists():
            with files.new_folder(place, "books.json") as temporary:
                for number, book in enumerate(books):
                    (temporary / f"{number}.txt").write_text(book.text[:most])
                (temporary / "books.json").write_text(json.dumps([Path(book.id).name for book in books]))
        return spec.digest([book.text[:most] for book in books])

    def _held(self) -> dict[str, Any]:
        """Two excerpts of each held-out book: for choosing, and for what is told."""
        held = data.documents([str(self.args.text / "valid")])
        count = self.args.characters // len(held)
        parts = {"search": [excerpt(item, 0.1, count // 2) for item in held],
                 "final": [excerpt(item, 0.5, count) for item in held]}  # fmt: skip
        return {split: [[item.id, item.text] for item in part] for split, part in parts.items()}

    def entropy(self) -> dict[str, Any]:
        """What training the model of entropies took; it is trained if it has not been."""
        place = self.work / "entropy"
        if not (place / "told.json").exists():
            table = {**ladder.ENTROPY, "context": self.args.length, "vocabulary": 257}
            flops = ladder.costs(ladder.whole(table), self.args.length)[0]
            steps = max(PARTS, round(self.args.share * self.budgets[0] / (flops * self.batch)))
            place.mkdir(parents=True, exist_ok=True)
            recipe = {"train": self.recipe(RATES[MIDDLE], 0) | {"tokenizer": "bytes", "length": self.args.length,
                      "batch_tokens": self.batch, "steps": steps, "decay": 0.4, "out": "model"}, "model": table}
            files.write_text(place / "model.toml", spec.to_toml(recipe))
            if words := here(place, "model"):
                raise SystemExit(f"the model of entropies: {words}")
            contest.score(place / "model", self.work / "held.json", place / "scores.json")
            log = (newest(place, "model") / "log.jsonl").read_text().splitlines()
            told = {"flops": flops * steps * self.batch, "cpu_seconds": json.loads(log[-1])["cpu_seconds"],
                    "steps": steps, **json.loads((place / "scores.json").read_text())}  # fmt: skip
            files.write_text(place / "told.json", json.dumps(told))
        found: dict[str, Any] = json.loads((place / "told.json").read_text())
        return found

    # --- runs --------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Bytes of a step."""
        return int(self.args.length * self.args.rows)

    def recipe(self, rate: float, seed: int) -> dict[str, Any]:
        return SHARED | {"data": [str(self.work / "text")], "lr": rate, "seed": seed, "warmup": self.args.warmup}

    def cell(self, arm: str, rung: int, vocabulary: int = 0) -> Cell:
        size = self.sizes[vocabulary] if vocabulary else 1.0
        length = 8 * max(1, round(self.args.length / size / 8))
        return cell(arm, rung, ladder.table(arm, rung, self.spaces), length, vocabulary, size)

    def steps(self, item: Cell, budget: float) -> int:
        """Steps that a budget pays, that of the model of entropies taken off."""
        rest = budget - (self.entropy()["flops"] if item.entropies else 0.0)
        return steps_of(rest, item.flops, item.length * self.args.rows)

    def place(self, item: Cell, rate: float, seed: int) -> Path:
        mark = spec.digest([item.model, item.length, self.args.rows, self.args.warmup])[:8]
        return Path(self.work / f"{item.arm}-{item.rung}-{mark}" / f"{rate:g}-{seed}")

    def result(self, item: Cell, rate: float, seed: int, budget: float) -> dict[str, Any]:
        """What a run gave; it is run if it has not been."""
        place, name = self.place(item, rate, seed), f"{budget:g}"
        told = place / f"{name}.json"
        if not told.exists():
            place.mkdir(parents=True, exist_ok=True)
            steps = self.steps(item, budget)
            if level_of(steps) < self.args.warmup:
                raise SystemExit(f"{item.arm}: {budget:g} FLOPs end before the warm-up does.")
            settings = self.recipe(rate, seed) | {"length": item.length, "batch_tokens": item.length * self.args.rows}
            settings["tokenizer"] = str(self.work / f"bpe-{item.vocabulary}") if item.vocabulary else "bytes"
            settings |= {"entropy": str(self.work / "entropy" / "model")} if item.entropies else {}
            recipe = {"train": settings, "model": item.model}
            words = branch(place, recipe, name, steps, lambda out: here(place, out))
            files.write_text(told, json.dumps({"diverged": words} if words else self.read(item, place, name, steps)))
            self.done += budget
            self.tell(item, rate, seed, budget, json.loads(told.read_text()))
        found: dict[str, Any] = json.loads(told.read_text())
        return found

    def read(self, item: Cell, place: Path, name: str, steps: int) -> dict[str, Any]:
        """The facts of a run that has ended."""
        contest.score(place / name, self.work / "held.json", place / "scores.json")
        run = newest(place, name)
        seconds = [json.loads(line)["cpu_seconds"] for line in (run / "log.jsonl").read_text().splitlines()]
        shutil.rmtree(run / "checkpoint")  # the trunk's is what goes on
        tokens = steps * item.length * self.args.rows
        size = patch_size(place / name, self.work / "held.json") if "front" in item.model else 0.0
        training, reading = item.flops, item.reading
        if size:
            training, reading = ladder.costs(ladder.whole(item.model, size), item.length)
        return {"steps": steps, "text_bytes": round(tokens * item.size), "flops": tokens * training,
                "reading_flops_per_byte": reading / item.size, "patch": size, "cpu_seconds": seconds[-1],
                "step_seconds": middle.median(np.diff(seconds).tolist() or seconds),
                **json.loads((place / "scores.json").read_text())}  # fmt: skip

    def tell(self, item: Cell, rate: float, seed: int, budget: float, result: dict[str, Any]) -> None:
        spent = time.process_time() - self.begun
        quality = result.get("diverged") or f"{Scores.parse(result['scores']['final']).value():.4f} bits per byte"
        left = max(self.expected() - self.done, 0.0) * spent / self.done
        say(f"{item.arm}, size {item.rung}, rate {rate:g}, seed {seed}, {budget:g} FLOPs: {quality}; "
            f"{result.get('cpu_seconds', 0):.0f} CPU-seconds; about {left / 60:.0f} minutes left")  # fmt: skip

    def expected(self) -> float:
        """FLOPs of everything, where each climb takes three tries."""
        args = self.args
        tries = 7 * len(args.arms) + 2 * ("bpe" in args.arms)
        return float(tries * self.budgets[0] + len(args.arms) * (args.seeds * sum(self.budgets) + (args.last or 0.0)))

    # --- choices -----------------------------------------------------------------------------------------------------

    def search(self, item: Cell, rate: float) -> float:
        """Bits per byte for choosing, at the smallest budget."""
        found = self.result(item, rate, 0, self.budgets[0])
        return Scores.parse(found["scores"]["search"]).value() if "scores" in found else math.inf

    def choose(self, arm: str) -> tuple[Cell, float]:
        """The arm's best size and rate at the smallest budget."""
        goal = 6 * math.sqrt(self.budgets[0] / 6 / TOKENS_A_PARAMETER)
        near = self.nearest(arm, goal, self.args.vocabularies[0] if arm == "bpe" else 0)
        words, rate = sorted(self.args.vocabularies), RATES[MIDDLE]
        vocabulary = 0
        if arm == "bpe":
            at = climb(0, len(words), lambda place: self.search(self.cell(arm, near, words[place]), rate))
            vocabulary = words[at]
        rung = climb(near, len(ladder.RUNGS), lambda place: self.search(self.cell(arm, place, vocabulary), rate))
        best = self.cell(arm, rung, vocabulary)
        return best, RATES[climb(MIDDLE, len(RATES), lambda place: self.search(best, RATES[place]))]

    def nearest(self, arm: str, per_byte: float, vocabulary: int) -> int:
        """The rung whose training FLOPs a byte are nearest, in logs."""
        costs = [self.cell(arm, rung, vocabulary).per_byte for rung in range(len(ladder.RUNGS))]
        return min(range(len(costs)), key=lambda rung: abs(math.log(costs[rung] / per_byte)))

    def at(self, best: Cell, budget: float) -> Cell:
        """The arm at a budget: as the best at the smallest, its FLOPs a byte grown with the root of the budget."""
        if budget == self.budgets[0]:
            return best
        goal = best.per_byte * math.sqrt(budget / self.budgets[0])
        return self.cell(best.arm, self.nearest(best.arm, goal, best.vocabulary), best.vocabulary)


def here(place: Path, out: str) -> str:
    """Run OUT.toml in its place, in this process; what went wrong with the loss."""
    with contextlib.chdir(place), Path("log.txt").open("a") as log, contextlib.redirect_stderr(log):
        try:
            train(spec.parse(Recipe, spec.read_toml(Path(f"{out}.toml")), f"{out}.toml"))
        except ShrewError as error:
            if "the loss is" not in str(error):
                raise
            return str(error)
    return ""


@torch.no_grad()
def patch_size(model: Path, held: Path, most: int = 65536) -> float:
    """Mean bytes of the patches that a saved model cuts the held-out text into."""
    loaded: Any = folder.load(model).model
    ends = total = 0
    length = loaded.config.max_position_embeddings
    for _, text in json.loads(held.read_text())["held"]["final"]:
        some = torch.tensor(list(text.encode()[: most // 8]))
        for row in some[: len(some) // length * length].view(-1, length).split(4):
            ends += int(loaded.model.ends(row).sum())
            total += row.numel()
    return total / max(ends, 1)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- what is told -----------------------------------------------------------------------------------------------------

def scaling(args: argparse.Namespace) -> list[Record]:
    """All runs, and everything that they say."""
    study = Study(args)
    if args.plan:
        work = study.expected()
        say(f"{work:.3g} FLOPs in all: {work / RATE / 60:.0f} CPU-minutes at {RATE:g} a second.")
        return []
    study.prepare()
    chosen = {}
    for arm in args.arms:
        chosen[arm] = study.choose(arm)
        for budget in study.budgets:
            for seed in range(args.seeds):
                study.result(study.at(chosen[arm][0], budget), chosen[arm][1], seed, budget)
    found = facts(study, chosen)
    record.write(study.work / "fitted.jsonl", found)  # what was said of the largest budget before it was run
    if args.last:
        for best, rate in chosen.values():
            study.result(study.at(best, args.last), rate, 0, args.last)
        found = facts(study, chosen)
    files.write_text(study.work / "chosen.json", json.dumps(told(study, chosen)))
    if args.plot:
        files.write_text(args.plot, picture(found))
    print(report(found))
    return found


def told(study: Study, chosen: dict[str, tuple[Cell, float]]) -> dict[str, dict[str, Any]]:
    """What other commands read: of each arm its rate, its size at the smallest budget, and its largest model."""
    most = study.args.last or study.budgets[-1]
    found = {}
    for arm, (best, rate) in chosen.items():
        place = study.place(study.at(best, most), rate, 0) / f"{most:g}"
        found[arm] = {"rate": rate, "size": best.rung, "vocabulary": best.vocabulary,
                      "model": str(place.relative_to(study.work))}  # fmt: skip
    return found


def points(study: Study, best: Cell, rate: float, budget: float, seeds: int) -> list[dict[str, Any]]:
    """The results of an arm at a budget that did not diverge, with what they took in all."""
    item, found = study.at(best, budget), []
    more = study.entropy() if item.entropies else {"flops": 0.0, "cpu_seconds": 0.0}
    for seed in range(seeds):
        if not (study.place(item, rate, seed) / f"{budget:g}.json").exists():
            continue
        result = study.result(item, rate, seed, budget)
        if "scores" in result:
            spent = {"flops": result["flops"] + more["flops"],
                     "cpu": result["steps"] * result["step_seconds"] + more["cpu_seconds"]}  # fmt: skip
            found.append(result | spent | {"budget": budget, "seed": seed, "of_entropies": more["flops"],
                                           "parameters": item.parameters, "table_bytes": item.tables,
                                           "size": item.rung, "vocabulary": item.vocabulary, "rate": rate})
    return found


def facts(study: Study, chosen: dict[str, tuple[Cell, float]]) -> list[Record]:
    """Every record of `scaling`, from the results alone."""
    common: dict[str, Any] = {"run": "patches-scaling", "task": f"text@{tasks.Text.version}/final",
                              "unit": "bits/byte"}  # fmt: skip
    budgets = [*study.budgets, *([study.args.last] if study.args.last else [])]
    runs = {(arm, budget): points(study, best, rate, budget, study.args.seeds if budget != study.args.last else 1)
            for arm, (best, rate) in chosen.items() for budget in budgets}  # fmt: skip
    found = []
    for arm, items in [(arm, items) for (arm, _), items in runs.items()]:
        for item in items:
            detail = {key: value for key, value in item.items() if key != "scores"}
            detail |= {"length": study.args.length, "rows": study.args.rows}
            one = interval(final(item))
            found.append(Record(model=arm, metric="bits_per_byte", seed=item["seed"], detail=detail, **common,
                                **vars(one)))  # fmt: skip
    noise = Noise.pooled([[final(item).value() for item in items] for items in runs.values()])
    first = next(iter(chosen))
    for (arm, budget), items in runs.items():
        if arm != first and items and runs[first, budget]:
            old, new = (mean([final(item) for item in part]) for part in (runs[first, budget], items))
            gap = noise.around(paired_bootstrap(old, new, "difference"), len(runs[first, budget]), len(items))
            found.append(Record(model=arm, metric="difference", **common, **vars(gap),
                                detail={"against": first, "budget": budget, "seed_sd": noise.sd}))  # fmt: skip
    for axis in AXES:
        found += _laws(runs, study, noise, axis, common)
    return found


def final(item: dict[str, Any]) -> Scores:
    return Scores.parse(item["scores"]["final"])


def _laws(runs: dict[tuple[str, float], list[dict[str, Any]]], study: Study, noise: Noise, axis: str,
          common: dict[str, Any]) -> list[Record]:  # fmt: skip
    """Slopes on an axis, what they say of the largest budget, and where each arm's fit meets that of the first."""
    curves: dict[str, list[tuple[float, list[Scores]]]] = {}
    for (arm, budget), items in runs.items():
        if items and budget in study.budgets:
            x = middle.fmean(item[axis] for item in items)
            curves.setdefault(arm, []).append((x, [final(item) for item in items]))
    curves = {arm: curve for arm, curve in curves.items() if len(curve) > 1}
    if not curves:
        return []
    fitted, found = laws(curves, noise.sd), []
    units = next(iter(curves.values()))[0][1][0].n
    first = next(iter(fitted))
    bare = common | {"unit": ""}
    for arm, law in fitted.items():
        detail: dict[str, Any] = {"axis": axis, "from": curves[arm][0][0], "to": curves[arm][-1][0],
                                  "budgets": study.budgets, "seed_sd": noise.sd}  # fmt: skip
        found.append(Record(model=arm, metric="slope", detail=detail, **bare, **vars(spread(law.slope, units))))
        found += _last(runs.get((arm, study.args.last or 0.0), []), law, arm, axis, common, units)
        if arm != first:
            found.append(_against(fitted[first], law, arm, detail | {"against": first}, bare, units))
    return found


def _last(items: list[dict[str, Any]], law: Law, arm: str, axis: str, common: dict[str, Any],
          units: int) -> list[Record]:  # fmt: skip
    """What the law says of the one run that it was not fitted to, beside what came out."""
    return [Record(model=arm, metric="predicted", **common, **vars(spread(law.at(item[axis]), units)),
                   detail={"axis": axis, "at": item[axis], "measured": final(item).value(), "budget": item["budget"]})
            for item in items]  # fmt: skip


def _against(old: Law, new: Law, arm: str, detail: dict[str, Any], common: dict[str, Any], units: int) -> Record:
    """How much steeper an arm's law falls than the first one's (below zero: steeper), and where they meet."""
    place, low, high = crossing(old, new)
    steeper = float((new.slope[1:] < old.slope[1:]).mean())
    gap = spread(new.slope - old.slope, units)
    return Record(model=arm, metric="slope_difference", **common, **vars(gap),
                  detail=detail | {"cross": place, "cross_low": low, "cross_high": high, "steeper": steeper})


# --- patches of several sizes -----------------------------------------------------------------------------------------


def patch_size_study(args: argparse.Namespace) -> list[Record]:
    """At the same FLOPs a byte of reading and one training budget: bytes a patch against bits per byte. What longer
    patches save goes into the layers on patches; the local layers and the tables stay."""
    study = Study(args)
    study.prepare()
    known = json.loads((study.work / "chosen.json").read_text()) if (study.work / "chosen.json").exists() else {}
    base = known.get("entropy-4.5", {"rate": RATES[MIDDLE], "size": args.size})
    start = study.cell("entropy-4.5", base["size"])
    budget = args.last or study.budgets[-1]
    goal = study.at(start, budget).reading
    size = study.at(start, budget).rung
    cells = {}
    for average in args.means:
        table = ladder.patches(size, {"kind": "entropy"}, average)
        cells[f"patches of {average:g}"] = ladder.to_cost(table, args.length, goal, name=f"size-{average:g}")
    grams = ladder.table("bytes+ngrams", size, study.spaces)
    cells["bytes+ngrams"] = ladder.to_cost(grams, args.length, goal, name="size-bytes")
    words = known.get("bpe", {}).get("vocabulary") or args.vocabularies[0]
    like = study.cell("bpe", size, words)
    cells["bpe"] = ladder.to_cost(like.model, like.length, goal, name="size-bpe", vocabulary=words, size=like.size)
    found, seen = [], []
    for label, item in cells.items():
        rate = known.get(label, base)["rate"]
        for seed in range(args.seeds):
            result = study.result(item, rate, seed, budget)
            if "scores" not in result:
                continue
            detail = {key: value for key, value in result.items() if key != "scores"}
            average = result["patch"] or item.size
            detail |= {"budget": budget, "rate": rate, "unit": average, "parameters": item.parameters,
                       "table_bytes": item.tables, "model": item.model["width"], "goal": goal}  # fmt: skip
            one = final(result)
            found.append(Record(run="patches-size", model=label, metric="bits_per_byte", unit="bits/byte", seed=seed,
                                task=f"text@{tasks.Text.version}/final", detail=detail, **vars(interval(one))))
            seen.append(f"| {label} | {average:.2f} | {item.parameters:,} | {item.model['width']} | "
                        f"{result['reading_flops_per_byte']:,.0f} | {one.value():.4f} |")  # fmt: skip
    print("\n".join(["| arm | bytes a patch or token | parameters | width | FLOPs a byte | bits per byte |",
                     "|---|---|---|---|---|---|", *seen]))  # fmt: skip
    if args.plot:
        series: dict[str, list[panels.Point]] = {}
        for item in found:
            name = item.model.partition(" ")[0]
            series.setdefault(name, []).append(panels.Point(item.detail["unit"], float(item.value or 0)))
        label = f"bytes a patch or token, {goal / 1e3:,.0f} kFLOP a byte read"
        files.write_text(args.plot, panels.draw([panels.Panel(label, series)], "bits per byte, held-out authors"))
    return found


# --- the command ------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> list[Record]:
    """Training and decoding against transformers' class."""
    book = data.documents([str(args.text / "train") if args.text else "python:train"])[0].text.encode()
    found = []
    for size, length in itertools.product(args.sizes, args.lengths):
        for item in blt.speed(size, book, args.rounds, max(1, blt.BYTES // length), length):
            each = [item.detail[f"{name}_microseconds_per_byte"] for name in ("ours", "theirs")]
            print(f"{size}, rows of {length}, {item.metric}: {item.value:.2f} ({item.low:.2f} to {item.high:.2f}) of "
                  f"{item.n} rounds, {each[0]:.1f} against {each[1]:.1f} microseconds a byte", flush=True)
            found.append(item)
    return found


VERBS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    "scaling": scaling, "patch-size": patch_size_study, "noise": robust.noise, "dynamic": robust.dynamic,
    "speed": speed,
}  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, work in VERBS.items():
        one = verbs.add_parser(verb, help=work.__doc__)
        one.add_argument("--records", type=Path, help="JSONL file that the records are added to")
        one.add_argument("--plot", type=Path, help="SVG file to write")
        if verb != "speed":
            one.add_argument("work", type=Path, help="folder of the runs; what is there already is used")
        if verb in ("scaling", "patch-size"):
            _runs(one)
        if verb == "patch-size":
            one.add_argument("--means", type=float, nargs="+", default=[3.0, 4.5, 6.0, 8.0], help="bytes a patch")
            one.add_argument("--size", type=int, default=2, help="rung to begin with, where `scaling` was not run")
        if verb == "noise":
            one.add_argument("--characters", type=int, default=20_000, help="of each held-out book")
            one.add_argument("--questions", type=int, default=300, help="of each probe")
        if verb == "dynamic":
            one.add_argument("--arm", default="entropy-4.5", help="whose patches are drawn")
        if verb == "speed":
            one.add_argument("--text", type=Path, help="folder with train/; default: Python's own source")
            one.add_argument("--sizes", nargs="+", choices=list(blt.SIZES), default=list(blt.SIZES))
            one.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="bytes of a row")
            one.add_argument("--rounds", type=int, default=20, help="of training; a quarter as many of decoding")
    return parser.parse_args(words)


def _runs(one: argparse.ArgumentParser) -> None:
    one.add_argument("--text", type=Path, required=True, help="folder with train/ and valid/")
    one.add_argument("--arms", nargs="+", choices=ladder.ARMS, default=list(ladder.ARMS))
    one.add_argument("--budgets", type=float, nargs="+", default=[1e13, 3e13, 1e14], help="training FLOPs")
    one.add_argument("--last", type=float, default=3e14, help="budget that is predicted, then run once; 0: none")
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--vocabularies", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="of BPE")
    one.add_argument("--length", type=int, default=1024, help="bytes of a row")
    one.add_argument("--rows", type=int, default=8, help="rows of a step")
    one.add_argument("--warmup", type=int, default=30, help="steps")
    one.add_argument("--share", type=float, default=0.1, help="of the smallest budget, for the model of entropies")
    one.add_argument("--megabytes", type=float, default=0.0, help="of text to train on; 0: all there is")
    one.add_argument("--characters", type=int, default=500_000, help="of held-out text that is scored")
    one.add_argument("--plan", action="store_true", help="say what there is to do, and end")


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    found = VERBS[args.verb](args)
    if args.records and found:
        record.append(args.records, found)


if __name__ == "__main__":
    main()
