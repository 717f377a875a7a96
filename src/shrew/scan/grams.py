"""Hashed n-grams of code tokens with logistic weights: a cheap linear detector, and the first stage of a scan.

A text is lexed by one regular expression that is near enough for every language. Comments go. A string literal becomes
its traits: whether it is formatted, holds a format field, words of SQL, a slash or a tag; its words follow after the
code. A text has as features the runs of one to three tokens or words, every call's name with each token inside its
parentheses, and every call's name with all the traits of its arguments; CRC-32 and a multiplication hash each to one of
2**BITS buckets (Weinberger et al. 2009, arXiv:0902.2206). What calls are given (`values`) has a table of its own, as
large. A bucket counts once a text, and a row has length 1 in each table.

The weights minimise the L2-regularised logistic loss, found by a truncated Newton method: exact, no learning rate. The
penalty of a bucket is smaller the more of the pairs that have it were repaired by adding or taking it away.
They are kept as 8-bit integers with one scale for each run of BLOCK buckets. Scoring needs numpy alone and adds in one
order, so that every machine gives the same logits.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shrew import files
from shrew.errors import DataError
from shrew.scan.values import values

BITS = 17
BLOCK = 256
BATCH = 256  # texts hashed at once
LONGEST = 200_000  # characters of a text that are read
FORMAT = 2
BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
LARGEST = 2**24  # bytes of a file of weights, unpacked

# An unclosed string ends with its line or the text, so that no hostile text is read again and again.
STRING = (
    r"(?:[A-Za-z]{1,2}(?=[\"']))?"
    r"(?:\"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z)|'{3}(?:\\.|[^\\])*?(?:'{3}|\Z)"
    r"|\"(?:\\.|[^\"\\\n])*\"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*(?:`|\Z))"
)
CODE = r"[^\W\d]\w*|\d[\w.]*|->|=>|::|:=|\+\+|--|&&|\|\||<<|>>|[-+*/%&|^!=<>]=|\*\*|//|[^\s\w]"
LEXERS = {
    "hash": re.compile(rf"#[^\n]*|({STRING})|({CODE})", re.S),
    "slash": re.compile(rf"//[^\n]*|/\*.*?(?:\*/|\Z)|({STRING})|({CODE})", re.S),
}
COMMENTS = {"python": "hash", "ruby": "hash"}  # every other language has slashes
TRAITS = (
    ("%", re.compile(r"%(?:\(\w{0,40}\))?[sdrifx]")),
    ("{", re.compile(r"\{[^{}]{0,40}\}")),
    ("q", re.compile(r"\b(?:select|insert|update|delete|where|from|values)\b", re.I)),
    ("/", re.compile("/")),
    ("<", re.compile("<")),
)
LITERAL = 400  # characters of a string literal whose words count
WORDS = re.compile(r"%(?:\(\w{0,40}\))?[sdrifx]|\{[^{}]{0,40}\}|\w+|[^\s\w]")
OPERATORS = frozenset(("%", "+", "format", "=", ",", "f", "["))  # what counts in the traits of arguments
STEP, SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd: multiplying loses nothing


def tokens(text: str, language: str) -> list[str]:
    """Code tokens in order; a number is "0", a string literal is `"` and its traits."""
    return lexed(text, language)[0]


def lexed(text: str, language: str) -> tuple[list[str], list[str]]:
    """The code tokens, and the words and marks inside the string literals, each after a `'`."""
    found, inside = [], []
    for literal, code in LEXERS[COMMENTS.get(language, "slash")].findall(text[:LONGEST]):
        if literal:
            formatted = "f" if literal[0] in "fF" else ""
            found.append('"' + formatted + "".join(name for name, trait in TRAITS if trait.search(literal)))
            if len(literal) < LITERAL:  # a longer one is a docstring or data
                inside += [f"'{word}" for word in WORDS.findall(literal)]
        elif code:
            found.append("0" if code[0].isdigit() else code)
    return found, inside


def calls(row: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, token inside its parentheses) and (name or "*", traits of all its arguments) of every call.

    A token belongs to the innermost parentheses; the traits of an inner call also count for the outer one.
    """
    open_calls: list[tuple[str, set[str]]] = []
    before = ""
    for token in row:
        if token == "(":
            open_calls.append((before if before[:1].isalpha() or before[:1] == "_" else "", set()))
        elif token == ")" and open_calls:
            name, traits = open_calls.pop()
            if name:
                shape = "(" + " ".join(sorted(traits))
                yield name, shape
                yield "*", shape
            if open_calls:
                open_calls[-1][1].update(traits)
        elif open_calls:
            name, traits = open_calls[-1]
            if name:
                yield name, token
            if token[0] == '"' or token in OPERATORS:
                traits.add(token)
        before = token


