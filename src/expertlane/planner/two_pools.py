"""Prefill and decode on disjoint devices: the split of devices, and each pool's deployment."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product

import numpy as np

from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import LIKELY
from expertlane.cost.memory import KVTransfers
from expertlane.cost.step.operation import Floats
from expertlane.cost.throughput import Goals, ThroughputCurve, two_pools
from expertlane.planner.candidates import Candidate, PlanRequest
from expertlane.planner.engines import engines_on
from expertlane.planner.screen import ScreenCache, ScreenedCandidate, fitting
from expertlane.planner.search import Finalist, Ratios, Search
from expertlane.planner.simulated import divide_alike, serve_at_rate, simulate_pools
from expertlane.results.record import PoolRole
from expertlane.results.results import NoPools
from expertlane.results.serving_record import KEPT, ServingRecord, is_served
from expertlane.simulator.steady import PrefillRates
from expertlane.spec.layout import Layout, divisors
from expertlane.spec.names import EngineName, Phase

_PARTS = 4  # parts that a cluster of one node is cut into
_MOST_NODES = 16  # up to so many, a cluster may be split at any node
_MOST_PARTS = 8  # parts that a larger cluster is cut into at most, each of whole nodes
_MOST_EXHAUSTIVE = 128  # devices, up to which pools take any layout
_NUM_SHAPES = 48  # for prefill, and for each number of sequences for decode
_NUM_PREFILL, _NUM_DECODE = 4, 12  # best options of each pool that are combined
_MOST_TRIED = 6  # pairs that are simulated
_MOST_WORSE = 2  # splits in a row that are no better, before those further on are left out
_FEWER = 0.97  # share of the sequences that broke a limit, at most, in the next trial
_SLACK = 1.05  # a smaller pool has at most so many times the tokens a second of a larger one


@dataclass(frozen=True, eq=False)
class TwoPools:
    """Two deployments side by side, at one number of running sequences.

    Attributes:
        prefill, decode: the deployment of each pool.
        transfer_s: [3]; seconds of a prompt's KV transfer.
        served: throughput as simulated; place 0.
        at_rate: record of an open load served at its rate; None for a closed load.
    """

    prefill: Finalist
    decode: Finalist
    transfer_s: Floats
    served: ThroughputCurve
    at_rate: ServingRecord | None = None


@dataclass(frozen=True, eq=False)
class _Pair:
    """A pair of pools as screened; `decode` at its number of sequences."""

    sizes: tuple[int, int]
    prefill: ScreenedCandidate
    decode: ScreenedCandidate
    tps: float


class TwoPoolSearch:
    """Plans disaggregated pools on a cluster.

    Args:
        known: results of a search for one pool.
        shapes: options of that search; on large clusters only their best replicas are tried.
    """

    def __init__(
        self,
        request: PlanRequest,
        known: ScreenCache | None = None,
        shapes: Sequence[ScreenedCandidate] = (),
    ) -> None:
        known = known or ScreenCache()
        self._request = request
        cluster = request.cluster
        self._links = LinkModel(cluster.profile)
        self._engines = engines_on(cluster.profile)
        num_devices = cluster.num_devices
        sizes = _prefill_sizes(num_devices, cluster.profile.ranks_per_node)
        self._searches = {
            size: Search(
                replace(request, cluster=replace(cluster, num_devices=size), goals=Goals()),
                known,
                are_pools=True,
            )
            for size in sorted(sizes | {num_devices - size for size in sizes})
        }
        if shapes and cluster.num_devices > _MOST_EXHAUSTIVE:
            kept = _best_shapes(shapes, request.goals)
            for size, search in self._searches.items():
                search.candidates = _of_size(kept, size)
        self._splits = [(size, num_devices - size) for size in sorted(sizes)]
        self._first = self._likeliest(shapes) if self._splits else 0
        self._options: dict[int, list[ScreenedCandidate]] = {}
        self._found: dict[int, list[_Pair]] = {}
        self._simulated: dict[object, ThroughputCurve | None] = {}
        self._prefill_rates: PrefillRates = {}
        self._known_in_full: dict[object, TwoPools] = {}

    @property
    def num_splits(self) -> int:
        """Ways to share out the devices."""
        return len(self._splits)

    @property
    def num_candidates(self) -> int:
        """Deployments of the pools that were screened."""
        return sum(len(self._searches[size].candidates) for size in self._options)

    def run(self, advance: Callable[[int], None] = lambda _: None) -> TwoPools | NoPools:
        """The best disaggregated pools, or why there are none.

        The likeliest split comes first, then others on both sides as far as they may be better; all
        others where what was found so breaks a limit when it is simulated.

        Args:
            advance: called with 1 for each split that is done.
        """
        engine = self._request.engine
        if engine is not None and self._engines[engine].pairs is None:
            return "not run"
        if not self._splits:
            return "no split"
        self._screen(self._first, advance)
        for step in (1, -1):
            place, num_worse = self._first + step, 0
            while 0 <= place < len(self._splits) and self._may_be_better(place - step, step):
                best_tps = self._best_tps
                self._screen(place, advance)
                num_worse = num_worse + 1 if self._best_tps == best_tps > 0 else 0
                if num_worse == _MOST_WORSE:
                    break
                place += step
        found = self._best_simulated(self._pairs_of(list(self._found)), _MOST_TRIED)
        left = [place for place in range(len(self._splits)) if place not in self._found]
        if isinstance(found, TwoPools):
            advance(len(left))
            return found
        for place in left:
            self._screen(place, advance)
        if pairs := self._pairs_of(left):
            return self._best_simulated(pairs, _MOST_TRIED)
        if not any(all(map(self._has_any, split)) for split in self._splits):
            return "no split" if engine is None else "not run"
        if not any(all(map(self._options.get, split)) for split in self._splits):
            return "too large"
        return found

    def _likeliest(self, shapes: Sequence[ScreenedCandidate]) -> int:
        """Index of the split with both pools equally fast, estimated from one pool's options.

        Args:
            shapes: screened; the middle where there are none.
        """
        decode = max((_decode_tps(each, self._request.goals) for each in shapes), default=1.0)
        prefill = max(map(self._feed_tps, shapes), default=1.0)
        wanted = self._request.cluster.num_devices * decode / ((decode + prefill) or 1.0)
        return min(range(len(self._splits)), key=lambda place: abs(self._splits[place][0] - wanted))

    def _feed_tps(self, option: ScreenedCandidate) -> float:
        """Output tokens/s that its prefill keeps up with."""
        workload = self._request.workload
        prefill_tps = float(option.steps.prefill_tps[LIKELY])
        return prefill_tps / option.steps.prompts.length * workload.output_len

    def _screen(self, place: int, advance: Callable[[int], None]) -> None:
        """Find the pairs of a split."""
        sizes = self._splits[place]
        for size in sizes:
            if size not in self._options:
                search = self._searches[size]
                screened = search.screen() if search.candidates else []
                self._options[size] = fitting(screened)
        self._found[place] = list(self._pairs(sizes, self._request.engine))
        advance(1)

    def _may_be_better(self, place: int, step: int) -> bool:
        """True if a split beside a screened one may be better than all screened ones.

        Args:
            step: 1 where it has more devices for prefill, so fewer that decode; else -1.
        """
        prefill, decode = (self._options[size] for size in self._splits[place])
        goals = self._request.goals
        rates = (
            [_decode_tps(each, goals) for each in decode]
            if step > 0
            else list(map(self._feed_tps, prefill))
        )
        return _SLACK * max(rates, default=0.0) > self._best_tps

    @property
    def _best_tps(self) -> float:
        """Tokens/s of the best pair so far; 0 without any."""
        return max((pair.tps for pairs in self._found.values() for pair in pairs), default=0.0)

    def _pairs_of(self, places: Sequence[int]) -> list[_Pair]:
        """Pairs of some screened splits, the best first."""
        found = (pair for place in places for pair in self._found[place])
        return sorted(found, key=lambda pair: -pair.tps)

    def _has_any(self, size: int) -> bool:
        """True if any deployment has so many devices."""
        return bool(self._searches[size].candidates)

    def best(self, engine: EngineName, most: int) -> TwoPools | NoPools:
        """The best of the splits that were screened that an engine runs, or why there are none.

        Args:
            most: pairs that are simulated.
        """
        splits = [self._splits[place] for place in self._found]
        if not any(all(self._of_roles(split, engine)) for split in splits):
            return "not run"
        pairs = [pair for split in splits for pair in self._pairs(split, engine)]
        return self._best_simulated(sorted(pairs, key=lambda pair: -pair.tps), most)

    def _of_roles(
        self, sizes: tuple[int, int], engine: EngineName | None
    ) -> list[list[ScreenedCandidate]]:
        """Options of pools of these sizes for prefill, and for decode."""
        options = [self._options[size] for size in sizes]
        if engine is None:
            return options
        runs, model = self._engines[engine].runs, self._request.model
        roles: tuple[PoolRole, PoolRole] = "prefill", "decode"
        return [
            [each for each in some if runs(each.candidate, model, role)]
            for some, role in zip(options, roles, strict=True)
        ]

    def _best_simulated(self, pairs: Sequence[_Pair], most: int) -> TwoPools | NoPools:
        """The best pair that meets the limits when simulated.

        First simulates each pool by itself, in order of expected tokens/s: screened ones times the
        ratio of simulated to screened of their kind of decode pool.

        Args:
            most: pairs to simulate.
        """
        ratios = Ratios()
        kept: list[tuple[float, _Pair]] = []
        waiting = list(pairs)
        why: NoPools = "over limits"
        for _ in range(most):
            expected = [pair.tps * ratios.expected(_kinds_of(pair.decode)) for pair in waiting]
            place = max(range(len(waiting)), key=expected.__getitem__, default=None)
            best_tps = max((tps for tps, _ in kept), default=0.0)
            if place is None or expected[place] <= best_tps:
                break
            pair = waiting.pop(place)
            served = self._simulated_pair(pair, apart=True)
            if served is None:
                why = "not simulated"
                continue
            tps = float(served.tps[LIKELY, 0])
            ratios.add(_kinds_of(pair.decode), tps / pair.tps)
            if served.breach(self._request.goals)[0] <= KEPT:
                kept.append((tps, pair))
            elif (fewer := self._with_fewer(pair, served)) is not None:
                waiting.append(fewer)
        in_full: list[TwoPools] = []
        for _, pair in sorted(kept, key=lambda each: -each[0]):
            served = self._simulated_pair(pair, apart=False)
            if served is not None and served.breach(self._request.goals)[0] <= KEPT:
                in_full.append(self._in_full(pair, served))
                if is_served(in_full[-1].at_rate):
                    return in_full[-1]
        return in_full[0] if in_full else why

    def _with_fewer(self, pair: _Pair, served: ThroughputCurve) -> _Pair | None:
        """The pair with as many sequences as its decode pool may have within the limit of TPOT.

        Where TPOT keeps that, with no more than prefill keeps up with, so that fewer wait for it.
        None where that is not fewer, or not even one sequence may.
        """
        limit, tpot_s = self._request.goals.of_means[0] or np.inf, float(served.tpot_s[LIKELY, 0])
        tps = float(served.tps[LIKELY, 0])
        if tpot_s <= KEPT * limit:
            num = int(tps * tpot_s)
        else:
            formula = float(pair.decode.steps.token_s[LIKELY, pair.decode.place or 0])
            least = int(pair.decode.num_seqs * limit / tpot_s)  # as if a step grew with sequences
            num = max(_most_within(pair.decode, self._request.goals, tpot_s / formula), least)
            num = min(num, int(_FEWER * pair.decode.num_seqs))
            tps = tps * num / pair.decode.num_seqs * (tpot_s / limit)
        if not 1 <= num <= _FEWER * pair.decode.num_seqs:
            return None
        return replace(pair, decode=pair.decode.at(num, self._request.workload), tps=tps)

    def _simulated_pair(self, pair: _Pair, *, apart: bool) -> ThroughputCurve | None:
        """Simulated throughput of a pair; None if it cannot be simulated. Each is run once.

        Args:
            apart: each pool by itself, at a fraction of the cost.
        """
        known, decode = self._simulated, pair.decode
        key = pair.prefill.candidate, decode.candidate, decode.num_seqs, apart
        if key not in known:
            num = None
            if not apart and (found := self._simulated_pair(pair, apart=True)) is not None:
                num = int(found.num_seqs[0])
            known[key] = simulate_pools(
                pair.prefill, decode, self._request, num, self._prefill_rates
            )
        return known[key]

    def _in_full(self, pair: _Pair, simulated: ThroughputCurve) -> TwoPools:
        """A simulated pair with both pools projected in full."""
        key = pair.prefill.candidate, pair.decode.candidate, pair.decode.num_seqs
        if key in self._known_in_full:
            return self._known_in_full[key]
        prefill, decode = (
            self._searches[size].finish(option, [phase])
            for size, option, phase in zip(
                pair.sizes, (pair.prefill, pair.decode), Phase, strict=True
            )
        )
        transfer_s = self._transfer_s(prefill.candidate.layout, decode.candidate.layout)
        at_rate = None
        if self._request.rate is not None:
            at_rate = serve_at_rate(self._request, pair.decode, pair.prefill)
        served = decode.with_skew(simulated)
        in_full = self._known_in_full[key] = TwoPools(prefill, decode, transfer_s, served, at_rate)
        return in_full

    def _transfer_s(self, prefill: Layout, decode: Layout) -> Floats:
        """[3]; seconds of a prompt's KV transfer."""
        transfers = KVTransfers(
            self._request.model,
            self._request.setting.types,
            prefill,
            decode,
            self._links,
            remote=self._request.cluster.num_nodes > 1,
        )
        return transfers.seconds(self._request.workload.prompt_len)

    def _pairs(self, sizes: tuple[int, int], engine: EngineName | None) -> Iterator[_Pair]:
        """Pairs of each pool's best candidates that keep the limits, and that an engine runs."""
        goals, model = self._request.goals, self._request.model
        prefill, decode = self._of_roles(sizes, engine)
        known = None if engine is None else self._engines[engine]

        def fits(second: ScreenedCandidate, first: ScreenedCandidate) -> bool:
            """True if both can be one deployment, and be simulated."""
            joins = known is None or known.joins(first.candidate, second.candidate, model)
            return joins and divide_alike(first.candidate.layout, second.candidate.layout)

        orders = [sorted(prefill, key=lambda each: -each.steps.prefill_tps[LIKELY])]
        if goals.of_means[1] is not None:
            orders.append(sorted(prefill, key=lambda each: each.steps.prefill_s[LIKELY]))
        good = sorted(decode, key=lambda each: -_decode_tps(each, goals))[:_NUM_DECODE]
        good = [each.at(_most_within(each, goals), self._request.workload) for each in good]
        for second, order in product(good, orders):
            for first in islice(filter(partial(fits, second), order), _NUM_PREFILL):
                whole = replace(first, place=len(first.steps.num_seqs) - 1)
                moved_s = self._transfer_s(first.candidate.layout, second.candidate.layout)
                served = two_pools(first.steps, second.steps, moved_s, self._request.workload)
                for place in np.flatnonzero(served.breach(goals) <= 1).tolist():
                    tps = float(served.tps[LIKELY, place])
                    yield _Pair(sizes, whole, replace(second, place=place), tps)


