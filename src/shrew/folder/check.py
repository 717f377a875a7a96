"""What is wrong with a model folder, in one sentence; and the loading that follows when nothing is."""

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shrew.errors import FolderError
from shrew.folder import compressed, packed, sparse
from shrew.folder.headers import Entry, read_headers, read_json
from shrew.folder.packed import Packed

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
STARTER = Path(__file__).parents[1] / "models" / "starter"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
CLASSIFIER = "ForSequenceClassification"
ALIGNED = 8  # channels of bf16, twice as many as of float32: 16 bytes


@dataclass(frozen=True)
class Stated:
    """What config.json says that matters before loading: the kind of model, and the packed and the sparse weights by
    name."""

    classifier: bool
    method: str = ""
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    sparse: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The end of a weight's name that the names of its parts replace."""
        return ".weight" if self.method == compressed.METHOD else ""

    @property
    def parts(self) -> tuple[str, ...]:
        return compressed.PARTS if self.method == compressed.METHOD else packed.PARTS


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or reports of other libraries inside the block; afterwards all is as it was."""
    noisy = transformers.utils.logging
    level, bars = noisy.get_verbosity(), noisy.is_progress_bar_enabled()
    noisy.set_verbosity(logging.CRITICAL)
    noisy.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.set_verbosity(level)
        if bars:
            noisy.enable_progress_bar()


def fetch(name: str | Path) -> Path:
    """The local folder for a path, a Hub name, or "starter"."""
    text = str(name)
    if text == "starter":
        return STARTER
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = "give the model folder that holds config.json"
        if path.suffix == ".gguf":
            hint = f"`shrew pack {path} --to folder` makes a model folder of it"
        raise FolderError(f"{path} is a file; {hint}.")
    if not HUB_NAME.fullmatch(text):
        raise FolderError(f"There is no model folder at {path}; check the path.")
    try:
        kept = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=kept))
    except Exception as error:  # the hub raises its own, httpx's and OS errors; each means "not to be had"
        raise FolderError(f"'{text}' is no folder here and could not be fetched from the Hub "
                          f"({_short(error)}); check the name or the connection.") from None  # fmt: skip


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:250].rstrip(".:") or type(error).__name__


def describe(path: Path, trust_remote_code: bool) -> tuple[dict[str, Entry], Stated]:
    """Check config.json and every header of a folder; returns the tensors of its files and what config.json states."""
    if not path.is_dir():
        raise FolderError(f"There is no model folder at {path}; check the path.")
    if (path / "adapter_config.json").exists():
        raise FolderError(f"{path} holds an adapter, not a whole model; merge it into its base model first.")
    if (path / "pack.json").exists() and not (path / "config.json").exists():
        raise FolderError(f"{path} is packed already; give the model folder that it was made from.")
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise FolderError(f"{path / 'config.json'} names no model_type, so nothing can tell what model this is.")
    if config.get("auto_map") and not trust_remote_code:
        raise FolderError(f"{path} wants to run its own Python code (auto_map in config.json); if you have read it and "
                          "trust it, load it in Python with trust_remote_code=True.")  # fmt: skip
    if config.get("transformers_weights"):
        raise FolderError(f"{path / 'config.json'} redirects the weights to another file (transformers_weights); "
                          "remove that key.")  # fmt: skip
    names = config.get("architectures") or [CAUSAL[0]]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise FolderError(f"{path / 'config.json'} has architectures that are no list of names.")
    if not names[0].endswith((*CAUSAL, CLASSIFIER)):
        raise FolderError(f"{path} holds a {names[0]}; Shrew works on causal language models and sequence classifiers.")
    classifier = names[0].endswith(CLASSIFIER)
    entries = read_headers(path, classifier)
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        if type(config.get(key)) is int and config[key] > max(1000, len(entries)):
            raise FolderError(f"{path / 'config.json'} asks for {config[key]} layers, and the weights hold "
                              f"{len(entries)} tensors; the two do not belong together.")  # fmt: skip
    quantization = config.get("quantization_config")
    if not quantization:
        return entries, Stated(classifier)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == packed.METHOD:
        packed.check_entries(str(path), quantization, entries)
        return entries, Stated(classifier, method, quantization["tensors"],
                               sparse.check_entries(str(path), quantization, entries))  # fmt: skip
    if method == compressed.METHOD:
        return entries, Stated(classifier, method, compressed.read_entries(str(path), quantization, entries))
    raise FolderError(f"{path} is quantized with '{method}', which Shrew does not read; start from the model it was "
                      "made from.")  # fmt: skip


def common_dtype(entries: dict[str, Entry]) -> torch.dtype:
    """What most dense bytes of a folder are stored in; bf16 when all are packed."""
    sizes: Counter[str] = Counter()
    for name, entry in entries.items():
        if entry.dtype in TORCH_DTYPES and not name.endswith(packed.PARTS + compressed.PARTS):
            sizes[entry.dtype] += entry.bytes
    return TORCH_DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.bfloat16


def read_model(path: Path, entries: dict[str, Entry], stated: Stated, trust_remote_code: bool) -> tuple[Any, Any]:
    """The model (float32, eval) and tokenizer of a folder that `describe` accepted; raises FolderError."""
    packed.register()
    auto = AutoModelForSequenceClassification if stated.classifier else AutoModelForCausalLM
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            if stated.method:
                config.quantization_config = {"quant_method": packed.METHOD, "tensors": stated.tensors,
                                              "layout": stated.method, "sparse": stated.sparse}  # fmt: skip
            with torch.device("meta"):
                empty = auto.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise FolderError(f"{path / 'config.json'} describes no model that transformers {transformers.__version__} "
                              f"can build ({_short(error)}).") from None  # fmt: skip
        check_shapes(path, empty, entries, stated)
        for name, meaning in stated.sparse.items():
            bitmap = name + sparse.PARTS[0]
            sparse.check_bitmap(str(path), name, read_tensor(entries[bitmap], bitmap), meaning)
        try:
            loaded: Any = auto.from_pretrained(
                path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code)  # fmt: skip
            model, report = loaded
        except Exception as error:
            raise FolderError(f"{path} cannot be loaded ({_short(error)}).") from None
        _check_report(path, report)
        for name, parameter in model.named_parameters():
            check_finite(path, name, parameter.detach())
        _run_experts(model)
        tokenizer = read_tokenizer(path, trust_remote_code)
    return model.eval(), tokenizer


def _run_experts(model: Any) -> None:
    """One expert after the other where torch's product of groups refuses their rows, which are no multiple of 16 bytes.
    """
    stacks = [value for name, value in model.named_parameters() if value.ndim == 3 and ".experts." in name]
    if any(size % ALIGNED for stack in stacks for size in stack.shape[1:]):
        model.set_experts_implementation("eager")


def read_tokenizer(path: Path, trust_remote_code: bool) -> Any:
    """Raises FolderError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise FolderError(f"{path} has no tokenizer that loads ({_short(error)}); copy the tokenizer files of the "
                          "original model into it.") from None  # fmt: skip


