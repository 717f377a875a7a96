"""Moves: ways to make a model smaller, or to heal it. `shrew apply` runs a list of them.

A move is a row of MOVES: a frozen dataclass whose fields are its flags, its recipe keys and its cache key, with
`apply(loaded, context) -> loaded`. Between two moves the model goes through its saved folder, so a chain of moves in
one run, in several runs or out of the cache gives the same bytes.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from shrew import files, folder, machine, spec
from shrew.errors import DataError, SpecError, UnsupportedError, UsageError, nearest
from shrew.folder import Loaded, paged
from shrew.folder.check import fetch
from shrew.folder.headers import read_json
from shrew.moves.byteify import Byteify
from shrew.moves.context import Context
from shrew.moves.distil import Distil
from shrew.moves.distil.twin import sentence
from shrew.moves.drop_layers import DropLayers
from shrew.moves.experts import PruneExperts
from shrew.moves.factor import Factor
from shrew.moves.linearize import Linearize
from shrew.moves.narrow import Narrow
from shrew.moves.prune import Prune
from shrew.moves.quantize import Quantize
from shrew.moves.rotate import Rotate
from shrew.moves.share import Share
from shrew.moves.smooth import Smooth
from shrew.moves.source import Source, context_of, fingerprint, knows_python, open_task, suited
from shrew.moves.trim_vocab import TrimVocab
from shrew.moves.upcycle import Upcycle

__all__ = ["MOVES", "Context", "Move", "Recipe", "Source", "apply_moves", "main", "parse_moves", "table"]


class Move(Protocol):
    name: Any
    paper: Any

    def apply(self, loaded: Loaded, context: Context) -> Loaded: ...


MOVES: dict[str, Any] = {
    move.name: move
    for move in (
        Quantize,
        Smooth,
        Rotate,
        TrimVocab,
        DropLayers,
        Narrow,
        Share,
        Factor,
        Prune,
        PruneExperts,
        Upcycle,
        Linearize,
        Byteify,
        Distil,
    )
}


LOADS = 2.5  # times the float32 weights: the original, the model to change, and what the change needs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe that `shrew apply` runs."""

    source: Source
    moves: list[dict[str, Any]] = field(default_factory=list)


def parse_moves(tables: Sequence[dict[str, Any]], where: str) -> list[Move]:
    """[[moves]] tables, each with its `name`, as moves; unknown names and keys are refused with the nearest known."""
    found: list[Move] = []
    for number, values in enumerate(tables, 1):
        name = str(values.get("name", ""))
        if name not in MOVES:
            raise SpecError(f"{where}, move {number}: unknown move '{name}'; {nearest(name, MOVES)}")
        rest = {key: value for key, value in values.items() if key != "name"}
        found.append(spec.parse(MOVES[name], rest, f"{where}, move {number} ({name})"))
    return found


def table(move: Move) -> dict[str, Any]:
    """A move as its recipe table, defaults included."""
    return {"name": move.name, **spec.dump(move)}


def contents(move: Move) -> dict[str, str]:
    """Hashes of the files and models that the settings of a move name, by name."""
    return {name: files.sha256(path) if path.is_file() else folder.identity(path) for name, path in _reads(move)}


def _reads(move: Move) -> Iterator[tuple[str, Path]]:
    """The files and models that the settings of a move name, and where they are."""
    for item in dataclasses.fields(move):  # type: ignore[arg-type]
        kind, name = item.metadata.get("reads"), getattr(move, item.name)
        if kind == "file" and name and not Path(name).is_file():
            raise DataError(f"{move.name}: {item.name} = '{name}': no such file.")
        if kind and name:
            yield name, Path(name) if kind == "file" else fetch(name)


def apply_moves(
    original: Path, moves: Sequence[Move], source: Source, context: Context,
    load: Callable[[Path], Loaded] = folder.load,
) -> Path:  # fmt: skip
    """The folder in the cache that these moves make of `original`; what is there already is not made again."""
    base = fingerprint(source, original, context)
    path = original
    for count in range(1, len(moves) + 1):
        tables = [table(move) for move in moves[:count]]
        read = {place: mark for move in moves[:count] for place, mark in contents(move).items()}
        data = base | ({"read": read} if read else {})
        taught = [folder.companions(place) for move in moves[:count] for _, place in _reads(move) if place.is_dir()]
        out = context.cache / "applied" / spec.digest([folder.versions(), data, tables, taught])[:32]
        if not (out / folder.LINEAGE).exists():
            loaded = load(path)
            context = suited(context, loaded, source)
            origin, twins = loaded.lineage.get("moves", []), loaded.lineage.get("twins")
            loaded.lineage = {"parent": {"name": Path(source.model).name, "sha256": base["original"]},
                              "moves": [*origin, tables[-1]], "data": data, "seed": source.seed,
                              "threads": source.threads}  # fmt: skip
            loaded.lineage |= {"twins": twins} if twins else {}
            work = context.cache / "unfinished" / out.name
            loaded = moves[count - 1].apply(loaded, replace(context, work=work))
            loaded.lineage["untouched"] = loaded.untouched
            folder.save(loaded, out, same=True)
            shutil.rmtree(work, ignore_errors=True)
        path = out
    return path


