"""`distil`: heal a model on text against the original it was cut from.

The weights of packed tensors are trained through their rounding (straight-through estimator, Bengio et al. 2013): the
forward pass sees the values of the grid, the gradient moves the numbers behind them, and at the end the codes are
whatever those numbers round to. Nothing leaves the grid, so packed stays packed and no byte is added.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.func import functional_call

from shrew import files, machine, objectives
from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import ShrewError, UnsupportedError
from shrew.folder import Loaded
from shrew.folder.grids import encode
from shrew.folder.packed import Packed, to_rows
from shrew.moves.anatomy import fingerprint
from shrew.moves.context import Context
from shrew.spec import Meta, doc


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up over a tenth of the steps, linear decay to zero."""
    return min((step + 1) / max(0.1 * steps, 1), (steps - step) / max(0.9 * steps, 1), 1.0)


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Train on the healing text: a mix of KL to the original's predictions and next-token loss."""

    name: ClassVar[str] = "distil"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531; Muralidharan et al. 2024, arXiv 2407.14679"

    steps: Annotated[int, Meta(ge=1)] = doc("optimizer steps", 100)
    rows: Annotated[int, Meta(ge=1)] = doc("windows of text in a step", 4)
    lr: Annotated[float, Meta(gt=0)] = doc("peak learning rate (AdamW, 10 % warm-up, linear to zero)", 5e-4)
    teacher: Annotated[float, Meta(ge=0, le=1)] = doc("weight of KL to the original; the rest is next-token loss", 0.9)
    top_k: Annotated[int, Meta(ge=1)] = doc("teacher predictions stored for each position", 32)
    hidden: Annotated[float, Meta(ge=0)] = doc("weight of 1 - cos of the last hidden states; runs the teacher", 0.0)
    lora: Annotated[int, Meta(ge=0)] = doc("rank of a low-rank update that is merged at the end; 0: all weights", 0)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Train `loaded` in place. A model of our blocks is trained as `shrew train` does: with what keeps its routers
        in shape and the losses of its exits. Raises UnsupportedError without healing text, ShrewError on a loss that is
        no number; teacher predictions are stored under `context.cache` and shared between calls."""
        if not context.healing:
            raise UnsupportedError("distil needs healing text; give a longer text or task.")
        if self.teacher and context.teacher is None:
            raise UnsupportedError("distil needs the original as its teacher; set teacher = 0 to train on text alone.")
        plan = Plan(context.healing, self.rows, self.steps, context.seed)
        stored = None
        if self.teacher and context.teacher is not None:
            stored = teacher_predictions(context.teacher, plan, self.top_k, context)
        weights = Weights(loaded, self.lora, context.seed)
        optimizer = torch.optim.AdamW(weights.trained, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        machine.set_seed(context.seed)
        after = [part for part in loaded.model.modules() if hasattr(part, "after_step")]
        loaded.model.train(isinstance(loaded.model, ShrewForCausalLM))  # no dropout for the others
        try:
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.lr * rate(step, self.steps)
                loss = self._loss(loaded, weights, plan, step, stored, context)
                if not torch.isfinite(loss):
                    raise ShrewError(f"healing diverged at step {step}; lower its lr from {self.lr}.")
                loss.backward()
                nn.utils.clip_grad_norm_(weights.trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for part in after:
                    part.after_step()
                if (step + 1) % 50 == 0 or step + 1 == self.steps:
                    context.say(f"distil {step + 1}/{self.steps}: loss {loss.item():.3f}")
        finally:
            loaded.model.eval()
        weights.finish()
        return loaded

    def _loss(
        self, loaded: Loaded, weights: "Weights", plan: "Plan", step: int, stored: "Stored | None", context: Context
    ) -> Tensor:
        """Mean loss per position (or per text for a classifier) of one step."""
        picked = plan.picked(step)
        tokens, mask = plan.batch(picked, loaded)
        found, hidden, added = self._run(loaded.model, weights.values(), tokens, mask)
        if loaded.is_classifier:
            parts = [objectives.kl(found, stored.logits(picked)) * self.teacher] if stored else []
            if context.labels is not None and self.teacher < 1:
                labels = torch.from_numpy(context.labels[picked])
                parts.append(objectives.classify(found, labels) * (1 - self.teacher))
            if not parts:
                raise UnsupportedError("distil of a classifier needs a teacher or labelled healing text.")
            count = len(picked)
        else:
            here = mask[:, 1:].bool()
            logits, targets = found[:, :-1][here], tokens[:, 1:][here]
            count = int(here.sum())
            parts = [objectives.next_token(logits, targets) * (1 - self.teacher)] if self.teacher < 1 else []
            if stored:
                parts.append(objectives.top_k_kl(logits, *stored.top(picked, plan)) * self.teacher)
            parts += [] if added is None else [added]
        if self.hidden and context.teacher is not None:
            with torch.no_grad():
                aim = self._run(context.teacher.model, {}, tokens, mask)[1]
            parts.append(objectives.hidden_cosine(hidden[mask.bool()], aim[mask.bool()]) * self.hidden)
        return torch.stack(parts).sum() / count

    def _run(self, model: Any, values: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any, Any]:
        """Logits of a model with these parameters, its last hidden states (where they are asked for), and what is added
        to its loss in training (None: nothing)."""
        if isinstance(model, ShrewForCausalLM):
            named = {f"model.{name}": value for name, value in values.items()}
            return functional_call(Healing(model), named, (tokens, mask))
        more = {"output_hidden_states": True} if self.hidden else {}
        if not type(model).__name__.endswith("ForSequenceClassification"):
            more["use_cache"] = False
        found = functional_call(model, values, (), {"input_ids": tokens, "attention_mask": mask, **more})
        return found.logits, found.hidden_states[-1] if self.hidden else None, None


class Healing(nn.Module):
    """`ShrewForCausalLM.healing` as a module, for `functional_call`."""

    def __init__(self, model: ShrewForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.model.healing(tokens, mask)


@dataclass(frozen=True)
class Plan:
    """Which windows a step takes: every window once an epoch, in a seeded order."""

    windows: list[np.ndarray]
    rows: int
    steps: int
    seed: int

    def picked(self, step: int) -> list[int]:
        count = len(self.windows)
        return [int(self._order(place // count)[place % count])
                for place in range(step * self.rows, (step + 1) * self.rows)]  # fmt: skip

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))

    def used(self) -> list[int]:
        """Every window that some step takes, sorted."""
        return sorted({index for step in range(self.steps) for index in self.picked(step)})

    def batch(self, picked: list[int], loaded: Loaded) -> tuple[Tensor, Tensor]:
        """Right-padded tokens [rows, T] and their mask."""
        width = max(len(self.windows[index]) for index in picked)
        pad = loaded.tokenizer.pad_token_id
        tokens = torch.full((len(picked), width), pad if pad is not None else 0)
        mask = torch.zeros(len(picked), width, dtype=torch.long)
        for row, index in enumerate(picked):
            tokens[row, : len(self.windows[index])] = torch.from_numpy(self.windows[index])
            mask[row, : len(self.windows[index])] = 1
        return tokens, mask


class Weights:
    """The parameters of a model as functions of what is trained: themselves, numbers behind a grid, or a low-rank
    update of either."""

    def __init__(self, loaded: Loaded, rank: int, seed: int) -> None:
        self.loaded = loaded
        self.latent = {name: p.detach().clone().requires_grad_(rank == 0) for name, p in
                       loaded.model.named_parameters()}  # fmt: skip
        self.update: dict[str, tuple[Tensor, Tensor]] = {}
        if rank:
            ends = (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings())
            outer = {id(layer.weight) for layer in ends if layer is not None}
            draw = torch.Generator().manual_seed(seed)
            for name, p in loaded.model.named_parameters():
                if p.ndim >= 2 and id(p) not in outer:
                    low = torch.randn(*p.shape[:-2], rank, p.shape[-1], generator=draw) / rank**0.5
                    self.update[name] = (torch.zeros(*p.shape[:-1], rank, requires_grad=True), low.requires_grad_())
        self.trained = [item for pair in self.update.values() for item in pair] or list(self.latent.values())

    def values(self) -> dict[str, Tensor]:
        """Parameter name -> the tensor that the forward pass uses, differentiable in what is trained."""
        return {name: self._value(name) for name in self.latent}

    def _value(self, name: str) -> Tensor:
        value = self._behind(name)
        packed = self.loaded.packed.get(name)
        return value if packed is None else value + (on_grid(value.detach(), packed)[1] - value.detach())

    def _behind(self, name: str) -> Tensor:
        if name not in self.update:
            return self.latent[name]
        high, low = self.update[name]
        return self.latent[name] + high @ low

    @torch.no_grad()
    def finish(self) -> None:
        """Write the trained values into the model, and the codes of packed tensors into `packed`."""
        for name, p in self.loaded.model.named_parameters():
            value = self._behind(name)
            packed = self.loaded.packed.get(name)
            if packed is not None:
                codes, value = on_grid(value, packed)
                self.loaded.packed[name] = replace(packed, codes=codes)
            p.copy_(value)


def on_grid(value: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The nearest codes on the grid of `packed` (its steps and correction stay), and the parameter they stand for."""
    rows = to_rows(value, packed.transposed)
    codes = encode(rows if packed.low is None else rows - packed.correction(), packed.steps, packed.grid)
    return codes, replace(packed, codes=codes).dense()


