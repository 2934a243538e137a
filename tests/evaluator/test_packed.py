"""`evaluate FILE.pack CANDIDATE...`: the figures of the live run to the bit, "not measured" for the rest, lies refused."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from cards.small_schema import violations
from evaluator.test_pack import Change, say, spoil

import halfbyte
from halfbyte.cards.report import report
from halfbyte.errors import SourceError, UsageError
from halfbyte.evaluator.packed import is_pack

SCHEMA = Path(halfbyte.__file__).parent / "evaluator" / "job" / "evaluate.schema.json"
OPTIONS: dict[str, Any] = {"resamples": 200, "device": "cpu"}
ROWS = {**OPTIONS, "limit": 5, "max_new_tokens": 6, "batch": 3}
#: of a protocol's block: all that does not say when and where it was scored
MEASURED = ("protocol", "version", "out_of_frame", "data", "rows", "self_kld", "floor", "reference", "comparisons")


pytestmark = pytest.mark.usefixtures("one_thread_for_all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def candidates(tiny_gemma4: Path, tiny_nf4: Path, folder: Path) -> list[str]:
    nf4 = Path(shutil.copytree(tiny_nf4, folder / "nf4"))
    shutil.rmtree(nf4 / "halfbyte")
    return [str(nf4), f"{tiny_gemma4}@q4_0", str(tiny_gemma4)]


@pytest.fixture(scope="module")
def live(tiny_gemma4: Path, candidates: list[str], folder: Path) -> dict[str, Any]:
    """A live run that also writes its reference."""
    return halfbyte.evaluate(tiny_gemma4, candidates, out=folder / "live", write_reference=folder / "a.pack", **ROWS)


@pytest.fixture(scope="module")
def packed(live: dict[str, Any], candidates: list[str], folder: Path) -> dict[str, Any]:
    return halfbyte.evaluate(folder / "a.pack", candidates, out=folder / "packed", **OPTIONS)


def test_against_the_pack_every_figure_is_the_live_one_to_the_bit(live: dict[str, Any], packed: dict[str, Any]) -> None:
    (there,), (here,) = live["protocols"], packed["protocols"]
    assert {key: here[key] for key in MEASURED} == {key: there[key] for key in MEASURED}
    for one, other in zip(here["candidates"], there["candidates"], strict=True):
        apart = {"vectors": None, "residual": None}
        assert {**one, **apart} == {**other, **apart}, "figures, buckets, verdicts and worst tokens"
        assert one["residual"] is None, "a pack holds no residual stream: not measured"
        assert other["residual"] is not None
    assert [c["figures"][0]["value"] > 0 for c in here["candidates"]] == [True, True, False]
    assert here["candidates"][2]["kld_max"] == 0.0, "the reference's own weights, scored against its pack"
    assert packed["self_tests"] == live["self_tests"]
    assert [packed["settings"][key] for key in ("dtype", "batch")] == ["float32", 3]
    assert not any(c["vectors"]["cached"] for c in here["candidates"])


def test_what_a_pack_cannot_give_is_not_measured(packed: dict[str, Any], live: dict[str, Any], folder: Path) -> None:
    (base,), (whole,) = packed["bases"], live["bases"]
    assert (base["kind"], base["instruct"], base["size"]["file_bytes"]) == ("pack", True, None)
    assert (base["reference"], base["digest"]) == (whole["reference"], whole["digest"])
    assert base["pack"]["name"] == "a.pack"
    assert base["pack"]["bytes"] == (folder / "a.pack").stat().st_size
    assert [(c["weights"], c["areas"]) for c in base["candidates"]] == [(None, None)] * 3
    assert [c["size"]["file_bytes"] for c in base["candidates"]] == [
        c["size"]["file_bytes"] for c in whole["candidates"]
    ]
    page = report(folder / "packed").read_text(encoding="utf-8")
    assert base["pack"]["sha256"] in page
    assert "not measured" in page
    schema = json.loads(SCHEMA.read_text())
    assert list(violations(packed, schema, schema)) == []


def test_a_pack_alone_needs_no_candidate(
    tiny_gemma4: Path, live: dict[str, Any], candidates: list[str], folder: Path
) -> None:
    alone = halfbyte.evaluate(
        tiny_gemma4, out=folder / "alone", write_reference=folder / "b.pack", pack_head=True, **ROWS
    )
    assert alone["protocols"][0]["candidates"] == []
    assert alone["protocols"][0]["reference"] == live["protocols"][0]["reference"]
    assert (folder / "b.pack").stat().st_size > (folder / "a.pack").stat().st_size, "the head is in it"
    assert report(folder / "alone").is_file()
    body = halfbyte.evaluate(folder / "b.pack", candidates[:1], out=folder / "packed", **OPTIONS)
    assert body["protocols"][0]["candidates"][0]["figures"] == live["protocols"][0]["candidates"][0]["figures"]
    assert body["protocols"][0]["vectors"]["cached"] is False, "vectors of another pack are another's"


def test_without_a_tokenizer_of_its_vocabulary_token_ids_are_shown(
    live: dict[str, Any], candidates: list[str], folder: Path
) -> None:
    other = Path(shutil.copytree(candidates[0], folder / "other-words"))
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    body = halfbyte.evaluate(folder / "a.pack", str(other), out=folder / "ids", **OPTIONS)
    (found,) = body["protocols"][0]["candidates"]
    assert found["figures"] == live["protocols"][0]["candidates"][0]["figures"]
    assert all(token["token"].strip("<>").isdigit() for token in found["worst"])
    assert found["worst"][0]["before"].endswith(">")


def test_two_packs_make_a_2_x_2(tiny_gemma4: Path, live: dict[str, Any], candidates: list[str], folder: Path) -> None:
    shutil.copyfile(folder / "a.pack", folder / "c.pack")
    body = halfbyte.evaluate(
        folder / "a.pack", [candidates[0], f"qat:{candidates[0]}"], base=f"qat={folder / 'c.pack'}", out=folder / "two", **OPTIONS
    )  # fmt: skip
    effects = {(e["metric"], e["effect"]): e["value"] for e in body["effects"]}
    assert effects["kld mean", "I"] == 0.0
    assert effects["kld mean", "D(QAT)"] == live["protocols"][0]["candidates"][0]["figures"][0]["value"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"protocol": "ppl[raw]"}, "written under kld"),
        ({"dtype": "bfloat16"}, "written in float32, batch 3"),
        ({"batch": 4}, "written in float32, batch 3"),
        ({"limit": 3}, "brings its own rows"),
        ({"max_new_tokens": 3}, "brings its own rows"),
        ({"data": ["x.jsonl"]}, "cannot be read"),
        ({"write_reference": "d.pack"}, "pack already"),
        ({"pack_head": True}, "no pack is written"),
    ],
)
def test_what_a_pack_fixes_cannot_be_asked_otherwise(
    live: dict[str, Any], folder: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises((UsageError, SourceError), match=named):
        halfbyte.evaluate(folder / "a.pack", [f"{folder}/nf4"], out=tmp_path, **{**OPTIONS, **options})
    assert not (tmp_path / "halfbyte").exists()


def test_own_data_beside_a_pack_is_refused(live: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.md"
    data.write_text("one two three")
    with pytest.raises(UsageError, match="brings its own rows"):
        halfbyte.evaluate(folder / "a.pack", [f"{folder}/nf4"], data=data, out=tmp_path / "out", **OPTIONS)


def test_several_protocols_are_no_pack(tiny_gemma4: Path, tmp_path: Path) -> None:
    both = ["kld[assistant,on-policy]", "ppl[raw]"]
    with pytest.raises(UsageError, match="one protocol of one base"):
        halfbyte.evaluate(tiny_gemma4, out=tmp_path, protocol=both, write_reference=tmp_path / "d.pack", **ROWS)
    with pytest.raises(UsageError, match="is a folder"):
        halfbyte.evaluate(tiny_gemma4, out=tmp_path, protocol=both[1], write_reference=tmp_path, **ROWS)


def test_uniform_has_no_shape_beside_a_pack(live: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no shape of its own"):
        halfbyte.evaluate(folder / "a.pack", ["uniform"], out=tmp_path, **OPTIONS)


LIES: list[tuple[Change, str]] = [
    (say("kld[free lunch]", "rows", "protocol"), "rows do not have the digest"),
    (say(float("nan"), "rows", "facts", "window"), "cannot be repeated"),
    (say("half \ud83d", "weights", "label"), "cannot be repeated"),
    (say([{"name": 3}, "x", {"name": "a", "sha256": "b", "bytes": "many"}], "run", "data"), ""),
    (say({"torch": ["<script>"]}, "run", "versions"), ""),
]


@pytest.mark.parametrize(
    ("change", "named"), LIES, ids=[named or f"harmless {at}" for at, (_, named) in enumerate(LIES)]
)
def test_a_pack_that_lies_is_refused_or_harmless(
    live: dict[str, Any], candidates: list[str], folder: Path, tmp_path: Path, change: Change, named: str
) -> None:
    shutil.copyfile(folder / "a.pack", tmp_path / "lie")
    spoil(tmp_path / "lie", change)
    assert is_pack(str(tmp_path / "lie")), "known by its content, whatever its name"
    if named:
        with pytest.raises(SourceError, match=named):
            halfbyte.evaluate(tmp_path / "lie", candidates[:1], out=tmp_path / "out", **OPTIONS)
        return
    body = halfbyte.evaluate(tmp_path / "lie", candidates[:1], out=tmp_path / "out", **OPTIONS)
    schema = json.loads(SCHEMA.read_text())
    assert list(violations(body, schema, schema)) == []
    assert "<script>" not in report(tmp_path / "out").read_text(encoding="utf-8")


def test_a_protocol_of_another_version_is_refused(
    live: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.evaluator import packed as module

    monkeypatch.setattr(module, "VERSIONS", {**module.VERSIONS, "kld[assistant,on-policy]": 2})
    with pytest.raises(SourceError, match="version 1 is not known here"):
        halfbyte.evaluate(folder / "a.pack", [f"{folder}/nf4"], out=tmp_path, **OPTIONS)


def test_what_is_no_pack_is_refused_as_before(tmp_path: Path) -> None:
    for name, content in {"x.pack": b"\x08\0\0\0\0\0\0\0{}      ", "y.pack": b"", "z.txt": b"text"}.items():
        (tmp_path / name).write_bytes(content)
        assert is_pack(str(tmp_path / name)) == name.endswith(".pack")
        with pytest.raises(SourceError) as refused:
            halfbyte.evaluate(tmp_path / name, ["SRC@nf4"], out=tmp_path / "out", **OPTIONS)
        assert name in str(refused.value)


def test_a_run_on_another_machine_is_told(packed: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "packed", tmp_path / "out"))
    record = deepcopy(packed)
    record["protocols"][0]["measured_on"]["device_name"] = "another machine"
    (out / "halfbyte" / "evaluate.json").write_text(json.dumps(record))
    assert "reference run on another machine, whose kernels round otherwise" in report(out).read_text(encoding="utf-8")
