"""The report: what its sentences say comes from records, and no record can break out of its page."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from shrew import record
from shrew.errors import DataError, UsageError
from shrew.record import Record
from shrew.report import main, render, summary

SEARCH, FINAL = "text@1/search", "text@1/final"
FIXED: dict[str, Any] = {
    "run": "shrink-2b7f",
    "commit": "49e5c8d0aa",
    "machine": "A processor, 2 cores, 8 GiB, Linux, Python 3.11.9",
    "time": "2026-01-02T03:04:05+00:00",
}
# trial: moves, bytes, retention on search
TRIALS: list[tuple[list[dict[str, Any]], int, float]] = [
    ([{"name": "quantize", "bits": 8, "group": 32}], 6_180_000, 0.9993),
    ([{"name": "quantize", "bits": 4, "group": 32}], 3_310_000, 0.9921),
    ([{"name": "quantize", "bits": 3, "group": 32}], 2_600_000, 0.9468),
    ([{"name": "quantize", "bits": 3, "group": 32}, {"name": "distil", "steps": 200}], 2_600_000, 0.9772),
    (
        [{"name": "drop-layers", "count": 1}, {"name": "quantize", "bits": 4}, {"name": "distil", "steps": 200}],
        2_870_000,
        0.9869,
    ),
    ([{"name": "drop-layers", "count": 2}, {"name": "quantize", "bits": 4}], 2_430_000, 0.8120),
    (
        [{"name": "narrow", "mlp": 0.75}, {"name": "quantize", "bits": 4}, {"name": "distil", "steps": 200}],
        2_790_000,
        0.9790,
    ),
]
GIVEN = "def area(radius):\n    "
PYTHON = 'return math.pi * radius ** 2\n\n\ndef circumference(radius):\n    """Length of the circle."""'
MAXIMUM = "def largest(items):\n    best = None\n    for item in items:\n        "


def rec(model: str, metric: str, value: float | str | None, **more: Any) -> Record:
    return Record(**{**FIXED, "model": model, "metric": metric, "value": value, "seed": 7, **more})


def kept(model: str, split: str, share: float, **detail: Any) -> Record:
    n, bound = (40 if split == FINAL else 24), round(share - 0.004, 6)
    told = {"against": "healed original", "lower_bound": bound, "alpha": 0.05, "floor": 0.98, "passed": bound >= 0.98}
    return rec(
        model, "retention", share, task=split, n=n, low=share - 0.005, high=share + 0.005, detail={**told, **detail}
    )


def example_records(met: bool = True) -> list[Record]:
    """What one run of `shrew shrink` writes: the reference for whoever emits records."""
    found = [
        rec(
            "",
            "plan",
            None,
            detail={
                "model": "shrew-starter",
                "command": "shrew shrink shrew-starter --text src --keep 0.98",
                "goals": {"keep": 0.98, "under": 3_000_000},
                "tried": ["quantize 3 to 8 bits", "drop up to 2 layers", "heal"],
                "settings": {"minutes": 30, "healing steps": 200, "batch": 8},
                "threads": 2,
                "candidates": 3,
                "versions": {"shrew": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0"},
                "provable_keep": 0.9943,
                "splits": {
                    "calibration": {"documents": 16, "tokens": 65_536},
                    "healing": {"documents": 210, "bytes": 2_400_000},
                    "search": {"documents": 24, "bytes": 310_000},
                    "final": {"documents": 40, "bytes": 520_000},
                },
            },
        )
    ]
    for model, share in (("original", 0.9952), ("healed original", 1.0)):
        found += [rec(model, "bytes", 11_600_000, unit="bytes"), rec(model, "parameters", 5_790_000)]
        found += [
            rec(model, "retention", share, task=split, n=n, detail={"against": "healed original"})
            for split, n in ((SEARCH, 24), (FINAL, 40))
        ]
        found += [
            rec(
                model,
                "bits_per_byte",
                1.1317 / share,
                unit="bits/byte",
                task=split,
                n=n,
                low=1.11 / share,
                high=1.15 / share,
            )
            for split, n in ((SEARCH, 24), (FINAL, 40))
        ]
    found += [rec("original", "peak_memory", 312_000_000, unit="bytes")]
    for number, (moves, total, share) in enumerate(TRIALS, 1):
        label = f"trial {number}"
        found += [
            rec(label, "trial", 31.5 + 11 * number, unit="CPU-seconds", detail={"moves": moves, "reused": number == 2}),
            rec(label, "bytes", total, unit="bytes"),
            kept(label, SEARCH, share),
        ]
    return found + _best_records(met)


def forgotten_records(best: str) -> list[Record]:
    """What else was forgotten: one record or two of each sort."""
    moved = {"against": "original", "difference": -0.02, "difference_low": -0.03, "difference_high": -0.01}
    told = {"before": 3.0, "after": 9.25, "id": "a.py"}
    counts = {"right to wrong": 5, "wrong to right": 2, "wrong to other": 4}
    return [
        rec(best, "tail", 6.25, unit="bits", task=FINAL,
            detail={"left": "import ", "token": "zlib", "right": "\n", **told}),
        *[rec(best, "document", 0.5 - n / 10, unit="bits/byte", task=FINAL, detail={"text": f"text {n}", **told})
          for n in range(8)],
        rec(best, "flips", -0.03, task=FINAL, n=100, low=-0.08, high=0.02, detail={"counts": counts, "ids": {}}),
        rec(best, "changed", None, task=FINAL, detail={"way": "right to wrong", "text": "1 + 1 =", "wanted": "2",
                                                       "before": "2", "after": "3", "id": "line 9"}),
        rec(best, "class", 0.9, task=FINAL, n=50,
            detail={"label": "spam", "before": 0.92, "level": 0.975, "correction": "Bonferroni over 2", **moved}),
        rec(best, "stereotype_share", 0.61, task="pairs@1/final", n=200,
            detail={**moved, "to_stereotype": 3, "from_stereotype": 7}),
        rec(best, "bias", 0.61, task="pairs@1/final", n=200, detail={"label": "age", "before": 0.63, **moved}),
    ]  # fmt: skip


def _best_records(met: bool) -> list[Record]:
    """The records of the chosen model or of the nearest miss."""
    found: list[Record] = []
    best = "chosen" if met else "trial 7"
    share = 0.9861 if met else 0.9773
    if met:
        found += [rec(best, "bytes", 2_870_000, unit="bytes", detail={"trial": "trial 5"}), kept(best, SEARCH, 0.9869)]
    found += [
        kept(best, FINAL, share),
        rec(best, "bits_per_byte", 1.1477, unit="bits/byte", task=FINAL, n=40, low=1.12, high=1.17),
        rec(best, "parameters", 4_940_000),
        rec(best, "kl", 0.0631, unit="nats/token", task=FINAL),
        rec(best, "top1_agreement", 0.9134, task=FINAL),
        rec(best, "prefill_ratio", 1.21, low=1.17, high=1.26),
        rec(best, "decode_ratio", 1.78, low=1.71, high=1.84),
        rec(best, "peak_memory", 148_000_000, unit="bytes"),
    ]
    steps = [
        ({"name": "drop-layers", "count": 1}, 9_910_000, 0.9541),
        ({"name": "quantize", "bits": 4}, 2_870_000, 0.9466),
        ({"name": "distil", "steps": 200, "rank": 8}, 2_870_000, 0.9869),
    ]
    found += [
        rec(best, "move", share, task=SEARCH, n=24, detail={"step": step, "move": move, "bytes": total})
        for step, (move, total, share) in enumerate(steps, 1)
    ]
    moved = {"against": "original", "difference": 0.61, "difference_low": 0.52, "difference_high": 0.70}
    bands = [
        ("rarest 1 %", 5_200, 9.81, 10.42),
        ("1 to 10 %", 31_000, 6.12, 6.33),
        ("10 to 50 %", 61_000, 3.02, 3.05),
        ("most frequent half", 92_000, 0.84, 0.84),
    ]
    for band, (label, n, old, new) in enumerate(bands):
        found += [
            rec(model, "band", loss, unit="bits/token", task=FINAL, n=n, detail={"band": band, "label": label, **more})
            for model, loss, more in (("original", old, {}), (best, new, moved if not band else {}))
        ]
    found += forgotten_records(best)
    for prompt, before, after in (
        (GIVEN, PYTHON, PYTHON.replace("Length of", "Perimeter of")),
        (
            MAXIMUM,
            "if best is None or item > best:\n            best = item\n    return best",
            "if best is None or item > best:\n            best = item\n    return best",
        ),
        ("import json\n\n", "from pathlib import Path", "import os"),
    ):
        found.append(
            rec(
                best,
                "sample",
                None,
                detail={"prompt": prompt, "before": before, "after": after, "how": "Greedy, 48 tokens"},
            )
        )
    return found + _page_records(best, met)


def _page_records(best: str, met: bool) -> list[Record]:
    """What only the page shows of that model: tensors, recipe, uses, verdict."""
    found: list[Record] = []
    names = [
        (f"model.layers.{layer}.{part}.weight", kind)
        for layer in range(5)
        for part, kind in (("self_attn.q_proj", "attention"), ("self_attn.o_proj", "attention"), ("mlp.up_proj", "mlp"))
    ]
    found += [
        rec(
            best,
            "tensor",
            "int4, groups of 32",
            detail={"tensor": name, "class": kind, "bytes": 36_864, "shape": [256, 256]},
        )
        for name, kind in names
    ]
    found.append(
        rec(
            best,
            "tensor",
            "bf16",
            detail={
                "tensor": "model.norm.weight",
                "class": "norm",
                "bytes": 512,
                "shape": [256],
                "reason": "a vector, not a matrix",
            },
        )
    )
    toml = 'seed = 7\n\n[[moves]]\nname = "drop-layers"\ncount = 1\n\n[[moves]]\nname = "quantize"\nbits = 4\n'
    found += [
        rec(best, "recipe", toml),
        rec(
            best,
            "use",
            None,
            detail={
                "tools": [
                    {
                        "tool": "transformers",
                        "how": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("small")',
                        "note": "Needs compressed-tensors.",
                    },
                    {"tool": "vLLM", "how": "vllm serve ./small", "note": "Reads the same folder."},
                ]
            },
        ),
    ]
    found.append(
        rec(
            best,
            "verdict",
            "met" if met else "not met",
            task=FINAL,
            detail={
                "cpu_seconds": 412.0,
                "wall_seconds": 298.0,
                "not_measured": ["energy: no counter could be read on this machine", "other languages than Python"],
            },
        )
    )
    return found


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        self.text = " ".join("".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)

    def headings(self) -> list[str]:
        return [name for name in SECTIONS if name in self.text]


SECTIONS = [
    "Size against quality", "The numbers", "What each move bought", "The same prompts, before and after",
    "What was forgotten", "What is in the file", "The recipe", "How to use it", "How it was measured",
]  # fmt: skip


def test_sections_in_order_and_pure() -> None:
    records = example_records()
    page = render(records)
    assert page == render([dataclasses.replace(item) for item in records])
    text = Page(page).text
    places = [text.index(name) for name in SECTIONS]
    assert places == sorted(places)


def test_same_page_after_a_round_trip_through_a_file(tmp_path: Path) -> None:
    record.write(tmp_path / "records.jsonl", example_records())
    assert render(record.read(tmp_path / "records.jsonl")) == render(example_records())


def test_verdict_states_the_numbers_of_the_records() -> None:
    text = Page(render(example_records())).text
    told = (
        "2.87 MB instead of 11.6 MB (4.04 times smaller) keeps 98.6 % (at least 98.2 %) of the quality on 40 documents"
    )
    assert f"{told} never seen by the search." in text
    assert "✓ floor met" in text and "nearest miss" not in text


def test_not_met_names_the_nearest_miss_and_nothing_as_chosen() -> None:
    page = Page(render(example_records(met=False)))
    told = "No model of at most 3 MB was proven to keep 98 % of the quality; the nearest miss, trial 7, has 2.79 MB"
    assert f"{told} and keeps 97.7 % (at least 97.3 %) of the quality on 40 documents" in page.text
    assert "✗ floor not met" in page.text
    assert "chosen" not in page.text.replace("nearest miss", "")
    assert not any("chosen" in value for _, name, value in page.attributes if name == "class")


@pytest.mark.parametrize("label", ["chosen", "trial 7", ""])
def test_a_size_labelled_chosen_is_not_shown_so_when_the_verdict_is_not_met(label: str) -> None:
    records = [item for item in example_records() if item.metric != "verdict"]
    page = Page(render([*records, rec(label, "verdict", "not met", task=FINAL)]))
    assert not any("chosen" in value or "met" in value.split() for _, name, value in page.attributes if name == "class")
    assert "chosen" not in page.text and "never seen by the search." not in page.text[:60]


def test_not_met_without_any_candidate_gives_the_reason() -> None:
    records = [item for item in example_records(met=False) if item.metric in ("plan",) or item.model == "original"]
    records.append(rec("", "verdict", "not met", task=FINAL, detail={"reason": "no trial fitted into 3 MB."}))
    assert "was proven to keep 98 % of the quality: no trial fitted into 3 MB." in Page(render(records)).text


@pytest.mark.parametrize(
    "change", [{"lower_bound": 0.9799}, {"passed": False}, {"lower_bound": 0.9799, "passed": True}]
)
def test_no_win_on_a_red_gate(change: dict[str, Any]) -> None:
    """A verdict of 'met' that the chosen model's own records do not support is not repeated."""
    records = [
        dataclasses.replace(item, detail={**item.detail, **change})
        if item.model == "chosen" and item.metric == "retention" else item
        for item in example_records()
    ]  # fmt: skip
    page = Page(render(records))
    assert "this page claims nothing" in page.text and "✓ floor met" not in page.text
    assert not any(value.split()[:2] == ["mark", "chosen"] for _, name, value in page.attributes if name == "class")


