"""What each architecture costs on a CPU: against attention, against transformers, and against length.

    python benchmarks/architectures.py layers --records results/records.jsonl    # one layer, 512 and 2,048 tokens
    python benchmarks/architectures.py length --records results/records.jsonl --plot docs    # 512 to 131,072 tokens
    python benchmarks/architectures.py read --records results/records.jsonl      # 131,072 tokens in one call
    python benchmarks/architectures.py decode --records results/records.jsonl    # after 32,768 tokens

Every time is that of the process on the CPU. `layers` alternates its arms in one process with one thread; the others
measure each arm in a process of its own, so that its peak memory is its own.
"""

import argparse
import gc
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shrew.__main__ import ENVIRONMENT

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import panels  # noqa: E402
import torch  # noqa: E402 - after the environment is set, as in the command line
import transformers  # noqa: E402
from fits import median_ratio  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding  # noqa: E402
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # noqa: E402
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet  # noqa: E402

from shrew import files, machine, objectives, record, spec  # noqa: E402
from shrew.blocks.layers import Place, Shape  # noqa: E402
from shrew.blocks.linear import MAMBA2  # noqa: E402
from shrew.blocks.model import FFNS, MIXERS, ModelSpec, build  # noqa: E402
from shrew.record import Record  # noqa: E402
from shrew.train import Recipe  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes"
WIDTH, HEADS, VOCABULARY, EPS = 256, 8, 2048, 1e-6
LENGTHS = [2**power for power in (9, 11, 12, 13, 14, 15, 16, 17)]
FAR = 4096  # from here on the growth is fitted
PASSES = 3  # the least counts: at the first touch of its memory the system zeroes every page
HEAD_CHUNK = 1024  # positions whose logits are held at once

# One layer of each mixer, at one width and number of heads.
LAYERS: dict[str, Any] = {
    "attention": {"kind": "attention", "heads": HEADS},
    "conv": {"kind": "conv"},
    "window": {"kind": "window", "heads": HEADS, "window": 128},
    "linear": {"kind": "linear", "heads": HEADS, "state": WIDTH // HEADS},
    "delta": {"kind": "delta", "heads": HEADS},
    "memory": {"kind": "memory", "heads": HEADS},
    "mamba2": spec.dump(MAMBA2),
}
# What forward and backward may cost, relative to attention, at 512 and at 2,048 tokens.
CEILINGS = {"conv": (0.75, 0.45), "window": (0.9, 0.45), "linear": (1.5, 0.7), "delta": (2.7, 2.0),
            "mamba2": (3.6, 2.0)}  # fmt: skip
# Whole models of 7 M parameters: recipe, and the letters of the mixers.
MODELS = {
    "dense": ("dense-7m", None), "hybrid": ("hybrid-7m", None), "conv-hybrid": ("conv-hybrid-7m", None),
    "linear alone": ("hybrid-7m", "L"), "conv alone": ("conv-hybrid-7m", "C"), "window alone": ("dense-7m", "W"),
    "delta alone": ("dense-7m", "D"), "memory alone": ("dense-7m", "M"),
}  # fmt: skip
MORE = {"W": LAYERS["window"], "D": LAYERS["delta"], "M": LAYERS["memory"]}
QUADRATIC = {"attention", "dense", "hybrid", "conv-hybrid"}


# --- one process, one thread: layers side by side


@dataclass(frozen=True)
class Timed:
    """A layer of ours or of transformers: x [B, T, d] -> y [B, T, d]."""

    name: str
    call: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]

    def seconds(self, x: Tensor) -> float:
        """CPU-seconds of a forward and a backward pass."""
        for p in self.parameters:
            p.grad = None
        begun = time.process_time()
        self.call(x).sum().backward()
        return time.process_time() - begun


def ours(name: str, settings: dict[str, Any], table: dict[str, tuple[Any, Any]] = MIXERS) -> Timed:
    spec_class, block_class = table[settings["kind"]]
    block = block_class(spec.parse(spec_class, settings, name), Shape(WIDTH, EPS, VOCABULARY))
    block.start(0.02, 0.02)

    def call(x: Tensor) -> Tensor:
        y = block(x) if table is FFNS else block(x, _place(*x.shape[:2]))
        return y[0] if table is FFNS else y

    return Timed(name, call, list(block.parameters()))


