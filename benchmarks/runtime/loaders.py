"""Does everybody who reads an NF4 checkpoint see the same weights, also under negative scales and fitted maps, and who computes best with them?

    python benchmarks/runtime/loaders.py CHECKPOINT                                     a CPU; two minutes for SmolLM2-135M
    python benchmarks/runtime/loaders.py SRC.gguf --device cuda --calibration-tokens 2048

CHECKPOINT is one in NF4, or a source, which is quantized first by gptq. For small models: three copies are in memory at once.

    stock   transformers' own `from_pretrained`, bitsandbytes' linears
    plain   the same with `support_avx512bf16_for_cpu` off, only where that path was taken (see the catch)
    ours    `halfbyte.load(fast=True)`: on a GPU our kernels, on a CPU the codec
    exact   the same class in float32 with level times scale, from the file's bytes by the codec's reference: the judge of both

Weights: what bitsandbytes and ours expand, in bf16 and float32, against the reference, bit for bit. Products y = x W^T in bf16 for 1 to
64 rows: relative error (Frobenius) against float64; ours must not be above bitsandbytes' (by more than `SLACK`, where both do the same sums
in another order). On a GPU each of our paths is asked by itself, not only the one that is fastest there; those need only be right
(`WRONG`). Logits of whole prompts: relative error and KLD against the exact model, for all; only a gross fault counts (`LOOSE`). Greedy
texts of stock and ours: where they part, the exact model is asked which token it prefers.

The catch: bitsandbytes on a CPU with AVX512-BF16 rewrites its weights in the first forward pass and rounds the scales to bf16, for good.
So weights are compared before, and what it then says of a prompt is that path's, not its CUDA kernel's; its plain path is asked beside it.
The last line is one JSON object, `--json-out` adds the rows; exit code 1 if anything is out of bounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from greedy import gap_of
from loaded import (
    PROMPTS,
    TIE,
    Checkpoint,
    checkpoint_of,
    count_packed,
    equal_to,
    exact_model,
    expand,
    load_plain,
    load_stock,
    read_checkpoint,
    scales_of,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from runtime.stored_weights import dense

from halfbyte.errors import run_script
from halfbyte.format.shards import hash_file
from halfbyte.records import digest, versions
from halfbyte.runtime.generate import Chat
from halfbyte.runtime.linear import reference as layout_reference
from halfbyte.runtime.linear.module import nf4_linear
from halfbyte.runtime.linear.weight import Nf4Weight

ROWS = (1, 4, 16, 64)
#: our ways on a GPU, each asked by itself: table of paths, most rows
GPU_PATHS = {"kernel": ("64:kernel expand", 64), "triton": ("16:triton expand", 16), "expand": ("expand", 64)}
#: relative error of a product above which a reader is wrong; rounding y to bf16 alone is 1.7e-3
WRONG = 1e-2
#: ours over bitsandbytes' root mean square error that is still "not above"
SLACK = 1.05
#: ours over bitsandbytes' KLD of whole prompts: a gross fault only. bf16 through 30 layers is one draw of rounding errors a checkpoint, and
#: bitsandbytes' own two paths on a CPU differ by 0.9 to 1.4 times in error and KLD, either way; a wrong reader is off by orders
LOOSE = 2.0


@dataclass
class Reader:
    """One model of the three; `model` as `greedy` wants it."""

    name: str
    model: Any


def by_bitsandbytes(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own expansion into a dtype."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(linear.weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(linear.weight.data, state)


def by_ours(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Ours from the layout: by the CUDA kernel where it can, which is bf16 on a GPU."""
    if weight.tiles.is_cuda and dtype == torch.bfloat16:
        from halfbyte.runtime.kernels import launch

        out = torch.full((weight.rows, weight.columns), torch.nan, dtype=dtype, device=weight.tiles.device)
        launch.dequantize(weight.tensors, out)
        return out
    return layout_reference.dequantize(weight.tensors, dtype)


