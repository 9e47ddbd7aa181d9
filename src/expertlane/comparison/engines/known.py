"""vLLM, SGLang, TensorRT-LLM and expertlane: started with the options that `plan` prints."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from expertlane.comparison.engines.engine import Asked, CannotServe, Engine, Start
from expertlane.planner.engines import ENGINES, Row
from expertlane.planner.server_start import deployed_pool, longest_request, server_start
from expertlane.spec.files import strict_json
from expertlane.spec.names import EngineName


class _Planned(Engine):
    """An engine that the planner knows."""

    name: ClassVar[EngineName]

    def start(self, asked: Asked) -> Start:
        """How its server is started.

        Raises:
            CannotServe: it does not run the deployment, or needs more devices than there are.
        """
        engine, place, workload = ENGINES[self.name], asked.place, asked.workload
        size = asked.deployment.layout.world_size
        if place.kind == "cuda" and size > asked.num_devices:
            raise CannotServe(f"needs {size} GPUs; this machine has {asked.num_devices}")
        # Ranks on CPUs share cores, so any number runs on one machine.
        devices_per_host = max(size, asked.num_devices)
        pool = deployed_pool(
            engine, asked.deployment, asked.model, workload, devices_per_host, place.kind
        )
        if isinstance(pool, Row):
            raise CannotServe(f"{self.title} {pool.says} ({pool.source})")
        one, num_servers = pool.servers(engine)
        if num_servers > 1:
            raise CannotServe(f"{num_servers} replicas need a router; give each its --url")
        max_len = longest_request(workload.load, asked.model)
        found = server_start(engine, one, asked.served, asked.types, max_len, place)
        (node,) = found.nodes
        return Start((*node.argv, *asked.arguments), node.environment, found.files)


class Vllm(_Planned):
    """vLLM: `vllm serve`."""

    name = "vllm"
    title = "vLLM"
    rank_title = (  # vllm/v1/executor/multiproc_executor.py, vllm/v1/engine/core.py
        r"VLLM::(?:Worker|EngineCore)(?:_DP(?P<dp>\d+))?(?:_PP(?P<pp>\d+))?(?:_PCP\d+)?"
        r"(?:_TP(?P<tp>\d+))?"
    )

    def profiled(self, start: Start, folder: Path) -> Start:
        """With vLLM's torch profiler in its ranks; without stacks, which slow it several times."""
        config: dict[str, object] = {"profiler": "torch", "torch_profiler_dir": str(folder)}
        config |= {"torch_profiler_with_stack": False, "ignore_frontend": True}
        return replace(start, argv=(*start.argv, "--profiler-config", strict_json(config)))


class Sglang(_Planned):
    """SGLang: `sglang.launch_server`."""

    name = "sglang"
    title = "SGLang"
    rank_title = (  # python/sglang/srt/managers/scheduler.py
        r"sglang::scheduler(?:_DP(?P<dp>\d+))?(?:_PP(?P<pp>\d+))?(?:_TP(?P<in_stage>\d+))?"
    )

    def profiled(self, start: Start, folder: Path) -> Start:
        """As it is: the request says where traces go."""
        return start

    def profile_request(self, folder: Path) -> Mapping[str, object]:
        """With the folder, without stacks."""
        return {"output_dir": str(folder), "with_stack": False, "activities": ["CPU", "GPU"]}


class Trtllm(_Planned):
    """TensorRT-LLM: `trtllm-serve`."""

    name = "trtllm"
    title = "TensorRT-LLM"


class Expertlane(_Planned):
    """expertlane: `expertlane serve`."""

    name = "expertlane"
    title = "expertlane"
    rank_title = r"expertlane r(?P<rank>\d+)"
