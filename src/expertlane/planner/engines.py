"""Limits of each engine: one row for each thing that it cannot run, with its source.

Rows say how an engine is deployed, which is less than its parser takes: a server whose decode steps
would run without CUDA graphs is left out too. Versions are those whose source was read; rows of
TensorRT-LLM are by its documentation.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from itertools import chain
from math import ceil
from typing import Literal

from expertlane.cost.laws.profile import Profile
from expertlane.cost.memory import RANK_STEP_TOKENS
from expertlane.planner.candidates import Candidate, candidates_like
from expertlane.results.record import PoolRole
from expertlane.spec.deployment import DISPATCH_FORMS, DeepEPKernels, Deployment, Options
from expertlane.spec.from_hf import lacking_in_engine
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import EngineName, Phase
from expertlane.spec.workload import Load, Workload
from expertlane.version import __version__

DeviceKind = Literal["cuda", "cpu"]

_PHASES: dict[PoolRole, tuple[Phase, ...]] = {
    "both": (Phase.PREFILL, Phase.DECODE),
    "prefill": (Phase.PREFILL,),
    "decode": (Phase.DECODE,),
}
_MOST_NORMAL = 8 * 20  # ranks: DeepEP's NUM_MAX_NVL_PEERS × NUM_MAX_RDMA_PEERS


@dataclass(frozen=True)
class RolePool:
    """A deployment in its role: `both` where one server computes prompts and decodes."""

    candidate: Candidate
    model: ModelConfig
    role: PoolRole = "both"

    @property
    def layout(self) -> Layout:
        """The candidate's."""
        return self.candidate.layout

    def kernels(self, phase: Phase) -> DeepEPKernels | None:
        """DeepEP's kernels that come nearest; None without expert parallelism or DeepEP.

        Prompts have more tokens than low-latency kernels have buffers for.
        """
        form = self.candidate.options.of_phase(phase).dispatch
        assert form != "auto", "a candidate has one form for each phase"
        if self.layout.ep == 1:
            return None
        kernels = DISPATCH_FORMS[form].deepep
        return "normal" if kernels and phase is Phase.PREFILL else kernels

    @property
    def all_kernels(self) -> set[DeepEPKernels | None]:
        """DeepEP's kernels of all phases that it computes."""
        return {self.kernels(phase) for phase in _PHASES[self.role]}

    @property
    def uses_deepep(self) -> bool:
        """True if any phase that it computes is dispatched by DeepEP."""
        return self.all_kernels != {None}

    @property
    def slots_are_even(self) -> bool:
        """True if every rank of an ep group holds equally many experts, copies included."""
        copies = self.candidate.options.num_redundant_experts
        return (self.model.num_experts + copies) % self.layout.ep == 0

    @property
    def fills_its_pipeline(self) -> bool:
        """True if there are as many steps in flight as stages, each with other sequences."""
        options, pp = self.candidate.options, self.layout.pp
        if pp == 1:
            return options.num_micro_batches == 1
        return options.num_micro_batches == pp and options.micro_batch_schedule == "rotating"


@dataclass(frozen=True)
class Row:
    """A thing that an engine cannot run.

    Attributes:
        says: the engine's behaviour instead, after the word `it`.
        source: file or page, of the engine's version if nothing else is said.
        rules_out: true of a deployment that needs it: a pool, or those for prefill and decode.
    """

    says: str
    source: str
    rules_out: Callable[..., bool]


_NO_POOLS = Row("has no disaggregated pools", "expertlane/engine", lambda *_: True)


@dataclass(frozen=True)
class Router:
    """A router that spreads requests over an engine's servers.

    Attributes:
        package: its name in the Python package index.
        words: first words of its command.
        pools: its option for disaggregated pools.
    """

    package: str
    version: str
    words: tuple[str, ...]
    pools: str


