"""The hybrid detector against its dense twin, short functions against long inputs, and packed ones against bf16.

    python benchmarks/detectors.py train WORK PAIRS.jsonl --negatives ORDINARY.jsonl --arms dense hybrid --seeds 3
    python benchmarks/detectors.py compare WORK PAIRS.jsonl --venvs PEERS --records results/records.jsonl
    python benchmarks/detectors.py packed WORK PAIRS.jsonl --arm hybrid --text ORDINARY.jsonl

An arm is a recipe, recipes/scan/pretrain-ARM.toml. A seed draws all anew: a language model's first weights and the
order of its text, then heads, order and dropout of the fine-tuning on pairs. Of one seed all arms read the same tokens
in the same order. Folds are by project; no text of a fold is learned from in any other spelling. What is scored was
held out.

Equal CPU time counts training steps timed in turns on this machine, arm beside arm, since a run's own clock says as
much of its neighbours. Where an arm's steps cost more, its fine-tuning is also scored on the way, when the cheapest arm
is done; --equal-time also lets a copy of its language model decay early enough to cost no more than the cheapest, and
fine-tunes that one for equal time, as ARM-time. `train` can be killed; it goes on. Several can share the work:
--part 0/2 beside --part 1/2, each with what the other does not do.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scan

from shrew import data, files, folder, machine, moves, packers, record, spec
from shrew.data.pairs import DetectSpec, Pairs, Reader, fold_of
from shrew.data.tokenizer import read_tokenizer
from shrew.folder import Loaded
from shrew.measure.detection import grouped_interval
from shrew.record import Record
from shrew.scan.detector import Detector
from shrew.scan.functions import normalise
from shrew.tasks import detection, vulnerability
from shrew.train import Loop, Recipe, World, prepare, train

RECIPES = Path(__file__).parents[1] / "recipes" / "scan"
END, TIME = "end", "equal time"  # of a fine-tuning
WARM = 1  # steps that are not timed
ALIKE = 0.02  # costs that differ by less, by which two timings of the same steps do, count as equal
Measure = Callable[[np.ndarray, np.ndarray], float]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Arm:
    """A language model to fine-tune: its folder, the steps of the fine-tuning, and at which of them it has cost as much
    as the cheapest arm does in all (0: not before the end)."""

    name: str
    seed: int
    trunk: Path
    steps: int
    mark: int = 0


# --- recipes ---------------------------------------------------------------------------------------------------------


def pretraining(args: argparse.Namespace, arm: str, seed: int, out: Path, steps: int,
                decay: float | None = None) -> Recipe:  # fmt: skip
    """The recipe of an arm's language model, for so many steps."""
    path = args.recipes / f"pretrain-{arm}.toml"
    values = spec.read_toml(path)
    values["train"] |= {"out": str(out), "steps": steps, "seed": seed, "precision": args.precision, "threads": 1}
    values["train"] |= {} if decay is None else {"decay": decay}
    return spec.parse(Recipe, values, str(path))


