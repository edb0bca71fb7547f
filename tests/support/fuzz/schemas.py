"""Values that a JSON Schema allows, as pydantic writes such schemas: a strategy of hypothesis."""

from collections.abc import Mapping
from typing import Any, Final

from hypothesis import strategies as st

MOST_ITEMS: Final = 3
MOST_EXTRA: Final = 2
"""Of objects with any keys."""

Schema = Mapping[str, Any]
Strategy = st.SearchStrategy[Any]


def values(schema: Schema) -> Strategy:
    """Return the values of a whole schema; objects have all of their properties, or only the required ones of them."""
    return _Values(schema.get("$defs", {})).of(schema)


class _Values:
    """Values of parts of a schema with these definitions."""

    def __init__(self, definitions: Schema) -> None:
        self._definitions = definitions
        self._named: dict[str, Strategy] = {}
        self._kinds = {
            "object": self._object, "array": self._array, "string": _text, "integer": _integer, "number": _number,
            "boolean": lambda _: st.booleans(), "null": lambda _: st.none(),
        }  # fmt: skip

    def of(self, part: Schema) -> Strategy:
        match part:
            case {"$ref": place}:
                name = place.rpartition("/")[2]
                if name not in self._named:
                    self._named[name] = self.of(self._definitions[name])
                return self._named[name]
            case {"const": value}:
                return st.just(value)
            case {"enum": choices}:
                return st.sampled_from(choices)
            case {"anyOf": parts} | {"oneOf": parts}:
                return st.one_of([self.of(each) for each in parts])
            case _:
                return self._kinds[part.get("type", "string")](part)  # names of properties have no type

    def _array(self, part: Schema) -> Strategy:
        least = part.get("minItems", 0)
        most = min(part.get("maxItems", least + MOST_ITEMS), least + MOST_ITEMS)
        return st.lists(self.of(part["items"]), min_size=least, max_size=most)

    def _object(self, part: Schema) -> Strategy:
        properties = {name: self.of(each) for name, each in part.get("properties", {}).items()}
        required = {name: properties.pop(name) for name in part.get("required", ()) if name in properties}
        more = part.get("additionalProperties", False)
        if not isinstance(more, Mapping):
            return st.fixed_dictionaries(required, optional=properties)
        names = self.of(part["propertyNames"]) if "propertyNames" in part else _text({})
        return st.dictionaries(names, self.of(more), max_size=MOST_EXTRA)


def _text(part: Schema) -> Strategy:
    if "pattern" in part:
        return st.from_regex(part["pattern"].replace("$", r"\Z"))
    characters = st.characters(exclude_categories=["Cs"])
    return st.text(characters, min_size=part.get("minLength", 0), max_size=min(part.get("maxLength", 8), 8))


def _integer(part: Schema) -> Strategy:
    low, high = part.get("minimum", -(2**70)), part.get("maximum", 2**70)
    return st.integers(part.get("exclusiveMinimum", low - 1) + 1, part.get("exclusiveMaximum", high + 1) - 1)


def _number(part: Schema) -> Strategy:
    low, high = part.get("exclusiveMinimum", part.get("minimum")), part.get("maximum")
    return st.floats(
        low, high, exclude_min="exclusiveMinimum" in part, allow_nan=False, allow_infinity=False
    )  # fmt: skip
