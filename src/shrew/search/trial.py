"""What a worker does: apply moves and score the result, or measure how much damage a choice does. All by hash.

Every function takes and gives plain values. A finished result lies in the cache under the hash of all it depends on;
asking again, in this run or the next, reads it back.
"""

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from shrew import files, folder, spec
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.folder.grids import Grid, Steps, dequantize
from shrew.folder.packed import from_rows, to_rows
from shrew.measure import cost
from shrew.moves import Context, apply_moves, parse_moves, replay
from shrew.moves.anatomy import batches, find_layers, logits
from shrew.moves.drop_layers import droppable, layer_scores
from shrew.moves.grids import nearest
from shrew.moves.quantize import Target, quantizable
from shrew.moves.source import Source, context_of, fingerprint, open_task, suited
from shrew.search.allocate import Group
from shrew.search.kinds import Kind, Palette, blocks
from shrew.tasks import Task

VERSION = 3  # of what is cached; raised when a trial's meaning changes
GGUF = "model.gguf"
PROFILE_TOKENS = 4096
PROFILE_VALUES = 1 << 25
SAMPLE = 128  # rows of a weight whose rounding errors are compared
KEPT = 1 << 27  # codes that a worker keeps while it measures choices


@lru_cache(maxsize=2)
def opened(source_json: str) -> tuple[Loaded, Task, Context]:
    """Original, task and context of a source; kept, since every job of a worker is about the same one."""
    source = spec.parse(Source, json.loads(source_json), "source")
    original = folder.load(source.model)
    task = open_task(source, original)
    return original, task, context_of(source, original, task, lambda text: None)


