"""Training speed: `shrew train` against the Hugging Face Trainer, on the starter's shape.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train.py --records results/records.jsonl

Both train the same weights on the same rows in the same precision with the same AdamW, in one process with one setting
of threads, and take turns step by step: our step runs inside the Trainer's own `on_step_end`, and the Trainer's clock
runs from the end of that to its next call. Each side has first been given the micro-batch that is fastest for it.
What is compared are tokens per CPU-second; a round's ratio is paired, and the interval is that of the mean log ratio.
"""

import argparse
import ast
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shrew.__main__ import ENVIRONMENT

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import numpy as np  # noqa: E402 - after the environment is set, as in the command line
import torch  # noqa: E402
import transformers  # noqa: E402

from shrew import data, errors, machine, record, spec  # noqa: E402
from shrew.blocks.model import build  # noqa: E402
from shrew.blocks.stock import stock  # noqa: E402
from shrew.data.tokenizer import train_tokenizer  # noqa: E402
from shrew.measure.statistics import student_quantile  # noqa: E402
from shrew.train import Loop, Recipe, TrainSpec, World, flops_per_token  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "starter.toml"
FLOOR, SHARE = 0.97, 0.4  # of the Trainer's speed at 8k tokens a step, and of the machine's bf16 matmul rate
UNTIMED = 1  # rounds that only warm caches and the allocator


@dataclass(frozen=True)
class Part:
    """One comparison. `rows` [n, tokens]: labelled rows for the Trainer, one step after the other."""

    name: str
    what: str
    item: TrainSpec
    stream: data.Stream
    rows: list[dict[str, torch.Tensor]]
    rows_a_step: int
    collate: Any
    tokens: Callable[[int], int]  # target tokens of the Trainer's step
    micros: tuple[int, ...]  # what may be computed at once, in rows
    rounds: int
    rates: bool = False


@dataclass(frozen=True)
class Round:
    """What one round cost: target tokens per CPU-second of both, and our FLOP/s over the machine's rates."""

    ours: float
    peer: float
    shares: dict[str, float]


class Turns(transformers.TrainerCallback):
    """Runs `other` after every step of the Trainer and keeps the CPU-seconds of both."""

    def __init__(self, other: Callable[[], Any]) -> None:
        self.other, self.began, self.peer, self.found = other, 0.0, [], []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.peer.append(time.process_time() - self.began)
        self.found.append(self.other())
        self.began = time.process_time()


def trainer(model: Any, part: Part, micro: int, steps: int, bf16: bool, where: str, turns: Turns) -> Any:
    """A Trainer at its fastest: fused AdamW, rows in memory, nothing logged, evaluated or saved."""
    item = part.item
    arguments = transformers.TrainingArguments(
        output_dir=where, max_steps=steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=part.rows_a_step // micro, optim="adamw_torch_fused", learning_rate=item.lr,
        lr_scheduler_type="constant", adam_beta2=0.95, adam_epsilon=1e-10, weight_decay=item.weight_decay,
        max_grad_norm=item.clip, bf16=bf16, use_cpu=True, train_sampling_strategy="sequential",
        dataloader_num_workers=0, dataloader_pin_memory=False, logging_strategy="no", save_strategy="no",
        eval_strategy="no", report_to="none", disable_tqdm=True, use_cache=False,
    )  # fmt: skip
    made = transformers.Trainer(model, arguments, part.collate, part.rows, callbacks=[turns])
    made.remove_callback(transformers.PrinterCallback)
    return made


def ours(model: Any, part: Part, bf16: bool, run: Path) -> Loop:
    return Loop(part.item, World(), model.train(), part.stream, None, run, bf16, lambda line: None)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def fastest(part: Part, fresh: Callable[[], Any], bf16: bool, where: Path) -> tuple[int, int]:
    """The micro-batch, in rows, that is fastest for us and for the Trainer: the second step of each counts."""
    loop, times = ours(fresh(), part, bf16, where), {}
    for micro in sorted({micro for micro in part.micros if micro <= loop.rows} | {loop.micro}):
        loop.micro = micro
        times[micro] = [cpu_seconds(loop.take_step)[0] for _ in range(2)][1]
    theirs = {}
    for micro in part.micros:
        turns = Turns(lambda: None)
        trainer(stock(fresh()), part, micro, 2, bf16, str(where), turns).train()
        theirs[micro] = turns.peer[1]
    return min(times, key=times.__getitem__), min(theirs, key=theirs.__getitem__)


