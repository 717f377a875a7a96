"""`trim-vocab`: drop the tokens that the text never uses, with their rows in the embedding and the head.

Nothing is approximated: the logits of the tokens left are what they were, and a text that was encoded with those alone
is encoded as before (see `shrew.moves.vocabulary`). Any other text is spelled with more, shorter tokens.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from transformers import AutoTokenizer

from shrew.blocks.model import ShrewConfig
from shrew.errors import DataError, UnsupportedError
from shrew.folder import Loaded
from shrew.folder.check import quiet
from shrew.moves import vocabulary
from shrew.moves.anatomy import rebuild, skeleton, with_settings
from shrew.moves.context import Context
from shrew.spec import Meta, doc, dump

LISTS = ("suppress_tokens", "begin_suppress_tokens")  # of generation_config: ids that may as well be missing
REFUSED = ("bad_words_ids", "forced_decoder_ids", "sequence_bias")


@dataclass(frozen=True, kw_only=True)
class TrimVocab:
    """Drop the tokens that the text never uses; what is left is encoded and predicted as before."""

    name: ClassVar[str] = "trim-vocab"
    paper: ClassVar[str] = "Abdaoui et al. 2020, Load What You Need (arXiv:2010.05609)"

    keep: Annotated[int, Meta(ge=0)] = doc("tokens to keep, the most used; 0: all that are used often enough", 0)
    least: Annotated[int, Meta(ge=1)] = doc("uses in the text that are enough, where `keep` does not say how many", 1)
    multiple: Annotated[int, Meta(ge=1)] = doc("keep a multiple of this many tokens", 32)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises DataError without text, SpecError where more tokens than `keep` have to stay, UnsupportedError for a
        tokenizer or a model whose tokens cannot be renumbered."""
        if not context.calibration and not context.healing:
            raise DataError("trim-vocab: there is no text to count tokens in; give some text.")
        _check(loaded)
        known = vocabulary.read(json.loads(loaded.tokenizer.backend_tokenizer.to_str()))
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        if (last := max(known.ids.values())) >= rows:
            raise UnsupportedError(f"trim-vocab: the tokenizer has a token {last} and the model's embedding {rows} "
                                   "rows; the two do not belong together.")  # fmt: skip
        uses = np.zeros(last + 1, np.int64)
        for window in (*context.calibration, *context.healing):
            uses += np.bincount(window[window <= last], minlength=last + 1)
        also = _named_ids(loaded.model) & set(known.ids.values())
        kept = vocabulary.choose(known, uses, also, self.keep, self.least, self.multiple)
        if len(kept) == rows:
            context.say(f"trim-vocab: rounds to all {rows} tokens (multiples of {self.multiple}); nothing is cut")
            return loaded
        share = uses[kept].sum() / max(uses.sum(), 1)
        context.say(f"trim-vocab: {len(kept):,} of {rows:,} tokens stay, {share:.2%} of those in the text")
        return with_rows(loaded, kept, _tokenizer(loaded.tokenizer, vocabulary.rewritten(known, kept)))


def with_rows(loaded: Loaded, kept: Sequence[int], tokenizer: Any) -> Loaded:
    """The model with the tokens `kept` alone, numbered in that order, and their tokenizer. Packed weights stay packed.

    Which tensors have a row a token is seen from their shapes: those that a model of fewer tokens has otherwise.
    """
    model, which = loaded.model, torch.as_tensor(kept)
    config = _config(model.config, kept)
    shapes = skeleton(model, config)
    rows = model.get_input_embeddings().weight.shape[0]
    state, packed = dict(model.state_dict()), dict(loaded.packed)
    for name, value in state.items():
        if shapes.get(name, value.shape) == (len(kept), *value.shape[1:]) != value.shape and len(value) == rows:
            state[name] = value[which.to(value.device)]
            if name in packed:
                item = packed[name]
                low = None if item.low is None else (item.low[0][which], item.low[1])
                packed[name] = dataclasses.replace(item, codes=item.codes[which], steps=item.steps.rows(which),
                                                   shape=(len(kept), *item.shape[1:]), low=low)  # fmt: skip
    made = rebuild(model, config, state)
    if model.can_generate():
        settings = {**_renumbered(model.generation_config, kept), **_lists(model.generation_config, kept)}
        made.generation_config.update(**settings)
    return dataclasses.replace(loaded, model=made, tokenizer=tokenizer, packed=packed)


