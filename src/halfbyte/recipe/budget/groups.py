"""What is decided as one: the modules that a loader fuses, and every other module by itself.

vLLM (and SGLang) run q, k, v as one `qkv_proj`, gate and up as one `gate_up_proj`. Such a layer is quantized or not as a
whole: a list that keeps one part alone is read there as keeping none or all (halfbyte.recipe.linter). Our own kernels
multiply the parts of a fused layer in one launch and want one block size in it (halfbyte.runtime.linear.weight). So a fused
layer gets one decision. The price is small: its parts read the same input, and their errors enter the residual side by side.

The names come from the linter's own table, so what is fused there is decided together here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.recipe.decisions import Decision
from halfbyte.recipe.linter import vllm_names
from halfbyte.recipe.skeleton import Skeleton


@dataclass(frozen=True)
class Group:
    """Modules with one decision.

    name     the module's path; of several, their parent's path and the fused layer's name (`...self_attn.qkv_proj`)
    modules  paths in the transformers model
    tensors  their weights' names in the source
    """

    name: str
    modules: tuple[str, ...]
    tensors: tuple[str, ...]


def groups_of(decisions: Sequence[Decision], skeleton: Skeleton) -> list[Group]:
    """The groups of all tensors that `decisions` call nf4, in the source's order."""
    fused = vllm_names(skeleton)
    members: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.action == "nf4" and decision.module is not None:
            members.setdefault(fused[decision.module], []).append(decision)
    return [_group(name, found) for name, found in members.items()]


def _group(fused: str, members: Sequence[Decision]) -> Group:
    modules = tuple(d.module for d in members if d.module is not None)
    name = modules[0]
    if len(modules) > 1:
        name = f"{name.rpartition('.')[0]}.{fused.rpartition('.')[2]}"
    return Group(name, modules, tuple(d.name for d in members))
