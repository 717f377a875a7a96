"""Tokenizers to and from the metadata of a GGUF file, where llama.cpp cuts text into the same tokens.

llama.cpp has two kinds that matter here: byte-level BPE (`gpt2`), whose rules of cutting text into words it knows by
name, and SentencePiece's BPE with bytes for what is unknown (`llama`), which joins pairs by the score of the result.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from shrew.errors import FolderError, UnsupportedError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST
QWEN2 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + REST

# What text is cut by, one rule after the other -> llama.cpp's name, without and with `ignore_merges` (a word that is in
# the vocabulary is one token, whatever the merges say). It has no such pair for every rule.
WORDS: dict[tuple[str, ...], tuple[str, str]] = {
    (GPT2,): ("gpt-2", ""),
    (DIGIT, GPT2): ("starcoder", ""),
    (LLAMA3,): ("dbrx", "llama-bpe"),
    (QWEN2,): ("qwen2", ""),
}
# Names that mean the same in llama.cpp.
ALIASES = {
    "gpt-2": "mpt olmo jais trillion granite-docling phi-2 gigachat a.x-4.0 mellum exaone4",
    "starcoder": "refact command-r smollm codeshell exaone minerva-7b",
    "dbrx": "smaug-bpe chatglm-bpe",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "qwen2": "stablelm2 hunyuan deepseek-r1-qwen kormo f2llmv2 megrez solar-open",
}
BEGINS = {"llama-bpe", "llama"}  # begin with bos where the file does not say
SPACE = "\u2581"
IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
PREFIX = "tokenizer.ggml."


def _is_flag(value: Any) -> bool:
    return isinstance(value, int)


def _are_numbers(value: Any, kinds: str = "iuf") -> bool:
    """Whether it is a list of numbers of these kinds of numpy's."""
    return isinstance(value, list | np.ndarray) and np.asarray(value).dtype.kind in kinds


# What a file may say of its tokenizer, besides texts that are looked at one by one.
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pre": (lambda value: isinstance(value, str), "text"),
    "token_type": (lambda value: _are_numbers(value, "iu"), "list of integers"),
    "scores": (_are_numbers, "list of numbers"),
    "add_bos_token": (_is_flag, "yes or no"), "add_eos_token": (_is_flag, "yes or no"),
    "add_space_prefix": (_is_flag, "yes or no"),
}  # fmt: skip


def names_of_words() -> dict[str, tuple[tuple[str, ...], bool]]:
    """llama.cpp's name -> the rules, and whether merges are ignored."""
    found = {}
    for rules, pair in WORDS.items():
        for name, ignore in zip(pair, (False, True), strict=True):
            for alias in [name, *ALIASES.get(name, "").split()] if name else []:
                found[alias] = (rules, ignore)
    return found


# --- out --------------------------------------------------------------------------------------------------------------


