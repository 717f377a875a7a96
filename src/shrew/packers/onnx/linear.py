"""`linear` as nodes: one product in, one LinearAttention, one product back, and what stands between.

LinearAttention runs the recurrence itself, position after position, on a state that stays in the cache of the CPU: no
cumulated decays, so nothing can overflow, and one token is the same node as many.
"""

from typing import Any

import torch
from torch import Tensor

from shrew.packers.onnx.conv import causal_conv
from shrew.packers.onnx.graph import MS, Call, Graph


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    spec, inner, keys = block.spec, block.inner, block.keys
    parts = iter(g.split(g.linear(x, f"{name}.in_proj"), *(size for size in block.parts if size)))
    gate, mixed, raw = (next(parts) if size else "" for size in block.parts)
    if block.conv_weight is not None:
        taps, bias = f"{name}.conv_weight", f"{name}.conv_bias"
        mixed = causal_conv(g, mixed, taps, bias, f"{name}.conv", call, activation="silu")
    v, k, q = g.split(mixed, inner, keys, keys)
    logs, step = _log_decay(g, block, name, raw, call)
    values = v if not step else scaled(g, v, step, block.heads, block.head_width)
    past, set_next = call.state(f"{name}.matrix", (block.heads, spec.state, block.head_width))
    y, last = g.node(
        "LinearAttention", q, k, values, past, logs, domain=MS, outputs=2, update_rule="gated",
        q_num_heads=block.groups, kv_num_heads=block.heads, scale=1.0 if step else spec.state**-0.5)  # fmt: skip
    set_next(last)
    if block.D is not None:
        each = g.weights.dense[f"{name}.D"].float().repeat_interleave(block.head_width)
        g.weights.effective[f"{name}.D"] = "fp32"
        y = g.add(y, g.mul(v, vector(g, (name, "D"), each)))
    return g.linear(_gated(g, block, name, y, gate), f"{name}.out_proj")


def vector(g: Graph, key: Any, value: Tensor) -> str:
    """A float32 tensor that was computed from parameters."""
    value = value.detach().float()
    return g.initializer(key, tuple(value.shape), torch.float32, lambda: value)


def scaled(g: Graph, x: str, factors: str, heads: int, width: int) -> str:
    """x [batch, length, heads * width], each head times its factor [batch, length, heads]."""
    found = g.mul(g.reshape(x, 0, 0, heads, width), g.reshape(factors, 0, 0, heads, 1))
    return g.reshape(found, 0, 0, heads * width)


def softplus(g: Graph, x: str, bias: str, factor: str) -> str:
    """factor * softplus(x + bias) of x [batch, length, heads], bias and factor [heads]."""
    return str(g.node("LinearAttentionGate", x, bias, factor, domain=MS))


def _log_decay(g: Graph, block: Any, name: str, raw: str, call: Call) -> tuple[str, str]:
    """Log decays [batch, length, heads] and the step sizes that scale the values of Mamba-2, else ''."""
    heads = block.heads
    if block.decay_bias is None:
        logs, _ = block._log_decay(torch.zeros(heads))
        shape = g.node("Concat", call.shape, g.ints(heads), axis=0)
        return str(g.node("Expand", g.constant(logs), shape)), ""
    bias = g.weights.dense[f"{name}.decay_bias"].float()
    g.weights.effective[f"{name}.decay_bias"] = "fp32"
    if block.A_log is None:  # log sigmoid(x) = -softplus(-x)
        sixteenth = vector(g, ("sixteenth", heads), torch.full((heads,), -1 / 16))
        return softplus(g, str(g.node("Neg", raw)), vector(g, (name, "-bias"), -bias), sixteenth), ""
    step = softplus(g, raw, g.tensor(f"{name}.decay_bias"), vector(g, ("ones", heads), torch.ones(heads)))
    g.weights.effective[f"{name}.A_log"] = "fp32"
    rates = -g.weights.dense[f"{name}.A_log"].float().exp()
    return g.mul(step, vector(g, (name, "rates"), rates)), step


def _gated(g: Graph, block: Any, name: str, y: str, gate: str) -> str:
    """The norm over each of `norm_groups` parts of y [batch, length, inner], and the gate before or after it."""
    spec, eps = block.spec, block.norm.eps
    groups = spec.norm_groups or block.heads
    weight, width = g.tensor(f"{name}.norm.weight"), block.inner // groups
    # one norm multiplies each part by the same weights, so that those of several parts follow it
    own = weight if groups == 1 else vector(g, ("ones", width), torch.ones(width))
    if spec.gate == "after":
        y = g.node("GatedRMSNorm", y, own, gate, domain=MS, epsilon=eps)
        return str(y) if groups == 1 else g.mul(y, weight)
    if spec.gate == "before":
        y = g.mul(y, g.silu(gate))
    if groups > 1:
        y = g.reshape(y, 0, 0, groups, width)
    y = g.node("SimplifiedLayerNormalization", y, own, axis=-1, epsilon=eps)
    return str(y) if groups == 1 else g.mul(g.reshape(y, 0, 0, block.inner), weight)
