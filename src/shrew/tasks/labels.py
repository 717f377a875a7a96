"""Labelled texts: which label a model gives each text, scored by macro-F1 (and accuracy).

A sequence-classification folder answers with its head. A causal model answers with the label whose text is likeliest
after the prompt "TEXT\\nLabel:", as " LABEL", log-probability divided by the label's UTF-8 bytes.
Chance is the better of two predictors that never read the text: always the commonest label, and a uniformly random one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from shrew.errors import DataError
from shrew.folder import Loaded
from shrew.tasks import likelihood
from shrew.tasks.scores import Scores
from shrew.tasks.split import SplitTask


@dataclass(frozen=True)
class Labelled:
    id: str
    text: str
    label: str | int


@dataclass(frozen=True, kw_only=True)
class Labels(SplitTask):
    """Texts with one label each. `labels` holds every label that the whole file uses, in order."""

    kind: ClassVar[str] = "labels"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "macro_f1"
    splits: dict[str, list[Labelled]]
    labels: tuple[str | int, ...]

    def texts(self, loaded: Loaded, split: str) -> list[str]:
        """What the model reads: the bare text for a classifier, the prompt with its label for a causal model."""
        items = self.examples(split)
        return [item.text if loaded.is_classifier else prompt(item.text) + f" {item.label}" for item in items]

    def shown(self, example: Labelled) -> tuple[str, str]:
        return example.text, str(example.label)

    def score(self, loaded: Loaded, split: str, reference: Loaded | None = None) -> Scores:
        """Columns: "truth" and "guess" (numbers in `classes`), "correct"."""
        items: Sequence[Labelled] = self.examples(split)
        if loaded.is_classifier:
            known = label_ids(loaded, self.labels)
            classes = class_names(loaded)
            truth = np.array([known[item.label] for item in items])
            guess = classifier_logits(loaded, [item.text for item in items]).argmax(1)
        else:
            classes = tuple(str(label) for label in self.labels)
            place = {label: number for number, label in enumerate(self.labels)}
            truth = np.array([place[item.label] for item in items])
            guess = self._likeliest(loaded, items, classes)
        columns = {"truth": truth, "guess": guess, "correct": (truth == guess).astype(np.float64)}
        ids = [item.id for item in items]
        chance = chance_f1(truth, len(self.labels))
        answers = tuple(classes[number] for number in guess)
        return Scores(self.label, split, self.metric, ids, columns, chance, classes, answers)

    def _likeliest(self, loaded: Loaded, items: Sequence[Labelled], classes: Sequence[str]) -> np.ndarray:
        pairs = [(prompt(item.text), f" {name}") for item in items for name in classes]
        found = likelihood.continuations(loaded, pairs).reshape(len(items), len(classes))
        size = np.array([len(f" {name}".encode()) for name in classes])
        guess: np.ndarray = (found / size).argmax(1)
        return guess


def prompt(text: str) -> str:
    return f"{text}\nLabel:"


def class_names(loaded: Loaded) -> tuple[str, ...]:
    """Names of the head's outputs, in order."""
    names = loaded.model.config.id2label
    return tuple(str(names[number]) for number in range(loaded.model.config.num_labels))


def label_ids(loaded: Loaded, labels: Sequence[str | int]) -> dict[str | int, int]:
    """The output number of each label: by name, or a number that is one already. Unknown ones are refused."""
    names = class_names(loaded)
    by_name = {name: number for number, name in enumerate(names)}
    found: dict[str | int, int] = {}
    for label in labels:
        if str(label) in by_name:
            found[label] = by_name[str(label)]
        elif isinstance(label, int) and 0 <= label < len(names):
            found[label] = label
        else:
            shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            raise DataError(
                f"label '{label}' of the task is none that {loaded.path or 'the model'} has an output for; "
                f"it knows: {shown}."
            )
    return found


def chance_f1(truth: np.ndarray, classes: int) -> float:
    """Macro-F1 of the better of "always the commonest label" and "any of `classes` labels at random"."""
    share = np.bincount(truth) / len(truth)
    share = share[share > 0]
    commonest = 2 * share.max() / (1 + share.max()) / len(share)
    uniform = float((2 * share / (classes * share + 1)).sum()) / classes
    return float(max(commonest, uniform))


def classifier_logits(loaded: Loaded, texts: Sequence[str]) -> np.ndarray:
    """[n] texts -> [n, K] logits; texts longer than the model's context lose their end."""
    tokenizer, model = loaded.tokenizer, loaded.model
    limit = min(likelihood.context_length(model, likelihood.TOKENS), tokenizer.model_max_length)
    return row_logits(loaded, tokenizer(list(texts), truncation=True, max_length=limit, verbose=False)["input_ids"])


def row_logits(loaded: Loaded, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] rows of token ids -> [n, K] logits."""
    model = loaded.model
    pad = model.config.get_text_config().pad_token_id
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    result = np.zeros((len(rows), model.config.num_labels))
    while order:
        # Without a padding token a causal classifier cannot tell where a row ends: then only equal lengths share a
        # batch, and such models take one row at a time.
        size = 1 if pad is None else max(1, likelihood.TOKENS // len(rows[order[-1]]))
        places, order = order[-size:], order[: len(order) - size]
        width = len(rows[places[-1]])
        ids = torch.full((len(places), width), 0 if pad is None else pad)
        mask = torch.zeros(len(places), width, dtype=torch.long)
        for line, place in enumerate(places):
            ids[line, : len(rows[place])] = torch.as_tensor(rows[place])
            mask[line, : len(rows[place])] = 1
        with torch.inference_mode():
            device = next(model.parameters()).device
            found = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        result[places] = found.float().cpu().numpy()
    return result
