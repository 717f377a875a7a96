"""The guards of the house: what may import what, how long things may be, and that what the pages say is so."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import shrew
from shrew.__main__ import VERBS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "shrew"
SHELVES = [
    "spec errors files machine code entropy",
    "objectives",
    "record folder data muon blocks runtime",
    "tasks train report",
    "measure moves adapt packers",
    "search",
    "scan scale audit",
    "__init__ __main__",
]
RANKS = {shelf: rank for rank, shelves in enumerate(SHELVES) for shelf in shelves.split()}
VOCABULARY = {shelf for shelf, rank in RANKS.items() if rank == 0}
FENCES = {
    "runtime": VOCABULARY,
    "scan": {"runtime", "record", "report"} | VOCABULARY,
    "report": {"record"} | VOCABULARY,
}
LIGHT = {"__init__", "__main__", "record", "report", "scan", "runtime"} | VOCABULARY
HEAVY = {"torch", "transformers", "datasets", "pyarrow", "compressed_tensors", "pandas", "scipy"}
FILE_LINES, FUNCTION_LINES = 600, 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _python_files() -> list[Path]:
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "recipes")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# --- imports ---------------------------------------------------------------------------------------------------------


def _shelf(path: str) -> str:
    """'folder/packed.py' -> 'folder', 'spec.py' -> 'spec'."""
    return path.split("/", maxsplit=1)[0].removesuffix(".py")


def _imported(node: ast.AST) -> list[str]:
    """The dotted names that a statement imports; '.' for a relative import."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return ["."]
        return [f"{node.module}.{name.name}" for name in node.names]
    return []


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not the insides of functions, nor what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            continue
        yield child
        yield from _run_on_import(child)


def import_faults(path: str, source: str) -> list[str]:
    """What is wrong with the imports of `src/shrew/<path>`."""
    own, tree, faults = _shelf(path), ast.parse(source), []
    if own not in RANKS:
        return [f"{path}: '{own}' has no rank"]
    for node in ast.walk(tree):
        for name in _imported(node):
            first, _, rest = name.partition(".")
            if first == "":
                faults.append(f"{path}:{node.lineno}: relative import")
            elif first == "shrew":
                other = rest.partition(".")[0] or "__init__"
                if other not in RANKS:
                    faults.append(f"{path}:{node.lineno}: imports '{other}', which has no rank")
                elif own in FENCES and other not in FENCES[own] | {own}:
                    faults.append(f"{path}:{node.lineno}: {own} may not import {other} (fence)")
                elif other != own and RANKS[other] >= RANKS[own] and not {own, other} <= VOCABULARY:
                    faults.append(f"{path}:{node.lineno}: {own} may not import {other} (rank)")
            elif first in HEAVY and own in FENCES:
                faults.append(f"{path}:{node.lineno}: {own} may not import {first} (fence)")
    for node in _run_on_import(tree):
        heavy = {name.partition(".")[0] for name in _imported(node)} & HEAVY
        if heavy and own in LIGHT:
            faults.append(f"{path}: imports {heavy.pop()} when it is itself imported")
    return faults


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downward(path: Path) -> None:
    assert import_faults(path.relative_to(SOURCE).as_posix(), path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("record.py", "import shrew.folder", "record may not import folder (rank)"),
        ("data/text.py", "from shrew.folder import Loaded", "data may not import folder (rank)"),
        ("folder/x.py", "def f():\n    from shrew.search import main", "folder may not import search (rank)"),
        ("moves/quantize.py", "from shrew import measure", "moves may not import measure (rank)"),
        ("spec.py", "from shrew import record", "spec may not import record (rank)"),
        ("folder/x.py", "import shrew", "folder may not import __init__ (rank)"),
        ("folder/x.py", "from shrew import load", "'load', which has no rank"),
        ("folder/x.py", "from . import y", "relative import"),
        ("toolbox.py", "", "no rank"),
        ("report.py", "from shrew.tasks import text", "report may not import tasks (fence)"),
        ("report.py", "def f():\n    import torch", "report may not import torch (fence)"),
        ("runtime/engine.py", "from shrew.record import Record", "runtime may not import record (fence)"),
        ("scan.py", "from shrew.data import Document", "scan may not import data (fence)"),
        ("machine.py", "import torch", "imports torch when it is itself imported"),
        ("machine.py", "if True:\n    from torch.nn import functional", "imports torch when it is itself imported"),
    ],
)
def test_a_planted_import_is_caught(path: str, source: str, words: str) -> None:
    assert any(words in fault for fault in import_faults(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("machine.py", "if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"),
        ("machine.py", "from shrew import files\nfrom shrew.errors import nearest"),
        ("folder/x.py", "import torch\nfrom shrew.folder import y\nfrom shrew import spec"),
        ("search.py", "from shrew.moves import quantize\nfrom shrew import measure"),
        ("scan.py", "from shrew.report import page\nfrom shrew.runtime import engine"),
    ],
)
def test_a_sound_import_passes(path: str, source: str) -> None:
    assert import_faults(path, source) == []


