"""A cache of fewer bits: rounding by hand, one pass against step by step, and what the verb says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from shrew import folder, measure
from shrew.blocks.attention import AttentionSpec, naive_attention
from shrew.blocks.layers import Place
from shrew.blocks.linear import LinearSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.window import WindowSpec
from shrew.errors import UnsupportedError, UsageError
from shrew.folder import Loaded
from shrew.measure.kv import CacheSpec, Rounding, by_channel, by_token, rounded, with_rounded_cache
from shrew.tasks.completion import Completion, Prompt, greedy


def ours(pattern: str, **more: Any) -> Any:
    mixers = {"A": AttentionSpec(heads=4, kv_heads=2), "W": WindowSpec(heads=4, kv_heads=2, window=5),
              "L": LinearSpec(heads=2, state=8)}  # fmt: skip
    torch.manual_seed(0)
    kinds = {letter: mixers[letter] for letter in sorted(set(pattern))}
    return build(ModelSpec(pattern=pattern, layers=len(pattern), width=32, vocabulary=64, mixers=kinds, **more)).eval()


# --- rounding --------------------------------------------------------------------------------------------------------


def test_rounding_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, -7.0, 3.4], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(rounded(x, 4, True)[0], [0, 1, -7, 3])  # a step of 7 / 7
    y = torch.tensor([[-1.0, 14.0, 3.3, 3.6]])
    np.testing.assert_allclose(rounded(y, 4, False)[0], [-1, 14, 3, 4])  # -1 + codes of 0 to 15
    for symmetric in (True, False):
        assert not rounded(x, 4, symmetric)[2].any()
    np.testing.assert_array_equal(rounded(x, 8, False)[1], x[1])  # nothing but one value: no step is needed


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([4, 8]), st.booleans(), st.floats(-8, 8))
def test_no_value_is_further_than_half_a_step(seed: int, n: int, bits: int, symmetric: bool, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.standard_t(2, (3, n)) * 10**scale).clamp(-6e4, 6e4)
    found = rounded(x, bits, symmetric)
    assert found.dtype == x.dtype and torch.isfinite(found).all()
    span = x.abs().amax(1) * 2 if symmetric else x.amax(1) - x.amin(1)
    half = span / (2**bits - (2 if symmetric else 1)) / 2
    slack = x.abs().amax(1) * 2**-9 + 2**-14  # the step and the lowest value are float16
    assert ((found - x).abs().amax(1) <= half + slack).all()
    assert all(len(row.unique()) <= 2**bits for row in found)


def test_bytes_by_hand() -> None:
    assert CacheSpec(kv=8).bytes(2, 32) == 2 * 2 * 32 + 2 * 2 * 4  # codes, then a scale and a lowest value of each
    assert CacheSpec(kv=4, kv_symmetric=True).bytes(2, 32) == 2 * 2 * 16 + 2 * 2 * 2
    assert CacheSpec(kv=4, kv_group=8).bytes(2, 32) == 2 * 2 * 16 + 2 * 2 * 4 * 4
    keys = 2 * 32 * 4 / 16  # keys by channel: scale and lowest value of 64 channels in 16 tokens
    assert CacheSpec(kv=4, kv_keys="channel", kv_group=16).bytes(2, 32) == 2 * 2 * 16 + 2 * 4 + keys


# --- the cache -------------------------------------------------------------------------------------------------------


def test_attention_sees_rounded_keys_and_values_alone() -> None:
    model, spec = ours("A"), CacheSpec(kv=4)
    block = model.model.layers[0].mixer
    x, tokens = torch.randn(2, 9, 32), torch.zeros(2, 9, dtype=torch.long)
    place = Place(tokens, torch.arange(9).expand(2, 9), None)
    q, k, v = block.project(x, place)
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    heads = naive_attention(q, by_token(k, spec), by_token(v, spec), allowed)
    wanted = block.o_proj(heads.transpose(1, 2).flatten(2))
    found = block(x, place, Rounding(model, spec).cache().layers[0])
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(wanted, block(x, place), atol=1e-4)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    gemma = Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, sliding_window=6,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window_pattern=3,
                             initializer_range=0.3, max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    return {"attention": ours("AA"), "window": ours("WAW"), "hybrid": ours("LA"),
            "gemma3": Gemma3ForCausalLM(gemma).eval()}  # fmt: skip


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_one_pass_is_step_by_step(name: str, bits: Any) -> None:
    model = models()[name]
    spec = CacheSpec(kv=bits, kv_group=4)
    tokens = torch.randint(1, 64, (2, 15), generator=torch.Generator().manual_seed(1))
    rounding = Rounding(model, spec).eval()
    whole = rounding(tokens, torch.ones_like(tokens)).logits
    cache = rounding.cache()
    steps = [model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(15)]
    torch.testing.assert_close(whole, torch.cat(steps, 1), atol=2e-4, rtol=1e-3)
    plain = model(input_ids=tokens, use_cache=False).logits
    assert (whole - plain).abs().max() > 1e-3 if bits == 4 else (whole - plain).abs().max() > 1e-6
    kept = rounding(tokens, torch.ones_like(tokens), logits_to_keep=4).logits
    torch.testing.assert_close(kept, whole[:, -4:])


def test_fewer_bits_lie_further_away() -> None:
    model = models()["attention"]
    tokens = torch.randint(1, 64, (2, 15), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(input_ids=tokens, use_cache=False).logits
        far = [float((Rounding(model, CacheSpec(kv=bits))(tokens, torch.ones_like(tokens)).logits - plain).abs().mean())
               for bits in (8, 4)]  # fmt: skip
    assert 0 < far[0] < far[1] / 4


def test_keys_by_channel_wait_until_a_group_is_full() -> None:
    """As KIVI holds them: whole groups of tokens by channel, the rest in full; values by token at once."""
    spec = CacheSpec(kv=4, kv_keys="channel", kv_group=4)
    layer = Rounding(ours("A"), spec).cache().layers[0]
    keys, values = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    for low in (0, 4, 8):
        found = layer.update(keys[:, :, low : low + 4], values[:, :, low : low + 4])
        parts = [by_channel(keys[:, :, start : start + 4], spec) for start in range(0, low, 4)]
        torch.testing.assert_close(found[0], torch.cat([*parts, keys[:, :, low : low + 4]], 2))
        torch.testing.assert_close(found[1], by_token(values[:, :, : low + 4], spec))
    by_hand = rounded(keys[0, 0, :4, 3], 4, False)
    torch.testing.assert_close(by_channel(keys[:, :, :4], spec)[0, 0, :, 3], by_hand)


@torch.inference_mode()
def test_keys_by_channel_are_given_group_by_group() -> None:
    model, spec = ours("AA"), CacheSpec(kv=4, kv_keys="channel", kv_group=4)
    tokens = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(1))
    whole = Rounding(model, spec)(tokens, torch.ones_like(tokens)).logits
    plain = model(input_ids=tokens, use_cache=False).logits
    assert whole.shape == plain.shape
    first = Rounding(model, spec)(tokens[:, :4], torch.ones_like(tokens[:, :4])).logits
    torch.testing.assert_close(whole[:, :4], first)  # nothing of the first group knows of the later ones
    kept = Rounding(model, spec)(tokens, torch.ones_like(tokens), logits_to_keep=3).logits
    torch.testing.assert_close(kept, whole[:, -3:])
    fine = Rounding(model, CacheSpec(kv=8, kv_keys="channel", kv_group=4))(tokens, torch.ones_like(tokens)).logits
    assert (fine - plain).abs().mean() < (whole - plain).abs().mean() / 4


# --- the verb --------------------------------------------------------------------------------------------------------


def test_generation_reads_the_rounded_cache(tiny_llama_folder: Path) -> None:
    loaded = folder.load(tiny_llama_folder)
    small = with_rounded_cache(loaded, CacheSpec(kv=4))
    ids = loaded.tokenizer("def f(x):", add_special_tokens=False)["input_ids"]
    row = [loaded.tokenizer.bos_token_id, *ids]
    for _ in range(6):
        tokens = torch.tensor([row])
        with torch.inference_mode():
            row.append(int(small.model(tokens, torch.ones_like(tokens)).logits[0, -1].argmax()))
    wanted = loaded.tokenizer.decode(row[len(ids) + 1 :], clean_up_tokenization_spaces=False)
    assert greedy(small, ["def f(x):"], [6]) == [wanted]
    task = Completion(splits={"final": [Prompt("line 1", "a", "b")]})
    with pytest.raises(UnsupportedError, match="measures no generation"):
        task.score(with_rounded_cache(loaded, CacheSpec(kv=4, kv_keys="channel")), "final")


def test_measure_compares_the_cache_with_the_full_one(tiny_llama_folder: Path, tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps({"text": f"import os{n}\nprint({n})\n" * 3}) + "\n" for n in range(30)))
    arguments = [str(tiny_llama_folder), "--task", str(text), "--split", "all", "--no-cost"]
    found: dict[int, dict[tuple[str, str], Any]] = {}
    for bits in (8, 4):
        assert measure.main([*arguments, "--kv", str(bits), "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found[bits] = {(item["model"], item["metric"]): item for item in lines}
    for bits, of in found.items():
        label = f"llama, {bits}-bit cache"
        for metric in ("kl", "bits_per_byte", "top1_agreement", "retention"):
            assert of[label, metric]["detail"]["against"] == "llama" and of[label, metric]["low"] is not None
        assert of["llama", "kv_bytes"]["value"] == 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, channels, bytes
        assert of[label, "kv_bytes"]["value"] == 2 * 2 * (2 * 16 * bits / 8 + 2 * 4)
        assert of[label, "band"]["detail"]["against"] == "llama"
    kl = {bits: of[f"llama, {bits}-bit cache", "kl"]["value"] for bits, of in found.items()}
    assert 0 < kl[8] < kl[4] / 10
    assert measure.main([*arguments, "--kv", "4"]) == 0
    assert "4-bit" in capsys.readouterr().out


def test_what_has_no_such_cache_is_refused(tiny_llama_folder: Path, tiny_classifier_folder: Path) -> None:
    llama = folder.load(tiny_llama_folder)
    with pytest.raises(UnsupportedError, match="a classifier has no cache"):
        with_rounded_cache(folder.load(tiny_classifier_folder), CacheSpec(kv=8))
    with pytest.raises(UnsupportedError, match="keeps no keys and values"):
        with_rounded_cache(Loaded(ours("LL"), llama.tokenizer), CacheSpec(kv=8))
    for model in (ours("WA"), models()["gemma3"]):
        with pytest.raises(UnsupportedError, match="has windows"):
            with_rounded_cache(Loaded(model, llama.tokenizer), CacheSpec(kv=8, kv_keys="channel"))
    with pytest.raises(UsageError, match="a head of 16 channels is no multiple"):
        with_rounded_cache(llama, CacheSpec(kv=8, kv_group=5))
    with pytest.raises(UsageError, match="give --text SOURCE or --task FILE"):
        measure.main([str(tiny_llama_folder), "--kv", "8"])