def test_bounds_are_never_rounded_in_our_favour() -> None:
    records = [kept("chosen", FINAL, 0.9851, lower_bound=0.98099), rec("original", "bytes", 1_000_000),
               rec("chosen", "bytes", 250_300), rec("chosen", "verdict", "met", task=FINAL)]  # fmt: skip
    assert "(3.99 times smaller) keeps 98.5 % (at least 98.0 %)" in Page(render(records)).text


FORGOTTEN = {"band", *(item.metric for item in forgotten_records("chosen"))}
SECTION_OF = {"retention": 0, "move": 2, "sample": 3, "band": 4, "tensor": 5, "recipe": 6, "use": 7}


@pytest.mark.parametrize("metric", SECTION_OF)
def test_missing_sections_are_left_out(metric: str) -> None:
    gone = FORGOTTEN if metric == "band" else {metric}
    page = Page(render([item for item in example_records() if item.metric not in gone]))
    assert page.headings() == [name for name in SECTIONS if name != SECTIONS[SECTION_OF[metric]]]


def test_measured_models_without_a_search_make_a_table() -> None:
    records = [rec(name, "bits_per_byte", 1.1, task=FINAL, n=9, unit="bits/byte") for name in ("runs/a", "runs/b")]
    records.append(rec("runs/a", "joules", 3.25, unit="J"))
    page = Page(render(records))
    assert page.headings() == ["The numbers", "How it was measured"]
    assert "runs/a" in page.text and "3.250" in page.text and "floor" not in page.text
    assert Page(render([])).headings() == []


