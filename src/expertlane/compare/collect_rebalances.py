"""What results say of experts that moved while a workload ran."""

from collections.abc import Sequence

from expertlane.engine.rebalancing import Rebalance, RebalancingRunner, StepLoad
from expertlane.results.rebalance import RebalanceResult


def rebalance_results(runner: RebalancingRunner) -> tuple[RebalanceResult, ...]:
    """All decisions of a run, with the loads seen before and after."""
    return tuple(_result(each, runner) for each in runner.decisions)


def _result(taken: Rebalance, runner: RebalancingRunner) -> RebalanceResult:
    num_steps = taken.decision.num_steps
    own = [each for each in runner.loads if each.replica == taken.replica]
    before = [each for each in own if each.step < taken.step][-num_steps:]
    after: list[StepLoad] = []
    if taken.switched is not None:
        later = [each for each in runner.decisions if each.replica == taken.replica]
        ends = [each.switched for each in later if (each.switched or 0) > taken.switched]
        until = min((end for end in ends if end is not None), default=own[-1].step + 1)
        after = [each for each in own if taken.switched <= each.step < until][:num_steps]
    return RebalanceResult(
        replica=taken.replica,
        step=taken.step,
        switched=taken.switched,
        gain_s=taken.decision.gain_s,
        cost_s=taken.decision.cost_s,
        num_bytes=taken.decision.num_bytes,
        predicted_before=taken.predicted_before,
        predicted_after=taken.predicted_after,
        load_before=_load(before),
        load_after=_load(after) if after else None,
        experts_s_before=_experts_s(before),
        experts_s_after=_experts_s(after) if after else None,
    )


def _load(steps: Sequence[StepLoad]) -> float:
    return sum(each.most for each in steps) / sum(each.mean for each in steps)


def _experts_s(steps: Sequence[StepLoad]) -> float:
    return sum(each.experts_s for each in steps) / len(steps)
