"""Values for a JSON Schema, as structured output would give them."""

from __future__ import annotations

import re
from typing import Any

from ._errors import ApiError
from ._text import Material

_DEEP = 4
_FORMATS = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "duration": "PT1S",
    "email": "agent@example.org",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
}
_SAMPLES = ("a", "A", "aB1", "0", "10", "2026-01-01", "a@example.org", "a-b", "a_b", "A1", "ABC")

Schema = dict[str, Any]


class Filler:
    """Fills one schema: deterministic, from what the user quoted and named, then from words."""

    def __init__(self, schema: Schema, material: Material) -> None:
        self._root = schema
        self._material = material

    def fill(self) -> Any:
        """A value that the schema accepts.

        Raises:
            ApiError: the schema asks for something that the stub cannot make up.
        """
        return self._value(self._root, 0)

    def _value(self, given: Schema | bool, depth: int) -> Any:
        schema = self._resolved(given, depth)
        if "const" in schema:
            return schema["const"]
        if options := schema.get("enum"):
            return options[self._material.below(len(options))]
        kind = schema.get("type") or ("object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        maker = getattr(self, f"_{kind}", None)
        if maker is None:
            raise ApiError(400, f"schema: unknown type {kind!r}", param="response_format")
        return maker(schema, depth)

    def _resolved(self, schema: Schema | bool, depth: int) -> Schema:
        """Follow `$ref`, choose one of `anyOf` / `oneOf`, merge `allOf`."""
        while isinstance(schema, dict):
            if "$ref" in schema:
                rest = {k: v for k, v in schema.items() if k != "$ref"}
                schema = {**self._pointed(schema["$ref"]), **rest}
            elif "allOf" in schema:
                parts = [self._resolved(part, depth) for part in schema["allOf"]]
                rest = {k: v for k, v in schema.items() if k != "allOf"}
                schema = _merged([*parts, rest])
            elif options := schema.get("anyOf") or schema.get("oneOf"):
                rest = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf")}
                schema = _merged([rest, self._choice(options, depth)])
            else:
                return schema
        return {}

    def _choice(self, options: list[Schema], depth: int) -> Schema:
        nulls = [o for o in options if o.get("type") == "null"]
        if depth > _DEEP and nulls:
            return nulls[0]
        return next((o for o in options if o.get("type") != "null"), options[0])

    def _pointed(self, ref: str) -> Schema:
        node: Any = self._root
        for part in ref.removeprefix("#").strip("/").split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if part and not (isinstance(node, dict) and key in node):
                raise ApiError(400, f"schema: {ref} points nowhere", param="response_format")
            node = node[key] if part else node
        return dict(node)

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        if depth > 10 * _DEEP:
            raise ApiError(400, "schema: it requires itself without end", param="response_format")
        return {
            name: self._value(part, depth + 1)
            for name, part in schema.get("properties", {}).items()
            if name in required or depth <= _DEEP
        }

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        prefix = schema.get("prefixItems", [])
        low = max(schema.get("minItems", 0), len(prefix))
        wanted = low if depth > _DEEP else max(low, 2)
        length = min(wanted, schema.get("maxItems", wanted))
        if schema.get("items") is False:
            length = min(length, len(prefix))
        values: list[Any] = []
        for attempt in range(length * 8):
            at = len(values)
            value = self._value(
                prefix[at] if at < len(prefix) else schema.get("items", {}), depth + 1
            )
            if not schema.get("uniqueItems") or value not in values or attempt >= length * 8 - 1:
                values.append(value)
            if len(values) == length:
                break
        return values

    def _string(self, schema: Schema, depth: int) -> str:
        if pattern := schema.get("pattern"):
            return self._matching(pattern, schema)
        if schema.get("format") in _FORMATS:
            return _FORMATS[schema["format"]]
        quoted = self._material.quoted()
        text = quoted.pop(0) if quoted else " ".join(self._material.words(4))
        while len(text) < schema.get("minLength", 0):
            text += " " + self._material.words(1)[0]
        return text[: schema.get("maxLength", len(text))]

    def _matching(self, pattern: str, schema: Schema) -> str:
        samples = (*self._material.quoted(), *_SAMPLES, *self._material.words(4))
        low, high = schema.get("minLength", 0), schema.get("maxLength", 1 << 30)
        for sample in samples:
            if low <= len(sample) <= high and re.search(pattern, sample):
                return sample
        raise ApiError(400, f"schema: the stub cannot match {pattern!r}", param="response_format")

    def _integer(self, schema: Schema, depth: int) -> int:
        return int(self._figure(schema, 1, whole=True))

    def _number(self, schema: Schema, depth: int) -> float:
        return self._figure(schema, 0.5, whole=False)

    def _figure(self, schema: Schema, default: float, *, whole: bool) -> float:
        low, high = _bounds(schema, 1 if whole else 1e-6)
        named = self._material.numbers()
        for value in named:
            if low <= value <= high and (not whole or value.is_integer()):
                named.remove(value)
                return value
        step = schema.get("multipleOf", 0)
        value = min(max(default, low), high)
        return -(-value // step) * step if step else value

    def _boolean(self, schema: Schema, depth: int) -> bool:
        return self._material.below(2) == 1

    def _null(self, schema: Schema, depth: int) -> None:
        return None


def _bounds(schema: Schema, gap: float) -> tuple[float, float]:
    low = max(schema.get("minimum", -1e18), schema.get("exclusiveMinimum", -1e18 - gap) + gap)
    high = min(schema.get("maximum", 1e18), schema.get("exclusiveMaximum", 1e18 + gap) - gap)
    return low, high


def _merged(parts: list[Schema]) -> Schema:
    whole: Schema = {}
    for part in parts:
        joined = {
            "properties": {**whole.get("properties", {}), **part.get("properties", {})},
            "required": [*whole.get("required", ()), *part.get("required", ())],
        }
        whole = {**whole, **part, **{k: v for k, v in joined.items() if v}}
    return whole
