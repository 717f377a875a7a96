"""What mixers forget: associative recall and copying against length, one layer of each above a convolution.

    python benchmarks/recall.py attention window conv linear delta memory linear+attention --records RECORDS.jsonl

Recall (after Arora et al. 2023, MQAR): length / 16 pairs of a key and a value, noise, then every key once more in
another order; counted is the value named after each. Copy: tokens drawn at random, a mark, and the
same tokens again; counted is each of them. The first layer is a short convolution for all, so that a value can be next
to its key: without it attention needs ten times the steps to find that out, and what is asked here is what is kept. A
mixer of two kinds, as linear+attention, is a layer of each. One model a probe, mixer and learning rate learns rows of
all lengths in turn, with the same draws and steps as the others; of the rates, the same for all, the one counts whose
model answers best on rows that are not counted.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import panels
import torch
from torch import Tensor

from shrew import files, machine, objectives, record, spec
from shrew.blocks.model import MIXERS, ModelSpec, ShrewForCausalLM, build
from shrew.record import Record
from shrew.train import TrainSpec, optimizers

KEYS, VALUES, NOISE = 64, 16, 16  # token ids: noise and the mark, then values, then keys
MARK = 0
VOCABULARY = NOISE + VALUES + KEYS
Probe = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


def recall(rows: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [rows, length]; targets are IGNORE where nothing is asked."""
    pairs = length // 16
    keys = torch.rand(rows, KEYS, generator=draw).argsort(1)[:, :pairs]
    values = torch.randint(NOISE, NOISE + VALUES, (rows, pairs), generator=draw)
    order = torch.rand(rows, pairs, generator=draw).argsort(1)
    told = torch.stack([keys + NOISE + VALUES, values], 2).flatten(1)
    asked = torch.stack([keys.gather(1, order) + NOISE + VALUES, values.gather(1, order)], 2).flatten(1)
    noise = torch.randint(1, NOISE, (rows, length - 4 * pairs), generator=draw)
    tokens = torch.cat([told, noise, asked], 1)
    targets = torch.full_like(tokens, objectives.IGNORE)
    targets[:, -2 * pairs :: 2] = values.gather(1, order)
    return tokens, targets