def tuning(args: argparse.Namespace, trunk: Path, seed: int, fold: int, steps: int) -> Recipe:
    """The recipe of a fine-tuning on what is not of a fold."""
    path = args.recipes / "detect.toml"
    values = spec.read_toml(path)
    own = {"out": "detector", "init": str(trunk), "steps": steps, "seed": seed, "length": args.length,
           "precision": args.precision, "threads": 1, "batch_tokens": args.batch_tokens, "lr": args.lr,
           "warmup": min(values["train"]["warmup"], steps // 4)}  # fmt: skip
    values["train"] |= own
    values["detect"] |= {"share": args.share, "languages": args.language, "pairs": [str(fold_file(args, fold))],
                         "negatives": [str(path) for path in args.negatives]}  # fmt: skip
    return spec.parse(Recipe, values, str(path))


def fold_file(args: argparse.Namespace, fold: int) -> Path:
    return Path(args.work / f"fold-{fold}.jsonl")


def write_folds(args: argparse.Namespace, held: scan.Set) -> None:
    """A file of pairs for each fold: those of other projects that share no normalised text with it."""
    rows = [row for path in (args.pairs, *args.also) for row in scan.lines(path) if row["language"] in args.language]
    keys = [{normalise(row[key], row["language"]) for key in ("before", "after")} for row in rows]
    for fold, places in enumerate(folds_of(args, held)):
        texts = {normalise(text, language) for at in places for text, language in
                 ((held.texts[at], held.languages[at]), (held.texts[at + held.n], held.languages[at]))}  # fmt: skip
        kept = [row for row, own in zip(rows, keys, strict=True)
                if fold_of(row["project"], args.folds) != fold and not own & texts]  # fmt: skip
        files.write_text(fold_file(args, fold), "".join(json.dumps(row) + "\n" for row in kept))


def folds_of(args: argparse.Namespace, held: scan.Set) -> list[np.ndarray]:
    """The places of the pairs of each fold."""
    home = np.array([fold_of(project, args.folds) for project in held.projects])
    return [np.flatnonzero(home == fold) for fold in range(args.folds)]


@functools.cache
def learned(tokenizer: str, detect: str) -> tuple[list[Any], list[Any]]:
    """The pairs and ordinary functions of a [detect] table, as JSON, tokenized: once a fold, for all arms and seeds."""
    item = spec.parse(DetectSpec, json.loads(detect), "[detect]")
    reader = Reader(item, read_tokenizer(Path(tokenizer)).backend_tokenizer, item.known_families())
    return reader.pairs(), reader.ordinary()


def tuner(args: argparse.Namespace, trunk: Path, seed: int, fold: int, steps: int) -> tuple[Loop, Loaded]:
    """The loop that fine-tunes a language model on what is not of a fold, and its model with tokenizer."""
    recipe = tuning(args, trunk, seed, fold, steps)
    machine.set_seed(seed)  # the heads are drawn here
    loaded, _ = prepare(recipe, args.work, say)
    tokenizer, detect = loaded.tokenizer, recipe.detect
    assert detect is not None
    pairs, ordinary = learned(str(args.tokenizer), json.dumps(spec.dump(detect)))
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    source = Pairs(pairs, ordinary, detect.emphasis, detect.share, args.length, first, tokenizer.pad_token_id or 0,
                   seed, detect.noise)  # fmt: skip
    return Loop(recipe.train, World(), loaded.model.train(), source, None, args.work, bf16(args), say), loaded


def bf16(args: argparse.Namespace) -> bool:
    return bool(args.precision == "bf16")


# --- what a step costs -----------------------------------------------------------------------------------------------


def in_turns(loops: dict[str, Loop], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of a step of each, the loops taking turns."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(WARM + rounds):
        for name, loop in loops.items():
            began = time.process_time()
            loop.take_step()
            loop.step += 1
            found[name].append(time.process_time() - began)
    return {name: statistics.median(times[WARM:]) for name, times in found.items()}


def reader_loop(args: argparse.Namespace, arm: str) -> Loop:
    """The loop of an arm's language model, on the beginning of its text."""
    recipe = pretraining(args, arm, 0, args.work / "timed", 10**6)
    loaded, documents = prepare(recipe, args.work / "timed", say)
    item = recipe.train
    enough, some = 4 * 8 * item.batch_tokens, []  # characters: some steps
    for document in documents:
        some.append(document)
        enough -= len(document.text)
        if enough < 0:
            break
    middle = data.fill_in_the_middle(loaded.tokenizer, item.fim) if item.fim else None
    stream = data.tokenize(some, loaded.tokenizer)
    return Loop(item, World(), loaded.model.train(), stream, None, args.work, bf16(args), say, middle)


def costs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CPU-seconds of a step of reading and of fine-tuning, by arm; measured once."""
    path = args.work / "costs.json"
    if not path.exists():
        reading = in_turns({arm: reader_loop(args, arm) for arm in args.arms}, args.rounds)
        blank = {arm: args.work / "timed" / arm for arm in args.arms}
        for arm, place in blank.items():  # untrained ones of the same shape cost as much
            loaded, _ = prepare(pretraining(args, arm, 0, place, 1), args.work / "timed", say)
            folder.save(loaded, place)
        loops = {arm: tuner(args, place, 0, 0, 10**6)[0] for arm, place in blank.items()}
        files.write_text(path, json.dumps({"reading": reading, "tuning": in_turns(loops, 4 * args.rounds)}))
    found: dict[str, dict[str, float]] = json.loads(path.read_text("utf-8"))
    for what, each in found.items():
        say(f"CPU-seconds of a step of {what}: " + ", ".join(f"{arm} {cost:.3g}" for arm, cost in each.items()))
    return found


def at_equal_time(steps: int, each: dict[str, float], arm: str) -> int:
    """How many steps of an arm cost what `steps` of the cheapest do; as many where it is hardly dearer."""
    share = min(each.values()) / each[arm]
    return steps if share > 1 - ALIKE else max(1, int(steps * share + 1e-9))


# --- training --------------------------------------------------------------------------------------------------------


def newest(name: str) -> Path | None:
    """The run of that name that was saved last."""
    found = Path("runs").glob(f"{name}-????????/checkpoint/state.json")
    last = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return None if last is None else last.parents[1]


def trunk(args: argparse.Namespace, arm: str, seed: int, short: int) -> Path:
    """The language model of an arm. A copy of the run is kept from before any decay, for one of `short` steps."""
    out = trunk_folder(args, arm, seed)
    if (out / folder.LINEAGE).exists():
        return out
    names = {part: run_name(args, arm, seed, part) for part in ("level", "whole")}
    whole = pretraining(args, arm, seed, out.with_name(names["whole"]), args.trunk_steps)
    level = level_of(short, whole.train.decay)
    if level and newest(names["whole"]) is None:
        train(pretraining(args, arm, seed, out.with_name(names["level"]), level, 0.0))
        branch(names["level"], names["whole"])
    train(whole)
    out.with_name(names["whole"]).rename(out)
    return out


def trunk_folder(args: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(args.work / "trunks" / f"{arm}-s{seed}")


def run_name(args: argparse.Namespace, arm: str, seed: int, part: str) -> str:
    return f"{args.work.name}-{arm}-s{seed}-{part}"


def level_of(steps: int, decay: float) -> int:
    """The last step before a run of so many begins to decay."""
    return int(steps - decay * steps)


def branch(source: str, name: str) -> None:
    """Copy a run under another name, under which it goes on its own way."""
    run = newest(source)
    assert run is not None
    other = run.with_name(name + run.name[-9:])
    files.write_bytes(other / "log.jsonl", (run / "log.jsonl").read_bytes())
    files.copy_folder(run / "checkpoint", other / "checkpoint", "state.json")


def short_trunk(args: argparse.Namespace, arm: str, seed: int, steps: int) -> Path:
    """The language model of an arm after fewer steps, off the level part of the same run."""
    out = trunk_folder(args, f"{arm}-time", seed)
    name, level = (run_name(args, arm, seed, part) for part in ("time", "level"))
    if not (out / folder.LINEAGE).exists():
        if newest(name) is None:
            branch(level, name)
        train(pretraining(args, arm, seed, out.with_name(name), steps))
        out.with_name(name).rename(out)
    return out


def score_file(args: argparse.Namespace, arm: str, seed: int, fold: int) -> Path:
    return Path(args.work / "scores" / f"{arm}-s{seed}-f{fold}.json")


def detector_folder(args: argparse.Namespace, arm: str, seed: int, fold: int) -> Path:
    return Path(args.work / "detectors" / f"{arm}-s{seed}-f{fold}")


def tune(args: argparse.Namespace, held: scan.Set, arm: Arm, fold: int) -> dict[str, Any]:
    """Fine-tune once, write the detector and what it says of the fold: {"cpu_seconds", "logits": {when: [before,
    after]}, ...}."""
    loop, loaded = tuner(args, arm.trunk, arm.seed, fold, arm.steps)
    places = folds_of(args, held)[fold]
    both = np.concatenate([places, places + held.n])
    texts, languages = scan.pick(held.texts, both), scan.pick(held.languages, both)
    spent, losses, told = 0.0, [], {}
    while loop.step < arm.steps:
        began = time.process_time()
        losses.append(loop.take_step()[0])
        loop.step += 1
        spent += time.process_time() - began
        if loop.step in (arm.mark, arm.steps):
            loop.model.eval()
            when = END if loop.step == arm.steps else TIME
            told[when] = vulnerability.logits(loaded, texts, languages).reshape(2, -1).tolist()
            loop.model.train()
    lineage = {"parent": {"name": arm.trunk.name, "sha256": folder.identity(arm.trunk)}, "seed": arm.seed, "moves": [],
               "recipe": spec.dump(tuning(args, arm.trunk, arm.seed, fold, arm.steps))}  # fmt: skip
    loaded.model.eval()
    folder.save(replace(loaded, lineage=lineage), detector_folder(args, arm.name, arm.seed, fold))
    result = {"cpu_seconds": spent, "steps": arm.steps, "mark": arm.mark, "loss": statistics.fmean(losses[-20:]),
              "parameters": sum(p.numel() for p in loaded.model.parameters()),
              "ids": scan.pick(held.ids, places), "logits": told}  # fmt: skip
    files.write_text(score_file(args, arm.name, arm.seed, fold), json.dumps(result))
    return result


def arms_of(args: argparse.Namespace) -> list[Arm]:
    """This part's arms of all seeds with their language models, which are trained where they are not there yet."""
    each, found = costs(args), []
    for seed in range(args.seeds):
        for place, arm in enumerate(args.arms):
            if (seed + place) % args.part[1] != args.part[0]:
                continue
            short = at_equal_time(args.trunk_steps, each["reading"], arm)
            steps = at_equal_time(args.steps, each["tuning"], arm)
            long = trunk(args, arm, seed, short)
            found.append(Arm(arm, seed, long, args.steps, steps if steps < args.steps else 0))
            if args.equal_time and (short < args.trunk_steps or steps < args.steps):
                same = short == args.trunk_steps
                found.append(Arm(f"{arm}-time", seed, long if same else short_trunk(args, arm, seed, short), steps))
    return found


def read_held(args: argparse.Namespace) -> scan.Set:
    held, dropped = scan.read(args.pairs, args.language)
    say(f"{held.name}: {held.n} pairs of {len(set(held.projects))} projects ({dropped} dropped)")
    return held


def train_all(args: argparse.Namespace) -> list[Record]:
    """Language models, then all fine-tunings of this part."""
    twins = [spec.dump(pretraining(args, arm, 0, args.work, args.trunk_steps).train) for arm in args.arms]
    for arm, twin in zip(args.arms, twins, strict=True):
        if other := [key for key, value in twin.items() if value != twins[0][key]]:
            raise SystemExit(f"pretrain-{arm}.toml is no twin of pretrain-{args.arms[0]}.toml: "
                             f"other {', '.join(other)}.")  # fmt: skip
    args.tokenizer = twins[0]["tokenizer"]
    settle(args, twins[0]["data"])
    held = read_held(args)
    write_folds(args, held)
    todo = [(arm, fold) for arm in arms_of(args) for fold in range(args.folds)
            if not score_file(args, arm.name, arm.seed, fold).exists()]  # fmt: skip
    began = time.process_time()
    for count, (arm, fold) in enumerate(todo):
        spent = time.process_time() - began
        if args.minutes and count and spent + spent / count > 60 * args.minutes:
            say(f"{args.minutes:g} minutes are over; {len(todo) - count} fine-tunings are left for the same command.")
            return []
        told = tune(args, held, arm, fold)
        before, after = map(np.array, told["logits"][END])
        left = (time.process_time() - began) / (count + 1) * (len(todo) - count - 1)
        say(f"{arm.name}, seed {arm.seed}, fold {fold}: AUC {detection.auc(before, after):.3f} of {len(before)} pairs, "
            f"loss {told['loss']:.2f}, {told['cpu_seconds']:.0f} CPU-seconds; "
            f"{int(left // 3600)}:{int(left % 3600 // 60):02} hours left")  # fmt: skip
    for (arm_name, when, seed), scores in read_scores(args, held).items():
        if when == END:
            rows = [{"id": name, "member": member, "logit": float(scores[at])} for at, (member, name) in
                    enumerate((member, name) for member in ("before", "after") for name in held.ids)]  # fmt: skip
            path = args.work / "logits" / f"{arm_name}-s{seed}.jsonl"
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return []


def settle(args: argparse.Namespace, text: Sequence[str]) -> None:
    """Refuse to mix settings in one folder."""
    plan = {key: getattr(args, key) for key in ("arms", "folds", "steps", "trunk_steps", "length", "batch_tokens", "lr",
                                                "share", "language", "precision")}  # fmt: skip
    read = [path for place in text for path in (sorted(Path(place).glob("*.jsonl")) or [Path(place)])]
    plan |= {"text": [files.sha256(path) for path in read]}
    plan |= {"pairs": [files.sha256(path) for path in (args.pairs, *args.also, *args.negatives)]}
    path = args.work / "plan.json"
    if path.exists() and (known := json.loads(path.read_text("utf-8"))) != plan:
        other = [key for key in plan if plan[key] != known.get(key)]
        raise SystemExit(f"{args.work} was begun with other {', '.join(other)}; give another folder.")
    files.write_text(path, json.dumps(plan))


def read_scores(args: argparse.Namespace, held: scan.Set) -> dict[tuple[str, str, int], np.ndarray]:
    """(arm, when, seed) -> [2 n] logits, of those whose folds are all done."""
    place = {name: at for at, name in enumerate(held.ids)}
    found: dict[tuple[str, str, int], np.ndarray] = {}
    for path in sorted((args.work / "scores").glob("*.json")):
        arm, seed, _ = path.stem.rsplit("-", 2)
        told = json.loads(path.read_text("utf-8"))
        at = np.array([place[name] for name in told["ids"]], int)
        for when, logits in told["logits"].items():
            scores = found.setdefault((arm, when, int(seed[1:])), np.full(2 * held.n, np.nan))
            scores[np.concatenate([at, at + held.n])] = np.concatenate(logits)
    return {key: scores for key, scores in found.items() if not np.isnan(scores).any()}


# --- the table -------------------------------------------------------------------------------------------------------


def measures(held: scan.Set, rate: Callable[[np.ndarray], float]) -> dict[str, Measure]:
    """What is told of scores [2 n] at the places [k] of pairs."""
    def split(scores: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return scores[chosen], scores[chosen + held.n]

    def net(scores: np.ndarray, chosen: np.ndarray) -> float:
        point = detection.at_rate(*split(scores, chosen), rate(chosen))
        return detection.verdicts(*split(scores, chosen), point.threshold).net

    return {"auc": lambda scores, chosen: detection.auc(*split(scores, chosen)), "net": net,
            "recall_at_rate": lambda scores, chosen: detection.at_rate(*split(scores, chosen), rate(chosen)).recall,
            }  # fmt: skip


def compare(args: argparse.Namespace) -> list[Record]:
    """Each arm and seed beside the tools, the mean of the seeds, and how far each arm stands from the first."""
    held = read_held(args)
    scores = read_scores(args, held)
    if not scores:
        raise SystemExit(f"{args.work} has no seed of which all folds are done; go on with `train`.")
    systems = scan.common(held, scan.tools_of(held, args.venvs), scan.ruled(held.texts, held.languages))
    named = [scan.System(f"{label(arm, when)} seed {seed}", found) for (arm, when, seed), found in scores.items()]
    found = scan.figures(held, [*systems, *named], "detectors", args.samples)
    scan.show(found)
    name, rate = scan.rate_of(held, systems)
    lines: dict[str, dict[int, np.ndarray]] = {}
    for (arm, when, seed), one in scores.items():
        lines.setdefault(label(arm, when), {})[seed] = one
    base = next(iter(lines)) if args.base not in lines else args.base
    for line, seeds in lines.items():
        for metric, measure in measures(held, rate).items():
            def mean(chosen: np.ndarray, seeds: Any = seeds, measure: Any = measure) -> float:
                return statistics.fmean(measure(one, chosen) for one in seeds.values())

            def over(chosen: np.ndarray, mean: Any = mean, measure: Any = measure) -> float:
                return float(mean(chosen)) - statistics.fmean(measure(one, chosen) for one in lines[base].values())

            every = np.arange(held.n)
            each = {seed: measure(one, every) for seed, one in seeds.items()}
            detail = {"seeds": each, "rate_of": name, "rate": rate(every), "interval": "bootstrap over projects",
                      "sd_of_seeds": statistics.stdev(each.values()) if len(each) > 1 else None}  # fmt: skip
            for kind, statistic in ((metric, mean), (f"{metric}_over_{base}", over)):
                if kind == metric or line != base:
                    value = grouped_interval(held.projects, statistic, args.samples)
                    found.append(Record(run="detectors", model=line, metric=kind, value=value.value, low=value.low,
                                        high=value.high, n=held.n, task=held.name, detail=detail))  # fmt: skip
                    print(f"{line}: {kind} {scan.span(found[-1])}, seeds "
                          + ", ".join(f"{value:.3f}" for value in each.values()))  # fmt: skip
    return found + spent(args, held)


def label(arm: str, when: str) -> str:
    return arm if when == END else f"{arm} at {when} of fine-tuning"


def spent(args: argparse.Namespace, held: scan.Set) -> list[Record]:
    """What each arm is and has cost: parameters, and CPU-seconds as its steps are timed in turns."""
    each, found = json.loads((args.work / "costs.json").read_text("utf-8")), []
    for path in sorted((args.work / "scores").glob("*-s0-f0.json")):
        name, told = path.stem.removesuffix("-s0-f0"), json.loads(path.read_text("utf-8"))
        arm, out = name.removesuffix("-time"), Path(args.work / "detectors" / path.stem / folder.LINEAGE)
        trunk = Path(json.loads(out.read_text("utf-8"))["recipe"]["train"]["init"])
        steps = json.loads((trunk / folder.LINEAGE).read_text("utf-8"))["recipe"]["train"]["steps"]
        detail = {"parameters": told["parameters"], "reading_steps": steps, "tuning_steps": told["steps"],
                  "reading_step_seconds": each["reading"][arm], "tuning_step_seconds": each["tuning"][arm]}  # fmt: skip
        seconds = steps * each["reading"][arm] + told["steps"] * each["tuning"][arm]
        found.append(Record(run="detectors", model=name, metric="training_cpu_seconds", value=seconds, unit="s",
                            task=held.name, detail=detail))  # fmt: skip
        print(f"{name}: {told['parameters']:,} parameters, {steps} + {told['steps']} steps, "
              f"{seconds:,.0f} CPU-seconds")  # fmt: skip
    return found


# --- packed ----------------------------------------------------------------------------------------------------------


def pack(args: argparse.Namespace, fold: int, form: str) -> Path:
    """The packed folder of a fold's detector: as it is (bf16), or with all matrices on a grid of so many bits."""
    source = detector_folder(args, args.arm, args.seed, fold)
    out = Path(args.work / "packs" / f"{source.name}-{form}.pack")
    if not out.exists():
        if form != "bf16":
            coarse = out.with_suffix("")
            words = ["--bits", form.removeprefix("int"), "--group", args.group, "--embeddings", "--text", args.text]
            if moves.main([str(source), "quantize", *map(str, words), "--out", str(coarse)]):
                raise SystemExit(f"{source} could not be quantized")
            source = coarse
        if packers.main([str(source), "--out", str(out), "--text", str(args.text)]):
            raise SystemExit(f"{source} could not be packed")
    return out


def packed(args: argparse.Namespace) -> list[Record]:
    """Of one arm and seed: bytes, functions a CPU-second in turns, and AUC of the packs beside the bf16 one."""
    held = read_held(args)
    found: list[Record] = []
    ready = {form: [Detector.load(pack(args, fold, form), 1) for fold in range(args.folds)] for form in args.forms}
    scores = {form: np.full(2 * held.n, np.nan) for form in args.forms}
    for fold, places in enumerate(folds_of(args, held)):
        both = np.concatenate([places, places + held.n])
        for form, detectors in ready.items():
            told = detectors[fold].score(scan.pick(held.texts, both), scan.pick(held.languages, both))
            scores[form][both] = [item.logit for item in told]
    texts, languages = held.texts[: args.timed], held.languages[: args.timed]
    speeds: dict[str, list[float]] = {form: [] for form in args.forms}
    for turn in range(WARM + args.rounds):
        for form, detectors in ready.items():
            began = time.process_time()
            detectors[0].score(texts, languages)
            speeds[form] += [len(texts) / (time.process_time() - began)] if turn >= WARM else []
    base = args.forms[0]
    common: dict[str, Any] = {"run": "packed detectors", "task": held.name, "seed": args.seed}
    for form in args.forms:
        size = sum(item.stat().st_size for item in pack(args, 0, form).iterdir())
        found.append(Record(model=f"{args.arm} {form}", metric="bytes", value=size, unit="bytes", **common))
        ratios = sorted(mine / other for mine, other in zip(speeds[form], speeds[base], strict=True))
        for metric, values in (("functions_per_cpu_second", sorted(speeds[form])), (f"speed_over_{base}", ratios)):
            found.append(Record(model=f"{args.arm} {form}", metric=metric, value=statistics.median(values),
                                low=values[0], high=values[-1], n=len(values),
                                detail={"interval": "least and most of the rounds"}, **common))  # fmt: skip

        def area(chosen: np.ndarray, form: str = form) -> float:
            return detection.auc(scores[form][chosen], scores[form][chosen + held.n])

        for metric, statistic in (("auc", area), (f"auc_over_{base}", lambda at, area=area: area(at) - area(at, base))):
            value = grouped_interval(held.projects, statistic, args.samples)
            found.append(Record(model=f"{args.arm} {form}", metric=metric, value=value.value, low=value.low,
                                high=value.high, n=held.n, detail={"interval": "bootstrap over projects"},
                                **common))  # fmt: skip
    for item in found:
        print(f"{item.model}: {item.metric} {item.value:,}" if item.low is None else
              f"{item.model}: {item.metric} {item.value:.4g} ({item.low:.4g} to {item.high:.4g})")  # fmt: skip
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("train", "compare", "packed"):
        job = jobs.add_parser(name)
        job.add_argument("work", type=Path, help="folder for what is made; what is there already is used")
        job.add_argument("pairs", type=Path, help="the pairs that are scored, and learned from by the other folds")
        job.add_argument("--language", nargs="+", default=["python"], choices=sorted(scan.ENDINGS))
        job.add_argument("--folds", type=int, default=5)
        job.add_argument("--samples", type=int, default=scan.SAMPLES, help="of a bootstrap")
        job.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    train_flags(jobs.choices["train"])
    table = jobs.choices["compare"]
    table.add_argument("--venvs", type=Path, help="folder of virtual environments: bandit is beside, and its rate")
    table.add_argument("--base", default="dense", help="the arm that the others are compared with")
    small = jobs.choices["packed"]
    small.add_argument("--arm", required=True)
    small.add_argument("--seed", type=int, default=0)
    small.add_argument("--text", type=Path, required=True, help="JSONL of ordinary functions, to calibrate on")
    small.add_argument("--forms", nargs="+", default=["bf16", "int8", "int4"], help="the first is what others are "
                       "compared with")  # fmt: skip
    small.add_argument("--group", type=int, default=32, help="weights that share a scale")
    small.add_argument("--timed", type=int, default=200, help="functions of a round")
    small.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(words)
    machine.choose_threads(1)
    found = {"train": train_all, "compare": compare, "packed": packed}[args.job](args)
    if args.records:
        record.append(args.records, found)
    return 0


def train_flags(job: argparse.ArgumentParser) -> None:
    job.add_argument("--negatives", type=Path, nargs="*", default=[], help="JSONL of ordinary functions to learn from")
    job.add_argument("--also", type=Path, nargs="*", default=[], help="more pairs to learn from")
    job.add_argument("--arms", nargs="+", default=["dense", "hybrid"])
    job.add_argument("--recipes", type=Path, default=RECIPES, help="folder of pretrain-ARM.toml and detect.toml")
    job.add_argument("--trunk-steps", type=int, default=400, help="steps of a language model")
    job.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all training, all arms alike")
    job.add_argument("--part", type=part, default=(0, 1), metavar="K/N", help="do the K-th of N parts, from 0")
    job.add_argument("--equal-time", action="store_true", help="also train the dearer arms for equal CPU time alone")
    job.add_argument("--seeds", type=int, default=3)
    job.add_argument("--steps", type=int, default=250, help="of a fine-tuning")
    job.add_argument("--length", type=int, default=256)
    job.add_argument("--batch-tokens", type=int, default=2048)
    job.add_argument("--share", type=float, default=0.25, help="of ordinary functions in a step")
    job.add_argument("--lr", type=float, default=6e-4)
    job.add_argument("--rounds", type=int, default=5, help="turns in which steps are timed")
    job.add_argument("--minutes", type=float, default=0, help="begin no fine-tuning that would end after so many "
                     "CPU-minutes; 0: all of them")  # fmt: skip


def part(text: str) -> tuple[int, int]:
    which, slash, count = text.partition("/")
    if not (slash and which.isdigit() and count.isdigit() and int(which) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N with K below N")
    return int(which), int(count)


if __name__ == "__main__":
    sys.exit(main())
