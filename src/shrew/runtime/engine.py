"""Many requests, one model, one thread: at every step sequences join and leave the batch.

A round is one decode step over all sequences that are being answered and one piece of one prompt, so neither a long
prompt nor many answers keep the others waiting for more than one call. Sequences being answered have the first rows of
the state buffers, without gaps: the last one moves where one has left. Prompts are computed in rows behind them.
"""

import atexit
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from shrew.errors import BusyError, RequestError, ShrewError, UnsupportedError, UsageError
from shrew.machine import Joules
from shrew.runtime import sampling
from shrew.runtime.answer import Answer
from shrew.runtime.job import FOREVER, Embedding, Job
from shrew.runtime.pack import Model, check_tokens
from shrew.runtime.prefix import Prefixes
from shrew.runtime.request import Finish, Request, Usage
from shrew.runtime.schema import ConstraintError
from shrew.runtime.speculative import MOST, Speculator, check_drawn
from shrew.runtime.states import Runner, call_end, sequence_bytes
from shrew.runtime.text import Vocabulary

PREFIX_BYTES = 128 << 20  # where nothing is said about memory
STOPS, STOP_LENGTH = 64, 1024
STEPS = 64  # between two looks at what was spent
ENDS: tuple[Finish, ...] = ("stop", "length", "cancelled", "deadline", "error")
NO_END: tuple[Finish | None, bool] = (None, False)


