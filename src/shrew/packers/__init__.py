"""`shrew pack MODEL --to FORM`: a model folder in the form that another program runs.

A packer is a row of PACKERS: a module with `Options`, a frozen dataclass whose fields are its flags, and
`pack(name, out, options, say)`, which writes the folder or file `out` in one step and returns what it made, for --json.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from shrew import spec
from shrew.errors import UsageError, nearest

Say = Callable[[str], None]

# name: (module, what it writes)
PACKERS = {
    "onnx": ("shrew.packers.onnx", "a folder for ONNX Runtime: what `shrew serve`, `chat` and `complete` run"),
    "gguf": ("shrew.packers.gguf", "a file for llama.cpp"),
    "folder": ("shrew.packers.gguf.back", "a model folder again, from a GGUF file"),
    "web": ("shrew.packers.web", "a folder of static files: the model runs inside the browser, offline"),
}


class Packer(Protocol):
    Options: Any

    def pack(self, name: str, out: Path, options: Any, say: Say) -> dict[str, Any]: ...


def main(argv: list[str]) -> int:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--to", default="onnx")
    to = first.parse_known_args(argv)[0].to
    if to not in PACKERS:
        raise UsageError(f"--to {to}: no such form; {nearest(to, PACKERS)}")
    packer: Any = importlib.import_module(PACKERS[to][0])
    args = _parser(to, packer.Options).parse_args(argv)
    if not args.out and args.model in (".", ".."):
        raise UsageError("give --out: the folder to write.")
    out = args.out or Path(Path(args.model).name.removesuffix(".gguf") + _ending(to))

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    made = packer.pack(args.model, out, spec.from_flags(packer.Options, args), say)
    print(json.dumps({"out": str(out), "to": to, **made}) if args.json else f"wrote {out}")
    return 0


def _ending(to: str) -> str:
    return ".gguf" if to == "gguf" else f"-{to}"


def _parser(to: str, options: Any) -> argparse.ArgumentParser:
    forms = "".join(f"\n  {name}: {line}" for name, (_, line) in PACKERS.items())
    parser = spec.Parser(
        "shrew pack", description=f"Write a model in the form that another program runs.\n\nforms:{forms}\n\n"
        f"The flags below are those of --to {to}; another form's: shrew pack --to FORM --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help={
        "folder": "a GGUF file", "web": "a model folder, a packed one, a hub name, or 'starter'",
    }.get(to, "a model folder, a hub name, or 'starter'"))  # fmt: skip
    parser.add_argument("--to", default=to, choices=[*PACKERS], help="the form (default onnx)")
    parser.add_argument("--out", type=Path, metavar="PATH", help=f"what to write (default MODEL{_ending(to)}, here)")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    spec.add_flags(parser, options)
    return parser
