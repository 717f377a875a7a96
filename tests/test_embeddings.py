"""Hash n-gram embeddings against their definition: hashes, values, borders, states, generation."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shrew import errors, spec
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.embeddings import Ngrams, NgramSpec, naive_hashes
from shrew.blocks.layers import Place, State
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.stock import stock
from shrew.train import TrainSpec, optimizers

SPECS = [NgramSpec(), NgramSpec(sizes=(2,), rows=7), NgramSpec(sizes=(5, 3), rows=1000), NgramSpec(rows=1)]
SHAPE = ModelSpec(layers=2, width=32, vocabulary=97, context=64, mixers={"A": AttentionSpec(heads=4)},
                  ngrams=NgramSpec(sizes=(2, 3), rows=64))  # fmt: skip


def _place(tokens: Tensor, owner: Tensor | None = None, seen: int = 0) -> Place:
    return Place(tokens, torch.zeros_like(tokens), owner, seen)


def _owner(rows: int, length: int) -> Tensor:
    """Documents of lengths 1, 2, 3, ... in the first row, of others in the next ones."""
    return torch.stack([(torch.arange(length) * (2 + row)).sqrt().long() for row in range(rows)])


@pytest.mark.parametrize("item", SPECS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_hashes_are_their_definition(item: NgramSpec, packed: bool, length: int) -> None:
    tokens = torch.randint(2**20, (3, length), generator=torch.Generator().manual_seed(length))
    tokens[0, ::2] = 0  # id 0 is a token like any other
    owner = _owner(3, length)
    found = Ngrams(item, 8).hashes(_place(tokens, owner if packed else None))
    own = owner.tolist() if packed else [[0] * length] * 3
    wanted = torch.tensor([naive_hashes(row, mine, item) for row, mine in zip(tokens.tolist(), own, strict=True)])
    assert torch.equal(found, wanted + torch.arange(len(item.sizes)) * item.rows)
    assert set(found.flatten().tolist()) <= set(range(item.rows * len(item.sizes)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 6], [2, 10], [12]])
def test_hashes_of_a_row_read_in_parts(packed: bool, steps: list[int]) -> None:
    tokens, owner = torch.randint(97, (2, 12)), _owner(2, 12)
    block, state, parts, seen = Ngrams(NgramSpec(sizes=(2, 4), rows=50), 8), State(), [], 0
    for step in steps:
        now = owner[:, : seen + step] if packed else None
        parts.append(block.hashes(_place(tokens[:, seen : seen + step], now, seen), state))
        seen += step
    assert torch.equal(torch.cat(parts, 1), block.hashes(_place(tokens, owner if packed else None)))
    assert state.nbytes() == 2 * block.state_bytes()


def test_hashes_spread_over_the_rows() -> None:
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))  # every pair of two bytes
    found = Ngrams(NgramSpec(sizes=(2,), rows=8192), 8).hashes(_place(pairs))[:, 1, 0]
    counts = torch.bincount(found, minlength=8192)
    assert 0 < counts.min() <= counts.max() <= 3 * 8  # 8 on average


def test_values_and_gradients_are_the_sum_of_the_rows() -> None:
    item, tokens = NgramSpec(sizes=(2, 3, 4), rows=30), torch.randint(97, (2, 9))
    block = Ngrams(item, 8).double()
    wanted = torch.zeros(2, 9, 8, dtype=torch.float64)
    for row in range(2):
        for t, hashes in enumerate(naive_hashes(tokens[row].tolist(), [0] * 9, item)):
            for i, hashed in enumerate(hashes):
                wanted[row, t] += block.table.weight[i * 30 + hashed] / 3**0.5
    found = block(_place(tokens))
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), block.table.weight)[0] for y in (found, wanted))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_precision(dtype: torch.dtype) -> None:
    block, tokens = Ngrams(NgramSpec(rows=50), 8), torch.randint(97, (2, 9))
    wanted, found = block(_place(tokens)), block.to(dtype)(_place(tokens))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0.02, atol=0.02)
    found.sum().backward()


def _model(**changes: Any) -> ShrewForCausalLM:
    torch.manual_seed(0)
    model = build(replace(SHAPE, **changes), bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_beams_and_samples_carry_their_last_tokens(options: dict[str, Any]) -> None:
    model, tokens = _model(), torch.randint(3, 97, (2, 5))
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=9,
                                    eos_token_id=None, use_cache=use_cache, **options))  # fmt: skip
    assert torch.equal(*found)
    cache = model(tokens, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]
    assert cache.get_seq_length() == 5


def test_its_start_its_bytes_and_its_optimizer() -> None:
    model = build(SHAPE)
    plain = build(replace(SHAPE, ngrams=None))
    assert model.model.ngrams is not None
    table = model.model.ngrams.table.weight
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + table.numel()
    assert model.model.ngrams.idle() == table.numel() - 2 * 32
    assert model.flops(32) == plain.flops(32)
    muon, adam = optimizers(model, TrainSpec(data=[], out=""))
    for optimizer, inside in ((muon, False), (adam, True)):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert (id(table) in held) == inside
    assert stock(model) is model  # no stock type has such a table


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sizes": [1, 2]}, ["ngrams", "two tokens or more"]),
        ({"sizes": []}, ["ngrams", "two tokens or more"]),
        ({"sizes": [3, 3]}, ["ngrams", "same table twice"]),
        ({"rows": 0}, ["ngrams", "rows", ">= 1"]),
        ({"size": [3]}, ["ngrams", "'size'", "did you mean 'sizes'"]),
    ],
)
def test_wrong_settings_are_refused_in_words(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(ModelSpec, {"ngrams": values}, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_spec_survives_its_text() -> None:
    values = spec.dump(SHAPE)
    assert values["ngrams"] == {"sizes": [2, 3], "rows": 64}
    assert spec.parse(ModelSpec, values, "again") == SHAPE
