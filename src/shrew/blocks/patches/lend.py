"""A trained model of bytes, lent to a model of patches that is about to be trained: it is stored with it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from shrew.blocks.model import ModelSpec, ShrewForCausalLM
from shrew.blocks.patches.boundaries import fit_threshold
from shrew.blocks.patches.entropy import END, entropies, read
from shrew.errors import SpecError

PIECES, LONGEST = 256, 1024  # of text that a threshold is fitted to, and bytes of each


def asked(spec: ModelSpec, source: str, texts: Sequence[str]) -> tuple[ModelSpec, ShrewForCausalLM | None]:
    """The spec with the model of the folder `source` in it, and that model; where the front says a mean, its threshold
    is the one that cuts pieces of `texts`, at even steps through all of them, into patches of that mean."""
    front = spec.patches
    if front is None or front.rule.kind != "entropy":
        if source:
            raise SpecError('entropy: no patches are cut by it; write rule = { kind = "entropy" } in [model.front].')
        return spec, None
    if not source:
        raise SpecError('front: its patches are cut by entropies; name the folder of a trained model of bytes with '
                        'entropy = "..." in [train].')  # fmt: skip
    model = read(Path(source))
    rule = front.rule
    if front.mean:
        some = [list(piece) for piece in _pieces(texts)]
        lengths = torch.tensor([len(text) + 1 for text in some])
        bytes = torch.full((len(some), int(lengths.max())), END)
        for row, text in enumerate(some):
            bytes[row, 1 : len(text) + 1] = torch.tensor(text)
        rule = fit_threshold(bytes, lengths, rule, entropies(model, bytes, lengths, rule.reset), front.mean)
    lent = replace(model.spec, vocabulary=None) if model.spec.vocabulary == spec.vocabulary else model.spec
    return replace(spec, front=replace(front, rule=rule, entropy=lent)), model


def _pieces(texts: Sequence[str]) -> list[bytes]:
    """From all parts, since a book does not go on as it begins."""
    starts = [0, *accumulate(map(len, texts))]
    found = []
    for at in range(0, starts[-1], max(starts[-1] // PIECES, LONGEST)):
        number = bisect_right(starts, at) - 1
        begin = at - starts[number]
        found.append(texts[number][begin : begin + LONGEST].encode()[: LONGEST - 1])
    return found or [b""]


def lend(model: ShrewForCausalLM, oracle: ShrewForCausalLM) -> None:
    """Copy the weights of the model of bytes into the one of patches."""
    held: Any = model.model.entropy
    weights = oracle.state_dict()
    held.load_state_dict({name: weights[name] for name in held.state_dict()})
