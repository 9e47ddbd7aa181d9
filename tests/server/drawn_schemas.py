"""JSON schemas by a seed, of what servers of structured output are asked for."""

import random
from typing import Any

_NAMES = ("name", "age", "kind", "tags", "größe", "a b", "x-1", "is_ok", "$id_", 'quo"te')
_PATTERNS = ("^[a-z]{1,4}$", "^[A-Z][0-9]{2}$", "^(ab|cd)+e?$", r"^\d{3}-\d{2}$")
_FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


class _Drawn:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.definitions: dict[str, Any] = {}

    def schema(self, depth: int) -> Any:
        leaves = (self.text, self.number, self.integer, self.enum, self.const, self.boolean)
        inner = (self.object, self.array, self.any_of, self.reference, self.nullable, self.tuple)
        return self.random.choice(leaves if depth <= 0 else leaves + inner * 2)(depth)

    def text(self, depth: int) -> dict[str, Any]:
        kind = self.random.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self.random.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.random.choice(_FORMATS)}
        least = self.random.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + self.random.randrange(9)}

    def number(self, depth: int) -> dict[str, Any]:
        low = self.random.randrange(-100, 100) / 4
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + 7.5}

    def integer(self, depth: int) -> dict[str, Any]:
        low = self.random.randrange(-50, 1000)
        found = {"type": "integer", "minimum": low, "maximum": low + self.random.randrange(1, 900)}
        return found | ({"multipleOf": 5, "maximum": low + 900} if low % 3 == 0 else {})

    def enum(self, depth: int) -> dict[str, Any]:
        values = ["red", "grün", 5, -1.5, None, True, "\n\\", "a b"]
        return {"enum": self.random.sample(values, self.random.randrange(1, 5))}

    def const(self, depth: int) -> dict[str, Any]:
        return {"const": self.random.choice(["x", 7, False, None, {"a": [1, "ü"]}, []])}

    def boolean(self, depth: int) -> dict[str, Any]:
        return {"type": self.random.choice(["boolean", "null"])}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(_NAMES, self.random.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in names},
            "required": [name for name in names if self.random.random() < 0.85],
            "additionalProperties": False,  # random weights write names without end
        }

    def array(self, depth: int) -> dict[str, Any]:
        least = self.random.choice([0, 1, 1, 2])
        most = least + self.random.randrange(1, 3)
        items = self.schema(depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}

    def tuple(self, depth: int) -> dict[str, Any]:
        items = [self.schema(depth - 1) for _ in range(self.random.randrange(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def any_of(self, depth: int) -> dict[str, Any]:
        options = [self.schema(depth - 1) for _ in range(self.random.randrange(2, 4))]
        return {"anyOf": options}

    def nullable(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1), {"type": "null"}]}

    def reference(self, depth: int) -> dict[str, Any]:
        if not self.definitions or self.random.random() < 0.6:
            name = f"d{len(self.definitions)}"
            self.definitions[name] = {}
            self.definitions[name] = self.schema(depth - 1)
        name = self.random.choice([name for name, each in self.definitions.items() if each] or [""])
        return {"$ref": f"#/$defs/{name}"} if name else {"type": "boolean"}


def drawn_schema(seed: int) -> dict[str, Any]:
    """An object or an array of up to three levels."""
    drawn = _Drawn(seed)
    root = drawn.random.choice([drawn.object, drawn.object, drawn.array])(3)
    return root | ({"$defs": drawn.definitions} if drawn.definitions else {})
