"""On a GPU: the recorded step gives transformers' tokens, drafts and company leave every bit alone, and a layer is ten launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime.decode.small_decoders import FAMILIES, VOCABULARY, fuse, llama
from runtime.decode.test_loop import NEW, by_transformers, expanded, gathered, inputs_of
from runtime.small_models import stock_on_gpu
from runtime.stored_weights import drawn

from halfbyte.runtime.decode.loop import Decoder, decode
from halfbyte.runtime.decode.sampling import Sampling
from halfbyte.runtime.loading import replacement
from halfbyte.runtime.loading.choice import Always

pytestmark = pytest.mark.gpu


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def random_prompt(length: int, seed: int = 7) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def nf4_llama() -> Any:
    """bf16, every product NF4 or by `dense`: what must not depend on company."""
    model = fuse(llama(), lambda parts, k, seed: drawn(parts, k, 32, seed=seed), expanded)
    return model.to("cuda", torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_tokens_equal_transformers_on_the_same_gpu(family):
    model = FAMILIES[family]().cuda()
    first = random_prompt(50)
    inputs = on_gpu(inputs_of(first, first[:4] + first[:4] + first[:3]))
    expected = by_transformers(model, inputs)
    assert gathered(decode(model, inputs, NEW)) == expected
    assert gathered(decode(model, inputs, NEW, speculate=7)) == expected


def test_a_picture_joins_the_recorded_loop():
    from PIL import Image

    from halfbyte.demo.embedded import embedded
    from halfbyte.runtime.generate import Chat

    chat = Chat(embedded("vanilla"), "cuda")
    inputs = dict(chat.inputs("Which colour is it?", [Image.new("RGB", (96, 96), "red")]))
    model = chat.model.float()
    assert gathered(decode(model, inputs, 60, stops=[])) == by_transformers(model, inputs, 60, eos_token_id=None)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(do_sample=True, temperature=0.5, top_k=20, top_p=0.9, seed=3)]
)
def test_drafts_do_not_change_a_bf16_text(nf4_llama, sampling):
    first = random_prompt(50)
    inputs = on_gpu(inputs_of(first, first[:4] + first[:4] + first[:3]))
    decoder = Decoder(nf4_llama, rows=2, capacity=50 + 4 * NEW)
    plain = gathered(decoder.tokens(inputs, 4 * NEW, sampling=sampling))
    assert gathered(decoder.tokens(inputs, 4 * NEW, sampling=sampling, speculate=7)) == plain
    assert decoder.report["accepted"] > 0
    assert gathered(decoder.tokens(inputs, 4 * NEW, sampling=sampling)) == plain


def test_company_does_not_change_a_bf16_text(nf4_llama):
    """From one token each: a prompt's own matmuls are cuBLAS', which has another order of sums for another length."""
    starts = [[token] for token in random_prompt(16)]
    together = gathered(decode(nf4_llama, on_gpu(inputs_of(*starts)), 2 * NEW))
    assert len({tuple(row) for row in together}) > 10
    for row in (0, 9, 15):
        assert gathered(decode(nf4_llama, on_gpu(inputs_of(starts[row])), 2 * NEW)) == [together[row]]


@pytest.mark.parametrize("rows", [17, 64])
def test_many_rows_of_many_lengths_are_answered(nf4_llama, rows):
    prompts = [random_prompt(1 + row, seed=row) for row in range(rows)]
    found = gathered(decode(nf4_llama, on_gpu(inputs_of(*prompts)), NEW))
    assert all(len(row) == NEW for row in found)


@pytest.fixture(scope="module")
def replaced_llama() -> Any:
    """bitsandbytes' linears, replaced as `halfbyte.load` does it."""
    model = stock_on_gpu("Llama")
    replacement.replace(model, Always("test"))
    return model


@pytest.mark.parametrize("made", ["nf4_llama", "replaced_llama"])
def test_a_layer_is_ten_launches_and_all_else_thirty(made, request):
    model = request.getfixturevalue(made)
    from torch.profiler import ProfilerActivity, profile

    def launches(layers: int) -> int:
        all_layers = model.model.layers
        model.model.layers = all_layers[:layers]
        try:
            decoder = Decoder(model, rows=1, capacity=100)
            prompt = [token % model.config.vocab_size for token in random_prompt(9)]
            gathered(decoder.tokens(on_gpu(inputs_of(prompt)), 3))
            step = decoder._step(1, Sampling())
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                step()
                torch.cuda.synchronize()
        finally:
            model.model.layers = all_layers
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())

    layers = len(model.model.layers)
    half, whole = launches(layers // 2), launches(layers)
    assert (whole - half) / (layers - layers // 2) == 10
    assert whole - layers * 10 <= 30
