"""`shrew patch TEXT|FILE|-`: how a text is cut into patches, and how hard each of its bytes is to tell."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console

from shrew import files, spec
from shrew.blocks.patches import entropy, page
from shrew.blocks.patches.boundaries import EntropySpec, SpaceSpec, StaticSpec, boundaries, fit_threshold
from shrew.blocks.patches.shown import Shown, counts, plain, sentence, signs
from shrew.errors import DataError, UsageError
from shrew.spec import Meta, doc

SHIPPED = Path(__file__).parents[2] / "models" / "entropy"
BARS, LEVELS = 3, "▁▂▃▄▅▆▇█"  # lines of bars above a line of text, and the heights of one
SHADES = ("black on cyan", "black on yellow")


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """The flags of `shrew patch`."""

    rule: Literal["global", "monotonic", "combined", "space", "static"] = doc(
        "where patches start: where the entropy is above a threshold (global), rises by more than it (monotonic) or "
        "both (combined); behind spaces; every few bytes", "global"
    )  # fmt: skip
    size: Annotated[float, Meta(ge=1, le=1000)] = doc(
        "mean bytes of a patch, to which the threshold is fitted on this very text; of `static`, the bytes of each", 4.5
    )
    threshold: float | None = doc("nats, instead of --size", None)
    rise: float = doc("nats by which the entropy rises, of `combined`", 0.0)
    reset: bool = doc("take lines apart: a new one starts a patch, and entropies know their line alone", False)
    shortest: Annotated[int, Meta(ge=1)] = doc("least bytes of a patch", 1)
    longest: Annotated[int, Meta(ge=0)] = doc("most bytes of a patch; 0: no limit", 0)
    model: str = doc(
        "folder of a model of bytes, which gives the entropies (default: the one that ships); or one of patches, which "
        "cuts by its own rule", ""
    )  # fmt: skip
    most: Annotated[int, Meta(ge=1, le=100_000)] = doc("bytes of the text to read; the rest is left out", 4096)


def main(argv: list[str]) -> int:
    parser = spec.Parser(prog="shrew patch", description="Show how a text is cut into patches of bytes.")
    parser.add_argument("text", help="a text, a file with one, or - for what comes on standard input")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the picture as a page, too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    spec.add_flags(parser, PatchSpec)
    args = parser.parse_args(argv)
    asked = spec.from_flags(PatchSpec, args)
    if args.html:
        files.check_apart(args.html, [args.text, asked.model])
    text, left_out = read_text(args.text, asked.most)
    found = cut(text, asked, left_out)
    if args.html:
        files.write_text(args.html, page.page(found))
    if args.json:
        print(json.dumps(plain(found), indent=1))
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that knows no blocks shows a question mark
        show(found, Console(highlight=False, markup=False))
        if args.html:
            print(f"\nWrote {args.html}.")
    return 0


def read_text(source: str, most: int) -> tuple[bytes, bool]:
    """The first `most` bytes of what `source` says, and whether there are more. Any bytes will do."""
    if source == "-":
        found = sys.stdin.buffer.read(most + 1)
    elif os.path.isfile(source):  # noqa: PTH113 - a text that is too long for a path is no error there
        try:
            with Path(source).open("rb") as stream:
                found = stream.read(most + 1)
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error.strerror}.") from None
    elif os.path.isdir(source):  # noqa: PTH112
        raise DataError(f"{source} is a folder; give a file, a text, or - for standard input.")
    else:
        found = source.encode("utf-8", "surrogateescape")  # the bytes of the command line, whatever they are
    if not found:
        raise DataError("There is no text to cut: not a single byte.")
    return found[:most], len(found) > most


def cut(text: bytes, asked: PatchSpec, left_out: bool = False) -> Shown:
    """The patches of a text and, where there is a model, its entropies."""
    by_entropy = asked.rule not in ("space", "static")
    folder = Path(asked.model).expanduser() if asked.model else SHIPPED
    if by_entropy and not asked.model and not (folder / "config.json").exists():
        raise UsageError("Patches by entropy need a model of bytes, and none ships here; give one with --model, "
                         "or take --rule space.")  # fmt: skip
    row, lengths = torch.tensor([list(text)]), torch.tensor([len(text)])
    about = None
    if asked.model or (folder / "config.json").exists():
        model, ids = entropy.opened(folder)
        if model.spec.patches:
            return own(model, text, asked, folder.name, left_out)
        about = entropy.entropies(entropy.checked(model, ids, folder), row, lengths, asked.reset)
    wanted = asked.size if by_entropy and asked.threshold is None else None
    rule = _rule(asked)
    if wanted is not None and about is not None:
        rule = fit_threshold(row, lengths, rule, about, asked.size)
    starts = boundaries(row, lengths, rule, about)[0].nonzero()[:, 0].tolist()
    name = folder.name if about is not None else ""
    return Shown(text, left_out, rule, name, starts, None if about is None else about[0].tolist(), wanted)


@torch.no_grad()
def own(model: Any, text: bytes, asked: PatchSpec, name: str, left_out: bool) -> Shown:
    """The patches that a model of patches makes of a text, as a document of its own, and the entropies it cuts by."""
    plain = PatchSpec(model=asked.model, most=asked.most)
    said = [item.name for item in dataclasses.fields(asked) if getattr(asked, item.name) != getattr(plain, item.name)]
    if said:
        raise UsageError(f"{name} is a model of patches and cuts by its own rule; leave out --{said[0]}.")
    front, begin = model.spec.patches, model.config.bos_token_id
    head = [] if begin is None else [begin]
    tokens = torch.tensor([[*head, *(byte + front.first for byte in text)]])
    first = torch.ones(1, dtype=torch.bool)
    starts = torch.cat([first, model.model.ends(tokens)[0, :-1]])[len(head) :]
    about = model.model.entropies(tokens)
    values = None if about is None else about[0, len(head) :].tolist()
    return Shown(text, left_out, front.rule, name, starts.nonzero()[:, 0].tolist(), values, None)


def _rule(asked: PatchSpec) -> Any:
    if asked.rule == "static":
        return StaticSpec(size=round(asked.size))
    limits: dict[str, Any] = {"shortest": asked.shortest, "longest": asked.longest}
    if asked.rule == "space":
        return SpaceSpec(**limits)
    found = EntropySpec(rule=asked.rule, reset=asked.reset, rise=asked.rise, **limits)
    name = "rise" if asked.rule == "monotonic" else "threshold"
    return found if asked.threshold is None else dataclasses.replace(found, **{name: asked.threshold})  # type: ignore[arg-type]


# --- the terminal ----------------------------------------------------------------------------------------------------


def show(shown: Shown, console: Console) -> None:
    """Lines of text under a bar for each byte and above a rule that marks where patches start."""
    say = console.print
    say(sentence(shown), soft_wrap=True)
    top = max([*(shown.entropies or [0.0]), shown.level or 0.0]) or 1.0
    if shown.entropies is not None:
        line = "; ┄ is the threshold" if shown.level is not None else ""
        say(f"A bar is the entropy of a byte by the model {shown.model}, {BARS} lines are {top:.2f} nats{line}.",
            soft_wrap=True)  # fmt: skip
    say()
    shade = {at: number % 2 for number, (low, high) in enumerate(shown.patches) for at in range(low, high)}
    cells = signs(shown.text)
    starts = set(shown.starts)
    for low, high in _lines(cells, shown.text, max(console.width, 20)):
        widths = [max(cell_len(cells[at]), 1) for at in range(low, high)]
        if shown.entropies is not None:
            for level in range(BARS - 1, -1, -1):
                bars = [_bar(shown.entropies[at], top, level, shown.level) for at in range(low, high)]
                say("".join(bar * width for bar, width in zip(bars, widths, strict=True)), overflow="crop",
                    no_wrap=True, style="dim")  # fmt: skip
        for at, width in zip(range(low, high), widths, strict=True):
            say(set_cell_size(cells[at] or "·", width), end="", style=SHADES[shade[at]], soft_wrap=True)
        say()
        marks = zip(range(low, high), widths, strict=True)
        say("".join(("└" if at in starts else "─") + "─" * (width - 1) for at, width in marks), no_wrap=True,
            overflow="crop", style="dim")  # fmt: skip
    say()
    longest = max(high - low for low, high in shown.patches)
    say(f"{counts(shown)[0].upper()}{counts(shown)[1:]}; the longest has {longest}.", soft_wrap=True)


def _lines(cells: list[str], text: bytes, width: int) -> list[tuple[int, int]]:
    """The text cut into lines of at most `width` columns: behind newlines, and where a line is full."""
    found, low, used = [], 0, 0
    for at, cell in enumerate(cells):
        wide = max(cell_len(cell), 1)
        if used + wide > width or (at > low and text[at - 1] == ord("\n")):
            found.append((low, at))
            low, used = at, 0
        used += wide
    return [*found, (low, len(cells))]


def _bar(value: float, top: float, level: int, threshold: float | None) -> str:
    """What stands at a height, counted in lines from the text, of a bar; the threshold's line goes on behind it."""
    eighths = round(8 * BARS * value / top) - 8 * level
    if eighths > 0:
        return LEVELS[min(eighths, 8) - 1]
    return "┄" if threshold is not None and level == min(int(BARS * threshold / top), BARS - 1) else " "
