"""The whole model as nodes: embedding, layers, head; and the table of what each kind of block becomes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shrew.blocks.detector import FAR
from shrew.blocks.model import ShrewForCausalLM
from shrew.packers.onnx import attention, conv, delta, depth, linear, memory, mlp, moe, ngrams
from shrew.packers.onnx.call import Call, Whole
from shrew.packers.onnx.graph import Graph
from shrew.packers.onnx.kv import Steps
from shrew.packers.onnx.weights import Weights

# (graph, block, name of its parameters, x [batch, length, width] normed, call) -> the same shape
Emitter = Callable[[Graph, Any, str, str, Call], str]

EMITTERS: dict[str, Emitter] = {
    "attention": attention.emit,
    "conv": conv.emit,
    "delta": delta.emit,
    "linear": linear.emit,
    "memory": memory.emit,
    "mlp": mlp.emit,
    "moe": moe.emit,
    "window": attention.emit,
}


def causal(model: ShrewForCausalLM, weights: Weights, kv: dict[str, Steps] | None = None) -> Graph:
    """The graph of a causal model: see `docs/pack.md` for its inputs and outputs. `kv`: steps of cached keys and
    values."""
    spec, g = model.spec, Graph(weights)
    g.kv = kv or {}
    call = Call(g, spec.context, spec.eps)
    wanted = g.input("wanted", torch.int64, ("n",))
    hidden = str(g.node("Gather", _hidden(g, model, call), wanted, axis=0))
    logits = g.tied(hidden, "model.embed_tokens") if spec.tied else g.linear(hidden, "lm_head")
    logits = g.capped(logits if spec.logit_scale == 1 else g.mul(logits, spec.logit_scale), spec.softcap)
    g.output(logits, "logits", torch.float32, ("n", spec.vocabulary or 0))
    g.output(hidden, "hidden", torch.float32, ("n", spec.width))
    return g


def classifier(model: ShrewForCausalLM, weights: Weights, labels: int) -> Graph:
    """The graph of a causal trunk whose hidden state at the last token of a text is scored for each label."""
    spec, g = model.spec, Graph(weights)
    call = Whole(g, spec.context, spec.eps)
    hidden = _hidden(g, model, call)
    logits = g.linear(str(g.node("Gather", hidden, _ends(g, call), axis=0)), "score")
    g.output(logits, "logits", torch.float32, ("batch", labels))
    return g


def detector(model: ShrewForCausalLM, weights: Weights, families: int, pooling: Sequence[str]) -> Graph:
    """The graph of a detector: `logits` [batch] of being vulnerable, `families`
    [batch, families] and, for each token, what it adds to the score of its line, `lines` [batch, length]."""
    spec, g = model.spec, Graph(weights)
    call = Whole(g, spec.context, spec.eps)
    flat = _hidden(g, model, call)
    hidden = str(g.node("Reshape", flat, g.node("Concat", call.shape, g.ints(spec.width), axis=0)))
    lines = str(g.node("Squeeze", g.linear(hidden, "line"), g.ints(2)))
    pooled = [_pooled(g, way, flat, hidden, lines, call) for way in pooling]
    joined = pooled[0] if len(pooled) == 1 else str(g.node("Concat", *pooled, axis=1))
    g.output(str(g.node("Squeeze", g.linear(joined, "score"), g.ints(1))), "logits", torch.float32, ("batch",))
    g.output(g.linear(joined, "family"), "families", torch.float32, ("batch", families))
    g.output(lines, "lines", torch.float32, ("batch", "length"))
    return g


def _pooled(g: Graph, way: str, flat: str, hidden: str, lines: str, call: Whole) -> str:
    """[batch, width]: see `ShrewForSequenceClassification.pool`."""
    if way == "last":
        return str(g.node("Gather", flat, _ends(g, call), axis=0))
    text = g.once("text", lambda: str(g.node("Less", call.steps, g.node("Unsqueeze", call.lengths, g.ints(1)))))
    if way == "lines":
        shares = g.node("Softmax", g.node("Where", text, lines, g.constant(FAR)), axis=1)
        return str(g.node("Squeeze", g.node("MatMul", g.node("Unsqueeze", shares, g.ints(1)), hidden), g.ints(1)))
    nothing, op = (FAR, "ReduceMax") if way == "max" else (0.0, "ReduceSum")
    read = g.node("Where", g.node("Unsqueeze", text, g.ints(2)), hidden, g.constant(nothing))
    found = str(g.node(op, read, g.ints(1), keepdims=0))
    if way == "max":
        return found
    return str(g.node("Div", found, g.cast(str(g.node("Unsqueeze", call.lengths, g.ints(1))), torch.float32)))


def _ends(g: Graph, call: Whole) -> str:
    """int64 [batch]: where the last token of each text stands among all of the call."""
    rows = g.node("Range", g.constant(0, torch.int64), g.node("Squeeze", call.batch), g.constant(1, torch.int64))
    return g.add(g.mul(str(rows), call.length), str(g.node("Sub", call.lengths, g.ints(1))))


def _hidden(g: Graph, model: ShrewForCausalLM, call: Call) -> str:
    """[batch * length, width]: the hidden states after the last norm."""
    spec = model.spec
    x, added = _embedded(g, model, call), ""
    for number, at in enumerate(spec.order):
        layer: Any = model.model.layers[at]
        call.prefix = f"loop.{spec.order[:number].count(at)}." if spec.depth > spec.layers else ""
        x, added = _layer(g, layer, f"model.layers.{at}", x, added, call)
    return g.reshape(g.add_norm(x, added, "model.norm", spec.eps)[0], -1, spec.width)


def _embedded(g: Graph, model: ShrewForCausalLM, call: Call) -> str:
    x = g.embed(call.tokens, "model.embed_tokens")
    if model.model.ngrams is not None:
        x = g.add(x, ngrams.emit(g, model.model.ngrams, "model.ngrams", call))
    return x if model.spec.embedding_scale == 1 else g.mul(x, model.spec.embedding_scale)


def _layer(g: Graph, layer: Any, name: str, x: str, added: str, call: Call) -> tuple[str, str]:
    """x, and what is still to be added to it before the next norm."""

    def enter(norm: str) -> tuple[str, str]:
        if not added:
            return g.norm(x, f"{name}.{norm}", call.eps), x
        return g.add_norm(x, added, f"{name}.{norm}", call.eps)

    def leave(y: str, after: str) -> str:
        y = y if getattr(layer, after) is None else g.norm(y, f"{name}.{after}", call.eps)
        return y if layer.scale == 1 else g.mul(y, layer.scale)

    z, x = enter("mixer_norm")
    added = leave(EMITTERS[layer.mixer.spec.kind](g, layer.mixer, f"{name}.mixer", z, call), "mixer_after")
    if layer.ffn_norm is None:
        return x, added
    z, x = enter("ffn_norm")

    def feed(z: str) -> str:
        return leave(EMITTERS[layer.ffn.spec.kind](g, layer.ffn, f"{name}.ffn", z, call), "ffn_after")

    return x, feed(z) if layer.router is None else depth.emit(g, layer.router, f"{name}.router", z, feed)
