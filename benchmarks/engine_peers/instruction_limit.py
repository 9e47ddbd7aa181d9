"""How each contender is kept from instructions beyond a set, though this CPU has them."""

import os
from pathlib import Path

# For oneDNN, MKL and torch's own kernels; vLLM's are chosen by what torch says of the CPU.
_LIMITS = {
    "avx2": ("AVX2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512"),
    "avx512_bf16": ("AVX512_CORE_BF16", "AVX512", "avx512"),
    "amx": ("AVX512_CORE_AMX", "AVX512", "avx512"),
}
SETS = tuple(_LIMITS)
_CHANGED_PYTHON = Path(__file__).parent / "hidden_instructions"  # its sitecustomize.py


def environment(cpu_isa: str | None) -> dict[str, str]:
    """Variables for a process that is to use no more than this set; none without."""
    if cpu_isa is None:
        return {}
    onednn, mkl, aten = _LIMITS[cpu_isa]
    paths = [str(_CHANGED_PYTHON), os.environ.get("PYTHONPATH", "")]
    return {
        "EXPERTLANE_CPU_ISA": cpu_isa,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ATEN_CPU_CAPABILITY": aten,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
