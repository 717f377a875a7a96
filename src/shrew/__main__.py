"""The command line: one table of verbs, imported only when asked for, and every expected failure as one sentence."""

import errno
import hashlib
import importlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from shrew.errors import MissingExtraError, ShrewError, UsageError, nearest

VERBS = {
    "shrink": ("shrew.search", "find the smallest model that still does the job, and prove it"),
    "apply": ("shrew.moves", "run the moves of a recipe on a model folder"),
    "measure": ("shrew.measure", "compare models: quality, bytes, speed, memory, energy"),
    "audit": ("shrew.audit", "what a model file of any tool really holds, and what it lost"),
    "scan": ("shrew.scan", "find functions that may be vulnerable, by rules and a small model"),
    "train": ("shrew.train", "train a small model from a recipe, with exact resume"),
    "complete": ("shrew.runtime.complete", "let a model go on with a text"),
    "chat": ("shrew.runtime.chat", "talk with a model in the terminal"),
    "serve": ("shrew.runtime.server", "serve models over HTTP, to OpenAI's clients and a page"),
    "pack": ("shrew.packers", "write a model in the form that another program runs"),
    "describe": ("shrew.blocks.describe", "print what a model is made of and what it costs"),
    "patch": ("shrew.blocks.patches.show", "show how a text is cut into patches, and how hard its bytes are to tell"),
    "report": ("shrew.report", "make the page of a run from its records"),
}

# Set before torch or a tokenizer is imported; whatever the user has set stays. Idle OpenMP threads that spin cost up to
# forty times on a shared machine; the rest keeps libraries from writing between our own lines.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

FULL = (errno.ENOSPC, errno.EDQUOT)
PROTECTED = (errno.EACCES, errno.EPERM, errno.EROFS)
STOPPED = 130  # as shells say of what Ctrl-C has ended: neither a result (1) nor bad usage (2)


def help_text(color: bool = False) -> str:
    """What `shrew --help` prints."""
    bold, plain = ("\x1b[1m", "\x1b[0m") if color else ("", "")
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {bold}{verb:<{width}}{plain}{line}" for verb, (_, line) in VERBS.items())
    return (
        f"{bold}shrew{plain}: finds the smallest language model that still does your job, and proves it.\n\n"
        f"usage: shrew VERB ...\n\n{verbs}\n\n"
        "`shrew VERB --help` explains a verb; `shrew --version` says which Shrew this is.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 failed or floor not met, 2 bad usage or input, 130 stopped."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        before = signal.signal(signal.SIGTERM, _stop)
    except ValueError:  # not in the main thread, where signals cannot be caught
        before = None
    try:
        code = _run(arguments)
        sys.stdout.flush()  # so that a closed pipe shows here
        return code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        return 1
    except (Exception, KeyboardInterrupt) as error:
        told = explain(error)
        if told is None or os.environ.get("SHREW_DEBUG") == "1":
            raise
        sentence, code = told
        print(f"shrew: {sentence}", file=sys.stderr)
        return code
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    match arguments:
        case []:
            print(help_text(), end="", file=sys.stderr)
            return 2
        case ["-h" | "--help" | "help", *_]:
            print(help_text(sys.stdout.isatty() and "NO_COLOR" not in os.environ), end="")
            return 0
        case ["--version" | "-V", *_]:
            print(f"shrew {importlib.metadata.version('shrew')}")
            return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UsageError(f"unknown verb '{verb}'; {nearest(verb, VERBS)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    home = VERBS[verb][0]
    if home.startswith("shrew.runtime"):
        rest = _with_packs(rest, most=len(rest) if verb == "serve" else 1)
    code: int = importlib.import_module(home).main(rest)
    return code


def _with_packs(words: list[str], most: int) -> list[str]:
    """The words of a command with the first `most` models in it packed; a prompt may be named like a folder."""
    found = list(words)
    for at, word in enumerate(words):
        found[at] = _packed(word)
        most -= found[at] != word or os.path.exists(os.path.join(word, "pack.json"))  # noqa: PTH110, PTH118
        if most < 1:
            break
    return found


def _packed(word: str) -> str:
    """The packed form of a model folder (or of 'starter'), made in the cache if it is not there; other words stay.

    The runtime takes packed folders only and could not make one: it knows neither torch nor our blocks.
    """
    place = Path(__file__).parent / "models" / word if word == "starter" else Path(word)
    # os.path, because a text that is too long for a path is no error there
    if not os.path.isfile(place / "config.json") or os.path.exists(place / "pack.json"):  # noqa: PTH110, PTH113
        return word
    from shrew import files

    parts = [f"{item.name} {files.sha256(item)}" for item in sorted(place.iterdir()) if item.is_file()]
    key = hashlib.sha256("\n".join([importlib.metadata.version("shrew"), *parts]).encode()).hexdigest()
    packed = files.cache_folder() / "packs" / f"{place.resolve().name}-{key[:16]}"
    if not (packed / "pack.json").exists():
        print(f"shrew: {word} is no packed folder; packing it into {packed}, once.", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "shrew", "pack", word, "--out", str(packed)]
        if code := subprocess.run(command, stdout=sys.stderr, check=False).returncode:  # a process of its own, because
            raise SystemExit(code)  # torch would stay in this one's memory
    return str(packed)


def explain(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit code for an expected failure; None for one that is a bug."""
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    match error:
        case KeyboardInterrupt():
            return "stopped; run the same command again to go on.", STOPPED
        case ShrewError():
            return str(error), error.exit_code
        case ModuleNotFoundError() if extra := extra_of((error.name or "").partition(".")[0]):
            missing = MissingExtraError(install_hint(str(error.name), extra))
            return str(missing), missing.exit_code
    # safetensors and torch report a full disk or memory as errors of their own, with the system's words inside
    if number in FULL or "No space left" in text or "PytorchStreamWriter failed" in text:
        return f"the disk is full{where}; nothing half-written was kept: free some space and run it again.", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "not enough memory for this model; use a smaller batch or a smaller model, or close other programs.", 1
    if isinstance(error, OSError) and number in PROTECTED:
        return f"{error.filename or text} cannot be read or written; check its permissions or choose another place.", 2
    if isinstance(error, OSError):
        return f"{text.rstrip('.')}; set SHREW_DEBUG=1 to see where this came from.", 2 if error.filename else 1
    return None


def extra_of(module: str) -> str | None:
    """The optional extra of this package that installs `module`, read from the package's own metadata."""
    for line in importlib.metadata.requires("shrew") or []:
        match = re.match(r"([\w.-]+).*\bextra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match and match[1].replace("-", "_") == module:
            return match[2]
    return None


def install_hint(module: str, extra: str) -> str:
    """The one command that adds a missing extra."""
    hint = f"this needs '{module}', which is not installed; run: pip install 'shrew[{extra}]'"
    if extra == "torch":
        hint += " (a machine without a GPU: first pip install torch --index-url https://download.pytorch.org/whl/cpu)"
    return hint


if __name__ == "__main__":
    sys.exit(main())
