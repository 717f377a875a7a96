"""What compression forgot, as records: loss by token frequency, changed answers, classes, documents, rare words, bias.

Everything is paired with the original, unit by unit. What is counted over units has an interval; single examples have
none, they are shown because they changed most.
"""

from typing import Any

import numpy as np

from shrew.folder import Loaded
from shrew.measure.statistics import (
    Interval,
    binomial_two_sided,
    paired_share,
    ratio_difference,
    ratio_interval,
    share_interval,
)
from shrew.record import Record
from shrew.tasks import Scores, Task
from shrew.tasks.text import DECILES, Text, rare_tokens

ORDINALS = ("rarest", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "commonest")
WAYS = ("right to wrong", "wrong to right", "wrong to other")
EXAMPLES, DOCUMENTS, WORDS, IDS = 12, 8, 10, 1000  # shown: examples of each way, documents, rare words, ids of each way
EXCERPT = 240  # characters of a text that are shown
LEVEL = 0.95


def forgotten_records(run: str, model: str, task: Task, scores: Scores, original: Scores | None = None,
                      against: str = "original", seed: int = 0) -> list[Record]:  # fmt: skip
    """Loss by token frequency (for text) or bias by kind (for fairness) and, given the `original`'s scores, what
    changed against it. `scores` must be of `task`, from any of its splits."""
    common: dict[str, Any] = {"run": run, "model": model, "task": f"{scores.task}/{scores.split}", "seed": seed}
    found = []
    if "decile0_bits" in scores.columns:
        found += _bands(scores, original, against, common)
    if scores.metric == "stereotype_share":
        found += _kinds(scores, original, against, common)
    if original is None:
        return found
    original.check_pair(scores)
    if scores.metric == "bits_per_byte":
        found += _documents(task, scores, original, against, common)
    if "correct" in scores.columns:
        found += _flips(task, scores, original, against, common)
    if "truth" in scores.columns:
        found += _classes(scores, original, against, common)
    return found


def _change(found: Interval, against: str) -> dict[str, Any]:
    return {"against": against, "difference": found.value, "difference_low": found.low,
            "difference_high": found.high}  # fmt: skip


def _bands(scores: Scores, original: Scores | None, against: str, common: dict[str, Any]) -> list[Record]:
    """Loss of each tenth of the tokens; the change only where both models read the text as the same tokens."""
    found = []
    for band in range(DECILES):
        top, bottom = f"decile{band}_bits", f"decile{band}_tokens"
        if not scores.columns[bottom].any():
            continue
        loss = ratio_interval(scores, top, bottom, seed=common["seed"])
        detail = {"band": band, "label": f"{ORDINALS[band]} tenth"}
        if original is not None and np.array_equal(scores.columns[bottom], original.columns[bottom]):
            detail |= _change(ratio_difference(original, scores, top, bottom, seed=common["seed"]), against)
            detail["before"] = original.ratio(top, bottom)
        found.append(Record(metric="band", value=loss.value, low=loss.low, high=loss.high, unit="bits/token",
                            n=round(scores.columns[bottom].sum()), detail=detail, **common))  # fmt: skip
    return found


def _documents(task: Task, scores: Scores, original: Scores, against: str, common: dict[str, Any]) -> list[Record]:
    """The documents whose bits per byte changed most, either way."""
    before, after = (item.columns["bits"] / item.columns["bytes"] for item in (original, scores))
    items = task.examples(scores.split)
    found = []
    for place in np.argsort(-np.abs(after - before), kind="stable")[:DOCUMENTS]:
        detail = {"id": scores.units[place], "text": excerpt(task.shown(items[place])[0]), "against": against,
                  "before": float(before[place]), "after": float(after[place])}  # fmt: skip
        found.append(Record(metric="document", value=float(after[place] - before[place]), unit="bits/byte",
                            n=int(scores.columns["bytes"][place]), detail=detail, **common))  # fmt: skip
    return found


def _flips(task: Task, scores: Scores, original: Scores, against: str, common: dict[str, Any]) -> list[Record]:
    """How many answers changed, which way, and the net of it with its interval; then examples of each way."""
    before, after = original.columns["correct"], scores.columns["correct"]
    told = np.zeros(scores.n, bool)
    if original.answers and scores.answers:
        told[:] = [old != new for old, new in zip(original.answers, scores.answers, strict=True)]
    ways = {
        "right to wrong": np.flatnonzero(before > after),
        "wrong to right": np.flatnonzero(before < after),
        "wrong to other": np.flatnonzero((before == 0) & (after == 0) & told),
    }
    net = paired_share(after - before)
    detail: dict[str, Any] = {"units": "examples", "against": against, "interval": "Agresti and Min, paired"}
    detail |= {"counts": {way: len(places) for way, places in ways.items()}}
    detail |= {"ids": {way: [scores.units[place] for place in places[:IDS]] for way, places in ways.items()}}
    found = [Record(metric="flips", value=net.value, low=net.low, high=net.high, n=net.n, detail=detail, **common)]
    items = task.examples(scores.split)
    for way, places in ways.items():
        for place in places[:EXAMPLES]:
            text, wanted = task.shown(items[place])
            answers = [item.answers[place] if item.answers else "" for item in (original, scores)]
            detail = {"id": scores.units[place], "way": way, "text": excerpt(text), "wanted": excerpt(wanted),
                      "before": excerpt(answers[0]), "after": excerpt(answers[1]), "against": against}  # fmt: skip
            found.append(Record(metric="changed", value=None, detail=detail, **common))
    return found


