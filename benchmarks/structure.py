"""When does cutting and healing pay, against training a model of that size from scratch at equal compute?

    python benchmarks/structure.py --records results/records.jsonl

The starter loses half its layers, or three quarters of its MLP channels, and is healed by distillation for a number of
steps; a new model of the same shape, with the same tokenizer, is trained by `shrew train` with the starter's recipe
(Muon) on the same text for as many FLOPs, counted by Shrew: a step costs three forward passes of the model and, for
those that heal, one of the teacher. The text is the standard library without the evaluation modules, which both are
measured on. What training the starter took is not counted: whoever cuts a model has it. What is done stays in WORK; 35
minutes in all.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from curves import tell

from shrew import data, files, folder, machine, spec, tasks, train
from shrew.blocks.stock import adopt
from shrew.folder import Loaded
from shrew.measure.statistics import interval, paired_bootstrap
from shrew.moves import Source, apply_moves, parse_moves
from shrew.moves.context import Context
from shrew.record import Record
from shrew.tasks import Scores

ROOT = Path(__file__).parents[1]
TEXT = "python:stdlib"
LENGTH, ROWS = 512, 4  # of a window, in a step
CUTS: dict[str, list[dict[str, Any]]] = {
    "half the layers": [{"name": "drop-layers", "count": 3}],
    "a quarter of the MLP": [{"name": "narrow", "mlp": 0.25}],
}
STEPS = (30, 120, 480)  # of healing
HEAL = {"name": "distil", "rows": ROWS}  # at the rate of the move, which is that of shrink
SECONDS = 1.0  # a step of healing on one core, about; training from scratch takes as long


@dataclass
class Made:
    """A model of one arm with what it took: training FLOPs, tokens and CPU-seconds."""

    path: Path
    flops: float
    tokens: int
    cpu_seconds: float


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.threads = machine.choose_threads(args.threads).count
        self.original = folder.load(args.model)
        self.task = tasks.read("python")
        most = max(args.steps) * ROWS
        self.windows = windows(self.original, most + 32)
        if len(self.windows) < most + 32:
            print(f"the text has {len(self.windows)} windows; more steps than that see it again", file=sys.stderr)

    def context(self) -> Context:
        def say(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        return Context(self.windows[:32], self.windows[32:], self.original, self.args.seed, self.work / "cache", say)

    def apply(self, moves: list[dict[str, Any]]) -> Path:
        """The folder that moves make of the original, from the cache if it is there."""
        assert self.original.path is not None
        source = Source(model=self.args.model, threads=self.threads, seed=self.args.seed)
        return apply_moves(self.original.path, parse_moves(moves, "structure"), source, self.context())

    def healed(self, cut: list[dict[str, Any]], steps: int) -> Made:
        begun = time.process_time()
        path = self.apply([*cut, HEAL | {"steps": steps}])
        tokens = steps * ROWS * LENGTH
        each = 3 * per_token(folder.load(path)) + per_token(self.original)
        return Made(path, tokens * each, tokens, time.process_time() - begun)

    def scratch(self, like: Path, flops: float, name: str) -> Made:
        """A new model of the shape of `like`, trained for so many FLOPs; an interrupted training goes on."""
        loaded, out = folder.load(like), self.work / name
        steps = max(round(flops / (3 * per_token(loaded) * ROWS * LENGTH)), 2)
        table = spec.read_toml(ROOT / "recipes" / "starter.toml")
        words = {"data": [TEXT], "out": str(out), "tokenizer": str(self.original.path), "length": LENGTH,
                 "steps": steps, "batch_tokens": ROWS * LENGTH, "warmup": max(steps // 10, 1),
                 "threads": self.threads, "seed": self.args.seed, "evaluate_every": 10**6}  # fmt: skip
        begun = time.process_time()
        recipe = {"train": table["train"] | words, "model": spec.dump(adopt(loaded.model).spec)}
        train.train(spec.parse(train.Recipe, recipe, name))
        tokens = steps * ROWS * LENGTH
        return Made(out, tokens * 3 * per_token(loaded), tokens, time.process_time() - begun)

    def kept(self, name: str, make: Any) -> tuple[Made, Scores]:
        """What an arm made and its scores on the final split, from WORK if they are there."""
        mark = spec.digest([name, HEAL, CUTS, self.args.seed, self.original.lineage])[:16]
        place = self.work / f"{mark}.json"
        if not place.exists():
            made = make()
            scores = self.task.score(folder.load(made.path), "final", self.original).dump()
            files.write_text(place, json.dumps({"made": vars(made) | {"path": str(made.path)}, "scores": scores}))
        found = json.loads(place.read_text("utf-8"))
        return Made(**found["made"] | {"path": Path(found["made"]["path"])}), Scores.parse(found["scores"])


def windows(loaded: Loaded, count: int) -> list[np.ndarray]:
    """Rows of text, of documents in an order of chance."""
    texts = [item.text for item in data.documents([TEXT])]
    found: list[int] = []
    for at in np.random.default_rng(0).permutation(len(texts)):
        found += data.encode(loaded.tokenizer, [texts[at]])[0]
        if len(found) >= count * LENGTH:
            break
    full = min(count, len(found) // LENGTH)
    return list(np.array(found[: full * LENGTH], np.int64).reshape(full, LENGTH))


def count(loaded: Loaded) -> int:
    return sum(weight.numel() for weight in loaded.model.parameters())


def per_token(loaded: Loaded) -> float:
    """FLOPs of one token's forward pass in a window."""
    return float(adopt(loaded.model).flops(LENGTH // 2))


def arms(bench: Bench) -> Iterator[Record]:
    args = bench.args
    original = bench.task.score(bench.original, "final")
    whole = {"cut": "", "arm": "original", "parameters": count(bench.original), "flops": 0, "tokens": 0}
    yield fact("original", original, original, whole)
    left = 2 * SECONDS * sum(args.steps) * len(CUTS)
    for cut, moves in CUTS.items():
        bare, plain = bench.kept(f"{cut}, not healed", lambda moves=moves: Made(bench.apply(moves), 0, 0, 0))
        shape = {"cut": cut, "parameters": count(folder.load(bare.path))}
        yield fact(f"{cut}, not healed", plain, original, {**shape, "arm": "not healed", "flops": 0, "tokens": 0})
        for steps in args.steps:
            print(f"{cut}, {steps} steps; about {left / 60:.0f} minutes left", file=sys.stderr, flush=True)
            name = f"{cut}, {steps} steps"
            healed, first = bench.kept(f"{name}, healed", lambda m=moves, s=steps: bench.healed(m, s))
            new, second = bench.kept(f"{name}, from scratch", lambda b=bare, h=healed, n=name: bench.scratch(
                b.path, h.flops, n.replace(" ", "-").replace(",", "")))  # fmt: skip
            left -= 2 * SECONDS * steps
            for arm, made, scores in (("healed", healed, first), ("from scratch", new, second)):
                detail = {**shape, "arm": arm, "steps": steps, "flops": made.flops, "tokens": made.tokens,
                          "cpu_seconds": made.cpu_seconds}  # fmt: skip
                yield fact(f"{name}, {arm}", scores, original, detail)
            gap = paired_bootstrap(second, first, "difference")
            yield Record(run="structure", model=name, metric="healed_minus_scratch", value=gap.value, low=gap.low,
                         high=gap.high, n=gap.n, unit="bits/byte", seed=args.seed, task=f"{bench.task.label}/final",
                         detail={"cut": cut, "steps": steps, "flops": healed.flops})  # fmt: skip


def fact(name: str, scores: Scores, original: Scores, detail: dict[str, Any]) -> Record:
    found, kept = interval(scores), paired_bootstrap(original, scores)
    return Record(run="structure", model=name, metric="bits_per_byte", value=found.value, low=found.low,
                  high=found.high, n=found.n, unit="bits/byte", task=f"{scores.task}/{scores.split}", seed=0,
                  detail=detail | {"retention": [kept.value, kept.low, kept.high]})  # fmt: skip


def table(records: list[Record]) -> str:
    lines = ["| model | parameters | FLOPs | tokens | bits per byte | quality kept | healed less from scratch |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    gaps = {item.model: f"{item.value:+.3f} ({item.low:+.3f} to {item.high:+.3f})" for item in records
            if item.metric == "healed_minus_scratch"}  # fmt: skip
    for item in records:
        if item.metric == "bits_per_byte":
            seen = item.detail
            cells = [item.model, f"{seen['parameters']:,}", f"{seen['flops']:.2g}", f"{seen['tokens']:,}",
                     f"{item.value:.3f} ({item.low:.3f} to {item.high:.3f})", f"{seen['retention'][0]:.1%}",
                     gaps.get(item.model.removesuffix(", healed"), "") if seen["arm"] == "healed" else ""]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/structure"))
    parser.add_argument("--model", default="starter")
    parser.add_argument("--steps", type=lambda text: [int(one) for one in text.split(",")], default=list(STEPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--show", type=Path, help="make nothing: print the table of these records")
    args = parser.parse_args()
    return tell(args, "structure", table, lambda: list(arms(Bench(args))))


if __name__ == "__main__":
    sys.exit(main())
