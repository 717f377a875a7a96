"""The engine computes what the model says by definition, whoever is served beside, however the text was begun."""

import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pack
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew.errors import BusyError, RequestError, UnsupportedError, UsageError
from shrew.runtime import Answer, Engine, Model, Piece, Request, load
from shrew.runtime.constrain import ConstraintError

PROMPTS = [[random.Random(seed).randrange(3, 264) for _ in range(5 + 23 * seed % 71)] for seed in range(12)]


@pytest.fixture(scope="module", params=["hybrid", "cache", "aligned"])
def tiny(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny_pack.Tiny, Model]:
    folder = tmp_path_factory.mktemp("packs") / request.param
    made = tiny_pack.write(folder, recurrent=request.param != "cache", align=24 if request.param == "aligned" else 0)
    return made, load(folder)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny_pack.Tiny, Model]:
    folder = tmp_path_factory.mktemp("packs") / "hybrid"
    return tiny_pack.write(folder), load(folder)


@pytest.fixture
def engine(hybrid: tuple[tiny_pack.Tiny, Model]) -> Iterator[Engine]:
    with Engine(hybrid[1], slots=4) as made:
        yield made


def greedy(prompt: list[int], count: int = 20, **more: Any) -> Request:
    return Request(**{"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def ids(answer: Answer | Piece) -> list[int]:
    piece = answer if isinstance(answer, Piece) else answer.result()
    assert piece.error == ""
    return [token.id for token in piece.tokens]


class Slow:
    """Allows everything, but not at once, so that there is time to do something meanwhile."""

    finished = False

    def mask(self, left: int) -> np.ndarray | None:
        time.sleep(0.001)
        return None

    def advance(self, token: int) -> None: ...


def log_softmax(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=-1, keepdims=True)
    return logits - most - np.log(np.exp(logits - most).sum(axis=-1, keepdims=True))


# --- the same tokens as by definition --------------------------------------------------------------------------------


def test_one_after_the_other_and_all_at_once(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = tiny
    expected = [made.greedy(prompt, 20) for prompt in PROMPTS]
    with Engine(model, slots=1) as engine:
        assert [ids(engine.submit(greedy(prompt))) for prompt in PROMPTS] == expected
    for slots in (3, 12):
        with Engine(model, slots=slots) as engine:
            answers = [engine.submit(greedy(prompt)) for prompt in PROMPTS]
            assert [ids(answer) for answer in answers] == expected


@settings(max_examples=15)
@given(data=st.data())
def test_joining_and_leaving_at_any_time(hybrid: tuple[tiny_pack.Tiny, Model], data: Any) -> None:
    made, model = hybrid
    counts = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=12))
    waits = data.draw(st.lists(st.sampled_from([0, 0.0005, 0.003]), min_size=12, max_size=12))
    slots, memory = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([None, 3_000_000]))
    with Engine(model, slots=slots, memory=memory) as engine:
        answers = []
        for prompt, count, wait in zip(PROMPTS, counts, waits, strict=False):
            answers.append(engine.submit(greedy(prompt, count)))
            time.sleep(wait)
        for prompt, count, answer in zip(PROMPTS, counts, answers, strict=False):
            assert ids(answer) == made.greedy(prompt, count)


