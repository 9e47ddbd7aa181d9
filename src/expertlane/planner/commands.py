"""A deployment as an engine takes it: a command for each node, and the router before servers.

Options and their choices were checked against the argument parsers of the versions in `ENGINES`
(`tests/planner/test_commands.py`); TensorRT-LLM's are as documented
(nvidia.github.io/TensorRT-LLM).
What a command does not name, as the share of memory for keys and values, is the engine's default;
all cache prefixes unless told not to, but for SGLang's decode pools, which share none here either.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from math import ceil

from expertlane.cost.memory import FREE_SHARE
from expertlane.cost.step.operation import NumberTypes
from expertlane.planner.engines import RolePool, ServingEngine
from expertlane.results.results import ServeCommand, ServeRole
from expertlane.spec.deployment import Options
from expertlane.spec.files import strict_json
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import EngineName
from expertlane.spec.workload import Load

_PORT = 8000  # of the first server on a host
_ROUTER_PORT = 8080
_RENDEZVOUS_PORT = 29500
_BOOTSTRAP_PORT = 8998  # SGLang's default, of prefill servers
_HEADROOM = 1.5  # tokens of a request to accept, over the mean
_BLOCK = 256  # tokens, to which a longest request is rounded up
_VLLM_CAPTURED = 512  # sequences that CUDA graphs are recorded for at most, if nothing is said
_LEAST_BUFFER, _MOST_BUFFER = 128, 1024  # tokens of a rank in DeepEP's low-latency buffers


@dataclass(frozen=True)
class ServeTarget:
    """The model that an engine is to load.

    Attributes:
        model: a hub id or a folder.
        quantization: of the weights as stored; None where they are not quantised.
    """

    model: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class ServedPool(RolePool):
    """A pool of a plan, with the sizes to start it with.

    Attributes:
        rank_seqs: running sequences of a data-parallel rank at most.
        step_tokens: tokens in a data-parallel rank's step at most.
        devices_per_host: devices of a machine that it is started on.
    """

    _: KW_ONLY
    rank_seqs: int
    step_tokens: int
    devices_per_host: int

    @property
    def options(self) -> Options:
        """The candidate's."""
        return self.candidate.options

    @property
    def rank_tokens(self) -> int:
        """Tokens in a data-parallel rank's step at most; a decode pool has hardly any prompts."""
        decodes = self.rank_seqs * (1 + self.candidate.num_drafts)
        return max(decodes, _LEAST_BUFFER if self.role == "decode" else self.step_tokens)


def longest_request(load: Load, model: ModelConfig) -> int:
    """Largest request, in tokens, that a server must accept: the longest, or well above the mean.

    A single length is a mean, so longer requests come.
    """
    mean = ceil(sum(load.mean_lens))
    longest = load.max_len + 1
    wanted = ceil(max(_HEADROOM * mean, longest) / _BLOCK) * _BLOCK
    return max(mean, min(wanted, model.max_position_embeddings))


@dataclass(frozen=True)
class _Asked:
    """Alike servers of a pool, and the model that they load.

    Attributes:
        layout: layout of one server.
        num_servers: number of alike servers.
        max_len: tokens of a request at most.
        first_host: number of the pool's first machine, counted over all pools.
    """

    pool: ServedPool
    layout: Layout
    num_servers: int
    served: ServeTarget
    types: NumberTypes
    max_len: int
    first_host: int

    @property
    def num_hosts(self) -> int:
        """Machines that a server is started on."""
        return ceil(self.layout.world_size / self.pool.devices_per_host)

    @property
    def per_host(self) -> int:
        """Servers that share a machine."""
        return max(1, self.pool.devices_per_host // self.layout.world_size)

    @property
    def all_hosts(self) -> int:
        """Machines of all servers."""
        return ceil(self.num_servers / self.per_host) * self.num_hosts

    @property
    def host(self) -> str:
        """The pool's first machine."""
        return f"HOST{self.first_host}"

    @property
    def places(self) -> list[tuple[str, int]]:
        """The host of each server, and its index there."""
        places = [divmod(server, self.per_host) for server in range(self.num_servers)]
        return [(f"HOST{self.first_host + host * self.num_hosts}", place) for host, place in places]


@dataclass
class _Draft:
    """A command in the making.

    Attributes:
        words: the words that are the same on all nodes.
        on_node: the further words of a node, by its number.
        environment: variables that are set for it on a node, by its number.
        is_once: whether it is started on one node for all nodes.
        before: a command that writes a file it reads.
        notes: differences from the deployment, and what is left to the reader.
    """

    words: list[str]
    on_node: Callable[[int], Sequence[object]] = lambda _: ()
    environment: Callable[[int], Mapping[str, object]] = lambda _: {}
    is_once: bool = False
    before: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *words: object) -> None:
        self.words += map(str, words)

    def add_sizes(self, sizes: Mapping[str, int]) -> None:
        """Add the options whose size is not 1."""
        for name, size in sizes.items():
            if size > 1:
                self.add(name, size)

    def line(self, node: int) -> str:
        """The whole command on one node."""
        variables = [f"{name}={value}" for name, value in self.environment(node).items()]
        own = [*variables, *self.words, *map(str, self.on_node(node))]
        return " && ".join([*self.before, shlex.join(own)])


