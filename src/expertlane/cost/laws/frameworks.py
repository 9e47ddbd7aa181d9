"""Serving frameworks: how they schedule, what was fitted to them, and how that was judged.

`frameworks.toml` has a few numbers of each kind of serving, fitted by
`calibration/judge_serving.py` to half of the public measurements that it reads, and judged on the
other half. Below: what a projection's results say of its cluster, conditions and known errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import log
from pathlib import Path
from typing import Literal, NamedTuple

from expertlane.cost.laws.profile import ARRIVAL_S, Execution, ModelledCluster, Profile, Term
from expertlane.cost.laws.times import Basis
from expertlane.cost.step.operation import NumberTypes
from expertlane.errors import SpecError, did_you_mean
from expertlane.results.hardware import Cluster, KnownError, Validation, below_above
from expertlane.results.record import Conditions, DeploymentRecord
from expertlane.results.results import Assumption, Results
from expertlane.spec.deployment import DispatchForm
from expertlane.spec.files import CONFIG_BYTES, build, read_toml
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig
from expertlane.spec.names import EngineName
from expertlane.spec.ranges import Strict, shown

FILE = Path(__file__).with_name("frameworks.toml")


_GENERATIONS = {
    "Hopper": ("h100", "h200"),
    "Blackwell": ("b200", "b300", "gb200", "gb300"),
}
_RANKS_PER_HOST = 8
_STAGES = (0, 1, 2, 3, 5)  # lengths of a kind's prefixes that have numbers of their own

Attention = Literal["latent", "chosen", "grouped", "sinks", "states"]
_ALIKE: tuple[frozenset[Attention], ...] = (
    frozenset({"grouped", "sinks"}),
    frozenset({"latent", "chosen"}),
)
Ratios = tuple[float, float]  # a low and a high one


@dataclass(frozen=True)
class Framework(Strict):
    """A serving framework and its scheduling defaults.

    Attributes:
        title: name for display.
        max_num_batched_tokens: tokens per step and data-parallel rank.
        prompt_wait_steps, phases_apart: see `schedule.request.Limits`.
        engine: the serving engine.
    """

    title: str
    max_num_batched_tokens: int
    prompt_wait_steps: int
    engine: EngineName
    phases_apart: bool = False


@dataclass(frozen=True)
class FrameworkFit(Strict):
    """Correction of projections for one kind of serving.

    Attributes:
        kind: name of the kind in parts, as from `kinds_of`; each part narrows it.
        step_factor: factor on the times that laws give for a step.
        arrival_s: time from when a request is sent until it can be scheduled.
        num_points: measurements that it was fitted to.
    """

    kind: tuple[str, ...] = ()
    step_factor: float = 1.0
    arrival_s: float = 0.0
    num_points: int = 0


@dataclass(frozen=True)
class ErrorGroup(Strict):
    """Rows of one kind that projections were held against; errors are medians of their size.

    Attributes:
        hardware: the profile's name.
        weights: their number type.
        has_two_pools, has_drafts: prefill apart from decode; multi-token prediction.
        framework: whose rows they are, projected with its corrections; "" for rows of all
            frameworks, projected without.
        tpot, output, ttft: median absolute errors of TPOT, output throughput and TTFT.
        tpot_range, output_range, ttft_range: of what was measured over what was projected, the 5th
            and 95th percentile, or 1.
        model: the model that was measured.
        sizes: its layers, hidden size, and experts.
        attention: its kind, as `attention_of` has it.
        dates: dates of the first and the last measurement; "" where unknown.
        most_ranks: ranks of the largest replica, or pool's replica, that was measured.
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
    dates: tuple[str, str] = ("", "")
    most_ranks: int = 8


@dataclass(frozen=True)
class _File(Strict):
    frameworks: dict[str, Framework]
    fitted: list[FrameworkFit] = field(default_factory=list)
    judged: list[ErrorGroup] = field(default_factory=list)


@cache
def _file() -> _File:
    return build(_File, read_toml(FILE, CONFIG_BYTES))


