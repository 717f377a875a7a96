"""ONNX graphs: what every weight is stored as, from the graph and its initializers' headers; weights stay on disk."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import torch

from shrew.audit.claims import by_name
from shrew.audit.held import Audit, Finding, Held, Span, count, named, plural, printable
from shrew.errors import FolderError
from shrew.folder.packed import unpack_bits
from shrew.runtime.manifest import CODED

WIDTHS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT64": 64, "INT32": 32, "INT16": 16, "UINT16": 16,
          "INT8": 8, "UINT8": 8, "BOOL": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4,
          "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "UINT32": 32,
          "UINT64": 64}  # fmt: skip
DENSE = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
LARGEST = (1 << 31) - 1  # bytes of a protobuf file
DEEPEST = 50
PRODUCTS = ("MatMul", "MatMulNBits", "Gemm", "Conv", "Einsum", "MoE")
SAME = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
CHUNK = 1 << 22  # weights decoded at once
PLACES = ("model.onnx", "decoder_model_merged.onnx", "onnx/model.onnx")


@dataclass(frozen=True)
class Stored:
    """An initializer's header."""

    name: str
    type: str
    shape: tuple[int, ...]
    span: Span
    raw: bytes = field(default=b"", repr=False)  # of one that lies inside the graph's file


def find(folder: Path) -> Path | None:
    """The graph of a folder: the usual name, or the only one there is."""
    for name in PLACES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.onnx"))
    if len(found) > 1:
        raise FolderError(f"{folder} holds {len(found)} graphs ({named(item.name for item in found)}); name one.")
    return found[0] if found else None


def audit(path: Path) -> Audit:
    """Raises FolderError for a file that is no ONNX graph or points outside of its folder."""
    try:
        if path.stat().st_size > LARGEST:
            raise FolderError(f"{path} is larger than any ONNX graph can be; its weights belong into a file beside it.")
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from None
    except FolderError:
        raise
    except Exception as error:  # protobuf's own
        reason = printable(" ".join(str(error).split()), 150)
        raise FolderError(f"{path} is no ONNX graph that can be read ({reason}); fetch it again.") from None
    graphs = list(_graphs(path, model))
    stored = {item.name: item for item in _initializers(path, graphs)}
    held, levels = _weights(graphs, stored)
    if not model.graph.node or not held:
        raise FolderError(f"{path} is no ONNX graph with weights; give the file that holds the model.")
    beside = {item.span.file for item in stored.values()} | {path}
    found = Audit(path, "ONNX", sorted(held, key=lambda item: item.name), sum(item.stat().st_size for item in beside))
    name = path.parent if path.name in PLACES else path
    said, lies = by_name(name, found.held)
    if said:
        found.claims.append(f"name: {said}")
    if model.producer_name:
        found.claims.append(f"made by {printable(model.producer_name)}")
    found.findings += [*lies, *_findings(found, levels)]
    return found


def _graphs(path: Path, model: Any) -> Iterator[Any]:
    """The graph and those inside its nodes."""
    waiting = [(model.graph, 0)]
    while waiting:
        graph, depth = waiting.pop()
        if depth > DEEPEST:
            raise FolderError(f"{path} has graphs inside graphs without end; it is hostile.")
        texts = [text for node in graph.node
                 for text in (node.op_type, node.domain, node.name, *node.input, *node.output)]  # fmt: skip
        texts += [text for item in graph.initializer for text in (
            item.name, *(part for pair in item.external_data for part in (pair.key, pair.value)))]  # fmt: skip
        if not all(isinstance(text, str) for text in texts):  # bytes where a text is no UTF-8
            raise FolderError(f"{path} has names that are no text; it is damaged, fetch it again.")
        yield graph
        for node in graph.node:
            for item in node.attribute:
                inner = [item.g] if item.HasField("g") else list(item.graphs)
                waiting += [(part, depth + 1) for part in inner]


