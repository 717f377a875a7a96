"""GGUF files: the type of every tensor, what general.file_type and the file's name claim, and llama.cpp's fallbacks.

llama-quantize never refuses: a type whose blocks of 256 do not divide a row is replaced without a word in the file
(`FALLBACK`, its tensor_type_fallback), and the label stays what was asked for.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, dequantize

from shrew.audit.held import Audit, Finding, Held, Span, mean_bits, named, printable
from shrew.packers.gguf import blocks
from shrew.packers.gguf.header import Header, TensorEntry, read_header

Kind = GGMLQuantizationType

FALLBACK = {
    **dict.fromkeys((Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S,
                     Kind.IQ4_XS), Kind.IQ4_NL),
    **dict.fromkeys((Kind.Q2_K, Kind.Q3_K, Kind.TQ1_0, Kind.TQ2_0), Kind.Q4_0),
    Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0,
}  # fmt: skip
FLOATS = {Kind.F32: "fp32", Kind.F16: "fp16", Kind.BF16: "bf16", Kind.F64: "fp64"}
# Types that a label stands for where its own name is none.
BASES = {"IQ2_M": Kind.IQ2_S, "IQ3_XS": Kind.IQ3_S, "IQ3_M": Kind.IQ3_S, "MXFP4_MOE": Kind.MXFP4}
# What llama.cpp keeps in float on purpose.
KEPT = re.compile(r"(norm|bias|ffn_gate_inp|ssm_|time_mix|conv1d|shortconv|pos_embd|token_types|rope_freqs|_rel_b)")
NAME = re.compile(r"(?:^|[^A-Z0-9])(I?Q\d_(?:K_[SML]|K|XXS|XS|NL|[SM]|[01])|TQ[12]_0|BF16|F16|F32|MXFP4(?:_MOE)?|NVFP4)"
                  r"(?:[^A-Z0-9_]|$)")  # fmt: skip
CHUNK = 1 << 20  # weights decoded at once


def audit(path: Path) -> Audit:
    """Raises FolderError for a file that is wrong."""
    header = read_header(path)
    held = [_held(header, entry) for entry in header.tensors.values()]
    found = Audit(path, "GGUF", held, path.stat().st_size)
    stated, by_name = file_type(header), name_type(path.name)
    if stated:
        found.claims.append(f"general.file_type: {stated}")
    if by_name:
        found.claims.append(f"file name: {by_name}")
    if isinstance(header.values.get("quantize.imatrix.file"), str):
        found.claims.append("made with an importance matrix")
    found.findings += _findings(found, header, stated, by_name)
    return found


def file_type(header: Header) -> str:
    """The label that general.file_type gives, such as Q4_K_M; '' without one."""
    number = header.values.get("general.file_type")
    if isinstance(number, bool) or not isinstance(number, int):
        return ""
    number &= ~1024  # set where llama.cpp guessed
    known = {int(item): item.name.removeprefix("MOSTLY_").removeprefix("ALL_") for item in LlamaFileType}
    return known.get(number, f"number {number}, which gguf does not know")


def name_type(name: str) -> str:
    """The label in a file's name; '' without one."""
    found = NAME.findall(name.upper().removesuffix(".GGUF"))
    return found[-1] if found else ""


def base_type(label: str) -> Kind | None:
    """The type that most weights of a file of this label should have."""
    if label in BASES:
        return BASES[label]
    kinds = {kind.name: kind for kind in Kind}
    return kinds.get(label) or kinds.get(label.removesuffix("_S").removesuffix("_M").removesuffix("_L"))


def _held(header: Header, entry: TensorEntry) -> Held:
    block, size = GGML_QUANT_SIZES[entry.type]
    width = re.match(r"(?:I?Q|TQ|MXFP|NVFP|I|F|BF)(\d+)", entry.type.name)
    return Held(
        entry.name, entry.shape, FLOATS.get(entry.type, entry.type.name),
        float(width[1]) if width else 8 * size / block,
        (Span(header.path, entry.start, entry.bytes),), block > 1, block if block > 1 else None,
        groups=partial(_groups, header, entry),
    )  # fmt: skip


