"""The corpus of `shrew scan`: whose licence is read, and that nothing evaluated is; the two recipes are twins."""

import hashlib
import io
import json
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew import data, spec
from shrew.blocks.model import build
from shrew.data import code, python
from shrew.errors import DataError
from shrew.train import Recipe

ROOT = Path(__file__).parents[1]


def words(name: str, count: int = 200) -> str:
    """Words that no other name gives."""
    return " ".join("w" + hashlib.sha256(f"{name} {i}".encode()).hexdigest()[:6] for i in range(count))


def lines(name: str, count: int = 200) -> str:
    """The same, eight on a line and with letters alone."""
    every = words(name, count).translate(str.maketrans("0123456789", "ghijklmnop")).split()
    return "\n".join(" ".join(every[low : low + 8]) for low in range(0, count, 8)) + "\n"


def archive(path: Path, content: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, text in content.items():
            raw = text.encode()
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(raw)
            file.addfile(info, io.BytesIO(raw))
    return path


def sdist(path: Path, name: str, content: dict[str, str], licence: str = "MIT", urls: str = "") -> Path:
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: {licence}\n{urls}\n"
    return archive(path / f"{name}-1.0.tar.gz", {"PKG-INFO": head, **content})


def npm(path: Path, name: str, content: dict[str, str], **about: Any) -> Path:
    return archive(path / f"{name}-2.0.tgz", {"package.json": json.dumps({"name": name, **about}), **content})


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three evaluated functions: a long one in C, a short one, and a long one in Python."""
    rows = [
        {"project": "someone/Evil_Server.git", "language": "c", "before": lines("c before"), "after": lines("c after")},
        {"project": "curl", "language": "c", "before": lines("short", 30), "after": lines("shorter", 12)},
        {"project": "x/src", "language": "python", "before": lines("py before"), "after": lines("py after")},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def kept(paths: list[Path], pairs: Path | None, limit: int = 10_000_000) -> tuple[set[str], code.Manifest]:
    rows, manifest = code.build(paths, code.Evaluated([pairs] if pairs else []), limit, installed=False)
    return {row["id"] for items in rows.values() for row in items}, manifest


def test_nothing_evaluated_is_read(tmp_path: Path, pairs: Path) -> None:
    fine = {"src/fine.c": lines("fine"), "src/deep.py": lines("deep")}
    near = {
        "src/copy.c": "int x;\n" + lines("c before"),
        "part.c": lines("own") + " ".join(lines("c after").split()[20:70]) + "\n",
        "commented.c": lines("mine") + "/* why */ ".join(lines("c after").split()[20:70]) + "\n",
        "whole.c": lines("around") + lines("short", 30) + lines("rest"),
        "forty_nine.c": lines("else") + " ".join(lines("c after").split()[20:69]) + "\n",
        "tiny.c": lines("more") + lines("shorter", 12),  # too short to tell one function from another
        "third_party/curl-8.1/url.c": lines("url"),
        "vendor/evil-server.h": lines("header"),
    }
    paths = [
        sdist(tmp_path, "fine", fine),
        sdist(tmp_path, "near", near),
        sdist(tmp_path, "Curl", {"a.c": lines("a")}),
        sdist(tmp_path, "binding", {"b.c": lines("b")}, urls="Home-page: https://github.com/someone/evil.server"),
        npm(tmp_path, "theirs", {"c.js": lines("c")}, license="MIT",
            repository={"url": "git+https://github.com/z/evil_server.git"}),
    ]  # fmt: skip
    names, manifest = kept(paths, pairs)
    assert names == {"fine 1.0/src/fine.c", "fine 1.0/src/deep.py", "near 1.0/forty_nine.c", "near 1.0/tiny.c"}
    assert manifest.excluded == {
        "file that shares a run with an evaluated function": 4,
        "package of an evaluated project": 3,
        "file of a vendored evaluated project": 2,
    }
    assert sorted(manifest.excluded_packages) == ["Curl 1.0", "binding 1.0", "theirs"]
    assert (manifest.projects, manifest.evaluated["pairs.jsonl"]["functions"]) == (3, 6)
    names, manifest = kept(paths, None)
    assert len(names) == 2 + len(near) + 3  # it is the pairs that exclude, nothing else
    assert manifest.excluded == {}


@pytest.mark.parametrize(
    ("licence", "taken"),
    [("MIT", True), ("BSD-3-Clause", True), ("Apache License, Version 2.0", True), ("GPL-2.0", False),
     ("MIT AND LGPL-2.1", False), ("see LICENSE", False), ("", False)],
)  # fmt: skip
def test_only_permissive_packages_are_read(tmp_path: Path, licence: str, taken: bool) -> None:
    paths = [sdist(tmp_path, "thing", {"a.c": lines("a")}, licence),
             npm(tmp_path, "other", {"a.js": lines("b")}, license=licence, version="2.0")]  # fmt: skip
    names, manifest = kept(paths, None)
    assert names == ({"thing 1.0/a.c", "other 2.0/a.js"} if taken else set())
    assert {entry["licence"] for entry in manifest.packages.values()} == ({licence} if taken else set())


def test_files_under_another_licence_and_files_that_nobody_wrote_are_left_out(tmp_path: Path) -> None:
    files = {
        "ok.c": "/* Copyright 2020 */\n" + lines("ok"),
        "gnu.c": "/* GNU General Public License */\n" + lines("gnu"),
        "deps/part/COPYING": "GNU LESSER GENERAL PUBLIC LICENSE",
        "deps/part/src/part.c": lines("part"),
        "deps/free/LICENSE": "The MIT License",
        "deps/free/free.c": lines("free"),
        "LICENSE": "MIT; one part is under the GNU General Public License",
        "made.c": "/* Generated by Cython 3.0 */\n" + lines("made"),
        "table.c": "int t[] = {" + "\n".join("12345678, 87654321," for _ in range(50)) + "};\n",
        "wide.js": "x = 1;" * 400,
        "tests/check.c": lines("check"),
        "short.c": "int a;\n",
        "binary.c": "\0" * 300,
        "data.txt": lines("data"),
    }
    latin = archive(tmp_path / "latin.tar.gz", {})
    with tarfile.open(latin, "w:gz") as file:
        for name, raw in {"PKG-INFO": b"Name: latin\nLicense: MIT\n", "a.c": b"// caf\xe9\n" * 40}.items():
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(raw)
            file.addfile(info, io.BytesIO(raw))
    names, manifest = kept([sdist(tmp_path, "thing", files), latin], None)
    assert names == {"thing 1.0/ok.c", "thing 1.0/deps/free/free.c"}
    assert manifest.languages == {"c": {"files": 2, "bytes": sum(len(files[n]) for n in ("ok.c", "deps/free/free.c"))}}


def test_a_file_counts_once_and_a_language_has_its_share(tmp_path: Path) -> None:
    shared = lines("zlib", 2000)
    paths = [sdist(tmp_path, "a", {"z.c": shared, "again.py": lines("p")}),
             sdist(tmp_path, "b", {"z/z.c": shared + lines("news"), "copy.c": shared}),
             sdist(tmp_path, "c", {f"f{i}.c": lines(f"f{i}") for i in range(40)})]  # fmt: skip
    names, manifest = kept(paths, None)
    assert len(names) == 42
    assert manifest.excluded == {"file that copies an earlier one": 2}
    half, cut = kept(paths, None, limit=40_000)
    assert half < names
    assert 0.7 * 40_000 * code.SHARES["c"] < cut.languages["c"]["bytes"] <= 40_000 * code.SHARES["c"]
    assert kept(paths[::-1], None, limit=40_000)[1] == cut  # the order of the archives changes nothing


def test_the_script_writes_what_train_reads(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    sdist(tmp_path / "in", "fine", {"a.c": lines("a"), "b.py": lines("b"), "c.c": lines("c before")})
    out = tmp_path / "out"
    args = ["--sources", str(tmp_path / "in"), "--exclude", str(pairs), "--no-installed", "--tokens", "300",
            "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["corpus.py", *args])
    runpy.run_path(str(ROOT / "recipes" / "scan" / "corpus.py"), run_name="__main__")
    assert {item.text for item in data.documents([str(out)])} == {lines("a"), lines("b")}
    assert len(json.loads((out / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]) == 300
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["packages"] == {"fine 1.0": {"licence": "MIT", "files": 2, "bytes": len(lines("a")) * 2}}
    said = capsys.readouterr().out
    assert "3 evaluated projects are left out" in said
    assert "left out: 1 (file that shares a run with an evaluated function)" in said


def test_bad_input_is_told(tmp_path: Path) -> None:
    bad = tmp_path / "bad-1.0.tar.gz"
    bad.write_bytes(b"\x1f\x8b" + b"no archive" * 20)
    with pytest.raises(DataError, match=r"bad-1\.0\.tar\.gz is no readable"):
        code.read_archive(bad)
    (tmp_path / "rows.jsonl").write_text('{"before": "x"}\n', "utf-8")
    with pytest.raises(DataError, match="line 1: no project, before and after"):
        code.Evaluated([tmp_path / "rows.jsonl"])
    assert code.read_archive(archive(tmp_path / "bare.tar.gz", {"a.c": lines("a")})).licence == ""
    odd = archive(tmp_path / "odd.tgz", {"package.json": "[1", "a.js": lines("a")})
    assert code.read_archive(odd).licence == ""


@given(st.lists(st.integers(0, 2**64 - 1), max_size=70), st.integers(1, 60))
@settings(max_examples=60)
def test_hashes_of_runs_are_horners(values: list[int], length: int) -> None:
    found = python.windows(np.array(values, np.uint64), length)
    wanted = []
    for low in range(len(values) - length + 1):
        total = 0
        for value in values[low : low + length]:
            total = (total * int(python.FACTOR) + value) % 2**64
        wanted.append(total)
    assert found.tolist() == wanted


def test_the_twins_differ_in_their_layers_alone() -> None:
    dense, hybrid = (spec.parse(Recipe, spec.read_toml(path), path.name)
                     for path in sorted((ROOT / "recipes" / "scan").glob("pretrain-*.toml")))  # fmt: skip
    one, other = spec.dump(dense.train), spec.dump(hybrid.train)
    assert {key for key in one if one[key] != other[key]} == {"out"}
    sizes = []
    for recipe in (dense, hybrid):
        shape = spec.dump(recipe.model) | {"vocabulary": 4096}
        sizes.append(sum(p.numel() for p in build(spec.parse(type(recipe.model), shape, "model")).parameters()))
    assert abs(sizes[0] - sizes[1]) < 0.001 * sizes[0]
