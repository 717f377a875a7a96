"""A model read layer by layer: the same bytes in less memory, and on from where a killed run stopped."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_folder import make_model

from shrew import folder, machine
from shrew.errors import UnsupportedError
from shrew.folder import paged
from shrew.moves.context import Progress
from shrew.moves.quantize import Quantize


def same_files(one: Path, other: Path) -> None:
    names = {item.name for item in one.iterdir()}
    assert names == {item.name for item in other.iterdir()}
    for name in names - {"shrew.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    lineages = [json.loads((item / "shrew.json").read_text()) for item in (one, other)]
    assert lineages[0] == lineages[1]


@pytest.fixture
def untied(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """Four bf16 layers and a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         tie_word_embeddings=False, initializer_range=0.1)  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "untied")
    tiny_tokenizer.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


FLAGS: dict[str, list[Any]] = {
    "rtn": ["--method", "rtn"],
    "gptq": ["--method", "gptq", "--bits", 3, "--group", 32],
    "weighted, and the head": ["--method", "weighted", "--embeddings"],
    "low rank": ["--method", "gptq", "--low-rank", 2, "--no-symmetric"],
    "entropy-coded blocks": ["--method", "rtn", "--grid", "nf4", "--coded"],
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("model", ["tiny_llama_folder", "untied"])
def test_the_same_bytes_as_in_memory(
    name: str, model: str, request: Any, stories: Path, apply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(model)
    for more in ([], ["--low-memory"]):
        monkeypatch.setenv("SHREW_CACHE", str(tmp_path / f"cache{len(more)}"))
        code, said = apply(path, "quantize", *FLAGS[name], "--text", stories, *more, "--out", tmp_path / str(len(more)))
        assert code == 0, said
        assert ("One layer is in memory at a time." in said) == bool(more)
        assert not any((tmp_path / f"cache{len(more)}" / "unfinished").iterdir())
    same_files(tmp_path / "0", tmp_path / "1")


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3"])
def test_logits_are_those_of_the_model_in_memory(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_model(kind).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ids = torch.arange(4, 44).reshape(2, 20)
    with torch.no_grad():
        expected = folder.load(tmp_path).model(input_ids=ids, use_cache=False).logits
        found = paged.load(tmp_path)
        assert torch.equal(found.model(input_ids=ids, use_cache=False).logits, expected)
        assert torch.equal(found.model(input_ids=ids, use_cache=False).logits, expected)


class Killed(BaseException):
    pass


@contextmanager
def live(model: Any) -> Iterator[list[int]]:
    """The most bytes that parameters of the model took whenever one of its modules was called."""
    most = [0]

    def look(*_: Any) -> None:
        held = {value.data_ptr(): value.nbytes for value in model.parameters() if not value.is_meta}
        most[0] = max(most[0], sum(held.values()))

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()]
    yield most
    for hook in hooks:
        hook.remove()


def test_one_layer_is_in_memory_at_a_time(untied: Path, context: Any) -> None:
    loaded = paged.load(untied)
    layer = sum(4 * value.numel() for value in loaded.model.model.layers[0].parameters())
    outside = 4 * loaded.model.lm_head.weight.numel()
    assert all(value.is_meta for value in loaded.model.parameters())
    with live(loaded.model) as most:
        Quantize(group=16).apply(loaded, context)
    assert layer <= most[0] <= layer + outside
    assert len(loaded.packed) == 28


@pytest.mark.parametrize("more", [[], ["--low-memory"]])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_killed_run_goes_on(
    method: str, more: list[str], untied: Path, stories: Path, apply: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    told: list[int] = []

    def run(out: str) -> int:
        flags = ["--method", method, "--text", stories, *more, "--out", tmp_path / out]
        code, said = apply(untied, "quantize", *flags)
        told[:] = map(int, re.findall(r"quantize (\d+)/28 weights, \d+:\d\d:\d\d left", said))
        return int(code)

    made: list[int] = []

    def counted(stop: int) -> Callable[..., Any]:
        plain = Quantize._round

        def wrapped(self: Quantize, *given: Any) -> None:
            if len(made) == stop:
                raise Killed
            made.append(len(given[2]))
            plain(self, *given)

        return wrapped

    monkeypatch.setattr(Progress, "EVERY", 0.0)
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Quantize, "_round", counted(2))
        run("out")
    before = sum(made)
    assert 0 < before < 28
    assert not (tmp_path / "out").exists()
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Quantize, "_round", counted(-1))
        assert run("out") == 0
    assert before + sum(made) == 28
    assert min(told) > before  # what was done already is not counted as done now
    assert told == sorted(set(told))
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "other"))
    assert run("whole") == 0
    same_files(tmp_path / "whole", tmp_path / "out")


def test_on_its_own_where_memory_is_short(
    untied: Path, apply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.free_memory() > 1e6
    monkeypatch.setattr(machine, "free_memory", lambda: 1000.0)
    code, said = apply(untied, "quantize", "--method", "rtn", "--out", tmp_path / "short")
    assert (code, "One layer is in memory at a time." in said) == (0, True)
    code, said = apply(tmp_path / "short", "quantize", "--method", "rtn", "--tensors", "lm_head.weight=8",
                       "--out", tmp_path / "again")  # fmt: skip
    assert "One layer" not in said  # packed: read as ever


def test_a_work_folder_that_cannot_be_written_does_no_harm(untied: Path, context: Any, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    plain = Quantize(method="rtn").apply(folder.load(untied), context)
    found = Quantize(method="rtn").apply(paged.load(untied), replace(context, work=tmp_path / "none" / "work"))
    assert {path.suffix for path in (tmp_path / "none" / "work").iterdir()} == {".safetensors"}
    again = Quantize(method="rtn").apply(paged.load(untied), replace(context, work=tmp_path / "work"))
    for name, item in plain.packed.items():
        assert torch.equal(item.codes, found.packed[name].codes)
        assert torch.equal(item.codes, again.packed[name].codes)


REFUSED: dict[str, tuple[list[Any], str]] = {
    "another move": (["MODEL", "rotate"], "--low-memory is for quantize alone"),
    "learned": (["MODEL", "quantize", "--method", "learned"], "--low-memory is for quantize alone"),
    "a classifier": (["CLASSIFIER", "quantize", "--method", "rtn"], "only dense causal models"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_whole_model_is_refused(
    name: str, untied: Path, tiny_classifier_folder: Path, apply: Any, tmp_path: Path
) -> None:
    flags, words = REFUSED[name]
    places = {"MODEL": untied, "CLASSIFIER": tiny_classifier_folder}
    code, said = apply(*[places.get(item, item) for item in flags], "--low-memory", "--out", tmp_path / "out")
    assert code == 2
    assert words in said
    assert not (tmp_path / "out").exists()


def test_weights_under_other_names_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_model("olmoe").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="another form"):
        paged.load(tmp_path)
