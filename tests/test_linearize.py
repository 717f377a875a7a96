"""Attention made windows, linear attention and the delta rule: transfer, state, folders and refusals."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from shrew import folder, spec
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock import adopt
from shrew.blocks.window import WindowSpec
from shrew.errors import ShrewError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.linearize import Linearize
from shrew.moves.quantize import Quantize

IDS = torch.randint(3, 300, (2, 31), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {"width": 32, "vocabulary": 300, "context": 64}
GROUPED = AttentionSpec(heads=4, kv_heads=2, qk_norm="head", bias=True)


def own(**settings: Any) -> Loaded:
    torch.manual_seed(0)
    model = build(ModelSpec(**SHAPE, **settings), bos_token_id=0, eos_token_id=1, pad_token_id=2).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else nn.init.uniform_(weight, 0.5, 1.5)
    return Loaded(model, SimpleNamespace(pad_token_id=2), dtype=torch.float32)


FRESH = """
import sys, torch
from shrew import folder
model = folder.load(sys.argv[1]).model
ids = torch.arange(5, 25)[None]
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
assert torch.equal(cached, plain)
print(model.config.model_type, cached.shape[1], float(model(ids).logits.sum()))
"""


@pytest.mark.parametrize(("to", "factor"), [("window", 2), ("linear", 3), ("delta", 3)])
def test_the_transfer_learns_what_attention_gave(
    to: str, factor: int, trained_llama_folder: Path, stories: Path, apply: Any, warm: Path, tmp_path: Path
) -> None:
    """The error on calibration text, which the transfer does not see, falls by the factor."""
    code, said = apply(trained_llama_folder, "linearize", "--to", to, "--window", 4, "--keep", 2, "--steps", 60,
                       "--text", stories, "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, said
    found = re.findall(rf"layer (\d), attention -> {to}: error ([\d.]+)% .* power, ([\d.]+)% after 60 steps", said)
    assert [int(layer) for layer, _, _ in found] == [0]  # the second keeps its attention
    assert all(float(before) > factor * float(after) for _, before, after in found), found
    assert "linearize: saved as shrew" in said

    before, after = adopt(folder.load(trained_llama_folder).model), folder.load(tmp_path / "out").model
    assert [after.spec.mixer(layer).kind for layer in range(2)] == [to, "attention"]
    assert after.state_bytes(200) < before.state_bytes(200)
    for name, value in before.state_dict().items():
        if "layers.0.mixer." not in name:
            assert torch.equal(value, after.state_dict()[name]), name
    done = subprocess.run([warm / "python", "-c", FRESH, tmp_path / "out"], capture_output=True, text=True, check=False)
    kind, length, total = done.stdout.split() if done.returncode == 0 else pytest.fail(done.stderr)
    assert (kind, length) == ("shrew", "32")
    with torch.no_grad():
        assert float(total) == pytest.approx(float(after(torch.arange(5, 25)[None]).logits.sum()), rel=1e-4)


MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"layers": 3, "mixers": {"A": GROUPED}},
    "two kinds": {"pattern": "ABC", "layers": 5,
                  "mixers": {"A": GROUPED, "B": AttentionSpec(heads=2, softcap=5.0, sinks=True), "C": ConvSpec()}},
    "experts": {"layers": 2, "mixers": {"A": GROUPED}, "ffn": MoeSpec(experts=3, every=2)},
    "looped": {"layers": 2, "loops": 2, "mixers": {"A": GROUPED}},
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_window_longer_than_the_text_changes_nothing(kind: str, context: Context) -> None:
    loaded = own(**MODELS[kind])
    made = Linearize(to="window", window=48, keep=0, steps=0).apply(loaded, context).model
    assert "attention" not in {made.spec.mixer(layer).kind for layer in range(made.spec.layers)}
    assert all(letter in made.spec.pattern for letter in made.spec.mixers)
    torch.testing.assert_close(made(IDS).logits, loaded.model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("to", ["linear", "delta"])
def test_what_is_replaced_and_what_stays(kind: str, to: Any, context: Context, tmp_path: Path) -> None:
    loaded = own(**MODELS[kind])
    old = loaded.model.spec
    made = Linearize(to=to, keep=2, steps=2).apply(loaded, context)
    item = made.model.spec
    for layer in range(old.layers):
        gone = layer % 2 == 0 and old.mixer(layer).kind == "attention"
        assert item.mixer(layer).kind == to if gone else item.mixer(layer) == old.mixer(layer)
    folder.save(Loaded(made.model, None, dtype=torch.float32), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(again(IDS).logits, made.model(IDS).logits)




def test_the_same_mixers_each_time(context: Context) -> None:
    first, second = (Linearize(keep=0, steps=3).apply(own(**MODELS["grouped"]), context).model for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_windows_that_a_stock_type_can_say_are_saved_as_it(context: Context) -> None:
    heads = AttentionSpec(heads=4, kv_heads=2, qk_norm="head")
    loaded = own(layers=4, mixers={"A": heads}, norms="sandwich", embedding_scale=float(torch.tensor(32**0.5)),
                 ffn=MlpSpec(activation="gelu_tanh"))  # fmt: skip
    made = Linearize(to="window", window=8, keep=2, steps=1).apply(loaded, context).model
    assert made.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert made.config.model_type == "gemma3_text"


def test_what_linearize_refuses(context: Context, tiny_classifier_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="only causal language models"):
        Linearize().apply(folder.load(tiny_classifier_folder), context)
    with pytest.raises(UnsupportedError, match="gpt2: this model cannot be said in our blocks"):
        config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)
        Linearize().apply(Loaded(AutoModelForCausalLM.from_config(config), None), context)
    front = {"kind": "patches", "width": 32, "rule": {"kind": "static", "size": 4}}
    patches = spec.parse(ModelSpec, SHAPE | {"layers": 2, "front": front}, "")
    with pytest.raises(UnsupportedError, match="a model of patches has local layers"):
        Linearize().apply(Loaded(build(patches), SimpleNamespace(pad_token_id=2)), context)
    with pytest.raises(UnsupportedError, match="put linearize before factor"):
        Linearize().apply(own(**MODELS["grouped"], ranks={"layers.0.mixer.q_proj": 3}), context)
    local = own(layers=2, mixers={"A": WindowSpec(heads=2, window=8)})
    with pytest.raises(UnsupportedError, match="no attention layer of this shrew would be replaced at keep 4"):
        Linearize().apply(local, context)
    with pytest.raises(UnsupportedError, match="would be replaced at keep 1"):
        Linearize(keep=1).apply(own(**MODELS["grouped"]), context)
    with pytest.raises(SpecError, match="window 64 is no shorter than the context of 64"):
        Linearize(to="window").apply(own(**MODELS["grouped"]), context)
    long = Context([np.arange(3, 80)], [np.arange(3, 80)], None, 0, context.cache, context.say)
    with pytest.raises(UnsupportedError, match="made for 64 tokens and a text window has 77"):
        Linearize().apply(own(**MODELS["grouped"]), long)
    with pytest.raises(UnsupportedError, match="needs text to train and to measure on"):
        Linearize().apply(own(**MODELS["grouped"]), Context([], [], None, 0, context.cache, context.say))
    packed = Quantize(method="rtn", bits=4, group=0).apply(own(**MODELS["grouped"]), context)
    with pytest.raises(UnsupportedError, match="put it before quantize"):
        Linearize().apply(packed, context)
    with pytest.raises(ShrewError, match=r"linearize diverged in layer 0 at step \d+; lower its lr from 1e\+38"):
        Linearize(lr=1e38, steps=5).apply(own(**MODELS["grouped"]), context)
