"""The records of one run, indexed, and the one sentence that they support."""

import re
from collections.abc import Sequence
from typing import Any

from shrew.record import Record
from shrew.report import words

ORIGINAL, HEALED, CHOSEN = "original", "healed original", "chosen"

# Records that feed a section of their own; every other metric is a number for the table.
FORGOTTEN = {"band", "tail", "document", "flips", "changed", "class", "bias"}
STRUCTURE = {"plan", "trial", "order", "move", "sample", "tensor", "recipe", "use", "verdict"} | FORGOTTEN


def split_of(record: Record) -> str:
    """'final' of the task 'text@1/final'."""
    return record.task.rpartition("/")[2] if "/" in record.task else ""


def task_of(record: Record) -> str:
    """'text@1' of the task 'text@1/final'."""
    return record.task.rpartition("/")[0] if "/" in record.task else record.task


class View:
    """What a report may say about the last run in a list of records (a later record replaces an earlier equal one)."""

    def __init__(self, records: Sequence[Record]):
        self.run = records[-1].run if records else ""
        self.records = [item for item in records if item.run == self.run]
        self.other_runs = len({item.run for item in records} - {self.run})
        self.plan = words.table_in(plan[-1].detail) if (plan := self.of("plan")) else {}
        self.verdict = verdict[-1] if (verdict := self.of("verdict")) else None
        self.outcome = words.table_in(self.verdict.detail) if self.verdict else {}
        kept = self.of("retention")
        self.task = task_of(self.verdict or kept[0]) if self.verdict or kept else ""
        self.goals = words.table_in(self.plan.get("goals"))
        floors = [words.number_in(self.goals.get("keep"))]
        floors += [words.number_in(item.detail.get("floor")) for item in kept]
        self.floor = next((floor for floor in floors if floor is not None), None)
        claimed = self.verdict is not None and self.verdict.value == "met"
        self.met = claimed and self._proven()
        self.contradicted = claimed and not self.met
        numeric = dict.fromkeys(item.model for item in self.records if item.metric not in STRUCTURE)
        self.models = sorted(numeric, key=_rank)
        size = self.find(CHOSEN, "bytes")
        self.chosen_trial = words.text_in(size.detail.get("trial")) if size else ""

    def _proven(self) -> bool:
        """Whether the chosen model's own records show what a verdict of 'met' claims: no win on a red gate."""
        kept, size = self.find(CHOSEN, "retention", "final"), self.find(CHOSEN, "bytes")
        bound = lower_bound(kept)
        if kept is None or kept.detail.get("passed") is False or size is None or words.number_in(size.value) is None:
            return False
        return bound is not None and (self.floor is None or bound >= self.floor)

    def of(self, metric: str) -> list[Record]:
        """Every record of one metric, in order."""
        return [item for item in self.records if item.metric == metric]

    def find(self, model: str, metric: str, split: str = "") -> Record | None:
        """A model's last record of a metric, on the named split if any, on the verdict's task where there are more."""
        found = [item for item in self.of(metric) if item.model == model and (not split or split_of(item) == split)]
        same = [item for item in found if task_of(item) == self.task]
        found = same or found
        return found[-1] if found else None

    def value(self, model: str, metric: str, split: str = "") -> float | None:
        """The number in `find`, None when there is no such finite number."""
        record = self.find(model, metric, split)
        return words.number_in(record.value) if record else None

    @property
    def best(self) -> str:
        """The model that the report is about: the chosen one, else the nearest miss, else ''."""
        if self.met:
            return CHOSEN
        named = self.verdict.model if self.verdict else ""
        return named if named in self.models else ""

    def name(self, model: str) -> str:
        """The label that a model carries on the page: without a met verdict nothing is called chosen."""
        if self.met or model not in (CHOSEN, self.best):
            return model
        told = f" ({model})" if model != CHOSEN else ""
        return f"nearest miss{told}" if model == self.best else "candidate"

    @property
    def trials(self) -> list[str]:
        return [model for model in self.models if trial_number(model) is not None]

    @property
    def columns(self) -> list[str]:
        """The models that stand side by side: all but the trials, and the nearest miss."""
        return [model for model in self.models if trial_number(model) is None or model == self.best]


def trial_number(model: str) -> int | None:
    found = re.fullmatch(r"trial ([0-9]{1,9})", model)
    return int(found[1]) if found else None


def _rank(model: str) -> tuple[int, int]:
    fixed = {ORIGINAL: 0, HEALED: 1, CHOSEN: 2}
    trial = trial_number(model)
    return (fixed.get(model, 3), 0) if trial is None else (4, trial)


