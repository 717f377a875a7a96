"""The vocabulary: specs in and out of TOML, JSON and flags; records; files that are written whole or not at all."""

import argparse
import dataclasses
import errno
import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew import errors, files, record, spec
from shrew.record import Record
from shrew.spec import Meta, doc


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rank: Annotated[int, Meta(ge=1)] = doc("rank of the factors", 4)
    note: str | None = doc("a remark", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: ClassVar[str] = "outer"
    bits: Annotated[int, Meta(ge=2, le=8)] = doc("bits of a weight, 100 % of them", 4)
    rate: Annotated[float, Meta(gt=0, lt=1)] = doc("share of something", 0.5)
    group_size: Annotated[int, Meta(ge=1)] | None = doc("weights that share a scale", None)
    method: Literal["rtn", "gptq"] = doc("how values are chosen", "rtn")
    tied: bool = doc("keep tied weights tied", True)
    parts: list[Inner] = doc("tables in a list", default_factory=list)
    named: dict[str, Inner] = doc("tables by name", default_factory=dict)


inners = st.builds(Inner, rank=st.integers(1, 99), note=st.none() | st.text(max_size=9))
outers = st.builds(
    Outer,
    bits=st.integers(2, 8),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    group_size=st.none() | st.integers(1, 512),
    method=st.sampled_from(["rtn", "gptq"]),
    tied=st.booleans(),
    parts=st.lists(inners, max_size=2),
    named=st.dictionaries(st.text(max_size=5), inners, max_size=2),
)


@given(outers)
def test_a_spec_survives_toml_and_json(one: Outer) -> None:
    values = spec.dump(one)
    assert spec.parse(Outer, tomllib.loads(spec.to_toml(values, "a comment\nof two lines")), "recipe") == one
    assert spec.parse(Outer, json.loads(json.dumps(values)), "recipe") == one
    assert spec.digest(spec.parse(Outer, values, "recipe")) == spec.digest(one)


def test_defaults_are_written_out_however_a_spec_was_made() -> None:
    made, parsed = Outer(parts=[Inner()]), spec.parse(Outer, {"parts": [{}]}, "recipe")
    assert spec.dump(made) == spec.dump(parsed)
    assert spec.dump(parsed)["bits"] == 4
    assert spec.dump(parsed)["parts"] == [{"rank": 4}]
    assert spec.digest(made) == spec.digest(parsed)


@given(outers, outers)
def test_a_digest_tells_specs_apart(one: Outer, other: Outer) -> None:
    assert (spec.digest(one) == spec.digest(other)) == (one == other)


def test_a_digest_is_stable_and_blind_to_the_order_of_keys() -> None:
    assert spec.digest({"b": 1, "a": [2.5, "x"]}) == spec.digest({"a": [2.5, "x"], "b": 1})
    # hashes name cached work: if this one changes, every cache out there is lost
    assert spec.digest({"bits": 4}) == "82371be0f920a4e53a8a3b059cc3f94f54dce6cd1982c0f45b8dddf93ffa1710"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bit": 4}, ["r.toml", "'bit'", "did you mean 'bits'?"]),
        ({"parts": [{"rnak": 1}]}, ["r.toml: parts", "'rnak'", "did you mean 'rank'?"]),
        ({"named": {"a": {"zzz": 1}}}, ["r.toml: named", "'zzz'", "known: note, rank."]),
        ({"name": "outer"}, ["unknown key 'name'"]),
        ({"bits": 1}, ["bits", ">= 2"]),
        ({"bits": 9}, ["bits", "<= 8"]),
        ({"bits": "4"}, ["bits", "int"]),
        ({"rate": 1.0}, ["rate", "< 1"]),
        ({"parts": [{"rank": 0}]}, ["parts[0].rank", ">= 1"]),
        ({"method": "awq"}, ["method", "awq"]),
        ([], ["r.toml", "table"]),
    ],
)
def test_a_wrong_value_is_refused_in_words(values: dict, words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(Outer, values, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_flags_are_the_fields() -> None:
    parser = argparse.ArgumentParser()
    spec.add_flags(parser, Outer)
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    tables = {"parts", "named"}
    assert set(flags) == {field.name for field in dataclasses.fields(Outer)} - tables
    assert "100 % of them (default 4)" in parser.format_help()
    args = parser.parse_args(["--bits", "3", "--group-size", "32", "--no-tied", "--method", "gptq"])
    assert spec.from_flags(Outer, args) == Outer(bits=3, group_size=32, tied=False, method="gptq")
    assert spec.from_flags(Outer, parser.parse_args([])) == Outer()
    wrong = (("--bits", "9", "at most 8"), ("--bits", "1", "at least 2"), ("--rate", "1", "less than 1"))
    for flag, value, limit in wrong:
        with pytest.raises(errors.SpecError, match=f"^{flag} must be {limit}; it was given as {value}"):
            spec.from_flags(Outer, parser.parse_args([flag, value]))


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"a = ", "no readable TOML"), (b"\xff\xfe", "no readable TOML")]
)
def test_an_unreadable_recipe_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.SpecError, match=words):
        spec.read_toml(path)


