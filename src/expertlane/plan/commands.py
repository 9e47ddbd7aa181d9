"""A deployment as others take it: command lines of vLLM, SGLang and TensorRT-LLM.

Replicas are servers of their own; each command is for one. Options and their choices were checked
against the argument parsers of the versions in `CHECKED` (`tests/plan/test_commands.py`);
TensorRT-LLM's are as documented (nvidia.github.io/TensorRT-LLM) and unverified.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from expertlane.cost.number_types import NumberTypes
from expertlane.plan.candidates import Candidate
from expertlane.results.record import PoolRole
from expertlane.results.results import ServeCommand
from expertlane.spec.deployment import Options
from expertlane.spec.dispatch import DISPATCH_FORMS, DeepEPKernels
from expertlane.spec.files import strict_json
from expertlane.spec.hf_config import Quantization
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase

CHECKED = {"vLLM": "0.32.0", "SGLang": "0.5.23"}  # whose parsers take the options


@dataclass(frozen=True)
class ServeTarget:
    """What the other systems shall load.

    Attributes:
        model: a hub id or a folder.
        quantization: of its weights as stored; None where they are not quantised.
    """

    model: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class ServedPool:
    """A pool of a plan.

    Attributes:
        num_nodes: that a replica spans.
    """

    candidate: Candidate
    num_nodes: int
    role: PoolRole = "both"

    @property
    def layout(self) -> Layout:
        """Of the pool."""
        return self.candidate.layout

    @property
    def options(self) -> Options:
        """Of the pool."""
        return self.candidate.options

    def kernels(self, phase: Phase) -> DeepEPKernels | None:
        """DeepEP's kernels that come nearest; None without expert parallelism or DeepEP.

        Prompts have more tokens than low-latency kernels have buffers for.
        """
        form = self.options.of_phase(phase).dispatch
        assert form != "auto", "a candidate has one form for each phase"
        if self.layout.ep == 1:
            return None
        kernels = DISPATCH_FORMS[form].deepep
        return "normal" if kernels and phase is Phase.PREFILL else kernels


@dataclass
class _Draft:
    """A command in the making: words, and notes on what differs from the deployment."""

    words: list[str]
    notes: list[str] = field(default_factory=list)

    def add(self, *words: object) -> None:
        self.words += map(str, words)


class _Inexpressible(Exception):
    """The system has no words for the deployment."""


def serve_commands(
    pools: Sequence[ServedPool], served: ServeTarget, types: NumberTypes, max_model_len: int
) -> list[ServeCommand]:
    """The commands of each system, for one replica of each pool."""
    made = []
    for pool in pools:
        for system, write in (("vLLM", _vllm), ("SGLang", _sglang), ("TensorRT-LLM", _trtllm)):
            command, note = None, ""
            try:
                draft = write(pool, served, types, max_model_len)
                command, note = shlex.join(draft.words), "; ".join(draft.notes)
            except _Inexpressible as why:
                note = str(why)
            if system == "TensorRT-LLM" and command is not None:
                command = _with_config(draft.words)
            made.append(ServeCommand(system, command, note, pool.role, CHECKED.get(system)))
    return made


def _vllm(pool: ServedPool, served: ServeTarget, types: NumberTypes, max_model_len: int) -> _Draft:
    layout, options = pool.layout, pool.options
    if layout.ep > 1 and layout.etp > 1:
        raise _Inexpressible(
            f"vLLM spreads experts over all dp × tp = {layout.stage_size} ranks; ep={layout.ep} "
            f"with experts sharded over {layout.etp} cannot be expressed"
        )
    draft = _Draft(["vllm", "serve", served.model, "--tensor-parallel-size", str(layout.tp)])
    if layout.dp > 1:
        draft.add("--data-parallel-size", layout.dp)
    if layout.pp > 1:
        draft.add("--pipeline-parallel-size", layout.pp)
    if layout.dcp > 1:
        draft.add("--decode-context-parallel-size", layout.dcp)
    if layout.ep > 1:
        _vllm_experts(draft, pool)
    elif options.overlap:
        draft.notes.append("it overlaps two batches only under expert parallelism")
    if num_drafts := pool.candidate.num_drafts:
        config = strict_json({"method": "mtp", "num_speculative_tokens": num_drafts})
        draft.add("--speculative-config", config)
    if pool.role != "both":
        kv_role = "kv_producer" if pool.role == "prefill" else "kv_consumer"
        config = strict_json({"kv_connector": "NixlConnector", "kv_role": kv_role})
        draft.add("--kv-transfer-config", config)
    draft.add(*_weights(types, served))
    if types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8")
    draft.add("--max-model-len", max_model_len)
    draft.notes += _kept_weights(types, served)
    if pool.num_nodes > 1 and layout.dp > 1:
        draft.notes.append(
            f"on {pool.num_nodes} nodes: add --data-parallel-size-local, --data-parallel-address "
            "and, on all but the first, --headless with --data-parallel-start-rank"
        )
    elif pool.num_nodes > 1:
        draft.notes.append(
            f"on {pool.num_nodes} nodes: start it inside a Ray cluster or with --nnodes"
        )
    return draft


_VLLM_BACKENDS: dict[DeepEPKernels | None, str] = {
    "low_latency": "deepep_low_latency",
    "normal": "deepep_high_throughput",
    None: "allgather_reducescatter",
}


def _vllm_experts(draft: _Draft, pool: ServedPool) -> None:
    """One backend serves both phases: the decode's, where a pool has both."""
    kernels = pool.kernels(Phase.PREFILL if pool.role == "prefill" else Phase.DECODE)
    draft.add("--enable-expert-parallel", "--all2all-backend", _VLLM_BACKENDS[kernels])
    if pool.role == "both" and kernels != pool.kernels(Phase.PREFILL):
        draft.notes.append("prompts are dispatched as decodes: it has one backend for both phases")
    if pool.options.num_redundant_experts:
        config = strict_json({"num_redundant_experts": pool.options.num_redundant_experts})
        draft.add("--enable-eplb", "--eplb-config", config)
    if pool.options.overlap:
        draft.add("--enable-dbo")


