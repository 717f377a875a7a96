"""`factor`: a projection becomes two of low rank, chosen so that what it gives on calibration text changes least.

With H = E[x xᵀ] = S Sᵀ of the projection's input, the truncated singular value decomposition of W S is the best of its
rank by the output, and the squares of the singular values left out are exactly the power of the error (SVD-LLM). How
many each projection keeps follows from measured damage: the KL that each does alone, for the error that it makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from shrew.blocks.attention import Attention
from shrew.blocks.mlp import Mlp
from shrew.blocks.model import ShrewForCausalLM
from shrew.blocks.stock import adopt
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.moves.anatomy import rebuild, with_settings
from shrew.moves.context import Context
from shrew.moves.importance import damages, damped, moments
from shrew.spec import Meta, doc, dump

SCORE_TOKENS = 2048  # of calibration text
LEAST = 1e-4  # share of an output's power below which the KL that its loss does is noise


@dataclass(frozen=True, kw_only=True)
class Factor:
    """Make projections two factors of low rank, by calibration text; which ranks, by measured damage."""

    name: ClassVar[str] = "factor"
    paper: ClassVar[str] = "Wang et al. 2024, SVD-LLM (arXiv:2403.07378)"

    keep: Annotated[float, Meta(gt=0, lt=1)] = doc("share of the projections' weights to keep, in all", 0.8)
    multiple: Annotated[int, Meta(ge=1)] = doc("ranks are multiples of this", 8)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError for a model that our blocks cannot say, for quantized weights, and where `keep` is
        too little for one rank each."""
        if loaded.is_classifier:
            raise UnsupportedError("factor: only causal language models have a place for two factors.")
        if loaded.packed:
            raise UnsupportedError("factor: the weights are quantized already; put factor before quantize.")
        if loaded.sparse:
            raise UnsupportedError("factor goes before prune: the factors of a pruned matrix have no zeros.")
        ours = adopt(loaded.model)
        parts = projections(ours)
        if not parts:
            raise UnsupportedError("factor: this model has no projection of attention or of a plain MLP to factor.")
        inside = replace(loaded, model=ours)
        seen = moments(inside, context, [f"model.{name}.weight" for name in parts])
        pairs = {name: Pair.of(part.weight.detach(), seen.pop(f"model.{name}.weight")) for name, part in parts.items()}
        weights = self._sensitivities(inside, context, parts, pairs)
        ranks = allocate({name: pair.powers * weights[name] for name, pair in pairs.items()},
                         {name: (part.out_features, part.in_features) for name, part in parts.items()},
                         self.keep, self.multiple)  # fmt: skip
        if not ranks:
            context.say("factor: no rank that saves is small enough; nothing is factored")
            return loaded
        for name, rank in ranks.items():
            context.say(f"factor: {name}: rank {rank}, misses {pairs[name].missed(rank):.2%} of its output's power")
        state = dict(ours.state_dict())
        for name, rank in ranks.items():
            del state[f"model.{name}.weight"]
            state[f"model.{name}.low.weight"], state[f"model.{name}.high.weight"] = pairs[name].factors(rank)
            if (bias := state.pop(f"model.{name}.bias", None)) is not None:
                state[f"model.{name}.high.bias"] = bias
        spec = dump(replace(ours.spec, ranks={**ours.spec.ranks, **ranks}))
        return replace(loaded, model=rebuild(ours, with_settings(ours.config, spec=spec), state), untouched={})

    def _sensitivities(
        self, inside: Loaded, context: Context, parts: dict[str, nn.Linear], pairs: dict[str, "Pair"]
    ) -> dict[str, float]:
        """KL for each unit of error in a projection's output, from each alone at the rank that `keep` gives it."""
        ranks = {name: rank_for(part.weight.shape, self.keep) for name, part in parts.items()}
        path = "layers."
        found = damages(inside, context, [(int(name.removeprefix(path).split(".")[0]) if name.startswith(path) else 0,
                                           partial(_factored_for_now, part, pairs[name], ranks[name]))
                                          for name, part in parts.items()], SCORE_TOKENS)  # fmt: skip
        missed = {name: max(pairs[name].missed(ranks[name]), LEAST) * float(pairs[name].powers.sum()) for name in parts}
        return {name: max(damage, 0.0) / max(missed[name], 1e-30) for name, damage in zip(parts, found, strict=True)}


