"""Grids by a table of levels: arithmetic against gguf's own, fits, and every grid through folders, GGUF and ONNX."""

import json
import statistics
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from gguf import dequantize as by_gguf
from gguf import quantize as gguf_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack_onnx import values, written

from shrew import folder, spec
from shrew.errors import FolderError, SpecError, UnsupportedError
from shrew.folder import Loaded, Packed, Steps, Uniform
from shrew.folder.blocktypes import NF4, TYPES, Levels
from shrew.folder.grids import KINDS, dequantize, encode
from shrew.folder.packed import from_parts, pack_bits, to_entry, to_parts, unpack_bits
from shrew.moves import grids
from shrew.moves.calibrate import hessians
from shrew.moves.quantize import Quantize
from shrew.packers import onnx as onnx_packer
from shrew.packers.carry import as_uniform
from shrew.packers.gguf import Options, back, blocks, write
from shrew.packers.onnx.graph import Graph
from shrew.packers.onnx.weights import Weights

GRIDS = [Levels(kind, group) for kind, table in TYPES.items() for group in table.groups]
ONE_EACH = [Levels(kind, table.groups[-1]) for kind, table in TYPES.items()]
IN_GGUF = [grid for kind in GGMLQuantizationType if (grid := blocks.grid_for(kind)) is not None]
each_grid = pytest.mark.parametrize("grid", ONE_EACH, ids=Levels.label)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(rows: torch.Tensor, codes: torch.Tensor, steps: Steps, grid: Any) -> torch.Tensor:
    return (dequantize(codes, steps, grid) - rows).square()


# Arithmetic


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA's construction: equal steps of probability on either side, one more above, and zero."""
    normal, end = statistics.NormalDist(), 0.9677083
    above = [normal.inv_cdf(float(p)) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(float(p)) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0, *below]) / max(above)
    np.testing.assert_allclose(NF4, levels, atol=1e-6)


@each_grid
def test_the_nearest_level_is_found(grid: Levels) -> None:
    levels = torch.tensor(grid.table.levels, dtype=torch.float32)
    points = torch.linspace(1.1 * float(levels.min()) - 1, 1.1 * float(levels.max()) + 1, 4001)
    scale, zero = torch.tensor(-0.5), torch.tensor(0.25)
    codes = grid.encode(points * scale - zero, scale, zero)
    assert codes.min() >= 0 and codes.max() < len(levels)
    assert torch.equal(grid.decode(codes, scale, zero), levels[codes.long()] * scale - zero)
    found = (levels[codes.long()] - points).abs()
    torch.testing.assert_close(found, (levels - points[:, None]).abs().amin(1), atol=1e-4, rtol=0)


