"""What a teacher was worth: the taught model beside a twin that learnt from the text alone, on text new to both."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from shrew import objectives
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.tasks.scores import weights

SAMPLES, LEVEL = 2000, 0.95


def held_out(context: Context) -> tuple[Context, Context]:
    """The context without the last tenth of its healing windows, and with nothing but them. They stand in the order of
    their documents, so that at most one document has parts in both."""
    count = len(context.healing)
    cut = count - max(count // 10, 2)
    if cut < 1:
        raise UnsupportedError(f"distil: a twin needs at least 3 windows of healing text and there are {count}; give a "
                               "longer text, or a shorter window in [source].")  # fmt: skip
    parts = []
    for some in (slice(cut), slice(cut, count)):
        labels = None if context.labels is None else context.labels[some]
        parts.append(replace(context, healing=context.healing[some], labels=labels))
    return parts[0], parts[1]


@torch.no_grad()
def losses(loaded: Loaded, held: Context) -> np.ndarray:
    """[windows, 2]: summed loss in nats, and the number of tokens (of a classifier: texts) that it is about."""
    found = []
    for number, window in enumerate(held.healing):
        ids = torch.from_numpy(window)[None]
        logits = loaded.model(input_ids=ids).logits
        if not loaded.is_classifier:
            found.append([float(objectives.next_token(logits[:, :-1], ids[:, 1:])), len(window) - 1])
        elif held.labels is not None:
            found.append([float(objectives.classify(logits, torch.from_numpy(held.labels[number : number + 1]))), 1])
        else:
            raise UnsupportedError("distil: the twin of a classifier needs labelled healing text.")
    return np.array(found)


def compare(taught: Loaded, alone: Loaded, held: Context, seed: int) -> dict[str, Any]:
    """Both mean losses in nats and their difference (below zero: the teacher helped) with its 95 % interval from joint
    resamples of the windows."""
    one, two = losses(taught, held), losses(alone, held)
    drawn = [(rows @ (one - two)[:, 0]) / (rows @ one[:, 1]) for rows in weights(len(one), SAMPLES, seed)]
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean, other = (float(part[:, 0].sum() / part[:, 1].sum()) for part in (one, two))
    return {"loss": mean, "twin_loss": other, "difference": mean - other, "low": float(low), "high": float(high),
            "windows": len(one)}  # fmt: skip


def sentence(found: dict[str, Any]) -> str:
    """What a comparison says, in one line."""
    one = f"{found['loss']:.4f} nats a token ({found['cpu_seconds']:.0f} CPU-s)"
    two = f"{found['twin_loss']:.4f} ({found['twin_cpu_seconds']:.0f} CPU-s, {found['twin_steps']} steps)"
    gap = f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}] on {found['windows']} windows"
    return f"With the teacher {one}, its twin without {two}: difference {gap}."
