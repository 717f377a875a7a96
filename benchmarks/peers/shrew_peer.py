"""Ours, in the same protocol. Settings: `moves`, tables as in a recipe; `gguf`: pack what they made for llama.cpp."""

import sys
from pathlib import Path

from protocol import Job, serve

from shrew import folder
from shrew.folder.check import quiet
from shrew.moves import Source, apply_moves, parse_moves
from shrew.moves.context import Context


def work(job: Job) -> dict[str, object]:
    moves = parse_moves(job.settings["moves"], "benchmarks")
    with quiet():
        original = folder.load(job.model)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    # A cache of its own, so that nothing is found that was made before.
    context = Context(list(job.rows()), list(job.rows("healing")), original, 0, job.folder / "cache", say)
    source = Source(model=job.model, threads=job.threads)
    with job.timed():
        made = apply_moves(Path(job.model), moves, source, context)
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


serve(work)