def test_only_the_last_run_is_shown() -> None:
    before = [dataclasses.replace(item, run="earlier", model="stranger") for item in example_records()]
    text = Page(render(before + example_records())).text
    assert "stranger" not in text and "one other run" in text


def test_control_characters_and_markup_are_shown_not_obeyed() -> None:
    hostile = "<script>alert(1)</script>\x1b[31m\u202e\ud800\x00&amp;[red]\"'"
    records = [rec("chosen", "sample", None, detail={"prompt": hostile, "before": hostile, "after": hostile + "!"}),
               rec(hostile, "accuracy", 0.5)]  # fmt: skip
    page = render(records)
    shown = "<script>alert(1)</script>␛[31m⟨U+202E⟩\ufffd␀&amp;[red]\"'"
    assert shown in Page(page).text and "script" not in Page(page).tags
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(summary(records))
    console.file.close()
    assert "[red]" in console.export_text() and "\x1b" not in console.export_text()


ALLOWED = (
    "html|head|meta|title|style|body|main|header|footer|section|p|h1|h2|h3|span|div|dl|dt|dd|ul|ol|li|figure|table|thead|"
    "tbody|tr|th|td|small|details|summary|pre|code|mark|svg|g|path|circle|rect|text|desc"
)
NAMES = (
    "lang|charset|http-equiv|content|name|class|scope|colspan|role|tabindex|aria-label|aria-labelledby|aria-hidden|"
    "viewbox|id|d|x|y|cx|cy|r|width|height|text-anchor|preserveaspectratio|style"
)
STYLES = re.compile(r"height:[0-9.]+px")
HOSTILE = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="<>/\"'&=! scriptonlhef:jav\x00\x1b-]", max_size=30),
    st.sampled_from(
        ["</style><script>x()</script>", "</svg><img src=//evil onerror=x>", '" onload="x', "javascript:x"]
    ),
    st.sampled_from(["<!--", "]]>", "</title>", "&lt;script&gt;", "https://evil.example/x.js"]),
)
ANY = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), HOSTILE)
VALUE = st.recursive(
    ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3), max_leaves=5
)


