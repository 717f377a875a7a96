"""How little is lost at a given share of the bf16 bytes, all moves allowed: `shrew shrink --under BYTES --coded`.

    python benchmarks/shares.py --records results/records.jsonl

For each share the search gets so many bytes and a number of minutes, chooses on its own split, and what it names is
scored once on the final split: bits per byte against the better of the original and the original healed alike, with the
lower bound. Finished runs stay in WORK by a hash of the model, the text and the code of the search, unfinished ones go
on from a cache in WORK. Three shares take 35 minutes.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from curves import tell
from sources import reached

from shrew import data, files, folder, record, spec
from shrew.folder.check import fetch
from shrew.record import Record

SHARES = (0.26, 0.2, 0.1)
FINAL = "/final"


def mark(args: argparse.Namespace) -> str:
    """The hash of what a run hangs on besides what its name says: the model, the text, the code of the search."""
    texts = [item.text for item in data.documents(args.text or ["python:stdlib", "python:evaluation"])]
    code = [files.sha256(path) for path in reached(["shrew.search"])]
    return spec.digest([folder.identity(fetch(args.model)), texts, code])[:12]


def shrink(share: float, size: int, args: argparse.Namespace, mark: str) -> Path:
    """The folder of a run for this share; made if it is not there. One that met nothing lies beside, in -not-met."""
    out: Path = args.work / f"{Path(args.model).name}-{share:g}-{args.heal}-{args.minutes:g}-{mark}"
    if not (out / "records.jsonl").exists():
        command = [sys.executable, "-m", "shrew", "shrink", args.model, "--under", f"{int(share * size)}B", "--coded",
                   "--heal", args.heal, "--minutes", args.minutes, "--jobs", args.jobs, "--out", out]  # fmt: skip
        for text in args.text:
            command += ["--text", text]
        environment = os.environ | {"SHREW_CACHE": str((args.work / "cache").resolve())}
        words = [str(word) for word in command]
        if subprocess.run(words, check=False, stdout=sys.stderr, env=environment).returncode:
            raise SystemExit(f"{share:g} of the bytes: shrink found nothing; what it said stands above.")
    return out


def fact(share: float, size: int, records: list[Record], name: str) -> Record:
    """Bits per byte of what was chosen at a share over the reference's."""
    final = {(item.model, item.metric): item for item in records if item.task.endswith(FINAL)}
    total = next(int(item.value) for item in records if item.metric == "bytes" and item.model == "chosen")
    kept, bits = final["chosen", "retention"], final["chosen", "bits_per_byte"]
    assert isinstance(kept.value, float) and kept.low is not None and kept.high is not None
    against = final[str(kept.detail["against"]), "bits_per_byte"]
    recipe = next(item.value for item in records if item.metric == "recipe")
    detail = {"share": share, "bytes": total, "bytes_over_bf16": total / size, "bits_per_byte": bits.value,
              "at_most": 1 / kept.detail["lower_bound"], "against": kept.detail["against"],
              "reference_bits_per_byte": against.value, "recipe": recipe}  # fmt: skip
    return Record(run="compression-shares", model=f"{name}, {share:g} of bf16", metric="bits_per_byte_over_reference",
                  value=1 / kept.value, low=1 / kept.high, high=1 / kept.low, n=kept.n, task=kept.task, seed=0,
                  detail=detail)  # fmt: skip


def table(records: list[Record]) -> str:
    lines = ["| of bf16 | bytes | bits per byte | reference | over it | at most, with 95 % confidence |",
             "| ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for item in records:
        seen = item.detail
        reference = f"{seen['against']} {seen['reference_bits_per_byte']:.4f}"
        cells = [f"{seen['bytes_over_bf16']:.3f}", f"{seen['bytes']:,}", f"{seen['bits_per_byte']:.4f}", reference,
                 f"{item.value:.4f} ({item.low:.4f} to {item.high:.4f})", f"{seen['at_most']:.4f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shares"))
    parser.add_argument("--model", default="starter")
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--shares", type=lambda text: [float(one) for one in text.split(",")], default=SHARES)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--heal", type=int, default=96)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--show", type=Path, help="make nothing: print the table of these records")
    args = parser.parse_args()
    return tell(args, "compression-shares", table, lambda: made(args))


def made(args: argparse.Namespace) -> list[Record]:
    size = sum(item.bytes for item in folder.tensors(fetch(args.model)))
    found, same = [], mark(args)
    for number, share in enumerate(args.shares, 1):
        left = (len(args.shares) - number + 1) * (args.minutes + 4)
        print(f"{number} of {len(args.shares)}: {share:g} of {size:,} bytes; about {left:.0f} minutes left",
              file=sys.stderr, flush=True)  # fmt: skip
        out = shrink(share, size, args, same)
        found.append(fact(share, size, record.read(out / "records.jsonl"), Path(args.model).name))
    return found


if __name__ == "__main__":
    sys.exit(main())
