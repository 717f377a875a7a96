"""In which order moves pay: some are tried on the running candidate, the best is kept for all that follow.

A table: what is healed before rounding and what after, by which loss, and what comes just before rounding. Every order
spends the same steps of healing on a candidate of the same predicted size. Moves that change no output by themselves
(`smooth`, `rotate`) can be judged without healing, so they cost a trial only where they lessen the measured damage.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shrew.errors import UnsupportedError
from shrew.search import families, trial
from shrew.search.propose import Candidate, Family

if TYPE_CHECKING:
    from shrew.search.run import Run, Trial

PAYS = 0.95  # of the damage: what is left by a move that is worth a trial
NOTICED = 0.05  # of what may be lost: a gain below that is no reason for another order
SHARE = 1 / 3  # of the minutes; after that no new order is tried, so that there is time to close in


@dataclass(frozen=True)
class Order:
    """How the moves of a candidate follow one another."""

    name: str
    before: float = 0.0  # share of the healing that comes before rounding
    loss: str = "forward"
    prepare: tuple[Mapping[str, Any], ...] = ()  # moves between cuts and rounding

    def moves(self, candidate: Candidate, heal: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The recipe tables of a candidate; `heal`: all of the healing, or none."""
        parts = []
        for steps in self._steps(heal):
            chosen = {} if self.loss == "forward" else {"loss": self.loss}
            parts.append([{**heal, **chosen, "steps": steps}] if heal and steps else [])
        prepare = [dict(move) for move in self.prepare]
        return [*candidate.family.moves, *parts[0], *prepare, candidate.quantize, *parts[1]]

    def _steps(self, heal: dict[str, Any] | None) -> tuple[int, int]:
        steps = int(heal["steps"]) if heal else 0
        first = round(self.before * steps)
        return first, steps - first


PLAIN, BARE = Order("quantize, then heal"), "quantize, not healed"
HEALINGS = (
    Order("heal, then quantize", before=1.0),
    Order("heal, quantize, heal", before=0.5),
    Order("quantize, then heal by skewed KL", loss="skewed-forward"),
    Order("quantize, then heal by reverse KL", loss="reverse"),
)


