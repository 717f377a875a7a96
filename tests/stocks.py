"""What the tests of the stock types share: models with weights that matter, and what "the same" means, both ways."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from shrew.blocks.stock import adopt, stock


def hybrids(base: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The config class and the settings of one tiny model of each hybrid type: two heads of width 16, two or three
    layers, and what `base` says."""
    half = base | {"num_key_value_heads": 1}
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    layers = ["linear_attention", "full_attention", "linear_attention"][: base["num_hidden_layers"]]
    sliding = ["sliding_attention" if kind == "linear_attention" else kind for kind in layers]
    alone = {key: value for key, value in base.items() if key not in ("num_attention_heads", "intermediate_size")}
    return {
        "lfm2": ("Lfm2Config", half | {"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False}),
        "mamba2": ("Mamba2Config",
                   alone | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
        "granitemoehybrid": (
            "GraniteMoeHybridConfig",
            half | {"layer_types": layers, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 2,
                    "shared_intermediate_size": 48, "num_local_experts": 0, "num_experts_per_tok": 0}),
        "qwen3_next": (
            "Qwen3NextConfig",
            half | moe | {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                          "linear_num_key_heads": 2, "linear_num_value_heads": 2, "moe_intermediate_size": 16,
                          "shared_expert_intermediate_size": 16, "layer_types": layers}),
        "gemma3": ("Gemma3TextConfig", half | {"head_dim": 16, "sliding_window": 8, "layer_types": sliding}),
        "olmoe": ("OlmoeConfig", half | moe),
    }  # fmt: skip


def tokens(length: int = 21) -> Tensor:
    """[2, length] of a vocabulary of 97 whose first three are special."""
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(0))


def shaken(model: Any, std: float = 0.3, middle: float = 1.0) -> Any:
    """`model` with random matrices, and with vectors (norms, biases, rates) spread evenly around `middle`."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std) if p.ndim > 1 else nn.init.uniform_(p, middle - 0.5, middle + 0.5)
    return model.eval()


def check_said(ours: Any, kind: str, ids: Tensor, **tolerance: float) -> Any:
    """Our model is of the stock type `kind`, with the same logits, and adopted again it is exactly what it was. Gives
    the one that was adopted."""
    same: Any = stock(ours)
    assert same.config.model_type == kind
    assert type(same) is MODEL_FOR_CAUSAL_LM_MAPPING[type(same.config)]
    check_logits(same, ours, ids, **tolerance)
    again = adopt(same)
    assert torch.equal(again(ids).logits, ours(ids).logits)
    return again


def check_logits(found: Any, wanted: Any, ids: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found(ids).logits, wanted(ids).logits, **tolerance)


def check_text(ours: Any, theirs: Any, prompt: Tensor, length: int) -> None:
    """Both go on alike, greedily."""
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None}
    found, wanted = (m.generate(prompt, attention_mask=torch.ones_like(prompt), **options) for m in (ours, theirs))
    assert torch.equal(found, wanted)


def check_given_back(ours: Any, theirs: Any) -> None:
    """The adopted model gives the type and the very weights back, in their order."""
    back = stock(ours)
    assert back.config.model_type == theirs.config.model_type
    found, wanted = back.state_dict(), theirs.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
