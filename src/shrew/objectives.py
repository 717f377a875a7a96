"""Losses as functions of logits. N positions, V vocabulary entries, K stored teacher entries."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that counts for nothing
AT_ONCE = 2**25  # logits held at once by a loss in chunks, unless told otherwise: 128 MiB of float32


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log p(target) in nats; logits [..., V], targets [...] with IGNORE where none."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked_next_token(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, chunk: int) -> Tensor:
    """`next_token(head(hidden), targets)` without ever holding the logits of more than `chunk` positions.

    hidden [..., d], targets [...]; `head` gives the logits of some positions. The logits of a chunk are computed again
    in the backward pass, so a head costs four thirds, and memory does not grow with the number of positions.
    """
    if targets.numel() <= chunk:
        return next_token(head(hidden), targets)

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return next_token(head(some), wanted)

    found = [
        checkpoint(part, some, wanted, use_reentrant=False, preserve_rng_state=False)
        for some, wanted in zip(hidden.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    ]
    return torch.stack(found).sum()


def classify(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) in nats; logits [N, classes], labels [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student) in nats; both are logits [..., V] (Hinton et al. 2015)."""
    wanted = teacher.float().log_softmax(-1)
    return F.kl_div(student.float().log_softmax(-1), wanted, log_target=True, reduction="sum")


def top_k_kl(student: Tensor, logs: Tensor, ids: Tensor) -> Tensor:
    """KL to a teacher known by its K likeliest tokens and the mass of the rest, as one further outcome.

    student: logits [N, V]; logs: teacher log-probabilities [N, K]; ids: their tokens [N, K]. Sum in nats. Lumping the
    rest into one outcome gives a lower bound of the full KL that is zero only if the kept part agrees exactly.
    """
    log_q = student.float().log_softmax(-1)
    kept_q = log_q.gather(-1, ids)
    kept_p = logs.exp()
    rest_p = (1 - kept_p.sum(-1)).clamp_min(1e-6)
    rest_q = (1 - kept_q.exp().sum(-1)).clamp_min(1e-6)
    return (kept_p * (logs - kept_q)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of 1 - cos between hidden states [N, d] of equal width."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()
