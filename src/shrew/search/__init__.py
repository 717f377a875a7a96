"""`shrew shrink`: the smallest model that keeps a wanted share of the quality, with the proof.

1. Score the original; measure what each part of each layer loses at 2, 3 and 4 bits, and what each cut loses.
2. Solve for the best bits under any byte budget (a knapsack), for each structural cut. (For coded weights both are
   simpler: what three rates lose is measured, and one rate for all weights follows from the budget.)
3. Score one candidate of each cut at one size, heal those within reach briefly, and keep the cut that comes out best.
4. Heal candidates of that cut fully and close in on the smallest that holds on the search split.
5. Only then open the final split, for a few named candidates, from the safest downward.
"""

import sys
from pathlib import Path

from rich.console import Console

from shrew import files, folder, record, report, spec
from shrew.errors import FloorNotMet
from shrew.folder.check import fetch
from shrew.moves.source import Source
from shrew.search.run import Run
from shrew.search.wanted import ShrinkSpec

__all__ = ["ShrinkSpec", "main"]


def main(argv: list[str]) -> int:
    parser = spec.Parser(
        prog="shrew shrink", description="Find the smallest model that keeps the quality, and prove it."
    )
    parser.add_argument("model", help="model folder or hub name; 'starter' is the one that ships")
    parser.add_argument("--task", default="", help="task file (JSONL): labels, choice, completion or text")
    parser.add_argument("--text", action="append", default=[], help="text: a file, folder or glob; may be repeated")
    parser.add_argument("--out", type=Path, help="folder to write (default: MODEL-small)")
    parser.add_argument("--seed", type=spec.seed, default=0, help="seed of healing and resampling")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines")
    spec.add_flags(parser, ShrinkSpec)
    args = parser.parse_args(argv)
    wanted = spec.from_flags(ShrinkSpec, args)
    goals = wanted.goals()
    out = args.out or Path(f"{Path(args.model).name}-small")
    files.check_apart(out, [fetch(args.model), args.task, *args.text, wanted.fairness])
    files.check_writable_target(out, folder.LINEAGE)
    source = Source(model=args.model, task=args.task, text=args.text, seed=args.seed)
    command = "shrew shrink " + " ".join(argv)
    run = Run(source, wanted, goals, out, command, _say)
    records, missed = run.all()
    if args.json:
        print(record.lines(records).decode(), end="")
    else:
        Console(file=sys.stdout).print(report.summary(records))
    what = "report.html and records.jsonl" if missed else "the model, recipe.toml, report.html and records.jsonl"
    _say(f"Wrote {what} to {run.out}. What reruns use again lies in {files.cache_folder()} and may be removed.")
    if missed:
        raise FloorNotMet(missed)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
