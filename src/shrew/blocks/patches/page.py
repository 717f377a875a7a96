"""The picture of a text in patches as a page of its own: a step for the entropy of each byte, patches shaded.

Every patch is a small picture that flows as a word does, so the page fits any width without a script. Long patches are
cut into pieces.
"""

import html
import math
from collections import Counter
from urllib.parse import quote

from shrew.blocks.patches.shown import Shown, counts, sentence, signs

CELL, PIECE = 10, 24  # pixels of a byte; bytes of a piece
PLOT, WORDS, AIR = 84, 24, 12  # pixels of the plot, of the letters below it, and between lines
GUTTER = 34
TALLEST = 12  # patches of this size and longer are counted together

STYLE = """
:root{color-scheme:light dark;--ink:#1d1f21;--soft:#5c6166;--line:#dfe2e5;--paper:#fff;--odd:#cfe9e5;--even:#f4e4c1;
--odd-edge:#0a6c66;--even-edge:#8a5a00;--hot:#b3261e;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--ink:#e6e7e9;--soft:#a1a7ad;--line:#34393e;--paper:#15171a;--odd:#173f3b;
--even:#43361a;--odd-edge:#53c6bb;--even-edge:#e0ae4f;--hot:#ff8a7a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:clamp(1.25rem,4vw,3rem) clamp(.75rem,4vw,2rem);max-width:62rem;background:var(--paper);
color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
overflow-wrap:anywhere}
h1{margin:0;font-size:clamp(1.3rem,1.1rem + 1.2vw,1.7rem);line-height:1.3;font-weight:650;letter-spacing:-.012em}
h2{margin:2.5rem 0 .5rem;font-size:1.1rem;font-weight:650}
p{margin:.5rem 0;max-width:44rem}.soft{color:var(--soft)}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:1rem 2rem;margin:1.5rem 0;padding:1rem 0;
border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
dl div{display:flex;flex-direction:column}dt{order:2;color:var(--soft);font-size:.8125rem;line-height:1.4}
dd{margin:0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:1rem 0;padding:0;list-style:none;color:var(--soft);
font-size:.8125rem}.key li{display:flex;align-items:center;gap:.4rem}
.flow{display:flex;flex-wrap:wrap;margin:1rem 0}.flow.measured{padding-left:34px;background-repeat:repeat-y}
svg{display:block;overflow:visible;font-variant-numeric:tabular-nums}
.odd{fill:var(--odd)}.even{fill:var(--even)}
.grid{stroke:var(--line)}.step{fill:none;stroke:var(--ink);stroke-width:1.6;stroke-linejoin:round}
.level{stroke:var(--hot);stroke-width:1.4;stroke-dasharray:5.5 5.5}
.edge{stroke-width:2}.edge.of-odd{stroke:var(--odd-edge)}.edge.of-even{stroke:var(--even-edge)}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.12}
text{font:13px/1 var(--mono);fill:var(--ink);text-anchor:middle}text.sign{fill:var(--soft)}
.sizes{display:flex;align-items:flex-end;gap:4px;height:9rem;margin:1rem 0 0;max-width:34rem}
.sizes div{flex:1;display:flex;flex-direction:column;justify-content:flex-end;height:100%;text-align:center;
font-size:.75rem;color:var(--soft);font-variant-numeric:tabular-nums}
.sizes b{display:block;background:var(--odd-edge);min-height:1px;border-radius:2px 2px 0 0}
@media print{:root{color-scheme:light}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
svg{break-inside:avoid}}
"""


def page(shown: Shown) -> str:
    """The whole page."""
    title = counts(shown)
    title = title[0].upper() + title[1:]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<main>\n"
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(sentence(shown))}</p>\n"
        + _facts(shown) + _key(shown) + _flow(shown) + _sizes(shown) + "</main>\n</body></html>\n"
    )  # fmt: skip


def _facts(shown: Shown) -> str:
    told = [("bytes", f"{len(shown.text):,}"), ("patches", f"{len(shown.starts):,}"),
            ("bytes a patch, on average", f"{shown.mean:.2f}")]  # fmt: skip
    if shown.entropies is not None:
        mean = sum(shown.entropies) / len(shown.entropies)
        told.append((f"nats a byte, on average, by the model {shown.model}", f"{mean:.2f}"))
    items = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in told)
    return f"<dl>{items}</dl>\n"


def _key(shown: Shown) -> str:
    shades = ('<rect class="odd" width="11" height="14"/><rect class="even" x="11" width="11" height="14"/>'
              '<path class="edge of-odd" d="M1 0V14"/><path class="edge of-even" d="M12 0V14"/>')  # fmt: skip
    marks = [(shades, "patches in turn")]
    if shown.entropies is not None:
        marks.append(('<path class="step" d="M0 11H8V3H15V9H22"/>', "how hard a byte is to tell from those before it"))
    if shown.level is not None:
        marks.append(('<path class="level" d="M0 7H22"/>', f"threshold, {shown.level:.2f} nats"))
    items = "".join(f'<li><svg width="22" height="14" aria-hidden="true">{mark}</svg>{html.escape(words)}</li>'
                    for mark, words in marks)  # fmt: skip
    return f'<ul class="key">{items}</ul>\n'


# --- the text --------------------------------------------------------------------------------------------------------


