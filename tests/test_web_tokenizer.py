"""The browser's tokenizer, run by node, gives the same tokens and the same text as `tokenizers`."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import shrew
from shrew.errors import FolderError, UnsupportedError
from shrew.packers.web import pattern, tokenizer

SOURCE = Path(shrew.__file__).parent
SCRIPT = SOURCE / "packers" / "web" / "js" / "tokenizer.js"
TEXT = """def f(x):
    return x + 1

  indented\t\ttabs \r\n\r\nand lines\n\n
I'll we've it's DON'T can't naïve café Zażółć gęślą jaźń 3.14159 1234567 12 ½ ٣٤ a_b.c-d/e\\f <html> {x: [1, 2]} $%^&*
你好,世界。今天天气很好 こんにちは世界 カタカナ 한국어 문장 Привет, мир! שלום עולם مرحبا
🙂🙃 👩‍👩‍👧 🇩🇪 e\u0301 \u212b ﬁ ﬀ Ⅷ
""".splitlines(True) * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = r"\p{L}++|(?>\p{N}+)|[^\s\p{L}\p{N}]++\r?+|\s++(?!\S)|\s"


def trained(made: Tokenizer, size: int = 500, alphabet: bool = True, **settings: Any) -> Tokenizer:
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=initial, show_progress=False, **settings)
    made.train_from_iterator(TEXT, trainer)
    return made


def changed(made: Tokenizer, **model: Any) -> Tokenizer:
    """The same tokenizer with other settings of its model."""
    held = json.loads(made.to_str())
    held["model"].update(model)
    return Tokenizer.from_str(json.dumps(held))


def starter() -> Tokenizer:
    return Tokenizer.from_file(str(SOURCE / "models" / "starter" / "tokenizer.json"))


def byte_level(split: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    by = pre_tokenizers.Split(Regex(split), "isolated")
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([by, visible])
    made.decoder = decoders.ByteLevel()
    trained(made, 600)
    made.add_special_tokens(["<|begin|>", "<|end|>", AddedToken("<mask>", lstrip=True, rstrip=True, special=True)])
    made.add_tokens([AddedToken("word", single_word=True), "<|tool|>", AddedToken("<|To", normalized=False), "  "])
    special = [(name, made.token_to_id(name)) for name in ("<|begin|>", "<|end|>")]
    template = processors.TemplateProcessing("<|begin|> $A <|end|>", "<|begin|> $A $B", special)
    made.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return made


def llama3() -> Tokenizer:
    return changed(byte_level(LLAMA3), ignore_merges=True)


def with_prefix_space() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    return trained(made)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece() -> Tokenizer:
    """As Llama 2: spaces as marks, one word for the whole text, bytes for unknown characters."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained(made, 600, False, special_tokens=["<unk>", "<s>", *BYTES], limit_alphabet=60)
    return made


def gemma() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return trained(made, 500, False, special_tokens=["<unk>", *BYTES], limit_alphabet=60)


def metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    made.decoder = decoders.Metaspace("▁", scheme)
    trained(made, 300, False, special_tokens=["<unk>"], limit_alphabet=60)
    made.add_tokens([AddedToken("It", normalized=True), AddedToken("[X]", lstrip=True, normalized=False)])
    return made


def plain() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="?"))
    lower = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    made.normalizer = normalizers.Sequence([*lower, normalizers.Replace(Regex(r"\s{2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(False), pre_tokenizers.Punctuation("contiguous")]
    )
    trained(made, 300, False, special_tokens=["?"], limit_alphabet=60)
    made.add_tokens([AddedToken("café", normalized=True)])
    return made


def digits() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="?", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False)])
    after = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+"), "merged_with_next")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True), after, pre_tokenizers.CharDelimiterSplit("-")]
    )
    return trained(made, 300, False, special_tokens=["?"], limit_alphabet=40)


MADE: dict[str, Callable[[], Tokenizer]] = {
    "starter": starter,
    "llama3": llama3,
    "gpt4o": lambda: byte_level(GPT4O),
    "possessive": lambda: byte_level(POSSESSIVE),
    "prefix-space": with_prefix_space,
    "sentencepiece": sentencepiece,
    "gemma": gemma,
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-always": lambda: metaspace("always"),
    "plain": plain,
    "digits": digits,
}


