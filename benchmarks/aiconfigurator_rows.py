"""What aiconfigurator-core says of rows: JSON on standard input and output, in its own environment.

Run by bench_aiconfigurator.py with the Python that has aiconfigurator-core; knows no expertlane.
"""

import json
import sys
import time

from aiconfigurator_core.sdk.backends.factory import get_backend
from aiconfigurator_core.sdk.common import FMHAQuantMode, KVCacheQuantMode
from aiconfigurator_core.sdk.config import ModelConfig, RuntimeConfig
from aiconfigurator_core.sdk.models import get_model
from aiconfigurator_core.sdk.perf_database import get_database

SYSTEMS = {"b200": "b200_sxm", "b300": "b300_sxm", "h100": "h100_sxm", "h200": "h200_sxm"}
BACKENDS = {"trt": "trtllm", "sglang": "sglang"}
MODELS = {"fp8": "deepseek-ai/DeepSeek-R1", "fp4": "nvidia/DeepSeek-V3.1-NVFP4"}
STEP_TOKENS = 8192  # of a step's prompts, as both frameworks have it by default


def main() -> None:
    rows = [json.loads(line) for line in sys.stdin]
    databases = {key: get_database(*key, "current") for key in {*map(key_of, rows)}}
    for row in rows:
        started = time.process_time()
        try:
            found = estimate(row, databases)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
        print(json.dumps(found | {"seconds": time.process_time() - started}), flush=True)


def key_of(row: dict) -> tuple[str, str]:
    """The system and the backend of a row."""
    return SYSTEMS.get(row["hardware"], row["hardware"]), BACKENDS[row["framework"]]


def estimate(row: dict, databases: dict) -> dict:
    """TPOT and output tokens a second a device, of one row."""
    key = key_of(row)
    backend_name = key[1]
    tp, ep = row["tp"], row["ep"]
    dp = tp if row["dp_attention"] else 1
    model = get_model(
        MODELS[row["precision"]],
        ModelConfig(
            tp_size=tp // dp,
            attention_dp_size=dp,
            moe_tp_size=tp // ep,
            moe_ep_size=ep,
            fmha_quant_mode=FMHAQuantMode.bfloat16,  # the tables have prefill in no other
            kvcache_quant_mode=KVCacheQuantMode.fp8,
        ),
        backend_name,
    )
    backend = get_backend(backend_name)
    isl, osl, batch = row["isl"], row["osl"], max(1, row["conc"] // dp)
    summary = backend.run_agg(
        model,
        databases[key],
        RuntimeConfig(batch_size=batch, isl=isl, osl=osl),
        ctx_tokens=min(STEP_TOKENS, isl * batch),
    )
    found = summary.get_result_dict()
    return {"tpot_s": found["tpot"] / 1e3, "output_tps": found["tokens/s/gpu"]}


if __name__ == "__main__":
    main()
