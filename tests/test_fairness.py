"""Bias by pairs: preferences against a slow loop, what flips, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew import folder, measure, tasks
from shrew.errors import DataError, UnsupportedError
from shrew.folder import Loaded
from shrew.measure import statistics
from shrew.tasks import Scores
from shrew.tasks.fairness import Fairness, Pair, prefers, text_log_probs

HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type,anon_writer\n"


@pytest.fixture(scope="module")
def llama(tiny_llama_folder: Path) -> Loaded:
    return folder.load(tiny_llama_folder)


def pairs(*texts: tuple[str, str], kind: str = "") -> Fairness:
    return Fairness(splits={"final": [Pair(f"line {n}", *both, kind) for n, both in enumerate(texts, 1)]})


def shares(more: list[float], kinds: list[int] | None = None) -> Scores:
    values = np.array(more)
    columns = {"more": values, "more_per_token": values, "unequal": np.zeros(len(more)),
               "kind": np.array(kinds or [0] * len(more))}  # fmt: skip
    units = [f"line {n}" for n in range(len(more))]
    return Scores("pairs@1", "final", "stereotype_share", units, columns, 0.5, ("age", "region", "trade"))


def slowly(loaded: Loaded, text: str) -> tuple[float, int]:
    """The log-probability of a text, one token after the other."""
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for end in range(1, len(ids)):
        with torch.inference_mode():
            last = loaded.model(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
        total += float(last.double().log_softmax(0)[ids[end]])
    return total, len(ids) - 1


def test_the_likelier_text_is_preferred(llama: Loaded) -> None:
    texts = [("def f(x):", "zz zz"), ("a", "the quick brown fox"), ("import os", "import io"), ("x = 1", "x = 2")]
    task = pairs(*texts)
    scores = task.score(llama, "final")
    for n, (more, less) in enumerate(texts):
        (one, size), (other, count) = slowly(llama, more), slowly(llama, less)
        assert scores.columns["more"][n] == float(one > other)
        assert scores.columns["more_per_token"][n] == float(one / size > other / count)
        assert scores.columns["unequal"][n] == float(size != count)
    total, tokens = text_log_probs(llama, task.texts(llama, "final"))
    assert [total[0], tokens[0]] == pytest.approx(slowly(llama, "def f(x):"), rel=1e-5)
    mirrored = pairs(*[(less, more) for more, less in texts]).score(llama, "final")
    np.testing.assert_array_equal(mirrored.columns["more"], 1 - scores.columns["more"])
    assert Scores.parse(json.loads(json.dumps(scores.dump()))).value() == scores.value()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-99, 0), st.floats(-99, 0)), min_size=1, max_size=20))
def test_a_tie_counts_half(values: list[tuple[float, float]]) -> None:
    found = prefers(np.array(values))
    assert found.tolist() == [0.5 if one == other else float(one > other) for one, other in values]


def test_the_gap_and_the_flips_are_paired() -> None:
    """Two shares of about one half each would be 10 points unsure; two flips among 400 pairs are not."""
    before = [float(n % 2) for n in range(400)]
    after = [*before]
    after[0], after[2] = 1.0, 1.0
    found = {item.metric: item for item in measure.quality_records("run", "new", shares(after), shares(before), "old")}
    assert set(found) == {"stereotype_share", "stereotype_share_per_token"}  # no retention: bias is no quality
    told = found["stereotype_share"]
    assert told.value == pytest.approx(202 / 400) and told.detail["gap"] == pytest.approx(0.005)
    assert told.low is not None and told.high is not None and told.high - told.low > 0.08
    assert (told.detail["to_stereotype"], told.detail["from_stereotype"], told.detail["p"]) == (2, 0, 0.5)
    assert told.detail["difference"] == pytest.approx(2 / 400) and told.detail["against"] == "old"
    assert told.detail["difference_high"] - told.detail["difference_low"] < 0.02
    assert told.detail["difference_low"] < 0 < told.detail["difference"] < told.detail["difference_high"]


def test_a_share_of_few_pairs_is_never_certain() -> None:
    found = statistics.share_interval(np.zeros(6))
    assert found.value == found.low == 0 and 0.3 < found.high < 0.5  # Agresti and Coull: 0 of 6 is at most 44 %
    half = statistics.share_interval(np.array([0.0, 1.0] * 200))
    assert (half.low, half.high) == pytest.approx((0.5 - 0.0488, 0.5 + 0.0488), abs=1e-4)


def test_kinds_are_told_apart_and_corrected() -> None:
    old, new = shares([1, 1, 0, 0, 0.5, 1], [0, 0, 0, 1, 1, 2]), shares([1, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 2])
    found = measure.forgotten_records("run", "new", pairs(("a", "b")), new, old)
    told = {item.detail["label"]: item for item in found if item.metric == "bias"}
    assert {name: (item.n, item.detail["before"], item.value) for name, item in told.items()} == {
        "age": (3, 2 / 3, pytest.approx(1 / 3)), "region": (2, 0.25, 1), "trade": (1, 1, 1)
    }  # fmt: skip
    wanted = statistics.paired_share(np.array([1, 0.5]), 1 - 0.05 / 3)
    assert told["region"].detail["difference_high"] == wanted.high
    assert told["region"].detail["correction"] == "Bonferroni over 3"
    assert math.isclose(told["age"].detail["level"], 1 - 0.05 / 3)
    (alone,) = [item for item in measure.forgotten_records("run", "old", pairs(("a", "b")), old)
                if item.detail["label"] == "age"]  # fmt: skip
    assert "difference" not in alone.detail and alone.value == pytest.approx(2 / 3)


def test_both_files_hold_the_same_pairs(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    again = '"Old, they said.",Young they said.,stereo,age,a1\n'
    table.write_text(f'{HEAD}0,{again}1,"Two\nlines.",One.,antistereo,age,a2\n2,{again}', "utf-8")
    lines = tmp_path / "pairs.jsonl"
    rows = [("Old, they said.", "Young they said."), ("Two\nlines.", "One.")]
    lines.write_text("".join(json.dumps({"more": more, "less": less, "kind": "age"}) + "\n" for more, less in rows))
    one, other = tasks.read(table), tasks.read(lines)
    assert isinstance(one, Fairness) and isinstance(other, Fairness)
    assert {(item.more, item.less, item.kind) for item in one.examples("final")} == {(*row, "age") for row in rows}
    assert {item.more for item in other.examples("all")} == {more for more, _ in rows}
    assert (one.dropped, other.dropped) == (1, 0)
    assert "2 examples" in other.describe() and other.label == "pairs@1"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "sent_more,sent_less\na,b\n", "no column 'stereo_antistereo'"),
        ("a.csv", HEAD + "0,a,a,stereo,age,x\n1,b,c,stereo,age,x\n", "line 1: both texts"),
        ("a.csv", HEAD + "0,a,b,stereo,age,x\n", "at least 2"),
        ("a.csv", HEAD + "0,a\n", "line 1: 'less' must be a text, and it is None"),
        ("a.csv", HEAD + '0,"a"b,c,stereo,age,x\n', "no readable CSV"),
        ("a.jsonl", '{"more": "a", "less": "b"}\n{"more": "a", "less": 1}\n', "line 2: 'less' must be a text"),
        ("a.jsonl", '{"more": "a", "less": "b", "kind": 3}\n', "line 1: 'kind' must be a text"),
    ],
)
def test_bad_pairs_are_one_sentence(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(DataError, match=words):
        tasks.read(tmp_path / name)


def test_what_no_model_can_be_asked(llama: Loaded, tiny_classifier_folder: Path) -> None:
    with pytest.raises(DataError, match="the model sees 256 at once"):
        pairs(("word " * 400, "b")).score(llama, "final")
    with pytest.raises(UnsupportedError, match="a classifier gives no text likelihood"):
        pairs(("a", "b")).score(folder.load(tiny_classifier_folder), "final")


def test_measure_compares_bias(tiny_llama_folder: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"more": f"def {a}():", "less": f"def {b}():", "kind": a} for a in ("f", "g") for b in ("h", "i", "j")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    arguments = [str(tiny_llama_folder), str(tiny_llama_folder), "--task", str(file), "--no-cost"]
    assert measure.main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "0 pairs flipped" in told and "What was forgotten: bias by kind" in told and "Bonferroni" not in told
    assert measure.main([*arguments, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {item["detail"]["correction"] for item in found if item["metric"] == "bias" and "against" in item["detail"]
            } == {"Bonferroni over 2"}  # fmt: skip
