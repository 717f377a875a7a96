"""Bytes against divergence: frontiers, what a peer has at a size, ours over it with an interval, a table, a picture.

A point is an artefact: its bytes, and for each document the bits of KL to the original and the tokens they are of. The
best peer's curve goes through every artefact of any peer that no other of them beats in both bytes and KL, straight
between neighbours when both axes are logarithmic; so peers are credited with artefacts that nobody made. Ours are
artefacts alone. Where no peer is as small there is nothing to compare with; past the largest its KL stands.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fits import few
from panels import Panel, Point, draw

from shrew import record
from shrew.record import Record
from shrew.tasks.scores import weights

LEAST = 1e-12  # bits of KL a token that the logarithm of none stands for


@dataclass(frozen=True)
class Artefact:
    """Its name, its size, and by document the bits of KL and the tokens."""

    name: str
    bytes: float
    bits: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """Median ratio of our KL to the best peer's with its interval; `sizes` has (our name, bytes, ratio, low, high);
    `unbeaten` names the peers' artefacts that none of ours beats in bytes and KL both."""

    value: float
    low: float
    high: float
    sizes: list[tuple[str, float, float, float, float]]
    unbeaten: list[str]


def frontier(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices, by size, of the points that no other beats in both."""
    order = np.lexsort((values, sizes))
    best = np.minimum.accumulate(np.concatenate([[np.inf], values[order]]))[:-1]
    return order[values[order] < best]


def curve(sizes: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The frontier's value at other sizes; NaN below its smallest."""
    kept = frontier(sizes, values)
    x, y = np.log(sizes[kept]), np.log(np.maximum(values[kept], LEAST))
    return np.asarray(np.exp(np.interp(np.log(at), x, y, left=np.nan)))


def compare(ours: Sequence[Artefact], peers: Sequence[Artefact], samples: int = 2000, seed: int = 0) -> Verdict | None:
    """At the sizes of our frontier, ours over the peers' curve; documents are resampled jointly for all, and the
    intervals are widened for few of them. None where no size of ours has a peer as small, or for a single document."""
    if not ours or not peers or (units := len(ours[0].bits)) < 2:
        return None
    mine, theirs = np.array([item.bytes for item in ours]), np.array([item.bytes for item in peers])
    drawn = np.concatenate([np.ones((1, units)), *weights(units, samples, seed)])
    my, their = _values(ours, drawn), _values(peers, drawn)
    kept = [at for at in frontier(mine, my[0]) if mine[at] >= theirs.min()]
    if not kept:
        return None
    ratios = np.array([my[row, kept] / curve(theirs, their[row], mine[kept]) for row in range(len(drawn))])
    medians = np.median(ratios, 1)
    low, high = _ends(medians, units)
    ends = _ends(ratios, units)
    sizes = [(ours[at].name, float(mine[at]), float(ratios[0, place]), float(ends[0, place]), float(ends[1, place]))
             for place, at in enumerate(kept)]  # fmt: skip
    left = [peers[at].name for at in frontier(theirs, their[0])
            if not ((mine <= theirs[at]) & (my[0] <= their[0][at])).any()]  # fmt: skip
    return Verdict(float(medians[0]), float(low), float(high), sizes, left)


def _ends(ratios: np.ndarray, units: int) -> np.ndarray:
    """[2, ...] ends of a 95 % interval of the first row from the others, which are resamples of so many units. They
    are widened as ratios are, by their logarithms, and never inwards."""
    found = np.log(np.quantile(ratios[1:], [0.025, 0.975], axis=0))
    wider = np.log(ratios[0]) + few(units) * (found - np.log(ratios[0]))
    return np.exp(np.stack([np.minimum(found[0], wider[0]), np.maximum(found[1], wider[1])]))


def _values(items: Sequence[Artefact], drawn: np.ndarray) -> np.ndarray:
    """[resamples, artefacts] bits of KL a token."""
    bits, tokens = (np.stack([getattr(item, name) for item in items], 1) for name in ("bits", "tokens"))
    return np.maximum((drawn @ bits) / (drawn @ tokens), LEAST)


def latest(records: Sequence[Record], run: str = "compression") -> list[Record]:
    """Of all records of a benchmark the last of each artefact, made or not, and the last of each comparison."""
    found = {}
    for item in records:
        if item.run == run:
            compared = "_over_" in item.metric or "_minus_" in item.metric
            more = (item.metric, item.detail.get("table", item.detail.get("peer"))) if compared else ()
            found[item.model, *more] = item
    return list(found.values())


# --- shown ------------------------------------------------------------------------------------------------------------


def tell(
    args: argparse.Namespace, run: str, table: Callable[[list[Record]], str], make: Callable[[], list[Record]]
) -> int:
    """Print the table of what `make` finds, and add it to --records; with --show, of the records in a file."""
    if args.show:
        print(table(latest(record.read(args.show), run)))
        return 0
    found = make()
    print(table(found))
    if args.records:
        record.append(args.records, found)
    return 0


def summary(records: Sequence[Record]) -> str:
    """Markdown: of each comparison what ours have at each size, and what a peer has at as many bytes."""
    made = {item.model: item for item in records if item.metric == "kl"}
    lines = []
    for item in records:
        if item.metric != "kl_over_best_peer":
            continue
        reference = item.model.rpartition(", ")[0]
        inside = item.detail["table"].startswith("GGUF")
        lines += [f"**{reference}: {item.detail['table']}**", "",
                  "| bytes | ours | KL, bits a token | best peer's at as many bytes | ratio |",
                  "| ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
        for name, size, ratio, low, high in item.detail["sizes"]:
            seen = made.get(f"{reference}, {name}")
            cells = ["", ""]
            if seen is not None:
                value = seen.detail["deployed_kl"] if inside else seen.value
                cells = [_spread(value, *(() if inside else (seen.low, seen.high))), _spread(value / ratio)]
            cells = [f"{size:,.0f}", name.partition(" ")[2], *cells, _spread(ratio, low, high)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", verdict(item), ""]
    return "\n".join(lines)


def table(records: Sequence[Record]) -> str:
    """Markdown: every artefact by size, then those that could not be made with their error."""
    lines = ["| artefact | bytes | linear layers, bits a weight | KL, bits a token | same first choice | "
             "bits per byte | seconds | MiB |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    made = [item for item in records if item.metric == "kl"]
    for item in sorted(made, key=lambda item: float(item.detail["bytes"])):
        seen = item.detail
        cost = [f"{seen['seconds']:.1f}", f"{seen['peak_bytes'] / 2**20:.0f}"] if seen.get("seconds") else ["", ""]
        cells = [item.model, f"{seen['bytes']:,}", f"{seen['bits_per_weight']:.2f}", _spread(item.value, item.low,
                 item.high), _spread(*seen["top1_agreement"]), _spread(*seen["bits_per_byte"]), *cost]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    failed = [item for item in records if item.metric == "cannot"]
    if failed:
        lines += ["", "| cannot be made here | why |", "| --- | --- |"]
        lines += [f"| {item.model} | {str(item.value).replace('|', '/')} |" for item in failed]
    for item in records:
        if item.metric == "kl_over_best_peer":
            lines += ["", verdict(item)]
    return "\n".join(lines) + "\n"


def verdict(item: Record) -> str:
    """A comparison in words, with every size where a peer is better."""
    sizes = item.detail["sizes"]
    worse = [f"{name} ({size:,.0f} bytes: {ratio:.2f})" for name, size, ratio, *_ in sizes if ratio > 1]
    told = _spread(item.value, item.low, item.high)
    text = f"{item.detail['table']}: KL over the best peer's at equal bytes {told}, median of {len(sizes)} sizes. "
    text += f"A peer is better at {', '.join(worse)}." if worse else "No peer is better at any of them."
    if item.detail["unbeaten"]:
        text += f" Nothing of ours is both smaller and better than {', '.join(item.detail['unbeaten'])}."
    return text


def _spread(value: Any, low: Any = None, high: Any = None) -> str:
    return f"{value:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})")


def picture(records: Sequence[Record]) -> str:
    """KL against the bytes of the whole file, and of the linear layers alone: the frontier of each peer, and ours. Of
    what is not healed, and of one reference, the first."""
    panels = []
    records = [item for item in records if item.metric != "kl" or not item.detail["healed"]]
    first = next((item.model.partition(",")[0] for item in records if item.metric == "kl"), "")
    records = [item for item in records if item.model.partition(",")[0] == first]
    for label, size, alone in (("bytes of the whole file", "bytes", False),
                               ("bytes of the linear layers", "linear_bytes", True)):  # fmt: skip
        series: dict[str, list[Point]] = {}
        peers = dict.fromkeys(item.detail["peer"] for item in records if item.metric == "kl")
        for peer in sorted(peers, key=lambda peer: peer != "Shrew"):
            found = [item for item in records if item.metric == "kl" and item.detail["peer"] == peer
                     and (item.detail["alone"] or not alone)]  # fmt: skip
            if found:
                sizes = np.array([float(item.detail[size]) for item in found])
                kept = frontier(sizes, np.array([float(item.value or 0) for item in found]))
                series[peer] = [_point(found[at], sizes[at]) for at in kept]
        if series:
            panels.append(Panel(label, series))
    return draw(panels, "KL to the original, bits a token", powers=True) if panels else ""


def _point(item: Record, size: float) -> Point:
    value, low, high = (math.log10(max(float(end or 0), LEAST)) for end in (item.value, item.low, item.high))
    return Point(size, value, low, high)