def _classes(scores: Scores, original: Scores, against: str, common: dict[str, Any]) -> list[Record]:
    """For each class, the share of its own examples that was answered right, before and after."""
    truth = np.array([original.classes[number] for number in original.columns["truth"]])
    return _groups("class", truth, (original, scores), "correct", against, common)


def _groups(metric: str, names: np.ndarray, pair: tuple[Scores | None, Scores], column: str, against: str,
            common: dict[str, Any]) -> list[Record]:  # fmt: skip
    """The mean of a column in each group of units, its change, and an interval of the change that is wide enough for
    all groups to hold together (Bonferroni)."""
    original, scores = pair
    known = sorted(set(names.tolist()))
    level = 1 - (1 - LEVEL) / len(known)
    found = []
    for name in known:
        mine = names == name
        after = scores.columns[column][mine]
        detail: dict[str, Any] = {"label": name}
        if original is not None:
            before = original.columns[column][mine]
            detail |= _change(paired_share(after - before, level), against) | {"before": float(before.mean())}
            detail |= {"level": level, "correction": f"Bonferroni over {len(known)}"}
        found.append(Record(metric=metric, value=float(after.mean()), n=int(mine.sum()), detail=detail, **common))
    return found


def bias_records(scores: Scores, original: Scores | None, against: str, common: dict[str, Any]) -> list[Record]:
    """The share of pairs whose more stereotyping text is likelier, by total likelihood and by token, each with the
    pairs that flipped either way."""
    found = []
    for metric, column in (("stereotype_share", "more"), ("stereotype_share_per_token", "more_per_token")):
        share = share_interval(scores.columns[column])
        detail: dict[str, Any] = {"units": "pairs", "gap": share.value - 0.5,
                                  "unequal_tokens": int(scores.columns["unequal"].sum())}  # fmt: skip
        if original is not None:
            gaps = scores.columns[column] - original.columns[column]
            more, less = int((gaps > 0).sum()), int((gaps < 0).sum())
            detail |= _change(paired_share(gaps), against)
            detail |= {"to_stereotype": more, "from_stereotype": less, "test": "mcnemar",
                       "p": binomial_two_sided(more, less)}  # fmt: skip
        found.append(Record(metric=metric, value=share.value, low=share.low, high=share.high, n=scores.n,
                            detail=detail, **common))  # fmt: skip
    return found


def _kinds(scores: Scores, original: Scores | None, against: str, common: dict[str, Any]) -> list[Record]:
    names = np.array([scores.classes[number] for number in scores.columns["kind"]])
    return _groups("bias", names, (original, scores), "more", against, common)


def tail_records(run: str, model: str, task: Task, scores: Scores, original: Scores, loaded: Loaded, before: Loaded,
                 against: str = "original") -> list[Record]:  # fmt: skip
    """The rare words (of the rarest tenth of the tokens) that lost most, in their context: of the documents whose
    rarest tenth lost most, each word scored again by both models. Empty for other tasks and other tokens."""
    bottom = "decile0_tokens"
    if not isinstance(task, Text) or not np.array_equal(scores.columns[bottom], original.columns[bottom]):
        return []
    if before.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():  # the same pieces of text, numbered otherwise
        return []
    lost = scores.columns["decile0_bits"] - original.columns["decile0_bits"]
    places = [int(place) for place in np.argsort(-lost, kind="stable")[:DOCUMENTS] if lost[place] > 0]
    common: dict[str, Any] = {"run": run, "model": model, "task": f"{scores.task}/{scores.split}", "unit": "bits"}
    words = rare_tokens(task, scores.split, places, (before, loaded))
    return [
        Record(metric="tail", value=word.after - word.before, detail={**vars(word), "against": against}, **common)
        for word in sorted(words, key=lambda word: word.before - word.after)[:WORDS] if word.after > word.before
    ]


def excerpt(text: str) -> str:
    """The beginning of a text, blanks run together."""
    short = " ".join(text[: 4 * EXCERPT].split())
    return short if len(short) <= EXCERPT and len(text) <= 4 * EXCERPT else f"{short[:EXCERPT]}…"

