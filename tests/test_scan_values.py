"""What calls are given: the words for it in each language, hostile texts, and how freely a bucket may weigh."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shrew.scan.functions import LANGUAGES
from shrew.scan.grams import Rows, both, described, moved, rows
from shrew.scan.values import values

PIECES = st.sampled_from(["def f(a):\n ", "f(", ")", "{", "}", "a", " = ", "b", '"x%s"', " + ", ".get", "[", "]",
                          "return ", "\n", "if ", ";", "#{", "`", "$", "func ", "int ", ",", "=>", "日"])  # fmt: skip


@pytest.mark.parametrize(
    ("language", "text", "wanted"),
    [
        ("python", "def f(a):\n    q = 'SELECT ' + a\n    db.execute(q, x=None)",
         {"execute 0 built", "execute < parameter", "execute < text sql", "execute x none", "of execute  global"}),
        ("python", "def f(a):\n    return f'<b>{esc(a)}</b>'", {"return  built", "return < esc()", "esc 0 parameter"}),
        ("python", "def f(self, a):\n    open(os.path.join(self.root, a))",
         {"open 0 join()", "open < parameter", "open < .root"}),
        ("c", "int f(char a[]) { char b[9]; strcpy(b, a); }", {"strcpy 0 global", "strcpy 1 parameter"}),
        ("cpp", 'int f(std::string a) { auto c = "ls " + a; run(c); }', {"run 0 built", "run < parameter"}),
        ("javascript", "function f(a) { let q = `<b>${a}`; el.innerHTML = q; }", {"set innerHTML  built"}),
        ("go", 'func f(a string) { q := fmt.Sprintf("%s", a); db.Exec(q) }', {"Exec 0 built", "Exec < Sprintf()"}),
        ("ruby", 'def f(a)\n  x = "ls #{a}"\n  system(x)\nend', {"system 0 built", "system < parameter"}),
        ("java", 'class A { void f(String a) { String q = "x" + a; st.run(q, 1); } }',
         {"run 0 built", "run 1 constant"}),
    ],
)  # fmt: skip
def test_values_are_followed(language: str, text: str, wanted: set[str]) -> None:
    assert wanted - values(text, language) == set()


def test_names_of_variables_do_not_matter() -> None:
    text = "def f({0}, *, {1}=1):\n    for {2} in {0}:\n        run('ls ' + {2} % {1})\n    return {2}\n"
    found = values(text.format("a", "b", "c"), "python")
    assert found == values(text.format("rows", "how", "each"), "python") and "run 0 built" in found
    assert found != values(text.format("a", "b", "c").replace("'ls ' + ", ""), "python")


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=30).map("".join), st.sampled_from(LANGUAGES))
def test_any_text_has_the_same_values_again(text: str, language: str) -> None:
    found = values(text, language)
    assert found == values(text, language)
    alone, with_none = described([text], [language], 24), described([text, ""], [language] * 2, 24)
    assert with_none.starts.tolist() == [*alone.starts, len(alone.columns)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_hostile_texts_end_soon(language: str) -> None:
    begun = time.process_time()
    for piece in ("f(", "a.b", "a = a + ", "(a", "f(a, ", "x(1)(", '"a" + ', "a[", "return a\n"):
        values(piece * (20_000 // len(piece)), language)
    assert time.process_time() - begun < 20


def test_both_tables_stand_side_by_side() -> None:
    texts = ["def f(a):\n    run(a)", "", "x = g('b')"]
    languages = ["python"] * 3
    one, two, all_of = rows(texts, languages, 12), described(texts, languages, 12), both(texts, languages, 12)
    for at in range(3):
        first, second, found = (item.columns[item.starts[at] : item.starts[at + 1]] for item in (one, two, all_of))
        assert found.tolist() == [*first, *(second + 4096)]
        values_of = all_of.values[all_of.starts[at] : all_of.starts[at + 1]]
        assert (values_of**2).sum() == pytest.approx((len(first) > 0) + (len(second) > 0))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_what_moves_in_pairs_is_free(seed: int) -> None:
    """Counted pair by pair."""
    draw = np.random.default_rng(seed)
    dense = draw.random((9, 12)) < 0.4
    found = Rows(np.concatenate([[0], np.cumsum(dense.sum(1))]), np.nonzero(dense)[1])
    twins = draw.permutation(9)[:8].reshape(4, 2)
    changed = sum((dense[a] ^ dense[b]).astype(int) for a, b in twins)
    there = sum((dense[a] | dense[b]).astype(int) for a, b in twins)
    np.testing.assert_allclose(moved(found, twins, 12), np.sqrt((changed + 0.5) / (there + 1)))
