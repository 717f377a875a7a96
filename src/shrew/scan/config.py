"""What a scan is asked to do: flags, the settings that a project keeps in a file, and what it holds back."""

import argparse
import dataclasses
import fnmatch
import os
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from shrew import files, spec
from shrew.errors import SpecError, UsageError, nearest
from shrew.scan import cwe as weaknesses
from shrew.scan.functions import COMMENTS
from shrew.spec import Meta, doc

if TYPE_CHECKING:
    from tree_sitter import Tree

    from shrew.scan.functions import Source

__all__ = ["Held", "Ignore", "ScanSpec", "add_flags", "comments", "from_flags"]

POINTS = ("quiet", "balanced", "thorough")  # from the fewest alerts to the most
LARGEST = 16 << 20  # bytes of a file of settings
SHIPPED = ("hybrid",)  # detectors that are not asked unless they are named


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """Alerts that are held back: those of files like `path`, of the weaknesses `cwe`, or of both where both stand."""

    path: str = doc("a glob, such as legacy/*", "")
    cwe: list[str] = doc("CWE ids or families, such as CWE-89 or sql-injection", default_factory=list)
    why: str = doc("for readers", "")

    def __post_init__(self) -> None:
        if not (self.path or self.cwe):
            raise ValueError("an entry of 'ignore' needs a path, a cwe or both")
        for name in self.cwe:
            if not weaknesses.normal(name) and name not in weaknesses.FAMILIES:
                raise ValueError(f"'{name}' is no CWE; {nearest(name, weaknesses.FAMILIES).rstrip('.')}")


@dataclass(frozen=True, kw_only=True)
class ScanSpec:
    diff: str | None = doc("only functions that changed since this git revision", None)
    point: Literal["quiet", "balanced", "thorough"] = doc("how many alerts you can look at", "balanced")
    fail_on: Literal["low", "medium", "high", "any", "none"] = doc(
        "exit with 1 when there is an alert of this severity or a worse one", "any"
    )
    format: Literal["text", "json", "sarif", "gitlab", "html"] = doc("what is printed or written", "text")
    out: str | None = doc("write to this file and print a summary", None)
    explain: bool = doc("show the lines that moved each score, and what to do", False)
    rules: list[str] = doc("more rules (TOML); repeatable", default_factory=list)
    findings: list[str] = doc(
        "what another tool found (SARIF, or JSON of bandit, flawfinder, cppcheck, semgrep), to be ranked; repeatable",
        default_factory=list,
    )
    detector: str | None = doc("another detector than the linear one: 'hybrid' (a small neural model beside it, for "
                               "Python), a folder, or 'none': rules alone", None)  # fmt: skip
    baseline: str | None = doc("a file of known alerts: only new ones count", None)
    write_baseline: str | None = doc("make everything found known: write it to this file, and exit with 0", None)
    exclude: list[str] = doc("leave out files and folders like this glob; repeatable", default_factory=list)
    force_exclude: bool = doc("leave out also what is named: for hooks, which name the files that changed", False)
    include_tests: bool = doc("scan tests too", False)
    include_vendored: bool = doc("scan vendored and generated code too", False)
    max_file_size: str = doc("leave out files larger than this", "2MB")
    cache: bool = doc("look again only at what changed", True)
    jobs: Annotated[int, Meta(ge=1, le=256)] | None = doc(
        "files parsed, and functions judged by the detector, at a time; one a core unless said", None)  # fmt: skip
    ignore: list[Ignore] = doc("what is held back (in a settings file only)", default_factory=list)


