"""Today's `results.json` under the names that the golden files were written with."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from expertlane.results.estimate import Estimate, Summary
from expertlane.results.record import (
    BEST,
    DECODE_POOL,
    EXPERIMENT,
    FAMILY,
    FASTEST,
    PARETO,
    PREFILL_POOL,
    SCALING,
    TWO_POOLS,
    DeploymentRecord,
    PoolRecord,
    StepsRecord,
)
from expertlane.results.results import Assumption, Results
from expertlane.results.traffic import TrafficRecord
from expertlane.spec.layout import Layout
from expertlane.spec.names import Phase
from golden.old_derived import hidden_by_overlap, scaling_points

Json = Any
_NO_OPTION_UNSAID = {"execution", "sizes never measured"}


def old(text: Json) -> Json:
    """The same numbers as the kind's own schema had them."""
    if "deployments" not in text:  # a balance
        return text
    results = TypeAdapter(Results).validate_json(json.dumps(text))
    of_kinds = {"comparison": _comparison, "simulation": _simulation, "plan": _plan}
    found = of_kinds[results.kind](results)
    return json.loads(json.dumps({"kind": results.kind, **_made(results), **found}))


def _made(results: Results) -> Json:
    return {"command": results.command, "created": results.created}


def _layout(layout: Layout) -> Json:
    sizes = layout.pp, layout.dp, layout.tp, layout.ep
    names = ("pp_size", "dp_size", "tp_size", "ep_size")
    return {"replicas": layout.replicas, **dict(zip(names, sizes, strict=True))}


def _experts(record: DeploymentRecord) -> Json:
    return [list(layer) for layer in record.num_tokens_per_expert]


# comparison


def _comparison(results: Results) -> Json:
    own = results.select("measured", EXPERIMENT)
    machine = None if results.machine is None else asdict(results.machine)
    if machine is not None:
        del machine["kernels"]
    return {
        "schema_version": 5,
        "versions": {
            "expertlane": results.versions.expertlane,
            "python": results.versions.python,
            "torch": results.versions.torch or "not used",
        },
        "machine": machine,
        "experiment": results.question["experiment"],
        "assumptions": [
            {"name": each.name, "value": each.value, "why": each.why}
            for each in results.assumptions
            if each.source == "measured"
        ],
        "deployments": [_measured(each) for each in own],
        "hidden_communication": [
            {**asdict(each), "hidden": each.hidden} for each in hidden_by_overlap(own)
        ],
        "scaling": [asdict(each) for each in scaling_points(results)],
        "foreign_cpu_share": results.foreign_cpu_share,
        "projection": None if results.cluster is None else _projection(results),
    }


def _measured(record: DeploymentRecord) -> Json:
    phases = {each.phase: each for each in record.steps}
    assert record.prefill is not None
    return {
        **{key: getattr(record, key) for key in ("name", "source", "is_baseline")},
        "layout": _layout(record.layout),
        "options": asdict(record.options),
        "prefill": _phase(record.prefill, "ttft_s"),
        "decode": None if record.decode is None else _phase(record.decode, "tpot_s"),
        "breakdown_s": {phase: each.breakdown_s for phase, each in phases.items()},
        "bottleneck": record.bottleneck and asdict(record.bottleneck),
        "expert_load": {
            "num_tokens_per_expert": _experts(record),
            "max_over_mean": record.expert_max_over_mean,
        },
        "traffic_bytes": {phase: _by_link(each) for phase, each in phases.items()},
        "traffic": {phase: _traffic(each.traffic) for phase, each in phases.items()},
        "rebalances": [asdict(each) for each in record.rebalances],
        "dispatch_table": record.dispatch_table and asdict(record.dispatch_table),
        "per_rank": [
            {
                **asdict(held),
                "stage_s": {
                    phase: {stage: times[held.rank] for stage, times in each.stage_s.items()}
                    for phase, each in phases.items()
                },
                "waiting_s": {phase: each.waiting_s[held.rank] for phase, each in phases.items()},
                "bubble_s": {phase: each.bubble_s[held.rank] for phase, each in phases.items()},
            }
            for held in record.held
        ],
        "timelines": _timelines(record),
        "tokens_sha256": record.tokens_sha256,
    }


