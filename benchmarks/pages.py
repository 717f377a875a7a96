"""Drive both pages in headless Chromium: the server's, and the model inside the browser with the network cut.

    python benchmarks/pages.py --out pictures [--model starter] [--records results/records.jsonl]

Types, waits for text that streams, stops; compares the browser's tokens with the Python runtime's on the same graph;
leaves pictures at desktop and phone width, light and dark, in --out. Needs Chromium (Debian: apt-get install chromium).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import Browser, Page

from shrew import files
from shrew.packers import main as shrew_pack
from shrew.record import Record, append
from shrew.runtime import Engine, load
from shrew.runtime.request import Request

SIZES = {"desktop": (1280, 800), "phone": (360, 740)}
PROMPT = "def binary_search(items, target):\n    "
TOKENS = 100
QUESTION = "How do I check whether a string is a palindrome in Python?"
READY = "document.querySelector('#model')?.options.length > 0"
IDLE = "document.querySelector('#send').title === 'Send'"

# Greedy tokens from the worker itself, beside the page.
WORKER = """new Promise((resolve, reject) => {
  const worker = new Worker("worker.js", { type: "module" });
  const tokens = [], times = [];
  worker.onmessage = ({ data: { kind, piece, message } }) => {
    if (kind === "ready") worker.postMessage({ kind: "generate", id: 1, request: %s });
    if (kind === "piece" && piece.token !== undefined) { tokens.push(piece.token); times.push(performance.now()); }
    if (kind === "done") { worker.terminate(); resolve({ tokens, times }); }
    if (kind === "failed") reject(new Error(message));
  };
  worker.postMessage({ kind: "open" });
})"""


def check(holds: bool, what: str) -> None:
    print(f"  {'ok  ' if holds else 'FAIL'} {what}", flush=True)
    if not holds:
        raise SystemExit(1)


@contextmanager
def program(*command: str, says: str | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A program that runs meanwhile, and the line it `says` when it is ready."""
    process = subprocess.Popen([sys.executable, "-u", "-m", *command], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        assert process.stdout
        line = next((line for line in process.stdout if says is None or says in line), "")
        yield process, line
    finally:
        process.terminate()
        process.wait()


def reference(pack: Path, graph: Path) -> list[int]:
    """Greedy tokens of the Python runtime with another graph on the same weights."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / pack.name
        shutil.copytree(pack, copy)
        shutil.copyfile(graph, copy / "model.onnx")
        manifest = json.loads((copy / "pack.json").read_text("utf-8"))
        manifest["files"]["model.onnx"] = {"bytes": graph.stat().st_size, "sha256": files.sha256(graph)}
        (copy / "pack.json").write_text(json.dumps(manifest), "utf-8")
        model = load(copy)
        request = Request(prompt=model.tokenizer.encode(PROMPT).ids, max_tokens=TOKENS, temperature=0)
        with Engine(model) as engine:
            return [token.id for piece in engine.submit(request) for token in piece.tokens]


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    """Where two lists differ first, up to the end of the shorter."""
    return next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)


def ask(page: Page, text: str) -> None:
    page.eval("document.querySelector('#input').focus()")
    page.type(text)
    page.key("Enter")


def set_up(page: Page, **settings: Any) -> None:
    page.eval(f"localStorage.setItem('shrew.settings', {json.dumps(json.dumps(settings))})")
    page.eval("localStorage.setItem('shrew.mode', '\"chat\"')")
    page.send("Page.reload")
    page.wait(READY)


def server_page(browser: Browser, pack: Path, out: Path) -> None:
    """Chat, stop, an error, completion, settings."""
    print("the page of `shrew serve`", flush=True)
    with program("shrew", "serve", str(pack), "--port", "0", says="Serving") as (process, line):
        url = line.split(" at ")[1].split("/v1")[0] + "/"
        for size, (width, height) in SIZES.items():
            for look in ("light", "dark"):
                page = browser.page(url, width, height, look == "dark")

                def picture(what: str, page: Page = page, name: str = f"server-{size}-{look}") -> None:
                    time.sleep(0.3)
                    page.picture(out / f"{name}-{what}.png")

                page.wait(READY)
                set_up(page, temperature=0.7, seed=1, max_tokens=120)
                picture("open")
                chat(page, picture)
                complete(page, picture)
                page.click("#tune")
                picture("settings")
                page.key("Escape")
                check(page.complaints() == [], f"{size}, {look}: nothing refused, no error in the console")
        page = browser.page(url)
        page.wait(READY)
        set_up(page, max_tokens=400, temperature=1)
        process.terminate()
        process.wait()
        ask(page, QUESTION)
        page.wait("document.querySelector('.problem:not([hidden])')")
        check("cannot be reached" in page.text(".answer .problem"), "a server that is gone: " + page.text(".problem"))


def chat(page: Page, picture: Any) -> None:
    ask(page, QUESTION)
    body = "(document.querySelector('.answer .body')?.textContent ?? '')"
    page.wait(f"{body}.length > 30")
    seen = page.eval(f"{body}.length")
    picture("writing")
    page.wait(IDLE)
    check(page.eval(f"{body}.length") > seen, "the answer came in pieces: " + page.text(".answer .foot"))
    picture("answer")
    ask(page, "And one that is slow to answer?")
    page.wait("document.querySelectorAll('.answer')[1]?.querySelector('.body').textContent.length > 10")
    page.key("Escape")
    page.wait(IDLE)
    check("stopped" in page.eval("document.querySelectorAll('.answer .foot')[1].textContent"), "Esc stopped it")


def complete(page: Page, picture: Any) -> None:
    page.eval("document.querySelector('input[value=complete]').click()")
    page.eval("document.querySelector('#prompt').focus()")
    page.type(PROMPT.rstrip(" "))
    page.key("Enter", 2)
    done = "document.querySelector('#complete').textContent === 'Continue'"
    page.wait(f"{done} && document.querySelector('#completion').textContent.length > 0")
    check(len(page.text("#completion")) > 20, "completion: " + page.text("#speed"))
    picture("completion")


def web_page(browser: Browser, site: Path, pack: Path, out: Path) -> list[Record]:
    """The model in the browser: first visit, its tokens, and a visit without a network."""
    print("the model in the browser", flush=True)
    manifest = json.loads((site / "web.json").read_text("utf-8"))
    serve = ("http.server", "0", "--bind", "127.0.0.1", "--directory", str(site))
    with program(*serve, says="Serving") as (process, line):
        url = line.split("(")[1].split(")")[0]
        begun = time.monotonic()
        page = browser.page(url, *SIZES["desktop"])
        page.wait(READY, 300)
        opened = time.monotonic() - begun
        check("Runs in this browser" in page.text("#about"), f"first visit: ready after {opened:.1f} s")
        page.picture(out / "web-desktop-light-open.png")
        page.wait("navigator.serviceWorker.ready.then(() => true)")
        settings = {"temperature": 0, "max_tokens": TOKENS}
        request = json.dumps({"mode": "complete", "prompt": PROMPT, "settings": settings})
        found = page.eval(WORKER % request)
        shipped, same = reference(pack, pack / "model.onnx"), reference(pack, site / "model" / "model.onnx")
        at, differs = first_difference(found["tokens"], same), first_difference(found["tokens"], shipped)
        count = min(len(found["tokens"]), len(same))
        check(at is None and count > 20, f"{count} greedy tokens as the Python runtime's on the same graph")
        print(f"       against the graph as shipped for the runtime: first different token {differs}", flush=True)
        process.terminate()
        process.wait()
    for size, (width, height) in SIZES.items():
        for look in ("light", "dark"):
            page.look(width, height, look == "dark")
            page.offline(True)
            page.open(url)
            page.wait(READY, 300)
            check(page.eval("Boolean(navigator.serviceWorker.controller)"), f"{size}, {look}: opened without network")
            set_up(page, temperature=0, max_tokens=60)
            complete(page, lambda what, name=f"web-{size}-{look}": page.picture(out / f"{name}-{what}.png"))
    page.eval("document.querySelector('input[value=chat]').click()")
    set_up(page, temperature=1, max_tokens=400)
    ask(page, QUESTION)
    page.wait("document.querySelector('.answer .body')?.textContent.length > 5")
    page.key("Escape")
    page.wait(IDLE)
    check("stopped" in page.text(".answer .foot"), "Esc stopped it")
    check(page.complaints() == [], "nothing refused, no error in the console")
    speed = 1000 * (len(found["times"]) - 1) / (found["times"][-1] - found["times"][0])
    total = sum(item["bytes"] for item in manifest["files"].values())
    print(f"       {speed:.1f} tokens/s, {total:,} bytes", flush=True)
    make = {"run": "pages", "model": manifest["name"]}
    return [
        Record(**make, metric="web_equal_tokens", value=count, unit="tokens", n=count),
        Record(**make, metric="web_first_differing_token", value=differs, detail={"against": "the shipped level"}),
        Record(**make, metric="web_tokens_per_second", value=speed, unit="tokens/s", n=len(found["times"])),
        Record(**make, metric="web_open_seconds", value=opened, unit="s"),
        Record(**make, metric="web_bytes", value=total, unit="bytes"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--model", default="starter", help="a model folder or a packed one")
    parser.add_argument("--registry", default="", help="npm registry")
    parser.add_argument("--records", type=Path, help="JSONL file to add to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Browser() as browser:
        pack, site = Path(args.model), Path(temporary) / "site"
        if not (pack / "pack.json").is_file():
            pack = Path(temporary) / pack.name
            shrew_pack([args.model, "--out", str(pack)])
        shrew_pack([str(pack), "--to", "web", "--out", str(site), "--registry", args.registry])
        records = web_page(browser, site, pack, args.out)
        server_page(browser, pack, args.out)
    if args.records:
        append(args.records, records)


if __name__ == "__main__":
    main()
