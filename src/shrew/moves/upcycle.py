"""Make a dense model a mixture of experts, to train further."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.stock import IDS, adopt, stock
from shrew.errors import SpecError, UnsupportedError
from shrew.folder import Loaded
from shrew.moves.context import Context
from shrew.spec import Meta, doc


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Make every MLP a set of experts behind a new router: copies of it, or its channels dealt out."""

    name: ClassVar[str] = "upcycle"
    paper: ClassVar[str] = "Komatsuzaki et al. 2022, Sparse upcycling (arXiv:2212.05055)"

    experts: Annotated[int, Meta(ge=2)] = doc("experts of each layer", 8)
    top_k: Annotated[int, Meta(ge=1)] = doc("experts that a token uses", 2)
    how: Literal["copy", "split"] = doc(
        "copy: each expert is the whole MLP, so the model is what it was; split: each has an equal part of the "
        "channels, scaled so that its router's weights give the whole on average", "copy"
    )  # fmt: skip
    noise: Annotated[float, Meta(ge=0, lt=1)] = doc("normal noise on the experts, as a share of the weights' RMS", 0.0)

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise SpecError(f"upcycle: top_k {self.top_k} is more than the {self.experts} experts.")

    def apply(self, loaded: Loaded, context: Context) -> Loaded:
        """Raises UnsupportedError for a model that our blocks cannot say, or whose MLPs are no gated ones."""
        if loaded.is_classifier:
            raise UnsupportedError("upcycle: only causal language models become mixtures of experts.")
        if loaded.packed:
            raise UnsupportedError("upcycle: the weights are quantized already; start from the original.")
        kind = loaded.model.config.model_type
        ours = adopt(loaded.model)
        spec = self._spec(ours.spec, kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            new = build(spec, **{key: getattr(ours.config, key) for key in IDS}).to(ours.dtype)
            state = {name: value.clone() for name, value in ours.state_dict().items() if ".ffn." not in name}
            for name, value in new.state_dict().items():
                if name.endswith(".ffn.gate.weight"):
                    block = name.removesuffix("gate.weight")
                    state[name] = value  # the new router
                    state |= {f"{block}experts.{part}": self._noisy(stack)
                              for part, stack in self._experts(ours, block).items()}  # fmt: skip
        new.load_state_dict(state)
        new.tie_weights()
        new.generation_config = ours.generation_config
        made = stock(new.eval())
        context.say(f"upcycle: {self.experts} experts a layer, saved as {made.config.model_type}")
        return dataclasses.replace(loaded, model=made, untouched={})

    def _spec(self, spec: ModelSpec, kind: str) -> ModelSpec:
        mlp = spec.ffn
        if mlp.kind != "mlp" or not mlp.gated:
            raise UnsupportedError(f"upcycle: the feed-forward layers of this {kind} are not gated MLPs; leave it out.")
        if spec.patches:
            raise UnsupportedError("upcycle: a model of patches has layers of several widths; leave it out.")
        if any(".ffn." in name for name in spec.ranks):
            raise UnsupportedError("upcycle: projections of MLPs are two factors; put upcycle before factor.")
        hidden = mlp.hidden or 3 * spec.width
        if self.how == "split" and hidden % self.experts:
            raise SpecError(f"upcycle: {hidden} channels cannot be dealt out to {self.experts} experts; choose a "
                            "number that divides them.")  # fmt: skip
        part = hidden // self.experts if self.how == "split" else hidden
        ffn = MoeSpec(experts=self.experts, top_k=self.top_k, hidden=part, activation=mlp.activation, normalise=True)
        return replace(spec, ffn=ffn)

    def _experts(self, ours: Any, block: str) -> dict[str, Tensor]:
        """The stacked experts of the MLP that is called `block`."""
        gate, up, down = (ours.get_parameter(f"{block}{part}_proj.weight").detach() for part in ("gate", "up", "down"))
        if self.how == "copy":
            return {"gate_up_proj": torch.cat([gate, up]).repeat(self.experts, 1, 1),
                    "down_proj": down.repeat(self.experts, 1, 1)}  # fmt: skip
        gates, ups = (weight.unflatten(0, (self.experts, -1)) for weight in (gate, up))
        # A part's weight is 1 / experts on average over all of them, so that the weighted sum is the whole.
        parts = down.unflatten(1, (self.experts, -1)).transpose(0, 1) * self.experts
        return {"gate_up_proj": torch.cat([gates, ups], 1), "down_proj": parts.contiguous()}

    def _noisy(self, stack: Tensor) -> Tensor:
        if not self.noise:
            return stack
        return stack + torch.randn_like(stack) * self.noise * stack.square().mean().sqrt()
