"""Records of a simulated load, and its assumptions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import log2
from operator import add
from typing import Any

import numpy as np

from expertlane.cost.breakdown import shares_of
from expertlane.cost.laws.device import stand_ins
from expertlane.cost.laws.frameworks import (
    ServingKind,
    cluster_record,
    conditions_of,
    with_known_errors,
)
from expertlane.cost.laws.profile import (
    BOUNDS,
    DRIVER_S,
    LIKELY,
    Execution,
    ModelledCluster,
    Terms,
    kernels_of,
)
from expertlane.cost.laws.times import Basis
from expertlane.cost.memory import FREE_SHARE
from expertlane.cost.routing import RoutingChoice, varying_work
from expertlane.cost.step.step_list import ENGINE
from expertlane.cost.throughput import ACCEPTANCE_UNSURE
from expertlane.results.estimate import Estimate, Summary
from expertlane.results.metrics import intervals as intervals_of
from expertlane.results.metrics import serving_record
from expertlane.results.record import DeploymentRecord, PoolRecord, PoolRole, StepsRecord
from expertlane.results.results import Assumption, Results
from expertlane.results.serving_record import SampleRecord, ServingRecord, best_load, with_places
from expertlane.results.step_record import StepRecord
from expertlane.results.timeline import timelines_of
from expertlane.results.traffic import FanOut, TrafficRecord, bytes_by_link
from expertlane.simulator.pools import PhaseTotals, StepFacts
from expertlane.simulator.simulator import Outcome, ServingSetup, SimulatedPool, Simulator
from expertlane.spec.names import ProjectedCause, Traffic
from expertlane.spec.workload import SLO, Load

_HOW = {
    Execution.GRAPH: "the kernels of a micro-batch are launched at once, as CUDA graphs",
    Execution.EAGER: "the host launches every kernel, ahead of the device",
    Execution.SERIAL: "a CPU's calls and its work take turns; the profile has no other way",
}


Run = tuple[Simulator, Outcome]


def simulation(
    runs: Sequence[Run],
    workload: Mapping[str, Any],
    routing: RoutingChoice,
    slos: Sequence[SLO] = (),
    *,
    command: str,
    cautions: Sequence[str] = (),
) -> Results:
    """The whole content of `results.json`.

    Args:
        runs: runs of the same deployment, one for each load.
        workload: settings that all loads share.
        command: command line that repeats it.
        cautions: cautions for a reader of the numbers, in sentences.
    """
    simulator, _ = runs[0]
    cluster, setup = simulator.cluster, simulator.setup
    drafts = setup.multi_token
    question = {
        "model": simulator.model,
        "workload": workload,
        "serving": {
            "max_num_seqs": setup.max_num_seqs,
            "max_num_batched_tokens": setup.max_num_batched_tokens,
            "block_size": setup.block_size,
            "mtp": drafts.num_drafts,
            "mtp_acceptance": drafts.acceptance,
        },
    }
    serving = tuple(serving_of(*run, slos) for run in runs)
    served = ServingKind(
        simulator.model,
        setup.types.weights,
        has_two_pools=len(setup.pools) > 1,
        has_drafts=drafts.num_drafts > 0,
        num_ranks=max(each.replica_size for each in setup.pools.values()),
    )
    stand_in_laws = stand_ins(cluster.profile, setup.types, simulator.model)
    results = Results.now(
        "simulation",
        command,
        question,
        [_record(*best_run(runs, serving), routing, serving)],
        cluster=cluster_record(cluster, served),
        assumptions=_assumptions(simulator, routing),
        cautions=tuple(dict.fromkeys((*cautions, *stand_in_laws, *varying_work(simulator.model)))),
    )
    return with_known_errors(results, simulator.model, cluster.profile)


def best_run(runs: Sequence[Run], serving: Sequence[ServingRecord]) -> Run:
    """The run of the best load, the only one reported in detail."""
    return runs[serving.index(best_load(serving))]


def serving_of(simulator: Simulator, outcome: Outcome, slos: Sequence[SLO] = ()) -> ServingRecord:
    """Throughput and latency of a load that was served, with the objectives that it met."""
    record = serving_record(outcome.served, slos)
    if outcome.rates is not None:
        record = steady_record(record, outcome, simulator.load)
    record = replace(
        record,
        batch=simulator.load.batch,
        rate=simulator.load.rate,
        num_preemptions=outcome.num_parts
        * sum(each.pool.scheduler.num_preemptions for each in outcome.pools),
        num_cached_tokens=outcome.pools[0].pool.scheduler.num_cached_tokens
        if outcome.rates is None
        else sum(each.num_cached_tokens for each in outcome.served),
        basis=_main_basis(outcome),
    )
    return record if outcome.rates is None else _with_places(record, outcome)


def _with_places(record: ServingRecord, outcome: Outcome) -> ServingRecord:
    """The record with the wait for a place; unchanged for two pools, each with its own."""
    running = outcome.num_parts * outcome.pools[0].totals.most_running
    batch, rate = record.batch, record.requests_per_s
    if len(outcome.pools) > 1 or batch is None or rate is None or running >= batch:
        return record
    return with_places(record, running, batch, rate)


def steady_record(record: ServingRecord, outcome: Outcome, load: Load) -> ServingRecord:
    """A window's record, with the rates and means of the load itself."""
    rates = outcome.rates
    assert rates is not None, "of a steady state"
    prompt, output = load.mean_lens
    tps, rate = Estimate.of(rates.output_tps), Estimate.of(rates.requests_per_s)
    tpot = None if record.tpot_s is None else replace(record.tpot_s, mean=Estimate.of(rates.tpot_s))
    is_endless = rates.ttft_s is None
    slos, good_share = [], record.good_share
    for each in record.slos:
        if is_endless and each.slo.counts_wait:  # the sample waits for a while only
            slos.append(replace(each, value=None))
            good_share = Estimate.of(np.zeros(len(BOUNDS)))
        elif tpot is not None and each.slo.name == "tpot.mean":
            slos.append(replace(each, value=tpot.mean))
        else:
            slos.append(each)
    intervals = intervals_of(outcome.served)
    if is_endless:
        intervals = {name: ends for name, ends in intervals.items() if name.startswith("tpot")}
    if load.rate is None or is_endless:  # else as many are served as arrive
        away = rates.error * tps.value
        intervals["output_tps"] = tps.value - away, tps.value + away
    sample = SampleRecord(
        num_decoding=rates.num_decoding,
        num_waiting=rates.num_waiting,
        offered=load.rate,
        intervals=intervals,
    )
    return replace(
        record,
        wall_s=None,
        slos=tuple(slos),
        output_tps=tps,
        total_tps=tps * ((prompt + output) / output),
        requests_per_s=rate,
        ttft_s=None if is_endless else record.ttft_s,
        e2e_s=None if is_endless else record.e2e_s,
        tpot_s=tpot,
        goodput=None if good_share is None else good_share * rate.value,
        good_share=good_share,
        sample=sample,
    )


