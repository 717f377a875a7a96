"""What benchmarks/compression.py compares, fixed before anything was measured: each peer's settings, and ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTERS = {"llama.cpp": "llamacpp", "AutoRound": "autoround", "llm-compressor": "llmcompressor", "HQQ": "hqq",
            "torchao": "torchao", "ModelOpt": "modelopt", "Shrew": "shrew"}  # fmt: skip
OURS = "Shrew"
MIXES = Path(__file__).with_name("mixes.json")  # what benchmarks/mixes.py chose for the starter


@dataclass(frozen=True)
class Arm:
    """One way to make one artefact.

    `bits` is what it is called, for --bits. `alone`: only linear layers are rounded, embeddings and head stay bf16, so
    that it also stands in the table of linear layers. `healed`: it trains, and is compared apart. `stock`: it is ours
    and a GGUF file that llama.cpp runs as it is.
    """

    peer: str
    label: str
    bits: int
    settings: dict[str, Any]
    alone: bool = True
    healed: bool = False
    stock: bool = False

    @property
    def name(self) -> str:
        return f"{self.peer} {self.label}"


def llamacpp() -> list[Arm]:
    types = {"Q2_K": 2, "IQ2_XS": 2, "IQ2_M": 2, "Q2_K_S": 2, "IQ3_XXS": 3, "IQ3_S": 3, "Q3_K_S": 3, "Q3_K_M": 3,
             "IQ4_XS": 4, "IQ4_NL": 4, "Q4_0": 4, "Q4_K_S": 4, "Q4_K_M": 4, "Q5_K_S": 5, "Q5_K_M": 5, "Q6_K": 6,
             "Q8_0": 8}  # fmt: skip
    found = [Arm("llama.cpp", kind, bits, {"type": kind}, alone=False) for kind, bits in types.items()]
    return found + [Arm("llama.cpp", f"{kind}, embeddings bf16", bits, {"type": kind, "embeddings": "BF16"})
                    for kind, bits in types.items()]  # fmt: skip


def autoround() -> list[Arm]:
    """200 iterations, as it recommends; at 2 bits it advises smaller groups."""
    shapes = [(2, 32), (2, 64), (3, 32), (3, 128), (4, 32), (4, 128), (5, 128), (6, 128), (8, 128)]
    return [Arm("AutoRound", f"W{bits} g{group}", bits, {"scheme": f"W{bits}A16", "group": group})
            for bits, group in shapes]  # fmt: skip


def llmcompressor() -> list[Arm]:
    found = [Arm("llm-compressor", f"GPTQ W{bits}A16", bits, {"algorithm": "gptq", "scheme": f"W{bits}A16"})
             for bits in (2, 3, 4, 5, 6, 8)]  # fmt: skip
    found += [Arm("llm-compressor", f"GPTQ W{bits} g32", bits, {"algorithm": "gptq", "bits": bits, "group": 32})
              for bits in (2, 3, 4)]  # fmt: skip
    found += [Arm("llm-compressor", "AWQ W4A16_ASYM", 4, {"algorithm": "awq", "scheme": "W4A16_ASYM"}),
              Arm("llm-compressor", "AWQ W3 g32", 3, {"algorithm": "awq", "bits": 3, "group": 32, "symmetric": False})]
    return found + [Arm("llm-compressor", f"SparseGPT 50 % {mask}", 8,
                        {"algorithm": "sparsegpt", "sparsity": 0.5, "mask_structure": mask})
                    for mask in ("0:0", "2:4")]  # fmt: skip


def hqq() -> list[Arm]:
    shapes = [(2, 16), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (8, 64)]
    return [Arm("HQQ", f"{bits}-bit g{group}", bits, {"bits": bits, "group": group}) for bits, group in shapes]


def torchao() -> list[Arm]:
    found = [Arm("torchao", f"int{bits} g{group} {algorithm}", bits,
                 {"config": "IntxWeightOnlyConfig", "bits": bits, "group": group, "algorithm": algorithm})
             for bits, group in ((2, 32), (3, 32), (4, 32), (5, 32), (6, 64))
             for algorithm in ("AFFINE", "HQQ_SCALE_ONLY")]  # fmt: skip
    return [*found, Arm("torchao", "int4 g128", 4, {"config": "Int4WeightOnlyConfig", "bits": 4, "group": 128}),
            Arm("torchao", "int8 rows", 8, {"config": "Int8WeightOnlyConfig", "bits": 8})]  # fmt: skip


def modelopt() -> list[Arm]:
    found = [Arm("ModelOpt", "INT4 AWQ", 4, {"config": "INT4_AWQ_CFG"}),
             Arm("ModelOpt", "INT4 blocks", 4, {"config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"}),
             Arm("ModelOpt", "INT8 weights", 8, {"config": "INT8_WEIGHT_ONLY_CFG"})]  # fmt: skip
    formats = ["INT4_AWQ_CFG", "INT8_WEIGHT_ONLY_CFG"]  # its effective bits count the head, which stays as it is
    return found + [Arm("ModelOpt", f"auto_quantize {bits}", round(bits), {"effective_bits": bits, "formats": formats})
                    for bits in (6.5, 7.5)]  # fmt: skip


def quantize(bits: int, group: int, head: int = 0, **more: Any) -> list[dict[str, Any]]:
    """The move as a table; `head` are the bits of tied embeddings, none leaves them in bf16."""
    tensors = {"model.embed_tokens.weight": head} if head else {}
    return [{"name": "quantize", "bits": bits, "group": group, "embeddings": bool(head), "tensors": tensors, **more}]


def shrew() -> list[Arm]:
    """Add rows here. Embeddings that are the head too have few bits more than the layers, as llama.cpp gives them."""
    found = []
    for bits, head in ((2, 4), (3, 4), (4, 5), (5, 6), (6, 6), (8, 8)):
        for group in (32, 64, 128):
            found.append(Arm(OURS, f"int{bits} g{group}", bits, {"moves": quantize(bits, group)}))
            found.append(Arm(OURS, f"int{bits} g{group}, embeddings int{head}", bits,
                             {"moves": quantize(bits, group, head)}, alone=False))  # fmt: skip
    for rate in (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0):
        move = {"name": "quantize", "rate": rate}
        found.append(Arm(OURS, f"rate {rate:g}", round(rate), {"moves": [move]}))
        found.append(Arm(OURS, f"rate {rate:g}, embeddings too", round(rate),
                         {"moves": [{**move, "embeddings": True}]}, alone=False))  # fmt: skip
    for bits in (2, 3):
        found.append(Arm(OURS, f"int{bits} g32 asymmetric, embeddings int4", bits,
                         {"moves": quantize(bits, 32, 4, symmetric=False)}, alone=False))  # fmt: skip
    return found + stock()


def stock() -> list[Arm]:
    """GGUF files of ours against llama.cpp's own types of the same bytes: `kinds` says each file's types by tensor."""
    kinds = {"q3_k + q4_k": (3, "q3_k", "q4_k"), "q4_k + q6_k": (4, "q4_k", "q6_k"), "q4_0": (4, "q4_0", "q4_0")}
    found = []
    for label, (bits, grid, head) in kinds.items():
        move = {"name": "quantize", "grid": grid, "embeddings": True, "tensors": {"model.embed_tokens.weight": head}}
        found.append(Arm(OURS, f"GGUF {label}", bits, {"moves": [move], "gguf": True}, alone=False, stock=True))
    mixes = json.loads(MIXES.read_text("utf-8")) if MIXES.exists() else {}
    return found + [Arm(OURS, f"GGUF mixed, bytes of {name}", int(name[1]),
                        {"moves": [mix["move"]], "gguf": True}, alone=False, stock=True)
                    for name, mix in mixes.items()]  # fmt: skip


ARMS = [*llamacpp(), *autoround(), *llmcompressor(), *hqq(), *torchao(), *modelopt(), *shrew()]
