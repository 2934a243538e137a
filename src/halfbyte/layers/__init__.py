"""A model a layer at a time: weights by name, rows of tokens, the decoder whole or layer by layer, the head. No worker's alone."""
