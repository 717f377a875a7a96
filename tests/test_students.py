"""Students of other shapes: teachers with other tokenizers, texts of the student's own, worked answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distil import context_for, loaded_of, of_our_blocks, quantized
from test_folder import WORDS, make_tokenizer
from test_teacher import LOSSES, by_definition, drawn, same
from torch import Tensor
from torch.nn import functional as F

from shrew import data, folder, objectives
from shrew.data.rationales import read_rationales
from shrew.errors import DataError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.moves.distil import Distil, Plan, rationales, teacher
from shrew.moves.distil.marginals import (
    END,
    ENDED,
    OTHER,
    OUTCOMES,
    Said,
    Spelling,
    State,
    byte_divergence,
    retold,
)
from shrew.moves.distil.sample import continued

# --- another tokenizer


def byte_tokenizer(size: int, text: str, seed: int = 0) -> Any:
    from shrew.data.tokenizer import train_tokenizer

    return train_tokenizer([data.Document("a", text)], size, seed)


def piece_tokenizer() -> Any:
    """As SentencePiece's are: a space is a mark, one stands before the text, and what is unknown is bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "c", "a"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a")]
    names += ["".join(pair) for pair in merges]
    known = {name: at for at, name in enumerate(names)}
    core = Tokenizer(models.BPE(known, merges, byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny(tokenizer: Any, seed: int = 0, **more: int) -> Loaded:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 64}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape | ids | more)
    return Loaded(LlamaForCausalLM(config).eval(), tokenizer)


TEXT = "the cat thaws the café; the tea, the other theatre. " * 4


def test_tokens_are_spelt_in_bytes() -> None:
    for tokenizer in (byte_tokenizer(280, TEXT), piece_tokenizer()):
        spelling = Spelling(tokenizer, len(tokenizer) + 3)
        ids = tokenizer("the café, ok", add_special_tokens=False)["input_ids"]
        assert b"".join(spelling.content[id] for id in ids).removeprefix(b" ").decode() == "the café, ok"
        assert spelling.first[tokenizer.eos_token_id] == END
        assert spelling.first[-1] == OTHER
        found, following = spelling.after(b"t")
        assert sorted(found.tolist()) == [id for id, part in enumerate(spelling.content) if part[:1] == b"t"]
        assert following.tolist() == [[*spelling.content[id], ENDED][1] for id in found.tolist()]
    with pytest.raises(UnsupportedError, match="loses bytes"):
        Spelling(make_tokenizer(), WORDS)


def test_texts_are_told_again_and_boundaries_meet() -> None:
    fine, coarse = byte_tokenizer(257, TEXT), byte_tokenizer(280, TEXT)
    one, two = Spelling(fine, len(fine)), Spelling(coarse, len(coarse))
    ids = fine("the café", add_special_tokens=False)["input_ids"]
    told = retold([fine.bos_token_id, *ids], one, two)
    assert told is not None
    other, start = told
    assert other == data.encode(coarse, ["the café"])[0]
    assert start == 0
    states = one.states([fine.bos_token_id, *ids], 0)
    assert [state.position for state in states.values()] == list(range(len(ids) + 1))
    assert all(state.ways == ((state.position, b""),) for state in states.values())  # tokens of one byte go on nowhere
    states = two.states(other, 0)
    assert list(states) == list(range(len("the café".encode()) + 1))  # and what comes after the last
    text = b"".join(two.content[id] for id in other)
    for at, state in states.items():
        for position, prefix in state.ways:
            assert b"".join(two.content[id] for id in other[: position + 1]) + prefix == text[:at]
    assert any(prefix for state in states.values() for _, prefix in state.ways)
    ended = two.states([*other, coarse.eos_token_id, *other], 0)
    assert all(state.ways[0][0] > len(other) for at, state in ended.items() if at > len(text))
    half = retold(ids[-1:], one, two)  # half of a character is nothing
    assert half is None
    cut = retold([ids[-1], *ids, ids[-1], *ids], one, two)  # nor is it one at the beginning of a text, or within
    assert cut is not None
    assert cut == (other, 1)
    pieces = piece_tokenizer()
    three = Spelling(pieces, len(pieces))
    told = retold(ids, one, three)
    assert told is not None
    assert told[1] == -1  # the space before the text
    assert retold(coarse("the\n", add_special_tokens=False)["input_ids"], two, two) is not None