def same_function(part: Part, model: Any) -> None:
    """Refuse to compare if the two models disagree on a row (the Trainer's labels lack the last target)."""
    loop = ours(model, part, False, Path())
    tokens, targets, owner = (torch.from_numpy(array[:1]) for array in loop.batches[0])
    with torch.no_grad():
        mine = loop._losses(tokens, targets, owner)[0].item() / int((targets != -100).sum())
        theirs = stock(model)(**{key: value[None] for key, value in part.rows[0].items()}).loss.item()
    if abs(mine - theirs) > 0.02 * theirs:
        raise errors.ShrewError(f"{part.name}: losses {mine:.4f} and {theirs:.4f}; this would compare two things.")


def compare(part: Part, fresh: Callable[[], Any], bf16: bool) -> tuple[list[Round], tuple[int, int]]:
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        micros = fastest(part, fresh, bf16, where)
        model = fresh()
        loop = ours(model, part, bf16, where)
        loop.micro = micros[0]
        flops = flops_per_token(model, part.item.length)

        def turn() -> tuple[float, int, dict[str, float]]:
            wall = time.perf_counter()
            cpu, (_, tokens) = cpu_seconds(loop.take_step)
            wall = time.perf_counter() - wall
            loop.step += 1
            kinds = {"bf16": torch.bfloat16, "fp32": torch.float32} if part.rates else {}
            rates = {kind: machine.matmul_rate(dtype) for kind, dtype in kinds.items()}
            return cpu, tokens, {kind: flops * tokens / wall / rate for kind, rate in rates.items()}

        turns = Turns(turn)
        steps = UNTIMED + part.rounds
        trainer(stock(fresh()), part, micros[1], steps, bf16, name, turns).train()
    rounds = [
        Round(tokens / cpu, part.tokens(step) / turns.peer[step], shares)
        for step, (cpu, tokens, shares) in enumerate(turns.found)
    ]
    return rounds[UNTIMED:], micros


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Geometric mean of positive values with its two-sided 95 % t interval."""
    logs = np.log(values)
    middle, error = float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(len(logs))
    half = student_quantile(0.975, len(logs) - 1) * error
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def functions(texts: list[data.Document]) -> Iterator[data.Document]:
    """Every function of these Python files as a document of its own: short texts of very different lengths."""
    for document in texts:
        lines = document.text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield data.Document(f"{document.id}:{node.lineno}", "".join(lines[node.lineno - 1 : node.end_lineno]))


def packed(name: str, item: TrainSpec, stream: data.Stream, tokens: int, rounds: int, rates: bool = False) -> Part:
    """Both on the very same packed rows, without document masks."""
    item = replace(item, batch_tokens=tokens)
    size = tokens // item.length
    batches = data.Batches(stream, item.length, size, item.seed)
    rows, counts = [], []
    for step in range(UNTIMED + rounds):
        inputs, targets, _ = batches[step]
        labels = np.concatenate([np.full((size, 1), -100), targets[:, :-1]], 1)  # the Trainer's model shifts them
        rows += [{"input_ids": torch.from_numpy(inputs[row]), "labels": torch.from_numpy(labels[row])}
                 for row in range(size)]  # fmt: skip
        counts.append(int((labels != -100).sum()))
    micros = tuple(micro for micro in (1, 2, 4, 8) if micro <= size and (size < 16 or micro > 1))
    return Part(name, f"{tokens} tokens a step, same packed rows", item, stream, rows, size,
                transformers.default_data_collator, counts.__getitem__, micros, rounds, rates)  # fmt: skip


def padded(item: TrainSpec, texts: list[data.Document], tokenizer: Any, rounds: int) -> Part:
    """Short documents: ours packed with document masks, the Trainer's cut to a row and padded to the longest."""
    documents = list({document.text: document for document in functions(texts)}.values())
    order = np.random.default_rng(item.seed).permutation(len(documents))
    documents = [documents[index] for index in order]
    stream = data.tokenize(documents, tokenizer)
    encoded = [row[: item.length] for row in data.encode(tokenizer, [document.text for document in documents])]
    mean = sum(map(len, encoded)) / len(encoded)
    size = max(round(item.batch_tokens / mean / 16), 1) * 16
    encoded = encoded[: size * (UNTIMED + rounds)]
    rows = [{"input_ids": torch.tensor(row)} for row in encoded]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def tokens(step: int) -> int:
        return sum(len(row) - 1 for row in encoded[step * size : (step + 1) * size])

    what = f"{len(documents)} functions of {mean:.0f} tokens on average: packed with document masks, against padded"
    item = replace(item, document_mask=True)
    return Part("documents", what, item, stream, rows, size, collate, tokens, (4, 8), rounds)


