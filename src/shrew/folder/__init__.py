"""Model folders: everything Shrew reads or writes is a Hugging Face folder plus `shrew.json`, its lineage."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shrew import files

LINEAGE = "shrew.json"


@dataclass
class Loaded:
    """A model in memory with what is known about it.

    `model` holds float32 weights (of packed tensors: exactly the values that the file's codes stand for), in eval mode.
    `packed` maps parameter names to their chosen codes; `save` writes those codes, nothing is rounded a second time.
    `untouched` names every weight a move left as it was, with the reason. `lineage` is the content of `shrew.json`.
    """

    model: Any
    tokenizer: Any
    path: Path | None = None
    packed: dict[str, Any] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return type(self.model).__name__.endswith("ForSequenceClassification")


def load(name: str | Path) -> Loaded:
    path = Path(name)
    config = json.loads((path / "config.json").read_text())
    auto = AutoModelForCausalLM
    if config["architectures"][0].endswith("ForSequenceClassification"):
        auto = AutoModelForSequenceClassification
    model = auto.from_pretrained(path, dtype=torch.float32).eval()
    lineage = json.loads((path / LINEAGE).read_text()) if (path / LINEAGE).exists() else {}
    return Loaded(model, AutoTokenizer.from_pretrained(path), path, lineage=lineage)


def save(loaded: Loaded, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    with files.new_folder(path, LINEAGE) as temporary:
        loaded.model.to(dtype).save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        files.write_text(temporary / LINEAGE, json.dumps(loaded.lineage, indent=1))
