"""Byte latent transformers: our blocks against `BltForCausalLM` of transformers, same weights, same run.

`python benchmarks/patches.py speed` runs this. Both models hold the same weights and give the same logits, which is
checked first. One thread, CPU time of the process, the two in another order every round. Patches are cut by entropies
of a patcher that nothing has trained, at the threshold that makes them of the wanted mean: what is cut where does not
change what it costs. Training is forward, backward and a step of the fused AdamW. Decoding is greedy, one byte at a
time: ours goes on from its states, theirs reads the whole text again for each byte, since it has no cache for its
layers on patches.
"""

import copy
import itertools
import random
import statistics as middle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fits import median_ratio
from torch import Tensor, nn
from transformers import BltConfig, BltForCausalLM

from shrew import machine
from shrew.blocks.stock import adopt
from shrew.errors import ShrewError
from shrew.record import Record

FIRST, BEGIN, VOCABULARY = 4, 1, 260  # ids of byte 0 and of the begin token, and how many there are
FITTED = 16  # batches whose entropies say the threshold
BYTES = 2048  # of a training step, in one row or several
WANTED = 1.5  # times as fast as transformers' class


@dataclass(frozen=True)
class Size:
    """Widths of the local layers and of those on patches, and how many of each there are."""

    local: int
    whole: int
    decoder: int
    layers: int
    patcher: int
    heads: int = 4
    rows: int = 4096  # of each of six hash tables

    def config(self, length: int) -> Any:
        near = {"hidden_size": self.local, "num_attention_heads": self.heads, "intermediate_size": 3 * self.local,
                "hidden_size_global": self.whole}  # fmt: skip
        return BltConfig(
            vocab_size=VOCABULARY, max_position_embeddings=length, use_cache=False, local_attention_window_len=512,
            encoder_hash_byte_group_vocab=self.rows,
            encoder_config=near | {"num_hidden_layers": 1},
            decoder_config=near | {"num_hidden_layers": self.decoder},
            global_config={"hidden_size": self.whole, "num_attention_heads": self.heads,
                           "num_key_value_heads": self.heads, "num_hidden_layers": self.layers,
                           "intermediate_size": 3 * self.whole},
            patcher_config={"hidden_size": self.patcher, "num_attention_heads": 2, "num_hidden_layers": 2,
                            "intermediate_size": 3 * self.patcher, "sliding_window": 128},
        )  # fmt: skip


SIZES = {"small": Size(local=64, whole=128, decoder=2, layers=4, patcher=32),
         "middle": Size(local=128, whole=256, decoder=3, layers=6, patcher=64)}  # fmt: skip


@dataclass
class Pair:
    """Two models of the same weights, an AdamW for each, and rows of ids that they read."""

    models: dict[str, Any]
    optimizers: dict[str, Any]
    text: Iterator[Tensor]


def make(size: Size, bytes: bytes, rows: int, length: int, mean: float) -> Pair:
    """Both models, with patches of `mean` bytes. Raises ShrewError where their logits differ."""
    torch.manual_seed(0)
    theirs: Any = BltForCausalLM(size.config(2 * length))
    text = batches(bytes, rows, length)
    ids = next(text)
    with torch.no_grad():
        several = itertools.islice(batches(bytes, rows, length), FITTED)
        some = torch.cat([theirs.model.patcher(one)[0] for one in several])
        theirs.config.patching_threshold = some.quantile(1 - 1 / mean).item()
        ours = adopt(copy.deepcopy(theirs))
        gap = (ours(ids).logits - theirs(ids, use_cache=False).logits).abs().max().item()
    if gap > 1e-3:
        raise ShrewError(f"the two models differ by {gap:g} in a logit; nothing can be compared.")
    models = {"ours": ours.train(), "theirs": theirs.train()}
    kept = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    return Pair(models, {name: torch.optim.AdamW(found, lr=1e-4, fused=True) for name, found in kept.items()}, text)


def batches(bytes: bytes, rows: int, length: int) -> Iterator[Tensor]:
    """Endless rows of the text, each behind a begin token, as the ids that transformers' class has for bytes."""
    step = length - 1
    ids = torch.tensor(list(bytes[: len(bytes) // step * step])).view(-1, step) + FIRST
    ids = nn.functional.pad(ids, (1, 0), value=BEGIN)
    for number in itertools.count():
        yield ids[torch.arange(number * rows, (number + 1) * rows) % len(ids)]


def train(model: Any, optimizer: Any, ids: Tensor) -> None:
    """One step on ids [B, T]."""
    logits = model(ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def decode(model: Any, ids: Tensor, count: int) -> Tensor:
    """ids [1, T] and `count` greedy bytes behind them."""
    if not isinstance(model, BltForCausalLM):
        # their generation config, which comes along, says to use no cache
        found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                                       eos_token_id=None, pad_token_id=0, use_cache=True)  # fmt: skip
        return found
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def alternated(pair: Pair, draw: random.Random, work: Callable[[str], Any]) -> dict[str, float]:
    """CPU-seconds of some work by each model, in a drawn order: each finds the caches as the other left them."""
    found = {}
    for name in draw.sample(list(pair.models), len(pair.models)):
        begun = time.process_time()
        work(name)
        found[name] = time.process_time() - begun
    return found


def speed(size: str, bytes: bytes, rounds: int, rows: int, length: int, mean: float = 4.5,
          decoded: int = 32) -> list[Record]:  # fmt: skip
    """Records of one size: how many CPU-seconds of theirs one of ours is worth, training and decoding."""
    machine.keep_memory()  # as `shrew train` does
    torch.set_num_threads(1)
    draw = random.Random(0)
    pair = make(SIZES[size], bytes, rows, length, mean)
    found: dict[str, list[dict[str, float]]] = {"training": [], "decoding": []}
    same = 0
    for model in pair.models.values():
        model.eval()
    for number in range(max(rounds // 4, 3) + 1):  # the first one warms caches
        ids, written = next(pair.text)[:1, : length // 4], dict[str, Tensor]()

        def write(name: str, ids: Tensor = ids, written: dict[str, Tensor] = written) -> None:
            written[name] = decode(pair.models[name], ids, decoded)

        found["decoding"].append(alternated(pair, draw, write))
        same += int((written["ours"] == written["theirs"])[0, ids.shape[1] :].sum()) if number else 0
    for model in pair.models.values():
        model.train()
    for _ in range(rounds + 1):
        ids = next(pair.text)
        found["training"].append(
            alternated(pair, draw, lambda name, ids=ids: train(pair.models[name], pair.optimizers[name], ids)))
    parameters = sum(p.numel() for p in pair.models["ours"].parameters())
    per = {"training": rows * length, "decoding": decoded}
    records = []
    for what, items in found.items():
        items = items[1:]
        value, low, high = median_ratio([item["theirs"] / item["ours"] for item in items])
        each = {name: middle.median(item[name] for item in items) / per[what] * 1e6 for name in pair.models}
        mine: dict[str, Any] = {f"{name}_microseconds_per_byte": value for name, value in each.items()}
        mine |= {"same_bytes": same / decoded / len(items)} if what == "decoding" else {}
        records.append(Record(
            run="patches-speed", model=size, metric=f"{what}_over_transformers", value=value, unit="ratio",
            n=len(items), low=low, high=high,
            detail={"wanted": WANTED, "parameters": parameters, "rows": rows, "length": length, "mean_patch": mean,
                    "threads": 1, **mine}))  # fmt: skip
    return records
