"""What models are made of. A block is a file; its name is its `kind` in every spec.

    Mixer:  forward(x [B, T, d], positions, mask, state) -> y   init_state()   flops(context)   state_bytes(context)
    FFN:    forward(x [B, T, d]) -> y                           flops()
"""
