"""How hard each byte is to tell: entropies by a small model of bytes, which is one of our own models.

entropies[:, t] is the entropy in nats of p(byte t | bytes before t) over everything that the model tells apart. The
model reads on from the states of its mixers, a chunk at a time, and each of them has to look back a bounded way
(`window`, `conv`, `linear`, `delta`, `memory`). So memory is bounded, a text of any length is read as one of the
trained length is, and chunks change nothing but the rounding of float32. Full attention is refused: past the length
that it was trained on its entropies rise until nearly every byte is a patch.

B rows, T bytes. Ids are the bytes themselves and `END` for whatever is no byte; it begins and ends documents.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from shrew.blocks.layers import Place
from shrew.blocks.model import ModelSpec, ShrewForCausalLM
from shrew.blocks.patches.boundaries import NEWLINE
from shrew.blocks.stock import adopt
from shrew.errors import FolderError, ShrewError, UsageError

END = 256
MOST = 512  # ids of a model of bytes
AT_ONCE = 8192  # positions whose logits are held at a time
PROBE = "Aé\n\t~"


def problem(spec: ModelSpec) -> str:
    """Why a model of this spec gives no entropies of bytes; empty when it does."""
    if not END < (spec.vocabulary or 0) <= MOST:
        return f"it tells {spec.vocabulary} tokens apart, and a model of bytes 257 (tokenizer = \"bytes\" in [train])"
    if any(spec.mixer(layer).kind == "attention" for layer in range(spec.layers)):
        return "its attention looks back without bound; train one with windows"
    return ""


class Stream:
    """The entropies of texts that come bit by bit, of B rows that go on together. `ahead` [B] is the entropy of the
    byte that comes next. With `reset` a line is told by itself: all that its bytes know is the newline before it."""

    def __init__(self, model: ShrewForCausalLM, rows: int = 1, reset: bool = False) -> None:
        if wrong := problem(model.spec):
            raise UsageError(f"this model gives no entropies of bytes: {wrong}.")
        self.model, self.reset = model, reset
        self.cache = model.model.new_cache()
        device = model.lm_head.weight.device
        self.owner = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.ahead = self._read(torch.full((rows, 1), END, device=device))[:, 0]

    def feed(self, bytes: Tensor) -> Tensor:
        """bytes [B, T] -> entropies [B, T] of these, in float32."""
        parts = [self.ahead[:, None]]
        for part in bytes.split(max(AT_ONCE // max(len(bytes), 1), 1), 1) if bytes.numel() else []:
            parts.append(self._read(part))
        found = torch.cat(parts, 1)
        self.ahead = found[:, -1]
        return found[:, :-1]

    @torch.no_grad()
    def _read(self, bytes: Tensor) -> Tensor:
        """[B, T]: the entropies of what comes behind each of these bytes."""
        bytes = bytes.to(self.owner.device).long()
        special = (bytes < 0) | (bytes >= END)
        breaks = (special | (bytes == NEWLINE)) if self.reset else special
        seen = self.owner.shape[1]
        last = self.owner[:, -1:] if seen else torch.zeros_like(bytes[:, :1])
        self.owner = torch.cat([self.owner, last + breaks.cumsum(1)], 1)
        tokens = bytes.masked_fill(special, END)
        positions = torch.arange(seen, seen + bytes.shape[1], device=bytes.device).expand_as(bytes)
        x, _ = self.model.model(Place(tokens, positions, self.owner, seen), self.cache)
        logs = self.model.logits(x).float().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)


def entropies(model: ShrewForCausalLM, bytes: Tensor, lengths: Tensor, reset: bool = False) -> Tensor:
    """bytes [B, T] (integers), lengths [B] -> float32 [B, T], 0 from a row's length on. Rows do not depend on each
    other, nor on what stands behind their length."""
    if not bytes.numel():
        return bytes.float()
    found = Stream(model, len(bytes), reset).feed(bytes)
    there = torch.arange(bytes.shape[1], device=found.device) < lengths.to(found.device)[:, None]
    return found.where(there, 0.0)


def read(path: Path) -> ShrewForCausalLM:
    """The model of bytes in a folder, float32, frozen. Raises FolderError where there is none."""
    return checked(*opened(path), path)


def checked(model: ShrewForCausalLM, ids: list[int], path: Path) -> ShrewForCausalLM:
    """What `opened` gave of this folder, if it gives entropies of bytes. Raises FolderError where it does not."""
    wrong = problem(model.spec)
    if not wrong and ids != list(PROBE.encode()):
        wrong = "its tokens are not the bytes"
    if wrong:
        raise FolderError(f"{path} gives no entropies of bytes: {wrong}.")
    return model


def opened(path: Path) -> tuple[ShrewForCausalLM, list[int]]:
    """The model of a folder in our blocks, float32, frozen, and what its tokenizer makes of PROBE. Raises FolderError
    where there is none."""
    if not (path / "config.json").is_file():
        raise FolderError(f"There is no model folder at {path}; give one that `shrew train` wrote.")
    try:
        with _quiet():
            found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True,
                                                         trust_remote_code=False, local_files_only=True)  # fmt: skip
        model: Any = adopt(found)
        ids = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)(PROBE)["input_ids"]
    except ShrewError as error:
        raise FolderError(f"{path} holds no model of bytes: {error}") from None
    except Exception as error:  # transformers, safetensors and tokenizers raise their own
        raise FolderError(f"{path} cannot be loaded ({' '.join(str(error).split())[:150]}).") from None
    if not all(bool(torch.isfinite(value).all()) for value in model.parameters()):
        raise FolderError(f"{path} contains NaN or infinite weights; use another copy of the model.")
    return model.eval().requires_grad_(False), ids


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor remarks of transformers inside the block."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
