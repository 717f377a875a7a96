"""`shrew train RECIPE.toml`: the loop, top to bottom.

A step is a pure function of (weights, optimizer state, seed, step number): batches are computed from the step and the
random generator is seeded by it, so a run that is killed at any step and started again repeats the very same losses.
The thread count changes the order of summation; it is stored in the checkpoint and used again on resume.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shrew import data, files, folder, machine, objectives, spec
from shrew.blocks.detector import ShrewForSequenceClassification, detector
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.patches.lend import asked, lend
from shrew.blocks.stock import adopt, stock
from shrew.data.pairs import DetectSpec, Pairs, Reader
from shrew.data.tokenizer import read_tokenizer, train_tokenizer
from shrew.errors import DataError, FolderError, ShrewError, SpecError, UnsupportedError, UsageError, nearest
from shrew.folder.check import fetch
from shrew.muon import optimizers
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The `[train]` table of a recipe."""

    data: list[str] = doc("text, JSONL or parquet: files, folders, globs, python:train, or a datasets name",
                          default_factory=list)  # fmt: skip
    out: str = doc("model folder to write")
    init: str = doc("model folder to go on from (any causal LM or classifier); default: build [model]", "")
    tokenizer: str = doc("bpe:SIZE to train one on the data, bytes, or a folder with a tokenizer", "bpe:4096")
    entropy: str = doc("folder of a model of bytes whose entropies cut the patches of [model.front]", "", reads="model")
    length: Annotated[int, Meta(ge=8)] = doc("tokens in a row", 512)
    batch_tokens: Annotated[int, Meta(ge=8)] = doc("tokens in a step", 8192)
    micro_rows: Annotated[int, Meta(ge=0)] = doc("rows computed at once, gradients add up; 0: chosen here", 0)
    steps: Annotated[int, Meta(ge=1)] = doc("optimizer steps", 1000)
    optimizer: Literal["muon", "adamw"] = doc("muon: matrices by Muon, the rest by AdamW", "muon")
    lr: Annotated[float, Meta(gt=0, le=1e30)] = doc("peak learning rate (Muon's is matched to AdamW's RMS)", 4e-3)
    warmup: Annotated[int, Meta(ge=0)] = doc("steps of linear warm-up", 100)
    decay: Annotated[float, Meta(ge=0, le=1)] = doc("share of the steps with linear decay to zero at the end", 0.3)
    weight_decay: Annotated[float, Meta(ge=0, le=1e30)] = doc("decoupled weight decay of matrices", 0.1)
    clip: Annotated[float, Meta(ge=0)] = doc("largest gradient norm; 0: off", 1.0)
    ema: Annotated[float, Meta(ge=0, lt=1)] = doc("decay of the averaged weights that are saved; 0: off", 0.0)
    fim: Annotated[float, Meta(ge=0, le=1)] = doc("share of documents rearranged for fill-in-the-middle", 0.0)
    document_mask: bool = doc("keep packed documents apart", True)
    precision: Literal["auto", "fp32", "bf16"] = doc("auto: the faster of both here", "auto")
    compile: bool = doc("torch.compile the model (needs a C++ compiler; worth it for long runs)", False)
    validation: Annotated[float, Meta(ge=0, lt=0.5)] = doc("share of the documents kept for validation", 0.005)
    evaluate_every: Annotated[int, Meta(ge=1)] = doc("steps between validations", 250)
    checkpoint_every: Annotated[int, Meta(ge=1)] = doc("steps between checkpoints", 100)
    threads: Annotated[int, Meta(ge=0, le=machine.MOST_THREADS)] = doc("CPU threads; 0: probed once", 0)
    seed: spec.Seed = doc("seed of weights, order and dropout", 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    train: TrainSpec
    model: ModelSpec = field(default_factory=ModelSpec)
    detect: DetectSpec | None = None

    def __post_init__(self) -> None:
        if not self.train.data and self.detect is None:
            raise SpecError("train.data: name at least one text, or give it with --text.")


def main(argv: list[str]) -> int:
    parser = spec.Parser(prog="shrew train", description="Train a small language model from a recipe.")
    parser.add_argument("recipe", type=Path, help="a TOML file with [train] and [model]")
    parser.add_argument("--json", action="store_true", help="print the last line of the log as JSON")
    parser.add_argument("--text", action="append", default=[], help="train on this instead of the recipe's data")
    spec.add_flags(parser, TrainSpec)
    group = parser.add_argument_group("detectors of vulnerable functions, of recipes with [detect]")
    for flag in ("pairs", "negatives", "languages", "hold-out", "pooling"):
        text = DetectSpec.__dataclass_fields__[flag.replace("-", "_")].metadata["doc"]
        group.add_argument(f"--{flag}", action="append", help=f"{text}; may be repeated")
    spec.add_flags(group, DetectSpec)
    args = parser.parse_args(argv)
    values = spec.read_toml(args.recipe)
    for table, cls in (("train", TrainSpec), ("detect", DetectSpec)):
        some = spec.given(cls, args)
        if cls is TrainSpec and args.text:
            some["data"] = args.text
        if isinstance(values.get(table), dict):
            values[table].update(some)
        elif some and table == "detect":
            raise UsageError(f"{args.recipe} has no [detect], which --{next(iter(some)).replace('_', '-')} is for.")
    recipe = spec.parse(Recipe, values, str(args.recipe))
    files.check_apart(Path(recipe.train.out), [args.recipe])
    result = train(recipe)
    if args.json:
        print(json.dumps(result))
    return 0


def schedule(step: int, item: TrainSpec) -> float:
    """Share of the peak learning rate at a step: linear warm-up, level, linear decay to zero (Hu et al. 2024)."""
    warm = min((step + 1) / max(item.warmup, 1), 1.0)
    cool = min((item.steps - step) / max(item.decay * item.steps, 1), 1.0)
    return min(warm, cool)


class World:
    """This process among those that torchrun started; alone without it."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if self.size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, tensors: list[Tensor]) -> None:
        """Add tensors up over all processes, in place, in one message."""
        if self.size > 1 and tensors:
            flat = torch.cat([item.reshape(-1) for item in tensors])
            torch.distributed.all_reduce(flat)
            for item, part in zip(tensors, flat.split([item.numel() for item in tensors]), strict=True):
                item.copy_(part.view_as(item))

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe to its end (going on from its checkpoint if there is one) and write the model folder."""
    item, world = recipe.train, World()
    run = Path("runs") / f"{Path(item.out).name}-{spec.digest(_identity(recipe))[:8]}"
    out = Path(item.out)
    files.check_writable_target(out, folder.LINEAGE)
    files.check_writable_target(run / "checkpoint", "state.json")
    files.check_apart(out, _read_by(recipe))
    state = _read_state(run)
    machine.keep_memory()
    threads = machine.choose_threads(state.get("threads") or item.threads or None)
    precision = machine.choose_precision(state.get("precision") or item.precision)
    say = _sayer(world.rank == 0)
    say(f"Training {item.out}: {item.steps} steps of {item.batch_tokens} tokens; {threads.reason}; {precision.reason}.")
    if world.rank:
        world.barrier()  # the first process makes the tokenizer and the token stream, which the others then read
    machine.set_seed(item.seed)
    loaded, documents = prepare(recipe, run, say)
    middle = data.fill_in_the_middle(loaded.tokenizer, item.fim) if item.fim else None
    kept, held, hashes = _split_pairs(recipe, loaded, say) if recipe.detect else _split(documents, item, loaded)
    if not world.rank:
        world.barrier()
    model = loaded.model.to(world.device).train()
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters; {_size(kept)}; checkpoints in {run}.")
    loop = Loop(item, world, model, kept, held, run, precision.name == "bf16", say, middle)
    facts = {"threads": threads.count, "precision": precision.name, "data": hashes,
             "steps": item.steps, "decay": item.decay}  # fmt: skip
    loop.resume(state, facts)
    result = loop.run_all(facts)
    if world.rank == 0:
        path = loaded.path
        parent = {"name": path.name, "sha256": folder.identity(path)} if path else None
        lineage: dict[str, Any] = {"parent": parent, "seed": item.seed, "threads": threads.count,
                                   "recipe": spec.dump(recipe), "data": hashes, "moves": []}  # fmt: skip
        final = model.cpu().eval()
        final = stock(final) if isinstance(final, ShrewForCausalLM) else final
        folder.save(replace(loaded, model=final, lineage=lineage), out)
        say(f"Wrote {out}.")
    world.barrier()
    return result


def _read_by(recipe: Recipe) -> list[str | Path]:
    """The files and folders that a run reads."""
    item, detect = recipe.train, recipe.detect or DetectSpec()
    model = fetch(item.init) if item.init else ""
    return [model, item.entropy, item.tokenizer, *item.data, *detect.pairs, *detect.negatives]


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes a run this run. Its length is not part of it: a decay can branch off a trunk that is long enough."""
    free = {"threads", "checkpoint_every", "evaluate_every", "out", "compile", "steps", "decay"}
    values = spec.dump(recipe)
    free |= set() if recipe.train.entropy else {"entropy"}
    values["train"] = {key: value for key, value in values["train"].items() if key not in free}
    return values


def _sayer(speak: bool) -> Any:
    return (lambda text: print(text, file=sys.stderr, flush=True)) if speak else (lambda text: None)


def _size(source: Any) -> str:
    if isinstance(source, Pairs):
        return f"{len(source.pairs):,} pairs and {len(source.ordinary):,} ordinary functions"
    if isinstance(source, data.Stream):
        return f"{len(source.tokens):,} tokens of text ({source.text_bytes / 1e6:.1f} MB)"
    return f"{len(source.texts):,} labelled texts"


def prepare(recipe: Recipe, run: Path, say: Any) -> tuple[folder.Loaded, list[data.Document]]:
    """The model to train with its tokenizer, and the documents (empty for a classifier, which reads labelled rows)."""
    item = recipe.train
    if recipe.detect and not item.init:
        raise SpecError("train.init: a detector starts from a trained model; name its folder (--init).")
    if item.init:
        loaded = folder.load(item.init)
        if loaded.packed:
            raise UsageError(f"{item.init} is quantized and cannot be trained further; start from its original.")
        _check_length(item.length, getattr(loaded.model.config, "max_position_embeddings", None))
        if recipe.detect:
            return _as_detector(loaded, recipe.detect, item), []
        return (loaded, []) if loaded.is_classifier else (_in_our_blocks(loaded, item), data.documents(item.data))
    _check_length(item.length, recipe.model.context)
    documents = data.documents(item.data)
    marks = data.MARKS[0] if item.fim else ()
    if size := spec.parse_bpe(item.tokenizer, len(marks)):
        place = run / f"tokenizer-{size}"
        if not (place / "tokenizer.json").exists():
            say(f"Training a BPE tokenizer of {size} tokens.")
            with files.new_folder(place, "tokenizer.json") as temporary:
                train_tokenizer(documents, size, item.seed, marks=marks).save_pretrained(temporary)
        tokenizer = read_tokenizer(place)
    elif item.tokenizer == "bytes":
        tokenizer = data.byte_tokenizer(marks)
    elif Path(item.tokenizer).is_dir():
        tokenizer = read_tokenizer(Path(item.tokenizer))
    else:
        raise SpecError(f"tokenizer '{item.tokenizer}': give bpe:SIZE, bytes or a folder that holds a tokenizer.")
    shape = recipe.model if recipe.model.vocabulary else replace(recipe.model, vocabulary=len(tokenizer))
    if (shape.vocabulary or 0) < len(tokenizer):
        raise SpecError(f"model.vocabulary {shape.vocabulary} is smaller than the tokenizer's {len(tokenizer)}.")
    if shape.patches and shape.patches.first and item.tokenizer == "bytes":
        raise SpecError(f"front: byte 0 is token 0 of the tokenizer of bytes; leave first = {shape.patches.first} out.")
    if shape.front and size:
        raise SpecError(f'front \'{shape.front.kind}\' reads bytes: write tokenizer = "bytes" in [train].')
    shape, oracle = asked(shape, item.entropy, [document.text for document in documents])
    model = build(shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    if oracle is not None:
        lend(model, oracle)
    return folder.Loaded(model, tokenizer), documents


def _as_detector(loaded: folder.Loaded, detect: DetectSpec, item: TrainSpec) -> folder.Loaded:
    """A detector as it is, and a causal model with the heads of one, whose weights the seed says."""
    if isinstance(loaded.model, ShrewForSequenceClassification):
        loaded.model.config.window, loaded.model.config.comments = item.length, detect.comments
        return loaded
    if loaded.is_classifier:
        raise UsageError(f"{item.init} is a classifier; a detector starts from a causal model or a detector.")
    made = detector(adopt(loaded.model), detect.known_families(), list(detect.pooling), item.length, detect.comments,
                    detect.dropout)  # fmt: skip
    return replace(loaded, model=made)


def _in_our_blocks(loaded: folder.Loaded, item: TrainSpec) -> folder.Loaded:
    """The model to go on from in our blocks, which keep packed documents apart in every mixer, where they can say it.

    Raises UsageError for another one in which they would see each other."""
    try:
        return replace(loaded, model=adopt(loaded.model))
    except UnsupportedError:
        if item.document_mask and _leaks(loaded.model):
            kind = loaded.model.config.model_type
            raise UsageError(f"{item.init}: documents packed in one row would see each other, since a {kind} cannot "
                             "keep them apart; train with document_mask = false.") from None  # fmt: skip
        return loaded


@torch.no_grad()
def _leaks(model: Any) -> bool:
    """Whether a document sees the one before it although its positions start again. That is enough for attention, but
    not for the states and convolutions of stock types."""
    row = torch.arange(16)
    rows = torch.stack([row, torch.cat([row[:8].flip(0), row[8:]])])  # the second documents are equal
    one, other = model(rows, position_ids=_positions(torch.stack([row // 8] * 2)), use_cache=False).logits[:, 8:]
    return not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max()))


def _check_length(length: int, context: int | None) -> None:
    if context is not None and length > context:
        raise SpecError(f"train.length {length} is more than the model's context of {context}; lower the one or raise "
                        "the other (model.context).")  # fmt: skip


def read_labelled(item: TrainSpec, loaded: folder.Loaded) -> data.Labelled:
    """The {"text", "label"} rows of the recipe's JSONL files, checked against the model's labels."""
    texts, labels = [], []
    known = {str(name): int(number) for name, number in loaded.model.config.label2id.items()}
    for source in item.data:
        for number, row in data.read_jsonl(Path(source)):
            if not isinstance(row.get("text"), str) or "label" not in row:
                raise DataError(f'{source}, line {number}: expected {{"text": ..., "label": ...}}.')
            label = str(row["label"])
            if label not in known:
                raise DataError(f"{source}, line {number}: the model has no label '{label}'; {nearest(label, known)}")
            texts.append(row["text"])
            labels.append(known[label])
    if not texts:
        raise DataError(f"{', '.join(item.data)}: no labelled text in it.")
    rows = loaded.tokenizer(texts, truncation=True, max_length=item.length)["input_ids"]
    pad = loaded.tokenizer.pad_token_id
    return data.Labelled(rows, labels, 0 if pad is None else pad, 1, item.seed)


def _split(documents: list[data.Document], item: TrainSpec, loaded: folder.Loaded) -> tuple[Any, Any, dict[str, str]]:
    """(training source, validation source or None, hashes of what was read)."""
    if not documents:
        rows = read_labelled(item, loaded)
        return rows, None, {"train": spec.digest([rows.texts, rows.labels])}
    parts = {"train": documents}
    if item.validation and len(documents) > 1:
        shares = {"train": 1 - item.validation, "validation": item.validation}
        parts = data.split_documents(documents, shares, "validation")
    cache = files.cache_folder()
    streams = {name: data.tokenize(part, loaded.tokenizer, cache) for name, part in parts.items()}
    hashes = {name: spec.digest([document.text for document in part]) for name, part in parts.items()}
    held = streams.get("validation")
    return streams["train"], held if held and held.windows(item.length) else None, hashes


def _split_pairs(recipe: Recipe, loaded: folder.Loaded, say: Any) -> tuple[Pairs, None, dict[str, str]]:
    """As `_split`, for a detector: benchmarks hold projects out, so that nothing is kept for validation."""
    detect, item, tokenizer = recipe.detect or DetectSpec(), recipe.train, loaded.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(f"{item.init}: a detector needs a tokenizer with a tokenizer.json.")
    reader = Reader(detect, tokenizer.backend_tokenizer, loaded.model.config.families)
    pairs, ordinary = reader.pairs(), reader.ordinary()
    for reason, count in sorted(reader.left_out.items()):
        say(f"{count:,} left out: {reason}.")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    source = Pairs(pairs, ordinary, detect.emphasis, detect.share, item.length, first, tokenizer.pad_token_id or 0,
                   item.seed, detect.noise)  # fmt: skip
    return source, None, {"train": source.digest()}


def _read_state(run: Path) -> dict[str, Any]:
    place = run / "checkpoint" / "state.json"
    try:
        return json.loads(place.read_text("utf-8")) if place.exists() else {}
    except (OSError, ValueError) as error:
        raise _unreadable(place.parent, error) from None


def _unreadable(checkpoint: Path, error: Exception) -> FolderError:
    return FolderError(f"{checkpoint} cannot be read ({error}); remove it to start again.")


def _cut(log: Path, step: int) -> None:
    """Keep the lines of the first steps, one each: the later ones, of which the last may be half, come again."""
    if log.exists():
        files.write_text(log, "".join(log.read_text("utf-8").splitlines(keepends=True)[:step]))


class Loop:
    """The training loop's state: model, optimizers, averaged weights, log."""

    def __init__(self, item: TrainSpec, world: World, model: Any, source: Any, held: Any, run: Path, bf16: bool,
                 say: Any, middle: data.Middle | None = None) -> None:  # fmt: skip
        self.item, self.world, self.model, self.run, self.bf16, self.say = item, world, model, run, bf16, say
        self.rows = max(item.batch_tokens // item.length // world.size, 1)
        self.micro = item.micro_rows or max(min(self.rows, 2048 // item.length), 1)
        if isinstance(source, Pairs):  # rows come in twos
            self.rows, self.micro = max(self.rows // 2 * 2, 2), max(self.micro // 2 * 2, 2)
        if isinstance(source, data.Labelled | Pairs):
            self.batches: Any = replace(source, rows=self.rows, rank=world.rank, world=world.size)
        else:
            self.batches = data.Batches(source, item.length, self.rows, item.seed, world.rank, world.size, middle)
        self.held = held
        self.optimizers = optimizers(model, item)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()} if item.ema else {}
        self.step, self.cpu_seconds = 0, 0.0
        self.losses = torch.compile(self._losses) if item.compile else self._losses

    def resume(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Go on from the checkpoint whose state.json is `state`; start afresh if that is empty. `facts` holds what the
        steps up to there depended on besides the recipe, as it is now."""
        if state:
            self._check(state, facts)
            self._load(state)
            self.say(f"Going on from step {self.step}.")
        if self.world.rank == 0:
            _cut(self.run / "log.jsonl", self.step)

    def _check(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        place, step = self.run / "checkpoint", state["step"]
        then = replace(self.item, steps=state.get("steps", self.item.steps), decay=state.get("decay", self.item.decay))
        if step > self.item.steps or any(schedule(i, then) != schedule(i, self.item) for i in range(step)):
            raise UsageError(
                f"{place} is at step {step} of {then.steps} with decay {then.decay:g}; a run of {self.item.steps} "
                f"with decay {self.item.decay:g} had another learning rate by then; remove it to start again."
            )
        if state.get("data", facts["data"]) != facts["data"]:
            raise UsageError(f"the text is no longer the one that {place} was trained on; remove it to start again.")

    def _load(self, state: dict[str, Any]) -> None:
        place, device = self.run / "checkpoint", str(self.world.device)
        try:
            weights = load_file(place / "model.safetensors", device)
            moments = load_file(place / "optimizer.safetensors", device)
            if self.item.ema:
                self.average = load_file(place / "average.safetensors", device)
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _unreadable(place, error) from None
        if unexpected or set(missing) - set(self._tied()):
            raise FolderError(f"{place} does not fit this model; remove it to start again.")
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    found = {key.rpartition("|")[2]: value for key, value in moments.items()
                             if key.rpartition("|")[0] == names[id(p)]}  # fmt: skip
                    optimizer.state[p] = found
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]

    def _tied(self) -> list[str]:
        kept = {name for name, _ in self.model.named_parameters()}
        return [name for name in self.model.state_dict() if name not in kept]

    def save(self, facts: dict[str, Any]) -> None:
        """Write the checkpoint atomically, with `facts` for the check on resuming."""
        if self.world.rank:
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        moments = {
            f"{names[id(p)]}|{key}": value.contiguous()
            for optimizer in self.optimizers
            for p, found in optimizer.state.items()
            for key, value in found.items()
            if isinstance(value, Tensor)
        }
        with files.new_folder(self.run / "checkpoint", "state.json") as temporary:
            weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters()}
            stored = self.model.state_dict().keys()
            weights |= {name: p.contiguous() for name, p in self.model.named_buffers() if name in stored}
            save_file(weights, temporary / "model.safetensors")
            save_file(moments, temporary / "optimizer.safetensors")
            if self.average:
                save_file(self.average, temporary / "average.safetensors")
            state = {"step": self.step, "cpu_seconds": self.cpu_seconds, **facts}
            (temporary / "state.json").write_text(json.dumps(state))

    def _losses(self, tokens: Tensor, targets: Tensor, owner: Tensor, *more: Tensor) -> tuple[Tensor, Tensor | None]:
        """Summed loss in nats of a micro-batch, and what the model adds to it to be trained well (MoE balance,
        losses of early exits)."""
        if isinstance(self.batches, Pairs):
            found: tuple[Tensor, Tensor | None] = self.model.losses(
                tokens, targets, owner, *more, emphasis=self.batches.emphasis)  # fmt: skip
            return found
        if isinstance(self.batches, data.Labelled):
            logits = self.model(input_ids=tokens, attention_mask=owner).logits
            return objectives.classify(logits, targets), None
        if isinstance(self.model, ShrewForCausalLM):
            return self.model.losses(tokens, targets, owner if self.item.document_mask else None)
        # Stock models read document borders from positions that start again at zero.
        positions = _positions(owner) if self.item.document_mask else None
        logits = self.model(tokens, position_ids=positions, use_cache=False).logits
        return objectives.next_token(logits, targets), None

    def take_step(self) -> tuple[float, int]:
        """One optimizer step; (mean loss in nats a target, tokens read)."""
        arrays = self.batches[self.step]
        machine.set_seed(self.item.seed * 1_000_003 + self.step * self.world.size + self.world.rank)
        share = schedule(self.step, self.item)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        count = torch.tensor(float((arrays[1] != objectives.IGNORE).sum()), device=self.world.device)
        self.world.sum([count])
        total = torch.zeros((), device=self.world.device)
        for low in range(0, self.rows, self.micro):
            parts = [torch.from_numpy(array[low : low + self.micro]).to(self.world.device) for array in arrays]
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                loss, penalty = self.losses(*parts)
            ((loss if penalty is None else loss + penalty) / count).backward()
            total += loss.detach()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.world.sum(grads)
        self.world.sum([total])
        mean = (total / count).item()
        if not math.isfinite(mean):  # before the weights are touched
            advice = "lower --lr or raise --warmup, and start again" if self.step else (
                "nothing was learned by then, so weights or factors that it starts with are far too large")  # fmt: skip
            raise ShrewError(f"the loss is {mean} at step {self.step}; {advice}.")
        if self.item.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.item.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(self.item.ema, (1 + self.step) / (10 + self.step))  # short runs would average their start in
            for name, p in self.model.named_parameters() if self.average else ():
                self.average[name].lerp_(p, 1 - keep)
        classifies = isinstance(self.batches, data.Labelled | Pairs)  # one target a text
        return mean, int(arrays[2].sum()) * self.world.size if classifies else int(count.item())

    @torch.no_grad()
    def validate(self, limit: int = 32) -> float:
        """Mean loss in nats per token on up to `limit` held-out windows."""
        self.model.eval()
        length, total, count = self.item.length, 0.0, 0
        batches = data.Batches(self.held, length, 1, 0)
        for index in range(min(self.held.windows(length), limit)):
            arrays = [torch.from_numpy(array).to(self.world.device) for array in batches[index]]
            total += self._losses(*arrays)[0].item()
            count += int((arrays[1] != objectives.IGNORE).sum())
        self.model.train()
        return total / max(count, 1)

    def run_all(self, facts: dict[str, Any]) -> dict[str, Any]:
        """All remaining steps, with log, validation and checkpoints; the last line of the log."""
        item, line, share = self.item, {}, self.world.size
        self.run.mkdir(parents=True, exist_ok=True)
        if self.step == item.steps:
            self.say("All steps are done already.")
            line = json.loads((self.run / "log.jsonl").read_text("utf-8").splitlines()[-1])
        rate = machine.matmul_rate(torch.bfloat16 if self.bf16 else torch.float32)
        flops = flops_per_token(self.model, item.length)
        begun, first, spoken = time.monotonic(), self.step, 0.0
        with (self.run / "log.jsonl").open("a") as log:
            while self.step < item.steps:
                wall, cpu = time.monotonic(), time.process_time()
                loss, tokens = self.take_step()
                wall, cpu = time.monotonic() - wall, time.process_time() - cpu
                self.cpu_seconds += cpu
                line = {"step": self.step, "loss": loss, "tokens_per_second": tokens / wall,
                        "tokens_per_cpu_second": tokens / share / max(cpu, 1e-9),
                        "mfu": flops * tokens / share / wall / rate,
                        "cpu_seconds": self.cpu_seconds}  # fmt: skip
                self.step += 1
                last = self.step == item.steps
                if self.held and (last or self.step % item.evaluate_every == 0):
                    line["validation"] = self.validate()
                if self.world.rank == 0:
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                if last or time.monotonic() - spoken > 10:
                    spoken = time.monotonic()
                    left = (spoken - begun) / (self.step - first) * (item.steps - self.step)
                    self.say(describe(line, item.steps, left))
                if last or self.step % item.checkpoint_every == 0:
                    self.save(facts)
        if self.average:
            self.model.load_state_dict(self.average, strict=False)
        return line


def describe(line: dict[str, Any], steps: int, left: float) -> str:
    """One line of progress."""
    held = f", validation {line['validation']:.3f}" if "validation" in line else ""
    return (
        f"step {line['step'] + 1}/{steps}  loss {line['loss']:.3f}{held}  "
        f"{line['tokens_per_cpu_second']:,.0f} tokens/CPU-s  MFU {line['mfu']:.2f}  "
        f"{timedelta(seconds=round(left))} left"
    )


def flops_per_token(model: Any, length: int) -> int:
    """Training FLOPs of one token: of our own models three times the forward pass as the blocks count it; of others 6
    per weight that multiplies (the head does, the embedding table does not, nor do experts that are not chosen) and 12
    per layer with attention, width and mean context (Kaplan et al. 2020)."""
    if isinstance(model, ShrewForCausalLM | ShrewForSequenceClassification):
        return 3 * model.flops(length // 2, training=True)
    config: Any = model.config
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    if not getattr(config, "tie_word_embeddings", False):
        weights -= model.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    chosen = getattr(config, "num_experts_per_tok", 1) / (getattr(config, "num_experts", 1) or 1)  # 0: a dense one
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return int(6 * (weights - experts * (1 - chosen)) + 12 * layers * config.hidden_size * length / 2)


def _positions(owner: Tensor) -> Tensor:
    """Positions [B, T] that start again where the document number [B, T] changes."""
    place = torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    new = torch.ones_like(owner, dtype=torch.bool)
    new[:, 1:] = owner[:, 1:] != owner[:, :-1]
    return place - torch.where(new, place, 0).cummax(1).values
