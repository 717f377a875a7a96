"""`--to onnx`: the graph and its weights, the tokenizer, and a manifest with hashes and what two checks found.

Our blocks say the model first (`shrew.blocks.stock`), so there is one emitter a block and none a model type.
"""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from shrew import data, files, folder, machine, record
from shrew.errors import DataError, ShrewError, UnsupportedError
from shrew.folder import LINEAGE, Loaded, sparse
from shrew.folder.check import quiet
from shrew.packers.carry import refuse_corrections
from shrew.packers.onnx import check
from shrew.packers.onnx.build import CHUNK, Built, build
from shrew.packers.onnx.weights import VALUES_OF, Weights
from shrew.record import Record
from shrew.runtime import coded
from shrew.runtime.manifest import CODED, DATA, SQUEEZED, TOKENIZER
from shrew.runtime.manifest import GRAPH as MODEL
from shrew.spec import doc

__all__ = ["MANIFEST", "Options", "pack"]

MANIFEST = "pack.json"
EXACT = "exact.onnx"
FAST = 4  # accuracy level: inputs of a product rounded to 8 bits
AS_FAST = 1.05  # times; not worth a rounding
TEXT = "python:evaluation"  # held out from the starter's training; every machine has it
FITTED = 4096  # tokens that the steps of keys and values are fitted to
PIECE = 400  # characters of a text that a classifier gets
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    text: str | None = doc(
        "text on which the shipped graph is compared with the exact one: a file, folder or glob; default: modules of "
        "Python's standard library", None,
    )  # fmt: skip
    coded: bool = doc("store weights coded by their entropy and the tokenizer compressed: fewer bytes, decoded when "
                      "the model is loaded", False)  # fmt: skip
    records: str | None = doc("append what the checks found to this file of records, as a model of its last run: "
                              "`shrew report` shows it beside the others", None)  # fmt: skip
    kv: Literal[0, 8, 4] = doc("bits of cached keys and values, with steps fitted to more of that text; 0: in full", 0)