@dataclass(frozen=True)
class ServingEngine:
    """An engine, and its limits.

    Attributes:
        title: its name as its makers write it.
        version: version whose source, or documentation, the rows are from.
        is_checked: whether the options of commands were tried on its argument parser.
        router: None where it has none for alike servers.
        pairs: of two pools side by side; None where it has no disaggregated pools.
        has_replicas: whether one server holds all replicas.
    """

    name: EngineName
    title: str
    version: str
    is_checked: bool
    rows: tuple[Row, ...]
    pairs: tuple[Row, ...] | None = ()
    router: Router | None = None
    has_replicas: bool = False

    def broken(
        self, candidate: Candidate, model: ModelConfig, role: PoolRole = "both"
    ) -> Row | None:
        """The first row that rules a deployment out; None where the engine runs it."""
        pool = RolePool(candidate, model, role)
        return next((row for row in self.rows if row.rules_out(pool)), None)

    def runs(self, candidate: Candidate, model: ModelConfig, role: PoolRole = "both") -> bool:
        """True if the engine runs a deployment."""
        if role != "both" and self.pairs is None:
            return False
        return self.broken(candidate, model, role) is None

    def runs_in_any_role(self, candidate: Candidate, model: ModelConfig) -> bool:
        """True if the engine runs a deployment as a server, or as a pool."""
        return any(self.runs(candidate, model, role) for role in _PHASES)

    def broken_by_pools(
        self, prefill: Candidate, decode: Candidate, model: ModelConfig
    ) -> Row | None:
        """The first row that rules disaggregated pools out; None where the engine runs both."""
        if self.pairs is None:
            return _NO_POOLS
        both = RolePool(prefill, model, "prefill"), RolePool(decode, model, "decode")
        of_each = (row for pool in both for row in self.rows if row.rules_out(pool))
        of_pair = (row for row in self.pairs if row.rules_out(*both))
        return next(chain(of_each, of_pair), None)

    def joins(self, prefill: Candidate, decode: Candidate, model: ModelConfig) -> bool:
        """True if the engine runs both as disaggregated pools, side by side."""
        return self.broken_by_pools(prefill, decode, model) is None


_DEEPEP = (
    Row(
        "dispatches by DeepEP, which needs equally many experts on each rank",
        "DeepEP, csrc/deep_ep.cpp: num_experts % num_ranks",
        lambda pool: pool.uses_deepep and not pool.slots_are_even,
    ),
    Row(
        f"dispatches by DeepEP, whose normal kernels reach {_MOST_NORMAL} ranks",
        "DeepEP, csrc/kernels/configs.cuh: NUM_MAX_NVL_PEERS, NUM_MAX_RDMA_PEERS",
        lambda pool: "normal" in pool.all_kernels and pool.layout.ep > _MOST_NORMAL,
    ),
)


def _needs_even_copies(pool: RolePool) -> bool:
    has_copies = pool.candidate.options.num_redundant_experts > 0
    return has_copies and (pool.layout.ep == 1 or not pool.slots_are_even)


VLLM = ServingEngine(
    "vllm",
    "vLLM",
    "0.33.0",
    True,
    (
        Row(
            "spreads experts over all dp × tp ranks of a stage, or shards each over them",
            "config/parallel.py: enable_expert_parallel",
            lambda pool: pool.layout.ep not in (1, pool.layout.stage_size),
        ),
        Row(
            "keeps as many batches in flight as it has stages",
            "config/vllm.py: max_concurrent_batches",
            lambda pool: not pool.fills_its_pipeline,
        ),
        Row(
            "has no all-to-all with one data-parallel rank: tp ranks hold all of its tokens",
            "config/parallel.py: use_all2all",
            lambda pool: pool.layout.dp == 1 and pool.uses_deepep,
        ),
        Row(
            "dispatches by all-gather where it computes prompts and decodes: DeepEP's low-latency "
            "kernels need buffers for all tokens of a step, its other kernels run no CUDA graphs",
            "model_executor/layers/fused_moe/all2all_utils.py: max_num_tokens_per_dp_rank; "
            "config/compilation.py: deepep_high_throughput",
            lambda pool: pool.role == "both" and pool.uses_deepep,
        ),
        Row(
            "runs no CUDA graphs with DeepEP's high-throughput kernels, and so no decode pool",
            "config/compilation.py: deepep_high_throughput",
            lambda pool: pool.role == "decode" and pool.kernels(Phase.DECODE) == "normal",
        ),
        Row(
            "overlaps two batches with DeepEP alone, without pipeline, drafts or dcp",
            "config/vllm.py: use_ubatching, _get_dbo_unsupported_features",
            lambda pool: (
                bool(pool.candidate.options.overlap)
                and (
                    not pool.uses_deepep
                    or pool.layout.pp > 1
                    or pool.layout.dcp > 1
                    or pool.candidate.num_drafts > 0
                )
            ),
        ),
        Row(
            "has redundant experts only where experts are spread, equally many on each rank",
            "model_executor/layers/fused_moe/layer.py: enable_eplb",
            _needs_even_copies,
        ),
        Row(
            "takes keys and values from a prefill pool without pipeline stages alone",
            "distributed/kv_transfer/kv_connector/v1/nixl/base_worker.py: pp_size",
            lambda pool: pool.role == "decode" and pool.layout.pp > 1,
        ),
        Row(
            "shares out positions by dcp where no layer has a state or a window",
            "v1/core/kv_cache_coordinator.py: HybridKVCacheCoordinator; "
            "v1/core/single_type_kv_cache_manager.py: dcp_world_size",
            lambda pool: (
                pool.layout.dcp > 1
                and (pool.model.state is not None or any(pool.model.sliding_window))
            ),
        ),
        Row(
            "transfers keys and values that all tp ranks share, or none; shared ones of MLA alone",
            "config/vllm.py: NixlConnector",
            lambda pool: (
                pool.role != "both"
                and pool.layout.dcp > 1
                and (pool.layout.dcp != pool.layout.tp or pool.model.latent is None)
            ),
        ),
        *_DEEPEP,
    ),
    (
        Row(
            "transfers keys and values where one pool's tp divides the other's",
            "distributed/kv_transfer/kv_connector/utils.py: tp_ratio",
            lambda prefill, decode: (
                max(prefill.layout.tp, decode.layout.tp) % min(prefill.layout.tp, decode.layout.tp)
                != 0
            ),
        ),
    ),
    Router("vllm-router", "0.1.17", ("vllm-router",), "--vllm-pd-disaggregation"),
)

