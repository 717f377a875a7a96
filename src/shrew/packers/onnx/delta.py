"""`delta` as nodes: LinearAttention runs the gated delta rule itself, position after position, so that there is no
triangular system to solve and one token is the same node as many."""

from typing import Any

from shrew.packers.onnx.conv import causal_conv
from shrew.packers.onnx.graph import MS, Call, Graph
from shrew.packers.onnx.linear import vector

EPS = 1e-6  # below the root of a key's or query's length, as in the block


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    width, heads = block.key_width, block.heads
    keys, values = block.sizes[0], block.sizes[2]
    gated = block.g_proj is not None
    big = g.linear(x, f"{name}.qkv_proj", *([f"{name}.g_proj"] if gated else []))
    mixed, gate = g.split(big, sum(block.sizes), values) if gated else (big, "")
    if block.conv is not None:
        mixed = causal_conv(g, mixed, f"{name}.conv", "", f"{name}.conv", call, activation="silu")
    both, v = g.split(mixed, 2 * keys, values)
    both = g.reshape(both, 0, 0, 2 * block.key_heads, width)
    # x / sqrt(|x|^2 + EPS) is the RMS norm of EPS / width, divided by sqrt(width)
    unit = g.constant([width**-0.5] * width)
    both = str(g.node("SimplifiedLayerNormalization", both, unit, axis=-1, epsilon=EPS / width))
    q, k = g.split(g.reshape(both, 0, 0, 2 * keys), keys, keys)
    logs, beta = _rates(g, block, name, x)
    past, set_next = call.state(f"{name}.rule", (heads, width, block.value_width))
    y, last = g.node(
        "LinearAttention", q, k, v, past, logs, beta, domain=MS, outputs=2, scale=width**-0.5,
        update_rule="gated_delta" if logs else "delta", q_num_heads=block.key_heads, kv_num_heads=heads)  # fmt: skip
    set_next(last)
    if gated:
        weight = g.tensor(f"{name}.o_norm.weight")
        y = g.node("GatedRMSNorm", y, weight, gate, domain=MS, epsilon=block.o_norm.eps)
    else:
        y = g.norm(g.reshape(y, 0, 0, heads, block.value_width), f"{name}.o_norm", block.o_norm.eps)
        y = g.reshape(y, 0, 0, values)
    return g.linear(y, f"{name}.o_proj")


def _rates(g: Graph, block: Any, name: str, x: str) -> tuple[str, str]:
    """What each head forgets (log decays, '' where it forgets nothing) and how much it corrects, [batch, length, H]."""
    if block.a_proj is None:
        return "", g.sigmoid(g.linear(x, f"{name}.b_proj"))
    b, a = g.split(g.linear(x, f"{name}.b_proj", f"{name}.a_proj"), block.heads, block.heads)
    g.weights.effective[f"{name}.A_log"] = "fp32"
    rates = vector(g, (name, "rates"), -g.weights.dense[f"{name}.A_log"].float().exp())
    logs, beta = g.node("LinearAttentionGate", a, g.tensor(f"{name}.dt_bias"), rates, b, domain=MS, outputs=2)
    return logs, beta