def pack(name: str, out: Path, options: Options, say: Say) -> dict[str, Any]:
    """Write the packed folder `out` of the model `name`; returns its manifest.

    Raises UnsupportedError for models that cannot be packed, ShrewError where the graph is not the model."""
    files.check_writable_target(out, MANIFEST)
    kept = None if options.records is None else Path(options.records)
    known = record.read(kept) if kept is not None and kept.exists() else []
    say(machine.choose_threads().reason)
    loaded = folder.load(name)
    files.check_apart(out, [loaded.path or name, options.text or ""])
    refuse_corrections(loaded.packed, "the graph")
    if loaded.is_classifier and options.kv:
        raise UnsupportedError(f"{name} is a classifier and keeps no keys and values; leave out --kv.")
    text, more = _text(loaded, options.text, FITTED if options.kv else 0)
    full = build(loaded)
    built = build(loaded, options.kv, more) if options.kv else full
    if options.kv:
        say(f"keys and values of {len(built.graph.kv)} layers are held in {options.kv} bits, fitted to {len(more):,} "
            "other tokens")  # fmt: skip
    if loaded.sparse:
        say(f"Note: {sparse.DENSE_NOTE}.")
    say(f"{name}: {sum(value.numel() for value in loaded.model.parameters()):,} parameters")
    try:
        with files.new_folder(out, MANIFEST) as where:
            _write_texts(where, loaded, name)
            offsets = built.graph.write(where / DATA)
            _say_types(built.weights, loaded, say)
            (where / MODEL).write_bytes(built.graph.proto(offsets, FAST))
            with tempfile.TemporaryDirectory(dir=where) as apart:
                first = where if full is built else Path(apart)  # a graph of its own has weights of its own
                own = offsets if full is built else full.graph.write(first / DATA)
                (first / EXACT).write_bytes(full.graph.proto(own, 0))
                exact, shipped, level = _checked(where / MODEL, built, first / EXACT, full, loaded, text, say)
                (first / EXACT).unlink()
            (where / MODEL).write_bytes(built.graph.proto(offsets, level))
            if options.coded:
                coded.store(where / DATA, where / CODED, built.graph.tables(offsets))
                if coded.restore(where / CODED) != (where / DATA).read_bytes():
                    raise AssertionError(f"{CODED} is not what {DATA} was")
                (where / DATA).unlink()
                (where / SQUEEZED).write_bytes(gzip.compress((where / TOKENIZER).read_bytes(), mtime=0))
                (where / TOKENIZER).unlink()
            manifest = built.manifest(loaded, name) | {
                "accuracy_level": level, "exact": exact, "shipped": shipped | {"text": options.text or TEXT},
                "weights": built.weights.effective, "files": _hashes(where)}  # fmt: skip
            (where / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise ShrewError(f"{out} could not be written ({error}); make room and run again.") from None
    total = sum(item["bytes"] for item in manifest["files"].values())
    say(f"{total:,} bytes in {len(manifest['files'])} files")
    if kept is not None:
        record.append(kept, _records(known[-1].run if known else f"pack {Path(name).name}", out.name, manifest, total))
    return manifest


def _records(run: str, label: str, manifest: dict[str, Any], total: int) -> list[Record]:
    """What the report says of a pack: its bytes, and what both checks found."""
    exact, shipped = manifest["exact"], manifest["shipped"]
    unit = "bits/token" if "greedy_compared" in exact else "bits/text"
    rows: list[tuple[str, float, str, dict[str, Any]]] = [
        ("packed_bytes", total, "bytes", {}), ("accuracy_level", manifest["accuracy_level"], "", {}),
        ("exact_logit_difference", exact["logit_difference"], "", exact),
        ("kl_from_exact", shipped["kl_bits"], unit, shipped),
        ("top1_from_exact", shipped["top1"], "", shipped)]  # fmt: skip
    if "first_differing_token" in shipped:
        compared, first = shipped.get("greedy_compared", exact["greedy_compared"]), shipped["first_differing_token"]
        rows.append(("equal_greedy_tokens", compared if first is None else first, f"of {compared}", shipped))
    return [Record(run=run, model=label, metric=metric, value=value, unit=of, detail=detail)
            for metric, value, of, detail in rows]  # fmt: skip


def _text(loaded: Loaded, source: str | None, fitted: int = 0) -> tuple[Any, Any]:
    """Enough tokens for the checks of a causal model, and `fitted` others; for a classifier texts of tokens."""
    found: list[Any] = []
    config = loaded.model.config
    context = getattr(config, "window", None) or getattr(config, "max_position_embeddings", None) or PIECE
    for document in data.documents([source or TEXT]):
        if loaded.is_classifier:
            pieces = [document.text[first : first + PIECE] for first in range(0, len(document.text), PIECE)]
            found += [row for row in loaded.tokenizer(pieces, truncation=True, max_length=context)["input_ids"] if row]
        else:
            found += data.encode(loaded.tokenizer, [document.text])[0]
        if len(found) >= (check.TEXTS if loaded.is_classifier else check.COMPARED + fitted):
            break
    if len(found) < (1 if loaded.is_classifier else 2):
        raise DataError(f"{source or TEXT}: fewer than two tokens of text; give more.")
    if loaded.is_classifier:
        return found[: check.TEXTS], []
    half = min(check.COMPARED, len(found) // 2) if fitted else check.COMPARED
    return found[:half], found[half : half + fitted]


def _say_types(weights: Weights, loaded: Loaded, say: Say) -> None:
    sizes: Counter[str] = Counter()
    for name, kind in weights.effective.items():
        sizes[kind] += weights.dense[name].numel()
    total = sum(sizes.values())
    say("weights: " + ", ".join(f"{kind} {size / total:.1%}" for kind, size in sizes.most_common()))
    dense = [kind.partition(VALUES_OF)[2].rstrip(")") for kind in weights.effective.values() if VALUES_OF in kind]
    if dense:
        say(f"{len(dense)} quantized weights are written dense, with the same values, as MatMulNBits cannot hold their "
            f"grid and rows ({', '.join(sorted(set(dense)))})")  # fmt: skip
    if not loaded.packed:
        say("nothing is quantized here: the model is packed as it is; `shrew apply` quantizes")


def _checked(
    model: Path, built: Built, path: Path, full: Built, loaded: Loaded, text: Any, say: Say
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What both checks found, of the exact graph at `path` and of the one that is shipped, and its accuracy level."""
    say("checking the graph against torch ...")
    graph, context = built.graph, built.context
    fast: Any
    if built.whole:
        slow: Any = check.Labeller(check.opened(path, whole=True))
        exact = (check.exact_detections if built.families else check.exact_labels)(slow, loaded.model, text)
    else:
        slow = check.Runner(check.opened(path), full.graph.states, min(context, check.WINDOW), CHUNK, graph.align)
        exact = check.exact(slow, loaded.model, text, context)
    same = "" if built.whole else f", {exact['greedy_equal']} of {exact['greedy_compared']} greedy tokens are equal"
    say(f"  logits differ by at most {exact['logit_difference']:.1e}{same}")
    nothing = {"kl_bits": 0.0, "top1": 1.0} | ({} if built.whole else {"first_differing_token": None})
    if graph.kv:
        fast = check.Runner(check.opened(model), graph.states, slow.capacity, CHUNK, graph.align)
        shipped = check.shipped(fast, slow, text, context)
        level = FAST if graph.has_codes else 0
        say(f"shipping accuracy level {level} with keys and values in few bits: KL {shipped['kl_bits']:.2g} bits a "
            f"token from the exact graph, first choice equal in {shipped['top1']:.2%}")  # fmt: skip
        return exact, shipped | {"kv_bits": next(iter(graph.kv.values())).bits}, level
    if not graph.has_codes:
        return exact, nothing, 0
    if built.whole:
        fast = check.Labeller(check.opened(model, whole=True))
        at_zero, at_four = check.label_seconds([slow, fast], text)
    else:
        fast = check.Runner(check.opened(model), graph.states, min(context, check.WINDOW), CHUNK, graph.align)
        at_zero, at_four = check.seconds([slow, fast], text)
    ratio, unit = at_zero / at_four, "text" if built.whole else "token"
    measured = {f"seconds_per_{unit}": {"0": at_zero, str(FAST): at_four}, "processor": machine.processor()}
    if ratio <= AS_FAST:
        say(f"shipping accuracy level 0, the exact one: level {FAST} is only {ratio:.2f} times as fast here")
        return exact, nothing | measured, 0
    shipped = check.shipped_labels(fast, slow, text) if built.whole else check.shipped(fast, slow, text, context)
    say(f"shipping accuracy level {FAST}, {ratio:.2f} times as fast as level 0 here: KL {shipped['kl_bits']:.2g} "
        f"bits a {unit}, first choice equal in {shipped['top1']:.2%}")  # fmt: skip
    return exact, shipped | measured, FAST


def _write_texts(where: Path, loaded: Loaded, name: str) -> None:
    """Tokenizer, settings of generation, and lineage."""
    several = isinstance(getattr(loaded.tokenizer, "chat_template", None), dict)  # else they lie in a folder of theirs
    with quiet():
        loaded.tokenizer.save_pretrained(where, save_jinja_files=not several)
        if loaded.model.can_generate():
            loaded.model.generation_config.to_json_file(where / "generation_config.json")
    if not (where / TOKENIZER).exists():
        raise UnsupportedError(f"{name}: its tokenizer has no tokenizer.json, which the runtime needs; convert it to a "
                               "fast tokenizer first.")  # fmt: skip
    held = json.loads((where / TOKENIZER).read_text("utf-8"))  # without its indentation it is less than half
    (where / TOKENIZER).write_text(json.dumps(held, ensure_ascii=False, separators=(",", ":")), "utf-8")
    parent = {"name": Path(name).name, "sha256": folder.identity(loaded.path) if loaded.path else None}
    versions = folder.versions() | {"onnxruntime": onnxruntime.__version__}
    lineage = loaded.lineage | {"format": 1, "packed": {"from": parent, "versions": versions}}
    (where / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", "utf-8")


def _hashes(where: Path) -> dict[str, Any]:
    return {item.name: {"bytes": item.stat().st_size, "sha256": files.sha256(item)} for item in sorted(where.iterdir())}
