"""vLLM, SGLang, TensorRT-LLM and expertlane: started with the options that `plan` prints."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from expertlane.comparison.engines.engine import CannotServe, Engine, LaunchCommand, LaunchRequest
from expertlane.planner.commands import Serving
from expertlane.planner.engines import ENGINES, Row, ServedPool, deployed_pool, longest_request
from expertlane.planner.scripts import scripts_of
from expertlane.planner.server_start import Place, server_start
from expertlane.spec.names import EngineName


class _PlannerEngine(Engine):
    """An engine whose options the planner writes."""

    name: ClassVar[EngineName]
    takes_kv_tokens: ClassVar[bool] = True

    def start(self, request: LaunchRequest) -> LaunchCommand:
        """The command that starts a server of a deployment.

        Raises:
            CannotServe: the engine cannot run the deployment, or it needs more GPUs than there are.
        """
        engine, place, workload = ENGINES[self.name], request.place, request.workload
        size = request.deployment.layout.world_size
        if place.kind == "cuda" and size > request.num_devices:
            raise CannotServe(
                f"needs {size} GPUs; this machine has {request.num_devices}: for several, "
                "--dry-run --scripts DIR writes what starts it, and --url NAME=URL measures it"
            )
        # Ranks on CPUs share cores, so any number runs on one machine.
        pool = self._pool(request, max(size, request.num_devices))
        one, num_servers = pool.servers(engine)
        if num_servers > 1:
            raise CannotServe(
                f"its {num_servers} replicas are {num_servers} servers behind a router; compare "
                "starts one. --dry-run --scripts DIR writes what starts them all, and --url "
                "NAME=URL measures the router; or measure one replica"
            )
        max_len = longest_request(workload.load, request.model)
        if one.rank_kv_tokens is not None and one.rank_kv_tokens < max_len:
            raise CannotServe(
                f"--kv-tokens {request.kv_tokens}: each data-parallel rank has "
                f"{one.rank_kv_tokens:,}, and must take a request of {max_len:,}"
            )
        found = server_start(engine, one, request.served, request.types, max_len, place)
        (node,) = found.nodes
        return LaunchCommand((*node.argv, *request.arguments), node.environment, found.files)

    def scripts(self, request: LaunchRequest) -> Mapping[str, str]:
        """A batch script for Slurm, and a Kubernetes manifest unless MPI must start the ranks.

        Raises:
            CannotServe: the engine cannot run the deployment.
        """
        pool = self._pool(replace(request, place=Place(())), request.num_devices)
        max_len = longest_request(request.workload.load, request.model)
        engine = ENGINES[self.name]
        return scripts_of(Serving(engine, [pool], request.served, request.types, max_len))

    def _pool(self, request: LaunchRequest, devices_per_host: int) -> ServedPool:
        kind = request.place.kind
        pool = deployed_pool(
            *(ENGINES[self.name], request.deployment, request.model, request.workload),
            devices_per_host,
            kind,
            kv_tokens=request.kv_tokens,
        )
        if isinstance(pool, Row):
            raise CannotServe(f"{self.title} {pool.says} ({pool.source})")
        return pool


class Vllm(_PlannerEngine):
    """vLLM: `vllm serve`."""

    name = "vllm"
    title = "vLLM"
    rank_title = (  # vllm/v1/executor/multiproc_executor.py, vllm/v1/engine/core.py
        r"VLLM::(?:Worker|EngineCore)(?:_DP(?P<dp>\d+))?(?:_PP(?P<pp>\d+))?(?:_PCP\d+)?"
        r"(?:_TP(?P<tp>\d+))?"
    )


class Sglang(_PlannerEngine):
    """SGLang: `sglang.launch_server`."""

    name = "sglang"
    title = "SGLang"
    rank_title = (  # python/sglang/srt/managers/scheduler.py
        r"sglang::scheduler(?:_DP(?P<dp>\d+))?(?:_PP(?P<pp>\d+))?(?:_ATTN_CP\d+)?(?:_MOE_DP\d+)?"
        r"(?:_TP(?P<in_stage>\d+))?"
    )


class Trtllm(_PlannerEngine):
    """TensorRT-LLM: `trtllm-serve`."""

    name = "trtllm"
    title = "TensorRT-LLM"


class Expertlane(_PlannerEngine):
    """expertlane: `expertlane serve`."""

    name = "expertlane"
    title = "expertlane"
    rank_title = r"expertlane r(?P<rank>\d+)"
