"""Model folders and single safetensors files: weights put together from their parts, and what config.json claims."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shrew import folder
from shrew.audit import claims, decode
from shrew.audit.held import Audit, Finding, Held, Span, count, mean_bits, named, printable
from shrew.audit.layouts import Parts, Weight, assemble, plain
from shrew.errors import FolderError
from shrew.folder import packed, sparse
from shrew.folder.headers import BITS, INDEX, SINGLE, Entry, read_header, read_headers, read_json

POSITIONS = re.compile(r"pos|wpe|type|segment")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def entries_of(path: Path) -> dict[str, Entry]:
    """Every tensor of a file, or of all safetensors files of a folder; raises FolderError."""
    if path.is_file():
        return read_header(path)
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return read_headers(path)
    found: dict[str, Entry] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            if name in found:
                raise FolderError(f"{path}: tensor {printable(name)!r} is in two files, with no index to choose.")
            found[name] = entry
    return found or read_headers(path)  # which says what is missing


def config_of(path: Path) -> dict[str, Any]:
    """config.json of a folder, or of the folder of a file; {} where there is none."""
    where = path if path.is_dir() else path.parent
    return read_json(where / "config.json") if (where / "config.json").exists() else {}


def stated_of(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """The quantization that is claimed: in config.json, quantize_config.json or hf_quant_config.json."""
    where = path if path.is_dir() else path.parent
    stated = config.get("quantization_config")
    stated = stated if isinstance(stated, dict) else {}
    text = config.get("text_config")
    if not stated and isinstance(text, dict) and isinstance(text.get("quantization_config"), dict):
        stated = text["quantization_config"]
    if (where / "hf_quant_config.json").exists():
        more = read_json(where / "hf_quant_config.json").get("quantization")
        stated = {"quant_method": "modelopt"} | (more if isinstance(more, dict) else {}) | stated
    findings: list[Finding] = []
    for name in ("quantize_config.json", "quant_config.json", "quantization_config.json"):
        if not (where / name).exists():
            continue
        other = read_json(where / name)
        for key in ("bits", "group_size", "sym", "desc_act"):
            if stated and key in stated and key in other and stated[key] != other[key]:
                findings.append(Finding(
                    "claim", f"config.json says {key} = {printable(str(stated[key]))} and {name} says "
                    f"{printable(str(other[key]))}.", "readers differ in which they believe: keep one"))  # fmt: skip
        stated = other | stated
    return stated, findings


def audit(path: Path) -> Audit:
    """Raises FolderError for what is wrong with the files."""
    config = config_of(path)
    stated, findings = stated_of(path, config)
    entries = entries_of(path)
    method = stated.get("quant_method") or ("gptq" if "bits" in stated else "")
    method = method if isinstance(method, str) else str(method)
    own = config.get("quantization_config")
    if isinstance(own, dict) and own.get("quant_method") == packed.METHOD:
        return _ours(path, config, entries)
    found, rest = assemble(entries)
    held = [_held(name, parts, weight) for name, (parts, weight) in found.items()]
    held += [_plain(name, entry) for name, entry in rest.items()]
    held.sort(key=lambda item: item.name)
    audit = Audit(path, _format(method, found), held, size_of(entries), findings=findings)
    if method in claims.METHODS:
        claim = claims.METHODS[method](stated)
        audit.claims.append(f"quantization_config: {claim.words}")
        audit.findings += claims.compare(claim, held)
        audit.findings += _unused_scales(found)
    elif method:
        audit.claims.append(f"quantization_config: {printable(str(method))}")
        why = "is said where no reader of it looks" if method == packed.METHOD else "is no method that the audit knows"
        audit.findings.append(Finding("note", f"'{printable(str(method))}' {why}: tensors are listed as they are "
                                      "stored.", "look at bits, not at types"))  # fmt: skip
    elif found:
        audit.findings.append(Finding("claim", f"{len(found)} weights are quantized and no config.json says so, so no "
                                      "reader will unpack them.", "copy the quantization_config of the tool that made "
                                      "them into config.json"))  # fmt: skip
    _general(audit, config)
    return audit


def _ours(path: Path, config: dict[str, Any], entries: dict[str, Entry]) -> Audit:
    """A folder that `shrew` packed: its own reader has compared config.json with every part."""
    listed = folder.tensors(path if path.is_dir() else path.parent)
    stated = config["quantization_config"]
    table, pruned = stated["tensors"], stated.get("sparse", {})
    held = []
    for item in listed:
        ends = packed.PARTS if item.name in table else sparse.PARTS if item.name in pruned else ("",)
        parts = {part: entries[item.name + part] for part in ends if item.name + part in entries}
        spans = tuple(Span(part.file, part.start, part.bytes) for part in parts.values())
        if item.name in table and parts:
            entry = table[item.name]
            grid = packed.grid_of(entry)
            code = float(grid.widths["codes"])
            if entry.get("coded"):
                code = 8 * parts[":codes"].bytes / count(item.shape)
            held.append(Held(item.name, item.shape, item.effective, code, spans, True, grid.group,
                             groups=partial(_own_codes, parts, entry)))  # fmt: skip
        elif item.name in pruned and parts:
            values = parts[sparse.PARTS[1]]
            held.append(Held(item.name, item.shape, item.effective, float(BITS[values.dtype]), spans, False,
                             groups=partial(_kept, values)))  # fmt: skip
        elif parts:  # else it lies in another file than the one that was asked for
            held.append(_plain(item.name, parts[""]))
    found = Audit(path, "shrew", held, size_of(entries), ["quantization_config: each tensor by its name"])
    _general(found, config)
    return found


def _own_codes(parts: dict[str, Entry], entry: dict[str, Any]) -> Iterator[np.ndarray]:
    """The codes of a weight of ours as [n, group]."""
    codes = packed.from_parts({name: decode.tensor(part) for name, part in parts.items()}, entry).codes
    size = min(packed.grid_of(entry).group or codes.shape[1], codes.shape[1])
    yield codes[:, : codes.shape[1] // size * size].reshape(-1, size).numpy()


def _kept(values: Entry) -> Iterator[np.ndarray]:
    """The weights that pruning kept, one a row: which of them stand together, only the bitmap knows."""
    for part in decode.numbers(values):
        yield part.reshape(-1, 1)


def _held(name: str, parts: Parts, weight: Weight) -> Held:
    groups = partial(decode.groups, parts, weight) if weight.quantized else None
    return Held(printable(name), weight.shape, weight.effective, weight.code, parts.spans(), weight.quantized,
                weight.group, groups=groups)  # fmt: skip


def _plain(name: str, entry: Entry) -> Held:
    readable = entry.dtype in decode.DTYPES and entry.bytes > 0
    return replace(plain(name, entry), groups=partial(decode.numbers, entry) if readable else None)


def size_of(entries: dict[str, Entry]) -> int:
    return sum(file.stat().st_size for file in {entry.file for entry in entries.values()})


def _format(method: Any, found: dict[str, tuple[Parts, Weight]]) -> str:
    names = {"gptq": "GPTQ", "awq": "AWQ", "bnb4": "bitsandbytes", "bnb8": "bitsandbytes",
             "packed": "compressed-tensors", "words": "compressed-tensors",
             "nvfp4": "NVFP4", "mxfp4": "MXFP4", "scaled": "scaled weights", "blocks": "scaled weights",
             "hqq": "HQQ"}  # fmt: skip
    kinds = sorted({names.get(weight.kind, weight.kind) for _, weight in found.values() if weight.quantized})
    given = printable(str(method)) if method else ""
    return f"{given} ({', '.join(kinds)})" if given and kinds else given or ", ".join(kinds) or "safetensors"


def _unused_scales(found: dict[str, tuple[Parts, Weight]]) -> list[Finding]:
    names = tuple(printable(name) for name, (_, weight) in found.items() if weight.kind == "dense")
    if not names:
        return []
    return [Finding("claim", f"{len(names)} weights have scales beside them and are stored dense: rounded values in "
                    "full width, as a quantizer leaves them that was never told to pack.", "save the model compressed",
                    names)]  # fmt: skip


def _general(found: Audit, config: dict[str, Any]) -> None:
    """What any folder can get wrong."""
    said, lies = claims.by_name(found.path, found.held)
    if said:
        found.claims.append(f"name: {said}")
    found.findings += lies
    dense = [item for item in found.role("embedding", "head") if not item.quantized]
    share = sum(item.bytes for item in dense) / max(found.size, 1)
    if share > 0.2 and any(item.quantized for item in found.role("linear")):
        found.findings.append(
            Finding(
                "note",
                f"{named(item.name for item in dense)} of {mean_bits(dense):g} bits a weight take {share:.0%} of the "
                f"file: {found.bits['whole file']:.2f} bits a weight in all.",
                "quantize embeddings and head too, or trim the vocabulary",
                tuple(item.name for item in dense),
            )
        )
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    heads, tables = found.role("head"), found.role("embedding")
    same = [item for item in heads if any(table.shape == item.shape for table in tables)]
    if tied is True and same:
        size = sum(item.bytes for item in same)
        found.findings.append(Finding("waste", f"The embedding is stored twice: config.json ties the head to it, and "
                                      f"{same[0].name} is in the file too ({size:,} bytes).",
                                      "save it with the head left out; readers tie it again",
                                      (same[0].name,)))  # fmt: skip
    dtype = DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."))
    if dtype:
        found.claims.append(f"config.json: {dtype}")
        wide = [item for item in found.held if item.effective in ("fp32", "fp64") and len(item.shape) > 1]
        extra = sum(item.bytes - 2 * item.weights for item in wide)
        if dtype in ("bf16", "fp16") and extra > found.size / 20:
            found.findings.append(Finding("waste", f"config.json says {dtype}, and {len(wide)} matrices are stored as "
                                          f"{wide[0].effective}: {extra:,} bytes more.",
                                          "save it in the dtype that config.json names",
                                          tuple(item.name for item in wide)))  # fmt: skip
    widest = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    for item in (*heads, *(table for table in tables if not POSITIONS.search(table.name))):
        if type(widest) is int and 0 < widest < item.shape[0] and count(item.shape) and item.shape[0] < 2 * widest:
            rows = item.shape[0] - widest
            found.findings.append(Finding("waste", f"{item.name} has {item.shape[0]:,} rows for a vocabulary of "
                                          f"{widest:,}: {rows:,} of them are never used.", "cut the padding",
                                          (item.name,)))  # fmt: skip
