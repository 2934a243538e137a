"""Decoding gives the tokens of transformers' greedy `generate`, for every family, past the window, alone and in company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtime.decode.small_decoders import FAMILIES, SIZES, VOCABULARY, fuse, llama
from runtime.stored_weights import dense, drawn

from halfbyte.errors import UsageError
from halfbyte.runtime.decode import loop
from halfbyte.runtime.decode.description import NotDescribed
from halfbyte.runtime.decode.loop import Decoder, decode
from halfbyte.runtime.decode.sampling import Sampling
from halfbyte.runtime.decode.step import logits_of

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 40
#: of the long prompt: longer than every window here (24) and ring (48)
LONG = 50


def inputs_of(*rows: list[int], side: str = "left") -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if side == "left" else one + pad for one, pad in zip(ones, pads, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def gathered(pieces: Iterator[list[list[int]]]) -> list[list[int]]:
    rows: list[list[int]] = []
    for piece in pieces:
        rows = rows or [[] for _ in piece]
        for row, new in zip(rows, piece, strict=True):
            row.extend(new)
    return rows


def by_transformers(model: Any, inputs: dict[str, Any], new: int = NEW, **options: Any) -> list[list[int]]:
    start = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, **options)[:, start:].tolist()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The second holds a repetition, so that drafts are right now and then."""
    maker = torch.Generator().manual_seed(7)
    first = torch.randint(1, VOCABULARY, (LONG,), generator=maker).tolist()
    return [first, first[:4] + first[:4] + first[:3]]


@pytest.fixture(scope="module")
def small_llama() -> Any:
    return llama()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers_and_neither_company_nor_chunks_nor_drafts_change_them(family, prompts, monkeypatch):
    model = FAMILIES[family]()
    together = inputs_of(*prompts)
    expected = by_transformers(model, together)
    assert len({*expected[0], *expected[1]}) > 11
    assert gathered(decode(model, together, NEW)) == expected
    assert gathered(decode(model, inputs_of(prompts[1]), NEW)) == expected[1:]
    monkeypatch.setattr(loop, "CHUNK", 9)
    assert gathered(decode(model, inputs_of(*prompts, side="right"), NEW, speculate=7)) == expected


def test_a_gemma_4_with_wide_full_layers_and_no_values_of_their_own_is_followed_past_its_window(tiny_gemma4, prompts):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_gemma4, dtype=torch.float32)
    inputs = inputs_of([token + 300 for token in prompts[0]])
    expected = by_transformers(model, inputs, 70)
    assert gathered(decode(model, inputs, 70)) == expected
    assert gathered(decode(model, inputs, 70, speculate=3)) == expected


def test_a_picture_goes_through_the_models_own_tower_and_its_answer_through_the_loop():
    from PIL import Image

    from halfbyte.demo.embedded import embedded
    from halfbyte.runtime.generate import Chat

    chat = Chat(embedded("vanilla"), "cpu")
    model = chat.model.float()
    inputs = dict(chat.inputs("Which colour is it?", [Image.new("RGB", (96, 96), "red")]))
    assert int((inputs["mm_token_type_ids"] == 1).sum()) > 16
    expected = by_transformers(model, inputs, 60, eos_token_id=None)
    assert gathered(decode(model, inputs, 60, stops=[])) == expected
    decoder = Decoder(model, rows=1, capacity=8)
    at = torch.zeros(1, dtype=torch.int64)
    of_stand_in, of_padding = (
        logits_of(decoder.description, decoder.cache, torch.tensor([[token]]), at)
        for token in (model.config.image_token_id, 0)
    )
    assert torch.equal(of_stand_in, of_padding)
    with pytest.raises(UsageError, match="end in text"):
        gathered(
            decode(model, {name: value[:, :20] if value.dim() == 2 else value for name, value in inputs.items()}, 5)
        )


