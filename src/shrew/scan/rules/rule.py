"""A rule as it is written, and ready to be tried: what is wrong with one is said when it is read."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from shrew import files, spec
from shrew.errors import SpecError, nearest
from shrew.scan.rules import expressions, query
from shrew.scan.rules.flow import LABELS
from shrew.scan.rules.query import Query
from shrew.scan.rules.syntax import LANGUAGES, Names

if TYPE_CHECKING:
    from tree_sitter import Language

LARGEST, MOST = 1 << 20, 1000  # bytes of a file of rules, and rules in it
DYNAMIC = "dynamic"  # any label

Word = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=1000)]
Written = Annotated[str, Meta(max_length=query.LONGEST)]
Words = Annotated[tuple[Word, ...], Meta(max_length=500)]


@dataclass(frozen=True, kw_only=True)
class Where:
    """One thing that must hold: of an argument of the call (by place from 0, by name, or by either), of any argument,
    or of a capture of the query."""

    argument: Annotated[int, Meta(ge=0, le=50)] | None = None
    keyword: Text = ""
    any: bool = False
    capture: Text = ""
    missing: bool = False  # it is not given
    labels: tuple[Literal["outside", "parameter", "built", "unknown", "dynamic"], ...] = ()  # it has one of them
    without: tuple[Literal["outside", "parameter", "built", "unknown", "dynamic"], ...] = ()  # it has none of them
    matches: Text = ""  # its source text does
    unlike: Text = ""  # its source text does not match
    says: Text = ""  # the constant text that it is made of matches


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The keys of a rule. It looks at `calls` of these names, at what fits `query`, or at what fits `then` after
    `first` in one function with the same @name and no `reset` between."""

    id: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=60)]
    languages: Annotated[tuple[str, ...], Meta(min_length=1)]
    cwe: Annotated[str, Meta(pattern=r"^(CWE-[1-9][0-9]{0,4})?$")] = ""
    severity: Literal["low", "medium", "high"]
    message: Annotated[str, Meta(min_length=1, max_length=500)]
    origin: Annotated[str, Meta(min_length=1, max_length=500)]  # how the rule came to be
    calls: Words = ()
    query: Written = ""
    first: Written = ""
    then: Written = ""
    reset: Written = ""
    where: Annotated[tuple[Where, ...], Meta(max_length=20)] = ()
    sources: Words = ()  # names that bring data from outside
    cleaners: Words = ()  # calls that make a value harmless for this rule
    unless_calls: Words = ()  # a call of one of these in the same function clears it
    unless: Annotated[tuple[Written, ...], Meta(max_length=20)] = ()  # so does what fits one of these


@dataclass(frozen=True)
class Condition:
    where: Where
    labels: frozenset[str]
    without: frozenset[str]
    matches: re.Pattern[str] | None
    unlike: re.Pattern[str] | None
    says: re.Pattern[str] | None

    @property
    def flows(self) -> bool:
        return bool(self.labels or self.without or self.says)


@dataclass(frozen=True)
class Rule:
    """A rule for one language."""

    written: Statement
    conditions: tuple[Condition, ...]
    sources: Names
    cleaners: Names
    unless_calls: Names
    unless: tuple[Query, ...]
    query: Query | None  # of `query` or `first`
    then: Query | None
    reset: Query | None


@dataclass(frozen=True)
class Stated:
    """A rule that was read, with the file it stands in."""

    written: Statement
    where: str
    conditions: tuple[Condition, ...] = field(default=())

    def ready(self, language: str, grammar: "Language") -> Rule:
        """Raises SpecError for a query that does not fit the language."""
        rule = self.written

        def known(key: str, text: str, needs: tuple[str, ...]) -> Query | None:
            if not text:
                return None
            try:
                read = query.parse(text, grammar)
                if read.roots & {"", query.DEEP} or not read.named:
                    raise ValueError("it may begin with any node; say of which kind the outermost one is")
                if missing := set(needs) - read.captures:
                    raise ValueError(f"@{missing.pop()} is not captured")
            except ValueError as error:
                raise SpecError(f"{self.where}: {key} for {language}: {error}.") from None
            return read

        captured = tuple(item.where.capture for item in self.conditions if item.where.capture)
        unless = [known("unless", text, ()) for text in rule.unless]
        named = ("name",)
        return Rule(
            rule,
            self.conditions,
            _names(rule.sources),
            _names(rule.cleaners),
            _names(rule.unless_calls),
            tuple(item for item in unless if item is not None),
            known("query", rule.query, captured) or known("first", rule.first, (*named, *captured)),
            known("then", rule.then, named),
            known("reset", rule.reset, named),
        )


