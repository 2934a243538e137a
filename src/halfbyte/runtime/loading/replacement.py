"""Which linears of a model become ours, which of them together, and the way back.

One linear after another, or one group: its new layout is made, its old tensors are dropped, then the next. So the most memory
that is ever needed is the model and one group (43008 x 5376: 119 MB, twice that while parts are joined).

Linears are joined only in classes of transformers whose code was read (`KNOWN`): there, the members get the same x. Everything
else is replaced one by one. What cannot be replaced stays bitsandbytes', with the reason in the report.

The catch: a GPU's allocator keeps the freed tensors' blocks, and a joined weight fits into none of them; so they are given back
to the driver as it goes (`RELEASE_BYTES`), else the reserved memory would be twice the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.runtime.linear.layout import why_unsupported
from halfbyte.runtime.linear.module import Nf4Linear
from halfbyte.runtime.loading.choice import Shape, Verdict
from halfbyte.runtime.loading.projection import ATTRIBUTES, Nf4Projection, Stack, share, stack_of, unshare
from halfbyte.runtime.loading.report import OURS, THEIRS, Place, Report

_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
#: class of transformers -> linears that get the tensor its forward is called with. A member may be missing (Gemma 4: v_proj where
#: values are keys, k_proj and v_proj where another layer's are used)
KNOWN: dict[str, tuple[str, ...]] = {
    "Gemma4TextAttention": _QKV, "Gemma4UnifiedTextAttention": _QKV, "Gemma4UnifiedTextMLP": _GATE_UP,
    "Gemma3Attention": _QKV, "LlamaAttention": _QKV, "Qwen2Attention": _QKV, "Qwen3Attention": _QKV,
    "Gemma4TextMLP": _GATE_UP, "Gemma3MLP": _GATE_UP, "LlamaMLP": _GATE_UP, "Qwen2MLP": _GATE_UP, "Qwen3MLP": _GATE_UP,
}  # fmt: skip
#: bytes of dropped tensors after which a GPU's free blocks are given back
RELEASE_BYTES = 2**30


class Chooser(Protocol):
    """Ours or theirs, for a shape (halfbyte.runtime.loading.choice)."""

    seconds: float

    def known(self, shape: Shape) -> Verdict | None:
        """The verdict, if there is one already."""

    def judge(self, shape: Shape, theirs: Sequence[Any], ours: Nf4Linear) -> Verdict:
        """The verdict, by timing these if need be."""


def replace(model: torch.nn.Module, chooser: Chooser) -> Report:
    """Put ours in place of bitsandbytes' linears where the chooser says so; the model changes in place.

    returns  what became of each; also kept as `model.halfbyte`
    """
    places: dict[str, Place] = {name: Place(name, THEIRS, "") for name, _ in linears_of(model)}
    reasons = {name: why_theirs(linear) for name, linear in linears_of(model)}
    reasons |= dict.fromkeys(_twice(model), "it is used in two places")
    dropped = 0
    for owner_name, owner, group in list(_groups(model, reasons)):
        members = [getattr(owner, name) for name in group]
        found = _replace_group(owner, group, members, chooser)
        dropped += sum(member.in_features * member.out_features // 2 for member in members)
        if dropped > RELEASE_BYTES and torch.cuda.is_available():
            torch.cuda.empty_cache()
            dropped = 0
        prefix = f"{owner_name}." if owner_name else ""
        for name in group:
            rest = tuple(prefix + other for other in group if other != name) if found.path == OURS else ()
            places[prefix + name] = Place(prefix + name, found.path, found.reason, rest, found.paths)
    for name, reason in reasons.items():
        if reason is not None:
            places[name] = Place(name, THEIRS, reason)
    return note(model, tuple(places.values()), chooser.seconds)


def leave(model: torch.nn.Module, reason: str) -> Report:
    """Replace nothing, and say why."""
    return note(model, tuple(Place(name, THEIRS, reason) for name, _ in linears_of(model)))


def note(model: torch.nn.Module, places: tuple[Place, ...], seconds: float = 0.0) -> Report:
    """Make the report and keep it at the model."""
    device = next((str(tensor.device) for tensor in model.parameters()), "cpu")
    report = Report(places, device, seconds)
    model.__dict__["halfbyte"] = report
    return report


def restore(model: torch.nn.Module) -> Report:
    """Put bitsandbytes' linears back, with the bytes they had; the model changes in place."""
    for _, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, Nf4Projection):
                setattr(owner, name, child.restore())
        if stack_of(owner) is not None:
            unshare(owner)
    return leave(model, "put back")


