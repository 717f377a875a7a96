"""A tokenizer.json as the browser's tokenizer reads it: everything looked up, nothing left to interpret.

Byte-level BPE and BPE with byte fallback, with the normalizers, splits and decoders of common models. What cannot be
said so is refused here, not guessed at in the browser.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.normalizers import Lowercase, Normalizer, Strip, StripAccents

from shrew.errors import FolderError, UnsupportedError
from shrew.packers.web.pattern import CHARACTERS, kinds, klass, literal, ranges, translate

# What the pre-tokenizer ByteLevel does by itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ADDED = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
Part = dict[str, Any]


def compiled(path: Path) -> Part:
    """The browser's form of a tokenizer.json.

    Raises FolderError for a file that is no tokenizer, UnsupportedError for one that has no form here."""
    try:
        content = path.read_text("utf-8")
        oracle = Tokenizer.from_str(content)
        held: Part = json.loads(content)
    except Exception as error:
        raise FolderError(f"{path} is not a tokenizer that `tokenizers` reads ({error}).") from None
    before, after = _around(held.get("post_processor"))
    return {
        "format": 1,
        **_model(held["model"]),
        "added": [{key: token[key] for key in ADDED} | {"text": oracle.id_to_token(token["id"])}
                  for token in held.get("added_tokens") or []],
        "normalizer": [step for part in _parts(held.get("normalizer"), "normalizers") for step in _normalizer(part)],
        "splits": [step for part in _parts(held.get("pre_tokenizer"), "pretokenizers") for step in _split(part)],
        "decoder": [_decoder(part) for part in _parts(held.get("decoder"), "decoders")],
        "joiner": "" if held.get("decoder") else " ",
        "before": before,
        "after": after,
    }  # fmt: skip


def _refused(what: str) -> UnsupportedError:
    return UnsupportedError(f"the tokenizer has {what}, which the browser's tokenizer does not know; use `shrew serve` "
                            "for this model.")  # fmt: skip


def _parts(part: Part | None, key: str) -> Iterable[Part]:
    """A component or a sequence of them, flat."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for item in part[key]:
            yield from _parts(item, key)
    else:
        yield part


def _model(model: Part) -> Part:
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"a {model['type']} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"the setting {key}")
    vocabulary: dict[str, int] = model["vocab"]
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append([vocabulary[left], vocabulary[right], vocabulary[left + right]])
    unknown = model.get("unk_token")
    return {
        "tokens": tokens,
        "merges": merges,
        "unknown": None if unknown is None else vocabulary.get(unknown),
        "fuse_unknown": bool(model.get("fuse_unk")),
        "byte_fallback": bool(model.get("byte_fallback")),
        "ignore_merges": bool(model.get("ignore_merges")),
    }


def _pattern(pattern: Part) -> str:
    return literal(pattern["String"]) if "String" in pattern else translate(pattern["Regex"])


def _normalizer(part: Part) -> list[Part]:
    match kind := part["type"]:
        case "NFC" | "NFD" | "NFKC" | "NFKD":
            return [{"kind": "form", "form": kind}]
        case "Lowercase":
            return [{"kind": "letters", "letters": _lowercase()}]
        case "Prepend":
            return [{"kind": "prepend", "text": part["prepend"]}]
        case "Replace":
            return [{"kind": "replace", "pattern": _pattern(part["pattern"]), "text": part["content"]}]
        case "Strip":
            gone = _emptied(Strip())
            ends = [f"^{gone}+"] * bool(part["strip_left"]) + [f"{gone}+$"] * bool(part["strip_right"])
            return [{"kind": "replace", "pattern": end, "text": ""} for end in ends]
        case "StripAccents":
            return [{"kind": "replace", "pattern": _emptied(StripAccents()), "text": ""}]
        case "ByteLevel":
            return [{"kind": "bytes"}]
    raise _refused(f"the normalizer {kind}")


def _emptied(normalizer: Normalizer) -> str:
    """The class of the characters of which nothing is left."""
    return klass(ranges(number for number in CHARACTERS if not normalizer.normalize_str(chr(number))))


def _lowercase() -> dict[str, str]:
    """Every letter that changes, as tokenizers changes it: letter by letter, by its own version of Unicode."""
    lower = Lowercase()
    changed = {chr(number): lower.normalize_str(chr(number)) for number in CHARACTERS}
    return {letter: small for letter, small in changed.items() if letter != small}


def _split(part: Part) -> list[Part]:
    match kind := part["type"]:
        case "ByteLevel":
            prefix = [{"kind": "space"}] if part["add_prefix_space"] else []
            split = [_by(translate(GPT2), "isolated")] if part.get("use_regex", True) else []
            return [*prefix, *split, {"kind": "bytes"}]
        case "Split":
            return [_by(_pattern(part["pattern"]), part["behavior"], part.get("invert", False))]
        case "Digits":
            _, cut = kinds(pre_tokenizers.Digits(individual_digits=True))
            return [_by(klass(cut), "isolated" if part["individual_digits"] else "contiguous")]
        case "Punctuation":
            _, cut = kinds(pre_tokenizers.Punctuation())
            return [_by(klass(cut), part["behavior"])]
        case "WhitespaceSplit":
            gone, _ = kinds(pre_tokenizers.WhitespaceSplit())
            return [_by(klass(gone), "removed")]
        case "Whitespace":
            gone, cut = kinds(pre_tokenizers.Whitespace())
            return [_by(klass(gone), "removed"), _by(f"{klass(cut)}+", "isolated")]
        case "CharDelimiterSplit":
            return [_by(literal(part["delimiter"]), "removed")]
        case "Metaspace":
            mark = part["replacement"]
            step = {"kind": "metaspace", "mark": mark, "prepend": part.get("prepend_scheme", "always")}
            return [step, _by(literal(mark), "mergedwithnext")] if part.get("split", True) else [step]
    raise _refused(f"the pre-tokenizer {kind}")


def _by(pattern: str, behavior: str, invert: bool = False) -> Part:
    return {"kind": "split", "pattern": pattern, "behavior": behavior.lower(), "invert": invert}


def _around(part: Part | None) -> tuple[list[int], list[int]]:
    """The tokens that are put before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for item in _parts(part, "processors"):
        if item["type"] == "ByteLevel":
            continue  # moves offsets only
        if item["type"] != "TemplateProcessing":
            raise _refused(f"the post-processor {item['type']}")
        first: list[int] = []
        last: list[int] = []
        where = 0
        for piece in item["single"]:
            if "Sequence" in piece:
                where += 1
            else:
                (last if where else first).extend(item["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
        if where != 1:
            raise _refused("a template that does not hold the text once")
        before, after = [*first, *before], [*after, *last]
    return before, after


def _decoder(part: Part) -> Part:
    match kind := part["type"]:
        case "ByteLevel":
            return {"kind": "bytes"}
        case "ByteFallback":
            return {"kind": "fallback"}
        case "Fuse":
            return {"kind": "fuse"}
        case "Replace":
            return {"kind": "replace", "pattern": _pattern(part["pattern"]), "text": part["content"]}
        case "Strip":
            return {"kind": "strip", "letter": part["content"], "start": part["start"], "stop": part["stop"]}
        case "Metaspace":
            return {"kind": "metaspace", "mark": part["replacement"], "prepend": part.get("prepend_scheme", "always")}
    raise _refused(f"the decoder {kind}")