def engine_commands(
    engine: ServingEngine,
    pools: Sequence[ServedPool],
    served: ServeTarget,
    types: NumberTypes,
    max_len: int,
) -> list[ServeCommand]:
    """Commands to start each pool, then the router where there are several servers.

    Args:
        pools: one, or those for prefill and decode; all are run by the engine.
        max_len: tokens of a request at most.
    """
    made: list[ServeCommand] = []
    started: list[_Asked] = []
    for pool in pools:
        layout, num_servers = pool.layout, 1
        if not engine.has_replicas:
            layout, num_servers = replace(layout, replicas=1), layout.replicas
        first_host = sum(each.all_hosts for each in started)
        asked = _Asked(pool, layout, num_servers, served, types, max_len, first_host)
        draft = _WRITERS[engine.name](asked)
        draft.notes += _weight_notes(asked, engine)
        if num_servers > 1:
            draft.notes.append(_further_servers(asked, engine))
        nodes = range(1 if draft.is_once else asked.num_hosts)
        lines = tuple(draft.line(node) for node in nodes)
        checked = engine.version if engine.is_checked else None
        note = "; ".join(draft.notes)
        made.append(ServeCommand(engine.title, lines, note, pool.role, num_servers, checked))
        started.append(asked)
    if sum(each.num_servers for each in started) > 1:
        made.append(_router(engine, started))
    return made


def _further_servers(asked: _Asked, engine: ServingEngine) -> str:
    """A note on how servers after the first one differ."""
    num = asked.num_servers
    if asked.per_host == 1:
        return f"each of the {num} servers on hosts of its own"
    ports = [f"--port {_PORT} + K"]
    if engine.name == "sglang" and asked.pool.role == "prefill":
        ports.append(f"--disaggregation-bootstrap-port {_BOOTSTRAP_PORT} + K")
    if engine.name == "vllm" and asked.layout.dp > 1:
        ports.append("--data-parallel-rpc-port of its own")
    if engine.name == "vllm" and asked.pool.role != "both":
        ports.append("VLLM_NIXL_SIDE_CHANNEL_PORT of its own")
    size = asked.layout.world_size
    devices = "device K" if size == 1 else f"devices {size}K to {size}K + {size - 1}"
    return (
        f"{min(num, asked.per_host)} servers a host: server K of it with {devices} "
        f"(CUDA_VISIBLE_DEVICES), {', '.join(ports)}"
    )


def _router(engine: ServingEngine, started: Sequence[_Asked]) -> ServeCommand:
    """The command of the router before the servers."""
    role: ServeRole = "router"
    urls = {
        asked.pool.role: [f"{host}:{_PORT + place}" for host, place in asked.places]
        for asked in started
    }
    if engine.name == "trtllm" and "decode" in urls:
        config = {
            "hostname": "0.0.0.0",
            "port": _ROUTER_PORT,
            "context_servers": _instances(urls["prefill"]),
            "generation_servers": _instances(urls["decode"]),
        }
        line = f"{_written(config, 'disagg.yaml')} && trtllm-serve disaggregated -c disagg.yaml"
        return ServeCommand(engine.title, (line,), "", role)
    if engine.router is None:
        return ServeCommand(engine.title, (), "any HTTP load balancer before the servers", role)
    words = list(engine.router.words)
    if "both" in urls:
        words += ["--worker-urls", *(f"http://{url}" for url in urls["both"])]
    else:
        words.append(engine.router.pools)
        (prefill,) = (each for each in started if each.pool.role == "prefill")
        for url, (_, place) in zip(urls["prefill"], prefill.places, strict=True):
            port = [str(_BOOTSTRAP_PORT + place)] if engine.name == "sglang" else []
            words += ["--prefill", f"http://{url}", *port]
        for url in urls["decode"]:
            words += ["--decode", f"http://{url}"]
    words += ["--host", "0.0.0.0", "--port", str(_ROUTER_PORT)]
    note, version = f"pip install {engine.router.package}", engine.router.version
    return ServeCommand(engine.title, (shlex.join(words),), note, role, checked=version)


