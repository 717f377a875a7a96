"""Tokens into text: any text, cut anywhere, comes out as it was, and stop strings never show."""

from itertools import pairwise

import pytest
import tiny_pack
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from shrew.runtime.text import Stops, Stream, Vocabulary, Watch, Writer

BYTES = tiny_pack.tokenizer()
BYTES.add_tokens([AddedToken("<think>", special=False), AddedToken("日本", special=False)])
WORDS = ["▁", "▁the", "▁a", "he", "t", "a", "▁▁▁▁", "é", "▁日", "x", ".", "\n", "\N{REPLACEMENT CHARACTER}"]
ID_OF = {Vocabulary(BYTES).content(id): id for id in range(BYTES.get_vocab_size())}


def _llama() -> Tokenizer:
    """As Llama 2 and Gemma have it: words with their space, bytes for what is not in the vocabulary."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _metaspace() -> Tokenizer:
    names = ["<unk>", "<s>", *WORDS]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, [], unk_token="<unk>"))
    made.add_special_tokens(["<s>"])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def _wordpiece() -> Tokenizer:
    names = ["[UNK]", "[CLS]", "the", "##re", "re", "##s", ".", "is"]
    made = Tokenizer(models.WordPiece({name: id for id, name in enumerate(names)}, unk_token="[UNK]"))
    made.add_special_tokens(["[CLS]"])
    made.decoder = decoders.WordPiece()
    return made


LLAMA, OTHERS = _llama(), {"llama": _llama(), "metaspace": _metaspace(), "wordpiece": _wordpiece()}


def streamed(tokenizer: Tokenizer, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream: Stream = Vocabulary(tokenizer).stream(before or [])
    return [*(stream.feed(id) for id in ids), stream.end()]


@given(st.text(max_size=30))
def test_any_text_streams_as_it_is(text: str) -> None:
    pieces = streamed(BYTES, BYTES.encode(text).ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=30))
def test_any_tokens_stream_as_they_decode_at_once(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@given(st.lists(st.integers(3, 258).map(chr), max_size=12).map("".join), st.lists(st.integers(0, 255), max_size=6))
def test_a_character_is_never_split(text: str, more: list[int]) -> None:
    content = text.encode() + bytes(more)
    ids = [ID_OF[bytes([byte])] for byte in content]
    pieces = streamed(BYTES, ids)
    assert "".join(pieces) == content.decode("utf-8", "replace") == BYTES.decode(ids)
    if not more:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("name", OTHERS)
@given(data=st.data())
def test_other_vocabularies_stream_as_they_decode_at_once(name: str, data: st.DataObject) -> None:
    tokenizer = OTHERS[name]
    first = 259 if name == "llama" else 0  # bytes that are no text are decoded differently at once: see below
    ids = data.draw(st.lists(st.integers(first, tokenizer.get_vocab_size() - 1), max_size=20))
    at = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    if (before := tokenizer.decode(ids[:at])) and whole.startswith(before):
        assert before + "".join(streamed(tokenizer, ids[at:], ids[:at])) == whole
    assert "".join(streamed(tokenizer, ids)) == whole


def test_the_word_after_many_tokens_that_say_nothing_keeps_its_space() -> None:
    tokenizer = OTHERS["wordpiece"]
    before = [tokenizer.token_to_id("[UNK]"), *[tokenizer.token_to_id("[CLS]")] * 20]
    assert "".join(streamed(tokenizer, [0], before)) == tokenizer.decode([*before, 0])[len(tokenizer.decode(before)) :]


@given(st.lists(st.one_of(st.sampled_from(["the ", "a", " ", "日", "é", "x."]), st.text(max_size=3)), max_size=12))
def test_characters_made_of_byte_tokens(parts: list[str]) -> None:
    text = "".join(parts).replace("▁", "")
    ids = LLAMA.encode(text).ids
    pieces = streamed(LLAMA, ids, [LLAMA.token_to_id("x")])
    assert "".join(pieces) == (" " + text if ids else "")
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_not_waited_for() -> None:
    bad = LLAMA.token_to_id("<0xFF>")
    stream = Vocabulary(LLAMA).stream([LLAMA.token_to_id("x")])
    found = [stream.feed(bad) for _ in range(100)]
    assert len("".join(found)) >= 90
    assert stream.feed(LLAMA.token_to_id("a")).endswith("a")


def test_a_token_by_itself() -> None:
    vocabulary = Vocabulary(BYTES)
    assert [vocabulary.text(BYTES.token_to_id(name)) for name in ("<eos>", "<think>", "Ġthe", "Ã", "é")] == [
        "<eos>", "<think>", " the", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]  # fmt: skip
    assert vocabulary.text(BYTES.token_to_id("Ã©")) == "é"
    llama = Vocabulary(LLAMA)
    assert [llama.text(LLAMA.token_to_id(name)) for name in ("▁the", "<s>", "<0x41>")] == [" the", "<s>", "A"]
    assert vocabulary.text(10_000) == ""


# --- stop strings ----------------------------------------------------------------------------------------------------

letters = st.text("ab", min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> str | None:
    """By definition: read letter by letter; the first stop string that is complete ends the text where it starts."""
    for end in range(len(text) + 1):
        ends = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: min(ends)]
    return None


@given(st.lists(st.text("ab", max_size=5), max_size=8), st.lists(letters, max_size=3))
def test_stop_strings_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    text, found, watch, stopped = "".join(pieces), "", Stops(stops), False
    for piece in pieces:
        shown, stopped = watch.feed(piece)
        found += shown
        expected = first_stop(text, stops)
        assert text.startswith(found)
        assert expected is None or len(found) <= len(expected)
        if stopped:
            break
    assert stopped == (first_stop(text, stops) is not None)
    assert found + ("" if stopped else watch.end()) == (text if not stopped else first_stop(text, stops))


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3))
def test_writer_and_watch_agree(text: str, stops: list[str]) -> None:
    ids, vocabulary = BYTES.encode(text).ids, Vocabulary(BYTES)
    writer, watch = Writer(vocabulary, [], stops), Watch(vocabulary, [], stops)
    found, behind, stopped = "", [], False
    for id in ids:
        found += writer.feed(id, None, ())
        behind += writer.behind()
        if watch.feed(id):
            stopped = True
            break
    found += writer.end(stopped)
    behind += writer.behind(last=not stopped)
    expected = first_stop(text, stops)
    assert stopped == (expected is not None)
    assert found == (text if expected is None else expected)
    assert [token.id for token in behind] == ids[: len(behind)]
    if expected is None:
        assert len(behind) == len(ids)
    else:  # no token that begins within the stop string
        lengths = [len("".join(streamed(BYTES, ids[:count])[:-1])) for count in range(len(ids) + 1)]
        assert all(start < len(expected) for start, _ in list(pairwise(lengths))[: len(behind)])
