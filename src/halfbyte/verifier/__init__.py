"""Proof: is this folder the checkpoint it claims to be? Structure, layout, plan, source, loaders, and stock transformers."""

from halfbyte.verifier.checks import sentences
from halfbyte.verifier.job import verify

__all__ = ["sentences", "verify"]
