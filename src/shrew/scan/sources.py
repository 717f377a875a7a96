"""The files of a scan: found without following links, read without trusting what is in them. Nothing is executed."""

import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shrew.errors import DataError, UsageError
from shrew.scan.functions import words

__all__ = ["Entry", "LeftOut", "Walk", "decode", "language_of", "read", "root_of", "shown"]

SUFFIXES = {
    **dict.fromkeys((".py", ".pyw"), "python"),
    **dict.fromkeys((".c", ".h"), "c"),
    **dict.fromkeys((".cc", ".cpp", ".cxx", ".c++", ".hh", ".hpp", ".hxx", ".h++", ".inl", ".ipp"), "cpp"),
    **dict.fromkeys((".js", ".cjs", ".mjs", ".jsx"), "javascript"),
    ".go": "go",
    **dict.fromkeys((".rb", ".rake", ".gemspec", ".ru"), "ruby"),
    ".java": "java",
}
NAMES = {"Rakefile": "ruby", "Gemfile": "ruby", "Vagrantfile": "ruby", "SConstruct": "python", "SConscript": "python"}
_SHEBANG = re.compile(rb"#![^\n]*?\b(python|pypy|node|nodejs|ruby|jruby)[\d.]*(?=\s|$)")
_SHEBANGS = {"python": "python", "pypy": "python", "node": "javascript", "nodejs": "javascript",
             "ruby": "ruby", "jruby": "ruby"}  # fmt: skip
_CPP_HEADER = re.compile(rb"^[ \t]*(?:class|namespace|template|using)\b|\bpublic:|\bstd::", re.M)

TEST_FOLDERS = words("test tests testing __tests__ __mocks__ spec specs testdata test_data fixtures testsuite")
TEST_FILES = re.compile(
    r"(test_.*|.*_tests?|conftest|tests?)\.py|.*_test\.(go|c|cc|cpp|cxx|rb)|test_.*\.(c|cc|cpp|rb)|.*_spec\.rb"
    r"|.*\.(test|spec)\.[cm]?jsx?|.*(Tests?|TestCase)\.java"
)
VENDORED_FOLDERS = words(
    "vendor vendored _vendor vendors third_party third-party thirdparty 3rdparty extern node_modules bower_components"
    " site-packages dist-packages venv .venv virtualenv .tox .nox .eggs"
)
VENDORED_FILES = re.compile(r".*[.-]min\.[cm]?js|.*_pb2(_grpc)?\.py|.*\.pb\.(go|cc|h)")
NEVER = words(".git .hg .svn .bzr __pycache__ .mypy_cache .ruff_cache .pytest_cache .hypothesis")

# Bytes that text does not have; tab, line ends, form feed and escape are left in.
_CONTROL = bytes([*range(9), 11, *range(14, 27), *range(28, 32)])
BINARY_SHARE = 0.02
FEW_CONTROL = 8  # whose share of a small file says nothing
UTF_32, UTF_16 = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"), (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file to scan. `path` opens it, `shown` is its name in every output. `stamp` changes when it is written to:
    size, time of change and of its inode's in nanoseconds, inode. `language` "" means that the first line says it."""

    path: str
    shown: str
    language: str
    stamp: tuple[int, int, int, int]


@dataclass
class LeftOut:
    """How many files and folders were not looked into."""

    tests: int = 0
    vendored: int = 0
    chosen: int = 0  # by --exclude


