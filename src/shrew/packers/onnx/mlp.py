"""`mlp` as nodes."""

from collections.abc import Callable
from typing import Any

from shrew.packers.onnx.graph import Call, Graph


def _gelu_tanh(g: Graph, x: str) -> str:
    return str(g.node("Gelu", x, approximate="tanh"))


def _relu2(g: Graph, x: str) -> str:
    y = str(g.node("Relu", x))
    return g.mul(y, y)


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {"silu": Graph.silu, "gelu_tanh": _gelu_tanh, "relu2": _relu2}


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    activation = ACTIVATIONS[block.spec.activation]
    up = g.linear(x, f"{name}.up_proj")
    if not block.spec.gated:
        return g.linear(activation(g, up), f"{name}.down_proj")
    return g.linear(g.mul(activation(g, g.linear(x, f"{name}.gate_proj")), up), f"{name}.down_proj")
