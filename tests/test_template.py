"""Chat templates: what transformers makes of them is what we make of them, and a hostile one comes to an end."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrew.errors import FolderError
from shrew.runtime import template
from shrew.runtime.template import ChatTemplate, TemplateError

CHATML = """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

TURNS = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' ~ (system ~ '\\n\\n' if loop.index0 == 0 and system else '') }}
        {{- message['content'] | trim ~ ' [/INST]' }}
    {%- else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}
"""

TOOLS = """\
{%- macro shown(tool, indent=none) %}{{ tool | tojson(indent=indent) }}{% endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" ~ shown(tool) }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined %}{% set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and thought %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

PARTS = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'developer' %}{% continue %}{% endif %}
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}
{% for part in message.content %}
{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type | upper }}>{% endif %}
{%- endfor %}{% endif %}<end_of_turn>
{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}
{% if documents %}{% for d in documents %}{{ loop.index }}. {{ d['title'] }}: {{ d.text }}
{% endfor %}{% endif %}{{ dict(a=1, b='<&>') | tojson }}{{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}
"""

TRAINED = """\
{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.role | capitalize }}: {{ m.content }} {% endif %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "turns": TURNS, "tools": TOOLS, "parts": PARTS, "trained": TRAINED}

TALK = [
    {"role": "user", "content": " What's <b>1 & 2</b>? \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 3."},
    {"role": "user", "content": "Ça va? 你好 🙂"},
]
SYSTEM = {"role": "system", "content": "Be brief. "}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look <up> “it”", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}  # fmt: skip
CALLED = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": 1}}}]},
    {"role": "tool", "content": "a bird"},
    {"role": "assistant", "content": "A bird.", "reasoning_content": "I saw it"},
]  # fmt: skip
MIXED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "chatml": ("chatml", TALK, {}),
    "chatml system": ("chatml", [SYSTEM, *TALK], {"add_generation_prompt": False}),
    "turns": ("turns", [SYSTEM, *TALK], {}),
    "tools none": ("tools", TALK, {}),
    "tools": ("tools", [SYSTEM, *CALLED], {"tools": [TOOL]}),
    "tools two": ("tools", CALLED, {"tools": [TOOL, TOOL], "enable_thinking": False}),
    "parts": ("parts", [*MIXED, {"role": "developer", "content": "x"}, *TALK], {}),
    "documents": ("parts", TALK * 3, {"documents": [{"title": "A", "text": "b"}]}),
    "trained": ("trained", TALK, {"add_generation_prompt": False}),
    "continued": ("chatml", TALK[:2], {"continue_final_message": True}),
    "continued and trimmed": ("turns", [TALK[0], {"role": "assistant", "content": "It is "}],
                              {"continue_final_message": True}),
    "continued parts": ("parts", MIXED, {"continue_final_message": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_transformers_makes(tiny_tokenizer: Any, case: str) -> None:
    name, messages, given = CASES[case]
    special = {key: str(value) for key, value in tiny_tokenizer.special_tokens_map.items()}
    asked = {"add_generation_prompt": not given.get("continue_final_message", False), **given}
    wanted = tiny_tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **asked)
    assert template.of_text(TEMPLATES[name], **special).render(messages, **asked) == wanted


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=20)), min_size=1))
def test_any_messages_are_what_transformers_makes(tiny_tokenizer: Any, talk: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in talk]
    for name in ("chatml", "tools"):
        wanted = tiny_tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False,
                                                    add_generation_prompt=True)  # fmt: skip
        assert template.of_text(TEMPLATES[name]).render(messages) == wanted


def test_arguments_may_come_as_the_json_text_that_clients_send() -> None:
    as_text = json.loads(json.dumps(CALLED))
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"at": "é", "n": 1}'
    made = template.of_text(TOOLS)
    assert made.render(as_text, [TOOL]) == made.render(CALLED, [TOOL])


