"""`shrew describe RECIPE.toml|FOLDER`: what a model is made of and what it costs, without building it.

The model is made on torch's meta device: shapes without numbers, so 7 billion parameters take no memory and no time.
Everything that is printed is asked of the model and its blocks; no kind of block is known here.
"""

import argparse
import dataclasses
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, initialization

from shrew import spec
from shrew.blocks.model import FFNS, MIXERS, ModelSpec, ShrewConfig, ShrewForCausalLM, build
from shrew.blocks.stock import as_spec
from shrew.blocks.trunk import Layer
from shrew.errors import FolderError, ShrewError, SpecError, UnsupportedError, UsageError

SEQUENCE = (1024, 8192, 131072)
BITS, GROUP = 4, 128
MARKS = 3  # of fill-in-the-middle
WIDTH = 200  # so that a layer is one line where the output is piped; a terminal that is narrower wraps by itself
SMALLEST_ROW = 16  # the quantize move leaves narrower matrices alone


@dataclass(frozen=True)
class Known:
    """A published model: layers by the mixer and by the ffn that our blocks would take, width, total parameters."""

    name: str
    mixers: dict[str, int]
    ffns: dict[str, int]
    width: int
    parameters: float

    @property
    def layers(self) -> int:
        return sum(self.mixers.values())


def _dense(name: str, layers: int, width: int, parameters: float) -> Known:
    return Known(name, {"attention": layers}, {"mlp": layers}, width, parameters)


# From the models' own config.json, parameters counted by transformers on the meta device; the stories of llama2.c and
# White-Basilisk, whose weights are not public, as they are said to be, the latter's Mamba-1 taken for `linear`.
KNOWN = (
    _dense("stories260K", 5, 64, 260e3),
    _dense("stories15M", 6, 288, 15.2e6),
    _dense("stories42M", 8, 512, 41.7e6),
    _dense("stories110M", 12, 768, 109.5e6),
    _dense("GPT-2", 12, 768, 124.4e6),
    _dense("SmolLM2-135M", 30, 576, 134.5e6),
    _dense("SmolLM2-360M", 32, 960, 361.8e6),
    _dense("Qwen3-0.6B", 28, 1024, 596.0e6),
    _dense("TinyLlama-1.1B", 22, 2048, 1.100e9),
    _dense("Llama-3.2-1B", 16, 2048, 1.236e9),
    _dense("SmolLM2-1.7B", 24, 2048, 1.711e9),
    _dense("Qwen3-1.7B", 28, 2048, 1.721e9),
    _dense("Qwen3-4B", 36, 2560, 4.022e9),
    _dense("Llama-2-7B", 32, 4096, 6.738e9),
    _dense("Qwen3-8B", 36, 4096, 8.191e9),
    Known("Gemma-3-270m", {"window": 15, "attention": 3}, {"mlp": 18}, 640, 268.1e6),
    Known("Gemma-3-1b", {"window": 22, "attention": 4}, {"mlp": 26}, 1152, 999.9e6),
    Known("OLMoE-1B-7B", {"attention": 16}, {"moe": 16}, 2048, 6.919e9),
    Known("Qwen3-30B-A3B", {"attention": 48}, {"moe": 48}, 2048, 30.53e9),
    Known("LFM2-350M", {"conv": 10, "attention": 6}, {"mlp": 16}, 1024, 354.5e6),
    Known("LFM2-1.2B", {"conv": 10, "attention": 6}, {"mlp": 16}, 2048, 1.170e9),
    Known("Mamba2-130m", {"linear": 24}, {"none": 24}, 768, 129.0e6),
    Known("Mamba2-2.7b", {"linear": 64}, {"none": 64}, 2560, 2.703e9),
    Known("Granite-4.0-H-350M", {"linear": 28, "attention": 4}, {"mlp": 32}, 768, 340.3e6),
    Known("Granite-4.0-H-Micro", {"linear": 36, "attention": 4}, {"mlp": 40}, 2048, 3.191e9),
    Known("Qwen3-Next-80B-A3B", {"delta": 36, "attention": 12}, {"moe": 48}, 2048, 79.67e9),
    Known("White-Basilisk", {"linear": 10, "memory": 2}, {"mlp": 6, "moe": 6}, 512, 200e6),
)


