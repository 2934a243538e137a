"""`quantize --method`: the same layout, other codes; resumed tensor by tensor to the same bytes; what the record says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import halfbyte
from halfbyte.errors import OutputError, UsageError
from halfbyte.format.headers import read_checkpoint
from halfbyte.layers.fitting.method import method_of
from halfbyte.quantizer.fitted import FittedTensors, gain_of

pytestmark = pytest.mark.usefixtures("one_thread")
#: a text, so that no model has to write answers
TEXT = Path(halfbyte.__file__).parent / "evaluator" / "job" / "built_in" / "passages.txt"
FEW: dict[str, Any] = {
    "method": "gptq", "calibration": TEXT, "calibration_tokens": 700, "fit": ("candidates=4", "sweeps=0", "refit=1"),
    "max_shard_size": "500KB",
}  # fmt: skip
MIB = 2**20
FIT = FittedTensors.fit


@pytest.fixture(scope="module")
def gptq(tiny_gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    halfbyte.quantize(tiny_gemma4, out, **FEW)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Names of the tensors that were fitted, from now on; the n-th of them is interrupted as if by Ctrl-C."""

    def watch(n: int) -> list[str]:
        fitted: list[str] = []

        def counted(self: FittedTensors, name: str, inputs: Any) -> torch.Tensor:
            if len(fitted) == n:
                raise KeyboardInterrupt
            fitted.append(name)
            return FIT(self, name, inputs)

        monkeypatch.setattr(FittedTensors, "fit", counted)
        return fitted

    return watch


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for info in read_checkpoint(folder):
        with safe_open(folder / info.file, "pt") as file:
            found[info.name] = file.get_tensor(info.name)
    return found


def record_of(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "halfbyte" / "quantize.json").read_text())
    return body


