"""Layers and channels cut out of our own type and out of the stock hybrids: right, or refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from stocks import hybrids
from test_structure import answers, check_folder, kill_channels
from torch import nn
from transformers import AutoModelForCausalLM

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.mlp import MlpSpec, NothingSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.window import WindowSpec
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import find_layers, read_anatomy
from shrew.moves.context import Context
from shrew.moves.drop_layers import DropLayers, bypassed, droppable, layer_scores
from shrew.moves.experts import PruneExperts
from shrew.moves.narrow import Narrow
from shrew.moves.upcycle import Upcycle

A, W, C, D = AttentionSpec(heads=2), WindowSpec(heads=2, window=5), ConvSpec(), DeltaSpec(heads=2, key_width=8)
L, M = LinearSpec(heads=2, state=8), MemorySpec(heads=2, segment=8)
MIXED = {"pattern": "DWLAC", "layers": 5, "mixers": {"A": A, "W": W, "C": C, "D": D, "L": L}, "ffn": MlpSpec(hidden=64)}
OWN: dict[str, dict[str, Any]] = {
    "mixed": MIXED,
    "memory": {"pattern": "LML", "layers": 4, "mixers": {"M": M, "L": L}, "ngrams": NgramSpec(rows=50)},
    "experts": {"pattern": "LA", "layers": 4, "mixers": {"L": L, "A": A},
                "ffn": MoeSpec(experts=3, hidden=16, shared=16, balance="bias")},
    "looped": {"pattern": "WC", "layers": 3, "loops": 2, "mixers": {"W": W, "C": C}, "ffn": MlpSpec(gated=False)},
    "every": {"pattern": "CA", "layers": 5, "mixers": {"A": A, "C": C},
              "ffn": MoeSpec(experts=3, hidden=16, shared=16, every=2)},
}  # fmt: skip
BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
        "max_position_embeddings": 64}  # fmt: skip
STOCK = hybrids(BASE)
KINDS = [*OWN, *(f"stock {kind}" for kind in STOCK)]


def own(**settings: Any) -> Loaded:
    torch.manual_seed(1)
    model = build(ModelSpec(**{"width": 32, "vocabulary": 64, "context": 64, **settings}),
                  pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return _random(model)


def make(kind: str) -> Loaded:
    if kind in OWN:
        return own(**OWN[kind])
    torch.manual_seed(1)
    name, settings = STOCK[kind.removeprefix("stock ")]
    return _random(AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)))


def _random(model: Any) -> Loaded:
    for name, weight in model.state_dict().items():
        if name.endswith("balance_bias"):
            weight.uniform_(-0.1, 0.1)
        elif weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return Loaded(model.eval(), None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_a_dropped_layer_is_as_if_skipped_or_refused(
    kind: str, which: tuple[int, ...], context: Context, tmp_path: Path
) -> None:
    loaded = make(kind)
    with bypassed(find_layers(loaded.model)[1], frozenset(which)):
        expected = answers(loaded.model)
    try:
        smaller = DropLayers(layers=which).apply(loaded, context)
    except UnsupportedError as error:
        experts = kind == "every" and len(which) == 1  # they are on each second layer
        alone = 1 in which and kind in ("stock lfm2", "stock qwen3_next", "stock granitemoehybrid")
        assert ("leave this part whole" if experts else "no attention layer would be left") in str(error)
        assert experts or alone
        return
    assert torch.equal(answers(smaller.model), expected)
    check_folder(smaller, tmp_path / "model")
    if kind in OWN:
        item = smaller.model.spec
        old = loaded.model.spec
        left = [place for place in range(old.layers) if place not in which]
        assert [item.mixer(place) for place in range(item.layers)] == [old.mixer(place) for place in left]
        assert smaller.model.config.num_hidden_layers == item.layers == len(left)
        assert set(item.mixers) <= set(item.pattern)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_of_least_effect_goes(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    for measure in ("kl", "influence"):
        assert min(layer_scores(loaded, context, measure)) >= 0  # type: ignore[arg-type]
    smaller = DropLayers(count=1).apply(loaded, context)
    assert len(find_layers(smaller.model)[1]) == len(find_layers(loaded.model)[1]) - 1
    check_folder(smaller, tmp_path / "model")


def test_only_the_last_layer_can_go_where_each_second_has_experts() -> None:
    model = make("every").model
    assert droppable(model, set()) == [4]
    assert droppable(model, {4}) == [3]


def test_what_cannot_lose_layers(context: Context) -> None:
    mixers = {"A": A, "C": C}
    with pytest.raises(UnsupportedError, match="early exits stand after a number of layers"):
        DropLayers(count=1).apply(own(pattern="AC", layers=4, mixers=mixers, exits=ExitSpec(every=2)), context)
    routed = own(pattern="AC", layers=4, mixers=mixers, mixture_of_depths=MixtureOfDepthsSpec(every=2))
    with pytest.raises(UnsupportedError, match="leave this part whole"):
        DropLayers(layers=(0,)).apply(routed, context)
    with pytest.raises(UnsupportedError, match="every 2 routes none of 1 layers; leave more of its layers"):
        DropLayers(layers=(0, 1, 2)).apply(routed, context)


CUT = {"mixed", "memory", "experts", "looped", "every", "stock lfm2", "stock qwen3_next", "stock gemma3", "stock olmoe"}


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_are_the_ones_cut_or_none(kind: str, context: Context, tmp_path: Path) -> None:
    loaded = make(kind)
    if kind not in CUT:
        with pytest.raises(UnsupportedError, match="no MLP whose width its config states"):
            Narrow(mlp=0.5, multiple=8).apply(loaded, context)
        return
    anatomy = read_anatomy(loaded.model)
    for mlp in anatomy.mlps:
        kill_channels(loaded, mlp, [(5 * step + mlp.layer) % mlp.width for step in range(mlp.width // 2)])
    expected = answers(loaded.model)
    narrow = Narrow(mlp=0.5, multiple=8).apply(loaded, context)
    torch.testing.assert_close(answers(narrow.model), expected, rtol=1e-4, atol=1e-4)
    assert [part.width * 2 for part in read_anatomy(narrow.model).mlps] == [part.width for part in anatomy.mlps]
    check_folder(narrow, tmp_path / "model")


def test_a_width_that_follows_from_others_stays_when_they_are_cut(context: Context, tmp_path: Path) -> None:
    loaded = own(layers=2, mixers={"A": C}, ffn=MoeSpec(experts=3, hidden=32, dense_hidden=16, every=2))
    ffn = Narrow(mlp=0.5, multiple=16).apply(loaded, context).model.spec.ffn
    assert (ffn.hidden, ffn.dense_hidden) == (16, 16)
    loaded = own(layers=2, mixers={"A": C}, ffn=MoeSpec(experts=3, hidden=16, every=2))  # so a dense layer has 32
    narrow = Narrow(mlp=0.5, multiple=16).apply(loaded, context)
    assert (narrow.model.spec.ffn.hidden, narrow.model.spec.ffn.dense_hidden) == (16, 16)
    check_folder(narrow, tmp_path / "model")


def test_what_cannot_be_narrowed(context: Context) -> None:
    with pytest.raises(UnsupportedError, match="no MLP whose width its config states was found in layer 0"):
        Narrow(mlp=0.5).apply(own(layers=2, mixers={"A": L}, ffn=NothingSpec()), context)
    with pytest.raises(UnsupportedError, match="no attention of a known form in layer 0; leave heads at 1"):
        Narrow(heads=0.5).apply(make("mixed"), context)


def test_experts_go_beside_any_mixer(context: Context, tmp_path: Path) -> None:
    loaded = own(pattern="LDCWM", layers=5, mixers={"L": L, "D": D, "C": C, "W": W, "M": M},
                 ffn=MoeSpec(experts=4, hidden=16, every=2))  # fmt: skip
    smaller = PruneExperts(keep=2).apply(loaded, context)
    assert smaller.model.spec.ffn.experts == 2
    assert smaller.model.spec.mixers == loaded.model.spec.mixers
    check_folder(smaller, tmp_path / "model")


def test_mlps_become_experts_beside_any_mixer(context: Context, tmp_path: Path) -> None:
    loaded = make("mixed")
    made = Upcycle(experts=3, top_k=2).apply(loaded, context)
    assert (made.model.spec.ffn.kind, made.model.spec.mixers) == ("moe", loaded.model.spec.mixers)
    torch.testing.assert_close(answers(made.model), answers(loaded.model), rtol=1e-4, atol=1e-4)
    check_folder(made, tmp_path / "model")