def parts(item: TrainSpec, rounds: int, wanted: list[str]) -> tuple[Any, list[Part]]:
    texts = data.documents(["python:evaluation"])
    tokenizer = train_tokenizer(texts, int(item.tokenizer.removeprefix("bpe:")), item.seed)
    tokenizer.model_max_length = 10**9  # rows are cut here, so no warning is due
    stream = data.tokenize(texts, tokenizer)
    makers: dict[str, Callable[[], Part]] = {
        "8k": lambda: packed("8k", item, stream, 8192, rounds, rates=True),
        "2k": lambda: packed("2k", item, stream, 2048, rounds),
        "1k": lambda: packed("1k", item, stream, 1024, rounds),
        "documents": lambda: padded(replace(item, batch_tokens=4096), texts, tokenizer, rounds),
    }
    for name in wanted:
        if name not in makers:
            raise errors.UsageError(f"no part '{name}'; {errors.nearest(name, makers)}")
    return tokenizer, [makers[name]() for name in wanted or makers]


def report(part: Part, rounds: list[Round], micros: tuple[int, int], about: dict[str, Any]) -> list[record.Record]:
    """Print one part and give its records."""
    about = about | {"part": part.name, "what": part.what, "micro_rows": micros[0], "trainer_micro_rows": micros[1]}

    def fact(model: str, metric: str, values: list[float], unit: str, **detail: Any) -> record.Record:
        value, low, high = mean_interval(values)
        return record.Record(run="benchmarks/train", model=model, metric=metric, value=value, low=low, high=high,
                             unit=unit, task=part.name, n=len(values), seed=0, detail=about | detail)  # fmt: skip

    speed = "target tokens per CPU-second"
    found = [
        fact("shrew train", "tokens_per_cpu_second", [item.ours for item in rounds], speed),
        fact("Hugging Face Trainer", "tokens_per_cpu_second", [item.peer for item in rounds], speed),
        fact("shrew train", "speed_ratio_to_trainer", [item.ours / item.peer for item in rounds], "times",
             rounds=[item.ours / item.peer for item in rounds]),
    ]  # fmt: skip
    shares = {kind: [item.shares[kind] for item in rounds] for kind in rounds[0].shares}
    found += [fact("shrew train", f"share_of_{kind}_matmul_rate", values, "") for kind, values in shares.items()]
    mine, theirs, ratio, *rest = found
    print(f"{part.name:<10} {mine.value:>8,.0f} {theirs.value:>8,.0f}   {ratio.value:.3f} ({ratio.low:.3f} to "
          f"{ratio.high:.3f}, {ratio.n} rounds)   {part.what}; rows at once {micros[0]}, {micros[1]}")  # fmt: skip
    for item in rest:
        print(f"{'':<10} {item.metric.replace('_', ' ')}: {item.value:.2f} ({item.low:.2f} to {item.high:.2f})")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds at 8k tokens a step (default 12)")
    parser.add_argument("--records", type=Path, help="append the records to this JSONL file")
    parser.add_argument("--precision", default="auto", help="fp32 or bf16; default: the faster here")
    parser.add_argument("parts", nargs="*", help="8k, 2k, 1k, documents; default: all")
    args = parser.parse_args()
    recipe = spec.parse(Recipe, spec.read_toml(RECIPE), str(RECIPE))
    item = replace(recipe.train, optimizer="adamw", lr=1e-3, warmup=0, decay=0.0, document_mask=False, steps=10**6)
    threads, precision = machine.choose_threads(), machine.choose_precision(args.precision)
    transformers.logging.set_verbosity_error()
    tokenizer, chosen = parts(item, max(args.rounds, 2), args.parts)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    def fresh() -> Any:
        machine.set_seed(item.seed)
        return build(replace(recipe.model, vocabulary=len(tokenizer)), **ids)

    import accelerate

    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, accelerate)}
    about = {"threads": threads.count, "precision": precision.name, "parameters": fresh().num_parameters(), **versions}
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"{about['parameters']:,} parameters; {threads.reason}; {precision.reason}.")
    print(f"{'':<10} {'shrew':>8} {'Trainer':>8}   ratio; tokens per CPU-second")
    found: list[record.Record] = []
    for part in chosen:
        if part.name != "documents":
            same_function(part, fresh())
        found += report(part, *compare(part, fresh, precision.name == "bf16"), about)
    if args.records:
        record.append(args.records, found)
    gates = {("8k", "speed_ratio_to_trainer"): FLOOR, ("8k", "share_of_bf16_matmul_rate"): SHARE}
    missed = [fact for fact in found if (fact.low or 0) < gates.get((fact.task, fact.metric), 0)]
    for fact in missed:
        print(f"Not met: {fact.metric} at least {fact.low:.3f}, and {gates[fact.task, fact.metric]} is asked for.")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(f"this needs '{error.name}'; run: pip install -r benchmarks/requirements.txt")
    except errors.ShrewError as error:
        sys.exit(str(error))
