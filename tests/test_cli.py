"""The command line, the machine probes, and what `import shrew` gives."""

import errno
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import shrew
from shrew import __main__ as cli
from shrew import errors, machine

Run = Callable[[Callable[[list[str]], int]], int]


def _shrew(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shrew", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `shrew report out` with the given function as that verb."""
    monkeypatch.setattr(os, "environ", os.environ.copy())  # main() fills in defaults

    def with_verb(verb: Callable[[list[str]], int]) -> int:
        fake = types.ModuleType("shrew.report")
        fake.main = verb  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shrew.report", fake)
        return cli.main(["report", "out"])

    return with_verb


def _raise(error: BaseException) -> Callable[[list[str]], int]:
    def verb(arguments: list[str]) -> int:
        raise error

    return verb


def test_help_names_every_verb_and_version_says_which() -> None:
    done = _shrew("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"  {verb} " in done.stdout and line in done.stdout for verb, (_, line) in cli.VERBS.items())
    assert "\x1b" not in done.stdout
    assert _shrew("--version").stdout == f"shrew {shrew.__version__}\n"
    nothing = _shrew()
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "usage" in nothing.stderr


def test_an_unknown_verb_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shrnik"]) == 2
    assert capsys.readouterr().err == "shrew: unknown verb 'shrnik'; did you mean 'shrink'?\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_verb_gets_its_arguments_and_gives_the_exit_code(run: Run, code: int) -> None:
    seen = []

    def verb(arguments: list[str]) -> int:
        seen.append(arguments)
        return code

    assert run(verb) == code
    assert seen == [["out"]]


@pytest.mark.parametrize(("end", "code"), [(None, 0), (0, 0), (2, 2), ("words", 2)])
def test_an_argument_parser_that_exits_is_heard(run: Run, end: object, code: int) -> None:
    assert run(_raise(SystemExit(end))) == code


class SafetensorError(Exception):
    """As safetensors names its own."""


FAILURES = {
    "floor": (errors.FloorNotMet("no model reached 0.98; the nearest kept 0.97."), 1, "nearest kept 0.97"),
    "usage": (errors.FolderError("x is no model folder; give one."), 2, "x is no model folder"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "out/a"), 2, "the disk is full (out/a)"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full"),
    "full, safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "the disk is full"),
    "full, torch": (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), 2, "the disk is full"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out cannot be read or written"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "out"), 2, "out cannot be read or written"),
    "missing file": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "'a.txt'"),
    "other system error": (OSError("a long\nmessage"), 1, "a long message; set SHREW_DEBUG=1"),
    "memory": (MemoryError(), 1, "not enough memory"),
    "memory, torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
    "torch": (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'shrew[torch]'"),
    "transformers": (ModuleNotFoundError("x", name="transformers.models"), 2, "pip install 'shrew[torch]'"),
    "datasets": (ModuleNotFoundError("x", name="datasets"), 2, "pip install 'shrew[data]'"),
    "pyarrow": (ModuleNotFoundError("x", name="pyarrow"), 2, "pip install 'shrew[data]'"),
    "compressed": (ModuleNotFoundError("x", name="compressed_tensors"), 2, "pip install 'shrew[compressed]'"),
    "interrupt": (KeyboardInterrupt(), 130, "stopped; run the same command again to go on"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_sentence(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    error, code, words = FAILURES[name]
    assert run(_raise(error)) == code
    said = capsys.readouterr().err
    assert said.startswith("shrew: ")
    assert words in said
    assert said.count("\n") == 1


def test_a_missing_torch_says_how_to_get_a_small_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_raise(ModuleNotFoundError("x", name="torch"))) == 2
    assert "--index-url https://download.pytorch.org/whl/cpu" in capsys.readouterr().err


def test_a_really_full_disk_is_one_sentence(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(arguments: list[str]) -> int:
        with Path("/dev/full").open("w") as stream:
            stream.write("x" * 10**6)
        return 0

    assert run(verb) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback_and_debug_shows_every_one(run: Run) -> None:
    for error in (ValueError("a bug"), ModuleNotFoundError("x", name="shrew.nowhere")):
        with pytest.raises(type(error)):
            run(_raise(error))
    os.environ["SHREW_DEBUG"] = "1"
    with pytest.raises(errors.FolderError):
        run(_raise(errors.FolderError("x")))


def test_termination_is_like_an_interrupt_and_the_handler_is_put_back(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def verb(arguments: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        return 0

    assert run(verb) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "shrew", "--help"], stdout=write, stderr=subprocess.PIPE, check=False, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_environment_is_set_for_verbs_but_the_users_wins(run: Run) -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    os.environ.pop("GOMP_SPINCOUNT", None)
    assert run(lambda arguments: 0) == 0
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_threads_as_asked_and_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        assert machine.choose_threads(2) == machine.Threads(2, "2 threads, as asked")
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert machine.choose_threads() == machine.Threads(2, "2 threads, as OMP_NUM_THREADS says")
    finally:
        torch.set_num_threads(before)
    with pytest.raises(errors.UsageError, match="ask for 1 to 1024"):
        machine.choose_threads(0)


@pytest.mark.parametrize(
    ("seconds", "choice"),
    [
        ([1.0, 0.5], machine.Threads(3, "3 threads: 2.0 times as fast as 1")),
        ([0.1, 4.0], machine.Threads(1, "1 thread: 40.0 times as fast as 3")),
    ],
)
def test_the_faster_thread_count_is_kept_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: list[float], choice: machine.Threads
) -> None:
    import torch

    before, probes = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "usable_cores", lambda: 3)
    monkeypatch.setattr(machine, "_step_times", lambda counts: probes.append(counts) or seconds)
    try:
        assert [machine.choose_threads(), machine.choose_threads()] == [choice, choice]
        assert probes == [[1, 3]]
        path = tmp_path / "machine.json"
        known = json.loads(path.read_text())
        for item in known.values():
            item["time"] -= 2 * machine.DAY
        path.write_text(json.dumps(known))
        machine.choose_threads()
        assert len(probes) == 2, "a measurement older than a day is taken again"
        path.write_text("{half")
        assert machine.choose_threads() == choice
    finally:
        torch.set_num_threads(before)


def test_the_probes_measure_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(machine, "ROUND_SECONDS", 0.01)
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path))
    before = torch.get_num_threads()
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
    assert all(0 < seconds < 10 for seconds in machine._step_times([1, 2]))
    assert torch.get_num_threads() == before
    assert 1e8 < machine.matmul_rate(torch.float32, 256) < 1e15
    assert machine.choose_precision() == machine.choose_precision()
    assert machine.choose_precision().name in ("fp32", "bf16")
    assert machine.choose_precision("bf16") == machine.Precision("bf16", "bf16, as asked")
    with pytest.raises(errors.UsageError, match="did you mean 'fp32'"):
        machine.choose_precision("fp23")


MAPPED = """
import ctypes, sys
from shrew import machine
if sys.argv[1] == "keep":
    machine.keep_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
import resource
for _ in range(4):
    block = c.malloc(1 << 27)
    c.memset(block, 1, 1 << 27)
    c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such setting")
def test_kept_memory_is_not_mapped_anew() -> None:
    faults = [int(subprocess.check_output([sys.executable, "-c", MAPPED, kind])) for kind in ("keep", "plain")]
    assert faults[0] + 2.5 * 2**27 / os.sysconf("SC_PAGE_SIZE") < faults[1]


FREED = """
import ctypes
from pathlib import Path
from shrew import machine
def pages():
    return int(Path("/proc/self/statm").read_text("ascii").split()[1])
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
blocks = [c.malloc(100_000) for _ in range(1000)]
for block in blocks:
    c.memset(block, 1, 100_000)
for block in blocks[:-1]:
    c.free(block)
before = pages()
machine.release_memory()
print(before - pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such setting")
def test_released_memory_goes_back_though_a_block_behind_it_stays() -> None:
    released = int(subprocess.check_output([sys.executable, "-c", FREED]))
    assert released > 8e7 / os.sysconf("SC_PAGE_SIZE")


def test_one_seed_seeds_everything() -> None:
    import random

    import numpy
    import torch

    draws = []
    for _ in range(2):
        machine.set_seed(2**40 + 7)
        draws.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_every_public_name_resolves() -> None:
    assert all(getattr(shrew, name) is not None for name in shrew.__all__)
    assert dir(shrew) == shrew.__all__
    with pytest.raises(AttributeError, match="'lode'"):
        getattr(shrew, "lode")  # noqa: B009


# Stand-ins on a path of their own, so that what `import shrew` does to transformers is seen in a fresh interpreter
# without waiting for the real thing.
STAND_INS = """
import importlib.util, sys, types
calls = []
for name in ("shrew.folder", "shrew.folder.packed", "shrew.blocks", "shrew.blocks.detector"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["shrew.folder.packed"].register = lambda: calls.append("packed")
"""


@pytest.mark.parametrize(
    ("torch", "script", "printed"),
    [
        (True, "import shrew; assert 'transformers' not in sys.modules; import transformers", "['packed'] 7"),
        (True, "import shrew; importlib.util.find_spec('transformers'); import transformers.inner", "['packed'] 7"),
        (True, "import transformers; assert calls == []; import shrew", "['packed'] 7"),
        (False, "import shrew; import transformers", "[] 7"),
        (True, "import shrew; transformers = types.SimpleNamespace(value=7)", "[] 7"),
    ],
)
def test_transformers_is_taught_once_when_it_is_imported(
    tmp_path: Path, torch: bool, script: str, printed: str
) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("value = 7\n")
    (tmp_path / "transformers" / "inner.py").write_text("")
    if torch:
        (tmp_path / "torch.py").write_text("")
    script = f"{STAND_INS}\nsys.path.insert(0, {str(tmp_path)!r})\n{script}\nprint(calls, transformers.value)"
    # -S and the source folder alone: no site-packages, so the stand-ins are the only torch and transformers
    source = str(Path(shrew.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False, env={"PYTHONPATH": source}
    )
    assert (done.stdout, done.stderr) == (f"{printed}\n", "")


@pytest.mark.skipif(
    not all(importlib.util.find_spec("shrew.blocks") and importlib.util.find_spec(f"shrew.{name}")
            for name in ("folder.packed", "blocks.model")),
    reason="the shelves that register are not there",
)  # fmt: skip
@pytest.mark.parametrize("order", ["import shrew, transformers", "import transformers, shrew"])
def test_the_real_transformers_knows_shrew(order: str) -> None:
    script = (
        f"{order}\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print('shrew' in CONFIG_MAPPING, 'shrew' in AUTO_QUANTIZER_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True True\n", 0), done.stderr


def test_pack_does_not_overwrite_what_it_reads(
    tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file = tmp_path / "model", tmp_path / "model" / "model.gguf"
    shutil.copytree(tiny_llama_folder, model)
    assert cli.main(["pack", str(model), "--to", "gguf", "--out", str(file)]) == 0
    for mark in ("shrew.json", "pack.json", "web.json"):
        (model / mark).write_text("{}", "utf-8")
    before = sorted(item.name for item in model.iterdir())
    capsys.readouterr()
    for to, source in (("folder", file), ("onnx", model), ("web", model)):
        assert cli.main(["pack", str(source), "--to", to, "--out", str(model)]) == 2
        assert f"would replace {source}, which is read" in capsys.readouterr().err
    assert sorted(item.name for item in model.iterdir()) == before


def test_pack_overwrites_nothing_else_and_leaves_nothing_half_written(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shrew.packers.gguf import blocks

    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    assert cli.main(["pack", str(tiny_llama_folder), "--to", "gguf", "--out", str(tmp_path / "notes.txt")]) == 2
    assert cli.main(["pack", str(tiny_llama_folder), "--to", "gguf", "--out", str(tmp_path)]) == 2
    assert cli.main(["pack", str(tiny_llama_folder), "--to", "folder", "--out", str(tmp_path / "x")]) == 2
    assert cli.main(["pack", str(tmp_path / "notes.txt"), "--to", "folder", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("shrew: ") == 4

    def full(*_: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blocks, "floats", full)
    assert cli.main(["pack", str(tiny_llama_folder), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]) != 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["notes.txt"]
