"""Which tokens of a tokenizer can go, and its tokenizer.json without them. No model, no text: ids in, JSON out.

A text is encoded as before, up to renumbering, as long as the tokens that it was encoded with are kept, because what
they are made of is kept too. For BPE that is every token on the way to them: a merge of kept tokens stays, in its
place in the order, so each step of the merging is taken again and none becomes possible that was not. For Unigram it
is the lowest score, from which that of unknown characters follows; the best path stays the best of fewer. WordPiece
and WordLevel need nothing: the longest match is the longest of fewer (words that it could not spell aside).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from shrew.errors import SpecError, UnsupportedError

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
SPACE = "▁"  # what SentencePiece writes for a space; spelled in bytes it would not be read back as one


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.json: `ids` of all of them, and those that are `fixed`, because without them some text
    could no longer be spelled or the tokenizer would no longer work."""

    content: dict[str, Any]
    ids: dict[str, int]
    fixed: frozenset[int]
    names: dict[int, str] = field(repr=False)
    ranks: dict[tuple[str, str], int] = field(repr=False)
    made: dict[str, list[tuple[str, str]]] = field(repr=False)  # the merges that give a token
    _parts: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def parts(self, number: int) -> tuple[int, ...]:
        """The two tokens that the last merge on the way to a token joins; none for what no merge gives."""
        if number not in self._parts:
            name = self.names[number]
            pairs = self.made.get(name, [])
            pair = self._last_merge(name) if len(pairs) > 1 else pairs[0] if pairs else None
            self._parts[number] = tuple(self.ids[part] for part in pair or ())
        return self._parts[number]

    def with_parts(self, wanted: Iterable[int], have: set[int]) -> set[int]:
        """`wanted` and all that they are made of, without those in `have`."""
        found: set[int] = set()
        pending = [number for number in wanted if number not in have]
        while pending:
            number = pending.pop()
            if number not in found:
                found.add(number)
                pending += [part for part in self.parts(number) if part not in have and part not in found]
        return found

    def _last_merge(self, name: str) -> tuple[str, str] | None:
        """The last step of merging a token's characters, always the pair of lowest rank, the leftmost of equals. What
        stands around a token changes nothing in that order, or a merge would reach across its border."""
        symbols, pair = spelled(self.content["model"], name), None
        prefix = len(self.content["model"].get("continuing_subword_prefix") or "")
        while len(symbols) > 1:
            ranks = [self.ranks.get(two, len(self.ranks)) for two in pairwise(symbols)]
            at = ranks.index(min(ranks))
            if ranks[at] == len(self.ranks):
                return None
            pair = symbols[at], symbols[at + 1]
            symbols[at : at + 2] = [pair[0] + pair[1][prefix:]]
        return pair