def _timelines(record: DeploymentRecord) -> Json:
    return {
        phase: asdict(step.timeline)
        for phase in Phase
        for step in record.steps_of(phase)
        if step.timeline is not None
    }


def _phase(step: StepsRecord, token: str) -> Json:
    same = (
        "num_steps", "num_rounds", "num_tokens", "tps_of_runs", "exposed_s", "active_expert_share",
        "cpu_s_per_token", "flops", "weight_bytes", "kv_bytes", "num_collectives",
    )  # fmt: skip
    assert step.step_s is not None
    assert step.token_s is not None
    return {
        **{key: getattr(step, key) for key in same},
        "wall_s": step.wall_s.value,
        "tps": step.tps.value,
        "step_s": _value(step.step_s.median),
        "critical_path": step.critical_path and asdict(step.critical_path),
        "utilisation": {"flops": step.flops_utilisation, "read_bytes": step.read_utilisation},
        token: {"median": _value(step.token_s.median), "p95": _value(step.token_s.p95)},
    }


def _value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def _by_link(step: StepsRecord) -> Json:
    assert step.traffic is not None
    return {link: asdict(each) for link, each in step.traffic.by_link.items()}


def _traffic(traffic: TrafficRecord | None) -> Json:
    assert traffic is not None
    found = asdict(traffic)
    del found["by_link"], found["busiest_over_mean"]
    if traffic.fan_out is not None:
        found["fan_out"]["ranks_per_token"] = traffic.fan_out.ranks_per_token
        found["fan_out"]["nodes_per_token"] = traffic.fan_out.nodes_per_token
    return found


def _projection(results: Results) -> Json:
    cluster = results.cluster
    assert cluster is not None
    own = results.select("projected", EXPERIMENT)
    assert own[0].conditions is not None
    num_all = results.question["experiment"]["workload"]["num_sequences"]
    return {
        "cluster": cluster.name,
        "device": {
            "name": cluster.device,
            "memory_bytes": cluster.memory_bytes,
            "memory_bytes_per_s": cluster.memory_bytes_per_s,
            "flops_per_s": cluster.flops_per_s,
        },
        "types": own[0].conditions.dtype,
        "num_sequences": num_all,
        "context": results.context,
        "skew": results.question["skew"],
        "deployments": [_projected(results, each) for each in own],
        "scaling": [_scaled(each) for each in results.select("projected", SCALING)],
        "planned": [_planned(results, each.top_k) for each in results.plans],
        "assumptions": [
            _projected_assumption(each)
            for each in results.assumptions
            if each.source == "projected"
        ],
        "not_measured": results.not_measured,
    }


def _projected_assumption(row: Assumption) -> Json:
    change = row.change
    if not change and row.name not in _NO_OPTION_UNSAID:
        change = "no option"
    return {"name": row.name, "value": row.value, "why": "; ".join(filter(None, (change, row.why)))}


def _projected(results: Results, record: DeploymentRecord) -> Json:
    at, pool = record.conditions, record.pools[0]
    assert at is not None
    num_all = results.question["experiment"]["workload"]["num_sequences"]
    decode, by_batch = list(record.steps_of(Phase.DECODE)), []
    if at == results.conditions[0] and EXPERIMENT in record.roles:
        assert results.context is not None
        first = [
            place
            for place, step in enumerate(decode)
            if (step.num_seqs, step.context) == (1, results.context)
        ]
        decode, by_batch = decode[: first[-1]], decode[first[-1] :]
        of_all = record.decode_of(results.context, num_all)
        assert of_all is not None
        by_batch.append(of_all)
    return {
        "name": record.name,
        "layout": _layout(record.layout),
        "options": asdict(record.options),
        "is_baseline": record.is_baseline,
        "top_k": at.top_k,
        "execution": at.execution,
        "routing": at.routing,
        "memory": {
            "weight_bytes": pool.weight_bytes,
            "activation_bytes": pool.activation_bytes,
            "sequence_bytes": pool.sequence_bytes,
            "device_bytes": pool.allowed_bytes,
            "num_resident": pool.num_resident,
        },
        "prefill": None if record.prefill is None else _step(record.prefill),
        "decode": [_step(each) for each in decode],
        "by_batch": [_step(each) for each in by_batch],
        "timelines": _timelines(record),
    }


