"""What weights, activations and cached keys and values are held in."""

from dataclasses import dataclass

from expertlane.errors import SpecError

ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


@dataclass(frozen=True)
class Precision:
    """Types of a deployment.

    Attributes:
        weights: of weights and of the products with them.
        kv: of the key/value cache; the activations' if not given.

    Raises:
        SpecError: an unknown type.
    """

    weights: str = "float16"
    kv: str | None = None

    def __post_init__(self) -> None:
        for name in (self.weights, self.kv or self.weights):
            if name not in ITEMSIZE:
                raise SpecError(f"type {name!r} is unknown; valid: {', '.join(ITEMSIZE)}")

    @property
    def activations(self) -> str:
        """Of hidden states: bfloat16 where weights are float8."""
        return "bfloat16" if self.weights == "float8" else self.weights

    @property
    def weight_itemsize(self) -> int:
        """Bytes of a weight; scales of float8 are not counted."""
        return ITEMSIZE[self.weights]

    @property
    def activation_itemsize(self) -> int:
        """Bytes of a value of a hidden state."""
        return ITEMSIZE[self.activations]

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a cached value."""
        return ITEMSIZE[self.kv or self.activations]

    def __str__(self) -> str:
        kv = f", keys and values {self.kv}" if self.kv and self.kv != self.activations else ""
        return self.weights + kv
