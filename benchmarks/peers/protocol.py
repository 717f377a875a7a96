"""What benchmarks/compression.py and the adapter of a peer say to each other; imported inside the peer's environment.

`PYTHON ADAPTER.py JOB` finds in the folder JOB

- `job.json`: {"model": a plain Hugging Face folder, "gguf": the same in float32 as GGUF, "settings": what the arm says,
  "threads": N};
- `rows.npy` int64 [rows, length]: token ids to calibrate on; `healing.npy`: more of them, for arms that heal;
- `check.npy` int64 [rows, length]: token ids to show the artefact's own forward pass on.

It leaves there

- `artefact/`: the files that one would ship;
- `dense.safetensors`: every weight that changed, as the artefact's numbers say it, under its name in the model
  (a GGUF artefact needs none: its reader is gguf's);
- `checked.npy` float32 [rows, length, vocabulary]: the artefact's logits, where its own runtime gives any on a CPU;
- `result.json`: {"seconds", "cpu_seconds", "peak_bytes", "loaded_bytes", "versions", "linear_bytes": only where nothing
  packs the weights on a CPU and their bytes are counted by arithmetic, "note"}, or {"cannot": the error}.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Job:
    folder: Path
    model: str
    gguf: str
    settings: dict[str, Any]
    threads: int
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def artefact(self) -> Path:
        path = self.folder / "artefact"
        path.mkdir(exist_ok=True)
        return path

    def rows(self, name: str = "rows") -> np.ndarray:
        return np.asarray(np.load(self.folder / f"{name}.npy"))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around what compresses: from the loaded model to the files, without loading it."""
        self.result["loaded_bytes"] = peak()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.result |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
                        "peak_bytes": peak()}  # fmt: skip

    def keep(self, weights: dict[str, Any]) -> None:
        """Write the dense weights, torch tensors by name."""
        import torch
        from safetensors.torch import save_file

        exact = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
        save_file(exact, self.folder / "dense.safetensors")

    def check(self, model: Any) -> None:
        """Write the logits of a torch model on the rows of the check."""
        import torch

        with torch.inference_mode():
            found = [model(input_ids=torch.from_numpy(row)[None]).logits[0].float() for row in self.rows("check")]
        np.save(self.folder / "checked.npy", torch.stack(found).numpy())


def peak() -> int:
    """Bytes of memory that this program held at most so far. Linux's rusage also counts what it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text("ascii", "replace").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions(*names: str) -> dict[str, str]:
    return {name: version(name) for name in names}


def load(job: Job, dtype: str = "auto") -> Any:
    """The model as transformers loads it, in the dtype of the folder or another; chance is seeded."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()


def layers(model: Any) -> dict[str, Any]:
    """The linear layers of a model by name, its head aside."""
    import torch

    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head}  # fmt: skip


def serve(work: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job that the command line names. What libraries print goes to stderr; an error becomes the result."""
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    said = json.loads((folder / "job.json").read_text("utf-8"))
    job = Job(folder, said["model"], said["gguf"], said["settings"], said["threads"])
    try:
        job.result |= work(job)
    except Exception as error:
        traceback.print_exc()
        job.result = {"cannot": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    part = folder / "result.json.part"
    part.write_text(json.dumps(job.result), "utf-8")
    part.replace(folder / "result.json")
