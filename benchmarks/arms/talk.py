"""What the parent and an arm say to each other: one JSON line each way, on the arm's stdin and stdout.

{"prompts": [[ids]], "count": N} asks for N greedy tokens behind each prompt, all prompts at a time, none of them seen
before, and the end of text ignored; {"seconds": wall, "cpu": CPU-seconds of the process, "tokens": [[ids]]} is the
answer. {"score": [ids]} asks for {"bits": what all tokens but the first take, given those before them}, of an arm that
can. The first line an arm writes is {"ready": true}.
"""

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(generate: Generate, score: Callable[[list[int]], float] | None = None) -> None:
    """Answer until the parent closes the pipe. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "score" in asked:
            assert score is not None
            print(json.dumps({"bits": score(asked["score"])}), file=out, flush=True)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = generate(asked["prompts"], asked["count"])
        told = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens}
        print(json.dumps(told), file=out, flush=True)
