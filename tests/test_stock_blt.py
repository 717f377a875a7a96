"""Byte latent transformers in our blocks and back: same weights, same logits, same text as without a cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stocks import check_given_back, check_said, shaken
from torch import Tensor
from transformers import AutoModelForCausalLM, BltConfig, BltForCausalLM

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.layers import Place
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.patches.boundaries import EntropySpec
from shrew.blocks.patches.hashes import Hashes, HashSpec
from shrew.blocks.stock import adopt, stock
from shrew.errors import UnsupportedError

CLOSE: Any = {"rtol": 1e-4, "atol": 2e-4}  # their norms and logits are float32 whatever the weights are


def _config(parts: dict[str, dict[str, Any]] | None = None, **more: Any) -> BltConfig:
    local = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "hidden_size_global": 48}
    stacks = {
        "encoder_config": local | {"num_hidden_layers": 1},
        "decoder_config": local | {"num_hidden_layers": 2},
        "global_config": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                          "num_hidden_layers": 3, "intermediate_size": 56},
        "patcher_config": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
                           "intermediate_size": 24, "sliding_window": 5},
    }  # fmt: skip
    for name, values in (parts or {}).items():
        stacks[name] = stacks[name] | values
    return BltConfig(**{
        "vocab_size": 260, "max_position_embeddings": 128, "use_cache": False,
        "local_attention_window_len": 6, "encoder_hash_byte_group_size": [3, 8, 5],
        "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_nb_functions": 2, **stacks, **more,
    })  # fmt: skip


def _bytes(rows: int, length: int, seed: int = 0) -> Tensor:
    """A begin token, then bytes as their ids are here: four more."""
    draw = torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))
    draw[:, 0] = 1
    return draw


VARIANTS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "plain": ({}, {}),
    "long": ({}, {"max_patch_length": 3}),
    "first": ({"decoder_config": {"cross_attn_all_layers": False}}, {"local_attention_window_len": None}),
    "wide": ({"global_config": {"hidden_size": 64}, "encoder_config": {"hidden_size_global": 64},
              "decoder_config": {"hidden_size_global": 64}}, {}),  # nothing to project into the layers
    "three": ({"encoder_config": {"cross_attn_k": 3}, "decoder_config": {"cross_attn_k": 3}}, {"cross_attn_k": 3}),
    "bytes": ({}, {"patch_in_forward": False}),
}  # fmt: skip


def _theirs(name: str) -> Any:
    """With a threshold that seven of ten bytes are below."""
    parts, more = VARIANTS[name]
    model = shaken(BltForCausalLM(_config(parts, **more)))
    if model.model.patcher is not None:
        with torch.no_grad():
            entropies = model.model.patcher(_bytes(3, 41))[0]
        model.config.patching_threshold = entropies.quantile(0.7).item()
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_blt_is_ours(name: str) -> None:
    theirs, ids = _theirs(name), _bytes(3, 41)
    ours = adopt(theirs)
    share = ours.model.ends(ids).float().mean().item()
    assert share == 1 if name == "bytes" else 0.1 < share < 0.7  # of patches of several sizes
    torch.testing.assert_close(ours(ids).logits, theirs(ids, use_cache=False).logits, **CLOSE)
    check_given_back(ours, theirs)
    check_said(ours, "blt", ids, **CLOSE)


@torch.no_grad()
def test_ours_writes_what_theirs_would() -> None:
    theirs, ids = _theirs("plain"), _bytes(1, 9)
    found = adopt(theirs).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False)
    for _ in range(15):  # theirs has no cache that works
        ids = torch.cat([ids, theirs(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_gradients_are_those_of_theirs() -> None:
    theirs, ids = _theirs("plain"), _bytes(2, 30)
    ours = adopt(theirs).train()
    weight = torch.randn(2, 30, 260)
    for model in (ours, theirs):
        (model(ids, use_cache=False).logits * weight).sum().backward()
    for part, name in (("embed_tokens", "local_encoder.embed_tokens"), ("hashes.table", "encoder_hash_tok_embedding"),
                       ("back", "local_decoder.patch_embedding_projection"), ("norm", "local_decoder.norm"),
                       ("pool.cross.q_proj", "local_encoder.cross_attn_layers.0.q_proj")):  # fmt: skip
        found, wanted = (m.get_parameter(f"{p}.weight").grad for m, p in ((ours.model, part), (theirs.model, name)))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_folder_of_theirs_is_read_and_ours_is_written_as_one(tmp_path: Path) -> None:
    theirs, ids = _theirs("plain"), _bytes(2, 20)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adopt(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32))
    stock(ours).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)


def test_hashes_are_those_of_theirs() -> None:
    from transformers.models.blt.modeling_blt import byte_group_hash_function

    spec, ids = HashSpec(sizes=(3, 8), rows=1009, functions=2), _bytes(2, 40)
    block = Hashes(spec, 4).double()
    wanted = torch.zeros(2, 40, 4, dtype=torch.float64)
    number = 0
    for prime in (1000000007, 5915587277):
        for size in spec.sizes:
            rows = byte_group_hash_function(ids, size, prime, spec.rows) + number * spec.rows
            wanted += block.table.weight[rows]
            number += 1
    torch.testing.assert_close(block(Place(ids, ids)), wanted)


@pytest.mark.parametrize(("parts", "more"), [
    ({"encoder_config": {"cross_attn_all_layers": True}}, {}),
    ({}, {"patching_mode": "static"}),
    ({"decoder_config": {"rms_norm_eps": 1e-6}}, {}),
    ({"decoder_config": {"num_attention_heads": 2}}, {}),
    ({"encoder_config": {"cross_attn_k": 1}, "decoder_config": {"cross_attn_k": 1}}, {"cross_attn_k": 1}),
])  # fmt: skip
def test_an_odd_blt_is_refused(parts: dict[str, dict[str, Any]], more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="blt: this model cannot be said"):
        adopt(BltForCausalLM(_config(parts, **more)))


def test_what_a_blt_cannot_say_stays_ours() -> None:
    spec = adopt(_theirs("plain")).spec
    front = spec.front
    others: list[ModelSpec] = [
        replace(spec, front=replace(front, residual=1.0)),
        replace(spec, front=replace(front, first=0)),
        replace(spec, front=replace(front, hashes=None)),
        replace(spec, front=replace(front, rule=EntropySpec(reset=True))),
        replace(spec, front=replace(front, decoder=replace(front.decoder, mixers={"A": AttentionSpec(heads=4)}))),
        replace(spec, mixers={"A": AttentionSpec(heads=4, qk_norm="head")}),
        replace(spec, softcap=5.0),
    ]
    for other in others:
        model = build(other)
        assert stock(model) is model
