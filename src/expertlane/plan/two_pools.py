"""Prefill and decode on disjoint devices: how to part them, and what each pool should run."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np

from expertlane.cost.kv_transfer import KVTransfers
from expertlane.cost.laws.execution import LIKELY
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.step.operation import Floats
from expertlane.plan.candidates import Candidate, Goals, PlanRequest
from expertlane.plan.engines import ENGINES
from expertlane.plan.screen import Known, ScreenedCandidate, fitting
from expertlane.plan.search import Finalist, Search
from expertlane.plan.simulated import simulate_pools
from expertlane.plan.throughput import ThroughputCurve, two_pools
from expertlane.results.record import PoolRole
from expertlane.results.results import NoPools
from expertlane.spec.layout import Layout, divisors
from expertlane.spec.names import EngineName

_PARTS = 4  # of a cluster of one node, of which some prefill
_MOST_PARTS = 8  # of one of many, each of whole nodes
_MOST_EXHAUSTIVE = 96  # devices, up to which pools take any layout
_NUM_SHAPES = 48  # for prefill, and for each number of sequences for decode
_NUM_PREFILL, _NUM_DECODE = 4, 12  # of each pool, the best by themselves are tried together
_MOST_TRIED = 6  # pairs that are simulated


@dataclass(frozen=True, eq=False)
class TwoPools:
    """Two deployments side by side, at one number of running sequences.

    Attributes:
        prefill, decode: what each pool runs.
        transfer_s: [3]; of a prompt's keys and values from one to the other.
        served: as simulated; place 0.
        formula: by the formula over steps in full.
    """

    prefill: Finalist
    decode: Finalist
    transfer_s: Floats
    served: ThroughputCurve
    formula: ThroughputCurve


@dataclass(frozen=True, eq=False)
class _Pair:
    """As screened; `decode` at its number of sequences."""

    sizes: tuple[int, int]
    prefill: ScreenedCandidate
    decode: ScreenedCandidate
    tps: float


class TwoPoolSearch:
    """Plans disaggregated pools on a cluster.

    Args:
        known: by a search for one pool.
        shapes: found by it; of large clusters, the best replicas of these alone are tried.
    """

    def __init__(
        self,
        request: PlanRequest,
        known: Known | None = None,
        shapes: Sequence[ScreenedCandidate] = (),
    ) -> None:
        known = known or Known()
        self._request = request
        self._links = LinkModel(request.cluster.profile)
        cluster = request.cluster
        num_devices = cluster.num_devices
        sizes = _prefill_sizes(num_devices, cluster.profile.ranks_per_node)
        searches = {
            size: Search(
                replace(request, cluster=replace(cluster, num_devices=size), goals=Goals()),
                known,
            )
            for size in sorted(sizes | {num_devices - size for size in sizes})
        }
        if shapes and cluster.num_devices > _MOST_EXHAUSTIVE:
            kept = _best_shapes(shapes, request.goals)
            for size, search in searches.items():
                search.candidates = _of_size(kept, size)
        self._searches = {size: each for size, each in searches.items() if each.candidates}
        splits = [(size, num_devices - size) for size in sorted(sizes)]
        self._splits = [each for each in splits if set(each) <= set(self._searches)]
        self._options: dict[int, list[ScreenedCandidate]] = {}
        self._simulated: dict[tuple[Candidate, Candidate, int], ThroughputCurve | None] = {}

    @property
    def num_candidates(self) -> int:
        """Deployments of the pools."""
        sizes = {size for split in self._splits for size in split}
        return sum(len(self._searches[size].candidates) for size in sizes)

    def run(self, advance: Callable[[int], None] = lambda _: None) -> TwoPools | NoPools:
        """The best disaggregated pools, or why there are none.

        Args:
            advance: called with a number of candidates that are done.
        """
        engine = self._request.engine
        if engine is not None and ENGINES[engine].pairs is None:
            return "not run"
        if not self._splits:
            return "no split"
        for size in sorted({size for split in self._splits for size in split}):
            self._options[size] = fitting(self._searches[size].screen(advance))
        return self.best(engine)

    def best(self, engine: EngineName | None, most: int = _MOST_TRIED) -> TwoPools | NoPools:
        """The best of those screened that an engine runs, or why there are none.

        Args:
            most: pairs that are simulated.
        """
        splits = [split for split in self._splits if all(self._options.get(size) for size in split)]
        if not splits:
            return "too large"
        if engine is not None:
            splits = [split for split in splits if all(self._of_roles(split, engine))]
            if not splits:
                return "not run"
        pairs = [pair for split in splits for pair in self._pairs(split, engine)]
        return self._best_simulated(sorted(pairs, key=lambda pair: -pair.tps), most)

    def _of_roles(
        self, sizes: tuple[int, int], engine: EngineName | None
    ) -> list[list[ScreenedCandidate]]:
        """What pools of these sizes may run for prefill, and for decode."""
        options = [self._options[size] for size in sizes]
        if engine is None:
            return options
        runs, model = ENGINES[engine].runs, self._request.model
        roles: tuple[PoolRole, PoolRole] = "prefill", "decode"
        return [
            [each for each in some if runs(each.candidate, model, role)]
            for some, role in zip(options, roles, strict=True)
        ]

    def _best_simulated(self, pairs: Sequence[_Pair], most: int) -> TwoPools | NoPools:
        """The first that keeps the limits when it is simulated too."""
        too_slow: set[tuple[object, int]] = set()
        num_tried = 0
        why: NoPools = "over limits"
        for pair in pairs:
            decoding = pair.decode.candidate, pair.decode.num_seqs
            if decoding in too_slow or num_tried == most:
                continue
            num_tried += 1
            key = pair.prefill.candidate, *decoding
            if key not in self._simulated:
                self._simulated[key] = simulate_pools(pair.prefill, pair.decode, self._request)
            served = self._simulated[key]
            if served is None:
                why = "not simulated"
            elif served.best(self._request.goals) is not None:
                return self._in_full(pair, served)
            elif served.breach(replace(self._request.goals, max_ttft_s=None))[0] > 1:
                too_slow.add(decoding)
        return why

    def _in_full(self, pair: _Pair, simulated: ThroughputCurve) -> TwoPools:
        prefill, decode = (
            self._searches[size].finish(option)
            for size, option in zip(pair.sizes, (pair.prefill, pair.decode), strict=True)
        )
        transfer_s = self._transfer_s(prefill.candidate.layout, decode.candidate.layout)
        served = two_pools(prefill.steps, decode.steps, transfer_s, self._request.workload)
        return TwoPools(prefill, decode, transfer_s, decode.with_skew(simulated), served)

    def _transfer_s(self, prefill: Layout, decode: Layout) -> Floats:
        """[3]; of a prompt's keys and values."""
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
        known = None if engine is None else ENGINES[engine]
        fast = sorted(prefill, key=lambda each: -each.steps.prefill_tps[LIKELY])[:_NUM_PREFILL]
        if goals.max_ttft_s is not None:
            fast += sorted(prefill, key=lambda each: each.steps.prefill_s[LIKELY])[:_NUM_PREFILL]
        good = sorted(decode, key=lambda each: -_decode_tps(each, goals))[:_NUM_DECODE]
        for first, second in product(fast, good):
            if known is not None and not known.joins(first.candidate, second.candidate, model):
                continue
            whole = replace(first, place=len(first.steps.num_seqs) - 1)
            moved_s = self._transfer_s(first.candidate.layout, second.candidate.layout)
            served = two_pools(first.steps, second.steps, moved_s, self._request.workload)
            for place in np.flatnonzero(served.breach(goals) <= 1).tolist():
                tps = float(served.tps[LIKELY, place])
                yield _Pair(sizes, whole, replace(second, place=place), tps)