def test_fused_nf4_products_give_the_tokens_of_plain_linears_with_the_same_values(prompts):
    model = llama()
    plain = by_transformers(
        fuse(model, lambda parts, k, seed: drawn(parts, k, 32, seed=seed), expanded), inputs_of(*prompts)
    )
    assert gathered(decode(model, inputs_of(*prompts), NEW)) == plain
    model.model.layers[2].self_attn.qkv_proj.nested.mul_(0.5)  # it is the fused one that is asked
    assert gathered(decode(model, inputs_of(*prompts), NEW)) != plain


def expanded(weight: Any) -> torch.Tensor:
    return dense(weight.to_stored())


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(small_llama, prompts):
    whole = gathered(decode(small_llama, inputs_of(*prompts), NEW))
    stop = next(token for token in whole[0][5:] if token not in whole[1] and token not in whole[0][:5])
    for speculate in (0, 7):
        rows = gathered(decode(small_llama, inputs_of(*prompts), NEW, stops=[stop], speculate=speculate))
        assert rows == [whole[0][: whole[0].index(stop) + 1], whole[1]]


def test_a_decoder_is_used_again_and_reports_what_drafts_saved(small_llama, prompts):
    decoder = Decoder(small_llama, rows=1, capacity=LONG + NEW)
    first = gathered(decoder.tokens(inputs_of(prompts[0]), NEW))
    assert decoder.report["steps"] == NEW
    assert decoder.report["acceptance"] is None
    gathered(decoder.tokens(inputs_of(prompts[1]), 7))
    # what was said is said again: the drafts are right, all but where the text was new
    again = gathered(decoder.tokens(inputs_of(prompts[0] + first[0][:20] + prompts[0][-8:]), 12, speculate=7))
    assert again == gathered(decoder.tokens(inputs_of(prompts[0] + first[0][:20] + prompts[0][-8:]), 12))
    assert gathered(decoder.tokens(inputs_of(prompts[0]), NEW, speculate=15)) == first
    assert decoder.report["steps"] + decoder.report["accepted"] == decoder.report["new_tokens"] == NEW


def test_a_seed_gives_one_text_with_drafts_or_without_and_another_seed_another(small_llama, prompts):
    def text(seed: int, **options: Any) -> list[list[int]]:
        sampling = Sampling(do_sample=True, temperature=0.4, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=seed)
        return gathered(decode(small_llama, inputs_of(*prompts), NEW, sampling=sampling, **options))

    assert text(3) == text(3, speculate=5) != text(4)


def test_a_repetition_penalty_is_transformers(small_llama, prompts):
    inputs = inputs_of(prompts[0])
    found = gathered(decode(small_llama, inputs, NEW, sampling=Sampling(repetition_penalty=1.3)))
    assert found == by_transformers(small_llama, inputs, repetition_penalty=1.3)


def test_inputs_that_cannot_be_are_refused(small_llama, prompts):
    decoder = Decoder(small_llama, rows=1, capacity=40)
    with pytest.raises(UsageError, match="do not fit"):
        next(decoder.tokens(inputs_of(prompts[0]), 9))
    with pytest.raises(UsageError, match="cannot draft 16"):
        next(decoder.tokens(inputs_of(prompts[0]), 1, speculate=16))
    with pytest.raises(UsageError, match="no prompts"):
        next(decode(small_llama, {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}))


def test_models_that_are_not_known_are_refused_with_the_reason():
    from transformers import AutoConfig, AutoModelForCausalLM

    def refusal(**config: Any) -> str:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | config)).eval()
        with pytest.raises(NotDescribed) as caught:
            Decoder(model, 1, 16)
        return caught.value.what

    heads = {"head_dim": 16, "num_hidden_layers": 2}
    assert "0 decoders of a known family" in refusal(model_type="gemma2", **heads)
    mixture = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    assert "mixture of experts" in refusal(model_type="gemma4_text", hidden_size_per_layer_input=0, **heads, **mixture)
    assert "looks ahead" in refusal(model_type="gemma3_text", use_bidirectional_attention=True, **heads)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "'dynamic'" in refusal(model_type="llama", rope_parameters=dynamic)
    assert "its activation is 'relu'" in refusal(model_type="llama", hidden_act="relu")
    with torch.device("meta"):
        assert "['meta']" in refusal(model_type="llama")