def describe(tokenizer: Any, size: int, ids: dict[str, int | None]) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a tokenizer for a vocabulary of `size` rows, and notes on what llama.cpp does otherwise.

    `ids` are bos, eos and pad where the tokenizer itself says none. Raises UnsupportedError where llama.cpp would cut
    text into other tokens.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise UnsupportedError("this model's tokenizer has no tokenizer.json, which GGUF is written from.")
    stated = json.loads(core.to_str())
    if len(core.get_vocab()) and max(core.get_vocab().values()) >= size:
        raise UnsupportedError(f"the tokenizer has {max(core.get_vocab().values()) + 1} tokens and the model's "
                               f"vocabulary {size}; llama.cpp needs a row for each token.")  # fmt: skip
    if stated["model"]["type"] != "BPE":
        raise UnsupportedError(f"a tokenizer of type {stated['model']['type']} is not written to GGUF: llama.cpp would "
                               "cut text into other tokens.")  # fmt: skip
    odd = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if stated["model"].get(key)]
    if odd:
        raise UnsupportedError(f"llama.cpp knows no tokenizer with {odd[0]}.")
    notes: list[str] = []
    found = _bytes(stated, core, notes) if _is_byte_level(stated) else _pieces(stated, notes)
    found |= _tokens(stated, size)
    if (scores := found.get(PREFIX + "scores")) is not None:
        found[PREFIX + "scores"] = [float(scores.get(text, 0.0)) for text in found[PREFIX + "tokens"]]
    for key, name in IDS.items():
        given = getattr(tokenizer, f"{key}_token_id", None)
        number = ids.get(key) if given is None else given
        if number is not None:
            if not isinstance(number, int) or not 0 <= number < size:
                raise UnsupportedError(f"the {key} token is {number!r}, and the model has those from 0 to {size - 1}.")
            found[PREFIX + name] = number
    if PREFIX + IDS["eos"] not in found:
        notes.append("the tokenizer names no end-of-text token, so llama.cpp takes one by its number")
    found |= _around(core, found)
    for token in stated["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            notes.append(f"llama.cpp does not strip spaces around '{token['content']}' or look for whole words")
    if template := getattr(tokenizer, "chat_template", None):
        named = template if isinstance(template, dict) else {"default": template}
        for name, text in named.items():
            found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
        if others := sorted(set(named) - {"default"}):
            found["tokenizer.chat_templates"] = others
    return found, notes


def _is_byte_level(stated: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(stated["pre_tokenizer"], "pretokenizers"))


def _steps(stated: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or post-processor that may be a sequence."""
    if stated is None:
        return []
    return [part for inner in stated[key] for part in _steps(inner, key)] if stated["type"] == "Sequence" else [stated]


def _bytes(stated: dict[str, Any], core: Any, notes: list[str]) -> dict[str, Any]:
    """Byte-level BPE."""
    rules: list[str] = []
    for step in (steps := _steps(stated["pre_tokenizer"], "pretokenizers")):
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"] or step is not steps[-1]:
                raise UnsupportedError("llama.cpp knows no byte-level tokenizer that adds a space before the text.")
            rules += [GPT2] if step["use_regex"] else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            rules.append(DIGIT)
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rules.append(step["pattern"].get("Regex", ""))
        else:
            rules.append(step["type"])
    if tuple(rules) not in WORDS:
        raise UnsupportedError(f"llama.cpp has no name that Shrew knows for a tokenizer that cuts text by {rules}.")
    normal = [step["type"] for step in _steps(stated["normalizer"], "normalizers")]
    if normal == ["NFC"]:
        notes.append("the tokenizer composes characters (NFC) before it cuts text, and llama.cpp does not")
    elif normal:
        raise UnsupportedError(f"llama.cpp does not normalise text by {', '.join(normal)} before it cuts it.")
    plain, ignoring = WORDS[tuple(rules)]
    ignore = bool(stated["model"].get("ignore_merges"))
    name = ignoring if ignore else plain
    if ignore and not name:
        if not _all_reached(stated, core):
            raise UnsupportedError("llama.cpp has no name for this tokenizer's way to take whole words first.")
        name = plain  # the merges alone give every word of the vocabulary
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stated["model"]["merges"]]
    return {PREFIX + "model": "gpt2", PREFIX + "pre": name, PREFIX + "merges": merges}


def _all_reached(stated: dict[str, Any], core: Any) -> bool:
    """Whether the merges alone make every token out of its bytes."""
    model = stated["model"] | {"ignore_merges": False}
    plain = Tokenizer.from_str(json.dumps({**stated, "model": model, "pre_tokenizer": None, "added_tokens": [],
                                           "normalizer": None, "post_processor": None}))  # fmt: skip
    added = {token["content"] for token in stated["added_tokens"]}
    return all(plain.encode(word).ids == [number] for word, number in model["vocab"].items() if word not in added)


def _pieces(stated: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """SentencePiece's BPE."""
    model = stated["model"]
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if not model.get("byte_fallback") or missing:
        raise UnsupportedError("llama.cpp reads a tokenizer of this kind only with tokens for all single bytes "
                               "(byte_fallback).")  # fmt: skip
    prefix = False
    for step in _steps(stated["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, SPACE):
            raise UnsupportedError(f"llama.cpp does not normalise text by {step['type']} before it cuts it.")
    for step in _steps(stated["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True):
            prefix = prefix or step["prepend_scheme"] != "never"
            if step["prepend_scheme"] == "first":
                notes.append("llama.cpp adds a space after special tokens too, not at the beginning alone")
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # no space is left to split at
            raise UnsupportedError(f"llama.cpp has no tokenizer of this kind that cuts text by {step['type']}.")
    scores = _scores(stated)
    return {PREFIX + "model": "llama", PREFIX + "pre": "default", PREFIX + "add_space_prefix": prefix,
            PREFIX + "scores": scores}  # fmt: skip


def _scores(stated: dict[str, Any]) -> dict[str, float]:
    """A score for each piece such that joining the best-scored pair first is following the merges in order.

    Raises UnsupportedError where that cannot be: when two pieces that join to a third are no merge, or when merges to
    one piece stand on both sides of those to another.
    """
    vocab, pairs = stated["model"]["vocab"], set()
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, merge in enumerate(stated["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
        pairs.add((left, right))
        first.setdefault(left + right, rank)
        last[left + right] = rank
    order = sorted(first, key=first.__getitem__)
    added = {token["content"] for token in stated["added_tokens"]}
    crossed = any(last[before] > first[after] for before, after in itertools.pairwise(order))
    unknown = any(
        (word[:at], word[at:]) not in pairs
        for word in vocab if word not in added and not word.startswith("<0x")
        for at in range(1, len(word)) if word[:at] in vocab and word[at:] in vocab
    )  # fmt: skip
    if crossed or unknown:
        raise UnsupportedError("this tokenizer's merges follow no scores of pieces, by which llama.cpp joins them; "
                               "only tokenizers made from SentencePiece do.")  # fmt: skip
    return {word: -float(rank) for word, rank in first.items()}


def _tokens(stated: dict[str, Any], size: int) -> dict[str, Any]:
    words = {number: word for word, number in stated["model"]["vocab"].items()}
    added = {token["id"]: token for token in stated["added_tokens"]}
    unknown = stated["model"].get("unk_token")
    known = set(words.values()) | {token["content"] for token in added.values()}
    texts, kinds = [], []
    for number in range(size):
        kind, text = TokenType.NORMAL, words.get(number, "")
        if number in added:
            kind, text = TokenType.USER_DEFINED, added[number]["content"]
            if added[number]["special"]:
                kind = TokenType.UNKNOWN if text == unknown else TokenType.CONTROL
        elif number not in words:
            kind, text = TokenType.UNUSED, f"[PAD{number}]"
            while text in known:
                text += "]"
        elif text == unknown:
            kind = TokenType.UNKNOWN
        elif stated["model"].get("byte_fallback") and _is_byte(text):
            kind = TokenType.BYTE
        texts.append(text)
        kinds.append(int(kind))
    return {PREFIX + "tokens": texts, PREFIX + "token_type": kinds}


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _around(core: Any, found: dict[str, Any]) -> dict[str, bool]:
    """Whether bos and eos are put around a text."""
    bare, full = core.encode("a", add_special_tokens=False).ids, core.encode("a", add_special_tokens=True).ids
    bos, eos = found.get(PREFIX + IDS["bos"]), found.get(PREFIX + IDS["eos"])
    for before, begins in (([], False), ([bos], True)):
        for after, ends in (([], False), ([eos], True)):
            if full == before + bare + after:
                return {PREFIX + "add_bos_token": begins, PREFIX + "add_eos_token": ends}
    raise UnsupportedError("the tokenizer puts other tokens around a text than bos and eos, which llama.cpp cannot.")


# --- back -------------------------------------------------------------------------------------------------------------


def rebuild(where: str, values: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describe. Raises FolderError."""
    model, texts = values.get(PREFIX + "model"), values.get(PREFIX + "tokens")
    if model not in ("gpt2", "llama") or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise FolderError(f"{where} has a tokenizer '{str(model)[:40]}', and Shrew reads gpt2 and llama.")
    for key, (fits, what) in TYPES.items():
        if PREFIX + key in values and not fits(values[PREFIX + key]):
            raise FolderError(f"{where} has a '{PREFIX}{key}' that is no {what}; fetch it again.")
    kinds = values.get(PREFIX + "token_type")
    types = [int(kind) for kind in kinds] if kinds is not None else [int(TokenType.NORMAL)] * len(texts)
    if len(types) != len(texts) or len(set(texts)) != len(texts):
        raise FolderError(f"{where} has tokens that appear twice or have no type; fetch it again.")
    stated = _bpe(where, values, texts, types) if model == "gpt2" else _sentencepiece(where, values, texts, types)
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    stated["added_tokens"] = [
        {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kind in special}
        for number, (text, kind) in enumerate(zip(texts, types, strict=True))
        if kind in (*special, TokenType.USER_DEFINED)
    ]  # fmt: skip
    named = {}
    for key, name in IDS.items():
        number = values.get(PREFIX + name)
        if type(number) is int and 0 <= number < len(texts):
            named[key] = number
    stated["post_processor"] = _template(values, texts, named, model)
    try:
        core = Tokenizer.from_str(json.dumps({"version": "1.0", "truncation": None, "padding": None, **stated}))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong
        raise FolderError(f"{where} has a tokenizer that does not fit together ({str(error)[:200]}).") from None
    chat = values.get("tokenizer.chat_template")
    more = {"chat_template": chat} if isinstance(chat, str) else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{key}_token": texts[number] for key, number in named.items()}, **more
    )


def _words(texts: list[str], types: list[int]) -> dict[str, int]:
    """The vocabulary but for rows that stand for nothing."""
    return {text: number for number, text in enumerate(texts) if types[number] != TokenType.UNUSED}


def _bpe(where: str, values: dict[str, Any], texts: list[str], types: list[int]) -> dict[str, Any]:
    name, merges = values.get(PREFIX + "pre"), values.get(PREFIX + "merges", [])
    known = names_of_words()
    if name not in known:
        raise FolderError(f"{where} cuts text by the rule '{str(name)[:40]}', which Shrew does not read; known: "
                          f"{', '.join(sorted(known))}.")  # fmt: skip
    vocab, rules = _words(texts, types), known[name]
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge for merge in merges):
        raise FolderError(f"{where} has merges that are no pairs; fetch it again.")
    pairs = [merge.split(" ", 1) for merge in merges]
    steps: list[dict[str, Any]] = []
    for rule in rules[0]:
        if rule == DIGIT:
            steps.append({"type": "Digits", "individual_digits": True})
        elif rule != GPT2:
            steps.append({"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2 in rules[0]}
    return {
        "normalizer": None, "decoder": level | {"add_prefix_space": True, "use_regex": True},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": rules[1],
                  "vocab": vocab, "merges": pairs},
    }  # fmt: skip


def _sentencepiece(where: str, values: dict[str, Any], texts: list[str], types: list[int]) -> dict[str, Any]:
    scores = values.get(PREFIX + "scores")
    if scores is None or len(scores) != len(texts):
        raise FolderError(f"{where} has no score for each token; fetch it again.")
    vocab = _words(texts, types)
    unknown = next((text for text, kind in zip(texts, types, strict=True) if kind == TokenType.UNKNOWN), None)
    plain = {text for text, number in vocab.items() if types[number] == TokenType.NORMAL}
    merges = [
        (-float(scores[vocab[text]]), vocab[text[:at]], vocab[text[at:]], text[:at], text[at:])
        for text in plain for at in range(1, len(text)) if text[:at] in plain and text[at:] in plain
    ]  # fmt: skip
    normal = [{"type": "Prepend", "prepend": SPACE}] if values.get(PREFIX + "add_space_prefix", True) else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normal else []
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, *strip]  # fmt: skip
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*normal, replace]}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": [[left, right] for *_, left, right in sorted(merges)]},
    }  # fmt: skip


def _template(
    values: dict[str, Any], texts: list[str], named: dict[str, int], model: str
) -> dict[str, Any] | None:
    begins = values.get(PREFIX + "add_bos_token", model in BEGINS or values.get(PREFIX + "pre") in BEGINS)
    around: Iterable[tuple[str, bool]] = (("bos", bool(begins)), ("eos", bool(values.get(PREFIX + "add_eos_token"))))
    used = {key: named[key] for key, wanted in around if wanted and key in named}

    def piece(key: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": texts[used[key]], "type_id": 0}}] if key in used else []

    if not used:
        return None
    single = [*piece("bos"), {"Sequence": {"id": "A", "type_id": 0}}, *piece("eos")]
    pair = [*piece("bos"), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}},
            *piece("eos")]  # fmt: skip
    special = {texts[number]: {"id": texts[number], "ids": [number], "tokens": [texts[number]]}
               for number in used.values()}  # fmt: skip
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
