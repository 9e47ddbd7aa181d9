"""How skewed routing is: published statistics of experts' loads, and the exponent that has each.

python calibration/popularity.py              prints Markdown
python calibration/popularity.py Nemotron-30B some of the models

Routing is taken as a projection draws it: the expert at place i of an order has a weight of
(1 + i)^-exponent, and a token draws its experts by weight, none twice. The default of every
projection, and its bounds, stand in `expertlane.spec.ranges`.

aiconfigurator draws loads, not experts, from a power law, so its exponents are not ours: of the
density x^-1.01 of loads between 1 and 0.8 of the tokens, the busiest fifth of 256 experts has most
of the load, which is more than it says to have seen. What it has seen is a row here, and what it
draws is another.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from skew import busiest_rank
from tables import Array

from expertlane.cost.routing import PowerLawRouting
from expertlane.spec.model import Routing

EXPONENTS = np.arange(0.0, 1.61, 0.1)
_NUM_TOKENS, _NUM_LAYERS = 4096, 8

Statistic = Callable[[Array], float]  # of loads [num_experts]


@dataclass(frozen=True)
class Published:
    """A statistic of the loads of a layer's experts, the mean over layers where there are more.

    Attributes:
        value: as it was published.
        is_least: whether the source says that, or more.
    """

    model: str
    num_experts: int
    top_k: int
    what: str
    statistic: Statistic
    value: float
    source: str
    groups: Routing = field(default_factory=Routing)
    is_least: bool = False


def share_of_busiest(part: float) -> Statistic:
    """The share of the busiest part of the experts."""

    def of(loads: Array) -> float:
        descending = np.sort(loads)[::-1]
        return float(descending[: round(part * len(loads))].sum() / loads.sum())

    return of


def num_for(share: float) -> Statistic:
    """How many of the busiest experts have a share of the load."""

    def of(loads: Array) -> float:
        held = np.cumsum(np.sort(loads)[::-1]) / loads.sum()
        return float(np.interp(share, held, np.arange(1, len(loads) + 1)))

    return of


def gini(loads: Array) -> float:
    """Gini's coefficient: 0 where all are the same."""
    ascending = np.sort(loads)
    places = np.arange(1, len(loads) + 1)
    return float(2 * (places * ascending).sum() / (len(loads) * loads.sum()) - 1 - 1 / len(loads))


def busiest_expert(loads: Array) -> float:
    """Over the mean."""
    return float(loads.max() / loads.mean())


def busiest_of_ranks(num_ranks: int) -> Statistic:
    """The load of the busiest rank over the mean, experts as they come."""

    def of(loads: Array) -> float:
        by_rank = loads.reshape(num_ranks, -1).sum(axis=1)
        return float(by_rank.max() / by_rank.mean())

    return of


