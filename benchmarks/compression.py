"""Bytes against divergence: what peers make of a model and what Shrew makes of it, with the same texts and evaluation.

    python benchmarks/compression.py --install --venvs .venv/peers
    python benchmarks/compression.py --venvs .venv/peers --records results/records.jsonl
    python benchmarks/compression.py --venvs .venv/peers --healed --records results/records.jsonl
    python benchmarks/compression.py --show results/records.jsonl --plot docs/compression.svg
    python benchmarks/compression.py --model runs/prose --text VALID --venvs .venv/peers --records results/records.jsonl

The first makes environments, the second some 95 artefacts (two hours of one core; --full has 60 more); --healed trains
some of them, ours and peers' alike (an hour), and --show prints tables and makes the plot from records, computing
nothing.

VENVS holds an environment for each peer (--install makes them from benchmarks/requirements-*.txt), as they cannot share
one; peers/protocol.py says what each is told and what it gives, peers/table.py what is compared. Every artefact is made
in a process of its own from the same bf16 folder and the same calibration rows, and is judged by the numbers its
weights stand for, in float32, on the final split: KL to the original, same first choice, bits per byte, intervals by
document. What a runtime does to activations is apart: `runtime_kl` is how far its logits are from ours with the same
weights (a few rows), and GGUF files, ours among them, are also judged by what llama.cpp itself gives (`deployed`).

Bytes are those of the weight files, less the tokenizer that is in a GGUF file, and of the linear layers alone. Arms
that are done stay in WORK by a hash of all they depend on (of ours, the source files of the moves and formats that they
use), so an interrupted run goes on; --again tries what failed. With --peers, --bits or --only the same artefacts are
made and recorded, but nothing is held against the best peer.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curves import Artefact, compare, latest, picture, summary, table
from peers.table import ADAPTERS, ARMS, OURS, Arm
from safetensors import safe_open
from safetensors.torch import load_file
from sources import reached

from shrew import data, files, folder, record, spec
from shrew.blocks.model import ShrewForCausalLM
from shrew.blocks.stock import stock
from shrew.folder import Loaded
from shrew.folder.check import quiet
from shrew.measure.statistics import interval, paired_bootstrap, ratio_interval
from shrew.moves import MOVES, Source, open_task
from shrew.moves.anatomy import logits
from shrew.record import Record
from shrew.tasks import Scores, Text
from shrew.tasks.likelihood import context_length, first_token
from shrew.tasks.text import compare as diverge

HERE = Path(__file__).parent
LENGTH = 512  # tokens of a row, where the model reads as many
# Of Shrew's source, what a stock model that is given rows of tokens does not meet; shrew.moves only lists the moves.
ASIDE = ("shrew.moves", "shrew.blocks*", "shrew.data*", "shrew.tasks*", "shrew.runtime*")
DENSE = "dense.safetensors"
CHECK = (2, 128)  # rows and tokens on which an artefact's own forward pass is looked at
RANGE = (2, 9)  # bits a weight, scales included, of our artefacts that are held against peers: 2 to 8 bits
RUN = 16384  # tokens at most that a GGUF file is run on, from the beginnings of the documents


@dataclass
class Reference:
    """A model to compress, with what every arm is given and judged by. `place` is its folder of work."""

    name: str
    place: Path
    loaded: Loaded
    task: Text
    rows: np.ndarray
    healing: np.ndarray

    @property
    def source(self) -> Path:
        return self.place / "source"

    @cached_property
    def mark(self) -> list[str]:
        """What artefacts and their scores depend on besides the arm."""
        texts = [item.text for item in self.task.examples("final")]
        rows = [hashlib.sha256(part.tobytes()).hexdigest() for part in (self.rows, self.healing)]
        return [folder.identity(self.source), *rows, spec.digest(texts)]

    @cached_property
    def linear(self) -> dict[str, int]:
        """Weights of each linear layer, the head aside, by the layer's name."""
        head = self.loaded.model.get_output_embeddings()
        return {name: module.weight.numel() for name, module in self.loaded.model.named_modules()
                if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip

    @cached_property
    def beginnings(self) -> list[list[int]]:
        """The first tokens of each document, the token that stands before it included."""
        tokenizer, found, total = self.loaded.tokenizer, [], 0
        length = context_length(self.loaded.model, LENGTH)
        for item in self.task.examples("final"):
            row = [first_token(tokenizer) or 0, *tokenizer.encode(item.text, add_special_tokens=False)][:length]
            if total + len(row) <= RUN or not found:
                found.append(row)
                total += len(row)
        return found


def prepare(name: str, args: argparse.Namespace) -> Reference:
    """The reference's folder, GGUF file, importance matrix and rows; what is there already is used."""
    with quiet():
        loaded = folder.load(name)
    task = open_task(Source(model=name, text=args.text), loaded)
    if not isinstance(task, Text):
        raise SystemExit(f"{name}: this needs text to measure bits per byte on; give --text.")
    task = shortened(task, args.bytes)
    place = args.work / Path(name).name
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(loaded.model, ShrewForCausalLM):
        loaded.model = stock(loaded.model)
    if not (place / "source" / folder.LINEAGE).exists():
        folder.save(replace(loaded, dtype=torch.bfloat16, stored={}), place / "source")
    with quiet():
        loaded = folder.load(place / "source")
    rows = evenly(loaded, task.texts(loaded, "calibration"), args.rows)
    healing = evenly(loaded, task.texts(loaded, "healing"), args.healing)
    reference = Reference(Path(name).name, place, loaded, task, rows, healing)
    for label, part in (("rows", rows), ("healing", healing), ("check", rows[: CHECK[0], : CHECK[1]])):
        np.save(place / f"{label}.npy", part)
    weigh(reference)
    return reference


def shortened(task: Text, most: int) -> Text:
    """The same task with the first documents of its final split alone, about `most` bytes of them."""
    kept, total = [], 0
    for item in task.examples("final"):
        if total >= most:
            break
        kept.append(item)
        total += len(item.text.encode("utf-8"))
    return replace(task, splits=task.splits | {"final": kept})


def evenly(loaded: Loaded, texts: Sequence[str], count: int) -> np.ndarray:
    """[count, length] token ids: the texts one after the other, cut where a row is full."""
    length = context_length(loaded.model, LENGTH)
    found: list[int] = []
    for text in texts:
        if len(found) >= count * length:
            break
        found += data.encode(loaded.tokenizer, [text])[0]
    full = min(count, len(found) // length)
    if not full:
        raise SystemExit(f"the calibration text has fewer than {length} tokens; give more.")
    return np.array(found[: full * length], np.int64).reshape(full, length)


def weigh(reference: Reference) -> None:
    """Write the model as GGUF in float32, and beside it the mean square of what each block's weights are multiplied
    with, as llama-imatrix collects it."""
    from shrew.packers.gguf import Options, write

    file, place = reference.place / "source.gguf", reference.place
    said = place / "importance.json"
    mark = reference.mark[:2]
    if file.exists() and said.exists() and json.loads(said.read_text("utf-8"))["of"] == mark:
        return
    made = write(reference.loaded, file, Options(dense="f32"), lambda line: None)
    wall, cpu = time.perf_counter(), time.process_time()
    found = squares(reference)
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "of": mark}
    named = {item["name"]: found[item["source"]] for item in made["tensors"]
             if item["name"].startswith("blk.") and item["source"] in found}  # fmt: skip
    np.savez(place / "importance.npz", **named)
    files.write_text(said, json.dumps(spent))


def squares(reference: Reference) -> dict[str, np.ndarray]:
    """By the name of each linear layer's weight, the mean square [in] of what comes in with the calibration rows. It is
    no more than llama-imatrix computes, as its time counts as llama.cpp's."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            total = given[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + total if name in sums else total

        return add

    with ExitStack() as hooks, torch.no_grad():
        for name in reference.linear:
            layer = reference.loaded.model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(watch(f"{name}.weight")))
        for row in reference.rows:
            logits(reference.loaded, torch.from_numpy(row)[None])
    return {name: total.numpy() / reference.rows.size for name, total in sums.items()}


# --- one arm ----------------------------------------------------------------------------------------------------------


def outcome(reference: Reference, arm: Arm, args: argparse.Namespace, dense: bool = False) -> dict[str, Any]:
    """What an arm made and how good that is, from WORK if it is there: {"result", "sizes", "scores", ...}, or
    {"cannot"}. `dense`: its dense weights are wanted too, for what is made of them."""
    python = interpreter(arm.peer, args.venvs)
    if not python.exists():
        return {"cannot": f"there is no {python}; --install makes it"}
    place = reference.place / digest(reference, arm)
    kept = place / "arm.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        there = not dense or (place / DENSE).exists() or any(place.glob("artefact/*.gguf"))
        if (there and "cannot" not in found) or ("cannot" in found and not args.again):
            return found
    load, begun = os.getloadavg()[0], time.perf_counter()
    if arm.heal and arm.peer != OURS:
        result = after(reference, arm, place, args)
    else:
        shutil.rmtree(place, ignore_errors=True)
        result = run(reference, arm.peer, arm.settings | healing(arm), place, python, args)
    sizes = result.pop("sizes", None)
    if "cannot" not in result:
        result = judged(reference, arm, place, result, args, sizes)
    result |= {"load": load, "took": time.perf_counter() - begun}
    files.write_text(kept, json.dumps(result))
    for part in ("checked.npy", "logits.npy", "run", "start", "cache", *([] if dense else [DENSE])):
        path = place / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return result


def healing(arm: Arm) -> dict[str, Any]:
    """The settings of ours with the healing behind its moves."""
    return {"moves": [*arm.settings["moves"], arm.heal]} if arm.heal else {}


def after(reference: Reference, arm: Arm, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's artefact, made by the peer or found, and then healed by us. It keeps its format, and so its size."""
    before = replace(arm, healed=False, heal=None, grid=None)
    found = outcome(reference, before, args, dense=True)
    if "cannot" in found:
        return {"cannot": found["cannot"]}
    base = reference.place / digest(reference, before)
    shutil.rmtree(place, ignore_errors=True)
    start = next(iter(sorted((base / "artefact").glob("*.gguf"))), base / DENSE)
    settings = {"start": str(start.resolve()), "grid": arm.grid, "moves": [arm.heal], "gguf": start.suffix == ".gguf"}
    result = run(reference, OURS, settings, place, Path(sys.executable), args)
    for name in ("seconds", "cpu_seconds"):
        if name in result:
            result[name] += found["result"][name]
    return result | {"sizes": found["sizes"]}


def interpreter(peer: str, venvs: Path) -> Path:
    return Path(sys.executable) if peer == OURS else venvs / ADAPTERS[peer] / "bin" / "python"


def digest(reference: Reference, arm: Arm) -> str:
    """The hash of everything that the outcome of an arm hangs on; of ours, the code as well."""
    uses = [move["name"] for move in arm.settings["moves"]] if arm.peer == OURS else []
    packs = bool(arm.settings.get("gguf")) or (arm.heal is not None and arm.peer != OURS)
    marks = [files.sha256(HERE / "peers" / name) for name in ("protocol.py", f"{ADAPTERS[arm.peer]}_peer.py")]
    more: list[Any] = []
    if arm.heal:
        uses.append(arm.heal["name"])
        more = [arm.heal, arm.grid, *(files.sha256(HERE / "peers" / name) for name in ("shrew_peer.py", "uniform.py"))]
    if uses:
        more.append(code(tuple(uses), packs))
    return spec.digest([arm.peer, arm.settings, reference.mark, marks, *more])[:24]


@cache
def code(moves: tuple[str, ...], packs: bool) -> str:
    """The hash of the source files that these moves, folders and, where one `packs`, GGUF files are made with."""
    roots = ["shrew.folder", *(["shrew.packers.gguf"] if packs else []), *(MOVES[name].__module__ for name in moves)]
    return spec.digest([files.sha256(path) for path in reached(roots, ASIDE)])


def run(reference: Reference, peer: str, settings: dict[str, Any], place: Path, python: Path,
        args: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """Have an adapter do a job in `place`, and return its result; what it prints is in `said.txt`."""
    place.mkdir(parents=True, exist_ok=True)
    for name in ("rows", "healing", "check"):
        (place / f"{name}.npy").unlink(missing_ok=True)
        (place / f"{name}.npy").symlink_to((reference.place / f"{name}.npy").resolve())
    job = {"model": str(reference.source.resolve()), "gguf": str((reference.place / "source.gguf").resolve()),
           "settings": settings, "threads": args.threads}  # fmt: skip
    (place / "job.json").write_text(json.dumps(job), "utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                                "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
    if peer != OURS:
        environment.pop("PYTHONPATH", None)
    command = [str(python), str(HERE / "peers" / f"{ADAPTERS[peer]}_peer.py"), str(place.resolve())]
    said = place / "said.txt"
    with said.open("w", encoding="utf-8") as stream:
        try:
            subprocess.run(command, env=environment, stdout=stream, stderr=stream, timeout=args.limit, check=False,
                           cwd=place)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"cannot": f"not done after {args.limit} seconds"}
    if not (place / "result.json").exists():
        return {"cannot": " ".join(said.read_text("utf-8", "replace").split())[-300:] or "it ended without a word"}
    found: dict[str, Any] = json.loads((place / "result.json").read_text("utf-8"))
    return found


def judged(reference: Reference, arm: Arm, place: Path, result: dict[str, Any], args: argparse.Namespace,
           known: dict[str, int] | None = None) -> dict[str, Any]:  # fmt: skip
    """Sizes (unless they are known) and scores of what an adapter left; an artefact that cannot be read is one that
    cannot be made."""
    try:
        made = meant(reference, place)
        found = {"result": result, "sizes": known or sizes(reference, place / "artefact", result)}
        found["scores"] = reference.task.score(made, "final", reference.loaded).dump()
    except Exception as error:
        return {"cannot": f"the artefact cannot be read: {type(error).__name__}: {error}"}
    if (place / "checked.npy").exists():
        own = torch.from_numpy(np.load(place / "checked.npy"))
        with torch.inference_mode():
            exact = made.model(input_ids=torch.from_numpy(np.load(place / "check.npy"))).logits.float()
        exact, own = exact.flatten(0, 1), own.flatten(0, 1)
        found["runtime_kl"] = diverge(exact, own)[0] / len(own) / math.log(2)
    for file in (place / "artefact").glob("*.gguf"):
        found["deployed"] = deployed(reference, place / "run", file, args)
    return found


def meant(reference: Reference, place: Path) -> Loaded:
    """The model that an artefact's numbers say, in float32."""
    with quiet():
        if (place / "artefact" / "model" / folder.LINEAGE).exists():
            return folder.load(place / "artefact" / "model")
        for file in (place / "artefact").glob("*.gguf"):
            from shrew.packers.gguf.back import read

            return replace(read(file)[0], tokenizer=reference.loaded.tokenizer)
        made = folder.load(reference.source)
    with torch.no_grad():
        for name, value in load_file(place / DENSE).items():
            made.model.get_parameter(name).copy_(value)
    return made


def sizes(reference: Reference, artefact: Path, result: dict[str, Any]) -> dict[str, int]:
    """Bytes of the weight files, and of the linear layers in them."""
    dense = {name: tensor.numel() * 2 for name, tensor in reference.loaded.model.named_parameters()}
    if "linear_bytes" in result:
        rest = sum(size for name, size in dense.items() if name.removesuffix(".weight") not in reference.linear)
        return {"bytes": result["linear_bytes"] + rest, "linear_bytes": result["linear_bytes"]}
    total = linear = 0
    for file in sorted(artefact.rglob("*.safetensors")):
        total += file.stat().st_size
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (it is no dict)
                if any(name.startswith(f"{layer}.") for layer in reference.linear):
                    tensor = stream.get_tensor(name)
                    linear += tensor.numel() * tensor.element_size()
    for file in artefact.glob("*.gguf"):
        import gguf

        reader = gguf.GGUFReader(file)
        words = sum(part.nbytes for name, field in reader.fields.items() if name.startswith("tokenizer.")
                    for part in field.parts)  # fmt: skip
        total += file.stat().st_size - words
        linear += sum(int(item.n_bytes) for item in reader.tensors
                      if item.name.startswith("blk.") and len(item.shape) > 1)  # fmt: skip
    if not total:
        raise ValueError("there are no weights in it")
    return {"bytes": total, "linear_bytes": linear}


def deployed(reference: Reference, place: Path, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """KL and equal first choices of what llama.cpp gives, by document, on the documents' beginnings."""
    python = interpreter("llama.cpp", args.venvs)
    if not python.exists():
        return {"cannot": f"there is no {python}"}
    place.mkdir(exist_ok=True)
    (place / "texts.json").write_text(json.dumps(reference.beginnings), "utf-8")
    result = run(reference, "llama.cpp", {"run": str(file.resolve())}, place, python, args)
    if "cannot" in result:
        return result
    given, low = np.load(place / "logits.npy", mmap_mode="r"), 0
    columns: dict[str, list[float]] = {"kl_bits": [], "agree": [], "tokens": []}
    for row in reference.beginnings:
        with torch.inference_mode():
            exact = reference.loaded.model(input_ids=torch.tensor([row])).logits[0].float()
        kl, agree = diverge(exact, torch.from_numpy(np.array(given[low : low + len(row)])))
        for name, value in (("kl_bits", kl / math.log(2)), ("agree", agree), ("tokens", len(row))):
            columns[name].append(float(value))
        low += len(row)
    return columns


# --- records ----------------------------------------------------------------------------------------------------------


def fact(reference: Reference, arm: Arm, found: dict[str, Any], original: Any) -> Record:
    """An arm's record: KL a token with all else in its detail; or why it could not be made."""
    common: dict[str, Any] = {"run": "compression", "model": f"{reference.name}, {arm.name}", "seed": 0,
                              "task": f"{reference.task.label}/final"}  # fmt: skip
    about = {"peer": arm.peer, "settings": arm.settings, "alone": arm.alone, "healed": arm.healed, "stock": arm.stock,
             "heal": arm.heal}  # fmt: skip
    if "cannot" in found:
        return Record(**common, metric="cannot", value=found["cannot"], detail=about)
    scores = Scores.parse(found["scores"])
    kl, same = (ratio_interval(scores, top, "tokens") for top in ("kl_bits", "agree"))
    own, kept = interval(scores), paired_bootstrap(original, scores)
    detail = about | found["sizes"] | found["result"] | {
        "bits_per_weight": 8 * found["sizes"]["linear_bytes"] / sum(reference.linear.values()),
        "top1_agreement": [same.value, same.low, same.high], "bits_per_byte": [own.value, own.low, own.high],
        "retention": [kept.value, kept.low, kept.high], "runtime_kl": found.get("runtime_kl"), "load": found["load"],
    }  # fmt: skip
    run = found.get("deployed", {})
    if "kl_bits" in run:
        detail["deployed_kl"] = sum(run["kl_bits"]) / sum(run["tokens"])
        detail["deployed_top1_agreement"] = sum(run["agree"]) / sum(run["tokens"])
    return Record(**common, metric="kl", value=kl.value, low=kl.low, high=kl.high, unit="bits/token", n=scores.n,
                  detail=detail)  # fmt: skip


Found = list[tuple[Arm, dict[str, Any]]]


def verdicts(reference: Reference, done: Found) -> Iterator[Record]:
    """Ours against the best peer: whole files, linear layers alone, and GGUF files inside llama.cpp; then ours healed
    against what peers have, healed or not, as some of theirs cannot be."""
    made = [(arm, found) for arm, found in done if "cannot" not in found]
    weights = {"linear_bytes": sum(reference.linear.values()),
               "bytes": sum(tensor.numel() for tensor in reference.loaded.model.parameters())}  # fmt: skip

    def points(size: str, wanted: Callable[[Arm], bool], inside: bool = False) -> list[Artefact]:
        found = [(arm, item["sizes"][size], item.get("deployed", {}) if inside else item["scores"]["columns"])
                 for arm, item in made if wanted(arm)]  # fmt: skip
        low, high = (weights[size] * bits / 8 for bits in RANGE)
        return [Artefact(arm.name, total, np.array(columns["kl_bits"]), np.array(columns["tokens"]))
                for arm, total, columns in found if "kl_bits" in columns
                and (arm.peer != OURS or low <= total < high)]  # fmt: skip

    tables: dict[str, tuple[str, Callable[[Arm], bool], bool]] = {
        "whole file": ("bytes", lambda arm: True, False),
        "linear layers": ("linear_bytes", lambda arm: arm.alone, False),
        "GGUF in llama.cpp": ("bytes", lambda arm: arm.stock or arm.peer == "llama.cpp", True),
    }
    for trained, (label, (size, wanted, inside)) in itertools.product((False, True), tables.items()):
        ours = points(size, lambda arm, keep=wanted, trained=trained: keep(arm) and arm.peer == OURS
                      and arm.healed == trained, inside)  # fmt: skip
        theirs = points(size, lambda arm, keep=wanted, trained=trained: keep(arm) and arm.peer != OURS
                        and arm.healed <= trained, inside)  # fmt: skip
        if found := compare(ours, theirs):
            name = f"{label}, all healed" if trained else label
            peers = sorted({arm.peer for arm, _ in made if arm.name in {item.name for item in theirs}})
            yield Record(run="compression", model=f"{reference.name}, {OURS}", metric="kl_over_best_peer", seed=0,
                         value=found.value, low=found.low, high=found.high, n=len(found.sizes),
                         task=f"{reference.task.label}/final",
                         detail={"table": name, "sizes": found.sizes, "unbeaten": found.unbeaten,
                                 "peers": peers})  # fmt: skip


def install(args: argparse.Namespace) -> None:
    """An environment for each peer that has none; one that fails leaves its error on the screen and no interpreter."""
    for peer in args.peers:
        place = args.venvs / ADAPTERS[peer]
        if peer == OURS or (place / "bin" / "python").exists():
            continue
        requirements = HERE / f"requirements-{ADAPTERS[peer]}.txt"
        print(f"Making {place} from {requirements.name}.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        done = subprocess.run([str(place / "bin" / "pip"), "install", "--quiet", "-r", str(requirements)], check=False)
        if done.returncode:
            shutil.rmtree(place)


def common(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that has adapters work on a reference."""
    parser.add_argument("--work", type=Path, default=Path("runs/compression"), help="folder for all that is made")
    parser.add_argument("--venvs", type=Path, default=Path(".venv/peers"))
    parser.add_argument("--model", default="starter", help="model folder; 'starter' is the one that ships")
    parser.add_argument("--text", action="append", default=[], help="text that the model has not been trained on")
    parser.add_argument("--rows", type=int, default=128, help=f"calibration rows of {LENGTH} tokens")
    parser.add_argument("--healing", type=int, default=2000, help="healing rows, for arms that heal")
    parser.add_argument("--bytes", type=int, default=400_000, help="of the final split, about so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=7200, help="seconds for one arm")
    parser.add_argument("--records", type=Path, help="JSONL file that the records are added to")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common(parser)
    parser.add_argument("--install", action="store_true", help="make the environments that are missing, and end")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(ADAPTERS), help="of these alone")
    parser.add_argument("--bits", type=lambda text: [int(one) for one in text.split(",")], help="of these bits alone")
    parser.add_argument("--only", default="", help="arms whose name holds this alone")
    parser.add_argument("--full", action="store_true", help="arms too that the tables can do without")
    parser.add_argument("--healed", action="store_true", help="those that train, instead of those that do not")
    parser.add_argument("--quick", action="store_true", help="16 calibration rows, 20 kB, 4 bits: to see that it runs")
    parser.add_argument("--again", action="store_true", help="try again what could not be made")
    parser.add_argument("--show", type=Path, help="make nothing: print the tables of these records")
    parser.add_argument("--every", action="store_true", help="print every artefact, not ours beside peers alone")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    args = parser.parse_args()
    if unknown := [peer for peer in args.peers if peer not in ADAPTERS]:
        parser.error(f"no peer is called {unknown[0]}; known: {', '.join(ADAPTERS)}.")
    if args.quick:
        args.rows, args.healing, args.bytes, args.bits = 16, 16, 20_000, args.bits or [4]
    return args


def chosen(args: argparse.Namespace) -> list[Arm]:
    """The arms that the flags name."""
    return [arm for arm in ARMS if arm.peer in args.peers and args.only in arm.name
            and (args.bits is None or arm.bits in args.bits) and (args.full or not arm.extra)
            and arm.healed == args.healed]  # fmt: skip


def whole(args: argparse.Namespace) -> bool:
    """Whether --peers, --bits and --only leave no arm out, so that the best peer is the best of all."""
    every = {"peers": list(ADAPTERS), "bits": None, "only": ""}
    return chosen(args) == chosen(argparse.Namespace(**vars(args) | every))


def left(reference: Reference, arms: list[Arm], args: argparse.Namespace) -> str:
    """About how long these arms take, those that are done left out."""
    places = [reference.place / digest(reference, arm) / "arm.json" for arm in arms]
    seconds = sum(arm.seconds for arm, place in zip(arms, places, strict=True) if args.again or not place.exists())
    return f"about {seconds / 60:.0f} minutes left"


def show(records: list[Record], args: argparse.Namespace) -> None:
    print(table(records) if args.every else summary(records))
    if args.plot:
        files.write_text(args.plot, picture(records))


def main() -> int:
    args = parsed()
    if args.install:
        install(args)
        return 0
    if args.show:
        show(latest(record.read(args.show)), args)
        return 0
    torch.set_num_threads(args.threads)
    reference = prepare(args.model, args)
    arms = chosen(args)
    original = reference.task.score(reference.loaded, "final")
    print(f"{len(arms)} arms, {left(reference, arms, args)}", file=sys.stderr, flush=True)
    done: Found = []
    records = []
    followed = {arm.name.removesuffix(", healed") for arm in ARMS if arm.grid}
    for number, arm in enumerate(arms, 1):
        done.append((arm, outcome(reference, arm, args, arm.name in followed)))
        records.append(fact(reference, *done[-1], original))
        told = str(records[-1].value) if records[-1].metric == "cannot" else f"KL {records[-1].value:.4g}"
        print(f"{number} of {len(arms)}: {arm.name}: {told}; {left(reference, arms[number:], args)}", file=sys.stderr,
              flush=True)  # fmt: skip
    if args.healed:  # peers' others as far as they lie there
        done += [(arm, json.loads(file.read_text("utf-8"))) for arm in ARMS if arm.peer != OURS and not arm.healed
                 and (file := reference.place / digest(reference, arm) / "arm.json").exists()]  # fmt: skip
    if whole(args):
        records += verdicts(reference, done)
    else:
        print("Nothing is said of the best peer: --peers, --bits or --only left arms out.", file=sys.stderr)
    place = reference.place / ("healed" if args.healed else "made")
    files.write_text(place.with_suffix(".md"), summary(records) + "\n" + table(records))
    record.write(place.with_suffix(".jsonl"), records)
    show(records, args)
    if args.records:
        record.append(args.records, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
