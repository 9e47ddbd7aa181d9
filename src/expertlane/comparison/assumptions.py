"""The assumptions of an experiment, measured and projected, printed beside its numbers.

One of them is the likeness of a small model's decode step to that of the paper's. A step is
described by the FLOPs of its experts per byte of weights, of dispatch and combine, and of keys and
values. Two models that agree in all three spend their time in the same places, on machines that
differ only in size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from expertlane.balance.holding import placements_of
from expertlane.cost.laws.profile import Execution, ModelledCluster, kernels_of
from expertlane.cost.memory import FREE_SHARE, workload_limits
from expertlane.cost.projector import StepSize
from expertlane.cost.routing import PowerLawRouting
from expertlane.cost.step.batch_sizes import PartSizes
from expertlane.cost.step.operation import NumberTypes
from expertlane.cost.step.program import ProgramBuilder, count
from expertlane.results.hardware import Machine
from expertlane.results.results import Assumption
from expertlane.results.step_record import RankCounts
from expertlane.schedule.request import Limits
from expertlane.spec.deployment import Options
from expertlane.spec.experiment import Experiment, read_experiment, shipped_experiments
from expertlane.spec.from_hf import from_hf
from expertlane.spec.hf_config import read_config
from expertlane.spec.layout import Layout, partition
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import Link, Stage

_ACTIVATIONS = {"gelu": "GELU", "silu": "SiLU", "relu2": "squared ReLU"}


def measured_assumptions(
    experiment: Experiment, machine: Machine, limits: Mapping[str, Limits]
) -> tuple[Assumption, ...]:
    """The choices that the paper, or a checkpoint, leaves open, as this experiment makes them.

    Args:
        limits: scheduler's limits of each deployment, by its name.
    """
    rows = (
        *_of_model(experiment),
        *_of_workload(experiment, limits),
        *_of_deployments(experiment, machine),
        *_beside_the_paper(experiment, machine),
    )
    return tuple(replace(each, source="measured") for each in rows)


def _of_model(experiment: Experiment) -> list[Assumption]:
    model, seed = experiment.model, experiment.workload.seed
    if experiment.checkpoint is None:
        weights = f"random, seeds {experiment.seed} and {seed}; router untrained"
        why_top_k, why_parts, why_weights = (
            "the paper does not give it",
            "the paper does not give them",
            "the paper gives no checkpoint and no text",
        )
    else:
        weights = f"the checkpoint's, router included; prompts of random token ids, seed {seed}"
        own = from_hf(read_config(Path(experiment.checkpoint))).num_experts_per_tok
        why_top_k = why_parts = "the checkpoint's own"
        if model.num_experts_per_tok != own:
            why_top_k = f"asked for; the checkpoint's own is {own}"
        why_weights = "the same for every checkpoint; text may load its experts less or more evenly"
    top_k = f"{model.num_experts_per_tok} of {model.num_experts}"
    return [
        Assumption("experts per token", top_k, why_top_k),
        Assumption("model parts", _parts(model), why_parts),
        Assumption("weights and prompts", weights, why_weights),
    ]


def _where_chosen(model: ModelConfig) -> str:
    """Layers that an indexer chooses for, if not all, and how many take the choice of another."""
    unindexed, num_shared = len(model.unindexed_layers), len(model.shared_choice_layers)
    num = model.num_hidden_layers - unindexed
    where = f" in {num} of {model.num_hidden_layers} layers" if unindexed else ""
    return where + (f" ({num_shared} layers take the choice of another)" if num_shared else "")


def _parts(model: ModelConfig) -> str:
    """The parts of a model, in words."""
    latent, scaling, routing = model.latent, model.rope_scaling, model.routing
    num_windows = sum(window is not None for window in model.sliding_window)
    shared = model.shared_expert_intermediate_size
    activation = _ACTIVATIONS[model.hidden_act]
    gated = "clamped, gated " if model.swiglu_limit is not None else "gated "
    is_whole = latent is not None or model.rotary_dim == model.head_dim
    of_head = "" if is_whole else f" in {model.rotary_dim} of {model.head_dim} values of a head"
    state, num_layers = model.state, model.num_hidden_layers
    own, norm = model.window_heads, "LayerNorm" if "norm" in model.further_biases else "RMSNorm"
    parts = {
        f"vocabulary {model.vocab_size:,}": True,
        f"{norm} before attention and MoE": True,
        "latent attention": latent is not None,
        "compressed attention": model.compressed is not None,
        f"{model.num_streams} residual streams": model.num_streams > 1,
        f"an indexer that chooses what attention sees{_where_chosen(model)}": (
            model.indexer is not None
        ),
        "a gate of attention's output": model.attention_gate is not None,
        f"{state.title if state else ''} in {len(model.state_layers)} of {num_layers} layers": (
            state is not None
        ),
        f"{model.num_attention_heads} query heads for {model.num_kv_heads} of keys and values": (
            latent is None and model.num_kv_heads != model.num_attention_heads
        ),
        f"values of {model.value_dim} beside keys of {model.head_dim}": (
            latent is None and model.value_dim != model.head_dim
        ),
        f"queries from a latent of {model.query_rank}": model.query_rank is not None,
        "RMSNorm of queries and keys": model.qk_norm is not None,
        f"rotary positions{of_head}{f', {scaling.rope_type} scaling' if scaling else ''}": (
            len(model.unrotated_layers) < num_layers
        ),
        f"sliding windows in {num_windows} of {model.num_hidden_layers} layers": num_windows > 0,
        f"in those {own.num_heads if own else 0} query heads for "
        f"{own.num_key_value_heads if own else 0}{', with sinks' if own and own.sinks else ''}": (
            own is not None
        ),
        "attention sinks": model.attention_sinks,
        f"{gated if model.gated_mlp else ''}{activation} in the experts": True,
        "sigmoid routing": routing.scoring_func == "sigmoid",
        "routing by the root of softplus": routing.scoring_func == "sqrtsoftplus",
        f"experts by tokens' numbers in {len(model.hash_layers)} layers": (
            len(model.hash_layers) > 0
        ),
        f"experts from {routing.topk_group} of {routing.n_group} groups": routing.n_group > 1,
        f"a shared expert {shared:,} wide": shared > 0,
        f"{len(model.dense_layers)} of {model.num_hidden_layers} layers without experts": (
            len(model.dense_layers) > 0
        ),
        "output head tied to the embedding": model.tie_word_embeddings,
    }
    return ", ".join(part for part, is_there in parts.items() if is_there)


def _of_workload(experiment: Experiment, limits: Mapping[str, Limits]) -> list[Assumption]:
    workload, cache = experiment.workload, _cache(experiment, limits)
    lengths = f"{workload.prompt_len:,} prompt + {workload.output_len:,} output tokens"
    resident = (
        f"{workload.num_sequences:,} sequences, as many at once as the cache holds"
        if cache
        else f"all {workload.num_sequences:,} sequences resident"
    )
    return [
        Assumption(
            "phases",
            "prefill and decode apart; factors are of decode",
            "the paper's TPS × TPOT ≈ 1000 fits a decode step of its 1024 sequences",
        ),
        Assumption(
            "context",
            f"{lengths}, {resident}",
            "TPOT grows with context; the paper's workload at full length exceeds its GPUs' memory",
        ),
        *cache,
    ]


def _cache(experiment: Experiment, limits: Mapping[str, Limits]) -> list[Assumption]:
    """A row if any deployment has less cache than the whole workload takes."""
    short = []
    for deployment in experiment.deployments + experiment.scaling:
        layout, found = deployment.layout, limits[deployment.name]
        wanted = workload_limits(experiment.workload, experiment.model, layout)
        if found.num_blocks < wanted.num_blocks:
            num_caches = layout.replicas * layout.dp
            sizes = [num_caches * each.num_blocks * each.block_size for each in (found, wanted)]
            short.append(f"{deployment.name}: {sizes[0]:,} of {sizes[1]:,} tokens")
    if not short:
        return []
    return [
        Assumption(
            "KV cache",
            "; ".join(short),
            "memory does not hold all sequences at once, so some requests wait until others end; "
            "needs count whole blocks and one spare block per sequence",
        )
    ]


def _of_deployments(experiment: Experiment, machine: Machine) -> list[Assumption]:
    deployments, dtype = experiment.deployments, experiment.model.dtype
    baselines = dict.fromkeys(str(each.layout) for each in deployments if each.is_baseline)
    micro_batches = sorted({each.options.num_micro_batches for each in deployments})
    rows = [
        Assumption(
            "precision",
            machine.dtype,
            "the paper's is FP16; this machine's fast type may differ"
            if experiment.checkpoint is None
            else f"the machine's choice, or --dtype; the checkpoint's own is {dtype}",
        ),
        Assumption(
            "baseline",
            "; ".join(baselines) or "none",
            "the paper's text allows two readings: pipeline stages, or data-parallel groups "
            "that share the experts",
        ),
        Assumption(
            "micro-batches",
            ", ".join(map(str, micro_batches)),
            "the paper does not give the baseline's; the best one is compared too",
        ),
        Assumption(
            "tensor parallelism",
            "each all-reduce as reduce-scatter and all-gather, tokens scattered in between",
            "the same bytes, and norms and router are computed once instead of on every rank",
        ),
    ]
    if machine.num_idle_gpus:
        rows.append(
            Assumption(
                "device",
                f"CPU, though there are {machine.num_idle_gpus} GPUs",
                f"a GPU for each of {machine.num_ranks} ranks is needed to use them",
            )
        )
    return rows


def _beside_the_paper(experiment: Experiment, machine: Machine) -> list[Assumption]:
    """The likeness of a small copy's step to the paper's."""
    if not is_of_the_papers_kind(experiment):
        return []
    found = likeness(experiment, PROPOSAL, NumberTypes.all_of(machine.dtype))
    return [
        Assumption(
            "expert FLOPs per byte",
            f"of the paper's step ({PROPOSAL}, {PAPER_CONTEXT:,} tokens of context): "
            f"{found.weights:#.3g}× for weights read, {found.dispatch:#.3g}× for dispatch and "
            f"combine, {found.keys_and_values:#.3g}× for KV reads; 1.00× would be equal",
            "expert FLOPs per dispatched byte grow with the expert's width",
        )
    ]


def projected_assumptions(
    experiment: Experiment,
    cluster: ModelledCluster,
    types: NumberTypes,
    routing: str,
    executions: Sequence[Execution],
    prefill: StepSize,
    outputs: str,
) -> tuple[Assumption, ...]:
    """The assumptions of a projection of the experiment.

    Args:
        routing: the experts that tokens choose, in words.
        outputs: lengths of outputs of the whole workload, in words.
    """
    kernels = kernels_of(cluster.profile)
    rows = [
        *_of_cluster(cluster),
        Assumption(
            "execution",
            " and ".join(executions),
            "both are shown, the first in the main tables: graph launches all kernels of a step "
            "at once, eager one by one"
            if len(executions) > 1
            else "on a CPU, launching and computing alternate",
        ),
        Assumption("kernels", kernels.assumed, kernels.why),
        Assumption(
            "flat dispatch",
            "sends no counts before rows",
            "static-size buffers need none and can be captured in a CUDA graph",
        ),
        Assumption(
            "routing",
            routing,
            "published traces are skewed, so that is the usual case and uniform the best one; "
            "experts are drawn per token, so balanced loads vary too",
            "--skew",
        ),
        Assumption("outputs", outputs, "of the whole workload"),
        Assumption(
            "decode step",
            f"all {experiment.workload.num_sequences:,} sequences, one token each, all at the "
            "same context",
            "so TPS × TPOT = number of sequences",
            "the experiment's num_sequences",
        ),
        Assumption(
            "prefill step",
            f"{prefill.num_seqs * prefill.num_new:,} tokens over the system: {prefill.num_seqs} "
            f"prompts × {prefill.num_new}, {prefill.num_cached:,} cached tokens each",
            "as large as a measured comparison's, half-way through a prompt",
        ),
        Assumption(
            "memory", f"{FREE_SHARE:.0%} of a device's may be used", "the rest is the framework's"
        ),
        *_of_types(types, experiment.model),
    ]
    if any(each.options.rebalance_steps for each in experiment.deployments):
        rows.append(
            Assumption(
                "rebalancing",
                "by the load of earlier tokens",
                "never those that it is judged by; moving experts takes no time",
            )
        )
    return tuple(rows)


def _of_cluster(cluster: ModelledCluster) -> list[Assumption]:
    profile, device = cluster.profile, cluster.profile.device
    bases = {each.basis for each in profile.surfaces.values()}
    bases |= {each.basis for each in profile.terms.values()}
    near, far = (
        f"{profile.links[link].bytes_per_s / 1e9:g} GB/s" if link in profile.links else "no figure"
        for link in (Link.INTRA_NODE, Link.INTER_NODE)
    )
    return [
        Assumption(
            "cluster",
            f"{cluster}: {device.name}, {cluster.profile.ranks_per_node} per node; "
            f"{near} inside a node, {far} between nodes, per device and direction",
            change="--cluster",
        ),
        Assumption(
            "profile",
            f"{profile.name}: {', '.join(each.label for each in sorted(bases))}",
            "measured: on the machine itself; fitted: to published measurements; "
            "bound: a datasheet's limit or an assumption, with wide bounds",
            "--cluster",
        ),
    ]


def _of_types(types: NumberTypes, model: ModelConfig) -> list[Assumption]:
    rows = [
        Assumption("number type", str(types), change="--dtype"),
        Assumption(
            "float16",
            "takes as long as bfloat16",
            "published tables have no float16, so it counts as bound and is 15% wider",
            "--dtype bfloat16",
        ),
        Assumption(
            "sizes never measured",
            f"experts {model.moe_intermediate_size:,} wide, heads of {model.head_dim}",
            "extrapolated from the nearest fitted sizes, with wider bounds per doubling; the "
            "tables give the extrapolated share of time",
        ),
    ]
    return [each for each in rows if each.name != "float16" or types.weights == "float16"]


BASELINE, PROPOSAL = Layout(tp=8, pp=2), Layout(dp=16, ep=16)
# Of the paper's step: the paper's figures hold only near the start of a sequence, and at 10,000
# tokens its sequences do not fit; this is the context that its projection uses.
PAPER_CONTEXT = 1024
PAPER_TYPES = NumberTypes.all_of("float16")


@dataclass(frozen=True)
class FlopsPerByte:
    """FLOPs of a step's experts over bytes, both summed over all ranks.

    Attributes:
        weights: over bytes of weights read, of all parts of the model.
        dispatch: over bytes sent to other ranks in dispatch and combine.
        keys_and_values: over bytes of keys and values read.
    """

    weights: float
    dispatch: float
    keys_and_values: float

    def over(self, other: "FlopsPerByte") -> "FlopsPerByte":
        """Each value as a factor of the other's."""
        names = [field.name for field in fields(self)]
        return FlopsPerByte(*(getattr(self, name) / getattr(other, name) for name in names))


