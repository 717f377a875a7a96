"""Running the graph on buffers that stay where they are: no state is ever copied from one call to the next.

Every state has one buffer of [slots, ...]; row r is one sequence's. A call over rows 0 to n takes the first n rows as
they lie, a call for one row takes that row. A cache is written in place. A recurrent state has two sides: a call reads
one and writes the other, and `side` says for each row where its state is now.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime

from shrew.runtime.manifest import CAPACITY, WIDTHS, Manifest
from shrew.runtime.pack import Model

FIRST_CAPACITY = 256  # tokens; doubled whenever a sequence needs more
LOGITS_BYTES = 16 << 20  # of one call, unless one row takes more
CACHE_LINE = 64


def sequence_bytes(manifest: Manifest, context: int) -> int:
    """What one sequence takes at most."""
    return sum(state.bytes(context) * (1 if state.kind == "cache" else 2) for state in manifest.states)


def call_end(start: int, end: int, chunk: int, align: int) -> int:
    """Where a call that starts at token `start` of a text of `end` ends. Calls of all texts end at the same places, so
    that one can go on where another one was kept."""
    period = align or end + chunk
    base = start - start % period
    return min(end, base + period, base + ((start - base) // chunk + 1) * chunk)


def aligned_zeros(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Zeros that start at a cache line; the system gives the memory when it is first written to."""
    size = math.prod(shape) * WIDTHS[dtype]
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    first = -raw.ctypes.data % CACHE_LINE
    return raw[first : first + size].view(dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What the states of one row held: `caches` of the tokens from `start` on, and the recurrent states at the end."""

    start: int
    caches: list[np.ndarray]
    recurrent: list[np.ndarray] | None

    @property
    def bytes(self) -> int:
        return sum(item.nbytes for item in [*self.caches, *(self.recurrent or [])])


class Runner:
    """The states of up to `slots` sequences of one model, and the calls that move them on. For one thread."""

    def __init__(self, model: Model, slots: int, context: int, outputs: int = 1) -> None:
        """`outputs`: rows of logits that a call must be able to give, besides one for each slot."""
        manifest = model.manifest
        self.model, self.slots, self.context = model, slots, context
        self.capacity = min(FIRST_CAPACITY, context)
        self.has_recurrent = any(state.kind == "recurrent" for state in manifest.states)
        self.side = [0] * slots
        self.tokens = np.zeros((slots, 1), np.int64)  # of the next decode step
        self.start = np.zeros(slots, np.int64)
        row = 4 * manifest.vocabulary
        self.outputs = max(slots, outputs, min(manifest.chunk, LOGITS_BYTES // row))  # most rows a call can give
        self.logits = aligned_zeros((self.outputs, manifest.vocabulary), "float32")
        self._hidden: np.ndarray | None = None
        self._chunk = np.zeros((1, max(manifest.chunk, outputs)), np.int64)
        self._chunk_start = np.zeros(1, np.int64)
        self._wanted = np.arange(max(manifest.chunk, self.outputs), dtype=np.int64)
        self._buffers: list[list[np.ndarray]] = []  # by state, then by side
        for state in manifest.states:
            shape = (slots, *state.sized(self.capacity))
            sides = 1 if state.kind == "cache" else 2
            self._buffers.append([aligned_zeros(shape, state.dtype) for _ in range(sides)])
        self._takes = {item.name for item in model.graph.get_inputs()}
        self._axes = [state.shape.index(CAPACITY) + 1 if state.kind == "cache" else None for state in manifest.states]
        self._steps: dict[tuple[int, int], Callable[[], None]] = {}
        self._rows: dict[tuple[int, int, bool], onnxruntime.IOBinding] = {}
        self._values: dict[tuple[str, int, int], onnxruntime.OrtValue] = {}

    # calls

    def step(self, rows: int) -> np.ndarray:
        """One token, `tokens` at `start`, of each of the first `rows` sequences, whose sides are equal: their logits
        [rows, vocabulary], which the next call overwrites."""
        run = self._steps.get((rows, self.side[0])) or self._new_step(rows, self.side[0])
        run()
        if self.has_recurrent:
            self.side[:rows] = [1 - self.side[0]] * rows
        return self.logits[:rows]

    def _new_step(self, rows: int, side: int) -> Callable[[], None]:
        binding = self._bind(slice(0, rows), side)
        _input(binding, "tokens", self.tokens[:rows])
        if "start" in self._takes:
            _input(binding, "start", self.start[:rows])
        _input(binding, "wanted", self._wanted[:rows])
        _output(binding, "logits", self.logits[:rows])
        graph = self.model.graph

        def run() -> None:
            graph.run_with_iobinding(binding)

        self._steps[rows, side] = run
        return run

    def call(
        self, row: int, tokens: Sequence[int], start: int, outputs: int, hidden: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Move one sequence on by 1 to `chunk` tokens. The logits and (if asked) the hidden states of the last
        `outputs` tokens; the next call overwrites them."""
        length, side = len(tokens), self.side[row]
        binding = self._rows.get((row, side, hidden))
        if binding is None:
            binding = self._rows[row, side, hidden] = self._bind(slice(row, row + 1), side)
            if "start" in self._takes:
                _input(binding, "start", self._chunk_start)
        self._chunk[0, :length] = tokens
        self._chunk_start[0] = start
        binding.bind_ortvalue_input("tokens", self._value("tokens", length, 0))
        binding.bind_ortvalue_input("wanted", self._value("wanted", length, outputs))
        binding.bind_ortvalue_output("logits", self._value("logits", 0, outputs))
        if hidden:
            if self._hidden is None:
                self._hidden = aligned_zeros((self.outputs, self.model.manifest.width), "float32")
            binding.bind_ortvalue_output("hidden", self._value("hidden", 0, outputs))
        self.model.graph.run_with_iobinding(binding)
        if self.has_recurrent:
            self.side[row] = 1 - side
        return self.logits[:outputs], self.logits[:0] if self._hidden is None else self._hidden[:outputs]

    def back(self, row: int) -> None:
        """Undo the last call for this row as far as recurrent states go; caches are simply written again."""
        if self.has_recurrent:
            self.side[row] = 1 - self.side[row]

    def _value(self, name: str, length: int, outputs: int) -> onnxruntime.OrtValue:
        """A view of a buffer as the graph takes it, made once for each size."""
        key = name, length, outputs
        if key not in self._values:
            if name == "tokens":
                array = self._chunk[:, :length]
            elif name == "wanted":
                array = self._wanted[length - outputs : length]
            else:
                array = (self.logits if name == "logits" else self._hidden)[:outputs]  # type: ignore[index]
            self._values[key] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return self._values[key]

    def _bind(self, rows: slice, side: int) -> onnxruntime.IOBinding:
        binding = onnxruntime.IOBinding(self.model.graph)
        for state, buffers in zip(self.model.manifest.states, self._buffers, strict=True):
            past = buffers[side if len(buffers) > 1 else 0]
            following = buffers[1 - side if len(buffers) > 1 else 0]
            _input(binding, f"past.{state.name}", past[rows])
            _output(binding, f"next.{state.name}", following[rows])
        return binding

    # states

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens."""
        if tokens <= self.capacity:
            return
        capacity = min(max(tokens, 2 * self.capacity), self.context)
        self._steps.clear()
        self._rows.clear()
        for state, buffers, axis in zip(self.model.manifest.states, self._buffers, self._axes, strict=True):
            if axis is not None:
                larger = aligned_zeros((self.slots, *state.sized(capacity)), state.dtype)
                larger[_part(axis, 0, self.capacity)] = buffers[0]
                buffers[0] = larger
        self.capacity = capacity

    def clear(self, row: int) -> None:
        """Before the first token of a sequence."""
        if self.has_recurrent:
            for buffers, axis in zip(self._buffers, self._axes, strict=True):
                if axis is None:
                    buffers[self.side[row]][row] = 0

    def turn(self, row: int, side: int) -> None:
        """Bring a row's recurrent states to the other side if they are not on this one."""
        if self.has_recurrent and self.side[row] != side:
            for buffers, axis in zip(self._buffers, self._axes, strict=True):
                if axis is None:
                    buffers[side][row] = buffers[1 - side][row]
            self.side[row] = side

    def move(self, row: int, to: int, length: int) -> None:
        """Copy a sequence of `length` tokens to another row, which takes its side."""
        for buffers, axis in zip(self._buffers, self._axes, strict=True):
            if axis is None:
                buffers[self.side[row]][to] = buffers[self.side[row]][row]
            else:
                part = _part(axis - 1, 0, length)
                buffers[0][to][part] = buffers[0][row][part]
        self.side[to] = self.side[row]

    def save(self, row: int, start: int, end: int, recurrent: bool = True) -> Snapshot:
        """A copy of what a row holds of the tokens from `start` to `end`, which is where it stands if `recurrent`."""
        caches, others = [], []
        for buffers, axis in zip(self._buffers, self._axes, strict=True):
            if axis is None:
                if recurrent:
                    others.append(buffers[self.side[row]][row].copy())
            else:
                caches.append(buffers[0][row][_part(axis - 1, start, end)].copy())
        return Snapshot(start, caches, others if recurrent else None)

    def restore(self, row: int, snapshots: Sequence[Snapshot]) -> None:
        """Put a sequence together from snapshots that follow each other; the last one has its recurrent states."""
        for snapshot in snapshots:
            caches, last = iter(snapshot.caches), iter(snapshot.recurrent or [] if snapshot is snapshots[-1] else [])
            for buffers, axis in zip(self._buffers, self._axes, strict=True):
                if axis is not None:
                    kept = next(caches)
                    size = kept.shape[axis - 1]
                    buffers[0][row][_part(axis - 1, snapshot.start, snapshot.start + size)] = kept
                elif snapshot is snapshots[-1]:
                    buffers[self.side[row]][row] = next(last)

    def held_bytes(self) -> int:
        """Bytes of all buffers; the system has given those that were written to."""
        return sum(buffer.nbytes for buffers in self._buffers for buffer in buffers) + self.logits.nbytes


def _part(axis: int, start: int, end: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, end))


def _input(binding: onnxruntime.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))


def _output(binding: onnxruntime.IOBinding, name: str, array: np.ndarray) -> None:
    binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
