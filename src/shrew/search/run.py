"""One run of the search, from the original to the verdict."""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from shrew import files, folder, machine, record, report, spec
from shrew.errors import ShrewError, UnsupportedError, UsageError
from shrew.folder import Loaded
from shrew.measure import cost, statistics
from shrew.moves.source import Source, context_of, open_task
from shrew.record import Record
from shrew.search import families, orders, trial
from shrew.search.executor import LocalExecutor
from shrew.search.gate import Verdict, fixed_sequence, judge
from shrew.search.propose import BARE, BRIEF, FULL, LEAST, LEFT, MOST, Candidate, Curve, Family
from shrew.search.records import emit
from shrew.search.wanted import ALONE, ShrinkSpec
from shrew.tasks import Scores, likelihood, read
from shrew.tasks.fairness import Fairness

ROUNDS = 8
CUTS = 3  # structural families tried beside the uncut model
REACH = 3.0  # times the loss that healing, which leaves a fifth at best and mostly 0.8 to 1, is thought to make up for
PROBES, NEAR = 2, 0.25  # trials without healing to find the size to rank at; how far, in logs, is near enough


@dataclass
class Trial:
    """One model that was made and scored on the search split."""

    label: str
    moves: list[dict[str, Any]]
    folder: Path
    bytes: int
    parameters: int
    active: int
    scores: Scores
    seconds: float
    reused: bool
    candidate: Candidate | None = None
    retention: float = 1.0
    full: bool = True


