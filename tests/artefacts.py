"""Artefacts of other tools, made by hand in their exact layouts: slow definitions that share no line with the code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row as one long number, cut into int32 words: [rows, n] -> [rows, n * bits / 32]."""
    found = []
    for row in values.tolist():
        number = sum(int(code) << (bits * place) for place, code in enumerate(row))
        found.append(np.frombuffer(number.to_bytes(4 * -(-len(row) * bits // 32), "little"), np.int32))
    return np.stack(found)


def awq_words(values: np.ndarray) -> np.ndarray:
    """[n, outputs] of 4 bits: word k of a row holds outputs 8k + AWQ, from the lowest bits on."""
    found = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for row in range(found.shape[0]):
        for word in range(found.shape[1]):
            for place, output in enumerate(AWQ):
                found[row, word] |= int(values[row, 8 * word + output]) << (4 * place)
    return found.astype(np.uint32).view(np.int32)


def integers(weight: Tensor, bits: int, group: int, symmetric: bool = False) -> tuple[Any, Any, Any, Tensor]:
    """Codes [out, in], zeros and fp16 scales [out, groups], and the float32 weight that they stand for."""
    rows = weight.float().unflatten(1, (-1, group))
    low, high = rows.amin(2).clamp(max=0), rows.amax(2).clamp(min=0)
    top = 2**bits - 1
    scales = ((high - low) / top if not symmetric else 2 * rows.abs().amax(2) / top).half().clamp(min=1e-4)
    zeros = (-low / scales.float()).round() if not symmetric else torch.full_like(low, 2 ** (bits - 1))
    zeros = zeros.clamp(1, top)  # version 1 of GPTQ's format cannot say 0
    codes = (rows / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    dense = (codes - zeros[..., None]) * scales.float()[..., None]
    return codes.flatten(1).int().numpy(), zeros.int().numpy(), scales, dense.flatten(1)


def gptq(weight: Tensor, bits: int = 4, group: int = 32, v2: bool = False, order: bool = False,
         symmetric: bool = False) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    codes, zeros, scales, dense = integers(weight, bits, group, symmetric)
    which = torch.arange(weight.shape[1], dtype=torch.int32) // group
    if order:  # the same codes with their inputs in another order
        shuffled = torch.randperm(len(which), generator=torch.Generator().manual_seed(1))
        which, codes, dense = which[shuffled], codes[:, shuffled.numpy()], dense[:, shuffled]
    stored = zeros if v2 else zeros - 1
    parts = {"qweight": words(codes, bits).T, "qzeros": words(stored.T, bits), "g_idx": which.numpy()}
    found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in parts.items()}
    return found | {"scales": scales.T.contiguous()}, dense


def awq(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, dense = integers(weight, 4, group)
    return {"qweight": torch.from_numpy(awq_words(codes.T)), "qzeros": torch.from_numpy(awq_words(zeros.T)),
            "scales": scales.T.contiguous()}, dense  # fmt: skip


def bnb4(weight: Tensor, double: bool = False, block: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    table = torch.tensor(NF4)
    flat = weight.float().reshape(-1, block)
    largest = flat.abs().amax(1).clamp(min=1e-6)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    found: dict[str, Tensor] = {}
    if double:
        offset, inner = float(largest.mean()), torch.linspace(-1, 1, 256)
        outer = (largest - offset).abs().max().reshape(1)
        codes = ((largest - offset)[:, None] / outer - inner).abs().argmin(1)
        largest = inner[codes] * outer + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        found |= {"weight.absmax": codes.to(torch.uint8), "weight.nested_absmax": outer,
                  "weight.nested_quant_map": inner}  # fmt: skip
    else:
        found["weight.absmax"] = largest
    codes = ((flat / largest[:, None])[..., None] - table).abs().argmin(2)
    pairs = codes.reshape(-1, 2)
    note = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found |= {"weight": (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8), "weight.quant_map": table,
              "weight.quant_state.bitsandbytes__nf4": note}  # fmt: skip
    return found, (table[codes] * largest[:, None]).reshape(weight.shape)


def bnb8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    largest = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / largest[:, None]).round()
    found = {"weight": codes.to(torch.int8), "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return found, codes * largest[:, None] / 127


def fp8(weight: Tensor, tile: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    blocks = weight.float().unflatten(0, (-1, tile)).unflatten(2, (-1, tile))
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": codes.flatten(2).flatten(0, 1), "weight_scale_inv": scales}, dense


def hqq(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales, dense = integers(weight, 4, group)
    rows = torch.from_numpy(codes).reshape(-1, group)
    packed = rows[: len(rows) // 2] << 4 | rows[len(rows) // 2 :]
    found = {
        "W_q": packed.to(torch.uint8),
        "scale": scales.reshape(-1, 1),
        "zero": torch.from_numpy(zeros).reshape(-1, 1).half(),
        "shape": torch.tensor(weight.shape),
        "nbits": torch.tensor(4, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
    }
    return found, dense


def quantized(
    source: Path, out: Path, pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], config: dict[str, Any],
    skip: tuple[str, ...] = (), more: dict[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """A model folder whose linear layers `pack` packed, and beside it `out`-dense with the numbers that they stand for
    in float32, which is the lossless original."""
    state = load_file(source / "model.safetensors")
    stored, dense = dict(more or {}), {}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or any(part in name for part in skip):
            stored[name] = dense[name] = value
            continue
        parts, dense[name] = pack(value)
        stored |= {f"{module}.{end}": part.contiguous() for end, part in parts.items()}
    for folder, content, change in ((out, stored, {"quantization_config": config}), (dense_of(out), dense, {})):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        known = json.loads((source / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(known | change), "utf-8")
    return out


def dense_of(folder: Path) -> Path:
    return folder.with_name(folder.name + "-dense")
