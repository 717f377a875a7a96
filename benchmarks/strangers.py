"""`shrew shrink` on small models of other people's types: made, trained on prose, checked, shrunk, compared.

    python benchmarks/strangers.py all RUNS --prose TRAIN --valid VALID --labels TRAIN.jsonl --test TEST.jsonl \\
        --records RECORDS.jsonl

Random weights prove nothing about compression, so each model is first trained with `shrew train` for at least ten
CPU-minutes, and must then beat a unigram model of the same text by a quarter. The steps are subcommands of their own.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
import transformers
from tokenizers import processors

from shrew import data, files, folder, machine, record, tasks
from shrew.data.tokenizer import train_tokenizer

CONTEXT, WIDTH, LAYERS, VOCABULARY = 512, 128, 4, 2048
CPU_SECONDS, AIM = 600, 690  # every model is trained for at least the first; steps are chosen for the second
PROBE = 12  # steps that are timed to choose how many fit
SAMPLE = 10_000_000  # characters that the tokenizer is trained on
UNIGRAM_SHARE = 0.75  # bits per byte that a trained model may have, as a share of the unigram model's
MACRO_F1 = 0.5  # that the classifier must reach; one of 77 labels at random has about 0.013
SEED = 0

TABLE: dict[str, Callable[[dict[str, Any]], Any]] = {}


def kind(make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """Enter a function that makes the config of one type, from what all types share, under its name."""
    TABLE[make.__name__] = make
    return make


# Each follows its type's habits: what is tied, how heads are grouped, where dropout is.


@kind
def gpt2(common: dict[str, Any]) -> Any:
    ids = {key: common[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    # Dropout of attention weights rules out the fused kernel and halves the speed on a CPU; the other two stay.
    return transformers.GPT2Config(n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=4, attn_pdrop=0.0, **ids)


@kind
def llama(common: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(**common, intermediate_size=3 * WIDTH, num_attention_heads=4,
                                    num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip


@kind
def qwen3(common: dict[str, Any]) -> Any:
    return transformers.Qwen3Config(**common, intermediate_size=3 * WIDTH, num_attention_heads=4, num_key_value_heads=2,
                                    head_dim=32, tie_word_embeddings=True)  # fmt: skip


@kind
def gemma3(common: dict[str, Any]) -> Any:
    layers = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return transformers.Gemma3TextConfig(**common, intermediate_size=3 * WIDTH, num_attention_heads=4, head_dim=32,
                                         num_key_value_heads=2, query_pre_attn_scalar=32, sliding_window=64,
                                         layer_types=layers, tie_word_embeddings=True)  # fmt: skip


@kind
def olmoe(common: dict[str, Any]) -> Any:
    return transformers.OlmoeConfig(**common, intermediate_size=WIDTH, num_attention_heads=4, num_key_value_heads=4,
                                    num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)  # fmt: skip


@kind
def modernbert(common: dict[str, Any]) -> Any:
    return transformers.ModernBertConfig(**common, intermediate_size=2 * WIDTH, num_attention_heads=4,
                                         local_attention=64, embedding_dropout=0.1, mlp_dropout=0.1,
                                         classifier_dropout=0.1, classifier_pooling="mean")  # fmt: skip


CLASSIFIERS = ("modernbert",)
TRAINING: dict[str, Any] = {"length": CONTEXT, "batch_tokens": 4096, "lr": 3e-3, "warmup": 50, "threads": 1,
                            "seed": SEED, "checkpoint_every": 200, "validation": 0.0}  # fmt: skip
LABELLED = TRAINING | {"length": 64, "batch_tokens": 2048, "lr": 2e-3, "checkpoint_every": 1000}


def make(name: str, out: Path, prose: Path, labels: Path | None) -> None:
    """A randomly initialised folder of a type with a byte-level BPE tokenizer, as transformers itself saves it."""
    machine.set_seed(SEED)
    marks = ["[CLS]", "[SEP]", "[PAD]"] if name in CLASSIFIERS else []
    tokenizer = train_tokenizer(data.documents([str(prose)]), VOCABULARY - len(marks), SEED, SAMPLE)
    if marks:
        tokenizer.add_special_tokens(dict(zip(("cls_token", "sep_token", "pad_token"), marks, strict=True)))
        ends = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in marks[:2]]
        template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        tokenizer.backend_tokenizer.post_processor = template
    common = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
              "max_position_embeddings": CONTEXT, "bos_token_id": tokenizer.bos_token_id,
              "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    if name in CLASSIFIERS:
        if labels is None:
            raise SystemExit(f"{name} is a classifier: give --labels FILE.jsonl")
        names = sorted({row["label"] for _, row in data.read_jsonl(labels)})
        common |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id,
                   "id2label": dict(enumerate(names)),
                   "label2id": {label: number for number, label in enumerate(names)}}  # fmt: skip
        model = transformers.AutoModelForSequenceClassification.from_config(TABLE[name](common))
    else:
        model = transformers.AutoModelForCausalLM.from_config(TABLE[name](common))
    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {type(model).__name__}, {count:,} parameters, in {out}", file=sys.stderr)


def train(name: str, place: Path, source: Path) -> dict[str, Any]:
    """`shrew train` on PLACE/initial, giving PLACE/trained: as many steps as fit, timed on a few first."""
    table = (LABELLED if name in CLASSIFIERS else TRAINING) | {
        "data": [str(source.resolve())], "init": str((place / "initial").resolve())}  # fmt: skip
    probe = _train(place, "probe", table | {"steps": PROBE})
    logged = [json.loads(line)["cpu_seconds"] for line in _log(place, "probe").read_text().splitlines()]
    each = float(np.median(np.diff(logged)))
    steps = math.ceil(AIM / each)
    last = _train(place, "trained", table | {"steps": steps})
    while last["cpu_seconds"] < CPU_SECONDS:  # the machine was faster than when it was timed: all over again, longer
        shutil.rmtree(_log(place, "trained").parent)
        steps = math.ceil(steps * AIM / last["cpu_seconds"])
        last = _train(place, "trained", table | {"steps": steps})
    return {"steps": steps, "cpu_seconds": last["cpu_seconds"], "loss_begin": probe["loss"], "loss_end": last["loss"]}


def _train(place: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    recipe = place / f"{name}.toml"
    files.write_text(recipe, tomli_w.dumps({"train": table | {"out": str((place / name).resolve())}}))
    told = _shrew(["train", str(recipe.resolve()), "--json"], place)
    result: dict[str, Any] = json.loads(told.splitlines()[-1])
    return result


def _log(place: Path, name: str) -> Path:
    return max(place.glob(f"runs/{name}-*/log.jsonl"), key=lambda path: path.stat().st_mtime)


def _shrew(arguments: Sequence[str], place: Path) -> str:
    """Run a shrew command in a folder; its standard output, or SystemExit with its exit code."""
    done = subprocess.run([sys.executable, "-m", "shrew", *arguments], cwd=place, stdout=subprocess.PIPE, text=True,
                          check=False, env=os.environ)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"shrew {' '.join(arguments)}: exit code {done.returncode}")
    return done.stdout


def sample(source: Path, out: Path, characters: int, passage: int = 4000) -> Path:
    """Passages from the middle of every document of a folder, about so many characters in all, as JSONL."""
    documents = data.documents([str(source)])
    share = characters // len(documents)
    rows = []
    for document in documents:
        low = max((len(document.text) - share) // 2, 0)
        for start in range(low, min(low + share, len(document.text)), passage):
            rows.append(json.dumps({"text": document.text[start : min(start + passage, low + share)]}) + "\n")
    files.write_text(out, "".join(rows))
    return out


def check(name: str, place: Path, prose: Path, held: Path) -> dict[str, Any]:
    """Is PLACE/trained a model worth compressing? Bits per byte against the better of two unigram models of the
    training text (tokens with one added to each count; bytes), or a classifier's macro-F1 on unseen rows."""
    loaded = folder.load(place / "trained")
    seconds = json.loads(_log(place, "trained").read_text().splitlines()[-1])["cpu_seconds"]
    result: dict[str, Any] = {"type": name, "cpu_seconds": seconds}
    if name in CLASSIFIERS:
        quality = tasks.read(held).score(loaded, "all").value()
        return result | {"macro_f1": quality, "passed": quality >= MACRO_F1 and seconds >= CPU_SECONDS}
    documents = data.documents([str(held)])
    quality = tasks.Text(splits={"held": documents}).score(loaded, "held").value()
    told = unigrams(loaded.tokenizer, data.documents([str(prose)]), [item.text for item in documents])
    share = quality / min(told.values())
    passed = share <= UNIGRAM_SHARE and seconds >= CPU_SECONDS
    return result | {"bits_per_byte": quality, **told, "unigram_share": share, "passed": passed}


