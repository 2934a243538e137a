"""The harness on tiny models: what must be exact is exact, and transformers' own loss agrees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layers.small_rows import random_rows

from halfbyte.errors import PlanError, ShapeMismatch, SourceError, UsageError
from halfbyte.evaluator.scoring.scorer import Scores, score
from halfbyte.layers.model import Head, WholeModel
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import open_weights


def run(reference: Path | str, specs: Sequence[Path | str], rows: Rows, **options: Any) -> Scores:
    opened = open_weights(reference)
    candidates = [open_weights(spec, like=opened) for spec in specs]
    try:
        return score(opened, candidates, rows, **{"batch": 2, "floor": False, **options})
    finally:
        for weights in (*candidates, opened):
            weights.close()


@pytest.mark.parametrize("spec", ["uniform", "{}@uniform"])
def test_uniform_model_has_perplexity_equal_to_its_vocabulary(tiny_gemma4: Path, gemma_rows: Rows, spec: str) -> None:
    (uniform,) = run(tiny_gemma4, [spec.format(tiny_gemma4)], gemma_rows).candidates
    assert np.exp(uniform.nll.mean()) == pytest.approx(2048, rel=1e-6)
    assert np.ptp(uniform.nll) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_against_itself_is_exactly_zero(tiny_gemma4: Path, gemma_rows: Rows, dtype: str) -> None:
    scores = run(tiny_gemma4, [tiny_gemma4], gemma_rows, dtype=dtype)
    assert scores.self_kld == 0.0
    assert not scores.candidates[0].kld.any()
    assert not scores.candidates[0].delta_p.any()
    assert scores.candidates[0].agrees.all()


def test_nf4_checkpoint_scores_exactly_as_its_round_trip_in_memory(
    tiny_gemma4: Path, tiny_nf4: Path, gemma_rows: Rows
) -> None:
    written, rounded, grid = run(
        tiny_gemma4, [tiny_nf4, f"{tiny_gemma4}@nf4", f"{tiny_gemma4}@q4_0"], gemma_rows
    ).candidates
    for vector in ("kld", "nll", "agrees", "delta_p"):
        assert np.array_equal(getattr(written, vector), getattr(rounded, vector)), vector
    assert written.kld.mean() > 0.01, "NF4 of random weights costs something"
    assert not np.array_equal(grid.kld, written.kld)
    assert len({written.digest, rounded.digest, grid.digest}) == 3


@pytest.mark.parametrize("model", ["tiny_gemma4", "tiny_llama"])
def test_nll_is_the_loss_of_transformers(model: str, request: pytest.FixtureRequest) -> None:
    """Row by row and unpadded, through `from_pretrained` and the model's own labels: the other implementation."""
    import torch
    import transformers

    folder = request.getfixturevalue(model)
    rows = random_rows(3, 128)
    scores = run(folder, [folder], rows, batch=3)
    auto = getattr(transformers, "AutoModelForImageTextToText" if model == "tiny_gemma4" else "AutoModelForCausalLM")
    stock = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for row, (ids, mask) in enumerate(zip(rows.tokens, rows.scored, strict=True)):
        labels = torch.from_numpy(ids).long()
        wanted = torch.where(torch.from_numpy(np.roll(mask, 1)), labels, -100)
        with torch.inference_mode():
            loss = stock(input_ids=labels[None], labels=wanted[None]).loss.item()
        assert scores.reference.nll[scores.row == row].mean() == pytest.approx(loss, abs=2e-5)


def test_vectors_are_in_the_order_of_the_rows_whatever_the_batch(tiny_llama: Path) -> None:
    rows = random_rows(3, 128)
    one, three = (run(tiny_llama, [f"{tiny_llama}@nf4"], rows, batch=batch) for batch in (1, 3))
    expected = np.concatenate([ids[1:][mask[:-1]] for ids, mask in zip(rows.tokens, rows.scored, strict=True)])
    for scores in (one, three):
        assert np.array_equal(scores.label, expected)
        assert len(scores.candidates[0].kld) == rows.n == len(scores.label)
        assert list(scores.document) == [rows.documents[row] for row in scores.row]
    assert np.allclose(one.candidates[0].kld, three.candidates[0].kld, rtol=1e-3, atol=1e-6)


