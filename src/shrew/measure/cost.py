"""What a model costs: bytes, parameters, time, memory, energy; measured, never derived from an assumed wattage."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from shrew.blocks import describe
from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import ShrewError
from shrew.folder import Loaded
from shrew.machine import RAPL, Joules
from shrew.measure.statistics import Interval, student_quantile
from shrew.tasks import likelihood

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
EXPERT = re.compile(r"\.experts\.")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Size:
    """Bytes on disk of the weights and of the whole folder."""

    weights: int
    folder: int


def disk_size(folder: Path) -> Size:
    """Bytes of the files in a model folder, links followed."""
    items = [item for item in folder.rglob("*") if item.is_file()]
    weights = sum(item.stat().st_size for item in items if item.suffix in WEIGHTS)
    return Size(weights, sum(item.stat().st_size for item in items))


def parameters(model: Any) -> tuple[int, int]:
    """(total, active) weights of a model; a tied weight counts once. Of experts, the top-k share is active; a model of
    our own blocks says itself what a token uses, as `shrew describe` does."""
    if isinstance(model, ShrewForCausalLM):
        count = describe.parameters(model)
        return count.total, count.active
    config = model.config.get_text_config()
    total = sum(item.numel() for item in model.parameters())
    experts = next((int(getattr(config, name)) for name in EXPERTS if getattr(config, name, None)), 0)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not experts or not chosen:
        return total, total
    routed = sum(item.numel() for name, item in model.named_parameters() if EXPERT.search(name))
    return total, total - routed + routed * min(int(chosen), experts) // experts


@dataclass(frozen=True)
class Speed:
    """Seconds of one model, the median of the rounds, and the baseline's seconds over its own (above 1 is faster)."""

    wall: float
    cpu: float
    wall_ratio: Interval
    cpu_ratio: Interval


def speeds(models: Sequence[Loaded], rounds: int = 7, prompt: int = 256, steps: int = 32) -> dict[str, list[Speed]]:
    """Prefill and decode times of several models, alternated in one run; the first model is the baseline.

    "prefill" is one forward pass over `prompt` tokens, "decode" greedy generation of `steps` tokens after 8 with the
    cache. Every round visits every model, in an order that turns with the round, so that slow changes of the machine
    cancel in the ratios. Classifiers have no decode. Weights are computed as loaded, in float32: rounding to fewer
    bits makes a folder smaller and not this number better.
    """
    work: dict[str, Callable[[Loaded], None]] = {"prefill": lambda loaded: _prefill(loaded, prompt)}
    if not any(loaded.is_classifier for loaded in models):
        work["decode"] = lambda loaded: _decode(loaded, steps)
    return {name: _alternate(models, step, rounds) for name, step in work.items()}


def _alternate(models: Sequence[Loaded], work: Callable[[Loaded], None], rounds: int) -> list[Speed]:
    times = np.zeros((rounds, len(models), 2))
    with torch.inference_mode():
        for loaded in models:
            work(loaded)
        for turn in range(rounds):
            for place in [(turn + step) % len(models) for step in range(len(models))]:
                wall, cpu = time.perf_counter(), time.process_time()
                work(models[place])
                times[turn, place] = time.perf_counter() - wall, time.process_time() - cpu
    times = np.maximum(times, 1e-9)
    return [
        Speed(
            float(np.median(times[:, place, 0])),
            float(np.median(times[:, place, 1])),
            ratio_of_pairs(times[:, 0, 0], times[:, place, 0]),
            ratio_of_pairs(times[:, 0, 1], times[:, place, 1]),
        )
        for place in range(len(models))
    ]


def ratio_of_pairs(baseline: np.ndarray, new: np.ndarray, level: float = 0.95) -> Interval:
    """Geometric mean of baseline / new over paired repeats, with the t interval of its logarithm."""
    logs = np.log(baseline / new)
    centre, n = float(logs.mean()), len(logs)
    if n < 2:
        return Interval(float(np.exp(centre)), 0.0, float("inf"), n)
    half = student_quantile((1 + level) / 2, n - 1) * float(logs.std(ddof=1)) / np.sqrt(n)
    return Interval(float(np.exp(centre)), float(np.exp(centre - half)), float(np.exp(centre + half)), n)


def _tokens(loaded: Loaded, count: int) -> torch.Tensor:
    length = min(count, likelihood.context_length(loaded.model))
    known = min(likelihood.vocabulary(loaded.model), len(loaded.tokenizer))
    return torch.randint(0, known, (1, length), generator=torch.Generator().manual_seed(0))


def _prefill(loaded: Loaded, count: int) -> None:
    ids = _tokens(loaded, count)
    loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids))


def _decode(loaded: Loaded, steps: int) -> None:
    steps = min(steps, likelihood.context_length(loaded.model) - 8)
    ids = _tokens(loaded, 8)
    plain = GenerationConfig(do_sample=False, num_beams=1, min_new_tokens=steps, max_new_tokens=steps, pad_token_id=0)
    loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plain)


PROBE = """
import sys
from pathlib import Path
import torch
from shrew import folder


def peak():
    try:  # the process's own peak; ru_maxrss would also hold that of the process it was forked from
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


before = peak()
loaded = folder.load(sys.argv[1])
length = min(64, getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 64)
with torch.inference_mode():
    loaded.model(input_ids=torch.ones(1, length, dtype=torch.long), attention_mask=torch.ones(1, length))
print("peak", peak(), before)
"""


def peak_memory(path: Path) -> tuple[int, int]:
    """Peak resident bytes of a fresh process that loads the folder and runs one prompt of 64 tokens, and its peak
    before loading (the interpreter and torch)."""
    command = [sys.executable, "-c", PROBE, str(path.resolve())]  # absolute: no name of a shipped model
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    found = re.search(r"^peak (\d+) (\d+)$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or not found:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ShrewError(f"{path}: the process that measures memory failed ({reason}); run again with --no-cost.")
    return int(found[1]), int(found[2])


def _environment() -> dict[str, str]:
    """The probe imports this very package, however it was found."""
    home = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])}


@dataclass(frozen=True)
class Energy:
    """What some work took: joules where a counter could be read (with its name), else processor seconds."""

    value: float
    unit: str
    source: str


def energy(work: Callable[[], Any], root: Path = RAPL) -> Energy:
    """Run `work` and say what it took: RAPL joules of the processor packages if readable, else CPU-seconds.

    The package counter covers everything that ran on the machine meanwhile.
    """
    counted = Joules(root)
    start = time.process_time()
    work()
    spent = time.process_time() - start
    joules = counted.spent()
    if joules is None:
        return Energy(spent, "CPU-seconds", "process time")
    return Energy(joules, "J", "RAPL, " + ", ".join(path.parent.name for path in counted.limits))


def prefill_energy(loaded: Loaded, passes: int = 5, prompt: int = 256) -> Energy:
    """Energy of `passes` forward passes over `prompt` tokens, for 1,000 tokens."""
    count = _tokens(loaded, prompt).shape[1] * passes

    def work() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                _prefill(loaded, prompt)

    found = energy(work)
    return Energy(found.value * 1000 / count, found.unit, found.source)
