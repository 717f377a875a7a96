"""Source code of several languages, from package archives and what is installed: what the detectors of `shrew scan`
are pretrained on. Only permissively licensed packages are read, and nothing that they are evaluated on: no evaluated
project, under its own name or vendored, and no file that shares a run of tokens with an evaluated function."""

import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shrew import files
from shrew.data import python, read_jsonl
from shrew.errors import DataError

LANGUAGES = {
    "py": "python", "c": "c", "h": "c", "cc": "cpp", "cpp": "cpp", "cxx": "cpp", "hh": "cpp", "hpp": "cpp",
    "js": "javascript", "mjs": "javascript", "go": "go", "rb": "ruby", "java": "java",
}  # fmt: skip
# Parts of the corpus' bytes. Where a language has less than its part, the corpus is smaller, not otherwise mixed.
SHARES = {"python": 0.45, "c": 0.30, "cpp": 0.10, "javascript": 0.08, "java": 0.05, "go": 0.01, "ruby": 0.01}
PACKAGE_BYTES = 600_000  # of one package and language
SHORTEST = 20  # tokens of an evaluated function that is known as a whole where it is shorter than a run
COPIED = 0.5  # share of a file's sampled runs that stand in earlier files
SAMPLE = 32  # one run in so many is remembered, to find copies

# Evaluated projects have these names, but as folders they are everybody's.
ORDINARY = frozenset({"src", "server", "client", "python", "editor", "commit", "website", "infra", "linux"})
VERSION = re.compile(r"[-_.]?v?\d[\d._-]*$")
HEADS = ("PKG-INFO", "package.json")
HEADER, LINE, DIGITS = 3_000, 1_000, 0.12  # characters, characters, share of the characters
REPOSITORY = re.compile(r"(?:github|gitlab|bitbucket)\.\w+[/:][\w.-]+/([\w.-]+)")
UNWANTED = re.compile(r"(^|[/_.-])(tests?|testing|testdata|unittests?|spec|dist|min|node_modules|bundle)([/_.-]|$)",
                      re.I)  # fmt: skip
COPYLEFT = re.compile(r"\b[AL]?GPL|GNU +(Lesser|Library|Affero|General)|Mozilla Public|Eclipse Public|All rights "
                      r"reserved\W+(confidential|proprietary)", re.I)  # fmt: skip
GENERATED = re.compile(r"generated (by|from|automatically|file)|automatically generated|auto-?generated|@generated|"
                       r"do not (edit|modify)|-\*- buffer-read-only", re.I)  # fmt: skip
LICENCE_FILE = re.compile(r"(licen[sc]e|copying|copyright|unlicense)", re.I)
HASHES = re.compile(r"'''.*?'''|\"\"\".*?\"\"\"|#[^\n]*", re.S)
SLASHES = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)


@dataclass(frozen=True, slots=True)
class File:
    path: str  # inside its package, posix
    text: str
    language: str


@dataclass(frozen=True, slots=True)
class Package:
    name: str  # with its version
    names: frozenset[str]  # its own and its repository's, normalised
    licence: str
    files: list[File]


@dataclass
class Manifest:
    """What was read and what was not: counts, licences and hashes."""

    evaluated: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> sha256, functions
    projects: int = 0  # evaluated ones
    excluded: dict[str, int] = field(default_factory=dict)  # reason -> files, or packages
    excluded_packages: list[str] = field(default_factory=list)
    packages: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> licence, files, bytes
    languages: dict[str, dict[str, int]] = field(default_factory=dict)  # language -> files, bytes
    sha256: str = ""  # of the sorted hashes of every file kept


def normalised(name: str) -> str:
    """A project's name as it is compared: the last part, lower case, runs of - _ . as one -."""
    return re.sub(r"[-_.]+", "-", name.strip().rstrip("/").rsplit("/")[-1].lower().removesuffix(".git"))


