"""Fill-in-the-middle: the parts are the document, windows keep their size, batches stay a function of the step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shrew import errors, spec
from shrew.data import Batches, Middle, Stream, fill_in_the_middle
from shrew.data.middle import MARKS, rearrange, rearranged
from shrew.train import Loop, Recipe, main, train

PRE, MID, SUF, BOS, EOS = 901, 902, 903, 900, 899
ITEM = Middle(1.0, PRE, MID, SUF, BOS, EOS)


def reassembled(tokens: np.ndarray) -> tuple[list[int], str]:
    """(the document that was rearranged, the form it has)."""
    ids = tokens.tolist()
    head, tail = [], []
    if ids and ids[0] == BOS:
        head, ids = [BOS], ids[1:]
    if ids and ids[-1] == EOS:
        ids, tail = ids[:-1], [EOS]
    if not ids or ids[0] != PRE:
        return head + ids + tail, "plain"
    suffix_at, middle_at = ids.index(SUF), ids.index(MID)
    prefix, suffix, middle = ids[1:suffix_at], ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    if suffix_at == 1:  # SPM writes prefix and middle in one; PSM with an empty prefix reads the same
        return head + middle + suffix + tail, "spm"
    return head + prefix + middle + suffix + tail, "psm"


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 5), (2, 4), (3, 3), (5, 5), (4, 5)])
@pytest.mark.parametrize("suffix_first", [False, True])
def test_the_three_parts_are_the_document(low: int, high: int, suffix_first: bool) -> None:
    tokens = np.arange(10, 15, dtype=np.int64)
    found = rearrange(tokens, low, high, ITEM, suffix_first)
    assert found.dtype == tokens.dtype
    assert sorted(found.tolist()) == [10, 11, 12, 13, 14, PRE, MID, SUF]
    assert reassembled(found)[0] == tokens.tolist()
    prefix, middle, suffix = tokens[:low].tolist(), tokens[low:high].tolist(), tokens[high:].tolist()
    wanted = [PRE, SUF, *suffix, MID, *prefix, *middle] if suffix_first else [PRE, *prefix, SUF, *suffix, MID, *middle]
    assert found.tolist() == wanted


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 1000), st.booleans(), st.booleans())
def test_windows_keep_their_size_and_their_documents(lengths: list[int], seed: int, begins: bool, ends: bool) -> None:
    parts = [[BOS] * begins + list(range(100 * i, 100 * i + n)) + [EOS] * ends for i, n in enumerate(lengths)]
    tokens = np.array([token for part in parts for token in part], dtype=np.int64)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if not len(tokens):
        return
    found, owners = rearranged(tokens, owner, ITEM, np.random.default_rng(seed))
    assert (found.shape, owners.shape) == (tokens.shape, owner.shape)
    assert (np.diff(owners) >= 0).all()
    seen = np.unique(owners)
    for number in seen:
        document, _ = reassembled(found[owners == number])
        if number != seen[-1]:
            assert document == parts[number]
        else:  # what fell off the end of the window fell off the end of the document
            assert document == parts[number][: len(document)]
    assert seen.tolist() == np.unique(owner).tolist()[: len(seen)]


def test_both_forms_come_and_cuts_are_anywhere() -> None:
    tokens, owner = np.arange(20, dtype=np.int64), np.zeros(20, dtype=np.int64)
    forms: dict[str, int] = {}
    firsts = set()
    for seed in range(400):
        found, _ = rearranged(tokens, owner, ITEM, np.random.default_rng(seed))
        document, form = reassembled(found)
        assert document == tokens[:17].tolist()
        forms[form] = forms.get(form, 0) + 1
        if form == "psm":
            firsts.add(found.tolist().index(SUF) - 1)
    assert 150 < forms["psm"] < 250
    assert forms["psm"] + forms["spm"] == 400
    assert firsts == set(range(1, 18))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
def test_the_rate_is_that_of_documents(rate: float) -> None:
    owner = np.repeat(np.arange(600), 10)
    tokens = np.arange(6000, dtype=np.int64) + 1000
    found, _ = rearranged(tokens, owner, Middle(rate, PRE, MID, SUF), np.random.default_rng(0))
    written = 600 / (1 + 0.3 * rate)
    assert (found == PRE).sum() == pytest.approx(rate * written, rel=0.1)
    if not rate:
        assert np.array_equal(found, tokens)


def _stream() -> Stream:
    lengths = [3, 40, 7, 25, 60, 2, 90]
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate([[BOS, *range(100 * i, 100 * i + n - 2), EOS][:n] for i, n in enumerate(lengths)])
    return Stream(tokens.astype(np.uint16), starts, 1000)


def test_a_step_is_a_batch() -> None:
    stream = _stream()
    plain = Batches(stream, 32, 2, seed=3)
    mine, again = (Batches(stream, 32, 2, seed=3, middle=ITEM) for _ in range(2))
    for step in (0, 5, 1, 0):  # in any order, in several epochs
        for one, other in zip(mine[step], again[step], strict=True):
            assert np.array_equal(one, other)
    off = Batches(stream, 32, 2, seed=3, middle=Middle(0.0, PRE, MID, SUF, BOS, EOS))
    for one, other in zip(off[2], plain[2], strict=True):
        assert np.array_equal(one, other)
    epoch = stream.windows(32)
    steps = [tuple(mine[step][0].ravel().tolist()) for step in range(0, epoch * 3)]
    assert len(set(steps)) > epoch  # another epoch cuts elsewhere
    alone = [Batches(stream, 32, 1, 3, rank, 2, ITEM)[1] for rank in range(2)]
    both = mine[1]
    for number in range(3):
        assert np.array_equal(np.concatenate([part[number] for part in alone]), both[number])


def test_targets_are_the_next_tokens_of_the_document() -> None:
    tokens, targets, owner = Batches(_stream(), 32, 4, seed=0, middle=ITEM)[0]
    assert (tokens == PRE).any()
    inside = owner[:, 1:] == owner[:, :-1]
    assert np.array_equal(tokens[:, 1:][inside], targets[:, :-1][inside])


@pytest.mark.parametrize("marks", MARKS, ids=lambda marks: marks[0])
def test_tokens_are_found_under_their_known_names(marks: tuple[str, ...]) -> None:
    class Known:
        bos_token_id, eos_token_id = 1, 2

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, marks[0]: 7, marks[1]: 8, marks[2]: 9}

    assert fill_in_the_middle(Known(), 0.5) == Middle(0.5, 7, 8, 9, 1, 2)


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")))
    return tmp_path


def _values(**changes: Any) -> dict[str, Any]:
    item = {"data": ["my.jsonl"], "out": "out", "tokenizer": "bpe:300", "length": 64, "batch_tokens": 256, "steps": 6,
            "validation": 0.1, "fim": 0.9, "precision": "fp32", "threads": 1, "checkpoint_every": 2}  # fmt: skip
    model = {"layers": 2, "width": 32, "context": 64, "ngrams": {"rows": 50}, "exits": {"every": 1, "layer_skip": 0.4},
             "mixture_of_depths": {"every": 2}, "loops": 2}  # fmt: skip
    return {"train": item | changes, "model": model}


def _train(**changes: Any) -> list[float]:
    train(spec.parse(Recipe, _values(**changes), "r.toml"))
    (path,) = Path("runs").glob(f"{changes.get('out', 'out')}-*/log.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text("utf-8").splitlines()]


class Killed(BaseException):
    """What no handler in the program expects."""


def test_training_with_it_all_resumes_to_the_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, take = [], Loop.take_step

    def breaking(self: Loop) -> tuple[float, int]:
        if self.item.fim:
            seen.append((self.batches[self.step][0] == self.batches.middle.prefix).sum())
        if self.item.out == "two" and len(seen) == 11:
            raise Killed
        return take(self)

    monkeypatch.setattr(Loop, "take_step", breaking)
    wanted = _train(out="one")
    with pytest.raises(Killed):
        _train(out="two")
    assert _train(out="two") == wanted
    assert min(seen) > 0
    tokenizer = AutoTokenizer.from_pretrained("one")
    assert len(tokenizer) == 300
    assert tokenizer("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>")["input_ids"].count(tokenizer.eos_token_id) == 0
    marked = tokenizer("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>")["input_ids"]
    assert len(marked) == 5
    assert tokenizer.decode(marked, skip_special_tokens=True) == "ab"
    # its tokenizer is found again, and a text without it is another run
    assert _train(out="three", tokenizer="one") == wanted
    assert _train(out="four", tokenizer="one", fim=0.0) != wanted


def test_a_tokenizer_without_the_tokens_is_refused(
    home: Path, tiny_tokenizer: Any, tiny_classifier_folder: Path
) -> None:
    tiny_tokenizer.save_pretrained("tokens")
    Path("r.toml").write_text(spec.to_toml(_values(tokenizer="tokens")), "utf-8")
    with pytest.raises(errors.SpecError, match=r"train.fim: the tokenizer has no tokens <\|fim_prefix\|>") as caught:
        main(["r.toml"])
    assert "\n" not in str(caught.value)
    with pytest.raises(errors.SpecError, match="fim"):
        _train(fim=1.5)
    Path("r.toml").write_text(spec.to_toml(_values(init=str(tiny_classifier_folder))), "utf-8")
    with pytest.raises(errors.SpecError, match="fim"):
        main(["r.toml"])
