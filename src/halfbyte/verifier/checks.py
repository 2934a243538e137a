"""What a check is: an id, a verdict, one sentence. The list of them is the verify record, and this table is its contents.

Ids beginning with F are the MUSTs of docs/format.md, by number. A check has three verdicts and no fourth: `passed`,
`failed`, or `skipped` with the reason. A check that could not be made is never `passed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]

#: every check in the order of the report: id -> title
TITLES = {
    "F1": "shards are complete and named by number",
    "F2": "index and shards agree",
    "F3": "names stay inside the folder",
    "F4-F6": "headers are sound: lengths, entries, no overlap, no hole",
    "F7": "data is aligned",
    "F8": "weight files are readable for those who may read config.json",
    "F9": "each quantized weight has its six tensors",
    "F10": "quant_map holds the NF4 levels",
    "F13": "block sizes are ones that bitsandbytes reads",
    "F14": "the unused half of an odd last byte is zero",
    "F15": "quant states are spelled as bitsandbytes spells them",
    "F16": "quant states say nf4, bfloat16 and the weight's shape",
    "F17": "all scales are finite",
    "F18": "kept tensors are the source's, byte for byte",
    "F19": "every tensor of the source is here, and no other",
    "F20": "tied weights are stored once",
    "F21": "kept tensors hold no NaN or infinity",
    "F11 F12 F22": "codes and scales are the source's, derived again",
    "F23": "config.json is the source's plus quantization_config",
    "F24": "quantization_config is the one transformers writes",
    "F25": "every loader quantizes the same modules",
    "F26": "tokenizer, processor, template and licence are the source's",
    "areas": "quantized weights lie where the plan put them",
    "digests": "files have the sha256 that the quantize record states",
    "load": "stock transformers loads it with every tensor in place",
    "modules": "stock transformers makes the planned layers 4-bit",
    "values": "loaded parameters and buffers equal the file",
    "answers": "it answers the sanity prompts with finite words",
}


@dataclass(frozen=True)
class Check:
    """One verdict. `detail` is a sentence for a person; `where` names the file or tensor it speaks of."""

    id: str
    title: str
    status: Status
    detail: str
    where: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Fault:
    """One thing found wrong: what, and in which file or tensor."""

    what: str
    where: str


def verdict(check_id: str, faults: Sequence[Fault], good: str) -> Check:
    """Passed with the sentence `good` if there is no fault; else failed with the first three and a count of the rest."""
    if not faults:
        return Check(check_id, TITLES[check_id], "passed", good)
    told = "; ".join(f"{fault.where}: {fault.what}" for fault in faults[:3])
    rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Check(check_id, TITLES[check_id], "failed", told + rest, faults[0].where)


def skipped(check_id: str, reason: str) -> Check:
    return Check(check_id, TITLES[check_id], "skipped", reason)


def sentences(record: dict[str, Any]) -> list[str]:
    """One sentence per failed check of a verify record; empty if nothing failed."""
    return [f"{c['id']} {c['title']}: NO. {c['detail']}" for c in record["checks"] if c["status"] == "failed"]
