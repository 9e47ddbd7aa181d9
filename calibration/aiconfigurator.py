"""What NVIDIA's aiconfigurator-core 0.12 itself projects of deployments that others measured.

`beside.py` asks it. Rows have the columns of aiconfigurator-core's `silicon_sample.csv`, and
`split_layout` and `split_concurrency`. Nothing is fitted: each row is asked of the package as
`estimate` of its command line asks (aiconfigurator 0.12, `cli/api.py`, which the package does not
bring), with the defaults of that command. Types of numbers are those of the row's columns; where
the package refuses them, those that it finds in the checkpoint, if they are of the row's precision.
Tables are of the row's version where the package lets it be asked for, and else of its version by
default.

- One pool: `run_agg`, with one prompt's tokens in each mixed step.
- Two pools: `run_static` of a worker that prefills and of one that decodes, in its command's
  scales; TTFT is a worker's time for its batch of prompts (the row's, or 1), in its command's
  factor. Requests of the load are shared out evenly to ranks that decode.

Answers stay in build/aiconfigurator.jsonl; delete it where the package changes.
"""

import csv
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

_ANSWERS = Path("build/aiconfigurator.jsonl")
# As aiconfigurator 0.12 has them in its command `estimate`: of times, and of TTFT after that.
_PREFILL_SCALE, _DECODE_SCALE, _TTFT_SCALE = 1.1, 1.08, 1.8

Role = Literal["agg", "prefill", "decode"]


class Refused(Exception):
    """The package cannot project a row; says why."""


@dataclass(frozen=True)
class Prediction:
    """aiconfigurator's projection of one row.

    Attributes:
        ttft_s, tpot_s: means; None where it is refused.
        version: of the tables that were asked; empty where there are none.
        types: whose numbers' types were asked for, "row" or "checkpoint".
        seconds: of the CPU, with the time to read tables and configurations in a kind's first row.
        refused: why there is no answer, or empty.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    version: str = ""
    types: str = "row"
    seconds: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Workers:
    """Alike copies of one layout: `tp` × `dp` devices each, whose experts are cut in `ep`."""

    num: int
    tp: int
    dp: int
    ep: int

    def requests_of_rank(self, requests: int) -> int:
        """Most requests that one group of `tp` devices has."""
        return math.ceil(requests / (self.num * self.dp))


@dataclass(frozen=True)
class _Served:
    """A model on tables: all of a row but its layouts, lengths and load.

    Attributes:
        gemm, experts: types of numbers as the package names them; empty: the checkpoint's.
    """

    system: str
    backend: str
    version: str
    model: str
    gemm: str
    experts: str


def predict(row: Mapping[str, str]) -> Prediction:
    """The package's prediction of a row, or why it has none."""
    begin = time.process_time()
    served = _Served(row["system"], row["backend"], "", row["model_path"], "", "")
    try:
        version = _version(served.system, served.backend, row["backend_version"])
        served = replace(served, version=version)
        is_own = _precision(served.model) == row["precision"]
        types = {"gemm": row["gemm_quant_mode"], "experts": row["moe_quant_mode"]}
        found = _of_types(row, replace(served, **types))
        if found.refused and is_own:
            found = replace(_of_types(row, served), types="checkpoint")
    except Refused as error:
        found = Prediction(version=served.version, refused=str(error))
    return replace(found, seconds=time.process_time() - begin)


def _of_types(row: Mapping[str, str], served: _Served) -> Prediction:
    """The prediction with these types of numbers, or why there is none."""
    try:
        ttft_ms, tpot_ms = _projected_ms(row, served)
    except (Refused, ValueError, RuntimeError, LookupError) as error:
        package = Path(_sdk("common").__file__).parents[1]
        reason = " ".join(str(error).split()).replace(f"{package}/", "")
        return Prediction(version=served.version, refused=reason or type(error).__name__)
    return Prediction(ttft_ms / 1e3, tpot_ms / 1e3, served.version)


def _projected_ms(row: Mapping[str, str], served: _Served) -> tuple[float, float]:
    """TTFT and TPOT.

    Raises:
        Refused: it does not fit, or there are no tables. The package raises its own errors too.
    """
    pools, requests = pools_of(row["split_layout"]), int(row["split_concurrency"])
    lengths = {"isl": int(row["isl"]), "osl": int(row["osl"])}
    if len(pools) == 1:
        batch = pools[0].requests_of_rank(requests)
        return _in_one_pool(served, pools[0], lengths, batch)
    prompts = int(row["prefill_batch_size"] or 1)
    return _in_two_pools(served, pools, lengths, (prompts, requests))


