"""The teacher's predictions on disk: computed once for each window of text, shared by all runs that ask the same.

Of each position of a causal model the cache holds its likeliest tokens, as many as it takes to reach a mass, and the
mass of the rest. A log-probability l is one byte, round(255 sqrt(-l / REACH)): within sqrt(REACH x -l) / 255 of the
truth (0.014 nats at l = -1, 0.047 at the end of its reach), and finest where the mass is; less likely tokens belong
to the rest. What is read back is made to sum to one. A classifier's logits are stored as they are.

A cache is a folder for each question (a teacher and settings) with a file for each SHARD of windows, so a run that
was interrupted goes on from there. A window is asked alone, so that its answer does not depend on its batch.
"""

import hashlib
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from shrew import files, objectives
from shrew.errors import ShrewError
from shrew.folder import Loaded
from shrew.moves.anatomy import fingerprint, logits
from shrew.moves.context import Context
from shrew.moves.distil.plan import Plan

REACH = 12.0  # nats below certainty that a stored log-probability goes
SHARD = 32  # windows in a file: what an interruption costs at most


@dataclass(frozen=True)
class Question:
    """What is asked of a teacher. `width`: the first so many entries of its vocabulary count; 0: all."""

    top_k: int
    mass: float
    temperature: float
    width: int = 0


