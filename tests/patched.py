"""What the tests of models of patches share: tiny ones of every rule, and texts for them."""

from typing import Any

import torch
from hypothesis import Phase, settings
from torch import Tensor, nn

from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.patches.boundaries import EntropySpec, SpaceSpec, StaticSpec
from shrew.blocks.patches.learned import LearnedSpec
from shrew.blocks.specs import LocalSpec, PatchesSpec
from shrew.blocks.window import WindowSpec

END = 256
FEW = settings(max_examples=5, phases=(Phase.explicit, Phase.generate))  # nothing is shrunk
SMALL = MlpSpec(hidden=24)
NEAR = LocalSpec(layers=1, mixers={"A": WindowSpec(heads=2, window=7)}, ffn=SMALL)
MIXED = LocalSpec(layers=2, pattern="CA", mixers={"C": ConvSpec(), "A": WindowSpec(heads=2, window=5)}, ffn=SMALL)
PLAIN = AttentionSpec(heads=2)
GRAMS = NgramSpec(sizes=(2, 3), rows=64)
ORACLE = ModelSpec(layers=1, width=8, mixers={"A": WindowSpec(heads=2, window=6)}, ffn=MlpSpec(hidden=8))
ORACLES = ModelSpec(layers=1, width=8, tied=False, mixers={"A": ConvSpec()}, ngrams=NgramSpec(sizes=(2,), rows=9))


def shapes(vocabulary: int, nats: float) -> dict[str, ModelSpec]:
    """A model of each rule, with mixers of every kind; `nats` stands among the entropies of those that have some."""

    def one(front: dict[str, Any], **more: Any) -> ModelSpec:
        near = PatchesSpec(**{"width": 16, "encoder": NEAR, "decoder": NEAR, "heads": 2, **front})
        base = {"layers": 2, "width": 32, "mixers": {"A": PLAIN}, "ffn": MlpSpec(hidden=32)}
        return ModelSpec(**{**base, "vocabulary": vocabulary, "context": 128, "front": near, **more})

    rise = EntropySpec(rule="combined", threshold=nats, rise=0.1, reset=True, longest=8)
    mixed = {"A": PLAIN, "L": LinearSpec(heads=2, state=4, chunk=4)}
    return {
        "static": one({"rule": StaticSpec(size=4)}, width=48),
        "space": one({"rule": SpaceSpec(longest=9), "decoder": MIXED}, ngrams=GRAMS),
        "first": one({"decoder": MIXED, "every": False, "queries": 1, "residual": 2.0}, pattern="LA", mixers=mixed),
        "entropy": one({"rule": EntropySpec(threshold=nats), "entropy": ORACLE}, tied=False,
                       mixers={"A": WindowSpec(heads=2, window=3)}),
        "rise": one({"rule": rise, "entropy": ORACLES}, mixers={"A": DeltaSpec(heads=2, key_width=4, chunk=4)}),
        "learned": one({"rule": LearnedSpec(mean=3.0, longest=7)},
                       ffn=MoeSpec(experts=3, top_k=1, hidden=16, every=1)),
        "free": one({"rule": LearnedSpec()}, layers=1, loops=2, mixers={"A": MemorySpec(heads=2, segment=3)}),
    }  # fmt: skip


SHAPES = shapes(257, nats=5.05)


def patched(name: str, spec: ModelSpec | None = None) -> ShrewForCausalLM:
    torch.manual_seed(0)
    model = build(spec or SHAPES[name], bos_token_id=END, eos_token_id=END, pad_token_id=END).eval()
    for p in model.parameters():  # as initialised, logits hardly depend on the text
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.double()


def sentences(rows: int, length: int, seed: int = 0) -> Tensor:
    """Bytes of which every rule makes patches of several sizes."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.tensor([*b"abcdefghijklmnopqrst  \n.\xc3\xa9", END])
    return letters[torch.randint(len(letters), (rows, length), generator=draw)]