def test_only_codes_and_scales_differ_from_round_to_nearest(gptq: Path, tiny_nf4: Path) -> None:
    fitted, rounded = tensors_of(gptq), tensors_of(tiny_nf4)
    assert {name: (t.dtype, t.shape) for name, t in fitted.items() if ".quant_state." not in name} == {
        name: (t.dtype, t.shape) for name, t in rounded.items() if ".quant_state." not in name
    }
    different = {name for name in fitted if not torch.equal(fitted[name], rounded[name])}
    assert {name for name in different if f"{name}.absmax" in fitted} == {
        name for name in fitted if f"{name}.absmax" in fitted
    }
    parts = (".absmax", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    assert [n for n in different if f"{n}.absmax" not in fitted and not n.endswith(parts)] == []
    assert (gptq / "config.json").read_bytes() == (tiny_nf4 / "config.json").read_bytes()


@pytest.mark.parametrize("n", [1, 17])
def test_interrupted_in_any_layer_it_continues_to_identical_bytes(
    n: int, gptq: Path, tiny_gemma4: Path, tmp_path: Path, stop_at: Callable[[int], list[str]]
) -> None:
    out = tmp_path / "out"
    first = stop_at(n)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.quantize(tiny_gemma4, out, **FEW)
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()
    second = stop_at(10_000)
    record = halfbyte.quantize(tiny_gemma4, out, **FEW)
    assert len(first) == n
    assert len(second) == 41 - n
    assert not set(first) & set(second)
    assert record["run"]["resumed_tensors"] == n
    assert weights_of(out) == weights_of(gptq)
    assert record["method"] == record_of(gptq)["method"]


def test_a_tensor_damaged_in_between_is_fitted_again(
    gptq: Path, tiny_gemma4: Path, tmp_path: Path, stop_at: Callable[[int], list[str]]
) -> None:
    out = tmp_path / "out"
    first = stop_at(9)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.quantize(tiny_gemma4, out, **FEW)
    for part in (out / ".halfbyte-work").glob("*.part"):
        with part.open("r+b") as file:
            file.seek(0)
            file.write(bytes(part.stat().st_size))
    again = stop_at(10_000)
    halfbyte.quantize(tiny_gemma4, out, **FEW)
    assert set(first) <= set(again)
    assert weights_of(out) == weights_of(gptq)


def test_another_method_or_other_data_is_another_job(
    tiny_gemma4: Path, tmp_path: Path, gptq: Path, stop_at: Callable[[int], list[str]]
) -> None:
    with pytest.raises(OutputError, match="another finished checkpoint"):
        halfbyte.quantize(tiny_gemma4, gptq, **{**FEW, "seed": 1})
    stop_at(1)
    with pytest.raises(KeyboardInterrupt):
        halfbyte.quantize(tiny_gemma4, tmp_path / "out", **FEW)
    with pytest.raises(OutputError, match="not this one: calibration_tokens was"):
        halfbyte.quantize(tiny_gemma4, tmp_path / "out", **{**FEW, "calibration_tokens": 701})


def test_the_record_says_method_data_and_gain(gptq: Path) -> None:
    body = record_of(gptq)
    method, calibration = body["method"], body["method"]["calibration"]
    assert (method["name"], method["fit"]["candidates"], method["sequential"]) == ("gptq", 4, True)
    assert (calibration["name"], len(calibration["sha256"])) == ("passages.txt", 64)
    assert 100 < calibration["tokens"] <= 700
    assert calibration["hashes"]
    fits = {name: entry["fit"] for name, entry in body["tensors"].items() if "fit" in entry}
    assert set(fits) == {name for name, entry in body["tensors"].items() if entry["action"] == "nf4"}
    assert {fit["inputs"] for fit in fits.values()} == {calibration["tokens"] - calibration["rows"]}
    assert method["gain"] == gain_of(fits)
    assert method["gain"]["error_ratio"] < 0.95


def test_round_to_nearest_has_no_method_in_its_record(tiny_nf4: Path) -> None:
    body = record_of(tiny_nf4)
    assert "method" not in body
    assert not any("fit" in entry for entry in body["tensors"].values())


def test_without_calibration_scales_are_fitted_to_the_weights_alone(tiny_gemma4: Path, tmp_path: Path) -> None:
    body = halfbyte.quantize(tiny_gemma4, tmp_path / "out", method="scale", fit=("candidates=4",))
    fits = [entry["fit"] for entry in body["tensors"].values() if "fit" in entry]
    assert {(fit["method"], fit["inputs"]) for fit in fits} == {("scale", "none")}
    assert body["method"]["calibration"] is None
    assert body["method"]["gain"]["error_ratio"] < 0.95
    assert body["method"]["gain"]["worse"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "awq"}, "--method"),
        ({"calibration": "builtin"}, "--calibration"),
        ({"method": "gptq", "fit": "damping"}, "damping is a float"),
        ({"method": "gptq", "fit": ("colour=1",)}, "known: signed"),
        ({"method": "gptq", "fit": "damping=7"}, "damping"),
        ({"method": "gptq", "batch": 0}, "--batch"),
        ({"method": "gptq", "dtype": "float16"}, "--dtype"),
        ({"methods": "gptq"}, "unknown option 'methods'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_opened(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        halfbyte.quantize("/nowhere", "/nowhere-either", **options)


def test_gptq_takes_the_built_in_set_if_none_is_named() -> None:
    assert method_of({"method": "gptq"}).calibration == "builtin"
    assert method_of({"method": "scale"}).calibration is None


def test_a_setting_has_the_type_of_its_field() -> None:
    how = method_of({"method": "gptq", "fit": ["signed=false", "damping=0.05", "order=activation", "sweeps=3"]})
    made = how.fit_of(32, measured=True)
    assert (made.signed, made.damping, made.order, made.sweeps, made.blocksize) == (False, 0.05, "activation", 3, 32)
    assert how.fit_of(64, measured=False).method == "scale"


WIDE = """
import json
import torch
torch.set_num_threads(1)
from layers.drawn_weights import WideWeights, config_of
from layers.small_rows import random_rows
from halfbyte.codec.fitting import Moments
from halfbyte.layers.streaming import StreamedModel
from halfbyte.memory import peak_rss_bytes
from halfbyte.layers.fitting.layerwise import fit_layers
class Store:
    def __init__(self, weights): self.weights = weights
    def is_done(self, name): return False
    def fit(self, name, inputs):
        assert inputs.hessian is not None
        return self.weights.load(name)
sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
def peak(layers):
    weights = WideWeights({**config_of("llama"), **sizes, "num_hidden_layers": layers})
    wanted = {name for name in weights.names() if "_proj." in name}
    rows = random_rows(3, 128, (16, 16))
    fit_layers(StreamedModel(weights), rows, wanted, Store(weights), Moments, batch=2, sequential=True)
    return peak_rss_bytes()
print(json.dumps([peak(1), peak(4)]))
"""


@pytest.mark.timeout(120)
def test_peak_memory_does_not_grow_with_the_number_of_layers() -> None:
    """Four layers of 16 MiB, each with as much of moments, against one, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", WIDE], capture_output=True, text=True, timeout=110, check=False,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, four = json.loads(ended.stdout.splitlines()[-1])
    print(f"+{(four - one) / MIB:.0f} MiB for three layers")
    assert four - one < 32 * MIB


def test_stock_transformers_and_bitsandbytes_compute_with_our_dequantized_weights(gptq: Path, tiny_nf4: Path) -> None:
    """Every Linear4bit of a stock load on the CPU, by itself: a random model this small is chaotic in bfloat16 as a whole."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForImageTextToText

    from halfbyte.layers.weights import open_weights

    stock = AutoModelForImageTextToText.from_pretrained(gptq, dtype=torch.bfloat16).eval()
    layers = {name: module for name, module in stock.named_modules() if isinstance(module, Linear4bit)}
    ours, others = open_weights(gptq), open_weights(tiny_nf4)
    generator = torch.Generator().manual_seed(0)
    apart, from_rounded = [], []
    for name, module in layers.items():
        x = torch.randn(8, module.in_features, generator=generator).bfloat16()
        with torch.inference_mode():
            theirs = module(x).float()
        for found, weights in ((apart, ours), (from_rounded, others)):
            expected = x.float() @ weights.load(f"{name}.weight").float().T
            found.append(float((theirs - expected).norm() / expected.norm()))
    assert len(layers) == 41
    assert max(apart) < 0.01
    assert min(from_rounded) > 0.03
    ours.close()
    others.close()


def test_some_scales_are_negative(gptq: Path) -> None:
    from halfbyte.layers.weights import open_weights

    tensors = tensors_of(gptq)
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.weight"))
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    map_, absmax = tensors[f"{name}.nested_quant_map"], tensors[f"{name}.absmax"].long()
    groups = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
    scales = map_[absmax] * groups + state["nested_offset"]
    assert (scales < 0).any()
    assert (scales > 0).any()
    assert open_weights(gptq).load(name).isfinite().all()
