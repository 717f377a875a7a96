"""What the nodes of one call can ask for: its tokens, where they stand, rotary tables, and states."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from shrew.blocks.layers import rotary_rates
from shrew.packers.onnx.graph import Graph, State

DTYPES: dict[torch.dtype, Literal["float32", "int64", "int8", "uint8"]] = {
    torch.float32: "float32", torch.int64: "int64", torch.int8: "int8", torch.uint8: "uint8"
}  # fmt: skip


class Call:
    """The values of one call: `tokens` [batch, length] and `start` [batch], both int64, and what follows from them.

    Either batch or length is 1: a prompt in pieces, or one token for each of several rows."""

    whole = False

    def __init__(self, graph: Graph, context: int, eps: float) -> None:
        self.graph, self.context, self.eps = graph, context, eps
        self.tokens = graph.input("tokens", torch.int64, ("batch", "length"))
        self.start = self._start()
        self.prefix = ""  # before the name of a state: tells the loops of a layer apart

    def _start(self) -> str:
        return self.graph.input("start", torch.int64, ("batch",))

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
    def ends(self) -> str:
        """int32 [batch]: tokens of each row, with those of this call."""
        g = self.graph
        return self._once("ends", lambda: g.cast(g.add(self.start, self.length), torch.int32))

    @property
    def last(self) -> str:
        """int32 [batch]: each row's position of its last token."""
        g = self.graph
        return self._once("last", lambda: str(g.node("Sub", self.ends, g.constant(1, torch.int32))))

    @property
    def longest(self) -> str:
        """int32 scalar: most tokens of a row, with those of this call."""
        return self._once("longest", lambda: str(self.graph.node("ReduceMax", self.ends, keepdims=0)))

    @property
    def fresh(self) -> str:
        """bool [batch]: rows before which nothing came."""
        g = self.graph
        return self._once("fresh", lambda: str(g.node("Equal", self.start, g.ints(0))))

    def rotary(self, width: int, theta: float, yarn: float = 1.0, trained: int = 0,
               padded: int = 0) -> tuple[str, str]:  # fmt: skip
        """cos and sin [context, width / 2] of the channels that rotate; `padded` / 2 with angles of zero for others.

        The file holds the rates alone: ONNX Runtime folds the tables when it loads the model."""
        g = self.graph
        rates, warm = rotary_rates(width, theta, yarn, trained)
        spare = max(padded - width, 0) // 2
        key = ("rotary", width, theta, yarn, trained, spare)

        def angles() -> str:
            positions = g.node("Range", g.constant(0.0), g.constant(float(self.context)), g.constant(1.0))
            turned = torch.nn.functional.pad(rates, (0, spare))
            return g.mul(str(g.node("Unsqueeze", positions, g.ints(1))), g.constant(turned))

        def table(op: str) -> str:
            found = str(g.node(op, g.once((*key, "angles"), angles)))
            factors = torch.nn.functional.pad(torch.full_like(rates, warm), (0, spare), value=1.0)
            return found if warm == 1 else g.mul(found, g.constant(factors))

        return g.once((*key, "Cos"), lambda: table("Cos")), g.once((*key, "Sin"), lambda: table("Sin"))

    def state(self, name: str, shape: Sequence[int | str], kind: Literal["cache", "recurrent"] = "recurrent",
              dtype: torch.dtype = torch.float32) -> tuple[str, Callable[[str], None]]:  # fmt: skip
        """A state of [batch, *shape]: its past value, and what to call with the next one."""
        name = self.prefix + name
        self.graph.states.append(State(name, kind, DTYPES[dtype], tuple(shape)))
        past = self.graph.input(f"past.{name}", dtype, ("batch", *shape))

        def set_next(value: str) -> None:
            self.graph.output(value, f"next.{name}", dtype, ("batch", *shape))

        return past, set_next


class Whole(Call):
    """A call of whole texts of `lengths` [batch], padded at the right: nothing came before, nothing is kept."""

    whole = True

    def _start(self) -> str:
        self.lengths = self.graph.input("lengths", torch.int64, ("batch",))
        return self._once("start", lambda: str(self.graph.node("Sub", self.lengths, self.lengths)))

    @property
    def last(self) -> str:
        g = self.graph
        return self._once("last", lambda: g.cast(str(g.node("Sub", self.lengths, g.ints(1))), torch.int32))

    @property
    def longest(self) -> str:
        g = self.graph
        return self._once("longest", lambda: g.cast(str(g.node("Squeeze", self.length)), torch.int32))

    def state(self, name: str, shape: Sequence[int | str], kind: Literal["cache", "recurrent"] = "recurrent",
              dtype: torch.dtype = torch.float32) -> tuple[str, Callable[[str], None]]:  # fmt: skip
        """No cache, and zeros for what else an emitter wants to begin with."""
        g = self.graph
        if kind == "cache":
            return "", lambda value: None
        sizes = g.node("Concat", self.batch, g.ints(*(size for size in shape if isinstance(size, int))), axis=0)
        return str(g.node("Expand", g.constant(0, dtype), sizes)), lambda value: None
