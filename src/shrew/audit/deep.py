"""What only the numbers tell: `--deep` reads every code once, in bounded memory."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shrew.audit.held import Audit, Finding, Held, named, plural

SMALL = 4096  # bytes below which a weight is not worth a finding
PIECE = 1 << 20  # bytes hashed at once
CONSTANT = 0.01  # share of the groups from which on constant ones are told
SPARSE = 0.3  # share of the weights from which on zeros are told
FEW = 4  # a row of n dense weights with fewer than n / FEW values was rounded before it was stored


@dataclass
class Scan:
    """What the numbers of one weight say. `levels` and `entropy` (bits a code) of codes alone; shares from 0 to 1."""

    levels: int = 0
    entropy: float = 0.0
    constant: float = 0.0  # of the groups that hold one value throughout
    zero: float = 0.0
    rounded: float = 0.0  # of the rows of a dense weight that hold few values
    short: bool = False  # fp32 whose every number is a bf16
    bad: int = 0  # numbers that are not finite
    counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64), repr=False)


def scan(item: Held) -> Scan | None:
    """None where the format's numbers cannot be read."""
    if item.groups is None:
        return None
    found, total, rows, constant, zero, rounded = Scan(short=item.effective == "fp32"), 0, 0, 0, 0, 0
    coded = True
    for part in item.groups():
        if not part.size:
            continue
        total, rows = total + part.size, rows + len(part)
        constant += int((part == part[:, :1]).all(1).sum()) if part.shape[1] > 1 else 0
        if part.dtype == np.uint8:
            found.counts += np.bincount(part.reshape(-1), minlength=256)
            continue
        coded = False
        zero += part.size - int(np.count_nonzero(part))
        found.bad += part.size - int(np.isfinite(part).sum())
        if found.short:
            found.short = not bool((np.ascontiguousarray(part).view(np.uint32) & 0xFFFF).any())
        if not item.quantized and part.shape[1] >= 16 * FEW:
            ordered = np.sort(part, axis=1)
            rounded += int((1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1) < part.shape[1] / FEW).sum())
    if not total:
        return None
    found.constant, found.zero, found.rounded = constant / rows, zero / total, rounded / rows
    if coded:
        shares = found.counts[found.counts > 0] / total
        found.levels, found.entropy = len(shares), max(0.0, float(-(shares * np.log2(shares)).sum()))
    return found


def findings(audit: Audit) -> Iterator[Finding]:
    scans = {item.name: (item, found) for item in audit.held if (found := scan(item)) is not None}
    if audit.held and not scans:
        yield Finding("note", "--deep cannot read the codes of this format.")
    yield from _levels(scans)
    yield from _constant(scans)
    yield from _dense(scans)
    yield from duplicates(audit.held)


def _levels(scans: dict[str, tuple[Held, Scan]]) -> Iterator[Finding]:
    coded = [(item, found) for item, found in scans.values() if found.levels and item.quantized]
    few = [(item, found) for item, found in coded
           if 1 < found.levels <= 2 ** (item.code - 1) and item.bytes >= SMALL and found.constant < 0.9]  # fmt: skip
    if few:
        levels = sorted({found.levels for _, found in few})
        spare = sum((item.code - math.ceil(math.log2(found.levels))) * item.weights / 8 for item, found in few)
        used = f"{levels[0]}" + (f" to {levels[-1]}" if len(levels) > 1 else "")
        yield Finding("waste", f"{plural(len(few), 'weight')} of {few[0][0].code:g} bits with only {used} of "
                      f"{2 ** int(few[0][0].code)} levels in use: {spare:,.0f} bytes carry nothing.",
                      "store them in as many bits as they use",
                      tuple(item.name for item, _ in few))  # fmt: skip
    layers = [(item, found) for item, found in coded if item.role == "linear"]
    total = sum(item.weights for item, _ in layers)
    if total:
        bits = sum(item.code * item.weights for item, _ in layers) / total
        carried = sum(min(found.entropy, item.code) * item.weights for item, found in layers) / total
        yield Finding("note", f"The codes of the linear layers carry {carried:.2f} bits of information in {bits:.2f}.",
                      "the rest is what a lossless coder could save" if carried < 0.95 * bits else "")  # fmt: skip


