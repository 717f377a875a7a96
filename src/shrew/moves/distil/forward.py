"""One forward pass of any model with given parameters, and what of it can be compared with another model's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from shrew.blocks.model import ShrewForCausalLM
from shrew.errors import UnsupportedError


@dataclass(frozen=True)
class Found:
    """Logits [B, T, V] (of a classifier [B, classes]), last hidden states [B, T, d], the last attention map
    [B, H, T, T], and what is added to the loss in training; None where it was not asked for or there is none."""

    logits: Tensor
    hidden: Tensor | None = None
    attention: Tensor | None = None
    added: Tensor | None = None


def run(
    model: Any, values: dict[str, Tensor], tokens: Tensor, mask: Tensor, hidden: bool = False, attention: bool = False
) -> Found:
    """`model` with these parameters (none: its own) on tokens and mask [B, T]."""
    if isinstance(model, ShrewForCausalLM):
        named = {f"model.{name}": value for name, value in values.items()}
        return Found(*functional_call(_Healing(model), named, (tokens, mask)))
    more: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    more |= {"output_attentions": True} if attention else {}
    if not type(model).__name__.endswith("ForSequenceClassification"):
        more["use_cache"] = False
    found = functional_call(model, values, (), {"input_ids": tokens, "attention_mask": mask, **more})
    return Found(found.logits, found.hidden_states[-1] if hidden else None, _last(model, found) if attention else None)


def _last(model: Any, found: Any) -> Tensor:
    maps: list[Tensor] = [item for item in found.attentions or () if item is not None]
    if not maps:
        raise UnsupportedError(f"{model.config.model_type} shows no attention maps; set attention = 0.")
    return maps[-1]


class _Healing(nn.Module):
    """`ShrewForCausalLM.healing` as a module, for `functional_call`."""

    def __init__(self, model: ShrewForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        logits, hidden, added = self.model.healing(tokens, mask)
        return logits, hidden, None, added


@contextmanager
def showing_attention(models: list[Any]) -> Iterator[None]:
    """Attention is computed within so that its maps can be seen. Raises UnsupportedError for models that have none."""
    before = []
    try:
        for model in models:
            if isinstance(model, ShrewForCausalLM):
                raise UnsupportedError("attention maps cannot be seen in models of our own type; set attention = 0.")
            before.append((model, model.config._attn_implementation))
            model.set_attn_implementation("eager")
        yield
    finally:
        for model, name in before:
            model.set_attn_implementation(name)
