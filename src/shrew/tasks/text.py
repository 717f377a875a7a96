"""Held-out text, measured in bits per byte of its UTF-8 form: comparable between tokenizers.

Each document is a row of its own. Its first token is predicted from the tokenizer's begin token, or from its end token
where it has no other (that is what separates documents in training), or, with neither, costs log2(vocabulary) bits.
Documents longer than the window (the model's context, at most 1,024 tokens) are scored by a sliding context with a
stride of three quarters of it: every token exactly once, and after the first window with at least a quarter before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from shrew.data import Document
from shrew.folder import Loaded
from shrew.tasks import likelihood
from shrew.tasks.scores import Scores
from shrew.tasks.split import SplitTask

LN2 = math.log(2)
DECILES = 10


@dataclass(frozen=True, kw_only=True)
class Text(SplitTask):
    """Documents whose bits per byte are measured. See the module's text for what exactly is computed."""

    kind: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "bits_per_byte"
    splits: dict[str, list[Document]]
    window: int = likelihood.WINDOW  # tokens of context at most

    def texts(self, loaded: Loaded, split: str) -> list[str]:
        return [item.text for item in self.examples(split)]

    def shown(self, example: Document) -> tuple[str, str]:
        return example.text, ""

    def score(self, loaded: Loaded, split: str, reference: Loaded | None = None) -> Scores:
        """Bits and bytes of every document. Columns, one number a document:

        - "bits", "bytes", "tokens";
        - "decile0_bits", "decile0_tokens" ... "decile9_...": the same by token frequency in this split, the rarest
          tenth of the tokens first; see `token_deciles`;
        - with a `reference` (the original) of the same tokenization: "kl_bits", the sum over tokens of
          KL(reference || loaded) in bits, and "agree", the number of tokens where both have the same first choice.
        """
        likelihood.check_causal(loaded, f"{self.label}")
        items: Sequence[Document] = self.examples(split)
        bodies = likelihood.token_ids(loaded.tokenizer, [item.text for item in items])
        start = likelihood.first_token(loaded.tokenizer)
        deciles = token_deciles(bodies, likelihood.vocabulary(loaded.model))
        rows = bodies if start is None else [[start, *body] for body in bodies]
        other = reference.model if reference is not None and _same_tokens(loaded, reference, items, bodies) else None

        names = ["bits", "bytes", "tokens"]
        names += [f"decile{n}_{what}" for n in range(DECILES) for what in ("bits", "tokens")]
        names += ["kl_bits", "agree"] if other is not None else []
        columns = {name: np.zeros(len(items)) for name in names}
        columns["bytes"][:] = [len(item.text.encode("utf-8")) for item in items]
        if start is None:
            for number, body in enumerate(bodies):
                self._add(columns, number, np.full(1, np.log2(len(loaded.tokenizer))), deciles[body[:1]])
        length = likelihood.context_length(loaded.model, self.window)
        if other is not None:
            length = min(length, likelihood.context_length(other, self.window))
        vocab = likelihood.vocabulary(loaded.model)
        plan = likelihood.spans(rows, length, max(1, length * 3 // 4), max(1, likelihood.LOGITS // vocab))
        for batch in likelihood.batches(plan, vocab):
            found = likelihood.logits(loaded.model, rows, batch)
            wanted = likelihood.logits(other, rows, batch) if other is not None else [None] * len(batch)
            for item, new, old in zip(batch, found, wanted, strict=True):
                targets = torch.tensor(rows[item.row][item.score : item.end])
                self._add(columns, item.row, -likelihood.log_probs(new, targets) / LN2, deciles[targets.numpy()])
                if old is not None:
                    divergence, agree = compare(old, new)
                    columns["kl_bits"][item.row] += divergence / LN2
                    columns["agree"][item.row] += agree
        return Scores(self.label, split, self.metric, [item.id for item in items], columns)

    @staticmethod
    def _add(columns: dict[str, np.ndarray], row: int, bits: np.ndarray, shares: np.ndarray) -> None:
        columns["bits"][row] += bits.sum()
        columns["tokens"][row] += len(bits)
        for decile, (total, count) in enumerate(zip(bits @ shares, shares.sum(0), strict=True)):
            columns[f"decile{decile}_bits"][row] += total
            columns[f"decile{decile}_tokens"][row] += count


def token_deciles(rows: Sequence[Sequence[int]], vocab: int) -> np.ndarray:
    """[V, 10] share of each token id's occurrences in each tenth of these rows' tokens, the rarest tenth first.

    Occurrences are ranked by how often their token stands in the rows. Equally frequent ones are tied, and ties are
    shared evenly among the tenths that they span, so that every tenth holds exactly a tenth of the tokens and no
    number depends on the order of the vocabulary.
    """
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
    counts = np.bincount(flat, minlength=vocab)
    sizes, place = np.unique(counts, return_inverse=True)
    mass = np.bincount(place) * sizes  # occurrences of all the tokens that are so frequent
    high = np.cumsum(mass)[:, None] * DECILES  # in tenths of an occurrence, so that all is exact
    edges = flat.size * np.arange(DECILES + 1)
    inside = np.clip(np.minimum(high, edges[1:]) - np.maximum(high - mass[:, None] * DECILES, edges[:-1]), 0, None)
    shares: np.ndarray = inside / np.maximum(mass[:, None] * DECILES, 1)
    return shares[place]


@dataclass(frozen=True)
class Word:
    """A token in its context, and the bits that it cost before and after."""

    id: str  # of the document
    left: str
    token: str
    right: str
    before: float
    after: float


def rare_tokens(
    task: Text, split: str, places: Sequence[int], pair: tuple[Loaded, Loaded], most: int = 3
) -> list[Word]:
    """Of each document numbered by `places`, the (at most `most`) tokens of the rarest tenth whose bits grew most from
    the first model to the second; both must read text as the same tokens."""
    items = task.examples(split)
    tokenizer = pair[0].tokenizer
    bodies = likelihood.token_ids(tokenizer, [item.text for item in items])
    rare = token_deciles(bodies, likelihood.vocabulary(pair[0].model))[:, 0] > 0.5
    old, new = (token_bits(loaded, [bodies[place] for place in places], task.window) for loaded in pair)
    found = []
    for place, before, after in zip(places, old, new, strict=True):
        body = bodies[place]
        grown = np.where(rare[body], after - before, -np.inf)
        for at in np.argsort(-grown, kind="stable")[:most]:
            if grown[at] > 0:
                left, right = (tokenizer.decode(part) for part in (body[max(0, at - 24) : at], body[at + 1 : at + 9]))
                token = tokenizer.decode(body[at : at + 1])
                found.append(Word(items[place].id, left, token, right, float(before[at]), float(after[at])))
    return found


def token_bits(loaded: Loaded, bodies: Sequence[Sequence[int]], window: int) -> list[np.ndarray]:
    """Bits of every token of each row, as `Text.score` counts them."""
    start = likelihood.first_token(loaded.tokenizer)
    rows = [list(body) if start is None else [start, *body] for body in bodies]
    vocab, length = likelihood.vocabulary(loaded.model), likelihood.context_length(loaded.model, window)
    found = [np.full(len(row), np.log2(len(loaded.tokenizer))) for row in rows]
    plan = likelihood.spans(rows, length, max(1, length * 3 // 4), max(1, likelihood.LOGITS // vocab))
    for batch in likelihood.batches(plan, vocab):
        for item, logits in zip(batch, likelihood.logits(loaded.model, rows, batch), strict=True):
            targets = torch.tensor(rows[item.row][item.score : item.end])
            found[item.row][item.score : item.end] = -likelihood.log_probs(logits, targets) / LN2
    return found if start is None else [row[1:] for row in found]


def compare(old: torch.Tensor, new: torch.Tensor) -> tuple[float, int]:
    """[n, V] logits of the reference and the model -> (sum of KL(old || new) in nats, number of equal top choices)."""
    total, agree = 0.0, 0
    for part in likelihood.pieces(old):
        p, q = old[part].double().log_softmax(1), new[part].double().log_softmax(1)
        total += float((p.exp() * (p - q)).nan_to_num(0.0).sum())
        agree += int((p.argmax(1) == q.argmax(1)).sum())
    return total, agree


def _same_tokens(loaded: Loaded, reference: Loaded, items: Sequence[Document], bodies: list[list[int]]) -> bool:
    if reference.is_classifier or likelihood.vocabulary(loaded.model) != likelihood.vocabulary(reference.model):
        return False
    if likelihood.first_token(loaded.tokenizer) != likelihood.first_token(reference.tokenizer):
        return False
    return likelihood.token_ids(reference.tokenizer, [item.text for item in items]) == bodies
