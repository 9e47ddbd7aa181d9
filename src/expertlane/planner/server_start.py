"""The command line, environment and files that start an engine's server, for each of its nodes.

`plan` prints these commands, and `compare` starts them. Options and their choices were checked
against the argument parsers of the versions in `ENGINES` (`tests/planner/test_commands.py`); those
of TensorRT-LLM follow its documentation (nvidia.github.io/TensorRT-LLM). Options that a command
does not name have the engine's default. Prefix caching is on in all engines by default, except in
SGLang's decode pools.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import PurePath

from expertlane.cost.memory import FREE_SHARE, kept_bytes
from expertlane.cost.step.operation import NumberTypes
from expertlane.planner.engines import LEAST_BUFFER, DeviceKind, ServedPool, ServingEngine
from expertlane.spec.engine_config import EngineConfig
from expertlane.spec.files import strict_json
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout, partition
from expertlane.spec.names import EngineName

PORT = 8000  # of the first server on a host
_RENDEZVOUS_PORT = 29500
_VLLM_RPC_PORT = 29550  # vLLM's default for data-parallel ranks
_VLLM_NIXL_PORT = 5600  # vLLM's default for the first data-parallel rank of a pool
BOOTSTRAP_PORT = 8998  # SGLang's default for prefill servers
_SGLANG_PORTS = 16  # ports after the rendezvous port that SGLang's data-parallel attention uses
_ANY = "0.0.0.0"  # all interfaces
_VLLM_CAPTURED = 512  # vLLM's default for the largest batch of a CUDA graph
_VLLM_CPU_BLOCK, _VLLM_GPU_BLOCK = 128, 16  # tokens of a KV cache block of vLLM
_OWN_BLOCK = EngineConfig().block_size
_MOST_BUFFER = 1024  # tokens of a rank in DeepEP's low-latency buffers


@dataclass(frozen=True)
class ServeTarget:
    """The model that an engine loads.

    Attributes:
        model: a hub id or a folder.
        quantization: quantisation of the stored weights; None if they are not quantised.
    """

    model: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Place:
    """Hosts, ports and devices of a server.

    Attributes:
        hosts: host of each of its nodes; the first one has the HTTP API.
        port: port of the HTTP API.
        listens: address that the HTTP API is bound to.
        offset: number of servers before it on the machine; its other ports are shifted by it.
        devices: indices of its devices on each machine; empty for all visible ones.
        kind: kind of these devices.
        cores: on CPUs, cores to divide among its ranks; empty for the engine's own choice.
        python: Python of the engine's environment; None for commands on the PATH.
        caches_prefixes: False to turn prefix caching off.
    """

    hosts: tuple[str, ...]
    port: int = PORT
    listens: str = _ANY
    offset: int = 0
    devices: tuple[int, ...] = ()
    kind: DeviceKind = "cuda"
    cores: tuple[int, ...] = ()
    python: str | None = None
    caches_prefixes: bool = True

    @property
    def rendezvous_port(self) -> int:
        """Port of the rendezvous of its nodes; SGLang uses the `_SGLANG_PORTS` after it too."""
        return _RENDEZVOUS_PORT + _SGLANG_PORTS * self.offset

    @property
    def bootstrap_port(self) -> int:
        """Port at which decode servers reach an SGLang prefill server."""
        return BOOTSTRAP_PORT + self.offset

    @property
    def url(self) -> str:
        """Base URL of the HTTP API."""
        return f"http://{self.hosts[0]}:{self.port}"


@dataclass(frozen=True)
class NodeStart:
    """The command of one node: program and arguments, and environment variables to add."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class ServerStart:
    """The commands that start one server.

    Attributes:
        nodes: the command of each machine; a single one if MPI starts `num_tasks` of it.
        files: texts by name, to write into the working directory of each node first.
        num_tasks: processes that MPI must start over all machines; 0 for one on each node.
        notes: differences from the deployment, and steps that are left to the user.
    """

    engine: ServingEngine
    pool: ServedPool
    place: Place
    nodes: tuple[NodeStart, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    num_tasks: int = 0
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """Each node's shell command, which also writes the files."""
        launcher = ["mpirun", "-n", str(self.num_tasks)] if self.num_tasks else []
        return tuple(
            shell_line(self.files, [*_assigned(node), *launcher, *node.argv]) for node in self.nodes
        )


def _assigned(node: NodeStart) -> list[str]:
    return [f"{name}={value}" for name, value in node.environment.items()]


def shell_line(files: Mapping[str, str], words: Sequence[str]) -> str:
    """A shell command that writes the files, then runs the words."""
    written = [f"echo {shlex.quote(text)} > {name}" for name, text in files.items()]
    return " && ".join([*written, shlex.join(words)])


def server_start(
    engine: ServingEngine,
    pool: ServedPool,
    served: ServeTarget,
    types: NumberTypes,
    max_len: int,
    place: Place,
) -> ServerStart:
    """The commands that start one server at its place.

    Args:
        pool: one server, from `ServedPool.servers`.
        max_len: tokens of the longest request.
    """
    draft = _WRITERS[engine.name](_ServerSpec(pool, served, types, max_len, place))
    draft.notes += _weight_notes(served, types, engine)
    nodes = range(1 if draft.num_tasks else len(place.hosts))
    return ServerStart(
        engine,
        pool,
        place,
        tuple(draft.node(node, place) for node in nodes),
        draft.files,
        draft.num_tasks,
        tuple(draft.notes),
    )


@dataclass(frozen=True)
class _ServerSpec:
    """A server, its model, and where it is started.

    Attributes:
        max_len: tokens of the longest request.
    """

    pool: ServedPool
    served: ServeTarget
    types: NumberTypes
    max_len: int
    place: Place

    @property
    def layout(self) -> Layout:
        """Layout of the server."""
        return self.pool.layout

    @property
    def num_hosts(self) -> int:
        """Number of machines of the server."""
        return len(self.place.hosts)

    @property
    def on_cpu(self) -> bool:
        """True if its ranks run on CPUs."""
        return self.place.kind == "cpu"

    def module(self, program: str, name: str, *words: str) -> list[str]:
        """A command: a program on the PATH, or its module by the engine's Python."""
        python = self.place.python
        return [program, *words] if python is None else [python, "-m", name, *words]


@dataclass
class _Draft:
    """A `ServerStart` under construction.

    Attributes:
        words: program and arguments that all nodes share.
        on_node: gives further arguments of a node, by its number.
        environment: gives environment variables of a node, by its number.
        num_tasks, files, notes: as in `ServerStart`.
    """

    words: list[str]
    on_node: Callable[[int], Sequence[object]] = lambda _: ()
    environment: Callable[[int], Mapping[str, object]] = lambda _: {}
    num_tasks: int = 0
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, *words: object) -> None:
        self.words += map(str, words)

    def add_sizes(self, sizes: Mapping[str, int]) -> None:
        """Add the options whose size is not 1."""
        for name, size in sizes.items():
            if size > 1:
                self.add(name, size)

    def node(self, node: int, place: Place) -> NodeStart:
        """The command of one node."""
        variables = {name: str(value) for name, value in self.environment(node).items()}
        if place.devices:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, place.devices))
        return NodeStart((*self.words, *map(str, self.on_node(node))), variables)


