"""Ours, in the same protocol.

Settings: `moves`, tables as in a recipe; `types`, quantize's grids by patterns of names; `gguf`: pack what they made
for llama.cpp. With `start`, the moves begin at what a peer made: a GGUF file, or the dense weights that its numbers say
(`dense.safetensors`), which are put on the grid that `grid` names first: {"bits", "group", "symmetric"}.
"""

import sys
from fnmatch import fnmatch
from pathlib import Path

from protocol import Job, layers, serve
from uniform import regrid

from shrew import folder
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.folder.check import quiet
from shrew.moves import Source, apply_moves, parse_moves
from shrew.moves.context import Context


def work(job: Job) -> dict[str, object]:
    with quiet():
        original = folder.load(job.model)
    tables = job.settings["moves"]
    if types := job.settings.get("types"):
        named = {name: kind for name, _ in original.model.named_parameters()
                 for pattern, kind in types.items() if fnmatch(name, pattern)}  # fmt: skip
        tables = [{**table, "tensors": named} if table["name"] == "quantize" else table for table in tables]
    moves = parse_moves(tables, "benchmarks")

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    # A cache of its own, so that nothing is found that was made before.
    context = Context(list(job.rows()), list(job.rows("healing")), original, 0, job.folder / "cache", say)
    start, begin = Path(job.model), job.settings.get("start")
    if begin:
        start = job.folder / "start"
        folder.save(begun(job, original, Path(begin)), start)
    source = Source(model=str(start), threads=job.threads)
    with job.timed():
        made = apply_moves(start, moves, source, context)
        with quiet():
            loaded = folder.load(made)
        if job.settings.get("gguf"):
            from shrew.packers.gguf import Options, write

            notes = write(loaded, job.artefact / "model.gguf", Options(), say)["notes"]
        else:
            folder.save(loaded, job.artefact / "model")  # read again by our own loader, so nothing dense is kept
            notes = []
    job.check(loaded.model)
    return {"versions": folder.versions(), "note": "; ".join(notes)}


def begun(job: Job, original: Loaded, path: Path) -> Loaded:
    """What a peer made, as a model of ours with its codes. Raises UnsupportedError where no grid of ours has them."""
    linear = [f"{name}.weight" for name in layers(original.model)]
    if path.suffix == ".gguf":
        from shrew.packers.gguf.back import read

        loaded = read(path)[0]
        loaded.tokenizer = original.tokenizer
        if loose := [name for name in linear if name not in loaded.packed]:
            raise UnsupportedError(f"{len(loose)} weights of this file, {loose[0]} the first, are of a type with a "
                                   "codebook, which is no grid of ours, so it cannot be trained on.")  # fmt: skip
        return loaded
    grid = job.settings.get("grid")
    if not grid:
        raise UnsupportedError("this format is no grid of ours, so it cannot be trained on.")
    return regrid(original, path, linear, **grid)


serve(work)
