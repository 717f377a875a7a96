"""Which functions a change touched: those whose text is in no function of the same file at a git revision.

Git is asked for object names and old contents alone, and runs nothing that a repository configures: no hook, filter,
pager, diff driver, file-system monitor or fetch. What a file holds now is read by ourselves.
"""

import hashlib
import os
import subprocess
from pathlib import Path
from types import TracebackType

from shrew.errors import UsageError
from shrew.scan.functions import MODULE, Source, functions, module
from shrew.scan.sources import decode

__all__ = ["Diff", "bare", "texts"]

_QUIET = ("git", "--no-pager", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
_ALONE = {  # no fetching of missing objects, by any protocol, and no question at the terminal
    "GIT_ALLOW_PROTOCOL": "",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
}


class Diff:
    """The files below a folder at revision `rev`, to compare with what they are now. Use it in `with`.

    Raises UsageError where git, the repository or the revision is not there.
    """

    def __init__(self, root: str, rev: str) -> None:
        self._root = os.path.realpath(root)
        self._top = self._git("rev-parse", "--show-toplevel").decode("utf-8", "surrogateescape").rstrip("\n")
        commit = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}", rev=rev)
        listed = self._git("ls-tree", "-r", "-z", "--full-tree", commit.decode().strip())
        self._old: dict[bytes, bytes] = {}
        for line in listed.split(b"\0"):
            about, tab, path = line.partition(b"\t")
            mode, _, name = about.partition(b" ")
            if tab and mode.startswith(b"100"):
                self._old[path] = name.rpartition(b" ")[2]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Diff":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()

    def _command(self, *words: str) -> list[str]:
        return [*_QUIET, "-C", self._root, *words]

    def _git(self, *words: str, rev: str | None = None) -> bytes:
        try:
            done = subprocess.run(
                self._command(*words),
                capture_output=True, stdin=subprocess.DEVNULL, env=os.environ | _ALONE, check=False,
            )  # fmt: skip
        except FileNotFoundError:
            raise UsageError("--diff needs git, which is not installed or not on PATH.") from None
        except ValueError:
            raise UsageError(f"{rev!r} is no revision.") from None
        if done.returncode:
            why = " ".join(done.stderr.decode("utf-8", "replace").split()).removeprefix("fatal: ").partition(" To ")[0]
            if rev is not None:
                raise UsageError(f"--diff: git knows no revision '{rev}' here; give a branch, tag or commit.")
            raise UsageError(f"--diff: {why or 'git failed'}; run it inside a git repository.")
        return done.stdout

    def same(self, path: str, data: bytes) -> bool:
        """Whether a file was at the revision what it is now."""
        blob = self._at(path)
        hasher = hashlib.sha256 if blob is not None and len(blob) == 64 else hashlib.sha1
        return hasher(b"blob %d\0" % len(data) + data).hexdigest().encode() == blob

    def old(self, path: str) -> bytes | None:
        """The content of a file at the revision, None where there was none."""
        blob = self._at(path)
        return None if blob is None else self._blob(blob)

    def _at(self, path: str) -> bytes | None:
        real = Path(path).parent.resolve() / Path(path).name
        name = os.path.relpath(real, self._top).replace(os.sep, "/").encode("utf-8", "surrogateescape")
        return self._old.get(name)

    def _blob(self, name: bytes) -> bytes | None:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command("cat-file", "--batch"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | _ALONE,
            )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(name + b"\n")
            self._process.stdin.flush()
            head = self._process.stdout.readline().split()
            if len(head) != 3 or head[1] != b"blob":
                return None  # an object that was never fetched: as if the file were new
            content = self._process.stdout.read(int(head[2]))
            self._process.stdout.readline()
        except BrokenPipeError:
            return None
        return content


def texts(old: bytes, language: str) -> set[str]:
    """The texts (`bare`) of an old content's functions and of the code outside. Raises DataError for what cannot be
    read."""
    text, _ = decode(old)
    source = Source("", language, text.encode(), text)
    found = [each for each in functions(source) if each.name != MODULE]
    rest = module(source, found)
    return {bare(each.text) for each in [*found, *([rest] if rest else [])]}


def bare(text: str) -> str:
    """A text without blank lines: functions that grow move what stands outside of them."""
    return "\n".join(line for line in text.split("\n") if line.strip())