def frameworks() -> Mapping[str, Framework]:
    """All known frameworks, by name."""
    return _file().frameworks


def kinds_of(
    framework: str,
    hardware: str,
    model: ModelConfig,
    weights: str,
    *,
    has_drafts: bool = False,
) -> Sequence[tuple[str, ...]]:
    """Kinds of serving that a deployment belongs to, coarsest first."""
    sizes = _shown_sizes(sizes_of(model))
    of_card = framework, generation_of(hardware), sizes, hardware, weights
    drafts = "drafts" if has_drafts else "no drafts"
    return *(of_card[:end] for end in _STAGES), (*of_card, drafts)


def generation_of(hardware: str) -> str:
    """Generation of a card (Hopper, Blackwell); the profile's own name if it is in none."""
    known = (name for name, cards in _GENERATIONS.items() if hardware in cards)
    return next(known, hardware)


def judged_groups() -> Sequence[ErrorGroup]:
    """Kinds of rows that projections were held against, of ten rows and more."""
    return _file().judged


def find_framework(name: str) -> Framework:
    """The framework of that name.

    Raises:
        SpecError: there is none.
    """
    known = frameworks()
    if name not in known:
        plain = name.lower().replace("-", "").replace("_", "")
        near = [
            each
            for each, framework in known.items()
            if plain == framework.engine or plain in framework.title.lower().replace("-", "")
        ]
        near = [] if name.lower() in known else near  # the very name, in another case
        hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
        hint = f"did you mean {' or '.join(near)}?" if near else hint
        raise SpecError(
            f"no framework is called {shown(name)}; {hint} (expertlane list frameworks)"
        )
    return known[name]


def usual_dispatch(layout: Layout, profile: Profile) -> DispatchForm:
    """Default dispatch of the serving frameworks.

    Ranks that hold the attention of the same tokens have them already. Data-parallel ranks send
    them to each other's experts over nodes or a rack's NVLink, and gather all on a node of eight.
    """
    has_multi_node_nvlink = profile.ranks_per_node > _RANKS_PER_HOST
    is_wide = has_multi_node_nvlink or layout.stage_size > profile.ranks_per_node
    return "all_to_all" if layout.dp > 1 and is_wide else "all_gather"


def served_by(
    cluster: ModelledCluster,
    framework: str | None,
    model: ModelConfig,
    weights: str,
    *,
    has_drafts: bool = False,
) -> ModelledCluster:
    """The cluster with the corrections of a framework.

    From the narrowest fitted kind; models without measurements get those of the framework on that
    generation of cards.

    Args:
        framework: None for no correction.

    Raises:
        SpecError: no such framework, or a profile that was measured on its machine.
    """
    if framework is None:
        return cluster
    find_framework(framework)
    if _is_measured(cluster.profile):
        raise SpecError(
            f"--framework {framework}: {cluster.profile.name} was measured with expertlane's own "
            "engine, to which corrections of a framework do not apply; leave it out"
        )
    profile, known = cluster.profile, {each.kind: each for each in _file().fitted}
    kinds = kinds_of(framework, profile.name, model, weights, has_drafts=has_drafts)
    fitted = [known[kind] for kind in kinds if kind in known]
    served = replace(profile, framework=framework)
    return replace(cluster, profile=with_fitted(served, fitted[-1] if fitted else FrameworkFit()))


def with_fitted(profile: Profile, fitted: FrameworkFit) -> Profile:
    """The profile with laws scaled by `step_factor`, and the fitted arrival time."""
    if fitted == FrameworkFit():
        return profile
    of = ", ".join(map(_part_of_kind, fitted.kind)) or "all measurements"
    points = "1 point" if fitted.num_points == 1 else f"{fitted.num_points} points"
    origin = f"calibration/judge_serving.py: {points} of {of}"
    seconds = fitted.arrival_s
    arrival = Term(seconds, seconds / 2, 2 * seconds, Basis.FITTED, origin)
    surfaces = {
        name: replace(law, correction=law.correction + log(fitted.step_factor))
        for name, law in profile.surfaces.items()
    }
    terms = {**profile.terms, ARRIVAL_S: arrival}
    return replace(profile, surfaces=surfaces, terms=terms, step_factor=fitted.step_factor)


