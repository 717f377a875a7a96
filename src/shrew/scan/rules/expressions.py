"""Regular expressions of rules, in a form whose time is bounded whatever they are tried on.

Python's engine backtracks, so a pattern is refused unless the ways in which it can fail are few: its unbounded
repetitions, optional parts and alternatives are multiplied up for a text of LONGEST characters, and nothing that is
repeated may itself be ambiguous. Texts are cut to LONGEST before they are tried.
"""

import re
from re import _constants as codes  # type: ignore[attr-defined]  # its parse tree has no public name
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 400  # characters of a text that are looked at
PATTERN = 1000  # characters of a pattern
WAYS = 50_000_000  # steps that a pattern may take at worst; ordinary ones take a millionth

_SINGLE = {codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY}
_STILL = {codes.AT}


def compile_safely(pattern: str) -> re.Pattern[str]:
    """The compiled pattern, to be tried by `found`. Raises ValueError, with the reason, for one that may take long."""
    if len(pattern) > PATTERN:
        raise ValueError(f"it is longer than {PATTERN} characters")
    try:
        tree = parser.parse(pattern)
        starts = 1 if len(tree) and tree[0][0] is codes.AT and tree[0][1] is codes.AT_BEGINNING_STRING else LONGEST
        ways = starts * _ways(tree)
        known = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    if tree.state.flags & re.MULTILINE:
        raise ValueError("the flag m is not known here; write \\A and \\Z for the ends")
    if ways > WAYS:
        raise ValueError("it may take very long on some texts; use fewer *, +, ? and | in a row")
    return known


def found(pattern: re.Pattern[str], text: str) -> bool:
    return pattern.search(text[:LONGEST]) is not None


def _ways(tree: Any) -> int:
    """At most so many steps from one start."""
    ways = 1
    for code, value in tree:
        if code in _SINGLE or code in _STILL:
            continue
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            least, most, body = value
            single = all(inner in _SINGLE for inner, _ in body)
            if most > 1 and not single:
                raise ValueError("what is repeated holds repetitions or alternatives; repeat plain characters only")
            ways *= max(1, (min(most, LONGEST) - least + 1)) * (1 if single else _ways(body))
        elif code is codes.SUBPATTERN:
            ways *= _ways(value[3])
        elif code is codes.BRANCH:
            ways *= sum(_ways(branch) for branch in value[1])
        else:
            raise ValueError("it looks around or back; only characters, groups, |, *, +, ?, {} and ends are known here")
        if ways > 1 << 60:
            break
    return ways
