"""Every command of the README and of docs/ runs, each page in a folder of its own and in order."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLOW = "# takes minutes"
SET_UP = ("make", "pip", "git", "cd", "python3 -m venv", "source", ".")

Shell = Callable[[str, Path], subprocess.CompletedProcess[str]]


def sh_blocks(page: str) -> list[tuple[int, list[str]]]:
    """The ```sh blocks of a page: line number of the fence, and commands (continued lines joined)."""
    blocks = []
    for match in re.finditer(r"^( *)```sh\n(.*?)^\1```", page, re.M | re.S):
        lines = match[2].replace("\\\n", " ").splitlines()
        blocks.append((page.count("\n", 0, match.start()) + 1, [line.strip() for line in lines if line.strip()]))
    return blocks


def runnable(lines: list[str]) -> list[str]:
    """The commands of a block that the test runs: all but set-up; a block marked slow may hold nothing but set-up."""
    commands = [line for line in lines if not line.startswith("#")]
    mine = [line for line in commands if not any(line == word or line.startswith(word + " ") for word in SET_UP)]
    if any(SLOW in line for line in lines):
        assert not mine, f"only make and set-up commands may be marked '{SLOW}', not: {mine}"
        return []
    return mine


def scripts(page: Path) -> list[tuple[int, str]]:
    """The line number and the script of each block with something to run."""
    blocks = [(number, runnable(block)) for number, block in sh_blocks(page.read_text("utf-8"))]
    return [(number, "set -eu\n" + "\n".join(commands)) for number, commands in blocks if commands]


def pages() -> list[Path]:
    """Those with commands, the longest first, so that no worker is left alone with one at the end."""
    found = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if scripts(page)]
    weights = {"\nshrew ": 1, "\nshrew shrink ": 20}
    return sorted(found, key=lambda page: -sum(script.count(word) * weight for _, script in scripts(page)
                                               for word, weight in weights.items()))  # fmt: skip


def test_blocks_are_found_and_only_set_up_is_skipped(tmp_path: Path) -> None:
    page = "a\n```sh\nmake demo  # takes minutes\n```\n\n```sh\npip install .\nshrew a \\\n  b\n# why\n```\n```py\n"
    assert sh_blocks(page) == [(2, ["make demo  # takes minutes"]), (6, ["pip install .", "shrew a    b", "# why"])]
    assert [runnable(lines) for _, lines in sh_blocks(page)] == [[], ["shrew a    b"]]
    (tmp_path / "page.md").write_text(page, "utf-8")
    assert scripts(tmp_path / "page.md") == [(6, "set -eu\nshrew a    b")]
    with pytest.raises(AssertionError, match="only make"):
        runnable(["shrew shrink starter  # takes minutes"])


@pytest.fixture
def shell(warm: Path) -> Shell:
    """Runs a bash script in a folder, its `shrew` and `python -` in children of the warm process."""
    environment = os.environ | {"PATH": f"{warm}{os.pathsep}{os.environ['PATH']}"}

    def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True,
                              check=False)  # fmt: skip

    return run


@pytest.fixture(scope="module")
def beside(
    tmp_path_factory: pytest.TempPathFactory, text: str, tiny_llama_folder: Path, tiny_classifier_folder: Path
) -> Path:
    """What pages speak of: model/, classifier/, my.txt and my.jsonl (never write in it)."""
    place = tmp_path_factory.mktemp("beside")
    shutil.copytree(tiny_llama_folder, place / "model")
    shutil.copytree(tiny_classifier_folder, place / "classifier")
    (place / "my.txt").write_text(text[:20_000], "utf-8")
    kinds = {"code": "def f(x):", "comment": "# a remark", "prose": "It rained."}
    cases = [{"text": f"{sample} {i}", "label": label} for i in range(40) for label, sample in kinds.items()]
    (place / "my.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), "utf-8")
    (place / "recipes").symlink_to(ROOT / "recipes")
    return place


def test_warm_commands_are_like_fresh_ones(shell: Shell, tmp_path: Path) -> None:
    """Streams, pipes, folders, variables and exit codes are those of a fresh process; nothing of Shrew is there yet."""
    done = shell("shrew --help | head -n 1; shrew nonsense || echo code $?; echo | shrew --version > version", tmp_path)
    assert done.stdout.splitlines() == [
        "shrew: finds the smallest language model that still does your job, and proves it.", "code 2"]  # fmt: skip
    assert done.stderr.startswith("shrew: unknown verb 'nonsense'")
    assert (tmp_path / "version").read_text("utf-8").startswith("shrew ")
    script = "import os, sys\nprint(os.getcwd(), os.environ['KEY'], 'torch' in sys.modules, 'shrew' in sys.modules)"
    done = shell(f"KEY=value python - <<'END'\n{script}\nsys.exit(3)\nEND", tmp_path)
    assert (done.returncode, done.stdout.split()) == (3, [str(tmp_path), "value", "True", "False"]), done.stderr
    done = shell("python - <<< 'raise ValueError(5)'", tmp_path)
    assert done.returncode == 1 and "ValueError: 5" in done.stderr
    done = shell("python -c 'import sys; print(sys.argv, sys.stdin.read())' a <<< b", tmp_path)
    assert done.stdout == "['-c', 'a'] b\n\n", done.stderr
    assert shell("set -eu\nshrew nonsense 2> /dev/null\necho on", tmp_path).stdout == ""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.xdist_group(page.name), id=page.stem) for page in pages()]
)
def test_the_commands_of_a_page_run(page: Path, shell: Shell, beside: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(beside, work, symlinks=True)
    for number, script in scripts(page):
        done = shell(script, work)
        assert done.returncode == 0, f"{page.name}:{number}:\n{script}\n{done.stdout}{done.stderr}"