def part_of(ours: Any, name: str) -> Nf4Weight:
    """The rows of a replaced linear; AttributeError if it was not replaced."""
    projection = ours.get_submodule(name)
    part: Nf4Weight = projection.stack.linear.weight.part(projection.index)
    return part


def compare_bits(checkpoint: Checkpoint, stock: Any, ours: Any) -> list[dict[str, Any]]:
    """A row for each weight: weights, negative scales, and how many differ from the reference and by how much."""
    rows = []
    for name, stored in checkpoint.stored.items():
        row: dict[str, Any] = {
            "name": name, "weights": stored.rows * stored.columns, "scales": stored.absmax.numel(), "blocksize": stored.blocksize,
            "negative_scales": int((scales_of(stored) < 0).sum()), "offset": stored.offset,
        }  # fmt: skip
        for dtype, words in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
            expected = expand(stored, dtype)
            found = {
                "bitsandbytes": by_bitsandbytes(stock.get_submodule(name), dtype),
                "ours": by_ours(part_of(ours, name), dtype),
            }
            for who, values in found.items():
                here = values.detach().cpu().contiguous()
                key = f"{who}, {str(dtype).removeprefix('torch.')}"
                row[f"{key}: different"] = int((here.view(words) != expected.view(words)).sum())
                row[f"{key}: largest"] = float((here.float() - expected.float()).abs().max())
        rows.append(row)
    return rows


def products_of(name: str, readers: list[Reader]) -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
    """Way -> product, and the most rows of x it is asked for."""
    found: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
        reader.name: (reader.model.get_submodule(name), max(ROWS)) for reader in readers
    }
    weight = part_of(readers[1].model, name)
    if weight.tiles.is_cuda:
        for path, (table, most) in GPU_PATHS.items():
            found[f"ours, {path}"] = (lambda x, table=table: nf4_linear(x, weight, table), most)
    return found


def compare_products(checkpoint: Checkpoint, readers: list[Reader], device: str) -> list[dict[str, Any]]:
    """A row for each weight and number of rows of x: relative error of each way."""
    rows = []
    for number, (name, stored) in enumerate(checkpoint.stored.items()):
        here = replace(stored, packed=stored.packed.to(device))
        exact, maker = dense([here]), torch.Generator().manual_seed(number)
        for m in ROWS:
            x = torch.randn(m, stored.columns, generator=maker).to(device, torch.bfloat16)
            truth = x.double() @ exact.T
            row: dict[str, Any] = {"name": name, "rows": m}
            for who, (multiply, most) in products_of(name, readers).items():
                if m <= most:
                    row[who] = float((multiply(x).double() - truth).norm() / truth.norm())
            rows.append(row)
    return rows