def _instances(urls: Sequence[str]) -> dict[str, object]:
    return {"num_instances": len(urls), "urls": urls}


def _vllm(asked: _Asked) -> _Draft:
    pool, layout = asked.pool, asked.layout
    draft = _Draft(["vllm", "serve", asked.served.model, "--tensor-parallel-size", str(layout.tp)])
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
        draft.environment = lambda node: {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": f"HOST{asked.first_host + node}"
        }
    if pool.role != "prefill":
        draft.add("--max-num-seqs", pool.rank_seqs)
        captured = pool.rank_seqs * (1 + pool.candidate.num_drafts)
        if captured > _VLLM_CAPTURED:
            draft.add("--max-cudagraph-capture-size", captured)
    draft.add("--max-num-batched-tokens", pool.rank_tokens, "--max-model-len", asked.max_len)
    draft.add("--gpu-memory-utilization", FREE_SHARE)
    draft.add(*_weights(asked))
    if asked.types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8")
    draft.add("--port", _PORT)
    if asked.num_hosts > 1:
        draft.add("--nnodes", asked.num_hosts, "--master-addr", asked.host)
        draft.on_node = lambda node: ("--node-rank", node, *(["--headless"] if node else []))
    return draft


_VLLM_BACKENDS = {
    "low_latency": "deepep_low_latency",
    "normal": "deepep_high_throughput",
    None: "allgather_reducescatter",
}


def _vllm_experts(draft: _Draft, pool: ServedPool) -> None:
    """One backend serves all phases that the pool computes."""
    (kernels,) = pool.all_kernels
    draft.add("--enable-expert-parallel", "--all2all-backend", _VLLM_BACKENDS[kernels])
    if num_redundant := pool.options.num_redundant_experts:
        config = strict_json({"num_redundant_experts": num_redundant})
        draft.add("--enable-eplb", "--eplb-config", config)
        draft.notes.append("it takes copies of an expert in turns, not the nearest")
    if pool.options.overlap:
        draft.add("--enable-dbo")


def _weights(asked: _Asked) -> list[str]:
    """vLLM and SGLang quantise to float8 as they load; what is stored so needs no word."""
    types, stored = asked.types, asked.served.quantization
    if types.weights == types.kept:
        return ["--dtype", types.weights]
    return ["--quantization", "fp8"] if types.weights == "float8" and not stored else []


def _weight_notes(asked: _Asked, engine: ServingEngine) -> list[str]:
    types, stored = asked.types, asked.served.quantization
    as_stored = {"nvfp4", "mxfp4", "int4"}
    if engine.name not in ("vllm", "sglang"):
        as_stored.add("float8")
    if stored is None and types.weights in as_stored:
        return [f"it needs a checkpoint quantised to {types.weights}"]
    if stored is None or stored.number_type == types.weights:
        return []
    return [f"it serves the stored {stored.method} weights, not {types.weights}"]


def _sglang(asked: _Asked) -> _Draft:
    pool, layout, num_drafts = asked.pool, asked.layout, asked.pool.candidate.num_drafts
    draft = _Draft(["python", "-m", "sglang.launch_server", "--model-path", asked.served.model])
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
        draft.add("--disaggregation-bootstrap-port", _BOOTSTRAP_PORT)
    else:
        draft.add("--max-running-requests", pool.rank_seqs * layout.dp)  # of all dp ranks
        draft.add("--cuda-graph-max-bs-decode", ceil(pool.rank_seqs / layout.pp))
    if pool.role != "decode":
        draft.add("--chunked-prefill-size", pool.rank_tokens * layout.dp)  # of all dp ranks
    draft.add("--context-length", asked.max_len)
    draft.add(*_weights(asked))
    if asked.types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8_e4m3")
    draft.add("--host", "0.0.0.0", "--port", _PORT)
    if asked.num_hosts > 1:
        draft.add("--nnodes", asked.num_hosts)
        draft.add("--dist-init-addr", f"{asked.host}:{_RENDEZVOUS_PORT}")
        draft.on_node = lambda node: ("--node-rank", node)
    return draft


