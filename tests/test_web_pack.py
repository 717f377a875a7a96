"""`--to web`: the folder, the graph for WebAssembly, what comes from the registry, and the JavaScript that decodes."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import shrew
from shrew.__main__ import main
from shrew.packers import web
from shrew.packers.web import graph, vendor
from shrew.runtime import page
from shrew.runtime.request import Request
from shrew.runtime.sampling import Sampler
from shrew.runtime.template import ChatTemplate

SOURCE = Path(shrew.__file__).parent
SCRIPTS = SOURCE / "packers" / "web" / "js"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def node(program: str, given: Any = None) -> Any:
    """What a module prints as JSON; `given` is there as `given`, and names from our scripts as `js.NAME`."""
    names = ("generate", "model", "random", "sampler", "template")
    scripts = json.dumps([(SCRIPTS / f"{name}.js").as_uri() for name in names])
    head = (
        'import { readFileSync } from "node:fs";\nconst given = JSON.parse(readFileSync(0, "utf8"));\n'
        f"const js = Object.assign({{}}, ...(await Promise.all({scripts}.map((url) => import(url)))));\n"
    )
    done = subprocess.run(["node", "--input-type=module", "-e", head + program], input=json.dumps(given),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- the registry ----------------------------------------------------------------------------------------------------


def tarball(package: vendor.Package, content: bytes = b"export default 1;") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for path in package.files:
            info = tarfile.TarInfo(f"package/{path}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


class Registry:
    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        registry = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                registry.asked.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry of our own that has both packages, small and with hashes of their own; and an empty cache."""
    monkeypatch.setenv("SHREW_CACHE", str(tmp_path / "cache"))
    for name in ("RUNTIME", "JINJA"):
        package = getattr(web, name)
        content = tarball(package)
        at = tmp_path / "npm" / package.name / "-" / package.tarball
        at.parent.mkdir(parents=True)
        at.write_bytes(content)
        right = base64.b64encode(hashlib.sha512(content).digest()).decode()
        monkeypatch.setattr(web, name, replace(package, sha512=right))
    held = Registry(tmp_path / "npm")
    monkeypatch.setenv("npm_config_registry", held.address)
    yield held
    held.server.shutdown()
    held.server.server_close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("web") / "tiny"
    assert main(["pack", str(tiny_llama_folder), "--out", str(out)]) == 0
    return out


