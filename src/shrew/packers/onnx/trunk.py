"""The whole model as nodes: embedding, layers, head; and the table of what each kind of block becomes."""

from collections.abc import Callable
from typing import Any

from shrew.packers.onnx import attention
from shrew.packers.onnx.graph import Call, Graph

# (graph, block, name of its parameters, x [batch, length, width] normed, call) -> the same shape
Emitter = Callable[[Graph, Any, str, str, Call], str]

EMITTERS: dict[str, Emitter] = {
    "attention": attention.emit,
}