@pytest.mark.parametrize("form", ["jinja", "config", "named", "folder"])
def test_folders_hold_templates_in_several_ways(tmp_path: Path, form: str) -> None:
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    source, tools = "{{ bos_token }}{{ messages[0].content }}", "{{ tools | length }}{{ eos_token }}"
    if form == "config":
        config["chat_template"] = source
    elif form == "named":
        config["chat_template"] = [{"name": "default", "template": source}, {"name": "tool_use", "template": tools}]
    else:
        (tmp_path / "chat_template.jinja").write_text(source, "utf-8")
    if form == "folder":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tools, "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    made = template.of_folder(tmp_path, None)
    assert not made.plain
    assert made.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    if form in ("named", "folder"):
        assert made.render([{"role": "user", "content": "hi"}], [TOOL]) == "1</s>"
        with pytest.raises(TemplateError, match="no chat template 'rag' in this folder; there are: default, tool_use"):
            made.render([{"role": "user", "content": "hi"}], name="rag")


def test_a_folder_without_a_template_gets_plain_lines(tmp_path: Path) -> None:
    made = template.of_folder(tmp_path, None)
    assert made.plain and "\nUser:" in made.stop
    assert made.render([SYSTEM, *TALK[:1]]) == "System: Be brief.\nUser: What's <b>1 & 2</b>?\nAssistant:"
    talk = [TALK[0], {"role": "assistant", "content": "It is "}]
    assert made.render(talk, continue_final_message=True).endswith("\nAssistant: It is ")