def covered(logs: Tensor, ids: list[int], spelling: Spelling, at: int) -> Tensor:
    """[OUTCOMES + 1] shares of what follows byte `at` of a text: from every beginning of a token of it, every token of
    the vocabulary that begins with the bytes since, with the probability of the tokens before."""
    text, found = b"".join(spelling.content[id] for id in ids), [torch.zeros((), dtype=torch.float64)] * (OUTCOMES + 1)
    starts = np.cumsum([len(spelling.content[id]) for id in ids])
    near = [int(first) for first in np.unique(starts, return_index=True)[1] if 0 <= at - starts[first] <= 40]
    for position in near:
        before = [logs[place, ids[place + 1]].double() for place in range(near[0], position)]
        row, since = (sum(before) + logs[position].double()).exp(), text[starts[position] : at]
        for token, part in enumerate(spelling.content):
            if not since:
                outcome = int(spelling.first[token])
            elif part.startswith(since) and (part != since or [token] != ids[position + 1 : position + 2]):
                outcome = [*part, ENDED][len(since)]
            else:
                continue
            found[outcome] = found[outcome] + row[token]
    return torch.stack(found) / sum(found)


@pytest.mark.parametrize("loss", LOSSES)
def test_byte_marginals_are_exact_sums(loss: str) -> None:
    """Against sums over all tokens, with values and gradients."""
    fine, coarse = byte_tokenizer(262, "thaws " * 9), byte_tokenizer(270, TEXT)
    one, two = Spelling(fine, len(fine)), Spelling(coarse, len(coarse))
    ids = fine("the cat thaws", add_special_tokens=False)["input_ids"]
    told = retold(ids, one, two)
    assert told is not None
    own, others = one.states(ids, 0), two.states(*told)
    places = [at for at in own if at in others]
    states = [(own[at], others[at]) for at in places]
    assert len({(a.ways[-1][1] == b"", b.ways[-1][1] == b"") for a, b in states}) == 4  # of both, one, none
    logits, other = drawn(len(ids), len(fine)).requires_grad_(), drawn(len(told[0]), len(coarse), seed=1)
    q, p = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    mine = byte_divergence(Said(q, ids, one), Said(p, told[0], two), states, loss, 0.1)
    slow = torch.zeros(())
    for at in places:
        a, b = covered(q, ids, one, at)[:OUTCOMES], covered(p, told[0], two, at)[:OUTCOMES]
        both = (a > 0) & (b > 0)
        if not own[at].ways[-1][1] and not others[at].ways[-1][1]:
            assert int(both.sum()) == int((a > 0).sum()) == int((b > 0).sum())  # nothing is left out where both begin
        left, right = (part[both][None] / part[both].sum() for part in (a, b))
        slow = slow + by_definition(left, right, loss, 0.1) * b[both].sum()
    same(mine, slow, logits, 1e-4)


def test_the_same_tokens_say_the_same() -> None:
    """Of one tokenizer the byte trees hold all that the tokens say: zero only where the tokens agree."""
    tokenizer = byte_tokenizer(280, TEXT)
    spelling = Spelling(tokenizer, len(tokenizer))
    ids = tokenizer(TEXT[:40], add_special_tokens=False)["input_ids"]
    told = retold(ids, spelling, spelling)
    assert told is not None
    states = [(state, state) for state in spelling.states(told[0], 0).values()]
    logits, other = (drawn(len(told[0]), len(tokenizer), seed=seed).float().log_softmax(-1) for seed in (0, 3))
    for mine, near in ((logits, 0.0), (other, None)):
        found = byte_divergence(*(Said(item, told[0], spelling) for item in (mine, logits)), states, "forward", 0.1)
        assert float(found) == pytest.approx(near, abs=1e-4) if near is not None else float(found) > 1
    first = State(0, ((0, b""),))
    both = (Said(item, told[0], spelling) for item in (other, logits))
    alone = byte_divergence(*both, [(first, first)], "forward", 0.1)
    assert 0 < float(alone) < float(objectives.divergence(other[0], logits[0]))  # tokens with one first byte are one


