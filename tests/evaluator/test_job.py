"""`evaluate` from specs to a record: what is equal ties at exactly 0, what is broken loses, nothing is silently stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte
from halfbyte.errors import OutputError, SourceError, UsageError
from halfbyte.evaluator.job import scoring
from halfbyte.evaluator.job.figures import QUANTILES, bucket_index, without_false_certainty
from halfbyte.evaluator.job.settings import choose_protocols
from halfbyte.evaluator.scoring.divergence import CONFIDENCE_EDGES, confidence_bucket
from halfbyte.evaluator.statistics import Cell, bootstrap_documents, mean, quantile, wilson

FAST = {"limit": 6, "max_new_tokens": 6, "resamples": 200, "device": "cpu"}
PLAIN = {**FAST, "layers": False, "floor": False}


pytestmark = pytest.mark.usefixtures("one_thread_for_all")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from halfbyte.demo.tiny_gemma4 import write_tiny_gemma4

    return write_tiny_gemma4(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def out(tiny_gemma4: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with two bases, a copy, a degradation and a model that knows nothing."""
    folder = tmp_path_factory.mktemp("evaluation")
    halfbyte.evaluate(
        tiny_gemma4,
        [f"{tiny_gemma4}", f"{tiny_gemma4}@nf4", "uniform", f"qat:{other_base}@nf4"],
        base=[f"qat={other_base}"], out=folder, **FAST,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((out / "halfbyte" / "evaluate.json").read_text())
    return body


def found(record: dict[str, Any], ending: str, base: str = "reference") -> dict[str, Any]:
    (block,) = [block for block in record["protocols"] if block["base"] == base]
    (candidate,) = [c for c in block["candidates"] if c["candidate"].endswith(ending)]
    return dict(candidate)


def figure(candidate: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [f for f in candidate["figures"] if f["figure"] == name]
    return dict(one)


def test_the_same_weights_tie_at_exactly_zero(record: dict[str, Any], tiny_gemma4: Path) -> None:
    same = found(record, str(tiny_gemma4))
    assert {v["verdict"] for v in same["verdicts"]} == {"tie"}
    assert (same["kld_max"], figure(same, "kld mean")["high"], figure(same, "delta nll")["value"]) == (0.0, 0.0, 0.0)
    assert figure(same, "top-1 agreement")["value"] == 1.0
    assert all(test["passed"] and test["value"] == 0.0 for test in record["self_tests"])


def test_a_planted_degradation_is_a_loss_above_the_floor(record: dict[str, Any]) -> None:
    worse = found(record, "@nf4")
    assert [v["verdict"] for v in worse["verdicts"]] == ["loss", "loss"]
    assert worse["above_floor"] is True
    assert figure(worse, "kld mean")["low"] > record["settings"]["margin"]
    assert found(record, "uniform")["verdicts"][0]["verdict"] == "loss"
    assert figure(found(record, "uniform"), "ppl")["value"] == pytest.approx(2048, rel=1e-5)
    against = [c for block in record["protocols"] for c in block["comparisons"] if c["candidate"].endswith("@nf4")]
    assert against[0]["verdict"] == "loss"
    assert against[0]["value"] == pytest.approx(figure(worse, "kld mean")["value"])


def test_every_figure_is_what_the_saved_vectors_say(record: dict[str, Any], out: Path) -> None:
    """numpy on the .npz files, by hand: the other way to the same numbers."""
    block = record["protocols"][0]
    own = np.load(out / block["vectors"]["file"])
    worse = found(record, "@nf4")
    mine = np.load(out / worse["vectors"]["file"])
    kld, label = mine["kld"], own["nll"]
    expected = {
        "kld mean": kld.mean(), "kld p90": np.quantile(kld, 0.9, method="inverted_cdf"),
        "top-1 agreement": mine["agrees"].mean(), "rms delta p": np.sqrt((mine["delta_p"] ** 2).mean()),
        "delta nll": mine["nll"].mean() - label.mean(), "ppl": np.exp(mine["nll"].mean()),
        "ppl ratio": np.exp(mine["nll"].mean() - label.mean()),
    }  # fmt: skip
    assert {name: figure(worse, name)["value"] for name in expected} == pytest.approx(expected)
    assert worse["kld_max"] == kld.max()
    assert block["floor"]["value"] == pytest.approx(own["floor_kld"].mean())
    assert block["reference"][0]["value"] == pytest.approx(np.exp(label.mean()))
    assert len(kld) == block["rows"]["n"] == figure(worse, "kld mean")["n"]
    bucket = np.array([confidence_bucket(float(p)) for p in own["top_probability"]])
    assert np.array_equal(bucket, bucket_index(own["top_probability"]))
    for number, row in enumerate(worse["buckets"]):
        inside = bucket == number
        assert row["n"] == inside.sum()
        assert (row["kld"] is None) == (row["n"] == 0)
        if row["n"]:
            assert row["kld"]["value"] == pytest.approx(kld[inside].mean())
    assert sum(row["n"] for row in worse["buckets"]) == len(kld)
    assert len(worse["buckets"]) == len(CONFIDENCE_EDGES) - 1
    assert worse["worst"][0]["kld"] == kld.max()


def test_edges_of_buckets_belong_to_the_upper_one() -> None:
    edges = np.array([0.0, 0.25, 0.5, 0.75, 0.95, 1.0, 0.2499], np.float32)
    assert bucket_index(edges)[:6].tolist()[:4] == [0, 1, 2, 3]
    assert bucket_index(edges).tolist()[5:] == [4, 0]


def test_each_base_has_its_own_reference_and_the_interaction_is_their_difference(
    record: dict[str, Any], other_base: Path, tmp_path: Path
) -> None:
    alone = halfbyte.evaluate(other_base, [f"{other_base}@nf4"], out=tmp_path, **PLAIN)
    qat = figure(found(record, "@nf4", "qat"), "kld mean")
    assert qat == figure(found(alone, "@nf4"), "kld mean")
    effects = {(e["metric"], e["effect"]): e for e in record["effects"]}
    assert {metric for metric, _ in effects} == {"kld mean", "kld median"}, "each base wrote its own answers: no NLL"
    vanilla = figure(found(record, "@nf4"), "kld mean")
    assert effects["kld mean", "D(QAT)"]["value"] == pytest.approx(qat["value"])
    assert effects["kld mean", "I"]["value"] == pytest.approx(qat["value"] - vanilla["value"])
    assert effects["kld mean", "I"]["low"] < effects["kld mean", "I"]["value"] < effects["kld mean", "I"]["high"]


def test_on_the_same_tokens_there_is_a_training_effect(tiny_gemma4: Path, other_base: Path, tmp_path: Path) -> None:
    body = halfbyte.evaluate(
        tiny_gemma4, [f"{tiny_gemma4}@nf4", f"qat:{other_base}@nf4"], base=f"qat={other_base}", out=tmp_path,
        protocol="ppl[assistant-frame]", **PLAIN,
    )  # fmt: skip
    effects = {e["effect"]: e["value"] for e in body["effects"] if e["metric"] == "nll mean"}
    ppl = {block["base"]: block["reference"][0]["value"] for block in body["protocols"]}
    assert effects["T"] == pytest.approx(np.log(ppl["qat"]) - np.log(ppl["reference"]))
    assert effects["I"] == pytest.approx(effects["D(QAT)"] - effects["D(vanilla)"])


def test_error_of_weights_is_found_where_it_is(record: dict[str, Any], tiny_gemma4: Path) -> None:
    from halfbyte.layers.weights import open_weights

    candidates = {c["kind"]: c for base in record["bases"][:1] for c in base["candidates"]}
    assert set(candidates) == {"bf16", "NF4", "uniform"}
    assert (candidates["bf16"]["weights"]["changed"], candidates["bf16"]["weights"]["sqnr_db"]) == (0, None)
    assert candidates["uniform"]["weights"]["sqnr_db"] == pytest.approx(0.0)
    weights = candidates["NF4"]["weights"]
    rounded, plain = open_weights(f"{tiny_gemma4}@nf4"), open_weights(tiny_gemma4)
    assert weights["changed"] == len(rounded.rounded)  # type: ignore[attr-defined]
    assert {layer["stack"] for layer in weights["layers"]} == {"model.language_model.layers"}
    first = weights["layers"][0]
    names = [n for n in rounded.names() if n.startswith("model.language_model.layers.0.") and n in rounded.rounded]  # type: ignore[attr-defined]
    w = np.concatenate([plain.load(n).float().numpy().ravel() for n in names])
    noise = w - np.concatenate([rounded.load(n).float().numpy().ravel() for n in names])
    assert first["tensors"] == len(names)
    assert first["sqnr_db"] == pytest.approx(10 * np.log10((w**2).sum() / (noise**2).sum()), rel=1e-5)
    assert first["worst_db"] <= first["sqnr_db"]


def test_sizes_are_the_files_and_the_plans(tiny_gemma4: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    nf4 = Path(shutil.copytree(tiny_nf4, tmp_path / "nf4"))
    body = halfbyte.evaluate(
        tiny_gemma4, [str(nf4), f"{tiny_gemma4}@nf4", f"{tiny_gemma4}@q4_0"], out=tmp_path / "out", **PLAIN
    )
    stored, rounded, grid = (c["size"] for c in body["bases"][0]["candidates"])
    assert stored["file_bytes"] == sum(path.stat().st_size for path in nf4.glob("*.safetensors"))
    assert (stored["counted"], rounded["counted"]) == (True, False)
    assert 0 < stored["file_bytes"] - rounded["file_bytes"] < 60_000, "headers are not in a computed size"
    assert grid["bits_per_weight"] < rounded["bits_per_weight"] < body["bases"][0]["size"]["bits_per_weight"]


# ---- nothing is scored twice, and nothing is stale


def cached(body: dict[str, Any]) -> list[bool]:
    return [
        body["protocols"][0]["vectors"]["cached"],
        *(c["vectors"]["cached"] for c in body["protocols"][0]["candidates"]),
    ]


def test_a_second_run_reads_the_vectors_and_a_changed_byte_does_not(
    tiny_gemma4: Path, tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nf4 = Path(shutil.copytree(tiny_nf4, tmp_path / "nf4"))
    shutil.rmtree(nf4 / "halfbyte")  # as stock bitsandbytes would have left it: no record to disagree with
    run = lambda: halfbyte.evaluate(tiny_gemma4, [str(nf4), f"{tiny_gemma4}@nf4"], out=tmp_path / "out", **PLAIN)  # noqa: E731
    first = run()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "keep_reference", None)  # whoever scores now fails
        second = run()
    assert (cached(first), cached(second)) == ([False] * 3, [True] * 3)
    strip = lambda body: [(c["figures"], c["buckets"]) for c in body["protocols"][0]["candidates"]]  # noqa: E731
    assert strip(first) == strip(second)
    flip_a_code(nf4)
    third = run()
    assert cached(third) == [True, False, True]
    assert third["protocols"][0]["candidates"][0]["figures"] != first["protocols"][0]["candidates"][0]["figures"]


def flip_a_code(folder: Path) -> None:
    from halfbyte.format.headers import read_checkpoint

    info = next(i for i in read_checkpoint(folder) if i.name.endswith("language_model.layers.0.mlp.up_proj.weight"))
    with (folder / info.file).open("r+b") as file:
        file.seek(info.start)
        byte = file.read(1)[0]
        file.seek(info.start)
        file.write(bytes([byte ^ 0xF0]))


def test_damaged_vectors_are_scored_again(tiny_gemma4: Path, tmp_path: Path) -> None:
    spec = f"{tiny_gemma4}@nf4"
    first = halfbyte.evaluate(tiny_gemma4, [spec], out=tmp_path, **PLAIN)
    path = tmp_path / first["protocols"][0]["candidates"][0]["vectors"]["file"]
    arrays = dict(np.load(path))
    arrays["kld"] = arrays["kld"] * 0.5
    np.savez_compressed(path, **arrays)
    again = halfbyte.evaluate(tiny_gemma4, [spec], out=tmp_path, **PLAIN)
    assert cached(again) == [True, False]
    assert again["protocols"][0]["candidates"][0]["figures"] == first["protocols"][0]["candidates"][0]["figures"]


def test_a_stopped_run_goes_on_at_the_candidate_it_stopped_in(
    tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, scored = [f"{tiny_gemma4}@nf4", f"{tiny_gemma4}@q4_0"], []
    whole = scoring.score_against

    def stopped(kept: Any, candidates: Any, **options: Any) -> Any:
        scored.extend(weights.label for weights in candidates)
        if scored[-1:] == specs[1:]:
            raise KeyboardInterrupt
        return whole(kept, candidates, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_against", stopped)
        with pytest.raises(KeyboardInterrupt):
            halfbyte.evaluate(tiny_gemma4, specs, out=tmp_path, **PLAIN)
    assert not (tmp_path / "halfbyte").exists(), "no record of half a run"
    body = halfbyte.evaluate(tiny_gemma4, specs, out=tmp_path, **PLAIN)
    assert scored == specs
    assert cached(body) == [True, True, False]


# ---- what goes to the model card


def test_a_checkpoint_of_ours_gets_its_card_s_figures(tiny_gemma4: Path, tiny_nf4: Path, tmp_path: Path) -> None:
    nf4 = Path(shutil.copytree(tiny_nf4, tmp_path / "nf4"))
    body = halfbyte.evaluate(tiny_gemma4, [str(nf4)], out=tmp_path / "out", **PLAIN)
    text = halfbyte.card(nf4).read_text(encoding="utf-8")
    kld = figure(body["protocols"][0]["candidates"][0], "kld mean")
    assert (
        f"| `kld[assistant,on-policy]` | {kld['value']:g} | {kld['low']:g} to {kld['high']:g} | {kld['n']:,} |" in text
    )
    assert "model-index:" in text
    assert json.dumps(kld["value"])[:8] in text.partition("\n---\n")[0]
    flip_a_code(nf4)
    with pytest.raises(SourceError, match="not those that its quantize record names"):
        halfbyte.evaluate(tiny_gemma4, [str(nf4)], out=tmp_path / "out", **PLAIN)


# ---- protocols that mean something, and refusals


def test_protocols_are_chosen_by_what_the_model_is() -> None:
    assert choose_protocols((), instruct=True, has_text=False) == ("kld[assistant,on-policy]",)
    assert choose_protocols((), instruct=True, has_text=True) == ("kld[assistant,on-policy]", "ppl[assistant-frame]")
    assert choose_protocols((), instruct=False, has_text=True) == ("ppl[raw]",)
    assert choose_protocols(("ppl[raw]", "ppl[raw]"), instruct=True, has_text=True) == ("ppl[raw]",)


def test_raw_text_is_out_of_frame_for_an_instruct_model_only(tiny_gemma4: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.md"
    data.write_text("A whale, a seal and an octopus live in the sea. " * 10)
    body = halfbyte.evaluate(tiny_gemma4, ["uniform"], protocol="ppl[raw]", data=data, out=tmp_path / "a", **PLAIN)
    (block,) = body["protocols"]
    assert block["out_of_frame"] is True
    assert block["data"][0]["name"] == "text.md"
    assert block["candidates"][0]["verdicts"][0] == {
        "figure": "delta nll", "value": pytest.approx(block["candidates"][0]["verdicts"][0]["value"]), "low": None,
        "high": None, "unit": "nats", "margin": 0.01, "verdict": "undecided",
    }, "one document bounds nothing"  # fmt: skip
    plain = Path(shutil.copytree(tiny_gemma4, tmp_path / "base"))
    for path in (plain / "chat_template.jinja", plain / "chat_template.json"):
        path.unlink(missing_ok=True)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (block,) = halfbyte.evaluate(plain, ["uniform"], out=tmp_path / "b", **PLAIN)["protocols"]
    assert (block["protocol"], block["out_of_frame"], block["rows"]["documents"]) == ("ppl[raw]", False, 6)


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        (["uniform"], {"protocol": ["kld[raw]"]}, "unknown protocol"),
        (["uniform"], {"margin": -1.0}, "no margin"),
        (["uniform"], {"margin": float("nan")}, "no margin"),
        (["uniform"], {"dtype": "float16"}, "unknown dtype"),
        (["uniform"], {"limit": 0}, "too small"),
        (["uniform"], {"layer": True}, "unknown option 'layer'"),
        (["uniform"], {"device": "tpu"}, "unknown device"),
        (["uniform"], {"base": ["qat"]}, "not NAME=REFERENCE"),
        (["uniform"], {"base": ["reference=x"]}, "named twice"),
        (["uniform"], {"base": ["qat=x"]}, "no candidate belongs to base 'qat'"),
        (["uniform", "uniform"], {}, "named twice"),
        ([], {}, "no candidate"),
        (["uniform"], {"protocol": "kld[assistant,given]"}, "no chat has an answer"),
    ],
)
def test_refusals(
    tiny_gemma4: Path, tmp_path: Path, candidates: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        halfbyte.evaluate(tiny_gemma4, candidates, out=tmp_path, **{"device": "cpu", **options})
    assert not (tmp_path / "halfbyte").exists()


def test_a_checkpoint_s_own_folder_is_no_place_for_the_evaluation(tiny_gemma4: Path) -> None:
    with pytest.raises(OutputError, match="holds a checkpoint"):
        halfbyte.evaluate(tiny_gemma4, ["uniform"], out=tiny_gemma4, **PLAIN)
    assert not (tiny_gemma4 / "halfbyte").exists()


def test_an_interval_of_no_width_is_not_claimed_where_resamples_cannot_vary() -> None:
    """60 tokens of 6 documents that all agree, with a KLD each: no p99.9 is known, and no certainty of agreement."""
    kld = np.random.default_rng(0).lognormal(size=60)
    documents = np.repeat(np.arange(6), 10)
    cells = {"kld": Cell(kld, documents), "agrees": Cell(np.ones(60), documents)}
    asked = [quantile(name, "kld", q) for name, q in QUANTILES.items()] + [mean("top-1 agreement", "agrees")]
    plain = bootstrap_documents(cells, asked, resamples=500)
    found = without_false_certainty(plain, {"kld": kld})
    tail, agreement = found["kld p99.9"], found["top-1 agreement"]
    assert (tail.point, tail.low, tail.high) == (kld.max(), 0.0, np.inf)
    assert (agreement.low, agreement.high) == wilson(6, 6)
    assert agreement.low < 0.7
    assert found["kld median"] == plain["kld median"]
    same = without_false_certainty(plain, {"kld": 0 * kld})
    assert same["top-1 agreement"].low == 1.0, "equal in every token is no sample"


def test_no_limit_of_a_floor_is_negative(tiny_gemma4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One document with all of the floor's KLD: the mean's interval would reach below 0, where no KLD is."""
    steady = scoring.keep_reference

    def spiked(*args: Any, **how: Any) -> Any:
        kept = steady(*args, **how)
        kept.floor.kld[:] = 0.0
        kept.floor.kld[0] = 5.0
        return kept

    monkeypatch.setattr(scoring, "keep_reference", spiked)
    body = halfbyte.evaluate(tiny_gemma4, ["uniform"], out=tmp_path, **{**FAST, "layers": False})
    floor = body["protocols"][0]["floor"]
    assert floor["value"] > 0
    assert floor["low"] == 0.0


def test_given_answers_are_taken_from_the_file(tiny_gemma4: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"Count to {n}", "response": "one two three"} for n in (3, 4, 5, 6)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    body = halfbyte.evaluate(
        tiny_gemma4, ["uniform"], data=[data], protocol=["kld[assistant,given]"], out=tmp_path / "out", **PLAIN
    )
    (block,) = body["protocols"]
    assert block["rows"]["documents"] == 4
    assert block["data"] == [
        {"name": "chats.jsonl", "sha256": block["data"][0]["sha256"], "bytes": data.stat().st_size}
    ]
