"""The shortest way to the end of a text under a grammar, found byte by byte.

llguidance says what may come next, not how far the end is. A second matcher of the same grammar over 256 one-byte
tokens answers in a microsecond, so the end can be looked for: first with what closed the text a moment ago, or a rest
of it, then by a search, shortest first, that stops where such a rest fits.
"""

import heapq
import re
import time
from collections.abc import Sequence
from functools import cache
from itertools import count
from math import inf
from typing import Any

END = 256  # the token of the byte matcher that ends a text
STATES = 3000  # of one search
ALIKE, ALIKE_BY_LENGTH = 3, 12  # so many states that look the same are gone on from
WAYS = 12  # bytes tried in one state
WIDE = 64  # more bytes than this are allowed only within a text
CLOSERS = b'}]"'
QUOTE = b'"'
MARKS = (b"}", b"]", b'"')
FIRST, FIRST_IN_TEXT = CLOSERS + b",:0@.a", b'"@.a'  # what usually leads to an end
LONGEST = 20_000
RUNS = 100
NEAR = 12  # bytes


class _Bytes:
    """The 256 bytes as a tokenizer, in the form llguidance asks for."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def byte_tokenizer() -> Any:
    """One for the whole process."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=END, slices=[])


def literals(source: str) -> tuple[bytes, ...]:
    """The runs of letters and the single characters of an expression or grammar: among a hundred characters that may
    come next, those are the ones that lead somewhere else."""
    runs = [*dict.fromkeys(re.findall(r"[^\W_]{2,40}", source)), *dict.fromkeys(source)]
    return tuple(run.encode("utf-8", "replace") for run in runs[:RUNS])


def follows(matcher: Any, text: bytes, close: bytes) -> bool:
    """Whether the matcher's text may go on with `text` and then ends with `close`."""
    whole = [*text, *close, END]
    return bool(matcher.validate_tokens(whole) == len(whole))


