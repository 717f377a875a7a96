"""A detector of vulnerable functions: a causal trunk of our blocks and three linear heads.

A function is judged by its pooled hidden states, which CWE family it is of by the same, and each of its tokens by its
own; the mean over a line's tokens is the line's score. To other tools it is a classifier of two labels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

from shrew import objectives
from shrew.blocks.layers import Place, RMSNorm
from shrew.blocks.model import Layer, ShrewConfig, ShrewForCausalLM, Trunk
from shrew.objectives import Emphasis
from shrew.spec import dump

LABELS = {0: "ordinary", 1: "vulnerable"}
FAR = -1e30  # in place of minus infinity, of which a difference would be no number


class DetectorConfig(ShrewConfig):
    """`window`: tokens that it was trained on and judges at once, with the one that every text begins with."""

    model_type = "shrew-detector"

    def __init__(
        self, spec: dict[str, Any] | None = None, families: list[str] | None = None, pooling: list[str] | None = None,
        window: int = 512, comments: bool = False, dropout: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        kwargs = {"id2label": dict(LABELS), "label2id": {name: number for number, name in LABELS.items()}} | kwargs
        super().__init__(spec, **kwargs)
        self.families, self.pooling = families or ["unknown"], pooling or ["mean"]
        self.window, self.comments, self.dropout = window, comments, dropout


@dataclass
class Detection(ModelOutput):
    """`logits` [B, 2] of the labels (0 and the logit of being vulnerable), `families` [B, K], `lines` [B, T]: what each
    token adds to the score of its line."""

    logits: Tensor | None = None
    families: Tensor | None = None
    lines: Tensor | None = None


class ShrewForSequenceClassification(PreTrainedModel):
    config_class = DetectorConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__(config)
        self.spec = config.parsed()
        self.model = Trunk(self.spec)
        pooled = self.spec.width * len(config.pooling)
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(pooled, 1)
        self.family = nn.Linear(pooled, len(config.families))
        self.line = nn.Linear(self.spec.width, 1)
        self.post_init()
        ours: Any = self
        for name, rank in self.spec.ranks.items():
            ShrewForCausalLM._factor(ours, name, rank)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # transformers would pass over modules without a parameter of their own

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Layer | RMSNorm):
            ours: Any = self
            ShrewForCausalLM._init_weights(ours, module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Detection:
        """input_ids [B, T], padded at the right where `attention_mask` [B, T] is 0."""
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        logits, families, lines, _ = self.judge(input_ids, mask)
        return Detection(torch.stack([torch.zeros_like(logits), logits], 1), families, lines)

    def judge(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits [B], families [B, K] and token scores [B, T] of tokens [B, T], and the penalty of the layers.

        What is padded at the right comes after all that is read, so that a causal trunk needs no mask."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden, penalty = self.model(Place(tokens, positions))
        lines = self.line(hidden)[..., 0]
        pooled = self.dropout(self.pool(hidden, lines, mask))
        return self.score(pooled)[:, 0], self.family(pooled), lines, penalty

    def pool(self, hidden: Tensor, lines: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, T, d] -> [B, d] for each way of pooling, side by side."""
        none = mask == 0
        parts = []
        for way in self.config.pooling:
            if way == "mean":
                parts.append(hidden.masked_fill(none[..., None], 0).sum(1) / mask.sum(1, keepdim=True))
            elif way == "last":
                parts.append(hidden[torch.arange(len(hidden)), mask.sum(1) - 1])
            elif way == "max":
                parts.append(hidden.masked_fill(none[..., None], FAR).amax(1))
            else:
                shares = lines.masked_fill(none, FAR).softmax(1)
                parts.append((hidden * shares[..., None]).sum(1))
        return torch.cat(parts, 1)

    def losses(
        self, tokens: Tensor, labels: Tensor, mask: Tensor, lines: Tensor, hits: Tensor, family: Tensor,
        weights: Tensor, emphasis: Emphasis,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The training path: the summed loss of a part of a batch of `data.pairs.Pairs`, and what is added to it."""
        width = int(mask.sum(1).max())
        tokens, mask, lines, hits = (item[:, :width] for item in (tokens, mask, lines, hits))
        logits, families, scores, penalty = self.judge(tokens, mask)
        loss = objectives.detection(logits, scores, families, labels, lines, hits, family, weights, emphasis)
        return loss, None if penalty is None else penalty * len(tokens)

    def flops(self, context: int, training: bool = False) -> int:
        """Multiply-adds times two of one token's forward pass that sees `context` positions on average."""
        layers: list[Any] = [self.model.layers[which] for which in self.model.order]
        return sum(layer.flops(context) for layer in layers) + 2 * self.spec.width


def detector(
    trunk: ShrewForCausalLM, families: list[str], pooling: list[str], window: int, comments: bool, dropout: float
) -> ShrewForSequenceClassification:
    """A detector with the trunk of a causal model and fresh heads; early exits and the head of the trunk are left out.
    """
    shape = replace(trunk.spec, tied=True, exits=None)
    ids = {key: getattr(trunk.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = DetectorConfig(dump(shape), families, pooling, window, comments, dropout, **ids)
    made = ShrewForSequenceClassification(config)
    kept = {name: value for name, value in trunk.model.state_dict().items() if not name.startswith("exit_norms.")}
    made.model.load_state_dict(kept)
    return made


AutoConfig.register("shrew-detector", DetectorConfig)
AutoModelForSequenceClassification.register(DetectorConfig, ShrewForSequenceClassification)
