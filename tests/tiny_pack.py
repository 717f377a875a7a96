"""A packed model made by hand, and the same model in plain NumPy: what the runtime must compute, token by token.

One layer of attention with a cache, one leaky sum (a recurrent state), one look at the token before (a state of
integers), a head. Nothing of Shrew's packers is used.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<bos>", "<eos>", "<pad>"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ã", "©"), ("i", "n")]
HEADS, HEAD = 2, 16
LEAK = 0.7


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 264 tokens."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, MERGES))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


VOCABULARY = tokenizer().get_vocab_size()


@dataclass(frozen=True)
class Tiny:
    """Random weights, and what they make of a text."""

    weights: dict[str, np.ndarray]
    recurrent: bool

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float64 [tokens, vocabulary], by definition: no state, no cache."""
        w, t = {name: value.astype(np.float64) for name, value in self.weights.items()}, np.asarray(tokens)
        x = w["embed"][t] + w["place"][: len(t)]
        if self.recurrent:
            x = x + w["before"][np.concatenate([[0], t[:-1]])]
        q, k, v = (x @ w[name] for name in ("q", "k", "v"))
        mixed = []
        for head in range(HEADS):
            scores = q[:, head * HEAD : (head + 1) * HEAD] @ k.T / np.sqrt(HEAD)
            scores[np.triu_indices(len(t), 1)] = -np.inf
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(scores / scores.sum(axis=1, keepdims=True) @ v)
        x = x + np.concatenate(mixed, axis=1) @ w["o"]
        if self.recurrent:
            state, sums = np.zeros(x.shape[1]), []
            for row in x @ w["u"]:
                state = LEAK * state + row
                sums.append(state)
            x = x + np.tanh(np.stack(sums))
        return self.hidden_of(x) @ w["head"]

    @staticmethod
    def hidden_of(x: np.ndarray) -> np.ndarray:
        return np.tanh(x)

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        text = list(tokens)
        for _ in range(count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(tokens) :]