def deviation_of(num: int) -> Statistic:
    """The standard deviation over the mean, of so many experts at a time."""

    def of(loads: Array) -> float:
        parts = loads[: len(loads) // num * num].reshape(-1, num)
        return float(np.mean(parts.std(axis=1) / parts.mean(axis=1)))

    return of


_DEEPSEEK = Routing(n_group=8, topk_group=4, group_score="top2_sum")
# Loads of the 16 experts of one of 16 ranks, one layer; and of the first 23 of 256 experts.
_OF_A_RANK = (
    *(162554, 147879, 102827, 108924, 46123, 505540, 98864, 184719, 322237, 128708),
    *(117722, 118096, 73528, 245469, 119943, 69937),
)
_FIRST = (
    *(10545, 11846, 8542, 33117, 8385, 4892, 24052, 27875, 12287, 21604, 31428, 19248),
    *(13467, 12080, 5198, 1323, 19034, 28040, 44965, 3112, 13323, 4808, 10167),
)
_AIC = "aiconfigurator, docs/POWER_LAW_DISTRIBUTION.md"
_DODOCO = "arXiv 2605.20982, WikiText"
_HANDBOOK = "gpu-container handbook (mcp-tool-shop), Routing De-risk"


def _own(loads: Sequence[int]) -> float:
    return deviation_of(len(loads))(np.array(loads, dtype=np.float64))


PUBLISHED = (
    Published("DeepSeek-R1", 256, 8, "share of the busiest fifth, 30 to 40 %",
              share_of_busiest(0.2), 0.35, f"{_AIC}: CNN/DailyMail, OpenOrca", _DEEPSEEK),
    Published("DeepSeek-V3", 256, 8, "deviation of 16 experts' counts", deviation_of(16),
              _own(_OF_A_RANK), "SGLang, pull request 5524, 2025-05-13", _DEEPSEEK),
    Published("256 experts, EPLB", 256, 8, "deviation of 23 experts' counts", deviation_of(23),
              _own(_FIRST), "deepseek-ai/EPLB, issue 22: collected top-k traces", _DEEPSEEK),
    Published("DeepSeek-V2-Lite", 64, 6, "Gini", gini, 0.24, _DODOCO, is_least=True),
    Published("DeepSeek-MoE-16B", 64, 6, "Gini", gini, 0.105, _DODOCO),
    Published("Nemotron-30B", 128, 6, "Gini", gini, 0.15, _DODOCO),
    Published("Qwen3.5-35B", 256, 8, "Gini", gini, 0.24, _DODOCO, is_least=True),
    Published("Qwen3.6-35B-A3B", 256, 8, "busiest of 4 ranks over the mean", busiest_of_ranks(4),
              1.35, "aiconfigurator, EXPERT_ROUTING_CAPTURE.md: measured on B300"),
    Published("Qwen3-30B-A3B", 128, 8, "experts for 90 % of the load, prose, code, mathematics",
              num_for(0.9), 65, _HANDBOOK),
    Published("Qwen3-30B-A3B", 128, 8, "experts for 90 % of the load, Python alone", num_for(0.9),
              58, _HANDBOOK),
    Published("Qwen3.8-Flash-Next", 512, 10, "busiest expert over the mean", busiest_expert, 2.5,
              "llama.cpp, pull request 28544"),
)  # fmt: skip


def main() -> None:
    """Print the table, and what follows for the default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = list(dict.fromkeys(each.model for each in PUBLISHED))
    parser.add_argument("models", nargs="*", choices=[[], *every], metavar="MODEL")
    models = parser.parse_args().models or every
    print("| model | statistic | published | exponent | source |")
    print("| --- | --- | ---: | ---: | --- |")
    found = []
    for each in (each for each in PUBLISHED if each.model in models):
        exponent = exponent_of(each)
        found.append(exponent)
        least = "≥ " if each.is_least else ""
        print(
            f"| {each.model} | {each.what} | {least}{each.value:.3g} | {least}{exponent:.2f} | "
            f"{each.source} |"
        )
    for alpha in (1.01, 1.2) if models == every else ():
        drawn = _drawn_by_aiconfigurator(alpha)
        same = Published("", 256, 8, "", busiest_of_ranks(8), drawn, "")
        print(
            f"| (aiconfigurator draws) | busiest of 8 ranks over the mean, density x^-{alpha} | "
            f"{drawn:.3g} | {exponent_of(same):.2f} | calibration/skew.py |"
        )
    print(f"\nMedian of the published: {median(found):.2f}; from {min(found):.2f} to "
          f"{max(found):.2f}.")  # fmt: skip


def exponent_of(published: Published) -> float:
    """With which the statistic is as published, on average over drawn layers."""
    of_exponents = [_mean(published, float(each)) for each in EXPONENTS]
    rising = np.maximum.accumulate(np.array(of_exponents) * _sign(of_exponents))
    return float(np.interp(published.value * _sign(of_exponents), rising, EXPONENTS))


def _sign(values: Sequence[float]) -> int:
    return 1 if values[-1] > values[0] else -1


def _mean(published: Published, exponent: float) -> float:
    routing = PowerLawRouting(
        published.num_experts,
        published.top_k,
        exponent,
        num_sampled_layers=_NUM_LAYERS,
        groups=published.groups,
    )
    none, owned = np.zeros(1, dtype=np.int64), np.array([_NUM_TOKENS])
    loads = (
        np.bincount(
            routing.topk_ids(layer, 0, none, owned).ravel(), minlength=published.num_experts
        )
        for layer in range(_NUM_LAYERS)
    )
    return float(np.mean([published.statistic(each.astype(np.float64)) for each in loads]))


def _drawn_by_aiconfigurator(alpha: float) -> float:
    sizes = {"num_tokens": 4096, "topk": 8, "num_experts": 256, "moe_ep_size": 8, "alpha": alpha}
    pairs, _ = busiest_rank({name: np.array([value]) for name, value in sizes.items()})
    return float(pairs[0]) / (sizes["num_tokens"] * sizes["topk"] / sizes["moe_ep_size"])


if __name__ == "__main__":
    main()
