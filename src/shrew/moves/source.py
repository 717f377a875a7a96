"""What moves are applied to and with: a model, its task and texts, all disjoint, from a few plain settings."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from shrew import data, files, folder, machine
from shrew.data import python
from shrew.errors import DataError, FolderError, UsageError
from shrew.folder import Loaded
from shrew.moves.anatomy import logits
from shrew.moves.context import Context
from shrew.moves.trim_vocab import with_rows
from shrew.spec import Meta, Seed, digest, doc
from shrew.tasks import Task, read, read_text_task
from shrew.tasks.fairness import Fairness
from shrew.tasks.labels import Labels, label_ids


@dataclass(frozen=True, kw_only=True)
class Source:
    """The `[source]` table of a recipe: which model, which texts, how much of them."""

    model: str = doc("model folder or hub name; 'starter' is the one that ships")
    task: str = doc("task file (JSONL); default: the text, or the starter's own", "")
    text: list[str] = doc("text to calibrate and heal on: files, folders, globs", default_factory=list)
    window: Annotated[int, Meta(ge=16)] = doc("tokens in a calibration or healing window", 512)
    calibration: Annotated[int, Meta(ge=1)] = doc("calibration tokens, at most", 16384)
    healing: Annotated[int, Meta(ge=1)] = doc("healing tokens, at most", 1_000_000)
    seed: Seed = doc("seed of healing and resampling", 0)
    threads: Annotated[int, Meta(ge=0, le=machine.MOST_THREADS)] = doc("CPU threads; 0: probed once", 0)


def open_task(source: Source, original: Loaded) -> Task:
    """The task of a source: its file, or held-out bits per byte of its text, or of Python for a model trained on it."""
    if source.task:
        task = read(source.task)
        if isinstance(task, Fairness):
            raise UsageError(f"{source.task} holds pairs, which show bias and no quality; give another --task, and "
                             "the pairs to `shrew measure --task` or `shrew shrink --fairness`.")  # fmt: skip
        return task
    if source.text:
        return read_text_task(source.text)
    if knows_python(original):
        return read("python")
    raise UsageError("nothing to measure quality on; give --task FILE.jsonl or --text FILE.")


def knows_python(original: Loaded) -> bool:
    """Whether a model was trained on the machine's Python source, so that its evaluation modules can measure it."""
    return "python:train" in original.lineage.get("recipe", {}).get("train", {}).get("data", [])


def context_of(source: Source, original: Loaded, task: Task, say: Callable[[str], None]) -> Context:
    """Calibration and healing windows, disjoint from what the task measures on, with the original as the teacher."""
    labels = None
    if source.task and source.text and not original.is_classifier:
        # The task says what quality is; the text is there to calibrate and heal on. Documents that share a run of
        # words with what the task measures on are left out of it.
        measured = {text for split in ("search", "final") for text in task.texts(original, split)}
        runs = python.Runs(iter(measured))
        found = [item for item in data.documents(source.text) if item.text not in measured and item.text not in runs]
        if not found:
            raise DataError("every document of --text is also in the task; give text that it does not measure on.")
        parts = data.split_documents(found, {"calibration": 0.2, "healing": 0.8}, "source")
        texts = {name: [item.text for item in part] for name, part in parts.items()}
    else:
        texts = {name: task.texts(original, name) for name in ("calibration", "healing")}
        if isinstance(task, Labels) and original.is_classifier:
            known = label_ids(original, task.labels)
            labels = np.array([known[item.label] for item in task.examples("healing")])
    calibration = windows(original, texts["calibration"], source.window, source.calibration)
    healing = windows(original, texts["healing"], source.window, source.healing)
    if not calibration:
        raise DataError("the calibration text is shorter than two tokens; give more text.")
    _check_numbers(original, calibration[0])
    labels = labels[: len(healing)] if labels is not None else None
    return Context(calibration, healing, original, source.seed, files.cache_folder(), say, labels)


def _check_numbers(original: Loaded, window: np.ndarray) -> None:
    """Weights may be numbers and what the model makes of a text none: nothing can then be chosen by it."""
    with torch.no_grad():
        if not logits(original, torch.from_numpy(window)[None]).isfinite().all():
            name = original.path or "the model"
            raise FolderError(f"{name} answers text with what is no number (infinite or NaN), so some of its weights "
                              "are far too large; is the file damaged?")  # fmt: skip


def suited(context: Context, loaded: Loaded, source: Source) -> Context:
    """The context for a model that has lost tokens: the same texts in the tokens that it has, and the teacher without
    the others. For one that reads bytes by now it is the same texts in bytes, and the teacher as it was. For any other
    model it is the context itself."""
    teacher = context.teacher
    if teacher is None or loaded.tokenizer is None:
        return context
    if data.reads_bytes(loaded.tokenizer) and not data.reads_bytes(teacher.tokenizer):
        if not context.calibration and not context.healing:
            return context
        made = context_of(source, loaded, open_task(source, teacher), context.say)
        return replace(made, teacher=teacher, cache=context.cache)
    known, left = teacher.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
    rows, fewer = (item.model.get_input_embeddings().weight.shape[0] for item in (teacher, loaded))
    if (known == left and rows == fewer) or not known.keys() >= left.keys():
        return context
    kept = [known[token] for token, _ in sorted(left.items(), key=lambda item: item[1])]
    smaller = with_rows(teacher, kept, loaded.tokenizer)
    if not context.calibration and not context.healing:
        return replace(context, teacher=smaller)
    made = context_of(source, smaller, open_task(source, teacher), context.say)
    return replace(made, cache=context.cache)


def windows(loaded: Loaded, texts: list[str], length: int, limit: int) -> list[np.ndarray]:
    """Token ids in windows of at most `length`, about `limit` tokens in all: one window a text for classifiers, the
    pieces of each document for others."""
    length = min(length, getattr(loaded.model.config, "max_position_embeddings", None) or length)
    found: list[np.ndarray] = []
    total = 0
    for low in range(0, len(texts), 64):
        batch = texts[low : low + 64]
        if loaded.is_classifier:
            rows = loaded.tokenizer(batch, truncation=True, max_length=length)["input_ids"]
        else:
            rows = data.encode(loaded.tokenizer, batch)
        for row in rows:
            for start in range(0, len(row), length):
                piece = np.array(row[start : start + length], dtype=np.int64)
                if loaded.is_classifier or len(piece) > 1:  # one token alone predicts nothing
                    found.append(piece)
                    total += len(piece)
                if total >= limit:
                    return found
    return found


def fingerprint(source: Source, original: Path, context: Context) -> dict[str, Any]:
    """What a move's result depends on besides the move: hashes of the original, of what it hands on and of the texts,
    and the settings."""
    return {
        "original": folder.identity(original),
        "companions": folder.companions(original),
        "calibration": hash_windows(context.calibration),
        "healing": hash_windows(context.healing),
        "labels": digest(None if context.labels is None else context.labels.tolist()),
        "seed": source.seed,
        "threads": source.threads,
    }


def hash_windows(rows: list[np.ndarray]) -> str:
    """SHA-256 of token windows, their lengths included."""
    mark = hashlib.sha256()
    for row in rows:
        mark.update(len(row).to_bytes(8, "little"))
        mark.update(np.ascontiguousarray(row, dtype=np.int64).tobytes())
    return mark.hexdigest()