@dataclass(frozen=True)
class Answer:
    """What is stored of one window of n positions, the last one left out: `counts` [n] of tokens kept, their `logs`
    and `ids` [sum of counts], likeliest first, and `rest` [n], all as in the file; or `logits` of a classifier."""

    counts: np.ndarray
    logs: np.ndarray
    ids: np.ndarray
    rest: np.ndarray
    logits: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Stored:
    """Teacher predictions by the number of the window."""

    answers: dict[int, Answer]

    def top(self, picked: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities [N, K + 1], ids [N, K], kept [N, K]) of the positions of these windows, in batch order;
        the last log-probability is that of all other tokens. Where fewer than K are stored, the last id comes again
        with LOWEST, and is not `kept`."""
        found = [self.answers[index] for index in picked]
        counts = np.concatenate([item.counts for item in found]).astype(np.int64)
        codes, ids, rest = (np.concatenate([getattr(item, part) for item in found]) for part in ("logs", "ids", "rest"))
        starts = np.cumsum(counts) - counts
        column = np.arange(counts.max())
        place = starts[:, None] + np.minimum(column, counts[:, None] - 1)
        kept = column < counts[:, None]
        every = np.concatenate([np.where(kept, decoded(codes)[place], objectives.LOWEST), decoded(rest)[:, None]], 1)
        logs = torch.from_numpy(every).float().log_softmax(-1)
        return logs, torch.from_numpy(ids[place].astype(np.int64)), torch.from_numpy(kept)

    def logits(self, picked: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.answers[index].logits for index in picked]))

    @property
    def seconds(self) -> float:
        """CPU-seconds that the teacher took when it was asked."""
        return sum(item.seconds for item in self.answers.values())


def encoded(logs: Tensor) -> np.ndarray:
    """Log-probabilities as bytes."""
    codes: np.ndarray = (255 * (logs.clamp(-REACH, 0) / -REACH).sqrt()).round().byte().numpy()
    return codes


def decoded(codes: np.ndarray) -> np.ndarray:
    """The inverse of `encoded`, as far as there is one."""
    found: np.ndarray = -REACH * np.square(codes / 255.0)
    return found


def teacher_predictions(teacher: Loaded, plan: Plan, question: Question, context: Context) -> Stored:
    """What the teacher says on every window that the plan takes as text. Raises ShrewError when the disk is too small
    for what is still to be asked."""
    used = plan.used()
    key = fingerprint(teacher.model, [], "teacher", question)
    place = Path(context.cache) / "teacher" / key[:24]
    marks = {index: hashlib.sha256(plan.windows[index].astype("<i8").tobytes()).digest()[:16] for index in used}
    known = _read(place, set(marks.values()))
    missing = list({mark: index for index, mark in marks.items() if mark not in known}.values())
    if missing:
        _say_size(teacher, [plan.windows[index] for index in missing], question, place, context)
    shards = [missing[low : low + SHARD] for low in range(0, len(missing), SHARD)]
    # Another process that asks the same at the same time goes another way, and what one has written both read.
    random.Random(os.getpid()).shuffle(shards)
    for number, some in enumerate(shards, 1):
        own = [marks[index] for index in some]
        if not (place / _file(own)).exists():
            _write(place, own, [_ask(teacher, plan.windows[index], question) for index in some])
        if len(shards) > 1:
            context.say(f"teacher: {number}/{len(shards)} parts")
    known |= _read(place, set(marks.values())) if shards else {}
    return Stored({index: known[mark] for index, mark in marks.items()})


def _say_size(
    teacher: Loaded, windows: list[np.ndarray], question: Question, place: Path, context: Context
) -> None:
    """Say what will be written at most, or that there is no room for it."""
    vocabulary = teacher.model.config.get_text_config().vocab_size
    each = min(question.top_k, vocabulary) * (1 + _id_type(vocabulary)().itemsize) + 3
    most = len(windows) * (teacher.model.config.num_labels * 4 if teacher.is_classifier else 0)
    most += 0 if teacher.is_classifier else each * sum(len(window) - 1 for window in windows)
    size = f"{most / 1e6:,.1f} MB"
    context.say(f"Storing the teacher's predictions on {len(windows)} windows: at most {size} in {place}.")
    home = next(folder for folder in [place, *place.parents] if folder.is_dir())
    if most > shutil.disk_usage(home).free:
        raise ShrewError(f"the teacher's predictions may take {size} and {home} has less room; make some, lower top_k "
                         "or give less healing text.")  # fmt: skip


def _id_type(vocabulary: int) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if vocabulary <= 2**16 else np.int32


@torch.no_grad()
def _ask(teacher: Loaded, window: np.ndarray, question: Question) -> Answer:
    begun = time.process_time()
    found = logits(teacher, torch.from_numpy(window)[None])[0].float()
    none = np.zeros(0, np.uint8)
    if teacher.is_classifier:
        return Answer(none, none, none, none, found.numpy(), time.process_time() - begun)
    vocabulary = found.shape[-1]
    every = (found[:-1, : question.width or vocabulary] / question.temperature).log_softmax(-1)
    best = every.topk(min(question.top_k, every.shape[-1]))
    before = best.values.exp().cumsum(-1) - best.values.exp()
    kept = (before < question.mass) & (best.values >= -REACH)
    kept[:, 0] = True
    out = every.scatter(-1, best.indices, best.values.masked_fill(kept, -torch.inf)).logsumexp(-1)
    ids = best.indices[kept].numpy().astype(_id_type(vocabulary))
    counts = kept.sum(-1).numpy().astype(np.uint16)
    return Answer(counts, encoded(best.values[kept]), ids, encoded(out), none, time.process_time() - begun)


def _write(place: Path, marks: list[bytes], answers: list[Answer]) -> None:
    """One file of a cache; it is named after its windows, so two runs that write the same write the same file."""
    parts = {part: np.concatenate([getattr(item, part).reshape(-1) for item in answers])
             for part in ("counts", "logs", "ids", "rest", "logits")}  # fmt: skip
    sizes = [[len(item.counts), len(item.logs), item.logits.size] for item in answers]
    parts |= {"sizes": np.array(sizes, np.int64), "seconds": np.array([item.seconds for item in answers]),
              "marks": np.frombuffer(b"".join(marks), np.uint8).reshape(-1, 16)}  # fmt: skip
    files.write_bytes(place / _file(marks), save(parts))


def _file(marks: list[bytes]) -> str:
    return f"{hashlib.sha256(b''.join(marks)).hexdigest()[:24]}.safetensors"


def _read(place: Path, wanted: set[bytes]) -> dict[bytes, Answer]:
    """The answers of a cache to these windows, as far as it has them."""
    known: dict[bytes, Answer] = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            marks = [bytes(row) for row in shard.get_tensor("marks")]
        if not wanted.isdisjoint(marks):
            parts = load_file(file)
            ends = parts["sizes"].cumsum(0)
            for mark, low, high, seconds in zip(marks, ends - parts["sizes"], ends, parts["seconds"], strict=True):
                if mark in wanted:
                    each, flat, whole = (slice(*pair) for pair in zip(low, high, strict=True))
                    known[mark] = Answer(parts["counts"][each], parts["logs"][flat], parts["ids"][flat],
                                         parts["rest"][each], parts["logits"][whole], float(seconds))  # fmt: skip
    return known