def _kinds_of(decode: ScreenedCandidate) -> list[object]:
    """Kinds whose members have alike ratios of simulated to screened, from narrow to wide."""
    layout, options, _ = decode.candidate
    rotates = options.micro_batch_schedule == "rotating"
    how = options.overlap, layout.pp > 1, rotates, layout.ep > 1
    return [(layout, options), (layout.dp, layout.pp, how), how]


def _most_within(option: ScreenedCandidate, goals: Goals, factor: float = 1.0) -> int:
    """Sequences that a pool may decode within the limit of TPOT, one at least.

    Args:
        factor: factor of a step's time over the formula's.
    """
    limit = goals.of_means[0] or np.inf
    return max(
        1, int(np.interp(limit, option.steps.token_s[LIKELY] * factor, option.steps.num_seqs))
    )


def _decode_tps(option: ScreenedCandidate, goals: Goals) -> float:
    """The most decoded tokens/s within the limit of TPOT, without prefill."""
    step_s = option.steps.token_s[LIKELY]
    limit = goals.of_means[0] or np.inf
    tps = np.where(step_s <= limit, option.steps.num_seqs / step_s, 0)
    return float(tps.max())


def _best_shapes(screened: Sequence[ScreenedCandidate], goals: Goals) -> list[Candidate]:
    """Deployments whose replicas compute prompts, or decode, fastest for each device."""
    chosen: dict[Candidate, None] = {}

    def choose(value: Callable[[ScreenedCandidate], float]) -> None:
        best = heapq.nlargest(_NUM_SHAPES, screened, value)
        chosen.update(dict.fromkeys(each.candidate for each in best))

    choose(lambda each: float(each.steps.prefill_tps[LIKELY]))
    choose(lambda each: -float(each.steps.prefill_s[LIKELY]))
    choose(lambda each: _decode_tps(each, goals))
    most = max((len(each.steps.num_seqs) for each in screened), default=0)
    for halvings in range(most):
        choose(partial(_decode_tps_at, halvings))
    return list(chosen)


