"""mamba2: the same weights, logits and texts in transformers' class and in our blocks, both ways."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


def _tokens(length: int = 21) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))


def _shaken(model: Any) -> Any:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "tied"), [(ONE, True), (TWO, False)])
def test_ours_is_said_as_mamba2(mixer: LinearSpec, tied: bool) -> None:
    model = _shaken(build(_spec(mixer, tied=tied), bos_token_id=1, eos_token_id=2, pad_token_id=0))
    same: Any = stock(model)
    assert isinstance(same, Mamba2ForCausalLM)
    torch.testing.assert_close(same(_tokens()).logits, model(_tokens()).logits, rtol=1e-4, atol=1e-4)
    again = adopt(same)
    assert again.spec == model.spec and torch.equal(again(_tokens()).logits, model(_tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True}])
def test_theirs_is_adopted(settings: dict[str, Any]) -> None:
    theirs = _shaken(Mamba2ForCausalLM(Mamba2Config(**TINY, **settings)))
    ours = adopt(theirs)
    torch.testing.assert_close(ours(_tokens()).logits, theirs(_tokens()).logits, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(_tokens(6))
    found, wanted = (m.generate(_tokens(6), attention_mask=mask, **options) for m in (ours, theirs))
    assert found.tolist() == wanted.tolist()
    back, weights = stock(ours).state_dict(), theirs.state_dict()
    assert list(back) == list(weights) and all(torch.equal(back[name], weights[name]) for name in back)


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
