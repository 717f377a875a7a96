"""Continuous batching (being written: the names and what they promise come first)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from shrew.runtime.pack import Model
from shrew.runtime.request import Piece, Request


class Answer:
    """The pieces of one request, in order; the last one has `finish` and `usage`."""

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The next piece; waits for it."""
        raise NotImplementedError

    def take(self) -> Piece | None:
        """What has come since the last piece, or None; never waits. For event loops, with `notify`."""
        raise NotImplementedError

    def cancel(self) -> None:
        """End it soon, with the finish "cancelled"; from any thread, at any time, any number of times."""
        raise NotImplementedError


class Engine:
    """One thread that serves many requests at once. Everything here may be called from any thread."""

    def __init__(
        self,
        model: Model,
        slots: int = 8,  # sequences computed together
        memory: int | None = None,  # bytes for states and for prefixes kept
        draft: Model | str | None = None,  # a smaller model of the same tokenizer, or "lookup"
        context: int | None = None,  # tokens of one sequence at most; the model's own by default
        queue: int = 64,  # requests that may wait
    ) -> None:
        raise NotImplementedError

    def submit(self, request: Request, notify: Callable[[], Any] | None = None) -> Answer:
        """Raises BusyError (with retry_after) when too many wait, RequestError for what cannot be served. `notify` is
        called from the engine's thread whenever there is something new to `take`."""
        raise NotImplementedError

    def embed(self, tokens: list[int]) -> np.ndarray:
        """float32 [width]: the mean of the last hidden states, of length 1."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        raise NotImplementedError

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, let what runs go on for up to `seconds`, then cancel it; returns when all has ended."""
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
