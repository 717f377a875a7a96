"""What finds vulnerable functions: the scanner, its parts, the tools people use, and rules of thumb, on the same pairs.

    python benchmarks/scan.py floors PAIRS.jsonl --language python --venvs PEERS --records results/records.jsonl
    python benchmarks/scan.py system PAIRS.jsonl --language python --venvs PEERS --logits FOLDS.jsonl
    python benchmarks/scan.py alerts FUNCTIONS.jsonl --detector FOLDER
    python benchmarks/scan.py planted benchmarks/planted --detector FOLDER
    python benchmarks/scan.py speed FOLDER... --venvs PEERS

PAIRS holds {"id", "before", "after", "language", "cwe", "project"}. Whatever learns does so on the other folds of five,
dealt by the hash of the project's name; pairs that share a normalised text with another fold are learned from nowhere.
PEERS is a folder of virtual environments: bandit, flawfinder, cppcheck. A tool that is missing is listed as not run;
so is semgrep, whose rules come over the network from its makers, and ours are in another language.

Every system has one threshold for all functions. What only says yes or no (a tool, always-alert) is what it is; the
others are read at the false-positive rate of bandit (of the first tool that ran, or 5 %), on the fixed functions.
Intervals resample projects. `--logits` has the scores of detectors trained on the other folds, a line {"id", "member",
"logit"} each with "before" or "after" as member; the combination is fitted inside the folds, on n-grams fitted inside
them again. `system` also tells whether our n-grams point at the lines that were repaired: see `scan_lines.py`.
"""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scan_lines

from shrew import record
from shrew.data.pairs import cwe_id, fold_of, project_name
from shrew.measure.detection import grouped_interval
from shrew.record import Record
from shrew.scan import combine
from shrew.scan.cwe import SEVERITIES, family
from shrew.scan.functions import Source, normalise, parse
from shrew.scan.grams import Grams, Rows, logistic
from shrew.scan.judge import BUILT_IN, Judge, line_effects
from shrew.scan.rules import Finding, load_rules
from shrew.tasks import detection

FOLDS, COST, SAMPLES = 5, 10.0, 2000
ENOUGH = 5000  # ordinary functions, for a recall at 0.5 % false alarms
ENDINGS = {"python": "py", "c": "c", "cpp": "cpp", "javascript": "js", "ruby": "rb", "go": "go", "java": "java"}
SPEAKS = {"bandit": {"python"}, "flawfinder": {"c", "cpp"}, "cppcheck": {"c", "cpp"}}
# Of the linear detector: whether it has what calls are given, and the penalty that falls where repairs move a bucket.
DESIGNS = {"n-grams alone": (False, False), "what calls are given": (True, False), "moved penalty": (False, True),
           "both": (True, True)}  # fmt: skip
SHIPPED = "both"
FLAGS = {"bandit": "medium", "flawfinder": "low", "cppcheck": "low"}  # the least severity that counts


@dataclass(frozen=True)
class Set:
    """The members of all pairs: `texts` has the n vulnerable ones, then their n twins in the same order."""

    name: str
    ids: list[str]
    texts: list[str]
    languages: list[str]  # [2 n]
    cwes: np.ndarray  # [n]
    projects: np.ndarray  # [n]
    folds: np.ndarray  # [n]
    shared: np.ndarray  # [n]: a text of the pair stands in another fold too

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def truth(self) -> np.ndarray:
        return np.repeat([1.0, 0.0], self.n)


def read(path: Path, languages: Sequence[str], without: Sequence[Path] = ()) -> tuple[Set, int]:
    """The pairs of a file in these languages, and how many were dropped because a text of theirs stands in `without`,
    or because the pair, normalised, is a repetition or has equal members."""
    def keys(row: dict[str, Any]) -> tuple[str, str]:
        return normalise(row["before"], row["language"]), normalise(row["after"], row["language"])

    rows, seen, other = [], set(), {key for item in without for row in lines(item) for key in keys(row)}
    home, dropped = dict[str, set[int]](), 0
    for row in lines(path):
        if row["language"] not in languages:
            continue
        both = keys(row)
        if both in seen or both[0] == both[1] or other & set(both):
            dropped += 1
            continue
        seen.add(both)
        rows.append((row, both))
        for key in both:
            home.setdefault(key, set()).add(fold_of(row["project"], FOLDS))
    columns = [[row[key] for row, _ in rows] for key in ("id", "before", "after", "language")]
    return Set(
        f"{path.stem} {'+'.join(languages)}", columns[0], columns[1] + columns[2], columns[3] * 2,
        np.array([cwe_id(row["cwe"]) for row, _ in rows]), np.array([project_name(row["project"]) for row, _ in rows]),
        np.array([fold_of(row["project"], FOLDS) for row, _ in rows]),
        np.array([any(len(home[key]) > 1 for key in both) for _, both in rows]),
    ), dropped  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [row | {"language": "c"} if row.get("language") == "h" else row for row in rows]


