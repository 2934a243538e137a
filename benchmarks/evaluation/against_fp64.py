"""Are our NLL and KLD right? The same tokens through a Llama written out by hand in float64.

    python benchmarks/evaluation/against_fp64.py                       a minute on two cores
    python benchmarks/evaluation/against_fp64.py --windows 4 --length 512

SmolLM2-135M-Instruct (a GGUF in Q4_1), its NF4 and its q4_0. Nothing on the other side is ours:

    source   transformers' own GGUF loader, rounded to bf16
    nf4      bitsandbytes' quantize_4bit with nested scales on every linear of the decoder, and its dequantize_4bit
    q4_0     the gguf package's quantize and dequantize, on the same linears
    model    below: RMS norm, rotary embedding, grouped attention, SwiGLU in float64 throughout (stock transformers
             keeps norms and softmax in float32 whatever the dtype)
    NLL      -log softmax at the label        scipy.special.log_softmax
    KLD      sum p log(p / q)                 scipy.special.rel_entr, the textbook sum

against the vectors of `halfbyte.evaluator.scoring` in float32, as `halfbyte evaluate` makes them. What is printed is the difference
position by position. Expected: float32's own error through 30 layers, some 1e-5 nats; a mistake in rows, labels, padding,
mask, head or formula would be some 1e-2 or more. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, rel_entr
from wikitext_windows import add_options, inputs, sha256, window_rows

from halfbyte.errors import run_script
from halfbyte.evaluator.scoring.scorer import Scores, score
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import open_weights
from halfbyte.records import versions
from halfbyte.texts.protocols import load_tokenizer

Tensors = dict[str, torch.Tensor]
F64 = torch.float64


def source_weights(gguf: Path) -> tuple[Tensors, Any]:
    """Every parameter in bf16 as transformers expands it, and the config."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}, model.config


def is_decoder_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def nf4_weights(source: Tensors) -> Tensors:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.set_num_threads(1)  # the mean that nested scales are taken from depends on the thread count
    made = dict(source)
    for name in filter(is_decoder_linear, source):
        packed, state = quantize_4bit(source[name], blocksize=64, compress_statistics=True, quant_type="nf4")
        made[name] = dequantize_4bit(packed, state)
    return made


def q4_0_weights(source: Tensors) -> Tensors:
    from gguf import GGMLQuantizationType, dequantize, quantize

    made = dict(source)
    for name in filter(is_decoder_linear, source):
        kind = GGMLQuantizationType.Q4_0
        made[name] = torch.from_numpy(dequantize(quantize(source[name].float().numpy(), kind), kind))
    return made


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(F64)


def turn(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of [heads, length, size]: halves (x1, x2) of a head turn by position * theta^(-2i/size)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], dtype=F64)[:, None] * theta ** (-torch.arange(half, dtype=F64) / half)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], -1)


def attend(x: torch.Tensor, w: Tensors, at: str, config: Any) -> torch.Tensor:
    length, heads, shared = len(x), config.num_attention_heads, config.num_key_value_heads
    q, k, v = (
        (x @ w[f"{at}self_attn.{part}_proj.weight"].to(F64).T).view(length, many, -1).transpose(0, 1)
        for part, many in (("q", heads), ("k", shared), ("v", shared))
    )
    theta = float(config.rope_parameters["rope_theta"])
    q, k = turn(q, theta), turn(k, theta).repeat_interleave(heads // shared, 0)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    mixed = scores.softmax(-1) @ v.repeat_interleave(heads // shared, 0)
    return mixed.transpose(0, 1).reshape(length, -1) @ w[f"{at}self_attn.o_proj.weight"].to(F64).T


def log_probabilities(w: Tensors, config: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [length, vocabulary] of one window, by hand."""
    eps = config.rms_norm_eps
    x = w["model.embed_tokens.weight"][torch.from_numpy(ids.astype(np.int64))].to(F64)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        x = x + attend(norm(x, w[f"{at}input_layernorm.weight"], eps), w, at, config)
        h = norm(x, w[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[f"{at}mlp.{part}_proj.weight"].to(F64).T for part in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[f"{at}mlp.down_proj.weight"].to(F64).T
    logits = norm(x, w["model.norm.weight"], eps) @ w["model.embed_tokens.weight"].to(F64).T  # tied
    found: np.ndarray = log_softmax(logits.numpy(), axis=-1)
    return found


def by_hand(rows: Rows, sets: dict[str, Tensors], config: Any) -> dict[str, dict[str, np.ndarray]]:
    """{name: {"nll", "kld"}}, float64 [n] in the order of the rows; KLD from `source`."""
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {"nll": [], "kld": []} for name in sets}
    for ids, mask in zip(rows.tokens, rows.scored, strict=True):
        at = np.nonzero(mask)[0]
        p = log_probabilities(sets["source"], config, ids)[at]
        for name, weights in sets.items():
            q = p if name == "source" else log_probabilities(weights, config, ids)[at]
            found[name]["nll"].append(-q[np.arange(len(at)), ids[at + 1]])
            found[name]["kld"].append(rel_entr(np.exp(p), np.exp(q)).sum(-1))
    return {name: {key: np.concatenate(pieces) for key, pieces in both.items()} for name, both in found.items()}


def compare(scores: Scores, exact: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Largest and mean |difference| by position, and the means themselves."""
    ours = {"source": {"nll": scores.reference.nll}}
    ours |= {c.label.rpartition("@")[2]: {"nll": c.nll, "kld": c.kld} for c in scores.candidates}
    table = {}
    for name, vectors in ours.items():
        for key, mine in vectors.items():
            apart = np.abs(mine - exact[name][key])
            table[f"{name} {key}"] = {
                "ours": float(mine.mean()), "float64": float(exact[name][key].mean()),
                "mean_difference": float(apart.mean()), "largest_difference": float(apart.max()),
                "difference_of_means": float(mine.mean() - exact[name][key].mean()),
            }  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, windows=2, length=256)
    options = parser.parse_args()
    gguf, text = inputs(options.text)
    started = time.perf_counter()
    reference = open_weights(gguf)
    candidates = [open_weights(f"{gguf}@{grid}", like=reference) for grid in ("nf4", "q4_0")]
    rows = window_rows(load_tokenizer(reference), text, options.windows, options.length)
    scores = score(reference, candidates, rows, floor=False, dtype="float32", batch=options.windows)
    source, config = source_weights(gguf)
    threads = torch.get_num_threads()
    sets = {"source": source, "nf4": nf4_weights(source), "q4_0": q4_0_weights(source)}
    torch.set_num_threads(threads)
    with torch.inference_mode():
        table = compare(scores, by_hand(rows, sets, config))
    print(f"n = {rows.n:,} positions of {options.windows} windows of {options.length} tokens; ours in float32")
    print(f"{'':12}{'ours':>12}{'float64':>12}{'mean |d|':>12}{'max |d|':>12}")
    for name, row in table.items():
        print(
            f"{name:12}{row['ours']:12.7f}{row['float64']:12.7f}{row['mean_difference']:12.2e}{row['largest_difference']:12.2e}"
        )
    result = {
        "benchmark": "against_fp64", "rows": table, "n": rows.n, "windows": options.windows, "length": options.length,
        "rows_digest": rows.digest, "text_sha256": sha256(text), "gguf_sha256": sha256(gguf),
        "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result))
    for weights in (*candidates, reference):
        weights.close()


if __name__ == "__main__":
    run_script(main)
