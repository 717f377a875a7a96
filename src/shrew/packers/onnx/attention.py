"""`attention` and `window` as nodes: one product for queries, keys and values, one GroupQueryAttention, one back.

The operator wants heads of a multiple of 8 channels, and rotates a multiple of 16. Others are laid out anew: rows of
the projections move (scores do not care about the order of channels), channels of zeros fill up, and the tables turn
what is not rotary by no angle. A window's state is the operator's own: the keys and values of the last positions.

H query heads, K key-value heads, D head width, P the width that the operator gets.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shrew.packers.onnx.call import Call
from shrew.packers.onnx.graph import MS, Graph
from shrew.packers.onnx.kv import Steps
from shrew.packers.onnx.weights import picked


@dataclass(frozen=True)
class Layout:
    """`turned` [P] holds the channel of queries and keys at each place, `plain` [P] that of values; -1: zeros."""

    turned: Tensor
    plain: Tensor
    width: int

    @property
    def padded(self) -> int:
        return len(self.plain)

    @property
    def usual(self) -> bool:
        return bool((self.turned == torch.arange(self.width)).all()) if self.padded == self.width else False


def layout(width: int, rotated: int) -> Layout:
    """Where the channels of a head of `width` go, of which the first `rotated` turn, channel i with i + rotated / 2."""
    if width % 8 == 0 and rotated % 16 == 0:
        same = torch.arange(width)
        return Layout(same, same, width)
    padded = -(-width // 16) * 16
    turned, half = torch.full((padded,), -1), rotated // 2
    turned[:half], turned[padded // 2 : padded // 2 + half] = torch.arange(half), torch.arange(half, rotated)
    free = (turned < 0).nonzero()[:, 0]
    turned[free[: width - rotated]] = torch.arange(rotated, width)
    plain = torch.cat([torch.arange(width), torch.full((padded - width,), -1)])
    return Layout(turned, plain, width)


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    spec, heads, kv = block.spec, block.heads, block.kv_heads
    place = layout(block.head_width, block.rotated)
    padded = place.padded
    scale = _scale(g, block, name)
    parts = [f"{name}.{part}_proj" for part in "qkv"]
    rows = torch.cat([moved(place.turned, heads + kv, place.width), moved(place.plain, kv, place.width, heads + kv)])
    qkv = _normed(g, block, name, g.linear(x, *parts, rows=None if place.usual else rows), place)
    if spec.value_embeddings:
        qkv = [*g.split(qkv[0], (heads + kv) * padded, kv * padded), *qkv[1:]] if len(qkv) == 1 else qkv
        qkv = [*qkv[:-1], g.add(qkv[-1], _from_tokens(g, block, name, place, call))]
    if len(qkv) == 2:
        qkv = [str(g.node("Concat", *qkv, axis=-1))]
    query, key, value = qkv if len(qkv) == 3 else (*qkv, "", "")
    window = getattr(block, "window", 0)
    window = 0 if window >= call.context else window
    rolling = window > 0 and not call.whole
    held = None if rolling or call.whole else g.kv.get(name)
    shape = (kv, window if rolling else "capacity", padded // 2 if held and held.bits == 4 else padded)
    kind: Any = "recurrent" if rolling else "cache"
    dtype = {None: torch.float32, 8: torch.int8, 4: torch.uint8}[held.bits if held else None]
    (keys, next_keys), (values, next_values) = (call.state(f"{name}.{part}", shape, kind, dtype) for part in "kv")
    tables = ("", "")
    if block.rotated:
        wide = padded if not place.usual else block.rotated
        tables = call.rotary(block.rotated, spec.rope_theta, spec.yarn, spec.yarn_context or 0, wide)
    sinks = g.tensor(f"{name}.sinks") if spec.sinks else ""
    y, new_keys, new_values = g.node(
        "GroupQueryAttention", query, key, value, keys, values, call.last, call.longest, *tables, "", "", sinks,
        *_steps(g, held, place), **_held(held), domain=MS, outputs=3, num_heads=heads, kv_num_heads=kv,
        do_rotary=int(block.rotated > 0), scale=scale,
        softcap=spec.softcap, local_window_size=window or -1, sliding_window_cache=int(rolling))  # fmt: skip
    next_keys(new_keys)
    next_values(new_values)
    if padded != place.width:
        y = g.slice(g.reshape(y, 0, 0, heads, padded), 0, place.width, 3)
        y = g.reshape(y, 0, 0, heads * place.width)
    if spec.gate:
        y = g.mul(y, g.sigmoid(g.linear(x, f"{name}.g_proj")))
    return g.linear(y, f"{name}.o_proj")


def _scale(g: Graph, block: Any, name: str) -> float:
    """What is left for the operator to multiply scores by: a power of two goes into the queries, where it is exact.
    (ONNX Runtime has a faster product for one row of queries, but only of factor 1.)"""
    mantissa, exponent = math.frexp(block.scale)
    if mantissa != 0.5 or exponent == 1:
        return float(block.scale)

    def moved_in() -> str:
        if block.spec.qk_norm == "none":
            return "moved" if g.weights.scale(f"{name}.q_proj", exponent - 1) else ""
        g.weights.dense[f"{name}.q_norm.weight"] = g.weights.dense[f"{name}.q_norm.weight"].detach() * block.scale
        return "moved"

    return 1.0 if g.once(("scale", name), moved_in) else float(block.scale)  # layers that loop come here again


def _steps(g: Graph, held: Steps | None, place: Layout) -> list[str]:
    """float32 [K * P] each: steps of keys and values in the order of the operator's channels, 1 for those of zeros."""
    if held is None:
        return []
    laid = ((held.keys, place.turned), (held.values, place.plain))
    return [g.constant(torch.where(order < 0, 1.0, steps[:, order]).flatten()) for steps, order in laid]


