"""lm-eval through `shrew serve` against `shrew measure`: the same questions and texts, the same figures.

    python benchmarks/lm_eval.py starter --venv FOLDER --records results/records.jsonl

lm-eval (`local-completions`, its tokenizer asked of the server) is installed once into a virtual environment at FOLDER.
The tasks are made here from held-out text: go on with a passage (four choices, three of them from elsewhere), and bits
per byte of passages that fit in the context. Exit code 1 where the figures differ by more than rounding.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from serving import Server

from shrew import data, folder, record, tasks
from shrew.data import Document
from shrew.folder import Loaded
from shrew.record import Record
from shrew.tasks import Scores, likelihood

VERSION = "0.4.13"
QUESTION, OPTION = 160, 40  # characters
NATS = 0.01  # that the log-probability of an option may differ by: float32 sums of other kernels
SPLIT = "all"

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output}
doc_to_text: {text}
doc_to_target: {target}
{more}metadata: {{version: 1}}
"""


def passages(documents: Sequence[Document], size: int, count: int, draw: random.Random) -> list[str]:
    """Plain ASCII passages of whole words, each from another place."""
    found: list[str] = []
    while len(found) < count:
        text = draw.choice(documents).text
        start = text.find(" ", draw.randrange(max(1, len(text) - size))) + 1
        words = " ".join(text[start : start + size].split(" ")[:-1]).strip()
        if words.isascii() and len(words) > size // 2 and words not in found:
            found.append(words)
    return found


def questions(documents: Sequence[Document], count: int, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for text in passages(documents, QUESTION + 2 * OPTION, count, draw):
        cut = text.rfind(" ", 0, len(text) - OPTION)
        others = [item[-OPTION:].strip() for item in passages(documents, QUESTION, 3, draw)]
        options = [text[cut + 1 :].strip(), *others]
        order = draw.sample(range(4), 4)
        rows.append({"question": text[:cut].rstrip(), "options": [options[i] for i in order], "answer": order.index(0)})
    return rows


def write(place: Path, choice: Sequence[dict[str, Any]], texts: Sequence[str], begin: str) -> None:
    """The tasks twice: as `shrew measure` reads them, and as lm-eval does, which wants the begin token in the text."""

    def lines(name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = place / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    lines("choice.jsonl", choice)
    lines("text.jsonl", [{"text": text} for text in texts])
    begun = lines("choice.lm-eval.jsonl", [{**row, "question": begin + row["question"]} for row in choice])
    more = "doc_to_choice: options\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    written = TASK.format(name="choice", file=begun, output="multiple_choice", text='"{{question}}"', target="answer",
                          more=more)  # fmt: skip
    (place / "choice.yaml").write_text(written, "utf-8")
    more = "metric_list: [{metric: bits_per_byte}]\n"
    written = TASK.format(name="text", file=place / "text.jsonl", output="loglikelihood_rolling", text='""',
                          target='"{{text}}"', more=more)  # fmt: skip
    (place / "text.yaml").write_text(written, "utf-8")


def evaluate(venv: Path, server: Server, place: Path, begin: int) -> tuple[dict[str, Any], list[list[float]]]:
    """lm-eval's figures, and its log-probabilities of the options in the order of the questions."""
    program = venv / "bin" / "lm_eval"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", f"lm-eval[api]=={VERSION}"], check=True)
    model = {"model": server.name, "base_url": f"{server.url}/v1/completions", "tokenizer_backend": "remote",
             "max_length": server.context(), "custom_prefix_token_id": begin}  # fmt: skip
    arguments = ",".join(f"{key}={value}" for key, value in model.items())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf")}
    environment.pop("PYTHONPATH", None)
    command = [str(program), "--model", "local-completions", "--model_args", arguments, "--tasks", "choice,text",
               "--include_path", str(place), "--output_path", str(place / "out"), "--log_samples",
               "--batch_size", "8"]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"lm-eval failed:\n{done.stderr[-3000:]}")
    results = json.loads(next((place / "out").rglob("results_*.json")).read_text("utf-8"))["results"]
    lines = next((place / "out").rglob("samples_choice_*.jsonl")).read_text("utf-8").splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    return results, [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


def ours(loaded: Loaded, place: Path, choice: Sequence[dict[str, Any]]) -> tuple[dict[str, Scores], np.ndarray]:
    scores = {}
    for name in ("choice", "text"):
        task = tasks.read(place / f"{name}.jsonl")
        scores[name] = task.score(loaded, SPLIT)
    pairs = [(row["question"], f" {option}") for row in choice for option in row["options"]]
    return scores, likelihood.continuations(loaded, pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or 'starter'")
    parser.add_argument("--pack", help="its packed form (default: made in the cache)")
    parser.add_argument("--venv", type=Path, required=True, help="virtual environment of lm-eval, made if missing")
    parser.add_argument("--text", default="python:evaluation", help="held-out text: a file, folder, glob or data set")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--passages", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    loaded = folder.load(args.model)
    begin = likelihood.first_token(loaded.tokenizer)
    if begin is None:
        sys.exit(f"{args.model} has no token to begin with, so lm-eval scores other tokens than measure.")
    documents = data.documents([args.text])
    choice = questions(documents, args.questions, draw)
    size = 2 * min(likelihood.WINDOW, likelihood.context_length(loaded.model))  # characters, well below the context
    texts = passages(documents, size, args.passages, draw)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write(place, choice, texts, loaded.tokenizer.convert_ids_to_tokens(begin))
        with Server(args.pack or args.model) as server:
            theirs, found = evaluate(args.venv, server, place, begin)
        scores, wanted = ours(loaded, place, choice)
    apart = float(np.abs(np.array(found).reshape(-1) - wanted).max())
    rows = [
        ("accuracy", scores["choice"], theirs["choice"]["acc_norm,none"], len(choice)),
        ("bits_per_byte", scores["text"], theirs["text"]["bits_per_byte,none"], len(texts)),
    ]
    facts, faults = [], []
    for metric, score, other, count in rows:
        value = score.value()
        print(f"{metric}: {value:.5f} by measure, {other:.5f} by lm-eval through the server ({count})")
        facts.append(Record(run="lm-eval", model=Path(args.model).name, metric=metric, value=float(other), n=count,
                            seed=args.seed, task=f"lm-eval {VERSION} local-completions",
                            detail={"measure": float(value), "option_nats_apart": apart}))  # fmt: skip
        if abs(value - other) > (1e-9 if metric == "accuracy" else 1e-3):
            faults.append(f"{metric} differs")
    print(f"log-probabilities of options differ by at most {apart:.2g} nats")
    if apart > NATS:
        faults.append("an option's log-probability differs")
    if args.records:
        record.append(args.records, facts)
    print("; ".join(faults) or "the same figures", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
