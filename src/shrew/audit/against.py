"""The deployed artefact itself against the original: its numbers decoded, run and scored like any model.

Weights are decoded exactly and computed in float32; what a kernel rounds on top of that (activations in 8 bits, sums in
16) is not seen, except in our own packs, whose graph is what runs here too.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from shrew import folder, measure, record
from shrew.audit import decode
from shrew.audit.folders import config_of, entries_of, stated_of
from shrew.audit.held import Audit
from shrew.audit.layouts import assemble
from shrew.errors import FolderError, UnsupportedError, UsageError
from shrew.folder import Loaded, compressed, packed
from shrew.folder.check import quiet
from shrew.folder.headers import INDEX, SINGLE
from shrew.record import Record
from shrew.tasks import Scores, Task

SHARD = 2_000_000_000  # bytes
TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")
CONV1D = ("gpt2", "openai-gpt")  # their layers hold [inputs, outputs], which quantizers store turned


def deployed(audit: Audit) -> Loaded:
    """The model of an artefact with the numbers that it holds. Raises UsageError where that is not to be had."""
    path = audit.path
    if audit.format == "GGUF":
        from shrew.packers.gguf.back import read

        return read(path)[0]
    if audit.format == "ONNX":
        return _graph(path.parent)
    if path.is_file():
        if path.name != SINGLE or not (path.parent / "config.json").exists():
            raise UnsupportedError(f"{path} is one file of weights; give the model folder that it belongs to.")
        path = path.parent
    stated, _ = stated_of(path, config_of(path))
    method, known = stated.get("quant_method"), assemble(entries_of(path))[0]
    plainly = all(weight.kind == "packed" and ".weight_g_idx" not in parts.found for parts, weight in known.values())
    if (not stated and not known) or method == packed.METHOD or (method == compressed.METHOD and plainly):
        return folder.load(path)
    if not known:
        raise UnsupportedError(f"{path}: weights of '{str(method)[:40]}' are not decoded here.")
    with tempfile.TemporaryDirectory() as name:
        _write_dense(path, Path(name), stated)
        return folder.load(name)


def _write_dense(path: Path, out: Path, stated: dict[str, Any]) -> None:
    """The same model with every weight decoded, float32, a weight in memory at a time."""
    known, rest = assemble(entries_of(path))
    config = config_of(path)
    turned = config.get("model_type") in CONV1D
    free = shutil.disk_usage(out).free
    total = 4 * sum(int(np.prod(weight.shape)) for _, weight in known.values()) + 4 * sum(
        item.bytes for item in rest.values())  # fmt: skip
    if total > free:
        raise UsageError(f"decoding {path} takes {total:,} bytes in {out.parent}, where {free:,} are free; set TMPDIR.")
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def write() -> None:
        file = f"part-{len(set(places.values())):05}.safetensors"
        save_file(shard, out / file)
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name in [*known, *rest]:
        if name in known:
            parts, weight = known[name]
            if "_blocks" in parts.found:
                raise UnsupportedError(f"{path}: experts in blocks of MXFP4 are not decoded here.")
            value = decode.dense(parts, weight, stated)
            value = value.T if turned and weight.quantized and value.dim() == 2 else value
        else:
            value = decode.tensor(rest[name])
        shard[name] = (value.float() if value.is_floating_point() else value).contiguous()
        if sum(item.nbytes for item in shard.values()) > SHARD:
            write()
    if shard:
        write()
    index = {"metadata": {}, "weight_map": places}
    (out / INDEX).write_text(json.dumps(index), "utf-8")
    for item in {item for pattern in TEXTS for item in path.glob(pattern)}:
        if item.name not in ("config.json", INDEX):
            shutil.copyfile(item, out / item.name)
    for key in ("quantization_config", "compression_config"):
        config.pop(key, None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), "utf-8")


class _Graph(nn.Module):
    """A pack of ours as a module, one text at a time."""

    generation_config: Any = None

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.pack, found = pack, pack.manifest
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)  # where scorers look for the device
        self.config: Any = SimpleNamespace(
            vocab_size=found.vocabulary, max_position_embeddings=found.context, num_labels=len(found.labels or ()),
            id2label=dict(enumerate(found.labels or ())), pad_token_id=found.pad or 0,
            get_text_config=lambda: self.config)  # fmt: skip


class GraphForCausalLM(_Graph):
    def _runner(self, length: int) -> Any:
        from shrew.packers.onnx.check import Runner

        found = self.pack.manifest
        return Runner(self.pack.graph, found.states, length, found.chunk, found.align)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.pack.manifest.vocabulary)
        runner = self._runner(input_ids.shape[1])
        for row, (tokens, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            length = int(mask.sum())  # padding stands on the right
            runner.start()
            logits[row, :length] = torch.from_numpy(runner.feed(tokens[:length].numpy()))
        return SimpleNamespace(logits=logits)

    def generate(self, ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        """Greedy tokens after prompts that are padded on the left: [rows, prompt + new]."""
        steps, end = generation_config.max_new_tokens, generation_config.eos_token_id
        runner = self._runner(ids.shape[1] + steps)
        found = torch.full((len(ids), steps), generation_config.pad_token_id)
        for row, (tokens, mask) in enumerate(zip(ids, attention_mask, strict=True)):
            runner.start()
            logits = runner.feed(tokens[int((mask == 0).sum()) :].numpy())
            for step in range(steps):
                found[row, step] = token = int(logits[-1].argmax())
                if token == end or step == steps - 1:
                    break
                logits = runner.feed([token])
        return torch.cat([ids, found], 1)


class GraphForSequenceClassification(_Graph):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        rows = [tokens[: int(mask.sum())].tolist() for tokens, mask in zip(input_ids, attention_mask, strict=True)]
        return SimpleNamespace(logits=torch.from_numpy(self.pack.classify(rows)))


def _graph(path: Path) -> Loaded:
    from shrew import runtime

    if not (path / "pack.json").exists():
        raise UnsupportedError(f"{path} is no pack of Shrew's: its graph has inputs that only its own runtime knows.")
    pack = runtime.load(path)
    if pack.manifest.kind == "detector":
        raise UnsupportedError(f"{path} is a detector, which `shrew scan` runs; audit the model folder it came from.")
    kind = GraphForCausalLM if pack.manifest.labels is None else GraphForSequenceClassification
    with quiet(), tempfile.TemporaryDirectory() as place:  # transformers would read files that the pack does not list
        for name in pack.manifest.files:
            if any(Path(name).match(kind) for kind in TEXTS):
                shutil.copyfile(path / name, Path(place) / name)
        pack.tokenizer.save(str(Path(place) / "tokenizer.json"))
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
        except Exception as error:
            raise FolderError(f"{path} has no tokenizer that transformers loads ({error}).") from None
    return Loaded(kind(pack).eval(), tokenizer, path)


def records(
    label: str, artefact: Loaded, name: str, original: Loaded, jobs: Sequence[Task], split: str, seed: int,
    say: Callable[[str], None],
) -> list[Record]:  # fmt: skip
    """What the artefact lost: everything that `shrew measure` says of quality, and answers that flipped."""
    run, found = f"audit {record.now()}", []
    for task in jobs:
        say(f"measuring {name} on {task.label}/{split}")
        old = task.score(original, split)
        say(f"measuring {label} on {task.label}/{split}")
        new = task.score(artefact, split, original)
        if task.kind == "text" and "kl_bits" not in new.columns:
            say("the two cut texts into other tokens: no KL, no agreement of the first choice")
        found += measure.quality_records(run, name, old, seed=seed)
        found += measure.quality_records(run, label, new, old, name, seed=seed)
        if "correct" in new.columns:
            found.append(flipped(run, label, old, new, name, seed))
    return found


def flipped(run: str, label: str, old: Scores, new: Scores, against: str, seed: int) -> Record:
    """The share of examples whose answer changed, with how many were lost and won by that."""
    old.check_pair(new)
    key = "guess" if "guess" in new.columns else "correct"
    changed = (old.columns[key] != new.columns[key]).astype(np.float64)
    share = measure.interval(Scores(new.task, new.split, "accuracy", new.units, {"correct": changed}), seed=seed)
    gap = new.columns["correct"] - old.columns["correct"]
    detail = {"units": "examples", "against": against, "lost": int((gap < 0).sum()), "won": int((gap > 0).sum()),
              "other": int(changed.sum() - (gap != 0).sum())}  # fmt: skip
    return Record(run=run, model=label, metric="flipped_answers", value=share.value, low=share.low, high=share.high,
                  n=share.n, task=f"{new.task}/{new.split}", seed=seed, detail=detail)  # fmt: skip
