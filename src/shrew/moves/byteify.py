"""`byteify`: a model of tokens becomes a model of bytes in patches, whose large layers are the very layers it had.

A patch stands where a token stood: what the layers knew of sequences of pieces of text, they know of patches too once a
local encoder gives them vectors that they can read, and a local decoder reads theirs (Pagnoni et al. 2024, section
6.2). So the local layers are trained first, with those of the model frozen, then all, the old ones slowly.

The lesson is next-byte cross-entropy and, if asked for, the original's own predictions of the next byte, summed up over
its tokens (`distil/marginals.py`). They cost its forward passes, and in short trainings those steps are worth more.
"""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from shrew import data, files, machine, objectives
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.patches import show
from shrew.blocks.patches.boundaries import EntropySpec, SpaceSpec
from shrew.blocks.patches.lend import asked, lend
from shrew.blocks.specs import LocalSpec, PatchesSpec
from shrew.blocks.stock import adopt
from shrew.blocks.window import WindowSpec
from shrew.errors import ShrewError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.folder.check import fetch
from shrew.moves.anatomy import logits
from shrew.moves.context import Context, Progress
from shrew.moves.distil.marginals import END, Said, Spelling, State, byte_divergence
from shrew.moves.distil.plan import Plan, rate
from shrew.muon import optimizers
from shrew.spec import Meta, doc
from shrew.tasks import likelihood

BYTES = data.byte_tokenizer()
HEAD = 32  # channels of a head of the local layers
DECAY = 0.1  # weight decay of matrices, as in `shrew train`
KEEP = 50  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class Byteify:
    """Make a model of tokens a model of bytes in patches, which keeps its layers and learns to read and write bytes."""

    name: ClassVar[str] = "byteify"
    paper: ClassVar[str] = "Pagnoni et al. 2024, Byte Latent Transformer (arXiv:2412.09871)"

    rule: Literal["entropy", "space"] = doc("where patches start: by entropies, or behind spaces", "entropy")
    size: Annotated[float, Meta(gt=1)] = doc("rule entropy: mean bytes of a patch, on the text", 4.5)
    entropy: str = doc("folder of a model of bytes that gives the entropies; default: the one that ships", "",
                       reads="model")  # fmt: skip
    width: Annotated[int, Meta(ge=0)] = doc("width of the local layers; 0: half the model's", 0)
    encoder: Annotated[int, Meta(ge=1)] = doc("layers of the local encoder", 1)
    decoder: Annotated[int, Meta(ge=1)] = doc("layers of the local decoder", 2)
    window: Annotated[int, Meta(ge=1)] = doc("bytes that a local layer looks back", 128)
    steps: Annotated[int, Meta(ge=1)] = doc("optimizer steps", 300)
    frozen: Annotated[float, Meta(ge=0, le=1)] = doc("share of them, the first, that train the local layers alone", 0.3)
    rows: Annotated[int, Meta(ge=1)] = doc("windows of text in a step", 4)
    lr: Annotated[float, Meta(gt=0)] = doc("peak learning rate (Muon and AdamW, 10 % warm-up, linear to zero)", 4e-3)
    slow: Annotated[float, Meta(ge=0, le=1)] = doc("share of it that the layers on patches learn at", 0.1)
    teacher: Annotated[float, Meta(ge=0, le=1)] = doc("share of the loss that are the original's predictions", 0.0)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError for a model that our blocks cannot say, whose tokens do not spell bytes or which
        reads bytes already, and without text; ShrewError for a loss that is no number."""
        spelling = check(loaded, context)
        pairs = spelled(context.healing, spelling)
        if not pairs:
            raise UnsupportedError("byteify: the text has no bytes to learn from; give a longer text or task.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            model = student(self, adopt(loaded.model), [said(row) for _, row in pairs])
        told = f"{sum(p.numel() for p in model.model.layers.parameters()):,} of its {model.num_parameters():,} weights"
        context.say(f"byteify: {told} are of the original's {model.spec.layers} layers.")
        Training(self, model, loaded if self.teacher else None, pairs, context).run()
        return dataclasses.replace(loaded, model=model, tokenizer=BYTES, untouched={}, stored={})


def check(loaded: Loaded, context: Context) -> Spelling:
    """What the model's tokens say in bytes. Raises UnsupportedError for what cannot become a model of bytes."""
    if loaded.is_classifier:
        raise UnsupportedError("byteify: only causal language models become models of bytes.")
    if loaded.packed:
        raise UnsupportedError("byteify: the weights are quantized already; put it before quantize.")
    if not context.healing:
        raise UnsupportedError("byteify needs text to train on; give a longer text or task.")
    if loaded.tokenizer is None or not getattr(loaded.tokenizer, "is_fast", False):
        raise UnsupportedError("byteify: the model has no tokenizer.json, and so nothing says what its tokens spell.")
    if data.reads_bytes(loaded.tokenizer):
        raise UnsupportedError("byteify: this model reads bytes already; leave the move out.")
    try:
        return Spelling(loaded.tokenizer, likelihood.vocabulary(loaded.model))
    except UnsupportedError:
        raise UnsupportedError("byteify: the model's tokenizer is neither byte-level nor SentencePiece and loses bytes "
                               "of the text; start from a model with one of these.") from None  # fmt: skip


