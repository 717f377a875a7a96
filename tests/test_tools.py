"""Calls of tools in the text of models: found however the text is cut, and never half of one given out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew.runtime import tools
from shrew.runtime.tools import Parser, ToolError

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
         for name in ("look", "go.to")]  # fmt: skip
A = '{"name": "look", "arguments": {"at": "</tool_call> [TOOL_CALLS] é"}}'
B = '{"name": "go.to", "arguments": {}}'
LLAMA = A.replace("arguments", "parameters")
# form, text, what the user reads, the names that are called
CASES = {
    "text": ("hermes", "a <tool b <tool_ call", "a <tool b <tool_ call", []),
    "call": ("hermes", f"<tool_call>\n{A}\n</tool_call>", "", ["look"]),
    "text and call": ("hermes", f"I look.\n<tool_call>{A}</tool_call>\n", "I look.\n", ["look"]),
    "two calls": ("hermes", f"<tool_call>{A}</tool_call>\n<tool_call>\n{B}\n</tool_call>", "", ["look", "go.to"]),
    "no end": ("hermes", f"so <tool_call>{B}", "so ", ["go.to"]),
    "half": ("hermes", "so <tool_call>" + B[:-4], "so <tool_call>" + B[:-4], []),
    "half an end": ("hermes", f"<tool_call>{B}</tool_", f"<tool_call>{B}</tool_", []),
    "no json": ("hermes", "<tool_call>look!</tool_call> x", "<tool_call>look!</tool_call> x", []),
    "unknown": ("hermes", '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    "mistral": ("mistral", f"[TOOL_CALLS] [{A}, {B}]", "", ["look", "go.to"]),
    "mistral text": ("mistral", f"Well. [TOOL_CALLS][{B}]", "Well. ", ["go.to"]),
    "mistral new": ("mistral", '[TOOL_CALLS]look[ARGS]{"at": 1}', "", ["look"]),
    "mistral none": ("mistral", "[TOOL_CALL [TOOL_CALLS", "[TOOL_CALL [TOOL_CALLS", []),
    "llama": ("llama", f" {LLAMA}", "", ["look"]),
    "llama two": ("llama", f"{LLAMA}; {B.replace('arguments', 'parameters')}", "", ["look", "go.to"]),
    "llama tag": ("llama", f"Hm. <|python_tag|>{LLAMA}", "Hm. ", ["look"]),
    "llama text": ("llama", 'No {"name": 1}', 'No {"name": 1}', []),
    "llama json": ("llama", '{"a": 1}', '{"a": 1}', []),
    "empty": ("llama", "", "", []),
}


def read(form: str, pieces: list[str]) -> tuple[str, list[tools.Call], list[str]]:
    parser = Parser(form, TOOLS)
    found = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return "".join(each.text for each in found), [call for each in found for call in each.calls], [
        each.text for each in found]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_calls_are_found_however_the_text_is_cut(case: str, data: Any) -> None:
    form, whole, text, names = CASES[case]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[low:high] for low, high in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    said, calls, parts = read(form, pieces)
    assert (said, [call.name for call in calls]) == (text, names)
    assert len({call.id for call in calls}) == len(calls) and all(call.id.startswith("call_") for call in calls)
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)
    if names:
        assert not any(part.rstrip().endswith(("<tool", "[TOOL_CALLS", "<|python")) for part in parts)


@given(st.text(st.sampled_from('<tool_call>{}"/ \n'), max_size=60), st.integers(1, 5))
def test_no_text_is_lost(text: str, step: int) -> None:
    pieces = [text[at : at + step] for at in range(0, len(text), step)]
    said, calls, _ = read("hermes", pieces)
    assert said == text and not calls


def test_text_comes_as_soon_as_it_is_sure() -> None:
    parser = Parser("hermes", TOOLS)
    assert parser.feed("Hello <to").text == "Hello "
    assert parser.feed("day>").text == "<today>"
    parser = Parser("llama", TOOLS)
    assert parser.feed("Hello {").text == "Hello {"


def test_an_endless_call_is_given_as_text() -> None:
    parser = Parser("hermes", TOOLS)
    said = parser.feed("<tool_call>").text + "".join(parser.feed("x" * 1000).text for _ in range(300))
    assert len(said) > 200_000


@pytest.mark.parametrize(
    ("source", "form"),
    [(None, "hermes"), ("{{ messages }}", "hermes"), ("... <tool_call> ...", "hermes"),
     ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"), ('"parameters": ipython <|python_tag|>', "llama")],
)  # fmt: skip
def test_the_form_is_read_off_the_template(source: str | None, form: str) -> None:
    assert tools.format_of(source) == form


@pytest.mark.parametrize(
    "given",
    [1, "look", [1], [{}], [{"function": {"name": "a b"}}], [{"function": {"name": "a", "parameters": 3}}],
     [{"type": "function", "function": {"name": "a"}}] * 200],
)  # fmt: skip
def test_tools_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ToolError):
        tools.functions(given)


def test_a_tool_that_is_not_there_cannot_be_demanded() -> None:
    with pytest.raises(ToolError, match=r"no tool 'swim' to choose; there are: look, go\.to"):
        tools.demanded("hermes", TOOLS, "swim")
