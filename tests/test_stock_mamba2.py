"""mamba2: the same weights, logits and texts in transformers' class and in our blocks, both ways."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_logits, check_said, check_text, shaken, tokens
from transformers import Mamba2Config, Mamba2ForCausalLM

from shrew.blocks.linear import MAMBA2, LinearSpec
from shrew.blocks.mlp import MlpSpec, NothingSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError

ONE = replace(MAMBA2, heads=4, state=6, head_width=16, chunk=8)
TWO = replace(ONE, groups=2, norm_groups=2, bias=True, conv_bias=False, conv=3)
TINY: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
                        "state_size": 6, "n_groups": 2, "chunk_size": 8, "bos_token_id": 1, "eos_token_id": 2,
                        "pad_token_id": 0}  # fmt: skip


def _spec(mixer: LinearSpec, **settings: Any) -> ModelSpec:
    return ModelSpec(**{"layers": 2, "width": 32, "vocabulary": 97, "context": 64, "mixers": {"A": mixer},
                        "ffn": NothingSpec(), **settings})  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "tied"), [(ONE, True), (TWO, False)])
def test_ours_is_said_as_mamba2(mixer: LinearSpec, tied: bool) -> None:
    model = shaken(build(_spec(mixer, tied=tied), bos_token_id=1, eos_token_id=2, pad_token_id=0), std=0.2)
    assert check_said(model, "mamba2", tokens(), rtol=1e-4, atol=1e-4).spec == model.spec


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True}])
def test_theirs_is_adopted(settings: dict[str, Any]) -> None:
    theirs = shaken(Mamba2ForCausalLM(Mamba2Config(**TINY, **settings)), std=0.2)
    ours = adopt(theirs)
    check_logits(ours, theirs, tokens(), rtol=1e-4, atol=1e-4)
    check_text(ours, theirs, tokens(6), 12)
    check_given_back(ours, theirs)


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu"}, {"time_step_limit": (0.01, 0.1)}])
def test_a_config_that_our_blocks_cannot_say_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="mamba2"):
        adopt(Mamba2ForCausalLM(Mamba2Config(**TINY, **settings)))


@pytest.mark.parametrize(
    "spec",
    [
        _spec(ONE, ffn=MlpSpec(hidden=64), norms="sandwich"),
        _spec(replace(ONE, norm_groups=2)),
        _spec(replace(ONE, gate="after")),
        _spec(replace(ONE, skip=False)),
        _spec(replace(ONE, decay="gate")),
        _spec(replace(ONE, conv=0, conv_bias=False)),
        _spec(replace(ONE, head_width=12)),
        _spec(ONE, embedding_scale=2.0),
        _spec(ONE, pattern="AB", mixers={"A": ONE, "B": TWO}),
    ],
)
def test_a_spec_that_mamba2_cannot_say_stays_ours(spec: ModelSpec) -> None:
    assert stock(build(spec)).config.model_type == "shrew"
