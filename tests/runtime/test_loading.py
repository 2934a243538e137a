"""halfbyte.load: the same model, the same answers, the same bytes on disk; and what is not ours says why."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime.small_models import CLASSES, SMALL, stock

import halfbyte
from halfbyte.demo.embedded import embedded
from halfbyte.errors import SourceError, UsageError
from halfbyte.runtime.linear.table import DEFAULT
from halfbyte.runtime.loading import replacement
from halfbyte.runtime.loading.choice import Always, Verdict
from halfbyte.runtime.loading.projection import Nf4Projection, stack_of
from halfbyte.runtime.loading.report import OURS, THEIRS

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.arange(24).view(2, 12) % 60 + 2).logits
    return found


def saved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """By bytes: codes stored as bfloat16 may look like NaN."""

    def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return one.keys() == other.keys() and all(facts(tensor) == facts(other[name]) for name, tensor in one.items())


@pytest.fixture(params=CLASSES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model, and a copy of it with our linears."""
    model = copy.deepcopy(stock(request.param))
    replacement.replace(model, Always("test"))
    return stock(request.param), model


def test_every_known_class_computes_the_same_with_its_linears_stacked(pair):
    theirs, ours = pair
    assert not ours.halfbyte.of(THEIRS)
    assert {len(place.stacked) for place in ours.halfbyte.of(OURS)} >= {0, 1}
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=2e-4, atol=2e-4)


def test_the_state_dict_is_bitsandbytes_own_and_putting_back_gives_the_same_model(pair):
    theirs, ours = pair
    expected = saved(theirs)
    assert same(saved(ours), expected)
    replacement.restore(ours)
    assert same(saved(ours), expected)
    assert not any(isinstance(module, Nf4Projection) or stack_of(module) for module in ours.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    assert torch.equal(logits(ours), logits(theirs))


def test_a_layer_shows_its_weights_to_code_that_multiplies_itself():
    model = copy.deepcopy(stock("Gemma4"))
    replacement.replace(model, Always("test"))
    groups = [replacement.fused_groups(layer) for layer in model.model.layers]
    assert all(list(found) == ["qkv", "o", "gate_up", "down"] for found in groups)
    sliding, full, reuses, _ = (found["qkv"] for found in groups)
    assert (sliding.names, sliding.splits) == (("q_proj", "k_proj", "v_proj"), (128, 64, 64))
    assert (full.names, full.splits) == (("q_proj", "k_proj"), (256, 64))  # values are keys
    assert (reuses.names, reuses.splits) == (("q_proj",), (128,))  # keys of another layer
    assert groups[0]["gate_up"].linear.out_features == 256
    assert [layer.self_attn.nf4_stacked_in for layer in model.model.layers[:2]] == ["qkv_proj", "qk_proj"]
    assert model.model.layers[0].mlp.gate_up_proj is groups[0]["gate_up"]
    assert replacement.fused_groups(stock("Gemma4").model.layers[0]) == {}


@pytest.fixture
def llama() -> Any:
    model = copy.deepcopy(stock("Llama"))
    replacement.replace(model, Always("test"))
    return model


def test_a_projection_asked_alone_computes_alone_even_if_its_input_was_changed_in_place(llama):
    attention, theirs = llama.model.layers[0].self_attn, stock("Llama").model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    for name in ("v_proj", "q_proj", "k_proj", "k_proj"):
        x.mul_(1.5)
        torch.testing.assert_close(getattr(attention, name)(x), getattr(theirs, name)(x), rtol=1e-4, atol=1e-5)
    assert attention.qkv_proj.held is None


def test_what_lies_ready_is_given_for_the_tensor_it_was_computed_from_and_no_other(llama):
    attention = llama.model.layers[0].self_attn
    x = torch.randn(2, 64)
    alone = attention.k_proj(-x)
    attention.qkv_proj.offer(x)
    assert torch.equal(attention.k_proj(-x), alone)
    assert torch.equal(attention.k_proj(x.clone()), -alone)
    assert attention.k_proj(x).untyped_storage().data_ptr() == attention.v_proj(x).untyped_storage().data_ptr()


def test_inside_the_forward_pass_the_stack_multiplies_once_and_keeps_nothing(llama, monkeypatch):
    from halfbyte.runtime.linear.module import Nf4Linear

    rows = []
    forward = Nf4Linear.forward
    monkeypatch.setattr(Nf4Linear, "forward", lambda self, x: rows.append(self.splits) or forward(self, x))
    monkeypatch.setattr(
        "halfbyte.runtime.loading.projection.nf4_linear", lambda *_: pytest.fail("a part was computed alone")
    )
    logits(llama)
    assert rows == [(128, 64, 64), (64,), (128, 128), (64,)] * 2
    assert all(stack.held is None for m in llama.modules() if (stack := stack_of(m)) is not None)


def test_an_error_inside_the_attention_leaves_nothing_in_the_stack(llama):
    attention = llama.model.layers[0].self_attn
    with pytest.raises(TypeError):
        attention(torch.randn(1, 2, 64))  # no position embeddings
    assert attention.qkv_proj.held is None


def test_torch_traces_stack_and_hooks_as_one_graph(llama):
    mlp = llama.model.layers[0].mlp
    x = torch.randn(3, 64)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), mlp(x))
        graph = torch.export.export(mlp, (x,)).graph
    assert sum("nf4_linear" in str(node.target) for node in graph.nodes) == 2


def test_a_projection_can_be_asked_for_its_weights_dtype_and_device_as_transformers_does(llama):
    found, theirs = llama.model.layers[0].self_attn.k_proj, stock("Llama").model.layers[0].self_attn.k_proj
    assert (found.weight.dtype, found.weight.device) == (theirs.weight.dtype, theirs.weight.device)
    assert found.weight.numel() == theirs.weight.numel()
    assert [name for name, _ in found.named_parameters()] == []


