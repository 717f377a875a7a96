"""At equal quality: what `shrew shrink` chose against the original in llama.cpp at its best type of no worse quality.

    shrew shrink starter --keep 0.98 --heal 24 --coded --minutes 5 --out demo    # what `make demo` runs
    python benchmarks/equal.py WORK demo --coded --llama PYTHON --records results/records.jsonl

PYTHON is that of an environment with llama-cpp-python. The chosen model runs twice: packed, in our runtime, and as GGUF
in llama.cpp. The original runs in llama.cpp as each of its types, made by its own quantizer, with an importance matrix
if --importance names one (compression.py leaves it in runs/compression/starter/importance.npz). With --stock,
GGUF files of ours run in llama.cpp too, and each is held against the types that are no worse than it. Quality is bits
per byte of the starter's final split, on which nothing was chosen, as each engine computes them, all on the same rows;
a type is no worse if it takes no more bits than our slower output. Speed is greedy text, one and eight sequences, in
turns, one thread. It takes about two minutes, and ten seconds for each file more.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from runtime import HERE, Arm, ratio, run, start
from sources import reached

from shrew import files, folder, record, spec, tasks
from shrew.folder.check import fetch
from shrew.record import Record

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M")
FINER = ("Q5_K_S", "Q4_K_S", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "Q2_K")  # with an importance matrix only
OURS = ("packed", "GGUF")
QUANTIZE = """import ctypes, sys, llama_cpp, numpy
wide, out, kind, importance = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
if importance:
    rows = {name: numpy.ascontiguousarray(row, numpy.float32) for name, row in numpy.load(importance).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))()  # a nameless one ends the list
    for entry, (name, row) in zip(entries, rows.items()):
        entry.name, entry.size, entry.data = name.encode(), row.size, row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(wide.encode(), out.encode(), ctypes.byref(params)))"""


def mark(model: str | Path, *more: Any) -> str:
    """The hash of what a file hangs on: the model, the code of the packers, and `more`."""
    code = [files.sha256(path) for path in reached(["shrew.packers.onnx", "shrew.packers.gguf"])]
    return spec.digest([folder.identity(fetch(model)), code, *more])[:12]


def prepare(args: argparse.Namespace) -> dict[str, tuple[list[Any], Path]]:
    """Each arm's command, and the file or folder whose bytes count."""
    args.work.mkdir(parents=True, exist_ok=True)
    shrew, wide = (sys.executable, "-m", "shrew", "pack"), args.work / f"F16-{mark('starter')}.gguf"
    pack = args.work / f"chosen-{mark(args.chosen, args.coded)}.pack"
    chosen = args.work / f"chosen-{mark(args.chosen)}.gguf"
    more = ["--coded"] if args.coded else []
    for source, kind, out in ((args.chosen, "onnx", pack), (args.chosen, "gguf", chosen), ("starter", "gguf", wide)):
        if not out.exists():
            run(*shrew, source, "--to", kind, "--out", out, *(more if kind == "onnx" else []))
    arms: dict[str, tuple[list[Any], Path]] = {"packed": ([sys.executable, HERE / "arms/shrew_arm.py", pack], pack)}
    sign = mark("starter", QUANTIZE, files.sha256(args.importance) if args.importance else "")
    made = {"GGUF": chosen, "F16": wide} | {label: args.work / f"{label}-{sign}.gguf" for label in args.types[1:]}
    made |= {stock_name(path): path for path in args.stock}
    for label, path in made.items():
        if not path.exists():
            run(args.llama, "-c", QUANTIZE, wide, path, label, args.importance or "")
        arms[label] = [args.llama, HERE / "arms/llama_arm.py", path], path
    return arms


def stock_name(path: Path) -> str:
    """The name of a file of ours among the arms; one that compression.py made has its folder's."""
    return f"ours {path.parent.parent.name if path.stem == 'model' else path.stem}"


def size(path: Path) -> int:
    """Bytes of a file, or of a pack without what says only how it was made and checked."""
    if path.is_file():
        return path.stat().st_size
    parts = [path / name for name in ("model.onnx", "model.bin", "model.coded", "tokenizer.json", "tokenizer.json.gz")]
    return sum(part.stat().st_size for part in parts if part.exists())


