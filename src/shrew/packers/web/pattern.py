"""The split patterns of tokenizers as JavaScript regular expressions that match the same text.

tokenizers runs them with Oniguruma, browsers with their own engine and another version of Unicode, and the two
disagree on what a letter or a space is. So the characters that a class or a case-insensitive letter matches are not
translated but asked for: every code point is put through tokenizers itself, and the class is written out as ranges.
"""

import re
from collections.abc import Iterable
from functools import cache

from tokenizers import Regex
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import PreTokenizer

from shrew.errors import UnsupportedError

Ranges = tuple[tuple[int, int], ...]

# Planes 4 to 13 are not assigned and 15 and 16 are private: one of each kind stands for the others.
LIKE = {
    0x40000: range(0x40000, 0xE0000),
    0xF0000: range(0xF0000, 0xFFFFE),
    0x100000: range(0x100000, 0x10FFFE),
    0xFFFFE: range(0xFFFFE, 0x100000),
    0x10FFFE: range(0x10FFFE, 0x110000),
}
SURROGATES = range(0xD800, 0xE000)
CHARACTERS = [*range(SURROGATES.start), *range(SURROGATES.stop, 0x40000), *range(0xE0000, 0xF0000), *LIKE]
LAST = 0x10FFFF
CLASSES = set("pPsSdDwWhH")  # escapes that stand for a class
CONTROL = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "e": "\x1b"}