def _weights(types: NumberTypes, served: ServeTarget) -> list[str]:
    """Both systems quantise to float8 as they load; what is stored so already needs no word."""
    if types.weights == types.kept:
        return ["--dtype", types.weights]
    return (
        ["--quantization", "fp8"] if types.weights == "float8" and not served.quantization else []
    )


def _kept_weights(types: NumberTypes, served: ServeTarget) -> list[str]:
    stored = served.quantization
    if stored is None and types.weights in ("nvfp4", "mxfp4"):
        return [f"it needs a checkpoint quantised to {types.weights}"]
    if stored is None or stored.number_type == types.weights:
        return []
    return [f"it serves the stored {stored.method} weights, not {types.weights}"]


def _sglang(
    pool: ServedPool, served: ServeTarget, types: NumberTypes, max_model_len: int
) -> _Draft:
    layout, num_drafts = pool.layout, pool.candidate.num_drafts
    draft = _Draft(["python", "-m", "sglang.launch_server", "--model-path", served.model])
    draft.add("--tp-size", layout.stage_size)  # its tp is all ranks; attention's is tp / dp
    if layout.dp > 1:
        draft.add("--attn-dp-size", layout.dp)
    if layout.pp > 1:
        draft.add("--pp-size", layout.pp)
    if layout.dcp > 1:
        draft.add("--dcp-size", layout.dcp)
    if layout.ep > 1:
        draft.add("--ep-size", layout.ep)
        _sglang_experts(draft, pool)
    elif pool.options.overlap:
        draft.notes.append("it overlaps two batches only under expert parallelism with DeepEP")
    if num_drafts:
        draft.add("--speculative-algorithm", "NEXTN", "--speculative-num-steps", num_drafts)
        draft.add("--speculative-eagle-topk", 1)
        draft.add("--speculative-num-draft-tokens", 1 + num_drafts)
    if pool.role != "both":
        draft.add("--disaggregation-mode", pool.role)
    draft.add(*_weights(types, served))
    if types.kv == "float8":
        draft.add("--kv-cache-dtype", "fp8_e4m3")
    draft.add("--context-length", max_model_len)
    draft.notes += _kept_weights(types, served)
    if pool.num_nodes > 1:
        # A place that the parser takes as it is: rank 0 of the first host.
        draft.add("--nnodes", pool.num_nodes, "--node-rank", 0, "--dist-init-addr", "HOST:PORT")
        last = pool.num_nodes - 1
        draft.notes.append(f"once on each node, with --node-rank from 0 to {last}")
    return draft


