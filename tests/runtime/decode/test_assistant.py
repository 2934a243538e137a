"""Gemma 4's assistant drafts what it drafts in transformers, from our cache, and the text stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtime.decode.small_decoders import VOCABULARY, assistant_of_gemma4_e, gemma4_e, llama
from runtime.decode.test_loop import NEW, gathered, inputs_of

from halfbyte.runtime.decode.assistant import draft_by
from halfbyte.runtime.decode.description import NotDescribed
from halfbyte.runtime.decode.loop import Decoder
from halfbyte.runtime.decode.prompt import fill
from halfbyte.runtime.decode.state import begin

pytestmark = pytest.mark.usefixtures("one_thread")
#: shorter than the window: transformers cuts shared keys from the front, which is right only up to there
TEXT = torch.randint(1, VOCABULARY, (20,), generator=torch.Generator().manual_seed(9)).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return gemma4_e()


def by_transformers(model: Any, assistant: Any, count: int) -> list[int]:
    """The loop of transformers' candidate generator, with the keys of all tokens but the last."""
    past = torch.tensor([TEXT[:-1]])
    output = model(input_ids=past, output_hidden_states=True, return_shared_kv_states=True, use_cache=True)
    hidden, token, drafted = output.hidden_states[-1][:, -1:], torch.tensor([TEXT[-1:]]), []
    for _ in range(count):
        found = assistant(
            inputs_embeds=torch.cat([model.get_input_embeddings()(token), hidden], dim=-1),
            position_ids=torch.tensor([[len(TEXT) - 1]]), shared_kv_states=output.shared_kv_states,
        )  # fmt: skip
        hidden, token = found.last_hidden_state, found.logits.argmax(-1)
        drafted.append(int(token))
    return drafted


@pytest.mark.parametrize("ordered", [False, True])
@torch.inference_mode()
def test_it_drafts_what_it_drafts_in_transformers(model, ordered):
    assistant = assistant_of_gemma4_e(ordered)
    decoder = Decoder(model, 1, 60, assistant)
    begin(decoder.state, [TEXT], 10, (), 0)
    fill(decoder.description, decoder.cache, [TEXT])
    hidden = model(input_ids=torch.tensor([TEXT[:-1]]), output_hidden_states=True).hidden_states[-1][:, -1]
    decoder.assistant.hidden.copy_(hidden)
    found = draft_by(decoder.assistant, decoder.description, decoder.cache, decoder.state, 6)
    assert found.tolist() == [[TEXT[-1], *by_transformers(model, assistant, 5)]]
    assert len(set(found[0].tolist())) > 3


def test_the_hidden_state_it_goes_on_from_is_that_behind_the_last_token_kept(model):
    decoder = Decoder(model, 1, 60, assistant_of_gemma4_e(False))
    new = gathered(decoder.tokens(inputs_of(TEXT), 3, speculate=3))[0]
    kept = torch.tensor([TEXT + new[:-1]])
    expected = model(input_ids=kept, output_hidden_states=True).hidden_states[-1][:, -1]
    torch.testing.assert_close(decoder.assistant.hidden, expected, rtol=1e-3, atol=1e-4)


def test_its_drafts_do_not_change_the_text(model):
    inputs = inputs_of(TEXT, TEXT[:7])
    plain = gathered(Decoder(model, 2, 60 + NEW).tokens(inputs, NEW))
    decoder = Decoder(model, 2, 60 + NEW, assistant_of_gemma4_e(False))
    assert gathered(decoder.tokens(inputs, NEW, speculate=4)) == plain
    assert decoder.report["drafted"] > 0


def test_an_assistant_of_another_model_is_refused(model):
    with pytest.raises(NotDescribed, match="wants sliding_attention keys"):
        Decoder(llama(), 1, 60, assistant_of_gemma4_e(False))
    with pytest.raises(NotDescribed, match="is not an assistant"):
        Decoder(model, 1, 60, llama())
