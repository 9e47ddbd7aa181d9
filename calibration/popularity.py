"""How skewed routing is: published statistics of experts' loads, and the exponent that has each.

python calibration/popularity.py              prints Markdown
python calibration/popularity.py deepseek_v3  some of the families

Routing is taken as a projection draws it: the expert at place i of an order has a weight of
(1 + i)^-exponent, and a token draws its experts by weight, none twice. A family's exponent (`skew`
in `spec/families.json`) is the median over its models, rounded to 0.05; of families without any it
is the median over all models (`spec.ranges.DEFAULT_SKEW`). Statistics of routing alone are
used, no throughput. Rows of one narrow kind of requests bound the exponent from above
(`SKEW_BOUNDS`); they count among a family's where no others are known.

Popularity also drifts after experts were placed by it. How much (`DRIFT`) follows from the last
table but one: what is left of the imbalance of DeepSeek-R1's 32 ranks after they were balanced.

Tokens of one prompt choose similar experts. How alike (`LIKENESS`) follows from the last table: one
document puts 2.24 times the mean on the busiest of 8 chips. Beside it stands what was not used: how
much of the busiest quarter of a model's experts is another in the next prompt; least, median and
most of nine models. Published is how much is another in the next 1,000 tokens, of conversations of
some 900 one after the other: 42, 50 and 64 %, so a little more where none goes on.

aiconfigurator draws loads, not experts, from a power law, so its exponents are not ours: of the
density x^-1.01 of loads between 1 and 0.8 of the tokens, the busiest fifth of 256 experts has most
of the load, which is more than it says to have seen. What it has seen is a row here.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np
from tables import Array

from expertlane.cost.routing import PowerLawRouting
from expertlane.spec.layout import Layout
from expertlane.spec.model import Routing
from expertlane.spec.ranges import DEFAULT_SKEW

EXPONENTS = np.arange(0.0, 1.61, 0.1)
_NUM_TOKENS, _NUM_LAYERS = 4096, 8

Statistic = Callable[[Array], float]  # of loads [num_experts]


@dataclass(frozen=True)
class Published:
    """A statistic of the loads of a layer's experts, the mean over layers where there are more.

    Attributes:
        family: its `model_type`; "" of a family that is not supported.
        value: as it was published.
        is_least: whether the source says that, or more.
        is_narrow: measured on requests of one narrow kind.
    """

    family: str
    model: str
    num_experts: int
    top_k: int
    what: str
    statistic: Statistic
    value: float
    source: str
    groups: Routing = field(default_factory=Routing)
    is_least: bool = False
    is_narrow: bool = False


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
_TRT = "TensorRT-LLM, tech blog 4, table 1: decode of translations"
_NINE = "moe-speed-of-light (harshithkantamneni), policy study §2: 160 conversations"
_QUARTER = "share of the busiest quarter"


def _own(loads: Sequence[int]) -> float:
    return deviation_of(len(loads))(np.array(loads, dtype=np.float64))


def _nine(family: str, model: str, experts: int, top_k: int, value: float) -> Published:
    quarter = round(experts / 4) / experts
    return Published(
        family, model, experts, top_k, _QUARTER, share_of_busiest(quarter), value, _NINE
    )


PUBLISHED = (
    Published("deepseek_v3", "DeepSeek-R1", 256, 8, "share of the busiest fifth, 30 to 40 %",
              share_of_busiest(0.2), 0.35, f"{_AIC}: CNN/DailyMail, OpenOrca", _DEEPSEEK),
    Published("deepseek_v3", "DeepSeek-R1", 256, 8, "busiest of 32 ranks over the mean",
              busiest_of_ranks(32), 2.564, _TRT, _DEEPSEEK, is_narrow=True),
    Published("deepseek_v3", "DeepSeek-R1", 256, 8, "deviation of all experts' counts",
              deviation_of(256), 1.282, _TRT, _DEEPSEEK, is_narrow=True),
    Published("deepseek_v3", "DeepSeek-V3", 256, 8, "deviation of 16 experts' counts",
              deviation_of(16), _own(_OF_A_RANK), "SGLang, pull request 5524, 2025-05-13",
              _DEEPSEEK),
    Published("deepseek_v3", "256 experts, EPLB", 256, 8, "deviation of 23 experts' counts",
              deviation_of(23), _own(_FIRST), "deepseek-ai/EPLB, issue 22: collected top-k traces",
              _DEEPSEEK),
    Published("deepseek_v2", "DeepSeek-V2-Lite", 64, 6, "Gini", gini, 0.24, _DODOCO, is_least=True),
    _nine("deepseek_v2", "DeepSeek-V2-Lite", 64, 6, 0.31),
    Published("", "DeepSeek-MoE-16B", 64, 6, "Gini", gini, 0.105, _DODOCO),
    _nine("mixtral", "Mixtral-8x7B", 8, 2, 0.29),
    _nine("qwen2_moe", "Qwen1.5-MoE", 60, 4, 0.32),
    _nine("qwen2_moe", "Qwen2-57B", 64, 8, 0.45),
    _nine("qwen3_moe", "Qwen3-30B-A3B", 128, 8, 0.43),
    Published("qwen3_moe", "Qwen3-30B-A3B", 128, 8, "experts for 90 % of the load, three kinds",
              num_for(0.9), 65, _HANDBOOK, is_narrow=True),
    Published("qwen3_moe", "Qwen3-30B-A3B", 128, 8, "experts for 90 % of the load, Python alone",
              num_for(0.9), 58, _HANDBOOK, is_narrow=True),
    _nine("olmoe", "OLMoE", 64, 8, 0.50),
    _nine("gpt_oss", "gpt-oss-20b", 32, 4, 0.45),
    _nine("gpt_oss", "gpt-oss-120b", 128, 4, 0.56),
    _nine("", "Phi-3.5-MoE", 16, 2, 0.39),
    Published("", "GLM-5.2", 256, 8, "share of the busiest fifth", share_of_busiest(0.2), 0.60,
              "mi210-vllm (davetha), docs/ROUTING.md: six kinds of text"),
    Published("", "Nemotron-30B", 128, 6, "Gini", gini, 0.15, _DODOCO),
    Published("", "Qwen3.5-35B", 256, 8, "Gini", gini, 0.24, _DODOCO, is_least=True),
    Published("", "Qwen3.6-35B-A3B", 256, 8, "busiest of 4 ranks over the mean",
              busiest_of_ranks(4), 1.35, "aiconfigurator, EXPERT_ROUTING_CAPTURE.md: on B300"),
    Published("", "Qwen3.8-Flash-Next", 512, 10, "busiest expert over the mean", busiest_expert,
              2.5, "llama.cpp, pull request 28544"),
)  # fmt: skip
# Of its ranks after balancing with one more slot each: the busiest over the mean (the same table).
_BALANCED = 1.109
_DRIFTS = np.arange(0.0, 0.45, 0.05)
# Mistral Small 4 (128 experts, top 4), a document of 5,120 tokens on 8 chips: the busiest over the
# mean, in layers 18 to 26. Tenstorrent tt-metal, "B1: paired routing and timing".
_DOCUMENT = 2.92, 2.16, 2.40, 2.21, 2.05, 1.77, 2.80, 2.19, 1.63
_DOCUMENT_TOKENS, _NEXT_TOKENS = 5120, 1000
_LIKENESSES = 0.0, 0.1, 0.15, 0.2, 0.25, 0.3
_PROMPTS, _PROMPT_LAYERS = 16, 64


def main() -> None:
    """Print the tables, and what follows for the defaults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = list(dict.fromkeys(each.family for each in PUBLISHED if each.family))
    parser.add_argument("families", nargs="*", choices=[[], *known], metavar="FAMILY")
    families = parser.parse_args().families
    print("| model | statistic | published | exponent | source |")
    print("| --- | --- | ---: | ---: | --- |")
    found: list[tuple[Published, float]] = []
    for each in PUBLISHED:
        if families and each.family not in families:
            continue
        found.append((each, exponent_of(each)))
        least = "≥ " if each.is_least else ""
        narrow = "; one kind of requests" if each.is_narrow else ""
        print(
            f"| {each.model} | {each.what} | {least}{each.value:.3g} | {least}{found[-1][1]:.2f} | "
            f"{each.source}{narrow} |",
            flush=True,
        )
    of_families = _by_family(found)
    for name, exponent in of_families.items():
        print(f"\n{name or 'unsupported'}: {exponent:.2f}", end="")
    print(f"\n\nMedian over models: {median(_by_model(found).values()):.2f}")
    if families:
        return
    exponent = next(of for each, of in found if each.source == _TRT)
    left = [_left_after_balancing(exponent, float(drift)) for drift in _DRIFTS]
    print("\n| drift | busiest of 32 ranks after balancing, over the mean |\n| ---: | ---: |")
    for drift, imbalance in zip(_DRIFTS, left, strict=True):
        print(f"| {drift:.2f} | {imbalance:.3f} |")
    drift = np.interp(_BALANCED, np.maximum.accumulate(left), _DRIFTS)
    print(f"\nDrift with which it is {_BALANCED} at exponent {exponent:.2f}: {drift:.2f}")
    _print_likeness()


