"""A packed folder is believed only as far as it was checked; and the runtime runs where there is no torch."""

import ctypes
import gzip
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import tiny_pack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shrew import machine
from shrew.errors import FolderError, UsageError
from shrew.runtime import Engine, Request, engine, load
from shrew.runtime.pack import PLAIN_ATTENTION
from shrew.runtime.server import Options, Served


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "sound"
    tiny_pack.write(folder)
    return folder


@pytest.fixture
def pack(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "pack"))


def manifest(pack: Path) -> Any:
    return json.loads((pack / "pack.json").read_text())


def change(pack: Path, **changes: Any) -> None:
    (pack / "pack.json").write_text(json.dumps(manifest(pack) | changes))


def test_what_is_loaded(sound: Path) -> None:
    model = load(str(sound), threads=1)
    assert (model.path, model.manifest.name, model.manifest.context, model.threads) == (sound, "tiny", 600, 1)
    assert [state.kind for state in model.manifest.states] == ["cache", "cache", "recurrent", "recurrent"]
    assert model.tokenizer.decode(model.tokenizer.encode("the inn é").ids) == "the inn é"


def state(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "k", "kind": "cache", "dtype": "float32", "shape": [1, "capacity", 16]} | changes]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "update Shrew"),
        ({"format": 0}, "format 0"),
        ({"format": "1"}, "format"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"vocabulary": 10**12}, "vocabulary"),
        ({"width": -4}, "width"),
        ({"context": -1}, "context"),
        ({"chunk": 0}, "chunk"),
        ({"align": -1}, "align"),
        ({"kind": "painter"}, "kind"),
        ({"eos": [264]}, "outside the vocabulary"),
        ({"pad": -1}, "pad"),
        ({"labels": ["a"]}, "labels"),
        ({"kind": "classifier"}, "labels"),
        ({"kind": "classifier", "labels": ["a"]}, "no states"),
        ({"states": state(shape=[1, "capacity", -16])}, "shape"),
        ({"states": state(shape=[1, 16])}, "no cache by its shape"),
        ({"states": state(kind="recurrent")}, "no recurrent by its shape"),
        ({"states": state(shape=["all", 16])}, "shape"),
        ({"states": state(shape=[1 << 20, "capacity", 1 << 20])}, "bytes a sequence"),
        ({"states": state() * 2}, "one name"),
        ({"states": state(dtype="float64")}, "dtype"),
        ({"states": []}, "graph takes other things"),
        ({"states": state()}, "graph takes other things"),
        ({"vocabulary": 265}, "graph gives logits"),
        ({"width": 33}, "graph gives hidden"),
        ({"files": {}}, "not listed"),
        ({"files": []}, "files"),
        ({"name": "a\x1b]0;b\x07"}, "cannot be shown"),
    ],
)
def test_a_manifest_that_makes_no_sense(pack: Path, changes: dict[str, Any], words: str) -> None:
    change(pack, **changes)
    with pytest.raises(FolderError, match=words):
        load(pack)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:x"])
def test_names_that_climb_out(pack: Path, name: str) -> None:
    found = manifest(pack)
    change(pack, files=found["files"] | {name: found["files"]["model.onnx"]})
    with pytest.raises(FolderError, match="no plain file name"):
        load(pack)


