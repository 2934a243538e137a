"""A candidate scored against a pack gives the live figures exactly; a pack that lies is refused with its lie named."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers.drawn_weights import DrawnWeights, config_of
from layers.small_rows import random_rows
from safetensors import safe_open
from safetensors.torch import save_file

from halfbyte.errors import SourceError
from halfbyte.evaluator.scoring import pack
from halfbyte.evaluator.scoring.pack import read_pack, write_pack
from halfbyte.evaluator.scoring.scorer import Scores, keep_reference, score, score_against
from halfbyte.layers.rows import Rows
from halfbyte.layers.weights import Weights, open_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rows() -> Rows:
    return random_rows(3, 128)


def same_scores(one: Scores, other: Scores) -> None:
    """Equality, not closeness: every vector of two runs."""
    assert one.self_kld == other.self_kld
    for name in ("row", "position", "label", "document"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("label", "digest", "nll", "top_probability"):
        assert np.array_equal(getattr(one.reference, name), getattr(other.reference, name)), name
    assert one.floor is not None
    assert other.floor is not None
    pairs = [(one.floor, other.floor), *zip(one.candidates, other.candidates, strict=True)]
    for ours, theirs in pairs:
        for name in ("label", "digest", "kld", "nll", "agrees", "delta_p"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            assert np.asarray(getattr(ours, name)).dtype == np.asarray(getattr(theirs, name)).dtype, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("streaming", [False, True])
def test_pack_equals_live(tiny_gemma4: Path, gemma_rows: Rows, tmp_path: Path, dtype: str, streaming: bool) -> None:
    reference = open_weights(tiny_gemma4)
    candidates: list[Weights] = [open_weights(f"{tiny_gemma4}@{grid}", like=reference) for grid in ("nf4", "q4_0")]
    live = score(reference, candidates, gemma_rows, batch=2, dtype=dtype, streaming=False)
    written = write_pack(
        tmp_path / "pack", keep_reference(reference, gemma_rows, batch=2, dtype=dtype, streaming=streaming)
    )
    reference.close()
    kept = read_pack(tmp_path / "pack")
    assert kept.head is None
    assert written["head_bytes"] == 0
    assert kept.states[0].dtype == getattr(torch, dtype)
    found = score_against(kept, candidates, streaming=streaming)
    same_scores(live, found)
    assert found.candidates[0].kld.mean() > 0
    assert {key: found.facts[key] for key in ("rows", "protocol", "n", "dtype", "batch")} == {
        key: live.facts[key] for key in ("rows", "protocol", "n", "dtype", "batch")
    }


def test_pack_with_its_head_scores_a_candidate_that_has_another(rows: Rows, tmp_path: Path) -> None:
    config = {**config_of("llama"), "tie_word_embeddings": False}
    reference, candidate = DrawnWeights(config), DrawnWeights(config, "other", seed=1)
    live = score(reference, [candidate], rows, batch=2)
    kept = keep_reference(reference, rows, batch=2)
    bare, full = (write_pack(tmp_path / name, kept, head=name == "full") for name in ("bare", "full"))
    assert full["head_bytes"] == 160 * 64 * 4
    assert full["bytes"] >= bare["bytes"] + full["head_bytes"]
    same_scores(live, score_against(read_pack(tmp_path / "full"), [candidate]))
    with pytest.raises(SourceError, match="holds no head, and this candidate's is not the reference's"):
        score_against(read_pack(tmp_path / "bare"), [candidate])
    same_scores(score(reference, [reference], rows, batch=2), score_against(read_pack(tmp_path / "bare"), [reference]))


def test_a_head_with_a_bias_and_a_softcap_travels(rows: Rows, tmp_path: Path) -> None:
    from dataclasses import replace

    kept = keep_reference(DrawnWeights(config_of("llama")), rows, floor=False)
    assert kept.head is not None
    head = replace(kept.head, weight=kept.head.weight.bfloat16(), bias=torch.randn(160), softcap=30.0, scale=0.5)
    write_pack(tmp_path / "pack", replace(kept, head=head), head=True)
    found = read_pack(tmp_path / "pack")
    assert found.head is not None
    assert torch.equal(found.head.weight, head.weight)
    assert torch.equal(found.head.logits(kept.states[0]), head.logits(kept.states[0]))
    assert found.head_digest == head.digest() == replace(head, weight=head.weight.float()).digest()
    for change in ({"bias": None}, {"softcap": 29.0}, {"scale": 1.0}, {"weight": head.weight * 2}):
        assert replace(head, **change).digest() != head.digest()


def test_a_pack_says_where_it_comes_from(rows: Rows, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    write_pack(path, keep_reference(DrawnWeights(config_of("llama")), rows, batch=3))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["weights"] == {"label": "drawn", "digest": "drawn:drawn:0"}
    assert about["rows"]["digest"] == rows.digest
    assert about["run"].keys() >= {"device", "device_name", "dtype", "attention", "versions", "streamed"}
    assert about["batch"] == 3
    assert stat.S_IMODE(path.stat().st_mode) & 0o044, "readable by others, as the umask allows"
    assert [p.name for p in tmp_path.iterdir()] == ["pack"]


def test_another_device_than_the_references_is_told(rows: Rows, tmp_path: Path) -> None:
    kept = keep_reference(DrawnWeights(config_of("llama")), rows)
    kept.facts["device_name"] = "another machine"
    write_pack(tmp_path / "pack", kept)
    assert score_against(read_pack(tmp_path / "pack"), []).facts["device_of_reference"] == "another machine"


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def spoil(path: Path, change: Change, *, digests: bool = True) -> None:
    """Rewrite a pack with `change`(about, tensors), its digests made right again if `digests`: a lie, not damage."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stated = file.metadata()["digest"]
    change(about, tensors)
    if digests:
        about["tensors"] = {name: pack._digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps(about)
    save_file(tensors, path, metadata={"about": text, "digest": pack._sha256(text.encode()) if digests else stated})


def put(name: str, at: Any, value: Any) -> Change:
    def change(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at] = value

    return change


def cut(name: str, end: int) -> Change:
    def change(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:end].clone()

    return change


def say(value: Any, *path: str) -> Change:
    def change(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        place = about
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


LIES: list[tuple[Change, str]] = [
    (put("hidden", (3, 5), float("nan")), "hidden holds NaN"),
    (put("head.weight", (0, 0), float("inf")), "head.weight holds NaN or infinity"),
    (put("reference.nll", 0, float("nan")), "reference.nll holds NaN"),
    (put("reference.nll", 0, -1.0), "NLL is negative"),
    (put("reference.top_probability", 0, 1.5), "top probability"),
    (put("floor.agrees", 0, 2), "floor.agrees is no mask"),
    (put("head.weight", (0, 0), 5.0), "head does not have the digest"),
    (put("rows.tokens", 0, 4), "rows do not have the digest"),
    (put("rows.tokens", 0, -1), "token id is negative"),
    (put("rows.lengths", 0, 1 << 62), "do not add up"),
    (put("rows.lengths", 0, 8), "do not add up"),
    (put("rows.scored", -1, 1), "last position of a row"),
    (cut("hidden", 7), "hidden has 7 entries, the rows score"),
    (cut("floor.kld", 7), "floor.kld has 7 entries"),
    (cut("reference.nll", 0), "reference.nll is empty"),
    (cut("head.weight", 20), "description says"),
    (cut("rows.tokens", 20), "do not add up"),
    (lambda about, tensors: tensors.pop("hidden"), "missing: \\['hidden'\\]"),
    (lambda about, tensors: tensors.pop("floor.nll"), "floor is there in part"),
    (lambda about, tensors: tensors.update(more=torch.ones(1)), "unknown: \\['more'\\]"),
    (lambda about, tensors: tensors.update(hidden=tensors["hidden"].half()), "hidden is float16"),
    (lambda about, tensors: tensors.update(hidden=tensors["hidden"].bfloat16()), "its run float32"),
    (lambda about, tensors: tensors.update(hidden=tensors["hidden"][:, :60].clone()), "head \\[160, 64\\] and hidden"),
    (say(99, "format"), "format 99, this version reads 1"),
    (say("8", "batch"), "batch is '8'"),
    (say(0, "batch"), "batch is 0"),
    (say(float("nan"), "self_kld"), "self_kld is nan"),
    (say(3, "run", "dtype"), "dtype = 3"),
    (say([], "run"), "'run' is \\[\\]"),
    (lambda about, tensors: about.pop("weights"), "not one of a reference"),
    (say("160 x 64", "head", "shape"), "shape is '160 x 64'"),
    (say(["a"], "rows", "documents"), "not one document a row"),
    (say([1, 2, 3, 4, 5], "rows", "documents"), "not a list of strings"),
    (say(float("inf"), "head", "softcap"), "softcap is inf"),
    (say([100, 64], "head", "shape"), "beyond the vocabulary"),
    (say("sha256:0", "head", "digest"), "head does not have the digest"),
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "honest"
    write_pack(path, keep_reference(DrawnWeights(config_of("llama")), random_rows(3, 128)), head=True)
    read_pack(path)
    return path


@pytest.mark.parametrize(("change", "named"), LIES, ids=[named for _, named in LIES])
def test_a_pack_that_lies_is_refused(honest: Path, tmp_path: Path, change: Change, named: str) -> None:
    path = tmp_path / "pack"
    path.write_bytes(honest.read_bytes())
    spoil(path, change)
    with pytest.raises(SourceError, match=named) as refused:
        read_pack(path)
    assert str(path) in str(refused.value)


def test_no_wrong_type_anywhere_in_the_description_ends_in_a_traceback(honest: Path, tmp_path: Path) -> None:
    """Every entry of `about` replaced by every JSON type: refused with SourceError, or read (free text stays free)."""
    with safe_open(honest, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    places = [(key,) for key in about]
    places += [(key, inner) for key in ("rows", "weights", "head", "run") for inner in about[key]]
    refused = 0
    for place in places:
        for value in (None, True, -1, 1e400, "x", [], ["x"], {}, {"x": []}):
            wrong = json.loads(json.dumps(about))
            say(value, *place)(wrong, tensors)
            try:
                pack._reference_of(tmp_path, wrong, tensors)
            except SourceError:
                refused += 1
    assert refused > len(places) * 5


def test_an_honest_pack_rewritten_the_same_way_is_read(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    path.write_bytes(honest.read_bytes())
    spoil(path, lambda about, tensors: None)
    assert read_pack(path).rows.n == read_pack(honest).rows.n


def test_damage_is_found_by_digest(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    path.write_bytes(honest.read_bytes())
    spoil(path, put("hidden", (0, 0), 7.0), digests=False)
    with pytest.raises(SourceError, match="tensor hidden does not have the digest"):
        read_pack(path)
    path.write_bytes(honest.read_bytes())
    spoil(path, say(7, "batch"), digests=False)
    with pytest.raises(SourceError, match="description does not have the digest"):
        read_pack(path)


def test_what_is_no_pack_is_refused(honest: Path, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    whole = honest.read_bytes()
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    cases = {"absent": None, "empty": b"", "text": b"not a pack", "cut": whole[: len(whole) // 2]}
    for data in cases.values():
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(SourceError, match="cannot be read"):
            read_pack(path)
    with pytest.raises(SourceError, match="not a reference pack"):
        read_pack(tmp_path / "plain")


@pytest.mark.gpu
def test_pack_equals_live_on_a_gpu(rows: Rows, tmp_path: Path) -> None:
    config = config_of("gemma4")
    reference, candidate = DrawnWeights(config), DrawnWeights(config, seed=1)
    live = score(reference, [candidate], rows, batch=2, device="cuda", dtype="bfloat16")
    kept = keep_reference(reference, rows, batch=2, device="cuda", dtype="bfloat16", streaming=True)
    write_pack(tmp_path / "pack", kept, head=True)
    same_scores(live, score_against(read_pack(tmp_path / "pack"), [candidate], device="cuda"))
