"""What the reference says about each picture: greedy, written once, kept in a trace file as the answers to chats are.

The trace's key is the digest of everything that the answers depend on: weights, tokenizer and template, every prompt's
token ids, every pixel array and image file, the length, the dtype. One question at a time, as rows are scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.layers.model import exact_float32
from halfbyte.layers.weights import Weights
from halfbyte.progress import note, track
from halfbyte.records import digest, versions, write_text_atomic
from halfbyte.texts.protocols import tokenizer_facts
from halfbyte.texts.traces import FORMAT, stop_ids, stored_answers, until_stop
from halfbyte.texts.vision.model import SeeingModel
from halfbyte.texts.vision.rows import Seen, hash_arrays


def write_picture_answers(
    weights: Weights, processor: Any, seen: Sequence[Seen], cache: Path, *,
    max_new_tokens: int = 256, device: str = "cpu", dtype: str = "float32",
) -> tuple[list[list[int]], dict[str, Any]]:  # fmt: skip
    """Greedy answers of `weights` as token ids (the end-of-turn token included where it was written), and facts.

    cache   folder of traces
    raises  as SeeingModel does
    """
    stop = stop_ids(weights, processor.tokenizer)
    key = {
        "format": FORMAT, "weights": weights.digest, "tokenizer": tokenizer_facts(processor.tokenizer),
        "prompts": [one.ids for one in seen], "pixels": [hash_arrays(one.inputs) for one in seen],
        "images": [one.sha256 for one in seen], "max_new_tokens": max_new_tokens, "dtype": dtype,
        "device": device.partition(":")[0], "stop": stop,
    }  # fmt: skip
    trace = digest(key)
    path = cache / f"trace-{trace.partition(':')[2][:24]}.json"
    facts = {
        "written_by": weights.label, "writer": key["weights"], "max_new_tokens": max_new_tokens, "trace": trace,
    }  # fmt: skip
    stored = stored_answers(path, trace)
    if stored is not None:
        note(f"answers of {weights.label}: from {path.name}")
        return stored, facts
    model = SeeingModel(weights, device, dtype)
    try:
        answers = _generate(model, seen, stop, max_new_tokens)
    finally:
        model.close()
    body = {"key": trace, "answers": answers, "versions": versions()}
    write_text_atomic(path, json.dumps(body) + "\n")
    return answers, facts


def _generate(model: SeeingModel, seen: Sequence[Seen], stop: list[int], max_new_tokens: int) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[0] if stop else 0
    )
    answers = []
    with torch.inference_mode(), exact_float32(), track("answers about pictures", len(seen), "answers") as advance:
        for one in seen:
            ids = torch.tensor([one.ids], device=model.device)
            output = model.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                **model.arguments(one.inputs),
            )  # fmt: skip
            answers.append(until_stop(output[0, len(one.ids) :].tolist(), set(stop)))
            advance(1)
    return answers
