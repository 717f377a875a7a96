"""`shrew apply`: one move by its flags, a list of them by a recipe, and the same bytes whichever way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import copied, too_large

from shrew import files, folder, spec
from shrew.errors import SpecError
from shrew.moves import MOVES, parse_moves, table

DROP = {"name": "drop-layers", "layers": [0]}
NARROW = {"name": "narrow", "mlp": 0.5}
QUANTIZE = {"name": "quantize", "bits": 4, "group": 32}
DISTIL = {"name": "distil", "steps": 3, "rows": 2, "top_k": 8}


def recipe(path: Path, model: Path, *moves: dict[str, Any], **source: Any) -> Path:
    path.write_text(spec.to_toml({"source": {"model": str(model), **source}, "moves": list(moves)}), "utf-8")
    return path


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_one_move_by_its_flags(trained_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    flags = ["--bits", 4, "--group", 32, "--method", "rtn", "--out", tmp_path / "small"]
    code, said = apply(trained_llama_folder, "quantize", *flags)
    assert code == 0
    assert f"Wrote {tmp_path / 'small'}" in said
    kinds = {item.effective for item in folder.tensors(tmp_path / "small")}
    assert kinds == {"bf16", "int4 g32 sym"}
    lineage = json.loads((tmp_path / "small" / "shrew.json").read_text())
    assert lineage["parent"] == {"name": trained_llama_folder.name, "sha256": folder.identity(trained_llama_folder)}
    assert lineage["moves"] == [{
        "name": "quantize", "grid": "int", "bits": 4, "group": 32, "method": "rtn", "steps": 200, "sequential": True,
        "symmetric": True, "embeddings": False, "tensors": {}, "coded": False, "rate": 0.0, "low_rank": 0, "damp": 0.01,
    }]  # fmt: skip
    assert lineage["untouched"]["model.embed_tokens.weight"].startswith("an embedding")
    loaded = folder.load(tmp_path / "small")
    assert len(loaded.packed) == 14


def test_text_calibrates_and_heals(trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path) -> None:
    code, said = apply(trained_llama_folder, "distil", "--text", stories, "--steps", 3, "--rows", 2, "--teacher", 0,
                       "--out", tmp_path / "healed")  # fmt: skip
    assert code == 0
    assert "distil 3/3: loss" in said
    assert weights(tmp_path / "healed") != weights(trained_llama_folder)
    lineage = json.loads((tmp_path / "healed" / "shrew.json").read_text())
    assert len(lineage["data"]["healing"]) == 64
    assert lineage["seed"] == 0


def test_what_was_made_as_json(trained_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    code, said = apply(trained_llama_folder, "quantize", "--method", "rtn", "--json", "--out", tmp_path / "out")
    assert code == 0
    made = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert made["bytes"] == sum(item.bytes for item in folder.tensors(tmp_path / "out"))
    assert {item["name"] for item in made["tensors"]} == {item.name for item in folder.tensors(tmp_path / "out")}


def test_moves_in_one_run_or_one_by_one(trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path) -> None:
    """Between moves the model goes through its folder, so a chain is the same however it is cut."""
    text = {"text": [str(stories)], "threads": 1}
    moves = [NARROW, QUANTIZE, DISTIL | {"teacher": 0.0}]
    whole = recipe(tmp_path / "whole.toml", trained_llama_folder, *moves, **text)
    assert apply(whole, "--out", tmp_path / "whole")[0] == 0
    path = trained_llama_folder
    for number, move in enumerate(moves):
        part = recipe(tmp_path / f"{number}.toml", path, move, **text)
        path = tmp_path / f"part{number}"
        assert apply(part, "--out", path)[0] == 0
    assert weights(path) == weights(tmp_path / "whole")
    assert (path / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    lineages = [json.loads((item / "shrew.json").read_text()) for item in (path, tmp_path / "whole")]
    assert lineages[0]["moves"] == lineages[1]["moves"]


def test_a_recipe_gives_the_same_bytes_again(
    trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path / "r.toml", trained_llama_folder, DROP, QUANTIZE, DISTIL, text=[str(stories)], threads=1)
    for name in ("first", "second"):
        monkeypatch.setenv("SHREW_CACHE", str(tmp_path / f"cache of {name}"))
        assert apply(file, "--out", tmp_path / name)[0] == 0
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    assert folder.load(tmp_path / "first").model.config.num_hidden_layers == 1
    other = recipe(tmp_path / "other.toml", trained_llama_folder, DROP, QUANTIZE, DISTIL, text=[str(stories)],
                   threads=1, seed=1)  # fmt: skip
    assert apply(other, "--out", tmp_path / "third")[0] == 0
    assert weights(tmp_path / "third") != weights(tmp_path / "first")


def test_what_is_in_the_cache_is_not_made_again(
    trained_llama_folder: Path, apply: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", "rtn", "--bits", 5]
    assert apply(trained_llama_folder, "quantize", *flags, "--out", tmp_path / "first")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(MOVES["quantize"], "apply", lambda *a: pytest.fail("it was applied again"))
        assert apply(trained_llama_folder, "quantize", *flags, "--out", tmp_path / "second")[0] == 0
    assert weights(tmp_path / "first") == weights(tmp_path / "second")


def test_a_recipe_for_another_model(
    trained_llama_folder: Path, tiny_llama_folder: Path, apply: Any, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "r.toml", trained_llama_folder, {**QUANTIZE, "method": "rtn"})
    assert apply(file, "--model", tiny_llama_folder, "--out", tmp_path / "out")[0] == 0
    lineage = json.loads((tmp_path / "out" / "shrew.json").read_text())
    assert lineage["parent"]["sha256"] == folder.identity(tiny_llama_folder)


def test_a_classifier_heals_on_a_task(tiny_classifier_folder: Path, apply: Any, tmp_path: Path) -> None:
    task = tmp_path / "my.jsonl"
    labels = ["code", "comment", "prose"]
    cases = [{"text": f"{labels[n % 3]} number {n}", "label": labels[n % 3]} for n in range(60)]
    task.write_text("".join(json.dumps(case) + "\n" for case in cases), "utf-8")
    file = recipe(tmp_path / "r.toml", tiny_classifier_folder, {**QUANTIZE, "method": "rtn"}, DISTIL | {"teacher": 0.5},
                  task=str(task), threads=1)  # fmt: skip
    assert apply(file, "--out", tmp_path / "out")[0] == 0
    assert folder.load(tmp_path / "out").is_classifier


@pytest.mark.parametrize(
    ("file", "change", "where"),
    [
        ("generation_config.json", {"temperature": 0.77}, "generation_config.json"),
        ("tokenizer_config.json", {"chat_template": "0.77"}, "chat_template.jinja"),
        ("shrew.json", {"moves": [{"name": "0.77"}]}, "shrew.json"),
    ],
)
def test_what_goes_along_is_the_sources_own(
    file: str, change: Any, where: str, trained_llama_folder: Path, apply: Any, tmp_path: Path
) -> None:
    """Two folders of the same weights are not taken for one another, whatever the cache holds."""
    other = copied(trained_llama_folder, tmp_path / "other")
    known = json.loads((other / file).read_text()) if (other / file).exists() else {}
    (other / file).write_text(json.dumps(known | change))
    for number, model in enumerate((trained_llama_folder, other)):
        assert apply(model, "quantize", "--method", "rtn", "--out", tmp_path / str(number))[0] == 0
    assert "0.77" in (tmp_path / "1" / where).read_text()
    assert not (tmp_path / "0" / where).exists() or "0.77" not in (tmp_path / "0" / where).read_text()


def test_a_folder_of_our_own_is_replaced_and_no_other(trained_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for bits in (8, 4):
        assert apply(trained_llama_folder, "quantize", "--method", "rtn", "--bits", bits, "--out", out)[0] == 0
    assert any("int4" in item.effective for item in folder.tensors(out))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    code, said = apply(trained_llama_folder, "quantize", "--method", "rtn", "--out", theirs)
    assert code == 2
    assert "holds other things" in said
    assert [item.name for item in theirs.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("way", ["itself", "a link", "dots", "above"])
def test_what_is_read_is_not_written_over(way: str, tiny_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    files.copy_folder(tiny_llama_folder, model, "shrew.json")
    for place in (model, model.parent):
        (place / "shrew.json").write_text('{"moves": []}')
    (tmp_path / "link").symlink_to(model)
    out = {"itself": model, "a link": tmp_path / "link", "dots": model / ".." / "model", "above": model.parent}[way]
    before = weights(model)
    for first in ([model, "quantize"], [recipe(model.parent / "r.toml", model, QUANTIZE)]):
        code, said = apply(*first, "--out", out)
        assert code == 2
        assert f"writing {out} would replace" in said
    assert weights(model) == before


@pytest.mark.parametrize("flag", ["--teacher-model", "--rationales", "--text"])
def test_nor_what_a_move_reads(flag: str, tiny_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    files.copy_folder(tiny_llama_folder, tmp_path / "out", "shrew.json")
    (tmp_path / "out" / "shrew.json").write_text('{"moves": []}')
    (tmp_path / "out" / "text.jsonl").write_text('{"text": "a", "rationale": "b", "answer": "c"}\n')
    name = tmp_path / "out" if flag == "--teacher-model" else tmp_path / "out" / "text.jsonl"
    code, said = apply(tiny_llama_folder, "distil", flag, name, "--out", tmp_path / "out")
    assert code == 2
    assert f"would replace {name}, which is read" in said
    assert (tmp_path / "out" / "text.jsonl").exists()


BAD: dict[str, tuple[list[Any], str]] = {
    "unknown move": (["MODEL", "quantise", "--out", "OUT"], "unknown move 'quantise'; did you mean 'quantize'?"),
    "no out": (["MODEL", "quantize"], "--out FOLDER"),
    "out of range": (["MODEL", "quantize", "--bits", 9, "--out", "OUT"], "bits"),
    "no number": (["MODEL", "quantize", "--bits", "four", "--out", "OUT"], "--bits"),
    "unknown flag": (["MODEL", "quantize", "--bit-width", 4, "--out", "OUT"], "--bit-width"),
    "no recipe": (["nothing.toml", "--out", "OUT"], "nothing.toml: no such file"),
    "no model": (["nothing", "quantize", "--out", "OUT"], "nothing"),
    "no text to heal on": (["MODEL", "distil", "--out", "OUT"], "needs healing text"),
    "no such layer": (["MODEL", "drop-layers", "--count", 9, "--out", "OUT"], "layers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_one_sentence(name: str, trained_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    arguments, words = BAD[name]
    places = {"MODEL": trained_llama_folder, "OUT": tmp_path / "out"}
    code, said = apply(*[places.get(item, item) if isinstance(item, str) else item for item in arguments])
    assert code == 2, said
    assert words in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("move", "factor", "words"),
    [
        (["quantize"], 1e25, "answers text with what is no number"),
        (["quantize", "--low-memory"], 1e25, "answers text with what is no number"),
        (["factor"], 1e25, "answers text with what is no number"),
        (["quantize"], 1e12, "what reaches model.layers.0.mlp.down_proj.weight is too large"),
        (["smooth"], 1e12, "what reaches model.layers.0.mlp.down_proj.weight is too large"),
    ],
)
def test_weights_that_are_far_too_large_are_told(
    move: list[str], factor: float, words: str, trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path
) -> None:
    bad = too_large(factor)(trained_llama_folder, tmp_path)
    code, said = apply(*bad, *move, "--text", stories, "--out", tmp_path / "out")
    assert code == 2
    assert words in said.splitlines()[-1]
    assert [item.name for item in tmp_path.iterdir()] == ["bad"]


RECIPES: dict[str, tuple[str, str]] = {
    "a move": ('[[moves]]\nname = "quantise"\n', "move 1: unknown move 'quantise'; did you mean 'quantize'?"),
    "a key": ('[[moves]]\nname = "quantize"\nbts = 4\n', "unknown key 'bts'; did you mean 'bits'?"),
    "a table": ('[[movs]]\nname = "quantize"\n', "unknown key 'movs'; did you mean 'moves'?"),
    "a source key": ("", "unknown key 'modle'; did you mean 'model'?"),
    "a type": ('[[moves]]\nname = "quantize"\nbits = "4"\n', "bits"),
    "no TOML": ("moves = [", "no readable TOML"),
    "no name": ("[[moves]]\nbits = 4\n", "unknown move ''"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bad_recipes_are_one_sentence(name: str, trained_llama_folder: Path, apply: Any, tmp_path: Path) -> None:
    content, words = RECIPES[name]
    key = "modle" if name == "a source key" else "model"
    file = tmp_path / "bad.toml"
    source = f'[source]\n{key} = "{trained_llama_folder}"\n'
    file.write_text(content + source if name == "no TOML" else source + content, "utf-8")
    code, said = apply(file, "--out", tmp_path / "out")
    assert code == 2
    assert said.startswith("shrew: ")
    assert said.count("\n") == 1
    assert words in said
    assert [item.name for item in tmp_path.iterdir()] == ["bad.toml"]


@pytest.mark.parametrize("name", MOVES)
def test_every_move_keeps_the_contract(name: str) -> None:
    """Fields are flags, keys and cache key; the table form gives the same move back; a name and a paper stand by it."""
    move = {"narrow": MOVES["narrow"](mlp=0.5), "drop-layers": MOVES["drop-layers"](count=1)}.get(name) or MOVES[name]()
    assert move.name == name
    assert move.paper
    plain = table(move)
    assert parse_moves([plain], "test") == [move]
    assert spec.digest(plain) == spec.digest(table(parse_moves([json.loads(json.dumps(plain))], "test")[0]))
    with pytest.raises(SpecError, match=f"move 1 \\({name}\\): unknown key"):
        parse_moves([plain | {"colour": "red"}], "test")


@pytest.mark.parametrize("move", [NARROW, DROP, QUANTIZE | {"method": "rtn"}, DISTIL], ids=lambda move: move["name"])
def test_a_result_loads_and_its_weights_are_what_was_made(
    move: dict[str, Any], trained_llama_folder: Path, stories: Path, apply: Any, tmp_path: Path
) -> None:
    file = recipe(tmp_path / "r.toml", trained_llama_folder, move, text=[str(stories)], threads=1)
    assert apply(file, "--out", tmp_path / "out")[0] == 0
    again = folder.load(tmp_path / "out")
    folder.save(again, tmp_path / "copy")
    assert weights(tmp_path / "copy") == weights(tmp_path / "out")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert again.model(input_ids=ids).logits.isfinite().all()
