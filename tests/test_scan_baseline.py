"""Baselines: what was known stays known, what is new is new, and the file can be committed. And the CI around them."""

import argparse
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scanned import FIND, RUN, alert, report, reports

from shrew.errors import DataError
from shrew.scan import baseline, config
from shrew.scan.alerts import Report


def back(found: Report, folder: Path) -> list[baseline.Known]:
    baseline.write(folder / "known.json", found)
    return baseline.read(folder / "known.json")


def test_only_what_is_new_is_left(tmp_path: Path) -> None:
    first = report(alert(FIND), alert(RUN, path="run.c"))
    known = back(first, tmp_path)
    moved = alert(FIND, start=70, probability=0.4)  # in its file
    renamed = alert(RUN, path="src/run.c")
    changed = alert(FIND.replace("users", "people"), start=90)
    now = baseline.apply(report(moved, renamed, changed), known)
    assert (now.alerts, now.compared) == ([changed], True)
    assert [item.path for item in now.suppressed] == ["src/run.c", "app/db.py"]
    assert {item.suppressed for item in now.suppressed} == {"baseline"}
    assert baseline.apply(now, known).alerts == [changed]


def test_a_copy_of_a_known_function_is_new_and_not_the_original(tmp_path: Path) -> None:
    known = back(report(alert(FIND, path="m.py")), tmp_path)
    copies = [alert(FIND, path=path) for path in ("a.py", "m.py", "z.py")]
    new, old = baseline.split(copies, known)
    assert ([item.path for item in new], [item.path for item in old]) == (["a.py", "z.py"], ["m.py"])
    gone = [alert(FIND, path=path) for path in ("a.py", "b.py")]  # moved, and copied: one of them is new
    assert [item.path for item in baseline.split(gone, known)[0]] == ["b.py"]
    twice = [alert(FIND, path="m.py", start=1), alert(FIND, path="m.py", start=50)]
    assert [item.function.start for item in baseline.split(twice, known)[0]] == [50]


def test_what_was_known_stays_when_a_baseline_is_written_again(tmp_path: Path) -> None:
    first = report(alert(FIND), alert(RUN, path="run.c"))
    known = back(first, tmp_path)
    held = alert("def h(): 1", suppressed="inline")
    more = report(*first.alerts, alert("def g(): eval(x)", cwe="CWE-95"), suppressed=[held])
    again = back(baseline.apply(more, known), tmp_path)
    assert len(again) == 3 and baseline.split(more.alerts, again)[0] == []


def test_a_baseline_diffs_well() -> None:
    one = baseline.text(report(alert(FIND, start=3), alert(RUN, path="run.c")))
    added = alert("def k(): 2", path="b.py")
    more = baseline.text(report(alert(RUN, path="run.c", start=9), added, alert(FIND, start=80)))
    lines = {line.rstrip(",") for line in one.split("\n")}
    assert lines <= {line.rstrip(",") for line in more.split("\n")}
    assert len(more.split("\n")) == len(one.split("\n")) + 1
    assert baseline.text(report()) == '{\n  "version": 1,\n  "alerts": []\n}\n'


@settings(max_examples=60)
@given(found=reports())
def test_whatever_was_scanned_is_known_afterwards(found: Report, tmp_path_factory: pytest.TempPathFactory) -> None:
    everything = [*found.alerts, *(item for item in found.suppressed if item.suppressed == "baseline")]
    known = back(found, tmp_path_factory.getbasetemp())
    new, old = baseline.split(everything, known)
    assert (new, len(old)) == ([], len(everything))
    for item in everything:
        assert len(baseline.split([*everything, item], known)[0]) == 1
    assert sum(entry.count for entry in known) == len(everything)


DAMAGED = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}', b'{"version": "1", "alerts": []}',
    b'{"version": 0, "alerts": []}', b'{"version": true, "alerts": []}', b'{"version": 1, "alerts": []} x',
    b'{"version": 1, "alerts": [{"path": "a"}]}', b'{"version": 1, "alerts": [{"fingerprint": "", "path": "b"}]}',
    b'{"version": 1, "alerts": [{"fingerprint": "a", "path": "b", "count": -1}]}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_baseline_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "known.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        baseline.read(tmp_path / "known.json")
    assert "\n" not in str(error.value) and "known.json" in str(error.value) and str(error.value).endswith(".")


def test_a_baseline_of_the_future_a_missing_one_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "known.json").write_text('{"version": 9, "alerts": {"new": "form"}}', "utf-8")
    for name, words in (("known.json", "newer Shrew"), ("none.json", "--write-baseline"), (".", "cannot be read")):
        with pytest.raises(DataError, match=words):
            baseline.read(tmp_path / name)


@given(content=st.binary(max_size=60))
def test_no_bytes_break_the_reader(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    with pytest.raises(DataError):
        baseline.read(path)


# --- other people's CI -----------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """The words of every `shrew scan` in the page about CI, in the hook, and in the settings of the hook."""
    text = (ROOT / "docs" / "scan-ci.md").read_text("utf-8")
    hook = (ROOT / ".pre-commit-hooks.yaml").read_text("utf-8")
    found = [re.sub(r"\$\{\{[^}]*\}\}", "x", line).split() for line in re.findall(r"shrew scan ([^`\n]*)", text)]
    return found + [line.replace(",", " ").split() for line in re.findall(r"args: \[([^\]]*)\]", text + hook)]


def test_the_commands_for_ci_have_flags_that_exist() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    config.add_flags(parser)
    assert len(commands()) >= 10
    for words in commands():
        spec = config.from_flags(parser.parse_args(words), "/nowhere")
        assert spec.fail_on in ("any", "none", "medium", "high")


def test_the_snippets_for_ci_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "docs" / "scan-ci.md").read_text("utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)]
    assert [next(iter(block)) for block in blocks if isinstance(block, dict)] == ["repos", "name", "scan"]
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert hook["id"] == blocks[0]["repos"][0]["hooks"][0]["id"]
    assert {key: hook[key] for key in ("entry", "language")} == {
        "entry": "shrew scan --force-exclude", "language": "python"
    }  # fmt: skip