def text_context(student: Loaded, cache: Path, length: int = 24, original: Loaded | None = None) -> Context:
    ids = data.encode(student.tokenizer, [TEXT])[0]
    rows = [np.array(ids[low : low + length], np.int64) for low in range(0, len(ids) - 2, length)]
    return Context(rows, rows, original, 0, cache, lambda text: None)


@pytest.fixture
def taught_elsewhere(tmp_path: Path) -> Callable[..., Path]:
    """A folder with a trained teacher of this tokenizer."""

    def make(tokenizer: Any, **shape: Any) -> Path:
        loaded = tiny(tokenizer, seed=5, **shape)
        context = text_context(loaded, tmp_path / "cache")
        Distil(steps=30, rows=2, lr=1e-2, teacher=0.0).apply(loaded, context)
        folder.save(loaded, tmp_path / "teacher", same=False)
        return tmp_path / "teacher"

    return make


def text_loss(student: Loaded, context: Context) -> float:
    with torch.no_grad():
        found = [student.model(input_ids=torch.from_numpy(row)[None]).logits[0, :-1] for row in context.healing]
    targets = torch.cat([torch.from_numpy(row[1:]) for row in context.healing])
    return float(F.cross_entropy(torch.cat(found), targets))


def test_a_teacher_of_another_shape_and_vocabulary(tmp_path: Path, taught_elsewhere: Callable[..., Path]) -> None:
    """From the teacher alone, whose tokens are others: what it learnt of the text shows in the student."""
    place = taught_elsewhere(byte_tokenizer(270, TEXT), hidden_size=48, num_hidden_layers=2)
    student = tiny(byte_tokenizer(280, TEXT))
    context = text_context(student, tmp_path / "cache")
    before = text_loss(student, context)
    Distil(steps=30, rows=2, lr=1e-2, teacher=1.0, teacher_model=str(place)).apply(student, context)
    assert text_loss(student, context) < before - 1
    long = text_context(student, tmp_path / "cache", 50)  # more of the teacher's tokens than it was made for
    Distil(steps=1, rows=2, teacher=1.0, teacher_model=str(place)).apply(student, long)
    own = Distil(steps=2, rows=2, teacher=1.0, on_policy=1.0, teacher_model=str(place))
    start = {name: p.clone() for name, p in student.model.named_parameters()}
    own.apply(student, context)
    assert any(not torch.equal(p, start[name]) for name, p in student.model.named_parameters())
    with pytest.raises(UnsupportedError, match="another tokenizer"):
        Distil(steps=1, hidden=1.0, teacher_model=str(place)).apply(student, context)


def test_a_wider_teacher_of_the_same_tokens(tmp_path: Path, taught_elsewhere: Callable[..., Path]) -> None:
    """Logits directly, hidden states through a learned map; a longer table of embeddings is cut to what both have."""
    tokenizer = byte_tokenizer(280, TEXT)
    place = taught_elsewhere(tokenizer, hidden_size=48, num_hidden_layers=2)
    taught = folder.load(place)
    taught.model.resize_token_embeddings(288, mean_resizing=False)
    folder.save(taught, place)
    student = tiny(tokenizer)
    context = text_context(student, tmp_path / "cache")
    before = text_loss(student, context)
    Distil(steps=20, rows=2, lr=1e-2, teacher=1.0, teacher_model=str(place)).apply(student, context)
    assert text_loss(student, context) < before - 1
    long = replace(context, healing=[np.zeros(70, np.int64)])
    with pytest.raises(UnsupportedError, match="made for 64 tokens and a window of text has 70"):
        Distil(teacher_model=str(place)).apply(student, long)
    aligned = Distil(steps=5, rows=2, hidden=1.0, attention=1.0, teacher_model=str(place)).apply(student, context)
    assert aligned is student


# --- the student's own text