class Evaluated:
    """The projects and functions of JSONL files with `project`, `before` and `after`; nothing of them is trained on."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.projects: set[str] = set()
        texts: list[str] = []
        for path in paths:
            rows = list(read_jsonl(path))
            for number, row in rows:
                if not all(isinstance(row.get(key), str) for key in ("project", "before", "after")):
                    raise DataError(f"{path}, line {number}: no project, before and after; give files of pairs.")
                self.projects.add(normalised(row["project"]))
                texts += [bare(row[key], row.get("language", "")) for key in ("before", "after")]
            self.files[path.name] = {"sha256": files.sha256(path), "functions": 2 * len(rows)}
        self.projects.discard("")
        self.runs = python.Runs(iter(texts), SHORTEST)

    def names(self, path: str) -> bool:
        """Whether a folder or file of the path bears an evaluated project's name, with or without a version."""
        for part in PurePosixPath(path.lower()).with_suffix("").parts:
            for name in (normalised(part), normalised(VERSION.sub("", part))):
                if name in self.projects and name not in ORDINARY:
                    return True
        return False


def bare(text: str, language: str) -> str:
    """The text without comments. A mark inside a string counts as one too: that only makes two texts more alike."""
    return (HASHES if language in ("python", "ruby") else SLASHES).sub(" ", text)


def build(archives: Iterable[Path], evaluated: Evaluated, limit: int, installed: bool = True
          ) -> tuple[dict[str, list[dict[str, str]]], Manifest]:  # fmt: skip
    """Rows {id, text, package, licence} of each language, at most `limit` bytes in all, and the manifest."""
    manifest = Manifest(evaluated.files, len(evaluated.projects))
    gone: Counter[str] = Counter()
    rows: list[tuple[str, dict[str, str]]] = []
    seen = np.empty(0, np.uint64)  # sampled runs of the packages before
    for package in _packages(archives, installed):
        if not package.licence:
            gone["package without a permissive licence"] += 1
            continue
        if package.names & evaluated.projects:
            gone["package of an evaluated project"] += 1
            manifest.excluded_packages.append(package.name)
            continue
        taken: Counter[str] = Counter()
        new = [seen]
        for item in sorted(package.files, key=lambda item: hashlib.sha256(item.path.encode()).digest()):
            size = len(item.text.encode())
            if taken[item.language] + size > PACKAGE_BYTES:
                continue
            words = python.hash_words(bare(item.text, item.language))
            runs = python.windows(words, python.RUN)
            marks = np.unique(runs[runs % np.uint64(SAMPLE) == 0])
            if reason := _reason(item, evaluated, words, python.among(marks, seen)):
                gone[reason] += 1
                continue
            taken[item.language] += size
            new.append(marks)
            row = {"id": f"{package.name}/{item.path}", "text": item.text}
            rows.append((item.language, row | {"package": package.name, "licence": package.licence}))
        seen = np.unique(np.concatenate(new))
    manifest.excluded = dict(gone.most_common())
    return _share(rows, limit, manifest), manifest


def _reason(item: File, evaluated: Evaluated, words: np.ndarray, copied: np.ndarray) -> str:
    """Why a file is not taken; "" if it is."""
    if evaluated.names(item.path):
        return "file of a vendored evaluated project"
    if evaluated.runs.shares(words):
        return "file that shares a run with an evaluated function"
    if COPYLEFT.search(item.text[:HEADER]):
        return "file with another licence in its header"
    if GENERATED.search(item.text[:HEADER]) or max(map(len, item.text.split("\n"))) > LINE or _table(item.text):
        return "file that was generated or minified, or is a table"
    return "file that copies an earlier one" if copied.sum() > COPIED * len(copied) else ""


def _table(text: str) -> bool:
    return "\0" in text or sum(map(text.count, "0123456789")) > DIGITS * len(text)


