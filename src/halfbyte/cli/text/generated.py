"""What an answer took, as a person reads it below the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figures(result: Mapping[str, Any]) -> list[str]:
    """Lines about a result of `halfbyte.generate`: tokens and seconds, who decoded, whose linears."""
    rate = f"{result['tokens_per_second']} tokens/s" if result["tokens_per_second"] else "one token"
    kind, memory = ("GPU", result["peak_gpu_bytes"]) if result["peak_gpu_bytes"] else ("RAM", result["peak_rss_bytes"])
    by, ahead = result["decoded_by"], result["speculation"]
    return [
        f"{result['new_tokens']} tokens, first after {result['seconds_to_first_token']:.2f} s, then {rate}; "
        f"peak {kind} {memory / 2**30:.2f} GiB",
        f"decoded by {by['name']}" + (f" ({by['why']})" if by["why"] else ""),
        *([f"guesses kept: {100 * (ahead['acceptance'] or 0):.0f} %"] if ahead else []),
        result["linears_summary"],
    ]
