"""Dropping tokens: the tokenizer itself is the oracle of its encoding afterwards, the whole model of the logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    XLMRobertaTokenizer,
)

from shrew import folder
from shrew.errors import DataError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves import MOVES, Context, Source, apply_moves, parse_moves, vocabulary
from shrew.moves.source import context_of, suited
from shrew.moves.trim_vocab import TrimVocab, with_rows

CORPUS = ["The cat sees the dog.", "the elk helps a gnu, café naïve", "ant bee cat dog elk fox", "seeing helping hears"]


def trained(kind: str) -> tuple[Tokenizer, Any]:
    tokenizer = Tokenizer(getattr(models, kind)(**({} if kind in ("BPE", "Unigram") else {"unk_token": "[UNK]"})))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, getattr(trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")


def byte_bpe(_: Path) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<eos>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def plain(place: Path) -> Any:
    """As `shrew train` makes them, with a token that was added later and a template."""
    tokenizer = byte_bpe(place)
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for message in messages %}<|user|>{{ message['content'] }}<eos>{% endfor %}"
    return made


def by_class(kind: Any, content: dict[str, Any], **names: str) -> Any:
    return kind(vocab=content["vocab"], merges=[tuple(pair) for pair in content["merges"]], **names)


def gpt2(place: Path) -> Any:
    return by_class(GPT2Tokenizer, json.loads(byte_bpe(place).to_str())["model"], unk_token="<eos>", eos_token="<eos>",
                    bos_token="<eos>", pad_token="<eos>")  # fmt: skip


def qwen2(place: Path) -> Any:
    return by_class(Qwen2Tokenizer, json.loads(byte_bpe(place).to_str())["model"], unk_token="<eos>",
                    eos_token="<eos>", pad_token="<eos>")  # fmt: skip


def llama(_: Path) -> Any:
    """BPE over characters with bytes for those that it lacks; every pair that makes a token is a merge, as of tokens
    that were SentencePiece's."""
    tokenizer, trainer = trained("BPE")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS * 3, trainer(vocab_size=100, show_progress=False))
    content = json.loads(tokenizer.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *content["vocab"]]
    known = {name: number for number, name in enumerate(names)}
    merges = [(name[:at], name[at:]) for name in content["vocab"] for at in range(1, len(name))
              if name[:at] in known and name[at:] in known]  # fmt: skip
    return LlamaTokenizer(vocab=known, merges=merges, pad_token="</s>")


def unigram(_: Path) -> Any:
    tokenizer, trainer = trained("Unigram")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS * 3, trainer(vocab_size=60, unk_token="<unk>", show_progress=False,
                                                      special_tokens=["<s>", "<pad>", "</s>", "<unk>"]))  # fmt: skip
    content = json.loads(tokenizer.to_str())["model"]
    return XLMRobertaTokenizer(vocab=[tuple(pair) for pair in content["vocab"]])


def wordpiece(_: Path) -> Any:
    tokenizer, trainer = trained("WordPiece")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS * 3, trainer(vocab_size=120, special_tokens=special, show_progress=False))
    return BertTokenizer(vocab=json.loads(tokenizer.to_str())["model"]["vocab"], do_lower_case=False)