def _part_of_kind(part: str) -> str:
    """A model's sizes by a name that was judged."""
    names = {_shown_sizes(each.sizes): each.model for each in judged_groups()}
    return names.get(part, part)


# benchmarks/results/2026-11-25-bench_projection-final.json; nothing of it was fitted.
CALIBRATED = Validation("step time, 36 deployments, after expertlane calibrate", 72, 0.056)


def _is_measured(profile: Profile) -> bool:
    firmest = min((law.basis for law in profile.surfaces.values()), default=Basis.BOUND)
    return Basis.MEASURED in (firmest, profile.own_basis)


class ServingKind(NamedTuple):
    """A kind of serving, to find the measurements that its projections were judged on.

    Attributes:
        weights: their number type.
        has_two_pools, has_drafts: as of `ErrorGroup`.
        num_ranks: ranks of a replica of the recommended deployment, or of the largest; with more
            than were measured it is not of a judged kind itself.
    """

    model: ModelConfig
    weights: str
    has_two_pools: bool = False
    has_drafts: bool = False
    num_ranks: int = 1


def judged(profile: Profile, served: ServingKind) -> Validation | None:
    """Error of projections of the same model, device, number type and way of serving, if known.

    A profile that was measured on its machine was judged as such. Others by their device's name,
    and by the framework whose corrections they have.
    """
    if _is_measured(profile):
        return CALIBRATED
    for each in judged_groups():
        is_kind = not any(_differences(each, profile, served))
        if is_kind and served.num_ranks <= each.most_ranks:
            return Validation(f"TPOT of {_what(each)}", each.num_rows, each.tpot)
    return None


