"""A model is a spec: `ModelSpec` says it, `ShrewForCausalLM` is it, transformers' Auto classes load it.

Where a stock type can express a spec, `shrew.blocks.stock` gives that model with the same weights, and that is what
gets saved: everything else can read it without Shrew.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from shrew.blocks.attention import Attention, AttentionSpec
from shrew.blocks.layers import Place, RMSNorm, Shape, State
from shrew.blocks.linear import Linear, LinearSpec
from shrew.blocks.memory import Memory, MemorySpec
from shrew.blocks.mlp import Mlp, MlpSpec, Nothing, NothingSpec
from shrew.blocks.moe import MoeSpec, moe_or_mlp
from shrew.errors import SpecError, UsageError, nearest
from shrew.spec import Kinds, Meta, doc, dump, parse

# kind: (spec, block). A block's spec says what is wrong with it at a model's width (`problem`).
MIXERS: dict[str, tuple[Any, Any]] = {
    "attention": (AttentionSpec, Attention),
    "memory": (MemorySpec, Memory),
    "linear": (LinearSpec, Linear),
}
FFNS: dict[str, tuple[Any, Any]] = {
    "mlp": (MlpSpec, Mlp),
    "none": (NothingSpec, Nothing),
    "moe": (MoeSpec, moe_or_mlp),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One causal language model. `pattern` letters name mixers and repeat over the layers."""

    pattern: str = doc("letters of the mixers, repeated", "A")
    layers: Annotated[int, Meta(ge=1)] = doc("number of layers", 6)
    width: Annotated[int, Meta(ge=8)] = doc("width of the residual stream", 256)
    vocabulary: Annotated[int, Meta(ge=2)] | None = doc("number of token ids; default: the tokenizer's", None)
    context: Annotated[int, Meta(ge=2)] = doc("longest context", 1024)
    tied: bool = doc("one matrix for embedding and head", True)
    eps: float = doc("epsilon of the norms", 1e-6)
    norms: Literal["pre", "sandwich"] = doc("norm before each block, or before and after it (Gemma)", "pre")
    embedding_scale: float = doc("factor of the embeddings", 1.0)
    residual_scale: float = doc("factor of what a block adds to the residual stream", 1.0)
    logit_scale: float = doc("factor of the logits", 1.0)
    softcap: Annotated[float, Meta(ge=0)] = doc("logits become softcap tanh(logits / softcap); 0: off", 0.0)
    zero_init: bool = doc("start every block's last matrix at zero, so that a new model is its embedding", False)
    mixers: dict[str, Annotated[Any, Kinds({kind: spec for kind, (spec, _) in MIXERS.items()})]] = field(
        default_factory=lambda: {"A": AttentionSpec()}
    )
    ffn: Annotated[Any, Kinds({kind: spec for kind, (spec, _) in FFNS.items()})] = field(default_factory=MlpSpec)

    def __post_init__(self) -> None:
        if not self.pattern:
            raise SpecError(f"pattern: no letter in it; name a mixer for each layer, known: {', '.join(self.mixers)}.")
        for letter in self.pattern:
            if letter not in self.mixers:
                raise SpecError(f"pattern '{self.pattern}': no mixer '{letter}'; {nearest(letter, self.mixers)}")
        mixers = {f"mixers.{letter}": mixer for letter, mixer in self.mixers.items()}
        for name, block in {**mixers, "ffn": self.ffn}.items():
            if problem := block.problem(self.width):
                raise SpecError(f"{name}: {problem}.")

    def mixer(self, layer: int) -> Any:
        return self.mixers[self.pattern[layer % len(self.pattern)]]


