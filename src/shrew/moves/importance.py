"""Which inputs of a linear layer can go when the others make up for them: optimal brain surgeon, unit by unit.

A unit is one input (a channel of an MLP) or several that go together (the heads of a key-value group). With H = E[x xᵀ]
of the layer's input, leaving out the unit u and letting the others take over what they can of its part costs
tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ) of the output's power (Hassibi and Stork 1992; in units, Kurtic et al. 2023, ZipLM).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shrew.errors import FolderError
from shrew.folder import Loaded
from shrew.moves.anatomy import batches, logits
from shrew.moves.context import Context
from shrew.moves.replay import Replay, divergence, steady

SCORE_TOKENS = 8192  # of calibration text
BATCH_VALUES = 1 << 25  # logits held at a time: 128 MB a copy
DAMP = 0.01  # of the mean diagonal of H: holds the new weights near the old ones where the text says little
ROUNDS = 16  # about so many, after each of which the units left are weighed again
TOGETHER = 0.5  # partial correlation from which two units do not go in one round


def moments(loaded: Loaded, context: Context, names: list[str]) -> dict[str, Tensor]:
    """E[x xᵀ] of the inputs of these weights on calibration text, float64 [in, in] by name.

    Raises FolderError where they are too large to be squared."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + (x.T @ x).double().cpu()

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name in names:
            module = loaded.model.get_submodule(name.removesuffix(".weight"))
            hooks.enter_context(module.register_forward_pre_hook(note(name)))
        for ids in batches(loaded, context.calibration, 2048, SCORE_TOKENS):
            logits(loaded, ids)
            tokens += ids.numel()
    check_squares(sums)
    return {name: total / tokens for name, total in sums.items()}


def check_squares(sums: Mapping[str, Tensor]) -> None:
    """Sums of squares of what reaches weights, by name. Raises FolderError where they are no numbers."""
    for name, total in sums.items():
        if not total.isfinite().all():
            raise FolderError(f"what reaches {name} is too large to calibrate by (squares of it are no numbers), so "
                              "weights before it are far too large; is the file damaged?")  # fmt: skip


def damages(
    loaded: Loaded, context: Context, changes: Sequence[tuple[int, Callable[[], AbstractContextManager[None]]]],
    limit: int,
) -> list[float]:  # fmt: skip
    """Mean KL(model || changed model) in nats a prediction, on `limit` tokens of calibration text, of each change: the
    first layer that it touches, and a context in which the model is another."""
    totals, rows = [0.0] * len(changes), 0
    layers: list[nn.Module] | None = None
    with torch.inference_mode():
        wide = 1 if loaded.is_classifier else loaded.model.config.vocab_size
        for ids in batches(loaded, context.calibration, min(max(1, BATCH_VALUES // wide), 2048), limit):
            layers = steady(loaded, ids) if layers is None else layers
            replay = Replay(loaded, ids, layers)
            whole = replay.whole.float().log_softmax(-1)
            rows += whole[..., 0].numel()
            for number, (first, change) in enumerate(changes):
                with change():
                    totals[number] += divergence(replay.logits(first), whole)
    return [total / rows for total in totals]


def columns_of(units: Tensor, size: int) -> Tensor:
    """The inputs that belong to units of `size` inputs each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def best_cut(weight: Tensor, moment: Tensor, plain: Tensor, size: int) -> tuple[Tensor, Tensor, str]:
    """weight [out, in] cut to as many units as `plain` names: (units kept, ascending; new weight; how).

    Of three ways the one whose output is nearest to the whole layer's: the units `plain` as they are, the same with the
    others' part made up for, or those that optimal brain surgeon keeps."""
    weight, moment = weight.double(), moment.double()
    chosen = surgeon(weight, moment, size, len(plain))
    ways = {
        "as they are": (plain, weight[:, columns_of(plain, size)]),
        "refitted": (plain, refitted(weight, moment, columns_of(plain, size))),
        "surgeon's, refitted": (chosen, refitted(weight, moment, columns_of(chosen, size))),
    }
    how = min(ways, key=lambda name: missed(weight, moment, columns_of(ways[name][0], size), ways[name][1]))
    return *ways[how], how


def missed(weight: Tensor, moment: Tensor, columns: Tensor, new: Tensor) -> float:
    """The layer objective: E |W x - W' x_K|²."""
    rest = weight.clone()
    rest[:, columns] -= new
    return float((rest @ moment * rest).sum())


def refitted(weight: Tensor, moment: Tensor, columns: Tensor) -> Tensor:
    """The weights [out, kept] on these inputs that miss least of the whole output (damped least squares)."""
    held = damped(moment)
    found: Tensor = torch.linalg.solve(held[columns][:, columns], held[columns] @ weight.T).T
    return found


def surgeon(weight: Tensor, moment: Tensor, size: int, keep: int) -> Tensor:
    """The units [keep] left when those that cost least go, round after round, the others taking over each time."""
    inverse, left = torch.linalg.inv(damped(moment)), torch.arange(len(moment) // size)
    most = max(1, (len(left) - keep) // ROUNDS) if size == 1 else 1
    while len(left) > keep:
        units, own = len(left), torch.arange(len(left))
        blocks = inverse.reshape(units, size, units, size)[own, :, own]  # [units, size, size]
        parts = weight.reshape(len(weight), units, size).transpose(0, 1)  # [units, out, size]
        costs = (parts.transpose(1, 2) * torch.linalg.solve(blocks, parts.transpose(1, 2))).sum((1, 2))
        going = _apart(inverse, costs.argsort(stable=True), min(most, units - keep))
        kept = torch.tensor(sorted(set(own.tolist()) - set(going.tolist())))
        out, stay = columns_of(going, size), columns_of(kept, size)
        share = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stay])  # what those that stay take over
        weight = weight[:, stay] - weight[:, out] @ share
        inverse = inverse[stay][:, stay] - inverse[stay][:, out] @ share
        left = left[kept]
    return left


def _apart(inverse: Tensor, order: Tensor, count: int) -> Tensor:
    """The first units in `order`, at most `count`, of which none counts on another to take over for it."""
    if count == 1:
        return order[:1]
    scale = inverse.diagonal().rsqrt()
    chosen = order[:1]
    for unit in order[1:]:
        if len(chosen) == count:
            break
        if float((inverse[unit, chosen] * scale[unit] * scale[chosen]).abs().max()) < TOGETHER:
            chosen = torch.cat([chosen, unit[None]])
    return chosen


def damped(moment: Tensor) -> Tensor:
    """H with DAMP of its mean diagonal added."""
    mean = moment.diagonal().mean().clamp(min=1e-30)
    return moment + DAMP * mean * torch.eye(len(moment), dtype=moment.dtype)
