"""What a request gives back: pieces that come one after the other, read from any one thread."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from shrew.runtime.request import Finish, Piece, Request, Token, Usage
from shrew.runtime.sampling import Top
from shrew.runtime.text import Vocabulary, Writer

PAUSE = 0.002  # seconds between two pieces: to wake a thread for each token took a ninth of a small model's time


@dataclass(frozen=True)
class End:
    """The last thing an answer is told."""

    finish: Finish
    usage: Usage
    stopped: bool = False  # by a stop string
    error: str = ""
    refused: bool = False  # by the request's own constraint


@dataclass(frozen=True)
class Scored:
    """The prompt's tokens, each with its log-probability."""

    tokens: tuple[tuple[int, float | None, Top], ...]


Chosen = tuple[int, float | None, Top]  # a token, its log-probability, the alternatives


class Answer:
    """The pieces of one request, in order; the last one has `finish` and `usage`.

    Tokens become text here, in the thread that reads, so that the engine's goes on computing meanwhile.
    """

    def __init__(self, request: Request, vocabulary: Vocabulary, cancel: Callable[["Answer"], None]) -> None:
        self.request = request
        self.is_cancelled = False
        self._cancel = cancel
        self._writer = Writer(vocabulary, request.prompt, request.stop)
        self._news: SimpleQueue[Chosen | Scored | End] = SimpleQueue()
        self.put = self._news.put  # for the engine
        self._is_done = False
        self._ended = threading.Event()
        self._shown = 0.0  # when the last piece was given out

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """The next piece; waits for it, and for what comes within two milliseconds of the one before."""
        if self._is_done:
            raise StopIteration
        self._ended.wait(self._shown + PAUSE - time.monotonic())
        while (piece := self._gather([self._news.get()])) is None:
            pass
        self._shown = time.monotonic()
        return piece

    def take(self) -> Piece | None:
        """What has come since the last piece, or None; never waits. For event loops, with `notify`."""
        return None if self._is_done else self._gather([])

    def cancel(self) -> None:
        """End it soon, with the finish "cancelled"; from any thread, at any time, any number of times."""
        self.is_cancelled = True
        self._cancel(self)

    def end(self, news: End) -> None:
        """For the engine: the last news."""
        self.put(news)
        self._ended.set()

    def _gather(self, news: list[Chosen | Scored | End]) -> Piece | None:
        """One piece of `news` and all that waits; None if it shows nothing yet."""
        while not self._news.empty():
            news.append(self._news.get())
        text: list[str] = []
        prompt: tuple[Token, ...] = ()
        for item in news:
            if isinstance(item, tuple):
                text.append(self._writer.feed(*item))
            elif isinstance(item, Scored):
                prompt = tuple(self._writer.token(*token) for token in item.tokens)
            else:
                self._is_done = True
                text.append(self._writer.end(item.stopped))
                behind = self._writer.behind(last=not item.stopped)
                return Piece("".join(text), behind, prompt, item.finish, item.usage, item.error,
                             item.refused)  # fmt: skip
        behind = self._writer.behind()
        return Piece("".join(text), behind, prompt) if any(text) or behind or prompt else None

    def result(self) -> Piece:
        """All of it as one piece; waits for the end."""
        self._ended.wait()
        return next(self)
