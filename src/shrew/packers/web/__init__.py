"""`--to web`: a folder of static files in which the model runs inside the browser, offline, without a server.

The graph is the packed one (see `graph`), the runtime is ONNX Runtime's WebAssembly build from the npm registry, and
the rest is JavaScript from `js/`, as it stands: modules that every browser loads, and nothing to build.
"""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import onnx

from shrew import files
from shrew.errors import FolderError, ShrewError, UnsupportedError
from shrew.folder.check import describe, fetch
from shrew.packers.onnx import Options as OnnxOptions
from shrew.packers.onnx import Say
from shrew.packers.onnx import pack as pack_onnx
from shrew.packers.web import graph, tokenizer, vendor
from shrew.runtime import manifest as manifests
from shrew.runtime import page, template
from shrew.runtime.manifest import Manifest
from shrew.runtime.template import PLAIN_ROLES, PLAIN_STOP
from shrew.spec import doc

MARK = "web.json"
SERVICE = "service.js"
WASM = "ort-wasm-simd-threaded.wasm"
FORMAT = 1
LARGEST = 2_000_000_000  # bytes of weights; a WebAssembly program has 4 GB, and holds them twice while it loads
UNPACKED = 1_500_000_000  # bytes of unpacked matrices that still fit beside them

MIT = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
RUNTIME = vendor.Package(
    name="onnxruntime-web",
    version="1.30.0",
    sha512="q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    files={f"dist/{name}": name for name in (WASM, WASM.replace(".wasm", ".mjs"))},
    licence=MIT,
)
JINJA = vendor.Package(
    name="@huggingface/jinja",
    version="0.5.11",
    sha512="YzEzwM5oQf4r0vs7ifWQ+yuVR1YkAHrjERQ+a8WRsStHHp4NRBg+NesjiFc+X2AFUpRvvrIeHDS1xFy9jY/IjQ==",
    files={"dist/index.js": "index.js", "LICENSE": "LICENSE"},
    licence="",
)
# Everything the page runs comes from its own folder; WebAssembly is compiled from there as well.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; worker-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; manifest-src 'self'; base-uri 'none'; form-action 'none'"
)
UNSERVED = (
    "This page has to come from a web server: run python3 -m http.server in its folder, then open http://localhost:8000."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    registry: str = doc("npm registry that ONNX Runtime's browser build is fetched from, once; default: as npm is set "
                        "up, else the public one", "")  # fmt: skip


NOT_WRITING = "{} is a classifier, and the page is for models that write; pack it --to onnx."


def pack(name: str, out: Path, options: Options, say: Say) -> dict[str, Any]:
    """Write the folder `out` for the model or packed folder `name`; returns its manifest.

    Raises UnsupportedError for what a browser cannot run, ShrewError where the runtime cannot be fetched."""
    files.check_writable_target(out, MARK)
    files.check_apart(out, [fetch(name)])
    if (Path(name) / manifests.NAME).is_file():
        return _write(Path(name), out, options, say)
    if describe(fetch(name), False)[1].classifier:
        raise UnsupportedError(NOT_WRITING.format(name))
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / (Path(name).resolve().name or "model")
        pack_onnx(name, packed, OnnxOptions(), say)
        return _write(packed, out, options, say)


def _write(packed: Path, out: Path, options: Options, say: Say) -> dict[str, Any]:
    held = manifests.read(packed)
    if held.kind != "causal":
        raise UnsupportedError(NOT_WRITING.format(packed))
    if any(state.dtype in ("int8", "uint8") for state in held.states):
        raise UnsupportedError(f"{packed} holds keys and values in few bits, and the page cannot; pack without --kv.")
    if {manifests.CODED, manifests.SQUEEZED} & held.files.keys():
        raise UnsupportedError(f"{packed} holds coded weights, which the page cannot read; pack without --coded.")
    weights = {name: file.bytes for name, file in held.files.items() if Path(name).suffix == ".bin"}
    if sum(weights.values()) > LARGEST:
        raise UnsupportedError(f"{packed} has {sum(weights.values()):,} bytes of weights, and a page can hold "
                               f"{LARGEST:,}; make it smaller with `shrew shrink`.")  # fmt: skip
    parts = {"model/tokenizer.json": _json(tokenizer.compiled(packed / manifests.TOKENIZER)),
             "model/chat.json": _json(chat := _chat(packed, held))}  # fmt: skip
    model = _read(packed / manifests.GRAPH)
    unpacked = _unpack(model, say)
    parts["model/model.onnx"] = model.SerializeToString()
    packages = {"onnxruntime": RUNTIME} | ({"jinja": JINJA} if chat["template"] else {})
    for where, package in packages.items():
        fetched = vendor.fetch(package, options.registry)
        parts |= {f"vendor/{where}/{name}": content for name, content in fetched.items()}
    parts |= _program(held.name)
    manifest = {
        "format": FORMAT, "shrew": held.shrew, "name": held.name, "vocabulary": held.vocabulary,
        "context": held.context, "eos": held.eos, "chunk": held.chunk, "align": held.align, "unpacked": unpacked,
        "takes_start": any(item.name == "start" for item in model.graph.input),  # not every block asks where it stands
        "states": [{"name": state.name, "kind": state.kind, "dtype": state.dtype, "shape": state.shape}
                   for state in held.states],
        "packages": {package.name: package.version for package in packages.values()},
    }  # fmt: skip
    try:
        with files.new_folder(out, MARK) as made:
            for path, content in parts.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_bytes(content)
            for path in weights:
                shutil.copyfile(packed / path, made / "model" / path)
            return _finish(made, manifest, weights, say)
    except OSError as error:
        raise ShrewError(f"{out} could not be written ({error}); make room and run again.") from None


def _finish(where: Path, manifest: dict[str, Any], weights: dict[str, int], say: Say) -> dict[str, Any]:
    """The lists of files: for the page, which loads the model, and for the service worker, which keeps all of it."""
    listed: dict[str, Any] = {
        path.relative_to(where).as_posix(): {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in sorted(where.rglob("*"))
        if path.is_file() and path.name != SERVICE
    }
    manifest = {**manifest, "weights": list(weights), "files": listed}
    (where / MARK).write_bytes(_json(manifest))
    loaded = ("model/", "index.html", f"vendor/onnxruntime/{WASM}")  # the worker keeps the first and last
    shell = ["./", MARK, *(path for path in listed if not path.startswith(loaded) and not path.endswith("LICENSE"))]
    version = hashlib.sha256(_json(listed)).hexdigest()[:16]
    service = (where / SERVICE).read_text("utf-8")
    service = service.replace('"VERSION"', json.dumps(version)).replace('["SHELL"]', json.dumps(shell))
    (where / SERVICE).write_text(service, "utf-8")
    total = sum(item["bytes"] for item in listed.values())
    say(f"{total:,} bytes in {len(listed) + 2} files, {sum(weights.values()):,} of them weights")
    say("to try it: python3 -m http.server in that folder, then open http://localhost:8000")
    return manifest


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _chat(packed: Path, manifest: Manifest) -> dict[str, Any]:
    """How a conversation becomes text: the folder's template, or plain lines."""
    held = template.of_folder(packed, manifest.files)
    source = "" if held.plain else held.source()
    return {"template": source, "special": held.special, "stop": PLAIN_STOP if held.plain else [], "roles": PLAIN_ROLES}


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise FolderError(f"{path} is not an ONNX graph ({error}); pack the model again.") from None


def _unpack(model: onnx.ModelProto, say: Say) -> bool:
    """Make the graph one for WebAssembly; whether its weights are unpacked when it is loaded."""
    size = graph.unpacked_bytes(model)
    if not size:
        return False
    if size > UNPACKED:
        say(f"its matrices stay packed, as {size:,} bytes unpacked are too many for a page: each token takes several "
            "times as long")  # fmt: skip
        return False
    graph.unpack(model)
    say(f"matrices are unpacked when the page loads them ({size:,} bytes of memory): WebAssembly has no fast product "
        "with packed ones")  # fmt: skip
    return True


def _program(name: str) -> dict[str, bytes]:
    """The page and what it runs: the one of `shrew serve`, with a backend that stays in the browser."""
    html = page.html()
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    script = re.search(r'<script id="ui">(.*?)</script>', html, re.S)
    icon = re.search(r'href="data:image/svg\+xml,([^"]*)"', html)
    assert style and script and icon  # the page is ours
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<link rel="manifest" href="manifest.webmanifest">\n<link rel="stylesheet" href="style.css">'
    )
    html = html.replace(style[0], head).replace(script[0], '<script src="ui.js" defer></script>')
    backend = '<script type="module" src="browser.js"></script>'
    html = re.sub(r'<script id="server">.*?</script>', backend, html, flags=re.S)
    html = html.replace("One moment …", UNSERVED)
    app = {"name": name, "short_name": name[:12], "start_url": "./", "scope": "./", "display": "standalone",
           "background_color": "#ffffff", "theme_color": "#0a6c66",
           "icons": [{"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}]}  # fmt: skip
    svg = icon[1].replace("%3C", "<").replace("%3E", ">").replace("%23", "#")
    ours = {item.name: item.read_bytes() for item in (resources.files(__name__) / "js").iterdir()}
    texts = {"index.html": html, "style.css": style[1], "ui.js": script[1], "icon.svg": svg}
    return ours | {path: text.encode("utf-8") for path, text in texts.items()} | {"manifest.webmanifest": _json(app)}