def test_the_folder_holds_all_it_needs_and_says_what(packed: Path, registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "site"
    assert main(["pack", str(packed), "--to", "web", "--out", str(out)]) == 0
    manifest = json.loads((out / "web.json").read_text("utf-8"))
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there - set(manifest["files"]) == {"web.json", "service.js"}
    for name, said in manifest["files"].items():
        content = (out / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (said["bytes"], said["sha256"])
    assert (out / "model" / "model.bin").read_bytes() == (packed / "model.bin").read_bytes()
    assert {"vendor/onnxruntime/LICENSE", "vendor/onnxruntime/ort-wasm-simd-threaded.wasm"} <= there
    assert "Microsoft" in (out / "vendor" / "onnxruntime" / "LICENSE").read_text("utf-8")

    service = (out / "service.js").read_text("utf-8")
    shell = json.loads(re.search(r"^const SHELL = (.*);$", service, re.M)[1])  # type: ignore[index]
    assert set(shell) - {"./"} <= there
    loaded = {name for name in there if name.startswith("model/") or name.endswith((".wasm", "LICENSE"))}
    assert there - set(shell) == loaded | {"index.html", "service.js"}  # kept by the worker, or under './'

    text = (out / "index.html").read_text("utf-8")
    assert "<style" not in text and not re.search(r"<script(?![^>]* src=)", text)
    assert set(re.findall(r'(?:src|href)="(?!data:)([^"]+)"', text)) <= there
    for path in there:
        if path.endswith((".js", ".css", ".html")) and not path.startswith("vendor/"):
            assert not re.search(r"https?://(?!localhost|www\.w3\.org)", (out / path).read_text("utf-8")), path


def test_a_package_is_fetched_once(packed: Path, registry: Registry, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["pack", str(packed), "--to", "web", "--out", str(tmp_path / name)]) == 0
    assert len([path for path in registry.asked if "onnxruntime" in path]) == 1


def test_what_cannot_be_fetched_or_is_another_leaves_nothing(
    packed: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "site"

    def fails(words: str, *more: str) -> None:
        assert main(["pack", str(packed), "--to", "web", "--out", str(out), *more]) in (1, 2)
        said = capsys.readouterr().err.splitlines()[-1]
        assert words in said and said.startswith("shrew: ")
        assert not out.exists() and not list((tmp_path / "cache").rglob("*.tgz"))

    fails("cannot be reached", "--registry", "http://127.0.0.1:9")
    fails("is no address", "--registry", "ftp://somewhere")
    fails("answered 404", "--registry", registry.address + "/missing")
    at = tmp_path / "npm" / web.RUNTIME.name / "-" / web.RUNTIME.tarball
    at.write_bytes(tarball(web.RUNTIME, b"something else"))
    fails("its SHA-512 differs")


def test_a_damaged_copy_in_the_cache_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    found = vendor.fetch(web.RUNTIME, "")
    kept = next((tmp_path / "cache").rglob("*.tgz"))
    kept.write_bytes(kept.read_bytes()[:-10])
    assert vendor.fetch(web.RUNTIME, "") == found
    assert len(registry.asked) == 2


def test_a_registry_that_breaks_off_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("SHREW_CACHE", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(shrew.ShrewError, match="cannot be reached"):
        vendor.fetch(web.RUNTIME, f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def test_a_folder_that_is_not_ours_is_left_alone(packed: Path, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept", "utf-8")
    assert main(["pack", str(packed), "--to", "web", "--out", str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


# --- the graph -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(bits=st.sampled_from([2, 4, 8]), size=st.sampled_from([16, 32, 64]), blocks=st.integers(1, 5),
       rows=st.integers(1, 9), zeros=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_unpacked_products_are_those_of_onnx_runtime(
    bits: int, size: int, blocks: int, rows: int, zeros: bool, bias: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    cols = blocks * size
    held = {"codes": draw.integers(0, 256, (rows, blocks, size * bits // 8), np.uint8),
            "scales": draw.standard_normal((rows, blocks), np.float32)}  # fmt: skip
    if zeros:
        held["zeros"] = draw.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    if bias:
        held["bias"] = draw.standard_normal(rows, np.float32)
    inputs = ["x", "codes", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    settings = {"K": cols, "N": rows, "bits": bits, "block_size": size}
    product = helper.make_node("MatMulNBits", inputs, ["y"], domain=graph.MS, **settings)
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, width])]
             for name, width in (("x", cols), ("y", rows))]  # fmt: skip
    tensors = [numpy_helper.from_array(value, name) for name, value in held.items()]
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid(graph.MS, 1)]
    model = helper.make_model(helper.make_graph([product], "g", *sides, tensors), opset_imports=opsets, ir_version=10)
    x = draw.standard_normal((3, cols), np.float32)

    def run() -> np.ndarray:
        return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0])

    expected = run()
    assert graph.unpacked_bytes(model) == 4 * rows * cols
    graph.unpack(model)
    onnx.checker.check_model(model)
    assert graph.unpacked_bytes(model) == 0
    np.testing.assert_allclose(run(), expected, rtol=1e-4, atol=1e-4 * 2**bits)


# --- decoding --------------------------------------------------------------------------------------------------------


@needs_node
def test_the_same_seed_draws_the_same_numbers_as_numpy() -> None:
    seeds = [0, 1, 42, 2**31, 2**32, 2**40 + 7, 2**53 - 1]
    drawn = node("console.log(JSON.stringify(given.map((seed) => { const r = new js.Random(seed);"
                 "return Array.from({ length: 50 }, () => r.next()); })))", seeds)  # fmt: skip
    assert drawn == [list(np.random.Generator(np.random.PCG64(seed)).random(50)) for seed in seeds]


@needs_node
def test_the_same_logits_and_seed_give_the_same_tokens_as_the_runtime() -> None:
    draw = np.random.default_rng(0)
    cases = []
    for number in range(200):
        logits = draw.standard_normal((12, 60)).astype(np.float32) * 3
        if number % 5 == 0:
            logits = np.round(logits)  # equals
        cases.append({"logits": logits.tolist(), "settings": {
            "temperature": float(draw.choice([0, 0.3, 1, 1.7])), "top_k": int(draw.choice([0, 1, 5, 59, 100])),
            "top_p": float(draw.choice([0.05, 0.5, 0.9, 1])), "seed": number}})  # fmt: skip
    found = node("console.log(JSON.stringify(given.map(({ logits, settings }) => { const s = new js.Sampler(settings);"
                 "return logits.map((row) => s.pick(new Float32Array(row))); })))", cases)  # fmt: skip
    for case, tokens in zip(cases, found, strict=True):
        sampler = Sampler(Request(prompt=[0], **case["settings"]), 60)
        assert tokens == [sampler.pick(np.asarray(row, np.float32)) for row in case["logits"]]


FAKE = """
// A "model" whose next token is 1 + the last, and a tokenizer whose tokens are letters.
class Fake {
  constructor(settings) {
    this.manifest = { context: 40, eos: [26], vocabulary: 27, chunk: 4, align: 6, ...settings };
    Object.assign(this, { seen: [], calls: [] });
  }
  reserve() {}
  rewind() { this.seen = []; return 0; }
  room(left) { return js.Model.prototype.room.call(this, left); }
  async call(tokens, wanted) {
    this.calls.push(tokens.length);
    this.seen.push(...tokens);
    return wanted ? Float32Array.from({ length: 27 }, (_, i) => (i === tokens.at(-1) + 1 ? 1 : 0)) : null;
  }
}
const letters = (ids) => ids.map((id) => String.fromCharCode(97 + id)).join("");
const tokenizer = { stream: () => ({ push: (id) => letters([id]), end: () => "" }) };
const results = [];
for (const { ids, settings, stopAfter, manifest } of given) {
  const model = new Fake(manifest);
  let text = "", last, error = null, pieces = 0;
  try {
    const stopped = () => text.length >= (stopAfter ?? 99);
    for await (const piece of js.generate(model, tokenizer, ids, { temperature: 0, ...settings }, stopped)) {
      text += piece.text ?? "";
      last = piece;
    }
  } catch (caught) { error = caught.message; }
  results.push({ text, finish: last?.finish, usage: last?.usage, calls: model.calls, error });
}
console.log(JSON.stringify(results));
"""


@needs_node
def test_an_answer_ends_where_it_should_and_reads_in_pieces() -> None:
    found = node(FAKE, [
        {"ids": [0] * 9, "settings": {"max_tokens": 5}},
        {"ids": [20], "settings": {"max_tokens": 50}},
        {"ids": [0], "settings": {"stop": ["efg", "zz"]}},
        {"ids": [0], "settings": {"stop": ["bcx"], "max_tokens": 3}},
        {"ids": [0], "settings": {}, "stopAfter": 4},
        {"ids": [0], "settings": {}, "manifest": {"context": 8}},
        {"ids": [0] * 9, "settings": {}, "manifest": {"context": 9}},
        {"ids": [], "settings": {}},
        {"ids": [99], "settings": {}},
    ])  # fmt: skip
    assert [(item["text"], item["finish"]) for item in found[:6]] == [
        ("bcdef", "length"), ("vwxyz", "stop"), ("bcd", "stop"), ("bcd", "length"), ("bcdef", "stopped"),
        ("bcdefgh", "length")
    ]  # fmt: skip
    assert found[0]["calls"] == [4, 2, 3, 1, 1, 1, 1]  # chunks of 4, none across a multiple of 6
    assert found[0]["usage"] == {"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 0}
    assert [item["error"] for item in found[6:]] == [
        "The text has 9 tokens, and this model holds 9; shorten it.", "The prompt is empty; write something first.",
        "The text has a token that this model does not know.",
    ]  # fmt: skip


STATES = """
let made = 0;
const graph = {
  tensor: (type, shape) => ({
    id: made++, shape, zero() { return this; }, set(values) { this.values = values; return this; },
    floats: () => [], free() {},
  }),
  async run(inputs, outputs) {
    const ids = ["kv", "r"].flatMap((name) => [inputs[`past.${name}`]?.id, outputs[`next.${name}`]?.id]);
    runs.push([...ids, inputs.start.values[0]]);
  },
};
const runs = [];
const kv = { name: "kv", kind: "cache", dtype: "float32", shape: [2, "capacity", 4] };
const r = { name: "r", kind: "recurrent", dtype: "float32", shape: [3, 4] };
const answers = [];
for (const states of [[kv], [kv, r]]) {
  const model = new js.Model(graph, { takes_start: true, context: 1000, vocabulary: 9, chunk: 64, align: 0, states });
  model.reserve(10);
  const shapes = model.states.map(({ buffers }) => [buffers.length, buffers[0].shape]);
  runs.length = 0;
  await model.call([1, 2, 3], false);
  await model.call([4], true);
  const kept = [model.rewind([1, 2, 3, 4, 5]), model.rewind([1, 2, 9, 9]), model.rewind([1, 2])];
  let error = null;
  try { model.reserve(1001); } catch (caught) { error = caught.message; }
  const same = runs.map(([past, next]) => past === next);
  const turns = runs.map((run) => run.slice(2, 4));
  answers.push({ shapes, kept, error, same, turns, starts: runs.map((run) => run[4]) });
}
console.log(JSON.stringify(answers));
"""


@needs_node
def test_caches_are_written_in_place_and_recurrent_states_take_turns() -> None:
    cache, both = node(STATES)
    assert cache["shapes"] == [[1, [1, 2, 256, 4]]]
    assert both["shapes"] == [[1, [1, 2, 256, 4]], [2, [1, 3, 4]]]
    assert cache["same"] == both["same"] == [True, True]
    (first, second), (third, fourth) = both["turns"]
    assert (first, second) == (fourth, third) and first != second
    assert both["starts"] == [0, 3]
    assert cache["kept"] == [4, 2, 1]  # the last token is always read again, for its logits
    assert both["kept"] == [4, 0, 0]  # a recurrent state cannot go back
    assert "at most 1000 tokens" in cache["error"]


@needs_node
def test_without_a_template_a_chat_is_the_same_plain_lines_as_the_runtime() -> None:
    said = [("system", " Be brief. "), ("user", "Hi\nyou"), ("assistant", "Yes?"), ("user", "No")]
    messages = [{"role": role, "content": content} for role, content in said]
    chat = {"template": "", "roles": web.PLAIN_ROLES, "special": {}}
    asked = {"chat": chat, "messages": messages}
    found = node("console.log(JSON.stringify(js.renderer(given.chat)(given.messages)))", asked)
    assert found == ChatTemplate().render(messages)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_under_a_policy_of_hashes() -> None:
    text, policy = page.html(), page.policy(page.html())
    assert len(page.INLINE.findall(text)) == 3 == policy.count("'sha256-")
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    for kind, content in page.INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy.partition(f"{kind}-src")[2].partition(";")[0]
    labelled = set(re.findall(r'<label[^>]* for="(\w+)"', text))
    for tag in re.findall(r"<(?:input|textarea|select)[^>]*>", text):
        name = re.search(r' id="(\w+)"', tag)
        assert "aria-label=" in tag or (name and name[1] in labelled) or 'type="radio"' in tag, tag


def page_script(program: str, given: Any) -> Any:
    """Run a program beside the page's own functions."""
    scripts = "".join(content for kind, content in page.INLINE.findall(page.html()) if kind == "script")
    return node(f"const run = new Function('given', {json.dumps(scripts + program)});\n"
                "console.log(JSON.stringify(await run(given)));", given)  # fmt: skip


@needs_node
def test_events_are_read_however_they_are_cut() -> None:
    sent = ': hello\n\ndata: {"a": "你🙂"}\r\n\r\nid: 1\ndata:x\ndata: y\n\nevent: z\n\ndata: end'.encode()
    program = """
return (async () => {
  const answers = [];
  for (let size = 1; size <= given.length; size++) {
    const parts = [];
    for (let at = 0; at < given.length; at += size) parts.push(new Uint8Array(given.slice(at, at + size)));
    const stream = new ReadableStream({ start(c) { parts.forEach((part) => c.enqueue(part)); c.close(); } });
    const found = [];
    for await (const data of events(stream)) found.push(data);
    answers.push(found);
  }
  return answers;
})();
"""
    answers = page_script(program, list(sent))
    assert all(answer == ['{"a": "你🙂"}', "x\ny", "end"] for answer in answers)


@needs_node
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\nb", [["text", "a\n\nb"]]),
        ("see:\n```py\nx = 1\n\ny\n```\nend", [["text", "see:"], ["code", "x = 1\n\ny", "py"], ["text", "end"]]),
        ("```\nopen", [["code", "open", ""]]),
        ("````md\n```\nin\n```\n````", [["code", "```\nin\n```", "md"]]),
        ("`a` ``` b", [["text", "`a` ``` b"]]),
        ("<script>x</script>", [["text", "<script>x</script>"]]),
        ("", []),
    ],
)
def test_markdown_is_text_and_code(text: str, expected: list[list[str]]) -> None:
    found = page_script("return blocks(given).map(Object.values);", text)
    assert found == expected


@needs_node
@settings(max_examples=15)
@given(text=st.text("ab`~\n ", max_size=40))
def test_markdown_loses_no_letter(text: str) -> None:
    found = page_script("return blocks(given).map((block) => block.text + (block.language ?? '')).join('');", text)
    assert sorted(letter for letter in found if letter in "ab") == sorted(letter for letter in text if letter in "ab")
