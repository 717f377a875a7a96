"""On-policy text: what the student itself goes on with, for the teacher to judge (Agarwal et al. 2023)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from shrew.folder import Loaded
from shrew.tasks import likelihood


@torch.no_grad()
def continued(loaded: Loaded, windows: list[np.ndarray], most: int, seed: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask [rows, T] of equally long beginnings of these windows, gone on with by at most `most` tokens that
    the model draws, and which tokens those are [rows, T]. No row is longer than the longest window."""
    half = max(min(map(len, windows)) // 2, 1)
    prompts = torch.from_numpy(np.stack([window[:half] for window in windows]))
    room = max(map(len, windows)) - half
    tokenizer, vocabulary = loaded.tokenizer, likelihood.vocabulary(loaded.model)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = pad if pad is not None else end if end is not None else 0
    unknown: Any = list(range(len(tokenizer), vocabulary)) or None  # rows of a table that was made longer than needed
    wanted = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=min(most, room),
                              eos_token_id=end, pad_token_id=pad, suppress_tokens=unknown, use_cache=True)  # fmt: skip
    training = loaded.model.training
    loaded.model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        tokens = loaded.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=wanted)
    loaded.model.train(training)
    own = torch.zeros_like(tokens)
    own[:, half:] = 1
    if end is not None:
        ended = (tokens == end) & own.bool()
        own[(ended.cumsum(1) - ended.long()) > 0] = 0  # what follows the first end is padding
    mask = own.clone()
    mask[:, :half] = 1
    return tokens, mask, own