def test_long_texts_grow_the_cache(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = tiny
    long = [random.Random(1).randrange(3, 264) for _ in range(250)]
    with Engine(model, slots=2) as engine:
        answers = [engine.submit(greedy(PROMPTS[0], 60)), engine.submit(greedy(long, 40))]
        assert engine.metrics()["capacity_tokens"] == 256
        assert ids(answers[1]) == made.greedy(long, 40)
        assert ids(answers[0]) == made.greedy(PROMPTS[0], 60)
        assert engine.metrics()["capacity_tokens"] == 512
        end = engine.submit(greedy([5] * 590, 60)).result()
        assert (end.finish, len(end.tokens)) == ("length", 10)
        assert engine.metrics()["capacity_tokens"] == 600


def test_prefixes_are_shared_and_change_nothing(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = tiny
    system = [random.Random(2).randrange(3, 264) for _ in range(70)]
    with Engine(model, slots=2) as engine:
        first = engine.submit(greedy([*system, 7, 8])).result()
        assert first.usage and first.usage.cached_tokens == 0
        again = engine.submit(greedy([*system, 7, 8])).result()
        assert again.usage and again.usage.cached_tokens == 71  # all but the token that the first step takes
        assert ids(again) == ids(first) == made.greedy([*system, 7, 8], 20)
        other = engine.submit(greedy([*system, 9, 10, 11])).result()
        assert other.usage and other.usage.cached_tokens >= 48
        assert ids(other) == made.greedy([*system, 9, 10, 11], 20)
        turn = [*system, 7, 8, *ids(first), 30, 31, 32]
        following = engine.submit(greedy(turn)).result()
        assert following.usage and following.usage.cached_tokens == 70 + 2 + 19
        assert ids(following) == made.greedy(turn, 20)


def test_a_text_goes_on_only_from_where_every_state_is_known(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    """Of what was answered a cache is known at every token, a recurrent state only at the end."""
    made, model = tiny
    with Engine(model, slots=2) as engine:
        said = ids(engine.submit(greedy(PROMPTS[0], 60)))
        half = [*PROMPTS[0], *said[:50], 9, 9]
        other = engine.submit(greedy(half)).result()
        assert ids(other) == made.greedy(half, 20)
        assert other.usage and other.usage.cached_tokens == (4 if made.recurrent else 48)
        again = engine.submit(greedy([*PROMPTS[0], *said, 9])).result()
        assert again.usage and again.usage.cached_tokens == 64
        assert ids(again) == made.greedy([*PROMPTS[0], *said, 9], 20)


def test_the_same_prompt_at_once_is_computed_once(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = hybrid
    prompt = [random.Random(3).randrange(3, 264) for _ in range(160)]
    with Engine(model, slots=8) as engine:
        answers = [engine.submit(greedy(prompt, 5)) for _ in range(8)]
        assert {tuple(ids(answer)) for answer in answers} == {tuple(made.greedy(prompt, 5))}
        found = engine.metrics()
    assert found["calls_total"] <= 2 * 10  # ten pieces
    assert found["cached_tokens_total"] >= 7 * 100


def test_prefixes_stay_within_their_memory(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = hybrid
    with Engine(model, slots=2, memory=2 * (2 * 600 * 16 * 4 + 2 * (32 * 4 + 16)) + 60_000) as engine:
        for turn in range(3):
            for prompt in PROMPTS:
                assert ids(engine.submit(greedy(prompt, 6))) == made.greedy(prompt, 6), turn
                assert 0 < engine.metrics()["prefix_bytes"] <= 60_000


# --- log-probabilities, hidden states --------------------------------------------------------------------------------


def test_log_probabilities(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = tiny
    prompt = PROMPTS[5]
    with Engine(model) as engine:
        piece = engine.submit(greedy(prompt, 8, logprobs=3, echo=True)).result()
        alone = engine.submit(greedy(prompt, 0, logprobs=0, echo=True)).result()
        end = engine.submit(Request(prompt=[5], max_tokens=0, echo=True)).result()
    expected = log_softmax(made.logits(prompt + ids(piece)))
    assert piece.prompt[0].logprob is None
    for at, token in enumerate([*piece.prompt[1:], *piece.tokens]):
        row = expected[at]
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        best = np.argsort(-row)[:3]
        assert [id for id, _ in token.top] == best.tolist()
        assert [value for _, value in token.top] == pytest.approx(row[best], abs=1e-4)
    assert [token.id for token in piece.prompt] == prompt
    assert [t.logprob for t in alone.prompt[1:]] == pytest.approx([t.logprob for t in piece.prompt[1:]], abs=1e-5)
    assert (alone.finish, alone.tokens, alone.prompt[1].top) == ("length", (), ())
    assert [token.id for token in end.prompt] == [5]


def test_log_probabilities_are_the_models_own_whatever_is_sampled(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = hybrid
    with Engine(model) as engine:
        request = Request(prompt=PROMPTS[1], max_tokens=6, temperature=1.5, top_k=20, seed=3, logit_bias={9: 5.0},
                          presence_penalty=1, logprobs=1, ignore_eos=True)  # fmt: skip
        piece = engine.submit(request).result()
    rows = log_softmax(made.logits(PROMPTS[1] + ids(piece)))[len(PROMPTS[1]) - 1 :]
    for row, token in zip(rows, piece.tokens, strict=False):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)


def test_an_embedding_that_is_cancelled_is_not_computed(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with Engine(hybrid[1], slots=1) as engine:
        busy = engine.submit(greedy(PROMPTS[0], 400))
        first, second = engine.embedding([5] * 500), engine.embedding(PROMPTS[3])
        assert first.cancel()
        busy.cancel()
        assert np.isfinite(second.result(timeout=60)[0]).all()
        found = engine.metrics()
        assert (found["requests_cancelled_total"], found["requests_length_total"]) == (2, 1)
        assert found["prompt_tokens_total"] < 1000 and found["calls_total"] < 20


def test_embeddings(tiny: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = tiny
    with Engine(model) as engine:
        busy = engine.submit(greedy(PROMPTS[0], 200))
        found = [engine.embed(prompt) for prompt in (PROMPTS[2], PROMPTS[2], PROMPTS[3], [9])]
        busy.cancel()
        with pytest.raises(RequestError, match="empty"):
            engine.embed([])
    assert np.array_equal(found[0], found[1])
    head = made.weights["head"].astype(np.float64)
    texts = (PROMPTS[2], PROMPTS[3], [9])
    hidden = [np.linalg.lstsq(head.T, made.logits(text).T, rcond=None)[0].T for text in texts]
    for vector, states in zip((found[0], found[2], found[3]), hidden, strict=True):
        mean = states.mean(axis=0)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-4)


# --- sampling through the engine -------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_whoever_is_served_beside_it(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    _, model = hybrid
    request = Request(prompt=PROMPTS[4], max_tokens=40, temperature=1.2, top_p=0.95, seed=7, ignore_eos=True)
    with Engine(model, slots=6) as engine:
        alone = ids(engine.submit(request))
        others = [engine.submit(Request(prompt=prompt, max_tokens=60)) for prompt in PROMPTS[:5]]
        assert ids(engine.submit(request)) == alone
        assert ids(engine.submit(replace(request, seed=8))) != alone
        first, second = (ids(engine.submit(replace(request, seed=None))) for _ in range(2))
        assert first != second
        for other in others:
            other.cancel()


def test_bias_and_penalties_and_top_k(engine: Engine) -> None:
    assert set(ids(engine.submit(greedy(PROMPTS[0], 5, logit_bias={77: 1e6})))) == {77}
    once = ids(engine.submit(greedy(PROMPTS[0], 30, frequency_penalty=100)))
    assert len(set(once)) == 30
    assert len(set(ids(engine.submit(greedy(PROMPTS[0], 30, presence_penalty=100))))) == 30
    prompt = [*range(3, 250)]
    assert set(ids(engine.submit(greedy(prompt, 5, repetition_penalty=100)))) & set(prompt) == set()
    likeliest = ids(engine.submit(greedy(PROMPTS[0], 5)))
    assert ids(engine.submit(greedy(PROMPTS[0], 5, temperature=5, top_k=1))) == likeliest
    assert ids(engine.submit(greedy(PROMPTS[0], 5, temperature=5, top_p=1e-9))) == likeliest
    assert ids(engine.submit(greedy(PROMPTS[0], 5, temperature=5, min_p=1.0))) == likeliest


# --- how a text ends -------------------------------------------------------------------------------------------------


def test_eos_ends_a_text_and_is_not_part_of_it(engine: Engine) -> None:
    eos = {1: 1e6}
    piece = engine.submit(Request(prompt=[5, 6], logit_bias=eos)).result()
    assert (piece.text, piece.tokens, piece.finish) == ("", (), "stop")
    assert piece.usage and piece.usage.completion_tokens == 1
    piece = engine.submit(Request(prompt=[5, 6], logit_bias=eos, ignore_eos=True, max_tokens=4)).result()
    assert (piece.text, [token.id for token in piece.tokens], piece.finish) == ("", [1] * 4, "length")


def test_stop_strings(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    _, model = hybrid
    with Engine(model) as engine:
        whole = engine.submit(greedy(PROMPTS[6], 40)).result()
        at = len(whole.text) // 2
        stop = whole.text[at : at + 3]
        piece = engine.submit(greedy(PROMPTS[6], 40, stop=["never there", stop])).result()
        before = whole.text[: whole.text.find(stop)]
        assert (piece.text, piece.finish) == (before, "stop")
        assert ids(piece) == ids(whole)[: len(piece.tokens)]
        assert len(piece.tokens) < 40


def test_pieces_come_as_they_are_made(engine: Engine) -> None:
    pieces = []
    answer = engine.submit(greedy(PROMPTS[1], 500, constraint=Slow()))
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 5:
            answer.cancel()
    assert pieces[-1].finish == "cancelled"
    assert all(piece.finish is None and piece.usage is None for piece in pieces[:-1])
    assert 5 <= sum(len(piece.tokens) for piece in pieces) < 500
    assert list(answer) == []
    assert answer.take() is None


def test_an_event_loop_takes_without_waiting(engine: Engine) -> None:
    news, pieces = threading.Event(), []
    answer = engine.submit(greedy(PROMPTS[1], 30), notify=news.set)
    while not (pieces and pieces[-1].finish):
        assert news.wait(10)
        news.clear()
        while (piece := answer.take()) is not None:
            pieces.append(piece)
    assert sum(len(piece.tokens) for piece in pieces) == 30


def test_who_cannot_be_notified_is_cancelled(engine: Engine) -> None:
    def gone() -> None:
        raise RuntimeError("the loop is closed")

    answer = engine.submit(greedy(PROMPTS[1], 500), notify=gone)
    assert answer.result().finish == "cancelled"
    assert ids(engine.submit(greedy(PROMPTS[1], 3)))


def test_a_deadline(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with Engine(hybrid[1], slots=1) as engine:
        running = engine.submit(greedy(PROMPTS[0], 500, constraint=Slow()))
        waiting = engine.submit(greedy(PROMPTS[0], 500, seconds=0.005))
        end = waiting.result()
        assert (end.finish, end.tokens) == ("deadline", ())
        running.cancel()
        begun = engine.submit(greedy(PROMPTS[0], 590, seconds=0.2, constraint=Slow())).result()
        assert begun.finish == "deadline"
        assert 0 < len(begun.tokens) < 590


def test_one_that_fails_ends_alone(hybrid: tuple[tiny_pack.Tiny, Model], tmp_path: Path) -> None:
    class Broken:
        finished = False

        def mask(self, left: int) -> np.ndarray | None:
            raise ConstraintError("no token can follow here.")

        def advance(self, token: int) -> None: ...

    class Wrong(Broken):
        def mask(self, left: int) -> np.ndarray | None:
            return np.ones(7, bool)

    class Nothing(Broken):
        def mask(self, left: int) -> np.ndarray | None:
            return np.zeros(264, bool)

    made = tiny_pack.write(tmp_path / "poisoned", poison=40)
    with Engine(load(tmp_path / "poisoned"), slots=8) as engine:
        good = [engine.submit(greedy(PROMPTS[0], 40, logit_bias={40: -1e9})) for _ in range(2)]
        bad = [
            engine.submit(greedy(PROMPTS[0], 40, constraint=Broken())),
            engine.submit(greedy(PROMPTS[0], 40, constraint=Wrong())),
            engine.submit(greedy(PROMPTS[0], 40, constraint=Nothing())),
            engine.submit(greedy([5, 40, 6], 40)),
            engine.submit(Request(prompt=[5, 40, 6])),
        ]
        ends = [answer.result() for answer in bad]
        assert [end.finish for end in ends] == ["error"] * 5
        assert ends[0].error == "no token can follow here."
        assert "264" in ends[1].error
        assert [end.refused for end in ends] == [True, False, False, False, False]
        assert all("no usable" in end.error for end in ends[2:])
        with pytest.raises(RequestError, match="no embedding"):
            engine.embed([5, 40])
        assert {answer.result().finish for answer in good} == {"length"}
        if 40 not in (expected := made.greedy(PROMPTS[1], 10)):
            assert ids(engine.submit(greedy(PROMPTS[1], 10))) == expected


def test_a_constraint(engine: Engine) -> None:
    class Spells:
        def __init__(self) -> None:
            self.left, self.lefts = [50, 60, 70], []

        def mask(self, left: int) -> np.ndarray | None:
            self.lefts.append(left)
            mask = np.zeros(264, bool)
            mask[self.left[0]] = True
            return mask

        def advance(self, token: int) -> None:
            assert token == self.left.pop(0)

        @property
        def finished(self) -> bool:
            return not self.left

    for temperature in (0, 1):
        spells = Spells()
        piece = engine.submit(Request(prompt=[5], max_tokens=9, temperature=temperature, constraint=spells)).result()
        assert (ids(piece), piece.finish, spells.lefts) == ([50, 60, 70], "stop", [9, 8, 7])


# --- limits and manners ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [264]}, "vocabulary"),
        ({"prompt": [-1]}, "vocabulary"),
        ({"prompt": [5] * 600}, "at most 599"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logprobs": 265}, "logprobs"),
        ({"logit_bias": {264: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"seed": -1}, "seed"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_what_cannot_be_served_is_refused(engine: Engine, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.submit(Request(**{"prompt": [5], **wrong}))


def test_a_full_queue_says_when_to_come_back(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with Engine(hybrid[1], slots=1, queue=2) as engine:
        answers: list[Answer] = []
        with pytest.raises(BusyError, match="waiting already") as caught:
            for _ in range(9):
                answers.append(engine.submit(greedy(PROMPTS[0], 500, constraint=Slow())))
        assert caught.value.retry_after >= 1
        assert 2 <= len(answers) <= 3
        assert engine.metrics()["refused_total"] == 1
        for answer in answers:
            answer.cancel()
        assert {answer.result().finish for answer in answers} == {"cancelled"}
        assert len(ids(engine.submit(greedy(PROMPTS[0], 5)))) == 5


def test_closing_cancels_or_waits(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    engine = Engine(hybrid[1], slots=1)
    answers = [engine.submit(greedy(PROMPTS[0], 500, constraint=Slow())) for _ in range(3)]
    engine.close()
    assert {answer.result().finish for answer in answers} == {"cancelled"}
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit(greedy(PROMPTS[0]))
    engine.close()
    engine = Engine(hybrid[1], slots=1)
    answers = [engine.submit(greedy(PROMPTS[0], 50)) for _ in range(3)]
    engine.close(seconds=60)
    assert {answer.result().finish for answer in answers} == {"length"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"memory": 100_000}, "100,000 allowed"), ({"slots": 0}, "1 or more"), ({"context": 601}, "does not fit"),
     ({"queue": 0}, "1 or more"), ({"draft": "nonsense"}, "unknown draft")],
)  # fmt: skip
def test_settings_that_cannot_work(hybrid: tuple[tiny_pack.Tiny, Model], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Engine(hybrid[1], **settings)


def test_a_shorter_context_fits_less_memory(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with Engine(hybrid[1], slots=2, memory=100_000, context=100) as engine:
        assert len(ids(engine.submit(greedy([5] * 90)))) == 10
        with pytest.raises(RequestError, match="at most 99"):
            engine.submit(greedy([5] * 100))


def test_a_long_prompt_does_not_keep_answers_waiting(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    """Between two tokens of an answer there is never more than one piece of a prompt."""
    made, model = hybrid
    calls: list[str] = []
    with Engine(model, slots=4) as engine:
        runner = engine._runner
        call, step = runner.call, runner.step
        runner.call = lambda *a, **k: (calls.append("prompt"), call(*a, **k))[1]  # type: ignore[method-assign]
        runner.step = lambda *a, **k: (calls.append("step"), step(*a, **k))[1]  # type: ignore[method-assign]
        first = engine.submit(greedy(PROMPTS[0], 500, constraint=Slow()))
        next(first)
        longs = [engine.submit(greedy([7 + seed] * 400, 5)) for seed in range(2)]
        ended: list[float] = []
        short = engine.submit(
            greedy(PROMPTS[8], 5), notify=lambda: ended.append(engine.metrics()["requests_length_total"])
        )
        assert ids(short) == made.greedy(PROMPTS[8], 5)
        assert ended[-1] == 1  # it did not wait for the long ones, which came first
        assert [ids(long) for long in longs] == [made.greedy([7 + seed] * 400, 5) for seed in range(2)]
        assert first.take() and not first._is_done
        first.cancel()
    text = "".join(what[0] for what in calls).lstrip("p")
    assert text.count("p") == 25 + 25 + 3
    assert "pp" not in text


def test_usage_adds_up_to_the_processors_time(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with Engine(hybrid[1]) as engine:
        ends = [a.result() for a in [engine.submit(greedy(prompt, 30)) for prompt in PROMPTS[:5]]]
        found = engine.metrics()
    used = [end.usage for end in ends if end.usage]
    assert sum(usage.cpu_seconds for usage in used) == pytest.approx(found["cpu_seconds_total"], rel=1e-6)
    assert all(usage.cpu_seconds > 0 for usage in used)
    assert sum(usage.prompt_tokens for usage in used) == found["prompt_tokens_total"]
    assert sum(usage.completion_tokens for usage in used) == found["completion_tokens_total"] == 150
    assert found["requests_length_total"] == 5


def test_many_threads(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    made, model = hybrid
    expected = [made.greedy(prompt, 6) for prompt in PROMPTS]
    faults: list[Any] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(15):
            which = draw.randrange(len(PROMPTS))
            try:
                answer = engine.submit(greedy(PROMPTS[which], 6))
                if draw.random() < 0.2:
                    answer.cancel()
                    answer.result()
                elif ids(answer) != expected[which]:
                    faults.append(which)
            except BusyError:
                time.sleep(0.01)
            except Exception as error:
                faults.append(error)

    with Engine(model, slots=4, queue=4) as engine:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.metrics()["running"] == engine.metrics()["waiting"] == 0
    assert faults == []


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_does_not_grow(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    draw = random.Random(0)
    with Engine(hybrid[1], memory=700_000) as engine:

        def serve(count: int) -> None:
            answers: list[Answer] = []
            for _ in range(count):
                prompt = [draw.randrange(3, 264) for _ in range(draw.randrange(1, 40))]
                answers.append(engine.submit(Request(prompt=prompt, max_tokens=4, seed=1, logprobs=1, stop=["x"])))
                if len(answers) > 20:
                    answers.pop(0).result()
            for answer in answers:
                answer.result()

        serve(300)
        before = resident()
        serve(1500)
        assert resident() - before < 8 << 20
        tracemalloc.start()
        serve(50)
        traced = tracemalloc.get_traced_memory()[0]
        serve(150)
        grown = tracemalloc.get_traced_memory()[0] - traced
        tracemalloc.stop()
    assert grown < 50_000


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_a_classifier(tmp_path: Path) -> None:
    table = tiny_pack.write_classifier(tmp_path / "pack", ["code", "prose", "other"])
    model = load(tmp_path / "pack")
    assert model.manifest.labels == ("code", "prose", "other")
    texts = [prompt[:64] for prompt in PROMPTS]
    np.testing.assert_allclose(model.classify(texts), [table[text].mean(axis=0) for text in texts], atol=1e-5)
    assert model.classify([]).shape == (0, 3)
    with pytest.raises(RequestError, match="text 1 is empty"):
        model.classify([[5], []])
    with pytest.raises(RequestError, match="at most 64"):
        model.classify([[5] * 65])
    with pytest.raises(UnsupportedError, match="classify"):
        Engine(model)


def test_a_model_that_completes_does_not_classify(hybrid: tuple[tiny_pack.Tiny, Model]) -> None:
    with pytest.raises(UnsupportedError, match="no labels"):
        hybrid[1].classify([[5]])