@dataclass(frozen=True)
class Rows:
    """Sparse rows: row i holds `columns[starts[i]:starts[i + 1]]`, each as 1 / sqrt(their number) or as `given`."""

    starts: np.ndarray  # int64 [n + 1]
    columns: np.ndarray  # int64 [nonzeros], ascending within a row
    given: np.ndarray | None = None  # float64 [nonzeros]

    @property
    def owner(self) -> np.ndarray:
        """int64 [nonzeros]: the row of each entry."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def scale(self) -> np.ndarray:
        """float64 [n]: the value of a row's entries; rows without any have 1."""
        found: np.ndarray = 1 / np.sqrt(np.maximum(np.diff(self.starts), 1))
        return found

    @property
    def values(self) -> np.ndarray:
        """float64 [nonzeros]: the value of each entry."""
        return np.repeat(self.scale, np.diff(self.starts)) if self.given is None else self.given


def both(texts: Sequence[str], languages: Sequence[str], bits: int = BITS) -> Rows:
    """The buckets of each text in both tables, those of the second from 2**bits on."""
    first, second = rows(texts, languages, bits), described(texts, languages, bits)
    order = np.argsort(np.concatenate([first.owner, second.owner]), kind="stable")
    return Rows(
        first.starts + second.starts,
        np.concatenate([first.columns, second.columns + (1 << bits)])[order],
        np.concatenate([first.values, second.values])[order],
    )


def described(texts: Sequence[str], languages: Sequence[str], bits: int = BITS) -> Rows:
    """The buckets of what the calls of each text are given, without repeats."""
    keys = [np.zeros(0, np.int64)]
    for place, (text, language) in enumerate(zip(texts, languages, strict=True)):
        codes = [zlib.crc32(name.encode("utf-8", "surrogatepass")) for name in values(text[:LONGEST], language)]
        keys.append(np.unique(_keys(np.array(codes, np.uint64) * STEP, np.array(place), bits)))
    counts = [len(some) for some in keys[1:]]
    return Rows(np.cumsum([0, *counts]), np.concatenate(keys) & ((1 << bits) - 1))


def moved(found: Rows, twins: np.ndarray, width: int) -> np.ndarray:
    """float64 [width]: of each bucket how freely it may weigh, sqrt((a + 1/2) / (b + 1)), if b of the pairs [k, 2] of
    rows have it in either text and a of them in one alone."""
    pair = np.full((2, len(found.starts) - 1), -1)
    pair[[0, 1], twins] = np.arange(len(twins))[:, None]
    one, two = (place[place >= 0] * width + found.columns[place >= 0] for place in pair[:, found.owner])
    shared = np.bincount(np.intersect1d(one, two) % width, minlength=width)
    each = np.bincount(np.concatenate([one, two]) % width, minlength=width)
    free: np.ndarray = np.sqrt((each - 2 * shared + 0.5) / (each - shared + 1))
    return free


def rows(texts: Sequence[str], languages: Sequence[str], bits: int = BITS) -> Rows:
    """The buckets of each text, without repeats."""
    parts, counts = [], []
    for low in range(0, len(texts), BATCH):
        keys = _batch(texts[low : low + BATCH], languages[low : low + BATCH], bits)
        parts.append(keys & ((1 << bits) - 1))
        counts.append(np.bincount(keys >> bits, minlength=len(texts[low : low + BATCH])))
    if not parts:
        return Rows(np.zeros(1, np.int64), np.zeros(0, np.int64))
    return Rows(np.concatenate([[0], np.cumsum(np.concatenate(counts))]), np.concatenate(parts))


