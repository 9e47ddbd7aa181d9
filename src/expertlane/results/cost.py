"""Dollars for a million tokens, by the price of a device."""

from dataclasses import replace

from expertlane.results.estimate import Estimate
from expertlane.results.record import DECODE_POOL, PREFILL_POOL, DeploymentRecord
from expertlane.results.results import EngineBest, PlanSummary, Results
from expertlane.results.serving_record import ServingRecord

_MILLION, _S_PER_HOUR = 1e6, 3600


def with_costs(results: Results, usd_per_hour: float) -> Results:
    """The results with each load's dollars for a million tokens.

    Devices that a deployment leaves idle are not counted. On CPUs, and of a server seen from
    outside, the price is of all that ran.

    Args:
        usd_per_hour: price of one device; kept as the question's `price`.
    """

    def priced(record: DeploymentRecord) -> DeploymentRecord:
        if record.roles and {*record.roles} <= {PREFILL_POOL, DECODE_POOL}:
            return record  # one of two pools: a token's price is that of both
        is_cpu = results.machine is not None and results.machine.device == "cpu"
        usd_per_s = usd_per_hour / _S_PER_HOUR * (1 if is_cpu else record.num_ranks or 1)

        def cost(tps: Estimate | None) -> Estimate | None:
            return None if tps is None else _MILLION * usd_per_s / tps

        serving = tuple(
            replace(
                each,
                usd_per_million_output=cost(each.output_tps),
                usd_per_million_total=cost(_total_tps(each, results)),
            )
            for each in record.serving
        )
        return replace(record, serving=serving)

    def of_engine(best: EngineBest) -> EngineBest:
        aggregated = None if best.aggregated is None else priced(best.aggregated)
        return replace(best, aggregated=aggregated, pools=tuple(map(priced, best.pools)))

    def of_plan(plan: PlanSummary) -> PlanSummary:
        return replace(plan, engines=tuple(map(of_engine, plan.engines)))

    return replace(
        results,
        question=results.question | {"price": usd_per_hour},
        deployments=tuple(map(priced, results.deployments)),
        plans=tuple(map(of_plan, results.plans)),
    )


def _total_tps(serving: ServingRecord, results: Results) -> Estimate | None:
    """Total tokens/s; of a plan, from its output by the ratio of lengths, which are all alike."""
    if serving.total_tps is not None or results.kind != "plan":
        return serving.total_tps
    workload: dict[str, int] = results.question["workload"]
    return serving.output_tps * (1 + workload["prompt_len"] / workload["output_len"])
