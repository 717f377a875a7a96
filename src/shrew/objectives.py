"""Losses as functions of logits. N positions, V vocabulary entries, K stored teacher entries."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that counts for nothing
LOWEST = -30.0  # log-probability of what cannot be
IN_CACHE = 2**18  # logits that a processor's cache holds
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


@dataclass(frozen=True)
class Emphasis:
    """What `detection` adds to the classification: a margin between the members of a pair, and the weights of losses.
    """

    margin: float = 1.0
    pairs: float = 1.0
    lines: float = 0.5
    families: float = 0.2


def margin(before: Tensor, after: Tensor, gap: float) -> Tensor:
    """Sum of how far each `before` [N] falls short of standing `gap` above its `after` [N]."""
    return F.relu(gap - (before - after)).sum()


def line_means(scores: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the tokens of each line: scores [B, T] and the line [B, T] of each token, -1 where none ->
    [B, T] by line, and which lines there are."""
    place, there = lines.clamp(min=0), (lines >= 0).to(scores.dtype)
    total = torch.zeros_like(scores).scatter_add(1, place, scores * there)
    count = torch.zeros_like(scores).scatter_add(1, place, there)
    return total / count.clamp(min=1), count > 0


def line_loss(scores: Tensor, lines: Tensor, hits: Tensor) -> Tensor:
    """Sum over rows of the binary cross-entropy of their lines' scores in nats, half of it from the lines that a fix
    changes and half from the others, whatever their numbers; `hits` [B, T] is 1 at the tokens of the former."""
    means, there = line_means(scores.float(), lines)
    wrong = line_means(hits.to(means.dtype), lines)[0] > 0
    each = F.binary_cross_entropy_with_logits(means, wrong.to(means.dtype), reduction="none")
    halves = [(each * part).sum(1) / part.sum(1).clamp(min=1) for part in (wrong & there, ~wrong & there)]
    return 0.5 * torch.stack(halves).sum()


def detection(
    logits: Tensor, scores: Tensor, families: Tensor, labels: Tensor, lines: Tensor, hits: Tensor, family: Tensor,
    weights: Tensor, emphasis: Emphasis,
) -> Tensor:  # fmt: skip
    """The loss of a detector in nats, summed over rows that come in twos: a vulnerable function (label 1) and its fixed
    twin, or two others. `logits` [B] are those of being vulnerable, `scores` [B, T] those of tokens, `families` [B, K];
    `family` [B] is IGNORE where there is none. Each row's cross-entropy has its weight of `weights` [B]."""
    logits = logits.float()
    found = (weights * F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")).sum()
    pairs = labels[0::2] == 1
    found = found + emphasis.pairs * margin(logits[0::2][pairs], logits[1::2][pairs], emphasis.margin)
    found = found + emphasis.lines * line_loss(scores, lines, hits)
    known = F.cross_entropy(families.float(), family, ignore_index=IGNORE, reduction="sum")
    return found + emphasis.families * known


def divergence(
    student: Tensor, teacher: Tensor, loss: str = "forward", alpha: float = 0.1, weights: Tensor | None = None
) -> Tensor:
    """Sum over positions of how far the student's q is from the teacher's p, in nats; both are log-probabilities
    [..., M] of the same M outcomes. `weights` [...]: what each position counts, 1 where there are none.

    forward: KL(p || q), reverse: KL(q || p); skewed-forward: KL(p || alpha p + (1 - alpha) q), skewed-reverse:
    KL(q || alpha q + (1 - alpha) p), which stay finite where the right side has nothing (DistiLLM, Ko et al. 2024,
    arXiv:2402.03898). An outcome that neither has is LOWEST in both.
    """
    backward = loss.endswith("reverse")
    left, right = (student, teacher) if backward else (teacher, student)
    if loss.startswith("skewed"):
        right = torch.logaddexp(left + math.log(alpha), right + math.log1p(-alpha))
    terms = left.exp() * (left - right)
    return terms.sum() if weights is None else terms.sum(-1) @ weights


def lumped(logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities [N, K + 1] of some tokens and, last, of all others together as one outcome.

    logits [N, V], ids [N, K]; one that is not `kept` [N, K] repeats another and is no outcome. Between two models,
    lumping gives a lower bound of the divergence that is zero only if the kept part agrees exactly.
    """
    found: Tensor = _Lumped.apply(logits.float(), ids, kept)
    return found


class _Lumped(torch.autograd.Function):
    """Through the vocabulary once forward and once backward, where the terms one by one would go a dozen times."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
        rest = torch.empty_like(logits)  # probabilities, 0 where they are kept
        logs, other = logits.new_empty(ids.shape), logits.new_empty(len(ids), 1)
        step = max(1, IN_CACHE // logits.shape[-1])
        for low in range(0, len(logits), step):
            rows, which = slice(low, low + step), ids[low : low + step]
            most = logits[rows].amax(-1, keepdim=True)
            part = torch.sub(logits[rows], most, out=rest[rows]).exp_()
            total = part.sum(-1, keepdim=True)
            logs[rows] = logits[rows].gather(-1, which) - most - total.log()
            other[rows] = part.div_(total).scatter_(-1, which, 0.0).sum(-1, keepdim=True)
        whole = other + kept.sum(-1, keepdim=True) * math.exp(LOWEST)  # never nothing, as its logarithm follows
        ctx.save_for_backward(rest, logs.exp(), other, whole, ids, kept)
        return torch.cat([logs.masked_fill_(~kept, LOWEST), whole.log()], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rest, some, other, whole, ids, kept = ctx.saved_tensors
        own, last = grads[0][:, :-1].masked_fill(~kept, 0.0), grads[0][:, -1:] / whole
        shared = -own.sum(-1, keepdim=True) - last * other
        found = rest * (shared + last)
        return found.scatter_add_(-1, ids, (own + some * shared).masked_fill_(~kept, 0.0)), None, None


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum over positions of the mean over heads of KL(teacher || student) between attention maps in nats (MiniLM, Wang
    et al. 2020, arXiv:2002.10957). Probabilities [B, H, T, T], queries before keys; `mask` [B, T] is 0 at padding.
    Where the numbers of heads differ, their means are compared."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    log_q, log_p = student.float().clamp_min(1e-12).log(), teacher.float().clamp_min(1e-12).log()
    each = (teacher.float() * (log_p - log_q)).sum(-1).mean(1)
    return each[mask.bool()].sum()


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of 1 - cos between hidden states [N, d] of equal width."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum()