def check_contained(page: str) -> None:
    parsed = Page(page)
    assert set(parsed.tags) <= set(ALLOWED.split("|"))
    assert {name for _, name, _ in parsed.attributes} <= set(NAMES.split("|"))
    assert all(STYLES.fullmatch(value) for _, name, value in parsed.attributes if name == "style")
    style = re.findall(r"<style>(.*?)</style>", page, re.S)
    assert len(style) == 1 and "url(" not in style[0] and "@import" not in style[0]
    for _, name, value in parsed.attributes:
        if name in ("d", "x", "y", "cx", "cy", "r", "width", "height", "viewbox"):
            for text in re.findall(r"[^\sMHVhvlz,]+", value):
                assert math.isfinite(float(text))
    page.encode("utf-8")


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), met=st.booleans())
def test_nothing_in_a_record_breaks_out_of_the_page(data: st.DataObject, met: bool) -> None:
    """Any text and any type in any field: the page keeps its tags, loads nothing and draws finite coordinates."""
    records = []
    for item in example_records(met):
        if data.draw(st.integers(0, 5)):
            records.append(item)
            continue
        change: dict[str, Any] = {}
        field = data.draw(
            st.sampled_from(["model", "value", "unit", "task", "detail", "n", "low", "machine", "commit"])
        )
        if field == "detail":
            keys = data.draw(st.sets(st.sampled_from([*item.detail, "extra"])))
            change["detail"] = {**item.detail, **{key: data.draw(VALUE) for key in keys}}
        elif field in ("value", "low"):
            change[field] = data.draw(st.floats() | (HOSTILE if field == "value" else st.none()))
        elif field == "n":
            change[field] = data.draw(st.integers(0, 10**30))
        else:
            change[field] = data.draw(HOSTILE)
        records.append(dataclasses.replace(item, **change))
    check_contained(render(records))
    with Path(os.devnull).open("w") as nowhere:
        Console(file=nowhere, width=100).print(summary(records))