def wordlevel(_: Path) -> Any:
    tokenizer, trainer = trained("WordLevel")
    tokenizer.train_from_iterator(CORPUS, trainer(special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


KINDS: dict[str, Any] = {"plain": plain, "gpt2": gpt2, "qwen2": qwen2, "llama": llama, "unigram": unigram,
                         "wordpiece": wordpiece, "wordlevel": wordlevel}  # fmt: skip
SPELLS_ALL = ("plain", "gpt2", "qwen2", "llama")
OTHER = "zebra Füchse 😀\n\tthe cats"


def small_model(tokenizer: Any, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
              "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(config | more))).eval()


def windows(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    return [np.array(row, np.int64) for row in tokenizer(texts)["input_ids"]]


def context_for(tokenizer: Any, texts: list[str], place: Path, teacher: Any = None) -> Context:
    return Context(windows(tokenizer, texts), [], teacher, 0, place, lambda line: None)


def old_ids(old: Any, new: Any) -> list[int]:
    """For each id of the new tokenizer that of the same token in the old one."""
    known = old.get_vocab()
    return [known[token] for token, _ in sorted(new.get_vocab().items(), key=lambda item: item[1])]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_are_encoded_as_before(kind: str, tmp_path: Path) -> None:
    old = KINDS[kind](tmp_path)
    loaded = Loaded(small_model(old), old)
    texts = CORPUS[:2]
    trimmed = TrimVocab(multiple=1).apply(loaded, context_for(old, texts, tmp_path))
    folder.save(trimmed, tmp_path / "out")
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    back = old_ids(old, new)
    assert back == sorted(back) and len(back) < len(old)
    assert not {"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"} & {
        item.name for item in (tmp_path / "out").iterdir()
    }  # which would still say the old tokens
    for special in (True, False):
        before, after = (item(texts, add_special_tokens=special)["input_ids"] for item in (old, new))
        assert [[back[token] for token in row] for row in after] == before
        assert new.batch_decode(after) == old.batch_decode(before)
    assert new.all_special_tokens == old.all_special_tokens and new.chat_template == old.chat_template
    if kind in SPELLS_ALL:
        (row,) = new([OTHER], add_special_tokens=False)["input_ids"]
        (whole,) = old([OTHER], add_special_tokens=False)["input_ids"]
        assert new.decode(row) == old.decode(whole) and len(row) >= len(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_kept_tokens_are_equal(kind: str, tmp_path: Path) -> None:
    old = KINDS[kind](tmp_path)
    model = small_model(old, tie_word_embeddings=kind in ("plain", "unigram")).double()
    trimmed = TrimVocab(multiple=1).apply(Loaded(model, old), context_for(old, CORPUS[:2], tmp_path))
    assert trimmed.model.config.vocab_size == len(trimmed.tokenizer) < len(old)
    before, after = (torch.tensor([item(CORPUS[0])["input_ids"]]) for item in (old, trimmed.tokenizer))
    with torch.no_grad():
        wanted, found = model(input_ids=before).logits, trimmed.model(input_ids=after).logits
    assert torch.equal(found, wanted[..., old_ids(old, trimmed.tokenizer)])
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    for config in (trimmed.model.config, trimmed.model.generation_config):
        assert [getattr(config, name) for name in names] == [getattr(trimmed.tokenizer, name) for name in names]


@st.composite
def merge_tables(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Characters and merges over them, in any order, several for one token among them."""
    letters = ["a", "b", "c"]
    tokens, merges = list(letters), []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if len("".join(pair)) <= 6 and pair not in merges:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    return tokens, draw(st.permutations(merges))


@settings(max_examples=100)
@given(table=merge_tables(), texts=st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_order_of_merges_is_kept_step_by_step(table: Any, texts: list[str]) -> None:
    tokens, merges = table
    old = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    before = [old.encode(text).tokens for text in texts]
    known = vocabulary.read(json.loads(old.to_str()))
    uses = np.bincount([old.token_to_id(token) for row in before for token in row], minlength=len(tokens))
    kept = vocabulary.choose(known, uses, set(), 0, 1, 1)
    assert {token for row in before for token in row} <= {tokens[number] for number in kept}
    new = Tokenizer.from_str(json.dumps(vocabulary.rewritten(known, kept)))
    assert [new.encode(text).tokens for text in texts] == before
    assert new.get_vocab() == {tokens[old_id]: number for number, old_id in enumerate(kept)}


@settings(max_examples=100)
@given(
    pieces=st.lists(st.text("abc", min_size=2, max_size=4), unique=True, max_size=12),
    scores=st.lists(st.floats(-20, -1), min_size=16, max_size=16),
    texts=st.lists(st.text("abcd", min_size=1, max_size=10), min_size=1, max_size=3),
)
def test_the_best_path_stays_the_best(pieces: list[str], scores: list[float], texts: list[str]) -> None:
    names = ["<unk>", "a", "b", "c", *pieces]
    old = Tokenizer(models.Unigram(list(zip(names, [0.0, *scores], strict=False)), unk_id=0))
    before = [old.encode(text).ids for text in texts]
    known = vocabulary.read(json.loads(old.to_str()))
    uses = np.bincount([token for row in before for token in row], minlength=len(names))
    kept = vocabulary.choose(known, uses, set(), 0, 1, 1)
    new = Tokenizer.from_str(json.dumps(vocabulary.rewritten(known, kept)))
    assert [[kept[token] for token in new.encode(text).ids] for text in texts] == before


def test_unknown_characters_cost_what_they_did() -> None:
    """With bytes to fall back on, single characters may go; the price of one that is not known stays above all."""
    pieces = {"abc": -10.0, "def": -10.0, "ghi": -10.0, "a": -0.1, "cdefghi": -0.1, "b": -35.0, "z": -20.0}
    names = [("<unk>", 0.0), *((name, 0.0) for name in sorted(vocabulary.BYTES)), *pieces.items()]
    old = Tokenizer(models.Unigram(names, unk_id=0, byte_fallback=True))
    assert old.encode("abcdefghi").tokens == ["abc", "def", "ghi"]
    known = vocabulary.read(json.loads(old.to_str()))
    uses = np.bincount(old.encode("abcdefghi").ids + old.encode("acdefghi").ids, minlength=len(names))
    kept = vocabulary.choose(known, uses, set(), 0, 1, 1)
    new = Tokenizer.from_str(json.dumps(vocabulary.rewritten(known, kept)))
    assert "z" not in new.get_vocab() and new.encode("z").tokens == ["<0x7A>"]
    assert new.encode("abcdefghi").tokens == ["abc", "def", "ghi"]


@settings(max_examples=100)
@given(table=merge_tables(), size=st.integers(1, 20), multiple=st.integers(1, 8), seed=st.integers(0, 99))
def test_as_many_as_asked_for_rounded_up(table: Any, size: int, multiple: int, seed: int) -> None:
    tokens, merges = table
    content = {"model": {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": merges}}
    known = vocabulary.read(content)
    uses = np.random.default_rng(seed).integers(0, 5, len(tokens))
    goal = min(len(tokens), -(-size // multiple) * multiple)
    if goal < 3:
        with pytest.raises(SpecError, match="3 tokens have to stay"):
            vocabulary.choose(known, uses, set(), size, 1, multiple)
        return
    kept = vocabulary.choose(known, uses, set(), size, 1, multiple)
    assert len(kept) == goal and kept == sorted(set(kept))
    assert not vocabulary.read(content).with_parts(kept, set(kept))
    assert all(part in kept for number in kept for part in known.parts(number))


def test_the_most_used_stay_and_the_rest_fills_up(tmp_path: Path) -> None:
    old = plain(tmp_path)
    loaded, context = Loaded(small_model(old), old), context_for(old, CORPUS, tmp_path)
    made = [TrimVocab(keep=keep, multiple=8).apply(loaded, context) for keep in (270, 273, 300)]
    sizes = [item.model.config.vocab_size for item in made]
    assert sizes == [272, 280, 304]
    common = TrimVocab(least=2, multiple=1).apply(loaded, context).tokenizer.get_vocab().keys()
    used = np.bincount(np.concatenate(context.calibration), minlength=len(old))
    assert {old.convert_ids_to_tokens(int(number)) for number in np.flatnonzero(used >= 2)} <= common
    heard: list[str] = []
    all_of_it = TrimVocab(keep=10_000).apply(loaded, Context(context.calibration, [], None, 0, tmp_path, heard.append))
    assert all_of_it is loaded and "nothing is cut" in heard[0]


def test_rows_that_no_token_has_go(tmp_path: Path) -> None:
    old = plain(tmp_path)
    trimmed = TrimVocab(keep=10_000).apply(Loaded(small_model(old, vocab_size=384, pad_token_id=383), old),
                                           context_for(old, CORPUS, tmp_path))  # fmt: skip
    assert trimmed.model.config.vocab_size == len(old) and trimmed.model.config.pad_token_id is None
    assert trimmed.tokenizer.get_vocab() == old.get_vocab()


def test_codes_lose_their_rows(trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path) -> None:
    """A packed embedding stays packed, in the file too: exactly the rows that are left."""
    flags = ["--method", "rtn", "--embeddings", "--out", tmp_path / "packed"]
    assert apply(trained_llama_folder, "quantize", *flags)[0] == 0
    code, said = apply(tmp_path / "packed", "trim-vocab", "--text", stories, "--out", tmp_path / "out")
    assert code == 0 and "of 300 tokens stay" in said
    before, after = folder.load(tmp_path / "packed"), folder.load(tmp_path / "out")
    back = old_ids(before.tokenizer, after.tokenizer)
    name = "model.embed_tokens.weight"
    assert torch.equal(after.packed[name].codes, before.packed[name].codes[back]) and len(back) == 288
    sizes = {item.name: item.bytes for item in folder.tensors(tmp_path / "out")}
    assert sizes[name] == 288 * (64 // 2 + 2)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = before.model(input_ids=torch.tensor(back)[ids]).logits[..., back]
        torch.testing.assert_close(after.model(input_ids=ids).logits, wanted)


def test_moves_behind_it_see_the_texts_in_the_tokens_left(
    trained_llama_folder: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "cache"))
    source = Source(model=str(trained_llama_folder), text=[str(stories)], threads=1)
    original = folder.load(trained_llama_folder)
    from shrew.moves.source import open_task

    context = context_of(source, original, open_task(source, original), lambda line: None)
    tables = [{"name": "trim-vocab", "multiple": 1}, {"name": "quantize", "method": "gptq", "group": 0},
              {"name": "distil", "steps": 4, "rows": 2}]  # fmt: skip
    path = apply_moves(trained_llama_folder, parse_moves(tables, "test"), source, context)
    again = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert again.config.vocab_size == len(tokenizer) < 300
    row = tokenizer("The cat sees the", return_tensors="pt")
    made = again.generate(**row, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("The cat sees the")
    there = suited(context, folder.load(path), source)
    assert there.teacher is not None and there.teacher.model.config.vocab_size == len(tokenizer)
    back = old_ids(original.tokenizer, tokenizer)
    wanted = [list(window) for window in context.healing]
    assert [[back[token] for token in window] for window in there.healing] == wanted
    assert suited(context, original, source) is context


def test_a_classifier_answers_as_before(tiny_classifier_folder: Path, tmp_path: Path) -> None:
    loaded = folder.load(tiny_classifier_folder)
    trimmed = TrimVocab(multiple=1).apply(loaded, context_for(loaded.tokenizer, CORPUS, tmp_path))
    folder.save(trimmed, tmp_path / "out")
    again = folder.load(tmp_path / "out")
    with torch.no_grad():
        rows = [item.tokenizer(CORPUS[1], return_tensors="pt") for item in (again, loaded)]
        found, wanted = again.model(**rows[0]).logits, loaded.model(**rows[1]).logits
    assert torch.equal(found, wanted) and len(again.tokenizer) < 300


def ours(tokenizer: Any, **more: Any) -> Loaded:
    from shrew.blocks.attention import AttentionSpec
    from shrew.blocks.model import ModelSpec, build

    torch.manual_seed(0)
    spec = ModelSpec(layers=2, width=32, vocabulary=len(tokenizer), zero_init=False,
                     mixers={"A": AttentionSpec(heads=2, value_embeddings=True)}, **more)  # fmt: skip
    return Loaded(build(spec, eos_token_id=tokenizer.eos_token_id).eval(), tokenizer)


def test_our_own_type_with_tables_of_its_own(tmp_path: Path) -> None:
    from shrew.blocks.embeddings import NgramSpec

    old = plain(tmp_path)
    loaded, context = ours(old), context_for(old, CORPUS[:2], tmp_path)
    trimmed = TrimVocab(multiple=1).apply(loaded, context)
    folder.save(trimmed, tmp_path / "out")
    again = folder.load(tmp_path / "out")
    ids = [torch.tensor([item.tokenizer(CORPUS[0])["input_ids"]]) for item in (loaded, again)]
    with torch.no_grad():
        wanted, found = loaded.model(input_ids=ids[0]).logits, trimmed.model(input_ids=ids[1]).logits
    torch.testing.assert_close(found, wanted[..., old_ids(old, again.tokenizer)], rtol=1e-6, atol=1e-7)
    assert again.model.model.layers[0].mixer.value_table.weight.shape[0] == len(again.tokenizer)
    with pytest.raises(UnsupportedError, match="n-gram embeddings hash"):
        TrimVocab().apply(ours(old, ngrams=NgramSpec(rows=16)), context)


def test_what_is_refused(tmp_path: Path) -> None:
    old = plain(tmp_path)
    loaded, context = Loaded(small_model(old), old), context_for(old, CORPUS, tmp_path)
    with pytest.raises(DataError, match="no text to count"):
        TrimVocab().apply(loaded, Context([], [], None, 0, tmp_path, print))
    with pytest.raises(SpecError, match="have to stay"):
        TrimVocab(keep=40).apply(loaded, context)
    with pytest.raises(UnsupportedError, match="do not belong together"):
        TrimVocab().apply(Loaded(small_model(old, vocab_size=300), old), context)
    loaded.model.generation_config.bad_words_ids = [[5]]
    with pytest.raises(UnsupportedError, match="bad_words_ids"):
        TrimVocab().apply(loaded, context)
    loaded.model.generation_config.bad_words_ids = None
    loaded.model.generation_config.suppress_tokens = [old.convert_tokens_to_ids("a"), 339]
    trimmed = TrimVocab(multiple=1).apply(loaded, context_for(old, CORPUS[:1], tmp_path))
    assert trimmed.model.generation_config.suppress_tokens == [trimmed.tokenizer.convert_tokens_to_ids("a")]
    assert MOVES["trim-vocab"] is TrimVocab and with_rows(loaded, range(len(old)), old).model is not loaded.model