def _place(rows: int, length: int) -> Place:
    positions = torch.arange(length).expand(rows, length)
    return Place(torch.zeros_like(positions), positions)


def theirs(name: str) -> Timed:
    """transformers' layer of the same kind and size, as it runs on a CPU without further packages."""
    if name == "conv":
        block: Any = Lfm2ShortConv(transformers.Lfm2Config(hidden_size=WIDTH), 0)
        call = block
    elif name == "window":
        config: Any = transformers.Gemma3TextConfig(
            hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS,
            num_hidden_layers=2, sliding_window=LAYERS["window"]["window"],
            layer_types=["sliding_attention", "full_attention"])  # fmt: skip
        config._attn_implementation = "sdpa"
        block, rotary = Gemma3Attention(config, 0), Gemma3RotaryEmbedding(config)

        def call(x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            far = place[:, None] - place
            mask = ((far >= 0) & (far < config.sliding_window))[None, None]
            return block(x, rotary(x, place[None], "sliding_attention"), mask)[0]

    elif name == "delta":
        config = transformers.Qwen3NextConfig(
            hidden_size=WIDTH, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
            linear_key_head_dim=WIDTH // HEADS, linear_value_head_dim=WIDTH // HEADS)  # fmt: skip
        block = call = Qwen3NextGatedDeltaNet(config, 0)
    elif name == "mamba2":
        config = transformers.Mamba2Config(hidden_size=WIDTH, num_heads=HEADS, head_dim=2 * WIDTH // HEADS,
                                           state_size=64, n_groups=1, chunk_size=64)  # fmt: skip
        block = call = Mamba2Mixer(config, 0)
    else:
        config = transformers.OlmoeConfig(hidden_size=WIDTH, intermediate_size=3 * WIDTH // 2, num_experts=8,
                                          num_experts_per_tok=2)  # fmt: skip
        config._experts_implementation = "grouped_mm"
        block = OlmoeSparseMoeBlock(config)
        for p in block.parameters():
            nn.init.normal_(p, std=0.02)

        def call(x: Tensor) -> Tensor:
            y = block(x)
            return y[0] if isinstance(y, tuple) else y

    return Timed(f"{name} (transformers)", call, list(block.parameters()))


def layers(args: argparse.Namespace) -> bool:
    """Forward and backward of one layer against attention, and against transformers; every ratio is of one round."""
    machine.keep_memory()  # as `shrew train` does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    facts, good = [], True
    peers = ["conv", "window", "delta", "mamba2", "moe"]
    for length in (512, 2048):
        x = torch.randn(2048 // length, length, WIDTH, requires_grad=True)
        arms = [ours(name, settings) for name, settings in LAYERS.items()]
        arms += [ours("moe", {"kind": "moe"}, FFNS), ours("mlp", {"kind": "mlp"}, FFNS)]
        arms += [theirs(name) for name in peers]
        for arm in arms:
            arm.seconds(x)  # warms caches and the allocator
        # In another order every round: an arm finds the caches and the heap as the one before it left them.
        orders = [random.sample(arms, len(arms)) for _ in range(args.rounds)]
        rounds = [{arm.name: arm.seconds(x) for arm in order} for order in orders]
        for arm in arms:
            ratios = sorted(one[arm.name] / one["attention"] for one in rounds)
            ceiling = CEILINGS.get(arm.name, (math.inf, math.inf))[length > 512]
            detail = {"length": length, "rounds": args.rounds, "ceiling": ceiling if math.isfinite(ceiling) else None,
                      "microseconds_per_token": statistics.median(one[arm.name] for one in rounds) / 2048 * 1e6}
            facts.append(_ratio("forward_backward_over_attention", arm.name, ratios, detail))
            good &= statistics.median(ratios) <= ceiling
        for name in peers:
            ratios = sorted(one[f"{name} (transformers)"] / one[name] for one in rounds)
            facts.append(_ratio("transformers_over_ours", name, ratios, {"length": length, "rounds": args.rounds}))
            good &= statistics.median(ratios) > 1
    show(facts, ["model", "metric", "length", "value", "low", "high"])
    keep(args, facts)
    return good


def _ratio(metric: str, model: str, ratios: list[float], detail: dict[str, Any]) -> Record:
    """The median of the rounds with its interval."""
    value, low, high = median_ratio(ratios)
    return Record(run="architectures", model=model, metric=metric, value=value, unit="ratio",
                  n=len(ratios), low=low, high=high, detail=detail)  # fmt: skip


# --- a process of its own: cost against length


def model_of(name: str) -> Any:
    recipe, pattern = MODELS[name]
    found = spec.parse(Recipe, spec.read_toml(RECIPES / "contest" / f"{recipe}.toml"), recipe).model
    mixers = found.mixers | {letter: spec.parse(MIXERS[it["kind"]][0], it, letter) for letter, it in MORE.items()}
    return build(replace(found, vocabulary=VOCABULARY, mixers=mixers, pattern=pattern or found.pattern))


def probe(name: str, mode: str, lengths: Iterable[int]) -> None:
    """Print one JSON line for each length, rising: least CPU-seconds of a pass, and the peak memory of this process."""
    machine.keep_memory()  # as `shrew train` does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = _layer_work(name, mode) if name in LAYERS else _model_work(name, mode)
    work(512)
    for length in lengths:
        gc.collect()
        seconds = min(work(length) for _ in range(PASSES))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"length": length, "seconds": seconds, "peak": peak}), flush=True)


