"""Presets: which tensors to leave alone, as a TOML file in which every entry gives its reason.

    name = "my-recipe"                       # optional in a user's file: its file name
    why = "one clause: what it is for"       # required
    extends = "decoder-only"                 # optional: "decoder-only" (the default) or "none"

    [[keep]]                                 # any number; exactly one of area | module, and a why
    area = "vision"                          # decoder, vision, audio, projector, other
    why = "..."

    [[keep]]
    module = "model.language_model.layers.3.mlp"
    why = "..."

    [[skip_modules]]                         # or, instead of keep: a list to be written verbatim
    name = "lm_head"
    why = "..."

`module` is one or more path components joined by dots, found anywhere in a module's path, whole components only;
`*` and `?` stand for characters within one component: `router`, `mlp.gate`, `layers.3.mlp`, `layers.*.self_attn`.
`extends = "none"` drops decoder-only's own entries, so that a file may send the vision tower to NF4. Embeddings, the
head, norms, buffers and fused experts are kept whatever a preset says: the format has no place for them.

With a verbatim list the installed transformers decides (halfbyte.recipe.linter), since that is how it would load.
A reason is required because the plan, the card and the next reader print it beside the tensor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.recipe.decisions import AREAS

#: presets that come with halfbyte
BUILT_IN = ("decoder-only", "unsloth")
#: areas a `keep` may name: the other two are kept anyway
_KEEPABLE = tuple(area for area in AREAS if area not in ("embeddings", "head"))


@dataclass(frozen=True)
class Preset:
    """A recipe.

    name, why     what the plan and the card print
    areas         area -> why it is kept
    modules       pattern -> why modules that match it are kept
    skip_modules  a list to write verbatim (entry -> why), None if the list is to be derived
    own_patterns  patterns of the user's own file: one that matches nothing is worth a note
    """

    name: str
    why: str
    areas: Mapping[str, str]
    modules: Mapping[str, str]
    skip_modules: Mapping[str, str] | None = None
    own_patterns: tuple[str, ...] = ()

    def keep_reason(self, module: str, area: str) -> str | None:
        """Why this preset keeps a module of that area, None if it does not."""
        if area in self.areas:
            return self.areas[area]
        return next((why for pattern, why in self.modules.items() if matches(pattern, module)), None)


def matches(pattern: str, module: str) -> bool:
    """Whether the components of `pattern` appear in a row among those of `module` (`*`, `?` within a component)."""
    wanted, parts = pattern.split("."), module.split(".")
    spans = range(len(parts) - len(wanted) + 1)
    return any(all(fnmatchcase(parts[at + i], part) for i, part in enumerate(wanted)) for at in spans)


def load_preset(preset: str | Path) -> Preset:
    """A built-in preset by name, or the user's own TOML file by path.

    raises UsageError (file and key named) if there is no such preset, or the file is not TOML of the schema above
    """
    if str(preset) in BUILT_IN:
        where = f"preset {preset}"
        text = resources.files("halfbyte.recipe").joinpath("presets", f"{preset}.toml").read_text(encoding="utf-8")
        return _parse(text, where, built_in=True)
    path = Path(preset)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"no such preset: {preset} ({error.strerror if isinstance(error, OSError) else 'not UTF-8 text'})",
            where="--preset",
            todo=f"give one of {', '.join(BUILT_IN)}, or the path of a TOML file",
        ) from None
    return _parse(text, str(path), built_in=False)


def _parse(text: str, where: str, *, built_in: bool) -> Preset:
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not TOML: {error}", where=where, todo="see the schema in halfbyte.recipe.preset") from None
    _only(body, {"name", "why", "extends", "keep", "skip_modules"}, where, "")
    name = _text(body, "name", where, "", default=Path(where).stem)
    why = _text(body, "why", where, "")
    if "skip_modules" in body:
        for other in ("keep", "extends"):
            if other in body:
                raise _bad(f"{other!r} and 'skip_modules' cannot both be given", where, other)
        listed = {}
        for at, entry in enumerate(_tables(body, "skip_modules", where)):
            _only(entry, {"name", "why"}, where, f"skip_modules[{at}].")
            listed[_text(entry, "name", where, f"skip_modules[{at}].")] = _text(
                entry, "why", where, f"skip_modules[{at}]."
            )
        return Preset(name, why, {}, {}, skip_modules=listed)

    areas, modules = _keep_entries(body, where)
    own = () if built_in else tuple(modules)
    extends = _text(body, "extends", where, "", default="none" if built_in else "decoder-only")
    if extends not in ("none", "decoder-only"):
        raise _bad(f"extends must be 'decoder-only' or 'none', not {extends!r}", where, "extends")
    if extends == "decoder-only":
        parent = load_preset("decoder-only")
        areas, modules = {**parent.areas, **areas}, {**modules, **parent.modules}
    return Preset(name, why, areas, modules, own_patterns=own)


def _keep_entries(body: dict[str, Any], where: str) -> tuple[dict[str, str], dict[str, str]]:
    areas: dict[str, str] = {}
    modules: dict[str, str] = {}
    for at, entry in enumerate(_tables(body, "keep", where)):
        key = f"keep[{at}]."
        _only(entry, {"area", "module", "why"}, where, key)
        if ("area" in entry) == ("module" in entry):
            raise _bad("an entry names exactly one of 'area' and 'module'", where, key.rstrip("."))
        why = _text(entry, "why", where, key)
        if "module" in entry:
            modules[_text(entry, "module", where, key)] = why
            continue
        area = _text(entry, "area", where, key)
        if area not in _KEEPABLE:
            raise _bad(f"no such area: {area!r} (one of {', '.join(_KEEPABLE)})", where, f"{key}area")
        areas[area] = why
    return areas, modules


def _tables(body: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = body.get(key, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _bad(f"write each entry as a table: [[{key}]]", where, key)
    return found


def _text(table: dict[str, Any], key: str, where: str, prefix: str, *, default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or not value.strip():
        raise _bad("missing, or not a text", where, prefix + key)
    return value.strip()


def _only(table: dict[str, Any], known: set[str], where: str, prefix: str) -> None:
    for key in table:
        if key not in known:
            raise _bad(f"unknown key (known: {', '.join(sorted(known))})", where, prefix + key)


def _bad(what: str, where: str, key: str) -> UsageError:
    return UsageError(f"preset key {key!r}: {what}", where=where, todo="see the schema in halfbyte.recipe.preset")