def texts(length: int) -> list[tuple[list[int], int]]:
    """(tokens, bytes behind the first) of the beginnings of the starter's final split, which no search has seen."""
    tokenizer = folder.load("starter").tokenizer
    found = []
    for item in tasks.read("python").examples("final"):
        ids = tokenizer.encode(item.text, add_special_tokens=False)[: length - 1]
        found.append(([tokenizer.eos_token_id, *ids], len(tokenizer.decode(ids).encode("utf-8"))))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for what is made; what is there is used, by a hash")
    parser.add_argument("chosen", type=Path, help="the model folder that shrink wrote")
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--coded", action="store_true", help="pack with --coded: for what `shrink --coded` wrote")
    parser.add_argument("--importance", type=Path, help="importance matrix of llama.cpp's types, by tensor (npz)")
    parser.add_argument("--stock", type=Path, nargs="*", default=[], help="GGUF files of ours")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    args.types = TYPES + (FINER if args.importance else ())
    rows = texts(512)
    bytes_ = sum(count for _, count in rows)
    commands = prepare(args)
    arms = {label: start(label, words, 1) for label, (words, _) in commands.items()}
    quality = {label: sum(arm.bits(ids) for ids, _ in rows) / bytes_ for label, arm in arms.items()}
    stock = [stock_name(path) for path in args.stock]
    worst = max(quality[label] for label in OURS)
    fits = [label for label in args.types if quality[label] <= worst]
    equal = {name: [label for label in args.types if quality[label] <= quality[name]] for name in stock}
    peers = [label for label in args.types if label in fits or any(label in some for some in equal.values())]
    turns = [*OURS, *stock, *peers]
    chance = np.random.default_rng(0)
    for number in range(-1, args.rounds):
        for count in (1, 8):
            for label in turns if number % 2 else turns[::-1]:
                prompts = chance.integers(3, 4096, (2, count, 64)).tolist()
                once = arms[label].ask(prompts[0], 1), arms[label].ask(prompts[1], 129)
                if number >= 0:
                    arms[label].times.setdefault(count, []).append(once)
    found = [Record(run="equal", model=label, metric="bits_per_byte", value=value, unit="bits/byte", n=len(rows),
                    detail={"bytes": size(commands[label][1])}) for label, value in quality.items()]  # fmt: skip
    for count in (1, 8):
        found += speeds(arms, fits, commands, count)
        found += [item for name in stock if equal[name]
                  for item in side_by_side(arms, name, equal[name], commands, count)]  # fmt: skip
    for one in found:
        spread = "" if one.low is None else f" ({one.low:.2f} to {one.high:.2f}) {one.detail}"
        print(f"{one.model:10} {one.metric:28} {one.value:10.4g}{spread}")
    if args.records:
        record.append(args.records, found)
    for arm in arms.values():
        arm.child.stdin.close()
    return 0


def speeds(arms: dict[str, Arm], fits: list[str], commands: dict[str, Any], count: int) -> list[Record]:
    """Decoding speed of each, and our better output over the fastest type of no worse quality."""
    decode = {label: [pair[1] for pair in arms[label].speeds(count, 64, 129)] for label in (*OURS, *fits)}
    found = [Record(run="equal", model=label, metric="decode_tokens_per_second", value=statistics.median(values),
                    unit="tokens/s", n=len(values), detail={"rows": count})
             for label, values in decode.items()]  # fmt: skip
    ours = max(OURS, key=lambda label: statistics.median(decode[label]))
    peer = max(fits, key=lambda label: statistics.median(decode[label]))
    value, low, high, ends = ratio(decode[ours], decode[peer])
    share = size(commands[ours][1]) / size(commands[peer][1])
    least = size(commands[ours][1]) / min(size(commands[label][1]) for label in fits)
    found.append(Record(run="equal", model=ours, metric="decode_over_original", value=value, low=low, high=high,
                        n=len(decode[ours]), detail={"rows": count, "peer": peer, "bytes_over_peer": share,
                                                     "bytes_over_smallest": least} | ends))  # fmt: skip
    return found


def side_by_side(arms: dict[str, Arm], name: str, peers: list[str], commands: dict[str, Any], count: int
                 ) -> list[Record]:  # fmt: skip
    """A GGUF file of ours in llama.cpp over the smallest and over the fastest of its types of no worse quality."""
    decode = {label: [pair[1] for pair in arms[label].speeds(count, 64, 129)] for label in (name, *peers)}
    own, found = size(commands[name][1]), []
    sizes = {label: size(commands[label][1]) for label in peers}
    for which, peer in (("smallest", min(peers, key=lambda label: sizes[label])),
                        ("fastest", max(peers, key=lambda label: statistics.median(decode[label])))):  # fmt: skip
        value, low, high, ends = ratio(decode[name], decode[peer])
        found.append(Record(run="equal", model=name, metric="decode_over_equal_peer", value=value, low=low, high=high,
                            n=len(decode[name]), detail={"rows": count, "which": which, "peer": peer, "bytes": own,
                                                         "peer_bytes": sizes[peer],
                                                         "bytes_over_peer": own / sizes[peer]} | ends))  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
