"""Layers that share their weights: the same model with every layer written out is the oracle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shrew import folder
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec
from shrew.blocks.model import ModelSpec, build
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves import Context
from shrew.moves.distil import Distil
from shrew.moves.drop_layers import DropLayers
from shrew.moves.share import Share, neighbours, pair_scores, tied

A = AttentionSpec(heads=2, kv_heads=1)


def make(layers: int = 4, **more: Any) -> Loaded:
    torch.manual_seed(0)
    settings = {"layers": layers, "width": 32, "vocabulary": 64, "context": 64, "mixers": {"A": A}, **more}
    model = build(ModelSpec(**settings), bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return Loaded(model, None)


def answers(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(4, 64, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def copy_layer(model: Any, source: int, target: int) -> None:
    model.model.layers[target].load_state_dict(model.model.layers[source].state_dict())


def written_out(model: Any) -> Any:
    """The same model with a layer for each pass."""
    spec = model.spec
    letters = "".join(spec.pattern[at % len(spec.pattern)] for at in spec.order)
    long = build(ModelSpec(**{**vars(spec), "layers": spec.depth, "pattern": letters, "repeats": ()})).eval()
    weights = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for place, at in enumerate(spec.order):
        layer = model.model.layers[at].state_dict()
        weights |= {f"model.layers.{place}.{name}": value for name, value in layer.items()}
    long.load_state_dict(weights)
    return long


@pytest.mark.parametrize("weights", ["best", "average", "first", "second"])
def test_equal_neighbours_are_found_and_cost_nothing(weights: Any, context: Context, said: list[str]) -> None:
    loaded = make()
    copy_layer(loaded.model, 1, 2)
    before = loaded.model.num_parameters()
    small = Share(weights=weights).apply(loaded, context)
    assert small.model.spec.repeats == (1, 2, 1) and "layers 1 and 2 become one" in said[-1]
    torch.testing.assert_close(answers(small.model), answers(loaded.model))
    gone = sum(weight.numel() for weight in loaded.model.model.layers[1].parameters())
    assert small.model.num_parameters() == before - gone
    assert small.model.flops(9) == loaded.model.flops(9) and small.model.state_bytes(9) == loaded.model.state_bytes(9)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"pattern": "AACC", "mixers": {"A": A, "C": ConvSpec()}},
        {"exits": ExitSpec(every=3)},
        {"norms": "sandwich", "tied": False},
    ],
    ids=["plain", "mixed", "exits", "untied"],
)
def test_it_is_the_model_with_every_pass_written_out(more: dict[str, Any], context: Context, tmp_path: Path) -> None:
    small = Share(count=2).apply(make(**more), context)
    assert small.model.spec.layers == 2 and small.model.spec.depth == 4
    torch.testing.assert_close(answers(small.model), answers(written_out(small.model)))
    folder.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted = {name: value.bfloat16().float() for name, value in small.model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    ids = torch.randint(4, 64, (1, 12), generator=torch.Generator().manual_seed(3))
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    cached, plain = (again.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


def test_scores_are_the_divergence_of_what_is_made(context: Context) -> None:
    loaded = make(3)
    before = answers(loaded.model)
    options = ("average", "first", "second")
    scores = pair_scores(loaded, context, neighbours(loaded.model), options)
    assert torch.equal(answers(loaded.model), before)  # measuring leaves it as it was
    assert len(scores) == 6
    from shrew.moves.anatomy import batches, logits

    for (first, weights), score in scores.items():
        small = Loaded(tied(loaded.model, first, weights), None)
        total = rows = 0.0
        with torch.no_grad():
            for ids in batches(loaded, context.calibration, 2048, 4096):
                old, new = (logits(item, ids).log_softmax(-1) for item in (loaded, small))
                total += float((old.exp() * (old - new)).sum())
                rows += ids.numel()
        assert score == pytest.approx(total / rows, rel=1e-4)
    assert Share().apply(loaded, context).model.spec.repeats == ((2, 1) if min(scores, key=scores.__getitem__)[0] == 0
                                                               else (1, 2))  # fmt: skip


def test_an_average_counts_each_layer_by_its_passes(context: Context) -> None:
    loaded = make(2, repeats=(3, 1))
    one, two = (layer.state_dict() for layer in loaded.model.model.layers)
    small = tied(loaded.model, 0, "average")
    name = "ffn.up_proj.weight"
    torch.testing.assert_close(small.model.layers[0].state_dict()[name], 0.75 * one[name] + 0.25 * two[name])
    assert small.spec.repeats == (4,)


def test_bytes_shrink_and_healing_keeps_one_layer(
    trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path
) -> None:
    code, said = apply(trained_llama_folder, "share", "--text", stories, "--out", tmp_path / "out")
    assert code == 0 and "layers 0 and 1 become one" in said
    before, after = (folder.tensors(path) for path in (trained_llama_folder, tmp_path / "out"))
    gone = sum(item.bytes for item in before if ".layers.1." in item.name)
    assert sum(item.bytes for item in after) == sum(item.bytes for item in before) - gone
    loaded = folder.load(tmp_path / "out")
    assert loaded.model.config.model_type == "shrew"
    row = AutoTokenizer.from_pretrained(tmp_path / "out")("The cat sees", return_tensors="pt")
    assert loaded.model.generate(**row, max_new_tokens=4).shape[1] == row["input_ids"].shape[1] + 4
    from shrew.moves.source import windows

    texts = stories.read_text().splitlines()[:8]
    healing = windows(loaded, texts, 64, 2000)
    context = Context(healing, healing, folder.load(trained_llama_folder), 0, tmp_path / "cache", lambda line: None)
    healed = Distil(steps=4, rows=2).apply(loaded, context)
    folder.save(healed, tmp_path / "healed")
    assert sum(item.bytes for item in folder.tensors(tmp_path / "healed")) == sum(item.bytes for item in after)
    code, _ = apply(tmp_path / "healed", "quantize", "--method", "rtn", "--group", 32, "--out", tmp_path / "four")
    assert code == 0 and len(folder.load(tmp_path / "four").packed) == 7


def test_layers_that_are_run_twice_can_be_left_out(context: Context) -> None:
    loaded = make(3, repeats=(1, 2, 3))
    small = DropLayers(layers=(1,)).apply(loaded, context)
    assert small.model.spec.repeats == (1, 3)


def test_what_is_refused(context: Context) -> None:
    with pytest.raises(SpecError, match="leave at least one"):
        Share(count=4).apply(make(), context)
    with pytest.raises(UnsupportedError, match="no two neighbouring layers"):
        Share().apply(make(pattern="AC", mixers={"A": A, "C": ConvSpec()}), context)
    with pytest.raises(UnsupportedError, match="mixture-of-depths"):
        Share().apply(make(mixture_of_depths=MixtureOfDepthsSpec()), context)
    with pytest.raises(SpecError, match="2 numbers for 3 layers"):
        ModelSpec(layers=3, repeats=(1, 2))
