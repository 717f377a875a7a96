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
BANDS = (0.5, 0.8, 0.95, 1.0)  # cumulative share of the tokens: the commonest half, ..., the rarest twentieth


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

    def score(self, loaded: Loaded, split: str, reference: Loaded | None = None) -> Scores:
        """Bits and bytes of every document. Columns, one number a document:

        - "bits", "bytes", "tokens";
        - "band0_bits", "band0_tokens" ... "band3_...": the same by token frequency in this split, commonest first;
        - with a `reference` (the original) of the same tokenization: "kl_bits", the sum over tokens of
          KL(reference || loaded) in bits, and "agree", the number of tokens where both have the same first choice.
        """
        likelihood.check_causal(loaded, f"{self.label}")
        items: Sequence[Document] = self.examples(split)
        bodies = likelihood.token_ids(loaded.tokenizer, [item.text for item in items])
        start = likelihood.first_token(loaded.tokenizer)
        bands = token_bands(bodies, likelihood.vocabulary(loaded.model))
        rows = bodies if start is None else [[start, *body] for body in bodies]
        other = reference.model if reference is not None and _same_tokens(loaded, reference, items, bodies) else None

        names = ["bits", "bytes", "tokens", *(f"band{n}_{what}" for n in range(4) for what in ("bits", "tokens"))]
        names += ["kl_bits", "agree"] if other is not None else []
        columns = {name: np.zeros(len(items)) for name in names}
        columns["bytes"][:] = [len(item.text.encode("utf-8")) for item in items]
        if start is None:
            for number, body in enumerate(bodies):
                self._add(columns, number, np.full(1, np.log2(len(loaded.tokenizer))), bands[body[:1]])
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
                self._add(columns, item.row, -likelihood.log_probs(new, targets) / LN2, bands[targets.numpy()])
                if old is not None:
                    divergence, agree = compare(old, new)
                    columns["kl_bits"][item.row] += divergence / LN2
                    columns["agree"][item.row] += agree
        return Scores(self.label, split, self.metric, [item.id for item in items], columns)

    @staticmethod
    def _add(columns: dict[str, np.ndarray], row: int, bits: np.ndarray, bands: np.ndarray) -> None:
        columns["bits"][row] += bits.sum()
        columns["tokens"][row] += len(bits)
        for band, (total, count) in enumerate(
            zip(np.bincount(bands, bits, 4), np.bincount(bands, minlength=4), strict=True)
        ):
            columns[f"band{band}_bits"][row] += total
            columns[f"band{band}_tokens"][row] += count


def token_bands(rows: Sequence[Sequence[int]], vocab: int) -> np.ndarray:
    """[V] band of each token id, 0 (commonest) to 3 (rarest), by its cumulative frequency in these rows."""
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if rows else np.zeros(0, np.int64)
    counts = np.bincount(flat, minlength=vocab)
    order = np.argsort(-counts, kind="stable")
    before = (np.cumsum(counts[order]) - counts[order]) / max(counts.sum(), 1)
    bands = np.empty(len(counts), dtype=np.int64)
    bands[order] = np.minimum(np.searchsorted(BANDS, before, side="right"), 3)
    return bands


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