def lower_bound(kept: Record | None) -> float | None:
    """The bound that the floor is held against; the end of the two-sided interval where no own one is recorded."""
    if kept is None:
        return None
    bound = words.number_in(kept.detail.get("lower_bound"))
    return bound if bound is not None else words.number_in(kept.low)


def _kept(view: View, model: str, split: str) -> str:
    """'98.6 % (at least 98.2 %) of the quality on 40 documents never seen by the search', '' when unknown."""
    record = view.find(model, "retention", split)
    share = words.number_in(record.value) if record else None
    if record is None or share is None:
        return ""
    bound = lower_bound(record)
    least = f" (at least {words.percent_at_least(bound)})" if bound is not None else ""
    where = {"final": "never seen by the search", "search": "that the search was steered by"}.get(split_of(record))
    units = words.text_in(record.detail.get("units")) or "documents"
    on = f" on {record.n:,} {units}" + (f" {where}" if where else "") if record.n else ""
    return f"{words.percent(share)}{least} of the quality{on}"


def sentence(view: View) -> str:
    """The verdict in one sentence; every number in it is read from a record. '' without a verdict."""
    if view.verdict is None:
        return ""
    if view.contradicted:
        return (
            "The verdict says that the floor was met, but the records of the chosen model do not show it, "
            "so this page claims nothing."
        )
    old, new = view.value(ORIGINAL, "bytes"), view.value(view.best, "bytes")
    if view.met and new is not None:
        against = f" instead of {words.size(old)}" if old else ""
        ratio = f" ({words.times(old / new)} times smaller)" if old and new > 0 else ""
        return f"{words.size(new)}{against}{ratio} keeps {_kept(view, CHOSEN, 'final')}."
    return _missed(view, old, new)


def _missed(view: View, old: float | None, new: float | None) -> str:
    under, faster, memory = (words.number_in(view.goals.get(key)) for key in ("under", "faster", "memory"))
    what = f"No model of at most {words.size_exact(under)}" if under else "No model smaller than "
    if not under:
        what = what + words.size(old) if old else "No smaller model"
    if faster:
        what += f", {words.value_of(faster)} times as fast"
    if memory:
        what += f", within {words.size_exact(memory)} of memory"
    what += f" was proven to keep {words.percent_exact(view.floor)} of the quality" if view.floor else " was found"
    kept = _kept(view, view.best, "final") or _kept(view, view.best, "")
    if view.best and new is not None and kept:
        label = f", {view.best}," if view.best != CHOSEN else ""
        return f"{what}; the nearest miss{label} has {words.size(new)} and keeps {kept}."
    reason = words.text_in(view.outcome.get("reason"))
    return f"{what}: {reason.rstrip('.')}." if reason else f"{what}."


def facts(view: View) -> list[tuple[str, str]]:
    """A few figures about the model that the report is about, each a (number, caption) pair."""
    found: list[tuple[str, str]] = []
    old, new = view.value(ORIGINAL, "bytes"), view.value(view.best, "bytes")
    if new is not None:
        found.append((words.size(new), f"on disk, from {words.size(old)}" if old is not None else "on disk"))
    kept = view.value(view.best, "retention", "final")
    if kept is not None:
        floor = f", {words.percent_exact(view.floor)} asked for" if view.floor is not None else ""
        found.append((words.percent(kept), f"of the quality kept{floor}"))
    for metric, caption in (
        ("decode_ratio", "the original’s decoding speed"),
        ("prefill_ratio", "the original’s prefill speed"),
    ):
        ratio = view.value(view.best, metric)
        if ratio is not None and len(found) < 4:
            found.append((f"{words.times(ratio)} ×", caption))
    peak, before = view.value(view.best, "peak_memory"), view.value(ORIGINAL, "peak_memory")
    if peak is not None and len(found) < 4:
        found.append((words.size(peak), "peak memory" + (f", from {words.size(before)}" if before else "")))
    return found


def proof_note(view: View) -> str:
    """How to read the bound: against what, with which confidence, corrected for how many candidates."""
    record = view.find(view.best, "retention", "final") if view.best else None
    if record is None:
        return ""
    parts = []
    if record.detail.get("against") == HEALED:
        parts.append(
            "Quality is held against the healed original, the original trained on the same text with the same "
            "settings: healing does not pass for compression."
        )
    alpha = words.number_in(record.detail.get("alpha"))
    candidates: Any = words.number_in(view.plan.get("candidates"))
    if alpha is not None:
        told = f"“At least” is a lower bound that holds with {words.percent_exact(1 - alpha)} confidence"
        parts.append(told + (f", for {candidates:.0f} candidates together." if candidates and candidates > 1 else "."))
    return " ".join(parts)