@dataclass
class Walk:
    """The files below `paths`, each once, in an order that depends on names alone.

    What cannot be entered or read is told to `skip(shown, why)`. Memory grows with the widest folder, not with the
    tree. Folders and files named in `paths` are scanned whatever they are called; with `force` only if a walk of the
    root would come to them.
    """

    paths: list[str]
    root: str
    exclude: list[str] = field(default_factory=list)
    tests: bool = False
    vendored: bool = False
    force: bool = False
    skip: Callable[[str, str], None] = lambda shown, why: None
    left_out: LeftOut = field(default_factory=LeftOut)

    def __post_init__(self) -> None:
        globs = filter(None, (glob.strip().removeprefix("./").rstrip("/") for glob in self.exclude))
        excluded = "|".join(map(fnmatch.translate, globs))
        self._excluded = re.compile(excluded) if excluded else None

    def __iter__(self) -> Iterator[Entry]:
        seen: set[str] = set()  # only where one path may lie in another
        for path in self.paths:
            for entry in self._below(os.path.abspath(path)):  # noqa: PTH100 (resolve() would follow links)
                if len(self.paths) > 1:
                    if entry.path in seen:
                        continue
                    seen.add(entry.path)
                yield entry

    def _below(self, top: str) -> Iterator[Entry]:
        try:
            status = os.stat(top)  # noqa: PTH116 (a path given by hand may be a link)
        except OSError as error:
            raise UsageError(f"{top} cannot be scanned ({error.strerror}); give a folder or a file.") from None
        if self.force and not self._reached(top, stat.S_ISDIR(status.st_mode)):
            return
        if not stat.S_ISDIR(status.st_mode):
            yield from self._file(top, os.path.basename(top), status, named=True)  # noqa: PTH119
            return
        stack = [top]
        while stack:
            folder = stack.pop()
            try:
                with os.scandir(folder) as items:
                    found = sorted(items, key=lambda item: item.name)
            except OSError as error:
                self.skip(shown(folder, self.root), f"cannot be entered ({error.strerror})")
                continue
            if folder != top and not self.vendored and any(item.name == "pyvenv.cfg" for item in found):
                self.left_out.vendored += 1
                continue
            folders = []
            for item in found:
                try:
                    if item.is_symlink():
                        self._link(item.path)
                    elif item.is_dir(follow_symlinks=False):
                        if self._wanted(item.path, item.name, folder=True):
                            folders.append(item.path)
                    elif _may_be_code(item.name):
                        yield from self._file(item.path, item.name, item.stat(follow_symlinks=False))
                except OSError as error:
                    self.skip(shown(item.path, self.root), f"cannot be read ({error.strerror})")
            stack += reversed(folders)

    def _reached(self, top: str, folder: bool) -> bool:
        """Whether nothing on the way from the root to a path that is named is left out."""
        path, names = self.root, Path(os.path.relpath(top, self.root)).parts
        for at, name in enumerate(names, 1):
            path = os.path.join(path, name)  # noqa: PTH118
            inside = folder or at < len(names)
            if not self._wanted(path, name, inside):
                return False
            if inside and not self.vendored and os.path.exists(os.path.join(path, "pyvenv.cfg")):  # noqa: PTH110, PTH118
                self.left_out.vendored += 1
                return False
        return True

    def _link(self, path: str) -> None:
        """Links are not followed: what they lead to inside the tree is scanned in its own place. The rest is told."""
        target = os.path.realpath(path)
        folder = os.path.isdir(target)  # noqa: PTH112
        if not (folder or language_of(path)):
            if not os.path.exists(target) and _may_be_code(os.path.basename(path)):  # noqa: PTH110, PTH119
                self.skip(shown(path, self.root), "a link that leads nowhere or in a circle")
        elif not os.path.lexists(target) or os.path.islink(target):  # noqa: PTH114
            self.skip(shown(path, self.root), "a link that leads nowhere or in a circle")
        elif not _within(target, os.path.realpath(self.root)):
            self.skip(shown(path, self.root), "a link out of the tree")
        elif folder and _within(path, target):
            self.skip(shown(path, self.root), "a link to a folder that it is in")

    def _wanted(self, path: str, name: str, folder: bool) -> bool:
        if name in NEVER:
            return False
        if self._excluded and (self._excluded.match(shown(path, self.root)) or self._excluded.match(name)):
            self.left_out.chosen += 1
            return False
        if not self.tests and (name.lower() in TEST_FOLDERS if folder else TEST_FILES.fullmatch(name)):
            self.left_out.tests += 1
            return False
        if not self.vendored and (name.lower() in VENDORED_FOLDERS if folder else VENDORED_FILES.fullmatch(name)):
            self.left_out.vendored += 1
            return False
        return True

    def _file(self, path: str, name: str, status: os.stat_result, named: bool = False) -> Iterator[Entry]:
        language = language_of(name)
        where = shown(path, self.root)
        if not language and not named and not status.st_mode & 0o111:
            return  # whoever may not run it need not ask the first line
        if not named and not self._wanted(path, name, folder=False):
            return
        if not stat.S_ISREG(status.st_mode):
            self.skip(where, "no regular file")
            return
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        yield Entry(path, where, language, stamp)


def _may_be_code(name: str) -> bool:
    """Whether a name has an ending that we know, or none (then its first line may say more)."""
    return "." not in name.lstrip(".") or bool(language_of(name))


def language_of(name: str) -> str:
    """The language that a file's name says, "" if none."""
    name = os.path.basename(name)  # noqa: PTH119
    return NAMES.get(name) or SUFFIXES.get(os.path.splitext(name)[1].lower(), "")  # noqa: PTH122


def root_of(paths: list[str]) -> str:
    """What the names in every output are relative to: this folder where all lies in it, else what they share."""
    here = os.getcwd()  # noqa: PTH109
    full = [os.path.abspath(path) for path in paths]  # noqa: PTH100
    if all(_within(path, here) for path in full):
        return here
    return os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in full])  # noqa: PTH112, PTH120


def shown(path: str, root: str) -> str:
    """The name of a file in outputs: relative to the root, with / between."""
    name = os.path.relpath(path, root) if not path.startswith(root + os.sep) else path[len(root) + 1 :]
    return Path(name).as_posix()


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def read(entry: Entry, limit: int) -> tuple[bytes, str]:
    """The bytes of a file and its language ("": none that is scanned). Raises DataError: why it is not scanned."""
    try:
        # a pipe that took the file's place would block for ever
        handle = os.open(entry.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError("no regular file")
            if not entry.language and not _SHEBANG.match(head := stream.read(200)):
                return head, ""
            stream.seek(0)
            data = stream.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None
    except MemoryError:
        raise DataError("too large for the memory of this machine") from None
    if len(data) > limit:
        raise DataError(f"larger than {limit:,} bytes (--max-file-size)")
    match = None if entry.language else _SHEBANG.match(data)
    language = _SHEBANGS[match[1].decode()] if match else entry.language
    if language == "c" and entry.path.endswith((".h", ".H")) and _CPP_HEADER.search(data):
        language = "cpp"
    return data, language


def decode(data: bytes) -> tuple[str, str]:
    """The text of a file, and what was odd about it ("": nothing). Raises DataError for what is no text."""
    for marks, encoding in ((UTF_32, "utf-32"), (UTF_16, "utf-16")):
        if data.startswith(marks):
            try:
                return data.decode(encoding).replace("\0", " "), f"read as {encoding.upper()}"
            except UnicodeDecodeError:
                break
    odd = ""
    control = len(data) - len(data.translate(None, _CONTROL))
    if control > max(FEW_CONTROL, BINARY_SHARE * len(data)):
        raise DataError("a binary file")
    if control and b"\0" in data:
        data, odd = data.replace(b"\0", b" "), "null bytes in it, read as blanks"
    try:
        return data.decode("utf-8-sig"), odd
    except UnicodeDecodeError:
        return data.decode("latin-1"), ", ".join(filter(None, [odd, "not UTF-8, read as Latin-1"]))
