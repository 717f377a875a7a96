"""What a model is said to be: `ModelSpec`, the tables of the kinds of blocks, and the fronts."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from shrew.blocks.attention import Attention, AttentionSpec
from shrew.blocks.conv import Conv, ConvSpec
from shrew.blocks.delta import Delta, DeltaSpec
from shrew.blocks.depth import ExitSpec, MixtureOfDepthsSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.layers import WIDEST
from shrew.blocks.linear import Linear, LinearSpec
from shrew.blocks.memory import Memory, MemorySpec
from shrew.blocks.mlp import Mlp, MlpSpec, Nothing, NothingSpec
from shrew.blocks.moe import MoeSpec, moe_or_mlp
from shrew.blocks.patches.boundaries import RULES, SpaceSpec
from shrew.blocks.patches.hashes import HashSpec
from shrew.blocks.patches.learned import LearnedSpec
from shrew.blocks.window import Window, WindowSpec
from shrew.errors import SpecError, nearest
from shrew.spec import Kinds, Meta, doc

# kind: (spec, block). A block's spec says what is wrong with it at a model's width (`problem`).
MIXERS: dict[str, tuple[Any, Any]] = {
    "attention": (AttentionSpec, Attention),
    "conv": (ConvSpec, Conv),
    "delta": (DeltaSpec, Delta),
    "memory": (MemorySpec, Memory),
    "linear": (LinearSpec, Linear),
    "window": (WindowSpec, Window),
}
FFNS: dict[str, tuple[Any, Any]] = {
    "mlp": (MlpSpec, Mlp),
    "moe": (MoeSpec, moe_or_mlp),
    "none": (NothingSpec, Nothing),
}


DEEPEST = 4096  # layers that a token goes through
MEANS = {"space": 6.1, "entropy": 4.5}  # bytes a patch of the published models
MixerTable = dict[str, Annotated[Any, Kinds({kind: spec for kind, (spec, _) in MIXERS.items()})]]
Ffn = Annotated[Any, Kinds({kind: spec for kind, (spec, _) in FFNS.items()})]


@dataclass(frozen=True, kw_only=True)
class LocalSpec:
    """The layers of a local encoder or decoder: as in a model, of mixers and a feed-forward layer of any kind."""

    layers: Annotated[int, Meta(ge=1, le=DEEPEST)] = doc("number of layers", 1)
    pattern: str = doc("letters of the mixers, repeated", "A")
    mixers: MixerTable = field(default_factory=lambda: {"A": WindowSpec(window=512)})
    ffn: Ffn = field(default_factory=MlpSpec)


@dataclass(frozen=True, kw_only=True)
class BytesSpec:
    """A model of plain bytes: one of tokens in all but the tokenizer."""

    kind: str = "bytes"

    def problem(self, model: "ModelSpec") -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class PatchesSpec:
    """Bytes in patches (Pagnoni et al. 2024): local layers read and write bytes, the layers of the model itself run
    once for each patch. `entropy` is a model of bytes, trained before, by whose entropies the patches are cut."""

    kind: str = "patches"
    rule: Annotated[Any, Kinds(RULES | {"learned": LearnedSpec})] = field(default_factory=SpaceSpec)
    width: Annotated[int, Meta(ge=8, le=WIDEST)] = doc("width of the local layers", 128)
    encoder: LocalSpec = field(default_factory=LocalSpec)
    decoder: LocalSpec = field(default_factory=lambda: LocalSpec(layers=3))
    queries: Annotated[int, Meta(ge=1)] = doc("local vectors of a patch, read and given", 2)
    heads: Annotated[int, Meta(ge=1)] = doc("heads of the attention between bytes and patches", 4)
    every: bool = doc("the decoder reads the patches before each of its layers, not the first alone", True)
    residual: Annotated[float, Meta(gt=0)] = doc("factor of what that attention adds to (the published models: 2)", 1.0)
    first: Annotated[int, Meta(ge=0)] = doc("token id of byte 0; those of the others follow", 0)
    mean: Annotated[float, Meta(ge=1)] | None = doc(
        "bytes a patch, to count FLOPs with; train fits the threshold of entropies to it; default: the rule's", None)
    hashes: HashSpec | None = doc("n-gram tables as the published models have them", None)
    entropy: "ModelSpec | None" = doc("model whose entropies cut the patches", None)

    def problem(self, model: "ModelSpec") -> str:
        """What is wrong with these settings in a model; empty when nothing is."""
        if wrong := self.rule.problem():
            return f"rule: {wrong}"
        if self.width % self.heads:
            return f"width {self.width} is no multiple of {self.heads} heads"
        if model.ngrams and self.hashes:
            return "ngrams and hashes are tables of the same; take one"
        if self.hashes and (wrong := self.hashes.problem()):
            return f"hashes: {wrong}"
        if model.exits:
            return "a model of patches has no early exits"
        if any(getattr(mixer, "value_embeddings", False) for mixer in model.mixers.values()):
            return "value_embeddings are of tokens; the layers that run on patches see none"
        if self.entropy and self.rule.kind != "entropy":
            return f"rule {self.rule.kind} asks no model entropy; leave it out"
        known = {getattr(part, "vocabulary", None) for part in (model, self.entropy)} - {None}
        if self.entropy and (self.entropy.front or len(known) > 1):
            return "entropy is a model of the same tokens, without a front of its own"
        return ""

    @property
    def bytes(self) -> float:
        """Bytes a patch, on average: as said, or what the rule aims at."""
        said = self.mean or getattr(self.rule, "size", None) or getattr(self.rule, "mean", None)
        return float(said or MEANS[self.rule.kind])


FRONTS: dict[str, Any] = {"patches": PatchesSpec, "bytes": BytesSpec}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One causal language model. `pattern` letters name mixers and repeat over the layers."""

    pattern: str = doc("letters of the mixers, repeated", "A")
    layers: Annotated[int, Meta(ge=1, le=DEEPEST)] = doc("number of layers", 6)
    width: Annotated[int, Meta(ge=8, le=WIDEST)] = doc("width of the residual stream", 256)
    vocabulary: Annotated[int, Meta(ge=2, le=1 << 28)] | None = doc(
        "number of token ids; default: the tokenizer's", None
    )
    context: Annotated[int, Meta(ge=2)] = doc("longest context", 1024)
    tied: bool = doc("one matrix for embedding and head", True)
    eps: Annotated[float, Meta(gt=0)] = doc("epsilon of the norms", 1e-6)
    norms: Literal["pre", "sandwich"] = doc("norm before each block, or before and after it (Gemma)", "pre")
    embedding_scale: Annotated[float, Meta(gt=0)] = doc("factor of the embeddings", 1.0)
    residual_scale: Annotated[float, Meta(gt=0)] = doc("factor of what a block adds to the residual stream", 1.0)
    logit_scale: Annotated[float, Meta(gt=0)] = doc("factor of the logits", 1.0)
    softcap: Annotated[float, Meta(ge=0)] = doc("logits become softcap tanh(logits / softcap); 0: off", 0.0)
    zero_init: bool = doc("start every block's last matrix at zero, so that a new model is its embedding", False)
    mixers: MixerTable = field(default_factory=lambda: {"A": AttentionSpec()})
    ffn: Ffn = field(default_factory=MlpSpec)
    loops: Annotated[int, Meta(ge=1)] = doc("times that the layers are run, one after the other, same weights", 1)
    repeats: tuple[Annotated[int, Meta(ge=1)], ...] = doc("times that each layer is run in a row; default: once", ())
    ranks: dict[str, Annotated[int, Meta(ge=1)]] = doc(
        "projections of attention, windows and MLPs that are two factors: 'layers.0.ffn.up_proj' and its rank",
        default_factory=dict)  # fmt: skip
    ngrams: NgramSpec | None = doc("hash n-gram embeddings", None)
    exits: ExitSpec | None = doc("early exits", None)
    mixture_of_depths: MixtureOfDepthsSpec | None = doc("tokens that choose their feed-forward layers", None)
    front: Annotated[Any, Kinds(FRONTS)] = doc("what the layers run on; default: tokens", None)

    def __post_init__(self) -> None:
        if not self.pattern:
            raise SpecError(f"pattern: no letter in it; name a mixer for each layer, known: {', '.join(self.mixers)}.")
        for letter in self.pattern:
            if letter not in self.mixers:
                raise SpecError(f"pattern '{self.pattern}': no mixer '{letter}'; {nearest(letter, self.mixers)}")
        if self.repeats and len(self.repeats) != self.layers:
            raise SpecError(f"repeats: {len(self.repeats)} numbers for {self.layers} layers; give one for each.")
        if (depth := (sum(self.repeats) or self.layers) * self.loops) > DEEPEST:
            raise SpecError(f"repeats and loops make {depth} layers that a token goes through; use {DEEPEST} or fewer.")
        mixers = {f"mixers.{letter}": mixer for letter, mixer in self.mixers.items()}
        for name, block in {**mixers, "ffn": self.ffn}.items():
            if problem := block.problem(self.width):
                raise SpecError(f"{name}: {problem}.")
        extras = {
            "front": self.front and self.front.problem(self),
            "ngrams": self.ngrams and self.ngrams.problem(),
            "exits": self.exits and self.exits.problem(self.depth),
            "mixture_of_depths": self.mixture_of_depths and self.mixture_of_depths.problem(self.layers),
        }
        for name, problem in extras.items():
            if problem:
                raise SpecError(f"{name}: {problem}.")
        if self.patches:
            for part in (self.patches.encoder, self.patches.decoder):
                self.local(part)  # checks itself

    @property
    def depth(self) -> int:
        """Layers that a token goes through."""
        return len(self.order)

    @property
    def order(self) -> list[int]:
        """The layer of each pass, from first to last."""
        once = [layer for layer in range(self.layers) for _ in range(self.repeats[layer] if self.repeats else 1)]
        return once * self.loops

    def mixer(self, layer: int) -> Any:
        return self.mixers[self.pattern[layer % len(self.pattern)]]

    @property
    def patches(self) -> PatchesSpec | None:
        """The front of a model of patches; None of others."""
        return self.front if isinstance(self.front, PatchesSpec) else None

    def local(self, part: LocalSpec) -> "ModelSpec":
        """The model whose layers are those of a local part of this one."""
        return ModelSpec(pattern=part.pattern, layers=part.layers, width=self.front.width, vocabulary=self.vocabulary,
                         context=self.context, eps=self.eps, norms=self.norms, residual_scale=self.residual_scale,
                         zero_init=self.zero_init, mixers=part.mixers, ffn=part.ffn)  # fmt: skip

    @property
    def deepest(self) -> int:
        """Layers of the deepest of its stacks."""
        front = self.patches
        if front is None:
            return self.layers
        stacks: list[Any] = [self, front.encoder, front.decoder, *([front.entropy] if front.entropy else [])]
        return max(stack.layers for stack in stacks)
