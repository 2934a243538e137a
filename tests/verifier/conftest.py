"""A good checkpoint made by others: stock transformers and bitsandbytes quantize the tiny Gemma 4 and save it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verifier.surgery import read_shard, unpack, write_checkpoint

SKIP = ["lm_head", "embed_tokens", "vision_tower", "embed_vision", "model.vision_tower", "model.embed_vision"]


def save_stock(source: Path, out: Path, skip: list[str]) -> Path:
    """What a user gets today: load in 4 bit, save_pretrained."""
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitsandbytes' mean of the scales depends on it (docs/format.md section 7)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=quantization
        )
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(out)
    return out


def adopt(source: Path, stock: Path, out: Path) -> Path:
    """Our layout around stock's tensors: source config plus quantization_config, companions, two shards and an index."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = json.loads((stock / "config.json").read_text())["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        if not path.name.startswith(("model", "config.json")):
            shutil.copyfile(path, out / path.name)
    parts = unpack(*read_shard(stock / "model.safetensors"))
    first = {n: t for n, t in parts.items() if ".layers." in n and "vision" not in n}
    write_checkpoint(out, [first, {n: t for n, t in parts.items() if n not in first}])
    return out


@pytest.fixture(scope="session")
def stock_checkpoint(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma 4 as stock transformers + bitsandbytes save it: the oracle (read it, never write into it)."""
    return save_stock(tiny_gemma4, tmp_path_factory.mktemp("stock") / "out", SKIP)


@pytest.fixture(scope="session")
def everything_quantized(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual mistake: a list that does not protect the vision tower, in our layout otherwise."""
    place = tmp_path_factory.mktemp("mistake")
    stock = save_stock(tiny_gemma4, place / "stock", ["lm_head", "vision_tower", "embed_tokens"])
    return adopt(tiny_gemma4, stock, place / "adopted")


@pytest.fixture(scope="session")
def adopted(tiny_gemma4: Path, stock_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adopt(tiny_gemma4, stock_checkpoint, tmp_path_factory.mktemp("adopted") / "out")


@pytest.fixture
def good(adopted: Path, tmp_path: Path) -> Path:
    """A private copy of a checkpoint that conforms to docs/format.md."""
    return Path(shutil.copytree(adopted, tmp_path / "good"))


@pytest.fixture
def source(tiny_gemma4: Path) -> Any:
    from halfbyte.format.checkpoint import SafetensorsSource

    opened = SafetensorsSource(tiny_gemma4)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def plan(tiny_gemma4: Path) -> Any:
    from halfbyte.format.checkpoint import SafetensorsSource
    from halfbyte.recipe.plan import make_plan

    opened = SafetensorsSource(tiny_gemma4)
    opened.close()
    return make_plan(opened.config, opened.tensors)


@pytest.fixture
def examine() -> Callable[..., dict[str, dict[str, Any]]]:
    """Run the checks without stock transformers: check id -> check."""
    from halfbyte.verifier.job import examine as run

    def checks(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
        body = run(folder, generate=False, **options)
        return {check["id"]: check for check in body["checks"]}

    return checks
