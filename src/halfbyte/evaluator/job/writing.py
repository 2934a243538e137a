"""The record of an evaluation, and the short one that goes beside a checkpoint's own weights.

    OUT/halfbyte/evaluate.json          everything: bases, candidates, protocols, figures, effects, self-tests
    OUT/vectors/*.npz                   the vectors that every figure is made of
    OUT/answers/*.json                  every model's answers to every task
    CANDIDATE/halfbyte/evaluate.json    for a checkpoint that `halfbyte quantize` wrote: what its model card prints
    CANDIDATE/halfbyte/evaluate-*.json  the same of earlier evaluations of these weights, less what was measured again

The short record carries the digest of the weights it speaks of, and is refused here if the files are not those that the
quantize record names. Figures without an interval stay out of it: a number travels with its uncertainty or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.evaluator.job.bases import Base, Entry
from halfbyte.evaluator.job.settings import OF_CHATS
from halfbyte.layers.weights import Nf4Weights
from halfbyte.records import FOLDER, digest, put_record, read_record, write_record
from halfbyte.texts.protocols import IMAGE

NAME = "evaluate"
#: figure that bears the protocol's own name in a model card
HEADLINES = {True: "kld mean", False: "ppl"}


def write_card_records(body: Mapping[str, Any], bases: list[Base]) -> list[str]:
    """An evaluate record in every candidate folder that has a quantize record; returns their paths."""
    written = []
    for base in bases:
        for entry in base.candidates:
            found = own_checkpoint(entry)
            if found is not None:
                folder, weights_digest = found
                short = _short(body, base, entry, weights_digest)
                set_aside(folder, short)
                written.append(str(write_record(folder, NAME, short)))
    return written


def set_aside(folder: Path, new: Mapping[str, Any]) -> None:
    """Keep what earlier records say of the same weights and `new` does not measure again, each under a name of its own.

    The same figure of the same data is replaced: a card must not print two. A record of other weights says nothing any more and goes.
    """
    again = {_which(result) for result in new["results"]}
    for path in sorted((folder / FOLDER).glob(f"{NAME}*.json")):
        try:
            old = read_record(folder, path.stem)
        except SourceError:  # not readable: nothing to keep
            continue
        if old is None or "verdicts" not in old:
            continue
        if old.get("weights_digest") != new["weights_digest"]:
            path.unlink()
            continue
        left = [result for result in old["results"] if _which(result) not in again]
        if len(left) == len(old["results"]) and path.stem != NAME:
            continue
        if left:
            kept = old | {
                "results": left,
                "verdicts": [verdict for verdict in old["verdicts"] if _is_on(left, verdict["protocol"])],
                "task_verdicts": [verdict for verdict in old["task_verdicts"] if _is_on(left, verdict["metric"])],
            }
            put_record(folder, kept | {"record": f"{NAME}-{digest(kept).removeprefix('sha256:')[:8]}"})
        if path.stem != NAME:
            path.unlink()


def _is_on(results: Iterable[Mapping[str, Any]], name: str) -> bool:
    """Whether there is a figure of this protocol or task; its own name begins with theirs."""
    return any(result["metric"].startswith(name) for result in results)


def _which(result: Mapping[str, Any]) -> tuple[str, str]:
    """What a figure is of: two of the same cannot both stand."""
    return result["metric"], result["dataset"]["sha256"]


def own_checkpoint(entry: Entry) -> tuple[Path, str] | None:
    """(folder, weights_digest) if the candidate is a checkpoint with a quantize record, else None.

    raises SourceError if the weights are not the recorded ones
    """
    weights = entry.weights
    if not isinstance(weights, Nf4Weights) or not weights.source.path.is_dir():
        return None
    folder = weights.source.path
    quantize = read_record(folder, "quantize")
    if quantize is None:
        return None
    recorded = {name: file["sha256"] for name, file in quantize["files"].items()}
    if weights.digest != digest({"config": weights.config, "files": recorded}):
        raise SourceError(
            "its weights are not those that its quantize record names",
            where=str(folder),
            todo="halfbyte verify says which; quantize again",
        )
    return folder, quantize["weights_digest"]


def _short(body: Mapping[str, Any], base: Base, entry: Entry, weights_digest: str) -> dict[str, Any]:
    results = []
    for block in body["protocols"]:
        if block["base"] == base.name:
            results += _results(block, entry.id)
    asked = [block for block in body["tasks"] if block["base"] == base.name]
    results += [_accuracy(block, entry.id) for block in asked]
    return {
        "weights_digest": weights_digest,
        "reference": {"label": base.reference.label, "digest": base.reference.digest},
        "margin": body["settings"]["margin"],
        "results": results,
        "verdicts": [
            {"protocol": block["protocol"], **said}
            for block in body["protocols"] if block["base"] == base.name
            for found in block["candidates"] if found["candidate"] == entry.id
            for said in found["verdicts"]
        ],
        "task_verdicts": [
            {"metric": block["metric"], **found["flips"], "margin": found["margin"], "verdict": found["verdict"]}
            for block in asked for found in block["candidates"] if found["candidate"] == entry.id
        ],
        "run": body["run"],
    }  # fmt: skip


def _accuracy(block: Mapping[str, Any], candidate: str) -> dict[str, Any]:
    """Accuracy of the candidate under a task, with Wilson's interval."""
    (found,) = [found for found in block["candidates"] if found["candidate"] == candidate]
    return {
        "metric": f"{block['metric']} accuracy", "value": found["value"], "unit": "share of items", "n": block["n"],
        "documents": block["n"], "low": found["low"], "high": found["high"],
        "dataset": {
            "name": f"{block['task']}: {', '.join(file['name'] for file in block['data'])}", "type": block["task"],
            "sha256": block["data"][0]["sha256"],
        },
    }  # fmt: skip


def _results(block: Mapping[str, Any], candidate: str) -> list[dict[str, Any]]:
    headline = HEADLINES[block["protocol"] in OF_CHATS]
    dataset = {
        "name": ", ".join(file["name"] for file in block["data"]),
        "type": "image-text-to-text"
        if block["protocol"] == IMAGE
        else "text-generation"
        if block["protocol"] in OF_CHATS
        else "text",
        "sha256": block["rows"]["digest"].partition(":")[2],
    }
    stress = " (out of frame)" if block["out_of_frame"] else ""
    (found,) = [found for found in block["candidates"] if found["candidate"] == candidate]
    results = []
    for figure in found["figures"]:
        if figure["low"] is None or figure["high"] is None:
            continue
        own = "" if figure["figure"] == headline else f" {figure['figure']}"
        results.append({
            "metric": f"{block['protocol']}{own}{stress}", "value": figure["value"], "unit": figure["unit"],
            "n": figure["n"], "documents": figure["documents"], "low": figure["low"], "high": figure["high"],
            "dataset": dataset,
        })  # fmt: skip
    return results
