"""Fill-in-the-middle (Bavarian et al. 2022): a document cut in three and written with its middle last.

A causal model trained on such documents writes what belongs between two texts. The cuts lie between tokens, not between
characters as in the paper: the text is tokenized once, before. Where a window holds a part of a document, that part is
what is cut in three (the paper's context-level form, which it found to be the better).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from shrew.errors import SpecError

# prefix, middle, suffix as tokenizers spell them: Qwen and ours, StarCoder, SantaCoder, CodeLlama, Codestral, DeepSeek.
MARKS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
    ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>"),
)
SHORTEST = 3  # tokens; what is shorter has no three parts


@dataclass(frozen=True)
class Middle:
    """How often, and the token ids that it is written with. `begin` and `end` stay the first and last of a document."""

    rate: float
    prefix: int
    middle: int
    suffix: int
    begin: int | None = None
    end: int | None = None


def fill_in_the_middle(tokenizer: Any, rate: float) -> Middle:
    """The setting for a tokenizer that has the three tokens under one of their known names."""
    known = tokenizer.get_vocab()
    for marks in MARKS:
        if all(mark in known for mark in marks):
            prefix, middle, suffix = (known[mark] for mark in marks)
            return Middle(rate, prefix, middle, suffix, tokenizer.bos_token_id, tokenizer.eos_token_id)
    raise SpecError(f"train.fim: the tokenizer has no tokens {', '.join(MARKS[0])} (or others for fill-in-the-middle); "
                    "set fim = 0, or let one be trained with tokenizer = 'bpe:SIZE'.")  # fmt: skip


def rearrange(tokens: np.ndarray, low: int, high: int, item: Middle, suffix_first: bool) -> np.ndarray:
    """tokens [n] cut at low <= high into prefix, middle, suffix -> [n + 3].

    PSM: PREFIX prefix SUFFIX suffix MIDDLE middle. SPM, as in the paper: PREFIX SUFFIX suffix MIDDLE prefix middle.
    """
    prefix, middle, suffix = tokens[:low], tokens[low:high], tokens[high:]
    if suffix_first:
        parts = [[item.prefix, item.suffix], suffix, [item.middle], prefix, middle]
    else:
        parts = [[item.prefix], prefix, [item.suffix], suffix, [item.middle], middle]
    return np.concatenate([np.asarray(part, tokens.dtype) for part in parts])


def rearranged(tokens: np.ndarray, owner: np.ndarray, item: Middle, draw: np.random.Generator
               ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A window of packed documents, tokens and owner [n], with each rearranged at the rate -> the same shapes.

    Three tokens come with each, so that those at the end of the window fall off; what falls off is lost before the last
    document is cut in three, never from within its parts.
    """
    written: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    room = len(tokens)
    for part in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(owner)) + 1):
        whole = tokens[part]
        if draw.random() < item.rate:
            whole = _one(whole, item, draw, room)
        written.append(whole[:room])
        owners.append(np.full(len(written[-1]), owner[part[0]]))
        room -= len(written[-1])
    return np.concatenate(written), np.concatenate(owners)


def _one(whole: np.ndarray, item: Middle, draw: np.random.Generator, room: int) -> np.ndarray:
    """One document rearranged; as it is where it, or the room for it, is too short."""
    cut = whole[: max(room - 3, 0)]
    head = int(len(cut) > 0 and cut[0] == item.begin)
    tail = int(len(cut) > head and item.end != item.begin and cut[-1] == item.end)
    body = cut[head : len(cut) - tail]
    if len(body) < SHORTEST:
        return whole
    low, high = np.sort(draw.integers(0, len(body) + 1, 2))
    done = rearrange(body, int(low), int(high), item, bool(draw.integers(2)))
    return np.concatenate([cut[:head], done, cut[len(cut) - tail :]])
