"""`ngrams` as nodes: the hashes of the last tokens in int64, exactly as trained, and one look-up of all tables."""

import torch

from shrew.blocks.embeddings import FACTOR, MODULUS, Ngrams
from shrew.packers.onnx.graph import Call, Graph


def emit(g: Graph, block: Ngrams, name: str, call: Call) -> str:
    """[batch, length, width], to be added to the embedding of the tokens. The state holds the last tokens, each one
    more than its id."""
    sizes, rows = block.spec.sizes, block.spec.rows
    longest = max(sizes)
    past, set_next = call.state(f"{name}.tokens", (longest - 1,), dtype=torch.int64)
    one = g.constant(1, torch.int64)
    whole = str(g.node("Concat", past, g.add(call.tokens, one), axis=1))
    set_next(g.slice(whole, 1 - longest, END, 1))
    # the sum over an n-gram is a product, exact in int64: factors are below 2^31, and n times the vocabulary below 2^32
    column = str(g.node("Unsqueeze", whole, g.ints(2)))
    back = [g.slice(column, longest - 1 - step, -step if step else END, 1) for step in range(longest)]
    windows = g.node("Concat", *back, axis=2)
    powers = [pow(FACTOR, step, MODULUS) for step in range(longest)]
    factors = [[power if step < size else 0 for size in sizes] for step, power in enumerate(powers)]
    sums = g.node("MatMul", windows, g.constant(factors, torch.int64))
    hashes = g.node("Mod", g.node("Mod", sums, g.constant(MODULUS, torch.int64)), g.constant(rows, torch.int64))
    which = g.add(hashes, g.ints(*(rows * at for at in range(len(sizes)))))
    found = g.node("ReduceSum", g.embed(which, f"{name}.table"), g.ints(2), keepdims=0)
    return g.mul(found, len(sizes) ** -0.5)


END = torch.iinfo(torch.int64).max  # of a slice that goes to the end
