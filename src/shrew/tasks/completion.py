"""Completion by greedy decoding: exact match with what should come next.

The model generates at most as many tokens as the expected completion has, and stops at its end token or, for a
completion of one line, at a newline. Blanks at both ends do not count. Chance is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import GenerationConfig

from shrew.folder import Loaded
from shrew.tasks import likelihood
from shrew.tasks.scores import Scores
from shrew.tasks.split import SplitTask

ROWS = 32


@dataclass(frozen=True)
class Prompt:
    id: str
    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Completion(SplitTask):
    kind: ClassVar[str] = "completion"
    version: ClassVar[int] = 1
    metric: ClassVar[str] = "exact_match"
    splits: dict[str, list[Prompt]]

    def texts(self, loaded: Loaded, split: str) -> list[str]:
        return [item.prompt + item.completion for item in self.examples(split)]

    def shown(self, example: Prompt) -> tuple[str, str]:
        return example.prompt, example.completion.strip()

    def score(
        self, loaded: Loaded, split: str, reference: Loaded | None = None, rows: int = ROWS
    ) -> Scores:
        """Columns: "correct". `rows` prompts are decoded together."""
        likelihood.check_causal(loaded, self.label)
        items: Sequence[Prompt] = self.examples(split)
        lengths = [len(ids) for ids in likelihood.token_ids(loaded.tokenizer, [item.completion for item in items])]
        answers = greedy(loaded, [item.prompt for item in items], lengths, rows)
        correct = np.array(
            [float(matches(answer, item.completion)) for answer, item in zip(answers, items, strict=True)]
        )
        told = tuple(trimmed(answer, item.completion) for answer, item in zip(answers, items, strict=True))
        columns = {"correct": correct}
        return Scores(self.label, split, self.metric, [item.id for item in items], columns, answers=told)


def trimmed(answer: str, expected: str) -> str:
    """The answer without blanks at its ends, cut at the first newline if one line is expected."""
    if "\n" not in expected.strip():
        answer = answer.lstrip("\n").partition("\n")[0] if expected.startswith("\n") else answer.partition("\n")[0]
    return answer.strip()


def matches(answer: str, expected: str) -> bool:
    """Whether the trimmed answer is the expected text (blanks aside)."""
    return trimmed(answer, expected) == expected.strip()


def greedy(loaded: Loaded, prompts: Sequence[str], lengths: Sequence[int], rows: int = ROWS) -> list[str]:
    """The likeliest next token, again and again: at most `lengths[i]` tokens after each prompt.

    Prompts are padded on the left and masked, so that a batch gives what single prompts give. Prompts too long for
    the model's context lose their beginning. Nothing of the folder's own generation settings (sampling, penalties)
    is used.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    start = likelihood.first_token(tokenizer)
    window = likelihood.context_length(model) - max(lengths, default=0)
    begin = [] if start is None else [start]
    ids = [begin + body for body in likelihood.token_ids(tokenizer, prompts)]
    ids = [row[-max(1, window) :] or [0] for row in ids]
    order = sorted(range(len(ids)), key=lambda place: (lengths[place], len(ids[place])))
    answers = [""] * len(ids)
    for low in range(0, len(order), rows):
        places = order[low : low + rows]
        batch = [ids[place] for place in places]
        longest = max(lengths[place] for place in places)
        for place, found in zip(places, _generate(model, batch, longest, tokenizer.eos_token_id), strict=True):
            cut = found[: lengths[place]]
            if tokenizer.eos_token_id in cut:
                cut = cut[: cut.index(tokenizer.eos_token_id)]
            answers[place] = tokenizer.decode(cut, clean_up_tokenization_spaces=False)
    return answers


def _generate(model: Any, batch: Sequence[Sequence[int]], steps: int, end: int | None) -> list[list[int]]:
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for line, row in enumerate(batch):
        ids[line, width - len(row) :] = torch.tensor(row)
        mask[line, width - len(row) :] = 1
    saved = model.generation_config
    # `generate` fills what it is not told from the folder's settings; an empty set keeps decoding plainly greedy.
    model.generation_config = GenerationConfig()
    try:
        device = next(model.parameters()).device
        plain = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=max(1, steps), eos_token_id=end,
                                 pad_token_id=0 if end is None else end)  # fmt: skip
        with torch.inference_mode():
            out = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=plain)
    finally:
        model.generation_config = saved
    found: list[list[int]] = out[:, width:].tolist()
    return found
