"""`memory` as nodes: local attention on the keys and values of one segment, and a memory of those before it.

No call crosses the end of a segment (the manifest's `align`), so its tokens all read one memory. What a segment adds is
pending until a call begins the next one. GroupQueryAttention sees the place inside the segment as the position, so it
turns queries and keys by it and leaves alone what an earlier segment left in the state. `accumulate` is a way to
compute the same, of no use here. A call of whole texts has all segments beside each other instead, as rows.

H query heads, G key-value heads, D head width, C segment.
"""

from math import gcd
from typing import Any

import torch

from shrew.blocks.layers import rotary_tables
from shrew.blocks.memory import EPS
from shrew.packers.onnx.attention import layout, moved
from shrew.packers.onnx.call import Call
from shrew.packers.onnx.graph import MS, Graph
from shrew.packers.onnx.linear import normed, vector


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    heads, kv, width = block.heads, block.kv_heads, block.head_width
    if not call.whole:
        g.align = gcd(g.align, block.spec.segment)
    qkv = g.linear(x, *(f"{name}.{part}_proj" for part in "qkv"))
    qk, v = g.split(qkv, (heads + kv) * width, kv * width)
    if block.q_norm is not None:
        g.weights.effective |= {f"{name}.{part}_norm.weight": "fp32" for part in "qk"}
        weights = (g.weights.dense[f"{name}.{part}_norm.weight"].expand(count, -1)
                   for part, count in (("q", heads), ("k", kv)))  # fmt: skip
        scale = vector(g, (name, "qk_norm"), torch.cat([*weights]))
        qk = normed(g, qk, scale, (heads + kv, width), block.q_norm.eps)
        qkv = str(g.node("Concat", qk, v, axis=-1))
    local = _local(g, block, name, qkv, call)
    far = (_far_whole if call.whole else _far)(g, block, name, qk, v, call)
    gate = g.weights.dense[f"{name}.beta"].detach().float().sigmoid()
    gate = gate.repeat_interleave(width) if block.spec.gate == "head" else gate
    g.weights.effective[f"{name}.beta"] = "fp32"
    near = g.mul(local, vector(g, (name, "near"), 1 - gate))
    return g.linear(g.add(near, g.mul(far, vector(g, (name, "far"), gate))), f"{name}.o_proj")


