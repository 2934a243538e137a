"""The whole step of a decoder, recorded once and replayed: Gemma 4, Gemma 3 and Llama-class models, quantized or not.

    kernels      the small kernels, each with a reference in plain torch
    description  a transformers model, read into frozen descriptions of its layers; refuses what it does not know
    linears      the layer's products as callables: fused or apart, NF4 or not
    cache        keys and values: a ring for sliding layers, a slot a position for the others
    step         tokens in, hidden states out; nothing in it waits for the host
    state        what the steps carry: token history, lengths, who is done
    sampling     logits to tokens on the device
    speculation  drafts by looking the last words up in the text so far
    assistant    drafts by Gemma 4's assistant model
    graph        the step as a CUDA graph; on a CPU, called
    prompt       prompts into the cache, in chunks, or through transformers where images are
    loop         `decode`: tokens as they come

Start at `loop`.
"""
