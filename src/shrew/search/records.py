"""What a run of the search measured, as records in the vocabulary of `shrew.report`."""

import hashlib
import json
import platform
import time
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shrew import folder, spec
from shrew.data import python
from shrew.folder import Loaded
from shrew.measure import (
    cost_records,
    forgotten_records,
    paired_bootstrap,
    quality_records,
    speed_records,
    tail_records,
)
from shrew.record import Record
from shrew.search import trial
from shrew.search.gate import ALPHA, Verdict
from shrew.tasks import Scores, likelihood

if TYPE_CHECKING:
    from shrew.search.run import Run, Trial

SAMPLES, PROMPT, CONTINUED = 3, 48, 48  # prompts, and their tokens and new tokens


def emit(run: "Run", chosen: "Trial | None", verdicts: dict[str, Verdict], order: "list[Trial]") -> list[Record]:
    """All records of a run; the details are of the chosen model or, without one, of the nearest miss."""
    name = f"shrink-{spec.digest([run.command, run.source, time.time_ns()])[:12]}"
    best = chosen
    if best is None and verdicts:
        label = max(verdicts, key=lambda key: verdicts[key].lower_bound)
        best = next(item for item in order if item.label == label)
    label = "" if best is None else "chosen" if chosen is not None else best.label
    weighed = [run.executor.submit(trial.peaks, str(path)) for path in
               (run.original.path, *([best.folder] if best is not None else []))]  # fmt: skip
    trials = [record for item in run.trials for record in _trial(run, name, item)]
    details = [] if best is None else _details(run, name, label, best, verdicts, chosen is not None, weighed)
    found = [_plan(run, name)]
    found += _references(run, name, weighed[0])
    found += trials
    found += [Record(run=name, model=told["trial"], metric="order", value=told["retention"], task=_task(run, "search"),
                     detail=told) for told in run.orders]  # fmt: skip
    found += details
    for item in order:
        if item is not best and item.label in verdicts:
            found += _final(run, name, item.label, item.label, verdicts)
    outcome = "met" if chosen is not None else "not met"
    found.append(Record(run=name, model=label, metric="verdict", value=outcome, task=_task(run, "final"), detail={
        "reason": "" if best else "nothing that was tried met the goals on the search split",
        "cpu_seconds": time.process_time() - run.cpu_begun + run.executor.cpu_seconds(),
        "wall_seconds": time.monotonic() - run.begun,
        "not_measured": ["speed in other runtimes", "tasks other than this one"],
    }))  # fmt: skip
    return found


def _task(run: "Run", split: str) -> str:
    return f"{run.task.label}/{split}"


def _plan(run: "Run", name: str) -> Record:
    splits = {}
    for split in run.task.splits:
        items = run.task.splits[split]
        sizes = [len(getattr(item, "text", "").encode()) for item in items]
        splits[split] = {"documents": len(items)} | ({"bytes": sum(sizes)} if any(sizes) else {})
    return Record(run=name, model="", metric="plan", value=None, seed=run.source.seed, detail={
        "model": run.source.model, "command": run.command, "goals": run.goals, "tried": run.tried,
        "settings": spec.dump(run.wanted) | _evaluated(run) | _checked(run), "versions": folder.versions(),
        "threads": run.source.threads, "candidates": run.wanted.candidates, "splits": splits,
        "provable_keep": run.provable, "final_split_opened": run.openings,
    })  # fmt: skip


def _checked(run: "Run") -> dict[str, str]:
    """Whether the parts' damages added up, where bits were chosen by them."""
    return {"damage of the likely choice, not healed": run.repaired} if run.repaired else {}


def _evaluated(run: "Run") -> dict[str, str]:
    """For the starter: how many evaluation modules this interpreter has in common with the one of its training."""
    place = (run.original.path or Path()) / "manifest.json"
    if run.task.name != "python" or not place.exists():
        return {}
    manifest = json.loads(place.read_text("utf-8"))
    now = {id: hashlib.sha256(text.encode()).hexdigest() for id, text in python.evaluation()}
    same = sum(manifest["evaluation"].get(id) == mark for id, mark in now.items())
    told = f"{len(now)} modules of Python {platform.python_version()}, {same} of them word for word as in "
    return {"evaluation": f"{told}Python {manifest['interpreter']}, where the starter was trained"}


def _references(run: "Run", name: str, weighed: "Future[list[int]]") -> list[Record]:
    found = cost_records(name, "original", run.original, peaks=_pair(weighed))
    if "healed original" in run.references:
        found.append(Record(run=name, model="healed original", metric="bytes", value=run.twin_bytes, unit="bytes"))
    twins = {"original": run.references["original"], **run.references}
    for label, scores in twins.items():
        final = run.finals.get(label)
        for each, base in ((scores, run.references["original"]), (final, run.finals.get("original"))):
            if each is not None and base is not None:
                found += quality_records(name, label, each, base, seed=run.source.seed)
    if "original" in run.finals:
        found += forgotten_records(name, "original", run.task, run.finals["original"], seed=run.source.seed)
    return found