def _main_basis(outcome: Outcome) -> str | None:
    """The evidence (`Basis`) of most of the time; None where steps were not added up."""
    if not any(pool.totals.phases for pool in outcome.pools):
        return None
    return list(Basis)[int(_facts(outcome).basis_s.argmax())].label


def _facts(outcome: Outcome) -> StepFacts:
    phases = (totals for pool in outcome.pools for totals in pool.totals.phases.values())
    return reduce(add, (totals.facts for totals in phases))


def _record(
    simulator: Simulator,
    outcome: Outcome,
    routing: RoutingChoice,
    serving: tuple[ServingRecord, ...],
) -> DeploymentRecord:
    setup, top_k = simulator.setup, simulator.model.num_experts_per_tok
    device_bytes = simulator.cluster.profile.device.memory_bytes
    name = str(setup.layout)
    if setup.prefill_layout is not None:
        name = f"prefill {setup.prefill_layout}, decode {name}"
    return DeploymentRecord(
        name=name,
        layout=setup.layout,
        options=setup.options,
        source="projected",
        prefill_layout=setup.prefill_layout,
        conditions=conditions_of(top_k, simulator.execution, routing.option, setup.types),
        pools=tuple(_pool(pool, device_bytes, outcome.num_parts) for pool in outcome.pools),
        steps=tuple(
            _steps(pool.ranks.role, step, pool.totals.phases[phase])
            for pool, median in zip(outcome.pools, simulator.median_steps(outcome), strict=True)
            for phase, step in median.items()
        ),
        serving=serving,
        num_tokens_per_expert=tuple(
            tuple(map(int, layer)) for layer in _facts(outcome).num_tokens_per_expert
        ),
    )