def test_continuations_are_the_models_own(tmp_path: Path) -> None:
    """With the likeliest token far above all others, sampling is that token; what follows an end is no text."""
    loaded = tiny(byte_tokenizer(280, TEXT))
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1000)
    windows = [row[: 20 - at] for at, row in enumerate(text_context(loaded, tmp_path).healing[:2])]
    tokens, mask, own = continued(loaded, windows, 5, [0, 1])
    half = len(windows[1]) // 2
    assert tokens.shape == (2, half + 5)
    assert torch.equal(tokens[:, :half], torch.from_numpy(np.stack([row[:half] for row in windows])))
    assert own[:, :half].sum() == 0
    for row in range(2):
        ids = tokens[row, :half].tolist()
        for place in range(half, int(mask[row].sum())):
            with torch.no_grad():
                ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            assert tokens[row, place] == ids[place]
            assert own[row, place] == 1
    assert torch.equal(continued(loaded, windows, 5, [0, 1])[0], tokens)
    longest = continued(loaded, windows, 500, [0, 1])[0]
    assert longest.shape[1] <= 20
    end = loaded.tokenizer.eos_token_id
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.weight[end] = 1000 * loaded.model.model.norm.weight.new_ones(32)
    for seed in range(4):
        tokens, mask, own = continued(loaded, windows, 8, [seed])
        for row in range(2):
            places = (tokens[row, half:] == end).nonzero()[:, 0].tolist()
            assert int(own[row].sum()) == (places[0] + 1 if places else tokens.shape[1] - half)


