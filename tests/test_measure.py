"""Statistics by hand and by simulation, costs, and the verb on tiny folders."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from shrew import folder, measure, record
from shrew.blocks.attention import AttentionSpec
from shrew.blocks.conv import ConvSpec
from shrew.blocks.embeddings import NgramSpec
from shrew.blocks.model import ModelSpec, build
from shrew.blocks.moe import MoeSpec
from shrew.errors import DataError, ShrewError, UsageError
from shrew.measure import cost, statistics
from shrew.tasks import Scores


def text(bits: Any, size: Any = 100.0) -> Scores:
    bits = np.asarray(bits, float)
    columns = {"bits": bits, "bytes": np.broadcast_to(np.asarray(size, float), bits.shape)}
    return Scores("text@1", "final", "bits_per_byte", [str(n) for n in range(len(bits))], columns)


def answers(correct: Any, chance: float = 0.0) -> Scores:
    values = np.asarray(correct, float)
    units = [str(n) for n in range(len(values))]
    return Scores("choice@1", "final", "accuracy", units, {"correct": values}, chance)


def test_retention_by_hand() -> None:
    assert measure.retention(text([100, 300]), text([150, 350])) == pytest.approx(400 / 500)
    assert measure.retention(answers([1, 1, 1, 0], 0.25), answers([1, 1, 0, 0], 0.25)) == pytest.approx(0.25 / 0.5)
    assert measure.difference(text([100, 300]), text([150, 350])) == pytest.approx(0.5)


def test_only_the_same_units_can_be_compared() -> None:
    with pytest.raises(DataError, match="same task and split"):
        measure.retention(text([1, 2]), text([1, 2, 3]))
    with pytest.raises(DataError, match="no quality to keep"):
        measure.retention(answers([1, 0], 0.5), answers([1, 1], 0.5))


def test_bootstrap_agrees_with_theory_and_with_single_resamples() -> None:
    rng = np.random.default_rng(0)
    old = text(rng.normal(100, 10, 400))
    new = text(old.columns["bits"] + rng.normal(5, 20, 400))
    found = measure.paired_bootstrap(old, new, "difference", samples=4000)
    error = (new.columns["bits"] - old.columns["bits"]).std() / 20 / 100
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.value == pytest.approx(measure.difference(old, new))
    few = text(rng.random(5) + 1, rng.random(5) + 1)
    rows = next(few.resamples(3, seed=4))
    index = np.random.default_rng(4).integers(0, 5, (3, 5))
    np.testing.assert_allclose(few.values(rows), [few.value(row) for row in index])


@settings(max_examples=40)
@given(st.lists(st.floats(1, 1e5), min_size=2, max_size=30), st.floats(0.5, 2), st.integers(0, 99))
def test_a_constant_factor_is_known_exactly(bits: list[float], factor: float, seed: int) -> None:
    old, new = text(bits), text(np.array(bits) * factor)
    found = measure.paired_bootstrap(old, new, samples=50, seed=seed)
    assert (found.value, found.low, found.high) == pytest.approx((1 / factor,) * 3)
    assert measure.lower_bound(old, new, samples=50, seed=seed) == pytest.approx(1 / factor)


@settings(max_examples=40)
@given(st.integers(2, 60), st.integers(0, 2**31))
def test_bounds_are_ordered(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = text(rng.lognormal(3, 1, n))
    new = text(old.columns["bits"] * rng.lognormal(0, 0.1, n))
    found = measure.paired_bootstrap(old, new, samples=200, seed=seed)
    assert found.low <= found.high
    bounds = [measure.lower_bound(old, new, alpha, 500, seed) for alpha in (0.001, 0.01, 0.05)]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= found.value
    assert measure.paired_bootstrap(old, new, samples=200, seed=seed) == found


def test_one_unit_proves_nothing() -> None:
    assert measure.lower_bound(text([5]), text([5])) == -math.inf
    assert measure.highest_keep(text([5])) == 0


RUNS = 1000
LIMIT = 0.05 + 1.645 * math.sqrt(0.05 * 0.95 / RUNS)  # a true level of 5 % shows more than this once in 20


@pytest.mark.parametrize("n", [20, 60, 200])
@pytest.mark.parametrize("damage", ["lognormal", "student", "normal"])
def test_a_model_below_the_floor_passes_in_at_most_5_percent(n: int, damage: str) -> None:
    """Heavy-tailed document losses and damages; the true retention lies just below the floor."""
    floor, rng = 0.98, np.random.default_rng(n)
    losses = rng.lognormal(0, 0.7, (RUNS, n))
    relative = {  # each has mean 1, so that the expected loss is the original's over (floor - 0.0001)
        "lognormal": lambda: rng.lognormal(-0.5, 1, (RUNS, n)),
        "student": lambda: 1 + rng.standard_t(3, (RUNS, n)),
        "normal": lambda: 1 + rng.normal(0, 1, (RUNS, n)),
    }[damage]()
    after = losses * (1 + (1 / (floor - 0.0001) - 1) * relative)
    passed = [
        measure.lower_bound(text(old), text(new), samples=200) >= floor
        for old, new in zip(losses, after, strict=True)
    ]
    assert np.mean(passed) <= LIMIT


@pytest.mark.parametrize(
    ("n", "accuracy", "gain"), [(50, 0.9, 0.0), (200, 0.8, 0.02), (400, 0.6, 0.0), (400, 0.9, 0.05)]
)
def test_the_gate_keeps_its_level_for_right_and_wrong_answers(n: int, accuracy: float, gain: float) -> None:
    floor, rng = 0.95, np.random.default_rng(n)
    loss = (1 - floor + 0.0001) * accuracy + gain  # share of all answers that get lost
    old = rng.random((RUNS, n)) < accuracy
    draw = rng.random((RUNS, n))
    new = np.where(old, draw >= loss / accuracy, draw < gain / (1 - accuracy))
    passed = [measure.lower_bound(answers(a), answers(b), samples=200) >= floor for a, b in zip(old, new, strict=True)]
    assert np.mean(passed) <= LIMIT


def test_a_good_model_passes_when_there_is_enough_data() -> None:
    rng = np.random.default_rng(0)
    old = rng.lognormal(0, 0.5, 200)
    new = old * (1 + 0.01 * rng.lognormal(-0.125, 0.5, 200))
    assert 0.98 < measure.lower_bound(text(old), text(new)) < measure.retention(text(old), text(new)) < 1


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_no_changed_answer_is_the_rule_of_three(n: int) -> None:
    same = answers(np.ones(n))
    exact = 1 - 0.05 ** (1 / n)
    lost = 1 - measure.lower_bound(same, same)
    assert exact < lost < 1.35 * exact
    assert measure.highest_keep(same) == pytest.approx(1 - lost)


def test_exact_tests_by_hand() -> None:
    old, new = [1] * 9 + [0] + [1] * 5, [0] * 9 + [1] + [1] * 5
    assert measure.exact_test(answers(old), answers(new)) == ("mcnemar", 2 * (1 + 10) / 2**10)
    assert measure.exact_test(answers(old), answers(old)) == ("mcnemar", 1.0)
    assert measure.exact_test(text([1, 1, 1, 1, 1, 2]), text([2, 2, 2, 2, 2, 2])) == ("sign", 2 / 2**5)


@given(st.integers(0, 60), st.integers(0, 60))
def test_binomial_by_its_sum(a: int, b: int) -> None:
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    assert statistics.binomial_two_sided(a, b) == pytest.approx(min(1, 2 * tail))


def test_smallest_difference_is_found_with_its_power() -> None:
    rng = np.random.default_rng(1)
    n, noise = 100, 8.0
    old = rng.normal(100, 30, n)
    smallest = measure.smallest_difference(text(old), text(old + rng.normal(0, noise, n)))
    assert smallest == pytest.approx(2.8 * noise / 100 / math.sqrt(n), rel=0.2)
    shift = rng.normal(smallest * 100, noise, (2000, n))
    found = np.abs(shift.mean(1)) / (shift.std(1, ddof=1) / math.sqrt(n)) > 1.96
    assert 0.7 < found.mean() < 0.95
    assert measure.smallest_difference(text(old)) > smallest  # unpaired noise is larger


def test_highest_keep_is_what_an_unchanged_model_reaches() -> None:
    rng = np.random.default_rng(2)
    old = rng.lognormal(0, 0.5, 150)
    noise = rng.normal(1, 0.05, (300, 150))
    keep = measure.highest_keep(text(old), text(old * noise[0]))
    reached = [measure.lower_bound(text(old), text(old * factors), samples=200) for factors in noise[1:]]
    assert 0.6 < np.mean(np.array(reached) >= keep) < 0.97
    assert measure.highest_keep(text(old[:20]), text(old[:20] * noise[0, :20])) < keep < 1


@pytest.mark.parametrize(("p", "freedom", "wanted"), [(0.95, 1, 6.3138), (0.95, 19, 1.7291), (0.975, 5, 2.5706),
                                                     (0.995, 30, 2.7500), (0.95, 1e5, 1.6449)])  # fmt: skip
def test_student_quantiles(p: float, freedom: float, wanted: float) -> None:
    assert statistics.student_quantile(p, freedom) == pytest.approx(wanted, rel=1e-3)


def test_speed_ratios_by_hand() -> None:
    found = cost.ratio_of_pairs(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    found = cost.ratio_of_pairs(np.array([1.0, 4.0]), np.array([1.0, 1.0]))
    assert found.value == pytest.approx(2)
    assert found.low < 1 < 4 < found.high


def test_energy_reads_a_counter_or_says_cpu_seconds(tmp_path: Path) -> None:
    spent = cost.energy(lambda: sum(range(10**6)), tmp_path)
    assert spent.unit == "CPU-seconds" and spent.value > 0
    package, part = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:0:0"
    for path in (package, part):
        path.mkdir()
        (path / "max_energy_range_uj").write_text("9999999\n")
        (path / "energy_uj").write_text("9000000\n")
    wrapped = cost.energy(lambda: (package / "energy_uj").write_text("1000000\n"), tmp_path)
    assert wrapped == cost.Energy(2.0, "J", "RAPL, intel-rapl:0")


def test_parameters_count_ties_once_and_experts_by_their_share() -> None:
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    block = 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8 + 4 * 8
    assert cost.parameters(tied) == (50 * 8 + 16 * 8 + block + 16,) * 2
    config = OlmoeConfig(vocab_size=50, hidden_size=8, intermediate_size=4, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, num_experts=4, num_experts_per_tok=1, pad_token_id=0)  # fmt: skip
    total, active = cost.parameters(OlmoeForCausalLM(config))
    assert total - active == 2 * 3 * (3 * 8 * 4)  # layers x idle experts x (gate, up, down)


def test_our_own_models_say_what_a_token_uses() -> None:
    ffn = MoeSpec(experts=4, top_k=1, hidden=4, every=2)
    model = build(ModelSpec(pattern="AC", layers=4, width=8, vocabulary=50, ngrams=NgramSpec(sizes=(2,), rows=30),
                            mixers={"A": AttentionSpec(heads=2), "C": ConvSpec()}, ffn=ffn))  # fmt: skip
    total, active = cost.parameters(model)
    assert total == sum(item.numel() for item in model.parameters())
    assert total - active == 2 * 3 * (3 * 8 * 4) + 30 * 8  # idle experts; the table of n-grams, of which a row is read


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator(["small mammals eat a lot"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    made = []
    for seed, name in enumerate(["big", "small"]):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2 - seed, n_head=2, n_positions=64,
                            bos_token_id=0, eos_token_id=0)  # fmt: skip
        path = tmp_path_factory.mktemp("models") / name
        GPT2LMHeadModel(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        made.append(path)
    return made[0], made[1]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": f"small mammals eat {n} flies"}) + "\n" for n in range(60)))
    return path


def test_measure_prints_records(folders: tuple[Path, Path], words: Path, tmp_path: Path, capsys: Any) -> None:
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"text": f"flies {n}", "label": "ab"[n % 2]}) + "\n" for n in range(40)))
    kept = tmp_path / "out" / "records.jsonl"
    arguments = [*map(str, folders), "--text", str(words), "--task", str(labels), "--json", "--no-cost"]
    assert measure.main([*arguments, "--records", str(kept)]) == 0
    out = capsys.readouterr()
    found = [json.loads(line) for line in out.out.splitlines()]
    assert [item["metric"] for item in found] == [item.metric for item in record.read(kept)]
    assert "words@1 (text): 60 examples" in out.err
    of = {(item["model"], item["metric"], item["task"]): item for item in found}
    kept_quality = of["small", "retention", "words@1/final"]
    assert kept_quality["value"] == pytest.approx(
        of["big", "bits_per_byte", "words@1/final"]["value"] / of["small", "bits_per_byte", "words@1/final"]["value"]
    )
    assert kept_quality["detail"]["lower_bound"] <= kept_quality["value"]
    assert of["small", "kl", "words@1/final"]["value"] > 0
    assert 0 <= of["small", "top1_agreement", "words@1/final"]["value"] <= 1
    assert ("big", "retention", "words@1/final") not in of
    assert of["small", "bits_per_byte", "words@1/final"]["detail"]["test"] == "sign"
    bands = [item for item in found if item["metric"] == "band" and item["model"] == "big"]
    assert [item["detail"]["band"] for item in bands] == list(range(10))
    assert {item["metric"] for item in found if item["task"] == "labels@1/final"} >= {"macro_f1", "accuracy"}


def test_measure_prints_a_table_with_costs(folders: tuple[Path, Path], words: Path, capsys: Any) -> None:
    assert measure.main([str(folders[0]), "--text", str(words)]) == 0
    assert measure.main([*map(str, folders), "--text", str(words), "--no-cost"]) == 0
    table = capsys.readouterr().out
    for row in ("retention", "bits per byte", "bytes", "active parameters", "prefill ratio", "decode ratio",
                "peak memory", "energy", "rarest"):  # fmt: skip
        assert row in table
    assert "test p = " in table and "could show" in table


def test_costs_are_those_of_the_folder(folders: tuple[Path, Path]) -> None:
    size = cost.disk_size(folders[0])
    assert size.weights == (folders[0] / "model.safetensors").stat().st_size
    assert size.folder == sum(item.stat().st_size for item in folders[0].iterdir())
    loaded = [folder.load(path) for path in folders]
    found = measure.speed_records("run", ["big", "small"], loaded, rounds=3)
    assert [(item.model, item.metric) for item in found] == [
        (model, metric) for metric in ("prefill_ratio", "decode_ratio") for model in ("big", "small")
    ]
    assert found[0].value == found[0].low == found[0].high == 1
    assert all(item.detail["wall_seconds"] > 0 and item.detail["cpu_seconds"] > 0 for item in found)


def test_failures_are_sentences(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure.main([str(folders[0]), "--no-cost"])
    with pytest.raises(DataError, match="no such file"):
        measure.main([str(folders[0]), "--task", str(tmp_path / "none.jsonl")])
    monkeypatch.setattr(cost, "PROBE", "import sys; sys.exit('no memory left')")
    with pytest.raises(ShrewError, match=r"\(no memory left\); run again with --no-cost"):
        cost.peak_memory(tmp_path)


def test_no_quality_to_keep_is_said_in_the_record() -> None:
    poor = answers([1, 0, 0, 0], 0.25)
    found = {item.metric: item for item in measure.quality_records("run", "new", poor, poor)}
    assert found["retention"].value is None
    assert "no quality to keep" in found["retention"].detail["reason"]
