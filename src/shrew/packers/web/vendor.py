"""Packages of the npm registry, by version and hash: fetched once, then kept; used only if the hash is right."""

import base64
import hashlib
import http.client
import io
import os
import shutil
import ssl
import subprocess
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from shrew import files
from shrew.errors import ShrewError, UsageError

PUBLIC = "https://registry.npmjs.org/"
LARGEST = 200 << 20  # bytes of a package
PATIENCE = 60  # seconds without a byte


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha512: str  # base64, as in npm's lock files
    files: dict[str, str]  # path in the package: name in the folder
    licence: str  # where it says so in the package; or the text of it, if the package has none

    @property
    def tarball(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


def registry(asked: str) -> str:
    """The registry's address: as asked, else as npm is set up, else the public one."""
    names = ("npm_config_registry", "NPM_CONFIG_REGISTRY")  # npm takes both
    said = asked or next((os.environ[name] for name in names if os.environ.get(name)), "") or _npm() or PUBLIC
    if urllib.parse.urlsplit(said).scheme not in ("http", "https"):
        raise UsageError(f"'{said}' is no address of an npm registry; it begins with https://.")
    return said.rstrip("/") + "/"


def _npm() -> str:
    """What `npm config get registry` says, if there is npm."""
    if not (npm := shutil.which("npm")):
        return ""
    command = [npm, "config", "get", "registry"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said if said.startswith("http") else ""


def fetch(package: Package, asked: str) -> dict[str, bytes]:
    """The files of a package by their names in the folder, and LICENSE.

    Raises ShrewError where it cannot be fetched or is not what was published."""
    kept = files.cache_folder() / "npm" / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}.tgz"
    content = kept.read_bytes() if kept.is_file() else b""
    if not _is_right(package, content):
        address = f"{registry(asked)}{package.name}/-/{package.tarball}"
        content = _download(address)
        if not _is_right(package, content):
            raise ShrewError(f"{address} is not the {package.name} {package.version} that was published (its SHA-512 "
                             "differs); use another --registry.")  # fmt: skip
        files.write_bytes(kept, content)
    return _unpacked(package, content)


def _is_right(package: Package, content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == package.sha512


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            content: bytes = answer.read(LARGEST + 1)
            if len(content) < min(int(answer.headers.get("content-length", 0)), LARGEST):
                raise OSError("the connection broke off")
    except urllib.error.HTTPError as error:
        raise ShrewError(f"{address} answered {error.code} ({error.reason}); check --registry.") from None
    except (OSError, ssl.SSLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ShrewError(f"{address} cannot be reached ({reason}). The browser's ONNX Runtime is fetched once and then "
                         "kept: connect this machine, or name a mirror with --registry.") from None  # fmt: skip
    if len(content) > LARGEST:
        raise ShrewError(f"{address} is larger than {LARGEST:,} bytes, and no package of ours; use another --registry.")
    return content


def _unpacked(package: Package, content: bytes) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        for path, name in package.files.items():
            stream = tar.extractfile(f"package/{path}")
            assert stream is not None  # the hash was right
            found[name] = stream.read()
    return found if "LICENSE" in found else found | {"LICENSE": package.licence.encode("utf-8")}