def _share(rows: list[tuple[str, dict[str, str]]], limit: int, manifest: Manifest) -> dict[str, list[dict[str, str]]]:
    """At most its share of each language, drawn by hash; what is kept goes into the manifest."""
    drawn = sorted((_mark(row["text"]), language, row["id"], row) for language, row in rows)
    kept: dict[str, list[dict[str, str]]] = {}
    room = {language: int(limit * share) for language, share in SHARES.items()}
    every: dict[str, None] = {}
    for mark, language, _, row in drawn:
        size = len(row["text"].encode())
        if size > room[language] or mark in every:
            continue
        every[mark] = None
        room[language] -= size
        kept.setdefault(language, []).append(row)
        package = manifest.packages.setdefault(row["package"], {"licence": row["licence"], "files": 0, "bytes": 0})
        for entry in (package, manifest.languages.setdefault(language, {"files": 0, "bytes": 0})):
            entry["files"] += 1
            entry["bytes"] += size
    manifest.packages = dict(sorted(manifest.packages.items()))
    manifest.sha256 = hashlib.sha256("".join(every).encode()).hexdigest()
    return kept


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, rows: dict[str, list[dict[str, str]]], manifest: Manifest) -> None:
    """A JSONL file for each language and manifest.json, in one step."""
    with files.new_folder(folder, "manifest.json") as temporary:
        for language, items in rows.items():
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            (temporary / f"{language}.jsonl").write_text("".join(lines), "utf-8")
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n", "utf-8")


def _packages(archives: Iterable[Path], installed: bool) -> Iterator[Package]:
    for path in sorted(archives, key=lambda path: path.name):
        yield read_archive(path)
    if installed:
        yield Package("(standard library)", frozenset({"cpython", "python"}), "PSF-2.0",
                      [File(id.removeprefix("python:"), text, "python") for id, text in python.standard_library()[0]])
        for package in sorted(metadata.distributions(), key=lambda item: str(item.metadata["Name"]).lower()):
            if package.metadata["Name"] != "shrew":
                yield _installed(package)


def _installed(package: metadata.Distribution) -> Package:
    about: Any = package.metadata
    licence, found = python.permissive(python.claims(about)), []
    for item in (package.files or []) if licence else []:
        content = python.source_text(Path(str(package.locate_file(item)))) if _wanted(item.as_posix()) else None
        if content is not None:
            found.append(File(item.as_posix(), content, LANGUAGES[item.suffix.lstrip(".")]))
    return Package(f"{about['Name']} {about['Version']}", _names(about["Name"], _urls(about)), licence, found)


def read_archive(path: Path) -> Package:
    """The sources in an archive of PyPI (PKG-INFO) or npm (package.json); no licence if it has neither of them."""
    found, bad, heads = [], set(), {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                name, small = place.as_posix(), member.isfile() and member.size <= python.FILE_BYTES[1]
                if not small or not (_wanted(name) or name in HEADS or LICENCE_FILE.match(place.name)):
                    continue
                content = archive.extractfile(member)
                raw = content.read() if content else b""
                if name in HEADS:
                    heads[name] = raw.decode("utf-8", "replace")
                elif not _wanted(name):  # the root's speaks of all parts; what it names elsewhere is found there
                    bad |= {place.parent} if place.parent.name and COPYLEFT.search(raw.decode("latin-1")) else set()
                elif len(raw) >= python.FILE_BYTES[0]:
                    with suppress(UnicodeDecodeError):
                        found.append(File(name, raw.decode("utf-8"), LANGUAGES[place.suffix.lstrip(".")]))
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no readable .tar.gz or .tgz archive: {error}.") from None
    kept = [item for item in found if not bad & set(PurePosixPath(item.path).parents)]
    return _named(path, heads, kept)


def _named(path: Path, heads: dict[str, str], found: list[File]) -> Package:
    if "PKG-INFO" in heads:
        about: Any = HeaderParser().parsestr(heads["PKG-INFO"])
        name, version, said, urls = about["Name"], about["Version"], python.claims(about), _urls(about)
    else:
        try:
            row = json.loads(heads.get("package.json", "{}"))
        except ValueError:
            row = {}
        name, version, urls = row.get("name", path.name), row.get("version", ""), json.dumps(row.get("repository", ""))
        said = [json.dumps(row[key]) for key in ("license", "licenses") if key in row]
    return Package(f"{name} {version}".strip(), _names(name, urls), python.permissive(said).strip('"'), found)


def _urls(about: Any) -> str:
    return " ".join([about.get("Home-page") or "", *(about.get_all("Project-URL") or [])])


def _names(name: str, urls: str) -> frozenset[str]:
    return frozenset({normalised(name), *(normalised(found) for found in REPOSITORY.findall(urls))})


def _wanted(path: str) -> bool:
    suffix = path.rpartition(".")[2]
    return suffix in LANGUAGES and not UNWANTED.search(path)