def test_weights_that_lie_elsewhere(pack: Path) -> None:
    """A graph whose weights are outside of the folder is not opened, even if all its hashes fit."""
    (pack.parent / "outside.bin").write_bytes((pack / "model.bin").read_bytes())
    graph = onnx.load(pack / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside.bin"
    (pack / "model.onnx").write_bytes(graph.SerializeToString())
    found = manifest(pack)
    del found["files"]
    tiny_pack.seal(pack, found)
    with pytest.raises(FolderError, match="cannot be loaded"):
        load(pack)


def test_files_that_are_not_listed_are_not_read(pack: Path) -> None:
    """No hash speaks for them."""
    before = load(pack, threads=1)
    other = json.loads(before.tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    (pack / "tokenizer.json.gz").write_bytes(gzip.compress(json.dumps(other).encode()))
    (pack / "model.coded").write_bytes(b"nothing")
    (pack / "chat_template.jinja").write_text("INJECTED")
    (pack / "tokenizer_config.json").write_text('{"bos_token": "INJECTED", "chat_template": "INJECTED"}')
    (pack / "additional_chat_templates").mkdir()
    (pack / "additional_chat_templates" / "tool_use.jinja").write_text("INJECTED")
    model = load(pack, threads=1)
    assert model.tokenizer.to_str() == before.tokenizer.to_str()
    served = Served("tiny", model, None, Options())
    assert served.template.plain and served.config == {} and served.special("bos_token") == "<bos>"
    found = manifest(pack)["files"]
    del found["model.bin"]
    change(pack, files=found)
    with pytest.raises(FolderError, match=r"'model\.bin' is not listed"):
        load(pack)


@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "tokenizer.json"])
def test_files_that_are_missing_short_or_changed(pack: Path, name: str) -> None:
    content = (pack / name).read_bytes()
    (pack / name).write_bytes(content[:-1])
    with pytest.raises(FolderError, match=f"{name} has .* bytes instead of"):
        load(pack)
    middle = len(content) // 2
    (pack / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(FolderError, match=f"{name} is not what was packed"):
        load(pack)
    (pack / name).unlink()
    with pytest.raises(FolderError, match=f"{name} is missing"):
        load(pack, verify=False)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_files_that_were_sealed_broken(pack: Path, name: str) -> None:
    (pack / name).write_bytes(b"nonsense")
    found = manifest(pack)
    del found["files"]
    tiny_pack.seal(pack, found)
    with pytest.raises(FolderError, match="cannot be loaded"):
        load(pack)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 1e400}', b"7"])
def test_a_manifest_that_is_none(pack: Path, content: bytes) -> None:
    (pack / "pack.json").write_bytes(content)
    with pytest.raises(FolderError):
        load(pack)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_in_a_sentence_or_harmless(sound: Path, tmp_path: Path, data: st.DataObject) -> None:
    found = manifest(sound)
    paths: list[Callable[[Any], None]] = []
    for key in found:
        paths.append(lambda value, key=key: found.__setitem__(key, value))
    for at in found["states"]:
        for key in at:
            paths.append(lambda value, at=at, key=key: at.__setitem__(key, value))
    for file in found["files"].values():
        for key in file:
            paths.append(lambda value, file=file, key=key: file.__setitem__(key, value))
    data.draw(st.sampled_from(paths))(data.draw(values))
    pack = tmp_path / "pack"
    shutil.rmtree(pack, ignore_errors=True)
    shutil.copytree(sound, pack)
    (pack / "pack.json").write_text(json.dumps(found))
    try:
        model = load(pack)
    except FolderError as error:
        assert len(str(error)) < 700
        return
    with Engine(model, slots=2) as engine:
        assert engine.submit(Request(prompt=[5, 6], max_tokens=3)).result().finish in ("stop", "length")


