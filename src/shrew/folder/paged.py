"""A model whose weights stay in the file: a layer is read when it is called and let go when another one is.

What is quantized is held as its codes alone. So a large model can be compressed layer by layer in less memory than its
weights take. Everything computed is what the model in memory gives, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from shrew import machine
from shrew.errors import FolderError, UnsupportedError
from shrew.folder import Loaded, known
from shrew.folder.check import check_finite, check_shapes, describe, fetch, quiet, read_tensor, read_tokenizer
from shrew.folder.headers import Entry
from shrew.folder.packed import Packed


@dataclass
class Paged(Loaded):
    """`model` has its parameters on the meta device, but for the layer that was called last."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        # What each module has of its own: the name in the file, and the parameter without values.
        self._empty: dict[nn.Module, dict[str, tuple[str, nn.Parameter]]] = {}
        for module in self.model.modules():
            own = {key: (first[id(value)], value) for key, value in module._parameters.items() if value is not None}
            if own:
                self._empty[module] = own
        self._resident: nn.Module | None = None
        layers = _layers(self.model)
        inside = {part for layer in layers for part in layer.modules()}
        for layer in layers:
            layer.register_forward_pre_hook(self._enter)
        for module in self._empty:
            if type(module) is nn.Embedding and module not in inside:
                # Rows are looked up as they are stored, and only those are made float32.
                module.register_forward_pre_hook(lambda module, _: self._fill(module, whole=False))
                module.register_forward_hook(lambda _, __, out: out.float())
            elif module not in inside:
                module.register_forward_pre_hook(lambda module, _: self._fill(module))
            if module not in inside:
                module.register_forward_hook(lambda module, _, __: self._drop(module))

    def weight(self, name: str) -> Tensor:
        if name in self.packed:
            return self.packed[name].dense()
        return self._read(name).to(torch.float32, copy=True)

    def keep(self, name: str, item: Packed) -> None:
        self.packed[name] = item
        self._leave()

    def content(self) -> tuple[dict[str, Tensor], dict[str, Packed]]:
        return {name: self._read(name) for name in self.entries if name not in self.packed}, self.packed

    def _read(self, name: str) -> Tensor:
        return read_tensor(self.entries[name], name)

    def _enter(self, layer: nn.Module, _: Any) -> None:
        if self._resident is not layer and "forward" not in vars(layer):  # else another function runs in its place
            self._leave()
            machine.release_memory()  # of what the last layer's turn took, else 60 MB are lost with each of 0.1 GB
            self._resident = layer
            for module in layer.modules():
                self._fill(module)

    def _leave(self) -> None:
        if self._resident is not None:
            for module in self._resident.modules():
                self._drop(module)
            self._resident = None

    def _fill(self, module: nn.Module, whole: bool = True) -> None:
        for key, (name, _) in self._empty.get(module, {}).items():
            value = self.weight(name) if whole or name in self.packed else self._read(name)
            module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _drop(self, module: nn.Module) -> None:
        for key, (_, empty) in self._empty.get(module, {}).items():
            module._parameters[key] = empty


def load(name: str | Path) -> Paged:
    """The causal model of a folder or of a Hub name, its weights left in the file.

    Raises FolderError for what is wrong with the folder, and UnsupportedError, with the reason, for a sound one whose
    weights cannot be read one by one.
    """
    path = fetch(name)
    entries, stated = describe(path, False)
    if stated.classifier or stated.method:
        what = "a classifier" if stated.classifier else "packed already"
        raise UnsupportedError(f"{path} is {what}, and only dense causal models can be read layer by layer.")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path)
            with _empty_parameters():
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            raise FolderError(f"{path / 'config.json'} describes no model that transformers can build "
                              f"({' '.join(str(error).split())[:250]}).") from None  # fmt: skip
        check_shapes(path, model, entries, stated)
        _check_names(path, model, entries)
        for key, entry in entries.items():
            check_finite(path, key, read_tensor(entry, key))
        if (path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
        tokenizer = read_tokenizer(path, False)
    return Paged(model, tokenizer, path, entries=entries, **known(path, entries))


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Modules made inside have parameters without values, but buffers as they should be."""
    register = nn.Module.register_parameter

    def empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _layers(model: Any) -> list[nn.Module]:
    """The modules of the outermost lists: what is read at once."""
    found: list[nn.Module] = []
    paths: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(outer + ".") for outer in paths):
            found += module
            paths.append(path)
    return found


def _check_names(path: Path, model: Any, entries: dict[str, Entry]) -> None:
    names = {name for name, _ in model.named_parameters()}
    if different := sorted(names ^ set(entries)):
        where = "the model" if different[0] in names else "the file"
        raise UnsupportedError(f"{path} stores its weights in another form than the model has ({different[0]} is only "
                               f"in {where}), so they cannot be read layer by layer.")  # fmt: skip