def _pool(pool: SimulatedPool, device_bytes: float, num_parts: int) -> PoolRecord:
    memory = pool.ranks.memory
    return PoolRecord(
        role=pool.ranks.role,
        weight_bytes=memory.weight_bytes,
        kv_bytes=memory.kv_bytes,
        activation_bytes=memory.activation_bytes,
        allowed_bytes=int(FREE_SHARE * device_bytes),
        device_bytes=int(device_bytes),
        num_resident=num_parts * pool.ranks.num_resident,
        most_running=num_parts * pool.totals.most_running,
        num_preemptions=num_parts * pool.pool.scheduler.num_preemptions,
    )


def _steps(pool: PoolRole, median: StepRecord, totals: PhaseTotals) -> StepsRecord:
    num, step_s = len(totals.step_s), np.array(totals.step_s)
    basis_shares, extrapolated = shares_of(totals.facts.basis_s, totals.facts.extrapolated_s)
    shares = totals.why_s / (totals.why_s.sum() or 1.0) * float(step_s[:, LIKELY].mean())
    explained_s = totals.explained_s or 1.0
    wall_s = Estimate.between(step_s.sum(axis=0))
    return StepsRecord(
        phase=median.phase,
        pool=pool,
        num_steps=num,
        num_tokens=totals.num_tokens,
        num_seqs=totals.num_seqs,
        wall_s=wall_s,
        tps=totals.num_tokens / wall_s,
        step_s=Summary.of(step_s),
        breakdown_s=dict(zip(map(str, ProjectedCause), shares.tolist(), strict=True)),
        floor_s=totals.facts.floor_s / num,
        flops_utilisation=float(totals.flops_s / explained_s),
        read_utilisation=float(totals.read_s / explained_s),
        basis_shares=basis_shares,
        extrapolated_share=extrapolated,
        traffic=_traffic(totals, median),
        timeline=timelines_of([median])[median.phase],
    )


def _traffic(totals: PhaseTotals, median: StepRecord) -> TrafficRecord:
    records = sorted(median.records, key=lambda record: record.rank)
    ranks = [record.rank for record in records]
    payload = tuple(
        tuple(record.sent_bytes[:, Traffic.PAYLOAD].sum(axis=0)[ranks].tolist())
        for record in records
    )
    reached = np.sum([record.tokens_by_ranks_reached for record in records], axis=0)
    return TrafficRecord(
        bytes_by_link(totals.facts.sent_bytes),
        sent_bytes={Traffic.PAYLOAD.label: payload},
        fan_out=FanOut(tuple(np.trim_zeros(reached, "b").tolist())) if reached.any() else None,
        busiest_over_mean=totals.facts.rank_pairs / len(totals.step_s),
    )


def _assumptions(simulator: Simulator, routing: RoutingChoice) -> tuple[Assumption, ...]:
    """The assumptions, in the order of a reader's questions."""
    setup, cluster, execution = simulator.setup, simulator.cluster, simulator.execution
    rows = [
        (
            "weights",
            setup.types.weights,
            "--dtype",
            f"hidden states are {setup.types.activations}",
        ),
        (
            "KV cache",
            setup.types.kv,
            "--kv-dtype",
            "default: the checkpoint's, else as hidden states",
        ),
        ("execution", execution.value, "--execution", _HOW[execution]),
        ("routing", routing.option, "--routing-trace, --skew", routing.words),
        *_of_placement(setup),
        (
            "step",
            f"{setup.max_num_batched_tokens} tokens, {setup.max_num_seqs} sequences",
            "--max-num-batched-tokens, --max-num-seqs",
            _schedule_of(setup),
        ),
        (
            "memory",
            f"{FREE_SHARE:.0%} of a device",
            "",
            "the rest is for the framework; a sequence is admitted when its blocks are free",
        ),
        (
            "ranks",
            f"{cluster.profile.ranks_per_node} per node, in order",
            "--cluster",
            "tensor-parallel ranks are innermost, so that they share a node",
        ),
        (
            "prompts",
            _prompts_of(simulator.load),
            "--prefix-len, --requests",
            "free blocks of the cache keep prefixes",
        ),
        ("outputs", simulator.load.outputs, "--output-len", "no early end of sequence"),
        (
            "scheduler overhead",
            f"{1e3 * cluster.profile.terms[DRIVER_S].value:.3g} ms",
            "--cluster",
            "scheduling and sending a plan; not overlapped with the previous step",
        ),
    ]
    kernels = kernels_of(cluster.profile)
    if kernels is not ENGINE:
        rows.append(("kernels", f"of {kernels.name}", "", kernels.why))
    rows += _of_pools(setup, cluster) + _of_data_parallelism(simulator) + _of_drafts(setup)
    return tuple(Assumption(name, value, why, change) for name, value, change, why in rows)


