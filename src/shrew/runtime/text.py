"""Tokens into text, piece by piece: never half a character, and nothing of a stop string."""

import codecs
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from shrew.runtime.request import Token

CONTEXT = 6  # tokens before the text that decide how its first one is spelt
PATIENCE = 8  # tokens that may be waited for to complete a character; after that it is no character
LOST = "\N{REPLACEMENT CHARACTER}"


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where it can be seen, else the next
    one from 256 on (as GPT-2 has it)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


ALPHABET = _byte_alphabet()


class Vocabulary:
    """What the tokens of one tokenizer say. Shared by all streams, from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        kind = json.loads(tokenizer.decoder.__getstate__())["type"] if tokenizer.decoder is not None else ""
        self.is_bytes = kind == "ByteLevel"
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def content(self, id: int) -> bytes:
        """What a token of a byte-level vocabulary adds to the text; nothing for a special one."""
        if (found := self._bytes.get(id)) is None:
            found = self._bytes[id] = b"" if id in self.special else self._spelt(id)
        return found

    def _spelt(self, id: int) -> bytes:
        name = self.tokenizer.id_to_token(id) or ""
        try:
            return bytes([ALPHABET[letter] for letter in name])
        except KeyError:  # an added token, which stands as it is
            return name.encode("utf-8")

    def text(self, id: int) -> str:
        """A token by itself, special ones by their names; what is no whole character shows as U+FFFD."""
        if (found := self._texts.get(id)) is None:
            name = self.tokenizer.id_to_token(id) or ""
            if id in self.special:
                found = name
            elif self.is_bytes:
                found = self._spelt(id).decode("utf-8", "replace")
            elif name.startswith("▁"):  # decoders drop the space before the first word
                found = name.replace("▁", " ")
            else:
                found = self.tokenizer.decode([id], skip_special_tokens=False)
            self._texts[id] = found
        return found

    def stream(self, before: Sequence[int] = ()) -> "Stream":
        """Decodes what follows the tokens `before`, one token at a time."""
        return ByteStream(self) if self.is_bytes else WindowStream(self, before)


class ByteStream:
    """Of a byte-level vocabulary: the bytes one after the other, exactly as the tokenizer decodes them all at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, id: int) -> str:
        return self._decode(self._vocabulary.content(id))

    def end(self) -> str:
        """What is left of a character that was never completed."""
        return self._decode(b"", True)


class WindowStream:
    """Of any other vocabulary: the last tokens are decoded with and without the new one, and the difference is new.

    A decoder may drop the space before the first token, so the window always starts with tokens that say something.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int]) -> None:
        self._decode = vocabulary.tokenizer.decode
        start = max(len(before) - CONTEXT, 0)
        while start and not self._decode(before[start:]).strip():
            start = max(start - CONTEXT, 0)
        self._ids = list(before[start:])
        self._said = self._decode(self._ids)
        self._waiting = 0  # tokens at the end of the window whose text is not out yet

    def feed(self, id: int) -> str:
        self._ids.append(id)
        self._waiting += 1
        text = self._decode(self._ids)
        if text.endswith(LOST) and self._waiting < PATIENCE:
            return ""
        return self._out(text)

    def end(self) -> str:
        return self._out(self._decode(self._ids)) if self._waiting else ""

    def _out(self, text: str) -> str:
        new = text[len(self._said) :]
        recent = self._ids[-self._waiting :]
        said = self._decode(recent)
        # A window that says nothing would lose the next space; one that ends within a character would change.
        self._ids, self._said = (recent, said) if said.strip() and LOST not in said else (self._ids, text)
        self._waiting = 0
        return new


Stream = ByteStream | WindowStream


class Stops:
    """Looks for stop strings in text that comes in pieces, and holds back what may be the beginning of one.

    The one that is complete first ends the text, so how it was cut into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._most = max(map(len, stops), default=1) - 1
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string came after it."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        size = next(
            (size for size in range(min(self._most, len(text)), 0, -1) if self._begins(text[-size:])),
            0,
        )
        self._held = text[len(text) - size :]
        return text[: len(text) - size], False

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


class Watch:
    """Tells when a text is stopped by one of its strings; shows nothing."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int], stops: Sequence[str]) -> None:
        self._stream, self._stops = vocabulary.stream(before), Stops(stops)

    def feed(self, id: int) -> bool:
        text = self._stream.feed(id)
        return bool(text) and self._stops.feed(text)[1]


class Writer:
    """The text of one answer, and which tokens are behind which part of it."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._vocabulary, self._stream = vocabulary, vocabulary.stream(before)
        self._stops = Stops(stops) if stops else None
        self._made = self._shown = 0  # characters decoded, and given out
        self._tokens: list[tuple[int, Token]] = []  # not given out, each with where its text starts

    def token(self, id: int, logprob: float | None = None, top: tuple[Any, ...] = ()) -> Token:
        return Token(id, self._vocabulary.text(id), logprob, top)

    def feed(self, id: int, logprob: float | None, top: tuple[Any, ...]) -> str:
        """What can be shown after one more token."""
        self._tokens.append((self._made, self.token(id, logprob, top)))
        return self._show(self._stream.feed(id))

    def _show(self, text: str, last: bool = False) -> str:
        self._made += len(text)
        if self._stops:
            text, stopped = self._stops.feed(text)
            if stopped:
                self._stops = None
                self._shown += len(text)
                self._tokens = [item for item in self._tokens if item[0] < self._shown]
                return text
            if last:
                text += self._stops.end()
        self._shown += len(text)
        return text

    def end(self, stopped: bool) -> str:
        """What is left at the end; after a stop string nothing is."""
        return "" if stopped else self._show(self._stream.end(), last=True)

    def behind(self, last: bool = False) -> tuple[Token, ...]:
        """The tokens of the text shown since the last time; with `last`, all that are left."""
        count = len(self._tokens)
        if not last:
            count = sum(start < self._shown for start, _ in self._tokens)
        out, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(token for _, token in out)