def ranges(numbers: Iterable[int]) -> Ranges:
    """Some of CHARACTERS as inclusive ranges, with those that they stand for. Surrogates, which no text has, do not
    interrupt one."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        run = LIKE.get(number, range(number, number + 1))
        before = SURROGATES.start if run.start == SURROGATES.stop else run.start
        if found and found[-1][1] + 1 == before:
            found[-1] = found[-1][0], run[-1]
        else:
            found.append((run[0], run[-1]))
    return tuple(found)


@cache
def matched(pattern: str) -> Ranges:
    """The code points that a pattern for one character matches, according to tokenizers."""
    try:
        without = Replace(Regex(pattern), "").normalize_str("".join(map(chr, CHARACTERS)))
    except Exception as error:
        raise UnsupportedError(f"the tokenizer's pattern {pattern!r} is not valid ({error}).") from None
    return ranges(set(CHARACTERS) - set(map(ord, without)))


def kinds(split: PreTokenizer) -> tuple[Ranges, Ranges]:
    """For a pre-tokenizer that goes by single characters: those that it takes out of the text, and those that it cuts
    off from letters around them."""
    removed, cut = [], []
    # one at a time between letters, a thousand in one text: 'aXa' stays whole, is cut in three, or loses its middle
    for start in range(0, len(CHARACTERS), 1000):
        part = CHARACTERS[start : start + 1000]
        text = "a" + "".join(f"{chr(number)}a" for number in part)
        pieces = [range(*at) for _, at in split.pre_tokenize_str(text)]
        whole = {at for piece in pieces for at in piece}
        single = {piece.start for piece in pieces if len(piece) == 1}
        for index, number in enumerate(part):
            if 2 * index + 1 not in whole:
                removed.append(number)
            elif 2 * index + 1 in single:
                cut.append(number)
    return ranges(removed), ranges(cut)


def klass(found: Ranges) -> str:
    """A JavaScript character class; the shorter of the class and its complement."""
    if not found:
        return "[]"
    last, gaps = -1, []
    for low, high in found:
        if low > last + 1:
            gaps.append((last + 1, low - 1))
        last = high
    if last < LAST:
        gaps.append((last + 1, LAST))
    if len(gaps) < len(found):
        return "[^" + _spans(tuple(gaps)) + "]"
    return "[" + _spans(found) + "]"


def _spans(found: Ranges) -> str:
    return "".join(_one(low) if low == high else f"{_one(low)}-{_one(high)}" for low, high in found)


def _one(number: int) -> str:
    letter = chr(number)
    if letter.isascii() and letter.isalnum():
        return letter
    return f"\\u{{{number:x}}}"


def literal(text: str) -> str:
    return "".join(_one(ord(letter)) for letter in text)


class _Reader:
    """One pass over a pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.groups = pattern, 0, 0

    def fail(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"the tokenizer splits text by a pattern with {what}, which the browser's tokenizer "
                                f"does not have: {self.pattern}")  # fmt: skip

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if found := self.peek(text):
            self.at += len(text)
        return found

    def alternatives(self, fold: bool) -> str:
        """Up to the end of the group or of the pattern."""
        parts = []
        while self.at < len(self.pattern) and not self.peek(")"):
            if self.take("|"):
                parts.append("|")
                continue
            if self.take("(?i)"):
                fold = True
                continue
            parts.append(self.repeated(self.atom(fold)))
        return "".join(parts)

    def atom(self, fold: bool) -> str:
        pattern, start = self.pattern, self.at
        letter = pattern[start]
        if letter == "(":
            return self.group(fold)
        if letter == "[":
            self.at = self.bracket_end()
        elif letter == "\\":
            self.at += 2
            name = pattern[start + 1 : start + 2]
            if name in CLASSES and name in "pP":
                self.at = pattern.index("}", start) + 1
            elif name in CONTROL or not name.isalnum():
                return self.letter(CONTROL.get(name, name), fold)
            elif name in "xu" and (found := re.compile(r"\\(x\{(\w+)\}|x(\w\w)|u(\w{4}))").match(pattern, start)):
                self.at = found.end()
                return self.letter(chr(int(found[2] or found[3] or found[4], 16)), fold)
            elif name not in CLASSES:
                raise self.fail(f"'\\{name}'")
        elif letter in "^$":
            raise self.fail(f"'{letter}'")
        elif letter in "*+?":
            raise self.fail(f"a stray '{letter}'")
        else:
            self.at += 1
            if letter != ".":
                return self.letter(letter, fold)
        source = pattern[start : self.at]
        return klass(matched(f"(?i:{source})" if fold else source))

    def letter(self, letter: str, fold: bool) -> str:
        return klass(matched(f"(?i:{re.escape(letter)})")) if fold and letter.isalpha() else literal(letter)

    def bracket_end(self) -> int:
        depth, at = 0, self.at
        while at < len(self.pattern):
            letter = self.pattern[at]
            if letter == "\\":
                at += 1
            elif letter == "[":
                depth += 1
                at += self.pattern.startswith("[^", at)
                at += self.pattern.startswith("]", at + 1)  # one that comes first stands for itself
            elif letter == "]":
                depth -= 1
                if depth == 0:
                    return at + 1
            at += 1
        raise self.fail("an open '['")

    def group(self, fold: bool) -> str:
        self.at += 1
        opening, atomic = "(?:", False
        for start in ("?:", "?=", "?!", "?<=", "?<!"):
            if self.take(start):
                opening = f"({start}"
                break
        else:
            if self.take("?i:"):
                fold = True
            elif self.take("?>"):
                atomic = True
            elif self.peek("?"):
                raise self.fail(f"'({self.pattern[self.at : self.at + 3]}'")
        inside = self.alternatives(fold)
        if not self.take(")"):
            raise self.fail("an open '('")
        return self.atomic(inside) if atomic else f"{opening}{inside})"

    def atomic(self, inside: str) -> str:
        """What has matched once is not tried otherwise: JavaScript has that in lookahead only."""
        self.groups += 1
        return f"(?:(?=(?<a{self.groups}>{inside}))\\k<a{self.groups}>)"

    def repeated(self, atom: str) -> str:
        found = re.compile(r"[*+?]|\{\d*,?\d*\}").match(self.pattern, self.at)
        if not found:
            return atom
        self.at = found.end()
        count = found[0].replace("{,", "{0,")
        if self.take("?"):
            return f"{atom}{count}?"
        if self.peek("+") and not count.startswith("{"):
            self.at += 1
            return self.atomic(atom + count)
        if re.compile(r"[*+]|\{\d").match(self.pattern, self.at):
            raise self.fail("a repeated repetition")
        return atom + count


def translate(pattern: str) -> str:
    """The source of a JavaScript regular expression (flag u) that matches as `pattern` does in tokenizers.

    Raises UnsupportedError for what it does not know: anchors, references, named groups."""
    reader = _Reader(pattern)
    found = reader.alternatives(False)
    if reader.at < len(pattern):
        raise reader.fail("a stray ')'")
    return found
