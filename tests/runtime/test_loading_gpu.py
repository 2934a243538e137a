"""On a GPU: replaced linears in whole models, the choice by real times, memory while replacing, graphs and compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.small_models import CLASSES, stock_on_gpu
from runtime.stored_weights import draw

from halfbyte.runtime.loading import replacement
from halfbyte.runtime.loading.checkpoint import choose_linears
from halfbyte.runtime.loading.choice import Always, read_times
from halfbyte.runtime.loading.report import OURS, THEIRS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compiled kernels and times of this test alone."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model((torch.arange(24).view(2, 12) % 60 + 2).cuda()).logits
    return found.float()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_replaced_model_says_what_the_stock_model_says_and_can_be_put_back(kind):
    model = stock_on_gpu(kind)
    expected = logits(model)
    report = replacement.replace(model, Always("test"))
    assert not report.of(THEIRS)
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < 5e-2
    replacement.restore(model)
    assert torch.equal(logits(model), expected)


def wide(count: int, rows: int = 4096, columns: int = 2048) -> torch.nn.Sequential:
    """Linear4bit after Linear4bit, random, on the GPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers = []
    for seed in range(count):
        layer = Linear4bit(columns, rows, False, torch.bfloat16, True, "nf4", device="meta")
        tensors = draw(rows, columns, seed, device="cuda").to_dict()
        packed = tensors.pop("weight")
        layer.weight = Params4bit.from_prequantized(packed, tensors, device="cuda", module=layer)
        layers.append(layer)
    return torch.nn.Sequential(*layers).eval()


def test_times_are_taken_once_a_gpu_and_decide(own_cache):
    models = [wide(2), wide(2)]
    for model in models:
        choose_linears(model, "cuda", "auto")
    first, second = (model.halfbyte for model in models)
    assert first.measuring_s > 0
    assert second.measuring_s == 0
    assert first.places == second.places
    (file,) = (own_cache / "choices").iterdir()
    ((_, times),) = read_times(file).items()
    assert all("bitsandbytes" in row and len(row) > 1 for row in times.values())
    print(first.summary(), {m: {p: round(1e6 * t, 1) for p, t in row.items()} for m, row in times.items()})


def test_a_row_has_the_same_bits_in_any_batch_of_1_to_16_by_the_measured_table():
    model = wide(1)
    choose_linears(model, "cuda", True)
    assert model.halfbyte.of(OURS)
    x = torch.randn(16, 2048, device="cuda").to(torch.bfloat16)
    with torch.inference_mode():
        whole = model(x)
        assert all(torch.equal(model(x[:m]), whole[:m]) for m in range(1, 17))


def test_replacing_needs_the_memory_of_one_group_more():
    from bitsandbytes.nn import Linear4bit

    model = wide(12)
    one = 4096 * 2048 // 2 + 4096 * 2048 // 64
    assert sum(isinstance(layer, Linear4bit) for layer in model) == 12
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    replacement.replace(model, Always("test"))
    assert torch.cuda.max_memory_allocated() - before < 3.5 * one
    assert torch.cuda.memory_allocated() - before < one


def test_a_stack_in_a_cuda_graph_gives_what_it_gives_outside():
    model = stock_on_gpu("Llama")
    replacement.replace(model, Always("test"))
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 64, device="cuda").to(torch.bfloat16)
    with torch.inference_mode():
        mlp(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = mlp(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(found, mlp(x))


def test_a_compiled_layer_gives_what_it_gives_uncompiled():
    model = stock_on_gpu("Llama")
    replacement.replace(model, Always("test"))
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, 64, device="cuda").to(torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(mlp, fullgraph=True)(x)
        torch.testing.assert_close(compiled, mlp(x), rtol=2e-2, atol=2e-3)


def test_saved_tensors_are_the_stock_models_and_lie_in_host_memory():
    model = stock_on_gpu("Gemma4")
    before = {name: tensor.cpu().view(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}
    replacement.replace(model, Always("test"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor.cpu().view(-1).view(torch.uint8)) for name, tensor in after.items())
    assert all(not tensor.is_cuda for name, tensor in after.items() if name.endswith("proj.weight"))


def test_a_loaded_checkpoint_says_the_same_words_and_saves_the_same_bytes(tmp_path):
    pytest.importorskip("numba", reason="halfbyte.quantize needs numba")
    from safetensors.torch import load_file

    import halfbyte
    from halfbyte.demo.embedded import embedded

    halfbyte.quantize(embedded("vanilla"), tmp_path / "nf4")
    answers = [
        halfbyte.generate(tmp_path / "nf4", "Name three primary colors.", device="cuda", fast=fast, max_new_tokens=16)
        for fast in (False, True)
    ]
    assert answers[0]["text"] == answers[1]["text"]
    assert (answers[0]["linears"]["halfbyte"], answers[1]["linears"]["bitsandbytes"]) == (0, 0)
    halfbyte.load(tmp_path / "nf4", device="cuda", fast=True).save_pretrained(tmp_path / "again")
    before, after = (
        {n: t for file in (tmp_path / folder).glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in ("nf4", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(-1).view(torch.uint8), after[n].view(-1).view(torch.uint8)) for n in before)
