"""Memory and time of compressing a large model layer by layer, on a llama of random weights.

    python benchmarks/memory.py --method rtn --records results/records.jsonl

The model (about 1.1 billion weights in bf16) is made once under WORK. `shrew apply MODEL quantize` runs in a process of
its own, with an empty cache, and the system is asked ten times a second for what the process holds. Peak memory is
VmHWM: every resident page, those of mapped files too, which the system can take back at any time; RssAnon, what cannot
be taken back, is the largest value seen. Both are compared with 1.5 times the bf16 weights.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from shrew import folder, record
from shrew.record import Record

ROOT = Path(__file__).parents[1]
SHAPE = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
         "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
         "tie_word_embeddings": False}  # fmt: skip
SHARE = 1.5  # of the bf16 weights: what the peak may be, besides one layer's working set
EVERY = 0.1  # seconds


def make(place: Path, layers: int) -> None:
    """A llama of random bf16 weights with the starter's tokenizer, a shard for each layer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE | {"num_hidden_layers": layers}, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    place.mkdir(parents=True)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw).mul_(0.02)
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = value.bfloat16()
    for file, content in shards.items():
        save_file(content, place / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, content in shards.items() for name in content}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoTokenizer.from_pretrained(folder.check.fetch("starter")).save_pretrained(place)
    (place / "config.json").write_text(config.to_json_string())


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """The largest bytes of each kind of memory until the process ends."""
    most = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text("ascii", "replace")
        except OSError:
            break
        for line in status.splitlines():
            kind, _, value = line.partition(":")
            if kind in most:
                most[kind] = max(most[kind], int(value.split()[0]) * 1024)
        time.sleep(EVERY)
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "memory")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--text", help="to calibrate on")
    parser.add_argument("--whole", action="store_true", help="with the whole model in memory")
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    model, out, cache = (args.work / name for name in (f"llama{args.layers}", "out", "cache"))
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        make(model, args.layers)
    for old in (out, cache):
        shutil.rmtree(old, ignore_errors=True)
    command = [sys.executable, "-m", "shrew", "apply", model, "quantize", "--method", args.method, "--bits", args.bits,
               "--group", args.group, "--out", out]  # fmt: skip
    command += [] if args.whole else ["--low-memory"]
    command += ["--text", args.text] if args.text else []
    begun, before = time.perf_counter(), os.times()
    with subprocess.Popen([*map(str, command)], env={**os.environ, "SHREW_CACHE": str(cache)}) as process:
        most = watch(process)
    wall, after = time.perf_counter() - begun, os.times()
    if process.returncode:
        return process.returncode
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    before_bytes, after_bytes = (sum(item.bytes for item in folder.tensors(path)) for path in (model, out))
    layer = sum(item.bytes for item in folder.tensors(model) if ".layers.0." in item.name)
    detail = {
        "method": args.method, "bits": args.bits, "group": args.group, "low_memory": not args.whole,
        "weights": before_bytes // 2, "bf16_bytes": before_bytes, "layer_bf16_bytes": layer,
        "bytes_after": after_bytes, "limit": SHARE * before_bytes, "rss_file": most["RssFile"],
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
    }  # fmt: skip
    label = f"random llama, {before_bytes / 2e9:.2f} B weights, {args.method}{', whole' if args.whole else ''}"
    values = {"peak_memory": (most["VmHWM"], "bytes"), "peak_anonymous": (most["RssAnon"], "bytes"),
              "peak_ratio": (most["VmHWM"] / before_bytes, "of the bf16 weights"),
              "wall": (wall, "s"), "cpu": (cpu, "s")}  # fmt: skip
    found = [Record(run="memory", model=label, metric=metric, value=value, unit=unit, detail=detail)
             for metric, (value, unit) in values.items()]  # fmt: skip
    for item in found:
        print(f"{item.model}: {item.metric} {item.value:,.4g} {item.unit}")
    print(json.dumps(detail))
    if args.records:
        record.append(args.records, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
