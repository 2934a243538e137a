"""The same tokens through llama.cpp: does another engine find the perplexity and the KLD that we find?

    uv run --with cyllama==0.2.18 python benchmarks/evaluation/against_llama_cpp.py           some minutes on two cores
    uv run --with cyllama==0.2.18 python benchmarks/evaluation/against_llama_cpp.py --windows 2

cyllama (PyPI) carries a prebuilt llama.cpp for the CPU and thin bindings of its C interface; it is no dependency of this project.
(llama-cpp-python is a source package; llama-cpp-py-sync is prebuilt too, and wants glibc 2.38.) Taken of llama.cpp are the
logits of every position of every window, key-value cache in float32, no flash attention; log softmax, NLL and KLD are made of
them in float64 by numpy.

    file    the GGUF in Q4_1 as it lies in the package: llama.cpp multiplies 4-bit weights with activations that it rounds to 8
            bits, so it cannot agree exactly. Ours expands the weights to bf16 and multiplies in float32
    source, nf4, q4_0   the very weights of our candidates, written as float32 GGUFs (metadata of the source, rows of q and k
            put back into llama.cpp's order): same weights, same tokens, another engine. What is left is arithmetic
    file kld   KL(source by llama.cpp || file by llama.cpp): what Q4_1 kernels cost beside exact arithmetic

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from wikitext_windows import add_options, inputs, sha256, window_rows

from halfbyte.errors import UsageError, run_script
from halfbyte.evaluator.scoring.scorer import score
from halfbyte.format.gguf_header import read_gguf_header
from halfbyte.format.gguf_model import draw_picture
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights, open_weights
from halfbyte.records import versions
from halfbyte.texts.protocols import load_tokenizer

F32, NO_FLASH = 0, 0  # enum values of ggml_type and llama_flash_attn_type


def engine() -> Any:
    """cyllama's bindings, llama.cpp's log switched off; raises UsageError if they are not installed."""
    try:
        from cyllama.llama import llama_cpp
    except ImportError:
        raise UsageError("not installed", where="cyllama", todo="uv run --with cyllama==0.2.18 python ...") from None
    llama_cpp.disable_logging()
    return llama_cpp


@contextmanager
def opened(llama: Any, path: Path, length: int) -> Iterator[Any]:
    """The context of a GGUF, for windows of `length` tokens."""

    class Model(llama.LlamaModel):  # type: ignore[misc]
        """0.2.18 asks the model for its vocabulary's size by a name that it lacks."""

        @property
        def n_vocab(self) -> int:
            return int(self.get_vocab().n_vocab)

    model = Model(str(path), llama.LlamaModelParams(), verbose=False)
    how = llama.LlamaContextParams()
    how.n_ctx = how.n_batch = how.n_ubatch = length
    how.n_threads = how.n_threads_batch = 2
    how.type_k = how.type_v = F32
    how.flash_attn_type = NO_FLASH
    context = llama.LlamaContext(model, how, verbose=False)
    try:
        yield context
    finally:
        context.close()
        model.close()


