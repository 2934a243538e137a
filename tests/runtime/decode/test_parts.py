"""What a step is made of, each part against something simpler: sampling against numpy, drafts and acceptance by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.decode.small_decoders import gemma4_e

from halfbyte.errors import UsageError
from halfbyte.runtime.decode.cache import cache_bytes, new_cache
from halfbyte.runtime.decode.description import describe
from halfbyte.runtime.decode.kernels.append import append
from halfbyte.runtime.decode.kernels.norm import Norm, normed
from halfbyte.runtime.decode.sampling import Sampling, choose, sampling_of, seen_before, uniforms
from halfbyte.runtime.decode.speculation import draft
from halfbyte.runtime.decode.state import begin, new_state

pytestmark = pytest.mark.usefixtures("one_thread")


def by_numpy(logits: np.ndarray, sampling: Sampling, u: float, seen: set[int]) -> int:
    """The rule of `sampling`'s docstring, word by word, for one row."""
    scores = logits.astype(np.float64)
    for token in seen:
        scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
    if not sampling.do_sample:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")[: sampling.top_k or None]
    p = np.exp((scores[order] - scores.max()) / sampling.temperature)
    p /= p.sum()
    kept = [i for i in range(len(p)) if p[:i].sum() < sampling.top_p and p[i] >= sampling.min_p * p[0]]
    total = p[kept].sum()
    return int(next((order[i] for n, i in enumerate(kept) if p[kept[: n + 1]].sum() > u * total), order[kept[-1]]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.booleans(), st.floats(0.3, 2), st.sampled_from([0, 1, 5, 500]), st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.7]), st.sampled_from([1.0, 1.5]),
)  # fmt: skip
def test_a_choice_is_the_one_that_numpy_makes(seed, do_sample, temperature, top_k, top_p, min_p, penalty):
    sampling = Sampling(do_sample, temperature, top_k, top_p, min_p, penalty)
    maker = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 50, generator=maker)
    u = torch.rand(4, generator=maker, dtype=torch.float64)
    seen = torch.rand(4, 50, generator=maker) < 0.2
    found = choose(logits, sampling, u, seen).tolist()
    rows = [set(np.flatnonzero(row)) for row in seen.numpy()]
    assert found == [by_numpy(logits[row].numpy(), sampling, float(u[row]), rows[row]) for row in range(4)]


def test_a_draw_at_the_very_end_stays_among_the_kept():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(do_sample=True, top_p=0.5), almost_one, None).tolist() == [0]
    assert choose(logits, Sampling(do_sample=True), almost_one, None).tolist() == [3]


def test_every_row_has_numbers_of_its_own_whatever_the_batch():
    assert torch.equal(uniforms(3, 20, 5)[1], uniforms(1, 20, 6)[0])
    assert not torch.equal(uniforms(3, 20, 5)[0], uniforms(3, 20, 5)[1])


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"repetition_penalty": 0}]
)
def test_sampling_values_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_options_mean_what_they_mean_to_transformers():
    from transformers import GenerationConfig

    gemma = GenerationConfig(do_sample=True, temperature=1.0, top_k=64, top_p=0.95)
    assert sampling_of({"max_new_tokens": 9, "temperature": None}, gemma) == Sampling()  # greedy unless asked otherwise
    assert sampling_of({"temperature": 0.7, "seed": 4}, gemma) == Sampling(True, 0.7, 64, 0.95, seed=4)
    assert sampling_of({"do_sample": True, "top_k": 0}, gemma) == Sampling(True, top_p=0.95)
    assert sampling_of({"min_p": 0.1}) == Sampling(True, top_k=50, min_p=0.1)
    assert sampling_of({"do_sample": False, "repetition_penalty": 1.2}, gemma) == Sampling(repetition_penalty=1.2)


def test_penalized_are_the_tokens_known_and_the_drafts_before():
    history = torch.tensor([[4, 2, 9, 9], [1, 1, 1, 5]])
    seen = seen_before(history, torch.tensor([2, 3]), torch.tensor([[2, 7], [1, 3]]), 10)
    assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == [{2, 4}, {2, 4, 7}, {1}, {1, 3}]


def begun(*texts: list[int], new: int = 20, stops: tuple[int, ...] = ()):
    state = new_state(len(texts), 60, torch.device("cpu"))
    begin(state, texts, new, stops, 0)
    return state


def test_a_draft_is_what_followed_the_last_words_the_latest_and_longest_match_first():
    text = [1, 2, 3, 7, 8, 9, 2, 3, 5, 6, 0, 1, 2, 3]
    assert draft(begun(text), 4).tolist() == [[3, 7, 8, 9]]  # 1 2 3, not the later 2 3
    assert draft(begun(text[1:]), 4).tolist() == [[3, 5, 6, 0]]  # no 1 before the first 2 3: the later one
    assert draft(begun([4, 5, 6, 4, 5, 6, 4, 5]), 8).tolist() == [[5, 6, 4, 5, 6, 4, 5, 6]]  # a loop goes on
    assert draft(begun([7]), 3).shape == (1, 3)
    assert draft(begun([7, 7, 7]), 1).tolist() == [[7]]


@pytest.mark.parametrize(
    ("fed", "chosen", "kept"),
    [
        ([3, 4, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7]),  # all right, and one more
        ([3, 4, 9, 6], [4, 5, 6, 7], [4, 5]),  # a wrong draft: what the model said instead is right
        ([3, 9, 5, 6], [4, 5, 6, 7], [4]),  # right again behind a wrong one is not right
        ([3, 4, 2, 6], [4, 2, 6, 7], [4, 2]),  # nothing behind a stop token
    ],
)
def test_what_is_kept_of_a_step(fed, chosen, kept):
    state = begun([1, 3], stops=(2,))
    append(state, torch.tensor([fed]), torch.tensor([chosen]))
    length = int(state.length)
    assert state.history[0, 2:length].tolist() == kept
    assert bool(state.done) == (2 in kept)
    append(state, torch.tensor([[kept[-1], 1]]), torch.tensor([[1, 1]]))
    assert int(state.length) - length == (0 if 2 in kept else 2)


def test_nothing_is_kept_beyond_the_limit():
    state = begun([1, 3], [1, 2, 3], new=3)
    append(state, torch.tensor([[3, 4, 5, 6], [3, 0, 0, 0]]), torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7]]))
    assert (state.length.tolist(), state.done.tolist()) == ([5, 4], [True, False])
    assert state.steps.tolist() == [1, 1]


def test_a_cache_takes_the_bytes_it_says_and_shares_where_the_model_shares():
    description = describe(gemma4_e())
    cache = new_cache(description, 3, 100)
    tensors = {id(t): t.nbytes for t in (*cache.keys, *cache.values)}
    assert sum(tensors.values()) == cache_bytes(description, 3, 100)
    assert [layer.source for layer in description.layers] == [0, 1, 2, 3, 3, 2, 2]
    assert [keys.shape[2] for keys in cache.keys] == [48, 48, 128, 48, 48, 128, 128]
    assert cache.keys[6] is cache.keys[2]


def test_norms_round_where_transformers_does():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for module, shift in ((LlamaRMSNorm(64), 0), (Gemma3RMSNorm(64), 1)):
        module = module.bfloat16()
        module.weight.data = (1 - shift + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1))).bfloat16()
        mine = Norm(shift + module.weight.detach().float(), 1e-6, late=not shift)
        assert torch.equal(normed(x, mine), module(x))
        assert not torch.equal(normed(x, Norm(mine.weight, 1e-6, late=bool(shift))), module(x))
