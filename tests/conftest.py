"""Tiny models for every test, one thread, a cache of its own, and no network."""

import json
import os
import random
import socket
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported, and inherited by the programs that tests start.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# The same examples in every run, so that none fails by chance; fresh ones are for those who look for faults.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` the tests of a file stay together, but for those that name another group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True, scope="session")
def _sealed() -> Iterator[None]:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(autouse=True, scope="module")
def _own_cache(_sealed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one file's tests made is made again for another's: which ran before must not change what is said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHREW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and a cache of its own."""
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `python` and a `shrew` that have torch and transformers imported when they start."""
    from warm import shims

    with shims(tmp_path_factory.mktemp("warm")) as place:
        yield place


@pytest.fixture(scope="session")
def text() -> str:
    """About 60 kB of Python source that every interpreter has."""
    return Path(string.__file__).read_text("utf-8") + Path(json.decoder.__file__).read_text("utf-8") * 3


@pytest.fixture(scope="session")
def tiny_tokenizer(text: str) -> Any:
    """A byte-level BPE of 300 tokens with bos, eos and pad, as `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two llama layers of width 64, 4 heads on 2 key-value heads, tied, random weights (never write in it)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # wide enough that logits differ
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    return _save(LlamaForCausalLM(config), tiny_tokenizer, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_classifier_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two distilbert layers of width 64 with the labels 'code', 'comment' and 'prose' (never write in it)."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    labels = ["code", "comment", "prose"]
    config = DistilBertConfig(
        vocab_size=len(tiny_tokenizer),
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=tiny_tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = DistilBertForSequenceClassification(config)
    return _save(model, tiny_tokenizer, tmp_path_factory.mktemp("models") / "distilbert")


def sentences(count: int, seed: int) -> str:
    """Sentences of a small world: what animal does what to which, drawn at random."""
    draw = random.Random(seed)
    animals, verbs = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"], ["sees", "likes", "helps", "hears"]
    drawn = [(draw.choice(animals), draw.choice(verbs), draw.choice(animals)) for _ in range(count)]
    return "".join(f"The {who} {does} the {whom}.\n" for who, does, whom in drawn)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 240 texts of four such sentences."""
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": sentences(4, seed)}) + "\n" for seed in range(240)), "utf-8")
    return path


@pytest.fixture(scope="session")
def trained_llama_folder(
    tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny llama in bf16 after a few seconds of training on other stories, so that it has a quality to lose."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_llama_folder, initializer_range=0.02))
    rows = tiny_tokenizer([sentences(4, seed) for seed in range(1000, 1300)], add_special_tokens=False)["input_ids"]
    longest = max(map(len, rows)) + 2
    ids = torch.full((len(rows), longest), tiny_tokenizer.pad_token_id)
    for number, row in enumerate(rows):
        ids[number, : len(row) + 2] = torch.tensor([tiny_tokenizer.bos_token_id, *row, tiny_tokenizer.eos_token_id])
    targets = ids.masked_fill(ids == tiny_tokenizer.pad_token_id, -100)
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=6e-3), 200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / 10, (steps - step) / (0.7 * steps), 1.0)
        picked = torch.arange(step * 6, step * 6 + 6) % len(ids)
        model(input_ids=ids[picked], labels=targets[picked]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _save(model.to(torch.bfloat16), tiny_tokenizer, tmp_path_factory.mktemp("models") / "trained")


@pytest.fixture(scope="session")
def start_server(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A context manager that serves a scripted engine: `start_server(script, delay, names, **options)`."""
    from scripted import CHATML, Live, ScriptedEngine

    folder = tmp_path_factory.mktemp("served")
    tiny_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    tokenizer = tiny_tokenizer.backend_tokenizer

    @contextmanager
    def started(
        script: Any = None, delay: float = 0.0, names: tuple[str, ...] = ("tiny",), **options: Any
    ) -> Iterator[Live]:
        live = Live(folder, tokenizer, ScriptedEngine(tokenizer, script, delay), names, **options)
        live.thread.start()
        live.wait(lambda: live.server.started)
        try:
            yield live
        finally:
            live.server.should_exit = True
            live.thread.join(20)
            assert not live.thread.is_alive()
            for item in (live.client, *live.opened):
                item.close()
            live.state.close()

    return started


@pytest.fixture
def said() -> list[str]:
    """What moves said through `context`."""
    return []


@pytest.fixture
def context(said: list[str], tmp_path: Path) -> Any:
    """What moves are given: six texts of random tokens, 4 to 63, which every tiny model has, and no teacher."""
    import numpy as np

    from shrew.moves.context import Context

    chance = np.random.default_rng(0)
    texts = [chance.integers(4, 64, length) for length in (48, 48, 48, 48, 48, 33)]
    return Context(texts, texts, None, 0, tmp_path / "cache", said.append)


@pytest.fixture
def apply(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `shrew apply` in this process: exit code and what it said."""
    from shrew.__main__ import main

    def call(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["apply", *map(str, arguments)])
        heard = capsys.readouterr()
        assert "Traceback" not in heard.err
        return code, heard.out + heard.err

    return call
