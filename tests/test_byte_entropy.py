"""Entropies are what the model says of each byte, read in any chunks; patches by them are those of `BltPatcher`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.blt.configuration_blt import BltPatcherConfig
from transformers.models.blt.modeling_blt import BltPatcher

from shrew import folder
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.mlp import MlpSpec
from shrew.blocks.model import ModelSpec, ShrewForCausalLM, build
from shrew.blocks.patches import entropy
from shrew.blocks.patches.boundaries import EntropySpec, boundaries
from shrew.blocks.patches.entropy import END, Stream, entropies
from shrew.blocks.window import WindowSpec
from shrew.data import byte_tokenizer
from shrew.errors import FolderError, UsageError


def model_of(**settings: Any) -> ShrewForCausalLM:
    torch.manual_seed(0)
    spec = ModelSpec(**{
        "pattern": "CWD", "layers": 3, "width": 16, "vocabulary": 257, "ffn": MlpSpec(hidden=16),
        "mixers": {"C": ConvSpec(), "W": WindowSpec(heads=2, window=5), "D": DeltaSpec(heads=2, key_width=4, chunk=4)},
    } | settings)  # fmt: skip
    model = build(spec, bos_token_id=END, eos_token_id=END).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)  # so that entropies differ
    return model


MODEL = model_of()


@torch.no_grad()
def naive(text: list[int], reset: bool) -> list[float]:
    """The definition: the model reads what stands before a byte anew, from the last break on."""
    found = []
    for t in range(len(text)):
        context = [END]
        for byte in text[:t]:
            token = byte if 0 <= byte <= 255 else END
            context = [token] if token == END or (reset and byte == ord("\n")) else [*context, token]
        chance = MODEL(torch.tensor([context])).logits[0, -1].softmax(-1)
        found.append(float(torch.special.entr(chance).sum()))
    return found


TEXT = st.lists(st.one_of(st.sampled_from([*b"ab\n", 0xFF, END, -1]), st.integers(0, 255)), min_size=1, max_size=14)


def tensor(rows: list[list[int]], fill: int = 3) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


@settings(max_examples=15)
@given(st.lists(TEXT, min_size=1, max_size=3), st.booleans())
def test_entropies_are_the_definition_and_rows_are_apart(rows: list[list[int]], reset: bool) -> None:
    found = entropies(MODEL, *tensor(rows), reset)
    for row, given_row in enumerate(rows):
        size = len(given_row)
        torch.testing.assert_close(found[row, :size], torch.tensor(naive(given_row, reset)), rtol=0, atol=2e-4)
        assert not found[row, size:].any()


@settings(max_examples=25)
@given(st.lists(TEXT.filter(lambda row: len(row) > 2), min_size=1, max_size=1), st.booleans(), st.data())
def test_a_text_may_come_bit_by_bit(rows: list[list[int]], reset: bool, data: Any) -> None:
    text, lengths = tensor(rows * 2)
    whole = entropies(MODEL, text, lengths, reset)
    cuts = sorted(data.draw(st.sets(st.integers(1, text.shape[1] - 1), max_size=4)))
    stream, parts = Stream(MODEL, 2, reset), []
    for part in text.tensor_split(cuts, 1):
        torch.testing.assert_close(stream.ahead, whole[:, sum(p.shape[1] for p in parts)], rtol=0, atol=2e-4)
        parts.append(stream.feed(part))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-4)


def test_long_texts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    whole, lengths = entropies(MODEL, text, torch.tensor([50, 31])), torch.tensor([50, 31])
    monkeypatch.setattr(entropy, "AT_ONCE", 14)
    torch.testing.assert_close(entropies(MODEL, text, lengths), whole, rtol=0, atol=2e-4)
    assert entropies(MODEL, text[:, :0], lengths * 0).shape == (2, 0)


def ours_of(patcher: BltPatcher, config: BltPatcherConfig) -> ShrewForCausalLM:
    """The weights of a `BltPatcher` in our blocks. Its id of byte b is b + 4 and that of the beginning 1; it rotates
    neighbouring channels of a head together, we one of the first half with one of the second."""
    heads, width = config.num_attention_heads, config.hidden_size
    mixer = WindowSpec(heads=heads, kv_heads=heads, window=config.sliding_window,
                       rope_theta=config.rope_parameters["rope_theta"])  # fmt: skip
    ours = build(ModelSpec(
        pattern="W", layers=config.num_hidden_layers, width=width, vocabulary=260, eps=config.rms_norm_eps,
        mixers={"W": mixer}, ffn=MlpSpec(hidden=config.intermediate_size), tied=False,
    )).eval()  # fmt: skip
    ids = [*range(4, 260), 1, 0, 2, 3]
    halves = torch.arange(width).view(heads, -1, 2).transpose(1, 2).flatten()
    theirs = patcher.state_dict()
    weights = {"model.norm.weight": theirs["norm.weight"], "lm_head.weight": theirs["lm_head.weight"][ids],
               "model.embed_tokens.weight": theirs["embed_tokens.weight"][ids]}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        own, other = f"model.layers.{layer}.", f"layers.{layer}."
        weights |= {f"{own}mixer_norm.weight": theirs[f"{other}input_layernorm.weight"],
                    f"{own}ffn_norm.weight": theirs[f"{other}post_attention_layernorm.weight"]}  # fmt: skip
        for name in "qkvo":
            weight = theirs[f"{other}self_attn.{name}_proj.weight"]
            weights[f"{own}mixer.{name}_proj.weight"] = weight[halves] if name in "qk" else weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights[f"{own}ffn.{name}.weight"] = theirs[f"{other}mlp.{name}.weight"]
    ours.load_state_dict(weights)
    return ours


def test_patches_by_entropy_are_those_of_the_blt_patcher() -> None:
    torch.manual_seed(1)
    config = BltPatcherConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, sliding_window=9,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    patcher = BltPatcher(config).eval()
    with torch.no_grad():
        for weight in patcher.parameters():
            weight.mul_(6 if weight.ndim > 1 else 1)
    ours = ours_of(patcher, config)
    for size in (5, 60):
        text = torch.randint(0, 256, (1, size))
        theirs = torch.cat([torch.tensor([[1]]), text + 4], 1)
        row, lengths = torch.cat([torch.tensor([[END]]), text], 1), torch.tensor([size + 1])
        with torch.no_grad():
            about, _, _ = patcher(theirs)  # of what comes behind each token
        mine = entropies(ours, row, lengths)
        torch.testing.assert_close(mine[:, 1:], about[:, :-1], rtol=0, atol=1e-4)
        for threshold in about.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist():
            cut = threshold + 1e-3
            with torch.no_grad():
                _, patches, _ = patcher(theirs, patch_size=4, threshold=cut)
            starts = boundaries(row, lengths, EntropySpec(threshold=cut), mine)[0].nonzero()[:, 0].tolist()
            ends = [*starts[1:], size + 1]
            assert [end - start for start, end in zip(starts, ends, strict=True)] == patches[patches > 0].tolist()


def test_a_folder_is_read_back_frozen_and_others_are_refused(tmp_path: Path, tiny_llama_folder: Path) -> None:
    folder.save(folder.Loaded(MODEL, byte_tokenizer(), dtype=torch.float32), tmp_path / "bytes")
    model = entropy.read(tmp_path / "bytes")
    text = torch.tensor([list(b"some text\nof two lines")])
    lengths = torch.tensor([text.shape[1]])
    assert torch.equal(entropies(model, text, lengths), entropies(MODEL, text, lengths))
    assert not any(weight.requires_grad for weight in model.parameters())
    with pytest.raises(FolderError, match="There is no model folder"):
        entropy.read(tmp_path / "nothing")
    with pytest.raises(FolderError, match="gives no entropies of bytes"):
        entropy.read(tiny_llama_folder)
    (tmp_path / "bytes" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FolderError, match="cannot be loaded"):
        entropy.read(tmp_path / "bytes")
    with pytest.raises(UsageError, match="looks back without bound"):
        Stream(model_of(pattern="A", mixers={"A": AttentionSpec(heads=2)}))
