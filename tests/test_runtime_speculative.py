"""Guessing ahead gives the text that is given without it."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pack
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shrew.errors import UsageError
from shrew.runtime import Engine, Model, Piece, Request, load
from shrew.runtime.speculative import MOST, Lookup, Pace, Smaller
from shrew.runtime.states import call_end

PROMPTS = [[random.Random(seed).randrange(3, 264) for _ in range(3 + 31 * seed)] for seed in range(4)]
PROMPTS[2] = [5, 6, 7, 8, 9, 10, 11, 12] * 6


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    for recurrent in (True, False):
        for align in (0, 24):
            tiny_pack.write(folder / f"{recurrent}{align}", recurrent=recurrent, align=align)
    tiny_pack.write(folder / "other", seed=9)
    tiny_pack.write(folder / "short", recurrent=False, context=60)
    return folder


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many guesses as may be, whatever they cost on this machine."""
    turns = iter(range(10**9))
    monkeypatch.setattr(Pace, "choose", lambda self, most: min(most, (MOST, 3, 1, 5)[next(turns) % 4]))
    yield


def drafted(packs: Path, name: str) -> Model | str:
    return name if name == "lookup" else load(packs / name)


def greedy(prompt: list[int], count: int = 40, **more: Any) -> Request:
    return Request(**{"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, **more})


def ids(piece: Piece) -> list[int]:
    assert piece.error == ""
    return [token.id for token in piece.tokens]


@pytest.mark.parametrize("target", ["True0", "True24", "False0", "False24"])
@pytest.mark.parametrize("draft", ["True0", "False24", "other", "short", "lookup"])
def test_the_same_tokens_as_by_definition(packs: Path, target: str, draft: str) -> None:
    made = tiny_pack.Tiny(tiny_pack.random_weights(0, 32, 600), target.startswith("True"))
    with Engine(load(packs / target), draft=drafted(packs, draft)) as engine:
        for prompt in [*PROMPTS, PROMPTS[0]]:
            assert ids(engine.submit(greedy(prompt)).result()) == made.greedy(prompt, 40)
        following = [*PROMPTS[1], *made.greedy(PROMPTS[1], 40), 9, 9]
        assert ids(engine.submit(greedy(following, 10)).result()) == made.greedy(following, 10)
        answers = [engine.submit(greedy(prompt)) for prompt in PROMPTS]
        assert [ids(answer.result()) for answer in answers] == [made.greedy(prompt, 40) for prompt in PROMPTS]
        found = engine.metrics()
    assert found["guessed_tokens_total"] > 0
    if draft == target:
        assert found["guessed_right_tokens_total"] > 0.9 * found["guessed_tokens_total"]
        assert found["steps_total"] + found["calls_total"] < 300


@pytest.mark.parametrize("draft", ["other", "lookup"])
def test_everything_else_is_the_same_too(packs: Path, draft: str) -> None:
    class Even:
        def __init__(self) -> None:
            self.said: list[int] = []

        def mask(self, left: int) -> np.ndarray | None:
            mask = np.arange(264) % 2 == len(self.said) % 2
            mask[:3] = False
            return mask

        def advance(self, token: int) -> None:
            assert token % 2 == len(self.said) % 2
            self.said.append(token)

        @property
        def finished(self) -> bool:
            return len(self.said) == 33

    def requests() -> list[Request]:
        seeded = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
        return [
            greedy(PROMPTS[1], logprobs=2, echo=True),
            greedy(PROMPTS[2], frequency_penalty=0.5, repetition_penalty=1.2),
            greedy(PROMPTS[0], stop=["\x1a", "a"]),
            greedy(PROMPTS[3], constraint=Even()),
            greedy(PROMPTS[1], 60, **seeded),
            greedy(PROMPTS[2], 60, **seeded, presence_penalty=1, logit_bias={8: 2.0}),
            greedy(PROMPTS[3], **seeded, constraint=Even()),
            greedy([5] * 580, 60),
            Request(prompt=PROMPTS[0], temperature=0, logit_bias={1: 20.0}),
        ]

    model = load(packs / "True0")
    with Engine(model) as plain, Engine(model, draft=drafted(packs, draft)) as guessing:
        for one, other in zip(requests(), requests(), strict=True):
            expected, found = plain.submit(one).result(), guessing.submit(other).result()
            assert (found.text, found.finish, ids(found)) == (expected.text, expected.finish, ids(expected))
            for token, like in zip([*found.prompt, *found.tokens], [*expected.prompt, *expected.tokens], strict=True):
                assert token.logprob == pytest.approx(like.logprob, abs=1e-4)
            assert found.usage and expected.usage
            assert found.usage.completion_tokens == expected.usage.completion_tokens
        assert guessing.metrics()["guessed_tokens_total"] > 0


def test_near_ties_are_left_to_single_steps(packs: Path, tmp_path: Path) -> None:
    """Where two tokens are always nearly equal no guess is believed, and the text is that of single steps."""
    made = tiny_pack.write(tmp_path / "pairs", pairs=3e-4)
    model = load(tmp_path / "pairs")
    with Engine(model, draft=model) as guessing:
        found = ids(guessing.submit(greedy(PROMPTS[1])).result())
        assert guessing.metrics()["guessed_right_tokens_total"] == 0
    assert found == made.greedy(PROMPTS[1], 40)


def test_sampling_without_a_seed_keeps_its_distribution(packs: Path) -> None:
    made = tiny_pack.Tiny(tiny_pack.random_weights(0, 32, 600), True)

    def p(text: list[int]) -> np.ndarray:
        logits = made.logits(text)[-1] / 3
        logits[logits < np.sort(logits)[-3]] = -np.inf
        p = np.exp(logits - logits.max())
        return p / p.sum()

    prompt, counts = PROMPTS[0], Counter[tuple[int, ...]]()
    expected = {(int(a), int(b)): p(prompt)[a] * p([*prompt, int(a)])[b]
                for a in np.flatnonzero(p(prompt)) for b in np.flatnonzero(p([*prompt, int(a)]))}  # fmt: skip
    total = 1200
    with Engine(load(packs / "True0"), draft=load(packs / "other")) as engine:
        for _ in range(total):
            request = Request(prompt=prompt, max_tokens=2, temperature=3, top_k=3, ignore_eos=True)
            counts[tuple(ids(engine.submit(request).result()))] += 1
        assert engine.metrics()["guessed_tokens_total"] >= total
    assert counts.keys() <= expected.keys()
    assert sum((counts[pair] - total * share) ** 2 / (total * share) for pair, share in expected.items()) < 31  # of 8


def test_a_draft_needs_the_same_tokens(packs: Path, tmp_path: Path) -> None:
    tiny_pack.write(tmp_path / "pack")
    tokenizer = Tokenizer.from_file(str(tmp_path / "pack" / "tokenizer.json"))
    tokenizer.add_tokens(["<more>"])
    tokenizer.save(str(tmp_path / "pack" / "tokenizer.json"))
    manifest = json.loads((tmp_path / "pack" / "pack.json").read_text())
    tiny_pack.seal(tmp_path / "pack", {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(UsageError, match="same tokenizer"):
        Engine(load(packs / "True0"), draft=load(tmp_path / "pack"))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 5))
def test_lookup_by_definition(text: list[int], count: int) -> None:
    lookup, same, growing = Lookup(), Lookup(), list[int]()
    for end in range(1, len(text) + 1):
        row = text[:end]
        places = [at for at in range(3, end) if row[at - 3 : at] == row[-3:]] if end >= 3 else []
        expected = row[max(places) :][:count] if places else []
        assert lookup.guess(row, count, None) == (expected, [])
        growing.append(text[end - 1])
        assert same.guess(growing, count, None) == (expected, [])
    assert lookup.guess(text[:1], 3, None) == Lookup().guess(text[:1], 3, None)


@given(st.data())
def test_a_smaller_model_guesses_the_same_whatever_came_before(packs: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["True0", "False24"]))
    made = tiny_pack.Tiny(tiny_pack.random_weights(0, 32, 600), name.startswith("True"))
    smaller, text = Smaller(load(packs / name, verify=False), 600), [5]
    for _ in range(data.draw(st.integers(1, 6))):
        text = [*text[: data.draw(st.integers(1, len(text)))], *data.draw(st.lists(st.integers(3, 12), max_size=4))]
        count = data.draw(st.integers(1, 4))
        assert smaller.guess(text, count, None)[0] == made.greedy(text, count)
        text = [*text, *made.greedy(text, data.draw(st.integers(0, count)))]


@given(st.integers(0, 500), st.integers(1, 600), st.integers(1, 70), st.integers(0, 200))
def test_calls_end_at_the_same_places(start: int, more: int, chunk: int, align: int) -> None:
    end = call_end(start, start + more, chunk, align)
    assert 1 <= end - start <= min(chunk, more)
    if align:
        assert start // align == (end - 1) // align
    if end < start + more:
        assert end % (align or chunk) % chunk == 0
        assert call_end(start + (end - start) // 2, start + more, chunk, align) == end


def test_pace_guesses_where_it_pays() -> None:
    def settled(seconds: dict[int, float], right: float) -> Counter[int]:
        pace, draw, chosen = Pace(), random.Random(0), Counter[int]()
        for _ in range(1000):
            length = real_choose(pace, MOST)
            stands = next((at for at in range(length) if draw.random() > right), length)
            pace.note(length, stands, seconds[length])
            chosen[length] += 1
        return chosen

    cheap = {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}
    dear = {0: 1.0, 1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}
    assert settled(cheap, 0.95).most_common(1)[0][0] == 8
    assert settled(dear, 0.5).most_common(1)[0][0] == 0
    assert 5 <= sum(count for length, count in settled(dear, 0.5).items() if length) <= 100
    assert settled(cheap, 0.5).most_common(1)[0][0] in (1, 2, 4)


real_choose = Pace.choose