def _step(step: StepsRecord) -> Json:
    same = (
        "context", "num_tokens", "shares", "floor_s", "flops_utilisation", "read_utilisation",
        "basis_shares", "extrapolated_share", "fits",
    )  # fmt: skip
    return {
        **{key: getattr(step, key) for key in same},
        "step_s": asdict(step.round_s),
        "tps": asdict(step.tps),
        "weight_bytes": step.most_weight_bytes,
    }


def _scaled(record: DeploymentRecord) -> Json:
    pool = record.pools[0]
    return {
        "name": record.name,
        "layout": _layout(record.layout),
        "num_ranks": record.num_ranks,
        "num_slots_per_rank": pool.num_slots_per_rank,
        "weight_bytes": pool.weight_bytes,
        "device_bytes": pool.allowed_bytes,
        "same_work": _step(record.steps[0]),
        "same_share": _step(record.steps[-1]),
    }


def _planned(results: Results, top_k: int) -> Json:
    def of(role: str) -> list[DeploymentRecord]:
        return [
            each
            for each in results.select("projected", role)
            if each.conditions is not None and each.conditions.top_k == top_k
        ]

    plan = next(each for each in results.plans if each.top_k == top_k)
    own = [each for each in of(EXPERIMENT) if each.serving]
    fastest = of(FASTEST)
    return {
        "top_k": top_k,
        "num_candidates": plan.num_candidates,
        "num_too_large": plan.num_too_large,
        "decode": _projected(results, fastest[0]) if fastest else None,
        "served": [_served(each) for each in (*of(BEST), *own)],
        "pareto": [_served(each) for each in of(PARETO)],
    }


def _served(record: DeploymentRecord) -> Json:
    serving = record.serving[0]
    return {
        "name": record.name,
        "layout": _layout(record.layout),
        "options": asdict(record.options),
        "num_seqs": serving.num_running,
        "tps": asdict(serving.output_tps),
        "tpot_s": _mean(serving.tpot_s),
    }


def _mean(summary: Summary | None) -> Json:
    return None if summary is None or summary.mean is None else asdict(summary.mean)


# simulation


def _simulation(results: Results) -> Json:
    record, cluster, asked = results.deployments[0], results.cluster, results.question
    serving, at = record.serving[0], record.conditions
    assert cluster is not None
    assert at is not None
    return {
        "schema_version": 2,
        "versions": {},
        "model": asked["model"],
        "cluster": {
            **{key: getattr(cluster, key) for key in ("name", "device", "num_devices")},
            "ranks_per_node": cluster.ranks_per_node,
            "num_idle": cluster.num_devices - record.num_ranks,
        },
        "deployment": {
            "layout": _layout(record.layout),
            "prefill_layout": record.prefill_layout and _layout(record.prefill_layout),
            "options": asdict(record.options),
            **{key: getattr(at, key) for key in ("dtype", "kv_dtype", "execution", "routing")},
            **asked["serving"],
        },
        "workload": {
            **asked["workload"],
            "num_prompt_tokens": serving.num_prompt_tokens,
            "num_output_tokens": serving.num_output_tokens,
        },
        "assumptions": [
            {
                "name": each.name, "value": each.value, "option": each.change, "why": each.why,
            }
            for each in results.assumptions
        ],
        "service": {
            **{
                key: _spread(getattr(serving, key), serving.basis)
                for key in ("ttft_s", "tpot_s", "e2e_s")
            },
            **{
                key: _number(getattr(serving, key), serving.basis)
                for key in ("output_tps", "total_tps", "requests_per_s", "wall_s")
            },
        },
        "pools": [_pool(record, each) for each in record.pools],
        "num_tokens_per_expert": _experts(record),
    }  # fmt: skip


def _number(estimate: Estimate | None, basis: str | None) -> Json:
    return estimate and {**asdict(estimate), "basis": basis}


def _spread(summary: Summary | None, basis: str | None) -> Json:
    return summary and {
        key: _number(getattr(summary, key), basis) for key in ("mean", "median", "p95")
    }