def _bound_cores(asked: _ServerSpec) -> str | None:
    """The cores of each rank, as vLLM and SGLang take them; None if ranks outnumber cores."""
    num_ranks, cores = asked.layout.world_size, asked.place.cores
    if len(cores) < num_ranks:
        return None
    parts = partition(len(cores), num_ranks)
    return "|".join(",".join(str(cores[place]) for place in part) for part in parts)


def _vllm(asked: _ServerSpec) -> _Draft:
    pool, layout, place = asked.pool, asked.layout, asked.place
    server = ["vllm", "serve", asked.served.model]
    if place.python is not None:  # the command asks for the package's metadata; builds may lack it
        module = "vllm.entrypoints.openai.api_server"
        server = [place.python, "-m", module, "--model", asked.served.model]
    draft = _Draft([*server, "--tensor-parallel-size", str(layout.tp)])
    draft.add_sizes(
        {
            "--data-parallel-size": layout.dp,
            "--pipeline-parallel-size": layout.pp,
            "--decode-context-parallel-size": layout.dcp,
        }
    )
    if layout.ep > 1:
        _vllm_experts(draft, pool)
    if num_drafts := pool.candidate.num_drafts:
        config = strict_json({"method": "mtp", "num_speculative_tokens": num_drafts})
        draft.add("--speculative-config", config)
    if pool.role != "both":
        kv_role = "kv_producer" if pool.role == "prefill" else "kv_consumer"
        config = strict_json({"kv_connector": "NixlConnector", "kv_role": kv_role})
        draft.add("--kv-transfer-config", config)
        draft.environment = partial(_vllm_side_channel, asked)
    if pool.role != "prefill":
        draft.add("--max-num-seqs", pool.rank_seqs)
        captured = pool.rank_seqs * (1 + pool.candidate.num_drafts)
        if captured > _VLLM_CAPTURED and not asked.on_cpu:
            draft.add("--max-cudagraph-capture-size", captured)
    draft.add("--max-num-batched-tokens", pool.rank_tokens, "--max-model-len", asked.max_len)
    if asked.on_cpu:
        _vllm_on_cpu(draft, asked)
    else:
        draft.add("--gpu-memory-utilization", FREE_SHARE)
        if pool.rank_kv_tokens is not None:
            num_blocks = ceil(pool.rank_kv_tokens / _VLLM_GPU_BLOCK)
            _vllm_cache(draft, asked, num_blocks, _VLLM_GPU_BLOCK)
    draft.add(*_weights(asked))
    if asked.types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8")
    if pool.options.cuda_graphs is False:
        draft.add("--enforce-eager")
    if not place.caches_prefixes:
        draft.add("--no-enable-prefix-caching")
    if place.listens != _ANY:  # its default
        draft.add("--host", place.listens)
    draft.add("--port", place.port)
    if place.offset and layout.dp > 1:
        draft.add("--data-parallel-rpc-port", _VLLM_RPC_PORT + place.offset)
    if asked.num_hosts > 1:
        draft.add("--nnodes", asked.num_hosts, "--master-addr", place.hosts[0])
        draft.on_node = lambda node: ("--node-rank", node, *(["--headless"] if node else []))
    return draft


