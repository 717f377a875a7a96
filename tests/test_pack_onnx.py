"""`shrew pack --to onnx`: packed graphs are the model, whatever its options, its grid and the pieces it is fed in."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shrew import folder, record
from shrew.__main__ import main
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.stock import adopt, in_our_names
from shrew.blocks.window import WindowSpec
from shrew.errors import UnsupportedError
from shrew.folder import Grid, Loaded, Packed, Uniform
from shrew.folder.packed import unpack_bits
from shrew.moves import grids
from shrew.packers.carry import carry
from shrew.packers.onnx import attention, check, graph, trunk
from shrew.packers.onnx.check import Runner
from shrew.packers.onnx.graph import Graph
from shrew.packers.onnx.source import ours
from shrew.packers.onnx.weights import Blocks, Weights, picked
from shrew.runtime import coded, template
from shrew.runtime.manifest import DATA
from shrew.runtime.manifest import GRAPH as MODEL

CONTEXT, TOKENS = 64, 40


def written(g: Graph, where: Path, level: int = 0, capacity: int = CONTEXT) -> Runner:
    """The graph, written and opened."""
    (where / MODEL).write_bytes(g.proto(g.write(where / DATA), level))
    return Runner(check.opened(where / MODEL), g.states, capacity, 16, g.align)


def random(spec: ModelSpec) -> ShrewForCausalLM:
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    model = build(spec).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15) if p.ndim > 1 else nn.init.uniform_(p, 0.4, 1.6)
    return model


def tokens(count: int = TOKENS, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 97, count)]


@torch.no_grad()
def wanted(model: Any, row: Sequence[int]) -> np.ndarray:
    return np.asarray(model(input_ids=torch.tensor([list(row)])).logits[0].float())


def fed(runner: Runner, row: Sequence[int], pieces: Sequence[int]) -> np.ndarray:
    """The logits of a row that is fed piece by piece, the rest token by token."""
    runner.start()
    found, rest = [], list(row)
    for size in [*pieces, *[1] * len(row)]:
        if rest:
            found.append(runner.feed(rest[:size]))
            rest = rest[size:]
    return np.concatenate(found)


def spec(mixer: Any = None, **more: Any) -> ModelSpec:
    mixers = {"A": mixer or AttentionSpec(heads=4, kv_heads=2)}
    return ModelSpec(**{"layers": 2, "width": 64, "vocabulary": 97, "context": CONTEXT, "mixers": mixers, **more})


def heads(**more: Any) -> AttentionSpec:
    return AttentionSpec(**{"heads": 4, "kv_heads": 2, "scale": 1.0, **more})


def near(**more: Any) -> WindowSpec:
    return WindowSpec(**{"heads": 4, "kv_heads": 2, "scale": 1.0, "window": 5, **more})


SPECS = {
    "grouped": spec(),
    "every head its own": spec(heads(kv_heads=None)),
    "untied": spec(tied=False),
    "head width 12": spec(heads(head_width=12)),
    "head width 8": spec(heads(head_width=8)),
    "head width 6 with norm over all": spec(heads(head_width=6, qk_norm="all")),
    "no positions": spec(heads(rotary_share=0)),
    "half rotary": spec(heads(rotary_share=0.5)),
    "half rotary of 32": spec(heads(head_width=32, rotary_share=0.5)),
    "a little rotary": spec(heads(head_width=10, rotary_share=0.2)),
    "yarn": spec(heads(yarn=4.0, yarn_context=16)),
    "head norm": spec(heads(qk_norm="head")),
    "head norm of 12": spec(heads(qk_norm="head", head_width=12)),
    "norm over all": spec(heads(qk_norm="all")),
    "capped scores": spec(heads(softcap=0.7)),
    "sinks": spec(heads(sinks=True)),
    "output gate": spec(heads(gate=True)),
    "biases": spec(heads(bias=True, head_width=12)),
    "value embeddings": spec(heads(value_embeddings=True)),
    "value embeddings with norm": spec(heads(value_embeddings=True, qk_norm="head", head_width=12)),
    "value embeddings with norm over all": spec(heads(value_embeddings=True, qk_norm="all")),
    "window": spec(near()),
    "window of one": spec(near(window=1)),
    "window beyond the context": spec(near(window=100)),
    "window with all": spec(near(window=7, sinks=True, softcap=0.7, qk_norm="head", head_width=12, gate=True)),
    "windows and attention": spec(pattern="WAW", layers=3, mixers={"W": near(), "A": heads()}),
    "ungated squares": spec(ffn=MlpSpec(activation="relu2", gated=False)),
    "gelu": spec(ffn=MlpSpec(activation="gelu_tanh", hidden=40)),
    "scales": spec(norms="sandwich", embedding_scale=8.0, residual_scale=0.5, logit_scale=0.3, softcap=2.0),
    "repeats": spec(layers=2, repeats=(2, 1), loops=2, pattern="WA", mixers={"W": near(), "A": heads()}),
    "factors": spec(ranks={f"layers.0.{name}_proj": 12 for name in ("mixer.q", "mixer.o", "ffn.up", "ffn.down")}),
    "loops": spec(loops=2, pattern="WA", mixers={"W": near(), "A": heads()}),
}


@pytest.mark.parametrize("name", SPECS)
def test_pieces_then_tokens_give_the_whole_pass(name: str, tmp_path: Path) -> None:
    model, row = random(SPECS[name]), tokens()
    whole = wanted(model, row)
    runner = written(trunk.causal(model, Weights(dict(model.state_dict()))), tmp_path)
    assert np.abs(whole).max() > 0.2
    for pieces in ([16, 13], [1, 2, 3, 4, 5], [7, 1, 9]):
        np.testing.assert_allclose(fed(runner, row, pieces), whole, atol=1e-4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShrewForCausalLM, Runner]:
    model = random(SPECS["windows and attention"])
    graph = trunk.causal(model, Weights(dict(model.state_dict())))
    return model, written(graph, tmp_path_factory.mktemp("mixed"))


@settings(max_examples=15)
@given(pieces=st.lists(st.integers(1, 16), max_size=8), length=st.integers(1, CONTEXT), seed=st.integers(0, 9))
def test_any_pieces(mixed: tuple[ShrewForCausalLM, Runner], pieces: list[int], length: int, seed: int) -> None:
    model, runner = mixed
    row = tokens(length, seed)
    np.testing.assert_allclose(fed(runner, row, pieces), wanted(model, row), atol=1e-4)


def test_rows_of_other_lengths_decode_together(mixed: tuple[ShrewForCausalLM, Runner]) -> None:
    model, runner = mixed
    rows = [tokens(count, count) for count in (3, 17, 1, 30)]
    held = []
    for row in rows:
        runner.start()
        runner.feed(row)
        held.append(dict(runner.held))
    together = {name: np.concatenate([each[name] for each in held]) for name in held[0]}
    starts, further = np.array([len(row) for row in rows]), tokens(6, 9)
    for token in further:
        inputs = {"tokens": np.full((4, 1), token), "start": starts, "wanted": np.array([3, 1])}
        inputs |= {f"past.{name}": value for name, value in together.items()}
        outputs = dict(zip(runner.names, runner.runs.run(None, inputs), strict=True))
        together = {name: outputs[f"next.{name}"] for name in together}
        starts = starts + 1
    for got, number in zip(outputs["logits"], (3, 1), strict=True):
        np.testing.assert_allclose(got, wanted(model, rows[number] + further)[-1], atol=1e-4)


def test_caches_are_written_in_place_and_nothing_need_be_wanted(mixed: tuple[ShrewForCausalLM, Runner]) -> None:
    model, runner = mixed
    row = tokens(20)
    runner.start()
    runs, names = runner.runs, runner.names
    caches = {state.name for state in runner.states if state.kind == "cache"}
    assert caches and len(caches) < len(runner.states)
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in runner.held.items()}
    for first, size, count in ((0, 12, 0), (12, 7, 0), (19, 1, 1)):
        bound = runs.io_binding()
        bound.bind_cpu_input("tokens", np.array([row[first : first + size]]))
        bound.bind_cpu_input("start", np.array([first]))
        bound.bind_cpu_input("wanted", np.arange(count))
        for name, value in kept.items():
            bound.bind_ortvalue_input(f"past.{name}", value)
        for name in names:
            state = name.removeprefix("next.")
            if state in caches:
                bound.bind_ortvalue_output(name, kept[state])
            else:
                bound.bind_output(name)
        runs.run_with_iobinding(bound)
        outputs = dict(zip(names, bound.get_outputs(), strict=True))
        assert outputs["logits"].shape() == [count, 97] and outputs["hidden"].shape() == [count, 64]
        kept |= {name: outputs[f"next.{name}"] for name in kept if name not in caches}
    np.testing.assert_allclose(outputs["logits"].numpy()[0], wanted(model, row)[-1], atol=1e-4)


# Codes


def values(blocks: Blocks) -> np.ndarray:
    """What MatMulNBits computes with: (code - zero) * scale, block by block."""
    rows, count, _ = blocks.codes.shape
    found = unpack_bits(blocks.codes.flatten(1), blocks.bits, blocks.cols).float().view(rows, count, blocks.size)
    middle = torch.tensor(2.0 ** (blocks.bits - 1))
    zeros = middle if blocks.zeros is None else unpack_bits(blocks.zeros, blocks.bits, count).float()[..., None]
    return np.asarray(((found - zeros) * blocks.scales.float()[..., None]).flatten(1))


GROUPS = (0, 16, 32, 48, 64, 128, 256)


@settings(max_examples=60)
@given(bits=st.integers(2, 8), group=st.sampled_from(GROUPS), cols=st.integers(1, 20), symmetric=st.booleans(),
       seed=st.integers(0, 99))  # fmt: skip
def test_blocks_hold_the_same_values(bits: int, group: int, cols: int, symmetric: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid, weight = Uniform(bits, group, symmetric), torch.randn(5, cols * 16, generator=generator)
    packed = Packed(*grids.nearest(weight, grid, search=False), grid, (5, cols * 16))
    weights = Weights({"w": packed.dense()}, {"w": packed})
    rows = torch.tensor([4, -1, 0, 0])
    for order in (None, rows):
        blocks = weights.blocks("w", rows=order)
        assert blocks is not None
        dense = packed.dense() if order is None else picked(packed.dense(), rows, 0)
        assert np.array_equal(values(blocks), dense)
        assert blocks.bits == 2 ** int(np.ceil(np.log2(bits))) or (bits == 2 and blocks.size == 16)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 16, 32, 48, 128])
def test_the_runtime_computes_with_these_values(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    grid, weight = Uniform(bits, group, symmetric), torch.randn(50, 384)
    packed = Packed(*grids.nearest(weight, grid), grid, (50, 384))
    g = Graph(Weights({"e.weight": packed.dense()}, {"e.weight": packed}))
    ids = g.input("ids", torch.int64, ("n",))
    rows = g.embed(ids, "e")
    g.output(g.tied(rows, "e"), "products", torch.float32, ("n", 50))
    g.output(rows, "rows", torch.float32, ("n", 384))
    runs = written(g, tmp_path).runs
    products, found = runs.run(["products", "rows"], {"ids": np.array([3, 49, 0])})
    dense = packed.dense()[[3, 49, 0]]
    assert np.array_equal(found, dense)
    np.testing.assert_allclose(products, (dense.double() @ packed.dense().double().T).float(), rtol=1e-4, atol=1e-3)
    codes_ = 50 * 384 * g.weights.blocks("e.weight").bits // 8  # type: ignore[union-attr]
    assert codes_ < (tmp_path / DATA).stat().st_size < codes_ + 50 * 24 * 4  # both readers share the bytes


def quantized(model: Any, grid: Grid) -> Loaded:
    """A stock model with all its matrices on a grid, rounded to nearest."""
    found = {}
    for name, p in model.named_parameters():
        if p.ndim > 1 and "router" not in name and not name.endswith("mlp.gate.weight"):
            rows = p.detach().reshape(-1, p.shape[-1])
            found[name] = Packed(*grids.nearest(rows, grid, search=False), grid, tuple(p.shape))
            p.data = found[name].dense()
    return Loaded(model.eval(), None, packed=found)


COMMON: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
                          "initializer_range": 0.15, "pad_token_id": 0}  # fmt: skip
STOCK = {
    "llama": transformers.LlamaConfig(**COMMON),
    "llama tied": transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=16),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=6, sliding_window_pattern=2),
}


@pytest.mark.parametrize("grid", [None, Uniform(4, 32), Uniform(3, 0, False)])
@pytest.mark.parametrize("name", STOCK)
def test_stock_types(name: str, grid: Grid | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(STOCK[name])
    for part, p in model.named_parameters():
        if part.endswith("bias"):
            nn.init.normal_(p)
    loaded = quantized(model, grid) if grid else Loaded(model.eval(), None)
    same, weights = ours(loaded)
    g = trunk.causal(same, weights)
    runner, row = written(g, tmp_path), tokens()
    np.testing.assert_allclose(fed(runner, row, [9]), wanted(model, row), atol=2e-4)
    if grid:
        large = {kind for name, kind in weights.effective.items() if weights.dense[name].ndim > 1}
        assert large == {grid.label() + (" in 4 bits" if grid.bits == 3 else "")}
        assert sum(node.op_type == "MatMulNBits" for node in g._nodes) == 2 * 5 + 1  # queries, keys, values in one


def test_weights_of_unlike_grids_stay_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(STOCK["llama"])
    loaded = quantized(model, Uniform(4, 32))
    name = "model.layers.1.self_attn.k_proj.weight"
    loaded.packed[name] = Packed(*grids.nearest(loaded.packed[name].dense(), Uniform(8, 16)), Uniform(8, 16), (32, 64))
    del loaded.packed["model.layers.0.self_attn.v_proj.weight"]
    model.get_parameter(name).data = loaded.packed[name].dense()
    same, weights = ours(loaded)
    runner, row = written(trunk.causal(same, weights), tmp_path), tokens()
    np.testing.assert_allclose(fed(runner, row, [9]), wanted(model, row), atol=2e-4)
    assert weights.effective["model.layers.1.mixer.k_proj.weight"] == "int8 g16 sym"
    assert weights.effective["model.layers.0.mixer.v_proj.weight"] in ("fp16", "fp32")


def test_codes_follow_rows_that_adapters_split() -> None:
    """granite keeps gate and up in one matrix."""
    config = transformers.GraniteMoeHybridConfig(
        **{**COMMON, "layer_types": ["full_attention"] * 2}, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=48, mamba_n_heads=4, mamba_d_head=32, position_embedding_type="rope")  # fmt: skip
    torch.manual_seed(0)
    loaded = quantized(transformers.AutoModelForCausalLM.from_config(config), Uniform(4, 16, False))
    mine = adopt(loaded.model)
    found = carry(loaded.packed, loaded.model.state_dict(), partial(in_our_names, loaded.model.config, mine.spec))
    assert "model.layers.1.ffn.gate_proj.weight" in found
    for name, packed in found.items():
        assert torch.equal(packed.dense(), mine.get_parameter(name))


def test_every_layout_turns_the_right_channels() -> None:
    for width in (2, 6, 8, 10, 12, 16, 24, 48, 64):
        for rotated in range(0, width + 1, 2):
            place = attention.layout(width, rotated)
            half = place.padded // 2
            assert place.padded % 8 == 0 and sorted(place.turned[place.turned >= 0]) == list(range(width))
            if not place.usual:
                assert place.turned[: rotated // 2].tolist() == list(range(rotated // 2))
                assert place.turned[half : half + rotated // 2].tolist() == list(range(rotated // 2, rotated))


# The command


def packed_folder(source: Path | str, out: Path, *more: str) -> dict[str, Any]:
    assert main(["pack", str(source), "--out", str(out), *more]) == 0
    found: dict[str, Any] = json.loads((out / "pack.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def quantized_folder(trained_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "small"
    flags = ["--bits", "4", "--group", "32", "--method", "rtn", "--embeddings", "--out", str(out)]
    assert main(["apply", str(trained_llama_folder), "quantize", *flags, "--text", __file__]) == 0
    return out


def test_a_folder_is_packed(quantized_folder: Path, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    found = packed_folder(quantized_folder, out, "--text", str(stories))
    assert {key: found[key] for key in ("format", "kind", "name", "vocabulary", "width", "context", "labels")} == {
        "format": 1, "kind": "causal", "name": "small", "vocabulary": 300, "width": 64, "context": 256, "labels": None
    }  # fmt: skip
    assert {item.name for item in out.iterdir()} == {*found["files"], "pack.json"}
    for name, stated in found["files"].items():
        content = (out / name).read_bytes()
        assert stated == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert found["exact"]["greedy_equal"] == found["exact"]["greedy_compared"] == 200
    assert found["exact"]["logit_difference"] < 1e-3
    assert found["accuracy_level"] in (0, 4) and found["shipped"]["kl_bits"] < 0.05 < 0.9 < found["shipped"]["top1"]
    kinds = {kind for name, kind in found["weights"].items() if not name.endswith("norm.weight")}
    assert kinds == {"int4 g32 sym"}
    loaded = folder.load(quantized_folder)
    matrices = sum(p.numel() for p in loaded.model.parameters() if p.ndim > 1)
    promised = matrices * 4.5 / 8
    assert 0.98 * promised < (out / DATA).stat().st_size < promised + 5 * 64 * 4 + 40 * coded.ALIGN
    assert (out / MODEL).stat().st_size < 30_000
    assert json.loads((out / "shrew.json").read_text("utf-8"))["packed"]["from"]["sha256"] == folder.identity(
        quantized_folder
    )
    runner = Runner(check.opened(out / MODEL), [graph.State(**state) for state in found["states"]], 64, found["chunk"])
    row = loaded.tokenizer("The ant sees the bee. The fox")["input_ids"]
    assert (runner.feed(row)[-1].argmax() == wanted(loaded.model, row)[-1].argmax()).all()


def test_what_the_checks_found_is_in_the_report(quantized_folder: Path, tmp_path: Path, capfd: Any) -> None:
    kept, page = tmp_path / "records.jsonl", tmp_path / "report.html"
    kept.write_text("not a record\n", "utf-8")
    out = tmp_path / "packed"
    words = ["pack", str(quantized_folder), "--out", str(out), "--text", __file__, "--records", str(kept)]
    assert main(words) == 2 and not (tmp_path / "packed").exists()
    assert "line 1" in capfd.readouterr().err
    record.write(kept, [record.Record(run="a run", model="chosen", metric="bytes", value=1000.0, unit="bytes")])
    assert main(words) == 0
    manifest = json.loads((tmp_path / "packed" / "pack.json").read_text("utf-8"))
    rows = {row.metric: row.value for row in record.read(kept) if (row.run, row.model) == ("a run", "packed")}
    assert rows["packed_bytes"] == sum(item["bytes"] for item in manifest["files"].values())
    assert rows["kl_from_exact"] == manifest["shipped"]["kl_bits"] and rows["top1_from_exact"] <= 1
    first = manifest["shipped"]["first_differing_token"]
    assert rows["equal_greedy_tokens"] == (200 if first is None else first)
    assert main(["report", str(kept), "--out", str(page)]) == 0
    told = page.read_text("utf-8")
    assert all(words in told for words in ("KL of the packed model", "Same first choice", "Packed folder", "chosen"))


def test_what_is_not_quantized_is_said(tiny_llama_folder: Path, tmp_path: Path, capfd: Any) -> None:
    found = packed_folder(tiny_llama_folder, tmp_path / "packed", "--json")
    out, err = capfd.readouterr()
    assert json.loads(out)["exact"] == found["exact"] and "shrew apply" in err
    assert found["accuracy_level"] == 0 and found["shipped"]["kl_bits"] == 0
    assert "fp32" in found["weights"]["model.embed_tokens.weight"]


def test_several_chat_templates_lie_in_the_pack(tiny_llama_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_folder, source)
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("plain", "utf-8")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("with tools", "utf-8")
    found = packed_folder(source, tmp_path / "packed")
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == sorted([*found["files"], "pack.json"])
    made = template.of_folder(tmp_path / "packed", found["files"])
    assert made.sources == {"default": "plain", "tool_use": "with tools"}


def test_a_graph_that_is_not_the_model_is_refused(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    emit = trunk.EMITTERS["attention"]

    def wrong(g: Graph, block: Any, *rest: Any) -> str:
        block.scale *= 1.01
        return emit(g, block, *rest)

    monkeypatch.setitem(trunk.EMITTERS, "attention", wrong)
    assert main(["pack", str(tiny_llama_folder), "--out", str(tmp_path / "packed")]) == 1
    assert "is not the model" in capfd.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("flags, said", [
    (["--to", "onyx"], "did you mean 'onnx'"),
    (["--text", "/nowhere.txt"], "no such file"),
    (["--out", "{full}"], "holds other things"),
])  # fmt: skip
def test_bad_flags(tiny_llama_folder: Path, tmp_path: Path, flags: list[str], said: str, capfd: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    given_ = [flag.format(full=tmp_path / "full") for flag in flags]
    out = [] if "--out" in flags else ["--out", str(tmp_path / "packed")]
    assert main(["pack", str(tiny_llama_folder), *out, *given_]) == 2
    assert said in capfd.readouterr().err and not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("to", "model", "out"),
    [
        ("onnx", "a model", "MODEL-onnx"),
        ("gguf", "a model", "MODEL.gguf"),
        ("folder", "a GGUF", "MODEL-folder"),
        ("web", "a packed", "MODEL-web"),
    ],
)
def test_help_is_that_of_the_form(to: str, model: str, out: str, capsys: Any) -> None:
    assert main(["pack", "--to", to, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert model in said and f"(default {out}, here)" in said and "(default )" not in said


def test_types_that_our_blocks_cannot_say() -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    with pytest.raises(UnsupportedError, match=r"gpt2: .* known: llama, qwen3"):
        ours(Loaded(transformers.AutoModelForCausalLM.from_config(config), None))


def test_one_product_for_queries_keys_and_values() -> None:
    """Few nodes are what decoding of small models is made of."""
    model = random(replace(SPECS["grouped"], layers=6))
    assert len(trunk.causal(model, Weights(dict(model.state_dict())))._nodes) <= 6 * 10 + 20