def _layer_work(name: str, mode: str) -> Callable[[int], float]:
    spec_class, block_class = MIXERS[LAYERS[name]["kind"]]
    block = block_class(spec.parse(spec_class, LAYERS[name], name), Shape(WIDTH, EPS, VOCABULARY))
    block.start(0.02, 0.02)

    def work(length: int) -> float:
        x = torch.randn(1, length, WIDTH)
        begun = time.process_time()
        if mode == "train":
            x.requires_grad_()
            block(x, _place(1, length)).sum().backward()
        elif mode == "forward":
            with torch.inference_mode():
                block(x, _place(1, length))
        else:
            return _decoded(block.init_state(), length, lambda place, state: block(x[:, : place.tokens.shape[1]],
                                                                                 place, state))  # fmt: skip
        return time.process_time() - begun

    return work


def _decoded(state: Any, length: int, step: Callable[[Place, Any], Any], count: int = 32) -> float:
    """CPU-seconds of one token after `length` others."""
    with torch.inference_mode():
        step(_place(1, length), state)
        begun = 0.0
        for at in range(length, length + count + 4):
            begun = time.process_time() if at == length + 4 else begun
            positions = torch.full((1, 1), at)
            if hasattr(state, "held"):
                state.seen = at
            step(Place(torch.zeros_like(positions), positions, seen=at), state)
        return (time.process_time() - begun) / count


def _model_work(name: str, mode: str) -> Callable[[int], float]:
    model = model_of(name)
    model.train(mode == "train")

    def work(length: int) -> float:
        tokens = torch.randint(VOCABULARY, (1, length + 1))
        begun = time.process_time()
        if mode == "forward":
            with torch.inference_mode():
                model(tokens[:, :-1], logits_to_keep=1)
        elif mode == "train":
            hidden, penalty = model.hidden(tokens[:, :-1])
            loss = objectives.chunked_next_token(hidden, model.logits, tokens[:, 1:], HEAD_CHUNK)
            (loss if penalty is None else loss + penalty).backward()
            model.zero_grad(set_to_none=True)
        else:
            cache = model.model.new_cache()
            return _decoded(cache, length, lambda place, cache: model(place.tokens, past_key_values=cache,
                                                                      logits_to_keep=1))  # fmt: skip
        return time.process_time() - begun

    return work