def _pool(record: DeploymentRecord, pool: PoolRecord) -> Json:
    is_prefill = pool.role == "prefill" and record.prefill_layout is not None
    memory = ("weight_bytes", "kv_bytes", "activation_bytes", "allowed_bytes", "device_bytes")
    steps = {each.phase: _simulated(each) for each in record.steps if each.pool == pool.role}
    return {
        "role": pool.role,
        "layout": _layout(record.prefill_layout if is_prefill else record.layout),  # type: ignore[arg-type]
        "memory": {key: getattr(pool, key) for key in (*memory, "num_resident")},
        "most_running": pool.most_running,
        "num_preemptions": pool.num_preemptions,
        "prefill": steps.get(Phase.PREFILL),
        "decode": steps.get(Phase.DECODE),
    }


def _simulated(step: StepsRecord) -> Json:
    num, traffic = step.num_steps, step.traffic
    assert traffic is not None
    same = (
        "num_steps", "shares", "floor_s", "flops_utilisation", "read_utilisation", "basis_shares",
        "extrapolated_share",
    )  # fmt: skip
    return {
        **{key: getattr(step, key) for key in same},
        "num_tokens": step.num_tokens / num,
        "num_seqs": step.num_seqs / num,
        "seconds": _number(step.wall_s, step.basis),
        "step_s": _spread(step.step_s, step.basis),
        "traffic_bytes": {
            link: {kind: round(bytes_ / num) for kind, bytes_ in asdict(each).items()}
            for link, each in traffic.by_link.items()
        },
        "sent_bytes": traffic.sent_bytes.get("payload", ()),
        "tokens_by_ranks_reached": traffic.fan_out.tokens_by_ranks_reached
        if traffic.fan_out
        else (),
        "rank_pairs": traffic.busiest_over_mean,
        "timeline": step.timeline and asdict(step.timeline),
    }


# plan


def _plan(results: Results) -> Json:
    plan, asked, cluster = results.plans[0], results.question, results.cluster
    assert cluster is not None

    def of(role: str) -> Iterable[DeploymentRecord]:
        return results.select("projected", role)

    two = [*of(TWO_POOLS), *of(PREFILL_POOL), *of(DECODE_POOL)]
    return {
        "schema_version": 2,
        "version": results.versions.expertlane,
        "model": asked["model"],
        "cluster": cluster.name,
        "device": cluster.device,
        **asked["workload"],
        "max_tpot_s": asked["max_tpot_s"],
        "max_ttft_s": asked["max_ttft_s"],
        "best": [_planned_deployment(each) for each in of(BEST)],
        "families": {each.name: _planned_deployment(each) for each in of(FAMILY)},
        "pareto": [_planned_deployment(each) for each in of(PARETO)],
        "two_pools": _two_pools(*two) if two else None,
        **{
            key: getattr(plan, key)
            for key in ("num_candidates", "num_too_large", "num_over_limits", "num_pool_candidates")
        },
        "commands": [asdict(each) for each in plan.commands],
        "experiment": plan.experiment,
        "assumptions": [
            {"name": each.name, "value": each.value, "change": each.change or "not an option"}
            for each in results.assumptions
        ],
        "cautions": results.cautions,
        "no_two_pools": plan.no_two_pools,
    }


def _planned_deployment(record: DeploymentRecord) -> Json:
    serving, pool = record.serving[0], record.pools[0]
    return {
        "layout": _layout(record.layout),
        "options": asdict(record.options),
        "num_sequences": serving.num_running,
        "tps": asdict(serving.output_tps),
        "tpot_s": _mean(serving.tpot_s),
        "ttft_s": _mean(serving.ttft_s),
        "prefill_tps": serving.prefill_tps and asdict(serving.prefill_tps),
        "why": record.why,
        "decode": record.decode and _step(record.decode),
        "prefill": record.prefill and _step(record.prefill),
        "weight_bytes": pool.weight_bytes,
        "activation_bytes": pool.activation_bytes,
        "sequence_bytes": pool.sequence_bytes,
        "timelines": _timelines(record),
    }


def _two_pools(
    together: DeploymentRecord, prefill: DeploymentRecord, decode: DeploymentRecord
) -> Json:
    serving = together.serving[0]
    return {
        "prefill": _planned_deployment(prefill),
        "decode": _planned_deployment(decode),
        "num_prefill_devices": prefill.num_ranks,
        "num_decode_devices": decode.num_ranks,
        "tps": asdict(serving.output_tps),
        "tpot_s": _mean(serving.tpot_s),
        "ttft_s": _mean(serving.ttft_s),
        "transfer_s": serving.transfer_s and asdict(serving.transfer_s),
    }