def _sglang_experts(draft: _Draft, pool: ServedPool) -> None:
    """DeepEP's mode may differ by phase: `auto` is normal in prefill, low latency in decode."""
    layout, kernels = pool.layout, pool.all_kernels
    if kernels != {None}:
        mode = "auto" if len(kernels) > 1 else next(iter(kernels))
        draft.add("--moe-a2a-backend", "deepep", "--deepep-mode", mode)
    if "low_latency" in kernels:
        decodes = ceil(pool.rank_seqs * (1 + pool.candidate.num_drafts) / layout.tp)
        buffer = ceil(decodes / _LEAST_BUFFER) * _LEAST_BUFFER
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


def _trtllm(asked: _Asked) -> _Draft:
    pool, layout, types = asked.pool, asked.layout, asked.types
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
    if types.kv == "float8":
        kv_cache["dtype"] = "fp8"
    config["kv_cache_config"] = kv_cache
    if pool.role != "prefill":
        config["max_batch_size"] = pool.rank_seqs
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
    draft = _Draft(["trtllm-serve", asked.served.model, "--config", "trtllm.yaml"])
    draft.add("--host", "0.0.0.0", "--port", _PORT)
    if num_redundant := pool.options.num_redundant_experts:
        slots = {
            "num_slots": pool.model.num_experts + num_redundant,
            "layer_updates_per_iter": 2,
        }
        draft.before.append(_written(slots, "moe_load_balancer.yaml"))
        config["moe_config"] = {"backend": "WIDEEP", "load_balancer": "moe_load_balancer.yaml"}
    draft.before.append(_written(config, "trtllm.yaml"))
    if asked.num_hosts > 1:
        start = ["mpirun", "-n", str(layout.world_size), "trtllm-llmapi-launch"]
        draft.words, draft.is_once = [*start, *draft.words], True
        draft.notes.append(f"once, over {asked.num_hosts} hosts; under Slurm srun for mpirun")
    if layout.ep > 1:
        draft.notes.append("it chooses how to dispatch by itself")
    return draft


def _written(config: Mapping[str, object], file: str) -> str:
    """A command that writes a configuration; JSON is YAML too."""
    return f"echo {shlex.quote(strict_json(config))} > {file}"


def _expertlane(asked: _Asked) -> _Draft:
    pool, options, types = asked.pool, asked.pool.options, asked.types
    draft = _Draft(["expertlane", "serve", asked.served.model, "--layout", str(asked.layout)])
    given = {
        "--overlap": ("on" if options.overlap else "off", "off"),
        "--num-micro-batches": (options.num_micro_batches, 1),
        "--micro-batch-schedule": (options.micro_batch_schedule, "drained"),
        "--dispatch": (options.dispatch, "all_to_all"),
        "--prefill-dispatch": (options.prefill_dispatch, None),
        "--payload": (options.payload, "model"),
        "--num-redundant-experts": (options.num_redundant_experts, 0),
        "--copies": (options.copies, "nearest"),
    }
    for name, (value, default) in given.items():
        if value != default:
            draft.add(name, value)
    draft.add("--max-num-seqs", pool.rank_seqs, "--max-num-batched-tokens", pool.rank_tokens)
    draft.add("--max-model-len", asked.max_len)
    if types.weights == types.kept:
        draft.add("--dtype", types.weights)
    elif types.weights == "float8" and asked.served.quantization is not None:
        draft.add("--activations", "float8")
    if types.kv == "float8":
        draft.add("--kv-dtype", "float8")
    draft.add("--host", "0.0.0.0", "--port", _PORT)
    if asked.num_hosts > 1:
        words = draft.words
        draft.words = ["torchrun", "--nnodes", str(asked.num_hosts), "--nproc-per-node", "1"]
        draft.add("--master-addr", asked.host, "--master-port", _RENDEZVOUS_PORT)
        draft.on_node = lambda node: ("--node-rank", node, "-m", *words)
    return draft


_WRITERS: dict[EngineName, Callable[[_Asked], _Draft]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": _trtllm,
    "expertlane": _expertlane,
}
