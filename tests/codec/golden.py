"""What bitsandbytes makes of 1,000 fixed weights: run `python tests/codec/golden.py` to write it anew (and say why)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

FILE = Path(__file__).with_name("golden_nf4.json")


def weights() -> torch.Tensor:
    """1,000 bf16 weights from integer arithmetic alone: 15 blocks of seven magnitudes, and a ragged one of 40."""
    index = torch.arange(1000)
    spread = ((index * 7919) % 2003 - 1001).float() / 1024
    return (spread * torch.exp2(((index // 64) % 7 - 3).float())).to(torch.bfloat16)


def fingerprint() -> str:
    return hashlib.sha256(weights().view(torch.int16).numpy().tobytes()).hexdigest()


def main() -> None:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weights(), blocksize=64, compress_statistics=True, quant_type="nf4")
    body = {
        "bitsandbytes": bitsandbytes.__version__,
        "torch": torch.__version__,
        "weights_sha256": fingerprint(),
        "packed": packed.numpy().tobytes().hex(),
        "absmax": state.absmax.numpy().tobytes().hex(),
        "nested_absmax": [value.hex() for value in state.state2.absmax.tolist()],
        "nested_offset": state.offset.item().hex(),
    }
    FILE.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