@dataclass(frozen=True)
class Stored:
    """Teacher predictions: for causal models the K likeliest tokens of every position but a window's last, float16
    log-probabilities; for classifiers all logits."""

    tensors: dict[str, Tensor]

    def top(self, picked: list[int], plan: Plan) -> tuple[Tensor, Tensor]:
        """(log-probabilities [N, K], ids [N, K]) of the positions of these windows, in batch order."""
        starts = self.tensors["starts"]
        spans = [slice(int(starts[index]), int(starts[index]) + len(plan.windows[index]) - 1) for index in picked]
        logs = torch.cat([self.tensors["logs"][span] for span in spans]).float()
        return logs, torch.cat([self.tensors["ids"][span] for span in spans]).long()

    def logits(self, picked: list[int]) -> Tensor:
        return self.tensors["logits"][self.tensors["starts"][picked]]


@torch.no_grad()
def teacher_predictions(teacher: Loaded, plan: Plan, top_k: int, context: Context) -> Stored:
    """What the teacher says on every window that the plan uses, computed once and kept on disk by hash."""
    used = plan.used()
    key = fingerprint(teacher.model, [plan.windows[index] for index in used], "teacher", top_k, used)
    place = Path(context.cache) / "teacher" / f"{key[:24]}.safetensors"
    if place.exists():
        return Stored(load_file(place))
    context.say(f"Storing the original's predictions on {len(used)} windows.")
    starts = torch.zeros(len(plan.windows), dtype=torch.long)
    logs, ids, logits, position = [], [], [], 0
    for low in range(0, len(used), 4):
        picked = used[low : low + 4]
        tokens, mask = plan.batch(picked, teacher)
        found = teacher.model(input_ids=tokens, attention_mask=mask).logits
        for row, index in enumerate(picked):
            starts[index] = position
            if teacher.is_classifier:
                logits.append(found[row])
                position += 1
                continue
            best = found[row, : len(plan.windows[index]) - 1].float().log_softmax(-1)
            best = best.topk(min(top_k, best.shape[-1]))
            logs.append(best.values.half())
            ids.append(best.indices.int())
            position += len(plan.windows[index]) - 1
    tensors = {"starts": starts}
    tensors |= {"logits": torch.stack(logits)} if logits else {"logs": torch.cat(logs), "ids": torch.cat(ids)}
    files.write_bytes(place, save(tensors))
    return Stored(tensors)
