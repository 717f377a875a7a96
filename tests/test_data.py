"""Text in, batches out: what readers read and refuse, what splits keep apart, and that packing loses no token."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew import data
from shrew.data import Batches, Document, Stream, python
from shrew.errors import DataError

BEGIN = 7  # a token that begins every document


def _texts(sources: list[str]) -> list[str]:
    return [document.text for document in data.documents(sources)]


# --- packing ---------------------------------------------------------------------------------------------------------


def _stream(lengths: list[int], one_start: bool) -> Stream:
    """Documents of these lengths; every token is its own place, but for a common first one."""
    tokens = np.arange(100, 100 + sum(lengths))
    starts = np.cumsum([0, *lengths[:-1]])
    if one_start:
        tokens[starts] = BEGIN
    return Stream(tokens, starts, 0)


streams = st.builds(_stream, st.lists(st.integers(1, 30), min_size=2, max_size=12), st.booleans())
sizes = st.integers(1, 9)


def _long_enough(stream: Stream, length: int) -> int:
    return min(length, len(stream.tokens) - 1)


@given(streams, sizes, st.integers(0, 9))
def test_an_epoch_has_every_window_once(stream: Stream, length: int, seed: int) -> None:
    length = _long_enough(stream, length)
    count = stream.windows(length)
    batches = Batches(stream, length, 1, seed)
    for epoch in range(2):
        rows = [tuple(batches[epoch * count + i][0][0]) for i in range(count)]
        assert sorted(rows) == sorted(map(tuple, windows(stream, length)))


def windows(stream: Stream, length: int) -> np.ndarray:
    count = stream.windows(length)
    return stream.tokens[: count * length].reshape(count, length)


@given(st.integers(2, 200), sizes, st.integers(0, 9))
def test_an_epoch_has_every_token_once(size: int, length: int, seed: int) -> None:
    stream = _stream([size], False)
    length = _long_enough(stream, length)
    batches, count = Batches(stream, length, 1, seed), stream.windows(length)
    seen = np.concatenate([batches[i][0].ravel() for i in range(count)])
    assert sorted(seen) == list(stream.tokens[: count * length])
    assert len(stream.tokens) - len(seen) <= length  # the last token has no target, and the last window must be full


@given(streams, sizes, sizes, st.integers(0, 30))
def test_targets_are_the_next_tokens_of_the_same_document(stream: Stream, length: int, rows: int, number: int) -> None:
    length = _long_enough(stream, length)
    tokens, targets, owner = Batches(stream, length, rows, 0)[number]
    assert tokens.shape == targets.shape == owner.shape == (rows, length)
    marked = np.isin(np.arange(len(stream.tokens)), stream.starts)
    starts_alike = np.unique(stream.tokens[stream.starts]).size == 1
    for row in range(rows):
        assert owner[row, 0] == 0
        found = (windows(stream, length) == tokens[row]).all(1)
        # windows of nothing but common first tokens can look alike; any of them must explain the rest
        assert any(_explains(stream, place * length, targets[row], owner[row], marked, starts_alike)
                   for place in np.flatnonzero(found))  # fmt: skip


def _explains(
    stream: Stream, low: int, targets: np.ndarray, owner: np.ndarray, marked: np.ndarray, starts_alike: bool
) -> bool:
    length = len(targets)
    after = slice(low + 1, low + 1 + length)
    wanted = np.where(marked[after] & (not starts_alike), -100, stream.tokens[after])
    numbers = marked[low : low + length].cumsum()
    return bool((targets == wanted).all() and (owner == numbers - numbers[0]).all())


@given(streams, sizes, sizes, st.integers(1, 4), st.integers(0, 20))
def test_processes_share_a_batch_without_overlap(
    stream: Stream, length: int, rows: int, world: int, number: int
) -> None:
    length = _long_enough(stream, length)
    alone = Batches(stream, length, rows * world, 3)[number]
    dealt = [Batches(stream, length, rows, 3, rank, world)[number] for rank in range(world)]
    for part in range(3):
        np.testing.assert_array_equal(np.concatenate([batch[part] for batch in dealt]), alone[part])


@given(streams, sizes, st.integers(0, 50))
def test_a_batch_depends_on_its_number_alone(stream: Stream, length: int, number: int) -> None:
    length = _long_enough(stream, length)
    first = Batches(stream, length, 3, 1)[number]
    again = Batches(stream, length, 3, 1)
    for other in (number + 7, 0, number):  # in another order, through other epochs
        last = again[other]
    for one, other in zip(first, last, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_seed_is_another_order() -> None:
    stream = _stream([500], False)
    assert not np.array_equal(Batches(stream, 5, 20, 0)[0][0], Batches(stream, 5, 20, 1)[0][0])


def test_too_little_text_is_said() -> None:
    with pytest.raises(DataError, match="has 4 tokens, fewer than one window of 8"):
        Batches(_stream([4], False), 8, 1, 0)


@pytest.mark.parametrize(
    ("begin", "end", "wanted"),
    [(None, None, [5, 6]), (1, 2, [1, 5, 6, 2]), (1, 1, [1, 5, 6]), (1, None, [1, 5, 6]), (None, 2, [5, 6, 2])],
)
def test_documents_begin_and_end_as_the_tokenizer_says(begin: int | None, end: int | None, wanted: list[int]) -> None:
    class Tokenizer:
        bos_token_id, eos_token_id = begin, end

        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
            assert not add_special_tokens
            return {"input_ids": [[5, 6] for _ in texts]}

    assert data.encode(Tokenizer(), ["a", "b"]) == [wanted, wanted]


def test_a_stream_is_cached_by_text_and_tokenizer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    items = [Document("a", "def f():\n"), Document("b", "    return 1\n")]
    plain = data.tokenize(items, tiny_tokenizer)
    assert plain.text_bytes == len("def f():\n    return 1\n")
    rows = data.encode(tiny_tokenizer, [item.text for item in items])
    assert plain.tokens.tolist() == rows[0] + rows[1]
    assert plain.starts.tolist() == [0, len(rows[0])]
    for _ in range(2):
        cached = data.tokenize(items, tiny_tokenizer, tmp_path)
        assert isinstance(cached.tokens, np.ndarray)
        assert (cached.tokens.tolist(), cached.starts.tolist()) == (plain.tokens.tolist(), plain.starts.tolist())
        assert cached.text_bytes == plain.text_bytes
    assert len(list((tmp_path / "streams").iterdir())) == 1
    data.tokenize(items[::-1], tiny_tokenizer, tmp_path)
    assert len(list((tmp_path / "streams").iterdir())) == 2


# --- readers ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone \u2028 text\r\n", "utf-8")
    rows = [{"text": "two\u2028\x85\x0b\x1cpoints", "label": 1}, {"text": "three"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], "", "  ", lines[1] + "\r", ""]), "utf-8")
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["four", None, "five"]}), tmp_path / "c.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.py").write_text("six = 6\n", "utf-8")
    (tmp_path / "deep" / "e.bin").write_bytes(b"\xff\xfe")
    first, second, third = ["one \u2028 text\r\n"], ["two\u2028\x85\x0b\x1cpoints", "three"], ["four", "five"]
    assert _texts([str(tmp_path / "a.txt")]) == first
    assert _texts([str(tmp_path / "b.jsonl")]) == second
    assert _texts([str(tmp_path / "c.parquet")]) == third
    assert _texts([str(tmp_path)]) == [*first, *second, *third, "six = 6\n"]
    assert _texts([f"{tmp_path}/*.jsonl", f"{tmp_path}/**/*.py"]) == [*second, "six = 6\n"]
    assert [item.id for item in data.documents([str(tmp_path / "b.jsonl")])] == [
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/b.jsonl:4",
    ]


def test_equal_and_blank_documents_count_once_or_not_at_all(tmp_path: Path) -> None:
    for name, text in {"a": "same", "b": " \n", "c": "same", "d": "other"}.items():
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    assert _texts([str(tmp_path), str(tmp_path / "a.txt")]) == ["same", "other"]


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5, unique=True))
@settings(max_examples=30)
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "t.jsonl"
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    path.write_bytes("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode())
    assert _texts([str(path)]) == list(dict.fromkeys(texts))


LATIN, NO_PARQUET = "caf\u00e9".encode("latin-1"), b"PAR1 but no more"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["none.txt", "no such file"]),
        ("*.md", None, ["*.md", "no such file, folder or glob"]),
        ("latin.txt", LATIN, ["latin.txt", "not UTF-8 (byte 3)", "iconv"]),
        ("wide.txt", "caf\u00e9".encode("utf-16"), ["not UTF-8 (byte 0)"]),
        ("empty.txt", b"", ["empty.txt", "no text in it"]),
        ("blank.jsonl", b"\n\n", ["no text in it"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', ["line 2", "no JSON", "column 10"]),
        ("a.jsonl", b'{"text": "x\n"}\n', ["line 1", "no JSON"]),
        ("a.jsonl", b"\n[1]\n", ["line 2", "expected a JSON object, got list"]),
        ("a.jsonl", b'{"txt": "x"}', ["line 1", "no text under 'text'"]),
        ("a.jsonl", b'{"text": 3}', ["line 1", "no text under 'text'"]),
        ("a.jsonl", b'{"text": "\\ud83d"}', ["a.jsonl:1", "surrogate"]),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", ["line 1", "cannot be read"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "cannot be read"]),
        ("a.parquet", NO_PARQUET, ["a.parquet", "no readable parquet"]),
    ],
)
def test_bad_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.documents([str(tmp_path / name)])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_bad_sources(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    for sources, words in [
        ([str(tmp_path / "a.parquet")], "no column 'text'; it has body, n"),
        ([], "no source: no text"),
        (["python:trian"], "did you mean 'train'"),
        (["some-data-set"], "no such file"),  # offline, so that no hub is asked
    ]:
        with pytest.raises(DataError, match=words):
            data.documents(sources)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text, JSONL or parquet file in this folder"):
        data.documents([str(tmp_path / "empty")])
    assert [item.text for item in data.documents([str(tmp_path / "a.parquet")], field="body")] == ["x"]


# --- splits ----------------------------------------------------------------------------------------------------------

texts = st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30)
shares = st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 1), min_size=1)


@given(texts, shares)
def test_a_split_is_disjoint_complete_and_blind_to_order(texts: list[str], shares: dict[str, float]) -> None:
    items = [Document(str(i), text) for i, text in enumerate(texts)]
    parts = data.split_documents(items, shares, "salt")
    dealt = [document.text for part in parts.values() for document in part]
    assert list(parts) == list(shares)
    assert sorted(dealt) == sorted(set(texts))  # equal texts are one
    if len(set(texts)) >= len(shares):
        assert all(parts.values())
    again = data.split_documents(items[::-1], shares, "salt")
    assert {name: [item.text for item in part] for name, part in again.items()} == {
        name: [item.text for item in part] for name, part in parts.items()
    }


def test_shares_are_of_the_length_and_a_salt_deals_anew() -> None:
    draw = np.random.default_rng(0)
    items = [Document(str(i), f"{i} " + "x" * int(draw.integers(1, 100))) for i in range(400)]
    parts = data.split_documents(items, {"train": 0.9, "held": 0.1}, "one")
    size = {name: sum(len(item.text) for item in part) for name, part in parts.items()}
    assert size["held"] / sum(size.values()) == pytest.approx(0.1, abs=0.01)
    other = data.split_documents(items, {"train": 0.9, "held": 0.1}, "two")
    assert {item.id for item in parts["held"]} != {item.id for item in other["held"]}


# --- the corpus of Python source -------------------------------------------------------------------------------------


def _code(name: str, words: int = 200) -> str:
    """Words that no other name gives."""
    return " ".join(hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:9] for i in range(words)) + "\n"


def _held() -> str:
    """A module name that the rule holds out for evaluation."""
    return next(name for name in (f"module{i}" for i in range(99)) if python._is_evaluation(f"{name}.py"))


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A library of four files and two packages; returns the texts of the library by name."""
    held = _held()
    assert not python._is_evaluation("kept.py")
    library = {
        f"{held}.py": _code("held"),
        "kept.py": _code("kept"),
        f"test/test_{held}.py": _code("its test"),
        "copy.py": _code("own start") + " ".join(_code("held").split()[70:120]),
    }
    files = {
        "fine.py": _code("fine"),
        "vendored.py": "import x\n" + _code("held"),
        "near.py": _code("near") + " ".join(_code("held").split()[70:119]),  # 49 tokens: one too few to count
        "same.py": _code("kept"),
        f"test_{held}.py": _code("another test"),
        "latin.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9 " * 40)
    monkeypatch.setattr(python, "_library", lambda wanted: (item for item in library.items() if wanted(item[0])))
    paths = sorted(tmp_path.glob("*.py"))
    monkeypatch.setattr(python, "_packages", lambda: iter([("thing 1.0", "MIT", paths)]))
    return library


