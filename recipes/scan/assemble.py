"""The folder that `shrew scan` judges with: n-gram weights, how they are combined with the rules and a detector, and
the operating points.

    python recipes/scan/assemble.py --pairs PAIRS.jsonl... --ordinary runs/scan/ordinary.jsonl \\
        --calm runs/scan/calm.jsonl --out models/scan [--detector PACKED --logits FOLDS.jsonl... --asked 150]

What is combined are scores of texts that were not trained on: five folds by project. `--ordinary` functions count as
often as fixed ones. Thresholds come from `--calm`, ordinary functions of packages that nothing was trained on. With a
packed detector, `--logits` has a line {"id", "member", "logit"} for each text ("before", "after" or "ordinary") that
detectors of other folds scored: these count for how its logit does, and it is asked about their languages alone, and
about `--asked` of 1,000 calm functions besides those that a rule speaks of. Code under the GPL is left out.
"""

import argparse
import json
from collections.abc import Sequence
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
    parser.add_argument("--logits", type=Path, nargs="+", default=[])
    parser.add_argument("--asked", type=float, default=1000, help="calm functions of 1,000 to ask the detector about")
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
    findings, settings = ruled(texts, languages), {"version": 1}
    settings["points"] = {name: {"threshold": 0.0} for name in combine.POINTS}
    settings["combine"] = table = combine.fit([0.0] * len(rows), grams.tolist(), findings, truth, weight)
    members = ["before"] * len(pairs) + ["after"] * len(pairs) + ["ordinary"] * len(ordinary)
    known = {(row["id"], row["member"]): float(row["logit"]) for path in args.logits for _, row in read_jsonl(path)}
    logits = [known.get((row["id"], member)) for row, member in zip(rows, members, strict=True)]
    told = np.array([at for at, logit in enumerate(logits) if logit is not None], np.int64)
    if len(told):
        share = (told < len(pairs)).sum() / max((told >= 2 * len(pairs)).sum(), 1)
        table["with"] = combine.fit([logits[at] for at in told], grams[told].tolist(), [findings[at] for at in told],
                                    truth[told], np.where(told < 2 * len(pairs), 1.0, share))["with"]  # fmt: skip
        settings["languages"] = sorted({languages[at] for at in told})
    with files.new_folder(args.out, "scan.json") as where:
        if args.detector is not None:
            for item in args.detector.iterdir():
                files.write_bytes(where / item.name, item.read_bytes())
        fitted(np.arange(len(rows))).save(where / "grams.npz")
        write(where, settings)
        calm_texts, calm_languages = [row["text"] for row in calm], [row["language"] for row in calm]
        first, spoken = Judge(where).grams(calm_texts, calm_languages), ruled(calm_texts, calm_languages)
        if args.asked < 1000:
            asked = combine.points(np.array(first, np.float64), {"asked": args.asked})["asked"]
            settings["first_stage"] = asked["threshold"]
            kept = [bool(findings[at]) or grams[at] >= asked["threshold"] for at in told[told < len(pairs)]]
            print(f"the detector is asked about {np.mean(kept):.3f} of the vulnerable functions that it was scored on")
        write(where, settings)
        settings["points"] = combine.points(judged(Judge(where), calm, first, spoken))
        write(where, settings)
    print(f"{len(pairs):,} pairs, {len(ordinary):,} and {len(calm):,} ordinary functions: {settings['points']}")


def write(where: Path, settings: dict[str, Any]) -> None:
    (where / "scan.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")


def ruled(texts: list[str], languages: list[str]) -> list[list[Finding]]:
    """What the rules say of each text, as if it were a file."""
    rules, found = load_rules(), []
    for text, language in zip(texts, languages, strict=True):
        text = canonical(text, language, comments=True)
        source = Source("text", language, text.encode(), text)
        found.append(rules.match(source, parse(source)))
    return found


def judged(
    judge: Judge, rows: list[dict[str, Any]], grams: Sequence[float | None], findings: list[list[Finding]]
) -> np.ndarray:
    """float64 [n]: the probability of each function, 0 for those that a scan passes over."""
    seen = [bool(found) or judge.passes(gram) for gram, found in zip(grams, findings, strict=True)]
    asked = [at for at, row in enumerate(rows) if seen[at] and judge.asks(row["language"])]
    told = dict(zip(asked, judge.scores(*([rows[at][key] for at in asked] for key in ("text", "language"))),
                    strict=True)) if asked else {}  # fmt: skip
    return np.array([judge.probability(told.get(at), grams[at], findings[at]) if seen[at] else 0.0
                     for at in range(len(rows))])  # fmt: skip


if __name__ == "__main__":
    main()
