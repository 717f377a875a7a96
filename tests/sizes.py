"""How much memory a block asks for at once."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """`size`: elements of the largest memory behind any tensor made; those of exactly `apart` elements do not count."""

    def __init__(self, apart: int = 0) -> None:
        super().__init__()
        self.apart, self.size = apart, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in made if isinstance(made, tuple | list) else [made]:
            if isinstance(part, Tensor):
                size = part.untyped_storage().nbytes() // part.element_size()
                self.size = max(self.size, size if size != self.apart else 0)
        return made
