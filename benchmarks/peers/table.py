"""What benchmarks/compression.py compares, fixed before anything was measured: each peer's settings, and ours."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ADAPTERS = {"llama.cpp": "llamacpp", "AutoRound": "autoround", "llm-compressor": "llmcompressor", "HQQ": "hqq",
            "torchao": "torchao", "ModelOpt": "modelopt", "Shrew": "shrew"}  # fmt: skip
OURS = "Shrew"
SECONDS = {"llama.cpp": 35, "AutoRound": 110, "llm-compressor": 50, "HQQ": 50, "torchao": 40, "ModelOpt": 110,
           "Shrew": 70}  # an arm takes about so long on one core, the judging included; told until one was measured
HEALING = 200  # seconds more of an arm that heals
HEAL = {"name": "distil", "steps": 128, "rows": 4, "lr": 5e-4, "teacher": 1.0}  # the same for everybody
MIXES = Path(__file__).with_name("mixes.json")  # what benchmarks/mixes.py chose for the starter


@dataclass(frozen=True)
class Arm:
    """One way to make one artefact.

    `bits` is what it is called, for --bits. `alone`: only linear layers are rounded, embeddings and head stay bf16, so
    that it also stands in the table of linear layers. `healed`: it trains, and is compared apart; a peer's is first
    made by the peer, then healed by us as `heal` says, on the grid that `grid` names (a GGUF file names its own).
    `stock`: it is ours and a GGUF file that llama.cpp runs as it is. `extra`: made with --full alone.
    """

    peer: str
    label: str
    bits: int
    settings: dict[str, Any]
    alone: bool = True
    healed: bool = False
    stock: bool = False
    extra: bool = False
    heal: dict[str, Any] | None = None
    grid: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.peer} {self.label}"

    @property
    def seconds(self) -> float:
        """About what it takes; AutoRound's default takes four times its light recipe."""
        times = 4 if self.peer == "AutoRound" and "iters" not in self.settings else 1
        return times * SECONDS.get(self.peer, 60) + HEALING * self.healed


