"""`distil`: heal a model on text against a teacher, which is the original it was cut from or any other model.

The weights of packed tensors are trained through their rounding (straight-through estimator, Bengio et al. 2013): the
forward pass sees the values of the grid, the gradient moves the numbers behind them, and at the end the codes are
whatever those numbers round to. Nothing leaves the grid, so packed stays packed and no byte is added.
"""

import copy
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from shrew import folder, machine, objectives
from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import ShrewError, SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context, Progress
from shrew.moves.distil import rationales
from shrew.moves.distil.forward import Found, run, showing_attention
from shrew.moves.distil.marginals import Said, Spelling, byte_divergence, retold
from shrew.moves.distil.plan import Plan, rate
from shrew.moves.distil.sample import continued
from shrew.moves.distil.teacher import Question, Stored, teacher_predictions
from shrew.moves.distil.twin import compare, held_out
from shrew.moves.distil.weights import Weights
from shrew.spec import Meta, doc
from shrew.tasks import likelihood

__all__ = ["Distil", "Plan", "Run", "rate"]


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Train on the healing text: a mix of a teacher's predictions and next-token loss."""

    name: ClassVar[str] = "distil"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531; Muralidharan et al. 2024, arXiv 2407.14679"

    steps: Annotated[int, Meta(ge=1)] = doc("optimizer steps", 100)
    rows: Annotated[int, Meta(ge=1)] = doc("windows of text in a step", 4)
    lr: Annotated[float, Meta(gt=0)] = doc("peak learning rate (AdamW, 10 % warm-up, linear to zero)", 5e-4)
    teacher: Annotated[float, Meta(ge=0, le=1)] = doc("weight of the teacher; the rest is next-token loss", 0.9)
    teacher_model: str = doc("model folder or hub name of the teacher; default: the original", "", reads="model")
    loss: Literal["forward", "reverse", "skewed-forward", "skewed-reverse"] = doc(
        "KL from the teacher, to it, or of either from a mix of both models", "forward")  # fmt: skip
    alpha: Annotated[float, Meta(gt=0, lt=1)] = doc("share of the first model in the mix of a skewed loss", 0.1)
    temperature: Annotated[float, Meta(gt=0)] = doc("both models' logits are divided by it for the teacher's part", 1.0)
    top_k: Annotated[int, Meta(ge=1, le=65535)] = doc("teacher predictions stored for each position, at most", 32)
    mass: Annotated[float, Meta(gt=0, le=1)] = doc("fewer are stored where those have so much probability", 0.999)
    on_policy: Annotated[float, Meta(ge=0, le=1)] = doc("share of steps on text that the model itself writes", 0.0)
    sampled: Annotated[int, Meta(ge=1)] = doc("tokens that it goes on with, at most; never beyond a window", 64)
    hidden: Annotated[float, Meta(ge=0)] = doc("weight of 1 - cos of the last hidden states; runs the teacher", 0.0)
    attention: Annotated[float, Meta(ge=0)] = doc("weight of KL between the last attention maps; runs the teacher", 0.0)
    rationales: str = doc("JSONL of {text, rationale, answer} to learn from beside the text", "", reads="file")
    rationale: Annotated[float, Meta(ge=0)] = doc("weight of the rationales; that of the answers is 1", 1.0)
    lora: Annotated[int, Meta(ge=0)] = doc("rank of a low-rank update that is merged at the end; 0: all weights", 0)
    scales: bool = doc("train the scales of weights on the grid int too", False)
    twin: bool = doc("train a twin without teacher at equal compute, compare both on the last tenth of the text", False)

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Train `loaded` in place. A model of our blocks is trained as `shrew train` does: with what keeps its routers
        in shape and the losses of its exits. Raises UnsupportedError without healing text, ShrewError on a loss that is
        no number; teacher predictions are stored under `context.cache` and shared between calls. What the twin shows is
        added to the lineage under "twins"."""
        teacher = self._teacher(loaded, context)
        if not self.twin:
            Run(self, loaded, teacher, context).train()
            return loaded
        context, held = held_out(context)
        other = replace(loaded, model=copy.deepcopy(loaded.model), packed=dict(loaded.packed))
        taught = Run(self, loaded, teacher, context)
        taught.train()
        steps = taught.equal_steps()
        plain = replace(self, twin=False, steps=steps, teacher=0.0, hidden=0.0, attention=0.0, on_policy=0.0)
        alone = Run(plain, other, None, context)
        context.say(f"distil: the twin without teacher, {steps} steps")
        alone.train()
        found = compare(loaded, other, held, context.seed)
        found |= {"cpu_seconds": taught.seconds, "twin_cpu_seconds": alone.seconds, "twin_steps": steps}
        loaded.lineage["twins"] = [*loaded.lineage.get("twins", []), found]
        return loaded

    def _teacher(self, loaded: Loaded, context: Context) -> Loaded | None:
        """The teacher, None where none is asked. Raises for settings that do not go together."""
        if not context.healing:
            raise UnsupportedError("distil needs healing text; give a longer text or task.")
        if loaded.is_classifier and (self.on_policy or self.rationales):
            raise UnsupportedError("distil: a classifier writes no text; leave out on_policy and rationales.")
        asked = self.teacher or self.hidden or self.attention
        if not asked:
            for name in ("on_policy", "twin", "teacher_model"):
                if getattr(self, name):
                    raise SpecError(f"distil: {name} needs a teacher; set teacher above 0, or leave it out.")
            return None
        if self.on_policy and not self.teacher:
            raise SpecError("distil: on_policy needs a teacher; set teacher above 0.")
        teacher = folder.load(self.teacher_model) if self.teacher_model else context.teacher
        if teacher is None:
            raise UnsupportedError("distil needs the original as its teacher; set teacher = 0 to train on text alone.")
        if teacher.is_classifier != loaded.is_classifier:
            raise UnsupportedError("distil: a classifier and a language model cannot teach each other.")
        return teacher


class Run:
    """One training of a model. `seconds`: CPU-seconds that it took, the teacher's part included, whenever that was."""

    def __init__(self, move: Distil, loaded: Loaded, teacher: Loaded | None, context: Context) -> None:
        self.move, self.loaded, self.teacher, self.context = move, loaded, teacher, context
        self.seconds = 0.0
        self.plan = Plan(context.healing, move.rows, move.steps, context.seed, move.on_policy)
        self.weights = Weights(loaded, move.lora, context.seed, move.scales)
        if move.scales and not self.weights.growth:
            context.say("distil: no weight is on the grid int without a correction, so there are no scales to train")
        self.stored: Stored | None = None
        self.spellings: tuple[Spelling, Spelling] | None = None
        self.width = 0
        self.lessons: rationales.Lessons | None = None
        if move.rationales:
            self.lessons = rationales.read_lessons(move.rationales, loaded, move.rows, move.steps, context)
        if teacher is not None:
            self.context_of_teacher = likelihood.context_length(teacher.model, sys.maxsize)
            self._meet(teacher)

    def _meet(self, teacher: Loaded) -> None:
        """Find out what both models have in common, and ask what can be asked beforehand."""
        move, mine, theirs = self.move, self.loaded.tokenizer, teacher.tokenizer
        if not self.loaded.is_classifier:
            widths = [likelihood.vocabulary(item.model) for item in (self.loaded, teacher)]
            self.width = 0 if widths[0] == widths[1] else min(widths)
            if mine is not theirs and mine.get_vocab() != theirs.get_vocab():
                if move.hidden or move.attention:
                    raise UnsupportedError("distil: hidden states of a teacher with another tokenizer stand at other "
                                           "places; set hidden and attention to 0.")  # fmt: skip
                self.spellings = Spelling(mine, widths[0]), Spelling(theirs, widths[1])
                return
        longest = max(map(len, self.plan.windows))
        if longest > self.context_of_teacher:
            raise UnsupportedError(f"distil: the teacher was made for {self.context_of_teacher} tokens and a window of "
                                   f"text has {longest}; set a shorter window in [source].")  # fmt: skip
        if move.teacher:
            question = Question(move.top_k, move.mass, move.temperature, self.width)
            self.stored = teacher_predictions(teacher, self.plan, question, self.context)
            self.seconds += self.stored.seconds

    def train(self) -> None:
        """All steps; the model then holds what was trained."""
        move, loaded, trained = self.move, self.loaded, self.weights.trained
        begun = time.process_time()
        machine.set_seed(self.context.seed)
        after = [part for part in loaded.model.modules() if hasattr(part, "after_step")]
        models = [item.model for item in (loaded, self.teacher) if item is not None]
        with showing_attention(models) if move.attention else nullcontext():
            self.projection = self._projection()
            trained = trained + ([] if self.projection is None else [self.projection])
            optimizer = torch.optim.AdamW(trained, lr=move.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
            loaded.model.train(isinstance(loaded.model, ShrewForCausalLM))  # no dropout for the others
            try:
                progress = Progress(self.context.say, "distil", move.steps)
                for step in range(move.steps):
                    optimizer.param_groups[0]["lr"] = move.lr * rate(step, move.steps)
                    loss = self._loss(step)
                    if not torch.isfinite(loss):
                        raise ShrewError(f"healing diverged at step {step}; lower its lr from {move.lr}.")
                    loss.backward()
                    nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    for part in after:
                        part.after_step()
                    progress(step + 1, f": loss {loss.item():.3f}")
            finally:
                loaded.model.eval()
        self.weights.finish()
        self.seconds += time.process_time() - begun

    def equal_steps(self) -> int:
        """Steps without teacher that cost what this run did. Counted, so that it is the same on every machine: a
        forward pass costs a model's parameters for each token, a step three times that."""
        assert self.teacher is not None
        student, teacher = (sum(p.numel() for p in item.model.parameters()) for item in (self.loaded, self.teacher))
        lengths = [len(window) for window in self.plan.windows]
        work = alone = 0
        for step in range(self.move.steps):
            tokens = sum(lengths[index] for index in self.plan.picked(step))
            alone += 3 * student * tokens
            samples = self.plan.samples(step)
            live = self.stored is None or samples or self.move.hidden or self.move.attention
            work += 3 * student * tokens + teacher * tokens * bool(live) + student * tokens * samples
        if self.stored is not None:
            work += teacher * sum(lengths[index] for index in self.plan.used())
        return round(self.move.steps * work / alone)

    @torch.no_grad()
    def _projection(self) -> Tensor | None:
        """A map [teacher's width, own width] to be learned where hidden states differ in width. It is thrown away."""
        if not self.move.hidden or self.teacher is None:
            return None
        tokens, mask = self.plan.batch(self.plan.picked(0)[:1], self.loaded)
        own, wanted = (run(item.model, {}, tokens, mask, hidden=True).hidden for item in (self.loaded, self.teacher))
        assert own is not None and wanted is not None
        if own.shape[-1] == wanted.shape[-1]:
            return None
        draw = torch.Generator().manual_seed(self.context.seed)
        start = torch.randn(wanted.shape[-1], own.shape[-1], generator=draw) / own.shape[-1] ** 0.5
        return start.requires_grad_()

    def _loss(self, step: int) -> Tensor:
        """Mean loss per position (or per text for a classifier) of one step, and that of the lessons."""
        move, plan = self.move, self.plan
        picked = plan.picked(step)
        samples = plan.samples(step)
        values = self.weights.values()
        if samples:
            self.weights.show()
            windows = [plan.windows[index] for index in picked]
            tokens, mask, own = continued(self.loaded, windows, move.sampled, [self.context.seed, step, 2])
        else:
            tokens, mask = plan.batch(picked, self.loaded)
            own = mask
        found = run(self.loaded.model, values, tokens, mask, move.hidden > 0, move.attention > 0)
        parts: list[Tensor] = []
        count = len(picked)
        if self.loaded.is_classifier:
            parts += self._of_classes(found.logits, picked)
        else:
            here = own[:, 1:].bool()
            count = max(int(here.sum()), 1)
            scored = found.logits[:, :-1][here] if not samples else found.logits
            if move.teacher < 1 and not samples:
                loss = objectives.next_token(scored, tokens[:, 1:][here])
                parts.append(loss * (1 - move.teacher))
            if self.spellings is not None:
                parts.append(self._by_bytes(found.logits, tokens, mask, own) * move.teacher)
            elif self.stored is not None and not samples:
                logs, ids, kept = self.stored.top(picked)
                mine = objectives.lumped(self._common(scored), ids, kept)
                parts.append(self._divergence(mine, logs) * move.teacher)
            parts += [] if found.added is None else [found.added]
        parts += self._of_live_teacher(found, tokens, mask, own, samples)
        loss = torch.stack(parts).sum() / count
        if self.lessons is not None:
            tokens, mask, targets = self.lessons.batch(step, self.loaded)
            loss = loss + rationales.loss(run(self.loaded.model, values, tokens, mask).logits, targets, move.rationale)
        return loss

    def _common(self, logits: Tensor) -> Tensor:
        """Logits, tempered, of the tokens that both models have."""
        return logits[..., : self.width or logits.shape[-1]].float() / self.move.temperature

    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """Sum over positions; times the square of the temperature, so that it takes no part of the gradient away."""
        return objectives.divergence(mine, theirs, self.move.loss, self.move.alpha) * self.move.temperature**2

    def _of_classes(self, logits: Tensor, picked: list[int]) -> list[Tensor]:
        parts: list[Tensor] = []
        labels = self.context.labels
        if self.stored is not None:
            mine, theirs = (self._common(item).log_softmax(-1) for item in (logits, self.stored.logits(picked)))
            parts.append(self._divergence(mine, theirs) * self.move.teacher)
        if labels is not None and self.move.teacher < 1:
            parts.append(objectives.classify(logits, torch.from_numpy(labels[picked])) * (1 - self.move.teacher))
        if not parts:
            raise UnsupportedError("distil of a classifier needs a teacher or labelled healing text.")
        return parts

    def _of_live_teacher(self, found: Found, tokens: Tensor, mask: Tensor, own: Tensor, samples: bool) -> list[Tensor]:
        """The losses for which the teacher runs beside the model, on the same tokens."""
        move = self.move
        parts: list[Tensor] = []
        scored = samples and self.spellings is None
        if self.teacher is None or not (scored or move.hidden or move.attention):
            return parts
        with torch.no_grad():
            aim = run(self.teacher.model, {}, tokens, mask, move.hidden > 0, move.attention > 0)
        if scored:
            here = own[:, 1:].bool()
            mine, theirs = (self._common(item.logits)[:, :-1][here].log_softmax(-1) for item in (found, aim))
            parts.append(self._divergence(mine, theirs) * move.teacher)
        if found.hidden is not None and aim.hidden is not None and move.hidden:
            mine = found.hidden[mask.bool()]
            mine = mine if self.projection is None else mine @ self.projection.T
            parts.append(objectives.hidden_cosine(mine, aim.hidden[mask.bool()]) * move.hidden)
        if found.attention is not None and aim.attention is not None:
            parts.append(objectives.attention_kl(found.attention, aim.attention, mask) * move.attention)
        return parts

    def _by_bytes(self, logits: Tensor, tokens: Tensor, mask: Tensor, own: Tensor) -> Tensor:
        """The divergence from a teacher with another tokenizer; of a text that the model wrote, where it wrote."""
        assert self.spellings is not None and self.teacher is not None
        mine, theirs = self.spellings
        total = logits.sum() * 0.0
        for row, length in enumerate(mask.sum(1).tolist()):
            ids = tokens[row, :length].tolist()
            told = retold(ids, mine, theirs)
            if told is None:
                continue
            others = told[0][: self.context_of_teacher]
            one, two = mine.states(ids, 0), theirs.states(others, told[1])
            scored = [at for at, state in one.items() if state.position + 1 < length and own[row, state.position + 1]]
            states = [(one[at], two[at]) for at in scored if at in two]
            if states:
                with torch.no_grad():
                    asked = torch.tensor(others)[None]
                    aim = run(self.teacher.model, {}, asked, torch.ones_like(asked)).logits[0]
                left, right = ((item.float() / self.move.temperature).log_softmax(-1) for item in (logits[row], aim))
                both = Said(left, ids, mine), Said(right, others, theirs)
                total = total + byte_divergence(*both, states, self.move.loss, self.move.alpha)
        return total * self.move.temperature**2
