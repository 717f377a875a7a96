"""A teacher with another tokenizer: both models are compared by the next byte.

A text is the same bytes in every vocabulary. What a model of tokens says of the next byte is a sum over the ways in
which its tokens can cover the bytes so far (Phan et al. 2024, arXiv:2410.09303). Along the tokens that the text is cut
into, a way is one of their beginnings and a token from there that begins with the bytes since and is longer: it has the
probability of the tokens before, and of that token, for the byte that the token goes on with (or for the text's end).
The loss is the divergence of the two models' distributions at every byte of the student's text.

Left out is that some other token ends just here: what follows it would take a pass of its own. So a byte that only one
model can go on with is left out on both sides, and each place counts by the share of the teacher's probability that is
compared, the weight which this part of a divergence has in the whole.
"""

import json
from bisect import bisect_left
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shrew import data, objectives
from shrew.errors import UnsupportedError
from shrew.runtime.text import Vocabulary

END, OTHER = 256, 257  # outcomes beside the 256 bytes: the text ends; any other token that is no text
OUTCOMES = 258
ENDED = OUTCOMES  # of a token that goes on with none of them


class State(NamedTuple):
    """A model before some byte of a text: the last position that predicts it, and the ways in which tokens go over that
    byte: the position that predicts such a token, and the bytes so far of it."""

    position: int
    ways: tuple[tuple[int, bytes], ...]


class Spelling:
    """What the tokens of a tokenizer say, in bytes. `width`: the model's vocabulary, of which the tokenizer may know
    less. Raises UnsupportedError for one that does not keep every byte of a text."""

    def __init__(self, tokenizer: Any, width: int) -> None:
        self.tokenizer = tokenizer
        core = tokenizer.backend_tokenizer
        known = Vocabulary(core)
        pieces = not known.is_bytes and "▁" in json.dumps(json.loads(core.to_str())["decoder"], ensure_ascii=False)
        if not (known.is_bytes or pieces):
            raise UnsupportedError("a tokenizer that is neither byte-level nor SentencePiece loses bytes of the text, "
                                   "and another one cannot be compared with it; take a teacher with the student's "
                                   "tokenizer.")  # fmt: skip
        spell = known.content if known.is_bytes else lambda id: _piece(known, id)
        self.content = [spell(id) for id in range(min(width, len(tokenizer)))]
        self.content += [b""] * (width - len(self.content))
        first = [part[0] if part else OTHER for part in self.content]
        if tokenizer.eos_token_id is not None:
            first[tokenizer.eos_token_id] = END
        self.first = torch.tensor(first)
        self._sorted = sorted((part, id) for id, part in enumerate(self.content) if part)
        self._known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def after(self, prefix: bytes) -> tuple[Tensor, Tensor]:
        """The tokens that begin with these bytes, and what each goes on with: a byte, ENDED or, of no bytes at all,
        any outcome."""
        if not prefix:
            return torch.arange(len(self.first)), self.first
        if prefix in self._known:
            return self._known[prefix]
        low, high = bisect_left(self._sorted, (prefix, -1)), bisect_left(self._sorted, (prefix + b"\xff" * 99, -1))
        following = [part[len(prefix)] if part != prefix else ENDED for part, _ in self._sorted[low:high]]
        found = torch.tensor([id for _, id in self._sorted[low:high]]), torch.tensor(following)
        if following:  # what no token begins with has no end
            self._known[prefix] = found
        return found

    def states(self, ids: list[int], start: int) -> dict[int, State]:
        """By byte, the state of a model that reads these tokens, which begin at byte `start`, after the first of them
        and up to what comes after the last. No token goes over one that is no text."""
        found: dict[int, State] = {}
        ways: list[tuple[int, bytes]] = []
        for position, following in enumerate([*ids[1:], None]):
            own = self.content[ids[position]]
            start += len(own)
            ways = [*(ways if own else []), (position, b"")]
            found.setdefault(start, State(position, tuple(ways)))
            part = b"" if following is None else self.content[following]
            done = (position, part)  # where the text's own token ends, what follows it has a way of its own
            for depth in range(1, len(part) + 1):
                ways = [(at, prefix + part[depth - 1 : depth]) for at, prefix in ways]
                ways = [way for way in ways if len(self.after(way[1])[0]) > (way == done)]
                if depth < len(part):
                    found[start + depth] = State(position, tuple(ways))
        return found


