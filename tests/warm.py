"""A process that has imported torch and transformers once, and forks for every `shrew` and `python` that is started
through its shims. Nothing of Shrew is imported before the fork: a script that forgets to import it fails here too."""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

LOADED = ("torch", "transformers", "transformers.generation", "transformers.models.llama.modeling_llama")
# It hands its streams over and ends as the child did.
SHIM = """#!{python} -IS
import json, os, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
known = words[:1] in (["-"], ["-c"]) or words[:2] == ["-m", "shrew"] or "".join(words[:1]).endswith(".py")
if name == "python" and not known:
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    socket.send_fds(door, [json.dumps([name, words, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    door.shutdown(socket.SHUT_WR)
    sys.exit(int(door.recv(16)))
"""


@contextmanager
def shims(place: Path) -> Iterator[Path]:
    """`place` with a `shrew` and a `python` in it, for as long as the warm process behind them lives."""
    from shrew.__main__ import ENVIRONMENT

    door = place / "door"
    for name in ("shrew", "python"):
        (place / name).write_text(SHIM.format(python=sys.executable, door=str(door)), "utf-8")
        (place / name).chmod(0o755)
    command = [sys.executable, __file__, str(door)]
    early = ENVIRONMENT | os.environ  # libraries read it when they are imported
    with subprocess.Popen(command, env=early, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield place
        process.stdin.close()


def main(place: str) -> None:
    """Wait for shims until standard input ends."""
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what a child does not touch is not copied for it
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen()
        print("ready", flush=True)
        while door in select.select([door, sys.stdin], [], [])[0]:
            asked, _ = door.accept()
            if os.fork() == 0:
                door.close()
                answer(asked, str(Path(place).with_name("python")))
            asked.close()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def answer(asked: socket.socket, python: str) -> NoReturn:
    """Run what a shim asks for in a child of this one, and tell how it ended."""
    message, streams, *_ = socket.recv_fds(asked, 1 << 16, 3)
    while part := asked.recv(1 << 16):
        message += part
    child = os.fork()
    if child == 0:
        asked.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.executable = python  # what a command starts is warm too, but for workers of multiprocessing
        os.sched_getaffinity = lambda _: {0}  # one of two test processes has one core
        end(*json.loads(message))
    for stream in streams:
        os.close(stream)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    asked.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def end(*asked: Any) -> NoReturn:
    """Run and exit as the interpreter does, without its taking torch apart, which takes longer than most commands."""
    try:
        code = run(*asked)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(name: str, words: list[str], folder: str, environment: dict[str, str]) -> int:
    """`shrew WORDS`, `python -m shrew WORDS`, `-c SCRIPT WORDS`, `FILE.py WORDS`, or `-` with the script as input."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if name == "shrew" or words[0] == "-m":
        from shrew.__main__ import main as shrew

        sys.argv = ["shrew", *(words if name == "shrew" else words[2:])]
        return shrew()
    if words[0].endswith(".py"):
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        return 0
    script, sys.argv = (sys.stdin.read(), words) if words[0] == "-" else (words[1], ["-c", *words[2:]])
    sys.path[0] = ""
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
