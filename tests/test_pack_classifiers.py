"""Packed classifiers: each text gets the logits that torch gives it alone, whatever it is padded with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from shrew import record
from shrew.__main__ import main
from shrew.errors import UnsupportedError
from shrew.folder import Loaded, Packed, Uniform
from shrew.moves import grids
from shrew.packers.onnx import check
from shrew.packers.onnx.build import build
from shrew.runtime.manifest import DATA
from shrew.runtime.manifest import GRAPH as MODEL

COMMON: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0,
                          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BERT: dict[str, Any] = {**COMMON, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
ROPE = {"full_attention": {"rope_type": "default", "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
CONFIGS = {
    "llama": transformers.LlamaConfig(**COMMON, num_key_value_heads=2),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, num_key_value_heads=1, head_dim=16, sliding_window=4,
                                            layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "modernbert": transformers.ModernBertConfig(**BERT, layer_types=TYPES, rope_parameters=ROPE),
    "modernbert with all": transformers.ModernBertConfig(
        **{**BERT, "hidden_size": 48, "classifier_pooling": "mean", "norm_bias": True, "attention_bias": True,
           "mlp_bias": True, "hidden_activation": "silu", "classifier_bias": True},
        layer_types=TYPES, rope_parameters=ROPE),
}  # fmt: skip


def random(config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else nn.init.uniform_(p, 0.4, 1.6)
    return model


def texts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 97, size).tolist() for size in (5, 30, 1, 64, 12, 12, 3, 9, 40)]


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_text_as_if_alone(name: str, bits: int, tmp_path: Path) -> None:
    model, packed = random(CONFIGS[name]), {}
    for part, p in model.named_parameters():
        if bits and p.ndim > 1 and min(p.shape) > 3:
            grid = Uniform(bits, 16)
            packed[part] = Packed(*grids.nearest(p.detach(), grid, search=False), grid, tuple(p.shape))
            p.data = packed[part].dense()
    built = build(Loaded(model, None, packed=packed))
    (tmp_path / MODEL).write_bytes(built.graph.proto(built.graph.write(tmp_path / DATA), 0))
    labeller = check.Labeller(check.opened(tmp_path / MODEL))
    found = check.exact_labels(labeller, model, texts())
    assert found["logit_difference"] < 3e-4 < 0.1 < found["largest_logit"] and found["texts"] == 9
    kinds = {kind for part, kind in built.weights.effective.items() if built.weights.dense[part].ndim > 1}
    assert not bits or kinds == {"int4 g16 sym", built.weights.effective[
        "score.weight" if "score.weight" in built.weights.effective else "classifier.weight"]}  # fmt: skip


def test_a_classifier_folder(tiny_tokenizer: Any, tmp_path: Path) -> None:
    labels = {0: "code", 1: "comment", 2: "prose"}
    model = random(transformers.ModernBertConfig(**{**BERT, "vocab_size": 300}, id2label=labels))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    small, out = tmp_path / "small", tmp_path / "packed"
    quantize = ["quantize", "--bits", "8", "--method", "rtn", "--text", __file__, "--out", str(small)]
    assert main(["apply", str(tmp_path / "model"), *quantize]) == 0
    kept = tmp_path / "records.jsonl"
    assert main(["pack", str(small), "--out", str(out), "--text", __file__, "--records", str(kept)]) == 0
    assert {row.run for row in record.read(kept)} == {"pack small"} and "equal_greedy_tokens" not in kept.read_text()
    found = json.loads((out / "pack.json").read_text("utf-8"))
    assert found["kind"] == "classifier" and found["labels"] == list(labels.values()) and found["states"] == []
    assert found["exact"]["logit_difference"] < 1e-3 and found["shipped"]["top1"] > 0.8
    assert set(found["shipped"]["seconds_per_text"]) == {"0", "4"}


def test_classifiers_of_other_types_are_refused(tiny_classifier_folder: Path, tmp_path: Path, capfd: Any) -> None:
    assert main(["pack", str(tiny_classifier_folder), "--out", str(tmp_path / "packed")]) == 2
    assert "distilbert: such a classifier cannot be packed; known: modernbert, llama" in capfd.readouterr().err
    config = transformers.ModernBertConfig(**BERT, classifier_activation="tanh")
    with pytest.raises(UnsupportedError, match="activation 'tanh'"):
        build(Loaded(random(config), None))
