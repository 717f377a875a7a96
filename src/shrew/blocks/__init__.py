"""What models are made of. A block is a file; its name is its `kind` in every spec.

    Mixer:  forward(x [B, T, d], place, state=None) -> y [B, T, d]
            start(std, deep)  init_state()  flops(context)  state_bytes(context)
    FFN:    forward(x [B, T, d]) -> (y [B, T, d], penalty or None)
            start(std, deep)  flops()  idle()

`start` initialises, `flops` counts multiply-adds times two of a token, `idle` the parameters that a token does not use.
"""

import transformers  # noqa: F401 - first, as it imports `model` when done, which a half-imported block could not serve
