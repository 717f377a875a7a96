"""Frozen specs: dataclasses that are at once the TOML keys, the JSON fields, the CLI flags and the cache key.

A spec is a frozen, keyword-only dataclass. Its annotations carry ranges (`Annotated[int, Meta(ge=2, le=8)]`) and
`doc()` carries the help text; nothing states a field twice. Unknown keys are refused with the nearest known one.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
import tomli_w
from msgspec import Meta

from shrew.errors import SpecError, UsageError, nearest

__all__ = ["Kinds", "Meta", "Parser", "Seed", "add_flags", "digest", "doc", "dump", "from_flags", "given", "parse",
           "parse_bpe", "parse_bytes", "parse_times", "parse_toml", "read_toml", "seed", "to_toml"]  # fmt: skip

T = TypeVar("T")
BYTE_TOKENS = 257  # of a tokenizer of bytes: they, and the token that begins and ends a document
MOST_TOKENS = 1_000_000
LARGEST_SEED = 2**32 - 1
Seed = Annotated[int, Meta(ge=0, le=LARGEST_SEED)]


def doc(text: str, default: Any = MISSING, default_factory: Any = MISSING, reads: str = "") -> Any:
    """A dataclass field with its help text. `reads`: it names a "file" or "model", whose content counts, not its name.
    """
    return field(default=default, default_factory=default_factory, metadata={"doc": text, "reads": reads})


class Kinds:
    """Marks a value whose tables are told apart by their key `kind`: `Annotated[Any, Kinds({kind: spec class})]`, a
    field or what a dict holds. Without the key a table is of the first kind."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = table

    def parse(self, value: Any, where: str) -> Any:
        """The spec that a table says; a spec stays as it is."""
        if isinstance(value, tuple(self.table.values())):
            return value
        if not isinstance(value, dict):
            kinds = ", ".join(self.table)
            raise SpecError(f"{where}: expected a table with kind = one of {kinds}; got {type(value).__name__}.")
        kind = value.get("kind", next(iter(self.table)))
        if not isinstance(kind, str) or kind not in self.table:
            raise SpecError(f"{where}: unknown kind '{kind}'; {nearest(str(kind), self.table)}")
        return parse(self.table[kind], value, where)


