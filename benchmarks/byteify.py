"""What a model of tokens is worth to a model of bytes: `byteify` on the starter against the same shape from scratch.

    python benchmarks/byteify.py --records results/records.jsonl

Arms, all of one shape, cut by the same entropies, with the same optimizer on the same windows in the same order:
`byteify` as the move does it; `taught`, half of whose loss are the original's predictions; `scratch`, every weight new
and all of them trained from the first step at the full rate. Each takes as many steps as the FLOPs of `byteify` pay
for, the original's forward passes and the model of the entropies included; a layer that is frozen saves the products of
its weights' gradients. What training the original cost is in none of them. Bits per byte are of the
starter's evaluation texts; intervals are of joint resamples of documents, of these trained models.

An arm that is done is kept in --work, and one that was interrupted goes on from its last checkpoint.

It then asks what drafting could gain in decoding. Within a patch the local layers already write by themselves. Across
its end they could go on with the vectors of the patch before, and the layers on patches check several ends in one
pass. `draft_bound` is how many times faster decoding byte by byte were if these cost nothing at all (of the CPU time
of the process), `draft_accepted` how many of the DRAFT bytes drafted at the end of a patch are those of plain greedy
decoding, both along real texts: a model of little training repeats itself, in long patches.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shrew.__main__ import ENVIRONMENT

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import numpy as np  # noqa: E402
import torch  # noqa: E402 - after the environment is set, as in the command line

from shrew import folder, record  # noqa: E402
from shrew.blocks.model import ShrewForCausalLM  # noqa: E402
from shrew.blocks.stock import adopt  # noqa: E402
from shrew.folder import Loaded  # noqa: E402
from shrew.moves import Context, Source  # noqa: E402
from shrew.moves.byteify import BYTES, Byteify, Training, check, said, spelled, student  # noqa: E402
from shrew.moves.distil.marginals import END  # noqa: E402
from shrew.moves.source import context_of, open_task  # noqa: E402
from shrew.record import Record  # noqa: E402
from shrew.tasks.scores import Scores, weights  # noqa: E402

SAMPLES = 2000
PROMPT, READ, DRAFT = 300, 100, 8  # bytes of each text in one pass, then one by one, and drafted at once


@dataclass(frozen=True)
class Arm:
    copied: bool
    changes: dict[str, Any]


ARMS = {
    "byteify": Arm(True, {}),
    "taught": Arm(True, {"teacher": 0.5}),
    "scratch": Arm(False, {"frozen": 0.0, "slow": 1.0}),
}


def flops(move: Byteify, model: ShrewForCausalLM, original: ShrewForCausalLM, pairs: Sequence[Any]) -> float:
    """FLOPs of a training, all steps together."""
    tokens, size = (float(np.mean([len(pair[at]) for pair in pairs])) for at in (0, 1))
    trunk: Any = model.model
    oracle = trunk.entropy.model.flops(round(size / 2))
    oracle += 2 * trunk.entropy.spec.width * trunk.entropy.spec.vocabulary
    layers = sum(layer.flops(round(tokens / 2)) for layer in trunk.layers) / trunk.front.bytes
    each = 3 * (model.flops(round(size / 2)) - oracle) + oracle
    taught = original.flops(round(tokens / 2)) * tokens if move.teacher else 0.0
    frozen = round(move.frozen * move.steps) * layers * size
    return move.rows * (move.steps * (each * size + taught) - frozen)


def equal(move: Byteify, budget: float, *more: Any) -> Byteify:
    """The move with as many steps as the budget pays for."""
    low, high = 1, 100 * move.steps
    while low + 1 < high:
        middle = (low + high) // 2
        fits = flops(replace(move, steps=middle), *more) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return replace(move, steps=low)


def train(name: str, move: Byteify, model: ShrewForCausalLM, original: Loaded, pairs: Any, context: Context,
          work: Path) -> None:  # fmt: skip
    """Train an arm and keep it in its folder."""
    part = work / f"{name}.part"
    whole = not (part / "training.pt").exists()
    teacher = original if move.teacher else None
    begun = time.process_time()
    Training(move, model, teacher, pairs, replace(context, work=part)).run()
    seconds = time.process_time() - begun if whole else None
    folder.save(Loaded(model, BYTES, lineage={"cpu_seconds": seconds, "steps": move.steps}), work / name)
    (part / "training.pt").unlink(missing_ok=True)


@torch.no_grad()
def drafts(model: Any, texts: Sequence[str]) -> tuple[float, list[int]]:
    """The share of the layers on patches in the CPU time of decoding; how many bytes of each draft are right."""
    trunk, found = model.model, []
    run, close, inside, whole = trunk._run, trunk._ends, 0.0, 0.0

    def timed(*given: Any) -> Any:
        nonlocal inside
        begun = time.process_time()
        made = run(*given)
        inside += time.process_time() - begun
        return made

    def open_ended(*given: Any) -> Any:
        closed, chance = close(*given)
        return torch.zeros_like(closed), chance

    def following(last: torch.Tensor, cache: Any) -> torch.Tensor:
        return model(last, past_key_values=cache).logits[:, -1:].argmax(-1)

    def greedy(last: torch.Tensor, cache: Any) -> list[int]:
        cache, written = copy.deepcopy(cache), [last]
        for _ in range(DRAFT):
            written.append(following(written[-1], cache))
        return [int(byte) for byte in written[1:]]

    for text in texts:
        tokens = torch.tensor([[END, *text.encode()[: PROMPT + READ]]])
        cache = trunk.new_cache()
        following(tokens[:, :PROMPT], cache)
        for at in range(PROMPT, tokens.shape[1]):
            byte, other, patches = tokens[:, at : at + 1], copy.deepcopy(cache), len(cache.layers[-1].documents[0])
            begun, trunk._run = time.process_time(), timed
            following(byte, cache)
            trunk._run = run
            whole += time.process_time() - begun
            if len(cache.layers[-1].documents[0]) == patches:
                continue  # no patch ends with this byte
            wanted = greedy(byte, other)
            trunk._ends = open_ended
            drafted = greedy(byte, other)
            trunk._ends = close
            found.append(next((place for place in range(DRAFT) if drafted[place] != wanted[place]), DRAFT))
    return inside / whole, found


def drafted(model: Any, texts: Sequence[str], seed: int) -> list[Record]:
    share, found = drafts(model, texts)
    detail = {"texts": len(texts), "read": READ, "share": share, "accepted": np.bincount(found).tolist()}
    drawn = np.concatenate(list(weights(len(found), SAMPLES, seed))) @ np.array(found) / len(found)
    low, high = spread(drawn)
    return [Record(run="byteify", model="byteify", metric="draft_bound", value=1 / (1 - share), unit="x", seed=seed,
                   n=len(texts), detail=detail),
            Record(run="byteify", model="byteify", metric="draft_accepted", value=float(np.mean(found)), unit="bytes",
                   n=len(found), low=low, high=high, seed=seed, detail=detail)]  # fmt: skip


def spread(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def told(scores: dict[str, Scores], details: dict[str, dict[str, Any]], seed: int) -> list[Record]:
    """A record for each model, and one for each difference to `scratch`."""
    first = next(iter(scores.values()))
    drawn = np.concatenate(list(weights(first.n, SAMPLES, seed)))
    found = []
    for name, item in scores.items():
        common: dict[str, Any] = {"run": "byteify", "task": f"{item.task}/{item.split}", "n": item.n, "seed": seed,
                                  "unit": "bits/byte", "detail": details.get(name, {})}  # fmt: skip
        values = item.values(drawn)
        low, high = spread(values)
        found.append(Record(model=name, metric="bits_per_byte", value=item.value(), low=low, high=high, **common))
        other = scores.get("scratch")
        if other is not None and name != "scratch":
            item.check_pair(other)
            low, high = spread(values - other.values(drawn))
            found.append(Record(model=f"{name} - scratch", metric="bits_per_byte_difference", low=low, high=high,
                                value=item.value() - other.value(), **common))  # fmt: skip
    return found


def table(records: Sequence[Record]) -> str:
    lines = ["| model | bits per byte, or metric | steps | training FLOPs | CPU-seconds |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for item in records:
        seen, cost = item.detail, ""
        if item.metric == "bits_per_byte" and seen:
            seconds = "" if seen["cpu_seconds"] is None else f"{seen['cpu_seconds']:.0f}"
            cost = f"{seen['steps']} | {seen['flops']:.3g} | {seconds}"
        value = f"{item.value:.4f}" + ("" if item.low is None else f" ({item.low:.4f} to {item.high:.4f})")
        name = item.model if item.metric.startswith("bits_per_byte") else f"{item.model}, {item.metric}"
        lines.append(f"| {name} | {value} | {cost or ' | | '} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=150, help="of `byteify`; the others' follow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/byteify"))
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args()
    torch.set_num_threads(1)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    original = folder.load(args.model)
    source = Source(model=args.model, seed=args.seed, threads=1)
    task = open_task(source, original)
    context = context_of(source, original, task, say)
    pairs = spelled(context.healing, check(original, context))
    ours, texts = adopt(original.model), [said(row) for _, row in pairs]
    scores, details = {"original": task.score(original, "final")}, {}
    whole, budget = Byteify(steps=args.steps), 0.0
    for name in ["byteify", *(arm for arm in args.arms if arm != "byteify")]:
        arm = ARMS[name]
        torch.manual_seed(args.seed)
        move = replace(whole, **arm.changes)
        model = student(move, ours, texts, arm.copied)
        budget = budget or flops(whole, model, ours, pairs)
        move = equal(move, budget, model, ours, pairs) if name != "byteify" else move
        place = args.work / f"{args.steps}-{args.seed}"
        if not (place / name / folder.LINEAGE).exists():
            say(f"{name}: {move.steps} steps")
            train(name, move, model, original, pairs, context, place)
        loaded = folder.load(place / name)
        scores[name] = task.score(loaded, "final")
        front = model.spec.patches
        details[name] = {
            "steps": move.steps, "rows": move.rows, "flops": flops(move, model, ours, pairs),
            "cpu_seconds": loaded.lineage["cpu_seconds"], "parameters": model.num_parameters(),
            "bytes_per_patch": front.bytes if front else None,
            "interval": "joint resamples of documents, of one trained model each",
        }  # fmt: skip
        say(f"{name}: {scores[name].value():.4f} bits per byte")
    found = told(scores, details, args.seed)
    some = [item.text for item in task.examples("search")[:6]]
    found += drafted(folder.load(place / "byteify").model, some, args.seed)
    if args.records:
        record.append(args.records, found)
    print(table(found))


if __name__ == "__main__":
    main()