def _initializers(path: Path, graphs: list[Any]) -> Iterator[Stored]:
    for graph in graphs:
        for item in graph.initializer:
            known = onnx.TensorProto.DataType
            name = known.Name(item.data_type) if item.data_type in known.values() else ""
            shape = tuple(item.dims)
            if name not in WIDTHS or any(not 0 <= extent < 2**40 for extent in shape) or count(shape) >= 2**60:
                raise FolderError(f"{path}: initializer '{printable(item.name)}' has no type and shape that can be; "
                                  "fetch it again.")  # fmt: skip
            needed = -(-count(shape) * WIDTHS[name] // 8)
            if item.data_location == onnx.TensorProto.EXTERNAL:
                yield Stored(item.name, name, shape, _outside(path, item, needed))
                continue
            inside = len(item.raw_data) or needed * _listed(item, name, count(shape))
            if inside != needed:
                raise FolderError(f"{path}: initializer '{printable(item.name)}' has {inside} bytes and needs "
                                  f"{needed}; the file is damaged, fetch it again.")  # fmt: skip
            yield Stored(item.name, name, shape, Span(path, -1, needed), item.raw_data)


def _listed(item: Any, name: str, weights: int) -> bool:
    """Whether as many numbers stand in one of the lists, which is the other way to store them."""
    lists = (item.float_data, item.int32_data, item.int64_data, item.double_data, item.uint64_data)
    packed = max(1, 8 // WIDTHS[name])
    return any(len(numbers) in (weights, -(-weights // packed)) for numbers in lists)


def _outside(path: Path, item: Any, needed: int) -> Span:
    """Where a weight lies in a file beside the graph, which has to be one in the same folder."""
    said = {pair.key: pair.value for pair in item.external_data}
    place = PurePosixPath(said.get("location", ""))
    where = f"{path}: initializer '{printable(item.name)}'"
    if not place.name or place.is_absolute() or ".." in place.parts or "\\" in str(place) or "\0" in str(place):
        raise FolderError(f"{where} lies in {printable(str(place))!r}, which is no file beside the graph.")
    file = path.parent / place
    if not file.is_file() and (path.parent / CODED).is_file():
        raise FolderError(f"{path.parent} holds its weights coded; audit the model it was packed from, or pack it "
                          "without --coded.")  # fmt: skip
    if not file.is_file():
        raise FolderError(f"{where} lies in {printable(str(place))}, which is missing; fetch that file too.")
    numbers = [said.get("offset", "0"), said.get("length", str(needed))]
    if not all(number.isascii() and number.isdecimal() and len(number) < 19 for number in numbers):
        raise FolderError(f"{where} has a place that is no number; fetch it again.")
    start, length = map(int, numbers)
    if length != needed or start + length > file.stat().st_size:
        raise FolderError(f"{where} needs {needed} bytes at {start} of {file.name}, which has "
                          f"{file.stat().st_size}; it is truncated, fetch it again.")  # fmt: skip
    return Span(file, start, length)


def _weights(graphs: list[Any], stored: dict[str, Stored]) -> tuple[list[Held], set[int]]:
    """Weights put together from the inputs of the nodes that unpack them; and the accuracy levels of MatMulNBits."""
    found: dict[str, Held] = {}
    parts: set[str] = set()
    tables: set[str] = set()
    outputs = {output.name for graph in graphs for output in graph.output}
    levels: set[int] = set()
    stored = stored | _passed_on(graphs, stored)
    for graph in graphs:
        for node in graph.node:
            reader = READERS.get(node.op_type)
            weight = reader(node, stored) if reader else None
            if node.op_type in ("Gather", "GatherBlockQuantized") and node.input and node.input[0] in stored:
                tables.add(node.input[0])
            if weight is not None:
                found.setdefault(weight.name, weight)
                parts |= {stored[name].name for name in node.input if name in stored}
            if node.op_type == "MatMulNBits":
                levels.add(_attribute(node, "accuracy_level"))
    found |= {one.name: _dense(one) for one in stored.values() if one.name not in parts}
    heads = {name for graph in graphs for node in graph.node if set(node.output) & outputs and "MatMul" in node.op_type
             for name in node.input}  # fmt: skip
    multiplied = {stored[name].name for graph in graphs for node in graph.node if node.op_type.endswith(PRODUCTS)
                  for name in node.input if name in stored}  # fmt: skip
    held: list[Held] = []
    seen: set[Span] = set()
    for name, item in sorted(found.items(), key=lambda pair: pair[0] not in tables):
        role = item.role
        if item.spans[0].start >= 0 and item.spans[0] in seen:  # the same bytes under another name, as tied heads are
            continue
        seen.add(item.spans[0])
        if name in tables and role != "other":
            role = "embedding"
        elif role == "linear" and not item.quantized and name not in multiplied:
            role = "other"  # tables of rotary embeddings, masks
        elif name in heads and role == "linear":
            role = "head"
        held.append(replace(item, name=printable(name), role=role))
    return held, levels


def _passed_on(graphs: list[Any], stored: dict[str, Stored]) -> dict[str, Stored]:
    """Initializers under the names of the outputs of nodes that only cast or reshape them."""
    found: dict[str, Stored] = {}
    for graph in graphs:
        for node in graph.node:  # in the order of their work
            if node.op_type in SAME and node.input and node.output and node.domain in ("", "ai.onnx"):
                first = node.input[0]
                if (source := found.get(first) or stored.get(first)) is not None and node.output[0] not in stored:
                    found[node.output[0]] = source
    return found


def _dense(item: Stored) -> Held:
    kind, width = DENSE.get(item.type, item.type.lower()), WIDTHS[item.type]
    quantized = width <= 8 and len(item.shape) > 1 and item.type != "BOOL"
    return Held(item.name, item.shape, kind, width, (item.span,), quantized)


def _attribute(node: Any, name: str, default: int = 0) -> int:
    """A whole number that a node is set to."""
    return next((int(item.i) for item in node.attribute if item.name == name and item.HasField("i")), default)


def _inputs(node: Any, stored: dict[str, Stored], first: int) -> list[Stored]:
    """The initializers among the inputs from one on."""
    return [stored[name] for name in node.input[first:] if name in stored]


def _matmul(node: Any, stored: dict[str, Stored]) -> Held | None:
    """MatMulNBits: codes [outputs, blocks, bytes] of `bits`, scales, zero points."""
    if len(node.input) < 3 or node.input[1] not in stored:
        return None
    outputs, inputs, bits, block = (_attribute(node, key) for key in ("N", "K", "bits", "block_size"))
    codes = stored[node.input[1]]
    blocks = -(-inputs // block) if block > 0 else 0
    right = 0 < bits <= 8 and min(outputs, inputs) > 0 and len(codes.shape) > 0
    if not right or count(codes.shape) != outputs * blocks * (block * bits // 8):
        raise FolderError(f"node '{printable(node.name)}': codes of {list(codes.shape)} are no {outputs} x {inputs} "
                          f"weights of {bits} bits; fetch the graph again.")  # fmt: skip
    listed = [stored[name] for name in node.input[1:5] if name in stored]
    zeros = "asym" if len(node.input) > 3 and node.input[3] in stored else "sym"
    return Held(codes.name, (outputs, inputs), f"int{bits} g{block} {zeros}", float(bits),
                tuple(item.span for item in listed), True, block,
                groups=partial(_codes, codes, bits, block))  # fmt: skip


def _codes(stored: Stored, bits: int, block: int) -> Iterator[np.ndarray]:
    """Codes uint8 [n, block] of blocks that are packed one by one."""
    size = block * bits // 8
    inside = stored.span.start < 0
    data = np.frombuffer(stored.raw, np.uint8) if inside else np.memmap(
        stored.span.file, np.uint8, "r", stored.span.start, (stored.span.bytes,))  # fmt: skip
    data = data[: len(data) // size * size].reshape(-1, size)
    step = max(1, CHUNK // block)
    for at in range(0, len(data), step):
        yield unpack_bits(torch.from_numpy(np.array(data[at : at + step])), bits, block).numpy()


def _gather(node: Any, stored: dict[str, Stored]) -> Held | None:
    """GatherBlockQuantized: an embedding whose rows are unpacked when they are asked for."""
    if len(node.input) < 3 or node.input[0] not in stored:
        return None
    data = stored[node.input[0]]
    bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 128)
    if block < 8:
        raise FolderError(f"node '{printable(node.name)}' has blocks of {block}; fetch the graph again.")
    shape = data.shape
    if data.type == "UINT8" and 0 < bits <= 8 and shape:
        shape = (*shape[:-1], shape[-1] * 8 // bits)
    else:
        bits = WIDTHS[data.type]
    listed = [data, *_inputs(node, stored, 2)]
    return Held(data.name, shape, f"int{bits} g{block} {'asym' if len(node.input) > 3 else 'sym'}", float(bits),
                tuple(item.span for item in listed), True, block, "embedding",
                groups=partial(_codes, data, bits, block))  # fmt: skip


def _dequantize(node: Any, stored: dict[str, Stored]) -> Held | None:
    """DequantizeLinear of an initializer: the weight of a QDQ graph."""
    if len(node.input) < 2 or node.input[0] not in stored:
        return None
    data, scale = stored[node.input[0]], stored.get(node.input[1])
    if len(data.shape) < 2:
        return None
    block = _attribute(node, "block_size")
    groups = f"g{block}" if block else "tensor" if scale is None or count(scale.shape) == 1 else "grow"
    kind = "int" if "INT" in data.type else "fp"
    return Held(data.name, data.shape, f"{kind}{WIDTHS[data.type]} {groups}", float(WIDTHS[data.type]),
                tuple(item.span for item in (data, *_inputs(node, stored, 1))), True, block or 0)  # fmt: skip


def _whole_integers(node: Any, stored: dict[str, Stored]) -> Held | None:
    """MatMulInteger and its kin: int8 weights whose scales stand in nodes of their own."""
    place = 3 if node.op_type == "QLinearMatMul" else 1
    if len(node.input) <= place or node.input[place] not in stored:
        return None
    data = stored[node.input[place]]
    return Held(data.name, data.shape, "int8", 8.0, (data.span,), True)


READERS = {
    "MatMulNBits": _matmul, "GatherBlockQuantized": _gather, "DequantizeLinear": _dequantize,
    "MatMulInteger": _whole_integers, "MatMulIntegerToFloat": _whole_integers,
    "DynamicQuantizeMatMul": _whole_integers, "QLinearMatMul": _whole_integers,
}  # fmt: skip


def _findings(found: Audit, levels: set[int]) -> Iterator[Finding]:
    layers = found.role("linear", "head", "embedding")
    coded = [item for item in layers if item.quantized]
    dense = [item for item in layers if not item.quantized and item.weights > 4096]
    if coded and dense:
        share = sum(item.bytes for item in dense) / max(found.size, 1)
        yield Finding("fallback" if share > 0.05 else "note", f"{len(dense)} of {len(layers)} matrices are not "
                      f"quantized ({', '.join(sorted({item.effective for item in dense}))}), {share:.0%} of the file: "
                      f"{named(item.name for item in dense)}.", "tools often leave these nodes out by default: "
                      "quantize Gather and the head as well", tuple(item.name for item in dense))  # fmt: skip
    if 4 in levels:
        yield Finding("note", "MatMulNBits has accuracy_level 4: activations are rounded to 8 bits while it runs, "
                      "which a score of the dequantized weights does not see.", "score the graph itself")  # fmt: skip
    if any(level in (0, 1) for level in levels) and any(item.code == 8 for item in coded):
        yield Finding("note", "MatMulNBits of 8 bits without accuracy_level 4 is computed by a slow path on most "
                      "processors.", "set accuracy_level to 4, and compare the answers")  # fmt: skip
    inline = [item for item in found.held if any(span.start < 0 for span in item.spans)]
    if sum(item.bytes for item in inline) > 1 << 28:
        yield Finding("note", f"{plural(len(inline), 'weight')} lie inside the graph's own file, so that no runtime "
                      "can map them.", "save the weights in a file beside it")  # fmt: skip
    wide = [item for item in layers if item.effective == "fp64"]
    if wide:
        yield Finding("waste", f"{plural(len(wide), 'weight')} are stored as fp64.", "cast them", tuple(
            item.name for item in wide))  # fmt: skip
