"""The YAML block that the hub reads: what this is a quantization of, under which licence, and how well it scored.

Built with huggingface_hub's own ModelCardData, so that strings from strangers are quoted by a YAML writer, never pasted.
A key that is not known is left out; the text says so. `base_model` above all: the hub draws a family tree from it.

The hub's ids look like `org/name`, and so do relative paths. A label counts as an id only if nothing of that name lies on
this disk; `base_model=` settles it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from halfbyte.errors import SourceError, UsageError

PIPELINE_TAGS = {"AutoModelForImageTextToText": "image-text-to-text", "AutoModelForCausalLM": "text-generation"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LICENSE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
#: what a figure needs before it may travel (unit and n say of what, low and high how sure)
_REQUIRED = ("metric", "value", "unit", "n", "low", "high", "dataset")


def base_model_of(label: str, given: str | None) -> str | None:
    """Hub id of the source: `given`, or the label if it is one; None if unknown.

    label   how the source was called when it was quantized, perhaps with `@revision`
    raises  UsageError if `given` is not a hub id
    """
    if given is not None:
        if not _HUB_ID.fullmatch(given):
            raise UsageError(f"{given!r} is not a hub id", where="--base-model", todo="write it as org/name")
        return given
    name = label.partition("@")[0]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(lineage: Mapping[str, Any], given: str | None) -> dict[str, str]:
    """`license`, `license_name`, `license_link` as far as they are known; empty if nothing is.

    lineage  what the source states of itself (its card's YAML, or GGUF metadata)
    raises   UsageError if `given` is not a licence identifier
    """
    if given is not None:
        if not _LICENSE_ID.fullmatch(given):
            raise UsageError(
                f"{given!r} is not a licence identifier", where="--license", todo="e.g. apache-2.0, gemma, other"
            )
        if given != lineage.get("license"):
            return {"license": given}
    keys = ("license", "license_name", "license_link")
    stated = {
        key: " ".join(value.split()) for key in keys if isinstance(value := lineage.get(key), str) and value.strip()
    }
    if "license" in stated and not _LICENSE_ID.fullmatch(stated["license"]):
        # the hub refuses words that are not an identifier; `other` with the words as its name is how it wants them
        return {**stated, "license": "other", "license_name": stated.get("license_name", stated["license"])}
    return stated


def tags_of(label: str) -> list[str]:
    """Tags by which people search; `qat` only if the source is called so."""
    words = re.split(r"[^a-z0-9]+", label.lower())
    return ["bitsandbytes", "nf4", "4-bit", *(["qat"] if "qat" in words else [])]


def eval_results(records: Iterable[Mapping[str, Any]], task: str) -> list[EvalResult]:
    """The figures of evaluate records as the hub's `model-index` wants them.

    records  bodies with `results`: [{metric, value, unit, n, low, high, dataset {name, type, split?, sha256?}}]; low and
             high bound the 95 % interval
    task     the pipeline tag
    raises   SourceError if a figure comes without its unit, n or interval
    """
    found = []
    for record in records:
        for result in record["results"]:
            missing = [key for key in _REQUIRED if result.get(key) is None]
            if missing:
                raise SourceError(
                    f"figure {result.get('metric')!r} lacks {', '.join(missing)}",
                    where="evaluate record",
                    todo="run halfbyte evaluate again",
                )
            dataset = result["dataset"]
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset["type"],
                    dataset_name=dataset["name"],
                    dataset_split=dataset.get("split"),
                    dataset_args={"sha256": dataset["sha256"]} if dataset.get("sha256") else None,
                    metric_type=result["metric"],
                    metric_value=result["value"],
                    metric_args={key: result[key] for key in ("unit", "n", "low", "high")},
                )
            )
    return found


def front_matter(data: Mapping[str, Any], results: list[EvalResult], model_name: str) -> str:
    """The YAML block with its fences; `data` holds ModelCardData's arguments, None for what is unknown."""
    extra: dict[str, Any] = {"eval_results": results, "model_name": model_name} if results else {}
    yaml = ModelCardData(**data, **extra).to_yaml(line_break="\n")
    return f"---\n{yaml}\n---\n"
