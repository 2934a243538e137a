"""Does vLLM with vllm-bnb-plugin see an NF4 checkpoint's weights as the file has them, and answer as exact weights would?

    python benchmarks/runtime/loaders_vllm.py CHECKPOINT          in an environment with vLLM for CPUs, the plug-in and halfbyte; a minute

The plug-in expands the 8-bit scales once while loading (float32) and stacks q, k, v and gate, up as parts of one parameter, each with a
bitsandbytes QuantState of its own. So this asks the loaded engine for every part, expands it by bitsandbytes, and compares with the codec's
reference from the file's bytes, bit for bit; then lets vLLM answer greedily and asks the exact model (`loaded.exact_model`: float32, level
times scale) at every token how much more it would have liked another one, in units of bf16's last place. A tie is a few units.

The catch: vLLM's inner names are not promised to anybody; the path to the model below is that of 0.32. The last line is one JSON object; exit
code 1 if anything is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

#: one process, so that the model can be looked at; no binding of threads to cores; 1 GiB of cache
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
os.environ.update(SETTINGS)

import torch  # noqa: E402
from loaded import PROMPTS, TIE, Checkpoint, exact_model, expand, read_checkpoint, scales_of, unit_at  # noqa: E402

from halfbyte.errors import run_script  # noqa: E402

#: members of vLLM's stacked parameters, in its order
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parts_of(model: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    """transformers' module path -> packed codes and QuantState, as they lie in vLLM's model."""
    found = {}
    for name, parameter in model.named_parameters():
        states = getattr(parameter, "bnb_quant_state", None)
        if states is None:
            continue
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        offsets = [int(value) for value in parameter.bnb_shard_offsets]
        for index, member in enumerate(STACKED.get(last, (last,))):
            found[f"{owner}.{member}"] = (parameter.data[offsets[index] : offsets[index + 1]], states[index])
    return found


def compare_weights(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """How many weights and scales differ from the reference, over all quantized weights of the file."""
    from bitsandbytes.functional import dequantize_4bit

    parts = parts_of(model)
    body: dict[str, Any] = {
        "tensors": len(checkpoint.stored), "missing": len(checkpoint.stored.keys() - parts.keys()), "more": len(parts.keys() - checkpoint.stored.keys()),
        "weights": 0, "different": 0, "scales": 0, "scales_different": 0, "negative_scales": 0, "blocksizes": sorted({s.blocksize for _, s in parts.values()}),
    }  # fmt: skip
    for name in checkpoint.stored.keys() & parts.keys():
        stored, (packed, state) = checkpoint.stored[name], parts[name]
        found = dequantize_4bit(packed, state)
        expected, scales = expand(stored, found.dtype), scales_of(stored)
        words = torch.int16 if found.dtype == torch.bfloat16 else torch.int32
        body["weights"] += found.numel()
        body["different"] += int((found.view(words) != expected.view(words)).sum())
        body["scales"] += scales.numel()
        body["scales_different"] += int((state.absmax.view(torch.int32) != scales.view(torch.int32)).sum())
        body["negative_scales"] += int((state.absmax < 0).sum())
    return body


def judge(exact: Any, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """Tokens that are the exact model's own first choice behind the same prefix, and the most units by which another would be."""
    with torch.inference_mode():
        logits = exact(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    own = logits[torch.arange(len(answer)), torch.tensor(answer)]
    best = logits.max(-1).values
    units = [float(gap) / unit_at(float(size)) for gap, size in zip(best - own, best.abs(), strict=True)]
    return {"tokens": len(answer), "first_choices": int((best == own).sum()), "most_units": round(max(units), 2)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(options.checkpoint), dtype="bfloat16", max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=1024, enforce_eager=True
    )  # fmt: skip
    checkpoint = read_checkpoint(options.checkpoint)
    weights = compare_weights(checkpoint, engine.llm_engine.model_executor.driver_worker.worker.model_runner.model)
    talks: Any = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = engine.chat(talks, SamplingParams(temperature=0, max_tokens=options.max_new_tokens), use_tqdm=False)
    exact, rows = exact_model(checkpoint, "cpu"), []
    for answer in answers:
        tokens = list(answer.outputs[0].token_ids)
        rows.append({"text": answer.outputs[0].text, **judge(exact, list(answer.prompt_token_ids), tokens)})
    faults = [f"{weights[key]} {key}" for key in ("missing", "more", "different", "scales_different") if weights[key]]
    faults += [f"{row['text'][:40]!r}: {row['most_units']} units" for row in rows if not row["most_units"] <= TIE]
    names = ("vllm-cpu", "vllm", "vllm-bnb-plugin", "bitsandbytes", "transformers", "torch")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "benchmark": "loaders_vllm", "checkpoint": str(options.checkpoint), "weights": weights, "answers": rows, "faults": faults,
        "versions": {name: installed[name] for name in names if name in installed},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an NF4 folder")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    body = run(parser.parse_args())
    for row in body["answers"]:
        print(row)
    print(*(f"FAULT  {fault}" for fault in body["faults"]), sep="\n")
    print(json.dumps(body))
    return 1 if body["faults"] else 0


if __name__ == "__main__":
    run_script(main)
