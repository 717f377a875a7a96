"""llama.cpp's own quantizer with an importance matrix, and its runtime.

Settings: `type`, a name of its file types; `embeddings`, the type of embeddings and head if not the one it chooses;
`imatrix`. Or `run`, a GGUF file whose logits on the rows of `texts.json` go to `logits.npy`, float32 [all tokens, V].

llama-imatrix, which is no part of the binding, keeps the mean square of each column of what each block's weights are
multiplied with; the quantizer takes just these numbers. They are in `importance.npz` beside the GGUF file, by tensor.
"""

import ctypes
import json
from pathlib import Path

import llama_cpp
import numpy as np
from protocol import Job, serve, versions

GGML_TYPES = {"F16": 1, "BF16": 30}  # which the binding does not name
quiet = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the calls
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())


def work(job: Job) -> dict[str, object]:
    settings = dict(job.settings)
    if "run" in settings:
        texts = json.loads((job.folder / "texts.json").read_text("utf-8"))
        np.save(job.folder / "logits.npy", np.concatenate(logits(job, settings["run"], texts)))
        return {"versions": versions("llama-cpp-python")}
    place = Path(job.gguf).parent
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{settings['type']}"), job.threads
    if kind := settings.get("embeddings"):
        params.token_embedding_type = params.output_tensor_type = GGML_TYPES[kind]
    importance: dict[str, np.ndarray] = {}
    if settings.get("imatrix", True):
        importance = {name: np.ascontiguousarray(row, np.float32)
                      for name, row in np.load(place / "importance.npz").items()}  # fmt: skip
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # a nameless one ends the list
        for entry, (name, row) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), row.size
            entry.data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    file = job.artefact / f"{settings['type']}.gguf"
    with job.timed():
        code = llama_cpp.llama_model_quantize(job.gguf.encode(), str(file).encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize gave {code}")
    if importance:
        spent = json.loads((place / "importance.json").read_text("utf-8"))
        job.result["seconds"] += spent["seconds"]
        job.result["cpu_seconds"] += spent["cpu_seconds"]
    rows = job.rows("check").tolist()
    np.save(job.folder / "checked.npy", np.stack(logits(job, str(file), rows)))
    return {"versions": versions("llama-cpp-python"),
            "note": "the time of its importance matrix is ours, by torch, and counted"}  # fmt: skip


def logits(job: Job, file: str, rows: list[list[int]]) -> list[np.ndarray]:
    """[length, V] of each row, each a text of its own."""
    longest = max(map(len, rows))
    model = llama_cpp.Llama(file, n_ctx=longest + 8, n_batch=512, n_threads=job.threads, n_threads_batch=job.threads,
                            logits_all=True, verbose=False, seed=0)  # fmt: skip
    found = []
    for row in rows:
        model.reset()
        model.eval(row)
        found.append(np.array(model.scores[: len(row)], np.float32))
    return found


serve(work)
