"""Small models made on the spot, so that every command and every test can run without a hub, a GPU or a licence."""

from halfbyte.demo.tiny_gemma4 import write_tiny_gemma4

__all__ = ["write_tiny_gemma4"]
