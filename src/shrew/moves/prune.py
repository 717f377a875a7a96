"""`prune`: set single weights to zero and store the others behind a bitmap.

Kept for comparison and counted honestly. Half of the weights of bf16 gone leaves 9 bits a weight, more than int8, which
loses next to nothing; and no runtime here is faster for it. The field has dropped it for such reasons: vLLM and
compressed-tensors removed their sparse formats in 2026.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from shrew.errors import DataError, UnsupportedError
from shrew.folder import Loaded
from shrew.folder.packed import from_rows, to_rows
from shrew.moves.calibrate import hessians
from shrew.moves.context import Context
from shrew.moves.quantize import quantizable
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Set single weights to zero, stored as a bitmap and the rest; half of them gone takes more bytes than int8."""

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Sun et al. 2023, Wanda (arXiv:2306.11695)"

    share: Annotated[float, Meta(gt=0, lt=1)] = doc("share of the weights of each matrix to set to zero", 0.5)
    method: Literal["wanda", "magnitude"] = doc(
        "wanda: those of least |weight| times norm of their input on calibration text, in each row; magnitude: those "
        "of least |weight|, in the whole matrix", "wanda"
    )  # fmt: skip

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Prune the linear layers and experts, in place; embeddings and head stay whole. Raises UnsupportedError for
        quantized weights, DataError where Wanda has no text."""
        targets, untouched = quantizable(loaded.model)
        chosen = [target for target in targets.values() if target.kind in ("linear", "experts")]
        for target in chosen:
            if target.name in loaded.packed:
                raise UnsupportedError(f"{target.name} is quantized already; put prune before quantize in the recipe.")
        if self.method == "wanda" and not context.calibration:
            raise DataError("prune: there is no calibration text to weigh inputs on; give some, or --method magnitude.")
        seen = hessians(loaded, context.calibration) if self.method == "wanda" else {}
        for target in chosen:
            weight: Any = target.weight
            rows = to_rows(weight.detach().float(), target.transposed)
            if target.name in seen:
                norms = seen[target.name].diagonal(dim1=-2, dim2=-1).sqrt()  # [in], of experts [experts, in]
                scores = rows.abs() * norms.reshape(-1, norms.shape[-1]).repeat_interleave(
                    len(rows) // (norms.numel() // norms.shape[-1]), 0)  # fmt: skip
                mask = least(scores, self.share)
            else:
                if self.method == "wanda":
                    context.say(f"{target.name}: no calibration text reached it, so its smallest weights go")
                mask = least(rows.abs().reshape(1, -1), self.share).reshape(rows.shape)
            with torch.no_grad():
                weight.masked_fill_(from_rows(mask, tuple(weight.shape), target.transposed), 0.0)
        total = sum(target.weight.numel() for target in chosen)
        zeros = sum(int((target.weight == 0).sum()) for target in chosen)
        context.say(f"prune: {zeros:,} of {total:,} weights in {len(chosen)} matrices are zero")
        loaded.untouched |= untouched
        return dataclasses.replace(loaded, sparse=True)


def least(scores: Tensor, share: float) -> Tensor:
    """[rows, n] -> bool of the same shape: in each row the round(share n) lowest, the earlier of equals."""
    count = round(share * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