def main(argv: list[str]) -> int:
    parser = spec.Parser(prog="shrew describe", description="Print what a model is made of and costs.")
    parser.add_argument("model", type=Path, help="a recipe (TOML with [model]) or a model folder")
    parser.add_argument("--sequence", action="append", type=_length, metavar="TOKENS",
                        help="a context to count at, like 4096 or 4k (default 1k, 8k, 128k); repeatable")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    item = read(args.model)
    found = describe(item, args.sequence or SEQUENCE)
    if args.json:
        print(json.dumps({"model": str(args.model), **found}, indent=1))
    else:
        show(str(args.model), item, found, Console(width=WIDTH))
    return 0


def _length(text: str) -> int:
    """'8k' -> 8192."""
    match = re.fullmatch(r"([1-9][0-9]{0,9})([kKmM]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of tokens; write it like 4096, 4k or 1m")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


# --- what is described -----------------------------------------------------------------------------------------------


def read(path: Path) -> ModelSpec:
    """The spec of a recipe or of a model folder, its vocabulary known."""
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise UsageError(f"There is no recipe and no model folder at {path}; check the path.")
    values = spec.read_toml(path)
    if not isinstance(values.get("model"), dict):
        raise SpecError(f"{path}: there is no table [model] in it, only {', '.join(values) or 'nothing'}; add it, or "
                        "give a model folder.")  # fmt: skip
    found = spec.parse(ModelSpec, values["model"], f"{path}: model")
    train = values.get("train")
    found = _with_entropies(found, train)
    if found.vocabulary:
        return found
    train = train if isinstance(train, dict) else {}
    tokenizer, marks = str(train.get("tokenizer", "")), MARKS if train.get("fim") else 0
    size = spec.BYTE_TOKENS + marks if tokenizer == "bytes" else spec.parse_bpe(tokenizer, marks)
    if size is None:
        raise SpecError(f"{path}: nothing says how many tokens there are; add vocabulary = 4096 (or what it is) to "
                        '[model], or tokenizer = "bpe:4096" to [train].')  # fmt: skip
    return dataclasses.replace(found, vocabulary=size)


def _with_entropies(item: ModelSpec, train: Any) -> ModelSpec:
    """The spec of a recipe with that of the model of bytes in it that [train] names."""
    front, source = item.patches, train.get("entropy") if isinstance(train, dict) else None
    if front is None or front.rule.kind != "entropy" or front.entropy or not source:
        return item
    return dataclasses.replace(item, front=dataclasses.replace(front, entropy=_of_folder(Path(source))))