def projections(ours: ShrewForCausalLM) -> dict[str, nn.Linear]:
    """The linear layers of attention, windows and MLPs that are no factors already, by name inside the trunk."""
    return {f"{path}.{own}": part for path, block in ours.model.named_modules() if isinstance(block, Attention | Mlp)
            for own, part in block.named_children() if isinstance(part, nn.Linear)}  # fmt: skip


def rank_for(shape: tuple[int, ...], keep: float) -> int:
    """The rank at which two factors have this share of a matrix's weights; at least 1."""
    return max(1, int(keep * shape[0] * shape[1] / sum(shape)))


@dataclass(frozen=True)
class Pair:
    """The decomposition of one projection: `high` [out, n] and `low` [n, in], whose first r columns and rows are the
    factors of rank r, and `powers` [n], what leaving each out costs of the output's power."""

    high: Tensor
    low: Tensor
    powers: Tensor

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor) -> "Pair":
        """weight [out, in], moment [in, in]: E[x xᵀ] of the input."""
        root = torch.linalg.cholesky(damped(moment.double()))
        left, values, right = torch.linalg.svd(weight.double().cpu() @ root, full_matrices=False)
        scale = values.sqrt()
        back = torch.linalg.solve_triangular(root, right, upper=False, left=False)  # right @ root^-1
        return cls((left * scale).float(), (scale[:, None] * back).float(), values.square())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(low [rank, in], high [out, rank])."""
        return self.low[:rank].contiguous(), self.high[:, :rank].contiguous()

    def missed(self, rank: int) -> float:
        """The share of the output's power that is left out."""
        return float(self.powers[rank:].sum() / self.powers.sum().clamp(min=1e-30))


def allocate(
    powers: dict[str, Tensor], shapes: dict[str, tuple[int, int]], keep: float, multiple: int
) -> dict[str, int]:
    """The rank of each matrix that is factored, so that all of them together hold at most `keep` of their weights.

    Rank by rank (in steps of `multiple`) goes to the matrix where a weight saves most, which is best as what a rank
    saves only falls. A matrix whose factors would be no smaller than itself stays whole."""
    budget = int(keep * sum(rows * cols for rows, cols in shapes.values()))
    steps = []
    for name, (rows, cols) in shapes.items():
        for low in range(0, len(powers[name]), multiple):
            gain = float(powers[name][low : low + multiple].sum()) / multiple / (rows + cols)
            steps.append((-gain if low else float("-inf"), low, name))  # one step each comes first
    ranks = dict.fromkeys(shapes, 0)
    spent, full = 0, set()
    for _, low, name in sorted(steps):
        rows, cols = shapes[name]
        if name in full or low != ranks[name]:
            continue
        whole = (low + multiple) * (rows + cols) >= rows * cols
        cost = rows * cols - low * (rows + cols) if whole else multiple * (rows + cols)
        if spent + cost > budget:
            if not low:
                raise UnsupportedError(f"factor: keep {keep} leaves less than rank {multiple} for each projection; "
                                       "keep more, or narrow first.")  # fmt: skip
            continue
        spent += cost
        ranks[name] += multiple
        if whole:
            full.add(name)
    return {name: rank for name, rank in ranks.items() if name not in full}


@contextmanager
def _factored_for_now(part: nn.Linear, pair: Pair, rank: int) -> Iterator[None]:
    weight: Any = part.weight
    kept = weight.detach().clone()
    low, high = pair.factors(rank)
    with torch.no_grad():
        weight.copy_(high @ low)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