def _schedule_of(setup: ServingSetup) -> str:
    """A step's limits, and when it computes prompts."""
    together = "together with decodes"
    if setup.phases_apart:
        together = "in steps of its own, before decodes"
    waits = ""
    if setup.prompt_wait_steps and setup.layout.dp > 1:
        waits = f"; prompts wait up to {setup.prompt_wait_steps} steps until every rank has one"
    return f"at most, per data-parallel rank; chunked prefill {together}{waits}"


def _prompts_of(load: Load) -> str:
    """Shared prefixes of prompts, in words."""
    if load.prefix_len:
        prefixes = "prefix" if load.num_prefixes == 1 else "prefixes"
        return f"{load.num_prefixes:,} shared {prefixes} of {load.prefix_len:,} tokens"
    return "shared prefixes as hash_ids say" if load.has_prefixes else "no shared prefixes"


def _of_placement(setup: ServingSetup) -> list[tuple[str, str, str, str]]:
    if not setup.options.is_by_load:
        return []
    return [
        (
            "placement of experts",
            "by load",
            "--placement",
            "of earlier tokens, in each layer; judged by later ones",
        )
    ]


def _of_data_parallelism(simulator: Simulator) -> list[tuple[str, str, str, str]]:
    setup, profile = simulator.setup, simulator.cluster.profile
    most = max(layout.dp for layout in setup.pools.values())
    if most == 1 or simulator.execution is Execution.SERIAL:
        return []
    sync_s = log2(most) * Terms.of(profile, setup.execution).dp_sync_s[LIKELY]
    return [
        (
            "data-parallel ranks",
            f"{1e3 * sync_s:.2g} ms per step to synchronise",
            "--cluster",
            "each has a scheduler; one without requests computes a dummy batch",
        )
    ]


def _of_pools(setup: ServingSetup, cluster: ModelledCluster) -> list[tuple[str, str, str, str]]:
    if setup.prefill_layout is None:
        return []
    where = (
        "on other nodes"
        if setup.are_pools_apart(cluster.profile.ranks_per_node)
        else "on the same node"
    )
    own = [("prefill pool", str(setup.prefill_options), "--plan", "it has options of its own")]
    return [
        (
            "disaggregated",
            f"prefill {setup.prefill_layout}, decode {setup.layout}",
            "--prefill-layout",
            "each pool with its own scheduler, starting on a node's first device",
        ),
        *(own if setup.prefill_options is not None else []),
        (
            "KV transfer",
            where,
            "--prefill-layout",
            "before the first token, as waiting for the pool that decodes is (so both count in "
            "TTFT), one request at a time, overlapped with both pools' work",
        ),
    ]


def _of_drafts(setup: ServingSetup) -> list[tuple[str, str, str, str]]:
    drafts = setup.multi_token
    if not drafts.num_drafts:
        return []
    return [
        (
            "multi-token prediction",
            f"{drafts.num_drafts} drafts, {drafts.acceptance:g} ± {ACCEPTANCE_UNSURE:g} accepted: "
            f"{drafts.tokens_per_step:.3g} tokens per step",
            "--mtp, --mtp-acceptance",
            f"a decode step runs {1 + drafts.num_drafts} tokens through the model, then "
            f"{drafts.num_drafts} passes of the layers that draft and the head; every step yields "
            "the average; the KV cache is reduced so that it fills as early",
        )
    ]
