"""Building one ONNX graph: nodes, constants, and weights, which are named by our model's parameters.

Nothing is rounded here. Bytes go to the file only in `write`, one tensor after the other, so that no model is held
twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from shrew.folder.grids import COLUMN_ONE, ROW_ONE, quarter_octaves
from shrew.packers.onnx.kv import Steps
from shrew.packers.onnx.weights import Blocks, Weights, picked
from shrew.runtime.coded import ALIGN
from shrew.runtime.manifest import DATA

OPSET = 22
MS = "com.microsoft"
NORMS = {"SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}  # the input that is its weight
INLINE = 256  # bytes of the largest tensor that stands in the graph itself
TYPES = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16, torch.float16: TensorProto.FLOAT16,
         torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8, torch.int64: TensorProto.INT64,
         torch.int32: TensorProto.INT32}  # fmt: skip


@dataclass(frozen=True)
class State:
    """What one state of a call is; in `shape`, without the batch, "capacity" stands for the length of a cache."""

    name: str
    kind: Literal["cache", "recurrent"]
    dtype: Literal["float32", "int64", "int8", "uint8"]
    shape: tuple[int | str, ...]


class Graph:
    """A graph that grows node by node. Values are names."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.states: list[State] = []
        self.kv: dict[str, Steps] = {}  # mixer -> how its keys and values are held; in full where it has none
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._tensors: dict[Any, str] = {}  # key -> name
        self._contents: dict[str, Callable[[], Tensor]] = {}
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._views: dict[str, str] = {}  # a tensor that is the bytes of another one
        self._same: dict[Any, str] = {}
        self._columns: set[str] = set()  # steps of inputs
        self._count = 0
        self.align = 0  # no call may cross a multiple of it; 0: free

    @property
    def has_codes(self) -> bool:
        return any(node.op_type == "MatMulNBits" for node in self._nodes)

    # values

    def node(
        self, op: str, *inputs: str, domain: str = "", outputs: int = 1, unused: Sequence[int] = (), **attributes: Any
    ) -> Any:
        """One operator; the name of its output, or their names where `outputs` is more than one, those at `unused`
        empty. An input that is left out is '', an attribute that is None is left out."""
        self._count += 1
        names = [f"{op}.{self._count}" + (f".{at}" if at else "") for at in range(outputs)]
        given = ["" if at in unused else name for at, name in enumerate(names)]
        kept = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(helper.make_node(op, list(inputs), given, names[0], domain=domain, **kept))
        return names[0] if outputs == 1 else given

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
        if any(f"{name}.low.weight" in self.weights.dense for name in names):  # two factors
            parts = [self._one(x, name) for name in names]
            y = parts[0] if len(parts) == 1 else str(self.node("Concat", *parts, axis=-1))
            return y if rows is None else self.reordered(y, rows)
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

    def _one(self, x: str, name: str) -> str:
        """x through one linear layer, or through its two factors."""
        factored = f"{name}.low.weight" in self.weights.dense
        return self.linear(self.linear(x, f"{name}.low"), f"{name}.high") if factored else self.linear(x, name)

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
        x = self._by_columns(x, blocks)
        # the accuracy level is set when the file is written
        return str(self.node("MatMulNBits", x, codes, scales, zeros, "", bias, domain=MS, K=blocks.cols,
                             N=len(blocks.codes), bits=blocks.bits, block_size=blocks.size))  # fmt: skip

    def _parts(self, blocks: Blocks, key: Any) -> tuple[str, str, str]:
        codes = self.initializer((key, "codes"), blocks.codes.shape, torch.uint8, lambda: blocks.codes)
        if blocks.columns is not None:
            each = self._steps(blocks.scales, ROW_ONE)
            shape = self.ints(len(blocks.codes), blocks.codes.shape[1])
            return codes, self.once(("steps", codes), lambda: str(self.node("Expand", each, shape))), ""
        scales = self._wide((key, "scales"), blocks.scales.shape, blocks.scales.dtype, lambda: blocks.scales)
        if (held := blocks.zeros) is None:
            return codes, scales, ""
        return codes, scales, self.initializer((key, "zeros"), held.shape, torch.uint8, lambda: held)

    def _steps(self, exponents: Tensor, one: int) -> str:
        """Steps as `Product` stores them, as float32; ONNX Runtime computes them when it loads the model."""
        table = self.constant(quarter_octaves(torch.arange(256) - one))
        held = self.initializer(("exponents", one, exponents.numpy().tobytes()), tuple(exponents.shape), torch.uint8,
                                lambda: exponents)  # fmt: skip
        return self.once(("wide", held), lambda: str(self.node("Gather", table, self.cast(held, torch.int32))))

    def _by_columns(self, x: str, blocks: Blocks) -> str:
        """x [..., in] times the step of each input, where a matrix has such other than 1."""
        if blocks.columns is None or bool((blocks.columns == COLUMN_ONE).all()):
            return x
        columns = self._steps(blocks.columns, COLUMN_ONE)
        self._columns.add(columns)
        return self.once(("by columns", x, columns), lambda: self.mul(x, columns))

    def embed(self, ids: str, name: str) -> str:
        """Rows of the table `name`.weight: ids [...] -> [..., width]. A head that is tied to it shares its bytes."""
        blocks = self.weights.blocks(f"{name}.weight")
        if blocks is not None:
            codes, scales, zeros = self._parts(blocks, ("codes", name))
            flat = (len(blocks.codes), blocks.cols * blocks.bits // 8)
            data = self.initializer(("rows", name), flat, torch.uint8, lambda: blocks.codes.view(flat), of=codes)
            found = str(self.node("GatherBlockQuantized", data, ids, scales, zeros, domain=MS, bits=blocks.bits,
                                  block_size=blocks.size, gather_axis=0, quantize_axis=1))  # fmt: skip
            return self._by_columns(found, blocks)
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
                          outputs=4, unused=(1, 2), epsilon=eps)  # fmt: skip
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

    def tables(self, offsets: dict[str, tuple[int, int]]) -> list[tuple[int, int, int]]:
        """What stands in the data file: offset, rows and bytes a row of each tensor, in order."""
        return [(at, self._shapes[name][0][0], length // self._shapes[name][0][0])
                for name, (at, length) in offsets.items() if name not in self._views]  # fmt: skip

    def proto(self, offsets: dict[str, tuple[int, int]], level: int = 0) -> bytes:
        """The file of the graph, its larger tensors at those places of the data file. `level` is the accuracy level of
        every product with codes: 0 computes with float32 inputs, 4 rounds them to 8 bits, block by block."""
        self._settle()
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

    def _settle(self) -> None:
        """Let a norm multiply by the steps of the product that it feeds, where nothing else reads what it gives."""
        known, first, rest = set(self._contents), list[Any](), list[Any]()
        for node in self._nodes:  # what depends on weights alone goes first; it is computed when the model is loaded
            fixed = bool(node.input) and known.issuperset(node.input)
            known.update(node.output if fixed else ())
            (first if fixed else rest).append(node)
        made = {node.output[0]: node for node in rest}
        uses = Counter(name for node in rest for name in node.input)
        uses.update(item.name for item in self._outputs)
        for node in [node for node in rest if node.op_type == "Mul" and node.input[1] in self._columns]:
            value, steps = node.input
            giver = made.get(value)
            if giver is None or uses[value] > 1 or giver.op_type not in NORMS:
                continue
            at = NORMS[giver.op_type]
            first.append(helper.make_node("Mul", [giver.input[at], steps], [f"{node.name}.gain"]))
            giver.input[at], giver.output[0] = f"{node.name}.gain", node.output[0]
            rest.remove(node)
        self._nodes = first + rest

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