def _sglang_experts(draft: _Draft, pool: ServedPool) -> None:
    """DeepEP's mode may differ by phase: `auto` is normal in prefill, low latency in decode."""
    layout, options = pool.layout, pool.options
    prefill, decode = (pool.kernels(phase) for phase in (Phase.PREFILL, Phase.DECODE))
    kernels = prefill if pool.role == "prefill" else decode
    if pool.role == "both" and (prefill is None) != (decode is None):
        draft.notes.append("prompts are dispatched as decodes: it has one backend for both phases")
    if kernels is None:
        if options.overlap:
            draft.notes.append("it overlaps two batches only with DeepEP")
        return
    if layout.etp > 1:
        raise _Inexpressible(
            f"with DeepEP, SGLang's ep is all of its ranks; ep={layout.ep} of {layout.stage_size} "
            "cannot be expressed"
        )
    mode = "auto" if pool.role == "both" and kernels == "low_latency" else kernels
    draft.add("--moe-a2a-backend", "deepep", "--deepep-mode", mode)
    if kernels == "normal" and pool.role != "prefill":
        draft.notes.append("it captures no CUDA graph of decodes with normal kernels")
    if options.num_redundant_experts:
        draft.add("--ep-num-redundant-experts", options.num_redundant_experts)
    if options.overlap:
        draft.add("--enable-two-batch-overlap")


def _trtllm(
    pool: ServedPool, served: ServeTarget, types: NumberTypes, max_model_len: int
) -> _Draft:
    """The last word is its configuration, as JSON."""
    layout = pool.layout
    if layout.dp > 1 and layout.tp > 1:
        raise _Inexpressible(
            "its attention is tensor parallel or data parallel over all ranks; "
            f"dp={layout.dp} with tp={layout.tp} cannot be expressed"
        )
    if layout.dcp > 1:
        raise _Inexpressible(f"dcp={layout.dcp}: not known to be expressible")
    config: dict[str, object] = {
        "tensor_parallel_size": layout.stage_size,
        "moe_expert_parallel_size": layout.ep,
        "pipeline_parallel_size": layout.pp,
        "enable_attention_dp": layout.dp > 1,
        "max_seq_len": max_model_len,
    }
    if types.kv == "float8":
        config["kv_cache_config"] = {"dtype": "fp8"}
    if num_drafts := pool.candidate.num_drafts:
        config["speculative_config"] = {"decoding_type": "MTP", "max_draft_len": num_drafts}
    if pool.role != "both":
        config["cache_transceiver_config"] = {"backend": "DEFAULT"}
    draft = _Draft(["trtllm-serve", served.model, "--config", "FILE", strict_json(config)])
    if layout.ep > 1:
        draft.notes.append("it chooses how to dispatch by itself")
    if pool.options.num_redundant_experts:
        draft.notes.append("redundant experts need a file of its load balancer")
    if pool.options.overlap:
        draft.notes.append("without two-batch overlap")
    draft.notes += _kept_weights(types, served)
    if types.weights == "float8" and served.quantization is None:
        draft.notes.append("it needs a checkpoint quantised to float8")
    if pool.num_nodes > 1:
        draft.notes.append(f"on {pool.num_nodes} nodes: start it with mpirun or srun")
    return draft


def _with_config(words: Sequence[str]) -> str:
    """The configuration, which is YAML too, written to the file that the command reads."""
    *command, config = words
    file = "trtllm.yaml"
    command[command.index("FILE")] = file
    return f"echo {shlex.quote(config)} > {file} && {shlex.join(command)}"