SGLANG = ServingEngine(
    "sglang",
    "SGLang",
    "0.5.23",
    True,
    (
        Row(
            "spreads experts over all ranks of a stage where DeepEP dispatches",
            "srt/arg_groups/overrides.py: _a2a_ep_size",
            lambda pool: pool.uses_deepep and pool.layout.etp > 1,
        ),
        Row(
            "keeps as many micro-batches in flight as it has stages",
            "srt/managers/scheduler_pp_mixin.py: pp_loop_size",
            lambda pool: not pool.fills_its_pipeline,
        ),
        Row(
            "dispatches prompts and decodes both by DeepEP, or neither",
            "srt/arg_groups/fields/exec_.py: moe_a2a_backend, deepep_mode",
            lambda pool: (
                pool.role == "both"
                and len(pool.all_kernels - {None}) == 1
                and None in pool.all_kernels
            ),
        ),
        Row(
            "runs no CUDA graphs where DeepEP's normal kernels dispatch decodes",
            "srt/arg_groups/moe_hook.py: handle_a2a_moe",
            lambda pool: pool.role != "prefill" and pool.kernels(Phase.DECODE) == "normal",
        ),
        Row(
            "overlaps two batches with DeepEP alone, and not in a pipeline",
            "srt/arg_groups/validation_hook.py: check_two_batch_overlap; its issue 12427",
            lambda pool: (
                bool(pool.candidate.options.overlap)
                and (not pool.uses_deepep or pool.layout.pp > 1)
            ),
        ),
        Row(
            "spreads experts, and their copies, equally many on each rank",
            "srt/eplb/expert_location.py: num_physical_experts % ep_size",
            lambda pool: not pool.slots_are_even or _needs_even_copies(pool),
        ),
        Row(
            "drafts without a pipeline, or in prefill pools",
            "srt/arg_groups/validation_hook.py: check_pipeline_parallel_compat",
            lambda pool: (
                pool.role != "prefill" and pool.layout.pp > 1 and pool.candidate.num_drafts > 0
            ),
        ),
        *_DEEPEP,
    ),
    (
        Row(
            "transfers keys and values to as many stages as they come from, or to one",
            "srt/disaggregation/common/conn.py: pp_size",
            lambda prefill, decode: decode.layout.pp not in (1, prefill.layout.pp),
        ),
        Row(
            "shares out positions in a prefill pool only as its decode pool does",
            "srt/arg_groups/pd_disaggregation_hook.py: dcp_size",
            lambda prefill, decode: prefill.layout.dcp not in (1, decode.layout.dcp),
        ),
    ),
    Router(
        "sglang-router",
        "0.3.2",
        ("python", "-m", "sglang_router.launch_router"),
        "--pd-disaggregation",
    ),
)

