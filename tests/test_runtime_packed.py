"""What `shrew pack` writes, run by the engine, is what torch says of the same model: llama, every block, a label."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from shrew.__main__ import main
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.delta import DeltaSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.linear import LinearSpec
from shrew.blocks.memory import MemorySpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.blocks.window import WindowSpec
from shrew.runtime import Engine, Request, load

EVERYTHING = ModelSpec(
    pattern="CLDWMA", layers=6, width=32, vocabulary=300, context=256, ngrams=NgramSpec(sizes=(2, 3), rows=50),
    ffn=MoeSpec(experts=4, every=2),
    mixers={
        "C": ConvSpec(), "L": LinearSpec(heads=2, state=8, chunk=8), "D": DeltaSpec(heads=2),
        "W": WindowSpec(heads=4, kv_heads=2, window=12), "M": MemorySpec(heads=2, segment=16),
        "A": AttentionSpec(heads=4, kv_heads=2),
    },
)  # fmt: skip
PROMPTS = [np.random.default_rng(seed).integers(3, 300, 4 + 29 * seed).tolist() for seed in range(5)]


def shaken(model: Any) -> Any:
    """Random weights in which every block matters."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else nn.init.uniform_(p, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "everything"])
def packed(
    request: Any, tiny_llama_folder: Path, tiny_tokenizer: Any, text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    where = tmp_path_factory.mktemp("packed")
    (where / "text.txt").write_text(text, "utf-8")
    source = tiny_llama_folder
    if request.param == "everything":
        source = where / "model"
        shaken(build(EVERYTHING, bos_token_id=0, eos_token_id=1, pad_token_id=2)).save_pretrained(source)
        tiny_tokenizer.save_pretrained(source)
    assert main(["pack", str(source), "--out", str(where / "pack"), "--text", str(where / "text.txt")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    return where / "pack", model


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> np.ndarray:
    return np.asarray(model(input_ids=torch.tensor([tokens])).logits[0].double())


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("draft", [None, "lookup", "itself"])
def test_the_engine_says_what_torch_says(packed: tuple[Path, Any], draft: str | None) -> None:
    folder, torch_model = packed
    model = load(folder)
    expected = [greedy(torch_model, prompt, 12) for prompt in PROMPTS]
    with Engine(model, slots=3, draft=model if draft == "itself" else draft) as engine:
        for _ in range(2):  # the second time from prefixes
            requests = [Request(prompt=prompt, max_tokens=12, temperature=0, ignore_eos=True) for prompt in PROMPTS]
            pieces = [answer.result() for answer in [engine.submit(request) for request in requests]]
            assert [[token.id for token in piece.tokens] for piece in pieces] == expected
        alone = [engine.submit(request).result() for request in requests]
        assert [[token.id for token in piece.tokens] for piece in alone] == expected
        assert all(piece.usage and piece.usage.cached_tokens for piece in alone)
        following = [*PROMPTS[3], *expected[3], 7, 8, 9]
        piece = engine.submit(Request(prompt=following, max_tokens=6, temperature=0, ignore_eos=True)).result()
        assert [token.id for token in piece.tokens] == greedy(torch_model, following, 6)


def test_prompts_are_scored_and_embedded_as_torch_does(packed: tuple[Path, Any]) -> None:
    folder, torch_model = packed
    with Engine(load(folder)) as engine:
        piece = engine.submit(Request(prompt=PROMPTS[4], max_tokens=0, echo=True, logprobs=1)).result()
        vector = engine.embed(PROMPTS[4])
    expected = torch.tensor(logits(torch_model, PROMPTS[4])).log_softmax(1)[:-1].gather(
        1, torch.tensor(PROMPTS[4])[1:, None]
    )  # fmt: skip
    assert [token.logprob for token in piece.prompt[1:]] == pytest.approx(expected[:, 0].tolist(), abs=1e-3)
    found: list[torch.Tensor] = []
    hook = torch_model.model.norm.register_forward_hook(lambda _, __, out: found.append(out[0].double()))
    logits(torch_model, PROMPTS[4])
    hook.remove()
    states = found[0].mean(0)
    np.testing.assert_allclose(vector, (states / states.norm()).numpy(), atol=1e-4)


def test_a_packed_classifier_says_what_torch_says(tiny_tokenizer: Any, text: str, tmp_path: Path) -> None:
    config = transformers.ModernBertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=2, bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1, max_position_embeddings=128,
        attn_implementation="eager", id2label={0: "code", 1: "prose"},
    )  # fmt: skip
    model = shaken(transformers.ModernBertForSequenceClassification(config))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text, "utf-8")
    flags = ["--out", str(tmp_path / "pack"), "--text", str(tmp_path / "text.txt")]
    assert main(["pack", str(tmp_path / "model"), *flags]) == 0
    found = load(tmp_path / "pack").classify(PROMPTS[:4])
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS[:4]]
    np.testing.assert_allclose(found, expected, atol=1e-3)
