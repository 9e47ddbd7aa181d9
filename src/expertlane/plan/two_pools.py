"""Prefill and decode on disjoint devices: how to part them, and what each pool should run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertlane.cost.cluster import ModelledCluster
from expertlane.cost.kv_transfer import ModelledKVTransfers
from expertlane.cost.links import LinkModel
from expertlane.cost.operation import Floats
from expertlane.errors import UserError
from expertlane.plan.search import Finalist, Option, Search
from expertlane.plan.setting import Goals, Setting, Traffic
from expertlane.plan.throughput import LIKELY, Served, two_pools
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig

_PARTS = 4  # the devices are cut into so many parts, of which some prefill
_NUM_PREFILL, _NUM_DECODE = 4, 12  # of each pool, the best by themselves are tried together


@dataclass(frozen=True, eq=False)
class TwoPools:
    """Two deployments side by side, at one number of running sequences.

    Attributes:
        prefill, decode: what each pool runs.
        transfer_s: [3]; of a prompt's keys and values from one to the other.
        served: [1]; place 0.
    """

    prefill: Finalist
    decode: Finalist
    transfer_s: Floats
    served: Served

    @property
    def tps(self) -> float:
        """Output tokens a second."""
        return float(self.served.tps[LIKELY, 0])


@dataclass(frozen=True, eq=False)
class _Pair:
    """As screened."""

    devices: tuple[int, int]
    prefill: Option
    decode: Option
    place: int
    tps: float


def search_two_pools(
    model: ModelConfig,
    cluster: ModelledCluster,
    traffic: Traffic,
    goals: Goals,
    setting: Setting,
) -> tuple[TwoPools | None, int]:
    """The best two pools, if any keep the limits; and how many deployments were tried."""
    links = LinkModel(cluster.profile)

    def transfer_s(prefill: Layout, decode: Layout) -> Floats:
        transfers = ModelledKVTransfers(
            model, setting.types, prefill, decode, links, remote=cluster.num_nodes > 1
        )
        return transfers.seconds(traffic.prompt_len)

    sizes = sorted({part * cluster.num_devices // _PARTS for part in range(1, _PARTS)} - {0})
    of_size: dict[int, list[Option]] = {}
    num_candidates = 0
    for size in sizes:
        search = Search(model, replace(cluster, num_devices=size), traffic, Goals(), setting)
        try:
            screened = search.screen(replace(cluster, num_devices=size))
        except UserError:  # no layout of so many devices
            continue
        num_candidates += len(screened)
        of_size[size] = search.options(screened)
    pairs = []
    for size, options in of_size.items():
        rest = of_size.get(cluster.num_devices - size)
        if options and rest:
            devices = size, cluster.num_devices - size
            pairs += _pairs(devices, options, rest, goals, traffic, transfer_s)
    if not pairs:
        return None, num_candidates
    best = max(pairs, key=lambda pair: pair.tps)
    finalists = []
    for size, option in zip(best.devices, (best.prefill, best.decode), strict=True):
        search = Search(model, replace(cluster, num_devices=size), traffic, goals, setting)
        place = best.place if option is best.decode else len(option.steps.num_seqs) - 1
        finalists.append(search.finish(replace(option, place=place)))
    prefill, decode = finalists
    moved_s = transfer_s(prefill.option.candidate.layout, decode.option.candidate.layout)
    served = two_pools(prefill.steps, decode.steps, moved_s, traffic)
    if served.best(goals) is None:
        return None, num_candidates
    return TwoPools(prefill, decode, moved_s, served), num_candidates


def _pairs(
    devices: tuple[int, int],
    prefill: Sequence[Option],
    decode: Sequence[Option],
    goals: Goals,
    traffic: Traffic,
    transfer_s: Callable[[Layout, Layout], Floats],
) -> list[_Pair]:
    """Those that keep the limits, of the best of each pool.

    Args:
        transfer_s: [3]; of a prompt's keys and values between two layouts.
    """
    fast = sorted(prefill, key=lambda each: -each.steps.prefill_tps[LIKELY])[:_NUM_PREFILL]
    if goals.max_ttft_s is not None:
        fast += sorted(prefill, key=lambda each: each.steps.prefill_s[LIKELY])[:_NUM_PREFILL]
    good = sorted(decode, key=lambda each: -_decode_tps(each, goals))[:_NUM_DECODE]
    pairs = []
    for first in fast:
        for second in good:
            moved_s = transfer_s(first.candidate.layout, second.candidate.layout)
            served = two_pools(first.steps, second.steps, moved_s, traffic)
            place = served.best(goals)
            if place is not None:
                tps = float(served.tps[LIKELY, place])
                pairs.append(_Pair(devices, first, second, place, tps))
    return pairs


def _decode_tps(option: Option, goals: Goals) -> float:
    """The most tokens a second of decoding alone within the limit of TPOT."""
    step_s = option.steps.decode_s[LIKELY]
    limit = np.inf if goals.max_tpot_s is None else goals.max_tpot_s
    tps = np.where(step_s <= limit, option.steps.num_seqs / step_s, 0)
    return float(tps.max())