def learn(run: "Run", live: list[Family]) -> list[Family]:
    """Try orders on the best candidate that was ranked and set `run.order` to the best; the families to go on with,
    first of them the winner."""
    tried = [item for item in run.trials if item.candidate is not None and live and item.candidate.family is live[0]]
    if not tried:
        return live
    heal = run.heal(max(run.wanted.heal // 4, 1) if run.wanted.heal else 0)
    last = [item for item in tried if item.candidate is tried[-1].candidate]
    contest = Contest(run, heal, sorted(last, key=lambda item: not _steps(item.moves)))
    contest.enter(*((found.name, PLAIN, candidate) for found in both_cuts(run, live[0])
                    if (candidate := found.candidate(contest.best.bytes)) is not None))  # fmt: skip
    candidate = contest.best.candidate
    assert candidate is not None
    orders = [*preparations(run, contest, candidate), *(HEALINGS if heal else ())]
    contest.enter(*((order.name, order, candidate) for order in orders))
    run.order, run.orders = contest.order, contest.told()
    for sentence in run.orders:
        run.say(f"  {sentence['text']}.")
    assert contest.best.candidate is not None
    winner = contest.best.candidate.family
    return [winner, *(item for item in live if item is not live[0])] if winner is not live[0] else live


class Contest:
    """One order after the other against the best so far, each judged on the search split. `known`: trials of one
    candidate in the plain order, healed and not."""

    def __init__(self, run: "Run", heal: dict[str, Any] | None, known: "Sequence[Trial]") -> None:
        self.run, self.heal, self.order = run, heal, PLAIN
        self.best = max(known, key=lambda item: item.retention)
        self.made = [item.moves for item in known]
        names = [PLAIN.name if _steps(item.moves) else BARE for item in known]
        self.entries: list[tuple[str, Trial | None, str]] = [(name, item, "") for name, item in
                                                             zip(names, known, strict=True)]  # fmt: skip

    def enter(self, *entries: tuple[str, Order, Candidate]) -> None:
        """Try orders, as many side by side as the machine has room for, but none that comes to moves which were tried
        already or for which time is short."""
        waiting = deque[tuple[str, list[dict[str, Any]], Candidate, Order, Any]]()
        for name, order, candidate in entries:
            moves = order.moves(candidate, self.heal)
            if moves in self.made:
                continue
            self.made.append(moves)
            if len(waiting) == self.run.jobs:
                self._judge(*waiting.popleft())
            waiting.append((name, moves, candidate, order, self.run.start(moves) if self.in_time() else None))
        for item in waiting:
            self._judge(*item)

    def _judge(self, name: str, moves: list[dict[str, Any]], candidate: Candidate, order: Order, started: Any) -> None:
        if started is None:
            self.entries.append((name, None, "not tried, for want of time"))
            return
        item = self.run.finish(started, moves, candidate, False)
        if item is None:
            self.entries.append((name, None, "it failed"))
            return
        self.entries.append((name, item, ""))
        if item.retention > self.best.retention + NOTICED * (1 - (self.run.goals["keep"] or 0.98)):
            self.best, self.order = item, order

    def in_time(self) -> bool:
        return self.run.minutes() < SHARE * self.run.wanted.minutes

    def told(self) -> list[dict[str, Any]]:
        """What came of each, in words and numbers."""
        assert self.best.candidate is not None
        winners, found = {self.order.name, self.best.candidate.family.name}, []
        for name, item, note in self.entries:
            kept = name in winners
            values: dict[str, Any] = {"order": name, "kept": kept, "retention": None, "trial": ""}
            if item is not None:
                count = _steps(item.moves)
                steps = f" after {count} steps of healing" if count else ""
                note = f"{item.bytes / 1e6:.2f} MB keeps {item.retention:.2%}{steps}{', so it is kept' if kept else ''}"
                values |= {"retention": item.retention, "trial": item.label}
            found.append({"text": f"{name}: {note}"} | values)
        return found


def _steps(moves: Sequence[Mapping[str, Any]]) -> int:
    """Of healing, in all."""
    return sum(int(move["steps"]) for move in moves if move["name"] == "distil")


def preparations(run: "Run", contest: Contest, candidate: Candidate) -> list[Order]:
    """Moves just before rounding that leave the model as good and its measured damage by rounding smaller."""
    if run.original.is_classifier or not contest.in_time():
        return []
    tied = bool(getattr(run.original.model.config.get_text_config(), "tie_word_embeddings", False))
    smooth = {"name": "smooth", "bits": min(max(round(candidate.bits), 2), 8)}
    orders = [Order(f"{move['name']} before quantizing", prepare=(move,))
              for move in (smooth, {"name": "rotate", "residual": not tied})]  # fmt: skip
    asked = [PLAIN.moves(candidate, None), *(order.moves(candidate, None) for order in orders)]
    futures = [run.executor.submit(trial.damage, run.json, moves) for moves in asked]
    plain, found = futures[0].result(), []
    for order, future in zip(orders, futures[1:], strict=True):
        try:
            damage = future.result()
        except UnsupportedError as error:
            contest.entries.append((order.name, None, f"not tried: {str(error).rstrip('.')}"))
            continue
        if damage < PAYS * plain:
            found.append((damage, order))
        else:
            contest.entries.append((order.name, None, f"not tried, as it leaves a damage of {damage:.3g} nats a "
                                    f"prediction of {plain:.3g}"))  # fmt: skip
    return [order for _, order in sorted(found, key=lambda item: item[0])]


def both_cuts(run: "Run", winner: Family) -> list[Family]:
    """The winning cut with unused tokens dropped before it and after it, where those are worth a family of their own;
    if they are the winner, with the next cut."""
    cuts = [item for item in run.shelf.found if item.moves]
    trimmed = next((item for item in cuts if item.name == families.TRIMMED), None)
    others = [item for item in cuts if item is not trimmed]
    if trimmed is None or not others or not winner.moves:
        return []
    cut = others[0] if winner is trimmed else winner
    pairs = {f"{trimmed.name}, then {cut.name}": [*trimmed.moves, *cut.moves],
             f"{cut.name}, then {trimmed.name}": [*cut.moves, *trimmed.moves]}  # fmt: skip
    made = [run.shelf.both(name, moves, cut.name) for name, moves in pairs.items()]
    return [item for item in made if item is not None]
