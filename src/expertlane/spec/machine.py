"""What the machine at hand can do at best."""

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class MachinePeak:
    """Measured peak rates of the whole machine, all its cores or devices together.

    Attributes:
        gemm_flops_per_s: of a large matrix product in `dtype`.
        read_bytes_per_s: of reading memory too large for any cache.
        num_units, unit: how many cores or GPUs the measurement used.
        dtype: of the matrix product, for example `float32`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    gemm_flops_per_s: float
    read_bytes_per_s: float
    num_units: int
    unit: str
    dtype: str
