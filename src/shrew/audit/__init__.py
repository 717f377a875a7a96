"""`shrew audit FILE|FOLDER`: what an artefact of any tool really holds, against what its label says.

Types and bits are read off headers and sizes, and no weight is loaded; `--deep` reads the codes as well, `--against`
runs the artefact beside the original.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console

from shrew import spec
from shrew.audit.held import SEVERITIES, Audit
from shrew.audit.show import plain, show
from shrew.errors import FolderError, UsageError
from shrew.record import Record
from shrew.spec import doc

__all__ = ["Audit", "Options", "audit", "main"]

ENDINGS = (".gguf", ".safetensors", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Options:
    against: str = doc("the original (a model folder, a hub name, or 'starter'): measure what the artefact lost", "")
    text: list[str] = doc(
        "a text file, folder or glob: bits per byte, KL and agreement of the first choice; may be repeated",
        default_factory=list,
    )
    task: str = doc("a task in JSONL: the score, and the answers that flipped", "")
    split: Literal["calibration", "healing", "search", "final", "all"] = doc("the part of the task", "final")
    deep: bool = doc("read every code: levels that are unused, groups of one value, weights stored twice", False)
    fail_on: Literal["note", "waste", "fallback", "claim", "broken"] | None = doc(
        "exit with 1 when something of this severity or a worse one is found", None
    )
    json: bool = doc("print one JSON object and no tables", False)
    seed: spec.Seed = doc("seed of the resampling", 0)


def audit(path: str | Path, deep: bool = False) -> Audit:
    """What a file or folder holds. Raises FolderError, in one sentence, for what is wrong with it."""
    found = _read(Path(path).expanduser())
    if deep:
        from shrew.audit.deep import findings

        found.findings += findings(found)
    return found


def _read(path: Path) -> Audit:
    if not path.exists():
        if path.suffix in ENDINGS:
            raise FolderError(f"There is nothing at {path}; check the path.")
        from shrew.folder.check import fetch

        path = fetch(path)
    if path.is_file():
        return _file(path)
    if any((path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return _safetensors(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        names = ", ".join(item.name for item in ggufs[:5])
        raise FolderError(f"{path} holds {len(ggufs)} GGUF files ({names} ...); name one of them.")
    if ggufs:
        return _file(ggufs[0])
    if not any(path.glob("*.safetensors")) and (any(path.rglob("*.onnx"))):
        from shrew.audit import graphs

        if graph := graphs.find(path):
            return graphs.audit(graph)
    return _safetensors(path)


def _safetensors(path: Path) -> Audit:
    from shrew.audit import folders

    return folders.audit(path)


def _file(path: Path) -> Audit:
    """A file by its first bytes, and by its ending where they say nothing."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from None
    if magic == b"GGUF" or path.suffix == ".gguf":
        from shrew.audit import gguf

        return gguf.audit(path)
    if path.suffix == ".onnx":
        from shrew.audit import graphs

        return graphs.audit(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise FolderError(f"{path} is a pickle, which can run code when it is read; convert it to safetensors first.")
    raise FolderError(f"{path} is no GGUF, safetensors or ONNX file; give one, or a model folder.")


def main(argv: list[str]) -> int:
    parser = spec.Parser("shrew audit", description="What a model file really holds.")
    parser.add_argument(
        "path", metavar="FILE|FOLDER", help="GGUF, safetensors or ONNX; a folder of any tool, a hub name, or 'starter'"
    )
    spec.add_flags(parser, Options)
    parser.add_argument("--text", action="append", help=Options.__dataclass_fields__["text"].metadata["doc"])
    args = parser.parse_args(argv)
    options = spec.from_flags(Options, args)
    if bool(options.against) != bool(options.text or options.task):
        need = "--text SOURCE or --task FILE" if options.against else "--against ORIGINAL"
        raise UsageError(f"to measure what was lost, {need} is needed too.")
    talk = Console(stderr=True, highlight=False)
    found = audit(args.path, options.deep)
    measured = _measured(found, options, talk) if options.against else []
    if options.json:
        print(msgspec.json.encode(plain(found) | {"records": measured}).decode())  # NaN, which JSON has not: null
    else:
        show(found, Console(highlight=False))
        if measured:
            from shrew import measure

            measure.show(measured, list(dict.fromkeys(item.model for item in measured)))
    order = [*SEVERITIES]
    worst = max((order.index(item.severity) for item in found.findings), default=-1)
    return int(options.fail_on is not None and worst >= order.index(options.fail_on))


def _measured(found: Audit, options: Options, talk: Console) -> list[Record]:
    """Records of the artefact against the original; none, and one line that says why, where it cannot be run."""
    from shrew import folder, machine, tasks
    from shrew.audit import against

    def say(line: str) -> None:
        talk.print(line, soft_wrap=True, markup=False)

    jobs = [tasks.read(options.task)] if options.task else []
    jobs += [tasks.read_text_task(options.text)] if options.text else []
    for task in jobs:
        task.examples(options.split)
        say(task.describe())
    say(machine.choose_threads().reason)
    original = folder.load(options.against)
    try:
        artefact = against.deployed(found)
    except UsageError as error:
        say(f"not measured: {error}")
        return []
    names = [Path(options.against.rstrip("/")).name, found.path.name or str(found.path)]
    if names[0] == names[1]:
        names = [f"{names[0]} (original)", f"{names[1]} (audited)"]
    return against.records(names[1], artefact, names[0], original, jobs, options.split, options.seed, say)
