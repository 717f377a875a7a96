"""`shrew train`: it learns, resumes to the bit, means the same however it is split up, and refuses in plain words."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    Qwen3NextConfig,
)

from shrew import data, errors, folder, spec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.stock import adopt
from shrew.data.tokenizer import train_tokenizer
from shrew.train import Loop, Recipe, TrainSpec, flops_per_token, main, optimizers, schedule, train

SMALL = {"layers": 2, "width": 32, "context": 64, "mixers": {"A": {"heads": 4, "kv_heads": 2}}, "ffn": {"hidden": 64}}


class Killed(BaseException):
    """What no handler in the program expects."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """A working folder with my.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(text, "utf-8")
    return tmp_path


def _values(model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    item = {"data": ["my.txt"], "out": "out", "tokenizer": "bpe:300", "length": 32, "batch_tokens": 256, "steps": 20,
            "lr": 0.01, "warmup": 5, "decay": 0.25, "validation": 0.0, "checkpoint_every": 4, "precision": "fp32",
            "threads": 1}  # fmt: skip
    return {"train": item | changes, "model": SMALL if model is None else model}


def _train(model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return train(spec.parse(Recipe, _values(model, **changes), "r.toml"))


def _log(where: Path = Path()) -> list[dict[str, Any]]:
    (path,) = (where / "runs").glob("*/log.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _losses(where: Path = Path()) -> list[float]:
    log = _log(where)
    assert [line["step"] for line in log] == list(range(len(log)))
    return [line["loss"] for line in log]


def _checkpoint(where: Path = Path()) -> Path:
    (path,) = (where / "runs").glob("*/checkpoint")
    return path


def _same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _killed_at(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], Any]) -> None:
    """Run until `step` steps are done, then break off in the middle of the next, as a power cut would."""
    take = Loop.take_step

    def breaking(self: Loop) -> tuple[float, int]:
        if self.step == step:
            take(self)
            raise Killed
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "take_step", breaking)
        with pytest.raises(Killed):
            run()


# --- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_from_a_text_to_a_model_that_has_learned(home: Path, optimizer: str) -> None:
    Path("held.txt").write_text("x = 1\n" * 200, "utf-8")
    result = _train(optimizer=optimizer, steps=60, validation=0.3, evaluate_every=25, data=["my.txt", "held.txt"])
    losses = _losses()
    assert losses[0] == pytest.approx(5.7, abs=0.3)  # the logarithm of 300
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]
    assert [line["step"] for line in _log() if "validation" in line] == [24, 49, 59]
    assert result == _log()[-1]
    assert 0 < result["mfu"] < 2
    assert result["tokens_per_cpu_second"] > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    assert (model.config.model_type, model.dtype, len(tokenizer)) == ("llama", torch.bfloat16, 300)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64
    assert sum(p.numel() for p in model.parameters()) == 300 * 32 + 2 * layer + 32
    made = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert made.shape[1] > 5
    lineage = json.loads(Path("out/shrew.json").read_text())
    assert (lineage["threads"], lineage["seed"], lineage["parent"]) == (1, 0, None)
    assert lineage["recipe"]["train"]["steps"] == 60
    assert set(lineage["data"]) == {"train", "validation"}


def test_a_model_that_no_stock_type_can_say_is_trained_and_loaded(home: Path) -> None:
    mixers = {"A": {"heads": 4}, "B": {"heads": 2, "qk_norm": "head"}}
    _train(SMALL | {"pattern": "AB", "mixers": mixers}, steps=30)
    assert _losses()[-1] < 0.95 * _losses()[0]
    assert folder.load("out").model.config.model_type == "shrew"


def test_the_schedule_warms_up_stays_and_decays() -> None:
    item = TrainSpec(data=[], out="", steps=100, warmup=10, decay=0.2)
    assert [schedule(step, item) for step in (0, 4, 9, 10, 50, 80, 81, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 1.0, 0.95, 0.5, 0.05]
    )
    level = TrainSpec(data=[], out="", steps=100, warmup=0, decay=0.0)
    assert {schedule(step, level) for step in range(100)} == {1.0}
    short = TrainSpec(data=[], out="", steps=10, warmup=100, decay=1.0)  # never above either line
    assert all(schedule(step, short) <= min((step + 1) / 100, (10 - step) / 10) for step in range(10))


