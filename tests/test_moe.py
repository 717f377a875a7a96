"""`moe` against its definition: values, gradients, balance, and training that goes on to the bit. Muon on stacks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shrew import errors, folder, spec
from shrew.blocks.layers import Shape
from shrew.blocks.mlp import ACTIVATIONS, Mlp, MlpSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import Moe, MoeSpec, moe_or_mlp, naive_moe
from shrew.muon import StackedMuon
from shrew.train import Loop, Recipe, TrainSpec, optimizers, train

SPECS = {
    "olmoe": MoeSpec(experts=5, top_k=2, hidden=12, normalise=False),
    "all": MoeSpec(experts=3, top_k=3, hidden=8, activation="relu2"),
    "one": MoeSpec(experts=4, top_k=1, hidden=8, normalise=False, activation="gelu_tanh"),
    "deepseek": MoeSpec(experts=4, top_k=2, hidden=8, router="sigmoid", balance="bias", shared=8),
    "gated": MoeSpec(experts=4, top_k=2, hidden=8, shared=8, shared_gate=True, z_weight=0.0),
}


def _block(kind: str) -> Moe:
    torch.manual_seed(0)
    block = Moe(SPECS[kind], Shape(16, 1e-6)).double()
    block.start(0.3, 0.3)
    if block.balance_bias is not None:
        block.balance_bias.uniform_(-0.5, 0.5)
    return block


def _by_hand(block: Moe, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, logits, scores and choices, each as its paper says."""
    item, logits = block.spec, x @ block.gate.weight.T
    powers = logits.exp()
    scores = powers / powers.sum(-1, keepdim=True) if item.router == "softmax" else powers / (1 + powers)
    choice = scores if block.balance_bias is None else scores + block.balance_bias
    index = choice.sort(-1, descending=True).indices[:, : item.top_k]
    weights = scores.gather(1, index)
    if item.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    y = naive_moe(x, index, weights, block.experts.gate_up_proj, block.experts.down_proj, item)
    if block.shared is not None:
        extra = block.shared(x)[0]
        y = y + (extra if block.shared_gate is None else extra / (1 + (-(x @ block.shared_gate.weight.T)).exp()))
    return y, logits, scores, index


@pytest.mark.parametrize("tokens", [1, 2, 19])
@pytest.mark.parametrize("kind", SPECS)
def test_moe_is_its_definition(kind: str, tokens: int) -> None:
    block = _block(kind)
    x = torch.randn(1, tokens, 16, dtype=torch.float64, requires_grad=True)
    found, penalty = block(x)
    y, logits, scores, index = _by_hand(block, x[0])
    torch.testing.assert_close(found, y[None])
    wanted = block.spec.z_weight * logits.exp().sum(-1).log().square().mean()
    if block.spec.balance == "loss":
        for expert in range(block.spec.experts):
            share = (index == expert).sum() / index.numel()
            part = (scores[:, expert] / scores.sum(-1)).mean()
            wanted = wanted + block.spec.balance_weight * block.spec.experts * share * part
    torch.testing.assert_close(penalty, wanted)
    weight = torch.randn_like(found)
    places = [x, *block.parameters()]
    mine = torch.autograd.grad((found * weight).sum() + penalty, places, materialize_grads=True)
    theirs = torch.autograd.grad((y[None] * weight).sum() + wanted, places, materialize_grads=True)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_token_is_dropped_when_all_want_one_expert() -> None:
    block = _block("olmoe").eval()
    with torch.no_grad():
        block.gate.weight.mul_(0.1)
        block.gate.weight[3] = 1.0
    x = torch.randn(1, 40, 16, dtype=torch.float64).abs()
    expected, _, _, index = _by_hand(block, x[0])
    assert (index[:, 0] == 3).all()
    torch.testing.assert_close(block(x)[0], expected[None])


def test_a_penalty_is_for_training_alone() -> None:
    assert _block("olmoe").eval()(torch.zeros(1, 2, 16, dtype=torch.float64))[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_routes_in_float32(dtype: torch.dtype) -> None:
    """As under autocast, or with weights of that dtype: the same tokens to the same experts, nearly the same values."""
    block = _block("olmoe").float()
    x = torch.randn(1, 30, 16).to(dtype)
    with torch.no_grad():
        block.gate.weight.copy_(block.gate.weight.to(dtype))  # a choice between near ties is not what is asked
    wanted, penalty = block(x.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        under, its = block(x.float())
    torch.testing.assert_close(under.float(), wanted, rtol=0.03, atol=0.03)
    torch.testing.assert_close(its, penalty)
    low = copy.deepcopy(block).to(dtype)(x)[0]
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), wanted, rtol=0.03, atol=0.03)


