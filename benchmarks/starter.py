"""Make the starter that ships from a trained folder: weights, tokenizer, manifest and card with measured figures.

    python benchmarks/starter.py runs/starter src/shrew/models/starter --records results/records.jsonl

The figures are bits per byte and next-line completion on evaluation modules, which were never trained on.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from shrew import data, files, folder, machine, measure, record, tasks
from shrew.data import python
from shrew.tasks.completion import Completion, Prompt

LINES = 600  # next lines asked for
BEFORE = 1200  # characters of the module before each of them


def next_lines() -> Completion:
    """The task: given the text before a line of an evaluation module, its exact words."""
    draw = np.random.default_rng(0)
    found = []
    for document in data.documents(["python:evaluation"]):
        lines = document.text.splitlines(keepends=True)
        wanted = [number for number in range(20, len(lines)) if lines[number].strip()]
        for number in sorted(draw.permutation(wanted)[: LINES // 30]):
            # A line's break and indentation are one token, so the prompt ends before the break.
            before = "".join(lines[:number])[-BEFORE:].rstrip("\n")
            found.append(Prompt(f"{document.id}:{number + 1}", before, "\n" + lines[number].rstrip("\n")))
    return Completion(name="next-line", splits={"all": found[:LINES]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    machine.choose_threads()
    loaded = folder.load(args.trained)
    manifest = python.build()[1]
    text = tasks.read("python")
    found = []
    for task, split in ((text, "final"), (next_lines(), "all")):
        found += measure.quality_records("starter", "starter", task.score(loaded, split))
    found += [item for item in measure.cost_records("starter", "starter", loaded) if item.metric != "energy"]
    values = {item.metric: item for item in found}
    bits, lines = values["bits_per_byte"], values["exact_match"]
    recipe = loaded.lineage["recipe"]
    card = f"""# The starter: a small model of Python source

{int(values["parameters"].value or 0):,} parameters, bf16, {int(values["bytes"].value or 0):,} bytes; a Llama-type
folder that transformers reads without Shrew, so that everything Shrew does can be tried on a fresh machine.

| measured on modules never trained on | value | 95 % interval | n |
| --- | --- | --- | --- |
| bits per byte | {bits.value:.4f} | {bits.low:.4f} to {bits.high:.4f} | {bits.n} modules |
| next line completed exactly | {lines.value:.1%} | {lines.low:.1%} to {lines.high:.1%} | {lines.n} lines |

Trained by `recipes/starter.toml`: {recipe["train"]["steps"]:,} steps of {recipe["train"]["batch_tokens"]:,} tokens,
drawn from {manifest.files:,} Python files ({manifest.bytes / 1e6:.0f} MB) of the standard library and of
permissively licensed packages, listed with their licences in `manifest.json`. Held out: {len(manifest.evaluation)}
files of the standard library, chosen by a hash of their names. Dropped, in files:
{", ".join(f"{n} ({what})" for what, n in manifest.dropped.items())}.

It completes short Python text plausibly and knows little: it is a test object, not an assistant.
"""
    ship(args.trained, args.out, manifest, card)
    if args.records:
        record.append(args.records, found)
    print(card)


def ship(made: Path, out: Path, manifest: python.Manifest, card: str) -> None:
    """Write the folder `out`: the files of `made`, the list of what it was trained on, and its card."""
    with files.new_folder(out, folder.LINEAGE) as temporary:
        for item in made.iterdir():
            shutil.copyfile(item, temporary / item.name)
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n", "utf-8")
        (temporary / "README.md").write_text(card, "utf-8")


if __name__ == "__main__":
    main()
