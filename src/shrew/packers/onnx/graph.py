"""Building one ONNX graph: nodes, constants, weights, and what the values of one call are.

Weights are named by our model's parameters. One that was quantized is written as the codes that were chosen; a dense
one in the narrowest of bf16, fp16 and fp32 that holds its values. Nothing is rounded here. Bytes go to the file only in
`save`, one tensor after the other, so a model is never held twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from shrew.blocks.layers import rotary_tables
from shrew.folder.packed import Grid, Packed, pack_bits

MODEL, DATA = "model.onnx", "model.bin"
OPSET = 22
MS = "com.microsoft"
ALIGN = 4096  # bytes; what a page is, so that every tensor can be mapped by itself
INLINE = 256  # bytes of the largest tensor that stands in the graph itself
BLOCKS = (128, 64, 32, 16)  # inputs that can share a scale in MatMulNBits
TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16,
         torch.uint8: TensorProto.UINT8, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32}  # fmt: skip
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Blocks:
    """A matrix as MatMulNBits reads it: `codes` uint8 [rows, blocks, bytes], `scales` [rows, blocks] and packed `zeros`
    uint8 [rows, bytes] or None, each [rows, ...] for `cols` inputs in blocks of `size`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    size: int
    cols: int


def stored_bits(bits: int, size: int) -> int:
    """Bits that a code takes in the graph: 3 stand in 4, 5 to 7 in 8; and 2 in 4 where blocks of `size` have no kernel
    (ONNX Runtime would unpack the whole matrix at every call)."""
    return next(stored for stored in (2, 4, 8) if stored >= bits and (stored > 2 or size >= 32))


def block_size(group: int, cols: int) -> int:
    """The longest block that never crosses a group of `group` inputs (0: the row) nor the end of the row, 0 where there
    is none. Longer ones than 128 are no faster, and 2-bit codes have no kernel for them."""
    return next((size for size in BLOCKS if cols % size == 0 and (group or cols) % size == 0), 0)