TRTLLM = ServingEngine(
    "trtllm",
    "TensorRT-LLM",
    "1.2",
    False,
    (
        Row(
            "has attention that is tensor parallel, or data parallel over all ranks",
            "features/parallel-strategy: enable_attention_dp",
            lambda pool: pool.layout.dp > 1 and pool.layout.tp > 1,
        ),
        Row(
            "keeps as many micro-batches in flight as it has stages",
            "_torch/pyexecutor/py_executor.py: num_micro_batches",
            lambda pool: not pool.fills_its_pipeline,
        ),
        Row(
            "dispatches tokens where attention is data parallel; else every rank has them all",
            "features/parallel-strategy: mixture of experts",
            lambda pool: pool.layout.dp == 1 and pool.uses_deepep,
        ),
        Row(
            "has no two-batch overlap",
            "features/feature-combination-matrix",
            lambda pool: bool(pool.candidate.options.overlap),
        ),
        Row(
            "drafts without a pipeline",
            "features/feature-combination-matrix: speculative decoding, pipeline parallelism",
            lambda pool: pool.layout.pp > 1 and pool.candidate.num_drafts > 0,
        ),
        Row(
            "shares out positions (Helix) in decode pools on Blackwell with MLA, not yet here",
            "features/helix",
            lambda pool: pool.layout.dcp > 1,
        ),
        Row(
            "has redundant experts with data-parallel attention alone, equally many on each rank",
            "examples/wide_ep/ep_load_balancer: num_slots",
            lambda pool: (
                _needs_even_copies(pool)
                or (pool.candidate.options.num_redundant_experts > 0 and pool.layout.dp == 1)
            ),
        ),
    ),
)

EXPERTLANE = ServingEngine(
    "expertlane",
    "expertlane",
    __version__,
    True,
    (
        Row(
            "shares out no positions over tp ranks",
            "expertlane/spec/layout.py: dcp",
            lambda pool: pool.layout.dcp > 1,
        ),
        Row(
            "has no drafts",
            "expertlane/engine",
            lambda pool: pool.candidate.num_drafts > 0,
        ),
        Row(
            "does not run what the model mixes tokens by, or its layers",
            "expertlane/spec/from_hf.py: lacking_in_engine",
            lambda pool: lacking_in_engine(pool.model) is not None,
        ),
    ),
    None,
    has_replicas=True,
)

ENGINES: dict[EngineName, ServingEngine] = {
    each.name: each for each in (VLLM, SGLANG, TRTLLM, EXPERTLANE)
}
_WITHOUT_NVLINK = Row(
    "dispatches by kernels that need NVLink inside a node, which these cards lack",
    "DeepEP, README.md: requirements",
    lambda pool: pool.uses_deepep,
)


def engines_on(profile: Profile) -> Mapping[EngineName, ServingEngine]:
    """The engines' limits on a kind of device."""
    if profile.has_nvlink:
        return ENGINES
    return {
        name: each if each is EXPERTLANE else replace(each, rows=(*each.rows, _WITHOUT_NVLINK))
        for name, each in ENGINES.items()
    }


_OF_EXPERTLANE = (  # what experiments may ask for beyond plans
    Row(
        "rounds no weights to int8 with a scale for every 128 inputs",
        "expertlane/spec/deployment.py: weights",
        lambda pool: pool.candidate.options.weights == "int8",
    ),
    Row(
        "takes no file of placements, and moves experts only by its own balancer",
        "expertlane/spec/deployment.py: placement_file, rebalance_steps",
        lambda pool: bool(
            pool.candidate.options.placement_file or pool.candidate.options.rebalance_steps
        ),
    ),
)
_GATHERS_ON_CPU = Row(
    "dispatches by all-gather on CPUs",
    "vLLM, distributed/device_communicators/cpu_communicator.py; SGLang, srt/layers/moe: deepep",
    lambda pool: pool.uses_deepep,
)
_ON_CPU: Mapping[EngineName, tuple[Row, ...]] = {
    "vllm": (
        _GATHERS_ON_CPU,
        Row(
            "overlaps no two batches on CPUs",
            "platforms/cpu.py: enable_dbo",
            lambda pool: bool(pool.candidate.options.overlap),
        ),
    ),
    "sglang": (_GATHERS_ON_CPU,),
    "trtllm": (Row("runs on NVIDIA GPUs alone", "overview: support matrix", lambda _: True),),
    "expertlane": (),
}


