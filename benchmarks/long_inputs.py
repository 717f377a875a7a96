"""Detectors on long inputs: whole files beside function by function, and what a long file costs.

    python benchmarks/long_inputs.py embedded WORK PAIRS.jsonl CALM.jsonl --folds 3 --records results/records.jsonl
    python benchmarks/long_inputs.py files WORK FOLDER... --records results/records.jsonl

WORK is what benchmarks/detectors.py made. `embedded` constructs files: a function of a pair stands at a known place
among functions of one package of CALM ({"text", "language", "project"}), which nothing was trained on, in as many
tokens as asked for; the vulnerable member and its fix get the same company. The detector is the one that did not learn
from the pair's project. A file is read in five ways:

    alone       the function by itself: what there is to find
    functions   each function by itself; the file scores as its worst one
    windows     cut every so many tokens, as the detector cuts a long function; the worst window
    whole       all at once, judged by the mean over the file
    in place    all at once, each function judged by the mean over its own tokens, which saw all before them; the worst

`files` reads real files of about so many tokens, function by function and all at once, in a process of their own.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import scan
import torch
from detectors import detector_folder, folds_of, read_held, say

from shrew import code, files, folder, machine, record
from shrew.blocks.layers import Place
from shrew.folder import Loaded
from shrew.measure.detection import grouped_interval
from shrew.record import Record
from shrew.scan.functions import Source, functions
from shrew.scan.sources import decode, language_of
from shrew.tasks import detection
from shrew.tasks.labels import row_logits
from shrew.tasks.likelihood import first_token

WAYS = ("alone", "functions", "windows", "whole", "in place")
POSITIONS = ("start", "middle", "end")
GAP = "\n\n\n"  # between the functions of a file
Rows = list[list[int]]

# --- reading ---------------------------------------------------------------------------------------------------------


def tokens_of(loaded: Loaded, text: str, language: str) -> list[int]:
    """A function as the detector reads it, with the blank lines behind it."""
    clean = code.canonical(text, language, loaded.model.config.comments).strip("\n") + GAP
    found: list[int] = code.tokenized(code.uncut(loaded.tokenizer.backend_tokenizer), clean)[0].tolist()
    return found


def head(loaded: Loaded) -> list[int]:
    first = first_token(loaded.tokenizer)
    return [] if first is None else [first]


def windowed(loaded: Loaded, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] rows of tokens -> [n] logits: of each row's windows, the most suspicious."""
    begin, cut, owner = head(loaded), [], []
    for number, row in enumerate(rows):
        for start, end in code.windows(len(row), loaded.model.config.window - len(begin)):
            cut.append([*begin, *row[start:end]])
            owner.append(number)
    found = row_logits(loaded, cut)
    best = np.full(len(rows), -np.inf)
    np.maximum.at(best, owner, found[:, 1] - found[:, 0])
    return best


@torch.inference_mode()
def at_once(loaded: Loaded, pieces: Sequence[Sequence[int]]) -> tuple[float, float]:
    """The logit of all pieces in one pass, and the highest of the pieces' own, each judged by its tokens in that pass.

    Nothing bounds the length but memory and time: positions are counted on beyond those of the training."""
    model, begin = loaded.model, head(loaded)
    tokens = torch.tensor([[*begin, *(token for piece in pieces for token in piece)]])
    hidden, _ = model.model(Place(tokens, torch.arange(tokens.shape[1])[None]))
    lines = model.line(hidden)[..., 0]

    def judged(low: int, high: int) -> float:
        part = slice(low, high)
        return float(model.score(model.pool(hidden[:, part], lines[:, part], torch.ones_like(tokens[:, part]))))

    ends = len(begin) + np.cumsum([len(piece) for piece in pieces])
    own = [judged(int(end) - len(piece), int(end)) for end, piece in zip(ends, pieces, strict=True)]
    return judged(0, tokens.shape[1]), max(own)


