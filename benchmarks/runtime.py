"""Tokens per second of packed models against llama.cpp, onnxruntime-genai and torch, one sequence and eight.

    python benchmarks/runtime.py WORK --llama PYTHON --genai PYTHON --records results/records.jsonl
    python benchmarks/runtime.py WORK --llama PYTHON --no-torch --models qwen3 gemma3 lfm2 olmoe mamba2 granite-hybrid

PYTHON are those of environments with llama-cpp-python, and with onnxruntime-genai, onnx-ir, torch and transformers. Two
models: the starter and a random llama of 104 M parameters; or random ones of eight layers and width 512, of the other
architectures that llama.cpp runs too. Ours are quantized by `shrew apply` and packed; llama.cpp's types are made from
our F16 file by its own quantizer (speed alone is compared here, so without an importance matrix); genai's by its model
builder; torch runs the folder in bf16, compiled. Every arm is a process of its own, with one and
with two threads, and all take turns: each prompt is new, text is greedy and equally long for all. Prefill is the time
to the first token; decoding is what the further tokens take. Of the two thread counts an arm's better one is told.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fits import median_ratio

from shrew import folder, record
from shrew.__main__ import ENVIRONMENT
from shrew.record import Record

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any] | None] = {
    "starter": None,
    "llama-100m": {"layers": 16, "width": 768, "vocabulary": 4096, "context": 1024,
                   "mixers": {"A": {"kind": "attention", "heads": 12, "kv_heads": 4}}, "ffn": {"hidden": 2048}},
}  # fmt: skip
SIZE = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 1536, "max_position_embeddings": 1024}  # fmt: skip
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512,
               "rope_parameters": {name: {"rope_type": "default", "rope_theta": 10000.0}
                                   for name in ("full_attention", "sliding_attention")},
               "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "block_multiple_of": 256},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 8, "intermediate_size": 512},
    "mamba2": {"num_heads": 16, "head_dim": 64, "state_size": 128, "n_groups": 1},
    "granite-hybrid": MAMBA | {"shared_intermediate_size": 1536,
                               "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2},
}  # fmt: skip
OURS = {"int4 g32": (4, 32), "int4 g128": (4, 128), "int8 g128": (8, 128)}
LLAMA = {"Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
BITS = {"int4 g32": 4, "int4 g128": 4, "int8 g128": 8, "Q4_0": 4, "Q4_K_M": 4, "Q8_0": 8, "genai int4": 4, "bf16": 16}
ENOUGH = 6  # rounds, of which least and most hold the median in 97 % of cases; of five they do in 94 %
QUANTIZE = """import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = getattr(llama_cpp, sys.argv[3]), 1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))"""


@dataclass
class Arm:
    """A process that completes prompts; `times` has (seconds to the first token, seconds of all) of each round."""

    name: str
    threads: int
    child: Any
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def ask(self, prompts: list[list[int]], count: int) -> float:
        """Wall seconds for `count` tokens behind each prompt."""
        told = self._told({"prompts": prompts, "count": count})
        if any(len(row) != count for row in told["tokens"]):
            raise SystemExit(f"{self.name}: the arm gave too few tokens.")
        return float(told["seconds"])

    def bits(self, tokens: list[int]) -> float:
        """What the tokens but the first take."""
        return float(self._told({"score": tokens})["bits"])

    def _told(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.child.stdin.write(json.dumps(asked) + "\n")
        self.child.stdin.flush()
        if not (line := self.child.stdout.readline()):
            raise SystemExit(f"{self.name}, {self.threads} threads: the arm ended.")
        found: dict[str, Any] = json.loads(line)
        return found

    def speeds(self, rows: int, prompt: int, count: int) -> list[tuple[float, float]]:
        """(prefill, decode) tokens per second of each round."""
        return [(rows * prompt / first, rows * (count - 1) / (whole - first)) for first, whole in self.times[rows]]


def run(*words: Any) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(word) for word in words], check=True, env=environment, stdout=sys.stderr)


def prepare(work: Path, name: str, args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """What is missing in WORK is made; yields each arm's name and the command that starts it, less the threads."""
    work.mkdir(parents=True, exist_ok=True)
    source, shrew = work / "source", (sys.executable, "-m", "shrew")
    if not source.exists():
        _source(name, source)
    for label, (bits, group) in OURS.items():
        small, pack = work / label.replace(" ", "-"), work / f"{label.replace(' ', '-')}.pack"
        if not pack.exists():
            recipe = work / "recipe.toml"
            recipe.write_text(f'[source]\nmodel = "{source}"\n[[moves]]\nname = "quantize"\nbits = {bits}\n'
                              f'group = {group}\nmethod = "rtn"\nembeddings = true\n')  # fmt: skip
            run(*shrew, "apply", recipe, "--out", small)
            run(*shrew, "pack", small, "--to", "onnx", "--out", pack)
        yield label, [sys.executable, HERE / "arms/shrew_arm.py", pack]
    if args.llama:
        wide = work / "f16.gguf"
        if not wide.exists():
            run(*shrew, "pack", source, "--to", "gguf", "--out", wide)
        for label, kind in LLAMA.items():
            made = work / f"{label}.gguf"
            if not made.exists():
                run(args.llama, "-c", QUANTIZE, wide, made, kind)
            yield label, [args.llama, HERE / "arms/llama_arm.py", made]
    if args.genai:
        built = work / "genai"
        if not built.exists():
            run(args.genai, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", built, "-p", "int4", "-e",
                "cpu", "--extra_options", "int4_accuracy_level=4")  # fmt: skip
        yield "genai int4", [args.genai, HERE / "arms/genai_arm.py", built]
    if args.torch:
        yield "bf16", [sys.executable, HERE / "arms/torch_arm.py", source]