class _Scale:
    """Heights of entropies: `top` nats fill the plot, `ticks` are labelled."""

    def __init__(self, shown: Shown) -> None:
        self.plot = PLOT if shown.entropies is not None else 0
        most = max([*(shown.entropies or []), shown.level or 0.0, 0.1])
        self.step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if most / step <= 4.5 or step == 5.0)
        self.top = self.step * math.ceil(most / self.step + 0.02)
        self.ticks = [self.step * number for number in range(round(self.top / self.step) + 1)]
        self.height = self.plot + WORDS

    def y(self, nats: float) -> float:
        return 6 + (self.plot - 6) * (1 - min(max(nats / self.top, 0.0), 1.0))


def _flow(shown: Shown) -> str:
    scale, cells = _Scale(shown), signs(shown.text)
    told = " | ".join(shown.text[low:high].decode("utf-8", "backslashreplace") for low, high in shown.patches[:200])
    parts = []
    for number, (low, high) in enumerate(shown.patches):
        for start in range(low, high, PIECE):
            parts.append(_piece(shown, scale, cells, number, start, min(start + PIECE, high), start == low))
    look = f' style="background-image:url({_axis(scale)})"' if shown.entropies is not None else ""
    kind = "flow measured" if shown.entropies is not None else "flow"
    label = html.escape(f"The text in patches: {told}")
    return f'<div class="{kind}" role="img" aria-label="{label}"{look}>\n' + "\n".join(parts) + "\n</div>\n"


def _piece(shown: Shown, scale: _Scale, cells: list[str], number: int, low: int, high: int, first: bool) -> str:
    """One patch, or a part of it: its shade, the steps, the threshold, and the letters."""
    wide, name = CELL * (high - low), "odd" if number % 2 else "even"
    drawn = [f'<rect class="{name}" y="0" width="{wide}" height="{scale.height}"/>']
    if shown.entropies is not None:
        drawn += [f'<path class="grid" d="M0 {scale.y(tick):.1f}H{wide}"/>' for tick in scale.ticks]
        path = f"M0 {scale.y(shown.entropies[max(low - 1, 0)]):.1f}"
        for at in range(low, high):
            path += f"V{scale.y(shown.entropies[at]):.1f}H{CELL * (at - low + 1)}"
        drawn.append(f'<path class="step" d="{path}"/>')
    if shown.level is not None:
        drawn.append(f'<path class="level" d="M0 {scale.y(shown.level):.1f}H{wide}"/>')
    if first:
        drawn.append(f'<path class="edge of-{name}" d="M1 0V{scale.height}"/>')
    for at in range(low, high):
        drawn.append(_letter(shown, scale, cells, at, low, high))
    return (f'<svg width="{wide}" height="{scale.height + AIR}" viewBox="0 0 {wide} {scale.height + AIR}">'
            + "".join(drawn) + "</svg>")  # fmt: skip


def _letter(shown: Shown, scale: _Scale, cells: list[str], at: int, low: int, high: int) -> str:
    """The sign of a byte below the plot, and what is said of it when it is pointed at."""
    x, sign = CELL * (at - low), cells[at]
    drawn = ""
    if sign.strip():
        end = at + 1
        while end < high and not cells[end]:
            end += 1
        byte = sign.startswith("\\x")
        squeezed = f' textLength="{CELL - 1}" lengthAdjust="spacingAndGlyphs"' if byte else ""
        kind = ' class="sign"' if byte or sign in "⏎→␍␀␛·" else ""
        drawn = (f'<text{kind} x="{x + CELL * (end - at) / 2:.1f}" y="{scale.plot + 16}"{squeezed}>'
                 f"{html.escape(sign)}</text>")  # fmt: skip
    nats = "" if shown.entropies is None else f", {shown.entropies[at]:.3f} nats"
    title = f"byte {at:,}: 0x{shown.text[at]:02x} {sign}".rstrip() + nats
    return (f'{drawn}<rect class="hit" x="{x}" width="{CELL}" height="{scale.height}">'
            f"<title>{html.escape(title)}</title></rect>")  # fmt: skip


def _axis(scale: _Scale) -> str:
    """The labels of the heights, as a picture that repeats beside every line."""
    digits = 0 if scale.step >= 1 else 1 if scale.step >= 0.1 else 2
    labels = "".join(
        f"<text x='{GUTTER - 6}' y='{scale.y(tick) + 4:.1f}' text-anchor='end'>{tick:.{digits}f}</text>"
        for tick in scale.ticks
    )
    height = scale.height + AIR
    style = "text{font:11px sans-serif;fill:#5c6166}@media (prefers-color-scheme:dark){text{fill:#a1a7ad}}"
    unit = f"<text x='{GUTTER - 6}' y='{scale.plot + 16}' text-anchor='end'>nats</text>"
    size = f"width='{GUTTER}' height='{height}'"
    picture = f"<svg xmlns='http://www.w3.org/2000/svg' {size}><style>{style}</style>{labels}{unit}</svg>"
    return f"'data:image/svg+xml,{quote(picture)}'"


def _sizes(shown: Shown) -> str:
    """How many patches there are of each size."""
    found = Counter(min(high - low, TALLEST) for low, high in shown.patches)
    most = max(found.values())
    columns = "".join(
        f'<div>{found[size]:,}<b style="height:{100 * found[size] / most * 0.78:.1f}%"></b>'
        f"{size}{'+' if size == TALLEST else ''}</div>"
        for size in range(1, max(found) + 1)
    )
    words = f"Patches by their bytes; {TALLEST} and more together."
    return f'<h2>How long the patches are</h2>\n<p class="soft">{words}</p>\n<div class="sizes">{columns}</div>\n'