def _vllm_side_channel(asked: _ServerSpec, node: int) -> dict[str, object]:
    """Host and port of a node's NIXL side channel, which hands over KV caches between pools."""
    place = asked.place
    found: dict[str, object] = {"VLLM_NIXL_SIDE_CHANNEL_HOST": place.hosts[node]}
    if place.offset:
        port = _VLLM_NIXL_PORT + place.offset * asked.layout.dp
        found["VLLM_NIXL_SIDE_CHANNEL_PORT"] = port
    return found


def _vllm_on_cpu(draft: _Draft, asked: _ServerSpec) -> None:
    """Set vLLM's KV cache size, for all running sequences by default, and each rank's cores."""
    pool = asked.pool
    num_blocks = pool.rank_seqs * ceil(asked.max_len / _VLLM_CPU_BLOCK)
    if pool.rank_kv_tokens is not None:
        num_blocks = ceil(pool.rank_kv_tokens / _VLLM_CPU_BLOCK)
    _vllm_cache(draft, asked, num_blocks, _VLLM_CPU_BLOCK)
    if asked.place.cores:
        cores, inherited = _bound_cores(asked), draft.environment
        bound = {"VLLM_CPU_OMP_THREADS_BIND": cores or "nobind"}
        if cores is None:
            bound["OMP_NUM_THREADS"] = "1"
        draft.environment = lambda node: {**inherited(node), **bound}


