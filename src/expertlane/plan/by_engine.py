"""The best that each engine runs, where it does not run what was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from expertlane.cost.laws.execution import LIKELY
from expertlane.errors import UserError
from expertlane.plan.candidates import Candidate, PlanRequest
from expertlane.plan.engines import ENGINES, Engine, PairRow, Row
from expertlane.plan.screen import Screened
from expertlane.plan.search import Search
from expertlane.plan.simulated import BestFirst, in_full, simulate
from expertlane.plan.ties import Contender, Ranking, contender, pools_tps, ranked
from expertlane.plan.two_pools import TwoPools, TwoPoolSearch
from expertlane.results.results import NoPools
from expertlane.spec.workload import Workload

_MOST_SIMULATED = 3  # deployments of an engine that were not simulated before
_MOST_PAIRS = 2  # likewise of pools


@dataclass(frozen=True, eq=False)
class EngineChoice:
    """The best that an engine runs.

    Attributes:
        aggregated: None where it runs none that meets the limits.
        pools: disaggregated ones that may be better than `aggregated`.
        broken: what rules the plan's choice out; None where the engine runs it.
    """

    engine: Engine
    aggregated: Contender | None
    pools: TwoPools | None = None
    broken: Row | PairRow | None = None


def of_each_engine(
    search: Search,
    screened: Sequence[Screened],
    ranking: Ranking,
    pools: TwoPools | NoPools,
    of_pools: TwoPoolSearch,
) -> list[EngineChoice]:
    """The best of every engine; of the one that was asked for, what was chosen.

    Args:
        search: for one pool, by which `screened` and `ranking` were found.
        of_pools: by which `pools` were found.
    """
    found = pools if isinstance(pools, TwoPools) else None
    pools_win = _pools_win(pools, ranking, search.request.workload)
    if search.request.engine is not None:
        return [EngineChoice(ENGINES[search.request.engine], ranking.chosen, found)]
    choices = []
    for engine in ENGINES.values():
        aggregated = _aggregated(engine, search, screened, ranking)
        own_pools = None
        if found is not None and _may_win(found, aggregated):
            own_pools = _pools(engine, found, of_pools, search)
        if pools_win and found is not None:
            row = engine.broken_by_pools(*_candidates(found), search.request.model)
        else:
            row = engine.broken(ranking.chosen.finalist.candidate, search.request.model)
        choices.append(EngineChoice(engine, aggregated, own_pools, row))
    return choices


def ranked_again(
    choices: Sequence[EngineChoice],
    ranking: Ranking,
    request: PlanRequest,
    pools: TwoPools | NoPools,
) -> tuple[Ranking, list[EngineChoice]]:
    """With what was simulated for engines ranked among all: none has more than what is chosen."""
    model, goals = request.model, request.goals
    found = {id(each.aggregated): each.aggregated for each in choices if each.aggregated}
    more = [each for each in found.values() if each not in ranking.contenders]
    if not more:
        return ranking, list(choices)
    ranking = ranked([*ranking.contenders, *more], goals)
    anew = []
    for choice in choices:
        engine = choice.engine
        own = [each for each in ranking.contenders if engine.runs(each.finalist.candidate, model)]
        aggregated = ranked(own, goals).chosen if own else None
        row = choice.broken
        if not _pools_win(pools, ranking, request.workload):
            row = engine.broken(ranking.chosen.finalist.candidate, model)
        anew.append(replace(choice, aggregated=aggregated, broken=row))
    return ranking, anew


def _pools_win(pools: TwoPools | NoPools, ranking: Ranking, workload: Workload) -> bool:
    """Whether disaggregated pools are faster than what was chosen, beyond their errors."""
    if not isinstance(pools, TwoPools):
        return False
    return pools_tps(pools, workload).over(ranking.chosen.tps).bounds[0] > 1


def _candidates(pools: TwoPools) -> tuple[Candidate, Candidate]:
    return pools.prefill.candidate, pools.decode.candidate


def _may_win(pools: TwoPools, aggregated: Contender | None) -> bool:
    """Whether the best pools of all have more tokens a second than an engine's best server."""
    tps = float(pools.served.tps[LIKELY, 0])
    return aggregated is None or tps > aggregated.tps.value


def _pools(
    engine: Engine, found: TwoPools, of_pools: TwoPoolSearch, search: Search
) -> TwoPools | None:
    if engine.joins(*_candidates(found), search.request.model):
        return found
    own = of_pools.best(engine.name, _MOST_PAIRS)
    return own if isinstance(own, TwoPools) else None


def _aggregated(
    engine: Engine, search: Search, screened: Sequence[Screened], ranking: Ranking
) -> Contender | None:
    """The chosen one where the engine runs it; else the best of those that it runs."""
    request = search.request
    if engine.runs(ranking.chosen.finalist.candidate, request.model):
        return ranking.chosen
    own = Search(replace(request, engine=engine.name), search.known)
    try:
        options = own.options(screened)
    except UserError:  # it runs nothing that fits
        return None
    contenders = [
        each for each in ranking.contenders if engine.runs(each.finalist.candidate, request.model)
    ]
    known = {each.finalist.candidate for each in contenders}
    others = [each for each in options if each.candidate not in known]
    run = partial(simulate, request=request)
    found = BestFirst(others, request, run, lambda _: None, _MOST_SIMULATED).result()
    if found.kept and (told := in_full(request, run, found.kept[0])) is not None:
        finalist = own.finish(told.option).simulated(told.served)
        contenders.append(contender(finalist, request.workload))
    return ranked(contenders, request.goals).chosen if contenders else None