def random_weights(seed: int, width: int, context: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {
        "embed": (VOCABULARY, width), "place": (context, width), "before": (VOCABULARY, width),
        "q": (width, HEADS * HEAD), "k": (width, HEAD), "v": (width, HEAD), "o": (HEADS * HEAD, width),
        "u": (width, width), "head": (width, VOCABULARY),
    }  # fmt: skip
    scale = {"embed": 1.0, "place": 0.5, "before": 0.7, "head": 1.0}
    return {
        name: (draw.standard_normal(shape) * scale.get(name, 1 / np.sqrt(shape[0]))).astype(np.float32)
        for name, shape in shapes.items()
    }


class _Nodes(list[Any]):
    def __call__(self, op: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"n{len(self)}.{at}" for at in range(outputs)]
        self.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names


def _graph(tiny: Tiny, width: int) -> onnx.ModelProto:
    n, constants = _Nodes(), dict(tiny.weights)

    def constant(name: str, value: Any, dtype: Any = np.int64) -> str:
        constants[name] = np.asarray(value, dtype)
        return name

    one, zero = constant("one", [1]), constant("zero", [0])
    zero_, one_ = constant("zero_", 0), constant("one_", 1)
    length = n("Gather", n("Shape", "tokens"), one_)
    steps = n("Range", zero_, length, one_)
    places = n("Add", n("Unsqueeze", "start", one), n("Unsqueeze", steps, zero))
    x = n("Add", n("Gather", "embed", "tokens"), n("Gather", "place", places))
    outputs = []
    if tiny.recurrent:
        known = n("Concat", "past.last", "tokens", axis=1)
        end = n("Add", n("Unsqueeze", length, zero), one)
        x = n("Add", x, n("Gather", "before", n("Slice", known, one, end, one)))
        outputs.append((n("Slice", known, constant("minus", [-2]), constant("far", [1 << 40]), one), "next.last"))
    q, k, v = (n("MatMul", x, name) for name in ("q", "k", "v"))
    total = n("Add", "start", length)
    last = n("Cast", n("Sub", total, one), to=TensorProto.INT32)
    longest = n("Cast", n("ReduceMax", total, keepdims=0), to=TensorProto.INT32)
    y, keys, values = n("GroupQueryAttention", q, k, v, "past.k", "past.v", last, longest, outputs=3,
                        domain="com.microsoft", num_heads=HEADS, kv_num_heads=1)  # fmt: skip
    outputs += [(keys, "next.k"), (values, "next.v")]
    x = n("Add", x, n("MatMul", y, "o"))
    if tiny.recurrent:
        at = n("Cast", steps, to=TensorProto.FLOAT)
        ago = n("Sub", n("Unsqueeze", at, one), n("Unsqueeze", at, zero))
        leak = constant("leak", LEAK, np.float32)
        none = constant("none", 0, np.float32)
        decay = n("Where", n("Less", ago, none), none, n("Pow", leak, n("Max", ago, none)))
        fades = n("Unsqueeze", n("Pow", leak, n("Add", at, constant("onef", 1, np.float32))), one)
        old = n("Mul", fades, n("Unsqueeze", "past.sum", one))
        sums = n("Add", n("MatMul", decay, n("MatMul", x, "u")), old)
        x = n("Add", x, n("Tanh", sums))
        final = n("Gather", sums, n("Sub", length, one_), axis=1)
        outputs.append((final, "next.sum"))
    flat = n("Reshape", n("Tanh", x), constant("flat", [-1, width]))
    hidden = n("Gather", flat, "wanted")
    outputs += [(hidden, "hidden"), (n("MatMul", hidden, "head"), "logits")]
    for value, name in outputs:
        n.append(helper.make_node("Identity", [value], [name]) if name not in ("next.k", "next.v") else None)
        if n[-1] is None:  # written in place, so the node itself has to bear the name
            n.pop()
            for node in n:
                node.output[:] = [name if out == value else out for out in node.output]
    ints, floats = TensorProto.INT64, TensorProto.FLOAT
    cache, batch = ["batch", 1, "capacity", HEAD], "batch"
    inputs = {"tokens": (ints, [batch, "length"]), "start": (ints, [batch]), "wanted": (ints, ["n"]),
              "past.k": (floats, cache), "past.v": (floats, cache)}  # fmt: skip
    gives = {"logits": (floats, ["n", VOCABULARY]), "hidden": (floats, ["n", width]),
             "next.k": (floats, cache), "next.v": (floats, cache)}  # fmt: skip
    if tiny.recurrent:
        for where, side in ((inputs, "past"), (gives, "next")):
            where[f"{side}.sum"] = (floats, [batch, width])
            where[f"{side}.last"] = (ints, [batch, 2])
    used = {name for node in n for name in node.input}
    graph = helper.make_graph(
        list(n), "tiny",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in gives.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write(
    folder: Path, *, seed: int = 0, width: int = 32, context: int = 600, chunk: int = 16, align: int = 0,
    recurrent: bool = True, pairs: float = 0.0, poison: int | None = None, **changes: Any,
) -> Tiny:  # fmt: skip
    """Write the packed folder. With `pairs`, every odd token's logit is that of the even one before it but for a share
    of its own; the embedding of the token `poison` is not a number; `changes` go into the manifest."""
    weights = random_weights(seed, width, context)
    if pairs:
        own = weights["head"][:, 1::2] * np.float32(pairs)
        weights["head"][:, 1::2] = weights["head"][:, 0:-1:2] + own
    if poison is not None:
        weights["embed"][poison] = np.nan
    tiny = Tiny(weights, recurrent)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(_graph(tiny, width), folder / "model.onnx", save_as_external_data=True, location="model.bin",
              size_threshold=256)  # fmt: skip
    tokenizer().save(str(folder / "tokenizer.json"))
    states = [{"name": name, "kind": "cache", "dtype": "float32", "shape": [1, "capacity", HEAD]} for name in "kv"]
    if recurrent:
        states += [{"name": "sum", "kind": "recurrent", "dtype": "float32", "shape": [width]},
                   {"name": "last", "kind": "recurrent", "dtype": "int64", "shape": [2]}]  # fmt: skip
    manifest = {
        "format": 1, "shrew": "0.1.0", "kind": "causal", "name": "tiny", "vocabulary": VOCABULARY, "width": width,
        "context": context, "bos": 0, "eos": [1], "pad": 2, "chunk": chunk, "align": align, "states": states,
        "labels": None, "accuracy_level": 0,
    }  # fmt: skip
    seal(folder, manifest | changes)
    return tiny


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the hashes of what lies in the folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != "pack.json":
            content = path.read_bytes()
            found[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "pack.json").write_text(json.dumps({"files": found} | manifest), "utf-8")


def write_classifier(folder: Path, labels: list[str]) -> np.ndarray:
    """A classifier whose logits are the mean of its tokens' rows in a table, which is returned."""
    n = _Nodes()
    table = np.random.default_rng(3).standard_normal((VOCABULARY, len(labels))).astype(np.float32)
    one = "one"
    steps = n("Range", "zero_", n("Gather", n("Shape", "tokens"), "one_"), "one_")
    is_text = n("Cast", n("Less", n("Unsqueeze", steps, "zero"), n("Unsqueeze", "lengths", one)), to=TensorProto.FLOAT)
    rows = n("Mul", n("Gather", "table", "tokens"), n("Unsqueeze", is_text, "two"))
    total = n("ReduceSum", rows, one, keepdims=0)
    n.append(helper.make_node("Div", [total, n("Unsqueeze", n("Cast", "lengths", to=TensorProto.FLOAT), one)],
                              ["logits"]))  # fmt: skip
    constants = {"table": table, "zero_": np.asarray(0), "one_": np.asarray(1), "zero": np.asarray([0]),
                 "one": np.asarray([1]), "two": np.asarray([2])}  # fmt: skip
    ints = TensorProto.INT64
    graph = helper.make_graph(
        list(n), "tiny", [helper.make_tensor_value_info("tokens", ints, ["batch", "length"]),
                          helper.make_tensor_value_info("lengths", ints, ["batch"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(labels)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10),
              folder / "model.onnx", save_as_external_data=True, location="model.bin", size_threshold=256)  # fmt: skip
    tokenizer().save(str(folder / "tokenizer.json"))
    seal(folder, {"format": 1, "shrew": "0.1.0", "kind": "classifier", "name": "tiny", "vocabulary": VOCABULARY,
                  "width": 4, "context": 64, "pad": 2, "labels": labels})  # fmt: skip
    return table