def test_many_tokens_in_bf16_have_the_gradients_of_float32() -> None:
    """Where runs of an expert are filled up; one expert is chosen by no token."""
    block = _block("olmoe").float()
    with torch.no_grad():
        block.gate.weight[:, 0] = torch.tensor([0.0, 0.0, -100.0, 0.0, 0.0])
    x = torch.randn(1, 400, 16)
    x[..., 0] = 1.0
    weight = torch.randn_like(x)
    places = [x.requires_grad_(), *block.experts.parameters()]
    wanted = torch.autograd.grad((block(x)[0] * weight).sum(), places)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)[0]
    found = torch.autograd.grad((y.float() * weight).sum(), places)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
    assert not found[1][2].any()


@pytest.mark.parametrize("kind", SPECS)
def test_counts_of_work_and_of_idle_weights(kind: str) -> None:
    block, item = _block(kind), SPECS[kind]
    expert = 3 * 16 * (item.hidden or 0)
    assert block.idle() == (item.experts - item.top_k) * expert
    shared = 3 * 16 * item.shared + (16 if item.shared_gate else 0)
    assert block.flops() == 2 * (item.experts * 16 + item.top_k * expert + shared)


def test_layers_without_experts_are_as_wide_as_a_token_uses() -> None:
    item = MoeSpec(experts=4, top_k=2, shared=8, every=2, activation="relu2")
    blocks = [moe_or_mlp(item, Shape(16, 1e-6, layer=layer)) for layer in range(4)]
    assert [type(block) for block in blocks] == [Mlp, Moe, Mlp, Moe]
    dense, sparse = blocks[0], blocks[1]
    assert isinstance(dense, Mlp)
    assert isinstance(sparse, Moe)
    assert dense.down_proj.weight.shape == (16, 2 * 24 + 8)
    assert dense.activation is sparse.experts.act_fn is ACTIVATIONS["relu2"]
    assert dense.flops() == sparse.flops() - 2 * 4 * 16  # the router


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlps_are_their_definitions(activation: Any, gated: bool) -> None:
    block = Mlp(MlpSpec(hidden=8, activation=activation, gated=gated), Shape(16, 1e-6)).double()
    block.start(0.3, 0.3)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    up = x @ block.up_proj.weight.T
    inner = up if block.gate_proj is None else x @ block.gate_proj.weight.T
    curve = torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))
    inner = {"silu": inner * inner.sigmoid(), "relu2": inner.clamp(min=0) ** 2,
             "gelu_tanh": inner / 2 * (1 + curve)}[activation]  # fmt: skip
    torch.testing.assert_close(block(x)[0], (inner * up if gated else inner) @ block.down_proj.weight.T)
    assert block.flops() == 2 * 16 * 8 * (3 if gated else 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"experts": 2, "top_k": 3}, "ffn: top_k 3 is more than the 2 experts."),
        ({"shared_gate": True}, "ffn: shared_gate needs a shared expert; set shared."),
    ],
)
def test_a_wrong_moe_is_refused_in_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.SpecError, match=words):
        spec.parse(ModelSpec, {"ffn": {"kind": "moe", **values}}, "r.toml")


# --- balance ---------------------------------------------------------------------------------------------------------


def _skewed(balance: Any) -> tuple[Moe, Tensor]:
    torch.manual_seed(0)
    block = Moe(MoeSpec(experts=4, top_k=1, hidden=8, balance=balance, balance_weight=0.05), Shape(16, 1e-6))
    block.start(0.1, 0.1)
    with torch.no_grad():
        block.gate.weight[2] += 0.2  # with inputs of mean 1 most tokens go there
    return block, torch.randn(8, 32, 16) + 1


def _busiest(block: Moe, x: Tensor) -> float:
    scores = block.route(x.flatten(0, 1))[1]
    choice = scores if block.balance_bias is None else scores + block.balance_bias
    return float(choice.argmax(-1).bincount(minlength=4).max() / choice.shape[0])


