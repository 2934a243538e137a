"""Fitted checkpoints: what is held against the source where codes are meant to differ from bitsandbytes'."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from verifier import surgery

import halfbyte
from halfbyte.verifier.checks import TITLES

CHECK = "F11 F12 F22"
LAYER = "model.language_model.layers.1."
W, TWIN = f"{LAYER}mlp.up_proj.weight", f"{LAYER}mlp.gate_proj.weight"
TEXT = Path(halfbyte.__file__).parent / "evaluator" / "job" / "built_in" / "passages.txt"
Examine = Callable[..., dict[str, dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def written(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The tiny Gemma 4 by three ways of fitting (read them, never write into them)."""
    place, threads = tmp_path_factory.mktemp("fitted"), torch.get_num_threads()
    torch.set_num_threads(1)
    fit, few = ("candidates=4", "sweeps=0"), {"calibration": TEXT, "calibration_tokens": 700}
    halfbyte.quantize(tiny_gemma4, place / "free", method="scale", fit=fit)
    halfbyte.quantize(tiny_gemma4, place / "scale", method="scale", fit=fit, **few)
    halfbyte.quantize(tiny_gemma4, place / "gptq", method="gptq", fit=fit, **few)
    yield {path.name: path for path in place.iterdir()}
    torch.set_num_threads(threads)


@pytest.fixture
def copy(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(written[name], tmp_path / name))


def swap(folder: Path) -> None:
    """Give `W` the codes of `TWIN`, which has the same shape."""
    codes = {}
    surgery.rewrite(folder, lambda parts: codes.update({TWIN: parts[TWIN]}) if TWIN in parts else None)
    surgery.replace(folder, W, lambda tensor: codes[TWIN])


@pytest.mark.parametrize("name", ["free", "scale", "gptq"])
def test_a_fitted_checkpoint_passes_and_says_by_what(
    name: str, written: dict[str, Path], source: Any, examine: Examine
) -> None:
    checks = examine(written[name], source=source)
    assert {key: check["detail"] for key, check in checks.items() if check["status"] == "failed"} == {}
    detail = checks[CHECK]["detail"]
    assert f"41 weights fitted by {'gptq' if name == 'gptq' else 'scale'}" in detail
    assert ("41 derived again to the same bytes" in detail) == (name == "free")
    assert ("every code the nearest" in detail) == (name != "gptq")
    assert "does not apply" in detail
    assert checks.keys() == TITLES.keys()
    assert checks[CHECK]["title"] != TITLES[CHECK]


@pytest.mark.parametrize("name", ["free", "scale"])
def test_a_code_that_is_not_the_nearest_is_found(
    name: str, copy: Callable[[str], Path], source: Any, examine: Examine
) -> None:
    folder = copy(name)
    surgery.flip(folder, W, at=5, mask=0x80)
    found = examine(folder, source=source)[CHECK]
    assert found["status"] == "failed"
    assert f"{W}: 1 codes are not the nearest to their weight, the first at element 10" in found["detail"]


def test_a_scale_that_a_data_free_fit_would_not_choose_is_found(
    copy: Callable[[str], Path], source: Any, examine: Examine
) -> None:
    folder = copy("free")
    surgery.flip(folder, f"{W}.absmax", at=0, mask=0x01)
    found = examine(folder, source=source)[CHECK]
    assert found["status"] == "failed"
    assert f"{W}.absmax: differs from what is derived again" in found["detail"]


def test_another_tensors_codes_break_the_bound(copy: Callable[[str], Path], source: Any, examine: Examine) -> None:
    folder = copy("gptq")
    swap(folder)
    found = examine(folder, source=source)[CHECK]
    assert found["status"] == "failed"
    assert W in found["detail"]
    assert "of its power, more than 10 %" in found["detail"]


def test_codes_that_no_method_explains_are_found_by_their_digest(copy: Callable[[str], Path], examine: Examine) -> None:
    folder = copy("gptq")
    surgery.flip(folder, W)
    assert examine(folder)["digests"]["status"] == "failed"


def test_fits_of_another_device_or_version_are_not_derived_again(
    copy: Callable[[str], Path], source: Any, examine: Examine
) -> None:
    folder = copy("free")
    record = folder / "halfbyte" / "quantize.json"
    surgery.edit_json(record, lambda body: body["method"].update(device="cuda"))
    found = examine(folder, source=source)[CHECK]
    assert found["status"] == "passed"
    assert "derived again" not in found["detail"]


def test_without_a_source_codes_are_not_checked(written: dict[str, Path], examine: Examine) -> None:
    assert examine(written["gptq"])[CHECK]["status"] == "skipped"
