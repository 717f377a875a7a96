"""Decoding of models of patches: any cut of a text is the whole, rows at different speeds, beams, what is held."""

from dataclasses import replace
from typing import Any

import patched
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patched import END, FEW, SHAPES, sentences
from torch import Tensor
from transformers.cache_utils import DynamicCache

from shrew.blocks.layers import State
from shrew.blocks.model import ShrewForCausalLM
from shrew.blocks.patches.state import PatchState

EVERY = list(SHAPES)
MODELS: dict[str, ShrewForCausalLM] = {}


def _model(name: str) -> ShrewForCausalLM:
    """Made once; not to be changed."""
    if name not in MODELS:
        MODELS[name] = patched.patched(name)
    return MODELS[name]


def _held(cache: Any) -> PatchState:
    found: PatchState = cache.layers[-1]
    return found


@pytest.mark.parametrize("name", EVERY)
@given(texts=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=3),
       cuts=st.lists(st.integers(1, 9), min_size=17, max_size=17))  # fmt: skip
@FEW
@torch.no_grad()
def test_a_text_in_pieces_is_the_text(name: str, texts: list[bytes], cuts: list[int]) -> None:
    model, tokens = _model(name), torch.tensor([[END, *text] for text in texts])
    cache, parts, at = model.model.new_cache(), [], 0
    for cut in cuts:
        if at < tokens.shape[1]:
            parts.append(model(tokens[:, at : at + cut], past_key_values=cache).logits)
            at += cut
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, rtol=0, atol=1e-6)
    assert cache.get_seq_length() == tokens.shape[1]
    whole = model.model.ends(tokens).sum(1).tolist()
    assert [len(found) for found in _held(cache).documents] == whole  # no patch was missed or made twice


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_greedy_text_is_that_of_whole_passes(name: str) -> None:
    model = _model(name)
    rows = [sentences(1, length, seed=length) for length in (2, 9)]
    ids = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0), value=END) for row in rows])
    mask = torch.tensor([[0] * 7 + [1] * 2, [1] * 9])
    found = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None)
    for row, text in zip(rows, found, strict=True):
        alone = row
        for _ in range(14):
            alone = torch.cat([alone, model(alone).logits[:, -1:].argmax(-1)], 1)
        assert text[9:].tolist() == alone[0, row.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["space", "entropy", "rise", "free"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_beams_and_samples_carry_their_patches(name: str, options: dict[str, Any]) -> None:
    model, tokens = _model(name), sentences(2, 6)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=9,
                                    eos_token_id=None, use_cache=use_cache, **options))  # fmt: skip
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_rows_that_are_chosen_go_on_as_they_would(name: str) -> None:
    model, tokens, more = _model(name), sentences(3, 11), sentences(4, 8, seed=1)
    cache = model(tokens, use_cache=True).past_key_values
    chosen = torch.tensor([2, 0, 0, 1])
    for layer in cache.layers:
        layer.batch_select_indices(chosen)
    found = torch.cat([model(part, past_key_values=cache).logits for part in more.split(3, dim=1)], 1)
    whole = model(torch.cat([tokens[chosen], more], 1)).logits[:, 11:]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["space", "entropy", "learned"])
def test_an_empty_dynamic_cache_serves(name: str) -> None:
    model, tokens, cache = _model(name), sentences(2, 9), DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in tokens.split(4, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, rtol=0, atol=1e-6)
    cache.layers[-1].reset()
    assert _held(cache).rows == []
    with pytest.raises(Exception, match="cannot be rolled back"):
        cache.crop(3)


def _bytes(states: list[Any]) -> int:
    return sum(state.nbytes() if isinstance(state, State) else state.keys.nbytes + state.values.nbytes
               for state in states)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_a_cache_is_as_big_as_said(name: str) -> None:
    model, tokens = patched.patched(name), sentences(1, 60, seed=2)
    cache = model(tokens, use_cache=True).past_key_values
    held, trunk = _held(cache), model.model
    layers: list[Any] = [trunk.layers[which] for which in trunk.order]
    patches = len(held.documents[0])
    wanted = sum(layer.mixer.state_bytes(patches, element=8) for layer in layers)
    assert _bytes(held.rows[0][: len(layers)]) == wanted
    assert held.held["bytes"].shape[1] == int(held.held["size"][0]) < 20
    trunk.front = replace(trunk.front, mean=60 / patches)
    local = [layer for layer in cache.layers[:-1] if not isinstance(layer, State) or layer.held]
    assert _bytes([*local, held]) == pytest.approx(model.state_bytes(60, element=8), rel=0.15)
    trunk.front = replace(trunk.front, mean=10.0**9)  # an open patch holds no more bytes than have come
    assert model.state_bytes(60, element=8) < 8 * 60 * 1000


@torch.no_grad()
def test_only_rows_whose_patch_ends_run_the_layers_of_patches() -> None:
    model = _model("space")
    rows = torch.tensor([list(b"ab cd efgh i"), list(b"abcdefghijkl")])
    cache, calls = model.model.new_cache(), []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[:2]))
    for at in range(12):
        model(rows[:, at : at + 1], past_key_values=cache)
    hook.remove()
    ended: Tensor = model.model.ends(rows)
    assert sum(rows * length for rows, length in calls) == int(ended.sum())
    assert len(calls) < 12
