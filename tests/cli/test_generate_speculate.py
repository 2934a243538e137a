"""`halfbyte generate --fast --speculate` on a model that was trained: the words of `--no-fast`, on a CPU and on a GPU, with a picture and without.

The embedded model is sure of its words, so two ways of summing in bf16 give the same ones; on random weights logits would tie.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Run
from PIL import Image

from halfbyte.demo.embedded import embedded

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as it lies in the package, and in NF4."""
    if request.param == "bf16":
        return embedded("vanilla")
    pytest.importorskip("numba", reason="halfbyte.quantize needs numba")
    import halfbyte

    out = tmp_path_factory.mktemp("trained") / "nf4"
    halfbyte.quantize(embedded("vanilla"), out)
    return out


@pytest.mark.parametrize("device", DEVICES)
def test_drafts_and_our_loop_give_stocks_tokens_for_text_and_for_a_picture(run: Run, trained, device, tmp_path) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "red.png")
    asks = [
        ["--prompt", "Name three primary colors."],
        ["--prompt", "Which colour is it?", "--image", tmp_path / "red.png"],
    ]
    for ask in asks:
        command = ["generate", trained, *ask, "--max-new-tokens", 24, "--device", device, "--json"]
        answers = {}
        for name, options in {"stock": ["--no-fast"], "ours": ["--fast", "--speculate", 4]}.items():
            outcome = run(*command, *options)
            assert outcome.code == 0, outcome
            answers[name] = json.loads(outcome.out)
        stock, ours = answers["stock"], answers["ours"]
        assert len(stock["token_ids"]) > 1
        assert ours["token_ids"] == stock["token_ids"]
        assert (stock["decoded_by"]["name"], ours["decoded_by"]["name"]) == ("transformers", "halfbyte")
        assert stock["speculation"] is None
        assert ours["speculation"]["drafted"] == 4 * ours["speculation"]["steps"] > 0
        assert stock["linears"]["halfbyte"] == ours["linears"]["bitsandbytes"] == 0