def test_the_loss_brings_the_experts_into_use() -> None:
    block, x = _skewed("loss")
    assert _busiest(block, x) > 0.9
    optimizer = torch.optim.Adam([block.gate.weight], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        block(x)[1].backward()
        optimizer.step()
    assert _busiest(block, x) < 0.4


def test_the_bias_brings_the_experts_into_use_and_changes_no_weight() -> None:
    block, x = _skewed("bias")
    assert _busiest(block, x) > 0.9
    before = {name: p.clone() for name, p in block.named_parameters()}
    for _ in range(40):
        block(x[:4])  # in two parts, as a step of several micro-batches
        block(x[4:])
        block.after_step()
    assert _busiest(block, x) < 0.4
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    kept = block.balance_bias.clone() if block.balance_bias is not None else None
    block.eval()(x)
    block.after_step()  # nothing was counted
    assert torch.equal(block.balance_bias, kept)


# --- training --------------------------------------------------------------------------------------------------------


def test_muon_on_a_stack_is_muon_on_each_slice() -> None:
    torch.manual_seed(0)
    for shape in ((3, 24, 8), (2, 8, 24), (1, 8, 8)):
        stack = nn.Parameter(torch.randn(shape))
        slices = [nn.Parameter(part.clone()) for part in stack.detach()]
        mine = StackedMuon([stack], lr=0.02, weight_decay=0.1)
        theirs = torch.optim.Muon(slices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(4):
            stack.grad = torch.randn(shape)
            for part, grad in zip(slices, stack.grad, strict=True):
                part.grad = grad.clone()
            mine.step()
            theirs.step()
        torch.testing.assert_close(stack, torch.stack(list(slices)))


def test_what_muon_takes() -> None:
    model = build(ModelSpec(layers=1, width=16, vocabulary=50, ffn=MoeSpec()))
    item = TrainSpec(data=[], out="")
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for group in made.param_groups for p in group["params"]} for made in optimizers(model, item)]
    assert found[1] == {"model.layers.0.ffn.experts.gate_up_proj", "model.layers.0.ffn.experts.down_proj"}
    assert "model.layers.0.ffn.gate.weight" in found[2]
    assert sum(map(len, found)) == len(names)


MODEL = {"layers": 2, "width": 32, "context": 64, "mixers": {"A": {"heads": 4, "kv_heads": 2}},
         "ffn": {"kind": "moe", "experts": 4, "hidden": 16, "router": "sigmoid", "balance": "bias"}}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(text, "utf-8")
    return tmp_path


def _train(out: str, **changes: Any) -> list[float]:
    """Losses of a short run, killed in the middle of step 7 when `kill`."""
    kill = changes.pop("kill", False)
    item = {"data": ["my.txt"], "out": out, "tokenizer": "bpe:300", "length": 32, "batch_tokens": 256, "steps": 12,
            "lr": 0.01, "warmup": 3, "validation": 0.0, "checkpoint_every": 4, "precision": "fp32", "threads": 1}
    model = changes.pop("model", MODEL)
    recipe = spec.parse(Recipe, {"train": item | changes, "model": model}, "r.toml")
    losses: list[float] = []
    take = Loop.take_step

    def noted(self: Loop) -> tuple[float, int]:
        done = take(self)
        if kill and self.step == 7:
            raise KeyboardInterrupt
        losses.append(done[0])
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "take_step", noted)
        train(recipe)
    return losses


def test_a_killed_run_goes_on_to_the_bit(home: Path) -> None:
    wanted = _train("whole")
    (home / "runs").rename(home / "kept")
    with pytest.raises(KeyboardInterrupt):
        _train("again", kill=True)
    assert _train("again") == wanted[4:]
    assert (home / "again/model.safetensors").read_bytes() == (home / "whole/model.safetensors").read_bytes()
    model = folder.load("again").model
    biases = [layer.ffn.balance_bias for layer in model.model.layers]
    assert all(bias.abs().max() >= 0.01 for bias in biases)


def test_a_step_is_the_same_in_one_part_or_in_several(home: Path) -> None:
    whole = _train("whole", micro_rows=8, steps=1)  # after more, rounding has sent some token elsewhere
    parts = _train("parts", micro_rows=3, steps=1)
    assert parts == pytest.approx(whole, abs=1e-5)
    biases = [folder.load(name).model.model.layers[1].ffn.balance_bias for name in ("whole", "parts")]
    assert torch.equal(*biases)


def test_a_stock_model_of_experts_is_trained_on(home: Path) -> None:
    attention = {"A": {"heads": 4, "kv_heads": 2, "qk_norm": "all"}}
    ffn = {"kind": "moe", "experts": 4, "hidden": 16}
    losses = _train("stock", model=MODEL | {"mixers": attention, "ffn": ffn})
    assert folder.load("stock").model.config.model_type == "olmoe"
    more = _train("more", init="stock", lr=0.002)
    assert more[0] < losses[0] - 0.5
    assert sum(more[-3:]) < sum(losses[-3:])