def test_gradients_of_small_batches_add_up_to_the_big_one(home: Path) -> None:
    found = []
    for micro in (1, 3, 8):
        _train(micro_rows=micro, out=f"m{micro}", steps=8)
        (path,) = Path("runs").glob(f"m{micro}-*/log.jsonl")
        found.append([json.loads(line)["loss"] for line in path.read_text().splitlines()])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_averaged_weights_are_the_average_and_are_saved(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Loop.save

    def keeping(self: Loop, facts: dict[str, Any]) -> None:
        save(self, facts)
        shutil.copytree(self.run / "checkpoint", f"kept{self.step}")

    monkeypatch.setattr(Loop, "save", keeping)
    _train(ema=0.7, steps=30, checkpoint_every=1)
    for step in (2, 12, 30):
        before, after = (load_file(f"kept{i}/average.safetensors") for i in (step - 1, step))
        weights = load_file(f"kept{step}/model.safetensors")
        keep = min(0.7, step / (9 + step))
        for name in after:
            torch.testing.assert_close(after[name], keep * before[name] + (1 - keep) * weights[name])
    saved = dict(adopt(folder.load("out").model).named_parameters())
    assert all(torch.equal(saved[name], after[name].bfloat16().float()) for name in saved)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_any_step_repeats_itself_to_the_bit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _train(ema=0.5)
    wanted = _losses()
    shutil.move("out", "wanted")
    shutil.rmtree("runs")
    for step in (0, 3, 4, 9, 19):  # before the first checkpoint, right after one, between two, in the last step
        _killed_at(monkeypatch, step, lambda: _train(ema=0.5))
        (log,) = Path("runs").glob("*/log.jsonl")
        with log.open("a") as stream:
            stream.write('{"step": 7, "lo')  # half a line
    _train(ema=0.5)
    assert _losses() == wanted
    assert _same_weights(Path("wanted"), Path("out"))


def test_kill_9_and_the_same_command_again(home: Path) -> None:
    values = _values(steps=80, checkpoint_every=9)
    (home / "r.toml").write_text(spec.to_toml(values), "utf-8")
    whole = home / "whole"
    whole.mkdir()
    shutil.copy("my.txt", whole)
    os.chdir(whole)
    assert main(["../r.toml"]) == 0
    os.chdir(home)
    done = random.randrange(5, 50)
    with subprocess.Popen([sys.executable, "-m", "shrew", "train", "r.toml"], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 300
        while sum(path.read_bytes().count(b"\n") for path in home.glob("runs/*/log.jsonl")) < done:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < until
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert main(["r.toml"]) == 0
    assert _losses() == _losses(whole)
    assert _same_weights(whole / "out", home / "out")


def test_a_finished_run_is_not_trained_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _train()
    log = _log()
    shutil.move("out", "before")
    monkeypatch.setattr(Loop, "take_step", lambda self: pytest.fail("trained again"))
    assert _train() == first
    assert _log() == log
    assert _same_weights(Path("before"), Path("out"))


@pytest.mark.parametrize(("steps", "decay"), [(40, 0.25), (16, 0.5)])
def test_another_length_branches_off_the_level_part(
    home: Path, monkeypatch: pytest.MonkeyPatch, steps: int, decay: float
) -> None:
    _killed_at(monkeypatch, 10, _train)  # its checkpoint is at step 8; the decays begin at 15, 30 and 8
    taken: list[int] = []
    take = Loop.take_step
    monkeypatch.setattr(Loop, "take_step", lambda self: (taken.append(self.step), take(self))[1])
    _train(steps=steps, decay=decay)
    assert taken == list(range(8, steps))
    branched = _losses()
    shutil.move("out", "before")
    shutil.rmtree("runs")
    _train(steps=steps, decay=decay)
    assert _losses() == branched
    assert _same_weights(Path("before"), Path("out"))


@pytest.mark.parametrize("changes", [{"steps": 40}, {"steps": 12}, {"decay": 0.5}])
def test_what_has_begun_to_decay_cannot_become_another_run(home: Path, changes: dict[str, Any]) -> None:
    _train()
    before = _log()
    with pytest.raises(errors.UsageError, match=r"checkpoint is at step 20 of 20 .* remove it to start again"):
        _train(**changes)
    assert _log() == before


def test_a_checkpoint_without_the_newer_facts_is_gone_on_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _killed_at(monkeypatch, 10, _train)
    path = _checkpoint() / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: state[key] for key in ("step", "threads", "cpu_seconds")}))
    _train()
    branched = _losses()
    shutil.rmtree("runs")
    _train()
    assert _losses() == branched