def llamacpp() -> list[Arm]:
    types = {"Q2_K": 2, "IQ2_XS": 2, "IQ2_M": 2, "Q2_K_S": 2, "IQ3_XXS": 3, "IQ3_S": 3, "Q3_K_S": 3, "Q3_K_M": 3,
             "IQ4_XS": 4, "IQ4_NL": 4, "Q4_0": 4, "Q4_K_S": 4, "Q4_K_M": 4, "Q5_K_S": 5, "Q5_K_M": 5, "Q6_K": 6,
             "Q8_0": 8}  # fmt: skip
    among = {"Q2_K", "IQ2_XS", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"}
    found = [Arm("llama.cpp", kind, bits, {"type": kind}, alone=False) for kind, bits in types.items()]
    return found + [Arm("llama.cpp", f"{kind}, embeddings bf16", bits, {"type": kind, "embeddings": "BF16"},
                        extra=kind not in among) for kind, bits in types.items()]  # fmt: skip


LIGHT = {"iters": 50, "lr": 5e-3}  # auto-round-light; its default has 200 iterations


def autoround() -> list[Arm]:
    """Its light recipe, and at four shapes its default, which with --full the others have too; at 2 bits it advises
    smaller groups."""
    shapes = [(2, 32), (2, 64), (3, 32), (3, 128), (4, 32), (4, 128), (5, 128), (6, 128), (8, 128)]
    found = [Arm("AutoRound", f"W{bits} g{group} light", bits, {"scheme": f"W{bits}A16", "group": group, **LIGHT},
                 extra=bits in (5, 8)) for bits, group in shapes]  # fmt: skip
    among = ((2, 32), (3, 32), (4, 32), (4, 128))
    return found + [Arm("AutoRound", f"W{bits} g{group}", bits, {"scheme": f"W{bits}A16", "group": group},
                        extra=(bits, group) not in among) for bits, group in shapes]  # fmt: skip


def llmcompressor() -> list[Arm]:
    found = [Arm("llm-compressor", f"GPTQ W{bits}A16", bits, {"algorithm": "gptq", "scheme": f"W{bits}A16"},
                 extra=bits in (2, 5)) for bits in (2, 3, 4, 5, 6, 8)]  # fmt: skip
    found += [Arm("llm-compressor", f"GPTQ W{bits} g32", bits, {"algorithm": "gptq", "bits": bits, "group": 32})
              for bits in (2, 3, 4)]  # fmt: skip
    found += [Arm("llm-compressor", "AWQ W4A16_ASYM", 4, {"algorithm": "awq", "scheme": "W4A16_ASYM"}),
              Arm("llm-compressor", "AWQ W3 g32", 3, {"algorithm": "awq", "bits": 3, "group": 32, "symmetric": False})]
    return found + [Arm("llm-compressor", f"SparseGPT 50 % {mask}", 8,
                        {"algorithm": "sparsegpt", "sparsity": 0.5, "mask_structure": mask})
                    for mask in ("0:0", "2:4")]  # fmt: skip


def hqq() -> list[Arm]:
    shapes = [(2, 16), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (8, 64)]
    return [Arm("HQQ", f"{bits}-bit g{group}", bits, {"bits": bits, "group": group}, extra=(bits, group) in
                ((2, 64), (3, 64))) for bits, group in shapes]  # fmt: skip


def torchao() -> list[Arm]:
    found = [Arm("torchao", f"int{bits} g{group} {algorithm}", bits,
                 {"config": "IntxWeightOnlyConfig", "bits": bits, "group": group, "algorithm": algorithm},
                 extra=algorithm == "AFFINE" and bits != 4)
             for bits, group in ((2, 32), (3, 32), (4, 32), (5, 32), (6, 64))
             for algorithm in ("AFFINE", "HQQ_SCALE_ONLY")]  # fmt: skip
    return [*found, Arm("torchao", "int4 g128", 4, {"config": "Int4WeightOnlyConfig", "bits": 4, "group": 128}),
            Arm("torchao", "int8 rows", 8, {"config": "Int8WeightOnlyConfig", "bits": 8})]  # fmt: skip


def modelopt() -> list[Arm]:
    found = [Arm("ModelOpt", "INT4 AWQ", 4, {"config": "INT4_AWQ_CFG"}),
             Arm("ModelOpt", "INT4 blocks", 4, {"config": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"}, extra=True),
             Arm("ModelOpt", "INT8 weights", 8, {"config": "INT8_WEIGHT_ONLY_CFG"})]  # fmt: skip
    formats = ["INT4_AWQ_CFG", "INT8_WEIGHT_ONLY_CFG"]  # its effective bits count the head, which stays as it is
    return found + [Arm("ModelOpt", f"auto_quantize {bits}", round(bits), {"effective_bits": bits, "formats": formats},
                        extra=bits > 7) for bits in (6.5, 7.5)]  # fmt: skip


def quantize(bits: int, group: int, head: int = 0, **more: Any) -> list[dict[str, Any]]:
    """The move as a table; `head` are the bits of tied embeddings, none leaves them in bf16."""
    tensors = {"model.embed_tokens.weight": head} if head else {}
    return [{"name": "quantize", "bits": bits, "group": group, "embeddings": bool(head), "tensors": tensors, **more}]


def shrew() -> list[Arm]:
    """Add rows here. Embeddings that are the head too have few bits more than the layers, as llama.cpp gives them."""
    found = []
    for bits, head in ((2, 4), (3, 4), (4, 5), (5, 6), (6, 6), (8, 8)):
        for group in (32, 64, 128):
            extra = group != 64 or bits in (2, 3, 5)
            found.append(Arm(OURS, f"int{bits} g{group}", bits, {"moves": quantize(bits, group)}, extra=extra))
            found.append(Arm(OURS, f"int{bits} g{group}, embeddings int{head}", bits,
                             {"moves": quantize(bits, group, head)}, alone=False, extra=extra))  # fmt: skip
    for rate in (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5):
        move = {"name": "quantize", "rate": rate}
        found.append(Arm(OURS, f"rate {rate:g}", round(rate), {"moves": [move]}, extra=rate in (4.5, 5.5, 6.5)))
        found.append(Arm(OURS, f"rate {rate:g}, embeddings too", round(rate),
                         {"moves": [{**move, "embeddings": True}]}, alone=False))  # fmt: skip
    for bits in (2, 3):
        found.append(Arm(OURS, f"int{bits} g32 asymmetric, embeddings int4", bits,
                         {"moves": quantize(bits, 32, 4, symmetric=False)}, alone=False, extra=True))  # fmt: skip
    return found + stock()


# GGUF files of ours against llama.cpp's own types of the same bytes: for each, the type of all layers, that of the tied
# embeddings, and those of layers that get another. Sizes on either side of Q3_K_M's and Q4_K_M's.
STOCK: dict[str, tuple[int, str, str, dict[str, str]]] = {
    "q3_k + q4_k": (3, "q3_k", "q4_k", {}),
    "iq4_xs, gate q3_k, down and v q4_k + q4_k": (3, "iq4_xs", "q4_k", {"gate_proj": "q3_k", "down_proj": "q4_k",
                                                                        "v_proj": "q4_k"}),
    "iq4_xs + q4_k": (3, "iq4_xs", "q4_k", {}),
    "iq4_xs, gate q3_k + q5_k": (3, "iq4_xs", "q5_k", {"gate_proj": "q3_k"}),
    "q4_k + q5_k": (4, "q4_k", "q5_k", {}),
    "q4_k + q6_k": (4, "q4_k", "q6_k", {}),
    "q4_k, down, v and o q5_k + q5_k": (4, "q4_k", "q5_k", {"down_proj": "q5_k", "v_proj": "q5_k", "o_proj": "q5_k"}),
    "q4_k, k, v and o q5_k + q6_k": (4, "q4_k", "q6_k", {"k_proj": "q5_k", "v_proj": "q5_k", "o_proj": "q5_k"}),
    "q4_0": (4, "q4_0", "q4_0", {}),
}  # fmt: skip


def stock() -> list[Arm]:
    found = []
    for label, (bits, grid, head, own) in STOCK.items():
        types = {f"*.{part}.weight": kind for part, kind in own.items()} | {"model.embed_tokens.weight": head}
        moves = [{"name": "quantize", "grid": grid, "embeddings": True}]
        settings = {"moves": moves, "types": types, "gguf": True}
        found.append(Arm(OURS, f"GGUF {label}", bits, settings, alone=False, stock=True, extra=label == "q4_0"))
    mixes = json.loads(MIXES.read_text("utf-8")) if MIXES.exists() else {}
    return found + [Arm(OURS, f"GGUF mixed, bytes of {name}", int(name[1]), {"moves": [mix["move"]], "gguf": True},
                        alone=False, stock=True) for name, mix in mixes.items()]  # fmt: skip


def healed(arms: list[Arm]) -> list[Arm]:
    """The same artefacts of peers and of ours, and then the same healing. Codebooks of llama.cpp's IQ2 and IQ3 are no
    grid that we can train on, and HQQ's zero points are no whole codes; both stand there with that."""
    grids = {name: {"bits": bits, "group": 32, "symmetric": even} for name, bits, even in (
        ("AutoRound W2 g32 light", 2, True), ("AutoRound W3 g32 light", 3, True), ("AutoRound W4 g32 light", 4, True),
        ("HQQ 3-bit g32", 3, False))}  # fmt: skip
    files = [f"llama.cpp {kind}" for kind in ("IQ2_XS", "IQ3_XXS", "Q2_K", "Q3_K_M", "Q4_K_M")]
    ours = [f"{OURS} rate {rate}" for rate in ("2.5", "3", "4")]
    ours += [f"{OURS} rate {rate}, embeddings too" for rate in ("3", "3.5", "4", "5")]
    mixed = [f"{OURS} GGUF iq4_xs + q4_k", f"{OURS} GGUF q4_k, down, v and o q5_k + q5_k"]
    wanted = [*files, *grids, *ours, *mixed]
    return [replace(arm, label=f"{arm.label}, healed", healed=True, heal=HEAL, grid=grids.get(arm.name), extra=False)
            for arm in arms if arm.name in wanted]  # fmt: skip


MADE = [*llamacpp(), *autoround(), *llmcompressor(), *hqq(), *torchao(), *modelopt(), *shrew()]
ARMS = [*MADE, *healed(MADE)]
# One arm of each method, for --costs.
COSTS = ("llama.cpp Q4_K_M", "AutoRound W4 g128 light", "llm-compressor GPTQ W4A16", "llm-compressor AWQ W4A16_ASYM",
         "HQQ 4-bit g64", "torchao int4 g32 HQQ_SCALE_ONLY", "ModelOpt INT4 AWQ", "Shrew int4 g64", "Shrew rate 4",
         "Shrew GGUF q4_k + q6_k")  # fmt: skip