def test_tools_are_told_in_words_where_the_template_knows_none(tmp_path: Path) -> None:
    for made in (template.of_folder(tmp_path, None), template.of_text(CHATML)):
        text = made.render([SYSTEM, *CALLED], [TOOL])
        assert '"name": "look"' in text and "Be brief." in text and "<tool_call>" in text
        assert text.count("“it”") == 1 and '{"at": "é", "n": 1}' in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "no readable JSON"),
        ("[]", "no JSON object"),
        ('{"chat_template": [1]}', "no list of templates"),
        (json.dumps({"chat_template": "x" * 100_001}), "larger than"),
        ("\udcff", "no readable JSON"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(FolderError, match=words):
        template.of_folder(tmp_path, None)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        (["hi"], "message 1 is no object"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 2 is no object with a 'role'"),
        ([{"role": "assistant", "content": "b"}], "must alternate"),
        ([{"role": "assistant"}, {"role": "user"}], "must alternate"),
    ],
)
def test_messages_that_do_not_fit_are_refused(messages: list[Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        template.of_text(TURNS, bos_token="", eos_token="").render(messages)


def test_a_template_that_does_not_fit_the_messages_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"fails on these messages \(TypeError"):
        template.of_text(CHATML).render([{"role": "user", "content": 3}])


def test_the_filters_and_methods_of_real_templates_are_there(tiny_tokenizer: Any) -> None:
    """What is in the templates of the larger model families, beside what is above."""
    source = """\
{%- set ns = namespace(last=messages|length - 1, system='') %}
{%- for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}
{%- if m.role == 'user' and not (m.content.startswith('<t>') and m.content.endswith('</t>')) %}{% set ns.last = index %}
{%- endif %}{% endfor %}
{{- messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('trim')|list|join('; ') }}
{{- (messages|rejectattr('role', 'in', ['user'])|list|first).content.split('</think>')[-1].lstrip('\\n') }}
{{- messages[1].content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].strip() }}
{{- messages|groupby('role')|map('first')|sort|unique|join(',')|title|replace('U', 'u')|indent(2)|default('x', true) }}
{{- messages[0]|dictsort|tojson(indent=2) }}{{ messages[0]|items|list|string }}{{ messages[0].get('x', 'none')|upper }}
{%- for key, value in messages[0].items()|sort(reverse=true) %}{{ key|e ~ value|length|float|round(1)|int|abs }}
{%- endfor %}
{{- [3, 1]|max ~ [3, 1]|min ~ [3, 1]|sum ~ '%s-%s'|format(1, 'a') ~ 'a,b'.partition(',')[2] ~ ns.last // 2 }}
{{- messages|select('mapping')|reject('none')|list|count ~ ('x' if messages[0] is mapping and 1 is number else 'y') }}
{{- messages[0]['content']|capitalize|lower|safe ~ 'abc'[:2] ~ [1, 2, 3]|reverse|list|batch(2)|list }}
{{- 'a\\nb'.splitlines() }}"""
    wanted = tiny_tokenizer.apply_chat_template(TALK, chat_template=source, tokenize=False)
    assert template.of_text(source).render(TALK, add_generation_prompt=False) == wanted


# --- hostile templates -----------------------------------------------------------------------------------------------

LONG = "{% for a in range(99999) %}{% for b in range(99999) %}"
DOUBLED = "{% set s = 'x' * 1000 %}" + "{% set s = @ %}" * 60 + "{{ s | length }}"
HOSTILE = {
    "loops": LONG + "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that print": LONG + "{{ a }}{{ b }}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(200) }}",
    "macros for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "filters": "{{ range(99999) | map('center', 99999) | list | length }}",
    "filters in filters": "{{ range(99999) | map('string') | join('y' * 90000) | length }}",
    "multiplied": "{{ ('x' * 10**9) | length }}",
    "list multiplied": "{{ ([1] * 10**9) | length }}",
    "power": "{{ 9 ** 99999999 }}",
    "product": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "format": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%*d' | format(999999999, 1) }}",
    "format method": "{{ '{:>999999999}'.format(1) }}",
    "nested format": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "many widths": "{% set s = '{0:9999}' * 60000 %}{{ s.format('a') | length }}",
    "many widths, filter": "{{ (['{0:9999}' * 60000] | map('attr', 'format') | first)('a') | length }}",
    "many widths, %": "{{ (('%(a)9999d' * 60000) % {'a': 1}) | length }}",
    "many precisions": "{{ ('{0:.9999f}' * 60000).format(1.5) | length }}",
    "time": "{{ strftime_now('%9999d' * 400000) | length }}",
    "center": "{{ 'x'.center(999999999) }}",
    "indent": "{{ ('\\n' * 99999) | indent(99999) }}",
    "tojson": "{{ range(9999) | list | tojson(indent=99999) }}",
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) | length }}",
    "joined": DOUBLED.replace("@", "s ~ s"),
    "added": DOUBLED.replace("@", "s + s"),
    "printed": "{% set s = 'x' * 1000 %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60 + "{{ s | length }}",
    "lists of lists": "{% set s = ['lol'] %}" + "{% set s = [s, s, s] %}" * 60 + "{{ s }}",
    "tuples": "{% set s = ('lol',) %}" + "{% set s = (s, s, s) %}" * 60 + "{{ s == s }}",
    "dicts": "{% set s = {'a': 1} %}" + "{% set s = dict(a=s, b=s) %}" * 60 + "{{ s | tojson }}",
    "namespaces": "{% set s = namespace() %}{% set s.s = s %}{{ s | string }}",
    "lipsum": "{{ lipsum(n=99999, html=false) | length }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep lists": "{{ " + "[" * 500 + "]" * 500 + " }}",
    "nested blocks": "{% for a in range(2) %}" * 60 + "{% endfor %}" * 60,
    "syntax": "{% for %}",
    "no end": "{% if 1 %}",
    "class": "{{ messages.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ messages | attr('__class__') }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "map attribute": "{{ messages | map(attribute='__class__') | list }}",
    "namespace dunder": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "append": "{{ messages.append(1) }}",
    "bytes of a number": "{{ (1).to_bytes(2**30, 'big') | length }}",
    "bytes of a text": "{{ 'x'.encode().ljust(2**30) | length }}",
    "bytes multiplied": "{{ ('x' * 99999).encode() * 9999 | length }}",
    "round": "{{ 1 | round(9999999, 'floor') }}",
    "sum of lists": "{{ ([[''] * 4000] * 1000) | sum(start=[]) | length }}",
    "sum of a generator": "{{ ([[''] * 4000] * 1000) | map('list') | sum(start=[]) | length }}",
    "wordwrap": "{{ (' '*1000000)|wordwrap(1) }}",
    "striptags": "{{ ('<!---->' * 500000)|striptags }}",
    "striptags method": "{{ (('<!---->' * 500000)|safe).striptags() }}",
    "urlize": "{{ ('www.a.b ' * 400000)|urlize|length }}",
    "pprint": "{{ ('\\n' * 1900000)|pprint|length }}",
    "sorted text": "{{ ('你' * 3900000)|sort|length }}",
    "batched text": "{{ ('你' * 3900000)|batch(2)|list|length }}",
    "sought from the end": "{{ ('a' * 1900000).rsplit('ab' + 'a' * 900000)|length }}",
    "found from the end": "{{ ('a' * 1900000).rfind('ab' + 'a' * 900000) }}",
    "stripped": "{{ ('a' * 1900000).strip('b' * 1900000 + 'a')|length }}",
    "trimmed": "{{ ('a' * 1900000)|trim('b' * 1900000 + 'a')|length }}",
    "numbers that collide": "{{ range(0, 99999 * (2**61 - 1), 2**61 - 1)|unique|list|length }}",
    "keys that collide": "{{ {}.fromkeys(range(0, 99999 * (2**61 - 1), 2**61 - 1))|length }}",
    "pairs that collide": "{{ dict(range(0, 99999 * (2**61 - 1), 2**61 - 1)|batch(2))|length }}",
    "literals that collide": "{% set d = {" + ",".join(f"{n}:1" for n in range(10_001)) + "} %}",
    "large quotient": "{{ (('f' * 1500000)|int(base=16)) // (('f' * 750000)|int(base=16)) }}",
    "long attributes": "{{ range(99999)|map(attribute='real.' * 99999)|list|length }}",
    "namespaces printed": "{% set s = namespace() %}" + "{% set s = namespace(a=s, b=s) %}" * 60 + "{{ s|string }}",
    "parts kept": "{% set x = 'a' * 3000000 %}" + "".join(f"{{% set a{n} = x[1:] %}}" for n in range(1000)),
    "compared": "{% set x = 'ab' * 1500000 %}{% set y = 'ab' * 700000 + 'b' %}" + "{% if y in x %}{% endif %}" * 1900,
    "statements": "".join(f"{{% set a{n}=1 %}}" for n in range(2500)) + "{% if x %}{% endif %}" * 2500,
    "include": "{% include 'x' %}",
    "import": "{% import 'os' as os %}{{ os }}",
}
ESCAPES = ("class", "globals", "subclasses", "attr", "format attribute", "map attribute", "environment")
HARMLESS = ("lipsum", "namespaces", "namespaces printed", "tuples", "deep lists", "center", "nested format")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_stopped(case: str) -> None:
    """It may also render to nothing of use (an attribute that is not there prints as nothing): it must just end."""
    begun, threads = time.monotonic(), threading.active_count()
    made = template.of_text(HOSTILE[case])
    try:
        text = made.render([{"role": "user", "content": "hi"}], seconds=0.3)
    except TemplateError as error:
        assert "\n" not in str(error) and str(error).startswith("the chat template")
        assert len(str(error)) < 300
    else:
        assert case in {*ESCAPES, *HARMLESS}, text[:300]
        assert "class" not in text and "function" not in text and len(text) < 300_000
    assert time.monotonic() - begun < 5  # 0.3 seconds on a machine with nothing else to do
    assert threading.active_count() == threads
    assert template.of_text(CHATML).render(TALK).endswith("assistant\n")


