"""Make the model of entropies that ships, in 8 bits, from a folder that `recipes/patches/entropy.toml` trained.

    python benchmarks/entropy.py runs/entropy src/shrew/models/entropy --records results/records.jsonl

The figure is bits per byte on evaluation modules, which were never trained on.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from starter import ship

from shrew import folder, machine, measure, record, tasks
from shrew.data import python

QUANTIZE = ["quantize", "--bits", "8", "--group", "0", "--embeddings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    machine.choose_threads()
    with tempfile.TemporaryDirectory() as place:
        small = Path(place) / "entropy"
        command = [sys.executable, "-m", "shrew", "apply", str(args.trained), *QUANTIZE, "--out", str(small)]
        subprocess.run(command, check=True)
        loaded = folder.load(small)
        text, size = tasks.read("python"), (small / "model.safetensors").stat().st_size
        found = measure.quality_records("entropy", "entropy", text.score(loaded, "final"))
        bits = next(item for item in found if item.metric == "bits_per_byte")
        manifest, recipe = python.build()[1], folder.load(args.trained).lineage["recipe"]["train"]
        count = sum(weight.numel() for weight in loaded.model.parameters())
        card = f"""# The model of entropies: how hard is the next byte of a text to tell?

{count:,} parameters in 8 bits, {size:,} bytes. Its entropies say where `shrew patch` starts patches.

| measured on modules never trained on | value | 95 % interval | n |
| --- | --- | --- | --- |
| bits per byte | {bits.value:.4f} | {bits.low:.4f} to {bits.high:.4f} | {bits.n} modules |

Trained by `recipes/patches/entropy.toml`: {recipe["steps"]:,} steps of {recipe["batch_tokens"]:,} bytes, drawn from
{manifest.files:,} Python files ({manifest.bytes / 1e6:.0f} MB) of the standard library and of permissively licensed
packages, listed with their licences in `manifest.json`. It has seen nothing but Python source.
"""
        ship(small, args.out, manifest, card)
    if args.records:
        record.append(args.records, found)
    print(card)


if __name__ == "__main__":
    main()