def _forgotten(run: "Run", name: str, label: str, item: "Trial", loaded: Loaded) -> list[Record]:
    """What the model lost where, on the final split and, if there are any, on the pairs for bias."""
    found, seed = [], run.source.seed
    if item.label in run.finals:
        scores, original = run.finals[item.label], run.finals["original"]
        found += forgotten_records(name, label, run.task, scores, original, seed=seed)
        found += tail_records(name, label, run.task, scores, original, loaded, run.original)
    if run.pairs is not None:
        before, after = run.pairs.score(run.original, "final"), run.pairs.score(loaded, "final")
        for model, scores, base in (("original", before, None), (label, after, before)):
            found += quality_records(name, model, scores, base, seed=seed)
            found += forgotten_records(name, model, run.pairs, scores, base, seed=seed)
    return found


def _trial(run: "Run", name: str, item: "Trial") -> list[Record]:
    against, scores = min(run.references.items(), key=lambda pair: _value(pair[1], item.scores))
    kept = paired_bootstrap(scores, item.scores, seed=run.source.seed)
    return [
        Record(run=name, model=item.label, metric="trial", value=item.seconds, unit="CPU-seconds",
               detail={"moves": item.moves, "reused": item.reused}),
        Record(run=name, model=item.label, metric="bytes", value=item.bytes, unit="bytes"),
        Record(run=name, model=item.label, metric="parameters", value=item.parameters),
        Record(run=name, model=item.label, metric="retention", value=kept.value, low=kept.low, high=kept.high,
               n=kept.n, task=_task(run, "search"), detail={"against": against, "units": _units(item.scores)}),
    ]  # fmt: skip


def _value(reference: Scores, scores: Scores) -> float:
    return paired_bootstrap(reference, scores, samples=1).value


def _units(scores: Scores) -> str:
    return "documents" if scores.metric == "bits_per_byte" else "examples"


def _final(run: "Run", name: str, label: str, key: str, verdicts: dict[str, Verdict]) -> list[Record]:
    """Quality of a candidate on the final split, with the gate's verdict."""
    verdict, scores = verdicts[key], run.finals[key]
    found = [item for item in quality_records(name, label, scores, run.finals[verdict.against], verdict.against,
                                              ALPHA, run.source.seed) if item.metric != "retention"]  # fmt: skip
    kept = verdict.interval
    detail = {"against": verdict.against, "lower_bound": verdict.lower_bound, "alpha": ALPHA,
              "floor": run.goals["keep"], "passed": verdict.passed, "units": _units(scores)}  # fmt: skip
    found.append(Record(run=name, model=label, metric="retention", value=kept.value, low=kept.low, high=kept.high,
                        n=kept.n, task=_task(run, "final"), seed=run.source.seed, detail=detail))  # fmt: skip
    return found


def _pair(weighed: "Future[list[int]]") -> tuple[int, int]:
    peak, before = weighed.result()
    return peak, before


def _details(run: "Run", name: str, label: str, item: "Trial", verdicts: dict[str, Verdict], met: bool,
             weighed: "list[Future[list[int]]]") -> list[Record]:  # fmt: skip
    """Everything that the page shows of one model. `weighed`: peaks of memory, of the original and of this one."""
    common: dict[str, Any] = {"run": name, "model": label}
    loaded = folder.load(item.folder)
    written = not loaded.is_classifier and run.task.metric == "bits_per_byte"
    steps = [run.start(item.moves[:count]) for count in range(1, len(item.moves))]
    compared = run.executor.submit(trial.compared, run.json, str(item.folder)) if written else None
    lost = _forgotten(run, name, label, item, loaded)
    shown = samples(run, common, run.original, loaded) if written else []
    found = _steps(run, common, item, steps)
    if met:
        search = [record for record in _trial(run, name, item) if record.metric == "retention"]
        found += [Record(**{**vars(record), "model": label}) for record in search]
    found += _final(run, name, label, item.label, verdicts)
    found += lost
    agreed = [] if compared is None else _agreement(run, common, Scores.parse(compared.result()))
    _, peaks = map(_pair, weighed)  # the workers are done: what follows is timed
    for record in cost_records(name, label, loaded, peaks=peaks):
        changed: dict[str, Any] = {"value": item.bytes} if record.metric == "bytes" else {}
        changed |= {"detail": {**record.detail, "trial": item.label}} if changed and met else {}
        found.append(Record(**{**vars(record), **changed}))
    found += speed_records(name, ["original", label], [run.original, loaded], rounds=5)
    found += [*agreed, *shown]
    untouched = loaded.untouched
    for tensor in folder.tensors(item.folder):
        detail = {"tensor": tensor.name, "class": _class(tensor.name), "bytes": tensor.bytes,
                  "shape": list(tensor.shape)}  # fmt: skip
        if tensor.name in untouched:
            detail["reason"] = untouched[tensor.name]
        found.append(Record(**common, metric="tensor", value=tensor.effective, detail=detail))
    found.append(Record(**common, metric="recipe", value=run.recipe(item)))
    found.append(Record(**common, metric="use", value=None, detail={"tools": uses(run, loaded)}))
    return found


