"""Shrew finds the smallest language model that still does your job, and proves it.

Names are resolved when first used, so that `import shrew` costs nothing. It also teaches `transformers`, now or when
that is imported later, to load the folders that Shrew writes.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_HOMES = {
    "DataError": "shrew.errors",
    "FloorNotMet": "shrew.errors",
    "FolderError": "shrew.errors",
    "MissingExtraError": "shrew.errors",
    "Record": "shrew.record",
    "ShrewError": "shrew.errors",
    "SpecError": "shrew.errors",
    "UnsupportedError": "shrew.errors",
    "UsageError": "shrew.errors",
    "load": "shrew.folder",
    "save": "shrew.folder",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("shrew")
    if name not in _HOMES:
        raise AttributeError(f"module 'shrew' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


def _teach_transformers() -> None:
    """Register the packed weights and the block models; without torch transformers cannot load a model anyway."""
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("shrew.folder.packed").register()
        importlib.import_module("shrew.blocks.detector")


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Lets the first import of `transformers` run as ever, then teaches it; only asking where it is does nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "transformers":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                _teach_transformers()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    _teach_transformers()
else:
    sys.meta_path.insert(0, _AfterTransformers())
