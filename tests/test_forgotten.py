"""What was forgotten: by hand on few numbers, paired, and from models to words."""

import dataclasses
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from shrew import folder, measure, record
from shrew.data import Document
from shrew.folder import Loaded
from shrew.measure import statistics
from shrew.record import Record
from shrew.report import render
from shrew.report.forgotten import blocks, printed
from shrew.report.view import View
from shrew.tasks import Scores
from shrew.tasks.choice import Choice, Question
from shrew.tasks.completion import Completion, Prompt
from shrew.tasks.labels import Labelled, Labels
from shrew.tasks.text import DECILES, Text, token_bits, token_deciles


def deciles(bits: np.ndarray, tokens: np.ndarray) -> Scores:
    """Scores of documents whose every tenth of the tokens costs the same: [n] bits and [n] tokens in each."""
    columns = {f"decile{n}_{what}": column for n in range(DECILES) for what, column in
               (("bits", bits), ("tokens", tokens))}  # fmt: skip
    columns |= {"bits": bits * DECILES, "bytes": tokens * 40.0, "tokens": tokens * 10.0}
    return Scores("text@1", "final", "bits_per_byte", [f"d{n}" for n in range(len(bits))], columns)


def text_task(count: int) -> Text:
    return Text(splits={"final": [Document(f"d{n}", f"the text {n}") for n in range(count)]})


def labelled(truth: list[int], guess: list[int]) -> Scores:
    classes = ("ham", "spam", "unsure")
    columns = {"truth": np.array(truth), "guess": np.array(guess)}
    columns["correct"] = (columns["truth"] == columns["guess"]).astype(float)
    ids = [f"line {n}" for n in range(len(truth))]
    return Scores("labels@1", "final", "macro_f1", ids, columns, 0.3, classes, tuple(classes[n] for n in guess))


# --- the tenths ------------------------------------------------------------------------------------------------------


def test_deciles_by_hand() -> None:
    # Of 20 tokens each tenth holds 2: token 4 stands 10 times (the five commonest tenths), 2 and 7 five times each
    # (tied: five tenths between them, whatever their numbers are).
    shares = token_deciles([[4] * 10, [2] * 5 + [7] * 5], 9)
    np.testing.assert_allclose(shares[4], [0] * 5 + [0.2] * 5)
    np.testing.assert_allclose(shares[2], [0.2] * 5 + [0] * 5)
    np.testing.assert_allclose(shares[7], shares[2])
    assert not shares[[0, 1, 3, 5, 6, 8]].any()
    assert token_deciles([], 3).tolist() == [[0.0] * 10] * 3