@cache
def _precision(model: str) -> str:
    """Of the experts' weights in the checkpoint: "fp4", "fp8" or "bf16"."""
    if model not in _sdk("common").DefaultHFModels:  # else it would be asked of the network
        raise Refused(f"no configuration of the model comes with the package: {model}")
    info = _sdk("models.helpers")._get_model_info(model)
    types = _sdk("models")._infer_quant_modes_from_raw_config(
        info["raw_config"], info["architecture"]
    )
    name = str(getattr(types.get("moe_quant_mode"), "name", ""))
    return next((each for each in ("fp4", "fp8") if each in name), "bf16")


@cache
def _version(system: str, backend: str, asked: str) -> str:
    """The version asked for where the package lets it be, or what it takes by default."""
    tables = _sdk("perf_database")
    if asked in (tables.get_version_slots(system, backend) or {}).values():
        return asked
    default = tables.get_latest_database_version(system=system, backend=backend)
    if default is None:
        raise Refused(f"no tables of {backend} on {system}")
    return str(default)


def pools_of(layout: str) -> list[Workers]:
    """One pool, or the one that prefills and the one that decodes.

    Args:
        layout: "tp=8,dp=1,ep=8"; or, of each of two pools, workers/tp/dp/ep, all in one.
    """
    if "=" in layout:
        sizes = {name: int(size) for name, size in (e.split("=") for e in layout.split(","))}
        return [Workers(1, sizes["tp"], sizes["dp"], sizes["ep"])]
    numbers = [int(each) for each in layout.split("/")]
    return [Workers(*numbers[:4]), Workers(*numbers[4:])]


def _in_one_pool(
    served: _Served, pool: Workers, lengths: Mapping[str, int], batch: int
) -> tuple[float, float]:
    """TTFT and TPOT in milliseconds, of prompts and generated tokens in the same steps.

    Args:
        batch: requests of a rank.
    """
    model, database = _model(served, pool, "agg")
    summary = _backend(served).run_agg(
        model,
        database,
        _sdk("config").RuntimeConfig(batch_size=batch, **lengths),
        ctx_tokens=lengths["isl"],
        decode_tokens_per_iteration=1.0,
    )
    # Keys and values beyond the room for them only warn here, as in its command.
    if summary.check_oom():
        raise Refused("out of memory: the pool")
    found = summary.get_result_dict()
    return float(found["ttft"]), float(found["tpot"])


def _in_two_pools(
    served: _Served,
    pools: Sequence[Workers],
    lengths: Mapping[str, int],
    batches: tuple[int, int],
) -> tuple[float, float]:
    """TTFT and TPOT in milliseconds.

    Args:
        batches: prompts that a rank prefills at once, and requests of the load.
    """
    prefill, decode = pools
    prompts, requests = batches
    ttft = _static(served, (prefill, "prefill"), lengths, prompts)["ttft"]
    tpot = _static(served, (decode, "decode"), lengths, decode.requests_of_rank(requests))["tpot"]
    return float(ttft) * _TTFT_SCALE, float(tpot)


def _static(
    served: _Served, part: tuple[Workers, Role], lengths: Mapping[str, int], batch: int
) -> dict[str, Any]:
    """What the package says of one worker of a pool, whose ranks have `batch` requests each."""
    workers, role = part
    model, database = _model(served, workers, role)
    summary = _backend(served).run_static(
        model,
        database,
        _sdk("config").RuntimeConfig(batch_size=batch, **lengths),
        mode="static_ctx" if role == "prefill" else "static_gen",
        latency_correction_scale=_PREFILL_SCALE if role == "prefill" else _DECODE_SCALE,
    )
    if summary.check_oom() or summary.check_kv_cache_oom():
        what = "a worker" if summary.check_oom() else "keys and values of a worker"
        raise Refused(f"out of memory: {what} for {role}")
    return dict(summary.get_summary_df().iloc[0])


@cache
def _model(served: _Served, workers: Workers, role: Role) -> tuple[Any, Any]:
    """The package's model of one worker, and its tables."""
    database = _database(served.system, served.backend, served.version)
    models = _sdk("models")
    devices = workers.tp * workers.dp
    if devices % workers.ep:
        raise Refused(f"{devices} devices of a worker cannot cut experts in {workers.ep}")
    config = _sdk("config_builders").build_model_config(
        workers.tp,
        1,
        workers.dp,
        devices // workers.ep,
        workers.ep,
        gemm_quant_mode=served.gemm or None,
        moe_quant_mode=served.experts or None,
    )
    if role != "agg":  # in one pool its command does not ask for it
        _choose_exchange(config, served, database, role)
    if role != "decode" and config.moe_comm_backend is None:
        models.resolve_context_fmha_by_data(
            config, served.model, database, served.backend, is_context_role=True
        )
    names = {"system_name": served.system, "backend_name": served.backend}
    models.resolve_dsv4_moe_arch(config, served.model, **names)
    models.resolve_nvfp4_for_system(config, model_path=served.model, **names)
    return models.get_model(served.model, config, served.backend), database


