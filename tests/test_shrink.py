"""`shrew shrink` from the command line to the verdict, on a tiny model that was trained to have something to lose."""

import contextlib
import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from broken import copied, disagreeing, flags, not_a_number, occupied, task_file, too_large, truncated
from transformers import AutoModelForCausalLM, AutoTokenizer

from shrew import folder, record, spec
from shrew.__main__ import main
from shrew.measure import cost
from shrew.moves.source import Source
from shrew.search import families, trial
from shrew.search import run as search_run

FLAGS = ["--keep", "0.8", "--heal", "4", "--lr", "1e-4", "--jobs", "1", "--candidates", "2", "--group", "32"]
ONCE = ["--minutes", "0.001"]  # one round of closing in, which is always made


class InProcess:
    """The executor's seam with no processes behind it: what `LocalExecutor` offers, done at once."""

    def __init__(self, jobs: int, threads: int) -> None:
        assert (jobs, threads) == (1, 1)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        json.dumps(arguments)  # plain values only
        try:
            future.set_result(json.loads(json.dumps(function(*arguments))))
        except Exception as error:
            future.set_exception(error)
        return future

    def cpu_seconds(self) -> float:
        return 0.0

    def close(self, wait: bool = True) -> None:
        pass


@contextlib.contextmanager
def light() -> Iterator[None]:
    """No worker processes, and no fresh processes to measure memory in: most tests are about neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_run, "LocalExecutor", InProcess)
        patch.setattr(cost, "peak_memory", lambda path: (300_000_000, 200_000_000))
        yield


@pytest.fixture
def shrink(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `shrew shrink` in this process: exit code and what it said."""

    def call(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        with light():
            code = main(["shrink", *map(str, arguments)])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call


# One whole run, interrupted twice


@dataclass
class Whole:
    model: Path
    text: Path
    out: Path
    stopped: list[tuple[int, str]]
    said: str
    code: int


def start(work: Path, *arguments: str) -> subprocess.Popen[str]:
    """Where the tests themselves run in the background of a shell, Ctrl-C is ignored, and so it would be here."""
    command = [sys.executable, "-m", "shrew", "shrink", *arguments]
    return subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


def stop_after(work: Path, words: str, how: signal.Signals, *arguments: str) -> tuple[int, str]:
    """Start a run, send it a signal once it has said `words`, and wait until it and its workers are gone."""
    workers: list[psutil.Process] = []
    said = ""
    with start(work, *arguments) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if words in line and not workers:
                workers = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(how)
    assert workers, said
    _, alive = psutil.wait_procs(workers, 30)
    assert not alive, "workers outlive their parent"
    return process.returncode, said


@pytest.fixture(scope="module")
def whole(trained_llama_folder: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Ctrl-C after the first trial, kill -9 after the third, and then a run that is left to finish."""
    work = tmp_path_factory.mktemp("whole")
    arguments = [str(trained_llama_folder), "--text", str(stories), "--out", "small", *FLAGS]
    stopped = [stop_after(work, "trial 1:", signal.SIGINT, *arguments)]
    assert list(work.iterdir()) == []
    stopped += [stop_after(work, "trial 3:", signal.SIGKILL, *arguments)]
    assert list(work.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        patch.chdir(work)
        patch.setattr(cost, "peak_memory", lambda path: (300_000_000, 200_000_000))
        code = main(["shrink", *arguments])
    return Whole(trained_llama_folder, stories, work / "small", stopped, said.getvalue(), code)


def test_ctrl_c_is_one_sentence_and_leaves_nothing(whole: Whole) -> None:
    code, said = whole.stopped[0]
    assert code == 130
    assert said.rstrip().endswith("shrew: stopped; run the same command again to go on.")
    assert "Traceback" not in said


def test_a_killed_run_goes_on_where_it_was(whole: Whole) -> None:
    assert whole.stopped[1][0] == -signal.SIGKILL
    assert whole.code == 0, whole.said
    trials = [line for line in whole.said.splitlines() if line.startswith("trial ")]
    assert len(trials) > 3
    assert all("from the cache" in line for line in trials[:2]), whole.said  # the third may still have been at work
    assert not all("from the cache" in line for line in trials)


def test_the_plan_is_said_first(whole: Whole) -> None:
    first = whole.said.splitlines()
    assert "keep at least 80.0% of the quality" in first[0]
    assert "calibration" in first[1]
    assert "final" in first[1]
    assert "1 trial(s) at a time; 1 thread" in first[2]
    assert "highest --keep that this much text can prove" in whole.said
    assert "The original healed alike keeps" in whole.said
    assert whole.said.index("Opening the final split") > whole.said.rindex("trial ")


def test_the_result_is_complete_and_smaller(whole: Whole) -> None:
    names = {item.name for item in whole.out.iterdir()}
    assert {"model.safetensors", "config.json", "shrew.json", "tokenizer.json", "recipe.toml", "records.jsonl",
            "report.html"} <= names  # fmt: skip
    before, after = (cost.disk_size(path).weights for path in (whole.model, whole.out))
    assert after < before / 2
    records = record.read(whole.out / "records.jsonl")
    (verdict,) = [item for item in records if item.metric == "verdict"]
    assert (verdict.value, verdict.model) == ("met", "chosen")
    chosen = [item for item in records if item.model == "chosen"]
    (kept,) = [item for item in chosen if item.metric == "retention" and item.task.endswith("/final")]
    assert kept.detail["lower_bound"] >= kept.detail["floor"] == 0.8
    assert kept.detail["against"] in ("original", "healed original")
    (size,) = [item.value for item in chosen if item.metric == "bytes"]
    assert size == after
    forgotten = {item.metric: item for item in chosen if item.metric in ("band", "document", "tail")}
    assert {item.task for item in forgotten.values()} == {kept.task}
    assert forgotten["band"].detail["against"] == "original" and "difference_low" in forgotten["band"].detail
    page = (whole.out / "report.html").read_text("utf-8")
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_record_of_every_tensor_is_read_from_the_file(whole: Whole) -> None:
    records = record.read(whole.out / "records.jsonl")
    told = {item.detail["tensor"]: (item.value, item.detail["bytes"]) for item in records if item.metric == "tensor"}
    assert told == {item.name: (item.effective, item.bytes) for item in folder.tensors(whole.out)}
    untouched = [item for item in records if item.metric == "tensor" and item.value == "bf16"]
    assert untouched
    assert all(item.detail["reason"] for item in untouched)


def test_the_result_generates_in_a_fresh_process(whole: Whole, warm: Path) -> None:
    script = (
        "import sys, torch, shrew\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "words = AutoTokenizer.from_pretrained(sys.argv[1])('The cat', return_tensors='pt', add_special_tokens=False)\n"
        "made = model.generate(input_ids=words['input_ids'], max_new_tokens=8, do_sample=False, pad_token_id=2)\n"
        "print(made.tolist()[0])\n"
    )
    done = subprocess.run([warm / "python", "-c", script, whole.out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = folder.load(whole.out)
    words = loaded.tokenizer("The cat", return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = loaded.model.generate(input_ids=words, max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert json.loads(done.stdout) == made.tolist()[0]


def test_a_second_run_repeats_nothing(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    code, said = shrink(whole.model, "--text", whole.text, "--out", tmp_path / "again", *FLAGS)
    assert code == 0
    trials = [line for line in said.splitlines() if line.startswith("trial ")]
    assert len(trials) == sum(line.startswith("trial ") for line in whole.said.splitlines())
    assert all("from the cache" in line for line in trials)
    assert weights(tmp_path / "again") == weights(whole.out)
    assert (tmp_path / "again" / "shrew.json").read_bytes() == (whole.out / "shrew.json").read_bytes()


def test_the_recipe_makes_the_same_bytes(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "empty"))
    threads = torch.get_num_threads()
    try:
        assert main(["apply", str(whole.out / "recipe.toml"), "--out", str(tmp_path / "made")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "made") == weights(whole.out)


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


# Coded weights


@pytest.fixture(scope="module")
def coded(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --coded makes of the same model, text and goals."""
    out = tmp_path_factory.mktemp("coded") / "small"
    with light():
        assert main(["shrink", str(whole.model), "--text", str(whole.text), "--out", str(out), "--coded", *FLAGS]) == 0
    return out


def test_coded_is_smaller_and_proven(whole: Whole, coded: Path) -> None:
    assert cost.disk_size(coded).weights < 0.9 * cost.disk_size(whole.out).weights
    records = record.read(coded / "records.jsonl")
    (kept,) = [item for item in records if (item.model, item.metric) == ("chosen", "retention")
               and item.task.endswith("/final")]  # fmt: skip
    assert kept.detail["passed"] and kept.detail["lower_bound"] >= kept.detail["floor"] == 0.8
    types = [item.value for item in records if item.metric == "tensor"]
    assert any(value.endswith("coded") for value in types)
    (step, *_) = [item for item in records if item.metric == "move" and item.detail["move"]["name"] == "quantize"]
    assert 1 <= step.detail["move"]["rate"] <= 6
    assert f"quantize (rate {step.detail['move']['rate']:g}" in (coded / "report.html").read_text("utf-8")


def test_healing_keeps_weights_coded(coded: Path) -> None:
    """Every trial that was healed: codes stay on their grid, and their entropy grows little."""
    trials = {item.model: item.detail["moves"] for item in record.read(coded / "records.jsonl")
              if item.metric == "trial"}  # fmt: skip
    sizes = {item.model: float(item.value) for item in record.read(coded / "records.jsonl")
             if item.metric == "bytes" and item.model in trials}  # fmt: skip
    pairs = [(name, bare) for name, moves in trials.items() for bare, others in trials.items()
             if moves[-1]["name"] == "distil" and moves[:-1] == others]  # fmt: skip
    assert pairs
    assert all(sizes[bare] * 0.98 < sizes[healed] < sizes[bare] * 1.1 for healed, bare in pairs)


def test_a_coded_recipe_makes_the_same_bytes(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "empty"))
    threads = torch.get_num_threads()
    try:
        assert main(["apply", str(coded / "recipe.toml"), "--out", str(tmp_path / "made")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "made") == weights(coded)


def test_transformers_reads_coded_weights(coded: Path) -> None:
    """`import shrew`, which this module has done, is all that plain transformers needs."""
    words = AutoTokenizer.from_pretrained(coded)("The cat", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32).eval()(words).logits
        wanted = folder.load(coded).model(words).logits
    assert torch.allclose(found, wanted, atol=1e-5)


# Tokens that the text never uses


def test_unused_tokens_are_dropped(
    trained_llama_folder: Path, stories: Path, shrink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary four times as large as the stories ask for: the search drops it, and the report reads well."""
    loaded = folder.load(trained_llama_folder)
    content = json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    known = content["model"]["vocab"]
    letters = [token for token in known if len(token) == 1]
    for a, b in itertools.islice(itertools.product(letters[-60:], repeat=2), 1000):
        if a + b not in known:
            known[a + b] = len(known)
            content["model"]["merges"].append([a, b])
    loaded.tokenizer = with_content(loaded.tokenizer, content, tmp_path / "tokenizer")
    torch.manual_seed(0)
    loaded.model.resize_token_embeddings(len(known))
    folder.save(loaded, tmp_path / "wide")
    source = spec.dump(Source(model=str(tmp_path / "wide"), text=[str(stories)], threads=1))
    alone = trial.cut(json.dumps(source), [{"name": "trim-vocab"}])
    assert alone["damage"] == pytest.approx(0, abs=1e-4)  # to the original without those tokens, whatever their numbers
    cuts = families.cuts
    monkeypatch.setattr(families, "cuts", lambda run, scores: dict([next(iter(cuts(run, scores).items()))]))
    flags = ["--keep", "0.8", "--heal", "1", "--lr", "1e-4", "--jobs", "1", *ONCE]
    code, said = shrink(tmp_path / "wide", "--text", stories, "--out", tmp_path / "out", *flags)
    assert code == 0, said
    (first, *_) = json.loads((tmp_path / "out" / "shrew.json").read_text("utf-8"))["moves"]
    assert first["name"] == "trim-vocab", said
    small = folder.load(tmp_path / "out")
    assert len(small.tokenizer) < len(known) / 2
    records = record.read(tmp_path / "out" / "records.jsonl")
    samples = [item.detail for item in records if item.metric == "sample"]
    assert any(item["before"][:5] == item["after"][:5] for item in samples), samples
    assert {item.metric for item in records if item.model == "chosen"} >= {"retention", "bytes", "document"}


def with_content(old: Any, content: dict[str, Any], place: Path) -> Any:
    old.save_pretrained(place)
    (place / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return AutoTokenizer.from_pretrained(place)


# Goals that cannot be met


def test_a_floor_that_cannot_be_met(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    copied(whole.out, tmp_path / "out")  # what was proven earlier stays
    flags = ["--keep", "0.9999999", *FLAGS[2:], *ONCE]
    code, said = shrink(whole.model, "--text", whole.text, "--out", tmp_path / "out", *flags)
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("shrew: no smaller model was proven to keep")
    assert "the nearest miss is" in last
    assert "expect no proof" in said
    assert weights(tmp_path / "out") == weights(whole.out)
    missed = tmp_path / "out-not-met"
    assert {item.name for item in missed.iterdir()} == {"records.jsonl", "report.html", "shrew.json"}
    (verdict,) = [item for item in record.read(missed / "records.jsonl") if item.metric == "verdict"]
    assert verdict.value == "not met"


def test_a_size_that_cannot_be_met(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    code, said = shrink(whole.model, "--text", whole.text, "--out", tmp_path / "out", "--under", "1kB", *FLAGS[2:])
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("shrew: no model met the goals")
    assert "--under" in last
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_size_alone(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    pairs = rows(tmp_path / "pairs.jsonl", [{"more": f"The {a} sees.", "less": f"The {b} hears.", "kind": a}
                                            for a in ("ant", "bee", "cat") for b in ("dog", "elk", "fox")])  # fmt: skip
    code, said = shrink(whole.model, "--text", whole.text, "--out", tmp_path / "out", "--under", "60kB",
                        "--fairness", pairs, *FLAGS[2:])  # fmt: skip
    assert code == 0, said
    assert 30_000 < cost.disk_size(tmp_path / "out").weights <= 60_000
    found = [item for item in record.read(tmp_path / "out" / "records.jsonl") if item.task == "pairs@1/final"]
    assert {(item.model, item.metric) for item in found} == {
        (model, metric) for model in ("original", "chosen")
        for metric in ("stereotype_share", "stereotype_share_per_token", "bias")
    }  # fmt: skip
    (bias,) = [item for item in found if (item.model, item.metric) == ("chosen", "stereotype_share")]
    assert bias.n == 9 and {"to_stereotype", "from_stereotype", "difference_low"} <= set(bias.detail)
    assert "Bias by kind" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_memory_that_no_process_can_do_with(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    code, said = shrink(whole.model, "--text", whole.text, "--out", tmp_path / "out", *FLAGS, "--memory", "1MB")
    assert code == 1
    assert "relax --under, --faster or --memory" in said.strip().splitlines()[-1]


def test_one_text_proves_nothing(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(whole.text.read_text("utf-8").splitlines(keepends=True)[:4]), "utf-8")
    flags = ["--keep", "0.98", "--heal", 0, "--jobs", 1, *ONCE]
    code, said = shrink(whole.model, "--text", few, "--out", tmp_path / "out", *flags)
    assert code == 1
    assert said.strip().splitlines()[-1].startswith("shrew: no smaller model was proven")


# Other tasks


def rows(path: Path, cases: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), "utf-8")
    return path


def labelled(path: Path, labels: list[str], count: int = 120) -> Path:
    samples = ["def f(x): return x", "# a remark on", "It rained on"]
    return rows(path, [{"text": f"{samples[n % 3]} {n}", "label": labels[n % 3]} for n in range(count)])


@pytest.fixture(scope="module")
def trained_classifier(tiny_classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = folder.load(tiny_classifier_folder)
    path = labelled(tmp_path_factory.mktemp("labels") / "train.jsonl", ["0", "1", "2"], 90)
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = loaded.tokenizer([case["text"] + "!" for case in cases], padding=True, return_tensors="pt")
    labels = torch.tensor([int(case["label"]) for case in cases])
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=2e-3)
    for _ in range(12):
        loaded.model(**{name: found[name] for name in ("input_ids", "attention_mask")}, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.save(loaded, path.parent / "classifier")
    return path.parent / "classifier"


def test_a_classifier_keeps_its_answers(trained_classifier: Path, shrink: Any, tmp_path: Path) -> None:
    task = labelled(tmp_path / "my.jsonl", ["code", "comment", "prose"])
    flags = ["--keep", "0.6", *FLAGS[2:], *ONCE]
    code, said = shrink(trained_classifier, "--task", task, "--out", tmp_path / "out", *flags)
    assert code == 0, said
    assert cost.disk_size(tmp_path / "out").weights < cost.disk_size(trained_classifier).weights / 2
    (verdict,) = [item for item in record.read(tmp_path / "out" / "records.jsonl") if item.metric == "verdict"]
    assert verdict.value == "met"


def test_a_choice_task(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "elk", "fox"]
    cases = [{"question": f"The {a} {verb} the", "options": [f" {b}.", f" the {b} The"], "answer": 0}
             for a in names for b in names for verb in ("sees", "likes", "helps")]  # fmt: skip
    task = rows(tmp_path / "choice.jsonl", cases)
    flags = ["--keep", "0.5", "--heal", "0", *FLAGS[4:], *ONCE]
    code, said = shrink(whole.model, "--task", task, "--text", whole.text, "--out", tmp_path / "out", *flags)
    assert code == 0, said


def test_a_task_that_the_original_cannot_do(whole: Whole, shrink: Any, tmp_path: Path) -> None:
    cases = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(100, 160)]
    task = rows(tmp_path / "sums.jsonl", cases)
    code, said = shrink(whole.model, "--task", task, "--out", tmp_path / "out", *FLAGS)
    assert code == 2
    assert "no quality to keep; use a task that the original can do" in said.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


# Bad input


PAIRS = b'{"more": "a", "less": "b", "kind": "k"}\n{"more": "c", "less": "d", "kind": "k"}\n'
LINE = b'{"prompt": "a", "completion": "b"}\n'
BAD: dict[str, tuple[Callable[[Path, Path], list[Any]], str]] = {
    "no folder": (lambda model, work: [work / "nowhere"], "nowhere"),
    "truncated": (truncated, "model.safetensors"),
    "disagreeing": (disagreeing, "config.json"),
    "NaN": (not_a_number, "model.norm.weight"),
    "too large": (too_large(1e25), "answers text with what is no number"),
    "empty task": (task_file(b""), "is empty"),
    "one line": (task_file(LINE), "at least 2"),
    "no JSON": (task_file(LINE * 2 + b'{"prompt": \n' + LINE), "line 3"),
    "no such task": (flags("--task", "nothing.jsonl"), "nothing.jsonl"),
    "unknown keys": (task_file(b'{"a": 1}\n' * 3), "line 1"),
    "latin-1": (task_file("Das Mädchen.\n".encode("latin-1"), "--text", "bad.txt"), "UTF-8"),
    "too much": (flags("--keep", "1.5"), "keep"),
    "nothing": (flags("--keep", "0"), "keep"),
    "percent": (flags("--keep", "98"), "--keep 98 is no share from 0.05 to 1; write 0.98 for 98 %."),
    "percent sign": (flags("--keep", "98%"), "--keep: '98%' is no number; write it like 0.98"),
    "one in a hundred": (flags("--keep", "0.01"), "write 0.98 for 98 %"),
    "a task twice": (flags("--task", "a.jsonl", "--task", "b.jsonl"), "--task: given twice"),
    "no size": (flags("--under", "3XB"), "3XB"),
    "no speed": (flags("--faster", "very"), "very"),
    "no memory": (flags("--memory", "lots"), "lots"),
    "no such file": (flags("--text", "nothing.txt"), "nothing.txt"),
    "bias is no quality": (task_file(PAIRS), "shrew shrink --fairness"),
    "no pairs": (task_file(LINE * 2 + b'{"prompt": "c", "completion": "d"}\n', "--fairness"), "completion task"),
    "occupied": (occupied, "holds other things"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(
    name: str, trained_llama_folder: Path, stories: Path, shrink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_run.Run, "baseline", lambda self: pytest.fail("it started to work"))
    make, words = BAD[name]
    arguments = make(trained_llama_folder, tmp_path)
    if not {"--task", "--text"} & set(map(str, arguments)):
        arguments += ["--text", stories]
    out = tmp_path / "out"
    before = sorted(out.iterdir()) if out.exists() else None
    code, said = shrink(*arguments, "--out", out, "--jobs", 1)
    assert code == 2
    assert said.count("\n") == 1, said
    assert said.startswith("shrew: ")
    assert words in said
    assert (sorted(out.iterdir()) if out.exists() else None) == before
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_a_task_with_labels_that_the_head_has_not(trained_classifier: Path, shrink: Any, tmp_path: Path) -> None:
    task = labelled(tmp_path / "my.jsonl", ["code", "comment", "poem"])
    code, said = shrink(trained_classifier, "--task", task, "--out", tmp_path / "out", *FLAGS)
    assert code == 2
    assert "'poem'" in said
    assert "code, comment, prose" in said
    assert not (tmp_path / "out").exists()


def test_without_text_there_is_nothing_to_measure(trained_llama_folder: Path, shrink: Any, tmp_path: Path) -> None:
    code, said = shrink(trained_llama_folder, "--out", tmp_path / "out")
    assert code == 2
    assert "give --task FILE.jsonl or --text FILE" in said


def test_the_model_itself_is_no_place_to_write(trained_llama_folder: Path, shrink: Any, tmp_path: Path) -> None:
    model = copied(trained_llama_folder, tmp_path / "model")
    code, said = shrink(model, "--text", "x.txt", "--out", model)
    assert code == 2
    assert f"would replace {model}" in said


def test_an_unknown_flag(shrink: Any, tmp_path: Path) -> None:
    code, said = shrink("model", "--kepe", "0.9")
    assert code == 2
    assert "--kepe" in said


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A small file system of its own, where one may mount."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a tmpfs takes root, which this is not")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_read_only_place(trained_llama_folder: Path, stories: Path, shrink: Any, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k,ro"):
        code, said = shrink(trained_llama_folder, "--text", stories, "--out", tmp_path / "disk" / "out", *FLAGS)
    assert code == 2
    assert said.count("\n") == 1, said
    assert "cannot be written to" in said


@pytest.mark.parametrize("what", ["result", "cache"])
def test_a_full_disk(what: str, whole: Whole, shrink: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "disk", "size=48k"):
        out = tmp_path / "disk" / "out" if what == "result" else tmp_path / "out"
        if what == "cache":
            monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "disk"))
        code, said = shrink(whole.model, "--text", whole.text, "--out", out, *FLAGS)
        assert code == 2, said
        assert "disk is full" in said.strip().splitlines()[-1]
        assert not out.exists()
        assert not list((tmp_path / "disk").glob(".out*"))
    if what == "result":  # nothing was lost with it
        assert shrink(whole.model, "--text", whole.text, "--out", tmp_path / "later", *FLAGS)[0] == 0


def test_a_trial_that_breaks_is_told_plainly(
    trained_llama_folder: Path, stories: Path, shrink: Any, tmp_path: Path
) -> None:
    code, said = shrink(trained_llama_folder, "--text", stories, "--out", tmp_path / "out", *FLAGS[:2], "--heal", 12,
                        "--lr", "1e30", "--jobs", 1)  # fmt: skip
    assert code == 1
    assert "lower its lr" in said.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