@dataclass(frozen=True)
class StepWork:
    """FLOPs, bytes and messages counted by the ranks in one or more decode steps.

    Attributes:
        ranks: one entry for each rank and step.
    """

    ranks: Sequence[RankCounts]

    @property
    def dispatch_bytes(self) -> int:
        """Bytes sent to other ranks in dispatch and combine."""
        sent = (rank.sent_bytes[[Stage.DISPATCH, Stage.COMBINE]] for rank in self.ranks)
        return sum(int(each.sum()) for each in sent)

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Roofline time, summed over ranks and stages.

        Of each stage FLOPs or bytes read at these rates, whichever takes longer. Bytes of keys and
        values count as attention's.
        """
        total = 0.0
        for rank in self.ranks:
            num_bytes = rank.weight_bytes.astype(np.float64)
            num_bytes[Stage.ATTENTION] += rank.kv_bytes
            total += float(np.maximum(rank.flops / flops_per_s, num_bytes / bytes_per_s).sum())
        return total


def step_work(
    model: ModelConfig,
    layout: Layout,
    types: NumberTypes,
    num_seqs: int,
    context: int,
    ranks_per_node: int = 8,
) -> StepWork:
    """One decode step with flat dispatch, in one micro-batch, with uniformly random routing.

    Args:
        layout: a layout of several ranks and one replica.
        num_seqs: sequences on all ranks together, each with one new token.
        context: positions cached before that token.
    """
    builder = ProgramBuilder(
        model,
        layout,
        placements_of(model, layout, Options()),
        types=types,
        ranks_per_node=ranks_per_node,
    )
    of_rank = [len(part) for part in partition(num_seqs, layout.dp)]
    sizes = PartSizes.even(layout.dp, layout.tp, of_rank, num_cached=context)
    program = builder.build_sized([("all_to_all", [sizes])], PowerLawRouting.of(model, 0.0))
    return StepWork(list(count(program, model.num_hidden_layers, model.num_experts)))


def flops_per_byte(work: StepWork) -> FlopsPerByte:
    """FLOPs of the experts over the bytes of a step."""
    ranks = work.ranks
    flops = sum(int(rank.flops[Stage.EXPERTS]) for rank in ranks)
    return FlopsPerByte(
        weights=flops / sum(int(rank.weight_bytes.sum()) for rank in ranks),
        dispatch=flops / work.dispatch_bytes,
        keys_and_values=flops / sum(rank.kv_bytes for rank in ranks),
    )


def paper_step_work(
    layout: Layout, num_experts_per_tok: int, context: int = PAPER_CONTEXT
) -> StepWork:
    """`step_work` of the paper's decode step with all its sequences.

    Args:
        num_experts_per_tok: the paper does not give it.
        context: positions cached for each sequence.
    """
    paper = read_experiment(shipped_experiments()["paper"])
    return step_work(
        paper.model.with_overrides(num_experts_per_tok=num_experts_per_tok),
        layout,
        PAPER_TYPES,
        paper.workload.num_sequences,
        context,
        paper.cluster.ranks_per_node,
    )


def own_step_work(experiment: Experiment, layout: Layout, types: NumberTypes) -> StepWork:
    """`step_work` of an experiment's mean decode step."""
    workload = experiment.workload
    return step_work(
        experiment.model,
        layout,
        types,
        workload.num_sequences,
        workload.mean_context,
        experiment.cluster.ranks_per_node or layout.world_size,
    )


def likeness(
    experiment: Experiment, layout: Layout, types: NumberTypes, paper_context: int = PAPER_CONTEXT
) -> FlopsPerByte:
    """FLOPs per byte of an experiment's mean decode step, as factors of the paper's."""
    own = flops_per_byte(own_step_work(experiment, layout, types))
    paper = paper_step_work(layout, experiment.model.num_experts_per_tok, paper_context)
    return own.over(flops_per_byte(paper))


def is_of_the_papers_kind(experiment: Experiment) -> bool:
    """True for the paper's proposal on random weights, with as many layers and experts."""
    paper = read_experiment(shipped_experiments()["paper"]).model
    model = experiment.model
    return (
        experiment.checkpoint is None
        and any(each.layout == PROPOSAL for each in experiment.deployments)
        and model.num_hidden_layers == paper.num_hidden_layers
        and model.num_experts == paper.num_experts
    )
