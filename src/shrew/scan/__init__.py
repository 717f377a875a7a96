"""`shrew scan PATH...`: functions that somebody should look at, by rules and a small model. Nothing scanned is run.

Offline and without torch: tree-sitter parses, rules and a linear first stage judge every function, ONNX Runtime runs
the detector on what is left. Each of them is loaded when it is first needed.
"""

import importlib.metadata
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shrew import files
from shrew.errors import UsageError, nearest
from shrew.report import words
from shrew.scan import config
from shrew.scan.alerts import Alert, Report
from shrew.scan.config import ScanSpec
from shrew.scan.diff import Diff
from shrew.scan.functions import LANGUAGES
from shrew.scan.judge import BUILT_IN, Judge
from shrew.scan.pipeline import Matcher, Scan, by_file
from shrew.scan.sources import Walk, language_of, root_of
from shrew.spec import Parser, parse_bytes

if TYPE_CHECKING:
    from shrew.scan.baseline import Known
    from shrew.scan.cache import Cache
    from shrew.scan.pool import Pool
    from shrew.scan.rules import Finding

__all__ = ["Alert", "Report", "ScanSpec", "main", "scan"]

LARGEST = 1 << 28  # bytes of a file, whatever --max-file-size says: offsets of a tree have 32 bits
PATIENCE = 2.0  # seconds before progress is shown
REFRESH = 0.5
ENDINGS = {".sarif": ["sarif"], ".json": ["json", "sarif", "gitlab"], ".html": ["html"], ".htm": ["html"]}


def main(argv: list[str]) -> int:
    parser = Parser("shrew scan", description="Find functions that may be vulnerable.")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files and folders; with --diff: this folder")
    config.add_flags(parser)
    args = parser.parse_args(argv)
    paths = args.paths or (["."] if args.diff is not None else [])
    if not paths:
        raise UsageError("there is nothing to scan; give files or folders: shrew scan src, or --diff REV.")
    if "" in paths:
        raise UsageError("a path is empty, perhaps that of a variable that is not set; name this folder as '.'.")
    root = root_of(paths)
    spec = config.from_flags(args, root)
    if spec.diff is not None and spec.write_baseline:
        raise UsageError("--write-baseline would make known only what --diff looked at, and the next whole scan would "
                         "tell all else as new; write it without --diff.")  # fmt: skip
    for flag, name in (("--out", spec.out), ("--write-baseline", spec.write_baseline)):
        if name is not None and Path(name).is_dir():
            raise UsageError(f"{flag}: '{name}' is a folder; name a file in it.")
        if name is not None and language_of(name) and Path(name).exists():
            raise UsageError(f"{flag}: '{name}' is a file with code, which would be written over; give another name.")
        if name is not None:
            files.check_apart(Path(name), paths)
    wanted = ENDINGS.get(Path(spec.out or "").suffix.lower())
    if wanted and spec.format not in wanted:
        raise UsageError(f"--out: '{spec.out}' is named like another format than {spec.format}; add --format "
                         f"{wanted[0]}, or end the name in another way.")  # fmt: skip
    report = scan(paths, spec, root, say=_say)
    if spec.write_baseline:
        from shrew.scan import baseline

        baseline.write(Path(spec.write_baseline), report)
        _say(f"wrote {spec.write_baseline}: what is in it is known from now on (--baseline {spec.write_baseline}).")
    _give(report, spec)
    return 0 if spec.write_baseline else gate(report, spec.fail_on)


def gate(report: Report, fail_on: str) -> int:
    """The exit code: 1 where an alert is as severe as asked."""
    order = ("any", "low", "medium", "high", "none")
    return int(any(order.index(alert.severity) >= order.index(fail_on) for alert in report.alerts))