def test_a_copied_model_is_independent(llama):
    twin = copy.deepcopy(llama)
    replacement.restore(llama)
    torch.testing.assert_close(logits(twin), logits(llama), rtol=2e-4, atol=2e-4)
    assert twin.model.layers[0].self_attn.q_proj.stack is twin.model.layers[0].self_attn.qkv_proj


def test_weights_are_not_loaded_into_a_replaced_linear(llama):
    with pytest.raises(UsageError, match="cannot be loaded"):
        llama.load_state_dict(saved(stock("Llama")))


class Watching(Always):
    """Counts, before each group, how many original weights are alive."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__("test")
        self.all = [weakref.ref(linear.weight) for _, linear in replacement.linears_of(model)]
        self.alive: list[int] = []

    def known(self, shape: Any) -> Verdict | None:
        self.alive.append(sum(reference() is not None for reference in self.all))
        return super().known(shape)


def test_old_weights_go_group_by_group_so_that_the_peak_is_the_model_and_one_group():
    model = copy.deepcopy(stock("Llama"))
    watching = Watching(model)
    replacement.replace(model, watching)
    assert watching.alive == [14, 11, 10, 8, 7, 4, 3, 1]
    assert not any(reference() for reference in watching.all)


class Refusing(Always):
    """bitsandbytes wins for wide weights."""

    def known(self, shape: Any) -> Verdict | None:
        return Verdict(None, "faster at 8 rows") if sum(shape.rows) > 200 else Verdict(DEFAULT, "test")


def test_what_loses_the_contest_stays_theirs_and_says_so():
    model = copy.deepcopy(stock("Llama"))
    report = replacement.replace(model, Refusing("test"))
    assert {place.name.rpartition(".")[2] for place in report.of(OURS)} == {"o_proj", "down_proj"}
    assert "10 by bitsandbytes (10: faster at 8 rows)" in report.summary()
    assert list(replacement.fused_groups(model.model.layers[0])) == ["o", "down"]
    assert report.to_dict()["bitsandbytes"] == 10


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not double-quantized", "single"), ("fp4 is not nf4", "fp4"), ("24 rows", "rows"), ("float16", "half"), ("in training", "train"),
        ("CPU order", "packed"), ("blocks of 128", "blocks"), ("used in two places", "twice"), ("not quantized yet", "fresh"),
        ("does not hold the NF4 levels", "levels"),
    ],
)  # fmt: skip
def test_an_unsupported_linear_stays_theirs_with_a_reason(reason, change):
    from bitsandbytes.nn import Linear4bit

    rows, kind = (24 if change == "rows" else 32), ("fp4" if change == "fp4" else "nf4")
    dtype = torch.float16 if change == "half" else torch.bfloat16
    linear = Linear4bit(64, rows, False, dtype, change != "single", kind).eval()
    linear.weight.blocksize = 128 if change == "blocks" else 64
    model = torch.nn.Sequential(linear if change == "fresh" else linear.to("cpu"))
    if change == "train":
        model.train()
    if change == "packed":
        linear.weight.quant_state.packing_format_for_cpu = True
    if change == "levels":
        linear.weight.quant_state.code = linear.weight.quant_state.code * 0.5
    if change == "twice":
        model.append(linear)
    (place,) = replacement.replace(model, Always("test")).places
    assert place.path == THEIRS
    assert reason in place.reason
    assert model[0] is linear


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded Gemma 4 in NF4: trained, so that rounding does not change its words."""
    out = tmp_path_factory.mktemp("load") / "nf4"
    halfbyte.quantize(embedded("vanilla"), out)
    return out


@pytest.fixture(scope="module")
def written_by_stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that transformers and bitsandbytes quantized and saved, its bytes stored as bfloat16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("stock")
    LlamaForCausalLM(LlamaConfig(**SMALL)).to(torch.bfloat16).save_pretrained(folder / "bf16")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder / "bf16", quantization_config=settings, device_map={"": "cpu"}, dtype="auto"
    )
    model.save_pretrained(folder / "nf4")
    return Path(folder / "nf4")


def on_disk(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        yield from load_file(file).items()


@pytest.mark.parametrize("folder", ["gemma4", "written_by_stock"])
def test_saving_a_loaded_checkpoint_writes_the_bytes_that_were_read(folder, request, tmp_path):
    path = request.getfixturevalue(folder)
    model = halfbyte.load(path, device="cpu", fast=True)
    assert len(model.halfbyte.of(OURS)) == len(model.halfbyte.places) > 10
    model.save_pretrained(tmp_path)
    before, after = dict(on_disk(path)), dict(on_disk(tmp_path))
    assert sum("quant_state" in name for name in before) == len(model.halfbyte.places)
    assert same(before, after)


def test_the_answer_is_the_same_with_and_without_our_linears(gemma4):
    answers = [
        halfbyte.generate(gemma4, "Name three primary colors.", device="cpu", fast=fast, max_new_tokens=8)
        for fast in (None, True)
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert answers[0]["linears"]["halfbyte"] == 0
    assert answers[0]["linears"]["reasons"][0]["reason"] == "faster on a CPU"
    assert answers[1]["linears"]["bitsandbytes"] == 0
    assert answers[1]["linears"]["stacked"] > 0


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(UsageError, match="fast is 'yes'"):
        halfbyte.load(tmp_path, fast="yes")
    with pytest.raises(SourceError):
        halfbyte.load(tmp_path / "none", device="cpu")
