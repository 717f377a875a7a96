"""What is packed: a loaded model in our blocks, with the codes of its weights under our names.

Adapters between stock models and ours move, split and join rows, never single weights. So numbers of rows that go the
way of the weights say where each row of codes has gone.
"""

from typing import Any

import torch
from torch import Tensor

from shrew.blocks.model import ModelSpec, ShrewConfig, ShrewForCausalLM
from shrew.blocks.stock import IDS, as_spec, in_our_names
from shrew.folder import Loaded, Packed
from shrew.folder.packed import from_rows, to_rows
from shrew.packers.onnx.graph import Weights
from shrew.spec import dump


def ours(loaded: Loaded) -> tuple[ShrewForCausalLM, Weights]:
    """The model in our blocks, sharing its weights with `loaded` where it can, and the weights by name.

    Raises UnsupportedError where our blocks cannot say the model."""
    model = loaded.model
    if isinstance(model, ShrewForCausalLM):
        return model, Weights(_floats(model.state_dict()), dict(loaded.packed))
    spec = as_spec(model.config)
    with torch.device("meta"):
        same = ShrewForCausalLM(ShrewConfig(dump(spec), **{key: getattr(model.config, key) for key in IDS}))
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    same.load_state_dict(in_our_names(model.config, spec, weights), assign=True)
    same.tie_weights()
    return same.eval(), Weights(_floats(same.state_dict()), codes(loaded, spec, weights))


def _floats(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in weights.items()}


def codes(loaded: Loaded, spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Packed]:
    """The codes of a stock model's weights by our names; without those whose rows do not stay whole."""
    first, sources, numbers = 0, [], {}
    for name, value in weights.items():
        numbers[name] = torch.full((), -1.0, dtype=torch.float64).expand(value.shape)
        if (packed := loaded.packed.get(name)) is not None:
            rows, cols = packed.codes.shape
            each = torch.arange(first, first + rows, dtype=torch.float64)[:, None].expand(rows, cols)
            numbers[name] = from_rows(each, packed.shape, packed.transposed)
            sources.append((first, packed))
            first += rows
    moved = in_our_names(loaded.model.config, spec, numbers)
    found = {name: _taken(to_rows(value, False), tuple(value.shape), sources)
             for name, value in moved.items() if value.ndim > 1}  # fmt: skip
    return {name: packed for name, packed in found.items() if packed is not None}


def _taken(numbers: Tensor, shape: tuple[int, ...], sources: list[tuple[int, Packed]]) -> Packed | None:
    """The codes of these rows [rows, cols], each number constant along its row."""
    if not sources or bool((numbers[:, :1] < 0).any()) or bool((numbers != numbers[:, :1]).any()):
        return None
    rows = numbers[:, 0].long()
    parts: list[Any] = []
    for first, packed in sources:
        here = (rows >= first) & (rows < first + len(packed.codes))
        if here.any():
            parts.append((here, rows[here] - first, packed))
    kinds = {(packed.grid, packed.codes.shape[1], packed.scales.dtype) for _, _, packed in parts}
    if len(kinds) > 1 or parts[0][2].codes.shape[1] != shape[-1]:
        return None
    grid, count = parts[0][2].grid, len(rows)

    def gathered(name: str) -> Tensor:
        whole = getattr(parts[0][2], name)
        if len(parts) == 1:
            return torch.as_tensor(whole[parts[0][1]])
        joined = whole.new_empty(count, whole.shape[1])
        for here, at, packed in parts:
            joined[here] = getattr(packed, name)[at]
        return torch.as_tensor(joined)

    zeros = None if grid.symmetric else gathered("zeros")
    return Packed(gathered("codes"), gathered("scales"), zeros, grid, shape)