def _vllm_cache(draft: _Draft, asked: _ServerSpec, num_blocks: int, block_size: int) -> None:
    """Set the bytes of a rank's KV cache; blocks in tokens would depend on the attention kernels.

    One more block is vLLM's own, the null block.
    """
    pool, layout = asked.pool, asked.layout
    layers = layout.layers_of_stage(pool.model.num_hidden_layers, 0)
    kept = kept_bytes(pool.model, asked.types, layout.tp, layers)
    of_positions = ceil((num_blocks + 1) * block_size * kept.position)
    num_bytes = of_positions + pool.rank_seqs * kept.sequence
    draft.add("--kv-cache-memory-bytes", num_bytes)


_VLLM_BACKENDS = {
    "low_latency": "deepep_low_latency",
    "normal": "deepep_high_throughput",
    None: "allgather_reducescatter",
}


def _vllm_experts(draft: _Draft, pool: ServedPool) -> None:
    """Add options of expert parallelism; one all-to-all backend serves all phases of the pool."""
    (kernels,) = pool.all_kernels
    draft.add("--enable-expert-parallel", "--all2all-backend", _VLLM_BACKENDS[kernels])
    if num_redundant := pool.options.num_redundant_experts:
        config = strict_json({"num_redundant_experts": num_redundant})
        draft.add("--enable-eplb", "--eplb-config", config)
        draft.notes.append("it takes copies of an expert in turns, not the nearest")
    if pool.options.overlap:
        draft.add("--enable-dbo")


def _weights(asked: _ServerSpec) -> list[str]:
    """Options for the weights' type: vLLM and SGLang quantise to float8 when they load."""
    types, stored = asked.types, asked.served.quantization
    if types.weights == types.kept:
        return ["--dtype", types.weights]
    return ["--quantization", "fp8"] if types.weights == "float8" and not stored else []


def _weight_notes(served: ServeTarget, types: NumberTypes, engine: ServingEngine) -> list[str]:
    stored = served.quantization
    as_stored = {"nvfp4", "mxfp4", "int4"}
    if engine.name not in ("vllm", "sglang"):
        as_stored.add("float8")
    if stored is None and types.weights in as_stored:
        return [f"it needs a checkpoint quantised to {types.weights}"]
    if stored is None or stored.number_type == types.weights:
        return []
    return [f"it serves the stored {stored.method} weights, not {types.weights}"]


def _sglang(asked: _ServerSpec) -> _Draft:
    pool, layout, num_drafts = asked.pool, asked.layout, asked.pool.candidate.num_drafts
    place = asked.place
    server = [place.python or "python", "-m", "sglang.launch_server"]
    draft = _Draft([*server, "--model-path", asked.served.model])
    draft.add("--tp-size", layout.stage_size)  # its tp is all ranks; attention's is tp / dp
    draft.add_sizes(
        {
            "--attn-dp-size": layout.dp,
            "--pp-size": layout.pp,
            "--dcp-size": layout.dcp,
            "--ep-size": layout.ep,
        }
    )
    if layout.ep > 1:
        _sglang_experts(draft, pool)
    if num_drafts:
        draft.add("--speculative-algorithm", "NEXTN", "--speculative-num-steps", num_drafts)
        draft.add("--speculative-eagle-topk", 1)
        draft.add("--speculative-num-draft-tokens", 1 + num_drafts)
    if pool.role != "both":
        draft.add("--disaggregation-mode", pool.role)
        draft.notes.append("--disaggregation-ib-device names the network cards, where it must")
    if pool.role == "prefill":
        draft.add("--disaggregation-bootstrap-port", place.bootstrap_port)
    else:
        draft.add("--max-running-requests", pool.rank_seqs * layout.dp)  # of all dp ranks
        if not asked.on_cpu:
            draft.add("--cuda-graph-max-bs-decode", ceil(pool.rank_seqs / layout.pp))
    if pool.role != "decode":
        draft.add("--chunked-prefill-size", pool.rank_tokens * layout.dp)  # of all dp ranks
    draft.add("--context-length", asked.max_len)
    if pool.rank_kv_tokens is not None:
        draft.add("--max-total-tokens", pool.rank_kv_tokens)  # of each dp rank
    draft.add(*_weights(asked))
    if asked.types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8_e4m3")
    if pool.options.cuda_graphs is False and not asked.on_cpu:
        draft.add("--disable-cuda-graph")
    if not place.caches_prefixes:
        draft.add("--disable-radix-cache")
    if asked.on_cpu:
        draft.add("--device", "cpu")
        if (cores := _bound_cores(asked)) is not None:
            draft.environment = lambda _: {"SGLANG_CPU_OMP_THREADS_BIND": cores}
    draft.add("--host", place.listens, "--port", place.port)
    if asked.num_hosts > 1:
        draft.add("--nnodes", asked.num_hosts)
        draft.on_node = lambda node: ("--node-rank", node)
    if asked.num_hosts > 1 or (place.offset and layout.dp > 1):
        draft.add("--dist-init-addr", f"{place.hosts[0]}:{place.rendezvous_port}")
    return draft


