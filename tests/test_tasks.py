"""Tasks: scores by hand, against slow loops, and what is said about bad files."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from shrew import tasks
from shrew.data import Document
from shrew.errors import DataError, UnsupportedError
from shrew.folder import Loaded
from shrew.tasks import Scores, likelihood
from shrew.tasks.choice import Choice, Question
from shrew.tasks.completion import Completion, Prompt, greedy, matches
from shrew.tasks.labels import Labelled, Labels, chance_f1
from shrew.tasks.text import Text

TEXT = "the shrew is a small mammal with a large brain and it eats twice its weight each day"
WORDS = TEXT.split()


def sentences(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(2, longest))) + f" {n}." for n in range(count)]


def make_tokenizer(special: dict[str, str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=sorted(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sentences(50, seed=9), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


BOTH = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def llama() -> Loaded:
    return small_llama(BOTH)


def small_llama(special: dict[str, str], seed: int = 0) -> Loaded:
    tokenizer = make_tokenizer(special)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.2, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    return Loaded(LlamaForCausalLM(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def gpt2() -> Loaded:
    tokenizer = make_tokenizer({"eos_token": "<|end|>"})
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=48,
                        initializer_range=0.2, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return Loaded(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def olmoe() -> Loaded:
    tokenizer = make_tokenizer(BOTH)
    torch.manual_seed(2)
    config = OlmoeConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
                         max_position_embeddings=64, initializer_range=0.2, pad_token_id=1)  # fmt: skip
    return Loaded(OlmoeForCausalLM(config).eval(), tokenizer)


def text_task(texts: list[str]) -> Text:
    return Text(splits={"final": [Document(f"d{n}", text) for n, text in enumerate(texts)]})


def slow_log_probs(loaded: Loaded, ids: list[int], window: int, stride: int) -> list[float]:
    """The definition, token by token: the context of token i is what the sliding window lets it see."""
    found = []
    for at in range(1, len(ids)):
        if at < window:
            start = 0
        else:
            steps = (at - window) // stride + 1
            start = max(0, min(window + steps * stride, len(ids)) - window)
        with torch.no_grad():
            row = loaded.model(input_ids=torch.tensor([ids[start:at]])).logits[0, -1].double()
        found.append(float(row.log_softmax(-1)[ids[at]]))
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_bits_per_byte_equals_the_slow_definition(name: str, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    texts = ["Ein Übermaß an 数据.", *sentences(4, 8), " ".join(sentences(6, 40))]
    scores = text_task(texts).score(loaded, "final")
    window = likelihood.context_length(loaded.model)
    start = {"llama": 2, "gpt2": 0, "olmoe": 2}[name]  # <s>, or the end token that separates documents
    for row, text in enumerate(texts):
        ids = [start, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        wanted = -sum(slow_log_probs(loaded, ids, window, window * 3 // 4)) / math.log(2)
        assert scores.columns["bits"][row] == pytest.approx(wanted, rel=1e-4)
        assert scores.columns["bytes"][row] == len(text.encode())
        assert scores.columns["tokens"][row] == len(ids) - 1
    assert len(ids) > 2 * window  # the last text needed the sliding context
    assert scores.value() == pytest.approx(scores.columns["bits"].sum() / sum(len(t.encode()) for t in texts))


def test_without_special_tokens_the_first_token_costs_log2_of_the_vocabulary() -> None:
    loaded = small_llama({})
    scores = text_task(["a"]).score(loaded, "final")
    assert loaded.tokenizer("a", add_special_tokens=False)["input_ids"].__len__() == 1
    assert scores.columns["bits"][0] == pytest.approx(math.log2(len(loaded.tokenizer)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_text_scores_do_not_depend_on_batching(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    task = text_task(sentences(12, 60))
    together = task.score(loaded, "final", reference=loaded)
    monkeypatch.setattr(likelihood, "LOGITS", 1)  # one row at a time, one scored token a pass
    monkeypatch.setattr(likelihood, "ROWS", 1)
    alone = task.score(loaded, "final", reference=loaded)
    for column in together.columns:
        np.testing.assert_allclose(together.columns[column], alone.columns[column], rtol=1e-4, atol=1e-6)


def test_kl_and_agreement_by_hand(llama: Loaded) -> None:
    other = small_llama(BOTH, seed=5)
    text = sentences(1, 20)[0]
    scores = text_task([text]).score(other, "final", reference=llama)
    ids = torch.tensor([[llama.tokenizer.bos_token_id, *llama.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        old, new = (m.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for m in (llama, other))
    kl = torch.nn.functional.kl_div(new, old, log_target=True, reduction="sum") / math.log(2)
    assert scores.columns["kl_bits"][0] == pytest.approx(float(kl), rel=1e-5)
    assert scores.columns["agree"][0] == (old.argmax(1) == new.argmax(1)).sum()
    itself = text_task([text]).score(llama, "final", reference=llama)
    assert itself.columns["kl_bits"][0] == pytest.approx(0, abs=1e-9)
    assert itself.ratio("agree", "tokens") == 1


def test_a_reference_with_another_vocabulary_gives_no_kl(llama: Loaded, gpt2: Loaded) -> None:
    assert "kl_bits" not in text_task(["some text"]).score(llama, "final", reference=gpt2).columns


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(2, 64), st.integers(1, 64), st.integers(1, 99)
)
def test_spans_score_every_token_once(lengths: list[int], window: int, stride: int, most: int) -> None:
    stride = min(stride, window - 1)
    rows = [[0] * length for length in lengths]
    scored = [np.zeros(length, int) for length in lengths]
    for span in likelihood.spans(rows, window, stride, most):
        assert 0 <= span.start < span.score < span.end <= span.start + window
        assert span.end - span.score <= most
        assert span.start == 0 or span.score - span.start >= window - stride
        scored[span.row][span.score : span.end] += 1
    assert all((row[1:] == 1).all() for row in scored)


def test_classifier_scores_by_hand_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(BOTH)
    torch.manual_seed(3)
    names = {0: "cat", 1: "dog", 2: "shrew"}
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64, id2label=names,
                        label2id={v: k for k, v in names.items()}, initializer_range=0.5,
                        pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    loaded = Loaded(BertForSequenceClassification(config).eval(), tokenizer)
    texts = [*sentences(9), "long " * 200]
    truth = ["cat", "dog", "shrew", "dog", "cat", "cat", "dog", "shrew", "cat", "dog"]
    items = [Labelled(str(n), text, label) for n, (text, label) in enumerate(zip(texts, truth, strict=True))]
    task = Labels(splits={"final": items}, labels=("cat", "dog", "shrew"))
    scores = task.score(loaded, "final")
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            wanted = int(loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax())
        assert scores.columns["guess"][row] == wanted
    monkeypatch.setattr(likelihood, "TOKENS", 64)  # as many tokens as the longest text: one at a time
    np.testing.assert_array_equal(task.score(loaded, "final").columns["guess"], scores.columns["guess"])
    numbers = [Labelled(item.id, item.text, list(names.values()).index(str(item.label))) for item in items]
    by_number = Labels(splits={"final": numbers}, labels=(0, 1, 2)).score(loaded, "final")
    assert by_number.value() == scores.value()
    with pytest.raises(DataError, match=r"label 'cow' .* it knows: cat, dog, shrew"):
        Labels(splits={"final": items}, labels=("cat", "cow")).score(loaded, "final")
    with pytest.raises(DataError, match="label '3'"):
        Labels(splits={"final": numbers}, labels=(0, 3)).score(loaded, "final")
    with pytest.raises(UnsupportedError, match="causal language model"):
        text_task(["x"]).score(loaded, "final")


def test_a_causal_classifier_without_padding_token() -> None:
    tokenizer = make_tokenizer(BOTH)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=2, initializer_range=0.5)  # fmt: skip
    loaded = Loaded(LlamaForSequenceClassification(config).eval(), tokenizer)
    items = [Labelled(str(n), text, n % 2) for n, text in enumerate(sentences(6))]
    scores = Labels(splits={"final": items}, labels=(0, 1)).score(loaded, "final")
    for row, item in enumerate(items):
        with torch.no_grad():
            wanted = int(loaded.model(input_ids=torch.tensor([tokenizer(item.text)["input_ids"]])).logits.argmax())
        assert scores.columns["guess"][row] == wanted


def by_hand(loaded: Loaded, prompt: str, tail: str) -> float:
    """Log-probability of the tail, one token after another."""
    encode = loaded.tokenizer
    start = encode.bos_token_id if encode.bos_token_id is not None else encode.eos_token_id
    head = [start, *encode(prompt, add_special_tokens=False)["input_ids"]]
    end = encode(tail, add_special_tokens=False)["input_ids"]
    ids, total = head + end, 0.0
    window = likelihood.context_length(loaded.model)
    for at in range(len(head), len(ids)):
        with torch.no_grad():
            row = loaded.model(input_ids=torch.tensor([ids[max(0, len(ids) - window) : at]])).logits[0, -1]
        total += float(row.double().log_softmax(-1)[ids[at]])
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_labels_and_choices_by_likelihood(name: str, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    labels = ("mammal", "day", "a large brain")
    texts = [*sentences(5, 12), " ".join(sentences(3, 60))]  # the last is longer than the context
    items = [Labelled(str(n), text, labels[n % 3]) for n, text in enumerate(texts)]
    scores = Labels(splits={"final": items}, labels=labels).score(loaded, "final")
    for row, text in enumerate(texts):
        found = [by_hand(loaded, f"{text}\nLabel:", f" {label}") / len(f" {label}") for label in labels]
        assert scores.columns["guess"][row] == int(np.argmax(found))
    questions = [Question(str(n), text, ("its weight", "brain and it", "é")[: 2 + n % 2], n % 2)
                 for n, text in enumerate(texts)]  # fmt: skip
    scores = Choice(splits={"final": questions}).score(loaded, "final")
    right = []
    for item in questions:
        found = [by_hand(loaded, item.question, f" {option}") / len(f" {option}".encode()) for option in item.options]
        right.append(float(np.argmax(found) == item.answer))
    assert scores.columns["correct"].tolist() == right
    assert scores.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores.value() == pytest.approx(np.mean(right))


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_greedy_answers_do_not_depend_on_batching(name: str, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    prompts = [*sentences(7, 12), " ".join(sentences(3, 60)), ""]
    lengths = [1, 4, 9, 2, 7, 3, 5, 8, 6]
    alone = greedy(loaded, prompts, lengths, rows=1)
    assert greedy(loaded, prompts, lengths, rows=9) == alone
    start = likelihood.first_token(loaded.tokenizer)
    ids = [start, *loaded.tokenizer(prompts[2], add_special_tokens=False)["input_ids"]]
    for _ in range(9):
        with torch.no_grad():
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert loaded.tokenizer.decode(ids[-9:]) == alone[2]


def test_completion_scores_what_the_model_says(llama: Loaded) -> None:
    prompts = sentences(4, 12)
    # whatever the model says is by definition the right completion; something else is not
    said = [next(text for text in greedy(llama, [prompt], [6])) for prompt in prompts]
    items = [Prompt(str(n), prompt, text) for n, (prompt, text) in enumerate(zip(prompts, said, strict=True))]
    items.append(Prompt("wrong", prompts[0], "zebra"))
    scores = Completion(splits={"final": items}).score(llama, "final")
    lengths = [len(ids) for ids in likelihood.token_ids(llama.tokenizer, [item.completion for item in items])]
    answers = greedy(llama, [item.prompt for item in items], lengths)
    assert scores.columns["correct"].tolist() == [
        float(matches(answer, item.completion)) for answer, item in zip(answers, items, strict=True)
    ]
    assert scores.columns["correct"][4] == 0


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [("4", "4", True), (" 4 ", "4", True), ("4\nnext", "4", True), ("42", "4", False), ("", "4", False),
     ("\n x = 1\n y", "\n x = 1", True), ("a\nb", "a\nb", True), ("a", "a\nb", False)],
)  # fmt: skip
def test_exact_match(answer: str, expected: str, same: bool) -> None:
    assert matches(answer, expected) is same


def label_scores(truth: list[int], guess: list[int], classes: int) -> Scores:
    t, g = np.array(truth), np.array(guess)
    columns = {"truth": t, "guess": g, "correct": (t == g).astype(float)}
    names = tuple(map(str, range(classes)))
    return Scores("labels@1", "final", "macro_f1", [str(n) for n in range(len(t))], columns, classes=names)


def test_macro_f1_by_hand() -> None:
    scores = label_scores([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], 4)
    # class 0: tp 1, fp 1, fn 1 -> 1/2; class 1: tp 2, fp 1 -> 4/5; class 2: 0; class 3 never occurs
    assert scores.value() == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)
    assert scores.value(np.array([2, 3, 3])) == 1
    assert scores.accuracy().value() == pytest.approx(3 / 5)
    assert scores.accuracy().chance == pytest.approx(2 / 5)


def test_chance_of_labels_by_hand() -> None:
    assert chance_f1(np.array([0, 1, 2, 3]), 4) == pytest.approx(1 / 4)  # balanced: uniform guessing
    assert chance_f1(np.array([0] * 9 + [1]), 2) == pytest.approx(2 * 0.9 / 1.9 / 2)  # lopsided: always the commonest


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**31))
def test_weighted_values_equal_repeated_units(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, n, n)
    scores = label_scores(rng.integers(0, classes, n).tolist(), rng.integers(0, classes, n).tolist(), classes)
    again = label_scores(scores.columns["truth"][index].tolist(), scores.columns["guess"][index].tolist(), classes)
    assert scores.value(index) == pytest.approx(again.value())
    assert scores.accuracy().value(index) == pytest.approx(again.accuracy().value())
    assert abs(scores.influence().mean()) < 1e-9
    read = Scores.parse(json.loads(json.dumps(scores.dump())))
    assert read.value(index) == scores.value(index)
    assert (read.task, read.units, read.classes) == (scores.task, scores.units, scores.classes)


@settings(max_examples=30)
@given(st.integers(3, 40), st.integers(0, 2**31))
def test_influence_is_the_derivative(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = Scores("t@1", "final", "bits_per_byte", [str(i) for i in range(n)],
                  {"bits": rng.lognormal(3, 1, n), "bytes": rng.integers(1, 99, n).astype(float)})  # fmt: skip
    labels = label_scores([0, 1, 2, *rng.integers(0, 3, n - 3).tolist()], rng.integers(0, 3, n).tolist(), 3)
    for scores in (bits, labels, labels.accuracy()):
        step = 1e-6
        moved = np.ones((n, n)) + step * np.eye(n)
        slope = (scores.values(moved) - scores.value()) / step * n
        np.testing.assert_allclose(slope, scores.influence(), atol=1e-3 * max(1, np.abs(slope).max()))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"text": f"text {n}", "label": n % 2} for n in range(60)], "labels"),
        ([{"question": f"q {n}", "options": ["a", "b"], "answer": n % 2} for n in range(60)], "choice"),
        ([{"prompt": f"p {n}", "completion": "x"} for n in range(60)], "completion"),
        ([{"text": f"text {n}"} for n in range(60)], "text"),
    ],
)
def test_read_knows_tasks_by_their_keys(rows: list[Any], kind: str, tmp_path: Path) -> None:
    task = tasks.read(write(tmp_path / "mine.jsonl", [*rows, rows[0]]))
    assert isinstance(task, tasks.TASKS[kind])
    assert task.label == "mine@1"
    assert list(task.splits) == ["calibration", "healing", "search", "final"]
    assert all(task.splits.values())
    assert len(task.examples("all")) == len({item.id for item in task.examples("all")}) == 60
    assert "60 examples: calibration" in task.describe()
    assert tasks.read(tmp_path / "mine.jsonl").splits == task.splits


def test_equal_texts_never_straddle_splits(tmp_path: Path) -> None:
    rows = [{"text": f"text {n % 40}", "label": f"{n % 3}"} for n in range(160)]
    task = tasks.read(write(tmp_path / "mine.jsonl", rows))
    homes: dict[str, set[str]] = {}
    for split, items in task.splits.items():
        for item in items:
            homes.setdefault(item.text, set()).add(split)
    assert all(len(where) == 1 for where in homes.values())
    assert len(task.examples("all")) == 120  # 40 texts with 3 labels each
    assert task.dropped == 40
    assert "40 duplicates dropped" in task.describe()


def test_one_long_file_is_cut_into_passages(tmp_path: Path) -> None:
    text = "\n".join(sentences(3000, 20))
    (tmp_path / "novel.txt").write_text(text, "utf-8")
    task = tasks.read(tmp_path / "novel.txt")
    assert isinstance(task, Text) and task.label == "novel@1"
    parts = sorted(task.examples("all"), key=lambda item: int(item.id.rpartition("#")[2]))
    assert "".join(part.text for part in parts) == text
    assert min(len(items) for items in task.splits.values()) >= 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"text": "a", "label": "x"}\n', "has 1 example; a task needs at least 2"),
        (b'{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n', "every line has the label 'x'"),
        (b'{"text": "a", "label": "x"}\n{"text": \n', "line 2: no JSON"),
        (b'{"text": "a", "label": "x"}\n[1]\n', "line 2: expected a JSON object"),
        (b'{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: 'label' must be .* missing"),
        (b'{"text": "a", "label": "x"}\n{"text": 3, "label": "x"}\n', "line 2: 'text' must be a text, and it is 3"),
        (b'{"text": "a", "label": 1.5}\n', "line 1: 'label' must be"),
        (b'{"words": "a"}\n', "no known task has the keys words"),
        (b'{"question": "a", "options": ["x"], "answer": 0}\n', "at least 2 texts"),
        (b'{"question": "a", "options": ["x", "y"], "answer": 2}\n', "0 to 1, and it is 2"),
        (b'{"prompt": "a", "completion": " "}\n', "'completion' is empty"),
        ('{"text": "Übermaß", "label": "x"}\n'.encode("latin-1"), "is not UTF-8"),
        ('{"text": "Übermaß", "label": "x"}\n'.encode("utf-16"), "is not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        tasks.read(path)
    assert "task.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tasks.read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="did you mean 'final'"):
        text_task(["x"]).examples("finale")
    with pytest.raises(DataError, match="the search split is empty"):
        Text(splits={"search": []}).examples("search")


def test_calibration_texts_are_what_the_model_will_read(llama: Loaded) -> None:
    items = [Labelled("1", "a text", "x")]
    assert Labels(splits={"final": items}, labels=("x",)).texts(llama, "final") == ["a text\nLabel: x"]
    question = [Question("1", "two and two are", ("three", "four"), 1)]
    assert Choice(splits={"final": question}).texts(llama, "final") == ["two and two are four"]
    assert Completion(splits={"final": [Prompt("1", "1 + 1 =", " 2")]}).texts(llama, "final") == ["1 + 1 = 2"]
