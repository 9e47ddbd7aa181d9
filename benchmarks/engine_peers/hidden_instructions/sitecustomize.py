"""Has torch deny instructions beyond `EXPERTLANE_CPU_ISA`, in every process that Python starts.

vLLM chooses among its libraries for AVX2, AVX-512 and AVX512_BF16 by asking torch.
"""

import os

_ORDER = ("avx2", "avx512", "avx512_bf16", "amx")
_NEEDS = {
    "_is_avx512_supported": "avx512",
    "_is_vnni_supported": "avx512_bf16",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx",
    "_is_amx_fp16_supported": "amx",
}

if (limit := os.environ.get("EXPERTLANE_CPU_ISA")) in _ORDER:
    try:
        import torch
    except ImportError:
        torch = None
    for name, needed in _NEEDS.items() if torch is not None else ():
        if _ORDER.index(needed) > _ORDER.index(limit):
            setattr(torch.cpu, name, lambda: False)
