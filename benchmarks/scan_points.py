"""What one figure at one rate does not say: few false alarms among ordinary functions, calibration, a split by time.

    python benchmarks/scan_points.py calm PAIRS.jsonl FUNCTIONS.jsonl --language python --records results/records.jsonl
    python benchmarks/scan_points.py time PAIRS.jsonl --language c --records results/records.jsonl

`calm`: which share of the vulnerable members alerts where 0.5 % and 5 % of ordinary functions do, which `recipes/scan/
functions.py` cuts out of packages. What is asked about a pair, and about the ordinary functions beside it, has learned
from the other folds' pairs alone, and has a threshold of its own. And how far the combination's probabilities are from
the shares that turn out vulnerable, on the pairs. `time`: what learned from pairs of CVEs up to a year, the last with
at least half of the pairs after it, is asked about those. Pairs without a CVE are left out; earlier ones that share a
text with later ones teach nothing.
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
from shrew.scan import combine
from shrew.scan.functions import normalise
from shrew.tasks import detection
from shrew.tasks.vulnerability import year

RATES = (0.005, 0.05)


def calm(args: argparse.Namespace) -> list[Record]:
    data, _ = scan.read(args.pairs, args.language)
    rows = [row for row in scan.lines(args.functions) if row["language"] in args.language]
    if len(rows) < scan.ENOUGH:
        raise SystemExit(f"{args.functions} has {len(rows):,} functions; 0.5 % need {scan.ENOUGH:,} at least.")
    texts, languages = [row["text"] for row in rows], [row["language"] for row in rows]
    said, ordinary = scan.ruled(data.texts, data.languages), scan.ruled(texts, languages)
    learn = scan.grams_of(data)
    names = ("n-grams", "our n-grams", "n-grams + rules")
    scores = {name: np.zeros(2 * data.n) for name in names}
    limits = {(name, rate): np.zeros(data.n) for name in names for rate in RATES}
    for fold in np.unique(data.folds):
        test = np.flatnonzero(np.tile(data.folds == fold, 2))
        train = np.flatnonzero(np.tile((data.folds != fold) & ~data.shared, 2))
        here, truth = scan.pick(data.texts, test), data.truth[train]
        both = scan.plain(scan.pick(data.texts, train), truth, [*here, *texts])
        fitted = scan.fitted(data, train)
        grams = [fitted.score(here, scan.pick(data.languages, test)), fitted.score(texts, languages)]
        inner = scan.held_out(data, learn, data.folds != fold)[train]
        made = combine.fit([0.0] * len(train), inner.tolist(), scan.pick(said, train), truth)
        mixed = [combine.combined(made, [0.0] * len(some), some.tolist(), findings)
                 for some, findings in zip(grams, (scan.pick(said, test), ordinary), strict=True)]  # fmt: skip
        of = {"n-grams": (both[: len(test)], both[len(test) :]), "our n-grams": grams, "n-grams + rules": mixed}
        for name, (own, beside) in of.items():
            scores[name][test] = own
            for rate in RATES:
                limits[name, rate][data.folds == fold] = detection.at_rate(own, np.asarray(beside), rate).threshold
        print(f"fold {fold}: {len(test) // 2} pairs", file=sys.stderr)
    detail = {"ordinary": len(rows), "packages": sorted({str(row.get("project")) for row in rows}),
              "interval": "bootstrap over projects"}  # fmt: skip
    found = []
    for (name, rate), limit in limits.items():
        told = scores[name][: data.n] >= limit
        def share(at: np.ndarray, told: np.ndarray = told) -> float:
            return float(told[at].mean())

        found.append(_record(args, data, name, f"recall_at_{rate:g}", share, detail))
    final = scores["n-grams + rules"]
    for metric in ("ece", "brier"):
        def off(at: np.ndarray, metric: str = metric) -> float:
            places = np.concatenate([at, at + data.n])
            return float(getattr(detection.calibration(final[places], data.truth[places]), metric))

        found.append(_record(args, data, "n-grams + rules", metric, off,
                             {"bins": detection.calibration(final, data.truth).bins}))  # fmt: skip
    return found


def _record(args: argparse.Namespace, data: scan.Set, name: str, metric: str, statistic: Callable[[np.ndarray], float],
            detail: dict[str, object]) -> Record:  # fmt: skip
    value = grouped_interval(data.projects, statistic, args.samples)
    return Record(run="scan points", model=name, metric=metric, value=value.value, low=value.low, high=value.high,
                  n=data.n, task=data.name, detail=detail)  # fmt: skip


def split(years: Sequence[int]) -> int:
    """The last year with which at least half of the pairs are later, or else the first."""
    return max((one for one in set(years) if np.mean(np.array(years) > one) >= 0.5), default=min(years))


def time(args: argparse.Namespace) -> list[Record]:
    known = {row["id"]: year(row.get("cve")) for row in scan.lines(args.pairs)}
    data, _ = scan.read(args.pairs, args.language)
    kept = np.array([place for place, name in enumerate(data.ids) if known[name] is not None], int)
    if not len(kept):
        raise SystemExit(f"no pair of {args.pairs} in {', '.join(args.language)} names a CVE.")
    years = np.array([known[data.ids[place]] for place in kept])
    last = split(years.tolist())
    old, new = kept[years <= last], kept[years > last]
    keys = [normalise(text, language) for text, language in zip(data.texts, data.languages, strict=True)]
    later = {keys[place + at] for place in new for at in (0, data.n)}
    old = np.array([place for place in old if not later & {keys[place], keys[place + data.n]}], int)
    train, test = np.concatenate([old, old + data.n]), np.concatenate([new, new + data.n])
    texts, languages = scan.pick(data.texts, test), scan.pick(data.languages, test)
    plain = scan.plain(scan.pick(data.texts, train), data.truth[train], texts)
    ours = scan.fitted(data, train).score(texts, languages)
    after = replace(data, name=f"{data.name} after {last}", ids=scan.pick(data.ids, new), texts=texts,
                    languages=languages, cwes=data.cwes[new], projects=np.array(scan.pick(data.ids, new)),
                    folds=data.folds[new], shared=data.shared[new])  # fmt: skip
    print(f"{len(old)} pairs to {last} teach, {len(new)} after it are asked", file=sys.stderr)
    tools = scan.tools_of(after, args.venvs)
    systems = [*scan.common(after, tools, scan.ruled(texts, languages)), scan.System("n-grams", plain),
               scan.System("our n-grams", ours)]  # fmt: skip
    # One project has no projects to draw from: intervals are over pairs.
    return [replace(item, detail=item.detail | {"interval": "bootstrap over pairs"})
            for item in scan.figures(after, systems, "scan time", args.samples)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(required=True)
    for name, job in (("calm", calm), ("time", time)):
        one = jobs.add_parser(name)
        one.set_defaults(job=job)
        one.add_argument("pairs", type=Path)
        if name == "calm":
            one.add_argument("functions", type=Path)
        one.add_argument("--language", type=lambda text: text.split(","), default=["python"])
        one.add_argument("--venvs", type=Path)
        one.add_argument("--samples", type=int, default=scan.SAMPLES)
        one.add_argument("--records", type=Path)
    args = parser.parse_args()
    found = args.job(args)
    if args.records:
        record.append(args.records, found)
    if args.job is time:
        scan.show(found)
        return
    for item in found:
        print(f"{item.model}: {item.metric} {scan.span(item)}")


if __name__ == "__main__":
    main()
