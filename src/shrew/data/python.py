"""Python source found on the machine: what the starter model was trained on and what it is measured on.

Evaluation modules are standard-library modules chosen by a hash of their names; they are never trained on, and
neither is any file that shares a run of 50 tokens with one (vendored copies, back-ports) or that tests one.
"""

import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from shrew.errors import DataError, nearest

RUN = 50  # tokens
EVALUATION_SHARE, EVALUATION_RESIDUE = 10, 6
# Modules that later interpreters no longer have would make the text differ from version to version.
REMOVED = frozenset({
    "aifc", "asynchat", "asyncore", "cgi", "cgitb", "chunk", "crypt", "distutils", "idlelib", "imghdr", "imp",
    "lib2to3", "mailcap", "msilib", "nntplib", "pipes", "smtpd", "sndhdr", "sunau", "telnetlib", "turtledemo",
    "uu", "xdrlib",
})
PACKAGE_BYTES = 4_000_000  # at most this much of one package, so that no single style dominates
FILE_BYTES = (200, 200_000)
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Unlicense|Zlib|HPND|CC0)\b", re.I)
RESTRICTED = re.compile(r"GPL|Affero|MPL|EUPL|Proprietary|Commercial", re.I)
TOKEN = re.compile(r"\w+|[^\w\s]")
FACTOR = np.uint64(0x9E3779B97F4A7C15)
FILTER = 20  # bits
INVERSE = np.uint64(pow(int(FACTOR), -1, 2**64))


