"""The folder that `shrew scan` judges with: n-gram weights, how they are combined with the rules and a detector, and
the operating points.

    python recipes/scan/assemble.py --pairs PAIRS.jsonl... --ordinary runs/scan/ordinary.jsonl \\
        --calm runs/scan/calm.jsonl --out models/scan [--detector PACKED --logits FOLDS.jsonl]

What is combined are scores of texts that were not trained on: five folds by project. `--ordinary` functions count as
often as fixed ones. Thresholds come from `--calm`, ordinary functions of packages that nothing was trained on. With a
packed detector, `--logits` has a line {"id", "member", "logit"} for each text ("before", "after" or "ordinary"), from
detectors of the other folds. Code under the GPL is left out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from shrew import files
from shrew.code import canonical
from shrew.data import read_jsonl
from shrew.data.pairs import fold_of, project_name
from shrew.scan import combine
from shrew.scan.functions import Source, parse
from shrew.scan.grams import Grams
from shrew.scan.judge import Judge
from shrew.scan.rules import Finding, load_rules

FOLDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True)
    parser.add_argument("--ordinary", type=Path, required=True)
    parser.add_argument("--calm", type=Path, required=True)
    parser.add_argument("--hold-out", nargs="*", default=[], help="projects that are left out")
    parser.add_argument("--detector", type=Path, help="packed folder")
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pairs = [row for path in args.pairs for _, row in read_jsonl(path)
             if "GPL" not in row.get("licence", "") and project_name(row["project"]) not in {"linux", *args.hold_out}]
    ordinary, calm = ([row for _, row in read_jsonl(path)] for path in (args.ordinary, args.calm))
    texts = [row[member] for member in ("before", "after") for row in pairs] + [row["text"] for row in ordinary]
    rows = [*pairs, *pairs, *ordinary]
    languages = ["c" if row["language"] == "h" else row["language"] for row in rows]
    folds = np.array([fold_of(row["project"], FOLDS) for row in rows])
    truth = np.repeat([1, 0], [len(pairs), len(rows) - len(pairs)])
    weight = np.repeat([1.0, len(pairs) / max(len(ordinary), 1)], [2 * len(pairs), len(ordinary)])

    def fitted(places: np.ndarray) -> Grams:
        half = int((places < len(pairs)).sum())  # vulnerable ones first, then their twins in the same order
        twins = np.arange(2 * half).reshape(2, -1).T
        return Grams.fit([texts[at] for at in places], truth[places], [languages[at] for at in places],
                         importance=weight[places], twins=twins)  # fmt: skip

    grams = np.empty(len(rows))
    for fold in range(FOLDS):
        there = np.flatnonzero(folds == fold)
        model = fitted(np.flatnonzero(folds != fold))
        grams[there] = model.score([texts[at] for at in there], [languages[at] for at in there])
    members = ["before"] * len(pairs) + ["after"] * len(pairs) + ["ordinary"] * len(ordinary)
    known = {} if args.logits is None else {
        (row["id"], row["member"]): float(row["logit"]) for _, row in read_jsonl(args.logits)}
    logits = [known.get((row["id"], member), 0.0) for row, member in zip(rows, members, strict=True)]
    table = combine.fit(logits, grams.tolist(), ruled(texts, languages), truth, weight)
    with files.new_folder(args.out, "scan.json") as where:
        if args.detector is not None:
            for item in args.detector.iterdir():
                files.write_bytes(where / item.name, item.read_bytes())
        fitted(np.arange(len(rows))).save(where / "grams.npz")
        settings: dict[str, Any] = {"version": 1, "combine": table,
                                    "points": {name: {"threshold": 0.0} for name in combine.POINTS}}  # fmt: skip
        (where / "scan.json").write_text(json.dumps(settings), "utf-8")
        settings["points"] = combine.points(judged(Judge(where), calm))
        (where / "scan.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    print(f"{len(pairs):,} pairs, {len(ordinary):,} and {len(calm):,} ordinary functions: {settings['points']}")


def ruled(texts: list[str], languages: list[str]) -> list[list[Finding]]:
    """What the rules say of each text, as if it were a file."""
    rules, found = load_rules(), []
    for text, language in zip(texts, languages, strict=True):
        text = canonical(text, language, comments=True)
        source = Source("text", language, text.encode(), text)
        found.append(rules.match(source, parse(source)))
    return found


def judged(judge: Judge, rows: list[dict[str, Any]]) -> np.ndarray:
    """float64 [n]: the probability of each function."""
    texts, languages = [row["text"] for row in rows], [row["language"] for row in rows]
    scores = judge.scores(texts, languages) if judge.has_detector else [None] * len(rows)
    parts = zip(scores, judge.grams(texts, languages), ruled(texts, languages), strict=True)
    return np.array([judge.probability(*each) for each in parts])


if __name__ == "__main__":
    main()