def child(*words: str, threads: int = 1) -> list[dict[str, Any]]:
    """The JSON lines that this script prints in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False,
                          env=environment)  # fmt: skip
    if done.returncode:
        say(f"{' '.join(words)} ended with exit code {done.returncode}.")
    return [json.loads(line) for line in done.stdout.splitlines()]


def length(args: argparse.Namespace) -> bool:
    """Forward pass, training step and decoded token at every length; the exponent of each from 4,096 on."""
    facts, good = [], True
    for name in [*LAYERS, *MODELS]:
        for mode in ("forward", "train", "decode"):
            longest = args.longest
            if name in MODELS and mode == "train":
                longest = min(longest, args.longest_training)
            if name in QUADRATIC:
                longest = min(longest, args.longest_quadratic)
            lengths = [at for at in LENGTHS if at <= longest]
            say(f"{name}, {mode}, up to {lengths[-1]:,} tokens")
            found = child("probe", name, mode, *map(str, lengths))
            slope = exponent([(one["length"], one["seconds"]) for one in found if one["length"] >= FAR])
            linear = name not in QUADRATIC
            good &= len(found) == len(lengths) and (not linear or slope <= (0.1 if mode == "decode" else 1.05))
            facts += [Record(run="architectures", model=name, metric=f"{mode}_cpu_seconds", value=one["seconds"],
                             unit="s", detail={"length": one["length"], "peak_bytes": one["peak"]}) for one in found]
            facts.append(Record(run="architectures", model=name, metric=f"{mode}_exponent", value=slope,
                                detail={"from": FAR, "to": lengths[-1]}))  # fmt: skip
            keep(args, facts[-len(found) - 1 :])
    show([one for one in facts if one.metric.endswith("exponent")], ["model", "metric", "from", "to", "value"])
    if args.plot:
        for what, names in (("layers", LAYERS), ("models", MODELS)):
            files.write_text(args.plot / f"length-{what}.svg", picture([one for one in facts if one.model in names]))
    return good


def picture(facts: list[Record]) -> str:
    """Microseconds a token against length: forward pass, training step, one decoded token."""
    found = []
    for mode, label in (("forward", "tokens read"), ("train", "tokens trained on"), ("decode", "tokens before one")):
        series: dict[str, list[panels.Point]] = {}
        for one in facts:
            if one.metric == f"{mode}_cpu_seconds":
                length = one.detail["length"]
                each = float(one.value or 0) * 1e6 / (1 if mode == "decode" else length)
                series.setdefault(one.model, []).append(panels.Point(length, math.log10(each)))
        found.append(panels.Panel(label, series))
    return panels.draw(found, "CPU-microseconds a token", powers=True)


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log(seconds) against log(length), least squares; NaN for fewer than two points."""
    if len(points) < 2:
        return math.nan
    fit = statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return fit.slope


# --- 131,072 tokens in one call


def dense_twin(found: ModelSpec, active: int) -> ModelSpec:
    """Attention and one MLP in every layer, with the MLP's width chosen for `active` parameters."""
    mixer = spec.parse(MIXERS["attention"][0], {"heads": 8}, "twin")
    def twin(hidden: int) -> ModelSpec:
        return replace(found, pattern="A", mixers={"A": mixer}, ffn=spec.parse(FFNS["mlp"][0], {"hidden": hidden}, ""))

    def size(hidden: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(twin(hidden)).parameters())

    slope = size(2) - size(1)
    return twin(max(1, round((active - size(1)) / slope) + 1))