@settings(max_examples=80)
@given(st.lists(st.lists(st.integers(0, 30), max_size=40), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_tenth_holds_a_tenth_and_ranks_by_frequency(rows: list[list[int]], random: Any) -> None:
    flat = [token for row in rows for token in row]
    shares, counts = token_deciles(rows, 31), np.bincount(np.array(flat, int), minlength=31)
    np.testing.assert_allclose(shares[flat].sum(0), len(flat) / 10, atol=1e-9)
    np.testing.assert_allclose(shares[counts > 0].sum(1), 1)
    middle = shares @ np.arange(10)
    for one in np.flatnonzero(counts):  # rarer tokens stand in earlier tenths, equally frequent ones in the same
        for other in np.flatnonzero(counts):
            if counts[one] < counts[other]:
                assert middle[one] <= middle[other] + 1e-9
            elif counts[one] == counts[other]:
                np.testing.assert_allclose(shares[one], shares[other])
    order = list(range(31))
    random.shuffle(order)
    renamed = token_deciles([[order[token] for token in row] for row in rows], 31)
    np.testing.assert_allclose(renamed[order], shares)


def test_the_tenths_add_up_to_the_whole(tiny_llama_folder: Path) -> None:
    task = text_task(5)
    scores = task.score(folder.load(tiny_llama_folder), "final")
    for what in ("bits", "tokens"):
        total = sum(scores.columns[f"decile{n}_{what}"] for n in range(DECILES))
        np.testing.assert_allclose(total, scores.columns[what])
    tokens = scores.columns["tokens"].sum() / 10
    assert [scores.columns[f"decile{n}_tokens"].sum() for n in range(DECILES)] == pytest.approx([tokens] * 10)


# --- intervals are paired --------------------------------------------------------------------------------------------


def bands(found: list[Record]) -> list[Record]:
    return [item for item in found if item.metric == "band"]


def test_a_change_that_is_equal_everywhere_is_known_exactly() -> None:
    """Documents differ a thousandfold, so two separate resamples could never know the change so well."""
    tokens = np.full(12, 50.0)
    old = deciles(tokens * np.geomspace(0.01, 10, 12), tokens)
    new = deciles(old.columns["decile0_bits"] + tokens * 0.125, tokens)
    found = bands(measure.forgotten_records("run", "new", text_task(12), new, old))
    assert [item.detail["band"] for item in found] == list(range(10))
    assert found[0].detail["label"] == "rarest tenth" and found[9].detail["label"] == "commonest tenth"
    for item in found:
        ends = [item.detail[key] for key in ("difference", "difference_low", "difference_high")]
        assert ends == pytest.approx([0.125] * 3)
        assert item.low is not None and item.high is not None and item.high - item.low > 1
        assert item.value == pytest.approx(item.detail["before"] + 0.125) and item.n == 600


def test_ratio_difference_is_that_of_joint_resamples() -> None:
    rng = np.random.default_rng(0)
    old, new = (deciles(rng.random(9) * 30, np.arange(1.0, 10)) for _ in range(2))
    found = statistics.ratio_difference(old, new, "decile3_bits", "decile3_tokens", samples=300, seed=5)
    rows = np.random.default_rng(5).integers(0, 9, (300, 9))  # which documents each resample drew
    moved = (new.columns["bits"] - old.columns["bits"])[rows].sum(1) / new.columns["tokens"][rows].sum(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(moved, [0.025, 0.975])))
    total = new.columns["bits"].sum() - old.columns["bits"].sum()
    assert found.value == pytest.approx(total / new.columns["tokens"].sum())


def test_resamples_without_a_rare_token_are_left_out() -> None:
    tokens = np.array([2.0, 0, 0, 0])
    old, new = deciles(tokens, tokens), deciles(tokens * 2, tokens)
    found = statistics.ratio_difference(old, new, "decile0_bits", "decile0_tokens")
    assert (found.value, found.low, found.high) == (1, 1, 1)
    nothing = statistics.ratio_difference(old, deciles(tokens * np.nan, tokens), "decile0_bits", "decile0_tokens")
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_other_tokens_give_no_change() -> None:
    old, new = deciles(np.ones(4), np.ones(4)), deciles(np.ones(4), np.full(4, 2.0))
    assert all("difference" not in item.detail
               for item in bands(measure.forgotten_records("run", "new", text_task(4), new, old)))  # fmt: skip


@settings(max_examples=100)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_paired_share_is_agresti_and_min(gained: int, lost: int, same: int) -> None:
    n = gained + lost + same
    if n == 0:
        return
    found = statistics.paired_share(np.array([1.0] * gained + [-1.0] * lost + [0.0] * same))
    b, c, total = gained + 0.5, lost + 0.5, n + 2  # Agresti & Min (2005), half an observation in each of the four cells
    error = math.sqrt((b + c) - (b - c) ** 2 / total) / total
    assert found.value == pytest.approx((gained - lost) / n)
    assert found.low == pytest.approx(max(-1, (b - c) / total - 1.959964 * error), abs=1e-6)
    assert found.high == pytest.approx(min(1, (b - c) / total + 1.959964 * error), abs=1e-6)
    assert found.low < found.value < found.high or abs(found.value) == 1


@pytest.mark.parametrize(("n", "gain", "loss"), [(20, 0.02, 0.1), (60, 0.05, 0.05), (200, 0.0, 0.03)])
def test_paired_share_covers_the_truth(n: int, gain: float, loss: float) -> None:
    draw = np.random.default_rng(n).random((2000, n))
    gaps = (draw < gain).astype(float) - (draw > 1 - loss)
    found = [statistics.paired_share(row) for row in gaps]
    covered = np.mean([item.low <= gain - loss <= item.high for item in found])
    assert covered > 0.93  # the nominal 0.95, less what few whole answers allow
    # Two models that are right 80 % of the time, unpaired, would need this much: pairing must have been used.
    assert np.mean([item.high - item.low for item in found]) < 2 * 1.96 * math.sqrt(2 * 0.8 * 0.2 / n)


# --- answers and classes ---------------------------------------------------------------------------------------------


def test_flips_and_classes_by_hand() -> None:
    truth = [0, 0, 0, 0, 1, 1, 1, 2]
    old, new = labelled(truth, [0, 0, 0, 1, 1, 1, 0, 0]), labelled(truth, [0, 1, 2, 0, 1, 1, 2, 0])
    task = Labels(splits={"final": [Labelled(f"line {n}", f"text {n}", ("ham", "spam", "unsure")[label])
                                    for n, label in enumerate(truth)]}, labels=("ham", "spam", "unsure"))  # fmt: skip
    found = measure.forgotten_records("run", "new", task, new, old, "old")
    flips = next(item for item in found if item.metric == "flips")
    assert flips.detail["ids"] == {"right to wrong": ["line 1", "line 2"], "wrong to right": ["line 3"],
                                   "wrong to other": ["line 6"]}  # fmt: skip
    assert flips.detail["counts"] == {"right to wrong": 2, "wrong to right": 1, "wrong to other": 1}
    assert flips.value == pytest.approx(-1 / 8) and flips.detail["against"] == "old"
    by_hand = statistics.paired_share(np.array([-1.0, -1, 1, 0, 0, 0, 0, 0]))
    assert (flips.low, flips.high) == (by_hand.low, by_hand.high)
    shown = [{key: item.detail[key] for key in ("id", "way", "text", "wanted", "before", "after")}
             for item in found if item.metric == "changed"]  # fmt: skip
    assert shown[0] == {"id": "line 1", "way": "right to wrong", "text": "text 1", "wanted": "ham", "before": "ham",
                        "after": "spam"}  # fmt: skip
    assert [item["way"] for item in shown] == ["right to wrong"] * 2 + ["wrong to right", "wrong to other"]
    classes = {item.detail["label"]: item for item in found if item.metric == "class"}
    assert {name: (item.detail["before"], item.value, item.n) for name, item in classes.items()} == {
        "ham": (0.75, 0.5, 4), "spam": (2 / 3, 2 / 3, 3), "unsure": (0, 0, 1)
    }  # fmt: skip
    wide = statistics.paired_share(np.array([-1.0, -1, 1, 0]), 1 - 0.05 / 3)  # three classes, together 95 %
    assert classes["ham"].detail["difference_low"] == pytest.approx(wide.low)
    assert classes["ham"].detail["correction"] == "Bonferroni over 3"
    alone = statistics.paired_share(np.array([-1.0, -1, 1, 0]))
    assert wide.high - wide.low > alone.high - alone.low


def test_many_flips_are_counted_and_few_are_shown() -> None:
    old, new = labelled([0] * 3000, [0] * 3000), labelled([0] * 3000, [1] * 3000)
    items = [Labelled(f"line {n}", "long " * 400, "ham") for n in range(3000)]
    task = Labels(splits={"final": items}, labels=("ham", "spam"))
    found = measure.forgotten_records("run", "new", task, new, old)
    flips = next(item for item in found if item.metric == "flips")
    assert flips.detail["counts"]["right to wrong"] == 3000 and len(flips.detail["ids"]["right to wrong"]) == 1000
    changed = [item for item in found if item.metric == "changed"]
    assert len(changed) == 12 and all(len(item.detail["text"]) <= 241 for item in changed)


def test_documents_that_changed_most_come_first() -> None:
    tokens = np.full(20, 10.0)
    old = deciles(tokens, tokens)
    new = deciles(tokens + np.arange(-10, 10), tokens)
    found = [item for item in measure.forgotten_records("run", "new", text_task(20), new, old)
             if item.metric == "document"]  # fmt: skip
    assert [item.detail["id"] for item in found[:4]] == ["d0", "d1", "d19", "d2"]
    assert found[0].value == pytest.approx(-100 / 400) and found[0].detail["text"] == "the text 0"
    assert len(found) == 8


def test_answers_are_told_by_choice_and_completion(tiny_llama_folder: Path) -> None:
    loaded = folder.load(tiny_llama_folder)
    questions = [Question(f"line {n}", f"q {n}", ("one", "two"), n % 2) for n in range(3)]
    scores = Choice(splits={"final": questions}).score(loaded, "final")
    assert list(scores.answers) == [("one", "two")[number] for number in scores.columns["guess"]]
    prompts = [Prompt(f"line {n}", f"p {n}", " right") for n in range(3)]
    scores = Completion(splits={"final": prompts}).score(loaded, "final")
    assert len(scores.answers) == 3 and all(answer == answer.strip() for answer in scores.answers)
    assert Scores.parse(json.loads(json.dumps(scores.dump()))).answers == scores.answers


# --- rare words ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tiny_llama_folder: Path) -> tuple[Loaded, Loaded]:
    """The tiny llama and the same with noise on its weights."""
    before, after = folder.load(tiny_llama_folder), folder.load(tiny_llama_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in after.model.parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight)
    return before, after


def test_rare_words_cost_what_the_scores_count(pair: tuple[Loaded, Loaded]) -> None:
    documents = [Document(f"d{n}", "import os\n" * 8 + f"zebra{n} = {n}\n") for n in range(6)]
    task = Text(splits={"final": documents}, window=16)
    before, after = pair
    old, new = (task.score(loaded, "final") for loaded in pair)
    bodies = before.tokenizer([item.text for item in task.examples("final")], add_special_tokens=False)["input_ids"]
    for loaded, scores in ((before, old), (after, new)):
        sums = [float(row.sum()) for row in token_bits(loaded, bodies, task.window)]
        np.testing.assert_allclose(sums, scores.columns["bits"], rtol=1e-6)
    found = measure.tail_records("run", "new", task, new, old, after, before)
    assert found and [item.value for item in found] == sorted((item.value for item in found), reverse=True)
    for item in found:
        told = item.detail
        assert item.value == pytest.approx(told["after"] - told["before"]) and item.value > 0
        whole = next(document.text for document in task.examples("final") if document.id == told["id"])
        assert told["left"] + told["token"] + told["right"] in whole
        assert told["token"] not in ("import", " os", "\n")  # those stand everywhere
    assert measure.tail_records("run", "new", task, old, old, before, before) == []


# --- from folders to words -------------------------------------------------------------------------------------------


class Words(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)
        self.text = " ".join("".join(self.found).split())

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_measure_tells_what_was_forgotten(
    pair: tuple[Loaded, Loaded], tiny_llama_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    folder.save(pair[1], tmp_path / "small", {"name": "noise"})
    text, labels, kept = tmp_path / "t.jsonl", tmp_path / "l.jsonl", tmp_path / "r.jsonl"
    text.write_text("".join(json.dumps({"text": f"import os{n}\nprint({n})\n" * 3}) + "\n" for n in range(30)))
    labels.write_text("".join(json.dumps({"text": f"x{n}", "label": "ab"[n % 2]}) + "\n" for n in range(30)))
    arguments = [str(tiny_llama_folder), str(tmp_path / "small"), "--no-cost", "--split", "all",
                 "--task", str(text), "--task", str(labels), "--records", str(kept)]  # fmt: skip
    assert measure.main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in ("What was forgotten: loss by token frequency", "rarest tenth", "rare words that lost most",
                  "documents that changed most", "answers that changed", "right to wrong", "by class"):  # fmt: skip
        assert words in told
    found = record.read(kept)
    assert {"band", "document", "tail", "flips", "class"} <= {item.metric for item in found if item.model == "small"}
    assert {item.metric for item in found if item.model == "llama"} & {"flips", "class", "document", "tail"} == set()
    page = Words(render(found)).text
    assert "What was forgotten" in page and "Loss by token frequency" in page and "Bonferroni over 2" in page


def test_words_are_made_of_records_alone() -> None:
    tokens = np.full(12, 50.0)
    old = deciles(tokens * np.linspace(1, 2, 12), tokens)
    new = deciles(old.columns["decile0_bits"] * 1.5, tokens)
    found = measure.forgotten_records("run", "new", text_task(12), new, old)
    found.append(Record(run="run", model="new", metric="bytes", value=1, unit="bytes"))
    view = View(found)
    first = blocks(view)[0]
    assert first.rows[0][:4] == ("rarest tenth", "600 tokens", "1.500 → 2.250", "+50.0\u00a0%")
    assert first.rows[0][4].startswith("+0.7500 (+0.")
    assert blocks(View([dataclasses.replace(item, detail={}) for item in found])) == []
    assert printed(View([])) is None
    told = io.StringIO()
    Console(width=100, file=told).print(printed(view))
    assert "rarest tenth" in told.getvalue()
