"""What the flags of all verbs have in common: typos, repetitions, ranges, and what may be given again."""

from pathlib import Path

import pytest

from shrew.__main__ import main

TOLD = {
    "measure tiny --txt a": "unknown flag '--txt'; did you mean '--text'?",
    "measure --txt=a tiny": "unknown flag '--txt'; did you mean '--text'?",
    "audit a.gguf --agianst b": "unknown flag '--agianst'; did you mean '--against'?",
    "shrink tiny --undr 1MB": "unknown flag '--undr'; did you mean '--under'?",
    "train a.toml --stpes 3": "unknown flag '--stpes'; did you mean '--steps'?",
    "scan . --fial-on high": "unknown flag '--fial-on'; did you mean '--fail-on'?",
    "pack tiny --txet a": "unknown flag '--txet'; did you mean '--text'?",
    "describe tiny --squence 4k": "unknown flag '--squence'; did you mean '--sequence'?",
    "patch abc --htlm a": "unknown flag '--htlm'; did you mean '--html'?",
    "report a.jsonl --otu a": "unknown flag '--otu'; did you mean '--out'?",
    "report a.jsonl --xyzzy": "unknown flag '--xyzzy'; `shrew report --help` explains.",
    "report": "the following arguments are required: records; `shrew report --help` explains.",
    "describe a --sequence 1k 4k": "'4k' is one word too many there: a flag takes one value, and words without a flag "
    "stand together; `shrew describe --help` explains.",
    "pack tiny --text a --text b": "--text: given twice, and only one can hold; give it once; `shrew pack --help` "
    "explains.",
    "shrink tiny --task a --task b": "--task: given twice, and only one can hold; give it once; `shrew shrink --help` "
    "explains.",
    "scan . --jobs 2 --jobs 2": "--jobs: given twice, and only one can hold; give it once; `shrew scan --help` "
    "explains.",
    "scan . --jobs 0": "--jobs must be at least 1; it was given as 0.",
    "patch abc --most 100001": "--most must be at most 100000; it was given as 100001.",
    "shrink tiny --lr nan": "--lr: expected a finite number, got nan.",
    "shrink tiny --minutes 0": "--minutes must be more than 0; it was given as 0.0.",
    "shrink tiny --lr fast": "--lr: 'fast' is no number; write it like 0.98; `shrew shrink --help` explains.",
    "train recipe.toml --length 7": "--length must be at least 8; it was given as 7.",
}


@pytest.mark.parametrize("command", TOLD)
def test_a_wrong_flag_is_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text("[train]\n")
    assert main(command.split()) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"shrew: {TOLD[command]}\n")


@pytest.mark.parametrize("verb", ["measure", "audit"])
def test_every_text_counts(
    verb: str, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source that is not there is told, wherever it stands among those that are; a flag may stand before a model."""
    (tmp_path / "my.txt").write_text("One text.\n" * 400)
    model = str(tiny_llama_folder)
    for names in (("my.txt", "none.txt"), ("none.txt", "my.txt")):
        texts = [word for name in names for word in ("--text", str(tmp_path / name))]
        words = [*texts, model] if verb == "measure" else [*texts, "--against", model, model]
        assert main([verb, *words]) == 2
        assert "none.txt" in capsys.readouterr().err