def scan(
    paths: Sequence[str],
    spec: ScanSpec | None = None,
    root: str | None = None,
    judge: Judge | None = None,
    rules: Matcher | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Scan files and folders. `root`: what names in the report are relative to. `judge` and `rules` stand in for those
    that the spec names. Raises UsageError for what the spec says wrong; files that cannot be scanned are in the report.
    """
    spec = spec or ScanSpec()
    paths = list(paths)
    root = root_of(paths) if root is None else root
    limit = min(parse_bytes(spec.max_file_size), LARGEST)
    notes: list[str] = []
    own = judge is None and rules is None  # workers cannot be given others
    if judge is None:
        judge = Judge(_folder(spec.detector), spec.jobs)
        if not judge.has_model:
            notes.append("no detector: rules alone.")
    if rules is None:
        from shrew.scan.rules import load_rules

        rules = load_rules([Path(name) for name in spec.rules])
    known = _baseline(spec)
    with ExitStack() as stack:
        diff = stack.enter_context(Diff(root, spec.diff)) if spec.diff is not None else None
        cache = _cache(spec, judge, rules, say)
        stack.callback(cache.close)  # Ctrl-C too: what was learnt stays
        walk = _walk(paths, root, spec)
        progress = stack.enter_context(_Progress(lambda: _walk(paths, root, spec)))
        external = _external(spec, root, notes.append)
        pool = (lambda: _pool(spec, stack)) if own and spec.jobs != 1 else None
        report = Scan(spec, walk, limit, judge, rules, cache, external, diff, pool, progress).run()
    report = replace(report, notes=[*notes, *report.notes])
    if known is not None:
        from shrew.scan import baseline

        report = baseline.apply(report, known)
    return report


def _pool(spec: ScanSpec, stack: ExitStack) -> "Pool | None":
    """Workers that are closed with the scan; None where one process is all there can be."""
    from shrew import machine
    from shrew.scan import pool

    jobs = spec.jobs or machine.usable_cores()
    if jobs == 1 or not pool.possible():
        return None
    made = pool.Pool(jobs, spec.rules, _folder(spec.detector))
    stack.callback(made.close)
    return made


def _walk(paths: list[str], root: str, spec: ScanSpec) -> Walk:
    return Walk(paths, root, spec.exclude, spec.include_tests, spec.include_vendored, spec.force_exclude)


def _folder(name: str | None) -> Path | None:
    """Where a detector is: `config.SHIPPED` are names, all else is a path; None: rules alone."""
    if name == "none":
        return None
    if name is None:
        return BUILT_IN if (BUILT_IN / "scan.json").is_file() else None
    path = Path(name)
    if name in config.SHIPPED:
        if (path / "scan.json").exists():
            raise UsageError(f"--detector: '{name}' is the name of a detector that ships, and there is a folder of one "
                             f"here that is called so; write ./{name} for the folder.")  # fmt: skip
        return BUILT_IN.with_name(f"{BUILT_IN.name}-{name}")
    if name == path.name and not path.exists():
        known = nearest(name, (*config.SHIPPED, "none"))
        raise UsageError(f"--detector: there is no folder '{name}', and no such detector ships; {known}")
    return path


def _baseline(spec: ScanSpec) -> "list[Known] | None":
    if spec.baseline is None:
        return None
    from shrew.scan import baseline

    return baseline.read(Path(spec.baseline))


def _external(
    spec: ScanSpec, root: str, say: Callable[[str], None]
) -> "dict[str, list[Finding]]":
    if not spec.findings:
        return {}
    from shrew.scan.others import read_findings

    return by_file([item for name in spec.findings for item in read_findings(Path(name), say)], root)


def _cache(spec: ScanSpec, judge: Judge, rules: Matcher, say: Callable[[str], None]) -> "Cache":
    from shrew.scan.cache import Cache

    if not spec.cache:
        return Cache(None, "", say)
    return Cache(files.cache_folder() / "scan", "\n".join([judge.ident, *_engine(spec.rules)]), say)


def _engine(rules: Sequence[str]) -> Iterator[str]:
    """What results depend on beside the detector: our code and rules, the rules given, the parsers."""
    own = Path(__file__).parent
    for path in [*sorted(own.rglob("*.py")), *sorted(own.rglob("*.toml")), *map(Path, rules)]:
        yield files.sha256(path)
    for name in ["tree-sitter", *(f"tree-sitter-{language}" for language in LANGUAGES)]:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield importlib.metadata.version(name)


def _give(report: Report, spec: ScanSpec) -> None:
    """Print the report, or write it and print the summary."""
    from shrew.scan import show

    if isinstance(sys.stdout, io.TextIOWrapper):  # of a pipe or an old terminal that has no signs but those of its
        sys.stdout.reconfigure(errors="backslashreplace")  # code page; a page's charset is ours
        if spec.format == "html" and not spec.out:
            sys.stdout.reconfigure(encoding="utf-8")
    if spec.format == "text" and not spec.out:
        show.show(report, spec.explain)
        return
    if spec.format == "html":
        from shrew.scan.page import page

        text = page(report)
    elif spec.format in ("sarif", "gitlab"):
        from shrew.scan import sarif

        text = sarif.sarif(report) if spec.format == "sarif" else sarif.code_quality(report)
    else:
        text = show.text(report, spec.explain) if spec.format == "text" else show.to_json(report)
    if not spec.out:
        sys.stdout.write(text)
        return
    files.write_text(Path(spec.out), text)
    print(show.summary(report))
    print(f"wrote {spec.out}")


def _say(line: str) -> None:
    print(f"shrew: {words.plain(line)}", file=sys.stderr, flush=True)


class _Progress:
    """A line in the terminal with the time that is left, for scans that take long; nothing where there is none."""

    def __init__(self, again: Callable[[], Walk]) -> None:
        self._again = again
        self._on = sys.stderr.isatty()
        self._began = self._next = time.monotonic()
        self._next += PATIENCE
        self._total: int | None = None
        self._shown = False

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, done: int, functions: int) -> None:
        now = time.monotonic()
        if not self._on or now < self._next:
            return
        if self._total is None:
            self._total = sum(1 for _ in self._again())  # names alone: a moment, beside what it counts
        left = (now - self._began) * (self._total - done) / max(done, 1)
        told = f"{done:,} of {self._total:,} files, {functions:,} functions, {words.duration(left)} left"
        sys.stderr.write(f"\r\x1b[K{told}")
        sys.stderr.flush()
        self._shown, self._next = True, time.monotonic() + REFRESH