def spelled(windows: list[np.ndarray], spelling: Spelling) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows of tokens, and each as the byte ids that the new model reads. A token that begins or ends a document
    does so in bytes; any other that is no text has no place there."""
    begin = spelling.tokenizer.bos_token_id
    ends = (spelling.first == END).tolist()
    found = []
    for window in windows:
        row: list[int] = []
        for id in window.tolist():
            row += [END] if ends[id] or id == begin else spelling.content[id]
        if len(row) > 1:  # one byte alone predicts nothing
            found.append((window, np.array(row, dtype=np.int64)))
    return found


def said(row: np.ndarray) -> str:
    """The text of byte ids, without half characters."""
    return bytes(row[row < END].tolist()).decode("utf-8", "ignore")


def shape(move: Byteify, spec: ModelSpec) -> ModelSpec:
    """The spec of the model of bytes. What is of tokens (n-grams, exits, scales of embeddings and logits) stays
    behind; the context is as many bytes as the patches that the layers know."""
    half = spec.width // 2
    width = move.width or (half // HEAD * HEAD or half // 8 * 8 or 8)
    heads = width // HEAD if width % HEAD == 0 else 1
    near = {"A": WindowSpec(heads=heads, window=move.window)}
    front = PatchesSpec(
        rule=EntropySpec() if move.rule == "entropy" else SpaceSpec(),
        mean=move.size if move.rule == "entropy" else None, width=width, heads=heads,
        encoder=LocalSpec(layers=move.encoder, mixers=near), decoder=LocalSpec(layers=move.decoder, mixers=near),
    )  # fmt: skip
    return dataclasses.replace(
        spec, vocabulary=len(BYTES), context=round(spec.context * front.bytes), tied=True, embedding_scale=1.0,
        logit_scale=1.0, softcap=0.0, ngrams=None, exits=None, front=front,
    )  # fmt: skip


def student(move: Byteify, ours: ShrewForCausalLM, texts: list[str], copied: bool = True) -> ShrewForCausalLM:
    """The model of bytes before it is trained: the layers are those of `ours`, all else is new. The threshold of the
    entropies is fitted to these texts."""
    source = str(fetch(move.entropy) if move.entropy else show.SHIPPED) if move.rule == "entropy" else ""
    try:
        spec, oracle = asked(shape(move, ours.spec), source, texts)
    except SpecError as error:
        raise UnsupportedError(f"byteify: this model cannot run on patches: {error}") from None
    model = build(spec, **{f"{name}_token_id": BYTES.eos_token_id for name in ("bos", "eos", "pad")})
    if oracle is not None:
        lend(model, oracle)
    if copied:
        model.model.layers.load_state_dict(ours.model.layers.state_dict())
        _match(model, ours, texts)
    return model


@torch.no_grad()
def _match(model: ShrewForCausalLM, ours: ShrewForCausalLM, texts: list[str]) -> None:
    """Scale the vectors of patches to the size of the embeddings of tokens, which the layers add to."""
    trunk: Any = model.model
    seen: list[Tensor] = []
    hook = trunk.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    text = max(texts, key=len).encode()[:256]
    model.eval()(torch.tensor([[END, *text]]))
    hook.remove()
    wanted = ours.model.embed_tokens.weight.square().mean().sqrt() * ours.spec.embedding_scale
    part = trunk.pool.proj if trunk.into is None else trunk.into
    part.weight.mul_(wanted / seen[0].square().mean().sqrt().clamp_min(1e-12))


class Training:
    """One training of a model of bytes on texts as the teacher's tokens and as its own bytes, `pairs` of them. A step
    is a pure function of the weights, the optimizers' states and its number, so a run that was killed goes on from its
    last checkpoint, in the `work` folder of the context, as if nothing had been."""

    def __init__(
        self, move: Byteify, model: ShrewForCausalLM, teacher: Loaded | None,
        pairs: list[tuple[np.ndarray, np.ndarray]], context: Context,
    ) -> None:  # fmt: skip
        self.move, self.model, self.teacher, self.context = move, model, teacher, context
        self.tokens, self.bytes = [one for one, _ in pairs], [two for _, two in pairs]
        self.own = Loaded(model, BYTES)
        self.thawed = round(move.frozen * move.steps)  # the step from which all layers are trained
        self.plan = Plan(self.bytes, move.rows, move.steps, context.seed)
        self.mine = Spelling(BYTES, len(BYTES))
        self.theirs = Spelling(teacher.tokenizer, likelihood.vocabulary(teacher.model)) if teacher else None
        trunk: Any = model.model
        local = [part for name, part in trunk.named_children() if name not in ("layers", "entropy")]
        self.optimizers = optimizers(nn.ModuleList(local), self._settings(move.lr))
        if move.slow:
            self.optimizers += optimizers(trunk.layers, self._settings(move.lr * move.slow))

    def _settings(self, peak: float) -> Any:
        return SimpleNamespace(optimizer="muon", lr=peak, weight_decay=DECAY)

    def run(self) -> None:
        """All steps that are still to be taken."""
        move, first = self.move, self._resume()
        machine.set_seed(self.context.seed)
        self.model.train()
        progress = Progress(self.context.say, "byteify", move.steps, first)
        for step in range(first, move.steps):
            loss = self._step(step)
            if (step + 1) % KEEP == 0 and step + 1 < move.steps:
                self._keep(step + 1)
            part = "the local layers" if step < self.thawed else "all layers"
            progress(step + 1, f", {part}: loss {loss:.3f} nats a byte")
        self.model.eval()

    def _step(self, step: int) -> float:
        """The loss of one step, in nats a byte."""
        self.model.model.layers.requires_grad_(step >= self.thawed and self.move.slow > 0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, self.move.steps)
        loss = self._loss(self.plan.picked(step))
        if not torch.isfinite(loss):
            raise ShrewError(f"byteify diverged at step {step}; lower its lr from {self.move.lr}.")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _loss(self, picked: list[int]) -> Tensor:
        share = self.move.teacher if self.teacher is not None else 0.0
        tokens, mask = self.plan.batch(picked, self.own)
        found, _, added = self.model.healing(tokens, mask)
        here = mask[:, 1:].bool()
        parts = [(1 - share) * objectives.next_token(found[:, :-1][here], tokens[:, 1:][here])]
        if self.teacher is not None and self.theirs is not None:
            for row, index in enumerate(picked):
                window = self.tokens[index]
                states = together(self.bytes[index], window, self.mine, self.theirs)
                with torch.no_grad():
                    aim = logits(self.teacher, torch.from_numpy(window)[None])[0].float().log_softmax(-1)
                own = found[row].float().log_softmax(-1)
                both = Said(own, self.bytes[index].tolist(), self.mine), Said(aim, window.tolist(), self.theirs)
                parts.append(share * byte_divergence(*both, states, "forward", 0.1))
        parts += [] if added is None else [added]
        return torch.stack(parts).sum() / here.sum()

    # --- checkpoints

    def _keep(self, step: int) -> None:
        """Keep a checkpoint. Where it cannot be written only a way to go on is lost."""
        if self.context.work is None:
            return
        held = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"step": step, "model": self.model.state_dict(), "optimizers": held}
        with suppress(OSError, RuntimeError), files.new_file(self.context.work / "training.pt") as temporary:
            torch.save(state, temporary)

    def _resume(self) -> int:
        """The step to go on from."""
        place = self.context.work and Path(self.context.work) / "training.pt"
        if place is None or not place.exists():
            return 0
        try:
            state = torch.load(place, weights_only=True)
        except Exception:  # half a disk's worth of bytes can raise anything
            self.context.say(f"byteify: {place} cannot be read; starting again.")
            return 0
        self.model.load_state_dict(state["model"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.context.say(f"byteify: going on from step {state['step']}.")
        step: int = state["step"]
        return step


def together(bytes: np.ndarray, tokens: np.ndarray, mine: Spelling, theirs: Spelling) -> list[tuple[State, State]]:
    """The states of both models before each byte of a window that both know something of."""
    one, two = mine.states(bytes.tolist(), 0), theirs.states(tokens.tolist(), 0)
    return [(one[at], two[at]) for at in one if at in two and one[at].position + 1 < len(bytes)]