def cached(kind: str, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored result of `key`, or that of `compute`; "reused" says which."""
    place = files.cache_folder() / kind / f"{spec.digest([VERSION, folder.versions(), key])[:32]}.json"
    if place.exists():
        return {**json.loads(place.read_text("utf-8")), "reused": True}
    result = compute()
    files.write_text(place, json.dumps(result))
    return {**result, "reused": False}


def run_trial(source_json: str, moves: list[dict[str, Any]], split: str, gguf: bool = False) -> dict[str, Any]:
    """Apply moves to the original (none: the original itself) and score the saved folder on a split.

    Returns folder, bytes (of the weights file, or of the file that `as_gguf` writes), parameters, scores and the
    CPU-seconds that it took.
    """
    original, task, context = opened(source_json)
    source = spec.parse(Source, json.loads(source_json), "source")
    assert original.path is not None
    base = fingerprint(source, original.path, context)
    key = [base, moves, task_key(task, split), gguf]
    place = files.cache_folder() / "trials" / f"{spec.digest([VERSION, folder.versions(), key])[:32]}.json"
    if place.exists():
        found = json.loads(place.read_text("utf-8"))
        if Path(found["folder"]).exists():
            return {**found, "reused": True}
    begun = time.process_time()
    path = apply_moves(original.path, parse_moves(moves, "trial"), source, context)
    loaded = folder.load(path) if moves else original
    scores = task.score(loaded, split)
    total, active = cost.parameters(loaded.model)
    size = gguf_bytes(loaded) if gguf else weight_bytes(path)
    result = {
        "folder": str(path), "bytes": size, "parameters": total, "active_parameters": active,
        "scores": scores.dump(), "seconds": time.process_time() - begun,
    }  # fmt: skip
    files.write_text(place, json.dumps(result))
    return {**result, "reused": False}


def weight_bytes(path: Path) -> int:
    return sum(item.stat().st_size for item in folder.weight_files(path))


def as_gguf(loaded: Loaded, out: Path) -> dict[str, Any]:
    """Write a model for llama.cpp, every packed weight in the blocks that it was given. Raises UnsupportedError for
    what the format cannot hold so."""
    from shrew.packers import gguf  # its library is an extra

    made = gguf.write(loaded, out, gguf.Options(), lambda text: None, out.stem)
    for name, reason in made["misfits"].items():
        raise UnsupportedError(f"GGUF has no blocks for '{name}': {reason}.")
    return made


def gguf_bytes(loaded: Loaded) -> int:
    with tempfile.TemporaryDirectory() as work:
        return int(as_gguf(loaded, Path(work) / GGUF)["bytes"])


def task_key(task: Task, split: str) -> str:
    return spec.digest([task.label, split, getattr(task, "labels", ()), [vars(item) for item in task.examples(split)]])


def groups(loaded: Loaded, apart: bool = False) -> list[Group]:
    """Quantizable weights in groups that share their grid: each part (attention, feed-forward, ...) of each layer, and
    every weight outside the layers alone; or each weight `apart`."""
    prefix = find_layers(loaded.model)[0]
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, target in quantizable(loaded.model)[0].items():
        inside = name.removeprefix(prefix + ".").split(".") if name.startswith(prefix + ".") else []
        key = f"{prefix}.{inside[0]}.{inside[1]}" if len(inside) > 2 and not apart else name
        rows = to_rows(target.weight, target.transposed)
        found.setdefault(key, []).append((name, rows.shape[0], rows.shape[1]))
    return [Group(name, tuple(tensors)) for name, tensors in found.items()]


def profile(source_json: str, items: list[dict[str, Kind]], settings: dict[str, Any]) -> list[float]:
    """Damage of each choice {weight: its grid}, rounded to nearest, other weights as they are: KL(original || changed)
    in nats a prediction on calibration text. `settings`: the palette's."""
    with ExitStack() as stack:
        opening = cache(lambda: stack.enter_context(rounding(source_json, items, settings)))
        return [
            cached("profile", [_base_key(source_json), sorted(item.items()), settings],
                   lambda item=item: {"damage": opening()(item)})["damage"]  # type: ignore[misc]
            for item in items
        ]  # fmt: skip


def errors(source_json: str, names: list[str], kinds: list[str]) -> list[dict[str, float]]:
    """Squared error of rounding some rows of each weight to the nearest on each grid that fits it."""
    original = opened(source_json)[0]
    targets, palette = quantizable(original.model)[0], Palette({}, (), {})

    def compute() -> dict[str, Any]:
        found: dict[str, dict[str, float]] = {}
        for name in names:
            rows = to_rows(targets[name].weight.detach().float(), targets[name].transposed)
            rows = rows[:: -(-len(rows) // SAMPLE)]
            grids = {kind: palette.grid(kind, rows.shape[1]) for kind in kinds}
            found[name] = {kind: float((dequantize(*nearest(rows, grid), grid) - rows).square().sum())
                           for kind, grid in grids.items() if rows.shape[1] % max(grid.span, 1) == 0}  # fmt: skip
        return found

    found = cached("errors", [_base_key(source_json), names, kinds], compute)
    return [found[name] for name in names]


def layer_damages(source_json: str) -> list[float]:
    """KL of leaving out each layer; infinite where the architecture does not let it go."""
    original, _, context = opened(source_json)
    free = droppable(original.model, set())
    scores = layer_scores(original, context, "kl")
    return [score if number in free else float("inf") for number, score in enumerate(scores)]


def damage(source_json: str, moves: list[dict[str, Any]]) -> float:
    """KL(original || changed) of moves in nats a prediction, on text that none of them has calibrated on."""
    original, _, context = opened(source_json)
    source = spec.parse(Source, json.loads(source_json), "source")

    def compute() -> dict[str, Any]:
        assert original.path is not None
        path = apply_moves(original.path, parse_moves(moves, "damage"), source, context)
        return {"damage": _away(folder.load(path), context, source)}

    return float(cached("damages", [_base_key(source_json), moves], compute)["damage"])


def cut(source_json: str, moves: list[dict[str, Any]], gguf: bool = False, saving: float = 0.0) -> dict[str, Any]:
    """What structural moves leave: the groups of the cut model, its damage before healing, the bytes that stay
    unquantized, and its active parameters. {"refused": reason} where the architecture does not allow them, `gguf`
    cannot hold what they make, or they save less than the share `saving` of the weights."""
    original, _, context = opened(source_json)
    source = spec.parse(Source, json.loads(source_json), "source")
    assert original.path is not None

    def compute() -> dict[str, Any]:
        assert original.path is not None
        try:
            path = apply_moves(original.path, parse_moves(moves, "cut"), source, context)
            changed = folder.load(path) if moves else original
            found, rest = _in_gguf(changed) if gguf else _in_folder(changed, path)
        except UnsupportedError as error:
            return {"refused": str(error)}
        if saving:
            before = sum(rows * cols for _, each in cut(source_json, [], gguf)["groups"] for _, rows, cols in each)
            if sum(item.weights() for item in found) > (1 - saving) * before:
                return {"refused": f"it would save less than {saving:.0%} of the weights"}
        active = cost.parameters(changed.model)[1]
        damage = _away(changed, context, source) if moves else 0.0
        return {"groups": [[item.name, item.tensors] for item in found], "damage": damage, "rest": rest,
                "active": active}  # fmt: skip

    return cached("cuts", [_base_key(source_json), moves, gguf, *([saving] if saving else [])], compute)


def _in_folder(loaded: Loaded, path: Path) -> tuple[list[Group], int]:
    """The groups of a dense model, and the bytes that its weights file has besides when they are packed."""
    found = groups(loaded)
    # Of a packed weight the header lists scales beside the codes: a second entry, of about this length.
    header = sum(len(name) + 80 for item in found for name, _, _ in item.tensors)
    element = torch.empty(0, dtype=loaded.dtype).element_size()
    return found, weight_bytes(path) - sum(item.weights() for item in found) * element + header


def _in_gguf(loaded: Loaded) -> tuple[list[Group], int]:
    """The same of its GGUF file, which may hold a weight twice: then it has twice as many rows here."""
    with tempfile.TemporaryDirectory() as work:
        made = as_gguf(loaded, Path(work) / GGUF)
    elements: dict[str, int] = {}
    for item in made["tensors"]:
        elements[item["source"]] = elements.get(item["source"], 0) + math.prod(item["shape"])
    known, palette = groups(loaded, apart=True), blocks()
    for item in known:
        for name, _, cols in item.tensors:
            try:
                palette.fitting(cols)
            except UnsupportedError as error:
                raise UnsupportedError(f"'{name}': {error}.") from None
    found = [Group(item.name, tuple((name, elements.get(name, rows * cols) // cols, cols)
                                    for name, rows, cols in item.tensors)) for item in known]  # fmt: skip
    own = {name for item in known for name, _, _ in item.tensors}
    held = sum(item["bytes"] for item in made["tensors"] if item["source"] in own)
    return found, made["bytes"] - held


@lru_cache(maxsize=2)
def _base_key(source_json: str) -> str:
    original, _, context = opened(source_json)
    assert original.path is not None
    return spec.digest(fingerprint(spec.parse(Source, json.loads(source_json), "source"), original.path, context))


@contextmanager
def rounding(
    source_json: str, items: list[dict[str, Kind]], settings: dict[str, Any]
) -> Iterator[Callable[[dict[str, Kind]], float]]:
    """Inside the block, the damage of any of these choices, see `profile`; afterwards the original is as it was.

    The model holds what most of the choices have in common, and each choice is run from the first layer in which it
    differs."""
    original, _, context = opened(source_json)
    palette, wanted = Palette({}, (), settings), reference(source_json)
    names = {name for item in items for name in item}
    targets = {name: target for name, target in quantizable(original.model)[0].items() if name in names}
    exact = {name: target.weight.detach().clone() for name, target in targets.items()}
    now: dict[str, Kind] = {}

    def hold(kinds: dict[str, Kind]) -> None:
        for name, target in targets.items():
            if now.get(name) != kinds.get(name):
                value = exact[name]
                if name in kinds:
                    rows = to_rows(value, target.transposed)
                    grid = palette.grid(kinds[name], rows.shape[1])
                    rounded = dequantize(*_nearest((_base_key(source_json), name, grid), rows), grid)
                    value = from_rows(rounded, tuple(value.shape), target.transposed)
                target.weight.copy_(value)
        now.clear()
        now.update(kinds)

    def damage(item: dict[str, Kind]) -> float:
        first = min([first_layer(original, targets[name]) for name in targets if item.get(name) != common.get(name)],
                    default=len(layers))  # fmt: skip
        with torch.inference_mode():
            hold(item)
            total = sum(replay.divergence(each.logits(first), old) for each, old in zip(passes, wanted, strict=True))
            return total / sum(len(old) for old in wanted)

    counts = {name: Counter(item.get(name) for item in items).most_common(1)[0][0] for name in targets}
    common = {name: kind for name, kind in counts.items() if kind is not None}
    try:
        with torch.inference_mode():
            ids = _profile_batches(original, context)
            layers = replay.steady(original, ids[0])
            hold(common)
            passes = [replay.Replay(original, each, layers) for each in ids]
        yield damage
    finally:
        with torch.inference_mode():
            for name, target in targets.items():
                target.weight.copy_(exact[name])


def first_layer(loaded: Loaded, target: Target) -> int:
    """The first layer whose output a weight changes: its own, all for an embedding, and none for a head."""
    prefix, layers = find_layers(loaded.model)
    inside = target.name.removeprefix(prefix + ".")
    if inside != target.name:
        return int(inside.partition(".")[0])
    return len(layers) if target.kind == "head" else 0


_made: dict[tuple[str, str, Grid], tuple[torch.Tensor, Steps]] = {}


def _nearest(key: tuple[str, str, Grid], rows: torch.Tensor) -> tuple[torch.Tensor, Steps]:
    """Codes and steps of a weight on a grid, remembered as long as they are few: most choices share most of them."""
    if key not in _made:
        if sum(codes.numel() for codes, _ in _made.values()) + rows.numel() > KEPT:
            _made.clear()
        _made[key] = nearest(rows, key[2])
    return _made[key]


@torch.inference_mode()
def _away(changed: Loaded, context: Context, source: Source) -> float:
    """Divergence of a changed model from the original; where it has lost tokens, from the original without them. On
    the last of the healing text, if there is any: what was calibrated on tells too little (a quarter, of low rates)."""
    there = suited(context, changed, source)
    assert there.teacher is not None
    unseen = there.healing[::-1] or there.calibration
    return divergence(there.teacher, changed, replace(there, calibration=unseen))


def _profile_batches(loaded: Loaded, context: Context) -> list[torch.Tensor]:
    wide = 1 if loaded.is_classifier else loaded.model.config.get_text_config().vocab_size
    limit = min(PROFILE_TOKENS, max(PROFILE_VALUES // wide, 512))
    return list(batches(loaded, context.calibration, 2048, limit))


@lru_cache(maxsize=1)
def reference(source_json: str) -> list[torch.Tensor]:
    """Log-probabilities of the original on the profile's batches."""
    original, _, context = opened(source_json)
    return _log_probabilities(original, _profile_batches(original, context))


def _log_probabilities(loaded: Loaded, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    return [F.log_softmax(logits(loaded, item).float(), dim=-1).flatten(0, -2) for item in ids]


def divergence(original: Loaded, changed: Loaded, context: Context) -> float:
    """KL(original || changed) in nats a prediction on calibration text."""
    ids = _profile_batches(original, context)
    total, rows = 0.0, 0
    for each in ids:
        (old,) = _log_probabilities(original, [each])
        total += replay.divergence(logits(changed, each), old)
        rows += len(old)
    return total / rows


def compared(source_json: str, path: str) -> dict[str, Any]:
    """Scores of a folder on the search split with KL and agreement to the original beside them."""
    original, task, _ = opened(source_json)
    key = [_base_key(source_json), folder.identity(path), task_key(task, "search")]
    found = cached("compared", key, lambda: task.score(folder.load(path), "search", original).dump())
    return {name: value for name, value in found.items() if name != "reused"}


def peaks(path: str) -> list[int]:
    """Peak bytes of a fresh process that loads a folder, and before loading it."""
    return list(cost.peak_memory(Path(path)))