@given(st.integers(1, 10**9))
def test_sizes_are_exact(thousands: int) -> None:
    assert spec.parse_bytes(f"{thousands}kB") == thousands * 1000
    assert spec.parse_bytes(f" {thousands} KiB") == thousands * 1024
    assert spec.parse_bytes(f"{thousands // 1000}.{thousands % 1000:03}MB") == thousands * 1000


@pytest.mark.parametrize(("text", "size"), [("16MB", 16_000_000), (".5gb", 500_000_000), ("2MiB", 2 << 20), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert spec.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["3XB", "0MB", "0.4B", "-1MB", "16", "MB", "", "1e3MB", "nanMB", "9" * 400 + "GB"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(errors.SpecError, match="write it like 16MB"):
        spec.parse_bytes(text)


@pytest.mark.parametrize(("text", "times"), [("2x", 2.0), ("1.5X", 1.5), (" 3 ", 3.0), ("1x", 1.0)])
def test_times(text: str, times: float) -> None:
    assert spec.parse_times(text) == times


@pytest.mark.parametrize("text", ["0.5x", "x", "-2x", "two", "", "nan", "9" * 400 + "x"])
def test_a_wrong_time_is_refused(text: str) -> None:
    with pytest.raises(errors.SpecError, match="write it like 2x"):
        spec.parse_times(text)


numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.builds(
    Record,
    run=st.text(),
    model=st.text(),
    metric=st.text(),
    value=st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    n=st.none() | st.integers(0, 2**53),
    detail=st.dictionaries(st.text(), plain, max_size=3),
)


@given(st.lists(records, max_size=3), st.lists(records, max_size=3))
def test_records_are_read_back_as_they_were(first: list[Record], second: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs", "records.jsonl")
        record.append(path, first)
        record.append(path, second)
        assert record.read(path) == first + second
        record.write(path, second)
        assert record.read(path) == second


def test_a_record_with_line_separators_or_without_a_number_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    detail = {"text": "a\u2028b\x85c\r\n"}
    record.append(path, [Record(run="r", model="m", metric="x", value=float("nan"), detail=detail)])
    (found,) = record.read(path)
    assert found.value is None
    assert found.detail == detail


def test_a_bad_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    record.write(path, [Record(run="r", model="m", metric="x", value=1.0)])
    path.write_text(path.read_text() + "\n{oops\n")
    with pytest.raises(errors.DataError, match="line 3"):
        record.read(path)
    with pytest.raises(errors.DataError, match="no such"):
        record.read(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(errors.DataError, match="UTF-8"):
        record.read(tmp_path / "latin.jsonl")


def test_an_append_to_a_full_disk_leaves_the_old_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    one = Record(run="r", model="m", metric="x", value=1.0)
    record.append(path, [one])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        record.append(path, [one, one])
    assert record.read(path) == [one]


def _break(monkeypatch: pytest.MonkeyPatch, name: str, when: int = 1) -> None:
    """Make the `when`-th call of `os.<name>` or `Path.<name>` fail as on a full disk."""
    holder = os if name == "fsync" else Path
    real = getattr(holder, name)
    calls = 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == when:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(holder, name, failing)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    _break(monkeypatch, name)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("a.txt", "old")]


def _make(path: Path, content: str) -> None:
    with files.new_folder(path, "mark") as folder:
        (folder / "mark").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text(content)


@pytest.mark.parametrize(("name", "when"), [("fsync", 1), ("replace", 1), ("replace", 2)])
def test_a_folder_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: int
) -> None:
    path = tmp_path / "out"
    _make(path, "old")
    _break(monkeypatch, name, when)
    with pytest.raises(OSError, match="No space"):
        _make(path, "new")
    monkeypatch.undo()
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (path / "inner" / "x").read_text() == "old"


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "a" / "out", "mark"):
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []


def test_our_own_folder_is_replaced_and_a_strangers_is_refused(tmp_path: Path) -> None:
    _make(tmp_path / "out", "old")
    _make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "mark").read_text() == "new"
    (tmp_path / "thesis").mkdir()
    _make(tmp_path / "thesis", "an empty folder is fine")
    (tmp_path / "thesis" / "mark").unlink()
    with pytest.raises(errors.UsageError, match="holds other things"):
        _make(tmp_path / "thesis", "new")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(errors.UsageError, match="is a file"):
            _make(path, "new")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "out", "thesis"]


def test_a_read_only_place_is_refused_before_any_work(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if root := os.geteuid() == 0:
        os.setreuid(65534, 0)  # access() asks for the real user, and root may write anywhere
    try:
        with pytest.raises(errors.UsageError, match="cannot be written to"):
            files.check_writable_target(locked / "out" / "model", "mark")
    finally:
        if root:
            os.setreuid(0, 0)
        locked.chmod(0o700)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SHREW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "shrew"
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"


@pytest.mark.parametrize(("word", "hint"), [("shrnik", "did you mean 'shrink'?"), ("qqq", "known: report, shrink.")])
def test_the_nearest_name_is_offered(word: str, hint: str) -> None:
    assert errors.nearest(word, ["shrink", "report"]) == hint