def read(content: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json. Raises UnsupportedError for a kind of tokenizer that is not known."""
    model = content["model"]
    kind = model.get("type")
    if kind not in KINDS:
        raise UnsupportedError(f"trim-vocab: a tokenizer of kind {kind} is not known; known: {', '.join(KINDS)}.")
    own = {piece: number for number, (piece, _) in enumerate(model["vocab"])} if kind == "Unigram" else model["vocab"]
    added = {item["content"]: item["id"] for item in content.get("added_tokens") or []}
    prefix = len(model.get("continuing_subword_prefix") or "")
    ranks: dict[tuple[str, str], int] = {}
    made: dict[str, list[tuple[str, str]]] = {}
    for rank, pair in enumerate(model.get("merges") or []):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        ranks[first, second] = rank
        made.setdefault(first + second[prefix:], []).append((first, second))
    ids = {**own, **added}
    names = {number: name for name, number in ids.items()}
    return Vocabulary(content, ids, frozenset(_fixed(content, own) | set(added.values())), names, ranks, made)


def spelled(model: dict[str, Any], token: str) -> list[str]:
    """The single characters that a token stands for, as the tokenizer's model names them ("##" and "</w>" included)."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    head = prefix if prefix and token.startswith(prefix) and token != prefix else ""
    tail = suffix if suffix and token.endswith(suffix) and token != suffix else ""
    body = token[len(head) : len(token) - len(tail)]
    symbols = [(prefix if place else head) + letter for place, letter in enumerate(body)]
    return [*symbols[:-1], symbols[-1] + tail] if symbols else []


def _fixed(content: dict[str, Any], own: dict[str, int]) -> set[int]:
    model, kind = content["model"], content["model"]["type"]
    found = {own[name] for name in own.keys() & (BYTES | {SPACE})}
    if model.get("unk_token") in own:
        found.add(own[model["unk_token"]])
    if kind == "Unigram":
        found.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
        if model.get("unk_id") is not None:
            found.add(model["unk_id"])
    if kind != "WordLevel" and not (model.get("byte_fallback") and own.keys() >= BYTES):
        for name, number in own.items():
            symbols = spelled(model, name)
            if len(symbols) == 1 or not own.keys() >= set(symbols):
                found.add(number)

    def note(number: int) -> int:
        found.add(number)
        return number

    _with_ids(content.get("post_processor"), note)
    if content.get("padding"):
        found.add(content["padding"]["pad_id"])
    return found


def _with_ids(processor: Any, change: Callable[[int], int]) -> Any:
    """A post-processor with every id in it changed."""
    if processor is None:
        return None
    done = dict(processor)
    for key in ("sep", "cls"):  # of BERT's and RoBERTa's
        if key in done:
            done[key] = [done[key][0], change(done[key][1])]
    if isinstance(done.get("special_tokens"), dict):
        done["special_tokens"] = {name: {**item, "ids": [change(number) for number in item["ids"]]}
                                  for name, item in done["special_tokens"].items()}  # fmt: skip
    if "processors" in done:
        done["processors"] = [_with_ids(item, change) for item in done["processors"]]
    return done


def choose(vocabulary: Vocabulary, uses: np.ndarray, also: set[int], size: int, least: int, multiple: int) -> list[int]:
    """The old ids to keep, ascending: the fixed ones and `also`, then by `uses` [ids] those used `least` times or (with
    `size`) the most used, each with what it is made of, then others up to a multiple. Raises SpecError where `size` is
    less than what has to stay."""
    total = len(vocabulary.ids)
    kept = vocabulary.with_parts(vocabulary.fixed | also, set())
    if not size:
        kept |= vocabulary.with_parts(np.flatnonzero(uses >= least).tolist(), kept)
    goal = min(total, -(-(size or len(kept)) // multiple) * multiple)
    if len(kept) > goal:
        raise SpecError(f"trim-vocab: {len(kept)} tokens have to stay (special ones, bytes, single characters); keep "
                        "at least as many.")  # fmt: skip
    order = sorted(vocabulary.ids.values(), key=lambda number: (-uses[number], number))
    while len(kept) < goal:  # what is made of too many others at first may fit when some of those are there
        for number in order:
            if len(kept) == goal:
                break
            more = vocabulary.with_parts([number], kept)
            if len(kept) + len(more) <= goal:
                kept |= more
    return sorted(kept)


def rewritten(vocabulary: Vocabulary, kept: list[int]) -> dict[str, Any]:
    """tokenizer.json of the kept tokens alone, numbered in the order of `kept`."""
    content, model = vocabulary.content, dict(vocabulary.content["model"])
    new = {old: number for number, old in enumerate(kept)}
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {name: new[old] for name, old in model["vocab"].items() if old in new}
    if "merges" in model:
        left = model["vocab"].keys()
        results = {pair: name for name, pairs in vocabulary.made.items() for pair in pairs}
        model["merges"] = [list(pair) for pair in vocabulary.ranks if {*pair, results[pair]} <= left]
    done = {**content, "model": model, "post_processor": _with_ids(content.get("post_processor"), new.__getitem__)}
    done["added_tokens"] = [{**item, "id": new[item["id"]]} for item in content.get("added_tokens") or []]
    if content.get("padding"):
        done["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    return done