def unigrams(tokenizer: Any, documents: list[data.Document], held: list[str]) -> dict[str, float]:
    """Bits per byte of the held texts by how often each token, or each byte, is in the documents."""
    stream = data.tokenize(documents, tokenizer, files.cache_folder())
    tokens = np.bincount(stream.tokens, minlength=len(tokenizer)) + 1.0
    count = np.ones(256)
    for document in documents:
        count += np.bincount(np.frombuffer(document.text.encode(), np.uint8), minlength=256)
    seen = np.frombuffer("".join(held).encode(), np.uint8)
    rows = tokenizer(held, add_special_tokens=False)["input_ids"]
    by_token = -np.log2(tokens / tokens.sum())[np.concatenate(rows)].sum()
    by_byte = -np.log2(count / count.sum())[seen].sum()
    return {"unigram_tokens": float(by_token / len(seen)), "unigram_bytes": float(by_byte / len(seen))}


def shrink(name: str, place: Path, held: Path, keep: float, flags: Sequence[str]) -> dict[str, Any]:
    """`shrew shrink` on PLACE/trained, giving PLACE/small, and whether what it claims is so."""
    model, small = place / "trained", place / "small"
    asked = ["--task" if name in CLASSIFIERS else "--text", str(held.resolve()), "--keep", str(keep), "--json"]
    begun = time.monotonic()
    told = _shrew(["shrink", str(model.resolve()), *asked, "--out", str(small.resolve()), *flags], place)
    wall = time.monotonic() - begun
    facts = [json.loads(line) for line in told.splitlines()]
    chosen = [item for item in facts if item["model"] == "chosen"]
    kept = next(item for item in chosen if item["metric"] == "retention" and item["task"].endswith("/final"))
    reasons = {item["detail"]["tensor"]: item["detail"].get("reason", "")
               for item in chosen if item["metric"] == "tensor"}  # fmt: skip
    untouched = {item.name: reasons.get(item.name, "") for item in folder.tensors(small)
                 if not item.effective.startswith("int")}  # fmt: skip
    sizes = [sum(file.stat().st_size for file in folder.weight_files(path)) for path in (small, model)]
    same = compare(small, held, place)
    result = {
        "type": name, "bytes": sizes[0], "bytes_before": sizes[1], "bytes_share": sizes[0] / sizes[1],
        "retention": kept["value"], "lower_bound": kept["detail"]["lower_bound"], "wall_seconds": wall,
        "untouched": len(untouched), "without_reason": sorted(key for key, reason in untouched.items() if not reason),
        "reasons": sorted(set(untouched.values())), **same,
    }  # fmt: skip
    proven = result["lower_bound"] >= keep and result["bytes_share"] <= 0.5
    equal = same["logit_difference"] == 0 and same["same_generation"]
    return result | {"passed": proven and equal and not result["without_reason"]}