def _sglang_experts(draft: _Draft, pool: ServedPool) -> None:
    """DeepEP's mode may differ by phase: `auto` is normal in prefill, low latency in decode."""
    layout, kernels = pool.layout, pool.all_kernels
    if kernels != {None}:
        mode = "auto" if len(kernels) > 1 else next(iter(kernels))
        draft.add("--moe-a2a-backend", "deepep", "--deepep-mode", mode)
    if "low_latency" in kernels:
        decodes = ceil(pool.rank_seqs * (1 + pool.candidate.num_drafts) / layout.tp)
        buffer = ceil(decodes / LEAST_BUFFER) * LEAST_BUFFER
        variable = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
        draft.environment = lambda _: {variable: min(buffer, _MOST_BUFFER)}
        if buffer > _MOST_BUFFER:
            draft.notes.append(
                f"DeepEP's low-latency kernels take {_MOST_BUFFER:,} tokens of a rank, a step has "
                f"{decodes:,}"
            )
    if num_redundant := pool.options.num_redundant_experts:
        draft.add("--ep-num-redundant-experts", num_redundant, "--enable-eplb")
    if pool.options.overlap:
        draft.add("--enable-two-batch-overlap")
        draft.notes.append(
            "its two-batch overlap is written for DeepSeek-V2/V3, Qwen3-MoE and MiMo-V2"
        )


