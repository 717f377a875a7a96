"""transformers in bf16, its forward pass compiled, on a static cache: `torch_arm.py FOLDER THREADS`; see talk.py."""

import sys

import torch
from talk import serve
from transformers import AutoModelForCausalLM, StaticCache

CONTEXT = 512

torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
forward = torch.compile(model.forward, dynamic=False)
caches: dict[int, StaticCache] = {}


@torch.inference_mode()
def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
    tokens = torch.tensor(prompts)
    rows, length = tokens.shape
    cache = caches.setdefault(rows, StaticCache(config=model.config, max_cache_len=CONTEXT))
    cache.reset()
    found = []
    for at in range(count):
        places = torch.arange(length) if at == 0 else torch.tensor([length + at - 1])
        given = forward(input_ids=tokens, past_key_values=cache, position_ids=places.expand(rows, -1), use_cache=True,
                        logits_to_keep=1)  # fmt: skip
        tokens = given.logits[:, -1].argmax(-1, keepdim=True)
        found.append(tokens)
    return torch.cat(found, 1).tolist()


serve(generate)