def log_probabilities(llama: Any, context: Any, ids: np.ndarray) -> np.ndarray:
    """float64 [length, vocabulary] of one window: every position's logits, log softmax by numpy."""
    context.kv_cache_clear()
    batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for at, token in enumerate(ids.tolist()):
        batch.add(token, at, [0], True)
    context.decode(batch)
    logits = np.stack([np.array(context.get_logits_ith(at), np.float64) for at in range(len(ids))])
    batch.close()
    logits -= logits.max(-1, keepdims=True)
    found: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def write_float32(source: Path, weights: Weights, path: Path) -> None:
    """`weights` as a GGUF in float32 with the metadata of `source` and llama.cpp's own order of rows."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in draw_picture(read_gguf_header(source)).tensors:
        values = weights.load(tensor.name).float().numpy()
        if tensor.row_order is not None:
            stored = np.empty_like(values)
            stored[tensor.row_order] = values
            values = stored
        writer.add_tensor(tensor.stored.name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def by_llama(rows: Rows, files: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    """{name: {"nll", "kld"}}, float64 [n]: KLD from `source`, which must be first."""
    llama = engine()
    base: list[np.ndarray] = []
    found = {}
    for name, path in files.items():
        nll, kld = [], []
        with opened(llama, path, len(rows.tokens[0])) as context:
            for number, ids in enumerate(rows.tokens):
                log_q = log_probabilities(llama, context, ids)[:-1]
                nll.append(-log_q[np.arange(len(log_q)), ids[1:]])
                if name == "source":
                    base.append(log_q.astype(np.float32))  # kept: 100 MB a window
                log_p = base[number].astype(np.float64)
                p = np.exp(log_p)
                kld.append((p * (log_p - log_q) - p + np.exp(log_q)).sum(-1))
        found[name] = {"nll": np.concatenate(nll), "kld": np.concatenate(kld)}
    return found


def compare(
    theirs: dict[str, dict[str, np.ndarray]], ours: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, float]]:
    table = {}
    for name, vectors in ours.items():
        row = {}
        for key, mine in vectors.items():
            other = theirs[name][key]
            row |= {
                f"{key}_ours": float(mine.mean()), f"{key}_llama": float(other.mean()),
                f"{key}_difference_of_means": float(mine.mean() - other.mean()),
                f"{key}_mean_difference": float(np.abs(mine - other).mean()),
                f"{key}_largest_difference": float(np.abs(mine - other).max()),
            }  # fmt: skip
        row |= {"ppl_ours": float(np.exp(row["nll_ours"])), "ppl_llama": float(np.exp(row["nll_llama"]))}
        table[name] = row
    return table


def show(table: dict[str, dict[str, float]], file_kld: float, rows: Rows) -> None:
    print(f"n = {rows.n:,} positions of {len(rows.tokens)} windows of {len(rows.tokens[0])} tokens")
    print(
        f"{'':9}{'PPL ours':>11}{'llama.cpp':>11}{'|d NLL|':>10}{'max':>10}{'KLD ours':>12}{'llama.cpp':>12}{'|d KLD|':>10}{'max':>10}"
    )
    for name, row in table.items():
        line = f"{name:9}{row['ppl_ours']:11.4f}{row['ppl_llama']:11.4f}{row['nll_mean_difference']:10.1e}{row['nll_largest_difference']:10.1e}"
        if "kld_ours" in row:
            line += f"{row['kld_ours']:12.6f}{row['kld_llama']:12.6f}{row['kld_mean_difference']:10.1e}{row['kld_largest_difference']:10.1e}"
        print(line)
    print(f"KLD of llama.cpp's Q4_1 kernels from its float32 ones, same weights up to bf16: {file_kld:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, windows=10, length=512)
    options = parser.parse_args()
    llama = engine()
    gguf, text = inputs(options.text)
    started = time.perf_counter()
    reference = open_weights(gguf)
    candidates = {grid: open_weights(f"{gguf}@{grid}", like=reference) for grid in ("nf4", "q4_0")}
    rows = window_rows(load_tokenizer(reference), text, options.windows, options.length)
    scores = score(reference, list(candidates.values()), rows, floor=False, dtype="float32", batch=2)
    ours = {"source": {"nll": scores.reference.nll}, "file": {"nll": scores.reference.nll}}
    for name, found in zip(candidates, scores.candidates, strict=True):
        ours[name] = {"nll": found.nll, "kld": found.kld}
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for name, weights in {"source": reference, **candidates}.items():
            files[name] = Path(scratch) / f"{name}.gguf"
            write_float32(gguf, weights, files[name])
        theirs = by_llama(rows, {**files, "file": gguf})
    table, file_kld = compare(theirs, ours), float(theirs["file"]["kld"].mean())
    show(table, file_kld, rows)
    result = {
        "benchmark": "against_llama_cpp", "rows": table, "file_kld": file_kld, "n": rows.n, "windows": options.windows,
        "length": options.length, "rows_digest": rows.digest, "text_sha256": sha256(text), "gguf_sha256": sha256(gguf),
        "ggml": f"{llama.ggml_version()} ({llama.ggml_commit()})", "cyllama": version("cyllama"),
        "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result))
    for weights in (*candidates.values(), reference):
        weights.close()


if __name__ == "__main__":
    run_script(main)