@settings(max_examples=40)
@given(st.integers(1, 23), st.integers(0, 99))
def test_five_ternary_codes_share_a_byte(cols: int, seed: int) -> None:
    codes = torch.randint(0, 3, (4, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, Fraction(8, 5))
    assert packed.shape == (4, -(-cols // 5))
    assert torch.equal(unpack_bits(packed, Fraction(8, 5), cols), codes)
    assert unpack_bits(torch.full_like(packed, 255), Fraction(8, 5), cols).max() < 3  # a byte that nobody writes


def arbitrary(grid: Levels, rows: int, cols: int, seed: int) -> tuple[torch.Tensor, Steps]:
    """Any codes and steps that a file may hold, chosen by chance; but no power of two that overflows."""
    chance, parts = torch.Generator().manual_seed(seed), {}
    for name, shape in grid.shapes(rows, cols).items():
        top = len(grid.table.levels) if name == "codes" else min(2 ** int(grid.widths.get(name, 0)), 250)
        if name in grid.widths:
            parts[name] = torch.randint(0, top, shape, generator=chance, dtype=torch.uint8)
        else:
            dtype = torch.bfloat16 if grid.kind in ("nf4", "ternary") else torch.float16
            parts[name] = torch.randn(shape, generator=chance).to(dtype)
    return parts.pop("codes"), Steps(**parts)


@settings(max_examples=60)
@given(st.sampled_from(IN_GGUF), st.integers(1, 3), st.integers(0, 2**32))
def test_blocks_are_gguf_s_bit_for_bit(grid: Levels, count: int, seed: int) -> None:
    cols = 256 * count
    codes, steps = arbitrary(grid, 3, cols, seed)
    steps = Steps(**{name: part.half() if part.is_floating_point() else part for name, part in steps.parts().items()})
    kind, reason = blocks.choose(codes, steps, grid)
    assert kind is not None and not reason and blocks.grid_for(kind) == grid
    data = np.frombuffer(b"".join(blocks.encode(kind, codes, steps, grid)), np.uint8).reshape(3, -1)
    assert np.array_equal(by_gguf(data, kind), dequantize(codes, steps, grid).numpy())
    again, found = blocks.decode(kind, data)
    assert torch.equal(again, codes)
    for name, part in steps.parts().items():
        assert torch.equal(found.parts()[name].reshape(part.shape), part), name


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0"])
def test_what_gguf_quantizes_comes_back_as_the_same_bytes_and_ours_is_closer(name: str) -> None:
    kind, rows = GGMLQuantizationType[name], drawn(1, 16, 512)
    rows[2], rows[3, :256], rows[4, 7] = 0, 1.25, 60
    data = gguf_quantize(rows.numpy(), kind)
    grid = blocks.grid_for(kind)
    assert grid is not None
    codes, steps = blocks.decode(kind, data)
    assert b"".join(blocks.encode(kind, codes, steps, grid)) == data.tobytes()
    theirs = (torch.from_numpy(by_gguf(data, kind)) - rows).square().sum(1)
    ours = error(rows, *grids.nearest(rows, grid), grid).sum(1)
    assert (ours <= theirs * 1.001).all()
    assert ours.sum() < 0.98 * theirs.sum()


# Fits

# Mean squared error that llama.cpp's own quantizers (llama-cpp-python 0.3.36) leave on drawn(5, 64, 512), alone and
# with the importance matrix drawn(6, 512).mul(1.5).exp().
LLAMA_CPP = {"q2_k": (0.08735, 0.11530), "q3_k": (0.02284, 0.04461), "q4_k": (0.005038, 0.009713),
             "q5_k": (0.001284, 0.002581), "q6_k": (0.0003126, 0.0006317), "iq4_nl": (0.005807, 0.01235),
             "iq4_xs": (0.005900, 0.01271)}  # fmt: skip


@pytest.mark.parametrize("kind", LLAMA_CPP)
def test_fits_leave_less_than_llama_cpp_does(kind: str) -> None:
    rows, grid = drawn(5, 64, 512), Levels(kind, TYPES[kind].groups[0])
    importance = drawn(6, 512).mul(1.5).exp()
    assert error(rows, *grids.nearest(rows, grid), grid).mean() < 0.97 * LLAMA_CPP[kind][0]
    weighted = error(rows, *grids.nearest(rows, grid, importance=importance), grid) * importance
    assert weighted.mean() < 0.94 * LLAMA_CPP[kind][1]


@each_grid
def test_searching_pays_and_importance_counts(grid: Levels) -> None:
    rows, importance = drawn(2, 16, 512), drawn(3, 512).mul(2).exp()
    plain = error(rows, *grids.nearest(rows, grid, search=False), grid)
    searched = error(rows, *grids.nearest(rows, grid), grid)
    weighted = error(rows, *grids.nearest(rows, grid, importance=importance), grid)
    assert searched.sum() < 0.95 * plain.sum()
    assert (weighted * importance).sum() < 0.999 * (searched * importance).sum()


ROWS = {
    "zero": lambda rows: rows.mul_(0),
    "constant": lambda rows: rows.mul_(0).add_(0.37),
    "negative": lambda rows: rows.abs_().mul_(-1),
    "outlier": lambda rows: rows[:, 3].fill_(1e3),
    "zero group": lambda rows: rows[:, :32].fill_(0),
    "tiny": lambda rows: rows.mul_(1e-12),
    "denormal": lambda rows: rows.mul_(1e-41),
    "large": lambda rows: rows.mul_(1e4),
    "one": lambda rows: rows[:, 1:].fill_(0),
}


@settings(max_examples=150)
@given(
    st.sampled_from(GRIDS), st.sampled_from(sorted(ROWS)), st.integers(1, 300), st.booleans(),
    st.sampled_from([None, "drawn", "none matters"]), st.integers(0, 2**32),
)  # fmt: skip
def test_odd_rows_stay_on_the_grid(
    grid: Levels, case: str, cols: int, search: bool, weighing: str | None, seed: int
) -> None:
    cols = cols if grid.table.ragged else -(-cols // grid.span) * grid.span
    rows = drawn(seed, 3, cols) if cols > 3 else drawn(seed, 3, 4)[:, :cols]
    if cols > 3:
        ROWS[case](rows)
    weights = None if weighing is None else drawn(seed + 1, cols).exp() * (weighing == "drawn")
    codes, steps = grids.nearest(rows, grid, search, weights)
    assert {name: part.shape for name, part in ({"codes": codes} | steps.parts()).items()} == grid.shapes(3, cols)
    assert int(codes.max()) < len(grid.table.levels)
    found = dequantize(codes, steps, grid)
    assert torch.isfinite(found).all()
    assert torch.equal(dequantize(encode(found, steps, grid), steps, grid), found)
    if case == "zero" and cols > 3:
        assert not found.any()
    if case == "zero group" and grid.group <= 32 and cols > 3 and weighing != "none matters":
        assert not found[:, :32].any()
    if case not in ("tiny", "denormal") and weighing is None:  # those are below what 16-bit floats hold
        assert error(rows, codes, steps, grid).sum() <= rows.square().sum()


# GPTQ


@each_grid
def test_feedback_beats_rounding_on_every_grid_and_is_never_worse(grid: Levels) -> None:
    rows, mix = drawn(1, 12, 512), drawn(2, 128, 512)
    inputs = drawn(3, 1500, 128) @ mix + 0.1 * drawn(4, 1500, 512)
    hessian = (inputs.T @ inputs)[None]
    rounded, fed = grids.nearest(rows, grid), grids.gptq(rows[None], *grids.decompose(hessian, 0.01), grid)
    plain, feedback, kept = (grids.damage(rows[None], *made, grid, hessian)
                             for made in (rounded, fed, grids.solve(rows[None], hessian, grid, 0.01)))  # fmt: skip
    assert feedback.sum() < 0.7 * plain.sum()
    assert (kept <= torch.minimum(plain, feedback)).all()


@each_grid
def test_inputs_that_feedback_cannot_help_leave_rounding(grid: Levels) -> None:
    """Inputs of which each counts alike: of every row the best is kept, which may be plain rounding."""
    rows, hessian = drawn(1, 12, 256), torch.eye(256)[None]
    hessian[0, :128, :128] += 1e-3
    kept = grids.damage(rows[None], *grids.solve(rows[None], hessian, grid, 1.0), grid, hessian)
    assert (kept <= grids.damage(rows[None], *grids.nearest(rows, grid), grid, hessian)).all()


# Whole models


def model() -> Any:
    """A llama with rows of 256 weights, so that every grid fits."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1)  # fmt: skip
    found = transformers.LlamaForCausalLM(config).eval()
    for parameter in found.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return found


@each_grid
def test_every_grid_goes_through_folders_and_gguf(
    grid: Levels, tiny_tokenizer: Any, context: Any, said: list[str], tmp_path: Path
) -> None:
    group = grid.group if len(grid.table.groups) > 1 else 64
    loaded = Quantize(grid=grid.kind, group=group, method="rtn", embeddings=True).apply(
        Loaded(model(), tiny_tokenizer), context)  # fmt: skip
    assert folder.save(loaded, tmp_path / "a").startswith("shrew (")
    again = folder.load(tmp_path / "a")
    assert again.packed.keys() == loaded.packed.keys() and len(again.packed) == 9
    for name, item in loaded.packed.items():
        assert (again.packed[name].grid, again.packed[name].shape) == (grid, item.shape)
        assert torch.equal(again.model.get_parameter(name), item.dense())
        assert torch.equal(again.packed[name].codes, item.codes)
        parts = again.packed[name].steps.parts()
        assert all(torch.equal(parts[key], part) and parts[key].dtype == part.dtype
                   for key, part in item.steps.parts().items())  # fmt: skip
    folder.save(again, tmp_path / "b")
    assert folder.identity(tmp_path / "a") == folder.identity(tmp_path / "b")
    info = {item.name: item for item in folder.tensors(tmp_path / "a")}["model.layers.0.mlp.up_proj.weight"]
    assert (info.effective, info.dtype) == (grid.label(), grid.kind.upper())
    assert info.bits_per_weight == pytest.approx(bits_a_weight(grid), abs=0.04)  # a row is whole bytes

    made = write(again, tmp_path / "a.gguf", Options(), said.append)
    types = {item["type"] for item in made["tensors"] if item["source"] in loaded.packed}
    dense = {item.name: by_gguf(item.data, item.tensor_type).reshape(item.shape[::-1])
             for item in GGUFReader(tmp_path / "a.gguf").tensors}  # fmt: skip
    down = loaded.model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert np.array_equal(dense["blk.0.ffn_down.weight"], down)
    if grid.kind == "nf4":
        assert types <= {"F16", "F32"} and len(said) == 1 and "nf4 g128 is no block type of GGUF" in said[0]
        return
    assert not said
    assert types == {"TQ2_0" if grid.kind == "ternary" else grid.kind.upper()}
    back.pack(str(tmp_path / "a.gguf"), tmp_path / "c", back.Options(), said.append)
    third = folder.load(tmp_path / "c")
    for name, item in loaded.packed.items():
        assert third.packed[name].grid == grid and torch.equal(third.packed[name].codes, item.codes)
        assert torch.equal(third.model.get_parameter(name), item.dense())
    write(third, tmp_path / "c.gguf", Options(), said.append)
    first, second = (GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "c.gguf"))
    assert all(np.array_equal(a.data, b.data) and a.name == b.name for a, b in zip(first, second, strict=True))


def bits_a_weight(grid: Levels) -> float:
    total = float(grid.widths["codes"])
    for name, (_, *rest) in grid.shapes(1, 256).items():
        if name != "codes":
            total += np.prod(rest) * int(grid.widths.get(name, 16)) / 256
    return total


def test_the_table_in_the_docs_is_true() -> None:
    lines = (Path(__file__).parents[1] / "docs/grids.md").read_text("utf-8").splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    told = {kind: (int(group), float(bits)) for kind, group, bits, *_ in rows if kind != Uniform.kind}
    assert told.keys() == TYPES.keys()
    for kind, (group, bits) in told.items():
        assert bits_a_weight(Levels(kind, group)) == pytest.approx(bits, abs=1e-9), kind


def test_mixed_grids_keep_feedback_at_least_as_good_as_rounding(
    tiny_tokenizer: Any, context: Any, said: list[str], tmp_path: Path
) -> None:
    """Each weight on a grid of its own, by one move; the file is called by what most of it is."""
    layer, names = "model.layers.0.", iter(("q3_k", "nf4", "mxfp4", "q2_k", "iq4_xs", 3, 0))
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    tensors: dict[str, int | str] = {f"{layer}{part}.weight": next(names) for part in parts}
    reference = Loaded(model(), tiny_tokenizer)
    statistics_, found = hessians(reference, context.calibration), {}
    for method in ("gptq", "rtn"):
        move = Quantize(grid="q6_k", group=32, method=method, sequential=False, embeddings=True,  # type: ignore[arg-type]
                        tensors=tensors)  # fmt: skip
        found[method] = move.apply(Loaded(model(), tiny_tokenizer), context)
    for name, hessian in statistics_.items():
        if name in found["rtn"].packed:
            losses = {}
            for method, loaded in found.items():
                change = loaded.packed[name].dense() - reference.model.get_parameter(name).detach()
                losses[method] = (change @ hessian * change).sum(1)
            assert (losses["gptq"] <= losses["rtn"] * 1.0001).all(), name
    loaded = found["gptq"]
    labels = {name.removeprefix(layer).removesuffix(".weight"): item.grid.label()
              for name, item in loaded.packed.items()}  # fmt: skip
    assert labels == {**dict(zip(parts, ("q3_k", "nf4 g32", "mxfp4", "q2_k", "iq4_xs", "int3 g32 sym"), strict=False)),
                      "model.embed_tokens": "q6_k", "lm_head": "q6_k"}  # fmt: skip
    assert loaded.untouched[f"{layer}mlp.down_proj.weight"] == "left alone on request"
    folder.save(loaded, tmp_path / "a")
    said.clear()
    made = write(folder.load(tmp_path / "a"), tmp_path / "a.gguf", Options(), said.append)
    types = {item["name"].removeprefix("blk.0.").removesuffix(".weight"): item["type"] for item in made["tensors"]}
    assert (types["attn_q"], types["attn_v"], types["attn_output"], types["ffn_gate"], types["ffn_up"]) == (
        "Q3_K", "MXFP4", "Q2_K", "IQ4_XS", "Q4_0")  # fmt: skip
    assert types["output"] == types["token_embd"] == "Q6_K"
    assert len(said) == 1 and "1 because nf4 g32" in said[0]
    assert GGUFReader(tmp_path / "a.gguf").fields["general.file_type"].contents() == 18


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grid": "q4_l"}, "no grid is called 'q4_l'; did you mean 'iq4_nl'"),
        ({"grid": "q3_k", "bits": 3}, "q3_k has its own"),
        ({"grid": "q3_k", "symmetric": False}, "q3_k has its own"),
        ({"grid": "nf4", "group": 48}, "nf4 has groups of 32, 64, 128, and not of 48"),
        ({"tensors": {"a": "q4_l"}}, "no grid is called 'q4_l'"),
        ({"tensors": {"a": "4"}}, "no grid is called '4'"),
    ],
)
def test_settings_that_no_grid_has_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        spec.parse(Quantize, values, "recipe")
    assert "\n" not in str(caught.value)


def test_settings_that_grids_have_are_read() -> None:
    move = spec.parse(Quantize, {"grid": "q4_k", "tensors": {"a": "q6_k", "b": 0, "c": 5}}, "recipe")
    assert spec.parse(Quantize, spec.dump(move), "again") == move
    assert set(KINDS) == {"int", "product", *TYPES}


@pytest.mark.parametrize(
    ("grid", "width", "advice"),
    [
        ("q4_k", 320, r"rows of 320 weights.* blocks of 256 as q4_k.*narrow 320 to 256 first, or use iq4_nl or q5_0"),
        ("q6_k", 96, r"rows of 96 weights.*; use iq4_nl or q5_0, whose blocks are 32"),
        ("iq4_nl", 48, r"blocks of 32 as iq4_nl.*use int, nf4 or ternary"),
    ],
)
def test_rows_that_a_grid_cannot_have_are_refused_with_advice(
    grid: str, width: int, advice: str, context: Any
) -> None:
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=width, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    loaded = Loaded(transformers.LlamaForCausalLM(config).eval(), None)
    with pytest.raises(UnsupportedError, match=advice) as caught:
        Quantize(grid=grid, method="rtn").apply(loaded, context)
    assert "\n" not in str(caught.value) and not loaded.packed
    Quantize(grid="nf4", method="rtn").apply(loaded, context)  # its last group may be shorter
    assert len(loaded.packed) == 7


Q4_K: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another kind": lambda entry: entry.update(kind="q5_k"),
    "no kind": lambda entry: entry.update(kind="q9_k"),
    "a list": lambda entry: entry.update(kind=["q4_k"]),
    "no group": lambda entry: entry.pop("group"),
    "another group": lambda entry: entry.update(group=64),
    "group is true": lambda entry: entry.update(group=True),
    "more": lambda entry: entry.update(bits=4),
    "part of a block": lambda entry: entry.update(shape=[256, 200]),
    "transposed": lambda entry: entry.update(transposed=1),
}


@pytest.mark.parametrize("lie", Q4_K)
def test_a_label_that_lies_is_refused(lie: str, tiny_tokenizer: Any, context: Any, tmp_path: Path) -> None:
    loaded = Loaded(model(), tiny_tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    Quantize(grid="q4_k", method="rtn").apply(loaded, context)
    folder.save(loaded, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    Q4_K[lie](config["quantization_config"]["tensors"][name])
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderError) as caught:
        folder.load(tmp_path / "a")
    assert "\n" not in str(caught.value)


@settings(max_examples=40)
@given(st.sampled_from(GRIDS), st.integers(1, 3), st.integers(0, 2**32))
def test_any_steps_come_back_from_our_own_parts(grid: Levels, count: int, seed: int) -> None:
    cols = 37 * count if grid.table.ragged else grid.span * count
    codes, steps = arbitrary(grid, 2, cols, seed)
    packed = Packed(codes, steps, grid, (2, cols))
    parts = {name.removeprefix("w"): part for name, part in to_parts("w", packed).items()}
    again = from_parts(parts, json.loads(json.dumps(to_entry(packed))))
    assert again.grid == grid and torch.equal(again.codes, codes)
    assert torch.equal(again.dense(), packed.dense())


# ONNX


@each_grid
def test_what_matmulnbits_can_hold_is_exact_and_the_rest_dense(grid: Levels, tmp_path: Path) -> None:
    rows = drawn(7, 32, 256)
    packed = Packed(*grids.nearest(rows, grid), grid, (32, 256))
    weights = Weights({"e.weight": packed.dense()}, {"e.weight": packed})
    held = weights.blocks("e.weight")
    if grid.kind == "nf4" or grid.table.mins:
        assert held is None and as_uniform(packed) is None
    else:
        assert held is not None
        assert np.array_equal(values(held), packed.dense())
        assert weights.effective["e.weight"].startswith(grid.label())
    g = Graph(weights)
    ids = g.input("ids", torch.int64, ("n",))
    found = g.embed(ids, "e")
    g.output(g.tied(found, "e"), "products", torch.float32, ("n", 32))
    g.output(found, "rows", torch.float32, ("n", 256))
    products, looked_up = written(g, tmp_path).runs.run(["products", "rows"], {"ids": np.array([3, 31, 0])})
    dense = packed.dense()
    assert np.array_equal(looked_up, dense[[3, 31, 0]])
    np.testing.assert_allclose(products, (dense[[3, 31, 0]].double() @ dense.double().T).float(), rtol=1e-4, atol=1e-3)


def test_minima_at_whole_steps_are_zero_points() -> None:
    """q4_1 with minima of whole steps is an integer grid with zero points."""
    scales = torch.tensor([[0.5, 0.25]]).half()
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    packed = Packed(codes, Steps(scales, -scales * torch.tensor([[3, 8]])), Levels("q4_1", 32), (1, 64))
    found = as_uniform(packed)
    assert found is not None and found.grid == Uniform(4, 32, False)
    assert found.steps.zeros is not None and found.steps.zeros.tolist() == [[3, 8]]
    assert torch.equal(found.dense(), packed.dense())


def test_the_packer_says_what_it_writes_dense(tiny_tokenizer: Any, context: Any, said: list[str]) -> None:
    loaded = Quantize(grid="nf4", group=32, method="rtn").apply(Loaded(model(), tiny_tokenizer), context)
    built = onnx_packer.build(loaded)
    onnx_packer._say_types(built.weights, loaded, said.append)
    assert [line for line in said if "dense" in line] == [
        "7 quantized weights are written dense, with the same values, as MatMulNBits cannot hold their grid and rows "
        "(nf4 g32)"]  # fmt: skip