def _shown_sizes(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def sizes_of(model: ModelConfig) -> tuple[int, int, int]:
    """Layers, hidden size and experts, which identify a model."""
    return model.num_hidden_layers, model.hidden_size, model.num_experts


def attention_of(model: ModelConfig) -> Attention:
    """Beside states in other layers; with latents, of all positions or of chosen ones; with sinks;
    or of grouped queries alone."""
    if model.state is not None:
        return "states"
    if model.latent is not None or model.compressed is not None:
        return "latent" if model.indexer is None else "chosen"
    return "sinks" if model.attention_sinks else "grouped"


def nearest(profile: Profile, served: ServingKind) -> KnownError | None:
    """Known error of the judged kind nearest to this one; the widest of those equally near.

    Nearest in attention, then card, model, framework or none, which framework, types, pools and
    drafts.

    Returns:
        None for a profile that was measured on its machine, whose bounds held where it was judged.
    """
    if _is_measured(profile):
        return None

    def distance(group: ErrorGroup) -> tuple[float, ...]:
        widest_first = -group.tpot_range[1] / group.tpot_range[0]
        return *_differences(group, profile, served), widest_first

    one = min(judged_groups(), key=distance, default=None)
    if one is None:
        return None
    is_own_kind = bool(profile.framework) and not any(_differences(one, profile, served))
    is_own_kind &= served.num_ranks <= one.most_ranks
    return KnownError(
        _what(one), one.num_rows, one.tpot_range, one.output_range, one.ttft_range, is_own_kind
    )


def _differences(group: ErrorGroup, profile: Profile, served: ServingKind) -> tuple[int, ...]:
    """Differences of a judged kind from what is served, the gravest first; 0 where alike."""
    attention = attention_of(served.model)
    is_of_generation = generation_of(profile.name) == generation_of(group.hardware)
    is_alike = any({group.attention, attention} <= kinds for kinds in _ALIKE)
    return (
        0 if group.attention == attention else 1 if is_alike else 2,
        0 if group.hardware == profile.name else 1 if is_of_generation else 2,
        group.sizes != sizes_of(served.model),
        bool(group.framework) != bool(profile.framework),
        group.framework != profile.framework,
        group.weights != served.weights,
        group.has_two_pools != served.has_two_pools,
        group.has_drafts != served.has_drafts,
    )


def _what(group: ErrorGroup) -> str:
    pools = "disaggregated" if group.has_two_pools else "aggregated"
    drafts = ", multi-token prediction" if group.has_drafts else ""
    by = f", {frameworks()[group.framework].title}" if group.framework else ""
    first, last = (each[:7] for each in group.dates)
    months = first if first == last else f"{first} to {last}"
    dates = f", {months}" if months else ""
    card = group.hardware.upper()
    size = f"up to {group.most_ranks} GPUs a replica"
    return f"{group.model}, {card}, {group.weights}, {pools}, {size}{drafts}{by}{dates}"


def conditions_of(top_k: int, execution: Execution, routing: str, types: NumberTypes) -> Conditions:
    """Experts per token, execution, routing and number types of a projection."""
    return Conditions(top_k, execution.value, routing, types.weights, types.kv)


def cluster_record(cluster: ModelledCluster, served: ServingKind) -> Cluster:
    """The cluster as results have it."""
    profile, device = cluster.profile, cluster.profile.device
    return Cluster(
        name=str(cluster),
        device=device.name,
        num_devices=cluster.num_devices,
        ranks_per_node=profile.ranks_per_node,
        memory_bytes=device.memory_bytes,
        memory_bytes_per_s=device.memory_bytes_per_s,
        flops_per_s=device.flops_per_s[served.weights],
        framework=profile.framework,
        judged=judged(profile, served),
        nearest=nearest(profile, served),
    )


def with_known_errors(results: Results, model: ModelConfig, profile: Profile) -> Results:
    """Results whose throughput and latency have the error of the nearest measured kind as bounds.

    Bounds are no narrower than that, and no wider where the same kind of serving was measured.
    Ratios stay: what two deployments share of such an error cancels in them.
    """

    def bounded(record: DeploymentRecord) -> DeploymentRecord:
        if record.source != "projected" or record.conditions is None:
            return record
        pools = [each for each in (record.layout, record.prefill_layout) if each is not None]
        num_ranks = max(each.replica_size for each in pools)
        has_drafts = record.num_drafts > 0
        served = ServingKind(model, record.conditions.dtype, len(pools) > 1, has_drafts, num_ranks)
        known = nearest(profile, served)
        if known is None:
            return record
        serving = tuple(each.bounded_by(known) for each in record.serving)
        return replace(record, serving=serving)

    known = results.projected_for.nearest
    if profile.framework:
        results = replace(results, assumptions=(*results.assumptions, _corrections(profile)))
    if profile.corrected:
        fitted = Assumption("corrections", profile.corrected, change="--corrections")
        results = replace(results, assumptions=(*results.assumptions, fitted))
    if known is None:
        return results
    assumptions = *results.assumptions, _least_bounds(known)
    return replace(results.changed(bounded), assumptions=assumptions)


def _corrections(profile: Profile) -> Assumption:
    title, arrival = frameworks()[profile.framework].title, profile.terms.get(ARRIVAL_S)
    said = f"{title}: no corrections, for want of measurements"
    if arrival is not None:
        _, _, points = arrival.origin.partition(": ")
        said = (
            f"{title}: step times × {profile.step_factor:.2f}, arrival delay "
            f"{1e3 * arrival.value:.0f} ms (fitted to {points})"
        )
    return Assumption("framework", said, change="--framework")


def _least_bounds(known: KnownError) -> Assumption:
    said = (
        f"TPOT {below_above(known.tpot)}, tokens/s {below_above(known.output)}, "
        f"TTFT {below_above(known.ttft)}: 5th to 95th percentile of measured over projected: "
        f"{known.what}; ratios of deployments share such errors and keep their own bounds"
    )
    if known.is_own_kind:
        return Assumption("bounds", f"{said}; with larger replicas bounds are at least as wide")
    return Assumption("least bounds", f"at least {said}")