def _check(loaded: Loaded) -> None:
    """Refuse what looks tokens up by number in places that the shapes do not show."""
    model, kind = loaded.model, loaded.model.config.model_type
    if not getattr(loaded.tokenizer, "is_fast", False):
        raise UnsupportedError("trim-vocab: this tokenizer has no tokenizer.json to rewrite; save it as a fast one.")
    if isinstance(model.config, ShrewConfig) and model.config.parsed().ngrams:
        raise UnsupportedError("trim-vocab: n-gram embeddings hash the numbers of tokens, which would change; leave "
                               "the vocabulary whole.")  # fmt: skip
    if isinstance(model.config, ShrewConfig) and model.config.parsed().patches:
        raise UnsupportedError("trim-vocab: a model of patches reads bytes by their numbers; leave them as they are.")
    others = [key for key in model.config.to_dict() if key.startswith("vocab_size") and key != "vocab_size"]
    if others or getattr(model.config, "vocab_size", None) != model.get_input_embeddings().weight.shape[0]:
        where = ", ".join(others) or "its config"
        raise UnsupportedError(f"trim-vocab: {kind} has another number of tokens in {where} than in its embedding; "
                               "leave the vocabulary whole.")  # fmt: skip
    if model.can_generate():
        for key in REFUSED:
            if getattr(model.generation_config, key, None):
                raise UnsupportedError(f"trim-vocab: generation_config.json holds {key}, which would no longer name "
                                       "the same tokens; remove it first.")  # fmt: skip


def _ids(config: Any) -> dict[str, list[int]]:
    """What a config says in keys that name tokens."""
    found = {}
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_ids")) and value is not None:
            found[key] = value if isinstance(value, list) else [value]
    return found


def _named_ids(model: Any) -> set[int]:
    """Every token id that the configs of a model name."""
    configs = [model.config, *([model.generation_config] if model.can_generate() else [])]
    return {number for config in configs for values in _ids(config).values() for number in values}


def _renumbered(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    """The keys that name tokens with their new ids; None for one that no token has (a row of padding)."""
    new = {old: number for number, old in enumerate(kept)}
    return {
        key: [new[item] for item in values if item in new] if isinstance(getattr(config, key), list)
        else new.get(values[0], values[0] if values[0] < 0 else None)
        for key, values in _ids(config).items()
    }  # fmt: skip


def _lists(config: Any, kept: Sequence[int]) -> dict[str, Any]:
    new = {old: number for number, old in enumerate(kept)}
    return {key: [new[item] for item in value if item in new]
            for key in LISTS if (value := getattr(config, key, None))}  # fmt: skip


def _config(config: Any, kept: Sequence[int]) -> Any:
    ids = _renumbered(config, kept)
    if isinstance(config, ShrewConfig):
        return with_settings(config, spec=dump(dataclasses.replace(config.parsed(), vocabulary=len(kept))), **ids)
    return with_settings(config, vocab_size=len(kept), **ids)


def _tokenizer(old: Any, content: dict[str, Any]) -> Any:
    """The tokenizer of a new tokenizer.json, read as a folder's would be, with all else that the old one has."""
    with tempfile.TemporaryDirectory() as place, quiet():
        old.save_pretrained(place)
        (Path(place) / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        new = AutoTokenizer.from_pretrained(place)
    new.name_or_path = old.name_or_path
    if new.get_vocab() != vocabulary.read(content).ids:
        raise UnsupportedError(f"trim-vocab: the tokens of a {type(old).__name__} cannot be renumbered; leave the "
                               "vocabulary whole.")  # fmt: skip
    return new
