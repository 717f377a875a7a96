"""Arguments of verbs that take a model, with something wrong: each makes them in a folder of its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def copied(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    return target


def truncated(model: Path, work: Path) -> list[Any]:
    bad = copied(model, work / "bad")
    os.truncate(bad / "model.safetensors", 90_000)
    return [bad]


def disagreeing(model: Path, work: Path) -> list[Any]:
    bad = copied(model, work / "bad")
    config = json.loads((bad / "config.json").read_text()) | {"intermediate_size": 96}
    (bad / "config.json").write_text(json.dumps(config))
    return [bad]


def not_a_number(model: Path, work: Path) -> list[Any]:
    bad = copied(model, work / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    return [bad]


def too_large(factor: float) -> Callable[[Path, Path], list[Any]]:
    """Weights that are numbers, but what comes of them is not, or not its squares."""

    def make(model: Path, work: Path) -> list[Any]:
        bad = copied(model, work / "bad")
        tensors = load_file(bad / "model.safetensors")
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"] *= factor
        save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
        return [bad]

    return make


def task_file(content: bytes, flag: str = "--task", name: str = "bad.jsonl") -> Callable[[Path, Path], list[Any]]:
    def make(model: Path, work: Path) -> list[Any]:
        (work / name).write_bytes(content)
        return [model, flag, work / name]

    return make


def flags(*more: str) -> Callable[[Path, Path], list[Any]]:
    return lambda model, work: [model, *more]


def occupied(model: Path, work: Path) -> list[Any]:
    (work / "out").mkdir()
    (work / "out" / "mine.txt").write_text("mine")
    return [model]