def _constant(scans: dict[str, tuple[Held, Scan]]) -> Iterator[Finding]:
    flat = [(item, found) for item, found in scans.values()
            if found.constant > CONSTANT and item.bytes >= SMALL and item.role != "other"]  # fmt: skip
    if flat:
        worst, most = max(flat, key=lambda pair: pair[1].constant)
        yield Finding("waste", f"In {plural(len(flat), 'weight')} groups hold one value throughout (most in "
                      f"{worst.name}: {most.constant:.0%} of them): they say nothing beyond their scale.",
                      "look whether quantizing "
                      "went wrong there (dead channels, or scales that overflowed)",
                      tuple(item.name for item, _ in flat))  # fmt: skip


def _dense(scans: dict[str, tuple[Held, Scan]]) -> Iterator[Finding]:
    bad = [item for item, found in scans.values() if found.bad]
    if bad:
        yield Finding("broken", f"{plural(len(bad), 'weight')} contain NaN or infinite numbers: "
                      f"{named(item.name for item in bad)}.", "use another copy", tuple(
                          item.name for item in bad))  # fmt: skip
    kept = [(item, found) for item, found in scans.values() if not item.quantized and item.bytes >= SMALL]
    rounded = [item for item, found in kept if found.rounded > 0.5 and found.constant < 0.5 and len(item.shape) > 1]
    if rounded:
        size = sum(item.bytes for item in rounded)
        yield Finding("claim", f"{plural(len(rounded), 'dense weight')} hold values that were rounded to a few levels "
                      f"before: {size:,} bytes as {rounded[0].effective}, with the quality of the smaller grid.",
                      "save them packed", tuple(item.name for item in rounded))  # fmt: skip
    short = [item for item, found in kept if found.short]
    if short:
        size = sum(item.bytes for item in short) // 2
        yield Finding("waste", f"{plural(len(short), 'weight')} are stored as fp32 and hold bf16 numbers: {size:,} "
                      "bytes are zeros.", "save them as bf16; no number changes", tuple(item.name for item in short)
                      )  # fmt: skip
    sparse = [(item, found) for item, found in kept if found.zero > SPARSE and item.role != "other"]
    if sparse:
        share = sum(found.zero * item.weights for item, found in sparse) / sum(item.weights for item, _ in sparse)
        yield Finding("waste", f"{share:.0%} of the numbers in {plural(len(sparse), 'weight')} are zero, and stored "
                      "like any other.", "pruning saved no byte here: say so, or store them sparse",
                      tuple(item.name for item, _ in sparse))  # fmt: skip


def duplicates(held: list[Held]) -> Iterator[Finding]:
    """Weights whose bytes are those of another."""
    alike: dict[tuple[int, ...], list[Held]] = defaultdict(list)
    for item in held:
        if item.bytes >= SMALL and all(span.start >= 0 for span in item.spans):
            alike[tuple(span.bytes for span in item.spans)].append(item)
    for items in alike.values():
        if len({item.spans for item in items}) < 2:
            continue
        same: dict[bytes, list[Held]] = defaultdict(list)
        for item in items:
            same[_digest(item)].append(item)
        for twins in same.values():
            places = {item.spans: item for item in twins}
            if len(places) > 1:
                size = (len(places) - 1) * twins[0].bytes
                what = "The embedding is stored twice" if {item.role for item in twins} == {"embedding", "head"} else (
                    f"{len(places)} weights are byte for byte the same")  # fmt: skip
                yield Finding("waste", f"{what}: {named(item.name for item in places.values())} ({size:,} bytes).",
                              "store it once and tie the others to it", tuple(item.name for item in twins)
                              )  # fmt: skip


def _digest(item: Held) -> bytes:
    found = hashlib.sha256()
    for span in item.spans:
        with span.file.open("rb") as stream:
            stream.seek(span.start)
            left = span.bytes
            while left > 0 and (piece := stream.read(min(PIECE, left))):
                found.update(piece)
                left -= len(piece)
    return found.digest()