def test_a_seed_draws_the_same_and_another_something_else(tmp_path: Path) -> None:
    loaded = tiny(byte_tokenizer(280, TEXT))
    windows = text_context(loaded, tmp_path).healing[:2]
    first, same, other = (continued(loaded, windows, 8, [seed])[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_share_of_the_steps_is_on_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([np.zeros(4, np.int64)] * 7, rows=3, steps=400, seed=3, on_policy=0.25)
    assert 60 < sum(plan.samples(step) for step in range(400)) < 140
    original = loaded_of("llama")
    context = context_for(tmp_path, original)
    student = quantized("llama", context)
    monkeypatch.setattr(teacher, "_ask", lambda *given: pytest.fail("the teacher is asked about text that is not used"))
    Distil(steps=2, on_policy=1.0, sampled=4).apply(student, context)


@pytest.mark.parametrize("make", [lambda: quantized("llama", context_for(Path())), of_our_blocks])
def test_on_policy_brings_the_student_nearer_on_its_own_text(make: Callable[[], Loaded], tmp_path: Path) -> None:
    student = make()
    original = loaded_of("llama") if student.packed else of_our_blocks()
    if not student.packed:
        with torch.no_grad():
            student.model.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    context = context_for(tmp_path, original)

    def measured() -> float:
        tokens, _, own = continued(student, context.healing[:4], 8, [7])
        with torch.no_grad():
            q, p = (item.model(input_ids=tokens).logits[:, :-1].log_softmax(-1) for item in (student, original))
        here = own[:, 1:].bool()
        return float(objectives.divergence(q[here], p[here])) / int(here.sum())

    before = measured()
    Distil(steps=12, lr=4e-3, teacher=1.0, on_policy=1.0, sampled=8).apply(student, context)
    assert measured() < 0.97 * before


# --- rationales


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


GOOD = {"text": "the tea and the cat", "rationale": "the tea is the cat", "answer": "the cat"}


def test_rationales_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    (item,) = read_rationales(written(tmp_path / "r.jsonl", GOOD))
    assert vars(item) == GOOD
    bad: dict[str, tuple[Any, str]] = {
        "missing": ({"text": "a", "answer": "b"}, "line 2: 'rationale' must"),
        "number": (GOOD | {"answer": 3}, "line 2: 'answer' must"),
        "empty": (GOOD | {"text": " "}, "line 2: 'text' must"),
        "no JSON": ("{", "line 2: no JSON"),
    }
    for name, (row, words) in bad.items():
        with pytest.raises(DataError, match=words):
            read_rationales(written(tmp_path / f"{name}.jsonl", GOOD, row))
    with pytest.raises(DataError, match="is empty"):
        read_rationales(written(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        read_rationales(tmp_path / "nothing.jsonl")


def test_only_what_is_to_be_written_counts(tmp_path: Path) -> None:
    loaded = tiny(byte_tokenizer(280, TEXT))
    said: list[str] = []
    context = replace(text_context(loaded, tmp_path), say=said.append)
    path = written(tmp_path / "r.jsonl", GOOD, GOOD | {"text": TEXT * 3})
    lessons = rationales.read_lessons(path, loaded, 2, 1, context)
    assert "1 lines are longer than 64 tokens" in said[0]
    tokens, _, targets = lessons.batch(0, loaded)
    assert len(tokens) == 4  # two answers, two rationales
    end = loaded.tokenizer.eos_token_id
    for row, wanted in enumerate(["the cat"] * 2 + ["the tea is the cat"] * 2):
        ids = targets[row][targets[row] != objectives.IGNORE].tolist()
        assert loaded.tokenizer.decode(ids[:-1]) == wanted
        assert ids[-1] == end
        places = (targets[row] != objectives.IGNORE).nonzero()[:, 0]
        assert tokens[row, places + 1].tolist() == ids
        given = loaded.tokenizer.decode(tokens[row, 1 : places[0] + 1])
        assert given == ("predict: " if row < 2 else "explain: ") + GOOD["text"] + "\n"
    logits = drawn(*tokens.shape, 280).float().requires_grad_()
    found = rationales.loss(logits, targets, 0.5)
    slow = torch.stack([F.cross_entropy(logits[half].flatten(0, 1), targets[half].flatten())
                        for half in (slice(0, 2), slice(2, 4))])  # fmt: skip
    assert torch.allclose(found, slow[0] + 0.5 * slow[1])
    (gradient,) = torch.autograd.grad(found, logits)
    assert not gradient[targets == objectives.IGNORE].any()


def test_answers_and_rationales_are_learnt(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", GOOD, GOOD | {"text": "the cat thaws", "answer": "the tea"})
    found = {}
    for weight in (0.0, 1.0):
        student = tiny(byte_tokenizer(280, TEXT))
        context = text_context(student, tmp_path / "cache")
        lessons = rationales.read_lessons(path, student, 2, 1, context)

        def measured(item: float) -> list[float]:
            tokens, mask, targets = lessons.batch(0, student)  # noqa: B023 - called within the round
            with torch.no_grad():
                logits = student.model(input_ids=tokens, attention_mask=mask).logits  # noqa: B023
            answers = float(rationales.loss(logits, targets, 0.0))
            return [answers, float(rationales.loss(logits, targets, 1.0)) - answers]

        before = measured(weight)
        Distil(steps=15, rows=2, lr=1e-2, teacher=0.0, rationales=path, rationale=weight).apply(student, context)
        found[weight] = [after / start for after, start in zip(measured(weight), before, strict=True)]
    assert found[1.0][0] < 0.5
    assert found[1.0][1] < 0.5
    assert found[0.0][0] < 0.5
    assert found[0.0][1] > found[1.0][1] + 0.1


def test_files_of_a_move_count_by_their_content(
    tiny_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path
) -> None:
    """A file or a teacher that changes under its name makes another model, and lineage has its hash; the verb says what
    the twin showed."""
    path = tmp_path / "r.jsonl"
    flags = ["distil", "--text", stories, "--steps", 2, "--rows", 2, "--rationales", path, "--teacher-model",
             tiny_llama_folder, "--twin", "--json"]  # fmt: skip
    made = []
    for answer in ("the cat", "the tea"):
        written(path, GOOD | {"answer": answer})
        code, said = apply(tiny_llama_folder, *flags, "--out", tmp_path / answer)
        assert code == 0, said
        assert "With the teacher" in said
        lineage = json.loads((tmp_path / answer / "shrew.json").read_text())
        assert lineage["data"]["read"][str(tiny_llama_folder)] == folder.identity(tiny_llama_folder)
        made.append((lineage["data"]["read"][str(path)], (tmp_path / answer / "model.safetensors").read_bytes()))
    assert made[0][0] != made[1][0]
    assert made[0][1] != made[1][1]
    code, said = apply(tiny_llama_folder, *flags, "--out", tmp_path / "again")
    assert "With the teacher" in said  # out of the cache too
    path.unlink()
    code, said = apply(tiny_llama_folder, *flags, "--out", tmp_path / "none")
    assert code == 2
    assert "no such file" in said
