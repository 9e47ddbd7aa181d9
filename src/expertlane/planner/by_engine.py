"""The best deployment of each engine, where it does not run the plan's choice."""

from dataclasses import dataclass

from expertlane.cost.laws.execution import LIKELY
from expertlane.planner.candidates import Candidate
from expertlane.planner.engines import Engine, PairRow, Row, engines_on
from expertlane.planner.search import Search
from expertlane.planner.ties import Contender, Ranking, pools_win, ranked
from expertlane.planner.two_pools import TwoPools, TwoPoolSearch
from expertlane.results.results import NoPools

_MOST_PAIRS = 2  # pairs of pools simulated for an engine


@dataclass(frozen=True, eq=False)
class EngineChoice:
    """The best deployment that an engine runs.

    Attributes:
        aggregated: None where it runs none that meets the limits.
        pools: disaggregated pools that may be better than `aggregated`.
        broken: the rule that excludes the plan's choice; None where the engine runs it.
    """

    engine: Engine
    aggregated: Contender | None
    pools: TwoPools | None = None
    broken: Row | PairRow | None = None


def of_each_engine(
    search: Search,
    ranking: Ranking,
    pools: TwoPools | NoPools,
    of_pools: TwoPoolSearch,
) -> list[EngineChoice]:
    """The best deployment of every engine, or of the one asked for.

    Args:
        search: the search of one pool that found `ranking`.
        of_pools: the search that found `pools`.
    """
    found = pools if isinstance(pools, TwoPools) else None
    workload = search.request.workload
    is_split = found is not None and pools_win(found, ranking.chosen, workload)
    engines = engines_on(search.request.cluster.profile)
    if search.request.engine is not None:
        return [EngineChoice(engines[search.request.engine], ranking.chosen, found)]
    choices = []
    for engine in engines.values():
        aggregated = _aggregated(engine, search, ranking)
        own_pools = None
        if found is not None and _may_win(found, aggregated):
            own_pools = _pools(engine, found, of_pools, search)
        if is_split and found is not None:
            row = engine.broken_by_pools(*_candidates(found), search.request.model)
        else:
            row = engine.broken(ranking.chosen.finalist.candidate, search.request.model)
        choices.append(EngineChoice(engine, aggregated, own_pools, row))
    return choices


def _candidates(pools: TwoPools) -> tuple[Candidate, Candidate]:
    return pools.prefill.candidate, pools.decode.candidate


def _may_win(pools: TwoPools, aggregated: Contender | None) -> bool:
    """True if the best pools have more tokens/s than an engine's best aggregated server."""
    tps = float(pools.served.tps[LIKELY, 0])
    return aggregated is None or tps > aggregated.tps.value


def _pools(
    engine: Engine, found: TwoPools, of_pools: TwoPoolSearch, search: Search
) -> TwoPools | None:
    if engine.joins(*_candidates(found), search.request.model):
        return found
    own = of_pools.best(engine.name, _MOST_PAIRS)
    return own if isinstance(own, TwoPools) else None


def _aggregated(engine: Engine, search: Search, ranking: Ranking) -> Contender | None:
    """The chosen one where the engine runs it; else the best of those that it runs."""
    model = search.request.model
    if engine.runs(ranking.chosen.finalist.candidate, model):
        return ranking.chosen
    contenders = [
        each for each in ranking.contenders if engine.runs(each.finalist.candidate, model)
    ]
    return ranked(contenders, search.request.goals).chosen if contenders else None
