"""Which source files a piece of Shrew reaches by its imports, so that a result is kept until one of them changes."""

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import shrew

ROOT = Path(shrew.__file__).parents[1]


def reached(modules: Iterable[str], aside: Iterable[str] = ()) -> list[Path]:
    """The files of these modules and of all of Shrew that they import, sorted. `aside`: patterns of modules that do not
    count, and are not followed."""
    found: set[Path] = set()
    left = list(modules)
    while left:
        name = left.pop()
        file = _file(name)
        if file is None or file in found or any(fnmatch(name, pattern) for pattern in aside):
            continue
        found.add(file)
        left += _imported(file)
    return sorted(found)


def _file(name: str) -> Path | None:
    place = ROOT.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.exists()), None)


def _imported(file: Path) -> Iterator[str]:
    """Names that may be modules: `from a import b` is a, and a.b where that is a file."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "shrew")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shrew":
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