def _decode_tps(option: ScreenedCandidate, goals: Goals) -> float:
    """The most tokens a second of decoding alone within the limit of TPOT."""
    step_s = option.steps.token_s[LIKELY]
    limit = np.inf if goals.max_tpot_s is None else goals.max_tpot_s
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
    """Tokens a second of decoding alone, the number of sequences halved so many times."""
    place = len(option.steps.num_seqs) - 1 - halvings
    if place < 0:
        return 0.0
    return float(option.steps.num_seqs[place] / option.steps.token_s[LIKELY, place])


def _of_size(candidates: Sequence[Candidate], num_devices: int) -> list[Candidate]:
    """The same replicas, as many as so many devices hold."""
    return [
        each._replace(layout=replace(each.layout, replicas=num_devices // size))
        for each in candidates
        if num_devices % (size := each.layout.replica_size) == 0
    ]


def _prefill_sizes(num_devices: int, per_node: int) -> set[int]:
    """How many devices may prefill: whole nodes; of one node, parts."""
    if num_devices < 2 * per_node or num_devices % per_node:
        return {part * num_devices // _PARTS for part in range(1, _PARTS)} - {0}
    num_nodes = num_devices // per_node
    few = [each for each in divisors(num_nodes) if each <= _MOST_PARTS]
    num_parts = few[-1] if few[-1] > _PARTS else min(num_nodes, _MOST_PARTS)
    return {part * num_nodes // num_parts * per_node for part in range(1, num_parts)}
