"""What packed detectors say of pairs and ordinary functions of the folds that they were not trained on.

    python recipes/scan/logits.py F0.pack F1.pack F2.pack --pairs PAIRS.jsonl... --ordinary runs/scan/ordinary.jsonl \\
        --language python --every 4 --out runs/scan/logits.jsonl

One pack a fold by project, in order. Writes {"id", "member", "logit"} as recipes/scan/assemble.py reads it.
"""

import argparse
import json
from pathlib import Path

from shrew import files
from shrew.data import read_jsonl
from shrew.data.pairs import fold_of
from shrew.scan.detector import Detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, nargs="+", help="the detector that fold 0 was kept from, fold 1, ...")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[])
    parser.add_argument("--ordinary", type=Path)
    parser.add_argument("--language", nargs="+", default=["python"])
    parser.add_argument("--every", type=int, default=1, help="of so many ordinary functions one is scored")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pairs = [row for path in args.pairs for _, row in read_jsonl(path) if row["language"] in args.language]
    items = [(row, member, row[member]) for row in pairs for member in ("before", "after")]
    if args.ordinary is not None:
        rows = [row for _, row in read_jsonl(args.ordinary) if row["language"] in args.language]
        items += [(row, "ordinary", row["text"]) for row in rows[:: args.every]]
    lines = []
    for fold, pack in enumerate(args.packs):
        own = [item for item in items if fold_of(item[0]["project"], len(args.packs)) == fold]
        scores = Detector.load(pack).score([text for *_, text in own], [row["language"] for row, *_ in own])
        lines += [json.dumps({"id": row["id"], "member": member, "logit": round(score.logit, 4)})
                  for (row, member, _), score in zip(own, scores, strict=True)]  # fmt: skip
        print(f"{pack}: {len(own):,} texts")
    files.write_text(args.out, "".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
