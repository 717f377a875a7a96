"""What is packed: a loaded model in our blocks, with the codes of its weights under our names."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from shrew.blocks.detector import ShrewForSequenceClassification
from shrew.blocks.model import ShrewConfig, ShrewForCausalLM
from shrew.blocks.stock import IDS, as_spec, in_our_names
from shrew.errors import UnsupportedError
from shrew.folder import Loaded
from shrew.packers.carry import carry
from shrew.packers.onnx.weights import Weights
from shrew.spec import dump


def ours(loaded: Loaded) -> tuple[ShrewForCausalLM, Weights]:
    """The model in our blocks, sharing its weights with `loaded` where it can, and the weights by name; of a classifier
    its trunk, and the weights of its heads too.

    Raises UnsupportedError where our blocks cannot say the model."""
    model = loaded.model
    if isinstance(model, ShrewForSequenceClassification):
        return _trunk(model), Weights(_floats(model.state_dict()), dict(loaded.packed))
    spec = model.spec if isinstance(model, ShrewForCausalLM) else as_spec(model.config)
    if spec.patches:
        raise UnsupportedError(f"{model.config.model_type}: a model of patches cannot be packed; pack one of tokens.")
    if isinstance(model, ShrewForCausalLM):
        return model, Weights(_floats(model.state_dict()), dict(loaded.packed))
    if loaded.is_classifier:
        if not {"model", "score"} <= {name for name, _ in model.named_children()}:
            raise UnsupportedError(f"{type(model).__name__}: such a classifier cannot be packed.")
        spec = replace(spec, tied=True)  # there is no head to tie
    with torch.device("meta"):
        same = ShrewForCausalLM(ShrewConfig(dump(spec), **{key: getattr(model.config, key) for key in IDS}))
    weights = _floats(model.state_dict())
    move = functools.partial(in_our_names, model.config, spec)
    renamed = move(weights)
    parts = same.state_dict().keys()
    same.load_state_dict({name: value for name, value in renamed.items() if name in parts}, strict=False, assign=True)
    same.tie_weights()
    return same.eval(), Weights(renamed, carry(loaded.packed, weights, move))


def _trunk(model: ShrewForSequenceClassification) -> ShrewForCausalLM:
    """The causal model of the same trunk, sharing its weights."""
    with torch.device("meta"):
        same = ShrewForCausalLM(ShrewConfig(dump(model.spec)))
    same.load_state_dict({name: value for name, value in model.state_dict().items() if name.startswith("model.")},
                         strict=False, assign=True)  # fmt: skip
    same.tie_weights()
    return same.eval()


def _floats(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in weights.items()}
