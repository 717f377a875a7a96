"""`conv` as nodes: two products with one CausalConvWithState between them."""

from typing import Any

from shrew.packers.onnx.graph import MS, Call, Graph


def emit(g: Graph, block: Any, name: str, x: str, call: Call) -> str:
    """x [batch, length, width], normed -> the same shape."""
    width = block.out_proj.in_features
    before, after, x = g.split(g.linear(x, f"{name}.in_proj"), width, width, width)
    y = causal_conv(g, g.mul(before, x), f"{name}.conv.weight", f"{name}.conv.bias", f"{name}.conv", call)
    return g.linear(g.mul(after, y), f"{name}.out_proj")


def causal_conv(g: Graph, x: str, weight: str, bias: str, name: str, call: Call, activation: str | None = None) -> str:
    """Depthwise causal convolution of x [batch, length, channels] with taps [channels, (1,) K] and, if there is one, a
    bias, then `activation` ("silu"). The state `name` holds the last K - 1 inputs."""
    taps = g.weights.dense[weight]
    channels, reach = len(taps), taps.shape[-1]
    kernel = g.tensor(weight) if taps.ndim == 3 else g.reshape(g.tensor(weight), channels, 1, reach)
    own_bias = g.tensor(bias) if bias in g.weights.dense else ""
    past, set_next = call.state(name, (reach - 1, channels)) if reach > 1 else ("", None)
    y, tail = g.node("CausalConvWithState", x, kernel, own_bias, past, domain=MS, outputs=2, channels_last=1,
                     activation=activation)  # fmt: skip
    if set_next is not None:
        set_next(tail)
    return str(y)