@settings(max_examples=100)
@given(
    sizes=st.lists(
        st.sampled_from([1.0, 5.0, 1e6, 1.0000001e6, 1e12, 1e300, 5e-324]) | st.floats(), min_size=1, max_size=5
    ),
    shares=st.lists(st.sampled_from([0.0, 1.0, 0.98, -3.0, 1e300]) | st.floats(), min_size=5, max_size=5),
    floor=st.sampled_from([None, 0.0, 0.98, 1.0]),
)
def test_picture_is_finite_for_degenerate_inputs(sizes: list[float], shares: list[float], floor: float | None) -> None:
    records = [rec("", "plan", None, detail={"goals": {"keep": floor}})]
    for number, (total, share) in enumerate(zip(sizes, shares, strict=False), 1):
        records.append(rec(f"trial {number}", "bytes", total))
        records.append(rec(f"trial {number}", "retention", share, task=SEARCH, low=share, high=shares[0]))
    check_contained(render(records))


@pytest.mark.parametrize("many", [1, 3])
def test_one_trial_and_equal_sizes_are_drawn(many: int) -> None:
    records = [item for number in range(1, many + 1)
               for item in (rec(f"trial {number}", "bytes", 2e6), kept(f"trial {number}", SEARCH, 0.99))]  # fmt: skip
    page = render(records)
    check_contained(page)
    assert "Size against quality" in page and page.count('class="mark trial hollow"') == 2 * many + 1


