"""mamba2: layers of a `linear` mixer in its Mamba-2 form, and no feed-forward layers."""

from dataclasses import replace
from typing import Any

from transformers import Mamba2Config

from shrew.blocks.linear import LinearSpec
from shrew.blocks.mlp import NothingSpec
from shrew.blocks.model import ModelSpec
from shrew.blocks.stock.adapter import Adapter, Weights
from shrew.blocks.stock.dense import plain

CONTEXT = 2048  # the config has none; what Mamba-2 was trained on
OUTSIDE = {"model.embed_tokens.": "backbone.embeddings.", "model.norm.": "backbone.norm_f.", "model.": "backbone."}
PARTS = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "decay_bias": "dt_bias"}


def ssm(mixer: Any, width: int) -> LinearSpec | None:
    """The mixer with every default said, if it is exactly Mamba-2's."""
    if mixer.kind != "linear":
        return None
    groups, head_width = mixer.groups or mixer.heads, mixer.head_width or width // mixer.heads
    found = replace(mixer, groups=groups, head_width=head_width, norm_groups=mixer.norm_groups or mixer.heads)
    wanted = ssm_spec(mixer.heads, mixer.state, head_width, groups, mixer.conv, mixer.conv_bias, mixer.bias,
                      mixer.chunk)  # fmt: skip
    whole = mixer.heads * head_width % width == 0  # the configs say the inner width as a multiple of the model's
    return found if found == wanted and mixer.conv > 1 and whole else None


def ssm_spec(heads: int, state: int, head_width: int, groups: int, conv: int, conv_bias: bool, bias: bool,
             chunk: int) -> LinearSpec:  # fmt: skip
    return LinearSpec(heads=heads, state=state, head_width=head_width, groups=groups, decay="dt", conv=conv,
                      conv_bias=conv_bias, gate="before", norm_groups=groups, skip=True, bias=bias,
                      chunk=chunk)  # fmt: skip


def conv_out(weights: Weights) -> Weights:
    """Convolution weights [C, K] as `Conv1d` holds them, [C, 1, K]."""
    return {name: x.unsqueeze(1) if name.endswith("conv1d.weight") else x for name, x in weights.items()}


def conv_back(weights: Weights) -> Weights:
    return {name: x.squeeze(1) if name.endswith("conv1d.weight") else x for name, x in weights.items()}


def _config(spec: ModelSpec) -> Mamba2Config | None:
    mixers = {ssm(spec.mixer(number), spec.width) for number in range(spec.layers)}
    mixer = next(iter(mixers))
    if len(mixers) > 1 or mixer is None or spec.ffn != NothingSpec() or not plain(spec):
        return None
    return Mamba2Config(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.layers, num_heads=mixer.heads,
        head_dim=mixer.head_width, expand=mixer.heads * (mixer.head_width or 0) // spec.width, state_size=mixer.state,
        n_groups=mixer.groups, conv_kernel=mixer.conv, use_conv_bias=mixer.conv_bias, use_bias=mixer.bias,
        chunk_size=mixer.chunk, layer_norm_epsilon=spec.eps, tie_word_embeddings=spec.tied, residual_in_fp32=False,
        max_position_embeddings=spec.context,
    )  # fmt: skip


def _spec(config: Any) -> ModelSpec | None:
    # `residual_in_fp32` differs from ours in rounding alone, and only below float32
    if config.hidden_act != "silu" or tuple(config.time_step_limit) != (0.0, float("inf")) or config.conv_kernel < 2:
        return None
    mixer = ssm_spec(config.num_heads, config.state_size, config.head_dim, config.n_groups, config.conv_kernel,
                     config.use_conv_bias, config.use_bias, config.chunk_size)  # fmt: skip
    return ModelSpec(layers=config.num_hidden_layers, width=config.hidden_size, vocabulary=config.vocab_size,
                     context=getattr(config, "max_position_embeddings", CONTEXT), tied=config.tie_word_embeddings,
                     eps=config.layer_norm_epsilon, mixers={"A": mixer}, ffn=NothingSpec())  # fmt: skip


def _names(spec: ModelSpec, layer: int) -> dict[str, str]:
    return {"mixer_norm": "norm"} | {f"mixer.{ours}": f"mixer.{theirs}" for ours, theirs in PARTS.items()}


def _outside(weights: Weights, table: dict[str, str]) -> Weights:
    """The parts that stand outside of layers renamed, by the first prefix that fits."""
    found = {}
    for name, value in weights.items():
        old = next((old for old in table if name.startswith(old)), "")
        found[table.get(old, "") + name.removeprefix(old)] = value
    return found


MAMBA2 = Adapter(
    _config, _spec, _names,
    out=lambda spec, weights: _outside(conv_out(weights), OUTSIDE),
    back=lambda spec, weights: _outside(conv_back(weights), {theirs: ours for ours, theirs in OUTSIDE.items()}),
)  # fmt: skip