def test_folders_that_are_no_packs(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(FolderError, match="not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(FolderError, match="shrew pack"):
        load(tmp_path)
    with pytest.raises(FolderError, match="not a folder"):
        load(sound / "pack.json")
    with pytest.raises(UsageError, match="0 threads"):
        load(sound, threads=0)


def test_threads_are_tried_out_once(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path))
    assert load(sound).threads == 1  # as OMP_NUM_THREADS says
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    chosen = load(sound).threads
    (kept,) = json.loads((tmp_path / "machine.json").read_text()).values()
    assert chosen == (2 if kept["values"][1] * 1.1 < kept["values"][0] else 1)
    monkeypatch.setattr("shrew.runtime.pack._step_seconds", lambda *_: pytest.fail("tried again"))
    assert load(sound).threads == chosen
    assert load(sound, threads=3).threads == 3


def test_a_program_that_ends_ends_its_engines(sound: Path) -> None:
    script = f"""
from shrew.runtime import Engine, Request, engine, load
engine = Engine(load({str(sound)!r}, verify=False))
next(engine.submit(Request(prompt=[5, 6], max_tokens=500, ignore_eos=True)))
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_it_runs_without_torch_and_maps_its_weights(tmp_path: Path) -> None:
    """100 MB of weights that no token asks for stay on the disk."""
    tiny_pack.write(tmp_path / "pack", width=64, context=400_000)
    script = f"""
import sys
for name in ("torch", "transformers", "onnx", "safetensors", "psutil"):
    sys.modules[name] = None
from pathlib import Path
from shrew.runtime import Engine, Request, engine, load
with Engine(load({str(tmp_path / "pack")!r}, verify=False), slots=4, context=1000) as engine:
    piece = engine.submit(Request(prompt=[5, 6, 7], max_tokens=5, temperature=0, ignore_eos=True)).result()
assert piece.finish == "length", piece
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) // 1024, "MB")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[0]) < 150, done.stdout


def test_attention_is_the_plain_one_unless_said_otherwise(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads a variable when a graph is opened; it is there only then, and what a user sets counts."""
    seen: list[str | None] = []
    opened = onnxruntime.InferenceSession

    def watched(*words: Any, **more: Any) -> Any:
        seen.append(os.environ.get(PLAIN_ATTENTION))
        return opened(*words, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    monkeypatch.delenv(PLAIN_ATTENTION, raising=False)
    load(sound, threads=1)
    assert seen == ["1"] and PLAIN_ATTENTION not in os.environ
    monkeypatch.setenv(PLAIN_ATTENTION, "0")
    load(sound, threads=1)
    assert seen == ["1", "0"] and os.environ[PLAIN_ATTENTION] == "0"


def large(held: mmap.mmap) -> int:
    """kB of it that stand in large pages."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    found = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            found = start <= address < end
        elif found and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no large pages here")
def test_memory_of_a_block_stands_in_large_pages() -> None:
    content = os.urandom(8 << 20)
    with machine.large_pages():
        held = mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held[:] = content
    assert held[:] == content
    if tuple(int(part) for part in platform.release().split(".")[:2]) >= (6, 1):
        assert large(held) >= 4 << 10
    with pytest.raises(ZeroDivisionError), machine.large_pages():
        _ = 1 / 0


def test_usage_has_joules_where_a_counter_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pack.write(tmp_path / "pack")
    counter = tmp_path / "intel-rapl:0" / "energy_uj"

    class Counting(machine.Joules):
        """A quarter of a joule is used until it is read."""

        def __init__(self) -> None:
            super().__init__(tmp_path)

        def spent(self) -> float | None:
            if counter.exists():
                counter.write_text(str((int(counter.read_text()) + 250_000) % 10_000_000))
            return super().spent()

    monkeypatch.setattr(engine, "Joules", Counting)
    request = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True)
    with Engine(load(tmp_path / "pack")) as running:
        usage = running.submit(request).result().usage
    assert usage is not None and usage.joules is None and list(usage.cost()) == ["cpu_seconds"]
    counter.parent.mkdir()
    counter.write_text("9500000")
    counter.with_name("max_energy_range_uj").write_text("9999999")
    with Engine(load(tmp_path / "pack")) as running:
        both = [running.submit(request), running.submit(replace(request, max_tokens=40))]
        used = [answer.result().usage for answer in both]
        assert running.embedding([5, 6]).result()[1].joules == 0.25
    shares = [item.joules for item in used if item is not None and item.joules]
    assert len(shares) == 2 and sum(shares) == pytest.approx(0.5)  # it is read where one of them ends