def test_the_thread_count_of_the_checkpoint_is_used(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        _killed_at(monkeypatch, 6, lambda: _train(threads=2))
        torch.set_num_threads(1)
        capsys.readouterr()
        _train(threads=1)
        assert torch.get_num_threads() == 2
        assert "2 threads" in capsys.readouterr().err
        assert json.loads(Path("out/shrew.json").read_text())["threads"] == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_broken_checkpoint_is_said(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: str) -> None:
    if (harm, name) == ("missing", "state.json"):
        words = "holds other things"
    else:
        words = r"checkpoint cannot be read .* remove it to start again"
    _killed_at(monkeypatch, 6, _train)
    path = _checkpoint() / name
    content = path.read_bytes()
    path.unlink()
    if harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(errors.UsageError, match=words) as caught:
        _train()
    assert "\n" not in str(caught.value)


def test_another_text_is_not_gone_on_with(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _killed_at(monkeypatch, 6, _train)
    with (home / "my.txt").open("a") as stream:
        stream.write("and more\n")
    with pytest.raises(errors.UsageError, match=r"no longer the one that .* was trained on"):
        _train()


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(home: Path) -> None:
    two = home / "two"
    two.mkdir()
    shutil.copy("my.txt", two)
    (two / "r.toml").write_text(spec.to_toml(_values(steps=12)), "utf-8")
    # --standalone finds a free port by itself
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--local-addr",
             "127.0.0.1", "-m", "shrew", "train", "r.toml"]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    running = subprocess.Popen(start, cwd=two, env=environment, stderr=subprocess.PIPE, text=True)
    _train(steps=12)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    assert said.count("Wrote out.") == 1
    assert _losses(two) == pytest.approx(_losses(), rel=1e-3)
    folder.load(two / "out")


# --- from other people's models --------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64,
                        bos_token_id=0, eos_token_id=1, initializer_range=0.2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_going_on_from_a_strangers_model(home: Path, gpt2: Path) -> None:
    _train(init="gpt2", steps=40)
    assert _losses()[-1] < 0.9 * _losses()[0]
    assert folder.load("out").model.config.model_type == "gpt2"
    parent = json.loads(Path("out/shrew.json").read_text())["parent"]
    assert parent == {"name": "gpt2", "sha256": folder.identity(gpt2)}


def _strange(kind: str, tokenizer: Any) -> str:
    """A folder with a model whose documents see each other in transformers, whatever the positions."""
    config = STRANGE[kind](vocab_size=len(tokenizer), **SIZES[kind], initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.max_length = 77
    model.save_pretrained(kind)
    tokenizer.save_pretrained(kind)
    return kind


STRANGE = {"lfm2": Lfm2Config, "mamba2": Mamba2Config, "mamba": MambaConfig}
SIZES: dict[str, dict[str, Any]] = {
    "lfm2": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "block_auto_adjust_ff_dim": False,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "full_attn_idxs": [1]},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8,
               "n_groups": 1, "chunk_size": 16},
    "qwen3_next": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                   "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lfm2", "mamba2"])