@dataclass
class Manifest:
    """What was read: counts, licences and hashes, for the starter's card."""

    interpreter: str = field(default_factory=lambda: sys.version.split()[0])
    evaluation: dict[str, str] = field(default_factory=dict)  # module file -> sha256
    packages: dict[str, dict[str, object]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> files
    files: int = 0
    bytes: int = 0
    sha256: str = ""  # of the sorted hashes of every file kept


def corpus(part: str) -> Iterator[tuple[str, str]]:
    """(id, text) of 'train', 'evaluation' or 'stdlib' (the training share of the standard library alone)."""
    parts = {"train": lambda: build()[0], "evaluation": evaluation, "stdlib": lambda: standard_library(False)[0]}
    if part not in parts:
        raise DataError(f"python:{part}: no such part; {nearest(part, parts)}")
    yield from parts[part]()


def evaluation() -> list[tuple[str, str]]:
    """The evaluation modules of the running interpreter: one standard-library module in ten, by its name's hash."""
    return [(f"python:{name}", text) for name, text in _library(_is_evaluation)]


def _is_evaluation(name: str) -> bool:
    top = name.split("/")[0].removesuffix(".py")
    if top == "test" or top in REMOVED:
        return False
    return int(hashlib.sha256(top.encode()).hexdigest(), 16) % EVALUATION_SHARE == EVALUATION_RESIDUE


def _library(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(name, text) of the modules with such names; no others are read, nor what is installed beside them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for top in root.iterdir():
        if top.name.removesuffix(".py") in sys.stdlib_module_names or top.name == "test":
            inside = top.rglob("*.py") if top.is_dir() and not top.is_symlink() else iter(())
            found += [top] if top.suffix == ".py" else inside
    for path in sorted(found):
        name = path.relative_to(root).as_posix()
        if wanted(name) and "lib2to3/tests" not in name and (text := source_text(path)) is not None:
            yield name, text


def source_text(path: Path) -> str | None:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8") if FILE_BYTES[0] <= len(raw) <= FILE_BYTES[1] else None
    except (UnicodeDecodeError, OSError):
        return None


def standard_library(tests: bool = True) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The training share of the standard library, with or without its tests, and what was dropped by reason."""
    held = evaluation()
    names = {id.removeprefix("python:").split("/")[0].removesuffix(".py") for id, _ in held}
    runs = Runs(text for _, text in held)
    kept, dropped = [], {"evaluation module": len(held), "test of an evaluation module": 0, "shared run": 0}
    for name, text in _library(lambda name: not _is_evaluation(name) and (tests or "test" not in name)):
        if any(f"test_{module.strip('_')}" in name or f"/{module}/" in f"/{name}" for module in names):
            dropped["test of an evaluation module"] += 1
        elif text in runs:
            dropped["shared run"] += 1
        else:
            kept.append((f"python:{name}", text))
    return kept, dropped


class Runs:
    """The set of all runs of 50 tokens in some texts; `text in runs` says whether it shares one of them.

    A text of fewer tokens, but at least `shortest`, is known as a whole."""

    def __init__(self, texts: Iterable[str], shortest: int = RUN) -> None:
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            words = hash_words(text)
            if len(words) >= shortest:
                length = min(len(words), RUN)
                found.setdefault(length, []).append(windows(words, length))
        self._known = {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}
        self._maybe = {length: np.zeros(1 << FILTER, bool) for length in found}  # by the first bits: most end here
        for length, known in self._known.items():
            self._maybe[length][known >> np.uint64(64 - FILTER)] = True

    def __contains__(self, text: str) -> bool:
        return self.shares(hash_words(text))

    def shares(self, words: np.ndarray) -> bool:
        """Whether a text of which these are the hashed words holds one of the runs."""
        sums = _sums(words)
        for length, known in self._known.items():
            hashes = _differences(sums, length)
            hashes = hashes[self._maybe[length][hashes >> np.uint64(64 - FILTER)]]
            if among(hashes, known).any():
                return True
        return False


def among(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which hashes [n] stand in the sorted array `known` -> [n] bool."""
    if not len(known):
        return np.zeros(len(hashes), bool)
    return known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes


def windows(words: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of `length` among hashed words [n] -> [max(n - length + 1, 0)] uint64.

    The polynomial sum of words[i + j] * FACTOR^(length - 1 - j) modulo 2^64; all at once, since FACTOR has an inverse.
    """
    return _differences(_sums(words), length)


def _sums(words: np.ndarray) -> np.ndarray:
    """Sums of words[i] * FACTOR^-i before each place [n + 1]."""
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(words * _powers(len(words))[1])])


def _differences(sums: np.ndarray, length: int) -> np.ndarray:
    count = len(sums) - length
    if count < 1:
        return np.empty(0, np.uint64)
    return (sums[length:] - sums[:count]) * _powers(len(sums))[0][length - 1 : length - 1 + count]


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """FACTOR^i and FACTOR^-i for i below `count`."""
    rising, falling = _all_powers(1 << max(count, 1).bit_length())
    return rising[:count], falling[:count]


@cache
def _all_powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    each = (np.full(count, base, np.uint64) for base in (FACTOR, INVERSE))
    return tuple(np.concatenate([np.ones(1, np.uint64), np.cumprod(item)]) for item in each)  # type: ignore[return-value]


_WORDS: dict[str, int] = {}


def hash_words(text: str) -> np.ndarray:
    """The stable 64-bit hashes [n] of a text's tokens."""
    return np.array([hash_word(word) for word in TOKEN.findall(text)], dtype=np.uint64)


def hash_word(word: str) -> int:
    """A stable 64-bit hash of one token (Python's own differs between processes)."""
    if word not in _WORDS:
        _WORDS[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    return _WORDS[word]


def build() -> tuple[list[tuple[str, str]], Manifest]:
    """The whole training corpus, standard library and permissively licensed packages, with its manifest."""
    manifest = Manifest()
    held = evaluation()
    manifest.evaluation = {id: hashlib.sha256(text.encode()).hexdigest() for id, text in held}
    names = {id.removeprefix("python:").split("/")[0].removesuffix(".py") for id, _ in held}
    runs = Runs(text for _, text in held)
    kept, manifest.dropped = standard_library()
    manifest.packages["(standard library)"] = {"licence": "PSF-2.0", "files": len(kept)}
    seen = {hashlib.sha256(text.encode()).hexdigest() for _, text in kept}
    for package, licence, paths in _packages():
        read, size = 0, 0
        ordered = sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())
        for path in ordered:
            text = source_text(path)
            if text is None or size + len(text) > PACKAGE_BYTES:
                continue
            mark = hashlib.sha256(text.encode()).hexdigest()
            reason = (
                "duplicate" if mark in seen
                else "test of an evaluation module" if path.stem.removeprefix("test_") in names and "test" in path.stem
                else "shared run" if text in runs
                else ""
            )  # fmt: skip
            if reason:
                manifest.dropped[reason] = manifest.dropped.get(reason, 0) + 1
                continue
            seen.add(mark)
            read, size = read + 1, size + len(text)
            kept.append((f"package:{package}/{path.name}", text))
        if read:
            manifest.packages[package] = {"licence": licence, "files": read}
    manifest.files = len(kept)
    manifest.bytes = sum(len(text.encode()) for _, text in kept)
    manifest.sha256 = hashlib.sha256("".join(sorted(seen)).encode()).hexdigest()
    return kept, manifest


def _packages() -> Iterator[tuple[str, str, list[Path]]]:
    found: dict[str, tuple[str, list[Path]]] = {}
    for package in metadata.distributions():
        about: Any = package.metadata
        name = f"{about['Name']} {about['Version']}"
        licence = permissive(claims(about))
        if not licence or about["Name"] == "shrew":
            continue
        sources = [Path(str(package.locate_file(item))) for item in package.files or [] if item.suffix == ".py"]
        found.setdefault(name, (licence, sources))
    for name in sorted(found):
        yield name, *found[name]


def claims(about: Any) -> list[str]:
    """What a package's metadata say of its licence."""
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:60]]
    return said + [item for item in about.get_all("Classifier") or [] if item.startswith("License")]


def permissive(claims: list[str]) -> str:
    """The first claim of a permissive licence; "" where there is none, or any claim of another kind."""
    licence = next((claim for claim in claims if PERMISSIVE.search(claim)), "")
    return "" if any(RESTRICTED.search(claim) for claim in claims) else licence.strip().partition("\n")[0]