def _of_folder(path: Path) -> ModelSpec:
    try:
        values = json.loads((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} is no model folder: there is no config.json in it.") from None
    except ValueError as error:
        raise FolderError(f"{path / 'config.json'} is no readable JSON ({error}).") from None
    names = values.get("architectures") if isinstance(values, dict) else None
    if isinstance(names, list) and names and not str(names[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedError(f"{path} holds a {names[0]}; `shrew describe` knows causal language models.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except ShrewError:
        raise
    except Exception as error:  # transformers raises what its configs' own checks raise
        reason = " ".join(str(error).split())[:150]
        raise FolderError(f"{path / 'config.json'} says no model that transformers knows ({reason}).") from None
    return config.parsed() if isinstance(config, ShrewConfig) else as_spec(config)


def shell(item: ModelSpec) -> ShrewForCausalLM:
    """The model of a spec on the meta device: every shape, no numbers."""
    with torch.device("meta"), initialization.no_init_weights():
        model = build(item)
    model.tie_weights()
    return model


# --- what is counted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """total: a tied matrix once. active: what a token's forward pass multiplies by, so the total without the experts
    and the like that it skips (`idle`) and without tables of which it looks up a row; the head, tied or not, is
    active. body: the active ones without the head: the size at which architectures are compared."""

    total: int
    active: int
    body: int


def parameters(model: ShrewForCausalLM) -> Parameters:
    head = model.lm_head.weight
    tables = {item.weight for item in model.modules() if isinstance(item, nn.Embedding)} - {head}
    layers: list[Any] = [item for item in model.modules() if isinstance(item, Layer)]
    total = sum(item.numel() for item in model.parameters())
    active = total - sum(item.numel() for item in tables) - sum(layer.ffn.idle() for layer in layers)
    return Parameters(total, active, active - head.numel())


def quantized_bytes(model: nn.Module, bits: int = BITS, group: int = GROUP) -> int:
    """Bytes of the weights as `quantize --bits 4 --group 128 --embeddings` stores them.

    A row of n weights takes ceil(n bits / 8) bytes and 2 for the bf16 scale of each group of it; what the move leaves
    alone (vectors, routers, convolutions, narrow matrices, saved buffers) takes 2 bytes a weight."""
    names = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    total, counted = 2 * sum(model.get_buffer(name).numel() for name in names), set()
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if weight in counted:
                continue
            counted.add(weight)
            table = isinstance(module, nn.Embedding)
            matrix = table or (isinstance(module, nn.Linear) and own == "weight") or weight.ndim == 3
            router = "router" in type(module).__name__.lower() or name.rpartition(".")[2] in ("gate", "router")
            if not matrix or router or (min(weight.shape[-2:]) < SMALLEST_ROW and not table):
                total += 2 * weight.numel()
            else:
                columns = weight.shape[-1]
                row = math.ceil(columns * bits / 8) + 2 * math.ceil(columns / group)
                total += weight.numel() // columns * row
    return total


def describe(item: ModelSpec, sequence: Any = SEQUENCE) -> dict[str, Any]:
    """Everything about a spec, as plain values."""
    model = shell(item)
    layers: list[Any] = list(model.model.layers)
    blocks = [(item.mixer(number), layer.ffn.spec) for number, layer in enumerate(layers)]
    count = parameters(model)
    return {
        "spec": spec.dump(item),
        "layers": [
            {
                "layer": number,
                "letter": item.pattern[number % len(item.pattern)],
                "mixer": spec.dump(mixer),
                "ffn": spec.dump(ffn),
                "parameters": sum(weight.numel() for weight in layer.parameters()),
                "idle": layer.ffn.idle(),
            }
            for number, (layer, (mixer, ffn)) in enumerate(zip(layers, blocks, strict=True))
        ],
        "parameters": dataclasses.asdict(count),
        **({"front": _front(model)} if item.patches else {}),
        "sequence": [
            {
                "tokens": tokens,
                "flops": model.flops(tokens),
                "state_bytes": model.state_bytes(tokens),
            }
            for tokens in sequence
        ],
        "bytes": {"bf16": 2 * count.total, "int4": quantized_bytes(model)},
        "nearest": nearest_model(blocks, item.width, count.total),
    }


def _front(model: Any) -> dict[str, Any]:
    """What a model of patches has besides its layers; numbers are of parameters where nothing else is said."""

    def held(*parts: Any) -> int:
        return sum(weight.numel() for part in parts if part is not None for weight in part.parameters())

    trunk, front = model.model, model.spec.patches
    tables = held(trunk.ngrams, trunk.hashes)
    return {
        "rule": front.rule.kind, "bytes_per_patch": front.bytes, "entropy": held(trunk.entropy), "tables": tables,
        "local": held(trunk.encoder, trunk.decoder, trunk.pool, trunk.cross), "tables_bf16_bytes": 2 * tables,
    }  # fmt: skip


# --- what it is like -------------------------------------------------------------------------------------------------


def nearest_model(blocks: list[tuple[Any, Any]], width: int, total: int) -> dict[str, Any]:
    """The published model that a model is most like, by the specs of each layer's mixer and ffn, its width and its
    parameters: the mix of blocks decides, in steps of a tenth of the layers, and among equals the distance of
    parameters, layers and width, each as a ratio."""
    mixers, ffns = (Counter(block.kind for block in column) for column in zip(*blocks, strict=True))

    def distance(known: Known) -> tuple[float, float]:
        sizes = ((total, known.parameters), (len(blocks), known.layers), (width, known.width))
        mix = _apart(mixers, known.mixers) + _apart(ffns, known.ffns)
        return round(mix, 1), sum(abs(math.log(mine / theirs)) for mine, theirs in sizes)

    known = min(KNOWN, key=distance)
    differs = []
    if len(blocks) != known.layers:
        differs.append(f"{len(blocks)} layers instead of {known.layers}")
    for mine, of_known in ((mixers, known.mixers), (ffns, known.ffns)):
        if _apart(mine, of_known) > 0:
            differs.append(f"{_mix(mine)} instead of {_mix(of_known)}")
    if width != known.width:
        differs.append(f"width {width:,} instead of {known.width:,}")
    if abs(math.log(total / known.parameters)) > 0.01:
        differs.append(f"{_scaled(total)} parameters instead of {_scaled(known.parameters)}")
    return {"name": known.name, "differs": differs}


def _apart(mine: dict[str, int], theirs: dict[str, int]) -> float:
    """The share of the layers that is of another kind, from 0 to 1."""
    a, b = sum(mine.values()), sum(theirs.values())
    return sum(abs(mine.get(kind, 0) / a - theirs.get(kind, 0) / b) for kind in {*mine, *theirs}) / 2


def _mix(counts: dict[str, int]) -> str:
    return " and ".join(f"{count} {kind}" for kind, count in counts.items())


# --- how it is shown -------------------------------------------------------------------------------------------------


def show(name: str, item: ModelSpec, found: dict[str, Any], console: Console) -> None:
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    say(f"{name}: {item.layers} layers of width {item.width:,}, {item.vocabulary:,} tokens, context {item.context:,}\n")
    table = Table("layer", "", "mixer", "ffn", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for line in found["layers"]:
        idle = f" ({line['idle']:,} idle)" if line["idle"] else ""
        table.add_row(str(line["layer"]), line["letter"], _settings(line["mixer"]), _settings(line["ffn"]),
                      f"{line['parameters']:,}{idle}")  # fmt: skip
    console.print(table)
    say()
    table = Table("after", box=None, pad_edge=False)
    for title in ("a token of a text", "decoding state"):
        table.add_column(title, justify="right")
    for line in found["sequence"]:
        after = f"{line['tokens']:,} tokens" + (" *" if line["tokens"] > item.context else "")
        table.add_row(after, _scaled(line["flops"], "FLOP"), _scaled(line["state_bytes"], "B"))
    console.print(table)
    if any(line["tokens"] > item.context for line in found["sequence"]):
        say("* longer than its context")
    if item.patches:
        front = found["front"]
        say(f"\npatches by {front['rule']}, taken to be of {front['bytes_per_patch']:g} bytes; a token is a byte; "
            f"{front['local']:,} parameters of local layers of width {item.patches.width:,}, {front['entropy']:,} of "
            f"the model of entropies, {front['tables']:,} parameters of n-gram tables "
            f"({_scaled(front['tables_bf16_bytes'], 'B')} in bf16)")  # fmt: skip
    count, weights, differs = found["parameters"], found["bytes"], found["nearest"]["differs"]
    say(f"\n{count['total']:,} parameters, {count['active']:,} active, {count['body']:,} of these without the head")
    say(f"{_scaled(weights['bf16'], 'B')} in bf16, {_scaled(weights['int4'], 'B')} at {BITS} bits with a scale for "
        f"each {GROUP}")  # fmt: skip
    say(f"like {found['nearest']['name']}" + (f", with {_listed(differs)}" if differs else " in layout and size"))


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def _settings(block: dict[str, Any]) -> str:
    """'attention, heads 8, kv_heads 2': numbers above 1, and whatever differs from its default."""
    kind = block["kind"]
    default = spec.dump({**MIXERS, **FFNS}[kind][0]())
    words = [kind]
    for key, value in block.items():
        if value != default.get(key) or (type(value) is int and value > 1):
            words.append((key if value else f"no {key}") if isinstance(value, bool) else f"{key} {value}")
    return ", ".join(words)


def _scaled(value: float, unit: str = "") -> str:
    """1_234_567 -> '1.23 M'; with a unit '1.23 MB'."""
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()
