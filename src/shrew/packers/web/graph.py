"""The packed graph for WebAssembly, where MatMulNBits has no kernels of its own.

It is there, but unpacks the whole matrix at every call. So weights are unpacked once, when the page loads the model, by
nodes that ONNX Runtime folds: the same bytes are downloaded, and matrices take 4 bytes a weight of memory instead.
Values are those of accuracy level 0: inputs of products are not rounded to 8 bits.
"""

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

MS = "com.microsoft"


def unpacked_bytes(model: onnx.ModelProto) -> int:
    """Memory of the matrices that `unpack` makes."""
    return sum(4 * _settings(node)["K"] * _settings(node)["N"] for node in model.graph.node if _is_packed(node))


def unpack(model: onnx.ModelProto) -> None:
    """Replace every product with codes by one with float32 weights that are computed from them; in place."""
    nodes: list[NodeProto] = []
    made: dict[str, str] = {}  # a table that is read by several products is unpacked once
    for node in model.graph.node:
        if not _is_packed(node):
            nodes.append(node)
            continue
        x, codes, scales, zeros, _, bias = [*node.input, *[""] * 6][:6]
        if codes not in made:
            made[codes] = _unpacked(model, nodes, codes, scales, zeros, **_settings(node))
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [x, made[codes]], [product]))
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _is_packed(node: NodeProto) -> bool:
    return bool(node.op_type == "MatMulNBits" and node.domain == MS)


def _settings(node: NodeProto) -> dict[str, int]:
    names = ("K", "N", "bits", "block_size")
    return {item.name: helper.get_attribute_value(item) for item in node.attribute if item.name in names}


def _unpacked(
    model: onnx.ModelProto, nodes: list[NodeProto], codes: str, scales: str, zeros: str, K: int, N: int, bits: int,
    block_size: int,
) -> str:  # fmt: skip
    """Nodes that make the float32 matrix [K, N] from `codes` uint8 [N, blocks, bytes], `scales` [N, blocks] and `zeros`
    uint8 [N, bytes] or ''."""
    count = 0

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        nonlocal count
        name, count = f"{codes}.unpacked.{count}", count + 1
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(value: Any, kind: int) -> str:
        name = f"{codes}.constant.{len(model.graph.initializer)}"
        array = np.asarray(value)
        model.graph.initializer.append(helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist()))
        return name

    def shaped(value: str, *shape: int) -> str:
        return node("Reshape", value, constant(shape, TensorProto.INT64))

    def each(value: str) -> str:
        """Bytes [...] as their codes [..., 8 / bits], the lowest bits first."""
        if bits == 8:
            return node("Unsqueeze", value, constant([-1], TensorProto.INT64))
        low = constant(2**bits - 1, TensorProto.UINT8)
        parts = []
        for shift in range(0, 8, bits):
            by = constant(shift, TensorProto.UINT8)
            part = node("BitwiseAnd", node("BitShift", value, by, direction="RIGHT") if shift else value, low)
            parts.append(node("Unsqueeze", part, constant([-1], TensorProto.INT64)))
        return node("Concat", *parts, axis=-1)

    blocks = -(-K // block_size)
    values = node("Cast", shaped(each(codes), N, blocks, block_size), to=TensorProto.FLOAT)
    if zeros:
        bytes_ = -(-blocks * bits // 8)
        held = shaped(each(shaped(zeros, N, bytes_)), N, bytes_ * 8 // bits)
        ends = [constant([end], TensorProto.INT64) for end in (0, blocks, 1)]
        middle = node("Unsqueeze", node("Slice", held, *ends), constant([-1], TensorProto.INT64))
        middle = node("Cast", middle, to=TensorProto.FLOAT)
    else:
        middle = constant(float(2 ** (bits - 1)), TensorProto.FLOAT)
    values = node("Mul", node("Sub", values, middle), shaped(scales, N, blocks, 1))
    values = shaped(values, N, blocks * block_size)
    if blocks * block_size > K:
        ends = [constant([end], TensorProto.INT64) for end in (0, K, 1)]
        values = node("Slice", values, *ends)
    return node("Transpose", values, perm=[1, 0])