def parse(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build `cls` from plain values (TOML or JSON). `where` names the source in errors."""
    if not isinstance(values, dict):
        raise SpecError(f"{where}: expected a table of settings, got {type(values).__name__}.")
    try:
        return msgspec.convert(_resolve(cls, values, where), cls)
    except msgspec.ValidationError as error:
        raise SpecError(f"{where}: {_plain(error)}.") from None


def _resolve(cls: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values with every table of a `Kinds` field parsed; unknown keys are refused at every depth."""
    hints = _hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}  # without the class variables, which are no keys
    found = dict(values)
    for key, value in values.items():
        if key not in known:
            raise SpecError(f"{where}: unknown key '{key}'; {nearest(key, known)}")
        hint = hints[key]
        if typing.get_origin(hint) is dict and isinstance(value, dict):
            held = typing.get_args(hint)[1]
            found[key] = {name: _inner(held, part, f"{where}: {key}.{name}") for name, part in value.items()}
        elif isinstance(value, list) and _kinds(hint) is None:
            found[key] = [
                part if isinstance(part, str) else _inner(hint, part, f"{where}: {key}") for part in value
            ]  # fmt: skip
        else:
            found[key] = _inner(hint, value, f"{where}: {key}")
    return found


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Its annotations, which take a while to evaluate: a file may hold a hundred tables of one kind."""
    return typing.get_type_hints(cls, include_extras=True)


def _inner(hint: Any, value: Any, where: str) -> Any:
    kinds = _kinds(hint)
    if kinds is not None:
        return kinds.parse(value, where)
    if isinstance(value, dict):
        for cls in _dataclasses_in(hint):
            return _resolve(cls, value, where)
    if isinstance(value, str) and value not in (known := _choices(hint)) and known:
        raise SpecError(f"{where}: '{value}' is none of {', '.join(known)}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{where}: expected a finite number, got {value}.")
    return value


def _kinds(hint: Any) -> Kinds | None:
    return next((part for part in typing.get_args(hint) if isinstance(part, Kinds)), None)


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a field may hold; none where it may hold any."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next((found for part in typing.get_args(hint) if (found := _choices(part))), ())


def _dataclasses_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for part in typing.get_args(hint) for found in _dataclasses_in(part)]


def _plain(error: Exception) -> str:
    text, _, at = str(error).partition(" - at `$")
    text = text.replace("`", "")
    return f"{at.strip('`.')}: {text}" if at else text


def dump(spec: Any) -> dict[str, Any]:
    """Plain values of a spec, defaults included, None left out at every depth (TOML has no null)."""
    values: dict[str, Any] = _values(spec)
    return values


def _values(value: Any) -> Any:
    if dataclasses.is_dataclass(value):  # by its fields: msgspec leaves attributes out that it has filled by default
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _values(inner) for key, inner in value.items() if inner is not None}
    return [_values(inner) for inner in value] if isinstance(value, list | tuple) else msgspec.to_builtins(value)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a spec or plain value: the cache key."""
    text = json.dumps(_values(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file into plain values."""
    try:
        return parse_toml(path.read_bytes(), path)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; give the path of a recipe (TOML).") from None
    except OSError as error:
        raise SpecError(f"{path} is no readable TOML: {error}.") from None


def parse_toml(content: bytes, path: Path) -> dict[str, Any]:
    """The plain values of a TOML file that was read from `path`."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number or nesting without end
        raise SpecError(f"{path} is no readable TOML: {error}.") from None


def to_toml(values: dict[str, Any], comment: str = "") -> str:
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + ("\n" if head else "") + tomli_w.dumps(values)


class Parser(argparse.ArgumentParser):
    """The parser of a verb. What is wrong is a UsageError in one sentence, with the nearest flag to an unknown one, and
    a flag with one value is given once: of two values the first would be dropped in silence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ').rstrip('.')}; `{self.prog} --help` explains.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """All of them are known: also those of a move, which argparse would hand on to the parser around it."""
        found, left = super().parse_known_args(args, namespace)
        for word in left:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                hint = nearest(flag, self._option_string_actions)
                if hint.endswith("?"):
                    raise UsageError(f"unknown flag '{flag}'; {hint}")
                self.error(f"unknown flag '{flag}'")
        if left:
            self.error(f"'{left[0]}' is one word too many there: a flag takes one value, and words without a flag "
                       "stand together")  # fmt: skip
        return found, left


class _Once(argparse.Action):
    """Keeps a value; a second one in the same command line is refused."""

    _filled: argparse.Namespace | None = None

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if self._filled is namespace:
            raise argparse.ArgumentError(self, "given twice, and only one can hold; give it once")
        self._filled = namespace
        setattr(namespace, self.dest, values)


def add_flags(parser: argparse._ActionsContainer, cls: Any) -> None:
    """One `--flag` for each field of a spec; nested tables stay recipe-only."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        base, choices = _flag_type(hints[item.name])
        if base is None:
            continue
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata.get("doc", "")
        if item.default not in (MISSING, None, ""):
            text += f" (default {item.default})"
        text = text.replace("%", "%%")
        if base is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = _number if base is float else base
            parser.add_argument(flag, type=kind, choices=choices, default=None, help=text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number; write it like 0.98") from None


def _flag_type(hint: Any) -> tuple[Any, list[Any] | None]:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _flag_type(typing.get_args(hint)[0])
    if origin is typing.Literal:
        choices = list(typing.get_args(hint))
        return type(choices[0]), choices
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _flag_type(parts[0]) if len(parts) == 1 else (None, None)
    return (hint, None) if hint in (int, float, str, bool) else (None, None)


def from_flags(cls: type[T], args: argparse.Namespace, where: str = "flags") -> T:
    """The spec that the flags of `add_flags` say; flags not given keep their defaults."""
    return parse(cls, given(cls, args), where)


_LIMITS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def given(cls: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The fields that flags were given for. Raises SpecError, which names the flag, for a value out of range."""
    hints, names = _hints(cls), {item.name for item in dataclasses.fields(cls)}
    found = {name: value for name, value in vars(args).items() if name in names and value is not None}
    for name, value in found.items():
        flag = "--" + name.replace("_", "-")
        try:
            msgspec.convert(_inner(hints[name], value, flag), hints[name])
        except msgspec.ValidationError as error:
            limit = re.match(r"Expected `\w+` ([<>]=?) (\S+)", str(error))
            words = f"must be {_LIMITS[limit[1]]} {limit[2].removesuffix('.0')}" if limit else _plain(error)
            raise SpecError(f"{flag} {words}; it was given as {value}.") from None
    return found


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def seed(text: str) -> int:
    """A seed as a flag says it."""
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; give a number from 0 to {LARGEST_SEED}")
    return int(text)


def parse_bpe(text: str, marks: int) -> int | None:
    """SIZE of "bpe:SIZE", None of anything else. Raises SpecError for a size that no such tokenizer of bytes, with so
    many marks of its own, can have."""
    if not text.startswith("bpe:"):
        return None
    size, least = text.removeprefix("bpe:"), BYTE_TOKENS + marks
    if not re.fullmatch("[0-9]{1,9}", size) or not least <= int(size) <= MOST_TOKENS:
        raise SpecError(f"tokenizer '{text}': bytes and marks are {least} tokens already; write a number from that to "
                        f"{MOST_TOKENS}, like bpe:4096.")  # fmt: skip
    return int(size)


def parse_bytes(text: str) -> int:
    """'16MB' -> 16000000. Units: B, kB, MB, GB (powers of ten) and KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise SpecError(f"'{text}' is no size; write it like 16MB or 512KiB.")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < 2**63:
        raise SpecError(f"'{text}' is no size from 1 byte upward; write it like 16MB or 512KiB.")
    return round(size)


def parse_times(text: str) -> float:
    """'2x' -> 2.0: how many times faster."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*[xX]?\s*", text)
    if not match or not 1 <= float(match[1]) < float("inf"):
        raise SpecError(f"'{text}' is no speed-up; write it like 2x (1x or more).")
    return float(match[1])