def in_short(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Rows of x -> way -> root mean square and largest error over the weights."""
    short: dict[str, dict[str, dict[str, float]]] = {}
    for m in ROWS:
        mine = [row for row in rows if row["rows"] == m]
        for who in (key for key in mine[0] if key not in ("name", "rows")):
            errors = [row[who] for row in mine]
            rms = math.sqrt(sum(error * error for error in errors) / len(errors))
            short.setdefault(str(m), {})[who] = {"rms": float(f"{rms:.4g}"), "max": float(f"{max(errors):.4g}")}
    return short


def compare_logits(chat: Chat, readers: list[Reader], exact: Any) -> dict[str, dict[str, float]]:
    """Over all places of all prompts: relative error, mean KLD in nats and share of equal first choices, against the exact model;
    and places where all logits have the bits of ours."""
    sums = {reader.name: {"error": 0.0, "kld": 0.0, "top1": 0, "as_ours": 0} for reader in readers}
    size, places = 0.0, 0
    for prompt in PROMPTS:
        inputs = chat.inputs(prompt, ())
        truth = exact(**inputs).logits[0].double()
        size, places = size + float(truth.square().sum()), places + len(truth)
        logits = {reader.name: reader.model(**inputs).logits[0].double() for reader in readers}
        for name, found in logits.items():
            own = sums[name]
            own["error"] += float((found - truth).square().sum())
            logs, target = found.log_softmax(-1), truth.log_softmax(-1)
            own["kld"] += float((target.exp() * (target - logs)).sum())
            own["top1"] += int((found.argmax(-1) == truth.argmax(-1)).sum())
            own["as_ours"] += int((found == logits["ours"]).all(-1).sum())
    return {
        name: {
            "places": places, "relative_error": math.sqrt(own["error"] / size), "kld": own["kld"] / places, "top1": own["top1"] / places, "as_ours": own["as_ours"],
        }
        for name, own in sums.items()
    }  # fmt: skip


def greedy_of(reader: Reader, inputs: Any, count: int) -> list[int]:
    """The model's own greedy tokens, by transformers' `generate`."""
    with torch.inference_mode():
        found = reader.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None
        )
    return [int(token) for token in found[0, inputs["input_ids"].shape[1] :]]


def compare_texts(chat: Chat, readers: list[Reader], exact: Any, count: int) -> list[dict[str, Any]]:
    """A row for each prompt: tokens of both, how many are equal, and at a part the gaps in units of bf16's last place."""
    stock, ours = readers[:2]
    rows = []
    for prompt in PROMPTS:
        inputs = chat.inputs(prompt, ())
        a, b = (greedy_of(reader, inputs, count) for reader in (stock, ours))
        same = equal_to(a, b)
        row: dict[str, Any] = {"prompt": prompt, "stock": len(a), "ours": len(b), "equal_to": same, "equal": a == b}
        if same < min(len(a), len(b)):
            for reader in (stock, ours, Reader("exact", exact)):
                gap, unit = gap_of(reader, inputs, a[:same], (a[same], b[same]))
                row[f"units_{reader.name}"] = round(gap / unit, 2)
        rows.append(row)
    return rows


def faults_of(body: dict[str, Any]) -> list[str]:
    """What is out of bounds, in sentences."""
    bits, faults = body["bits"], []
    for key, value in body["loading"].items():
        faults += [f"stock transformers: {value} {key}"] if value else []
    for key in (key for key in bits if key.endswith(": different")):
        faults += [f"{key}: {bits[key]} of {bits['weights']} weights"] if bits[key] else []
    for m, ways in body["products"].items():
        theirs = ways["stock"]
        for who, found in ways.items():
            if not found["max"] <= WRONG:
                faults.append(f"{who}, {m} rows: an error of {found['max']}, more than {WRONG}")
            if who == "ours" and not found["rms"] <= SLACK * theirs["rms"]:
                faults.append(f"{who}, {m} rows: {found['rms']} is above bitsandbytes' {theirs['rms']}")
    stock, ours = (body["logits"][name]["kld"] for name in ("stock", "ours"))
    if not ours <= LOOSE * stock:
        faults.append(f"logits: a KLD of {ours:.3g} is more than {LOOSE} times bitsandbytes' {stock:.3g}")
    for row in body["texts"]:
        if row.get("units_exact", 0.0) > TIE:
            faults.append(f"{row['prompt']!r}: ours left the exact model's choice, {row['units_exact']} units")
    return faults


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All weights together."""
    counts = [key for key in rows[0] if key in ("weights", "scales", "negative_scales") or key.endswith(": different")]
    largest = [key for key in rows[0] if key.endswith(": largest")]
    return {
        "tensors": len(rows), "blocksizes": sorted({row["blocksize"] for row in rows}),
        **{key: sum(row[key] for row in rows) for key in counts}, **{key: max(row[key] for row in rows) for key in largest},
    }  # fmt: skip


@contextmanager
def spent(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def run(options: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is printed, and the rows behind it."""
    seconds: dict[str, float] = {}
    with spent(seconds, "quantize"):
        folder = checkpoint_of(
            options.checkpoint, scratch, method="gptq", calibration="builtin", calibration_tokens=options.calibration_tokens,
            blocksize=options.blocksize, device=options.device,
        )  # fmt: skip
    if folder != options.checkpoint:
        print(f"gptq, block {options.blocksize}, {options.calibration_tokens} tokens: {seconds['quantize']} s")
    with spent(seconds, "load"):
        checkpoint = read_checkpoint(folder)
        stock, loading = load_stock(folder, options.device)
        chat = Chat(folder, options.device, fast=True)
        readers = [Reader("stock", stock), Reader("ours", chat.model)]
    print(f"ours: {chat.model.halfbyte.summary()}")
    with torch.inference_mode():
        with spent(seconds, "bits"):
            bits = compare_bits(checkpoint, stock, chat.model)
            stock(**chat.inputs(PROMPTS[0], ()))
            packed = count_packed(stock, checkpoint.stored)
            readers += [Reader("plain", load_plain(folder, options.device))] if packed else []
        with spent(seconds, "products"):
            products = compare_products(checkpoint, readers, options.device)
        with spent(seconds, "logits"):
            exact = exact_model(checkpoint, options.device)
            logits = compare_logits(chat, readers, exact)
        with spent(seconds, "texts"):
            texts = compare_texts(chat, readers, exact, options.max_new_tokens)
    body = {
        "benchmark": "loaders", "checkpoint": str(options.checkpoint),
        "weights_digest": digest({file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "loading": loading, "linears": len(checkpoint.stored), "bits": summary_of(bits), "products": in_short(products), "logits": logits, "texts": texts,
        "rewritten_by_bitsandbytes": packed,
        "seconds": seconds, "versions": versions(),
    }  # fmt: skip
    return body | {"faults": faults_of(body)}, {"bits": bits, "products": products}


def show(body: dict[str, Any]) -> None:
    bits = body["bits"]
    print(f"\n{body['checkpoint']}: {body['weights_digest']}\n{body['device']}; {body['versions']}")
    print(
        f"{bits['tensors']} weights of {bits['weights']} numbers in blocks of {bits['blocksizes']}: {bits['negative_scales']} of {bits['scales']} scales are negative\n"
    )
    for key in (key.removesuffix(": different") for key in bits if key.endswith(": different")):
        print(
            f"{key:24} {bits['weights'] - bits[f'{key}: different']} equal the reference bit for bit, largest difference {bits[f'{key}: largest']:g}"
        )
    print(f"\n{'rows of x':24} " + "".join(f"{m:>22}" for m in body["products"]) + "      rms (max) relative error")
    for who in body["products"]["1"]:
        cells = [ways.get(who) for ways in body["products"].values()]
        print(
            f"{who:24} "
            + "".join(f"{cell['rms']:>12.3e} ({cell['max']:.1e})" if cell else f"{'':22}" for cell in cells)
        )
    for name, found in body["logits"].items():
        print(
            f"\n{name}: logits at {found['places']} places: relative error {found['relative_error']:.3e}, KLD {found['kld']:.3e} nats, same first choice {found['top1']:.1%}, the bits of ours at {found['as_ours']}",
            end="",
        )
    print("\n")
    for row in body["texts"]:
        print(row)
    print("\n" + ("\n".join(f"FAULT  {fault}" for fault in body["faults"]) or "nothing out of bounds"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an NF4 folder, or a source to be quantized first")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="for a source")
    parser.add_argument("--blocksize", type=int, default=64, help="for a source")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--json-out", type=Path, help="file for the summary and a row for each weight")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        body, rows = run(options, Path(scratch))
    show(body)
    if options.json_out is not None:
        options.json_out.write_text(json.dumps(body | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(body))
    return 1 if body["faults"] else 0


if __name__ == "__main__":
    run_script(main)