def compare(model: Path, held: Path, place: Path) -> dict[str, Any]:
    """Logits and greedy continuations of the model that is measured, and of the folder as plain transformers reads it
    in a fresh process in which `import shrew` was run."""
    loaded = folder.load(model)
    texts = [row["text"][:400] for _, row in data.read_jsonl(held)][:16]
    prompts = place / "prompts.json"
    files.write_text(prompts, json.dumps([loaded.tokenizer(text)["input_ids"] for text in texts]))
    script = [sys.executable, __file__, "answer", str(model), str(prompts), str(place / "answers.npz")]
    if subprocess.run(script, check=False).returncode:
        raise SystemExit(f"{model} does not load in a fresh process")
    measured = answers(loaded.model, prompts)
    with np.load(place / "answers.npz") as fresh:
        far = max(float(np.abs(measured[key] - fresh[key]).max()) for key in measured if key.startswith("logits"))
        same = all(np.array_equal(measured[key], fresh[key]) for key in measured if key.startswith("tokens"))
    return {"logit_difference": far, "same_generation": same}


def answers(model: Any, prompts: Path) -> dict[str, np.ndarray]:
    """Logits of every prompt, and of a causal model 32 greedy tokens after it."""
    found = {}
    for number, row in enumerate(json.loads(prompts.read_text())):
        ids = torch.tensor([row])
        with torch.inference_mode():
            found[f"logits{number}"] = model(input_ids=ids).logits.numpy()
            if model.can_generate():
                more = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
                found[f"tokens{number}"] = more.numpy()
    return found


