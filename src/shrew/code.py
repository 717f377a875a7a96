"""Source code as a detector reads it, the same in training and in scanning: its text, the lines of its tokens, windows.
"""

import re
import textwrap
from typing import Any

import numpy as np

PIECE = 1 << 18  # characters given to a tokenizer at once: what it holds of each is a hundred times as large
NOTHING = -30.0  # the logit of a text, and the score of a line, without a token that shows
OVERLAP = 4  # windows share one part of so many

_QUOTED = r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'"
_C = re.compile(rf"{_QUOTED}|(?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))", re.DOTALL)
_TICKS = re.compile(rf"{_QUOTED}|`(?:\\.|[^`\\])*`|(?P<comment>//[^\n]*|/\*.*?(?:\*/|\Z))", re.DOTALL)
_PYTHON = re.compile(rf'"""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|{_QUOTED}|(?P<comment>#[^\n]*)', re.DOTALL)
_RUBY = re.compile(rf"{_QUOTED}|(?P<comment>#(?!\{{)[^\n]*|^=begin\b.*?(?:^=end\b[^\n]*|\Z))", re.DOTALL | re.MULTILINE)
COMMENTS = {"python": _PYTHON, "ruby": _RUBY, "go": _TICKS, "javascript": _TICKS}  # of all others: those of C


def canonical(text: str, language: str, comments: bool) -> str:
    """The text that is tokenized, line for line that of `text`: its lines end in a newline alone, what indents all of
    them is left out, and so are blanks at their ends and, without `comments`, comments and docstrings."""
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n")  # half a surrogate pair is no text
    if not comments:
        text = without_comments(text, language)
    return textwrap.dedent("\n".join(line.rstrip() for line in text.split("\n")))


def without_comments(text: str, language: str) -> str:
    """The text without its comments, and without strings that stand where Python has docstrings; all newlines stay.

    Read by a pattern and not by a parser, so that broken code is read as well."""
    parts, end = [], 0
    for found in COMMENTS.get(language, _C).finditer(text):
        if found["comment"] is None and not (language == "python" and _documents(text, found)):
            continue
        parts += [text[end : found.start()], "\n" * found[0].count("\n")]
        end = found.end()
    return "".join([*parts, text[end:]])


def _documents(text: str, found: re.Match[str]) -> bool:
    """Whether a string stands alone on its lines as the first thing of a block or of the text."""
    begin = text.rfind("\n", 0, found.start()) + 1
    if text[begin : found.start()].strip() or text[found.end() : found.end() + 1] not in ("", "\n", "\r", " ", "#"):
        return False
    return text[max(begin - 400, 0) : begin].rstrip()[-1:] in ("", ":")


def count_lines(text: str) -> int:
    """Lines of a text; a newline at its end begins no other."""
    return text.count("\n") + bool(text and not text.endswith("\n"))


def uncut(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` that neither cuts nor pads a text, as its file may tell it to."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenized(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [n] of a text by an `uncut` tokenizer, and the line int64 [n], from 0, of each.

    A token that covers several lines stands on that of its first character that is no space, else of its last one.
    """
    ids, lines, first = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for start in range(0, len(text), PIECE):
        piece = text[start : start + PIECE]
        found = tokenizer.encode(piece, add_special_tokens=False)
        ids.append(np.array(found.ids, np.int64))
        lines.append(first + _lines(piece, np.array(found.offsets, np.int64).reshape(-1, 2)))
        first += piece.count("\n")
    return np.concatenate(ids), np.concatenate(lines)


def _lines(text: str, offsets: np.ndarray) -> np.ndarray:
    """int64 [n]: the line of each token of `text`, given the characters [n, 2] that it covers."""
    if not len(text):
        return np.zeros(len(offsets), np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    places = np.arange(len(codes))
    newline = codes == ord("\n")
    of = np.cumsum(newline) - newline
    seen = np.where(np.isin(codes, [ord(space) for space in " \t\n\r\f\v"]), len(codes), places)
    solid = np.minimum.accumulate(seen[::-1])[::-1]  # the next character that is no space
    start, end = offsets[:, 0].clip(0, len(codes) - 1), offsets[:, 1]
    last = np.clip(end - 1, start, len(codes) - 1)
    return np.asarray(of[np.where(solid[start] <= last, solid[start], last)], np.int64)


def windows(count: int, room: int) -> list[tuple[int, int]]:
    """Where windows of at most `room` of `count` tokens begin and end: all of them in order, each token in at least
    one, neighbours with an overlap."""
    step = max(room - room // OVERLAP, 1)
    starts = range(0, max(count - room, 0) + step, step)
    found = sorted({min(start, max(count - room, 0)) for start in starts})
    return [(start, min(start + room, count)) for start in found]
