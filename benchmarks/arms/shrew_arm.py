"""Our runtime, as one arm of benchmarks/runtime.py: `shrew_arm.py PACK THREADS`; see talk.py."""

import math
import sys
from pathlib import Path

from talk import serve

from shrew.runtime import Engine, Request, load

model = load(Path(sys.argv[1]), threads=int(sys.argv[2]))
engine = Engine(model, slots=8)


def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
    requests = [Request(prompt=prompt, max_tokens=count, temperature=0, ignore_eos=True) for prompt in prompts]
    answers = [engine.submit(request) for request in requests]
    return [[token.id for token in answer.result().tokens] for answer in answers]


def score(tokens: list[int]) -> float:
    (piece,) = engine.submit(Request(prompt=tokens, max_tokens=0, echo=True, logprobs=0))
    return -sum(token.logprob for token in piece.prompt[1:] if token.logprob is not None) / math.log(2)


serve(generate, score)