def _python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_help_and_import_load_nothing_heavy() -> None:
    heavy = HEAVY | {"numpy", "msgspec", "rich", "tokenizers", "safetensors", "psutil"}
    done = _python(
        "import sys, shrew\nfrom shrew.__main__ import main\nassert main(['--help']) == 0\n"
        f"print('heavy:', sorted({heavy!r} & set(sys.modules)))"
    )
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(LIGHT - {"__init__", "scan"}))
def test_light_modules_import_without_torch(name: str) -> None:
    blocked = "".join(f"sys.modules[{heavy!r}] = None\n" for heavy in sorted(HEAVY - {"pandas"}))
    done = _python(f"import sys\n{blocked}import shrew.{name}")
    assert (done.returncode, done.stderr) == (0, "")


# --- size ------------------------------------------------------------------------------------------------------------


def size_faults(name: str, source: str) -> list[str]:
    """The file if it is too long, and each function that is."""
    lines = len(source.splitlines())
    faults = [f"{name}: {lines} lines"] if lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTIONS) and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
            faults.append(f"{name}: {node.name} has {length} lines")
    return faults


def test_files_and_functions_stay_short() -> None:
    assert [fault for path in _python_files() for fault in size_faults(path.name, path.read_text("utf-8"))] == []


def test_a_planted_length_is_caught() -> None:
    assert size_faults("a.py", "x = 1\n" * 601) == ["a.py: 601 lines"]
    assert size_faults("a.py", "x = 1\n" * 600) == []
    assert size_faults("a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * 100) == ["a.py: f has 101 lines"]
    assert size_faults("a.py", "async def f():\n" + "    x = 1\n" * 99) == []


# --- one table of verbs, the public names ----------------------------------------------------------------------------


def verb_lists(source: str) -> list[int]:
    """The lines of literals that list three verbs or more."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)
        and sum(
            isinstance(item, ast.Constant) and isinstance(item.value, str) and item.value in VERBS
            for item in (node.keys if isinstance(node, ast.Dict) else node.elts)
        )
        >= 3
    ]


def test_there_is_one_table_of_verbs() -> None:
    found = [path.name for path in sorted(SOURCE.rglob("*.py")) for _ in verb_lists(path.read_text("utf-8"))]
    assert found == ["__main__.py"]
    assert verb_lists("x = 1\ny = ('shrink', 'apply', 'report')") == [2]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_has_a_page_and_a_module(verb: str) -> None:
    assert (ROOT / "docs" / f"{verb}.md").is_file()
    home = SOURCE / VERBS[verb][0].removeprefix("shrew.").replace(".", "/")
    file = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    names = {node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, FUNCTIONS)}
    imported = {name for node in ast.parse(file.read_text("utf-8")).body for name in _imported(node)}
    assert "main" in names or any(name.endswith(".main") for name in imported)


def test_the_public_names() -> None:
    assert shrew.__all__ == [
        "DataError",
        "FloorNotMet",
        "FolderError",
        "MissingExtraError",
        "Record",
        "ShrewError",
        "SpecError",
        "UnsupportedError",
        "UsageError",
        "__version__",
        "load",
        "save",
    ]


# --- pages -----------------------------------------------------------------------------------------------------------


def test_the_tour_and_the_dependencies_are_in_contributing() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tour = re.findall(r"^\d+\. `(src/shrew/[\w/]+\.py)`", page, re.M)
    assert len(tour) == 8
    assert [name for name in tour if not (ROOT / name).is_file()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = [project["dependencies"], *project["optional-dependencies"].values()]
    named = set(re.findall(r"^\| `([\w-]+)` \|", page, re.M))
    assert {re.split(r"[<>=!~\[; ]", need)[0] for group in needs for need in group} == named


def test_every_direct_dependency_has_a_tried_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = [project["dependencies"], *project["optional-dependencies"].values()]
    tried = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.M))
    assert {re.split(r"[<>=!~\[; ]", need)[0] for group in needs for need in group} - tried == set()


# Assembled here, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    "|".join([r"(?<![\w.])/" + "work/", r"(?<![\w.])/" + "root/", r"\b[Ss]ess" + r"ions?\b"])
)
# pytest's own word, ONNX Runtime's and SQLAlchemy's
ALLOWED = ('scope="sess' + 'ion"', '"sess' + 'ion.', "db.sess" + "ion.", "|sess" + "ion|")


def test_nothing_speaks_of_the_place_where_it_was_written() -> None:
    faults = []
    for path in _tracked():
        if path.name == "tokenizer.json":
            continue  # a vocabulary holds every common word
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # weights and pictures
        for number, line in enumerate(lines, 1):
            for allowed in ALLOWED:
                line = line.replace(allowed, "")
            if FORBIDDEN.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert faults == []