def test_logits_of_the_chunked_head_are_the_models_own(tiny_gemma4: Path) -> None:
    """Softcap, tied head, vocabulary in slices: the slow path of a large head gives the fast path's logits."""
    import torch

    model = WholeModel(open_weights(tiny_gemma4))
    model.check_head(range(400, 420))
    whole = model.head
    sliced = Head(whole.weight.bfloat16(), None, whole.scale, whole.softcap)
    hidden = 3 * torch.randn(7, whole.weight.shape[1], generator=torch.Generator().manual_seed(0))
    assert whole.softcap == 30.0
    assert torch.allclose(sliced.logits(hidden), whole.logits(hidden), atol=1e-5)
    model.head = Head(whole.weight, None, whole.scale, None)
    model.decoder.norm.weight.mul_(20)  # loud enough for the softcap to matter
    with pytest.raises(PlanError, match="behind its head"):
        model.check_head(range(400, 420))


def test_floor_is_seeded_above_zero_and_below_nf4(tiny_llama: Path) -> None:
    rows = random_rows(3, 128)
    first, second = (run(tiny_llama, [f"{tiny_llama}@nf4"], rows, floor=True) for _ in range(2))
    assert first.floor is not None
    assert second.floor is not None
    assert np.array_equal(first.floor.kld, second.floor.kld)
    assert 0 < first.floor.kld.mean() < first.candidates[0].kld.mean() / 10


def test_model_built_from_weights_equals_from_pretrained_to_the_bit(tiny_gemma4: Path) -> None:
    """Rope tables, embedding scale and `layer_scalar` included; in bf16, where a scale in float32 would show."""
    import torch
    from transformers import AutoModelForImageTextToText

    ids = torch.arange(400, 500)[None]
    stock = AutoModelForImageTextToText.from_pretrained(tiny_gemma4, dtype=torch.bfloat16).eval()
    ours = WholeModel(open_weights(tiny_gemma4), dtype="bfloat16")
    with torch.inference_mode():
        assert torch.equal(
            ours.model(input_ids=ids, use_cache=False).logits, stock(input_ids=ids, use_cache=False).logits
        )


def test_a_checkpoint_without_one_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj"):
        WholeModel(open_weights(tmp_path))


def test_a_candidate_of_another_vocabulary_is_refused(tiny_gemma4: Path, tiny_llama: Path) -> None:
    with pytest.raises(ShapeMismatch, match="2048 and 128"):
        run(tiny_gemma4, [tiny_llama], random_rows(3, 128))


def test_specs_that_cannot_be_are_refused(tiny_nf4: Path, tiny_gemma4: Path) -> None:
    with pytest.raises(SourceError, match="quantized already"):
        open_weights(f"{tiny_nf4}@q4_0")
    with pytest.raises(UsageError, match="no shape of its own"):
        open_weights("uniform")
    with pytest.raises(UsageError, match="attention"):
        WholeModel(open_weights(tiny_gemma4), attention="flash")
    with pytest.raises(SourceError, match="no such file"):
        open_weights(f"{tiny_gemma4}@q5_0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_agrees_with_cpu(tiny_llama: Path, dtype: str) -> None:
    rows = random_rows(3, 128)
    gpu = run(tiny_llama, [tiny_llama, f"{tiny_llama}@nf4"], rows, device="cuda", dtype=dtype, floor=True)
    cpu = run(tiny_llama, [tiny_llama, f"{tiny_llama}@nf4"], rows)
    assert gpu.self_kld == 0.0
    assert not gpu.candidates[0].kld.any()
    close = {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    assert gpu.candidates[1].kld.mean() == pytest.approx(cpu.candidates[1].kld.mean(), rel=close)


@pytest.mark.real
def test_smollm2_loses_something_to_nf4_and_nothing_to_itself(smollm2: Path) -> None:
    """One row of a sentence the model knows: perplexity far below that of its NF4, KLD above the floor."""
    from halfbyte.texts.protocols import given_answers, load_tokenizer
    from halfbyte.texts.reading import Chat

    reference = open_weights(smollm2)
    chat = Chat(
        "1", ({"role": "user", "content": "What is the capital of France?"},), "The capital of France is Paris."
    )
    rows = given_answers(load_tokenizer(reference), [chat])
    scores = score(reference, [open_weights(f"{smollm2}@nf4", like=reference)], rows)
    assert scores.self_kld == 0.0
    assert scores.floor is not None
    assert np.exp(scores.reference.nll.mean()) < 2
    assert 10 * scores.floor.kld.mean() < scores.candidates[0].kld.mean() < 1
