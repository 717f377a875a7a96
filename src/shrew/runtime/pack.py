"""A packed folder in memory: the graph in ONNX Runtime with its weights mapped, the manifest, the tokenizer."""

import gzip
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from shrew import machine
from shrew.errors import FolderError, RequestError, UnsupportedError, UsageError
from shrew.runtime import coded
from shrew.runtime import manifest as manifests
from shrew.runtime.manifest import Manifest

UNUSED = {"start"}  # inputs that a graph need not have: some mixers do not ask where a token stands
ROUNDS, CALLS = 4, 10
FASTER = 1.1  # times as fast must more threads be to be worth the cores they keep from others
LARGEST_TOKENIZER = 256 << 20  # bytes, unpacked; those of the largest vocabularies have a seventh
ROWS = 8  # texts classified in one call
# Threads that fall asleep after every product lose a third of two threads' speed; those that spin as long as they like
# take the processor from everyone else, and on a shared machine from each other. The time between two products does.
SETTINGS = {"session.intra_op.allow_spinning": "1", "session.intra_op.spin_duration_us": "20",
            "session.force_spinning_stop": "1"}  # fmt: skip
# Read when a graph is opened. Tiled attention needs little memory for whole texts, but for the one or few new tokens of
# a call it took 1.3 to 2 times as long as the plain one (contexts of 64 to 2,048, AVX-512).
PLAIN_ATTENTION = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is ready to run. It is never written to: engines and threads may share it."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    graph: onnxruntime.InferenceSession
    threads: int

    def classify(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [texts, labels]: the logits of each text, given as token ids.

        Raises UnsupportedError for a model that completes, RequestError for an empty or over-long text.
        """
        if self.manifest.labels is None:
            raise UnsupportedError(f"{self.path.name} is a {self.manifest.kind}; it has no labels to choose from.")
        for number, text in enumerate(texts):
            check_tokens(self.manifest, text, self.manifest.context, f"text {number}")
        logits = np.empty((len(texts), len(self.manifest.labels)), np.float32)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # so that little is padded
        for first in range(0, len(order), ROWS):
            numbers = order[first : first + ROWS]
            tokens = np.full((len(numbers), len(texts[numbers[-1]])), self.manifest.pad or 0, np.int64)
            for row, number in enumerate(numbers):
                tokens[row, : len(texts[number])] = texts[number]
            lengths = np.array([len(texts[number]) for number in numbers], np.int64)
            logits[numbers] = self.graph.run(["logits"], {"tokens": tokens, "lengths": lengths})[0]
        return logits


def check_tokens(manifest: Manifest, tokens: Sequence[int], most: int, what: str) -> None:
    """Raises RequestError unless there are 1 to `most` tokens, all within the vocabulary."""
    if not tokens:
        raise RequestError(f"The {what} is empty; give it at least one token.")
    if len(tokens) > most:
        raise RequestError(f"The {what} has {len(tokens):,} tokens and at most {most:,} fit; shorten it.")
    if not 0 <= min(tokens) <= max(tokens) < manifest.vocabulary:
        raise RequestError(f"The {what} has a token outside the vocabulary of {manifest.vocabulary:,}.")


def load(path: str | Path, threads: int | None = None, verify: bool = True) -> Model:
    """The packed model in the folder `path`. With `verify`, every file is read once to check its hash.

    Raises FolderError for anything that is wrong with the folder, UsageError for fewer threads than one.
    """
    folder = Path(path)
    manifest = manifests.read(folder, verify)
    weights = _decoded(folder, manifest)
    try:
        count = _threads(threads, manifest, folder, weights)
        with machine.large_pages():
            graph = open_graph(folder / manifests.GRAPH, count, weights, whole=manifest.kind != "causal")
        tokenizer = _tokenizer(folder, manifest)
    except UsageError:
        raise
    except Exception as error:  # both libraries raise bare Exceptions of many kinds
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise FolderError(f"{folder} cannot be loaded ({reason}); pack the model again.") from None
    model = Model(folder, manifest, tokenizer, graph, count)
    _check_graph(model)
    return model


def _tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Raises what gzip and tokenizers raise, ValueError for one that unpacks to more than any tokenizer has."""
    if manifests.SQUEEZED not in manifest.files:
        return Tokenizer.from_file(str(folder / manifests.TOKENIZER))
    packed = folder / manifests.SQUEEZED
    with gzip.open(packed) as stream:
        content = stream.read(LARGEST_TOKENIZER + 1)
    if len(content) > LARGEST_TOKENIZER:
        raise ValueError(f"{packed.name} is too large for a tokenizer")
    return Tokenizer.from_buffer(content)


def _decoded(folder: Path, manifest: Manifest) -> bytearray | None:
    """What `model.bin` would hold, where it is stored coded. Raises FolderError."""
    return coded.restore(folder / manifests.CODED) if manifests.CODED in manifest.files else None


def open_graph(
    path: Path, threads: int, weights: bytearray | None = None, whole: bool = False
) -> onnxruntime.InferenceSession:
    """A graph on the CPU, its weights mapped, or those in `weights`; of `whole` texts or of some tokens at a time.
    Raises what ONNX Runtime raises."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what fails is raised, and said in our words
    options.enable_mem_pattern = False  # a plan would be kept for each shape, and shapes change all the time
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if weights is not None:
        options.add_external_initializers_from_files_in_memory([manifests.DATA], [weights], [len(weights)])
    before = os.environ.get(PLAIN_ATTENTION)
    if before is None and not whole:
        os.environ[PLAIN_ATTENTION] = "1"
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    finally:
        if before is None:
            os.environ.pop(PLAIN_ATTENTION, None)


def _threads(requested: int | None, manifest: Manifest, folder: Path, weights: bytearray | None) -> int:
    """As requested, as OMP_NUM_THREADS says, or the faster of one and one for each core, tried out once a day.

    Raises UsageError below 1.
    """
    if requested is not None and requested < 1:
        raise UsageError(f"{requested} threads cannot work; ask for 1 or more.")
    said = os.environ.get("OMP_NUM_THREADS", "")
    chosen = requested or (int(said) if said.isdecimal() and int(said) else 0)
    if chosen or (cores := machine.usable_cores()) == 1:
        return chosen or 1
    key = f"packed {manifest.files[manifests.GRAPH].sha256}, {cores} threads, onnxruntime {onnxruntime.__version__}"
    one, many = machine.remember(key, lambda: _step_seconds(manifest, folder, (1, cores), weights))
    return cores if many * FASTER < one else 1


def _step_seconds(manifest: Manifest, folder: Path, counts: Sequence[int], weights: bytearray | None) -> list[float]:
    """Seconds of a call with one token at each number of threads, the best of interleaved rounds; of a text of a full
    chunk for a model that does not go token by token."""
    length = 1 if manifest.kind == "causal" else min(manifest.chunk, manifest.context)
    feeds: dict[str, np.ndarray] = {"tokens": np.zeros((1, length), np.int64), "lengths": np.array([length]),
                                    "start": np.zeros(1, np.int64), "wanted": np.zeros(1, np.int64)}  # fmt: skip
    for state in manifest.states:
        feeds[f"past.{state.name}"] = np.zeros((1, *state.sized(1)), state.dtype)
    whole = manifest.kind != "causal"
    graphs = [open_graph(folder / manifests.GRAPH, count, weights, whole) for count in counts]
    given = {item.name: feeds[item.name] for item in graphs[0].get_inputs()}
    best = [float("inf")] * len(graphs)
    for _ in range(ROUNDS):
        for at, graph in enumerate(graphs):
            start = time.perf_counter()
            for _ in range(CALLS):
                graph.run(["logits"], given)
            best[at] = min(best[at], (time.perf_counter() - start) / CALLS)
    return best


def _check_graph(model: Model) -> None:
    """Raises FolderError unless the graph takes and gives what the manifest says."""
    manifest, batch, length = model.manifest, "batch", "length"
    types = {"float32": "tensor(float)"} | {name: f"tensor({name})" for name in ("int64", "int8", "uint8")}
    ints, floats = types["int64"], types["float32"]
    gives: dict[str, tuple[str, tuple[int | str, ...]]]
    takes: dict[str, tuple[str, tuple[int | str, ...]]] = {"tokens": (ints, (batch, length))}
    if manifest.labels is not None:
        takes |= {"lengths": (ints, (batch,))}
        gives = {"logits": (floats, (batch, len(manifest.labels)))}
    elif manifest.families is not None:
        takes |= {"lengths": (ints, (batch,))}
        gives = {"logits": (floats, (batch,)), "families": (floats, (batch, len(manifest.families))),
                 "lines": (floats, (batch, length))}  # fmt: skip
    else:
        takes |= {"start": (ints, (batch,)), "wanted": (ints, ("n",))}
        gives = {"logits": (floats, ("n", manifest.vocabulary)), "hidden": (floats, ("n", manifest.width))}
        for state in manifest.states:
            is_like = (types[state.dtype], (batch, *state.shape))
            takes[f"past.{state.name}"] = gives[f"next.{state.name}"] = is_like
    for what, said, found in (
        ("takes", takes, model.graph.get_inputs()),
        ("gives", gives, model.graph.get_outputs()),
    ):
        if names := sorted((said.keys() ^ {item.name for item in found}) - UNUSED):
            raise FolderError(f"{model.path}: its graph {what} other things than {manifests.NAME} says ({names[0]}).")
        for item in found:
            kind, shape = said[item.name]
            if item.type != kind or not _fits(item.shape, shape):
                raise FolderError(
                    f"{model.path}: its graph {what} {item.name} as {item.type} {item.shape}, "
                    f"which is not what {manifests.NAME} says; pack the model again."
                )


def _fits(found: Sequence[int | str | None], said: Iterable[int | str]) -> bool:
    """Whether a graph's shape can be the one said: numbers equal numbers, and what varies has a name or none."""
    said = list(said)
    return len(found) == len(said) and all(
        not isinstance(size, int) if isinstance(want, str) else size == want or (not isinstance(size, int))
        for size, want in zip(found, said, strict=True)
    )

