"""Constrained output: JSON of a schema, a regular expression, a grammar or one of some choices, that always closes.

llguidance (the extra `grammar`) says which tokens may come next. Here is what it leaves open: the end. Beside the state
stands a text that would close it, and a token is allowed only if what it leads to can still be closed with the tokens
that are left: by a bound on what one token can add to that (shrew.runtime.schema), or, near the end, by looking. With
no more tokens left than the closing text needs, only that text is allowed.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from shrew.runtime import closing, expression, schema
from shrew.runtime.request import Constraint
from shrew.runtime.schema import ConstraintError
from shrew.runtime.tools import demanded

__all__ = ["ConstraintError", "Grammars"]

GRAMMAR_BYTES = 100_000
LARGEST = 100_000  # bytes that one choice may demand
KEPT = 64  # compiled grammars of a model
LOOKED_AT = 256  # tokens that are tried one by one in a step
STATES = 400  # of the search for endings in a step
HURRY = 0.1  # seconds of a longer one, near the end, where that found none
WIDE = 512  # more tokens than this are allowed only within free text
STRUCTURE = b'{[,:"\\'
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000,
          "step_max_items": 50_000, "max_items_in_row": 2_000, "verbose_errors": False}  # fmt: skip


@dataclass(frozen=True)
class _Compiled:
    """A grammar over the model's tokens and over bytes, what closes it at the start, and how much of that one token
    can add: `jump` bytes for each choice it makes, `content` bytes if it is nothing but text within a text. `pieces`
    are texts that parts of it may consist of."""

    matcher: Any
    twin: Any
    close: bytes
    jump: int
    content: int
    pieces: tuple[bytes, ...]
    is_json: bool


class Grammars:
    """Makes constraints for one model; one of these is made for each and shared by its requests (thread-safe)."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos: Sequence[int]) -> None:
        from llguidance import LLTokenizer

        if not eos:
            raise ConstraintError("this model has no end token, so its output cannot be constrained.")
        bare = Tokenizer.from_str(tokenizer.to_str())
        bare.no_padding()
        bare.no_truncation()
        try:
            self.tokens = LLTokenizer(bare.to_str(), n_vocab=vocabulary, eos_token=list(eos))
        except Exception as error:  # whatever the Rust side has to say about a tokenizer
            raise ConstraintError(f"output cannot be constrained with this tokenizer ({error}).") from None
        self.vocabulary, self.eos = vocabulary, tuple(eos)
        known = self.tokens
        texts = [b"" if known.is_special_token(at) else known.decode_bytes([at]) for at in range(vocabulary)]
        self.texts = texts
        self.lengths = np.array([len(text) for text in texts])
        self.choices = np.array([1 + sum(text.count(mark) for mark in STRUCTURE) for text in texts])
        self.single = {text: at for at, text in enumerate(texts) if len(text) == 1}
        self._kept: OrderedDict[str, _Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, wanted: Any, max_tokens: int) -> Constraint:
        """Compact JSON that fits a schema. Raises ConstraintError, also where `max_tokens` cannot hold any answer."""
        return self._start(f"schema {_canonical(wanted)}", lambda: self._of_schema(wanted), max_tokens)

    def json_object(self, max_tokens: int) -> Constraint:
        """Any JSON object, of bounded depth."""
        return self.json_schema({"type": "object"}, max_tokens)

    def regex(self, pattern: str, max_tokens: int) -> Constraint:
        """A text that matches the whole expression (Rust's syntax: no look-around, no back-references)."""
        if len(pattern) > schema.PATTERN:
            raise ConstraintError(f"the regular expression is longer than {schema.PATTERN:,} characters.")

        def make() -> _Compiled:
            short, cost = expression.read(pattern)
            grammar, texts = _matchers().grammar_from_regex(pattern), closing.literals(pattern)
            if short:
                texts = (short.encode("utf-8", "replace"), *texts)
            return self._compile(grammar, "regular expression", cost, cost, texts)

        return self._start(f"regex {pattern}", make, max_tokens)

    def lark(self, grammar: str, max_tokens: int) -> Constraint:
        """A text of a context-free grammar in Lark's notation, from the rule `start`."""
        if len(grammar) > GRAMMAR_BYTES:
            raise ConstraintError(f"the grammar is longer than {GRAMMAR_BYTES:,} characters.")

        def make() -> _Compiled:
            cost = expression.read(grammar)[1]
            made, texts = _matchers().grammar_from_lark(grammar), closing.literals(grammar)
            return self._compile(made, "grammar", cost, cost, texts)

        return self._start(f"lark {grammar}", make, max_tokens)

    def choice(self, options: Sequence[str], max_tokens: int) -> Constraint:
        """One of some texts, whole."""
        if not options or not all(isinstance(option, str) and option for option in options):
            raise ConstraintError("there are no choices, or one of them is empty; give one text or more.")
        if len(options) > schema.CHOICES or sum(map(len, options)) > GRAMMAR_BYTES:
            raise ConstraintError(f"these are more than {schema.CHOICES:,} choices or {GRAMMAR_BYTES:,} characters.")

        def make() -> _Compiled:
            cost = max(len(option.encode()) for option in options)
            text = "start: " + " | ".join(json.dumps(option, ensure_ascii=False) for option in dict.fromkeys(options))
            return self._compile(_matchers().grammar_from_lark(text), "list of choices", cost, cost)

        return self._start(f"choice {json.dumps(list(options))}", make, max_tokens)

    def tool_call(
        self, tools: Sequence[Mapping[str, Any]], form: str, max_tokens: int, name: str | None = None
    ) -> Constraint:
        """One call of one of `tools` (of the one called `name`), as the form `form` of shrew.runtime.tools has it."""
        parts = demanded(form, tools, name)

        def make() -> _Compiled:
            lines, jump, content = [], 0, 0
            pieces: list[bytes] = []
            within: dict[bytes, None] = {}
            for at, (before, wanted, after) in enumerate(parts):
                made = schema.bound(wanted, _short_string)
                pieces += [before.encode() + text + after.encode() for text in made.shortest[:1]] + [*made.shortest]
                within.update(dict.fromkeys(made.within))
                frame = len(before.encode()) + len(after.encode()) + made.least
                jump, content = max(jump, made.jump, frame), max(content, made.content)
                text = json.dumps({**made.schema, "x-guidance": JSON_FORM})
                quoted = [json.dumps(side, ensure_ascii=False) if side else "" for side in (before, after)]
                lines.append(f"part{at}: {quoted[0]} json{at} {quoted[1]}\njson{at}: %json {text}")
            rules = "start: " + " | ".join(f"part{at}" for at in range(len(parts)))
            grammar = _matchers().grammar_from_lark("\n".join([rules, *lines]))
            pieces.sort(key=lambda piece: piece[0] == ord("{"))
            return self._compile(grammar, "JSON Schema", jump, content, (*pieces[: schema.PIECES], *within))

        return self._start(f"call {_canonical(parts)}", make, max_tokens)

    def _of_schema(self, wanted: Any) -> _Compiled:
        made = schema.bound(wanted, _short_string)
        grammar = _matchers().grammar_from_json_schema(json.dumps(made.schema), overrides=JSON_FORM)
        return self._compile(grammar, "JSON Schema", made.jump, made.content, (*made.shortest, *made.within))

    def _compile(
        self, grammar: str, what: str, jump: int, content: int, pieces: tuple[bytes, ...] = ()
    ) -> _Compiled:
        is_json = what == "JSON Schema"
        from llguidance import LLMatcher, LLParserLimits

        if max(jump, content) > LARGEST:
            raise ConstraintError(f"the {what} repeats too much; ask for less at once.")
        twin = _twin(grammar)
        if twin.is_error():
            raise ConstraintError(f"the {what} cannot be used: {_said(twin.get_error())}.")
        probe = twin.deep_copy()
        probe.compute_bitmask()
        if probe.is_error():  # it can be written down but not begun
            raise ConstraintError(f"no text fits the {what}.")
        close = closing.ending(twin, pieces, is_json)
        if close is None:
            raise ConstraintError(f"the {what} has no end that could be found; make it smaller or bound what repeats.")
        matcher = LLMatcher(self.tokens, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise ConstraintError(f"the {what} cannot be used: {_said(matcher.get_error())}.")
        return _Compiled(matcher, twin, close, jump, content, pieces, is_json)

    def _start(self, key: str, make: Callable[[], _Compiled], max_tokens: int) -> Constraint:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if found is None:
            found = make()
            with self._lock:
                self._kept[key] = found
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        with self._lock:
            begun = Closing(self, found)
        if begun.needs > max_tokens:
            raise ConstraintError(f"the shortest answer that fits takes {begun.needs} tokens, and max_tokens is "
                                  f"{max_tokens}; allow more.")  # fmt: skip
        return begun


class Closing:
    """A Constraint that ends in time; see the head of this file."""

    def __init__(self, grammars: Grammars, compiled: _Compiled) -> None:
        self._all = grammars
        self._matcher, self._twin = compiled.matcher.deep_copy(), compiled.twin.deep_copy()
        self._jump, self._content = compiled.jump, compiled.content
        self._pieces, self._is_json = compiled.pieces, compiled.is_json
        self._ended = False
        self._lost = False  # whether no ending was found for the text as it stands; `_close` is that of an earlier one
        self._close = compiled.close
        self._tokens, self._end = self._in_tokens(self._twin, self._matcher, compiled.close)

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._ended or bool(self._twin.is_stopped() and self._twin.is_accepting())

    @property
    def needs(self) -> int:
        """Tokens that close the text as it stands, the end token included where one is needed."""
        return len(self._tokens) + self._end

    def mask(self, left: int) -> np.ndarray | None:
        """bool [vocabulary]: what may come next so that `left` tokens, this one included, are enough to the end."""
        if self.finished:
            return self._only(self._all.eos)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check(self._matcher)
        allowed = np.unpackbits(bits, bitorder="little")[: self._all.vocabulary].astype(bool)
        wide = int(allowed.sum()) > min(WIDE, self._all.vocabulary // 2)
        if wide:
            plain = self._all.choices == 1
            grows = np.where(plain, self._content, self._content + self._all.choices * self._jump)
        else:
            grows = (self._all.choices + 1) * self._jump
        if self._lost and (grows[allowed] > left - 1 - self.needs).any():
            self._look(closing.ending(self._twin, (self._close, *self._pieces), self._is_json, HURRY))
        safe = allowed & (grows <= left - 1 - self.needs)
        safe[list(self._all.eos)] = allowed[list(self._all.eos)]
        unsure = np.flatnonzero(allowed & ~safe)
        if not len(unsure):
            return safe
        if left > self.needs or self._lost:
            shortest = unsure[np.argsort(self._all.lengths[unsure], kind="stable")]
            states = STATES
            for token in map(int, shortest[: LOOKED_AT // 8 if wide else LOOKED_AT]):
                safe[token], states = self._can_close(token, left - 1, states)
        if not self._lost:
            safe[self._tokens[0] if self._tokens else list(self._all.eos)] = True
        elif not safe.any():
            raise ConstraintError(f"no end of the text was found within the {left} tokens that are left; allow more.")
        return safe

    def advance(self, token: int) -> None:
        """The token was chosen. Raises ConstraintError for one that the grammar does not allow."""
        if token in self._all.eos and self._twin.is_accepting():
            self._ended = True
            return
        text = self._all.texts[token] if 0 <= token < self._all.vocabulary else b""
        if self.finished or not text or not self._matcher.consume_token(token):
            self._check(self._matcher)
            raise ConstraintError(f"token {token} is not allowed here.")
        self._twin.consume_tokens(list(text))
        self._check(self._twin)
        if self._tokens and token == self._tokens[0] and not self._lost:
            self._tokens, self._close = self._tokens[1:], self._close[len(text) :]
        else:
            self._look(closing.search(self._twin, self._close, STATES, self._pieces, self._is_json)[0])

    def _look(self, found: bytes | None) -> None:
        """What was found closes the text now. Where nothing was, the last ending is kept for later searches only."""
        self._lost = found is None
        if found is not None:
            self._close = found
            self._tokens, self._end = self._in_tokens(self._twin, self._matcher, found)

    def _in_tokens(self, twin: Any, matcher: Any, close: bytes) -> tuple[list[int], int]:
        """The ending in as few tokens as a greedy split gives, and whether an end token must follow (1) or not (0)."""
        whole = next((at for at, byte in enumerate(close) if byte & 0xC0 != 0x80), len(close))  # of the last character
        tokens = [self._all.single.get(close[at : at + 1], -1) for at in range(whole)]
        tokens += self._all.tokens.greedy_tokenize(close[whole:].decode("utf-8", "replace"))
        written = b"".join(self._all.texts[at] for at in tokens)
        if -1 in tokens or written != close or matcher.validate_tokens(tokens) < len(tokens):
            if any(bytes([byte]) not in self._all.single for byte in close):
                raise ConstraintError("the vocabulary of this model cannot write what this constraint demands.")
            tokens = [self._all.single[bytes([byte])] for byte in close]
        after = twin.deep_copy()
        after.consume_tokens(list(close))
        return tokens, 0 if after.is_stopped() else 1

    def _can_close(self, token: int, left: int, states: int) -> tuple[bool, int]:
        """Whether at most `left` tokens can close the text after `token`, and the states of search that are left."""
        text = self._all.texts[token]
        if len(self._close) + 1 <= left and closing.follows(self._twin, text, self._close):
            return True, states
        twin = self._twin.deep_copy()
        if not text or states <= 0 or not twin.consume_tokens(list(text)):
            return False, states
        few = min(states, STATES // 8)
        found, rest = closing.search(twin, self._close, few, self._pieces, self._is_json)
        states -= few - rest
        if found is None or len(found) + 1 <= left:
            return found is not None, states
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token)
        tokens, end = self._in_tokens(twin, matcher, found)
        return len(tokens) + end <= left, states

    def _only(self, tokens: Sequence[int]) -> np.ndarray:
        mask = np.zeros(self._all.vocabulary, bool)
        mask[list(tokens)] = True
        return mask

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():
            words = _said(matcher.get_error()).removeprefix("parser error: ")
            raise ConstraintError(f"the constraint became too complex ({words}); make it smaller or less ambiguous.")


JSON_FORM = {"whitespace_flexible": False, "coerce_one_of": True}


def _matchers() -> Any:
    from llguidance import LLMatcher

    return LLMatcher


def _short_string(wanted: dict[str, Any]) -> bytes | None:
    """A short string, in its quotes, for the schema of one."""
    pattern = str(wanted.get("pattern", ""))
    texts = closing.literals(pattern)
    # A pattern may begin anywhere in the string, which hides from a search how far it has come; a text that matches by
    # itself is found by reading it.
    short = expression.read(pattern)[0]
    quoted = () if short is None else (json.dumps(short, ensure_ascii=False).encode("utf-8", "replace"),)
    grammar = _matchers().grammar_from_json_schema(json.dumps(wanted), overrides=JSON_FORM)
    return closing.ending(_twin(grammar), (*quoted, *texts), True, 0.5)


def _twin(grammar: str) -> Any:
    """A matcher over bytes."""
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher(closing.byte_tokenizer(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ConstraintError("the JSON Schema is no JSON.") from None


def _said(error: str) -> str:
    """The first line of what llguidance says, without the grammar it quotes."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    last = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "it is not understood")
    if "too big" in last or "TooComplex" in last:
        return "it is too large"
    return last.removeprefix("error:").strip()[:200].rstrip(".")
