"""Which design of the linear detector a public set chooses, and how that one does on another set.

    python benchmarks/choose.py SVEN.jsonl --on SAFECODER.jsonl --venvs PEERS --records results/records.jsonl

The menu is `scan.DESIGNS`: n-grams alone, with what calls are given, with a penalty that falls where repairs move a
bucket, with both. The rule: the best AUC beside the rules, as `benchmarks/scan.py system` measures it, on the first
set's folds by project; of equal ones, the earlier in the menu. Pairs with a text that also stands in the second set
have no say, with `--apart` nor have pairs of projects that stand there too. Then `system` runs on the second set with
that design. What is fitted there is fitted on its other folds, as ever; what was chosen, it had no part in.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import scan

from shrew import record
from shrew.measure.detection import grouped_interval
from shrew.record import Record
from shrew.tasks import detection

PLAIN = next(iter(scan.DESIGNS))


def apart(data: scan.Set, other: scan.Set) -> scan.Set:
    """The pairs of projects that the other set does not have."""
    kept = np.flatnonzero(~np.isin(data.projects, other.projects))
    twice = np.concatenate([kept, kept + data.n])
    return scan.Set(
        f"{data.name} apart", scan.pick(data.ids, kept), scan.pick(data.texts, twice),
        scan.pick(data.languages, twice), data.cwes[kept], data.projects[kept], data.folds[kept], data.shared[kept],
    )  # fmt: skip


def menu(data: scan.Set, samples: int) -> tuple[str, list[Record]]:
    """The design with the best AUC, and the AUC of each, alone and above that of n-grams alone."""
    if len(set(data.folds)) < 3:
        raise SystemExit(f"{data.name}: {data.n} pairs of too few projects; three folds of five need some.")
    said = scan.ruled(data.texts, data.languages)
    scores = {}
    for place, design in enumerate(scan.DESIGNS):
        print(f"{data.name}: design {place + 1} of {len(scan.DESIGNS)}, {design}", file=sys.stderr)
        scores[design] = scan.stacked(data, None, said, *scan.held_grams(data, design))

    def area(design: str) -> Callable[[np.ndarray], float]:
        of = scores[design]
        return lambda places: detection.auc(of[places], of[places + data.n])

    every = np.arange(data.n)
    best = max(scores, key=lambda design: area(design)(every))
    found = []
    for design in scores:
        mine, plain = area(design), area(PLAIN)
        metrics: dict[str, Callable[[np.ndarray], float]] = {"auc": mine}
        if design != PLAIN:
            metrics["auc_over_plain"] = lambda places, mine=mine: mine(places) - plain(places)  # noqa: B023
        for metric, statistic in metrics.items():
            value = grouped_interval(data.projects, statistic, samples)
            found.append(Record(run="scan designs", model=design, metric=metric, value=value.value, low=value.low,
                                high=value.high, n=data.n, task=data.name, detail={
                                    "chosen": design == best, "projects": value.n,
                                    "interval": "bootstrap over projects"}))  # fmt: skip
    return best, found


def labelled(found: Sequence[Record], design: str, chooser: str) -> list[Record]:
    """The records of a set that had no say, saying who chose; those of what has no design are what they are."""
    return [
        replace(item, run="scan untuned", model=f"{item.model}, as {chooser} chose",
                detail=item.detail | {"design": design, "chosen_on": chooser})
        if "n-grams +" in item.model or item.model == "our n-grams" else replace(item, run="scan untuned")
        for item in found
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scan.shared_flags(parser)
    parser.add_argument("--on", type=Path, required=True, help="the set that the design chosen is measured on")
    parser.add_argument("--apart", action="store_true", help="choose without the projects that are in both sets")
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args(words)
    data, dropped = scan.read(args.pairs, args.language, [*args.without, args.on])
    if args.apart:
        data = apart(data, scan.read(args.on, args.language)[0])
    print(f"{data.name}: {data.n} pairs of {len(set(data.projects))} projects ({dropped} dropped)", file=sys.stderr)
    design, found = menu(data, args.samples)
    print(f"| design | AUC on {data.name} | above n-grams alone | |")
    print("|---" * 4 + "|")
    of = {(item.model, item.metric): item for item in found}
    for name in scan.DESIGNS:
        mark = "chosen" if name == design else ""
        print(f"| {name} | {scan.span(of[name, 'auc'])} | {scan.span(of.get((name, 'auc_over_plain')))} | {mark} |")
    other = argparse.Namespace(**vars(args) | {"pairs": args.on, "logits": None})
    measured = labelled(scan.compare(other, with_logits=True, design=design), design, data.name)
    scan.show(measured)
    if args.records:
        record.append(args.records, [*found, *measured])
    return 0


if __name__ == "__main__":
    sys.exit(main())
