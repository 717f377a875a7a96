"""`rotate`: an orthogonal turn that the model cannot tell, and that spreads what stands out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_folder import logits, plain
from test_quantize_blocks import BLOCKS
from test_smooth import MORE, outliers

from shrew import folder
from shrew.errors import UnsupportedError
from shrew.moves.quantize import Quantize
from shrew.moves.rotate import Rotate, hadamard, turned
from shrew.moves.seams import Side, seams

WHOLE = ["llama", "tied", "qwen3", "olmoe", *MORE, "window", "conv", "linear", "mamba2", "delta", "memory", "moe"]
SOME = {  # what cannot be turned with the residual stream, and why
    "gemma3": "meets a part that cannot be turned",
    "gpt2": "does more than divide",
    "distilbert": "no embedding and output head",
    "modernbert": "no embedding and output head",
    "ngrams": "meets a part that cannot be turned",
    "depth": "meets a part that cannot be turned",
}


@settings(max_examples=40)
@given(st.integers(1, 130), st.integers(0, 2**32))
def test_every_size_gets_an_orthogonal_matrix_that_spreads(size: int, seed: int) -> None:
    matrix = hadamard(size, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double())
    power = size & -size
    bound = (1 if power == size else 2) / size  # of a Hadamard matrix exactly
    assert matrix.square().max() <= bound * 1.0000001
    if power == size:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_turning_both_sides_leaves_the_product(heads: int, width: int, rows: int, first: int, columns: bool) -> None:
    draw = torch.Generator().manual_seed(width)
    matrix, whole = hadamard(width, draw), heads * width
    written = torch.randn(first + whole, rows, generator=draw)
    read = torch.randn(5, whole, generator=draw)
    wanted = read @ written[first:]
    side = Side("w", 1 if columns else 0, first)
    new = turned(written.T if columns else written, side, matrix, whole)
    new = new.T if columns else new
    assert torch.equal(new[:first], written[:first])
    torch.testing.assert_close(turned(read, Side("r", 1), matrix, whole) @ new[first:], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*WHOLE, "attention"])
def test_the_model_says_the_same(kind: str, context: Any, said: list[str], tmp_path: Path) -> None:
    loaded = outliers(kind)
    before = logits(loaded.model)
    old = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    made = Rotate().apply(loaded, context)
    assert (logits(made.model) - before).abs().max() < 3e-5 * before.abs().max()
    state = made.model.state_dict()
    width = loaded.model.get_input_embeddings().weight.shape[1]
    for name, value in state.items():  # what reads or writes the residual stream
        if value.ndim > 1 and width in value.shape and "conv" not in name and "table" not in name:
            assert not torch.allclose(value, old[name], atol=1e-3), name
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert any("no longer tied" in line for line in said) == tied
    folder.save(made, tmp_path / "turned")
    again = folder.load(tmp_path / "turned").model
    assert (logits(again) - before).abs().mean() < 0.05 * before.abs().mean()  # stored in bf16
    assert torch.equal(logits(plain(tmp_path / "turned").eval()), logits(again))
    again.generate(torch.arange(4, 9)[None], max_new_tokens=2)


@pytest.mark.parametrize("kind", SOME)
def test_what_cannot_be_turned_is_refused_and_left(kind: str, context: Any, said: list[str]) -> None:
    loaded = outliers(kind)
    before = logits(loaded.model)
    with pytest.raises(UnsupportedError, match=SOME[kind]):
        Rotate().apply(loaded, context)
    assert torch.equal(logits(loaded.model), before)
    old = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    Rotate(residual=False).apply(loaded, context)
    assert (logits(loaded.model) - before).abs().max() < 3e-5 * before.abs().max()
    changed = [name for name, value in loaded.model.state_dict().items() if not torch.equal(value, old[name])]
    assert len([name for name in changed if "bias" not in name]) == 4, changed  # values and out of two layers


def test_equal_gains_leave_the_head_tied(context: Any, said: list[str], tmp_path: Path) -> None:
    loaded = outliers("tied")
    loaded.model.model.norm.weight.data.fill_(1.7)
    before = logits(loaded.model)
    made = Rotate().apply(loaded, context)
    assert made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight
    assert (logits(made.model) - before).abs().max() < 3e-5 * before.abs().max()
    assert said == []


def test_values_that_others_read_are_left(context: Any, said: list[str]) -> None:
    Rotate(residual=False).apply(outliers("attention"), context)  # its second layer adds embeddings of the tokens
    assert [line for line in said if "values of" in line] != []


def test_channels_that_stood_out_round_better(context: Any) -> None:
    losses = {}
    for name, moves in {"plain": [], "turned": [Rotate()]}.items():
        loaded = outliers("llama")
        for seam in seams(loaded.model, torch.arange(4, 20)[None]):
            if "norm" in seam.what:  # three channels that norms make small and weights large: the model is the same
                factors = torch.ones(seam.width)
                factors[[3, 20, 50]] = 30.0
                seam.move(loaded.model, factors)
        before = logits(loaded.model)
        for move in moves:
            loaded = move.apply(loaded, context)
        loaded = Quantize(bits=4, group=0, method="rtn").apply(loaded, context)
        losses[name] = float((logits(loaded.model) - before).square().mean())
    assert losses["turned"] < 0.7 * losses["plain"]


def test_a_seed_says_which_turn(context: Any) -> None:
    first, again, other = (
        Rotate().apply(outliers("llama"), replace(context, seed=seed)).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_packed_weights_are_refused(context: Any) -> None:
    with pytest.raises(UnsupportedError, match="goes before quantize"):
        Rotate().apply(Quantize(method="rtn").apply(outliers("llama"), context), context)


def test_every_block_is_tried() -> None:
    assert set(BLOCKS) <= {*WHOLE, *SOME, "attention"}