def _batch(texts: Sequence[str], languages: Sequence[str], bits: int) -> np.ndarray:
    """Sorted distinct keys: number of the text above, bucket in the low `bits`."""
    memo: dict[str, int] = {}
    def code(token: str) -> int:
        found = memo.get(token)
        if found is None:
            found = memo[token] = zlib.crc32(token.encode("utf-8", "surrogatepass"))
        return found

    flat: list[int] = []
    names: list[int] = []
    inner: list[int] = []
    sizes, pairs = [], []
    for text, language in zip(texts, languages, strict=True):
        row, inside = lexed(text, language)
        flat.extend(map(code, row))
        flat.extend(map(code, inside))
        sizes.append(len(row) + len(inside))
        for name, token in calls(row):
            names.append(code(name))
            inner.append(code(token))
        pairs.append(len(names))
    runs = np.array(flat, np.uint64)
    owner = np.repeat(np.arange(len(texts)), sizes)
    called = np.repeat(np.arange(len(texts)), np.diff([0, *pairs]))
    keys = []
    mixed = np.zeros_like(runs)
    for length in (1, 2, 3):
        mixed = (mixed[: len(runs) - length + 1] + runs[length - 1 :] + np.uint64(1)) * STEP
        whole = owner[: len(mixed)] == owner[length - 1 :]  # a run that does not cross from one text into the next
        keys.append(_keys(mixed[whole], owner[: len(mixed)][whole], bits))
    mixed = (np.array(names, np.uint64) * SPREAD + np.array(inner, np.uint64)) * STEP
    keys.append(_keys(mixed, called, bits))
    return np.unique(np.concatenate(keys))


def _keys(mixed: np.ndarray, owner: np.ndarray, bits: int) -> np.ndarray:
    mixed = (mixed ^ (mixed >> np.uint64(29))) * SPREAD
    bucket = (mixed >> np.uint64(64 - bits)).astype(np.int64)
    found: np.ndarray = (owner << bits) | bucket
    return found