# --- what says something about a function ----------------------------------------------------------------------------


@cache
def rules() -> Any:
    return load_rules()


def ruled(texts: Sequence[str], languages: Sequence[str]) -> list[list[Finding]]:
    """What our rules say of each text, as if it were a file."""
    found = []
    for text, language in zip(texts, languages, strict=True):
        source = Source("a." + ENDINGS[language], language, text.encode("utf-8", "replace"), text)
        found.append(rules().match(source, parse(source)))
    return found


def run_tool(tool: str, venvs: Path, texts: Sequence[str], languages: Sequence[str]) -> list[list[Finding]] | None:
    """What a tool says of each text, written to a file of its own; None where it is not installed."""
    program = venvs / tool / "bin" / tool
    if not program.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        for place, (text, language) in enumerate(zip(texts, languages, strict=True)):
            if language in SPEAKS[tool]:
                Path(folder, f"{place}.{ENDINGS[language]}").write_text(dedented(text), "utf-8", "replace")
        command = {"bandit": ["-r", folder, "-f", "json", "-q"], "flawfinder": ["--csv", "--quiet", folder],
                   "cppcheck": ["--enable=warning,portability", "--xml", "-q", folder]}[tool]  # fmt: skip
        done = subprocess.run([program, *command], capture_output=True, text=True, check=False)
    found: list[list[Finding]] = [[] for _ in texts]
    for name, item in READERS[tool](done.stdout, done.stderr):
        found[int(Path(name).stem)].append(replace(item, tool=tool))
    return found


def dedented(text: str) -> str:
    """Without the indentation of its first line, as methods have; lines that have less keep what they have."""
    indent = len(text) - len(text.lstrip(" \t"))
    return re.sub(rf"^[ \t]{{1,{indent}}}", "", text, flags=re.M) if indent else text


def finding(rule: str, cwe: Any, severity: str, line: Any) -> Finding:
    cwe = cwe_id(str(cwe))
    return Finding(rule, "" if cwe == "unknown" else cwe, severity, "", "", int(line), int(line))


def from_bandit(out: str, _: str) -> list[tuple[str, Finding]]:
    return [(item["filename"], finding(item["test_id"], item.get("issue_cwe", {}).get("id"),
             item["issue_severity"].lower(), item["line_number"])) for item in json.loads(out)["results"]]  # fmt: skip


def from_flawfinder(out: str, _: str) -> list[tuple[str, Finding]]:
    return [(row["File"], finding(row["Name"], re.split(r"[,!/ ]", row["CWEs"])[0],
             "low" if int(row["Level"]) < 3 else "medium" if int(row["Level"]) < 5 else "high", row["Line"]))
            for row in csv.DictReader(io.StringIO(out))]  # fmt: skip


def from_cppcheck(_: str, told: str) -> list[tuple[str, Finding]]:
    found = []
    for error in ElementTree.fromstring(told).iter("error"):
        place = error.find("location")
        if place is not None and error.get("id") not in ("syntaxError", "unknownMacro"):
            severity = "high" if error.get("severity") == "error" else "medium"
            found.append((str(place.get("file")), finding(str(error.get("id")), error.get("cwe"), severity,
                                                          place.get("line"))))  # fmt: skip
    return found


READERS: dict[str, Callable[[str, str], list[tuple[str, Finding]]]] = {
    "bandit": from_bandit, "flawfinder": from_flawfinder, "cppcheck": from_cppcheck}  # fmt: skip


