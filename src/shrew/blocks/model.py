"""A model is a spec: `ModelSpec` says it, `ShrewForCausalLM` is it, transformers' Auto classes load it.

Parameter names are Llama's. Where a stock type can express a spec (llama, or qwen3 with QK-norm), `stock` gives that
model with the same weights, and that is what gets saved: everything else can read it without Shrew.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from shrew.blocks.attention import Attention, AttentionSpec, document_mask
from shrew.blocks.layers import RMSNorm, rotary_tables
from shrew.blocks.mlp import Mlp, MlpSpec
from shrew.errors import SpecError, nearest
from shrew.spec import Meta, doc, dump, parse


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
    mixers: dict[str, AttentionSpec] = field(default_factory=lambda: {"A": AttentionSpec()})
    ffn: MlpSpec = field(default_factory=MlpSpec)

    def __post_init__(self) -> None:
        if not self.pattern:
            raise SpecError(f"pattern: no letter in it; name a mixer for each layer, known: {', '.join(self.mixers)}.")
        for letter in self.pattern:
            if letter not in self.mixers:
                raise SpecError(f"pattern '{self.pattern}': no mixer '{letter}'; {nearest(letter, self.mixers)}")
        for letter, mixer in self.mixers.items():
            if mixer.kind != "attention":
                raise SpecError(f"mixers.{letter}: unknown kind '{mixer.kind}'; known: attention.")
            if mixer.heads % (mixer.kv_heads or mixer.heads):
                raise SpecError(f"mixers.{letter}: {mixer.heads} heads are no multiple of {mixer.kv_heads} kv_heads.")
            if mixer.head_width is None and self.width % mixer.heads:
                raise SpecError(f"mixers.{letter}: width {self.width} is no multiple of {mixer.heads} heads.")
            if (mixer.head_width or self.width // mixer.heads) % 2:
                raise SpecError(f"mixers.{letter}: heads of an odd width cannot be rotated; set an even head_width.")
        if self.ffn.kind != "mlp":
            raise SpecError(f"ffn: unknown kind '{self.ffn.kind}'; known: mlp.")

    def mixer(self, layer: int) -> AttentionSpec:
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
        self.input_layernorm = RMSNorm(spec.width, spec.eps)
        self.self_attn = Attention(spec.mixer(number), spec.width, spec.eps)
        self.post_attention_layernorm = RMSNorm(spec.width, spec.eps)
        self.mlp = Mlp(spec.ffn, spec.width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, state: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, state)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and the last norm: everything below the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.vocabulary or 0, spec.width)
        self.layers = nn.ModuleList(Layer(spec, number) for number in range(spec.layers))
        self.norm = RMSNorm(spec.width, spec.eps)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """tokens, positions [B, T] -> hidden states [B, T, d]."""
        x = self.embed_tokens(tokens)
        tables: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}
        for number, layer in enumerate(self.layers):
            mixer: Any = layer.self_attn
            key = (mixer.head_width, self.spec.mixer(number).rope_theta)
            if key not in tables:
                tables[key] = rotary_tables(positions, *key)
            x = layer(x, tables[key], mask, None if cache is None else _state(cache, number, mixer))
        return self.norm(x)


def _state(cache: Cache, number: int, mixer: Attention) -> Any:
    while len(cache.layers) <= number:
        cache.layers.append(mixer.init_state())
    return cache.layers[number]


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

    def _init_weights(self, module: nn.Module) -> None:
        # Normal(0, 0.02), residual outputs scaled by depth (Radford et al. 2019).
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, Layer):
            outputs: list[Any] = [module.self_attn.o_proj, module.mlp.down_proj]
            for last in outputs:
                nn.init.normal_(last.weight, std=0.02 / (2 * self.spec.layers) ** 0.5)
                last._is_hf_initialized = True

    def hidden(self, tokens: Tensor, owner: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> last hidden states [B, T, d]; `owner` [B, T] keeps packed documents apart (rotary
        positions are relative, so each is as if alone). The training path: the loss applies the head."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = None if owner is None else document_mask(owner)
        return self.model(tokens, positions, mask, None)

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
        """input_ids [B, T] -> logits [B, T, V]; `labels` are shifted inside, as transformers does."""
        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[])
        seen = past_key_values.get_seq_length() if past_key_values is not None and past_key_values.layers else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
            position_ids = position_ids.expand_as(input_ids)
        mask = None
        if attention_mask is not None or (seen and input_ids.shape[1] > 1):
            mask = create_causal_mask(
                config=self.config, inputs_embeds=self.model.embed_tokens(input_ids), attention_mask=attention_mask,
                past_key_values=past_key_values if seen else None, position_ids=position_ids,
            )  # fmt: skip
        x = self.model(input_ids, position_ids, mask, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = self.loss_function(logits, labels, self.spec.vocabulary, **kwargs) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("shrew", ShrewConfig)
AutoModelForCausalLM.register(ShrewConfig, ShrewForCausalLM)


def build(spec: ModelSpec, **kwargs: Any) -> ShrewForCausalLM:
    """A freshly initialised model; `kwargs` go into its config (token ids)."""
    return ShrewForCausalLM(ShrewConfig(dump(spec), **kwargs))


def stock(model: ShrewForCausalLM) -> PreTrainedModel:
    """The same model as a stock transformers type (llama, or qwen3 where it has QK-norm), sharing no memory with
    `model`; the model itself where neither can say its spec (mixers that differ from layer to layer)."""
    spec = model.spec
    kinds = {spec.mixer(number) for number in range(spec.layers)}
    if len(kinds) > 1:
        return model
    mixer = kinds.pop()
    config_class: Any = Qwen3Config if mixer.qk_norm else LlamaConfig
    config = config_class(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers,
        intermediate_size=spec.ffn.hidden or 3 * spec.width, num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads or mixer.heads, head_dim=mixer.head_width or spec.width // mixer.heads,
        max_position_embeddings=spec.context, rms_norm_eps=spec.eps, tie_word_embeddings=spec.tied,
        rope_parameters={"rope_type": "default", "rope_theta": mixer.rope_theta},
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    same = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    same.load_state_dict(model.state_dict())
    same.tie_weights()
    return same.eval()
