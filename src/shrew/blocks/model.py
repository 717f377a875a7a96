"""A model is a spec: `ModelSpec` says it, `ShrewForCausalLM` is it, transformers' Auto classes load it.

Where a stock type can express a spec, `shrew.blocks.stock` gives that model with the same weights, and that is what
gets saved: everything else can read it without Shrew.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from shrew import objectives
from shrew.blocks.attention import Attention
from shrew.blocks.depth import EarlyExit
from shrew.blocks.layers import Factored, Place, RMSNorm, runs
from shrew.blocks.mlp import Mlp
from shrew.blocks.patches.trunk import PatchTrunk
from shrew.blocks.specs import FFNS, MIXERS, ModelSpec
from shrew.blocks.trunk import Layer, Trunk
from shrew.errors import SpecError, UsageError
from shrew.spec import dump, parse

__all__ = ["FFNS", "MIXERS", "ModelSpec", "ShrewConfig", "ShrewForCausalLM", "build"]


class ShrewConfig(PreTrainedConfig):
    """The transformers side of a spec: `spec` holds it, the rest is derived."""

    model_type = "shrew"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    exit_threshold: float | None = None  # see ShrewForCausalLM.forward

    def __init__(self, spec: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.spec = spec or {}
        parsed = parse(ModelSpec, {"vocabulary": 256, **self.spec}, "config.json: spec")
        kwargs["tie_word_embeddings"] = parsed.tied
        super().__init__(**kwargs)
        self.vocab_size = parsed.vocabulary
        self.hidden_size, self.num_hidden_layers = parsed.width, parsed.layers
        self.max_position_embeddings = parsed.context

    def parsed(self) -> ModelSpec:
        return parse(ModelSpec, {"vocabulary": self.vocab_size, **self.spec}, "config.json: spec")


class ShrewForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ShrewConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' name and form
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: ShrewConfig) -> None:
        super().__init__(config)
        self.spec = config.parsed()
        self.model = PatchTrunk(self.spec) if self.spec.patches else Trunk(self.spec)
        self.lm_head = nn.Linear(self.model.width, self.spec.vocabulary or 0, bias=False)
        self.exit_counts: Counter[int] = Counter()  # layers run: tokens decoded so, since `generate` was last called
        self.post_init()
        for name, rank in self.spec.ranks.items():
            self._factor(name, rank)

    def _factor(self, name: str, rank: int) -> None:
        """Make a projection two factors. Raises SpecError where there is none of that name, or no rank that saves."""
        block, _, own = name.rpartition(".")
        owner = next((part for path, part in self.model.named_modules() if path == block), None)
        part = getattr(owner, own, None)
        if not isinstance(owner, Attention | Mlp) or not isinstance(part, nn.Linear):
            raise SpecError(f"ranks: '{name}' is no projection of attention, a window or an MLP.")
        if rank > min(part.weight.shape):
            raise SpecError(f"ranks: {rank} is more than '{name}' has ({min(part.weight.shape)}).")
        setattr(owner, own, Factored(part, rank).to(part.weight.device))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers would pass over modules that hold no parameter of their own, and so over every Layer
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        # Normal(0, 0.02), residual outputs scaled by depth (Radford et al. 2019) or zero; a block that wants its own
        # start says so in `start`. Loaded weights are marked and stay.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Layer | PatchTrunk):
            deep = 0.0 if self.spec.zero_init else 0.02 / (2 * self.spec.depth) ** 0.5
            for block in module.blocks():
                if not all(hasattr(p, "_is_hf_initialized") for p in block.parameters()):
                    block.start(0.02, deep)

    def hidden(
        self, tokens: Tensor, owner: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> last hidden states [B, T, d] and the sum of the layers' penalties; `owner` [B, T] keeps
        packed documents apart (rotary positions are relative, so each is as if alone); `kept` gets the exits'."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(Place(tokens, positions, owner), None, kept)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., d] -> logits [..., V]."""
        logits = self.lm_head(hidden)
        if self.spec.logit_scale != 1:
            logits = logits * self.spec.logit_scale
        cap = self.spec.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def losses(self, tokens: Tensor, targets: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The training path: summed loss in nats of tokens [B, T], and what is added to it so that the model is trained
        well (penalties of the blocks; the losses of the exits, in training). No more than `objectives.AT_ONCE`
        logits are ever held."""
        kept: list[Tensor] | None = [] if self.training and self.spec.exits else None
        x, penalty = self.hidden(tokens, owner, kept)
        return self._loss(x, targets), self._added(kept, penalty, targets)

    def healing(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """For distillation: logits [B, T, V] and last hidden states [B, T, d] of right-padded tokens [B, T], and what
        `losses` adds to their loss."""
        kept: list[Tensor] | None = [] if self.training and self.spec.exits else None
        x, penalty = self.hidden(tokens, mask, kept)
        labels = tokens.where(mask.bool(), objectives.IGNORE)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=objectives.IGNORE)
        return self.logits(x), x, self._added(kept, penalty, targets)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        chunk = max(objectives.AT_ONCE // (self.spec.vocabulary or 1), 1)
        return objectives.chunked_next_token(hidden, self.logits, targets, chunk)

    def _added(self, kept: list[Tensor] | None, penalty: Tensor | None, targets: Tensor) -> Tensor | None:
        added = [] if penalty is None else [penalty * (targets != objectives.IGNORE).sum()]
        if kept and self.spec.exits:
            early = torch.stack([self._loss(x, targets) for x in kept])
            added.append(self.spec.exits.weight * early.mean())
        return torch.stack(added).sum() if added else None

    def flops(self, context: int, training: bool = False) -> int:
        """Multiply-adds times two of one token's forward pass that sees `context` positions on average; in training
        with the heads of the exits."""
        heads = 1 + len(self.model.exits) * training
        return self.model.flops(context) + heads * 2 * self.model.width * (self.spec.vocabulary or 0)

    def state_bytes(self, context: int, element: int = 2) -> int:
        """What a cache of one row holds after `context` positions."""
        return self.model.state_bytes(context, element)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        exit_threshold: float | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, T] -> logits [B, T, V]; `attention_mask` [B, S] is 0 at padding. What stands before a hole of
        zeros in a row is a document of its own and is not seen after it. Without a mask and a cache so is what stands
        before `position_ids` that do not count on by one (rows packed by `DataCollatorWithFlattening`).

        `output_hidden_states` and `return_dict` are as in transformers: the states before each layer, then the normed
        last ones; a tuple in place of an object.

        `labels` [B, T] are shifted inside, as transformers does, and count at all positions; with `logits_to_keep` only
        the logits asked for are held as a whole, the loss is summed up in chunks. Penalties are added in training.

        `exit_threshold` (also an argument of `generate` and a key of the config): in decoding, token by token with a
        cache, the model answers from the first exit where every row is at least that confident; None or 1: never.
        What the layers above keep of such a token is computed from the exit's hidden state, not from their own input
        (state propagation, Schuster et al. 2022), so later tokens are an approximation of the full model's. The mixers
        run for that: saved are the feed-forward layers above, and each exit that says no costs a pass of the head.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise UsageError("inputs_embeds: give input_ids instead; blocks of this model read the tokens.")
        if not input_ids.shape[1]:
            raise UsageError("input_ids: there is no token to go on from; give one, like the token that begins a text.")
        past_key_values = self._cache(past_key_values, bool(use_cache))
        place = self._place(input_ids, attention_mask, position_ids, past_key_values)
        kept: list[Tensor] | None = [] if self.training and self.spec.exits and labels is not None else None
        decoding = past_key_values is not None and input_ids.shape[1] == 1 and not self.training
        leave = self._exit(exit_threshold) if decoding else None
        every: list[Tensor] | None = [] if _chosen(output_hidden_states, self.config.output_hidden_states) else None
        x, penalty = self.model(place, past_key_values, kept, leave, every)
        if leave is not None:
            self.exit_counts[leave.layers or self.spec.depth] += len(input_ids)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(x[:, keep]) if leave is None or leave.logits is None else leave.logits
        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=objectives.IGNORE)
            whole = isinstance(logits_to_keep, int) and not logits_to_keep
            loss = objectives.next_token(logits, targets) if whole else self._loss(x, targets)
            added = self._added(kept, penalty, targets) if self.training else None
            count = kwargs.get("num_items_in_batch") or (targets != objectives.IGNORE).sum()
            loss = (loss if added is None else loss + added) / count
        states = None if every is None else tuple(every)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=states)
        return found if _chosen(return_dict, self.config.return_dict) else found.to_tuple()

    def _cache(self, given: Cache | None, wanted: bool) -> Cache | None:
        """The cache of a call; one without layers (transformers' `DynamicCache()`) gets those of this model."""
        if given is None:
            return self.model.new_cache() if wanted else None
        if not given.layers:
            given.layers = self.model.new_cache().layers
        if [type(layer) for layer in given.layers] != self.model.state_kinds:
            raise UsageError("past_key_values: this cache is not of this model; give an empty DynamicCache() or none.")
        return given

    def _place(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None) -> Place:
        seen = cache.get_seq_length() if cache is not None else 0
        total = seen + tokens.shape[1]
        if mask is not None and mask.ndim != 2:
            raise UsageError("attention_mask: give it as [rows, positions], 1 for text and 0 for padding.")
        if mask is not None and mask.shape[1] != total:
            raise UsageError("attention_mask: give it for all positions, those in the cache and the new ones.")
        if positions is None:
            positions = torch.arange(seen, total, device=tokens.device)[None]
        elif mask is None and cache is None:
            mask = runs(positions.diff() != 1).expand_as(tokens)
        return Place(tokens, positions.expand_as(tokens), mask, seen)

    def _exit(self, threshold: float | None) -> EarlyExit | None:
        threshold = self.config.exit_threshold if threshold is None else threshold
        if threshold is None or threshold == 1:
            return None
        if not 0 <= threshold < 1:
            raise UsageError(f"exit_threshold: {threshold} is no confidence; give one from 0 to 1.")
        if not self.spec.exits:
            raise UsageError("exit_threshold: this model has no early exits; train one with [model.exits].")
        return EarlyExit(threshold, self.logits)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; the spec follows, so that the folder of the model loads."""
        if any(getattr(mixer, "value_embeddings", False) for mixer in self.spec.mixers.values()):
            raise UsageError("value_embeddings: their tables cannot be resized; train a model of that vocabulary.")
        found: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        self.spec = self.model.spec = replace(self.spec, vocabulary=found.num_embeddings)
        self.config.spec = {**self.config.spec, "vocabulary": found.num_embeddings}
        return found

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """transformers' `generate` would make a cache of keys and values alone."""
        self.exit_counts.clear()
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.model.new_cache()


def _chosen(given: bool | None, default: bool | None) -> bool:
    return bool(default if given is None else given)


AutoConfig.register("shrew", ShrewConfig)
AutoModelForCausalLM.register(ShrewConfig, ShrewForCausalLM)


def build(spec: ModelSpec, **kwargs: Any) -> ShrewForCausalLM:
    """A freshly initialised model; `kwargs` go into its config (token ids)."""
    return ShrewForCausalLM(ShrewConfig(dump(spec), **kwargs))
