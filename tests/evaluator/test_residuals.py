"""The residual stream: planted errors show where they were planted, layer by layer equals whole, the sample is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of
from layers.small_rows import random_rows

from halfbyte.evaluator.job.bases import Base, Entry
from halfbyte.evaluator.job.figures import decibels, residual_of
from halfbyte.evaluator.job.scoring import Machine, score_base
from halfbyte.evaluator.scoring import residuals
from halfbyte.evaluator.scoring.residuals import Sample
from halfbyte.evaluator.scoring.scorer import keep_reference, score_against
from halfbyte.layers.model import WholeModel
from halfbyte.layers.rows import Rows

pytestmark = pytest.mark.usefixtures("one_thread")
#: the planted error
LAYER, CHANGE = 1, 1.1


@pytest.fixture
def rows() -> Rows:
    return random_rows(3, 128)


def changed(family: str, layer: int = LAYER) -> DrawnWeights:
    """One matrix of one layer, a tenth larger."""
    weights = DrawnWeights(config_of(family), "changed")
    name = next(name for name in weights.names() if f"layers.{layer}.mlp.down_proj" in name)
    weights.changes[name] = weights.load(name) * CHANGE
    return weights


def measured(family: str, rows: Rows, *, streaming: bool, candidate: Any = None) -> tuple[Any, Any]:
    """(the candidate's arrays, the floor's)."""
    kept = keep_reference(DrawnWeights(config_of(family)), rows, batch=2, streaming=streaming, layers=True)
    found = score_against(kept, [candidate or changed(family)], streaming=streaming)
    assert kept.residuals is not None
    return found.candidates[0].residual, kept.residuals.floor()


@pytest.mark.parametrize("family", ["gemma4", "gemma4_e", "llama"])
def test_layer_by_layer_gives_the_bits_of_the_whole(family: str, rows: Rows) -> None:
    for whole, streamed in zip(*(measured(family, rows, streaming=s) for s in (False, True)), strict=True):
        assert whole.keys() == streamed.keys() == {"signal", "noise", "median", "sample"}
        for name, array in whole.items():
            assert array.tobytes() == streamed[name].tobytes(), name
    assert len(whole["noise"]) == len(config_of_layers(family)) + 2
    assert (whole["noise"][1:] > 0).all(), "the floor's noise is behind every layer"
    assert whole["noise"][0] == 0


def config_of_layers(family: str) -> range:
    config = config_of(family)
    return range(config.get("text_config", config)["num_hidden_layers"])


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_planted_error_shows_first_behind_its_own_layer(layer: int, streaming: bool, rows: Rows) -> None:
    found, _ = measured("llama", rows, streaming=streaming, candidate=changed("llama", layer))
    assert (found["noise"][: layer + 1] == 0).all()
    assert (found["noise"][layer + 1 :] > 0).all()
    assert (found["signal"] > 0).all()


def test_sums_are_those_of_the_model_s_own_hidden_states_without_padding(rows: Rows) -> None:
    """The other way: transformers' `output_hidden_states`, row by row."""
    found, _ = measured("llama", rows, streaming=False)
    streams = []
    for weights in (DrawnWeights(config_of("llama")), changed("llama")):
        model = WholeModel(weights)
        ids = [torch.from_numpy(row.astype(np.int64))[None] for row in rows.tokens]
        with torch.inference_mode():
            hidden = [model.decoder(each, use_cache=False, output_hidden_states=True).hidden_states for each in ids]
            last = [model.decoder(each, use_cache=False).last_hidden_state for each in ids]
        # transformers has no entry for what leaves the last layer before the norm
        streams.append([*(torch.cat([h[at][0] for h in hidden]) for at in range(3)), torch.cat([x[0] for x in last])])
    for at, point in enumerate((0, 1, 2, 4)):
        mine, theirs = (stream[at].double() for stream in streams)
        assert found["signal"][point] == pytest.approx(float(mine.square().sum()), rel=1e-5)
        assert found["noise"][point] == pytest.approx(float((mine - theirs).square().sum()), rel=1e-4, abs=1e-12)
        ratios = ((mine - theirs).square().sum(1) / mine.square().sum(1)).numpy()
        middle = np.quantile(ratios, 0.5, method="inverted_cdf")
        assert found["median"][point] == pytest.approx(middle, rel=1e-3, abs=1e-12)
    assert found["sample"].tolist() == [len(rows.tokens), sum(map(len, rows.tokens))]