class Said(NamedTuple):
    """Log-probabilities [T, V] of what follows each of these T tokens, and how the tokens are spelt."""

    logs: Tensor
    ids: list[int]
    spelling: Spelling


def _piece(known: Vocabulary, id: int) -> bytes:
    """What a SentencePiece token adds to the text."""
    name = known.tokenizer.id_to_token(id) or ""
    if id in known.special:
        return b""
    if len(name) == 6 and name.startswith("<0x"):
        return bytes.fromhex(name[3:5])
    return name.replace("▁", " ").encode()


def retold(ids: list[int], student: Spelling, teacher: Spelling) -> tuple[list[int], int] | None:
    """The student's tokens as the teacher's, its begin token first, and the byte of the student's text where they
    begin. Half a character at the beginning has no tokens, nor has what follows the first bytes that are none. None for
    a text that the teacher's tokenizer changes."""
    text = b"".join(student.content[id] for id in ids)
    start = next((at for at, byte in enumerate(text) if byte & 0xC0 != 0x80), len(text))
    said = text[start:]
    try:
        said.decode()
    except UnicodeDecodeError as error:
        said = said[: error.start]
    row = data.encode(teacher.tokenizer, [said.decode()])[0]
    again = b"".join(teacher.content[id] for id in row)
    if again not in (said, b" " + said) or not said:
        return None
    return row, start - (again != said)  # SentencePiece may put a space before the text


def byte_divergence(
    student: Said, teacher: Said, states: list[tuple[State, State]], loss: str, alpha: float
) -> Tensor:
    """Sum in nats over these bytes, given as the states of both models, of the divergence between their predictions."""
    (left, possible), (right, common) = (marginals(said, list(each)) for said, each in
                                         zip((student, teacher), zip(*states, strict=True), strict=True))
    common = (common & possible)[:, :OUTCOMES]
    left, right = (item[:, :OUTCOMES].masked_fill(~common, objectives.LOWEST) for item in (left, right))
    share = right.logsumexp(-1).exp()
    return objectives.divergence(left.log_softmax(-1), right.log_softmax(-1), loss, alpha, share)


def marginals(said: Said, states: list[State]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, OUTCOMES + 1] of what the ways over the next byte go on with, the last one of other tokens
    than the text's that end just there, and whether any does."""
    logs, ids, spelling = said
    path = torch.cat([logs.new_zeros(1), logs[range(len(ids) - 1), ids[1:]]]).double().cumsum(0)  # far below any other
    last = path[[state.position for state in states]]
    own = torch.tensor([*ids[1:], -1])
    alike: dict[bytes, list[tuple[int, int]]] = {}
    for place, state in enumerate(states):
        for position, prefix in state.ways:
            alike.setdefault(prefix, []).append((place, position))
    parts, most = [], logs.new_full((len(states),), -torch.inf)
    for prefix, found in alike.items():
        places, positions = torch.tensor(found).T
        tokens, outcome = spelling.after(prefix)
        part = logs[positions][:, tokens] + (path[positions] - last[places]).to(logs.dtype)[:, None]
        part = part.masked_fill((outcome == ENDED) & (tokens == own[positions, None]), -torch.inf)
        most = most.scatter_reduce(0, places, part.detach().amax(-1), "amax")
        parts.append((places, outcome, part))
    sums, possible = logs.new_zeros(len(states), OUTCOMES + 1), torch.zeros(len(states), OUTCOMES + 1, dtype=torch.bool)
    for places, outcome, part in parts:
        each = part.new_zeros(len(places), OUTCOMES + 1).index_add(1, outcome, (part - most[places, None]).exp())
        sums = sums.index_add(0, places, each)
        possible[places[:, None], outcome] = True
    return sums.clamp_min(1e-30).log().log_softmax(-1), possible
