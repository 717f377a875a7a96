"""Coded weights at a given rate: every weight gets the step that its sensitivity asks for; one number sets them all.

Under an entropy coder, halving a step costs one bit of every weight it serves and quarters its squared error. So at a
given size the damage is least when a squared error of one step does the same damage everywhere (reverse water-filling;
Gish and Pierce 1968 for the coder). With error feedback, an error of column j that later columns have made up for does
1 / U_jj^2 of damage, U being the Cholesky factor that GPTQ uses; rows differ by the Fisher information of what they
give. A step is then proportional to U_jj / sqrt(row): a row's step times a column's, which is what `Product` stores.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from shrew import entropy
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.folder.grids import COLUMN_ONE, ROW_ONE, Product, Steps, dequantize, encode
from shrew.folder.packed import to_rows
from shrew.moves import grids
from shrew.moves.anatomy import logits
from shrew.moves.calibrate import aliases
from shrew.moves.context import Progress
from shrew.moves.seams import Seam, mlp_seams, value_seams

GRID = Product(8)
NARROW = Product(4)  # of codes that stay within half of a byte: a packed model reads them twice as fast
FEW = 2e-3  # of the codes may be cut off for that
DEARER = 1.15  # times the damage are still worth it
LEAST_ROW = 1e-3  # of the mean: rows that the text never needed are not thrown away
SAMPLE = 1 << 16  # weights of a tensor that an estimate of the rate looks at
PASSES = 8  # of rounding with error feedback, until the rate is met
NEAR = 0.99  # of the rate is near enough
TOLERANCE = 1e-2  # of the largest logit: another order of sums in bf16
DRAWS = 8  # of a classifier's label, since a text has only one


@dataclass(frozen=True)
class Sensitivity:
    """What changes of a weight do: KL to the original in nats a prediction is about
    1/2 sum over rows r of rows[r] * d_r hessian d_r, for changes d [rows, cols]; mean diagonal of the hessian 1."""

    rows: Tensor
    hessian: Tensor


@dataclass(frozen=True)
class Coded:
    """A weight in the rate's balance: its name, float32 [rows, cols] and what changes of it do."""

    name: str
    rows: Tensor
    sensitivity: Sensitivity


@dataclass(frozen=True)
class Rounded:
    """Codes [rows, cols] of a weight on `grid` with these steps."""

    codes: Tensor
    steps: Steps
    grid: Product

    @property
    def bits(self) -> float:
        """What codes and steps take in the file, coded."""
        return bits_of(self.codes, self.steps)