@dataclass(frozen=True)
class Grams:
    """Logistic weights over 2**bits buckets of each of two tables: int8 `steps` times the `scales` (float32) of their
    blocks; and a bias."""

    steps: np.ndarray
    scales: np.ndarray
    bias: float

    @property
    def bits(self) -> int:
        return len(self.steps).bit_length() - 2

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        languages: Sequence[str],
        cost: float = 10.0,
        importance: np.ndarray | None = None,
        bits: int = BITS,
        twins: np.ndarray | None = None,
        given: bool = True,
    ) -> "Grams":
        """Weights that minimise |w / free|**2 / 2 + cost * (sum of the logistic losses, each times its `importance`),
        then rounded to what a file holds. `labels` are 1 for vulnerable and 0 for not. `free` is 1, or what `moved`
        says of `twins`, the places [k, 2] of texts and their repairs. Not `given`: no weights in the second table."""
        truth = np.asarray(labels, np.float64)
        if len(set(truth.tolist())) < 2:
            raise DataError("n-gram weights need texts of both kinds, vulnerable and not.")
        each = np.full(len(truth), cost) if importance is None else cost * np.asarray(importance, np.float64)
        width, found = 2 << bits, both(texts, languages, bits)
        free = np.ones(width) if twins is None else moved(found, twins, width)
        if not given:
            free[width // 2 :] = 0.0
        weights, bias = logistic(replace(found, given=found.values * free[found.columns]), truth, each, width)
        weights = weights * free
        blocks = weights.reshape(-1, BLOCK)
        scales = (np.abs(blocks).max(1) / 127).astype(np.float32)
        steps = np.divide(blocks, scales[:, None], out=np.zeros(blocks.shape), where=scales[:, None] > 0)
        return cls(np.rint(steps).astype(np.int8).ravel(), scales, bias)

    def score(self, texts: Sequence[str], languages: Sequence[str]) -> np.ndarray:
        """float32 [n] logits: above 0 is more likely vulnerable, for texts as they were trained on."""
        found = both(texts, languages, self.bits)
        # bincount adds one entry after the other, so that the sum is the same everywhere
        weights = self.steps[found.columns] * self.scales[found.columns // BLOCK].astype(np.float64)
        total = np.bincount(found.owner, weights * found.values, len(texts))
        logits: np.ndarray = (total + self.bias).astype(np.float32)
        return logits

    def save(self, path: Path) -> None:
        """A NumPy archive of about 2**bits bytes or less; equal weights give equal bytes."""
        stream = io.BytesIO()
        np.savez_compressed(stream, format=np.int64(FORMAT), bias=np.float64(self.bias), scales=self.scales,
                            steps=self.steps)  # fmt: skip
        files.write_bytes(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Grams":
        """The weights of a file; raises DataError for one that is damaged or of another kind."""
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(item.file_size for item in archive.infolist()) > LARGEST:
                    raise ValueError(f"more than {LARGEST:,} bytes")
            with np.load(path, allow_pickle=False) as content:
                version, bias, scales, steps = (content[name] for name in ("format", "bias", "scales", "steps"))
            if version.shape or int(version) != FORMAT:
                raise ValueError("another format")
            size = len(steps) if steps.ndim == 1 and steps.dtype == np.int8 else 0
            if size < 2 * BLOCK or size & (size - 1) or scales.shape != (size // BLOCK,) or scales.dtype != np.float32:
                raise ValueError("the arrays do not fit together")
            if bias.shape or not np.isfinite(bias) or not np.isfinite(scales).all():
                raise ValueError("not finite")
        except FileNotFoundError:
            raise DataError(f"{path}: no such file of n-gram weights.") from None
        except BROKEN as error:
            raise DataError(f"{path} holds no n-gram weights ({error}); restore or fit it again.") from None
        return cls(steps, scales, float(bias))


def logistic(
    found: Rows, truth: np.ndarray, cost: np.ndarray, width: int, tolerance: float = 1e-6, limit: int = 100
) -> tuple[np.ndarray, float]:
    """[width] weights and the bias (not regularised) with the least |w|**2 / 2 + sum(cost * logistic loss).

    Newton steps whose linear systems are solved by conjugate gradients, with a line search that halves (Lin, Weng and
    Keerthi 2008, without the trust region). Ends when the gradient is `tolerance` times the first one.
    """
    owner, each, n = found.owner, found.values, len(truth)

    def forward(point: np.ndarray) -> np.ndarray:
        return np.bincount(owner, point[found.columns] * each, n) + point[-1]

    def backward(residual: np.ndarray) -> np.ndarray:
        total = np.bincount(found.columns, residual[owner] * each, width)
        return np.append(total, residual.sum())

    def loss(point: np.ndarray, logits: np.ndarray) -> float:
        return float(point[:-1] @ point[:-1] / 2 + cost @ (np.logaddexp(0, logits) - truth * logits))

    point = np.zeros(width + 1)
    kept = np.append(np.ones(width), 0.0)  # the bias is free
    logits, first = forward(point), 0.0
    for _ in range(limit):
        share = (1 + np.tanh(logits / 2)) / 2
        slope = kept * point + backward(cost * (share - truth))
        size = float(np.linalg.norm(slope))
        first = first or size
        if size <= tolerance * first:
            break
        curve = cost * share * (1 - share)
        step = _conjugate(lambda v: kept * v + backward(curve * forward(v)), -slope,  # noqa: B023
                          min(0.1, np.sqrt(size / first)) * size)  # fmt: skip
        now, change, length = loss(point, logits), forward(step), 1.0
        while loss(point + length * step, logits + length * change) > now + 1e-4 * length * float(slope @ step):
            length /= 2
            if length < 1e-10:  # rounding is all that is left
                return point[:-1], float(point[-1])
        point, logits = point + length * step, logits + length * change
    return point[:-1], float(point[-1])


def _conjugate(product: Callable[[np.ndarray], np.ndarray], wanted: np.ndarray, tolerance: float) -> np.ndarray:
    """x with |product(x) - wanted| <= tolerance, for a symmetric positive definite product (Hestenes, Stiefel 1952)."""
    found, rest = np.zeros_like(wanted), wanted.copy()
    way, size = rest.copy(), float(rest @ rest)
    for _ in range(len(wanted)):
        if size <= tolerance * tolerance:
            break
        moved = product(way)
        length = size / float(way @ moved)
        found += length * way
        rest -= length * moved
        size, before = float(rest @ rest), size
        way = rest + (size / before) * way
    return found
