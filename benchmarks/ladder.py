"""The arms of `patches.py`: what each model is at each rung of a ladder of sizes, and what it costs."""

from dataclasses import dataclass
from typing import Any

from shrew import spec
from shrew.blocks.model import ModelSpec, build
from shrew.data.bytes import COUNT
from shrew.train import flops_per_token

# Width and layers of the model; of models of patches those on patches, and the local layers are half as wide.
RUNGS = ((32, 2), (48, 3), (64, 4), (96, 5), (128, 6), (192, 7), (256, 8), (384, 9))
ARMS = ("bpe", "bytes", "bytes+ngrams", "space", "entropy-4.5", "entropy-6", "learned")
GRAMS = {"sizes": [2, 3, 4, 5], "rows": 4096}  # one table each
NEAR = 128  # bytes that a local layer sees
DECODER = 2  # local layers behind those on patches, and one before

# The model whose entropies cut patches: mostly look-ups, so that it stays small beside the smallest arm.
ENTROPY: dict[str, Any] = {
    "layers": 1, "width": 32, "tied": True, "pattern": "C", "mixers": {"C": {"kind": "conv", "kernel": 4}},
    "ffn": {"kind": "mlp", "hidden": 64}, "ngrams": {"sizes": [2, 3, 4, 5], "rows": 8192},
}  # fmt: skip


def _heads(width: int) -> int:
    return max(2, width // 32)


def _stack(width: int, layers: int, **mixer: Any) -> dict[str, Any]:
    return {"layers": layers, "pattern": "A", "ffn": {"kind": "mlp", "hidden": 3 * width},
            "mixers": {"A": {"kind": "attention", "heads": _heads(width), **mixer}}}  # fmt: skip


def dense(rung: int) -> dict[str, Any]:
    """The [model] table of a plain model of tokens or bytes."""
    width, layers = RUNGS[rung]
    return {"width": width, "zero_init": True, **_stack(width, layers, qk_norm="head")}


def patches(rung: int, rule: dict[str, Any], mean: float) -> dict[str, Any]:
    """That of a model of patches of so many bytes."""
    near = RUNGS[rung][0] // 2
    front = {
        "kind": "patches", "rule": rule, "mean": mean, "width": near, "heads": _heads(near),
        "encoder": _stack(near, 1, kind="window", window=NEAR),
        "decoder": _stack(near, DECODER, kind="window", window=NEAR),
    }  # fmt: skip
    return {**dense(rung), "ngrams": GRAMS, "front": front}


def table(arm: str, rung: int, spaces: float) -> dict[str, Any]:
    """That of an arm; `spaces` is the mean size of patches that end at spaces, which is the text's own."""
    kind, _, mean = arm.partition("-")
    if kind in ("bpe", "bytes"):
        return dense(rung)
    if kind == "bytes+ngrams":
        return {**dense(rung), "ngrams": GRAMS}
    if kind == "space":
        return patches(rung, {"kind": "space"}, spaces)
    size = float(mean or 4.5)
    return patches(rung, {"kind": kind, **({"mean": size} if kind == "learned" else {})}, size)


@dataclass(frozen=True)
class Cell:
    """An arm at a size: its [model] table, tokens of a row, and of a token the bytes, and the FLOPs of training and of
    reading. `tables` are the bytes of its n-gram tables in bf16."""

    arm: str
    rung: int
    vocabulary: int  # of BPE; 0: bytes
    model: dict[str, Any]
    length: int
    size: float
    flops: int
    reading: int
    parameters: int
    tables: int

    @property
    def per_byte(self) -> float:
        """Training FLOPs."""
        return self.flops / self.size

    @property
    def entropies(self) -> bool:
        return bool(self.model.get("front", {}).get("rule", {}).get("kind") == "entropy")


def cell(arm: str, rung: int, model: dict[str, Any], length: int, vocabulary: int = 0, size: float = 1.0) -> Cell:
    model = {**model, "context": length, "vocabulary": vocabulary or COUNT}
    made = whole(model)
    training, reading = costs(made, length)
    grams = made.model.ngrams
    tables = 0 if grams is None else 2 * grams.table.weight.numel()
    total = sum(p.numel() for p in made.parameters())
    return Cell(arm, rung, vocabulary, model, length, size, training, reading, total, tables)


def whole(model: dict[str, Any], mean: float | None = None) -> Any:
    """The model of a table, with the model of entropies in it; patches counted as of `mean` bytes where given."""
    front = model.get("front")
    if front:
        front = front | ({"mean": mean} if mean else {})
        front |= {"entropy": ENTROPY} if front["rule"]["kind"] == "entropy" else {}
        model = model | {"front": front}
    return build(spec.parse(ModelSpec, model, "[model]"))


def costs(model: Any, length: int) -> tuple[int, int]:
    """FLOPs of a token in training, and in reading: the model of the entropies is read, not trained."""
    context = length // 2
    oracle = getattr(model.model, "entropy", None)
    asked = 0
    if oracle is not None:
        asked = oracle.model.flops(context) + 2 * oracle.spec.width * (oracle.spec.vocabulary or 0)
    return flops_per_token(model, length) - 2 * asked, model.flops(context)


def resized(table: dict[str, Any], width: int, hidden: int, layers: int) -> dict[str, Any]:
    """A table whose layers (of patches: those on patches alone) have another width, feed-forward width and number."""
    heads = next(count for count in range(_heads(width), 0, -1) if width % (2 * count) == 0)
    mixers = {letter: mixer | {"heads": heads} for letter, mixer in table["mixers"].items()}
    return table | {"width": width, "layers": layers, "mixers": mixers, "ffn": table["ffn"] | {"hidden": hidden}}


def to_cost(table: dict[str, Any], length: int, goal: float, *, name: str, **more: Any) -> Cell:
    """The cell nearest to so many FLOPs a byte of reading, by the width and number of the layers of `table`; of two
    that are as near as a hundredth the one whose feed-forward layer is nearer to three times the width."""
    found = []
    for width in range(16, RUNGS[-1][0] + 1, 16):

        def made(layers: int, hidden: int, width: int = width) -> tuple[float, Cell]:
            item = cell(name, -1, resized(table, width, hidden, layers), length, **more)
            return item.reading / item.size, item

        usual = sum(width > other for other, _ in RUNGS) + 2
        for layers in (usual - 1, usual, usual + 1):
            least, channel = 2 * width, 8  # the cost is a straight line in the channels
            low, next_up = (made(layers, hidden)[0] for hidden in (least, least + channel))
            hidden = least + channel * max(0, round((goal - low) / (next_up - low)))
            cost, item = made(layers, min(hidden, 4 * width))
            found.append((round(abs(cost / goal - 1), 2), abs(item.model["ffn"]["hidden"] / width - 3), item))
        if low > 2 * goal:
            break
    return min(found, key=lambda one: one[:2])[2]