def _groups(header: Header, entry: TensorEntry) -> Iterator[np.ndarray]:
    """Codes of the simple types, numbers of the others, [n, weights of a block]; nothing where gguf cannot compute."""
    block, size = GGML_QUANT_SIZES[entry.type]
    data = header.data(entry.name).reshape(-1, size if block > 1 else size * entry.shape[-1])
    step = max(1, CHUNK // (block if block > 1 else entry.shape[-1]))
    for at in range(0, len(data), step):
        part = np.ascontiguousarray(data[at : at + step])
        if entry.type in blocks.LEVELS:
            yield blocks.decode(entry.type, part)[0].numpy()
            continue
        try:
            yield dequantize(part, entry.type)
        except (NotImplementedError, ValueError):
            return


def _findings(found: Audit, header: Header, stated: str, by_name: str) -> Iterator[Finding]:
    label = by_name or stated
    if stated and by_name and stated != by_name:
        yield Finding("claim", f"The file's name says {by_name} and its general.file_type says {stated}.",
                      "believe the table of tensors, and rename the file")  # fmt: skip
    if not label:
        yield Finding("note", "Neither the name nor general.file_type says what this file is.",
                      "name it after the type that most of its weights have")  # fmt: skip
        return
    base = base_type(label)
    if base is None:
        return
    weights = [item for item in found.role("linear", "embedding", "head") if not KEPT.search(item.name)]
    if base in FLOATS:
        if others := [item for item in weights if item.quantized]:
            yield Finding("claim", f"The label says {label}, and {len(others)} of {len(weights)} matrices are "
                          f"quantized ({_types(others)}).", "rename the file", _names(others))  # fmt: skip
        return
    fallen = [item for item in weights if _intended(header.tensors[item.name], base)]
    if fallen:
        yield _fallback(found, header, label, base, weights, fallen)
    dense = [item for item in weights if not item.quantized and item not in fallen]
    if dense:
        size = sum(item.weights for item in dense)
        yield Finding("fallback", f"The label says {label}, and {len(dense)} of {len(weights)} matrices, with {size:,} "
                      f"weights, are not quantized ({_types(dense)}): {named(_names(dense))}.", "quantize them too "
                      "(llama-quantize --tensor-type, --output-tensor-type, --token-embedding-type)",
                      _names(dense))  # fmt: skip
    linear = [item for item in weights if item.role == "linear"]
    of_base = sum(item.weights for item in linear if header.tensors[item.name].type == base or item in fallen)
    total = sum(item.weights for item in linear)
    if linear and not of_base:
        yield Finding("claim", f"The label says {label}, and no linear layer is {base.name}: they are "
                      f"{_types(linear)}, {mean_bits(linear):.2f} bits a weight.",
                      "believe the table of tensors, and rename the file",
                      _names(linear))  # fmt: skip
    elif linear and of_base < total / 3:
        yield Finding("note", f"Only {of_base / total:.0%} of the linear weights are {base.name}, the type that "
                      f"{label} is named after.", "compare files by bytes, not by label")  # fmt: skip


def _intended(entry: TensorEntry, base: Kind) -> Kind | None:
    """The type that this tensor was asked to have, where llama-quantize could not give it."""
    columns = entry.shape[-1]
    if columns % GGML_QUANT_SIZES[base][0] == 0 or (entry.type == base):
        return None
    if columns % 32 and entry.type == Kind.F16:
        return base
    asked = [kind for kind, given in FALLBACK.items() if given == entry.type]
    if not asked or GGML_QUANT_SIZES[base][0] < 256:
        return None
    return base if base in asked else asked[0]


def _fallback(found: Audit, header: Header, label: str, base: Kind, weights: list[Held], fallen: list[Held]) -> Finding:
    columns = sorted({item.shape[-1] for item in fallen})
    total = sum(item.weights for item in weights)
    lost = 0.0
    for item in fallen:
        block, size = GGML_QUANT_SIZES[_intended(header.tensors[item.name], base) or base]
        lost += item.bytes - item.weights * size / block
    now = mean_bits(weights)
    if not columns or any(column % 32 for column in columns):
        advice = "make the rows multiples of 256 (or at least of 32) before quantizing"
    elif all(column > 256 for column in columns):
        smaller = ", ".join(f"{column} to {column // 256 * 256}" for column in columns[:3])
        advice = f"narrow {smaller} first, or ask for a type with blocks of 32 by its name"
    else:
        advice = "ask for a type with blocks of 32 (Q4_0, Q5_0, IQ4_NL) by its name"
    rows = " and ".join(map(str, columns[:3])) + (" ..." if len(columns) > 3 else "")
    return Finding("fallback", f"The label says {label}, but {len(fallen)} of {len(weights)} matrices are "
                   f"{_types(fallen)} because rows of {rows} are no multiple of {GGML_QUANT_SIZES[base][0]}: "
                   f"{now:.2f} bits a weight, not {now - 8 * lost / total:.2f}.", advice, _names(fallen))  # fmt: skip


def _types(items: list[Held]) -> str:
    kinds = Counter(item.effective for item in items)
    return ", ".join(kind for kind, _ in kinds.most_common())


def _names(items: list[Held]) -> tuple[str, ...]:
    return tuple(printable(item.name) for item in items)