def fused_groups(layer: torch.nn.Module) -> dict[str, Stack]:
    """The weights of one decoder layer, for code that multiplies itself: keys `qkv`, `o`, `gate_up`, `down`.

    Of each: `.linear` (Nf4Linear), `.names` (which parts it has: q alone where keys are shared, no v where values are keys),
    `.splits` (their rows); call it for all products side by side. A key is missing if one of its linears is bitsandbytes' or alone.
    Joined ones are also where their names say: `self_attn.qkv_proj` or `.qk_proj`, `mlp.gate_up_proj`.
    """
    found = {}
    for key, owner_name, names in (
        ("qkv", "self_attn", _QKV), ("o", "self_attn", ("o_proj",)), ("gate_up", "mlp", _GATE_UP), ("down", "mlp", ("down_proj",)),
    ):  # fmt: skip
        owner = getattr(layer, owner_name, None)
        members = [member for name in names if (member := getattr(owner, name, None)) is not None]
        if members and all(isinstance(member, Nf4Projection) for member in members):
            first: Stack = members[0].stack
            if all(member.stack is first for member in members) and len(first.names) == len(members):
                found[key] = first
    return found


def linears_of(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every bitsandbytes Linear4bit under its (first) name."""
    from bitsandbytes.nn import Linear4bit

    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def why_theirs(linear: Any) -> str | None:
    """Why a Linear4bit cannot be ours, or None."""
    state: Any = getattr(linear.weight, "quant_state", None)
    if state is None:
        return "it is not quantized yet"
    kind, device, reason = state.quant_type, linear.weight.device, None
    if kind != "nf4":
        reason = f"{kind} is not nf4"
    elif getattr(state, "packing_format_for_cpu", False):  # before `nested`: that order has no nested scales
        reason = "its bytes are in bitsandbytes' CPU order"
    elif not state.nested:
        reason = "its scales are not double-quantized"
    elif len(state.shape) != 2:
        reason = f"its shape is {list(state.shape)}"
    elif linear.weight.requires_grad or linear.training:
        reason = "it is in training"
    elif getattr(linear, "_hf_hook", None) is not None:
        reason = "accelerate moves its weight"
    elif linear.compute_dtype not in (None, torch.bfloat16, torch.float32):
        reason = f"it computes in {str(linear.compute_dtype).removeprefix('torch.')}"
    elif linear.compute_dtype == torch.float32 and device.type != "cpu":
        reason = "it computes in float32, the kernels in bfloat16"
    return reason or why_unsupported(state.shape[0], state.shape[1], state.blocksize)


def _twice(model: torch.nn.Module) -> set[str]:
    """Names of linears that are the same module as another."""
    first = {id(module): name for name, module in linears_of(model)}
    again = [id(module) for _, module in model.named_modules(remove_duplicate=False) if id(module) in first]
    return {first[number] for number in set(again) if again.count(number) > 1}


def _groups(
    model: torch.nn.Module, reasons: dict[str, str | None]
) -> Iterator[tuple[str, torch.nn.Module, tuple[str, ...]]]:
    """Owner's name, owner, and the names of children that become one weight, one after another."""
    for owner_name, owner in model.named_modules():
        prefix = f"{owner_name}." if owner_name else ""
        free = [name for name, _ in owner.named_children() if reasons.get(prefix + name, "none of ours") is None]
        together = KNOWN.get(type(owner).__name__, ()) if type(owner).__module__.startswith("transformers.") else ()
        joined = _alike(owner, tuple(name for name in together if getattr(owner, name, None) is not None), free)
        if joined:
            yield owner_name, owner, joined
        for name in free:
            if name not in joined:
                yield owner_name, owner, (name,)


def _alike(owner: torch.nn.Module, names: tuple[str, ...], free: list[str]) -> tuple[str, ...]:
    """The names, if there are two or more, all of them ours, and they can be rows of one weight."""
    if names not in ATTRIBUTES or not set(names) <= set(free):
        return ()
    members = [getattr(owner, name) for name in names]
    traits = {
        (m.in_features, m.weight.quant_state.blocksize, m.compute_dtype, m.bias is None, m.weight.device)
        for m in members
    }
    return names if len(traits) == 1 else ()


def _replace_group(owner: torch.nn.Module, names: tuple[str, ...], members: list[Any], chooser: Chooser) -> Verdict:
    """Judge one group and replace it if it is ours."""
    state = members[0].weight.quant_state
    shape = Shape(tuple(m.weight.quant_state.shape[0] for m in members), members[0].in_features, state.blocksize)
    verdict = chooser.known(shape)
    if verdict is not None and verdict.paths is None:
        return verdict
    try:
        ours = Nf4Linear.of_linear4bit(*members)
    except HalfbyteError as error:
        return Verdict(None, error.what)
    if verdict is None:
        verdict = chooser.judge(shape, members, ours)
    if verdict.paths is not None:
        ours.paths = verdict.paths
        stack = Stack(ours, names, members[0].compute_dtype)
        stack.train(owner.training)
        if len(names) > 1:
            share(owner, stack)
        for index, name in enumerate(names):
            setattr(owner, name, Nf4Projection(members[index], stack, index))
    return verdict
