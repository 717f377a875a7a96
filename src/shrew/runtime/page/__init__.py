"""The page that `shrew serve` gives at `/`: one file, its style and its script inside."""

import base64
import hashlib
import re
from importlib import resources

INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.S)


def html() -> str:
    return (resources.files(__name__) / "index.html").read_text("utf-8")


def policy(page: str) -> str:
    """The Content-Security-Policy under which `page` works: its inline blocks by their hashes, and its own server."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