def test_memory_stays_bounded() -> None:
    """Every template that wants a lot, in a process that may have little."""
    script = (
        "import resource, json, sys\n"
        "from shrew.runtime import template\n"
        "template.of_text('{{ 1 }}').render([{'role': 'user', 'content': 'a'}])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for source in json.load(sys.stdin):\n"
        "    try:\n"
        "        template.of_text(source).render([{'role': 'user', 'content': 'a'}], seconds=0.2)\n"
        "    except template.TemplateError:\n"
        "        pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps([*HOSTILE.values()]), text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert int(done.stdout) < 500_000  # kilobytes


def test_templates_are_rendered_in_threads_at_once() -> None:
    made = template.of_text("{% for i in range(3000) %}{{ messages[0].content }}{% endfor %}")
    found: list[bool] = []

    def render(number: int) -> None:
        found.append(made.render([{"role": "user", "content": str(number)}]) == str(number) * 3000)

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_long_honest_conversation_is_rendered() -> None:
    messages = [SYSTEM, *({"role": role, "content": "word " * 200} for role in ("user", "assistant") * 200)]
    assert len(template.of_text(TOOLS).render(messages, [TOOL] * 20)) > 400_000


def test_the_plain_default_is_said_in_words() -> None:
    assert ChatTemplate().plain and "no chat template" in template.PLAIN_NOTE
