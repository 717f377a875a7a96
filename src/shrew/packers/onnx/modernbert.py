"""ModernBERT for sequence classification as nodes: attention both ways, local in most layers, and layer norms.

GroupQueryAttention does it all: it is told not to be causal, where each text ends, and by a bias what is near.
"""

from typing import Any

import torch

from shrew.errors import UnsupportedError
from shrew.packers.onnx.attention import layout, moved
from shrew.packers.onnx.graph import MS, Graph, Weights, Whole

ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "silu": ("QuickGelu", {"alpha": 1.0, "domain": MS}),
}


def classifier(config: Any, weights: Weights) -> Graph:
    """The graph of a ModernBertForSequenceClassification."""
    g = Graph(weights)
    call = Whole(g, config.max_position_embeddings, config.norm_eps)
    for name in (config.hidden_activation, config.classifier_activation):
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UnsupportedError(f"modernbert: activation '{name}' cannot be packed; known: {known}.")
    x, added = _norm(g, g.embed(call.tokens, "model.embeddings.tok_embeddings"), "model.embeddings.norm", call), ""
    for number, kind in enumerate(config.layer_types):
        name = f"model.layers.{number}"
        z = x
        if number:  # the first one has the norm of the embeddings
            z, x = _add_norm(g, x, added, f"{name}.attn_norm", call)
        added = _attention(g, config, kind, f"{name}.attn", z, call)
        z, x = _add_norm(g, x, added, f"{name}.mlp_norm", call)
        size = int(config.intermediate_size)
        inner, gate = g.split(g.linear(z, f"{name}.mlp.Wi"), size, size)
        added = g.linear(g.mul(_activation(g, config.hidden_activation, inner), gate), f"{name}.mlp.Wo")
    hidden, _ = _add_norm(g, x, added, "model.final_norm", call)
    y = _activation(g, config.classifier_activation, g.linear(_pooled(g, config, hidden, call), "head.dense"))
    logits = g.linear(_norm(g, y, "head.norm", call), "classifier")
    g.output(logits, "logits", torch.float32, ("batch", config.num_labels))
    return g


def _activation(g: Graph, name: str, x: str) -> str:
    op, attributes = ACTIVATIONS[name]
    return str(g.node(op, x, **attributes))


def _affine(g: Graph, name: str) -> list[str]:
    return [g.tensor(part) for part in (f"{name}.weight", f"{name}.bias") if part in g.weights.dense]


def _norm(g: Graph, x: str, name: str, call: Whole) -> str:
    return str(g.node("LayerNormalization", x, *_affine(g, name), axis=-1, epsilon=call.eps))


def _add_norm(g: Graph, x: str, y: str, name: str, call: Whole) -> tuple[str, str]:
    """The layer norm of x + y, and x + y."""
    found = g.node("SkipLayerNormalization", x, y, *_affine(g, name), domain=MS, outputs=4, unused=(1, 2),
                   epsilon=call.eps)  # fmt: skip
    return found[0], found[3]


def _attention(g: Graph, config: Any, kind: str, name: str, x: str, call: Whole) -> str:
    heads = config.num_attention_heads
    width = config.hidden_size // heads
    rope = config.rope_parameters[kind]
    if rope["rope_type"] != "default":
        raise UnsupportedError(f"modernbert: rotary positions of type '{rope['rope_type']}' cannot be packed.")
    place = layout(width, width)
    rows = torch.cat([moved(place.turned, 2 * heads, width), moved(place.plain, heads, width, 2 * heads)])
    qkv = g.linear(x, f"{name}.Wqkv", rows=None if place.usual else rows)
    tables = call.rotary(width, rope["rope_theta"], padded=place.padded)
    near = _near(g, config.sliding_window, call) if kind == "sliding_attention" else ""
    y = g.node("GroupQueryAttention", qkv, "", "", "", "", call.last, call.longest, *tables, "", near, domain=MS,
               outputs=3, num_heads=heads, kv_num_heads=heads, do_rotary=1, scale=width**-0.5, causal=0)[0]  # fmt: skip
    if place.padded != width:
        y = g.reshape(g.slice(g.reshape(y, 0, 0, heads, place.padded), 0, width, 3), 0, 0, heads * width)
    return g.linear(str(y), f"{name}.Wo")


def _near(g: Graph, reach: int, call: Whole) -> str:
    """[1, 1, length, length]: 0 where two positions are at most `reach` apart, else so little that exp gives 0.

    Not minus infinity: padding may be near no text at all, and would become NaN."""

    def make() -> str:
        apart = g.node("Abs", g.node("Sub", g.node("Unsqueeze", call.steps, g.ints(1)), call.steps))
        far = g.node("Greater", apart, g.constant(reach, torch.int64))
        bias = g.node("Where", far, g.constant(-1e30), g.constant(0.0))
        return str(g.node("Unsqueeze", bias, g.ints(0, 1)))

    return g.once(("near", reach), make)


def _pooled(g: Graph, config: Any, hidden: str, call: Whole) -> str:
    """[batch, width]: the first position, or the mean of those that are text."""
    if config.classifier_pooling == "cls":
        return str(g.node("Gather", hidden, g.constant(0, torch.int64), axis=1))
    text = g.cast(str(g.node("Less", call.steps, g.node("Unsqueeze", call.lengths, g.ints(1)))), torch.float32)
    total = g.node("ReduceSum", g.mul(hidden, str(g.node("Unsqueeze", text, g.ints(2)))), g.ints(1), keepdims=0)
    return str(g.node("Div", total, g.cast(str(g.node("Unsqueeze", call.lengths, g.ints(1))), torch.float32)))
