"""`linear`: the chunked recurrence against its definition, in values and gradients, and the block's own promises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shrew import errors, folder, spec
from shrew.blocks import linear
from shrew.blocks.layers import Place, Shape, State
from shrew.blocks.linear import MAMBA2, Linear, LinearSpec, naive_ssd, ssd
from shrew.blocks.mlp import NothingSpec
from shrew.blocks.model import ModelSpec, build

SMALL = replace(MAMBA2, heads=4, state=6, head_width=8, chunk=8)
FORMS = {
    "gate": LinearSpec(heads=4, state=6, chunk=8),
    "dt": replace(SMALL, groups=2, norm_groups=2, bias=True),
    "constant": LinearSpec(heads=2, state=6, decay="constant", gate="none", conv=3, chunk=8),
}


def _inputs(rows: int, length: int, groups: int, heads: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, log decays and a state; keys 3 wide, values 5."""
    torch.manual_seed(seed)
    shapes = [(rows, length, groups, 3), (rows, length, groups, 3), (rows, length, heads, 5), (rows, length, heads),
              (rows, heads, 3, 5)]  # fmt: skip
    q, k, v, logs, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, -logs.exp(), state)]


def _same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], places: list[Tensor]) -> None:
    """Equal outputs and states, and equal gradients of a loss on either and on both."""
    torch.testing.assert_close(found, wanted)
    weights = [torch.randn_like(x) for x in wanted]
    for picked in ([0], [1], [0, 1]):
        grads = [torch.autograd.grad([pair[i] for i in picked], places, [weights[i] for i in picked], retain_graph=True,
                                     materialize_grads=True) for pair in (found, wanted)]  # fmt: skip
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("groups", "heads"), [(1, 4), (2, 4), (3, 3)])
@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (8, 8), (33, 4), (21, 5), (9, 1)])
@pytest.mark.parametrize("given", [False, True])
def test_chunks_give_the_recurrence(length: int, chunk: int, groups: int, heads: int, given: bool,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(linear, "SPAN", 20)  # several spans too
    q, k, v, logs, state = _inputs(2, length, groups, heads)
    start = [state] if given else []
    _same(ssd(q, k, v, logs, *start, chunk=chunk), naive_ssd(q, k, v, logs, *start), [q, k, v, logs, *start])


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("before", [0, 9])
def test_nothing_passes_between_documents(chunk: int, before: int) -> None:
    q, k, v, logs, state = _inputs(2, 25, 2, 4)
    owner = torch.tensor([[0] * 3 + [1] + [2] * 12 + [3] * 9, [0] * 25])
    last = torch.full((2,), before)
    _same(ssd(q, k, v, logs, state, owner, last, chunk), naive_ssd(q, k, v, logs, state, owner, last),
          [q, k, v, logs, state])  # fmt: skip
    y, _ = ssd(q, k, v, logs, None, owner, chunk=chunk)
    for grad in torch.autograd.grad(y[0, 16:].sum(), [q, k, v, logs]):
        assert not grad[0, :16].count_nonzero()  # exactly


def test_a_decay_that_forgets_all_stays_finite() -> None:
    q, k, v, logs, state = _inputs(1, 40, 1, 2)
    strong = (logs.detach() * 1e4).requires_grad_()
    _same(ssd(q, k, v, strong, state, chunk=16), naive_ssd(q, k, v, strong, state), [q, k, v, strong, state])


@torch.no_grad()
def test_long_texts_are_read_in_parts() -> None:
    """Float32, 4000 positions, against the definition in float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4000, 1, 4), torch.randn(1, 4000, 1, 4), torch.randn(1, 4000, 2, 3)
    logs = -torch.rand(1, 4000, 2) * 0.02
    found, wanted = ssd(q, k, v, logs), naive_ssd(q.double(), k.double(), v.double(), logs.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def _block(form: str, dtype: torch.dtype = torch.float64) -> Linear:
    torch.manual_seed(0)
    block = Linear(FORMS[form], Shape(32, 1e-6))
    block.start(0.3, 0.3)
    return block.to(dtype)


def _place(rows: int, length: int, seen: int = 0) -> Place:
    positions = torch.arange(seen, seen + length).expand(rows, length)
    return Place(positions, positions, None, seen)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_block_step_by_step_is_the_block(form: str) -> None:
    block, x = _block(form), torch.randn(2, 19, 32, dtype=torch.float64)
    state, parts, seen = State(), [], 0
    for step in (1, 9, 1, 1, 7):
        parts.append(block(x[:, seen : seen + step], _place(2, step, seen), state))
        seen += step
    torch.testing.assert_close(torch.cat(parts, 1), block(x, _place(2, 19)))
    assert 2 * block.state_bytes(19, element=8) == state.nbytes()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_chunk_changes_nothing(form: str) -> None:
    block, x = _block(form), torch.randn(2, 19, 32, dtype=torch.float64)
    wanted = block(x, _place(2, 19))
    for chunk in (1, 3, 19, 64):
        block.spec = replace(block.spec, chunk=chunk)
        torch.testing.assert_close(block(x, _place(2, 19)), wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_near(form: str, how: str) -> None:
    """Decays and states stay float32, so only the rounding of single products is seen."""
    exact, x = _block(form, torch.float32), torch.randn(2, 40, 32)
    wanted, state = exact(x, _place(2, 40)), State()
    if how == "weights":
        found = _block(form, torch.bfloat16)(x.bfloat16(), _place(2, 40), state)
    else:
        found = _autocast(exact, x, state)
    assert (state.held["matrix"].dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    if how == "autocast":
        near, mine = (torch.autograd.grad(y.float().square().mean(), exact.in_proj.weight)[0] for y in
                      (_autocast(exact, x), wanted))  # fmt: skip
        assert (near - mine).norm() < 0.03 * mine.norm()


def _autocast(block: Linear, x: Tensor, state: State | None = None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return block(x, _place(*x.shape[:2]), state)


def test_decays_start_over_many_spans() -> None:
    """A new head remembers from a few positions to about a thousand, and no two heads the same."""
    for form, most in (("gate", 1025), ("dt", 1000), ("constant", 65)):
        torch.manual_seed(0)
        block = Linear(replace(FORMS[form], heads=4 if form != "constant" else 2), Shape(32, 1e-6))
        block.start(0.02, 0.02)
        logs, _ = block._log_decay(torch.zeros(1, 1, block.heads))
        spans = -1 / logs.flatten()
        assert 0.5 < spans.min() < 33 and spans.max() < most and len(set(spans.tolist())) == block.heads


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_keeps_every_part(form: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    mixers = {"A": FORMS[form], "B": replace(FORMS[form], heads=1, groups=1, norm_groups=1, head_width=None)}
    torch.manual_seed(0)
    model = build(ModelSpec(pattern="AB", layers=2, width=32, vocabulary=len(tiny_tokenizer), mixers=mixers)).eval()
    tokens = torch.randint(3, 97, (2, 21))
    folder.save(folder.Loaded(model, tiny_tokenizer, dtype=torch.float32), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (again.config.model_type, again.spec) == ("shrew", model.spec)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_layers_of_a_mixer_alone_hold_no_norm_for_a_second_block() -> None:
    model = build(ModelSpec(layers=2, width=32, vocabulary=97, norms="sandwich", mixers={"A": SMALL},
                            ffn=NothingSpec()))  # fmt: skip
    assert not [name for name, _ in model.named_parameters() if "ffn" in name]
    layers: list[Any] = list(model.model.layers)
    assert all(isinstance(layer.mixer_after, nn.Module) for layer in layers)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heads": 5}, ["32", "5 heads"]),
        ({"heads": 4, "groups": 3}, ["4 heads", "3 groups"]),
        ({"norm_groups": 5}, ["32 output channels", "5 norm_groups"]),
        ({"conv_bias": True}, ["conv_bias", "conv"]),
        ({"decay": "none"}, ["decay", "none"]),
    ],
)
def test_wrong_settings_are_refused_in_words(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(ModelSpec, {"width": 32, "mixers": {"A": {"kind": "linear", **values}}}, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)