class _Uses:
    """Second moments of every use of a weight: of what it sees, weighted by how much its output matters there, and of
    its rows' outputs' gradients."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, str], Tensor] = {}
        self.outputs: dict[tuple[str, str], Tensor] = {}
        self.looked_up: dict[str, int] = {}
        self.predictions = 0

    def add(self, key: tuple[str, str], inputs: Tensor, outputs: Tensor) -> None:
        """inputs [in, in], outputs [out], each summed over the text; before the end their scales do not matter."""
        self.inputs[key] = self.inputs[key].add_(inputs) if key in self.inputs else inputs
        self.outputs[key] = self.outputs[key].add_(outputs) if key in self.outputs else outputs

    def linear(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            seen = given[0].detach().flatten(0, -2).float()

            def back(gradient: Tensor) -> None:
                squared = gradient.flatten(0, -2).float().square()
                self.add((name, "linear"), (seen * squared.sum(1, keepdim=True)).T @ seen, squared.sum(0))

            output.register_hook(back)

        return hook

    def head(self, name: str) -> Callable[..., None]:
        """The Fisher information of logits is known without sampling: p (1 - p)."""

        def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            seen = given[0].detach().flatten(0, -2).float()
            chance = output.detach().flatten(0, -2).float().softmax(-1)
            chance = chance * (1 - chance)
            self.add((name, "head"), (seen * chance.sum(1, keepdim=True)).T @ seen, chance.sum(0))

        return hook

    def lookup(self, name: str) -> Callable[..., Tensor]:
        def hook(module: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
            ids, output = given[0].flatten(), output.detach().requires_grad_(True)

            def back(gradient: Tensor) -> None:
                gradient = gradient.flatten(0, -2).float()
                every = ids.expand(len(gradient) // len(ids), -1).flatten()
                each = gradient.square().sum(1)
                often = torch.zeros(len(module.weight)).index_add_(0, every, each)
                self.add((name, "lookup"), gradient.T @ gradient, often)
                self.looked_up[name] = self.looked_up.get(name, 0) + len(every)

            output.register_hook(back)
            return output

        return hook

    def found(self, name: str) -> Sensitivity | None:
        """All uses of a weight in one quadratic form; None where it was not seen in use."""
        rows, hessian = torch.zeros(()), torch.zeros(())
        for key, inputs in self.inputs.items():
            if key[0] != name or not inputs.any():
                continue
            outputs, mean = self.outputs[key], inputs.diagonal().mean()
            if key[1] == "lookup":  # a row that never came counts as if it had come half a time
                outputs = outputs + 0.5 * outputs.sum() / self.looked_up[name]
            # Of both, one was weighted by the other: inputs by the squares of gradients, or the other way round.
            each = outputs / outputs.sum().clamp(min=1e-30) * mean / self.predictions
            rows, hessian = rows + each, hessian + each.mean() * inputs / mean
        if not rows.any():
            return None
        return Sensitivity(rows.clamp(min=LEAST_ROW * float(rows.mean())), hessian / hessian.diagonal().mean())


@contextmanager
def _trainable(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Inside the block these parameters alone get gradients; afterwards all is as it was."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None


def sensitivities(
    loaded: Loaded, calibration: Sequence[np.ndarray], transposed: dict[str, bool], seed: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Sensitivity]:  # fmt: skip
    """By parameter name, for the names in `transposed`: the Fisher information of the model's own predictions on text.

    One pass forward and back, labels drawn from the predictions (so the loss's Hessian is what is measured, not how
    wrong the model is). Weights that no Linear, Conv1D or Embedding uses get the diagonal of theirs alone.
    """
    model, names, uses = loaded.model, aliases(loaded.model), _Uses()
    head, draw = model.get_output_embeddings(), torch.Generator().manual_seed(seed)
    other = set(transposed)
    with ExitStack() as hooks, torch.enable_grad():
        for path, module in model.named_modules():
            name = names.get(f"{path}.weight", "")
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                made = uses.lookup if isinstance(module, nn.Embedding) else uses.head if module is head else uses.linear
                hooks.enter_context(module.register_forward_hook(made(name)))
                other.discard(name)
        hooks.enter_context(_trainable(model, other))
        squares = {name: torch.zeros_like(model.get_parameter(name)) for name in other}
        asked = [sequence for sequence in calibration for _ in range(DRAWS if loaded.is_classifier else 1)]
        progress = Progress(say, "calibration: text", len(asked), ending=False)
        for number, sequence in enumerate(asked, 1):
            found = logits(loaded, torch.from_numpy(np.asarray(sequence, np.int64))[None]).float().flatten(0, -2)
            labels = torch.multinomial(found.detach().softmax(-1), 1, generator=draw)[:, 0]
            F.cross_entropy(found, labels, reduction="sum").backward()
            uses.predictions += len(labels)
            for name, total in squares.items():
                parameter = model.get_parameter(name)
                if parameter.grad is not None:
                    total += parameter.grad.square()
                    parameter.grad = None
            progress(number)
    seen = {name: uses.found(name) for name in transposed if name not in other}
    seen |= {name: _diagonal(to_rows(total, transposed[name]) / max(uses.predictions, 1))
             for name, total in squares.items()}  # fmt: skip
    return {name: item for name, item in seen.items() if item is not None}


def _diagonal(squares: Tensor) -> Sensitivity | None:
    """The closest product of rows and columns to the diagonal of a Fisher information [rows, cols]."""
    rows, columns = squares.mean(1), squares.mean(0)
    if not rows.any():
        return None
    columns = columns / columns.mean()
    return Sensitivity(rows.clamp(min=LEAST_ROW * float(rows.mean())), torch.diag(columns.clamp(min=LEAST_ROW)))


def steps_of(rows: Tensor, weight: Tensor, columns: Tensor, log_step: float) -> Steps:
    """Steps 2^log_step * columns [cols] / sqrt(weight [rows]) in quarter octaves, wider where codes would not reach the
    largest weight of a row."""
    octaves = columns.log2()
    middle = octaves.median()
    column = (4 * (octaves - middle)).round().clamp(-COLUMN_ONE, 255 - COLUMN_ONE)
    row = (4 * (log_step + middle - 0.5 * weight.log2())).round()
    reach = 0.9 * 2 ** (GRID.bits - 1)
    largest = (rows.abs() / torch.exp2(column / 4)).amax(1)
    row = torch.maximum(row, (4 * (largest / reach).clamp(min=1e-30).log2()).ceil()).clamp(-ROW_ONE, 255 - ROW_ONE)
    return Steps((row + ROW_ONE)[:, None].to(torch.uint8), columns=(column + COLUMN_ONE)[None].to(torch.uint8))


def bits_of(codes: Tensor, steps: Steps) -> float:
    """Bits in the file of codes and steps, coded."""
    return 8.0 * (entropy.size(codes.numpy()) + sum(entropy.size(part.numpy()) for part in steps.parts().values()))


def round_to_rate(
    items: Sequence[Coded], together: Sequence[set[str]], across: Sequence[Seam], rate: float, damp: float,
    say: Callable[[str], None],
) -> dict[str, Rounded]:  # fmt: skip
    """Codes and steps on `GRID` or `NARROW` by name, of `rate` bits a weight at most in the file, steps included.
    Weights that stand `together` get the same columns: they read the same input, which a runtime then scales once.
    `across` a seam columns become rows of what writes the input, so that nothing is left to scale there."""
    if not items:
        return {}
    columns = {item.name: _columns(item, damp) for item in items}
    for names in together:
        among = [item for item in items if item.name in names]
        octaves = {item.name: columns[item.name].log2() for item in among}
        middle = {name: each.median() for name, each in octaves.items()}
        parts = [len(item.rows) * (octaves[item.name] - middle[item.name]) for item in among]
        mean = sum(parts, torch.zeros(())) / max(sum(len(item.rows) for item in among), 1)
        columns |= {name: (mean + middle[name]).exp2() for name in octaves}
    across = [seam for seam in across if all(name in columns for name in seam.names)]
    for seam in across:
        name = seam.readers[0].name
        columns[name] = seam.spread(seam.gathered(columns[name].log2())).exp2()
    groups = _grouped(items, together)
    log_step, slope = _estimated(items, columns, rate), min(1.0, 0.4 + 0.2 * rate)
    best: tuple[float, dict[str, Rounded]] | None = None
    ends = dict[bool, tuple[float, float]]()  # the last steps that took too much and too little, and bits beyond
    kept = dict[str, Product]()
    for _ in range(PASSES):
        found = dict[str, Rounded]()
        for group in groups:
            found |= _rounded(group, columns, log_step, damp, kept.get(group[0].name))
        for seam in across:
            _move_steps(found, seam)
        got = sum(each.bits for each in found.values()) / sum(item.rows.numel() for item in items)
        say(f"steps of 2^{log_step:.2f}: {got:.3f} bits a weight")
        if best is None or (best[0] < got <= rate) or (best[0] > rate and got < best[0]):
            best = got, found
        if NEAR * rate <= got <= rate:
            break
        much, beyond = got > rate, got - 0.5 * (1 + NEAR) * rate
        before, (far, instead) = ends.get(much), ends.get(not much, (0.0, 0.0))
        ends[much] = log_step, beyond
        if len(ends) == 2:
            # A change of grid is a jump of bits, and no step would meet a rate inside it: from now on there is none.
            kept = kept or {name: each.grid for name, each in found.items()}
            if before is not None:  # the Illinois algorithm: an end that stays counts half
                ends[not much] = far, instead = far, 0.5 * instead
            log_step += (far - log_step) * beyond / (beyond - instead)
            continue
        # Bits for an octave: fewer than one where many codes are 0 or steps are as fine as codes allow.
        if before is not None:
            slope = min(max((beyond - before[1]) / (before[0] - log_step), 0.2), 1.2)
        log_step += beyond / slope
    assert best is not None
    if best[0] > rate:
        raise UnsupportedError(f"these weights take {best[0]:.2f} bits each at least; ask for a rate above {rate}.")
    if best[0] < 0.95 * rate:
        say(f"codes of {GRID.bits} bits reach no finer steps, so {best[0]:.2f} bits a weight is all they take")
    return best[1]


def _move_steps(found: dict[str, Rounded], seam: Seam) -> None:
    """Make the reader's steps of columns steps of the writer's rows, exactly; nothing where they would not fit."""
    (writer,), (reader,) = seam.writers, seam.readers
    wrote, read = found[writer.name], found[reader.name]
    steps, asked = wrote.steps, read.steps
    assert asked.columns is not None
    each = asked.columns[0].int() - COLUMN_ONE
    each = each.unflatten(0, (-1, seam.copies, seam.run))[:, 0].flatten() if seam.copies > 1 else each
    rows = steps.scales.int()
    rows[writer.first : writer.first + seam.width] += each[:, None]
    if int(rows.min()) >= 0 and int(rows.max()) <= 255:
        found[writer.name] = replace(wrote, steps=replace(steps, scales=rows.to(torch.uint8)))
        one = torch.full_like(asked.columns, COLUMN_ONE)
        found[reader.name] = replace(read, steps=replace(asked, columns=one))


def crossings(loaded: Loaded, ids: Tensor) -> list[Seam]:
    """The seams inside attentions and gated MLPs of one weight each side, across which a number for each channel moves
    without a change of the model's outputs on `ids` [1, T]."""
    try:
        inner = [*mlp_seams(loaded.model), *value_seams(loaded.model)]
    except UnsupportedError:
        return []
    inner = [seam for seam in inner if len(seam.writers) == 1 and not seam.experts]
    return [seam for seam in inner if _holds(loaded, seam, ids)]


