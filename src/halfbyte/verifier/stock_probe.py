"""The child process of `stock`: load the checkpoint as a user would, look at what came of it, ask three questions.

Run as `python -m halfbyte.verifier.stock_probe FOLDER DEVICE REPORT`; writes one JSON object to REPORT. A process of its own, so that
a crash in a kernel is a failed check, and so that 18 GB of weights leave the memory with it. Offline, and never with code
from the checkpoint. Only stock classes are used: nothing of halfbyte's codec or runtime stands between file and answer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS = ("Name three primary colors.", "What does quantization-aware training do?")
IMAGE_PROMPT = "What is in this image?"
MAX_NEW_TOKENS = 64


def probe(folder: Path, device: str) -> dict[str, Any]:
    """Load `folder` on `device` and report: modules, values, answers."""
    import torch
    import transformers

    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.recipe.skeleton import build_skeleton

    reader = SafetensorsSource(folder)
    skeleton = build_skeleton({k: v for k, v in reader.config.items() if k != "quantization_config"})
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    started = time.perf_counter()
    model, loading = getattr(transformers, skeleton.auto_class).from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": device}, use_safetensors=True, output_loading_info=True, **options
    )
    model.eval()
    report = {
        "auto_class": skeleton.auto_class,
        "architecture": type(model).__name__,
        "device": device,
        "load_seconds": round(time.perf_counter() - started, 3),
        **{
            key: sorted(map(str, loading.get(key) or ()))
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        },
        **_modules(model),
        **_values(model, skeleton, reader),
    }
    try:
        report["answers"], report["answers_error"] = _answers(model, folder, options), None
    except Exception as error:  # a broken tokenizer or template; the model itself did load
        report["answers"], report["answers_error"] = [], f"{type(error).__name__}: {error}"
    return report


def _modules(model: Any) -> dict[str, Any]:
    """Linear4bit modules with and without a quant state. Without one a layer multiplies by packed codes: noise."""
    import bitsandbytes

    found = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    whole = [name for name, module in found.items() if getattr(module.weight, "quant_state", None) is not None]
    return {"linear4bit": whole, "without_quant_state": sorted(found.keys() - set(whole))}


def _values(model: Any, skeleton: Any, reader: Any) -> dict[str, Any]:
    """Kept tensors of the file against the parameters and buffers of the loaded model, in the model's dtype."""
    import torch

    from halfbyte.format.nf4_layout import component_sizes
    from halfbyte.recipe.skeleton import model_names
    from halfbyte.verifier.layout import nf4_names

    packed = nf4_names(info.name for info in reader.tensors)
    parts = {part for name in packed for part in component_sizes(name, (1,))}
    kept = {info.name: info for info in reader.tensors if info.name not in parts}
    loaded = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    compared, different, unmatched = 0, [], []
    for name, (key, converted) in model_names(skeleton, kept).items():
        value = loaded.get(key) if key is not None and not converted else None
        if value is None:
            unmatched.append(name)
            continue
        info = kept[name]
        here = reader.read(info, 0, info.numel).to(value.dtype)
        compared += 1
        if tuple(value.shape) != info.shape or not torch.equal(value.detach().cpu().reshape(-1), here):
            different.append(name)
    return {"values_compared": compared, "values_different": different, "values_unmatched": unmatched}


def _answers(model: Any, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    from transformers import AutoProcessor, AutoTokenizer

    sees = getattr(model.config, "vision_config", None) is not None
    reader = (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder, **options)
    answers = [_ask(model, reader, prompt, None) for prompt in PROMPTS]
    if sees:
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (192, 192), "white")
        ImageDraw.Draw(picture).rectangle((48, 48, 144, 144), fill="red")
        answers.append(_ask(model, reader, IMAGE_PROMPT, picture))
    return answers


def _ask(model: Any, reader: Any, prompt: str, picture: Any) -> dict[str, Any]:
    """One greedy answer through the chat template (the bare prompt for a model without one)."""
    import torch

    tokenizer = getattr(reader, "tokenizer", reader)
    if getattr(reader, "chat_template", None):
        content: Any = prompt
        if reader is not tokenizer:
            content = [{"type": "image", "image": picture}] if picture is not None else []
            content.append({"type": "text", "text": prompt})
        inputs = reader.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    seconds = time.perf_counter() - started
    return {
        "prompt": prompt,
        "image": picture is not None,
        "answer": tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "tokens": len(tokens),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(tokens) / seconds, 3),
        "finite": all(bool(torch.isfinite(step).all()) for step in out.logits),
    }


def main() -> None:
    folder, device, report = sys.argv[1:]
    try:
        body = probe(Path(folder), device)
    except Exception as error:  # whatever a loader raises is the finding
        body = {"error": f"{type(error).__name__}: {error}"}
    Path(report).write_text(json.dumps(body), encoding="utf-8")


if __name__ == "__main__":
    main()
