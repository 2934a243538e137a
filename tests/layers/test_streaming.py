"""Layer by layer equals whole to the bit, weights are read once, and memory does not grow with the number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of
from layers.small_rows import random_rows

from halfbyte.errors import PlanError, ShapeMismatch, SourceError
from halfbyte.evaluator.scoring.scorer import score
from halfbyte.layers import streaming
from halfbyte.layers.model import WholeModel
from halfbyte.layers.rows import Rows
from halfbyte.layers.streaming import StreamedModel
from halfbyte.layers.weights import Weights, open_weights
from halfbyte.progress import listening

FAMILIES = ("gemma4", "gemma4_e", "gemma3_text", "llama", "qwen2", "qwen3")
MIB = 2**20

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rows() -> Rows:
    return random_rows(3, 128)


def both(weights: Weights, rows: Rows, noise_seed: int | None = None, **options: Any) -> list[list[torch.Tensor]]:
    """Hidden states of every batch: whole, and layer by layer."""
    batches = rows.batches(2)
    found = []
    for kind in (WholeModel, StreamedModel):
        model = kind(weights, **options)
        found.append([states.clone() for states in model.hidden_states(batches, noise_seed)])
        model.close()
    return found


def assert_equal(whole: list[torch.Tensor], streamed: list[torch.Tensor]) -> None:
    assert len(whole) == len(streamed) == 3
    for ours, theirs in zip(streamed, whole, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_streamed_hidden_states_equal_the_whole_models_to_the_bit(
    family: str, noise_seed: int | None, rows: Rows
) -> None:
    whole, streamed = both(DrawnWeights(config_of(family)), rows, noise_seed)
    assert_equal(whole, streamed)


@pytest.mark.parametrize("family", ["gemma4_e", "llama"])
def test_in_bf16_too(family: str, rows: Rows) -> None:
    """Where an embedding scale in float32 instead of the weight's dtype would show."""
    whole, streamed = both(DrawnWeights(config_of(family)), rows, dtype="bfloat16")
    assert_equal(whole, streamed)


def test_real_files_and_their_roundings_too(tiny_gemma4: Path, tiny_nf4: Path) -> None:
    for spec in (tiny_gemma4, tiny_nf4, f"{tiny_gemma4}@q4_0"):
        whole, streamed = both(open_weights(spec), random_rows(low=363, high=900))
        assert_equal(whole, streamed)


def test_the_small_e2b_has_the_traps_it_is_here_for(rows: Rows) -> None:
    """Per-layer inputs and shared keys and values change its answers; a row is longer than the window."""
    weights = DrawnWeights(config_of("gemma4_e"))
    model = WholeModel(weights)
    assert sum(layer.self_attn.is_kv_shared_layer for layer in model.decoder.layers) == 3
    assert max(map(len, rows.tokens)) > model.decoder.config.sliding_window
    (name,) = (name for name in weights.names() if name.endswith("embed_tokens_per_layer.weight"))
    before = next(StreamedModel(weights).hidden_states(rows.batches(2)))
    weights.changes[name] = torch.zeros(weights.shape(name), dtype=torch.bfloat16)
    assert not torch.equal(before, next(StreamedModel(weights).hidden_states(rows.batches(2))))


@pytest.mark.parametrize("family", ["gemma4_e", "llama"])
def test_each_weight_is_read_once_for_reference_self_test_and_floor(
    family: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding comes in slices, of which those without a token in use are skipped; a tied one is read again as head."""
    weights = DrawnWeights(config_of(family))
    scores = score(weights, [], rows, batch=2, streaming=True)
    text = {name for name in weights.names() if "vision" not in name}
    embeddings = {name for name in text if "embed_tokens" in name}
    heads = {name for name in text if name.endswith("lm_head.weight")} or {
        name for name in text if name.endswith("embed_tokens.weight")
    }
    assert scores.floor is not None
    assert weights.read == dict.fromkeys((text - embeddings) | heads, 1)
    assert weights.rows_read.keys() == embeddings | heads, "the head check reads the head's first rows"
    for name in embeddings - heads:
        assert weights.rows_read[name] == weights.shape(name)[0]


def test_embedding_rows_in_use_are_gathered_from_slices(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.layers import embedding

    weights = DrawnWeights({**config_of("llama"), "vocab_size": 4096})
    whole = list(WholeModel(weights).hidden_states(rows.batches(2)))
    monkeypatch.setattr(embedding, "SLICE_BYTES", 256 * 64 * 4)
    weights.rows_read.clear()
    assert_equal(whole, list(StreamedModel(weights).hidden_states(rows.batches(2))))
    assert weights.rows_read["model.embed_tokens.weight"] == 256, "tokens are below 128: one slice of sixteen"


def test_scores_are_equal_with_floor_and_candidate(rows: Rows) -> None:
    config = config_of("gemma4_e")
    runs = [
        score(DrawnWeights(config), [DrawnWeights(config, seed=1)], rows, batch=2, streaming=streaming)
        for streaming in (False, True)
    ]
    assert [run.facts["streamed"] for run in runs] == [False, True]
    whole, streamed = runs
    assert streamed.self_kld == 0.0
    assert np.array_equal(whole.reference.nll, streamed.reference.nll)
    assert whole.floor is not None
    assert streamed.floor is not None
    for ours, theirs in ((streamed.floor, whole.floor), (streamed.candidates[0], whole.candidates[0])):
        assert theirs.kld.mean() > 0
        for vector in ("kld", "nll", "agrees", "delta_p"):
            assert np.array_equal(getattr(ours, vector), getattr(theirs, vector)), vector


def test_auto_streams_what_takes_more_than_half_of_the_memory(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = DrawnWeights(config_of("llama"))
    taken = 4 * sum(torch.Size(weights.shape(name)).numel() for name in weights.names())
    for available, streamed in ((2 * taken, False), (2 * taken - 1, True)):
        monkeypatch.setattr(streaming, "available_bytes", lambda device, available=available: available)
        assert score(weights, [], rows, floor=False).facts["streamed"] is streamed
    monkeypatch.undo()
    assert 0 < streaming.available_bytes("cpu") < 1 << 50


class Bytes:
    """A progress listener that adds up bytes."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int, str]] = []
        self.done = 0

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Any]:
        self.tasks.append((title, total, unit))

        def advance(amount: int) -> None:
            self.done += amount if unit == "B" else 0

        yield advance

    def note(self, text: str) -> None: ...