def test_picture_shows_what_falls_below_it() -> None:
    text = Page(render(example_records())).text
    assert "below the picture" in text and "trial 6, search split: 2.43 MB, keeps 81.2 %" in text


def test_main_writes_the_page_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.write(tmp_path / "records.jsonl", example_records())
    assert main([str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text("utf-8") == render(example_records())
    out = capsys.readouterr().out.replace("\u00a0", " ")
    assert "2.87 MB" in out and "healed original" in out and "98.2 %" in out


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    good, page = tmp_path / "good.jsonl", tmp_path / "page.html"
    record.write(good, example_records()[:3])
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    bad.write_text(good.read_text("utf-8") + '{"run": "x"\n', "utf-8")
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 4: ") as caught:
        main([str(bad), "--out", str(page)])
    assert caught.value.exit_code == 2
    with pytest.raises(DataError, match="holds no records"):
        main([str(empty), "--out", str(page)])
    with pytest.raises(DataError, match="no such records file"):
        main([str(tmp_path / "none.jsonl"), "--out", str(page)])
    with pytest.raises(UsageError, match="is a folder"):
        main([str(good), "--out", str(tmp_path)])
    before = good.read_bytes()
    with pytest.raises(UsageError, match="the records file itself"):
        main([str(good), "--out", str(good)])
    with pytest.raises(UsageError, match="required: records"):
        main([])
    assert good.read_bytes() == before and not page.exists()


def test_report_runs_without_torch() -> None:
    code = "import sys; sys.modules.update(torch=None, transformers=None); import shrew.report; shrew.report.render([])"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_how_to_runs(tmp_path: Path) -> None:
    """The sh blocks of docs/report.md, in order, in one folder."""
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    assert blocks
    code = "import sys; from shrew.report import main; sys.exit(main(sys.argv[2:]))"
    shell = f"""set -e
shrew() {{ "{sys.executable}" -c "{code}" "$@"; }}
python() {{ "{sys.executable}" "$@"; }}
"""
    done = subprocess.run(
        ["bash", "-c", shell + "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<h1>" in (tmp_path / "report.html").read_text("utf-8")
