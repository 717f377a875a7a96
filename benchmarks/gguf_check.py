"""GGUF files run by llama.cpp itself, against transformers: the same greedy tokens, log-probs, and cutting of text.

    python benchmarks/gguf_check.py --python VENV/bin/python --records results/records.jsonl

VENV holds llama-cpp-python (benchmarks/requirements-llamacpp.txt), which takes some 12 minutes of CPU to build. For
each kind of model: a tiny random one in float32, in bf16 and with packed weights, and the starter. llama.cpp decodes
greedily, one token at a time; transformers, in float32 with the same weights, reads the whole and must have chosen each
token. In bf16 and with packed weights llama.cpp rounds activations too (to 8 bits for blocks), so that tokens of nearly
the same probability may change places; that blocks hold the same values is what the tests show with gguf's arithmetic.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPT, NEW, TEXTS = 32, 128, 300
# In float32 every log-prob must agree so far (Gemma's GELU is a table of 16-bit floats there) and every greedy token.
LARGEST = 5e-3
# Otherwise the mean divergence of a next token must stay below this: a router that is nearly undecided may choose other
# experts when activations are rounded, and then single log-probs differ by more than 1.
DIVERGENCE = 0.01


# --- inside the other environment, which has llama-cpp-python and not shrew ------------------------------------------


def inside(job: Path) -> None:
    """Run the model and the texts of a job, and write what came of it beside the file."""
    import llama_cpp
    import numpy as np

    task = json.loads(job.read_text("utf-8"))
    total = len(task["prompt"]) + task["new"]
    model = llama_cpp.Llama(task["file"], n_ctx=max(total + 8, 64), n_threads=1, n_threads_batch=1, logits_all=True,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=task["verbose"],
                            seed=0)  # fmt: skip
    model.eval(task["prompt"])
    ids = list(task["prompt"])
    while len(ids) < total:
        ids.append(int(np.argmax(model.scores[len(ids) - 1])))
        model.eval(ids[-1:])
    cut = [model.tokenize(text.encode(), add_bos=True, special=True) for text in task["texts"]]
    np.save(job.with_suffix(".npy"), np.array(model.scores[:total], np.float32))
    job.with_suffix(".out").write_text(json.dumps({"ids": ids, "cut": cut}), "utf-8")


# --- outside ----------------------------------------------------------------------------------------------------------


def texts(seed: int, count: int) -> list[str]:
    """Source lines, prose in several scripts, numbers, spaces, and random characters."""
    draw = random.Random(seed)
    words = ["def f(x):", "return", "It's", "we'LL", "1234567", "3.14", "naïve", "привет", "数字", "😀", "  ", "\t",
             "\n", "\r\n", "...", "!!?", "<tool>", "the", "ANT", "_x", "'", "\u00a0", "é́", "Ⅷ½", "ß", " "]  # fmt: skip
    letters = [*range(32, 0x250), *range(0x4E00, 0x4E40)]
    found = ["", " ", "a", "Hello world", " leading", "trailing ", "\n\n\n", "x  y", "ant sees the cat\n"]
    while len(found) < count:
        parts = [draw.choice(words) if draw.random() < 0.8 else chr(draw.choice(letters))
                 for _ in range(draw.randrange(1, 12))]  # fmt: skip
        found.append(draw.choice(["", " "]).join(parts))
    return found


def compare(loaded: Any, name: str, kind: str, options: Any, python: str, verbose: bool) -> dict[str, Any]:
    """One model through one file: differences of log-probs, greedy tokens that agree, texts that are cut alike."""
    import numpy as np
    import torch

    from shrew.packers.gguf import write

    with tempfile.TemporaryDirectory() as place:
        file, job = Path(place) / "model.gguf", Path(place) / "job.json"
        made = write(loaded, file, options, lambda line: print(f"  {line}", file=sys.stderr))
        size = loaded.model.config.vocab_size
        prompt = random.Random(5).choices(range(3, min(size, len(loaded.tokenizer))), k=PROMPT)
        lines = texts(7, TEXTS)
        job.write_text(json.dumps({"file": str(file), "prompt": prompt, "new": NEW, "texts": lines,
                                   "verbose": verbose}), "utf-8")  # fmt: skip
        command = [python, __file__, "--inside", str(job)]
        done = subprocess.run(command, capture_output=not verbose, text=True, check=False)
        if done.returncode:
            tail = "" if verbose else (done.stderr or "").strip()[-2000:]
            raise SystemExit(f"{name} ({kind}): llama.cpp failed\n{tail}")
        theirs = torch.log_softmax(torch.from_numpy(np.load(job.with_suffix(".npy"))).double(), -1)
        out = json.loads(job.with_suffix(".out").read_text("utf-8"))
    ids = torch.tensor([out["ids"]])
    with torch.no_grad():
        ours = torch.log_softmax(loaded.model(input_ids=ids).logits[0].double(), -1)
    gap = (ours - theirs).abs()
    leads = ours.topk(2).values
    chosen = ours[PROMPT - 1 : -1].argmax(-1)
    wrong = [(leads[at, 0] - leads[at, 1]).item() for at, (a, b) in
             enumerate(zip(chosen, ids[0, PROMPT:], strict=True), PROMPT - 1) if a != b]  # fmt: skip
    cut = [loaded.tokenizer(line)["input_ids"] == tokens for line, tokens in zip(lines, out["cut"], strict=True)]
    odd = [(line, loaded.tokenizer(line)["input_ids"], tokens)
           for line, tokens, same in zip(lines, out["cut"], cut, strict=True) if not same]  # fmt: skip
    types = sorted({item["type"] for item in made["tensors"]})
    return {"name": name, "kind": kind, "architecture": made["architecture"], "types": types,
            "largest": gap.max().item(), "mean": gap.mean().item(),
            "kl": (ours.exp() * (ours - theirs)).sum(-1).mean().item(), "tokens": NEW, "equal": NEW - len(wrong),
            "lead": max(wrong, default=0.0), "texts": len(cut), "cut": sum(cut), "odd": odd[:5]}  # fmt: skip


def packed(loaded: Any, bits: int) -> Any:
    """The same model with every weight that `shrew apply quantize` takes rounded to nearest, groups of 32."""
    from shrew.moves.context import Context
    from shrew.moves.quantize import Quantize

    move: Any = Quantize(bits=bits, group=32, method="rtn", embeddings=True)
    return move.apply(loaded, Context([], [], loaded, 0, Path(), lambda line: None))


def cases(only: str) -> Any:
    """Name, kind of weights, model, options."""
    import gguf_models as made
    import torch

    from shrew import folder
    from shrew.folder import Loaded
    from shrew.packers.gguf import Options
    from shrew.packers.gguf.tokens import WORDS

    text = "".join(Path(path).read_text("utf-8") for path in (random.__file__, argparse.__file__))
    exact = torch.float32
    plain = made.byte_level(next(iter(WORDS)), text)
    for name in made.CONFIGS:
        if only and only not in name:
            continue
        yield name, "f32", Loaded(made.tiny(name, exact), plain, dtype=exact), Options()
        yield name, "stored", Loaded(made.tiny(name), plain, dtype=torch.bfloat16), Options()
        for bits in (8, 4):
            loaded = Loaded(made.tiny(name), plain, dtype=torch.bfloat16)
            yield name, f"int{bits}", packed(loaded, bits), Options()
    if not only or only in "starter":
        yield "starter", "f32", folder.load("starter"), Options(dense="f32")
        yield "starter", "stored", folder.load("starter"), Options()
        for bits in (8, 4):
            yield "starter", f"int{bits}", packed(folder.load("starter"), bits), Options()
    if not only or only in "tokenizers":
        for rules, names in WORDS.items():
            for ignore, name in enumerate(names):
                if name:
                    words = made.byte_level(rules, text, ignore_merges=bool(ignore))
                    yield f"tokenizer {name}", "f32", Loaded(made.tiny("llama", exact), words, dtype=exact), Options()
        for prefix in (True, False):
            words = made.sentencepiece(text, 700, prefix)
            loaded = Loaded(made.tiny("llama", exact, vocab_size=700), words, dtype=exact)
            yield f"tokenizer llama {'with' if prefix else 'without'} a space", "f32", loaded, Options()


def said(fact: dict[str, Any]) -> str:
    lead = f" (lead {fact['lead']:.1e})" if fact["lead"] else ""
    return (f"{fact['name']:32} {fact['kind']:7} {'+'.join(fact['types']):14} log-probs {fact['largest']:.1e} (mean "
            f"{fact['mean']:.1e}, KL {fact['kl']:.1e})  greedy {fact['equal']}/{fact['tokens']}{lead}  texts "
            f"{fact['cut']}/{fact['texts']}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--python", help="the interpreter that has llama-cpp-python")
    parser.add_argument("--records", type=Path, help="JSONL file to append the figures to")
    parser.add_argument("--only", default="", help="only models whose name holds this; 'tokenizers' for these")
    parser.add_argument("--verbose", action="store_true", help="what llama.cpp says")
    args = parser.parse_args()
    if args.inside:
        inside(args.inside)
        return
    from shrew import record
    from shrew.folder.check import quiet

    wrong, found = [], []
    with quiet():
        for name, kind, loaded, options in cases(args.only):
            fact = compare(loaded, name, kind, options, args.python, args.verbose)
            exact = fact["largest"] <= LARGEST and fact["equal"] == fact["tokens"]
            good = (exact if kind == "f32" else fact["kl"] <= DIVERGENCE) and fact["cut"] == fact["texts"]
            print(said(fact) + ("" if good else "  WRONG"), flush=True)
            for line, ours, theirs in fact.pop("odd"):
                print(f"    {line!r}: {ours} and in llama.cpp {theirs}")
            wrong += [] if good else [f"{name} ({kind})"]
            found.append(record.Record(
                run="benchmarks/gguf_check", model=f"{name} {kind}", metric="largest_log_prob_gap", unit="nats",
                value=fact.pop("largest"), task="GGUF in llama.cpp against torch", n=fact["tokens"] + PROMPT, seed=0,
                detail=fact))  # fmt: skip
    if args.records:
        record.append(args.records, found)
    if wrong:
        raise SystemExit(f"not within tolerance: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