class Run:
    def __init__(self, source: Source, wanted: ShrinkSpec, goals: dict[str, float | None], out: Path, command: str,
                 say: Callable[[str], None]) -> None:  # fmt: skip
        self.wanted, self.goals, self.out, self.command, self.say = wanted, goals, out, command, say
        self.begun, self.cpu_begun = time.monotonic(), time.process_time()
        self.original = folder.load(source.model)
        self.jobs = wanted.jobs or self.most_jobs(source)
        # Trials side by side beat threads inside one; alone, a trial takes the faster number of threads.
        cores = machine.usable_cores()
        threads = machine.choose_threads(max(cores // self.jobs, 1) if self.jobs > 1 else None)
        self.source = replace(source, threads=threads.count)
        self.threads = threads.reason
        self.json = json.dumps(spec.dump(self.source), sort_keys=True)
        self.task = open_task(self.source, self.original)
        self.context = context_of(self.source, self.original, self.task, say)
        self.palette = wanted.palette()
        if wanted.gguf:
            trial.gguf_bytes(self.original)  # what llama.cpp cannot hold is refused before any work
        self.pairs = open_pairs(wanted.fairness, self.original)
        self.trials: list[Trial] = []
        self.tried: list[str] = []
        self.repaired = ""
        self.order, self.orders = orders.PLAIN, list[dict[str, Any]]()
        self.openings = 0
        self.early: dict[str, Future[dict[str, Any]]] = {}
        self.references: dict[str, Scores] = {}
        self.curve = Curve(1.0)

    def most_jobs(self, source: Source) -> int:
        """Trials that this machine's memory holds at once: weights with gradients and moments, logits of a healing
        step. From the memory that the machine has, not from what is free now, so that a rerun does the same."""
        model = self.original.model
        weights = sum(p.numel() for p in model.parameters()) * 4 * 6
        logits = self.wanted.rows * source.window * model.config.get_text_config().vocab_size * 4 * 4
        return max(min(machine.usable_cores(), int(0.8 * psutil.virtual_memory().total / (weights + logits + 5e8))), 1)

    # -- what the parts share ------------------------------------------------------------------------------------

    def heal(self, steps: int, teacher: float | None = None) -> dict[str, Any] | None:
        """The healing move's table, or None where there is nothing to heal on or with."""
        if not steps or not self.context.healing:
            return None
        table = {"name": "distil", "steps": steps, "lr": self.wanted.lr, "rows": self.wanted.rows}
        return table if teacher is None else {**table, "teacher": teacher}

    def start(self, moves: list[dict[str, Any]], split: str = "search") -> "Future[dict[str, Any]]":
        early = self.early.pop(json.dumps(moves), None) if split == "search" else None
        return early or self.executor.submit(trial.run_trial, self.json, moves, split, self.wanted.gguf)

    def start_early(self, moves: list[dict[str, Any]]) -> None:
        """Have a worker begin what is all but sure to be asked for, before it is."""
        self.early[json.dumps(moves)] = self.start(moves)

    def finish(self, future: "Future[dict[str, Any]]", moves: list[dict[str, Any]], candidate: Candidate | None,
               full: bool) -> Trial | None:  # fmt: skip
        """Wait for a trial, judge it on the search split, say so, learn from it; None for one that failed."""
        try:
            found = future.result()
        except ShrewError as error:
            # Anything else is the fault of the user's input and not of this one candidate.
            if type(error) not in (ShrewError, UnsupportedError):
                raise
            self.say(f"A trial failed and is left out: {error}")
            return None
        scores = Scores.parse(found["scores"])
        item = Trial(f"trial {len(self.trials) + 1}", moves, Path(found["folder"]), found["bytes"],
                     found["parameters"], found["active_parameters"], scores, found["seconds"], found["reused"],
                     candidate, full=full)  # fmt: skip
        item.retention = min(statistics.retention(reference, scores) for reference in self.references.values())
        self.trials.append(item)
        steps = sum(int(move.get("steps", 0)) for move in moves)
        if candidate is not None:
            healing = self.heal(self.wanted.heal) is not None
            self.curve.learn(candidate, item.retention, BARE if healing and not steps else FULL if full else BRIEF)
        stored = "bits a weight, coded" if self.wanted.coded else "bits a weight"
        name = f"{candidate.family.name}, {candidate.bits:.2f} {stored}" if candidate else "8 bits"
        name += f", healed {steps} steps" if steps else ", not healed"
        again = ", from the cache" if item.reused else f", {item.seconds:.0f} CPU-s"
        self.say(f"{item.label}: {name}: {item.bytes / 1e6:.2f} MB keeps {item.retention:.2%}{again}; "
                 f"{self.minutes():.1f} minutes so far.")  # fmt: skip
        return item

    def each(self, candidates: list[Candidate], heal: dict[str, Any] | None, full: bool) -> list[Trial | None]:
        """A trial of every candidate, healed so; None for those that failed."""
        made = [(item, self.order.moves(item, heal)) for item in candidates]
        started = [(item, moves, self.start(moves)) for item, moves in made]
        return [self.finish(future, moves, item, full) for item, moves, future in started]

    @staticmethod
    def better(*trials: list[Trial | None]) -> list[Trial]:
        """Of every candidate the trial that came out best: where little was lost, healing can do harm."""
        found = []
        for same in zip(*trials, strict=True):
            known = sorted((item for item in same if item is not None), key=lambda item: -item.retention)
            found += known[:1]
            for item in known[1:]:
                item.full = False
        return found

    def minutes(self) -> float:
        return (time.monotonic() - self.begun) / 60

    def in_time(self) -> bool:
        return self.minutes() < self.wanted.minutes

    def margin(self, scores: Scores) -> float:
        """How far a retention must be above the floor to be likely proven on the final split: the gap to the lower
        bound that this split's units would leave if there were as many of them as in the final one. Each reference has
        a retention and a gap of its own, and the least of the bounds counts, as it does at the gate."""
        index = np.arange(len(self.task.examples("final"))) % scores.n
        kept, bounds = [], []
        for reference in self.references.values():
            old, new = repeated(reference, index), repeated(scores, index)
            kept.append(statistics.retention(reference, scores))
            bounds.append(kept[-1] - statistics.retention(old, new) + statistics.lower_bound(old, new, samples=500))
        return min(kept) - min(bounds)

    def good(self, item: Trial) -> bool:
        """Whether a trial keeps enough, as far as the search split can tell."""
        return self.goals["keep"] is None or item.retention - self.margin(item.scores) >= self.goals["keep"]

    def fits(self, item: Trial) -> bool:
        return self.goals["under"] is None or item.bytes <= self.goals["under"]

    def holds(self, item: Trial) -> bool:
        return self.fits(item) and self.good(item)

    # -- the five parts ------------------------------------------------------------------------------------------

    def all(self) -> tuple[list[Record], str]:
        """Everything; the records and, if no model was proven, the sentence that says what came nearest."""
        self.plan()
        self.executor = LocalExecutor(self.jobs, self.source.threads)
        try:
            control = self.baseline()
            live = self.rank(self.families())
            self.control(control)
            self.close_in(orders.learn(self, live))
            chosen, verdicts, order = self.final()
            records = emit(self, chosen, verdicts, order)
        except BrokenProcessPool:
            self.executor.close(wait=False)
            raise ShrewError("a worker died, most likely for want of memory; run the same command again with --jobs 1, "
                             "finished trials are kept.") from None  # fmt: skip
        except BaseException:
            self.executor.close(wait=False)
            raise
        self.executor.close()
        return self.write(records, chosen, verdicts)

    def plan(self) -> None:
        wishes = [f"keep at least {self.goals['keep']:.1%} of the quality"] if self.goals["keep"] else []
        wishes += [f"{name} {getattr(self.wanted, name)}" for name in ("under", "faster", "memory") if self.goals[name]]
        self.say(f"Shrinking {self.source.model}: {' and '.join(wishes)}.")
        self.say(f"  {self.task.describe()}")
        self.say(f"  {len(self.context.calibration)} calibration and {len(self.context.healing)} healing windows; "
                 f"{self.jobs} trial(s) at a time; {self.threads}.")  # fmt: skip
        ways = (f"rates ({LEAST / 100:g} to {MOST / 100:g} bits a weight, coded)" if self.wanted.coded
                else f"{'block types' if self.wanted.gguf else 'bits'} ({', '.join(map(str, self.palette.bits))}, by "
                "measured damage)")  # fmt: skip
        self.say(f"  Cuts (layers, channels, tokens) x {ways}, each healed for {self.wanted.heal // 4} steps to rank "
                 f"and {self.wanted.heal} to finish; no new trial after {self.wanted.minutes:g} minutes.")  # fmt: skip

    def baseline(self) -> "Future[dict[str, Any]] | None":
        """Score the original; start its twin that is trained on the healing text; try plain 8 bits."""
        first = self.start([])
        safe = self.palette.safest()
        anchor = self.start([safe])
        self.twin = self.heal(self.wanted.heal, teacher=0.0)
        control = self.start([self.twin]) if self.twin else None
        found = first.result()
        scores = Scores.parse(found["scores"])
        self.references["original"] = scores
        self.original_bytes = found["bytes"]
        self.curve = Curve(loss_of(scores))
        lightly = self.finish(anchor, [safe], None, True)
        self.provable = statistics.highest_keep(scores, lightly.scores if lightly else None)
        share = (scores.n / max(len(self.task.examples("final")), 1)) ** 0.5
        self.provable = 1 - (1 - self.provable) * min(share, 1.0)
        rounds = PROBES + 1 + CUTS + len(orders.HEALINGS) + 3
        self.say(f"The original: {scores.metric.replace('_', ' ')} {scores.value():.4f} on {scores.n} units, "
                 f"{self.original_bytes / 1e6:.2f} MB. The highest --keep that this much text can prove is about "
                 f"{self.provable:.4f}. About {rounds} trials follow, {self.estimate(found['seconds']):.0f} minutes "
                 f"or so.")  # fmt: skip
        if self.goals["keep"] is not None and self.goals["keep"] > self.provable:
            self.say(f"  --keep {self.goals['keep']} is above that; expect no proof, or give more text.")
        return control

    def estimate(self, scoring: float) -> float:
        """Minutes that the whole run is likely to take, from the CPU-seconds of scoring the original."""
        texts = self.task.texts(self.original, "search")
        tokens = sum(map(len, self.original.tokenizer(texts, verbose=False)["input_ids"]))
        healing = self.wanted.heal * self.wanted.rows * self.source.window * 3 * scoring / max(tokens, 1)
        final = len(self.task.examples("final")) / max(len(self.task.examples("search")), 1)
        brief = 1 + CUTS + len(orders.HEALINGS)
        work = brief * (healing / 4 + scoring) + 3 * (healing + scoring) + 12 * scoring + 5 * final * scoring
        return work / self.jobs / 60 + 0.5

    def control(self, future: "Future[dict[str, Any]] | None") -> None:
        """The original trained on the same healing text with the same steps, rows and rate, on the text alone, since it
        cannot learn from itself: healing must not pass for compression, so every retention from here on is against
        the better of the two."""
        if future is None:
            return
        found = future.result()
        scores = Scores.parse(found["scores"])
        self.references["healed original"] = scores
        self.twin_bytes = found["bytes"]
        self.say(f"The original healed alike keeps {statistics.retention(self.references['original'], scores):.2%}.")
        for item in self.trials:
            item.retention = min(statistics.retention(reference, item.scores)
                                 for reference in self.references.values())  # fmt: skip

    def families(self) -> list[Family]:
        """The uncut model and its cuts, each with the ways to store its weights and their measured damage."""
        self.shelf = families.Shelf(self)
        return self.shelf.found

    def allowed(self) -> float:
        """Damage in nats a prediction that may be done before healing, as far as the trials so far can tell."""
        return self.curve.loss * (1 / (self.goals["keep"] or ALONE) - 1) / LEFT[BARE]

    def likely_size(self, family: Family) -> int:
        """The smallest size at which a family is likely to keep enough, as far as the trials so far can tell."""
        keep, ladder = self.goals["keep"], family.ladder()
        floor = keep + (self.margin(self.trials[-1].scores) if self.trials else 0.0) if keep else 0.0
        likely = [item for item in ladder if self.curve.predict(item) >= floor] if keep else []
        return int(min((likely or ladder)[-1 if likely else 0].bytes, self.goals["under"] or ladder[0].bytes))

    def first_size(self, family: Family) -> tuple[int, int]:
        """The size to rank at as far as damages tell, and the one to try first without healing: of wholes that were
        made for measuring, if there are any, since these cost their scoring alone."""
        size = self.likely_size(family)
        return size, min([family.rest + made for made in family.choices.made()] or [size],
                         key=lambda each: abs(math.log(each / size)))  # fmt: skip

    def probe_early(self, family: Family) -> None:
        """Begin the first trial of the ranking while cuts are still made."""
        candidate = family.candidate(self.first_size(family)[1])
        if self.goals["keep"] and not self.goals["faster"] and candidate is not None:
            self.start_early(self.order.moves(candidate, None))

    def rank(self, families: list[Family]) -> list[Family]:
        """One candidate of each family at one size, healed briefly unless it is out of reach; the families worth going
        on with, best first. What the size is follows from the whole, not healed, since parts, rates and other text tell
        too little."""
        keep = self.goals["keep"] or 0.0
        size, probe = self.first_size(families[0])
        for _ in range(PROBES if keep else 0):
            candidate = families[0].candidate(probe)
            if candidate is None:
                break
            bare = self.order.moves(candidate, None)
            self.finish(self.start(bare), bare, candidate, False)
            size = self.likely_size(families[0])
            if abs(math.log(size / probe)) < NEAR:
                break
            probe = size
        found = self.in_reach([made for item in families[: 1 + CUTS] if (made := item.candidate(size)) is not None])
        brief = self.heal(max(self.wanted.heal // 4, 1) if self.wanted.heal else 0)
        for item in found:
            self.start_early(self.order.moves(item, None))
        for item in self.in_reach(found, 1.0) if brief else []:
            if self.curve.bare(item) is not None:
                self.start_early(self.order.moves(item, brief))
        plain = self.each(found, None, False)
        done = self.better(plain)
        if brief:
            again = self.in_reach(found)
            before = [item for candidate, item in zip(found, plain, strict=True) if candidate in again]
            done = self.better(self.each(again, brief, False), before)
        if not done:
            return families[:1]
        done = self.affordable(done) or done  # speed and memory come from the cut: no trial is spent on one too slow
        done.sort(key=lambda item: -item.retention)
        close = [item for item in done if done[0].retention - item.retention < 0.25 * (1 - keep)] if keep else done[:1]
        live = [item.candidate.family for item in close[:2] if item.candidate is not None]
        if live:
            self.say(f"Going on with: {', '.join(item.name for item in live)}.")
        return live or families[:1]

    def in_reach(self, candidates: list[Candidate], times: float = REACH) -> list[Candidate]:
        """Those of one size for which healing may yet make up: what loses so many times as much as may be lost, and as
        another does, is left out. By trials without healing; before them by damage, at the rate of others."""
        losses = [self.curve.bare(item) for item in candidates]
        known = [loss for loss in losses if loss is not None]
        if not known:
            return candidates
        most = times * max(self.curve.loss * (1 / (self.goals["keep"] or ALONE) - 1), min(known))
        for item, loss in zip(candidates, losses, strict=True):
            if loss is not None and loss > most and times == REACH:
                kept = self.curve.loss / (self.curve.loss + loss)
                self.say(f"  not healed: {item.family.name}, which keeps about {kept:.1%} at this size; another loses "
                         f"{loss / min(known):.1f} times less.")  # fmt: skip
        return [item for item, loss in zip(candidates, losses, strict=True) if loss is None or loss <= most]

    def close_in(self, live: list[Family]) -> None:
        """Fully healed trials of the live families, ever nearer to the smallest that holds."""
        heal = self.heal(self.wanted.heal)
        ladders = {item.name: item.ladder() for item in live}
        asked: set[str] = set()
        for number in range(ROUNDS):
            if number and not self.in_time():  # ranking alone proves nothing: one round is always made
                self.say(f"{self.wanted.minutes:g} minutes are over; no new trial.")
                break
            picked = self.next_candidates(live, ladders, asked)
            if not picked:
                break
            asked.update(key_of(item) for item in picked)
            self.better(*(self.each(picked, how, True) for how in ((heal, None) if heal else (None,))))

    def next_candidates(
        self, live: list[Family], ladders: dict[str, list[Candidate]], asked: set[str]
    ) -> list[Candidate]:
        """The most promising untried candidates: smaller than the best that holds, and predicted to hold too; where
        nothing holds yet, the smallest predicted to, or the next larger ones."""
        keep = self.goals["keep"]
        full = [item for item in self.trials if item.full and item.candidate is not None]
        holding = [item.bytes for item in full if self.holds(item)]
        limit = min([*holding, self.goals["under"] or float("inf")])
        picked: list[Candidate] = []
        for item in live:
            own = [old for old in full if old.candidate and old.candidate.family.name == item.name]
            floor = max((old.bytes for old in own if not self.good(old)), default=0)
            fresh = [new for new in ladders[item.name]
                     if key_of(new) not in asked and floor * 1.01 < new.bytes < limit * 0.985]  # fmt: skip
            if not fresh:
                continue
            if keep is None:
                picked += [] if any(self.fits(old) for old in full) else fresh[:1]
                continue
            near = [old for old in self.trials if old.candidate and old.candidate.family.name == item.name]
            margin = self.margin(min(near or self.trials, key=lambda old: abs(old.retention - keep)).scores)
            likely = [new for new in fresh if self.curve.predict(new) >= keep + margin]
            if likely:
                at = fresh.index(likely[-1])
            elif not holding:  # the prediction is used up: halve what is left above what fails
                at = len(fresh) // 2
            else:
                continue
            # Where one family is left, a bolder one runs beside it, so that two cores close in from both sides.
            picked += [fresh[at]] + (fresh[at + 1 :][1:2] if len(live) == 1 else [])
        return sorted(picked, key=lambda new: new.bytes)[-max(self.jobs, 1) :]

    def final(self) -> tuple[Trial | None, dict[str, Verdict], list[Trial]]:
        """Open the final split for at most `candidates` named models, from the safest downward."""
        order = self.named()
        if not order:
            self.finals = {}
            return None, {}, []
        sizes = ", ".join(f"{item.bytes / 1e6:.2f} MB" for item in order)
        self.openings = self.count_opening()
        self.say(f"Opening the final split for {len(order)} candidate(s): {sizes}.")
        if self.openings > 1:
            self.say(f"  It has been opened for {self.openings} different settings by now; with each, the chance grows "
                     "that one of them passes by luck.")  # fmt: skip
        made = {"original": [], "healed original": [self.twin] if self.twin else []}
        waiting = {name: self.start(made[name], "final") for name in self.references}
        ahead = {item.label: self.start(item.moves, "final") for item in order[:1]}
        self.finals = {name: Scores.parse(future.result()["scores"]) for name, future in waiting.items()}
        references = dict(self.finals)

        def verdicts() -> Any:
            for item in order:
                future = ahead.get(item.label) or self.start(item.moves, "final")
                scores = Scores.parse(future.result()["scores"])
                self.finals[item.label] = scores
                verdict = judge(references, scores, self.goals["keep"] or 0.0, self.source.seed)
                told = "proven" if verdict.passed else "not proven"
                self.say(f"  {item.bytes / 1e6:.2f} MB keeps {verdict.interval.value:.2%} of the {verdict.against}, "
                         f"at least {verdict.lower_bound:.2%}: {told}.")  # fmt: skip
                yield item.label, verdict

        name, opened = fixed_sequence(verdicts())
        return next((item for item in order if item.label == name), None), dict(opened), order

    def count_opening(self) -> int:
        """How many different settings have opened this final split, this one included; remembered beside the cache."""
        place = files.cache_folder() / "openings" / f"{trial.task_key(self.task, 'final')[:32]}.json"
        known = set(json.loads(place.read_text("utf-8"))) if place.exists() else set()
        known.add(spec.digest([self.source, self.wanted]))
        files.write_text(place, json.dumps(sorted(known)))
        return len(known)

    def named(self) -> list[Trial]:
        """The candidates for the final split, the safest first: of those that hold, the smallest at each quality, and
        always the best; if none holds, the best that fits, for the nearest miss."""
        full = sorted((item for item in self.trials if item.full), key=lambda item: item.bytes)
        front: list[Trial] = []
        for item in self.affordable([item for item in full if self.holds(item)]):
            if not front or item.retention > front[-1].retention:
                front.append(item)
        if self.goals["keep"] is None or not front:
            fits = front or self.affordable([item for item in full if self.fits(item)])
            return sorted(fits, key=lambda item: -item.retention)[:1]
        most = self.wanted.candidates
        chosen = front if len(front) <= most else [*front[: most - 1], front[-1]]
        return chosen[::-1]

    def affordable(self, items: Sequence[Trial]) -> list[Trial]:
        """Those that are fast and lean enough, measured one after the other while nothing else runs."""
        left = list(items)
        if self.goals["faster"] and left:
            models = [self.original, *(folder.load(item.folder) for item in left)]
            found = cost.speeds(models)
            kind = "prefill" if self.original.is_classifier else "decode"
            left = [item for item, speed in zip(left, found[kind][1:], strict=True)
                    if speed.wall_ratio.low >= self.goals["faster"]]  # fmt: skip
        if self.goals["memory"]:
            left = [item for item in left if cost.peak_memory(item.folder)[0] <= self.goals["memory"]]
        return left

    def write(
        self, records: list[Record], chosen: Trial | None, verdicts: dict[str, Verdict]
    ) -> tuple[list[Record], str]:
        """Write the result; the sentence of the nearest miss where nothing was proven."""
        page = report.render(records)
        if chosen is None and (self.out / "config.json").exists():  # a model proven earlier is not to be lost
            self.out = self.out.with_name(f"{self.out.name}-not-met")
        with files.new_folder(self.out, folder.LINEAGE) as temporary:
            if chosen is not None:
                for item in chosen.folder.iterdir():
                    shutil.copyfile(item, temporary / item.name)
                (temporary / "recipe.toml").write_text(self.recipe(chosen), "utf-8")
                if self.wanted.gguf:
                    trial.as_gguf(folder.load(chosen.folder), temporary / trial.GGUF)
            else:
                (temporary / folder.LINEAGE).write_text(json.dumps({"format": 1, "verdict": "not met"}) + "\n")
            (temporary / "records.jsonl").write_bytes(record.lines(records))
            (temporary / "report.html").write_text(page, "utf-8")
        if chosen is not None:
            return records, ""
        if not verdicts:
            least = min((item.bytes for item in self.trials), default=0)
            return records, (f"no model met the goals, and the smallest that was made has {least / 1e6:.2f} MB; relax "
                             "--under, --faster or --memory, or give more --minutes.")  # fmt: skip
        label, best = max(verdicts.items(), key=lambda pair: pair[1].lower_bound)
        near = next(item for item in self.trials if item.label == label)
        return records, (
            f"no smaller model was proven to keep {self.goals['keep'] or 0:.2%}; the nearest miss is "
            f"{near.bytes / 1e6:.2f} MB with {best.interval.value:.2%} (at least {best.lower_bound:.2%}); "
            "lower --keep, raise --heal or give more text."
        )

    def recipe(self, item: Trial) -> str:
        """The TOML that `shrew apply` reproduces this trial's weights from."""
        comment = f"Made by: {self.command}\nRun again: shrew apply recipe.toml --out FOLDER"
        return spec.to_toml({"source": spec.dump(self.source), "moves": item.moves}, comment)


def open_pairs(path: str, original: Loaded) -> Fairness | None:
    """The pairs whose bias the report compares; refused now rather than after the search."""
    if not path:
        return None
    task = read(path)
    if not isinstance(task, Fairness):
        raise UsageError(f"--fairness {path} is a {task.kind} task; give lines of {{\"more\", \"less\", \"kind\"}}.")
    likelihood.check_causal(original, task.label)
    return task


def repeated(scores: Scores, index: np.ndarray) -> Scores:
    """Scores of the units numbered by `index`, repeats as units of their own."""
    columns = {name: column[index] for name, column in scores.columns.items()}
    return replace(scores, units=[f"{number}" for number in range(len(index))], columns=columns)


def key_of(item: Candidate) -> str:
    return f"{item.family.name} {item.quantize}"


def loss_of(scores: Scores) -> float:
    """The original's loss in nats a token, where the metric is one; 1 otherwise."""
    if scores.metric != "bits_per_byte":
        return 1.0
    return scores.ratio("bits", "tokens") * 0.6931471805599453
