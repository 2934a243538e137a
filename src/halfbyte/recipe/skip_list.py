"""From decisions to `llm_int8_skip_modules`: one list that every loader reads the same way.

Loaders match names differently (halfbyte.recipe.linter), so an entry is written in each spelling that somebody needs:

    vision_tower          a component of the name: transformers 4.x, vLLM
    model.vision_tower    the start of the full name: transformers 5 (not needed where `vision_tower` is already the
                          start or the end of every name it must match)

How. A module tree is walked for its maximal subtrees in which no linear becomes NF4. Three kinds remain:
    one subtree                      `model.vision_tower`             -> bare, then the full path
    the same one in every layer      `layers.*.per_layer_input_gate`  -> bare, once; also `router.proj` where the linear
                                                                         sits below it (`layers.*.router`)
    some layers only                 `layers.3.mlp`                   -> full paths, in vLLM's spelling too
A bare name that would hit a module meant for NF4, under any rule, is not used: full paths instead.

The catch: giving a list drops transformers' default (`lm_head`), so the head and the embeddings are always named; and a
path must not end in a number: early 5.x is not anchored, `layers.1` would protect layers 10 to 19 too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from halfbyte.recipe.areas import Areas
from halfbyte.recipe.linter import (
    early_5_rule,
    installed_rule,
    is_nested,
    transformers_4_rule,
    vllm_name,
    vllm_names,
    vllm_rule,
)
from halfbyte.recipe.skeleton import Skeleton


def derive_skip_modules(nf4_modules: Collection[str], skeleton: Skeleton, areas: Areas) -> list[str]:
    """The skip list under which every loader converts `nf4_modules` and nothing else, where such a list exists.

    nf4_modules  module paths that become Linear4bit
    returns      head and embeddings, bare names, full paths, vLLM's spellings; each once, in the model's order
    """
    names = vllm_names(skeleton)
    nested = is_nested(skeleton)
    converted = set(nf4_modules)
    kept = [name for name in skeleton.convertible if name not in converted and areas.area_of(name) != "head"]
    always = ["lm_head", "embed_tokens", *_leaf(areas.head)]
    bare: list[str] = []
    paths: list[str] = []
    spelled: list[str] = []
    done: set[str] = set()
    for root in _maximal_subtrees(kept, converted, set(skeleton.convertible)):
        pattern = _pattern(root)
        if pattern in done:
            continue
        inside = [name for name in kept if _pattern(name).startswith(pattern + ".") or _pattern(name) == pattern]
        everywhere = not any(_within(_pattern(name), pattern) for name in converted)
        entry = root.rpartition(".")[2]
        endings = _endings(entry, pattern, inside, names)
        if everywhere and not _collides(endings, converted, names):
            done.add(pattern)
            bare += endings
            if "*" not in pattern and not _reached_bare(entry, inside):
                paths.append(root)
            continue
        spelled += _spellings(root, converted, names, nested)
    found = list(dict.fromkeys([*always, *bare, *paths, *spelled]))
    return [*found, *_still_open_in_vllm(found, kept, converted, names)]


def _maximal_subtrees(kept: Iterable[str], converted: set[str], convertible: set[str]) -> list[str]:
    """Highest paths under which no module is converted, in order; never the root, never ending in a number."""
    mixed = {prefix for name in converted for prefix in _prefixes(name)}
    found: dict[str, None] = {}
    for name in kept:
        whole = [path for path in _prefixes(name) if path not in mixed]
        found[next((path for path in whole if not path.rpartition(".")[2].isdigit()), name)] = None
    return list(found)


def _endings(entry: str, pattern: str, inside: list[str], names: dict[str, str]) -> list[str]:
    """The bare name. For a subtree found in every layer also the endings by which transformers 5 knows its linears, and
    the fused name by which vLLM knows a projection that it merges with its neighbours.
    """
    if "*" not in pattern:
        return [entry]
    depth = pattern.count(".")
    there = [names[name].rpartition(".")[2] for name in inside if _pattern(name) == pattern]
    return list(dict.fromkeys([entry, *(".".join(name.split(".")[depth:]) for name in inside), *there]))


def _reached_bare(entry: str, inside: list[str]) -> bool:
    """Whether transformers 5 finds every module by the bare name: it begins or ends the module's name."""
    return all(name == entry or name.startswith(entry + ".") or name.endswith("." + entry) for name in inside)


def _collides(entries: list[str], converted: set[str], names: dict[str, str]) -> bool:
    """Whether any loader would skip a module that is meant for NF4 because of these entries."""
    rules = (transformers_4_rule(entries), early_5_rule(entries), installed_rule(entries))
    there = vllm_rule(entries)
    return any(there(names[name]) or any(rule(name) for rule in rules) for name in converted)


def _spellings(root: str, converted: set[str], names: dict[str, str], nested: bool) -> list[str]:
    """A full path for transformers and vLLM's for it; a fused module only if all its parts are kept."""
    there = vllm_name(root, nested)
    shared = any(names[name] == there for name in converted)
    return [root] if shared else [root, there]


def _still_open_in_vllm(found: list[str], kept: list[str], converted: set[str], names: dict[str, str]) -> list[str]:
    """vLLM's names of kept modules that the list does not reach: some it spells as the checkpoint does."""
    skips = vllm_rule(found)
    taken = {names[name] for name in converted}
    return list(dict.fromkeys(names[name] for name in kept if not skips(names[name]) and names[name] not in taken))


def _leaf(path: str | None) -> list[str]:
    return [path.rpartition(".")[2]] if path else []


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _within(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