class ShrewConfig(PreTrainedConfig):
    """The transformers side of a spec: `spec` holds it, the rest is derived."""

    model_type = "shrew"
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

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


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec, number: int) -> None:
        super().__init__()
        shape = Shape(spec.width, spec.eps, spec.vocabulary or 0, number)
        mixer = spec.mixer(number)
        self.scale = spec.residual_scale
        self.mixer_norm = RMSNorm(spec.width, spec.eps)
        self.mixer = MIXERS[mixer.kind][1](mixer, shape)
        some = spec.ffn.kind != "none"
        self.ffn_norm = RMSNorm(spec.width, spec.eps) if some else None
        self.ffn = FFNS[spec.ffn.kind][1](spec.ffn, shape)
        self.mixer_after = RMSNorm(spec.width, spec.eps) if spec.norms == "sandwich" else None
        self.ffn_after = RMSNorm(spec.width, spec.eps) if some and spec.norms == "sandwich" else None

    def forward(self, x: Tensor, place: Place, state: Any = None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, d] -> [B, T, d], and the penalty of the ffn, if it has one."""
        y = self.mixer(self.mixer_norm(x), place, state)
        x = x + self.scale * (y if self.mixer_after is None else self.mixer_after(y))
        if self.ffn_norm is None:
            return x, None
        y, penalty = self.ffn(self.ffn_norm(x))
        return x + self.scale * (y if self.ffn_after is None else self.ffn_after(y)), penalty


class Trunk(nn.Module):
    """Embedding, layers and the last norm: everything below the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocabulary or 0, spec.width)
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.layers))
        self.norm = RMSNorm(spec.width, spec.eps)

    def forward(self, place: Place, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, d] of the tokens, and the sum of the layers' penalties (None if there is none)."""
        x = self.embed_tokens(place.tokens)
        if self.spec.embedding_scale != 1:
            x = x * self.spec.embedding_scale
        penalties = []
        for number, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[number]
            x, penalty = layer(x, place, state)
            if isinstance(state, State):
                state.seen += place.positions.shape[1]
            if penalty is not None:
                penalties.append(penalty)
        return self.norm(x), torch.stack(penalties).sum() if penalties else None

    def new_cache(self) -> Cache:
        layers: list[Any] = list(self.layers)
        return Cache(layers=[layer.mixer.init_state() for layer in layers])


class ShrewForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ShrewConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' name and form
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: ShrewConfig) -> None:
        super().__init__(config)
        self.spec = config.parsed()
        self.model = Trunk(self.spec)
        self.lm_head = nn.Linear(self.spec.width, self.spec.vocabulary or 0, bias=False)
        self.post_init()

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
        elif isinstance(module, Layer):
            deep = 0.0 if self.spec.zero_init else 0.02 / (2 * self.spec.layers) ** 0.5
            for block in (module.mixer, module.ffn):
                if not all(hasattr(p, "_is_hf_initialized") for p in block.parameters()):
                    block.start(0.02, deep)

    def hidden(self, tokens: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> last hidden states [B, T, d] and the sum of the layers' penalties; `owner` [B, T] keeps
        packed documents apart (rotary positions are relative, so each is as if alone). The training path."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(Place(tokens, positions, owner))

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., d] -> logits [..., V]."""
        logits = self.lm_head(hidden)
        if self.spec.logit_scale != 1:
            logits = logits * self.spec.logit_scale
        cap = self.spec.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def flops(self, context: int) -> int:
        """Multiply-adds times two of one token's forward pass that sees `context` positions on average."""
        layers: list[Any] = list(self.model.layers)
        each = sum(layer.mixer.flops(context) + layer.ffn.flops() for layer in layers)
        return each + 2 * self.spec.width * (self.spec.vocabulary or 0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, V]; `attention_mask` [B, S] is 0 at padding; `labels` are shifted inside,
        as transformers does."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise UsageError("attention_mask: give it as [rows, positions], 1 for text and 0 for padding.")
        if use_cache and past_key_values is None:
            past_key_values = self.model.new_cache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        place = Place(input_ids, position_ids.expand_as(input_ids), attention_mask, seen)
        x, penalty = self.model(place, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(x[:, keep])
        loss = self.loss_function(logits, labels, self.spec.vocabulary, **kwargs) if labels is not None else None
        if loss is not None and penalty is not None:
            loss = loss + penalty
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """transformers' `generate` would make a cache of keys and values alone."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.model.new_cache()


AutoConfig.register("shrew", ShrewConfig)
AutoModelForCausalLM.register(ShrewConfig, ShrewForCausalLM)


def build(spec: ModelSpec, **kwargs: Any) -> ShrewForCausalLM:
    """A freshly initialised model; `kwargs` go into its config (token ids)."""
    return ShrewForCausalLM(ShrewConfig(dump(spec), **kwargs))