@torch.no_grad()
def _holds(loaded: Loaded, seam: Seam, ids: Tensor) -> bool:
    """Whether outputs stay when powers of two move across, which are taken back without a trace."""
    factors = torch.exp2((torch.arange(seam.width) % 3 - 1).float())
    before = logits(loaded, ids)
    seam.move(loaded.model, factors)
    after = logits(loaded, ids)
    seam.move(loaded.model, 1 / factors)
    return bool((after - before).abs().max() <= TOLERANCE * before.abs().max())


def _columns(item: Coded, damp: float) -> Tensor:
    upper, _ = grids.decompose(item.sensitivity.hessian[None], damp)
    return upper[0].diagonal().clone()


def _grouped(items: Sequence[Coded], together: Sequence[set[str]]) -> list[list[Coded]]:
    """Each weight once, with those that it stands together with."""
    found, left = list[list[Coded]](), {item.name: item for item in items}
    for names in [*together, *({item.name} for item in items)]:
        if group := [left.pop(name) for name in sorted(names) if name in left]:
            found.append(group)
    return found


def _rounded(
    group: Sequence[Coded], columns: dict[str, Tensor], log_step: float, damp: float, grid: Product | None = None
) -> dict[str, Rounded]:
    """Weights that stand together, by name: on `grid`, or where none is given all within 4 bits if few codes would not
    be, and what that cuts off does little damage once later columns have made up for it."""
    steps = [steps_of(item.rows, item.sensitivity.rows, columns[item.name], log_step) for item in group]
    uppers = [grids.decompose(item.sensitivity.hessian[None], damp)[0] for item in group]

    def made(grid: Product) -> dict[str, Rounded]:
        return {item.name: Rounded(grids.feed_back(item.rows[None], upper, each, grid), each, grid)
                for item, upper, each in zip(group, uppers, steps, strict=True)}  # fmt: skip

    if grid is not None:
        return made(grid)
    wide, half = made(GRID), 2 ** (NARROW.bits - 1)
    least = 2 ** (GRID.bits - 1) - half
    far = sum(int(((each.codes < least) | (each.codes >= least + 2 * half)).sum()) for each in wide.values())
    if far > FEW * sum(item.rows.numel() for item in group):
        return wide
    narrow = made(NARROW)
    does, instead = (sum(damage(item, found[item.name]) for item in group) for found in (wide, narrow))
    return narrow if instead <= DEARER * does else wide


def damage(item: Coded, rounded: Rounded) -> float:
    """KL to the original in nats a prediction, as foretold, of a weight of these codes."""
    change = dequantize(rounded.codes, rounded.steps, rounded.grid) - item.rows
    return 0.5 * float((item.sensitivity.rows[:, None] * (change @ item.sensitivity.hessian) * change).sum())


def _estimated(items: Sequence[Coded], columns: dict[str, Tensor], rate: float) -> float:
    """The step, as a power of 2, at which plain rounding of a sample of rows takes `rate` bits a weight."""
    count = sum(item.rows.numel() for item in items)

    def bits(log_step: float) -> float:
        total = 0.0
        for item in items:
            every = max(1, item.rows.numel() // SAMPLE)
            rows, weight = item.rows[::every], item.sensitivity.rows[::every]
            steps = steps_of(rows, weight, columns[item.name], log_step)
            total += bits_of(encode(rows, steps, GRID), steps) * len(item.rows) / len(rows)
        return total / count

    low, high = -60.0, 20.0
    while high - low > 0.1:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bits(middle) > rate else (low, middle)
    return 0.5 * (low + high)
