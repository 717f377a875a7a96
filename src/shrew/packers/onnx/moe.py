"""`moe` as nodes: tokens sorted by expert, and each expert's products on its own run of rows, which may be empty.

So an expert that no token chose costs two calls that return at once, any width of codes and any activation goes, and
the numbers are those of the block. (com.microsoft's QMoE rounds inputs where codes have 8 bits.)

N tokens, E experts, k chosen, d width, F hidden channels.
"""

from typing import Any

from shrew.folder.packed import Packed
from shrew.packers.onnx import mlp
from shrew.packers.onnx.call import Call
from shrew.packers.onnx.graph import Graph


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [rows, length, width], normed -> the same shape; there may be no token at all."""
    flat = g.reshape(x, -1, block.gate.in_features)
    index, weights = _routed(g, block, name, flat)
    y = _experts(g, block, f"{name}.experts", flat, index, weights)
    if block.shared is not None:
        extra = mlp.emit(g, block.shared, f"{name}.shared", flat, call)
        if block.shared_gate is not None:
            extra = g.mul(extra, g.sigmoid(g.linear(flat, f"{name}.shared_gate")))
        y = g.add(y, extra)
    return str(g.node("Reshape", y, g.node("Shape", x), allowzero=1))


def _routed(g: Graph, block: Any, name: str, x: str) -> tuple[str, str]:
    """The experts of each token, int64 [N, k], and their weights [N, k]."""
    spec, count = block.spec, g.ints(block.spec.top_k)
    logits = g.linear(x, f"{name}.gate")
    if spec.router == "softmax" and spec.normalise and block.balance_bias is None:
        best, index = g.node("TopK", logits, count, outputs=2, axis=-1)
        return index, str(g.node("Softmax", best, axis=-1))  # what is divided out need not be computed
    scores = str(g.node("Softmax", logits, axis=-1)) if spec.router == "softmax" else g.sigmoid(logits)
    if block.balance_bias is None:
        weights, index = g.node("TopK", scores, count, outputs=2, axis=-1)
    else:
        choice = g.add(scores, g.tensor(f"{name}.balance_bias"))
        _, index = g.node("TopK", choice, count, outputs=2, axis=-1)
        weights = str(g.node("GatherElements", scores, index, axis=1))
    if spec.normalise:
        total = str(g.node("ReduceSum", weights, g.ints(1), keepdims=1))
        weights = str(g.node("Div", weights, g.add(total, g.constant(1e-20))))
    return index, weights


def _experts(g: Graph, block: Any, name: str, x: str, index: str, weights: str) -> str:
    """x [N, d], index and weights [N, k] -> [N, d]."""
    count, chosen = block.spec.experts, block.spec.top_k
    up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
    picks = g.reshape(index, -1)
    every = str(g.node("Shape", picks))
    order = g.node("TopK", picks, every, outputs=2, axis=0, largest=0)[1]  # equal ones stay in order
    back = g.node("TopK", order, every, outputs=2, axis=0, largest=0)[1]
    hits = g.node("OneHot", picks, g.ints(count), g.ints(0, 1), axis=-1)
    sizes = str(g.node("ReduceSum", hits, g.ints(0), keepdims=0))
    token = order if chosen == 1 else str(g.node("Div", order, g.ints(chosen)))

    def products(y: str, weight: str) -> str:
        runs = g.node("Split", y, sizes, outputs=count, axis=0) if count > 1 else [y]
        return str(g.node("Concat", *_each(g, runs, weight), axis=0))

    hidden = products(str(g.node("Gather", x, token, axis=0)), up)
    width = block.experts.down_proj.shape[-1]
    gate, value = g.split(hidden, width, width)
    y = products(g.mul(mlp.ACTIVATIONS[block.spec.activation](g, gate), value), down)
    y = str(g.node("Gather", y, back, axis=0))
    if chosen == 1:
        return g.mul(y, weights)
    each = g.mul(g.reshape(y, -1, chosen, block.gate.in_features), str(g.node("Unsqueeze", weights, g.ints(2))))
    return str(g.node("ReduceSum", each, g.ints(1), keepdims=0))


def _each(g: Graph, runs: list[str], name: str) -> list[str]:
    """The product of each run with its expert's part of the stacked weight `name` [E, out, in]."""
    weights, (count, rows, _) = g.weights, g.weights.dense[name].shape
    found, kinds = [], set()
    for expert, run in zip(range(count), runs, strict=True):
        own, at = f"{name}.{expert}", slice(expert * rows, (expert + 1) * rows)
        weights.dense[f"{own}.weight"] = weights.dense[name][expert]
        if (codes := weights.packed.get(name)) is not None:
            part = Packed(codes.codes[at], codes.steps.rows(at), codes.grid, codes.shape[1:])
            weights.packed[f"{own}.weight"] = part
        found.append(g.linear(run, own))
        for table in (weights.dense, weights.packed):
            table.pop(f"{own}.weight", None)
        kinds.add(weights.effective.pop(f"{own}.weight"))
    weights.effective[name] = ", ".join(sorted(kinds))
    return found