def check_shapes(path: Path, empty: Any, entries: dict[str, Entry], stated: Stated) -> None:
    """Compare shapes by name before any memory is taken, so that a config that lies costs nothing."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    stored = [*stated.tensors.items(), *stated.sparse.items()]
    found = {name: tuple(meaning["shape"]) for name, meaning in stored}
    found |= {name: entry.shape for name, entry in entries.items() if name in shapes}
    for name, shape in found.items():
        if name in shapes and shape != shapes[name]:
            raise _shape_error(path, name, shape, shapes[name])
    needed = sum(parameter.numel() for parameter in empty.parameters())
    parts = packed.PARTS + compressed.PARTS + sparse.PARTS if stored else ("\0",)
    have = sum(math.prod(entry.shape) for name, entry in entries.items() if not name.endswith(parts))
    have += sum(math.prod(meaning["shape"]) for _, meaning in stored)
    if needed > 2 * have + 1_000_000:
        raise FolderError(f"{path}: config.json describes {needed} weights and the files hold {have}; "
                          "the two do not belong together.")  # fmt: skip


def _shape_error(path: Path, name: str, found: Sequence[int], wanted: Sequence[int]) -> FolderError:
    return FolderError(f"{path}: '{name}' has the shape {list(found)} in the weights and {list(wanted)} by "
                       "config.json; the two do not belong together.")  # fmt: skip


def _check_report(path: Path, report: dict[str, Any]) -> None:
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise _shape_error(path, name, found, wanted)
    for key, what in (("missing_keys", "is missing from the weights, though config.json asks for it"),
                      ("unexpected_keys", "is in the weights, but config.json has no place for it")):  # fmt: skip
        if report[key]:
            name, others = min(report[key]), len(report[key]) - 1
            more = f" (and {others} more)" if others else ""
            raise FolderError(f"{path}: '{name}'{more} {what}; the two do not belong together.")


def check_finite(path: Path, name: str, value: Tensor) -> None:
    # A sum is finite unless something in it is not (or it overflows), and is cheaper than looking at each.
    if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
        raise FolderError(f"{path}: '{name}' contains NaN or infinite weights; use another copy of the model.")


def read_packed(model: Any, entries: dict[str, Entry], stated: Stated) -> dict[str, Packed]:
    """The codes of every packed weight, under the name that the model gives its parameter."""
    read = compressed.from_parts if stated.method == compressed.METHOD else packed.from_parts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for name, meaning in stated.tensors.items():
        module = name.removesuffix(stated.stem)
        parts = {
            part.lstrip("."): read_tensor(entries[module + part], module + part)
            for part in stated.parts
            if module + part in entries
        }
        found[names[id(model.get_parameter(name))]] = read(parts, meaning)
    return found


def read_tensor(entry: Entry, name: str) -> Tensor:
    """A tensor as the file holds it: its pages are read when they are looked at."""
    with safe_open(entry.file, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
    return tensor