def test_the_library_is_its_own_modules_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["json/deep/er.py", "json/__init__.py", "abc.py", "test/test_abc.py", "site-packages/json/x.py", "mine.py"]
    for name in [*names, "json/notes.txt", "csv.py/odd.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 40, "utf-8")
    (tmp_path / "json" / "short.py").write_text("#", "utf-8")
    monkeypatch.setattr(python.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = dict(python._library(lambda name: "er" not in name))
    assert list(found) == ["abc.py", "json/__init__.py", "test/test_abc.py"]
    assert all(text.startswith(f"# {name}") for name, text in found.items())
    assert "json/deep/er.py" in dict(python._library(lambda name: True))


def test_nothing_of_the_evaluation_text_is_trained_on(small_world: dict[str, str]) -> None:
    held = _held()
    kept, manifest = python.build()
    names = {id for id, _ in kept}
    assert names == {"python:kept.py", "package:thing 1.0/fine.py", "package:thing 1.0/near.py"}
    assert manifest.dropped == {
        "evaluation module": 1, "test of an evaluation module": 2, "shared run": 2, "duplicate": 1
    }  # fmt: skip
    assert python.evaluation() == [(f"python:{held}.py", small_world[f"{held}.py"])]
    assert list(manifest.evaluation) == [f"python:{held}.py"]
    assert manifest.packages["thing 1.0"] == {"licence": "MIT", "files": 2}
    assert (manifest.files, manifest.bytes) == (3, sum(len(text) for _, text in kept))
    assert _texts(["python:evaluation"]) == [small_world[f"{held}.py"]]
    assert {item.id for item in data.documents(["python:train"])} == names
    assert _texts(["python:stdlib"]) == [small_world["kept.py"]]


@given(st.integers(0, 150), st.integers(1, 120))
@settings(max_examples=30)
def test_a_run_of_fifty_tokens_is_found_wherever_it_stands(start: int, length: int) -> None:
    words = _code("held").split()
    run = words[start : start + length]
    runs = python.Runs(iter([_code("held"), "short"]))
    assert ((" ".join([_code("before"), *run, _code("after")])) in runs) == (len(run) >= python.RUN)


def test_evaluation_modules_of_this_interpreter_are_a_tenth_by_name() -> None:
    held = {id.removeprefix("python:").split("/")[0].removesuffix(".py") for id, _ in python.evaluation()}
    assert 8 <= len(held) <= 60
    assert not held & (python.REMOVED | {"test"})
    assert all(python._is_evaluation(f"{name}.py") and python._is_evaluation(f"{name}/x.py") for name in held)


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License": "BSD-3-Clause"}, True),
        ({"Classifier": "License :: OSI Approved :: Apache Software License"}, True),
        ({"License-Expression": "MPL-2.0"}, False),
        ({"License-Expression": "MIT AND LGPL-2.1"}, False),
        ({"License": "MIT", "Classifier": "License :: OSI Approved :: GNU General Public License (GPL)"}, False),
        ({"License": "see the file"}, False),
        ({}, False),
    ],
)
def test_only_permissive_packages_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, str], taken: bool
) -> None:
    about = tmp_path / "thing-1.0.dist-info"
    about.mkdir()
    lines = [f"{key}: {value}" for key, value in {"Name": "thing", "Version": "1.0", **fields}.items()]
    (about / "METADATA").write_text("Metadata-Version: 2.4\n" + "\n".join(lines) + "\n", "utf-8")
    (about / "RECORD").write_text("thing.py,,\nthing.so,,\n", "utf-8")
    found = list(python.metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(python.metadata, "distributions", lambda: found)
    assert [(name, paths) for name, _, paths in python._packages()] == (
        [("thing 1.0", [tmp_path / "thing.py"])] if taken else []
    )