def worst(findings: Sequence[Sequence[Finding]], least: str = "low") -> np.ndarray:
    """The rank of the worst finding of each text, 0 for none that is at least so severe."""
    order = list(SEVERITIES)
    ranks = [max((order.index(item.severity) + 1 for item in some), default=0) for some in findings]
    return np.array([rank if rank > order.index(least) else 0 for rank in ranks], float)


# --- what learns, fold by fold ---------------------------------------------------------------------------------------


def plain_rows(texts: Sequence[str], bits: int = 17) -> Rows:
    """The floor's features: runs of one to three words or marks of the raw text, hashed, and nothing else."""
    starts, columns = [0], []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text)
        runs = {" ".join(words[at : at + size]) for size in (1, 2, 3) for at in range(len(words) - size + 1)}
        columns += sorted({zlib.crc32(run.encode("utf-8", "replace")) % 2**bits for run in runs})
        starts.append(len(columns))
    return Rows(np.array(starts), np.array(columns, np.int64))


def plain(train: Sequence[str], truth: np.ndarray, test: Sequence[str]) -> np.ndarray:
    """Logits of the floor: n-gram logistic regression."""
    weights, bias = logistic(plain_rows(train), truth, np.full(len(truth), COST), 2**17)
    found = plain_rows(test)
    return np.bincount(found.owner, weights[found.columns], len(test)) * found.scale + bias


def held_out(data: Set, learn: Callable[[np.ndarray, np.ndarray], np.ndarray], within: np.ndarray) -> np.ndarray:
    """[2 n] scores, each by what learned from the other folds of the pairs `within` [n]; others have NaN. `learn` gets
    the places of the members to learn from and of those to score."""
    scores = np.full(2 * data.n, np.nan)
    for fold in range(FOLDS):
        test = np.flatnonzero(np.tile(within & (data.folds == fold), 2))
        train = np.flatnonzero(np.tile(within & (data.folds != fold) & ~data.shared, 2))
        if len(test) and len(train):
            scores[test] = learn(train, test)
    return scores


def pick(values: Sequence[Any], places: np.ndarray) -> list[Any]:
    return [values[place] for place in places]


def fitted(data: Set, train: np.ndarray, design: str = SHIPPED) -> Grams:
    given, moved = DESIGNS[design]
    twins = np.arange(len(train)).reshape(2, -1).T  # vulnerable ones first, repaired ones in the same order
    return Grams.fit(pick(data.texts, train), data.truth[train], pick(data.languages, train), COST,
                     twins=twins if moved else None, given=given)  # fmt: skip


def grams_of(data: Set, design: str = SHIPPED) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda train, test: fitted(data, train, design).score(pick(data.texts, test), pick(data.languages, test))


