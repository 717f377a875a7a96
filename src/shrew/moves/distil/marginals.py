"""A teacher with another tokenizer: both models are compared by the next byte.

A text is the same bytes in every vocabulary. Where a token begins, a model's next-token distribution summed up by the
first byte of each token is its distribution of the next byte (or of the text's end), given its own tokens so far.
Within a token the same is done with the tokens that begin with its bytes so far and are longer, by the byte that
follows. The loss is the divergence of the two models' distributions at every byte of the student's text.

Where boundaries of both models meet, the marginals are exact. Elsewhere it is approximate: "my token goes on" is not
the same event in two vocabularies, so a byte that only one model can go on with is left out on both sides. And a text
is taken in the one way that its tokenizer cuts it, not summed over all ways to cut it.
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


class State(NamedTuple):
    """A model before some byte of a text: the position of its prediction, and the bytes so far of the token there."""

    position: int
    prefix: bytes


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
        """The tokens that begin with these bytes and go on, and the byte (or other outcome) that they go on with."""
        if not prefix:
            return torch.arange(len(self.first)), self.first
        if prefix not in self._known:
            low, high = bisect_left(self._sorted, (prefix, -1)), bisect_left(self._sorted, (prefix + b"\xff" * 99, -1))
            ids = [id for part, id in self._sorted[low:high] if len(part) > len(prefix)]
            following = [self.content[id][len(prefix)] for id in ids]
            self._known[prefix] = torch.tensor(ids), torch.tensor(following)
        return self._known[prefix]

    def states(self, ids: list[int], start: int) -> dict[int, State]:
        """By byte, the state of a model that reads these tokens, which begin at byte `start`, after the first of them
        and up to what comes after the last."""
        found: dict[int, State] = {}
        for position, following in enumerate([*ids[1:], None]):
            start += len(self.content[ids[position]])
            found.setdefault(start, State(position, b""))
            part = b"" if following is None else self.content[following]
            found |= {start + depth: State(position, part[:depth]) for depth in range(1, len(part))}
        return found


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
    student: Tensor, teacher: Tensor, states: list[tuple[State, State]], mine: Spelling, theirs: Spelling, loss: str,
    alpha: float,
) -> Tensor:  # fmt: skip
    """Sum in nats over these bytes of the divergence between the models' predictions of them; log-probabilities [T, V]
    of the student and [S, W] of the teacher, and the state of each."""
    left, possible = marginals(student, [one for one, _ in states], mine)
    right, common = marginals(teacher, [two for _, two in states], theirs)
    common &= possible
    left, right = (item.masked_fill(~common, objectives.LOWEST).log_softmax(-1) for item in (left, right))
    return objectives.divergence(left, right, loss, alpha)


def marginals(logs: Tensor, states: list[State], spelling: Spelling) -> tuple[Tensor, Tensor]:
    """Logarithms [N, OUTCOMES] of what the tokens of each next byte have, up to a constant, and whether any has it, of
    log-probabilities [T, V]: the sum over the tokens that agree with the bytes so far."""
    alike: dict[bytes, list[int]] = {}
    for place, state in enumerate(states):
        alike.setdefault(state.prefix, []).append(place)
    sums, possible = [], torch.zeros(len(states), OUTCOMES, dtype=torch.bool)
    for prefix, places in alike.items():
        ids, outcome = spelling.after(prefix)
        part = logs[[states[place].position for place in places]][:, ids]
        part = (part - part.detach().amax(-1, keepdim=True)).exp()
        sums.append(part.new_zeros(len(places), OUTCOMES).index_add(1, outcome, part))
        possible[torch.tensor(places)[:, None], outcome] = True
    order = torch.tensor([place for places in alike.values() for place in places]).argsort()
    return torch.cat(sums)[order].clamp_min(1e-30).log(), possible