def test_progress_counts_the_bytes_of_the_layers(rows: Rows) -> None:
    heard, weights = Bytes(), DrawnWeights(config_of("llama"))
    with listening(heard):
        list(StreamedModel(weights).hidden_states(rows.batches(2)))
    layers = 4 * sum(torch.Size(weights.shape(name)).numel() for name in weights.names() if "layers" in name)
    assert heard.tasks == [("layers of drawn", layers, "B")]
    assert heard.done == layers


def test_an_embedding_that_is_not_finite_is_refused(rows: Rows) -> None:
    weights = DrawnWeights(config_of("llama"))
    weights.changes["model.embed_tokens.weight"] = torch.full((160, 64), torch.nan, dtype=torch.bfloat16)
    with pytest.raises(PlanError):
        list(StreamedModel(weights).hidden_states(rows.batches(2)))


def test_a_model_that_works_between_its_layers_is_refused(rows: Rows) -> None:
    """Even if what comes out in the end is what went in."""
    model = StreamedModel(DrawnWeights(config_of("llama")))
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    model.layers[2].register_forward_hook(lambda module, args, output: output / 2)
    with pytest.raises(PlanError, match="between its layers"):
        list(model.hidden_states(rows.batches(2)))


def test_a_model_that_works_behind_its_norm_is_refused(rows: Rows) -> None:
    model = StreamedModel(DrawnWeights(config_of("llama")))
    model.decoder.norm.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(PlanError, match="between its layers"):
        list(model.hidden_states(rows.batches(2)))


def test_a_head_that_is_not_the_models_own_is_refused(rows: Rows) -> None:
    model = StreamedModel(DrawnWeights(config_of("gemma4")))
    model.model.config.text_config.final_logit_softcapping = 0.5
    model.decoder.norm.weight.data.mul_(20)
    layer = model.model.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(PlanError, match="behind its head"):
        list(model.hidden_states(rows.batches(2)))


def test_misfits_are_refused_before_a_weight_is_read() -> None:
    weights = DrawnWeights(config_of("llama"))
    weights._shapes["model.layers.1.mlp.up_proj.weight"] = (96, 65)
    with pytest.raises(SourceError, match=r"\[96, 65\], the model wants \[96, 64\]"):
        StreamedModel(weights)
    del weights._shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(SourceError, match=r"first model\.layers\.1\.mlp\.up_proj"):
        StreamedModel(weights)
    assert not weights.read
    with pytest.raises(ShapeMismatch, match="token 300 in a vocabulary of 160"):
        list(StreamedModel(DrawnWeights(config_of("llama"))).hidden_states(random_rows(300, 301).batches(2)))


WIDE = """
import json
import torch
torch.set_num_threads(1)
from layers.drawn_weights import WideWeights, config_of
from layers.small_rows import random_rows
from halfbyte.evaluator.scoring.scorer import score
from halfbyte.memory import peak_rss_bytes
sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
def peak(layers, streaming):
    weights = WideWeights({**config_of("llama"), **sizes, "num_hidden_layers": layers})
    score(weights, [], random_rows(3, 128, (16, 16)), batch=2, floor=False, streaming=streaming)
    return peak_rss_bytes()
print(json.dumps([peak(1, True), peak(6, True), peak(6, False)]))
"""


@pytest.mark.timeout(120)
def test_peak_memory_does_not_grow_with_the_number_of_layers() -> None:
    """Six layers of 64 MiB against one, in a process of its own; the same six whole, to see that growth would show."""
    ended = subprocess.run(
        [sys.executable, "-c", WIDE], capture_output=True, text=True, timeout=110, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, six, whole = json.loads(ended.stdout.splitlines()[-1])
    print(f"streamed: +{(six - one) / MIB:.0f} MiB for five layers; whole: +{(whole - one) / MIB:.0f} MiB")
    assert six - one < 64 * MIB
    assert whole - one > 3 * 64 * MIB


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_streams_what_it_computes_whole(
    family: str, dtype: str, home: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same kernels, same shapes: to the bit here too; and against the CPU within 1e-4 in float32, relative."""
    monkeypatch.setattr(StreamedModel, "_home", lambda self, work: home)
    weights = DrawnWeights(config_of(family))
    whole, streamed = both(weights, rows, 7, device="cuda", dtype=dtype)
    assert_equal([states.cpu() for states in whole], streamed)
    if dtype == "float32":
        plain = [list(StreamedModel(weights, at).hidden_states(rows.batches(2))) for at in ("cpu", "cuda")]
        for ours, theirs in zip(*plain, strict=True):
            assert float((ours - theirs).norm() / ours.norm()) < 1e-4
