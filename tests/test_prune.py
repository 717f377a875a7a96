"""Zeros behind a bitmap: the bytes that are promised, the numbers that were chosen, and no zero that heals away."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shrew import folder
from shrew.errors import DataError, FolderError, UnsupportedError
from shrew.folder import Loaded, sparse
from shrew.moves import Context
from shrew.moves.distil import Distil
from shrew.moves.drop_layers import DropLayers
from shrew.moves.prune import Prune, least
from shrew.moves.quantize import Quantize


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_parts_come_back(shape: list[int], zeros: float, dtype: torch.dtype, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=chance).to(dtype)
    weight[torch.rand(shape, generator=chance) < zeros] = 0
    parts = sparse.to_parts("w", weight)
    back = sparse.from_parts({name[1:]: part for name, part in parts.items()}, sparse.to_entry(weight))
    assert back.dtype == dtype and torch.equal(back, weight)
    size = sum(part.numel() * part.element_size() for part in parts.values())
    assert size == -(-weight.numel() // 8) + int(weight.count_nonzero()) * weight.element_size()
    assert sparse.pays(weight) == (len(shape) > 1 and size < weight.numel() * weight.element_size())


def test_the_bitmap_is_a_little_endian_stream() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0], [0, 0, 0, 3, 4]])
    parts = sparse.to_parts("w", weight)
    assert parts["w:bitmap"].tolist() == [0b00000101, 0b00000011] and parts["w:values"].tolist() == [1, 2, 3, 4]


@settings(max_examples=60)
@given(rows=st.integers(1, 6), cols=st.integers(1, 20), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_lowest_of_each_row_go(rows: int, cols: int, share: float, seed: int) -> None:
    scores = torch.randint(0, 6, (rows, cols), generator=torch.Generator().manual_seed(seed)).float()
    mask = least(scores, share)
    for row, gone in zip(scores, mask, strict=True):
        assert int(gone.sum()) == round(share * cols)
        assert not gone.any() or gone.all() or row[gone].max() <= row[~gone].min()


def test_wanda_weighs_inputs_and_magnitude_does_not(tiny_llama_folder: Path, context: Context) -> None:
    """Against the definitions, on one layer whose input is known."""
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    loaded = folder.load(tiny_llama_folder)
    before = loaded.model.get_parameter(name + ".weight").detach().clone()
    hook = loaded.model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for window in context.calibration:
            loaded.model(input_ids=torch.from_numpy(window)[None])
    hook.remove()
    norms = torch.cat(seen).norm(dim=0)
    wanted = before.masked_fill(least(before.abs() * norms, 0.5), 0)
    found = Prune(share=0.5).apply(loaded, context).model.get_parameter(name + ".weight")
    assert torch.equal(found, wanted)
    other = Prune(share=0.25, method="magnitude").apply(folder.load(tiny_llama_folder), context)
    found = other.model.get_parameter(name + ".weight")
    limit = before.abs().flatten().sort().values[before.numel() // 4 - 1]
    assert torch.equal(found == 0, before.abs() <= limit)


def test_bytes_are_what_was_promised_and_transformers_reads_them(
    trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path
) -> None:
    code, said = apply(trained_llama_folder, "prune", "--text", stories, "--share", 0.75, "--out", tmp_path / "out")
    assert code == 0 and "in 14 matrices are zero" in said
    items = {item.name: item for item in folder.tensors(tmp_path / "out")}
    before = {item.name: item for item in folder.tensors(trained_llama_folder)}
    assert items.keys() == before.keys()
    for name, item in items.items():
        count = before[name].bytes // 2
        if "proj" in name:
            assert item.bytes == count // 8 + 2 * (count // 4) and item.effective == "bf16, 75% zeros in a bitmap"
        else:
            assert item.bytes == 2 * count
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (
        sum(item.bytes for item in items.values()) < size < (trained_llama_folder / "model.safetensors").stat().st_size
    )
    loaded = folder.load(tmp_path / "out")
    folder.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    row = AutoTokenizer.from_pretrained(tmp_path / "out")("The cat sees", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(plain(**row).logits, loaded.model(**row).logits)
    assert plain.generate(**row, max_new_tokens=4).shape[1] == row["input_ids"].shape[1] + 4


def test_zeros_stay_through_healing_and_other_moves(
    trained_llama_folder: Path, context: Context, tmp_path: Path
) -> None:
    pruned = Prune(share=0.5).apply(folder.load(trained_llama_folder), context)
    dead = {name: value == 0 for name, value in pruned.model.state_dict().items() if "proj" in name}
    before = {name: value.clone() for name, value in pruned.model.state_dict().items()}
    for rank in (0, 2):
        healed = Distil(steps=3, rows=2, teacher=0.0, lora=rank).apply(pruned, context)
        after = healed.model.state_dict()
        assert all(torch.equal(after[name] == 0, mask) for name, mask in dead.items())
        assert any(not torch.equal(after[name], before[name]) for name in dead)
    smaller = DropLayers(layers=(0,)).apply(healed, context)
    folder.save(smaller, tmp_path / "dropped")
    assert {item.effective for item in folder.tensors(tmp_path / "dropped")} == {"bf16", "bf16, 50% zeros in a bitmap"}
    mixed = Quantize(bits=4, group=32, method="rtn", tensors={"model.layers.0.mlp.up_proj.weight": 16}).apply(
        smaller, context
    )
    assert folder.save(mixed, tmp_path / "mixed") == "shrew (model.layers.0.mlp.up_proj.weight is sparse)"
    kinds = {item.effective for item in folder.tensors(tmp_path / "mixed")}
    assert kinds == {"bf16", "int4 g32 sym", "bf16, 50% zeros in a bitmap"}
    again = folder.load(tmp_path / "mixed")
    assert again.sparse and torch.equal(again.model.lm_head.weight, mixed.model.lm_head.weight.bfloat16().float())
    with pytest.raises(UnsupportedError, match="put prune before quantize"):
        Prune().apply(again, context)


def test_experts_are_pruned_each_by_its_own_texts(context: Context, tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, pad_token_id=0,
                         num_attention_heads=2, num_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
                         initializer_range=0.3)  # fmt: skip
    loaded = Prune(share=0.5).apply(Loaded(OlmoeForCausalLM(config).eval(), None), context)
    for name in ("gate_up_proj", "down_proj"):
        weight = loaded.model.get_parameter(f"model.layers.0.mlp.experts.{name}")
        assert torch.equal((weight == 0).sum(-1), torch.full(weight.shape[:2], weight.shape[-1] // 2))
    assert folder.save(loaded, tmp_path / "out").startswith("shrew (")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = {name: value.bfloat16().float() for name, value in loaded.model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in plain.state_dict().items())


LIES = {
    "fewer values": (lambda table: table.update(values=table["values"] - 1), "should be BF16"),
    "another shape": (lambda table: table.update(shape=[64, 65]), "should be U8"),
    "no numbers": (lambda table: table.update(values="many"), "nothing usable"),
    "more than there are": (lambda table: table.update(shape=[2, 2]), "nothing usable"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_label_that_lies_is_refused(lie: str, tiny_llama_folder: Path, context: Context, tmp_path: Path) -> None:
    folder.save(Prune(method="magnitude").apply(folder.load(tiny_llama_folder), context), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change, words = LIES[lie]
    change(config["quantization_config"]["sparse"]["model.layers.0.self_attn.q_proj.weight"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match=words):
        folder.load(tmp_path / "out")


def test_what_is_damaged_or_not_possible_is_refused(tiny_llama_folder: Path, context: Context, tmp_path: Path) -> None:
    folder.save(Prune(method="magnitude").apply(folder.load(tiny_llama_folder), context), tmp_path / "out")
    content = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    content[name + ":bitmap"][0] ^= 1
    save_file(content, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"the bitmap of .*q_proj.* does not mark"):
        folder.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["sparse"][name]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError, match="does not mention"):
        folder.load(tmp_path / "out")
    with pytest.raises(DataError, match="no calibration text"):
        Prune().apply(folder.load(tiny_llama_folder), Context([], [], None, 0, tmp_path, print))


def test_a_form_without_bitmaps_says_so(
    trained_llama_folder: Path, context: Context, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from shrew.__main__ import main

    folder.save(Prune(method="magnitude").apply(folder.load(trained_llama_folder), context), tmp_path / "model")
    for form in ("gguf", "onnx"):
        assert main(["pack", str(tmp_path / "model"), "--to", form, "--out", str(tmp_path / form)]) == 0
        assert "Note: pruned weights are written with their zeros" in capsys.readouterr().err
