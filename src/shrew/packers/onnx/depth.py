"""Mixture-of-depths as nodes: the tokens that pass are gathered, fed, and put back where they were; there may be none.

Loops are layers written out again, which the trunk does, and early exits are not part of a packed model.
"""

from collections.abc import Callable
from typing import Any

from shrew.packers.onnx.graph import Graph


def emit(g: Graph, block: Any, name: str, x: str, feed: Callable[[str], str]) -> str:
    """x [batch, length, width], normed -> the same shape; `feed` makes nodes of [1, tokens, width] -> the same."""
    width = block.score.in_features
    flat = g.reshape(x, -1, width)
    score = g.linear(flat, f"{name}.score")
    passes = g.node("NonZero", g.reshape(str(g.node("Greater", score, g.constant(0.0))), -1))  # [1, tokens]
    y = feed(str(g.node("Gather", flat, passes, axis=0)))
    gates = g.sigmoid(str(g.node("Gather", score, passes, axis=0)))  # [1, tokens, 1]
    nothing = g.node("ConstantOfShape", g.node("Shape", flat))
    y = g.node("ScatterND", nothing, g.reshape(str(passes), -1, 1), g.reshape(g.mul(y, gates), -1, width))
    return str(g.node("Reshape", y, g.node("Shape", x)))