# What a project may keep in a file: nothing that writes, or that names another model than those that ship.
KEPT = ("point", "fail_on", "detector", "exclude", "include_tests", "include_vendored", "max_file_size", "rules",
        "ignore")  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field; lists of words are flags that may be given again."""
    spec.add_flags(parser, ScanSpec)
    hints = typing.get_type_hints(ScanSpec)
    for item in dataclasses.fields(ScanSpec):
        if hints[item.name] == list[str]:
            word = "GLOB" if item.name == "exclude" else "FILE"
            parser.add_argument(f"--{item.name}", action="append", metavar=word, help=item.metadata["doc"])
    parser.add_argument("--json", action="store_true", help="the same as --format json")


def from_flags(args: argparse.Namespace, root: str) -> ScanSpec:
    """Flags over the settings file in `root`; lists of both are joined. Raises SpecError for what is unknown there."""
    if args.json and args.format not in (None, "json"):
        raise UsageError(f"--json and --format {args.format} exclude each other; give one.")
    kept, where = _kept(Path(root))
    given = spec.given(ScanSpec, args) | ({"format": "json"} if args.json else {})
    spec.parse(ScanSpec, kept, where)  # so that an error names the file
    for name, value in kept.items():
        if isinstance(value, list):
            given[name] = [*value, *given.get(name, [])]
        else:
            given.setdefault(name, value)
    return spec.parse(ScanSpec, given, "flags")


def _kept(root: Path) -> tuple[dict[str, Any], str]:
    """The table [scan] of .shrew.toml, else [tool.shrew.scan] of pyproject.toml, and its name in errors."""
    own, project = root / ".shrew.toml", root / "pyproject.toml"
    if os.path.lexists(own):
        if not own.is_file():
            raise SpecError(f"{own} is no file, so no settings can be read from it; rename it, or make it a TOML file.")
        values, where = _toml(own), f"{own.name} [scan]"
        if strange := set(values) - {"scan"}:
            raise SpecError(f"{own.name}: unknown table '{min(strange)}'; known: scan.")
        found = values.get("scan", {})
    elif project.is_file():
        try:
            values = _toml(project)
        except SpecError:
            return {}, ""  # somebody else's file, and perhaps what is scanned
        where = "pyproject.toml [tool.shrew.scan]"
        tool = values.get("tool", {})
        shrew = tool.get("shrew", {}) if isinstance(tool, dict) else {}
        found = shrew.get("scan", {}) if isinstance(shrew, dict) else {}
    else:
        return {}, ""
    if not isinstance(found, dict):
        raise SpecError(f"{where}: expected a table of settings.")
    for name in found:
        if name not in KEPT:
            raise SpecError(f"{where}: unknown key '{name}'; {nearest(name, KEPT)}")
    named = found.get("detector")
    if isinstance(named, str) and named not in (known := (*SHIPPED, "none")):
        raise SpecError(f"{where}: the detector '{named}' does not ship; {nearest(named, known)} A folder is named by "
                        "--detector alone.")  # fmt: skip
    if isinstance(found.get("rules"), list):
        found["rules"] = [os.path.join(root, name) if isinstance(name, str) else name for name in found["rules"]]  # noqa: PTH118
    return found, where


def _toml(path: Path) -> dict[str, Any]:
    """Of a file that came with what is scanned, and so may be anything."""
    try:
        return spec.parse_toml(files.read_whole(path, LARGEST, "no settings are so long", SpecError), path)
    except OSError as error:
        raise SpecError(f"{path} cannot be read ({error.strerror}); make it readable, or rename it.") from None


# --- what is held back -----------------------------------------------------------------------------------------------

_IGNORE = re.compile(r"\bshrew:\s*ignore\b(?:\s*\[([^\]]{0,400})\])?")


def comments(source: "Source", tree: "Tree") -> list[tuple[int, list[str]]]:
    """The comments `shrew: ignore` and `shrew: ignore[CWE-89, path-traversal]`: the line that each speaks of, and its
    words ([]: everything). One that has a line to itself speaks of the next. What the syntax tree holds for a string is
    no comment, whatever it says."""
    if b"shrew:" not in source.data:
        return []
    from shrew.scan.rules.syntax import nodes_of

    data, found = source.data, []
    for node in nodes_of(COMMENTS, tree.root_node):
        if data.find(b"shrew:", node.start_byte, node.end_byte) < 0:
            continue
        alone = not data[data.rfind(b"\n", 0, node.start_byte) + 1 : node.start_byte].strip()
        text = data[node.start_byte : node.end_byte].decode("utf-8", "replace").rstrip()
        line = node.start_point[0] + 1 + (text.count("\n") + 1 if alone else 0)
        for match in _IGNORE.finditer(text):
            words = [word.strip() for word in (match[1] or "").split(",") if word.strip()]
            if match[1] is None or words:  # `ignore[]` names nothing
                found.append((line, words))
    return found


class Held:
    """Why alerts of one file are held back."""

    def __init__(self, path: str, entries: Iterable[Ignore], ignores: list[tuple[int, list[str]]]) -> None:
        self._entries = [each for each in entries if not each.path or fnmatch.fnmatchcase(path, each.path)]
        self._ignores = ignores

    def why(self, cwe: str, start: int, end: int, first: int) -> str:
        """"path", "cwe", "inline" or "" for a finding in lines `start` to `end` of a function that begins in line
        `first`: a comment at the function's first line speaks of all of it."""
        for entry in self._entries:
            if not entry.cwe:
                return "path"
            if _named(cwe, entry.cwe):
                return "cwe"
        for line, words in self._ignores:
            if (start <= line <= end or line == first) and (not words or _named(cwe, words)):
                return "inline"
        return ""


def _named(cwe: str, words: list[str]) -> bool:
    family = weaknesses.family(cwe)
    return any(word == family or (cwe and weaknesses.normal(word) == weaknesses.normal(cwe)) for word in words)
