"""Which GGUF block type each weight gets in a file of a given size, by the search's knapsack and repair, not healed.

    python benchmarks/mixes.py --like Q3_K_M=3272416 --like Q4_K_M=3774176 --out benchmarks/peers/mixes.json

Each NAME=BYTES is a peer's type and the bytes of its whole file, tokenizer included (the run `equal` has recorded them
for the starter). peers/table.py makes an arm of each, so that benchmarks/compression.py compares at equal bytes.
"""

import argparse
import json
from pathlib import Path

from shrew import files
from shrew.moves import Source
from shrew.search import ShrinkSpec, families, trial
from shrew.search.executor import LocalExecutor
from shrew.search.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--like", action="append", required=True, help="NAME=BYTES of a peer's file; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    chosen = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for item in args.like:
        name, _, size = item.partition("=")
        wanted = ShrinkSpec(gguf=True, heal=0, under=f"{size}B", jobs=1)
        run = Run(Source(model=args.model), wanted, wanted.goals(), args.out, "benchmarks/mixes.py", print)
        run.executor = LocalExecutor(run.jobs, run.source.threads)
        base = run.executor.submit(trial.cut, run.json, [], True).result()
        found = families.family("no cut", [], base, families.widths(run, base), [], base).candidate(int(size))
        run.executor.close()
        if found is None:
            parser.error(f"no choice of block types fits {size} bytes")
        chosen[name] = {"bytes": found.bytes, "damage": run.repaired, "move": found.quantize}
        print(f"{name}: {found.bytes} of {size} bytes")
    files.write_text(args.out, json.dumps(chosen, indent=1) + "\n")


if __name__ == "__main__":
    main()