def _local(g: Graph, block: Any, name: str, qkv: str, call: Call) -> str:
    """Attention inside the segment: qkv [batch, length, (H + 2 G) D] -> [batch, length, H D]."""
    heads, kv, width, segment = block.heads, block.kv_heads, block.head_width, block.spec.segment
    place = layout(width, width)
    padded, whole = place.padded, call.whole
    if not place.usual:  # the operator knows no such heads
        turned, plain = moved(place.turned, heads + kv, width), moved(place.plain, kv, width, heads + kv)
        qkv = g.reordered(qkv, torch.cat([turned, plain]))

    def last() -> str:
        ends = g.add(_phase(g, segment, call), str(g.node("Sub", call.length, g.ints(1))))
        return g.cast(ends, torch.int32)

    def full() -> str:
        rows = g.node("Shape", qkv, start=0, end=1)
        return str(g.node("Expand", g.constant(segment - 1, torch.int32), rows))

    qkv = g.reshape(_in_segments(g, qkv, segment, call), -1, segment, (heads + 2 * kv) * padded) if whole else qkv
    cos, sin = rotary_tables(torch.arange(segment)[None], width, block.spec.rope_theta)
    tables = []
    for part, (table, rest) in {"cos": (cos, 1.0), "sin": (sin, 0.0)}.items():
        wide = torch.full((segment, padded // 2), rest)
        wide[:, : width // 2] = table[0, 0, :, : width // 2]
        tables.append(vector(g, ("memory", part, segment, width, block.spec.rope_theta), wide))
    shape: tuple[int, ...] = (kv, segment, padded)
    (keys, next_keys), (values, next_values) = (
        call.state(f"{name}.{part}", shape, "cache" if whole else "recurrent") for part in ("k", "v"))
    ends = g.once(("full segments", segment), full) if whole else g.once(("segment last", segment), last)
    y, new_keys, new_values = g.node(
        "GroupQueryAttention", qkv, "", "", keys, values, ends,
        g.constant(segment, torch.int32), *tables, domain=MS, outputs=3, num_heads=heads, kv_num_heads=kv, do_rotary=1,
        scale=width**-0.5)  # fmt: skip
    next_keys(new_keys)
    next_values(new_values)
    if padded != width:
        y = g.reshape(g.slice(g.reshape(y, 0, 0, heads, padded), 0, width, 3), 0, 0, heads * width)
    return _joined(g, y, heads * width, call) if whole else str(y)


def _in_segments(g: Graph, x: str, segment: int, call: Call) -> str:
    """x [batch, length, n] -> [batch, segments, segment, n], filled up with zeros."""
    spare = g.once(("segment spare", segment),
                   lambda: str(g.node("Mod", g.node("Neg", call.length), g.ints(segment))))  # fmt: skip
    pads = g.once(("segment pads", segment),
                  lambda: str(g.node("Concat", g.ints(0, 0, 0, 0), spare, g.ints(0), axis=0)))  # fmt: skip
    filled = str(g.node("Pad", x, pads))
    shape = g.node("Concat", call.batch, g.ints(-1, segment), g.node("Shape", x, start=2, end=3), axis=0)
    return str(g.node("Reshape", filled, shape))


def _joined(g: Graph, x: str, width: int, call: Call) -> str:
    """Segments one after the other again -> [batch, length, width]."""
    whole = g.node("Reshape", x, g.node("Concat", call.batch, g.ints(-1, width), axis=0))
    return str(g.node("Slice", whole, g.ints(0), call.length, g.ints(1)))


def _far_whole(g: Graph, block: Any, name: str, qk: str, v: str, call: Call) -> str:
    """As `_far`, of all segments at once: each reads the sum of those before it."""
    heads, kv, width, segment = block.heads, block.kv_heads, block.head_width, block.spec.segment
    share = heads // kv
    qk = g.add(str(g.node("Elu", _in_segments(g, qk, segment, call))), g.constant(1.0))
    q, k = g.split(qk, heads * width, kv * width)
    k = g.transpose(g.reshape(k, 0, 0, segment, kv, width), 0, 1, 3, 4, 2)  # [batch, segments, G, D, C]
    values = g.reshape(_in_segments(g, v, segment, call), 0, 0, segment, kv, width)
    wide = g.node("Pad", values, g.ints(*[0] * 9, 1), g.constant(1.0))
    sums = g.node("MatMul", k, g.transpose(str(wide), 0, 1, 3, 2, 4))
    memory = g.node("CumSum", sums, g.constant(1, torch.int64), exclusive=1)
    q = g.transpose(g.reshape(q, 0, 0, segment, kv * share, width), 0, 1, 3, 2, 4)
    q = g.reshape(q, 0, 0, kv, share * segment, width)
    read = str(g.node("MatMul", q, memory))  # [batch, segments, G, H / G * C, D + 1]
    read = g.transpose(g.reshape(read, 0, 0, heads, segment, width + 1), 0, 1, 3, 2, 4)
    total, weights = g.split(read, width, 1)
    return _joined(g, str(g.node("Div", total, g.add(weights, g.constant(EPS)))), heads * width, call)


def _far(g: Graph, block: Any, name: str, qk: str, v: str, call: Call) -> str:
    """What the memory of earlier segments says: qk [batch, length, (H + G) D], v [batch, length, G D], not rotated ->
    [batch, length, H D]."""
    heads, kv, width, segment = block.heads, block.kv_heads, block.head_width, block.spec.segment
    shape = (kv, width, width + 1)
    (memory, next_memory), (pending, next_pending) = (call.state(f"{name}.{part}", shape) for part in ("m", "pending"))

    def first() -> str:
        begins = g.cast(str(g.node("Equal", _phase(g, segment, call), g.ints(0))), torch.float32)
        return g.reshape(begins, -1, 1, 1, 1)

    ended = g.mul(pending, g.once(("segment first", segment), first))
    memory, pending = g.add(memory, ended), str(g.node("Sub", pending, ended))
    q, k = g.split(g.add(str(g.node("Elu", qk)), g.constant(1.0)), heads * width, kv * width)
    ones = g.node("Pad", g.reshape(v, 0, 0, kv, width), g.ints(0, 0, 0, 0, 0, 0, 0, 1), g.constant(1.0))
    wide = g.reshape(str(ones), 0, 0, kv * (width + 1))
    # adds the product of keys and values to the state; what it reads on the way is of no use
    _, new = g.node("LinearAttention", k, k, wide, pending, domain=MS, outputs=2, update_rule="linear", q_num_heads=kv,
                    kv_num_heads=kv, scale=1.0)  # fmt: skip
    next_pending(new)
    share = heads // kv
    q = g.transpose(g.reshape(q, 0, 0, kv, share, width), 0, 2, 3, 1, 4)  # [batch, G, H / G, length, D]
    read = str(g.node("MatMul", q, g.node("Unsqueeze", memory, g.ints(2))))
    next_memory(memory)
    sums, weights = g.split(g.transpose(read, 0, 3, 1, 2, 4), width, 1)
    return g.reshape(str(g.node("Div", sums, g.add(weights, g.constant(EPS)))), 0, 0, heads * width)


def _phase(g: Graph, segment: int, call: Call) -> str:
    """int64 [batch]: the place of each row's first new token inside its segment."""
    return g.once(("segment phase", segment), lambda: str(g.node("Mod", call.start, g.ints(segment))))