def read_one(name: str, count: int) -> None:
    """Print wall and CPU-seconds, peak memory and loss of one call on `count` tokens with bf16 weights."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    found = spec.parse(Recipe, spec.read_toml(RECIPES / "white-basilisk.toml"), "white-basilisk").model
    found = replace(found, vocabulary=found.vocabulary or 49152)
    with torch.device("meta"):
        meta = build(found)
        total = sum(p.numel() for p in meta.parameters())
        active = total - sum(layer.ffn.idle() for layer in meta.model.layers)
    model = build(found if name == "white-basilisk" else dense_twin(found, active)).bfloat16().eval()
    tokens = torch.randint(model.spec.vocabulary, (1, count + 1))
    wall, cpu = time.monotonic(), time.process_time()
    with torch.inference_mode():
        hidden, _ = model.hidden(tokens[:, :-1])
        loss = objectives.chunked_next_token(hidden, model.logits, tokens[:, 1:], HEAD_CHUNK) / count
        last = model.logits(hidden[:, -1])
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = sum(p.numel() for p in model.parameters())
    print(json.dumps({"model": name, "tokens": count, "wall": wall, "cpu": cpu, "peak": peak, "loss": loss.item(),
                      "finite": bool(last.isfinite().all()), "parameters": mine, "active": active}))  # fmt: skip


def read(args: argparse.Namespace) -> bool:
    facts = []
    plan = [("white-basilisk", args.longest), ("white-basilisk", args.longest_quadratic),
            ("dense twin", args.longest_quadratic)]  # fmt: skip
    for name, count in plan:
        say(f"{name}: {count:,} tokens in one call")
        for one in child("read-one", name, str(count), threads=2):
            detail = {"length": count, "parameters": one["parameters"], "active": one["active"], "loss": one["loss"]}
            facts += [Record(run="architectures", model=name, metric=f"read_{key}", value=one[key], unit=unit,
                             detail=detail)
                      for key, unit in (("wall", "s"), ("cpu", "s"), ("peak", "bytes"))]  # fmt: skip
    show(facts, ["model", "metric", "length", "value"])
    keep(args, facts)
    peaks = [one.value for one in facts if one.metric == "read_peak" and one.model == "white-basilisk"]
    return len(facts) == 3 * len(plan) and max(map(float, peaks)) < 8e9


# --- decoding after a long text


def decode_one(name: str, context: int, count: int) -> None:
    """Print CPU-seconds of a token that `generate` makes after `context` others, and the bytes of the state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = model_of(name).eval()
    tokens, cache = torch.randint(VOCABULARY, (1, context)), model.model.new_cache()
    with torch.inference_mode():
        for low in range(0, context - 1, FAR):
            model(tokens[:, low : min(low + FAR, context - 1)], past_key_values=cache, logits_to_keep=1)
        held = sum(one.nbytes() if hasattr(one, "held") else one.keys.nbytes + one.values.nbytes
                   for one in cache.layers)  # fmt: skip
        begun = time.process_time()
        done = model.generate(tokens, past_key_values=cache, attention_mask=torch.ones_like(tokens), do_sample=False,
                              max_new_tokens=count, min_new_tokens=count)  # fmt: skip
    spent = time.process_time() - begun
    assert done.shape[1] == context + count
    print(json.dumps({"model": name, "context": context, "tokens_per_cpu_second": count / spent, "state": held}))


def decode(args: argparse.Namespace) -> bool:
    found = [one for name in ("dense", "hybrid", "conv-hybrid", "linear alone")
             for one in child("decode-one", name, "32768", "64")]  # fmt: skip
    facts = []
    for one in found:
        detail = {"length": one["context"], "tokens": 64}
        facts += [Record(run="architectures", model=one["model"], metric="generate_tokens_per_cpu_second",
                         value=one["tokens_per_cpu_second"], unit="tokens/CPU-s", detail=detail),
                  Record(run="architectures", model=one["model"], metric="state_bytes", value=one["state"],
                         unit="bytes", detail=detail)]  # fmt: skip
    show(facts, ["model", "metric", "length", "value"])
    keep(args, facts)
    return len(found) == 4


# --- told


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(facts: list[Record], columns: list[str]) -> None:
    table = Table(*columns)
    for one in facts:
        values = [getattr(one, name, one.detail.get(name)) for name in columns]
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


def keep(args: argparse.Namespace, facts: list[Record]) -> None:
    if args.records:
        record.append(args.records, facts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("layers", "length", "read", "decode"):
        one = verbs.add_parser(name)
        one.add_argument("--records", type=Path, help="JSONL file that the records are added to")
        one.add_argument("--rounds", type=int, default=15, help="of alternated timing (layers)")
        one.add_argument("--plot", type=Path, help="folder for the pictures (length)")
        one.add_argument("--longest", type=int, default=131_072)
        one.add_argument("--longest-training", type=int, default=32_768, help="of whole models, which hold activations")
        one.add_argument("--longest-quadratic", type=int, default=32_768, help="of whatever has full attention")
    one = verbs.add_parser("probe")
    one.add_argument("name", choices=[*LAYERS, *MODELS])
    one.add_argument("mode", choices=["forward", "train", "decode"])
    one.add_argument("lengths", type=int, nargs="+")
    one = verbs.add_parser("read-one")
    one.add_argument("name", choices=["white-basilisk", "dense twin"])
    one.add_argument("count", type=int)
    one = verbs.add_parser("decode-one")
    one.add_argument("name", choices=MODELS)
    one.add_argument("context", type=int)
    one.add_argument("count", type=int)
    args = parser.parse_args()
    match args.verb:
        case "probe":
            probe(args.name, args.mode, args.lengths)
        case "read-one":
            read_one(args.name, args.count)
        case "decode-one":
            decode_one(args.name, args.context, args.count)
        case verb:
            return 0 if {"layers": layers, "length": length, "read": read, "decode": decode}[verb](args) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