def held_out_lines(data: Set) -> list[tuple[float, ...]]:
    """What each line of the n vulnerable members adds to the logit of n-grams fitted on the other folds."""
    found: list[tuple[float, ...]] = [()] * data.n
    def learn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        made = fitted(data, train)
        for place in test[: len(test) // 2]:
            found[place] = line_effects(made, data.texts[place], data.languages[place])
        return np.zeros(len(test))

    held_out(data, learn, np.ones(data.n, bool))
    return found


def held_grams(data: Set, design: str = SHIPPED) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores [2 n] of our n-grams for each fold that is left out, held out among the others; and those of all folds."""
    learn = grams_of(data, design)
    return [held_out(data, learn, data.folds != fold) for fold in range(FOLDS)], held_out(data, learn, data.folds >= 0)


def stacked(data: Set, logits: np.ndarray | None, findings: Sequence[Sequence[Finding]], inner: list[np.ndarray],
            outer: np.ndarray) -> np.ndarray:  # fmt: skip
    """[2 n] probabilities of the combination, fitted for each fold on the members of the others: on their logits, which
    are held out, and on n-grams `inner[fold]` that were held out among those folds alone."""
    given = np.zeros(2 * data.n) if logits is None else logits
    def learn(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        grams = inner[int(data.folds[test[0] % data.n])]
        made = combine.fit(given[train].tolist(), grams[train].tolist(), pick(findings, train), data.truth[train])
        return combine.combined(made, given[test].tolist(), outer[test].tolist(), pick(findings, test))

    return held_out(data, learn, np.ones(data.n, bool))


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """Scores [2 n] of a system; `flags` where it only says yes or no: a score above 0 is a yes."""

    name: str
    scores: np.ndarray
    flags: bool = False


def rate_of(data: Set, systems: Sequence[System]) -> tuple[str, Callable[[np.ndarray], float]]:
    """Whose false-positive rate the others are read at, and the rate of any [k] places of pairs."""
    tools = [item for item in systems if item.flags and item.name in SPEAKS]
    if not tools:
        return "5 %", lambda places: 0.05
    return tools[0].name, lambda places: float((tools[0].scores[places + data.n] > 0).mean())


def figures(data: Set, systems: Sequence[System], run: str, samples: int) -> list[Record]:
    """AUC, recall, pair verdicts of each system, and how far it stands from the floors."""
    name, rate = rate_of(data, systems)
    places = np.arange(data.n)
    known = {item.name: item for item in systems}
    found: list[Record] = []
    for item in systems:
        old, new = item.scores[: data.n], item.scores[data.n :]
        point = detection.at_rate(old, new, rate(places))
        threshold = 1e-9 if item.flags else point.threshold
        told = detection.verdicts(old, new, threshold)
        def at(chosen: np.ndarray, item: System = item) -> float:
            one, two = item.scores[chosen], item.scores[chosen + data.n]
            return float((one > 0).mean()) if item.flags else detection.at_rate(one, two, rate(chosen)).recall

        def area(chosen: np.ndarray, item: System = item) -> float:
            return detection.auc(item.scores[chosen], item.scores[chosen + data.n])

        detail = {"pair_correct": told.correct, "pair_reversed": told.reversed, "net": told.net, "rate_of": name,
                  "false_positive_rate": float((new >= threshold).mean()), "recall_at_0.05":
                  None if item.flags else detection.at_rate(old, new, 0.05).recall,
                  "by_cwe": by_cwe(data, item, threshold),
                  "projects": len(set(data.projects)), "interval": "bootstrap over projects"}  # fmt: skip
        values: dict[str, Callable[[np.ndarray], float]] = {"recall_at_rate": at, "auc": area}
        net = (old >= threshold).astype(float) - (new >= threshold)
        values["net"] = lambda chosen, net=net: float(net[chosen].mean())
        if name in known and item.name != name:
            base = known[name].scores
            values["recall_over_tool"] = lambda chosen, at=at, base=base: at(chosen) - float((base[chosen] > 0).mean())
        if "n-grams" in known and item.name != "n-grams":
            floor = known["n-grams"].scores
            values["auc_over_ngrams"] = lambda chosen, area=area, floor=floor: area(chosen) - detection.auc(
                floor[chosen], floor[chosen + data.n])  # fmt: skip
        for metric, statistic in values.items():
            if item.flags and metric == "recall_over_tool":
                continue
            value = grouped_interval(data.projects, statistic, samples)
            found.append(Record(run=run, model=item.name, metric=metric, value=value.value, low=value.low,
                                high=value.high, n=data.n, task=data.name, detail=detail))  # fmt: skip
    return found


def by_cwe(data: Set, item: System, threshold: float) -> dict[str, list[float]]:
    """Of each weakness: pairs, recall and false-positive rate at the common threshold."""
    flagged = (item.scores >= threshold).reshape(2, -1)
    return {str(cwe): [int((data.cwes == cwe).sum()), *flagged[:, data.cwes == cwe].mean(1).round(3).tolist()]
            for cwe in np.unique(data.cwes)}  # fmt: skip


def show(records: Sequence[Record]) -> None:
    """A row for each system."""
    rows: dict[tuple[str, str], dict[str, Record]] = {(item.task, item.model): {} for item in records}
    for item in records:
        rows[item.task, item.model][item.metric] = item
    print("| set | system | AUC | recall | at FPR | net | recall over tool | AUC over n-grams |")
    print("|---" * 8 + "|")
    shown = ("auc", "recall_at_rate", "net", "recall_over_tool", "auc_over_ngrams")
    for (task, model), found in rows.items():
        cells = [span(found.get(name)) for name in shown]
        rate = f"{next(iter(found.values())).detail.get('false_positive_rate', 0):.3f}"
        print(f"| {task} | {model} | {cells[0]} | {cells[1]} | {rate} | {' | '.join(cells[2:])} |")


def span(item: Record | None) -> str:
    if item is None or not isinstance(item.value, float):
        return "–"
    return f"{item.value:.3f} ({item.low:.3f} to {item.high:.3f})"


# --- the jobs --------------------------------------------------------------------------------------------------------


def tools_of(data: Set, venvs: Path | None) -> dict[str, list[list[Finding]]]:
    """The findings of each tool that speaks the set's languages and is there."""
    found = {}
    print("semgrep was not run: it brings no rules, and ours are in another language", file=sys.stderr)
    for tool, speaks in SPEAKS.items():
        if not speaks & set(data.languages):
            continue
        if venvs and (told := run_tool(tool, venvs, data.texts, data.languages)) is not None:
            found[tool] = told
        else:
            print(f"{tool} was not run: it is not in --venvs", file=sys.stderr)
    return found


def common(data: Set, tools: dict[str, list[list[Finding]]], said: list[list[Finding]]) -> list[System]:
    """What needs no learning."""
    lengths = np.array([len(text) for text in data.texts], float)
    draw = np.random.default_rng(0).random(2 * data.n)
    systems = [System("random", draw), System("always alert", np.ones(2 * data.n), True), System("shorter", -lengths)]
    systems += [System(tool, worst(told, FLAGS[tool]), True) for tool, told in tools.items()]
    return [*systems, System("our rules", worst(said), True)]


def compare(args: argparse.Namespace, with_logits: bool, design: str = SHIPPED) -> list[Record]:
    data, dropped = read(args.pairs, args.language, args.without)
    print(f"{data.name}: {data.n} pairs of {len(set(data.projects))} projects ({dropped} dropped); "
          f"folds {np.bincount(data.folds, minlength=FOLDS).tolist()}; "
          f"{int(data.shared.sum())} share a text with another fold",
          file=sys.stderr)  # fmt: skip
    tools, said = tools_of(data, args.venvs), ruled(data.texts, data.languages)
    systems = common(data, tools, said)
    every = np.ones(data.n, bool)
    if len(set(data.folds)) > 1:
        systems.append(System("n-grams", held_out(data, lambda train, test: plain(
            pick(data.texts, train), data.truth[train], pick(data.texts, test)), every)))  # fmt: skip
        inner, outer = held_grams(data, design) if with_logits else ([], held_out(data, grams_of(data), every))
        systems.append(System("our n-grams", outer))
    if with_logits and len(set(data.folds)) > 1:
        logits = None
        if args.logits:
            told = {(row["id"], row["member"]): row["logit"] for row in lines(args.logits)}
            logits = np.array([told[name, member] for member in ("before", "after") for name in data.ids])
            systems.append(System("detector", logits))
            systems.append(System("detector + n-grams", stacked(data, logits, [[] for _ in said], inner, outer)))
        mixed = {"rules": said} | tools
        if tools:
            first = next(iter(tools))
            mixed[f"rules + {first}"] = [[*one, *two] for one, two in zip(said, tools[first], strict=True)]
        own = "detector + " if args.logits else ""
        for name, findings in mixed.items():
            systems.append(System(f"{own}n-grams + {name}", stacked(data, logits, findings, inner, outer)))
    return figures(data, systems, "scan floors" if not with_logits else "scan system", args.samples)


def pointed(args: argparse.Namespace) -> list[Record]:
    data, _ = read(args.pairs, args.language, args.without)
    if len(set(data.folds)) < 2:
        return []
    repairs = list(map(scan_lines.repair, data.texts[: data.n], data.texts[data.n :], data.languages[: data.n]))
    return scan_lines.figures(repairs, held_out_lines(data), data.projects, data.name, args.samples)


def alerts(args: argparse.Namespace) -> list[Record]:
    """Alerts per 1,000 ordinary functions, whose packages nothing was trained on, at each operating point; and which
    share of the vulnerable members of `--pairs` alerts where 0.5 % of the ordinary functions do."""
    judge, rows = Judge(args.detector), lines(args.functions)
    texts, languages = [row["text"] for row in rows], [row["language"] for row in rows]
    calm = judged(judge, texts, languages)
    projects = [str(row.get("project") or place) for place, row in enumerate(rows)]
    model, found = judge.name or "rules alone", []
    for point in combine.POINTS:
        told = calm >= judge.point(point).threshold if judge.has_model else calm > 0
        value = grouped_interval(projects, lambda places, told=told: float(told[places].mean() * 1000), args.samples)
        found.append(Record(run="scan alerts", model=model, metric="alerts_per_1000", value=value.value, low=value.low,
                            high=value.high, n=len(texts), task=f"{args.functions.stem} {point}",
                            detail={"packages": value.n, "interval": "bootstrap over packages"}))  # fmt: skip
        if not judge.has_model:
            break
    if args.pairs and len(texts) >= ENOUGH:
        data, _ = read(args.pairs, sorted(set(languages)))
        scores = judged(judge, data.texts[: data.n], data.languages[: data.n])
        level = detection.at_rate(scores, calm, 0.005)
        value = grouped_interval(data.projects, lambda places: float((scores[places] >= level.threshold).mean()),
                                 args.samples)  # fmt: skip
        found.append(Record(run="scan alerts", model=model, metric="recall_at_0.005", value=value.value, low=value.low,
                            high=value.high, n=data.n, task=data.name, detail={"ordinary": len(texts)}))  # fmt: skip
    return found


def judged(judge: Judge, texts: Sequence[str], languages: Sequence[str]) -> np.ndarray:
    """float64 [n] probabilities, each text as if it were a file; 0 for what a scan passes over."""
    grams, said = judge.grams(texts, languages), ruled(texts, languages)
    seen = [not judge.has_model or judge.passes(gram) or bool(said[place]) for place, gram in enumerate(grams)]
    asked = [place for place, language in enumerate(languages) if seen[place] and judge.asks(language)]
    scores = dict(zip(asked, judge.scores(pick(texts, np.array(asked, int)), pick(languages, np.array(asked, int))),
                      strict=True)) if asked else {}  # fmt: skip
    return np.array([judge.probability(scores.get(place), grams[place], said[place]) if seen[place] else 0.0
                     for place in range(len(texts))])  # fmt: skip


def planted(args: argparse.Namespace) -> list[Record]:
    """Of each weakness: planted bugs that are told, of these the ones with the right weakness, and told twins; by the
    rules alone, and by what is given (what is built in, if nothing is)."""
    found: list[Record] = []
    for judge in (Judge(None), Judge(args.detector or BUILT_IN)):
        level, totals = judge.point(args.point).threshold if judge.has_model else 1e-9, np.zeros(2, int)
        for path in sorted(args.folder.glob("*.toml")):
            content = tomllib.loads(path.read_text("utf-8"))
            cases, cwe = content["case"], cwe_id(content["cwe"])
            languages = [case["language"] for case in cases]
            bad, good = ([case[key] for case in cases] for key in ("vulnerable", "fixed"))
            old, new = judged(judge, bad, languages) >= level, judged(judge, good, languages) >= level
            said = ruled(bad, languages)
            named = [any(family(one.cwe) == family(cwe) for one in items if one.cwe) for items in said]
            on_line = [any(set(range(one.start, one.end + 1)) & set(case["lines"]) for one in items)
                       for case, items in zip(cases, said, strict=True)]  # fmt: skip
            detail = {"told": int(old.sum()), "twins_told": int(new.sum()), "pair_correct": int((old & ~new).sum()),
                      "rule_names_the_family": sum(named), "rule_on_the_line": sum(on_line), "point": args.point}
            found.append(Record(run="scan planted", model=judge.name or "rules alone", metric="planted",
                                value=float(old.mean()), n=len(cases), task=cwe, detail=detail))  # fmt: skip
            totals += old.sum(), new.sum()
            print(f"{found[-1].model}, {cwe}: {old.sum()} of {len(cases)} told, {new.sum()} twins told, the family "
                  f"named for {sum(named)}, the line met for {sum(on_line)}")  # fmt: skip
        print(f"{found[-1].model}: {totals[0]} told, {totals[1]} twins told")
    return found


def timed(command: Sequence[str | Path], **more: str) -> dict[str, float]:
    """Wall and CPU seconds and peak resident bytes (VmHWM) of a command; exit 1 (something found) is fine."""
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as told, subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=told, env=os.environ | more
    ) as process:
        done = 0
        while not done:
            status = Path(f"/proc/{process.pid}/status").read_text("ascii", "replace")
            held = re.search(r"VmHWM:\s*(\d+)", status)
            peak = max(peak, int(held[1]) * 1024 if held else 0)
            time.sleep(0.005)
            done, ended, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(ended)
        wall = time.perf_counter() - begun
        if process.returncode not in (0, 1):
            told.seek(0)
            raise SystemExit(f"{command[0]} ended with {process.returncode}: {told.read()[-500:].decode()}")
    return {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": float(peak)}


def speed(args: argparse.Namespace) -> list[Record]:
    """The scanner against bandit, alternated: a cold start on one small file, a first run and a second one."""
    with tempfile.TemporaryDirectory() as home:
        report, small = Path(home, "report.json"), Path(home, "small.py")
        small.write_text("def f(x):\n    return x + 1\n", "utf-8")
        shrew = [sys.executable, "-m", "shrew", "scan", "--fail-on", "none", "--format", "json", "--out", report]
        shrew += ["--detector", args.detector] if args.detector else []
        bandit = args.venvs / "bandit" / "bin" / "bandit" if args.venvs else None
        runs: dict[str, list[dict[str, float]]] = {}
        for turn in range(args.rounds):
            cache = {"SHREW_CACHE": str(Path(home, f"cache{turn}"))}
            runs.setdefault("cold start", []).append(timed([*shrew, small], **cache))
            for name in ("first run", "second run"):
                runs.setdefault(name, []).append(timed([*shrew, *args.paths], **cache))
            if bandit and bandit.exists():
                runs.setdefault("bandit", []).append(timed([bandit, "-q", "-r", *args.paths]))
        told = json.loads(report.read_text("utf-8"))
    counts = {key: told[key] for key in ("files", "functions") if key in told}
    found = []
    for name, items in runs.items():
        for key, unit in (("wall", "s"), ("cpu", "s"), ("peak", "bytes")):
            values = sorted(item[key] for item in items)
            found.append(Record(run="scan speed", model=name, metric=key, value=values[len(values) // 2], unit=unit,
                                low=values[0], high=values[-1], n=len(values),
                                detail=counts | {"interval": "least and most"}))  # fmt: skip
    wall = {item.model: float(item.value or 0) for item in found if item.metric == "wall"}
    if counts.get("functions"):
        found.append(Record(run="scan speed", model="first run", metric="functions_per_second", detail=counts,
                            value=counts["functions"] / wall["first run"]))  # fmt: skip
    for item in found:
        print(f"{item.model}: {item.metric} {item.value:,.4g} {item.unit}")
    return found


def shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--language", nargs="+", default=["python"], choices=sorted(ENDINGS))
    parser.add_argument("--without", type=Path, nargs="*", default=[], help="files whose texts are left out")
    parser.add_argument("--venvs", type=Path)
    parser.add_argument("--samples", type=int, default=SAMPLES)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    shared_flags(jobs.add_parser("floors"))
    system = jobs.add_parser("system")
    shared_flags(system)
    system.add_argument("--logits", type=Path)
    calm = jobs.add_parser("alerts")
    calm.add_argument("functions", type=Path, help='JSONL of ordinary functions: "text", "language", "project"')
    calm.add_argument("--pairs", type=Path)
    calm.add_argument("--samples", type=int, default=SAMPLES)
    bugs = jobs.add_parser("planted")
    bugs.add_argument("folder", type=Path)
    bugs.add_argument("--point", choices=combine.POINTS, default="balanced")
    fast = jobs.add_parser("speed")
    fast.add_argument("paths", type=Path, nargs="+")
    fast.add_argument("--rounds", type=int, default=3)
    fast.add_argument("--venvs", type=Path)
    for job, without in ((calm, "rules alone"), (bugs, "what is built in"), (fast, "what is built in")):
        job.add_argument("--detector", type=Path, help=f"the folder of a packed detector; without it, {without}")
    for job in jobs.choices.values():
        job.add_argument("--records", type=Path, help="JSONL file that the records are added to")
    args = parser.parse_args(words)
    if args.job in ("floors", "system"):
        found = compare(args, args.job == "system")
        show(found)
        found += pointed(args) if args.job == "system" else []
    else:
        found = {"alerts": alerts, "planted": planted, "speed": speed}[args.job](args)
    for item in found:
        if item.run in ("scan alerts", "scan lines"):
            print(f"{item.task}, {item.model}: {item.metric} {span(item)}")
    if args.records:
        record.append(args.records, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
