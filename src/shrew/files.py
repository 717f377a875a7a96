"""Writing without ever leaving half a file (temporary name, fsync, rename), and reading without ever waiting or growing
without end."""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shrew.errors import DataError, UsageError


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file that replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step; on any failure the old file is untouched."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def read_whole(path: Path, limit: int, more: str, error: type[UsageError] = DataError) -> bytes:
    """The bytes of a regular file of at most `limit`; else `error`, with what to do (`more`) where it is larger.
    OSError for what cannot be opened. A device would be read without end, and a pipe that nobody writes to would block.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is no regular file, but a device or a pipe; write what it gives to a file first.")
        content = b"" if status.st_size > limit else stream.read(limit + 1)
    if max(status.st_size, len(content)) > limit:
        raise error(f"{path} is larger than {limit >> 20} MB; {more}.")
    return content


def check_writable_target(path: Path, mark: str) -> None:
    """Refuse early to replace a folder that is not ours: one that holds things but not the file `mark`."""
    if path.is_dir() and not (path / mark).exists() and any(path.iterdir()):
        raise UsageError(f"{path} holds other things (no {mark}); choose a new or empty output folder.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; choose another output folder.")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file; choose another output folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{parent} cannot be written to; choose another output folder.")


def check_apart(out: Path, read: Iterable[str | Path]) -> None:
    """Refuse early to write where something that is read lies: `out` is replaced as a whole, with all that it holds.
    Names in `read` that are no paths, and empty ones, do no harm."""
    for source in filter(None, map(str, read)) if out.exists() else ():
        place = Path(os.path.realpath(os.path.expanduser(source)))  # noqa: PTH111 - any text is a name here
        if any(os.path.exists(path) and out.samefile(path) for path in (place, *place.parents)):  # noqa: PTH110
            raise UsageError(f"writing {out} would replace {source}, which is read; choose another output.")


@contextmanager
def new_folder(path: Path, mark: str, same: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error.

    An existing `path` is replaced only if it holds the file `mark`, as everything written here does. With `same`, for
    folders named after a hash of their content, one that another process wrote meanwhile is left as it is.
    """
    path = path.resolve()
    check_writable_target(path, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for item in temporary.rglob("*"):
            if item.is_file():
                item.chmod(0o644)  # safetensors writes for its owner alone
                with item.open("rb") as stream:
                    os.fsync(stream.fileno())
            else:
                sync_folder(item)
        sync_folder(temporary)
        temporary.chmod(0o755)
        if same:
            try:
                temporary.replace(path)
            except OSError:
                if not (path / mark).exists():
                    raise
        elif path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            old = aside / path.name
            try:
                path.replace(old)
                temporary.replace(path)
            finally:
                if not path.exists():
                    old.replace(path)
                shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where intermediate results live: `$SHREW_CACHE`, else `$XDG_CACHE_HOME/shrew`, else `~/.cache/shrew`."""
    if chosen := os.environ.get("SHREW_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shrew"


def copy_folder(source: Path, target: Path, mark: str) -> None:
    """Copy a flat folder to `target` in one step; see `new_folder`."""
    with new_folder(target, mark) as temporary:
        for item in source.iterdir():
            shutil.copyfile(item, temporary / item.name)
