"""`shrew shrink --gguf`: block types chosen for each weight, and the file that holds them, to the byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from hypothesis import given
from hypothesis import strategies as st
from test_distil import context_for
from test_shrink import FLAGS, ONCE, light
from transformers import LlamaConfig, LlamaForCausalLM

from shrew import folder, record, spec
from shrew.__main__ import main
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves import parse_moves
from shrew.moves.source import Source
from shrew.search import families, trial
from shrew.search.kinds import BLOCKS, Kind, blocks
from shrew.search.propose import Widths, inherited

PALETTE = blocks()


def wide(tokenizer: Any, rest: int = 288) -> Loaded:
    """A llama with rows of 256 weights and some of another length, as a narrowed one has."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=rest, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return Loaded(LlamaForCausalLM(config).to(torch.bfloat16), tokenizer)


@given(st.sampled_from(sorted(PALETTE.bits)), st.integers(1, 9), st.integers(1, 6))
def test_predicted_bytes_are_those_of_gguf(kind: str, rows: int, blocks_in_row: int) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    width, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    assert PALETTE.bytes(kind, rows, width * blocks_in_row) == rows * blocks_in_row * size


def test_rows_choose_among_the_types_that_fit_them() -> None:
    assert PALETTE.fitting(512) == BLOCKS[256]
    assert PALETTE.fitting(288) == BLOCKS[32]
    with pytest.raises(UnsupportedError, match="rows of 90 weights"):
        PALETTE.fitting(90)
    assert all(any(kind in PALETTE.measured for kind in kinds) for kinds in BLOCKS.values())


@pytest.fixture(scope="module")
def world(tiny_tokenizer: Any, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("wide")
    folder.save(wide(tiny_tokenizer), place / "original")
    source = Source(model=str(place / "original"), text=[str(stories)], threads=1)
    return place, json.dumps(spec.dump(source))


def test_a_mixed_file_has_the_types_and_bytes_that_were_chosen(world: tuple[Path, str], tmp_path: Path) -> None:
    place, asked = world
    base = trial.cut(asked, [], True)
    parts = families.groups_of(base)
    draw = np.random.default_rng(0)
    damages: dict[str, dict[Kind, float]]
    damages = {item.name: {kind: float(draw.uniform(0.5, 2)) * 4.0 ** -PALETTE.bits[kind]
                           for kind in PALETTE.bits} for item in parts}  # fmt: skip
    found = families.family("no cut", [], base, lambda groups, gone: Widths(
        groups, inherited(groups, damages, {}, gone, "model.layers", PALETTE), PALETTE), [], base)  # fmt: skip
    ladder = found.ladder()
    for item in (ladder[0], ladder[len(ladder) // 2], ladder[-1]):
        loaded = folder.load(place / "original")
        parse_moves([{**item.quantize, "method": "rtn"}], "test")[0].apply(loaded, context_for(tmp_path))
        folder.save(loaded, tmp_path / "made")
        again = folder.load(tmp_path / "made")
        trial.as_gguf(again, tmp_path / "model.gguf")
        size = (tmp_path / "model.gguf").stat().st_size
        assert abs(size - item.bytes) < 100 + 32 * len(parts)  # what the header says of it, and where tensors begin
        wanted = {name: item.quantize["tensors"].get(name, item.quantize["grid"]) for name in again.packed}
        assert len(wanted) == len(parts)
        tensors = {part.name: part for part in GGUFReader(tmp_path / "model.gguf").tensors}
        for name, target in (("embed_tokens", "token_embd"), ("layers.0.mlp.down_proj", "blk.0.ffn_down"),
                             ("layers.0.self_attn.v_proj", "blk.0.attn_v")):  # fmt: skip
            part, packed = tensors[f"{target}.weight"], again.packed[f"model.{name}.weight"]
            assert part.tensor_type.name.lower() == wanted[f"model.{name}.weight"]
            assert np.array_equal(dequantize(part.data, part.tensor_type), packed.dense().numpy())
    assert len({item.quantize["grid"] for item in ladder} | {kind for item in ladder
                for kind in item.quantize["tensors"].values()}) > 5  # fmt: skip


def test_rows_that_no_block_fits_are_refused(tiny_tokenizer: Any, stories: Path, tmp_path: Path) -> None:
    folder.save(wide(tiny_tokenizer, 264), tmp_path / "odd")
    source = Source(model=str(tmp_path / "odd"), text=[str(stories)], threads=1)
    found = trial.cut(json.dumps(spec.dump(source)), [], True)
    assert "rows of 264 weights" in found["refused"] and "down_proj" in found["refused"]


def test_shrink_writes_what_llama_cpp_reads(trained_llama_folder: Path, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    with light():
        assert main(["shrink", str(trained_llama_folder), "--text", str(stories), "--out", str(out), "--gguf",
                     *FLAGS[:-2], *ONCE]) == 0  # fmt: skip
    records = record.read(out / "records.jsonl")
    (size,) = [item.value for item in records if (item.model, item.metric) == ("chosen", "bytes")]
    assert size == (out / "model.gguf").stat().st_size
    kept = [item for item in records if (item.model, item.metric) == ("chosen", "retention")]
    assert any(item.detail.get("passed") for item in kept)
    (recipe,) = [item.detail["move"] for item in records if item.metric == "move"
                 and item.detail["move"]["name"] == "quantize"]  # fmt: skip
    loaded = folder.load(out)
    kinds = {name: recipe["tensors"].get(name, recipe["grid"]) for name in loaded.packed}
    assert {packed.label() for packed in loaded.packed.values()} == set(kinds.values())
    tensors = {part.name: part for part in GGUFReader(out / "model.gguf").tensors}
    part, name = tensors["blk.0.ffn_down.weight"], "model.layers.0.mlp.down_proj.weight"
    assert part.tensor_type.name.lower() == kinds[name]
    assert np.array_equal(dequantize(part.data, part.tensor_type), loaded.packed[name].dense().numpy())
    assert "model.gguf" in (out / "report.html").read_text("utf-8")


def test_what_cannot_be_is_told_before_any_work(
    tiny_classifier_folder: Path, trained_llama_folder: Path, stories: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    for model, flags, words in ((trained_llama_folder, ["--coded"], "exclude each other"),
                                (tiny_classifier_folder, [], "classifiers are not written to GGUF")):  # fmt: skip
        code = main(["shrink", str(model), "--text", str(stories), "--out", str(tmp_path / "out"), "--gguf", *flags])
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), said
        assert words in said