def _choose_exchange(config: Any, served: _Served, database: Any, role: Role) -> None:
    """Where expert parallelism spans nodes, the first all-to-all that tables have of the model.

    Raises:
        Refused: none has tables.
    """
    per_node = int(database.system_spec["node"]["num_gpus_per_node"])
    config.num_gpus_per_node = per_node
    if config.moe_ep_size <= per_node:
        return
    if config.moe_tp_size != 1:
        raise Refused("experts cut by tensor parallelism, over several nodes")
    helpers, models = _sdk("models.helpers"), _sdk("models")
    info = helpers._get_model_info(served.model)
    models._apply_model_quant_defaults(
        config, info["raw_config"], info["architecture"], served.backend
    )
    phase = "context" if role == "prefill" else "generation"
    chosen = _exchange(config, served, database, phase)
    if chosen is None:
        raise Refused(f"no tables of an all-to-all over nodes for {role}: EP{config.moe_ep_size}")
    config.moe_comm_backend = {phase: chosen}
    config.system = served.system
    if served.backend == "sglang" and info["architecture"] == "DeepseekV3ForCausalLM":
        common = _sdk("common")  # the types that its tables of this case are of
        config.fmha_quant_mode = common.FMHAQuantMode.fp8_block
        config.kvcache_quant_mode = common.KVCacheQuantMode.fp8


def _exchange(config: Any, served: _Served, database: Any, phase: str) -> str | None:
    """The name of an all-to-all, None if there is none."""
    blocks, known = _sdk("models.blocks.moe"), _sdk("operations.moe_comm")
    if _sdk("models").get_model_family(served.model) not in blocks.LARGE_EP_READY_FAMILIES:
        return None
    if served.backend == "trtllm" and config.attention_dp_size == 1:
        return None
    info = _sdk("models.helpers")._get_model_info(served.model)
    shape, types = blocks.MoEBlockShape.from_model_info(info), config.moe_quant_mode
    sizes = (shape.hidden_size, shape.moe_inter_size, shape.topk, shape.num_experts)
    computed = set(database.moe_expert_compute_coverage(*sizes, types, phase))
    if served.backend != "sglang":
        computed |= set(database.legacy_moe_compute_coverage(*sizes, types))
    if config.moe_ep_size not in computed:
        return None
    exchanged = database.moe_a2a_coverage(sizes[0], *sizes[2:], types, phase)
    ep, per_node = config.moe_ep_size, config.num_gpus_per_node
    of_one_node = (8 if served.backend == "sglang" else per_node, 1)  # DeepEP is scaled from it
    for name, kind in known.MOE_A2A_BACKENDS.items():
        pairs = exchanged.get(name, set())
        covered = (ep, known.nodes_for(ep, per_node)) in pairs
        covered |= name.removeprefix("trtllm_") in ("deepep_ht", "deepep_ll") and (
            of_one_node in pairs
        )
        if covered and served.backend in kind.frameworks and phase in kind.inference_phases:
            version = database.system_spec["gpu"].get("sm_version")
            if kind.feasible(
                topk=shape.topk,
                num_experts=shape.num_experts,
                moe_tp_size=1,
                moe_ep_size=ep,
                sm_version=version,
            ):
                return str(name)
    return None


@cache
def _database(system: str, backend: str, version: str) -> Any:
    found = _sdk("perf_database").get_database_view(
        system, backend, version, allow_missing_data=False, database_mode="SILICON"
    )
    if found is None:
        raise Refused(f"no tables of {backend} {version} on {system}")
    return found


def _backend(served: _Served) -> Any:
    """New for each row: it remembers answers by lengths and batch, and not by model."""
    return _sdk("backends.factory").get_backend(served.backend)


@cache
def _sdk(name: str) -> Any:
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
    return import_module(f"aiconfigurator_core.sdk.{name}")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the list."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def answers(rows: Sequence[Mapping[str, str]]) -> list[Prediction]:
    """[rows]; from the file where they are in it, what is new is added to it at once."""
    known: dict[str, Prediction] = {}
    if _ANSWERS.exists():
        for line in _ANSWERS.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            number = fields.pop("id")
            known[number] = Prediction(**fields)
    _ANSWERS.parent.mkdir(exist_ok=True)
    found = []
    with _ANSWERS.open("a", encoding="utf-8") as file:
        for place, row in enumerate(rows, 1):
            answer = known.get(row["id"])
            if answer is None:
                answer = predict(row)
                file.write(json.dumps({"id": row["id"], **asdict(answer)}) + "\n")
                file.flush()
                print(f"\r{place} of {len(rows)} rows ", end="", file=sys.stderr)
            found.append(answer)
    print(file=sys.stderr)
    return found
