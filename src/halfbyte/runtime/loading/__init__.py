"""An NF4 checkpoint, loaded by transformers, with bitsandbytes' linears replaced by ours where that is faster.

    checkpoint   halfbyte.load: what is asked, what transformers does
    replacement  which linears, which of them together, and the way back
    projection   what stands in a linear's place
    choice       ours or bitsandbytes', and by which path: a decision from times, kept on disk
    timing       those times, on the GPU at hand
    report       what became of every linear, and why

Start at `checkpoint`.
"""