def copy(rows: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [rows, length]."""
    half = length // 2
    text = torch.randint(1, VOCABULARY, (rows, half), generator=draw)
    tokens = torch.cat([text, torch.full((rows, 1), MARK), text[:, :-1]], 1)
    targets = torch.full_like(tokens, objectives.IGNORE)
    targets[:, half:] = text
    return tokens, targets


PROBES: dict[str, Probe] = {"recall": recall, "copy": copy}


def make(mixers: str, width: int, context: int) -> ShrewForCausalLM:
    """A convolution and a layer of each of these mixers, all with their default settings."""
    kinds = ["conv", *mixers.split("+")]
    unknown = [kind for kind in kinds if kind not in MIXERS]
    if unknown:
        raise SystemExit(f"no mixer '{unknown[0]}'; known: {', '.join(MIXERS)}")
    letters = "ABCDEFGH"[: len(kinds)]
    table = {letter: {"kind": kind} for letter, kind in zip(letters, kinds, strict=True)}
    model = {"pattern": letters, "layers": len(kinds), "width": width, "vocabulary": VOCABULARY,
             "context": context, "mixers": table}  # fmt: skip
    return build(spec.parse(ModelSpec, model, mixers))


def course(lengths: Sequence[int], step: int, steps: int) -> int:
    """The length of the rows of a step: 32 at first, and in the first half the longer ones join, one after the other;
    those that have joined take turns. Without the short rows none of the mixers finds the trick in so few steps."""
    short = [2**power for power in range(5, 12) if 2**power < min(lengths)]
    rows = [*short, *sorted(lengths)]
    return rows[step % min(len(rows), 1 + 2 * step * len(rows) // steps)]


def learn(model: ShrewForCausalLM, probe: Probe, lengths: Sequence[int], steps: int, tokens: int, rate: float,
          seed: int) -> float:  # fmt: skip
    """Train with warm-up and linear decay, by the optimizer of `shrew train` (AdamW alone needs several times the steps
    before any mixer finds the trick); CPU-seconds."""
    draw = torch.Generator().manual_seed(seed)
    made = optimizers(model, TrainSpec(data=[], out="", lr=rate, weight_decay=0.01))
    begun = time.process_time()
    model.train()
    for step in range(steps):
        length = course(lengths, step, steps)
        inputs, targets = probe(max(tokens // length, 1), length, draw)
        for group in (group for optimizer in made for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min((step + 1) / (0.05 * steps), 1.0, (steps - step) / (0.5 * steps))
        hidden, penalty = model.hidden(inputs)
        asked = targets != objectives.IGNORE  # only these need logits
        loss = objectives.next_token(model.logits(hidden[asked]), targets[asked]) / asked.sum()
        (loss if penalty is None else loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    return time.process_time() - begun


@torch.inference_mode()
def answers(model: ShrewForCausalLM, probe: Probe, length: int, count: int, seed: int) -> tuple[int, int]:
    """(right, asked) over rows of their own, about `count` answers and 16 rows at least."""
    draw = torch.Generator().manual_seed(2**40 + seed)
    right = asked = rows = 0
    while asked < count or rows < 16:
        tokens, targets = probe(4, length, draw)
        where = targets != objectives.IGNORE
        guess = model.logits(model.hidden(tokens)[0][where]).argmax(-1)
        right += int((guess == targets[where]).sum())
        asked, rows = asked + int(where.sum()), rows + len(tokens)
    return right, asked


def binomial(right: int, asked: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share (1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(name: str, mixers: str, args: argparse.Namespace, seed: int) -> list[Record]:
    """Train a model on one probe at each rate; a record for each length from the best of them."""
    tried: dict[float, tuple[float, float, ShrewForCausalLM]] = {}
    for rate in args.rates:
        machine.set_seed(seed)
        model = make(mixers, args.width, max(args.lengths))
        seconds = learn(model, PROBES[name], args.lengths, args.steps, args.batch_tokens, rate, seed)
        pairs = [answers(model, PROBES[name], length, args.answers // 4, 2**20 + seed) for length in args.lengths]
        tried[rate] = sum(right / asked for right, asked in pairs) / len(pairs), seconds, model
    rate = max(tried, key=lambda rate: tried[rate][0])
    _, seconds, model = tried[rate]
    found = []
    for length in args.lengths:
        right, asked = answers(model, PROBES[name], length, args.answers, seed)
        low, high = binomial(right, asked)
        detail: dict[str, Any] = {"length": length, "steps": args.steps, "batch_tokens": args.batch_tokens,
                                  "rate": rate, "tried": {f"{one:g}": tried[one][0] for one in tried},
                                  "width": args.width, "training_cpu_seconds": seconds,
                                  "interval": "binomial (Wilson), of this one trained model",
                                  "state_bytes": sum(layer.mixer.state_bytes(length) for layer in model.model.layers),
                                  "chance": 1 / (VALUES if name == "recall" else VOCABULARY - 1)}  # fmt: skip
        found.append(Record(run="recall", model=mixers, metric="accuracy", value=right / asked, task=name, n=asked,
                            low=low, high=high, seed=seed, detail=detail))  # fmt: skip
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown: accuracy by mixer and length, the mean of the seeds."""
    parts = []
    for name in dict.fromkeys(item.task for item in records):
        items = [item for item in records if item.task == name]
        lengths = sorted({item.detail["length"] for item in items})
        parts.append(f"| {name} | {' | '.join(map(str, lengths))} |\n|---|{'---|' * len(lengths)}")
        for mixers in dict.fromkeys(item.model for item in items):
            cells = []
            for length in lengths:
                mine = [item for item in items if item.model == mixers and item.detail["length"] == length]
                told = f"{sum(float(item.value or 0) for item in mine) / len(mine):.3f}"
                if len(mine) == 1:
                    told += f" ({mine[0].low:.3f} to {mine[0].high:.3f})"
                cells.append(told)
            parts.append(f"| {mixers} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def picture(records: Sequence[Record]) -> str:
    """Accuracy against length, an SVG with a panel for each probe."""
    found = []
    for name in dict.fromkeys(item.task for item in records):
        series: dict[str, list[panels.Point]] = {}
        for item in records:
            if item.task == name:
                point = panels.Point(item.detail["length"], float(item.value or 0), item.low, item.high)
                series.setdefault(item.model, []).append(point)
        found.append(panels.Panel(f"{name}: tokens in a row", series))
    return panels.draw(found, "accuracy")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="+", help=f"kinds, joined by + for a hybrid: {', '.join(MIXERS)}")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--answers", type=int, default=2000, help="at least so many answers a length")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    parser.add_argument("--plot", type=Path, help="SVG of the first seed to write")
    args = parser.parse_args(words)
    if min(args.lengths) < 16 or max(args.lengths) > 16 * KEYS:
        parser.error(f"lengths are 16 to {16 * KEYS}: a row of length T has T / 16 of {KEYS} keys")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    found: list[Record] = []
    for name in args.probes:
        for mixers in args.mixers:
            for seed in range(args.seeds):
                told = measure(name, mixers, args, seed)
                shown = ", ".join(f"{item.detail['length']}: {item.value:.3f}" for item in told)
                print(f"{name}, {mixers}, seed {seed}: {shown} ({told[0].detail['training_cpu_seconds']:.0f} CPU-s)",
                      file=sys.stderr, flush=True)  # fmt: skip
                found += told
                if args.records:
                    record.append(args.records, told)
    print(table(found))
    if args.plot:
        files.write_text(args.plot, picture([item for item in found if item.seed == 0]))


if __name__ == "__main__":
    main()