@cache
def _names(names: tuple[str, ...]) -> Names:
    """One for all rules that share a list."""
    return Names(names)


@cache
def _is_name(name: str) -> bool:
    return re.fullmatch(r"(new )?(\*\.)?[^\s*]+", name) is not None


def read(path: Path) -> list[Stated]:
    """The rules of a TOML file. Raises SpecError, naming file and rule, for anything that is not as it should be."""
    try:
        content = files.read_whole(path, LARGEST, "split the file of rules", SpecError)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; give the path of a file of rules (TOML).") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read ({error.strerror}); give the path of a file of rules (TOML).") from None
    values = spec.parse_toml(content, path)
    for key in values:
        if key not in ("rule", "lists"):
            raise SpecError(f"{path}: unknown key '{key}'; {nearest(key, ('rule', 'lists'))}")
    rules, lists = values.get("rule", []), _lists(path, values.get("lists", {}))
    if not isinstance(rules, list) or not all(isinstance(item, dict) for item in rules):
        raise SpecError(f"{path}: 'rule' is no list of tables; begin each rule with [[rule]].")
    if len(rules) > MOST:
        raise SpecError(f"{path} has {len(rules)} rules, more than {MOST}; split the file.")
    found = [_one(path, number, item, lists) for number, item in enumerate(rules, 1)]
    ids = [item.written.id for item in found]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise SpecError(f"{path}: two rules are called '{twice[0]}'; give each a name of its own.")
    return found


def _lists(path: Path, values: Any) -> dict[str, list[str]]:
    if not isinstance(values, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in values.values()
    ):
        raise SpecError(f"{path}: 'lists' holds names with a list of texts each, and nothing else.")
    return values


def _one(path: Path, number: int, values: dict[str, Any], lists: dict[str, list[str]]) -> Stated:
    name = values.get("id")
    where = f"{path}: rule '{name[:60]}'" if isinstance(name, str) and name.isprintable() else f"{path}: rule {number}"
    values = {key: _expanded(where, value, lists) for key, value in values.items()}
    rule = spec.parse(Statement, values, where)
    for language in rule.languages:
        if language not in LANGUAGES:
            raise SpecError(f"{where}: unknown language '{language[:60]}'; {nearest(language, LANGUAGES)}")
    kinds = [bool(rule.calls), bool(rule.query), bool(rule.first or rule.then)]
    if sum(kinds) != 1 or bool(rule.first) != bool(rule.then) or (rule.reset and not rule.first):
        raise SpecError(f"{where}: give calls, or query, or first and then (with or without reset).")
    for names in (rule.calls, rule.sources, rule.cleaners, rule.unless_calls):
        for item in names:
            if not _is_name(item):
                raise SpecError(f"{where}: '{item[:60]}' is no name; write a.b.c, *.c or new C.")
    return Stated(rule, where, tuple(_condition(where, item, bool(rule.calls)) for item in rule.where))


def _expanded(where: str, value: Any, lists: dict[str, list[str]]) -> Any:
    """A list of names with each '@list' replaced by what it stands for."""
    if not isinstance(value, list):
        return value
    found: list[Any] = []
    for item in value:
        if isinstance(item, str) and item.startswith("@"):
            if item[1:] not in lists:
                hint = nearest(item[1:61], lists) if lists else "this file has no table [lists]."
                raise SpecError(f"{where}: '{item[:61]}' stands for a list of names, but [lists] of this file has none "
                                f"called '{item[1:61]}'; {hint}")  # fmt: skip
            found += lists[item[1:]]
        else:
            found.append(item)
    return found


def _condition(where: str, item: Where, calls: bool) -> Condition:
    by_argument = item.argument is not None or bool(item.keyword) or item.any
    if by_argument == bool(item.capture):
        raise SpecError(f"{where}: where: say which argument (argument, keyword, any) or which capture.")
    if by_argument != calls:
        raise SpecError(f"{where}: where: arguments are those of calls; of a query, give a capture.")
    if not (item.missing or item.labels or item.without or item.matches or item.unlike or item.says):
        raise SpecError(f"{where}: where: say what must hold (labels, without, matches, unlike, says, missing).")

    def known(key: str, text: str) -> re.Pattern[str] | None:
        try:
            return expressions.compile_safely(text) if text else None
        except ValueError as error:
            raise SpecError(f"{where}: where: {key}: {error}.") from None

    def labels(words: tuple[str, ...]) -> frozenset[str]:
        return frozenset(LABELS if DYNAMIC in words else words)

    return Condition(
        item,
        labels(item.labels),
        labels(item.without),
        known("matches", item.matches),
        known("unlike", item.unlike),
        known("says", item.says),
    )