def refusal(
    engine: ServingEngine, candidate: Candidate, model: ModelConfig, device: DeviceKind
) -> Row | None:
    """The first row that rules out an experiment's deployment; None where the engine runs it."""
    of_device = _ON_CPU[engine.name] if device == "cpu" else ()
    beyond = () if engine is EXPERTLANE else _OF_EXPERTLANE
    return replace(engine, rows=(*beyond, *of_device, *engine.rows)).broken(candidate, model)


LEAST_BUFFER = 128  # tokens of a rank in DeepEP's low-latency buffers
_HEADROOM = 1.5  # longest request that is accepted, over the mean length
_BLOCK = 256  # the longest request is rounded up to a multiple of these tokens


@dataclass(frozen=True)
class ServedPool(RolePool):
    """A pool of a plan, or a deployment of an experiment, with limits for its servers.

    Attributes:
        rank_seqs: most running sequences of a data-parallel rank.
        step_tokens: most tokens in a step of a data-parallel rank.
        devices_per_host: devices of a machine.
        rank_kv_tokens: tokens that a data-parallel rank's KV cache holds; None for the engine's own
            choice.
    """

    _: KW_ONLY
    rank_seqs: int
    step_tokens: int
    devices_per_host: int
    rank_kv_tokens: int | None = None

    @property
    def options(self) -> Options:
        """Options of the candidate."""
        return self.candidate.options

    @property
    def rank_tokens(self) -> int:
        """Most tokens in a step of a data-parallel rank; in a decode pool those of its decodes."""
        decodes = self.rank_seqs * (1 + self.candidate.num_drafts)
        return max(decodes, LEAST_BUFFER if self.role == "decode" else self.step_tokens)

    @property
    def num_hosts(self) -> int:
        """Number of machines that it needs."""
        return ceil(self.layout.world_size / self.devices_per_host)

    @property
    def per_host(self) -> int:
        """Number of such pools that fit on a machine."""
        return max(1, self.devices_per_host // self.layout.world_size)

    def servers(self, engine: ServingEngine) -> tuple["ServedPool", int]:
        """One server of the pool, and the number of servers: replicas may need one each."""
        if engine.has_replicas:
            return self, 1
        alone = replace(self.layout, replicas=1)
        return replace(self, candidate=self.candidate._replace(layout=alone)), self.layout.replicas


def deployed_pool(
    engine: ServingEngine,
    deployment: Deployment,
    model: ModelConfig,
    workload: Workload,
    devices_per_host: int,
    device: DeviceKind = "cuda",
    step_tokens: int = RANK_STEP_TOKENS,
    kv_tokens: int | None = None,
) -> ServedPool | Row:
    """An experiment's deployment as an engine serves it, with limits as in a plan.

    For other engines than expertlane, an option that is `auto` becomes the first choice that the
    engine has.

    Args:
        step_tokens: most tokens in a step of a data-parallel rank.
        kv_tokens: tokens that the KV caches of all data-parallel ranks hold together.

    Returns:
        The pool; or the row of the engine's limitations that rules the deployment out.
    """
    layout, num_seqs = deployment.layout, workload.num_sequences
    candidates = [Candidate(layout, deployment.options)]
    if engine is not EXPERTLANE:  # which chooses by itself
        candidates = candidates_like(layout, deployment.options, devices_per_host)
    found: Row | None = None
    for candidate in candidates:
        broken = refusal(engine, candidate, model, device)
        if broken is None:
            return ServedPool(
                candidate,
                model,
                rank_seqs=layout.places_of_rank(num_seqs, num_seqs),
                step_tokens=step_tokens,
                devices_per_host=devices_per_host,
                rank_kv_tokens=kv_tokens and ceil(kv_tokens / (layout.replicas * layout.dp)),
            )
        found = found or broken
    assert found is not None, "there is a candidate at least"
    return found


def longest_request(load: Load, model: ModelConfig) -> int:
    """Longest request, in tokens, that a server must accept.

    At least 1.5 times the mean, since a load that names one length may have longer requests.
    """
    mean = ceil(sum(load.mean_lens))
    longest = load.max_len + 1
    wanted = ceil(max(_HEADROOM * mean, longest) / _BLOCK) * _BLOCK
    return max(mean, min(wanted, model.max_position_embeddings))