class Node:
    """The browser's tokenizer in a node process, a line of JSON at a time."""

    PROGRAM = """
import { createInterface } from "node:readline";
import { readFileSync } from "node:fs";
const { Tokenizer } = await import(process.argv[1]);
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[2], "utf8")));
for await (const line of createInterface({ input: process.stdin })) {
  const { encode, decode, prompt } = JSON.parse(line);
  let answer;
  if (encode !== undefined) answer = [tokenizer.encode(encode), tokenizer.encode(encode, false)];
  else if (prompt === undefined) answer = [tokenizer.decode(decode), tokenizer.decode(decode, false)];
  else {
    const stream = tokenizer.stream(prompt);
    answer = [...decode.map((id) => stream.push(id)), stream.end()];
  }
  console.log(JSON.stringify(answer));
}
"""

    def __init__(self, spec: Path) -> None:
        command = ["node", "--input-type=module", "-e", self.PROGRAM, SCRIPT.as_uri(), str(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module", params=MADE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokenizer, Node]]:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("tokenizer")
    made = MADE[request.param]()
    made.save(str(folder / "tokenizer.json"))
    (folder / "spec.json").write_text(json.dumps(tokenizer.compiled(folder / "tokenizer.json")), "utf-8")
    node = Node(folder / "spec.json")
    yield Tokenizer.from_file(str(folder / "tokenizer.json")), node
    node.close()


# Letters that were assigned years ago: a newer Unicode in node than in tokenizers may give another normal form.
LETTERS = st.characters(codec="utf-8", exclude_categories=("Cn", "Cs"))
WORDS = """'s 'LL 'ſ e\u0301 \u0345 \u3000 \u200b \ufeff İ Σ ẞ ﬁ Ⅷ ½ ٣ ÿ 你好 한국 🙂 👩‍👩‍👧 🇩🇪 \U0001f1e6 ▁ \ufffd def
self. 12345 - ... <|end|> <|begin|> <|To <|tool|> <mask> word wordy It [X] café CAFÉ <0x41> <unk> <s> Hello \0"""
HARD = st.sampled_from([*WORDS.replace("\n", " ").split(" "), " ", "  ", "\n", "\r\n", "\t", "\xa0", "\x85"])
MIXED = st.lists(st.one_of(HARD, st.text(LETTERS, max_size=3)), max_size=12).map("".join)
TEXTS = st.one_of(st.text(LETTERS, max_size=40), MIXED)


@settings(max_examples=100)
@given(texts=st.lists(TEXTS, max_size=8))
@example(texts=["".join(TEXT), SCRIPT.read_text("utf-8"), "a" * 3000 + " " * 3000 + "é" * 100, "", " "])
def test_same_tokens_and_same_text(pair: tuple[Tokenizer, Node], texts: list[str]) -> None:
    oracle, node = pair
    for text in texts:
        ids = oracle.encode(text).ids
        assert node.ask(encode=text) == [ids, oracle.encode(text, add_special_tokens=False).ids]
        assert node.ask(decode=ids) == [oracle.decode(ids), oracle.decode(ids, skip_special_tokens=False)]


@settings(max_examples=60)
@given(data=st.data())
def test_any_tokens_give_the_same_text_whole_or_in_pieces(pair: tuple[Tokenizer, Node], data: st.DataObject) -> None:
    oracle, node = pair
    number = st.integers(0, oracle.get_vocab_size() + 3)  # a model may know more tokens than its tokenizer
    ids = data.draw(st.lists(number, max_size=30))
    assert node.ask(decode=ids) == [oracle.decode(ids), oracle.decode(ids, skip_special_tokens=False)]


@settings(max_examples=60)
@given(text=TEXTS, more=TEXTS)
def test_pieces_join_to_the_text_and_split_no_character(pair: tuple[Tokenizer, Node], text: str, more: str) -> None:
    oracle, node = pair
    before, after = (oracle.encode(part, add_special_tokens=False).ids for part in (text, more))
    pieces = node.ask(prompt=before, decode=after)
    whole = oracle.decode(before + after)
    if whole.startswith(oracle.decode(before)):
        assert whole == oracle.decode(before) + "".join(pieces)
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(pair: tuple[Tokenizer, Node]) -> None:
    oracle, node = pair
    for text in ("a\ud83d", "\udc00b\ud83d\ude42", "\udc00\ud800x"):
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert node.ask(encode=text)[0] == oracle.encode(whole).ids


@pytest.mark.parametrize(
    "source", [LLAMA3, GPT4O, POSSESSIVE, r"[^\w\s]|\d{2,}?|\\[a-z&&[^b]]", r"[]x]|(?i)é[[:upper:]]"]
)
def test_patterns_split_alike(source: str) -> None:
    """Every character alone between two others, in both engines."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    letters = [chr(number) for number in pattern.CHARACTERS if number < 0x3400 or number > 0xF000]
    text = "".join(f"x1{letter}{letter} " for letter in letters)
    pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(source), "isolated").pre_tokenize_str(text)]
    program = """
const { text, source } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const found = [];
let last = 0;
for (const match of text.matchAll(new RegExp(source, "gu"))) {
  if (match.index > last) found.push(text.slice(last, match.index));
  found.push(match[0]);
  last = match.index + match[0].length;
}
if (last < text.length) found.push(text.slice(last));
process.stdout.write(JSON.stringify(found));
"""
    asked = json.dumps({"text": text, "source": pattern.translate(source)})
    done = subprocess.run(["node", "-e", program], input=asked, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pieces


@pytest.mark.parametrize(
    ("source", "words"),
    {"^a": "'^'", "a$": "'$'", r"(a)\1": r"'\1'", r"\bfoo": r"'\b'", "(?<name>a)": "'(?<n", "a**": "repeated",
     "a)": "stray ')'", "(a": "open '('", "[a": "open '['"}.items(),
)  # fmt: skip
def test_a_pattern_without_a_form_here_is_refused(source: str, words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pattern.translate(source)
    assert words in str(caught.value)


def test_a_tokenizer_without_a_form_here_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def refused(made: Tokenizer, words: str) -> None:
        made.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(UnsupportedError) as caught:
            tokenizer.compiled(tmp_path / "tokenizer.json")
        assert words in str(caught.value) and str(caught.value).count(".") <= 2

    refused(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), "a WordPiece model")
    refused(Tokenizer(models.Unigram([("a", 0.0)], 0, False)), "a Unigram model")
    refused(Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)), "dropout")
    for part, made, words in [
        ("normalizer", normalizers.BertNormalizer(), "the normalizer BertNormalizer"),
        ("pre_tokenizer", pre_tokenizers.UnicodeScripts(), "the pre-tokenizer UnicodeScripts"),
        ("decoder", decoders.CTC(), "the decoder CTC"),
        ("post_processor", processors.BertProcessing(("a", 0), ("a", 0)), "the post-processor BertProcessing"),
    ]:
        tokens = Tokenizer(models.BPE({"a": 0}, []))
        setattr(tokens, part, made)
        refused(tokens, words)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(FolderError, match="is not a tokenizer"):
        tokenizer.compiled(tmp_path / "tokenizer.json")
