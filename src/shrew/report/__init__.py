"""`shrew report`: one self-contained page from records, and the table that `shrew shrink` ends in.

Page and table are pure functions of records: the same records give the same bytes. Only the last run in the list is
shown. Anything missing or of another type than stated here is left out, never invented.

Labels in `Record.model`: "original"; "healed original" (the original trained on the same healing text with the same
settings: the control); "trial 1", "trial 2", ...; "chosen" (only when the floor was met). Any other label is a model
of its own in the table, as `shrew measure` writes them.

Numbers. `task` is "NAME@VERSION/search", "NAME@VERSION/final", or "" where no task is needed; `low` and `high` are
the two-sided 95 % interval; `n` counts what was resampled (`detail["units"]`, "documents" unless stated).

    metric              unit          detail
    retention           ""            "against": label, "lower_bound": share, "alpha": 0.05, "floor": 0.98,
                                      "passed": bool; shares of 1: 0.986 is 98.6 %
    bits_per_byte       "bits/byte"
    macro_f1, accuracy,
    exact_match         ""            shares of 1
    bytes               "bytes"       of the weights file(s); for "chosen" also "trial": the trial that it is
    parameters,
    active_parameters   ""
    prefill_ratio,
    decode_ratio        ""            speed ÷ the original's speed, above 1 is faster
    peak_memory         "bytes"       of a fresh process
    kv_bytes            "bytes/token" keys and values, steps included
    kl                  "nats/token"  from the original
    top1_agreement      ""            share of tokens with the original's first choice
    (any other)         (any)         shown under its own name

Structure. `value` is None and `model` "" where the table says nothing.

    metric   model          value           detail
    plan                                    "model": name, "command": text, "goals": {"keep", "under" (bytes), "faster",
                                            "memory" (bytes)}, "tried": [text], "settings": {name: value},
                                            "versions": {name: text}, "threads": n, "candidates": k,
                                            "splits": {name: {"documents": n, "tokens": n, "bytes": n}},
                                            "provable_keep": the highest floor this data can prove
    trial    "trial 7"      CPU-seconds     "moves": [{"name": "quantize", "bits": 3, ...}], "reused": bool
    order    "trial 4"      retention       "order": what was tried, "kept": bool, "text": a sentence; task as above
    move     "chosen" or    retention after "step": 1.., "move": {"name": ...}, "bytes": after this move and all before;
             a trial        this move       low, high, n and task as for retention
    band     "original",    loss; unit,     "band": 0.. (rarest first), "label": text, "before": the original's loss;
             "chosen", ...  task            n counts tokens
    tail     "chosen" or    bits more       "left", "token", "right": text, "before", "after": bits, "id": document
             a trial
    document likewise       change in       "text", "id", "before", "after": bits per byte; n counts bytes
                            bits per byte
    flips    likewise       net share of    "counts": {way: n}, "ids": {way: [id]}; the ways are "right to wrong",
                            answers         "wrong to right" and "wrong to other"
    changed  likewise                       "way", "text", "wanted", "before", "after", "id"
    class    likewise       share right     "label", "before": the original's; n counts the examples of the class
    bias     likewise       share of pairs  "label": the kind of pair, "before"; n counts pairs
    sample   "chosen" or                    "prompt": text, "before": the original's continuation, "after": this
             a trial                        model's, "how": "greedy, 48 tokens"
    tensor   "chosen" or    effective type  "tensor": name, "class": "attention", "mlp", "embedding", "norm", ...,
             a trial        in the file     "bytes": n, "shape": [n, ...], "reason": why it was left untouched, if so
    recipe   likewise       the TOML text
    use      likewise                       "tools": [{"tool": name, "how": commands, "note": text}]
    verdict  "chosen", or   "met" or        "reason": text (used when there is no nearest miss), "cpu_seconds": s,
             the nearest    "not met"       "wall_seconds": s, "not_measured": [text]; task: the final split's
             miss, or ""

What was forgotten (band to bias) and the numbers carry "against": label, "difference", "difference_low",
"difference_high" where they were compared unit by unit; "level" and "correction" where the interval is not 95 % for
itself alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# The rest is imported by what needs it: `shrew scan` takes the words of a page alone from here, and starts at once.
if TYPE_CHECKING:
    from rich.console import RenderableType

    from shrew.record import Record

__all__ = ["main", "render", "summary"]


def render(records: "Sequence[Record]") -> str:
    """One self-contained HTML page about the last run in `records`; the same records give the same text."""
    from shrew.report.page import page
    from shrew.report.view import View

    return page(View(records))


def summary(records: "Sequence[Record]") -> "RenderableType":
    """The verdict and a table of the models of the last run in `records`, for the terminal."""
    from shrew.report.terminal import summary
    from shrew.report.view import View

    return summary(View(records))


def main(argv: list[str]) -> int:
    """`shrew report RECORDS.jsonl [--out report.html]`."""
    from rich.console import Console
    from rich.text import Text

    from shrew import files, record, spec
    from shrew.errors import DataError, UsageError
    from shrew.report import words

    parser = spec.Parser(
        prog="shrew report", description="Make one self-contained page from the records of the last run in a file."
    )
    parser.add_argument("records", type=Path, help="records (JSON lines), as shrink and measure write them")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page to write (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.out.is_dir():
        raise UsageError(f"{arguments.out} is a folder; name a file, such as {arguments.out / 'report.html'}.")
    if arguments.out.exists() and arguments.out.samefile(arguments.records):
        raise UsageError(f"{arguments.out} is the records file itself; give --out another name.")
    found = record.read(arguments.records)
    if not found:
        raise DataError(f"{arguments.records} holds no records; give the records.jsonl of a finished run.")
    files.write_text(arguments.out, render(found))
    console = Console(highlight=False)
    console.print(summary(found))
    console.print(Text(f"wrote {words.plain(arguments.out)}"))
    return 0
