"""`attention` as nodes: one packed product for queries, keys and values, one GroupQueryAttention, one product back."""

from typing import Any

from shrew.packers.onnx.graph import MS, Call, Graph


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    spec = block.spec
    qkv = g.linear(x, *(f"{name}.{part}_proj" for part in "qkv"))
    cos, sin = call.rotary(block.rotated, spec.rope_theta, spec.yarn, spec.yarn_context or 0)
    shape = (block.kv_heads, "capacity", block.head_width)
    (keys, next_keys), (values, next_values) = (call.state(f"{name}.{part}", shape, "cache") for part in ("k", "v"))
    y, new_keys, new_values = g.node(
        "GroupQueryAttention", qkv, "", "", keys, values, call.last, call.longest, cos, sin, domain=MS, outputs=3,
        num_heads=block.heads, kv_num_heads=block.kv_heads, do_rotary=1, scale=block.scale)  # fmt: skip
    next_keys(new_keys)
    next_values(new_values)
    return g.linear(y, f"{name}.o_proj")