def _held(held: Steps | None) -> dict[str, Any]:
    kind = None if held is None else "PER_CHANNEL"
    return {"kv_cache_bit_width": held and held.bits, "k_quant_type": kind, "v_quant_type": kind}


def moved(order: Tensor, heads: int, width: int, first: int = 0) -> Tensor:
    """The rows of `heads` heads from the `first` on, each in this order."""
    start = (first + torch.arange(heads)[:, None]) * width
    return torch.where(order < 0, -1, order + start).flatten()


def _normed(g: Graph, block: Any, name: str, qkv: str, place: Layout) -> list[str]:
    """Queries, keys and values after QK-norm: in one value, in two (values apart) or in three.

    A mean over zeros as well is smaller by D / P; weight and epsilon make up for that."""
    heads, kv, padded, kind = block.heads, block.kv_heads, place.padded, block.spec.qk_norm
    if kind == "none":
        return [qkv]
    share = place.width / padded
    eps = block.q_norm.eps * share
    weights = [g.weights.dense[f"{name}.{part}_norm.weight"].detach() * share**0.5 for part in "qk"]
    g.weights.effective |= {f"{name}.{part}_norm.weight": "fp32" for part in "qk"}

    def norm(y: str, weight: Tensor, part: str) -> str:
        scale = g.initializer((name, part), weight.shape, torch.float32, lambda: weight)
        return str(g.node("SimplifiedLayerNormalization", y, scale, axis=-1, epsilon=eps))

    if kind == "all":
        q, k, v = g.split(qkv, heads * padded, kv * padded, kv * padded)
        sizes = {"q": heads, "k": kv}
        laid = [picked(w, moved(place.turned, n, place.width), 0) for w, n in zip(weights, sizes.values(), strict=True)]
        return [norm(q, laid[0], "q_norm"), norm(k, laid[1], "k_norm"), v]
    qk, v = g.split(qkv, (heads + kv) * padded, kv * padded)
    q_weight, k_weight = (picked(weight, place.turned, 0).expand(count, -1)
                          for weight, count in zip(weights, (heads, kv), strict=True))  # fmt: skip
    each = norm(g.reshape(qk, 0, 0, heads + kv, padded), torch.cat([q_weight, k_weight]), "qk_norm")
    return [g.reshape(each, 0, 0, (heads + kv) * padded), v]


def _from_tokens(g: Graph, block: Any, name: str, place: Layout, call: Call) -> str:
    """What is added to the values: the tokens' rows of a table, each head times its gate."""
    gate = g.weights.dense[f"{name}.value_gate"].detach().repeat_interleave(place.width)
    g.weights.effective[f"{name}.value_gate"] = "fp32"
    rows = g.mul(g.embed(call.tokens, f"{name}.value_table"), g.constant(gate))
    if place.padded == place.width:
        return rows
    heads = g.reshape(rows, 0, 0, block.kv_heads, place.width)
    wide = str(g.node("Pad", heads, g.ints(0, 0, 0, 0, 0, 0, 0, place.padded - place.width)))
    return g.reshape(wide, 0, 0, block.kv_heads * place.padded)
