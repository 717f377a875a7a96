"""Losses as functions of logits. N positions, V vocabulary entries, K stored teacher entries."""

from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # a target that counts for nothing


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of -log p(target) in nats; logits [..., V], targets [...] with IGNORE where none."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")


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