def _print_likeness() -> None:
    nine = [each for each in PUBLISHED if each.source == _NINE]
    print("\n| likeness | busiest of 8 chips, one document | other busiest quarter: nine models |")
    print("| ---: | ---: | ---: |")
    of_document = []
    for likeness in _LIKENESSES:
        of_document.append(_of_one_document(likeness))
        changed = sorted(_changed_quarter(each, likeness) for each in nine)
        told = ", ".join(f"{each:.0%}" for each in (changed[0], median(changed), changed[-1]))
        print(f"| {likeness:.2f} | {of_document[-1]:.2f} | {told} |", flush=True)
    published = float(np.mean(_DOCUMENT))
    found = float(np.interp(published, of_document, _LIKENESSES))
    print(f"\nLikeness with which a document has {published:.2f}: {found:.2f}")


def _of_one_document(likeness: float) -> float:
    """Busiest of 8 chips over the mean, of the tokens of a document."""
    routing = PowerLawRouting(
        128, 4, DEFAULT_SKEW, num_sampled_layers=_PROMPT_LAYERS, likeness=likeness
    )
    found = [
        busiest_of_ranks(8)(each)
        for layer in range(_PROMPT_LAYERS)
        for each in _loads_of_prompts(routing, layer, _DOCUMENT_TOKENS)
    ]
    return float(np.mean(found))