def test_the_sample_is_the_first_rows_and_bounded(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residuals, "SAMPLE_POSITIONS", 30)
    cut = Sample(rows, 2, (5, 64), 4)
    assert (cut.rows, cut.positions) == (2, 30), "rows of 9 and of 40 tokens: 9 and 21"
    taken = {int(row): n for row_places, chosen in zip(cut.places, rows.order(2), strict=True)
             for row, n in [(chosen[at], n) for at, n in row_places]}  # fmt: skip
    assert taken == {0: 9, 1: 21}
    monkeypatch.setattr(residuals, "SAMPLE_BYTES", 5 * 64 * 4 * 12)
    assert Sample(rows, 2, (5, 64), 4).positions == 12
    found, floor = measured("llama", rows, streaming=True)
    assert found["sample"].tolist() == floor["sample"].tolist() == [2, 12], "a batch without a sampled row is no error"
    assert found["noise"][-1] > 0


def test_a_stream_of_another_shape_is_not_measured_and_still_scored(rows: Rows) -> None:
    config = {**config_of("llama"), "num_hidden_layers": 2}
    found, _ = measured("llama", rows, streaming=False, candidate=DrawnWeights(config, "shallow"))
    assert len(found["noise"]) == 0


def test_it_is_kept_with_the_vectors_and_measured_later_where_it_was_left_out(rows: Rows, tmp_path: Path) -> None:
    base = Base("reference", DrawnWeights(config_of("llama")), "bf16", [Entry("c", changed("llama"), "bf16")])
    machine = Machine("cpu", "float32", 2, tmp_path)
    without = score_base(base, rows, machine, floor=True)
    assert residual_of(without.candidates["c"], without.reference) is None
    first, again = (score_base(base, rows, machine, floor=True, layers=True) for _ in range(2))
    assert not first.candidates["c"].cached
    assert again.candidates["c"].cached
    assert again.reference.cached
    body = residual_of(again.candidates["c"], again.reference)
    assert body is not None
    assert body == residual_of(first.candidates["c"], first.reference)
    at = [(point["at"], point["layer"], point["identical"]) for point in body["points"]]
    assert at == [
        ("embedding", None, True), ("layer", 0, True), ("layer", 1, False), ("layer", 2, False),
        ("final norm", None, False),
    ]  # fmt: skip
    planted = body["points"][2]
    assert 10 < planted["sqnr_db"] < 60
    assert 10 < planted["median_db"] < 60
    assert planted["floor_db"] > 30
    assert body["n"] == sum(map(len, rows.tokens))
    assert score_base(base, rows, machine, floor=True).candidates["c"].cached, "leaving it out again costs nothing"


def test_one_huge_position_moves_the_pooled_figure_and_not_the_median() -> None:
    """What SmolLM2's first token does: the error is the same everywhere, the signal is not."""
    kept = residuals.KeptResiduals(Sample(random_rows(3, 128, (9, 2)), 1, (1, 4), 4), (1, 4))
    plain = torch.ones(1, 9, 4)
    huge = plain.clone()
    huge[0, 0] = 1000
    found = []
    for states in (plain, huge):
        kept.note(0, 0, None, states)
        errors = residuals.ResidualErrors(kept)
        errors.note(0, 0, None, states + 0.1)
        found.append(errors.arrays())
    pooled, median = ([decibels(f["signal"][0], f["noise"][0]) for f in found], [f["median"][0] for f in found])
    assert pooled[0] == pytest.approx(20, abs=1e-3)
    assert pooled[1] > 65
    assert median == pytest.approx([0.01, 0.01], rel=1e-4)


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == 20
    assert [decibels(*pair) for pair in ((1.0, 0.0), (0.0, 1.0), (1.0, float("nan")), (1.0, float("inf")))] == [
        None
    ] * 4
