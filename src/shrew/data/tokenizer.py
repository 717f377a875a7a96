"""Tokenizers that a training reads or makes."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from shrew.data import Document
from shrew.errors import SpecError

LONGEST_WORD = 10_000  # characters: the time to train on a word grows with the square of its length


def read_tokenizer(place: Path) -> Any:
    """The tokenizer of a folder; raises SpecError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the tokenizers library raises nothing more special
        reason = " ".join(str(error).split())[:150]
        raise SpecError(f"tokenizer '{place}': this folder holds none that can be read ({reason}).") from None


def train_tokenizer(documents: list[Document], size: int, seed: int, sample: int = 40_000_000,
                    marks: tuple[str, ...] = ()) -> Any:  # fmt: skip
    """A byte-level BPE tokenizer of exactly `size` entries (256 bytes, one token that begins and ends documents, the
    `marks`, and merges), trained on up to `sample` characters drawn by document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    order = np.random.default_rng(seed).permutation(len(documents))
    chosen, total = [], 0
    for index in order:
        if total < sample:
            chosen += _cut(documents[index].text)
            total += len(documents[index].text)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>", *marks], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(chosen, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, pad_token=end,
                                   extra_special_tokens=list(marks))  # fmt: skip


def _cut(text: str) -> list[str]:
    """The text in pieces without a word or a gap longer than LONGEST_WORD; whole where there is none."""
    ends = [at for run in re.finditer(rf"\S{{{LONGEST_WORD},}}|\s{{{LONGEST_WORD},}}", text)
            for at in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD)]  # fmt: skip
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