def _decode_tps_at(halvings: int, option: ScreenedCandidate) -> float:
    """Decoded tokens/s, without prefill, with the number of sequences halved so many times."""
    place = len(option.steps.num_seqs) - 1 - halvings
    if place < 0:
        return 0.0
    return float(option.steps.num_seqs[place] / option.steps.token_s[LIKELY, place])


def _of_size(candidates: Sequence[Candidate], num_devices: int) -> list[Candidate]:
    """Candidates with as many of the same replicas as `num_devices` hold exactly."""
    return [
        each._replace(layout=replace(each.layout, replicas=num_devices // size))
        for each in candidates
        if num_devices % (size := each.layout.replica_size) == 0
    ]


def _prefill_sizes(num_devices: int, per_node: int) -> set[int]:
    """Numbers of devices for prefill: whole nodes; parts of one node."""
    if num_devices < 2 * per_node or num_devices % per_node:
        return {part * num_devices // _PARTS for part in range(1, _PARTS)} - {0}
    num_nodes = num_devices // per_node
    if num_nodes <= _MOST_NODES:
        return {num * per_node for num in range(1, num_nodes)}
    few = [each for each in divisors(num_nodes) if each <= _MOST_PARTS]
    num_parts = few[-1] if few[-1] > _PARTS else min(num_nodes, _MOST_PARTS)
    return {part * num_nodes // num_parts * per_node for part in range(1, num_parts)}
