"""Bytes: safetensors and GGUF headers read as hostile input, NF4 layout, shards, config.json."""