def _rest(matcher: Any, mask: bytes, old: list[int]) -> bytes | None:
    """A rest of an old ending (its bytes, END behind them) that closes the text; None if none does.

    The last few bytes are tried first, then the rests from the longest downward: text is closed as it was a moment ago.
    """
    length = len(old)
    near, best = range(length - 1, max(length - 1 - NEAR, -1), -1), None
    for at in (*near, *range(length)):
        if best is not None and at > best + NEAR:
            break
        byte = old[at]
        if mask[byte // 8] >> byte % 8 & 1 and matcher.validate_tokens(old[at:]) == length - at:
            if at in near:
                return bytes(old[at:-1])
            best = at
    return None if best is None else bytes(old[best:-1])


def ending(matcher: Any, pieces: Sequence[bytes], is_json: bool, seconds: float = 2.0) -> bytes | None:
    """The shortest bytes that close the text from its start, as far as a search finds them; see `search`.

    None: there is no end, or it was not found in time. The matcher is not changed.
    """
    for piece in pieces:
        if follows(matcher, b"", piece):
            return piece
    if matcher.is_error():
        return None
    limit = time.monotonic() + seconds
    found = search(matcher, b"", STATES // 4, pieces, is_json, limit)[0]
    if found is None:
        found = headlong(matcher, min(time.monotonic() + seconds / 4, limit))
    if found is None:
        found = search(matcher, b"", STATES, pieces, is_json, limit)[0]
    # A matcher that failed on the way, on a rule that never ends, says that the text may end there
    return found if found is not None and follows(matcher, b"", found) else None


def search(
    matcher: Any, old: bytes, states: int, pieces: Sequence[bytes], is_json: bool, limit: float = inf
) -> tuple[bytes | None, int]:
    """Bytes that close the text, a rest of `old` where one does or leads to one soon, else None; and how many states of
    so many are left. `pieces` are written as a whole where they fit; `limit` is a time (monotonic)."""
    order, rests, anew = count(), [*old, END], bool(old)
    seen: dict[tuple[int, bytes], int] = {}
    waiting: list[tuple[int, int, bytes, Any]] = [(0, 0, b"", matcher)]
    while waiting and states > 0 and time.monotonic() < limit:
        _, _, path, here = heapq.heappop(waiting)
        if here.is_accepting():
            return path, states
        mask = here.compute_bitmask()
        # States that look the same are taken for the same: in JSON, where a text or a list may end, by what was closed
        # on the way; all others by their length.
        wide = sum(map(int.bit_count, mask)) > WIDE
        may_close = is_json and any(mask[mark // 8] >> mark % 8 & 1 for mark in (QUOTE if wide else CLOSERS))
        look = (sum(map(path.count, MARKS)) if may_close else -len(path) - 1, mask)
        seen[look] = seen.get(look, 0) + 1
        if seen[look] > (ALIKE if may_close else ALIKE_BY_LENGTH):
            continue
        states -= 1
        if (rest := _rest(here, mask, rests)) is not None:
            return path + rest, states
        fitting = [piece for piece in pieces if mask[piece[0] // 8] >> piece[0] % 8 & 1]
        if anew and any(mask[:16]):  # once, and not within a character
            anew = False
            if (best := _begun_anew(here, fitting, rests)) is not None:
                return path + best, states
        for text in (*(bytes([byte]) for byte in _ways(mask)), *fitting):
            if (step := _step(here, text)) is not None:
                longer = path + step[0]
                heapq.heappush(waiting, (len(longer), next(order), longer, step[1]))
    return None, states


def _begun_anew(matcher: Any, pieces: Sequence[bytes], old: list[int]) -> bytes | None:
    """One of `pieces` and a rest of an old ending that together close the text and are little longer than that was: a
    word that was left half written is written again."""
    found = []
    for piece in pieces:
        if len(piece) < len(old) + NEAR and (step := _step(matcher, piece)) is not None:
            there = step[1]
            rest = b"" if there.is_accepting() else _rest(there, there.compute_bitmask(), old)
            found += [] if rest is None else [step[0] + rest]
    best = min(found, key=len, default=None)
    return best if best is not None and len(best) < len(old) + NEAR else None


def headlong(matcher: Any, limit: float) -> bytes | None:
    """An ending without a search: at every place the byte that most often ends something, and where that led nowhere,
    the next. It may be long."""
    path, here, last, again = b"", matcher, b"", 0
    while len(path) < LONGEST and time.monotonic() < limit:
        if here.is_accepting():
            return path
        mask = here.compute_bitmask()
        again, last = again + 1 if mask == last else 0, mask
        ways = _ways(mask)
        step = _step(here, bytes([ways[again % len(ways)]])) if ways else None
        if step is None:
            return None
        path, here = path + step[0], step[1]
    return None


def _step(matcher: Any, text: bytes) -> tuple[bytes, Any] | None:
    """What was written, the text and what must follow it, and the matcher after it; None if it is not allowed."""
    if matcher.validate_tokens(list(text)) < len(text):
        return None
    there = matcher.deep_copy()
    forced = there.compute_ff_bytes() if there.consume_tokens(list(text)) else b""
    return (text + forced, there) if not forced or there.consume_tokens(list(forced)) else None


def _ways(mask: bytes) -> list[int]:
    """Some of the allowed bytes: those that often end something, then a few from the whole range."""
    allowed = [at * 8 + bit for at, byte in enumerate(mask[:32]) if byte for bit in range(8) if byte >> bit & 1]
    first = [byte for byte in (FIRST if len(allowed) <= WIDE else FIRST_IN_TEXT) if byte in allowed]
    others = [byte for byte in allowed if byte not in first]
    if len(allowed) > WAYS:
        others = [byte for byte in others if byte < 128] or others
        ways = max(WAYS - len(first), 2)
        others = others[:: max(len(others) // ways, 1)][:ways]
    return first + others
