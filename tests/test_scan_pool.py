"""Worker processes of a scan: what one process finds, in its order, and nothing left behind however the scan ends."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shrew.__main__ import main
from shrew.scan import pipeline, pool

BAD = 'def find(db, name):\n    return db.execute("SELECT * FROM t WHERE n = \'%s\'" % name)\n'
Run = Callable[..., dict[str, Any]]


STARTED: "list[Started]" = []


class Started(subprocess.Popen[bytes]):
    """A process that is remembered."""

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        STARTED.append(self)


@pytest.fixture(autouse=True)
def planted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six files, one of them odd and one that is none, and workers for however little."""
    monkeypatch.setattr(pipeline, "POOLED", 0)
    monkeypatch.setattr(pool.subprocess, "Popen", Started)
    STARTED.clear()
    for at in range(6):
        (place / f"{at}.py").write_text(BAD * at + f"x = {at}\n")
    (place / "odd.py").write_bytes(b"# \xe9\n" + BAD.encode())
    (place / "none.py").write_bytes(bytes(range(256)))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def go(*words: str) -> dict[str, Any]:
        capfd.readouterr()
        code = main(["scan", ".", "--format", "json", *words])
        out, err = capfd.readouterr()
        assert (code, err) == (1, "")
        report: dict[str, Any] = json.loads(out)
        return report | {"seconds": 0}

    return go


def ended() -> bool:
    return all(process.poll() is not None for process in STARTED)


@pytest.mark.parametrize(("words", "ahead"), [([], 256), (["--detector", "none"], 1)], ids=["model", "rules"])
def test_workers_find_what_one_process_finds(
    run: Run, words: list[str], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "AHEAD", ahead)
    mine = '[[rule]]\nid = "mine"\nlanguages = ["python"]\ncwe = ""\nseverity = "low"\nmessage = "No."\n'
    Path("mine.toml").write_text(mine + 'origin = "a test"\nquery = "(module) @at"\n')
    words = [*words, "--rules", "mine.toml", "--no-cache"]
    alone = run("--jobs", "1", *words)
    assert not STARTED
    assert run("--jobs", "2", *words) == alone and len(alone["alerts"]) > 5
    assert len(STARTED) == 2 and ended()


def test_few_files_need_no_workers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "POOLED", 10_000)
    run("--jobs", "2")
    assert not STARTED


def test_what_workers_found_is_kept(run: Run) -> None:
    Path("none.py").unlink()
    first = run("--jobs", "2")
    STARTED.clear()
    assert run("--jobs", "2") == first and not STARTED


def test_a_file_that_ends_its_worker_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = pool._answer

    def crash(process: Any, message: Any) -> Any:
        if getattr(message, "path", "") == "3.py":
            process.kill()
        return answer(process, message)

    monkeypatch.setattr(pool, "_answer", crash)
    report = run("--jobs", "2", "--no-cache")
    whys = {item["path"]: item["why"] for item in report["skipped"]}
    assert whys["3.py"] == "the process that looked at it ended (SIGKILL)" and set(whys) == {"3.py", "none.py"}
    assert report["files"] == 6 and ended()


def test_what_a_worker_fails_at_is_done_once_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, write = run("--jobs", "1", "--no-cache"), pool._write
    monkeypatch.setattr(pool, "_write", lambda to, what: write(to, 0 if getattr(what, "path", "") == "3.py" else what))
    assert run("--jobs", "2", "--no-cache") == alone and ended()
    assert 1 in [process.returncode for process in STARTED]


@pytest.mark.parametrize("program", ["", "/bin/false", "/nowhere/python"])
def test_where_no_worker_can_be_started(run: Run, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run("--jobs", "1", "--no-cache")
    monkeypatch.setattr(pool.sys, "executable", program)
    assert run("--jobs", "2", "--no-cache") == alone


def test_ctrl_c_ends_the_workers_and_keeps_what_was_learnt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held, seen = pipeline.Held, list[str]()

    def stop(path: str, *rest: Any) -> Any:
        seen.append(path)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return held(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "Held", stop)
        assert main(["scan", ".", "--jobs", "2"]) == 130
    assert len(STARTED) == 2 and ended()
    sent = list[str]()
    monkeypatch.setattr(pool.Pool, "submit", lambda self, task: sent.append(task.path) or pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        main(["scan", ".", "--jobs", "2"])
    assert sent == ["4.py"], "the first four are known"


def test_a_worker_ends_with_what_it_works_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.Pool, "close", lambda self: self._threads.shutdown())  # as after a kill: it is not told
    run("--jobs", "2")
    for process in STARTED:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        assert process.wait(10) == 0
        process.stdout.close()


def test_workers_import_nothing_that_is_scanned(run: Run) -> None:
    for name in ("msgspec", "subprocess", "shrew", "signal", "tree_sitter", "multiprocessing", "sitecustomize"):
        Path(f"{name}.py").write_text("open('ran', 'w')\n")
    assert run("--jobs", "2")["files"] == 14 and len(STARTED) == 2
    assert not Path("ran").exists()
