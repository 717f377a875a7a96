"""Regular expressions read as far as it takes to say how short and how long the way to their end can be."""

import re
from dataclasses import dataclass, field

LONGEST = 4000  # characters of a text that is written out
HUGE = 10**8
CLASSES = {"d": "0", "D": "a", "w": "a", "W": "-", "s": " ", "S": "a", "b": "", "B": "", "A": "", "z": "", "Z": "",
           "n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}  # fmt: skip
PLAIN = "a0A_-. @x\n"
QUANTIFIER = re.compile(r"[*+?]|\{(\d{1,6})?(?:,(\d{0,6}))?\}")
CLASS = re.compile(r"\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]", re.S)
ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|[xu]\{([0-9A-Fa-f]{1,6})\}|p\{\w+\}|P\{\w+\}|(.))", re.S)
NESTED = re.compile(r".\[|--|&&|~~|\|\|", re.S)  # sets of sets, which Python does not know
GROUP = re.compile(r"\((?:\?P?<\w+>|\?[\w-]*:)?")
FLAGS = re.compile(r"\(\?[\w-]+\)")


@dataclass
class _Group:
    """What was read of a group: the atoms of the current alternative, the shortest one before, all their bytes."""

    atoms: list[str] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    best: str | None = None
    total: int = 0

    def text(self) -> str:
        now = "".join(self.atoms)[: LONGEST + 1]  # more is no use, and groups in groups would copy it again and again
        return now if self.best is None or len(now) < len(self.best) else self.best

    def add(self, text: str, cost: int) -> None:
        self.atoms.append(text)
        self.costs.append(cost)
        self.total = min(self.total + cost, HUGE)

    def repeat(self, least: int) -> None:
        if self.atoms:
            text = self.atoms[-1]
            self.atoms[-1] = text * least if len(text) * least <= LONGEST else text[:1] * (LONGEST + 1)
            more = min(self.costs[-1] * max(least - 1, 0), HUGE)
            self.costs[-1] = min(self.costs[-1] + more, HUGE)
            self.total = min(self.total + more, HUGE)

    def next(self) -> None:
        self.best, self.atoms, self.costs = self.text(), [], []


def read(pattern: str) -> tuple[str | None, int]:
    """A short text that matches, None if it is long (not to be relied on: look-around and the like are passed over);
    and the bytes that are left to write at most, anywhere in it: all alternatives once, what is repeated at least."""
    stack, at = [_Group()], 0
    closes = True  # where one class has no end, none behind it has; looking again each time takes minutes
    while at < len(pattern):
        group, character = stack[-1], pattern[at]
        if character == "(":
            if flags := FLAGS.match(pattern, at):
                at = flags.end()
                continue
            opened = GROUP.match(pattern, at)
            stack.append(_Group())
            at = opened.end() if opened else at + 1
        elif character == ")" and len(stack) > 1:
            done = stack.pop()
            stack[-1].add(done.text(), done.total)
            at += 1
        elif character == "|":
            group.next()
            at += 1
        elif character in "^$":
            group.add("", 0)
            at += 1
        elif found := QUANTIFIER.match(pattern, at):
            group.repeat({"*": 0, "?": 0, "+": 1}.get(found[0], int(found[1] or 0)))
            at = found.end()
            at += pattern[at : at + 1] == "?"  # lazy or not is the same
        else:
            found = CLASS.match(pattern, at) if closes else None
            closes = closes and (character != "[" or found is not None)
            text, at = (_of_class(found[0]), found.end()) if found else _atom(pattern, at)
            group.add(text, max(2, len(text.encode("utf-8", "replace"))))
    while len(stack) > 1:
        done = stack.pop()
        stack[-1].add(done.text(), done.total)
    text = stack[0].text()
    return (text if len(text) <= LONGEST else None), stack[0].total


def _atom(pattern: str, at: int) -> tuple[str, int]:
    """A character that matches the atom at `at`, and where it ends."""
    if pattern[at] == ".":
        return "a", at + 1
    if found := ESCAPE.match(pattern, at):
        if code := found[1] or found[2] or found[3]:
            return chr(min(int(code, 16), 0x10FFFF)), found.end()
        return CLASSES.get(found[4], found[4]) if found[4] else "a", found.end()
    return pattern[at], at + 1


def _of_class(text: str) -> str:
    """The plainest character of a class, or the first that stands in it."""
    if NESTED.search(text):
        return "a"
    try:
        compiled = re.compile(text)
    except re.error:
        return text[1]
    return next((each for each in PLAIN + text if compiled.fullmatch(each)), text[1])