class Exact(torch.nn.Module):
    """A head in float32 whatever precision the rest is read in: two files often differ by less than a step of bf16."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            found: torch.Tensor = self.head(x.float())
        return found


# --- constructed files -----------------------------------------------------------------------------------------------


def arranged(target: list[int], others: Rows, room: int, position: str) -> Rows:
    """The pieces of a file: `target` among the first of `others` that fill `room` tokens, the last one cut. In the
    middle, as many tokens stand before as after, to within half a piece."""
    kept: Rows = []
    for other in others:
        if room <= 0:
            break
        kept.append(other[:room])
        room -= len(kept[-1])
    if room > 0:
        raise ValueError(f"{room} tokens are missing")
    before = np.cumsum([0, *(len(piece) for piece in kept)])
    at = {"start": 0, "end": len(kept), "middle": int(np.abs(before - before[-1] / 2).argmin())}[position]
    return [*kept[:at], target, *kept[at:]]


def company(rows: Sequence[dict[str, Any]], loaded: Loaded, language: str, enough: int) -> dict[str, Rows]:
    """The tokenized functions of each package that has `enough` tokens, in the order of the file."""
    found: dict[str, Rows] = {}
    for row in rows:
        if row["language"] == language:
            found.setdefault(str(row["project"]), []).append(tokens_of(loaded, row["text"], language))
    return {name: pieces for name, pieces in found.items() if sum(map(len, pieces)) >= enough}


def chosen(held: scan.Set, loaded: Loaded, longest: int, sample: int) -> list[int]:
    """Pairs of which neither member is longer than that, drawn once for all detectors."""
    order = np.random.default_rng(0).permutation(held.n)

    def size(at: int) -> int:
        return max(len(tokens_of(loaded, held.texts[at + part], held.languages[at])) for part in (0, held.n))

    return sorted([int(at) for at in order if size(at) <= longest][:sample])


def judged(loaded: Loaded, members: Rows, others: Rows, lengths: Sequence[int],
           positions: Sequence[str]) -> list[dict[str, Any]]:  # fmt: skip
    """Of a pair [before, after]: {"length", "position", WAY: [logit, logit]} for each file that it is put into."""
    alone, found = windowed(loaded, members), []
    room = max(map(len, members))
    worst = partial(_worst, loaded, {})
    for length in lengths:
        for position in positions:
            rows = [arranged(member, others, length - room, position) for member in members]
            passes = np.array([at_once(loaded, pieces) for pieces in rows])
            kept = [max(worst(tuple(piece)) for piece in pieces) for pieces in rows]
            cut = windowed(loaded, [[token for piece in pieces for token in piece] for pieces in rows])
            scores = np.array([alone, kept, cut, passes[:, 0], passes[:, 1]]).tolist()
            found.append({"length": length, "position": position} | dict(zip(WAYS, scores, strict=True)))
    return found


def _worst(loaded: Loaded, known: dict[tuple[int, ...], float], piece: tuple[int, ...]) -> float:
    if piece not in known:
        known[piece] = float(windowed(loaded, [piece])[0])
    return known[piece]


def embedded(args: argparse.Namespace) -> list[Record]:
    held, calm = read_held(args), scan.lines(args.calm)
    homes = {int(at): fold for fold, places in enumerate(folds_of(args, held)) for at in places}
    any_one = folder.load(detector_folder(args, args.arms[0], args.seeds[0], 0))
    others = company(calm, any_one, args.language[0], max(args.lengths))
    if not others:
        raise SystemExit(f"{args.calm}: no package has {max(args.lengths):,} tokens of {args.language[0]}.")
    pairs = chosen(held, any_one, min(args.lengths) // 2, args.sample)
    say(f"{len(pairs)} pairs, {len(others)} packages, {2 * len(args.lengths) * len(args.positions) * len(pairs)} files")
    todo = [(arm, seed, at) for at in pairs for seed in args.seeds for arm in args.arms
            if not told_file(args, arm, seed, held.ids[at]).exists()]  # fmt: skip
    began, loaded = time.process_time(), dict[Path, Loaded]()
    for count, (arm, seed, at) in enumerate(todo):
        place = detector_folder(args, arm, seed, homes[at])
        if place not in loaded:
            loaded[place] = folder.load(place)
            loaded[place].model.score = Exact(loaded[place].model.score)
        one = loaded[place]
        draw = np.random.default_rng([0, at])
        package = sorted(others)[int(draw.integers(len(others)))]
        around = [others[package][number] for number in draw.permutation(len(others[package]))]
        members = [tokens_of(one, held.texts[at + part], held.languages[at]) for part in (0, held.n)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            told = judged(one, members, around, args.lengths, args.positions)
        files.write_text(told_file(args, arm, seed, held.ids[at]), json.dumps({"package": package, "files": told}))
        left = (time.process_time() - began) / (count + 1) * (len(todo) - count - 1)
        if (count + 1) % 10 == 0:
            say(f"{count + 1} of {len(todo)}, {int(left // 3600)}:{int(left % 3600 // 60):02} hours left")
    return tabled(args, held, pairs)


def told_file(args: argparse.Namespace, arm: str, seed: int, name: str) -> Path:
    return Path(args.work / "embedded" / f"{arm}-s{seed}" / f"{re.sub('[^a-zA-Z0-9.]+', '_', name)}.json")


def tabled(args: argparse.Namespace, held: scan.Set, pairs: Sequence[int]) -> list[Record]:
    """AUC of each arm and way of reading at each length, all positions together and each by itself, the mean of the
    seeds; and how far each arm is above the first."""
    scores: dict[tuple[str, str, int, str], list[np.ndarray]] = {}  # arm, way, length, position -> [2, n] a seed
    for arm in args.arms:
        for seed in args.seeds:
            rows = [json.loads(told_file(args, arm, seed, held.ids[at]).read_text("utf-8"))["files"] for at in pairs]
            for of_pairs in zip(*rows, strict=True):
                for way in WAYS:
                    key = arm, way, of_pairs[0]["length"], of_pairs[0]["position"]
                    scores.setdefault(key, []).append(np.array([row[way] for row in of_pairs]).T)
    projects, base = held.projects[list(pairs)], args.arms[0]

    def area(arm: str, way: str, length: int, positions: Sequence[str], places: np.ndarray) -> float:
        return statistics.fmean(detection.auc(one[0, places], one[1, places])
                                for position in positions for one in scores[arm, way, length, position])  # fmt: skip

    places = {"all positions": args.positions} | {position: [position] for position in args.positions}
    detail = {"seeds": args.seeds, "interval": "bootstrap over projects"}
    found = []
    for way, length, place, arm in product(WAYS, args.lengths, places, args.arms):
        mine, other = (partial(area, name, way, length, places[place]) for name in (arm, base))
        values = {"auc": mine, f"auc_over_{base}": lambda at, mine=mine, other=other: mine(at) - other(at)}
        for metric, statistic in list(values.items())[: 1 if arm == base else 2]:
            value = grouped_interval(projects, statistic, args.samples)
            found.append(Record(run="long inputs", model=arm, metric=metric, value=value.value, low=value.low,
                                high=value.high, n=len(pairs), detail=detail,
                                task=f"{held.name} among {length}, {place}, {way}"))  # fmt: skip
            if place == "all positions":
                print(f"{arm}, {way}, {length} tokens: {metric} {scan.span(found[-1])}")
    return found


# --- real files ------------------------------------------------------------------------------------------------------


def nearest(places: Sequence[Path], loaded: Loaded, sizes: Sequence[int]) -> dict[int, tuple[Path, int]]:
    """Of all source files in these folders, the one with about so many tokens, and how many it has."""
    known: dict[Path, int] = {}
    for path in sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*"))):
        language = language_of(path.name)
        if language and path.is_file() and min(sizes) < path.stat().st_size < 12 * max(sizes):
            known[path] = len(tokens_of(loaded, decode(path.read_bytes())[0], language))
    if not known:
        raise SystemExit("no source file of such a size is there")
    best = {size: min(known, key=lambda path: abs(known[path] - size)) for size in sizes}
    return {size: (path, known[path]) for size, path in best.items()}


def one(args: argparse.Namespace) -> None:
    """Reads one file, and says what it took: CPU and wall seconds, and by how much the peak of memory grew."""
    loaded = folder.load(args.detector)
    text, language = decode(args.file.read_bytes())[0], language_of(args.file.name)
    at_once(loaded, [[0] * 64])
    held, cpu, wall = peak(), time.process_time(), time.perf_counter()
    if args.way == "whole":
        at_once(loaded, [tokens_of(loaded, text, language)])
    else:
        source = Source(args.file.name, language, text.encode(), text)
        windowed(loaded, [tokens_of(loaded, item.text, language) for item in functions(source)])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"cpu": cpu, "wall": wall, "growth": peak() - held, "peak": peak()}))


def peak() -> int:
    """The most bytes that this process ever held (VmHWM)."""
    told = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text("ascii", "replace"))
    return int(told[1]) * 1024 if told else 0


def real(args: argparse.Namespace) -> list[Record]:
    places = {arm: detector_folder(args, arm, args.seeds[0], 0) for arm in args.arms}
    took: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    picked = nearest(args.places, folder.load(places[args.arms[0]]), args.sizes)
    for size, (path, count) in picked.items():
        say(f"about {size} tokens: {path}, {count}")
        for _ in range(args.rounds):
            for way in ("functions", "whole"):
                for arm, place in places.items():
                    command = [sys.executable, __file__, "one", place, path, "--way", way]
                    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{path}: {done.stderr[-500:]}")
                    took.setdefault((arm, way, size), []).append(json.loads(done.stdout))
    found = []
    for (arm, way, size), items in took.items():
        for metric, unit in (("cpu", "s"), ("wall", "s"), ("growth", "bytes"), ("peak", "bytes")):
            values = sorted(item[metric] for item in items)
            found.append(Record(run="long files", model=arm, metric=metric, value=statistics.median(values), unit=unit,
                                low=values[0], high=values[-1], n=len(values), task=f"{size} tokens, {way}",
                                detail={"file": picked[size][0].name, "tokens": picked[size][1],
                                        "interval": "least and most"}))  # fmt: skip
        cpu, grown = (statistics.median(item[key] for item in items) for key in ("cpu", "growth"))
        print(f"{arm}, {way}, {picked[size][1]} tokens: {cpu:.2f} CPU-seconds, {grown / 1e6:.0f} MB more")
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    made, cost, part = (jobs.add_parser(name) for name in ("embedded", "files", "one"))
    for job in (made, cost):
        job.add_argument("work", type=Path, help="the folder of benchmarks/detectors.py")
        job.add_argument("--arms", nargs="+", default=["dense", "hybrid"])
        job.add_argument("--seeds", nargs="+", type=int, default=[0], help="which ones")
        job.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    made.add_argument("pairs", type=Path)
    made.add_argument("calm", type=Path)
    made.add_argument("--language", nargs=1, default=["python"], choices=sorted(scan.ENDINGS))
    made.add_argument("--folds", type=int, default=5)
    made.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    made.add_argument("--positions", nargs="+", default=[*POSITIONS], choices=POSITIONS)
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of reading, as of the training")
    made.add_argument("--sample", type=int, default=24, help="pairs")
    made.add_argument("--samples", type=int, default=scan.SAMPLES, help="of a bootstrap")
    cost.add_argument("places", type=Path, nargs="+", metavar="FOLDER", help="source files, or folders of them")
    cost.add_argument("--sizes", nargs="+", type=int, default=[2000, 4000, 8000, 16000, 32000, 60000])
    cost.add_argument("--rounds", type=int, default=1)
    part.add_argument("detector", type=Path)
    part.add_argument("file", type=Path)
    part.add_argument("--way", choices=("functions", "whole"), required=True)
    args = parser.parse_args(words)
    machine.choose_threads(1)
    if args.job == "one":
        one(args)
        return 0
    found = {"embedded": embedded, "files": real}[args.job](args)
    if args.records:
        record.append(args.records, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
