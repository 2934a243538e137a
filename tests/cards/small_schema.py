"""The part of JSON Schema 2020-12 that our schema uses, for tests; a keyword that is not known here is an error, not ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "type", "required", "additionalProperties", "properties", "items",
    "enum", "minimum",
}  # fmt: skip
TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def violations(value: Any, schema: Any, root: Any, path: str = "$") -> Iterator[str]:
    """Sentences about what in `value` the schema forbids; none if it is valid."""
    assert not schema.keys() - KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_a(value, kind) for kind in kinds):
        yield f"{path} is no {kinds}: {value!r}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path} is none of {schema['enum']}: {value!r}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{path} is below {schema['minimum']}"
    if isinstance(value, dict):
        yield from (f"{path} lacks {name}" for name in schema.get("required", []) if name not in value)
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name, inner in value.items():
            if name in known:
                yield from violations(inner, known[name], root, f"{path}.{name}")
            elif more is False:
                yield f"{path} has {name}, which nothing describes"
            elif isinstance(more, dict):
                yield from violations(inner, more, root, f"{path}.{name}")
    if isinstance(value, list) and "items" in schema:
        for place, inner in enumerate(value):
            yield from violations(inner, schema["items"], root, f"{path}[{place}]")


def is_a(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        return isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind])
