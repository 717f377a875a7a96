"""From a loaded model to its graph: which kind it is, and what the manifest says of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shrew import folder
from shrew.blocks.detector import ShrewForSequenceClassification
from shrew.blocks.stock import ADAPTERS
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.packers.onnx import modernbert, trunk
from shrew.packers.onnx.graph import Graph
from shrew.packers.onnx.kv import calibrated
from shrew.packers.onnx.source import ours
from shrew.packers.onnx.weights import Weights

FORMAT = 1
CHUNK = 64  # tokens


@dataclass(frozen=True)
class Built:
    graph: Graph
    vocabulary: int
    width: int
    context: int
    labels: list[str] | None = None
    families: list[str] | None = None  # of a detector
    comments: bool = False  # that it reads them

    @property
    def whole(self) -> bool:
        """Whether it judges whole texts."""
        return bool(self.labels or self.families)

    @property
    def kind(self) -> str:
        return "detector" if self.families else "classifier" if self.labels else "causal"

    @property
    def weights(self) -> Weights:
        return self.graph.weights

    def manifest(self, loaded: Loaded, name: str) -> dict[str, Any]:
        """What pack.json says of the model itself."""
        eos = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
        eos = loaded.tokenizer.eos_token_id if eos is None else eos
        return {
            "format": FORMAT, "shrew": folder.versions()["shrew"], "kind": self.kind,
            "name": Path(name).resolve().name, "vocabulary": self.vocabulary, "width": self.width,
            "context": self.context, "bos": loaded.tokenizer.bos_token_id,
            "eos": np.atleast_1d([] if eos is None else eos).tolist(), "pad": loaded.tokenizer.pad_token_id,
            "chunk": CHUNK, "align": self.graph.align, "states": [asdict(state) for state in self.graph.states],
            "labels": self.labels,
        } | ({"families": self.families, "comments": self.comments} if self.families else {})  # fmt: skip


def build(loaded: Loaded, bits: int = 0, tokens: Sequence[int] = ()) -> Built:
    """The graph of a model; with `bits`, keys and values are held in so many, fitted to these tokens. Raises
    UnsupportedError, naming what can be packed, where there is none."""
    config = loaded.model.config
    if not loaded.is_classifier:
        model, weights = ours(loaded)
        kv = calibrated(model, tokens, bits) if bits else None
        return Built(trunk.causal(model, weights, kv), model.spec.vocabulary or 0, model.spec.width, model.spec.context)
    if isinstance(loaded.model, ShrewForSequenceClassification):
        model, weights = ours(loaded)
        graph = trunk.detector(model, weights, len(config.families), config.pooling)
        return Built(graph, model.spec.vocabulary or 0, model.spec.width, config.window, None, config.families,
                     config.comments)  # fmt: skip
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    if config.model_type == "modernbert":
        weights = Weights({name: value.detach() for name, value in loaded.model.state_dict().items()}, loaded.packed)
        graph = modernbert.classifier(config, weights)
        return Built(graph, config.vocab_size, config.hidden_size, config.max_position_embeddings, labels)
    if config.model_type not in ADAPTERS:
        known = ", ".join(["modernbert", *ADAPTERS])
        raise UnsupportedError(f"{config.model_type}: such a classifier cannot be packed; known: {known}.")
    model, weights = ours(loaded)
    graph = trunk.classifier(model, weights, len(labels))
    return Built(graph, model.spec.vocabulary or 0, model.spec.width, model.spec.context, labels)