def answer(model: Path, prompts: Path, out: Path) -> None:
    """`answers` of a folder that transformers' own Auto class has read."""
    classifier = json.loads((model / "config.json").read_text())["architectures"][0].endswith("Classification")
    auto = transformers.AutoModelForSequenceClassification if classifier else transformers.AutoModelForCausalLM
    told: dict[str, Any] = answers(auto.from_pretrained(model, dtype=torch.float32).eval(), prompts)
    np.savez(out, **told)


def everything(args: argparse.Namespace) -> bool:
    """Every step for every type, going on from what is already there; records and a table. True when all passed."""
    passed = []
    for name in args.types:
        place = args.runs / name
        place.mkdir(parents=True, exist_ok=True)
        classifier = name in CLASSIFIERS
        if not (place / "initial").exists():
            make(name, place / "initial", args.prose, args.labels)
        if not (place / "trained").exists():
            train(name, place, args.labels if classifier else args.prose)
        text = args.test if classifier else sample(args.valid, place / "held.jsonl", args.characters)
        found = [("trained", check(name, place, args.prose, text)),
                 ("small", shrink(name, place, text, args.keep, args.flags))]  # fmt: skip
        for stage, result in found:
            print(json.dumps(result), flush=True)
            passed.append(result["passed"])
            verdict = "passed" if result["passed"] else "failed"
            fact = record.Record(run="strangers", model=name, metric=stage, value=verdict, seed=SEED, detail=result)
            record.append(args.records, [fact])
    return all(passed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, told: str, *places: str) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=told)
        for each in places:
            found.add_argument(each, **({"choices": TABLE} if each == "type" else {"type": Path}))
        return found

    one = verb("make", "a randomly initialised folder", "type", "out")
    one.add_argument("--prose", type=Path, required=True, help="folder of text to train the tokenizer on")
    one.add_argument("--labels", type=Path, help="labelled JSONL (classifiers)")
    one = verb("train", "PLACE/initial -> PLACE/trained", "type", "place")
    one.add_argument("--data", type=Path, required=True, help="folder of text, or labelled JSONL for a classifier")
    one = verb("check", "is PLACE/trained better than a unigram model?", "type", "place")
    one.add_argument("--prose", type=Path, required=True, help="what it was trained on")
    one.add_argument("--held", type=Path, required=True, help="unseen text (see sample), or labelled JSONL")
    one = verb("sample", "passages of a folder of text as JSONL", "source", "out")
    one.add_argument("--characters", type=int, default=1_000_000)
    one = verb("shrink", "PLACE/trained -> PLACE/small, and what is true of it", "type", "place")
    one.add_argument("--held", type=Path, required=True, help="unseen text, or labelled JSONL")
    one.add_argument("--keep", type=float, default=0.95)
    one.add_argument("--flags", type=shlex.split, default=[], help='more flags of shrew shrink: --flags="--heal 32"')
    verb("answer", "what a folder says to prompts, by plain transformers", "model", "prompts", "out")
    one = verb("all", "everything, going on from what is there", "runs")
    for flag in ("prose", "valid", "labels", "test"):
        one.add_argument(f"--{flag}", type=Path, required=True)
    one.add_argument("--records", type=Path, required=True, help="JSONL file that the records are added to")
    one.add_argument("--types", nargs="+", choices=TABLE, default=list(TABLE))
    one.add_argument("--characters", type=int, default=1_000_000, help="of held-out text")
    one.add_argument("--keep", type=float, default=0.95)
    one.add_argument("--flags", type=shlex.split, default=[], help='more flags of shrew shrink: --flags="--heal 32"')
    return parser.parse_args()


def main() -> int:
    if len(sys.argv) == 1:
        print(__doc__)
        return 0
    args = parse()
    torch.set_num_threads(1)  # logits are compared bit for bit
    match args.verb:
        case "make":
            make(args.type, args.out, args.prose, args.labels)
        case "sample":
            sample(args.source, args.out, args.characters)
        case "answer":
            answer(args.model, args.prompts, args.out)
        case "all":
            return 0 if everything(args) else 1
        case "train":
            print(json.dumps(train(args.type, args.place, args.data)))
        case "check":
            result = check(args.type, args.place, args.prose, args.held)
            print(json.dumps(result))
            return 0 if result["passed"] else 1
        case "shrink":
            result = shrink(args.type, args.place, args.held, args.keep, args.flags)
            print(json.dumps(result))
            return 0 if result["passed"] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