def _changed_quarter(published: Published, likeness: float) -> float:
    """Which share of the busiest quarter is another one in the next prompt."""
    sizes = published.num_experts, published.top_k, exponent_of(published)
    routing = PowerLawRouting(*sizes, num_sampled_layers=_NUM_LAYERS, likeness=likeness)
    num = round(published.num_experts / 4)
    found = []
    for layer in range(_NUM_LAYERS):
        loads = _loads_of_prompts(routing, layer, _NEXT_TOKENS)
        busiest = np.argsort(-loads, axis=1)[:, :num]
        found += [len(np.setdiff1d(*pair)) / num for pair in pairwise(busiest)]
    return float(np.mean(found))


def _loads_of_prompts(routing: PowerLawRouting, layer: int, length: int) -> Array:
    """[prompts, num_experts]."""
    none, num_new = np.zeros(1, dtype=np.int64), np.full(_PROMPTS, length)
    ids = routing.topk_ids(layer, 0, none, num_new.sum(keepdims=True), num_new)
    of_prompts = ids.reshape(_PROMPTS, -1)
    loads = [np.bincount(each, minlength=routing.num_experts) for each in of_prompts]
    return np.array(loads, dtype=np.float64)


def _by_model(found: Sequence[tuple[Published, float]]) -> dict[str, float]:
    """Median of each model's sources; of narrow kinds of requests where there are no others."""
    usual: dict[str, list[float]] = {}
    for is_narrow in (False, True):
        for each, exponent in found:
            if each.is_narrow == is_narrow and (is_narrow is False or each.model not in usual):
                usual.setdefault(each.model, []).append(exponent)
    return {model: median(exponents) for model, exponents in usual.items()}


def _by_family(found: Sequence[tuple[Published, float]]) -> dict[str, float]:
    families = dict.fromkeys(each.family for each, _ in found)
    return {
        family: median(_by_model([pair for pair in found if pair[0].family == family]).values())
        for family in families
    }


def _left_after_balancing(exponent: float, drift: float) -> float:
    """Busiest of 32 ranks of DeepSeek-R1 over the mean, with one more slot on each."""
    layers, layout = range(_NUM_LAYERS), Layout(dp=32, ep=32)
    routing = PowerLawRouting(
        256, 8, exponent, num_sampled_layers=_NUM_LAYERS, groups=_DEEPSEEK, drift=drift
    )
    none, owned = np.zeros(1, dtype=np.int64), np.array([_NUM_TOKENS])
    found = []
    for layer, placement in zip(layers, routing.placements(layers, layout, 32, 32), strict=True):
        counts = np.bincount(routing.topk_ids(layer, 0, none, owned).ravel(), minlength=256)
        by_rank = placement.rank_loads(counts, 32)
        found.append(by_rank.max() / by_rank.mean())
    return float(np.mean(found))


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


if __name__ == "__main__":
    main()