def _steps(
    run: "Run", common: dict[str, Any], item: "Trial", futures: "list[Future[dict[str, Any]]]"
) -> list[Record]:
    """Size and quality after each move of the recipe: what each one bought. `futures`: trials of all but the last."""
    found = []
    for number, move in enumerate(item.moves, 1):
        if number < len(item.moves):
            done = futures[number - 1].result()
            scores, size = Scores.parse(done["scores"]), done["bytes"]
        else:
            scores, size = item.scores, item.bytes
        base = min(run.references.values(), key=lambda reference: _value(reference, scores))
        kept = paired_bootstrap(base, scores, seed=run.source.seed)
        detail = {"step": number, "move": move, "bytes": size, "units": _units(scores)}
        found.append(Record(**common, metric="move", value=kept.value, low=kept.low, high=kept.high, n=kept.n,
                            task=_task(run, "search"), detail=detail))  # fmt: skip
    return found


def _agreement(run: "Run", common: dict[str, Any], scores: Scores) -> list[Record]:
    """KL to the original and agreement of the likeliest token, on the search split."""
    found = quality_records(common["run"], common["model"], scores, seed=run.source.seed)
    return [record for record in found if record.metric in ("kl", "top1_agreement")]


def samples(run: "Run", common: dict[str, Any], before: Loaded, after: Loaded) -> list[Record]:
    """The same prompts continued by both models, greedily."""
    found = []
    for item in run.task.examples("search")[:SAMPLES]:
        ids = before.tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"]
        start = min(len(ids) // 3, 200)
        prompt = ids[start : start + min(PROMPT, likelihood.context_length(before.model) - CONTINUED)]
        if len(prompt) < 8:
            continue
        text = before.tokenizer.decode(prompt)
        if after.tokenizer.get_vocab() == before.tokenizer.get_vocab():
            own = prompt
        else:  # the same text in the tokens that are left, which may be more
            own = after.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            own = own[-(likelihood.context_length(after.model) - CONTINUED) :]
        texts = [continuation(before, prompt), continuation(after, own)]
        detail = {"prompt": text, "before": texts[0], "after": texts[1],
                  "how": f"greedy, {CONTINUED} tokens"}  # fmt: skip
        found.append(Record(**common, metric="sample", value=None, detail=detail))
    return found


@torch.inference_mode()
def continuation(loaded: Loaded, prompt: list[int]) -> str:
    ids = torch.tensor([prompt])
    made = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUED, do_sample=False,
                                 pad_token_id=loaded.tokenizer.pad_token_id or 0)  # fmt: skip
    return str(loaded.tokenizer.decode(made[0, len(prompt) :]))


def _class(name: str) -> str:
    parts = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "experts"),
             "embedding": ("embed", "wte", "wpe", "lm_head"), "norm": ("norm", "ln_")}  # fmt: skip
    if "norm" in name.rpartition(".")[0].rpartition(".")[2] or ".ln_" in f".{name}":
        return "norm"
    return next((kind for kind, marks in parts.items() if any(mark in name for mark in marks)), "other")


def uses(run: "Run", loaded: Loaded) -> list[dict[str, str]]:
    """Which tools read the result, and how."""
    auto = "AutoModelForSequenceClassification" if loaded.is_classifier else "AutoModelForCausalLM"
    layout = loaded.lineage.get("layout", "dense")
    python = f'from transformers import {auto}\nmodel = {auto}.from_pretrained("{run.out.name}")'
    plain = {"tool": "transformers", "how": python, "note": ""}
    found = []
    if run.wanted.gguf:
        note = "the same values as in model.safetensors; sizes on this page are of this file"
        found.append({"tool": "llama.cpp", "how": f"llama-cli -m {run.out.name}/{trial.GGUF} -p TEXT", "note": note})
    if layout == "compressed-tensors":
        return [*found, {**plain, "note": "with the compressed-tensors package installed"}]
    if layout == "dense":
        return [*found, {**plain, "note": "nothing else is needed"}]
    return [*found,
            {"tool": "transformers with shrew", "how": f"import shrew\n{python}",
             "note": "packed weights are unpacked on loading; importing shrew teaches transformers how"},
            {"tool": "shrew", "how": f"shrew measure {run.source.model} {run.out.name}", "note": ""}]  # fmt: skip
