"""`--to onnx`: the graph and its weights, the tokenizer, and a manifest with hashes and what two checks found.

Our blocks say the model first (`shrew.blocks.stock`), so there is one emitter a block and none a model type.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from shrew import data, files, folder, machine
from shrew.errors import DataError, ShrewError, UnsupportedError
from shrew.folder import LINEAGE, Loaded
from shrew.folder.check import quiet
from shrew.packers.onnx import check
from shrew.packers.onnx.graph import DATA, MODEL, Graph, Weights
from shrew.packers.onnx.source import ours
from shrew.packers.onnx.trunk import causal
from shrew.spec import doc

__all__ = ["FORMAT", "MANIFEST", "Options", "pack"]

FORMAT = 1
MANIFEST = "pack.json"
CHUNK = 64  # tokens
EXACT = "exact.onnx"
FAST = 4  # accuracy level: inputs of a product rounded to 8 bits
TEXT = "python:evaluation"  # held out from the starter's training; every machine has it
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    text: str = doc("text on which the shipped graph is compared with the exact one: a file, folder or glob; default: "
                    "modules of Python's standard library", "")  # fmt: skip


def pack(name: str, out: Path, options: Options, say: Say) -> dict[str, Any]:
    """Write the packed folder `out` of the model `name`; returns its manifest.

    Raises UnsupportedError for models that cannot be packed, ShrewError where the graph is not the model."""
    files.check_writable_target(out, MANIFEST)
    say(machine.choose_threads().reason)
    loaded = folder.load(name)
    model, weights = ours(loaded)
    context = model.spec.context
    text = _tokens(loaded, options.text)
    say(f"{name}: {model.spec.depth} layers, {sum(value.numel() for value in loaded.model.parameters()):,} parameters")
    graph = causal(model, weights)
    try:
        with files.new_folder(out, MANIFEST) as folder_:
            offsets = graph.write(folder_ / DATA)
            (folder_ / EXACT).write_bytes(graph.proto(offsets, 0))
            (folder_ / MODEL).write_bytes(graph.proto(offsets, FAST))
            _say_types(weights, loaded, say)
            exact, shipped, level = _checked(folder_, graph, loaded, text, context, say)
            (folder_ / EXACT).unlink()
            (folder_ / MODEL).write_bytes(graph.proto(offsets, level))
            _write_texts(folder_, loaded, name)
            manifest = _manifest(loaded, name, graph, model.spec) | {
                "accuracy_level": level, "exact": exact, "shipped": shipped | {"text": options.text or TEXT},
                "weights": weights.effective, "files": _hashes(folder_)}  # fmt: skip
            (folder_ / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise ShrewError(f"{out} could not be written ({error}); make room and run again.") from None
    total = sum(item["bytes"] for item in manifest["files"].values())
    say(f"{total:,} bytes in {len(manifest['files'])} files")
    return manifest


def _tokens(loaded: Loaded, source: str) -> list[int]:
    """Enough of the text for both checks."""
    found: list[int] = []
    for document in data.documents([source or TEXT]):
        found += data.encode(loaded.tokenizer, [document.text])[0]
        if len(found) >= check.COMPARED:
            break
    if len(found) < 2:
        raise DataError(f"{source}: fewer than two tokens of text; give more.")
    return found[: check.COMPARED]


def _say_types(weights: Weights, loaded: Loaded, say: Say) -> None:
    sizes: Counter[str] = Counter()
    for name, kind in weights.effective.items():
        sizes[kind] += weights.dense[name].numel()
    total = sum(sizes.values())
    say("weights: " + ", ".join(f"{kind} {size / total:.0%}" for kind, size in sizes.most_common()))
    if not loaded.packed:
        say("nothing is quantized here: the model is packed as it is; `shrew apply` quantizes")
    elif not weights.packed:
        say("no codes could be kept in our blocks, so their values are packed dense")


def _checked(
    where: Path, graph: Graph, loaded: Loaded, text: Sequence[int], context: int, say: Say
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What both checks found, and the accuracy level to ship."""

    def runner(file: str) -> check.Runner:
        capacity = min(context, check.WINDOW)
        return check.Runner(check.session(where / file), graph.states, capacity, CHUNK, graph.align)

    slow = runner(EXACT)
    say("checking the graph against torch ...")
    exact = check.exact(slow, loaded.model, text, context)
    say(f"  logits differ by at most {exact['logit_difference']:.1e}, "
        f"{exact['greedy_equal']} of {exact['greedy_compared']} greedy tokens are equal")  # fmt: skip
    if not graph.has_codes:
        return exact, {"kl_bits": 0.0, "top1": 1.0, "first_differing_token": None}, 0
    fast = runner(MODEL)
    at_zero, at_four = check.seconds([slow, fast], text)
    ratio = at_zero / at_four
    measured = {"seconds_per_token": {"0": at_zero, str(FAST): at_four}, "processor": machine.processor()}
    if ratio <= check.AS_FAST:
        say(f"shipping accuracy level 0: level {FAST} is {ratio:.2f} times as fast here")
        return exact, {"kl_bits": 0.0, "top1": 1.0, "first_differing_token": None, **measured}, 0
    shipped = check.shipped(fast, slow, text, context)
    say(f"shipping accuracy level {FAST}, {ratio:.2f} times as fast as level 0 here: KL {shipped['kl_bits']:.2g} "
        f"bits/token, first choice equal in {shipped['top1']:.2%}")  # fmt: skip
    return exact, shipped | measured, FAST


def _write_texts(where: Path, loaded: Loaded, name: str) -> None:
    """Tokenizer, settings of generation, and lineage."""
    with quiet():
        loaded.tokenizer.save_pretrained(where)
        if loaded.model.can_generate():
            loaded.model.generation_config.to_json_file(where / "generation_config.json")
    if not (where / "tokenizer.json").exists():
        raise UnsupportedError(f"{name}: its tokenizer has no tokenizer.json, which the runtime needs; convert it to a "
                               "fast tokenizer first.")  # fmt: skip
    parent = {"name": Path(name).name, "sha256": folder.identity(loaded.path) if loaded.path else None}
    lineage = loaded.lineage | {"format": 1, "packed": {"from": parent, "versions": versions()}}
    (where / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", "utf-8")


def versions() -> dict[str, str]:
    return folder.versions() | {"onnxruntime": onnxruntime.__version__}


def _manifest(loaded: Loaded, name: str, graph: Graph, spec: Any) -> dict[str, Any]:
    settings, tokenizer = loaded.model.generation_config, loaded.tokenizer
    eos = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    return {
        "format": FORMAT, "shrew": folder.versions()["shrew"], "kind": "causal", "name": Path(name).resolve().name,
        "files": {}, "vocabulary": spec.vocabulary, "width": spec.width, "context": spec.context,
        "bos": tokenizer.bos_token_id, "eos": np.atleast_1d([] if eos is None else eos).tolist(),
        "pad": tokenizer.pad_token_id, "chunk": CHUNK, "align": graph.align,
        "states": [asdict(state) for state in graph.states], "labels": None,
    }  # fmt: skip


def _hashes(where: Path) -> dict[str, Any]:
    return {item.name: {"bytes": item.stat().st_size, "sha256": files.sha256(item)} for item in sorted(where.iterdir())}