def _source(name: str, out: Path) -> None:
    import torch  # the parent needs it for this alone
    from gguf_models import tiny

    from shrew import spec
    from shrew.blocks.model import ModelSpec, build
    from shrew.blocks.stock import stock

    loaded, table = folder.load("starter"), MODELS.get(name)
    if name in OTHERS:
        loaded.model, loaded.path = tiny(name, **SIZE | OTHERS[name]), None
    elif table is not None:
        torch.manual_seed(0)
        loaded.model, loaded.path = stock(build(spec.parse(ModelSpec, table, name)).eval()), None
    folder.save(loaded, out)


def start(name: str, words: Sequence[Any], threads: int) -> Arm:
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen([*map(str, words), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=environment)  # fmt: skip
    assert child.stdout is not None
    if not child.stdout.readline():
        raise SystemExit(f"{name}: the arm did not start.")
    return Arm(name, threads, child)


def compare(name: str, args: argparse.Namespace) -> list[Record]:
    chance = np.random.default_rng(0)
    arms = [start(label, words, threads) for label, words in prepare(args.work / name, name, args)
            for threads in args.threads]  # fmt: skip
    for number in range(-1, args.rounds):  # the first is not told: it compiles, and fills caches
        print(f"{name}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for rows in (1, 8):
            for arm in arms if number % 2 else arms[::-1]:
                fresh = chance.integers(3, 4096, (2, rows, args.prompt)).tolist()
                once = arm.ask(fresh[0], 1), arm.ask(fresh[1], args.tokens)
                if number >= 0:
                    arm.times.setdefault(rows, []).append(once)
    for arm in arms:
        arm.child.stdin.close()
        arm.child.wait()
    return list(facts(name, arms, args))


def facts(name: str, arms: Sequence[Arm], args: argparse.Namespace) -> Iterator[Record]:
    """Each arm's speeds, and ours relative to the best peer of as many bits, by paired rounds."""
    for rows in (1, 8):
        for part, which in enumerate(("prefill", "decode")):
            best: dict[str, tuple[Arm, list[float]]] = {}
            for arm in arms:
                speeds = [one[part] for one in arm.speeds(rows, args.prompt, args.tokens)]
                if arm.name not in best or statistics.median(speeds) > statistics.median(best[arm.name][1]):
                    best[arm.name] = arm, speeds
            detail = {"rows": rows, "prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds}
            for label, (arm, speeds) in best.items():
                yield Record(run="runtime", model=f"{name}, {label}", metric=f"{which}_tokens_per_second",
                             value=statistics.median(speeds), unit="tokens/s", n=len(speeds),
                             detail=detail | {"threads": arm.threads, "all": speeds})  # fmt: skip
            for label in OURS:
                peers = {peer: speeds for peer, (_, speeds) in best.items()
                         if peer not in OURS and BITS[peer] in (BITS[label], 16)}  # fmt: skip
                if not peers:
                    continue
                peer = max(peers, key=lambda name: statistics.median(peers[name]))
                value, low, high, ends = ratio(best[label][1], peers[peer])
                yield Record(run="runtime", model=f"{name}, {label}", metric=f"{which}_over_best_peer", value=value,
                             low=low, high=high, n=args.rounds, detail=detail | {"peer": peer} | ends)  # fmt: skip


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float, dict[str, str]]:
    """Median of the rounds' ratios, low and high end of its 95 % interval by order statistics, and what a record says
    of these ends: fewer than six rounds have no such interval, and they are the least and the most."""
    rounds = [own / other for own, other in zip(ours, theirs, strict=True)]
    return *median_ratio(rounds), {"interval": "least and most"} if len(rounds) < ENOUGH else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the models; what is there already is used")
    parser.add_argument("--llama", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--genai", type=Path, help="Python of an environment with onnxruntime-genai and torch")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True, help="it compiles for minutes")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *OTHERS], default=list(MODELS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=129, help="tokens that follow")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args()
    for name in args.models:
        found = compare(name, args)
        if args.records:
            record.append(args.records, found)
        for one in found:
            spread = "" if one.low is None else f" ({one.low:.2f} to {one.high:.2f}) of {one.detail['peer']}"
            print(f"{one.model:26} {one.detail['rows']} rows  {one.metric:28} {one.value:10.4g}{spread}")


if __name__ == "__main__":
    main()