def _trtllm(asked: _ServerSpec) -> _Draft:
    pool, layout, types, place = asked.pool, asked.layout, asked.types, asked.place
    config: dict[str, object] = {
        "tensor_parallel_size": layout.stage_size,
        "moe_expert_parallel_size": layout.ep,
        "moe_tensor_parallel_size": layout.etp,
        "pipeline_parallel_size": layout.pp,
        "enable_attention_dp": layout.dp > 1,
        "max_num_tokens": pool.rank_tokens,
        "max_seq_len": asked.max_len,
    }
    kv_cache: dict[str, object] = {"free_gpu_memory_fraction": FREE_SHARE}
    if pool.rank_kv_tokens is not None:
        kv_cache["max_tokens"] = pool.rank_kv_tokens  # the smaller of the two counts
    if types.kv == "float8":
        kv_cache["dtype"] = "fp8"
    if not place.caches_prefixes:
        kv_cache["enable_block_reuse"] = False
    config["kv_cache_config"] = kv_cache
    if pool.role != "prefill":
        config["max_batch_size"] = pool.rank_seqs
        if pool.options.cuda_graphs is not False:
            config["cuda_graph_config"] = {"max_batch_size": pool.rank_seqs, "enable_padding": True}
    if num_drafts := pool.candidate.num_drafts:
        config["speculative_config"] = {"decoding_type": "MTP", "max_draft_len": num_drafts}
    if pool.role != "both":
        config["cache_transceiver_config"] = {
            "backend": "DEFAULT",
            "max_tokens_in_buffer": asked.max_len,
        }
    if pool.role == "prefill":
        config["disable_overlap_scheduler"] = True
    program = "trtllm-serve"
    if place.python is not None:
        program = str(PurePath(place.python).with_name(program))
    draft = _Draft([program, asked.served.model, "--config", "trtllm.yaml"])
    draft.add("--host", place.listens, "--port", place.port)
    if num_redundant := pool.options.num_redundant_experts:
        slots = {
            "num_slots": pool.model.num_experts + num_redundant,
            "layer_updates_per_iter": 2,
        }
        draft.files["moe_load_balancer.yaml"] = strict_json(slots)
        config["moe_config"] = {"backend": "WIDEEP", "load_balancer": "moe_load_balancer.yaml"}
    draft.files["trtllm.yaml"] = strict_json(config)  # JSON is YAML too
    if asked.num_hosts > 1:
        launcher = str(PurePath(program).with_name("trtllm-llmapi-launch"))
        draft.words, draft.num_tasks = [launcher, *draft.words], layout.world_size
        draft.notes.append(f"once, over {asked.num_hosts} hosts; under Slurm srun for mpirun")
    if layout.ep > 1:
        draft.notes.append("it chooses how to dispatch by itself")
    return draft


_OVERLAP = {True: "on", False: "off", "auto": "auto"}


def _expertlane(asked: _ServerSpec) -> _Draft:
    pool, options, types, place = asked.pool, asked.pool.options, asked.types, asked.place
    draft = _Draft(["serve", asked.served.model, "--layout", str(asked.layout)])
    given = {
        "--overlap": (_OVERLAP[options.overlap], "off"),
        "--num-micro-batches": (options.num_micro_batches, 1),
        "--micro-batch-schedule": (options.micro_batch_schedule, "drained"),
        "--dispatch": (options.dispatch, "all_to_all"),
        "--prefill-dispatch": (options.prefill_dispatch, None),
        "--payload": (options.payload, "model"),
        "--num-redundant-experts": (options.num_redundant_experts, 0),
        "--placement": (options.placement_file or "linear", "linear"),
        "--rebalance-steps": (options.rebalance_steps, 0),
    }
    for name, (value, default) in given.items():
        if value != default:
            draft.add(name, value)
    draft.add("--max-num-seqs", pool.rank_seqs, "--max-num-batched-tokens", pool.rank_tokens)
    draft.add("--max-model-len", asked.max_len)
    if pool.rank_kv_tokens is not None:
        draft.add("--num-blocks", ceil(pool.rank_kv_tokens / _OWN_BLOCK))
    if types.weights == types.kept:
        draft.add("--dtype", types.weights)
    elif types.weights == "float8" and asked.served.quantization is not None:
        draft.add("--activations", "float8")
    elif options.weights == "int8":
        draft.add("--weights", "int8")
    if types.kv == "float8":
        draft.add("--kv-dtype", "float8")
    if options.cuda_graphs is False:
        draft.add("--cuda-graphs", "off")
    if not place.caches_prefixes:
        draft.add("--no-prefix-caching")
    draft.add("--host", place.listens, "--port", place.port)
    if asked.num_hosts == 1:
        draft.words = asked.module("expertlane", "expertlane", *draft.words)
        return draft
    words = draft.words
    draft.words = asked.module("torchrun", "torch.distributed.run")
    draft.add("--nnodes", asked.num_hosts, "--nproc-per-node", 1)
    draft.add("--master-addr", place.hosts[0], "--master-port", place.rendezvous_port)
    draft.on_node = lambda node: ("--node-rank", node, "-m", "expertlane", *words)
    return draft


_WRITERS: dict[EngineName, Callable[[_ServerSpec], _Draft]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": _trtllm,
    "expertlane": _expertlane,
}