def to_blocks(packed: Packed) -> Blocks:
    """The same codes in blocks. Scales are repeated where a group is longer than a block; symmetric codes move with
    their middle. Only for grids that have a `block_size`, and weights whose rows are outputs."""
    cols, rows, group = packed.codes.shape[1], len(packed.codes), packed.grid.group
    size = block_size(group, cols)
    bits = stored_bits(packed.grid.bits, size)
    which = torch.arange(0, cols, size) // (group or cols)
    codes = packed.codes if packed.zeros is not None else packed.codes + (2 ** (bits - 1) - middle(packed.grid))
    zeros = None if packed.zeros is None else pack_bits(packed.zeros[:, which].contiguous(), bits)
    codes = pack_bits(codes, bits).view(rows, -1, size * bits // 8)
    return Blocks(codes, packed.scales[:, which].contiguous(), zeros, bits, size, cols)


def middle(grid: Grid) -> int:
    """The code of zero on a symmetric grid."""
    return int(2 ** (grid.bits - 1))


def narrowest(value: Tensor) -> torch.dtype:
    """The narrowest type that holds every value exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(value.to(dtype).float(), value.float()):
            return dtype
    return torch.float32


@dataclass
class Weights:
    """The parameters of a model of our blocks: all of them `dense`, float32, by name; some with their codes as well.

    `effective` collects what each is stored as."""

    dense: dict[str, Tensor]
    packed: dict[str, Packed] = field(default_factory=dict)
    effective: dict[str, str] = field(default_factory=dict)

    def blocks(self, *names: str, rows: Tensor | None = None) -> Blocks | None:
        """The rows of several weights, one under the other, as blocks; None where they have no codes or their codes
        cannot stand in one matrix. `rows` picks among them; -1 is a row of zeros."""
        found = [self.packed[name] for name in names if name in self.packed]
        kinds = {(item.grid, item.codes.shape[1], item.scales.dtype) for item in found}
        if len(found) < len(names) or len(kinds) > 1 or not block_size(found[0].grid.group, found[0].codes.shape[1]):
            return None
        grid = found[0].grid
        codes, scales = torch.cat([item.codes for item in found]), torch.cat([item.scales for item in found])
        zeros = None if grid.symmetric else torch.cat([item.zeros for item in found if item.zeros is not None])
        if rows is not None:
            codes, scales = picked(codes, rows, middle(grid) if grid.symmetric else 0), picked(scales, rows, 1)
            zeros = None if zeros is None else picked(zeros, rows, 0)
        blocks = to_blocks(Packed(codes, scales, zeros, grid, tuple(codes.shape)))
        label = grid.label() + (f" in {blocks.bits} bits" if blocks.bits != grid.bits else "")
        self.effective |= dict.fromkeys(names, label)
        return blocks

    def exact(self, *names: str, rows: Tensor | None = None) -> Tensor:
        """The rows of weights, one under the other, dense, in the narrowest type that holds them."""
        value = torch.cat([self.dense[name] for name in names]) if len(names) > 1 else self.dense[names[0]]
        value = value.detach() if rows is None else picked(value.detach(), rows, 0)
        dtype = narrowest(value)
        for name in names:
            codes = f" (values of {self.packed[name].grid.label()})" if name in self.packed else ""
            self.effective[name] = SHORT[dtype] + codes
        return value.to(dtype)


def picked(values: Tensor, rows: Tensor, nothing: float) -> Tensor:
    """The rows of `values` of these numbers; `nothing` throughout where the number is -1."""
    found = values[rows.clamp(min=0)]
    found[rows < 0] = nothing
    return found


@dataclass(frozen=True)
class State:
    """What one state of a call is; in `shape`, without the batch, "capacity" stands for the length of a cache."""

    name: str
    kind: Literal["cache", "recurrent"]
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


class Graph:
    """A graph that grows node by node. Values are names."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.states: list[State] = []
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._tensors: dict[Any, str] = {}  # key -> name
        self._contents: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._views: dict[str, str] = {}  # a tensor that is the bytes of another one
        self._same: dict[Any, str] = {}
        self._count = 0
        self.align = 0  # no call may cross a multiple of it; 0: free

    @property
    def has_codes(self) -> bool:
        return any(node.op_type == "MatMulNBits" for node in self._nodes)

    # values

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """One operator; the name of its output, or their names where `outputs` is more than one. An input or output
        that is left out is ''. Attributes that are None are left out."""
        self._count += 1
        names = [f"{op}.{self._count}" + (f".{at}" if at else "") for at in range(outputs)]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op, list(inputs), names, names[0], domain=domain, **kept))
        return names[0] if outputs == 1 else names

    def rename(self, value: str, name: str) -> str:
        """The same value under the name that an output has."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name))
        return name

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> None:
        """Call `value` an output: the node that made it gets to write it under that name."""
        for node in self._nodes:
            if value in node.output:
                node.output[list(node.output).index(value)] = name
            for at, given in enumerate(node.input):
                if given == value:
                    node.input[at] = name
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[dtype], list(shape)))

    def constant(self, value: Any, dtype: torch.dtype = torch.float32) -> str:
        """A small tensor, number or list that stands in the graph; equal ones stand there once."""
        tensor = torch.as_tensor(value, dtype=dtype)
        key = (dtype, tuple(tensor.shape), tensor.numpy().tobytes())
        return self.initializer(key, tuple(tensor.shape), dtype, lambda: tensor)

    def ints(self, *values: int) -> str:
        """int64 [n]: shapes, axes, starts and ends."""
        return self.constant(list(values), torch.int64)

    def initializer(self, key: Any, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor],
                    of: str = "") -> str:  # fmt: skip
        """A tensor of the file, made by `make` when it is written; the same `key` is the same tensor. With `of`, the
        name of another one, it has no bytes of its own but reads those in its own shape."""
        if key not in self._tensors:
            name = f"weight.{len(self._tensors)}"
            self._tensors[key] = name
            self._contents[name], self._shapes[name] = make, (tuple(shape), dtype)
            if of:
                self._views[name] = of
        return self._tensors[key]

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """What `make` gives, made once and shared by all who ask under the same key."""
        if key not in self._same:
            self._same[key] = make()
        return self._same[key]

    # arithmetic

    def add(self, a: str, b: str) -> str:
        return str(self.node("Add", a, b))

    def mul(self, a: str, b: str | float) -> str:
        return str(self.node("Mul", a, b if isinstance(b, str) else self.constant(b)))

    def sigmoid(self, x: str) -> str:
        return str(self.node("Sigmoid", x))

    def silu(self, x: str) -> str:
        return str(self.node("QuickGelu", x, domain=MS, alpha=1.0))

    def cast(self, x: str, dtype: torch.dtype) -> str:
        return str(self.node("Cast", x, to=TYPES[dtype]))

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an extent, -1 is what is left."""
        return str(self.node("Reshape", x, self.ints(*shape)))

    def transpose(self, x: str, *order: int) -> str:
        return str(self.node("Transpose", x, perm=list(order)))

    def split(self, x: str, *sizes: int, axis: int = -1) -> list[str]:
        return [x] if len(sizes) == 1 else list(self.node("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis))

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        return str(self.node("Slice", x, self.ints(start), self.ints(end), self.ints(axis)))

    def capped(self, x: str, cap: float) -> str:
        """cap tanh(x / cap); x where `cap` is 0."""
        return self.mul(str(self.node("Tanh", self.mul(x, 1 / cap))), cap) if cap else x

    # weights

    def tensor(self, name: str) -> str:
        """A parameter as float32: norms, biases, taps, gains."""
        value = self.weights.exact(name)
        if value.ndim == 1:  # too small for a type of its own
            self.weights.effective[name] = "fp32"
            return self.initializer(name, value.shape, torch.float32, lambda: value.float())
        return self._wide((name, "tensor"), value.shape, value.dtype, lambda: value)

    def _wide(self, key: Any, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> str:
        """A tensor of the file as float32; ONNX Runtime folds the cast when it loads the model."""
        name = self.initializer(key, shape, dtype, make)
        return name if dtype == torch.float32 else self.once(("wide", name), lambda: self.cast(name, torch.float32))

    def linear(self, x: str, *names: str, rows: Tensor | None = None) -> str:
        """x [..., in] -> [..., out] by the `weight` of the linear layer of that name (and its `bias`); several names
        give their outputs one after the other, by one product where their weights can stand in one matrix. `rows` puts
        the outputs in another order; -1 is an output that is zero."""
        weights, biases = [f"{name}.weight" for name in names], [f"{name}.bias" for name in names]
        bias = self._bias(biases, rows) if biases[0] in self.weights.dense else ""
        blocks = self.weights.blocks(*weights, rows=rows)
        if blocks is not None:
            return self._product(x, blocks, ("codes", *names), bias)
        if len(names) > 1 and any(weight in self.weights.packed for weight in weights):
            y = str(self.node("Concat", *(self.linear(x, name) for name in names), axis=-1))
            return y if rows is None else self.reordered(y, rows)
        value = self.weights.exact(*weights, rows=rows)
        matrix = self._wide(("matrix", *names), (value.shape[1], value.shape[0]), value.dtype, value.t)
        y = str(self.node("MatMul", x, matrix))
        return self.add(y, bias) if bias else y

    def _bias(self, names: Sequence[str], rows: Tensor | None) -> str:
        value = torch.cat([self.weights.dense[name].detach() for name in names])
        value = value if rows is None else picked(value, rows, 0)
        self.weights.effective |= dict.fromkeys(names, "fp32")
        return self.initializer(("bias", *names), value.shape, torch.float32, lambda: value)

    def reordered(self, x: str, rows: Tensor) -> str:
        """x [..., n] with its last axis in the order of `rows`."""
        y = str(self.node("Gather", x, self.constant(rows.clamp(min=0), torch.int64), axis=-1))
        return self.mul(y, self.constant(rows >= 0)) if (rows < 0).any() else y

    def _product(self, x: str, blocks: Blocks, key: Any, bias: str = "") -> str:
        codes, scales, zeros = self._parts(blocks, key)
        # the accuracy level is set when the file is written
        return str(self.node("MatMulNBits", x, codes, scales, zeros, "", bias, domain=MS, K=blocks.cols,
                             N=len(blocks.codes), bits=blocks.bits, block_size=blocks.size))  # fmt: skip

    def _parts(self, blocks: Blocks, key: Any) -> tuple[str, str, str]:
        codes = self.initializer((key, "codes"), blocks.codes.shape, torch.uint8, lambda: blocks.codes)
        scales = self._wide((key, "scales"), blocks.scales.shape, blocks.scales.dtype, lambda: blocks.scales)
        if (held := blocks.zeros) is None:
            return codes, scales, ""
        return codes, scales, self.initializer((key, "zeros"), held.shape, torch.uint8, lambda: held)

    def embed(self, ids: str, name: str) -> str:
        """Rows of the table `name`.weight: ids [...] -> [..., width]. A head that is tied to it shares its bytes."""
        blocks = self.weights.blocks(f"{name}.weight")
        if blocks is not None:
            codes, scales, zeros = self._parts(blocks, ("codes", name))
            flat = (len(blocks.codes), blocks.cols * blocks.bits // 8)
            data = self.initializer(("rows", name), flat, torch.uint8, lambda: blocks.codes.view(flat), of=codes)
            return str(self.node("GatherBlockQuantized", data, ids, scales, zeros, domain=MS, bits=blocks.bits,
                                 block_size=blocks.size, gather_axis=0, quantize_axis=1))  # fmt: skip
        value = self.weights.exact(f"{name}.weight")
        table = self.initializer(("table", name), value.shape, value.dtype, lambda: value)
        rows = str(self.node("Gather", table, ids, axis=0))
        return rows if value.dtype == torch.float32 else self.cast(rows, torch.float32)

    def tied(self, x: str, name: str) -> str:
        """x [n, width] -> [n, rows] by the table that `embed` reads, of the same bytes."""
        blocks = self.weights.blocks(f"{name}.weight")
        if blocks is not None:
            return self._product(x, blocks, ("codes", name))
        value = self.weights.exact(f"{name}.weight")
        table = self._wide(("table", name), value.shape, value.dtype, lambda: value)
        return str(self.node("FusedMatMul", x, table, domain=MS, transB=1))

    def norm(self, x: str, name: str, eps: float) -> str:
        """RMS norm over the last axis with the weight `name`.weight."""
        return str(self.node("SimplifiedLayerNormalization", x, self.tensor(f"{name}.weight"), axis=-1, epsilon=eps))

    def add_norm(self, x: str, y: str, name: str, eps: float) -> tuple[str, str]:
        """The norm of x + y, and x + y."""
        found = self.node("SkipSimplifiedLayerNormalization", x, y, self.tensor(f"{name}.weight"), domain=MS,
                          outputs=4, epsilon=eps)  # fmt: skip
        self._nodes[-1].output[1] = self._nodes[-1].output[2] = ""
        return found[0], found[3]

    # the files

    def write(self, path: Path) -> dict[str, tuple[int, int]]:
        """Write the larger tensors; where each stands in the file, and its length."""
        offsets: dict[str, tuple[int, int]] = {}
        with path.open("wb") as stream:
            for name, make in self._contents.items():
                shape, dtype = self._shapes[name]
                if name in self._views or _bytes(shape, dtype) <= INLINE:
                    continue
                stream.write(b"\0" * (-stream.tell() % ALIGN))
                content = make().contiguous()
                if tuple(content.shape) != shape or content.dtype != dtype:
                    raise AssertionError(f"{name} is {content.dtype} {tuple(content.shape)}, not {dtype} {shape}")
                offsets[name] = stream.tell(), content.nbytes
                stream.write(content.reshape(-1).view(torch.uint8).numpy().data)
        return offsets | {name: offsets[of] for name, of in self._views.items() if of in offsets}

    def proto(self, offsets: dict[str, tuple[int, int]], level: int = 0) -> bytes:
        """The file of the graph, its larger tensors at those places of the data file. `level` is the accuracy level of
        every product with codes: 0 computes with float32 inputs, 4 rounds them to 8 bits, block by block."""
        for node in self._nodes:
            if node.op_type == "MatMulNBits":
                kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute("accuracy_level", level)])
        tensors = [self._tensor(name, offsets.get(name)) for name in self._contents]
        graph = helper.make_graph(self._nodes, "shrew", self._inputs, self._outputs, tensors)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="shrew")
        return bytes(model.SerializeToString())

    def _tensor(self, name: str, place: tuple[int, int] | None) -> Any:
        shape, dtype = self._shapes[name]
        tensor = TensorProto(name=name, data_type=TYPES[dtype], dims=shape)
        if place is None:
            tensor.raw_data = self._contents[name]().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return tensor
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": DATA, "offset": place[0], "length": place[1]}.items():
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
        return tensor


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


class Call:
    """The values of one call: `tokens` [batch, length] and `start` [batch], both int64, and what follows from them.

    Either batch or length is 1: a prompt in pieces, or one token for each of several rows."""

    def __init__(self, graph: Graph, context: int, eps: float) -> None:
        self.graph, self.context, self.eps = graph, context, eps
        self.tokens = graph.input("tokens", torch.int64, ("batch", "length"))
        self.start = graph.input("start", torch.int64, ("batch",))
        self._setters: list[tuple[str, str]] = []
        self.prefix = ""  # before the name of a state: tells the loops of a layer apart

    def _once(self, key: str, make: Callable[[], str]) -> str:
        return self.graph.once(("call", key), make)

    @property
    def shape(self) -> str:
        """int64 [2]: batch and length."""
        return self._once("shape", lambda: str(self.graph.node("Shape", self.tokens)))

    @property
    def length(self) -> str:
        """int64 [1]."""
        return self._once("length", lambda: str(self.graph.node("Shape", self.tokens, start=1, end=2)))

    @property
    def batch(self) -> str:
        """int64 [1]."""
        return self._once("batch", lambda: str(self.graph.node("Shape", self.tokens, start=0, end=1)))

    @property
    def steps(self) -> str:
        """int64 [length]: 0, 1, ..."""
        g = self.graph
        zero, one = g.constant(0, torch.int64), g.constant(1, torch.int64)
        return self._once("steps", lambda: str(g.node("Range", zero, g.node("Squeeze", self.length), one)))

    @property
    def positions(self) -> str:
        """int64 [batch, length]."""
        g = self.graph
        return self._once("positions", lambda: g.add(str(g.node("Unsqueeze", self.start, g.ints(1))), self.steps))

    @property
    def last(self) -> str:
        """int32 [batch]: each row's position of its last token."""
        g = self.graph
        ends = lambda: g.add(self.start, str(g.node("Sub", self.length, g.ints(1))))  # noqa: E731
        return self._once("last", lambda: g.cast(ends(), torch.int32))

    @property
    def longest(self) -> str:
        """int32 scalar: most tokens of a row, with those of this call."""
        g = self.graph
        most = lambda: g.add(str(g.node("ReduceMax", self.last, keepdims=0)), g.constant(1, torch.int32))  # noqa: E731
        return self._once("longest", most)

    @property
    def fresh(self) -> str:
        """bool [batch]: rows before which nothing came."""
        g = self.graph
        return self._once("fresh", lambda: str(g.node("Equal", self.start, g.ints(0))))

    def rotary(self, width: int, theta: float, yarn: float = 1.0, trained: int = 0,
               padded: int = 0) -> tuple[str, str]:  # fmt: skip
        """cos and sin [context, width / 2] of the channels that rotate; `padded` / 2 with angles of zero for others."""
        half = max(padded, width) // 2

        def make(which: int) -> Callable[[], Tensor]:
            def table() -> Tensor:
                found = rotary_tables(torch.arange(self.context)[None], width, theta, yarn, trained)[which][0, 0]
                rest = torch.full((self.context, half - width // 2), 1.0 - which)
                return torch.cat([found[:, : width // 2], rest], 1)

            return table

        shape, key = (self.context, half), ("rotary", width, theta, yarn, trained, half)
        cos, sin = (self.graph.initializer((*key, at), shape, torch.float32, make(at)) for at in (0, 1))
        return cos, sin

    def state(self, name: str, shape: Sequence[int | str], kind: Literal["cache", "recurrent"] = "recurrent",
              dtype: torch.dtype = torch.float32) -> tuple[str, Callable[[str], None]]:  # fmt: skip
        """A state of [batch, *shape]: its past value, and what to call with the next one."""
        name = self.prefix + name
        self.graph.states.append(State(name, kind, "float32" if dtype == torch.float32 else "int64", tuple(shape)))
        past = self.graph.input(f"past.{name}", dtype, ("batch", *shape))

        def set_next(value: str) -> None:
            self.graph.output(value, f"next.{name}", dtype, ("batch", *shape))

        return past, set_next
