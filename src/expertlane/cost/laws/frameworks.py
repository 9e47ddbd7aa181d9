"""Serving frameworks: what a step and a request cost on their hosts, and how that was judged.

`frameworks.toml` has a few numbers of each, fitted by `calibration/judge_serving.py` to half of the
public measurements of DeepSeek-R1 that it reads, and judged on the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from expertlane.cost.laws.execution import DRIVER_S
from expertlane.cost.laws.profile import Profile, Term
from expertlane.cost.laws.profile_file import (
    ModelledCluster,
    TermTable,
    parse_cluster,
    read_term,
)
from expertlane.cost.laws.times import Basis
from expertlane.errors import SpecError, naming
from expertlane.results.hardware import Judged, KnownError
from expertlane.spec.files import CONFIG_BYTES, read_toml
from expertlane.spec.model import ModelConfig
from expertlane.spec.ranges import Strict, shown
from expertlane.spec.tables import build

FILE = Path(__file__).with_name("frameworks.toml")


Attention = Literal["latent", "grouped", "sinks"]
Ratios = tuple[float, float]  # a low and a high one


@dataclass(frozen=True)
class Framework:
    """How a framework serves.

    Attributes:
        title: as its makers write it.
        max_num_batched_tokens: of a step and data-parallel rank.
        prompt_wait_steps: as of `schedule.request.Limits`.
        terms: in place of a profile's: `driver_s`, `arrival_s`; of frameworks that were not fitted
            none.
        fitted_to: `sizes_of` the model that the terms were fitted to.
    """

    name: str
    title: str
    max_num_batched_tokens: int
    prompt_wait_steps: int
    terms: Mapping[str, Term]
    fitted_to: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class _Framework(Strict):
    title: str
    max_num_batched_tokens: int
    prompt_wait_steps: int
    terms: dict[str, TermTable] = field(default_factory=dict)
    fitted_to: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class JudgedGroup(Strict):
    """Rows of one kind that projections were held against; errors are medians of their size.

    Attributes:
        hardware: the profile's name.
        weights: their number type.
        has_two_pools, has_drafts: prefill apart from decode; multi-token prediction.
        framework: whose rows they are, projected with its overheads; "" for rows of all frameworks,
            projected without any.
        tpot, output, ttft: of TPOT, of output throughput, and of TTFT.
        tpot_range, output_range, ttft_range: of what was measured over what was projected, the 5th
            and 95th percentile, or 1; of TTFT (1, 1) where what was measured is not projected.
        model: that was measured.
        sizes: its layers, hidden size, and experts.
        attention: its kind: with latents, of queries in groups, or such with sinks.
    """

    hardware: str
    weights: str
    has_two_pools: bool
    has_drafts: bool
    framework: str
    num_rows: int
    tpot: float
    output: float
    ttft: float
    tpot_range: Ratios
    output_range: Ratios
    ttft_range: Ratios
    model: str = "DeepSeek-R1"
    sizes: tuple[int, int, int] = (61, 7168, 256)
    attention: Attention = "latent"


@dataclass(frozen=True)
class _File(Strict):
    frameworks: dict[str, _Framework]
    judged: list[JudgedGroup] = field(default_factory=list)


@cache
def _file() -> _File:
    return build(_File, read_toml(FILE, CONFIG_BYTES))


@cache
def frameworks() -> Mapping[str, Framework]:
    """All that are known, by name."""
    with naming(FILE):
        return {
            name: Framework(
                name,
                each.title,
                each.max_num_batched_tokens,
                each.prompt_wait_steps,
                {term: read_term(law, f"{name}.{term}") for term, law in each.terms.items()},
                each.fitted_to,
            )
            for name, each in _file().frameworks.items()
        }


def judged_groups() -> Sequence[JudgedGroup]:
    """Kinds of rows that projections were held against, of ten rows and more."""
    return _file().judged


def find_framework(name: str) -> Framework:
    """One of them.

    Raises:
        SpecError: there is none of that name.
    """
    known = frameworks()
    if name not in known:
        raise SpecError(f"no framework is called {shown(name)}; there are {', '.join(known)}")
    return known[name]


def served_by(profile: Profile, framework: Framework, model: ModelConfig) -> Profile:
    """The profile with a framework's terms in place of its own.

    The time between steps holds for the model that it was fitted to alone: it also stands for what
    laws of that model's layers lack. With others on the same card it made errors larger.
    """
    terms = dict(framework.terms)
    if framework.fitted_to != sizes_of(model):
        terms.pop(DRIVER_S, None)
    return replace(profile, terms={**profile.terms, **terms}, framework=framework.name)


def served_cluster(text: str, framework: str | None, model: ModelConfig) -> ModelledCluster:
    """Read a cluster, as `parse_cluster`, and how a model is served on it.

    Raises:
        SpecError: no such cluster or framework.
    """
    cluster = parse_cluster(text)
    if framework is None:
        return cluster
    served = served_by(cluster.profile, find_framework(framework), model)
    return replace(cluster, profile=served)


# benchmarks/results/2026-11-25-bench_projection-final.json; nothing of it was fitted.
CALIBRATED = Judged("step time, 36 deployments, after expertlane calibrate", 72, 0.056)


def _is_measured(profile: Profile) -> bool:
    firmest = min((law.basis for law in profile.surfaces.values()), default=Basis.BOUND)
    return firmest is Basis.MEASURED


def judged(
    profile: Profile,
    weights: str,
    *,
    model: ModelConfig,
    has_two_pools: bool = False,
    has_drafts: bool = False,
) -> Judged | None:
    """Error of projections of the same model, device, number type and way of serving, if known.

    A profile that was measured on its machine was judged as such. Others by their device's name,
    and by the framework whose overheads they have.
    """
    if _is_measured(profile):
        return CALIBRATED
    kind = profile.name, weights, has_two_pools, has_drafts, profile.framework
    for each in judged_groups():
        if kind == _kind(each) and sizes_of(model) == each.sizes:
            return Judged(f"TPOT of {_what(each)}", each.num_rows, each.tpot)
    return None


def sizes_of(model: ModelConfig) -> tuple[int, int, int]:
    """Layers, hidden size and experts, by which a model is known again."""
    return model.num_hidden_layers, model.hidden_size, model.num_experts


def attention_of(model: ModelConfig) -> Attention:
    """Which kind of attention it has."""
    if model.latent is not None:
        return "latent"
    return "sinks" if model.attention_sinks else "grouped"


_GENERATIONS = (("h100", "h200"), ("b200", "b300", "gb200", "gb300"))


def nearest(
    profile: Profile,
    weights: str,
    *,
    model: ModelConfig,
    has_two_pools: bool = False,
    has_drafts: bool = False,
) -> KnownError | None:
    """How far off the nearest kind was that was judged; the widest where several are as near.

    Nearest in attention, then card, model, overheads of a framework, types, pools and drafts. None
    of a profile that was measured on its machine, whose bounds held where it was judged.
    """
    if _is_measured(profile):
        return None
    attention, sizes = attention_of(model), sizes_of(model)

    def distance(group: JudgedGroup) -> tuple[float, ...]:
        is_of_generation = any({profile.name, group.hardware} <= {*of} for of in _GENERATIONS)
        is_latent = "latent" in (group.attention, attention)
        return (
            0 if group.attention == attention else 2 if is_latent else 1,
            0 if group.hardware == profile.name else 1 if is_of_generation else 2,
            group.sizes != sizes,
            bool(group.framework) != bool(profile.framework),
            group.framework != profile.framework,
            group.weights != weights,
            group.has_two_pools != has_two_pools,
            group.has_drafts != has_drafts,
            -group.tpot_range[1] / group.tpot_range[0],
        )

    groups = sorted(judged_groups(), key=distance)
    if not groups:
        return None
    one, of_ttft = groups[0], next((each for each in groups if each.ttft_range[1] > 1), None)
    return KnownError(
        _what(one),
        one.num_rows,
        one.tpot_range,
        one.output_range,
        "" if of_ttft is None else _what(of_ttft),
        (1.0, 1.0) if of_ttft is None else of_ttft.ttft_range,
    )


def _kind(group: JudgedGroup) -> tuple[str, str, bool, bool, str]:
    return (
        group.hardware,
        group.weights,
        group.has_two_pools,
        group.has_drafts,
        group.framework,
    )


def _what(group: JudgedGroup) -> str:
    pools = "disaggregated" if group.has_two_pools else "aggregated"
    drafts = ", multi-token prediction" if group.has_drafts else ""
    by = f", {frameworks()[group.framework].title}" if group.framework else ""
    return f"{group.model}, {group.hardware.upper()}, {group.weights}, {pools}{drafts}{by}"