def main(argv: list[str]) -> int:
    first = argv[0] if argv else ""
    if first.endswith(".toml"):
        return _apply_recipe(argv)
    return _apply_one(argv)


def _apply_recipe(argv: list[str]) -> int:
    parser = _parser("Run the moves of a recipe.")
    parser.add_argument("recipe", type=Path, help="a TOML file with [source] and [[moves]]")
    parser.add_argument("--model", help="another model than the recipe's")
    args = parser.parse_args(argv)
    recipe = spec.parse(Recipe, spec.read_toml(args.recipe), str(args.recipe))
    source = replace(recipe.source, model=args.model) if args.model else recipe.source
    return _run(source, parse_moves(recipe.moves, str(args.recipe)), args, [args.recipe])


def _apply_one(argv: list[str]) -> int:
    parser = _parser("Apply one move to a model, or a recipe of them: shrew apply RECIPE.toml --out FOLDER.")
    parser.add_argument("model", help="model folder or hub name")
    names = parser.add_subparsers(dest="move", required=True, metavar="MOVE")
    for name, move in MOVES.items():
        text = (move.__doc__ or "").strip().splitlines()[0]
        sub = names.add_parser(name, help=f"{text} [{move.paper}]", description=text)
        spec.add_flags(sub, move)
        sub.add_argument("--text", action="append", default=[], help="text to calibrate and heal on")
        sub.add_argument("--task", default="", help="task file (JSONL) to take such text from")
        sub.add_argument("--seed", type=spec.seed, default=0)
        _common(sub)
    known = [item for item in argv[1:2] if not item.startswith("-")]
    if known and known[0] not in MOVES:
        raise UsageError(f"unknown move '{known[0]}'; {nearest(known[0], MOVES)}")
    args = parser.parse_args(argv)
    source = Source(model=args.model, task=args.task, text=args.text, seed=args.seed)
    return _run(source, [spec.from_flags(MOVES[args.move], args)], args)


def _parser(text: str) -> argparse.ArgumentParser:
    parser = spec.Parser(prog="shrew apply", description=text)
    _common(parser)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="model folder to write")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print what was made as JSON")
    parser.add_argument("--low-memory", action="store_true", default=argparse.SUPPRESS,
                        help="hold one layer in memory at a time; on its own where memory is short")  # fmt: skip


def _open(
    name: str, moves: list[Move], asked: bool, say: Callable[[str], None]
) -> tuple[Loaded, Callable[[Path], Loaded]]:
    """The original, and how to load it again: layer by layer if asked for, or if memory is short and it can be done."""
    light = len(moves) == 1 and getattr(moves[0], "light", False)
    if asked and not light:
        raise UsageError("--low-memory is for quantize alone, without a rate and by another method than learned; "
                         "leave it out, or apply that move first.")  # fmt: skip
    if asked or (light and LOADS * _float32_bytes(fetch(name)) > machine.free_memory()):
        try:
            original = paged.load(name)
            say("One layer is in memory at a time.")
            return original, paged.load
        except UnsupportedError:
            if asked:
                raise
    return folder.load(name), folder.load


def _float32_bytes(path: Path) -> float:
    return sum(item.bytes * 32 / item.bits_per_weight for item in folder.tensors(path) if item.bytes)


def _run(source: Source, moves: list[Move], args: argparse.Namespace, read: Sequence[Path] = ()) -> int:
    out = getattr(args, "out", None)
    if out is None:
        raise UsageError("say where to write the model: --out FOLDER.")
    files.check_writable_target(out, folder.LINEAGE)
    others = [path for move in moves for _, path in _reads(move)]
    files.check_apart(out, [*read, fetch(source.model), source.task, *source.text, *others])

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    original, load = _open(source.model, moves, getattr(args, "low_memory", False), say)
    threads = machine.choose_threads(source.threads or None)
    source = replace(source, threads=threads.count)
    say(f"Applying {', '.join(move.name for move in moves)} to {source.model}; {threads.reason}.")
    # A move that needs no text can do without any; one that does says so itself.
    if source.task or source.text or knows_python(original):
        context = context_of(source, original, open_task(source, original), say)
    else:
        context = Context([], [], original, source.seed, files.cache_folder(), say)
    assert original.path is not None
    made = apply_moves(original.path, moves, source, context, load)
    files.copy_folder(made, out, folder.LINEAGE)
    listed = [vars(item) | {"shape": list(item.shape)} for item in folder.tensors(out)]
    size = sum(item["bytes"] for item in listed)
    say(f"Wrote {out}: {size:,} bytes of weights.")
    twins = read_json(out / folder.LINEAGE).get("twins", [])
    for found in twins:
        say(sentence(found))
    if getattr(args, "json", False):
        print(json.dumps({"out": str(out), "bytes": size, "tensors": listed} | ({"twins": twins} if twins else {})))
    return 0
