"""Log-probabilities of tokens under any causal language model: one row a document, right-padded, memory-bounded.

Padding stands on the right, where a causal model cannot see it, and one row never holds two documents, so nothing
leaks between documents and a row's numbers do not depend on its batch-mates beyond float noise.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shrew.errors import UnsupportedError
from shrew.folder import Loaded

WINDOW = 1024  # tokens of context at most
TOKENS = 2**13  # tokens in one forward pass
LOGITS = 2**26  # logits that one forward pass may give (256 MiB in float32)
ROWS = 2**18  # logits that are normalised at once: few enough for a processor's cache


@dataclass(frozen=True)
class Span:
    """Tokens `start:end` of row `row`, fed in one pass, of which `score:end` are scored (each given all before it)."""

    row: int
    start: int
    score: int
    end: int


def context_length(model: Any, limit: int = WINDOW) -> int:
    """How many tokens the model may see at once: its own limit, at most `limit`."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([limit, *(int(value) for value in known if isinstance(value, int) and value > 1)])


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def first_token(tokenizer: Any) -> int | None:
    """What stands before a document: the begin token, else the end token (which separates documents), else none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return rows


def check_causal(loaded: Loaded, task: str) -> None:
    if loaded.is_classifier:
        raise UnsupportedError(
            f"{loaded.path}: a classifier gives no text likelihood, so it cannot do {task}; "
            "use a causal language model, or a labels task."
        )


def spans(rows: Sequence[Sequence[int]], window: int, stride: int, most: int) -> list[Span]:
    """Cut rows (whose first token is context only) so that every other token is scored exactly once.

    The first block scores the first `window` tokens; each later one advances by `stride`, so a scored token has at
    least `window - stride` tokens before it, or all there are. No pass scores more than `most` tokens: a block that
    has more is given in several passes with the same beginning, which saves memory and changes no token's context.
    """
    found = []
    for number, row in enumerate(rows):
        score, goal = 1, min(len(row), window)
        while score < len(row):
            start = max(0, goal - window)
            for low in range(score, goal, most):
                found.append(Span(number, start, low, min(goal, low + most)))
            score, goal = goal, min(len(row), goal + stride)
    return found


def batches(items: Sequence[Span], vocab: int) -> Iterator[list[Span]]:
    """Spans of like length together, as many as the memory for activations and logits allows."""
    most = max(1, min(TOKENS, LOGITS // vocab))
    batch: list[Span] = []
    for item in sorted(items, key=lambda item: (item.end - item.start, item.row, item.score)):
        if batch and (len(batch) + 1) * (item.end - item.start) > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def logits(model: Any, rows: Sequence[Sequence[int]], batch: Sequence[Span]) -> list[torch.Tensor]:
    """For each span the logits [end - score, V] that predict its scored tokens, float32."""
    width = max(item.end - item.start for item in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for place, item in enumerate(batch):
        ids[place, : item.end - item.start] = torch.tensor(rows[item.row][item.start : item.end])
        mask[place, : item.end - item.start] = 1
    first = min(item.score - item.start for item in batch) - 1  # the earliest position whose logits are needed
    extra = {"logits_to_keep": width - first} if _keeps(type(model)) and first else {}
    with torch.inference_mode():
        device = next(model.parameters()).device
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **extra).logits
    shift = first if extra else 0
    return [
        out[place, item.score - item.start - 1 - shift : item.end - item.start - 1 - shift].float().cpu()
        for place, item in enumerate(batch)
    ]


def _keeps(kind: type) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]


def pieces(found: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of [n, V] logits, small enough to normalise at once."""
    step = max(1, ROWS // found.shape[1])
    for low in range(0, found.shape[0], step):
        yield slice(low, low + step)


def log_probs(found: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """[n, V] logits and [n] token ids -> [n] natural-log probabilities, float64."""
    parts = []
    for part in pieces(found):
        chosen = found[part].gather(1, targets[part, None])[:, 0]
        parts.append((chosen.double() - found[part].double().logsumexp(1)).numpy())
    return np.concatenate(parts)


def token_log_probs(model: Any, rows: Sequence[Sequence[int]], scored: Sequence[int], window: int) -> list[np.ndarray]:
    """Log-probabilities (nats) of the last `scored[i]` tokens of each row, which must fit in `window` with context.

    Rows longer than the window lose their beginning.
    """
    cut = [row[-window:] for row in rows]
    items = [
        Span(number, 0, max(1, len(row) - count), len(row))
        for number, (row, count) in enumerate(zip(cut, scored, strict=True))
    ]
    result: list[np.ndarray] = [np.zeros(0)] * len(cut)
    for batch in batches(items, vocabulary(model)):
        for item, found in zip(batch, logits(model, cut, batch), strict=True):
            result[item.row] = log_probs(found, torch.tensor(cut[item.row][item.score : item.end]))
    return result


def continuations(loaded: Loaded, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """[(prompt, continuation)] -> [n] log-probability (nats) of the whole continuation given the prompt.

    The two are tokenized apart, so that the same prompt has the same tokens before every option. A prompt too long
    for the context loses its beginning, never the continuation. Equal pairs are scored once.
    """
    places: dict[tuple[str, str], int] = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
    heads = token_ids(loaded.tokenizer, [prompt for prompt, _ in places])
    tails = token_ids(loaded.tokenizer, [tail for _, tail in places])
    start = first_token(loaded.tokenizer)
    begin = [] if start is None else [start]
    rows = [begin + head + tail for head, tail in zip(heads, tails, strict=True)]
    window = context_length(loaded.model)
    found = token_log_probs(loaded.model, rows, [len(tail) for tail in tails], window)
    sums = np.array([float(item.sum()) for item in found])
    return sums[[places[pair] for pair in pairs]]