def test_packed_documents_are_as_if_alone_in_a_strangers_model(
    home: Path, gpt2: Path, tiny_llama_folder: Path, tiny_tokenizer: Any, kind: str
) -> None:
    known = {"gpt2": gpt2, "llama": tiny_llama_folder}
    init = known[kind] if kind in known else Path(_strange(kind, tiny_tokenizer))
    lines = [f"def f{i}(x):\n    return x + {i}\n" for i in range(7)]
    Path("my.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    loaded = folder.load(init)
    loaded.model.train()
    for module in loaded.model.modules():  # dropout, which gpt2 has, would hide the difference
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0 or kind == "gpt2"
            module.p = 0.0
    stream = data.tokenize(data.documents(["my.jsonl"]), loaded.tokenizer)
    tokens, targets, owner = (torch.from_numpy(array) for array in data.Batches(stream, 60, 1, 0)[0])
    assert owner.max() >= 2
    total = 0.0
    for number in owner.unique():
        here = owner == number
        logits = loaded.model(tokens[here][None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, targets[here], reduction="sum").item()
    if kind == "gpt2":
        config = json.loads((gpt2 / "config.json").read_text())
        config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        (gpt2 / "config.json").write_text(json.dumps(config))
    _train(init=str(init), data=["my.jsonl"], length=60, batch_tokens=60, steps=1)
    assert _losses()[0] == pytest.approx(total / int((targets != -100).sum()), rel=1e-4)
    out = folder.load("out").model
    assert out.config.model_type == kind
    assert out.generation_config.max_length == loaded.model.generation_config.max_length


def test_documents_that_would_see_each_other_are_refused(home: Path, tiny_tokenizer: Any) -> None:
    init = _strange("mamba", tiny_tokenizer)
    with pytest.raises(errors.UsageError, match="mamba cannot keep them apart; train with document_mask = false"):
        _train(init=init, steps=1)
    _train(init=init, steps=1, document_mask=False)


def test_flops_of_types_with_few_attention_layers_and_without_experts() -> None:
    grown = []
    for config in (Lfm2Config(vocab_size=50, **SIZES["lfm2"]), Mamba2Config(vocab_size=50, **SIZES["mamba2"]),
                   Qwen3NextConfig(vocab_size=50, num_experts=0, **SIZES["qwen3_next"])):  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        grown.append(flops_per_token(model, 64) - flops_per_token(model, 32))
    assert grown == [12 * 32 * 16 * layers for layers in (1, 0, 1)]


@pytest.mark.parametrize("ours", [True, False])
def test_muon_takes_no_router_and_no_gate_of_one_number(ours: bool) -> None:
    table = {"layers": 2, "width": 32, "vocabulary": 50, "mixers": {"A": {"heads": 4}},
             "ffn": {"kind": "moe", "experts": 4, "hidden": 8, "shared": 8, "shared_gate": True},
             "mixture_of_depths": {"every": 2}}  # fmt: skip
    config = Qwen3NextConfig(vocab_size=50, num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2,
                             shared_expert_intermediate_size=8, **SIZES["qwen3_next"])  # fmt: skip
    model = build(spec.parse(ModelSpec, table, "r.toml")) if ours else AutoModelForCausalLM.from_config(config)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = optimizers(model, TrainSpec(data=[], out=""))[0]
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    small = ("ffn.gate.weight", "mlp.gate.weight", "shared_gate.weight", "shared_expert_gate.weight", "score.weight")
    assert sum(name.endswith(small) for name in names.values()) == (5 if ours else 8)
    assert not [name for name in taken if name.endswith(small)]
    assert any(name.endswith("q_proj.weight") for name in taken)


def _labelled(path: Path, labels: dict[str, str]) -> None:
    rows = [{"text": f"{sample} {i}", "label": label} for i in range(20) for label, sample in labels.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_classifier_learns_from_labelled_lines(home: Path, tiny_classifier_folder: Path) -> None:
    _labelled(home / "my.jsonl", {"code": "def f(x):", "comment": "# a remark", "prose": "It rained."})
    _train(init=str(tiny_classifier_folder), data=["my.jsonl"], steps=30, lr=2e-3, optimizer="adamw")
    assert sum(_losses()[-5:]) < 0.5 * sum(_losses()[:5])
    model = folder.load("out").model
    assert type(model).__name__ == "DistilBertForSequenceClassification"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x", "label": "cod"}', "line 1: the model has no label 'cod'; did you mean 'code'"),
        ('{"text": "x"}', "line 1: expected"),
        ('{"label": "code"}', "line 1: expected"),
        ("", "no labelled text"),
        ("{", "line 1: no JSON"),
    ],
)
def test_wrong_labels_are_refused_by_line(home: Path, tiny_classifier_folder: Path, line: str, words: str) -> None:
    Path("my.jsonl").write_text(line)
    with pytest.raises(errors.DataError, match=words):
        _train(init=str(tiny_classifier_folder), data=["my.jsonl"])


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run(home: Path) -> None:
    with pytest.raises(errors.ShrewError, match=r"the loss is (nan|inf) at step \d+; lower --lr") as caught:
        _train(lr=1e25, clip=0.0, optimizer="adamw", warmup=0, steps=50)
    assert caught.value.exit_code == 1
    assert not Path("out").exists()


def test_a_loss_that_was_none_from_the_start_is_not_the_rates_fault(home: Path) -> None:
    with pytest.raises(errors.ShrewError, match="the loss is nan at step 0; nothing was learned by then"):
        _train(SMALL | {"softcap": 1e300})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stpes": 3}, "unknown key 'stpes'; did you mean 'steps'"),
        ({"steps": 0}, "steps"),
        ({"data": ["none.txt"]}, "none.txt: no such file"),
        ({"data": []}, "name at least one text"),
        ({"length": 65}, "train.length 65 is more than the model's context of 64"),
        ({"tokenizer": "bpe"}, "give bpe:SIZE, bytes or a folder"),
        ({"tokenizer": "."}, "this folder holds none that can be read"),
        ({"init": "nothing"}, "nothing"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"precision": "fp8"}, "precision: 'fp8' is none of auto, fp32, bf16"),
        ({"tokenizer": "bpe:256"}, "bytes and marks are 257 tokens already"),
        ({"tokenizer": "bpe:259", "fim": 0.5}, "bytes and marks are 260 tokens already"),
        ({"tokenizer": "bpe:99999999999"}, "like bpe:4096"),
        ({"tokenizer": "bpe:²"}, "like bpe:4096"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63 - 1}, "seed"),
        ({"lr": 1e308}, "lr"),
        ({"threads": 100_000}, "threads"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_sentence(home: Path, changes: dict[str, Any], words: str) -> None:
    (home / "r.toml").write_text(spec.to_toml(_values(**changes)), "utf-8")
    with pytest.raises(errors.UsageError, match=words) as caught:
        main(["r.toml"])
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_tokenizer_of_one_endless_word(home: Path) -> None:
    """The time to train on a word grows with the square of its length: a million zeros took more than ten minutes."""
    Path("zeros.txt").write_text("\0" * 1_000_000 + " word" * 100)
    made = train_tokenizer(data.documents(["zeros.txt"]), 300, 0)
    assert 257 < len(made) <= 300
    assert made.decode(made("\0" * 30_000 + " word")["input_ids"]) == "\0" * 30_000 + " word"


def test_more_wrong_recipes(home: Path, tiny_tokenizer: Any) -> None:
    Path("r.toml").write_text("[model]\nlayers = 1\n")
    with pytest.raises(errors.SpecError, match="train"):
        main(["r.toml"])
    with pytest.raises(errors.SpecError, match="no such file"):
        main(["none.toml"])
    with pytest.raises(errors.SpecError, match=r"model.vocabulary 200 is smaller than the tokenizer's 300"):
        _train(SMALL | {"vocabulary": 200})
    shutil.rmtree("runs")
    Path("my.txt").write_text("short\n")
    tiny_tokenizer.save_pretrained("tokens")
    with pytest.raises(errors.DataError, match="fewer than one window of 32"):
        _train(tokenizer="tokens")


def test_an_output_that_cannot_be_written_is_said_before_any_work(home: Path) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("x")
    for out, words in {"thesis": "holds other things", "my.txt": "is a file", "my.txt/below": "is a file"}.items():
        with pytest.raises(errors.UsageError, match=words):
            _train(out=out)
    assert not Path("runs").exists()
    assert Path("thesis/chapter.tex").read_text() == "x"


def test_what_is_read_is_not_written_over(home: Path, tiny_llama_folder: Path) -> None:
    shutil.copytree(tiny_llama_folder, "model")
    Path("model/shrew.json").write_text("{}")
    Path("model/text.txt").write_text("text")
    Path("model/r.toml").write_text(spec.to_toml(_values(out="model")))
    for changes in ({"init": "model"}, {"init": "model/../model"}, {"data": ["model/*.txt"]}, {"tokenizer": "model"}):
        with pytest.raises(errors.UsageError, match="writing model would replace model"):
            _train(out="model", **changes)
    with pytest.raises(errors.UsageError, match=r"would replace model/r\.toml"):
        main(["model/r.toml"])
    assert Path("model/model.safetensors").exists()


def test_flags_overrule_the_recipe(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.toml").write_text(spec.to_toml(_values()))
    assert main(["r.toml", "--steps", "3", "--out", "other", "--lr", "0.001", "--json"]) == 0
    assert len(_losses()) == 3
    assert json.loads(capsys.readouterr().out) == _log()[-1]
    lineage = json.loads(Path("other/shrew.json").read_text())
    assert lineage["recipe"]["train"]["lr"] == 0.001


def test_text_can_be_given_instead_of_the_recipes(home: Path) -> None:
    values = _values()
    (data,) = values["train"].pop("data")
    Path("r.toml").write_text(spec.to_toml(values))
    with pytest.raises(errors.SpecError, match="data"):
        main(["r.toml"])
    assert main(["r.toml", "--steps", "1", "--text", data]) == 0
    assert json.loads(Path(values["train"]["out"], "shrew.json").read_text())["recipe"]["train"]["data"] == [data]
