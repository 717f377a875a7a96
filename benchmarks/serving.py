"""What the server benchmarks share: a server in a process of its own, and a client that costs little itself."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any


class Server:
    """`shrew serve MODEL`, started and ready. A context manager; `end` sends a signal and gives the exit code."""

    def __init__(self, model: str, *flags: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "shrew", "serve", model, "--port", str(port), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"Serving (.*) at http://127\.0\.0\.1:(\d+)/v1", line)
        if not found:
            self.process.wait()
            sys.exit(f"the server did not start: {' '.join(command)}")
        self.name, self.port = found[1], int(found[2])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)

    def end(self, how: int) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)

    def get(self, path: str, key: str = "") -> bytes:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
            found: bytes = answer.read()
        return found

    def gauge(self, name: str) -> float:
        """One of /metrics, summed over its labels."""
        lines = self.get("/metrics").decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line))

    def context(self) -> int:
        return int(json.loads(self.get("/v1/models"))["data"][0]["context_length"])

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, in parts that one request may have."""
        found: list[int] = []
        for start in range(0, len(text), 500_000):
            body = {"prompt": text[start : start + 500_000], "add_special_tokens": False}
            request = urllib.request.Request(self.url + "/tokenize", json.dumps(body).encode(),
                                             {"content-type": "application/json"})  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as answer:
                found += json.loads(answer.read())["tokens"]
        return found


class RefusedError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body.decode('utf-8', 'replace')[:200]}")
        self.status = status


class Connection:
    """One kept-alive HTTP connection: requests one after the other, answers as they come."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: Any) -> AsyncIterator[bytes]:
        """The lines of the answer as they come (a whole one is a single line). Raises RefusedError, OSError and
        asyncio.IncompleteReadError."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        content = json.dumps(body).encode()
        head = (f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\n\r\n")  # fmt: skip
        self.writer.write(head.encode() + content)
        await self.writer.drain()
        answer = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(answer.split()[1])
        if length := re.search(r"content-length: (\d+)", answer):
            whole = await self.reader.readexactly(int(length[1]))
            if status != 200:
                raise RefusedError(status, whole)
            yield whole
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            chunk = await self.reader.readexactly(size + 2)
            for line in chunk.splitlines():
                if line:
                    yield line
        await self.reader.readuntil(b"\r\n")

    async def close(self) -> None:
        """Drop the connection, whatever it is doing."""
        if self.writer is not None:
            self.writer.close()
            with suppress(OSError):
                await self.writer.wait_closed()
            self.writer = None


def text_of(source: str) -> str:
    """Python's own modules, or the text files under a folder."""
    folder = Path(source) if source else Path(json.__file__).parent.parent
    pattern = "*" if source else "*.py"
    return "\n".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob(pattern)) if path.is_file())
