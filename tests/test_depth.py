"""Shared layers, early exits, layer skip, mixture-of-depths, zero starts, soft caps, and losses in chunks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shrew import errors, objectives, spec
from shrew.blocks import model as model_file
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec, Router, drop_rates, naive_route, skip_rows
from shrew.blocks.layers import Place
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.train import flops_per_token

SHAPE = ModelSpec(layers=4, width=32, vocabulary=97, context=64, mixers={"A": AttentionSpec(heads=4)},
                  ffn=MlpSpec(hidden=48))  # fmt: skip
EXITS = ExitSpec(every=1, weight=0.5)


def _model(std: float = 0.3, **changes: Any) -> ShrewForCausalLM:
    torch.manual_seed(0)
    model = build(replace(SHAPE, **changes), bos_token_id=1, eos_token_id=2, pad_token_id=0).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=std) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.double()


def _tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def _grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- shared layers ---------------------------------------------------------------------------------------------------


def test_loops_are_the_layers_written_out() -> None:
    looped, long = _model(layers=2, loops=3), _model(layers=6)
    weights = looped.state_dict()
    written = {name: weights[name] for name in weights if ".layers." not in name}
    for number in range(6):
        mine = f".layers.{number % 2}."
        written |= {name.replace(mine, f".layers.{number}."): weights[name] for name in weights if mine in name}
    long.load_state_dict(written)
    tokens = _tokens(2, 9)
    torch.testing.assert_close(looped(tokens).logits, long(tokens).logits)
    assert looped.flops(8) == long.flops(8)
    assert looped.state_bytes(8) == long.state_bytes(8)
    assert len(looped.model.new_cache().layers) == 6
    grads = _grads(looped, looped(tokens).logits.square().sum())
    theirs = _grads(long, long(tokens).logits.square().sum())
    for name, grad in grads.items():  # each pass adds its part
        parts = [name]
        if ".layers." in name:
            first = int(name.split(".")[2])
            parts = [name.replace(f".layers.{first}.", f".layers.{number}.") for number in range(first, 6, 2)]
        torch.testing.assert_close(grad, torch.stack([theirs[part] for part in parts]).sum(0))


def test_residual_outputs_start_by_the_depth_that_is_run() -> None:
    one, three = (build(replace(SHAPE, width=128, loops=loops)) for loops in (1, 3))
    stds = [float(model.model.layers[0].mixer.o_proj.weight.detach().std()) for model in (one, three)]
    assert stds[0] / stds[1] == pytest.approx(3**0.5, rel=0.05)


# --- early exits: training -------------------------------------------------------------------------------------------


def _exit_logits(model: ShrewForCausalLM, tokens: Tensor) -> list[Tensor]:
    """The definition: the model cut off after each number of layers."""
    found = []
    for number in model.model.exits:
        x = model.model.embed_tokens(tokens)
        place = Place(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
        for step in range(number):
            x, _ = model.model.layers[step % model.spec.layers](x, place)
        found.append(model.logits(model.model.exit_norms[model.model.exits.index(number)](x)))
    return found


@pytest.mark.parametrize("loops", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_training_loss_holds_the_exits(every: int, loops: int) -> None:
    model = _model(exits=ExitSpec(every=every, weight=0.5), loops=loops)
    assert model.model.exits == list(range(every, 4 * loops, every))
    tokens, targets = _tokens(2, 9), _tokens(2, 9, seed=1)
    targets[0, :3] = objectives.IGNORE
    loss, added = model.train().losses(tokens, targets)
    early = [objectives.next_token(logits, targets) for logits in _exit_logits(model, tokens)]
    torch.testing.assert_close(loss, objectives.next_token(model(tokens).logits, targets))
    assert added is not None
    torch.testing.assert_close(added, 0.5 * torch.stack(early).mean())
    assert model.eval().losses(tokens, targets)[1] is None
    # and as transformers asks for it: shifted labels, the mean
    counted = targets.clone()
    counted[:, -1] = objectives.IGNORE
    loss, added = model.train().losses(tokens, counted)
    shifted = torch.cat([tokens[:, :1], targets[:, :-1]], 1)
    torch.testing.assert_close(model(tokens, labels=shifted).loss, (loss + added) / (counted != -100).sum())


def test_exits_count_in_training_alone() -> None:
    model, plain = _model(exits=EXITS), _model()
    tokens = _tokens(1, 16)
    assert model.flops(8) == plain.flops(8)
    assert flops_per_token(model, 16) == flops_per_token(plain, 16) + 3 * 3 * 2 * 32 * 97
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train().losses(tokens, tokens)
    assert counter.get_total_flops() == pytest.approx(16 * model.flops(16, training=True), rel=0.02)


# --- layer skip ------------------------------------------------------------------------------------------------------


def test_drop_rates_grow_with_depth() -> None:
    rates = drop_rates(0.4, 5)
    assert rates == pytest.approx([0.4 * (2 ** (i / 4) - 1) for i in range(5)])
    assert (rates[0], rates[-1], drop_rates(0.4, 1), drop_rates(0.0, 3)) == (0.0, 0.4, [0.0], [0.0] * 3)


def test_rows_are_skipped_whole_at_their_rate() -> None:
    torch.manual_seed(0)
    before, after = torch.zeros(4000, 2, 3), torch.ones(4000, 2, 3)
    found = skip_rows(after, before, 0.3)
    assert set(found.mean((1, 2)).tolist()) == {0.0, 1.0}
    assert float(1 - found.mean()) == pytest.approx(0.3, abs=0.03)


def test_layer_skip_is_seeded_and_for_training_alone() -> None:
    model, plain = (_model(exits=replace(EXITS, layer_skip=rate)) for rate in (0.9, 0.0))
    tokens = _tokens(8, 9)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.train().losses(tokens, tokens)[0].item())
    assert found[0] == found[1] != found[2]
    model.train()
    torch.manual_seed(0)
    grads = _grads(model, torch.stack(list(model.losses(tokens[:1], tokens[:1]))).sum())
    assert grads.keys() == dict(model.named_parameters()).keys()  # also of layers that no row went through


# --- early exits: decoding -------------------------------------------------------------------------------------------


def _generate(model: ShrewForCausalLM, tokens: Tensor, **options: Any) -> list[list[int]]:
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12,
                          eos_token_id=None, **options)  # fmt: skip
    return made[:, tokens.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2])
def test_without_a_threshold_it_is_the_full_model(loops: int) -> None:
    model, tokens = _model(exits=EXITS, loops=loops), _tokens(2, 6)
    wanted = _generate(model, tokens)
    assert model.exit_counts == {}
    assert _generate(model, tokens, exit_threshold=1.0) == wanted
    assert _generate(model, tokens, use_cache=False, exit_threshold=0.0) == wanted  # no decoding, no exits


def naive_decode(model: ShrewForCausalLM, tokens: Tensor, threshold: float, count: int) -> tuple[list[int], list[int]]:
    """The definition, for one row: every token again each time, with what each layer was given when it was new."""
    norms, exits, layers = model.model.exit_norms, model.model.exits, list(model.model.layers)
    ids, depths, start = tokens[0].tolist(), [], tokens.shape[1]
    given: list[list[Tensor]] = [[] for _ in layers]  # the inputs of each layer, position by position
    for t in range(start + count - 1):
        x, left = model.model.embed_tokens(torch.tensor([[ids[t]]])), None
        for number, layer in enumerate(layers):
            given[number].append(x)
            past = torch.cat(given[number], 1)
            positions = torch.arange(t + 1)[None]
            place = Place(positions, positions)
            if left is None:
                x = x + layer.mixer(layer.mixer_norm(past), place)[:, -1:]
                x = x + layer.ffn(layer.ffn_norm(x))[0]
                if number + 1 in exits and t >= start:
                    logits = model.logits(norms[exits.index(number + 1)](x))
                    if float(logits.softmax(-1).max()) >= threshold:
                        left = logits
                        depths.append(number + 1)
        logits = model.logits(model.model.norm(x)) if left is None else left
        if t >= start and left is None:
            depths.append(len(layers))
        if t >= start - 1:
            ids.append(int(logits[0, -1].argmax()))
    return ids[start:], depths


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9])
def test_leaving_early_is_its_definition(threshold: float) -> None:
    model = _model(0.4, exits=EXITS)
    for seed in range(3):
        tokens = _tokens(1, 6, seed)
        wanted, depths = naive_decode(model, tokens, threshold, 12)
        assert _generate(model, tokens, exit_threshold=threshold) == [wanted]
        assert sorted(model.exit_counts.elements()) == sorted(depths)  # the first token comes from reading the prompt
    if threshold == 0.2:
        assert len(set(depths)) > 1


@torch.no_grad()
def test_all_rows_leave_together_and_the_config_may_say_when() -> None:
    model, tokens = _model(exits=EXITS), _tokens(3, 6)
    model.config.exit_threshold = 0.0
    _generate(model, tokens)
    assert model.exit_counts == {1: 33}
    cache = model(tokens, use_cache=True).past_key_values
    model(tokens[:, :1], past_key_values=cache, use_cache=True)
    assert [layer.get_seq_length() for layer in cache.layers] == [7] * 4
    model.config.exit_threshold = None
    with pytest.raises(errors.UsageError, match="no early exits"):
        _generate(_model(), tokens, exit_threshold=0.5)
    for threshold in (-0.1, 2.0, float("nan")):
        with pytest.raises(errors.UsageError, match="is no confidence"):
            _generate(model, tokens, exit_threshold=threshold)
    with pytest.raises(errors.UsageError, match="no token to go on from"):
        model(tokens[:, :0])


@torch.no_grad()
def test_leaving_early_saves_the_feed_forward_layers() -> None:
    model, tokens = _model(exits=ExitSpec(every=2)), _tokens(1, 6)
    counts = []
    for threshold in (None, 0.0):
        cache = model(tokens, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens[:, :1], past_key_values=cache, use_cache=True, exit_threshold=threshold)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * model.model.layers[0].ffn.flops()


# --- mixture-of-depths -----------------------------------------------------------------------------------------------


def _router(share: float = 0.5, width: int = 16) -> Router:
    torch.manual_seed(0)
    router = Router(MixtureOfDepthsSpec(share=share, weight=2.0), width).double()
    router.start(0.3, 0.0)
    return router


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("length", [1, 3, 33])
def test_routing_is_its_definition(share: float, length: int) -> None:
    router, feed = _router(share), nn.Linear(16, 16).double()
    x = torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True)

    def feeding(x: Tensor) -> tuple[Tensor, None]:
        return feed(x), None

    found, penalty = router(x, feeding)
    wanted = naive_route(router, x, feeding)
    torch.testing.assert_close(found, wanted)
    passed = float((router.score(x) > 0).double().mean())
    assert penalty is not None
    assert penalty.item() == pytest.approx(2.0 * (passed - share) ** 2, rel=1e-4)
    if wanted.requires_grad:
        places, weight = [x, *router.parameters(), *feed.parameters()], torch.randn_like(found)
        mine = torch.autograd.grad((found * weight).sum(), places, materialize_grads=True)
        theirs = torch.autograd.grad((wanted * weight).sum(), places, materialize_grads=True)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_what_is_not_routed_costs_nothing_and_none_may_be() -> None:
    router, fed = _router(), []

    def feeding(x: Tensor) -> tuple[Tensor, Tensor]:
        fed.append(x.shape)
        return x, x.sum() * 0 + 3.0

    x = torch.randn(2, 50, 16, dtype=torch.float64)
    _, penalty = router(x, feeding)
    routed = int((router.score(x) > 0).sum())
    assert fed == [(1, routed, 16)]
    assert penalty.item() == pytest.approx(3.0 + 2.0 * (routed / 100 - 0.5) ** 2)
    nn.init.constant_(router.score.bias, -1e3)
    y, penalty = router.train()(x.requires_grad_(), feeding)
    assert y.count_nonzero() == 0
    assert penalty.item() == pytest.approx(3.0 + 2.0 * 0.25)
    (y.sum() + penalty).backward()
    assert all(p.grad is not None for p in router.parameters())
    fed.clear()
    y, penalty = router.eval()(x, feeding)
    assert (y.count_nonzero(), penalty, fed) == (0, None, [])


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_penalty_drives_the_share(share: float) -> None:
    router = _router(0.5)
    router.spec = replace(router.spec, share=share)
    x, optimizer = torch.randn(4, 200, 16, dtype=torch.float64), torch.optim.AdamW(router.parameters(), lr=0.02)
    for _ in range(150):
        router(x, lambda z: (z, None))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((router.score(x) > 0).double().mean()) == pytest.approx(share, abs=0.03)


def test_the_wanted_share_is_routed_from_the_start() -> None:
    for share in (0.15, 0.5, 0.8):
        torch.manual_seed(0)
        model = build(replace(SHAPE, width=128, mixture_of_depths=MixtureOfDepthsSpec(every=2, share=share)))
        routed = [layer.router is not None for layer in model.model.layers]
        assert routed == [False, True, False, True]
        router = model.model.layers[1].router
        x = torch.randn(4000, 128)
        assert float((router.score(x) > 0).float().mean()) == pytest.approx(share, abs=0.1)


@torch.no_grad()
def test_flops_at_the_share_that_passes() -> None:
    model, tokens = _model(mixture_of_depths=MixtureOfDepthsSpec(every=2, share=0.4)), _tokens(1, 32)
    plain, ffn = _model(), model.model.layers[0].ffn.flops()
    assert model.flops(16) == plain.flops(16) + 2 * (2 * 32 + round(0.4 * ffn) - ffn)
    asked: list[tuple[Any, Tensor]] = []
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.register_forward_pre_hook(lambda router, given: asked.append((router, given[0])))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    passed = [float((router.score(x) > 0).double().mean()) for router, x in asked]
    assert 0 < min(passed) <= max(passed) < 1
    expected = 32 * (plain.flops(32) + 2 * 2 * 32 - ffn * (2 - sum(passed)))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.001)


# --- losses in chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 7, 18, 19])
def test_a_loss_in_chunks_is_the_loss(chunk: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    hidden, targets = torch.randn(2, 9, 8, requires_grad=True), torch.randint(50, (2, 9))
    targets[1, 2:6] = objectives.IGNORE
    found = objectives.chunked_next_token(hidden, head, targets, chunk)
    wanted = objectives.next_token(head(hidden), targets)
    torch.testing.assert_close(found, wanted)
    places = [hidden, *head.parameters()]
    for one, other in zip(torch.autograd.grad(found, places), torch.autograd.grad(wanted, places), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_logits_than_a_chunk_are_held(monkeypatch: pytest.MonkeyPatch, autocast: bool) -> None:
    model, tokens = _model(exits=EXITS).float().train(), _tokens(2, 20)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, added = model.losses(tokens, tokens)
        assert added is not None
        return loss, _grads(model, loss + added)

    wanted = run()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, x, y: sizes.append(y.numel()))
    monkeypatch.setattr(model_file.objectives, "AT_ONCE", 97 * 7)
    found, near = run(), 0.1 if autocast else 1e-4
    assert max(sizes) == 97 * 7
    torch.testing.assert_close(found[0], wanted[0])
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=near, atol=near / 10)
    # transformers' way: the loss of all positions, the logits of the last
    model.eval()
    whole = model(tokens, labels=tokens)
    sizes.clear()
    last = model(tokens, labels=tokens, logits_to_keep=1)
    assert max(sizes) == 97 * 7
    torch.testing.assert_close(last.loss, whole.loss)
    torch.testing.assert_close(last.logits, whole.logits[:, -1:])


# --- levers of small models ------------------------------------------------------------------------------------------


def test_with_zero_init_a_new_model_is_its_embedding() -> None:
    torch.manual_seed(0)
    model = build(replace(SHAPE, zero_init=True, mixture_of_depths=MixtureOfDepthsSpec(), loops=2)).eval()
    tokens = _tokens(2, 9)
    torch.testing.assert_close(model(tokens).logits, model.logits(model.model.norm(model.model.embed_tokens(tokens))))
    assert not torch.allclose(build(SHAPE)(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_soft_cap_bounds_the_logits() -> None:
    model, tokens = _model(), _tokens(2, 9)
    capped = _model(softcap=2.0)
    raw, found = model(tokens).logits, capped(tokens).logits
    assert float(raw.abs().max()) > 2
    torch.testing.assert_close(found, 2 * torch.tanh(raw / 2))
    assert float(found.abs().max()) <= 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": 4, "exits": {"every": 4}}, ["exits", "every 4", "4 layers"]),
        ({"layers": 4, "mixture_of_depths": {"every": 5}}, ["mixture_of_depths", "every 5", "4 layers"]),
        ({"exits": {"layer_skip": 1.0}}, ["exits.layer_skip", "< 1"]),
        ({"mixture_of_depths": {"share": 0.0}}, ["mixture_of_depths.share", "> 0"]),
        ({"loops": 0}, ["loops", ">= 1"]),
        ({"exits": {"evry": 2}}, ["'evry'", "did you mean 'every'"]),
    ],
)
def test_wrong_settings_are_refused_in_words(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(errors.SpecError) as caught:
        spec.parse(ModelSpec, values, "r.toml")
    assert all(word in str(caught.value) for word in words), str(caught.value)
