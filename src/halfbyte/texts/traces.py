"""The answers that the reference writes before anybody is scored: greedy, in batches, kept in a file.

On-policy answers are what a user of the reference would have seen, so KLD on them weighs the tokens that matter. They are
written once: a trace is keyed by the digest of everything it depends on (weights, template, prompts, length, dtype), and
a file with another key is never used, only written anew beside it.

The catch: greedy decoding in a batch is not bit-stable across machines; two tokens that nearly tie may swap, and the rest of the answer
follows. That is why the trace, and not its recipe, is what rows are made of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.layers.model import WholeModel, exact_float32
from halfbyte.layers.weights import Weights
from halfbyte.progress import note, track
from halfbyte.records import digest, versions, write_text_atomic
from halfbyte.texts.protocols import load_tokenizer, prompt_ids, tokenizer_facts
from halfbyte.texts.reading import Chat

FORMAT = 1


def write_answers(
    weights: Weights, chats: Sequence[Chat], cache: Path, *,
    max_new_tokens: int = 256, device: str = "cpu", dtype: str = "float32", batch: int = 8,
) -> tuple[list[list[int]], dict[str, Any]]:  # fmt: skip
    """Greedy answers of `weights` to every chat as token ids (the end-of-turn token included where it was written), and facts.

    cache  folder of traces; the file's name is the digest of what the answers depend on
    """
    tokenizer = load_tokenizer(weights)
    stop = stop_ids(weights, tokenizer)
    prompts = [prompt_ids(tokenizer, chat.messages) for chat in chats]
    key = {
        "format": FORMAT, "weights": weights.digest, "tokenizer": tokenizer_facts(tokenizer), "prompts": prompts,
        "max_new_tokens": max_new_tokens, "dtype": dtype, "device": device.partition(":")[0],
        "stop": stop,
    }  # fmt: skip
    path = cache / f"trace-{digest(key).partition(':')[2][:24]}.json"
    facts = {
        "written_by": weights.label,
        "writer": key["weights"],
        "max_new_tokens": max_new_tokens,
        "trace": digest(key),
    }
    stored = stored_answers(path, digest(key))
    if stored is not None:
        note(f"answers of {weights.label}: from {path.name}")
        return stored, facts
    model = WholeModel(weights, device, dtype)
    try:
        answers = _generate(model, prompts, stop, max_new_tokens, batch)
    finally:
        model.close()
    body = {"key": digest(key), "answers": answers, "versions": versions()}
    write_text_atomic(path, json.dumps(body) + "\n")
    return answers, facts


def stored_answers(path: Path, key: str) -> list[list[int]] | None:
    """The answers in a trace file, None if there is none or it is another's or damaged (it is then written again)."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        answers: list[list[int]] = body["answers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answers if body.get("key") == key else None


def stop_ids(weights: Weights, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: generation_config.json's, config.json's and the tokenizer's (Gemma ends turns with <turn|>)."""
    found: set[int] = set()
    path = weights.companions_folder() / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for value in (own.get("eos_token_id"), weights.config.get("eos_token_id"), tokenizer.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    return sorted(found)


def _generate(
    model: WholeModel, prompts: Sequence[list[int]], stop: list[int], max_new_tokens: int, batch: int
) -> list[list[int]]:
    """Greedy continuation of every prompt; batches of similar length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop[0] if stop else 0
    )
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
    with torch.inference_mode(), exact_float32(), track("answers of the reference", len(prompts), "answers") as advance:
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            width = max(len(prompts[row]) for row in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for at, row in enumerate(chosen):
                ids[at, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[at, width - len(prompts[row]) :] = 1
            output = model.model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
            for at, row in enumerate(chosen):
                answers[row] = until_stop(output[at, width:].tolist(), set(stop))
            advance(len(chosen))
    return answers


def until_stop(ids: list[int], stop: set[int]) -> list[int]:
    """Up to and including the first token that ends the answer; what follows is padding."""
    end = next((at for at, token in enumerate(ids) if token in stop), len(ids) - 1)
    return ids[: end + 1]
