"""llama.cpp: `llama_arm.py FILE.gguf THREADS`, in an environment with llama-cpp-python; see talk.py."""

import ctypes
import sys

import llama_cpp
import numpy as np
from talk import serve

CONTEXT, ROWS = 1024, 8  # positions of a sequence, sequences at a time

quiet = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the calls
llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
settings = llama_cpp.llama_context_default_params()
settings.n_ctx, settings.n_seq_max = CONTEXT * ROWS, ROWS
settings.n_batch = settings.n_ubatch = 512
settings.n_threads = settings.n_threads_batch = int(sys.argv[2])
context = llama_cpp.llama_init_from_model(model, settings)
vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
batch = llama_cpp.llama_batch_init(512, 0, 1)


def step(entries: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
    """Decode (token, position, sequence, wanted) entries; the logits behind each wanted one, until the next call."""
    batch.n_tokens = len(entries)
    for at, (token, position, row, wanted) in enumerate(entries):
        batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
    if code := llama_cpp.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode gave {code}")
    found = []
    for at, entry in enumerate(entries):
        if entry[3]:
            logits = llama_cpp.llama_get_logits_ith(context, at)
            found.append(np.ctypeslib.as_array(logits, (vocabulary,)))
    return found


def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    entries = [(token, at, row, at == len(prompt) - 1)
               for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]  # fmt: skip
    last = []
    for low in range(0, len(entries), 512):
        last += [int(logits.argmax()) for logits in step(entries[low : low + 512])]
    found = [[token] for token in last]
    for done in range(1, count):
        places = [(token, len(prompts[row]) + done - 1, row, True) for row, token in enumerate(last)]
        last = [int(logits.argmax()) for logits in step(places)]
        for row, token in enumerate(last):
            found[row].append(token)
    return found


def score(tokens: list[int]) -> float:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    bits = 0.0
    for low in range(0, len(tokens) - 1, 512):
        entries = [(token, low + at, 0, True) for at, token in enumerate(tokens[low : low + 512])]
        for logits, token in zip(step(entries), tokens[low + 1 : low + 513], strict=False):
            exact = logits.astype(np.float64)
            bits += (exact.max() + np.log(np.exp(exact - exact.max()).sum()) - exact[token]) / np.log(2)
    return float(bits)


serve(generate, score)