class Engine:
    """Serves requests until it is closed. Everything here may be called from any thread."""

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        memory: int | None = None,
        draft: Model | str | None = None,
        context: int | None = None,
        queue: int = 64,
    ) -> None:
        """`slots`: sequences computed together. `memory`: bytes for their states and for prefixes kept. `draft`: a
        smaller model of the same tokens or "lookup". `context`: tokens of one sequence at most, the model's own by
        default. `queue`: requests that may wait.

        Raises UsageError for settings that cannot work, such as less memory than the states may need.
        """
        manifest = model.manifest
        if manifest.kind != "causal":
            raise UnsupportedError(f"{model.path} is a {manifest.kind}: it completes nothing; use Model.classify.")
        self.model, self.slots, self.queue = model, slots, queue
        self.context = manifest.context if context is None else context
        if slots < 1 or queue < 1:
            raise UsageError(f"{slots} slots and a queue of {queue} cannot work; both must be 1 or more.")
        if not 1 <= self.context <= manifest.context:
            raise UsageError(f"a context of {self.context:,} does not fit the model's {manifest.context:,} tokens.")
        self._speculator = None if draft is None else Speculator(model, draft, self.context)
        needed = slots * sequence_bytes(manifest, self.context)
        if isinstance(draft, Model):
            needed += sequence_bytes(draft.manifest, min(self.context, draft.manifest.context))
        if memory is not None and needed > memory:
            raise UsageError(
                f"{slots} sequences of {self.context:,} tokens may need {needed:,} bytes of states, more than the "
                f"{memory:,} allowed; give more memory, fewer slots or a shorter context."
            )
        self.vocabulary = Vocabulary(model.tokenizer)
        self._eos = frozenset(manifest.eos)
        self._runner = Runner(model, slots, self.context, MOST + 1)
        self._prefixes = Prefixes(PREFIX_BYTES if memory is None else memory - needed)
        self._waiting: deque[Job] = deque()
        self._filling: deque[Job] = deque()  # prompts being computed, whose turn it is first
        self._decoding: list[Job] = []  # by row
        self._wake = threading.Condition()
        self._sweep = False  # some answer was cancelled
        self._next_deadline = FOREVER
        self._closing = self._cancel_all = False
        self._cpu = 0.0  # the process's, when the last call began
        self._joules = Joules()
        self._uncharged = 0  # steps since the last charge
        self._counts: Counter[str] = Counter()
        self._cpu_seconds = self._mean_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine {manifest.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that computes while the interpreter goes away takes it down

    # for everyone

    def submit(self, request: Request, notify: Callable[[], Any] | None = None) -> Answer:
        """Put a request in the queue. `notify` is called from the engine's thread whenever there is more to `take`.

        Raises BusyError (with `retry_after`) when too many wait, RequestError for what can never be served.
        """
        self._check(request)
        answer = Answer(request, self.vocabulary, self._cancelled)
        self._enqueue(Job(answer, notify, self.context - len(request.prompt)))
        return answer

    def embedding(self, tokens: Sequence[int]) -> "Future[Embedding]":
        """Gives float32 [width], the mean of the last hidden states of a text, made of length 1, and what it cost;
        cancelled, it is not computed any further. Raises as `submit` does."""
        check_tokens(self.model.manifest, tokens, self.context, "text")
        future: Future[Embedding] = Future()
        answer = Answer(Request(prompt=tokens, max_tokens=0), self.vocabulary, self._cancelled)
        future.add_done_callback(lambda ended: answer.cancel() if ended.cancelled() else None)
        self._enqueue(Job(answer, None, 0, future))
        return future

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """The vector that `embedding` gives; waits for it."""
        return self.embedding(tokens).result()[0]

    def metrics(self) -> dict[str, float]:
        """Counters (names ending in `_total`) and gauges, since the engine was made."""
        counts = {f"{name}_total": float(self._counts[name]) for name in
                  ("prompt_tokens", "cached_tokens", "completion_tokens", "refused", "steps", "calls")}  # fmt: skip
        counts |= {f"requests_{end}_total": float(self._counts[end]) for end in ENDS}
        counts["cpu_seconds_total"] = self._cpu_seconds
        if self._speculator is not None:
            counts["guessed_tokens_total"] = float(self._speculator.guessed)
            counts["guessed_right_tokens_total"] = float(self._speculator.right)
        return counts | {
            "running": float(len(self._decoding) + len(self._filling)),
            "waiting": float(len(self._waiting)),
            "slots": float(self.slots),
            "capacity_tokens": float(self._runner.capacity),
            "state_bytes": float(self._runner.held_bytes()),
            "prefix_bytes": float(self._prefixes.bytes),
            "prefix_blocks": float(len(self._prefixes)),
        }

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, let what was taken go on for up to `seconds`, then cancel it; returns when all has
        ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._wake:
                self._sweep = self._cancel_all = True
                self._wake.notify()
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        """Raises RequestError for what can never be served."""
        size = self.model.manifest.vocabulary
        check_tokens(self.model.manifest, request.prompt, self.context - bool(request.max_tokens), "prompt")
        for name, value, low, high in (
            ("max_tokens", request.max_tokens, 0, math.inf),
            ("temperature", request.temperature, 0, 100),
            ("top_p", request.top_p, 0, 1),
            ("top_k", request.top_k, 0, math.inf),
            ("min_p", request.min_p, 0, 1),
            ("presence_penalty", request.presence_penalty, -100, 100),
            ("frequency_penalty", request.frequency_penalty, -100, 100),
            ("repetition_penalty", request.repetition_penalty, 0.01, 100),
            ("logprobs", request.logprobs or 0, 0, size),
            ("seconds", request.seconds if request.seconds is not None else 1, 0, math.inf),
            ("seed", request.seed or 0, 0, 2**128 - 1),
        ):
            if not low <= value <= high:  # nor NaN
                raise RequestError(f"{name} is {value}; it must be from {low} to {high}.")
        for token, bias in request.logit_bias.items():
            if not 0 <= token < size or math.isnan(bias) or bias == math.inf:
                raise RequestError(f"logit_bias of token {token} cannot be {bias}; tokens are 0 to {size - 1:,}.")
        if len(request.stop) > STOPS or not all(1 <= len(stop) <= STOP_LENGTH for stop in request.stop):
            raise RequestError(f"stop takes up to {STOPS} strings of 1 to {STOP_LENGTH:,} characters.")

    def _enqueue(self, job: Job) -> None:
        with self._wake:
            if self._closing:
                raise BusyError("This model is shutting down; ask another one.", 1.0)
            if len(self._waiting) >= self.queue:
                self._counts["refused"] += 1
                wait = self._mean_seconds * len(self._waiting) / self.slots
                raise BusyError(f"{len(self._waiting)} requests are waiting already; try later.", max(1.0, wait))
            self._waiting.append(job)
            self._next_deadline = min(self._next_deadline, job.deadline)
            self._wake.notify()

    def _cancelled(self, _: Answer) -> None:
        with self._wake:
            self._sweep = True
            self._wake.notify()

    # the thread

    def _run(self) -> None:
        while True:
            if not (self._decoding or self._filling):
                with self._wake:
                    while not (self._waiting or self._closing):
                        self._wake.wait()
                    if not self._waiting:
                        return
                self._cpu = time.process_time()
                self._joules.spent()
            try:
                self._round()
            except Exception as error:  # a fault of ours ends what runs; what comes next may well succeed
                for job in [*self._decoding, *self._filling]:
                    self._leave(job, "error", error=error)

    def _round(self) -> None:
        if self._sweep or time.monotonic() >= self._next_deadline:
            self._end_some()
        while self._waiting and len(self._decoding) + len(self._filling) < self.slots:
            self._admit(self._waiting.popleft())
        alone = self._speculator is not None and len(self._decoding) == 1
        if self._decoding and not (alone and self._speculate(self._decoding[0])):
            self._step()
        if self._filling:
            self._charge_steps()
            job = self._filling[0]
            self._filling.rotate(-1)
            try:
                self._fill(job)
            except Exception as error:
                self._leave(job, "error", error=error)

    def _end_some(self) -> None:
        """Those that were cancelled or whose time is over."""
        self._sweep = False
        now = time.monotonic()
        with self._wake:
            every = [*self._waiting, *self._filling, *self._decoding]
        for job in every:
            if job.answer.is_cancelled or self._cancel_all:
                self._leave(job, "cancelled")
            elif now >= job.deadline:
                self._leave(job, "deadline")
        with self._wake:
            left = [*self._waiting, *self._filling, *self._decoding]
            self._next_deadline = min((job.deadline for job in left), default=FOREVER)

    def _admit(self, job: Job) -> None:
        """Give a request a row, and what earlier texts have left of its prompt."""
        taken = {other.row for other in self._filling}
        job.row = next(row for row in range(len(self._decoding), self.slots) if row not in taken)
        self._filling.append(job)
        try:
            job.begin(self.vocabulary, self.model.manifest)
            self._runner.clear(job.row)
            job.kept = self._prefixes.root
        except Exception as error:
            self._leave(job, "error", error=error)

    def _charge_steps(self) -> None:
        """Charge those being answered with the steps since the last time, in all of which they took part."""
        if self._uncharged:
            self._charge(self._decoding)

    def _charge(self, jobs: Sequence[Job]) -> None:
        """Share what was spent since the last time among those it was spent for."""
        self._counts["steps"] += self._uncharged
        self._uncharged = 0
        now = time.process_time()
        spent, self._cpu = now - self._cpu, now
        self._cpu_seconds += spent
        for job in jobs:
            job.cpu += spent / len(jobs)

    def _charge_joules(self, left: Job) -> None:
        """Share what the counters say since the last request left by the CPU time since then. Not at every step: to
        read them takes a hundredth of a small model's."""
        joules, jobs = self._joules.spent(), [left, *self._decoding, *self._filling]
        spent = sum(job.cpu - job.charged for job in jobs)
        for job in jobs:
            if joules is not None and spent > 0:
                job.joules = (job.joules or 0.0) + joules * (job.cpu - job.charged) / spent
            job.charged = job.cpu

    def _fill(self, job: Job) -> None:
        """One more call on a prompt; after the last one the job is among those being answered.

        The prompt's last token is left to the first step, so what is kept of a prompt serves the same one again.
        """
        manifest, runner = self.model.manifest, self._runner
        if not job.needs_all:
            self._take_up(job)
        if job.fed < job.target:
            chunk = min(manifest.chunk, runner.outputs) if job.needs_all else manifest.chunk
            end = call_end(job.fed, job.target, chunk, manifest.align)
            tokens = job.text[job.fed : end]
            runner.reserve(end)
            outputs = len(tokens) if job.needs_all else 0
            logits, hidden = runner.call(job.row, tokens, job.fed, outputs, job.future is not None)
            self._counts["calls"] += 1
            job.give(logits, hidden)
            job.fed = end
            self._keep(job)
        self._charge([job])
        if job.fed == job.target:
            job.show_prompt()
            if job.left < 1:
                self._leave(job, "length")
            else:
                self._join(job)

    def _take_up(self, job: Job) -> None:
        """What other texts have left of this prompt since its last call."""
        path = self._prefixes.find(job.raw, job.target)
        if path and path[-1].end > job.fed:
            job.cached += path[-1].end - job.fed
            self._runner.reserve(path[-1].end)
            blocks = [block for block in path if block.end > job.fed]
            self._runner.restore(job.row, [block.snapshot for block in blocks if block.snapshot])
            job.kept, job.fed = path[-1], path[-1].end

    def _keep(self, job: Job) -> None:
        """Keep what the sequence has computed since the last time, in blocks that end where calls end."""
        manifest = self.model.manifest
        while job.kept is not None and job.kept.end < job.fed:
            start = job.kept.end
            end = call_end(start, job.fed, manifest.chunk, manifest.align)
            tokens, is_here = job.text[start:end], end == job.fed
            known = self._prefixes.known(job.kept, tokens)
            if known is None:
                if self._prefixes.limit < 1:
                    job.kept = None
                    return
                snapshot = self._runner.save(job.row, start, end, is_here or not self._runner.has_recurrent)
                known = self._prefixes.add(job.kept, tokens, snapshot)
            job.kept = known

    def _join(self, job: Job) -> None:
        """From the prompts to the answers: into the first row that is not being answered."""
        row, runner = len(self._decoding), self._runner
        if job.row != row:
            other = next((one for one in self._filling if one.row == row), None)
            if other is not None:  # they change places
                kept = runner.save(other.row, 0, other.fed)
                runner.move(job.row, row, job.fed)
                other.row = job.row
                runner.restore(other.row, [kept])
            else:
                runner.move(job.row, row, job.fed)
            job.row = row
        runner.turn(row, runner.side[0])
        self._filling.remove(job)  # only now: whatever fails before leaves it where it can be ended
        self._decoding.append(job)
        self._set_next(job)

    def _set_next(self, job: Job) -> None:
        runner = self._runner
        runner.tokens[job.row, 0] = job.text[-1]
        runner.start[job.row] = job.fed
        if job.fed >= runner.capacity:
            runner.reserve(job.fed + 1)

    def _step(self) -> None:
        """One token for each sequence being answered."""
        rows = self._decoding
        logits = self._runner.step(len(rows))
        best = logits.argmax(axis=1).tolist()
        self._uncharged += 1
        if self._uncharged == STEPS:
            self._charge_steps()
        ended: list[tuple[Job, Finish, bool, Exception | None]] = []
        for row, job in enumerate(rows):
            job.fed += 1
            job.plain_next = False
            try:
                if job.sampler.is_plain:
                    token = best[row]
                    if not math.isfinite(logits.item(row, token)):
                        token = sampling.greedy(logits[row])  # raises
                    finish, stopped = job.add(token, None, (), self._eos)
                else:
                    finish, stopped = job.add(*job.choose(logits[row]), self._eos)
            except Exception as error:
                ended.append((job, "error", False, error))
                continue
            if finish:
                ended.append((job, finish, stopped, None))
                continue
            self._set_next(job)
            job.tell()
        for job, finish, stopped, reason in ended:
            self._leave(job, finish, stopped, reason)

    def _speculate(self, job: Job) -> bool:
        """Several tokens for the only sequence being answered; False if it is to be moved on by a plain step."""
        assert self._speculator is not None
        manifest, runner = self.model.manifest, self._runner
        align = manifest.align or self.context
        most = min(job.left - 1, manifest.chunk - 1, self.context - job.fed - 1,
                   align - job.fed % align - 1)  # fmt: skip
        if job.plain_next or most < 1:
            return False
        guesses, proposed = self._speculator.guess(job.text, most, job.sampler)
        if not guesses:
            self._step()
            self._speculator.note(0, 0)
            return True
        tokens = [job.text[-1], *guesses]
        runner.reserve(job.fed + len(tokens))
        logits, _ = runner.call(0, tokens, job.fed, len(tokens))
        self._counts["calls"] += 1
        used, end = 0, NO_END
        error: Exception | None = None
        tie = self._speculator.tie * float(logits[0].std())
        try:
            while used < len(tokens) and end == NO_END:
                shaped = job.sampler.shape(logits[used], job.left)
                if job.sampler.is_greedy and sampling.is_close(shaped, tie):
                    job.plain_next = True
                    break
                token, is_right = _checked(job.sampler, guesses, proposed, used, shaped)
                used += 1
                end = job.add(*job.scored_as(token, logits[used - 1]), self._eos)
                if not is_right:
                    break
        except Exception as fault:
            end, error = ("error", False), fault
        if used < len(tokens) and runner.has_recurrent:
            runner.back(0)
            if used:
                runner.call(0, tokens[:used], job.fed, 0)
        job.fed += used
        self._charge([job])
        self._speculator.note(len(guesses), max(used - 1, 0))
        finish, stopped = end
        if finish:
            self._leave(job, finish, stopped, error)
        else:
            self._set_next(job)
            job.tell()
        return True

    def _leave(self, job: Job, finish: Finish, stopped: bool = False, error: Exception | None = None) -> None:
        """The end of a request, wherever it is."""
        self._charge_steps()
        if job in self._decoding:
            if finish != "error":  # what was answered may be the beginning of the next prompt
                self._keep(job)
            last = self._decoding.pop()
            if last is not job:
                self._runner.move(last.row, job.row, last.fed)
                last.row = job.row
                self._decoding[last.row] = last
                self._set_next(last)
        elif job in self._filling:
            self._filling.remove(job)
        else:
            with self._wake:
                self._waiting.remove(job)
        self._charge_joules(job)
        self._counts[finish] += 1
        self._counts["prompt_tokens"] += job.prompt
        self._counts["cached_tokens"] += job.cached
        self._counts["completion_tokens"] += job.made
        self._mean_seconds += 0.1 * (time.monotonic() - job.born - self._mean_seconds)
        reason = "" if error is None else _sentence(error)
        job.end(finish, stopped, reason, isinstance(error, ConstraintError))
        if job.future is not None:
            _resolve(job.future, job.hidden if finish == "length" else np.zeros(0), job.usage, reason or finish)
        job.tell(last=True)


def _checked(
    sampler: sampling.Sampler, guesses: list[int], proposed: list[np.ndarray], at: int, shaped: np.ndarray
) -> tuple[int, bool]:
    """The token at place `at` of the guesses by the shaped logits there, and whether the guess was it."""
    if at == len(guesses) or not proposed:
        token = sampler.pick(shaped)
        return token, at < len(guesses) and token == guesses[at]
    return check_drawn(guesses, proposed, sampler.dense(shaped), at, (sampler.draw(), sampler.draw()))


def _resolve(future: "Future[Embedding]", total: np.ndarray, usage: Usage, reason: str) -> None:
    if not future.set_running_or_notify_cancel():
        return  # nobody waits for it any more
    if not total.size or not np.isfinite(total).all():
        future.set_exception(RequestError(f"The text has no embedding ({reason})."))
    else:
        future.set_result(((total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32), usage))


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ShrewError) else f"{type(error).__name__}: {error}"
